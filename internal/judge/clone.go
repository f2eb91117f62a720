package judge

import (
	"errors"
	"slices"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// Clone is a deep copy.
func (st *State) Clone() State {
	c := State{Starts: st.Starts}
	if st.Gates != nil {
		c.Gates = make(map[string]*Gate, len(st.Gates))
		for name, g := range st.Gates {
			c.Gates[name] = g.clone()
		}
	}
	if st.Memory != nil {
		c.Memory = make(map[string]map[string]*Memory, len(st.Memory))
		for metric, rings := range st.Memory {
			c.Memory[metric] = make(map[string]*Memory, len(rings))
			for ring, m := range rings {
				c.Memory[metric][ring] = m.clone()
			}
		}
	}
	return c
}

func (g *Gate) clone() *Gate {
	c := *g
	c.Pool, c.Proof = cloneAll(g.Pool), cloneAll(g.Proof)
	if g.Parts != nil {
		c.Parts = make(map[string]*Part, len(g.Parts))
		for ring, p := range g.Parts {
			part := *p
			part.Own, part.But = cloneAll(p.Own), cloneAll(p.But)
			c.Parts[ring] = &part
		}
	}
	return &c
}

func (m *Memory) clone() *Memory {
	c := *m
	c.Control, c.Candidate = m.Control.clone(), m.Candidate.clone()
	for i := range c.By {
		c.By[i], c.Mix[i] = m.By[i].clone(), slices.Clone(m.Mix[i])
	}
	return &c
}

func cloneAll(banks []evalue.Bank) []evalue.Bank {
	if banks == nil {
		return nil
	}
	c := make([]evalue.Bank, len(banks))
	for i := range banks {
		c[i] = banks[i].Clone()
	}
	return c
}

func (h *Histogram) clone() Histogram {
	c := *h
	c.Cells = slices.Clone(h.Cells)
	return c
}

// Check finds what no Judge would have left in a State.
func (st *State) Check() error {
	for _, g := range st.Gates {
		if g == nil {
			return errors.New("a gate is null")
		}
		for _, p := range g.Parts {
			if p == nil {
				return errors.New("a part of a gate is null")
			}
		}
	}
	for _, rings := range st.Memory {
		for _, m := range rings {
			if m == nil {
				return errors.New("what is remembered of a metric is null")
			}
		}
	}
	return nil
}
