package machine

import (
	"slices"
	"strings"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/tally"
)

// Kind says what happened.
type Kind uint8

// What can happen to a rollout.
const (
	Started        Kind = iota + 1 // a generation began
	StageEntered                   // shares rose to a stage, or fell back to one
	Climbed                        // a climbing stage took a step
	WasHeld                        // it stays where it is
	Resumed                        // it goes on
	WasApproved                    // an operator approved the stage
	PercentSet                     // an operator set a share
	SteppedBack                    // a gate sent it to the stage before
	RingRolledBack                 // one ring went back to stable
	RollbackBegan                  // everybody went back to stable; steps run next
	StepFailed                     // an attempt of a rollback step failed
	StepDone                       // a rollback step is done
	RollbackStuck                  // a step keeps failing
	RollbackDone                   // steps are done
	WasCompleted                   // everybody has the candidate
	GateBroken                     // a gate that only reports, or one that holds, was broken
	PolicyEdited                   // the same version came with another policy
	VersionAdopted                 // a completed rollout took up a new version
	WentBack                       // the store was set back; what was known is joined with it
	StepWaived                     // an operator's word stands for a rollback step
	WorkLost                       // a process died with work that it had begun
	EvidenceLost                   // what a process had counted cannot be read any more
)

// Event is one thing that happened in a step or by a verb.
type Event struct {
	Kind     Kind
	Stage    string
	Ring     string
	Gate     string
	Note     string
	From, To Phase
	Incident *Incident
}

// Block is one closed block of evidence, of decisions made in one epoch of the present generation.
type Block struct {
	judge.Block
	Epoch uint64
}

// Breach is new events of the candidate, for Never, that no block holds yet.
type Breach struct {
	Metric, Ring string
	Events       uint64
}

// Input is what one evaluation sees.
type Input struct {
	Now        time.Time     // for people, and to tell how long ago it was
	Elapsed    time.Duration // not accounted for yet, see [State.Account]
	Blocks     []Block       // each given once, oldest epoch first
	Outcomes   []string      // rings in which candidate outcomes of the present epoch arrived since the last step
	Breaches   []Breach      // each given once
	Checks     map[string]judge.CheckResult
	Rationales map[string][]string  // of the candidate's observations, by metric: for the incident of a broken gate
	MayAdvance bool                 // no share is raised otherwise
	Sources    map[string]Totals    // where the sources' totals are once Blocks are consumed; nil: as before
	Dead       []*tally.Doc         // sealed documents, which Blocks have been taken of as well
	Lost       []string             // incarnations whose documents cannot be read, see [Rebase]
	Units      map[string][2]uint64 // that came, by ring, of the control and of the candidate: for an incident
}

// New is the state of a rollout that nothing has happened to.
func New(name string, p *Plan, nonce string) *State {
	s := &State{Format: Format, Name: name, Gen: 1, Ver: 1, Epoch: 1, Nonce: nonce, Version: p.Version, Policy: p.Policy, Assignment: p.Assignment}
	s.Versions = []VersionEntry{{Version: p.Version, Gen: 1}}
	s.Undoes, s.Effects = p.Steps, p.Undoes
	s.Salt, s.Holdback = p.Salt, p.Holdback
	s.Shares = p.shares(s)
	return s
}

// Step is one evaluation: it consumes the blocks, judges, and moves the state as far as the verdicts and the time allow,
// a rollback before any promotion.
func Step(s *State, p *Plan, in Input) []Event {
	m := move{State: s, p: p, now: in.Now, rationales: in.Rationales, units: in.Units}
	s.Round++
	s.Last = in.Now
	s.Clock += p.passed(in.Elapsed)
	if in.Sources != nil {
		s.Sources = in.Sources
	}
	switch s.Phase {
	case Pending:
		if !in.MayAdvance {
			return nil
		}
		m.phase(Running)
		m.event(Event{Kind: Started, Note: s.Version, From: Pending, To: Running})
		m.enterFrom(0, "")
		return m.events
	case Running, Held:
	default:
		return nil
	}
	m.bury(in.Dead)
	for _, inc := range in.Lost {
		c := m.Cursors[inc]
		m.retire(inc, Cursor{Seq: c.Seq, Round: m.Round, Birth: c.Birth})
		m.event(Event{Kind: EvidenceLost, Note: "the evidence of " + clip(inc) + " cannot be read; what it had counted and was not judged is given up"})
	}
	if s.Stage == (StageRef{}) { // held before it ever ran
		return m.events
	}
	i := p.find(s.Stage)
	if i < 0 { // no writer of this package leaves it so
		m.edited("")
		return m.events
	}
	m.pace(p.passed(in.Elapsed), in.Blocks)
	m.consume(i, in)
	results := p.Judge.Verdicts(&s.Gates, in.Checks)
	m.forget(results)
	if m.act(i, results) || s.Phase == Held {
		return m.events
	}
	m.pass(i, in)
	ready := m.ready(i, results)
	switch {
	case in.MayAdvance && m.climb(i):
	case in.MayAdvance && ready:
		m.promote(i, "")
	case !ready && s.Elapsed >= p.Stages[i].Deadline:
		m.deadline(i) // a stage that only waits for leave to advance has its verdict
	}
	return m.events
}

// move is one change of a state, with the events on the way.
type move struct {
	*State
	p      *Plan
	now    time.Time
	events []Event

	rationales map[string][]string  // Input's; verbs have none
	units      map[string][2]uint64 // Input's, or the verb's
}

func (m *move) event(e Event) {
	if e.Stage == "" {
		e.Stage = m.Stage.Name
	}
	if e.To == 0 && e.From == 0 {
		e.From, e.To = m.Phase, m.Phase
	}
	m.Ver++
	m.events = append(m.events, e)
	note := e.Note
	if len(note) > maxRecentNote {
		note = strings.ToValidUTF8(note[:maxRecentNote], "")
	}
	m.Recent = append(slices.Clone(m.Recent[max(0, len(m.Recent)-maxRecent+1):]), Told{m.Ver, e.Kind, e.Stage, e.Ring, e.Gate, note, e.From, e.To})
}

// phase changes the phase; the next event tells.
func (m *move) phase(to Phase) {
	if m.Phase == Held && to != Held {
		m.Hold = nil
	}
	m.Phase = to
	m.Ver++
}

// reshare recomputes the shares in force and opens a new epoch, which separates the evidence.
func (m *move) reshare() {
	m.Shares = m.p.shares(m.State)
	m.Exposed = m.Exposed || maxShare(m.Shares) > 0
	m.Epoch++
	m.Decided = m.Round
	m.Ver++
	at := m.now
	if n := len(m.History); n > 0 && at.Before(m.History[n-1].At) {
		at = m.History[n-1].At // another process's clock
	}
	m.History = append(m.History, Change{Epoch: m.Epoch, At: at, Shares: m.Shares, All: m.Phase == Completed})
	if extra := len(m.History) - MaxHistory; extra > 0 {
		m.History = forget(m.History, extra)
	}
}

// enter moves to stage i: its share, unless it climbs there, and a bake and a proof from zero. Stepping back raises no
// share, and does not end a hold.
func (m *move) enter(i int, kind Kind, note string) {
	from := m.Phase
	had := map[string]float64{}
	for _, ring := range m.p.Rings {
		had[ring] = m.within(ring)
	}
	m.Reach = map[string]float64{}
	for _, st := range m.p.Stages[:i] {
		m.Reach[st.Ring] = max(m.Reach[st.Ring], st.Percent)
	}
	st := &m.p.Stages[i]
	m.Stage = st.StageRef
	m.Climb, m.From = 0, 0
	if steps := st.climb(); steps > 0 {
		m.From = m.within(st.Ring)
		m.Climb = 1
		m.Reach[st.Ring] = m.From + (st.Percent-m.From)/float64(steps)
	} else {
		m.Reach[st.Ring] = max(m.Reach[st.Ring], st.Percent)
	}
	if kind == SteppedBack { // an edited policy may ask for more there than was ever given
		for ring, reach := range m.Reach {
			m.Reach[ring] = min(reach, had[ring])
		}
	}
	m.fresh()
	m.reshare()
	m.event(Event{Kind: kind, Ring: st.Ring, Note: note, From: from, To: m.Phase})
}

// within is what a ring has by its own stages and those of the rings around it.
func (m *move) within(ring string) float64 {
	share := 0.0
	for _, r := range m.p.Rings[max(m.p.ring(ring), 0):] {
		share = max(share, m.Reach[r])
	}
	return share
}

// fresh starts a stage's clocks and its proof from zero.
func (m *move) fresh() {
	m.Elapsed, m.Baked, m.Quiet = 0, 0, 0
	m.Seen, m.Approved, m.Pace = false, false, nil
	m.Entered = m.Epoch + 1
	m.Gates.ResetProof()
}

// consume bets the blocks. Proof is taken only from the stage's own ring and since it was entered.
func (m *move) consume(i int, in Input) {
	st := &m.p.Stages[i]
	active := func(g int) bool { return st.Armed[g] }
	for _, b := range in.Blocks {
		if slices.Contains(m.Rings, b.Ring) {
			continue
		}
		m.p.Judge.Consume(&m.Gates, m.mourn(b.Block), active, m.reached(b.Ring, st) && b.Epoch >= m.Entered && len(m.Set) == 0)
	}
	for _, b := range in.Breaches {
		if !slices.Contains(m.Rings, b.Ring) {
			m.p.Judge.Breach(&m.Gates, b.Metric, b.Ring, b.Events, active)
		}
	}
	m.p.Judge.Look(&m.Gates)
}

// reached reports whether a stage is what a ring's share comes from: its own ring's, and those inside of it that no stage
// of their own brought as far.
func (m *move) reached(ring string, st *Stage) bool {
	inner, outer := m.p.ring(ring), m.p.ring(st.Ring)
	return inner == outer || inner >= 0 && inner < outer && m.Reach[ring] < m.Reach[st.Ring]
}

// Raises reports whether more units may get the candidate in b than in a: a ring has a greater share, or nobody is held
// back any more.
func Raises(a, b *State) bool {
	if b.Phase == Completed && a.Phase != Completed {
		return true
	}
	for ring, share := range b.Shares {
		if share > a.Shares[ring] {
			return true
		}
	}
	return false
}

// act does what broken gates ask for, the most careful action first. It reports whether that settled the step.
func (m *move) act(i int, results []judge.Result) bool {
	st := &m.p.Stages[i]
	rank := map[judge.Action]int{judge.Rollback: 5, judge.RollbackRing: 4, judge.StepBack: 3, judge.Hold: 2}
	var worst *judge.Result
	for g := range results {
		r := &results[g]
		if r.Verdict != judge.Unhealthy {
			continue
		}
		if r.Action == judge.Report {
			if !slices.Contains(m.Reported, r.Spec.Name) {
				m.Reported = append(m.Reported, r.Spec.Name)
				m.event(Event{Kind: GateBroken, Gate: r.Spec.Name, Note: r.Cause})
			}
			continue
		}
		if r.Spec.Kind == judge.Check && (!st.Armed[g] || slices.Contains(m.Acted, r.Spec.Name)) {
			continue
		}
		if worst == nil || rank[r.Action] > rank[worst.Action] || rank[r.Action] == rank[worst.Action] && r.LogE > worst.LogE {
			worst = r
		}
	}
	if worst == nil {
		return false
	}
	action := worst.Action
	if st.Irreversible && action != judge.Hold {
		action = judge.Hold
	}
	if action == judge.StepBack {
		if to := m.before(i); to < 0 {
			action = judge.Rollback
		} else if m.StepBack[m.p.Stages[to].Name] >= 2 {
			action = judge.Hold
		}
	}
	ring := m.fault(worst, st)
	if action == judge.RollbackRing && ring == m.p.Rings[len(m.p.Rings)-1] {
		action = judge.Rollback // what goes wrong for everyone is not one ring's trouble
	}
	switch action {
	case judge.Rollback:
		m.rollback(m.incident(worst, ""))
	case judge.RollbackRing:
		if slices.Contains(m.Rings, ring) {
			return true
		}
		m.rollbackRing(ring, m.incident(worst, ""))
		m.acted(worst)
	case judge.StepBack:
		m.stepBack(i, worst)
	default:
		if m.Phase == Held {
			return true
		}
		m.hold(HoldCause{Kind: HeldByGate, Gate: worst.Spec.Name, Note: clip(worst.Cause)}, worst)
	}
	return true
}

// fault is the ring that a broken gate's RollbackRing is about: the one that alone is at fault; everyone's, if it is not
// one alone; for a question that no ring's outcomes answer, the stage's.
func (m *move) fault(r *judge.Result, st *Stage) string {
	switch {
	case r.Spec.Kind == judge.Check:
		return st.Ring
	case r.Ring != "":
		return r.Ring
	}
	return m.p.Rings[len(m.p.Rings)-1]
}

func (m *move) anew() {
	m.Gates.Anew()
	m.Reported = nil
}

func (m *move) incident(r *judge.Result, note string) *Incident {
	in := &Incident{Time: m.now, Gen: m.Gen, Version: m.Version, Stage: m.Stage.Name, Note: clip(note), Units: m.units}
	if r != nil {
		in.Gate, in.Metric, in.E, in.NeedE = r.Spec.Name, r.Spec.Metric, r.E, r.NeedE
		for _, all := range m.p.Judge.Assess(&m.Gates, nil) {
			if all.Spec.Name == in.Gate {
				in.Candidate, in.Control = all.Candidate, all.Control
			}
		}
		in.Note = clip(r.Cause)
		room := MaxRationales
		for _, why := range m.rationales[in.Metric] {
			if room -= len(why); room < 0 {
				break
			}
			in.Rationales = append(in.Rationales, why)
		}
	}
	return in
}

func (m *move) hold(c HoldCause, r *judge.Result) {
	from := m.Phase
	m.phase(Held)
	m.Hold = &c
	if r != nil {
		m.event(Event{Kind: GateBroken, Gate: r.Spec.Name, Note: r.Cause, From: from, To: from})
	}
	m.event(Event{Kind: WasHeld, Gate: c.Gate, Note: c.Note, From: from, To: Held})
}

// before is the last stage before i whose ring is not rolled back, or -1.
func (m *move) before(i int) int {
	for i--; i >= 0 && slices.Contains(m.Rings, m.p.Stages[i].Ring); i-- {
	}
	return i
}

func (m *move) stepBack(i int, r *judge.Result) {
	back := m.before(i)
	to := m.p.Stages[back].Name
	if m.StepBack == nil {
		m.StepBack = map[string]int{}
	}
	m.StepBack[to]++
	m.event(Event{Kind: GateBroken, Gate: r.Spec.Name, Note: r.Cause})
	m.anew()
	m.acted(r)
	m.enter(back, SteppedBack, r.Spec.Name)
}

// acted notes that a Check's answer was acted on: the same answer is no news.
func (m *move) acted(r *judge.Result) {
	if r.Spec.Kind == judge.Check {
		m.Acted = append(m.Acted, r.Spec.Name)
	}
}

// forget drops the Checks that were acted on and have given another answer since.
func (m *move) forget(results []judge.Result) {
	m.Acted = slices.DeleteFunc(m.Acted, func(name string) bool {
		return slices.ContainsFunc(results, func(r judge.Result) bool { return r.Spec.Name == name && r.Verdict != judge.Unhealthy })
	})
}

// rollback takes every share to zero, latches, and lists the steps to run.
func (m *move) rollback(in *Incident) {
	from := m.Phase
	m.Incident = in
	rings := m.undoing()
	m.Steps, m.Set, m.Lost, m.Behind = nil, nil, nil, nil
	m.Versions = slices.Clone(m.Versions)
	for i := range m.Versions {
		if m.Versions[i].Gen == m.Gen {
			m.Versions[i].Completed = false // nobody serves it any more
		}
	}
	if m.Exposed {
		for _, name := range m.Undoes {
			m.Steps = append(m.Steps, StepState{Name: name})
		}
	}
	if m.Effects && (m.Exposed || m.Settled+1 < m.Gen) { // also what was done for a candidate that this one replaced
		m.Steps = append(m.Steps, StepState{Name: UndoStep, Undo: true, From: m.Settled, Gen: m.Gen})
	}
	for _, st := range rings {
		if st.From < m.Settled { // what else it has is everybody's now
			st.Attempts, st.Turn = 0, 0
			m.Steps = append(m.Steps, st)
		}
	}
	m.phase(RollingBack)
	m.reshare()
	m.event(Event{Kind: RollbackBegan, Ring: m.Stage.Ring, Gate: in.Gate, Note: in.Note, From: from, To: RollingBack, Incident: in})
	m.finish()
}

// finish ends a rollback whose steps are all done.
func (m *move) finish() {
	if slices.ContainsFunc(m.Steps, func(st StepState) bool { return !st.Done }) {
		return
	}
	if m.Phase != RollingBack {
		return
	}
	from := m.Phase
	m.phase(RolledBack)
	m.settle()
	m.event(Event{Kind: RollbackDone, From: from, To: RolledBack, Incident: m.Incident})
}

// rollbackRing latches one ring. Where no ring is left, everything is rolled back.
func (m *move) rollbackRing(ring string, in *Incident) {
	in.Ring = ring
	m.Rings = append(m.Rings, ring)
	m.Incident = in
	m.p.Judge.Leave(&m.Gates, ring)
	if !slices.ContainsFunc(m.p.Rings, func(r string) bool { return !slices.Contains(m.Rings, r) }) {
		m.rollback(in)
		return
	}
	m.Lost = slices.DeleteFunc(m.Lost, func(o Open) bool { return o.Ring == ring })
	if m.Effects {
		m.undoAlso(ring)
	}
	m.reshare()
	m.event(Event{Kind: RingRolledBack, Ring: ring, Gate: in.Gate, Note: in.Note, Incident: in})
	if m.Phase == Running && m.Stage.Ring == ring {
		m.hold(HoldCause{Kind: HeldByRings, Note: ring + " is rolled back"}, nil)
	}
}

// clip bounds a note or a cause.
func clip(s string) string {
	if len(s) > MaxNote {
		s = s[:MaxNote]
	}
	return strings.ToValidUTF8(s, "")
}
