package policy

import (
	"flag"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write what the stories give into testdata/stories")

var td = spiffeid.RequireTrustDomainFromString("shop.example")

// TestStories tells each story of testdata/stories: the files of a policy
// folder, and what comes of them. Sections besides files:
//
//	errors     what is refused, exactly as shown
//	decisions  lines SRC DST PORT [METHOD /PATH …]: what explain says on its first two lines
//	explain    the same lines, then the full explanation
//	reach      lines SRC: DST ...
//	tests      the output of the policy tests
//	proof      whether the invariants hold
//	diff       the difference from the files below before/
//
// A line "chop FILE" in the introduction takes away the last newline of FILE.
func TestStories(t *testing.T) {
	paths, err := filepath.Glob("testdata/stories/*.txtar")
	require.NoError(t, err)
	if len(paths) < 30 {
		t.Fatalf("found %d stories, want 30 or more", len(paths))
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(path)
			require.NoError(t, err)
			s := readStory(ar)
			checked := false
			for i, f := range ar.Files {
				got, ok := s.tell(t, f.Name, string(f.Data))
				if !ok {
					continue
				}
				checked = true
				if *update {
					ar.Files[i].Data = []byte(got)
				} else if got != string(f.Data) {
					t.Errorf("section %s:\ngot:\n%s\nwant:\n%s", f.Name, got, f.Data)
				}
			}
			if !checked {
				t.Error("the story has no section that says what comes of it")
			}
			if s.err != nil && !s.told["errors"] {
				t.Errorf("unexpected errors:\n%v", s.err)
			}
			if *update {
				require.NoError(t, os.WriteFile(path, txtar.Format(ar), 0o666))
			}
		})
	}
}

type story struct {
	sets []*Set
	rs   *Ruleset
	err  error
	old  *Ruleset
	told map[string]bool
}

func readStory(ar *txtar.Archive) *story {
	now, before := fstest.MapFS{}, fstest.MapFS{}
	for _, f := range ar.Files {
		data := string(f.Data)
		if strings.Contains(string(ar.Comment), "chop "+f.Name+"\n") {
			data = strings.TrimSuffix(data, "\n")
		}
		switch name, old := strings.CutPrefix(f.Name, "before/"); {
		case old:
			before[name] = &fstest.MapFile{Data: []byte(data)}
		case strings.Contains(f.Name, "."):
			now[f.Name] = &fstest.MapFile{Data: []byte(data)}
		}
	}
	s := &story{told: map[string]bool{}}
	s.sets, s.rs, s.err = load(now)
	if len(before) > 0 && s.err == nil {
		_, s.old, s.err = load(before)
	}
	return s
}

func load(fsys fs.FS) ([]*Set, *Ruleset, error) {
	sets, err := ParseTree(fsys)
	if err != nil {
		return nil, nil, err
	}
	rs, err := Compile(td, sets)
	return sets, rs, err
}

// tell gives what comes of the story; false for a section that is a file.
func (s *story) tell(t *testing.T, section, asked string) (string, bool) {
	if strings.Contains(section, ".") {
		return "", false
	}
	s.told[section] = true
	if section == "errors" {
		if s.err == nil {
			return "none\n", true
		}
		return s.err.Error() + "\n", true
	}
	if s.err != nil {
		t.Fatalf("unexpected errors:\n%v", s.err)
	}
	switch section {
	case "decisions", "explain":
		var b strings.Builder
		for line := range strings.Lines(asked) {
			if strings.HasPrefix(line, " ") {
				continue // an earlier answer
			}
			q, at := s.request(t, strings.Fields(line))
			full := s.rs.ExplainAt(q, at).String()
			answer := strings.SplitAfter(full, "\n")
			if section == "decisions" {
				b.WriteString(strings.TrimSpace(line) + "\n" + "    " + strings.TrimSpace(strings.SplitN(answer[0], ":", 2)[0]) + ": " + strings.TrimSpace(answer[1]) + "\n")
				continue
			}
			b.WriteString(strings.TrimSpace(line) + "\n")
			for _, a := range answer {
				if a != "" {
					b.WriteString("    " + a)
				}
			}
		}
		return b.String(), true
	case "reach":
		var b strings.Builder
		for line := range strings.Lines(asked) {
			src := strings.TrimSuffix(strings.Fields(line)[0], ":")
			fmt.Fprintf(&b, "%s:", src)
			for _, id := range s.rs.Reach(s.id(t, src)) {
				fmt.Fprintf(&b, " %s", s.rs.title(id.String()))
			}
			b.WriteString("\n")
		}
		return b.String(), true
	case "tests":
		return RunTests(s.rs, s.sets).String(), true
	case "proof":
		return Prove(s.rs, s.sets).String(), true
	case "diff":
		d := Compare(s.old, s.rs)
		return d.String() + fmt.Sprintf("only removes: %t\n", d.OnlyRemoves()), true
	}
	t.Fatalf("unknown section %q", section)
	return "", false
}

func (s *story) id(t *testing.T, ref string) spiffeid.ID {
	id, problem := refID(td, ref, s.rs.nameToID)
	if problem != "" {
		t.Fatal(problem)
	}
	return id
}

// request reads SRC DST PORT, then METHOD /PATH, HEADER=VALUE, host=HOST,
// ISSUER.CLAIM:VALUE and at=TIME, as far as they are there.
func (s *story) request(t *testing.T, f []string) (Request, time.Time) {
	require.GreaterOrEqual(t, len(f), 3, "want SRC DST PORT")
	q := Request{Dst: s.id(t, f[1])}
	if f[0] != "anonymous" {
		q.Src = s.id(t, f[0])
	}
	if n, err := strconv.ParseUint(f[2], 10, 16); err == nil {
		q.Port = uint16(n)
	} else {
		w, _ := s.rs.Destination(q.Dst)
		p, ok := w.PortByName(f[2])
		require.True(t, ok, "port %s of %s", f[2], f[1])
		q.Port = p.Number
	}
	var at time.Time
	if len(f) > 4 && strings.HasPrefix(f[4], "/") {
		q.HTTP = &HTTPRequest{Method: f[3], Path: f[4], Header: map[string][]string{}, Claims: map[string]map[string][]string{}}
		f = f[2:]
	}
	for _, word := range f[3:] {
		key, value, isHeader := strings.Cut(word, "=")
		switch {
		case key == "at":
			var err error
			at, err = time.Parse(time.RFC3339, value)
			require.NoError(t, err)
		case key == "host":
			q.HTTP.Host = value
		case isHeader:
			key = http.CanonicalHeaderKey(key)
			q.HTTP.Header[key] = append(q.HTTP.Header[key], value)
		default:
			claim, value, ok := strings.Cut(word, ":")
			issuer, claim, ok2 := strings.Cut(claim, ".")
			require.True(t, ok && ok2, "%q", word)
			q.HTTP.Claims[issuer] = map[string][]string{claim: {value}}
		}
	}
	return q, at
}
