package issuer

import (
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/audit"
)

func TestIssueJWT(t *testing.T) {
	h := newHost(t)
	for _, c := range []struct {
		name, path string
		p          *sallyportv1.Process
	}{{"own", "/shop/orders", nil}, {"a process's", "/shop/web", process("1000")}} {
		resp, err := h.client(t, h.agent).IssueJWT(t.Context(), &sallyportv1.IssueJWTRequest{Audience: []string{"vault", "db"}, Process: c.p})
		require.NoError(t, err)
		svid, err := jwtsvid.ParseAndValidate(resp.GetToken(), h.ca.Bundle(), []string{"vault"})
		require.NoError(t, err)
		if svid.ID.Path() != c.path || resp.GetSpiffeId() != svid.ID.String() || !resp.GetExpires().AsTime().Equal(svid.Expiry) {
			t.Errorf("%s: got %s until %s", c.name, resp.GetSpiffeId(), resp.GetExpires().AsTime())
		}
		records, err := h.audit.Renewals(t.Context(), 1)
		require.NoError(t, err)
		r := records[0]
		if r.Action != audit.ActionJWT || r.Subject != svid.ID.String() || r.Actor != h.agent.ID.String() || !strings.Contains(r.Result, svid.Claims["jti"].(string)) || !strings.Contains(r.Detail, "vault db") {
			t.Errorf("%s: got %+v", c.name, r)
		}
		if strings.Contains(r.Detail+r.Result, resp.GetToken()) {
			t.Errorf("%s: the token is in the audit log", c.name)
		}
	}
}

func TestIssueJWTBounds(t *testing.T) {
	h := newHost(t)
	other, _, _ := h.enrolled(t)
	web, err := h.issueFor(t, h.agent, process("1000"))
	require.NoError(t, err)
	vault := []string{"vault"}
	for _, c := range []struct {
		name     string
		svid     *x509svid.SVID
		audience []string
		p        *sallyportv1.Process
		code     codes.Code
	}{
		{"no audience", h.agent, nil, nil, codes.InvalidArgument},
		{"empty audience", h.agent, []string{""}, nil, codes.InvalidArgument},
		{"many audiences", h.agent, strings.Split(strings.Repeat("a,", 16)+"a", ","), nil, codes.InvalidArgument},
		{"longest audiences", h.agent, slices.Repeat([]string{strings.Repeat("a", 1024)}, 16), nil, codes.OK},
		{"long audience", h.agent, []string{strings.Repeat("a", 1025)}, nil, codes.InvalidArgument},
		{"D4 another agent's process", other, vault, process("1000"), codes.PermissionDenied},
		{"D4 a process by itself", web, vault, nil, codes.PermissionDenied},
		{"D4 a process for others", web, vault, process("1000"), codes.PermissionDenied},
		{"empty process", h.agent, vault, &sallyportv1.Process{}, codes.InvalidArgument},
	} {
		resp, err := h.client(t, c.svid).IssueJWT(t.Context(), &sallyportv1.IssueJWTRequest{Audience: c.audience, Process: c.p})
		if status.Code(err) != c.code {
			t.Errorf("%s: got %v, %v; want %v", c.name, resp.GetSpiffeId(), err, c.code)
		}
	}
}
