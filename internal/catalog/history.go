package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// limits bound what the history keeps.
type limits struct {
	revisions int           // entries
	bytes     int           // stored bytes of the blobs that they refer to
	every     int64         // tidy up at each revision that this divides
	grace     time.Duration // age of a blob before it may be deleted
}

// History returns the newest limit revisions, newest first; limit ≤ 0 means all
// that are kept, some hundreds.
func (c *Catalog) History(ctx context.Context, limit int) ([]Entry, error) {
	b, err := c.readBase(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the history: %w", err)
	}
	entries, err := c.entries(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the history: %w", err)
	}
	slices.Reverse(entries)
	if limit > 0 && len(entries) > limit {
		entries = entries[:limit]
	}
	out := make([]Entry, len(entries))
	for i, e := range entries {
		out[i] = Entry{Rev: e.Rev, Time: e.Time, Actor: e.Actor, Origin: e.Origin, Summary: e.Summary, Current: e.Rev == b.rev}
	}
	return out, nil
}

// entries reads the whole history, oldest first.
func (c *Catalog) entries(ctx context.Context) ([]entry, error) {
	kvs, _, err := c.Store.List(ctx, inHistory)
	if err != nil {
		return nil, err
	}
	entries := make([]entry, len(kvs))
	for i, kv := range kvs {
		if err := decodeJSON(kv, &entries[i]); err != nil {
			return nil, err
		}
	}
	return entries, nil
}

// Current returns the revision in force; its N is zero while nothing was ever
// applied.
func (c *Catalog) Current(ctx context.Context) (Rev, error) {
	b, err := c.readBase(ctx)
	if err != nil {
		return Rev{}, fmt.Errorf("reading the current revision: %w", err)
	}
	return b.rev, nil
}

// Since returns the entry that brought what has finds in the set called name, and what
// every later one has held too; false when that was before all that the history
// holds, or is not there now.
func (c *Catalog) Since(ctx context.Context, name string, has func(*policy.Set) bool) (Entry, bool, error) {
	entries, err := c.entries(ctx)
	if err != nil {
		return Entry{}, false, fmt.Errorf("reading the history: %w", err)
	}
	asked := map[string]bool{} // :: blob → what has said of it
	for i, e := range slices.Backward(entries) {
		sum := e.Sets[name]
		found, known := asked[sum]
		if !known && sum != "" {
			if found, err = c.holds(ctx, name, sum, has); err != nil {
				return Entry{}, false, err
			}
			asked[sum] = found
		}
		if found {
			continue
		}
		if i == len(entries)-1 {
			return Entry{}, false, nil
		}
		e = entries[i+1]
		return Entry{Rev: e.Rev, Time: e.Time, Actor: e.Actor, Origin: e.Origin, Summary: e.Summary}, true, nil
	}
	if len(entries) > 0 && entries[0].Rev.N == 1 { // the history is whole
		e := entries[0]
		return Entry{Rev: e.Rev, Time: e.Time, Actor: e.Actor, Origin: e.Origin, Summary: e.Summary}, true, nil
	}
	return Entry{}, false, nil
}

// holds asks about a set as it was once. One that this version cannot read holds
// nothing.
func (c *Catalog) holds(ctx context.Context, name, sum string, has func(*policy.Set) bool) (bool, error) {
	l := c.cache.loadedSet(name, sum)
	if l == nil {
		files, err := c.readBlob(ctx, sum)
		if errors.Is(err, errOvertaken) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("reading the history: %w", err)
		}
		l = c.parse(name, files)
	}
	return l.set != nil && has(l.set), nil
}

// Files returns the sets as they were at rev: set name → file name → content.
// ErrNoRevision says that the history does not hold it. Nobody may change the
// contents.
func (c *Catalog) Files(ctx context.Context, rev Rev) (map[string]map[string][]byte, error) {
	e, err := c.readEntry(ctx, rev)
	if err != nil {
		return nil, noRevision(rev, err)
	}
	files := make(map[string]map[string][]byte, len(e.Sets))
	for name, sum := range e.Sets {
		if l := c.cache.loadedSet(name, sum); l != nil {
			files[name] = l.files
			continue
		}
		if files[name], err = c.readBlob(ctx, sum); err != nil {
			return nil, noRevision(rev, err)
		}
	}
	return files, nil
}

// noRevision names the error of somebody who asked for one revision.
func noRevision(rev Rev, err error) error {
	if errors.Is(err, errOvertaken) {
		return fmt.Errorf("revision %s: %w", rev, ErrNoRevision)
	}
	return fmt.Errorf("reading revision %s: %w", rev, err)
}

// tidy forgets what exceeds the limits, now and then. What goes wrong is tried
// again with a later revision, so it is only logged.
func (c *Catalog) tidy(ctx context.Context, rev Rev) {
	if rev.N%c.keep.every != 0 {
		return
	}
	err := c.prune(ctx)
	if err == nil {
		err = c.Audit.Trim(ctx)
	}
	if err != nil && !errors.Is(err, store.ErrConflict) {
		c.Log.Warn("tidying up the history of the policy sets did not work; it is tried again later", "error", err)
	}
}

// prune deletes the oldest entries beyond the limits, then the blobs that no
// entry refers to. ErrConflict says that somebody applied a change meanwhile.
func (c *Catalog) prune(ctx context.Context) error {
	b, err := c.readBase(ctx)
	if err != nil {
		return err
	}
	entries, err := c.entries(ctx)
	if err != nil {
		return err
	}
	blobs, err := c.blobs(ctx)
	if err != nil {
		return err
	}
	keep := c.kept(entries, blobs)
	var drop []store.Op
	for _, e := range entries[:len(entries)-keep] {
		if e.Rev != b.rev {
			drop = append(drop, store.Op{Key: historyKey(e.Rev), Delete: true})
		}
	}
	inForce := b.cmps[1:] // the pointer alone: deleting a blob changes gc
	for ops := range slices.Chunk(drop, store.MaxOps) {
		if _, err := c.Store.Txn(ctx, inForce, ops); err != nil {
			return err
		}
	}
	for _, e := range entries[len(entries)-keep:] {
		for _, sum := range e.Sets {
			delete(blobs, sum)
		}
	}
	for _, sum := range b.sets {
		delete(blobs, sum)
	}
	return c.deleteBlobs(ctx, inForce, blobs)
}

// blobs reads what is known of each stored blob: SHA-256 → what.
func (c *Catalog) blobs(ctx context.Context) (map[string]blobInfo, error) {
	kvs, _, err := c.Store.List(ctx, inBlobs)
	if err != nil {
		return nil, err
	}
	blobs := make(map[string]blobInfo, len(kvs))
	for _, kv := range kvs {
		var info blobInfo
		if err := decodeJSON(kv, &info); err != nil {
			return nil, err
		}
		blobs[kv.Key[len(inBlobs):]] = info
	}
	return blobs, nil
}

// kept counts the newest entries that stay within the limits, two at least: the
// one in force and the one to roll back to.
func (c *Catalog) kept(entries []entry, blobs map[string]blobInfo) int {
	n, size := 0, 0
	counted := map[string]bool{}
	for _, e := range slices.Backward(entries) {
		for _, sum := range e.Sets {
			if !counted[sum] {
				counted[sum] = true
				size += blobs[sum].Size
			}
		}
		if n == c.keep.revisions || n >= 2 && size > c.keep.bytes {
			break
		}
		n++
	}
	return n
}

// deleteBlobs deletes each of blobs, as long as inForce holds. Young ones stay:
// another control plane may be about to refer to them, and would have to start
// over.
func (c *Catalog) deleteBlobs(ctx context.Context, inForce []store.Cmp, blobs map[string]blobInfo) error {
	now := c.Now()
	for sum, info := range blobs {
		if now.Sub(info.Time) < c.keep.grace {
			continue
		}
		ops := []store.Op{{Key: blobKey(sum), Delete: true}, {Key: keyGC, Value: []byte(sum)}}
		for i := range info.Chunks {
			ops = append(ops, store.Op{Key: chunkKey(sum, i), Delete: true})
		}
		if _, err := c.Store.Txn(ctx, inForce, ops); err != nil {
			return err
		}
	}
	return nil
}
