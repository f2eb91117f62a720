package rollout

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// intent is a rollback that is in force here and not stored yet.
type intent struct {
	gen      uint64 // 0: of whatever is loaded first
	note     string
	incident *machine.Incident // found by this process's own evidence
}

func (r *Rollout) key() string { return "rollout/" + r.name + "/state" }

// storeTimeout is for one use of the Store.
func (r *Rollout) storeTimeout() time.Duration { return max(r.o.Interval, 2*time.Second) }

// maxStray bounds the calls that a Store which ignores its context may leave behind.
const maxStray = 16

// use makes one use of the Store, and gives up on it when ctx ends or it takes too long, even if the Store does not.
func use[T any](ctx context.Context, r *Rollout, f func(context.Context) (T, error)) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, err
	}
	if !r.shared { // memory does not hang
		return f(ctx)
	}
	if r.stray.Load() >= maxStray {
		return zero, errors.New("the Store has not come back from earlier calls")
	}
	ctx, cancel := context.WithTimeout(ctx, r.storeTimeout())
	defer cancel()
	r.stray.Add(1)
	return guard(ctx, 0, func(ctx context.Context) (T, error) {
		defer r.stray.Add(-1)
		return f(ctx)
	})
}

// decoded is the state of one revision, which is never used for another.
type decoded struct {
	st  *machine.State
	rev uint64
}

// load reads the stored state, which the caller must not change; nil if there is none.
func (r *Rollout) load(ctx context.Context) (*machine.State, uint64, error) {
	type loaded struct {
		value []byte
		rev   uint64
	}
	got, err := use(ctx, r, func(ctx context.Context) (loaded, error) {
		v, rev, err := r.store.Load(ctx, r.key())
		return loaded{v, rev}, err
	})
	if err != nil {
		return nil, 0, fmt.Errorf("load %s: %w", r.key(), err)
	}
	if got.rev == 0 {
		return nil, 0, nil
	}
	if d := r.decoded.Load(); d != nil && d.rev == got.rev {
		return d.st, got.rev, nil
	}
	st, err := machine.Decode(r.name, got.value)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", r.key(), err)
	}
	r.decoded.Store(&decoded{st, got.rev})
	return st, got.rev, nil
}

// swap writes the state over revision old. An outcome that is unknown is looked up once: landed says whether this very
// write is there.
func (r *Rollout) swap(ctx context.Context, st *machine.State, old uint64) (landed bool, err error) {
	st.Writer, st.Op = r.incarnation, strconv.FormatUint(r.op.Add(1), 36)
	doc, err := st.Encode()
	if err != nil {
		return false, err
	}
	landed, err = use(ctx, r, func(ctx context.Context) (bool, error) {
		_, swapped, err := r.store.CompareAndSwap(ctx, r.key(), old, doc)
		return swapped, err
	})
	if err == nil {
		return landed, nil
	}
	err = fmt.Errorf("write %s: %w", r.key(), err)
	now, _, again := r.load(ctx)
	if again != nil {
		return false, err
	}
	if now != nil && now.Writer == st.Writer && now.Op == st.Op {
		return true, nil
	}
	return false, err
}

// look is the stored state and what this process would make of it.
type look struct {
	stored   *machine.State // nil if there is none
	rev      uint64
	st       *machine.State // the caller's own
	events   []machine.Event
	standing machine.Standing
	dirty    bool // st is not what is stored, and must be stored before it is followed
}

// latest loads the state and squares it with this process: where there is none, the newest one known, or a new one; one
// that is older than what was known before is joined with that; and a rollback in force here is one there, before
// anything else.
func (r *Rollout) latest(ctx context.Context) (look, error) {
	r.mu.Lock()
	known, intent := r.known, r.intent
	r.mu.Unlock()
	stored, rev, err := r.load(ctx)
	if ctx.Err() == nil || err == nil {
		r.noteStore(err)
	}
	if err != nil {
		return look{}, err
	}
	l := look{stored: stored, rev: rev}
	switch {
	case stored == nil && known == nil:
		l.st, l.dirty = machine.New(r.name, r.plan, randomText()), true
	case stored == nil, known != nil && older(stored, known):
		r.logger().Error("rollout: the Store went back to an older state; what was known is joined with it", "rollout", r.name)
		l.st, l.events = machine.Rejoin(stored, known, r.plan, randomText(), time.Now())
		l.dirty = true
	default:
		l.st = stored.Clone()
	}
	if intent != nil && (intent.gen == 0 || intent.gen == l.st.Gen) {
		more, err := machine.Apply(l.st, r.plan, machine.Verb{Name: machine.VerbRollback, Note: intent.note, Incident: intent.incident, Now: time.Now()})
		if err == nil && len(more) > 0 {
			l.events = append(l.events, more...)
			l.standing, l.dirty = machine.Stands(l.st, r.plan), true
			return l, nil // nothing new begins before it is stored
		}
	}
	if r.yields(l.st) {
		l.standing = machine.Yields(l.st, r.plan)
		return l, nil
	}
	ver := l.st.Ver
	standing, more := machine.Adopt(l.st, r.plan, randomText(), time.Now())
	l.standing, l.events = standing, append(l.events, more...)
	l.dirty = l.dirty || l.st.Ver != ver
	return l, nil
}

// patience is for how long a process sees no evaluation by another one, of the same version, that gave the rollout another
// policy than its own, before it takes over: three checkpoints of an idle rollout, whose interval may be the longer one.
func (r *Rollout) patience() time.Duration { return max(36*r.o.Interval, 3*time.Minute) }

// yields reports whether the state has another policy than this process, which had its own in force before: whoever came
// last is right, for as long as it evaluates.
func (r *Rollout) yields(st *machine.State) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	own := st.Version != r.plan.Version || st.Policy == r.plan.Policy && st.Assignment == r.plan.Assignment
	return !own && r.ruled && time.Since(r.moved) < r.patience()
}

// older reports whether state a was left behind by b.
func older(a, b *machine.State) bool { return a.Gen < b.Gen || a.Gen == b.Gen && a.Ver < b.Ver }

// noteStore remembers how the last use of the Store went, and logs a change.
func (r *Rollout) noteStore(err error) {
	r.mu.Lock()
	was := r.storeErr
	r.storeErr = err
	r.mu.Unlock()
	switch {
	case err != nil && was == nil:
		r.logger().Error("rollout: the Store cannot be used; the present shares stay and nothing advances", "rollout", r.name, "err", err)
		r.emit(nil, Event{Time: time.Now(), Kind: StoreFailed, Name: r.name, Err: err})
	case err == nil && was != nil:
		r.logger().Info("rollout: the Store is back", "rollout", r.name)
		r.emit(nil, Event{Time: time.Now(), Kind: StoreBack, Name: r.name})
	}
}

// update changes the stored state by f, until no other writer comes between, and follows the result. f may be called
// several times, each time with a state of its own.
func (r *Rollout) update(ctx context.Context, f func(*machine.State, machine.Standing) ([]machine.Event, error)) (*machine.State, error) {
	var gen uint64
	for {
		l, err := r.latest(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotStored, err)
		}
		if gen != 0 && l.st.Gen != gen {
			return nil, fmt.Errorf("rollout: overtaken: generation %d began meanwhile", l.st.Gen)
		}
		gen = l.st.Gen
		more, err := f(l.st, l.standing)
		if err != nil {
			return nil, err
		}
		if !l.dirty && len(more) == 0 && same(l.stored, l.st) {
			r.follow(l.stored, l.standing, nil)
			return l.st, nil
		}
		landed, err := r.swap(ctx, l.st, l.rev)
		if err != nil {
			if ctx.Err() == nil {
				r.noteStore(err)
			}
			return nil, fmt.Errorf("%w: %w", ErrNotStored, err)
		}
		if landed {
			r.follow(l.st, l.standing, append(l.events, more...))
			return l.st, nil
		}
	}
}

// same reports whether two states are the same document.
func same(a, b *machine.State) bool {
	x, errX := a.Encode()
	y, errY := b.Encode()
	return errX == nil && errY == nil && string(x) == string(y)
}

// follow makes a state that is stored the one that decisions follow, unless a newer one is followed already, and tells of
// the events that led to it.
func (r *Rollout) follow(st *machine.State, standing machine.Standing, events []machine.Event) {
	r.mu.Lock()
	if r.known == nil || !older(st, r.known) {
		if st.Writer != r.incarnation && (r.known == nil || st.Round != r.known.Round) {
			r.adopted = time.Now()
		}
		if r.known == nil || r.known.Round != st.Round || r.known.Gen != st.Gen {
			r.moved = time.Now()
		}
		r.ruled = r.ruled || standing == machine.Current && st.Policy == r.plan.Policy
		r.known, r.standing, r.stale = st, standing, false
		if r.latchAny {
			r.latch[st.Gen], r.latchAny = true, false
		}
		if r.intent != nil {
			if r.intent.gen == 0 {
				r.intent.gen = st.Gen
			}
			if st.Gen > r.intent.gen || st.Gen == r.intent.gen && st.Phase.Latched() {
				r.intent = nil
			}
		}
		if st.Phase.Latched() {
			r.latch[st.Gen] = true
		}
		r.publishLocked()
	}
	r.mu.Unlock()
	for _, e := range events {
		r.emit(st, r.event(st, e))
	}
}

// latchedLocked reports whether this process must not expose the candidate of the state, as it stands to it.
func (r *Rollout) latchedLocked(st *machine.State) bool {
	gen := st.Gen
	if r.standing == machine.Done { // it serves an earlier generation's
		for _, e := range st.Versions {
			if e.Version == r.plan.Version {
				gen = e.Gen
			}
		}
	}
	return r.latch[gen] || r.latchAny
}

// publishLocked swaps what decisions see, if it is no longer what the state asks for.
func (r *Rollout) publishLocked() {
	if r.forced != nil {
		return
	}
	everyone := len(r.plan.Rings) - 1
	st := r.known
	view := snapKey{}
	if st != nil {
		view = snapKey{gen: st.Gen, epoch: st.Epoch, version: st.Version}
	}
	switch {
	case r.latchAny, st != nil && r.latchedLocked(st):
		view.answer = pack(false, None, ReasonRolledBack, everyone, 0)
	case st == nil:
		view.answer = pack(false, None, ReasonNotLoaded, everyone, 0)
	case r.standing == machine.Done:
		view.answer = pack(true, None, ReasonCompleted, everyone, 0)
	case r.standing == machine.Passive:
		view.answer = pack(false, None, ReasonVersion, everyone, 0)
	case r.stale && st.Phase != machine.Completed:
		view.answer = pack(false, None, ReasonNotLoaded, everyone, 0)
	}
	if r.view == view && st != nil {
		return
	}
	r.view = view
	if view.answer != 0 {
		r.openLocked(r.fixedSnapshot(st, view.answer))
	} else {
		r.openLocked(r.newSnapshot(st))
	}
}

// snapKey names what a snapshot was made of.
type snapKey struct {
	gen, epoch uint64
	version    string
	answer     bits // for everybody, whatever the state says; 0: as the state says
}

// maxLedgers bounds the epochs whose evidence waits to be consumed.
const maxLedgers = 32

// openLocked makes s what decisions see. The evidence of the epoch before still comes in; what is older only waits to be
// consumed. That of another generation, or of a candidate that is rolled back or completed, counts no more.
func (r *Rollout) openLocked(s *snapshot) {
	counts := r.known != nil && (r.known.Phase == machine.Running || r.known.Phase == machine.Held) && !r.latchedLocked(r.known)
	var keep []*ledger
	for i, l := range r.ledgers {
		if !counts || l.snap.gen != r.known.Gen || len(r.ledgers)-i >= maxLedgers {
			r.retireLocked(l)
			continue
		}
		if i < len(r.ledgers)-1 {
			l.snap.over.Store(true)
		}
		keep = append(keep, l)
	}
	if !s.never {
		keep = append(keep, newLedger(s, time.Now()))
	}
	r.ledgers = keep
	r.snap.Store(s)
}

// sweep drops the ledgers that nothing comes into any more, once they are consumed.
func (r *Rollout) sweep(consumed []*ledger) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ledgers = slices.DeleteFunc(slices.Clone(r.ledgers), func(l *ledger) bool {
		if !l.snap.over.Load() || !slices.Contains(consumed, l) {
			return false
		}
		r.retireLocked(l)
		return true
	})
}

// snapshotOf is the snapshot of an epoch, for a parsed decision.
func (r *Rollout) snapshotOf(gen, epoch uint64) *snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.ledgers {
		if l.snap.gen == gen && l.snap.epoch == epoch {
			return l.snap
		}
	}
	s := r.fixedSnapshot(nil, 0)
	s.gen, s.epoch = gen, epoch
	if r.known != nil && r.known.Gen == gen {
		s.version = r.known.Version
	}
	return s
}

// tick is one evaluation: load, square, judge, store, follow. In the last one of a Run every block closes.
func (r *Rollout) tick(ctx context.Context, c *clock, last bool) {
	for range 4 {
		l, err := r.latest(ctx)
		if err != nil {
			r.cutOff(ctx, c)
			return
		}
		c.loaded = time.Now()
		if c.doubt != nil {
			if !r.settle(ctx, c, l) {
				return
			}
			continue
		}
		if l.standing != machine.Current && !l.dirty {
			r.follow(l.stored, l.standing, nil)
			return
		}
		k, next := &cut{at: time.Now()}, l.st
		if l.standing == machine.Current {
			k = r.cutFor(l.st, last)
			if c.gen != 0 && c.gen != l.st.Gen {
				c.stepped = k.at // the time before was another generation's
			}
			in := r.input(c, k)
			var more []machine.Event
			next, more = r.stepAsking(ctx, l.st, in)
			l.events = append(l.events, more...)
			news := len(l.events) + len(in.Blocks) + len(in.Outcomes) + len(in.Breaches)
			acted := !slices.Equal(next.Acted, l.st.Acted)
			if !l.dirty && !acted && news == 0 && k.at.Sub(c.stored) < 12*r.o.Interval {
				if l.st.Phase != machine.Running {
					c.stepped = k.at // time held does not count
				}
				r.follow(l.stored, l.standing, nil)
				return
			}
		}
		c.seq++
		next.Consume(r.incarnation, c.seq)
		d := &doubt{cut: k, next: next, rev: l.rev, seq: c.seq, standing: l.standing, events: l.events}
		landed, err := r.swap(ctx, next, l.rev)
		if err != nil {
			c.doubt = d
			r.noteStore(err)
			r.cutOff(ctx, c)
			return
		}
		if landed {
			r.commit(c, d, next)
			return
		}
	}
}

// clock is what the loop remembers of its own time and writes.
type clock struct {
	stepped time.Time // up to here time was accounted for in the stored state
	stored  time.Time // the last write
	loaded  time.Time // the last successful load
	gen     uint64    // of the last write
	seq     uint64    // of the last cut
	doubt   *doubt
}

// doubt is an evaluation of which it is not known whether its write has landed.
type doubt struct {
	cut      *cut
	next     *machine.State
	rev      uint64 // it was to replace
	seq      uint64
	standing machine.Standing
	events   []machine.Event
}

// settle finds out what became of the evaluation in doubt. If it is stored its evidence was consumed; if another write
// came before it, it never will be. Otherwise the very same write is tried again: until that is known, no other may take
// its evidence. It reports whether the tick can go on, with another look.
func (r *Rollout) settle(ctx context.Context, c *clock, l look) bool {
	d := c.doubt
	switch {
	case l.stored != nil && l.stored.Consumed(r.incarnation, d.seq):
		r.commit(c, d, l.stored)
		return true
	case l.rev != d.rev:
		c.doubt = nil
		return true
	}
	landed, err := r.swap(ctx, d.next, d.rev)
	if err != nil {
		r.noteStore(err)
		r.cutOff(ctx, c)
		return false
	}
	if landed {
		r.commit(c, d, d.next)
	}
	return true // not landed: another write came first, and the next look tells whether it was this one
}

// commit notes that an evaluation is stored, in st or in a state that came before it.
func (r *Rollout) commit(c *clock, d *doubt, st *machine.State) {
	c.doubt = nil
	d.cut.commit()
	c.stepped, c.stored, c.gen = d.cut.at, d.cut.at, d.next.Gen
	r.sweep(d.cut.ledgers)
	r.follow(st, d.standing, d.events)
}

// refresh follows what another process, or a verb, has stored, without an evaluation.
func (r *Rollout) refresh(ctx context.Context) {
	r.mu.Lock()
	known := r.known
	r.mu.Unlock()
	st, _, err := r.load(ctx)
	r.noteStore(err)
	if err != nil || st == nil {
		return
	}
	if known == nil || older(known, st) || !older(st, known) && st.Round != known.Round {
		standing := machine.Stands(st, r.plan)
		if r.yields(st) {
			standing = machine.Yields(st, r.plan)
		}
		r.follow(st, standing, nil)
	}
}

// cutFor reads the evidence of the state's generation. Ledgers that nothing comes into any more close, whatever they
// hold, and in the last tick of a Run all do.
func (r *Rollout) cutFor(st *machine.State, last bool) *cut {
	r.mu.Lock()
	ledgers := r.ledgers
	r.mu.Unlock()
	k := &cut{at: time.Now()}
	for _, l := range ledgers {
		if l.snap.gen == st.Gen {
			l.cut(k, l.snap.epoch == st.Epoch && !l.snap.over.Load(), last)
			k.ledgers = append(k.ledgers, l)
		}
	}
	return k
}

func (r *Rollout) input(c *clock, k *cut) machine.Input {
	r.mu.Lock()
	checks, since := r.checks, c.stepped
	if r.adopted.After(since) {
		since = r.adopted // another process has accounted for the time before
	}
	r.mu.Unlock()
	return machine.Input{
		Now: k.at, Elapsed: k.at.Sub(since), Blocks: k.blocks, Outcomes: k.outcomes, Breaches: k.breaches,
		Checks: checks, MayAdvance: true,
	}
}

// stepAsking is one step from st. MayAdvance is asked only where a share would rise.
func (r *Rollout) stepAsking(ctx context.Context, st *machine.State, in machine.Input) (*machine.State, []machine.Event) {
	next := st.Clone()
	events := machine.Step(next, r.plan, in)
	if r.policy.MayAdvance == nil || !machine.Raises(st, next) || r.mayAdvance(ctx, in.Now) {
		return next, events
	}
	in.MayAdvance = false
	next = st.Clone()
	return next, machine.Step(next, r.plan, in)
}

// mayAdvance asks the host. A panic, or no answer within a tick, is no.
func (r *Rollout) mayAdvance(ctx context.Context, now time.Time) bool {
	if !r.asking.CompareAndSwap(false, true) {
		return false // it has not come back from the last time
	}
	ctx, cancel := context.WithTimeout(ctx, r.o.Interval)
	defer cancel()
	ok, err := guard(ctx, 0, func(context.Context) (bool, error) {
		defer r.asking.Store(false)
		return r.policy.MayAdvance(now), nil
	})
	if err != nil {
		r.logger().Error("rollout: MayAdvance gave no answer; nothing advances", "rollout", r.name, "err", err)
	}
	return ok && err == nil
}

// cutOff is a tick without the Store: shares stay or fall, never rise. The evidence goes on being judged, and a rollback
// it calls for is in force here at once.
func (r *Rollout) cutOff(ctx context.Context, c *clock) {
	r.mu.Lock()
	st, standing := r.known, r.standing
	if r.o.Lease > 0 && time.Since(c.loaded) > r.o.Lease && !r.stale {
		r.stale = true
		r.publishLocked()
	}
	r.mu.Unlock()
	if st == nil || standing != machine.Current || ctx.Err() != nil {
		return
	}
	next := st.Clone()
	in := r.input(c, r.cutFor(st, false))
	in.MayAdvance = false
	machine.Step(next, r.plan, in)
	r.mu.Lock()
	latched := r.latchedLocked(st)
	r.mu.Unlock()
	if next.Phase.Latched() && !st.Phase.Latched() && !latched {
		r.logger().Error("rollout: rolled back here; the Store cannot be told yet", "rollout", r.name, "gate", next.Incident.Gate, "cause", next.Incident.Note)
		r.latchHere(&intent{gen: st.Gen, note: next.Incident.Note, incident: next.Incident})
	}
}

// latchHere takes every share to zero in this process, whatever is stored.
func (r *Rollout) latchHere(in *intent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if in.gen == 0 {
		r.latchAny = true
	}
	if in.gen != 0 {
		r.latch[in.gen] = true
	}
	r.intent = in
	r.publishLocked()
}

// checkTimeout is how long a Check may take.
func (r *Rollout) checkTimeout() time.Duration { return max(10*time.Second, r.o.Interval) }

// watchCheck asks one Check once a tick, and wakes Run when its answer changes.
func (r *Rollout) watchCheck(ctx context.Context, g Gate) {
	for {
		res := r.askCheck(ctx, g)
		if ctx.Err() != nil {
			return
		}
		if r.setCheck(g.name, res) {
			r.wakeUp()
		}
		if !sleep(ctx, r.o.Interval) {
			return
		}
	}
}

// askCheck asks a Check once. While one that did not return in time is still away, its answer is Inconclusive.
func (r *Rollout) askCheck(ctx context.Context, g Gate) judge.CheckResult {
	type answer struct {
		v   Verdict
		err error
	}
	away := make(chan struct{})
	asked, cancel := context.WithTimeout(ctx, r.checkTimeout())
	defer cancel()
	a, err := guard(asked, 0, func(ctx context.Context) (answer, error) {
		defer close(away)
		v, err := g.check(ctx)
		return answer{v, err}, nil
	})
	switch {
	case asked.Err() != nil: // an answer that comes too late is none
		late := judge.CheckResult{Cause: "no answer within " + r.checkTimeout().String()}
		if r.setCheck(g.name, late) {
			r.wakeUp()
		}
		select {
		case <-away:
		case <-ctx.Done():
		}
		return late
	case err != nil:
		return judge.CheckResult{Cause: err.Error()}
	case a.v == Unhealthy:
		cause := "it says unhealthy"
		if a.err != nil {
			cause = a.err.Error()
		}
		return judge.CheckResult{Verdict: judge.Unhealthy, Cause: cause, AtOnce: true}
	case a.err != nil:
		return judge.CheckResult{Cause: a.err.Error()}
	case a.v == Healthy:
		return judge.CheckResult{Verdict: judge.Healthy}
	}
	return judge.CheckResult{Cause: "it says " + a.v.String()}
}

// setCheck notes a Check's answer and reports whether it is a new one.
func (r *Rollout) setCheck(name string, res judge.CheckResult) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.checks[name] == res {
		return false
	}
	checks := make(map[string]judge.CheckResult, len(r.checks)+1)
	maps.Copy(checks, r.checks)
	checks[name] = res
	r.checks = checks
	return true
}
