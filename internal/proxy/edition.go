package proxy

import (
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/revocation"
)

// Kinds of messages between sidecars, docs/tunnel.md.
const (
	haveList uint8 = iota
	wantList
	theList
)

const (
	maxHave = 512         // bytes of haveList and wantList
	fresher = time.Minute // by which the same list must be younger to be worth fetching
)

// edition says which revocation list it is and when it was signed. The zero edition
// is no list.
type edition struct {
	version revocation.Version
	issued  time.Time
}

func editionOf(l *revocation.List) edition {
	if l == nil {
		return edition{}
	}
	return edition{l.Version(), l.Issued()}
}

// less reports whether e is older than o.
func (e edition) less(o edition) bool {
	return e.version.Less(o.version) || e.version == o.version && e.issued.Before(o.issued)
}

// worth reports whether e should be fetched by who has held.
func (e edition) worth(held edition) bool {
	return held.version.Less(e.version) || held.version == e.version && e.issued.Sub(held.issued) > fresher
}

// encode gives the list's head, nil for no list.
func (e edition) encode(td spiffeid.TrustDomain) []byte {
	if e == (edition{}) {
		return nil
	}
	b, err := proto.Marshal(&sallyportv1.RevocationList{
		TrustDomain: td.Name(), Epoch: e.version.Epoch, Number: e.version.Number, Issued: timestamppb.New(e.issued),
	})
	if err != nil {
		return nil // a trust domain's name is always text
	}
	return b
}

// decodeEdition reads what a neighbour of td claims to have.
func decodeEdition(b []byte, td spiffeid.TrustDomain) (edition, error) {
	var m sallyportv1.RevocationList
	if err := proto.Unmarshal(b, &m); err != nil {
		return edition{}, err
	}
	if m.GetTrustDomain() != td.Name() || m.GetEpoch() < 0 || m.GetNumber() < 0 || !m.GetIssued().IsValid() {
		return edition{}, errors.New("not the head of a list of " + td.Name())
	}
	return edition{revocation.Version{Epoch: m.GetEpoch(), Number: m.GetNumber()}, m.GetIssued().AsTime()}, nil
}
