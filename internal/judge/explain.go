package judge

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// tally adds the block to what is shown of the gate.
func (g *gate) tally(p *Part, mem *Memory, b *Block, c *counts) {
	bet := &g.rollback[0]
	var at place
	switch {
	case g.Kind.mix(), g.Kind == Split:
		p.Candidate.add(sum(b.Candidate), 0)
		p.Control.add(sum(b.Control), 0)
		return
	case g.Moments:
		p.bounds(g, b.Moments[0].arm(), b.Moments[1].arm(), unit)
		p.late(b.Moments[1].N, b.Moments[1].S)
		p.Candidate.join(b.Moments[0].tally())
		p.Control.join(b.Moments[1].tally())
		return
	case g.Kind.IsScore():
		p.bounds(g,
			evalue.Arm{N: float64(sum(b.Candidate)), S: float64(points(b.Candidate)) * unit, S2: float64(squares(b.Candidate)) * unit * unit},
			evalue.Arm{N: float64(sum(b.Control)), S: float64(points(b.Control)) * unit, S2: float64(squares(b.Control)) * unit * unit}, unit)
		p.late(float64(sum(b.Control)), float64(points(b.Control))*unit)
		p.Candidate.join(Tally{sum(b.Candidate), points(b.Candidate), squares(b.Candidate)})
		p.Control.join(Tally{sum(b.Control), points(b.Control), squares(b.Control)})
		return
	case g.Kind.timing():
		defer bet.whole(c)()
		if !bet.prepare(&at, g.Kind, mem, c) {
			return
		}
	}
	n, x, m, y := bet.events(&at, g.Kind, c, folds)
	p.bounds(g, evalue.Arm{N: float64(n), S: float64(x), S2: float64(x)}, evalue.Arm{N: float64(m), S: float64(y), S2: float64(y)}, 1)
	p.Candidate.add(n, x)
	p.Control.add(m, y)
	if g.Absolute() {
		p.late(float64(m), float64(y))
	}
}

// unit is the badness between two cells of a Score.
const unit = 1. / (ScoreCells - 1)

// bounds adds a block to the interval.
func (p *Part) bounds(g *gate, c, s evalue.Arm, unit float64) {
	c.Mean, c.Var = p.Candidate.moments(unit)
	s.Mean, s.Var = p.Control.moments(unit)
	if g.Absolute() {
		p.Bounds.Level(c)
	} else {
		p.Bounds.Difference(c, s)
	}
}

// moments estimate the mean and the variance of what was tallied, from nothing to
// a coin's.
func (t Tally) moments(unit float64) (mean, variance float64) {
	n, s := float64(t.N), float64(t.X)*unit
	s2 := float64(t.Squares) * unit * unit
	if t.Squares == 0 && unit == 1 {
		s2 = s // yes or no
	}
	mean = (s + .5) / (n + 1)
	return mean, (.25 + max(s2-2*mean*s+n*mean*mean, 0)) / (n + 1)
}

// cause is the sentence that says what broke the gate.
func (g *gate) cause(s *Gate, dispersion float64) string {
	c, m := s.shown()
	what := g.Metric
	if s.Ring != "" {
		what += " in " + s.Ring
	}
	after := " after " + grouped(c.N) + " outcomes"
	by := ""
	if lo, _, ok := s.interval(dispersion); ok && !g.Absolute() && lo > g.Margin {
		switch {
		case g.Kind == Within || g.Kind == NoWorse:
			by = "at least " + short(100*(lo-g.Margin)) + " points "
		case g.Kind == ScoreWithin || g.Kind == ScoreNoWorse:
			by = "at least " + short((lo-g.Margin)*(g.Hi-g.Lo)) + " "
		}
	}
	switch g.Kind {
	case Within, NoWorse, WithinFactor:
		allowed := "worse"
		switch g.Kind {
		case Within:
			allowed = "worse than allowed"
			if by == "" {
				allowed = "worse by more than the " + short(100*g.Margin) + " points allowed"
			}
		case WithinFactor:
			allowed = "more than the " + short(g.Factor) + " times as many allowed"
		}
		return fmt.Sprintf("%s: %s against %s, %s%s,%s", what, c, m, by, allowed, after)
	case AtMost:
		return fmt.Sprintf("%s: %s, above the %s %% allowed,%s", what, c, short(100*g.Margin), after)
	case Silence:
		return fmt.Sprintf("%s: %s of the decisions had none in time against %s,%s decisions", what, c, m, strings.TrimSuffix(after, " outcomes"))
	case QuantileWithinFactor:
		return fmt.Sprintf("%s: the %s-quantile is more than %s times the control's: %s are slower than that, %s of the control beyond its quantile,%s", what, short(g.Quantile), short(g.Factor), c, m, after)
	case QuantileAtMost:
		return fmt.Sprintf("%s: the %s-quantile is above %v: %s are slower,%s", what, short(g.Quantile), g.Limit, c, after)
	case TimingNoWorse:
		return fmt.Sprintf("%s: slower, %s are beyond the control's 99th percentile against %s,%s", what, c, m, after)
	case ScoreWithin, ScoreNoWorse:
		worse := "worse"
		if g.Kind == ScoreWithin {
			worse = "worse than the " + short(g.Margin*(g.Hi-g.Lo)) + " allowed"
		}
		return fmt.Sprintf("%s: %s against %s, %s%s,%s", what, short(g.score(c)), short(g.score(m)), by, worse, after)
	case ScoreAtLeast:
		return fmt.Sprintf("%s: %s, below the %s asked for,%s", what, short(g.score(c)), short(g.Hi-g.Margin*(g.Hi-g.Lo)), after)
	case MixWithin:
		return fmt.Sprintf("%s: the mix differs by more than the %s allowed,%s", what, short(g.Margin), after)
	case MixNoChange:
		return fmt.Sprintf("%s: the mix has changed,%s", what, after)
	case Split:
		return fmt.Sprintf("%s: %s units in the candidate and %s in the control are not split as the share says", what, grouped(c.N), grouped(m.N))
	}
	return ""
}

// units turns an interval of a Score's badness into its own units: of a
// difference how much worse, of an absolute gate the level.
func (g *gate) units(lo, hi float64) (float64, float64) {
	width := g.Hi - g.Lo
	if g.Absolute() {
		return g.Hi - hi*width, g.Hi - lo*width
	}
	return lo * width, hi * width
}

// summary is a sentence on how the cohorts compare, decided or not.
func (g *gate) summary(st *State, s *Gate, r Result) string {
	c, m := s.shown()
	if c.N == 0 || !g.Absolute() && m.N == 0 {
		return ""
	}
	after := ", after " + grouped(c.N) + " outcomes"
	points := func(lo, hi float64) string {
		switch {
		case !r.Bounded:
			return ""
		case g.Absolute():
			return fmt.Sprintf(", between %s and %s %% at all looks", short(100*max(lo, 0)), short(100*min(hi, 1)))
		}
		return fmt.Sprintf(", between %s and %s points worse at all looks", short(100*max(lo, -1)), short(100*min(hi, 1)))
	}
	switch {
	case g.Kind == Split:
		return fmt.Sprintf("%s: %s units in the candidate, %s in the control", g.Metric, grouped(c.N), grouped(m.N))
	case g.Kind.mix():
		return fmt.Sprintf("%s: the mixes differ by %s%s", g.Metric, short(distance(r.Candidate.Mix, r.Control.Mix)), after)
	case g.Kind.IsScore():
		text := fmt.Sprintf("%s: %s", g.Metric, short(r.Candidate.Mean))
		if !g.Absolute() {
			text += " against " + short(r.Control.Mean)
		}
		if r.Bounded {
			lo, hi := g.units(r.Lo, r.Hi)
			if g.Absolute() {
				text += fmt.Sprintf(", between %s and %s at all looks", short(max(lo, g.Lo)), short(min(hi, g.Hi)))
			} else {
				text += fmt.Sprintf(", between %s and %s worse at all looks", short(lo), short(hi))
			}
		}
		return text + after
	case g.Kind.timing():
		text := fmt.Sprintf("%s: the %s-quantile is %v", g.Metric, short(g.quantile()), r.Candidate.Quantile.Round(10*time.Microsecond))
		if !g.Absolute() {
			text += fmt.Sprintf(" against %v; beyond the threshold are %s against %s", r.Control.Quantile.Round(10*time.Microsecond), c, m)
		} else {
			text += fmt.Sprintf("; beyond the limit are %s", c)
		}
		return text + points(r.Lo, r.Hi) + after
	case g.Absolute():
		return fmt.Sprintf("%s: %s%s%s", g.Metric, c, points(r.Lo, r.Hi), after)
	}
	return fmt.Sprintf("%s: %s against %s%s%s", g.Metric, c, m, points(r.Lo, r.Hi), after)
}

// distance is the total variation distance of two mixes.
func distance(a, b []uint64) float64 {
	n, m, d := float64(sum(a)), float64(sum(b)), 0.
	if n == 0 || m == 0 {
		return 0
	}
	for i := range a {
		d += max(0, float64(a[i])/n-float64(b[i])/m)
	}
	return d
}

// quantile is the quantile that a timing's gate is shown by.
func (g *gate) quantile() float64 {
	if g.Kind == TimingNoWorse {
		return .99
	}
	return g.Quantile
}

// score is the mean of a Score in its own units.
func (g *gate) score(t Tally) float64 {
	if t.N == 0 {
		return math.NaN()
	}
	return g.Hi - float64(t.X)*unit/float64(t.N)*(g.Hi-g.Lo)
}

// shown are the outcomes of both cohorts: in the ring that is at fault, or in
// every ring.
func (s *Gate) shown() (candidate, control Tally) {
	if p := s.Parts[s.Ring]; s.Ring != "" && p != nil {
		return p.Candidate, p.Control
	}
	return s.tallies()
}

// interval is the difference between the cohorts in the ring that is at fault, or
// in every ring; or the candidate's level.
func (s *Gate) interval(dispersion float64) (lo, hi float64, ok bool) {
	var all evalue.Bounds
	for _, name := range s.rings() {
		if s.Ring == "" || s.Ring == name {
			all.Add(s.Parts[name].Bounds)
		}
	}
	return all.Interval(dispersion)
}

func (t Tally) String() string {
	if t.N == 0 {
		return "none"
	}
	return short(100*float64(t.X)/float64(t.N)) + " %"
}

// short writes a number with what people read of it.
func short(x float64) string { return strconv.FormatFloat(x, 'g', 3, 64) }

// grouped writes 1480 as 1,480.
func grouped(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// missing says what kind of outcome the gate has not got yet.
func (g *gate) missing(st *State, s *Gate) string {
	if !g.Absolute() && g.Kind.timing() {
		most := uint64(0)
		for _, m := range st.Memory[g.Metric] {
			most = max(most, m.Seen)
		}
		if most == 0 {
			return "no control outcomes"
		}
		if most < warmUp {
			return fmt.Sprintf("%d of %d control outcomes before the first latency threshold", most, warmUp)
		}
	}
	c, m := s.tallies()
	switch {
	case c.N == 0:
		return "no candidate outcomes"
	case !g.Absolute() && m.N == 0:
		return "no control outcomes"
	}
	return ""
}

// quantiles are the gate's quantile of either cohort lately, in every ring.
func (g *gate) quantiles(st *State) (candidate, control time.Duration) {
	q := g.quantile()
	var c, m []*Histogram
	for _, ring := range sortedKeys(st.Memory[g.Metric]) {
		mem := st.Memory[g.Metric][ring]
		c, m = append(c, &mem.Candidate), append(m, &mem.Control)
	}
	return quantileOf(q, c...), quantileOf(q, m...)
}

func sortedKeys[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
