package catalog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// directoryActor is who changes the sets when a watched directory does.
const directoryActor = "watched directory"

// apply brings the directory into force: tree is what was read of it, or err why
// it was not.
func (w *watcher) apply(ctx context.Context, tree map[string]map[string][]byte, err error) {
	c := w.catalog
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.looked = true
	}()
	if err != nil && w.missing() {
		w.refuse(ctx, "missing", errors.New("the directory is not there: bring it back"))
		w.later() // the folder above it may be gone too, and with it the watch
		return
	}
	b, baseErr := c.readBase(ctx)
	if baseErr != nil {
		w.storeFailed(baseErr)
		return
	}
	if err != nil {
		w.refuse(ctx, b.rev.String()+err.Error(), err)
		return
	}
	vanished := w.complete(tree, b.sets)
	c.setWatched(tree)
	key := b.rev.String() + fingerprint(digests(tree))
	if key == w.refused {
		return
	}
	switch {
	case len(tree) > 0:
		p := Change{Sets: tree, Actor: directoryActor, Origin: w.dir}.plan()
		p.watched = w.dir
		_, err = c.run(ctx, p)
	case len(vanished) == 0:
		err = refusal{fmt.Errorf("%s holds no resource files (*.yaml, *.yml): %w", w.dir, policy.ErrNoWorkload)}
	}
	var no refusal
	switch {
	case errors.As(err, &no) && !errors.Is(err, ErrConflict):
		w.refused = key
	case err != nil:
		w.storeFailed(err)
		return
	default:
		w.refused = ""
	}
	w.outcome(err, vanished)
}

// complete adds to tree, as empty sets, the sets in force whose folders are there
// but hold no files any more, and lists those whose folders are not.
func (w *watcher) complete(tree map[string]map[string][]byte, inForce map[string]string) (vanished []string) {
	for name := range inForce {
		if tree[name] != nil {
			continue
		}
		if info, err := os.Stat(filepath.Join(w.dir, name)); err == nil && info.IsDir() {
			tree[name] = map[string][]byte{}
		} else {
			vanished = append(vanished, name)
		}
	}
	slices.Sort(vanished)
	return vanished
}

func digests(tree map[string]map[string][]byte) map[string]string {
	sums := make(map[string]string, len(tree))
	for name, files := range tree {
		sums[name] = digest(files)
	}
	return sums
}

func (c *Catalog) setWatched(tree map[string]map[string][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watched = make(map[string]bool, len(tree))
	for name := range tree {
		c.watched[name] = true
	}
}

// refuse records a directory that could not even be read, once.
func (w *watcher) refuse(ctx context.Context, key string, why error) {
	if key == w.refused {
		return
	}
	p := Change{Actor: directoryActor, Origin: w.dir, Sets: map[string]map[string][]byte{}}.plan()
	p.action = "policy.apply" // of nothing that could be named
	err := w.catalog.refuse(ctx, p, why)
	w.refused = key
	w.outcome(err, nil)
}

// storeFailed keeps the change for later.
func (w *watcher) storeFailed(err error) {
	w.problem(fmt.Sprintf("%s could not be stored and is tried again: %v", w.dir, err))
	w.later()
}

// outcome tells how applying went; nil and no vanished sets: well.
func (w *watcher) outcome(err error, vanished []string) {
	var parts []string
	if err != nil {
		parts = append(parts, fmt.Sprintf("%s is not in force as it stands; the last good state stays in force. The error:\n%v", w.dir, err))
	}
	for _, name := range vanished {
		parts = append(parts, fmt.Sprintf("%s has no folder in %s any more and stays in force: bring the folder back, or run `sallyport set remove %s`", title(name), w.dir, name))
	}
	w.problem(strings.Join(parts, "\n"))
}

// problem tells text to operators, "" being that all is well, and logs what is
// new.
func (w *watcher) problem(text string) {
	c := w.catalog
	c.mu.Lock()
	was := c.dirty
	c.dirty = text
	c.mu.Unlock()
	switch {
	case text == was:
	case text == "":
		c.Log.Info("the watched policy directory is in force again", "directory", w.dir)
	default:
		c.Log.Error("the watched policy directory has a problem; the last good state stays in force", "directory", w.dir, "problem", text)
	}
}
