package issuer

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// One instance enrols once in enrollEvery and renews renewRate times a second,
	// after a burst: sidecars that behave do so after restarts and every twenty-
	// fourth of an SVID's life, of which the shortest is 5 s.
	enrollEvery = 5 * time.Second
	enrollBurst = 5
	renewRate   = 10
	renewBurst  = 20
	// One bearer of a platform's evidence becomes a new instance once in
	// newcomerEvery, after a burst: as many replicas may start at once.
	newcomerEvery = 10 * time.Second
	newcomerBurst = 200
	// An agent asks for its host's processes: for hundreds when it starts, and for
	// each several times in an SVID's or a token's life.
	processRate  = 50
	processBurst = 1000
	// maxOutside bounds the questions to other systems in progress,
	// maxOutsideOfHost those that one host causes, and maxWaitingOfHost these
	// together with those that wait to be asked.
	maxOutside       = 32
	maxOutsideOfHost = 4
	maxWaitingOfHost = 32
	// maxBuckets bounds one generation of a limiter's buckets.
	maxBuckets = 8192
	// refusalRate is how many refusals are logged in a second; anyone may cause one.
	refusalRate = 10

	// maxGuests bounds the streams that wait for their Hello, and as many may wait
	// for the Proof of evidence that is not looked at before; maxGuestsOfHost bounds
	// those of one IPv4 address or IPv6 /64.
	maxGuests       = 2048
	maxGuestsOfHost = 32
)

// limiter gives each instance a token bucket. It remembers the last 8192 to
// 16384 of them; an older one has long been full again unless more ask at once.
type limiter struct {
	rate  rate.Limit
	burst int

	mu         sync.Mutex
	young, old map[string]*rate.Limiter // :: instance → bucket
}

// allow takes a token of the instance, or says that there is none.
func (l *limiter) allow(instance string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	bucket := l.young[instance]
	if bucket == nil {
		if bucket = l.old[instance]; bucket == nil {
			bucket = rate.NewLimiter(l.rate, l.burst)
		}
		if l.young == nil || len(l.young) == maxBuckets {
			l.young, l.old = make(map[string]*rate.Limiter), l.young
		}
		l.young[instance] = bucket
	}
	return bucket.AllowN(now, 1)
}

// lobby is where streams wait that showed nothing yet. Nobody is refused: for a
// newcomer whoever waits longest has to go, of the same host if that is crowded.
type lobby struct {
	mu     sync.Mutex
	guests []*guest // in the order of their arrival
}

type guest struct {
	host  string
	evict context.CancelCauseFunc
}

// enter gives a context that ends with ctx, or with errBusy when the room is
// needed. The caller calls leave.
func (l *lobby) enter(ctx context.Context, host string) (_ context.Context, leave func()) {
	ctx, evict := context.WithCancelCause(ctx)
	g := &guest{host, evict}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.makeRoom(host)
	l.guests = append(l.guests, g)
	return ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if i := slices.Index(l.guests, g); i >= 0 {
			l.guests = slices.Delete(l.guests, i, i+1)
		}
		evict(nil)
	}
}

// makeRoom for one guest. The caller holds mu.
func (l *lobby) makeRoom(host string) {
	count, oldest := 0, 0
	for i, g := range slices.Backward(l.guests) {
		if g.host == host {
			count, oldest = count+1, i
		}
	}
	switch {
	case count >= maxGuestsOfHost:
	case len(l.guests) >= maxGuests:
		oldest = 0
	default:
		return
	}
	l.guests[oldest].evict(errBusy)
	l.guests = slices.Delete(l.guests, oldest, oldest+1)
}

// gate bounds the calls that the control plane makes to others because somebody
// asked it to.
type gate struct {
	slots chan struct{}

	mu    sync.Mutex
	hosts map[string]*share // guarded by mu :: host → its part
}

// share is what one host may have of a gate.
type share struct {
	slots chan struct{}
	users int // calls in progress and waiting; guarded by gate.mu
}

// enter waits for a slot, or says that there is none in time, or that too many of
// this host wait already. The caller calls leave.
func (g *gate) enter(ctx context.Context, host string) (leave func(), err error) {
	own, ok := g.join(host)
	if !ok {
		return nil, errBusy
	}
	held := 0
	for _, slots := range []chan struct{}{own.slots, g.slots} {
		select {
		case slots <- struct{}{}:
			held++
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
	}
	leave = func() {
		for _, slots := range []chan struct{}{own.slots, g.slots}[:held] {
			<-slots
		}
		g.part(host)
	}
	if held < 2 {
		leave()
		return nil, errBusy
	}
	return leave, nil
}

func (g *gate) join(host string) (*share, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.hosts == nil {
		g.hosts = map[string]*share{}
	}
	own := g.hosts[host]
	if own == nil {
		own = &share{slots: make(chan struct{}, maxOutsideOfHost)}
		g.hosts[host] = own
	}
	if own.users == maxWaitingOfHost {
		return nil, false
	}
	own.users++
	return own, true
}

func (g *gate) part(host string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.hosts[host].users--; g.hosts[host].users == 0 {
		delete(g.hosts, host)
	}
}

// hostOf is the part of an origin that is costly to change.
func hostOf(origin string) string {
	ap, err := netip.ParseAddrPort(origin)
	if err != nil {
		return origin
	}
	addr, bits := ap.Addr().Unmap().WithZone(""), 32
	if addr.Is6() {
		bits = 64
	}
	return netip.PrefixFrom(addr, bits).Masked().String()
}
