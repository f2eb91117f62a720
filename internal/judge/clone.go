package judge

import (
	"slices"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// Clone is a deep copy.
func (st *State) Clone() State {
	c := State{Starts: st.Starts}
	if st.Gates != nil {
		c.Gates = make(map[string]*Gate, len(st.Gates))
		for name, g := range st.Gates {
			if g == nil {
				continue
			}
			copied := *g
			copied.Rollback, copied.Proof = cloneAll(g.Rollback), cloneAll(g.Proof)
			c.Gates[name] = &copied
		}
	}
	if st.Memory != nil {
		c.Memory = make(map[string]map[string]*Memory, len(st.Memory))
		for metric, rings := range st.Memory {
			c.Memory[metric] = make(map[string]*Memory, len(rings))
			for ring, m := range rings {
				if m == nil {
					continue
				}
				copied := *m
				copied.Control, copied.Candidate = m.Control.clone(), m.Candidate.clone()
				c.Memory[metric][ring] = &copied
			}
		}
	}
	return c
}

func cloneAll(ps []evalue.Process) []evalue.Process {
	ps = slices.Clone(ps)
	for i := range ps {
		ps[i].Pi = slices.Clone(ps[i].Pi)
	}
	return ps
}

func (h *Histogram) clone() Histogram {
	c := *h
	c.Cells = slices.Clone(h.Cells)
	return c
}
