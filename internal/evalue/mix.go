package evalue

import "math"

// Change bets that two mixes of the same labels differ in any way: null, both
// cohorts have the same distribution inside a block, which may drift between
// blocks.
type Change struct {
	Prior Prior
	kappa []float64
}

// NewChange returns the bets: on the mixes seen so far, and half-way from what
// both have in common to them.
func NewChange() *Change {
	return &Change{Prior: NewPrior(.2, 1, 1), kappa: []float64{.5, 1}}
}

// smooth is how many pooled outcomes a cohort's estimate is shrunk with.
const smooth = 30

// Estimate sets q and s to the candidate's and the control's mix, estimated from
// the counts of earlier blocks, and both to what they have in common.
func (c *Change) Estimate(q, s, both []float64, candidate, control []uint64) {
	n, m, k := total(candidate), total(control), float64(len(candidate))
	for b := range candidate {
		both[b] = (float64(candidate[b]) + float64(control[b]) + 1/k) / (n + m + 1)
		q[b] = (smooth*both[b] + float64(candidate[b])) / (smooth + n)
		s[b] = (smooth*both[b] + float64(control[b])) / (smooth + m)
	}
}

// Logs sets the bets on a block. q, s and both must come from earlier blocks.
// With q, s moved towards both by 1-κ, and q0 = (n·q+m·s)/(n+m):
//
//	Σ c·ln(q/q0) + d·ln(s/q0)
//
// Where both cohorts have the mix p the mean condition is Σ p·(n·q/q0 + m·s/q0)
// = n+m (a plug-in k-sample e-variable after Turner, Ly and Grünwald, Generic
// E-variables for Exact Sequential k-Sample Tests, 2024). An empty cohort gives 0.
func (c *Change) Logs(l *Logs, candidate, control []uint64, q, s, both []float64) {
	n, m := total(candidate), total(control)
	for k, kappa := range c.kappa {
		l[k] = 0
		if n == 0 || m == 0 {
			continue
		}
		for b := range candidate {
			qb, sb := kappa*q[b]+(1-kappa)*both[b], kappa*s[b]+(1-kappa)*both[b]
			q0 := (n*qb + m*sb) / (n + m)
			if x := candidate[b]; x > 0 {
				l[k] += float64(x) * math.Log(qb/q0)
			}
			if x := control[b]; x > 0 {
				l[k] += float64(x) * math.Log(sb/q0)
			}
		}
	}
}

// Odds bets that the units are split otherwise than intended: null, each of the
// n+m belongs to the candidate with probability π, independently.
type Odds struct {
	Prior Prior
	odds  []float64
}

// NewOdds returns bets on fewer and on more units than intended.
func NewOdds() *Odds {
	odds := []float64{.5, .8, .9, .95, 1.05, 1.1, 1.25, 2}
	return &Odds{Prior: NewPrior(.2, even(len(odds))...), odds: odds}
}

// Logs sets the bets on a block, n·ln g - (n+m)·ln(1+π(g-1)) for each multiple g
// of the odds.
func (o *Odds) Logs(l *Logs, n, m, share float64) {
	for k, g := range o.odds {
		l[k] = n*math.Log(g) - (n+m)*math.Log1p(share*(g-1))
	}
}

// Mean bets on the candidate's mean alone, of outcomes in [0,1]: null μ ≤ limit,
// or μ ≥ limit where it bets on below.
type Mean struct {
	Prior  Prior
	dir    float64
	limit  float64
	lambda []float64
}

// MeanWorse bets against μ ≤ limit, 0 ≤ limit ≤ 1.
func MeanWorse(limit float64) *Mean { return newMean(1, limit, .2) }

// MeanWithin bets against μ ≥ limit.
func MeanWithin(limit float64) *Mean { return newMean(-1, limit, 0) }

func newMean(dir, limit, cash float64) *Mean {
	lambda := []float64{.125, .25, .5, 1, 2, 4}
	return &Mean{Prior: NewPrior(cash, even(len(lambda))...), dir: dir, limit: limit, lambda: lambda}
}

// Logs sets the bets on a block of outcomes 0, 1/(K-1) … 1 counted in K cells:
//
//	Σ log1p(±λ·(v-limit))
//
// with λ such that no outcome loses more than 95 % (after Waudby-Smith and
// Ramdas, Estimating Means of Bounded Random Variables by Betting, 2023).
func (e *Mean) Logs(l *Logs, candidate []uint64) {
	worst := e.limit
	if e.dir < 0 {
		worst = 1 - e.limit
	}
	most := math.Inf(1)
	if worst > 0 {
		most = .95 / worst
	}
	for k, lambda := range e.lambda {
		l[k] = 0
		for b, c := range candidate {
			if c > 0 {
				v := float64(b) / float64(len(candidate)-1)
				l[k] += float64(c) * math.Log1p(e.dir*min(lambda, most)*(v-e.limit))
			}
		}
	}
}

// ScoreWorse bets against μ_candidate ≤ μ_control of a score's badness.
func ScoreWorse() *Difference { return ScoreBeyond(0) }

// ScoreBeyond bets against μ_candidate ≤ μ_control + delta of a score's badness:
// a score is seldom as lopsided as a rare rate, so the stakes are smaller than
// [DifferenceBeyond]'s.
func ScoreBeyond(delta float64) *Difference {
	return newDifference(1, delta, .2, .125, .25, .5, 1, 2, 4)
}

// ScoreWithin bets against μ_candidate ≥ μ_control + delta of a score's badness.
func ScoreWithin(delta float64) *Difference {
	return newDifference(-1, delta, 0, .125, .25, .5, 1, 2, 4)
}
