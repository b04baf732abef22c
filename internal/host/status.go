package host

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/admin"
	"github.com/sallyport-mesh/sallyport/internal/agent"
	"github.com/sallyport-mesh/sallyport/internal/configfile"
)

// Components of an agent's health, listed in docs/agent.md.
const (
	componentIdentity = "identity"
	componentLink     = "control-plane"
	componentApps     = "apps"
	componentFiles    = "files"
)

func (h *Host) openHealth() {
	h.health = admin.NewHealth(h.now, componentIdentity)
	h.health.Set(componentLink, admin.Degraded, "not connected yet")
	h.health.Set(componentApps, admin.OK, "")
	if len(h.files) > 0 {
		h.health.Set(componentFiles, admin.Degraded, "not written yet")
	}
	h.health.BeforeReport(h.refreshHealth)
}

// refreshHealth sets what changes without anybody telling.
func (h *Host) refreshHealth() {
	switch id := h.agent.Status(); id.State {
	case agent.Valid:
		h.health.Set(componentIdentity, admin.OK, "")
	case agent.Degraded:
		h.health.Set(componentIdentity, admin.Degraded, fmt.Sprintf("renewing the SVID does not work: %s; it is valid until %s", id.Detail, id.NotAfter.UTC().Format(time.RFC3339)))
	default:
		h.health.Set(componentIdentity, admin.Down, fmt.Sprintf("%s: %s", id.State, id.Detail))
	}
	h.degrade(componentApps, h.wallet.Late(h.now()))
	var files []string
	for _, f := range h.files {
		if err := f.Trouble(); err != nil {
			files = append(files, fmt.Sprintf("%s: %v", f.Dir(), err))
		}
	}
	if len(h.files) > 0 {
		h.degrade(componentFiles, files)
	}
}

// degrade sets a component by what is wrong with it. A long list is cut: the rest
// is on the admin socket.
func (h *Host) degrade(component string, why []string) {
	const most = 5
	if len(why) == 0 {
		h.health.Set(component, admin.OK, "")
		return
	}
	text := strings.Join(why[:min(len(why), most)], "; ")
	if n := len(why) - most; n > 0 {
		text += fmt.Sprintf("; and %d more", n)
	}
	h.health.Set(component, admin.Degraded, text)
}

// ready tells when apps can ask: the agent has an identity of its own.
func (h *Host) ready() error {
	if h.stopping.Load() {
		return errors.New("stopping")
	}
	select {
	case <-h.agent.Ready():
		return nil
	default:
		return errors.New("waiting for the first SVID: " + h.agent.Status().Detail)
	}
}

// sources feeds the metrics. It is read at each scrape, after New.
func (h *Host) sources() admin.Sources {
	return admin.Sources{
		Now: h.now,
		SVIDExpiry: func() (time.Time, bool) {
			t := h.agent.Status().NotAfter
			return t, !t.IsZero()
		},
		SVIDRenewals: func() uint64 { return h.agent.Status().Renewals },
		Outage: func() map[string]time.Duration {
			out := make(map[string]time.Duration)
			if t := h.agent.Status().NotAfter; !t.IsZero() {
				out["self"] = t.Sub(h.now())
			}
			if least, n := h.wallet.Outage(h.now()); n > 0 {
				out["apps"] = least
			}
			return out
		},
		Components: func() map[string]admin.Component { return h.health.Report().Components },
	}
}

// debugParts are what the admin socket shows besides profiles. None holds a
// secret.
func (h *Host) debugParts() map[string]func() any {
	return map[string]func() any{
		"config":     func() any { return configfile.Plain(h.cfg) },
		"identities": func() any { return h.wallet.Identities() },
	}
}
