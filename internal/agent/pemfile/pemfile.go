// Package pemfile writes an SVID, its key and the trust bundles as PEM files, for
// programs that read files: proxyless gRPC, PostgreSQL, nginx.
//
// It obtains nothing; whoever does hands each new SVID to a [Writer].
//
// A folder holds
//
//	svid.pem           the chain, leaf first
//	svid_key.pem       its key, PKCS#8
//	combined.pem       key and chain in one file
//	bundle.pem         the roots of the own trust domain
//	bundle.NAME.pem    those of the federated trust domain NAME, if asked for
//	grpc-bootstrap.json
//	                   what GRPC_XDS_BOOTSTRAP names, if asked for
//
// Each is a symbolic link into ..data, which is one to the folder of the present
// version. A new version is written completely beside the old one and becomes the
// present one by a single rename, so a crash at any moment leaves all of the old
// or all of the new. The version before stays until the next one.
//
// Who reads key and certificate of one version: a program that opens combined.pem;
// one that resolves ..data once and opens both behind it; one that is told by
// onChange to read, since the next version is minutes away. A program that opens
// both names by itself, just as they are exchanged, may get one of each, which no
// file system can prevent; every TLS library notices when it puts them together,
// and grpc-go, for one, keeps what it has and reads again.
package pemfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
)

const (
	// DefaultTimeout bounds an onChange command.
	DefaultTimeout = 30 * time.Second
	defaultMode    = fs.FileMode(0o600)
	publicMode     = fs.FileMode(0o644) // of certificates
	folderMode     = fs.FileMode(0o755)
)

// Config says where one identity is written, and for whom.
type Config struct {
	// Dir is a folder of this alone, on tmpfs. It is made if missing.
	Dir string `yaml:"dir"`
	// User and Group own the files: names or numbers. Default: those of this
	// process; the group follows the user.
	User  string `yaml:"user"`
	Group string `yaml:"group"`
	// Mode is that of the key: "0600", the default, or "0640". Certificates are
	// always 0644.
	Mode string `yaml:"mode"`
	// AllowDisk accepts a folder that is not on tmpfs: keys may then be found on
	// the disk after they have been removed.
	AllowDisk bool `yaml:"allowDisk"`
	// Federated also writes the bundles of other trust domains, one file each.
	Federated bool `yaml:"federated"`
	// GRPC also writes the bootstrap file of gRPC applications that the control plane
	// configures.
	GRPC bool `yaml:"grpc"`
	// OnChange tells a program that there is a new version.
	OnChange OnChange `yaml:"onChange"`
}

// OnChange is a command or a signal. It runs after a version has become the
// present one, also the first one after a start.
type OnChange struct {
	// Command is run as this process's user, without a shell, with an environment
	// of PATH and SALLYPORT_FILES, the folder.
	Command []string      `yaml:"command"`
	Timeout time.Duration `yaml:"timeout"` // default 30s
	// Signal is sent to the process whose number is in PIDFile: HUP, INT, TERM,
	// USR1, USR2 or WINCH. While there is no such file it is not sent.
	Signal  string `yaml:"signal"`
	PIDFile string `yaml:"pidFile"`
}

// Resolve makes paths relative to dir, where they are not absolute.
func (c *Config) Resolve(dir string) {
	for _, p := range []*string{&c.Dir, &c.OnChange.PIDFile} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

// Check reports each mistake with the key that it is in: "onChange.signal". It
// looks at no file.
func (c Config) Check(fail func(key string, err error)) {
	if c.Dir == "" {
		fail("dir", errors.New("required: a folder for these files alone"))
	}
	if _, err := c.mode(); err != nil {
		fail("mode", err)
	}
	o := c.OnChange
	if len(o.Command) > 0 && o.Signal != "" {
		fail("onChange", errors.New("a command or a signal, not both"))
	}
	if len(o.Command) > 0 && !filepath.IsAbs(o.Command[0]) {
		fail("onChange.command[0]", fmt.Errorf("%q: want the program's absolute path", o.Command[0]))
	}
	if o.Timeout < 0 {
		fail("onChange.timeout", errors.New("cannot be negative"))
	}
	if _, ok := signals()[o.Signal]; o.Signal != "" && !ok {
		fail("onChange.signal", fmt.Errorf("%q: want HUP, INT, TERM, USR1, USR2 or WINCH", o.Signal))
	}
	if (o.Signal == "") != (o.PIDFile == "") {
		fail("onChange.pidFile", errors.New("signal and pidFile belong together"))
	}
}

func signals() map[string]syscall.Signal {
	return map[string]syscall.Signal{
		"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "TERM": syscall.SIGTERM,
		"USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2, "WINCH": syscall.SIGWINCH,
	}
}

func (c Config) mode() (fs.FileMode, error) {
	if c.Mode == "" {
		return defaultMode, nil
	}
	n, err := strconv.ParseUint(c.Mode, 8, 32)
	if m := fs.FileMode(n); err == nil && (m == 0o600 || m == 0o640 || m == 0o400 || m == 0o440) {
		return m, nil
	}
	return 0, fmt.Errorf("%q: want \"0600\", or \"0640\" for a group too; a key is never for everybody", c.Mode)
}

// Owner returns the numbers of User and Group; -1 is this process's own.
func (c Config) Owner() (uid, gid int, err error) {
	uid, gid = -1, -1
	if c.User != "" {
		u, err := user.Lookup(c.User)
		if err != nil {
			u, err = user.LookupId(c.User)
		}
		if err == nil {
			uid, _ = strconv.Atoi(u.Uid) // numbers, on every Unix
			gid, _ = strconv.Atoi(u.Gid)
		} else if uid, err = number(c.User); err != nil {
			return 0, 0, fmt.Errorf("there is no user %q", c.User)
		}
	}
	if c.Group != "" {
		g, err := user.LookupGroup(c.Group)
		if err == nil {
			gid, _ = strconv.Atoi(g.Gid)
		} else if gid, err = number(c.Group); err != nil {
			return 0, 0, fmt.Errorf("there is no group %q", c.Group)
		}
	}
	return uid, gid, nil
}

func number(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err
}

// Writer writes one folder. Its methods are for one goroutine.
type Writer struct {
	cfg      Config
	log      hclog.Logger
	uid, gid int
	mode     fs.FileMode
	root     *os.Root
	serial   int
	extra    map[string]Maker // :: name → what it holds

	// before is called ahead of each step on the disk; an error stops there, as a
	// crash would. Tests set it.
	before func(step string) error
}

// New opens the folder and checks that nobody else can write to it and that it
// lies in memory. Close gives it back.
func New(cfg Config, log hclog.Logger) (*Writer, error) {
	w := &Writer{cfg: cfg, log: log, before: func(string) error { return nil }}
	var err error
	if w.uid, w.gid, err = cfg.Owner(); err != nil {
		return nil, err
	}
	if w.mode, err = cfg.mode(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(cfg.Dir, folderMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("making the folder: %w", err)
	}
	if w.root, err = os.OpenRoot(cfg.Dir); err != nil {
		return nil, fmt.Errorf("opening the folder: %w", err)
	}
	if err := w.checkFolder(); err != nil {
		return nil, errors.Join(err, w.root.Close())
	}
	return w, nil
}

// Maker gives what a file beside an SVID holds.
type Maker func(*x509svid.SVID) ([]byte, error)

// Add has each version hold one more file, which everybody may read. It is called
// before the first Write.
func (w *Writer) Add(name string, data Maker) {
	if w.extra == nil {
		w.extra = make(map[string]Maker)
	}
	w.extra[name] = data
}

// Close gives the folder back; the files stay.
func (w *Writer) Close() error { return w.root.Close() }

// Dir is the folder.
func (w *Writer) Dir() string { return w.cfg.Dir }

func (w *Writer) checkFolder() error {
	f, err := w.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s must belong to this process's user (%d) and be writable by nobody else (chmod 755): whoever can write there could have keys written elsewhere", w.cfg.Dir, os.Geteuid())
	}
	if w.cfg.AllowDisk {
		return nil
	}
	var vfs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &vfs); err != nil {
		return fmt.Errorf("looking at the file system of %s: %w", w.cfg.Dir, err)
	}
	if int64(vfs.Type) != unix.TMPFS_MAGIC && int64(vfs.Type) != unix.RAMFS_MAGIC {
		return fmt.Errorf("%s is not on tmpfs, and a key would stay on the disk: choose a folder below /run or /dev/shm, or set allowDisk: true", w.cfg.Dir)
	}
	return nil
}
