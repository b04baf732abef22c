package pemfile

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc/credentials/tls/certprovider"
	"google.golang.org/grpc/credentials/tls/certprovider/pemfile"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const writerEnv = "SALLYPORT_TEST_WRITE" // the folder that a child process writes to

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerEnv); dir != "" {
		writeForEver(dir)
	}
	goleak.VerifyTestMain(m)
}

var td = spiffeid.RequireTrustDomainFromString("shop.example")

// authority issues SVIDs.
type authority struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newAuthority() *authority {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))
	return &authority{must(x509.ParseCertificate(der)), key}
}

func (a *authority) issue() *x509svid.SVID {
	id := spiffeid.RequireFromPath(td, "/app")
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "leaf"}, URIs: []*url.URL{id.URL()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}, a.root, key.Public(), a.key))
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{must(x509.ParseCertificate(der))}, PrivateKey: key}
}

func (a *authority) bundles() identity.Bundles {
	return identity.Bundles{td: spiffebundle.FromX509Authorities(td, []*x509.Certificate{a.root})}
}

// memory is a folder on tmpfs.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	return filepath.Join(dir, "files")
}

func open(t *testing.T, cfg Config) *Writer {
	t.Helper()
	w, err := New(cfg, hclog.NewNullLogger())
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	return w
}

// read gives the certificate that a reader finds who goes through one open folder
// and, apart from it, in the combined file; it fails where either holds the key of
// another one. nil: there is none yet.
func read(t *testing.T, dir string) *x509.Certificate {
	t.Helper()
	now, err := filepath.EvalSymlinks(filepath.Join(dir, link))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	require.NoError(t, err)
	pair, err := tls.LoadX509KeyPair(filepath.Join(now, FileChain), filepath.Join(now, FileKey))
	require.NoError(t, err, "key and certificate of one version")
	both, err := os.ReadFile(filepath.Join(now, fileCombined))
	require.NoError(t, err)
	combined, err := tls.X509KeyPair(both, both)
	require.NoError(t, err, "the combined file")
	if !combined.Leaf.Equal(pair.Leaf) {
		t.Error("the combined file is of another version")
	}
	if _, err := os.Stat(filepath.Join(now, FileBundle)); err != nil {
		t.Error(err)
	}
	return pair.Leaf
}

func TestWrite(t *testing.T) {
	dir, a := memory(t), newAuthority()
	w := open(t, Config{Dir: dir, Federated: true})
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	bundles := a.bundles()
	bundles[partner] = spiffebundle.FromX509Authorities(partner, []*x509.Certificate{newAuthority().root})
	one, two := a.issue(), a.issue()
	require.NoError(t, w.Write(one, bundles))
	if !read(t, dir).Equal(one.Certificates[0]) {
		t.Error("another certificate")
	}
	for name, mode := range map[string]fs.FileMode{
		FileChain: 0o644, FileKey: 0o600, fileCombined: 0o600, FileBundle: 0o644, "bundle.partner.example.pem": 0o644,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		if info.Mode().Perm() != mode {
			t.Errorf("%s: mode %o, want %o", name, info.Mode().Perm(), mode)
		}
	}
	own, err := os.ReadFile(filepath.Join(dir, FileBundle))
	require.NoError(t, err)
	if block, rest := pem.Decode(own); block == nil || string(block.Bytes) != string(a.root.Raw) || len(rest) != 0 {
		t.Error("bundle.pem is not the own trust domain's, alone")
	}
	require.NoError(t, w.Write(two, a.bundles()))
	if !read(t, dir).Equal(two.Certificates[0]) {
		t.Error("not replaced")
	}
	if _, err := os.Lstat(filepath.Join(dir, "bundle.partner.example.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a bundle that is gone is still there: %v", err)
	}
	for range 5 {
		require.NoError(t, w.Write(two, a.bundles()))
	}
	if n := len(versionsIn(t, dir)); n != 2 {
		t.Errorf("%d versions, want the present one and the one before", n)
	}
	if err := w.Write(two, identity.Bundles{}); err == nil {
		t.Error("wrote without a bundle")
	}
}

func versionsIn(t *testing.T, dir string) []string {
	t.Helper()
	got, err := filepath.Glob(filepath.Join(dir, versions+"*"))
	require.NoError(t, err)
	return got
}

// A crash between any two steps leaves the old version or the new one, and the
// next writer goes on from there.
func TestCrashBetweenAnyTwoSteps(t *testing.T) {
	a := newAuthority()
	for _, first := range []bool{true, false} {
		for step := 0; ; step++ {
			dir := memory(t)
			w := open(t, Config{Dir: dir})
			var old *x509svid.SVID
			if !first {
				old = a.issue()
				require.NoError(t, w.Write(a.issue(), a.bundles()))
				require.NoError(t, w.Write(old, a.bundles()))
			}
			crash, at, n := errors.New("crash"), "", 0
			w.before = func(what string) error {
				if n++; n > step {
					at = what
					return crash
				}
				return nil
			}
			next := a.issue()
			err := w.Write(next, a.bundles())
			if err == nil {
				if step < 8 {
					t.Fatalf("only %d steps", step)
				}
				break
			}
			require.ErrorIs(t, err, crash)
			got := read(t, dir)
			if isOld := old == nil && got == nil || old != nil && got.Equal(old.Certificates[0]); !isOld && !got.Equal(next.Certificates[0]) {
				t.Errorf("first %v, crash before %q: neither old nor new", first, at)
			}
			again := open(t, Config{Dir: dir})
			after := a.issue()
			require.NoError(t, again.Write(after, a.bundles()), "after a crash before %q", at)
			if !read(t, dir).Equal(after.Certificates[0]) || len(versionsIn(t, dir)) > 2 {
				t.Errorf("crash before %q: not recovered", at)
			}
			for _, name := range []string{FileChain, FileKey, fileCombined, FileBundle} {
				if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
					t.Errorf("crash before %q: %v", at, err)
				}
			}
		}
	}
}

// writeForEver is the child that is killed.
func writeForEver(dir string) {
	a := newAuthority()
	w := must(New(Config{Dir: dir}, hclog.NewNullLogger()))
	svids := []*x509svid.SVID{a.issue(), a.issue(), a.issue()}
	for n := 0; ; n++ {
		if err := w.Write(svids[n%len(svids)], a.bundles()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if n == 0 {
			fmt.Println("writing")
		}
	}
}

// The same with a real process and a real SIGKILL.
func TestKill9(t *testing.T) {
	dir := memory(t)
	exe, err := os.Executable()
	require.NoError(t, err)
	for n := range 20 {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), writerEnv+"="+dir)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = out.Read(make([]byte, 1)) // it writes
		require.NoError(t, err)
		time.Sleep(time.Duration(n) * 300 * time.Microsecond) // wherever it is then
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
		if stderr.Len() > 0 {
			t.Fatalf("round %d: %s", n, stderr.String())
		}
		if read(t, dir) == nil {
			t.Fatalf("round %d: nothing there", n)
		}
	}
}

// grpc-go's provider reads the files through 100 rotations while connections are
// made with what it gives: not one handshake fails.
func TestGRPCFileWatcher(t *testing.T) {
	dir, a := memory(t), newAuthority()
	w := open(t, Config{Dir: dir})
	require.NoError(t, w.Write(a.issue(), a.bundles()))
	provider, err := pemfile.NewProvider(pemfile.Options{
		CertFile: filepath.Join(dir, FileChain), KeyFile: filepath.Join(dir, FileKey),
		RootFile: filepath.Join(dir, FileBundle), RefreshDuration: 2 * time.Millisecond,
	})
	require.NoError(t, err)
	defer provider.Close()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return mutual(t.Context(), provider) },
	})
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = c.Write([]byte("x")) // the client judges
			})
		}
	})
	var made atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := connect(t.Context(), ln.Addr().String(), provider); err != nil {
					t.Errorf("handshake %d: %v", made.Load(), err)
					return
				}
				made.Add(1)
			}
		})
	}
	seen := map[string]bool{}
	for n := range 100 {
		svid, before := a.issue(), made.Load()
		require.NoError(t, w.Write(svid, a.bundles()))
		// A program that polls sees the version at some time, and goes on meanwhile.
		for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			material, err := provider.KeyMaterial(t.Context())
			require.NoError(t, err)
			leaf := must(x509.ParseCertificate(material.Certs[0].Certificate[0]))
			if leaf.Equal(svid.Certificates[0]) && made.Load() > before {
				seen[leaf.SerialNumber.String()] = true
				break
			}
			if time.Now().After(until) {
				t.Fatalf("rotation %d was not noticed", n)
			}
		}
	}
	close(stop)
	clients.Wait()
	require.NoError(t, ln.Close())
	wg.Wait()
	if len(seen) != 100 || made.Load() < 100 {
		t.Errorf("%d rotations, %d handshakes", len(seen), made.Load())
	}
}

func mutual(ctx context.Context, p certprovider.Provider) (*tls.Config, error) {
	m, err := p.KeyMaterial(ctx)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: m.Certs, ClientCAs: m.Roots, ClientAuth: tls.RequireAnyClientCert,
		InsecureSkipVerify: true, SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: m.Roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			return err
		},
	}, nil
}

func connect(ctx context.Context, addr string, p certprovider.Provider) error {
	cfg, err := mutual(ctx, p)
	if err != nil {
		return err
	}
	c, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1)) // only now has the server checked us
	return err
}

// PostgreSQL wants its key to be its own or root's, and nobody else's to read.
func TestPostgreSQLPermissions(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("giving files to another user needs root")
		}
		t.Skip("giving files to another user needs root")
	}
	a := newAuthority()
	for _, c := range []struct {
		cfg      Config
		uid, gid uint32
		mode     fs.FileMode
	}{
		{Config{User: "65501"}, 65501, 0, 0o600},
		{Config{User: "nobody"}, 65534, 65534, 0o600},
		{Config{Group: "65502", Mode: "0640"}, 0, 65502, 0o640},
		{Config{User: "65501", Group: "65502", Mode: "0600"}, 65501, 65502, 0o600},
	} {
		c.cfg.Dir = memory(t)
		w := open(t, c.cfg)
		require.NoError(t, w.Write(a.issue(), a.bundles()))
		info, err := os.Stat(filepath.Join(c.cfg.Dir, FileKey))
		require.NoError(t, err)
		st := info.Sys().(*syscall.Stat_t)
		if st.Uid != c.uid || st.Gid != c.gid || info.Mode().Perm() != c.mode {
			t.Errorf("%+v: got %d:%d %o", c.cfg, st.Uid, st.Gid, info.Mode().Perm())
		}
		// be-secure-openssl.c, check_ssl_key_file_permissions
		owned := st.Uid == c.uid && info.Mode().Perm()&0o077 == 0
		rooted := st.Uid == 0 && info.Mode().Perm()&0o027 == 0
		if !owned && !rooted {
			t.Errorf("%+v: PostgreSQL would refuse the key", c.cfg)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	disk, err := os.MkdirTemp(".", "sp") // beside the source: on a disk
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(disk) })
	require.NoError(t, os.Chmod(disk, 0o755))
	open1 := memory(t)
	require.NoError(t, os.Mkdir(open1, 0o755))
	require.NoError(t, os.Chmod(open1, 0o777))
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{Dir: disk}, "not on tmpfs"},
		{Config{Dir: open1}, "writable by nobody else"},
		{Config{Dir: memory(t), User: "no-such-user"}, `no user "no-such-user"`},
		{Config{Dir: memory(t), Group: "no-such-group"}, `no group "no-such-group"`},
		{Config{Dir: memory(t), Mode: "0644"}, "never for everybody"},
		{Config{Dir: filepath.Join(memory(t), "deep", "er")}, "making the folder"},
	} {
		w, err := New(c.cfg, hclog.NewNullLogger())
		if err == nil {
			_ = w.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v, want %q", c.cfg, err, c.want)
		}
	}
	w := open(t, Config{Dir: disk, AllowDisk: true})
	a := newAuthority()
	require.NoError(t, w.Write(a.issue(), a.bundles()))
	if read(t, disk) == nil {
		t.Error("nothing on the disk")
	}
}

// A link that somebody put into the folder leads nowhere.
func TestForeignLinkIsRefused(t *testing.T) {
	dir, a := memory(t), newAuthority()
	w := open(t, Config{Dir: dir})
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, link)))
	if err := w.Write(a.issue(), a.bundles()); err == nil || !strings.Contains(err.Error(), "not ours") {
		t.Errorf("got %v", err)
	}
}

func TestCheck(t *testing.T) {
	for want, cfg := range map[string]Config{
		"":                    {Dir: "/d", Mode: "0640", OnChange: OnChange{Signal: "HUP", PIDFile: "/p"}},
		"dir":                 {},
		"mode":                {Dir: "/d", Mode: "0666"},
		"onChange":            {Dir: "/d", OnChange: OnChange{Command: []string{"/x"}, Signal: "HUP", PIDFile: "/p"}},
		"onChange.command[0]": {Dir: "/d", OnChange: OnChange{Command: []string{"nginx -s reload"}}},
		"onChange.timeout":    {Dir: "/d", OnChange: OnChange{Timeout: -1}},
		"onChange.signal":     {Dir: "/d", OnChange: OnChange{Signal: "KILL", PIDFile: "/p"}},
		"onChange.pidFile":    {Dir: "/d", OnChange: OnChange{Signal: "HUP"}},
	} {
		var got []string
		cfg.Check(func(key string, _ error) { got = append(got, key) })
		if strings.Join(got, " ") != want {
			t.Errorf("%+v: got %q, want %q", cfg, got, want)
		}
	}
}

func TestNotify(t *testing.T) {
	dir := memory(t)
	mark := filepath.Join(t.TempDir(), "mark")
	note := func(o OnChange) error {
		w := open(t, Config{Dir: dir, OnChange: o})
		return w.Notify(t.Context())
	}
	require.NoError(t, note(OnChange{}))
	t.Setenv("SECRET_OF_THE_AGENT", "x")
	require.NoError(t, note(OnChange{Command: []string{"/bin/sh", "-c", `echo "$SALLYPORT_FILES $1 $SECRET_OF_THE_AGENT" > "$0"`, mark, "; touch /tmp/x"}}))
	if got, err := os.ReadFile(mark); err != nil || string(got) != dir+" ; touch /tmp/x \n" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := note(OnChange{Command: []string{"/bin/sh", "-c", "echo why >&2; exit 3"}}); err == nil || !strings.Contains(err.Error(), "exit status 3: \"why\"") {
		t.Errorf("got %v", err)
	}
	begin := time.Now()
	err := note(OnChange{Command: []string{"/bin/sh", "-c", "sleep 60 & sleep 60"}, Timeout: 50 * time.Millisecond})
	if err == nil || !strings.Contains(err.Error(), "not done within 50ms") || time.Since(begin) > 10*time.Second {
		t.Errorf("got %v after %v", err, time.Since(begin))
	}

	pid := filepath.Join(t.TempDir(), "pid")
	require.NoError(t, note(OnChange{Signal: "HUP", PIDFile: pid}), "a program that does not run")
	cmd := exec.Command("/bin/sleep", "60")
	require.NoError(t, cmd.Start())
	require.NoError(t, os.WriteFile(pid, fmt.Appendf(nil, "%d\n/data\n", cmd.Process.Pid), 0o600))
	require.NoError(t, note(OnChange{Signal: "USR1", PIDFile: pid}))
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGUSR1 {
		t.Errorf("got %v", err)
	}
	for _, bad := range []string{"", "0", "1", "-1", "all"} {
		require.NoError(t, os.WriteFile(pid, []byte(bad), 0o600))
		if err := note(OnChange{Signal: "HUP", PIDFile: pid}); err == nil {
			t.Errorf("pid %q was taken", bad)
		}
	}
}

// An added file gets its name after those that it may speak of.
func TestAddedFilesComeLast(t *testing.T) {
	w := open(t, Config{Dir: memory(t)})
	w.Add("aaa.json", func(svid *x509svid.SVID) ([]byte, error) { return []byte(svid.ID.String()), nil })
	w.before = func(step string) error {
		if step != "rename to aaa.json" {
			return nil
		}
		for _, name := range []string{FileChain, FileKey, fileCombined, FileBundle} {
			if _, err := os.Stat(filepath.Join(w.Dir(), name)); err != nil {
				t.Error(err)
			}
		}
		return nil
	}
	a := newAuthority()
	require.NoError(t, w.Write(a.issue(), a.bundles()))
	got, err := os.ReadFile(filepath.Join(w.Dir(), "aaa.json"))
	require.NoError(t, err)
	if string(got) != "spiffe://shop.example/app" {
		t.Errorf("got %q", got)
	}
}
