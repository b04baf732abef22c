package policy

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/identity"
)

// test checks that the workloads and ports of a PolicyTest exist.
func (c *compiler) test(s *Set, t PolicyTest) {
	for _, k := range t.Cases {
		if _, err := refID(c.td, k.From, c.nameToID); err != "" {
			c.errs.add(s.mistake(&c.errs, t.File, k.from, c.suggestWorkload(k.From), err))
		}
		id, err := refID(c.td, k.To, c.nameToID)
		i, known := c.byID[id.String()]
		if err == "" && !known {
			if ts := c.matchTemplates(identity.ExactPattern(id)); len(ts) == 1 {
				i, known = ts[0], true
			} else if ws := c.matchForeign(identity.ExactPattern(id)); len(ws) == 1 {
				i, known = ws[0], true
			}
		}
		switch {
		case err != "":
			c.errs.add(s.mistake(&c.errs, t.File, k.to, c.suggestWorkload(k.To), err))
		case !known:
			c.errs.add(s.mistake(&c.errs, t.File, k.to, "", fmt.Sprintf("no workload has the ID %s", shorten(k.To))))
		case k.Port.isZero() && len(c.workloads[i].Ports) == 0:
			c.errs.add(s.mistake(&c.errs, t.File, k.to, "", fmt.Sprintf("workload %s declares no port: the case would ask nothing", k.To)))
		case !k.Port.isZero():
			if _, ok := c.workloads[i].refPort(k.Port); !ok {
				c.errs.add(s.mistake(&c.errs, t.File, k.Port.pos, "declared: "+portList(c.workloads[i].Ports),
					fmt.Sprintf("workload %s declares no port %s", k.To, k.Port)))
			}
		}
	}
}

func (c *compiler) nameToID(name string) (spiffeid.ID, bool) {
	i, ok := c.byName[name]
	if !ok {
		return spiffeid.ID{}, false
	}
	return c.workloads[i].ID, true // zero for a template
}

// refID resolves what a test case names; problem is "" when it could.
func refID(td spiffeid.TrustDomain, ref string, byName func(string) (spiffeid.ID, bool)) (id spiffeid.ID, problem string) {
	var err error
	switch {
	case strings.HasPrefix(ref, "/"):
		id, err = spiffeid.FromPath(td, ref)
	case strings.HasPrefix(ref, "spiffe://"):
		id, err = spiffeid.FromString(ref)
	default:
		var ok bool
		if id, ok = byName(ref); !ok {
			return id, fmt.Sprintf("unknown workload %q", shorten(ref))
		}
		if id.IsZero() {
			return id, fmt.Sprintf("workload %s is a template: write one of its IDs", ref)
		}
	}
	if err != nil {
		return spiffeid.ID{}, fmt.Sprintf("%q: %v", shorten(ref), err)
	}
	return id, ""
}
