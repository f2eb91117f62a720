package rollout

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// A rollback that was acknowledged, or that is in force in some process, is lost by nothing.

// lone is a rollout without its Run.
func lone(t *testing.T, p Policy, o Options) *Rollout {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet
	}
	r, err := New("x", p, &o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// runs begins a Run of a rollout that is there already.
func runs(t *testing.T, r *Rollout) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	p := &process{Rollout: r, t: t}
	p.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(p.stop)
	synctest.Wait()
	return p
}

// must takes the error of a verb that has to work.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// inStore is the state of the rollout "x" as it is stored.
func inStore(t *testing.T, s Store) *machine.State {
	t.Helper()
	doc, _, err := s.Load(context.Background(), "rollout/x/state")
	must(t, err)
	st, err := machine.Decode("x", doc)
	must(t, err)
	return st
}

// versioned is threeStages of a version.
func versioned(v string) Policy {
	p := threeStages()
	p.Version = v
	return p
}

// complete advances through every stage.
func (p *process) complete() {
	p.t.Helper()
	for range 3 {
		must(p.t, p.Advance(p.t.Context(), p.Status().Stage.Name, "enough"))
	}
	p.is(Completed, "")
}

// minute lets some ticks go by.
func minute() {
	time.Sleep(time.Minute)
	synctest.Wait()
}

// TestCompletedThenRolledBack: a version that was completed and rolled back later stays so in all of its processes when
// the next version is on its way, and is done.
func TestCompletedThenRolledBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		one := start(t, "x", versioned("1"), Options{Store: store})
		one.complete()
		must(t, one.Rollback(t.Context(), "bad after all"))
		one.is(RolledBack, "")
		gone := func(when string) {
			t.Helper()
			minute()
			again := start(t, "x", versioned("1"), Options{Store: store})
			if served(one.Rollout) || served(again.Rollout) {
				t.Errorf("%s, version 1 is exposed again without a Restart", when)
			}
			again.stop()
		}
		gone("rolled back")
		two := start(t, "x", versioned("2"), Options{Store: store})
		two.is(Running, "everyone 10 %")
		gone("version 2 runs")
		two.complete()
		gone("version 2 is completed")
	})
}

// TestCompletedOutlivesNext: what becomes of a later version takes a completed one from nobody who still runs it.
func TestCompletedOutlivesNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		one := start(t, "x", versioned("1"), Options{Store: store})
		one.complete()
		two := start(t, "x", versioned("2"), Options{Store: store})
		everybody := func(when string) {
			t.Helper()
			minute()
			again := start(t, "x", versioned("1"), Options{Store: store})
			for _, r := range []*process{one, again} {
				if d := r.Peek(Unit{Key: "a"}); !d.Enabled() || d.Reason() != ReasonCompleted {
					t.Errorf("%s, version 1 gives %v because of %v", when, d.Enabled(), d.Reason())
				}
			}
			again.stop()
		}
		everybody("adopted by version 2")
		must(t, two.Restart(t.Context(), "out with care"))
		everybody("version 2 is restarted")
		two.is(Running, "everyone 10 %")
		must(t, two.Rollback(t.Context(), "bad"))
		everybody("version 2 is rolled back")
		if served(two.Rollout) {
			t.Error("version 2 is exposed")
		}
	})
}

// TestRollbackInPassiveProcess: a rollback that an old version's process could not store is written once the Store is
// back.
func TestRollbackInPassiveProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		f := &faulty{Store: store}
		one := start(t, "x", versioned("1"), Options{Store: f})
		two := start(t, "x", versioned("2"), Options{Store: store})
		minute()
		f.set(down, down, nil)
		if err := one.Rollback(t.Context(), "stop"); !errors.Is(err, ErrNotStored) {
			t.Fatalf("the error is %v, not ErrNotStored", err)
		}
		minute()
		two.is(Running, "everyone 10 %")
		f.set(nil, nil, nil)
		minute()
		two.is(RolledBack, "")
		if served(two.Rollout) {
			t.Error("rolled back, and exposed")
		}
	})
}

// TestStoreWentBackThenRollback: another process's rollback, acknowledged by a Store that was set back, holds against the
// newer state that this process knows.
func TestStoreWentBackThenRollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		r := start(t, "x", threeStages(), Options{Store: store})
		r.serve(12*time.Second, 0, 0)
		old, _, err := store.Load(t.Context(), r.key())
		must(t, err)
		must(t, r.Advance(t.Context(), "everyone 10 %", "on"))
		for range 3 {
			must(t, r.Hold(t.Context(), "wait"))
			must(t, r.Resume(t.Context(), "on"))
		}
		synctest.Wait()
		newest := inStore(t, store).Ver
		_, rev, err := store.Load(t.Context(), r.key())
		must(t, err)
		if _, ok, err := store.CompareAndSwap(t.Context(), r.key(), rev, old); !ok || err != nil {
			t.Fatal(ok, err)
		}
		must(t, lone(t, threeStages(), Options{Store: store}).Rollback(t.Context(), "stop"))
		if st := inStore(t, store); !st.Phase.Latched() || st.Ver >= newest {
			t.Fatalf("stored is %v of version %d, known %d: the test shows nothing", st.Phase, st.Ver, newest)
		}
		minute()
		if st := inStore(t, store); !st.Phase.Latched() || st.Ver <= newest {
			t.Errorf("stored is %v of version %d, known was %d", st.Phase, st.Ver, newest)
		}
		r.is(RolledBack, "")
		if served(r.Rollout) {
			t.Error("rolled back, and exposed")
		}
	})
}

// overtaken is a Store that has something happen between a Load and its answer, once.
type overtaken struct {
	Store
	mu   sync.Mutex
	then func()
}

func (s *overtaken) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	v, rev, err := s.Store.Load(ctx, key)
	s.mu.Lock()
	then := s.then
	s.then = nil
	s.mu.Unlock()
	if then != nil {
		then()
	}
	return v, rev, err
}

// TestVerbDuringLoad: a load that was answered before a verb of the same process was stored is not taken for a Store that
// went back.
func TestVerbDuringLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		store := &overtaken{Store: MemStore()}
		r := start(t, "x", threeStages(), Options{Store: store, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		r.serve(12*time.Second, 0, 0)
		for range 5 {
			happened := false
			store.mu.Lock()
			store.then = func() {
				happened = true
				if err := r.Hold(context.Background(), "wait"); err != nil {
					t.Error(err)
				}
				if err := r.Resume(context.Background(), "on"); err != nil {
					t.Error(err)
				}
			}
			store.mu.Unlock()
			r.serve(12*time.Second, 0, 0)
			if !happened {
				t.Fatal("no load was overtaken")
			}
		}
		known := r.Status()
		must(t, lone(t, threeStages(), Options{Store: store.Store}).Rollback(t.Context(), "stop"))
		minute()
		if st := inStore(t, store); st.Phase != machine.RolledBack || st.Gen != known.Generation {
			t.Errorf("stored is %v of generation %d", st.Phase, st.Gen)
		}
		r.is(RolledBack, "")
		r.stop()
		if strings.Contains(log.String(), "went back") || strings.Contains(log.String(), "cannot be used") {
			t.Errorf("the log is\n%s", log.String())
		}
	})
}

// TestPendingRollbackAndEditedRings: a rollback that waits for the Store comes before the edited policy of the process that
// it waits in.
func TestPendingRollbackAndEditedRings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		start(t, "x", threeStages(), Options{Store: store}).stop()
		f := &faulty{Store: store}
		p := threeStages()
		p.Rings = []Ring{{Name: "staff"}}
		r := lone(t, p, Options{Store: f})
		must(t, r.Ready(t.Context()))
		f.set(down, down, nil)
		if err := r.Rollback(t.Context(), "stop"); !errors.Is(err, ErrNotStored) {
			t.Fatalf("the error is %v, not ErrNotStored", err)
		}
		f.set(nil, nil, nil)
		proc := runs(t, r)
		for range 60 {
			time.Sleep(time.Second)
			if served(r) {
				t.Fatal("exposed after Rollback returned, without a Restart")
			}
		}
		proc.is(RolledBack, "")
		if st := inStore(t, store); st.Phase != machine.RolledBack || st.Gen != 1 {
			t.Errorf("stored is %v of generation %d", st.Phase, st.Gen)
		}
	})
}

// TestPendingRollbackOfUnknownGeneration: a rollback asked for before anything was loaded is of the generation that is
// loaded first, and of no later one.
func TestPendingRollbackOfUnknownGeneration(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			store := MemStore()
			other := start(t, "x", threeStages(), Options{Store: store})
			f := &faulty{Store: store}
			r := lone(t, threeStages(), Options{Store: f})
			f.set(down, down, nil)
			if err := r.Rollback(t.Context(), "stop"); !errors.Is(err, ErrNotStored) {
				t.Fatalf("the error is %v, not ErrNotStored", err)
			}
			f.set(nil, nil, nil)
			must(t, r.Ready(t.Context()))
			if served(r) {
				t.Fatal("exposed after Rollback returned")
			}
			if restart {
				must(t, other.Restart(t.Context(), "a new life"))
			}
			minute()
			runs(t, r)
			minute()
			if !restart {
				other.is(RolledBack, "")
				return
			}
			other.is(Running, "everyone 10 %")
			if other.Status().Generation != 2 || !served(r) {
				t.Errorf("a rollback of generation 1 is still about in %d", other.Status().Generation)
			}
		})
	}
}

// TestReplicaInTwoLives: a write that was lost is not taken for one of an earlier process with the same Replica.
func TestReplicaInTwoLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for writes := range 4 { // as many as the first life makes
			store := MemStore()
			first := lone(t, threeStages(), Options{Store: store, Replica: "pod-0"})
			for i := range writes + 1 {
				if i%2 == 0 {
					must(t, first.Hold(t.Context(), "wait"))
				} else {
					must(t, first.Resume(t.Context(), "on"))
				}
			}
			f := &faulty{Store: store}
			for verb := range writes + 1 { // one of them has the first life's last number
				r := lone(t, threeStages(), Options{Store: f, Replica: "pod-0"})
				f.set(nil, down, nil)
				for range verb {
					_ = r.Rollback(t.Context(), "stop")
				}
				if err := r.Rollback(t.Context(), "stop"); !errors.Is(err, ErrNotStored) {
					t.Errorf("the error is %v, not ErrNotStored", err)
				}
				if inStore(t, store).Phase.Latched() {
					t.Fatal("it is stored: the test shows nothing")
				}
			}
		}
	})
}
