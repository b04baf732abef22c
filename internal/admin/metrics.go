package admin

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/sallyport-mesh/sallyport/internal/flow"
)

// Sources are read at each scrape. A nil source leaves its metric out. The keys
// of the maps become label values and must come from a small fixed set.
type Sources struct {
	Live       func() map[flow.Side]int // connections being relayed
	SVIDExpiry func() (time.Time, bool) // false: no SVID yet
	// Outage is how long each identity would survive an outage of the control
	// plane that began now; negative: it has expired.
	Outage            func() map[string]time.Duration
	SVIDRenewals      func() uint64               // SVIDs obtained after the first
	Revisions         func() map[string]string    // kind of resource → revision in force
	Dropped           func() map[string]uint64    // sink → flow records lost
	RefusedLocal      func() uint64               // local callers with the wrong uid
	HandshakeFailures func() map[string]uint64    // class → count
	Revocation        func() (Revocation, bool)   // the list in force; false: none yet
	NeighbourLists    func() map[string]uint64    // what became of a list that a neighbour sent → count
	Revoked           func() map[flow.Side]uint64 // connections cut because their peer was revoked
	Components        func() map[string]Component // of a Health
	Now               func() time.Time
}

// Revocation is a revocation list.
type Revocation struct {
	Version string
	Entries int
	Stale   time.Duration // for which a newer one may have gone unnoticed
}

// Metrics counts connections as a [flow.Sink] and exposes Sources.
type Metrics struct {
	connections *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
}

// NewMetrics registers a sidecar's metrics, and those of its Go process, in
// reg. Names are listed in docs/sidecar.md. Registering twice in one registry
// panics.
func NewMetrics(reg prometheus.Registerer, version string, src Sources) *Metrics {
	f := promauto.With(reg)
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sallyport_build_info", Help: "Always 1; the label says what runs.",
		ConstLabels: prometheus.Labels{"version": version},
	}, func() float64 { return 1 })
	reg.MustRegister(newSource(src))
	return &Metrics{
		connections: f.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_connections_total", Help: "Connections that have ended, by verdict and outcome.",
		}, []string{"side", "verdict", "outcome"}),
		bytes: f.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_bytes_total", Help: "Bytes of ended connections: sent to the destination app, received from it.",
		}, []string{"side", "direction"}),
		seconds: f.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sallyport_connection_duration_seconds", Help: "How long connections lasted.",
			Buckets: prometheus.ExponentialBuckets(0.001, 8, 8),
		}, []string{"side"}),
	}
}

// Record implements [flow.Sink].
func (m *Metrics) Record(f flow.Flow) {
	side := string(f.Side)
	m.connections.WithLabelValues(side, f.Verdict(), string(f.Outcome)).Inc()
	m.bytes.WithLabelValues(side, "sent").Add(float64(f.Sent))
	m.bytes.WithLabelValues(side, "received").Add(float64(f.Received))
	m.seconds.WithLabelValues(side).Observe(f.Duration.Seconds())
}

// source turns Sources into metrics at each scrape.
type source struct {
	s                                                                          Sources
	live, svid, outage, renewals, view, dropped, local, handshakes, components *prometheus.Desc
	list, listEntries, listAge, lists, revoked                                 *prometheus.Desc
}

func newSource(s Sources) *source {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("sallyport_"+name, help, labels, nil)
	}
	return &source{
		s:          s,
		live:       desc("live_connections", "Connections being relayed now.", "side"),
		svid:       desc("svid_remaining_seconds", "Seconds until the SVID expires; negative when it has."),
		outage:     desc("identity_outage_seconds", "Seconds that an identity would survive an outage of the control plane that began now; negative when it has expired.", "identity"),
		renewals:   desc("svid_renewals_total", "SVIDs obtained after the first."),
		view:       desc("view_info", "Always 1; the revision in force, for each kind of resource.", "kind", "revision"),
		dropped:    desc("flow_records_dropped_total", "Flow records lost because a sink was full.", "sink"),
		local:      desc("local_callers_refused_total", "Local callers refused because of their uid."),
		handshakes: desc("handshake_failures_total", "Inbound TLS handshakes that ended without a verified peer.", "class"),
		components: desc("component_up", "1 ok, 0.5 degraded, 0 down.", "component"),

		list:        desc("revocation_list_info", "Always 1; the version of the revocation list in force.", "version"),
		listEntries: desc("revocation_list_entries", "Entries of the revocation list in force."),
		listAge:     desc("revocation_list_age_seconds", "Seconds for which a newer revocation list may have gone unnoticed."),
		lists:       desc("neighbour_lists_total", "Revocation lists that neighbours sent, by what became of them.", "outcome"),
		revoked:     desc("revoked_connections_total", "Live connections cut because their peer was revoked.", "side"),
	}
}

// Describe implements [prometheus.Collector].
func (c *source) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.live, c.svid, c.outage, c.renewals, c.view, c.dropped, c.local, c.handshakes, c.components, c.list, c.listEntries, c.listAge, c.lists, c.revoked} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (c *source) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	if c.s.Live != nil {
		for side, n := range c.s.Live() {
			gauge(c.live, float64(n), string(side))
		}
	}
	if c.s.SVIDExpiry != nil {
		if t, ok := c.s.SVIDExpiry(); ok {
			gauge(c.svid, t.Sub(c.s.Now()).Seconds())
		}
	}
	if c.s.Outage != nil {
		for identity, left := range c.s.Outage() {
			gauge(c.outage, left.Seconds(), identity)
		}
	}
	if c.s.SVIDRenewals != nil {
		count(c.renewals, c.s.SVIDRenewals())
	}
	if c.s.Revisions != nil {
		for kind, rev := range c.s.Revisions() {
			gauge(c.view, 1, kind, rev)
		}
	}
	if c.s.Dropped != nil {
		for sink, n := range c.s.Dropped() {
			count(c.dropped, n, sink)
		}
	}
	if c.s.RefusedLocal != nil {
		count(c.local, c.s.RefusedLocal())
	}
	if c.s.HandshakeFailures != nil {
		for class, n := range c.s.HandshakeFailures() {
			count(c.handshakes, n, class)
		}
	}
	c.collectRevocation(gauge, count)
	if c.s.Components != nil {
		for name, part := range c.s.Components() {
			gauge(c.components, float64(part.Status)/float64(OK), name)
		}
	}
}

func (c *source) collectRevocation(gauge func(*prometheus.Desc, float64, ...string), count func(*prometheus.Desc, uint64, ...string)) {
	if c.s.Revocation != nil {
		if r, ok := c.s.Revocation(); ok {
			gauge(c.list, 1, r.Version)
			gauge(c.listEntries, float64(r.Entries))
			gauge(c.listAge, r.Stale.Seconds())
		}
	}
	if c.s.NeighbourLists != nil {
		for outcome, n := range c.s.NeighbourLists() {
			count(c.lists, n, outcome)
		}
	}
	if c.s.Revoked != nil {
		for side, n := range c.s.Revoked() {
			count(c.revoked, n, string(side))
		}
	}
}
