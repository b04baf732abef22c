package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
)

// answerLimit bounds the wait for the answer to an announcement.
const answerLimit = 10 * time.Second

// announcer tells the control plane where this sidecar listens. What it has to
// say is kept here and said on every stream anew; while one connection replaces
// another, two streams say the same for a moment, so that the endpoint never
// vanishes in between.
type announcer struct {
	log hclog.Logger

	mu       sync.Mutex
	want     *sallyportv1.AnnounceRequest // guarded by mu; nil: nothing to say yet
	version  int                          // guarded by mu; of want
	answered int                          // guarded by mu; newest version that was answered
	ever     bool                         // guarded by mu; the endpoint was published once
	streams  int                          // guarded by mu; open streams
	news     chan struct{}                // guarded by mu; closed when any of the above changes
}

func newAnnouncer(log hclog.Logger) *announcer {
	return &announcer{log: log, news: make(chan struct{})}
}

// changedLocked wakes everybody who waits for a change. The caller holds mu.
func (a *announcer) changedLocked() {
	close(a.news)
	a.news = make(chan struct{})
}

// set replaces what is announced. After withdraw it changes nothing.
func (a *announcer) set(req *sallyportv1.AnnounceRequest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.want.GetDraining() || proto.Equal(a.want, req) {
		return
	}
	a.want = req
	a.version++
	a.changedLocked()
}

// published reports whether the control plane has published the endpoint since
// the start.
func (a *announcer) published() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ever
}

// withdraw announces that this sidecar stops and waits for the answer. Without a
// stream, or before anything was announced, there is nothing to withdraw.
func (a *announcer) withdraw(ctx context.Context) error {
	a.mu.Lock()
	said := a.want != nil
	a.mu.Unlock()
	a.set(&sallyportv1.AnnounceRequest{Draining: true})
	for said {
		a.mu.Lock()
		over, news := a.answered == a.version || a.streams == 0, a.news
		a.mu.Unlock()
		if over {
			break
		}
		select {
		case <-news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// next waits until there is something newer than version to say.
func (a *announcer) next(ctx context.Context, version int, ended <-chan error) (*sallyportv1.AnnounceRequest, int, error) {
	for {
		a.mu.Lock()
		want, v, news := a.want, a.version, a.news
		a.mu.Unlock()
		if want != nil && v > version {
			return want, v, nil
		}
		select {
		case <-news:
		case err := <-ended:
			return nil, 0, err
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

func (a *announcer) addStream(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.streams += n
	a.changedLocked()
}

// run keeps one Announce stream on conn and returns why it ended, never nil.
// spoken is called after each answer, with the published address.
func (a *announcer) run(ctx context.Context, conn grpc.ClientConnInterface, spoken func(published string)) error {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := sallyportv1.NewAnnouncerClient(conn).Announce(ctx)
	if err != nil {
		cancel()
		return fmt.Errorf("announcing: %w", err)
	}
	answers, ended := make(chan string), make(chan error, 1)
	var receiver sync.WaitGroup
	receiver.Go(func() { receive(ctx, stream, answers, ended) })
	a.addStream(1)
	defer func() {
		a.addStream(-1)
		cancel()
		receiver.Wait()
	}()
	version := 0
	for {
		req, v, err := a.next(ctx, version, ended)
		if err != nil {
			return fmt.Errorf("announcing: %w", err)
		}
		version = v
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("announcing: %w", err)
		}
		published, err := answer(ctx, answers, ended)
		if err != nil {
			return fmt.Errorf("announcing: %w", err)
		}
		a.heard(v, published)
		spoken(published)
	}
}

// answer waits for the control plane's word on what was just sent.
func answer(ctx context.Context, answers <-chan string, ended <-chan error) (published string, err error) {
	t := time.NewTimer(answerLimit)
	defer t.Stop()
	select {
	case published = <-answers:
		return published, nil
	case err = <-ended:
		return "", err
	case <-t.C:
		return "", errors.New("no answer from the control plane")
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// heard notes the answer to a version.
func (a *announcer) heard(version int, published string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answered = max(a.answered, version)
	a.ever = a.ever || published != ""
	a.changedLocked()
	a.log.Debug("announced", "published", published)
}

// receive hands on answers until the stream ends, and then why it did.
func receive(ctx context.Context, stream sallyportv1.Announcer_AnnounceClient, answers chan<- string, ended chan<- error) {
	for {
		resp, err := stream.Recv()
		if err != nil {
			ended <- err
			return
		}
		select {
		case answers <- resp.GetPublished():
		case <-ctx.Done():
			return
		}
	}
}
