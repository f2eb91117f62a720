package judge

import (
	"math"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// Look calls gates Unhealthy once the average of a group reaches its threshold:
// the one that contributes most, and each that reaches it alone. A gate that is
// not active in the present stage counts with the evidence it has, since the
// weights were fixed before any.
func (j *Judge) Look(st *State) {
	for group := range groups {
		need := j.logThreshold(st, group)
		logs := make([]float64, 0, 16)
		most, worst := math.Inf(-1), -1
		already := false
		var broken []int
		for i := range j.gates {
			g := &j.gates[i]
			if g.group != group || g.weight == 0 {
				continue
			}
			l := math.Log(g.weight) + j.logE(st, g, st.known(g), "")
			logs = append(logs, l)
			already = already || st.known(g).Broken
			if l > most {
				most, worst = l, i
			}
			if l >= need {
				broken = append(broken, i)
			}
		}
		if worst < 0 || evalue.LogSum(logs) < need {
			continue
		}
		if len(broken) == 0 && !already { // else it is one that was called, which convicts no other
			broken = append(broken, worst)
		}
		for _, i := range broken {
			g := &j.gates[i]
			s := st.gate(g)
			if s.Broken {
				continue
			}
			s.Ring = j.fault(st, group, g, need)
			j.broken(st, g, s)
		}
	}
}

// logE returns the evidence against a gate, but for what one ring added to it.
func (j *Judge) logE(st *State, g *gate, s *Gate, without string) float64 {
	pool := s.Pool
	if without != "" {
		p := s.Parts[without]
		switch {
		case p == nil || p.Own == nil: // it added nothing
		case p.But == nil:
			pool = nil
		default:
			pool = p.But
		}
	}
	names := s.rings()
	in := make(rings, 0, len(names))
	for _, name := range names {
		if m := st.Memory[g.Metric][name]; m != nil && name != without {
			in = append(in, m)
		}
	}
	l := j.tempered(g, pool, in)
	if !j.split() {
		return l
	}
	part := math.Log(.5 / float64(len(j.rings)))
	logs := make([]float64, 0, 16)
	logs = append(logs, math.Log(.5)+l)
	for range len(j.rings) - len(names) { // no outcomes, no evidence
		logs = append(logs, part)
	}
	for _, name := range names {
		l := 0.
		if m := st.Memory[g.Metric][name]; m != nil && name != without && s.Parts[name].Own != nil {
			l = j.tempered(g, s.Parts[name].Own, rings{m})
		}
		logs = append(logs, part+l)
	}
	return evalue.LogSum(logs)
}

// tempered returns the mean of the processes of a gate, each by the rule for
// units that cause many outcomes: the fold of the units in which the candidate is
// worst is left out, and what the others say is divided by how much more their
// groups vary than single outcomes would.
func (j *Judge) tempered(g *gate, banks []evalue.Bank, in rings) float64 {
	if len(banks) != len(g.rollback) {
		return 0
	}
	logs := make([]float64, 0, 4)
	for i := range banks {
		v := g.rollback[i].look(g.Kind)
		switch {
		case g.Kind == Split:
			logs = append(logs, banks[i].Log(0)/(temper*in.split()))
		case j.risk.Independent:
			logs = append(logs, banks[i].Log(0))
		default:
			out := in.worst(v)
			logs = append(logs, banks[i].Log(out)/(temper*in.dispersion(v, out, !g.Absolute())))
		}
	}
	return evalue.LogMean(logs)
}

// fault returns the ring that alone is at fault for a gate that its group broke:
// the one without which there is least, if that is too little to act and less than
// a sixth of what speaks against the gate, which chance alone leaves behind; ""
// if there is none.
func (j *Judge) fault(st *State, group group, broken *gate, need float64) string {
	if !j.split() || len(j.rings) >= manyRings {
		return ""
	}
	least, at := math.Inf(1), ""
	for _, ring := range j.rings {
		logs := make([]float64, 0, 16)
		for i := range j.gates {
			if g := &j.gates[i]; g.group == group && g.weight > 0 {
				logs = append(logs, math.Log(g.weight)+j.logE(st, g, st.known(g), ring))
			}
		}
		if l := evalue.LogSum(logs); l < least {
			least, at = l, ring
		}
	}
	s := st.known(broken)
	if least >= need || j.logE(st, broken, s, at) > j.logE(st, broken, s, "")/6 {
		return ""
	}
	return at
}

// known returns what is remembered of g, without remembering anything new.
func (st *State) known(g *gate) *Gate {
	if s := st.Gates[g.Name]; s != nil && s.Of == g.of {
		return s
	}
	return &Gate{}
}

// broken calls the gate Unhealthy. Where the control violates an absolute limit
// as well, the candidate is not what is wrong: hold instead of rolling back.
func (j *Judge) broken(st *State, g *gate, s *Gate) {
	s.Broken, s.Cause = true, g.cause(s, j.spread(st, g))
	if g.group == acting && g.excused(s) {
		s.Action, s.Ring = Hold, ""
		s.Cause += "; the control violates the limit as well, so a rollback would not help"
	}
}

// excused reports whether the recent control violates the gate's absolute limit,
// too, by more than chance: in the ring at fault, or in all of them.
func (g *gate) excused(s *Gate) bool {
	limit := g.Margin
	switch g.Kind {
	case AtMost, ScoreAtLeast:
	case QuantileAtMost:
		limit = 1 - g.Quantile
	default:
		return false
	}
	for i := range recent {
		n, x := 0., 0.
		for _, ring := range s.rings() {
			if s.Ring == "" || s.Ring == ring {
				n, x = n+s.Parts[ring].Recent[i].N, x+s.Parts[ring].Recent[i].X
			}
		}
		if x >= excuse && x-math.Sqrt(x) > limit*n {
			return true
		}
	}
	return false
}

// logThreshold returns the logarithm of what a group's average must reach: 1/α,
// and 2^(j+1)/α after the j-th new start, so that all starts together spend at
// most 1.5 α; n times that among n.
func (j *Judge) logThreshold(st *State, group group) float64 {
	l := -math.Log(j.risk.FalseRollback)
	if group == splitting {
		l = -math.Log(falseSplit)
	}
	if st.Starts > 0 {
		l += float64(st.Starts+1) * math.Ln2
	}
	return l + math.Log(float64(max(j.among, 1)))
}

// proven reports whether the gate holds within its margin, now: evidence that
// was there once and has gone does not count.
func (j *Judge) proven(st *State, g *gate, s *Gate) bool {
	return !s.Broken && len(g.proof) > 0 && j.logProof(st, g, s) >= -math.Log(j.risk.FalsePromotion)
}

// logProof returns the evidence that the gate holds, divided by how much more
// groups of units vary than single outcomes would. No units are left out: they
// may be the ones that suffer.
func (j *Judge) logProof(st *State, g *gate, s *Gate) float64 {
	if len(s.Proof) != len(g.proof) || len(g.proof) == 0 {
		return 0
	}
	in := st.remembered(g.Metric)
	logs := make([]float64, 0, 4)
	for i := range s.Proof {
		b := &s.Proof[i]
		l := b.Log(0)
		for r := range b.LogE { // of every set of labels, the least proven
			l = min(l, b.LogE[r])
		}
		if !j.risk.Independent {
			l /= in.dispersion(g.rollback[min(i, len(g.rollback)-1)].look(g.Kind), -1, !g.Absolute())
		}
		logs = append(logs, l)
	}
	return evalue.LogMean(logs)
}

// remembered are the memories of a metric in every ring, in order.
func (st *State) remembered(metric string) rings {
	var in rings
	for _, name := range sortedKeys(st.Memory[metric]) {
		in = append(in, st.Memory[metric][name])
	}
	return in
}
