package main

import (
	"math"
	"math/rand/v2"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
)

// A source fills a block with a tick's outcomes of both cohorts. Each run has its own.
type source func(tick int, r *rand.Rand, b *judge.Block)

// A maker makes the source of a run.
type maker func(r *rand.Rand) source

// sizes of the cohorts of a tick.
func sizes(share float64, perTick int) (n, m int) {
	n = int(math.Round(share * float64(perTick)))
	return n, perTick - n
}

// rates is a Rate of which a share of a tick's outcomes goes to the candidate.
func rates(candidate, control, share float64, perTick int) maker {
	n, m := sizes(share, perTick)
	c, s := newBinomial(n, candidate), newBinomial(m, control)
	return func(*rand.Rand) source {
		return func(_ int, r *rand.Rand, b *judge.Block) {
			x, y := c.draw(r), s.draw(r)
			b.Candidate = append(b.Candidate[:0], uint64(n-x), uint64(x))
			b.Control = append(b.Control[:0], uint64(m-y), uint64(y))
		}
	}
}

// phases plays one source after another, each for so many ticks.
func phases(ticks int, makers ...maker) maker {
	return func(r *rand.Rand) source {
		var each []source
		for _, m := range makers {
			each = append(each, m(r))
		}
		return func(tick int, r *rand.Rand, b *judge.Block) {
			each[min(tick/ticks, len(each)-1)](tick, r, b)
		}
	}
}

// stress is a Rate whose base walks at random between .2 and 5 % and jumps twentyfold for incidents that hit both
// cohorts, while the share and the traffic change.
func stress() maker {
	return func(*rand.Rand) source {
		base, incident := .01, 0
		return func(tick int, r *rand.Rand, b *judge.Block) {
			base = min(max(base*math.Exp(r.NormFloat64()*.05), .002), .05)
			if incident--; incident < 0 && r.Float64() < 1./180 {
				incident = 60
			}
			p := base
			if incident > 0 {
				p = min(20*base, .9)
			}
			share := [...]float64{.01, .05, .1, .25, .5, .75}[tick/120%6]
			perTick := [...]int{10, 100, 1000}[tick/40%3]
			fill := func(dst []uint64, share float64) []uint64 {
				n, x := 0, 0
				for range perTick {
					if r.Float64() < share {
						n++
						if r.Float64() < p {
							x++
						}
					}
				}
				return append(dst[:0], uint64(n-x), uint64(x))
			}
			b.Candidate, b.Control = fill(b.Candidate, share), fill(b.Control, 1-share)
		}
	}
}

// drawn fills the cells of a block with outcomes of either distribution.
func drawn(candidate, control []float64, share float64, perTick int) maker {
	n, m := sizes(share, perTick)
	c, s := newSampler(candidate), newSampler(control)
	fill := func(cells []uint64, s *sampler, n int, r *rand.Rand) []uint64 {
		if cells == nil {
			cells = make([]uint64, len(s.q))
		}
		clear(cells)
		for range n {
			cells[s.draw(r)]++
		}
		return cells
	}
	return func(*rand.Rand) source {
		return func(_ int, r *rand.Rand, b *judge.Block) {
			b.Candidate, b.Control = fill(b.Candidate, c, n, r), fill(b.Control, s, m, r)
		}
	}
}

const median = 20 * time.Millisecond

// latencies is a Timing whose control has a median of 20 ms and whose candidate is slower by the factor.
func latencies(factor, share float64, perTick int) maker {
	return drawn(lognormal(time.Duration(float64(median)*factor), .5), lognormal(median, .5), share, perTick)
}

// tail is a Timing of whose candidate a part takes three times the control's p99.
func tail(part, share float64, perTick int) maker {
	s := lognormal(median, .5)
	c := make([]float64, len(s))
	for i := range s {
		c[i] = s[i] * (1 - part)
	}
	slow := time.Duration(3 * float64(median) * math.Exp(.5*2.3263))
	c[evidence.Index(slow)] += part
	return drawn(c, s, share, perTick)
}

// scores is a Score of either mean, Beta-distributed, with a standard deviation of .155 of its range where the mean is .80.
func scores(candidate, control, share float64, perTick int) maker {
	return drawn(betaCells(judge.ScoreCells, 1-candidate, concentration), betaCells(judge.ScoreCells, 1-control, concentration), share, perTick)
}

const concentration = .8*.2/(.155*.155) - 1

// scoreVar is the variance of a score of this mean.
func scoreVar(mean float64) float64 { return mean * (1 - mean) / (concentration + 1) }

// mixes is a Mix of six labels of which the candidate has moved a part from the first to the last.
func mixes(moved, share float64, perTick int) maker {
	return drawn(mixOf(moved), mixOf(0), share, perTick)
}

func mixOf(moved float64) []float64 { return []float64{.40 - moved, .25, .15, .10, .07, .03 + moved} }

// population is users who come back, each with an error rate of its own.
type population struct {
	users   int
	icc     float64 // correlation of two outcomes of one user
	factor  float64 // of the candidate's rate
	looper  float64 // part of the candidate's traffic that is one user who always fails
	share   float64
	perTick int
}

// maker makes a new population for each run: who is in which group, how busy, how unlucky.
func (p population) maker() maker {
	const base = .01
	return func(r *rand.Rand) source {
		k := 1/p.icc - 1
		rate := make([][2]float64, p.users)
		busy := make([]float64, p.users)
		group := make([]uint8, p.users)
		in := make([]bool, p.users)
		for u := range p.users {
			rate[u][0] = beta(base*k, (1-base)*k, r)
			rate[u][1] = min(rate[u][0]*p.factor, 1)
			busy[u] = math.Exp(r.NormFloat64())
			bucket := r.Uint64()
			group[u], in[u] = uint8(bucket%evidence.Groups), float64(bucket)/(1<<64) < p.share
		}
		who := newSampler(busy)
		loop := int(r.Uint64() % evidence.Groups)
		return func(_ int, r *rand.Rand, b *judge.Block) {
			if b.CandidateBy == nil {
				b.CandidateBy, b.ControlBy = make([]uint64, 2*evidence.Groups), make([]uint64, 2*evidence.Groups)
			}
			clear(b.CandidateBy)
			clear(b.ControlBy)
			n := 0
			for range p.perTick {
				u := who.draw(r)
				if in[u] {
					n++
					b.CandidateBy[2*int(group[u])+bit(r.Float64() < rate[u][1])]++
				} else {
					b.ControlBy[2*int(group[u])+bit(r.Float64() < rate[u][0])]++
				}
			}
			if p.looper > 0 {
				for range n {
					if r.Float64() < p.looper/(1-p.looper) {
						b.CandidateBy[2*loop+1]++
					}
				}
			}
			b.Candidate, b.Control = fold(b.Candidate, b.CandidateBy, 2), fold(b.Control, b.ControlBy, 2)
		}
	}
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// fold adds up the cells of every group.
func fold(dst, by []uint64, width int) []uint64 {
	if dst == nil {
		dst = make([]uint64, width)
	}
	clear(dst)
	for i, n := range by {
		dst[i%width] += n
	}
	return dst
}

// group gives each outcome of a block a group of its own choice, as units that come once have. thresholds are of a Timing,
// whose groups count by marks.
func group(b *judge.Block, kind judge.Kind, thresholds [][2]int, marks int, r *rand.Rand) {
	switch kind {
	case judge.QuantileWithinFactor, judge.QuantileAtMost, judge.TimingNoWorse:
		width := judge.MarkCells(marks)
		b.CandidateBy = scatter(b.CandidateBy, b.Candidate, evidence.Groups, width, marked(thresholds, 1, width), r)
		b.ControlBy = scatter(b.ControlBy, b.Control, evidence.Groups, width, marked(thresholds, 0, width), r)
	case judge.ScoreWithin, judge.ScoreAtLeast, judge.ScoreNoWorse, judge.MixWithin, judge.MixNoChange:
		b.CandidateBy = scatter(b.CandidateBy, b.Candidate, 16, len(b.Candidate), nil, r)
		b.ControlBy = scatter(b.ControlBy, b.Control, 16, len(b.Control), nil, r)
	default:
		b.CandidateBy = scatter(b.CandidateBy, b.Candidate, evidence.Groups, 2, nil, r)
		b.ControlBy = scatter(b.ControlBy, b.Control, evidence.Groups, 2, nil, r)
	}
}

// marked returns the marks that an outcome in a cell exceeds, or the cell for none known.
func marked(thresholds [][2]int, cohort, width int) func(int) int {
	return func(cell int) int {
		if len(thresholds) == 0 {
			return width - 1
		}
		set := 0
		for i, t := range thresholds {
			if cell >= t[cohort] {
				set |= 1 << i
			}
		}
		return set
	}
}

func scatter(dst, cells []uint64, groups, width int, of func(int) int, r *rand.Rand) []uint64 {
	if len(dst) != groups*width {
		dst = make([]uint64, groups*width)
	}
	clear(dst)
	bits, left := uint64(0), 0
	for cell, n := range cells {
		if n == 0 {
			continue
		}
		at := cell
		if of != nil {
			at = of(cell)
		}
		for range n {
			if left == 0 {
				bits, left = r.Uint64(), 10
			}
			dst[int(bits)&(groups-1)*width+at]++
			bits, left = bits>>6, left-1
		}
	}
	return dst
}
