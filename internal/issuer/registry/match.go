package registry

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// maxMisses bounds how many workloads Explain lists that do not match.
const maxMisses = 10

// workloads is what SetWorkloads was given, indexed.
type workloads struct {
	byName    map[string]*policy.CompiledWorkload      // :: metadata.name → workload
	byID      map[spiffeid.ID]*policy.CompiledWorkload // :: SPIFFE ID → workload; templates are not in it
	templates []*policy.CompiledWorkload
	byKind    map[string][]claim // :: kind of evidence → who admits it
	issuers   map[string]int     // as in Config
}

// claim is one entry of a workload's attest list.
type claim struct {
	*policy.CompiledWorkload
	attest policy.Attest
}

func index(list []policy.CompiledWorkload, issuers map[string]int) *workloads {
	all := &workloads{
		byName: make(map[string]*policy.CompiledWorkload, len(list)), byID: make(map[spiffeid.ID]*policy.CompiledWorkload, len(list)),
		byKind: map[string][]claim{}, issuers: issuers,
	}
	for i := range list {
		w := &list[i]
		all.byName[w.Name] = w
		if w.Template {
			all.templates = append(all.templates, w)
		} else {
			all.byID[w.ID] = w
		}
		for _, a := range w.Attest {
			all.byKind[a.Kind] = append(all.byKind[a.Kind], claim{w, a})
		}
	}
	return all
}

// workload returns the workload that has this ID, its own or one of its template's.
func (all *workloads) workload(id spiffeid.ID) (*policy.CompiledWorkload, bool) {
	if w, ok := all.byID[id]; ok {
		return w, true
	}
	for _, w := range all.templates {
		if w.Pattern.Match(id) {
			return w, true
		}
	}
	return nil, false
}

// id says whose the evidence is by this entry, or what it misses.
func (all *workloads) id(c claim, v attest.Verified, via spiffeid.ID) (id spiffeid.ID, missed string) {
	issuer := v.Issuer
	if c.attest.Issuer == "" {
		if all.issuers[v.Kind] > 1 {
			return id, fmt.Sprintf("%d issuers of kind %s are configured, so the Workload must name the one that it means", all.issuers[v.Kind], v.Kind)
		}
		issuer = ""
	}
	if ok, missed := c.attest.Match(v.Kind, issuer, via, v.Selectors); !ok {
		return id, missed
	}
	if !c.Template {
		return c.ID, ""
	}
	id, err := c.Resolve(v.Selectors)
	if err != nil {
		return id, err.Error()
	}
	return id, ""
}

// Match finds the one workload that evidence proves, and the ID that it gives.
// via is the agent that vouches for the evidence, and zero where none has to.
// It returns [ErrNoMatch] where no workload admits it, and [ErrAmbiguous], which
// names two, where several do.
func (r *Registry) Match(v attest.Verified, via spiffeid.ID) (*policy.CompiledWorkload, spiffeid.ID, error) {
	all := r.workloads.Load()
	if all == nil {
		return nil, spiffeid.ID{}, ErrNotReady
	}
	var found *policy.CompiledWorkload
	var id spiffeid.ID
	for _, c := range all.byKind[v.Kind] {
		got, missed := all.id(c, v, via)
		switch {
		case missed != "":
		case found == nil, found == c.CompiledWorkload && got == id:
			found, id = c.CompiledWorkload, got
		default:
			return nil, spiffeid.ID{}, fmt.Errorf("%w: %s and %s", ErrAmbiguous, describe(found), describe(c.CompiledWorkload))
		}
	}
	if found == nil {
		return nil, spiffeid.ID{}, &NoMatchError{Verified: v, nearest: all.nearest(v, via)}
	}
	if w, ok := all.workload(id); !ok || w != found { // a template that reaches into another's name
		return nil, spiffeid.ID{}, fmt.Errorf("%w: %s gives it %s, which is not its own", ErrAmbiguous, describe(found), id)
	}
	return found, id, nil
}

func describe(w *policy.CompiledWorkload) string {
	return fmt.Sprintf("%s (%s:%d)", w.Name, w.File, w.Line)
}

// NoMatchError is [ErrNoMatch] with the evidence that nobody admits.
type NoMatchError struct {
	attest.Verified
	nearest string
}

// Error is for whoever showed the evidence: it says what was found in it, and
// nothing of what other workloads ask for.
func (e *NoMatchError) Error() string {
	return fmt.Sprintf("%v; it is %s", ErrNoMatch, Describe(e.Verified))
}

// Nearest says which workload came closest and what it misses, for the control
// plane's log. Empty: none admits this kind of evidence.
func (e *NoMatchError) Nearest() string { return e.nearest }

// Unwrap makes it an [ErrNoMatch].
func (e *NoMatchError) Unwrap() error { return ErrNoMatch }

// Describe words evidence for people: its kind, who vouches, whose it is.
func Describe(v attest.Verified) string {
	text := v.Kind
	if v.Issuer != "" {
		text += " of " + v.Issuer
	}
	if v.Subject != "" {
		text += ": " + v.Subject
	}
	return text
}

func (all *workloads) nearest(v attest.Verified, via spiffeid.ID) string {
	if near := all.explain(v, via); len(near) > 0 {
		return fmt.Sprintf("%s: %s", describe(near[0].Workload), near[0].Missed)
	}
	return ""
}

// NearMiss is a workload as evidence of its kind finds it.
type NearMiss struct {
	Workload *policy.CompiledWorkload
	ID       spiffeid.ID // which it gives; zero unless Matches
	Matches  bool
	Missed   string // what the evidence lacks; empty if Matches
}

// Explain lists the workloads that evidence proves, of which more than one is an
// ambiguity, and then the ten that came closest.
func (r *Registry) Explain(v attest.Verified, via spiffeid.ID) ([]NearMiss, error) {
	all := r.workloads.Load()
	if all == nil {
		return nil, ErrNotReady
	}
	return all.explain(v, via), nil
}

func (all *workloads) explain(v attest.Verified, via spiffeid.ID) []NearMiss {
	type scored struct {
		NearMiss
		score int
	}
	best := map[string]scored{} // :: metadata.name → its entry that came closest
	for _, c := range all.byKind[v.Kind] {
		s := scored{NearMiss{Workload: c.CompiledWorkload}, 0}
		s.ID, s.Missed = all.id(c, v, via)
		if s.Matches = s.Missed == ""; !s.Matches {
			s.ID, s.score = spiffeid.ID{}, lacks(c.attest, v)
		}
		if old, ok := best[c.Name]; !ok || s.score < old.score || s.Matches {
			best[c.Name] = s
		}
	}
	var list []scored
	for _, s := range best {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b scored) int {
		return cmp.Or(cmp.Compare(a.score, b.score), strings.Compare(a.Workload.Name, b.Workload.Name))
	})
	var out []NearMiss
	misses := 0
	for _, s := range list {
		if !s.Matches {
			misses++
		}
		if misses <= maxMisses {
			out = append(out, s.NearMiss)
		}
	}
	return out
}

// lacks ranks a miss: how many of the entry's selectors are not in the evidence,
// and one for whatever else is not as it should be.
func lacks(a policy.Attest, v attest.Verified) int {
	n := 1
	for key, want := range a.Select {
		if !slices.Contains(v.Selectors[key], want) {
			n++
		}
	}
	if a.Issuer != "" && a.Issuer != v.Issuer {
		n++
	}
	return n
}
