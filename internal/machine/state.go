// Package machine is the rule by which a rollout advances, holds and rolls back: pure functions from a [State], a [Plan]
// and what was seen to the next State and the [Event]s on the way. It does no I/O, reads no clock and starts nothing; the
// same inputs give the same state, bit for bit.
package machine

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/tally"
)

// Format is the version of the state document that this package writes. It reads no newer one.
const Format = 1

// Limits of what the document keeps.
const (
	MaxHistory  = 1024 // changes of shares
	MaxVersions = 1024
	MaxNotes    = 32
	MaxNote     = 1024         // bytes of one note or cause
	MaxBytes    = 900 << 10    // as stored
	MaxText     = 4 * MaxBytes // as JSON

	MaxRationales = 16 << 10 // bytes of an incident's rationales together
	MaxWaives     = 256      // effects and kinds of effects that are waived
)

// Phase is where a rollout is. The zero value is Pending.
type Phase uint8

// The phases of a rollout.
const (
	Pending Phase = iota
	Running
	Held
	RollingBack
	RolledBack
	Stuck
	Completed
)

var phaseNames = []string{"pending", "running", "held", "rolling back", "rolled back", "stuck", "completed"}

// PhaseNames are the names of the phases, in order.
func PhaseNames() []string { return slices.Clone(phaseNames) }

func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprint(uint8(p))
}

// MarshalText implements encoding.TextMarshaler.
func (p Phase) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *Phase) UnmarshalText(b []byte) error {
	i := slices.Index(phaseNames, string(b))
	if i < 0 {
		return fmt.Errorf("%q is no phase", b)
	}
	*p = Phase(i)
	return nil
}

// Latched reports whether the candidate of this generation is rolled back or on its way there.
func (p Phase) Latched() bool { return p == RollingBack || p == RolledBack || p == Stuck }

// State is everything that decides, as one document. The zero value is not valid; see [New].
type State struct {
	Format int    `json:"format"`
	Name   string `json:"name"`

	Gen     uint64    `json:"gen"`               // candidates and restarts
	Nonce   string    `json:"nonce,omitempty"`   // names this life of the generation
	Ver     uint64    `json:"ver"`               // +1 on every change that a follower must see
	Epoch   uint64    `json:"epoch"`             // +1 on every change of any share or stage
	Round   uint64    `json:"round"`             // +1 on every evaluation
	Last    time.Time `json:"last,omitzero"`     // when the last one was, by the clock of who made it
	Decided uint64    `json:"decided,omitempty"` // the round before or in which the present epoch was decided

	Version  string         `json:"version"`  // of the candidate of this generation
	Versions []VersionEntry `json:"versions"` // all there have been, in order

	Phase Phase      `json:"phase"`
	Hold  *HoldCause `json:"hold,omitempty"` // while Held

	Stage  StageRef           `json:"stage"`           // the present one
	Shares map[string]float64 `json:"shares"`          // percent a ring, in force
	Set    map[string]float64 `json:"set,omitempty"`   // set by an operator, until Resume
	Rings  []string           `json:"rings,omitempty"` // latched: rolled back alone
	Reach  map[string]float64 `json:"reach,omitempty"` // what each ring's own stages have reached

	Policy     string `json:"policy"`     // digest of the policy's data
	Assignment string `json:"assignment"` // digest of what decides who is in

	Salt     string  `json:"salt,omitempty"` // of the assignment, for whoever asks later who was in
	Holdback float64 `json:"holdback,omitempty"`

	Elapsed  time.Duration  `json:"elapsed"`            // in this stage, time held apart; a lower bound
	Quiet    time.Duration  `json:"quiet,omitempty"`    // since the last candidate outcome that was credited
	Baked    time.Duration  `json:"baked"`              // in this stage, while candidate outcomes arrived
	Seen     bool           `json:"seen,omitempty"`     // a candidate outcome arrived in this stage
	Entered  uint64         `json:"entered,omitempty"`  // epoch in which the stage was entered
	Climb    int            `json:"climb,omitempty"`    // steps of a climbing stage taken
	From     float64        `json:"from,omitempty"`     // share that the climb started from
	Approved bool           `json:"approved,omitempty"` // this stage
	Proved   bool           `json:"proved,omitempty"`   // some stage of this generation was left with proof
	Exposed  bool           `json:"exposed,omitempty"`  // some share of this generation was above zero
	StepBack map[string]int `json:"stepBack,omitempty"` // how often the stage of that name was stepped back to

	Clock time.Duration `json:"clock,omitempty"` // of this generation, time held with it: a lower bound
	Since time.Duration `json:"since,omitempty"` // accounted for since this Ver was written, see [State.Account]

	Consumed tally.Ledger      `json:"consumed,omitempty"` // evidence, of all incarnations together
	Oldest   uint64            `json:"oldest,omitempty"`   // epoch whose evidence still counts
	Cursors  map[string]Cursor `json:"cursors,omitempty"`  // up to which cut, by incarnation
	Retired  map[string]Cursor `json:"retired,omitempty"`  // incarnations whose documents are folded, and never read again
	Floor    uint64            `json:"floor,omitempty"`    // incarnations born before this round that have no cursor are long dead
	Live     int               `json:"live,omitempty"`     // incarnations that count
	Lost     []Open            `json:"lost,omitempty"`     // work that died with its process, until a block takes it as failures
	Sources  map[string]Totals `json:"sources,omitempty"`  // evidence consumed of metrics measured elsewhere, by metric and ring

	// In a head alone, of the gates that it is without: thresholds of timings by metric and ring, and how long the control's
	// slowest outcomes take, by ring.
	Marks map[string]map[string][][2]int `json:"marks,omitempty"`
	Slow  map[string]time.Duration       `json:"slow,omitempty"`

	Pace map[string]Pace `json:"pace,omitempty"` // of outcomes lately, by metric

	Gates    judge.State `json:"gates"`
	Reported []string    `json:"reported,omitempty"` // gates that only report and have
	Acted    []string    `json:"acted,omitempty"`    // Checks whose present answer was acted on

	Undoes []string    `json:"undoes,omitempty"` // names of the steps that a rollback of this generation needs
	Steps  []StepState `json:"steps,omitempty"`  // of the rollback, or the undoing of rings that were rolled back alone
	Runner string      `json:"runner,omitempty"`
	Term   uint64      `json:"term,omitempty"` // fences the runner of steps
	Beat   uint64      `json:"beat,omitempty"` // of the runner, while it lives

	Waives []Waive `json:"waives,omitempty"` // what an operator has waived of effects that may not be settled

	Effects bool   `json:"effects,omitempty"` // effects may be journalled, of this generation or of one before it
	Settled uint64 `json:"settled,omitempty"` // effects of generations up to this one are undone, or are to stay, but for those of Steps

	Behind []string `json:"behind,omitempty"` // processes that had not confirmed the rollback when its first step was made

	Incident *Incident `json:"incident,omitempty"`
	Recent   []Told    `json:"recent,omitempty"`  // the last events, for processes that follow, the newest last
	History  []Change  `json:"history,omitempty"` // of this generation's shares, newest last
	Notes    []Note    `json:"notes,omitempty"`   // of operators, newest last

	Writer string `json:"writer,omitempty"` // who wrote this document
	Op     string `json:"op,omitempty"`     // which of its writes: tells a landed write from a lost one
}

// Cursor is how far the evidence of one incarnation was consumed.
type Cursor struct {
	Seq   uint64 `json:"seq"`             // of its last cut
	Round uint64 `json:"round"`           // in which it last moved, or was retired
	Birth uint64 `json:"birth,omitempty"` // round in which it began
}

// Open is work of one ring that was begun and not ended.
type Open = tally.Open

// Pace is how fast outcomes have come lately, for people: nothing is decided on it. What is older counts for less. The
// zero value has seen nothing.
type Pace struct {
	Candidate float64 `json:"candidate"` // outcomes
	Control   float64 `json:"control"`
	Seconds   float64 `json:"seconds"` // in which they came
}

// lately is the time in which what was seen of a pace loses most of its weight.
const lately = 5 * time.Minute

// PerSecond is the pace; 0 while it is not known.
func (p Pace) PerSecond() (candidate, control float64) {
	if !(p.Seconds > 0) {
		return 0, 0
	}
	return p.Candidate / p.Seconds, p.Control / p.Seconds
}

// pace notes what came in over a time.
func (s *State) pace(passed time.Duration, blocks []Block) {
	fade := math.Exp(-passed.Seconds() / lately.Seconds())
	next := make(map[string]Pace, len(s.Pace))
	for metric, p := range s.Pace {
		next[metric] = Pace{p.Candidate * fade, p.Control * fade, p.Seconds*fade + passed.Seconds()}
	}
	for _, b := range blocks {
		if slices.Contains(s.Rings, b.Ring) {
			continue
		}
		p, ok := next[b.Metric]
		if !ok {
			p.Seconds = passed.Seconds()
		}
		p.Candidate += float64(judge.Count(b.Candidate)) + b.Moments[0].N
		p.Control += float64(judge.Count(b.Control)) + b.Moments[1].N
		next[b.Metric] = p
	}
	s.Pace = next
}

// Totals are the cumulative values of a source up to which they were consumed, of the control and of the candidate. What
// came in between two epochs belongs to neither.
type Totals struct {
	Epoch  uint64       `json:"epoch"`
	Values [2][]float64 `json:"values"`
	Resets uint64       `json:"resets,omitempty"` // how often they were taken up anew, because the counters had fallen
}

// VersionEntry is one version the rollout has had.
type VersionEntry struct {
	Version   string `json:"version"`
	Gen       uint64 `json:"gen"`
	Starts    int    `json:"starts,omitempty"` // how often it was judged anew in earlier generations
	Completed bool   `json:"completed,omitempty"`
}

// StageRef names a stage by its data, so that it is found in an edited policy.
type StageRef struct {
	Name    string  `json:"name"`
	Ring    string  `json:"ring"`
	Percent float64 `json:"percent"`
}

// HoldKind says why a rollout is held.
type HoldKind string

// Why a rollout may be held.
const (
	HeldByOperator HoldKind = "operator"
	HeldByPercent  HoldKind = "percent" // SetPercent
	HeldByGate     HoldKind = "gate"
	HeldByDeadline HoldKind = "deadline"
	HeldByRings    HoldKind = "rings" // every ring that is left is rolled back
)

// HoldCause is why a rollout is held.
type HoldCause struct {
	Kind HoldKind `json:"kind"`
	Gate string   `json:"gate,omitempty"`
	Note string   `json:"note,omitempty"`
}

// StepState is the journal of one rollback step.
type StepState struct {
	Name     string `json:"name"`
	Attempts int    `json:"attempts,omitempty"`
	Turn     uint64 `json:"turn,omitempty"` // grows with every attempt at any step
	Done     bool   `json:"done,omitempty"`
	Waived   bool   `json:"waived,omitempty"` // done by an operator's word alone
	Err      string `json:"err,omitempty"`    // of the last attempt

	// Undo: the step is to undo what is journalled, of the generations after From up to Gen: of one ring, or of all. What a
	// completion settled before a ring's effects were undone is between the two.
	Undo    bool   `json:"undo,omitempty"`
	Ring    string `json:"ring,omitempty"`
	From    uint64 `json:"from,omitempty"`
	Gen     uint64 `json:"gen,omitempty"`
	Effects int    `json:"effects,omitempty"` // undone in it, as far as was counted
}

// Waive is an operator's word that effects need not be undone, whichever step comes upon them.
type Waive struct {
	Name string `json:"name"`           // an effect's key, a kind as "undo:KIND", or the step of a ring
	Ring string `json:"ring,omitempty"` // of the effects; "": of all
	Gen  uint64 `json:"gen"`            // and of generations up to this one
}

// Change is one change of shares.
type Change struct {
	Epoch  uint64             `json:"epoch"`
	At     time.Time          `json:"at"` // never before that of the change before it
	Shares map[string]float64 `json:"shares"`
	All    bool               `json:"all,omitempty"` // also units that are held back: Completed
}

// Told is an event as it is remembered for others.
type Told struct {
	Ver   uint64 `json:"ver"` // in which it happened
	Kind  Kind   `json:"kind"`
	Stage string `json:"stage,omitempty"`
	Ring  string `json:"ring,omitempty"`
	Gate  string `json:"gate,omitempty"`
	Note  string `json:"note,omitempty"`
	From  Phase  `json:"from"`
	To    Phase  `json:"to"`
}

// Event is what was told.
func (t Told) Event(in *Incident) Event {
	e := Event{Kind: t.Kind, Stage: t.Stage, Ring: t.Ring, Gate: t.Gate, Note: t.Note, From: t.From, To: t.To}
	if t.Kind == RollbackBegan || t.Kind == RollbackStuck || t.Kind == RollbackDone || t.Kind == RingRolledBack {
		e.Incident = in
	}
	return e
}

// What is remembered of events.
const (
	maxRecent     = 8
	maxRecentNote = 200
)

// Note is what an operator did, and why.
type Note struct {
	At   time.Time `json:"at"`
	Verb string    `json:"verb"`
	Note string    `json:"note,omitempty"`
}

// Incident is why a rollback happened.
type Incident struct {
	Time      time.Time      `json:"time"`
	Gen       uint64         `json:"gen"`
	Version   string         `json:"version"`
	Stage     string         `json:"stage"`
	Ring      string         `json:"ring,omitempty"` // of a ring's own rollback
	Gate      string         `json:"gate,omitempty"`
	Metric    string         `json:"metric,omitempty"`
	Note      string         `json:"note,omitempty"`
	Candidate judge.Estimate `json:"candidate"`
	Control   judge.Estimate `json:"control"`
	E         float64        `json:"e,omitempty"`
	NeedE     float64        `json:"needE,omitempty"`

	Rationales []string `json:"rationales,omitempty"` // of the candidate's observations of Metric

	// Units are how many came, by ring, of the control and of the candidate: an estimate of the process that found it.
	Units map[string][2]uint64 `json:"units,omitempty"`
}

// Clone is a deep copy.
func (s *State) Clone() *State {
	c := *s
	c.Versions = slices.Clone(s.Versions)
	c.Shares, c.Set, c.Reach = maps.Clone(s.Shares), maps.Clone(s.Set), maps.Clone(s.Reach)
	c.Rings = slices.Clone(s.Rings)
	c.StepBack = maps.Clone(s.StepBack)
	c.Consumed = maps.Clone(s.Consumed) // the values inside never change
	c.Cursors, c.Retired, c.Lost = maps.Clone(s.Cursors), maps.Clone(s.Retired), slices.Clone(s.Lost)
	c.Pace = maps.Clone(s.Pace)
	c.Sources = maps.Clone(s.Sources) // the values inside never change
	c.Gates = s.Gates.Clone()
	c.Reported, c.Acted = slices.Clone(s.Reported), slices.Clone(s.Acted)
	c.Steps, c.Waives = slices.Clone(s.Steps), slices.Clone(s.Waives)
	c.History = slices.Clone(s.History) // the maps inside never change
	c.Notes = slices.Clone(s.Notes)
	c.Recent = slices.Clone(s.Recent)
	if s.Hold != nil {
		h := *s.Hold
		c.Hold = &h
	}
	if s.Incident != nil {
		i := *s.Incident
		i.Rationales, i.Units = slices.Clone(i.Rationales), maps.Clone(i.Units)
		c.Incident = &i
	}
	return &c
}

func maxShare(m map[string]float64) float64 {
	most := 0.0
	for _, p := range m {
		most = max(most, p)
	}
	return most
}
