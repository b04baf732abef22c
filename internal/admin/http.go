package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Handler serves /healthz, /readyz and /metrics. /healthz answers 503 while a
// component is down, /readyz while ready returns an error; both say why as
// JSON. Nothing else is served: profiles are on the [DebugHandler] only.
func Handler(h *Health, ready func() error, metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		r := h.Report()
		code := http.StatusOK
		if r.Status == Down {
			code = http.StatusServiceUnavailable
		}
		writeJSON(w, code, r)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		type answer struct {
			Ready   bool   `json:"ready"`
			Waiting string `json:"waiting,omitempty"`
		}
		if err := ready(); err != nil {
			writeJSON(w, http.StatusServiceUnavailable, answer{false, err.Error()})
			return
		}
		writeJSON(w, http.StatusOK, answer{Ready: true})
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

// DebugHandler serves Go's profiles below /debug/pprof/ and each of parts, as
// JSON, under its name: "view" at /view. It belongs on a private unix socket.
func DebugHandler(parts map[string]func() any) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	for name, part := range parts {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, _ *http.Request) {
			writeJSON(w, http.StatusOK, part())
		})
	}
	return mux
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n')) // whoever asked has gone: nothing to do
}

// maxConns bounds the connections that a listener serves at a time; more wait
// in the kernel. A scraper and the probes need a handful.
const maxConns = 256

// Serve answers HTTP on ln until ctx ends, then lets requests finish for a
// second. It closes ln. The error is nil when ctx ended it.
func Serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      2 * time.Minute, // a CPU profile takes 30 s by default
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(netutil.LimitListener(ln, maxConns)) }()
	select {
	case err := <-done:
		return fmt.Errorf("serving %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := srv.Shutdown(end); err != nil {
		err = srv.Close()
		<-done
		return err
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving %s: %w", ln.Addr(), err)
	}
	return nil
}
