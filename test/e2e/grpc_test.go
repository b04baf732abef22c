//go:build e2e

package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	rpcstatus "google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/test/realmesh"
)

// proxylessWorkload is one whose processes a host's agent gives their identity.
func proxylessWorkload(name, spec string) string {
	return workload(name+"-host", "") + fmt.Sprintf(
		"apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: %s}\nspec:\n  attest: [{kind: unix, via: [/%s-host], uid: %d}]\n%s---\n", name, name, os.Getuid(), spec)
}

// grpcPolicy lets orders call one method, or every one, of payments, and ledger.
func grpcPolicy(to, from, grpc string) string {
	return fmt.Sprintf("apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: %s-%s}\nspec:\n  to: {workload: %s}\n  allow: [{from: [{workload: %s}], ports: [rpc]%s}]\n---\n", to, from, to, from, grpc)
}

const onlyCheck = ", grpc: [{service: grpc.health.v1.Health, methods: [Check]}]"

// files has the agent of a host write a workload's SVID and the bootstrap file.
func grpcFiles(t *testing.T, m *realmesh.Mesh, name string) (bootstrap string, agent *realmesh.Proc) {
	t.Helper()
	dir, admin := filepath.Join(m.Dir, name+"-host"), realmesh.FreeAddr(t)
	realmesh.WriteFile(t, filepath.Join(dir, "token"), m.Token(name+"-host"))
	realmesh.WriteFile(t, filepath.Join(dir, "agent.yaml"), fmt.Sprintf(
		"controlPlane: %s\ntokenFile: token\nadmin: {listen: %q}\nfiles: [{dir: svid, user: \"%d\", allowDisk: true, grpc: true}]\n", m.GRPC, admin, os.Getuid()))
	agent = realmesh.Start(t, name+"-host", exec.Command(realmesh.Bin(t, "sallyport-proxy"), "agent", "--config", filepath.Join(dir, "agent.yaml")))
	realmesh.Eventually(t, "the files of "+name, func() error { return realmesh.Ready(admin) })
	bootstrap = filepath.Join(dir, "svid", "grpc-bootstrap.json")
	realmesh.Eventually(t, bootstrap, func() error { _, err := os.Stat(bootstrap); return err })
	return bootstrap, agent
}

// grpcPort is a free address and its port.
func grpcPort(t *testing.T) (addr, port string) {
	t.Helper()
	addr = realmesh.FreeAddr(t)
	_, port, err := net.SplitHostPort(addr)
	require.NoError(t, err)
	return addr, port
}

// directly calls a server with somebody's SVID and without xDS.
func directly(t *testing.T, svid tls.Certificate, addr string) codes.Code {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true, Certificates: []tls.Certificate{svid}, //nolint:gosec // the other end is not the question
	})))
	require.NoError(t, err)
	defer conn.Close()
	_, err = healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
	return rpcstatus.Code(err)
}

// TestGRPCWithoutSidecars: a stock xDS client and a stock xDS server of gRPC, which
// have nothing of ours but files. One method passes and another is refused; an edit
// holds on the channel that is open; whoever is revoked is refused.
func TestGRPCWithoutSidecars(t *testing.T) {
	addr, port := grpcPort(t)
	payments := proxylessWorkload("payments", fmt.Sprintf("  ports: [{name: rpc, port: %s, protocol: grpc}]\n  endpoints: [%q]\n", port, addr))
	others := proxylessWorkload("orders", "") + proxylessWorkload("mallory", "")
	rules := func(grpc string) string {
		return grpcPolicy("payments", "orders", grpc) + grpcPolicy("payments", "mallory", "")
	}
	m := realmesh.New(t, map[string]string{"payments.yaml": payments, "others.yaml": others, "rules.yaml": rules(onlyCheck)})
	bootstrap, _ := grpcFiles(t, m, "payments")
	server := startServer(t, "payments", bootstrap, addr)
	target := fmt.Sprintf("xds:///payments.mesh:%s", port)
	bootstrap, _ = grpcFiles(t, m, "orders")
	orders := newCaller(t, "orders", bootstrap, target)
	bootstrap, agent := grpcFiles(t, m, "mallory")
	mallory := newCaller(t, "mallory", bootstrap, target)
	orders.until(check, "OK")
	orders.want(list, "PermissionDenied")
	mallory.until(list, "OK")

	edit := func(files string) {
		realmesh.WriteFile(t, filepath.Join(m.Policy, "rules.yaml"), files)
	}
	edit(rules(""))
	orders.until(list, "OK")
	edit(rules(onlyCheck))
	orders.until(list, "PermissionDenied")
	orders.want(check, "OK")

	dir := filepath.Join(m.Dir, "mallory-host", "svid")
	stolen, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem"))
	require.NoError(t, err)
	require.Equal(t, codes.OK, directly(t, stolen, addr))
	mustCLI(t, m, "identity", "revoke", "mallory")
	// It fails by the server's rules, or because the control plane tells it nothing.
	realmesh.Eventually(t, "mallory to be refused", func() error {
		if got := mallory.call(check); strings.HasPrefix(got, "OK") {
			return errors.New(got)
		}
		return nil
	})
	realmesh.Eventually(t, "the server to refuse it", func() error { // it acknowledges rules shortly before it goes by them
		if got := directly(t, stolen, addr); got != codes.PermissionDenied {
			return errors.New(got.String())
		}
		return nil
	})
	orders.want(check, "OK")

	// Without its Workload a server serves nobody, and is nobody's destination.
	require.NoError(t, os.Remove(filepath.Join(m.Policy, "payments.yaml")))
	edit("# no rules\n")
	orders.until(check, "Unavailable")
	realmesh.Eventually(t, "the server to stop", func() error {
		if !strings.Contains(server.Log(), "NOT_SERVING") {
			return fmt.Errorf("it says %q", server.Log())
		}
		return nil
	})
	select {
	case <-agent.Done(): // it has nothing to write any more, which is no reason to end
		t.Error("the agent of who was revoked ended")
	default:
	}
}

// manual is a block of docs/grpc.md, with its parts replaced.
func manual(t *testing.T, file string, replace ...string) string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(realmesh.Root(t), "docs", "grpc.md"))
	require.NoError(t, err)
	_, block, found := strings.Cut(string(page), "```yaml\n# "+file+"\n")
	require.True(t, found, file)
	block, _, _ = strings.Cut(block, "```")
	for i := 0; i < len(replace); i += 2 {
		require.Contains(t, block, replace[i])
		block = strings.ReplaceAll(block, replace[i], replace[i+1])
	}
	return block
}

// TestGRPCManual does what docs/grpc.md says, with other addresses and users.
func TestGRPCManual(t *testing.T) {
	needRoot(t)
	addr, port := grpcPort(t)
	m := realmesh.New(t, map[string]string{"policy.yaml": manual(t, "policy.yaml", "10.0.0.7:9000", addr, "port: 9000", "port: "+port)})
	dir := filepath.Join(m.Dir, "host1")
	realmesh.WriteFile(t, filepath.Join(dir, "token"), m.Token("host1"))
	realmesh.WriteFile(t, filepath.Join(dir, "agent.yaml"), manual(t, "agent.yaml",
		"10.0.0.1:8443", m.GRPC, "/run/sallyport-agent/", "svid-", "user: payments", "user: \"1001\"", "user: orders", "user: \"1002\"", "grpc: true", "grpc: true, allowDisk: true")+
		fmt.Sprintf("admin: {listen: %q}\n", realmesh.FreeAddr(t)))
	realmesh.Start(t, "host1", exec.Command(realmesh.Bin(t, "sallyport-proxy"), "agent", "--config", filepath.Join(dir, "agent.yaml")))
	bootstrap := func(name string) string {
		file := filepath.Join(dir, "svid-"+name, "grpc-bootstrap.json")
		realmesh.Eventually(t, file, func() error { _, err := os.Stat(file); return err })
		return file
	}
	startServer(t, "payments", bootstrap("payments"), addr)
	orders := newCaller(t, "orders", bootstrap("orders"), "xds:///payments.mesh:"+port)
	orders.until(check, "OK")
	orders.want(list, "PermissionDenied")
}

// plainServer is a gRPC server behind a sidecar, of which it knows nothing.
func plainServer(t *testing.T) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := grpc.NewServer()
	healthv1.RegisterHealthServer(srv, health.NewServer())
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(srv.Stop)
	return ln.Addr().String()
}

// TestGRPCToSidecar: a stock xDS client calls a workload that has a sidecar, at its
// direct port. An edit cuts the open channel and opens it again; rules about methods,
// which the sidecar does not read, refuse and never let through more; whoever is
// revoked is cut.
func TestGRPCToSidecar(t *testing.T) {
	_, port := grpcPort(t)
	_, direct := grpcPort(t)
	rules := func(grpc string) string { return grpcPolicy("payments", "orders", grpc) }
	m := realmesh.New(t, map[string]string{
		"workloads.yaml": workload("payments", fmt.Sprintf("  ports: [{name: rpc, port: %s, protocol: grpc, direct: %s}]\n", port, direct)) +
			proxylessWorkload("orders", "") + proxylessWorkload("mallory", ""),
		"rules.yaml": rules(""),
	})
	payments := m.Sidecar(realmesh.SidecarConfig{Name: "payments", Serve: map[string]string{"rpc": plainServer(t)}})
	bootstrap, _ := grpcFiles(t, m, "orders")
	orders := newCaller(t, "orders", bootstrap, "xds:///payments.mesh:"+port)
	orders.until(check, "OK")
	orders.want(list, "OK")
	recorded := func(outcome, why string) {
		t.Helper()
		realmesh.Eventually(t, "a record of one that was "+outcome, func() error {
			all := m.Flows()
			for _, f := range all {
				if f.Src == "spiffe://test.example/orders" && f.Dst == "spiffe://test.example/payments" && f.Side == "inbound" && f.Outcome == outcome && strings.Contains(f.Error, why) {
					return nil
				}
			}
			return fmt.Errorf("%+v", all)
		})
	}

	_, _ = grpcFiles(t, m, "mallory")
	dir := filepath.Join(m.Dir, "mallory-host", "svid")
	svid, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem"))
	require.NoError(t, err)
	if got := directly(t, svid, "127.0.0.1:"+direct); got != codes.PermissionDenied {
		t.Errorf("whom no rule names is answered %v", got)
	}

	edit := func(files string) { realmesh.WriteFile(t, filepath.Join(m.Policy, "rules.yaml"), files) }
	edit(rules(onlyCheck))
	orders.until(check, "PermissionDenied")
	orders.want(list, "PermissionDenied")
	realmesh.Eventually(t, "status to say so", func() error {
		stdout, stderr, _ := m.CLI("status")
		if !strings.Contains(stdout+stderr, "cannot enforce payments-orders") {
			return errors.New(stdout + stderr)
		}
		return nil
	})
	recorded("cut", "")
	recorded("refused", "")
	edit(rules(""))
	orders.until(check, "OK")

	dir = filepath.Join(m.Dir, "orders-host", "svid")
	svid, err = tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem"))
	require.NoError(t, err)
	live, err := tls.Dial("tcp", "127.0.0.1:"+direct, &tls.Config{
		InsecureSkipVerify: true, Certificates: []tls.Certificate{svid}, NextProtos: []string{"h2"}, //nolint:gosec // the other end is not the question
	})
	require.NoError(t, err)
	defer live.Close()
	require.Equal(t, codes.OK, directly(t, svid, "127.0.0.1:"+direct))
	mustCLI(t, m, "identity", "revoke", "orders")
	orders.until(check, "Unavailable") // the sidecar takes no handshake of it
	ended(t, live)
	recorded("cut", "revoked")
	select {
	case <-payments.Done():
		t.Error("the sidecar ended")
	default:
	}
}

// TestGRPCFromSidecar: an app behind a sidecar calls a stock xDS server by plain
// mutual TLS. The server enforces methods; an edit holds on the open channel; a
// sidecar whose ID is revoked is refused by a server that sees no list.
func TestGRPCFromSidecar(t *testing.T) {
	addr, port := grpcPort(t)
	m := realmesh.New(t, map[string]string{
		"workloads.yaml": proxylessWorkload("ledger", fmt.Sprintf("  ports: [{name: rpc, port: %s, protocol: grpc}]\n  endpoints: [%q]\n", port, addr)) + workload("front", ""),
		"rules.yaml":     grpcPolicy("ledger", "front", onlyCheck),
	})
	bootstrap, _ := grpcFiles(t, m, "ledger")
	startServer(t, "ledger", bootstrap, addr)
	front := m.Sidecar(realmesh.SidecarConfig{Name: "front", Outbound: map[string]string{"ledger:rpc": ""}})
	app := newCaller(t, "front", "", "passthrough:///"+front.Out["ledger:rpc"])
	app.until(check, "OK")
	app.want(list, "PermissionDenied")
	realmesh.WriteFile(t, filepath.Join(m.Policy, "rules.yaml"), grpcPolicy("ledger", "front", ""))
	app.until(list, "OK")
	realmesh.WriteFile(t, filepath.Join(m.Policy, "rules.yaml"), grpcPolicy("ledger", "front", onlyCheck))
	app.until(list, "PermissionDenied")
	app.want(check, "OK")
	mustCLI(t, m, "identity", "revoke", "front")
	app.until(check, "PermissionDenied")
}
