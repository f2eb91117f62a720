package rollout

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// What docs/rollback.md says of a step, an undo and a session's callback that outlive their process: each sentence there
// names a test of this file.

// late is a call that goes on after its process is gone: it is cut off from the Store, and comes back when it is told to.
type lateCall struct{ key, fence string }

// outliving takes a rollback through three processes, of which the first two are cut off in the middle of the first call
// of what. Their calls end, late, after the third is done. It returns the calls in the order they began, and the fences in
// the order they ended.
func outliving(t *testing.T, what string) (began []lateCall, ended []string, last *process) {
	var mu sync.Mutex
	var waiting []chan struct{}
	store := MemStore()
	call := func(key, fence string) error {
		mu.Lock()
		began = append(began, lateCall{key, fence})
		n := len(began)
		wait := make(chan struct{})
		if n <= 2 {
			waiting = append(waiting, wait)
		}
		mu.Unlock()
		if n <= 2 {
			<-wait // whatever its context says
		}
		mu.Lock()
		defer mu.Unlock()
		ended = append(ended, fence)
		return nil
	}
	p := talks(SessionPolicy{})
	switch what {
	case "step":
		p.Rollback = []RollbackStep{
			{Name: "one", Timeout: time.Hour, Do: func(_ context.Context, in Incident) error { return call(in.Key, in.Fence) }},
			{Name: "two", Do: func(context.Context, Incident) error { return nil }},
		}
	case "undo":
		p.Undo = map[string]func(context.Context, Effect) error{"order": func(_ context.Context, e Effect) error { return call(e.Key, e.Fence) }}
	}
	f := &faulty{Store: store}
	r := start(t, "x", p, Options{Store: f})
	if what == "undo" {
		must(t, r.Decide(r.of(Candidate)).Journal(t.Context(), "order", nil))
	}
	must(t, r.Rollback(t.Context(), "stop"))
	time.Sleep(7 * time.Second)
	synctest.Wait()
	for range 2 {
		f.set(down, down, nil) // the process is cut off, or paused: it knows nothing of what follows
		f = &faulty{Store: store}
		last = start(t, "x", p, Options{Store: f})
		time.Sleep(45 * time.Second)
		synctest.Wait()
	}
	last.is(RolledBack, "")
	for _, wait := range waiting {
		close(wait)
	}
	minute()
	last.is(RolledBack, "")
	return began, ended, last
}

// TestOutlivedKey: every attempt at one thing has one key, whichever process makes it.
func TestOutlivedKey(t *testing.T) {
	for _, what := range []string{"step", "undo"} {
		synctest.Test(t, func(t *testing.T) {
			began, _, _ := outliving(t, what)
			if len(began) != 3 || began[0].key != began[1].key || began[1].key != began[2].key || began[0].key == "" {
				t.Errorf("%s: %+v", what, began)
			}
		})
	}
}

// TestOutlivedFence: the fence of whoever takes over is greater, so a host that refuses what comes with a smaller one than
// it has seen is done with the newest attempt alone, though the older ones come back after it.
func TestOutlivedFence(t *testing.T) {
	for _, what := range []string{"step", "undo"} {
		synctest.Test(t, func(t *testing.T) {
			began, ended, _ := outliving(t, what)
			var fences []string
			for _, c := range began {
				fences = append(fences, c.fence)
			}
			if !slices.IsSorted(fences) || len(slices.Compact(slices.Clone(fences))) != 3 {
				t.Errorf("%s: the fences are %q", what, fences)
			}
			if len(ended) != 3 || ended[0] != fences[2] {
				t.Fatalf("%s: ended in the order %q", what, ended)
			}
			seen, accepted := "", 0
			for _, fence := range ended {
				if fence >= seen {
					seen = fence
					accepted++
				}
			}
			if accepted != 1 {
				t.Errorf("%s: a host that looks at the fence accepts %d", what, accepted)
			}
		})
	}
}

// TestOutlivedCounts: what a call that outlived its process returns changes nothing: the rollback is where the newest
// attempt left it.
func TestOutlivedCounts(t *testing.T) {
	for _, what := range []string{"step", "undo"} {
		synctest.Test(t, func(t *testing.T) {
			_, _, last := outliving(t, what)
			st := inStore(t, last.store)
			for _, step := range st.Steps {
				if !step.Done || step.Waived {
					t.Errorf("%s: %+v", what, step)
				}
			}
			if st.Term != 3 {
				t.Errorf("%s: term %d", what, st.Term)
			}
		})
	}
}

// TestOutlivedContext: the context of an attempt ends before another process may take over from one that is cut off, or once
// its process learns that another one has.
func TestOutlivedContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		f := &faulty{Store: store}
		contexts := make(chan context.Context, 9)
		var begun context.Context
		var ended atomic.Bool // the first was over when the second began
		p := talks(SessionPolicy{})
		p.Rollback = []RollbackStep{{Name: "one", Timeout: time.Hour, Do: func(ctx context.Context, _ Incident) error {
			if begun != nil && begun.Err() != nil {
				ended.Store(true)
			}
			begun = ctx
			contexts <- ctx
			<-ctx.Done()
			return ctx.Err()
		}}}
		r := start(t, "x", p, Options{Store: f})
		must(t, r.Rollback(t.Context(), "stop"))
		time.Sleep(7 * time.Second)
		f.set(down, down, nil)
		other := start(t, "x", p, Options{Store: store})
		time.Sleep(45 * time.Second)
		first, second := <-contexts, <-contexts
		if context.Cause(first) != errCutOff || !ended.Load() || second.Err() != nil {
			t.Errorf("the one that was taken over: %v, before that %v; the one that took over: %v", context.Cause(first), ended.Load(), second.Err())
		}
		f.set(nil, nil, nil)
		minute()
		if second.Err() != nil || len(contexts) > 0 {
			t.Errorf("back again: %v, %d more attempts", second.Err(), len(contexts))
		}
		_, err := r.update(t.Context(), func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			machine.BeginAttempt(s, "a third", true)
			return nil, nil
		})
		must(t, err)
		time.Sleep(defaultInterval + time.Second)
		synctest.Wait()
		if second.Err() == nil {
			t.Error("taken over, and it goes on")
		}
		r.stop()
		other.stop()
	})
}

// TestOutageIsNoFailure: a process that is cut off in the middle of a step ends it, and makes it again when the Store is
// back, however often: that uses up no attempt.
func TestOutageIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		calls := 0
		p := talks(SessionPolicy{})
		p.Rollback = []RollbackStep{{Name: "one", Attempts: 2, Timeout: time.Hour, Do: func(ctx context.Context, _ Incident) error {
			if calls++; !sleep(ctx, 2*time.Minute) {
				return context.Cause(ctx)
			}
			return nil
		}}}
		r := start(t, "x", p, Options{Store: f})
		must(t, r.Rollback(t.Context(), "stop"))
		for range 4 {
			minute()
			f.set(down, down, nil)
			minute()
			f.set(nil, nil, nil)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		r.is(RolledBack, "")
		if st := r.Status().Steps[0]; calls != 5 || st.Attempts != 1 || st.Err != "" {
			t.Errorf("%d calls; %+v", calls, st)
		}
	})
}

// TestOutlivedFailure: a failure that is told after another process has taken over counts for nothing, were it the last one
// before Stuck.
func TestOutlivedFailure(t *testing.T) {
	for _, attempts := range []int{1, 2} {
		synctest.Test(t, func(t *testing.T) {
			store := MemStore()
			f := &faulty{Store: store}
			calls := 0
			p := talks(SessionPolicy{})
			p.Rollback = []RollbackStep{{Name: "one", Attempts: attempts, Timeout: time.Hour, Do: func(ctx context.Context, _ Incident) error {
				if calls++; calls == 1 {
					f.set(down, down, nil) // cut off, and it fails
					return errors.New("too late")
				}
				if !sleep(ctx, 2*time.Minute) {
					return ctx.Err()
				}
				return nil
			}}}
			r := start(t, "x", p, Options{Store: f})
			must(t, r.Rollback(t.Context(), "stop"))
			synctest.Wait()
			other := start(t, "x", p, Options{Store: store})
			time.Sleep(45 * time.Second)
			synctest.Wait()
			f.set(nil, nil, nil)
			minute()
			if st := inStore(t, store); calls != 2 || st.Phase != machine.RollingBack || st.Steps[0].Err != "" {
				t.Errorf("%d calls; it is %v, %+v", calls, st.Phase, st.Steps)
			}
			minute()
			minute()
			other.is(RolledBack, "")
			if calls != 2 {
				t.Errorf("%d calls", calls)
			}
		})
	}
}

// TestOutlivedRevoke: OnRevoke is called by the process that has the session, at most once; no other process calls it for
// a session of one that is gone, and the session's pin is refused.
func TestOutlivedRevoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		release := make(chan struct{})
		told := make(chan string, 9)
		p := talks(SessionPolicy{Grace: 10 * time.Second, OnRevoke: func(_ context.Context, s *Session) {
			told <- s.Pin()
			<-release
		}})
		f := &faulty{Store: store}
		r := start(t, "x", p, Options{Store: f})
		_, s := r.Begin(t.Context(), r.of(Candidate))
		must(t, r.Rollback(t.Context(), "stop"))
		synctest.Wait()
		for range 2 {
			f.set(down, down, nil)
			f = &faulty{Store: store}
			next := start(t, "x", p, Options{Store: f})
			time.Sleep(10 * time.Minute)
			synctest.Wait()
			if _, _, err := next.Adopt(t.Context(), s.Pin()); !errors.Is(err, ErrRolledBack) {
				t.Errorf("adopted after a rollback: %v", err)
			}
			next.is(RolledBack, "")
		}
		close(release)
		minute()
		if len(told) != 1 || <-told != s.Pin() {
			t.Errorf("told %d times", len(told))
		}
		s.End(nil)
	})
}
