package rollout

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/planner"
)

// Traffic is what a [Policy.Forecast] assumes: how many requests there are, how the stable version does, and how much
// worse a bad candidate would be. Only PerSecond is needed.
type Traffic struct {
	// PerSecond is how many requests (or jobs, or calls) a second there are, of all rings together and both versions. Each
	// is decided on and observed once. Above 0.
	PerSecond float64
	// Units is how many distinct units make them. It matters for [Catch.Hurt] alone. Zero: each request is of another unit.
	Units int
	// Rings is the part of the requests, and of the units, that belong to each ring but [Everyone], which has the rest.
	// A ring that is not there has 1 %.
	Rings map[string]Percent
	// Interval is the time between two ticks, as in [Options]. Default: 5 s.
	Interval time.Duration

	// What is expected of the stable version, by the metric's name. A good candidate is expected to do the same.
	Rates   map[string]Percent   // how often the event happens; a rate that is not there: 1 %
	Timings map[string]Durations // a timing that is not there: median 50 ms, 99th percentile 160 ms
	Scores  map[string]Values    // a score that is not there: mean at 80 % and standard deviation 15 % of its range
	Mixes   map[string][]float64 // the probability of each label, in the order of the labels; not there: all alike

	// Worse is the regression that [Catch] is about, by the metric's name. Nil: errors are 3 points worse.
	Worse map[string]Worsening
}

// Durations describe a lognormal distribution of durations.
type Durations struct {
	Median time.Duration // above 0
	P99    time.Duration // the 99th percentile, at least Median
}

// Values describe a Beta distribution of scores in their range.
type Values struct{ Mean, SD float64 }

// Worsening is how much worse than the stable version one metric of a bad candidate is. Fields that are zero change
// nothing.
type Worsening struct {
	Points Percent // of a rate: added to it; of a mix: moved from the most frequent label to the rarest
	Factor float64 // of a rate or of all durations of a timing: multiplied by it, before Points are added
	Drop   float64 // of a score: taken from its mean
}

const (
	defaultRingPart = 1
	defaultRate     = 1
	defaultWorse    = 3
)

var defaultDurations = Durations{50 * time.Millisecond, 160 * time.Millisecond}

// shape is what kind of values the metric of a gate has.
type shape uint8

const (
	noShape shape = iota // of a Check
	rateShape
	timingShape
	scoreShape
	mixShape
)

func shapeOf(k judge.Kind) shape {
	switch k {
	case judge.Within, judge.WithinFactor, judge.AtMost, judge.Never, judge.NoWorse:
		return rateShape
	case judge.QuantileWithinFactor, judge.QuantileAtMost, judge.TimingNoWorse:
		return timingShape
	case judge.ScoreWithin, judge.ScoreAtLeast, judge.ScoreNoWorse:
		return scoreShape
	case judge.MixWithin, judge.MixNoChange:
		return mixShape
	}
	return noShape
}

// problems are what is wrong with the traffic, for a policy with its defaults.
func (t *Traffic) problems(p *Policy, specs []judge.Spec) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("rollout: Traffic."+format, args...)) }
	finite := func(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }
	if !(t.PerSecond > 0) || !finite(t.PerSecond) {
		bad("PerSecond: %v must be above 0", t.PerSecond)
	}
	if t.Units < 0 {
		bad("Units: %d is negative", t.Units)
	}
	if t.Interval < 0 {
		bad("Interval: %v is negative", t.Interval)
	}
	for _, name := range slices.Sorted(maps.Keys(t.Rings)) {
		switch part := t.Rings[name]; {
		case name == Everyone || p.ringIndex(name) < 0:
			bad("Rings[%q]: the policy names no such ring", name)
		case !(part >= 0 && part <= 100):
			bad("Rings[%q]: %v must be at least 0 and at most 100", name, float64(part))
		}
	}
	if sum := t.inRings(p); sum > 100 {
		bad("Rings: they have %v %% together", sum)
	}
	shapes, labels := map[string]shape{"errors": rateShape, "latency": timingShape}, map[string]int{}
	ranges := map[string][2]float64{}
	for _, s := range specs {
		shapes[s.Metric] = shapeOf(s.Kind)
		labels[s.Metric] = len(s.Labels)
		ranges[s.Metric] = [2]float64{s.Lo, s.Hi}
	}
	known := func(field, name string, is shape) bool {
		if s := shapes[name]; s != noShape && s != is {
			bad("%s[%q]: the metric is of another kind", field, name)
			return false
		}
		return true // a metric without a gate may stand there, and changes nothing
	}
	for _, name := range slices.Sorted(maps.Keys(t.Rates)) {
		if r := t.Rates[name]; known("Rates", name, rateShape) && !(r >= 0 && r < 100) {
			bad("Rates[%q]: %v must be at least 0 and below 100", name, float64(r))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Timings)) {
		if d := t.Timings[name]; known("Timings", name, timingShape) && !(d.Median > 0 && d.P99 >= d.Median) {
			bad("Timings[%q]: a median of %v and a 99th percentile of %v", name, d.Median, d.P99)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Scores)) {
		v := t.Scores[name]
		if !known("Scores", name, scoreShape) {
			continue
		}
		if r, ok := ranges[name]; ok && !(v.Mean >= r[0] && v.Mean <= r[1]) || !finite(v.Mean) || !(v.SD >= 0) || !finite(v.SD) {
			bad("Scores[%q]: a mean of %v and a standard deviation of %v do not fit its range", name, v.Mean, v.SD)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Mixes)) {
		if !known("Mixes", name, mixShape) {
			continue
		}
		sum := 0.
		for _, x := range t.Mixes[name] {
			if sum += x; !(x >= 0) {
				sum = math.NaN()
			}
		}
		if n, ok := labels[name]; ok && n != len(t.Mixes[name]) || !(math.Abs(sum-1) < 1e-6) {
			bad("Mixes[%q]: %v are not the probabilities of its labels", name, t.Mixes[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Worse)) {
		w := t.Worse[name]
		says := map[shape]bool{rateShape: w.Points != 0 || w.Factor != 0, timingShape: w.Factor != 0, scoreShape: w.Drop != 0, mixShape: w.Points != 0}
		switch s := shapes[name]; {
		case s == noShape:
			bad("Worse[%q]: no gate has such a metric", name)
		case !finite(float64(w.Points)) || !finite(w.Drop) || !finite(w.Factor) || w.Points < 0 || w.Points > 100 || w.Drop < 0 || w.Factor < 0:
			bad("Worse[%q]: %+v: nothing may be negative or infinite", name, w)
		case !says[s]:
			bad("Worse[%q]: %+v says nothing about a metric of its kind", name, w)
		}
	}
	return errors.Join(errs...)
}

// inRings is the part of the traffic that belongs to rings but everyone.
func (t *Traffic) inRings(p *Policy) float64 {
	sum := 0.
	for _, r := range p.Rings {
		sum += t.ringPart(r.Name)
	}
	return sum
}

func (t *Traffic) ringPart(name string) float64 {
	if part, ok := t.Rings[name]; ok {
		return float64(part)
	}
	return defaultRingPart
}

// worse is the regression of a metric.
func (t *Traffic) worse(metric string) Worsening {
	if t.Worse == nil && metric == "errors" {
		return Worsening{Points: defaultWorse}
	}
	return t.Worse[metric]
}

// law is what is expected of the stable version and of a bad candidate for the metric of a gate, and which part of a bad
// candidate's outcomes hurt somebody.
func (t *Traffic) law(s judge.Spec) (law planner.Law, hurt float64) {
	w := t.worse(s.Metric)
	factor := w.Factor
	if factor == 0 {
		factor = 1
	}
	switch shapeOf(s.Kind) {
	case rateShape:
		base, ok := t.Rates[s.Metric]
		if !ok {
			base = defaultRate
		}
		p := float64(base) / 100
		q := min(p*factor+float64(w.Points)/100, 1)
		return planner.Law{Control: planner.Rate(p), Candidate: planner.Rate(q)}, max(q-p, 0)
	case timingShape:
		d, ok := t.Timings[s.Metric]
		if !ok {
			d = defaultDurations
		}
		sd := math.Log(float64(d.P99)/float64(d.Median)) / 2.326
		if factor > 1 {
			hurt = 1 // everybody waits longer
		}
		slow := time.Duration(min(factor*float64(d.Median), float64(evidence.Lower(evidence.Cells-1))))
		return planner.Law{Control: planner.Lognormal(d.Median, sd), Candidate: planner.Lognormal(slow, sd)}, hurt
	case scoreShape:
		span := s.Hi - s.Lo
		v, ok := t.Scores[s.Metric]
		if !ok {
			v = Values{s.Lo + .8*span, .15 * span}
		}
		if w.Drop > 0 {
			hurt = 1
		}
		good := (s.Hi - v.Mean) / span
		return planner.Law{Control: planner.Score(good, v.SD/span), Candidate: planner.Score(min(good+w.Drop/span, 1), v.SD/span)}, hurt
	case mixShape:
		mix := slices.Clone(t.Mixes[s.Metric])
		if mix == nil {
			for range s.Labels {
				mix = append(mix, 1/float64(len(s.Labels)))
			}
		}
		moved := slices.Clone(mix)
		most, least := 0, len(mix)-1
		for i, x := range mix {
			if x > mix[most] {
				most = i
			}
			if x < mix[least] {
				least = i
			}
		}
		hurt = min(float64(w.Points)/100, mix[most])
		moved[most] -= hurt
		moved[least] += hurt
		return planner.Law{Control: mix, Candidate: moved}, hurt
	}
	return planner.Law{}, 0
}
