package rollout

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

var (
	quality = NewScore("quality", -1, 3)
	route   = NewMix("route", "search", "answer", "refuse")
)

// everyKind is a policy that records a metric of each kind. Its gates are those that the judge has long known.
func everyKind() Policy {
	p := threeStages()
	p.Gates = append(p.Gates, Latency.Quantile(0.99).WithinFactor(1.2), Latency.Quantile(0.5).AtMost(time.Second))
	p.Metrics = []Metric{quality, route, NewRate("cached"), NewTiming("queue")}
	return p
}

// A metric is its name, kind and parameters.
func TestMetricIdentity(t *testing.T) {
	for _, c := range []struct {
		a, b Metric
		same bool
	}{
		{NewScore("q", 0, 1), NewScore("q", 0, 1), true},
		{NewScore("q", 0, 1), NewScore("q", 0, 2), false},
		{NewScore("q", 0, 1), NewScore("q", -1, 1), false},
		{NewScore("q", 0, 1), NewScore("p", 0, 1), false},
		{NewMix("m", "a", "b"), NewMix("m", "a", "b"), true},
		{NewMix("m", "a", "b"), NewMix("m", "a", "b", "other"), true},
		{NewMix("m", "a", "b"), NewMix("m", "other", "a", "b"), false},
		{NewMix("m", "a", "b"), NewMix("m", "b", "a"), false},
		{NewMix("m", "a", "bc"), NewMix("m", "ab", "c"), false},
		{NewMix("m", "a1:b", "c"), NewMix("m", "a", "b1:c"), false},
		{NewMix("m", "a,b", "c"), NewMix("m", "a", "b,c"), false},
		{NewMix("q"), NewRate("q"), false},
	} {
		if same := c.a.ref() == c.b.ref(); same != c.same {
			t.Errorf("%v and %v: the same is %v", c.a.ref().Value(), c.b.ref().Value(), same)
		}
	}
}

// Labels survive being joined, whatever they are.
func TestLabels(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		labels := rapid.SliceOf(rapid.String()).Draw(t, "labels")
		want := slices.Clone(labels)
		if !slices.Contains(want, otherLabel) {
			want = append(want, otherLabel)
		}
		if diff := cmp.Diff(want, splitLabels(joinLabels(labels))); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestMixObserve(t *testing.T) {
	for _, c := range []struct {
		m     Mix
		label string
		cell  uint64
	}{
		{route, "search", 0}, {route, "refuse", 2}, {route, "other", 3}, {route, "unheard of", 3}, {route, "", 3},
		{NewMix("m", "other", "a", "b"), "b", 2}, {NewMix("m", "other", "a", "b"), "c", 0},
	} {
		if o := c.m.Observe(c.label); o.value != c.cell {
			t.Errorf("%q is cell %d, not %d", c.label, o.value, c.cell)
		}
	}
	if o := (Mix{}).Observe("a"); o != (Observation{}) {
		t.Error("the zero Mix observes", o)
	}
}

// Rounding by chance keeps the mean and goes to a neighbour; what is on a cell stays there.
func TestScoreCells(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	rapid.Check(t, func(t *rapid.T) {
		lo := rapid.Float64Range(-1e6, 1e6).Draw(t, "lo")
		hi := lo + rapid.Float64Range(1e-3, 1e6).Draw(t, "width")
		x := lo + (hi-lo)*rapid.Float64Range(0, 1).Draw(t, "x")
		v := (hi - min(max(x, lo), hi)) / (hi - lo) * 32
		const n = 20_000
		total := 0
		for range n {
			c := scoreCell(x, lo, hi, rng.Uint32)
			if c < 0 || c > 32 || math.Abs(float64(c)-v) >= 1 {
				t.Fatalf("badness %v of 32 is cell %d", v, c)
			}
			total += c
		}
		// Hoeffding: once in 10^11 draws.
		if mean := float64(total) / n; math.Abs(mean-v) > math.Sqrt(26/(2*float64(n))) {
			t.Fatalf("badness %v of 32 is %v in the mean", v, mean)
		}
	})
	for _, c := range []struct {
		x    float64
		cell int
	}{
		{3, 0}, {-1, 32}, {1, 16}, {2.875, 1}, {4, 0}, {-2, 32}, {math.Inf(1), 0}, {math.Inf(-1), 32}, {math.NaN(), -1}, {math.MaxFloat64, 0},
	} {
		for _, chance := range []uint32{0, 1 << 31, math.MaxUint32} {
			if got := scoreCell(c.x, -1, 3, func() uint32 { return chance }); got != c.cell {
				t.Errorf("%v is cell %d, not %d", c.x, got, c.cell)
			}
		}
	}
	if c := scoreCell(2.9, -1, 3, func() uint32 { return 0 }); c != 1 {
		t.Errorf("a chance of 0 rounds to %d", c)
	}
	if c := scoreCell(2.9, -1, 3, func() uint32 { return math.MaxUint32 }); c != 0 {
		t.Errorf("the greatest chance rounds to %d", c)
	}
}

// A score that is not a number is dropped and counted; the rollout's own chances are used where it has some.
func TestScoreInvalid(t *testing.T) {
	r := startedWith(t, everyKind())
	asked := 0
	r.dither = func() uint32 { asked++; return 0 }
	d := r.Decide(keyOf(t, r, Candidate))
	d.Record(quality.Observe(math.NaN()), quality.Observe(0.3), quality.Observe(3))
	if s := r.Status(); s.Invalid != 1 || s.Unknown != 0 || s.Late != 0 {
		t.Errorf("%+v", s)
	}
	if n := sum(r.outcomes(0, 1, 2)); n != 2 || asked != 1 {
		t.Errorf("%d outcomes, %d chances", n, asked)
	}
}

// Observing and recording allocate nothing; a rationale costs one allocation.
func TestMetricsAlloc(t *testing.T) {
	r := startedWith(t, everyKind())
	candidate, control := r.Decide(keyOf(t, r, Candidate)), r.Decide(keyOf(t, r, Control))
	r.mu.Lock()
	for _, m := range r.ledgers[0].snap.last.marks {
		if m != nil {
			m.follow([][2]int{{100, 110}, {300, 300}})
		}
	}
	r.mu.Unlock()
	why := strings.Repeat("because ", 20)
	for name, c := range map[string]struct {
		most float64
		f    func()
	}{
		"Decide": {0, func() { r.Decide(Unit{Key: "k"}) }},
		"Record of every kind": {0, func() {
			for _, d := range []Decision{candidate, control} {
				d.Record(Errors.Observe(true), Latency.Observe(time.Second), quality.Observe(0.7), route.Observe("refuse"), route.Observe("new"))
			}
		}},
		"Because":           {1, func() { control.Record(quality.Observe(0.7).Because(why)) }},
		"Because, kept too": {1, func() { candidate.Record(quality.Observe(0.7).Because(why)) }},
	} {
		if n := testing.AllocsPerRun(100, c.f); n > c.most {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// Of a metric's rationales the first 8 and 32 others are kept, each of the others with the same chance.
func TestReasonsAreUniform(t *testing.T) {
	const n, runs = 108, 4000
	var hits [n]int
	for range runs {
		var rs reasons
		for i := range n {
			s := string(rune('0' + i))
			rs.keep(&s)
		}
		kept := rs.kept()
		if len(kept) != 40 {
			t.Fatalf("%d are kept", len(kept))
		}
		for _, s := range kept {
			r, _ := utf8.DecodeRuneInString(s)
			hits[r-'0']++
		}
	}
	want, sd := runs*.32, math.Sqrt(runs*.32*.68)
	for i, h := range hits {
		switch {
		case i < 8 && h != runs:
			t.Errorf("the first %d was kept %d times of %d", i, h, runs)
		case i >= 8 && math.Abs(float64(h)-want) > 5*sd:
			t.Errorf("rationale %d was kept %d times, not about %v", i, h, want)
		}
	}
}

// A rationale is valid UTF-8 of at most 1 KiB, and as it was if it is that already.
func TestReasonBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.OneOf(rapid.StringN(0, 3000, -1), rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 3000), func(b []byte) string { return string(b) })).Draw(t, "s")
		got := *bounded(&s)
		if len(got) > maxReason || !utf8.ValidString(got) {
			t.Fatalf("%d bytes, valid: %v", len(got), utf8.ValidString(got))
		}
		if utf8.ValidString(s) && (!strings.HasPrefix(s, got) || len(s) <= maxReason && got != s || len(s) > maxReason && len(got) < maxReason-3) {
			t.Fatalf("%d bytes of %d are left", len(got), len(s))
		}
	})
}

// Rationales are those of the candidate's observations, by metric, and a new generation begins without. Many goroutines
// may give them.
func TestRationales(t *testing.T) {
	r := startedWith(t, everyKind())
	if all := r.rationales(); all != nil {
		t.Error(all)
	}
	candidate, control := r.Decide(keyOf(t, r, Candidate)), r.Decide(keyOf(t, r, Control))
	candidate.Record(quality.Observe(math.NaN()).Because("it does not count"))
	if all := r.rationales(); all != nil {
		t.Errorf("of no number: %q", all)
	}
	var work sync.WaitGroup
	for i := range 4 {
		work.Go(func() {
			for j := range 100 {
				candidate.Record(quality.Observe(1).Because(fmt.Sprint("good ", i, j)), route.Observe("answer"))
				control.Record(route.Observe("refuse").Because("nobody asks"))
			}
		})
	}
	work.Wait()
	candidate.Record(Errors.Observe(true).Because("it broke"), NewRate("unknown").Observe(true).Because("who"))
	all := r.rationales()
	if len(all) != 2 || len(all["quality"]) != 40 || !slices.Equal(all["errors"], []string{"it broke"}) {
		t.Errorf("%q", all)
	}
	setPercent(t, r, Everyone, 60)
	if len(r.rationales()["quality"]) != 40 {
		t.Error("another share forgets them")
	}
	if err := r.Restart(t.Context(), "anew"); err != nil {
		t.Fatal(err)
	}
	if err := r.startForTest(t.Context()); err != nil {
		t.Fatal(err)
	}
	if all := r.rationales(); all != nil {
		t.Errorf("a new generation has %q", all)
	}
}

// Whatever moment the gates look at: where they see that what must never happen has happened, they have its rationale.
func TestRationaleComesFirst(t *testing.T) {
	leaks := NewRate("leaks")
	r := startedWith(t, Policy{Stages: Percentages(50, 100), Gates: []Gate{Errors.AtMost(5), leaks.Never()}})
	d := r.Decide(keyOf(t, r, Candidate))
	r.mu.Lock()
	st := r.known.Clone()
	r.mu.Unlock()
	i := d.at.indexOf(leaks.m)
	tries := 1000
	if raced { // on one processor, where each takes a time slice
		tries = 100
	}
	for n := range tries {
		d.at.life.reasons[i] = reasons{}
		var work sync.WaitGroup
		work.Go(func() { d.Record(leaks.Observe(true).Because("the other customer's name")) })
		for {
			var in machine.Input
			sum := &tally.Sum{}
			sum.Add(r.count(st))
			must(t, machine.Take(st, r.plan, machine.Gathered{Sum: sum, Form: r.formOf, Share: r.shareOf(st), Alarm: true}, &in))
			in.Rationales = r.rationales()
			if len(in.Breaches) == 0 {
				continue
			}
			if len(in.Rationales["leaks"]) == 0 {
				t.Fatalf("the %dth was seen without its rationale", n)
			}
			break
		}
		work.Wait()
	}
}

// The incident of a broken gate holds the rationales of its metric, and no more than fit.
func TestIncidentRationales(t *testing.T) {
	r := startedWith(t, everyKind())
	d := r.Decide(keyOf(t, r, Candidate))
	long := strings.Repeat("x", maxReason-2)
	for i := range 30 {
		d.Record(Errors.Observe(true).Because(fmt.Sprintf("%02d", i)+long), quality.Observe(1).Because("well"))
	}
	r.mu.Lock()
	st := r.known.Clone()
	r.mu.Unlock()
	bad := make([]uint64, 2)
	bad[1] = 1000
	machine.Step(st, r.plan, machine.Input{
		Rationales: r.rationales(), MayAdvance: true,
		Blocks: []machine.Block{{Epoch: st.Epoch, Block: judge.Block{Metric: "errors", Ring: Everyone, Candidate: bad, Control: []uint64{1000, 0}}}},
	})
	if !st.Phase.Latched() || st.Incident == nil || st.Incident.Metric != "errors" {
		t.Fatalf("%v, %+v", st.Phase, st.Incident)
	}
	in := r.incident(st.Clone())
	if len(in.Rationales) != machine.MaxRationales/maxReason || !strings.HasPrefix(in.Rationales[0], "00") {
		t.Errorf("%d rationales, the first %.10q", len(in.Rationales), in.Rationales)
	}
}
