package peercred

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// program is what can be found out of a process's executable.
type program struct {
	path, hash string
	missing    []missed
}

type missed struct {
	what string
	err  error
}

// executable looks at the executable in a turn of the process's user. What cannot be
// read is missing; only that it took too long is an error.
func (i *Inspector) executable(ctx context.Context, p *Process) error {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	if err := i.enter(ctx, p.UID); err != nil {
		return err
	}
	// The file system may belong to a hung server: opening and reading then return
	// when the kernel likes, so that this goroutine can outlive the lookup, with a
	// descriptor and a turn of its own.
	fd, err := unix.FcntlInt(uintptr(p.dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		i.leave(p.UID)
		return err
	}
	found := make(chan program, 1)
	go func(uid uint32) {
		defer i.leave(uid)
		defer unix.Close(fd)
		found <- i.program(ctx, fd)
	}(p.UID)
	select {
	case <-ctx.Done():
		return ErrBusy
	case got := <-found:
		p.Path, p.SHA256 = got.path, got.hash
		for _, m := range got.missing {
			if errors.Is(m.err, ErrBusy) {
				return ErrBusy
			}
			p.miss(m.what, m.err)
		}
		return nil
	}
}

// program reads path and hash of one and the same file: the process may change its
// executable meanwhile, and is looked at again then. dir is its folder below /proc.
func (i *Inspector) program(ctx context.Context, dir int) program {
	for range 3 {
		fd, err := unix.Openat(dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return program{missing: []missed{{"path and sha256", notThere(err)}}}
		}
		got, err := i.hash(ctx, dir, os.NewFile(uintptr(fd), "exe"))
		if err == nil {
			return got
		}
		if !errors.Is(err, errChanged) {
			return program{missing: []missed{{"path and sha256", err}}}
		}
	}
	return program{missing: []missed{{"path and sha256", errChanged}}}
}

var (
	errChanged = errors.New("the executable changes all the time")
	errServed  = errors.New("the executable is on a file system that a program serves (FUSE), which may show anything else to whoever hashes it")
)

func (i *Inspector) hash(ctx context.Context, dir int, exe *os.File) (got program, err error) {
	defer exe.Close()
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, "exe", buf)
	if err != nil {
		return program{}, err
	}
	got.path = string(buf[:n])
	if strings.HasSuffix(got.path, " (deleted)") { // another file may have that path by now
		got.missing = append(got.missing, missed{"path", errors.New("the executable was deleted or replaced; restart the program")})
		got.path = ""
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(exe.Fd()), &fs); err != nil {
		return program{}, err
	}
	key, size, err := keyOf(int(exe.Fd()))
	if err != nil {
		return program{}, err
	}
	switch {
	case fs.Type == unix.FUSE_SUPER_MAGIC:
		got.missing = append(got.missing, missed{"sha256", errServed})
	case size > maxExe:
		got.missing = append(got.missing, missed{"sha256", fmt.Errorf("the executable has %d bytes; at most %d are hashed", size, maxExe)})
	default:
		if got.hash, err = i.sum(ctx, exe, key, fs.Flags&unix.ST_NOSUID == 0); err != nil {
			return program{}, err
		}
	}
	var now unix.Stat_t
	if err := unix.Fstatat(dir, "exe", &now, 0); err != nil {
		return program{}, err
	}
	if uint64(now.Dev) != key.dev || now.Ino != key.ino {
		return program{}, errChanged
	}
	return got, nil
}

// sum gives the hash of an open file, and remembers it where keep says that its key
// tells its content.
func (i *Inspector) sum(ctx context.Context, exe *os.File, key fileKey, keep bool) (string, error) {
	i.mu.Lock()
	hash := i.hashes[key]
	i.mu.Unlock()
	if keep && hash != "" {
		return hash, nil
	}
	hash, err := sum(ctx, exe)
	if err != nil {
		return "", err
	}
	if again, _, err := keyOf(int(exe.Fd())); err != nil || again != key {
		return "", errChanged
	}
	// A file system's clock has steps: whoever writes to a file twice within one
	// leaves no trace in its times. Such a file is hashed again next time.
	if keep && time.Since(time.Unix(0, max(key.mtime, key.ctime))) > settled {
		i.remember(key, hash)
	}
	return hash, nil
}

func (i *Inspector) remember(key fileKey, hash string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.hashes == nil || len(i.hashes) >= maxHashes {
		i.hashes = make(map[fileKey]string)
	}
	i.hashes[key] = hash
}

func keyOf(fd int) (fileKey, int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileKey{}, 0, err
	}
	return fileKey{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}, st.Size, nil
}

// sum hashes a file of at most maxExe bytes until ctx ends.
func sum(ctx context.Context, f *os.File) (string, error) {
	h := sha256.New()
	for at := int64(0); at < maxExe; at += betweenChecks {
		if ctx.Err() != nil {
			return "", ErrBusy
		}
		n, err := io.Copy(h, io.NewSectionReader(f, at, betweenChecks))
		if err != nil {
			return "", err
		}
		if n < betweenChecks {
			break
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
