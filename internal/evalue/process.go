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
// such bets in closed form. A [Process] spreads its wealth over the grid.
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

// Process is an e-process: the wealth of a portfolio of bets that started at
// 1. The zero value has not bet. It survives JSON bit by bit.
type Process struct {
	LogE   float64   `json:"logE"`             // natural logarithm of the wealth
	Blocks uint64    `json:"blocks,omitempty"` // consumed
	Pi     []float64 `json:"pi,omitempty"`     // parts of the wealth, as a Prior; empty: as the prior
}

// Update consumes one block. After it every part is moved towards the prior by
// ε = 1/(720+b) at the b-th block, the fixed share of Herbster and Warmuth
// (Tracking the Best Expert, 1998): without it the wealth of the bets dies
// while all is well and a late regression is found late; with a constant ε it
// leaks for ever. Only the first Update of a Process allocates.
func (p *Process) Update(prior Prior, logs *Logs) {
	if len(p.Pi) != len(prior) {
		p.Pi = append(p.Pi[:0], prior...)
	}
	top := math.Inf(-1)
	var f [MaxBets + 1]float64 // f[0] is cash: log 1
	for k := range prior {
		if k > 0 {
			f[k] = clamp(logs[k-1])
		}
		if p.Pi[k] > 0 {
			top = max(top, f[k])
		}
	}
	sum := 0.
	for k := range prior {
		f[k] = p.Pi[k] * math.Exp(f[k]-top)
		sum += f[k]
	}
	if !(sum > 0) { // no wealth anywhere: only a damaged state
		p.Pi = append(p.Pi[:0], prior...)
		return
	}
	p.LogE = clamp(p.LogE + top + math.Log(sum))
	eps := 1 / (720 + float64(p.Blocks))
	p.Blocks++
	for k, w := range prior {
		p.Pi[k] = (1-eps)*(f[k]/sum) + eps*w
	}
}

// clamp keeps a logarithm finite. What is not a number is no evidence.
func clamp(x float64) float64 {
	if x != x {
		return 0
	}
	return min(max(x, -limit), limit)
}

// LogMean returns the logarithm of the mean of the processes' wealth. A mean of
// e-values is an e-value whatever their dependence, and the only admissible way
// to merge them (Vovk and Wang, E-values, 2021). Of none it is 0.
func LogMean(ps []Process) float64 {
	switch len(ps) {
	case 0:
		return 0
	case 1:
		return ps[0].LogE
	}
	top := math.Inf(-1)
	for i := range ps {
		top = max(top, ps[i].LogE)
	}
	sum := 0.
	for i := range ps {
		sum += math.Exp(ps[i].LogE - top)
	}
	return clamp(top + math.Log(sum/float64(len(ps))))
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
