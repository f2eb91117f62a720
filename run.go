package rollout

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// inMemory are the names of the rollouts that run in this process on a Store of their own: two of one name would each
// decide for itself. It is the package's only shared state; see docs/decisions.md.
var inMemory sync.Map

// Ready loads the state, so that decisions are right from the first one on; before, they are stable with
// [ReasonNotLoaded]. Where nothing is stored there is nothing to wait for. It changes nothing in the Store and may be
// called at any time; Run does the same by itself.
func (r *Rollout) Ready(ctx context.Context) error {
	if r == nil {
		return errNil
	}
	st, _, err := r.load(ctx)
	if ctx.Err() == nil {
		r.noteStore(err)
	}
	if err != nil {
		return fmt.Errorf("rollout: %w", err)
	}
	if st == nil {
		return nil
	}
	r.follow(st, machine.Stands(st, r.plan), nil)
	return nil
}

var errNil = errors.New("rollout: the Rollout is nil")

// Run judges, promotes and rolls back, once a tick, until ctx ends; then it stores the last evidence and returns nil. It
// blocks: the goroutine it runs in is the caller's. While the Store fails it goes on with what it knows and raises
// nothing. It returns an error, at once, only if it cannot run at all: [ErrRunning].
//
// Rollback steps, checks and subscribers run in goroutines of Run. When ctx ends they are told by their own contexts, and
// Run waits a second for them: one that ignores its context is left behind.
func (r *Rollout) Run(ctx context.Context) error {
	if r == nil {
		return errNil
	}
	if !r.running.CompareAndSwap(false, true) {
		return ErrRunning
	}
	defer r.running.Store(false)
	if !r.shared {
		if _, taken := inMemory.LoadOrStore(r.name, r); taken {
			return fmt.Errorf("%w: another rollout called %q, and they share no Store", ErrRunning, r.name)
		}
		defer inMemory.Delete(r.name)
		r.logger().Warn("rollout: there is no Store: a restart forgets everything, also a rollback, and other processes decide by themselves", "rollout", r.name)
	}
	unregister, err := r.register()
	if err != nil {
		r.logger().Error("rollout: no metrics", "rollout", r.name, "err", err)
	}
	defer unregister()

	var work sync.WaitGroup
	for _, g := range r.gates {
		if g.kind == judge.Check {
			work.Go(func() { r.watchCheck(ctx, g) })
		}
	}
	for name := range r.o.Sources {
		work.Go(func() { r.watchSource(ctx, name) })
	}
	if r.shared {
		work.Go(func() { r.watch(ctx) })
	}
	work.Go(func() { r.tendAll(ctx, &work) })
	stop := make(chan struct{})
	var told sync.WaitGroup
	told.Go(func() { r.dispatch(stop) })

	r.loop(ctx, &work)

	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.storeTimeout())
	defer cancel()
	waitFor(&work)
	r.finish(last)
	close(stop)
	waitFor(&told)
	return nil
}

// waitFor waits for goroutines that were told to end, but not for ever.
func waitFor(g *sync.WaitGroup) {
	done := make(chan struct{})
	go func() { g.Wait(); close(done) }()
	t := time.NewTimer(stepGrace + stepGrace/2)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// startClock is where the time of a Run begins.
func (r *Rollout) startClock() {
	now := r.now()
	r.clock = clock{loaded: now, fresh: true, doubt: r.clock.doubt}
	r.mu.Lock()
	r.since = now                             // the time before, nobody has followed it here
	r.checks = map[string]judge.CheckResult{} // old answers prove nothing
	r.readings = map[string]*sourceReading{}
	r.mu.Unlock()
}

// loop ticks until ctx ends.
func (r *Rollout) loop(ctx context.Context, work *sync.WaitGroup) {
	r.startClock()
	ticker := time.NewTicker(r.o.Interval)
	defer ticker.Stop()
	steps, clearing := make(chan struct{}, 1), make(chan struct{}, 1)
	// A use of the Store that is under way when ctx ends is not cut short: it has a time-out of its own.
	unhurried, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(2*time.Second, cancel) })()
	for evaluate := true; ctx.Err() == nil; {
		if evaluate {
			r.tick(unhurried, &r.clock, false)
			r.clock.alarm, r.clock.woken = false, false
		} else {
			err := r.refresh(unhurried)
			r.noteStore(err)
		}
		r.logUnknown()
		if run, idle := r.stepsToRun(); run {
			select {
			case steps <- struct{}{}:
				work.Go(func() { r.runSteps(ctx, idle); <-steps })
			default:
			}
		}
		r.clearJournal(ctx, work, clearing)
		evaluate = true
		select {
		case <-ctx.Done():
		case <-ticker.C:
			if r.crowded() { // those that tick at one moment are in each other's way
				ticker.Reset(r.o.Interval*9/10 + time.Duration(mathrand.Int64N(int64(r.o.Interval/5)+1)))
			}
		case <-r.wake:
			r.clock.alarm, r.clock.woken = r.alarm.Swap(false), true
		case <-r.hint:
			evaluate = false // a hint may be of our own write: evaluating it would write again
		}
	}
}

// crowded reports whether several processes share the rollout.
func (r *Rollout) crowded() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known != nil && r.known.Live > 1
}

// finish stores the last evidence.
func (r *Rollout) finish(ctx context.Context) {
	r.tick(ctx, &r.clock, true)
}

// rival is what was last seen of the steps of a rollback, whoever runs them.
type rival struct {
	gen, term, beat uint64
	since           time.Time // nothing moved
}

// still reports whether nothing has moved in a state either. The nil rival has seen nothing stand still.
func (v *rival) still(st *machine.State) bool {
	return v != nil && v.gen == st.Gen && v.term == st.Term && v.beat == st.Beat
}

// How long the steps of a rollback may stand still before another process takes them over, and before one that has no
// step of the next one's name says so.
func (r *Rollout) stepsPatience(have bool) time.Duration {
	if have {
		return max(3*r.o.Interval, r.quiet)
	}
	return max(12*r.o.Interval, time.Minute)
}

// stepsToRun reports whether this process should run rollback steps, of whichever version: they are found by name. It
// takes over from another process where they stand still. idle: that is why, and where.
func (r *Rollout) stepsToRun() (run bool, idle *rival) {
	st := r.following()
	next, ok := machine.NextStep(st)
	if !ok {
		r.rival = rival{}
		return false, nil
	}
	if now := (rival{gen: st.Gen, term: st.Term, beat: st.Beat, since: r.rival.since}); now != r.rival {
		now.since = r.now()
		r.rival = now
	}
	have := r.canRun(next)
	if have && (st.Runner == "" || st.Runner == r.me()) {
		return true, nil
	}
	seen := r.rival
	return r.now().Sub(seen.since) >= r.stepsPatience(have), &seen
}

// clearing is what of the journal is settled: generations up to one, but for so many rings' effects.
type clearing struct {
	gen  uint64
	kept int
}

// clearJournal removes what is journalled of generations that are settled, once each.
func (r *Rollout) clearJournal(ctx context.Context, work *sync.WaitGroup, busy chan struct{}) {
	st := r.following()
	if st == nil || r.cleared == (clearing{st.Settled, st.KeptRings()}) {
		return
	}
	select {
	case busy <- struct{}{}:
	default:
		return
	}
	r.cleared = clearing{st.Settled, st.KeptRings()}
	work.Go(func() {
		defer func() { <-busy }()
		for attempt := 0; r.clear(ctx) != nil; attempt++ {
			if !sleep(ctx, backoff(attempt)) {
				return
			}
		}
	})
}

// watch passes the Store's hints on to the loop.
func (r *Rollout) watch(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		_, err := guard(ctx, stepGrace, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, r.store.Watch(ctx, r.headKey(), func() { signal(r.hint) })
		})
		if ctx.Err() != nil {
			return
		}
		r.logger().Warn("rollout: the Store's watch ended; it is looked at once a tick, and watched again", "rollout", r.name, "err", err)
		if !sleep(ctx, backoff(n)) {
			return
		}
	}
}

// logUnknown logs the first observation of a metric that the policy does not name.
func (r *Rollout) logUnknown() {
	if name := r.firstUnknown.Load(); name != nil && !r.unknownLogged {
		r.unknownLogged = true
		r.logger().Warn("rollout: an observation of a metric that no gate and not Policy.Metrics names is dropped, as all such are", "rollout", r.name, "metric", *name)
	}
}

// verb has an operator's wish carried out in the stored state. What may expose somebody, or settles what was, is for the
// generation that was known when it was called; what only lowers is for whichever is there.
func (r *Rollout) verb(ctx context.Context, v machine.Verb) error {
	if r == nil {
		return errNil
	}
	gen := uint64(0)
	r.mu.Lock()
	v.Checks, v.Units = r.checks, r.unitsLocked()
	switch {
	case v.Lowers():
		gen = anyGeneration
	case r.known != nil && r.running.Load(): // else what is known may be long ago
		gen = r.known.Gen
	}
	r.mu.Unlock()
	_, err := r.updateOf(ctx, gen, func(st *machine.State, standing machine.Standing) ([]machine.Event, error) {
		if standing != machine.Current {
			switch v.Name {
			case machine.VerbRollback, machine.VerbHold, machine.VerbRestart, machine.VerbWaive:
			default:
				return nil, fmt.Errorf("%w: %q, not %q; or another policy of it is in force", ErrVersion, st.Version, r.plan.Version)
			}
		}
		v.Now, v.Nonce = r.now(), randomText()
		events, err := machine.Apply(st, r.plan, v)
		if err != nil {
			return nil, fmt.Errorf("rollout: %s: %w", v.Name, err)
		}
		return events, nil
	})
	r.wakeUp()
	return err
}

// Approve lets a stage with Approval be left, once it is baked and proven. It returns [ErrStage] unless stage is the
// present one. The note says who and why; it is stored and shown.
func (r *Rollout) Approve(ctx context.Context, stage, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbApprove, Stage: stage, Note: note})
}

// Advance leaves a stage now: without its bake, its proof or its approval. It is refused with [ErrState] while a gate is
// Unhealthy, and with [ErrStage] unless stage is the present one.
func (r *Rollout) Advance(ctx context.Context, stage, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbAdvance, Stage: stage, Note: note})
}

// Hold stays in the present stage until [Rollout.Resume]. Gates stay armed, and the deadline's clock stands still.
func (r *Rollout) Hold(ctx context.Context, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbHold, Note: note})
}

// Resume ends a hold, whoever or whatever began it, and what [Rollout.SetPercent] set. After a gate's hold the evidence
// against the candidate starts anew.
func (r *Rollout) Resume(ctx context.Context, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbResume, Note: note})
}

// Rollback gives everybody the stable version. Once it has returned, no new decision in this process is Candidate,
// whatever the error; decisions given before keep their answers. If the Store does not take it the error is
// [ErrNotStored], and Run keeps writing it. Rollback steps run in Run. When Stuck, it tries the steps again.
func (r *Rollout) Rollback(ctx context.Context, note string) error {
	if r == nil {
		return errNil
	}
	in := &intent{note: note}
	r.mu.Lock()
	if r.known != nil {
		in.gen = r.known.Gen
	}
	r.mu.Unlock()
	r.latchHere(in)
	err := r.verb(ctx, machine.Verb{Name: machine.VerbRollback, Note: note})
	if err != nil {
		r.revokeHere(in.gen)
	}
	return err
}

// RollbackRing gives one ring the stable version until the rollout is restarted; the others stay as they are. Rollback
// steps do not run. A stage of this ring is held: advance past it, or restart.
func (r *Rollout) RollbackRing(ctx context.Context, ring, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbRollbackRing, Ring: ring, Note: note})
}

// SetPercent gives a ring a share of p percent, 0 allowed, and holds until [Rollout.Resume], which restores the stage's
// shares. Rings inside of it have at least as much, unless set themselves.
func (r *Rollout) SetPercent(ctx context.Context, ring string, p Percent, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbSetPercent, Ring: ring, Percent: float64(p), Note: note})
}

// Waive takes an operator's word for what a rollback cannot do by itself: a step, by its name; the undoing of an
// effect, by its key as the step's error has it; of all effects of a kind, as "undo:KIND"; of a ring, as "(undo RING)";
// or "(undo)" for all that is still journalled. It is not done, counts as done, and the rollback goes on, also where it
// is Stuck. It stays waived in a later rollback: a kind in the rings that are being undone now. It returns [ErrState]
// where there is no such step, and nil for what is waived already.
func (r *Rollout) Waive(ctx context.Context, step, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbWaive, Step: step, Note: note})
}

// Restart begins a new generation with this process's version, from the first stage and with nobody exposed. It is the
// only way to expose a version again that was rolled back. It is refused with [ErrState] while a rollback is not
// finished: try its steps again by [Rollout.Rollback], or do without one by [Rollout.Waive].
func (r *Rollout) Restart(ctx context.Context, note string) error {
	return r.verb(ctx, machine.Verb{Name: machine.VerbRestart, Note: note})
}
