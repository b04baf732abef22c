package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"regexp"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func (c *cli) ca() *cobra.Command {
	ca := group("ca", "The keys that sign identities")
	ca.AddCommand(c.csr(), c.taint())
	return ca
}

func (c *cli) csr() *cobra.Command {
	var keyFile, trustDomain, replica string
	cmd := &cobra.Command{
		Use: "csr --key FILE --trust-domain NAME", Short: "Ask another CA to sign an intermediate", Args: args(),
		Long: `Csr prints a certificate request (PKCS#10, PEM) for the intermediate of one
replica of the control plane, with ca.signer "upstream". A missing key file is
made. The request asks for the profile that the certificate must have: the URI
SAN of the trust domain and nothing else, cA true, key usage keyCertSign. Works
without a control plane.`,
		RunE: func(*cobra.Command, []string) error {
			td, err := spiffeid.TrustDomainFromString(trustDomain)
			if err != nil {
				return fmt.Errorf("--trust-domain %q: %w", trustDomain, err)
			}
			if !replicaName.MatchString(replica) {
				return fmt.Errorf("--replica %q: use letters, digits, '.', '_' and '-', at most 64", replica)
			}
			key, err := keyOf(keyFile)
			if err != nil {
				return err
			}
			der, err := certificateRequest(td, replica, key)
			if err != nil {
				return fmt.Errorf("making the request: %w", err)
			}
			request := pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}
			if c.output == "json" {
				return c.printJSON(map[string]string{"request": string(pem.EncodeToMemory(&request))})
			}
			return pem.Encode(c.stdout, &request)
		},
	}
	cmd.Flags().StringVar(&keyFile, "key", "", "`file` with the intermediate's key, PKCS#8 PEM; made (0600) if missing")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "`name` of the mesh, as in shop.example")
	cmd.Flags().StringVar(&replica, "replica", "0", "`name` of the replica, for the subject")
	for _, f := range []string{"key", "trust-domain"} {
		if err := cmd.MarkFlagRequired(f); err != nil {
			panic(err) // the flag is defined above
		}
	}
	return cmd
}

var (
	replicaName         = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`)
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19} // RFC 5280 section 4.2.1.9
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15} // section 4.2.1.3
)

// certificateRequest asks for what X509-SVID sections 3.2, 4.1 and 4.3 demand of
// a signing certificate.
func certificateRequest(td spiffeid.TrustDomain, replica string, key *ecdsa.PrivateKey) ([]byte, error) {
	constraints, err := asn1.Marshal(struct {
		IsCA    bool
		PathLen int
	}{true, 0})
	if err != nil {
		return nil, err
	}
	usage, err := asn1.Marshal(asn1.BitString{Bytes: []byte{0b0000_0110}, BitLength: 7}) // keyCertSign, cRLSign
	if err != nil {
		return nil, err
	}
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{"Sallyport"}, CommonName: "Sallyport intermediate " + replica},
		URIs:    []*url.URL{td.ID().URL()},
		ExtraExtensions: []pkix.Extension{
			{Id: oidBasicConstraints, Critical: true, Value: constraints},
			{Id: oidKeyUsage, Critical: true, Value: usage},
		},
	}, key)
}

// keyOf reads a P-256 or P-384 key, or makes a P-256 one where there is no file.
func keyOf(path string) (*ecdsa.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return newKeyFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the key: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("%s: want a PRIVATE KEY block (PKCS#8, PEM)", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() && ec.Curve != elliptic.P384() {
		return nil, fmt.Errorf("%s: want an ECDSA key, P-256 or P-384", path)
	}
	return ec, nil
}

func newKeyFile(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("writing the key: %w", err)
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("writing the key: %w", errors.Join(err, os.Remove(path)))
	}
	return key, nil
}
