//go:build e2e

package meshtest

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
)

// TestF4_1_BothMeshesRotate: while A calls B, both sides replace all their
// authorities, roots included: each learns the other's new root before anything is
// signed with it, and no call fails.
func TestF4_1_BothMeshesRotate(t *testing.T) {
	w := newMeshes(t, controlplane.CA{SVIDTTL: 2 * time.Second, IntermediateTTL: 12 * time.Second, RootTTL: 72 * time.Second}, 500*time.Millisecond)
	w.wantStatus("orders", http.StatusOK)
	live := w.openStream()
	first := map[*Mesh]string{w.a: activeRoot(t, w.a), w.b: activeRoot(t, w.b)}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: Deadline}
	calls := 0
	for start := time.Now(); ; calls++ {
		resp, err := client.Get(w.out["orders"])
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("after %v and %d calls: %v, %+v", time.Since(start), calls, err, resp)
		}
		_ = resp.Body.Close()
		live.roundTrip(t)
		if activeRoot(t, w.a) != first[w.a] && activeRoot(t, w.b) != first[w.b] {
			t.Logf("%d calls in %v", calls, time.Since(start))
			break
		}
		if time.Since(start) > 3*time.Minute {
			t.Fatal("the roots were not replaced")
		}
		time.Sleep(20 * time.Millisecond) // the pace of the calls
	}
	w.wantStatus("orders", http.StatusOK)
	w.wantStatus("tester", http.StatusForbidden)
	w.wantStatus("snoop", http.StatusServiceUnavailable)
	if fetched := roots(t, w.bundle(w.a, "b.example")); len(fetched) < 2 {
		t.Errorf("A holds %d roots of B, want the new one beside the old", len(fetched))
	}
}

func activeRoot(t *testing.T, m *Mesh) string {
	t.Helper()
	s, err := m.Admin.Status(t.Context(), &sallyportv1.StatusRequest{})
	require.NoError(t, err)
	i := slices.IndexFunc(s.GetAuthorities(), func(a *sallyportv1.Authority) bool {
		return a.GetKind() == "root" && a.GetState() == "active"
	})
	require.GreaterOrEqual(t, i, 0, fmt.Sprint(s.GetAuthorities()))
	return s.GetAuthorities()[i].GetSubject()
}

func roots(t *testing.T, data string) []string {
	t.Helper()
	b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("b.example"), []byte(data))
	require.NoError(t, err)
	var out []string
	for _, c := range b.X509Authorities() {
		out = append(out, c.Subject.CommonName)
	}
	return out
}
