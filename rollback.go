package rollout

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// RollbackStep undoes something that the candidate needed: a table, a setting, a queue. The steps of a policy run in
// order, once a generation and at least once each: a step that was under way when its process died is started again, so
// it must bear to run twice. [Incident.Key] is the same each time.
type RollbackStep struct {
	// Name tells the step from the others; a policy that is edited during a rollback keeps its names.
	Name string
	// Do undoes it. An error, a panic and a time-out are failures, to be tried again. It must return when ctx ends.
	Do func(ctx context.Context, in Incident) error
	// Timeout is for one attempt. Default: 1 minute.
	Timeout time.Duration
	// Attempts are made before the rollout is Stuck, with a pause in between that doubles from 1 s to 1 min. [Rollout.Rollback]
	// starts a new series. Default: 5.
	Attempts int
}

func (s RollbackStep) withDefaults() RollbackStep {
	if s.Timeout == 0 {
		s.Timeout = time.Minute
	}
	if s.Attempts == 0 {
		s.Attempts = 5
	}
	return s
}

// Incident is why a rollback happened, with its evidence.
type Incident struct {
	// Key is the same for every attempt at a step of this rollback, and different for any other: use it to make a step
	// idempotent. Empty outside of a step.
	Key string `json:"key,omitempty"`
	// Fence grows whenever another process takes the steps over: refuse what comes with a smaller one. Empty outside of a
	// step.
	Fence string `json:"fence,omitempty"`

	Name       string    `json:"name"` // of the rollout
	Version    string    `json:"version"`
	Generation uint64    `json:"generation"`
	Time       time.Time `json:"time"`
	Stage      string    `json:"stage"`
	Ring       string    `json:"ring,omitempty"`   // where one ring alone was rolled back
	Gate       string    `json:"gate,omitempty"`   // that was broken; empty for an operator's rollback
	Metric     string    `json:"metric,omitempty"` // of the gate
	Note       string    `json:"note,omitempty"`   // the operator's, or the gate's cause
	Candidate  Estimate  `json:"candidate"`
	Control    Estimate  `json:"control"`
	E          float64   `json:"e,omitempty"`     // the gate's evidence
	NeedE      float64   `json:"needE,omitempty"` // what it needed by itself

	// Rationales are what [Observation.Because] gave for the candidate's observations of Metric in this generation, in the
	// process that found the gate broken: the first ones, and some of the others; at most 16 KiB together.
	Rationales []string `json:"rationales,omitempty"`
}

// incident is the state's incident, or nil.
func (r *Rollout) incident(st *machine.State) *Incident {
	if st == nil || st.Incident == nil {
		return nil
	}
	return r.incidentOf(st.Incident)
}

func (r *Rollout) incidentOf(in *machine.Incident) *Incident {
	if in == nil {
		return nil
	}
	return &Incident{
		Name: r.name, Version: in.Version, Generation: in.Gen, Time: in.Time, Stage: in.Stage, Ring: in.Ring,
		Gate: in.Gate, Metric: in.Metric, Note: in.Note,
		Candidate: r.estimate(in.Gate, in.Candidate), Control: r.estimate(in.Gate, in.Control), E: in.E, NeedE: in.NeedE,
		Rationales: slices.Clone(in.Rationales),
	}
}

// runSteps runs the steps of a rollback until they are done, stuck, another process's to run, or ctx ends. The attempt is
// stored before it is made. idle: they stand still, because whoever ran them gives no sign of life, or because nobody has
// a step of the next one's name.
func (r *Rollout) runSteps(ctx context.Context, idle bool) {
	for attempt := 0; ctx.Err() == nil; {
		var i int
		var st *machine.State
		_, err := r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			i = -1
			if name, ok := machine.NextStep(s); ok {
				if _, have := r.step(name); have || idle {
					i = machine.BeginAttempt(s, r.incarnation, idle)
				} else if s.Runner == r.incarnation {
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
		if i < 0 {
			return
		}
		idle = false // the term is ours, or was lost
		cause := r.attempt(ctx, st, i)
		if ctx.Err() != nil && cause != "" {
			r.release(st)
			return // stopped, not failed: whoever comes next starts it again
		}
		failed := r.endAttempt(ctx, st, i, cause)
		if !failed {
			attempt = 0
			continue
		}
		if !sleep(ctx, backoff(st.Steps[i].Attempts-1)) {
			return
		}
	}
}

// release lets another process run the steps at once, instead of waiting for signs of life.
func (r *Rollout) release(st *machine.State) {
	ctx, cancel := context.WithTimeout(context.Background(), stepGrace)
	defer cancel()
	_, _ = r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
		if s.Gen == st.Gen && s.Term == st.Term {
			s.Runner = ""
		}
		return nil, nil
	})
}

// endAttempt stores how an attempt ended, however long the Store takes, and reports whether another one follows.
func (r *Rollout) endAttempt(ctx context.Context, st *machine.State, i int, cause string) (again bool) {
	step, known := r.step(st.Steps[i].Name)
	giveUp := cause != "" && (!known || st.Steps[i].Attempts >= step.Attempts)
	for attempt := 0; ; attempt++ {
		_, err := r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			if s.Gen != st.Gen || s.Term != st.Term {
				return nil, nil
			}
			return machine.EndAttempt(s, r.plan, r.now(), i, cause, giveUp), nil
		})
		if err == nil {
			return cause != "" && !giveUp
		}
		if !sleep(ctx, backoff(attempt)) {
			return false
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

// attempt makes one attempt at step i and returns why it failed.
func (r *Rollout) attempt(ctx context.Context, st *machine.State, i int) (cause string) {
	name := st.Steps[i].Name
	step, ok := r.step(name)
	if !ok {
		return "there is no step of this name in the policy"
	}
	in := *r.incidentOf(st.Incident)
	in.Key = fmt.Sprintf("%s/%d/%s", r.name, st.Gen, name)
	in.Fence = fmt.Sprintf("%020d", st.Term)
	ctx, cancel := context.WithTimeout(ctx, step.Timeout)
	defer cancel()
	var beats sync.WaitGroup
	beats.Go(func() { r.beat(ctx, cancel, st) })
	defer beats.Wait()
	defer cancel()
	_, err := guard(ctx, stepGrace, func(ctx context.Context) (struct{}, error) { return struct{}{}, step.Do(ctx, in) })
	if err != nil {
		return err.Error()
	}
	return ""
}

// beat shows once a tick that the runner of the steps is alive, and ends the attempt where another one has taken over.
func (r *Rollout) beat(ctx context.Context, cancel func(), st *machine.State) {
	for sleep(ctx, r.o.Interval) {
		_, _ = r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			if s.Gen != st.Gen || s.Term != st.Term || s.Phase != machine.RollingBack {
				cancel()
				return nil, nil
			}
			s.Beat++
			return nil, nil
		})
	}
}

// stepGrace is how long a callback may take to return after its context ended.
const stepGrace = time.Second

// backoff is the pause after the n-th failure, from 0: it doubles from 1 s to 1 min, half of it by chance.
func backoff(n int) time.Duration {
	d := min(time.Second<<min(n, 10), time.Minute)
	return d/2 + rand.N(d/2+1)
}

// sleep waits for d and reports whether ctx lasted.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// guard calls f in a goroutine of its own and waits for it until ctx ended and grace passed: what does not return then is
// left behind. A panic becomes an error with its stack.
func guard[T any](ctx context.Context, grace time.Duration, f func(context.Context) (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		var res result
		defer func() {
			if p := recover(); p != nil {
				res.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			}
			done <- res
		}()
		res.v, res.err = f(ctx)
	}()
	select {
	case res := <-done:
		return res.v, res.err
	case <-ctx.Done():
	}
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case res := <-done:
		return res.v, res.err
	case <-t.C:
		var zero T
		return zero, fmt.Errorf("it has not returned: %w", context.Cause(ctx))
	}
}
