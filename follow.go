package rollout

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// same reports whether two states are the same document.
func same(a, b *machine.State) bool {
	x, errX := a.Encode()
	y, errY := b.Encode()
	return errX == nil && errY == nil && string(x) == string(y)
}

// follow makes a state that is stored the one that decisions follow, unless a newer one is followed already, and tells of
// the events that led to it.
func (r *Rollout) follow(st *machine.State, standing machine.Standing, events []machine.Event) {
	r.followAt(st, standing, events, r.now())
}

// followAt is follow of a state that was written, or read, at a time.
func (r *Rollout) followAt(st *machine.State, standing machine.Standing, events []machine.Event, at time.Time) {
	var own []Event
	r.mu.Lock()
	told := toldSince(r.known, st)
	if others := len(told) - len(events); others >= 0 {
		told = told[:others] // what this process has done itself it tells with all there is
	} else {
		told = nil
	}
	r.retellLocked(st, told)
	heard := r.known != nil && !older(r.known, st) // it was read, and told, before whoever wrote it came to that
	for _, e := range events {
		if own = append(own, r.event(st, e)); !heard {
			r.queueLocked(own[len(own)-1])
		}
	}
	if r.known == nil || !wentBack(st, r.known) {
		if r.round != st.Round || r.known == nil || r.known.Gen != st.Gen {
			r.moved, r.round = r.now(), st.Round
		}
		r.followLocked(st, standing, at)
	}
	r.mu.Unlock()
	for _, e := range own {
		r.logEvent(e)
	}
}

// toldSince are the events by which a state came about that is newer than the one known.
func toldSince(known, st *machine.State) []machine.Told {
	if known == nil || !older(known, st) {
		return nil
	}
	i := slices.IndexFunc(st.Recent, func(t machine.Told) bool { return t.Ver > known.Ver })
	if i < 0 {
		return nil
	}
	return st.Recent[i:]
}

// retellLocked hands events of other processes to this one's subscribers. Whose they are has logged them.
func (r *Rollout) retellLocked(st *machine.State, told []machine.Told) {
	for _, t := range told {
		r.queueLocked(r.event(st, t.Event(st.Incident)))
	}
}

// followHead makes a head the one that decisions follow, if it is newer.
func (r *Rollout) followHead(st *machine.State) {
	r.mu.Lock()
	if r.known != nil && !older(r.known, st) {
		r.mu.Unlock()
		return
	}
	told := toldSince(r.known, st)
	if st.Phase.Latched() && (r.known == nil || !r.known.Phase.Latched()) {
		r.wakeUp() // to confirm it
	}
	if old := r.known; old != nil && old.Gen == st.Gen && old.Nonce == st.Nonce { // the last that is known of what a head is without
		st = st.Clone()
		st.Gates, st.Sources, st.Pace = old.Gates, old.Sources, old.Pace
	}
	standing := machine.Stands(st, r.plan)
	if st.Version == r.plan.Version && (st.Policy != r.plan.Policy || st.Assignment != r.plan.Assignment) && r.ruled {
		standing = machine.Yields(st, r.plan)
	}
	r.retellLocked(st, told)
	r.followLocked(st, standing, r.now())
	r.mu.Unlock()
}

func (r *Rollout) followLocked(st *machine.State, standing machine.Standing, at time.Time) {
	if r.known == nil || r.known.Gen != st.Gen || r.known.Ver != st.Ver {
		r.since = at
	}
	r.ruled = r.ruled || standing == machine.Current && st.Policy == r.plan.Policy
	r.known, r.standing, r.stale = st, standing, false
	r.calm.Store(st.Phase != machine.Running && st.Phase != machine.Held || !r.plan.Judge.Watchful(&st.Gates))
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
	r.sweepLocked(st)
	r.markLocked(st)
	r.revokeLocked()
	r.journal.settle(st)
	signal(r.turned)
}

// project brings the head up to a state that is stored.
func (r *Rollout) project(ctx context.Context, st *machine.State) error {
	if !r.shared || st == nil {
		return nil
	}
	r.mu.Lock()
	seen, rev := r.head, r.headRev
	r.mu.Unlock()
	for range 4 {
		if seen != nil && !older(seen, st) {
			return nil
		}
		head := st.Head(r.plan)
		value, err := head.Encode()
		if err != nil {
			return err
		}
		now, swapped, err := r.put(ctx, r.headKey(), rev, value)
		if err == nil && swapped {
			r.mu.Lock()
			r.head, r.headRev = head, now
			r.mu.Unlock()
			return nil
		}
		if seen, rev, err = r.loadHead(ctx); err != nil {
			return err
		}
	}
	return nil
}

// loadHead reads the head; nil if there is none.
func (r *Rollout) loadHead(ctx context.Context) (*machine.State, uint64, error) {
	value, rev, err := r.get(ctx, r.headKey())
	if err != nil {
		return nil, 0, err
	}
	r.mu.Lock()
	head, was := r.head, r.headRev
	r.mu.Unlock()
	if rev == 0 || rev == was {
		if rev == 0 {
			head = nil
		}
		return head, rev, nil
	}
	if head, err = machine.Decode(r.name, value); err != nil {
		return nil, 0, fmt.Errorf("%s: %w", r.headKey(), err)
	}
	r.mu.Lock()
	r.head, r.headRev = head, rev
	r.mu.Unlock()
	return head, rev, nil
}

// refresh follows what others, or a verb, have stored. The head is enough, but where steps are to be run, where this
// process's first document is not counted for certain, and where the head is behind.
func (r *Rollout) refresh(ctx context.Context) error {
	known := r.following()
	var head *machine.State
	if r.shared {
		var err error
		if head, _, err = r.loadHead(ctx); err != nil {
			return err
		}
		if head != nil && known != nil { // who knows nothing looks at what decides
			r.followHead(head)
		}
	}
	now := r.following()
	_, steps := machine.NextStep(now)
	p := &r.pub
	unconfirmed := p.acked != nil && !p.confirmed
	behind := head == nil || known == nil || older(head, known)
	r.mu.Lock()
	unconfirmed = unconfirmed || r.fork.open
	r.mu.Unlock()
	if !steps && !unconfirmed && !behind && r.standingNow() != machine.Follower {
		return nil
	}
	st, _, err := r.load(ctx)
	switch {
	case err != nil:
		return err
	case known != nil && (st == nil || wentBack(st, known)):
		return r.travelled(ctx)
	case st == nil:
		return nil
	}
	r.confirm(st)
	r.joins(st)
	standing := machine.Stands(st, r.plan)
	if r.yields(st) {
		standing = machine.Yields(st, r.plan)
	}
	if now == nil || older(now, st) || !older(st, now) && (st.Round != now.Round || st.Term != now.Term || st.Beat != now.Beat) {
		r.follow(st, standing, nil)
	}
	return r.project(ctx, st)
}
