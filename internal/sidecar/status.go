package sidecar

import (
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/capture"
	"github.com/sallyport-mesh/sallyport/internal/configfile"
	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/internal/proxy"
	"github.com/sallyport-mesh/sallyport/internal/xds"
)

// Components of a sidecar's health, listed in docs/sidecar.md.
const (
	componentIdentity  = "identity"
	componentLink      = "control-plane"
	componentPolicy    = "policy"
	componentAnnounce  = "announce"
	componentTunnel    = "tunnel"
	componentDirect    = "direct"
	componentApp       = "app"
	componentOutbound  = "outbound"
	componentIsolation = "local-isolation"
	componentRevoked   = "revocation"
	componentAppSVID   = "app-identity"
)

func (s *Sidecar) openHealth() {
	s.health = admin.NewHealth(s.now, componentIdentity, componentPolicy)
	s.health.Set(componentTunnel, admin.OK, "")
	s.health.Set(componentDirect, admin.OK, "")
	s.health.Set(componentApp, admin.OK, "")
	s.health.Set(componentOutbound, admin.OK, "")
	s.health.Set(componentLink, admin.Degraded, "not connected yet")
	s.health.Set(componentAnnounce, admin.Degraded, "not announced yet")
	s.health.Set(componentIsolation, admin.OK, "")
	if why := s.isolationOff(); why != "" {
		s.health.Set(componentIsolation, admin.Degraded, why)
	}
	if s.wallet != nil {
		s.health.Set(componentAppSVID, admin.OK, "")
	}
	s.health.BeforeReport(s.refreshHealth)
}

// refreshHealth sets what changes without anybody telling.
func (s *Sidecar) refreshHealth() {
	switch id := s.agent.Status(); id.State {
	case agent.Valid:
		s.health.Set(componentIdentity, admin.OK, "")
	case agent.Degraded:
		s.health.Set(componentIdentity, admin.Degraded, fmt.Sprintf("renewing the SVID does not work: %s; it is valid until %s", id.Detail, id.NotAfter.UTC().Format(time.RFC3339)))
	default:
		s.health.Set(componentIdentity, admin.Down, fmt.Sprintf("%s: %s", id.State, id.Detail))
	}
	revoked, why := s.revocationHealth()
	s.health.Set(componentRevoked, revoked, why)
	if err := s.views.Ready(); err != nil {
		s.health.Set(componentPolicy, admin.Down, err.Error())
	} else {
		s.health.Set(componentPolicy, admin.OK, "")
	}
	all := s.troubles(s.views.Load())
	if errs := s.inbound.AppErrors(); len(errs) > 0 {
		all[componentApp] = append(all[componentApp], "the last call to the app went wrong; is it running? "+strings.Join(errs, ", "))
	}
	all[componentDirect] = s.inbound.DirectErrors()
	if s.wallet != nil {
		all[componentAppSVID] = s.wallet.Late(s.now())
		for _, f := range s.files {
			if err := f.Trouble(); err != nil {
				all[componentAppSVID] = append(all[componentAppSVID], fmt.Sprintf("files in %s: %v", f.Dir(), err))
			}
		}
	}
	for component, why := range all {
		if len(why) > 0 {
			s.health.Set(component, admin.Degraded, strings.Join(why, "; "))
		} else {
			s.health.Set(component, admin.OK, "")
		}
	}
}

// troubles says, by component, what in the configuration does not fit v.
func (s *Sidecar) troubles(v *proxy.View) map[string][]string {
	out := map[string][]string{componentApp: nil, componentOutbound: s.outbound.Unresolved()}
	if !v.HasRules() {
		return out
	}
	_, unserved, undeclared := s.inbound.Serves(v)
	if len(unserved) > 0 {
		out[componentApp] = append(out[componentApp], fmt.Sprintf("the Workload declares port %s, which proxy.yaml does not serve; say in app where the app listens, or remove it from spec.ports", strings.Join(unserved, ", ")))
	}
	if len(undeclared) > 0 {
		out[componentApp] = append(out[componentApp], fmt.Sprintf("proxy.yaml serves port %s, which the Workload does not declare; add it to spec.ports, or remove it from app", strings.Join(undeclared, ", ")))
	}
	return out
}

// isolationOff says why the local doors (outbound listeners, Workload API) protect
// nothing; "" when they do or there are none.
func (s *Sidecar) isolationOff() string {
	if i := capture.IsolationOf(s.cfg.AllowUIDs); !i.On && (len(s.cfg.Outbound) > 0 || s.endpoint != nil) {
		return i.Reason
	}
	return ""
}

func (s *Sidecar) sayIsolation() {
	if why := s.isolationOff(); why != "" {
		s.log.Warn(why)
	}
}

// viewChanged follows a new view: what to announce, and what to warn of, once
// for each change.
func (s *Sidecar) viewChanged(v *proxy.View, _ xds.Kind) {
	warned := make(map[string]bool)
	for _, why := range s.troubles(v) {
		for _, line := range why {
			if warned[line] = true; !s.warned[line] {
				s.log.Warn(line)
			}
		}
	}
	s.warned = warned
	if !v.HasRules() {
		return
	}
	ports, _, _ := s.inbound.Serves(v)
	req := &sallyportv1.AnnounceRequest{Address: s.cfg.Tunnel.Advertise, TunnelPort: tcpPort(s.TunnelAddr())}
	for _, p := range ports {
		req.Ports = append(req.Ports, uint32(p))
	}
	s.announce.set(req)
}

func tcpPort(a net.Addr) uint32 {
	if t, ok := a.(*net.TCPAddr); ok {
		return uint32(t.Port)
	}
	return 0
}

func (s *Sidecar) linkUp() {
	if s.health.Get(componentLink).Status != admin.OK {
		s.log.Info("connected to the control plane", "address", s.cfg.ControlPlane)
	}
	s.health.Set(componentLink, admin.OK, "")
}

// linkLost notes that a connection failed or ended. While another one stands,
// that is no trouble yet.
func (s *Sidecar) linkLost(err error, other *session) {
	if status.Code(err) == codes.Unauthenticated { // the SVID is as good as none; the list may not come
		s.agent.RenewNow()
	}
	if other != nil {
		s.log.Debug("no new connection to the control plane yet", "error", err)
		return
	}
	if s.health.Get(componentLink).Status == admin.OK {
		s.heard.Store(s.now().UnixNano())
		s.log.Warn("no connection to the control plane; traffic goes on with the last view", "error", err)
	}
	s.health.Set(componentLink, admin.Degraded, fmt.Sprintf("%v; trying again, and traffic goes on with the last view", err))
}

func (s *Sidecar) announceFailed(err error) {
	if s.health.Get(componentAnnounce).Message != err.Error() {
		s.log.Info("this endpoint is not announced; trying again", "error", err)
	}
	s.health.Set(componentAnnounce, admin.Degraded, err.Error())
}

// outage is how long the sidecar's own identity and the app's would survive an
// outage that began now.
func (s *Sidecar) outage() map[string]time.Duration {
	out := make(map[string]time.Duration)
	if t := s.agent.Status().NotAfter; !t.IsZero() {
		out["self"] = t.Sub(s.now())
	}
	if s.wallet != nil {
		if least, n := s.wallet.Outage(s.now()); n > 0 {
			out["app"] = least
		}
	}
	return out
}

// sources feeds the metrics. It is read at each scrape, after New.
func (s *Sidecar) sources() admin.Sources {
	return admin.Sources{
		Now: s.now,
		Live: func() map[flow.Side]int {
			return map[flow.Side]int{flow.Inbound: s.inbound.Live(), flow.Outbound: s.outbound.Live()}
		},
		SVIDExpiry: func() (time.Time, bool) {
			t := s.agent.Status().NotAfter
			return t, !t.IsZero()
		},
		Outage:       s.outage,
		SVIDRenewals: func() uint64 { return s.agent.Status().Renewals },
		Revisions: func() map[string]string {
			out := make(map[string]string)
			for kind, rev := range s.views.Load().Revisions() {
				out[string(kind)] = rev.String()
			}
			return out
		},
		Dropped: func() map[string]uint64 {
			out := map[string]uint64{"control-plane": s.stream.Dropped()}
			if s.flowLog != nil {
				out["file"] = s.flowLog.Dropped()
			}
			return out
		},
		RefusedLocal:      func() uint64 { return s.outbound.RefusedLocal() },
		HandshakeFailures: func() map[string]uint64 { return s.inbound.HandshakeFailures() },
		Revocation:        s.revocationState,
		NeighbourLists:    s.near.Lists,
		Revoked: func() map[flow.Side]uint64 {
			return map[flow.Side]uint64{flow.Inbound: s.inbound.Revoked(), flow.Outbound: s.outbound.Revoked()}
		},
		Components: func() map[string]admin.Component { return s.health.Report().Components },
	}
}

// debugParts are what the admin socket shows besides profiles. None holds a
// secret: the configuration names files, it does not quote them.
func (s *Sidecar) debugParts() map[string]func() any {
	return map[string]func() any{
		"config": func() any { return configfile.Plain(s.cfg) },
		"view":   func() any { return s.views.Load().Describe() },
		"connections": func() any {
			return map[flow.Side][]proxy.Connection{
				flow.Inbound: s.inbound.Connections(), flow.Outbound: s.outbound.Connections(),
			}
		},
	}
}
