package rollout

import (
	"context"
	"sync/atomic"

	"github.com/stagedrollout/rollout/internal/force"
)

// Package rollouttest forces decisions through these.
func init() {
	force.Rollout = func(r any, cohort uint8) (release func()) { return r.(*Rollout).force(Cohort(cohort)) }
	force.Context = func(ctx context.Context, r any, cohort uint8) context.Context {
		return forceIn(ctx, r.(*Rollout), Cohort(cohort))
	}
}

// force makes all new decisions be of cohort c, whatever becomes of the state, until release: the newest first.
func (r *Rollout) force(c Cohort) (release func()) {
	s := r.forcedSnapshot(c)
	r.mu.Lock()
	defer r.mu.Unlock()
	forced, seen := r.forced, r.snap.Load()
	r.forced = s
	r.showLocked(s)
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.forced = forced
		r.showLocked(seen)
		r.publishLocked() // what happened meanwhile
	}
}

// forceIn is a context in which r's decisions are of cohort c, and all others are as in ctx.
func forceIn(ctx context.Context, r *Rollout, c Cohort) context.Context {
	at := r.forcedSnapshot(c)
	s := &scope{Context: ctx, forced: []*snapshot{at}}
	if around := scopeOf(ctx); around != nil {
		s.records, s.base = around.records, around
		if around.base != nil {
			s.base = around.base
		}
		s.forced = append(s.forced, around.forced...)
	}
	return s
}

// decideForced is a test's answer for r in this scope, or that of the scope which the forcing was laid over, or a session's.
func (s *scope) decideForced(r *Rollout) (d Decision, ok bool) {
	for _, at := range s.forced {
		if at.r == r {
			who := s
			if s.base != nil {
				who = s.base
			}
			return at.decision(who.who(), 0), true
		}
	}
	if s.base != nil {
		return s.base.decide(r), true
	}
	return s.session.answerIn(s, r)
}

// forcedSnapshot answers with cohort c for everybody. Nothing is counted or recorded of it: its generation is none.
func (r *Rollout) forcedSnapshot(c Cohort) *snapshot {
	s := &snapshot{r: r, version: r.policy.Version, over: &atomic.Bool{}}
	for i, name := range r.plan.Rings {
		v := ringView{name: name, index: uint8(i), closed: true, fixed: pack(c == Candidate, c, ReasonForced, i, 0)}
		if i < len(r.policy.Rings) {
			v.match = r.policy.Rings[i].Match
			s.asks = s.asks || v.match != nil
		}
		s.rings = append(s.rings, v)
	}
	s.last = &s.rings[len(s.rings)-1]
	return s
}
