package machine

import (
	"errors"
	"fmt"
	"slices"
	"testing"
)

// undoing is a rollout whose candidate is exposed in three rings, with something to undo.
func undoing(t *testing.T) (*State, *Plan) {
	p := fixedPlan(t)
	p.Rings = []string{"staff", "beta", "everyone"}
	p.Undoes = true
	s := New("x", p, "n")
	Step(s, p, Input{MayAdvance: true, Now: epoch0})
	return s, p
}

func apply(t *testing.T, s *State, p *Plan, verbs ...Verb) {
	t.Helper()
	for _, v := range verbs {
		v.Now = epoch0
		if _, err := Apply(s, p, v); err != nil {
			t.Fatalf("%+v: %v", v, err)
		}
	}
}

func ringBack(ring string) Verb  { return Verb{Name: VerbRollbackRing, Ring: ring} }
func waiving(step string) Verb   { return Verb{Name: VerbWaive, Step: step} }
func effectOf(gen uint64) string { return EffectKey("x", gen, "somebody", 7) }

var rollBack, startAgain = Verb{Name: VerbRollback}, Verb{Name: VerbRestart, Nonce: "m"}

// TestWaivesLast: what is waived stays so, whichever step comes upon it later, and no more than was meant.
func TestWaivesLast(t *testing.T) {
	type effect struct {
		kind, ring string
		gen        uint64
	}
	staff, beta, mail, later := effect{"order", "staff", 1}, effect{"order", "beta", 1}, effect{"mail", "staff", 1}, effect{"order", "staff", 2}
	for name, c := range map[string]struct {
		verbs   []Verb
		excused []effect
	}{
		"a ring":                        {[]Verb{ringBack("staff"), waiving("(undo staff)"), rollBack}, []effect{staff, mail}},
		"a kind in a ring":              {[]Verb{ringBack("staff"), waiving("undo:order"), rollBack}, []effect{staff}},
		"a kind in two rings":           {[]Verb{ringBack("staff"), ringBack("beta"), waiving("undo:order"), rollBack}, []effect{staff, beta}},
		"a kind everywhere":             {[]Verb{rollBack, waiving("undo:order")}, []effect{staff, beta}},
		"a ring, and a new generation":  {[]Verb{ringBack("staff"), waiving("(undo staff)"), startAgain, rollBack}, []effect{staff, mail}},
		"a ring again":                  {[]Verb{ringBack("staff"), waiving("(undo staff)"), startAgain, ringBack("staff"), waiving("(undo staff)"), startAgain, rollBack}, []effect{staff, mail, later}},
		"a key, and a new generation":   {[]Verb{ringBack("staff"), ringBack("beta"), waiving(effectOf(1)), startAgain, rollBack}, nil},
		"everything, and nothing after": {[]Verb{rollBack, waiving("one"), waiving(UndoStep), startAgain, rollBack}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s, p := undoing(t)
			apply(t, s, p, c.verbs...)
			for _, e := range []effect{staff, beta, mail, later} {
				if got := s.Excuses(EffectKey("x", e.gen, "another", 1), e.kind, e.ring, e.gen); got != slices.Contains(c.excused, e) {
					t.Errorf("%+v: excused %v", e, got)
				}
			}
			if got := s.Excuses(effectOf(1), "letter", "everyone", 1); got != (name == "a key, and a new generation") {
				t.Errorf("the effect is excused: %v", got)
			}
		})
	}
}

// TestWaiveAgain: what was waived is waived, also once the rollback is done; what nobody undoes cannot be.
func TestWaiveAgain(t *testing.T) {
	for _, name := range []string{effectOf(1), "undo:order", UndoStep, "(undo staff)"} {
		s, p := undoing(t)
		if _, err := Apply(s, p, waiving(name)); !errors.Is(err, ErrState) {
			t.Errorf("%s, with nothing to undo: %v", name, err)
		}
		if apply(t, s, p, ringBack("staff")); name == UndoStep {
			apply(t, s, p, rollBack)
		}
		apply(t, s, p, waiving(name), waiving(name))
		apply(t, s, p, rollBack)
		for i := BeginAttempt(s, "r", true); i >= 0; i = BeginAttempt(s, "r", true) {
			EndAttempt(s, p, epoch0, Attempt{Name: s.Steps[i].Name, Gen: s.Steps[i].Gen})
		}
		if s.Phase != RolledBack {
			t.Fatalf("%s: it is %v", name, s.Phase)
		}
		apply(t, s, p, waiving(name))
		if _, err := Apply(s, p, waiving(effectOf(2))); !errors.Is(err, ErrState) {
			t.Errorf("what nobody undoes is waived: %v", err)
		}
		if apply(t, s, p, startAgain); len(s.Waives) != 0 {
			t.Errorf("%s: settled, and waived are %v", name, s.Waives)
		}
	}
}

// TestWaiveTooMany: effects are waived one by one up to a limit, and what is settled makes room; a ring always can be.
func TestWaiveTooMany(t *testing.T) {
	s, p := undoing(t)
	apply(t, s, p, ringBack("staff"))
	for i := range uint64(MaxWaives) {
		apply(t, s, p, waiving(EffectKey("x", 1, "a", i)))
	}
	if _, err := Apply(s, p, waiving("undo:order")); !errors.Is(err, ErrState) {
		t.Errorf("more than the limit: %v", err)
	}
	apply(t, s, p, waiving("(undo staff)"))
	doc, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if s, err = Decode("x", doc); err != nil || len(s.Waives) != MaxWaives+1 {
		t.Fatalf("%d are waived, %v", len(s.Waives), err)
	}
	s.Waives = append(s.Waives, Waive{Name: "undo:order", Gen: 1})
	if err := s.check("x"); err == nil {
		t.Error("too many are no valid document")
	}
	s.Waives = s.Waives[:MaxWaives]
	apply(t, s, p, ringBack("beta"))
	s.Settled = 1
	s.Steps = []StepState{{Name: UndoStep, Undo: true, From: 1, Gen: 2}}
	apply(t, s, p, waiving(effectOf(2)))
	if fmt.Sprint(s.Waives) != fmt.Sprint([]Waive{{Name: effectOf(2), Gen: 2}}) {
		t.Errorf("waived are %v", s.Waives)
	}
}

// TestRingsTakeTurns: of rings that were rolled back alone the one is next that waited longest, also where an attempt never
// ends; an attempt under way goes on when another ring is next. A rollback of everybody keeps its order.
func TestRingsTakeTurns(t *testing.T) {
	s, p := undoing(t)
	apply(t, s, p, ringBack("staff"))
	var tried []string
	try := func(cause string) {
		i := BeginAttempt(s, "r", true)
		tried = append(tried, s.Steps[i].Name)
		if cause != "it dies" {
			EndAttempt(s, p, epoch0, Attempt{Name: s.Steps[i].Name, Gen: s.Steps[i].Gen, Cause: cause, GiveUp: true})
		}
	}
	is := func(want ...string) {
		t.Helper()
		if !slices.Equal(tried, want) {
			t.Errorf("tried were %q, not %q", tried, want)
		}
		tried = nil
	}
	for range 3 {
		try("no")
	}
	is("(undo staff)", "(undo staff)", "(undo staff)")
	i := BeginAttempt(s, "r", true)
	apply(t, s, p, ringBack("beta"))
	if next, _ := NextStep(s); next.Ring != "beta" || !s.Needs("(undo staff)", 1) {
		t.Errorf("next is %q", next.Name)
	}
	EndAttempt(s, p, epoch0, Attempt{Name: "(undo staff)", Gen: 1, Cause: "no"})
	if s.Steps[i].Err != "no" {
		t.Errorf("%+v", s.Steps[i])
	}
	for range 2 {
		try("no")
		try("it dies")
		try("no")
	}
	is("(undo beta)", "(undo staff)", "(undo beta)", "(undo staff)", "(undo beta)", "(undo staff)")
	apply(t, s, p, startAgain)
	Step(s, p, Input{MayAdvance: true, Now: epoch0})
	apply(t, s, p, ringBack("staff"))
	try("no")
	try("")
	is("(undo beta)", "(undo staff)")
	if s.Needs("(undo staff)", 2) || s.Needs("(undo beta)", 2) || !s.Needs("(undo beta)", 1) {
		t.Errorf("%+v", s.Steps)
	}
	try("")
	is("(undo beta)")
	apply(t, s, p, ringBack("beta")) // which was done, and has something else to be undone
	if n := len(s.Steps); n != 2 || !s.Needs("(undo beta)", 2) {
		t.Errorf("%+v", s.Steps)
	}
	apply(t, s, p, rollBack)
	if s.Needs("(undo beta)", 1) || s.Needs(UndoStep, 2) {
		t.Errorf("%+v", s.Steps)
	}
	try("no")
	apply(t, s, p, rollBack)
	try("")
	try("")
	if is("one", "one", UndoStep); s.Phase != RolledBack {
		t.Errorf("it is %v", s.Phase)
	}
}

// TestRejoinUndoes: a ring's rollback that the stored state has forgotten is joined with the undoing of its effects.
func TestRejoinUndoes(t *testing.T) {
	s, p := undoing(t)
	apply(t, s, p, Verb{Name: VerbSetPercent, Ring: "staff"})
	stored := s.Clone()
	apply(t, s, p, ringBack("staff"), waiving("undo:order"))
	joined, _ := Rejoin(stored, s, p, "m", epoch0)
	if !slices.Equal(joined.Rings, []string{"staff"}) || !joined.Needs("(undo staff)", 1) || !joined.Excuses("", "order", "staff", 1) {
		t.Errorf("joined are %v with %+v and %v", joined.Rings, joined.Steps, joined.Waives)
	}
}

// TestRejoinUncompletes: a store that goes back to before completion has a rollout again whose effects a rollback undoes.
func TestRejoinUncompletes(t *testing.T) {
	s, p := undoing(t)
	stored := s.Clone()
	for range p.Stages {
		apply(t, s, p, Verb{Name: VerbAdvance, Stage: s.Stage.Name})
	}
	if s.Phase != Completed || s.Settled != s.Gen {
		t.Fatalf("it is %v, settled up to %d", s.Phase, s.Settled)
	}
	joined, _ := Rejoin(stored, s, p, "m", epoch0)
	if joined.Phase != Running {
		t.Fatalf("it is %v", joined.Phase)
	}
	apply(t, joined, p, Verb{Name: VerbRollback})
	if !slices.ContainsFunc(joined.Steps, func(st StepState) bool { return st.Name == UndoStep && st.From < joined.Gen }) {
		t.Errorf("a rollback has the steps %+v, settled is %d of %d", joined.Steps, joined.Settled, joined.Gen)
	}
}

// TestRejoinTerm: a store that goes back to before another process took the steps over does not leave two with one term.
func TestRejoinTerm(t *testing.T) {
	p := fixedPlan(t)
	p.Steps = []string{"one", "two"}
	s := New("x", p, "n")
	Step(s, p, Input{Now: epoch0, MayAdvance: true})
	Apply(s, p, Verb{Name: VerbRollback})
	BeginAttempt(s, "x", false)
	snapshot := s.Clone() // term 1, x
	// y takes over and does step one: ver rises
	BeginAttempt(s, "y", true)
	EndAttempt(s, p, epoch0, Attempt{Name: "one", Gen: s.Steps[0].Gen})
	if s.Runner != "y" || s.Term != 2 {
		t.Fatal(s.Runner, s.Term)
	}
	known := s.Clone() // y is at step two now, term 2
	BeginAttempt(known, "y", false)
	// the store went back; z, which has just started, takes over from x there
	BeginAttempt(snapshot, "z", true)
	if snapshot.Runner != "z" || snapshot.Term != 2 {
		t.Fatal(snapshot.Runner, snapshot.Term)
	}
	joined, _ := Rejoin(snapshot, known, p, "m", epoch0)
	if joined.Term <= 2 {
		t.Errorf("z runs step %q in term 2, y runs %q in term 2, and the joined state has term %d of %s", "one", "two", joined.Term, joined.Runner)
	}
}

// TestRejoinTermRing: nor one with the term of another, where a ring alone is undone.
func TestRejoinTermRing(t *testing.T) {
	p := fixedPlan(t)
	p.Undoes = true
	s := New("x", p, "n")
	Step(s, p, Input{Now: epoch0, MayAdvance: true})
	Apply(s, p, Verb{Name: VerbRollbackRing, Ring: "staff"})
	BeginAttempt(s, "x", false)
	snapshot := s.Clone() // term 1, x
	BeginAttempt(s, "y", true)
	Apply(s, p, Verb{Name: VerbHold})
	Apply(s, p, Verb{Name: VerbApprove, Stage: s.Stage.Name})
	known := s.Clone()
	joined, _ := Rejoin(snapshot, known, p, "m", epoch0)
	if joined.Runner != "y" && joined.Term == known.Term {
		t.Errorf("term %d was %s's and is %s's", joined.Term, known.Runner, joined.Runner)
	}
}
