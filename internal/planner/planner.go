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
	processes []process
	bar       Bar
	path      []Phase
	sets      float64
}

// process is an engine on a path.
type process struct {
	log  float64 // of its weight
	bets []betRun
	cost func(n, m float64) float64
}

// betRun is one bet on a path: how its logarithm moves.
type betRun struct {
	part  float64 // of its process at the start
	above float64 // what it is above the barrier when it passes
	parts []segment
}

// segment is how a bet moves from one time to another, a second.
type segment struct{ from, to, mean, variance, candidate, n, m float64 }

// Run prepares the test for the path.
func (t Test) Run(path []Phase, bar Bar) *Run {
	r := &Run{bar: bar, path: path, sets: max(t.sets, 1)}
	r.bar.Temper = max(bar.Temper, 1)
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
			bets[k].part = e.prior[k+1]
			if up[k] > 0 {
				// Half of a rise in the mean, weighted by size (the mean excess of
				// renewal theory).
				bets[k].above = up2[k] / up[k] / 2
			}
		}
		r.processes = append(r.processes, process{math.Log(e.weight), bets, e.cost})
	}
	return r
}

// By is the probability that the bar was reached after so many seconds.
//
// The bets of all processes look at the same outcomes and rise and fall
// together, as if they were one normal variable z. So the average is at the bar
// at one z; there the bet that has the most of it passes a barrier of its own.
func (r *Run) By(seconds float64) float64 {
	var mixes [8]mix
	ms := mixes[:0]
	blocks := Blocks(r.path, seconds)
	for i := range r.processes {
		ms = append(ms, r.processes[i].mix(seconds, blocks, r.bar.Out))
	}
	need := -math.Log(r.bar.Alpha * r.bar.Weight)
	average := func(z float64) (log float64, most lot) {
		sum, top := 0., math.Inf(-1)
		for i := range ms {
			l, lot := ms[i].at(z)
			l = r.processes[i].log + l/r.bar.Temper
			sum += math.Exp(l)
			if l > top {
				top, most = l, lot
			}
		}
		return math.Log(sum), most
	}
	lo, hi := -farthest, farthest
	if log, _ := average(hi); !(log >= need) {
		return 0
	}
	for hi-lo > 1e-3 {
		z := (lo + hi) / 2
		if log, _ := average(z); log >= need {
			hi = z
		} else {
			lo = z
		}
	}
	_, k := average(hi)
	p := passed(k.mean, k.sd*k.sd, k.mean+k.sd*hi)
	if k.sd == 0 {
		p = 1
	}
	return math.Pow(p, r.sets)
}

// farthest is as many standard deviations as nothing is away.
const farthest = 12.

// lot is a bet at some time: its part of the process at the start, and of its
// logarithm what it was given, the mean and the standard deviation.
type lot struct{ part, given, mean, sd float64 }

// mix is a process at some time: its bets that gain.
type mix struct {
	lots   [evalue.MaxBets]lot
	n      int
	shared float64 // the sum of the fixed shares of all blocks
}

// at is the logarithm of the process where its bets are z standard deviations
// above their means, and the bet that has the most of it.
func (m *mix) at(z float64) (log float64, most lot) {
	log = math.Inf(-1)
	if m.n == 0 {
		return log, lot{}
	}
	var logs [evalue.MaxBets]float64
	for k, l := range m.lots[:m.n] {
		logs[k] = l.given + l.mean + z*l.sd - m.share(k, z)
		if logs[k] > log {
			log, most = logs[k], l
		}
	}
	sum := 0.
	for _, l := range logs[:m.n] {
		sum += math.Exp(l - log)
	}
	return log + math.Log(sum), most
}

const (
	folds = 16
	// worst is the mean of the greatest of 16 standard normal variables
	// (Teichroew, Tables of Expected Values of Order Statistics, 1956).
	worst = 1.766
)

// mix is the process after so many seconds. Bets that lose on average are left
// out: they win by luck, if at all, and mostly when others do. out: of what is
// left without the worst group.
func (p *process) mix(seconds, blocks float64, out bool) mix {
	var mx mix
	for i := range p.bets {
		b := &p.bets[i]
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
		if !(mean > 0) {
			continue
		}
		given := math.Log(b.part) - b.above
		if p.cost != nil {
			given -= p.cost(n, m)
		}
		if out {
			// The group left out is not any: it is the one with the greatest excess.
			const kept = 1 - 1./folds
			mean = mean*kept - worst*math.Sqrt(candidate*kept/folds)
			variance *= kept
		}
		mx.lots[mx.n] = lot{b.part, given, mean, math.Sqrt(variance)}
		mx.n++
	}
	mx.shared = math.Log1p(blocks / 720)
	return mx
}

// share is what the fixed share of all blocks, the sum of 1/(720+i), costs bet k
// where the bets are z standard deviations above their means. What went to
// another bet, at any block alike, is lost as far as that one has gained less
// since.
func (m *mix) share(k int, z float64) float64 {
	l := &m.lots[k]
	kept, cash := 0., 1.
	for i := range m.lots[:m.n] {
		other := &m.lots[i]
		kept += other.part * since(l.mean+z*l.sd-other.mean-z*other.sd)
		cash -= other.part
	}
	return m.shared * (1 - kept - max(cash, 0)*since(l.mean+z*l.sd))
}

// since is the mean of exp(-u·lag), u even between 0 and 1. A bet that is ahead
// counts as at most a little ahead: what it was given is only a first order.
func since(lag float64) float64 {
	lag = max(lag, -1)
	if math.Abs(lag) < 1e-9 {
		return 1
	}
	return -math.Expm1(-lag) / lag
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

// Empty reports whether the test never reaches a bar because there is none.
func (t Test) Empty() bool { return len(t.engines) == 0 }
