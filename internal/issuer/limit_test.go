package issuer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// One enrolment key neither fills the audit log nor hinders anybody else.
func TestEnrolmentsOfOneInstanceAreLimited(t *testing.T) {
	s := newServer(t)
	_, msg, first := s.enrolled(t)
	c := s.client(t, nil)
	again := func() codes.Code {
		_, err := s.keyAttempt(t, msg.GetInstance(), first.enrolment).run(t, c)
		return status.Code(err)
	}
	for n := 2; n <= enrollBurst; n++ {
		if got := again(); got != codes.OK {
			t.Fatalf("enrolment %d: got %v", n, got)
		}
	}
	if got := again(); got != codes.ResourceExhausted {
		t.Errorf("beyond the burst: got %v", got)
	}
	if _, err := first.run(t, c); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("beyond the burst, with the spent token: got %v", err)
	}
	s.enrolled(t) // another instance
	s.skew.Add(int64(enrollEvery))
	if got := again(); got != codes.OK {
		t.Errorf("after %v: got %v", enrollEvery, got)
	}
}

// 5-second SVIDs are renewed each 200 ms, which passes for ever.
func TestRenewalsOfOneInstanceAreLimited(t *testing.T) {
	s := newServer(t)
	svid, _, _ := s.enrolled(t)
	c := s.client(t, svid)
	csr := &sallyportv1.RenewRequest{Csr: newCSR(t, newKey(t))}
	for range 2 * renewBurst {
		_, err := c.Renew(t.Context(), csr)
		require.NoError(t, err)
		s.skew.Add(int64(200 * time.Millisecond))
	}
	var err error
	for range 10 * renewBurst {
		if _, err = c.Renew(t.Context(), csr); err != nil {
			break
		}
	}
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v, want a limit", err)
	}
}

func TestLimiterForgetsTheOldest(t *testing.T) {
	l := limiter{rate: 1, burst: 1}
	now := time.Now()
	for i := range 3 * maxBuckets {
		if !l.allow(fmt.Sprint(i), now) {
			t.Fatalf("instance %d refused at once", i)
		}
		if got := len(l.young) + len(l.old); got > 2*maxBuckets {
			t.Fatalf("got %d buckets", got)
		}
		if i > 0 && l.allow("0", now) { // it asks all the time, so it is not forgotten
			t.Fatalf("instance 0 allowed again after %d others", i)
		}
	}
}

func TestSilentStreamsBlockNobody(t *testing.T) {
	s := newServer(t)
	s.silence, s.deadline = time.Minute, time.Minute
	c := s.client(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	first, err := c.Enroll(ctx)
	require.NoError(t, err)
	for range maxEnrolling {
		_, err := c.Enroll(ctx)
		require.NoError(t, err)
	}
	if _, err := first.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the first silent stream: got %v, want that it had to go", err)
	}
	// While the silent ones still rush in it may have to go once or twice itself.
	newcomer := s.tokenAttempt(t)
	c = s.client(t, nil)
	end := time.Now().Add(5 * time.Second)
	for {
		if _, err = newcomer.run(t, c); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("enrolling beside %d silent streams: %v", maxEnrolling, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Nobody without a join token takes the time of a Proof.
func TestUnknownTokenIsNotChallenged(t *testing.T) {
	s := newServer(t)
	a := s.tokenAttempt(t)
	a.hello.GetJoinToken().Secret[0] ^= 1
	stream, err := s.client(t, nil).Enroll(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(helloMsg(a.hello)))
	if resp, err := stream.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v, %v", resp, err)
	}
}

func TestLobby(t *testing.T) {
	var l lobby
	var left []context.Context
	enter := func(host string) { // and stay
		ctx, _ := l.enter(t.Context(), host)
		left = append(left, ctx)
	}
	gone := func() (n int) {
		for _, ctx := range left {
			if errors.Is(context.Cause(ctx), errBusy) {
				n++
			}
		}
		return n
	}
	enter("quiet")
	for range maxGuestsOfHost + 5 {
		enter("crowd")
	}
	if got := gone(); got != 5 || left[0].Err() != nil || left[5].Err() == nil || left[6].Err() != nil {
		t.Errorf("%d had to go, want the 5 oldest of the crowd", got)
	}
	for i := range maxGuests {
		enter(fmt.Sprint(i))
	}
	if got, want := gone(), len(left)-maxGuests; got != want || left[0].Err() == nil || len(l.guests) != maxGuests {
		t.Errorf("%d had to go, want %d and the oldest among them; %d stay", got, want, len(l.guests))
	}
	_, leave := l.enter(t.Context(), "short")
	leave()
	if len(l.guests) != maxGuests-1 {
		t.Errorf("got %d guests after one left, want %d", len(l.guests), maxGuests-1)
	}
}

func TestHostOf(t *testing.T) {
	for origin, want := range map[string]string{
		"10.0.0.1:5":              "10.0.0.1/32",
		"[::ffff:10.0.0.1]:5":     "10.0.0.1/32",
		"[2001:db8:1:2:3::4]:5":   "2001:db8:1:2::/64",
		"[fe80::1:2%eth0]:5":      "fe80::/64",
		"unknown":                 "unknown",
		"/run/sallyport.sock:fd3": "/run/sallyport.sock:fd3",
	} {
		if got := hostOf(origin); got != want {
			t.Errorf("%s: got %s, want %s", origin, got, want)
		}
	}
}

func TestRefusalsDoNotFloodTheLog(t *testing.T) {
	s := newServer(t)
	var out bytes.Buffer
	s.log = hclog.New(&hclog.LoggerOptions{Output: &out})
	for range 1000 {
		s.refused("enrolment refused", "10.0.0.1:5", errBusy)
	}
	if got := strings.Count(out.String(), "\n"); got < refusalRate || got > 2*refusalRate {
		t.Errorf("got %d lines, want about %d", got, refusalRate)
	}
	out.Reset()
	s.skew.Add(int64(time.Second))
	s.refused("enrolment refused", "10.0.0.1:5", errBusy)
	if !strings.Contains(out.String(), "unlogged_before=9") {
		t.Errorf("got %q, want the number of refusals that were not logged", out.String())
	}
}
