package endpoint

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

// maxNames bounds what one SDS stream may subscribe to.
const maxNames = 64

// discovery implements Envoy's SDS v3 (xDS REST and gRPC protocol, "secret
// discovery service"): all three of its methods.
type discovery struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	server *Server
}

// FetchSecrets answers once.
func (d *discovery) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	if err := checkRequest(req.GetTypeUrl(), len(req.GetResourceNames())); err != nil {
		return nil, err
	}
	h, err := d.server.holding(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := respond(h, req.GetResourceNames())
	return resp, toStatus(err)
}

func checkRequest(typeURL string, names int) error {
	if typeURL != "" && typeURL != secretType {
		return grpcstatus.Errorf(codes.InvalidArgument, "type %q: only %s is served here", typeURL, secretType)
	}
	if names > maxNames {
		return grpcstatus.Errorf(codes.InvalidArgument, "%d names: at most %d", names, maxNames)
	}
	return nil
}

func respond(h *Holding, names []string) (*discoveryv3.DiscoveryResponse, error) {
	secrets, err := secretsOf(h, names)
	if err != nil {
		return nil, err
	}
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType}
	var versions []string
	for _, s := range secrets {
		resp.Resources = append(resp.Resources, s.body)
		versions = append(versions, s.name+"="+s.version)
	}
	resp.VersionInfo = digest([]byte(strings.Join(versions, "\n")))
	return resp, nil
}

// requests hands on what a client sends until the stream ends.
type requests[T any] struct {
	c   chan *T
	end chan error // cap 1; nil: the client closed its side
}

// receive starts receiving, until ctx ends or the stream does, which the caller
// ends by returning.
func receive[T any](ctx context.Context, recv func() (*T, error)) *requests[T] {
	r := &requests[T]{c: make(chan *T), end: make(chan error, 1)}
	go func() {
		for {
			msg, err := recv()
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = nil
				}
				r.end <- err
				return
			}
			select {
			case r.c <- msg:
			case <-ctx.Done():
				return
			}
		}
	}()
	return r
}

// StreamSecrets speaks the state-of-the-world variant.
func (d *discovery) StreamSecrets(stream grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	var names []string
	var sent string // version
	nonce, asked := 0, false
	return converse(d.server, stream.Context(), stream.Recv,
		func(req *discoveryv3.DiscoveryRequest) error {
			if err := checkRequest(req.GetTypeUrl(), len(req.GetResourceNames())); err != nil {
				return err
			}
			d.refused(req.GetNode(), req.GetErrorDetail())
			if req.GetResponseNonce() != "" && req.GetResponseNonce() != strconv.Itoa(nonce) {
				return nil // about a response that was followed by another
			}
			next := slices.Sorted(slices.Values(req.GetResourceNames()))
			if !asked || !slices.Equal(names, next) {
				asked, names, sent = true, next, ""
			}
			return nil
		},
		func(h *Holding) error {
			if !asked {
				return nil
			}
			resp, err := respond(h, names)
			if err != nil || resp.VersionInfo == sent {
				return err
			}
			nonce++
			resp.Nonce = strconv.Itoa(nonce)
			sent = resp.VersionInfo
			return stream.Send(resp)
		})
}

// DeltaSecrets speaks the incremental variant.
func (d *discovery) DeltaSecrets(stream grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	sub := subscription{sent: map[string]string{}, names: map[string]bool{}}
	nonce := 0
	return converse(d.server, stream.Context(), stream.Recv,
		func(req *discoveryv3.DeltaDiscoveryRequest) error {
			d.refused(req.GetNode(), req.GetErrorDetail())
			sub.change(req)
			return checkRequest(req.GetTypeUrl(), len(sub.names))
		},
		func(h *Holding) error {
			resp, err := sub.response(h)
			if err != nil || resp == nil {
				return err
			}
			nonce++
			resp.Nonce = strconv.Itoa(nonce)
			return stream.Send(resp)
		})
}

// converse reads requests and follows the caller's holding; after each change of
// either, answer says what is due. Both functions run in one goroutine.
func converse[T any](s *Server, ctx context.Context, recv func() (*T, error), hear func(*T) error, answer func(*Holding) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	feed, err := s.hold(ctx)
	if err != nil {
		return err
	}
	in := receive(ctx, recv)
	for {
		h, news, err := feed.Get()
		if err == nil && h != nil {
			err = answer(h)
		}
		if err != nil {
			return toStatus(err)
		}
		select {
		case req := <-in.c:
			if err := hear(req); err != nil {
				return err
			}
		case err := <-in.end:
			return err
		case <-news:
		case <-s.stopping:
			return grpcstatus.Error(codes.Unavailable, "the agent is stopping")
		}
	}
}

// refused logs a client's word that it could not use what it was sent.
func (d *discovery) refused(node *corev3.Node, detail *status.Status) {
	if detail != nil {
		d.server.log.Warn("an SDS client refused its secrets", "node", node.GetId(), "reason", detail.GetMessage())
	}
}

// subscription is what one incremental stream wants and has.
type subscription struct {
	asked    bool
	wildcard bool
	names    map[string]bool
	sent     map[string]string // :: name → version; "": told that it does not exist
}

func (s *subscription) change(req *discoveryv3.DeltaDiscoveryRequest) {
	if !s.asked {
		s.asked = true
		s.wildcard = len(req.GetResourceNamesSubscribe()) == 0 // legacy wildcard
		maps.Copy(s.sent, req.GetInitialResourceVersions())
	}
	for _, n := range req.GetResourceNamesSubscribe() {
		if n == "*" {
			s.wildcard = true
			continue
		}
		s.names[n] = true
		if _, initial := req.GetInitialResourceVersions()[n]; !initial {
			delete(s.sent, n) // asking again is to be answered again
		}
	}
	for _, n := range req.GetResourceNamesUnsubscribe() {
		if n == "*" {
			s.wildcard = false
		}
		delete(s.names, n)
		delete(s.sent, n)
	}
}

// response is what the client lacks; nil: nothing.
func (s *subscription) response(h *Holding) (*discoveryv3.DeltaDiscoveryResponse, error) {
	if !s.asked {
		return nil, nil
	}
	var have []secret
	if len(s.names) > 0 {
		named, err := secretsOf(h, slices.Collect(maps.Keys(s.names)))
		if err != nil {
			return nil, err
		}
		have = named
	}
	if s.wildcard {
		all, err := secretsOf(h, nil)
		if err != nil {
			return nil, err
		}
		have = append(have, all...)
	}
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: secretType}
	there := map[string]bool{}
	for _, r := range have {
		there[r.name] = true
		if v, ok := s.sent[r.name]; ok && v == r.version {
			continue
		}
		s.sent[r.name] = r.version
		resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: r.name, Version: r.version, Resource: r.body})
	}
	for _, n := range slices.Sorted(maps.Keys(s.names)) {
		if v, told := s.sent[n]; !there[n] && (!told || v != "") {
			s.sent[n] = ""
			resp.RemovedResources = append(resp.RemovedResources, n)
		}
	}
	for n, v := range s.sent { // of a wildcard
		if !there[n] && !s.names[n] && v != "" {
			delete(s.sent, n)
			resp.RemovedResources = append(resp.RemovedResources, n)
		}
	}
	if len(resp.Resources)+len(resp.RemovedResources) == 0 {
		return nil, nil
	}
	resp.SystemVersionInfo = digest([]byte(strings.Join(slices.Sorted(maps.Values(s.sent)), "\n")))
	return resp, nil
}
