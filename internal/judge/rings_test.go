package judge

import (
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/evalue"
	"github.com/stagedrollout/rollout/internal/evidence"
)

var three = []string{"staff", "beta", "everyone"}

// A ring that leaves takes everything with it: what is left is what it would be
// had the ring never had an outcome.
func TestLeave(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		risk := risk
		risk.Independent = rapid.Bool().Draw(t, "independent")
		j, err := New(every(RollbackRing), risk, three...)
		if err != nil {
			t.Fatal(err)
		}
		var all, without State
		for range rapid.IntRange(1, 20).Draw(t, "blocks") {
			b := anyBlock().Draw(t, "block")
			times := rapid.IntRange(1, 3).Draw(t, "times")
			for range times {
				j.Consume(&all, b, nil, false)
				if b.Ring != "beta" {
					j.Consume(&without, b, nil, false)
				}
			}
		}
		j.Leave(&all, "beta")
		for name, g := range all.Gates {
			want := without.Gates[name]
			if want == nil {
				want = &Gate{}
			}
			same := func(a, b []evalue.Bank) bool {
				return len(a) == 0 && len(b) == 0 || reflect.DeepEqual(a, b)
			}
			if !same(g.Pool, want.Pool) {
				t.Fatalf("%s: the pool is\n%+v\nnot\n%+v", name, g.Pool, want.Pool)
			}
			if len(g.Parts) != len(want.Parts) {
				t.Fatalf("%s: %d parts, want %d", name, len(g.Parts), len(want.Parts))
			}
			for ring, p := range g.Parts {
				if w := want.Parts[ring]; !same(p.Own, w.Own) || p.Candidate != w.Candidate || p.Bounds != w.Bounds {
					t.Fatalf("%s in %s: %+v, want %+v", name, ring, p, w)
				}
			}
		}
		for metric, rings := range all.Memory {
			if rings["beta"] != nil {
				t.Fatalf("%s still remembers beta", metric)
			}
		}
	})
}

// eachItsOwn gives a rate's block n candidate outcomes with x events and m control
// outcomes with y, each outcome of a unit of its own.
func eachItsOwn(ring string, n, x, m, y int, r *rand.Rand) Block {
	b := Block{Metric: "errors", Ring: ring, Candidate: []uint64{uint64(n - x), uint64(x)}, Control: []uint64{uint64(m - y), uint64(y)}}
	b.CandidateBy, b.ControlBy = make([]uint64, 2*evidence.Groups), make([]uint64, 2*evidence.Groups)
	for i := range n {
		b.CandidateBy[2*r.IntN(evidence.Groups)+bit(i < x)]++
	}
	for i := range m {
		b.ControlBy[2*r.IntN(evidence.Groups)+bit(i < y)]++
	}
	return b
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

func draw(n int, p float64, r *rand.Rand) (x int) {
	for range n {
		x += bit(r.Float64() < p)
	}
	return x
}

// A regression in one ring is laid at its door, one in all of them at none's.
func TestFault(t *testing.T) {
	spec := Spec{Name: "errors", Metric: "errors", Kind: NoWorse, Action: RollbackRing}
	risk := Risk{FalseRollback: .01, FalsePromotion: .05}
	for _, c := range []struct {
		bad  []string
		want string
	}{{[]string{"beta"}, "beta"}, {[]string{"staff"}, "staff"}, {[]string{"everyone"}, "everyone"}, {three, ""}} {
		right, found := 0, 0
		for seed := range uint64(40) {
			r := rand.New(rand.NewPCG(seed, 1))
			j, err := New([]Spec{spec}, risk, three...)
			if err != nil {
				t.Fatal(err)
			}
			var st State
			for tick := 0; tick < 600 && !st.known(&j.gates[0]).Broken; tick++ {
				for _, ring := range three {
					p := .01
					for _, bad := range c.bad {
						if ring == bad {
							p = .06
						}
					}
					j.Consume(&st, eachItsOwn(ring, 30, draw(30, p, r), 60, draw(60, .01, r), r), nil, false)
				}
				j.Look(&st)
			}
			if s := st.known(&j.gates[0]); s.Broken {
				found++
				if right += bit(s.Ring == c.want); s.Ring == "" {
					continue
				}
				j.Leave(&st, s.Ring)
				if j.Look(&st); st.known(&j.gates[0]).Broken {
					t.Errorf("seed %d: broken without the ring at fault", seed)
				}
			}
		}
		if found < 40 || right < 36 {
			t.Errorf("bad in %v: %d of 40 found, %d laid at %s's door", c.bad, found, right, c.want)
		}
	}
}

// One user who fails again and again breaks nothing; the same failures of many do.
func TestLooper(t *testing.T) {
	spec := Spec{Name: "errors", Metric: "errors", Kind: NoWorse, Action: Rollback}
	for _, alone := range []bool{true, false} {
		j, err := New([]Spec{spec}, Risk{FalseRollback: .01, FalsePromotion: .05})
		if err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(1, 2))
		var st State
		for range 300 {
			b := eachItsOwn("everyone", 100, 1, 100, 1, r)
			for range 5 {
				g := 17
				if !alone {
					g = r.IntN(evidence.Groups)
				}
				b.Candidate[1]++
				b.CandidateBy[2*g+1]++
			}
			j.Consume(&st, b, nil, false)
			j.Look(&st)
		}
		if got := st.Gates["errors"].Broken; got == alone {
			t.Errorf("one unit alone: %t, broken: %t", alone, got)
		}
	}
}

// The state of three rings and five gates stays small, and a tick is fast.
func tick(tb testing.TB) (*Judge, []Block) {
	specs := []Spec{
		{Name: "within", Metric: "errors", Kind: Within, Margin: .01, Action: Rollback},
		{Name: "noworse", Metric: "errors", Kind: NoWorse, Action: Report},
		{Name: "p99", Metric: "latency", Kind: QuantileWithinFactor, Quantile: .99, Factor: 1.2, Action: Rollback},
		{Name: "quality", Metric: "quality", Kind: ScoreWithin, Margin: .05, Hi: 1, Action: Rollback},
		{Name: "silence", Metric: "no outcome", Kind: Silence, Action: Rollback},
	}
	j, err := New(specs, Risk{FalseRollback: .01, FalsePromotion: .05}, three...)
	if err != nil {
		tb.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	var blocks []Block
	for _, ring := range three {
		b := eachItsOwn(ring, 50, 1, 950, 9, r)
		blocks = append(blocks, b)
		b.Metric = "no outcome"
		blocks = append(blocks, b)
		l := latency(50, 20*time.Millisecond, 950, 20*time.Millisecond)
		l.Ring = ring
		l.CandidateBy, l.ControlBy = make([]uint64, evidence.Groups*MarkCells(1)), make([]uint64, evidence.Groups*MarkCells(1))
		for i := range 50 {
			l.CandidateBy[3*r.IntN(evidence.Groups)+bit(i == 0)]++
		}
		for i := range 950 {
			l.ControlBy[3*r.IntN(evidence.Groups)+bit(i < 9)]++
		}
		s := Block{Metric: "quality", Ring: ring, Candidate: make([]uint64, ScoreCells), Control: make([]uint64, ScoreCells)}
		s.CandidateBy, s.ControlBy = make([]uint64, folds*ScoreCells), make([]uint64, folds*ScoreCells)
		for i := range 200 {
			cell := 4 + r.IntN(12)
			if i < 20 {
				s.Candidate[cell]++
				s.CandidateBy[r.IntN(folds)*ScoreCells+cell]++
			} else {
				s.Control[cell]++
				s.ControlBy[r.IntN(folds)*ScoreCells+cell]++
			}
		}
		blocks = append(blocks, l, s)
	}
	return j, blocks
}

// BenchmarkTick is one tick of three rings and five gates, each a block, with the
// units corrected for and the verdicts assessed: at most 1 ms.
func BenchmarkTick(b *testing.B) {
	j, blocks := tick(b)
	var st State
	for b.Loop() {
		for _, block := range blocks {
			j.Consume(&st, block, nil, true)
		}
		j.Look(&st)
		j.Assess(&st, nil)
	}
}

func TestStateIsSmall(t *testing.T) {
	j, blocks := tick(t)
	var st State
	for range 1000 {
		for _, block := range blocks {
			j.Consume(&st, block, nil, true)
		}
	}
	if n := len(text(t, &st)); n > 128<<10 {
		t.Errorf("the state of three rings and five gates is %d bytes", n)
	} else {
		t.Logf("%d bytes", n)
	}
}

// What must never happen is laid at the door of the ring it happened in, seen in a
// block or before, and of nobody's where it happened in two.
func TestNeverByRing(t *testing.T) {
	every := func(int) bool { return true }
	j, err := New([]Spec{{Name: "never", Metric: "errors", Kind: Never, Action: RollbackRing}}, risk, three...)
	if err != nil {
		t.Fatal(err)
	}
	in := func(ring string, x, known uint64) Block {
		b := rate(10, x, 10, 0)
		b.Ring, b.Known = ring, known
		return b
	}
	var st State
	j.Consume(&st, in("beta", 1, 0), nil, false)
	if r := result(t, j, &st, "never"); r.Verdict != Unhealthy || r.Ring != "beta" {
		t.Errorf("in a block: %+v", r)
	}
	j.Leave(&st, "beta")
	j.Breach(&st, "errors", "staff", 2, every)
	if r := result(t, j, &st, "never"); r.Verdict != Unhealthy || r.Ring != "staff" {
		t.Errorf("before a block: %+v", r)
	}
	st.Anew()
	j.Consume(&st, in("staff", 2, 2), nil, false)
	if r := result(t, j, &st, "never"); r.Verdict != Inconclusive {
		t.Errorf("what was acted on is news again: %+v", r)
	}
	j.Consume(&st, in("everyone", 3, 2), nil, false)
	if r := result(t, j, &st, "never"); r.Verdict != Unhealthy || r.Ring != "everyone" {
		t.Errorf("a third is no news: %+v", r)
	}
	j.Breach(&st, "errors", "staff", 1, every)
	if r := result(t, j, &st, "never"); r.Ring != "" {
		t.Errorf("in two rings, and laid at %q", r.Ring)
	}
}

// A fixed threshold is looked at although its neighbour has none, because there is
// no control to draw one from.
func TestFixedThresholdNeedsNoControl(t *testing.T) {
	j := must(t, Spec{Name: "relative", Metric: "latency", Kind: QuantileWithinFactor, Quantile: .99, Factor: 1.2, Action: Rollback},
		Spec{Name: "absolute", Metric: "latency", Kind: QuantileAtMost, Quantile: .99, Limit: time.Second, Action: Rollback})
	b := latency(50, 10*time.Second, 0, 0)
	b.CandidateBy, b.ControlBy = make([]uint64, evidence.Groups*MarkCells(2)), make([]uint64, evidence.Groups*MarkCells(2))
	for i := range 50 {
		b.CandidateBy[i*MarkCells(2)+MarkCells(2)-1]++ // there are no thresholds
	}
	var st State
	repeat(j, &st, 3, b, false)
	if r := result(t, j, &st, "absolute"); r.Verdict != Unhealthy || r.Candidate.Rate != 1 {
		t.Errorf("%+v", r)
	}
}

// How much outcomes go together is not forgotten when the rollback side starts
// anew: the proof would stand at once.
func TestAnewDoesNotProve(t *testing.T) {
	j, err := New([]Spec{{Name: "errors", Metric: "errors", Kind: Within, Margin: .02, Action: Hold}}, Risk{FalseRollback: .01, FalsePromotion: .05})
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	var st State
	for range 200 {
		b := eachItsOwn("everyone", 50, 0, 50, 0, r)
		for arm, by := range [][]uint64{b.CandidateBy, b.ControlBy} { // two users of either cohort fail often
			by[2*(3+arm*20)+1] += 2
		}
		b.Candidate[1], b.Control[1] = 2, 2
		j.Consume(&st, b, nil, true)
	}
	before := result(t, j, &st, "errors")
	st.Anew()
	if after := result(t, j, &st, "errors"); after.ProofE != before.ProofE || before.ProofE <= 1 {
		t.Errorf("the proof went from %g to %g", before.ProofE, after.ProofE)
	}
}

// A state whose processes are of another shape is started afresh, not tripped over.
func TestOtherShapes(t *testing.T) {
	j, err := New(every(Rollback), Risk{FalseRollback: .01, FalsePromotion: .05}, three...)
	if err != nil {
		t.Fatal(err)
	}
	var st State
	for range 3 {
		for _, ring := range three {
			b := rate(50, 1, 50, 1)
			b.Ring = ring
			j.Consume(&st, b, nil, true)
		}
	}
	for _, g := range st.Gates {
		for _, p := range g.Parts {
			p.Own, p.But = p.Own[:min(1, len(p.Own))], append(p.But, evalue.Bank{LogE: []float64{1}})
		}
		g.Pool, g.Proof = g.Pool[:0], append(g.Proof, evalue.Bank{})
	}
	for _, ring := range three {
		b := rate(50, 1, 50, 1)
		b.Ring = ring
		j.Consume(&st, b, nil, true)
	}
	j.Look(&st)
	j.Assess(&st, nil)
	j.Leave(&st, "beta")
	j.Leave(&st, "staff")
	j.Look(&st)
}

// An incident of both cohorts holds, however large the blocks; a bad candidate
// beside a control that is well below the limit is rolled back.
func TestExcuse(t *testing.T) {
	for _, c := range []struct {
		n, m               int
		candidate, control float64
		held               bool
	}{{10, 190, .2, .2, true}, {50, 950, .2, .2, true}, {500, 500, .2, .2, true}, {10, 20, .25, .25, true}, {10, 30, .25, .04, false}, {10, 20, .3, .06, false}, {500, 500, .2, .05, false}} {
		held, found := 0, 0
		for seed := range uint64(100) {
			r := rand.New(rand.NewPCG(seed, 3))
			j, err := New([]Spec{{Name: "most", Metric: "errors", Kind: AtMost, Margin: .1, Action: Rollback}}, Risk{FalseRollback: .01, FalsePromotion: .05})
			if err != nil {
				t.Fatal(err)
			}
			var st State
			for tick := range 400 {
				p, q := .01, .01
				if tick >= 60 {
					p, q = c.candidate, c.control
				}
				j.Consume(&st, eachItsOwn("everyone", c.n, draw(c.n, p, r), c.m, draw(c.m, q, r), r), nil, false)
				if j.Look(&st); st.Gates["most"].Broken {
					found++
					held += bit(st.Gates["most"].Action == Hold)
					break
				}
			}
		}
		if found < 95 || c.held && held < found*95/100 || !c.held && held > 5 {
			t.Errorf("%+v: of %d that broke %d hold", c, found, held)
		}
	}
}
