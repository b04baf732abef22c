package insight

import (
	"sync"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/flow"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// maxDoors bounds the open doors whose use is counted. A sidecar can make up names.
const maxDoors = 10_000

// Use is how often something came through an open door that no rule allows.
type Use struct {
	Count uint64
	Last  time.Time
}

// doors counts what comes through open doors.
type doors struct {
	mu   sync.Mutex
	used map[doorKey]Use // guarded by mu
}

// doorKey is what let something pass that full enforcement would not: an open door
// or, where a deny only recorded, perhaps a rule.
type doorKey struct {
	ref     policy.RuleRef
	audited bool
}

// note counts a connection that only an open door let in, told by its destination.
func (d *doors) note(f *flow.Flow) {
	if f.Side != flow.Inbound || f.Effect != policy.Allow || f.Would != policy.Deny {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key := doorKey{f.Rule, !f.Audited.IsZero()}
	use, known := d.used[key]
	if !known && len(d.used) == maxDoors {
		return
	}
	if d.used == nil {
		d.used = map[doorKey]Use{}
	}
	use.Count++
	if f.Start.After(use.Last) {
		use.Last = f.Start
	}
	d.used[key] = use
}

// Door gives what came through an open door since this collector was made, wherever
// in its file the door has stood, as far as that can be told.
func (c *Collector) Door(door policy.RuleRef) Use {
	c.doors.mu.Lock()
	defer c.doors.mu.Unlock()
	var sum Use
	for key, use := range c.doors.used {
		ref := key.ref
		if key.audited && ref.Line != door.Line || ref.Set != door.Set || ref.Policy != door.Policy || ref.File != door.File {
			continue
		}
		sum.Count += use.Count
		if use.Last.After(sum.Last) {
			sum.Last = use.Last
		}
	}
	return sum
}
