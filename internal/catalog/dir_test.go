package catalog

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// watched is a catalog that follows a directory, and what came of it.
type watched struct {
	*Catalog
	dir    string
	states chan State
}

// follow starts to watch dir and waits for the first state that was applied, or
// for a problem.
func follow(t *testing.T, s store.Store, dir string) *watched {
	t.Helper()
	w := &watched{Catalog: newCatalog(t, s), dir: dir, states: make(chan State, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- w.WatchDir(ctx, dir) }()
	go func() {
		ended <- w.Watch(ctx, func(s State) error { w.states <- s; return nil })
	}()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("watching ended with %v", err)
			}
		}
	})
	return w
}

// await waits for the state that is good, and returns it.
func (w *watched) await(t *testing.T, what string, good func(State) bool) State {
	t.Helper()
	timeout := time.After(5 * time.Second)
	for {
		select {
		case s := <-w.states:
			if good(s) {
				return s
			}
		case <-timeout:
			t.Fatalf("%s: did not happen; problem: %s", what, w.Problem())
		}
	}
}

// awaitProblem waits for a problem that contains text, or for none when text is
// "".
func (w *watched) awaitProblem(t *testing.T, text string) {
	t.Helper()
	require.Eventually(t, func() bool {
		p := w.Problem()
		return text == "" && p == "" || text != "" && strings.Contains(p, text)
	}, 5*time.Second, time.Millisecond, "want a problem with %q", text)
}

func allowed(s State) bool { return reaches(s, "orders", "payments") }
func denied(s State) bool  { return s.Rev.N > 0 && !allowed(s) }

func write(t *testing.T, dir string, f files) {
	t.Helper()
	require.NoError(t, os.MkdirAll(dir, 0o755))
	for name, content := range f {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
}

// settled waits until what happened in the directory was read: a file that is
// made for the purpose has arrived.
func (w *watched) settled(t *testing.T) State {
	t.Helper()
	name := fmt.Sprintf("marker%d", time.Now().UnixNano())
	write(t, w.dir, files{"marker.yaml": workload(name)})
	return w.await(t, "the marker", func(s State) bool { _, ok := s.Rules.WorkloadByName(name); return ok })
}

func TestWatchDir(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, shop())
	w := follow(t, newStore(t), dir)
	w.await(t, "start", allowed)

	// Each way in which files change.
	path := filepath.Join(dir, "p.yaml")
	require.NoError(t, os.Remove(path))
	w.await(t, "removing a file", denied)
	begun := time.Now()
	write(t, dir, files{"p.yaml": allow("orders", "payments")})
	w.await(t, "writing a file", allowed)
	if took := time.Since(begun); took > 100*time.Millisecond {
		t.Logf("from edit to state: %s", took)
	}
	write(t, dir, files{".p.yaml.tmp": []byte("# nothing\n")})
	require.NoError(t, os.Rename(filepath.Join(dir, ".p.yaml.tmp"), path))
	w.await(t, "moving a file into place", denied)
	write(t, t.TempDir(), nil)
	other := filepath.Join(t.TempDir(), "p.yaml")
	require.NoError(t, os.WriteFile(other, allow("orders", "payments"), 0o644))
	require.NoError(t, os.Remove(path))
	require.NoError(t, os.Link(other, path))
	w.await(t, "linking a file into place", allowed)
	require.NoError(t, os.Rename(path, path+"~"))
	w.await(t, "moving a file away", denied)
	require.NoError(t, os.Rename(path+"~", path))
	w.await(t, "moving it back", allowed)

	// What editors leave behind does not matter.
	n := w.settled(t).Rev.N
	write(t, dir, files{".p.yaml.swp": []byte("x"), "p.yaml~": []byte("x"), "#p.yaml#": []byte("x"), "4913": []byte("x"), "README.md": []byte("x")})
	if got := w.settled(t).Rev.N; got != n+1 {
		t.Errorf("got revision %d, want %d: only the marker counts", got, n+1)
	}
	if p := w.Problem(); p != "" {
		t.Errorf("got problem %q, want none", p)
	}
	if rec := lastRecord(t, w.Catalog); rec.Actor != directoryActor || rec.Origin != dir {
		t.Errorf("got audit record %+v", rec)
	}
}

func TestWatchDirIsTheOneSource(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, with(shop(), "s.yaml", scope("billing", "invoices")))
	write(t, filepath.Join(dir, "billing"), files{"w.yaml": workload("invoices")})
	w := follow(t, newStore(t), dir)
	w.await(t, "start", allowed)
	_, err := w.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"": shop()}, Actor: "ann"})
	require.ErrorIs(t, err, ErrWatched)
	if rec := lastRecord(t, w.Catalog); rec.Actor != "ann" || rec.Result != "refused" {
		t.Errorf("got audit record %+v, want a refusal", rec)
	}
	_, err = w.Rollback(t.Context(), Rev{1, 1}, "ann", "")
	require.ErrorIs(t, err, ErrWatched)
	_, err = w.Apply(t.Context(), Change{Remove: []string{"billing"}})
	require.ErrorIs(t, err, ErrWatched)
	_, err = w.Apply(t.Context(), Change{Sets: map[string]map[string][]byte{"": with(shop(), "s.yaml", scope("billing", "invoices"))}, DryRun: true})
	require.NoError(t, err)
	require.Error(t, w.WatchDir(t.Context(), t.TempDir()), "a second directory")

	// A folder that vanishes keeps its set until an operator removes that.
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "billing")))
	w.awaitProblem(t, "run `sallyport set remove billing`")
	if got := w.settled(t); len(got.Sets) != 2 {
		t.Errorf("got %d sets, want the vanished one too", len(got.Sets))
	}
	_, err = w.Apply(t.Context(), Change{Remove: []string{"billing"}})
	require.NoError(t, err)
	w.await(t, "removing the set", func(s State) bool { return len(s.Sets) == 1 })
	w.awaitProblem(t, "")
}

func TestWatchDirMistakes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, shop())
	s := &failing{Store: newStore(t)}
	s.left.Store(math.MaxInt64) // it never fails, and counts
	w := follow(t, s, dir)
	w.await(t, "start", allowed)

	write(t, dir, files{"x.yaml": []byte("kind: Polices\n")})
	w.awaitProblem(t, "x.yaml:1:")
	if p, want := w.Problem(), dir+" is not in force as it stands; the last good state stays in force. The error:\n"; !strings.HasPrefix(p, want) {
		t.Errorf("got problem %q, want it to begin with %q", p, want)
	}
	records := func() int {
		r, err := w.Audit.Recent(t.Context(), 0)
		require.NoError(t, err)
		return len(r)
	}
	calls := s.left.Load()
	write(t, dir, files{"x.yaml": []byte("kind: Polices\n")}) // saved again, no better
	require.Eventually(t, func() bool { return s.left.Load() < calls }, 5*time.Second, time.Millisecond)
	write(t, dir, files{"y.yaml": []byte("kind: Polices\n")})
	w.awaitProblem(t, "y.yaml:1:")
	if n := records(); n != 3 {
		t.Errorf("got %d audit records, want the start and two refusals", n)
	}
	require.NoError(t, os.Remove(filepath.Join(dir, "y.yaml")))
	require.Eventually(t, func() bool { return !strings.Contains(w.Problem(), "y.yaml") }, 5*time.Second, time.Millisecond)
	if rec := lastRecord(t, w.Catalog); rec.Result != "refused" || !strings.Contains(rec.Detail, "x.yaml:1:") {
		t.Errorf("got audit record %+v, want the refusal", rec)
	}
	if got := state(t, w.Catalog); got.Rev.N != 1 || !allowed(got) {
		t.Errorf("got %s, want 1.1 still in force", got.Rev)
	}

	// A restart with the mistake in the folder keeps the last good state.
	again := follow(t, s, t.TempDir())
	again.await(t, "restart", allowed)
	again.awaitProblem(t, "bring a Workload back")

	require.NoError(t, os.Remove(filepath.Join(dir, "x.yaml")))
	w.awaitProblem(t, "")
	for _, name := range []string{"a.yaml", "b.yaml", "p.yaml"} {
		require.NoError(t, os.Remove(filepath.Join(dir, name)))
	}
	w.awaitProblem(t, "bring a Workload back")
	if p := w.Problem(); strings.Contains(p, "set remove") {
		t.Errorf("got problem %q: the root set cannot be removed", p)
	}
	write(t, dir, with(shop(), "p.yaml", nil))
	w.await(t, "new files", denied)
	w.awaitProblem(t, "")

	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o600))
	w.awaitProblem(t, "pipe.yaml")
	require.NoError(t, os.Remove(filepath.Join(dir, "pipe.yaml")))
	w.awaitProblem(t, "")
	huge := filepath.Join(dir, "huge.yaml")
	f, err := os.Create(huge)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(100<<20))
	require.NoError(t, f.Close())
	w.awaitProblem(t, "huge.yaml")
	require.NoError(t, os.Remove(huge))
	w.awaitProblem(t, "")
	many := files{}
	for i := range 2100 {
		many[fmt.Sprintf("m%d.yaml", i)] = []byte("# many\n")
	}
	write(t, dir, many)
	w.awaitProblem(t, "files in one set")
}

func TestDirectoryGone(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	dir := filepath.Join(parent, "deep", "policy")
	write(t, dir, shop())
	w := follow(t, newStore(t), dir)
	first := w.await(t, "start", allowed)

	require.NoError(t, os.RemoveAll(dir))
	w.awaitProblem(t, "is not there")
	if rec := lastRecord(t, w.Catalog); rec.Result != "refused" {
		t.Errorf("got audit record %+v, want a refusal", rec)
	}
	write(t, dir, shop())
	w.awaitProblem(t, "")
	if got := state(t, w.Catalog); got.Rev != first.Rev || !allowed(got) {
		t.Errorf("got %s, want %s: nothing has changed", got.Rev, first.Rev)
	}

	// Replaced at once by another folder, which is watched from then on.
	write(t, filepath.Join(parent, "next"), with(shop(), "p.yaml", nil))
	require.NoError(t, os.Rename(dir, filepath.Join(parent, "old")))
	require.NoError(t, os.Rename(filepath.Join(parent, "next"), dir))
	w.await(t, "the other folder", denied)
	write(t, dir, shop())
	w.await(t, "an edit in it", allowed)

	// The folder above goes as well.
	require.NoError(t, os.RemoveAll(filepath.Dir(dir)))
	w.awaitProblem(t, "is not there")
	write(t, dir, with(shop(), "p.yaml", nil))
	w.await(t, "all back", denied)
	w.awaitProblem(t, "")
}

func TestSubFolders(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, with(shop(), "s.yaml", scope("billing", "invoices"), "z.yaml", scope("stock")))
	w := follow(t, newStore(t), dir)
	w.await(t, "start", allowed)
	write(t, filepath.Join(dir, "billing"), files{"w.yaml": workload("invoices"), "p.yaml": allow("orders", "invoices")})
	w.await(t, "a new folder", func(s State) bool { return reaches(s, "orders", "invoices") })
	write(t, filepath.Join(dir, "billing"), files{"p.yaml": []byte("# none\n")})
	w.await(t, "an edit in it", func(s State) bool { return !reaches(s, "orders", "invoices") })
	outside := filepath.Join(t.TempDir(), "stock")
	write(t, outside, files{"w.yaml": workload("stock")})
	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "stock")))
	w.await(t, "a linked folder", func(s State) bool { return len(s.Sets) == 3 })
	write(t, outside, files{"p.yaml": allow("orders", "stock")})
	w.await(t, "an edit in it", func(s State) bool { return reaches(s, "orders", "stock") })
}

// TestLastWorkloadOfFolder follows what the problem advises, where it can be
// followed.
func TestLastWorkloadOfFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	sub := filepath.Join(dir, "billing")
	write(t, dir, with(shop(), "s.yaml", scope("billing", "invoices")))
	write(t, sub, files{"w.yaml": workload("invoices")})
	w := follow(t, newStore(t), dir)
	w.await(t, "start", allowed)
	write(t, sub, files{"w.yaml": []byte("# none\n")})
	w.awaitProblem(t, fmt.Sprintf("or, if the set shall go, remove the folder %s and then run `sallyport set remove billing`", sub))
	require.NoError(t, os.RemoveAll(sub))
	w.awaitProblem(t, "has no folder in")
	_, err := w.Apply(t.Context(), Change{Remove: []string{"billing"}})
	require.NoError(t, err)
	w.awaitProblem(t, "")

	// The only set with a Workload has to keep it.
	dir = t.TempDir()
	sub = filepath.Join(dir, "billing")
	write(t, dir, files{"s.yaml": scope("billing", "invoices")})
	write(t, sub, files{"w.yaml": workload("invoices")})
	w = follow(t, newStore(t), dir)
	w.await(t, "start", func(s State) bool { return len(s.Sets) == 2 })
	write(t, sub, files{"w.yaml": []byte("# none\n")})
	w.awaitProblem(t, "bring a Workload back")
	if p := w.Problem(); strings.Contains(p, "set remove") {
		t.Errorf("got problem %q: that would be refused", p)
	}
	require.NoError(t, os.RemoveAll(sub))
	w.awaitProblem(t, "has no folder in")
	_, err = w.Apply(t.Context(), Change{Remove: []string{"billing"}})
	require.ErrorIs(t, err, policy.ErrNoWorkload)
}

// TestMountedVolume changes files as Kubernetes does: names are links through
// ..data, which is replaced by a rename.
func TestMountedVolume(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fill := func(version string, f files) {
		t.Helper()
		write(t, filepath.Join(dir, version), f)
		require.NoError(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
		require.NoError(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	fill("..1", shop())
	for name := range shop() {
		require.NoError(t, os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)))
	}
	w := follow(t, newStore(t), dir)
	w.await(t, "start", allowed)
	fill("..2", with(shop(), "p.yaml", []byte("# none\n")))
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "..1")))
	w.await(t, "the next version", denied)
	fill("..3", shop())
	w.await(t, "the third", allowed)
	w.awaitProblem(t, "")
}

func TestLinkedFiles(t *testing.T) {
	t.Parallel()
	dir, outside := t.TempDir(), t.TempDir()
	write(t, dir, with(shop(), "p.yaml", nil))
	write(t, outside, files{"real.yaml": allow("orders", "payments")})
	require.NoError(t, os.Symlink(filepath.Join(outside, "real.yaml"), filepath.Join(dir, "p.yaml")))
	w := follow(t, newStore(t), dir)
	w.await(t, "start", allowed)
	write(t, outside, files{"real.yaml": []byte("# none\n")})
	w.await(t, "an edit of the target", denied)
	require.NoError(t, os.Remove(filepath.Join(dir, "p.yaml")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "p.yaml"), allow("orders", "payments"), 0o644))
	w.await(t, "a file in place of the link", allowed)
}
