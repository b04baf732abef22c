package xds

import (
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// reach is what one node may reach: of what the rules list, which changes with them
// only, and of the instances of templates, which come and go with their endpoints.
// The zero reach is nothing. It must not be copied once used.
type reach struct {
	src    spiffeid.ID     // set by of, as is the field below
	rules  *policy.Ruleset // nil: nothing is reached
	listed []string        // SPIFFE IDs, ascending

	mu        sync.Mutex
	instances []spiffeid.ID // guarded by mu; what all was made for
	all       []string      // guarded by mu; SPIFFE IDs, ascending, listed ones included
}

func (r *reach) add(id spiffeid.ID) { r.listed = append(r.listed, id.String()) }

// of says whose reach it is; nothing is added afterwards.
func (r *reach) of(src spiffeid.ID, rules *policy.Ruleset) {
	r.src, r.rules = src, rules
	slices.Sort(r.listed)
}

// names gives all that src may reach where these are the instances of templates.
// Callers must not change it.
func (r *reach) names(instances []spiffeid.ID) []string {
	if r.rules == nil || len(instances) == 0 {
		return r.listed
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.instances, instances) {
		r.instances, r.all = instances, nil
		for _, id := range r.rules.Reach(r.src, instances...) {
			r.all = append(r.all, id.String())
		}
		slices.Sort(r.all)
	}
	return r.all
}

// instances gives the IDs of templates that have endpoints, ascending.
func (s *Snapshot) instances() []spiffeid.ID {
	if s.Rules == nil || len(s.Rules.Templates()) == 0 {
		return nil
	}
	var out []spiffeid.ID
	for id, v := range s.Services {
		if len(v.Endpoints) == 0 {
			continue
		}
		if w, ok := s.Rules.Workload(id); ok && w.Template {
			out = append(out, id)
		}
	}
	slices.SortFunc(out, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	return out
}
