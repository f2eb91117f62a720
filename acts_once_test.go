package rollout

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// What happened once is acted on once, and time that was nobody's fault counts against nobody.

// happens records one event of a metric for a candidate.
func (p *process) happens(m Rate) {
	for i := 0; ; i++ {
		if d := p.Peek(Unit{Key: fmt.Sprint("event ", i)}); d.Cohort() == Candidate {
			d.Record(m.Observe(true))
			synctest.Wait()
			return
		}
	}
}

// count counts the events of a kind from now on.
func (p *process) count(k EventKind) *atomic.Int32 {
	n := new(atomic.Int32)
	p.Subscribe(func(e Event) {
		if e.Kind == k {
			n.Add(1)
		}
	})
	return n
}

// TestNeverHoldsOnce: one event that must never happen holds once: what an operator resumed is not held by its block.
func TestNeverHoldsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := NewRate("bad")
		p := threeStages()
		p.Bake = time.Hour
		p.Gates = append(p.Gates, bad.Never().OnFail(Hold))
		r := start(t, "x", p, Options{})
		r.serve(12*time.Second, 0, 0)
		for range 3 {
			r.happens(bad)
			r.is(Held, "everyone 10 %") // at once, before any block
			must(t, r.Resume(t.Context(), "looked at"))
			r.serve(3*time.Minute, 0, 0)
			r.is(Running, "everyone 10 %")
		}
	})
}

// TestNeverStepsBackOnce: one event that must never happen steps back once.
func TestNeverStepsBackOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := NewRate("bad")
		p := threeStages()
		p.Bake = time.Hour
		p.Gates = append(p.Gates, bad.Never().OnFail(StepBack))
		r := start(t, "x", p, Options{})
		back := r.count(SteppedBack)
		r.serve(12*time.Second, 0, 0)
		must(t, r.Advance(t.Context(), "everyone 10 %", "on"))
		r.serve(12*time.Second, 0, 0)
		r.happens(bad)
		r.is(Running, "everyone 10 %")
		r.serve(5*time.Minute, 0, 0)
		r.is(Running, "everyone 10 %")
		if n := back.Load(); n != 1 {
			t.Errorf("stepped back %d times", n)
		}
		r.happens(bad) // there is no stage before
		r.is(RolledBack, "")
	})
}

// checked is a policy with a Check that says what the value says.
func checked(p Policy, a Action) (Policy, *atomic.Int32) {
	v := new(atomic.Int32)
	v.Store(int32(Healthy))
	p.Gates = append(p.Gates, Check("host", func(context.Context) (Verdict, error) { return Verdict(v.Load()), nil }).OnFail(a))
	return p, v
}

// TestCheckRollsRingBackOnce: a Check that stays Unhealthy rolls a ring back once.
func TestCheckRollsRingBackOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := threeStages()
		p.Rings = []Ring{{Name: "staff"}}
		p.Stages = append([]Stage{{Ring: "staff", Percent: 50}}, p.Stages...)
		p, says := checked(p, RollbackRing)
		store := MemStore()
		r := start(t, "x", p, Options{Store: store})
		back := r.count(RingRolledBack)
		r.is(Running, "staff 50 %")
		says.Store(int32(Unhealthy))
		minute()
		r.is(Held, "staff 50 %")
		before := inStore(t, store)
		for range 30 {
			minute()
		}
		after := inStore(t, store)
		if n := back.Load(); n != 1 || len(after.Rings) != 1 || after.Epoch != before.Epoch || after.Gates.Starts != before.Gates.Starts || len(after.History) != len(before.History) {
			t.Errorf("rolled back %d times: rings %v, epochs %d and %d, starts %d and %d", n, after.Rings, before.Epoch, after.Epoch, before.Gates.Starts, after.Gates.Starts)
		}
		if err := r.Advance(t.Context(), "staff 50 %", "past it"); !errors.Is(err, ErrState) {
			t.Errorf("advanced while the Check is unhealthy: %v", err)
		}
		says.Store(int32(Healthy))
		minute()
		minute()
		must(t, r.Advance(t.Context(), "staff 50 %", "past it"))
		r.is(Running, "everyone 10 %")
		says.Store(int32(Unhealthy)) // news again, and everyone's
		minute()
		r.is(RolledBack, "")
	})
}

// TestCheckStepsBackOnce: a Check that stays Unhealthy steps back once, and again when it was healthy in between.
func TestCheckStepsBackOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, says := checked(threeStages(), StepBack)
		p.Bake = time.Hour
		r := start(t, "x", p, Options{})
		back := r.count(SteppedBack)
		for n := int32(1); n <= 2; n++ {
			must(t, r.Advance(t.Context(), "everyone 10 %", "on"))
			says.Store(int32(Unhealthy))
			r.serve(10*time.Minute, 0, 0)
			r.is(Running, "everyone 10 %")
			if back.Load() != n {
				t.Fatalf("stepped back %d times, not %d", back.Load(), n)
			}
			says.Store(int32(Healthy))
			minute()
		}
	})
}

// TestEditedClimb: a policy that is edited while a stage climbs climbs on from where it is.
func TestEditedClimb(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		policy := func(bake time.Duration) Policy {
			p := threeStages()
			p.Bake = bake
			p.Stages = []Stage{{Percent: 50, Over: 16 * time.Minute, GuardOnly: true}, {Percent: 100, GuardOnly: true}}
			return p
		}
		r := start(t, "x", policy(time.Minute), Options{Store: store})
		r.serve(6*time.Minute, 0, 0)
		share := r.Status().Rings[0].Percent
		r.stop()
		edited := start(t, "x", policy(2*time.Minute), Options{Store: store})
		edited.is(Running, "everyone 50 %")
		if now := edited.Status().Rings[0].Percent; share <= 5 || share >= 45 || now != share {
			t.Errorf("the share is %v, it was %v", now, share)
		}
		edited.serve(10*time.Minute, 0, 0)
		edited.is(Running, "everyone 50 %")
		if now := edited.Status().Rings[0].Percent; now <= share || now >= 50 {
			t.Errorf("the share is %v ten minutes later, it was %v", now, share)
		}
		edited.until(Completed, 0, 0)
	})
}

// TestMayAdvanceToCompletion: completing raises the share of those who were held back, and is asked about.
func TestMayAdvanceToCompletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var frozen atomic.Bool
		var asked atomic.Int32
		p := threeStages()
		p.Stages, p.Holdback = []Stage{{Percent: 100, GuardOnly: true}}, 50
		p.MayAdvance = func(time.Time) bool { asked.Add(1); return !frozen.Load() }
		r := start(t, "x", p, Options{})
		r.is(Running, "everyone 100 %")
		frozen.Store(true)
		asked.Store(0)
		r.serve(10*time.Minute, 0, 0)
		r.is(Running, "everyone 100 %")
		if asked.Load() == 0 {
			t.Error("nobody was asked")
		}
		frozen.Store(false)
		r.serve(10*time.Second, 0, 0)
		r.is(Completed, "")
	})
}

// TestOutageIsNoStageTime: the time for which the Store was away counts for no deadline.
func TestOutageIsNoStageTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		p := threeStages()
		p.OnDeadline, p.Bake, p.Deadline = Rollback, 30*time.Minute, time.Hour
		r := start(t, "x", p, Options{Store: f})
		r.serve(12*time.Second, 0, 0)
		for range 2 {
			f.set(down, down, nil)
			time.Sleep(90 * time.Minute)
			f.set(nil, nil, nil)
			r.serve(time.Minute, 0, 0)
			r.is(Running, "everyone 10 %")
		}
		if elapsed := r.Status().Stage.Elapsed; elapsed > 10*time.Minute {
			t.Errorf("%v of the stage have elapsed", elapsed)
		}
	})
}

// TestReadyInFreeze: a stage that only waits for leave to advance has had its verdict in time.
func TestReadyInFreeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var frozen atomic.Bool
		p := threeStages()
		p.OnDeadline, p.Deadline = Rollback, 30*time.Minute
		p.MayAdvance = func(time.Time) bool { return !frozen.Load() }
		r := start(t, "x", p, Options{})
		frozen.Store(true)
		r.serve(2*time.Minute, 0, 0)
		time.Sleep(time.Hour)
		r.is(Running, "everyone 10 %")
		frozen.Store(false)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		r.is(Running, "everyone 50 %")
		frozen.Store(true)
		time.Sleep(35 * time.Minute) // without its proof
		synctest.Wait()
		r.is(RolledBack, "")
	})
}

// TestRingsOfEverybody: where every unit is in some ring, the stages of everyone are proven by those.
func TestRingsOfEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := threeStages()
		p.Rings = []Ring{{Name: "eu"}, {Name: "us"}}
		p.Stages = append([]Stage{{Ring: "eu", Percent: 20}, {Ring: "us", Percent: 20}}, Percentages(50, 100)...)
		r := start(t, "x", p, Options{})
		for n := 0; r.Status().State == Running && n < 36_000; n++ {
			time.Sleep(100 * time.Millisecond)
			r.Decide(Unit{Key: fmt.Sprint(n), Groups: []string{[]string{"eu", "us"}[n%2]}}).Record(Errors.Observe(false))
		}
		r.is(Completed, "")
	})
}

// TestCallersContext: a verb whose caller gave up is no failure of the Store.
func TestCallersContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		r := lone(t, threeStages(), Options{Store: f})
		failed := (&process{Rollout: r}).count(StoreFailed)
		runs(t, r).stop()
		over, cancel := context.WithCancel(t.Context())
		cancel()
		calls := map[string]func(context.Context) error{
			"Ready": r.Ready,
			"Hold":  func(ctx context.Context) error { return r.Hold(ctx, "wait") },
		}
		gives := func(name string, ctx context.Context) {
			t.Helper()
			if err := calls[name](ctx); err == nil || name == "Hold" && !errors.Is(err, ErrNotStored) {
				t.Errorf("%s: %v", name, err)
			}
			if st := r.Status(); st.Err != "" {
				t.Errorf("%s: the status says %q", name, st.Err)
			}
		}
		gives("Hold", over)
		gives("Ready", over)
		for _, broken := range []struct {
			load, swap func(context.Context) error
			calls      []string
		}{{hangs, nil, []string{"Hold", "Ready"}}, {nil, hangs, []string{"Hold"}}} {
			f.set(broken.load, broken.swap, nil)
			for _, name := range broken.calls {
				short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				gives(name, short)
				cancel()
			}
		}
		f.set(nil, nil, nil)
		p := runs(t, r)
		minute()
		p.is(Running, "everyone 10 %")
		if failed.Load() != 0 {
			t.Error("the Store is said to have failed")
		}
		f.set(down, down, nil)
		minute()
		if failed.Load() != 1 {
			t.Error("a failure of the Store is not told")
		}
	})
}

// TestCheckOfEarlierRun: what a Check said in an earlier Run proves nothing in the next one.
func TestCheckOfEarlierRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var silent atomic.Bool
		p := threeStages()
		p.Gates = []Gate{Check("host", func(ctx context.Context) (Verdict, error) {
			if silent.Load() {
				<-ctx.Done()
			}
			return Healthy, nil
		})}
		r := lone(t, p, Options{Store: MemStore()})
		runs(t, r).stop()
		if v := r.Status().Gates[0].Verdict; v != Healthy {
			t.Fatalf("the Check is %v", v)
		}
		silent.Store(true)
		again := runs(t, r)
		if v := r.Status().Gates[0].Verdict; v == Healthy {
			t.Error("the answer of an earlier Run goes on proving")
		}
		again.serve(10*time.Minute, 0, 0)
		again.is(Running, "everyone 50 %") // where proof is asked
	})
}
