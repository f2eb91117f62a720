package rollout

import (
	"fmt"
	"math"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/planner"
)

// settles is what it would take to settle an inconclusive gate if both cohorts go on as they did so far, in words and as
// numbers: a proof, where the gate can be proven and seems to be kept; a rollback, or what else it asks for, where not.
func (r *Rollout) settles(st *machine.State, g int, res judge.Result) (missing string, more uint64, in time.Duration) {
	law, ok := r.law(st, g, res)
	pace := st.Pace[res.Spec.Metric]
	candidate, control := pace.PerSecond()
	if !ok || !(candidate > 0) || !(control > 0) && !res.Spec.Absolute() {
		return "", 0, 0
	}
	path := []planner.Phase{{Look: r.o.Interval.Seconds(), Streams: []planner.Stream{{Candidate: candidate, Control: control}}}}
	// What is there already is that much less to come.
	seconds, toward := math.Inf(1), ""
	if res.Spec.CanProve() && res.NeedProof > res.ProofE {
		toward = "proven"
		if test, err := planner.Proof(res.Spec, law); err == nil {
			seconds = test.Run(path, planner.Bar{Alpha: min(res.ProofE/res.NeedProof, 1), Weight: 1, Temper: 1}).Time(.5)
		}
	}
	if math.IsInf(seconds, 1) && res.NeedE > 0 && res.LogE > 0 {
		bar := planner.Bar{Alpha: math.Exp(res.LogE) / res.NeedE, Weight: 1, Temper: 1}
		if !r.policy.Independent {
			bar.Temper, bar.Out = temperBy, true
		}
		if test, err := planner.Rollback(res.Spec, law); err == nil {
			if t := test.Run(path, bar).Time(.5); !math.IsInf(t, 1) {
				seconds, toward = t, "broken"
			}
		}
	}
	const longest = 10 * 365 * 24 * time.Hour
	switch {
	case toward == "":
		return "", 0, 0
	case !(seconds < longest.Seconds()):
		return "nothing: if it goes on like this it is never " + toward, 0, 0
	}
	in = time.Duration(seconds * float64(time.Second))
	more = uint64(math.Ceil(seconds * candidate))
	return fmt.Sprintf("about %s more outcomes of the candidate, %s at the present traffic, to be %s if it goes on like this",
		roughly(float64(more)), short(in), toward), more, in
}

// law is how the gate's outcomes are distributed, as far as seen.
func (r *Rollout) law(st *machine.State, g int, res judge.Result) (planner.Law, bool) {
	if c, m, ok := r.plan.Judge.Law(&st.Gates, g); ok {
		return planner.Law{Candidate: c, Control: m}, true
	}
	if res.Spec.Kind.IsScore() && res.Candidate.N > 0 && (res.Control.N > 0 || res.Spec.Absolute()) {
		c, m := r.plan.Judge.Badness(&st.Gates, g)
		return planner.Law{Candidate: planner.Score(c[0], c[1]), Control: planner.Score(m[0], m[1])}, true
	}
	return planner.Law{}, false
}
