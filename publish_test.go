package rollout

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// losing is a store that loses the next writes of evidence.
type losing struct {
	Store
	left int
}

func (s *losing) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	if s.left > 0 && strings.Contains(key, "/ev/") {
		s.left--
		return 0, false, errDown
	}
	return s.Store.CompareAndSwap(ctx, key, old, value)
}

// manual is a process whose ticks and time a test makes.
func manual(t *testing.T, s Store, replica string, p Policy, now *time.Time) *Rollout {
	t.Helper()
	r, err := New("x", p, &Options{Store: s, Logger: quiet, Interval: 5 * time.Second, Replica: replica})
	if err != nil {
		t.Fatal(err)
	}
	r.now, r.coin, r.barrier = func() time.Time { return *now }, func(int) bool { return true }, 0
	r.running.Store(true)
	r.startClock()
	return r
}

func turn(r *Rollout) { r.tick(context.Background(), &r.clock, false); r.clock.alarm = false }

// TestEvidenceStaysInItsGeneration: what is left of a generation, because its first document was lost, is not published as
// evidence of the next one, which began meanwhile.
func TestEvidenceStaysInItsGeneration(t *testing.T) {
	now := driverStart
	store := &losing{Store: MemStore()}
	old := manual(t, store, "old", simPolicy(0), &now)
	turn(old)
	turn(old)
	for i := range 60 {
		old.Decide(Unit{Key: string(rune('a' + i)), Groups: staffOnly}).Record(Errors.Observe(true))
	}
	store.left = 2
	turn(old) // its document is lost
	next := manual(t, store, "next", simPolicy(1), &now)
	turn(next)
	turn(old) // and once more: nothing is there, and another generation is
	all, err := store.List(t.Context(), "rollout/x/ev/2.")
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range all {
		d, err := tally.Decode(value)
		t.Errorf("%s is evidence of the generation before: %+v, %v", key, d, err)
	}
}

// TestGenerationBeginsAtZero: the time that a process has followed one generation does not count in the next one.
func TestGenerationBeginsAtZero(t *testing.T) {
	now := driverStart
	store := MemStore()
	a := manual(t, store, "a", simPolicy(0), &now)
	turn(a)
	turn(a)
	b := manual(t, store, "b", simPolicy(1), &now)
	if err := b.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	now = now.Add(30 * time.Second)
	turn(b)
	value, _, _ := store.Load(t.Context(), stateKey)
	st, err := machine.Decode("x", value)
	if err != nil || st.Gen != 2 || st.Clock != 0 {
		t.Errorf("generation %d accounts for %v in the moment that it begins: %v", st.Gen, st.Clock, err)
	}
}

// TestSummed: however many documents are added up, and whichever of them cannot be read, the sum is that of the others.
func TestSummed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := &tally.Sum{}
		var docs []*document
		bad := rapid.IntRange(0, 3).Draw(t, "a part that cannot be read, in hundredths")
		rnd := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		var cannot []int
		for i := range rapid.IntRange(0, 3*together).Draw(t, "documents") {
			d := &tally.Doc{About: tally.About{Inc: fmt.Sprint(i)}}
			for epoch := range rnd.Uint64N(3) {
				c := tally.NewCounts(4)
				for k := range 8 {
					c[k/4][k%4] = rnd.Uint64N(100)
				}
				d.Add(tally.Series{Key: tally.Key{Epoch: epoch, Metric: "errors", Cells: 4}, Counts: c, Events: rnd.Uint64N(3)})
			}
			if rnd.IntN(100) < bad {
				d.Series = append(d.Series, tally.Series{Counts: tally.NewCounts(1)}) // not in order, after what can be read
				d.Series = append(d.Series, d.Series...)
				cannot = append(cannot, i)
			} else {
				want.Add(d)
			}
			docs = append(docs, &document{about: d.About, value: d.Encode()})
		}
		got := summed(docs)
		if diff := cmp.Diff(want.Totals, got.Totals, cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
		for i, d := range docs {
			if slices.Contains(cannot, i) != (d.err != nil) {
				t.Fatalf("document %d of %v that cannot be read: %v", i, cannot, d.err)
			}
		}
	})
}

// TestBreachesOfEarlierEpochs: a document that tells at once of what must never happen says also what did in an epoch whose
// counts are no longer kept here.
func TestBreachesOfEarlierEpochs(t *testing.T) {
	bad := NewRate("bad")
	p := threeStages()
	p.Gates = append(p.Gates, bad.Never().OnFail(Hold))
	now := driverStart
	r := manual(t, MemStore(), "one", p, &now)
	turn(r)
	r.Decide(keyOf(t, r, Candidate)).Record(bad.Observe(true))
	now = now.Add(time.Minute)
	turn(r)
	happened := func(d *tally.Doc) (n uint64) {
		for _, s := range d.Series {
			n += s.Events
		}
		return n
	}
	st, acked := r.known, r.pub.acked
	if happened(acked) != 1 || happened(r.breaches(st, acked)) != 1 {
		t.Fatalf("%d events were published, now there are %d", happened(acked), happened(r.breaches(st, acked)))
	}
	r.ledgers = nil
	if got := happened(r.breaches(st, acked)); got != 1 {
		t.Errorf("%d events without their ledger", got)
	}
}
