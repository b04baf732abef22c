package catalog

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// The files of a set travel as one blob, named by the SHA-256 of its plain form:
// for each file, by name, the length of the name, the name, the length of the
// content, the content. Lengths are unsigned varints. It is stored compressed
// (DEFLATE, RFC 1951) and cut into chunks.

// chunkSize is the size of a stored chunk in bytes, but for the last.
const chunkSize = 512 << 10

// maxBlob bounds the plain form: the files and their names.
const maxBlob = policy.MaxSetSize + policy.MaxFiles*1024

var errBlob = errors.New("damaged blob")

// digest names the content of files.
func digest(files map[string][]byte) string {
	h := sha256.New()
	writeFiles(h, files)
	return hex.EncodeToString(h.Sum(nil))
}

// writeFiles writes the plain form; the writers used here never fail.
func writeFiles(w io.Writer, files map[string][]byte) {
	var head []byte
	for _, name := range slices.Sorted(maps.Keys(files)) {
		head = binary.AppendUvarint(head[:0], uint64(len(name)))
		head = append(head, name...)
		head = binary.AppendUvarint(head, uint64(len(files[name])))
		w.Write(head)
		w.Write(files[name])
	}
}

// encoder makes stored forms; it is reused because a compressor is large. It is
// used by one goroutine.
type encoder struct{ w *flate.Writer }

func newEncoder() encoder {
	w, err := flate.NewWriter(nil, flate.BestSpeed)
	if err != nil { // the level is a constant
		panic(fmt.Sprintf("making a compressor: %v", err))
	}
	return encoder{w}
}

// encode gives the stored form of files, in chunks.
func (e encoder) encode(files map[string][]byte) [][]byte {
	var out bytes.Buffer
	e.w.Reset(&out)
	writeFiles(e.w, files)
	e.w.Close() // a bytes.Buffer takes everything
	return slices.Collect(slices.Chunk(out.Bytes(), chunkSize))
}

// decode reads what encode wrote and checks that it is the blob called want.
func decode(chunks [][]byte, want string) (map[string][]byte, error) {
	readers := make([]io.Reader, len(chunks))
	for i, c := range chunks {
		readers[i] = bytes.NewReader(c)
	}
	plain, err := io.ReadAll(io.LimitReader(flate.NewReader(io.MultiReader(readers...)), maxBlob+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBlob, err)
	}
	if len(plain) > maxBlob {
		return nil, fmt.Errorf("%w: more than %d bytes", errBlob, maxBlob)
	}
	if sum := sha256.Sum256(plain); hex.EncodeToString(sum[:]) != want {
		return nil, fmt.Errorf("%w: its SHA-256 is %x", errBlob, sum)
	}
	return readFiles(plain)
}

// readFiles is the inverse of writeFiles. The contents share plain's memory.
func readFiles(plain []byte) (map[string][]byte, error) {
	files := map[string][]byte{}
	last := ""
	for len(plain) > 0 {
		name, rest, ok := field(plain)
		if !ok {
			return nil, fmt.Errorf("%w: a name is cut off", errBlob)
		}
		content, rest, ok := field(rest)
		if !ok {
			return nil, fmt.Errorf("%w: a file is cut off", errBlob)
		}
		if len(files) > 0 && string(name) <= last {
			return nil, fmt.Errorf("%w: names are not in order", errBlob)
		}
		last = string(name)
		files[last] = content
		plain = rest
	}
	return files, nil
}

// field takes one length and as many bytes off b.
func field(b []byte) (value, rest []byte, ok bool) {
	n, used := binary.Uvarint(b)
	if used <= 0 || n > uint64(len(b)-used) {
		return nil, nil, false
	}
	b = b[used:]
	return b[:n:n], b[n:], true
}
