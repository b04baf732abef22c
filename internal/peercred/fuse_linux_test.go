package peercred

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// fuse is a file system of one file, "bin", that stops answering when it is told to
// (linux/fuse.h, protocol 7.31).
type fuse struct {
	fd   int
	file []byte
	hang atomic.Bool
	free chan struct{} // closed when it answers again
	held atomic.Int32  // calls that it does not answer
}

const (
	fuseRoot, fuseFile = 1, 2 // nodes
	fuseHeader         = 40   // bytes before each request
)

// mountFuse serves file as dir/bin, to every user.
func mountFuse(dir string, file []byte) (*fuse, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)
	if err := unix.Mount("test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	f := &fuse{fd: fd, file: file, free: make(chan struct{})}
	go f.serve()
	return f, nil
}

// serve answers until the file system is unmounted.
func (f *fuse) serve() {
	runtime.LockOSThread() // it waits in the kernel
	buf := make([]byte, 1<<20)
	for {
		n, err := unix.Read(f.fd, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return
		}
		word := func(at int) uint64 { return binary.NativeEndian.Uint64(buf[at:]) }
		op, id, node := binary.NativeEndian.Uint32(buf[4:]), word(8), word(16)
		if n < fuseHeader || op == 2 || op == 36 || op == 42 { // FORGET, INTERRUPT, BATCH_FORGET
			continue
		}
		if op == 14 && f.hang.Load() { // OPEN
			f.held.Add(1)
			go func() {
				<-f.free
				f.reply(id, 0, make([]byte, 16))
			}()
			continue
		}
		switch op {
		case 1: // LOOKUP
			if string(bytes.TrimRight(buf[fuseHeader:n], "\x00")) != "bin" {
				f.reply(id, -int32(unix.ENOENT), nil)
				continue
			}
			out := words(fuseFile, 0, 1000, 1000, 0)
			f.reply(id, 0, append(out, f.attr(fuseFile)...))
		case 3: // GETATTR
			f.reply(id, 0, append(words(1000, 0), f.attr(node)...))
		case 14, 27: // OPEN, OPENDIR
			f.reply(id, 0, make([]byte, 16))
		case 15: // READ
			from := min(word(fuseHeader+8), uint64(len(f.file)))
			f.reply(id, 0, f.file[from:min(from+uint64(uint32(word(fuseHeader+16))), uint64(len(f.file)))])
		case 17: // STATFS
			f.reply(id, 0, make([]byte, 80))
		case 18, 25, 29, 34: // RELEASE, FLUSH, RELEASEDIR, ACCESS
			f.reply(id, 0, nil)
		case 26: // INIT
			out := make([]byte, 64)
			binary.NativeEndian.PutUint32(out, 7)
			binary.NativeEndian.PutUint32(out[4:], 31)
			binary.NativeEndian.PutUint32(out[20:], 1<<16) // max_write
			f.reply(id, 0, out)
		default:
			f.reply(id, -int32(unix.ENOSYS), nil)
		}
	}
}

func (f *fuse) attr(node uint64) []byte {
	mode, size := uint32(unix.S_IFDIR|0o755), uint64(0)
	if node == fuseFile {
		mode, size = unix.S_IFREG|0o755, uint64(len(f.file))
	}
	out := append(words(node, size, 0, 1, 1, 1), make([]byte, 40)...)
	binary.NativeEndian.PutUint32(out[60:], mode)
	binary.NativeEndian.PutUint32(out[64:], 1)    // links
	binary.NativeEndian.PutUint32(out[80:], 4096) // block size
	return out
}

func (f *fuse) reply(id uint64, code int32, body []byte) {
	head := make([]byte, 16, 16+len(body))
	binary.NativeEndian.PutUint32(head, uint32(16+len(body)))
	binary.NativeEndian.PutUint32(head[4:], uint32(code))
	binary.NativeEndian.PutUint64(head[8:], id)
	if _, err := unix.Write(f.fd, append(head, body...)); err != nil && !errors.Is(err, unix.ENOENT) {
		fmt.Fprintln(os.Stderr, "answering the kernel:", err) // ENOENT: nobody waits any more
	}
}

func words(ws ...uint64) []byte {
	var out []byte
	for _, w := range ws {
		out = binary.NativeEndian.AppendUint64(out, w)
	}
	return out
}
