package evalue

import "math"

// Ratio bets on the ratio of two rates: null μ_candidate ≤ Psi0·μ_control for
// bets above 1, μ_candidate ≥ Psi0·μ_control for bets below 1. An outcome is in
// [0,1] or a Poisson count. The base rate cancels, so nothing is estimated; it
// is exact for Poisson counts and loses a part (1-p) of the information for
// yes/no outcomes, so it suits rates below 10 %.
type Ratio struct {
	Prior Prior
	psi0  float64
	psi   []float64
	log   []float64 // ln psi
}

func newRatio(psi0, cash float64, psi, weights []float64) *Ratio {
	r := &Ratio{Prior: NewPrior(cash, weights...), psi0: psi0, psi: psi}
	for _, p := range psi {
		r.log = append(r.log, math.Log(p))
	}
	return r
}

// RatioWorse bets against μ_candidate ≤ psi0·μ_control. The bet on a ratio of
// 1000 is what makes a control without any event fast.
func RatioWorse(psi0 float64) *Ratio {
	return newRatio(psi0, .2,
		[]float64{1.25, 1.5, 2, 3, 5, 10, 30, 1000},
		[]float64{1, 2, 2, 2, 1, 1, 1, 1})
}

// RatioWithin bets against μ_candidate ≥ psi0·μ_control, psi0 > 1, mostly on
// equal rates. It cannot win while both cohorts are without events.
func RatioWithin(psi0 float64) *Ratio {
	return newRatio(psi0, 0,
		[]float64{1 / psi0, 1 / math.Sqrt(psi0), .6 / psi0, .25 / psi0},
		[]float64{.5, .25, .15, .1})
}

// RatioBelow bets against μ_candidate ≥ μ_control where the candidate counts
// what is beyond a higher threshold than the control's, so that a candidate as
// good as the control has a ratio well below 1.
func RatioBelow() *Ratio {
	psi := []float64{.8, .6, .4, .25, .1}
	return newRatio(1, 0, psi, even(len(psi)))
}

// Logs sets the bets on a block of n candidate outcomes with the sum x and m
// control outcomes with the sum y:
//
//	x·ln ψ + (x+y)·ln( (ψ0·n+m) / (ψ·ψ0·n+m) )
//
// With A = ψs/t, B = s/t, s = ψ0·n+m, t = ψ·ψ0·n+m an event multiplies by A in
// the candidate and B in the control, A^x ≤ 1+(A-1)x by convexity, and
// n·μ_c(A-1) + m·μ_s(B-1) ≤ μ_s(ψ0·n·A + m·B - s) = 0. It is the block form of
// conditioning on which cohort the next event comes from (Lindon and Malek,
// Anytime-Valid Inference for Multinomial Count Data, 2022). An empty cohort
// gives 0.
func (r *Ratio) Logs(l *Logs, n, m, x, y float64) {
	s := r.psi0*n + m
	for k, psi := range r.psi {
		l[k] = x * r.log[k]
		if x+y > 0 {
			l[k] += (x + y) * math.Log(s/(psi*r.psi0*n+m))
		}
	}
	if n == 0 || m == 0 { // exactly, not up to rounding
		for k := range r.psi {
			l[k] = 0
		}
	}
}

// Difference bets on the difference of two means in [0,1], higher is worse:
// null μ_candidate ≤ μ_control + δ, or ≥ where it bets on within. It needs no
// rare rate and can win without a single event (two-sample betting, after
// Waudby-Smith and Ramdas, Estimating Means of Bounded Random Variables by
// Betting, 2023).
type Difference struct {
	Prior  Prior
	dir    float64 // +1: bets on worse; -1: bets on within
	delta  float64
	lambda []float64
}

func newDifference(dir, delta, cash float64, lambda ...float64) *Difference {
	return &Difference{Prior: NewPrior(cash, even(len(lambda))...), dir: dir, delta: delta, lambda: lambda}
}

// DifferenceWorse bets against μ_candidate ≤ μ_control.
func DifferenceWorse() *Difference {
	return newDifference(1, 0, .2, .125, .25, .5, 1, 2, 4)
}

// DifferenceBeyond bets against μ_candidate ≤ μ_control + delta, 0 ≤ delta < 1.
// Its grid reaches further than DifferenceWorse's: the margin of a rare rate is
// small beside an event, so that large stakes pay.
func DifferenceBeyond(delta float64) *Difference {
	return newDifference(1, delta, .2, .1, .25, .5, 1, 2, 4, 8, 16)
}

// DifferenceWithin bets against μ_candidate ≥ μ_control + delta, 0 ≤ delta < 1.
// It holds no cash: a stage starts it afresh, so there is no late onset to wait for.
func DifferenceWithin(delta float64) *Difference {
	return newDifference(-1, delta, 0, .05, .1, .2, .4, .8, 2)
}

// clip returns the largest λ of which no outcome loses more than 95 % of the
// wealth, and the parts of λ staked on a candidate's and on a control's outcome:
// n·fc = m·fs, which makes the centre c0 cancel.
func (d *Difference) clip(n, m, c0 float64) (most, fc, fs float64) {
	fc, fs = m/(n+m), n/(n+m)
	bc, bs := c0+d.delta, 1-c0
	if d.dir < 0 {
		bc, bs = 1-c0-d.delta, c0
	}
	most = math.Inf(1)
	if b := max(bc*fc, bs*fs); b > 0 {
		most = .95 / b
	}
	return most, fc, fs
}

// Logs sets the bets on a block of yes/no outcomes, n and m of them with x and
// y events. c0 in [0,1] must come from earlier blocks: it is where the bets are
// centred, a stale one costs power, not validity. With v the outcome:
//
//	Σ_candidate log1p(dir·λ·f_c·(v-c0-δ)) + Σ_control log1p(dir·λ·f_s·(c0-v))
//	f_c = m/(n+m), f_s = n/(n+m)
//
// The mean condition is λ·nm/(n+m)·dir·(μ_c-μ_s-δ) ≤ 0. An empty cohort gives 0.
func (d *Difference) Logs(l *Logs, n, m, x, y, c0 float64) {
	if n == 0 || m == 0 {
		for k := range d.lambda {
			l[k] = 0
		}
		return
	}
	most, fc, fs := d.clip(n, m, c0)
	for k, lambda := range d.lambda {
		a := d.dir * min(lambda, most)
		c, s := a*fc, a*fs
		l[k] = x*math.Log1p(c*(1-c0-d.delta)) + (n-x)*math.Log1p(-c*(c0+d.delta)) +
			y*math.Log1p(-s*(1-c0)) + (m-y)*math.Log1p(s*c0)
	}
}

// LogsCells is Logs for outcomes of K ≥ 2 values 0, 1/(K-1) … 1, counted in
// cells of the same number for both cohorts. A score between two values keeps
// its mean when it is rounded to either at random, in proportion.
func (d *Difference) LogsCells(l *Logs, candidate, control []uint64, c0 float64) {
	n, m := total(candidate), total(control)
	if len(candidate) == 2 {
		d.Logs(l, n, m, float64(candidate[1]), float64(control[1]), c0)
		return
	}
	if n == 0 || m == 0 {
		for k := range d.lambda {
			l[k] = 0
		}
		return
	}
	most, fc, fs := d.clip(n, m, c0)
	for k, lambda := range d.lambda {
		a := d.dir * min(lambda, most)
		l[k] = 0
		for b := range candidate {
			v := float64(b) / float64(len(candidate)-1)
			if c := candidate[b]; c > 0 {
				l[k] += float64(c) * math.Log1p(a*fc*(v-c0-d.delta))
			}
			if c := control[b]; c > 0 {
				l[k] += float64(c) * math.Log1p(a*fs*(c0-v))
			}
		}
	}
}

func total(cells []uint64) float64 {
	sum := 0.
	for _, c := range cells {
		sum += float64(c)
	}
	return sum
}

// Level bets on the candidate's rate alone, as a likelihood ratio: null
// p ≤ p0, or p ≥ p0 where it bets on below. The null may hold on the running
// average only.
type Level struct {
	Prior   Prior
	yes, no []float64 // what an outcome adds to the logarithm
}

// leastLevel stands for a limit of zero or nearly so.
const leastLevel = 1e-9

func newLevel(p0, cash float64, grid ...float64) *Level {
	p0 = min(max(p0, leastLevel), 1-leastLevel)
	l := &Level{}
	for _, f := range grid {
		q := p0 * f
		if q >= 1 {
			q = (1 + p0) / 2 // between the limit and certainty
		}
		l.yes = append(l.yes, math.Log(q/p0))
		l.no = append(l.no, math.Log1p(-q)-math.Log1p(-p0))
		if q == (1+p0)/2 {
			break // larger ones would be the same bet again
		}
	}
	l.Prior = NewPrior(cash, even(len(l.yes))...)
	return l
}

// LevelWorse bets against p ≤ p0.
func LevelWorse(p0 float64) *Level { return newLevel(p0, .2, 1.25, 1.5, 2, 3, 5, 10, 30) }

// LevelWithin bets against p ≥ p0.
func LevelWithin(p0 float64) *Level {
	return newLevel(p0, 0, min(1e-9/max(p0, leastLevel), 1e-3), .1, .3, .6)
}

// Logs sets the bets on a block of n outcomes with x events.
func (l *Level) Logs(dst *Logs, n, x float64) {
	for k := range l.yes {
		dst[k] = x*l.yes[k] + (n-x)*l.no[k]
	}
}
