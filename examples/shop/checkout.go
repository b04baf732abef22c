package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync/atomic"
)

// receipt is what a checkout returns; each service puts itself in front of the
// hops that it used.
type receipt struct {
	Order   string `json:"order"`
	Cents   int64  `json:"cents"`
	Entry   int64  `json:"entry"`   // number of the ledger's entry
	Balance int64  `json:"balance"` // of the ledger, in cents
	Hops    []hop  `json:"hops"`
}

type hop struct {
	Service string `json:"service"`
	Did     string `json:"did"`
}

// behind puts a hop in front of those that r names already.
func (r *receipt) behind(service, did string) {
	r.Hops = append([]hop{{service, did}}, r.Hops...)
}

// order asks for a purchase, charge for its payment.
type order struct {
	Item  string `json:"item"`
	Cents int64  `json:"cents"`
}

type charge struct {
	Order string `json:"order"`
	Cents int64  `json:"cents"`
}

// frontend takes requests from outside the mesh: the developer calls it
// directly.
func (s *shop) frontend(ctx context.Context) error {
	orders, err := s.setting("UPSTREAM_ORDERS_HTTP")
	if err != nil {
		return err
	}
	client := newClient()
	stopping, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /checkout", func(w http.ResponseWriter, r *http.Request) {
		var got receipt
		err := call(r.Context(), client, "orders", "http://"+orders+"/orders", order{Item: "lantern", Cents: 1999}, &got)
		got.behind("frontend", "took the request")
		reply(w, got, err)
	})
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) {
		passStream(stopping, w, r, client, "http://"+orders+"/stream")
	})
	return s.serve(ctx, stop, mux)
}

// orders turns an order into a charge.
func (s *shop) orders(ctx context.Context) error {
	payments, err := s.setting("UPSTREAM_PAYMENTS_HTTP")
	if err != nil {
		return err
	}
	client := newClient()
	stopping, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var count atomic.Int64
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		var in order
		if !decode(w, r, &in) {
			return
		}
		id := fmt.Sprintf("order-%d", count.Add(1))
		var got receipt
		err := call(r.Context(), client, "payments", "http://"+payments+"/charges", charge{id, in.Cents}, &got)
		got.behind("orders", "made "+id+" for a "+in.Item)
		reply(w, got, err)
	})
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) {
		s.stream(stopping, w, r)
	})
	return s.serve(ctx, stop, mux)
}

// payments charges by writing to the ledger.
func (s *shop) payments(ctx context.Context) error {
	ledger, err := s.setting("UPSTREAM_LEDGER_TCP")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /charges", func(w http.ResponseWriter, r *http.Request) {
		var in charge
		if !decode(w, r, &in) {
			return
		}
		got := receipt{Order: in.Order, Cents: in.Cents}
		var err error
		got.Entry, got.Balance, err = record(r.Context(), ledger, in)
		got.behind("ledger", fmt.Sprintf("wrote entry %d", got.Entry))
		got.behind("payments", fmt.Sprintf("charged %d cents", in.Cents))
		reply(w, got, err)
	})
	return s.serve(ctx, func() {}, mux)
}

// decode reads a JSON request; false means that the answer is written already.
func decode(w http.ResponseWriter, r *http.Request, into any) bool {
	if err := json.NewDecoder(r.Body).Decode(into); err != nil {
		http.Error(w, "reading the request: "+err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}
