package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// ClientConfig sets up a [Client].
type ClientConfig struct {
	Node     spiffeid.ID // who this sidecar is; resources for another node are refused
	Instance string      // 1 to 64 bytes of [A-Za-z0-9._-]
	// Subscribe names the destinations wanted. Empty: those that policy lets
	// the node reach.
	Subscribe []spiffeid.ID
	// Reachable asks for those, too, besides what Subscribe names.
	Reachable bool
	Log       hclog.Logger // required
}

// Client receives a node's view of the mesh and keeps the last good state of
// each kind across streams. It holds no connection and starts no goroutine.
type Client struct {
	cfg     ClientConfig
	wanted  map[string]bool // the names in cfg.Subscribe; empty: no choice was made
	running sync.Mutex      // held by Run; guards the rest

	held    map[string]*heldType // :: type URL
	applied map[Kind]bool        // kinds of which apply has taken a state
}

// heldType is what the client has accepted of one type.
type heldType struct {
	answered bool              // a response came; what is not here does not exist
	rev      Revision          // of the newest response
	versions map[string]string // :: name → version
	values   map[string]any    // :: name → what parseResource gave
}

// NewClient returns a client that holds nothing yet.
func NewClient(cfg ClientConfig) *Client {
	c := &Client{cfg: cfg, wanted: make(map[string]bool, len(cfg.Subscribe)), held: make(map[string]*heldType), applied: make(map[Kind]bool)}
	for _, typeURL := range wireTypes() {
		c.held[typeURL] = &heldType{versions: make(map[string]string), values: make(map[string]any)}
	}
	for _, id := range cfg.Subscribe {
		c.wanted[id.String()] = true
	}
	return c
}

// Run keeps one ADS stream on conn and returns why it ended, never nil. Each
// response that makes a kind complete, or changes it, goes to apply as the whole
// state of that kind, in the order of arrival and one at a time; what apply
// refuses is refused to the control plane with its error and leaves the state as
// it was. apply should return within seconds, as the control plane waits for
// the answer.
//
// The next Run, on the same or on another connection, tells the control plane
// which versions are held, and nothing of it is sent again. A revision older
// than one already accepted is refused. When to run again is the caller's
// decision. Only one Run may be under way.
func (c *Client) Run(ctx context.Context, conn grpc.ClientConnInterface, apply func(Update) error) error {
	if err := validInstance(c.cfg.Instance); err != nil {
		return fmt.Errorf("opening ADS stream: %w", err)
	}
	if !c.running.TryLock() {
		return errors.New("opening ADS stream: another one is under way")
	}
	defer c.running.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).
		DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return fmt.Errorf("opening ADS stream: %w", err)
	}
	for i, typeURL := range wireTypes() {
		if err := ads.Send(c.request(typeURL, i == 0)); err != nil {
			return streamEnd(ads, err)
		}
	}
	for {
		resp, err := ads.Recv()
		if err != nil {
			return streamEnd(ads, err)
		}
		ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}
		if err := c.accept(resp, apply); err != nil {
			c.cfg.Log.Warn("update refused, last good state kept", "type", shortType(resp.GetTypeUrl()), "revision", resp.GetSystemVersionInfo(), "error", err)
			ack.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: clip(err.Error(), 1024)}
		}
		if err := ads.Send(ack); err != nil {
			return streamEnd(ads, err)
		}
	}
}

// streamEnd gives the status that ended a stream; Send only says that it ended.
func streamEnd(ads discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, err error) error {
	if errors.Is(err, io.EOF) {
		for err = error(nil); err == nil; {
			_, err = ads.Recv()
		}
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("the control plane closed it")
	}
	return fmt.Errorf("ADS stream ended: %w", err)
}

// request opens a type: what is wanted and what is held already.
func (c *Client) request(typeURL string, first bool) *discoveryv3.DeltaDiscoveryRequest {
	r := &discoveryv3.DeltaDiscoveryRequest{
		TypeUrl:                 typeURL,
		ResourceNamesSubscribe:  []string{wildcard},
		InitialResourceVersions: c.held[typeURL].versions,
	}
	if first {
		r.Node = &corev3.Node{Id: c.cfg.Instance, Metadata: levelMetadata(policy.CurrentLevel)}
	}
	if kindOf(typeURL) == Endpoints && len(c.wanted) > 0 {
		r.ResourceNamesSubscribe = sortedKeys(c.wanted)
		if c.cfg.Reachable {
			r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, wildcard)
		}
	}
	return r
}

// accept takes in one response whole or, with an error, not at all.
func (c *Client) accept(resp *discoveryv3.DeltaDiscoveryResponse, apply func(Update) error) error {
	typeURL := resp.GetTypeUrl()
	old := c.held[typeURL]
	if old == nil {
		return fmt.Errorf("type %.100q was not asked for", typeURL)
	}
	next, changed, err := c.merge(old, resp)
	if err != nil {
		return err
	}
	c.held[typeURL] = next
	update, ready, err := c.state(kindOf(typeURL), next.rev)
	if err == nil && ready && (changed || !c.applied[update.Kind]) {
		if err = apply(update); err == nil {
			c.applied[update.Kind] = true
		}
	}
	if err != nil {
		c.held[typeURL] = old
	}
	return err
}

// merge returns what is held after resp, and whether that is anything new.
func (c *Client) merge(old *heldType, resp *discoveryv3.DeltaDiscoveryResponse) (next *heldType, changed bool, err error) {
	rev, err := ParseRevision(resp.GetSystemVersionInfo())
	if err != nil {
		return nil, false, err
	}
	if rev.Less(old.rev) {
		return nil, false, fmt.Errorf("revision %s is older than %s, which this node has", rev, old.rev)
	}
	next = &heldType{answered: true, rev: rev, versions: maps.Clone(old.versions), values: maps.Clone(old.values)}
	for _, name := range resp.GetRemovedResources() {
		_, held := next.versions[name]
		changed = changed || held
		delete(next.versions, name)
		delete(next.values, name)
	}
	for _, r := range resp.GetResources() {
		if !c.asked(resp.GetTypeUrl(), r.GetName()) {
			return nil, false, fmt.Errorf("resource %.100q was not asked for", r.GetName())
		}
		v, err := parseResource(c.cfg.Node, resp.GetTypeUrl(), r)
		if err != nil {
			return nil, false, err
		}
		version, held := next.versions[r.GetName()]
		changed = changed || !held || version != r.GetVersion()
		next.versions[r.GetName()], next.values[r.GetName()] = r.GetVersion(), v
	}
	return next, changed, nil
}

// asked lets every listener, rules resource, secret and list through: parseResource
// accepts nobody else's.
func (c *Client) asked(typeURL, name string) bool {
	return kindOf(typeURL) != Endpoints || len(c.wanted) == 0 || c.cfg.Reachable || c.wanted[name]
}

// state puts a kind together from what is held. It is ready when nothing is
// still on its way.
func (c *Client) state(kind Kind, rev Revision) (u Update, ready bool, err error) {
	u = Update{Kind: kind, Rev: rev}
	switch kind {
	case Bundles:
		u.Bundles = bundlesOf(c.held[SecretType].values)
		if own := u.Bundles[c.cfg.Node.TrustDomain()]; own == nil || len(own.X509Authorities()) == 0 {
			return u, false, fmt.Errorf("no trust bundle for %s", c.cfg.Node.TrustDomain())
		}
		return u, true, nil
	case Revocations:
		u.Revocations = revocationsOf(c.cfg.Node, c.held[RevocationType].values)
		return u, u.Revocations != nil || c.applied[Revocations], nil
	case Endpoints:
		clusters, assignments := c.held[ClusterType], c.held[EndpointType]
		u.Services = servicesOf(clusters.values, assignments.values)
		return u, clusters.answered && assignments.answered, nil
	default:
		return c.rulesUpdate(u)
	}
}

// rulesUpdate is ready when ports and rules belong together. While only one of
// them has arrived the last good state stays. A resource that is withdrawn after
// all were there is a statement like any other and can only narrow: without its
// listener, its allows or its denies a node lets nothing in.
func (c *Client) rulesUpdate(u Update) (Update, bool, error) {
	state, err := rulesOf(c.cfg.Node, c.held[ListenerType].values, c.held[ExtensionType].values)
	switch {
	case err != nil:
		return u, false, err
	case !state.complete:
		u.Rules = policy.NewRuleset(nil)
		return u, c.applied[Rules], nil
	}
	u.Rules, u.Ports, u.MaxStale = state.rules, state.door.ports, state.door.maxStale
	return u, state.matched, nil
}
