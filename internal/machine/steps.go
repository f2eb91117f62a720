package machine

import (
	"slices"
	"strings"
	"time"
)

// The names of the steps that undo what is journalled: all of it, or that of one ring. No host's step has such a name.
const (
	UndoStep = "(undo)"
	undoRing = "(undo " // and the ring, and a parenthesis
	undoKind = "undo:"  // and the kind: of effects that an operator waives
)

// ringStep is the name of the step that undoes what is journalled of a ring.
func ringStep(ring string) string { return undoRing + ring + ")" }

// Reserved reports whether no step of a host may be called so.
func Reserved(name string) bool {
	return name == UndoStep || strings.HasPrefix(name, undoRing)
}

// next is the index of the step to be made next, or -1: in a rollback the first that is not done, else of the rings that
// were rolled back alone the one whose step was not attempted for longest.
func (s *State) next() int {
	if s == nil {
		return -1
	}
	next := -1
	for i, st := range s.Steps {
		if s.due(i) && (next < 0 || st.Turn < s.Steps[next].Turn) {
			next = i
		}
	}
	return next
}

// due reports whether a step may be made now. No step of a rollback is before the one before it is done; rings that were
// rolled back alone do not wait for each other.
func (s *State) due(i int) bool {
	switch st := s.Steps[i]; {
	case st.Done || s.Phase == Stuck || s.Phase == RolledBack:
		return false
	case s.Phase == RollingBack:
		return !slices.ContainsFunc(s.Steps[:i], func(st StepState) bool { return !st.Done })
	default:
		return st.Ring != ""
	}
}

// attempted is the index of the step that an attempt is at, or -1 if it needs none any more.
func (s *State) attempted(name string, gen uint64) int {
	i := slices.IndexFunc(s.Steps, func(st StepState) bool { return st.Name == name && st.Gen == gen && !st.Done })
	if i >= 0 && s.due(i) {
		return i
	}
	return -1
}

// Needs reports whether an attempt at a step is of any use yet.
func (s *State) Needs(name string, gen uint64) bool { return s.attempted(name, gen) >= 0 }

// NextStep is the step to be made next.
func NextStep(s *State) (st StepState, ok bool) {
	i := s.next()
	if i < 0 {
		return StepState{}, false
	}
	return s.Steps[i], true
}

// BeginAttempt records that the next step is about to be attempted by runner, and returns its index, or -1 if there is
// nothing to attempt. Only the runner of the present term may begin one, or who takes over from it: with a higher term, so
// that what the one before still does can be told apart.
func BeginAttempt(s *State, runner string, takeOver bool) int {
	i := s.next()
	if i < 0 {
		return -1
	}
	if s.Runner != runner {
		if s.Runner != "" && !takeOver {
			return -1
		}
		s.Runner = runner
		s.Term++
	}
	s.Beat++
	s.Steps = slices.Clone(s.Steps)
	last := uint64(0)
	for _, st := range s.Steps {
		last = max(last, st.Turn)
	}
	s.Steps[i].Attempts++
	s.Steps[i].Turn = last + 1
	return i
}

// Attempt is how an attempt at a step ended.
type Attempt struct {
	Name    string // of the step
	Gen     uint64 // of the step: what it undoes may have become more meanwhile
	Cause   string // why it failed; "": it is done
	GiveUp  bool   // no attempt is left: the rollback is stuck. A ring's undoing never is while the others go on
	Effects int    // that it undid: some count as progress, and attempts begin anew
	Stopped bool   // from outside, before it was done: that is no failure, and uses up no attempt
}

// EndAttempt records how an attempt ended. It changes nothing where the step is not there any more or needs no attempt.
func EndAttempt(s *State, p *Plan, now time.Time, a Attempt) []Event {
	m := move{State: s, p: p, now: now}
	i := s.attempted(a.Name, a.Gen)
	if i < 0 {
		return nil
	}
	s.Steps = slices.Clone(s.Steps)
	st := &s.Steps[i]
	st.Effects += a.Effects
	if a.Effects > 0 {
		st.Attempts = 1
	}
	if a.Stopped {
		st.Attempts = max(st.Attempts-1, 0)
		return nil
	}
	st.Err = clip(a.Cause)
	ring := st.Ring
	if a.Cause == "" {
		st.Done = true
		m.event(Event{Kind: StepDone, Ring: ring, Note: st.Name})
		m.finish()
		return m.events
	}
	s.Beat++
	m.event(Event{Kind: StepFailed, Ring: ring, Note: st.Name + ": " + st.Err})
	if a.GiveUp && m.Phase == RollingBack {
		m.phase(Stuck)
		m.event(Event{Kind: RollbackStuck, Note: st.Name + ": " + st.Err, From: RollingBack, To: Stuck, Incident: s.Incident})
	}
	return m.events
}

// undoing are the steps of rings that were rolled back alone and whose effects are not undone yet: they outlast their
// generation.
func (s *State) undoing() []StepState {
	var steps []StepState
	for _, st := range s.Steps {
		if st.Ring != "" && !st.Done {
			steps = append(steps, st)
		}
	}
	return steps
}

// Covers reports whether an effect of a generation and a ring is the step's to undo. Whose ring cannot be read is every
// step's.
func (st *StepState) Covers(gen uint64, ring string, unread bool) bool {
	return st.Undo && gen > st.From && gen <= st.Gen && (st.Ring == "" || st.Ring == ring || unread)
}

// Kept reports whether an effect that is settled is to be undone all the same: its ring was rolled back alone before the
// rest was completed.
func (s *State) Kept(gen uint64, ring string, unread bool) bool {
	return slices.ContainsFunc(s.undoing(), func(st StepState) bool { return st.Covers(gen, ring, unread) })
}

// Over reports whether no effect of a generation and a ring is to be undone any more.
func (s *State) Over(gen uint64, ring string) bool {
	if slices.ContainsFunc(s.Steps, func(st StepState) bool { return st.Ring != "" && st.Done && st.Covers(gen, ring, false) }) {
		return true
	}
	return gen <= s.Settled && !s.Kept(gen, ring, false)
}

// KeptRings is how many rings' steps have effects to undo that are settled.
func (s *State) KeptRings() (n int) {
	for _, st := range s.undoing() {
		if st.From < s.Settled {
			n++
		}
	}
	return n
}

// undoAlso adds the undoing of a ring's effects; where those of an earlier generation are not undone yet, these come with
// them, so that no two steps have one name.
func (m *move) undoAlso(ring string) {
	step := StepState{Name: ringStep(ring), Undo: true, Ring: ring, From: m.Settled, Gen: m.Gen}
	m.Steps = slices.Clone(m.Steps)
	i := slices.IndexFunc(m.Steps, func(st StepState) bool { return st.Name == step.Name })
	if i < 0 {
		m.Steps = append(m.Steps, step)
		return
	}
	if was := m.Steps[i]; !was.Done {
		step.From, step.Effects, step.Err, step.Turn = min(step.From, was.From), was.Effects, was.Err, was.Turn
	}
	m.Steps[i] = step
}

// settle notes that no effect of this generation is to be undone any more: it was, or the candidate is here to stay. What
// is left of a ring that was rolled back alone is its own step's.
func (m *move) settle() {
	m.Settled = m.Gen
	m.Ver++
}

// waive takes an operator's word for a step, an effect or a kind of effects.
func (m *move) waive(v Verb) error {
	if v.Step == "" {
		return m.refuse("name a step, an effect by its key, or a kind of effects as in undo:KIND")
	}
	i := slices.IndexFunc(m.Steps, func(st StepState) bool { return st.Name == v.Step })
	switch {
	case i >= 0 && m.Steps[i].Done:
		return nil
	case i >= 0:
		st := &m.Steps[i]
		st.Done, st.Waived = true, true
		if st.Ring != "" { // what is left must not be undone by a later step either
			m.Waives = slices.DeleteFunc(m.Waives, func(w Waive) bool { return w.Name == st.Name })
			m.Waives = append(m.Waives, Waive{st.Name, st.Ring, st.Gen})
		}
	default:
		known := slices.ContainsFunc(m.Waives, func(w Waive) bool { return w.Name == v.Step })
		found := m.waivable(v.Step)
		if len(found) == 0 && !known {
			return m.refuse("there is no step " + clip(v.Step) + " to be waived")
		}
		found = slices.DeleteFunc(found, func(w Waive) bool { return slices.Contains(m.Waives, w) })
		if len(found) == 0 && m.Phase != Stuck {
			return nil
		}
		if m.waived()+len(found) > MaxWaives {
			m.Waives = m.unsettled()
		}
		if m.waived()+len(found) > MaxWaives {
			return m.refuse("too many effects are waived; waive a kind, or " + UndoStep)
		}
		m.Waives = append(m.Waives, found...)
	}
	from := m.Phase
	m.again()
	m.event(Event{Kind: StepWaived, Note: v.Step, From: from, To: m.Phase})
	m.finish()
	return nil
}

// waivable is what waiving an effect, or a kind, comes to in the steps that are to undo it yet.
func (m *move) waivable(name string) (found []Waive) {
	if !EffectName(m.Name, name) {
		return nil
	}
	gen, _, _, isKey := ParseEffectKey(m.Name, name)
	for _, st := range m.Steps {
		switch {
		case st.Done || !st.Undo:
		case !isKey:
			found = append(found, Waive{name, st.Ring, st.Gen})
		case st.Covers(gen, "", true):
			return []Waive{{Name: name, Gen: gen}}
		}
	}
	return found
}

// waived is how many effects, or kinds, are waived.
func (s *State) waived() (n int) {
	for _, w := range s.Waives {
		if w.Name != ringStep(w.Ring) {
			n++
		}
	}
	return n
}

// unsettled are the waives of effects that may be to be undone yet.
func (s *State) unsettled() (ws []Waive) {
	for _, w := range s.Waives {
		if w.Gen > s.Settled || slices.ContainsFunc(s.undoing(), func(st StepState) bool { return w.Gen > st.From }) {
			ws = append(ws, w)
		}
	}
	return ws
}

// again lets a rollback that is stuck try once more.
func (m *move) again() {
	if m.Phase != Stuck {
		return
	}
	m.Steps = slices.Clone(m.Steps)
	for i := range m.Steps {
		if !m.Steps[i].Done {
			m.Steps[i].Attempts = 0
		}
	}
	m.phase(RollingBack)
}
