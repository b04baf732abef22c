package catalog

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestHalfWritten has a writer that stops in the middle of a file, where what is
// written so far would be valid and would lack the deny at the end.
func TestHalfWritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, shop())
	w := follow(t, newStore(t), dir)
	w.await(t, "start", allowed)
	half := allow("orders", "payments")
	deny := []byte("  deny:\n    - {from: [{workload: orders}], ports: [all]}\n")
	write(t, dir, files{"p.yaml": append(append([]byte{}, half...), deny...)})
	w.await(t, "denying", denied)
	n := w.settled(t).Rev.N

	f, err := os.OpenFile(filepath.Join(dir, "p.yaml"), os.O_WRONLY|os.O_TRUNC, 0)
	require.NoError(t, err)
	_, err = f.Write(half)
	require.NoError(t, err)
	write(t, dir, files{"c.yaml": []byte("# something else\n")})
	select {
	case s := <-w.states:
		t.Errorf("while a file is open for writing: got revision %s", s.Rev)
	case <-time.After(2*grace + 100*time.Millisecond): // that nothing happens takes its time
	}
	_, err = f.Write(deny)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	s := w.await(t, "the rest", func(State) bool { return true })
	if s.Rev.N != n+1 || allowed(s) {
		t.Errorf("got revision %s, want 1.%d, the next one, and it denies", s.Rev, n+1)
	}
	if p := w.Problem(); p != "" {
		t.Errorf("got problem %q, want none", p)
	}
}

// TestTruncated has writers that close a file whose tail is missing: one that
// writes the rest soon, and one that means it.
func TestTruncated(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	half := allow("orders", "payments")
	whole := append(allow("orders", "payments"), []byte("  deny:\n    - {from: [{workload: orders}], ports: [all]}\n")...)
	write(t, dir, with(shop(), "p.yaml", whole))
	w := follow(t, newStore(t), dir)
	w.await(t, "start", denied)
	nothing := func(d time.Duration) {
		t.Helper()
		select {
		case s := <-w.states:
			t.Errorf("got revision %s (allowed: %t) while a file lacks its tail", s.Rev, allowed(s))
		case <-time.After(d): // that nothing happens takes its time
		}
		if p := w.Problem(); p != "" {
			t.Errorf("got problem %q, want none", p)
		}
	}
	for _, piece := range [][]byte{half, nil, half[:len(half)-10]} {
		write(t, dir, files{"p.yaml": piece})
		nothing(300 * time.Millisecond)
		write(t, dir, files{"p.yaml": half}) // another piece: the second begins again
		nothing(tail - 300*time.Millisecond)
		write(t, dir, files{"p.yaml": append(append([]byte{}, whole...), "# more\n"...)})
		begun := time.Now()
		if s := w.await(t, "the rest", func(State) bool { return true }); allowed(s) {
			t.Errorf("revision %s was made without the deny", s.Rev)
		}
		if took := time.Since(begun); took > tail/2 {
			t.Errorf("the whole file took %s, want it at once", took)
		}
		write(t, dir, files{"p.yaml": append(append([]byte{}, whole...), "# less\n"...)})
		w.await(t, "another edit", denied)
	}

	begun := time.Now()
	write(t, dir, files{"p.yaml": half})
	s := w.await(t, "what was meant", func(State) bool { return true })
	if took := time.Since(begun); !allowed(s) || took < tail || took > 3*tail {
		t.Errorf("got allowed %t after %s, want true after %s", allowed(s), took, tail)
	}
	write(t, dir, files{"p.yaml": nil})
	w.awaitProblem(t, "p.yaml: the file is empty")
}

// TestEditorSteps replaces a file as vim does: the old one is moved away, and
// the new one is written in its place some time later.
func TestEditorSteps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	deny := append(allow("orders", "payments"), []byte("  deny:\n    - {from: [{workload: orders}], ports: [all]}\n")...)
	write(t, dir, with(shop(), "d.yaml", []byte(strings.Replace(string(deny), "orders-payments", "guard", 1))))
	w := follow(t, newStore(t), dir)
	w.await(t, "start", denied)
	path := filepath.Join(dir, "d.yaml")
	for range 5 {
		old, err := os.ReadFile(path)
		require.NoError(t, err)
		require.NoError(t, os.Rename(path, path+"~"))
		time.Sleep(grace / 5) // the time that a slow disk takes
		f, err := os.Create(path)
		require.NoError(t, err)
		for _, b := range [][]byte{old, []byte("# edited\n")} {
			_, err = f.Write(b)
			require.NoError(t, err)
			time.Sleep(3 * settle) // a writer that pauses
		}
		require.NoError(t, f.Close())
		require.NoError(t, os.Remove(path+"~"))
		if s := w.await(t, "the edit", func(State) bool { return true }); allowed(s) {
			t.Errorf("revision %s was made without the deny", s.Rev)
		}
	}
}
