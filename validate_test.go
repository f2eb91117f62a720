package rollout

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/judge"
)

func alwaysHealthy(context.Context) (Verdict, error) { return Healthy, nil }
func undoNothing(context.Context, Incident) error    { return nil }

// validPolicy is a policy with something of everything, made anew for each call.
func validPolicy() Policy {
	return Policy{
		Rings: []Ring{{Name: "staff"}, {Name: "beta", Match: func(u Unit) bool { return strings.HasPrefix(u.Key, "b") }}},
		Stages: []Stage{
			{Ring: "staff", Percent: 100},
			{Name: "first", Percent: 1, Approval: true},
			{Ring: "beta", Percent: 20, Over: time.Hour, Bake: time.Hour, Deadline: 12 * time.Hour},
			{Percent: 5, Gates: []Gate{NewRate("timeouts").Within(2)}},
			{Percent: 50},
			{Percent: 100, GuardOnly: true, Irreversible: true},
		},
		Bake:     10 * time.Minute,
		Holdback: 5,
		Gates: []Gate{
			Errors.Within(1), Errors.AtMost(10), Errors.NoWorse(), Latency.Quantile(0.99).WithinFactor(1.2).OnFail(StepBack),
			NewRate("fraud").Never().OnFail(RollbackRing), Check("alerts", alwaysHealthy),
		},
		Rollback: []RollbackStep{{Name: "restore", Do: undoNothing}},
		Metrics:  []Metric{NewTiming("queue")},
	}
}

func TestGoodPoliciesAreAccepted(t *testing.T) {
	for name, p := range map[string]Policy{
		"with something of everything": validPolicy(),
		"the first one a user writes": {
			Rings: []Ring{{Name: "staff"}},
			Stages: []Stage{
				{Ring: "staff", Percent: 100},
				{Percent: 1}, {Percent: 5}, {Percent: 25}, {Percent: 50}, {Percent: 100},
			},
			Bake:     10 * time.Minute,
			Holdback: 5,
			Gates:    []Gate{Errors.Within(1), Errors.AtMost(10), Latency.Quantile(0.99).WithinFactor(1.2)},
			Rollback: []RollbackStep{{Name: "restore the price table", Do: undoNothing}},
		},
		"a short one":             {Stages: Percentages(10, 100), Holdback: 5, Bake: time.Minute, Gates: []Gate{Errors.Within(1)}},
		"one that proves alone":   {Stages: Percentages(100), Gates: []Gate{Errors.AtMost(1)}},
		"one that asks":           {Stages: Percentages(100), Gates: []Gate{Check("alerts", alwaysHealthy)}},
		"one that waits":          {Stages: []Stage{{Percent: 100, GuardOnly: true}}, Bake: time.Minute, Gates: []Gate{Errors.Never()}},
		"one that is waited for":  {Stages: []Stage{{Percent: 100, Approval: true}}, Bake: time.Minute, Gates: []Gate{Errors.Never()}},
		"canary and ramp":         {Stages: []Stage{Canary(1), Ramp(time.Hour, 100)}, Holdback: 1, Bake: time.Minute, Gates: []Gate{Errors.Within(1)}},
		"of any fineness":         {Stages: Percentages(0.001, 0.002, 99.999, 100), Holdback: 0.001, Bake: time.Minute, Gates: []Gate{Errors.Within(0.001)}},
		"proof asked everywhere":  {Stages: Percentages(1, 100), ProveFrom: 0.5, Gates: []Gate{Errors.AtMost(1)}},
		"guards before the proof": {Stages: []Stage{{Percent: 49}, {Percent: 50, Gates: []Gate{Errors.AtMost(1)}}, {Percent: 100, GuardOnly: true}}, Bake: time.Minute, Gates: []Gate{Errors.Never()}},
		"an inner ring within":    {Rings: []Ring{{Name: "a"}}, Stages: []Stage{{Percent: 5}, {Ring: "a", Percent: 6}, {Percent: 100}}, Gates: []Gate{Errors.AtMost(1)}},
		"a guard that stands":     {Stages: Percentages(100), Gates: []Gate{Errors.Within(1), Errors.Never().OnFail(Rollback), Check("alerts", alwaysHealthy)}},
		"a deadline that reverts": {Stages: Percentages(100), OnDeadline: Rollback, Gates: []Gate{Errors.AtMost(1)}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := p.Validate(); err != nil {
				t.Fatal(err)
			}
			if r, err := New("good", p, nil); err != nil || r == nil {
				t.Fatal(r, err)
			}
		})
	}
}

// edit is a change of one part of the valid policy.
type edit func(p *Policy)

func editStage(i int, f func(s *Stage)) edit { return func(p *Policy) { f(&p.Stages[i]) } }
func editGates(gs ...Gate) edit              { return func(p *Policy) { p.Gates = append(p.Gates, gs...) } }

// marksOf are n gates that compare the latency at as many points.
func marksOf(n int) []Gate {
	var gates []Gate
	for i := range n {
		gates = append(gates, Latency.Quantile(.5).AtMost(time.Duration(i+1)*time.Second))
	}
	return gates
}

// editAll is another policy altogether.
func editAll(p Policy) edit { return func(q *Policy) { *q = p } }

// badPolicies are what Validate refuses, and what it then says: the place and the value.
var badPolicies = []struct {
	name string
	edit edit
	want []string
}{
	{"no stages", func(p *Policy) { p.Stages = nil }, []string{"Policy.Stages", "there are none", "100 % of everyone"}},
	{"the zero policy", editAll(Policy{}), []string{"Policy.Stages", "there are none"}},

	{"percent 0", editStage(1, func(s *Stage) { s.Percent = 0 }), []string{`Policy.Stages[1] "first".Percent: 0 `}},
	{"percent negative", editStage(3, func(s *Stage) { s.Percent = -2.5 }), []string{"Policy.Stages[3].Percent: -2.5 "}},
	{"percent above 100", editStage(5, func(s *Stage) { s.Percent = 100.5 }), []string{"Policy.Stages[5].Percent: 100.5 "}},
	{"percent NaN", editStage(3, func(s *Stage) { s.Percent = Percent(math.NaN()) }), []string{"Policy.Stages[3].Percent: NaN "}},
	{"percent infinite", editStage(3, func(s *Stage) { s.Percent = Percent(math.Inf(1)) }), []string{"Policy.Stages[3].Percent: +Inf "}},
	{"percent minus infinite", editStage(3, func(s *Stage) { s.Percent = Percent(math.Inf(-1)) }), []string{"Policy.Stages[3].Percent: -Inf "}},
	{"holdback negative", func(p *Policy) { p.Holdback = -1 }, []string{"Policy.Holdback: -1 "}},
	{"holdback 100", func(p *Policy) { p.Holdback = 100 }, []string{"Policy.Holdback: 100 "}},
	{"holdback above 100", func(p *Policy) { p.Holdback = 101 }, []string{"Policy.Holdback: 101 "}},
	{"holdback NaN", func(p *Policy) { p.Holdback = Percent(math.NaN()) }, []string{"Policy.Holdback: NaN "}},
	{"holdback infinite", func(p *Policy) { p.Holdback = Percent(math.Inf(1)) }, []string{"Policy.Holdback: +Inf "}},
	{"holdback minus infinite", func(p *Policy) { p.Holdback = Percent(math.Inf(-1)) }, []string{"Policy.Holdback: -Inf "}},
	{"prove from negative", func(p *Policy) { p.ProveFrom = -50 }, []string{"Policy.ProveFrom: -50 "}},
	{"prove from above 100", func(p *Policy) { p.ProveFrom = 101 }, []string{"Policy.ProveFrom: 101 "}},
	{"prove from NaN", func(p *Policy) { p.ProveFrom = Percent(math.NaN()) }, []string{"Policy.ProveFrom: NaN "}},
	{"prove from infinite", func(p *Policy) { p.ProveFrom = Percent(math.Inf(1)) }, []string{"Policy.ProveFrom: +Inf "}},
	{"prove from minus infinite", func(p *Policy) { p.ProveFrom = Percent(math.Inf(-1)) }, []string{"Policy.ProveFrom: -Inf "}},

	{"shrinking", editStage(3, func(s *Stage) { s.Percent = 60 }), []string{"Policy.Stages[4].Percent: 50 ", "60 %", "only grow"}},
	{"standing still", editStage(3, func(s *Stage) { s.Percent = 50 }), []string{"Policy.Stages[4].Percent: 50 ", "50 %", "only grow"}},
	{"two of a name", editStage(3, func(s *Stage) { s.Name = "first" }), []string{`Policy.Stages[3] "first"`, "already the name of Policy.Stages[1]"}},
	{"of a default name", editStage(1, func(s *Stage) { s.Name = "everyone 5 %" }), []string{"Policy.Stages[3]", `"everyone 5 %"`, "already the name of Policy.Stages[1]"}},
	{"a long name", editStage(1, func(s *Stage) { s.Name = strings.Repeat("x", 129) }), []string{"Policy.Stages[1]", ".Name: \"xxx"}},
	{"nothing new for an inner ring", editStage(3, func(s *Stage) { s.Ring, s.Percent = "beta", 30 }).and(editStage(4, func(s *Stage) { s.Ring, s.Percent = "staff", 100 })), []string{"Policy.Stages[4].Percent", `"staff"`, "100"}},
	{"an inner ring after an outer one", editStage(2, func(s *Stage) { s.Percent = 1 }), []string{"Policy.Stages[2].Percent: 1 %", `"beta"`, `"everyone" around it`}},
	{"the last below 100", editStage(5, func(s *Stage) { s.Percent = 99 }), []string{"Policy.Stages: the last is 99 %", "must be 100 % of everyone"}},
	{"the last of another ring", editStage(5, func(s *Stage) { s.Ring = "beta" }), []string{`Policy.Stages: the last is 100 % of "beta"`, "must be 100 % of everyone"}},
	{"an unknown ring", editStage(3, func(s *Stage) { s.Ring = "gamma" }), []string{`Policy.Stages[3].Ring: there is no ring "gamma"`}},

	{"a ring named everyone", func(p *Policy) { p.Rings[0].Name = Everyone }, []string{"Policy.Rings[0].Name", `"everyone"`}},
	{"a ring without a name", func(p *Policy) { p.Rings[1].Name = "" }, []string{"Policy.Rings[1].Name", `""`}},
	{"a ring of a bad name", func(p *Policy) { p.Rings[1].Name = "Beta" }, []string{"Policy.Rings[1].Name", `"Beta"`}},
	{"a ring of a colon", func(p *Policy) { p.Rings[1].Name = "be:ta" }, []string{"Policy.Rings[1].Name", `"be:ta"`}},
	{"a ring of a line break", func(p *Policy) { p.Rings[1].Name = "beta\n" }, []string{"Policy.Rings[1].Name", `"beta\n"`}},
	{"a ring of a long name", func(p *Policy) { p.Rings[1].Name = strings.Repeat("b", 65) }, []string{"Policy.Rings[1].Name", "bbbb"}},
	{"two rings of a name", func(p *Policy) { p.Rings[1].Name = "staff" }, []string{"Policy.Rings[1].Name", `"staff"`, "twice"}},
	{"too many rings", func(p *Policy) {
		for i := range maxRings {
			p.Rings = append(p.Rings, Ring{Name: fmt.Sprint("r", i)})
		}
	}, []string{"Policy.Rings: "}},

	{"blind", editAll(Policy{Stages: Percentages(10, 100), Bake: time.Minute, Gates: []Gate{Errors.Within(1)}}), []string{`Policy.Stages[1] "everyone 100 %"`, "blind", "Holdback"}},
	{"a blind inner ring", editAll(Policy{
		Rings: []Ring{{Name: "a"}}, Stages: []Stage{{Ring: "a", Percent: 100}, {Percent: 100, Gates: []Gate{Errors.AtMost(1)}}}, Bake: time.Minute, Gates: []Gate{Errors.Within(1)},
	}), []string{`Policy.Stages[0] "a 100 %"`, "blind"}},
	{"blind but for a report", editAll(Policy{Stages: Percentages(10, 100), Bake: time.Minute, Gates: []Gate{Errors.Within(1), Errors.AtMost(1).OnFail(Report)}}), []string{"Policy.Stages[1]", "blind"}},
	{"blind beside a margin", editAll(Policy{
		Stages: []Stage{{Percent: 10}, {Percent: 100, GuardOnly: true}}, Bake: time.Minute, Gates: []Gate{Errors.Within(1), Errors.Never()},
	}), []string{"Policy.Stages[1]", "blind"}},
	{"nothing proves and no bake", editAll(Policy{Stages: []Stage{{Percent: 10}, {Percent: 100, GuardOnly: true}}, Holdback: 5, Gates: []Gate{Errors.Never()}}), []string{"Policy.Stages[0]", "Policy.Stages[1]", "nothing could prove", "Bake is zero"}},
	{"an approval without bake", editAll(Policy{Stages: []Stage{{Percent: 100, Approval: true}}, Gates: []Gate{Errors.Never()}}), []string{"Policy.Stages[0]", "nothing could prove", "Bake is zero"}},
	{"nothing proves", editAll(Policy{Stages: Percentages(10, 50, 100), Holdback: 5, Bake: time.Minute, Gates: []Gate{Errors.Never(), Errors.NoWorse()}}), []string{"Policy.Stages[1]", "Policy.Stages[2]", "nothing could prove", "GuardOnly", "Approval"}},
	{"only a report proves", editAll(Policy{Stages: Percentages(100), Holdback: 5, Bake: time.Minute, Gates: []Gate{Errors.Within(1).OnFail(Report), Errors.Never()}}), []string{"Policy.Stages[0]", "nothing could prove"}},

	{"a factor of 1", editGates(Errors.WithinFactor(1)), []string{"Policy.Gates[6] errors.WithinFactor(1)", "factor of 1 "}},
	{"a factor of 0.5", editGates(Latency.Quantile(0.5).WithinFactor(0.5)), []string{"Policy.Gates[6] latency.Quantile(0.5).WithinFactor(0.5)", "factor of 0.5 "}},
	{"a factor below 0", editGates(Errors.WithinFactor(-2)), []string{"Policy.Gates[6]", "factor of -2 "}},
	{"a factor NaN", editGates(Errors.WithinFactor(math.NaN())), []string{"Policy.Gates[6]", "factor of NaN "}},
	{"a factor infinite", editGates(Latency.Quantile(0.5).WithinFactor(math.Inf(1))), []string{"Policy.Gates[6]", "factor of +Inf "}},
	{"a quantile of 0", editGates(Latency.Quantile(0).WithinFactor(2)), []string{"Policy.Gates[6]", "quantile of 0 "}},
	{"a quantile of 1", editGates(Latency.Quantile(1).AtMost(time.Second)), []string{"Policy.Gates[6]", "quantile of 1 "}},
	{"a quantile of 99", editGates(Latency.Quantile(99).WithinFactor(2)), []string{"Policy.Gates[6]", "quantile of 99 "}},
	{"a quantile below 0", editGates(Latency.Quantile(-0.5).WithinFactor(2)), []string{"Policy.Gates[6]", "quantile of -0.5 "}},
	{"a quantile NaN", editGates(Latency.Quantile(math.NaN()).AtMost(time.Second)), []string{"Policy.Gates[6]", "quantile of NaN "}},
	{"a margin of 0", editGates(Errors.Within(0)), []string{"Policy.Gates[6] errors.Within(0)", "margin of 0 "}},
	{"a margin below 0", editGates(Errors.Within(-1)), []string{"Policy.Gates[6] errors.Within(-1)", "margin of -1 "}},
	{"a margin of 100", editGates(Errors.Within(100)), []string{"Policy.Gates[6]", "margin of 100 "}},
	{"a margin NaN", editGates(Errors.Within(Percent(math.NaN()))), []string{"Policy.Gates[6]", "margin of NaN "}},
	{"a limit of 0", editGates(Errors.AtMost(0)), []string{"Policy.Gates[6]", "limit of 0 "}},
	{"a limit below 0", editGates(Errors.AtMost(-3)), []string{"Policy.Gates[6]", "limit of -3 "}},
	{"a limit of 100", editGates(Errors.AtMost(100)), []string{"Policy.Gates[6]", "limit of 100 "}},
	{"a limit NaN", editGates(Errors.AtMost(Percent(math.NaN()))), []string{"Policy.Gates[6]", "limit of NaN "}},
	{"a limit of 0 s", editGates(Latency.Quantile(0.5).AtMost(0)), []string{"Policy.Gates[6]", "limit of 0s "}},
	{"a limit below 0 s", editGates(Latency.Quantile(0.5).AtMost(-time.Second)), []string{"Policy.Gates[6]", "limit of -1s "}},
	{"a limit too small to see", editGates(Latency.Quantile(0.5).AtMost(time.Microsecond)), []string{"Policy.Gates[6]", "limit of 1µs "}},
	{"a limit too great to see", editGates(Latency.Quantile(0.5).AtMost(2 * time.Hour)), []string{"Policy.Gates[6]", "limit of 2h0m0s "}},
	{"an action that is none", editGates(Errors.Within(2).OnFail(Action(9))), []string{"Policy.Gates[6] errors.Within(2)", "OnFail(9)"}},
	{"a check without a function", editGates(Check("pages", nil)), []string{"Policy.Gates[6] pages", "nil"}},
	{"a check of a bad name", editGates(Check("the pages", alwaysHealthy)), []string{"Policy.Gates[6]", `"the pages"`}},
	{"a check without a name", editGates(Check("", alwaysHealthy)), []string{"Policy.Gates[6]", `""`}},
	{"the zero gate", editGates(Gate{}), []string{"Policy.Gates[6]", "zero Gate"}},
	{"the zero gate with an action", editStage(3, func(s *Stage) { s.Gates = []Gate{Gate{}.OnFail(Hold)} }), []string{"Policy.Stages[3].Gates[0]", "zero Gate"}},
	{"a gate of the zero rate", editGates(Rate{}.Never()), []string{"Policy.Gates[6]", "zero value"}},
	{"a gate of the zero timing", editGates(Timing{}.NoWorse()), []string{"Policy.Gates[6]", "zero value"}},
	{"a gate of a bad metric", editGates(NewRate("Time outs").Within(1)), []string{"Policy.Gates[6]", `"Time outs"`}},
	{"a gate twice", editGates(Errors.Within(1)), []string{"Policy.Gates[6] errors.Within(1)", "twice"}},
	{"a gate twice, other action", editGates(Errors.Within(1).OnFail(Hold)), []string{"Policy.Gates[6] errors.Within(1)", "twice"}},
	{"a gate again in a stage", editStage(4, func(s *Stage) { s.Gates = []Gate{Errors.AtMost(10)} }), []string{"Policy.Stages[4].Gates[0] errors.AtMost(10)", "twice"}},
	{"a gate twice in a stage", editStage(4, func(s *Stage) { s.Gates = []Gate{Errors.AtMost(3), Errors.AtMost(3)} }), []string{"Policy.Stages[4].Gates[1] errors.AtMost(3)", "twice"}},
	{"a gate of two actions", editStage(4, func(s *Stage) { s.Gates = []Gate{NewRate("timeouts").Within(2).OnFail(Hold)} }), []string{"Policy.Stages[4].Gates timeouts.Within(2)", "hold", "default"}},
	{"two checks of a name", editStage(3, func(s *Stage) { s.Gates = []Gate{Check("pages", alwaysHealthy)} }).and(editStage(4, func(s *Stage) { s.Gates = []Gate{Check("pages", alwaysHealthy)} })), []string{"Policy.Stages[4].Gates pages", "another stage"}},

	{"a timing called errors", editGates(NewTiming("errors").NoWorse()), []string{"gate errors.NoWorse", `"errors"`, "timing", "rate"}},
	{"a rate called latency", func(p *Policy) { p.Metrics = append(p.Metrics, NewRate("latency")) }, []string{"Policy.Metrics[1]", `"latency"`, "timing", "rate"}},
	{"a rate and a timing", editStage(4, func(s *Stage) { s.Gates = []Gate{NewRate("queue").Never()} }), []string{"Policy.Metrics[0]", `"queue"`, "timing", "rate"}},
	{"a rate and a timing of one gate's name", editStage(3, func(s *Stage) { s.Gates = []Gate{NewRate("waits").NoWorse()} }).and(editStage(4, func(s *Stage) { s.Gates = []Gate{NewTiming("waits").NoWorse()} })), []string{"waits.NoWorse", `"waits"`, "timing", "rate"}},
	{"no metric", func(p *Policy) { p.Metrics = append(p.Metrics, nil) }, []string{"Policy.Metrics[1]", "nil"}},
	{"the zero metric", func(p *Policy) { p.Metrics = append(p.Metrics, Timing{}) }, []string{"Policy.Metrics[1]", "zero value"}},
	{"a metric of a bad name", func(p *Policy) { p.Metrics = append(p.Metrics, NewRate("-x")) }, []string{"Policy.Metrics[1]", `"-x"`}},

	{"a drop of nothing", editGates(quality.Within(0)), []string{"Policy.Gates[6] quality.Within(0)", "drop of 0 "}},
	{"a drop as wide as the range", editGates(quality.Within(4)), []string{"Policy.Gates[6] quality.Within(4)", "drop of 4 ", "below 4"}},
	{"a drop that is no number", editGates(quality.Within(math.NaN())), []string{"Policy.Gates[6] quality.Within(NaN)", "drop of NaN "}},
	{"at least the worst", editGates(quality.AtLeast(-1)), []string{"Policy.Gates[6] quality.AtLeast(-1)", "least mean of -1 "}},
	{"at least the best", editGates(quality.AtLeast(3)), []string{"Policy.Gates[6] quality.AtLeast(3)", "least mean of 3 "}},
	{"at least no number", editGates(quality.AtLeast(math.NaN())), []string{"Policy.Gates[6] quality.AtLeast(NaN)", "least mean of NaN "}},
	{"no distance", editGates(route.Within(0)), []string{"Policy.Gates[6] route.Within(0)", "distance of 0 "}},
	{"all distances", editGates(route.Within(1)), []string{"Policy.Gates[6] route.Within(1)", "distance of 1 "}},
	{"a gate of the zero score", editGates(Score{}.NoWorse()), []string{"Policy.Gates[6]", "zero value"}},
	{"a gate of the zero mix", editGates(Mix{}.NoChange()), []string{"Policy.Gates[6]", "zero value"}},
	{"an empty range", editGates(NewScore("grade", 2, 2).NoWorse()), []string{"Policy.Gates[6] grade.NoWorse", "from 2 to 2"}},
	{"a range upside down", func(p *Policy) { p.Metrics = append(p.Metrics, NewScore("grade", 1, 0)) }, []string{"Policy.Metrics[1] grade", "from 1 to 0"}},
	{"a range without an end", editGates(NewScore("grade", 0, math.Inf(1)).AtLeast(1)), []string{"Policy.Gates[6] grade.AtLeast(1)", "from 0 to +Inf"}},
	{"a range that is no number", editGates(NewScore("grade", math.NaN(), 1).NoWorse()), []string{"Policy.Gates[6] grade.NoWorse", "from NaN to 1"}},
	{"too wide a range", editGates(NewScore("grade", -math.MaxFloat64, math.MaxFloat64).NoWorse()), []string{"Policy.Gates[6] grade.NoWorse", "too wide"}},
	{"one label", editGates(NewMix("kinds", "a").NoChange()), []string{"Policy.Gates[6] kinds.NoChange", "fewer than 2 labels"}},
	{"one label and other", func(p *Policy) { p.Metrics = append(p.Metrics, NewMix("kinds", "a", "other")) }, []string{"Policy.Metrics[1] kinds", "fewer than 2 labels"}},
	{"ten labels", editGates(NewMix("kinds", strings.Split("abcdefghij", "")...).NoChange()), []string{"Policy.Gates[6] kinds.NoChange", "10 labels"}},
	{"a label twice", editGates(NewMix("kinds", "a", "b", "a").NoChange()), []string{"Policy.Gates[6] kinds.NoChange", `label 2 of the mix, "a"`, "twice"}},
	{"an empty label", editGates(NewMix("kinds", "a", "", "b").NoChange()), []string{"Policy.Gates[6] kinds.NoChange", "label 1 of the mix is empty"}},
	{"a long label", editGates(NewMix("kinds", "a", strings.Repeat("b", 65), "c").NoChange()), []string{"Policy.Gates[6] kinds.NoChange", "label 1 of the mix", "64 bytes"}},
	{"a label that is no text", editGates(NewMix("kinds", "a", "b", "\xff").NoChange()), []string{"Policy.Gates[6] kinds.NoChange", "label 2 of the mix", "UTF-8"}},
	{"scores of two ranges", editGates(quality.NoWorse(), NewScore("quality", 0, 1).AtLeast(.5)), []string{"gate quality.AtLeast(0.5)", "score from 0 to 1", "score from -1 to 3"}},
	{"mixes of other labels", editGates(route.NoChange(), NewMix("route", "a", "b").Within(.5)), []string{"gate route.Within(0.5)", `mix of ["a" "b" "other"]`, `mix of ["search" "answer" "refuse" "other"]`}},
	{"a metric with a guard's name", editGates(NewRate("split").NoWorse()), []string{"Policy.Gates[6] split.NoWorse", `"split"`, "guard"}},
	{"a check with a guard's name", editGates(Check("split", alwaysHealthy)), []string{"Policy.Gates[6] split", "guard"}},
	{"without what is no guard", func(p *Policy) { p.Without = []string{"errors.Within(1)"} }, []string{"Policy.Without[0]", `"errors.Within(1)"`, `"no outcome"`, `"split"`}},
	{"without a guard twice", func(p *Policy) { p.Without = []string{GuardSplit, GuardSplit} }, []string{"Policy.Without[1]", `"split"`, "twice"}},
	{"more marks than fit", editGates(append(marksOf(6), Latency.NoWorse())...), []string{`gates of "latency"`, "9 points", "8 are the most"}},
	{"only a guard at the end", func(p *Policy) {
		*p = Policy{Stages: Percentages(50, 100), Bake: time.Minute, Holdback: 5, Gates: []Gate{quality.NoWorse(), route.NoChange()}}
	}, []string{"Policy.Stages[0]", "nothing could prove it healthy"}},

	{"bake negative", func(p *Policy) { p.Bake = -time.Second }, []string{"Policy.Bake: -1s "}},
	{"deadline negative", func(p *Policy) { p.Deadline = -time.Minute }, []string{"Policy.Deadline: -1m0s "}},
	{"a stage's bake negative", editStage(1, func(s *Stage) { s.Bake = -1 }), []string{`Policy.Stages[1] "first".Bake: -1ns `}},
	{"a stage's deadline negative", editStage(3, func(s *Stage) { s.Deadline = -1 }), []string{"Policy.Stages[3].Deadline: -1ns "}},
	{"over negative", editStage(3, func(s *Stage) { s.Over = -time.Hour }), []string{"Policy.Stages[3].Over: -1h0m0s "}},
	{"no time left", editStage(2, func(s *Stage) { s.Deadline = 2 * time.Hour }), []string{"Policy.Stages[2].Deadline: 2h0m0s ", "Over, 1h0m0s, and Bake, 1h0m0s"}},
	{"a bake for ever", editStage(2, func(s *Stage) { s.Bake = math.MaxInt64 }), []string{"Policy.Stages[2].Deadline: 12h0m0s ", "no time"}},
	{"a climb for ever", editStage(2, func(s *Stage) { s.Over, s.Deadline = math.MaxInt64, math.MaxInt64 }), []string{"Policy.Stages[2].Deadline: ", "no time"}},
	{"a step's timeout negative", func(p *Policy) { p.Rollback[0].Timeout = -time.Second }, []string{"Policy.Rollback[0].Timeout: -1s "}},
	{"a step's attempts negative", func(p *Policy) { p.Rollback[0].Attempts = -4 }, []string{"Policy.Rollback[0].Attempts: -4 "}},
	{"a step without a name", func(p *Policy) { p.Rollback[0].Name = "" }, []string{"Policy.Rollback[0].Name: empty"}},
	{"a step of a long name", func(p *Policy) { p.Rollback[0].Name = strings.Repeat("x", 129) }, []string{"Policy.Rollback[0].Name: \"xxx"}},
	{"a step without a function", func(p *Policy) { p.Rollback[0].Do = nil }, []string{"Policy.Rollback[0].Do: nil"}},
	{"two steps of a name", func(p *Policy) { p.Rollback = append(p.Rollback, p.Rollback[0]) }, []string{"Policy.Rollback[1].Name", `"restore"`, "twice"}},

	{"a deadline that steps back", func(p *Policy) { p.OnDeadline = StepBack }, []string{"Policy.OnDeadline: step back "}},
	{"a deadline that reports", func(p *Policy) { p.OnDeadline = Report }, []string{"Policy.OnDeadline: report "}},
	{"a deadline that is no action", func(p *Policy) { p.OnDeadline = 77 }, []string{"Policy.OnDeadline: 77 "}},
	{"false rollback negative", func(p *Policy) { p.FalseRollback = -0.01 }, []string{"Policy.FalseRollback: -0.01 "}},
	{"false rollback 0.5", func(p *Policy) { p.FalseRollback = 0.5 }, []string{"Policy.FalseRollback: 0.5 "}},
	{"false rollback 1", func(p *Policy) { p.FalseRollback = 1 }, []string{"Policy.FalseRollback: 1 "}},
	{"false rollback NaN", func(p *Policy) { p.FalseRollback = math.NaN() }, []string{"Policy.FalseRollback: NaN "}},
	{"false promotion negative", func(p *Policy) { p.FalsePromotion = -0.01 }, []string{"Policy.FalsePromotion: -0.01 "}},
	{"false promotion 5", func(p *Policy) { p.FalsePromotion = 5 }, []string{"Policy.FalsePromotion: 5 "}},
	{"false promotion infinite", func(p *Policy) { p.FalsePromotion = math.Inf(1) }, []string{"Policy.FalsePromotion: +Inf "}},
}

func (a edit) and(b edit) edit { return func(p *Policy) { a(p); b(p) } }

// refusedBy checks that New returns nothing but the error of Validate, and gives its lines.
func refusedBy(t fataler, p Policy) []string {
	t.Helper()
	err := p.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	r, newErr := New("bad", p, nil)
	if r != nil || newErr == nil || newErr.Error() != err.Error() {
		t.Fatalf("New: %v, %v, not nil, %v", r, newErr, err)
	}
	lines := strings.Split(err.Error(), "\n")
	for _, line := range lines {
		if !strings.HasPrefix(line, "rollout: ") {
			t.Fatalf("%q does not say who speaks", line)
		}
	}
	return lines
}

// Each bad input gives an error that names the place and the value.
func TestBadPoliciesAreRefused(t *testing.T) {
	for _, c := range badPolicies {
		t.Run(c.name, func(t *testing.T) {
			p := validPolicy()
			c.edit(&p)
			text := strings.Join(refusedBy(t, p), "\n")
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("%q is not in\n%s", want, text)
				}
			}
		})
	}
}

// Every problem is reported at once: each of several bad inputs as if it were the only one.
func TestEveryProblemIsReported(t *testing.T) {
	apart := []string{
		"holdback negative", "prove from NaN", "false rollback 1", "false promotion 5", "deadline negative", "a deadline that reports", "two rings of a name",
		"a factor of 1", "a quantile of 99", "a margin below 0", "the zero metric", "a stage's bake negative", "over negative",
		"the last below 100", "a step without a function", "a step's timeout negative",
	}
	rapid.Check(t, func(t *rapid.T) {
		p := validPolicy()
		var want []string
		for _, name := range rapid.SliceOfNDistinct(rapid.SampledFrom(apart), 2, len(apart), rapid.ID).Draw(t, "problems") {
			c := badPolicies[slices.IndexFunc(badPolicies, func(c struct {
				name string
				edit edit
				want []string
			}) bool {
				return c.name == name
			})]
			c.edit(&p)
			for _, w := range c.want {
				if !strings.HasPrefix(w, "Policy.Gates[") {
					want = append(want, w)
				}
			}
		}
		lines := refusedBy(t, p)
		text := strings.Join(lines, "\n")
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Fatalf("%q is not in\n%s", w, text)
			}
		}
		joined, ok := p.Validate().(interface{ Unwrap() []error })
		if !ok || len(joined.Unwrap()) != len(lines) {
			t.Fatalf("%T is not joined of %d problems", p.Validate(), len(lines))
		}
	})
}

func TestNewRefusesNamesAndOptions(t *testing.T) {
	for _, name := range []string{"", "Checkout", "a b", "-a", "a/b", "a:b", "é", "a\n", strings.Repeat("a", 65)} {
		if r, err := New(name, validPolicy(), nil); r != nil || err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", name)) {
			t.Errorf("%q: %v, %v", name, r, err)
		}
	}
	for _, name := range []string{"a", "0", "checkout-v2", "a.b_c-d", strings.Repeat("a", 64)} {
		if r, err := New(name, validPolicy(), &Options{}); err != nil || r.Name() != name {
			t.Errorf("%q: %v", name, err)
		}
	}
	for want, o := range map[string]*Options{
		"Options.Interval: -1s ":   {Interval: -time.Second},
		"Options.Lease: -1m0s ":    {Lease: -time.Minute},
		"Policy.Stages: there are": nil,
	} {
		p := validPolicy()
		if o == nil {
			p.Stages = nil
		}
		if r, err := New("a", p, o); r != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, not %q", r, err, want)
		}
	}
	r, err := New("No", Policy{}, &Options{Interval: -1, Lease: -1})
	if r != nil || err == nil {
		t.Fatal(r, err)
	}
	for _, want := range []string{`"No"`, "Policy.Stages", "Options.Interval", "Options.Lease"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in\n%s", want, err)
		}
	}
}

func TestMustPanics(t *testing.T) {
	if r := Must("good", validPolicy(), nil); r.Name() != "good" {
		t.Error(r.Name())
	}
	defer func() {
		err, ok := recover().(error)
		if !ok || !strings.Contains(err.Error(), "Policy.Stages") {
			t.Errorf("it panicked with %v", err)
		}
	}()
	Must("bad", Policy{}, nil)
	t.Error("it did not panic")
}

// drawPolicies draws policies that are mostly valid.
func drawPolicies() *rapid.Generator[Policy] {
	return rapid.Custom(func(t *rapid.T) Policy {
		odd := func(label string) bool { return rapid.IntRange(0, 60).Draw(t, "odd "+label) == 37 } // rapid likes small numbers
		duration := func(label string, most time.Duration) time.Duration {
			if odd(label) {
				return time.Duration(rapid.Int64().Draw(t, label))
			}
			return time.Duration(rapid.Int64Range(0, int64(most)).Draw(t, label))
		}
		number := func(label string, lo, hi float64) float64 {
			if odd(label) {
				return rapid.OneOf(rapid.Float64(), rapid.SampledFrom([]float64{math.NaN(), math.Inf(1), -1, 0, 1, 100, 5e-324})).Draw(t, label)
			}
			return rapid.Float64Range(lo, hi).Draw(t, label)
		}
		metric := func() string {
			return rapid.SampledFrom([]string{"errors", "errors", "timeouts", "fraud"}).Draw(t, "rate")
		}
		gate := func() (g Gate) {
			rate, timing := NewRate(metric()), rapid.SampledFrom([]Timing{Latency, NewTiming("queue")}).Draw(t, "timing")
			switch rapid.IntRange(0, 9).Draw(t, "gate") {
			case 0:
				g = rate.Within(Percent(number("margin", 0.1, 50)))
			case 1:
				g = rate.WithinFactor(number("factor", 1.1, 3))
			case 2, 3:
				g = rate.AtMost(Percent(number("limit", 0.1, 50)))
			case 4:
				g = rate.Never()
			case 5:
				g = rate.NoWorse()
			case 6:
				g = timing.NoWorse()
			case 7:
				g = timing.Quantile(number("quantile", 0.1, 0.99)).WithinFactor(number("factor", 1.1, 3))
			case 8:
				g = timing.Quantile(number("quantile", 0.1, 0.99)).AtMost(duration("limit", time.Minute) + time.Millisecond)
			case 9:
				g = Check(rapid.StringMatching("[a-d]").Draw(t, "check"), alwaysHealthy)
			}
			if rapid.IntRange(0, 3).Draw(t, "acts") == 0 {
				g = g.OnFail(Action(rapid.IntRange(0, int(Report)).Draw(t, "action")))
			}
			if odd("gate") {
				return Gate{}
			}
			return g
		}
		gates := func(most int) (gs []Gate) {
			for range rapid.IntRange(0, most).Draw(t, "gates") {
				if g := gate(); !slices.ContainsFunc(gs, func(h Gate) bool { return h.name == g.name }) {
					gs = append(gs, g)
				}
			}
			return gs
		}
		rings := []string{"staff", "beta", Everyone}[rapid.IntRange(0, 2).Draw(t, "fewer"):]
		p := Policy{
			Stages: drawLadder(t, rings), Bake: duration("bake", time.Hour), Gates: gates(4),
			Deadline: rapid.SampledFrom([]time.Duration{0, 3 * time.Hour, 1000 * time.Hour}).Draw(t, "deadline"),
			Holdback: Percent(number("holdback", 0, 20)), ProveFrom: Percent(number("prove from", 0, 100)),
			FalseRollback: number("false rollback", 0, 0.4), FalsePromotion: number("false promotion", 0, 0.4),
			OnDeadline: rapid.SampledFrom([]Action{Default, Hold, Rollback}).Draw(t, "on deadline"),
		}
		if rapid.Bool().Draw(t, "no holdback") {
			p.Holdback = 0
		}
		for _, name := range rings[:len(rings)-1] {
			p.Rings = append(p.Rings, Ring{Name: name})
		}
		for i := range p.Stages {
			s := &p.Stages[i]
			s.GuardOnly, s.Approval = rapid.Bool().Draw(t, "guard only"), rapid.Bool().Draw(t, "approval")
			s.Irreversible = rapid.Bool().Draw(t, "irreversible")
			s.Over += duration("over", time.Hour)
			if rapid.IntRange(0, 2).Draw(t, "own bake") == 0 {
				s.Bake = duration("own bake", time.Hour)
			}
			if odd("own deadline") {
				s.Deadline = duration("own deadline", 100*time.Hour)
			}
			if rapid.IntRange(0, 2).Draw(t, "own gates") == 0 {
				s.Gates = gates(2)
			}
			if odd("percent") {
				s.Percent = Percent(rapid.Float64().Draw(t, "percent"))
			}
			if odd("ring") {
				s.Ring = rapid.SampledFrom([]string{"staff", "beta", "?"}).Draw(t, "ring")
			}
		}
		if odd("stages") {
			p.Stages = p.Stages[:rapid.IntRange(0, len(p.Stages)-1).Draw(t, "cut")]
		}
		if odd("step") {
			p.Rollback = []RollbackStep{{Name: rapid.StringN(0, 2, -1).Draw(t, "step"), Do: undoNothing}, {Name: "x", Do: undoNothing, Timeout: duration("timeout", time.Hour)}}
		}
		return p
	})
}

// Validate never panics, New succeeds where Validate finds nothing and only there, and what they accept is never blind and
// never at a dead end: in every stage some armed gate can act, and what asks for a proof can be given one.
func TestAcceptedPoliciesCanWork(t *testing.T) {
	accepted := 0
	rapid.Check(t, func(t *rapid.T) {
		p := drawPolicies().Draw(t, "policy")
		err := p.Validate()
		r, newErr := New("random", p, quietly())
		if (err == nil) != (newErr == nil) || (r == nil) != (err != nil) {
			t.Fatalf("Validate: %v\nNew: %v, %v", err, r != nil, newErr)
		}
		if err != nil {
			return
		}
		accepted++
		specs := r.plan.Judge.Specs()
		for i, s := range r.plan.Stages {
			control := s.Percent < 100 || p.Holdback > 0
			acts, proves := false, false
			for g, spec := range specs {
				acts = acts || s.Armed[g] && spec.Action != judge.Report && (control || spec.Absolute())
				proves = proves || s.Armed[g] && spec.CanProve() && (control || spec.Absolute())
			}
			if !control && !acts {
				t.Fatalf("stage %d is blind", i)
			}
			if s.Control != control {
				t.Fatalf("stage %d: control %v", i, s.Control)
			}
			if s.Proof && !proves && !s.Approval {
				t.Fatalf("stage %d asks for a proof that nothing can give", i)
			}
			if !proves && s.Bake <= 0 {
				t.Fatalf("stage %d has neither a proof nor a bake", i)
			}
			if s.Over < 0 || s.Bake < 0 || s.Over+s.Bake < 0 || s.Deadline <= s.Over+s.Bake {
				t.Fatalf("stage %d has %v for %v and %v", i, s.Deadline, s.Over, s.Bake)
			}
		}
		if err := r.startForTest(t.Context()); err != nil {
			t.Fatal(err)
		}
		for range p.Stages {
			if err := r.Advance(t.Context(), r.Status().Stage.Name, ""); err != nil {
				t.Fatal(err)
			}
		}
		if st := r.Status(); st.State != Completed {
			t.Fatalf("%v after every stage", st.State)
		}
	})
	if accepted < 5 && !t.Failed() {
		t.Errorf("only %d policies were valid", accepted)
	}
}

// printedPolicy is all of a policy, functions by their addresses.
func printedPolicy(p Policy) string { return fmt.Sprintf("%#v", p) }

// scribbleOver changes everything that a policy's owner can still reach.
func scribbleOver(p *Policy) {
	for i := range p.Rings {
		p.Rings[i] = Ring{Name: "x", Match: func(Unit) bool { panic("x") }}
	}
	for i := range p.Stages {
		for j := range p.Stages[i].Gates {
			p.Stages[i].Gates[j] = Gate{}
		}
		p.Stages[i] = Stage{Percent: 100}
	}
	for i := range p.Gates {
		p.Gates[i] = Gate{}
	}
	for i := range p.Rollback {
		p.Rollback[i] = RollbackStep{}
	}
	for i := range p.Metrics {
		p.Metrics[i] = nil
	}
}

// The caller's policy and the rollout's share nothing that changes: New and Validate leave the one as it was, and what
// becomes of the one afterwards, the other never sees.
func TestPolicyIsCopied(t *testing.T) {
	ctx := t.Context()
	p, o := validPolicy(), quietly()
	before := printedPolicy(p)
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	r, err := New("copied", p, o)
	if err != nil {
		t.Fatal(err)
	}
	if after := printedPolicy(p); after != before {
		t.Fatalf("%s\nbecame\n%s", before, after)
	}
	mine := printedPolicy(r.policy)
	scribbleOver(&p)
	*o = Options{Interval: -1}
	if after := printedPolicy(r.policy); after != mine {
		t.Fatalf("%s\nbecame\n%s", mine, after)
	}
	twin := Must("copied", validPolicy(), quietly())
	if diff := cmp.Diff(twin.plan.Policy, r.plan.Policy); diff != "" {
		t.Error(diff)
	}
	for _, r := range []*Rollout{r, twin} {
		if err := errors.Join(r.startForTest(ctx), r.Advance(ctx, "staff 100 %", "")); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		u := Unit{Key: fmt.Sprint(string(rune('a'+i%3)), i)}
		if i%5 == 0 {
			u.Groups = []string{"staff"}
		}
		if a, b := r.Decide(u), twin.Decide(u); a.bits != b.bits || a.Ring() != b.Ring() {
			t.Fatalf("%+v: %+v, not %+v", u, sayingOf(a), sayingOf(b))
		}
	}
}

// What a policy leaves out is as documented.
func TestPolicyDefaults(t *testing.T) {
	short := Policy{
		Stages: []Stage{{Percent: 0.5}, {Ring: "staff", Percent: 20, Bake: time.Hour, Deadline: 3 * time.Hour}, {Percent: 100}},
		Rings:  []Ring{{Name: "staff"}}, Bake: time.Minute, Gates: []Gate{Errors.AtMost(1)}, Rollback: []RollbackStep{{Name: "restore"}},
	}
	full := short
	full.Stages = []Stage{
		{Name: "everyone 0.5 %", Ring: "everyone", Percent: 0.5, Bake: time.Minute, Deadline: 24 * time.Hour},
		{Name: "staff 20 %", Ring: "staff", Percent: 20, Bake: time.Hour, Deadline: 3 * time.Hour},
		{Name: "everyone 100 %", Ring: "everyone", Percent: 100, Bake: time.Minute, Deadline: 24 * time.Hour},
	}
	full.Salt, full.Deadline, full.OnDeadline, full.ProveFrom, full.FalseRollback, full.FalsePromotion = "checkout", 24*time.Hour, Hold, 50, 0.01, 0.05
	full.Rollback = []RollbackStep{{Name: "restore", Timeout: time.Minute, Attempts: 5}}
	full.Sessions.Grace = time.Minute
	if got, want := fmt.Sprintf("%+v", short.withDefaults("checkout")), fmt.Sprintf("%+v", full); got != want {
		t.Errorf("%s\nnot\n%s", got, want)
	}
	short.Rollback[0].Do, full.Rollback[0].Do = undoNothing, undoNothing
	a, b := Must("checkout", short, nil), Must("checkout", full, nil)
	if a.plan.Policy != b.plan.Policy || a.plan.Assignment != b.plan.Assignment {
		t.Error("a policy and the same with its defaults are taken for two")
	}
	short.Salt, short.Deadline, short.OnDeadline, short.ProveFrom, short.FalseRollback, short.FalsePromotion = "other", 30*time.Hour, Rollback, 10, 0.02, 0.03
	kept := short.withDefaults("checkout")
	if got := []any{kept.Salt, kept.Deadline, kept.OnDeadline, kept.ProveFrom, kept.FalseRollback, kept.FalsePromotion, kept.Stages[0].Deadline}; fmt.Sprint(got) != "[other 30h0m0s rollback 10 % 0.02 0.03 30h0m0s]" {
		t.Errorf("what was set became %v", got)
	}
}

// What gates of scores and mixes are to the judge, and what is right about them.
func TestScoreAndMixGates(t *testing.T) {
	labels := []string{"search", "answer", "refuse", "other"}
	for _, c := range []struct {
		g     Gate
		other Gate // beside it
		want  judge.Spec
	}{
		{quality.Within(0.5), quality.NoWorse(), judge.Spec{Name: "quality.Within(0.5)", Kind: judge.ScoreWithin, Margin: .125, Action: judge.Rollback, Lo: -1, Hi: 3}},
		{quality.AtLeast(2), Gate{}, judge.Spec{Name: "quality.AtLeast(2)", Kind: judge.ScoreAtLeast, Margin: .25, Action: judge.Rollback, Lo: -1, Hi: 3}},
		{quality.NoWorse(), quality.AtLeast(2), judge.Spec{Name: "quality.NoWorse", Kind: judge.ScoreNoWorse, Action: judge.Rollback, Lo: -1, Hi: 3}},
		{quality.NoWorse(), quality.Within(1), judge.Spec{Name: "quality.NoWorse", Kind: judge.ScoreNoWorse, Action: judge.Report, Lo: -1, Hi: 3}},
		{route.Within(0.1).OnFail(Hold), Gate{}, judge.Spec{Name: "route.Within(0.1)", Kind: judge.MixWithin, Margin: .1, Action: judge.Hold, Labels: labels}},
		{route.NoChange(), Gate{}, judge.Spec{Name: "route.NoChange", Kind: judge.MixNoChange, Action: judge.Rollback, Labels: labels}},
		{route.NoChange(), route.Within(0.1), judge.Spec{Name: "route.NoChange", Kind: judge.MixNoChange, Action: judge.Report, Labels: labels}},
		{route.NoChange().OnFail(StepBack), route.Within(0.1), judge.Spec{Name: "route.NoChange", Kind: judge.MixNoChange, Action: judge.StepBack, Labels: labels}},
	} {
		gates := []Gate{c.g}
		if c.other.name != "" {
			gates = append(gates, c.other)
		}
		c.want.Metric, _, _ = strings.Cut(c.want.Name, ".")
		if diff := cmp.Diff(c.want, specs(gates)[0]); diff != "" {
			t.Errorf("%s: %s", c.g.Name(), diff)
		}
		p := validPolicy()
		p.Gates = append(p.Gates, gates...)
		if err := p.Validate(); err != nil {
			t.Errorf("%s: %v", c.g.Name(), err)
		}
	}
	p := validPolicy() // which has one gate of a quantile
	p.Gates = append(p.Gates, append(marksOf(5), Latency.NoWorse(), Latency.Quantile(.9).AtMost(time.Second))...)
	p.Without = []string{GuardSplit, GuardNoOutcome}
	if err := p.Validate(); err != nil {
		t.Error("eight marks, equal ones shared:", err)
	}
}

// What Validate counts as a timing's marks is what the judge makes of its gates.
func TestMarksAreTheJudges(t *testing.T) {
	gates := append(marksOf(3), Latency.NoWorse(), Latency.Quantile(.99).WithinFactor(1.2), Latency.Quantile(.99).WithinFactor(1.199), Latency.Quantile(.9).AtMost(time.Second))
	j, err := judge.New(specs(gates), judge.Risk{FalseRollback: .01, FalsePromotion: .05})
	if err != nil {
		t.Fatal(err)
	}
	all := map[mark]bool{}
	for _, g := range gates {
		for _, m := range g.marks() {
			all[m] = true
		}
	}
	if got := j.Marks("latency"); len(got) != len(all) {
		t.Errorf("%v, not %v", all, got)
	}
	for _, m := range j.Marks("latency") {
		if !all[mark{m.Quantile, m.Shift, m.Cell}] {
			t.Errorf("%v is not among %v", m, all)
		}
	}
}

// The guards that are on follow the policy's gates, and are part of what makes a policy another one.
func TestGuards(t *testing.T) {
	p := validPolicy()
	if g := p.guards(); len(g) != 2 || g[0].Name != GuardNoOutcome || g[0].Action != judge.Rollback || g[1].Name != GuardSplit || g[1].Action != judge.Hold {
		t.Errorf("%+v", g)
	}
	p.Without = []string{GuardNoOutcome}
	if g := p.guards(); len(g) != 1 || g[0].Name != GuardSplit {
		t.Errorf("%+v", g)
	}
	r := Must("guards", validPolicy(), nil)
	specs := r.plan.Judge.Specs()
	for _, s := range r.plan.Stages {
		if len(s.Armed) != len(specs) {
			t.Errorf("%s: %d of %d gates", s.Name, len(s.Armed), len(specs))
		}
		for i, armed := range s.Armed {
			if i >= len(r.gates) && !armed {
				t.Errorf("%s: %s is not armed", s.Name, specs[i].Name)
			}
		}
	}
	q := validPolicy()
	q.Independent = true
	if Must("guards", q, nil).plan.Policy == r.plan.Policy {
		t.Error("Independent makes no other policy")
	}
}

// TestTooMuchToStore: a policy whose evidence would not fit into the stored state is refused; one that fits can be stored
// with a ring and a gate's worth of everything.
func TestTooMuchToStore(t *testing.T) {
	policy := func(rings, gates int) Policy {
		p := Policy{Stages: Percentages(50, 100), Bake: time.Minute, Holdback: 5, Gates: []Gate{Errors.Within(1)}}
		for i := range rings - 1 {
			p.Rings = append(p.Rings, Ring{Name: fmt.Sprint("ring-", i)})
		}
		for i := range gates - 1 {
			p.Gates = append(p.Gates, NewRate(fmt.Sprint("rate-", i)).NoWorse())
		}
		return p
	}
	for _, c := range []struct {
		rings, gates int
		fits         bool
	}{{1, 40, true}, {3, 20, true}, {12, 6, true}, {12, 21, false}, {64, 2, true}, {64, 30, false}} {
		err := policy(c.rings, c.gates).Validate()
		if fits := err == nil; fits != c.fits || err != nil && !strings.Contains(err.Error(), "are stored") {
			t.Errorf("%d rings, %d gates: %v", c.rings, c.gates, err)
		}
	}
}
