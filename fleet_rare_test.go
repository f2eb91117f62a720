package rollout

// What is rare, or somebody's ill will, and must not stay wrong for good.

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// TestVerbOfEarlierGeneration: what may expose somebody is not done to a generation that its caller did not know of. What
// only lowers is.
func TestVerbOfEarlierGeneration(t *testing.T) {
	now := driverStart
	store := MemStore()
	a, b := manual(t, store, "a", threeStages(), &now), manual(t, store, "b", threeStages(), &now)
	next := func() {
		now = now.Add(5 * time.Second)
		turn(a)
		turn(b)
	}
	next()
	ctx := t.Context()
	for name, verb := range map[string]func() error{
		"approve":     func() error { return b.Approve(ctx, "everyone 10 %", "") },
		"advance":     func() error { return b.Advance(ctx, "everyone 10 %", "") },
		"resume":      func() error { return b.Resume(ctx, "") },
		"set percent": func() error { return b.SetPercent(ctx, "everyone", 50, "") },
		"restart":     func() error { return b.Restart(ctx, "") },
		"waive":       func() error { return b.Waive(ctx, "(undo)", "") },
	} {
		next()
		must(t, a.Restart(ctx, "once more"))
		turn(a)
		must(t, a.Hold(ctx, "wait"))
		was := inStore(t, store)
		if err := verb(); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", name, err)
		}
		if st := inStore(t, store); st.Gen != was.Gen || st.Ver != was.Ver {
			t.Errorf("%s: it changed version %d of generation %d to %d of %d", name, was.Ver, was.Gen, st.Ver, st.Gen)
		}
	}
	for name, verb := range map[string]func() error{
		"hold":          func() error { return b.Hold(ctx, "") },
		"rollback ring": func() error { return b.RollbackRing(ctx, "everyone", "") },
		"rollback":      func() error { return b.Rollback(ctx, "") },
	} {
		next()
		must(t, a.Restart(ctx, "once more"))
		turn(a)
		was := inStore(t, store)
		if err := verb(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if st := inStore(t, store); st.Gen != was.Gen || st.Ver == was.Ver {
			t.Errorf("%s: it left version %d of generation %d as it was", name, was.Ver, was.Gen)
		}
		if name == "rollback" && (served(b) || inStore(t, store).Phase != machine.RolledBack) {
			t.Error("it is served once Rollback has returned")
		}
	}
}

// TestTakeOverLost: where the Store has lost who took over the steps of a rollback, and nothing else, nobody gets the fence
// that one has already.
func TestTakeOverLost(t *testing.T) {
	now := driverStart
	store := MemStore()
	p := threeStages()
	p.Rollback = []RollbackStep{{Name: "undo", Do: func(context.Context, Incident) error { return nil }}}
	a := manual(t, store, "a", p, &now)
	turn(a)
	must(t, a.Rollback(t.Context(), "bad"))
	doc, _, err := store.Load(t.Context(), a.key())
	must(t, err)
	st, err := a.update(t.Context(), func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
		if machine.BeginAttempt(s, a.me(), true) < 0 {
			t.Error("there is no step")
		}
		return nil, nil
	})
	must(t, err)
	_, rev, err := store.Load(t.Context(), a.key())
	must(t, err)
	if _, ok, err := store.CompareAndSwap(t.Context(), a.key(), rev, doc); !ok || err != nil {
		t.Fatal(ok, err)
	}
	now = now.Add(5 * time.Second)
	turn(a)
	if got := inStore(t, store); got.Term <= st.Term || got.Phase != machine.RollingBack {
		t.Errorf("the fence is %d and was %d; it is %v", got.Term, st.Term, got.Phase)
	}
}

// garbled are processes with the document of one that nobody can read.
func garbled(t *testing.T, now *time.Time, docs map[string][]byte) *Rollout {
	a := manual(t, MemStore(), "a", threeStages(), now)
	a.plan.Keep = 20
	turn(a)
	st := inStore(t, a.store)
	for inc, doc := range docs {
		if _, ok, err := a.store.CompareAndSwap(t.Context(), a.evidencePrefix(st.Gen, st.Nonce)+inc, 0, doc); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	return a
}

// work is so many ticks with traffic.
func work(a *Rollout, now *time.Time, ticks int) {
	for i := range ticks {
		*now = now.Add(5 * time.Second)
		for j := range 20 {
			a.Decide(Unit{Key: fmt.Sprint(now.Unix(), i, j)}).Record(Errors.Observe(false))
		}
		turn(a)
	}
}

// TestGivenUpForGood: a document that cannot be read is given up once, and stands in nobody's way again, also long after it
// is forgotten who was retired.
func TestGivenUpForGood(t *testing.T) {
	now := driverStart
	a := garbled(t, &now, map[string][]byte{"other": []byte("garbage")})
	work(a, &now, missingTries)
	if _, ok := inStore(t, a.store).Retired["other"]; !ok || a.missing != 0 {
		t.Fatal("it is not given up")
	}
	for range 200 {
		work(a, &now, 1)
		if a.missing > 0 {
			t.Fatalf("round %d: it is in the way again", inStore(t, a.store).Round)
		}
	}
	if value, _, err := a.store.Load(t.Context(), a.evidencePrefix(a.known.Gen, a.known.Nonce)+"other"); err != nil || string(value) != "garbage" {
		t.Errorf("it was overwritten: %q, %v", value, err)
	}
}

// TestForeignSeries: what somebody publishes of metrics that nobody has does not come into the state, neither when the
// document is folded nor when another one is given up.
func TestForeignSeries(t *testing.T) {
	for _, broken := range []bool{false, true} {
		now := driverStart
		foreign := &tally.Doc{About: tally.About{Inc: "other", Seq: 1, Sealed: !broken}}
		for i := range 100 {
			counts := tally.NewCounts(2)
			counts[0][0] = 1
			foreign.Series = append(foreign.Series, tally.Series{Key: tally.Key{Epoch: 1, Ring: "everyone", Metric: fmt.Sprintf("m%03d", i), Cells: 2}, Counts: counts})
		}
		docs := map[string][]byte{"other": foreign.Encode()}
		if broken {
			docs["third"] = []byte("garbage")
		}
		a := garbled(t, &now, docs)
		work(a, &now, missingTries+4)
		st := inStore(t, a.store)
		_, folded := st.Retired["other"]
		_, gone := st.Retired["third"]
		if folded == broken || gone != broken {
			t.Fatalf("it is not as it was meant: %v, %v", st.Retired, st.Cursors)
		}
		for k := range st.Consumed {
			if k.Metric[0] == 'm' {
				t.Fatalf("the state has %v, which nobody asked for", k)
			}
		}
	}
}

// TestJudgedJustNow: who is drawn leaves it to another who has judged within a quarter of a tick by its clock, follows that,
// and judges all the same where something must never happen, or clocks do not agree.
func TestJudgedJustNow(t *testing.T) {
	now := driverStart
	late := now
	lists := newMetered(0)
	store := lists.Store
	all := []*Rollout{manual(t, store, "a", threeStages(), &now), manual(t, lists, "b", threeStages(), &late), manual(t, store, "c", threeStages(), &now)}
	a, b := all[0], all[1]
	for range 3 {
		now = now.Add(5 * time.Second)
		late = now
		for _, r := range all {
			work(r, new(time.Time), 1)
			late, now = late.Add(2*time.Second), now.Add(2*time.Second)
		}
	}
	if st := inStore(t, store); st.Live != 3 {
		t.Fatalf("there are %d processes", st.Live)
	}
	for _, c := range []struct {
		after, behind time.Duration
		alarm, judges bool
	}{
		{after: 0},
		{after: time.Second},
		{after: 1249 * time.Millisecond},
		{after: 1250 * time.Millisecond, judges: true},
		{after: time.Second, alarm: true, judges: true},
		{after: time.Second, behind: time.Hour, judges: true},
		{after: time.Second, behind: -time.Hour, judges: true},
	} {
		now = now.Add(time.Minute)
		late = now.Add(-c.behind)
		work(a, new(time.Time), 1)
		now, late = now.Add(c.after), late.Add(c.after)
		lists.reset()
		b.clock.alarm = c.alarm
		work(b, new(time.Time), 1)
		st := inStore(t, store)
		if n := lists.reset().read["list"].n; n > 0 != c.judges {
			t.Errorf("%+v: it makes %d Lists", c, n)
		}
		if b.known.Ver != st.Ver {
			t.Errorf("%+v: it follows version %d of %d", c, b.known.Ver, st.Ver)
		}
	}
}
