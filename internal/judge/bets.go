package judge

import (
	"math"

	"github.com/stagedrollout/rollout/internal/evalue"
	"github.com/stagedrollout/rollout/internal/evidence"
)

// A bet is an engine together with what it counts as an event.
type bet struct {
	ratio   *evalue.Ratio // exactly one of seven
	diff    *evalue.Difference
	level   *evalue.Level
	mean    *evalue.Mean
	change  *evalue.Change
	odds    *evalue.Odds
	moments *evalue.Bernstein

	// Of a Timing: an event is an outcome beyond a threshold, the control's
	// quantile so far for the control and shift cells higher for the candidate;
	// or a fixed one, for both: from that cell on.
	quantile float64
	shift    int
	fixed    bool
	cell     int
	bit      int // its mark, on the rollback side

	// Of a Mix: an event is a label that the candidate has had more often so far,
	// by z standard errors; or each set of labels is an event of its own.
	set  bool
	z    float64
	sets bool
}

func (b *bet) prior() evalue.Prior {
	switch {
	case b.ratio != nil:
		return b.ratio.Prior
	case b.diff != nil:
		return b.diff.Prior
	case b.level != nil:
		return b.level.Prior
	case b.mean != nil:
		return b.mean.Prior
	case b.change != nil:
		return b.change.Prior
	case b.moments != nil:
		return b.moments.Prior
	}
	return b.odds.Prior
}

// look is what of the groups' totals the bet is about.
func (b *bet) look(kind Kind) look {
	switch {
	case kind.IsScore():
		return look{sum: 1, square: 2, scale: 1. / (ScoreCells - 1)}
	case kind.mix():
		return look{all: true}
	case kind.timing():
		return look{sum: 1 + b.bit, square: 1 + b.bit}
	}
	return look{sum: 1, square: 1}
}

// counts is a block as a gate sees it: what is not in one fold of the units, for
// each fold, and all of it.
type counts struct {
	grouped    bool
	unmarked   bool                // of a Timing: some came before there were thresholds
	candidate  [folds + 1][]uint64 // cells without fold i; the last: all
	control    [folds + 1][]uint64
	touched    [folds]bool // the fold has any outcome
	cells      []uint64    // behind them
	histograms [2][]uint64 // of a Timing, candidate and control
}

// view prepares a block for the gates of its metric. Of a Timing the cells are
// those of its marks, without what came before there were thresholds.
func (c *counts) view(b *Block, timing bool, marks int) {
	candidate, control := b.Candidate, b.Control
	width := max(len(candidate), len(control))
	drop := 0
	if timing {
		c.histograms = [2][]uint64{candidate, control}
		width, drop = MarkCells(marks), 1
	}
	whole := folds
	c.grouped = width > 0 && (len(b.CandidateBy) > 0 || len(b.ControlBy) > 0) &&
		len(b.CandidateBy)%(width*folds) == 0 && len(b.ControlBy)%(width*folds) == 0
	if !c.grouped {
		if !timing {
			c.candidate[whole], c.control[whole] = candidate, control
		}
		return
	}
	keep := width - drop
	if need := 2 * (folds + 1) * keep; cap(c.cells) < need {
		c.cells = make([]uint64, need)
	}
	c.cells = c.cells[:2*(folds+1)*keep]
	clear(c.cells)
	clear(c.touched[:])
	c.unmarked = false
	at := func(arm, fold int) []uint64 {
		i := (arm*(folds+1) + fold) * keep
		return c.cells[i : i+keep : i+keep]
	}
	for arm, by := range [2][]uint64{b.CandidateBy, b.ControlBy} {
		all := at(arm, whole)
		for i, n := range by {
			cell, group := i%width, i/width
			if n == 0 || cell >= keep {
				c.unmarked = c.unmarked || n > 0
				continue
			}
			all[cell] = saturate(all[cell], n)
			row := at(arm, group%folds)
			row[cell] = saturate(row[cell], n)
			c.touched[group%folds] = true
		}
		for f := range folds {
			row := at(arm, f)
			for cell := range row {
				row[cell] = all[cell] - min(row[cell], all[cell])
			}
		}
	}
	for f := range folds + 1 {
		c.candidate[f], c.control[f] = at(0, f), at(1, f)
	}
}

// logs sets the bets of each row of a process on a block: as many as leave one
// fold of the units out, or one for the whole block. ok is false where nothing
// can be bet, because a cohort is missing or nothing is known to bet on.
func (b *bet) logs(dst []evalue.Logs, kind Kind, mem *Memory, blk *Block, c *counts) bool {
	defer b.whole(c)()
	var at place
	if !b.prepare(&at, kind, mem, c) {
		return false
	}
	if !b.row(&dst[0], &at, kind, blk, c, folds) {
		return false
	}
	if len(dst) == 1 {
		return true
	}
	whole := dst[0]
	for f := range dst {
		if dst[f] = whole; c.grouped && c.touched[f] {
			b.row(&dst[f], &at, kind, blk, c, f)
		}
	}
	return true
}

// whole has a fixed threshold looked up in the histogram, where marks do not tell:
// it needs no control, as those of its neighbours may. What it returns ends that.
func (b *bet) whole(c *counts) (done func()) {
	if !b.fixed || !c.grouped || !c.unmarked {
		return func() {}
	}
	c.grouped = false
	return func() { c.grouped = true }
}

// place is where earlier blocks say that a bet belongs.
type place struct {
	c0         float64
	in         uint64 // of a set of labels: which are in it
	arms       [2]evalue.Arm
	q, s, both [maxLabels]float64
	tau        int // of a Timing without groups: the control's first cell beyond
}

// maxLabels is how many cells a Mix may have.
const maxLabels = 10

func (b *bet) prepare(at *place, kind Kind, mem *Memory, c *counts) bool {
	known := true
	switch {
	case kind.timing():
		if b.fixed {
			at.tau = b.cell
			break
		}
		if mem.Seen < warmUp {
			return false
		}
		at.tau, at.c0, known = mem.Control.quantile(b.quantile)
		at.tau++
		if at.tau+b.shift >= evidence.Cells {
			return false // none the candidate could be beyond
		}
	case b.moments != nil:
		at.arms[0].Mean, at.arms[0].Var = mem.Candid.moments(unit)
		at.arms[1].Mean, at.arms[1].Var = mem.Past.moments(unit)
	case b.change != nil:
		k := len(c.candidate[folds])
		if len(mem.Mix[0]) != k || len(mem.Mix[1]) != k || k > maxLabels || sum(mem.Mix[1]) == 0 {
			return false
		}
		b.change.Estimate(at.q[:k], at.s[:k], at.both[:k], mem.Mix[0], mem.Mix[1])
	case b.set:
		at.in = mem.more(b.z)
		if at.in == 0 {
			return false
		}
		at.c0 = mem.part(at.in)
	case kind.IsScore():
		at.c0, known = mem.mean(1. / (ScoreCells - 1))
	default:
		at.c0, known = mem.mean(1)
	}
	return known || b.diff == nil // the first control outcomes only tell where to bet
}

// row sets the bets on what of the block is in one row of c.
func (b *bet) row(l *evalue.Logs, at *place, kind Kind, blk *Block, c *counts, row int) bool {
	candidate, control := c.candidate[row], c.control[row]
	switch {
	case b.odds != nil:
		n, m := sum(candidate), sum(control)
		if n+m == 0 || !(blk.Share > 0 && blk.Share < 1) {
			return false
		}
		b.odds.Logs(l, float64(n), float64(m), blk.Share)
		return true
	case b.moments != nil:
		for i, m := range blk.Moments {
			at.arms[i].N, at.arms[i].S, at.arms[i].S2 = m.N, m.S, m.S2
		}
		b.moments.Logs(l, at.arms[0], at.arms[1])
		return blk.Moments[0].N > 0 && (kind == ScoreAtLeast || blk.Moments[1].N > 0)
	case b.mean != nil:
		b.mean.Logs(l, candidate)
		return sum(candidate) > 0
	case b.change != nil:
		k := len(candidate)
		b.change.Logs(l, candidate, control, at.q[:k], at.s[:k], at.both[:k])
		return sum(candidate) > 0 && sum(control) > 0
	case kind.IsScore():
		b.diff.LogsCells(l, candidate, control, at.c0)
		return sum(candidate) > 0 && sum(control) > 0
	}
	n, x, m, y := b.events(at, kind, c, row)
	switch {
	case n == 0 || m == 0 && b.level == nil:
		*l = evalue.Logs{}
		return false
	case b.level != nil:
		b.level.Logs(l, float64(n), float64(x))
	case b.ratio != nil:
		b.ratio.Logs(l, float64(n), float64(m), float64(x), float64(y))
	default:
		b.diff.Logs(l, float64(n), float64(m), float64(x), float64(y), at.c0)
	}
	return true
}

// events returns the outcomes of a row and the events among them.
func (b *bet) events(at *place, kind Kind, c *counts, row int) (n, x, m, y uint64) {
	candidate, control := c.candidate[row], c.control[row]
	switch {
	case kind.timing() && !c.grouped:
		shift := b.shift
		return sum(c.histograms[0]), from(c.histograms[0], at.tau+shift), sum(c.histograms[1]), from(c.histograms[1], at.tau)
	case kind.timing():
		for set, k := range candidate {
			n, m = n+k, m+control[set]
			if set>>b.bit&1 != 0 {
				x, y = x+k, y+control[set]
			}
		}
		return n, x, m, y
	case b.set:
		for i, k := range candidate {
			if at.in>>i&1 != 0 {
				x, y = saturate(x, k), saturate(y, control[i])
			}
		}
		return sum(candidate), x, sum(control), y
	}
	return sum(candidate), event(candidate), sum(control), event(control)
}

// more returns the set of labels that the candidate has had more often than the
// control so far, by more than z standard errors.
func (m *Memory) more(z float64) (set uint64) {
	n, s := float64(sum(m.Mix[0])), float64(sum(m.Mix[1]))
	if n == 0 || s == 0 || len(m.Mix[0]) != len(m.Mix[1]) {
		return 0
	}
	for i := range m.Mix[0] {
		p, q := float64(m.Mix[0][i])/n, float64(m.Mix[1][i])/s
		if p-q > z*math.Sqrt(p*(1-p)/n+q*(1-q)/s) {
			set |= 1 << i
		}
	}
	return set
}

// part returns the control's share of a set of labels so far.
func (m *Memory) part(set uint64) float64 {
	all, in := 0., 0.
	for i, n := range m.Mix[1] {
		all += float64(n)
		if set>>i&1 != 0 {
			in += float64(n)
		}
	}
	if all == 0 {
		return 0
	}
	return in / all
}

// proofs sets the bets of the proof on a block: a row, in dst, or one for each
// set of labels.
func (b *bet) proofs(dst []evalue.Logs, kind Kind, mem *Memory, blk *Block, c *counts) []evalue.Logs {
	if !b.sets {
		if kind.timing() { // the proof has thresholds of its own
			was := c.grouped
			c.grouped = false
			defer func() { c.grouped = was }()
		}
		if !b.logs(dst, kind, mem, blk, c) {
			return nil
		}
		return dst
	}
	candidate, control := c.candidate[folds], c.control[folds]
	n, m := sum(candidate), sum(control)
	k := len(candidate)
	if n == 0 || m == 0 || len(mem.Mix[1]) != k || sum(mem.Mix[1]) == 0 {
		return nil
	}
	dst = make([]evalue.Logs, 1<<k-2)
	for i := range dst {
		set, x, y := uint64(i+1), uint64(0), uint64(0)
		for l := range candidate {
			if set>>l&1 != 0 {
				x, y = x+candidate[l], y+control[l]
			}
		}
		b.diff.Logs(&dst[i], float64(n), float64(m), float64(x), float64(y), mem.part(set))
	}
	return dst
}

// remember adds the block to what is remembered of its metric in its ring.
func (m *Memory) remember(b *Block, kind Kind, marks int, c *counts) {
	switch {
	case kind.timing():
		m.timing(b.Candidate, b.Control, sum(b.Control))
	case kind.mix():
		for arm, cells := range [2][]uint64{b.Candidate, b.Control} {
			if len(m.Mix[arm]) != len(cells) && len(cells) > 0 {
				m.Mix[arm] = make([]uint64, len(cells))
			}
			for i, n := range cells {
				m.Mix[arm][i] = saturate(m.Mix[arm][i], n)
			}
		}
		for arm := range m.Mix { // a cohort that never had any has none of each
			if m.Mix[arm] == nil && m.Mix[1-arm] != nil {
				m.Mix[arm] = make([]uint64, len(m.Mix[1-arm]))
			}
		}
	case kind == Split:
	case b.Moments != [2]Moments{}:
		x, y := b.Moments[0].tally(), b.Moments[1].tally()
		m.rate(x.N, x.X, y.N, y.X)
	case kind.IsScore():
		m.rate(sum(b.Candidate), points(b.Candidate), sum(b.Control), points(b.Control))
	default:
		m.rate(sum(b.Candidate), event(b.Candidate), sum(b.Control), event(b.Control))
	}
	if c.grouped {
		m.group(0, b.CandidateBy, kind, marks)
		m.group(1, b.ControlBy, kind, marks)
	}
}

// group adds a cohort's block to the totals by group.
func (m *Memory) group(arm int, by []uint64, kind Kind, marks int) {
	g := &m.By[arm]
	var width, out int
	switch {
	case kind.timing():
		width, out = MarkCells(marks), 1+marks
	case kind.IsScore():
		width, out = ScoreCells, 3
	case kind.mix():
		width = len(m.Mix[arm])
		out = 1 + width
	case kind == Split:
		width, out = 1, 1
	default:
		width, out = 2, 2
	}
	if width == 0 || len(by) == 0 || len(by)%width != 0 {
		return
	}
	groups := len(by) / width
	for i, n := range by {
		group, cell := i/width, i%width
		if n == 0 || kind.timing() && cell == width-1 {
			continue
		}
		g.add(groups, out, group, 0, n)
		switch {
		case kind.timing():
			for bit := range marks {
				if cell>>bit&1 != 0 {
					g.add(groups, out, group, 1+bit, n)
				}
			}
		case kind.IsScore():
			g.add(groups, out, group, 1, times(n, uint64(cell)))
			g.add(groups, out, group, 2, times(n, uint64(cell*cell)))
		case kind.mix():
			g.add(groups, out, group, 1+cell, n)
		case kind != Split && cell == 1:
			g.add(groups, out, group, 1, n)
		}
	}
}

// points returns the badness of a Score's outcomes, in units of 1/32.
func points(cells []uint64) uint64 {
	s := uint64(0)
	for b, n := range cells {
		s = saturate(s, times(n, uint64(b)))
	}
	return s
}

// squares returns the sum of their squares, in units of 1/32².
func squares(cells []uint64) uint64 {
	s := uint64(0)
	for b, n := range cells {
		s = saturate(s, times(n, uint64(b*b)))
	}
	return s
}

// times returns a·b or the largest number.
func times(a, b uint64) uint64 {
	if b != 0 && a > math.MaxUint64/b {
		return math.MaxUint64
	}
	return a * b
}

func (k Kind) timing() bool {
	return k == QuantileWithinFactor || k == QuantileAtMost || k == TimingNoWorse
}

// IsScore reports whether the gate is of a Score.
func (k Kind) IsScore() bool { return k == ScoreWithin || k == ScoreAtLeast || k == ScoreNoWorse }
func (k Kind) mix() bool     { return k == MixWithin || k == MixNoChange }

// width is how many cells a block of the gate has.
func (s *Spec) width() int {
	switch {
	case s.Kind.timing():
		return evidence.Cells
	case s.Kind.IsScore():
		return ScoreCells
	case s.Kind.mix():
		return len(s.Labels)
	case s.Kind == Split:
		return 1
	}
	return 2
}

// fits reports whether the block is of the gate's metric.
func (s *Spec) fits(b *Block) bool {
	ok := func(cells []uint64) bool { return len(cells) == 0 || len(cells) == s.width() && !s.Moments }
	return s.Kind != Check && ok(b.Candidate) && ok(b.Control) && (s.Moments || b.Moments == [2]Moments{})
}

// tally is the same in units of 1/32.
func (m Moments) tally() Tally {
	const k = ScoreCells - 1
	return Tally{N: uint64(m.N), X: uint64(m.S*k + .5), Squares: uint64(m.S2*k*k + .5)}
}

func (m Moments) arm() evalue.Arm { return evalue.Arm{N: m.N, S: m.S, S2: m.S2} }
