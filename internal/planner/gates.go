package planner

import (
	"fmt"
	"math"
	"time"

	"github.com/stagedrollout/rollout/internal/evalue"
	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
)

// Law is the distribution of a metric in both cohorts, by cell: a Rate's good
// and bad, a Timing's evidence.Cells, a Score's judge.ScoreCells from the best
// value to the worst, a Mix's labels.
type Law struct{ Candidate, Control []float64 }

// Rate is the law of a yes-or-no metric.
func Rate(p float64) []float64 { return []float64{1 - p, p} }

// Lognormal is the law of a Timing with the median and the standard deviation of
// its logarithm.
func Lognormal(median time.Duration, sd float64) []float64 {
	below := func(cell int) float64 {
		d := evidence.Lower(cell)
		switch {
		case d <= 0:
			return 0
		case cell >= evidence.Cells:
			return 1
		case !(sd > 0):
			if d > median {
				return 1
			}
			return 0
		}
		return .5 * math.Erfc(-math.Log(float64(d)/float64(median))/sd/math.Sqrt2)
	}
	p, last := make([]float64, evidence.Cells), 0.
	for i := range p {
		next := below(i + 1)
		p[i], last = next-last, next
	}
	return p
}

// Score is the law of the badness of a score, a Beta distribution of that mean
// and standard deviation, each value rounded to one of the two cells beside it
// such that its mean is kept. The standard deviation is at most what the mean
// allows.
func Score(mean, sd float64) []float64 {
	p := make([]float64, judge.ScoreCells)
	put := func(v, w float64) {
		at := v * (judge.ScoreCells - 1)
		i := min(int(at), judge.ScoreCells-2)
		p[i] += w * (1 - (at - float64(i)))
		p[i+1] += w * (at - float64(i))
	}
	spread := mean*(1-mean)/(sd*sd) - 1
	switch {
	case !(sd > 0):
		put(mean, 1)
		return p
	case spread < 1e-3: // all at the ends
		p[0], p[len(p)-1] = 1-mean, mean
		return p
	}
	// In θ with v = sin²θ the density sin^(2a-1)·cos^(2b-1) has poles at the ends
	// only where a or b is below 1/2.
	a, b := mean*spread, (1-mean)*spread
	const steps = 4000
	total, top := 0., math.Inf(-1)
	logs := make([]float64, steps)
	for i := range logs {
		theta := (float64(i) + .5) / steps * math.Pi / 2
		logs[i] = (2*a-1)*math.Log(math.Sin(theta)) + (2*b-1)*math.Log(math.Cos(theta))
		top = max(top, logs[i])
	}
	for i := range logs {
		logs[i] = math.Exp(logs[i] - top)
		total += logs[i]
	}
	got := 0.
	for i, w := range logs {
		sin := math.Sin((float64(i) + .5) / steps * math.Pi / 2)
		put(sin*sin, w/total)
		got += sin * sin * w / total
	}
	// What the sum misses of a pole belongs to that end, by which the mean is off.
	end, w := 0, 1-mean/got
	if got < mean {
		end, w = len(p)-1, (mean-got)/(1-got)
	}
	for i := range p {
		p[i] *= 1 - w
	}
	p[end] += w
	return p
}

// Rollback is the test that breaks the gate. A Never and a Check have none.
func Rollback(s judge.Spec, law Law) (Test, error) {
	if err := fits(s, law); err != nil {
		return Test{}, err
	}
	bad := law.event(1, 1)
	switch s.Kind {
	case judge.Within:
		return average(difference(evalue.DifferenceBeyond(s.Margin), bad)), nil
	case judge.WithinFactor:
		return average(ratio(evalue.RatioWorse(s.Factor), bad)), nil
	case judge.AtMost:
		return average(level(evalue.LevelWorse(s.Margin), bad)), nil
	case judge.NoWorse:
		return average(ratio(evalue.RatioWorse(1), bad), difference(evalue.DifferenceWorse(), bad)), nil
	case judge.QuantileWithinFactor:
		_, up := evidence.Shift(s.Factor)
		slow := law.beyond(s.Quantile, up)
		return average(warm(ratio(evalue.RatioWorse(1), slow)), warm(difference(evalue.DifferenceWorse(), slow))), nil
	case judge.QuantileAtMost:
		c := evidence.Index(s.Limit) + 1
		return average(level(evalue.LevelWorse(1-s.Quantile), law.event(c, c))), nil
	case judge.TimingNoWorse:
		return average(warm(ratio(evalue.RatioWorse(1), law.beyond(.99, 0))),
			warm(difference(evalue.DifferenceWorse(), law.beyond(.5, 0)))), nil
	case judge.ScoreWithin:
		return average(difference(evalue.ScoreBeyond(s.Margin), law)), nil
	case judge.ScoreNoWorse:
		return average(difference(evalue.ScoreWorse(), law)), nil
	case judge.ScoreAtLeast:
		return average(mean(evalue.MeanWorse(s.Margin), law)), nil
	case judge.MixWithin:
		// The labels that became more frequent are known before long.
		return average(difference(evalue.DifferenceBeyond(s.Margin), law.set(func(b int) bool { return law.Candidate[b] > law.Control[b] }))), nil
	case judge.MixNoChange:
		return average(change(law)), nil
	}
	return Test{}, nil
}

// Proof is the test that proves the gate. Guards have none.
func Proof(s judge.Spec, law Law) (Test, error) {
	if err := fits(s, law); err != nil {
		return Test{}, err
	}
	bad := law.event(1, 1)
	switch s.Kind {
	case judge.Within:
		return average(difference(evalue.DifferenceWithin(s.Margin), bad)), nil
	case judge.WithinFactor:
		return average(ratio(evalue.RatioWithin(s.Factor), bad)), nil
	case judge.AtMost:
		return average(level(evalue.LevelWithin(s.Margin), bad)), nil
	case judge.QuantileWithinFactor:
		down, _ := evidence.Shift(s.Factor)
		slow := law.beyond(s.Quantile, down)
		return average(warm(ratio(evalue.RatioBelow(), slow)), warm(difference(evalue.DifferenceWithin(0), slow))), nil
	case judge.QuantileAtMost:
		c := evidence.Index(s.Limit)
		return average(level(evalue.LevelWithin(1-s.Quantile), law.event(c, c))), nil
	case judge.ScoreWithin:
		return average(difference(evalue.ScoreWithin(s.Margin), law)), nil
	case judge.ScoreAtLeast:
		return average(mean(evalue.MeanWithin(s.Margin), law)), nil
	case judge.MixWithin:
		return everySet(s.Margin, law), nil
	}
	return Test{}, nil
}

// fits reports whether the law is one of the gate's metric.
func fits(s judge.Spec, law Law) error {
	want := 0
	switch s.Kind {
	case judge.Check, judge.Silence, judge.Split:
		return fmt.Errorf("planner: a gate of kind %d has no law", s.Kind)
	case judge.QuantileWithinFactor, judge.QuantileAtMost, judge.TimingNoWorse:
		want = evidence.Cells
	case judge.ScoreWithin, judge.ScoreAtLeast, judge.ScoreNoWorse:
		want = judge.ScoreCells
	case judge.MixWithin, judge.MixNoChange:
		if want = len(law.Control); want < 2 || want > maxLabels {
			return fmt.Errorf("planner: a mix of %d labels", want)
		}
	default:
		want = 2
	}
	if len(law.Candidate) != want || len(law.Control) != want {
		return fmt.Errorf("planner: %d and %d cells, not %d", len(law.Candidate), len(law.Control), want)
	}
	return nil
}

// average is a test of which the engines have equal parts.
func average(es ...engine) Test {
	for i := range es {
		es[i].weight = 1 / float64(len(es))
	}
	return Test{engines: es}
}

// warm is an engine that needs a latency threshold.
func warm(e engine) engine { e.warms = true; return e }

// event makes a yes-or-no law: the event is a cell from c on for the candidate
// and from s on for the control.
func (l Law) event(c, s int) Law {
	return Law{Rate(tail(l.Candidate, c)), Rate(tail(l.Control, s))}
}

// beyond is the event that the judge counts: an outcome beyond the cell of the
// control's q-quantile, for the candidate shift cells higher.
func (l Law) beyond(q float64, shift int) Law {
	below := 0.
	for i, p := range l.Control {
		if below += p; below >= q {
			return l.event(i+1+shift, i+1)
		}
	}
	return l.event(len(l.Candidate), len(l.Control))
}

// set is the event that a label is in the set.
func (l Law) set(in func(label int) bool) Law {
	c, s := 0., 0.
	for b := range l.Control {
		if in(b) {
			c, s = c+l.Candidate[b], s+l.Control[b]
		}
	}
	return Law{Rate(min(c, 1)), Rate(min(s, 1))}
}

func tail(p []float64, from int) float64 {
	sum := 0.
	for i := max(from, 0); i < len(p); i++ {
		sum += p[i]
	}
	return min(sum, 1)
}

// ratio bets on a yes-or-no law. Only events add something, and they add what
// Logs says of one.
func ratio(r *evalue.Ratio, law Law) engine {
	return engine{prior: r.Prior, moments: func(m float64) []moments {
		var c, s evalue.Logs
		r.Logs(&c, 1, m, 1, 0)
		r.Logs(&s, 1, m, 0, 1)
		ms := make([]moments, len(r.Prior)-1)
		for k := range ms {
			ms[k].c.gain(law.Candidate[1], c[k])
			ms[k].s.gain(law.Control[1], s[k])
			ms[k].c.done()
			ms[k].s.done()
		}
		return ms
	}}
}

// level bets on a yes-or-no law of the candidate alone.
func level(l *evalue.Level, law Law) engine {
	var no, yes evalue.Logs
	l.Logs(&no, 1, 0)
	l.Logs(&yes, 1, 1)
	ms := make([]moments, len(l.Prior)-1)
	for k := range ms {
		ms[k].c.gain(law.Candidate[0], no[k])
		ms[k].c.gain(law.Candidate[1], yes[k])
		ms[k].c.done()
	}
	return engine{prior: l.Prior, absolute: true, moments: func(float64) []moments { return ms }}
}

// mean bets on the mean of the candidate alone.
func mean(e *evalue.Mean, law Law) engine {
	ms := make([]moments, len(e.Prior)-1)
	one := make([]uint64, len(law.Candidate))
	for b, p := range law.Candidate {
		var l evalue.Logs
		one[b] = 1
		e.Logs(&l, one)
		one[b] = 0
		for k := range ms {
			ms[k].c.gain(p, l[k])
		}
	}
	for k := range ms {
		ms[k].c.done()
	}
	return engine{prior: e.Prior, absolute: true, moments: func(float64) []moments { return ms }}
}

// difference bets on the difference of two means. It is centred on the control's.
func difference(d *evalue.Difference, law Law) engine {
	c0 := 0.
	value := func(b int) float64 { return float64(b) / float64(len(law.Control)-1) }
	for b, p := range law.Control {
		c0 += p * value(b)
	}
	c0 = min(c0, 1)
	return engine{prior: d.Prior, learns: true, moments: func(m float64) []moments {
		ms := make([]moments, len(d.Prior)-1)
		for b := range law.Control {
			var c, s evalue.Logs
			d.Gains(&c, &s, 1, m, value(b), c0)
			for k := range ms {
				ms[k].c.gain(law.Candidate[b], c[k])
				ms[k].s.gain(law.Control[b], s[k])
			}
		}
		for k := range ms {
			ms[k].c.done()
			ms[k].s.done()
		}
		return ms
	}}
}

// change bets on mixes that it has to learn.
func change(law Law) engine {
	e := evalue.NewChange()
	// at is the bets where the mixes are estimated from n and m outcomes: shrunk
	// to what both have in common.
	at := func(m, n, all float64) []moments {
		ms := make([]moments, len(e.Prior)-1)
		for b := range law.Control {
			q, s := law.Candidate[b], law.Control[b]
			both := (q + m*s) / (1 + m)
			var c, d evalue.Logs
			e.Gains(&c, &d, 1, m, shrink(q, both, n), shrink(s, both, all), both)
			for k := range ms {
				if q > 0 {
					ms[k].c.gain(q, c[k])
				}
				if s > 0 {
					ms[k].s.gain(s, d[k])
				}
			}
		}
		for k := range ms {
			ms[k].c.done()
			ms[k].s.done()
		}
		return ms
	}
	last := len(e.Prior) - 2
	cost := func(n, m float64) float64 {
		// The gain that is missed at each outcome until n, by being shrunk and by
		// chance: a mix of K labels estimated from n outcomes is off by (K-1)/2n in
		// divergence, and of that a part m/(n+m) matters to both cohorts.
		per := m / n
		full := at(per, math.Inf(1), math.Inf(1))[last]
		free := float64(len(law.Control)-1) / 2 * per / (1 + per)
		missed := func(x float64) float64 {
			now := at(per, x, per*x)[last]
			y := per * x
			return full.c.mean - now.c.mean + per*(full.s.mean-now.s.mean) +
				free*(x/((evalue.Smooth+x)*(evalue.Smooth+x))+y/((evalue.Smooth+y)*(evalue.Smooth+y)))
		}
		lost, from, before := 0., 0., missed(0)
		for x := min(1, n); ; x = min(2*x, n) {
			after := missed(x)
			lost += (x - from) * (before + after) / 2
			if from, before = x, after; x >= n {
				return lost
			}
		}
	}
	return engine{prior: e.Prior, learns: true, cost: cost, moments: func(m float64) []moments {
		return at(m, math.Inf(1), math.Inf(1))
	}}
}

// shrink is an estimate from n outcomes, without its noise.
func shrink(p, both, n float64) float64 {
	if math.IsInf(n, 1) {
		return p
	}
	return (evalue.Smooth*both + n*p) / (evalue.Smooth + n)
}

// maxLabels bounds the sets of labels.
const maxLabels = 12

// everySet is the test that proves a mix: every set of labels must be proven,
// and it is as slow as the slowest. With K labels there are K-1 of them that say
// something new; they are counted as independent.
func everySet(margin float64, law Law) Test {
	var slowest Test
	least := math.Inf(1)
	for set := 1; set < 1<<len(law.Control)-1; set++ {
		t := average(difference(evalue.DifferenceWithin(margin), law.set(func(b int) bool { return set>>b&1 == 1 })))
		speed := math.Inf(-1)
		for k, m := range t.engines[0].moments(1) {
			mu, v := m.c.mean+m.s.mean, m.c.variance+m.s.variance
			// Which set is the slowest hardly depends on the bar; .05 is the usual one.
			if b := -math.Log(.05 * t.engines[0].prior[k+1]); mu > 0 {
				speed = max(speed, mu/(b+math.Sqrt(v*b/mu))) // one standard deviation late
			}
		}
		if speed < least {
			least, slowest = speed, t
		}
	}
	slowest.sets = float64(len(law.Control) - 1)
	return slowest
}
