package controlplane

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/catalog"
	"github.com/sallyport-mesh/sallyport/internal/insight"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// maxDoorNames bounds the workloads that are named of one open door.
const maxDoorNames = 100

// doorman tells which doors are open, who opened them, and how much they are used.
type doorman struct {
	catalog *catalog.Catalog
	flows   *insight.Collector

	mu     sync.Mutex
	rev    catalog.Rev                      // of opened; guarded by mu
	opened map[string]*sallyportv1.OpenDoor // :: name → who opened it; guarded by mu
}

// open lists the doors of a state that have not closed.
func (d *doorman) open(ctx context.Context, state *catalog.State, now time.Time) ([]*sallyportv1.OpenDoor, error) {
	var out []*sallyportv1.OpenDoor
	for _, s := range state.Sets {
		for _, x := range s.Defaults {
			if !x.Until.After(now) {
				continue
			}
			ref := policy.RuleRef{Set: s.Name, Policy: x.Name, File: x.File, Line: x.Line}
			door, err := d.whoOpened(ctx, state.Rev, s.Name, x.Name)
			if err != nil {
				return nil, err
			}
			door.Name, door.Location, door.Until = x.Name, ref.Location(), timestamppb.New(x.Until)
			door.To = state.Rules.DoorTo(ref, maxDoorNames)
			use := d.flows.Door(ref)
			if door.Used = use.Count; use.Count > 0 {
				door.LastUsed = timestamppb.New(use.Last)
			}
			out = append(out, door)
		}
	}
	return out, nil
}

// whoOpened looks a door up in the history, once for each revision in force.
func (d *doorman) whoOpened(ctx context.Context, rev catalog.Rev, set, name string) (*sallyportv1.OpenDoor, error) {
	known := d.remembered(rev, name)
	if known == nil {
		e, found, err := d.catalog.Since(ctx, set, func(s *policy.Set) bool {
			return slices.ContainsFunc(s.Defaults, func(x policy.Defaults) bool { return x.Name == name })
		})
		if err != nil {
			return nil, err
		}
		known = &sallyportv1.OpenDoor{}
		if found {
			known.Actor, known.Revision, known.Opened = e.Actor, e.Rev.String(), timestamppb.New(e.Time)
		}
		d.remember(rev, name, known)
	}
	return &sallyportv1.OpenDoor{Actor: known.Actor, Revision: known.Revision, Opened: known.Opened}, nil
}

// remembered gives what is known of a door under a revision, or nil.
func (d *doorman) remembered(rev catalog.Rev, name string) *sallyportv1.OpenDoor {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.rev != rev {
		return nil
	}
	return d.opened[name]
}

// remember keeps it while that revision is in force.
func (d *doorman) remember(rev catalog.Rev, name string, door *sallyportv1.OpenDoor) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.rev != rev || d.opened == nil {
		d.rev, d.opened = rev, map[string]*sallyportv1.OpenDoor{}
	}
	d.opened[name] = door
}
