// Package planner says how long the gates will take, before anything is
// exposed: the power of the e-processes of package evalue from the mean and the
// variance of what an outcome adds to their logarithm.
//
// To first order the logarithm of a bet's wealth is a Brownian motion with
// drift, and the time at which it first reaches a barrier has the inverse
// Gaussian distribution (Schrödinger, Zur Theorie der Fall- und Steigversuche an
// Teilchen mit Brownscher Bewegung, 1915; Tweedie, Statistical Properties of
// Inverse Gaussian Distributions, 1957).
package planner

import "math"

// logPhi is the logarithm of the standard normal distribution function. Far in
// the lower tail it is the asymptotic expansion (Abramowitz and Stegun, 26.2.12),
// where the function itself underflows.
func logPhi(x float64) float64 {
	if x > -10 {
		return math.Log(.5 * math.Erfc(-x/math.Sqrt2))
	}
	y := 1 / (x * x)
	return -x*x/2 - math.Log(-x*math.Sqrt(2*math.Pi)) + math.Log1p(-y+3*y*y-15*y*y*y)
}

// passed is the probability that a Brownian motion which has come to have the
// mean and the variance has reached the barrier b > 0 on its way.
func passed(mean, variance, b float64) float64 {
	if b <= 0 {
		return 1
	}
	if !(variance > 1e-12*b*b) {
		if mean >= b {
			return 1
		}
		return 0
	}
	sd := math.Sqrt(variance)
	p := math.Exp(logPhi((mean-b)/sd)) + math.Exp(2*b*mean/variance+logPhi(-(mean+b)/sd))
	return min(p, 1)
}

// horizon is what takes longer than any rollout, in seconds: never.
const horizon = 1e11

// Solve returns the least t, up to a thousandth, at which the probability by(t),
// which grows with t, reaches power; +Inf where it never does.
func Solve(by func(t float64) float64, power float64) float64 {
	lo, hi := 0., 1e-3
	for by(hi) < power {
		if lo, hi = hi, 2*hi; hi > horizon {
			return math.Inf(1)
		}
	}
	for hi-lo > 1e-4*hi {
		if mid := (lo + hi) / 2; by(mid) < power {
			lo = mid
		} else {
			hi = mid
		}
	}
	return hi
}
