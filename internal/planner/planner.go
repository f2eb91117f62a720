package planner

import (
	"math"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// A Stream is one ring's outcomes of a metric, a second, and when bets on it can
// begin, in seconds from the beginning of the path.
type Stream struct {
	Candidate, Control float64
	Learnt             float64 // the first block, which only tells where to bet, is over
	Warm               float64 // so many control outcomes were seen that a latency threshold can be drawn
}

// A Phase is a time in which no share changes.
type Phase struct {
	Seconds float64 // of a path's last phase: ignored, it lasts for ever
	Look    float64 // seconds between two blocks
	Streams []Stream
}

// Bar is what a process must reach.
type Bar struct {
	Alpha  float64 // error bound
	Weight float64 // of the process among those that are averaged
	// Temper divides the logarithm of the evidence before it is averaged; 1 or
	// more. Out leaves one of 16 groups of units out: the one in which the
	// candidate is worst.
	Temper float64
	Out    bool
}

// Test is one side of a gate: the processes of which an average must reach a
// bar. The zero Test never does.
type Test struct {
	engines []engine
	sets    float64 // so many independent copies of it must; 0: one
}

// engine is one process of a gate.
type engine struct {
	weight float64 // in the gate's average
	prior  evalue.Prior
	learns bool // needs the control's past
	warms  bool // needs a latency threshold
	// moments of the bets where each candidate outcome comes with m control
	// outcomes; the control is not needed where m is 0 and absolute is true.
	moments  func(m float64) []moments
	absolute bool
	cost     func(n, m float64) float64 // what is lost in n candidate outcomes by learning; nil: nothing
}

// moments of what an outcome of the candidate and of the control adds to the
// logarithm of a bet: mean and variance, and mean and mean square of the rises.
type moments struct{ c, s moment }

type moment struct{ mean, variance, up, up2 float64 }

// gain is what outcomes add: a probability and a value each.
func (a *moment) gain(p, v float64) {
	a.mean += p * v
	a.variance += p * v * v // less the square of the mean, by done
	if v > 0 {
		a.up += p * v
		a.up2 += p * v * v
	}
}

func (a *moment) done() { a.variance = max(a.variance-a.mean*a.mean, 0) }

// Run is a test on a path.
type Run struct {
	bets []betRun
	bar  Bar
	path []Phase
	sets float64
}

// betRun is one bet on a path: how its logarithm moves.
type betRun struct {
	need  float64 // of its logarithm, but for the leak
	part  float64 // of its process at the start
	parts []segment
	cost  func(n, m float64) float64
}

// segment is how a bet moves from one time to another, a second.
type segment struct{ from, to, mean, variance, candidate, n, m float64 }

// Run prepares the test for the path.
func (t Test) Run(path []Phase, bar Bar) *Run {
	r := &Run{bar: bar, path: path, sets: max(t.sets, 1)}
	temper := max(bar.Temper, 1)
	for i := range t.engines {
		e := &t.engines[i]
		bets := make([]betRun, len(e.prior)-1)
		up, up2 := make([]float64, len(bets)), make([]float64, len(bets))
		from := 0.
		for p, phase := range path {
			to := from + phase.Seconds
			if p == len(path)-1 {
				to = math.Inf(1)
			}
			for _, s := range phase.Streams {
				start := from
				if e.learns {
					start = max(start, s.Learnt)
				}
				if e.warms {
					start = max(start, s.Warm)
				}
				if start >= to || !(s.Candidate > 0) || !(s.Control > 0) && !e.absolute {
					continue
				}
				for k, m := range e.moments(s.Control / s.Candidate) {
					bets[k].parts = append(bets[k].parts, segment{
						from: start, to: to, n: s.Candidate, m: s.Control,
						mean:      s.Candidate*m.c.mean + s.Control*m.s.mean,
						variance:  s.Candidate*m.c.variance + s.Control*m.s.variance,
						candidate: s.Candidate * m.c.variance,
					})
					up[k] += s.Candidate*m.c.up + s.Control*m.s.up
					up2[k] += s.Candidate*m.c.up2 + s.Control*m.s.up2
				}
			}
			from = to
		}
		for k := range bets {
			b := &bets[k]
			b.part, b.cost = e.prior[k+1], e.cost
			b.need = temper*-math.Log(bar.Alpha*bar.Weight*e.weight) - math.Log(b.part)
			if up[k] > 0 {
				// What it is above the barrier when it passes: half of a rise in the
				// mean, weighted by size (the renewal theorem's mean excess).
				b.need += up2[k] / up[k] / 2
			}
		}
		r.bets = append(r.bets, bets...)
	}
	return r
}

// By is the probability that the bar was reached after so many seconds.
func (r *Run) By(seconds float64) float64 {
	best := 0.
	blocks := Blocks(r.path, seconds)
	for i := range r.bets {
		best = max(best, r.bets[i].by(seconds, blocks, r.bar.Out))
	}
	if r.sets > 1 {
		return math.Pow(best, r.sets)
	}
	return best
}

const (
	folds = 16
	// worst is the mean of the greatest of 16 standard normal variables
	// (Teichroew, Tables of Expected Values of Order Statistics, 1956).
	worst = 1.766
)

func (b *betRun) by(seconds, blocks float64, out bool) float64 {
	mean, variance, candidate, n, m := 0., 0., 0., 0., 0.
	for i := range b.parts {
		s := &b.parts[i]
		if d := min(seconds, s.to) - s.from; d > 0 {
			mean += d * s.mean
			variance += d * s.variance
			candidate += d * s.candidate
			n += d * s.n
			m += d * s.m
		}
	}
	if n == 0 {
		return 0
	}
	need := b.need
	// The fixed share takes 1/(720+i) of what the bet has more than its part at
	// the i-th block.
	need += (1 - b.part) * math.Log1p(blocks/720)
	if b.cost != nil {
		need += b.cost(n, m)
	}
	if out {
		// The group left out is not any: it is the one with the greatest excess.
		const kept = 1 - 1./folds
		mean = mean*kept - worst*math.Sqrt(candidate*kept/folds)
		variance *= kept
	}
	return passed(mean, variance, need)
}

// Time is how many seconds it takes until the bar is reached with probability
// power, rounded up to a look; +Inf if it is never.
func (r *Run) Time(power float64) float64 { return Look(r.path, Solve(r.By, power)) }

// Blocks is how many blocks there are in so many seconds.
func Blocks(path []Phase, seconds float64) float64 {
	blocks := 0.
	each(path, seconds, func(p *Phase, d float64) {
		if p.Look > 0 {
			blocks += d / p.Look * float64(max(len(p.Streams), 1))
		}
	})
	return blocks
}

// Samples is how many candidate outcomes there are in so many seconds.
func Samples(path []Phase, seconds float64) float64 {
	n := 0.
	each(path, seconds, func(p *Phase, d float64) {
		for _, s := range p.Streams {
			n += d * s.Candidate
		}
	})
	return n
}

// Look rounds seconds up to the next look.
func Look(path []Phase, seconds float64) float64 {
	if math.IsInf(seconds, 1) {
		return seconds
	}
	at := 0.
	each(path, seconds, func(p *Phase, d float64) {
		if p.Look > 0 {
			d = math.Ceil(d/p.Look-1e-3) * p.Look
		}
		at += d
	})
	return at
}

// each calls f with the phases of the first so many seconds and how long each
// of them lasts within these.
func each(path []Phase, seconds float64, f func(p *Phase, d float64)) {
	for i := range path {
		d := seconds
		if i < len(path)-1 {
			d = min(d, path[i].Seconds)
		}
		if d <= 0 {
			return
		}
		f(&path[i], d)
		seconds -= d
	}
}
