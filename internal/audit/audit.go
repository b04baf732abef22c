// Package audit records who changed what, from where, and with what result, in
// the control plane's store.
//
// Connections are not changes: they are flow records, in package flow.
package audit

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

const (
	// MaxRecords and MaxBytes bound what is kept: the newest records win. Those
	// that sidecars cause by themselves have bounds of their own, so that they
	// never push out what people did: enrolments ([ActionIssue]), and apart from
	// these what running sidecars ask for all the time ([ActionRenew], [ActionJWT]).
	MaxRecords      = 10_000
	MaxBytes        = 32 << 20
	MaxRoutine      = 5_000
	MaxRoutineBytes = 8 << 20
	// MaxRenewals is five hours of 10,000 sidecars that renew hourly.
	MaxRenewals      = 50_000
	MaxRenewalsBytes = 24 << 20
	// MaxDetail is the length of a record's Detail in bytes; a longer one is cut
	// and says so. The other fields are cut at MaxField.
	MaxDetail = 16 << 10
	MaxField  = 1 << 10

	// ActionIssue is the Action of an enrolment, ActionRenew of an SVID for who
	// has one already, or for an agent's process, ActionJWT of a JWT-SVID.
	ActionIssue = "svid.issue"
	ActionRenew = "svid.renew"
	ActionJWT   = "jwt.issue"

	// prefix is that of all keys but those of renewals, which are so many that
	// reading the others must not mean reading them.
	prefix         = "audit/"
	renewalsPrefix = "audit-renewals/"
	// routine ends the keys of enrolments.
	routine = "-routine"
	// trimEvery and trimRenewalsEvery are how many records this process writes
	// between two looks at what may be forgotten.
	trimEvery         = 256
	trimRenewalsEvery = 4096
)

// Record is one attempted change.
type Record struct {
	Time    time.Time // zero: when the record is written
	Actor   string    // who: a user, a SPIFFE ID, "watched directory"
	Origin  string    // from where: an address, a process, a folder
	Action  string    // what kind of change, as in "policy.apply"
	Subject string    // what was changed: sets, a workload, a token's id
	Detail  string    // for people: a diff, or why it was refused
	Result  string    // "applied 1.42", "refused", …
}

// Log writes records to a store and reads them back. It is safe for concurrent use.
type Log struct {
	store  store.Store
	now    func() time.Time
	writer string        // tells this process's keys from another replica's
	seq    atomic.Uint64 // orders records of one nanosecond
	// Records written since the last trim, of renewals and of all others.
	due, dueRenewals atomic.Int64
}

// New returns a log over s that reads the time from now.
func New(s store.Store, now func() time.Time) *Log {
	var b [4]byte
	rand.Read(b[:]) // never fails: crypto/rand
	l := &Log{store: s, now: now, writer: hex.EncodeToString(b[:])}
	l.due.Store(trimEvery) // look once after each start
	l.dueRenewals.Store(trimRenewalsEvery)
	return l
}

// Append writes one record.
func (l *Log) Append(ctx context.Context, r Record) error {
	if _, err := l.store.Txn(ctx, nil, []store.Op{l.Op(r)}); err != nil {
		return fmt.Errorf("recording %s of %s: %w", r.Action, r.Subject, err)
	}
	return l.Trim(ctx)
}

// Op gives the write that records r, so that it can ride in the transaction of
// the change itself: then neither exists without the other. Its value is at
// most 128 KiB. Each call makes a new key.
func (l *Log) Op(r Record) store.Op {
	if r.Time.IsZero() {
		r.Time = l.now()
	}
	r.Time = r.Time.UTC()
	for _, f := range []*string{&r.Actor, &r.Origin, &r.Action, &r.Subject, &r.Result} {
		*f = cut(*f, MaxField)
	}
	r.Detail = cut(r.Detail, MaxDetail)
	value, err := json.Marshal(r)
	if err != nil { // strings and a time of our own
		panic(fmt.Sprintf("encoding an audit record: %v", err))
	}
	key := fmt.Sprintf("%020d-%010d-%s", max(0, r.Time.UnixNano()), l.seq.Add(1), l.writer)
	switch r.Action {
	case ActionRenew, ActionJWT:
		l.dueRenewals.Add(1)
		return store.Op{Key: renewalsPrefix + key, Value: value}
	case ActionIssue:
		key += routine
	}
	l.due.Add(1)
	return store.Op{Key: prefix + key, Value: value}
}

// cut shortens s to at most limit bytes at a character's edge, and says so.
func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	end := limit - len("… (1234567890 bytes more)")
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return fmt.Sprintf("%s… (%d bytes more)", s[:end], len(s)-end)
}

// Recent returns the newest n records but for renewals, newest first; n ≤ 0 means
// all.
func (l *Log) Recent(ctx context.Context, n int) ([]Record, error) { return l.read(ctx, prefix, n) }

// Renewals returns the newest n records of [ActionRenew] and [ActionJWT], newest
// first; n ≤ 0 means all.
func (l *Log) Renewals(ctx context.Context, n int) ([]Record, error) {
	return l.read(ctx, renewalsPrefix, n)
}

func (l *Log) read(ctx context.Context, prefix string, n int) ([]Record, error) {
	kvs, _, err := l.store.List(ctx, prefix)
	if err != nil {
		return nil, fmt.Errorf("reading the audit log: %w", err)
	}
	slices.Reverse(kvs)
	if n > 0 && len(kvs) > n {
		kvs = kvs[:n]
	}
	records := make([]Record, len(kvs))
	for i, kv := range kvs {
		if err := json.Unmarshal(kv.Value, &records[i]); err != nil {
			return nil, fmt.Errorf("reading audit record %s: %w", kv.Key, err)
		}
	}
	return records, nil
}

// Trim deletes the oldest records beyond the bounds of each kind. It costs
// nothing until this process has written some hundreds of records; whoever
// writes by Op calls it now and then.
func (l *Log) Trim(ctx context.Context) error {
	return errors.Join(l.trim(ctx, &l.due, trimEvery, prefix), l.trim(ctx, &l.dueRenewals, trimRenewalsEvery, renewalsPrefix))
}

func (l *Log) trim(ctx context.Context, due *atomic.Int64, every int64, prefix string) error {
	if n := due.Load(); n < every || !due.CompareAndSwap(n, 0) { // another call does it
		return nil
	}
	kvs, _, err := l.store.List(ctx, prefix)
	if err != nil {
		return fmt.Errorf("trimming the audit log: %w", err)
	}
	for ops := range slices.Chunk(expired(kvs), store.MaxOps) {
		_, err := l.store.Txn(ctx, nil, ops)
		if err != nil && !errors.Is(err, store.ErrConflict) {
			return fmt.Errorf("trimming the audit log: %w", err)
		}
	}
	return nil
}

// expired gives the deletes of all records that are beyond the bounds; kvs are
// ordered from the oldest.
func expired(kvs []store.KV) []store.Op {
	type room struct{ records, bytes int }
	changes, issues, renewals := room{MaxRecords, MaxBytes}, room{MaxRoutine, MaxRoutineBytes}, room{MaxRenewals, MaxRenewalsBytes}
	var ops []store.Op
	for _, kv := range slices.Backward(kvs) {
		left := &changes
		switch {
		case strings.HasPrefix(kv.Key, renewalsPrefix):
			left = &renewals
		case strings.HasSuffix(kv.Key, routine):
			left = &issues
		}
		left.records--
		left.bytes -= len(kv.Value)
		if left.records < 0 || left.bytes < 0 {
			ops = append(ops, store.Op{Key: kv.Key, Delete: true})
		}
	}
	return ops
}
