package planner

import (
	"math"
	"testing"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
)

// The tail of the normal distribution goes on where it underflows, without a
// step. Values: Abramowitz and Stegun, table 26.2.
func TestLogPhi(t *testing.T) {
	for _, c := range []struct{ x, minusLog10 float64 }{{-5, 6.54265}, {-10, 23.11805}, {-20, 88.56010}, {-50, 544.96634}} {
		if got := -logPhi(c.x) / math.Ln10; math.Abs(got-c.minusLog10) > 1e-4 {
			t.Errorf("-log10 Φ(%g) is %.5f, not %.5f", c.x, got, c.minusLog10)
		}
	}
	if a, b := logPhi(-10+1e-9), logPhi(-10-1e-9); math.Abs(a-b) > 1e-5 { // of 53
		t.Errorf("a step of %g at -10", a-b)
	}
}

// The law of the first passage has the mean b/μ, and without variance it is a
// step.
func TestPassed(t *testing.T) {
	const mu, v, b = .3, 2., 5.
	mean, dt := 0., .01
	for x := 0.; x < 2000; x += dt {
		mean += dt * (1 - passed(mu*(x+dt/2), v*(x+dt/2), b))
	}
	if math.Abs(mean-b/mu) > .01*b/mu {
		t.Errorf("the mean is %g, not %g", mean, b/mu)
	}
	if passed(4.9, 0, 5) != 0 || passed(5, 0, 5) != 1 || passed(-1, 1e9, 5) > 1 {
		t.Error("without variance, or with much")
	}
	if got := passed(-10, 1, 1000); got != 0 || math.IsNaN(got) {
		t.Errorf("what goes down gets up with %g", got)
	}
}

func TestLaws(t *testing.T) {
	sums := func(name string, p []float64, cells int) {
		sum := 0.
		for _, x := range p {
			sum += x
			if !(x >= 0) {
				t.Errorf("%s: a cell has %g", name, x)
			}
		}
		if len(p) != cells || math.Abs(sum-1) > 1e-9 {
			t.Errorf("%s: %d cells sum to %g", name, len(p), sum)
		}
	}
	sums("lognormal", Lognormal(2e7, .5), evidence.Cells)
	sums("a point", Lognormal(2e7, 0), evidence.Cells)
	sums("beyond the cells", Lognormal(1<<50, 3), evidence.Cells)
	for _, c := range [][2]float64{{.2, .155}, {.5, .3}, {.02, .1}, {.5, .49999}, {.3, 0}, {0, 0}, {1, 0}, {.9, 5}} {
		p := Score(c[0], c[1])
		sums("score", p, judge.ScoreCells)
		mean, square := 0., 0.
		for b, x := range p {
			v := float64(b) / (judge.ScoreCells - 1)
			mean += x * v
			square += x * v * v
		}
		if math.Abs(mean-c[0]) > 2e-3 {
			t.Errorf("the mean of a score of %v is %g", c, mean)
		}
		if sd := math.Sqrt(square - mean*mean); c[1] > .1 && c[1] < .4 && math.Abs(sd-c[1]) > .01 {
			t.Errorf("the standard deviation of a score of %v is %g", c, sd)
		}
	}
}

// Every kind of gate has its tests, and a law of another metric is refused.
func TestEveryKind(t *testing.T) {
	score, mix := Law{Score(.3, .2), Score(.2, .2)}, Law{[]float64{.2, .3, .5}, []float64{.5, .3, .2}}
	slow := Law{Lognormal(4e7, .5), Lognormal(2e7, .5)}
	rate := Law{Rate(.05), Rate(.01)}
	for _, c := range []struct {
		spec          judge.Spec
		law           Law
		breaks, prove bool
	}{
		{judge.Spec{Kind: judge.Within, Margin: .01}, rate, true, true},
		{judge.Spec{Kind: judge.WithinFactor, Factor: 2}, rate, true, true},
		{judge.Spec{Kind: judge.AtMost, Margin: .02}, rate, true, true},
		{judge.Spec{Kind: judge.Never}, rate, false, false},
		{judge.Spec{Kind: judge.NoWorse}, rate, true, false},
		{judge.Spec{Kind: judge.QuantileWithinFactor, Quantile: .9, Factor: 1.2}, slow, true, true},
		{judge.Spec{Kind: judge.QuantileAtMost, Quantile: .9, Limit: 5e7}, slow, true, true},
		{judge.Spec{Kind: judge.TimingNoWorse}, slow, true, false},
		{judge.Spec{Kind: judge.ScoreWithin, Margin: .03}, score, true, true},
		{judge.Spec{Kind: judge.ScoreAtLeast, Margin: .25}, score, true, true},
		{judge.Spec{Kind: judge.ScoreNoWorse}, score, true, false},
		{judge.Spec{Kind: judge.MixWithin, Margin: .1}, mix, true, true},
		{judge.Spec{Kind: judge.MixNoChange}, mix, true, false},
	} {
		r, err := Rollback(c.spec, c.law)
		if err != nil {
			t.Fatal(err)
		}
		p, err := Proof(c.spec, Law{c.law.Control, c.law.Control})
		if err != nil {
			t.Fatal(err)
		}
		if r.Empty() == c.breaks || p.Empty() == c.prove {
			t.Errorf("kind %d: breaks %v, proves %v", c.spec.Kind, !r.Empty(), !p.Empty())
		}
		for _, side := range []Test{r, p} {
			if side.Empty() {
				continue
			}
			run := side.Run(alone(100, 100), Bar{Alpha: .01, Weight: 1})
			if took := run.Time(.5); !(took > 0) || took > 1e4 || run.Time(.9) < took {
				t.Errorf("kind %d takes %g s, %g in nine of ten", c.spec.Kind, took, run.Time(.9))
			}
			last := 0.
			for s := 1.; s < 1e4; s *= 1.3 {
				p := run.By(s)
				if p < last-.02 || p < 0 || p > 1 {
					t.Errorf("kind %d: after %g s %g, before %g", c.spec.Kind, s, p, last)
				}
				last = p
			}
		}
		if _, err := Rollback(c.spec, Law{[]float64{1}, []float64{1}}); err == nil {
			t.Errorf("kind %d takes any law", c.spec.Kind)
		}
	}
	if _, err := Rollback(judge.Spec{Kind: judge.Check}, rate); err == nil {
		t.Error("a Check has a law")
	}
}

// What is never better than the claim is never proven, and no worse candidate is
// never found.
func TestNever(t *testing.T) {
	equal := Law{Rate(.02), Rate(.02)}
	spec := judge.Spec{Kind: judge.AtMost, Margin: .02}
	proof, _ := Proof(spec, equal)
	broken, _ := Rollback(judge.Spec{Kind: judge.NoWorse}, equal)
	if at := proof.Run(alone(100, 100), Bar{Alpha: .05, Weight: 1}).Time(.5); !math.IsInf(at, 1) {
		t.Errorf("proven after %g", at)
	}
	if at := broken.Run(alone(100, 100), Bar{Alpha: .01, Weight: 1}).Time(.5); !math.IsInf(at, 1) {
		t.Errorf("broken after %g", at)
	}
	// Nothing to compare with.
	within, _ := Proof(judge.Spec{Kind: judge.Within, Margin: .01}, equal)
	path := []Phase{{Look: 1, Streams: []Stream{{Candidate: 100}}}}
	if at := within.Run(path, Bar{Alpha: .05, Weight: 1}).Time(.5); !math.IsInf(at, 1) {
		t.Errorf("without control, proven after %g", at)
	}
}

// A path of two phases alike is the path of one.
func TestPhasesAddUp(t *testing.T) {
	test, err := Rollback(judge.Spec{Kind: judge.Within, Margin: .005}, rates(3, 1))
	if err != nil {
		t.Fatal(err)
	}
	one := alone(50, 950)
	two := []Phase{one[0], one[0]}
	two[0].Seconds = 7
	bar := Bar{Alpha: .01, Weight: .25, Temper: 1.26, Out: true}
	if a, b := test.Run(one, bar).Time(.8), test.Run(two, bar).Time(.8); a != b {
		t.Errorf("%g in one phase, %g in two", a, b)
	}
	if a, b := Samples(one, 20), Samples(two, 20); a != b || a != 1000 {
		t.Errorf("%g and %g samples", a, b)
	}
}
