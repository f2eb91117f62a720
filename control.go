package rollout

import (
	"context"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// intent is a rollback that is in force here and not stored yet.
type intent struct {
	gen      uint64 // 0: of whatever is loaded first
	note     string
	incident *machine.Incident // found by this process's own evidence
}

// tick is one evaluation: load, square, judge, store, follow. In the last one of a Run every block closes.
func (r *Rollout) tick(ctx context.Context, c *clock, last bool) {
	r.turnSlot(r.now())
	for range 4 {
		l, err := r.latest(ctx)
		if err != nil {
			r.cutOff(ctx, c)
			return
		}
		c.loaded = r.now()
		if c.doubt != nil {
			if !r.settle(ctx, c, l) {
				return
			}
			continue
		}
		if l.standing != machine.Current && !l.dirty && len(l.st.Cursors[r.me()].Open) == 0 {
			r.follow(l.stored, l.standing, nil)
			return
		}
		if _, dead := l.st.Retired[r.me()]; dead {
			r.sessions.forsake() // they have counted as failed
			r.reincarnate()
		}
		k, next := &cut{at: r.now()}, l.st
		var open []machine.Open
		if l.standing == machine.Current {
			k = r.cutFor(l.st, last)
			if c.gen != 0 && c.gen != l.st.Gen {
				c.stepped = k.at // the time before was another generation's
			}
			in := r.input(c, k)
			in.Dead = r.dead(l.st)
			r.addSources(l.st, &in)
			if !last {
				open = r.sessions.open(l.st.Gen)
			}
			was := l.st.Cursors[r.me()].Open
			var more []machine.Event
			sources, acted, phase := l.st.Sources, slices.Clone(l.st.Acted), l.st.Phase
			next, more = r.stepAsking(ctx, l.st, in)
			l.events = append(l.events, more...)
			news := len(l.events) + len(in.Blocks) + len(in.Outcomes) + len(in.Breaches)
			if in.Sources != nil && !sameTotals(in.Sources, sources) {
				news++
			}
			if !sameOpen(open, was) {
				news++
			}
			if !l.dirty && slices.Equal(next.Acted, acted) && news == 0 && k.at.Sub(c.stored) < 12*r.o.Interval {
				if phase != machine.Running {
					c.stepped = k.at // time held does not count
				}
				r.follow(l.stored, l.standing, nil)
				return
			}
		}
		c.seq++
		next.Consume(r.me(), c.seq, open)
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
	alarm   bool      // the tick is only for what must never happen
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
	case l.stored != nil && l.stored.Consumed(r.me(), d.seq):
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
	k := &cut{at: r.now(), alarm: r.clock.alarm}
	for _, l := range ledgers {
		if l.snap.gen == st.Gen {
			l.cut(k, st, last)
			k.ledgers = append(k.ledgers, l)
		}
	}
	k.reasons = r.rationales() // after the counts: each is kept before it is counted
	return k
}

func (r *Rollout) input(c *clock, k *cut) machine.Input {
	r.mu.Lock()
	checks, since, units := r.checks, c.stepped, r.unitsLocked()
	if r.adopted.After(since) {
		since = r.adopted // another process has accounted for the time before
	}
	r.mu.Unlock()
	return machine.Input{
		Now: k.at, Elapsed: k.at.Sub(since), Blocks: k.blocks, Outcomes: k.outcomes, Breaches: k.breaches,
		Checks: checks, Rationales: k.reasons, MayAdvance: true, Units: units,
	}
}

// stepAsking is one step from st, which is the caller's no more. MayAdvance is asked only where a share would rise.
func (r *Rollout) stepAsking(ctx context.Context, st *machine.State, in machine.Input) (*machine.State, []machine.Event) {
	if r.policy.MayAdvance == nil {
		return st, machine.Step(st, r.plan, in)
	}
	next := st.Clone()
	events := machine.Step(next, r.plan, in)
	if !machine.Raises(st, next) || r.mayAdvance(ctx, in.Now) {
		return next, events
	}
	in.MayAdvance = false
	return st, machine.Step(st, r.plan, in)
}

// mayAdvance asks the host. A panic, or no answer within a tick, is no.
func (r *Rollout) mayAdvance(ctx context.Context, now time.Time) bool {
	if !r.asking.CompareAndSwap(false, true) {
		return false // it has not come back from the last time
	}
	wait := r.o.Interval
	if r.virtual {
		wait = time.Minute // of real time, in which no tick passes
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
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
	if r.o.Lease > 0 && r.now().Sub(c.loaded) > r.o.Lease && !r.stale {
		r.stale = true
		r.publishLocked()
	}
	r.mu.Unlock()
	if st == nil || standing != machine.Current || ctx.Err() != nil {
		return
	}
	next := st.Clone()
	in := r.input(c, r.cutFor(st, false))
	r.addSources(st, &in)
	in.MayAdvance = false
	machine.Step(next, r.plan, in)
	r.mu.Lock()
	latched := r.latchedLocked(st)
	r.mu.Unlock()
	if next.Phase.Latched() && !st.Phase.Latched() && !latched {
		r.logger().Error("rollout: rolled back here; the Store cannot be told yet", "rollout", r.name, "gate", next.Incident.Gate, "cause", next.Incident.Note)
		r.latchHere(&intent{gen: st.Gen, note: next.Incident.Note, incident: next.Incident})
		r.revokeHere(st.Gen)
	}
}

// sign is when another process last gave a sign of life.
type sign struct {
	seq   uint64
	since time.Time
}

// dead are the incarnations with work under way that have given no sign of life for as long as one may be silent that
// writes at every checkpoint.
func (r *Rollout) dead(st *machine.State) []string {
	lives := map[string]sign{}
	var dead []string
	for inc, cur := range st.Cursors {
		if inc == r.me() || len(cur.Open) == 0 {
			continue
		}
		s := r.lives[inc]
		if s.seq != cur.Seq || s.since.IsZero() {
			s = sign{cur.Seq, r.now()}
		}
		lives[inc] = s
		if r.now().Sub(s.since) >= r.patience() {
			dead = append(dead, inc)
		}
	}
	r.lives = lives
	slices.Sort(dead)
	return dead
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
