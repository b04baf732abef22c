package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"syscall"
)

// attempt is one thing that the intruder tried and what came back. Neither
// refused nor unreachable means that it got through.
type attempt struct {
	Target      string          `json:"target"`
	Tried       string          `json:"tried"`
	Refused     bool            `json:"refused"`
	Unreachable bool            `json:"unreachable,omitempty"`
	Got         string          `json:"got"`
	Answer      json.RawMessage `json:"answer,omitempty"` // the body, where it is JSON
}

// intruder has a valid identity of its own and tries, on GET /attack, what no
// policy allows it.
func (s *shop) intruder(ctx context.Context) error {
	payments, err := s.setting("UPSTREAM_PAYMENTS_HTTP")
	if err != nil {
		return err
	}
	ledger, err := s.setting("UPSTREAM_LEDGER_TCP")
	if err != nil {
		return err
	}
	client := newClient()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /attack", func(w http.ResponseWriter, r *http.Request) {
		reply(w, map[string][]attempt{"attempts": {
			attackPayments(r.Context(), client, payments),
			attackLedger(r.Context(), ledger),
		}}, nil)
	})
	return s.serve(ctx, func() {}, mux)
}

func attackPayments(ctx context.Context, client *http.Client, addr string) attempt {
	a := attempt{Target: "payments", Tried: "POST /charges", Got: "a receipt"}
	var got receipt
	err := call(ctx, client, "payments", "http://"+addr+"/charges", charge{"stolen", 1}, &got)
	if err == nil {
		return a
	}
	var answer *answerError
	if !errors.As(err, &answer) {
		a.Unreachable, a.Got = true, err.Error()
		return a
	}
	a.Got = answer.status
	if json.Valid([]byte(answer.body)) {
		a.Answer = json.RawMessage(answer.body)
	}
	// Only a sidecar's answer carries a decision id; any other is the app's own.
	var sidecar struct {
		DecisionID string `json:"decision_id"`
	}
	if json.Unmarshal(a.Answer, &sidecar) == nil && sidecar.DecisionID != "" {
		a.Refused = answer.code == http.StatusForbidden
		a.Unreachable = !a.Refused
	}
	return a
}

// attackLedger takes a reset for a refusal: it is all that a TCP client is told.
func attackLedger(ctx context.Context, addr string) attempt {
	a := attempt{Target: "ledger", Tried: "RECORD stolen 1", Got: "an entry"}
	_, _, err := record(ctx, addr, charge{"stolen", 1})
	switch {
	case errors.Is(err, syscall.ECONNRESET):
		a.Refused, a.Got = true, "closed without a byte; the flow records have the decision id, or say that the ledger could not be reached"
	case err != nil:
		a.Unreachable, a.Got = true, err.Error()
	}
	return a
}
