// Package evalue holds the e-processes behind the gates: evidence against a
// null hypothesis that may be looked at after every block.
//
// The unit is the block: n candidate and m control outcomes that came in
// between two looks. Within a block a bet multiplies, over the outcomes, a
// factor 1+g with g fixed before the block's outcomes are seen (it may depend
// on n, m and earlier blocks). Where the null makes n·E[g_candidate] +
// m·E[g_control] ≤ 0, the product has mean at most exp(0) = 1, because
// 1+u ≤ e^u. So the product over blocks is a supermartingale under any drift
// of the base rate between blocks and any change of the share, and reaches
// 1/α with probability at most α (Ville's inequality).
//
// Engines ([Ratio], [Difference], [Level]) give the logarithms of a grid of
// such bets in closed form. A [Bank] spreads the wealth of processes over the grid.
package evalue

import "math"

// MaxBets is the number of bets a grid may have.
const MaxBets = 12

// limit bounds every logarithm, so that none is ever infinite (JSON has no
// infinity). Real evidence stays far inside.
const limit = 1e9

// Logs are the logarithms of a grid's bets on one block. What is beyond the
// grid is not read.
type Logs [MaxBets]float64

// Prior is how a process divides its wealth at the start, and whereto it keeps
// returning a little: the part held as cash, then one for each bet. The parts
// are above 0 (cash may be 0) and sum to 1.
type Prior []float64

// NewPrior returns a Prior of cash, 0 ≤ cash < 1, and bets in proportion to weights.
func NewPrior(cash float64, weights ...float64) Prior {
	sum := 0.
	for _, w := range weights {
		sum += w
	}
	p := Prior{cash}
	for _, w := range weights {
		p = append(p, (1-cash)*w/sum)
	}
	return p
}

// even returns n equal weights.
func even(n int) []float64 {
	w := make([]float64, n)
	for i := range w {
		w[i] = 1
	}
	return w
}

// clamp keeps a logarithm finite. What is not a number is no evidence.
func clamp(x float64) float64 {
	if x != x {
		return 0
	}
	return min(max(x, -limit), limit)
}

// LogMean returns the logarithm of the mean of what logs are the logarithms of. A
// mean of e-values is an e-value whatever their dependence, and the only
// admissible way to merge them (Vovk and Wang, E-values, 2021). Of none it is 0.
func LogMean(logs []float64) float64 {
	if len(logs) == 0 {
		return 0
	}
	return LogSum(logs) - math.Log(float64(len(logs)))
}

// LogSum returns the logarithm of Σ exp(logs), -Inf of none.
func LogSum(logs []float64) float64 {
	top := math.Inf(-1)
	for _, l := range logs {
		top = max(top, l)
	}
	if math.IsInf(top, -1) {
		return top
	}
	sum := 0.
	for _, l := range logs {
		sum += math.Exp(l - top)
	}
	return top + math.Log(sum)
}
