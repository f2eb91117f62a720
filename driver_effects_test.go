package rollout

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// made is an effect, as the driver remembers it.
type made struct {
	gen     uint64
	ring    string
	by      *proc
	n       int // in the order of their journalling
	at      time.Time
	sure    bool // Journal has returned nil: it is to be undone
	settled bool // the rollout was completed, and it stays
	undone  int
}

// journal has a decision come to its effect.
func (p *proc) journal(dec Decision) {
	d := p.d
	m := &made{gen: dec.Generation(), ring: dec.Ring(), by: p, n: len(d.effects), at: d.now}
	id := fmt.Sprint(m.n)
	d.effects[id] = m
	before := d.load()
	err := dec.Journal(context.Background(), "row", []byte(id))
	after := d.load()
	completed := func(st *machine.State) bool { return st != nil && st.Gen == m.gen && st.Phase == machine.Completed }
	m.settled = m.settled || after != nil && after.Settled >= m.gen && !after.Phase.Latched() && !after.Kept(m.gen, m.ring, false)
	m.sure = err == nil && dec.Enabled() && dec.Reason() != ReasonCompleted && !completed(before) && !completed(after)
	// What is settled by a rollback takes no effects any more.
	if m.sure && after != nil && (after.Gen == m.gen && after.Phase.Latched() || after.Settled >= m.gen && !m.settled) {
		d.broken("an effect of generation %d is journalled, which is %v", m.gen, after.Phase)
	}
}

// undo is the policy's way to undo an effect.
func (d *driver) undo(_ context.Context, e Effect) error {
	m := d.effects[string(e.Payload)]
	if m == nil {
		d.broken("the effect %s is undone, and was never made", e.Key)
		return nil
	}
	st := d.load()
	d.attempted(st, e.Fence)
	next, ok := machine.NextStep(st)
	wrong := !ok || !next.Undo || next.Attempts == 0 || next.Gen < m.gen || next.Ring != "" && next.Ring != m.ring
	if wrong && !d.store.came || e.Generation != m.gen || e.Ring != m.ring {
		d.broken("an effect of generation %d in %s is undone, and stored is %+v", m.gen, m.ring, next)
	}
	if m.settled {
		d.broken("an effect of generation %d is undone, which was completed", m.gen)
	}
	if err := d.mayFail(); err != nil {
		return err
	}
	m.undone++
	if m.undone > 1 || !m.sure {
		return nil
	}
	step := fmt.Sprint(next.Name, next.Gen)
	if last := d.undone[step]; last != nil && (last.at.Before(m.at) || last.by == m.by && last.n < m.n) {
		d.broken("an effect is undone after one that is older")
	}
	d.undone[step] = m
	return nil
}

// wroteSteps judges what a write says of steps, and of effects.
func (d *driver) wroteSteps(prev, next *machine.State) {
	if prev.Gen == next.Gen && next.Phase == machine.Completed && next.Settled == next.Gen {
		for _, m := range d.effects {
			m.settled = m.settled || m.gen <= next.Settled && !next.Kept(m.gen, m.ring, false)
		}
	}
	undone := func(s machine.StepState) {
		for id, m := range d.effects {
			if m.sure && !m.settled && m.undone == 0 && s.Covers(m.gen, m.ring, false) {
				d.broken("the effect %s of generation %d in %s was not undone, and the rollback of generation %d %s is done", id, m.gen, m.ring, s.Gen, s.Ring)
			}
		}
	}
	for i, s := range next.Steps {
		was := slices.IndexFunc(prev.Steps, func(o machine.StepState) bool { return o.Name == s.Name && o.Gen == s.Gen })
		done := was >= 0 && prev.Steps[was].Done
		switch {
		case !s.Done || done:
			continue
		case was < 0 || prev.Steps[was].Attempts == 0:
			d.broken("the step %s is done and was not attempted", s.Name)
		case s.Undo:
			undone(s)
		}
		for _, before := range next.Steps[:i] {
			if !before.Done && next.Phase.Latched() {
				d.broken("the step %s is done before %s", s.Name, before.Name)
			}
		}
	}
	if next.Phase == machine.RolledBack && prev.Phase != machine.RolledBack {
		undone(machine.StepState{Undo: true, Gen: next.Gen})
		if next.Exposed && len(next.Steps) < len(next.Undoes) {
			d.broken("it is rolled back without its steps")
		}
	}
}

// begins reports whether a write begins an attempt at a step.
func begins(prev, next *machine.State) bool {
	return slices.ContainsFunc(next.Steps, func(s machine.StepState) bool {
		was := slices.IndexFunc(prev.Steps, func(o machine.StepState) bool { return o.Name == s.Name && o.Gen == s.Gen })
		return s.Turn > 0 && (was < 0 || s.Turn > prev.Steps[was].Turn)
	})
}

// checkSessions judges which sessions are revoked.
func (p *proc) checkSessions(known *machine.State) {
	for _, s := range p.sessions {
		if !s.began.Enabled() || s.ended.Load() {
			continue
		}
		gen, ring := s.began.Generation(), s.began.Ring()
		over := false
		select {
		case <-s.Revoked():
			over = true
		default:
		}
		gone := known != nil && (known.Gen == gen && (known.Phase.Latched() || slices.Contains(known.Rings, ring)))
		if gone && !over {
			p.d.broken("a session of generation %d in %s is not revoked, and it is %v", gen, ring, known.Phase)
		}
		if over && !gone && known != nil && known.Gen == gen && gen > p.gone && !p.latch[gen] {
			p.d.broken("a session of generation %d in %s is revoked, and it is %v", gen, ring, known.Phase)
		}
	}
}

// session begins a session, or ends the oldest.
func (p *proc) session(end bool) {
	if end {
		if len(p.sessions) > 0 {
			p.sessions[0].End(nil)
			p.sessions = p.sessions[1:]
		}
		return
	}
	p.d.units++
	u := Unit{Key: fmt.Sprint(p.d.units)}
	if p.d.units%2 == 0 {
		u.Groups = staffOnly
	}
	_, s := p.Begin(context.Background(), u)
	if s.began.Enabled() && s.began.Generation() <= p.gone && p.standing != machine.Done {
		p.d.broken("a session begins on generation %d, which was rolled back here", s.began.Generation())
	}
	p.sessions = append(p.sessions, s)
}
