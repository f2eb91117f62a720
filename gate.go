package rollout

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
)

// Verdict is what a gate says. The zero value is Inconclusive: it neither promotes nor rolls back.
type Verdict uint8

// The verdicts of a gate.
const (
	Inconclusive = Verdict(judge.Inconclusive) // no data, too little, or no answer
	Healthy      = Verdict(judge.Healthy)      // proven to keep its claim
	Unhealthy    = Verdict(judge.Unhealthy)    // proven to break it
)

var verdictNames = []string{"inconclusive", "healthy", "unhealthy"}

func (v Verdict) String() string                { return nameIn(verdictNames, int(v)) }
func (v Verdict) MarshalText() ([]byte, error)  { return []byte(v.String()), nil }
func (v *Verdict) UnmarshalText(b []byte) error { return parseIn(verdictNames, b, (*uint8)(v)) }

// Action is what happens when a gate is broken.
type Action uint8

// The actions of a gate. Rollback, RollbackRing and StepBack share the rollout's bound on false rollbacks
// (Policy.FalseRollback); Hold and Report each keep to the same bound on their own.
const (
	Default  = Action(judge.Default)  // Rollback for a gate, Hold for a deadline
	Rollback = Action(judge.Rollback) // everybody back to the stable version
	// RollbackRing takes the ring that alone is at fault back to the stable version, and everybody where no ring is alone at
	// fault, or everyone's is, or there are more than twelve. Of a Check it is the ring of the present stage.
	RollbackRing = Action(judge.RollbackRing)
	StepBack     = Action(judge.StepBack) // back to the stage before; at most twice to one stage, then Hold
	Hold         = Action(judge.Hold)     // stay where it is until Resume
	Report       = Action(judge.Report)   // an event and nothing else; never needed for promotion
)

var actionNames = []string{"default", "rollback", "rollback ring", "step back", "hold", "report"}

func (a Action) String() string                { return nameIn(actionNames, int(a)) }
func (a Action) MarshalText() ([]byte, error)  { return []byte(a.String()), nil }
func (a *Action) UnmarshalText(b []byte) error { return parseIn(actionNames, b, (*uint8)(a)) }

// Gate is a claim on a metric, such as "errors within 1 point of control", with an action if it is broken. Gates are made
// by the methods of a metric or by [Check]; the zero value is refused by [Policy.Validate].
//
// Most gates are two-sided: Unhealthy once the claim is proven broken, Healthy once it is proven kept. NoWorse, NoChange
// and Never are guards: they can be broken but are never needed for a promotion. Beside a margin on the same metric
// (Within or WithinFactor), a guard without an explicit [Gate.OnFail] only reports: otherwise it would roll back what the
// margin allows. Two guards are always there, see [GuardNoOutcome] and [GuardSplit].
type Gate struct {
	name   string
	metric metricRef
	kind   judge.Kind
	action Action

	margin   Percent       // Within, AtMost
	factor   float64       // WithinFactor
	quantile float64       // of a timing
	limit    time.Duration // Quantile.AtMost
	value    float64       // of a score: the drop or the least value; of a mix: the distance

	check func(context.Context) (Verdict, error)
}

// Name is how the gate is called in status, events and errors, such as "errors.Within(1)".
func (g Gate) Name() string { return g.name }

// OnFail returns the gate with a as its action. Default restores the default: Rollback.
func (g Gate) OnFail(a Action) Gate {
	g.action = a
	return g
}

// Within claims that the candidate's rate is at most points percentage points above the control's.
func (r Rate) Within(points Percent) Gate {
	return Gate{name: r.gate("Within", float64(points)), metric: r.m, kind: judge.Within, margin: points}
}

// WithinFactor claims that the candidate's rate is at most f times the control's; f is above 1. Where neither cohort has
// any events it can never be proven: use [Rate.Within] for metrics that are normally zero.
func (r Rate) WithinFactor(f float64) Gate {
	return Gate{name: r.gate("WithinFactor", f), metric: r.m, kind: judge.WithinFactor, factor: f}
}

// AtMost claims that the candidate's rate is at most limit, whatever the control's is. It needs no control. Where there
// is a control and it breaks the limit as well, the environment is at fault: the rollout holds instead of rolling back.
func (r Rate) AtMost(limit Percent) Gate {
	return Gate{name: r.gate("AtMost", float64(limit)), metric: r.m, kind: judge.AtMost, margin: limit}
}

// Never claims that the event never happens to the candidate: one is enough to break it, at once. It is a guard: it
// cannot be proven and is not needed for a promotion.
func (r Rate) Never() Gate { return Gate{name: nameOf(r.m) + ".Never", metric: r.m, kind: judge.Never} }

// NoWorse claims that the candidate's rate is not above the control's at all. It is a guard: it rolls back on any proven
// worsening, however small, and is not needed for a promotion.
func (r Rate) NoWorse() Gate {
	return Gate{name: nameOf(r.m) + ".NoWorse", metric: r.m, kind: judge.NoWorse}
}

// NoWorse claims that the candidate is not slower than the control, at the median or at the 99th percentile. It is a
// guard: it rolls back on any proven worsening, however small, and is not needed for a promotion.
func (t Timing) NoWorse() Gate {
	return Gate{name: nameOf(t.m) + ".NoWorse", metric: t.m, kind: judge.TimingNoWorse}
}

// Quantile is one quantile of a timing, to make gates of.
type Quantile struct {
	m metricRef
	q float64
}

// Quantile is the q-quantile of the timing, 0 < q < 1: 0.99 is the 99th percentile.
func (t Timing) Quantile(q float64) Quantile { return Quantile{t.m, q} }

// WithinFactor claims that the candidate's quantile is at most f times the control's; f is above 1. Durations are
// compared in steps of 2 %, rounded so that neither a rollback nor a promotion is decided against the claim.
func (q Quantile) WithinFactor(f float64) Gate {
	return Gate{name: q.gate("WithinFactor", number(f)), metric: q.m, kind: judge.QuantileWithinFactor, quantile: q.q, factor: f}
}

// AtMost claims that the candidate's quantile is at most d, whatever the control's is. It needs no control.
func (q Quantile) AtMost(d time.Duration) Gate {
	return Gate{name: q.gate("AtMost", d.String()), metric: q.m, kind: judge.QuantileAtMost, quantile: q.q, limit: d}
}

// Within claims that the candidate's mean is at most drop below the control's. drop is in the unit of the score, above 0
// and less than its range.
func (s Score) Within(drop float64) Gate {
	return Gate{name: nameOf(s.m) + ".Within(" + number(drop) + ")", metric: s.m, kind: judge.ScoreWithin, value: drop}
}

// AtLeast claims that the candidate's mean is at least x, whatever the control's is. x is in the unit of the score,
// between the ends of its range. It needs no control.
func (s Score) AtLeast(x float64) Gate {
	return Gate{name: nameOf(s.m) + ".AtLeast(" + number(x) + ")", metric: s.m, kind: judge.ScoreAtLeast, value: x}
}

// NoWorse claims that the candidate's mean is not below the control's at all. It is a guard: it rolls back on any proven
// worsening, however small, and is not needed for a promotion.
func (s Score) NoWorse() Gate {
	return Gate{name: nameOf(s.m) + ".NoWorse", metric: s.m, kind: judge.ScoreNoWorse}
}

// Within claims that the candidate's mix is at most distance away from the control's: the total variation distance, which
// is the part of all outcomes that would need another label for the two to be alike. It is above 0 and below 1; 0.05 is
// five points moved from one label to another.
func (x Mix) Within(distance float64) Gate {
	return Gate{name: nameOf(x.m) + ".Within(" + number(distance) + ")", metric: x.m, kind: judge.MixWithin, value: distance}
}

// NoChange claims that the candidate's mix is the control's. It is a guard: it rolls back on any proven change, however
// small and for better or worse, and is not needed for a promotion.
func (x Mix) NoChange() Gate {
	return Gate{name: nameOf(x.m) + ".NoChange", metric: x.m, kind: judge.MixNoChange}
}

// Check returns a gate that asks any question, once a tick while [Rollout.Run] runs, each in a goroutine of its own.
// (Unhealthy, err) acts at once and err is the cause; Healthy proves the gate for as long as it is the last answer. Any
// other error, a panic, or no answer within 10 seconds (or a tick, whichever is longer) is Inconclusive with that cause.
// f should return when its context ends; while a call has not returned, no other is made.
func Check(name string, f func(context.Context) (Verdict, error)) Gate {
	return Gate{name: name, kind: judge.Check, check: f}
}

func (r Rate) gate(method string, arg float64) string {
	return nameOf(r.m) + "." + method + "(" + number(arg) + ")"
}

func (q Quantile) gate(method, arg string) string {
	return nameOf(q.m) + ".Quantile(" + number(q.q) + ")." + method + "(" + arg + ")"
}

func number(x float64) string { return strconv.FormatFloat(x, 'g', -1, 64) }

// isMargin reports whether the gate tolerates some worsening, or change, against the control.
func (g Gate) isMargin() bool {
	switch g.kind {
	case judge.Within, judge.WithinFactor, judge.QuantileWithinFactor, judge.ScoreWithin, judge.MixWithin:
		return true
	}
	return false
}

// isGuard reports whether the gate can only be broken, never proven.
func (g Gate) isGuard() bool {
	switch g.kind {
	case judge.Never, judge.NoWorse, judge.TimingNoWorse, judge.ScoreNoWorse, judge.MixNoChange:
		return true
	}
	return false
}

// problems are what is wrong with the gate by itself, each without the gate's name.
func (g Gate) problems() []string {
	var ps []string
	bad := func(format string, args ...any) { ps = append(ps, fmt.Sprintf(format, args...)) }
	if g.name == "" && g.check == nil {
		return []string{"the zero Gate claims nothing; make gates with the methods of a metric or with Check"}
	}
	if g.action > Report {
		bad("OnFail(%d) is not an Action", g.action)
	}
	if g.kind == judge.Check {
		if !ringName.MatchString(g.name) {
			bad("the name %q of a Check must match %s", g.name, ringName)
		}
		if g.name == GuardSplit {
			bad("the name %q is that of a guard that is always there", g.name)
		}
		if g.check == nil {
			bad("its function is nil")
		}
		return ps
	}
	if g.metric == (metricRef{}) {
		bad("its metric is the zero value; make metrics with NewRate, NewTiming, NewScore or NewMix")
		return ps
	}
	id := g.metric.Value()
	ps = append(ps, id.misnamed()...)
	if more := id.problems(); len(more) > 0 {
		return append(ps, more...) // its gates cannot be right
	}
	switch g.kind {
	case judge.Within:
		if !(g.margin/100 > 0 && g.margin < 100) {
			bad("a margin of %v points must be above 0 and below 100 (NoWorse allows no margin)", float64(g.margin))
		}
	case judge.AtMost:
		if !(g.margin/100 > 0 && g.margin < 100) {
			bad("a limit of %v %% must be above 0 and below 100 (Never allows none)", float64(g.margin))
		}
	case judge.ScoreWithin:
		if !(g.value > 0 && g.value < id.hi-id.lo) {
			bad("a drop of %v must be above 0 and below %v, the width of the score's range (NoWorse allows no drop)", g.value, id.hi-id.lo)
		}
	case judge.ScoreAtLeast:
		if !(g.value > id.lo && g.value < id.hi) {
			bad("a least mean of %v must be above %v and below %v, the ends of the score's range", g.value, id.lo, id.hi)
		}
	case judge.MixWithin:
		if !(g.value > 0 && g.value < 1) {
			bad("a distance of %v must be above 0 and below 1 (NoChange allows none)", g.value)
		}
	}
	if g.kind == judge.WithinFactor || g.kind == judge.QuantileWithinFactor {
		if !(g.factor > 1) || math.IsInf(g.factor, 0) {
			bad("a factor of %v must be above 1 and finite (NoWorse allows no margin)", g.factor)
		}
	}
	if g.kind == judge.QuantileWithinFactor || g.kind == judge.QuantileAtMost {
		if !(g.quantile > 0 && g.quantile < 1) {
			bad("a quantile of %v must be above 0 and below 1", g.quantile)
		}
	}
	if c := evidence.Index(g.limit); g.kind == judge.QuantileAtMost && (c == 0 || c == evidence.Cells-1) {
		bad("a limit of %v must be at least 1.024µs and below 73m, where durations are told apart", g.limit)
	}
	return ps
}

// spec is the gate as the judge sees it; margined says whether a margin stands on the same metric.
func (g Gate) spec(margined bool) judge.Spec {
	a := g.action
	if a == Default {
		a = Rollback
		if margined && g.isGuard() {
			a = Report
		}
	}
	s := judge.Spec{
		Name: g.name, Kind: g.kind, Action: judge.Action(a),
		Margin: float64(g.margin) / 100, Factor: g.factor, Quantile: g.quantile, Limit: g.limit,
	}
	if g.kind == judge.Check || g.metric == (metricRef{}) {
		return s
	}
	id := g.metric.Value()
	s.Metric = id.name
	switch g.kind {
	case judge.ScoreWithin:
		s.Margin = g.value / (id.hi - id.lo)
	case judge.ScoreAtLeast:
		s.Margin = (id.hi - g.value) / (id.hi - id.lo)
	case judge.MixWithin:
		s.Margin = g.value
	}
	switch id.kind {
	case scoreKind:
		s.Lo, s.Hi = id.lo, id.hi
	case mixKind:
		s.Labels = splitLabels(id.labels)
	}
	return s
}

// mark is a threshold that the outcomes of a timing are counted by for the gate's rollback, in the judge's terms.
type mark struct {
	quantile    float64
	shift, cell int
}

// marks are those of one gate.
func (g Gate) marks() []mark {
	switch g.kind {
	case judge.QuantileWithinFactor:
		_, up := evidence.Shift(g.factor)
		return []mark{{quantile: g.quantile, shift: up}}
	case judge.QuantileAtMost:
		return []mark{{cell: evidence.Index(g.limit) + 1}}
	case judge.TimingNoWorse:
		return []mark{{quantile: .99}, {quantile: .5}}
	}
	return nil
}
