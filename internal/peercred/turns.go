package peercred

import "context"

// turns bounds how many executables of one user are looked at at a time.
type turns struct {
	taken chan struct{} // cap maxTurns
	users int           // guarded by Inspector.mu; who has a turn or awaits one
}

// enter waits for a turn of a user and takes it; [ErrBusy] when ctx ends first, or
// when all turns there are for all users are taken.
func (i *Inspector) enter(ctx context.Context, uid uint32) error {
	t := i.await(uid)
	select {
	case t.taken <- struct{}{}:
	case <-ctx.Done():
		i.mu.Lock()
		defer i.mu.Unlock()
		i.forget(uid, t)
		return ErrBusy
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.looking >= maxLooking {
		<-t.taken
		i.forget(uid, t)
		return ErrBusy
	}
	i.looking++
	return nil
}

func (i *Inspector) await(uid uint32) *turns {
	i.mu.Lock()
	defer i.mu.Unlock()
	t := i.turns[uid]
	if t == nil {
		t = &turns{taken: make(chan struct{}, maxTurns)}
		if i.turns == nil {
			i.turns = make(map[uint32]*turns)
		}
		i.turns[uid] = t
	}
	t.users++
	return t
}

// leave gives back a turn that enter took.
func (i *Inspector) leave(uid uint32) {
	i.mu.Lock()
	defer i.mu.Unlock()
	t := i.turns[uid]
	<-t.taken
	i.looking--
	i.forget(uid, t)
}

// forget is called with mu held.
func (i *Inspector) forget(uid uint32, t *turns) {
	if t.users--; t.users == 0 {
		delete(i.turns, uid)
	}
}
