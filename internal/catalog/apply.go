package catalog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-mesh/sallyport/internal/audit"
	"github.com/sallyport-mesh/sallyport/internal/store"
	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// attempts bounds how often a change is merged again because another control
// plane on the same store was faster.
const attempts = 10

// errRootSet refuses to remove the root set: every policy folder is one.
var errRootSet = policy.Errors{{Msg: "the root set cannot be removed", Hint: "apply files that it shall hold instead, with one Workload at least"}}

// plan is a change in the form that apply works on.
type plan struct {
	action        string // for the audit log
	about         string // begins the summary; "" for an everyday edit
	actor, origin string
	dryRun        bool
	touches       []string // sets that nobody else may change meanwhile
	editing       bool     // refuse to take a set's last Workload
	watched       string   // the directory that is the one source and overrules others, or ""
	// merge gives the files of every set as they shall be, old being the state
	// in force.
	merge func(ctx context.Context, old *compiled) (map[string]map[string][]byte, error)
}

// Apply makes ch the content of the sets that it names, whole or not at all.
//
// It is refused with [policy.Errors] where files are wrong, with ErrTests where
// a policy test fails, with ErrInvariants where an Invariant does not hold, with ErrLastWorkload, ErrNoSet, ErrConflict, ErrTooLarge,
// with [policy.ErrNoWorkload] where no set would define a Workload any more, and
// with ErrWatched while a directory is watched; only a set that has no folder
// there may be removed then. The root set is never removed. Both outcomes leave
// an audit record, except for a dry run and for files that were in force already.
// An error of the store, a timeout for one, may leave open whether the change
// landed: applying it again does no harm.
func (c *Catalog) Apply(ctx context.Context, ch Change) (Result, error) {
	p := ch.plan()
	err := c.allowed(ch)
	if err == nil && slices.Contains(ch.Remove, "") {
		err = errRootSet
	}
	if err != nil {
		return Result{}, c.refuse(ctx, p, err)
	}
	r, err := c.run(ctx, p)
	if err == nil && len(ch.Remove) > 0 {
		c.wakeWatcher()
	}
	return r, err
}

// allowed returns ErrWatched where the watched directory would undo ch.
func (c *Catalog) allowed(ch Change) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.watched == nil || ch.DryRun {
		return nil
	}
	for _, name := range ch.Remove {
		if c.watched[name] {
			return fmt.Errorf("removing %s, which has a folder there: %w", title(name), ErrWatched)
		}
	}
	if len(ch.Sets) > 0 || len(ch.Remove) == 0 {
		return ErrWatched
	}
	return nil
}

// wakeWatcher lets the watcher of the directory, if any, look again.
func (c *Catalog) wakeWatcher() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rescan != nil {
		c.rescan()
	}
}

func (ch Change) plan() plan {
	p := plan{action: "policy.apply", actor: ch.Actor, origin: ch.Origin, dryRun: ch.DryRun, editing: true}
	if len(ch.Sets) == 0 {
		p.action = "policy.remove"
	}
	p.touches = slices.Sorted(maps.Keys(ch.Sets))
	p.touches = append(p.touches, ch.Remove...)
	p.merge = func(_ context.Context, old *compiled) (map[string]map[string][]byte, error) {
		files := old.files()
		for _, name := range ch.Remove {
			if _, ok := files[name]; !ok {
				return nil, fmt.Errorf("removing %s: %w (sets: %s)", title(name), ErrNoSet, titles(slices.Collect(maps.Keys(files))))
			}
			delete(files, name)
		}
		maps.Copy(files, ch.Sets)
		return files, nil
	}
	return p
}

func (k *compiled) files() map[string]map[string][]byte {
	all := make(map[string]map[string][]byte, len(k.sets))
	for name, l := range k.sets {
		all[name] = l.files
	}
	return all
}

// title names a set to people.
func title(set string) string {
	if set == "" {
		return "the root set"
	}
	return "set " + set
}

func titles(sets []string) string {
	if len(sets) == 0 {
		return "none"
	}
	slices.Sort(sets)
	names := make([]string, len(sets))
	for i, s := range sets {
		names[i] = s
		if s == "" {
			names[i] = "root"
		}
	}
	return strings.Join(names, ", ")
}

// Rollback makes the sets what they were at rev, as a new revision. It is
// checked, recorded and refused like [Catalog.Apply]; ErrNoRevision where the
// history does not hold rev.
func (c *Catalog) Rollback(ctx context.Context, rev Rev, actor, origin string) (Result, error) {
	p := plan{action: "policy.rollback", about: "rollback to " + rev.String(), actor: actor, origin: origin}
	p.merge = func(ctx context.Context, _ *compiled) (map[string]map[string][]byte, error) {
		return c.Files(ctx, rev)
	}
	c.mu.Lock()
	watched := c.watched != nil
	c.mu.Unlock()
	if watched {
		return Result{}, c.refuse(ctx, p, ErrWatched)
	}
	return c.run(ctx, p)
}

// run brings p to land. Changes made in this process take turns, so that only
// other control planes on the same store can make one start over.
func (c *Catalog) run(ctx context.Context, p plan) (Result, error) {
	select {
	case <-c.turn:
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return Result{}, ctx.Err()
	}
	var first base
	for try := range attempts {
		b, err := c.readBase(ctx)
		if err != nil {
			return Result{}, fmt.Errorf("reading the sets in force: %w", err)
		}
		if try == 0 {
			first = b
		}
		if set := overlap(p.touches, first.sets, b.sets); set != "" && p.watched == "" {
			return Result{}, c.refuse(ctx, p, fmt.Errorf("%s: %w", set, ErrConflict))
		}
		r, err := c.tryOnce(ctx, b, p)
		if !errors.Is(err, store.ErrConflict) && !errors.Is(err, errOvertaken) {
			return r, err
		}
		if err := pause(ctx, time.Duration(try+1)*(5*time.Millisecond+rand.N(10*time.Millisecond))); err != nil {
			return Result{}, err
		}
	}
	return Result{}, c.refuse(ctx, p, ErrConflict)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// overlap names a set of touches that differs between two states, or gives "".
func overlap(touches []string, before, after map[string]string) string {
	for _, name := range touches {
		if before[name] != after[name] {
			return title(name)
		}
	}
	return ""
}

// tryOnce merges p into b, checks the outcome and commits it.
func (c *Catalog) tryOnce(ctx context.Context, b base, p plan) (Result, error) {
	old, err := c.load(ctx, b.sets)
	if err != nil {
		return Result{}, fmt.Errorf("reading the sets in force: %w", err)
	}
	files, err := p.merge(ctx, old)
	if err != nil {
		return Result{}, c.refuseUnlessStore(ctx, p, err)
	}
	r := Result{Epoch: b.rev.Epoch, N: b.rev.N}
	next, err := c.check(old, files, p)
	if next != nil && next.key == old.key {
		r.Unchanged = true
		return r, nil
	}
	if err != nil {
		return r, c.refuse(ctx, p, err)
	}
	tests := policy.RunTests(next.rules, next.list())
	r.Tests, r.Diff = tests.String(), describe(old, next)
	if tests.Failed() {
		return r, c.refuse(ctx, p, fmt.Errorf("%w:\n%s", ErrTests, r.Tests))
	}
	if proof := policy.Prove(next.rules, next.list()); proof.Invariants > 0 {
		r.Tests += proof.String()
		if proof.Failed() {
			return r, c.refuse(ctx, p, fmt.Errorf("%w:\n%s", ErrInvariants, proof))
		}
	}
	if p.dryRun {
		return r, nil
	}
	rev := Rev{b.rev.Epoch, b.rev.N + 1}
	e := entry{Rev: rev, Time: c.Now().UTC(), Actor: p.actor, Origin: p.origin, Summary: summary(p, old, next), Sets: next.sums()}
	c.cache.put(next) // before anybody can be told of rev
	record := p.record(changed(old, next), "applied "+rev.String(), r.Diff)
	if err := c.commit(ctx, b, e, next.sets, c.Audit.Op(record)); err != nil {
		return Result{}, fmt.Errorf("storing revision %s: %w", rev, err)
	}
	c.Log.Info("policy sets changed", "revision", rev, "actor", p.actor, "origin", p.origin, "summary", e.Summary)
	c.tidy(ctx, rev)
	r.Epoch, r.N = rev.Epoch, rev.N
	return r, nil
}

// check parses and compiles files. The state comes with an error too, where it
// got as far as one.
func (c *Catalog) check(old *compiled, files map[string]map[string][]byte, p plan) (*compiled, error) {
	if len(files) > policy.MaxSets {
		return nil, fmt.Errorf("%d sets, of at most %d: %w", len(files), policy.MaxSets, ErrTooLarge)
	}
	size := 0
	for _, set := range files {
		for _, content := range set {
			size += len(content)
		}
	}
	if size > policy.MaxTreeSize {
		return nil, fmt.Errorf("%d bytes in all sets, of at most %d: %w", size, policy.MaxTreeSize, ErrTooLarge)
	}
	parsed := make(map[string]*loaded, len(files))
	for name, set := range files {
		parsed[name] = c.parse(name, set)
	}
	if p.editing {
		if err := p.lastWorkload(old.sets, parsed); err != nil {
			return nil, err
		}
	}
	maps.DeleteFunc(parsed, func(_ string, l *loaded) bool { return len(l.files) == 0 }) // a set without files is no set
	if len(parsed) == 0 {
		_, err := policy.Compile(c.TrustDomain, nil) // says that there is no Workload
		return nil, p.noWorkload(err)
	}
	next := compile(c.TrustDomain, parsed)
	return next, p.noWorkload(next.err)
}

// noWorkload says of a removal after which no set defines a Workload what is
// wrong with it; it returns any other err as it is.
func (p plan) noWorkload(err error) error {
	if p.action != "policy.remove" || !errors.Is(err, policy.ErrNoWorkload) {
		return err
	}
	return fmt.Errorf("removing %s would leave %w; define one in another set first", titles(p.touches), policy.ErrNoWorkload)
}

// lastWorkload refuses an edit that leaves a set without any Workload.
func (p plan) lastWorkload(before, after map[string]*loaded) error {
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if after[name].set == nil || after[name].workloads() > 0 || before[name].workloads() == 0 {
			continue
		}
		advice := "bring a Workload back"
		if name != "" && defined(after) {
			advice += " or, if the set shall go, "
			if p.watched != "" {
				advice += fmt.Sprintf("remove the folder %s and then ", filepath.Join(p.watched, name))
			}
			advice += fmt.Sprintf("run `sallyport set remove %s`", name)
		}
		return fmt.Errorf("%s: %w; %s", title(name), ErrLastWorkload, advice)
	}
	return nil
}

// defined reports whether any of sets defines a Workload.
func defined(sets map[string]*loaded) bool {
	for _, l := range sets {
		if l.workloads() > 0 {
			return true
		}
	}
	return false
}

// refuseUnlessStore records a refusal, unless err is one that a retry or the
// store's return would cure.
func (c *Catalog) refuseUnlessStore(ctx context.Context, p plan, err error) error {
	if errors.Is(err, ErrNoSet) || errors.Is(err, ErrNoRevision) {
		return c.refuse(ctx, p, err)
	}
	return err
}

// refuse records that p was refused for why, and returns why. When the record
// cannot be written, that is told with it.
func (c *Catalog) refuse(ctx context.Context, p plan, why error) error {
	if p.dryRun {
		return refusal{why}
	}
	if err := c.Audit.Append(ctx, p.record(p.touches, "refused", why.Error())); err != nil {
		return errors.Join(refusal{why}, err)
	}
	return refusal{why}
}

// refusal marks an error that was recorded and that trying again would not cure.
type refusal struct{ error }

// Unwrap gives the reason.
func (r refusal) Unwrap() error { return r.error }

func (p plan) record(sets []string, result, detail string) audit.Record {
	subject := titles(sets)
	if len(sets) == 0 {
		subject = "all sets"
	}
	return audit.Record{Actor: p.actor, Origin: p.origin, Action: p.action, Subject: subject, Result: result, Detail: detail}
}
