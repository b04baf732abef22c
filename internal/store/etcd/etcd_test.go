package etcd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/internal/store/storetest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(victimDir); dir != "" {
		victim(dir)
	}
	goleak.VerifyTestMain(m)
}

func testLog(t *testing.T, out *bytes.Buffer) hclog.Logger {
	t.Helper()
	return hclog.New(&hclog.LoggerOptions{Output: out, Level: hclog.Debug})
}

func embedded(t *testing.T, dir string) store.Store {
	t.Helper()
	s, err := Embedded(t.Context(), EmbeddedConfig{Dir: dir, Log: hclog.NewNullLogger()})
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// room gives a store of its own within s.
func room(s store.Store, name string) store.Store {
	c := s.(*client)
	return newClient(c.etcd, c.prefix+name+"/", c.log, func() error { return nil })
}

func TestContractEmbedded(t *testing.T) {
	t.Parallel()
	s := embedded(t, t.TempDir())
	n := 0
	storetest.Run(t, func(*testing.T) store.Store { n++; return room(s, fmt.Sprint(n)) })
}

// TestEmbedded tells the life of one data folder: quick and silent start, no
// socket, a lock, and what was written is there after a restart.
func TestEmbedded(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "etcd")
	var out bytes.Buffer
	log := testLog(t, &out)
	before := sockets(t)
	begun := time.Now()
	s, err := Embedded(t.Context(), EmbeddedConfig{Dir: dir, Log: log})
	require.NoError(t, err)
	t.Logf("ready after %s", time.Since(begun))
	if got := sockets(t); got != before {
		t.Errorf("listening sockets: got %d, want the %d from before", got, before)
	}
	info, err := os.Stat(dir)
	require.NoError(t, err)
	if got := info.Mode().Perm(); got != 0o700 {
		t.Errorf("mode of the data folder: got %o, want 700", got)
	}
	_, err = Embedded(t.Context(), EmbeddedConfig{Dir: dir, Log: log})
	if err == nil || !strings.Contains(err.Error(), "in use by another control plane") {
		t.Errorf("second server on one folder: got %v, want a refusal", err)
	}
	rev, err := s.Txn(t.Context(), nil, []store.Op{{Key: "k", Value: []byte("v")}})
	require.NoError(t, err)

	watching := make(chan error, 1)
	go func() {
		watching <- s.Watch(t.Context(), "", rev, func(int64, []store.Event) error { return nil })
	}()
	require.NoError(t, s.Close())
	if err := <-watching; !errors.Is(err, store.ErrClosed) {
		t.Errorf("watch at the end: got %v, want ErrClosed", err)
	}
	if _, err := s.Get(t.Context(), "k"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("get after the end: got %v, want ErrClosed", err)
	}
	require.NoError(t, s.Close(), "closing twice")

	s = embedded(t, dir)
	kv, err := s.Get(t.Context(), "k")
	require.NoError(t, err)
	if string(kv.Value) != "v" || kv.Rev != rev {
		t.Errorf("after a restart: got %s at %d, want v at %d", kv.Value, kv.Rev, rev)
	}
	if out.Len() > 0 {
		t.Errorf("etcd wrote to the log:\n%s", out.String())
	}
}

// sockets counts what this process's network namespace listens on by TCP.
func sockets(t *testing.T) int {
	t.Helper()
	n := 0
	for _, f := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		data, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		require.NoError(t, err)
		for _, line := range strings.Split(string(data), "\n") {
			fields := strings.Fields(line)
			if len(fields) > 9 && fields[3] == "0A" && ours(fields[9]) {
				n++
			}
		}
	}
	return n
}

// ours reports whether this process has the socket of that inode open.
func ours(inode string) bool {
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); target == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}

func TestCompactedWatch(t *testing.T) {
	s := embedded(t, t.TempDir())
	var rev int64
	for range 5 {
		var err error
		rev, err = s.Txn(t.Context(), nil, []store.Op{{Key: "k"}})
		require.NoError(t, err)
	}
	_, err := s.(*client).etcd.Compact(t.Context(), rev)
	require.NoError(t, err)
	err = s.Watch(t.Context(), "", rev-3, func(int64, []store.Event) error { return nil })
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("got %v, want ErrCompacted", err)
	}
}

// external is an etcd of its own that listens on a loopback port.
type external struct {
	dir    string
	server *embed.Etcd
	client url.URL
	tls    bool
	certs  certs
}

func (e *external) start(t *testing.T) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = "other", e.dir
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ListenPeerUrls = nil
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{e.client}, []url.URL{e.client}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.TickMs, cfg.ElectionMs = 50, 500
	if e.tls {
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = e.certs.cert, e.certs.key
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = e.certs.ca, true
	}
	server, err := embed.StartEtcd(cfg)
	require.NoError(t, err)
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(10 * time.Second):
		t.Fatal("external etcd is not ready")
	}
	e.server = server
}

func newExternal(t *testing.T, withTLS bool) *external {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	e := &external{dir: t.TempDir(), client: url.URL{Scheme: "http", Host: l.Addr().String()}, tls: withTLS}
	if withTLS {
		e.client.Scheme, e.certs = "https", makeCerts(t)
	}
	require.NoError(t, l.Close())
	e.start(t)
	t.Cleanup(func() { e.server.Close() })
	return e
}

func (e *external) dial(t *testing.T, prefix string) store.Store {
	t.Helper()
	c := Config{Endpoints: []string{e.client.String()}, Prefix: prefix, Log: hclog.NewNullLogger()}
	if e.tls {
		c.TLS = e.certs.config
	}
	s, err := Dial(t.Context(), c)
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

func TestContractExternal(t *testing.T) {
	t.Parallel()
	e := newExternal(t, false)
	n := 0
	storetest.Run(t, func(t *testing.T) store.Store { n++; return e.dial(t, fmt.Sprint("/mesh/", n)) })
}

func TestExternalPrefixes(t *testing.T) {
	e := newExternal(t, false)
	one, two, longer := e.dial(t, "/one"), e.dial(t, "/two/"), e.dial(t, "/one2")
	for _, s := range []store.Store{two, longer, one} {
		_, err := s.Txn(t.Context(), []store.Cmp{{Key: "k"}}, []store.Op{{Key: "k"}})
		require.NoError(t, err)
	}
	kvs, _, err := one.List(t.Context(), "")
	require.NoError(t, err)
	if len(kvs) != 1 {
		t.Errorf("got %v, want one key", kvs)
	}
}

func TestExternalTLS(t *testing.T) {
	e := newExternal(t, true)
	s := e.dial(t, "")
	_, err := s.Txn(t.Context(), nil, []store.Op{{Key: "k"}})
	require.NoError(t, err)

	stranger := &tls.Config{RootCAs: e.certs.config.RootCAs}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = Dial(ctx, Config{Endpoints: []string{e.client.String()}, TLS: stranger, Log: hclog.NewNullLogger()})
	if err == nil {
		t.Error("without a client certificate: got no error, want one")
	}
}

func TestDialRefusals(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close() // accepts, and never answers
	for name, c := range map[string]Config{
		"no endpoints": {},
		"silent":       {Endpoints: []string{l.Addr().String()}},
		"long prefix":  {Endpoints: []string{"127.0.0.1:1"}, Prefix: strings.Repeat("x", 300)},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		c.Log = hclog.NewNullLogger()
		if _, err := Dial(ctx, c); err == nil {
			t.Errorf("%s: got no error, want one", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
		cancel()
	}
}
