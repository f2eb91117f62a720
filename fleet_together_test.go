package rollout

// What goes wrong only where several things come together: found by reading, each with what led to it.

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// TestUnreadableSeries: a document whose beginning can be read and whose series cannot is given up like any other.
func TestUnreadableSeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		r := start(t, "x", threeStages(), Options{Store: store})
		r.serve(30*time.Second, 0, 0)
		st := inStore(t, store)
		key := r.evidencePrefix(st.Gen, st.Nonce) + "other"
		doc := (&tally.Doc{About: tally.About{Inc: "other", Seq: 1, Birth: st.Round}, Series: []tally.Series{{Key: tally.Key{Epoch: st.Epoch, Ring: "everyone", Metric: "errors", Cells: 128}, Counts: tally.NewCounts(128), Events: 1 << 60}}}).Encode()
		if _, err := tally.Decode(doc); err == nil {
			t.Fatal("it can be read")
		}
		if _, err := tally.Peek(doc); err != nil {
			t.Fatal(err)
		}
		if _, ok, err := store.CompareAndSwap(t.Context(), key, 0, doc); !ok || err != nil {
			t.Fatal(ok, err)
		}
		r.serve(3*time.Hour, 0, .9)
		if served(r.Rollout) {
			t.Error("90 % of the candidate's requests have failed for three hours, and it is served")
		}
	})
}

// TestAlarmAfterFolding: what must never happen is published at once also by who was folded, and has counted such events in epochs that are over.
func TestAlarmAfterFolding(t *testing.T) {
	now := driverStart
	store := MemStore()
	p := threeStages()
	p.Independent, p.Bake = true, 5*time.Hour
	p.Without = []string{GuardNoOutcome, GuardSplit}
	soft, hard := NewRate("soft"), NewRate("hard")
	p.Gates = append(p.Gates, soft.Never().OnFail(Report), hard.Never())
	a := manual(t, store, "a", p, &now)
	b := manual(t, store, "b", p, &now)
	n := 0
	both := func() {
		now = now.Add(5 * time.Second)
		turn(a)
		turn(b)
	}
	req := func(r *Rollout, bad bool) {
		for range 50 {
			n++
			d := r.Decide(Unit{Key: fmt.Sprint(n)})
			d.Record(Errors.Observe(false))
			if d.Enabled() {
				d.Record(soft.Observe(bad))
				bad = false
			}
		}
	}
	both()
	both()
	req(a, true)
	both()
	a.alarm.Store(false)
	was := a.pub.inc
	for range 60 { // a is idle, and folded
		now = now.Add(5 * time.Second)
		req(b, false)
		turn(b)
	}
	must(t, b.SetPercent(t.Context(), Everyone, 11, ""))
	must(t, b.SetPercent(t.Context(), Everyone, 12, ""))
	for range 3 {
		req(b, false)
		both()
	}
	req(a, false)
	both()
	if a.pub.inc == was {
		t.Fatal("it is the same incarnation")
	}
	if a.alarm.Load() {
		t.Fatal("alarm")
	}
	req(a, true)
	if !a.alarm.Load() {
		t.Fatal("no alarm")
	}
	a.clock.alarm = a.alarm.Swap(false)
	missing := a.missing
	turn(a)
	all, _ := store.List(context.Background(), "rollout/x/ev/")
	for key, v := range all {
		if _, err := tally.Decode(v); err != nil {
			t.Errorf("%s: %v", strings.TrimPrefix(key, "rollout/x/ev/"), err)
		}
	}
	if a.missing > missing {
		t.Error("its own evidence is missing to it")
	}
	for range 200 { // a has died
		now = now.Add(5 * time.Second)
		req(b, false)
		turn(b)
	}
	c := inStore(t, store).Consumed
	for range 100 {
		now = now.Add(5 * time.Second)
		req(b, false)
		turn(b)
	}
	same := true
	for k, v := range inStore(t, store).Consumed {
		if w := c[k]; w == nil || fmt.Sprint(w.Counts) != fmt.Sprint(v.Counts) {
			same = false
		}
	}
	if same {
		t.Error("nothing was consumed any more in 100 ticks")
	}
}

// TestClearAfterRejoin: while settled effects are removed from the journal, in vain, the store goes back to before they were settled.
func TestClearAfterRejoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		p := threeStages()
		p.Without = []string{GuardNoOutcome}
		var undone []string
		p.Undo = map[string]func(context.Context, Effect) error{"k": func(_ context.Context, e Effect) error { undone = append(undone, string(e.Payload)); return nil }}
		r := start(t, "x", p, Options{Store: f})
		journal := func(what string) {
			for i := range 1000 {
				if d := r.Decide(Unit{Key: fmt.Sprint(i)}); d.Enabled() {
					if err := d.Journal(t.Context(), "k", []byte(what)); err != nil {
						t.Fatal(what, err)
					}
					return
				}
			}
			t.Fatal("nobody has it")
		}
		r.serve(30*time.Second, 0, 0)
		journal("before")
		old := map[string][]byte{}
		for _, key := range []string{r.key(), r.headKey()} {
			old[key], _, _ = f.Store.Load(t.Context(), key)
		}
		f.deleting(func() error { return errDown })
		r.until(Completed, 0, 0)
		time.Sleep(5*time.Minute + 50*time.Millisecond)
		synctest.Wait() // the pauses between two tries are a minute by now
		for key, doc := range old {
			_, rev, _ := f.Store.Load(t.Context(), key)
			if _, ok, _ := f.Store.CompareAndSwap(t.Context(), key, rev, doc); !ok {
				t.Fatal("conflict")
			}
		}
		time.Sleep(11 * time.Second)
		synctest.Wait()
		r.is(Running, "")
		journal("after")
		f.deleting(nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		must(t, r.Rollback(t.Context(), "stop"))
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		r.is(RolledBack, "")
		if len(undone) != 2 {
			t.Errorf("undone are %v, not both", undone)
		}
	})
}

// TestAloneStepBack: one that is cut off takes the candidate out of use also where its gate would only step back.
func TestAloneStepBack(t *testing.T) {
	for _, action := range []Action{Report, StepBack} {
		synctest.Test(t, func(t *testing.T) {
			f := &faulty{Store: MemStore()}
			p := Policy{
				Stages: Percentages(5, 10, 25, 100), Bake: time.Minute, Holdback: 5, Independent: true, ProveFrom: 100,
				Gates: []Gate{Errors.Within(2).OnFail(action), Errors.AtMost(20)},
			}
			r := start(t, "x", p, Options{Store: f})
			for r.Status().Stage.Name != "everyone 25 %" {
				r.serve(time.Second, 0, 0)
			}
			r.serve(5*time.Second, 0, 0)
			f.set(down, down, nil)
			r.serve(5*time.Minute, .01, .15)
			r.serve(30*time.Minute, .01, .9)
			if served(r.Rollout) {
				t.Errorf("with a gate that asks for %v 90 %% of the candidate's requests have failed for half an hour, and it is served to %v %%", action, r.Status().Rings[0].Percent)
			}
		})
	}
}

// TestStepsBackLater: where it only stepped back it goes on from there, once the Store can be used again.
func TestStepsBackLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		r := start(t, "x", Policy{
			Stages: Percentages(5, 10, 25, 100), Bake: time.Minute, Holdback: 5, Independent: true, ProveFrom: 100,
			Gates: []Gate{Errors.Within(2).OnFail(StepBack)},
		}, Options{Store: f})
		for r.Status().Stage.Name != "everyone 25 %" {
			r.serve(time.Second, 0, 0)
		}
		f.set(down, down, nil)
		for served(r.Rollout) {
			r.serve(time.Second, .01, .3)
		}
		f.set(nil, nil, nil)
		r.serve(15*time.Second, .01, .01)
		r.is(Running, "everyone 10 %")
		if !served(r.Rollout) {
			t.Error("it has stepped back, and serves nobody")
		}
		r.until(Completed, .01, .01)
	})
}

// shift serves requests by processes, and has them tick.
type shift struct {
	now *time.Time
	n   int // requests
}

// serve is so many requests, of which so many in ten of the candidate's fail.
func (s *shift) serve(r *Rollout, many, bad int) {
	for range many {
		s.n++
		d := r.Decide(Unit{Key: fmt.Sprint(s.n)})
		d.Record(Errors.Observe(d.Enabled() && s.n%10 < bad))
	}
}

// tick is one of all of them, and so many good requests for each.
func (s *shift) tick(many int, all ...*Rollout) {
	*s.now = s.now.Add(5 * time.Second)
	for _, r := range all {
		turn(r)
		s.serve(r, many, 0)
	}
}

// TestForkReturns: what one has condemned while it was cut off it does not serve by what others had decided meanwhile, also
// where they have gone on twice, and its epoch counts no more.
func TestForkReturns(t *testing.T) {
	for _, stage := range []string{"everyone 30 %", "everyone 60 %"} {
		now := driverStart
		store := MemStore()
		away := &faulty{Store: store}
		p := threeStages()
		p.Independent, p.ProveFrom = true, 100
		p.Stages = Percentages(10, 30, 60, 100)
		a, b, c := manual(t, away, "a", p, &now), manual(t, store, "b", p, &now), manual(t, store, "c", p, &now)
		s := &shift{now: &now}
		for range 4 {
			s.tick(40, a, b, c)
		}
		away.set(down, down, nil)
		for b.Status().Stage.Name != stage { // the others go on
			s.tick(40, b, c)
			turn(a)
		}
		for served(a) { // only now the candidate fails, here
			s.serve(a, 40, 9)
			now = now.Add(5 * time.Second)
			turn(a)
		}
		look := func(context.Context) error {
			if served(a) {
				t.Errorf("%s: it serves %v %% again of what it has condemned after that was decided", stage, a.Status().Rings[0].Percent)
			}
			return nil
		}
		away.set(look, look, nil) // at no moment of the tick
		a.coin = func(int) bool { return false }
		now = now.Add(5 * time.Second)
		turn(a)
		must(t, look(t.Context()))
	}
}

// TestForkOverlooks: what was decided without the evidence by which a process has condemned the candidate, just before that
// evidence was judged, does not have it served again there.
func TestForkOverlooks(t *testing.T) {
	now := driverStart
	store := MemStore()
	away, isDown := &faulty{Store: store}, false
	p := threeStages()
	p.Independent, p.ProveFrom = true, 100
	p.Gates = []Gate{Errors.Within(5)}
	p.Stages = Percentages(10, 30, 60, 100)
	a := manual(t, away, "a", p, &now)
	p.MayAdvance = func(time.Time) bool {
		if isDown && !served(a) { // after the evidence was listed: it comes back, and publishes what nobody judges now
			away.set(nil, nil, nil)
			isDown = false
			turn(a)
		}
		return true
	}
	b, c := manual(t, store, "b", p, &now), manual(t, store, "c", p, &now)
	s := &shift{now: &now}
	for range 4 {
		s.tick(400, a, b, c)
	}
	a.coin = func(int) bool { return false }
	away.set(down, down, nil)
	isDown = true
	for served(a) {
		s.serve(a, 40, 9)
		now = now.Add(5 * time.Second)
		turn(a)
	}
	for isDown {
		s.tick(400, b)
	}
	was := inStore(t, store)
	if !a.fork.open || was.Epoch <= a.fork.epoch {
		t.Fatalf("nothing was decided without it: %+v, %d", a.fork, was.Epoch)
	}
	now = now.Add(5 * time.Second)
	turn(c)
	if st := inStore(t, store); st.Phase != machine.Running || st.Epoch != was.Epoch || st.Cursors[a.fork.inc].Seq < a.fork.seq {
		t.Fatalf("its evidence is not judged: %v, epoch %d", st.Phase, st.Epoch)
	}
	turn(a)
	if a.fork.open {
		t.Fatal("it has not heard of it")
	}
	if served(a) {
		t.Error("it serves what it has condemned, as others have decided without its evidence")
	}
	for b.Status().Stage.Name == was.Stage.Name {
		s.tick(400, b, c)
	}
	now = now.Add(5 * time.Second)
	turn(a)
	if !served(a) {
		t.Errorf("others have decided with its evidence, and it serves nobody: %+v", a.fork)
	}
}

// TestIntervals: processes may have different intervals, and the slow one is not taken for dead.
func TestIntervals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		p := threeStages()
		p.Bake, p.Deadline = 24*time.Hour, 1000*time.Hour
		slow := start(t, "x", p, Options{Store: store, Interval: time.Minute, Replica: "slow"})
		fast := start(t, "x", p, Options{Store: store, Interval: 5 * time.Second, Replica: "fast"})
		fast.serve(2*time.Minute, 0, 0)
		n := 0
		for i := range 1000 {
			if _, s := slow.Begin(t.Context(), Unit{Key: fmt.Sprint(i)}); s.Decision().Enabled() {
				n++
			} else {
				s.End(nil)
			}
		}
		lost := ""
		fast.Subscribe(func(e Event) {
			if e.Kind == WorkLost {
				lost = e.Note
			}
		})
		fast.serve(20*time.Minute, 0, 0)
		if n == 0 || lost != "" {
			t.Errorf("%d sessions go on: %s", n, lost)
		}
	})
}

// TestNoIncident: a state that is rolled back and has no incident has its steps run.
func TestNoIncident(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		doc := `{"format":1,"name":"x","gen":1,"ver":1,"epoch":1,"versions":[{"version":"","gen":1}],"phase":"rolling back","steps":[{"name":"one"}]}`
		if _, ok, err := store.CompareAndSwap(t.Context(), "rollout/x/state", 0, []byte(doc)); !ok || err != nil {
			t.Fatal(ok, err)
		}
		p := threeStages()
		made := 0
		p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error { made++; return nil }}}
		r := start(t, "x", p, Options{Store: store})
		time.Sleep(time.Minute)
		synctest.Wait()
		if r.is(RolledBack, ""); made != 1 {
			t.Errorf("the step was made %d times", made)
		}
	})
}

// TestUnsureCount: Status.Unsure counts observations, and not what guards count of them.
func TestUnsureCount(t *testing.T) {
	now := driverStart
	store := MemStore()
	p := threeStages()
	p.Gates = append(p.Gates, Latency.Quantile(.9).AtMost(time.Second))
	r := manual(t, store, "a", p, &now)
	for range 3 {
		turn(r)
		now = now.Add(5 * time.Second)
	}
	for i := range 10 {
		r.Decide(Unit{Key: fmt.Sprint(i)}).Record(Errors.Observe(false), Latency.Observe(2*time.Second))
	}
	now = now.Add(20 * time.Second)
	turn(r)
	r.Decide(Unit{Key: "a"}).Record(Errors.Observe(false), Latency.Observe(time.Millisecond))
	key := r.pub.key(r)
	_, rev, _ := store.Load(t.Context(), key)
	if _, ok, err := store.CompareAndSwap(t.Context(), key, rev, []byte("x")); !ok || err != nil {
		t.Fatal(ok, err)
	}
	now = now.Add(20 * time.Second)
	turn(r)
	if n := r.Status().Unsure; n != 22 {
		t.Errorf("%d of 22 observations are given up", n)
	}
}

// TestAloneOfOne: the only process that is counted may be another one: this one does not roll back for it what it judges alone.
func TestAloneOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := &faulty{Store: MemStore()}
		other := start(t, "x", threeStages(), Options{Store: away.Store})
		other.serve(20*time.Second, 0, 0)
		alone := start(t, "x", threeStages(), Options{Store: away}) // has counted nothing yet
		other.serve(10*time.Second, 0, 0)
		away.set(down, down, nil)
		for served(alone.Rollout) {
			alone.serve(time.Second, 0, .9)
		}
		alone.judgedAsOneOfTwo()
		alone.mu.Lock()
		if alone.intent != nil {
			t.Errorf("it will roll the fleet back, with E %.4g of %.4g", alone.intent.incident.E, alone.intent.incident.NeedE)
		}
		alone.mu.Unlock()
	})
}

// TestRejoinHold: a store that goes back forgets no operator's Hold.
func TestRejoinHold(t *testing.T) {
	r := Must("x", threeStages(), &Options{Logger: quiet})
	s := machine.New("x", r.plan, "n")
	machine.Step(s, r.plan, machine.Input{Now: driverStart, MayAdvance: true})
	stored := s.Clone()
	if _, err := machine.Apply(s, r.plan, machine.Verb{Name: machine.VerbHold, Note: "incident 7"}); err != nil {
		t.Fatal(err)
	}
	joined, _ := machine.Rejoin(stored, s, r.plan, "m", driverStart)
	if joined.Phase != machine.Held {
		t.Error("an operator's Hold is forgotten")
	}
}

// TestReadOnly: one that can read the Store and not write follows what it reads.
func TestReadOnly(t *testing.T) {
	now := driverStart
	store := MemStore()
	ro := &faulty{Store: store}
	p := threeStages()
	p.Bake = time.Hour
	a, b, c := manual(t, store, "a", p, &now), manual(t, ro, "b", p, &now), manual(t, store, "c", p, &now)
	n := 0
	all := func() {
		now = now.Add(5 * time.Second)
		for _, r := range []*Rollout{c, b, a} {
			turn(r)
			for range 200 {
				n++
				r.Decide(Unit{Key: fmt.Sprint(n)}).Record(Errors.Observe(false))
			}
		}
	}
	for range 5 {
		all()
	}
	c.coin = func(int) bool { return false }
	ro.set(nil, down, nil)
	must(t, a.SetPercent(t.Context(), Everyone, 5, "less"))
	for range 5 {
		all()
	}
	if got := b.Status().Rings[0].Percent; got > 5 {
		t.Errorf("it has loaded a share of 5 %% at each tick, and serves %v", got)
	}
}

// hanging is a Store that hangs from the first look at a document of evidence on, as who seals it takes.
type hanging struct {
	Store
	since atomic.Pointer[time.Time]
}

func (s *hanging) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	if now := time.Now(); strings.Contains(key, "/ev/") {
		s.since.CompareAndSwap(nil, &now)
	}
	if s.since.Load() != nil {
		<-ctx.Done()
		return nil, 0, ctx.Err()
	}
	return s.Store.Load(ctx, key)
}

func (s *hanging) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	if s.since.Load() != nil {
		<-ctx.Done()
		return 0, false, ctx.Err()
	}
	return s.Store.CompareAndSwap(ctx, key, old, value)
}

// TestLeaseWhileSealing: a lease ends in time also where the Store begins to hang while many documents are to be sealed.
func TestLeaseWhileSealing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &hanging{Store: MemStore()}
		p := threeStages()
		p.Bake = time.Hour
		r := start(t, "x", p, Options{Store: s, Lease: 15 * time.Second})
		r.serve(20*time.Second, 0, 0)
		st := inStore(t, s.Store)
		for i := range clearings {
			d := &tally.Doc{About: tally.About{Inc: fmt.Sprint("dead", i), Seq: 1, Birth: st.Round}}
			if _, ok, err := s.Store.CompareAndSwap(t.Context(), r.evidencePrefix(st.Gen, st.Nonce)+d.Inc, 0, d.Encode()); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
		for s.since.Load() == nil || served(r.Rollout) {
			r.serve(time.Second, 0, 0)
		}
		if took := time.Since(*s.since.Load()); took > 20*time.Second { // it is looked at in each tick
			t.Errorf("a lease of 15 s ended after %v", took)
		}
	})
}
