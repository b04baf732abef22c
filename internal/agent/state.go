package agent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

const (
	stateFile    = "enrolment.json"
	stateVersion = 1
	maxStateFile = 4 << 20
)

// state is what an agent remembers: one file, 0600, replaced by rename, so that
// key, instance and bundles always belong together. SVID keys are not in it.
type state struct {
	enrolment
	pending pendingKey
	bundles identity.Bundles // nil before the first enrolment

	saved bool          // the file says this
	life  time.Duration // of the present SVID; not saved
}

// enrolment is the instance that this agent is.
type enrolment struct {
	ID       spiffeid.ID
	Instance string
	Token    string            // names the evidence that was redeemed for it: a join token's id, or a hash
	key      *ecdsa.PrivateKey // re-enrols this instance
}

// pendingKey is a key that evidence is about to register.
type pendingKey struct {
	Token string // names the evidence
	key   *ecdsa.PrivateKey
}

func (s state) enrolled() bool { return s.Instance != "" }

func (s state) equal(o state) bool {
	return s.enrolment == o.enrolment && s.pending == o.pending && sameBundles(s.bundles, o.bundles)
}

func sameBundles(a, b identity.Bundles) bool {
	return (a == nil) == (b == nil) && maps.EqualFunc(a, b, (*spiffebundle.Bundle).Equal)
}

// stateJSON is the file. Keys are PKCS#8, certificates DER.
type stateJSON struct {
	Version  int          `json:"version"`
	ID       string       `json:"spiffe_id,omitempty"`
	Instance string       `json:"instance,omitempty"`
	Token    string       `json:"token,omitempty"`
	Key      []byte       `json:"enrolment_key,omitempty"`
	Pending  *pendingJSON `json:"pending,omitempty"`
	// Bundles are SPIFFE bundles (SPIFFE Trust Domain and Bundle, 4).
	Bundles map[string]json.RawMessage `json:"trust_bundles,omitempty"` // :: trust domain → bundle
	// Roots is how an earlier version wrote them.
	Roots map[string][][]byte `json:"bundles,omitempty"` // :: trust domain → roots
}

type pendingJSON struct {
	Token string `json:"token"`
	Key   []byte `json:"enrolment_key"`
}

// Enrolled reports whether a state folder holds a completed enrolment, with which
// an agent starts without a join token. It does not say whether the control plane
// still accepts it.
func Enrolled(dir string) (bool, error) {
	s, err := loadState(dir)
	return s.enrolled(), err
}

// loadState reads the state folder; one that is empty or missing is no error.
func loadState(dir string) (state, error) {
	path := filepath.Join(dir, stateFile)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, nil
	}
	if err != nil {
		return state{}, fmt.Errorf("reading the enrolment: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return state{}, fmt.Errorf("reading the enrolment: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return state{}, fmt.Errorf("enrolment file %s has mode %04o and can be read by other users: run chmod 600 %[1]s", path, st.Mode().Perm())
	}
	if st.Size() > maxStateFile {
		return state{}, corrupt(path, fmt.Errorf("%d bytes", st.Size()))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return state{}, fmt.Errorf("reading the enrolment: %w", err)
	}
	s, err := decodeState(data)
	if err != nil {
		return state{}, corrupt(path, err)
	}
	return s, nil
}

func corrupt(path string, err error) error {
	return fmt.Errorf("enrolment file %s is corrupt (%w): delete it and start with a new join token", path, err)
}

func decodeState(data []byte) (state, error) {
	var j stateJSON
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&j); err != nil {
		return state{}, err
	}
	if j.Version != stateVersion {
		return state{}, fmt.Errorf("version %d, want %d", j.Version, stateVersion)
	}
	s := state{saved: true}
	var err error
	if j.Pending != nil {
		s.pending.Token = j.Pending.Token
		if s.pending.key, err = decodeKey(j.Pending.Key); err != nil {
			return state{}, err
		}
	}
	if j.Instance == "" {
		return s, nil
	}
	s.Instance, s.Token = j.Instance, j.Token
	if s.ID, err = spiffeid.FromString(j.ID); err != nil {
		return state{}, err
	}
	if s.key, err = decodeKey(j.Key); err != nil {
		return state{}, err
	}
	if s.bundles, err = decodeBundles(j); err != nil {
		return state{}, err
	}
	if b := s.bundles[s.ID.TrustDomain()]; b == nil || len(b.X509Authorities()) == 0 {
		return state{}, fmt.Errorf("no bundle of %s", s.ID.TrustDomain())
	}
	return s, nil
}

func decodeBundles(j stateJSON) (identity.Bundles, error) {
	out := make(identity.Bundles, len(j.Bundles)+len(j.Roots))
	for name, ders := range j.Roots {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, err
		}
		certs, err := parseCerts(ders)
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: %w", td, err)
		}
		out[td] = spiffebundle.FromX509Authorities(td, certs)
	}
	for name, data := range j.Bundles {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, err
		}
		if out[td], err = identity.ParseBundle(td, data); err != nil {
			return nil, fmt.Errorf("bundle of %s: %w", td, err)
		}
	}
	return out, nil
}

func decodeKey(der []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parsing the enrolment key: %w", err)
	}
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("enrolment key is a %T", key)
	}
	return k, nil
}

func (s state) encode() ([]byte, error) {
	j := stateJSON{Version: stateVersion}
	var err error
	if s.pending.key != nil {
		j.Pending = &pendingJSON{Token: s.pending.Token}
		if j.Pending.Key, err = x509.MarshalPKCS8PrivateKey(s.pending.key); err != nil {
			return nil, err
		}
	}
	if s.enrolled() {
		j.ID, j.Instance, j.Token = s.ID.String(), s.Instance, s.Token
		if j.Key, err = x509.MarshalPKCS8PrivateKey(s.key); err != nil {
			return nil, err
		}
		j.Bundles = make(map[string]json.RawMessage, len(s.bundles))
		for td, b := range s.bundles {
			if j.Bundles[td.Name()], err = b.Marshal(); err != nil {
				return nil, err
			}
		}
	}
	return json.MarshalIndent(j, "", "  ")
}

// store makes the state durable.
func (s state) store(dir string) error {
	data, err := s.encode()
	if err != nil {
		return fmt.Errorf("encoding the enrolment: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the state folder: %w", err)
	}
	if err := replaceFile(dir, stateFile, data); err != nil { // one writer: Agent.save
		return fmt.Errorf("saving the enrolment: %w", err)
	}
	return nil
}

// replaceFile replaces a file durably: when it returns, a crash does not undo it.
func replaceFile(dir, name string, data []byte) error {
	tmp := filepath.Join(dir, name+".new")
	if err := writeSynced(tmp, data); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// writeSynced makes the file anew, so that its mode is 0600 whatever was there.
func writeSynced(path string, data []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
