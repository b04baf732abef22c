package catalog

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// record is one struct inotify_event as the kernel writes it.
func record(wd int32, mask, cookie uint32, name string) []byte {
	padded := make([]byte, (len(name)+16)/16*16)
	copy(padded, name)
	var b []byte
	for _, v := range []uint32{uint32(wd), mask, cookie, uint32(len(padded))} {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return append(b, padded...)
}

func FuzzParseNotices(f *testing.F) {
	f.Add(slices.Concat(record(1, unix.IN_CREATE, 0, "a.yaml"), record(-1, unix.IN_Q_OVERFLOW, 0, "")))
	f.Add(record(1, unix.IN_CREATE, 0, "a.yaml")[:20])
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, n := range parseNotices(b) {
			if strings.ContainsRune(n.name, 0) {
				t.Errorf("name %q holds a NUL", n.name)
			}
		}
	})
}

func TestParseNotices(t *testing.T) {
	got := parseNotices(slices.Concat(record(1, unix.IN_MOVED_TO, 7, "a.yaml"), record(-1, unix.IN_Q_OVERFLOW, 0, "")))
	want := []notice{{1, unix.IN_MOVED_TO, 7, "a.yaml"}, {-1, unix.IN_Q_OVERFLOW, 0, ""}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// newWatcher is a watcher of one set folder whose files exist on disk, fed with
// notices by hand.
func newWatcher(t *testing.T, names ...string) *watcher {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	n, err := newNotifier()
	require.NoError(t, err)
	t.Cleanup(func() { n.close() })
	return &watcher{
		catalog: newCatalog(t, newStore(t)), dir: dir, n: n,
		folders: folders{n: n, dir: dir, all: map[int32]*folder{1: {path: dir, root: true, set: true}}},
		dirty:   map[place]time.Time{}, gone: map[place]time.Time{},
	}
}

// TestNotices feeds sequences of events and looks at what the watcher would do:
// read soon, read after the time of grace, not read, or nothing at all.
func TestNotices(t *testing.T) {
	create, modify, closed := uint32(unix.IN_CREATE), uint32(unix.IN_MODIFY), uint32(unix.IN_CLOSE_WRITE)
	from, to, del, isdir := uint32(unix.IN_MOVED_FROM), uint32(unix.IN_MOVED_TO), uint32(unix.IN_DELETE), uint32(unix.IN_ISDIR)
	for name, test := range map[string]struct {
		events []notice
		want   string
	}{
		"written":                 {[]notice{{1, create, 0, "a.yaml"}, {1, modify, 0, "a.yaml"}, {1, closed, 0, "a.yaml"}}, "soon"},
		"being written":           {[]notice{{1, create, 0, "a.yaml"}, {1, modify, 0, "a.yaml"}}, "no"},
		"created only":            {[]notice{{1, create, 0, "a.yaml"}}, "no"},
		"two, one being written":  {[]notice{{1, modify, 0, "a.yaml"}, {1, modify, 0, "b.yaml"}, {1, closed, 0, "a.yaml"}}, "no"},
		"written again":           {[]notice{{1, modify, 0, "a.yaml"}, {1, closed, 0, "a.yaml"}, {1, modify, 0, "a.yaml"}}, "no"},
		"removed":                 {[]notice{{1, del, 0, "x.yaml"}}, "after grace"},
		"replaced":                {[]notice{{1, del, 0, "a.yaml"}, {1, create, 0, "a.yaml"}, {1, closed, 0, "a.yaml"}}, "soon"},
		"removed while open":      {[]notice{{1, modify, 0, "x.yaml"}, {1, del, 0, "x.yaml"}}, "after grace"},
		"moved in":                {[]notice{{1, to, 5, "a.yaml"}}, "soon"},
		"moved over an open one":  {[]notice{{1, modify, 0, "a.yaml"}, {1, to, 5, "a.yaml"}}, "soon"},
		"moved away":              {[]notice{{1, from, 5, "x.yaml"}}, "after grace"},
		"open temporary moved in": {[]notice{{1, modify, 0, ".a.tmp"}, {1, from, 5, ".a.tmp"}, {1, to, 5, "a.yaml"}}, "no"},
		"and closed":              {[]notice{{1, modify, 0, ".a.tmp"}, {1, from, 5, ".a.tmp"}, {1, to, 5, "a.yaml"}, {1, closed, 0, "a.yaml"}}, "soon"},
		"closed temporary":        {[]notice{{1, modify, 0, ".a.tmp"}, {1, closed, 0, ".a.tmp"}, {1, from, 5, ".a.tmp"}, {1, to, 5, "a.yaml"}}, "soon"},
		"hidden":                  {[]notice{{1, create, 0, ".a.yaml.swp"}, {1, modify, 0, ".a.yaml.swp"}}, "nothing"},
		"another kind":            {[]notice{{1, modify, 0, "README.md"}, {1, closed, 0, "README.md"}}, "nothing"},
		"volume swapped":          {[]notice{{1, from, 9, "..data_tmp"}, {1, to, 9, "..data"}}, "soon"},
		"new folder":              {[]notice{{1, create | isdir, 0, "billing"}}, "after grace"},
		"folder moved in":         {[]notice{{1, to | isdir, 3, "billing"}}, "soon"},
		"hidden folder":           {[]notice{{1, create | isdir, 0, ".git"}}, "nothing"},
		"folder itself gone":      {[]notice{{1, unix.IN_DELETE_SELF, 0, ""}}, "soon"},
		"overflow":                {[]notice{{1, modify, 0, "a.yaml"}, {-1, unix.IN_Q_OVERFLOW, 0, ""}}, "after grace"},
		"unknown watch":           {[]notice{{9, closed, 0, "a.yaml"}}, "nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWatcher(t, "a.yaml", "b.yaml")
			w.see(test.events)
			got := "nothing"
			if !w.since.IsZero() {
				at, ok := w.readable()
				switch {
				case !ok:
					got = "no"
				case time.Until(at) > settle:
					got = "after grace"
				default:
					got = "soon"
				}
			}
			if got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

// TestRestless shows that a file which stays open is told as a problem, once,
// and that the watcher then waits for its end without a deadline.
func TestRestless(t *testing.T) {
	w := newWatcher(t, "a.yaml")
	w.see([]notice{{1, unix.IN_MODIFY, 0, "a.yaml"}})
	w.since = w.since.Add(-patience / 2)
	require.NoError(t, w.act(t.Context()))
	if p := w.catalog.Problem(); p != "" {
		t.Errorf("half the time: got problem %q, want none", p)
	}
	if at := w.next(); at != w.since.Add(patience) {
		t.Errorf("got next look at %s, want when patience ends", at)
	}
	w.since = w.since.Add(-patience)
	require.NoError(t, w.act(t.Context()))
	if p := w.catalog.Problem(); !strings.Contains(p, "a.yaml has been open for writing") {
		t.Errorf("got problem %q, want the open file", p)
	}
	if at := w.next(); !at.IsZero() {
		t.Errorf("got next look at %s, want none", at)
	}
	// Never quiet, though nothing is open.
	w = newWatcher(t, "a.yaml")
	w.see([]notice{{1, unix.IN_CLOSE_WRITE, 0, "a.yaml"}})
	w.since, w.quietAt = w.since.Add(-patience), w.quietAt.Add(time.Hour)
	require.NoError(t, w.act(t.Context()))
	if p := w.catalog.Problem(); !strings.Contains(p, "without a pause") {
		t.Errorf("got problem %q, want the restless directory", p)
	}
}

// TestOverflow fills the kernel's queue for real: a file changes while the
// watcher's queue is full, and is applied all the same.
func TestOverflow(t *testing.T) {
	limit, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	require.NoError(t, err)
	if len(strings.TrimSpace(string(limit))) > 5 {
		if os.Getenv("CI") != "" {
			t.Fatalf("the queue holds %s events: set fs.inotify.max_queued_events to 16384", limit)
		}
		t.Skipf("the queue holds %s events", limit)
	}
	dir := t.TempDir()
	write(t, dir, shop())
	s := &slowReads{Store: newStore(t), gate: make(chan struct{})}
	close(s.gate)
	w := follow(t, s, dir)
	w.await(t, "start", allowed)
	gate := s.shut()
	write(t, dir, files{"c.yaml": []byte("# wake up\n")})
	<-s.waiting
	for i := range 20_000 { // neighbouring events that are the same count once
		require.NoError(t, os.WriteFile(filepath.Join(dir, [2]string{"x", "y"}[i%2]), nil, 0o600))
	}
	write(t, dir, files{"p.yaml": []byte("# none\n")})
	close(gate)
	w.await(t, "the lost edit", denied)
}

// slowReads is a store whose Get waits while its gate is shut.
type slowReads struct {
	store.Store
	mu      sync.Mutex
	gate    chan struct{} // guarded by mu; closed: open
	waiting chan struct{} // tells that a Get waits
}

// shut lets the next Get wait until the channel returned is closed.
func (s *slowReads) shut() chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate, s.waiting = make(chan struct{}), make(chan struct{}, 1)
	return s.gate
}

func (s *slowReads) Get(ctx context.Context, key string) (store.KV, error) {
	s.mu.Lock()
	gate, waiting := s.gate, s.waiting
	s.mu.Unlock()
	select {
	case waiting <- struct{}{}:
	default:
	}
	<-gate
	return s.Store.Get(ctx, key)
}

// TestTornRead shows that what was read while something was written counts for
// nothing, even where the notice of it comes after the reading.
func TestTornRead(t *testing.T) {
	w := newWatcher(t)
	write(t, w.dir, shop())
	require.NoError(t, w.folders.refresh())
	w.changed(0)
	f, err := os.OpenFile(filepath.Join(w.dir, "c.yaml"), os.O_CREATE|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	_, err = f.WriteString("# one\n")
	require.NoError(t, err)
	require.NoError(t, w.read(t.Context()))
	if got := state(t, w.catalog); got.Rev.N != 0 || w.since.IsZero() {
		t.Errorf("got revision %s, want none and another look", got.Rev)
	}
	require.NoError(t, f.Close())
	require.NoError(t, w.drain())
	require.NoError(t, w.read(t.Context()))
	if got := state(t, w.catalog); got.Rev.N != 1 || !w.since.IsZero() {
		t.Errorf("got revision %s, want 1.1 and no other look", got.Rev)
	}
}
