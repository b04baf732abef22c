package catalog

import (
	"bytes"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBlobs(t *testing.T) {
	noise := make([]byte, 3*chunkSize+17)
	rng := rand.NewChaCha8([32]byte{})
	rng.Read(noise)
	for name, f := range map[string]files{
		"none":  {},
		"empty": {"a.yaml": {}},
		"some":  shop(),
		"big":   {"a.yaml": noise, "b.yaml": []byte("x\n")},
	} {
		chunks := newEncoder().encode(f)
		got, err := decode(chunks, digest(f))
		require.NoError(t, err, name)
		if !maps.EqualFunc(got, f, bytes.Equal) {
			t.Errorf("%s: got %d files that differ", name, len(got))
		}
		for _, c := range chunks {
			if len(c) > chunkSize {
				t.Errorf("%s: got a chunk of %d bytes", name, len(c))
			}
		}
	}
	if len(newEncoder().encode(files{"a.yaml": noise})) < 4 {
		t.Error("the big blob is not cut into chunks")
	}
}

func TestDamagedBlobs(t *testing.T) {
	good := newEncoder().encode(shop())
	flipped := slices.Clone(good[0])
	flipped[len(flipped)/2] ^= 1
	for name, chunks := range map[string][][]byte{
		"nothing": nil,
		"flipped": {flipped},
		"cut":     {good[0][:len(good[0])-3]},
		"other":   newEncoder().encode(files{"a.yaml": nil}),
	} {
		if _, err := decode(chunks, digest(shop())); !errors.Is(err, errBlob) {
			t.Errorf("%s: got %v, want a damaged blob", name, err)
		}
	}
}

func FuzzReadFiles(f *testing.F) {
	for _, seed := range []files{{}, {"a.yaml": {}}, shop()} {
		var b bytes.Buffer
		writeFiles(&b, seed)
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, plain []byte) {
		got, err := readFiles(plain)
		if err != nil {
			return
		}
		again, err := readFiles(plainOf(got))
		if err != nil || !maps.EqualFunc(got, again, bytes.Equal) {
			t.Errorf("got %v and %v after a round trip", again, err)
		}
	})
}

func plainOf(f files) []byte {
	var b bytes.Buffer
	writeFiles(&b, f)
	return b.Bytes()
}
