package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

const (
	// settle is how long nothing must happen before the directory is read.
	settle = 5 * time.Millisecond
	// recheck is how long after reading nothing must have happened: a file that
	// is being truncated can be read a moment before its event arrives.
	recheck = 2 * time.Millisecond
	// grace is how long a removed file may take to come back, and a new folder to
	// be filled: editors and copies replace things in steps, and a rule must not
	// be missing in between.
	grace = 250 * time.Millisecond
	// tail is how long the directory must be quiet after a file lost its end: the
	// rest may be on its way, and a deny in it.
	tail = time.Second
	// patience is how long a file may be open for writing, or the directory
	// restless, before that is told as a problem.
	patience = 10 * time.Second
	// retry is how soon a missing directory or an ailing store is tried again.
	retry = time.Second
)

// place is a file by the watch that tells of it.
type place struct {
	wd   int32
	name string
}

// watcher keeps the sets like a directory. WatchDir's goroutine owns it.
type watcher struct {
	catalog *Catalog
	dir     string
	n       *notifier
	folders folders
	asked   atomic.Bool // somebody else wants the directory read again

	since    time.Time           // the first change that was not read yet; zero: all was read
	quietAt  time.Time           // when the last change will have settled
	changes  uint64              // counts what made quietAt move
	dirty    map[place]time.Time // :: file → first write since its last close
	gone     map[place]time.Time // :: file → when it was removed
	moving   notice              // the first half of the last rename
	movingAt time.Time           // first write to the file being renamed; zero: it was closed

	last   map[string]map[string][]byte // the directory as it was read last: set → file → content
	heldAt uint64                       // the count of changes at which a file was seen to lack its tail
	held   time.Time                    // until when that reading waits, unless there is a further change

	told    bool   // that the directory is restless
	refused string // content and base of the last refusal; trying again is of no use
}

// WatchDir keeps the sets in force like the files in dir: dir itself is the root
// set and each sub-folder a set. It returns when ctx ends, or at once when inotify
// cannot be had or another directory is watched already.
//
// A change counts when the file that was written is closed or moved into place;
// while any file is open for writing nothing is read. Where a file has lost its
// tail since it was last read, the directory has to be quiet for a second first.
// All sets of the directory land together or not at all. Whatever cannot be
// applied (a mistake, a missing directory, a sub-folder that vanished) is logged,
// told by [Catalog.Problem] and recorded in the audit log, and the last good state
// stays in force. Only `sallyport set remove NAME` removes a set.
func (c *Catalog) WatchDir(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("watching %s: %w", dir, err)
	}
	n, err := newNotifier()
	if err != nil {
		return fmt.Errorf("watching %s: %w", dir, err)
	}
	w := &watcher{
		catalog: c, dir: dir, n: n,
		folders: folders{n: n, dir: dir},
		dirty:   map[place]time.Time{}, gone: map[place]time.Time{},
	}
	if err := c.beginWatch(w); err != nil {
		return errors.Join(err, n.close())
	}
	stop := context.AfterFunc(ctx, n.wake)
	err = w.run(ctx)
	stop()
	c.endWatch()
	return errors.Join(err, n.close())
}

func (c *Catalog) beginWatch(w *watcher) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.watched != nil {
		return fmt.Errorf("watching %s: another directory is watched already", w.dir)
	}
	c.watched = map[string]bool{}
	c.rescan = func() { w.asked.Store(true); w.n.wake() }
	return nil
}

func (c *Catalog) endWatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watched, c.rescan, c.dirty = nil, nil, ""
}

func (w *watcher) run(ctx context.Context) error {
	w.changed(0)
	for {
		if err := w.n.file.SetReadDeadline(w.next()); err != nil {
			return fmt.Errorf("watching %s: %w", w.dir, err)
		}
		// Whoever wants something says so first and then sets the deadline to the
		// past: so either it is seen here, or the read below returns at once.
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if w.asked.Swap(false) {
			w.changed(0)
			continue
		}
		events, err := w.n.take()
		if err != nil {
			return fmt.Errorf("watching %s: %w", w.dir, err)
		}
		w.see(events)
		if err := w.act(ctx); err != nil {
			return err
		}
	}
}

// changed notes that the directory must be read once it has been quiet for d.
func (w *watcher) changed(d time.Duration) {
	now := time.Now()
	if w.since.IsZero() {
		w.since = now
	}
	if at := now.Add(d); at.After(w.quietAt) {
		w.quietAt = at
	}
	w.changes++
}

// next is when there will be something to do without a further event.
func (w *watcher) next() time.Time {
	if w.since.IsZero() {
		return time.Time{}
	}
	if at, ok := w.readable(); ok {
		if limit := w.since.Add(patience); !w.told && limit.Before(at) {
			return limit
		}
		return at
	}
	if w.told {
		return time.Time{}
	}
	return w.since.Add(patience)
}

// readable tells when the directory may be read; ok is false while a file that
// matters is open for writing.
func (w *watcher) readable() (at time.Time, ok bool) {
	at = w.quietAt
	if w.heldAt == w.changes && w.held.After(at) {
		at = w.held
	}
	for p := range w.dirty {
		if f := w.folders.all[p.wd]; f != nil && f.file(p.name) {
			return at, false
		}
	}
	for _, removed := range w.gone {
		if back := removed.Add(grace); back.After(at) {
			at = back
		}
	}
	return at, true
}

// act reads the directory if its time has come, or tells why not.
func (w *watcher) act(ctx context.Context) error {
	if w.since.IsZero() {
		return nil
	}
	now := time.Now()
	if at, ok := w.readable(); ok && !now.Before(at) {
		return w.read(ctx)
	}
	if !w.told && now.Sub(w.since) >= patience {
		w.told = true
		w.problem(w.restless())
	}
	return nil
}

// restless says why the directory was not read for so long.
func (w *watcher) restless() string {
	for p := range w.dirty {
		if f := w.folders.all[p.wd]; f != nil && f.file(p.name) {
			return fmt.Sprintf("%s has been open for writing for more than %s: the directory is read when the file is closed", filepath.Join(f.path, p.name), patience)
		}
	}
	return fmt.Sprintf("%s has been changing for more than %s without a pause: it is read when it is quiet", w.dir, patience)
}

// see takes note of what happened.
func (w *watcher) see(events []notice) {
	for _, e := range events {
		if e.is(unix.IN_Q_OVERFLOW) {
			// What was lost is unknown, and so is what is still being written.
			clear(w.dirty)
			clear(w.gone)
			w.changed(grace)
			continue
		}
		f := w.folders.all[e.wd]
		switch {
		case f == nil:
		case e.name == "":
			if f.set && !e.is(unix.IN_MODIFY|unix.IN_CLOSE_WRITE) {
				w.changed(settle)
			}
		case e.is(unix.IN_ISDIR):
			w.seeFolder(f, e)
		default:
			w.seeFile(f, e)
		}
	}
}

// seeFolder handles events of a sub-folder, or of the directory itself when f is
// the folder above it.
func (w *watcher) seeFolder(f *folder, e notice) {
	if !f.names[e.name] && (!f.set || hidden(e.name)) {
		return
	}
	if e.is(unix.IN_CREATE) {
		w.changed(grace)
		return
	}
	w.changed(settle)
}

func (w *watcher) seeFile(f *folder, e notice) {
	p := place{e.wd, e.name}
	matters := f.file(e.name)
	switch {
	case !f.set && !matters: // somebody else's file in the folder above, or beside a link's target
	case e.is(unix.IN_MODIFY), e.is(unix.IN_CREATE) && fresh(filepath.Join(f.path, e.name)):
		if _, known := w.dirty[p]; !known {
			w.dirty[p] = time.Now()
		}
		delete(w.gone, p)
	case e.is(unix.IN_MOVED_FROM | unix.IN_DELETE):
		w.moving, w.movingAt = e, w.dirty[p]
		delete(w.dirty, p)
		if matters {
			w.gone[p] = time.Now()
		}
	default: // closed, moved here, or a link made
		delete(w.dirty, p)
		delete(w.gone, p)
		// A file that is moved while it is open for writing stays so.
		if e.is(unix.IN_MOVED_TO) && e.cookie == w.moving.cookie && !w.movingAt.IsZero() {
			w.dirty[p] = w.movingAt
		}
	}
	switch {
	case matters:
		w.changed(settle)
	case f.root && !hidden(e.name) && e.is(entriesMask):
		w.changed(settle) // it may be a link to a folder
	}
}

// fresh reports whether what was just created at path is a file that will be
// written and closed: not a link of either kind, nor anything special.
func fresh(path string) bool {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return false // gone again: that is an event of its own
	}
	return st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 1
}

// read reads the directory and applies it, unless it changes meanwhile.
func (w *watcher) read(ctx context.Context) error {
	before := w.changes
	err := w.folders.refresh()
	var tree map[string]map[string][]byte
	if err == nil {
		tree, err = policy.ReadFiles(os.DirFS(w.dir))
	}
	if more := w.drain(); more != nil {
		return more
	}
	if w.changes != before {
		return nil // torn, perhaps: what was read counts for nothing
	}
	if w.heldAt != w.changes && truncated(w.last, tree) {
		w.heldAt, w.held = w.changes, time.Now().Add(tail)
		return nil
	}
	if err == nil {
		w.last = tree
	}
	w.since = time.Time{}
	w.told = false
	clear(w.gone)
	w.apply(ctx, tree, err)
	return ctx.Err()
}

// truncated reports whether a file of now is what was read of it before without
// its tail, or empty: its writer may have closed it and be about to go on.
func truncated(before, now map[string]map[string][]byte) bool {
	for set, files := range now {
		for name, content := range files {
			if was := before[set][name]; len(content) < len(was) && bytes.HasPrefix(was, content) {
				return true
			}
		}
	}
	return false
}

// drain takes note of what happened during the last read.
func (w *watcher) drain() error {
	for end := time.Now().Add(recheck); ; {
		events, err := w.n.read(end)
		if err != nil {
			return fmt.Errorf("watching %s: %w", w.dir, err)
		}
		w.see(events)
		if !time.Now().Before(end) {
			return nil
		}
	}
}

// later makes the directory be read again, although nothing changed.
func (w *watcher) later() {
	w.changed(retry)
}

// missing reports whether the directory is not there.
func (w *watcher) missing() bool {
	info, err := os.Stat(w.dir)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
	}
	return !info.IsDir()
}
