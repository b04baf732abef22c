package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// streamStall is how long a stream may be silent, and how long one line may
// take to be written.
const streamStall = 10 * time.Second

// stream writes a line every tick for as long as the caller listens.
func (s *shop) stream(stopping context.Context, w http.ResponseWriter, r *http.Request) {
	t := time.NewTicker(s.tick)
	defer t.Stop()
	for n := 1; ; n++ {
		if !writeLine(w, fmt.Sprintf("%s orders: tick %d", s.now().Format(time.TimeOnly), n)) {
			return
		}
		select {
		case <-t.C:
		case <-r.Context().Done():
			return
		case <-stopping.Done():
			return
		}
	}
}

// passStream passes the lines of a stream on and ends with a line that says why
// it ended.
func passStream(stopping context.Context, w http.ResponseWriter, r *http.Request, client *http.Client, url string) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	stalled := time.AfterFunc(streamStall, func() { cancel(fmt.Errorf("silent for %s", streamStall)) })
	defer stalled.Stop()
	release := context.AfterFunc(stopping, func() { cancel(errors.New("frontend stops")) })
	defer release()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		reply(w, nil, err)
		return
	}
	resp, err := client.Do(req)
	if err != nil {
		reply(w, nil, fmt.Errorf("asking orders: %w", err))
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxBody)) // only to say more
		reply(w, nil, &answerError{"orders", resp.StatusCode, resp.Status, string(body)})
		return
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		stalled.Reset(streamStall)
		if !writeLine(w, lines.Text()) {
			return
		}
	}
	why := lines.Err()
	if ctx.Err() != nil {
		why = context.Cause(ctx)
	}
	if why == nil {
		why = io.EOF
	}
	writeLine(w, fmt.Sprintf("frontend: the stream from orders ended: %v", why))
}

// writeLine sends one line at once; false means that the reader is gone.
func writeLine(w http.ResponseWriter, line string) bool {
	rc := http.NewResponseController(w)
	if err := rc.SetWriteDeadline(time.Now().Add(streamStall)); err != nil {
		return false
	}
	if _, err := io.WriteString(w, line+"\n"); err != nil {
		return false
	}
	return rc.Flush() == nil
}
