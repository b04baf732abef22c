package tunnel

import "time"

// What unproductive frames cost. A peer that works spends next to nothing: DATA
// in either direction earns, and time refills.
const (
	budgetMax     = 1024 // also the start
	budgetPerSec  = 100
	costFrame     = 1  // PING, SETTINGS, WINDOW_UPDATE, empty DATA, ignored types …
	costStream    = 16 // a stream that we ignore, a header block out of place
	earnReceived  = 1  // per DATA frame with data
	earnSent      = 4  // per DATA frame sent: the peer answers it with updates
	earnSentBytes = 1 << 10
)

// budget bounds the work a peer can cause without moving data: floods of control
// frames, empty frames, rapid resets. The session's mutex guards it.
type budget struct {
	left int
	last time.Time
}

// spend takes n; false if the peer has overdrawn.
func (b *budget) spend(n int, now time.Time) bool {
	if b.last.IsZero() {
		b.left, b.last = budgetMax, now
	}
	if d := now.Sub(b.last); d >= time.Second {
		b.earn(int(min(d.Seconds(), budgetMax) * budgetPerSec))
		b.last = now
	}
	b.left -= n
	return b.left >= 0
}

func (b *budget) earn(n int) { b.left = min(b.left+n, budgetMax) }
