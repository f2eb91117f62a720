package judge

import (
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// shown is the largest logarithm shown as a number.
const shown = 50

// Assess returns a Result for each gate, in the order of New. checks holds the
// last answers of the Check gates by Spec.Name. It changes nothing.
func (j *Judge) Assess(st *State, checks map[string]CheckResult) []Result {
	rs := make([]Result, len(j.gates))
	for i := range j.gates {
		g := &j.gates[i]
		if g.Kind == Check {
			rs[i] = g.check(checks)
			continue
		}
		s := st.Gates[g.Name]
		if s == nil || s.Of != g.of {
			s = &Gate{}
		}
		rs[i] = j.assess(st, g, s)
	}
	return rs
}

func (g *gate) check(checks map[string]CheckResult) Result {
	c, ok := checks[g.Name]
	r := Result{Spec: g.Spec, Action: g.Action, Verdict: c.Verdict, Cause: c.Cause}
	r.Proved = c.Verdict == Healthy && g.CanProve()
	r.AtOnce = c.Verdict == Unhealthy && c.AtOnce
	if !ok {
		r.Missing = "no answer"
	}
	return r
}

func (j *Judge) assess(st *State, g *gate, s *Gate) Result {
	r := Result{Spec: g.Spec, Action: g.Action, LogE: evalue.LogMean(s.Rollback)}
	if g.weight > 0 {
		r.NeedE = math.Exp(min(j.logThreshold(st), shown)) / g.weight
	}
	if g.Kind == Never && s.Broken {
		r.LogE = shown
	}
	r.E = math.Exp(min(r.LogE, shown))
	if len(g.proof) > 0 {
		r.NeedProof = 1 / j.risk.FalsePromotion
		r.ProofE = math.Exp(min(evalue.LogMean(s.Proof), shown))
		r.Proved = j.proven(s)
	}
	switch {
	case s.Broken:
		r.Verdict, r.Cause, r.AtOnce = Unhealthy, s.Cause, true
		if s.Action != Default {
			r.Action = s.Action
		}
	case r.Proved:
		r.Verdict = Healthy
	}
	r.Candidate, r.Control = s.Candidate.estimate(), s.Control.estimate()
	if g.timing() {
		q := g.Quantile
		if g.Kind == TimingNoWorse {
			q = .99
		}
		var candidate, control []*Histogram
		for _, ring := range slices.Sorted(maps.Keys(st.Memory[g.Metric])) {
			if m := st.Memory[g.Metric][ring]; m != nil {
				candidate, control = append(candidate, &m.Candidate), append(control, &m.Control)
			}
		}
		r.Candidate.Quantile, r.Control.Quantile = quantileOf(q, candidate...), quantileOf(q, control...)
	}
	if r.Verdict == Inconclusive {
		r.Missing = g.missing(st, s)
	}
	return r
}

// proven reports whether the gate holds within its margin, now: evidence that
// was there once and has gone does not count.
func (j *Judge) proven(s *Gate) bool {
	return !s.Broken && evalue.LogMean(s.Proof) >= -math.Log(j.risk.FalsePromotion)
}

func (t Tally) estimate() Estimate {
	e := Estimate{N: t.N, Events: t.X}
	if t.N > 0 {
		e.Rate = float64(t.X) / float64(t.N)
	}
	return e
}

// missing says what kind of outcome the gate has not got yet.
func (g *gate) missing(st *State, s *Gate) string {
	if !g.Absolute() && g.timing() {
		most := uint64(0)
		for _, m := range st.Memory[g.Metric] {
			if m != nil {
				most = max(most, m.Seen)
			}
		}
		if most == 0 {
			return "no control outcomes"
		}
		if most < warmUp {
			return fmt.Sprintf("%d of %d control outcomes before the first latency threshold", most, warmUp)
		}
	}
	switch {
	case s.Candidate.N == 0:
		return "no candidate outcomes"
	case !g.Absolute() && s.Control.N == 0:
		return "no control outcomes"
	}
	return ""
}
