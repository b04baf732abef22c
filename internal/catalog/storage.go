package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/store"
)

// Keys, all under "catalog/":
//
//	current             the pointer: which revision is in force
//	history/EPOCH.N     one entry: which sets it is made of, who made it
//	blobs/SHA256        what is known of a blob: when it was written, its size
//	chunks/SHA256/I     its content, see blob.go
//	gc                  changes whenever a blob is deleted
//
// A change is one transaction: entry, pointer and audit record, on condition
// that pointer and gc are as they were when the change was begun. The blobs are
// there before. A blob is deleted on condition that the pointer is as it was
// when the references were counted, and with a write of gc: so no revision can
// refer to a deleted blob, whatever happens at the same time.
const (
	keyCurrent = "catalog/current"
	keyGC      = "catalog/gc"
	inHistory  = "catalog/history/"
	inBlobs    = "catalog/blobs/"
	inChunks   = "catalog/chunks/"
)

func historyKey(r Rev) string   { return fmt.Sprintf("%s%010d.%020d", inHistory, r.Epoch, r.N) }
func blobKey(sum string) string { return inBlobs + sum }
func chunkKey(sum string, i int) string {
	return fmt.Sprintf("%s%s/%04d", inChunks, sum, i)
}

// entry is the stored form of one revision. The pointer's value is a Rev.
type entry struct {
	Rev     Rev
	Time    time.Time
	Actor   string
	Origin  string
	Summary string
	Sets    map[string]string // :: set name → blob
}

// blobInfo is the value under blobKey.
type blobInfo struct {
	Time   time.Time
	Chunks int
	Size   int // stored bytes
}

// errOvertaken says that what a pointer names is gone, because newer revisions
// pushed it out of the history: read the pointer again.
var errOvertaken = errors.New("overtaken by newer revisions")

// base is what a change builds on.
type base struct {
	rev  Rev
	sets map[string]string // :: set name → blob
	cmps []store.Cmp       // hold while rev is in force and no blob was deleted
}

// readBase reads the revision in force. With nothing applied yet that is
// revision 0 of epoch 1, without sets.
func (c *Catalog) readBase(ctx context.Context) (base, error) {
	b := base{rev: Rev{Epoch: 1}, cmps: []store.Cmp{{Key: keyGC}, {Key: keyCurrent}}}
	// gc comes first: a deletion after this line makes the change conflict.
	gc, err := c.Store.Get(ctx, keyGC)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return b, err
	}
	b.cmps[0].Rev = gc.Rev
	pointer, err := c.Store.Get(ctx, keyCurrent)
	if errors.Is(err, store.ErrNotFound) {
		return b, nil
	}
	if err != nil {
		return b, err
	}
	b.cmps[1].Rev = pointer.Rev
	if err := decodeJSON(pointer, &b.rev); err != nil {
		return b, err
	}
	e, err := c.readEntry(ctx, b.rev)
	b.sets = e.Sets
	return b, err
}

func decodeJSON(kv store.KV, into any) error {
	if err := json.Unmarshal(kv.Value, into); err != nil {
		return fmt.Errorf("decoding %s: %w", kv.Key, err)
	}
	return nil
}

// encodeJSON encodes values of this file, which always can be.
func encodeJSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encoding %T: %v", v, err))
	}
	return data
}

// readEntry returns errOvertaken when the history no longer holds r.
func (c *Catalog) readEntry(ctx context.Context, r Rev) (entry, error) {
	var e entry
	kv, err := c.Store.Get(ctx, historyKey(r))
	if errors.Is(err, store.ErrNotFound) {
		return e, fmt.Errorf("reading revision %s: %w", r, errOvertaken)
	}
	if err != nil {
		return e, err
	}
	return e, decodeJSON(kv, &e)
}

// readBlob returns errOvertaken when the blob is gone.
func (c *Catalog) readBlob(ctx context.Context, sum string) (map[string][]byte, error) {
	kvs, _, err := c.Store.List(ctx, inChunks+sum+"/")
	if err != nil {
		return nil, err
	}
	if len(kvs) == 0 {
		return nil, fmt.Errorf("reading blob %s: %w", sum, errOvertaken)
	}
	chunks := make([][]byte, len(kvs))
	for i, kv := range kvs {
		chunks[i] = kv.Value
	}
	files, err := decode(chunks, sum)
	if err != nil {
		return nil, fmt.Errorf("reading blob %s: %w", sum, err)
	}
	return files, nil
}

// batch gathers writes up to what one transaction may hold.
type batch struct {
	ops  []store.Op
	size int
}

func (b *batch) fits(ops []store.Op) bool {
	return len(b.ops)+len(ops) <= store.MaxOps && b.size+sizeOf(ops) <= store.MaxValue
}

func (b *batch) add(ops ...store.Op) {
	b.ops = append(b.ops, ops...)
	b.size += sizeOf(ops)
}

func sizeOf(ops []store.Op) int {
	n := 0
	for _, op := range ops {
		n += len(op.Value)
	}
	return n
}

// commit lands e with the blobs it needs beyond b's, in as few transactions as
// they fit into: one for an everyday edit. Of several, only the last has any
// effect that a reader could see.
func (c *Catalog) commit(ctx context.Context, b base, e entry, sets map[string]*loaded, record store.Op) error {
	final := []store.Op{
		{Key: keyCurrent, Value: encodeJSON(e.Rev)},
		{Key: historyKey(e.Rev), Value: encodeJSON(e)},
		record,
	}
	known := map[string]bool{}
	for _, sum := range b.sets {
		known[sum] = true
	}
	var out batch
	enc := newEncoder()
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		set := sets[name]
		if known[set.sum] {
			continue
		}
		known[set.sum] = true
		for _, op := range c.blobOps(enc, set) {
			if err := c.flushUnless(ctx, &out, []store.Op{op}); err != nil {
				return err
			}
			out.add(op)
		}
	}
	if err := c.flushUnless(ctx, &out, final); err != nil {
		return err
	}
	_, err := c.Store.Txn(ctx, b.cmps, append(out.ops, final...))
	return err
}

// flushUnless writes what out holds, unless next fits in with it.
func (c *Catalog) flushUnless(ctx context.Context, out *batch, next []store.Op) error {
	if out.fits(next) {
		return nil
	}
	_, err := c.Store.Txn(ctx, nil, out.ops)
	*out = batch{}
	return err
}

// blobOps writes a set's files. They are written even where an older revision
// has them already: that costs little and resets their age.
func (c *Catalog) blobOps(enc encoder, set *loaded) []store.Op {
	chunks := enc.encode(set.files)
	info := blobInfo{Time: c.Now().UTC(), Chunks: len(chunks)}
	ops := make([]store.Op, 1, len(chunks)+1)
	for i, chunk := range chunks {
		info.Size += len(chunk)
		ops = append(ops, store.Op{Key: chunkKey(set.sum, i), Value: chunk})
	}
	ops[0] = store.Op{Key: blobKey(set.sum), Value: encodeJSON(info)} // first: what is begun is known
	return ops
}
