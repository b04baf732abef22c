package tunnel

// inflow is the window that we grant to the peer (RFC 9113 section 6.9), for the
// connection or for a stream. The session's mutex guards it.
type inflow struct {
	size int // what we grant when nothing is held
	left int // what the peer may still send
	owed int // read by the app (or discarded), not yet granted again
}

func newInflow(size int) inflow { return inflow{size: size, left: size} }

// take accounts for a received frame of n bytes; false if the peer had no right
// to send it.
func (f *inflow) take(n int) bool {
	if n > f.left {
		return false
	}
	f.left -= n
	return true
}

// give returns n consumed bytes and tells the increment to announce now: nothing
// until half a window has come together, so that updates stay rare.
func (f *inflow) give(n int) int {
	f.owed += n
	if f.owed < f.size/2 {
		return 0
	}
	n = f.owed
	f.owed = 0
	f.left += n
	return n
}

// outflow is the window that the peer grants to us; it can be negative after a
// SETTINGS frame (RFC 9113 section 6.9.2). The session's mutex guards it.
type outflow int64

// add applies an increment; false if the window overflows.
func (f *outflow) add(n int64) bool {
	*f += outflow(n)
	return *f <= maxWindow
}
