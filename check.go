package rollout

import (
	"context"
	"maps"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
)

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
