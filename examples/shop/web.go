package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	maxBody      = 64 << 10         // bytes of a request or an answer
	callTimeout  = 10 * time.Second // one call to another service, in all
	stopTimeout  = 5 * time.Second  // for requests that run when the service stops
	writeTimeout = 15 * time.Second
)

// serve serves HTTP on LISTEN_HTTP until ctx is done, then lets running requests
// finish. It calls stopping first, for requests that would never finish.
func (s *shop) serve(ctx context.Context, stopping context.CancelFunc, handler http.Handler) error {
	addr, err := s.setting("LISTEN_HTTP")
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	srv := &http.Server{
		Handler:           http.MaxBytesHandler(handler, maxBody),
		ErrorLog:          s.log,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    16 << 10,
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	}
	stopping()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	err = srv.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = srv.Close()
	}
	<-failed
	return err
}

// newClient returns a client that makes one connection per request, so that
// each hop of a checkout is one flow record and ends with it.
func newClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives:     true,
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		ResponseHeaderTimeout: callTimeout,
	}}
}

// answerError is what another service answered instead of 200.
type answerError struct {
	service string
	code    int
	status  string
	body    string
}

func (e *answerError) Error() string {
	return fmt.Sprintf("%s answered %s: %s", e.service, e.status, e.body)
}

// call posts in to a service and decodes its answer into out.
func call(ctx context.Context, client *http.Client, service, url string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("asking %s: %w", service, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("asking %s: %w", service, err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("asking %s: %w", service, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("reading the answer of %s: %w", service, err)
	}
	if resp.StatusCode != http.StatusOK {
		return &answerError{service, resp.StatusCode, resp.Status, strings.TrimSpace(string(answer))}
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("reading the answer of %s: %w", service, err)
	}
	return nil
}

// reply writes v as JSON, or 502 and the error.
func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		v = map[string]string{"error": err.Error()}
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // the caller may be gone
}
