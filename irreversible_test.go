package rollout

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// Where going back would do harm, or has helped twice for a while only, it is held for an operator to look at.

// kinds are the kinds of the events from now on.
func (p *process) kinds() func() []EventKind {
	var all []EventKind
	p.Subscribe(func(e Event) { all = append(all, e.Kind) })
	return func() []EventKind {
		synctest.Wait()
		return all
	}
}

// TestIrreversibleHolds: in a stage that cannot be undone a broken gate holds, whatever it does elsewhere, and so does a
// deadline: once, with the reason, and the candidate keeps its share until an operator rolls it back.
func TestIrreversibleHolds(t *testing.T) {
	for how, c := range map[string]struct {
		breaks func(r *process, says *atomic.Int32)
		hold   machine.HoldCause // its note begins so
		told   []EventKind
	}{
		"a check": {
			func(_ *process, says *atomic.Int32) { says.Store(int32(Unhealthy)); minute() },
			machine.HoldCause{Kind: machine.HeldByGate, Gate: "host", Note: "it says unhealthy"}, []EventKind{GateBroken, HoldBegan},
		},
		"outcomes": {
			func(r *process, _ *atomic.Int32) { r.serve(2*time.Minute, 0, .6) },
			machine.HoldCause{Kind: machine.HeldByGate, Gate: "errors.AtMost(20)", Note: "errors in staff: "}, []EventKind{GateBroken, HoldBegan},
		},
		"a deadline": {
			func(*process, *atomic.Int32) { time.Sleep(5 * time.Minute); minute() },
			machine.HoldCause{Kind: machine.HeldByDeadline, Note: "no verdict in 5m0s"}, []EventKind{HoldBegan},
		},
	} {
		for _, action := range []Action{Rollback, RollbackRing, StepBack} {
			t.Run(how+" and "+action.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p, says := checked(Policy{Bake: 4 * time.Minute, Holdback: 5, OnDeadline: Rollback}, action)
					p.Gates = append(p.Gates, Errors.AtMost(20).OnFail(action))
					p.Rings = []Ring{{Name: "staff", Match: func(Unit) bool { return true }}} // a ring to be at fault
					p.Stages = []Stage{{Ring: "staff", Percent: 20}, {Ring: "staff", Percent: 50, Irreversible: true, Deadline: 5 * time.Minute}, {Percent: 100}}
					store := MemStore()
					r := start(t, "x", p, Options{Store: store})
					r.serve(12*time.Second, 0, 0)
					must(t, r.Advance(t.Context(), "staff 20 %", "on"))
					r.is(Running, "staff 50 %")
					told, before := r.kinds(), inStore(t, store)

					c.breaks(r, says)
					for range 2 { // and it stays so
						r.is(Held, "staff 50 %")
						st, now := inStore(t, store), r.Status()
						if st.Hold.Kind != c.hold.Kind || st.Hold.Gate != c.hold.Gate || !strings.HasPrefix(st.Hold.Note, c.hold.Note) {
							t.Errorf("held because of %+v", st.Hold)
						}
						if why := strings.TrimSpace(string(c.hold.Kind)+" "+c.hold.Gate) + ": " + c.hold.Note; !strings.HasPrefix(now.Note, why) {
							t.Errorf("the status says %q, not %q", now.Note, why)
						}
						if now.Rings[0].Percent != 50 || st.Epoch != before.Epoch || !served(r.Rollout) {
							t.Errorf("the share is %v", now.Rings[0].Percent)
						}
						if !slices.Equal(told(), c.told) {
							t.Errorf("told were %v, not %v", told(), c.told)
						}
						r.serve(time.Minute, 0, .6)
					}

					must(t, r.Rollback(t.Context(), "by hand"))
					minute()
					r.is(RolledBack, "")
					if in := r.Status().Incident; in == nil || in.Note != "by hand" || served(r.Rollout) {
						t.Errorf("rolled back because of %+v, and served: %v", in, served(r.Rollout))
					}
					if want := append(slices.Clone(c.told), RollbackBegan, RollbackDone); !slices.Equal(told(), want) {
						t.Errorf("told were %v, not %v", told(), want)
					}
				})
			})
		}
	}
}

// TestIrreversibleCutOff: a process that cannot use the Store takes nothing back by itself in a stage that cannot be undone.
func TestIrreversibleCutOff(t *testing.T) {
	for _, irreversible := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := &faulty{Store: MemStore()}
			p := threeStages()
			p.Stages[0].Irreversible = irreversible
			r := start(t, "x", p, Options{Store: f})
			r.serve(30*time.Second, 0, 0)
			f.set(down, down, nil)
			r.serve(5*time.Minute, .01, .5)
			if served(r.Rollout) != irreversible {
				t.Errorf("irreversible: %v, served: %v", irreversible, !irreversible)
			}
			f.set(nil, nil, nil)
			minute()
			if irreversible {
				r.is(Held, "everyone 10 %")
			} else {
				r.is(RolledBack, "")
			}
		})
	}
}

// TestStepsBackTwice: a gate steps back to one stage twice; the third time it holds in the stage that it is broken in. Each
// stage is counted by itself, and a new generation counts anew.
func TestStepsBackTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, says := checked(threeStages(), StepBack)
		p.Bake = time.Hour
		r := start(t, "x", p, Options{Store: MemStore()})
		told := r.kinds()
		breaks := func() { // and is well again
			says.Store(int32(Unhealthy))
			minute()
			minute()
			says.Store(int32(Healthy))
			minute()
		}
		for range 2 {
			r.is(Running, "everyone 10 %")
			must(t, r.Advance(t.Context(), "everyone 10 %", "on"))
			breaks()
		}
		r.is(Running, "everyone 10 %")
		must(t, r.Advance(t.Context(), "everyone 10 %", "on"))
		breaks()
		r.is(Held, "everyone 50 %")
		if st := r.Status(); st.Rings[0].Percent != 50 || st.Note != "gate host: it says unhealthy" {
			t.Errorf("held at %v: %s", st.Rings[0].Percent, st.Note)
		}
		want := []EventKind{StageEntered, GateBroken, SteppedBack, StageEntered, GateBroken, SteppedBack, StageEntered, GateBroken, HoldBegan}
		if !slices.Equal(told(), want) {
			t.Errorf("told were %v, not %v", told(), want)
		}
		must(t, r.Resume(t.Context(), "looked at"))
		breaks()
		r.is(Held, "everyone 50 %")

		must(t, r.Advance(t.Context(), "everyone 50 %", "on"))
		r.is(Running, "everyone 100 %")
		breaks()
		r.is(Running, "everyone 50 %") // for the first time

		must(t, r.Restart(t.Context(), "anew"))
		minute()
		must(t, r.Advance(t.Context(), "everyone 10 %", "on"))
		breaks()
		r.is(Running, "everyone 10 %")
	})
}
