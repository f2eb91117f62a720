package judge

import (
	"math/bits"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
)

const (
	// warmUp is how many control outcomes of a Timing a ring must have seen
	// before the first threshold is drawn from them.
	warmUp = 200

	histDecay = .98 // a block, of the recent histograms: half is 34 blocks old
	// excuse is how many recent control events it takes at least to say that
	// the control violates an absolute limit, too.
	excuse = 3
)

// Memory is what is remembered of one metric in one ring beyond its gates: the
// past that bets are built on, and what is shown.
type Memory struct {
	// Of a Rate or a Score: the cohorts' past.
	Candid Tally `json:"candidate,omitzero"`
	Past   Tally `json:"past,omitzero"` // the control's

	// Of a Mix: the cohorts' past, by label.
	Mix [2][]uint64 `json:"mix,omitzero"`

	// Of a Timing: how many control outcomes there ever were, and recent histograms.
	Seen      uint64    `json:"seen,omitempty"`
	Control   Histogram `json:"control,omitzero"`
	Candidate Histogram `json:"shown,omitzero"` // for display

	// By are the totals of the candidate and of the control by group of units.
	By [2]Groups `json:"by,omitzero"`
}

// rate adds a block's outcomes and the events among them, of both cohorts.
func (m *Memory) rate(n, x, controls, y uint64) {
	m.Candid.add(n, x)
	m.Past.add(controls, y)
}

// recent are the parts of what was before that still count a block later: an
// incident of both cohorts must show at once where blocks are large, and after
// some where they are small.
var recent = [...]float64{0, .5, .75, .9}

// late adds a block's control outcomes, n with the events x.
func (p *Part) late(n, x float64) {
	if n == 0 {
		return
	}
	for i, keep := range recent {
		p.Recent[i] = Recent{p.Recent[i].N*keep + n, p.Recent[i].X*keep + x}
	}
}

// mean returns the control's rate so far, of which each event counts as scale.
func (m *Memory) mean(scale float64) (c0 float64, ok bool) {
	if m.Past.N == 0 {
		return 0, false
	}
	return min(float64(m.Past.X)/float64(m.Past.N)*scale, 1), true
}

// timing adds a block's cells, n of the control.
func (m *Memory) timing(candidate, control []uint64, n uint64) {
	m.Candidate.add(candidate)
	m.Control.add(control)
	m.Seen = saturate(m.Seen, n)
}

// Histogram is a latency histogram whose old outcomes fade, a run of cells
// without the empty ones at either end. The zero value is empty.
type Histogram struct {
	From  int       `json:"from,omitempty"`
	Cells []float32 `json:"cells,omitempty"` // their short decimals halve the stored state
}

// faint is the weight below which a cell is forgotten.
const faint = .01

// add fades the histogram by one block and adds the block's cells, if it has any.
func (h *Histogram) add(cells []uint64) {
	lo, hi := 0, len(cells)
	for lo < hi && cells[lo] == 0 {
		lo++
	}
	for hi > lo && cells[hi-1] == 0 {
		hi--
	}
	if lo == hi {
		return
	}
	if len(h.Cells) == 0 || h.From < 0 || h.From+len(h.Cells) > len(cells) { // the latter: damaged
		h.From, h.Cells = lo, nil
	}
	if lo < h.From {
		h.Cells = append(make([]float32, h.From-lo), h.Cells...)
		h.From = lo
	}
	for h.From+len(h.Cells) < hi {
		h.Cells = append(h.Cells, 0)
	}
	for i, w := range h.Cells {
		if w *= histDecay; w < faint {
			w = 0
		}
		h.Cells[i] = w + float32(cells[h.From+i])
	}
	for len(h.Cells) > 0 && h.Cells[len(h.Cells)-1] == 0 {
		h.Cells = h.Cells[:len(h.Cells)-1]
	}
	skip := 0
	for skip < len(h.Cells) && h.Cells[skip] == 0 {
		skip++
	}
	h.From, h.Cells = h.From+skip, h.Cells[skip:]
}

// quantile returns the cell of the q-quantile and the fraction beyond that
// cell; ok is false while the histogram is empty.
func (h *Histogram) quantile(q float64) (cell int, above float64, ok bool) {
	total := 0.
	for _, w := range h.Cells {
		total += float64(w)
	}
	if !(total > 0) {
		return 0, 0, false
	}
	below := 0.
	for i, w := range h.Cells {
		if below += float64(w); below >= q*total {
			return h.From + i, max(0, 1-below/total), true
		}
	}
	return h.From + len(h.Cells) - 1, 0, true
}

// quantileOf returns the q-quantile of the histograms together, as the middle
// of its cell, 0 while they are empty.
func quantileOf(q float64, hs ...*Histogram) time.Duration {
	all := Histogram{Cells: make([]float32, evidence.Cells)}
	for _, h := range hs {
		for i, w := range h.Cells {
			if c := h.From + i; c >= 0 && c < len(all.Cells) {
				all.Cells[c] += w
			}
		}
	}
	cell, _, ok := all.quantile(q)
	if !ok {
		return 0
	}
	lo := evidence.Lower(cell)
	if cell == 0 || cell == evidence.Cells-1 {
		return lo
	}
	return lo + (evidence.Lower(cell+1)-lo)/2
}

func (t *Tally) add(n, x uint64) { t.join(Tally{N: n, X: x}) }

func (t *Tally) join(o Tally) {
	t.N, t.X, t.Squares = saturate(t.N, o.N), saturate(t.X, o.X), saturate(t.Squares, o.Squares)
}

// saturate returns a+b or the largest number.
func saturate(a, b uint64) uint64 {
	if a+b < a {
		return ^uint64(0)
	}
	return a + b
}

// Count returns how many outcomes the cells hold.
func Count(cells []uint64) uint64 { return sum(cells) }

func sum(cells []uint64) uint64 {
	n, over := uint64(0), uint64(0)
	for _, c := range cells {
		s, carry := bits.Add64(n, c, 0)
		n, over = s, over|carry
	}
	return n | -over
}

// from returns how many outcomes are in the cell and beyond.
func from(cells []uint64, cell int) uint64 {
	if len(cells) == 0 {
		return 0
	}
	return sum(cells[min(max(cell, 0), len(cells)):])
}

// event returns a Rate's bad outcomes.
func event(cells []uint64) uint64 { return from(cells, 1) }
