package flow

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// wire is the JSON form, one field per key of docs/flows.md.
type wire struct {
	Time       time.Time   `json:"time"`
	ID         string      `json:"id"`
	Side       Side        `json:"side"`
	Src        string      `json:"src"`
	Dst        string      `json:"dst"`
	Port       uint16      `json:"port"`
	PortName   string      `json:"port_name,omitempty"`
	Verdict    string      `json:"verdict"`
	Would      string      `json:"would"`
	Rule       string      `json:"rule,omitempty"`
	Location   string      `json:"location,omitempty"`
	Reason     string      `json:"reason,omitempty"`
	Audited    string      `json:"audited,omitempty"`
	AuditedAt  string      `json:"audited_location,omitempty"`
	Outcome    Outcome     `json:"outcome"`
	Error      string      `json:"error,omitempty"`
	Revision   string      `json:"revision,omitempty"`
	Reporter   string      `json:"reporter,omitempty"`
	Instance   string      `json:"instance,omitempty"`
	Sent       int64       `json:"sent"`
	Received   int64       `json:"received"`
	DurationMS json.Number `json:"duration_ms"`
}

// wireOf is the inverse of [wire.flow]. It makes every text fit for a record.
func wireOf(f Flow) wire {
	w := wire{
		Time: f.Start.UTC(), ID: f.ID, Side: f.Side,
		Src: f.Src.String(), Dst: f.Dst.String(), Port: f.Port, PortName: f.PortName,
		Verdict: f.Verdict(), Would: f.Would.String(),
		Rule: ruleName(f.Rule), Location: f.Rule.Location(), Reason: f.Reason,
		Audited: ruleName(f.Audited), AuditedAt: f.Audited.Location(),
		Outcome: f.Outcome, Error: f.Error, Revision: f.Revision,
		Reporter: f.Reporter, Instance: f.Instance,
		Sent: f.Sent, Received: f.Received, DurationMS: json.Number(formatMillis(f.Duration)),
	}
	for _, t := range w.texts() {
		*t.text = clean(*t.text, t.limit)
	}
	return w
}

// bounded is a text of a record and its limit in bytes.
type bounded struct {
	key   string
	text  *string
	limit int
}

// texts are the fields of w that are taken as they come: nothing else checks
// how long they are and what characters they hold.
func (w *wire) texts() []bounded {
	return []bounded{
		{"id", &w.ID, maxToken}, {"side", (*string)(&w.Side), maxToken}, {"outcome", (*string)(&w.Outcome), maxToken},
		{"port_name", &w.PortName, maxName}, {"rule", &w.Rule, maxName}, {"location", &w.Location, maxLocation},
		{"audited", &w.Audited, maxName}, {"audited_location", &w.AuditedAt, maxLocation},
		{"reason", &w.Reason, MaxText}, {"error", &w.Error, MaxText},
		{"revision", &w.Revision, maxToken}, {"instance", &w.Instance, maxToken},
		{"reporter", &w.Reporter, identity.MaxIDLength},
	}
}

// MarshalJSON gives the form that docs/flows.md describes.
func (f Flow) MarshalJSON() ([]byte, error) { return json.Marshal(wireOf(f)) }

// UnmarshalJSON reads what MarshalJSON wrote. Unknown keys are ignored, so that
// a newer sidecar's records stay readable; an unknown verdict is an error and a
// missing one denies. A text that is too long or not printable is an error too.
func (f *Flow) UnmarshalJSON(data []byte) error {
	var w wire
	if err := json.Unmarshal(data, &w); err != nil {
		return fmt.Errorf("reading flow record: %s", Text(err.Error())) // which quotes what was read
	}
	g, err := w.flow()
	if err != nil {
		return fmt.Errorf("reading flow record: %w", err)
	}
	*f = g
	return nil
}

func (w wire) flow() (Flow, error) {
	for _, t := range w.texts() {
		if !isClean(*t.text, t.limit) {
			return Flow{}, fmt.Errorf("%s %q: longer than %d bytes or not printable", t.key, quote(*t.text), t.limit)
		}
	}
	f := Flow{
		ID: w.ID, Start: w.Time.UTC(), Side: w.Side, Outcome: w.Outcome, Error: w.Error,
		PortName: w.PortName, Reporter: w.Reporter, Instance: w.Instance,
		Revision: w.Revision, Sent: w.Sent, Received: w.Received,
	}
	f.Port, f.Reason = w.Port, w.Reason
	var err error
	if f.Src, err = parseID(w.Src); err != nil {
		return Flow{}, err
	}
	if f.Dst, err = parseID(w.Dst); err != nil {
		return Flow{}, err
	}
	if f.Effect, err = parseEffect(w.Verdict); err != nil {
		return Flow{}, err
	}
	if f.Would, err = parseEffect(w.Would); err != nil {
		return Flow{}, err
	}
	if f.Rule, err = parseRule(w.Rule, w.Location); err != nil {
		return Flow{}, err
	}
	if f.Audited, err = parseRule(w.Audited, w.AuditedAt); err != nil {
		return Flow{}, err
	}
	if f.Duration, err = parseMillis(string(w.DurationMS)); err != nil {
		return Flow{}, err
	}
	if w.Sent < 0 || w.Received < 0 {
		return Flow{}, fmt.Errorf("negative byte count")
	}
	if y := f.Start.Year(); y < 0 || y > 9999 {
		return Flow{}, fmt.Errorf("time %s: year out of range", w.Time)
	}
	return f, nil
}

// parseID reads a SPIFFE ID; "" is the zero ID, a peer without a name.
func parseID(s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, nil
	}
	if len(s) > identity.MaxIDLength {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q: longer than %d bytes", quote(s), identity.MaxIDLength)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q: %w", quote(s), err)
	}
	return id, nil
}

func parseEffect(s string) (policy.Effect, error) {
	switch s {
	case "allow":
		return policy.Allow, nil
	case "deny", none, "":
		return policy.Deny, nil
	}
	return policy.Deny, fmt.Errorf("verdict %q: want allow, deny or none", quote(s))
}

// ruleName gives SET/POLICY, or POLICY in the root set, or "" for no rule.
func ruleName(r policy.RuleRef) string {
	if r.Set == "" {
		return r.Policy
	}
	return r.Set + "/" + r.Policy
}

// parseRule reads what ruleName and RuleRef.Location wrote.
func parseRule(name, location string) (policy.RuleRef, error) {
	var r policy.RuleRef
	r.Policy = name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		r.Set, r.Policy = name[:i], name[i+1:]
	}
	if location == "" {
		return r, nil
	}
	i := strings.LastIndexByte(location, ':')
	if i < 0 {
		return r, fmt.Errorf("location %q: want FILE:LINE", quote(location))
	}
	line, err := strconv.ParseUint(location[i+1:], 10, 31)
	if err != nil {
		return r, fmt.Errorf("location %q: want FILE:LINE", quote(location))
	}
	r.File, r.Line = location[:i], int(line)
	return r, nil
}

// formatMillis gives d in milliseconds, exact to the nanosecond; a negative d
// is a clock that was set back and gives 0.
func formatMillis(d time.Duration) string {
	if d <= 0 {
		return "0"
	}
	whole, rest := d/time.Millisecond, d%time.Millisecond
	if rest == 0 {
		return strconv.FormatInt(int64(whole), 10)
	}
	return strings.TrimRight(fmt.Sprintf("%d.%06d", whole, rest), "0")
}

// parseMillis reads what formatMillis wrote; "" is 0. Parts of a nanosecond are
// cut off, an exponent is refused.
func parseMillis(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	whole, rest, _ := strings.Cut(s, ".")
	w, err := strconv.ParseUint(whole, 10, 63)
	if err != nil || w > math.MaxInt64/uint64(time.Millisecond)-1 {
		return 0, fmt.Errorf("duration_ms %q: out of range", quote(s))
	}
	r, err := strconv.ParseUint((rest + "000000")[:6], 10, 32)
	if err != nil {
		return 0, fmt.Errorf("duration_ms %q: not a plain decimal number", quote(s))
	}
	for _, c := range rest {
		if c < '0' || c > '9' {
			return 0, fmt.Errorf("duration_ms %q: not a plain decimal number", quote(s))
		}
	}
	return time.Duration(w)*time.Millisecond + time.Duration(r), nil
}
