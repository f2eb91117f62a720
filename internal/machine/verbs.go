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
	Note    string
	Nonce   string // for a new generation
	Now     time.Time
	Checks  map[string]judge.CheckResult
	// Incident is why, for a rollback that a process's own evidence called for. Nil: the operator wanted it.
	Incident *Incident
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
)

// Apply does what an operator asks for. Asking twice is as asking once: where there is nothing to do the state stays as
// it was, to the bit. An error leaves it so as well.
func Apply(s *State, p *Plan, v Verb) ([]Event, error) {
	c := s.Clone()
	m := move{State: c, p: p, now: v.Now}
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
		for i := range m.Steps {
			if !m.Steps[i].Done {
				m.Steps[i].Attempts = 0
			}
		}
		m.phase(RollingBack)
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
		return m.refuse("a rollback is not finished")
	}
	if m.Phase == Pending && m.Gen > 1 && m.Version == m.p.Version && m.Assignment == m.p.Assignment {
		return nil // it has just begun, and nobody was exposed
	}
	m.generation(v.Nonce, v.Note)
	return nil
}

// generation begins a new one with the plan's version.
func (m *move) generation(nonce, note string) {
	from := m.Phase
	p := m.p
	versions := slices.Clone(m.Versions)
	for i := range versions {
		if versions[i].Version == m.Version {
			versions[i].Starts = m.Gates.Starts
		}
	}
	at := slices.IndexFunc(versions, func(e VersionEntry) bool { return e.Version == p.Version })
	seen := at >= 0
	if !seen {
		versions = append(versions, VersionEntry{Version: p.Version})
		if extra := len(versions) - MaxVersions; extra > 0 {
			versions = slices.Delete(versions, 0, extra)
		}
		at = len(versions) - 1
	}
	versions[at] = VersionEntry{Version: p.Version, Gen: m.Gen + 1, Starts: versions[at].Starts}
	*m.State = State{
		Format: Format, Name: m.Name,
		Gen: m.Gen + 1, Nonce: nonce, Ver: m.Ver + 1, Epoch: m.Epoch, Round: m.Round, Term: m.Term,
		Version: p.Version, Versions: versions,
		Policy: p.Policy, Assignment: p.Assignment, Undoes: p.Steps,
		Notes: m.Notes, Cursors: m.Cursors,
	}
	if seen { // a candidate that was judged before is judged again: its bound pays for both
		m.Gates.Starts = versions[at].Starts
		m.Gates.Anew()
	}
	m.reshare()
	m.event(Event{Kind: Started, Note: note, From: from, To: Pending})
}

// Standing says how a process with its own plan stands to the state.
type Standing uint8

// How a process may stand to the state.
const (
	Current  Standing = iota // it runs the candidate that the state is about
	Passive                  // it runs an earlier candidate, or one that has to wait: stable, and no verdicts
	Done                     // it runs an earlier candidate that was completed: everybody has it
	Follower                 // it runs the candidate with an older policy: the shares are served, and no verdicts
)

// Stands says how a process with plan p stands to the state as it is.
func Stands(s *State, p *Plan) Standing {
	if s.Version == p.Version {
		if s.Assignment != p.Assignment && (s.Phase == Running || s.Phase == Held) {
			return Passive // until a generation with the new assignment begins
		}
		return Current
	}
	for _, e := range s.Versions {
		if e.Version == p.Version && !e.Completed {
			return Passive
		}
		if e.Version == p.Version {
			return Done
		}
	}
	if s.Phase == Completed {
		return Done // it will be adopted
	}
	return Passive
}

// Yields is how a process stands to a state that another one, of the same version, has given another policy.
func Yields(s *State, p *Plan) Standing {
	if s.Assignment != p.Assignment && s.Phase != Completed && !s.Phase.Latched() {
		return Passive
	}
	return Follower
}

// Adopt squares the state with a process's plan: a new version starts a generation, an edited policy finds its stage. It
// raises no share. nonce names the generation it may start.
func Adopt(s *State, p *Plan, nonce string, now time.Time) (Standing, []Event) {
	m := move{State: s, p: p, now: now}
	if s.Version != p.Version {
		if slices.ContainsFunc(s.Versions, func(e VersionEntry) bool { return e.Version == p.Version }) {
			return Stands(s, p), nil
		}
		switch s.Phase {
		case RollingBack, Stuck:
			return Passive, nil
		case Completed:
			m.Version, m.Policy, m.Assignment, m.Undoes = p.Version, p.Policy, p.Assignment, p.Steps
			m.Versions = append(slices.Clone(m.Versions), VersionEntry{Version: p.Version, Gen: m.Gen, Completed: true})
			m.Ver++
			m.event(Event{Kind: VersionAdopted, Note: p.Version})
			return Current, m.events
		}
		m.generation(nonce, "version "+p.Version)
		return Current, m.events
	}
	if s.Policy == p.Policy && s.Assignment == p.Assignment {
		return Current, nil
	}
	m.edited(nonce)
	return Current, m.events
}

// edited squares the state with another policy of the same version.
func (m *move) edited(nonce string) {
	assignment := m.Assignment != m.p.Assignment
	m.Policy, m.Assignment = m.p.Policy, m.p.Assignment
	if !m.Phase.Latched() {
		m.Undoes = m.p.Steps
	}
	switch {
	case m.Phase == Completed || m.Phase.Latched() || m.Stage == (StageRef{}):
		m.Shares = m.p.shares(m.State)
		m.event(Event{Kind: PolicyEdited})
		return
	case assignment:
		m.generation(nonce, "other rings, salt or holdback")
		return
	}
	i := m.restage()
	m.Stage = m.p.Stages[i].StageRef
	m.Climb, m.From = 0, 0
	if steps := m.p.Stages[i].climb(); steps > 0 { // it climbs on from where it is
		m.Climb, m.From = 1, m.within(m.Stage.Ring)
		if m.From >= m.Stage.Percent {
			m.Climb = steps
		}
	}
	m.Proved = false
	m.p.Judge.Prune(&m.Gates)
	m.fresh()
	m.reshare()
	m.event(Event{Kind: PolicyEdited, Ring: m.Stage.Ring})
	if m.Phase == Running && slices.Contains(m.Rings, m.Stage.Ring) {
		m.hold(HoldCause{Kind: HeldByRings, Note: m.Stage.Ring + " is rolled back"}, nil)
	}
}

// restage is the first stage of the present one's ring that is not below the ring's present share; where there is none,
// the last of that ring, or else the first one of a ring around it.
func (m *move) restage() int {
	last := -1
	for i, st := range m.p.Stages {
		if st.Ring != m.Stage.Ring {
			continue
		}
		if last = i; st.Percent >= m.Reach[st.Ring] {
			return i
		}
	}
	if last >= 0 {
		return last
	}
	for i, st := range m.p.Stages {
		if m.p.ring(st.Ring) > m.p.ring(m.Stage.Ring) {
			return i
		}
	}
	return len(m.p.Stages) - 1
}

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

// Rejoin squares a stored state that is older than the newest one known, because the store was set back, with what is
// known: a rollback of either holds, no share is above that of either, counters go on from the greater. Evidence consumed
// in between is lost, both cohorts alike, and none counts twice.
func Rejoin(stored, known *State, p *Plan, nonce string, now time.Time) (*State, []Event) {
	if stored == nil {
		stored = known
	}
	s := stored.Clone()
	if stored.Gen < known.Gen || Raises(known, stored) || known.Phase.Latched() {
		s = known.Clone()
	}
	m := move{State: s, p: p, now: now}
	s.Gen, s.Ver = max(stored.Gen, known.Gen), max(stored.Ver, known.Ver)+1
	s.Epoch, s.Round, s.Term = max(stored.Epoch, known.Epoch), max(stored.Round, known.Round), max(stored.Term, known.Term)
	s.Nonce = nonce
	s.Cursors = nil
	if stored.Gen == known.Gen {
		for _, ring := range slices.Concat(stored.Rings, known.Rings) {
			if !slices.Contains(s.Rings, ring) {
				s.Rings = append(s.Rings, ring)
			}
		}
		if stored.Phase.Latched() && !s.Phase.Latched() {
			m.rollback(stored.Incident)
		}
	}
	if s.Phase == Running && slices.Contains(s.Rings, s.Stage.Ring) {
		m.hold(HoldCause{Kind: HeldByRings, Note: s.Stage.Ring + " is rolled back"}, nil)
	}
	if s.Phase == Running || s.Phase == Held {
		s.Gates.ResetProof()
		m.reshare()
		s.Entered = s.Epoch
	}
	m.event(Event{Kind: WentBack})
	return s, m.events
}
