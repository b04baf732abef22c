package catalog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// folder is what one inotify watch is for. One folder may serve several ends.
type folder struct {
	path  string
	root  bool            // the watched directory: its sub-folders are sets
	set   bool            // its resource files matter
	names map[string]bool // further names that matter: targets of links, the directory itself
}

// resource reports whether a set may take name for one of its files.
func resource(name string) bool {
	lower := strings.ToLower(name) // another case is a mistake that is reported
	return !hidden(name) && (strings.HasSuffix(lower, ".yaml") || strings.HasSuffix(lower, ".yml"))
}

func hidden(name string) bool { return strings.HasPrefix(name, ".") }

// swap is the link that Kubernetes replaces to change all files of a mounted
// volume at once.
const swap = "..data"

// file reports whether a file called name can change what is in force.
func (f *folder) file(name string) bool {
	return f.names[name] || f.set && (resource(name) || name == swap)
}

// folders holds the watches that a directory needs.
type folders struct {
	n   *notifier
	dir string            // absolute
	all map[int32]*folder // :: watch descriptor → folder
}

// refresh makes the watches fit the directory as it is: the folder above it (it
// may be replaced), itself, its sub-folders and the folders that links lead to.
// It returns an error that is fs.ErrNotExist when the directory is not there;
// the folder above is watched all the same.
func (f *folders) refresh() error {
	old := f.all
	f.all = map[int32]*folder{}
	err := f.fill()
	for wd := range old {
		if f.all[wd] == nil {
			f.n.remove(wd)
		}
	}
	return err
}

func (f *folders) fill() error {
	above, name := filepath.Split(f.dir)
	if err := f.watch(&folder{path: above, names: map[string]bool{name: true}}, entriesMask); err != nil {
		return err
	}
	if err := f.watch(&folder{path: f.dir, root: true, set: true}, contentMask); err != nil {
		return err
	}
	subs, err := f.links(f.dir)
	if err != nil {
		return err
	}
	if len(subs) > policy.MaxSets {
		return fmt.Errorf("%s has %d sub-folders, of at most %d", f.dir, len(subs), policy.MaxSets)
	}
	for _, sub := range subs {
		err := f.watch(&folder{path: sub, set: true}, contentMask)
		if err == nil {
			_, err = f.links(sub)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // gone again; its end is an event of its own
			return err
		}
	}
	return nil
}

// watch adds a watch, or widens the one that is there.
func (f *folders) watch(what *folder, mask uint32) error {
	wd, err := f.n.add(what.path, mask)
	if err != nil {
		return err
	}
	was := f.all[wd]
	if was == nil {
		f.all[wd] = what
		return nil
	}
	if what.set {
		was.path = what.path
	}
	was.root = was.root || what.root
	was.set = was.set || what.set
	was.names = union(was.names, what.names)
	return nil
}

// links watches where the links among the files of dir lead, and returns its
// sub-folders.
func (f *folders) links(dir string) (subs []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", dir, err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if hidden(e.Name()) {
			continue
		}
		if e.IsDir() {
			subs = append(subs, path)
			continue
		}
		if e.Type()&fs.ModeSymlink == 0 {
			continue
		}
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			subs = append(subs, path)
			continue
		}
		target, err := filepath.EvalSymlinks(path)
		if err != nil || !resource(e.Name()) {
			continue // leads nowhere: reading the files reports it
		}
		above, name := filepath.Split(target)
		if err := f.watch(&folder{path: above, names: map[string]bool{name: true}}, contentMask); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return subs, nil
}
