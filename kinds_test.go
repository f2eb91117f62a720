package rollout

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var (
	rating = NewScore("quality", 0, 10)
	tools  = NewMix("tools", "search", "read", "write")
)

// agent is a version's behaviour: the mean of its quality, and how often it takes each tool.
type agent struct {
	quality float64
	tools   []float64
}

var steady = agent{8, []float64{.5, .3, .15}}

func (a agent) act(r *rand.Rand) []Observation {
	q := Observation{}
	if a.quality != 0 {
		q = rating.Observe(min(max(a.quality+r.NormFloat64(), 0), 10)).Because(fmt.Sprintf("it was rated %.1f", a.quality))
	}
	u, tool := r.Float64(), "delete"
	for i, p := range a.tools {
		if u -= p; u < 0 {
			tool = []string{"search", "read", "write"}[i]
			break
		}
	}
	return []Observation{Errors.Observe(false), q, tools.Observe(tool)}
}

// run lets the rollout decide ten runs a second, of units that come once, until it has ended.
func (a agent) run(r *process, late bool) State {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 60000 {
		time.Sleep(100 * time.Millisecond)
		r.n++
		d := r.Decide(Unit{Key: fmt.Sprint("conversation ", r.n)})
		by := steady
		if d.Enabled() {
			by = a
		}
		obs := by.act(rng)
		if late { // the score comes from elsewhere
			token, err := d.MarshalText()
			if err != nil {
				r.t.Fatal(err)
			}
			again, err := r.ParseDecision(token)
			if err != nil {
				r.t.Fatal(err)
			}
			d.Record(obs[0])
			again.Record(obs[1:]...)
		} else {
			d.Record(obs...)
		}
		if s := State(r.following().Phase); s == Completed || s == RolledBack || s == Held {
			return s
		}
	}
	return r.Status().State
}

// TestKinds: whole rollouts judged by scores and mixes, observed at once or late.
func TestKinds(t *testing.T) {
	worse, odd := agent{6.5, steady.tools}, agent{8, []float64{.3, .3, .15}}
	for _, c := range []struct {
		name string
		gate Gate
		by   agent
		want State
	}{
		{"a score within", rating.Within(1), steady, Completed},
		{"a score that drops", rating.Within(1), worse, RolledBack},
		{"a score at least", rating.AtLeast(7), steady, Completed},
		{"a score below", rating.AtLeast(7.5), worse, RolledBack},
		{"a score no worse", rating.NoWorse(), worse, RolledBack},
		{"a mix within", tools.Within(.15), steady, Completed},
		{"a mix too far", tools.Within(.05), odd, RolledBack},
		{"a changed mix", tools.NoChange(), odd, RolledBack},
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprint(c.name, " ", late), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := Policy{Stages: Percentages(20, 50, 100), Bake: time.Minute, Holdback: 20, Independent: true, Gates: []Gate{c.gate, Errors.AtMost(50)}, Metrics: []Metric{rating, tools}}
					r := start(t, "x", p, Options{})
					got := c.by.run(r, late)
					s := r.Status()
					if got != c.want {
						t.Fatalf("%v in %s: %+v", got, s.Stage.Name, s.Gates[0])
					}
					if s.Late > 3 || s.Invalid+s.Unknown > 0 { // the rollout may end between a decision and its record
						t.Errorf("%d late, %d invalid, %d unknown", s.Late, s.Invalid, s.Unknown)
					}
					if got != RolledBack {
						return
					}
					in := s.Incident
					if in.Gate != c.gate.Name() || !strings.HasPrefix(in.Note, in.Metric+":") || in.Candidate.N == 0 {
						t.Errorf("%+v", in)
					}
					if in.Metric == "quality" {
						if len(in.Rationales) < 8 || in.Rationales[0] != "it was rated 6.5" || in.Candidate.Mean > 7 || in.Control.Mean < 7.5 {
							t.Errorf("%+v", in)
						}
					} else if in.Candidate.Mix["search"] == 0 || in.Control.Mix["other"] == 0 {
						t.Errorf("%+v", in)
					}
					t.Log(in.Note)
				})
			})
		}
	}
}

// TestGuardsAreListed: Status tells of the guards that are on.
func TestGuardsAreListed(t *testing.T) {
	for _, without := range [][]string{nil, {GuardNoOutcome}, {GuardSplit, GuardNoOutcome}} {
		p := threeStages()
		p.Without = without
		for _, name := range []string{GuardNoOutcome, GuardSplit} {
			listed := slices.ContainsFunc(startedWith(t, p).Status().Gates, func(g GateStatus) bool { return g.Name == name && g.Armed })
			if off := slices.Contains(without, name); listed == off {
				t.Errorf("without %q the guard %q is listed: %t", without, name, listed)
			}
		}
	}
}

// TestRingAtFault: a regression in one ring rolls back that ring; the others keep their shares and their evidence, and the
// rollout goes on.
func TestRingAtFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := Policy{
			Rings:  []Ring{{Name: "staff"}, {Name: "beta"}},
			Stages: []Stage{{Ring: "staff", Percent: 50}, {Ring: "beta", Percent: 50}, {Percent: 25}, {Percent: 50}, {Percent: 100}},
			Bake:   5 * time.Minute, Holdback: 10,
			Gates: []Gate{Errors.Within(5).OnFail(RollbackRing), Errors.AtMost(50)},
		}
		r := start(t, "x", p, Options{})
		rng := rand.New(rand.NewPCG(1, 2))
		var before map[string]Percent
		done := false
		for n := 0; n < 200000 && !done; n++ {
			time.Sleep(50 * time.Millisecond)
			u := Unit{Key: fmt.Sprint("user ", n)}
			bad := .01
			switch n % 4 {
			case 0:
				u.Groups = []string{"staff"}
			case 1:
				u.Groups = []string{"beta"}
				bad = .4
			}
			d := r.Decide(u)
			if !d.Enabled() {
				bad = .01
			}
			d.Record(Errors.Observe(rng.Float64() < bad))
			s := r.Status()
			done = s.State != Running
			shares := map[string]Percent{}
			for _, ring := range s.Rings {
				shares[ring.Name] = ring.Percent
			}
			if s.Incident != nil && before != nil {
				if s.Incident.Ring != "beta" || shares["beta"] != 0 || shares["staff"] != before["staff"] || shares[Everyone] != before[Everyone] || s.Incident.Candidate.Rate < .1 {
					t.Fatalf("from %v to %v: %+v", before, shares, s.Incident)
				}
				for _, g := range s.Gates {
					if g.Name == "errors.Within(5)" && (g.Verdict == Unhealthy || g.Candidate.Rate > .05) {
						t.Errorf("what is left: %+v", g)
					}
				}
				before = nil
			} else if s.Incident == nil {
				before = shares
			}
		}
		s := r.Status()
		if s.Incident == nil || s.State != Held && s.State != Completed {
			t.Fatalf("%v in %s, %+v", s.State, s.Stage.Name, s.Incident)
		}
		t.Log(s.State, s.Note, s.Incident.Note)
	})
}
