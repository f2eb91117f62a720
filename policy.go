package rollout

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
)

// Stage is one rung of the ladder: a share of one ring.
type Stage struct {
	// Name is how events and operators call the stage. Default: ring and percent, as in "everyone 5 %".
	Name string
	// Ring is the audience. Default: [Everyone].
	Ring string
	// Percent is the share of the ring that gets the candidate, above 0 and at most 100. It is never zero: "zero means
	// all" is a classic bug.
	Percent Percent
	// Over makes the stage climb to Percent over this time, in at most 16 even steps, instead of at once. Like the bake,
	// the climb counts only time in which outcomes of the candidate arrive. Zero: at once.
	Over time.Duration
	// Bake is the least time to spend in the stage, counted from the candidate's first outcome and only while outcomes
	// arrive. Zero: Policy.Bake.
	Bake time.Duration
	// Deadline is how long the stage may take; then Policy.OnDeadline. Zero: Policy.Deadline.
	Deadline time.Duration
	// Gates are armed in this stage, besides Policy.Gates.
	Gates []Gate
	// GuardOnly asks for no proof in this stage: the bake and silent gates promote.
	GuardOnly bool
	// Approval waits for [Rollout.Approve] before leaving the stage; its gates stay armed meanwhile.
	Approval bool
	// Irreversible makes a broken gate hold and alert instead of rolling back, because something can no longer be undone
	// (data already migrated, say). [Rollout.Rollback] still works.
	Irreversible bool
}

// Policy is what goes out and how carefully: rings, stages, gates, rollback steps and risk. It is data: [New] copies it,
// and nothing changes it afterwards.
type Policy struct {
	// Version names the candidate. A rollout that was rolled back starts again by itself only for a Version it has not
	// seen. Empty: there is one candidate for ever, and a rollback lasts until [Rollout.Restart].
	Version string
	// Salt decides which units come first. Default: the rollout's name, so that rollouts choose independently; share it
	// to pick the same units in related rollouts.
	Salt string
	// Rings are the audiences besides [Everyone], innermost first. Default: none.
	Rings []Ring
	// Stages are the ladder. Within a ring their shares grow; the last is 100 % of [Everyone].
	Stages []Stage
	// Bake is the least time to spend in a stage. Default: none.
	Bake time.Duration
	// Deadline is how long a stage may take before OnDeadline. Time spent held does not count. Default: 24 h.
	Deadline time.Duration
	// OnDeadline is what happens to a stage with no verdict by its deadline: Hold (the default) or Rollback.
	OnDeadline Action
	// Gates are armed in every stage.
	Gates []Gate
	// ProveFrom is the share of [Everyone] from which on every gate that can prove its claim must do so before a stage is
	// left. Smaller stages, and stages of inner rings, limit the harm and need only their bake and silent gates. Where no
	// stage reaches it with a control, the widest one that has a control proves. Default: 50.
	ProveFrom Percent
	// Holdback is the share of every ring that is kept on the stable version until Completed, as the control. Default:
	// none.
	Holdback Percent
	// FalseRollback bounds the probability that a candidate which keeps every claim is rolled back, however often the
	// gates look. Default: 0.01.
	FalseRollback float64
	// FalsePromotion bounds the probability that a proof is given to a candidate which breaks the gate's claim. Default:
	// 0.05.
	FalsePromotion float64
	// Rollback are the steps that undo what the candidate needed, run in this order on a rollback.
	Rollback []RollbackStep
	// Undo undoes what [Decision.Journal] has recorded, by kind: on a rollback each effect once at least, the newest first,
	// after the steps of Rollback; where a ring is rolled back alone, the effects of its units. It has a minute and five
	// attempts; an error, a panic and a time-out are failures, to be tried again. It must return when its context ends, and
	// bear to be asked twice, and to be asked about an effect that was never made. Once the rollout has completed, what is
	// journalled is dropped. Default: no effects.
	Undo map[string]func(context.Context, Effect) error
	// Sessions is what becomes of sessions under way on the candidate when it is rolled back.
	Sessions SessionPolicy
	// MayAdvance is asked before any share is raised, with the present time: change windows and freezes. A rollback is
	// never asked. A panic, or no answer within a tick, is no. Default: always.
	MayAdvance func(time.Time) bool
	// Metrics are recorded without a gate, to be watched.
	Metrics []Metric
	// Without are the guards to turn off of those that are always there: [GuardNoOutcome], [GuardSplit]. Default: none.
	Without []string
	// Independent says that the outcomes of one unit are as good as independent of each other, as where a unit seldom
	// comes twice: gates then need less evidence. Where one unit's outcomes do go together, a rollback for nothing is more
	// likely than FalseRollback, and so is a false promotion. Default: they are not.
	Independent bool
}

// The guards of every policy, turned off by Policy.Without. They are armed in every stage, can only be broken, and are
// never needed for a promotion. They need no metric: they look at what is decided and recorded anyway.
const (
	// GuardNoOutcome rolls back where decisions for the candidate go without an outcome more often than those for the
	// control: requests that hang or crash leave nothing else behind. A decision that is counted has an outcome once
	// [Errors] is recorded of it, or anything where the control records no Errors. It is looked at in slots of 5 s or a
	// tick, whichever is longer, 5 s after their end at the earliest: later where the control's [Latency] is longer (its
	// 99.9th percentile), but 60 s at most. Where neither cohort records anything it says nothing.
	GuardNoOutcome = "no outcome"
	// GuardSplit holds where the units that come are not divided as the share says: then something is between the
	// decision and the units, and the cohorts cannot be compared. It counts a unit when it first comes.
	GuardSplit = "split"
)

// guards are the guards that are on, as the judge sees them.
func (p *Policy) guards() []judge.Spec {
	var specs []judge.Spec
	for _, s := range []judge.Spec{
		{Name: GuardNoOutcome, Metric: GuardNoOutcome, Kind: judge.Silence, Action: judge.Rollback},
		{Name: GuardSplit, Metric: GuardSplit, Kind: judge.Split, Action: judge.Hold},
	} {
		if !slices.Contains(p.Without, s.Name) {
			specs = append(specs, s)
		}
	}
	return specs
}

const (
	defaultDeadline       = 24 * time.Hour
	defaultProveFrom      = 50
	defaultFalseRollback  = 0.01
	defaultFalsePromotion = 0.05
	defaultInterval       = 5 * time.Second
)

// withDefaults returns a deep enough copy of p in which every default is filled in. name is the rollout's.
func (p Policy) withDefaults(name string) Policy {
	p.Rings = append([]Ring(nil), p.Rings...)
	p.Stages = append([]Stage(nil), p.Stages...)
	p.Gates = append([]Gate(nil), p.Gates...)
	p.Rollback = append([]RollbackStep(nil), p.Rollback...)
	p.Metrics = append([]Metric(nil), p.Metrics...)
	p.Without = append([]string(nil), p.Without...)
	p.Undo = maps.Clone(p.Undo)
	if p.Sessions.Grace == 0 {
		p.Sessions.Grace = defaultGrace
	}
	if p.Salt == "" {
		p.Salt = name
	}
	if p.Deadline == 0 {
		p.Deadline = defaultDeadline
	}
	if p.OnDeadline == Default {
		p.OnDeadline = Hold
	}
	if p.ProveFrom == 0 {
		p.ProveFrom = defaultProveFrom
	}
	if p.FalseRollback == 0 {
		p.FalseRollback = defaultFalseRollback
	}
	if p.FalsePromotion == 0 {
		p.FalsePromotion = defaultFalsePromotion
	}
	for i := range p.Stages {
		s := &p.Stages[i]
		s.Gates = append([]Gate(nil), s.Gates...)
		if s.Ring == "" {
			s.Ring = Everyone
		}
		if s.Name == "" {
			s.Name = s.Ring + " " + s.Percent.String()
		}
		if s.Bake == 0 {
			s.Bake = p.Bake
		}
		if s.Deadline == 0 {
			s.Deadline = p.Deadline
		}
	}
	for i := range p.Rollback {
		p.Rollback[i] = p.Rollback[i].withDefaults()
	}
	return p
}

// allGates are the policy's gates and then those of the stages, each once: the same gate in several stages is one gate.
func (p *Policy) allGates() []Gate {
	gates := append([]Gate(nil), p.Gates...)
	seen := map[string]bool{}
	for _, g := range gates {
		seen[g.name] = true
	}
	for _, s := range p.Stages {
		for _, g := range s.Gates {
			if !seen[g.name] {
				seen[g.name] = true
				gates = append(gates, g)
			}
		}
	}
	return gates
}

// ringIndex is the index of a ring, innermost first; [Everyone] is the last. It is -1 for an unknown ring.
func (p *Policy) ringIndex(name string) int {
	if name == Everyone || name == "" {
		return len(p.Rings)
	}
	for i, r := range p.Rings {
		if r.Name == name {
			return i
		}
	}
	return -1
}

// hasControl reports whether a stage leaves some of its ring on the stable version, to compare with.
func (p *Policy) hasControl(s *Stage) bool { return s.Percent < 100 || p.Holdback > 0 }

// armed are the gates of one stage: the policy's and its own.
func (p *Policy) armed(s *Stage) []Gate { return append(append([]Gate(nil), p.Gates...), s.Gates...) }
