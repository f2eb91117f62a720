package rollout

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// TestIdlePolicies: without traffic, with a shorter Interval and woken up, the older policy leaves a living one alone.
func TestIdlePolicies(t *testing.T) {
	for _, name := range []string{"idle", "another ring", "shorter interval", "woken"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := MemStore()
				o := Options{Store: store}
				if name == "shorter interval" {
					o.Interval = time.Second
				}
				one := start(t, "x", threeStages(), o)
				one.serve(20*time.Second, 0, 0)
				p := threeStages()
				p.Bake = 30 * time.Minute
				if name == "another ring" {
					p.Rings = []Ring{{Name: "staff"}}
				}
				two := start(t, "x", p, Options{Store: store})
				changes, last := 0, two.plan.Policy
				for range 3600 {
					time.Sleep(time.Second)
					if name == "woken" {
						one.wakeUp() // a verb, a Check's flapping, an event for Never
					}
					if st := inStore(t, store); st.Policy != last {
						changes, last = changes+1, st.Policy
					}
				}
				if changes > 0 {
					t.Errorf("%d changes of the policy in an hour, generation %d", changes, inStore(t, store).Gen)
				}
			})
		})
	}
}

// TestLivingRunner: wake-ups are no ticks, so a living runner of steps is not replaced.
func TestLivingRunner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var log journal
		p := threeStages()
		p.Rollback = []RollbackStep{{Name: "undo", Timeout: time.Hour, Do: func(ctx context.Context, in Incident) error {
			log.add("begins")
			sleep(ctx, 2*time.Minute)
			log.add("ends")
			return ctx.Err()
		}}}
		a := start(t, "x", p, Options{Store: store})
		a.serve(10*time.Second, 0, 0)
		must(t, a.Rollback(t.Context(), "bad"))
		synctest.Wait()
		b := start(t, "x", p, Options{Store: store})
		time.Sleep(7 * time.Second)
		for range 5 {
			must(t, b.Rollback(t.Context(), "stop"))
			synctest.Wait()
		}
		for range 5 {
			minute()
		}
		log.is(t, "begins", "ends")
	})
}

// TestUnknownStep: a process of another version, which has no such step, leaves it to one that has.
func TestUnknownStep(t *testing.T) {
	for _, by := range []string{"operator", "gate"} {
		t.Run(by, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := MemStore()
				policy := func(v string) Policy {
					p := versioned(v)
					p.Rollback = []RollbackStep{{Name: "undo " + v, Do: func(context.Context, Incident) error { return nil }}}
					return p
				}
				one := start(t, "x", policy("1"), Options{Store: store})
				one.serve(10*time.Second, 0, 0)
				two := start(t, "x", policy("2"), Options{Store: store})
				two.serve(10*time.Second, 0, 0)
				if by == "operator" {
					must(t, one.Rollback(t.Context(), "stop"))
					minute()
				} else {
					for range 600 {
						if s := two.Status().State; s == RolledBack || s == Stuck {
							break
						}
						two.serve(time.Second, 0, .5)
					}
				}
				two.is(RolledBack, "")
			})
		})
	}
}

// TestCheckBetweenCheckpoints: a Check that was healthy for a moment in a silent rollout is acted on again.
func TestCheckBetweenCheckpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := threeStages()
		p.Rings = []Ring{{Name: "staff"}}
		p.Stages = append([]Stage{{Ring: "staff", Percent: 50}}, p.Stages...)
		p, says := checked(p, RollbackRing)
		r := start(t, "x", p, Options{Store: MemStore()})
		says.Store(int32(Unhealthy))
		minute()
		time.Sleep(11 * time.Second) // past a checkpoint
		r.is(Held, "staff 50 %")
		says.Store(int32(Healthy))
		time.Sleep(30 * time.Second)
		must(t, r.Advance(t.Context(), "staff 50 %", "past it"))
		r.is(Running, "everyone 10 %")
		says.Store(int32(Unhealthy))
		for range 10 {
			minute()
		}
		r.is(RolledBack, "")
	})
}

// TestManyVersions: a rollback is stored beside a thousand long versions full of characters that JSON escapes.
func TestManyVersions(t *testing.T) {
	r := Must("x", versioned("v"), &Options{Logger: quiet})
	s := machine.New("x", r.plan, "n")
	for i := range machine.MaxVersions - 1 {
		s.Versions = append(s.Versions, machine.VersionEntry{Version: fmt.Sprintf("%04d%s", i, strings.Repeat("<", 252)), Gen: uint64(i + 2)})
	}
	if _, err := s.Encode(); err != nil {
		t.Error(errors.Unwrap(err), err)
	}
}
