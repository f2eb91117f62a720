package judge

import (
	"errors"
	"fmt"
	"math"

	"github.com/stagedrollout/rollout/internal/evalue"
	"github.com/stagedrollout/rollout/internal/evidence"
)

// Judge is a set of gates with their error bounds. It never changes and is safe
// for concurrent use, each State by one goroutine at a time.
type Judge struct {
	gates []gate
	specs []Spec
	risk  Risk
	rings []string
	marks map[string][]Mark // by metric
	among int               // see Among; 0 is 1
}

// Among is the judge for one of n processes that each judge by themselves, on outcomes of their own: it is called
// Unhealthy n times as late, so that all of them together err no more often than one.
func (j *Judge) Among(n int) *Judge {
	c := *j
	c.among = n
	return &c
}

// A gate is a Spec with its bets. The rollback side and the proof are each an
// average of engines.
type gate struct {
	Spec
	of       string // identifies the question
	group    group
	weight   float64 // of its group, 0: keeps no E
	rollback []bet
	proof    []bet
	marks    int // of its metric
}

// A group of gates shares one error bound by averaging its evidence.
type group uint8

const (
	acting    group = iota // Rollback, RollbackRing, StepBack
	holding                // Hold
	reporting              // Report
	splitting              // the split of units, with a bound of its own
	groups
)

// falseSplit bounds the probability that a split of units as it should be holds.
const falseSplit = .001

func (s *Spec) group() group {
	switch {
	case s.Kind == Split:
		return splitting
	case s.Action == Hold:
		return holding
	case s.Action == Report:
		return reporting
	}
	return acting
}

// manyRings is the number of rings from which on what each of them has to do
// with the pool is no longer kept: the state would grow too large.
const manyRings = 13

// New returns a Judge of the gates, or every problem at once, each naming its
// gate. rings are all that blocks may be of; none: it does not matter.
func New(specs []Spec, risk Risk, rings ...string) (*Judge, error) {
	j := &Judge{specs: append([]Spec(nil), specs...), risk: risk, rings: rings}
	var errs []error
	if !(risk.FalseRollback > 0 && risk.FalseRollback < 1 && risk.FalsePromotion > 0 && risk.FalsePromotion < 1) {
		errs = append(errs, fmt.Errorf("risk %+v: each must be above 0 and below 1", risk))
	}
	names := map[string]bool{}
	var size [groups]float64
	for _, s := range specs {
		g, err := newGate(s)
		if err == nil && names[s.Name] {
			err = errors.New("the name is taken")
		}
		for k := range g.rollback {
			if b := &g.rollback[k]; b.quantile > 0 || b.fixed {
				b.bit = j.mark(s.Metric, Mark{Quantile: b.quantile, Shift: b.shift, Cell: b.cell})
			}
		}
		if err == nil && len(j.marks[s.Metric]) > MaxMarks {
			err = fmt.Errorf("more than %d thresholds of %q", MaxMarks, s.Metric)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("gate %q: %w", s.Name, err))
		}
		names[s.Name] = true
		j.gates = append(j.gates, g)
		if len(g.rollback) > 0 {
			size[g.group]++
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	for i := range j.gates {
		g := &j.gates[i]
		g.marks = len(j.marks[g.Metric])
		if len(g.rollback) > 0 {
			g.weight = 1 / size[g.group]
		}
	}
	return j, nil
}

// Size is about the most bytes that a State takes once stored, if every ring has
// outcomes of every metric.
func (j *Judge) Size() int {
	rings := max(len(j.rings), 1)
	metrics := map[string]bool{}
	n := 0
	for i := range j.gates {
		g := &j.gates[i]
		processes := 1
		if j.split() {
			if processes += rings; rings < manyRings {
				processes += rings
			}
		}
		for k := range g.rollback {
			n += processes * j.rows(g) * (8 + 4*len(g.rollback[k].prior()))
		}
		for k := range g.proof {
			rows := 1
			if g.proof[k].sets {
				rows = 1 << len(g.Labels)
			}
			n += rows * (8 + 4*len(g.proof[k].prior()))
		}
		n += rings * 150 // what is shown
		if metrics[g.Metric] {
			continue
		}
		metrics[g.Metric] = true
		by := 64 * 2
		switch {
		case g.Kind.timing():
			by = 64*(1+g.marks) + 2*400*4 // and two histograms
		case g.Kind.mix():
			by = folds * (1 + len(g.Labels))
		case g.Kind.IsScore():
			by = folds * 3
		}
		n += rings * 2 * by * 4
	}
	return n * 4 / 3
}

// rows is how many rows a process of the rollback side has.
func (j *Judge) rows(g *gate) int {
	if j.risk.Independent || g.Kind == Split {
		return 1
	}
	return folds
}

// split reports whether gates keep a process for each ring besides the pool.
func (j *Judge) split() bool { return len(j.rings) > 1 }

func newGate(s Spec) (gate, error) {
	g := gate{Spec: s, group: s.group()}
	g.of = fmt.Sprint("2 ", s.Metric, " ", s.Kind, " ", s.Margin, " ", s.Factor, " ", s.Quantile, " ", int64(s.Limit))
	if s.Kind.IsScore() || s.Kind.mix() {
		g.of += fmt.Sprint(" ", s.Lo, " ", s.Hi, " ", len(s.Labels), " ", s.Moments)
	}
	if s.Action == Default || s.Action > Report {
		return g, fmt.Errorf("action %d out of range", s.Action)
	}
	wrong := func(field string, v float64) (gate, error) { return g, fmt.Errorf("%s %v out of range", field, v) }
	fraction := func(v float64) bool { return v >= 0 && v < 1 } // false for NaN
	switch s.Kind {
	case QuantileWithinFactor, QuantileAtMost:
		if !fraction(s.Quantile) || s.Quantile == 0 {
			return wrong("quantile", s.Quantile)
		}
	case Within, AtMost, ScoreWithin, ScoreAtLeast, MixWithin:
		if !fraction(s.Margin) || s.Margin == 0 {
			return wrong("margin", s.Margin)
		}
	}
	if s.Kind.mix() && (len(s.Labels) < 2 || len(s.Labels) > maxLabels) {
		return wrong("number of labels", float64(len(s.Labels)))
	}
	switch s.Kind {
	case Within:
		g.rollback = []bet{{diff: evalue.DifferenceBeyond(s.Margin)}}
		g.proof = []bet{{diff: evalue.DifferenceWithin(s.Margin)}}
	case WithinFactor:
		if !(s.Factor > 1) || math.IsInf(s.Factor, 1) {
			return wrong("factor", s.Factor)
		}
		g.rollback = []bet{{ratio: evalue.RatioWorse(s.Factor)}}
		g.proof = []bet{{ratio: evalue.RatioWithin(s.Factor)}}
	case AtMost:
		g.rollback = []bet{{level: evalue.LevelWorse(s.Margin)}}
		g.proof = []bet{{level: evalue.LevelWithin(s.Margin)}}
	case NoWorse:
		g.rollback = []bet{{ratio: evalue.RatioWorse(1)}, {diff: evalue.DifferenceWorse()}}
	case QuantileWithinFactor:
		if !(s.Factor >= 1) || math.IsInf(s.Factor, 1) {
			return wrong("factor", s.Factor)
		}
		down, up := evidence.Shift(s.Factor)
		g.rollback = []bet{
			{ratio: evalue.RatioWorse(1), quantile: s.Quantile, shift: up},
			{diff: evalue.DifferenceWorse(), quantile: s.Quantile, shift: up},
		}
		g.proof = []bet{
			{ratio: evalue.RatioBelow(), quantile: s.Quantile, shift: down},
			{diff: evalue.DifferenceWithin(0), quantile: s.Quantile, shift: down},
		}
	case QuantileAtMost:
		cell := evidence.Index(s.Limit)
		if cell == 0 || cell == evidence.Cells-1 {
			return wrong("limit", s.Limit.Seconds()) // the histogram cannot tell
		}
		// Beyond the limit for certain, and possibly: both err on the null's side.
		g.rollback = []bet{{level: evalue.LevelWorse(1 - s.Quantile), fixed: true, cell: cell + 1}}
		g.proof = []bet{{level: evalue.LevelWithin(1 - s.Quantile), fixed: true, cell: cell}}
	case TimingNoWorse:
		g.rollback = []bet{
			{ratio: evalue.RatioWorse(1), quantile: .99},
			{diff: evalue.DifferenceWorse(), quantile: .5},
		}
	case ScoreWithin:
		g.rollback = []bet{{diff: evalue.ScoreBeyond(s.Margin)}}
		g.proof = []bet{{diff: evalue.ScoreWithin(s.Margin)}}
	case ScoreAtLeast:
		g.rollback = []bet{{mean: evalue.MeanWorse(s.Margin)}}
		g.proof = []bet{{mean: evalue.MeanWithin(s.Margin)}}
	case ScoreNoWorse:
		g.rollback = []bet{{diff: evalue.ScoreWorse()}}
	}
	if s.Moments && s.Kind.IsScore() {
		alone := s.Kind == ScoreAtLeast
		g.rollback = []bet{{moments: evalue.NewBernstein(s.Margin, false, alone)}}
		g.proof = []bet{{moments: evalue.NewBernstein(s.Margin, true, alone)}}
	}
	switch s.Kind {
	case MixWithin:
		g.rollback = []bet{
			{diff: evalue.DifferenceBeyond(s.Margin), set: true, z: 1},
			{diff: evalue.DifferenceBeyond(s.Margin), set: true, z: 2},
		}
		g.proof = []bet{{diff: evalue.ScoreWithin(s.Margin), sets: true}}
	case MixNoChange:
		g.rollback = []bet{{change: evalue.NewChange()}}
	case Silence:
		g.rollback = []bet{{ratio: evalue.RatioWorse(1)}}
	case Split:
		g.rollback = []bet{{odds: evalue.NewOdds()}}
	}
	if s.Kind > Split {
		return wrong("kind", float64(s.Kind))
	}
	if !s.CanProve() {
		g.proof = nil
	}
	return g, nil
}

// Specs returns the gates in the order of New; the caller must not change them.
func (j *Judge) Specs() []Spec { return j.specs }
