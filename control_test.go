package rollout

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// faulty is a Store on another one that fails as it is told to.
type faulty struct {
	Store
	mu    sync.Mutex
	load  func(ctx context.Context) error // before a Load
	swap  func(ctx context.Context) error // before a CompareAndSwap; nil error: it is made
	after func() error                    // after a CompareAndSwap that was made: its answer is lost
	del   func() error                    // before a CompareAndSwap that deletes
}

func (f *faulty) deleting(del func() error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.del = del
}

func (f *faulty) set(load, swap func(context.Context) error, after func() error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load, f.swap, f.after = load, swap, after
}

func (f *faulty) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	f.mu.Lock()
	load := f.load
	f.mu.Unlock()
	if load != nil {
		if err := load(ctx); err != nil {
			return nil, 0, err
		}
	}
	return f.Store.Load(ctx, key)
}

func (f *faulty) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	f.mu.Lock()
	swap, after, del := f.swap, f.after, f.del
	f.mu.Unlock()
	if del != nil && value == nil {
		if err := del(); err != nil {
			return 0, false, err
		}
	}
	if swap != nil {
		if err := swap(ctx); err != nil {
			return 0, false, err
		}
	}
	rev, ok, err := f.Store.CompareAndSwap(ctx, key, old, value)
	if err == nil && after != nil {
		if lost := after(); lost != nil {
			return 0, false, lost
		}
	}
	return rev, ok, err
}

var (
	errDown = errors.New("the store is down")
	down    = func(context.Context) error { return errDown }
	hangs   = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	exits   = func(context.Context) error { runtime.Goexit(); return nil }
)

// quiet is a Logger that says nothing.
var quiet = slog.New(slog.DiscardHandler)

// threeStages is a policy of three stages with control and proof.
func threeStages() Policy {
	return Policy{
		Stages: Percentages(10, 50, 100), Bake: time.Minute, Holdback: 5,
		Gates: []Gate{Errors.Within(2), Errors.AtMost(20)},
	}
}

// process is a rollout with its Run, in a bubble.
type process struct {
	*Rollout
	t    *testing.T
	stop func()
	n    int
}

func start(t *testing.T, name string, p Policy, o Options) *process {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet
	}
	r, err := New(name, p, &o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	proc := &process{Rollout: r, t: t}
	proc.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(proc.stop)
	synctest.Wait()
	return proc
}

// serve lets d go by with ten requests a second, of which the given parts are bad by cohort.
func (p *process) serve(d time.Duration, control, candidate float64) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
		p.request(control, candidate)
	}
	synctest.Wait()
}

// request is the next one.
func (p *process) request(control, candidate float64) {
	p.n++
	dec := p.Decide(Unit{Key: fmt.Sprint("user ", p.n)})
	part := control
	if dec.Enabled() {
		part = candidate
	}
	dec.Record(Errors.Observe(float64(p.n*7919%1000) < 1000*part))
}

// until serves until the rollout is in a state, or an hour has passed.
func (p *process) until(s State, control, candidate float64) {
	p.t.Helper()
	for range 3600 {
		if p.Status().State == s {
			return
		}
		p.serve(time.Second, control, candidate)
	}
	p.t.Fatalf("it is %v in %q, not %v", p.Status().State, p.Status().Stage.Name, s)
}

func (p *process) is(s State, stage string) {
	p.t.Helper()
	if st := p.Status(); st.State != s || stage != "" && st.Stage.Name != stage {
		p.t.Fatalf("it is %v in %q (%s), not %v in %q", st.State, st.Stage.Name, st.Note, s, stage)
	}
}

// served reports whether any of many units gets the candidate.
func served(r *Rollout) bool {
	for i := range 200 {
		if r.Peek(Unit{Key: fmt.Sprint(i)}).Enabled() {
			return true
		}
	}
	return false
}

func TestEndToEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var kinds []EventKind
		var steps []string
		p := threeStages()
		p.Rollback = []RollbackStep{
			{Name: "one", Do: func(_ context.Context, in Incident) error { steps = append(steps, in.Key); return nil }},
			{Name: "two", Do: func(_ context.Context, in Incident) error { steps = append(steps, in.Key); return nil }},
		}
		r := start(t, "good", p, Options{})
		r.Subscribe(func(e Event) { kinds = append(kinds, e.Kind) })
		r.until(Completed, .01, .01)
		if !r.Decide(Unit{}).Enabled() || r.Decide(Unit{Key: "a"}).Cohort() != None {
			t.Error("completed, and not everybody has the candidate, uncounted")
		}
		bad := start(t, "bad", p, Options{})
		bad.until(RolledBack, .01, .2)
		if served(bad.Rollout) {
			t.Error("rolled back, and somebody has the candidate")
		}
		in := bad.Status().Incident
		if in == nil || in.Gate == "" || in.Candidate.Rate < .1 || in.Control.Rate > .05 || in.Candidate.N == 0 {
			t.Errorf("the incident is %+v", in)
		}
		if want := []string{"bad/1/one", "bad/1/two"}; fmt.Sprint(steps) != fmt.Sprint(want) {
			t.Errorf("the steps run were %v, not %v", steps, want)
		}
		if fmt.Sprint(kinds) != fmt.Sprint([]EventKind{StageEntered, StageEntered, CompletedRollout}) {
			t.Errorf("the events were %v", kinds)
		}
	})
}

// TestAbsenceNeverPromotes: without outcomes, or with those of one cohort alone, time by itself moves nothing up.
func TestAbsenceNeverPromotes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := threeStages()
		p.Without = []string{GuardNoOutcome} // which does more than not to promote
		r := start(t, "x", p, Options{})
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		r.is(Running, "everyone 10 %")
		for range 3000 { // decisions that nothing comes of
			time.Sleep(time.Second)
			r.n++
			r.Decide(Unit{Key: fmt.Sprint(r.n)})
		}
		r.is(Running, "everyone 10 %")
		r.serve(30*time.Second, 0, 0) // a bake that stops
		time.Sleep(time.Hour)
		synctest.Wait()
		r.is(Running, "everyone 10 %")
		r.serve(50*time.Second, 0, 0)
		r.is(Running, "everyone 50 %")
		for range 36000 { // only the control reports
			time.Sleep(100 * time.Millisecond)
			r.n++
			if d := r.Decide(Unit{Key: fmt.Sprint(r.n)}); !d.Enabled() {
				d.Record(Errors.Observe(false))
			}
		}
		r.is(Running, "everyone 50 %")
	})
}

// TestHang: a candidate whose decisions go without outcomes, from the start or later, is rolled back; where neither
// cohort records anything nobody is.
func TestHang(t *testing.T) {
	for _, c := range []struct {
		name               string
		before             time.Duration // both record
		candidate, control bool          // do, from then on
		want               State
	}{
		{"from the start", 0, false, true, RolledBack},
		{"later", 50 * time.Second, false, true, RolledBack},
		{"nobody records", 0, false, false, Running},
		{"the control is silent", 20 * time.Second, true, false, Running},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := start(t, "x", threeStages(), Options{})
			r.serve(c.before, 0, 0)
			for range 1200 {
				time.Sleep(100 * time.Millisecond)
				r.n++
				if d := r.Decide(Unit{Key: fmt.Sprint(r.n)}); d.Enabled() && c.candidate || !d.Enabled() && c.control {
					d.Record(Errors.Observe(false))
				}
			}
			synctest.Wait()
			if s := r.Status(); s.State != c.want || s.Incident != nil && s.Incident.Gate != GuardNoOutcome {
				t.Errorf("%s: %v, %+v", c.name, s.State, s.Incident)
			}
		})
	}
}

// TestAnyRecordIsAnOutcome: where the control records no Errors, whatever the candidate records is an answer.
func TestAnyRecordIsAnOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "x", threeStages(), Options{})
		for range 1200 {
			time.Sleep(100 * time.Millisecond)
			r.n++
			if d := r.Decide(Unit{Key: fmt.Sprint(r.n)}); d.Enabled() {
				d.Record(Errors.Observe(false), Latency.Observe(time.Millisecond))
			} else {
				d.Record(Latency.Observe(time.Millisecond))
			}
		}
		if s := r.Status(); s.State != Running {
			t.Errorf("%v: %+v", s.State, s.Incident)
		}
	})
}

// TestAlarm: what must never happen is acted on before the tick, once: an evaluation for each event would close blocks by
// what their outcomes are, and write at every request.
func TestAlarm(t *testing.T) {
	for _, action := range []Action{Rollback, Hold, Report} {
		synctest.Test(t, func(t *testing.T) {
			p := threeStages()
			violation := NewRate("violation")
			p.Gates = append(p.Gates, violation.Never().OnFail(action))
			store := MemStore()
			r := start(t, "x", p, Options{Store: store, Interval: time.Minute})
			r.serve(90*time.Second, 0, 0)
			before := inStore(t, store).Round
			for range 300 {
				time.Sleep(10 * time.Millisecond)
				r.n++
				d := r.Decide(Unit{Key: fmt.Sprint(r.n)})
				d.Record(Errors.Observe(false), violation.Observe(d.Enabled()))
			}
			synctest.Wait()
			st := inStore(t, store)
			if n := st.Round - before; n == 0 || n > 2 {
				t.Errorf("%v: %d evaluations in three seconds", action, n)
			}
			if g := st.Gates.Gates[violation.Never().Name()]; g == nil || !g.Broken {
				t.Errorf("%v: it is not broken", action)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if s := r.Status(); action == Report && s.State != Running {
				t.Errorf("%v", s.State)
			}
		})
	}
}

func TestDeadline(t *testing.T) {
	for _, action := range []Action{Hold, Rollback} {
		synctest.Test(t, func(t *testing.T) {
			p := threeStages()
			p.OnDeadline, p.Deadline = action, 2*time.Hour
			r := start(t, "x", p, Options{})
			time.Sleep(2*time.Hour + time.Minute)
			synctest.Wait()
			if action == Hold {
				r.is(Held, "everyone 10 %")
				if err := r.Resume(t.Context(), "me"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(119 * time.Minute)
				r.is(Running, "everyone 10 %")
				return
			}
			r.is(RolledBack, "")
		})
	}
}

// TestRollbackWins: once Rollback has returned, no decision of that generation that starts later is Candidate, whatever
// races it.
func TestRollbackWins(t *testing.T) {
	rollbacks := 10_000
	if testing.Short() {
		rollbacks = 200
	}
	r := Must("x", threeStages(), &Options{Interval: time.Millisecond, Logger: quiet})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- r.Run(ctx) }()
	var rolled atomic.Uint64 // generation whose rollback has returned
	var candidates atomic.Uint64
	var deciders sync.WaitGroup
	for g := range 8 {
		deciders.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				done := rolled.Load()
				if i%16 == 0 {
					runtime.Gosched()
				}
				d := r.Decide(Unit{Key: fmt.Sprint(g, i%1000)})
				if d.Cohort() != Candidate {
					continue
				}
				candidates.Add(1)
				if d.Generation() <= done {
					t.Errorf("a candidate decision of generation %d after its rollback", d.Generation())
					return
				}
				d.Record(Errors.Observe(false))
			}
		})
	}
	for i := range rollbacks {
		if i > 0 {
			if err := r.Restart(ctx, "again"); err != nil {
				t.Fatal(err)
			}
		}
		if i%16 == 0 { // often enough that it is really exposed
			for r.Status().State != Running {
				runtime.Gosched()
			}
		}
		gen := r.Status().Generation
		if err := r.Rollback(ctx, "stop"); err != nil {
			t.Fatal(err)
		}
		rolled.Store(gen)
	}
	cancel()
	deciders.Wait()
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
	if candidates.Load() == 0 {
		t.Error("nobody ever got the candidate: the test shows nothing")
	}
}

// TestRollbackWithoutStore: a store that fails, hangs or ends its goroutine neither keeps a rollback from being in force here nor from being
// stored once it is back; and after a restart it is still rolled back.
func TestRollbackWithoutStore(t *testing.T) {
	for name, broken := range map[string]func(context.Context) error{"fails": down, "hangs": hangs, "exits": exits} {
		for _, running := range []bool{true, false} {
			t.Run(fmt.Sprint(name, running), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := &faulty{Store: MemStore()}
					r := start(t, "x", threeStages(), Options{Store: f})
					r.serve(30*time.Second, 0, 0)
					r.is(Running, "everyone 10 %")
					if !running {
						r.stop()
					}
					if !served(r.Rollout) {
						t.Fatal("nobody is exposed")
					}
					f.set(broken, broken, nil)
					began := time.Now()
					err := r.Rollback(t.Context(), "stop")
					if !errors.Is(err, ErrNotStored) {
						t.Errorf("the error is %v, not ErrNotStored", err)
					}
					if took := time.Since(began); took > 30*time.Second {
						t.Errorf("it took %v", took)
					}
					if served(r.Rollout) {
						t.Fatal("somebody is exposed after Rollback returned")
					}
					time.Sleep(time.Minute)
					if served(r.Rollout) {
						t.Fatal("somebody is exposed a minute after")
					}
					f.set(nil, nil, nil)
					if running {
						time.Sleep(20 * time.Second)
						synctest.Wait()
						r.is(RolledBack, "")
						r.stop()
						again := start(t, "x", threeStages(), Options{Store: f})
						time.Sleep(time.Minute)
						again.is(RolledBack, "")
						return
					}
					if err := r.Rollback(t.Context(), "stop"); err != nil {
						t.Fatal(err)
					}
				})
			})
		}
	}
}

// TestStoreHangsForEver: a Store that ignores its context holds up neither decisions nor a rollback nor Run's end.
func TestStoreHangsForEver(t *testing.T) {
	f := &faulty{Store: MemStore()}
	r := Must("x", threeStages(), &Options{Store: f, Interval: 10 * time.Millisecond, Logger: quiet})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- r.Run(ctx) }()
	for r.Status().State != Running {
		runtime.Gosched()
	}
	release := make(chan struct{})
	defer close(release)
	hang := func(context.Context) error { <-release; return errDown }
	f.set(hang, hang, nil)
	if err := r.Rollback(t.Context(), "stop"); !errors.Is(err, ErrNotStored) {
		t.Errorf("the error is %v, not ErrNotStored", err)
	}
	if served(r) {
		t.Error("somebody is exposed after Rollback returned")
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
}

// TestStoreDownWhileBad: while the Store is out of reach nothing advances, and a bad candidate is nevertheless rolled
// back here; the Store learns of it, with its incident, when it is back.
func TestStoreDownWhileBad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		r := start(t, "x", threeStages(), Options{Store: f})
		r.serve(30*time.Second, 0, 0)
		f.set(down, down, nil)
		r.serve(5*time.Minute, 0, 0)
		r.is(Running, "everyone 10 %")
		if r.Status().Err == "" {
			t.Error("the status does not say that the store is down")
		}
		r.serve(10*time.Minute, .01, .5)
		if served(r.Rollout) {
			t.Fatal("a candidate with half of its requests failing is still exposed")
		}
		f.set(nil, nil, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		r.is(RolledBack, "")
		if in := r.Status().Incident; in == nil || in.Gate == "" || in.Candidate.Rate == 0 {
			t.Errorf("the incident is %+v", in)
		}
	})
}

// TestLostAcknowledgement: writes whose answer is lost are recognised, nothing is consumed twice and nothing lost.
func TestLostAcknowledgement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		n := 0
		f.set(nil, nil, func() error {
			if n++; n%3 == 0 {
				return errDown
			}
			return nil
		})
		r := start(t, "x", threeStages(), Options{Store: f})
		r.serve(30*time.Second, 0, 0)
		time.Sleep(2 * time.Minute) // let the last block close
		synctest.Wait()
		var recorded uint64
		for _, ring := range r.Status().Rings {
			recorded += ring.Candidate + ring.Control
		}
		var consumed uint64
		for _, g := range r.Status().Gates {
			if g.Metric == "errors" && g.Name == "errors.Within(2)" {
				consumed = g.Candidate.N + g.Control.N
			}
		}
		if recorded == 0 || consumed != recorded {
			t.Errorf("%d outcomes recorded, %d consumed", recorded, consumed)
		}
	})
}

// TestGoesOn: a process that ends, and one that is killed, leave a state that the next goes on from.
func TestGoesOn(t *testing.T) {
	for name, killed := range map[string]bool{"ends": false, "is killed": true} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { goesOn(t, killed) }) })
	}
}

func goesOn(t *testing.T, killed bool) {
	dir, err := DirStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := &faulty{Store: dir}
	r := start(t, "x", threeStages(), Options{Store: f})
	r.serve(90*time.Second, 0, 0)
	r.is(Running, "everyone 50 %")
	before := r.Status()
	if killed {
		f.set(down, down, nil) // nothing of it reaches the store any more
	}
	r.stop()
	again := start(t, "x", threeStages(), Options{Store: dir})
	again.is(Running, "everyone 50 %")
	after := again.Status()
	if after.Gates[0].Candidate.N < before.Gates[0].Candidate.N || after.Stage.Baked < before.Stage.Baked {
		t.Errorf("it begins again: %+v", after.Stage)
	}
	if most := before.Rings[0].Candidate; !killed && after.Gates[0].Candidate.N != most {
		t.Errorf("of %d candidate outcomes %d were judged: the last evidence is not there", most, after.Gates[0].Candidate.N)
	}
	time.Sleep(10 * time.Minute)
	again.until(Completed, 0, 0)
	again.stop()

	lone := Must("x", threeStages(), &Options{Store: dir, Logger: quiet})
	if lone.Decide(Unit{Key: "a"}).Reason() != ReasonNotLoaded {
		t.Error("it answers before it is loaded")
	}
	if err := lone.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !lone.Decide(Unit{Key: "a"}).Enabled() {
		t.Error("ready, and not what was stored")
	}
}

// TestGarbage: a document that cannot be read is an error that says so, is never overwritten, and the last good share is
// kept.
func TestGarbage(t *testing.T) {
	for name, doc := range map[string]string{
		"empty": "", "garbage": "\x00\x01", "truncated": `{"format":1,"name":"x"`, "newer": `{"format":99}`, "null": "null",
		"other":                   `{"format":1,"name":"y","gen":1,"ver":1,"epoch":1,"versions":[{"version":"","gen":1}]}`,
		"rolled back and exposed": `{"format":1,"name":"x","gen":1,"ver":1,"epoch":1,"versions":[{"version":"","gen":1}],"phase":"rolled back","shares":{"everyone":5}}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := MemStore()
				r := start(t, "x", threeStages(), Options{Store: store})
				r.serve(30*time.Second, 0, 0)
				r.stop()
				_, rev, _ := store.Load(t.Context(), r.key())
				if _, ok, err := store.CompareAndSwap(t.Context(), r.key(), rev, []byte(doc)); !ok || err != nil {
					t.Fatal(ok, err)
				}
				fresh := Must("x", threeStages(), &Options{Store: store, Logger: quiet})
				err := fresh.Ready(t.Context())
				if err == nil || !strings.Contains(err.Error(), "rollout/x/state") {
					t.Errorf("the error is %v", err)
				}
				if name == "newer" && !errors.Is(err, machine.ErrNewer) {
					t.Errorf("the error is %v", err)
				}
				if served(fresh) {
					t.Error("exposed without a readable state")
				}
				again := start(t, "x", threeStages(), Options{Store: store})
				time.Sleep(time.Minute)
				if served(again.Rollout) {
					t.Error("exposed without a readable state")
				}
				if err := again.Hold(t.Context(), "me"); err == nil {
					t.Error("a verb on garbage succeeded")
				}
				now, _, _ := store.Load(t.Context(), r.key())
				if !bytes.Equal(now, []byte(doc)) {
					t.Error("the document was overwritten")
				}
				if !served(r.Rollout) {
					t.Error("the process that knew the last good share no longer serves it")
				}
			})
		})
	}
}

// TestStoreWentBack: a store that was set back to before a rollback does not undo the rollback.
func TestStoreWentBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		r := start(t, "x", threeStages(), Options{Store: store})
		r.serve(30*time.Second, 0, 0)
		old, _, _ := store.Load(t.Context(), r.key())
		if err := r.Rollback(t.Context(), "stop"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		_, rev, _ := store.Load(t.Context(), r.key())
		if _, ok, _ := store.CompareAndSwap(t.Context(), r.key(), rev, old); !ok {
			t.Fatal("conflict")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		r.is(RolledBack, "")
		if served(r.Rollout) {
			t.Error("exposed again")
		}
		now, _, _ := store.Load(t.Context(), r.key())
		if st, err := machine.Decode("x", now); err != nil || st.Phase != machine.RolledBack {
			t.Errorf("stored is %v, %v", st, err)
		}
	})
}

func TestVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		version := func(v string) *process {
			p := threeStages()
			p.Version = v
			return start(t, "x", p, Options{Store: store})
		}
		one := version("1")
		one.serve(30*time.Second, 0, 0)
		if err := one.Rollback(t.Context(), "bad"); err != nil {
			t.Fatal(err)
		}
		one.stop()
		same := version("1")
		time.Sleep(time.Minute)
		same.is(RolledBack, "")
		same.stop()

		two := version("2")
		two.is(Running, "everyone 10 %")
		if two.Status().Generation != 2 || !served(two.Rollout) {
			t.Errorf("a new version is %+v", two.Status())
		}
		old := version("1") // still about, on another machine
		time.Sleep(time.Minute)
		if served(old.Rollout) || !old.Status().Passive {
			t.Error("the version that was rolled back is exposed again")
		}
		if d := old.Decide(Unit{Key: "a"}); d.Reason() != ReasonVersion {
			t.Errorf("the reason is %v", d.Reason())
		}
		if err := old.Approve(t.Context(), "everyone 10 %", "me"); !errors.Is(err, ErrVersion) {
			t.Errorf("the old version may approve: %v", err)
		}
		two.until(Completed, 0, 0)
		three := version("3")
		three.is(Completed, "")
		if !served(three.Rollout) || three.Status().Generation != 2 {
			t.Errorf("a completed rollout did not adopt the next version: %+v", three.Status())
		}
		if err := old.Restart(t.Context(), "once more"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if !served(old.Rollout) || old.Status().Generation != 3 {
			t.Errorf("restarted, and it is %+v", old.Status())
		}
	})
}

// TestEditedPolicy: another policy of the same version raises nothing by itself, and goes on in the stage that fits.
func TestEditedPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		r := start(t, "x", threeStages(), Options{Store: store})
		r.serve(30*time.Second, 0, 0)
		r.stop()
		p := threeStages()
		p.Stages = Percentages(5, 20, 50, 100)
		p.Gates = append(p.Gates, Latency.NoWorse())
		edited := start(t, "x", p, Options{Store: store})
		edited.is(Running, "everyone 20 %")
		if share := edited.Status().Rings[0].Percent; share != 10 {
			t.Errorf("the share is %v, not 10 as before", share)
		}
		edited.serve(90*time.Second, 0, 0)
		if share := edited.Status().Rings[0].Percent; share != 20 {
			t.Errorf("the share is %v, not 20", share)
		}
		edited.stop()
		p.Salt = "another"
		salted := start(t, "x", p, Options{Store: store})
		salted.is(Running, "everyone 5 %")
		if salted.Status().Generation != 2 {
			t.Error("another salt is no new generation")
		}
	})
}

func TestRunTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "x", threeStages(), Options{})
		if err := r.Run(t.Context()); !errors.Is(err, ErrRunning) {
			t.Errorf("a second Run: %v", err)
		}
		other := Must("x", threeStages(), &Options{Logger: quiet})
		if err := other.Run(t.Context()); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), `"x"`) {
			t.Errorf("another rollout of the name: %v", err)
		}
		shared := MemStore()
		start(t, "y", threeStages(), Options{Store: shared})
		start(t, "y", threeStages(), Options{Store: shared}) // two replicas are fine
		r.stop()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := other.Run(ctx); err != nil {
			t.Errorf("Run after the first ended: %v", err)
		}
		if err := r.Run(ctx); err != nil {
			t.Errorf("Run again: %v", err)
		}
		var none *Rollout
		if none.Run(ctx) == nil || none.Rollback(ctx, "") == nil || none.Ready(ctx) == nil {
			t.Error("a nil Rollout runs")
		}
	})
}

// TestLease: once the store was out of reach for the lease, everybody gets the stable version until it is back.
func TestLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		r := start(t, "x", threeStages(), Options{Store: f, Lease: time.Minute})
		r.serve(30*time.Second, 0, 0)
		f.set(down, down, nil)
		time.Sleep(50 * time.Second)
		if !served(r.Rollout) {
			t.Error("stable before the lease is over")
		}
		time.Sleep(20 * time.Second)
		if served(r.Rollout) {
			t.Error("exposed after the lease is over")
		}
		f.set(nil, nil, nil)
		time.Sleep(10 * time.Second)
		if !served(r.Rollout) {
			t.Error("the store is back, the candidate is not")
		}
	})
}
