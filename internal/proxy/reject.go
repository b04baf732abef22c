package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Limits of answering an HTTP client that cannot be connected.
const (
	headLimit   = 10 * time.Second // until its request head is there
	maxHead     = 64 << 10         // bytes of a request head
	lingerLimit = 2 * time.Second  // for it to take the answer
	maxLinger   = 1 << 20          // bytes of its body that are read and thrown away
)

// rejection is what an HTTP client of the app learns instead of a response of
// its destination. The JSON form is the body.
type rejection struct {
	Status     int    `json:"-"`
	Error      string `json:"error"`
	DecisionID string `json:"decision_id"`
	Reason     string `json:"reason,omitempty"`
}

// write answers the first HTTP/1 request on conn and closes conn. It waits for
// the request's head: an answer sent earlier could be lost with the reset that
// unread data causes. On error nothing was written and conn is open.
func (r rejection) write(ctx context.Context, conn net.Conn) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(headLimit)); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	head, err := readHead(conn)
	if err != nil {
		return fmt.Errorf("reading request head: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write(r.response(bytes.HasPrefix(head, []byte("HEAD ")))); err != nil {
		return nil // the client has gone: nobody to tell
	}
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil && ctx.Err() == nil {
		_ = conn.SetDeadline(time.Now().Add(lingerLimit))
		_, _ = io.CopyN(io.Discard, conn, maxLinger) // until the client has closed too
	}
	return nil
}

func (r rejection) response(noBody bool) []byte {
	body, err := json.Marshal(r)
	if err != nil { // strings always marshal
		body = []byte("{}")
	}
	body = append(body, '\n')
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"+
		"Connection: close\r\nSallyport-Decision-Id: %s\r\n\r\n",
		r.Status, http.StatusText(r.Status), len(body), r.DecisionID)
	if !noBody {
		b.Write(body)
	}
	return b.Bytes()
}

// errHTTP2 says that the client speaks HTTP/2, which has no room for an HTTP/1
// answer.
var errHTTP2 = errors.New("client speaks HTTP/2")

// readHead reads up to and including the empty line that ends a request's head.
func readHead(r io.Reader) ([]byte, error) {
	var head []byte
	buf := make([]byte, 4<<10)
	for {
		n, err := r.Read(buf)
		head = append(head, buf[:n]...)
		if bytes.HasPrefix(head, []byte("PRI * HTTP/2.0\r\n")) {
			return nil, errHTTP2
		}
		if bytes.Contains(head, []byte("\r\n\r\n")) || bytes.Contains(head, []byte("\n\n")) {
			return head, nil
		}
		if err != nil {
			return nil, err
		}
		if len(head) > maxHead {
			return nil, fmt.Errorf("head of more than %d bytes", maxHead)
		}
	}
}
