package attest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func newToken(t testing.TB) Token {
	t.Helper()
	tok, err := NewToken([32]byte{1, 2, 3})
	require.NoError(t, err)
	return tok
}

func TestTokenRoundTrips(t *testing.T) {
	tok := newToken(t)
	for _, s := range []string{tok.Encode(), tok.Encode() + "\n", "  " + tok.Encode() + "\r\n"} {
		got, err := ParseToken(s)
		require.NoError(t, err)
		if got != tok {
			t.Errorf("got another token back")
		}
	}
}

func TestParseTokenRefuses(t *testing.T) {
	s := newToken(t).Encode()
	parts := strings.Split(s, ".")
	for name, bad := range map[string]string{
		"empty":             "",
		"words":             "hello",
		"two lines":         s + "\n" + s,
		"another version":   "sp2" + s[3:],
		"upper-case prefix": "SP1" + s[3:],
		"no hash":           strings.Join(parts[:3], "."),
		"empty hash":        strings.Join(parts[:3], ".") + ".",
		"short secret":      parts[0] + "." + parts[1] + "." + parts[2][1:] + "." + parts[3],
		"padding":           s + "=",
		"five parts":        s + "." + parts[3],
		"plain base64":      parts[0] + "." + parts[1] + "." + strings.Repeat("+", 43) + "." + parts[3],
		"line break inside": parts[0] + "." + parts[1] + "." + parts[2][:41] + "\n" + parts[2][42:] + "." + parts[3],
		"trailing bits":     s[:len(s)-1] + "_",
		"id with slash":     parts[0] + "." + strings.Repeat("/", 22) + "." + parts[2] + "." + parts[3],
	} {
		if _, err := ParseToken(bad); err != ErrTokenSyntax {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestTokenIsNotPrintedWithItsSecret(t *testing.T) {
	tok := newToken(t)
	secret := strings.Split(tok.Encode(), ".")[2]
	for _, s := range []string{tok.String(), fmt.Sprintf("%v %+v %s %#v", tok, tok, tok, tok)} {
		if strings.Contains(s, secret) || strings.Contains(s, fmt.Sprint(tok.Secret)) || !strings.Contains(s, tok.ID) {
			t.Errorf("got %s", s)
		}
	}
}

func TestSecretMatches(t *testing.T) {
	tok := newToken(t)
	hash := SecretHash(tok.Secret[:])
	if !SecretMatches(tok.Secret[:], hash[:]) {
		t.Error("the right secret does not match")
	}
	wrong := tok.Secret
	wrong[31] ^= 1
	for name, s := range map[string][]byte{"one bit": wrong[:], "short": tok.Secret[:31], "empty": nil} {
		if SecretMatches(s, hash[:]) {
			t.Errorf("%s: matches", name)
		}
	}
	if SecretMatches(tok.Secret[:], nil) {
		t.Error("matches an empty hash")
	}
}

func TestProof(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	nonce, err := NewNonce()
	require.NoError(t, err)
	replay, err := NewNonce()
	require.NoError(t, err)
	csr := []byte("csr")
	sig, err := Prove(key, nonce, csr)
	require.NoError(t, err)
	if err := CheckProof(&key.PublicKey, nonce, csr, sig); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"another key":   CheckProof(&other.PublicKey, nonce, csr, sig),
		"another nonce": CheckProof(&key.PublicKey, replay, csr, sig),
		"another CSR":   CheckProof(&key.PublicKey, nonce, []byte("csr2"), sig),
		"empty":         CheckProof(&key.PublicKey, nonce, csr, nil),
		"short nonce":   CheckProof(&key.PublicKey, nonce[:31], csr, sig),
	} {
		if err != ErrBadProof {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := Prove(key, nonce[:31], csr); err == nil {
		t.Error("signed a short challenge")
	}
}

func TestParseEnrollmentKey(t *testing.T) {
	der := func(c elliptic.Curve) []byte {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		require.NoError(t, err)
		b, err := x509.MarshalPKIXPublicKey(k.Public())
		require.NoError(t, err)
		return b
	}
	if _, err := ParseEnrollmentKey(der(elliptic.P256())); err != nil {
		t.Error(err)
	}
	for name, b := range map[string][]byte{"P-384": der(elliptic.P384()), "none": nil, "large": make([]byte, 1025), "noise": []byte("x")} {
		if _, err := ParseEnrollmentKey(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(newToken(f).Encode())
	f.Add("sp1...")
	f.Add("sp1.AAAAAAAAAAAAAAAAAAAAAA.AAAA\nAAAA.A")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err != nil {
			return
		}
		if tok.Encode() != strings.TrimSpace(s) {
			t.Errorf("%q has a second form: %q", s, tok.Encode())
		}
	})
}
