package rollout

// An evaluation is left to who has just made one: not if that would leave something undone.

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// familiar are processes that know of each other: the second has a clock and a meter of its own.
func familiar(t *testing.T, n int, p Policy, now, late *time.Time) ([]*Rollout, *metered) {
	lists := newMetered(0)
	var all []*Rollout
	for i := range n {
		if i == 1 {
			all = append(all, manual(t, lists, "b", p, late))
		} else {
			all = append(all, manual(t, lists.Store, string(rune('a'+i)), p, now))
		}
	}
	for range 3 {
		for _, r := range all {
			*now = now.Add(2 * time.Second)
			*late = *now
			busy(r)
		}
	}
	if st := inStore(t, lists.Store); st.Live != n {
		t.Fatalf("there are %d processes", st.Live)
	}
	return all, lists
}

// TestJudgedJustNow: who is drawn leaves it to another who has judged within a quarter of a tick by its clock, and follows that.
// It judges all the same where it is the last thing it does, where something has woken it, where something must never happen,
// where it was the one who judged, where it has left it three times in a row, and where clocks do not agree.
func TestJudgedJustNow(t *testing.T) {
	for n := 2; n <= 3; n++ {
		now := driverStart
		late := now
		all, lists := familiar(t, n, threeStages(), &now, &late)
		a, b := all[0], all[1]
		for _, c := range []struct {
			after, behind           time.Duration
			alarm, woken, last, own bool
			left                    int
			judges                  bool
		}{
			{after: 0},
			{after: time.Second},
			{after: 1249 * time.Millisecond},
			{after: 1250 * time.Millisecond, judges: true},
			{after: time.Second, alarm: true, judges: true},
			{after: time.Second, woken: true, judges: true},
			{after: time.Second, last: true, judges: true},
			{after: time.Second, left: mostLeft - 1},
			{after: time.Second, left: mostLeft, judges: true},
			{after: time.Second, behind: time.Hour, judges: true},
			{after: time.Second, behind: -time.Hour, judges: true},
			{after: time.Second, own: true, judges: true},
		} {
			now = now.Add(5 * time.Second)
			late = now.Add(-c.behind)
			if c.own {
				busy(b)
			} else {
				busy(a)
			}
			now, late = now.Add(c.after), late.Add(c.after)
			lists.reset()
			b.clock.alarm, b.clock.woken, b.clock.left = c.alarm, c.woken, c.left
			b.tick(t.Context(), &b.clock, c.last)
			st := inStore(t, lists.Store)
			if n := lists.reset().read["list"].n; n > 0 != c.judges {
				t.Errorf("%+v: it makes %d Lists", c, n)
			}
			if left := map[bool]int{false: c.left + 1}[c.judges]; b.clock.left != left {
				t.Errorf("%+v: it has left %d in a row, not %d", c, b.clock.left, left)
			}
			if b.known.Ver != st.Ver {
				t.Errorf("%+v: it follows version %d of %d", c, b.known.Ver, st.Ver)
			}
			must(t, a.refresh(t.Context())) // it hears of what is stored
		}
	}
}

// TestWokenByCheck: of two processes, whichever hears first from a Check that something is wrong acts at once.
func TestWokenByCheck(t *testing.T) {
	for i := range 20 {
		synctest.Test(t, func(t *testing.T) {
			store := MemStore()
			var bad atomic.Bool
			var told atomic.Pointer[time.Time]
			p := threeStages()
			p.Bake, p.Deadline = 24*time.Hour, 1000*time.Hour
			p.Gates = append(p.Gates, Check("disk", func(context.Context) (Verdict, error) {
				if bad.Load() {
					now := time.Now()
					told.CompareAndSwap(nil, &now)
					return Unhealthy, nil
				}
				return Healthy, nil
			}))
			a := start(t, "x", p, Options{Store: store, Replica: "a"})
			a.serve(time.Duration(i)*230*time.Millisecond, 0, 0)
			b := start(t, "x", p, Options{Store: store, Replica: "b"})
			for range 60 {
				a.serve(500*time.Millisecond, 0, 0)
				b.serve(500*time.Millisecond, 0, 0)
			}
			bad.Store(true)
			for inStore(t, store).Phase == machine.Running {
				a.serve(100*time.Millisecond, 0, 0)
			}
			first := told.Load()
			if first == nil {
				t.Fatal("it is held, and the Check was not asked")
			}
			if d := time.Since(*first); d > 2*time.Second+300*time.Millisecond { // it is asked once more before that is believed
				t.Errorf("%d: it took %v", i, d)
			}
		})
	}
}

// TestShortLives: where processes start all the time and live for a few ticks, time goes by and stages are left.
func TestShortLives(t *testing.T) {
	unraced(t)
	for _, life := range []time.Duration{20 * time.Second, 150 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			store := MemStore()
			var all sync.WaitGroup
			for n := range 8 * 60 {
				ctx, cancel := context.WithTimeout(t.Context(), life)
				defer cancel()
				r, err := New("x", threeStages(), &Options{Store: store, Logger: quiet, Replica: fmt.Sprint("r", n)})
				must(t, err)
				all.Go(func() { _ = r.Run(ctx) })
				all.Go(func() {
					for i := 0; sleep(ctx, time.Second); i++ {
						r.Decide(Unit{Key: fmt.Sprint(n, " ", i)}).Record(Errors.Observe(false))
					}
				})
				time.Sleep(1009 * time.Millisecond)
			}
			if st := inStore(t, store); st.Stage.Percent < 50 {
				t.Errorf("lives of %v: after eight minutes, of a stage of one, %v of %q", life, st.Elapsed, st.Stage.Name)
			}
			all.Wait()
		})
	}
}
