package tunnel

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Target is where a stream goes: what a request's :authority says.
type Target struct {
	Host string // mesh name, or IP address without brackets
	Port uint16 // declared port, never 0
}

// String gives the :authority form: host:port, an IPv6 address in brackets.
func (t Target) String() string {
	port := strconv.Itoa(int(t.Port))
	if strings.Contains(t.Host, ":") {
		return "[" + t.Host + "]:" + port
	}
	return t.Host + ":" + port
}

// ParseTarget reads an :authority. It accepts only what String gives: a name of
// ASCII letters, digits, '-', '_' and single dots, or an IP address (without
// zone), then a port from 1 to 65535 without leading zeros. User info, a missing
// port and anything percent-encoded are errors; letter case is kept.
func ParseTarget(s string) (Target, error) {
	if len(s) > MaxHost+len(":65535") {
		return Target{}, fmt.Errorf("authority of %d bytes: too long", len(s))
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return Target{}, fmt.Errorf("authority %q: no port", s)
	}
	port, err := parsePort(s[i+1:])
	if err != nil {
		return Target{}, fmt.Errorf("authority %q: %w", s, err)
	}
	t := Target{Host: s[:i], Port: port}
	if h, ok := strings.CutPrefix(t.Host, "["); ok {
		t.Host, ok = strings.CutSuffix(h, "]")
		if !ok || !strings.Contains(t.Host, ":") {
			return Target{}, fmt.Errorf("authority %q: bad brackets", s)
		}
	} else if strings.Contains(t.Host, ":") {
		return Target{}, fmt.Errorf("authority %q: IPv6 address without brackets", s)
	}
	if !validHost(t.Host) {
		return Target{}, fmt.Errorf("authority %q: bad host", s)
	}
	return t, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '0' || s[0] == '+' {
		return 0, fmt.Errorf("bad port %q", s)
	}
	return uint16(n), nil
}

// validHost tells a name or an address from everything that another parser might
// read differently.
func validHost(h string) bool {
	if strings.Contains(h, ":") {
		a, err := netip.ParseAddr(h)
		return err == nil && a.Zone() == "" && a.String() == h
	}
	if h == "" || len(h) > MaxHost {
		return false
	}
	last := ""
	for label := range strings.SplitSeq(h, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, labelChars) != "" {
			return false
		}
		for i := range len(label) {
			if strings.IndexByte(labelChars, label[i]) < 0 {
				return false
			}
		}
		last = label
	}
	if c := last[0]; c >= '0' && c <= '9' { // 10.0.0.1, but not 127.1 or 0x7f.1
		a, err := netip.ParseAddr(h)
		return err == nil && a.Is4()
	}
	return true
}

const labelChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
