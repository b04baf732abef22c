package xds

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// The revocation list travels as it was signed: whoever receives it proves it, and
// may pass it on. Here it is opened only to see whose it is.

// revocationResource wraps a signed list, named by its trust domain's ID.
func revocationResource(envelope []byte) (*Resource, error) {
	var m sallyportv1.SignedRevocationList
	if err := proto.Unmarshal(envelope, &m); err != nil {
		return nil, fmt.Errorf("encoding revocation list: %w", err)
	}
	td, err := revokedDomain(&m)
	if err != nil {
		return nil, fmt.Errorf("encoding revocation list: %w", err)
	}
	sum := sha256.Sum256(envelope)
	return &Resource{
		Name: td.IDString(), Version: hex.EncodeToString(sum[:16]),
		Resource: &anypb.Any{TypeUrl: RevocationType, Value: envelope},
	}, nil
}

// formOfRevocations returns last where nothing changed, and beside an error.
func formOfRevocations(envelope []byte, last *Resource) (*Resource, error) {
	switch {
	case envelope == nil:
		return nil, nil
	case bytes.Equal(last.GetResource().GetValue(), envelope):
		return last, nil
	}
	r, err := revocationResource(envelope)
	if err != nil {
		return last, err
	}
	return r, nil
}

// revokedDomain reads whose list it says to be.
func revokedDomain(m *sallyportv1.SignedRevocationList) (spiffeid.TrustDomain, error) {
	var list sallyportv1.RevocationList
	if err := proto.Unmarshal(m.GetList(), &list); err != nil {
		return spiffeid.TrustDomain{}, err
	}
	return spiffeid.TrustDomainFromString(list.GetTrustDomain())
}

// parseRevocations takes the node's own trust domain's list, whole and unchecked.
func parseRevocations(node spiffeid.ID, m *sallyportv1.SignedRevocationList, envelope []byte) (name string, value any, err error) {
	td, err := revokedDomain(m)
	if err == nil && td != node.TrustDomain() {
		err = errors.New("it is another trust domain's list")
	}
	if err != nil {
		return "", nil, err
	}
	return td.IDString(), envelope, nil
}

func revocationsOf(node spiffeid.ID, lists map[string]any) []byte {
	envelope, _ := lists[node.TrustDomain().IDString()].([]byte)
	return envelope
}

// WaitRevocations waits until every connected node has acknowledged the newest
// revocation list, or until ctx is done, and returns those that have not: they
// refuse it, do not answer, or are too old to ask for it. As with
// [Server.WaitAcked], a stream that is no sidecar's is left out.
func (s *Server) WaitRevocations(ctx context.Context) (missing []NodeStatus) {
	owing := func() (out []NodeStatus) {
		for _, n := range s.Nodes() {
			if !n.Revocations && !s.late(n) {
				out = append(out, n)
			}
		}
		return out
	}
	s.wait(ctx, func() bool { return len(owing()) == 0 })
	return owing()
}

// revoked reports whether n has acknowledged p's list.
func (n NodeStatus) revoked(p *prepared) bool {
	return p.revocations == nil || n.revocations == p.revocations.Version
}
