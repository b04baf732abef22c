package attest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/sallyport-mesh/sallyport/internal/peercred"
)

// KindUnix names what an agent says of a process on its own host.
//
// It proves that the agent, which the Workload names under via, found a process
// with these properties at the other end of a local socket: user and groups when
// it connected, and executable, unit and container when it was looked up. It does
// not prove more than the agent's host is worth: root there can make the agent say
// anything, which is why no agent is believed that the Workload does not name. A
// path is what the process's own mount namespace calls its executable, so it says
// little without a hash where users can make namespaces; a script runs as its
// interpreter; and a process can become another program before it was looked up,
// the socket left to a relative, as well as after. Whoever may run a program can
// give it libraries and input of its own: path and hash tell programs of one user
// apart and belong beside a uid or a unit.
//
// Replay: there is nothing to replay. The selectors travel inside the agent's own
// mutual TLS session, are taken from nobody but the agent whose SVID opened it, and
// are asked for anew with each issue.
const KindUnix = "unix"

// Limits of what an agent may say of one process.
const (
	maxProcessValues = 256  // over all selectors
	maxProcessValue  = 4096 // bytes of one value: a path (PATH_MAX)
)

// ProcessSelectors are the selectors of a process, for its agent to send. What
// could not be read is absent.
func ProcessSelectors(p *peercred.Process) Selectors {
	s := Selectors{
		"uid": {strconv.FormatUint(uint64(p.UID), 10)},
		"gid": {strconv.FormatUint(uint64(p.GID), 10)},
	}
	for key, value := range map[string]string{
		"user": p.User, "path": p.Path, "sha256": p.SHA256, "unit": p.Unit, "container": p.Container, "cgroup": p.Cgroup,
	} {
		if value != "" && checkProcessValue(key, value) == nil {
			s[key] = []string{value}
		}
	}
	groups := slices.DeleteFunc(slices.Clone(p.GroupNames), func(g string) bool { return checkProcessValue("group", g) != nil })
	if len(groups) > 0 {
		s["group"] = groups[:min(len(groups), maxProcessValues/2)]
	}
	return s
}

// CheckProcess refuses selectors that no agent would send: unknown keys, several
// values where a process has one, values of the wrong form, more than 256 of them.
func CheckProcess(s Selectors) error {
	if len(s["uid"]) != 1 || len(s["gid"]) != 1 {
		return fmt.Errorf("%w: a process has one uid and one gid", ErrBadEvidence)
	}
	total := 0
	for key, values := range s {
		total += len(values)
		if len(values) == 0 || len(values) > 1 && key != "group" {
			return fmt.Errorf("%w: %d values of %.32q", ErrBadEvidence, len(values), key)
		}
		for _, v := range values {
			if err := checkProcessValue(key, v); err != nil {
				return fmt.Errorf("%w: %w", ErrBadEvidence, err)
			}
		}
	}
	if total > maxProcessValues {
		return fmt.Errorf("%w: %d values; at most %d", ErrBadEvidence, total, maxProcessValues)
	}
	return nil
}

func checkProcessValue(key, value string) error {
	if value == "" || len(value) > maxProcessValue || !utf8.ValidString(value) ||
		strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("%.32q is not 1 to %d bytes of printable UTF-8", key, maxProcessValue)
	}
	good := true
	switch key {
	case "uid", "gid":
		n, err := strconv.ParseUint(value, 10, 32)
		good = err == nil && strconv.FormatUint(n, 10) == value
	case "sha256", "container":
		good = len(value) == 64 && strings.Trim(value, "0123456789abcdef") == ""
	case "path", "cgroup":
		good = value[0] == '/'
	case "user", "group", "unit":
		good = !strings.Contains(value, "/")
	default:
		return fmt.Errorf("a process has no selector %.32q", key)
	}
	if !good {
		return fmt.Errorf("%s %.64q has the wrong form", key, value)
	}
	return nil
}
