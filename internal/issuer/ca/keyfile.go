package ca

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// keyDir is a folder of key files. Each file holds one private key (PKCS#8), or
// the ID of one in a PKCS#11 token, and the certificate for it, both PEM, so that neither can be lost alone, and is
// replaced by rename, so that a crash leaves the old file or the new one.
type keyDir struct {
	path    string
	replica string
	token   PKCS11 // for key files whose key is in a token
}

// authority is a signing certificate with its key.
type authority struct {
	cert   *x509.Certificate
	signer Signer
	above  []*x509.Certificate // of an intermediate of an upstream CA: what leads to a root
}

const maxKeyFile = 64 << 10

// prepare makes the folder, refuses one that others can enter, and removes what
// a crash of this replica left half-written.
func (d keyDir) prepare() error {
	if err := os.MkdirAll(d.path, 0o700); err != nil {
		return fmt.Errorf("making the key folder: %w", err)
	}
	st, err := os.Stat(d.path)
	if err != nil {
		return fmt.Errorf("checking the key folder: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("key folder %s has mode %04o and is open to other users: run chmod 700 %[1]s", d.path, st.Mode().Perm())
	}
	left, err := filepath.Glob(filepath.Join(d.path, d.tempPrefix()+"*"))
	if err != nil {
		return fmt.Errorf("listing the key folder: %w", err)
	}
	for _, f := range left {
		if err := os.Remove(f); err != nil {
			return fmt.Errorf("removing a half-written key file: %w", err)
		}
	}
	return nil
}

func (d keyDir) tempPrefix() string { return ".new-" + d.replica + "-" }

func (d keyDir) file(name string) string { return filepath.Join(d.path, name+".pem") }

// names lists the key files whose name begins with prefix, without suffix.
func (d keyDir) names(prefix string) ([]string, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return nil, fmt.Errorf("listing the key folder: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".pem"); ok && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// load reads one key file; an error that is fs.ErrNotExist means there is none.
func (d keyDir) load(name string) (*authority, error) {
	path := d.file(name)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("loading a CA key: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("loading a CA key: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("CA key file %s has mode %04o and can be read by other users: run chmod 600 %[1]s", path, st.Mode().Perm())
	}
	if !st.Mode().IsRegular() || st.Size() > maxKeyFile {
		return nil, corrupt(path, errors.New("not a key file"))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("loading a CA key: %w", err)
	}
	a, err := d.decode(data)
	if err != nil {
		return nil, corrupt(path, err)
	}
	return a, nil
}

func corrupt(path string, err error) error {
	return fmt.Errorf("CA key file %s is corrupt (%w): restore it from a backup", path, err)
}

func (d keyDir) decode(data []byte) (*authority, error) {
	keyBlock, rest := pem.Decode(data)
	if keyBlock == nil || keyBlock.Type != blockPrivateKey && keyBlock.Type != blockTokenKey {
		return nil, errors.New("no PRIVATE KEY block")
	}
	certBlock, _ := pem.Decode(rest)
	if certBlock == nil || certBlock.Type != "CERTIFICATE" {
		return nil, errors.New("no CERTIFICATE block")
	}
	cert, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parsing the certificate: %w", err)
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a certificate for a %T, not an ECDSA key", cert.PublicKey)
	}
	if keyBlock.Type == blockTokenKey {
		return &authority{cert: cert, signer: &tokenKey{d.token, keyBlock.Bytes, pub}}, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parsing the key: %w", err)
	}
	signer, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a %T, not an ECDSA key", key)
	}
	if !signer.PublicKey.Equal(pub) {
		return nil, errors.New("the certificate is for another key")
	}
	return &authority{cert: cert, signer: signer}, nil
}

// save writes a key file durably: when it returns, file and name survive a crash.
func (d keyDir) save(name string, cert *x509.Certificate, key *pem.Block) error {
	data := pem.EncodeToMemory(key)
	data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	tmp, err := os.CreateTemp(d.path, d.tempPrefix()) // 0600
	if err != nil {
		return fmt.Errorf("writing CA key %s: %w", name, err)
	}
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), d.file(name))
	}
	if err == nil {
		err = d.sync()
	}
	if err != nil {
		return fmt.Errorf("writing CA key %s: %w", name, errors.Join(err, removeIfThere(tmp.Name())))
	}
	return nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (d keyDir) sync() error {
	f, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("syncing the key folder: %w", err)
	}
	return errors.Join(f.Sync(), f.Close())
}
