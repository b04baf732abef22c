//go:build e2e

package e2e

import (
	"crypto/tls"
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
	mallory.want(check, "PermissionDenied")
	if got := directly(t, stolen, addr); got != codes.PermissionDenied {
		t.Errorf("the server answers who was revoked with %v", got)
	}
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
