package rollout

// What is rare, or somebody's ill will, and must not stay wrong for good.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
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
		if err := verb(); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "overtaken") {
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

// racing has something happen before a write, once.
type racing struct {
	Store
	before func()
}

func (r *racing) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	if f := r.before; f != nil {
		r.before = nil
		f()
	}
	return r.Store.CompareAndSwap(ctx, key, old, value)
}

// TestVerbOverNewGeneration: a generation that begins while a rollback is being stored is rolled back with it.
func TestVerbOverNewGeneration(t *testing.T) {
	now := driverStart
	store := MemStore()
	race := &racing{Store: store}
	a, b := manual(t, store, "a", threeStages(), &now), manual(t, race, "b", threeStages(), &now)
	turn(a)
	turn(b)
	race.before = func() {
		must(t, a.Restart(t.Context(), "once more"))
		turn(a)
	}
	must(t, b.Rollback(t.Context(), "bad"))
	for range 3 {
		now = now.Add(5 * time.Second)
		turn(a)
		turn(b)
	}
	if st := inStore(t, store); st.Gen != 2 || st.Phase != machine.RolledBack || served(a) || served(b) {
		t.Errorf("generation %d is %v, served: %v, %v", st.Gen, st.Phase, served(a), served(b))
	}
}

// TestTakeOverLost: where the Store has lost who took over the steps of a rollback, and nothing else, nobody gets the fence
// that one has already: neither where the one that took over evaluates next nor where it only follows, nor where another has
// taken over meanwhile.
func TestTakeOverLost(t *testing.T) {
	for _, c := range []struct{ evaluates, another bool }{{true, false}, {false, false}, {true, true}, {false, true}} {
		now := driverStart
		store := MemStore()
		p := threeStages()
		p.Rollback = []RollbackStep{{Name: "undo", Do: func(context.Context, Incident) error { return nil }}}
		all := []*Rollout{manual(t, store, "a", p, &now), manual(t, store, "b", p, &now), manual(t, store, "c", p, &now)}
		a, b := all[0], all[1]
		for range 4 {
			for _, r := range all {
				now = now.Add(2 * time.Second)
				busy(r)
			}
		}
		takeOver := func(r *Rollout) *machine.State {
			st, err := r.update(t.Context(), func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
				if machine.BeginAttempt(s, r.me(), true) < 0 {
					t.Error("there is no step")
				}
				return nil, nil
			})
			must(t, err)
			return st
		}
		must(t, a.Rollback(t.Context(), "bad"))
		turn(b)
		doc, _, err := store.Load(t.Context(), a.key())
		must(t, err)
		fence := takeOver(a).Term
		_, rev, err := store.Load(t.Context(), a.key())
		must(t, err)
		if _, ok, err := store.CompareAndSwap(t.Context(), a.key(), rev, doc); !ok || err != nil {
			t.Fatal(ok, err)
		}
		before, err := machine.Decode("x", doc)
		must(t, err)
		a.follow(before, machine.Stands(before, a.plan), nil) // as a tick does that had loaded it before
		if got := a.following().Term; got != fence {
			t.Errorf("the fence is %d, and it follows what was before: %d", fence, got)
		}
		if c.another {
			takeOver(b)
		}
		a.coin = func(int) bool { return c.evaluates }
		now = now.Add(5 * time.Second)
		turn(a)
		if got := inStore(t, store); got.Term <= fence || got.Phase != machine.RollingBack {
			t.Errorf("%+v: the fence is %d and was %d; it is %v", c, got.Term, fence, got.Phase)
		}
		if got := takeOver(a); got.Term <= fence {
			t.Errorf("%+v: the fence %d is given once more", c, got.Term)
		}
	}
}

// garbled is a process that finds such documents of others.
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

// busy is a tick with traffic, at the time it is.
func busy(r *Rollout) {
	for i := range 20 {
		r.Decide(Unit{Key: fmt.Sprint(r.now().Unix(), " ", i)}).Record(Errors.Observe(false))
	}
	turn(r)
}

// work is so many ticks with traffic.
func work(r *Rollout, now *time.Time, ticks int) {
	for range ticks {
		*now = now.Add(5 * time.Second)
		busy(r)
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
		foreign.Series = append(foreign.Series, tally.Series{Key: tally.Key{Epoch: 1, Ring: "mars", Metric: "split", Cells: splitForm.Size()}, Counts: tally.NewCounts(splitForm.Size())})
		foreign.Series[100].Counts[0][0] = 1
		foreign.Sort()
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
			if k.Metric[0] == 'm' || k.Ring == "mars" {
				t.Fatalf("the state has %v, which nobody asked for", k)
			}
		}
	}
}

// TestGivenUpOnce: what an edited policy does not judge is not forgotten where a document is given up: another policy may judge
// it, and it counts once.
func TestGivenUpOnce(t *testing.T) {
	now := driverStart
	m := NewRate("m")
	with, without := threeStages(), threeStages()
	with.Independent, with.Bake, with.Deadline = true, 24*time.Hour, 2000*time.Hour
	without.Independent, without.Bake, without.Deadline = true, 24*time.Hour, 2000*time.Hour
	with.Gates = append(with.Gates, m.AtMost(50))
	store := MemStore()
	judged, recorded := uint64(0), uint64(0)
	begin := func(name string, p Policy) *Rollout {
		r := manual(t, store, name, p, &now)
		r.judged = func(blocks []machine.Block) {
			for _, b := range blocks {
				for _, n := range slices.Concat(b.Candidate, b.Control) {
					if b.Metric == "m" {
						judged += n
					}
				}
			}
		}
		return r
	}
	ticks := func(r *Rollout, n int) {
		for range n {
			now = now.Add(5 * time.Second)
			turn(r)
		}
	}
	a := begin("a", with)
	turn(a)
	for i := range 400 {
		if d := a.Decide(Unit{Key: fmt.Sprint(i)}); d.Cohort() != None {
			d.Record(m.Observe(false))
			recorded++
		}
	}
	ticks(a, 30)
	st := inStore(t, store)
	if judged != recorded || recorded == 0 {
		t.Fatalf("%d of %d are judged", judged, recorded)
	}
	if _, ok, err := store.CompareAndSwap(t.Context(), a.evidencePrefix(st.Gen, st.Nonce)+"other", 0, []byte("garbage")); !ok || err != nil {
		t.Fatal(ok, err)
	}
	ticks(begin("b", without), missingTries+3)
	if _, ok := inStore(t, store).Retired["other"]; !ok {
		t.Fatal("it is not given up")
	}
	ticks(begin("c", with), 5)
	if st := inStore(t, store); st.Policy != a.plan.Policy {
		t.Fatal("the first policy is not in force")
	}
	if judged != recorded {
		t.Errorf("%d were recorded, and %d judged", recorded, judged)
	}
}
