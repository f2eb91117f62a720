package judge

import (
	"fmt"
	"slices"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// Consume bets one block in every gate of its metric for which active (nil:
// every gate) answers true for the gate's index. proof: also in the promotion
// processes, because the block is of the stage's own ring since the stage was
// entered. What is bet depends on earlier blocks and the block's sizes only;
// a cohort without outcomes changes no relative gate, but the control's are
// remembered. What it comes to is for [Judge.Look] to say.
func (j *Judge) Consume(st *State, b Block, active func(gate int) bool, proof bool) {
	if st.scratch == nil {
		st.scratch = new(scratch)
	}
	var mem *Memory
	var kind Kind
	c := &st.scratch.counts
	marks := 0
	for i := range j.gates {
		g := &j.gates[i]
		if g.Metric != b.Metric || !g.fits(&b) {
			continue // or counts of something else
		}
		if mem == nil {
			mem, kind, marks = st.memory(b.Metric, b.Ring), g.Kind, g.marks
			c.view(&b, kind.timing(), marks)
		}
		if active == nil || active(i) {
			j.consume(g, st.gate(g), mem, &b, st.scratch, proof)
		}
	}
	if mem != nil {
		mem.remember(&b, kind, marks, c)
	}
}

// scratch is room to work in.
type scratch struct {
	counts counts
	rows   [folds]evalue.Logs
}

func (j *Judge) consume(g *gate, s *Gate, mem *Memory, b *Block, room *scratch, proof bool) {
	if g.Kind == Never {
		part := s.part(b.Ring)
		x := event(b.Candidate)
		part.Candidate.add(sum(b.Candidate), x)
		part.Control.add(sum(b.Control), event(b.Control))
		if x > b.Known {
			all, _ := s.tallies()
			j.never(s, b.Ring, fmt.Sprintf("%s: %d of %d candidate outcomes are what must never happen", g.Metric, all.X, all.N))
		}
		return
	}
	rows, c := room.rows[:j.rows(g)], &room.counts
	for i := range g.rollback {
		bet := &g.rollback[i]
		if i == 0 {
			g.tally(s.part(b.Ring), mem, b, c)
		}
		if bet.logs(rows, g.Kind, mem, b, c) {
			j.bet(g, s, i, b.Ring, rows)
		}
	}
	if !proof {
		return
	}
	for i := range g.proof {
		if rows := g.proof[i].proofs(room.rows[:1], g.Kind, mem, b, c); rows != nil {
			s.Proof = grown(s.Proof, len(g.proof))
			s.Proof[i].Update(g.proof[i].prior(), rows)
		}
	}
}

// never breaks a gate that one event breaks.
func (j *Judge) never(s *Gate, ring, cause string) {
	switch {
	case !s.Broken:
		s.Broken, s.Cause = true, cause
		if j.split() {
			s.Ring = ring
		}
	case s.Ring != ring:
		s.Ring = "" // in more than one
	}
}

// bet updates the processes of a gate's bet with a block of one ring: the pool,
// the ring's own, and the pool without each of the other rings.
func (j *Judge) bet(g *gate, s *Gate, i int, ring string, rows []evalue.Logs) {
	prior := g.rollback[i].prior()
	if j.split() {
		part := s.part(ring)
		if part.Own == nil {
			s.enter(ring, len(g.rollback), len(j.rings) < manyRings)
		}
		part.Own = grown(part.Own, len(g.rollback))
		part.Own[i].Update(prior, rows)
		for other, p := range s.Parts {
			if other != ring && p.But != nil {
				p.But = grown(p.But, len(g.rollback))
				p.But[i].Update(prior, rows)
			}
		}
	}
	s.Pool = grown(s.Pool, len(g.rollback))
	s.Pool[i].Update(prior, rows)
}

// enter gives a ring processes of its own, at its first bet. Without it the pool
// has been what it is now; without the others it is the ring's alone.
func (s *Gate) enter(ring string, bets int, without bool) {
	part := s.part(ring)
	part.Own = make([]evalue.Bank, bets)
	if !without {
		return
	}
	for other, p := range s.Parts {
		if other == ring || p.Own == nil {
			continue
		}
		part.But = cloneAll(grown(s.Pool, bets))
		if p.But == nil { // it was the only one
			p.But = make([]evalue.Bank, bets)
		}
	}
}

// Leave takes a ring that is rolled back alone out of the sums: its outcomes count
// no more, and gates that it alone has broken are no longer broken.
func (j *Judge) Leave(st *State, ring string) {
	for _, s := range st.Gates {
		if s == nil {
			continue
		}
		if s.Broken && s.Ring == ring {
			s.Broken, s.Cause, s.Ring, s.Action = false, "", "", Default
		}
		gone := s.Parts[ring]
		if gone == nil {
			continue
		}
		delete(s.Parts, ring)
		if gone.Own == nil {
			continue
		}
		left := make([]*Part, 0, len(s.Parts))
		for _, name := range s.rings() {
			if p := s.Parts[name]; p.Own != nil {
				left = append(left, p)
			}
		}
		kept := gone.But != nil || len(left) == 0
		if s.Pool = gone.But; !kept {
			s.Pool = meanOf(left, nil)
		}
		// What the pool would be without two rings was not kept. The mean of the
		// rings that are left is a process as well.
		for _, p := range left {
			if p.But = nil; kept && len(left) > 1 {
				p.But = meanOf(left, p)
			}
		}
	}
	for metric, rings := range st.Memory {
		if rings[ring] == nil {
			continue
		}
		delete(rings, ring)
		for name := range st.Gates { // a proof may hold its outcomes, and how they went together is forgotten
			if g := j.named(name); g != nil && g.Metric == metric {
				st.Gates[name].Proof = nil
			}
		}
	}
}

// named is the gate of that name, or nil.
func (j *Judge) named(name string) *gate {
	for i := range j.gates {
		if j.gates[i].Name == name {
			return &j.gates[i]
		}
	}
	return nil
}

// meanOf is the mean of the processes of each ring but one.
func meanOf(parts []*Part, but *Part) []evalue.Bank {
	var mean []evalue.Bank
	for i := 0; ; i++ {
		var banks []evalue.Bank
		for _, p := range parts {
			if p != but && i < len(p.Own) {
				banks = append(banks, p.Own[i])
			}
		}
		if len(banks) == 0 {
			return mean
		}
		mean = append(mean, evalue.Merge(banks))
	}
}

// Breach breaks the active Never gates of a metric at once: events of the
// candidate were seen in a ring that no block holds yet. The block that will is
// no news: its Known says so.
func (j *Judge) Breach(st *State, metric, ring string, events uint64, active func(gate int) bool) {
	for i := range j.gates {
		g := &j.gates[i]
		if g.Kind != Never || g.Metric != metric || !active(i) || events == 0 {
			continue
		}
		j.never(st.gate(g), ring, g.Metric+": what must never happen has happened to the candidate")
	}
}

// Watchful reports whether there is a Never gate that is not broken.
func (j *Judge) Watchful(st *State) bool {
	for i := range j.gates {
		if g := &j.gates[i]; g.Kind == Never && !st.known(g).Broken {
			return true
		}
	}
	return false
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

// Anew starts the rollback processes anew, after a step back or when what broke
// was looked at, and forgets which gates are broken and what they counted. Each
// start raises the threshold. The control's past and the proofs are kept.
func (st *State) Anew() {
	st.Starts++
	for name, g := range st.Gates {
		if g != nil {
			st.Gates[name] = &Gate{Of: g.Of, Proof: g.Proof}
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

// part returns what is remembered of the gate in one ring.
func (s *Gate) part(ring string) *Part {
	if s.Parts[ring] == nil {
		if s.Parts == nil {
			s.Parts = map[string]*Part{}
		}
		s.Parts[ring] = &Part{}
	}
	return s.Parts[ring]
}

// rings are the rings with a part, in order.
func (s *Gate) rings() []string {
	names := make([]string, 0, len(s.Parts))
	for name, p := range s.Parts {
		if p != nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// tallies are the outcomes of both cohorts in every ring.
func (s *Gate) tallies() (candidate, control Tally) {
	for _, p := range s.Parts {
		if p != nil {
			candidate.join(p.Candidate)
			control.join(p.Control)
		}
	}
	return candidate, control
}

func grown(banks []evalue.Bank, n int) []evalue.Bank {
	if len(banks) != n {
		return make([]evalue.Bank, n)
	}
	return banks
}
