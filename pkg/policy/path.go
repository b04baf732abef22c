package policy

import (
	"errors"
	"fmt"
	"unicode/utf8"
)

// What is wrong with a path; each is made once, as a refusal must be cheap.
var (
	errNoSlash  = errors.New("the path does not begin with a slash")
	errLongPath = fmt.Errorf("the path is longer than %d bytes", MaxPath)
	errDots     = errors.New(`the path has a segment "." or ".."`)
	errEmpty    = errors.New("the path has an empty segment before its end")
	errRaw      = errors.New("the path has a character that must be percent-encoded")
	errAmbig    = errors.New(`the path has ";", "\\", "#", "?" or "%", as such or encoded`)
	errEscape   = errors.New("the path has a broken percent-encoding, or one in lower case")
	errNeedless = errors.New("the path has a percent-encoded character that needs none")
	errControl  = errors.New("the path has an encoded control character or slash")
	errUTF8     = errors.New("the path does not decode to UTF-8")
)

// CheckPath reports why a path is not canonical. A canonical path is the only way
// to write what it says: see [HTTP.Check]. It does not allocate.
func CheckPath(path string) error {
	switch {
	case path == "" || path[0] != '/':
		return errNoSlash
	case len(path) > MaxPath:
		return errLongPath
	}
	start, encoded := 1, false // of the segment; whether anything is encoded
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' {
			if plain(path[i]) {
				continue
			}
			n, err := checkChar(path[i:])
			if err != nil {
				return err
			}
			encoded = encoded || n > 1
			i += n - 1
			continue
		}
		switch seg := path[start:i]; {
		case seg == "." || seg == "..":
			return errDots
		case seg == "" && i < len(path):
			return errEmpty
		}
		start = i + 1
	}
	if encoded {
		return checkUTF8(path)
	}
	return nil
}

// checkChar judges the character that s begins with, and gives its length.
func checkChar(s string) (int, error) {
	c := s[0]
	switch {
	case plain(c):
		return 1, nil
	case c == ';' || c == '\\' || c == '#' || c == '?':
		return 0, errAmbig
	case c != '%':
		return 0, errRaw
	}
	d, ok := decode(s)
	switch {
	case !ok:
		return 0, errEscape
	case plain(d):
		return 0, errNeedless
	case d == ';' || d == '\\' || d == '#' || d == '?' || d == '%':
		return 0, errAmbig
	case d < ' ' || d == 0x7f || d == '/':
		return 0, errControl
	}
	return 3, nil
}

// plain reports whether c stands for itself in a path: the pchar of RFC 3986
// section 3.3, save for ";".
func plain(c byte) bool { return c < 0x80 && plainBytes[c>>6]>>(c&63)&1 != 0 }

// plainBytes has a bit for each byte below 0x80: '0' to '9' and !$&'()*+,-.:=, then
// letters and @_~.
var plainBytes = [2]uint64{0x27ff7fd2_00000000, 0x47fffffe_87ffffff}

// decode reads "%XX", in upper case.
func decode(s string) (byte, bool) {
	if len(s) < 3 {
		return 0, false
	}
	hi, ok1 := hex(s[1])
	lo, ok2 := hex(s[2])
	return hi<<4 | lo, ok1 && ok2
}

func hex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// checkUTF8 decodes a path whose encodings are good, rune by rune: overlong forms
// and surrogates are no UTF-8.
func checkUTF8(path string) error {
	var buf [utf8.UTFMax]byte
	n := 0 // bytes of an unfinished rune
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' {
			c, _ = decode(path[i:])
			i += 2
		}
		if n == len(buf) {
			return errUTF8
		}
		buf[n] = c
		n++
		if !utf8.FullRune(buf[:n]) {
			continue
		}
		if r, size := utf8.DecodeRune(buf[:n]); r == utf8.RuneError && size == 1 || size != n {
			return errUTF8
		}
		n = 0
	}
	if n > 0 {
		return errUTF8
	}
	return nil
}
