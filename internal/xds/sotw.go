package xds

import (
	"sync"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

type sotwStream = discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer

// StreamAggregatedResources serves gRPC clients and servers without sidecar, which
// speak state of the world. They are told what [proxyless] makes of the snapshot,
// under the same conditions and limits as in
// [Server.DeltaAggregatedResources], and end as it does.
func (s *Server) StreamAggregatedResources(ads sotwStream) error {
	return s.serve(&sotw{sotwStream: ads, types: make(map[string]*sotwType)}, true)
}

// sotw has a stream of the world's state look like one of differences, so that one
// protocol, with one set of limits, is served: what is asked for is told as what
// was added and dropped, and each response repeats what the node has already.
// One goroutine may receive while another sends.
type sotw struct {
	sotwStream

	mu    sync.Mutex
	types map[string]*sotwType // guarded by mu :: served type URL →
}

// sotwType is what a node wants of one type, and what it was sent of that.
type sotwType struct {
	names map[string]struct{}
	sent  map[string]*Resource // :: name →
}

var _ deltaStream = (*sotw)(nil)

// Recv implements deltaStream. A request says all that the node wants from now on.
// Whatever nonce it has, the newest request counts; whether it also answers a
// response, the nonce says as in the other protocol.
func (s *sotw) Recv() (*discoveryv3.DeltaDiscoveryRequest, error) {
	r, err := s.sotwStream.Recv()
	if err != nil {
		return nil, err
	}
	out := &discoveryv3.DeltaDiscoveryRequest{
		Node: r.GetNode(), TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetResponseNonce(), ErrorDetail: r.GetErrorDetail(),
	}
	if newMessage(r.GetTypeUrl()) == nil {
		return out, nil // not served, and so not remembered
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.types[r.GetTypeUrl()]
	if t == nil {
		t = &sotwType{sent: make(map[string]*Resource)}
		s.types[r.GetTypeUrl()] = t
	}
	wanted := make(map[string]struct{}, len(r.GetResourceNames()))
	for _, name := range r.GetResourceNames() {
		if _, had := t.names[name]; !had {
			out.ResourceNamesSubscribe = append(out.ResourceNamesSubscribe, name)
		}
		wanted[name] = struct{}{}
	}
	for name := range t.names {
		if _, still := wanted[name]; !still {
			out.ResourceNamesUnsubscribe = append(out.ResourceNamesUnsubscribe, name)
			delete(t.sent, name)
		}
	}
	t.names = wanted
	return out, nil
}

// Send implements deltaStream. What is missing in a response does not exist.
func (s *sotw) Send(d *discoveryv3.DeltaDiscoveryResponse) error {
	out := &discoveryv3.DiscoveryResponse{TypeUrl: d.GetTypeUrl(), VersionInfo: d.GetSystemVersionInfo(), Nonce: d.GetNonce()}
	s.mu.Lock()
	if t := s.types[d.GetTypeUrl()]; t != nil {
		for _, name := range d.GetRemovedResources() {
			delete(t.sent, name)
		}
		for _, r := range d.GetResources() {
			if _, wanted := t.names[r.GetName()]; wanted {
				t.sent[r.GetName()] = r
			}
		}
		for _, name := range sortedKeys(t.sent) {
			out.Resources = append(out.Resources, t.sent[name].GetResource())
		}
	}
	s.mu.Unlock()
	return s.sotwStream.Send(out)
}
