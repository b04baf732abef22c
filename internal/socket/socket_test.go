package socket

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestModeFromTheStart looks at the file as bind makes it, with a umask that
// hides nothing.
func TestModeFromTheStart(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	path := filepath.Join(t.TempDir(), "s")
	l, err := bind(path, 0o600)
	require.NoError(t, err)
	defer l.Close()
	info, err := os.Lstat(path)
	require.NoError(t, err)
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("got %o, want 600", got)
	}
}
