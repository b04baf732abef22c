package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// applyPatch is `patch -p1` for one file, and stricter: every line must be where it
// is said to be. nil is a deleted file.
func applyPatch(src, diff string) ([]byte, error) {
	old := strings.SplitAfter(strings.TrimSuffix(src, "\n"), "\n")
	old[len(old)-1] += "\n"
	lines := strings.SplitAfter(strings.TrimSuffix(diff, "\n"), "\n")
	if len(lines) < 3 || !strings.HasPrefix(lines[0], "--- a/") {
		return nil, fmt.Errorf("no header: %q", diff)
	}
	lines[len(lines)-1] += "\n"
	var out []string
	at := 0
	header := regexp.MustCompile(`^@@ -(\d+),(\d+) \+(\d+),(\d+) @@\n$`)
	var olds, news int // what the hunk has still to give
	for _, l := range lines[2:] {
		if m := header.FindStringSubmatch(l); m != nil {
			if olds != 0 || news != 0 {
				return nil, fmt.Errorf("a hunk is too short by %d and %d", olds, news)
			}
			n := make([]int, 5)
			for i := 1; i < 5; i++ {
				n[i], _ = strconv.Atoi(m[i])
			}
			start, newStart := n[1]-1, n[3]-1
			if n[4] == 0 {
				newStart++
			}
			olds, news = n[2], n[4]
			if start < at {
				return nil, fmt.Errorf("hunk %q is out of order", l)
			}
			out = append(out, old[at:start]...)
			if at = start; newStart != len(out) {
				return nil, fmt.Errorf("hunk %q begins at line %d of the new file", l, len(out)+1)
			}
			continue
		}
		if l[0] != '+' {
			if at >= len(old) || old[at] != l[1:] {
				return nil, fmt.Errorf("line %d is not %q", at+1, l)
			}
			at, olds = at+1, olds-1
		}
		if l[0] != '-' {
			out, news = append(out, l[1:]), news-1
		}
	}
	if olds != 0 || news != 0 {
		return nil, fmt.Errorf("the last hunk is too short by %d and %d", olds, news)
	}
	out = append(out, old[at:]...)
	if strings.HasPrefix(lines[1], "+++ /dev/null") {
		if len(out) > 0 {
			return nil, fmt.Errorf("deleted with %d lines", len(out))
		}
		return nil, nil
	}
	return []byte(strings.Join(out, "")), nil
}

// genText is a rule of a random file, in one of the ways to write it.
type genText struct {
	name string // of the source, unlike all others
	goes bool
	text string // without the dash
}

// genFile draws a file of policies, each written in one of many ways, and says
// which rules go. Comments carry the name of the rule, or of the policy, that they
// belong to.
func genFile(t *rapid.T) (src string, goes map[string]bool) {
	goes = map[string]bool{}
	bit := func(what string) bool { return rapid.Bool().Draw(t, what) }
	var b strings.Builder
	b.WriteString(rapid.SampledFrom([]string{"", "# the file's\n\n", "---\n", "# the file's\n---\n"}).Draw(t, "top"))
	b.WriteString("apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: w}\nspec: {ports: [{name: http, port: 80, protocol: http}]}\n")
	n := 0
	for p := range rapid.IntRange(1, 3).Draw(t, "policies") {
		fmt.Fprintf(&b, "---\n# keep-if policy%d\napiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: policy%d}\n", p, p)
		var rules []genText
		for range rapid.IntRange(1, 4).Draw(t, "rules") {
			n++
			r := genText{name: fmt.Sprintf("rule%d", n), goes: bit("goes")}
			goes[r.name] = r.goes
			r.text = rapid.SampledFrom([]string{
				"{from: [{id: /%s}], ports: [http]}", "{from: [{id: \"/%s\"}], ports: [all], reason: 'it''s } here'}", "{from: [{id: /%s}], ports: [80], reason: \"a \\\" # ]\"}", "{from: [{id: /%s}], ports: [80], reason: rock 'n roll}",
			}).Draw(t, "text")
			r.text = fmt.Sprintf(r.text, r.name)
			rules = append(rules, r)
		}
		deny := bit("deny")
		switch style := rapid.IntRange(0, 4).Draw(t, "style"); style {
		case 0, 1: // dashes
			b.WriteString("spec:\n")
			if bit("deny first") && deny {
				b.WriteString("  deny:\n    - {from: [{id: /bad}], ports: [all]} # keep-if deny\n")
				deny = false
			}
			b.WriteString("  to: {workload: w}\n  allow:\n")
			indent := strings.Repeat(" ", 2+2*style)
			for _, r := range rules {
				if bit("blank") {
					b.WriteString("\n")
				}
				if bit("comment") {
					fmt.Fprintf(&b, "%s# keep-if %s\n", indent, r.name)
				}
				switch rapid.IntRange(0, 3).Draw(t, "form") {
				case 0:
					fmt.Fprintf(&b, "%s- %s # keep-if %s\n", indent, r.text, r.name)
				case 1:
					fmt.Fprintf(&b, "%s- from:\n%s  - id: /%s\n%s  ports: [http]\n%s  # keep-if %s\n", indent, indent, r.name, indent, indent, r.name)
				case 2:
					fmt.Fprintf(&b, "%s-\n%s  from: [{id: /%s}]\n\n%s  ports:\n%s    - http\n%s  reason: >-\n%s    keep-if %s\n%s    and more\n", indent, indent, r.name, indent, indent, indent, indent, r.name, indent)
				default:
					fmt.Fprintf(&b, "%s- %s\n", indent, strings.ReplaceAll(r.text, ", ports", ",\n"+indent+"    ports"))
				}
			}
			if deny {
				b.WriteString("  # keep-if deny\n  deny:\n    - {from: [{id: /bad}], ports: [all]}\n")
			}
		case 2, 3: // brackets on one line, in a mapping of either kind
			var items []string
			for _, r := range rules {
				items = append(items, r.text)
			}
			list := "[" + strings.Join(items, rapid.SampledFrom([]string{", ", ","}).Draw(t, "comma")) + rapid.SampledFrom([]string{"", ",", " "}).Draw(t, "end") + "]"
			for _, r := range rules { // rules of one line and policy are one to a RuleRef
				goes[r.name] = rules[0].goes
			}
			switch {
			case style == 2 && deny:
				fmt.Fprintf(&b, "spec: {to: {workload: w}, allow: %s, deny: [{from: [{id: /bad}], ports: [all]}]}\n", list)
			case style == 2:
				fmt.Fprintf(&b, "spec: {to: {workload: w}, allow: %s}\n", list)
			case deny:
				fmt.Fprintf(&b, "spec:\n  to: {workload: w}\n  allow: %s\n  deny: [{from: [{id: /bad}], ports: [all]}]\n", list)
			default:
				fmt.Fprintf(&b, "spec:\n  to: {workload: w}\n  allow: %s\n", list)
			}
		default: // brackets over several lines
			b.WriteString("spec:\n  to: {workload: w}\n  allow: [\n")
			for i, r := range rules {
				if bit("comment") {
					fmt.Fprintf(&b, "    # keep-if %s\n", r.name)
				}
				comma := ","
				if i == len(rules)-1 && bit("no comma") {
					comma = ""
				}
				fmt.Fprintf(&b, "    %s%s # keep-if %s\n", r.text, comma, r.name)
			}
			b.WriteString("  ]\n")
			if deny {
				b.WriteString("  deny: [{from: [{id: /bad}], ports: [all]}]\n")
			}
		}
	}
	return b.String(), goes
}

// TestRemovalPatch takes random rules out of files that are written in many ways:
// what is left are the other rules, and every comment but theirs.
func TestRemovalPatch(t *testing.T) {
	check(t, func(t *rapid.T) {
		src, goes := genFile(t)
		set, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(src)})
		if err != nil {
			t.Fatalf("%v in\n%s", err, src)
		}
		var refs []RuleRef
		kept := map[string]bool{} // :: policies that stay
		for i, p := range set.Policies {
			left := p.Allow[:0:0]
			for _, e := range p.Allow {
				if name := strings.TrimPrefix(e.From[0].ID, "/"); goes[name] {
					refs = append(refs, RuleRef{Policy: p.Name, File: "a.yaml", Line: e.line})
				} else {
					left = append(left, e)
				}
			}
			set.Policies[i].Allow = left
			kept[p.Name] = len(left)+len(p.Deny) > 0
			goes[p.Name] = !kept[p.Name]
		}
		set.Policies = slices.DeleteFunc(set.Policies, func(p Policy) bool { return !kept[p.Name] })
		patch, err := RemovalPatch([]*Set{set}, refs, "dir/")
		if err != nil {
			t.Fatalf("%v in\n%s", err, src)
		}
		if len(refs) == 0 {
			if len(patch) > 0 {
				t.Fatalf("a patch for nothing: %s", patch)
			}
			return
		}
		got, err := applyPatch(src, string(patch))
		if err != nil {
			t.Fatalf("%v: the patch\n%s\nof\n%s", err, patch, src)
		}
		after, err := ParseFiles("", map[string][]byte{"a.yaml": got})
		if err != nil {
			t.Fatalf("%v in\n%s\nafter\n%s", err, got, patch)
		}
		text := func(s *Set) (out []string) {
			for _, p := range s.Policies {
				out = append(out, p.Name, p.To.key())
				for _, e := range append(slices.Clone(p.Allow), p.Deny...) {
					out = append(out, e.From[0].key(), fmt.Sprint(e.Ports[0]), e.Reason)
				}
			}
			return append(out, fmt.Sprint(len(s.Workloads)))
		}
		if g, w := text(after), text(set); !slices.Equal(g, w) {
			t.Fatalf("got %v, want %v, after\n%s", g, w, patch)
		}
		want := strings.FieldsFunc(src, func(r rune) bool { return r == '\n' })
		for _, line := range want {
			_, owner, comment := strings.Cut(line, "# keep-if ")
			if comment && strings.Contains(string(got), line+"\n") == goes[owner] {
				t.Fatalf("the comment %q of %s, which goes: %v, in\n%s\nafter\n%s", line, owner, goes[owner], got, src)
			}
			if strings.Contains(line, "# the file's") && !strings.Contains(string(got), line) {
				t.Fatalf("the file's comment is gone in\n%s", got)
			}
		}
	})
}

// A file that holds nothing else is deleted, of sets each by itself, and names with
// blanks are named in full.
func TestRemovalPatchOfFiles(t *testing.T) {
	const one = "apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: %s}\nspec: {to: {id: /x/*}, allow: [{from: [{id: /y}], ports: [80]}]}\n"
	root, err := ParseFiles("", map[string][]byte{"all of it.yaml": fmt.Appendf(nil, one, "a"), "comment.yaml": fmt.Appendf(nil, "# stays\n\n# goes\n"+one, "b")})
	require.NoError(t, err)
	team, err := ParseFiles("team", map[string][]byte{"b.yaml": fmt.Appendf(nil, one+"---\n"+one, "c", "d")})
	require.NoError(t, err)
	patch, err := RemovalPatch([]*Set{root, team}, []RuleRef{
		{Policy: "a", File: "all of it.yaml", Line: 4}, {Policy: "b", File: "comment.yaml", Line: 7}, {Set: "team", Policy: "c", File: "team/b.yaml", Line: 4},
	}, "policy/")
	require.NoError(t, err)
	want := `--- a/policy/all of it.yaml	
+++ /dev/null
@@ -1,4 +0,0 @@
-apiVersion: sallyport.dev/v1
-kind: Policy
-metadata: {name: a}
-spec: {to: {id: /x/*}, allow: [{from: [{id: /y}], ports: [80]}]}
--- a/policy/comment.yaml
+++ b/policy/comment.yaml
@@ -1,7 +1,2 @@
 # stays
 
-# goes
-apiVersion: sallyport.dev/v1
-kind: Policy
-metadata: {name: b}
-spec: {to: {id: /x/*}, allow: [{from: [{id: /y}], ports: [80]}]}
--- a/policy/team/b.yaml
+++ b/policy/team/b.yaml
@@ -1,8 +1,3 @@
-apiVersion: sallyport.dev/v1
-kind: Policy
-metadata: {name: c}
-spec: {to: {id: /x/*}, allow: [{from: [{id: /y}], ports: [80]}]}
----
 apiVersion: sallyport.dev/v1
 kind: Policy
 metadata: {name: d}
`
	if got := string(patch); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if _, err := RemovalPatch([]*Set{root}, []RuleRef{{Policy: "a", File: "gone.yaml", Line: 4}}, ""); err == nil {
		t.Error("a file that no set has")
	}
	if _, err := RemovalPatch([]*Set{root}, []RuleRef{{Policy: "a", File: "all of it.yaml", Line: 5}}, ""); err == nil {
		t.Error("a rule that the file does not have")
	}
}

// Whatever is cut, what is left is compared with what was meant.
func TestRemovalPatchChecks(t *testing.T) {
	src := []byte("apiVersion: sallyport.dev/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n  to: {id: /x/*}\n  allow:\n    - {from: [{id: /a}], ports: [80]}\n    - {from: [{id: /b}], ports: [80]}\n    - {from: [{id: /c}], ports: [80]}\n")
	r := remover{src: src}
	require.NoError(t, r.remove([]RuleRef{{Policy: "p", Line: 7}}))
	r.cutLines(7, 8) // the next rule, too
	require.ErrorIs(t, r.check(), errLayout)
	r.cuts = nil
	require.ErrorIs(t, r.check(), errLayout)
}

// What is written so that lines cannot be cut is refused, not cut wrongly.
func TestRemovalPatchRefuses(t *testing.T) {
	const src = `apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: p}
spec:
  to: {id: /x/*}
  allow:
    - {from: [{id: /a}],
ports: [80]}
    - {from: [{id: /b}], ports: [80]}
`
	set, err := ParseFiles("", map[string][]byte{"a.yaml": []byte(src)})
	if err != nil {
		t.Skipf("it is no YAML any more: %v", err)
	}
	if patch, err := RemovalPatch([]*Set{set}, []RuleRef{{Policy: "p", File: "a.yaml", Line: 7}}, ""); err == nil {
		got, err := applyPatch(src, string(patch))
		t.Errorf("got %s (%v)", got, err)
	}
}
