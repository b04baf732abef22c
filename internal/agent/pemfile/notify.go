package pemfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const maxOutput = 512 // bytes of a command's output that are logged

// Notify tells the program that there is a new version, as configured. A command
// is killed, with its children, when its time is over or ctx ends.
func (w *Writer) Notify(ctx context.Context) error {
	o := w.cfg.OnChange
	switch {
	case len(o.Command) > 0:
		return w.command(ctx, o)
	case o.Signal != "":
		return signal(o)
	}
	return nil
}

func (w *Writer) command(ctx context.Context, o OnChange) error {
	limit := o.Timeout
	if limit == 0 {
		limit = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var out capped
	cmd := exec.CommandContext(ctx, o.Command[0], o.Command[1:]...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "SALLYPORT_FILES=" + w.cfg.Dir}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // of output that a stray child keeps open
	err := cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("not done within %v", limit)
	}
	if err != nil {
		return fmt.Errorf("running %s: %w%s", o.Command[0], err, out.tail())
	}
	return nil
}

// capped keeps the beginning of what is written to it.
type capped struct{ b bytes.Buffer }

func (c *capped) Write(p []byte) (int, error) {
	if room := maxOutput - c.b.Len(); room > 0 {
		c.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (c *capped) tail() string {
	if text := strings.TrimSpace(c.b.String()); text != "" {
		return fmt.Sprintf(": %q", text)
	}
	return ""
}

// signal reads the pid anew each time: programs restart.
func signal(o OnChange) error {
	f, err := os.Open(o.PIDFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it is not running, and will read the files when it starts
	}
	if err != nil {
		return fmt.Errorf("reading pidFile: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 4096)) // PostgreSQL's has more lines
	if err != nil {
		return fmt.Errorf("reading pidFile: %w", err)
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	pid, err := strconv.ParseInt(strings.TrimSpace(line), 10, 31)
	if err != nil || pid <= 1 {
		return fmt.Errorf("pidFile %s does not begin with the number of a process", o.PIDFile)
	}
	if err := syscall.Kill(int(pid), signals()[o.Signal]); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("sending %s to process %d: %w", o.Signal, pid, err)
	}
	return nil
}
