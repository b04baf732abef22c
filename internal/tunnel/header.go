package tunnel

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Header fields of a response that are ours.
const (
	headerDecisionID = "sallyport-decision-id"
	headerReason     = "sallyport-reason"
)

// encodeFields fills hdr; callers hold wmu.
func (s *Session) encodeFields(fields [][2]string) {
	for _, f := range fields {
		s.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
}

// readBlock collects a header block from the HEADERS frame fh and the CONTINUATION
// frames behind it. The framer sees to their order.
func (s *Session) readBlock(fh http2.FrameHeader) ([]byte, error) {
	if fh.Length < headersMin(fh.Flags) {
		return nil, &violation{code: http2.ErrCodeFrameSize, reason: "HEADERS frame too short"}
	}
	var block []byte
	for n := 1; ; n++ {
		f, err := s.fr.ReadFrameForHeader(fh)
		if err != nil {
			return nil, blockError(err)
		}
		part := f.(interface {
			HeaderBlockFragment() []byte
			HeadersEnded() bool
		})
		block = append(block, part.HeaderBlockFragment()...)
		if n > maxFragments || len(block) > MaxHeaderList {
			return nil, &violation{code: http2.ErrCodeEnhanceYourCalm, reason: "header block too large"}
		}
		if part.HeadersEnded() {
			return block, nil
		}
		if fh, err = s.fr.ReadFrameHeader(); err != nil {
			return nil, err
		}
	}
}

// headersMin is the size of what a HEADERS frame must hold for its flags.
func headersMin(f http2.Flags) (n uint32) {
	if f.Has(http2.FlagHeadersPadded) {
		n++
	}
	if f.Has(http2.FlagHeadersPriority) {
		n += 5
	}
	return n
}

// blockError makes an error about one stream one about the connection: a header
// block that is not decoded leaves the decoder in a wrong state.
func blockError(err error) error {
	if se := (http2.StreamError{}); errors.As(err, &se) {
		return &violation{code: se.Code, reason: "bad HEADERS frame"}
	}
	return err
}

// decode decompresses a header block, at most MaxHeaderList bytes as RFC 9113
// section 6.5.2 counts them.
func (s *Session) decode(block []byte) (fields []hpack.HeaderField, err error) {
	size := 0
	s.dec.SetMaxStringLength(MaxHeaderList)
	s.dec.SetEmitEnabled(true)
	s.dec.SetEmitFunc(func(f hpack.HeaderField) {
		if size += int(f.Size()); size > MaxHeaderList {
			s.dec.SetEmitEnabled(false)
			return
		}
		fields = append(fields, f)
	})
	_, err = s.dec.Write(block)
	if err == nil {
		err = s.dec.Close()
	}
	switch {
	case size > MaxHeaderList || errors.Is(err, hpack.ErrStringLength):
		return nil, &violation{code: http2.ErrCodeEnhanceYourCalm, reason: "header list too large"}
	case err != nil:
		return nil, &violation{code: http2.ErrCodeCompression, reason: err.Error()}
	}
	return fields, nil
}

// pseudo checks a field list by RFC 9113 sections 8.2 and 8.3 and returns its
// pseudo-header fields; only those named in known may be there.
func pseudo(fields []hpack.HeaderField, known string) (map[string]string, error) {
	found := map[string]string{} // :: name → value
	regular := false
	for _, f := range fields {
		if !httpguts.ValidHeaderFieldValue(f.Value) || strings.Trim(f.Value, " \t") != f.Value {
			return nil, errors.New("bad field value")
		}
		if !strings.HasPrefix(f.Name, ":") {
			regular = true
			if err := checkRegular(f); err != nil {
				return nil, err
			}
			continue
		}
		if _, twice := found[f.Name]; twice || regular || !strings.Contains(known, f.Name+" ") {
			return nil, fmt.Errorf("pseudo-header field %.20q is unknown, repeated or out of place", f.Name)
		}
		found[f.Name] = f.Value
	}
	return found, nil
}

func checkRegular(f hpack.HeaderField) error {
	if !httpguts.ValidHeaderFieldName(f.Name) || strings.ToLower(f.Name) != f.Name {
		return errors.New("bad field name")
	}
	switch f.Name { // RFC 9113 section 8.2.2
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return fmt.Errorf("field %s belongs to HTTP/1.1", f.Name)
	case "te":
		if f.Value != "trailers" {
			return errors.New("bad te field")
		}
	}
	return nil
}

// parseRequest reads a CONNECT request (RFC 9113 section 8.5): :method and
// :authority and no other pseudo-header field. Everything else is malformed here.
func parseRequest(fields []hpack.HeaderField) (Target, error) {
	found, err := pseudo(fields, ":method :authority ")
	if err != nil {
		return Target{}, err
	}
	if found[":method"] != "CONNECT" {
		return Target{}, fmt.Errorf("method %.20q: want CONNECT", found[":method"])
	}
	return ParseTarget(found[":authority"])
}

// response is what a server answered.
type response struct {
	status     int
	decisionID string
	reason     string
}

// parseResponse reads a response. A decision id that is not one is dropped.
func parseResponse(fields []hpack.HeaderField) (r response, err error) {
	found, err := pseudo(fields, ":status ")
	if err != nil {
		return r, err
	}
	status := found[":status"]
	r.status, err = strconv.Atoi(status)
	if err != nil || len(status) != 3 || r.status < 100 || r.status > 599 {
		return r, fmt.Errorf("bad status %.20q", status)
	}
	for _, f := range fields {
		switch f.Name {
		case headerDecisionID:
			if r.decisionID == "" && validDecisionID(f.Value) {
				r.decisionID = f.Value
			}
		case headerReason:
			if r.reason == "" {
				r.reason = sanitise(f.Value)
			}
		}
	}
	return r, nil
}

func validDecisionID(id string) bool {
	if id == "" || len(id) > MaxDecisionID {
		return false
	}
	for i := range len(id) {
		if id[i] != '.' && strings.IndexByte(labelChars, id[i]) < 0 {
			return false
		}
	}
	return true
}

// sanitise makes a reason fit for a header field and for a terminal: printable
// characters and single spaces, at most MaxReason bytes of UTF-8.
func sanitise(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			r = ' '
		}
		if b.Len()+utf8.RuneLen(r) > MaxReason {
			break
		}
		b.WriteRune(r)
	}
	return strings.TrimSpace(b.String())
}
