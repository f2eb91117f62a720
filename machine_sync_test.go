package rollout

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/machine"
)

// life is a rollout under random actions, in fake time, with what must be remembered to judge it.
type life struct {
	t       *rapid.T
	store   *faulty
	broken  bool
	policy  Policy
	version int

	r      *Rollout
	cancel context.CancelFunc
	done   chan error
	n      int

	rolled  map[string]bool // versions rolled back and not restarted
	latched uint64          // generation whose rollback returned here
	shares  map[string]Percent
	gen     uint64
}

// TestMachineInFakeTime is the machine's property test through a real Rollout, its Run and its Store.
func TestMachineInFakeTime(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rapid.SyncTest(t, func(t *rapid.T) {
			l := &life{t: t, store: &faulty{Store: MemStore()}, rolled: map[string]bool{}}
			l.policy = Policy{
				Version: "v0",
				Rings:   []Ring{{Name: "staff"}},
				Stages:  []Stage{{Ring: "staff", Percent: 50, GuardOnly: true}, {Percent: 10, Over: time.Minute}, {Percent: 50, Approval: true}, {Percent: 100}},
				Bake:    time.Minute, Holdback: 5, Deadline: 12 * time.Minute,
				Gates:    []Gate{Errors.Within(2), Errors.AtMost(20).OnFail(rapid.SampledFrom([]Action{Rollback, StepBack, Hold, RollbackRing}).Draw(t, "action"))},
				Rollback: []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error { return nil }}},
			}
			l.begin()
			defer l.end()
			t.Repeat(map[string]func(*rapid.T){
				"good outcomes": func(t *rapid.T) { l.serve(rapid.IntRange(1, 40).Draw(t, "seconds"), 0) },
				"bad outcomes":  func(t *rapid.T) { l.serve(rapid.IntRange(1, 20).Draw(t, "seconds"), 3) },
				"silence": func(t *rapid.T) {
					time.Sleep(rapid.SampledFrom([]time.Duration{time.Second, time.Minute, 15 * time.Minute}).Draw(t, "time"))
				},
				"verb":    l.verb,
				"restart": func(*rapid.T) { l.end(); l.begin() },
				"new version": func(*rapid.T) {
					l.end()
					l.version++
					l.policy.Version = fmt.Sprint("v", l.version)
					l.begin()
				},
				"store": func(t *rapid.T) {
					if l.broken = !l.broken; l.broken {
						l.store.set(down, down, nil)
					} else {
						l.store.set(nil, nil, nil)
					}
				},
				"": func(*rapid.T) { synctest.Wait(); l.check() },
			})
		})
	})
}

func (l *life) begin() {
	var err error
	if l.r, err = New("x", l.policy, &Options{Store: l.store, Logger: quiet, Interval: 20 * time.Second}); err != nil {
		l.t.Fatal(err)
	}
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(context.Background())
	l.done = make(chan error, 1)
	go func() { l.done <- l.r.Run(ctx) }()
	l.latched = 0
	synctest.Wait()
}

func (l *life) end() {
	l.cancel()
	if err := <-l.done; err != nil {
		l.t.Fatalf("Run: %v", err)
	}
}

// serve sends ten requests a second, of which one in bad of the candidate's is an error.
func (l *life) serve(seconds, bad int) {
	for range seconds * 10 {
		time.Sleep(100 * time.Millisecond)
		l.n++
		u := Unit{Key: fmt.Sprint(l.n)}
		if l.n%5 == 0 {
			u.Groups = []string{"staff"}
		}
		d := l.r.Decide(u)
		d.Record(Errors.Observe(bad > 0 && d.Enabled() && l.n%bad == 0))
	}
}

func (l *life) verb(t *rapid.T) {
	ctx, r := context.Background(), l.r
	before := r.Status()
	stage, gen := before.Stage.Name, before.Generation
	var err error
	switch verb := rapid.SampledFrom([]string{"rollback", "restart", "hold", "resume", "resume", "approve", "advance", "percent", "ring"}).Draw(t, "verb"); verb {
	case "rollback":
		err = r.Rollback(ctx, "me")
		if l.latched = gen; served(r) {
			t.Fatal("exposed after Rollback returned")
		}
		if after := r.Status(); err == nil && after.Generation == gen && after.Version == l.policy.Version {
			l.rolled[l.policy.Version] = true // otherwise it was another one that Run has taken over from meanwhile
		}
	case "restart":
		if err = r.Restart(ctx, "me"); err == nil {
			delete(l.rolled, l.policy.Version)
			l.shares = nil
		}
	case "hold":
		err = r.Hold(ctx, "me")
	case "resume":
		err = r.Resume(ctx, "me")
		l.shares = nil
	case "approve":
		err = r.Approve(ctx, stage, "me")
	case "advance":
		err = r.Advance(ctx, stage, "me")
		l.shares = nil
	case "percent":
		err = r.SetPercent(ctx, Everyone, Percent(rapid.IntRange(0, 60).Draw(t, "percent")), "me")
		l.shares = nil
	case "ring":
		err = r.RollbackRing(ctx, "staff", "me")
	}
	if l.broken && !errors.Is(err, ErrNotStored) {
		t.Fatalf("the store is down, and the verb says %v", err)
	}
	if !l.broken && errors.Is(err, ErrNotStored) {
		t.Fatal(err)
	}
}

// check is the invariant after each action.
func (l *life) check() {
	st := l.r.Status()
	if st.Loaded && st.State == Running && l.rolled[st.Version] {
		l.t.Fatalf("%s was rolled back and is %v", st.Version, st.State)
	}
	if st.Generation != 0 && st.Generation <= l.latched && served(l.r) {
		l.t.Fatal("exposed after a rollback")
	}
	if (st.State == RollingBack || st.State == RolledBack || st.State == Stuck || st.State == Pending) && served(l.r) {
		l.t.Fatalf("exposed while %v", st.State)
	}
	if st.State == RolledBack {
		l.rolled[st.Version] = true
	}
	if l.broken && st.Generation == l.gen && l.shares != nil {
		for _, ring := range st.Rings {
			if ring.Percent > l.shares[ring.Name] {
				l.t.Fatalf("the share of %s rose from %v to %v while the store is down", ring.Name, l.shares[ring.Name], ring.Percent)
			}
		}
	}
	l.gen, l.shares = st.Generation, map[string]Percent{}
	for _, ring := range st.Rings {
		l.shares[ring.Name] = ring.Percent
	}
	if st.Generation < l.gen {
		l.t.Fatal("the generation fell")
	}
	if doc, _, err := l.store.Store.Load(context.Background(), l.r.key()); err == nil && doc != nil {
		if _, err := machine.Decode("x", doc); err != nil {
			l.t.Fatalf("what is stored cannot be read: %v", err)
		}
	}
}
