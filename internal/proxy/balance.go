package proxy

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/xds"
)

// failurePenalty is how long an endpoint that could not be reached is only a
// last resort.
const failurePenalty = 5 * time.Second

// balancer picks endpoints by power of two choices: of two drawn at random, the
// one with fewer connections (Mitzenmacher, "The Power of Two Choices in
// Randomized Load Balancing", 2001). The zero value is ready.
type balancer struct {
	mu    sync.Mutex
	known map[netip.AddrPort]*load // guarded by mu; endpoints in use or penalised
}

type load struct {
	live   int       // connections open or being opened
	failed time.Time // last failure to connect
}

// pick takes an endpoint that serves port and is not in tried, and counts a
// connection to it until release. False: there is none.
func (b *balancer) pick(all []xds.Endpoint, port uint16, tried []netip.AddrPort, now time.Time) (xds.Endpoint, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var good, bad []xds.Endpoint
	for _, e := range all {
		if !slices.Contains(e.Ports, port) || slices.Contains(tried, e.Addr) {
			continue
		}
		if l := b.known[e.Addr]; l != nil && now.Sub(l.failed) < failurePenalty {
			bad = append(bad, e)
		} else {
			good = append(good, e)
		}
	}
	if len(good) == 0 {
		good = bad
	}
	if len(good) == 0 {
		return xds.Endpoint{}, false
	}
	i := rand.IntN(len(good))
	if len(good) > 1 {
		j := (i + 1 + rand.IntN(len(good)-1)) % len(good)
		if b.liveLocked(good[j].Addr) < b.liveLocked(good[i].Addr) {
			i = j
		}
	}
	b.getLocked(good[i].Addr).live++
	return good[i], true
}

// release ends what pick began; failed says that the endpoint could not be
// reached.
func (b *balancer) release(a netip.AddrPort, failed bool, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.getLocked(a)
	l.live--
	if failed {
		l.failed = now
	}
	for a, l := range b.known { // small: what is in use, and what failed lately
		if l.live == 0 && now.Sub(l.failed) >= failurePenalty {
			delete(b.known, a)
		}
	}
}

// worked forgives an endpoint.
func (b *balancer) worked(a netip.AddrPort) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.getLocked(a).failed = time.Time{}
}

func (b *balancer) liveLocked(a netip.AddrPort) int {
	if l := b.known[a]; l != nil {
		return l.live
	}
	return 0
}

func (b *balancer) getLocked(a netip.AddrPort) *load {
	if b.known == nil {
		b.known = make(map[netip.AddrPort]*load)
	}
	l := b.known[a]
	if l == nil {
		l = &load{}
		b.known[a] = l
	}
	return l
}
