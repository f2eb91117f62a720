package machine

import (
	"testing"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
)

// fixedPlan is a plan of two rings with a gate of every kind of a rate.
func fixedPlan(tb testing.TB) *Plan {
	specs := []judge.Spec{
		{Name: "within", Metric: "errors", Kind: judge.Within, Margin: .01, Action: judge.Rollback},
		{Name: "worse", Metric: "errors", Kind: judge.NoWorse, Action: judge.StepBack},
		{Name: "most", Metric: "errors", Kind: judge.AtMost, Margin: .2, Action: judge.Hold},
		{Name: "never", Metric: "errors", Kind: judge.Never, Action: judge.Report},
	}
	j, err := judge.New(specs, judge.Risk{FalseRollback: .01, FalsePromotion: .05}, "staff", "everyone")
	if err != nil {
		tb.Fatal(err)
	}
	p := &Plan{Version: "v", Judge: j, Rings: []string{"staff", "everyone"}, Tick: tick, Keep: 1000, OnDeadline: judge.Hold, Policy: "p", Assignment: "a", Steps: []string{"one"}}
	for i, st := range []Stage{{StageRef: StageRef{Ring: "staff", Percent: 50}}, {StageRef: StageRef{Ring: "everyone", Percent: 10}, Over: time.Minute}, {StageRef: StageRef{Ring: "everyone", Percent: 100}, Last: true}} {
		st.Name = string(rune('a' + i))
		st.Bake, st.Deadline, st.Control, st.Armed = time.Minute, time.Hour, true, []bool{true, true, true, true}
		p.Stages = append(p.Stages, st)
	}
	return p
}

// FuzzDecode: what Decode accepts, whoever wrote it, the rest of the package can work on, and writes again so that it can
// be read.
func FuzzDecode(f *testing.F) {
	p := fixedPlan(f)
	s := New("x", p, "n")
	add := func() {
		doc, err := s.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(doc)
		f.Add(zipped(f, doc))
	}
	add()
	for range 20 {
		in := Input{Elapsed: tick, MayAdvance: true, Outcomes: []string{"staff", "everyone"}}
		for ring, share := range s.Shares {
			if share > 0 {
				in.Blocks = append(in.Blocks, block(s, ring, 500, 5, 500, 5))
			}
		}
		Step(s, p, in)
	}
	add()
	if _, err := Apply(s, p, Verb{Name: VerbRollback}); err != nil {
		f.Fatal(err)
	}
	add()
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		first, err := Decode("x", doc)
		if err != nil {
			return
		}
		s := first.Clone()
		Adopt(s, p, "n", epoch0)
		in := Input{Now: epoch0, Elapsed: tick, MayAdvance: true, Outcomes: []string{"everyone"}, Breaches: []Breach{{Metric: "errors", Ring: "everyone", Events: 1}}}
		in.Blocks = append(in.Blocks, block(s, "everyone", 50, 1, 50, 1), block(s, "staff", 50, 1, 50, 1))
		Step(s, p, in)
		for _, name := range []string{VerbApprove, VerbAdvance, VerbHold, VerbResume, VerbSetPercent, VerbRollbackRing, VerbRollback, VerbRestart} {
			c := s.Clone()
			_, _ = Apply(c, p, Verb{Name: name, Stage: c.Stage.Name, Ring: "staff", Percent: 5})
			Step(c, p, in)
			if i := BeginAttempt(c, "r", true); i >= 0 {
				EndAttempt(c, p, epoch0, Attempt{Name: c.Steps[i].Name, Gen: c.Steps[i].Gen})
			}
		}
		Rejoin(first, s, p, "n", epoch0)
		again, err := s.Encode()
		if err != nil {
			return // larger than the limit
		}
		if _, err := Decode("x", again); err != nil {
			t.Fatalf("%v\n%s", err, again)
		}
	})
}
