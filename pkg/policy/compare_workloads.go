package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// workloads compares the workloads themselves, by ID.
func (c *comparison) workloads() {
	for _, w := range c.after.Workloads() {
		old, ok := c.before.Workload(w.ID)
		if !ok {
			c.diff.adds = true
			c.diff.workload("+ workload %s (%s)", w.Name, w.ID.Path())
			continue
		}
		if changes := c.changes(old, w); len(changes) > 0 {
			c.diff.workload("~ workload %s: %s", w.Name, strings.Join(changes, "; "))
		}
	}
	for _, w := range c.before.Workloads() {
		if _, ok := c.after.Workload(w.ID); !ok {
			c.diff.workload("- workload %s (%s)", w.Name, w.ID.Path())
		}
	}
	for _, w := range c.after.Templates() {
		old, ok := c.before.template(w.Workload.ID)
		if !ok {
			c.diff.adds = true
			c.diff.workload("+ workload %s (%s)", w.Name, w.Workload.ID)
			continue
		}
		if changes := c.changes(old, w); len(changes) > 0 {
			c.diff.workload("~ workload %s: %s", w.Name, strings.Join(changes, "; "))
		}
	}
	for _, w := range c.before.Templates() {
		if _, ok := c.after.template(w.Workload.ID); !ok {
			c.diff.workload("- workload %s (%s)", w.Name, w.Workload.ID)
		}
	}
}

// domains compares which trust domains are federated, and how.
func (c *comparison) domains() {
	describe := func(d TrustDomain) string {
		out := "trust domain " + d.Name + " (" + d.Domain.Name()
		if d.Endpoint != nil {
			out += ", bundle from " + d.Endpoint.URL + ", " + d.Endpoint.Profile
			if !d.Endpoint.ID.IsZero() {
				out += " as " + d.Endpoint.ID.String()
			}
		}
		for _, w := range d.Workloads {
			for _, e := range w.Endpoints {
				out += ", " + w.ID.Path() + " at " + e.String()
			}
		}
		return out + ")"
	}
	same := func(a, b TrustDomain) bool {
		return describe(a) == describe(b) && (a.Bundle == nil) == (b.Bundle == nil) && (a.Bundle == nil || a.Bundle.Equal(b.Bundle))
	}
	for _, d := range c.after.TrustDomains() {
		i := slices.IndexFunc(c.before.TrustDomains(), func(o TrustDomain) bool { return o.Domain == d.Domain })
		switch {
		case i < 0:
			c.diff.adds = true
			c.diff.workload("+ %s", describe(d))
		case !same(c.before.TrustDomains()[i], d):
			c.diff.adds = true // whom to believe has changed
			c.diff.workload("~ %s", describe(d))
		}
	}
	for _, d := range c.before.TrustDomains() {
		if !slices.ContainsFunc(c.after.TrustDomains(), func(o TrustDomain) bool { return o.Domain == d.Domain }) {
			c.diff.workload("- %s", describe(d))
		}
	}
}

// issuers compares whose tokens are believed.
func (c *comparison) issuers() {
	describe := func(t TokenIssuer) string {
		return fmt.Sprintf("token issuer %s (%s, for %s)", t.Name, t.Issuer, t.Audience)
	}
	for _, t := range c.after.tokenIssuers() {
		i := slices.IndexFunc(c.before.tokenIssuers(), func(o TokenIssuer) bool { return o.Name == t.Name })
		switch {
		case i < 0:
			c.diff.adds = true
			c.diff.workload("+ %s", describe(t))
		case describe(c.before.tokenIssuers()[i]) != describe(t):
			c.diff.adds = true // others are believed
			c.diff.workload("~ %s", describe(t))
		}
	}
	for _, t := range c.before.tokenIssuers() {
		if !slices.ContainsFunc(c.after.tokenIssuers(), func(o TokenIssuer) bool { return o.Name == t.Name }) {
			c.diff.workload("- %s", describe(t))
		}
	}
}

func (r *Ruleset) tokenIssuers() []TokenIssuer {
	if r == nil {
		return nil
	}
	return r.issuers
}

// externals compares the destinations outside.
func (c *comparison) externals() {
	describe := func(x External) string {
		tls := ""
		if x.TLS {
			tls = ", TLS"
		}
		return fmt.Sprintf("external %s (%s:%d, %s%s)", x.Name, x.Host, x.Port.Number, x.Port.Protocol, tls)
	}
	for _, x := range c.after.Externals() {
		i := slices.IndexFunc(c.before.Externals(), func(o External) bool { return o.Name == x.Name })
		switch {
		case i < 0:
			c.diff.adds = true
			c.diff.workload("+ %s", describe(x))
		case describe(c.before.Externals()[i]) != describe(x):
			c.diff.adds = true // it leads elsewhere
			c.diff.workload("~ %s", describe(x))
		}
	}
	for _, x := range c.before.Externals() {
		if !slices.ContainsFunc(c.after.Externals(), func(o External) bool { return o.Name == x.Name }) {
			c.diff.workload("- %s", describe(x))
		}
	}
}

// template gives the template that is written with this id.
func (r *Ruleset) template(id string) (CompiledWorkload, bool) {
	for _, w := range r.Templates() {
		if w.Workload.ID == id {
			return w, true
		}
	}
	return CompiledWorkload{}, false
}

// changes lists what differs between two versions of a workload.
func (c *comparison) changes(old, now CompiledWorkload) []string {
	var out []string
	list := func(what string, was, is []string) (added bool) {
		var diff []string
		for _, s := range is {
			if !slices.Contains(was, s) {
				diff, added = append(diff, "+"+s), true
			}
		}
		for _, s := range was {
			if !slices.Contains(is, s) {
				diff = append(diff, "-"+s)
			}
		}
		if len(diff) > 0 {
			out = append(out, what+" "+strings.Join(diff, ", "))
		}
		return added
	}
	if old.Name != now.Name {
		out = append(out, "was called "+old.Name)
		c.diff.adds = true
	}
	if list("attest", old.evidence(), now.evidence()) {
		c.diff.adds = true
	}
	list("labels", old.labelList(), now.labelList())
	list("ports", old.portTexts(), now.portTexts())
	for _, port := range now.Ports { // callers without mutual TLS for longer, or by another door
		was, _ := old.PortByName(port.Name)
		c.diff.adds = c.diff.adds || port.Plaintext.After(was.Plaintext) || port.Direct != 0 && port.Direct != was.Direct
	}
	if list("endpoints", old.endpointTexts(), now.endpointTexts()) {
		c.diff.adds = true
	}
	if old.MaxStale != now.MaxStale {
		out = append(out, "maxStale "+now.MaxStale.String())
		c.diff.adds = c.diff.adds || old.MaxStale.Refuse
	}
	return out
}

func (w Workload) evidence() []string {
	out := make([]string, len(w.Attest))
	for i, a := range w.Attest {
		out[i] = a.String()
	}
	return out
}

func (w Workload) labelList() []string {
	out := make([]string, 0, len(w.Labels))
	for _, k := range slices.Sorted(maps.Keys(w.Labels)) {
		out = append(out, k+": "+w.Labels[k])
	}
	return out
}

func (w Workload) portTexts() []string {
	out := make([]string, len(w.Ports))
	for i, p := range w.Ports {
		out[i] = p.Name + " (" + strconv.Itoa(int(p.Number)) + " " + string(p.Protocol) + ")"
		if !p.Plaintext.IsZero() {
			out[i] += " in plaintext until " + p.Plaintext.Format(time.RFC3339)
		}
		if p.Direct != 0 {
			out[i] += " direct at " + strconv.Itoa(int(p.Direct))
		}
	}
	return out
}

func (w Workload) endpointTexts() []string {
	out := make([]string, len(w.Endpoints))
	for i, e := range w.Endpoints {
		out[i] = e.String()
	}
	return out
}

// unionPorts gives the ports of both, by number; a name from a wins.
func unionPorts(b, a []Port) []Port {
	byNumber := map[uint16]Port{}
	for _, ports := range [][]Port{b, a} {
		for _, p := range ports {
			byNumber[p.Number] = p
		}
	}
	return slices.SortedFunc(maps.Values(byNumber), func(x, y Port) int { return cmp.Compare(x.Number, y.Number) })
}
