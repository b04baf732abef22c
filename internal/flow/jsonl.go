package flow

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
)

// JSONL appends records to a file, one JSON object per line. A disk that is
// slow or full costs records, which are counted, and never a connection.
type JSONL struct {
	file    *os.File // owned by Run once it has begun
	queue   chan Flow
	log     hclog.Logger
	dropped atomic.Uint64
	errors  atomic.Uint64
}

// OpenJSONL opens or creates the file at path (mode 0600: records name who
// talks to whom) for appending, with a queue of that many records.
func OpenJSONL(path string, queue int, log hclog.Logger) (*JSONL, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening flow log: %w", err)
	}
	return &JSONL{file: f, queue: make(chan Flow, max(queue, 1)), log: log}, nil
}

// Record implements [Sink].
func (j *JSONL) Record(f Flow) {
	select {
	case j.queue <- f:
	default:
		j.dropped.Add(1)
	}
}

// Dropped counts records lost to a full queue or a write error.
func (j *JSONL) Dropped() uint64 { return j.dropped.Load() + j.errors.Load() }

// Run writes until ctx ends, then writes what is queued and closes the file.
// The file is flushed whenever the queue is empty. Write errors are counted and
// logged once; the error returned is that of closing.
func (j *JSONL) Run(ctx context.Context) error {
	w := bufio.NewWriterSize(j.file, 64<<10)
	for ctx.Err() == nil {
		select {
		case f := <-j.queue:
			w = j.write(w, f)
		case <-ctx.Done():
		}
	}
	for {
		select {
		case f := <-j.queue:
			w = j.write(w, f)
			continue
		default:
		}
		break
	}
	if err := j.file.Close(); err != nil {
		return fmt.Errorf("closing flow log: %w", err)
	}
	return nil
}

// write adds f, flushes when nothing waits, and returns the writer to go on
// with: a bufio.Writer that has met an error takes nothing more.
func (j *JSONL) write(w *bufio.Writer, f Flow) *bufio.Writer {
	line, err := json.Marshal(f)
	if err == nil {
		_, err = w.Write(append(line, '\n'))
	}
	if err == nil && len(j.queue) == 0 {
		err = w.Flush()
	}
	if err == nil {
		return w
	}
	if j.errors.Add(1) == 1 {
		j.log.Error("writing the flow log; records are being lost", "file", j.file.Name(), "error", err)
	}
	return bufio.NewWriterSize(j.file, 64<<10)
}
