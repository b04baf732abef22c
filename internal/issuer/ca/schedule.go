package ca

import "time"

// schedule says from when on each anchor of a line signs, and returns the one
// that signs now; nil: all have expired. They come in the order they were
// published, and all replicas compute the same from the same records.
//
// An anchor becomes active at five sixths of its predecessor's life, but not
// before it has been published for a twelfth of that life, for a control plane
// that was down at the time; and at the latest when its predecessor ends. The
// successor of a tainted one waits for a third of the grace and no longer.
func (c *CA) schedule(all []*anchor, now time.Time) (active *anchor) {
	var before *anchor
	for _, a := range all {
		if !now.Before(a.cert.NotAfter) {
			continue
		}
		a.activeFrom = a.published
		if before != nil {
			a.activeFrom = c.handover(before, a)
		}
		if before == nil || !now.Before(a.activeFrom) {
			active = a
		}
		before = a
	}
	return active
}

func (c *CA) handover(from, to *anchor) time.Time {
	l := life(from.cert)
	at := made(from.cert).Add(l * 5 / 6)
	if known := to.published.Add(l / 12); known.After(at) {
		at = known
	}
	if at.After(from.cert.NotAfter) {
		at = from.cert.NotAfter
	}
	if from.taint != nil {
		soon := to.published
		if from.taint.At.After(soon) {
			soon = from.taint.At
		}
		if soon = soon.Add(c.cfg.TaintGrace / 3); soon.Before(at) {
			at = soon
		}
	}
	return at
}
