package identity

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
)

func TestMeshName(t *testing.T) {
	label := strings.Repeat("a", 63)
	for _, c := range []struct{ id, want string }{
		{"spiffe://td/payments", "payments.mesh"},
		{"spiffe://td/shop/payments", "payments.shop.mesh"},
		{"spiffe://td/ns/shop/sa/pay-2", "pay-2.sa.shop.ns.mesh"},
		{"spiffe://td/mesh/mesh", "mesh.mesh.mesh"},
		{"spiffe://td/" + label, label + ".mesh"},
		{"spiffe://td", ""},
		{"spiffe://td/Payments", ""},
		{"spiffe://td/a.b", ""},
		{"spiffe://td/a_b", ""},
		{"spiffe://td/-a", ""},
		{"spiffe://td/a-", ""},
		{"spiffe://td/" + label + "a", ""},
		{"spiffe://td" + strings.Repeat("/a", 130), ""},
	} {
		got, ok := MeshName(spiffeid.RequireFromString(c.id))
		if got != c.want || ok != (c.want != "") {
			t.Errorf("MeshName(%s) = %q, %v, want %q", c.id, got, ok, c.want)
		}
	}
	if got, ok := MeshName(spiffeid.ID{}); ok {
		t.Errorf("the zero ID is named %q", got)
	}
}

func TestParseRef(t *testing.T) {
	for s, want := range map[string]string{
		"payments":                      "spiffe://shop.example/payments",
		"payments.mesh":                 "spiffe://shop.example/payments",
		"payments.shop":                 "spiffe://shop.example/shop/payments",
		"payments.shop.mesh":            "spiffe://shop.example/shop/payments",
		"/shop/payments":                "spiffe://shop.example/shop/payments",
		"/Shop/pay_ments":               "spiffe://shop.example/Shop/pay_ments",
		"spiffe://other.example/x":      "spiffe://other.example/x",
		"mesh":                          "spiffe://shop.example/mesh",
		"mesh.mesh":                     "spiffe://shop.example/mesh",
		"/" + strings.Repeat("a", 2000): "spiffe://shop.example/" + strings.Repeat("a", 2000),
	} {
		id, err := ParseRef(shop, s)
		if err != nil || id.String() != want {
			t.Errorf("ParseRef(%q) = %v, %v, want %s", s, id, err, want)
		}
	}
	for _, s := range []string{
		"", ".", ".mesh", "a.", ".a", "a..b", "Payments", "pay_ments", "payments:8080", "a/b", "a b",
		"/", "/a/", "//a", "/..", "/%2e", "/*", "spiffe://", "spiffe://td", "SPIFFE://td/a", "http://td/a", "spiffe://td/*",
		"/" + strings.Repeat("a", 2048),
	} {
		if id, err := ParseRef(shop, s); err == nil {
			t.Errorf("ParseRef(%q) = %v, want an error", s, id)
		}
	}
	if id, err := ParseRef(spiffeid.TrustDomain{}, "payments"); err == nil {
		t.Errorf("without a trust domain: got %v", id)
	}
}

func TestReserved(t *testing.T) {
	for s, want := range map[string]bool{
		"spiffe://td/sallyport":              true,
		"spiffe://td" + ControlPlanePath:     true,
		"spiffe://td/sallyports":             false,
		"spiffe://td/shop/sallyport":         false,
		"spiffe://td":                        false,
		"spiffe://sallyport/payments":        false,
		"spiffe://td/sallyport/a/b/c/orders": true,
	} {
		if got := Reserved(spiffeid.RequireFromString(s)); got != want {
			t.Errorf("Reserved(%s) = %v, want %v", s, got, want)
		}
	}
}

// FuzzParseRef checks that every reference names a valid workload ID and that an
// ID's mesh name leads back to it.
func FuzzParseRef(f *testing.F) {
	for _, s := range []string{"payments", "payments.shop.mesh", "/shop/payments", "spiffe://td/a", "mesh.mesh", "/a.b", "spiffe://td", "/sallyport/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseRef(shop, s)
		if err != nil {
			return
		}
		again, err := spiffeid.FromString(id.String())
		require.NoError(t, err)
		if again != id || id.Path() == "" || len(id.String()) > MaxIDLength {
			t.Fatalf("%q names %v", s, id)
		}
		name, ok := MeshName(id)
		if !ok || !id.MemberOf(shop) {
			return
		}
		back, err := ParseRef(shop, name)
		if err != nil || back != id {
			t.Fatalf("%v is %q, which is %v, %v", id, name, back, err)
		}
	})
}

func TestForeignMeshName(t *testing.T) {
	for _, tt := range []struct{ id, alias, want string }{
		{"spiffe://partner.example/shop/payments", "partner", "payments.shop.partner.mesh"},
		{"spiffe://partner.example/payments", "p-1", "payments.p-1.mesh"},
		{"spiffe://partner.example/shop/payments", "", ""},
		{"spiffe://partner.example/shop/payments", "Partner", ""},
		{"spiffe://partner.example/shop/payments", "a.b", ""},
		{"spiffe://partner.example/shop/Payments", "partner", ""},
		{"spiffe://partner.example", "partner", ""},
		{"spiffe://partner.example/" + strings.Repeat("a/", 123) + "a", "partner", ""}, // 252 bytes without the alias
	} {
		got, ok := ForeignMeshName(spiffeid.RequireFromString(tt.id), tt.alias)
		if got != tt.want || ok != (tt.want != "") {
			t.Errorf("%s as %s: got %q, %v; want %q", tt.id, tt.alias, got, ok, tt.want)
		}
	}
}
