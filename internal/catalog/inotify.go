package catalog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// entriesMask tells of names that come and go in a folder.
	entriesMask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE
	// contentMask tells of what happens to its files, and to the folder itself.
	contentMask = entriesMask | unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
)

// notice is one event of inotify(7).
type notice struct {
	wd     int32 // which watch; -1 for a queue overflow
	mask   uint32
	cookie uint32 // joins the two halves of a rename
	name   string // in the watched folder; "" for the folder itself
}

func (n notice) is(mask uint32) bool { return n.mask&mask != 0 }

// notifier is an inotify instance. It is used here without a library, as those
// hide IN_CLOSE_WRITE, and only that tells when a file is complete.
type notifier struct {
	file *os.File
	fd   int
	buf  []byte
}

func newNotifier() (*notifier, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("opening inotify (fs.inotify.max_user_instances limits how many there may be): %w", err)
	}
	return &notifier{file: os.NewFile(uintptr(fd), "inotify"), fd: fd, buf: make([]byte, 64<<10)}, nil
}

// add watches folder path. What is watched already gives the same descriptor,
// and its mask grows.
func (n *notifier) add(path string, mask uint32) (int32, error) {
	wd, err := unix.InotifyAddWatch(n.fd, path, mask|unix.IN_ONLYDIR|unix.IN_MASK_ADD)
	if errors.Is(err, unix.ENOSPC) {
		return 0, fmt.Errorf("watching %s: no watch is left: raise fs.inotify.max_user_watches: %w", path, err)
	}
	if err != nil {
		return 0, fmt.Errorf("watching %s: %w", path, err)
	}
	return int32(wd), nil
}

// remove ends a watch; one that has ended by itself is no error.
func (n *notifier) remove(wd int32) { unix.InotifyRmWatch(n.fd, uint32(wd)) }

// read waits until the deadline, the zero one being never, and returns what has
// happened: nothing when the deadline passed or wake was called.
func (n *notifier) read(deadline time.Time) ([]notice, error) {
	if err := n.file.SetReadDeadline(deadline); err != nil {
		return nil, fmt.Errorf("reading inotify: %w", err)
	}
	return n.take()
}

func (n *notifier) take() ([]notice, error) {
	size, err := n.file.Read(n.buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading inotify: %w", err)
	}
	return parseNotices(n.buf[:size]), nil
}

// wake makes a read that waits return at once; it may be called by anybody.
func (n *notifier) wake() { n.file.SetReadDeadline(time.Unix(1, 0)) }

func (n *notifier) close() error { return n.file.Close() }

// parseNotices reads the kernel's struct inotify_event, one after the other.
func parseNotices(b []byte) []notice {
	var out []notice
	for len(b) >= unix.SizeofInotifyEvent {
		e := notice{
			wd:     int32(binary.NativeEndian.Uint32(b)),
			mask:   binary.NativeEndian.Uint32(b[4:]),
			cookie: binary.NativeEndian.Uint32(b[8:]),
		}
		length := uint64(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if length > uint64(len(b)) {
			return out
		}
		name, _, _ := bytes.Cut(b[:length], []byte{0})
		e.name = string(name)
		b = b[length:]
		out = append(out, e)
	}
	return out
}
