package rollout

import (
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// State is where a rollout is. The zero value is Pending.
type State uint8

// The states of a rollout.
const (
	Pending     = State(machine.Pending)     // nothing is exposed yet
	Running     = State(machine.Running)     // in a stage
	Held        = State(machine.Held)        // in a stage, and stays there until Resume
	RollingBack = State(machine.RollingBack) // everybody is on the stable version; rollback steps run
	RolledBack  = State(machine.RolledBack)  // everybody is on the stable version
	Stuck       = State(machine.Stuck)       // everybody is on the stable version; a rollback step keeps failing
	Completed   = State(machine.Completed)   // everybody has the candidate
)

var stateNames = machine.PhaseNames()

func (s State) String() string                { return nameIn(stateNames, int(s)) }
func (s State) MarshalText() ([]byte, error)  { return []byte(s.String()), nil }
func (s *State) UnmarshalText(b []byte) error { return parseIn(stateNames, b, (*uint8)(s)) }

// Status is what is known of a rollout at one moment. It marshals to JSON with names for its enumerations and
// nanoseconds for its durations.
type Status struct {
	Name       string `json:"name"`
	Version    string `json:"version"`    // of the candidate that the rollout is about
	State      State  `json:"state"`      // Pending also while nothing is loaded
	Loaded     bool   `json:"loaded"`     // the state was loaded; before, every answer is stable
	Running    bool   `json:"running"`    // Run runs in this process
	Shared     bool   `json:"shared"`     // there is a Store
	Passive    bool   `json:"passive"`    // this process has another version than the rollout is about
	Generation uint64 `json:"generation"` // counts candidates and restarts
	// Note says why it is held, or how a rollback step failed; Err why the Store could not be used just now.
	Note string `json:"note,omitempty"`
	Err  string `json:"err,omitempty"`

	Stage    StageStatus  `json:"stage"`
	Rings    []RingStatus `json:"rings"` // innermost first
	Gates    []GateStatus `json:"gates"`
	Steps    []StepStatus `json:"steps,omitempty"` // of a rollback
	Incident *Incident    `json:"incident,omitempty"`

	Sessions SessionStatus `json:"sessions"`

	NoUnit  uint64 `json:"noUnit"`  // decisions without a key, in this process
	Late    uint64 `json:"late"`    // observations that came too late to count, in this process
	Unknown uint64 `json:"unknown"` // observations of metrics the policy does not name, in this process
	Invalid uint64 `json:"invalid"` // observations of a Score that were not a number, in this process
	Unsure  uint64 `json:"unsure"`  // outcomes not published again, as the Store does not tell whether they were judged, in this process
	Panics  uint64 `json:"panics"`  // of Ring.Match, in this process
	Dropped uint64 `json:"dropped"` // events that subscribers were too slow for, in this process
}

// StageStatus is the present stage. The zero value is none.
type StageStatus struct {
	Name     string        `json:"name"`
	Ring     string        `json:"ring"`
	Percent  Percent       `json:"percent"`
	Index    int           `json:"index"` // from 0
	Of       int           `json:"of"`    // how many stages there are
	Elapsed  time.Duration `json:"elapsed"`
	Baked    time.Duration `json:"baked"` // of Over and Bake together
	Bake     time.Duration `json:"bake"`  // Over and Bake together
	Deadline time.Duration `json:"deadline"`
	Proof    bool          `json:"proof"` // gates must prove their claims before it is left
	Approval bool          `json:"approval"`
	Approved bool          `json:"approved"`
}

// RingStatus is one ring.
type RingStatus struct {
	Name       string  `json:"name"`
	Percent    Percent `json:"percent"` // in force, Holdback aside
	RolledBack bool    `json:"rolledBack"`
	// Candidate and Control count the decisions of this process since it started.
	Candidate uint64 `json:"candidate"`
	Control   uint64 `json:"control"`
	// Units are about how many different units they were for, in the present generation.
	Units UnitCount `json:"units"`
}

// SessionStatus is how many sessions of this process are under way.
type SessionStatus struct {
	Candidate uint64 `json:"candidate"`
	Control   uint64 `json:"control"` // on the stable version, compared or not
	Revoked   uint64 `json:"revoked"` // of the candidate's, those that are told to end
}

// GateStatus is what one gate says.
type GateStatus struct {
	Name      string   `json:"name"`
	Metric    string   `json:"metric,omitempty"`
	Ring      string   `json:"ring,omitempty"` // that alone is at fault, if it is Unhealthy; "" otherwise
	Armed     bool     `json:"armed"`          // in the present stage
	Action    Action   `json:"action"`
	Verdict   Verdict  `json:"verdict"`
	Cause     string   `json:"cause,omitempty"` // of Unhealthy; else why there is nothing new
	Candidate Estimate `json:"candidate"`
	Control   Estimate `json:"control"`
	// Difference is how much worse the candidate is than the control.
	Difference Interval `json:"difference,omitzero"`
	// Summary says the same in a sentence.
	Summary   string  `json:"summary,omitempty"`
	E         float64 `json:"e"`                 // evidence against the candidate; 1 is none
	NeedE     float64 `json:"needE"`             // the E at which this gate alone is broken; 0 for a Check or Never
	Proof     float64 `json:"proof"`             // evidence for the candidate in this stage; 1 is none
	NeedProof float64 `json:"needProof"`         // the Proof at which the gate is Healthy; 0 for what cannot be proven
	Missing   string  `json:"missing,omitempty"` // what it waits for
	// NeedN is about how many more outcomes of the candidate it takes until the gate is proven, or broken, and NeedTime how
	// long that takes at the present traffic, if both cohorts go on as they did so far; half of all rollouts take longer.
	// Zero: not known, or never.
	NeedN    uint64        `json:"needN,omitempty"`
	NeedTime time.Duration `json:"needTime,omitempty"`
}

// Interval is where a difference is likely to be: candidate less control, above zero is worse, in parts of one for a rate
// or for a timing's outcomes beyond the gate's threshold, in its own units for a score. Of an absolute gate, such as
// AtMost, it is the candidate's own level. At all looks together it misses the true average in at most one rollout of
// twenty, for outcomes of units that come once; it is widened for units that come back. The zero value is not known.
type Interval struct {
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
	Known bool    `json:"known"`
}

// StepStatus is one rollback step. Those called "(undo)" and "(undo RING)" undo what is journalled.
type StepStatus struct {
	Name     string `json:"name"`
	Attempts int    `json:"attempts"`
	Done     bool   `json:"done"`
	Waived   bool   `json:"waived,omitempty"`  // done by an operator's word alone
	Effects  int    `json:"effects,omitempty"` // undone by attempts that have ended
	Err      string `json:"err,omitempty"`     // of the last attempt
}

// Estimate is how a cohort fares, over all rings and since the evidence began or began anew. Nothing is decided on it.
type Estimate struct {
	N        uint64        `json:"n"`                  // outcomes
	Events   uint64        `json:"events"`             // bad ones; of a timing, those over the gate's threshold
	Rate     float64       `json:"rate"`               // Events/N; 0 while N is 0
	Quantile time.Duration `json:"quantile,omitempty"` // of a timing: the gate's quantile lately
	Mean     float64       `json:"mean,omitempty"`     // of a score; 0 while N is 0
	// Mix is how many outcomes of a mix had each label. It is not to be changed.
	Mix map[string]uint64 `json:"mix,omitempty"`
}

// estimate is e of a gate, found by its name.
func (r *Rollout) estimate(gate string, e judge.Estimate) Estimate {
	public := Estimate{N: e.N, Events: e.Events, Rate: e.Rate, Quantile: e.Quantile, Mean: e.Mean}
	for _, s := range r.plan.Judge.Specs() {
		if s.Name == gate && len(e.Mix) == len(s.Labels) && len(e.Mix) > 0 {
			public.Mix = map[string]uint64{}
			for i, label := range s.Labels {
				public.Mix[label] = e.Mix[i]
			}
		}
	}
	return public
}

// Status is a pure read: it changes nothing and waits for nothing but other readers.
func (r *Rollout) Status() Status {
	if r == nil {
		return Status{}
	}
	r.mu.Lock()
	st, checks, causes, err := r.known, r.checks, r.causes, r.storeErr
	s := Status{
		Name: r.name, Version: r.plan.Version, Loaded: st != nil, Passive: r.standing != machine.Current,
		Running: r.running.Load(), Shared: r.shared,
		NoUnit: r.noUnit.Load(), Late: r.late.Load(), Unknown: r.unknown.Load(), Invalid: r.invalid.Load(), Unsure: r.unsure.Load(), Panics: r.matchPanics.Load(), Dropped: r.dropped,
	}
	latched := st != nil && r.latchedLocked(st)
	decided, units := r.decidedLocked(), r.unitsLocked()
	r.mu.Unlock()
	if err != nil {
		s.Err = err.Error()
	}
	s.Sessions = r.sessions.status()
	for i, name := range r.plan.Rings {
		s.Rings = append(s.Rings, RingStatus{Name: name, Control: decided[i][0], Candidate: decided[i][1], Units: UnitCount{Control: units[name][0], Candidate: units[name][1]}})
	}
	if st == nil {
		return s
	}
	s.Version, s.State, s.Generation = st.Version, State(st.Phase), st.Gen
	if latched && !st.Phase.Latched() {
		s.State = RollingBack // here already, and on its way into the Store
	}
	if st.Hold != nil {
		s.Note = string(st.Hold.Kind)
		if st.Hold.Gate != "" {
			s.Note += " " + st.Hold.Gate
		}
		if st.Hold.Note != "" {
			s.Note += ": " + st.Hold.Note
		}
	}
	for i := range s.Rings {
		ring := &s.Rings[i]
		if !latched {
			ring.Percent = Percent(st.Shares[ring.Name])
		}
		for _, name := range st.Rings {
			ring.RolledBack = ring.RolledBack || name == ring.Name
		}
		ring.RolledBack = ring.RolledBack || latched
	}
	for _, step := range st.Steps {
		s.Steps = append(s.Steps, StepStatus{step.Name, step.Attempts, step.Done, step.Waived, step.Effects, step.Err})
		if step.Err != "" && !step.Done {
			s.Note = step.Name + ": " + step.Err
		}
	}
	stage := r.stageStatus(st, &s)
	for g, res := range r.plan.Judge.Assess(&st.Gates, checks) {
		gate := GateStatus{
			Name: res.Spec.Name, Metric: res.Spec.Metric, Action: Action(res.Action), Verdict: Verdict(res.Verdict),
			Armed: stage != nil && stage.Armed[g], Cause: res.Cause, Missing: res.Missing,
			Candidate: r.estimate(res.Spec.Name, res.Candidate), Control: r.estimate(res.Spec.Name, res.Control),
			Difference: Interval{res.Lo, res.Hi, res.Bounded}, Summary: res.Summary, Ring: res.Ring,
			E: res.E, NeedE: res.NeedE, Proof: res.ProofE, NeedProof: res.NeedProof,
		}
		if gate.Armed && gate.Verdict == Inconclusive && gate.Missing == "" {
			gate.Missing, gate.NeedN, gate.NeedTime = r.settles(st, g, res)
		}
		if cause := causes[gate.Metric]; cause != "" && gate.Verdict == Inconclusive {
			gate.Cause = cause
		}
		s.Gates = append(s.Gates, gate)
	}
	s.Incident = r.incident(st)
	return s
}

// stageStatus fills in the present stage and returns it; nil where there is none.
func (r *Rollout) stageStatus(st *machine.State, s *Status) *machine.Stage {
	s.Stage = StageStatus{
		Name: st.Stage.Name, Ring: st.Stage.Ring, Percent: Percent(st.Stage.Percent), Of: len(r.plan.Stages),
		Elapsed: st.Elapsed, Baked: st.Baked, Approved: st.Approved,
	}
	for i := range r.plan.Stages {
		if p := &r.plan.Stages[i]; p.StageRef == st.Stage {
			s.Stage.Index, s.Stage.Bake, s.Stage.Deadline = i, p.Over+p.Bake, p.Deadline
			s.Stage.Proof, s.Stage.Approval = p.Proof && !(p.Last && st.Proved), p.Approval
			return p
		}
	}
	return nil
}
