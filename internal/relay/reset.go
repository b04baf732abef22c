package relay

import "net"

// reset closes c so that its far end cannot take the end for a regular one: TCP
// with a reset, also below TLS, where the closing alert is left out then. A Unix
// socket knows no reset and is just closed.
func reset(c net.Conn) {
	inner := innermost(c)
	if l, ok := inner.(lingerer); ok {
		_ = l.SetLinger(0) // fails only if the connection is closed already
	}
	_ = inner.Close()
	_ = c.Close()
}

type lingerer interface{ SetLinger(sec int) error }

// innermost unwraps TLS and other layers that show what they wrap.
func innermost(c net.Conn) net.Conn {
	for {
		w, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return c
		}
		c = w.NetConn()
	}
}
