package realmesh

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// Load sends requests through a mesh until it is stopped, and counts.
type Load struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	ok     int      // guarded by mu
	failed []string // guarded by mu; one line each
}

// HTTPLoad sends GET requests to url from workers, half of them on a connection
// of their own each, half on kept-alive ones. pause is the time between two
// requests of one worker.
func HTTPLoad(t testing.TB, url string, workers int, pause time.Duration) *Load {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &Load{cancel: cancel}
	for i := range workers {
		tr := &http.Transport{DisableKeepAlives: i%2 == 0}
		client := &http.Client{Transport: tr, Timeout: 20 * time.Second}
		l.wg.Go(func() {
			defer tr.CloseIdleConnections()
			l.work(ctx, pause, func() error { return Get(ctx, client, url) })
		})
	}
	t.Cleanup(func() { l.Stop() })
	return l
}

func (l *Load) work(ctx context.Context, pause time.Duration, request func() error) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		err := request()
		if ctx.Err() != nil {
			return
		}
		l.mu.Lock()
		if err != nil {
			l.failed = append(l.failed, time.Now().Format("15:04:05.000 ")+err.Error())
		} else {
			l.ok++
		}
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Get sends one request and wants 200.
func Get(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %.200s", resp.Status, body)
	}
	return nil
}

// Count is how many requests succeeded and failed so far.
func (l *Load) Count() (ok, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ok, len(l.failed)
}

// Stop ends the load and returns its result.
func (l *Load) Stop() (ok int, failed []string) {
	l.cancel()
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ok, l.failed
}

// More waits until n further requests have succeeded.
func (l *Load) More(t testing.TB, n int) {
	t.Helper()
	before, _ := l.Count()
	Eventually(t, fmt.Sprintf("%d more requests", n), func() error {
		if ok, failed := l.Count(); ok < before+n {
			return fmt.Errorf("%d succeeded, %d failed in all", ok-before, failed)
		}
		return nil
	})
}

// HTTPApp is an app of the test: it answers every request with name.
func HTTPApp(t testing.TB, name string) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
	return l.Addr().String()
}

// EchoApp is an app of the test: it sends a banner first, then echoes.
func EchoApp(t testing.TB, banner string) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if _, err := io.WriteString(c, banner); err != nil {
					return
				}
				_, _ = io.Copy(c, c)
				_ = c.(*net.TCPConn).CloseWrite()
			}()
		}
	}()
	return l.Addr().String()
}
