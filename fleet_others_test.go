package rollout

import (
	"context"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// TestEventsOfOthers: a process hears of what others did on the same Store, once and in order, and so does who did it.
func TestEventsOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var mu sync.Mutex
		heard := [2][]EventKind{}
		var all []*process
		for i := range 2 {
			r := start(t, "x", threeStages(), Options{Store: store})
			r.Subscribe(func(e Event) {
				mu.Lock()
				defer mu.Unlock()
				heard[i] = append(heard[i], e.Kind)
				if e.Kind == RollbackBegan && (e.Incident == nil || e.Incident.Note != "stop") {
					t.Errorf("process %d hears of the incident %+v", i, e.Incident)
				}
			})
			r.serve(10*time.Second, 0, 0)
			all = append(all, r)
		}
		must(t, all[0].Hold(t.Context(), "wait"))
		must(t, all[0].Resume(t.Context(), "on"))
		must(t, all[1].Rollback(t.Context(), "stop"))
		minute()
		mu.Lock()
		defer mu.Unlock()
		for i, kinds := range heard {
			if n := len(kinds); n < 4 || !slices.Equal(kinds[n-4:], []EventKind{HoldBegan, Resumed, RollbackBegan, RollbackDone}) {
				t.Errorf("process %d heard of %v", i, kinds)
			}
		}
	})
}

// TestHeardBefore: what a verb has written may be read by Run before the verb follows it; it is told once, by whichever.
func TestHeardBefore(t *testing.T) {
	for _, read := range []bool{false, true} {
		now := driverStart
		store := MemStore()
		a, b := manual(t, store, "a", simPolicy(0), &now), manual(t, store, "b", simPolicy(0), &now)
		for range 2 {
			turn(a)
			turn(b)
		}
		a.Subscribe(func(Event) {})
		must(t, b.Hold(t.Context(), "wait")) // for a's own
		st := inStore(t, store)
		if read {
			a.followHead(st)
		}
		a.follow(st, machine.Current, []machine.Event{{Kind: machine.WasHeld}})
		if len(a.queue) != 1 || a.queue[0].Kind != HoldBegan {
			t.Errorf("read before: %v; what is told is %+v", read, a.queue)
		}
	}
}

// TestBehind: the incident that a step is given names who has not confirmed the rollback, and nobody else.
func TestBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var given []string
		p := threeStages()
		p.Rollback = []RollbackStep{{Name: "undo", Do: func(_ context.Context, in Incident) error { given = in.Behind; return nil }}}
		away := &faulty{Store: MemStore()}
		gone := start(t, "x", p, Options{Store: away, Replica: "gone"})
		gone.serve(10*time.Second, 0, 0)
		for _, name := range []string{"one", "two"} {
			start(t, "x", p, Options{Store: away.Store, Replica: name}).serve(10*time.Second, 0, 0)
		}
		away.set(down, down, nil)
		other := start(t, "x", p, Options{Store: away.Store, Replica: "three"})
		must(t, other.Rollback(t.Context(), "stop"))
		minute()
		other.is(RolledBack, "")
		if len(given) != 1 || !slices.Equal(given, other.Status().Incident.Behind) || given[0][:5] != "gone-" {
			t.Errorf("behind are %q", given)
		}
	})
}

// TestJudgesAlone: one of many that is cut off takes the candidate out of use by its own evidence, in its own process only;
// once it is heard again the evidence of all decides.
func TestJudgesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := &faulty{Store: MemStore()}
		alone := start(t, "x", threeStages(), Options{Store: away})
		alone.serve(10*time.Second, 0, 0)
		other := start(t, "x", threeStages(), Options{Store: away.Store})
		other.serve(20*time.Second, 0, 0)
		away.set(down, down, nil)
		alone.serve(time.Minute, 0, .9)
		if served(alone.Rollout) {
			t.Error("it serves a candidate that fails")
		}
		alone.judgedAsOneOfTwo()
		if !served(other.Rollout) {
			t.Error("the other one does not serve the candidate any more")
		}
		other.is(Running, "everyone 10 %")
		away.set(nil, nil, nil)
		minute()
		if other.Status().State == Running {
			t.Error("the evidence of both does not decide")
		}
	})
}

// judgedAsOneOfTwo holds one that is cut off, and has taken the candidate out of use, to twice the evidence.
func (p *process) judgedAsOneOfTwo() {
	p.t.Helper()
	in := p.clock.alone.st.Incident
	gates := p.plan.Judge.Assess(&judge.State{}, nil)
	i := slices.IndexFunc(gates, func(g judge.Result) bool { return g.Spec.Name == in.Gate })
	if i < 0 || math.Abs(in.NeedE/gates[i].NeedE-2) > 1e-9 {
		p.t.Errorf("one of two needs an E of %v by the gate %q", in.NeedE, in.Gate)
	}
}

// TestForkIsOne: a process judges the same whether it can use the Store or not.
func TestForkIsOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := &faulty{Store: MemStore()}
		policy := threeStages()
		policy.Independent = true // which units vary together is of each process its own
		with, without := start(t, "x", policy, Options{}), start(t, "x", policy, Options{Store: away})
		time.Sleep(50 * time.Millisecond) // so that no request comes at the moment of a tick
		both := func(pause time.Duration, control, candidate float64) {
			time.Sleep(pause)
			with.request(control, candidate)
			without.request(control, candidate)
			synctest.Wait()
		}
		for range 100 { // the last block closes in the last tick
			both(100*time.Millisecond, .02, .02)
		}
		away.set(down, down, nil)
		var there, here []float64 // requests, E and what it needs
		for range 3000 {
			both(2*time.Second, .02, 1) // so few that blocks close by their age
			if st := with.Status(); st.State == RolledBack && there == nil {
				there = []float64{float64(with.n), st.Incident.E, st.Incident.NeedE}
			}
			without.mu.Lock()
			if in := without.intent; in != nil && here == nil {
				here = []float64{float64(without.n), in.incident.E, in.incident.NeedE}
			}
			without.mu.Unlock()
			if there != nil && here != nil {
				break
			}
		}
		if there == nil || !slices.Equal(there, here) {
			t.Errorf("it is rolled back after %v with the Store, %v without", there, here)
		}
	})
}
