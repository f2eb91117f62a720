package judge

import (
	"math"
)

// shown is the largest logarithm shown as a number.
const shown = 50

// Assess returns a Result for each gate, in the order of New. checks holds the
// last answers of the Check gates by Spec.Name. It changes nothing.
func (j *Judge) Assess(st *State, checks map[string]CheckResult) []Result {
	rs := j.Verdicts(st, checks)
	for i := range rs {
		if g := &j.gates[i]; g.Kind != Check {
			j.show(&rs[i], st, g, st.known(g))
		}
	}
	return rs
}

// Verdicts are the Results without what is only shown: the cohorts' estimates and
// their difference, the summary and what is missing.
func (j *Judge) Verdicts(st *State, checks map[string]CheckResult) []Result {
	rs := make([]Result, len(j.gates))
	for i := range j.gates {
		g := &j.gates[i]
		if g.Kind == Check {
			rs[i] = g.check(checks)
			continue
		}
		rs[i] = j.assess(st, g, st.known(g))
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
	r := Result{Spec: g.Spec, Action: g.Action}
	if g.weight > 0 {
		r.LogE = j.logE(st, g, s, "")
		r.NeedE = math.Exp(min(j.logThreshold(st, g.group), shown)) / g.weight
	}
	if g.Kind == Never && s.Broken {
		r.LogE = shown
	}
	r.E = math.Exp(min(r.LogE, shown))
	if len(g.proof) > 0 {
		r.NeedProof = 1 / j.risk.FalsePromotion
		r.ProofE = math.Exp(min(j.logProof(st, g, s), shown))
		r.Proved = j.proven(st, g, s)
	}
	switch {
	case s.Broken:
		r.Verdict, r.Cause, r.AtOnce, r.Ring = Unhealthy, s.Cause, true, s.Ring
		if s.Action != Default {
			r.Action = s.Action
		}
	case r.Proved:
		r.Verdict = Healthy
	}
	return r
}

// show adds what is shown to what is decided on.
func (j *Judge) show(r *Result, st *State, g *gate, s *Gate) {
	r.Candidate, r.Control = g.estimates(st, s)
	if g.weight > 0 {
		r.Lo, r.Hi, r.Bounded = s.interval(j.spread(st, g))
		r.Summary = g.summary(st, s, *r)
		if g.Kind.IsScore() {
			r.Lo, r.Hi = g.units(r.Lo, r.Hi)
		}
	}
	if r.Verdict == Inconclusive {
		r.Missing = g.missing(st, s)
	}
}

// spread is the design effect of the gate's outcomes.
func (j *Judge) spread(st *State, g *gate) float64 {
	if j.risk.Independent {
		return 1
	}
	return st.remembered(g.Metric).dispersion(g.rollback[0].look(g.Kind), -1, !g.Absolute())
}

// estimates are what is shown of either cohort.
func (g *gate) estimates(st *State, s *Gate) (candidate, control Estimate) {
	c, m := s.shown()
	candidate, control = c.estimate(), m.estimate()
	switch {
	case g.Kind.timing():
		candidate.Quantile, control.Quantile = g.quantiles(st)
	case g.Kind.IsScore():
		candidate, control = Estimate{N: c.N}, Estimate{N: m.N}
		if c.N > 0 {
			candidate.Mean = g.score(c)
		}
		if m.N > 0 {
			control.Mean = g.score(m)
		}
	case g.Kind.mix():
		candidate.Mix, control.Mix = make([]uint64, len(g.Labels)), make([]uint64, len(g.Labels))
		for ring, mem := range st.Memory[g.Metric] {
			for i := range g.Labels {
				if s.Ring != "" && s.Ring != ring {
					break
				}
				if i < len(mem.Mix[0]) && i < len(mem.Mix[1]) {
					candidate.Mix[i] = saturate(candidate.Mix[i], mem.Mix[0][i])
					control.Mix[i] = saturate(control.Mix[i], mem.Mix[1][i])
				}
			}
		}
	}
	return candidate, control
}

func (t Tally) estimate() Estimate {
	e := Estimate{N: t.N, Events: t.X}
	if t.N > 0 {
		e.Rate = float64(t.X) / float64(t.N)
	}
	return e
}
