package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The ledger's protocol is plain TCP with one line per message, and the server
// speaks first:
//
//	S: 220 ledger ready
//	C: RECORD order-1 1999
//	S: 250 ENTRY BALANCE
//	C: BALANCE
//	S: 250 ENTRIES BALANCE
//	C: QUIT
//	S: 221 bye
//
// Anything else is answered "500 …" and closes the connection.
const banner = "220 ledger ready"

const (
	ledgerIdle  = time.Minute // for the next command
	ledgerConns = 256         // connections at once; more wait
	ledgerLine  = 256         // bytes of one line
)

// book is what the ledger remembers; it dies with the process.
type book struct {
	mu      sync.Mutex
	entries int64 // guarded by mu
	balance int64 // in cents; guarded by mu
}

// record adds an entry and gives its number and the new balance.
func (b *book) record(cents int64) (entry, balance int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.entries++
	b.balance += cents
	return b.entries, b.balance
}

func (b *book) read() (entries, balance int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.entries, b.balance
}

// ledger serves the protocol on LISTEN_TCP until ctx is done.
func (s *shop) ledger(ctx context.Context) error {
	addr, err := s.setting("LISTEN_TCP")
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	var conns sync.WaitGroup
	defer conns.Wait()
	var b book
	slots := make(chan struct{}, ledgerConns)
	for {
		slots <- struct{}{}
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accepting: %w", err)
		}
		conns.Go(func() {
			defer func() { <-slots }()
			b.serve(ctx, conn)
		})
	}
}

// serve answers one connection and closes it; ctx ends it at once.
func (b *book) serve(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, ledgerLine), ledgerLine)
	for answer, more := banner, true; ; {
		if err := conn.SetDeadline(time.Now().Add(ledgerIdle)); err != nil {
			return
		}
		if _, err := fmt.Fprintf(conn, "%s\n", answer); err != nil || !more {
			return
		}
		if !lines.Scan() {
			return
		}
		answer, more = b.answer(lines.Text())
	}
}

// answer handles one command; more is false when the connection ends with it.
func (b *book) answer(line string) (answer string, more bool) {
	words := strings.Fields(line)
	switch {
	case len(words) == 3 && words[0] == "RECORD":
		cents, err := strconv.ParseInt(words[2], 10, 64)
		if err != nil || cents <= 0 {
			return "500 cents must be a number above zero", false
		}
		entry, balance := b.record(cents)
		return fmt.Sprintf("250 %d %d", entry, balance), true
	case len(words) == 1 && words[0] == "BALANCE":
		entries, balance := b.read()
		return fmt.Sprintf("250 %d %d", entries, balance), true
	case len(words) == 1 && words[0] == "QUIT":
		return "221 bye", false
	}
	return "500 want RECORD order cents, BALANCE or QUIT", false
}

// record makes one entry in the ledger at addr. It writes nothing before it has
// read the banner.
func record(ctx context.Context, addr string, c charge) (entry, balance int64, err error) {
	if len(strings.Fields(c.Order)) != 1 || strings.TrimSpace(c.Order) != c.Order {
		return 0, 0, fmt.Errorf("order %q: want one word", c.Order)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, lines, err := dialLedger(ctx, addr)
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "RECORD %s %d\n", c.Order, c.Cents); err != nil {
		return 0, 0, fmt.Errorf("writing to the ledger: %w", err)
	}
	answer, err := nextLine(lines)
	if err != nil {
		return 0, 0, fmt.Errorf("reading the ledger's answer: %w", err)
	}
	if _, err := fmt.Sscanf(answer, "250 %d %d", &entry, &balance); err != nil {
		return 0, 0, fmt.Errorf("the ledger answered %q", answer)
	}
	return entry, balance, nil
}

// dialLedger connects and reads the banner. The caller closes the connection,
// which ends with ctx's deadline.
func dialLedger(ctx context.Context, addr string) (net.Conn, *bufio.Scanner, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, fmt.Errorf("connecting to the ledger: %w", err)
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("connecting to the ledger: %w", err), conn.Close())
		}
	}
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, ledgerLine), ledgerLine)
	got, err := nextLine(lines)
	if err == nil && got != banner {
		err = fmt.Errorf("got %q", got)
	}
	if err != nil {
		_ = conn.Close()
		return nil, nil, fmt.Errorf("waiting for the ledger's banner: %w", err)
	}
	return conn, lines, nil
}

// errClosed is an orderly end where a line was due.
var errClosed = errors.New("the connection was closed")

func nextLine(lines *bufio.Scanner) (string, error) {
	if lines.Scan() {
		return lines.Text(), nil
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	return "", errClosed
}
