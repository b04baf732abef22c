package federation

import (
	"bytes"
	"crypto/ecdsa"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/stretchr/testify/require"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// jwk is one entry as its issuer writes it, with what change does to it.
func jwk(t *testing.T, key jose.JSONWebKey, change func(map[string]any)) string {
	t.Helper()
	data, err := key.MarshalJSON()
	require.NoError(t, err)
	var m map[string]any
	require.NoError(t, json.Unmarshal(data, &m))
	if change != nil {
		change(m)
	}
	data, err = json.Marshal(m)
	require.NoError(t, err)
	return string(data)
}

// TestB4_1_3_Keys holds the reading of every kind of entry: keys must be there,
// what is unknown is ignored, none usable is valid and trusts nothing.
func TestB4_1_3_Keys(t *testing.T) {
	i := newIssuer(t, partner)
	root := jose.JSONWebKey{Key: i.roots[0].PublicKey, Use: "x509-svid", Certificates: i.roots[:1]}
	signing := jose.JSONWebKey{Key: newKey(t).Public(), Use: "jwt-svid", KeyID: "a"}
	set := func(key, value string) func(map[string]any) { return func(m map[string]any) { m[key] = value } }
	without := func(key string) func(map[string]any) { return func(m map[string]any) { delete(m, key) } }
	leaf := i.svid("spiffe://partner.example/a").Certificates[0]
	private := jose.JSONWebKey{Key: newKey(t), Use: "jwt-svid", KeyID: "a"}
	for _, tt := range []struct {
		name, doc   string
		x509s, jwts int
		problem     string
	}{
		{name: "one of each", doc: `{"keys":[` + jwk(t, root, nil) + `,` + jwk(t, signing, nil) + `]}`, x509s: 1, jwts: 1},
		{name: "empty: trusts nothing", doc: `{"keys":[]}`},
		{name: "unknown use", doc: `{"keys":[` + jwk(t, root, set("use", "wit-svid")) + `,` + jwk(t, signing, set("use", "x")) + `]}`},
		{name: "no use", doc: `{"keys":[` + jwk(t, root, without("use")) + `]}`},
		{name: "unknown kty beside a known one", doc: `{"keys":[` + jwk(t, root, set("kty", "LATTICE")) + `,` + jwk(t, signing, nil) + `]}`, jwts: 1},
		{name: "no kty", doc: `{"keys":[` + jwk(t, root, without("kty")) + `]}`},
		{name: "unknown curve", doc: `{"keys":[` + jwk(t, signing, set("crv", "secp256k1")) + `]}`},
		{name: "symmetric", doc: `{"keys":[{"kty":"oct","use":"jwt-svid","kid":"a","k":"AAAA"}]}`},
		{name: "X6_2 without x5c", doc: `{"keys":[` + jwk(t, root, without("x5c")) + `,` + jwk(t, root, nil) + `]}`, x509s: 1},
		{name: "unknown members", doc: `{"keys":[],"spiffe_other":{}}`},
		{name: "no keys", doc: `{}`, problem: "no keys"},
		{name: "null keys", doc: `{"keys":null}`, problem: "no keys"},
		{name: "not JSON", doc: `<html>`, problem: "not a JWK set"},
		{name: "a list", doc: `[]`, problem: "not a JWK set"},
		{name: "empty", doc: ``, problem: "not a JWK set"},
		{name: "cut short", doc: `{"keys":[` + jwk(t, root, nil), problem: "not a JWK set"},
		{name: "two documents", doc: `{"keys":[]}{"keys":[]}`, problem: "something follows"},
		{name: "X6_1 two certificates", doc: `{"keys":[` + jwk(t, root, func(m map[string]any) {
			m["x5c"] = append(m["x5c"].([]any), m["x5c"].([]any)[0])
		}) + `]}`, problem: "2 certificates"},
		{name: "another key than the certificate's", doc: `{"keys":[` + jwk(t, signing, func(m map[string]any) {
			m["use"] = "x509-svid"
			var r map[string]any
			require.NoError(t, json.Unmarshal([]byte(jwk(t, root, nil)), &r))
			m["x5c"] = r["x5c"]
		}) + `]}`, problem: "do not match"},
		{name: "a leaf as authority", doc: `{"keys":[` + jwk(t, jose.JSONWebKey{Key: leaf.PublicKey, Use: "x509-svid", Certificates: append(i.roots[:0:0], leaf)}, nil) + `]}`, problem: "not the certificate of an authority"},
		{name: "J6 no kid", doc: `{"keys":[` + jwk(t, signing, without("kid")) + `]}`, problem: "keyID"},
		{name: "kid twice", doc: `{"keys":[` + jwk(t, signing, nil) + `,` + jwk(t, signing, nil) + `]}`, problem: "twice"},
		{name: "private key", doc: `{"keys":[` + jwk(t, private, nil) + `]}`, problem: "not a valid public key"},
		{name: "sequence below zero", doc: `{"keys":[],"spiffe_sequence":-1}`, problem: "not a JWK set"},
		{name: "hint below zero", doc: `{"keys":[],"spiffe_refresh_hint":-1}`, problem: "spiffe_refresh_hint"},
		{name: "hint in fractions", doc: `{"keys":[],"spiffe_refresh_hint":1.5}`, problem: "not a JWK set"},
		{name: "too many", doc: `{"keys":[` + strings.TrimSuffix(strings.Repeat(`{},`, 256+1), ",") + `]}`, problem: "keys, at most"},
		{name: "too large", doc: `{"keys":[]}` + strings.Repeat(" ", identity.MaxBundle), problem: "larger than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, err := identity.ParseBundle(partner, []byte(tt.doc))
			if tt.problem != "" {
				if err == nil || !strings.Contains(err.Error(), tt.problem) {
					t.Fatalf("got %v, want an error with %q", err, tt.problem)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if x, j := len(b.X509Authorities()), len(b.JWTAuthorities()); x != tt.x509s || j != tt.jwts {
				t.Errorf("%d X.509 and %d JWT authorities, want %d and %d", x, j, tt.x509s, tt.jwts)
			}
		})
	}
}

// TestB4_2_WhatWeWrite: kty and use are set, x5c holds one certificate and no kid
// stands beside it, a JWT key has its kid; another implementation reads the same;
// the same content is the same bytes.
func TestB4_2_WhatWeWrite(t *testing.T) {
	i := newIssuer(t, partner)
	i.addRoot()
	for _, kid := range []string{"b", "c", "d"} {
		i.jwt[kid] = newKey(t).Public()
	}
	b := i.bundle()
	b.SetRefreshHint(1500 * time.Millisecond)
	data, err := identity.MarshalBundle(b)
	require.NoError(t, err)
	var doc struct {
		Keys []map[string]any
		Hint json.Number `json:"spiffe_refresh_hint"`
		Seq  json.Number `json:"spiffe_sequence"`
	}
	require.NoError(t, json.Unmarshal(data, &doc))
	for _, k := range doc.Keys {
		_, hasKid := k["kid"]
		x5c, _ := k["x5c"].([]any)
		isX509 := k["use"] == "x509-svid"
		if k["kty"] != "EC" || isX509 == hasKid || isX509 != (len(x5c) == 1) || !isX509 && k["use"] != "jwt-svid" || k["d"] != nil {
			t.Errorf("wrote the entry %v", k)
		}
	}
	if len(doc.Keys) != 6 || doc.Hint != "2" || doc.Seq != "12" { // B 4.1.2: whole seconds
		t.Errorf("%d keys, hint %s, sequence %s", len(doc.Keys), doc.Hint, doc.Seq)
	}
	for range 20 {
		again, err := identity.MarshalBundle(b.Clone())
		require.NoError(t, err)
		if !bytes.Equal(data, again) {
			t.Fatal("the same bundle was written in two ways")
		}
	}
	theirs, err := spiffebundle.Parse(partner, data)
	require.NoError(t, err)
	ours, err := identity.ParseBundle(partner, data)
	require.NoError(t, err)
	b.SetRefreshHint(2 * time.Second)
	if !theirs.Equal(b) || !ours.Equal(b) {
		t.Error("what was written reads as something else")
	}
	if _, ok := ours.X509Authorities()[0].PublicKey.(*ecdsa.PublicKey); !ok {
		t.Error("no key")
	}
}

func FuzzParse(f *testing.F) {
	i := newIssuer(f, partner)
	data, err := identity.MarshalBundle(i.bundle())
	require.NoError(f, err)
	f.Add(data)
	f.Add([]byte(`{"keys":[{"kty":"EC","use":"jwt-svid"}],"spiffe_sequence":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := identity.ParseBundle(partner, data)
		if err != nil {
			return
		}
		again, err := identity.MarshalBundle(b)
		if err != nil {
			t.Fatalf("read but cannot be written: %v", err)
		}
		if c, err := identity.ParseBundle(partner, again); err != nil || !c.Equal(b) {
			t.Fatalf("written and read again is something else (%v): %s", err, again)
		}
	})
}
