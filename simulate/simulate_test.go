package simulate_test

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

// policy is small and quick: it completes within half an hour.
func policy() rollout.Policy {
	return rollout.Policy{
		Version: "v2",
		Stages:  rollout.Percentages(10, 50, 100),
		Bake:    5 * time.Minute, Holdback: 5,
		Gates: []rollout.Gate{rollout.Errors.Within(2)},
	}
}

// errorsAt is traffic whose requests fail with so many percent of chance under each version.
func errorsAt(stable, candidate simulate.Level) simulate.Traffic {
	return simulate.Traffic{PerSecond: 50, Units: 500, Models: []simulate.Model{simulate.Rate(rollout.Errors, stable, candidate)}}
}

func run(tb testing.TB, p rollout.Policy, t simulate.Traffic, o *simulate.Options) simulate.Report {
	tb.Helper()
	report, err := simulate.Run(tb.Context(), "test", p, t, o)
	if err != nil {
		tb.Fatal(err)
	}
	return report
}

func asJSON(tb testing.TB, v any) string {
	tb.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

func TestGoodReleaseCompletes(t *testing.T) {
	rep := run(t, policy(), errorsAt(simulate.Always(1), nil), nil)
	if rep.State != rollout.Completed || rep.Incident != nil {
		t.Fatal(rep)
	}
	if rep.End < 15*time.Minute || rep.End > 40*time.Minute {
		t.Errorf("it took %v: three bakes of 5 min and a proof", rep.End)
	}
	var names []string
	sum := simulate.Stage{}
	for i, s := range rep.Stages {
		names = append(names, s.Name)
		if s.Left < s.Entered+5*time.Minute {
			t.Errorf("%s from %v to %v", s.Name, s.Entered, s.Left)
		}
		if i > 0 && s.Entered != rep.Stages[i-1].Left {
			t.Errorf("%s was entered at %v, the one before left at %v", s.Name, s.Entered, rep.Stages[i-1].Left)
		}
		sum.Requests += s.Requests
		sum.Candidate += s.Candidate
		sum.Control += s.Control
		sum.Exposed += s.Exposed
	}
	if want := []string{"everyone 10 %", "everyone 50 %", "everyone 100 %"}; !slices.Equal(names, want) {
		t.Errorf("stages %q", names)
	}
	if sum.Requests != rep.Requests || sum.Candidate != rep.Candidate || sum.Control != rep.Control || sum.Exposed != rep.Exposed {
		t.Errorf("the stages together: %+v; all: %+v", sum, rep)
	}
	if want := int(50 * rep.End.Seconds()); rep.Requests < want*95/100 || rep.Requests > want*105/100 {
		t.Errorf("%d requests in %v at 50/s", rep.Requests, rep.End)
	}
	if got := rep.Gates[0]; got.Verdict != rollout.Healthy || got.Candidate.N == 0 {
		t.Errorf("%+v", got)
	}
}

// Units that get the candidate are counted once: of 500, all but the 5 % that are held back.
func TestExposedUnits(t *testing.T) {
	rep := run(t, policy(), errorsAt(simulate.Always(1), nil), nil)
	want := 0
	for unit := range units(t) {
		// A bucket is compared as decisions do: below the share, and not in the holdback, the highest 5 %.
		if float64(rollout.Bucket("test", unit))/(1<<64) < .95 {
			want++
		}
	}
	if rep.Exposed != want {
		t.Errorf("%d units were exposed, %d should have been", rep.Exposed, want)
	}
	rep = run(t, policy(), simulate.Traffic{PerSecond: 50, Models: errorsAt(simulate.Always(1), nil).Models}, nil)
	if rep.Exposed != rep.Candidate {
		t.Errorf("%d units, %d requests, each of a unit of its own", rep.Exposed, rep.Candidate)
	}
}

// units are the keys of errorsAt.
func units(t *testing.T) map[string]bool {
	keys := map[string]bool{}
	traffic := errorsAt(simulate.Always(1), nil)
	traffic.Models = append(traffic.Models, func(q *simulate.Request, _ *simulate.Outcome) { keys[q.Unit.Key] = true })
	run(t, policy(), traffic, nil)
	if len(keys) != 500 {
		t.Fatalf("%d units", len(keys))
	}
	return keys
}

func TestRegressionIsRolledBack(t *testing.T) {
	at := 8 * time.Minute // in the second stage
	rep := run(t, policy(), errorsAt(simulate.Always(1), simulate.Always(1).After(at, simulate.Always(12))), nil)
	if rep.State != rollout.RolledBack || rep.Incident == nil || rep.Incident.Gate != "errors.Within(2)" {
		t.Fatal(rep)
	}
	if rep.End <= at || rep.End > at+10*time.Minute {
		t.Errorf("it was rolled back after %v; it went bad after %v", rep.End, at)
	}
	last := rep.Events[len(rep.Events)-1]
	if last.Kind != rollout.RollbackDone || !last.Time.Equal(rep.Start.Add(rep.End)) || !rep.Incident.Time.Equal(last.Time) {
		t.Errorf("%+v", last)
	}
	for _, want := range []string{"test v2: rolled back after ", "rollback began: errors.Within(2)", "stage entered: everyone 50 %", "unhealthy"} {
		if !strings.Contains(rep.String(), want) {
			t.Errorf("%q is not in\n%s", want, rep)
		}
	}
}

// A rehearsal undoes nothing and asks nobody, unless it is told to.
func TestNothingReal(t *testing.T) {
	p := policy()
	p.Rollback = []rollout.RollbackStep{{Name: "undo", Do: func(context.Context, rollout.Incident) error {
		t.Error("a rollback step was run")
		return nil
	}}}
	asked := 0
	p.MayAdvance = func(at time.Time) bool {
		asked++
		return at.Hour() >= 9
	}
	bad := errorsAt(simulate.Always(1), simulate.Always(30))
	if rep := run(t, p, bad, nil); rep.State != rollout.RolledBack || asked > 0 {
		t.Errorf("MayAdvance was asked %d times; %v", asked, rep)
	}
	rep := run(t, p, bad, &simulate.Options{MayAdvance: true, Start: time.Date(2020, 2, 2, 8, 50, 0, 0, time.UTC)})
	if asked == 0 || rep.Stages[0].Entered != 10*time.Minute {
		t.Errorf("MayAdvance was asked %d times; %v", asked, rep)
	}
	// Two rehearsals of one name do not see each other, nor a Rollout of the name.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	r := rollout.Must("test", policy(), nil)
	go func() { done <- r.Run(ctx) }()
	run(t, policy(), bad, nil)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := r.Status().State; s == rollout.RolledBack {
		t.Error("the real one is", s)
	}
}

// everything is traffic in which every kind of chance is drawn.
func everything() simulate.Traffic {
	latency := simulate.Durations{Median: 50 * time.Millisecond, Spread: .5, Slow: simulate.Always(1), SlowBy: 10}
	return simulate.Traffic{
		PerSecond: 50, Load: simulate.Always(1).Swing(20*time.Minute, .5), Units: 300, Skew: 1,
		Rings:   map[string]rollout.Percent{"staff": 5, "beta": 10},
		Loopers: []simulate.Looper{{Cohort: rollout.Candidate, Percent: 1}},
		Models: []simulate.Model{
			simulate.Rate(rollout.Errors, simulate.Always(1).ByUnit(.2), nil),
			simulate.Timing(rollout.Latency, latency, latency),
			simulate.Score(grade, simulate.Scores{Mean: simulate.Always(.8), Spread: .15}, simulate.Scores{Mean: simulate.Always(.79), Spread: .2}),
			simulate.Mix(route, simulate.Parts{"near": simulate.Always(60), "far": simulate.Always(30), "lost": simulate.Always(10)}, nil),
			simulate.Delay(latency, latency),
			simulate.Lost(simulate.Always(.1), nil),
		},
	}
}

var (
	grade = rollout.NewScore("grade", 0, 1)
	route = rollout.NewMix("route", "near", "far")
)

func TestDeterministic(t *testing.T) {
	p := policy()
	p.Rings = []rollout.Ring{{Name: "staff"}, {Name: "beta"}}
	p.Gates = append(p.Gates, rollout.Latency.Quantile(.9).WithinFactor(1.3), rollout.NewRate("odd").Never(), grade.Within(.1), route.Within(.2),
		rollout.Check("panics", func(context.Context) (rollout.Verdict, error) { panic("no") }))
	texts := map[string]bool{}
	for seed := range uint64(3) {
		a := run(t, p, everything(), &simulate.Options{Seed: seed, Horizon: 15 * time.Minute})
		b := run(t, p, everything(), &simulate.Options{Seed: seed, Horizon: 15 * time.Minute})
		if asJSON(t, a) != asJSON(t, b) || a.String() != b.String() {
			t.Errorf("seed %d:\n%v\nand then\n%v", seed, a, b)
		}
		texts[a.String()] = true
	}
	if len(texts) != 3 {
		t.Errorf("%d reports of three seeds", len(texts))
	}
}

func TestReportJSON(t *testing.T) {
	rep := run(t, policy(), errorsAt(simulate.Always(1), simulate.Always(30)), nil)
	var back simulate.Report
	if err := json.Unmarshal([]byte(asJSON(t, rep)), &back); err != nil {
		t.Fatal(err)
	}
	if asJSON(t, back) != asJSON(t, rep) || back.String() != rep.String() || back.State != rollout.RolledBack {
		t.Errorf("%+v\n%+v", back, rep)
	}
}

func TestHorizon(t *testing.T) {
	rep := run(t, policy(), errorsAt(simulate.Always(1), nil), &simulate.Options{Horizon: 7*time.Minute + 2*time.Second})
	if rep.State != rollout.Running || rep.Stage != "everyone 50 %" || rep.End != 7*time.Minute+2*time.Second {
		t.Error(rep)
	}
	// What came in after the last tick is judged as well.
	var n uint64
	for _, s := range rep.Stages {
		n += uint64(s.Candidate)
	}
	if g := rep.Gates[0]; g.Candidate.N != n {
		t.Errorf("%d candidate requests, the gate has seen %d", n, g.Candidate.N)
	}
	// No outcome, no promotion.
	rep = run(t, policy(), simulate.Traffic{PerSecond: 50}, &simulate.Options{Horizon: 30 * time.Minute})
	if rep.State != rollout.Running || len(rep.Stages) != 1 || rep.Requests == 0 {
		t.Error(rep)
	}
}

// One event of a Never gate is acted on when it happens, not a tick later.
func TestNeverActsAtOnce(t *testing.T) {
	p := policy()
	odd := rollout.NewRate("odd")
	p.Gates = append(p.Gates, odd.Never())
	var at time.Duration
	tr := errorsAt(simulate.Always(1), nil)
	tr.Models = append(tr.Models, func(q *simulate.Request, o *simulate.Outcome) {
		bad := at == 0 && q.At > time.Minute && q.Decision.Enabled()
		if bad {
			at = q.At
		}
		o.Observe(odd.Observe(bad))
	})
	rep := run(t, p, tr, &simulate.Options{Interval: 10 * time.Second})
	if rep.State != rollout.RolledBack || rep.End != at {
		t.Errorf("it happened at %v: %v", at, rep)
	}
}

func TestOperator(t *testing.T) {
	p := policy()
	p.Stages[0].Approval = true
	approve := func(ctx context.Context, at time.Duration, r *rollout.Rollout) error {
		if s := r.Status().Stage; s.Approval && !s.Approved && at >= 20*time.Minute {
			return r.Approve(ctx, s.Name, "looks well")
		}
		return nil
	}
	tr := errorsAt(simulate.Always(1), nil)
	if rep := run(t, p, tr, &simulate.Options{Horizon: time.Hour}); len(rep.Stages) != 1 {
		t.Error("nobody approved it:", rep)
	}
	rep := run(t, p, tr, &simulate.Options{Operator: approve})
	if rep.State != rollout.Completed || rep.Stages[1].Entered != 20*time.Minute {
		t.Error(rep)
	}
	wrong := errors.New("out of hours")
	_, err := simulate.Run(t.Context(), "test", p, tr, &simulate.Options{
		Operator: func(context.Context, time.Duration, *rollout.Rollout) error { return wrong },
	})
	if !errors.Is(err, wrong) {
		t.Error(err)
	}
	_, err = simulate.Run(t.Context(), "test", p, tr, &simulate.Options{
		Operator: func(ctx context.Context, _ time.Duration, r *rollout.Rollout) error { return r.Run(ctx) },
	})
	if !errors.Is(err, rollout.ErrRunning) {
		t.Error("the Run of a rehearsed Rollout:", err)
	}
}

func TestCheck(t *testing.T) {
	p := policy()
	asks := 0
	p.Gates = append(p.Gates, rollout.Check("quota", func(context.Context) (rollout.Verdict, error) {
		if asks++; asks > 100 {
			return rollout.Unhealthy, errors.New("exceeded")
		}
		return rollout.Healthy, nil
	}))
	rep := run(t, p, errorsAt(simulate.Always(1), nil), nil)
	if rep.State != rollout.RolledBack || rep.Incident.Note != "exceeded" || rep.End != 100*5*time.Second {
		t.Error(rep)
	}
}

func TestContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	tr := errorsAt(simulate.Always(1), nil)
	tr.Models = append(tr.Models, func(q *simulate.Request, _ *simulate.Outcome) {
		if q.At > time.Minute {
			cancel()
		}
	})
	rep, err := simulate.Run(ctx, "test", policy(), tr, nil)
	if !errors.Is(err, context.Canceled) || rep.Requests != 0 {
		t.Errorf("%v, %v", err, rep)
	}
	if _, err := simulate.Replay(ctx, "test", policy(), slices.Values(aa(100)), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestRefuses(t *testing.T) {
	good := errorsAt(simulate.Always(1), nil)
	for want, change := range map[string]func(*rollout.Policy, *simulate.Traffic, *simulate.Options){
		"Traffic.PerSecond:":         func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.PerSecond = 0 },
		"Traffic.Units:":             func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Units = -1 },
		"Traffic.Skew: -1":           func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Skew = -1 },
		"Traffic.Skew: it needs":     func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Units, tr.Skew = 0, 1 },
		`Traffic.Rings["a"]: -1 %`:   func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Rings = rings("a", -1) },
		`Traffic.Rings["everyone"]:`: func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Rings = rings("everyone", 1) },
		"Traffic.Rings: together":    func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Rings = rings("a", 60, "b", 60) },
		"Traffic.Models[1]: it is":   func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Models = append(tr.Models, nil) },
		"Traffic.Loopers[0].Cohort:": func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) { tr.Loopers = []simulate.Looper{{}} },
		"Traffic.Loopers[0].Percent:": func(_ *rollout.Policy, tr *simulate.Traffic, _ *simulate.Options) {
			tr.Loopers = []simulate.Looper{{Cohort: 1}}
		},
		"Options.Interval: -1s": func(_ *rollout.Policy, _ *simulate.Traffic, o *simulate.Options) { o.Interval = -time.Second },
		"Options.Horizon: -1s":  func(_ *rollout.Policy, _ *simulate.Traffic, o *simulate.Options) { o.Horizon = -time.Second },
		"Policy.Stages:":        func(p *rollout.Policy, _ *simulate.Traffic, _ *simulate.Options) { p.Stages = nil },
		"Policy.Rollback[0].Name": func(p *rollout.Policy, _ *simulate.Traffic, _ *simulate.Options) {
			p.Rollback = make([]rollout.RollbackStep, 1)
		},
	} {
		p, tr, o := policy(), good, simulate.Options{}
		change(&p, &tr, &o)
		_, err := simulate.Run(t.Context(), "test", p, tr, &o)
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(want)) {
			t.Errorf("%s: %v", want, err)
		}
	}
	// All at once.
	_, err := simulate.Run(t.Context(), "Not A Name", rollout.Policy{}, simulate.Traffic{}, &simulate.Options{Horizon: -1})
	for _, want := range []string{"PerSecond", "Horizon", "Stages", "Not A Name"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not in %v", want, err)
		}
	}
}

func rings(args ...any) map[string]rollout.Percent {
	m := map[string]rollout.Percent{}
	for i := 0; i < len(args); i += 2 {
		m[args[i].(string)] = rollout.Percent(args[i+1].(int))
	}
	return m
}

// aa is a record of n outcomes of two versions that do not differ, a second apart.
func aa(n int) []simulate.Recorded { return recorded(n, 5, 5) }

func recorded(n int, control, candidate float64) []simulate.Recorded {
	rng := rand.New(rand.NewPCG(7, 7))
	start := time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)
	var rs []simulate.Recorded
	for i := range n {
		c, percent := rollout.Control, control
		if i%2 == 1 {
			c, percent = rollout.Candidate, candidate
		}
		rs = append(rs, simulate.Recorded{
			Time: start.Add(time.Duration(i) * time.Second), Cohort: c,
			Observations: []rollout.Observation{rollout.Errors.Observe(rng.Float64()*100 < percent)},
		})
	}
	return rs
}

// half is a policy that compares from the first tick on, and waits for a proof.
func half() rollout.Policy {
	p := policy()
	p.Stages = rollout.Percentages(50, 100)
	p.Gates = []rollout.Gate{rollout.Errors.NoWorse(), rollout.Errors.AtMost(99)}
	return p
}

func TestReplay(t *testing.T) {
	rep, err := simulate.Replay(t.Context(), "test", half(), slices.Values(aa(4000)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if rep.State == rollout.RolledBack || rep.Incident != nil {
		t.Error("an A/A was rolled back:", rep)
	}
	if want := time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC); !rep.Start.Equal(want) {
		t.Error("it began at", rep.Start)
	}
	rep, err = simulate.Replay(t.Context(), "test", half(), slices.Values(recorded(4000, 5, 25)), nil)
	if err != nil || rep.State != rollout.RolledBack || rep.Incident.Gate != "errors.NoWorse" {
		t.Error(rep, err)
	}
}

// Scores and mixes are judged in a rehearsal, made up or recorded, and a candidate that is worse in either is found.
func TestScoresAndMixes(t *testing.T) {
	p := half()
	p.Gates = []rollout.Gate{grade.Within(.05), route.Within(.1)}
	stable := simulate.Scores{Mean: simulate.Always(.8), Spread: .15}
	parts := simulate.Parts{"near": simulate.Always(60), "far": simulate.Always(30), "lost": simulate.Always(10)}
	for _, c := range []struct {
		name  string
		score simulate.Scores
		parts simulate.Parts
		gate  string // "": it completes
	}{
		{"good", stable, nil, ""},
		{"worse score", simulate.Scores{Mean: simulate.Always(.65), Spread: .15}, nil, "grade.Within(0.05)"},
		{"other routes", stable, simulate.Parts{"near": simulate.Always(30), "far": simulate.Always(60), "lost": simulate.Always(10)}, "route.Within(0.1)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// What the rehearsal with made-up traffic saw is recorded, and must say the same again.
			var rs []simulate.Recorded
			start := time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)
			tr := simulate.Traffic{PerSecond: 20, Models: []simulate.Model{simulate.Score(grade, stable, c.score), simulate.Mix(route, parts, c.parts)}}
			tr.Models = append(tr.Models, func(q *simulate.Request, o *simulate.Outcome) {
				if q.Decision.Cohort() != rollout.None {
					rs = append(rs, simulate.Recorded{Time: start.Add(q.At), Unit: q.Unit, Cohort: q.Decision.Cohort(), Observations: slices.Clone(o.Observations)})
				}
			})
			made := run(t, p, tr, nil)
			again, err := simulate.Replay(t.Context(), "test", p, slices.Values(rs), nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, rep := range []simulate.Report{made, again} {
				if c.gate == "" {
					if rep.State != rollout.Completed {
						t.Error(rep)
					}
				} else if rep.State != rollout.RolledBack || rep.Incident.Gate != c.gate {
					t.Error(rep)
				}
				if g := rep.Gates[0]; math.Abs(g.Control.Mean-.8) > .02 || g.Control.N < 100 {
					t.Errorf("%+v", g)
				}
				g := rep.Gates[1].Control
				if n := g.Mix["near"] + g.Mix["far"] + g.Mix["other"]; n != g.N || g.Mix["other"] == 0 || g.Mix["near"] < g.Mix["far"] {
					t.Errorf("%+v", g)
				}
			}
			if made.End.Round(time.Minute) != again.End.Round(time.Minute) {
				t.Errorf("made up it took %v, replayed %v", made.End, again.End)
			}
		})
	}
}

// Recorded cohorts count as recorded, each outcome once, and where nobody compares they are skipped.
func TestReplayForcesCohorts(t *testing.T) {
	rs := aa(999)
	rs[10].Observations = nil // its outcome is not known
	p := half()
	p.Bake = time.Hour
	rep, err := simulate.Replay(t.Context(), "test", p, slices.Values(rs), nil)
	if err != nil {
		t.Fatal(err)
	}
	if rep.Candidate != 499 || rep.Control != 500 || rep.Requests != 999 || rep.Exposed != 499 || rep.Skipped != 0 {
		t.Errorf("%+v", rep)
	}
	if g := rep.Gates[0]; g.Candidate.N != 499 || g.Control.N != 499 {
		t.Errorf("the gate has seen %d and %d", g.Candidate.N, g.Control.N)
	}

	p.Rings = []rollout.Ring{{Name: "staff"}}
	p.Stages = append([]rollout.Stage{{Ring: "staff", Percent: 50, GuardOnly: true, Approval: true}}, p.Stages...)
	rs = aa(600)
	for i := range rs {
		rs[i].Unit.Key = []string{"ann", "bob", "cid"}[i%3]
		if i%3 == 0 {
			rs[i].Unit.Groups = []string{"staff"}
		}
	}
	rep, err = simulate.Replay(t.Context(), "test", p, slices.Values(rs), nil)
	if err != nil {
		t.Fatal(err)
	}
	if rep.Skipped != 400 || rep.Candidate != 100 || rep.Control != 100 || rep.Exposed != 1 {
		t.Errorf("%+v", rep)
	}
}

// Without a cohort the policy assigns, as it would a request.
func TestReplayAssigns(t *testing.T) {
	rs := aa(1000)
	want := 0
	for i := range rs {
		rs[i].Cohort = rollout.None
		rs[i].Unit.Key = "u" + time.Duration(i).String()
		if rollout.Bucket("test", rs[i].Unit.Key)>>63 == 0 {
			want++
		}
	}
	p := half()
	p.Bake = time.Hour
	rep, err := simulate.Replay(t.Context(), "test", p, slices.Values(rs), nil)
	if err != nil || rep.Candidate != want || rep.Control != 1000-want {
		t.Errorf("%d candidates, %d control, %v; want %d", rep.Candidate, rep.Control, err, want)
	}
}

func TestReplayRefuses(t *testing.T) {
	rs := aa(10)
	rs[4].Time = rs[3].Time // equal times are fine
	rs[7].Time = rs[5].Time
	for want, call := range map[string]func() error{
		"outcome 8 is of": func() error {
			_, err := simulate.Replay(t.Context(), "test", half(), slices.Values(rs), nil)
			return err
		},
		"outcome 1 is of": func() error {
			_, err := simulate.Replay(t.Context(), "test", half(), slices.Values(rs), &simulate.Options{Start: rs[1].Time})
			return err
		},
		"no outcome": func() error {
			_, err := simulate.Replay(t.Context(), "test", half(), slices.Values(rs[:0]), nil)
			return err
		},
		"nil": func() error {
			_, err := simulate.Replay(t.Context(), "test", half(), nil, nil)
			return err
		},
		"cohort of outcome 1": func() error {
			_, err := simulate.Replay(t.Context(), "test", half(), slices.Values([]simulate.Recorded{{Time: rs[0].Time, Cohort: 9}}), nil)
			return err
		},
		"outcome 1 has no time": func() error {
			_, err := simulate.Replay(t.Context(), "test", half(), slices.Values(make([]simulate.Recorded, 1)), nil)
			return err
		},
	} {
		if err := call(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestReplayHorizon(t *testing.T) {
	rep, err := simulate.Replay(t.Context(), "test", half(), slices.Values(aa(4000)), &simulate.Options{Horizon: time.Minute})
	if err != nil || rep.End != time.Minute || rep.Requests != 60 {
		t.Error(rep, err)
	}
}

// Rehearsals share nothing, whatever they are rehearsals of.
func TestAtTheSameTime(t *testing.T) {
	p, tr := policy(), everything()
	reports := make([]simulate.Report, 4)
	var all sync.WaitGroup
	for i := range reports {
		all.Go(func() { reports[i] = run(t, p, tr, &simulate.Options{Seed: 1, Horizon: 10 * time.Minute}) })
	}
	all.Wait()
	for _, rep := range reports {
		if asJSON(t, rep) != asJSON(t, reports[0]) {
			t.Errorf("%v\nand\n%v", rep, reports[0])
		}
	}
}

// A Check that does not return ends the rehearsal: how often it would be asked depends on real time.
func TestCheckHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		back := make(chan struct{})
		defer close(back)
		p := policy()
		p.Gates = append(p.Gates, rollout.Check("slow", func(context.Context) (rollout.Verdict, error) {
			<-back
			return rollout.Healthy, nil
		}))
		_, err := simulate.Run(t.Context(), "test", p, errorsAt(simulate.Always(1), nil), nil)
		if err == nil || !strings.Contains(err.Error(), `"slow" gave no answer`) {
			t.Error(err)
		}
	})
}

// A Source is read once a tick, and what it says is judged; one that says nothing proves nothing.
func TestSources(t *testing.T) {
	counts := func(bad float64) (simulate.Model, rollout.Source) {
		var n [2][2]float64
		count := func(q *simulate.Request, o *simulate.Outcome) {
			if c := q.Decision.Cohort(); c != rollout.None {
				i := int(c - rollout.Control)
				n[i][0]++
				if p := 1.0; q.Rand.Float64()*100 < p+float64(i)*(bad-p) {
					n[i][1]++
				}
			}
			o.Observe(rollout.Latency.Observe(time.Millisecond)) // or the guard would say that nothing comes of them
		}
		return count, rollout.SourceFunc(func(_ context.Context, add func(string, string, bool, []float64)) error {
			add("errors", "", false, n[0][:])
			add("errors", "", true, n[1][:])
			return nil
		})
	}
	broken := rollout.SourceFunc(func(context.Context, func(string, string, bool, []float64)) error { return errors.New("down") })
	for _, c := range []struct {
		name   string
		bad    float64
		broken bool
		want   rollout.State
	}{{"good", 1, false, rollout.Completed}, {"bad", 8, false, rollout.RolledBack}, {"down", 1, true, rollout.Running}} {
		t.Run(c.name, func(t *testing.T) {
			count, source := counts(c.bad)
			if c.broken {
				source = broken
			}
			rep := run(t, policy(), simulate.Traffic{PerSecond: 50, Models: []simulate.Model{count}},
				&simulate.Options{Horizon: time.Hour, Sources: map[string]rollout.Source{"errors": source}})
			if rep.State != c.want {
				t.Error(rep)
			}
			if n := rep.Gates[0].Candidate.N; c.broken != (n == 0) {
				t.Errorf("%d outcomes", n)
			}
		})
	}
	o := &simulate.Options{Sources: map[string]rollout.Source{"else": broken}}
	if _, err := simulate.Run(t.Context(), "test", policy(), errorsAt(simulate.Always(1), nil), o); err == nil || !strings.Contains(err.Error(), `"else"`) {
		t.Error(err)
	}
}

// A Source that does not return ends the rehearsal, as a Check does.
func TestSourceHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		back := make(chan struct{})
		defer close(back)
		hangs := rollout.SourceFunc(func(context.Context, func(string, string, bool, []float64)) error {
			<-back
			return nil
		})
		o := &simulate.Options{Sources: map[string]rollout.Source{"errors": hangs}}
		_, err := simulate.Run(t.Context(), "test", policy(), errorsAt(simulate.Always(1), nil), o)
		if err == nil || !strings.Contains(err.Error(), `"errors" gave no answer`) {
			t.Error(err)
		}
	})
}

// MayAdvance that is slow in real time is waited for: virtual time stands still.
func TestMayAdvanceTakesItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := policy()
		p.MayAdvance = func(time.Time) bool {
			time.Sleep(30 * time.Second)
			return true
		}
		rep := run(t, p, errorsAt(simulate.Always(1), nil), &simulate.Options{MayAdvance: true})
		if rep.State != rollout.Completed || rep.Stages[0].Entered != 0 {
			t.Error(rep)
		}
	})
}

// A stage that climbs, a hold and a gate that only reports are told.
func TestTimeline(t *testing.T) {
	p := policy()
	p.Stages = []rollout.Stage{{Percent: 50, Over: 8 * time.Minute}, {Percent: 100}}
	p.Gates = []rollout.Gate{rollout.Errors.Within(2).OnFail(rollout.Hold), rollout.Errors.AtMost(3).OnFail(rollout.Report)}
	rep := run(t, p, errorsAt(simulate.Always(1), simulate.Always(1).After(4*time.Minute, simulate.Always(20))), &simulate.Options{Horizon: 20 * time.Minute})
	if rep.State != rollout.Held || rep.End != 20*time.Minute || !strings.Contains(rep.Note, "errors.Within(2)") {
		t.Error(rep)
	}
	for _, want := range []string{"test v2: still held after 20m0s", "climbed: everyone ", "gate broken: errors.AtMost(3)", "held: errors.Within(2)"} {
		if !strings.Contains(rep.String(), want) {
			t.Errorf("%q is not in\n%s", want, rep)
		}
	}
}
