package machine

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
)

// ErrStage: a verb names a stage that is not the present one.
var ErrStage = errors.New("that stage is not the present one")

// ErrState: a verb makes no sense in the present state.
var ErrState = errors.New("not possible in the present state")

// Verb is what an operator asks for.
type Verb struct {
	Name    string // as in Note.Verb
	Stage   string
	Ring    string
	Percent float64
	Step    string // to be waived
	Note    string
	Nonce   string // for a new generation
	Now     time.Time
	Checks  map[string]judge.CheckResult
	// Incident is why, for a rollback that a process's own evidence called for. Nil: the operator wanted it.
	Incident *Incident
	Units    map[string][2]uint64 // as in Input
}

// Lowers reports whether no share can rise by the verb, and nothing is taken for settled.
func (v Verb) Lowers() bool {
	return v.Name == VerbRollback || v.Name == VerbRollbackRing || v.Name == VerbHold
}

// The names of the verbs.
const (
	VerbApprove      = "approve"
	VerbAdvance      = "advance"
	VerbHold         = "hold"
	VerbResume       = "resume"
	VerbRollback     = "rollback"
	VerbRollbackRing = "rollback ring"
	VerbSetPercent   = "set percent"
	VerbRestart      = "restart"
	VerbWaive        = "waive"
)

// Apply does what an operator asks for. Asking twice is as asking once: where there is nothing to do the state stays as
// it was, to the bit. An error leaves it so as well.
func Apply(s *State, p *Plan, v Verb) ([]Event, error) {
	c := s.Clone()
	m := move{State: c, p: p, now: v.Now, units: v.Units}
	if err := m.apply(v); err != nil {
		return nil, err
	}
	if len(m.events) == 0 {
		return nil, nil
	}
	c.Notes = append(c.Notes, Note{At: v.Now, Verb: v.Name, Note: clip(v.Note)})
	if extra := len(c.Notes) - MaxNotes; extra > 0 {
		c.Notes = slices.Delete(c.Notes, 0, extra)
	}
	*s = *c
	return m.events, nil
}

func (m *move) apply(v Verb) error {
	switch v.Name {
	case VerbApprove:
		return m.approve(v)
	case VerbAdvance:
		return m.advance(v)
	case VerbHold:
		return m.holdVerb(v)
	case VerbResume:
		return m.resume(v)
	case VerbRollback:
		return m.rollbackVerb(v)
	case VerbRollbackRing:
		return m.rollbackRingVerb(v)
	case VerbSetPercent:
		return m.setPercent(v)
	case VerbRestart:
		return m.restart(v)
	case VerbWaive:
		return m.waive(v)
	}
	return fmt.Errorf("unknown verb %q", v.Name)
}

// refuse explains why the verb is not possible now.
func (m *move) refuse(why string) error {
	return fmt.Errorf("%w: it is %v; %s", ErrState, m.Phase, why)
}

// present checks that the verb names the present stage.
func (m *move) present(v Verb) (int, error) {
	i := m.p.find(m.Stage)
	if m.Phase != Running && m.Phase != Held || i < 0 {
		return 0, fmt.Errorf("%w: %q, there is none: it is %v", ErrStage, v.Stage, m.Phase)
	}
	if v.Stage != m.Stage.Name {
		return 0, fmt.Errorf("%w: %q, it is %q", ErrStage, v.Stage, m.Stage.Name)
	}
	return i, nil
}

func (m *move) approve(v Verb) error {
	if _, err := m.present(v); err != nil || m.Approved {
		return err
	}
	m.Approved = true
	m.event(Event{Kind: WasApproved, Note: v.Note})
	return nil
}

func (m *move) advance(v Verb) error {
	i, err := m.present(v)
	if err != nil {
		return err
	}
	for g, r := range m.p.Judge.Assess(&m.Gates, v.Checks) {
		if m.p.Stages[i].Armed[g] && r.Verdict == judge.Unhealthy && r.Action != judge.Report {
			return m.refuse(fmt.Sprintf("the gate %s is unhealthy: %s", r.Spec.Name, r.Cause))
		}
	}
	note := v.Note
	if note == "" {
		note = "advanced by an operator"
	}
	if m.Phase == Held {
		m.phase(Running)
		m.unset()
	}
	m.promote(i, note)
	return nil
}

func (m *move) holdVerb(v Verb) error {
	switch m.Phase {
	case Held:
		return nil
	case Pending, Running:
		m.hold(HoldCause{Kind: HeldByOperator, Note: clip(v.Note)}, nil)
		return nil
	}
	return m.refuse("there is nothing to hold")
}

func (m *move) resume(v Verb) error {
	switch m.Phase {
	case Running, Pending:
		return nil
	case Held:
	default:
		return m.refuse("there is nothing to resume")
	}
	if slices.Contains(m.Rings, m.Stage.Ring) {
		return m.refuse(fmt.Sprintf("the stage's ring %q is rolled back: advance past it, or restart", m.Stage.Ring))
	}
	cause := m.Hold.Kind
	if m.Stage == (StageRef{}) {
		m.phase(Pending)
		m.event(Event{Kind: Resumed, Note: v.Note, From: Held, To: Pending})
		return nil
	}
	if cause == HeldByGate {
		m.anew()
	}
	if cause == HeldByDeadline {
		m.Elapsed = 0
	}
	m.phase(Running)
	m.unset()
	m.event(Event{Kind: Resumed, Note: v.Note, From: Held, To: Running})
	return nil
}

// unset ends what operators set.
func (m *move) unset() {
	if len(m.Set) > 0 {
		m.Set = nil
		m.reshare()
	}
}

func (m *move) rollbackVerb(v Verb) error {
	switch m.Phase {
	case RollingBack, RolledBack:
		return nil
	case Stuck: // try again
		m.again()
		m.event(Event{Kind: RollbackBegan, Note: v.Note, From: Stuck, To: RollingBack, Incident: m.Incident})
		return nil
	}
	in := v.Incident
	if in == nil {
		in = m.incident(nil, v.Note)
	}
	m.rollback(in)
	return nil
}

func (m *move) rollbackRingVerb(v Verb) error {
	if m.p.ring(v.Ring) < 0 {
		return fmt.Errorf("there is no ring %q", v.Ring)
	}
	if m.Phase.Latched() || slices.Contains(m.Rings, v.Ring) {
		return nil
	}
	m.rollbackRing(v.Ring, m.incident(nil, v.Note))
	return nil
}

func (m *move) setPercent(v Verb) error {
	if m.p.ring(v.Ring) < 0 {
		return fmt.Errorf("there is no ring %q", v.Ring)
	}
	if !(v.Percent >= 0 && v.Percent <= 100) {
		return fmt.Errorf("percent: %v must be at least 0 and at most 100", v.Percent)
	}
	if m.Phase != Running && m.Phase != Held || m.Stage == (StageRef{}) {
		return m.refuse("shares can be set while it is running or held")
	}
	if slices.Contains(m.Rings, v.Ring) {
		return m.refuse(fmt.Sprintf("the ring %q is rolled back; restart to expose it again", v.Ring))
	}
	if set, ok := m.Set[v.Ring]; ok && set == v.Percent && m.Phase == Held {
		return nil
	}
	if len(m.History) >= MaxHistory-64 { // what is left is for rollbacks
		return m.refuse("shares were changed too often in this generation for the history to hold")
	}
	from := m.Phase
	if m.Set == nil {
		m.Set = map[string]float64{}
	}
	m.Set[v.Ring] = v.Percent
	m.phase(Held)
	if m.Hold == nil {
		m.Hold = &HoldCause{Kind: HeldByPercent, Note: clip(v.Note)}
	}
	m.reshare()
	m.event(Event{Kind: PercentSet, Ring: v.Ring, Note: v.Note, From: from, To: Held})
	return nil
}

func (m *move) restart(v Verb) error {
	if m.Phase == RollingBack || m.Phase == Stuck {
		return m.refuse("a rollback is not finished; Rollback tries its steps again, Waive does without one")
	}
	if m.Phase == Pending && m.Gen > 1 && m.Version == m.p.Version && m.Assignment == m.p.Assignment {
		return nil // it has just begun, and nobody was exposed
	}
	m.generation(v.Nonce, v.Note)
	return nil
}
