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
