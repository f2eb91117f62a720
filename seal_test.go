package rollout

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// documentsOf are the documents in a store of which the key has a text: what is sealed, and what is not.
func documentsOf(t *testing.T, s Store, of string) (sealed, open []*tally.Doc) {
	t.Helper()
	all, err := s.List(t.Context(), "rollout/x/ev/")
	must(t, err)
	for key, value := range all {
		if !strings.Contains(key, of) {
			continue
		}
		d, err := tally.Decode(value)
		must(t, err)
		if d.Sealed {
			sealed = append(sealed, d)
		} else {
			open = append(open, d)
		}
	}
	return sealed, open
}

// TestSealedByItself: a process of which the document is full goes on as another incarnation. Every outcome is judged once;
// there is always a document that speaks for it; its open sessions go on, and are lost once if it dies then.
func TestSealedByItself(t *testing.T) {
	for name, dies := range map[string]bool{"goes on": false, "dies": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &faulty{Store: MemStore()}
				p := talks(SessionPolicy{})
				p.Gates = []Gate{Errors.Within(1), Errors.AtMost(50).OnFail(Report)}
				a := start(t, "x", p, Options{Store: store, Replica: "first"})
				b := start(t, "x", p, Options{Store: store.Store, Replica: "second"})
				count := b.count(WorkLost)
				a.fullBytes = 200
				var open []*Session
				for range 3 {
					_, s := a.Begin(t.Context(), a.of(Candidate))
					open = append(open, s)
				}
				time.Sleep(7 * time.Second)
				incs := map[string]bool{}
				for range 40 { // the groups of units fill
					a.serve(5*time.Second, 0, 0)
					synctest.Wait()
					_, now := documentsOf(t, store.Store, "first")
					if len(now) != 1 {
						t.Fatalf("%d documents speak for the process", len(now))
					}
					incs[now[0].Inc] = true
					candidates := uint64(0)
					for _, o := range now[0].Open {
						n, _ := o.Count()
						candidates += n
					}
					if candidates != 3 {
						t.Fatalf("%d sessions of the candidate are said to be open", candidates)
					}
				}
				if len(incs) < 2 || len(a.seals) != len(incs)-1 {
					t.Fatalf("%d incarnations, and %d documents that were sealed", len(incs), len(a.seals))
				}
				time.Sleep(12 * time.Second) // all is published
				if dies {
					store.set(down, down, nil)
				} else {
					for _, s := range open {
						s.End(nil)
					}
				}
				time.Sleep(5 * time.Minute)
				b.serve(time.Minute, 0, 0)
				time.Sleep(time.Minute) // the last blocks close
				synctest.Wait()
				if want := map[bool]int32{true: 1}[dies]; int32(count.Load()) != want {
					t.Errorf("%d processes with work were found dead, want %d", count.Load(), want)
				}
				counted := [2]uint64{}
				for c, n := range outcomesOf(a.Rollout, "everyone") {
					counted[c] = n[0] + n[1]
				}
				for c, n := range outcomesOf(b.Rollout, "everyone") {
					counted[c] += n[0] + n[1]
				}
				if dies {
					counted[1] += 3
				}
				st := inStore(t, store.Store)
				res := b.plan.Judge.Assess(&st.Gates, nil)[1]
				if res.Candidate.N != counted[1] || res.Control.N != counted[0] {
					t.Errorf("of %v outcomes, %d of the control and %d of the candidate were judged", counted, res.Control.N, res.Candidate.N)
				}
				if sealed, _ := documentsOf(t, store.Store, "first"); len(sealed) > 0 {
					t.Errorf("%d sealed documents are left", len(sealed))
				}
				store.set(nil, nil, nil)
			})
		})
	}
}

// TestSealsAreFew: however long documents are, each that is sealed is a line in the state; the more processes there are, the
// fewer. Nothing is sealed while a rollback goes on, or where nothing was published.
func TestSealsAreFew(t *testing.T) {
	for live, want := range map[int]int{1: 8, 1000: 8, 2000: 4, 10_000: 1} {
		now := driverStart
		r := manual(t, MemStore(), "a", simPolicy(0), &now)
		r.fullBytes = 0
		st := &machine.State{Live: live}
		d := &tally.Doc{Series: []tally.Series{{Key: tally.Key{Ring: "staff", Metric: "errors", Cells: 2}, Counts: tally.NewCounts(2)}}}
		if r.full(st, d) {
			t.Error("nothing was published")
		}
		r.pub.acked = d
		for range 2 {
			n := 0
			for range sealsTicks - 1 {
				if r.full(st, d) {
					r.seals = append(r.seals, now)
					n++
				}
				now = now.Add(5 * time.Second)
			}
			if n != want {
				t.Errorf("of %d processes, each seals %d documents in %d ticks, want %d", live, n, sealsTicks, want)
			}
			now = now.Add(5 * time.Second * sealsTicks)
		}
		st.Phase = machine.RollingBack
		if r.full(st, d) {
			t.Error("full in a rollback")
		}
	}
}

// TestSealsNoBreach: an event that must never happen is acted on once, also where the document that told of it before its
// outcome was there is full.
func TestSealsNoBreach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := NewRate("bad")
		p := threeStages()
		p.Bake = time.Hour
		p.Gates = append(p.Gates, bad.Never().OnFail(StepBack))
		r := start(t, "x", p, Options{Store: MemStore()})
		back := r.count(SteppedBack)
		r.serve(12*time.Second, 0, 0)
		must(t, r.Advance(t.Context(), "everyone 10 %", "on"))
		r.serve(12*time.Second, 0, 0)
		r.fullBytes = 1
		r.happens(bad)
		r.serve(5*time.Minute, 0, 0)
		r.is(Running, "everyone 10 %")
		if back.Load() != 1 || len(r.seals) == 0 {
			t.Errorf("stepped back %d times, %d documents were sealed", back.Load(), len(r.seals))
		}
	})
}

// TestSealsNoFork: a process that has judged by itself publishes what it judged by before anything else: the fork ends where
// that is judged.
func TestSealsNoFork(t *testing.T) {
	now := driverStart
	store := MemStore()
	away := &faulty{Store: store}
	p := threeStages()
	p.Independent, p.ProveFrom, p.Bake = true, 100, 10*time.Hour
	p.Gates, p.Stages = []Gate{Errors.Within(5)}, Percentages(10, 30, 60, 100)
	a, b, c := manual(t, away, "a", p, &now), manual(t, store, "b", p, &now), manual(t, store, "c", p, &now)
	s := &shift{now: &now}
	for range 4 {
		s.tick(400, a, b, c)
	}
	a.coin = func(int) bool { return false }
	away.set(down, down, nil)
	for served(a) {
		s.serve(a, 40, 9)
		now = now.Add(5 * time.Second)
		turn(a)
	}
	s.serve(a, 400, 9)
	away.set(nil, nil, nil)
	a.fullBytes = 50
	now = now.Add(5 * time.Second)
	turn(a)
	if !a.fork.open || a.fork.inc != a.pub.inc || len(a.seals) > 0 || len(a.pub.acked.Series) == 0 {
		t.Errorf("of a fork %+v the evidence is in a document of %s, of %d series; %d were sealed", a.fork, a.pub.inc, len(a.pub.acked.Series), len(a.seals))
	}
}

// TestSealsNoRevenant: a document that was folded, and made once more because its maker had not heard of it, is not sealed:
// the maker must find out that its sessions have counted as failed.
func TestSealsNoRevenant(t *testing.T) {
	now := driverStart
	store := MemStore()
	away := &faulty{Store: store}
	p := talks(SessionPolicy{})
	p.Rings = nil
	a, b := manual(t, away, "a", p, &now), manual(t, store, "b", p, &now)
	s := &shift{now: &now}
	for range 3 {
		now = now.Add(5 * time.Second)
		turn(b)
	}
	turn(a)
	_, session := a.Begin(t.Context(), (&process{Rollout: a, t: t}).of(Candidate))
	s.serve(a, 40, 0)
	away.set(nil, nil, func() error { away.set(down, down, nil); return errDown }) // it lands, without an answer
	for range 61 {
		now = now.Add(5 * time.Second)
		turn(a)
		s.serve(b, 10, 0)
		turn(b)
		s.serve(a, 10, 0)
	}
	if len(inStore(t, store).Retired) != 1 {
		t.Fatal("it was not folded")
	}
	away.set(nil, nil, nil)
	a.fullBytes = 50
	for range 4 {
		now = now.Add(5 * time.Second)
		turn(a)
		turn(b)
	}
	if !session.lost.Load() {
		t.Error("a session that was counted as failed will count again")
	}
}

// TestFoldsFew: however many documents are sealed at once, a few of them are folded in one evaluation, and all are counted.
func TestFoldsFew(t *testing.T) {
	r, st, _ := merging(t, 3*clearings, false)
	h := r.store.(*heap)
	var all uint64
	for key, value := range h.all {
		d, err := tally.Decode(value)
		must(t, err)
		d.Sealed = true
		h.all[key] = d.Encode()
		for i := range d.Series {
			all += d.Series[i].Counts.Sum(1)
		}
	}
	next := st.Clone()
	in := r.input(r.now())
	_, err := r.gather(t.Context(), next, &in, false, false)
	must(t, err)
	if len(in.Dead) != clearings {
		t.Errorf("%d documents are folded, want %d", len(in.Dead), clearings)
	}
	seen := uint64(0)
	for _, taken := range next.Consumed {
		seen += taken.Seen
	}
	if seen != all || all == 0 {
		t.Errorf("%d of %d outcomes are counted", seen, all)
	}
}
