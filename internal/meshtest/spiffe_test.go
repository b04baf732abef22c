package meshtest

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/controlplane"
	"github.com/sallyport-mesh/sallyport/internal/issuer/external/issuertest"
)

// named is a leaf whose only URI SAN is made of the identity's own.
func named(change func(id string) string) spoiled {
	return spoiled{leaf: func(c *x509.Certificate) { rawSAN(c, true, change(c.URIs[0].String())) }}
}

func with(suffix string) spoiled { return named(func(id string) string { return id + suffix }) }

func replaced(old, by string) spoiled {
	return named(func(id string) string { return strings.Replace(id, old, by, 1) })
}

func TestID2_SchemeTrustDomainNoMore(t *testing.T) {
	refuse(t, map[string]spoiled{
		"another scheme":  replaced("spiffe:", "https:"),
		"upper case":      replaced("spiffe:", "SPIFFE:"),
		"no trust domain": named(func(id string) string { return "spiffe:///" + id[strings.LastIndex(id, "/")+1:] }),
		"no authority":    replaced("spiffe://", "spiffe:"),
		"query":           with("?a=b"),
		"empty query":     with("?"),
		"fragment":        with("#a"),
		"empty fragment":  with("#"),
	})
}

func TestID2_1_TrustDomain(t *testing.T) {
	refuse(t, map[string]spoiled{
		"upper case":       replaced(".example", ".Example"),
		"percent-encoding": replaced(".example", "%2eexample"),
		"user":             replaced("spiffe://", "spiffe://u@"),
		"user, password":   replaced("spiffe://", "spiffe://u:p@"),
		"port":             replaced(".example", ".example:8443"),
		"empty port":       replaced(".example", ".example:"),
		"not ASCII":        replaced(".example", ".exämple"),
	})
}

func TestID2_2_Segments(t *testing.T) {
	refuse(t, map[string]spoiled{
		"trailing slash":   with("/"),
		"empty segment":    replaced(".example/", ".example//"),
		"dot":              replaced(".example/", ".example/./"),
		"two dots":         replaced(".example/", ".example/x/../"),
		"percent-encoding": with("%61"),
		"encoded slash":    with("%2fa"),
		"semicolon":        with(";a"),
		"space":            with(" a"),
		"not ASCII":        with("ä"),
		"NUL":              with("\x00"),
	})
}

// ID 2.3: up to 2048 bytes are taken, and no more.
func TestID2_3_Length(t *testing.T) {
	long := func(n int) spoiled {
		return named(func(id string) string {
			td := id[:strings.Index(id[len("spiffe://"):], "/")+len("spiffe://")]
			return td + "/" + strings.Repeat("a", n-len(td)-1)
		})
	}
	b := newBorders(t)
	if !admitted(t, b.payments.Tunnel, long(2048).make(b.own, ordersPeer)) || !admitted(t, b.controlPlane, long(2048).make(b.own, ordersPeer)) {
		t.Error("an ID of 2048 bytes is refused")
	}
	if admitted(t, b.payments.Tunnel, long(2049).make(b.own, ordersPeer)) || admitted(t, b.controlPlane, long(2049).make(b.own, ordersPeer)) {
		t.Error("an ID of 2049 bytes is taken")
	}
}

// published is a mesh with bundle endpoints, and what one of them says.
func published(t *testing.T) (*Mesh, map[string]any) {
	m := New(t, Config{Files: map[string]string{"w.yaml": workloadB}, Change: func(c *controlplane.Config) { c.Listen.Bundle = "127.0.0.1:0" }})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // the form is the question
	var doc map[string]any
	Eventually(t, "the bundle", func() error {
		resp, err := client.Get("https://" + m.Bundle + "/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		return json.Unmarshal(body, &doc)
	})
	return m, doc
}

func keysFor(doc map[string]any, use string) []map[string]any {
	var out []map[string]any
	keys, _ := doc["keys"].([]any)
	for _, k := range keys {
		if key, _ := k.(map[string]any); key["use"] == use {
			out = append(out, key)
		}
	}
	return out
}

// ID 3.1, X 3.2: each signing authority, in the bundle and in the chains, carries
// an SVID: the trust domain's ID, without a path.
func TestID3_1_AuthoritiesHaveSVIDs(t *testing.T) {
	m, doc := published(t)
	svid, err := m.Agent("payments").Source().GetX509SVID()
	require.NoError(t, err)
	issuers := svid.Certificates[1:]
	for _, k := range keysFor(doc, "x509-svid") {
		der, err := base64.StdEncoding.DecodeString(k["x5c"].([]any)[0].(string))
		require.NoError(t, err)
		cert, err := x509.ParseCertificate(der)
		require.NoError(t, err)
		issuers = append(issuers, cert)
	}
	if len(issuers) < 2 {
		t.Fatalf("%d signing certificates, want an intermediate and a root", len(issuers))
	}
	for _, c := range issuers {
		if len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://test.example" || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
			t.Errorf("%s: URI SANs %v, cA %v", c.Subject, c.URIs, c.IsCA)
		}
	}
}

// X 6.1: a root is published with use x509-svid, without kid, x5c being itself.
func TestX6_1_PublishedRoots(t *testing.T) {
	_, doc := published(t)
	roots := keysFor(doc, "x509-svid")
	if len(roots) == 0 {
		t.Fatal("no root is published")
	}
	for _, k := range roots {
		x5c, _ := k["x5c"].([]any)
		_, kid := k["kid"]
		if kid || len(x5c) != 1 || k["kty"] != "EC" {
			t.Errorf("published %v", k)
		}
	}
}

// J 6: a JWT key is published with use jwt-svid and a kid.
func TestJ6_PublishedKeys(t *testing.T) {
	_, doc := published(t)
	keys := keysFor(doc, "jwt-svid")
	if len(keys) == 0 {
		t.Fatal("no JWT key is published")
	}
	for _, k := range keys {
		if kid, _ := k["kid"].(string); kid == "" || k["x5c"] != nil || k["kty"] != "EC" {
			t.Errorf("published %v", k)
		}
	}
	if n := len(keysFor(doc, "x509-svid")) + len(keys); n != len(doc["keys"].([]any)) {
		t.Errorf("%d keys of known use among %v", n, doc["keys"])
	}
}

// X 6.2: an entry without x5c is ignored, and the others hold.
func TestX6_2_EntryWithoutX5C(t *testing.T) {
	foreign := issuertest.New(t, foreignDomain)
	raw, err := foreign.Bundle().Marshal()
	require.NoError(t, err)
	var doc struct {
		Keys []map[string]any `json:"keys"`
	}
	require.NoError(t, json.Unmarshal(raw, &doc))
	bare := map[string]any{}
	for k, v := range doc.Keys[0] {
		if k != "x5c" {
			bare[k] = v
		}
	}
	doc.Keys = append([]map[string]any{bare}, doc.Keys...)
	raw, err = json.Marshal(doc)
	require.NoError(t, err)
	m := New(t, Config{Files: map[string]string{"w.yaml": workloadB, "f.yaml": strings.Replace(fromAfar, "BUNDLE", string(raw), 1)}})
	server := m.Sidecar(SidecarConfig{Workload: "payments", Serve: map[string]string{"http": serveHTTP(t)}})
	Eventually(t, "the foreign root", func() error {
		_, err := m.Admin.TrustBundle(t.Context(), &sallyportv1.TrustBundleRequest{TrustDomain: "foreign.example"})
		if err == nil && !admitted(t, server.Tunnel, foreign.Leaf(spiffeid.RequireFromPath(foreignDomain, "/a"), nil)) {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
}

const fromAfar = `apiVersion: sallyport.dev/v1
kind: TrustDomain
metadata: {name: far}
spec:
  trustDomain: foreign.example
  bundle: 'BUNDLE'
---
apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: from-afar}
spec:
  to: {workload: payments}
  allow: [{from: [{id: spiffe://foreign.example/**}], ports: [http]}]
`
