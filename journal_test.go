package rollout

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// ward is a rollout whose effects of the kinds "order" and "mail" are noted when they are undone.
type ward struct {
	*process
	store *faulty
	mu    sync.Mutex
	log   []string
	full  []Effect
	fail  func(ctx context.Context, e Effect) error // may be nil
}

func (w *ward) policy() Policy {
	p := talks(SessionPolicy{})
	p.Undo = map[string]func(context.Context, Effect) error{}
	for _, kind := range []string{"order", "mail"} {
		p.Undo[kind] = func(ctx context.Context, e Effect) error {
			w.mu.Lock()
			w.log, w.full = append(w.log, string(e.Payload)), append(w.full, e)
			fail := w.fail
			w.mu.Unlock()
			if fail != nil {
				return fail(ctx, e)
			}
			return nil
		}
	}
	return p
}

func warded(t *testing.T, edit func(*Policy)) *ward {
	t.Helper()
	w := &ward{store: &faulty{Store: MemStore()}}
	p := w.policy()
	if edit != nil {
		edit(&p)
	}
	w.process = start(t, "x", p, Options{Store: w.store})
	return w
}

func (w *ward) undone() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.log)
}

func (w *ward) failing(f func(context.Context, Effect) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail = f
}

// wants checks what was undone so far, in order.
func (w *ward) wants(want ...string) {
	w.t.Helper()
	if got := w.undone(); !slices.Equal(got, want) {
		w.t.Errorf("undone were %q, not %q", got, want)
	}
}

// left are the effects in the store.
func (w *ward) left() int {
	w.t.Helper()
	all, err := w.store.Store.List(context.Background(), machine.EffectPrefix("x"))
	must(w.t, err)
	return len(all)
}

func (w *ward) journal(d Decision, payload string) {
	w.t.Helper()
	kind := "order"
	if strings.HasPrefix(payload, "mail") {
		kind = "mail"
	}
	must(w.t, d.Journal(w.t.Context(), kind, []byte(payload)))
}

// TestUndo: what was journalled is undone after the steps, the newest first, by its kind, with what was said of it.
func TestUndo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &ward{store: &faulty{Store: MemStore()}}
		p := w.policy()
		p.Version = "7"
		p.Rollback = []RollbackStep{{Name: "first", Do: func(context.Context, Incident) error {
			if len(w.undone()) > 0 {
				t.Error("undone before the steps")
			}
			return nil
		}}}
		w.process = start(t, "x", p, Options{Store: w.store})
		d := w.Decide(w.of(Candidate, "staff"))
		for i := range 12 {
			w.journal(d, fmt.Sprintf("%s %d", []string{"order", "mail"}[i%2], i))
			time.Sleep(time.Duration(i%3) * time.Second) // some at one moment
		}
		at := time.Now()
		must(t, w.Rollback(t.Context(), "stop"))
		minute()
		w.is(RolledBack, "")
		w.wants("mail 11", "order 10", "mail 9", "order 8", "mail 7", "order 6", "mail 5", "order 4", "mail 3", "order 2", "mail 1", "order 0")
		if w.left() != 0 {
			t.Errorf("%d effects are left", w.left())
		}
		keys := map[string]bool{}
		for i, e := range w.full {
			keys[e.Key] = true
			if e.Name != "x" || e.Version != "7" || e.Generation != 1 || e.Ring != "staff" || e.Fence == "" || at.Sub(e.Time) > 13*time.Second || e.Kind != string(e.Payload[:len(e.Kind)]) {
				t.Errorf("%d: %+v", i, e)
			}
		}
		if len(keys) != 12 {
			t.Errorf("%d keys", len(keys))
		}
		if steps := w.Status().Steps; len(steps) != 2 || steps[1].Name != machine.UndoStep || steps[1].Effects != 12 || !steps[1].Done {
			t.Errorf("%+v", steps)
		}
	})
}

// TestUndoNothing: what is no effect of a candidate is not recorded, and a rollback without effects ends.
func TestUndoNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		w.journal(Decision{}, "order of nobody")
		w.journal(w.Decide(w.of(Control)), "order of the control")
		w.journal(w.Decide(Unit{}), "order of no unit")
		release := w.force(Candidate)
		w.journal(w.Decide(Unit{Key: "a"}), "order of a test")
		release()
		if w.left() != 0 {
			t.Errorf("%d effects are stored", w.left())
		}
		must(t, w.Rollback(t.Context(), "stop"))
		minute()
		w.is(RolledBack, "")
		w.wants()
	})
}

// TestJournalRefuses: an effect that cannot be recorded is refused, and is not there afterwards.
func TestJournalRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		d, inner := w.Decide(w.of(Candidate)), w.Decide(w.of(Candidate, "staff"))
		refused := func(d Decision, kind string, size int, want error, text string) {
			t.Helper()
			err := d.Journal(t.Context(), kind, make([]byte, size))
			if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
				t.Errorf("%v: not %v, %q", err, want, text)
			}
		}
		refused(d, "letter", 1, nil, `"letter"`)
		refused(d, "order", MaxPayload+1, nil, fmt.Sprint(MaxPayload))
		must(t, d.Journal(t.Context(), "order", make([]byte, MaxPayload)))
		must(t, d.Journal(t.Context(), "order", nil))
		if w.left() != 2 {
			t.Errorf("%d effects", w.left())
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := d.Journal(ctx, "order", nil); !errors.Is(err, ErrNotStored) || !errors.Is(err, context.Canceled) {
			t.Errorf("a context that has ended: %v", err)
		}
		w.store.set(nil, down, nil)
		refused(d, "order", 1, ErrNotStored, "the store is down")
		w.store.set(nil, nil, nil)
		writes := 0
		w.store.set(func(context.Context) error { // the read after the write
			if writes > 0 {
				return errDown
			}
			return nil
		}, func(context.Context) error { writes++; return nil }, nil)
		refused(d, "order", 1, ErrNotStored, "the store is down")
		w.store.set(nil, nil, nil)

		lost := false
		w.store.set(nil, nil, func() error { // an answer that is lost: it is there
			if lost {
				return nil
			}
			lost = true
			return errDown
		})
		must(t, d.Journal(t.Context(), "order", []byte("landed")))
		w.store.set(nil, nil, nil)
		if !lost || w.left() != 3 {
			t.Errorf("%d effects, lost %v", w.left(), lost)
		}

		must(t, w.RollbackRing(t.Context(), "staff", ""))
		refused(inner, "order", 1, ErrRolledBack, "staff")
		must(t, d.Journal(t.Context(), "order", []byte("others go on")))
		must(t, w.Rollback(t.Context(), ""))
		refused(d, "order", 1, ErrRolledBack, "")
		minute()
		w.is(RolledBack, "")
		must(t, w.Restart(t.Context(), ""))
		minute()
		refused(d, "order", 1, ErrRolledBack, "")
		if w.left() != 0 {
			t.Errorf("%d effects are left", w.left())
		}
	})
}

// TestJournalFull: at the limit an effect is refused, and there is room again once the others are undone.
func TestJournalFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		d := w.Decide(w.of(Candidate))
		w.journal(d, "order 1")
		taken := func(count, bytes int) { w.Rollout.journal.taken[shelf{1, Everyone}] = room{count, bytes} }
		taken(MaxEffects, 100)
		if err := d.Journal(t.Context(), "order", nil); !errors.Is(err, ErrJournalFull) {
			t.Errorf("%v", err)
		}
		taken(1, maxJournal-100)
		if err := d.Journal(t.Context(), "order", nil); !errors.Is(err, ErrJournalFull) {
			t.Errorf("%v", err)
		}
		if w.left() != 1 {
			t.Errorf("%d effects", w.left())
		}
		must(t, w.Rollback(t.Context(), ""))
		minute()
		must(t, w.Restart(t.Context(), ""))
		minute()
		w.journal(w.Decide(w.of(Candidate)), "order 2")
	})
}

// TestJournalMakesRoom: what was never written takes no room, what may have been written only until that is known, and what
// is undone none.
func TestJournalMakesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		d, staff := w.Decide(w.of(Candidate)), w.Decide(w.of(Candidate, "staff"))
		j := &w.Rollout.journal
		is := func(when string, others, inner, doubts int) {
			t.Helper()
			j.mu.Lock()
			defer j.mu.Unlock()
			if o, i := j.taken[shelf{1, Everyone}].count, j.taken[shelf{1, "staff"}].count; o != others || i != inner || len(j.doubt) != doubts {
				t.Errorf("%s: %d and %d are taken, %d in doubt", when, o, i, len(j.doubt))
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		fails := func(ctx context.Context, want error) {
			t.Helper()
			if err := d.Journal(ctx, "order", nil); !errors.Is(err, want) {
				t.Errorf("%v, not %v", err, want)
			}
		}
		fails(ctx, context.Canceled)
		w.stray.Add(maxStray)
		fails(t.Context(), ErrNotStored)
		w.stray.Add(-maxStray)
		is("never written", 0, 0, 0)

		w.store.set(down, down, nil)
		fails(t.Context(), errDown)
		w.store.set(down, nil, func() error { return errDown })
		fails(t.Context(), errDown) // it is there
		w.store.set(nil, nil, nil)
		is("in doubt", 2, 0, 2)
		full := func() {
			j.mu.Lock()
			j.taken[shelf{1, Everyone}] = room{MaxEffects, MaxEffects}
			j.mu.Unlock()
		}
		full()
		w.store.set(down, nil, nil)
		fails(t.Context(), ErrJournalFull)
		w.store.set(nil, nil, nil)
		is("full, and the store is down", MaxEffects, 0, 2)
		must(t, d.Journal(t.Context(), "order", nil))
		must(t, d.Journal(t.Context(), "order", nil))
		fails(t.Context(), ErrJournalFull)
		is("full", MaxEffects, 0, 0)
		if w.left() != 2 {
			t.Errorf("%d effects are left", w.left())
		}

		j.taken[shelf{1, Everyone}] = room{2, 400}
		for i := range 3 {
			w.journal(staff, fmt.Sprint("order ", i))
		}
		w.failing(func(_ context.Context, e Effect) error {
			if string(e.Payload) == "order 0" {
				return errors.New("not yet")
			}
			return nil
		})
		must(t, w.RollbackRing(t.Context(), "staff", ""))
		minute()
		is("some are undone", 2, 1, 0)
		w.failing(nil)
		minute()
		minute()
		is("all of the ring are undone", 2, 0, 0)
		w.completeAll(2)
		is("completed", 0, 0, 0)
	})
}

// TestJournalOfAnother: what another process has undone takes no room here.
func TestJournalOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		w.journal(w.Decide(w.of(Candidate, "staff")), "order staff")
		w.journal(w.Decide(w.of(Candidate)), "order other")
		other := lone(t, w.policy(), Options{Store: w.store.Store})
		st, err := other.update(t.Context(), func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			events, err := machine.Apply(s, other.plan, machine.Verb{Name: machine.VerbRollbackRing, Ring: "staff", Now: time.Now()})
			machine.BeginAttempt(s, other.me(), true)
			return events, err
		})
		must(t, err)
		other.endAttempt(t.Context(), st, other.attempt(t.Context(), st, st.Steps[0], time.Now()))
		minute()
		if got := w.Rollout.journal.taken; len(got) != 1 || got[shelf{1, Everyone}].count != 1 {
			t.Errorf("taken are %v", got)
		}
	})
}

// TestJournalRacesRing: an effect of a ring that another process rolls back alone meanwhile is refused, and one of a
// candidate that this process rolls back meanwhile although the Store cannot be told.
func TestJournalRacesRing(t *testing.T) {
	for _, by := range []string{"another", "itself"} {
		synctest.Test(t, func(t *testing.T) {
			w := warded(t, nil)
			other := lone(t, w.policy(), Options{Store: w.store.Store})
			must(t, other.Ready(t.Context()))
			once := sync.OnceFunc(func() {
				if by == "another" {
					must(t, other.RollbackRing(context.Background(), "staff", ""))
					return
				}
				w.latchHere(&intent{gen: 1})
			})
			d := w.Decide(w.of(Candidate, "staff"))
			w.store.set(nil, nil, func() error { once(); return nil })
			if err := d.Journal(t.Context(), "order", nil); !errors.Is(err, ErrRolledBack) || w.left() != 0 {
				t.Errorf("by %s: %v, %d effects are left", by, err, w.left())
			}
		})
	}
}

// TestUndoOrder: what one process journalled is undone in its own order, also where its clock was set back meanwhile.
func TestUndoOrder(t *testing.T) {
	r := lone(t, (&ward{}).policy(), Options{Store: MemStore()})
	for _, e := range []struct {
		life string
		n    uint64
		at   int
	}{{"a", 1, 10}, {"b", 1, 5}, {"a", 2, 0}, {"a", 11, 20}, {"b", 2, 20}} {
		doc := fmt.Appendf(nil, `{"format":1,"kind":"order","ring":"staff","at":%q}`, time.Unix(int64(e.at), 0).UTC().Format(time.RFC3339))
		if _, ok, err := r.effects.CompareAndSwap(t.Context(), machine.EffectKey("x", 1, e.life, e.n), 0, doc); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	es, err := r.entries(t.Context(), func(uint64, string, bool) bool { return true })
	must(t, err)
	var got []string
	for _, e := range es {
		got = append(got, fmt.Sprint(e.inc, e.n))
	}
	if want := []string{"b2", "a11", "a2", "a1", "b1"}; !slices.Equal(got, want) {
		t.Errorf("undone are %q, not %q", got, want)
	}
}

// TestJournalRacesRollback: wherever a rollback comes between the write of an effect and the read after it, the effect is
// either refused or undone.
func TestJournalRacesRollback(t *testing.T) {
	for _, at := range []string{"before the write", "after the write", "after the read"} {
		synctest.Test(t, func(t *testing.T) {
			w := warded(t, nil)
			other := lone(t, w.policy(), Options{Store: w.store.Store}) // in another process, which this one does not hear of
			must(t, other.Ready(t.Context()))
			d := w.Decide(w.of(Candidate))
			back := func(when string) {
				if when == at {
					must(t, other.Rollback(context.Background(), "stop"))
				}
			}
			once := sync.OnceFunc(func() { back("before the write") })
			after := sync.OnceFunc(func() { back("after the write") })
			w.store.set(nil, func(context.Context) error { once(); return nil }, func() error { after(); return nil })
			err := d.Journal(t.Context(), "order", []byte("order"))
			back("after the read")
			w.store.set(nil, nil, nil)
			minute()
			w.is(RolledBack, "")
			if err == nil {
				w.wants("order")
			} else if !errors.Is(err, ErrRolledBack) {
				t.Errorf("%s: %v", at, err)
			}
			if (err == nil) != (at == "after the read") || w.left() != 0 {
				t.Errorf("%s: %v, %d effects are left", at, err, w.left())
			}
		})
	}
}

// TestJournalDropped: a completed rollout keeps its effects, and a later rollback undoes none of them.
func TestJournalDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		d := w.Decide(w.of(Candidate))
		w.journal(d, "order 1")
		w.completeAll(2)
		minute()
		if w.left() != 0 {
			t.Errorf("%d effects are left", w.left())
		}
		w.journal(d, "order 2") // here to stay
		must(t, w.Rollback(t.Context(), "after all"))
		minute()
		w.is(RolledBack, "")
		must(t, w.Restart(t.Context(), ""))
		minute()
		w.journal(w.Decide(w.of(Candidate)), "order 3")
		must(t, w.Rollback(t.Context(), "again"))
		minute()
		w.wants("order 3")
		if w.left() != 0 {
			t.Errorf("%d effects are left", w.left())
		}
	})
}

// TestUndoOfReplaced: a version that replaces another one before it was completed takes its effects over: a rollback
// gives everybody the stable version, so they are undone as well; a completion keeps them.
func TestUndoOfReplaced(t *testing.T) {
	for _, then := range []string{"rolled back", "completed", "completed by a version with nothing to undo"} {
		rolledBack, none := then == "rolled back", then == "completed by a version with nothing to undo"
		synctest.Test(t, func(t *testing.T) {
			w := &ward{store: &faulty{Store: MemStore()}}
			p := w.policy()
			p.Version = "1"
			one := start(t, "x", p, Options{Store: w.store})
			w.process = one
			w.journal(one.Decide(one.of(Candidate)), "order 1")
			p.Version = "2"
			w.process = start(t, "x", p, Options{Store: w.store})
			minute()
			one.stop()
			w.journal(w.Decide(w.of(Candidate)), "order 2")
			if !rolledBack {
				if none { // the completing version has nothing to undo
					w.stop()
					p = talks(SessionPolicy{})
					p.Version = "3"
					w.process = start(t, "x", p, Options{Store: w.store})
					minute()
				}
				w.completeAll(2)
				minute()
				w.wants()
			} else {
				must(t, w.Rollback(t.Context(), ""))
				minute()
				w.is(RolledBack, "")
				w.wants("order 2", "order 1")
			}
			if w.left() != 0 {
				t.Errorf("%d effects are left", w.left())
			}
		})
	}
}

// TestUndoOfRing: a ring that is rolled back alone has its own effects undone while the others go on, in the next life as
// well, and what fails is tried again without holding the others up.
func TestUndoOfRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		staff, other := w.Decide(w.of(Candidate, "staff")), w.Decide(w.of(Candidate))
		for i := range 3 {
			w.journal(staff, fmt.Sprint("order staff ", i))
			w.journal(other, fmt.Sprint("order other ", i))
		}
		var broken atomic.Bool
		broken.Store(true)
		w.failing(func(_ context.Context, e Effect) error {
			if broken.Load() && string(e.Payload) == "order staff 1" {
				return errors.New("not yet")
			}
			return nil
		})
		must(t, w.RollbackRing(t.Context(), "staff", ""))
		time.Sleep(10 * time.Minute)
		w.is(Running, "everyone 50 %")
		st := w.Status()
		if len(st.Steps) != 1 || st.Steps[0].Name != "(undo staff)" || st.Steps[0].Done || !strings.Contains(st.Steps[0].Err, "not yet") {
			t.Errorf("%+v", st.Steps)
		}
		must(t, w.Advance(t.Context(), st.Stage.Name, ""))
		w.stop()
		w.process = start(t, "x", w.policy(), Options{Store: w.store})
		w.is(Running, "everyone 100 %")
		broken.Store(false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		first := slices.Compact(w.undone())
		if want := []string{"order staff 2", "order staff 1", "order staff 0"}; !slices.Equal(first, want) {
			t.Errorf("undone were %q", first)
		}
		if w.left() != 3 {
			t.Errorf("%d effects are left", w.left())
		}
		must(t, w.Rollback(t.Context(), ""))
		minute()
		w.is(RolledBack, "")
		if all := w.undone(); !slices.Equal(all[len(all)-3:], []string{"order other 2", "order other 1", "order other 0"}) {
			t.Errorf("undone were %q", all)
		}
	})
}

// TestUndoOfRingAgain: a ring that is rolled back again before its earlier effects are undone has those of both undone, in
// one step, the newest first.
func TestUndoOfRingAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		var broken atomic.Bool
		broken.Store(true)
		w.failing(func(context.Context, Effect) error {
			if broken.Load() {
				return errors.New("not yet")
			}
			return nil
		})
		for _, payload := range []string{"order first", "order second"} {
			w.journal(w.Decide(w.of(Candidate, "staff")), payload)
			must(t, w.RollbackRing(t.Context(), "staff", ""))
			time.Sleep(time.Minute)
			must(t, w.Restart(t.Context(), ""))
			time.Sleep(time.Minute)
		}
		if st := w.Status(); len(st.Steps) != 1 || st.Steps[0].Done {
			t.Errorf("%+v", st.Steps)
		}
		tried := len(w.undone())
		broken.Store(false)
		time.Sleep(5 * time.Minute)
		if got := w.undone()[tried:]; !slices.Equal(got, []string{"order second", "order first"}) {
			t.Errorf("undone were %q", got)
		}
		if st := w.Status(); w.left() > 0 || len(st.Steps) != 1 || !st.Steps[0].Done {
			t.Errorf("%d effects are left; %+v", w.left(), st.Steps)
		}
	})
}

// TestUndoOfRings: a ring whose undoing fails holds up neither another ring's nor a rollback of everybody, and a pause after
// a failure ends when something is waived.
func TestUndoOfRings(t *testing.T) {
	failing := func(t *testing.T) (w *ward, begun *atomic.Int64) {
		begun = new(atomic.Int64)
		w = warded(t, func(p *Policy) {
			p.Rings = []Ring{{Name: "staff"}, {Name: "beta"}}
			p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error {
				begun.CompareAndSwap(0, time.Now().UnixNano())
				return nil
			}}}
		})
		w.journal(w.Decide(w.of(Candidate, "staff")), "order staff")
		w.journal(w.Decide(w.of(Candidate, "beta")), "order beta")
		w.failing(func(_ context.Context, e Effect) error {
			if e.Ring == "staff" {
				return errors.New("never")
			}
			return nil
		})
		must(t, w.RollbackRing(t.Context(), "staff", ""))
		time.Sleep(10 * time.Minute)
		for n := len(w.undone()); len(w.undone()) == n; { // the pause has just begun
			time.Sleep(time.Second / 4)
		}
		w.mu.Lock()
		w.log = nil
		w.mu.Unlock()
		return w, begun
	}
	synctest.Test(t, func(t *testing.T) {
		w, _ := failing(t)
		must(t, w.RollbackRing(t.Context(), "beta", ""))
		time.Sleep(time.Second)
		synctest.Wait()
		w.wants("order beta")
		time.Sleep(3 * time.Minute)
		if got := w.undone(); len(got) < 3 || got[len(got)-1] != "order staff" {
			t.Errorf("staff is not tried again: %q", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w, begun := failing(t)
		at := time.Now()
		must(t, w.Rollback(t.Context(), "now"))
		minute()
		if late := time.Unix(0, begun.Load()).Sub(at); late > time.Second {
			t.Errorf("the first step began %v after Rollback had returned", late)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w, _ := failing(t)
		must(t, w.Waive(t.Context(), "undo:order", ""))
		time.Sleep(time.Second)
		synctest.Wait()
		w.wants()
		if steps := w.Status().Steps; w.left() != 1 || len(steps) != 1 || !steps[0].Done {
			t.Errorf("%d effects are left; %+v", w.left(), steps)
		}
	})
}

// TestUndoOfRingOutlastsCompletion: a ring whose effects are still not undone when the rest is completed has them undone
// all the same, by itself or in a later rollback; what the others did is here to stay.
func TestUndoOfRingOutlastsCompletion(t *testing.T) {
	for _, then := range []string{"it is mended", "rolled back", "restarted and rolled back", "rolled back and stuck"} {
		t.Run(then, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := warded(t, nil)
				w.journal(w.Decide(w.of(Candidate, "staff")), "order staff")
				w.journal(w.Decide(w.of(Candidate)), "order other")
				w.failing(func(_ context.Context, e Effect) error { return errors.New("not yet") })
				must(t, w.RollbackRing(t.Context(), "staff", ""))
				minute()
				w.completeAll(2)
				time.Sleep(10 * time.Minute)
				w.is(Completed, "")
				if w.left() != 1 {
					t.Errorf("%d effects are left", w.left())
				}
				tried := len(w.undone())
				well := func(context.Context, Effect) error { return nil }
				want := []string{"order staff"}
				switch then {
				case "it is mended":
					w.failing(well)
				case "rolled back":
					w.failing(well)
					must(t, w.Rollback(t.Context(), "after all"))
				case "restarted and rolled back":
					must(t, w.Restart(t.Context(), ""))
					time.Sleep(10 * time.Minute)
					w.journal(w.Decide(w.of(Candidate)), "order again")
					tried = len(w.undone())
					w.failing(well)
					must(t, w.Rollback(t.Context(), ""))
					want = []string{"order again", "order staff"}
				case "rolled back and stuck":
					must(t, w.Rollback(t.Context(), "after all"))
					time.Sleep(10 * time.Minute)
					w.is(Stuck, "")
					tried = len(w.undone())
					w.failing(well)
					must(t, w.Rollback(t.Context(), "again"))
				}
				minute()
				minute()
				if got := w.undone()[tried:]; !slices.Equal(got, want) || w.left() != 0 {
					t.Errorf("undone were %q, not %q; %d are left", got, want, w.left())
				}
				if then != "it is mended" {
					w.is(RolledBack, "")
				}
			})
		})
	}
}

// TestUndoOfSettled: an effect that is settled and could not be dropped yet is undone by no later rollback.
func TestUndoOfSettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		w.journal(w.Decide(w.of(Candidate)), "order kept")
		var broken atomic.Bool
		broken.Store(true)
		w.store.deleting(func() error {
			if broken.Load() {
				return errDown
			}
			return nil
		})
		w.completeAll(2)
		minute()
		must(t, w.Restart(t.Context(), ""))
		minute()
		w.journal(w.Decide(w.of(Candidate)), "order again")
		if w.left() != 2 {
			t.Fatalf("%d effects are left", w.left())
		}
		broken.Store(false) // the next try is some time away
		must(t, w.Rollback(t.Context(), ""))
		minute()
		w.is(RolledBack, "")
		w.wants("order again")
		minute()
		if w.left() != 0 {
			t.Errorf("%d effects are left", w.left())
		}
	})
}

// TestUndoFails: an undo that errs, panics, ends its goroutine or hangs is tried again five times and holds up what is older; then the rollback
// is Stuck until it is mended, or waived: the effect, its kind or all. Restart waits for that.
func TestUndoFails(t *testing.T) {
	for how, fail := range map[string]func(context.Context) error{
		"errs":   func(context.Context) error { return errors.New("it is broken") },
		"panics": func(context.Context) error { panic("it is broken") },
		"exits":  func(context.Context) error { runtime.Goexit(); return nil },
		"hangs":  func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		for _, mend := range []string{"mended", "waived", "its kind", "all"} {
			t.Run(how+", "+mend, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := warded(t, nil)
					var well atomic.Bool
					var key atomic.Pointer[string]
					w.failing(func(ctx context.Context, e Effect) error {
						if well.Load() || e.Kind != "mail" {
							return nil
						}
						key.Store(&e.Key)
						return fail(ctx)
					})
					var lost atomic.Pointer[Event]
					w.Subscribe(func(e Event) {
						if e.Kind == RollbackStuck {
							lost.Store(&e)
						}
					})
					d := w.Decide(w.of(Candidate))
					for _, payload := range []string{"order 1", "mail 2", "order 3"} {
						w.journal(d, payload)
					}
					must(t, w.Rollback(t.Context(), "stop"))
					for began := time.Now(); w.Status().State != Stuck && time.Since(began) < 20*time.Minute; {
						minute()
					}
					w.is(Stuck, "")
					w.wants("order 3", "mail 2", "mail 2", "mail 2", "mail 2", "mail 2")
					note := w.Status().Note
					if e := lost.Load(); e == nil || !strings.Contains(note, *key.Load()) || (how == "errs" || how == "panics") && !strings.Contains(note, "it is broken") || how == "exits" && !strings.Contains(note, errExited.Error()) || how == "panics" && !strings.Contains(note, "journal_test.go") {
						t.Errorf("the note is %q, the event %v", note, e)
					}
					if served(w.Rollout) {
						t.Error("exposed while Stuck")
					}
					if err := w.Restart(t.Context(), ""); !errors.Is(err, ErrState) {
						t.Errorf("Restart while Stuck: %v", err)
					}
					if err := w.Waive(t.Context(), "no such step", ""); !errors.Is(err, ErrState) {
						t.Errorf("Waive of nothing: %v", err)
					}
					w.mu.Lock()
					w.log = nil
					w.mu.Unlock()
					want := []string{"order 1"}
					switch mend {
					case "mended":
						well.Store(true)
						must(t, w.Rollback(t.Context(), "again"))
						want = []string{"mail 2", "order 1"}
					case "waived":
						must(t, w.Waive(t.Context(), *key.Load(), "mended by hand"))
						must(t, w.Waive(t.Context(), *key.Load(), "mended by hand"))
					case "its kind":
						must(t, w.Waive(t.Context(), "undo:mail", "mails stay"))
					case "all":
						must(t, w.Waive(t.Context(), machine.UndoStep, "never mind"))
						must(t, w.Waive(t.Context(), machine.UndoStep, "never mind"))
						want = nil
					}
					minute()
					w.is(RolledBack, "")
					w.wants(want...)
					must(t, w.Restart(t.Context(), ""))
					minute()
					if w.left() != 0 {
						t.Errorf("%d effects are left", w.left())
					}
				})
			})
		}
	}
}

// TestWaiveOfRing: what is waived while a ring's effects are undone, the ring, a kind or an effect, is not undone by a later
// rollback of everybody either; what is not, is.
func TestWaiveOfRing(t *testing.T) {
	for waived, want := range map[string][]string{
		"(undo staff)": {"order other"}, "undo:order": {"mail staff", "order other"}, "the first": {"order staff", "order other"},
	} {
		t.Run(waived, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := warded(t, nil)
				w.journal(w.Decide(w.of(Candidate)), "order other")
				for _, payload := range []string{"order staff", "mail staff"} {
					time.Sleep(time.Second)
					w.journal(w.Decide(w.of(Candidate, "staff")), payload)
				}
				w.failing(func(context.Context, Effect) error { return errors.New("never") })
				must(t, w.RollbackRing(t.Context(), "staff", ""))
				minute()
				step := waived
				if step == "the first" {
					step = w.full[0].Key
				}
				must(t, w.Waive(t.Context(), step, "by hand"))
				minute()
				tried := len(w.undone())
				w.failing(nil)
				must(t, w.Rollback(t.Context(), ""))
				minute()
				minute()
				w.is(RolledBack, "")
				got := w.undone()[tried:]
				slices.Sort(got)
				if slices.Sort(want); !slices.Equal(got, want) || w.left() != 0 {
					t.Errorf("undone were %q, not %q; %d are left", got, want, w.left())
				}
			})
		})
	}
}

// TestWaiveStep: a step that keeps failing, or that nobody has any more, is waived by name, and the next one follows.
func TestWaiveStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log []string
		p := talks(SessionPolicy{})
		for _, name := range []string{"broken", "next"} {
			p.Rollback = append(p.Rollback, RollbackStep{Name: name, Attempts: 2, Do: func(context.Context, Incident) error {
				if log = append(log, name); name == "broken" {
					return errors.New("no")
				}
				return nil
			}})
		}
		r := start(t, "x", p, Options{})
		waived := r.count(StepWaived)
		if err := r.Waive(t.Context(), "broken", ""); !errors.Is(err, ErrState) {
			t.Errorf("with no rollback: %v", err)
		}
		must(t, r.Rollback(t.Context(), ""))
		minute()
		r.is(Stuck, "")
		if err := r.Waive(t.Context(), "", ""); !errors.Is(err, ErrState) {
			t.Errorf("no name: %v", err)
		}
		must(t, r.Waive(t.Context(), "broken", "it was undone by hand"))
		minute()
		r.is(RolledBack, "")
		if st := r.Status().Steps; fmt.Sprint(log) != "[broken broken next]" || !st[0].Waived || !st[0].Done || st[1].Waived || waived.Load() != 1 {
			t.Errorf("run were %q; %+v", log, st)
		}
		must(t, r.Waive(t.Context(), "broken", "again"))
		if waived.Load() != 1 {
			t.Error("waived twice")
		}
	})
}

// TestUndoGarbage: an entry that cannot be read is loud, undone by nobody, and can be waived by its key.
func TestUndoGarbage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		w.journal(w.Decide(w.of(Candidate)), "order 1")
		for i, doc := range []string{`{"format":2}`, `]]`} {
			key := machine.EffectKey("x", 1, "somebody", uint64(i))
			if _, ok, err := w.store.CompareAndSwap(t.Context(), key, 0, []byte(doc)); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
		must(t, w.Rollback(t.Context(), ""))
		time.Sleep(20 * time.Minute)
		w.is(Stuck, "")
		for range 2 {
			key, _, _ := strings.Cut(strings.TrimPrefix(w.Status().Note, machine.UndoStep+": "), ": ")
			must(t, w.Waive(t.Context(), key, "it is nothing"))
			time.Sleep(20 * time.Minute)
		}
		synctest.Wait()
		w.is(RolledBack, "")
		w.wants("order 1")
	})
}

// TestUndoInMemory: without a Store the journal is as good as the process.
func TestUndoInMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &ward{}
		w.process = start(t, "x", w.policy(), Options{})
		w.journal(w.Decide(w.of(Candidate)), "order 1")
		must(t, w.Rollback(t.Context(), ""))
		minute()
		w.is(RolledBack, "")
		w.wants("order 1")
	})
}

// TestUndoCallsAnything: steps, undos and what is told of sessions may call every method.
func TestUndoCallsAnything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &ward{store: &faulty{Store: MemStore()}}
		var calls atomic.Int32
		all := func(ctx context.Context, final bool) {
			if calls.Add(1) > 50 {
				return
			}
			r := w.Rollout
			r.Status()
			d := r.Decide(Unit{Key: "a"})
			r.Peek(Unit{Key: "a"})
			d.Record(Errors.Observe(true))
			_ = d.Journal(ctx, "order", nil)
			stage := r.Status().Stage.Name
			for _, err := range []error{
				r.Hold(ctx, ""), r.Resume(ctx, ""), r.Approve(ctx, stage, ""), r.Advance(ctx, stage, ""), r.Restart(ctx, ""),
				r.SetPercent(ctx, Everyone, 1, ""), r.RollbackRing(ctx, "staff", ""), r.Waive(ctx, "nothing", ""), r.Rollback(ctx, "again"), r.Ready(ctx),
			} {
				_ = err
			}
			_, s := r.Begin(ctx, Unit{Key: "b"})
			_, _, _ = r.Adopt(ctx, s.Pin())
			s.Reconfigured()
			s.End(nil)
			if final {
				short, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				_, _ = r.Drain(short)
			}
		}
		p := w.policy()
		p.Sessions = SessionPolicy{Grace: 10 * time.Second, OnRevoke: func(ctx context.Context, s *Session) { all(ctx, false); s.End(nil) }}
		p.Rollback = []RollbackStep{{Name: "one", Do: func(ctx context.Context, _ Incident) error { all(ctx, true); return nil }}}
		w.process = start(t, "x", p, Options{Store: w.store})
		w.failing(func(ctx context.Context, _ Effect) error { all(ctx, true); return nil })
		w.Subscribe(func(Event) { all(context.Background(), false) })
		for range 3 {
			_, _ = w.Begin(t.Context(), w.of(Candidate))
		}
		w.journal(w.Decide(w.of(Candidate)), "order 1")
		must(t, w.Rollback(t.Context(), ""))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		w.is(RolledBack, "")
		if calls.Load() < 5 {
			t.Errorf("%d calls", calls.Load())
		}
	})
}
