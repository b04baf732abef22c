package catalog

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// loaded is one set: its files, and what they mean. It is never changed.
type loaded struct {
	sum   string // digest of files
	files map[string][]byte
	set   *policy.Set // nil where err is set
	err   error
}

// workloads counts what l defines; l may be nil.
func (l *loaded) workloads() int {
	if l == nil || l.set == nil {
		return 0
	}
	return len(l.set.Workloads)
}

// compiled is a whole state of the sets. It is never changed.
type compiled struct {
	key   string             // names the content
	sets  map[string]*loaded // :: set name → set
	rules *policy.Ruleset    // never nil; empty where err is set
	err   error              // why the sets do not compile
}

// list gives the parsed sets by name, the root set first.
func (k *compiled) list() []*policy.Set {
	var sets []*policy.Set
	for _, name := range slices.Sorted(maps.Keys(k.sets)) {
		if s := k.sets[name].set; s != nil {
			sets = append(sets, s)
		}
	}
	return sets
}

// sums gives set name → blob.
func (k *compiled) sums() map[string]string {
	sums := make(map[string]string, len(k.sets))
	for name, l := range k.sets {
		sums[name] = l.sum
	}
	return sums
}

// fingerprint names the content of a state.
func fingerprint(sums map[string]string) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		b.WriteString(name + "=" + sums[name] + "\n")
	}
	return b.String()
}

// parse gives the set called name with these files; what any cached state has
// already is not parsed again.
func (c *Catalog) parse(name string, files map[string][]byte) *loaded {
	sum := digest(files)
	if was := c.cache.loadedSet(name, sum); was != nil {
		return was
	}
	l := &loaded{sum: sum, files: files}
	l.set, l.err = policy.ParseFiles(name, files)
	return l
}

// compile makes a state of sets. Mistakes of all sets are reported at once.
func compile(td spiffeid.TrustDomain, sets map[string]*loaded) *compiled {
	k := &compiled{sets: sets, rules: policy.NewRuleset(nil)}
	k.key = fingerprint(k.sums())
	var mistakes policy.Errors
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		err := sets[name].err
		var several policy.Errors
		switch {
		case errors.As(err, &several):
			mistakes = append(mistakes, several...)
		case err != nil:
			mistakes = append(mistakes, &policy.Error{File: name, Msg: err.Error()})
		}
	}
	if len(mistakes) > 0 {
		k.err = mistakes
		return k
	}
	if len(sets) == 0 {
		return k // nothing applied, or all sets removed: everything is denied
	}
	rules, err := policy.Compile(td, k.list())
	if err != nil {
		k.err = err
		return k
	}
	k.rules = rules
	return k
}

// cacheSize is how many states are kept ready: the one in force, the one being
// applied, and some for readers that lag.
const cacheSize = 4

// cache keeps the newest states, so that each is parsed and compiled once in
// this process.
type cache struct {
	mu     sync.Mutex
	states []*compiled // newest first
}

func (c *cache) get(key string) *compiled {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.states {
		if k.key == key {
			return k
		}
	}
	return nil
}

func (c *cache) put(k *compiled) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.states = slices.DeleteFunc(c.states, func(old *compiled) bool { return old.key == k.key })
	c.states = slices.Insert(c.states, 0, k)
	if len(c.states) > cacheSize {
		c.states = slices.Delete(c.states, cacheSize, len(c.states))
	}
}

// loadedSet finds a set in any cached state.
func (c *cache) loadedSet(name, sum string) *loaded {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.states {
		if l := k.sets[name]; l != nil && l.sum == sum {
			return l
		}
	}
	return nil
}

// load compiles the state that sums names, reading what is not cached. An error
// is the store's; the sets' own mistakes are in the state.
func (c *Catalog) load(ctx context.Context, sums map[string]string) (*compiled, error) {
	if k := c.cache.get(fingerprint(sums)); k != nil {
		return k, nil
	}
	sets := make(map[string]*loaded, len(sums))
	for name, sum := range sums {
		l := c.cache.loadedSet(name, sum)
		if l == nil {
			files, err := c.readBlob(ctx, sum)
			if err != nil {
				return nil, err
			}
			l = c.parse(name, files)
		}
		sets[name] = l
	}
	k := compile(c.TrustDomain, sets)
	c.cache.put(k)
	return k, nil
}
