package rollout

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// talks is a policy whose first stage gives half of the units the candidate.
func talks(sp SessionPolicy) Policy {
	return Policy{
		Rings:    []Ring{{Name: "staff"}},
		Stages:   []Stage{{Percent: 50, GuardOnly: true}, {Percent: 100, GuardOnly: true}},
		Bake:     time.Hour,
		Holdback: 5,
		Gates:    []Gate{Errors.AtMost(50)},
		Sessions: sp,
	}
}

// of is a unit that has the given cohort.
func (p *process) of(c Cohort, groups ...string) Unit {
	p.t.Helper()
	for i := range 1000 {
		u := Unit{Key: fmt.Sprint("unit ", i), Groups: groups}
		if p.Peek(u).Cohort() == c {
			return u
		}
	}
	p.t.Fatalf("no unit is of cohort %v", c)
	return Unit{}
}

// outcomesOf are the outcomes of Errors in a ring: good and bad, of the control and of the candidate.
func outcomesOf(r *Rollout, ring string) (n [2][2]uint64) {
	i := r.policy.ringIndex(ring)
	for c := range n {
		cells := r.outcomes(i, c, errorsIndex)
		n[c] = [2]uint64{cells[0], cells[1]}
	}
	return n
}

// closed reports whether a channel is closed.
func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// TestSessionKeepsItsVersion: promotions, a hold and a lowered share leave a session as it is, in its context and in
// whatever is done within; its end is one outcome.
func TestSessionKeepsItsVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "x", talks(SessionPolicy{}), Options{})
		candidate, control := r.of(Candidate), r.of(Control)
		ctx, s := r.Begin(t.Context(), candidate)
		ctx2, s2 := r.Begin(t.Context(), control)
		check := func(when string) {
			t.Helper()
			for _, c := range []struct {
				ctx  context.Context
				s    *Session
				u    Unit
				want bool
			}{{ctx, s, candidate, true}, {ctx2, s2, control, false}} {
				if c.s.Decision().Enabled() != c.want || r.Enabled(c.ctx) != c.want || closed(c.s.Revoked()) {
					t.Errorf("%s: %v, in its context %v, revoked %v; want %v", when, c.s.Decision().Enabled(), r.Enabled(c.ctx), closed(c.s.Revoked()), c.want)
				}
				inside := NewContext(c.ctx, c.u)
				other := NewContext(c.ctx, Unit{Key: "somebody else"})
				if r.Enabled(inside) != c.want || r.Enabled(other) != r.Peek(Unit{Key: "somebody else"}).Enabled() {
					t.Errorf("%s: in a request inside %v, for another unit %v", when, r.Enabled(inside), r.Enabled(other))
				}
				_ = r.Do(c.ctx, c.u, func(context.Context) error {
					if !c.want {
						t.Errorf("%s: Do inside ran the candidate", when)
					}
					return nil
				}, func(context.Context) error {
					if c.want {
						t.Errorf("%s: Do inside ran stable", when)
					}
					return nil
				})
			}
		}
		check("begun")
		must(t, r.Hold(t.Context(), "wait"))
		must(t, r.SetPercent(t.Context(), Everyone, 0, "less"))
		check("lowered")
		must(t, r.Resume(t.Context(), "on"))
		must(t, r.Advance(t.Context(), "everyone 50 %", "on"))
		check("promoted")
		s.End(nil)
		s2.End(nil)
		if ctx.Err() == nil || context.Cause(ctx) != context.Canceled {
			t.Errorf("the context of a session that has ended: %v", context.Cause(ctx))
		}
	})
}

// TestSessionOutcomes: what counts as a failure, in which cohort, and that it counts once.
func TestSessionOutcomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quality := NewScore("quality", 0, 1)
		p := talks(SessionPolicy{})
		p.Metrics = []Metric{quality}
		r := start(t, "x", p, Options{IsFailure: func(err error) bool { return err.Error() != "fine" }})
		boom := errors.New("boom")
		want := [2][2]uint64{}
		for _, c := range []Cohort{Control, Candidate} {
			side := int(c - Control)
			end := func(err error, failed bool, obs ...Observation) {
				t.Helper()
				_, s := r.Begin(t.Context(), r.of(c))
				s.End(err, obs...)
				s.End(boom)
				want[side][bit(failed)]++
				if got := outcomesOf(r.Rollout, Everyone); got != want {
					t.Errorf("%v ended with %v: %v, not %v", c, err, got, want)
				}
			}
			end(nil, false, quality.Observe(.5))
			end(boom, true)
			end(errors.New("fine"), false)
			end(fmt.Errorf("stopped: %w", ErrRolledBack), false)
			end(context.Canceled, true) // nobody cancelled
			end(context.DeadlineExceeded, true)

			ctx, cancel := context.WithCancel(t.Context())
			sctx, s := r.Begin(ctx, r.of(c))
			cancel()
			s.End(sctx.Err())
			want[side][0]++

			// One that is never ended ends with its context.
			ctx, cancel = context.WithTimeout(t.Context(), time.Second)
			_, _ = r.Begin(ctx, r.of(c))
			time.Sleep(time.Minute)
			synctest.Wait()
			want[side][1]++
			if got := outcomesOf(r.Rollout, Everyone); got != want {
				t.Errorf("%v whose context ended: %v, not %v", c, got, want)
			}
			cancel()
			if got := sum(r.outcomes(1, side, 2)); got != 1 {
				t.Errorf("%v scores were counted", got)
			}
		}
		_, told := r.Begin(t.Context(), r.of(Candidate, "staff"))
		must(t, r.RollbackRing(t.Context(), "staff", ""))
		told.End(context.Canceled)
		if got := outcomesOf(r.Rollout, "staff")[1]; got != [2]uint64{1, 0} {
			t.Errorf("told to end, and counted as %v", got)
		}
		if st := r.Status(); st.Sessions != (SessionStatus{}) || st.Rings[1].Candidate != 8 || st.Rings[1].Control != 8 {
			t.Errorf("%+v, %+v", st.Sessions, st.Rings[1])
		}
	})
}

// TestSilentSessions: sessions that take an hour are not decisions that nothing came of.
func TestSilentSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "x", talks(SessionPolicy{}), Options{})
		for range 20 {
			_, s := r.Begin(t.Context(), r.of(Control))
			s.End(nil)
		}
		for i := range 400 {
			if d := r.Peek(Unit{Key: fmt.Sprint(i)}); d.Enabled() {
				_, _ = r.Begin(t.Context(), Unit{Key: fmt.Sprint(i)})
			} else {
				_, s := r.Begin(t.Context(), Unit{Key: fmt.Sprint(i)})
				s.End(nil)
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		r.is(Running, "everyone 50 %")
	})
}

// TestRevocation: how each policy revokes, and what becomes of the contexts.
func TestRevocation(t *testing.T) {
	for _, how := range []Revocation{FinishTurn, UntilEnd, AtOnce} {
		t.Run(how.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, "x", talks(SessionPolicy{OnRollback: how, Grace: 10 * time.Second}), Options{})
				cctx, c := r.Begin(t.Context(), r.of(Candidate))
				sctx, s := r.Begin(t.Context(), r.of(Control))
				must(t, r.Rollback(t.Context(), "stop"))
				synctest.Wait()
				if got, want := closed(c.Revoked()), how != UntilEnd; got != want {
					t.Errorf("revoked: %v", got)
				}
				if got := cctx.Err() != nil; got != (how == AtOnce) {
					t.Errorf("cut at once: %v", context.Cause(cctx))
				}
				if n := r.Status().Sessions; n.Candidate != 1 && how != AtOnce || n.Control != 1 || (n.Revoked == 1) != (how == FinishTurn) {
					t.Errorf("%+v", n)
				}
				time.Sleep(9900 * time.Millisecond)
				if got := cctx.Err() != nil; got != (how == AtOnce) {
					t.Errorf("cut before the grace was over: %v", context.Cause(cctx))
				}
				time.Sleep(200 * time.Millisecond)
				synctest.Wait()
				if how == UntilEnd {
					if cctx.Err() != nil {
						t.Errorf("cut: %v", context.Cause(cctx))
					}
				} else if context.Cause(cctx) != ErrRolledBack {
					t.Errorf("after the grace: %v", context.Cause(cctx))
				}
				if closed(s.Revoked()) || sctx.Err() != nil {
					t.Error("a session on the stable version was revoked")
				}
				late, l := r.Begin(t.Context(), r.of(None))
				if l.Decision().Enabled() || r.Enabled(late) || closed(l.Revoked()) {
					t.Error("a new session is on the candidate")
				}
				c.End(nil)
				s.End(nil)
				l.End(nil)
			})
		})
	}
}

// TestRevokedBy: everything that takes a candidate away revokes its sessions, and nothing else does.
func TestRevokedBy(t *testing.T) {
	type fixture struct {
		*process
		store Store
	}
	for name, c := range map[string]struct {
		do   func(t *testing.T, f fixture)
		want map[string]bool // by the unit's group
	}{
		"hold":       {func(t *testing.T, f fixture) { must(t, f.Hold(t.Context(), "")) }, nil},
		"step back":  {func(t *testing.T, f fixture) { must(t, f.SetPercent(t.Context(), Everyone, 1, "")) }, nil},
		"other ring": {func(t *testing.T, f fixture) { must(t, f.RollbackRing(t.Context(), "staff", "")) }, map[string]bool{"staff": true}},
		"restart":    {func(t *testing.T, f fixture) { must(t, f.Restart(t.Context(), "")) }, map[string]bool{"staff": true, "": true}},
		"rollback":   {func(t *testing.T, f fixture) { must(t, f.Rollback(t.Context(), "")) }, map[string]bool{"staff": true, "": true}},
		"completion": {func(t *testing.T, f fixture) { f.completeAll(2) }, nil},
		"a later rollback": {func(t *testing.T, f fixture) {
			f.completeAll(2)
			must(t, f.Rollback(t.Context(), ""))
		}, map[string]bool{"staff": true, "": true}},
		"new version": {func(t *testing.T, f fixture) {
			p := talks(SessionPolicy{})
			p.Version = "next"
			start(t, "x", p, Options{Store: f.store})
			minute()
		}, map[string]bool{"staff": true, "": true}},
		"new version after completion": {func(t *testing.T, f fixture) {
			f.completeAll(2)
			p := talks(SessionPolicy{})
			p.Version = "next"
			next := start(t, "x", p, Options{Store: f.store})
			must(t, next.Restart(t.Context(), ""))
			minute()
		}, nil},
		"another process's rollback": {func(t *testing.T, f fixture) {
			must(t, start(t, "x", talks(SessionPolicy{}), Options{Store: f.store}).Rollback(t.Context(), ""))
			synctest.Wait()
		}, map[string]bool{"staff": true, "": true}},
		"a rollback that is not stored": {func(t *testing.T, f fixture) {
			f.store.(*faulty).set(down, down, nil)
			if err := f.Rollback(t.Context(), ""); !errors.Is(err, ErrNotStored) {
				t.Fatal(err)
			}
		}, map[string]bool{"staff": true, "": true}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &faulty{Store: MemStore()}
				f := fixture{start(t, "x", talks(SessionPolicy{Grace: time.Hour}), Options{Store: store}), store}
				sessions := map[string]*Session{}
				for _, group := range []string{"staff", ""} {
					_, sessions[group] = f.Begin(t.Context(), f.of(Candidate, group))
				}
				c.do(t, f)
				for group, s := range sessions {
					if got := closed(s.Revoked()); got != c.want[group] {
						t.Errorf("%q is revoked: %v", group, got)
					}
					s.End(nil)
				}
				store.set(nil, nil, nil)
			})
		})
	}
}

// completeAll advances through n stages.
func (p *process) completeAll(n int) {
	p.t.Helper()
	for range n {
		must(p.t, p.Advance(p.t.Context(), p.Status().Stage.Name, "enough"))
	}
	p.is(Completed, "")
}

// TestStepsOfAnother: a process that has counted nothing waits with the steps for the sessions of the only one that has.
func TestStepsOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var done atomic.Bool
		p := talks(SessionPolicy{Grace: 10 * time.Minute})
		p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error { done.Store(true); return nil }}}
		r := start(t, "x", p, Options{Store: store})
		start(t, "x", p, Options{Store: store})
		_, s := r.Begin(t.Context(), r.of(Candidate))
		minute()
		must(t, r.Rollback(t.Context(), "stop"))
		minute()
		if done.Load() {
			t.Error("a step was made while a session of the candidate goes on")
		}
		s.End(nil)
		minute()
		if r.is(RolledBack, ""); !done.Load() {
			t.Error("no step was made")
		}
	})
}

// TestStepsAwaitNewlyRevoked: a process that is about to undo a ring's effects, and learns of the rollback of everybody only as
// it stores its attempt, waits for the sessions that this revokes.
func TestStepsAwaitNewlyRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &ward{store: &faulty{Store: MemStore()}}
		p := w.policy()
		p.Sessions.Grace = 30 * time.Second
		var begun atomic.Int64
		p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error { begun.Store(time.Now().UnixNano()); return nil }}}
		w.process = start(t, "x", p, Options{Store: w.store})
		w.journal(w.Decide(w.of(Candidate, "staff")), "order staff")
		w.failing(func(context.Context, Effect) error { return errors.New("never") })
		must(t, w.RollbackRing(t.Context(), "staff", ""))
		minute()
		_, s := w.Begin(t.Context(), w.of(Candidate))
		other := lone(t, p, Options{Store: w.store.Store})
		must(t, other.Ready(t.Context()))
		at := time.Now()
		must(t, other.Rollback(t.Context(), "stop"))
		w.failing(nil)
		minute()
		w.is(RolledBack, "")
		if waited := time.Unix(0, begun.Load()).Sub(at); waited < 30*time.Second {
			t.Errorf("a step was made %v after the rollback, while a session went on", waited)
		}
		s.End(nil)
	})
}

// TestRevokedAfterStored: Revoked closes after the intent is stored, and before any rollback step.
func TestRevokedAfterStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *Session
		var rolling, early, late atomic.Bool
		p := talks(SessionPolicy{})
		p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error {
			late.Store(!closed(s.Revoked()))
			return nil
		}}}
		store := &faulty{Store: MemStore()}
		r := start(t, "x", p, Options{Store: store})
		_, s = r.Begin(t.Context(), r.of(Candidate))
		store.set(nil, func(context.Context) error {
			_ = r.Ready(context.Background()) // follows what is stored, whatever is in force here
			if closed(s.Revoked()) && !inStore(t, store.Store).Phase.Latched() {
				early.Store(true)
			}
			if rolling.Load() && served(r.Rollout) {
				t.Error("exposed while the intent is being stored")
			}
			return nil
		}, nil)
		r.latchHere(&intent{gen: 1, note: "stop"}) // as Rollback begins
		rolling.Store(true)
		must(t, r.Rollback(t.Context(), "stop"))
		s.End(nil)
		minute()
		r.is(RolledBack, "")
		if early.Load() || late.Load() {
			t.Errorf("revoked before the intent was stored: %v; after a step: %v", early.Load(), late.Load())
		}
	})
}

// TestStepsAwaitSessions: no rollback step begins while a session on the candidate goes on, for as long as its grace.
func TestStepsAwaitSessions(t *testing.T) {
	for name, end := range map[string]bool{"ended": true, "cut": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var at time.Time
				p := talks(SessionPolicy{Grace: 30 * time.Second})
				p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error { at = time.Now(); return nil }}}
				r := start(t, "x", p, Options{})
				_, s := r.Begin(t.Context(), r.of(Candidate))
				began := time.Now()
				must(t, r.Rollback(t.Context(), "stop"))
				want := 30 * time.Second
				if end {
					time.Sleep(12 * time.Second)
					s.End(nil)
					want = 12 * time.Second
				}
				minute()
				r.is(RolledBack, "")
				if took := at.Sub(began); took < want || took > want+3*time.Second {
					t.Errorf("the step began after %v, want %v", took, want)
				}
				s.End(nil)
			})
		})
	}
}

// TestBeginAfterRollback: in a request that was answered before, a session that begins after the rollback is on the stable
// version, counted as nothing, and so is one within a session that was cut; one within a session that goes on is as that is.
func TestBeginAfterRollback(t *testing.T) {
	for _, how := range []Revocation{FinishTurn, UntilEnd, AtOnce} {
		t.Run(how.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, "x", talks(SessionPolicy{OnRollback: how, Grace: 30 * time.Second}), Options{})
				u := r.of(Candidate)
				requests := map[string]context.Context{
					"request":         NewContext(t.Context(), u),
					"another request": NewContext(NewContext(t.Context(), u), u),
				}
				for _, ctx := range requests {
					if !r.Enabled(ctx) {
						t.Fatal("off")
					}
				}
				sctx, s := r.Begin(t.Context(), u)
				begun := r.Status().Rings[1].Candidate
				must(t, r.Rollback(t.Context(), "stop"))
				synctest.Wait()
				for name, ctx := range requests {
					in, late := r.Begin(ctx, u)
					if d := late.Decision(); d.Enabled() || r.Enabled(in) || d.Cohort() != None || d.Reason() != ReasonRolledBack || closed(late.Revoked()) {
						t.Errorf("%s: %v, %v, %v", name, d.Enabled(), d.Cohort(), d.Reason())
					}
					if !r.Enabled(ctx) {
						t.Errorf("%s: its own answer has changed", name)
					}
					late.End(errors.New("boom"))
				}
				within := func(want bool) {
					t.Helper()
					in, inner := r.Begin(context.WithoutCancel(sctx), u)
					if inner.Decision().Enabled() != want || r.Enabled(in) != want {
						t.Errorf("within a session: %v", inner.Decision().Enabled())
					}
					inner.End(nil)
				}
				within(how != AtOnce)
				minute()
				within(how == UntilEnd)
				s.End(nil)
				within(false)
				if got := r.Status().Rings[1].Candidate; got != begun {
					t.Errorf("%d sessions on the candidate, not %d", got, begun)
				}
				if got := r.Status().Sessions; got != (SessionStatus{}) {
					t.Errorf("left: %+v", got)
				}
			})
		})
	}
}

// TestBeginRacesRollback: sessions that begin while it is rolled back, in requests that were answered before, are waited for
// or on the stable version: none is on the candidate while a step runs.
func TestBeginRacesRollback(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			var r *process
			done := make(chan struct{})
			p := talks(SessionPolicy{Grace: time.Second})
			p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error {
				defer close(done)
				for range 20 {
					time.Sleep(time.Millisecond)
					for _, s := range r.sessions.all() {
						if s.Decision().Enabled() && s.scope.Err() == nil {
							return errors.New("a session is on the candidate")
						}
					}
				}
				return nil
			}}}
			r = start(t, "x", p, Options{})
			u := r.of(Candidate)
			var work sync.WaitGroup
			for range 4 {
				work.Go(func() {
					ctx := NewContext(t.Context(), u)
					for r.Enabled(ctx); !closed(done); time.Sleep(time.Millisecond) {
						for range 10 {
							_, s := r.Begin(ctx, u)
							defer s.End(nil)
						}
					}
				})
			}
			must(t, r.Rollback(t.Context(), "stop"))
			work.Wait()
			minute()
			r.is(RolledBack, "")
			if st := r.Status().Steps[0]; st.Attempts != 1 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// TestTenThousandSessions: none begins a turn on the candidate after Revoked, Drain returns in time, and nothing is left.
func TestTenThousandSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 10_000
		p := talks(SessionPolicy{Grace: time.Second})
		r := start(t, "x", p, Options{})
		var rolledBack atomic.Bool
		var turns, afterRevoked, obeyed, ignored atomic.Int64
		var agents sync.WaitGroup
		for i := range n {
			ctx, s := r.Begin(t.Context(), Unit{Key: fmt.Sprint("conversation ", i)})
			deaf := i%7 == 0 // never looks at Revoked, only at its context
			agents.Go(func() {
				for turn := 0; ; turn++ {
					over := rolledBack.Load()
					if !deaf && closed(s.Revoked()) {
						obeyed.Add(1)
						s.End(ErrRolledBack)
						return
					}
					if over && s.Decision().Enabled() && !deaf {
						afterRevoked.Add(1) // a turn on the candidate after Rollback had returned
					}
					turns.Add(1)
					select {
					case <-time.After(time.Duration(100+(i*37+turn*11)%700) * time.Millisecond):
					case <-ctx.Done():
						if context.Cause(ctx) != ErrRolledBack {
							t.Errorf("cut by %v", context.Cause(ctx))
						}
						ignored.Add(1)
						s.End(ctx.Err())
						return
					}
					if !s.Decision().Enabled() && turn > 10 {
						s.End(nil)
						return
					}
				}
			})
		}
		time.Sleep(3 * time.Second)
		must(t, r.Rollback(t.Context(), "stop"))
		rolledBack.Store(true)
		began := time.Now()
		cut, err := r.Drain(t.Context())
		if took := time.Since(began); err != nil || took > 1100*time.Millisecond {
			t.Errorf("Drain took %v: %v", took, err)
		}
		agents.Wait()
		if afterRevoked.Load() != 0 {
			t.Errorf("%d turns on the candidate began after Revoked", afterRevoked.Load())
		}
		if int64(len(cut)) != ignored.Load() || ignored.Load() == 0 || obeyed.Load() == 0 {
			t.Errorf("Drain names %d, %d were cut, %d obeyed", len(cut), ignored.Load(), obeyed.Load())
		}
		if st := r.Status().Sessions; st != (SessionStatus{}) {
			t.Errorf("left: %+v", st)
		}
		if got := outcomesOf(r.Rollout, Everyone); got[1][1] != 0 {
			t.Errorf("being told to stop counted as %d failures", got[1][1])
		}
		r.stop()
		// A goroutine that is left makes the bubble panic.
	})
}

// TestDrain: with no rollback it waits, and cuts at the end of its context; with no Run it cuts by the grace itself.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := talks(SessionPolicy{Grace: 3 * time.Second})
		r := start(t, "x", p, Options{})
		if cut, err := r.Drain(t.Context()); cut != nil || err != nil {
			t.Errorf("with no session: %v, %v", cut, err)
		}
		sctx, stable := r.Begin(t.Context(), r.of(Control))
		cctx, s := r.Begin(t.Context(), r.of(Candidate))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		began := time.Now()
		cut, err := r.Drain(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || len(cut) != 1 || cut[0] != s.Pin() || time.Since(began) != 10*time.Second {
			t.Errorf("after %v: %q, %v", time.Since(began), cut, err)
		}
		if context.Cause(cctx) != ErrDrained || sctx.Err() != nil {
			t.Errorf("the candidate's context: %v, the stable one's: %v", context.Cause(cctx), context.Cause(sctx))
		}
		s.End(cctx.Err())
		stable.End(nil)
		if got := outcomesOf(r.Rollout, Everyone)[1]; got != [2]uint64{1, 0} {
			t.Errorf("it counted as %v", got)
		}

		_, s = r.Begin(t.Context(), r.of(Candidate))
		time.AfterFunc(20*time.Second, func() { s.End(nil) })
		began = time.Now()
		if cut, err := r.Drain(t.Context()); cut != nil || err != nil || time.Since(began) != 20*time.Second {
			t.Errorf("it ends by itself: after %v, %v, %v", time.Since(began), cut, err)
		}

		r.stop() // no Run from here on
		cctx, s = r.Begin(t.Context(), r.of(Candidate))
		time.AfterFunc(2*time.Second, func() { must(t, r.Rollback(t.Context(), "stop")) })
		began = time.Now()
		cut, err = r.Drain(t.Context())
		if err != nil || len(cut) != 1 || time.Since(began) != 5*time.Second || context.Cause(cctx) != ErrRolledBack {
			t.Errorf("without Run: after %v, %q, %v, %v", time.Since(began), cut, err, context.Cause(cctx))
		}
		s.End(nil)
		if _, err := (*Rollout)(nil).Drain(t.Context()); err == nil {
			t.Error("a nil Rollout drains")
		}
	})
}

// TestOnRevoke: it is called once for each session, may reconfigure, end, panic and hang, and Drain and the steps wait for
// none of it longer than the grace.
func TestOnRevoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told sync.Map
		var r *process
		release := make(chan struct{})
		defer close(release)
		p := talks(SessionPolicy{Grace: 20 * time.Second, OnRevoke: func(ctx context.Context, s *Session) {
			_, again := told.LoadOrStore(s, true)
			if again {
				t.Error("a session was told twice")
			}
			if st := r.Status().State; !s.Decision().Enabled() || st != RollingBack && st != RolledBack {
				t.Errorf("told of %v while %v", s.Decision().Enabled(), r.Status().State)
			}
			switch ctx.Value("what") {
			case "reconfigure":
				s.Reconfigured()
			case "end":
				s.End(nil)
			case "panic":
				panic("no")
			case "hang":
				<-release
			}
		}})
		r = start(t, "x", p, Options{})
		sessions := map[string]*Session{}
		contexts := map[string]context.Context{}
		for _, what := range []string{"reconfigure", "end", "panic", "hang", "nothing"} {
			//lint:ignore SA1029 the test's own key
			contexts[what], sessions[what] = r.Begin(context.WithValue(t.Context(), "what", what), r.of(Candidate))
		}
		must(t, r.Rollback(t.Context(), "stop"))
		time.Sleep(time.Second)
		synctest.Wait()
		n := 0
		told.Range(func(any, any) bool { n++; return true })
		if n != 5 {
			t.Errorf("told of %d sessions", n)
		}
		if s := sessions["reconfigure"]; s.Decision().Enabled() || r.Enabled(contexts["reconfigure"]) || s.Decision().Cohort() != None || s.Decision().Reason() != ReasonRolledBack {
			t.Errorf("reconfigured: %v, %v, %v", s.Decision().Enabled(), s.Decision().Cohort(), s.Decision().Reason())
		}
		began := time.Now()
		cut, err := r.Drain(t.Context())
		if err != nil || len(cut) != 3 || time.Since(began) > 20*time.Second {
			t.Errorf("%d cut after %v: %v", len(cut), time.Since(began), err)
		}
		time.Sleep(time.Minute)
		for what, want := range map[string]error{"reconfigure": nil, "end": context.Canceled, "panic": ErrRolledBack, "hang": ErrRolledBack, "nothing": ErrRolledBack} {
			if got := context.Cause(contexts[what]); got != want {
				t.Errorf("%s: its context's cause is %v, not %v", what, got, want)
			}
		}
		r.is(RolledBack, "")
		sessions["reconfigure"].End(nil)
	})
}

// TestOnRevokeHangs: however many of its calls hang, each session is told at once, has until the grace of its own
// revocation is over, and neither Drain nor the steps wait longer than that.
func TestOnRevokeHangs(t *testing.T) {
	const grace, n = time.Second, 10_000
	for name, running := range map[string]bool{"Run": true, "Drain alone": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var revoked time.Time
				var told atomic.Int64
				release := make(chan struct{})
				p := talks(SessionPolicy{Grace: grace, OnRevoke: func(ctx context.Context, s *Session) {
					told.Add(1)
					if end, _ := ctx.Deadline(); !end.Equal(revoked.Add(grace)) || ctx.Err() != nil {
						t.Errorf("its context ends %v after the revocation", end.Sub(revoked))
					}
					if ctx.Value("behaves") != nil {
						s.Reconfigured()
						return
					}
					<-release
				}})
				var stepped time.Duration
				p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error { stepped = time.Since(revoked); return nil }}}
				r := start(t, "x", p, Options{})
				u := r.of(Candidate)
				var good []*Session
				for i := range n {
					ctx := t.Context()
					if i%(n/10) == 0 {
						//lint:ignore SA1029 the test's own key
						ctx = context.WithValue(ctx, "behaves", true)
					}
					if _, s := r.Begin(ctx, u); i%(n/10) == 0 {
						good = append(good, s)
					}
				}
				if !running {
					r.stop()
				}
				revoked = time.Now()
				must(t, r.Rollback(t.Context(), "stop"))
				if !running {
					time.Sleep(grace * 6 / 10)
				}
				cut, err := r.Drain(t.Context())
				if took := time.Since(revoked); err != nil || took > grace+100*time.Millisecond {
					t.Errorf("Drain returned %v after the revocation: %v", took, err)
				}
				if int(told.Load()) != n || len(cut) != n-len(good) {
					t.Errorf("told of %d sessions, %d were cut", told.Load(), len(cut))
				}
				for _, s := range good {
					if s.Decision().Enabled() || s.scope.Err() != nil {
						t.Error("one that was moved in time was cut")
					}
				}
				minute()
				if running && (stepped < grace || stepped > grace+time.Second) {
					t.Errorf("the step began %v after the revocation", stepped)
				}
				close(release)
			})
		})
	}
}

// TestOnRevokeOfTheEnded: only a session that goes on is told, or one that is cut AtOnce, and Drain returns after the call.
func TestOnRevokeOfTheEnded(t *testing.T) {
	for _, how := range []Revocation{FinishTurn, AtOnce} {
		t.Run(how.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				told := map[*Session]int{}
				p := talks(SessionPolicy{OnRollback: how, Grace: 10 * time.Second, OnRevoke: func(ctx context.Context, s *Session) {
					s.Reconfigured()
					time.Sleep(3 * time.Second)
					mu.Lock()
					defer mu.Unlock()
					told[s]++
				}})
				r := start(t, "x", p, Options{})
				r.stop()
				u := r.of(Candidate)
				all := map[string]*Session{}
				for _, name := range []string{"ended", "moved", "on"} {
					_, all[name] = r.Begin(t.Context(), u)
				}
				must(t, r.Rollback(t.Context(), "stop"))
				all["ended"].End(nil)
				all["moved"].Reconfigured()
				var work sync.WaitGroup
				r.tellHost(t.Context(), &work, []*Session{all["ended"], all["moved"]}) // as if that had come just before
				work.Wait()
				began := time.Now()
				if _, err := r.Drain(t.Context()); err != nil || time.Since(began) != 3*time.Second {
					t.Errorf("Drain returned after %v: %v", time.Since(began), err)
				}
				if len(told) != 1 || told[all["on"]] != 1 {
					t.Errorf("told %v", told)
				}

				must(t, r.Restart(t.Context(), "again"))
				started, stop := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- r.Run(started) }()
				minute()
				_, late := r.Begin(t.Context(), u)
				stop()
				must(t, <-done)
				must(t, r.Rollback(t.Context(), "stop"))
				time.Sleep(20 * time.Second) // nobody looks
				if cut, err := r.Drain(t.Context()); err != nil || len(cut) != 1 {
					t.Errorf("cut %v: %v", cut, err)
				}
				if told[late] != 0 {
					t.Error("told of one whose grace is over")
				}
			})
		})
	}
}

// TestSessionsWithHungStore: sessions are told and cut in time, and end with their contexts, while a tick waits for the Store.
func TestSessionsWithHungStore(t *testing.T) {
	for name, stored := range map[string]bool{"the rollback is stored": true, "it is not": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var told atomic.Int64
				p := talks(SessionPolicy{Grace: time.Second, OnRevoke: func(context.Context, *Session) { told.Store(time.Now().UnixNano()) }})
				store := &faulty{Store: MemStore()}
				r := start(t, "x", p, Options{Store: store, Interval: 30 * time.Second})
				sctx, s := r.Begin(t.Context(), r.of(Candidate))
				short, cancel := context.WithTimeout(t.Context(), time.Minute+10*time.Second)
				defer cancel()
				_, gone := r.Begin(short, r.of(Control))
				time.Sleep(time.Minute)
				if stored {
					must(t, r.Rollback(t.Context(), "stop"))
				}
				store.set(hangs, hangs, nil)
				if !stored {
					go func() { _ = r.Rollback(t.Context(), "stop") }()
				}
				<-s.Revoked()
				revoked := time.Now()
				<-sctx.Done()
				if took := time.Since(revoked); took != time.Second || told.Load() != revoked.UnixNano() {
					t.Errorf("cut after %v, told %v before", took, time.Since(time.Unix(0, told.Load())))
				}
				time.Sleep(35 * time.Second)
				if !gone.ended.Load() {
					t.Error("its context ended, and it did not")
				}
				s.End(nil)
				store.set(nil, nil, nil)
			})
		})
	}
}

// TestAdopt: a pin takes a session up in another process, with its answer and its cohort, and never outlives its version.
func TestAdopt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		p := talks(SessionPolicy{})
		p.Version = "1"
		a, b := start(t, "x", p, Options{Store: store}), start(t, "x", p, Options{Store: store})
		adopt := func(r *process, pin string) (context.Context, *Session) {
			t.Helper()
			ctx, s, err := r.Adopt(NewContext(t.Context(), Unit{Key: "whoever"}), pin)
			if err != nil {
				t.Fatal(err)
			}
			return ctx, s
		}
		pins := map[Cohort]string{}
		for _, c := range []Cohort{Candidate, Control} {
			actx, s := a.Begin(t.Context(), a.of(c))
			if strings.Contains(s.Pin(), "unit") || strings.ContainsAny(s.Pin(), " \n") {
				t.Errorf("the pin %q", s.Pin())
			}
			pin := s.Release()
			if pin != s.Pin() || actx.Err() == nil {
				t.Error("released")
			}
			for range 3 { // turn by turn
				var ctx context.Context
				ctx, s = adopt(b, pin)
				if s.Decision().Cohort() != c || b.Enabled(ctx) != (c == Candidate) || s.Pin() != pin {
					t.Errorf("%v became %v in %q", c, s.Decision().Cohort(), s.Pin())
				}
				pin = s.Release()
			}
			_, s = adopt(b, pin)
			s.End(errors.New("boom"))
			pins[c] = pin
		}
		if got := outcomesOf(a.Rollout, Everyone); got != [2][2]uint64{} {
			t.Errorf("where they were released: %v", got)
		}
		if got := outcomesOf(b.Rollout, Everyone); got != [2][2]uint64{{0, 1}, {0, 1}} {
			t.Errorf("where they ended: %v", got)
		}
		_, s := adopt(b, pins[Candidate])
		must(t, a.Rollback(t.Context(), "stop"))
		synctest.Wait()
		if !closed(s.Revoked()) {
			t.Error("adopted, and not revoked")
		}
		s.End(nil)
		refused := func(r *process, pin string, want error) {
			t.Helper()
			if _, _, err := r.Adopt(t.Context(), pin); !errors.Is(err, want) {
				t.Errorf("%v, not %v", err, want)
			}
		}
		refused(a, pins[Candidate], ErrRolledBack)
		_, s = adopt(a, pins[Control]) // what stable is has not changed
		s.End(nil)
		must(t, a.Restart(t.Context(), "again"))
		minute()
		refused(a, pins[Candidate], ErrRolledBack)
		refused(a, pins[Control], ErrVersion)
		_, s = a.Begin(t.Context(), a.of(Candidate))
		p.Version = "2"
		c := start(t, "x", p, Options{Store: store})
		refused(c, s.Pin(), ErrVersion)
		s.End(nil)
		for _, text := range []string{
			"", "s2:", "d1:x", "s2:a.1.1:d1:x:1:1:-:0:0", "s2:.1.1" + strings.TrimPrefix(s.Pin(), "s2:"), s.Pin() + "x",
			strings.Replace(s.Pin(), "s2", "s1", 1), strings.Replace(s.Pin(), ".", ".!", 1), strings.Replace(s.Pin(), ".", ".1.", 1),
		} {
			refused(a, text, errPin)
		}
		if _, _, err := (*Rollout)(nil).Adopt(t.Context(), s.Pin()); err == nil {
			t.Error("a nil Rollout adopts")
		}
	})
}

// TestPinOfReplaced: a completed rollout takes a new version up in the same generation, and the pins of the old one are
// refused from then on.
func TestPinOfReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		p := talks(SessionPolicy{})
		p.Version = "1"
		a := start(t, "x", p, Options{Store: store})
		var pins []string
		for _, c := range []Cohort{Candidate, Control} {
			_, s := a.Begin(t.Context(), a.of(c))
			pins = append(pins, s.Release())
		}
		a.completeAll(2)
		_, s := a.Begin(t.Context(), Unit{Key: "late"})
		pins = append(pins, s.Release())
		for _, pin := range pins {
			fresh, err := New("x", p, &Options{Store: store, Logger: quiet}) // loads it when asked
			must(t, err)
			for _, r := range []*Rollout{a.Rollout, fresh} {
				_, s, err := r.Adopt(t.Context(), pin)
				must(t, err)
				if s.Release() != pin || s.Decision().Version() != "1" {
					t.Errorf("%q became %q, of %q", pin, s.Pin(), s.Decision().Version())
				}
			}
		}
		a.stop()
		p.Version = "2"
		b := start(t, "x", p, Options{Store: store})
		minute()
		if st := b.Status(); st.State != Completed || st.Generation != 1 || st.Version != "2" {
			t.Fatalf("%+v", st)
		}
		fresh, err := New("x", p, &Options{Store: store, Logger: quiet})
		must(t, err)
		for _, pin := range pins {
			for name, r := range map[string]*Rollout{"loaded": b.Rollout, "not loaded": fresh} {
				if _, _, err := r.Adopt(t.Context(), pin); !errors.Is(err, ErrVersion) {
					t.Errorf("%s: %q of version 1: %v", name, pin, err)
				}
			}
		}
	})
}

// TestPinOfReconfigured: a session that was moved to the stable version stays there, whoever adopts it, and counts in no
// cohort.
func TestPinOfReconfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		a := start(t, "x", talks(SessionPolicy{}), Options{Store: store})
		_, s := a.Begin(t.Context(), a.of(Candidate, "staff"))
		before := s.Pin()
		s.Reconfigured()
		if s.Pin() == before {
			t.Error("the same pin")
		}
		pin := s.Release()
		for _, when := range []string{"running", "rolled back"} {
			b, err := New("x", talks(SessionPolicy{}), &Options{Store: store, Logger: quiet})
			must(t, err)
			ctx, s, err := b.Adopt(t.Context(), pin)
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			if d := s.Decision(); d.Enabled() || b.Enabled(ctx) || d.Cohort() != None || d.Reason() != ReasonRolledBack || d.Ring() != "staff" || d.Generation() != 1 || s.Pin() != pin {
				t.Errorf("%s: %v, %v, %v, %q, %d, %q", when, d.Enabled(), d.Cohort(), d.Reason(), d.Ring(), d.Generation(), s.Pin())
			}
			s.End(errors.New("boom"))
			if got := outcomesOf(b, "staff"); got != [2][2]uint64{} {
				t.Errorf("%s: it counted as %v", when, got)
			}
			must(t, a.Rollback(t.Context(), "stop"))
		}
		must(t, a.Restart(t.Context(), "again"))
		if _, _, err := a.Adopt(t.Context(), pin); !errors.Is(err, ErrVersion) {
			t.Errorf("in another generation: %v", err)
		}
	})
}

// TestNilSession: a nil Rollout begins sessions on the stable version.
func TestNilSession(t *testing.T) {
	var r *Rollout
	ctx, s := r.Begin(t.Context(), Unit{Key: "u"})
	if s.Decision().Enabled() || r.Enabled(ctx) || closed(s.Revoked()) || s.Pin() != "" || s.Release() != "" {
		t.Error("not off")
	}
	s.Reconfigured()
	s.End(errors.New("boom"))
	if ctx.Err() == nil {
		t.Error("its context goes on")
	}
	_, s = r.Begin(t.Context(), Unit{})
	s.End(nil)
}

// TestSessionForced: a test's forcing holds in sessions, and nothing counts.
func TestSessionForced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "x", talks(SessionPolicy{}), Options{})
		u := r.of(Control)
		release := r.force(Candidate)
		ctx, s := r.Begin(t.Context(), u)
		if !s.Decision().Enabled() || !r.Enabled(ctx) {
			t.Error("not forced")
		}
		s.End(nil)
		release()
		ctx, s = r.Begin(forceIn(t.Context(), r.Rollout, Candidate), u)
		if !s.Decision().Enabled() || !r.Enabled(ctx) {
			t.Error("not forced in the context")
		}
		s.End(nil)
		if got := outcomesOf(r.Rollout, Everyone); got != [2][2]uint64{} {
			t.Errorf("it counted: %v", got)
		}
	})
}

// TestDeadProcess: sessions of a process that dies count as failures in the cohort they began in, once; those of one that
// ended well do not; and one that was only thought dead counts nothing twice.
func TestDeadProcess(t *testing.T) {
	for name, alive := range map[string]bool{"killed": false, "paused": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &faulty{Store: MemStore()}
				p := talks(SessionPolicy{})
				p.Gates = []Gate{Errors.Within(1), Errors.AtMost(50).OnFail(Report)}
				a := start(t, "x", p, Options{Store: store})
				well := start(t, "x", p, Options{Store: store.Store})
				b := start(t, "x", p, Options{Store: store.Store})
				count := b.count(WorkLost)
				var open []*Session
				begin := func(c Cohort, n int) {
					for range n {
						_, s := a.Begin(t.Context(), a.of(c))
						open = append(open, s)
					}
				}
				begin(Candidate, 7)
				begin(Control, 3)
				_, s := well.Begin(t.Context(), well.of(Candidate))
				time.Sleep(6 * time.Second)
				synctest.Wait()
				well.stop()
				_ = s
				store.set(down, down, nil) // a is gone
				time.Sleep(2 * time.Minute)
				if count.Load() != 0 {
					t.Fatal("lost too soon")
				}
				time.Sleep(3 * time.Minute)
				synctest.Wait()
				if count.Load() != 1 {
					t.Fatalf("%d processes were found dead", count.Load())
				}
				tally := func() (n [4]uint64) {
					est := inStore(t, store.Store)
					for g, res := range b.plan.Judge.Assess(&est.Gates, nil) {
						if g == 0 {
							n = [4]uint64{res.Candidate.N, res.Candidate.Events, res.Control.N, res.Control.Events}
						}
					}
					return n
				}
				b.serve(time.Minute, 0, 0)
				lost := tally()
				if lost[1] != 7 || lost[3] != 3 {
					t.Fatalf("the gate has %v", lost)
				}
				if alive { // it comes back
					store.set(nil, nil, nil)
					minute()
					for _, s := range open {
						s.End(errors.New("boom"))
					}
					begin(Candidate, 2)
					for _, s := range open[len(open)-2:] {
						s.End(errors.New("boom"))
					}
					b.serve(2*time.Minute, 0, 0)
					if now := tally(); now[1] != 9 || now[3] != 3 {
						t.Errorf("the gate has %v", now)
					}
				} else { // another process takes one of them up
					_, s, err := b.Adopt(t.Context(), open[0].Pin())
					must(t, err)
					s.End(errors.New("boom"))
					b.serve(2*time.Minute, 0, 0)
					if now := tally(); now[1] != 8 || now[3] != 3 {
						t.Errorf("the gate has %v, after one was adopted", now)
					}
				}
				store.set(nil, nil, nil)
			})
		})
	}
}

// TestDiesAtOnce: sessions of a process that dies count as failed if they were seen open at a tick. One on the candidate that
// begins while none is open there is seen at once, which makes no more than one further tick an interval.
func TestDiesAtOnce(t *testing.T) {
	for name, open := range map[string]bool{"none is open": false, "one is open": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &faulty{Store: MemStore()}
				p := talks(SessionPolicy{})
				p.Gates = []Gate{Errors.Within(1), Errors.AtMost(50).OnFail(Report)}
				a := start(t, "x", p, Options{Store: store})
				b := start(t, "x", p, Options{Store: store.Store})
				u := a.of(Candidate)
				_, s := a.Begin(t.Context(), u)
				var writes atomic.Int32
				store.set(nil, func(context.Context) error { writes.Add(1); return nil }, nil) // of evidence, of the state, of the head
				for range 600 {                                                                // one after the other, in a minute
					s.End(nil)
					time.Sleep(100 * time.Millisecond)
					_, s = a.Begin(t.Context(), u)
				}
				if n := writes.Load(); n < 12 || n > 3*26 {
					t.Errorf("%d writes in 12 intervals", n)
				}
				if !open {
					s.End(nil)
				}
				time.Sleep(6 * time.Second) // a tick
				if _, _ = a.Begin(t.Context(), u); !open {
					synctest.Wait() // it is seen
				}
				_, _ = a.Begin(t.Context(), u) // is not
				time.Sleep(100 * time.Millisecond)
				store.set(down, down, nil) // a is gone
				count := b.count(WorkLost)
				time.Sleep(10 * time.Minute)
				b.serve(time.Minute, 0, 0)
				est := inStore(t, store.Store)
				if got := b.plan.Judge.Assess(&est.Gates, nil)[0].Candidate.Events; count.Load() != 1 || got != 1 {
					t.Errorf("%d processes were found dead, %d sessions failed, not 1", count.Load(), got)
				}
				store.set(nil, nil, nil)
			})
		})
	}
}

func TestSessionAllocs(t *testing.T) {
	r := running(t, "sessions")
	ctx, u, ok := context.Background(), Unit{Key: "somebody"}, Errors.Observe(false)
	if n := testing.AllocsPerRun(100, func() {
		_, s := r.Begin(ctx, u)
		s.Decision().Record(ok)
		s.End(nil)
	}); n > 3 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkSession(b *testing.B) {
	r := warm(b)
	ctx, ok := context.Background(), Errors.Observe(false)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		_, s := r.Begin(ctx, Unit{Key: longIDs[i%len(longIDs)]})
		s.Decision().Record(ok)
		s.End(nil)
	}
}

// TestEndedSessionIsAlone: one that has ended, and is kept, keeps no other from being freed.
func TestEndedSessionIsAlone(t *testing.T) {
	r, err := New("x", talks(SessionPolicy{}), quietly())
	must(t, err)
	var all []*Session
	for i := range 5 {
		_, s := r.Begin(t.Context(), Unit{Key: fmt.Sprint(i)})
		all = append(all, s)
	}
	for _, i := range []int{2, 0, 4, 3, 1} {
		all[i].End(nil)
		if s := all[i]; s.prev != nil || s.next != nil {
			t.Errorf("session %d has ended, and keeps %p and %p", i, s.prev, s.next)
		}
	}
	if left := r.sessions.all(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
