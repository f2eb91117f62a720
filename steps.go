package rollout

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// runSteps runs the steps of a rollback, and undoes what is journalled, until all is done, stuck, another process's to
// run, or ctx ends. The attempt is stored before it is made. idle: they stand still, because whoever ran them gives no
// sign of life, or because nobody has a step of the next one's name.
func (r *Rollout) runSteps(ctx context.Context, idle *rival) {
	if !r.awaitSessions(ctx) {
		return
	}
	behind, ok := r.awaitOthers(ctx)
	if !ok {
		return
	}
	for attempt := 0; ctx.Err() == nil; {
		var st *machine.State
		var step machine.StepState
		var at time.Time
		begun := false
		_, err := r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			begun, at = false, time.Now()
			if next, ok := machine.NextStep(s); ok {
				idle := idle.still(s) // nobody else has taken them over meanwhile
				if r.canRun(next) || idle {
					if i := machine.BeginAttempt(s, r.me(), idle); i >= 0 {
						begun, step = true, s.Steps[i]
						if s.Behind == nil && len(behind) > 0 {
							s.Behind = behind
						}
					}
				} else if s.Runner == r.me() {
					s.Runner = "" // for a process that has it
				}
			}
			st = s
			return nil, nil
		})
		if err != nil {
			if !sleep(ctx, backoff(attempt)) {
				return
			}
			attempt++
			continue
		}
		if !begun {
			return
		}
		idle = nil // the term is ours, or was lost
		end := r.attempt(ctx, st, step, at)
		if ctx.Err() != nil {
			end.Stopped = end.Cause != "" // not failed: whoever comes next starts it again
			r.release(st, end)
			return
		}
		attempts := step.Attempts
		if end.Effects > 0 {
			attempts = 1 // it is another effect that failed
		}
		end.GiveUp = end.Cause != "" && !end.Stopped && st.Phase == machine.RollingBack && attempts >= r.attempts(step) // a ring alone is never given up
		attempt = 0
		r.endAttempt(ctx, st, end)
		r.pause(ctx)
	}
}

// pause waits before the step that is to be made next, the longer the more often it has failed, or until it is another one
// or something was waived.
func (r *Rollout) pause(ctx context.Context) {
	was, waived := r.nextStep()
	if was.Attempts == 0 {
		return
	}
	t := time.NewTimer(backoff(was.Attempts - 1))
	defer t.Stop()
	for {
		select {
		case <-t.C:
			return
		case <-ctx.Done():
			return
		case <-r.turned:
			if now, waives := r.nextStep(); now != was || waives != waived {
				return
			}
		}
	}
}

// awaitOthers waits until every process that has counted something has confirmed the rollback: it serves nobody the
// candidate any more, and its sessions are over. It does not wait for longer than three ticks, and where somebody has
// sessions under way, or may have, their grace besides; it returns who has not. It reports whether ctx lasted.
func (r *Rollout) awaitOthers(ctx context.Context) (behind []string, ok bool) {
	for waited := time.Duration(0); ; {
		st := r.following()
		if !r.shared || !st.Phase.Latched() || len(st.Steps) == 0 || st.Steps[0].Attempts > 0 {
			return nil, ctx.Err() == nil
		}
		docs, _, err := r.documents(ctx, st)
		behind = nil
		limit := r.barrier
		if err != nil {
			limit += r.policy.Sessions.Grace
		}
		me := ""
		if own := r.counting.Load(); own != nil {
			me = *own
		}
		for _, inc := range slices.Sorted(maps.Keys(docs)) {
			d := docs[inc]
			if _, gone := st.Retired[inc]; !gone && inc != me && d.err == nil && !d.about.Sealed && d.about.Ack == 0 {
				behind = append(behind, inc)
				if len(d.about.Open) > 0 {
					limit = r.barrier + r.policy.Sessions.Grace
				}
			}
		}
		if err == nil && len(behind) == 0 || waited >= limit || r.barrier == 0 {
			return behind[:min(len(behind), maxBehind)], true
		}
		pause := min(r.o.Interval/4, time.Second) + time.Millisecond
		if !sleep(ctx, pause) {
			return nil, false
		}
		waited += pause
	}
}

// maxBehind bounds how many processes an incident names.
const maxBehind = 32

// nextStep is the step that this process is to make next as far as it knows, the zero value if none, and how much is waived.
func (r *Rollout) nextStep() (next machine.StepState, waives int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil || r.known.Runner != r.me() {
		return machine.StepState{}, 0
	}
	next, _ = machine.NextStep(r.known)
	return next, len(r.known.Waives)
}

// release stores how the last attempt of a Run ended, and lets another process run the steps at once, instead of waiting for
// signs of life.
func (r *Rollout) release(st *machine.State, end machine.Attempt) {
	ctx, cancel := context.WithTimeout(context.Background(), stepGrace)
	defer cancel()
	_, _ = r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
		if s.Term != st.Term {
			return nil, nil
		}
		s.Runner = ""
		return machine.EndAttempt(s, r.plan, r.now(), end), nil
	})
}

// endAttempt stores how an attempt ended, however long the Store takes.
func (r *Rollout) endAttempt(ctx context.Context, st *machine.State, end machine.Attempt) {
	for attempt := 0; ; attempt++ {
		_, err := r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			if s.Term != st.Term {
				return nil, nil
			}
			return machine.EndAttempt(s, r.plan, r.now(), end), nil
		})
		if err == nil || !sleep(ctx, backoff(attempt)) {
			return
		}
	}
}

func (r *Rollout) step(name string) (RollbackStep, bool) {
	for _, s := range r.policy.Rollback {
		if s.Name == name {
			return s, true
		}
	}
	return RollbackStep{}, false
}

// canRun reports whether this process has what a step takes.
func (r *Rollout) canRun(st machine.StepState) bool {
	if st.Undo {
		return len(r.policy.Undo) > 0
	}
	_, ok := r.step(st.Name)
	return ok
}

// attempts are how often a step is tried.
func (r *Rollout) attempts(st machine.StepState) int {
	if st.Undo {
		return undoAttempts
	}
	step, _ := r.step(st.Name)
	return step.Attempts
}

// errCutOff ends an attempt before another process may take over.
var errCutOff = errors.New("the Store has not answered for so long that another process may take over")

// attempt makes one attempt at a step, which was stored at a time, and returns how it ended.
func (r *Rollout) attempt(ctx context.Context, st *machine.State, step machine.StepState, at time.Time) machine.Attempt {
	ctx, cancel := context.WithCancelCause(ctx)
	var beats sync.WaitGroup
	beats.Go(func() { r.beat(ctx, cancel, st, step, at) })
	end := machine.Attempt{Name: step.Name, Gen: step.Gen}
	end.Cause, end.Effects = r.try(ctx, st, step)
	end.Stopped = end.Cause != "" && context.Cause(ctx) == errCutOff
	cancel(nil)
	beats.Wait()
	return end
}

// try makes an attempt and returns why it failed, and how many effects were undone.
func (r *Rollout) try(ctx context.Context, st *machine.State, step machine.StepState) (cause string, effects int) {
	if !r.awaitSessions(ctx) { // those of a rollback that was not known before the attempt was stored
		return context.Cause(ctx).Error(), 0
	}
	fence := fmt.Sprintf("%020d", st.Term)
	if step.Undo {
		return r.undo(ctx, st, step, fence)
	}
	do, ok := r.step(step.Name)
	if !ok {
		return "there is no step of this name in the policy", 0
	}
	var in Incident
	if st.Incident != nil {
		in = *r.incidentOf(st, st.Incident)
	}
	in.Key, in.Fence = fmt.Sprintf("%s/%d/%s", r.name, st.Gen, step.Name), fence
	limited, timeout := context.WithTimeout(ctx, do.Timeout)
	defer timeout()
	err := labelled(limited, randomText(), stepGrace, func(ctx context.Context) error { return do.Do(ctx, in) })
	if err != nil {
		r.logStack("a rollback step", err, "key", in.Key)
		return err.Error(), 0
	}
	return "", 0
}

// beat shows once a tick that the runner of the steps is alive, and ends the attempt where another one has taken over, or
// may do so soon because none of these signs was stored lately, or where the step needs none any more.
func (r *Rollout) beat(ctx context.Context, cancel context.CancelCauseFunc, st *machine.State, step machine.StepState, at time.Time) {
	lease := r.stepsPatience(true) * 2 / 3
	over := time.AfterFunc(time.Until(at.Add(lease)), func() { cancel(errCutOff) })
	defer over.Stop()
	for sleep(ctx, r.o.Interval) {
		_, err := r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			if s.Term != st.Term || !s.Needs(step.Name, step.Gen) {
				cancel(nil)
				return nil, nil
			}
			at = time.Now()
			s.Beat++
			return nil, nil
		})
		if err == nil {
			over.Reset(time.Until(at.Add(lease)))
		}
	}
}
