package federation

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// WebCert is a certificate in files that somebody else renews. It is read again
// when a file has changed; one that cannot be read, or whose halves do not belong
// together yet, leaves the last good one in use.
type WebCert struct {
	certFile, keyFile string
	now               func() time.Time
	log               hclog.Logger

	mu      sync.Mutex
	seen    [2]os.FileInfo   // guarded by mu; of the files that cert is from
	cert    *tls.Certificate // guarded by mu
	problem string           // guarded by mu; why the files as they are are not in use
}

// sameState reports whether a file is still the one that a was read from. Renaming
// a new one into place changes the file, writing to it the time.
func sameState(a, b os.FileInfo) bool {
	return a != nil && os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// LoadWebCert reads a PEM chain and its key.
func LoadWebCert(certFile, keyFile string, now func() time.Time, log hclog.Logger) (*WebCert, error) {
	w := &WebCert{certFile: certFile, keyFile: keyFile, now: now, log: log}
	if w.refresh(); w.cert == nil {
		return nil, fmt.Errorf("reading %s and %s: %s", certFile, keyFile, w.problem)
	}
	return w, nil
}

// TLS is the configuration of an https_web endpoint.
func (w *WebCert) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		Time:       w.now,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.refresh()
			return w.cert, nil
		},
	}
}

// warnBefore is how long before its end a certificate is reported.
const warnBefore = 7 * 24 * time.Hour

// Problem says what is wrong with the certificate or soon will be; "" if nothing.
func (w *WebCert) Problem() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refresh()
	if w.problem != "" {
		return fmt.Sprintf("%s and %s are not in use as they are: %s", w.certFile, w.keyFile, w.problem)
	}
	life := w.cert.Leaf.NotAfter.Sub(w.cert.Leaf.NotBefore)
	if left := w.cert.Leaf.NotAfter.Sub(w.now()); left < min(warnBefore, life/6) {
		return fmt.Sprintf("the certificate in %s ends at %s: renew it", w.certFile, w.cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return ""
}

// refresh reads the files if they have changed. The caller holds mu, or is alone.
func (w *WebCert) refresh() {
	var seen [2]os.FileInfo
	for i, path := range []string{w.certFile, w.keyFile} {
		st, err := os.Stat(path)
		if err != nil {
			w.fail(err)
			return
		}
		seen[i] = st
	}
	if w.problem == "" && sameState(w.seen[0], seen[0]) && sameState(w.seen[1], seen[1]) {
		return
	}
	cert, err := tls.LoadX509KeyPair(w.certFile, w.keyFile)
	if err == nil && cert.Leaf == nil {
		cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0])
	}
	if err != nil {
		w.fail(err)
		return
	}
	w.cert, w.seen, w.problem = &cert, seen, ""
	w.log.Info("certificate in use", "file", w.certFile, "not_after", cert.Leaf.NotAfter)
}

func (w *WebCert) fail(err error) {
	if text := err.Error(); text != w.problem {
		w.problem = text
		w.log.Warn("keeping the last good certificate", "file", w.certFile, "error", err)
	}
}
