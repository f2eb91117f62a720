package main

import (
	"fmt"
	"math"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
)

const (
	alpha  = .01
	alphaP = .05
	hours2 = 1440 // ticks
)

var (
	shares = []float64{.01, .05, .25, .5}
	raw    = judge.Risk{FalseRollback: alpha, FalsePromotion: alphaP, Independent: true}
	safe   = judge.Risk{FalseRollback: alpha, FalsePromotion: alphaP}
	nine   = math.Exp2(9. / evidence.Steps) // a factor of exactly nine cells, 1.195
)

func within(points float64) judge.Spec { return judge.Spec{Kind: judge.Within, Margin: points / 100} }
func slower(q, f float64) judge.Spec {
	return judge.Spec{Kind: judge.QuantileWithinFactor, Quantile: q, Factor: f}
}
func score(kind judge.Kind, margin float64) judge.Spec {
	return judge.Spec{Kind: kind, Margin: margin, Hi: 1}
}
func mix(kind judge.Kind, margin float64) judge.Spec {
	return judge.Spec{Kind: kind, Margin: margin, Labels: []string{"a", "b", "c", "d", "e", "other"}}
}

var (
	noWorse = judge.Spec{Kind: judge.NoWorse}
	timing  = judge.Spec{Kind: judge.TimingNoWorse}
)

// alone is one gate on one metric.
func alone(s judge.Spec, m maker, ticks int) release {
	return release{specs: []judge.Spec{s}, make: []maker{m}, ticks: ticks}
}

// both runs a release for units that come once without and with the correction for clusters.
func (c *config) both(rel release, runs int) (plain, corrected summary) {
	rel.risk = raw
	plain = summarize(simulate(rel, runs, c.seed))
	rel.risk = safe
	return plain, summarize(simulate(rel, runs, c.seed))
}

func percent(x float64) string { return fmt.Sprintf("%g %%", math.Round(100*x*1000)/1000) }
func rate(s summary) string    { return fmt.Sprintf("%.4f", s.rate) }
func delay(s summary) string {
	if math.IsInf(s.median, 1) {
		return "never"
	}
	if math.IsInf(s.p90, 1) {
		return fmt.Sprintf("%.0f / never", s.median)
	}
	return fmt.Sprintf("%.0f / %.0f", s.median, s.p90)
}

// falseRollback: a candidate on the boundary of its gate is rolled back no more often than α, looked at every tick.
func falseRollback(c *config) table {
	t := table{
		title: "False rollbacks, α = 0.01, a look every tick for 2 h",
		head:  []string{"gate", "release", "share", "units come once, uncorrected", "corrected for clusters"},
	}
	ticks, runs := c.ticks(hours2), c.runs
	for _, share := range shares {
		for _, k := range []struct {
			name, what string
			spec       judge.Spec
			make       maker
		}{
			{"NoWorse", "0.1 % both", noWorse, rates(.001, .001, share, 1000)},
			{"NoWorse", "1 % both", noWorse, rates(.01, .01, share, 1000)},
			{"Within(0.5)", "1 % both", within(.5), rates(.01, .01, share, 1000)},
			{"Within(0.5)", "1 → 1.5 %", within(.5), rates(.015, .01, share, 1000)},
			{"Within(0.5)", "0.1 → 0.6 %", within(.5), rates(.006, .001, share, 1000)},
			{"WithinFactor(1.5)", "1 → 1.5 %", judge.Spec{Kind: judge.WithinFactor, Factor: 1.5}, rates(.015, .01, share, 1000)},
			{"AtMost(1)", "at 1 %", judge.Spec{Kind: judge.AtMost, Margin: .01}, rates(.01, .01, share, 1000)},
			{"Timing.NoWorse", "equal", timing, latencies(1, share, 200)},
			{"Quantile(0.99).WithinFactor(1.2)", "equal", slower(.99, 1.2), latencies(1, share, 200)},
			{"Quantile(0.99).WithinFactor(1.195)", "× 1.195", slower(.99, nine), latencies(nine, share, 200)},
			{"Score.NoWorse", "0.80 both", score(judge.ScoreNoWorse, 0), scores(.8, .8, share, 100)},
			{"Score.Within(0.04)", "0.80 → 0.76", score(judge.ScoreWithin, .04), scores(.76, .8, share, 100)},
			{"Score.AtLeast(0.8)", "at 0.80", score(judge.ScoreAtLeast, .2), scores(.8, .8, share, 100)},
			{"Mix.NoChange", "equal", mix(judge.MixNoChange, 0), mixes(0, share, 100)},
			{"Mix.Within(0.03)", "distance 0.03", mix(judge.MixWithin, .03), mixes(.03, share, 100)},
		} {
			if c.skip(k.name, share) {
				continue
			}
			plain, corrected := c.both(alone(k.spec, k.make, ticks), runs)
			t.add(worst(plain.rate, corrected.rate) <= most(alpha, runs), k.name, k.what, percent(share), rate(plain), rate(corrected))
		}
	}
	return t
}

// drift: the same while the base rate drifts over a ramp, and under incidents that hit both cohorts.
func drift(c *config) table {
	t := table{
		title: "False rollbacks while the base rate moves, α = 0.01 (NoWorse)",
		head:  []string{"release", "uncorrected", "corrected for clusters"},
	}
	ramp := func(base ...float64) maker {
		var each []maker
		for i, share := range []float64{.01, .05, .25, .5} {
			each = append(each, rates(base[i], base[i], share, 1000))
		}
		return phases(c.ticks(720)/4, each...)
	}
	for _, k := range []struct {
		name  string
		make  maker
		ticks int
	}{
		{"1 → 5 → 25 → 50 % while the base rises from 0.5 to 2 %", ramp(.005, .01, .015, .02), 720},
		{"1 → 5 → 25 → 50 % while it falls from 2 to 0.5 %", ramp(.02, .015, .01, .005), 720},
		{"a base that walks at random, incidents × 20 in both cohorts, six shares, 10 to 1,000 a tick", stress(), 720},
	} {
		plain, corrected := c.both(alone(noWorse, k.make, c.ticks(k.ticks)), c.runs)
		t.add(worst(plain.rate, corrected.rate) <= most(alpha, c.runs), k.name, rate(plain), rate(corrected))
	}
	return t
}

// clustered: users who come back, and one who loops.
func clustered(c *config) table {
	t := table{
		title: "Users who come back (200 requests a tick for 2 h, base 1 %, NoWorse)",
		head:  []string{"users", "correlation", "share", "candidate", "rolled back", "ticks, median", "must be"},
	}
	run := func(p population, runs int) summary {
		rel := alone(noWorse, p.maker(), c.ticks(hours2))
		rel.clustered, rel.risk = true, safe
		return summarize(simulate(rel, runs, c.seed))
	}
	for _, p := range []population{
		{users: 2000, icc: .02, share: .05}, {users: 2000, icc: .02, share: .5},
		{users: 2000, icc: .10, share: .05}, {users: 2000, icc: .10, share: .5},
		{users: 10000, icc: .02, share: .05}, {users: 10000, icc: .02, share: .5},
		{users: 10000, icc: .10, share: .05}, {users: 10000, icc: .10, share: .5},
	} {
		p.factor, p.perTick = 1, 200
		s := run(p, c.runs)
		t.add(s.rate <= most(alpha, c.runs), fmt.Sprint(p.users), fmt.Sprint(p.icc), percent(p.share), "as good", rate(s), "", "≤ 0.01")
	}
	for _, share := range []float64{.05, .5} {
		p := population{users: 10000, icc: .02, factor: 1, looper: .05, share: share, perTick: 200}
		s := run(p, c.runs)
		t.add(s.rate <= most(.03, c.runs), "10000", "0.02", percent(share), "as good, and a looper with 5 % of its traffic", rate(s), "", "≤ 0.03")
	}
	p := population{users: 10000, icc: .02, factor: 4, looper: .05, share: .5, perTick: 200}
	s := run(p, c.runs)
	t.add(s.rate >= .99 && s.ticks <= 15, "10000", "0.02", percent(.5), "4 times the errors, and the looper", rate(s), fmt.Sprintf("%.0f", s.ticks), "≥ 0.99, ≤ 15")
	for _, share := range []float64{.05, .5} {
		p := population{users: 10000, icc: .02, factor: 2, share: share, perTick: 200}
		s := run(p, c.runs)
		t.add(true, "10000", "0.02", percent(share), "twice the errors", rate(s), fmt.Sprintf("%.0f", s.ticks), "")
	}
	return t
}

// detection: how soon a worse candidate is rolled back.
func detection(c *config) table {
	t := table{
		title: "Candidate outcomes until a rollback, one gate alone, median / 9 of 10",
		head:  []string{"gate", "regression", "share", "bound", "uncorrected", "of bound", "must be", "corrected for clusters", "of bound"},
	}
	for _, k := range []struct {
		name, what string
		spec       judge.Spec
		make       maker
		share      float64
		bound      float64
		most       float64 // of the median over the bound, 0: p90 at most
		p90        float64
	}{
		{"NoWorse", "1 → 2 %", noWorse, rates(.02, .01, .01, 1000), .01, bound(alpha, .02, .01, 0, .01), 1.5, 0},
		{"NoWorse", "1 → 2 %", noWorse, rates(.02, .01, .05, 1000), .05, bound(alpha, .02, .01, 0, .05), 1.5, 0},
		{"NoWorse", "1 → 2 %", noWorse, rates(.02, .01, .25, 1000), .25, bound(alpha, .02, .01, 0, .25), 1.5, 0},
		{"NoWorse", "1 → 2 %", noWorse, rates(.02, .01, .5, 1000), .5, bound(alpha, .02, .01, 0, .5), 1.5, 0},
		{"NoWorse", "1 → 1.5 %", noWorse, rates(.015, .01, .05, 1000), .05, bound(alpha, .015, .01, 0, .05), 1.5, 0},
		{"NoWorse", "1 → 1.5 %", noWorse, rates(.015, .01, .5, 1000), .5, bound(alpha, .015, .01, 0, .5), 1.5, 0},
		{"NoWorse", "0.1 → 1 %", noWorse, rates(.01, .001, .01, 1000), .01, bound(alpha, .01, .001, 0, .01), 1.7, 0},
		{"NoWorse", "0.1 → 1 %", noWorse, rates(.01, .001, .05, 1000), .05, bound(alpha, .01, .001, 0, .05), 1.7, 0},
		{"NoWorse", "0.1 → 1 %", noWorse, rates(.01, .001, .5, 1000), .5, bound(alpha, .01, .001, 0, .5), 1.7, 0},
		{"NoWorse", "0 → 0.5 %", noWorse, rates(.005, 0, .01, 1000), .01, bound(alpha, .005, 0, 0, .01), 1.9, 0},
		{"NoWorse", "0 → 0.5 %", noWorse, rates(.005, 0, .05, 1000), .05, bound(alpha, .005, 0, 0, .05), 1.9, 0},
		{"NoWorse", "0 → 0.5 %", noWorse, rates(.005, 0, .5, 1000), .5, bound(alpha, .005, 0, 0, .5), 1.9, 0},
		{"Within(0.5)", "1 → 2 %", within(.5), rates(.02, .01, .05, 1000), .05, bound(alpha, .02, .01, .005, .05), 1.5, 0},
		{"Within(0.5)", "1 → 3 %", within(.5), rates(.03, .01, .01, 1000), .01, bound(alpha, .03, .01, .005, .01), 1.5, 0},
		{"Within(0.5)", "1 → 3 %", within(.5), rates(.03, .01, .05, 1000), .05, bound(alpha, .03, .01, .005, .05), 1.5, 0},
		{"Within(0.5)", "0.1 → 1 %", within(.5), rates(.01, .001, .05, 1000), .05, bound(alpha, .01, .001, .005, .05), 1.5, 0},
		{"Within(1)", "10 → 14 %", within(1), rates(.14, .10, .05, 1000), .05, bound(alpha, .14, .10, .01, .05), 1.5, 0},
		{"Score.NoWorse", "0.80 → 0.76", score(judge.ScoreNoWorse, 0), scores(.76, .8, .01, 100), .01, scoreBound(alpha, .76, .8, .01), 1.3, 0},
		{"Score.NoWorse", "0.80 → 0.76", score(judge.ScoreNoWorse, 0), scores(.76, .8, .05, 100), .05, scoreBound(alpha, .76, .8, .05), 1.3, 0},
		{"Timing.NoWorse", "everything × 1.2", timing, latencies(1.2, .05, 200), .05, 0, 0, 350},
		{"Timing.NoWorse", "tail only, p99 × 1.2", timing, tail(.0064, .05, 200), .05, bound(alpha, .01*(1-.0064)+.0064, .01, 0, .05), 1.4, 0},
		{"Mix.NoChange", "distance 0.06", mix(judge.MixNoChange, 0), mixes(.06, .05, 100), .05, mixBound(alpha, mixOf(.06), mixOf(0), .05), 2.4, 0},
		{"Mix.NoChange", "distance 0.06", mix(judge.MixNoChange, 0), mixes(.06, .5, 100), .5, mixBound(alpha, mixOf(.06), mixOf(0), .5), 2.4, 0},
	} {
		if c.skip(k.name, k.share) {
			continue
		}
		ticks := hours2 * 2
		plain, corrected := c.both(alone(k.spec, k.make, ticks), c.runs)
		ok := plain.median <= k.most*k.bound*c.slack()
		must, of, of2, b := fmt.Sprintf("≤ %g", k.most), ratio(plain.median, k.bound), ratio(corrected.median, k.bound), fmt.Sprintf("%.0f", k.bound)
		if k.most == 0 {
			ok, must, of, of2, b = plain.p90 <= k.p90*c.slack(), fmt.Sprintf("9 of 10 ≤ %.0f", k.p90), "", "", ""
		}
		t.add(ok, k.name, k.what, percent(k.share), b, delay(plain), of, must, delay(corrected), of2)
	}
	return t
}

func ratio(a, b float64) string { return fmt.Sprintf("%.2f", a/b) }

// late: how soon a candidate that turns worse later is rolled back.
func late(c *config) table {
	t := table{
		title: "Candidate outcomes after the onset of 1 → 2 % until a rollback (NoWorse, 5 %), median / 9 of 10",
		head:  []string{"onset after", "bound", "uncorrected", "of bound", "must be", "corrected for clusters", "of bound"},
	}
	const share = .05
	b := bound(alpha, .02, .01, 0, share)
	for _, k := range []struct {
		name  string
		onset int
		most  float64
		runs  int
	}{{"1 h", 720, 3.2, c.few()}, {"72 h", 51840, 4, max(c.few()/10, 10)}} {
		if c.short && k.onset > 1000 {
			continue
		}
		rel := release{
			specs: []judge.Spec{noWorse}, ticks: k.onset + 2000, onset: k.onset,
			make: []maker{phases(k.onset, rates(.01, .01, share, 1000), rates(.02, .01, share, 1000))},
		}
		plain, corrected := c.both(rel, k.runs)
		t.add(plain.median <= k.most*b*c.slack(), k.name, fmt.Sprintf("%.0f", b), delay(plain), ratio(plain.median, b), fmt.Sprintf("≤ %g", k.most), delay(corrected), ratio(corrected.median, b))
	}
	return t
}

// promotion: how soon a good candidate is proven.
func promotion(c *config) table {
	t := table{
		title: "Candidate outcomes until a proof, one gate alone, median / 9 of 10",
		head:  []string{"gate", "both", "share", "uncorrected", "must be", "corrected for clusters"},
	}
	for _, k := range []struct {
		name, what string
		spec       judge.Spec
		make       maker
		share      float64
		most       float64 // of the median, 0: any
	}{
		{"Within(0.1)", "0", within(.1), rates(0, 0, .01, 1000), .01, 5000},
		{"Within(0.1)", "0", within(.1), rates(0, 0, .05, 1000), .05, 5000},
		{"Within(0.5)", "0", within(.5), rates(0, 0, .05, 200), .05, 1000},
		{"Within(2)", "0", within(2), rates(0, 0, .01, 200), .01, 250},
		{"Within(0.5)", "1 %", within(.5), rates(.01, .01, .05, 1000), .05, 0},
		{"Within(0.5)", "1 %", within(.5), rates(.01, .01, .5, 1000), .5, 0},
		{"Within(1)", "1 %", within(1), rates(.01, .01, .5, 1000), .5, 0},
		{"WithinFactor(2)", "1 %", judge.Spec{Kind: judge.WithinFactor, Factor: 2}, rates(.01, .01, .05, 1000), .05, 0},
		{"AtMost(0.1)", "0", judge.Spec{Kind: judge.AtMost, Margin: .001}, rates(0, 0, .05, 1000), .05, 0},
		{"Quantile(0.99).WithinFactor(1.195)", "equal", slower(.99, nine), latencies(1, .05, 200), .05, 0},
		{"Quantile(0.99).WithinFactor(1.195)", "equal", slower(.99, nine), latencies(1, .5, 200), .5, 0},
		{"Score.Within(0.04)", "0.80", score(judge.ScoreWithin, .04), scores(.8, .8, .05, 100), .05, 0},
		{"Score.AtLeast(0.7)", "0.80", score(judge.ScoreAtLeast, .3), scores(.8, .8, .05, 100), .05, 0},
		{"Mix.Within(0.1)", "equal", mix(judge.MixWithin, .1), mixes(0, .05, 100), .05, 0},
	} {
		if c.skip(k.name, k.share) {
			continue
		}
		rel := alone(k.spec, k.make, 2*hours2)
		rel.proof = true
		plain, corrected := c.both(rel, c.few())
		must := ""
		if k.most > 0 {
			must = fmt.Sprintf("≤ %.0f", k.most)
		}
		t.add(k.most == 0 || plain.median <= k.most, k.name, k.what, percent(k.share), delay(plain), must, delay(corrected))
	}
	return t
}

// falsePromotion: a candidate on the boundary is proven within it with at most α_p.
func falsePromotion(c *config) table {
	t := table{
		title: "False proofs with the truth on the tolerance, α_p = 0.05, a look every tick for 2 h",
		head:  []string{"gate", "release", "share", "uncorrected", "corrected for clusters"},
	}
	ticks := c.ticks(hours2)
	for _, share := range []float64{.05, .5} {
		for _, k := range []struct {
			name, what string
			spec       judge.Spec
			make       maker
		}{
			{"Within(0.5)", "1 → 1.5 %", within(.5), rates(.015, .01, share, 1000)},
			{"Within(0.1)", "0 → 0.1 %", within(.1), rates(.001, 0, share, 1000)},
			{"WithinFactor(2)", "1 → 2 %", judge.Spec{Kind: judge.WithinFactor, Factor: 2}, rates(.02, .01, share, 1000)},
			{"AtMost(1)", "at 1 %", judge.Spec{Kind: judge.AtMost, Margin: .01}, rates(.01, .01, share, 1000)},
			{"Quantile(0.99).WithinFactor(1.195)", "× 1.195", slower(.99, nine), latencies(nine, share, 200)},
			{"Quantile(0.5).WithinFactor(1.195)", "× 1.195", slower(.5, nine), latencies(nine, share, 200)},
			{"Score.Within(0.04)", "0.80 → 0.76", score(judge.ScoreWithin, .04), scores(.76, .8, share, 100)},
			{"Score.AtLeast(0.8)", "at 0.80", score(judge.ScoreAtLeast, .2), scores(.8, .8, share, 100)},
			{"Mix.Within(0.03)", "distance 0.03", mix(judge.MixWithin, .03), mixes(.03, share, 100)},
		} {
			if c.skip(k.name, share) {
				continue
			}
			rel := alone(k.spec, k.make, ticks)
			rel.proof = true
			plain, corrected := c.both(rel, c.runs)
			t.add(worst(plain.rate, corrected.rate) <= most(alphaP, c.runs), k.name, k.what, percent(share), rate(plain), rate(corrected))
		}
	}
	return t
}

// several: five gates on metrics of their own, of which one is bad.
func several(c *config) table {
	t := table{
		title: "Five gates (NoWorse, 1 → 2 % at 5 %), candidate outcomes until a rollback, median / 9 of 10",
		head:  []string{"gates", "uncorrected", "of one alone", "must be", "corrected for clusters"},
	}
	good, bad := rates(.01, .01, .05, 1000), rates(.02, .01, .05, 1000)
	five := func(makers ...maker) release {
		return release{specs: []judge.Spec{noWorse, noWorse, noWorse, noWorse, noWorse}, make: makers, ticks: c.ticks(hours2)}
	}
	one, oneSafe := c.both(alone(noWorse, bad, hours2), c.few())
	t.add(true, "one alone", delay(one), "", "", delay(oneSafe))
	plain, corrected := c.both(five(bad, good, good, good, good), c.few())
	t.add(plain.median <= 1.4*one.median*c.slack(), "one of five is bad", delay(plain), ratio(plain.median, one.median), "≤ 1.4", delay(corrected))
	plain, corrected = c.both(five(bad, bad, bad, bad, bad), c.few())
	t.add(true, "five are bad", delay(plain), ratio(plain.median, one.median), "", delay(corrected))
	plain, corrected = c.both(five(good, good, good, good, good), c.runs)
	t.add(worst(plain.rate, corrected.rate) <= most(alpha, c.runs), "none is bad: rolled back", rate(plain), "", "≤ 0.01", rate(corrected))
	return t
}

func worst(xs ...float64) float64 {
	w := 0.
	for _, x := range xs {
		w = max(w, x)
	}
	return w
}
