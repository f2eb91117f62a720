package rollout

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Every callback may err, hang or panic, and may call anything.

func TestCheck(t *testing.T) {
	cases := map[string]struct {
		check   func(context.Context) (Verdict, error)
		verdict Verdict
		cause   string
		state   State
	}{
		"healthy":             {func(context.Context) (Verdict, error) { return Healthy, nil }, Healthy, "", Completed},
		"inconclusive":        {func(context.Context) (Verdict, error) { return Inconclusive, nil }, Inconclusive, "inconclusive", Running},
		"unhealthy":           {func(context.Context) (Verdict, error) { return Unhealthy, errors.New("it burns") }, Unhealthy, "it burns", RolledBack},
		"unhealthy, no cause": {func(context.Context) (Verdict, error) { return Unhealthy, nil }, Unhealthy, "unhealthy", RolledBack},
		"healthy and error":   {func(context.Context) (Verdict, error) { return Healthy, errors.New("half") }, Inconclusive, "half", Running},
		"error":               {func(context.Context) (Verdict, error) { return 0, errors.New("no answer") }, Inconclusive, "no answer", Running},
		"panic":               {func(context.Context) (Verdict, error) { panic("oh") }, Inconclusive, "oh", Running},
		"exit":                {func(context.Context) (Verdict, error) { runtime.Goexit(); return Healthy, nil }, Inconclusive, "ended its goroutine", Running},
		"hang":                {func(ctx context.Context) (Verdict, error) { <-ctx.Done(); return Healthy, nil }, Inconclusive, "no answer within", Running},
		"nonsense":            {func(context.Context) (Verdict, error) { return 77, nil }, Inconclusive, "77", Running},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := threeStages()
				p.Gates = append(p.Gates, Check("host", c.check))
				r := start(t, "x", p, Options{})
				r.serve(10*time.Minute, 0, 0)
				if got := r.Status().State; got != c.state {
					t.Errorf("it is %v, not %v", got, c.state)
				}
				gate := r.Status().Gates[2]
				if gate.Verdict != c.verdict || !strings.Contains(gate.Cause, c.cause) {
					t.Errorf("the gate is %+v", gate)
				}
			})
		})
	}
}

// TestCheckHangsForEver: a Check that ignores its context is asked no second time, and holds up nothing.
func TestCheckHangsForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var asked atomic.Int32
		p := threeStages()
		p.Gates = append(p.Gates, Check("host", func(context.Context) (Verdict, error) { asked.Add(1); <-release; return Healthy, nil }))
		r := start(t, "x", p, Options{})
		r.serve(time.Hour, 0, 0)
		r.is(Running, "everyone 50 %") // where proof is asked
		if asked.Load() != 1 {
			t.Errorf("asked %d times", asked.Load())
		}
		r.stop()
		close(release)
	})
}

func TestMayAdvance(t *testing.T) {
	release := make(chan struct{})
	for name, may := range map[string]func(time.Time) bool{
		"no":    func(time.Time) bool { return false },
		"panic": func(time.Time) bool { panic("oh") },
		"exit":  func(time.Time) bool { runtime.Goexit(); return true },
		"hang":  func(time.Time) bool { <-release; return true },
	} {
		synctest.Test(t, func(t *testing.T) {
			release = make(chan struct{})
			p := threeStages()
			var allowed atomic.Bool
			allowed.Store(true)
			p.MayAdvance = func(now time.Time) bool { return allowed.Load() || may(now) }
			r := start(t, "x", p, Options{})
			r.is(Running, "everyone 10 %")
			allowed.Store(false)
			r.serve(30*time.Minute, 0, 0)
			r.is(Running, "everyone 10 %")
			if name == "no" {
				allowed.Store(true)
				r.serve(20*time.Second, 0, 0)
				r.is(Running, "everyone 50 %")
				allowed.Store(false)
			}
			r.until(RolledBack, 0, .5) // never asked about a rollback
			r.stop()
			close(release)
			synctest.Wait()
		})
	}
	synctest.Test(t, func(t *testing.T) {
		p := threeStages()
		p.MayAdvance = func(time.Time) bool { return false }
		r := start(t, "frozen", p, Options{})
		r.serve(time.Minute, 0, 0)
		if r.is(Pending, ""); served(r.Rollout) {
			t.Error("somebody is exposed in a freeze")
		}
	})
}

// TestSubscribers: one that panics, one that hangs and one that calls everything delay no tick and lose nothing but what
// overflows.
func TestSubscribers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "x", threeStages(), Options{})
		var told []EventKind
		r.Subscribe(func(Event) { panic("oh") })
		stop := r.Subscribe(func(e Event) {
			told = append(told, e.Kind)
			r.Status()
			r.Decide(Unit{Key: "a"})
			r.Peek(Unit{Key: "a"})
			if e.Kind == StageEntered && e.Stage == "everyone 50 %" {
				if err := r.Hold(t.Context(), "from a subscriber"); err != nil {
					t.Error(err)
				}
				if err := r.Resume(t.Context(), "from a subscriber"); err != nil {
					t.Error(err)
				}
				if err := r.Rollback(t.Context(), "from a subscriber"); err != nil {
					t.Error(err)
				}
			}
		})
		r.until(RolledBack, 0, 0)
		synctest.Wait()
		if want := []EventKind{StageEntered, HoldBegan, Resumed, RollbackBegan, RollbackDone}; fmt.Sprint(told) != fmt.Sprint(want) {
			t.Errorf("told of %v, not %v", told, want)
		}
		stop()
		n := len(told)
		if err := r.Restart(t.Context(), "again"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(told) != n {
			t.Error("told after stop")
		}

		release := make(chan struct{})
		r.Subscribe(func(Event) { <-release })
		for i := range 400 {
			if err := r.SetPercent(t.Context(), Everyone, Percent(i%90), "on and off"); err != nil {
				t.Fatal(err)
			}
		}
		if dropped := r.Status().Dropped; dropped < 50 || dropped > 200 {
			t.Errorf("%d events dropped", dropped)
		}
		r.stop()
		close(release)
		synctest.Wait()
	})
}

// TestSteps: a step is tried again until it is done; what keeps failing is Stuck, and Rollback tries it again.
func TestSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log []string
		var mend atomic.Bool
		fails := map[string]func(context.Context) error{
			"error": func(context.Context) error { return errors.New("not yet") },
			"panic": func(context.Context) error { panic("oh") },
			"exit":  func(context.Context) error { runtime.Goexit(); return nil },
			"hang":  func(ctx context.Context) error { <-ctx.Done(); return nil },
		}
		p := threeStages()
		names := []string{"error", "panic", "exit", "hang"}
		for _, name := range names {
			p.Rollback = append(p.Rollback, RollbackStep{Name: name, Attempts: 3, Timeout: 10 * time.Second, Do: func(ctx context.Context, in Incident) error {
				log = append(log, name)
				if in.Key != "x/1/"+name || in.Fence == "" || in.Name != "x" || in.Note != "stop" {
					t.Errorf("the incident is %+v", in)
				}
				if r := ctx.Err(); r != nil {
					t.Error("begun with a context that has ended")
				}
				if mend.Load() {
					return nil
				}
				if err := fails[name](ctx); err != nil {
					return err
				}
				return ctx.Err()
			}})
		}
		r := start(t, "x", p, Options{})
		r.serve(10*time.Second, 0, 0)
		for _, name := range names {
			log = nil
			mend.Store(false)
			if err := r.Rollback(t.Context(), "stop"); err != nil {
				t.Fatal(err)
			}
			if served(r.Rollout) {
				t.Fatal("exposed")
			}
			time.Sleep(10 * time.Minute)
			synctest.Wait()
			r.is(Stuck, "")
			if st := r.Status(); fmt.Sprint(log) != fmt.Sprint([]string{name, name, name}) || !strings.Contains(st.Note, name) {
				t.Errorf("run were %v, the note is %q", log, st.Note)
			}
			if err := r.Restart(t.Context(), "no"); !errors.Is(err, ErrState) {
				t.Errorf("a restart of what is stuck: %v", err)
			}
			// Mend it: the next series does this step and fails at the one after.
			log = nil
			mend.Store(true)
			if err := r.Rollback(t.Context(), "stop"); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			for _, step := range r.Status().Steps {
				if step.Name == name && !step.Done {
					t.Errorf("%s is not done: %+v", name, r.Status().Steps)
				}
			}
			if r.Status().State == RolledBack {
				return
			}
		}
		r.is(RolledBack, "")
	})
}

// TestStepsGoOn: a process that ends in the middle of the steps leaves the rest to the next one, in order, and none that
// is done runs again.
func TestStepsGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log []string
		store := MemStore()
		var slow atomic.Bool
		slow.Store(true)
		p := threeStages()
		for _, name := range []string{"one", "two", "three"} {
			p.Rollback = append(p.Rollback, RollbackStep{Name: name, Do: func(ctx context.Context, _ Incident) error {
				log = append(log, name)
				if name == "two" && slow.Load() {
					<-ctx.Done()
					return ctx.Err()
				}
				return nil
			}})
		}
		r := start(t, "x", p, Options{Store: store})
		r.serve(10*time.Second, 0, 0)
		if err := r.Rollback(t.Context(), "stop"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.stop()
		slow.Store(false)
		again := start(t, "x", p, Options{Store: store})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		again.is(RolledBack, "")
		if want := "[one two two three]"; fmt.Sprint(log) != want {
			t.Errorf("run were %v, not %v", log, want)
		}
	})
}

// TestStopsAreNoFailures: however often Run ends in the middle of a step, it has all its attempts; what is done just then is
// done.
func TestStopsAreNoFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		var stopping, done atomic.Bool
		var calls, failed atomic.Int32
		stopping.Store(true)
		p := threeStages()
		p.Rollback = []RollbackStep{
			{Name: "one", Attempts: 3, Timeout: time.Hour, Do: func(ctx context.Context, _ Incident) error {
				if stopping.Load() {
					<-ctx.Done()
					return ctx.Err()
				}
				failed.Add(1)
				return errors.New("it fails")
			}},
			{Name: "two", Timeout: time.Hour, Do: func(ctx context.Context, _ Incident) error {
				calls.Add(1)
				<-ctx.Done()
				done.Store(true)
				return nil
			}},
		}
		r := start(t, "x", p, Options{Store: store})
		again := func() {
			r.stop()
			r = start(t, "x", p, Options{Store: store})
			time.Sleep(30 * time.Second)
			synctest.Wait()
		}
		r.serve(10*time.Second, 0, 0)
		must(t, r.Rollback(t.Context(), "stop"))
		for range 5 {
			again()
		}
		if st := inStore(t, store).Steps[0]; st.Attempts != 1 || st.Err != "" {
			t.Errorf("%+v", st)
		}
		stopping.Store(false)
		again()
		if r.is(Stuck, ""); failed.Load() != 3 {
			t.Errorf("it failed %d times", failed.Load())
		}
		must(t, r.Waive(t.Context(), "one", ""))
		minute()
		again()
		if r.is(RolledBack, ""); calls.Load() != 1 || !done.Load() {
			t.Errorf("%d calls", calls.Load())
		}
	})
}
