package agent

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

const (
	// attemptTimeout bounds one enrolment or renewal, connecting included.
	attemptTimeout = 10 * time.Second
	// maxSleep is how late a suspended machine or a corrected clock is noticed:
	// timers stand still while a machine sleeps, SVIDs do not.
	maxSleep = 30 * time.Second

	firstBackoff   = 250 * time.Millisecond
	validBackoff   = 30 * time.Second // cap while the SVID is valid
	urgentBackoff  = 5 * time.Second  // cap without a valid SVID
	minBackoffStep = 50 * time.Millisecond
)

// keep renews until ctx ends, whatever happens: a valid SVID is never given up,
// and an expired one is replaced as soon as the control plane answers.
func (a *Agent) keep(ctx context.Context) {
	failures := 0
	due := a.renewIn()
	for a.wait(ctx, due) {
		err := a.refresh(ctx)
		switch {
		case err == nil:
			failures = 0
			due = a.renewIn()
		case ctx.Err() != nil:
			return
		default:
			failures++
			a.failed(err)
			due = a.backoff(failures)
		}
	}
}

// refresh renews with the present SVID, or, where that is refused or has
// expired, re-enrols with the enrolment key.
func (a *Agent) refresh(ctx context.Context) error {
	if a.remaining() > 0 {
		err := a.renew(ctx)
		if err == nil || !isRefusal(err) {
			return err
		}
		a.log.Debug("renewal refused; re-enrolling", "error", err)
	}
	return a.enroll(ctx)
}

func (a *Agent) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	link := a.identified()
	return link.with(ctx, func(conn *grpc.ClientConn) error {
		key, csr, err := newKey()
		if err != nil {
			return err
		}
		resp, err := sallyportv1.NewEnrollmentClient(conn).Renew(ctx, &sallyportv1.RenewRequest{Csr: csr})
		if err != nil {
			return err
		}
		return a.accept(resp.GetSvid(), key, a.ID().TrustDomain(), nil)
	})
}

// RenewNow has the SVID renewed at once, for example because its issuer is about to
// be refused. It does not wait; calls while a renewal is due become one.
func (a *Agent) RenewNow() {
	select {
	case a.hurry <- struct{}{}:
	default:
	}
}

// remaining is how long the present SVID is still valid; ≤ 0 without one.
func (a *Agent) remaining() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status.NotAfter.Sub(a.cfg.Now())
}

// renewIn is a twenty-fourth of the SVID's life, give or take a tenth, so that
// sidecars that started together do not renew together.
func (a *Agent) renewIn() time.Duration {
	a.mu.Lock()
	life := a.state.life
	a.mu.Unlock()
	return time.Duration(float64(life) / 24 * (0.9 + 0.2*rand.Float64()))
}

func (a *Agent) backoff(failures int) time.Duration { return pauseAfter(failures, a.remaining()) }

// pauseAfter doubles with each failure up to a cap and is halved at random. While
// an SVID is valid the cap is also an eighth of what is left of it, so that many
// tries fit in.
func pauseAfter(failures int, left time.Duration) time.Duration {
	limit := urgentBackoff
	if left > 0 {
		limit = min(validBackoff, max(left/8, minBackoffStep))
	}
	d := min(firstBackoff<<min(failures-1, 10), limit)
	return d/2 + rand.N(d/2+1)
}

// wait sleeps for d by the injected clock, less if [Agent.RenewNow] was called;
// false when ctx has ended.
func (a *Agent) wait(ctx context.Context, d time.Duration) bool {
	until := a.cfg.Now().Add(d)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-a.hurry:
			return true
		case <-timer.C:
		}
		left := until.Sub(a.cfg.Now())
		if left <= 0 || left > 2*d { // the latter: the clock was set back
			return true
		}
		timer.Reset(min(left, a.poll))
	}
}
