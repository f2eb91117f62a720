package machine

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/judge"
)

const tick = 5 * time.Second

var epoch0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// drawPlan is a random plan of two or three rings: valid, and different enough that every rule is reached.
func drawPlan(t *rapid.T, version string) *Plan {
	action := rapid.SampledFrom([]judge.Action{judge.Rollback, judge.Rollback, judge.RollbackRing, judge.StepBack, judge.Hold, judge.Report})
	specs := []judge.Spec{
		{Name: "within", Metric: "errors", Kind: judge.Within, Margin: .01, Action: action.Draw(t, "within")},
		{Name: "worse", Metric: "errors", Kind: judge.NoWorse, Action: action.Draw(t, "worse")},
		{Name: "most", Metric: "errors", Kind: judge.AtMost, Margin: .2, Action: judge.Rollback},
		{Name: "check", Kind: judge.Check, Action: action.Draw(t, "check")},
	}
	j, err := judge.New(specs, judge.Risk{FalseRollback: .01, FalsePromotion: .05})
	if err != nil {
		t.Fatal(err)
	}
	p := &Plan{
		Version: version, Judge: j, Rings: []string{"staff", "beta", "everyone"}, Tick: tick, Keep: 1000,
		OnDeadline: rapid.SampledFrom([]judge.Action{judge.Hold, judge.Rollback}).Draw(t, "deadline"),
		Policy:     "p", Assignment: "a",
	}
	if rapid.Bool().Draw(t, "steps") {
		p.Steps = []string{"one", "two"}
	}
	p.Undoes = rapid.Bool().Draw(t, "undoes")
	add := func(ring string, percent float64) {
		st := Stage{
			StageRef: StageRef{Name: ring + string(rune('0'+len(p.Stages))), Ring: ring, Percent: percent},
			Bake:     rapid.SampledFrom([]time.Duration{0, time.Minute, 10 * time.Minute}).Draw(t, "bake"),
			Over:     rapid.SampledFrom([]time.Duration{0, 0, 4 * time.Minute}).Draw(t, "over"),
			Deadline: 24 * time.Hour,
			Proof:    percent >= 50 && rapid.Bool().Draw(t, "proof"),
			Control:  percent < 100,
			Approval: rapid.IntRange(0, 3).Draw(t, "approval") == 0,
			Armed:    []bool{true, rapid.Bool().Draw(t, "armed"), true, rapid.Bool().Draw(t, "checked")},
		}
		st.Irreversible = rapid.IntRange(0, 5).Draw(t, "irreversible") == 0
		p.Stages = append(p.Stages, st)
	}
	if rapid.Bool().Draw(t, "staff") {
		add("staff", rapid.SampledFrom([]float64{10, 50, 100}).Draw(t, "staff share"))
	}
	add("everyone", 1)
	if rapid.Bool().Draw(t, "beta") {
		add("beta", 50)
	}
	add("everyone", rapid.SampledFrom([]float64{25, 50}).Draw(t, "middle"))
	add("everyone", 100)
	p.Stages[len(p.Stages)-1].Last = true
	return p
}

// drawInput is what a tick may see: nothing, good or bad outcomes, a healthy, unhealthy or silent check, any time.
func drawInput(t *rapid.T, s *State, p *Plan) Input {
	in := Input{
		Now:        epoch0,
		Elapsed:    rapid.SampledFrom([]time.Duration{0, tick, tick, time.Minute, time.Hour, -time.Hour, 30 * time.Hour}).Draw(t, "elapsed"),
		MayAdvance: rapid.IntRange(0, 4).Draw(t, "may") > 0,
	}
	for _, ring := range p.Rings {
		if s.Shares[ring] == 0 {
			continue
		}
		switch rapid.IntRange(0, 5).Draw(t, "traffic "+ring) {
		case 0, 1: // silence
		case 2:
			in.Blocks = append(in.Blocks, block(s, ring, 200, 20, 200, 2))
			in.Outcomes = append(in.Outcomes, ring)
		default:
			in.Blocks = append(in.Blocks, block(s, ring, 2000, 20, 2000, 20))
			in.Outcomes = append(in.Outcomes, ring)
		}
	}
	switch rapid.IntRange(0, 9).Draw(t, "check") {
	case 0:
		in.Checks = map[string]judge.CheckResult{"check": {Verdict: judge.Unhealthy, Cause: "no", AtOnce: true}}
	case 1: // no answer
	case 2:
		in.Checks = map[string]judge.CheckResult{"check": {Cause: "an error"}}
	default:
		in.Checks = map[string]judge.CheckResult{"check": {Verdict: judge.Healthy}}
	}
	return in
}

func block(s *State, ring string, n, x, m, y uint64) Block {
	return Block{Epoch: s.Epoch, Block: judge.Block{Metric: "errors", Ring: ring, Candidate: []uint64{n - x, x}, Control: []uint64{m - y, y}}}
}

// world is the machine under test with what must be remembered to judge it.
type world struct {
	s       *State
	p       *Plan
	before  *State
	raising bool // the last action may raise a share: why
	version int
	plans   int
	rolled  map[string]bool // versions rolled back since their last restart
}

func TestMachine(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{p: drawPlan(t, "v0"), rolled: map[string]bool{}}
		w.s = New("x", w.p, "n")
		t.Repeat(map[string]func(*rapid.T){
			"tick":       w.tick,
			"tick again": w.tick, // twice as often as the rest
			"verb":       w.verb,
			"attempt":    w.attempt,
			"restart from bytes": func(t *rapid.T) {
				w.action(false)
				w.s = reread(t, w.s)
			},
			"new version": func(t *rapid.T) {
				w.action(false)
				w.version++
				w.adopt(t, w.plan(t, fmt.Sprint("v", w.version)))
			},
			"edited policy": func(t *rapid.T) {
				w.action(false)
				p := w.plan(t, w.p.Version)
				if rapid.IntRange(0, 4).Draw(t, "assignment") == 0 {
					p.Assignment = p.Policy
				}
				w.adopt(t, p)
			},
			"": w.check,
		})
		w.ends(t)
	})
}

// plan is a random plan with a digest of its own.
func (w *world) plan(t *rapid.T, version string) *Plan {
	w.plans++
	p := drawPlan(t, version)
	p.Policy = fmt.Sprint("p", w.plans)
	return p
}

func (w *world) action(raising bool) { w.before, w.raising = w.s.Clone(), raising }

func (w *world) adopt(t *rapid.T, p *Plan) {
	standing, _ := Adopt(w.s, p, "n", epoch0)
	if standing == Current {
		w.p = p
	} else if w.s.Version == p.Version {
		t.Fatalf("standing %v to its own version", standing)
	}
}

func (w *world) tick(t *rapid.T) {
	w.action(true)
	in := drawInput(t, w.s, w.p)
	replay := reread(t, w.s)
	Step(w.s, w.p, in)
	Step(replay, w.p, in)
	if !bytes.Equal(encode(t, w.s), encode(t, replay)) {
		t.Fatal("the same inputs gave another state")
	}
	b := w.before
	if Raises(b, w.s) {
		switch {
		case !in.MayAdvance:
			t.Fatal("a share rose although it may not")
		case b.Phase == Pending:
		case b.Phase != Running:
			t.Fatalf("a share rose while %v", b.Phase)
		case !b.Seen && len(in.Outcomes) == 0:
			t.Fatal("a share rose in a stage that no outcome came from")
		}
	}
	if w.s.Phase == Completed && b.Phase != Completed && (b.Phase != Running || !in.MayAdvance) {
		t.Fatalf("completed from %v, may advance: %v", b.Phase, in.MayAdvance)
	}
	if len(in.Outcomes) == 0 && w.s.Baked > b.Baked && w.s.Epoch == b.Epoch {
		t.Fatal("a bake went on without outcomes")
	}
}

func (w *world) verb(t *rapid.T) {
	names := []string{VerbApprove, VerbAdvance, VerbHold, VerbResume, VerbRollback, VerbRollbackRing, VerbSetPercent, VerbRestart, VerbWaive}
	v := Verb{
		Step: rapid.SampledFrom([]string{"one", "two", UndoStep, undoRing + "staff)", undoKind + "k", EffectKey("x", 1, "a", 7), "elsewhere"}).Draw(t, "step"),
		Name: rapid.SampledFrom(names).Draw(t, "verb"), Stage: w.s.Stage.Name, Note: "me", Nonce: "m", Now: epoch0,
		Ring: rapid.SampledFrom(w.p.Rings).Draw(t, "ring"), Percent: rapid.SampledFrom([]float64{0, 1, 30, 100}).Draw(t, "percent"),
	}
	if rapid.IntRange(0, 5).Draw(t, "other stage") == 0 {
		v.Stage = "elsewhere"
	}
	w.action(v.Name == VerbAdvance || v.Name == VerbResume || v.Name == VerbSetPercent)
	_, err := Apply(w.s, w.p, v)
	if err != nil {
		if !bytes.Equal(encode(t, w.s), encode(t, w.before)) {
			t.Fatalf("%s failed and changed the state: %v", v.Name, err)
		}
		if (v.Name == VerbApprove || v.Name == VerbAdvance) && v.Stage == "elsewhere" && !errors.Is(err, ErrStage) {
			t.Fatalf("%s of another stage: %v", v.Name, err)
		}
		return
	}
	switch v.Name {
	case VerbRollback:
		if !w.s.Phase.Latched() {
			t.Fatalf("rolled back, and it is %v", w.s.Phase)
		}
	case VerbRestart:
		delete(w.rolled, w.s.Version)
		if w.s.Gen != w.before.Gen+1 && w.before.Phase != Pending || w.s.Phase != Pending {
			t.Fatalf("restarted, and it is %v in generation %d", w.s.Phase, w.s.Gen)
		}
	case VerbAdvance:
		return // its stage is no longer the present one
	}
	once := encode(t, w.s)
	if _, err := Apply(w.s, w.p, v); err != nil {
		t.Fatalf("%s a second time: %v", v.Name, err)
	}
	if again := encode(t, w.s); !bytes.Equal(once, again) && w.before.Phase != Stuck {
		t.Fatalf("%s a second time changed\n%s\nto\n%s", v.Name, once, again)
	}
}

func (w *world) attempt(t *rapid.T) {
	w.action(false)
	runner, takeOver := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "runner"), rapid.Bool().Draw(t, "take over")
	i := BeginAttempt(w.s, runner, takeOver)
	if i >= 0 && w.s.Term == w.before.Term && w.before.Runner != runner {
		t.Fatal("another runner took over in the same term")
	}
	if mine := w.before.Runner == "" || w.before.Runner == runner || takeOver; (i >= 0) != (w.before.next() >= 0 && mine) {
		t.Fatalf("attempt %d while %v", i, w.s.Phase)
	}
	if i < 0 {
		return
	}
	if i > 0 && w.s.Phase == RollingBack && !w.s.Steps[i-1].Done {
		t.Fatal("a step began before the one before it was done")
	}
	if w.s.Phase != RollingBack && w.s.Steps[i].Ring == "" {
		t.Fatalf("the step %q began while %v", w.s.Steps[i].Name, w.s.Phase)
	}
	if rapid.Bool().Draw(t, "crash") {
		return
	}
	cause := rapid.SampledFrom([]string{"", "", "it failed"}).Draw(t, "cause")
	EndAttempt(w.s, w.p, epoch0, Attempt{
		Name: w.s.Steps[i].Name, Gen: w.s.Steps[i].Gen, Cause: cause, GiveUp: rapid.Bool().Draw(t, "give up"),
		Effects: rapid.IntRange(0, 2).Draw(t, "effects"),
	})
	if w.s.Steps[i].Done != (cause == "") {
		t.Fatalf("an attempt that ended with %q is stored as %+v", cause, w.s.Steps[i])
	}
}

// check is the invariant after each action.
func (w *world) check(t *rapid.T) {
	s := w.s
	if err := s.check("x"); err != nil {
		t.Fatalf("not a valid document: %v", err)
	}
	if s.Phase.Latched() {
		w.rolled[s.Version] = true
	} else if w.rolled[s.Version] {
		t.Fatalf("%s was rolled back, was not restarted, and is %v", s.Version, s.Phase)
	}
	outer := 0.0
	for i := len(w.p.Rings) - 1; i >= 0; i-- {
		ring := w.p.Rings[i]
		share, latched := s.Shares[ring], slices.Contains(s.Rings, ring)
		_, set := s.Set[ring]
		switch {
		case latched && share != 0:
			t.Fatalf("the ring %s is rolled back and has %v", ring, share)
		case !latched && !set && share < outer:
			t.Fatalf("the ring %s has %v, a ring around it %v", ring, share, outer)
		}
		outer = max(outer, share)
	}
	if s.Phase == Running && w.p.find(s.Stage) < 0 {
		t.Fatalf("running in a stage that is not there: %v", s.Stage)
	}
	if s.Phase == Running && slices.Contains(s.Rings, s.Stage.Ring) {
		t.Fatalf("running in a stage of the ring %s that is rolled back", s.Stage.Ring)
	}
	b := w.before
	if b == nil {
		return
	}
	if s.Gen < b.Gen || s.Ver < b.Ver || s.Epoch < b.Epoch || s.Round < b.Round || s.Term < b.Term {
		t.Fatal("a counter fell")
	}
	if !maps.Equal(s.Shares, b.Shares) && (s.Epoch == b.Epoch || s.Ver == b.Ver) {
		t.Fatal("shares changed within an epoch")
	}
	if s.Phase != b.Phase && s.Ver == b.Ver {
		t.Fatal("the phase changed within a version of the document")
	}
	if Raises(b, s) && !w.raising {
		t.Fatalf("a share rose from %v to %v", b.Shares, s.Shares)
	}
	if s.Gen == b.Gen && len(s.Rings) < len(b.Rings) {
		t.Fatal("a ring's rollback was forgotten")
	}
	for _, st := range b.undoing() { // what a ring's candidate did is undone, or all is, or an operator's word stands for it
		if s.Phase.Latched() && s.Gen == b.Gen && st.From >= b.Settled {
			continue
		}
		if i := slices.IndexFunc(s.Steps, func(now StepState) bool { return now.Name == st.Name && now.Gen >= st.Gen }); i < 0 {
			t.Fatalf("the step %q was forgotten", st.Name)
		}
	}
	names := map[string]bool{}
	for _, st := range s.Steps {
		if names[st.Name] {
			t.Fatalf("two steps are called %q", st.Name)
		}
		names[st.Name] = true
	}
	if s.Settled < b.Settled || s.Settled > s.Gen {
		t.Fatalf("settled up to generation %d of %d, was %d", s.Settled, s.Gen, b.Settled)
	}
	if s.Settled == s.Gen && (s.Phase != RolledBack && s.Phase != Completed && !(s.Phase.Latched() && b.Settled == s.Gen)) {
		t.Fatalf("settled, and it is %v", s.Phase)
	}
}

// ends checks that every state can still reach RolledBack, and Completed given approvals, time and outcomes.
func (w *world) ends(t *rapid.T) {
	s := w.s.Clone()
	if _, err := Apply(s, w.p, Verb{Name: VerbRollback, Now: epoch0}); err != nil {
		t.Fatalf("it cannot be rolled back: %v", err)
	}
	for n := 0; s.Phase != RolledBack; n++ {
		i := BeginAttempt(s, "r", true)
		if i < 0 || n > 10 {
			t.Fatalf("the rollback does not end: %v", s.Phase)
		}
		EndAttempt(s, w.p, epoch0, Attempt{Name: s.Steps[i].Name, Gen: s.Steps[i].Gen})
	}
	if _, err := Apply(s, w.p, Verb{Name: VerbRestart, Now: epoch0}); err != nil {
		t.Fatal(err)
	}
	for n := 0; s.Phase != Completed; n++ {
		if n > 3000 {
			t.Fatalf("it does not complete: %v in %v, baked %v", s.Phase, s.Stage, s.Baked)
		}
		in := Input{Now: epoch0, Elapsed: 20 * time.Second, MayAdvance: true, Checks: map[string]judge.CheckResult{"check": {Verdict: judge.Healthy}}}
		for _, ring := range w.p.Rings {
			if s.Shares[ring] > 0 {
				in.Blocks = append(in.Blocks, block(s, ring, 4000, 40, 4000, 40))
				in.Outcomes = append(in.Outcomes, ring)
			}
		}
		Step(s, w.p, in)
		if i := w.p.find(s.Stage); s.Phase == Running && w.p.Stages[i].Approval {
			if _, err := Apply(s, w.p, Verb{Name: VerbApprove, Stage: s.Stage.Name, Now: epoch0}); err != nil {
				t.Fatal(err)
			}
		}
		if s.Phase == Held || s.Phase.Latched() {
			t.Fatalf("good outcomes led to %v: %+v", s.Phase, s.Hold)
		}
	}
}

func encode(t *rapid.T, s *State) []byte {
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func reread(t *rapid.T, s *State) *State {
	again, err := Decode("x", encode(t, s))
	if err != nil {
		t.Fatal(err)
	}
	return again
}
