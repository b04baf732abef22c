package endpoint

import "sync"

// Feed is what one caller, or several who cannot be told apart, hold over time.
// It keeps the latest only, so a follower that is slow misses what is outdated
// and delays nobody. The zero value holds nothing yet.
type Feed struct {
	mu      sync.Mutex
	holding *Holding      // guarded by mu
	err     error         // guarded by mu
	news    chan struct{} // guarded by mu; closed by the next change; nil: nobody waits
}

// Set replaces what is held; it must not be changed afterwards.
func (f *Feed) Set(h *Holding) { f.change(h, nil) }

// Fail ends the holding: followers are told err and let go.
func (f *Feed) Fail(err error) { f.change(nil, err) }

func (f *Feed) change(h *Holding, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holding, f.err = h, err
	if f.news != nil {
		close(f.news)
		f.news = nil
	}
}

// Get returns what is held now and a channel that is closed by the next change.
// Without holding and error there is nothing yet.
func (f *Feed) Get() (h *Holding, news <-chan struct{}, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.news == nil {
		f.news = make(chan struct{})
	}
	return f.holding, f.news, f.err
}
