package judge

import "math"

// Law returns how the outcomes of either cohort that a gate is about are
// distributed, as far as seen: by cell for a Rate, a Timing and a Mix. It is for
// plans, not for decisions; ok is false where a cohort has none.
func (j *Judge) Law(st *State, gate int) (candidate, control []float64, ok bool) {
	g := &j.gates[gate]
	s := st.known(g)
	c, m := s.tallies()
	if c.N == 0 || m.N == 0 && !g.Absolute() {
		return nil, nil, false
	}
	switch {
	case g.Kind.IsScore(), g.Kind == Check, g.Kind == Split:
		return nil, nil, false
	case g.Kind.timing():
		candidate, control = make([]float64, g.width()), make([]float64, g.width())
		for _, ring := range sortedKeys(st.Memory[g.Metric]) {
			mem := st.Memory[g.Metric][ring]
			mem.Candidate.onto(candidate)
			mem.Control.onto(control)
		}
	case g.Kind.mix():
		a, b := g.estimates(st, s)
		for i := range a.Mix {
			candidate, control = append(candidate, float64(a.Mix[i])), append(control, float64(b.Mix[i]))
		}
	default: // half an event more: what has not been seen yet is not impossible
		candidate = []float64{float64(c.N-min(c.X, c.N)) + .5, float64(c.X) + .5}
		control = []float64{float64(m.N-min(m.X, m.N)) + .5, float64(m.X) + .5}
	}
	okC, okM := normalise(candidate), normalise(control)
	if !okM && g.Absolute() {
		control, okM = candidate, true
	}
	return candidate, control, okC && okM
}

// Badness returns the mean and the standard deviation of a Score's badness, as far
// as seen.
func (j *Judge) Badness(st *State, gate int) (candidate, control [2]float64) {
	c, m := st.known(&j.gates[gate]).tallies()
	sd := func(t Tally) [2]float64 {
		mean, variance := t.moments(unit)
		return [2]float64{mean, math.Sqrt(variance)}
	}
	return sd(c), sd(m)
}

func (h *Histogram) onto(dst []float64) {
	for i, w := range h.Cells {
		if c := h.From + i; c >= 0 && c < len(dst) {
			dst[c] += float64(w)
		}
	}
}

func normalise(p []float64) bool {
	n := 0.
	for _, x := range p {
		n += x
	}
	if !(n > 0) {
		return false
	}
	for i := range p {
		p[i] /= n
	}
	return true
}
