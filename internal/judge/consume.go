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
	marks map[string][]Mark // by metric
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
}

// A group of gates shares one error bound by averaging its evidence.
type group uint8

const (
	acting    group = iota // Rollback, RollbackRing, StepBack
	holding                // Hold
	reporting              // Report
	groups
)

func (a Action) group() group {
	switch a {
	case Hold:
		return holding
	case Report:
		return reporting
	}
	return acting
}

// A bet is an engine together with what it counts as an event.
type bet struct {
	ratio *evalue.Ratio // exactly one of three
	diff  *evalue.Difference
	level *evalue.Level

	// Of a Timing: an event is an outcome beyond a threshold, the control's
	// quantile so far for the control and shift cells higher for the candidate;
	// or a fixed one, for both: from that cell on.
	quantile float64
	shift    int
	fixed    bool
	cell     int
	bit      int // its mark
}

func (b *bet) prior() evalue.Prior {
	switch {
	case b.ratio != nil:
		return b.ratio.Prior
	case b.diff != nil:
		return b.diff.Prior
	}
	return b.level.Prior
}

// New returns a Judge of the gates, or every problem at once, each naming its gate.
func New(specs []Spec, risk Risk) (*Judge, error) {
	j := &Judge{specs: append([]Spec(nil), specs...), risk: risk}
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
		if err != nil {
			errs = append(errs, fmt.Errorf("gate %q: %w", s.Name, err))
		}
		names[s.Name] = true
		for k := range g.rollback {
			if b := &g.rollback[k]; b.quantile > 0 || b.fixed {
				b.bit = j.mark(s.Metric, Mark{Quantile: b.quantile, Shift: b.shift, Cell: b.cell})
			}
		}
		j.gates = append(j.gates, g)
		if len(g.rollback) > 0 {
			size[g.group]++
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	for i := range j.gates {
		if g := &j.gates[i]; len(g.rollback) > 0 {
			g.weight = 1 / size[g.group]
		}
	}
	return j, nil
}

func newGate(s Spec) (gate, error) {
	g := gate{Spec: s, group: s.Action.group(), of: fmt.Sprintf("%d/%s/%g/%g/%g/%d", s.Kind, s.Metric, s.Margin, s.Factor, s.Quantile, s.Limit)}
	if s.Action == Default || s.Action > Report {
		return g, errors.New("no action")
	}
	wrong := func(field string, v any) (gate, error) { return g, fmt.Errorf("%s %v out of range", field, v) }
	fraction := func(v float64) bool { return v >= 0 && v < 1 } // false for NaN
	switch s.Kind {
	case QuantileWithinFactor, QuantileAtMost:
		if !fraction(s.Quantile) || s.Quantile == 0 {
			return wrong("quantile", s.Quantile)
		}
	}
	switch s.Kind {
	case Within:
		if !fraction(s.Margin) || s.Margin == 0 {
			return wrong("margin", s.Margin)
		}
		g.rollback = []bet{{diff: evalue.DifferenceBeyond(s.Margin)}}
		g.proof = []bet{{diff: evalue.DifferenceWithin(s.Margin)}}
	case WithinFactor:
		if !(s.Factor > 1) || math.IsInf(s.Factor, 1) {
			return wrong("factor", s.Factor)
		}
		g.rollback = []bet{{ratio: evalue.RatioWorse(s.Factor)}}
		g.proof = []bet{{ratio: evalue.RatioWithin(s.Factor)}}
	case AtMost:
		if !fraction(s.Margin) || s.Margin == 0 {
			return wrong("limit", s.Margin)
		}
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
			return wrong("limit", s.Limit) // the histogram cannot tell
		}
		// Beyond the limit for certain, and possibly: both err on the null's side.
		g.rollback = []bet{{level: evalue.LevelWorse(1 - s.Quantile), fixed: true, cell: cell + 1}}
		g.proof = []bet{{level: evalue.LevelWithin(1 - s.Quantile), fixed: true, cell: cell}}
	case TimingNoWorse:
		g.rollback = []bet{
			{ratio: evalue.RatioWorse(1), quantile: .99},
			{diff: evalue.DifferenceWorse(), quantile: .5},
		}
	case Never, Check:
	default:
		return wrong("kind", s.Kind)
	}
	if !s.CanProve() {
		g.proof = nil
	}
	return g, nil
}

// Specs returns the gates in the order of New; the caller must not change them.
func (j *Judge) Specs() []Spec { return j.specs }

// Consume bets one block in every gate of its metric for which active (nil:
// every gate) answers true for the gate's index. proof: also in the promotion
// processes, because the block is of the stage's own ring since the stage was
// entered. What is bet depends on earlier blocks and the block's sizes only;
// a cohort without outcomes changes no relative gate, but the control's are
// remembered.
func (j *Judge) Consume(st *State, b Block, active func(gate int) bool, proof bool) {
	var mem *Memory
	bet := false
	n, m := sum(b.Candidate), sum(b.Control)
	for i := range j.gates {
		g := &j.gates[i]
		if g.Metric != b.Metric || g.Kind == Check {
			continue
		}
		if !g.fits(b.Candidate) || !g.fits(b.Control) {
			continue // counts of something else
		}
		if mem == nil {
			mem = st.memory(b.Metric, b.Ring)
		}
		if active == nil || active(i) {
			g.consume(st.gate(g), mem, b, n, m, proof)
			bet = true
		}
	}
	if mem == nil {
		return
	}
	if len(b.Candidate) == evidence.Cells || len(b.Control) == evidence.Cells {
		mem.timing(b.Candidate, b.Control, m)
	} else {
		mem.rate(m, event(b.Control))
	}
	if bet {
		j.latch(st, b.Ring)
	}
}

// fits reports whether the cells are of the gate's metric kind.
func (g *gate) fits(cells []uint64) bool {
	if g.timing() {
		return len(cells) == 0 || len(cells) == evidence.Cells
	}
	return len(cells) == 0 || len(cells) == 2
}

func (g *gate) consume(s *Gate, mem *Memory, b Block, n, m uint64, proof bool) {
	if g.Kind == Never {
		x := event(b.Candidate)
		s.Candidate.add(n, x)
		s.Control.add(m, event(b.Control))
		known := min(x, s.Ahead)
		s.Ahead -= known
		if x > known && !s.Broken {
			s.Broken, s.Cause = true, fmt.Sprintf("%d of %d candidate outcomes are what must never happen", s.Candidate.X, s.Candidate.N)
		}
		return
	}
	if len(s.Rollback) != len(g.rollback) {
		s.Rollback = make([]evalue.Process, len(g.rollback))
	}
	for i := range g.rollback {
		x, y, ok := g.rollback[i].update(&s.Rollback[i], mem, b, n, m)
		if i == 0 && ok {
			s.Candidate.add(n, x)
			s.Control.add(m, y)
		}
	}
	if !proof || len(g.proof) == 0 {
		return
	}
	if len(s.Proof) != len(g.proof) {
		s.Proof = make([]evalue.Process, len(g.proof))
	}
	for i := range g.proof {
		g.proof[i].update(&s.Proof[i], mem, b, n, m)
	}
}

// update bets one block of n candidate outcomes and m control outcomes, and
// returns how many of them are events; ok is false where there is no threshold
// to tell.
func (b *bet) update(p *evalue.Process, mem *Memory, block Block, n, m uint64) (x, y uint64, ok bool) {
	c0, known := 0., false
	switch {
	case b.quantile > 0:
		tau := 0
		if mem.Seen >= warmUp {
			tau, c0, known = mem.Control.quantile(b.quantile)
		}
		tau++ // the first cell beyond
		if !known || tau+b.shift >= evidence.Cells {
			return 0, 0, false // no threshold, or none the candidate could be beyond
		}
		x, y = from(block.Candidate, tau+b.shift), from(block.Control, tau)
	case b.fixed:
		x, y = from(block.Candidate, b.cell), from(block.Control, b.cell)
	default:
		c0, known = mem.mean()
		x, y = event(block.Candidate), event(block.Control)
	}
	var logs evalue.Logs
	switch {
	case n == 0 || m == 0 && b.level == nil:
		return x, y, true
	case b.level != nil:
		b.level.Logs(&logs, float64(n), float64(x))
	case b.ratio != nil:
		b.ratio.Logs(&logs, float64(n), float64(m), float64(x), float64(y))
	case !known:
		return x, y, true // the first control outcomes only tell where to bet
	default:
		b.diff.Logs(&logs, float64(n), float64(m), float64(x), float64(y), c0)
	}
	p.Update(b.prior(), &logs)
	return x, y, true
}

// latch calls gates Unhealthy once the average of a group reaches its threshold:
// the one that contributes most, and each that reaches it alone. A gate that is
// not active in the present stage counts with the evidence it has, since the
// weights were fixed before any. ring is the block's.
func (j *Judge) latch(st *State, ring string) {
	need := j.logThreshold(st)
	for group := range groups {
		most, worst := math.Inf(-1), -1
		logs := make([]float64, 0, 16)
		for i := range j.gates {
			g := &j.gates[i]
			if g.group != group || g.weight == 0 {
				continue
			}
			l := math.Log(g.weight)
			if s := st.Gates[g.Name]; s != nil && s.Of == g.of {
				l += evalue.LogMean(s.Rollback)
				if l >= need {
					g.broken(s, st.Memory[g.Metric][ring])
				}
			}
			if l > most {
				most, worst = l, i
			}
			logs = append(logs, l)
		}
		if worst >= 0 && evalue.LogSum(logs) >= need {
			g := &j.gates[worst]
			g.broken(st.gate(g), st.Memory[g.Metric][ring])
		}
	}
}

// broken calls the gate Unhealthy. Where the control violates an absolute limit
// as well, the candidate is not what is wrong: hold instead of rolling back.
// mem is of the gate's metric in the ring of the block that decided, or nil.
func (g *gate) broken(s *Gate, mem *Memory) {
	if s.Broken {
		return
	}
	s.Broken, s.Cause = true, g.cause(s)
	if g.group == acting && mem != nil && g.excused(mem) {
		s.Action = Hold
		s.Cause += "; the control violates the limit as well, so a rollback would not help"
	}
}

// excused reports whether the ring's recent control violates the gate's
// absolute limit, too.
func (g *gate) excused(mem *Memory) bool {
	switch g.Kind {
	case AtMost:
		return mem.RecentX >= excuse && mem.RecentX > g.Margin*mem.RecentN
	case QuantileAtMost:
		n, x := mem.Control.beyond(g.rollback[0].cell)
		return x >= excuse && x > (1-g.Quantile)*n
	}
	return false
}

func (g *gate) cause(s *Gate) string {
	c, m := s.Candidate, s.Control
	switch g.Kind {
	case Within:
		return fmt.Sprintf("the candidate's rate is %s, the control's %s: more than %.4g points worse", c, m, 100*g.Margin)
	case WithinFactor:
		return fmt.Sprintf("the candidate's rate is %s, the control's %s: more than %.4g times as high", c, m, g.Factor)
	case AtMost:
		return fmt.Sprintf("the candidate's rate is %s: above %.4g %%", c, 100*g.Margin)
	case NoWorse:
		return fmt.Sprintf("the candidate's rate is %s, the control's %s: worse", c, m)
	case QuantileWithinFactor:
		return fmt.Sprintf("the candidate's %.4g-quantile is more than %.4g times the control's: %s are slower than that, %s of the control beyond its quantile", g.Quantile, g.Factor, c, m)
	case QuantileAtMost:
		return fmt.Sprintf("the candidate's %.4g-quantile is above %v: %s are slower", g.Quantile, g.Limit, c)
	case TimingNoWorse:
		return fmt.Sprintf("the candidate is slower: %s are beyond the control's 99th percentile, %s of the control", c, m)
	}
	return ""
}

func (t Tally) String() string {
	if t.N == 0 {
		return "none"
	}
	return fmt.Sprintf("%.3g %% (%d of %d)", 100*float64(t.X)/float64(t.N), t.X, t.N)
}

// logThreshold returns the logarithm of what a group's average must reach: 1/α,
// and 2^(j+1)/α after the j-th new start, so that all starts together spend at
// most 1.5 α.
func (j *Judge) logThreshold(st *State) float64 {
	l := -math.Log(j.risk.FalseRollback)
	if st.Starts > 0 {
		l += float64(st.Starts+1) * math.Ln2
	}
	return l
}

// Prune forgets gates and metrics the Judge does not have.
func (j *Judge) Prune(st *State) {
	names, metrics := map[string]bool{}, map[string]bool{}
	for _, g := range j.gates {
		names[g.Name], metrics[g.Metric] = true, true
	}
	for name := range st.Gates {
		if !names[name] {
			delete(st.Gates, name)
		}
	}
	for metric := range st.Memory {
		if !metrics[metric] {
			delete(st.Memory, metric)
		}
	}
}

// Breach breaks the active Never gates of a metric at once: events of the
// candidate were seen that no block holds yet. The block that will is no news.
func (j *Judge) Breach(st *State, metric string, events uint64, active func(gate int) bool) {
	for i := range j.gates {
		g := &j.gates[i]
		if g.Kind != Never || g.Metric != metric || !active(i) || events == 0 {
			continue
		}
		s := st.gate(g)
		s.Ahead += events
		if !s.Broken {
			s.Broken, s.Cause = true, "what must never happen has happened to the candidate"
		}
	}
}

// Anew starts the rollback processes anew, after a step back or when what broke
// was looked at, and forgets which gates are broken and what they counted. Each
// start raises the threshold. The control's past and the proofs are kept.
func (st *State) Anew() {
	st.Starts++
	for name, g := range st.Gates {
		if g != nil {
			st.Gates[name] = &Gate{Of: g.Of, Proof: g.Proof, Ahead: g.Ahead}
		}
	}
}

// ResetProof starts the promotion processes afresh, because a stage was entered:
// evidence from a smaller share says nothing about the load at this one.
func (st *State) ResetProof() {
	for _, g := range st.Gates {
		if g != nil {
			g.Proof = nil
		}
	}
}

// gate returns what is remembered of g, fresh where it asks another question now.
func (st *State) gate(g *gate) *Gate {
	s := st.Gates[g.Name]
	if s == nil || s.Of != g.of {
		if st.Gates == nil {
			st.Gates = map[string]*Gate{}
		}
		s = &Gate{Of: g.of}
		st.Gates[g.Name] = s
	}
	return s
}

func (st *State) memory(metric, ring string) *Memory {
	rings := st.Memory[metric]
	if rings == nil {
		if st.Memory == nil {
			st.Memory = map[string]map[string]*Memory{}
		}
		rings = map[string]*Memory{}
		st.Memory[metric] = rings
	}
	if rings[ring] == nil {
		rings[ring] = &Memory{}
	}
	return rings[ring]
}
