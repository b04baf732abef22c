package policy

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
)

// Parse reads the *.yaml and *.yml files directly in fsys as the set called
// name; "" is the root set, whose sub-folders are sets of their own and left
// alone. Hidden files are skipped. All mistakes are reported at once, as
// [Errors].
func Parse(fsys fs.FS, name string) (*Set, error) {
	r := reader{fsys: fsys}
	files := r.readSet(".", name)
	if err := r.errs.err(); err != nil {
		return nil, err
	}
	return ParseFiles(name, files)
}

// ParseTree reads fsys as the root set and each of its sub-folders as the set of
// that name, the root set first and the others by name. A folder without a
// single *.yaml or *.yml file is no set. All mistakes are reported at once, as
// [Errors].
func ParseTree(fsys fs.FS) ([]*Set, error) {
	tree, err := ReadFiles(fsys)
	if err != nil {
		return nil, err
	}
	var errs collector
	sets := make([]*Set, 0, len(tree))
	for _, name := range slices.Sorted(maps.Keys(tree)) {
		sets = append(sets, parseSet(name, tree[name], &errs))
	}
	if err := errs.err(); err != nil {
		return nil, err
	}
	return sets, nil
}

// ReadFiles reads what [ParseTree] would parse: set name → file name → content.
// No file beyond the limits ([MaxFileSize] and its kin) is read.
func ReadFiles(fsys fs.FS) (map[string]map[string][]byte, error) {
	entries, err := fs.ReadDir(fsys, ".")
	if err != nil {
		return nil, fmt.Errorf("reading policy folder: %w", err)
	}
	r := reader{fsys: fsys}
	tree := map[string]map[string][]byte{}
	if files := r.readSet(".", ""); len(files) > 0 {
		tree[""] = files
	}
	for _, e := range entries {
		if hidden(e.Name()) || !r.isDir(".", e) {
			continue
		}
		files := r.readSet(e.Name(), e.Name())
		switch {
		case len(files) == 0:
		case len(tree) == MaxSets:
			r.fail(e.Name(), fmt.Sprintf("more than %d sets", MaxSets), nil)
		default:
			tree[e.Name()] = files
		}
	}
	if err := r.errs.err(); err != nil {
		return nil, err
	}
	return tree, nil
}

// reader loads files within the limits.
type reader struct {
	fsys  fs.FS
	total int64 // bytes read so far
	errs  collector
}

// readSet loads the resource files directly in dir. Of a set other than the root
// set a nested folder is a mistake: nobody would read it.
func (r *reader) readSet(dir, name string) map[string][]byte {
	entries, err := fs.ReadDir(r.fsys, dir)
	if err != nil {
		r.fail(name, "reading folder: "+cause(err), err)
		return nil
	}
	files := map[string][]byte{}
	var nested []string
	size := 0
	for _, e := range entries {
		switch {
		case hidden(e.Name()):
		case r.isDir(dir, e):
			nested = append(nested, e.Name())
		case isResource(e.Name()):
			if len(files) == MaxFiles {
				r.fail(name, fmt.Sprintf("more than %d files in one set", MaxFiles), nil)
				return files
			}
			data := r.readFile(dir, name, e.Name())
			if size += len(data); size > MaxSetSize {
				r.fail(name, fmt.Sprintf("more than %d MiB in one set", MaxSetSize>>20), nil)
				return files
			}
			files[e.Name()] = data
		case isResource(strings.ToLower(e.Name())):
			r.fail(filePath(name, e.Name()), "a resource file's name ends in .yaml or .yml, in lower case", nil)
		}
	}
	if name != "" && len(files) > 0 {
		for _, n := range nested {
			r.fail(filePath(name, n), "a set's folder holds files only; this folder would not be read", nil)
		}
	}
	return files
}

func (r *reader) readFile(dir, set, file string) []byte {
	at := filePath(set, file)
	info, err := fs.Stat(r.fsys, path.Join(dir, file))
	if err != nil {
		r.fail(at, "reading: "+cause(err), err)
		return nil
	}
	if !info.Mode().IsRegular() { // reading a pipe could block for ever
		r.fail(at, "not a regular file", nil)
		return nil
	}
	if info.Size() > MaxFileSize {
		r.fail(at, tooBig(info.Size()), nil)
		return nil
	}
	if r.total+info.Size() > MaxTreeSize {
		r.fail(at, fmt.Sprintf("more than %d MiB in all sets", MaxTreeSize>>20), nil)
		return nil
	}
	f, err := r.fsys.Open(path.Join(dir, file))
	if err != nil {
		r.fail(at, "reading: "+cause(err), err)
		return nil
	}
	defer f.Close()
	data := bytes.NewBuffer(make([]byte, 0, info.Size()+bytes.MinRead))
	if _, err = data.ReadFrom(io.LimitReader(f, MaxFileSize+1)); err != nil { // it may grow meanwhile
		r.fail(at, "reading: "+cause(err), err)
		return nil
	}
	r.total += int64(data.Len())
	return data.Bytes()
}

// isDir follows symbolic links, which is how Kubernetes mounts files.
func (r *reader) isDir(dir string, e fs.DirEntry) bool {
	if e.Type()&fs.ModeSymlink == 0 {
		return e.IsDir()
	}
	info, err := fs.Stat(r.fsys, path.Join(dir, e.Name()))
	return err == nil && info.IsDir()
}

func (r *reader) fail(file, msg string, err error) {
	r.errs.add(&Error{File: file, Msg: msg, err: err})
}

func tooBig(size int64) string {
	return fmt.Sprintf("%d bytes; a resource file has at most %d MiB", size, MaxFileSize>>20)
}

func hidden(name string) bool { return strings.HasPrefix(name, ".") }

func isResource(name string) bool {
	return strings.HasSuffix(name, ".yaml") || strings.HasSuffix(name, ".yml")
}

// filePath is how a file of a set is called in messages and rules.
func filePath(set, file string) string { return path.Join(set, file) }

// cause strips the path that fs errors repeat.
func cause(err error) string {
	if pe, ok := err.(*fs.PathError); ok {
		return pe.Err.Error()
	}
	return err.Error()
}
