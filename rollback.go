package rollout

import (
	"context"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// RollbackStep undoes something that the candidate needed: a table, a setting, a queue. The steps of a policy run in
// order, once a generation and at least once each: a step that was under way when its process died is started again, so
// it must bear to run twice. [Incident.Key] is the same each time.
type RollbackStep struct {
	// Name tells the step from the others; a policy that is edited during a rollback keeps its names.
	Name string
	// Do undoes it. An error, a panic and a time-out are failures, to be tried again. It must return when ctx ends.
	Do func(ctx context.Context, in Incident) error
	// Timeout is for one attempt. Default: 1 minute.
	Timeout time.Duration
	// Attempts are made before the rollout is Stuck, with a pause in between that doubles from 1 s to 1 min. [Rollout.Rollback]
	// starts a new series. Default: 5.
	Attempts int
}

func (s RollbackStep) withDefaults() RollbackStep {
	if s.Timeout == 0 {
		s.Timeout = time.Minute
	}
	if s.Attempts == 0 {
		s.Attempts = 5
	}
	return s
}

// Incident is why a rollback happened, with its evidence.
type Incident struct {
	// Key is the same for every attempt at a step of this rollback, and different for any other in the same Store: use it to
	// make a step idempotent. Without a Store, or in one that was emptied, later rollbacks have the same keys again. Empty
	// outside of a step.
	Key string `json:"key,omitempty"`
	// Fence grows whenever another process takes the steps over: refuse what comes with a smaller one. Empty outside of a
	// step.
	Fence string `json:"fence,omitempty"`

	Name       string    `json:"name"` // of the rollout
	Version    string    `json:"version"`
	Generation uint64    `json:"generation"`
	Time       time.Time `json:"time"`
	Stage      string    `json:"stage"`
	Ring       string    `json:"ring,omitempty"`   // where one ring alone was rolled back
	Gate       string    `json:"gate,omitempty"`   // that was broken; empty for an operator's rollback
	Metric     string    `json:"metric,omitempty"` // of the gate
	Note       string    `json:"note,omitempty"`   // the operator's, or the gate's cause
	Candidate  Estimate  `json:"candidate"`
	Control    Estimate  `json:"control"`
	E          float64   `json:"e,omitempty"`     // the gate's evidence
	NeedE      float64   `json:"needE,omitempty"` // what it needed by itself

	// Rationales are what [Observation.Because] gave for the candidate's observations of Metric in this generation, in the
	// process that found the gate broken: the first ones, and some of the others; at most 16 KiB together.
	Rationales []string `json:"rationales,omitempty"`

	// Units are about how many units came, by ring, in the process that found the gate broken.
	Units map[string]UnitCount `json:"units,omitempty"`
	// Behind are processes that had not confirmed, when the first step began, that they serve nobody the candidate any more:
	// they may be dead, or cut off. Their names begin with [Options].Replica.
	Behind []string `json:"behind,omitempty"`
	// Exposure is whom the candidate was given to, see [Incident.WasExposed]; nil where it is not known any more.
	Exposure *Exposure `json:"exposure,omitempty"`
}

// incident is the state's incident, or nil.
func (r *Rollout) incident(st *machine.State) *Incident {
	if st == nil {
		return nil
	}
	return r.incidentOf(st, st.Incident)
}

// incidentOf is an incident of the state's generation.
func (r *Rollout) incidentOf(st *machine.State, in *machine.Incident) *Incident {
	if in == nil {
		return nil
	}
	public := &Incident{
		Name: r.name, Version: in.Version, Generation: in.Gen, Time: in.Time, Stage: in.Stage, Ring: in.Ring,
		Gate: in.Gate, Metric: in.Metric, Note: in.Note,
		Candidate: r.estimate(in.Gate, in.Candidate), Control: r.estimate(in.Gate, in.Control), E: in.E, NeedE: in.NeedE,
		Rationales: slices.Clone(in.Rationales), Units: unitCounts(in.Units),
	}
	if st.Gen == in.Gen {
		public.Exposure, public.Behind = r.exposure(st), slices.Clone(st.Behind)
	}
	return public
}
