package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Several processes on one Store are one rollout.

// journal is what happened, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) is(t *testing.T, want ...string) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if !slices.Equal(j.lines, want) {
		t.Errorf("what happened is %q, not %q", j.lines, want)
	}
}

// TestNewVersionFinishesRollback: the process of a new version runs what is left of the old one's steps, by their names,
// and can then begin.
func TestNewVersionFinishesRollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var log journal
		p := versioned("1")
		p.Rollback = []RollbackStep{
			{Name: "cache", Do: func(_ context.Context, in Incident) error { log.add("1 %s", in.Key); return nil }},
			{Name: "table", Attempts: 1, Do: func(_ context.Context, in Incident) error { log.add("1 %s", in.Key); return errors.New("no") }},
		}
		one := start(t, "x", p, Options{Store: store})
		one.serve(10*time.Second, 0, 0)
		must(t, one.Rollback(t.Context(), "bad"))
		minute()
		one.is(Stuck, "")
		one.stop()

		p = versioned("2")
		for _, name := range []string{"cache", "table", "queue"} {
			p.Rollback = append(p.Rollback, RollbackStep{Name: name, Do: func(_ context.Context, in Incident) error {
				if in.Version != "1" || in.Note != "bad" {
					t.Errorf("the incident is %+v", in)
				}
				log.add("2 %s", in.Key)
				return nil
			}})
		}
		two := start(t, "x", p, Options{Store: store})
		minute()
		two.is(Stuck, "")
		if !two.Status().Passive || served(two.Rollout) {
			t.Error("the new version did not wait for the old one's rollback")
		}
		if err := two.Restart(t.Context(), "now"); !errors.Is(err, ErrState) {
			t.Errorf("a restart of what is stuck: %v", err)
		}
		must(t, two.Rollback(t.Context(), "again"))
		minute()
		log.is(t, "1 x/1/cache", "1 x/1/table", "2 x/1/table")
		two.is(Running, "everyone 10 %")
		must(t, two.Restart(t.Context(), "from the start"))
		minute()
		if two.is(Running, "everyone 10 %"); two.Status().Generation != 3 || !served(two.Rollout) {
			t.Errorf("restarted, and it is %+v", two.Status())
		}
	})
}

// TestRollbackFromOldVersion: who rolls back with an old version's process has the present version's steps run.
func TestRollbackFromOldVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var log journal
		policy := func(v string) Policy {
			p := versioned(v)
			p.Rollback = []RollbackStep{{Name: "undo " + v, Do: func(_ context.Context, in Incident) error { log.add("%s", in.Key); return nil }}}
			return p
		}
		one := start(t, "x", policy("1"), Options{Store: store})
		one.serve(10*time.Second, 0, 0)
		two := start(t, "x", policy("2"), Options{Store: store})
		two.serve(10*time.Second, 0, 0)
		one.stop() // its verbs go on
		must(t, one.Ready(t.Context()))
		must(t, one.Rollback(t.Context(), "stop"))
		minute()
		two.is(RolledBack, "")
		log.is(t, "x/2/undo 2")
	})
}

// TestStepsOnceInAll: with several processes each step runs once, one at a time and in order.
func TestStepsOnceInAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var log journal
		p := threeStages()
		for _, name := range []string{"one", "two", "three"} {
			p.Rollback = append(p.Rollback, RollbackStep{Name: name, Timeout: time.Hour, Do: func(ctx context.Context, in Incident) error {
				log.add("%s begins", name)
				if !sleep(ctx, 3*time.Minute) { // many ticks
					log.add("%s is cut short", name)
				}
				log.add("%s ends", name)
				return ctx.Err()
			}})
		}
		var all []*process
		for range 4 {
			all = append(all, start(t, "x", p, Options{Store: store}))
			time.Sleep(700 * time.Millisecond)
		}
		all[0].serve(10*time.Second, 0, 0)
		must(t, all[1].Rollback(t.Context(), "bad"))
		for range 15 {
			minute()
		}
		for _, r := range all {
			r.is(RolledBack, "")
		}
		log.is(t, "one begins", "one ends", "two begins", "two ends", "three begins", "three ends")
		for _, step := range all[3].Status().Steps {
			if step.Attempts != 1 || !step.Done {
				t.Errorf("the step is %+v", step)
			}
		}
	})
}

// TestDeadRunner: a process that runs steps and gives no sign of life for three ticks is replaced, with a higher fence,
// and has given up before that.
func TestDeadRunner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		f := &faulty{Store: store}
		var log journal
		fence := map[string]string{}
		policy := func(who string) Policy {
			p := threeStages()
			p.Rollback = []RollbackStep{{Name: "undo", Timeout: time.Hour, Do: func(ctx context.Context, in Incident) error {
				log.add("%s begins", who)
				fence[who] = in.Fence
				if who == "first" {
					<-ctx.Done()
				}
				log.add("%s ends", who)
				return ctx.Err()
			}}}
			return p
		}
		first := start(t, "x", policy("first"), Options{Store: f})
		first.serve(10*time.Second, 0, 0)
		must(t, first.Rollback(t.Context(), "bad"))
		synctest.Wait()
		second := start(t, "x", policy("second"), Options{Store: store})
		for range 10 {
			minute()
		}
		log.is(t, "first begins") // it is alive
		f.set(down, down, nil)
		time.Sleep(3*defaultInterval - time.Second)
		log.is(t, "first begins", "first ends") // before another one may take over
		time.Sleep(3 * defaultInterval)
		synctest.Wait()
		log.is(t, "first begins", "first ends", "second begins", "second ends")
		second.is(RolledBack, "")
		if fence["first"] == "" || fence["second"] <= fence["first"] {
			t.Errorf("the fences are %q", fence)
		}
		f.set(nil, nil, nil)
		minute()
		log.is(t, "first begins", "first ends", "second begins", "second ends")
		first.is(RolledBack, "")
	})
}

// TestTimePassesOnce: neither bakes nor deadlines go faster with more processes.
func TestTimePassesOnce(t *testing.T) {
	for _, k := range []int{1, 4} {
		processes := func(t *testing.T) []*process {
			p, store := threeStages(), MemStore()
			p.Bake, p.Deadline = 5*time.Minute, 30*time.Minute
			var all []*process
			for range k {
				all = append(all, start(t, "x", p, Options{Store: store}))
				time.Sleep(700 * time.Millisecond)
			}
			return all
		}
		synctest.Test(t, func(t *testing.T) {
			all := processes(t)
			began := time.Now()
			for n := 0; all[0].Status().Stage.Index == 0; n++ {
				for i, r := range all {
					for j := range 12 {
						r.Decide(Unit{Key: fmt.Sprint(n, i, j)}).Record(Errors.Observe(false))
					}
				}
				if time.Sleep(time.Second); n > 3600 {
					t.Fatalf("%d processes: it does not bake", k)
				}
			}
			if took := time.Since(began).Round(time.Second); took < 5*time.Minute-10*time.Second || took > 6*time.Minute {
				t.Errorf("%d processes: a bake of 5 minutes took %v", k, took)
			}
		})
		synctest.Test(t, func(t *testing.T) {
			all := processes(t)
			began := time.Now()
			for all[0].Status().State == Running && time.Since(began) < 3*time.Hour {
				time.Sleep(time.Second)
			}
			if took := time.Since(began).Round(time.Second); took < 30*time.Minute-10*time.Second || took > 32*time.Minute {
				t.Errorf("%d processes: a deadline of 30 minutes took %v", k, took)
			}
		})
	}
}

// TestPoliciesSideBySide: of two policies of one version the one that was started last is in force for as long as it is
// about; a process with the other one serves its shares, or nobody where it would serve others.
func TestPoliciesSideBySide(t *testing.T) {
	for name, edit := range map[string]func(*Policy){
		"another bake":  func(p *Policy) { p.Bake = 2 * time.Hour },
		"another gate":  func(p *Policy) { p.Gates = append(p.Gates, Latency.NoWorse()) },
		"another ring":  func(p *Policy) { p.Rings = []Ring{{Name: "staff"}} },
		"other holding": func(p *Policy) { p.Holdback = 7 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := MemStore()
				p := threeStages()
				p.Bake = time.Hour // all of it happens in the first stage
				one := start(t, "x", p, Options{Store: store})
				one.serve(20*time.Second, 0, 0)
				edit(&p)
				two := start(t, "x", p, Options{Store: store})
				same := one.plan.Assignment == two.plan.Assignment
				gen := uint64(1)
				if !same {
					gen = 2
				}
				for range 300 {
					two.serve(time.Second, 0, 0)
					st := inStore(t, store)
					if st.Policy != two.plan.Policy || st.Gen != gen {
						t.Fatalf("the older policy is back, in generation %d", st.Gen)
					}
				}
				if !one.Status().Passive || two.Status().Passive || !served(two.Rollout) {
					t.Error("not the policy that was started last rules")
				}
				for i := range 200 {
					u := Unit{Key: fmt.Sprint(i)}
					a, b := one.Peek(u), two.Peek(u)
					if same && a.Enabled() != b.Enabled() || !same && a.Enabled() {
						t.Fatalf("%v gets %v by the older policy and %v by the other", u.Key, a.Enabled(), b.Enabled())
					}
				}
				two.stop()
				for range 4 {
					minute()
				}
				if st := inStore(t, store); st.Policy != one.plan.Policy || one.Status().Passive || !served(one.Rollout) {
					t.Error("the policy that is left does not take over")
				}
			})
		})
	}
}

// TestStepsDoNotWaitForTheDead: a process that has ended confirms no rollback. The steps wait three ticks for it, and the
// grace of sessions only where it, or another one, has some under way.
func TestStepsDoNotWaitForTheDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var log journal
		p := threeStages()
		p.Sessions.Grace = 10 * time.Minute
		p.Rollback = []RollbackStep{{Name: "undo", Do: func(context.Context, Incident) error { log.add("undone"); return nil }}}
		var all []*process
		for range 3 {
			r := start(t, "x", p, Options{Store: store})
			r.serve(10*time.Second, 0, 0)
			all = append(all, r)
		}
		all[0].stop()
		must(t, all[1].Rollback(t.Context(), "bad"))
		time.Sleep(5 * defaultInterval)
		log.is(t, "undone")
		all[2].is(RolledBack, "")

		must(t, all[1].Restart(t.Context(), "again"))
		minute()
		for _, r := range all[1:] {
			r.serve(10*time.Second, 0, 0)
		}
		_, s := all[2].Begin(t.Context(), all[2].of(Candidate))
		must(t, all[1].Rollback(t.Context(), "bad"))
		minute()
		log.is(t, "undone")
		s.End(nil)
		minute()
		log.is(t, "undone", "undone")
	})
}

// TestStepsOnceInACrowd: with so many processes that each seldom evaluates, the signs of life of the one that runs the steps
// are seen all the same.
func TestStepsOnceInACrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var log journal
		p := threeStages()
		for _, name := range []string{"one", "two"} {
			p.Rollback = append(p.Rollback, RollbackStep{Name: name, Timeout: time.Hour, Do: func(ctx context.Context, in Incident) error {
				log.add("%s begins", name)
				sleep(ctx, 5*time.Minute)
				log.add("%s ends", name)
				return ctx.Err()
			}})
		}
		var all []*process
		for range 8 {
			r := start(t, "x", p, Options{Store: store})
			all = append(all, r)
			r.serve(5*time.Second, 0, 0)
		}
		must(t, all[1].Rollback(t.Context(), "bad"))
		for range 15 {
			minute()
		}
		log.is(t, "one begins", "one ends", "two begins", "two ends")
		for _, step := range all[3].Status().Steps {
			if step.Attempts != 1 || !step.Done {
				t.Errorf("the step is %+v", step)
			}
		}
	})
}

// TestOneTakesOver: of several that find that the steps of a rollback stand still, one takes them over.
func TestOneTakesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var log journal
		p := threeStages()
		p.Rollback = []RollbackStep{{Name: "undo", Timeout: time.Hour, Do: func(ctx context.Context, in Incident) error {
			log.add("begins with fence %s", strings.TrimLeft(in.Fence, "0"))
			sleep(ctx, time.Minute)
			return ctx.Err()
		}}}
		one := start(t, "x", p, Options{Store: store})
		one.serve(10*time.Second, 0, 0)
		must(t, one.Rollback(t.Context(), "bad"))
		synctest.Wait()
		st := inStore(t, store)
		two := start(t, "x", p, Options{Store: store})
		two.stop()
		two.runSteps(t.Context(), &rival{gen: st.Gen, term: st.Term - 1, beat: st.Beat}) // before one took over
		minute()
		log.is(t, "begins with fence 1")
		one.is(RolledBack, "")
	})
}
