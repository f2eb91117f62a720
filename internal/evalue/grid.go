package evalue

import "math"

// What follows lets a forecast read the bets: how much each outcome would add.

// Gains sets what one outcome v in [0,1] adds to each bet of Logs and LogsCells
// in a block of n candidate and m control outcomes: to candidate if it is one of
// the candidate's, to control if it is one of the control's. An empty cohort
// gives 0.
func (d *Difference) Gains(candidate, control *Logs, n, m, v, c0 float64) {
	for k := range d.lambda {
		candidate[k], control[k] = 0, 0
	}
	if n == 0 || m == 0 {
		return
	}
	most, fc, fs := d.clip(n, m, c0)
	for k, lambda := range d.lambda {
		a := d.dir * min(lambda, most)
		candidate[k] = math.Log1p(a * fc * (v - c0 - d.delta))
		control[k] = math.Log1p(a * fs * (c0 - v))
	}
}

// Gains is the same for a label of which q, s and both are the estimates.
func (c *Change) Gains(candidate, control *Logs, n, m, q, s, both float64) {
	for k, kappa := range c.kappa {
		candidate[k], control[k] = 0, 0
		if n == 0 || m == 0 {
			continue
		}
		q, s := kappa*q+(1-kappa)*both, kappa*s+(1-kappa)*both
		q0 := (n*q + m*s) / (n + m)
		if q0 > 0 {
			candidate[k], control[k] = math.Log(q/q0), math.Log(s/q0)
		}
	}
}

// Smooth is how many pooled outcomes an estimate of a Change is shrunk with.
const Smooth = smooth
