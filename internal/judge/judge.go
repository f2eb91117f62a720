// Package judge decides, from blocks of counts, whether a candidate is worse
// than its control, proven no worse, or not known yet.
//
// It is pure: the same blocks in the same order give bit-identical states. A
// Judge holds what is fixed (the gates, the error bounds, the grids of bets)
// and a State what was learnt. Every number it decides on is an e-process, so
// a look after every block costs nothing: the probability that a candidate no
// worse than the null of its gates is ever called Unhealthy stays below
// Risk.FalseRollback (Ville's inequality), under any drift of the base rate
// between blocks and any change of the share. That is a theorem for one start of
// one group of gates, where units are independent; what is done for units that
// come back, new starts and rings is argued in docs/statistics.md.
package judge

import (
	"time"

	"github.com/stagedrollout/rollout/internal/evalue"
)

// Kind is the question a gate asks. The first five are of a Rate, the next
// three of a Timing; then by name. The badness of a score is 0 at the best
// value of its range and 1 at the worst.
type Kind uint8

const (
	Within               Kind = iota // candidate's rate at most control's plus Margin
	WithinFactor                     // candidate's rate at most Factor times control's
	AtMost                           // candidate's rate at most Margin
	Never                            // no bad candidate outcome at all; a guard
	NoWorse                          // candidate's rate at most control's; a guard
	QuantileWithinFactor             // candidate's Quantile at most Factor times control's
	QuantileAtMost                   // candidate's Quantile at most Limit
	TimingNoWorse                    // candidate's median and 99th percentile at most control's; a guard
	Check                            // answered by the host, no block feeds it
	ScoreWithin                      // candidate's mean badness at most control's plus Margin
	ScoreAtLeast                     // candidate's mean badness at most Margin
	ScoreNoWorse                     // candidate's mean badness at most control's; a guard
	MixWithin                        // total variation distance of candidate and control at most Margin
	MixNoChange                      // candidate's mix is control's; a guard
	Silence                          // candidate's decisions go without an outcome no more often than control's; a guard
	Split                            // first exposures are split as the share says; a guard
)

// Action is what a broken gate asks for. The order is public contract.
type Action uint8

const (
	Default Action = iota // not resolved yet; never in a Spec or a Result
	Rollback
	RollbackRing
	StepBack
	Hold
	Report
)

// Verdict is what is known about a gate. The zero value is Inconclusive.
type Verdict uint8

const (
	Inconclusive Verdict = iota
	Healthy              // proven within its margin
	Unhealthy            // proven beyond its margin
)

// Spec is one gate.
type Spec struct {
	Name     string // unique among the Judge's gates; its state is kept under it
	Metric   string // whose blocks feed it
	Kind     Kind
	Margin   float64       // a fraction: for Within .01 is one point; for AtMost the limit
	Factor   float64       // of WithinFactor and QuantileWithinFactor; 1 is no tolerance
	Quantile float64       // of the Quantile kinds, 0 < Quantile < 1
	Limit    time.Duration // of QuantileAtMost
	Action   Action        // never Default
	Lo, Hi   float64       // of a Score: its range, for people
	Labels   []string      // of a Mix: its cells
	Moments  bool          // of a Score: its blocks have Moments instead of cells
}

// CanProve reports whether the gate can ever be Healthy, so that a promotion
// may wait for it. Guards and gates that only report never are.
func (s Spec) CanProve() bool {
	switch s.Kind {
	case Never, NoWorse, TimingNoWorse, ScoreNoWorse, MixNoChange, Silence, Split:
		return false
	}
	return s.Action != Report
}

// Absolute reports whether the gate needs no control.
func (s Spec) Absolute() bool {
	switch s.Kind {
	case AtMost, QuantileAtMost, Never, Check, ScoreAtLeast:
		return true
	}
	return false
}

// Risk bounds the two errors. Each is a probability above 0 and below 1.
type Risk struct {
	FalseRollback  float64 // α: some gate that is not violated is ever called Unhealthy
	FalsePromotion float64 // α_p: a gate that is violated is ever called Healthy, a stage
	Independent    bool    // no unit has more than a few outcomes: what they have in common is not corrected for
}

// Block is one closed block of one metric in one ring: what came in since the
// last one, of both cohorts from the same cut. When it closed must not have
// depended on outcomes. A Rate has the two cells good and bad, a Timing
// evidence.Cells; a cohort without outcomes may be nil. Each block must be
// consumed once. A Score has [ScoreCells] cells, from the best value to the
// worst; a Mix a cell for each label; Silence is a Rate; Split has one cell.
type Block struct {
	Metric, Ring       string
	Candidate, Control []uint64

	// The same outcomes by group of units, group after group, for what several
	// outcomes of one unit have in common; nil where the units are not known. As
	// many cells for each group as above, but for a Timing: the marks that were
	// exceeded, [MarkCells] of them.
	CandidateBy, ControlBy []uint64

	Share float64 // of Split: the candidate's part of the units
	Known uint64  // of the candidate's events: that were acted on before, by Breach

	// Of a Score whose outcomes were not counted in cells: the candidate's and the
	// control's.
	Moments [2]Moments
}

// Moments are how many outcomes there were, the sum of their badness and the sum
// of its squares.
type Moments struct{ N, S, S2 float64 }

// State is everything a Judge remembers between blocks. The zero value has
// seen nothing. It survives JSON bit by bit. It is not safe for concurrent use.
type State struct {
	Starts int                           `json:"starts,omitempty"` // how often the rollback processes started anew
	Gates  map[string]*Gate              `json:"gates,omitempty"`  // by Spec.Name
	Memory map[string]map[string]*Memory `json:"memory,omitempty"` // by metric, then ring

	scratch *scratch // of Consume
}

// Gate is what is remembered of one gate.
type Gate struct {
	Of string `json:"of"` // the question asked; another question starts afresh

	// Against "not worse than the margin": a Bank for each bet, averaged, over the
	// rings pooled; and against "worse than the margin", since the stage was
	// entered. A Bank of the rollback side has a row for each fold of the units
	// that may be left out, or one where units are taken for independent.
	Pool  []evalue.Bank    `json:"pool,omitempty"`
	Proof []evalue.Bank    `json:"proof,omitempty"`
	Parts map[string]*Part `json:"parts,omitempty"` // by ring

	Broken bool   `json:"broken,omitempty"` // called Unhealthy; until Anew
	Cause  string `json:"cause,omitempty"`  // of Broken
	Action Action `json:"action,omitempty"` // of Broken, where it differs from the Spec's
	Ring   string `json:"ring,omitempty"`   // of Broken: that alone is at fault
}

// Part is what is remembered of one gate in one ring, since the rollback
// processes started.
type Part struct {
	Own []evalue.Bank `json:"own,omitempty"` // of the ring alone; nil where there is but one, or no bet yet
	But []evalue.Bank `json:"but,omitempty"` // of the pool without it; nil where it is the only one

	// For display: outcomes and events of either cohort. Of a Timing an event is
	// an outcome over the gate's threshold.
	Candidate Tally         `json:"candidate,omitzero"`
	Control   Tally         `json:"control,omitzero"`
	Bounds    evalue.Bounds `json:"bounds,omitzero"`

	// Of an absolute gate: the control's last block, and those before with ever
	// more weight.
	Recent [len(recent)]Recent `json:"recent,omitzero"`
}

// Recent is how many outcomes there were lately, and how many were events or how
// bad they were together.
type Recent struct {
	N float64 `json:"n,omitempty"`
	X float64 `json:"x,omitempty"`
}

// Tally counts outcomes and, among them, events; of a Score the sum of its
// badness in units of 1/32, and the sum of the squares. All saturate.
type Tally struct {
	N       uint64 `json:"n,omitempty"`
	X       uint64 `json:"x,omitempty"`
	Squares uint64 `json:"q,omitempty"`
}

// CheckResult is the last answer of a Check gate. The zero value is no answer.
type CheckResult struct {
	Verdict Verdict
	Cause   string
	AtOnce  bool // acts without waiting for the next look
}

// Estimate is what a cohort looks like, for display; nothing is decided on it.
type Estimate struct {
	N        uint64        // outcomes
	Events   uint64        // of a Rate the bad ones, of a Timing those over the gate's threshold
	Rate     float64       // Events/N, 0 while N is 0
	Quantile time.Duration // of a Timing: the gate's quantile over the last blocks, every ring; else 0
	Mean     float64       // of a Score, in its own units; 0 while N is 0
	Mix      []uint64      // of a Mix: outcomes by label
}

// Result is what a State says about one gate.
type Result struct {
	Spec    Spec
	Verdict Verdict
	Cause   string // of Unhealthy, or of a Check's answer
	AtOnce  bool   // Unhealthy and nothing to wait for
	Action  Action // what Unhealthy asks for; the Spec's, or Hold where the control is as bad

	Ring string // of Unhealthy: that alone is at fault, or ""

	LogE  float64 // natural logarithm of the evidence that the gate is violated
	E     float64 // the same as a number, at most e^50
	NeedE float64 // the E at which this gate alone is Unhealthy; 0 where no E is kept

	ProofE    float64 // evidence that the gate holds since ResetProof, at most e^50
	NeedProof float64 // the ProofE at which it is proven; 0 for guards
	Proved    bool    // Healthy may be said of it now

	// The difference of the cohorts' event rates or badness, or the candidate's
	// own where the gate is absolute: within Lo and Hi with 95 %, at all looks
	// together, if Bounded.
	Lo, Hi  float64
	Bounded bool
	Summary string // the estimates and the difference in a sentence

	Candidate, Control Estimate
	Missing            string // what the gate still waits for, "" if only for more evidence
}
