package machine

import (
	"slices"
	"time"
)

// NextStep is the name of the step that a rollback under way needs next.
func NextStep(s *State) (name string, ok bool) {
	if s == nil || s.Phase != RollingBack {
		return "", false
	}
	for _, st := range s.Steps {
		if !st.Done {
			return st.Name, true
		}
	}
	return "", false
}

// BeginAttempt records that the next step of a rollback is about to be attempted by runner, and returns its index, or -1
// if there is nothing to attempt. Only the runner of the present term may begin one, or who takes over from it: with a
// higher term, so that what the one before still does can be told apart.
func BeginAttempt(s *State, runner string, takeOver bool) int {
	if s.Phase != RollingBack {
		return -1
	}
	i := slices.IndexFunc(s.Steps, func(st StepState) bool { return !st.Done })
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
	s.Steps[i].Attempts++
	return i
}

// EndAttempt records how the attempt at step i ended. giveUp: no attempt is left, the rollback is stuck.
func EndAttempt(s *State, p *Plan, now time.Time, i int, cause string, giveUp bool) []Event {
	m := move{State: s, p: p, now: now}
	if s.Phase != RollingBack || i >= len(s.Steps) {
		return nil
	}
	s.Steps = slices.Clone(s.Steps)
	st := &s.Steps[i]
	st.Err = clip(cause)
	if cause == "" {
		st.Done = true
		m.event(Event{Kind: StepDone, Note: st.Name})
		m.finish()
		return m.events
	}
	s.Beat++
	m.event(Event{Kind: StepFailed, Note: st.Name + ": " + st.Err})
	if giveUp {
		m.phase(Stuck)
		m.event(Event{Kind: RollbackStuck, Note: st.Name + ": " + st.Err, From: RollingBack, To: Stuck, Incident: s.Incident})
	}
	return m.events
}
