package judge

import (
	"encoding/json"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/evidence"
)

var risk = Risk{FalseRollback: .01, FalsePromotion: .05, Independent: true}

// every is one gate of each kind, of the rate "errors" and the timing "latency".
func every(a Action) []Spec {
	return []Spec{
		{Name: "within", Metric: "errors", Kind: Within, Margin: .01, Action: a},
		{Name: "factor", Metric: "errors", Kind: WithinFactor, Factor: 1.5, Action: a},
		{Name: "atmost", Metric: "errors", Kind: AtMost, Margin: .05, Action: a},
		{Name: "never", Metric: "errors", Kind: Never, Action: a},
		{Name: "noworse", Metric: "errors", Kind: NoWorse, Action: a},
		{Name: "p95", Metric: "latency", Kind: QuantileWithinFactor, Quantile: .95, Factor: 1.2, Action: a},
		{Name: "p50", Metric: "latency", Kind: QuantileWithinFactor, Quantile: .5, Factor: 1, Action: a},
		{Name: "limit", Metric: "latency", Kind: QuantileAtMost, Quantile: .99, Limit: time.Second, Action: a},
		{Name: "slower", Metric: "latency", Kind: TimingNoWorse, Action: a},
		{Name: "score within", Metric: "quality", Kind: ScoreWithin, Margin: .1, Hi: 1, Action: a},
		{Name: "score at least", Metric: "quality", Kind: ScoreAtLeast, Margin: .5, Hi: 1, Action: a},
		{Name: "score no worse", Metric: "quality", Kind: ScoreNoWorse, Hi: 1, Action: a},
		{Name: "moments within", Metric: "far", Kind: ScoreWithin, Margin: .1, Hi: 1, Moments: true, Action: a},
		{Name: "moments at least", Metric: "far", Kind: ScoreAtLeast, Margin: .5, Hi: 1, Moments: true, Action: a},
		{Name: "moments no worse", Metric: "far", Kind: ScoreNoWorse, Hi: 1, Moments: true, Action: a},
		{Name: "mix within", Metric: "tools", Kind: MixWithin, Margin: .2, Labels: labels, Action: a},
		{Name: "mix no change", Metric: "tools", Kind: MixNoChange, Labels: labels, Action: a},
		{Name: "silence", Metric: "no outcome", Kind: Silence, Action: a},
		{Name: "split", Metric: "split", Kind: Split, Action: Hold},
		{Name: "check", Kind: Check, Action: a},
	}
}

var labels = []string{"read", "write", "other"}

// cells is a block of any metric.
func cells(metric string, candidate, control []uint64) Block {
	return Block{Metric: metric, Ring: "everyone", Candidate: candidate, Control: control, Share: .5}
}

// score is a block of the score "quality", n and m outcomes of one badness each.
func scored(n uint64, candidate int, m uint64, control int) Block {
	b := cells("quality", make([]uint64, ScoreCells), make([]uint64, ScoreCells))
	b.Candidate[candidate], b.Control[control] = n, m
	return b
}

// far is the same block as moments, a quarter of the range up and down.
func far(n, candidate, m, control float64) Block {
	moments := func(n, mean float64) Moments { return Moments{n, n * mean, n * (mean*mean + .01)} }
	return Block{Metric: "far", Ring: "everyone", Moments: [2]Moments{moments(n, candidate), moments(m, control)}}
}

func must(t testing.TB, specs ...Spec) *Judge {
	t.Helper()
	j, err := New(specs, risk)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// rate is a block of the rate "errors": x of n in the candidate, y of m in the control.
func rate(n, x, m, y uint64) Block {
	b := Block{Metric: "errors", Ring: "everyone"}
	if n > 0 {
		b.Candidate = []uint64{n - x, x}
	}
	if m > 0 {
		b.Control = []uint64{m - y, y}
	}
	return b
}

// latency is a block of the timing "latency", n and m outcomes of one duration each.
func latency(n uint64, candidate time.Duration, m uint64, control time.Duration) Block {
	b := Block{Metric: "latency", Ring: "everyone", Candidate: make([]uint64, evidence.Cells), Control: make([]uint64, evidence.Cells)}
	b.Candidate[evidence.Index(candidate)] = n
	b.Control[evidence.Index(control)] = m
	return b
}

// feed consumes a block and looks.
func feed(j *Judge, st *State, b Block, active func(int) bool, proof bool) {
	j.Consume(st, b, active, proof)
	j.Look(st)
}

func repeat(j *Judge, st *State, n int, b Block, proof bool) {
	for range n {
		feed(j, st, b, nil, proof)
	}
}

func result(t testing.TB, j *Judge, st *State, name string) Result {
	t.Helper()
	for _, r := range j.Assess(st, nil) {
		if r.Spec.Name == name {
			return r
		}
	}
	t.Fatalf("no result for %q", name)
	return Result{}
}

func clone(t interface{ Fatal(...any) }, st *State) *State {
	text, err := json.Marshal(st)
	if err != nil {
		t.Fatal(err) // also infinite and not-a-number
	}
	c := new(State)
	if err := json.Unmarshal(text, c); err != nil {
		t.Fatal(err)
	}
	return c
}

func text(t interface{ Fatal(...any) }, st *State) string {
	b, err := json.Marshal(st)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// anyBlock draws a block of either metric, also empty, wrong and huge ones.
func anyBlock() *rapid.Generator[Block] {
	return rapid.Custom(func(t *rapid.T) Block {
		b := Block{Metric: "errors", Ring: rapid.SampledFrom([]string{"staff", "everyone"}).Draw(t, "ring")}
		b.Ring = rapid.SampledFrom([]string{"staff", "beta", "everyone"}).Draw(t, "ring")
		count := rapid.OneOf(rapid.Uint64Range(0, 100), rapid.Uint64Range(0, 100), rapid.Uint64())
		cohort := func(name string) []uint64 {
			return rapid.OneOf(rapid.SliceOfN(count, 2, 2), rapid.SliceOfN(count, 2, 2), rapid.SliceOfN(count, 0, 3)).Draw(t, name)
		}
		if rapid.Bool().Draw(t, "timing") {
			b.Metric = "latency"
			cohort = func(name string) []uint64 {
				cells := make([]uint64, evidence.Cells)
				for _, i := range rapid.SliceOfN(rapid.OneOf(rapid.IntRange(400, 500), rapid.IntRange(0, evidence.Cells-1)), 0, 8).Draw(t, name) {
					cells[i] += count.Draw(t, "count")
				}
				return cells
			}
		}
		b.Candidate, b.Control = cohort("candidate"), cohort("control")
		if rapid.Bool().Draw(t, "another metric") {
			b.Metric = rapid.SampledFrom([]string{"quality", "tools", "no outcome", "split", "far"}).Draw(t, "metric")
			width := map[string]int{"quality": ScoreCells, "tools": len(labels), "no outcome": 2, "split": 1}[b.Metric]
			b.Share = rapid.SampledFrom([]float64{.05, .5, 0, 1}).Draw(t, "share")
			b.Candidate = rapid.SliceOfN(count, width, width).Draw(t, "candidate")
			b.Control = rapid.SliceOfN(count, width, width).Draw(t, "control")
			if b.Metric == "far" {
				b.Moments = [2]Moments{{10, 5, 4}, {float64(count.Draw(t, "n")), 3, 2}}
			}
		}
		if width := max(len(b.Candidate), len(b.Control)); b.Metric != "far" && rapid.Bool().Draw(t, "by group") {
			if b.Metric == "latency" {
				width = MarkCells(4)
			}
			b.CandidateBy = rapid.SliceOfN(count, folds*width, folds*width).Draw(t, "candidate by")
			b.ControlBy = rapid.SliceOfN(count, folds*width, folds*width).Draw(t, "control by")
		}
		return b
	})
}

// The same blocks give the same state, bit by bit, however often the state was
// stored and loaded meanwhile; and it never holds a number JSON does not have.
func TestReplay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		specs := every(rapid.SampledFrom([]Action{Rollback, Hold, Report}).Draw(t, "action"))
		risk := risk
		risk.Independent = rapid.Bool().Draw(t, "independent")
		j, err := New(specs, risk, rapid.SampledFrom([][]string{nil, {"everyone"}, {"staff", "beta", "everyone"}}).Draw(t, "rings")...)
		if err != nil {
			t.Fatal(err)
		}
		a, b := new(State), new(State)
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			var do func(st *State)
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0:
				do = (*State).Anew
			case 1:
				do = (*State).ResetProof
			case 2:
				ring := rapid.SampledFrom([]string{"staff", "beta"}).Draw(t, "leaves")
				do = func(st *State) { j.Leave(st, ring) }
			default:
				block := anyBlock().Draw(t, "block")
				times := rapid.IntRange(1, 8).Draw(t, "times")
				off := rapid.IntRange(-1, len(specs)-1).Draw(t, "inactive")
				proof := rapid.Bool().Draw(t, "proof")
				do = func(st *State) {
					for range times {
						feed(j, st, block, func(g int) bool { return g != off }, proof)
					}
				}
			}
			do(a)
			do(b)
			if rapid.Bool().Draw(t, "restart") {
				b = clone(t, b)
			}
			if x, y := text(t, a), text(t, b); x != y {
				t.Fatalf("after a restart\n%s\nnot\n%s", y, x)
			}
			ra, rb := j.Assess(a, nil), j.Assess(b, nil)
			if !reflect.DeepEqual(ra, rb) {
				t.Fatalf("after a restart\n%+v\nnot\n%+v", rb, ra)
			}
			if _, err := json.Marshal(ra); err != nil {
				t.Fatal(err)
			}
			for _, r := range ra {
				if r.Action == Default || r.Verdict == Healthy && !r.Spec.CanProve() || r.Proved && r.Verdict != Healthy {
					t.Fatalf("%+v", r)
				}
			}
		}
	})
}

// Where a cohort a gate compares has no outcomes, nothing is ever proven, and
// nothing broken.
func TestNoDataDecidesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		j, err := New(every(Rollback), risk)
		if err != nil {
			t.Fatal(err)
		}
		var st State
		empty := rapid.SampledFrom([]string{"candidate", "control", "both"}).Draw(t, "empty")
		for range rapid.IntRange(1, 8).Draw(t, "blocks") {
			b := anyBlock().Draw(t, "block")
			if empty != "control" {
				clear(b.Candidate)
				clear(b.CandidateBy)
				b.Moments[0] = Moments{}
			}
			if empty != "candidate" {
				clear(b.Control)
				clear(b.ControlBy)
				b.Moments[1] = Moments{}
			}
			repeat(j, &st, rapid.IntRange(1, 50).Draw(t, "times"), b, true)
		}
		for _, r := range j.Assess(&st, nil) {
			if (r.Spec.Absolute() || r.Spec.Kind == Split) && empty != "both" {
				continue // it needs no control; units of one cohort alone are a split, too
			}
			if r.Verdict != Inconclusive || r.LogE != 0 || r.ProofE > 1 || r.Missing == "" {
				t.Fatalf("without %s: %+v", empty, r)
			}
		}
	})
}

// How bad a candidate breaks each gate, and how good a one proves it.
func TestBothSides(t *testing.T) {
	const ms = time.Millisecond
	good, bad := rate(100, 0, 100, 0), rate(100, 30, 100, 1)
	fast, slow := latency(100, 10*ms, 100, 10*ms), latency(100, 3000*ms, 100, 10*ms)
	spread := latency(100, 10*ms, 95, 10*ms) // so that the control has something beyond its p95
	spread.Control[evidence.Index(12*ms)] = 5
	half := latency(100, 5*ms, 50, 10*ms)
	half.Control[evidence.Index(30*ms)] = 50
	for _, c := range []struct {
		gate      string
		good, bad Block
	}{
		{"within", good, bad},
		{"factor", rate(100, 1, 100, 5), bad},
		{"atmost", good, bad},
		{"never", good, rate(100, 1, 100, 0)},
		{"noworse", good, bad},
		{"p95", spread, slow},
		{"p50", half, slow},
		{"limit", fast, slow},
		{"slower", fast, slow},
		{"score within", scored(100, 8, 100, 8), scored(100, 24, 100, 8)},
		{"score at least", scored(100, 8, 100, 8), scored(100, 24, 100, 8)},
		{"score no worse", scored(100, 8, 100, 8), scored(100, 24, 100, 8)},
		{"moments within", far(100, .3, 100, .3), far(100, .7, 100, .3)},
		{"moments at least", far(100, .3, 100, .3), far(100, .7, 100, .3)},
		{"moments no worse", far(100, .3, 100, .3), far(100, .7, 100, .3)},
		{"mix within", cells("tools", []uint64{50, 50, 0}, []uint64{50, 50, 0}), cells("tools", []uint64{10, 40, 50}, []uint64{50, 50, 0})},
		{"mix no change", cells("tools", []uint64{50, 50, 0}, []uint64{50, 50, 0}), cells("tools", []uint64{50, 40, 10}, []uint64{50, 50, 0})},
		{"silence", cells("no outcome", []uint64{100, 0}, []uint64{100, 0}), cells("no outcome", []uint64{50, 50}, []uint64{100, 0})},
		{"split", cells("split", []uint64{50}, []uint64{50}), cells("split", []uint64{30}, []uint64{50})},
	} {
		for _, action := range []Action{Rollback, RollbackRing, StepBack, Hold, Report} {
			j := must(t, every(action)...)
			var st State
			repeat(j, &st, 300, c.good, true)
			r := result(t, j, &st, c.gate)
			want := Inconclusive
			if r.Spec.CanProve() {
				want = Healthy
			}
			if c.gate == "split" {
				action = Hold
			}
			if r.Verdict != want || r.Action != action {
				t.Errorf("%s with %d, good: %+v", c.gate, action, r)
			}
			repeat(j, &st, 300, c.bad, true)
			r = result(t, j, &st, c.gate)
			if r.Verdict != Unhealthy || r.Proved || !r.AtOnce || r.Cause == "" || r.Action != action {
				t.Errorf("%s with %d, bad: %+v", c.gate, action, r)
			}
			repeat(j, &st, 1000, c.good, true)
			if r = result(t, j, &st, c.gate); r.Verdict != Unhealthy {
				t.Errorf("%s with %d, good again: no longer broken", c.gate, action)
			}
		}
	}
}

func TestBrokenUntilAnew(t *testing.T) {
	j := must(t, every(Rollback)...)
	var st State
	repeat(j, &st, 10, rate(100, 0, 100, 0), true)
	proof := result(t, j, &st, "within").ProofE
	feed(j, &st, rate(100, 100, 100, 0), nil, false)
	if r := result(t, j, &st, "never"); r.Verdict != Unhealthy || !strings.Contains(r.Cause, "100 of 1100") {
		t.Errorf("%+v", r)
	}
	need := result(t, j, &st, "within").NeedE
	for start := 1; start <= 3; start++ {
		st.Anew()
		for _, name := range []string{"never", "within", "noworse"} {
			if r := result(t, j, &st, name); r.Verdict == Unhealthy || r.LogE != 0 || r.Candidate.N != 0 {
				t.Errorf("after start %d: %+v", start, r)
			}
		}
		r := result(t, j, &st, "within")
		if want := need * math.Exp2(float64(start+1)); math.Abs(r.NeedE/want-1) > 1e-9 {
			t.Errorf("start %d: needs %g, want %g", start, r.NeedE, want)
		}
		if r.ProofE != proof {
			t.Errorf("start %d: the proof went from %g to %g", start, proof, r.ProofE)
		}
	}
	st.ResetProof()
	if r := result(t, j, &st, "within"); r.ProofE != 1 {
		t.Errorf("after ResetProof: %g", r.ProofE)
	}
	if c0, ok := st.Memory["errors"]["everyone"].mean(1); !ok || c0 != 0 {
		t.Errorf("the control's past is %g, %t", c0, ok)
	}
}

// Gates that act share one bound, gates that hold or report have their own.
func TestGroups(t *testing.T) {
	spec := func(name, metric string, a Action) Spec {
		return Spec{Name: name, Metric: metric, Kind: NoWorse, Action: a}
	}
	j := must(t, spec("a", "errors", Rollback), spec("b", "other", StepBack), spec("c", "other", RollbackRing),
		spec("hold", "errors", Hold), spec("report", "errors", Report), spec("report2", "other", Report),
		Spec{Name: "never", Metric: "other", Kind: Never, Action: Rollback}, Spec{Name: "check", Kind: Check, Action: Rollback})
	var st State
	for name, want := range map[string]float64{"a": 300, "b": 300, "c": 300, "hold": 100, "report": 200, "report2": 200, "never": 0, "check": 0} {
		if r := result(t, j, &st, name); math.Abs(r.NeedE-want) > 1e-9 {
			t.Errorf("%s needs %g, want %g", name, r.NeedE, want)
		}
	}
	steps := map[string]int{} // at which block each broke
	for i := range 200 {
		feed(j, &st, rate(20, 1, 20, 0), nil, false)
		for _, r := range j.Assess(&st, nil) {
			if _, seen := steps[r.Spec.Name]; !seen && r.Verdict == Unhealthy {
				steps[r.Spec.Name] = i
				if r.Spec.Name != "a" && r.E < r.NeedE { // a has a share of b's and c's 1
					t.Errorf("%s broke at %g of %g", r.Spec.Name, r.E, r.NeedE)
				}
			}
		}
	}
	if len(steps) != 3 || !(steps["hold"] < steps["report"] && steps["report"] <= steps["a"]) {
		t.Errorf("broke after blocks %v", steps)
	}
}

// Two gates that each are short of the bound break together, and the one with
// more evidence is named.
func TestGroupAddsUp(t *testing.T) {
	j := must(t, Spec{Name: "a", Metric: "errors", Kind: NoWorse, Action: Rollback}, Spec{Name: "b", Metric: "other", Kind: NoWorse, Action: Rollback})
	var st State
	other := rate(20, 1, 20, 0)
	other.Metric = "other"
	feed(j, &st, other, nil, false) // b is one block ahead
	for {
		feed(j, &st, other, nil, false)
		feed(j, &st, rate(20, 1, 20, 0), nil, false)
		a, b := result(t, j, &st, "a"), result(t, j, &st, "b")
		if b.Verdict == Unhealthy {
			if a.Verdict != Inconclusive || b.E >= b.NeedE || (a.E+b.E)/2 < 100 {
				t.Errorf("a %+v\nb %+v", a, b)
			}
			return
		}
		if a.Verdict == Unhealthy {
			t.Fatal("the gate with less evidence broke")
		}
	}
}

func TestInactiveGateIsLeftAlone(t *testing.T) {
	j := must(t, every(Rollback)...)
	var st State
	for range 20 {
		feed(j, &st, rate(100, 50, 100, 0), func(int) bool { return false }, true)
		feed(j, &st, latency(100, time.Second, 100, time.Millisecond), func(int) bool { return false }, true)
	}
	if len(st.Gates) != 0 {
		t.Errorf("inactive gates: %v", st.Gates)
	}
	if m := st.Memory["errors"]["everyone"]; m.Past.N != 2000 {
		t.Errorf("the control's past is %+v", m)
	}
	if m := st.Memory["latency"]["everyone"]; m.Seen != 2000 {
		t.Errorf("seen %d control outcomes", m.Seen)
	}
}

// An incident that hits both cohorts holds; one of the candidate alone rolls back.
func TestAbsoluteLimitOfBoth(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		gate         string
		before, then Block
		want         Action
	}{
		{"atmost", rate(100, 0, 1000, 1), rate(100, 30, 1000, 300), Hold},
		{"atmost", rate(100, 0, 1000, 1), rate(100, 30, 1000, 1), Rollback},
		{"atmost", rate(100, 0, 1000, 30), rate(100, 30, 1000, 30), Rollback},
		{"atmost", rate(100, 0, 0, 0), rate(100, 30, 0, 0), Rollback},
		{"limit", latency(100, ms, 1000, ms), latency(100, 3000*ms, 1000, 3000*ms), Hold},
		{"limit", latency(100, ms, 1000, ms), latency(100, 3000*ms, 1000, ms), Rollback},
	} {
		for _, a := range []Action{Rollback, Report} {
			var specs []Spec
			for _, s := range every(a) {
				if s.Name == c.gate {
					specs = append(specs, s)
				}
			}
			j := must(t, specs...)
			var st State
			repeat(j, &st, 200, c.before, false)
			repeat(j, &st, 50, c.then, false)
			want := c.want
			if a == Report {
				want = Report
			}
			r := result(t, j, &st, c.gate)
			if r.Verdict != Unhealthy || r.Action != want || strings.Contains(r.Cause, "control violates") != (want == Hold) {
				t.Errorf("%s: %+v, want action %d", c.gate, r, want)
			}
		}
	}
}

// What a bet is built on is older than the block it is made on.
func TestFirstBlockOnlyTellsWhereToBet(t *testing.T) {
	j := must(t, every(Rollback)...)
	var st State
	feed(j, &st, rate(100, 50, 100, 0), nil, true)
	if g := st.Gates["within"]; len(g.Pool) != 0 || len(g.Proof) != 0 {
		t.Errorf("a difference was bet on without a past: %+v", g)
	}
	if g := st.Gates["noworse"]; g.Pool[0].Blocks != 1 || g.Pool[1].Blocks != 0 {
		t.Errorf("%+v", g)
	}
	other := rate(100, 50, 100, 0)
	other.Ring = "staff"
	feed(j, &st, other, nil, true) // another ring has its own past
	if g := st.Gates["within"]; len(g.Pool) != 0 {
		t.Errorf("%+v", g)
	}
	feed(j, &st, rate(100, 50, 100, 0), nil, false)
	if g := st.Gates["within"]; g.Pool[0].Blocks != 1 || len(g.Proof) != 0 {
		t.Errorf("%+v", g)
	}

	slow := latency(50, time.Second, 90, time.Millisecond)
	for i, want := range []string{"90 of 200 control outcomes before the first latency threshold",
		"180 of 200 control outcomes before the first latency threshold", "no candidate outcomes", ""} {
		feed(j, &st, slow, nil, true)
		r := result(t, j, &st, "p95")
		if r.Missing != want || (len(st.Gates["p95"].Pool) > 0) != (i == 3) {
			t.Errorf("after block %d missing is %q, want %q: %+v", i, r.Missing, want, st.Gates["p95"])
		}
	}
}

func TestMissing(t *testing.T) {
	j := must(t, every(Rollback)...)
	missing := func(want map[string]string, blocks ...Block) {
		t.Helper()
		var st State
		for _, b := range blocks {
			repeat(j, &st, 3, b, false)
		}
		for name, w := range want {
			if r := result(t, j, &st, name); r.Missing != w {
				t.Errorf("%s misses %q, want %q", name, r.Missing, w)
			}
		}
	}
	const candidate, control = "no candidate outcomes", "no control outcomes"
	missing(map[string]string{"within": candidate, "atmost": candidate, "never": candidate, "p95": control, "limit": candidate, "check": "no answer"})
	missing(map[string]string{"within": control, "atmost": "", "never": "", "noworse": control}, rate(10, 0, 0, 0))
	missing(map[string]string{"within": candidate, "atmost": candidate, "never": candidate, "noworse": candidate}, rate(0, 0, 10, 0))
	missing(map[string]string{"within": "", "p95": control, "limit": ""}, rate(10, 0, 10, 0), latency(10, time.Second, 0, 0))
}

func TestCheck(t *testing.T) {
	check := Spec{Name: "check", Kind: Check, Action: Hold}
	j := must(t, check)
	for _, c := range []struct {
		in     CheckResult
		proved bool
	}{{CheckResult{}, false}, {CheckResult{Verdict: Healthy}, true}, {CheckResult{Unhealthy, "no quota", true}, false}, {CheckResult{Inconclusive, "timeout", false}, false}} {
		r := j.Assess(&State{}, map[string]CheckResult{"check": c.in})[0]
		if r.Verdict != c.in.Verdict || r.Cause != c.in.Cause || r.AtOnce != c.in.AtOnce || r.Proved != c.proved || r.Action != Hold || r.Missing != "" {
			t.Errorf("%+v gives %+v", c.in, r)
		}
	}
}

// A quantile in the last cells leaves no room for the factor: nothing is beyond,
// and that is no proof.
func TestQuantileBeyondTheHistogram(t *testing.T) {
	j := must(t, Spec{Name: "q", Metric: "latency", Kind: QuantileWithinFactor, Quantile: .5, Factor: 2, Action: Rollback})
	var st State
	b := latency(100, time.Second, 50, 60*time.Minute)
	b.Control[evidence.Cells-1] = 50
	repeat(j, &st, 200, b, true)
	if r := result(t, j, &st, "q"); r.Verdict != Inconclusive || r.ProofE != 1 {
		t.Errorf("%+v", r)
	}
}

func TestEstimates(t *testing.T) {
	j := must(t, every(Rollback)...)
	var st State
	repeat(j, &st, 10, rate(50, 1, 100, 4), false)
	r := result(t, j, &st, "within")
	if !reflect.DeepEqual(r.Candidate, Estimate{N: 500, Events: 10, Rate: .02}) || !reflect.DeepEqual(r.Control, Estimate{N: 1000, Events: 40, Rate: .04}) {
		t.Errorf("%+v %+v", r.Candidate, r.Control)
	}
	repeat(j, &st, 10, latency(50, 30*time.Millisecond, 100, 10*time.Millisecond), false)
	r = result(t, j, &st, "p95")
	near := func(got, want time.Duration) bool { return math.Abs(float64(got)/float64(want)-1) < .011 }
	if !near(r.Candidate.Quantile, 30*time.Millisecond) || !near(r.Control.Quantile, 10*time.Millisecond) || r.Candidate.Rate != 1 || r.Control.Rate != 0 {
		t.Errorf("%+v %+v", r.Candidate, r.Control)
	}
}

// A histogram forgets what is old, and empty ends.
func TestHistogram(t *testing.T) {
	var h Histogram
	if _, _, ok := h.quantile(.5); ok {
		t.Error("an empty histogram has a quantile")
	}
	add := func(at ...int) {
		cells := make([]uint64, evidence.Cells)
		for _, i := range at {
			cells[i]++
		}
		h.add(cells)
	}
	add(500)
	add(400, 600)
	if h.From != 400 || len(h.Cells) != 201 || h.Cells[100] != .98 {
		t.Errorf("%d cells from %d, %v", len(h.Cells), h.From, h.Cells[100])
	}
	if cell, above, ok := h.quantile(.5); cell != 500 || math.Abs(above-1/2.98) > 1e-6 || !ok {
		t.Errorf("median %d, %g above, %t", cell, above, ok)
	}
	n, x := 0., 0.
	for i, w := range h.Cells {
		if n += float64(w); h.From+i >= 500 {
			x += float64(w)
		}
	}
	if math.Abs(n-2.98) > 1e-6 || math.Abs(x-1.98) > 1e-6 {
		t.Errorf("%g of %g from 500 on", x, n)
	}
	for range 250 {
		add(510)
	}
	if h.From != 510 || len(h.Cells) != 1 || math.Abs(float64(h.Cells[0])-50) > .5 {
		t.Errorf("%+v", h)
	}
	add()
	if len(h.Cells) != 1 {
		t.Errorf("an empty block changed %+v", h)
	}
	damaged := Histogram{From: -5, Cells: make([]float32, 9)}
	damaged.add(make([]uint64, evidence.Cells))
	cells := make([]uint64, evidence.Cells)
	cells[7] = 1
	damaged.add(cells)
	if damaged.From != 7 || len(damaged.Cells) != 1 {
		t.Errorf("%+v", damaged)
	}
}

// Another question under the same name starts afresh; gates and metrics that
// are gone are forgotten.
func TestChangedGates(t *testing.T) {
	a := must(t, Spec{Name: "a", Metric: "errors", Kind: Within, Margin: .01, Action: Rollback}, Spec{Name: "b", Metric: "errors", Kind: NoWorse, Action: Rollback})
	var st State
	repeat(a, &st, 10, rate(100, 10, 100, 0), true)
	if r := result(t, a, &st, "a"); r.LogE < 1 {
		t.Fatalf("%+v", r)
	}
	b := must(t, Spec{Name: "a", Metric: "errors", Kind: Within, Margin: .02, Action: Rollback}, Spec{Name: "c", Metric: "latency", Kind: TimingNoWorse, Action: Rollback})
	if r := result(t, b, &st, "a"); r.LogE != 0 || r.Verdict != Inconclusive {
		t.Errorf("evidence against one point counts against two: %+v", r)
	}
	b.Prune(&st)
	if len(st.Gates) != 1 || len(st.Memory) != 1 {
		t.Errorf("%d gates, %d metrics", len(st.Gates), len(st.Memory))
	}
	c := must(t, Spec{Name: "c", Metric: "latency", Kind: TimingNoWorse, Action: Rollback})
	c.Prune(&st)
	if len(st.Gates) != 0 || len(st.Memory) != 0 {
		t.Errorf("%d gates, %d metrics", len(st.Gates), len(st.Memory))
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(every(Rollback), risk); err != nil {
		t.Error(err)
	}
	if _, err := New(nil, risk); err != nil {
		t.Error(err)
	}
	for _, r := range []Risk{{}, {0, .5, false}, {.5, 1, true}, {math.NaN(), .5, false}, {.5, math.Inf(1), false}} {
		if _, err := New(nil, r); err == nil {
			t.Errorf("takes %+v", r)
		}
	}
	for _, s := range []Spec{
		{Kind: NoWorse},
		{Kind: NoWorse, Action: Report + 1},
		{Kind: Split + 1, Action: Hold},
		{Kind: ScoreWithin, Action: Hold},
		{Kind: ScoreAtLeast, Margin: 1, Action: Hold},
		{Kind: MixWithin, Margin: .1, Labels: []string{"a"}, Action: Hold},
		{Kind: MixNoChange, Labels: make([]string, 11), Action: Hold},
		{Kind: Within, Action: Hold},
		{Kind: Within, Margin: 1, Action: Hold},
		{Kind: Within, Margin: math.NaN(), Action: Hold},
		{Kind: WithinFactor, Factor: 1, Action: Hold},
		{Kind: WithinFactor, Factor: math.Inf(1), Action: Hold},
		{Kind: AtMost, Margin: -.1, Action: Hold},
		{Kind: AtMost, Action: Hold},
		{Kind: QuantileWithinFactor, Quantile: .5, Factor: .9, Action: Hold},
		{Kind: QuantileWithinFactor, Factor: 2, Action: Hold},
		{Kind: QuantileAtMost, Quantile: 1, Limit: time.Second, Action: Hold},
		{Kind: QuantileAtMost, Quantile: .5, Action: Hold},
		{Kind: QuantileAtMost, Quantile: .5, Limit: 2 * time.Hour, Action: Hold},
	} {
		s.Name = "the-gate"
		if _, err := New([]Spec{s}, risk); err == nil || !strings.Contains(err.Error(), "the-gate") {
			t.Errorf("%+v: %v", s, err)
		}
	}
	twice := Spec{Name: "twice", Kind: NoWorse, Action: Hold}
	if _, err := New([]Spec{twice, twice}, risk); err == nil {
		t.Error("takes a name twice")
	}
}

func TestConsumeAllocatesNothing(t *testing.T) {
	j := must(t, every(Rollback)...)
	var st State
	a, b := rate(50, 0, 950, 9), latency(50, 10*time.Millisecond, 950, 10*time.Millisecond)
	consume := func() {
		j.Consume(&st, a, nil, true)
		j.Consume(&st, b, nil, true)
	}
	consume()
	consume()
	if n := testing.AllocsPerRun(100, consume); n != 0 {
		t.Errorf("%g allocations", n)
	}
}

func BenchmarkConsumeRate(b *testing.B) {
	j := must(b, Spec{Name: "g", Metric: "errors", Kind: NoWorse, Action: Rollback})
	var st State
	block := rate(50, 1, 950, 10)
	for b.Loop() {
		j.Consume(&st, block, nil, false)
	}
}

func BenchmarkConsumeTiming(b *testing.B) {
	j := must(b, Spec{Name: "g", Metric: "latency", Kind: QuantileWithinFactor, Quantile: .99, Factor: 1.2, Action: Rollback})
	var st State
	block := latency(50, 10*time.Millisecond, 950, 10*time.Millisecond)
	for b.Loop() {
		j.Consume(&st, block, nil, true)
	}
}

func BenchmarkAssess(b *testing.B) {
	j := must(b, every(Rollback)...)
	var st State
	repeat(j, &st, 9, rate(50, 1, 950, 10), true)
	repeat(j, &st, 9, latency(50, 10*time.Millisecond, 950, 10*time.Millisecond), true)
	for b.Loop() {
		j.Assess(&st, nil)
	}
}
