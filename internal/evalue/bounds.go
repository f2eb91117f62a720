package evalue

import "math"

// Bounds is a confidence sequence of a difference of two means in [0,1], or of
// one mean: an interval that may be looked at after every block and covers, with
// the probability asked for at all looks together, the average of the true
// differences, each block weighted as it was bet. It is the empirical Bernstein
// form of betting (Waudby-Smith and Ramdas, 2023), of which a difference enters
// linearly, so three sums are enough. Bounds of several strata add up. The zero
// value has seen nothing.
type Bounds struct {
	Weight float64 `json:"w,omitempty"` // Σ of the stakes
	Sum    float64 `json:"s,omitempty"` // Σ of the stakes times the differences seen
	Cost   float64 `json:"c,omitempty"` // Σ of what not knowing the variance costs
	Seen   float64 `json:"n,omitempty"` // effective outcomes
}

// Arm is one cohort's part of a block: how many outcomes, their sum and the sum
// of their squares, and an estimate of their mean and variance from earlier blocks.
type Arm struct {
	N, S, S2  float64
	Mean, Var float64
}

// level is ln(1/.025): both sides together miss one time in twenty.
var level = -math.Log(.025)

// Difference consumes a block of both cohorts. An empty cohort changes nothing.
func (b *Bounds) Difference(c, s Arm) {
	if c.N == 0 || s.N == 0 {
		return
	}
	fc, fs := s.N/(c.N+s.N), c.N/(c.N+s.N)
	w := c.N * fc
	lambda := b.stake(w, fc*c.Var+fs*s.Var)
	b.Weight += lambda * w
	b.Sum += lambda * w * (c.S/c.N - s.S/s.N)
	b.Cost += psi(lambda*fc)*c.spread() + psi(lambda*fs)*s.spread()
	b.Seen += w
}

// Level consumes a block of the candidate alone.
func (b *Bounds) Level(c Arm) {
	if c.N == 0 {
		return
	}
	lambda := b.stake(c.N, c.Var)
	b.Weight += lambda * c.N
	b.Sum += lambda * c.S
	b.Cost += psi(lambda) * c.spread()
	b.Seen += c.N
}

// stake is how much is bet on a block of weight w: what would give the narrowest
// interval about now, and no more than half.
func (b *Bounds) stake(w, variance float64) float64 {
	n := b.Seen + w
	return min(math.Sqrt(2*level/(max(variance, 1e-9)*n*math.Log1p(n))), .5)
}

// spread is Σ(x-mean)².
func (a Arm) spread() float64 { return max(a.S2-2*a.Mean*a.S+a.N*a.Mean*a.Mean, 0) }

func psi(l float64) float64 { return -math.Log1p(-l) - l }

// Add adds another stratum's bounds.
func (b *Bounds) Add(o Bounds) {
	b.Weight += o.Weight
	b.Sum += o.Sum
	b.Cost += o.Cost
	b.Seen += o.Seen
}

// Interval is the interval after what was seen, at 95 %; ok is false before the
// first block. temper ≥ 1 widens it for outcomes that depend on each other.
func (b *Bounds) Interval(temper float64) (lo, hi float64, ok bool) {
	if !(b.Weight > 0) {
		return 0, 0, false
	}
	mid, half := b.Sum/b.Weight, (b.Cost*max(temper, 1)+level*max(temper, 1))/b.Weight
	return mid - half, mid + half, true
}
