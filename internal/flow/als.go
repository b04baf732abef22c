package flow

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"

	alsdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Custom tags of an access-log entry that Envoy has no field for.
const (
	tagSide     = "sallyport.side"
	tagPort     = "sallyport.port"
	tagPortName = "sallyport.port_name"
	tagVerdict  = "sallyport.verdict"
	tagWould    = "sallyport.would"
	tagRule     = "sallyport.rule"
	tagLocation = "sallyport.location"
	tagReason   = "sallyport.reason"
	tagAudited  = "sallyport.audited"
	tagAuditAt  = "sallyport.audited_location"
	tagOutcome  = "sallyport.outcome"
	tagError    = "sallyport.error"
	tagRevision = "sallyport.revision"
	tagInstance = "sallyport.instance"
)

// ToALS gives f as an Envoy v3 TCP access-log entry: identities as URI SANs of
// the TLS properties (the reporter's side is local), the id as stream id, bytes
// as connection properties, everything else as custom tags. The Reporter is not
// carried: who reports is proved by the connection.
func ToALS(f Flow) *alsdata.TCPAccessLogEntry {
	local, peer := f.Src, f.Dst
	if f.Side == Inbound {
		local, peer = f.Dst, f.Src
	}
	w := wireOf(f)
	tags := map[string]string{
		tagSide: string(w.Side), tagPort: strconv.Itoa(int(w.Port)),
		tagVerdict: w.Verdict, tagWould: w.Would, tagOutcome: string(w.Outcome),
	}
	for k, v := range map[string]string{
		tagPortName: w.PortName, tagRule: w.Rule, tagLocation: w.Location,
		tagAudited: w.Audited, tagAuditAt: w.AuditedAt, tagReason: w.Reason, tagError: w.Error, tagRevision: w.Revision, tagInstance: w.Instance,
	} {
		if v != "" {
			tags[k] = v
		}
	}
	return &alsdata.TCPAccessLogEntry{
		CommonProperties: &alsdata.AccessLogCommon{
			TlsProperties: &alsdata.TLSProperties{
				TlsVersion:                 alsdata.TLSProperties_TLSv1_3,
				LocalCertificateProperties: sanOf(local),
				PeerCertificateProperties:  sanOf(peer),
			},
			StartTime:  timestamppb.New(f.Start),
			Duration:   durationpb.New(max(f.Duration, 0)),
			StreamId:   w.ID,
			CustomTags: tags,
		},
		ConnectionProperties: &alsdata.ConnectionProperties{
			ReceivedBytes: uint64(max(f.Sent, 0)),
			SentBytes:     uint64(max(f.Received, 0)),
		},
	}
}

// FromALS is the inverse of [ToALS]. It refuses an entry whose texts are too
// long or would not be fit for a terminal, and one that claims no side.
func FromALS(e *alsdata.TCPAccessLogEntry) (Flow, error) {
	c := e.GetCommonProperties()
	tags := c.GetCustomTags()
	w := wire{
		ID: c.GetStreamId(), Side: Side(tags[tagSide]), PortName: tags[tagPortName],
		Verdict: tags[tagVerdict], Would: tags[tagWould], Rule: tags[tagRule],
		Location: tags[tagLocation], Reason: tags[tagReason], Audited: tags[tagAudited], AuditedAt: tags[tagAuditAt], Outcome: Outcome(tags[tagOutcome]),
		Error: tags[tagError], Revision: tags[tagRevision], Instance: tags[tagInstance],
	}
	local := uriOf(c.GetTlsProperties().GetLocalCertificateProperties())
	peer := uriOf(c.GetTlsProperties().GetPeerCertificateProperties())
	switch w.Side {
	case Inbound:
		w.Dst, w.Src = local, peer
	case Outbound:
		w.Src, w.Dst = local, peer
	default:
		return Flow{}, fmt.Errorf("access-log entry: side %q", quote(string(w.Side)))
	}
	if err := w.setNumbers(e); err != nil {
		return Flow{}, fmt.Errorf("access-log entry: %w", err)
	}
	f, err := w.flow()
	if err != nil {
		return Flow{}, fmt.Errorf("access-log entry: %w", err)
	}
	return f, nil
}

// setNumbers takes everything from e that is not a text.
func (w *wire) setNumbers(e *alsdata.TCPAccessLogEntry) error {
	c, n := e.GetCommonProperties(), e.GetConnectionProperties()
	if !ValidID(w.ID) {
		return fmt.Errorf("decision id %q: want 16 hex digits", quote(w.ID))
	}
	if !validOutcome(w.Outcome) {
		return fmt.Errorf("outcome %q", quote(string(w.Outcome)))
	}
	tag := c.GetCustomTags()[tagPort]
	port, err := strconv.ParseUint(tag, 10, 16)
	if err != nil {
		return fmt.Errorf("port %q: not a number up to 65535", quote(tag))
	}
	if err := c.GetStartTime().CheckValid(); err != nil {
		return fmt.Errorf("start time: %w", err)
	}
	if d := c.GetDuration(); d != nil && (d.CheckValid() != nil || d.GetSeconds() < 0 || d.GetNanos() < 0) {
		return fmt.Errorf("duration %v", d)
	}
	if n.GetReceivedBytes() > math.MaxInt64 || n.GetSentBytes() > math.MaxInt64 {
		return fmt.Errorf("byte count out of range")
	}
	w.Port, w.Time = uint16(port), c.GetStartTime().AsTime()
	w.Sent, w.Received = int64(n.GetReceivedBytes()), int64(n.GetSentBytes())
	w.DurationMS = json.Number(formatMillis(c.GetDuration().AsDuration()))
	return nil
}

func validOutcome(o Outcome) bool {
	switch o {
	case Closed, Refused, Cut, Failed, Drained:
		return true
	}
	return false
}

// ValidID reports whether s is a decision id: 16 lower-case hex digits.
func ValidID(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == 16
}

func sanOf(id spiffeid.ID) *alsdata.TLSProperties_CertificateProperties {
	if id.IsZero() {
		return nil
	}
	return &alsdata.TLSProperties_CertificateProperties{
		SubjectAltName: []*alsdata.TLSProperties_CertificateProperties_SubjectAltName{{
			San: &alsdata.TLSProperties_CertificateProperties_SubjectAltName_Uri{Uri: id.String()},
		}},
	}
}

func uriOf(p *alsdata.TLSProperties_CertificateProperties) string {
	if sans := p.GetSubjectAltName(); len(sans) == 1 {
		return sans[0].GetUri()
	}
	return ""
}
