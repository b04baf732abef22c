package peercred

import (
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

// executable reads path and hash of one and the same file: the process may change
// its executable meanwhile, and is looked at again then.
func (i *Inspector) executable(p *Process) error {
	for range 3 {
		fd, err := unix.Openat(p.dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return notThere(err)
		}
		path, hash, err := i.hash(p, os.NewFile(uintptr(fd), "exe"))
		if !errors.Is(err, errChanged) {
			p.Path, p.SHA256 = path, hash
			return err
		}
	}
	return errChanged
}

var errChanged = errors.New("the executable changes all the time")

func (i *Inspector) hash(p *Process, exe *os.File) (path, hash string, err error) {
	defer exe.Close()
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.dir, "exe", buf)
	if err != nil {
		return "", "", err
	}
	path = string(buf[:n])
	if strings.HasSuffix(path, " (deleted)") { // another file may have that path by now
		p.miss("path", errors.New("the executable was deleted or replaced; restart the program"))
		path = ""
	}
	key, size, err := keyOf(int(exe.Fd()))
	if err != nil {
		return "", "", err
	}
	i.mu.Lock()
	hash = i.hashes[key]
	i.mu.Unlock()
	if hash == "" {
		if hash, err = sum(exe, size); err != nil {
			return "", "", err
		}
		if again, _, err := keyOf(int(exe.Fd())); err != nil || again != key {
			return "", "", errChanged
		}
		// A file system's clock has steps: whoever writes to a file twice within one
		// leaves no trace in its times. Such a file is hashed again next time.
		if time.Since(time.Unix(0, max(key.mtime, key.ctime))) > settled {
			i.remember(key, hash)
		}
	}
	var now unix.Stat_t
	if err := unix.Fstatat(p.dir, "exe", &now, 0); err != nil {
		return "", "", err
	}
	if uint64(now.Dev) != key.dev || now.Ino != key.ino {
		return "", "", errChanged
	}
	return path, hash, nil
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

func sum(f *os.File, size int64) (string, error) {
	if size > maxExe {
		return "", fmt.Errorf("the executable has %d bytes; at most %d are hashed", size, maxExe)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, maxExe)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
