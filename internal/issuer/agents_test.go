package issuer

import (
	"context"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/ca"
	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// host has two agents: web names the one of orders, db that of payments.
type host struct {
	*server
	agent *x509svid.SVID // /shop/orders
	msg   *sallyportv1.SVID
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{server: newServer(t)}
	h.admit()
	h.agent, h.msg, _ = h.enrolledBy(t, h.tokenAttemptFor(t, "orders"))
	return h
}

func (h *host) admit() {
	via := func(name, agent, uid string) policy.CompiledWorkload {
		w := workload(name)
		w.Attest = []policy.Attest{{Kind: attest.KindUnix, Via: []string{"/shop/" + agent}, Select: map[string]string{"uid": uid}}}
		return w
	}
	h.registry.SetWorkloads([]policy.CompiledWorkload{workload("payments"), workload("orders"), via("web", "orders", "1000"), via("db", "payments", "2000")})
}

func process(uid string) *sallyportv1.Process {
	return &sallyportv1.Process{Selectors: map[string]*sallyportv1.Values{
		"uid": {Values: []string{uid}}, "gid": {Values: []string{"100"}}, "path": {Values: []string{"/usr/bin/web"}},
	}}
}

func (h *host) issueFor(t *testing.T, svid *x509svid.SVID, p *sallyportv1.Process) (*x509svid.SVID, error) {
	t.Helper()
	key := newKey(t)
	resp, err := h.client(t, svid).IssueFor(t.Context(), &sallyportv1.IssueForRequest{Process: p, Csr: newCSR(t, key)})
	if err != nil {
		return nil, err
	}
	return toSVID(t, resp.GetSvid(), key), nil
}

func TestIssueFor(t *testing.T) {
	h := newHost(t)
	svid, err := h.issueFor(t, h.agent, process("1000"))
	require.NoError(t, err)
	leaf := svid.Certificates[0]
	if svid.ID.Path() != "/shop/web" || leaf.NotAfter.Sub(h.now()) > AppTTL {
		t.Errorf("got %s until %s, want an hour at most", svid.ID, leaf.NotAfter)
	}
	again, err := h.issueFor(t, h.agent, process("1000"))
	require.NoError(t, err)
	if got, want := ca.Instance(again.Certificates[0]), ca.Instance(leaf); got != want {
		t.Errorf("got instance %s, want %s: it is one host", got, want)
	}
	inst, err := h.registry.Instance(t.Context(), ca.Instance(leaf))
	require.NoError(t, err)
	if inst.Via != h.agent.ID || inst.Agent != h.msg.GetInstance() || inst.Kind != attest.KindUnix || !strings.Contains(inst.Subject, "uid 1000, path /usr/bin/web") {
		t.Errorf("got %+v", inst)
	}
	records, err := h.audit.Renewals(t.Context(), 0)
	require.NoError(t, err)
	if len(records) != 2 || records[1].Result != "serial "+hex.EncodeToString(leaf.SerialNumber.Bytes()) || records[1].Actor != h.agent.ID.String() || !strings.Contains(records[1].Detail, "uid 1000") {
		t.Errorf("got audit records %+v", records)
	}
	if _, err := identity.Verify(svid.Certificates, h.ca.ServerSVID(), h.now()); err != nil {
		t.Errorf("its SVID is no good: %v", err)
	}
}

func TestD4AgentIsIssuedOnlyForWorkloadsThatNameIt(t *testing.T) {
	h := newHost(t)
	other, _, _ := h.enrolled(t)
	web, err := h.issueFor(t, h.agent, process("1000"))
	require.NoError(t, err)
	for _, c := range []struct {
		name string
		svid *x509svid.SVID
		p    *sallyportv1.Process
		code codes.Code
	}{
		{"workload of another agent", h.agent, process("2000"), codes.PermissionDenied},
		{"another agent", other, process("1000"), codes.PermissionDenied},
		{"process that nobody names", h.agent, process("0"), codes.PermissionDenied},
		{"a process for others", web, process("1000"), codes.PermissionDenied},
		{"no selectors", h.agent, &sallyportv1.Process{}, codes.InvalidArgument},
		{"no process", h.agent, nil, codes.InvalidArgument},
		{"two users", h.agent, &sallyportv1.Process{Selectors: map[string]*sallyportv1.Values{"uid": {Values: []string{"1000", "0"}}, "gid": {Values: []string{"100"}}}}, codes.InvalidArgument},
		{"a control character", h.agent, process("1000\n"), codes.InvalidArgument},
	} {
		if got, err := h.issueFor(t, c.svid, c.p); status.Code(err) != c.code {
			t.Errorf("%s: got %v, %v; want %v", c.name, got, err, c.code)
		}
	}
	// A host's word ends with its agent, and with the workload that names it.
	h.registry.SetWorkloads([]policy.CompiledWorkload{workload("payments"), workload("orders")})
	if _, err := h.issueFor(t, h.agent, process("1000")); status.Code(err) != codes.PermissionDenied {
		t.Errorf("workload gone: got %v", err)
	}
	h.admit()
	require.NoError(t, h.registry.Remove(t.Context(), h.msg.GetInstance(), "alice"))
	if _, err := h.issueFor(t, h.agent, process("1000")); status.Code(err) != codes.Unauthenticated {
		t.Errorf("agent removed: got %v", err)
	}
}

// What an agent was given for a process is of no use to get more.
func TestD4ProcessCannotRenewByItself(t *testing.T) {
	h := newHost(t)
	web, err := h.issueFor(t, h.agent, process("1000"))
	require.NoError(t, err)
	if _, err := h.client(t, web).Renew(t.Context(), &sallyportv1.RenewRequest{Csr: newCSR(t, newKey(t))}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("renewing: got %v", err)
	}
	a := h.keyAttempt(t, ca.Instance(web.Certificates[0]), newKey(t))
	if _, err := a.run(t, h.client(t, nil)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("enrolling: got %v", err)
	}
}

func TestRenewForAnApp(t *testing.T) {
	h := newHost(t)
	key := newKey(t)
	renew := func(app bool) *x509svid.SVID {
		resp, err := h.client(t, h.agent).Renew(t.Context(), &sallyportv1.RenewRequest{Csr: newCSR(t, key), App: app})
		require.NoError(t, err)
		return toSVID(t, resp.GetSvid(), key)
	}
	own, app := renew(false), renew(true)
	if left := app.Certificates[0].NotAfter.Sub(h.now()); left > AppTTL || left < AppTTL-time.Minute {
		t.Errorf("the app's lives %v, want an hour", left)
	}
	inst, err := h.registry.Instance(t.Context(), h.msg.GetInstance())
	require.NoError(t, err)
	if want := hex.EncodeToString(own.Certificates[0].SerialNumber.Bytes()); inst.Serial != want {
		t.Errorf("got serial %s, want the one that lives longest, %s", inst.Serial, want)
	}
	records, err := h.audit.Renewals(t.Context(), 0)
	require.NoError(t, err)
	if len(records) != 2 || !strings.Contains(records[0].Detail, "for its app") || records[0].Action != audit.ActionRenew {
		t.Errorf("got %+v", records)
	}
}

// Every RPC that needs an SVID, called with none, an expired one and one that is
// no workload's.
func TestD8EveryRPCRefuses(t *testing.T) {
	h := newHost(t)
	serverSVID, err := h.ca.ServerSVID().GetX509SVID()
	require.NoError(t, err)
	forged := newKey(t)
	issued, err := h.ca.Issue(t.Context(), ca.Request{ID: h.agent.ID, Key: forged.Public(), Instance: "00000000000000000000"})
	require.NoError(t, err)
	other, err := h.ca.Issue(t.Context(), ca.Request{ID: spiffeid.RequireFromPath(td, "/shop/payments"), Key: forged.Public(), Instance: h.msg.GetInstance()})
	require.NoError(t, err)
	csr := newCSR(t, newKey(t))
	rpcs := map[string]func(context.Context, sallyportv1.EnrollmentClient) error{
		"Renew": func(ctx context.Context, c sallyportv1.EnrollmentClient) error {
			_, err := c.Renew(ctx, &sallyportv1.RenewRequest{Csr: csr})
			return err
		},
		"IssueFor": func(ctx context.Context, c sallyportv1.EnrollmentClient) error {
			_, err := c.IssueFor(ctx, &sallyportv1.IssueForRequest{Csr: csr, Process: process("1000")})
			return err
		},
		"IssueJWT": func(ctx context.Context, c sallyportv1.EnrollmentClient) error {
			_, err := c.IssueJWT(ctx, &sallyportv1.IssueJWTRequest{Audience: []string{"vault"}})
			return err
		},
		"IssueJWT for a process": func(ctx context.Context, c sallyportv1.EnrollmentClient) error {
			_, err := c.IssueJWT(ctx, &sallyportv1.IssueJWTRequest{Audience: []string{"vault"}, Process: process("1000")})
			return err
		},
	}
	for name, call := range rpcs {
		require.NoError(t, call(t.Context(), h.client(t, h.agent)), name)
		for role, svid := range map[string]*x509svid.SVID{
			"no certificate":               nil,
			"unknown instance":             {ID: h.agent.ID, Certificates: issued.Chain, PrivateKey: forged},
			"instance of another workload": {ID: h.agent.ID, Certificates: other.Chain, PrivateKey: forged},
			"the control plane's role":     serverSVID,
		} {
			if err := call(t.Context(), h.client(t, svid)); status.Code(err) != codes.Unauthenticated {
				t.Errorf("%s, %s: got %v", name, role, err)
			}
		}
	}
	kept := h.client(t, h.agent) // its connection will outlive the SVID
	require.NoError(t, rpcs["Renew"](t.Context(), kept))
	h.skew.Store(int64(25 * time.Hour))
	require.NoError(t, h.ca.Advance(t.Context()))
	for name, call := range rpcs {
		if err := call(t.Context(), kept); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "expired") {
			t.Errorf("%s, expired on a live connection: got %v", name, err)
		}
	}
}

// A host with hundreds of processes starts at once; one that never stops is slowed.
func TestAgentsShare(t *testing.T) {
	h := newHost(t)
	now := h.now()
	for i := range processBurst {
		if !h.processes.allow("agent", now) {
			t.Fatalf("call %d of a starting host is refused", i+1)
		}
	}
	if h.processes.allow("agent", now) {
		t.Error("without end")
	}
	if !h.processes.allow("another", now) {
		t.Error("another agent pays for it")
	}
}
