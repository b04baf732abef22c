package xds

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
)

const wildcard = "*"

// Versions that no resource bears: the node was told that there is none; the
// node may have forgotten what it was sent.
const (
	absent    = ""
	forgotten = "?"
)

// subscription is what one stream wants of one type and what it holds, by the
// rules of the incremental xDS protocol. The stream's goroutine owns it.
type subscription struct {
	typeURL string
	all     bool                // wildcard
	names   map[string]struct{} // asked for by name
	have    map[string]string   // :: name → version that the node has acknowledged
	refused map[string]string   // :: name → version that the node refused at nackRev

	pending  *outstanding // sent and not answered; at most one
	answered bool         // the first response was sent or was not needed
	seen     *prepared    // what was compared last; nil: compare again
	acked    Revision     // the node holds all of this type up to here
	nack     string       // why the node refused last; "" once it holds everything
	nackRev  Revision
}

// outstanding is a response on its way.
type outstanding struct {
	nonce    string
	rev      Revision
	versions map[string]string // :: name → version sent; absent for a removal
	empty    bool
	since    time.Time
}

// nodeView is one node's window on a snapshot.
type nodeView struct {
	p     *prepared
	slice *nodeSlice
}

// find returns the resource of that name if there is one and the node may have
// it. A node that is no workload may have no endpoints.
func (v nodeView) find(typeURL, name string) *Resource {
	if kindOf(typeURL) == Endpoints && !v.slice.known {
		return nil
	}
	if v.slice.proxyless != nil {
		return v.slice.proxyless.find(v.p, typeURL, name)
	}
	switch typeURL {
	case ClusterType:
		if s := v.service(name); s != nil {
			return s.cluster
		}
	case EndpointType:
		if s := v.service(name); s != nil {
			return s.assign
		}
	case SecretType:
		return v.p.secrets[name]
	case RevocationType:
		if r := v.p.revocations; r != nil && r.Name == name {
			return r
		}
	default:
		for _, r := range v.slice.resources[typeURL] {
			if r.Name == name {
				return r
			}
		}
	}
	return nil
}

// everything returns the names that a wildcard stands for: to gRPC, which asks for
// what it was told to dial, none.
func (v nodeView) everything(typeURL string) []string {
	if v.slice.proxyless != nil {
		return nil
	}
	switch typeURL {
	case ClusterType, EndpointType:
		return v.slice.reach.names(v.p.instances)
	case SecretType:
		return sortedKeys(v.p.secrets)
	case RevocationType:
		if v.p.revocations == nil {
			return nil
		}
		return []string{v.p.revocations.Name}
	default:
		var out []string
		for _, r := range v.slice.resources[typeURL] {
			out = append(out, r.Name)
		}
		return out
	}
}

func newSubscription(typeURL string) *subscription {
	return &subscription{
		typeURL: typeURL,
		names:   make(map[string]struct{}), have: make(map[string]string), refused: make(map[string]string),
	}
}

// change applies what a request asks for. first says that it is the stream's
// first of this type: only then do the versions that the node holds from
// earlier streams count, and only then does asking for nothing mean everything.
func (t *subscription) change(r *discoveryv3.DeltaDiscoveryRequest, first bool) {
	subscribe := r.GetResourceNamesSubscribe()
	if first && len(subscribe) == 0 {
		t.all = true
	}
	for _, name := range subscribe {
		t.subscribe(name)
	}
	for _, name := range r.GetResourceNamesUnsubscribe() {
		t.unsubscribe(name)
	}
	if first {
		maps.Copy(t.have, r.GetInitialResourceVersions())
		t.answered = len(t.have) > 0
	}
	if first || len(subscribe) > 0 || len(r.GetResourceNamesUnsubscribe()) > 0 {
		t.seen = nil
	}
}

// subscribe makes sure that name is sent (again), whatever the node is believed
// to hold: it may have forgotten.
func (t *subscription) subscribe(name string) {
	if name == wildcard {
		t.all = true
		for n := range t.have {
			t.have[n] = forgotten
		}
		t.expect(func(string) bool { return false })
		return
	}
	t.names[name] = struct{}{}
	if _, ok := t.have[name]; ok {
		t.have[name] = forgotten
	}
	delete(t.refused, name)
	t.expect(func(n string) bool { return n != name })
}

func (t *subscription) unsubscribe(name string) {
	if name == wildcard {
		t.all = false
		dropped := func(n string) bool { _, named := t.names[n]; return !named }
		maps.DeleteFunc(t.have, func(n, _ string) bool { return dropped(n) })
		t.expect(func(n string) bool { return !dropped(n) })
		return
	}
	_, named := t.names[name]
	_, held := t.have[name]
	delete(t.names, name)
	delete(t.have, name)
	delete(t.refused, name)
	if t.all && (named || held) {
		t.have[name] = forgotten // the node dropped it, the wildcard may still cover it: say which
	}
	t.expect(func(n string) bool { return n != name })
}

// expect narrows what an ACK of the outstanding response will mean: the node's
// wishes changed while it was on its way.
func (t *subscription) expect(keep func(name string) bool) {
	if t.pending != nil {
		maps.DeleteFunc(t.pending.versions, func(n, _ string) bool { return !keep(n) })
	}
}

// settle takes the node's answer to the outstanding response. Answers to any
// other response are out of date and change nothing.
func (t *subscription) settle(r *discoveryv3.DeltaDiscoveryRequest) {
	p := t.pending
	if p == nil || r.GetResponseNonce() != p.nonce {
		return
	}
	t.pending, t.seen = nil, nil
	if e := r.GetErrorDetail(); e != nil {
		t.nack, t.nackRev = fmt.Sprintf("%s: %s", shortType(t.typeURL), clip(e.GetMessage(), 1024)), p.rev
		maps.Copy(t.refused, p.versions)
		t.answered = !p.empty // an empty first response is owed again
		return
	}
	for name, version := range p.versions {
		delete(t.refused, name)
		if _, named := t.names[name]; version == absent && !named {
			delete(t.have, name)
		} else {
			t.have[name] = version
		}
	}
	if len(t.refused) == 0 {
		t.nack, t.nackRev = "", Revision{}
	}
}

// next compares what the node holds with what it should, and returns the
// response that brings it closer; nil when there is nothing to send. It never
// repeats what the node refused until content or revision is new.
func (t *subscription) next(v nodeView) *discoveryv3.DeltaDiscoveryResponse {
	rev := v.p.snap.Rev
	if t.nackRev != rev {
		clear(t.refused)
	}
	changes := t.changes(v)
	fresh := slices.DeleteFunc(slices.Clone(changes), func(c change) bool {
		version, refused := t.refused[c.name]
		return refused && version == c.version
	})
	if len(fresh) > 0 && kindOf(t.typeURL) == Rules {
		fresh = changes // a node takes new rules together or not at all
	}
	refusing := t.nack != "" && t.nackRev == rev
	owed := !t.answered && !refusing
	if len(fresh) == 0 && !owed {
		if len(changes) == 0 && (!refusing || len(t.refused) > 0) {
			t.acked, t.nack, t.nackRev = rev, "", Revision{}
			clear(t.refused)
		}
		return nil
	}
	t.answered = true
	return t.respond(v, fresh)
}

type change struct {
	name, version string
	resource      *Resource // nil: there is none
}

// changes lists in order of name what the node lacks, holds in another version,
// or should hold no longer.
func (t *subscription) changes(v nodeView) []change {
	var out []change
	wanted := make(map[string]struct{}, len(t.names))
	look := func(name string) {
		if _, ok := wanted[name]; ok {
			return
		}
		wanted[name] = struct{}{}
		r := v.find(t.typeURL, name)
		if held, ok := t.have[name]; !ok || held != r.GetVersion() {
			out = append(out, change{name, r.GetVersion(), r})
		}
	}
	for name := range t.names {
		look(name)
	}
	if t.all {
		for _, name := range v.everything(t.typeURL) {
			look(name)
		}
	}
	for name := range t.have {
		if _, ok := wanted[name]; !ok {
			out = append(out, change{name: name})
		}
	}
	slices.SortFunc(out, func(a, b change) int { return strings.Compare(a.name, b.name) })
	return out
}

// respond writes as many of the changes as go into one message; the rest
// follows when the node has answered. Rules always go whole.
func (t *subscription) respond(v nodeView, changes []change) *discoveryv3.DeltaDiscoveryResponse {
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: t.typeURL, SystemVersionInfo: v.p.rev}
	t.pending = &outstanding{rev: v.p.snap.Rev, empty: len(changes) == 0, versions: make(map[string]string, len(changes))}
	size := 0
	for _, c := range changes {
		if c.resource == nil {
			resp.RemovedResources = append(resp.RemovedResources, c.name)
			size += len(c.name)
		} else {
			resp.Resources = append(resp.Resources, c.resource)
			size += proto.Size(c.resource)
		}
		t.pending.versions[c.name] = c.version
		if size > splitAt && kindOf(t.typeURL) != Rules {
			break
		}
	}
	return resp
}
