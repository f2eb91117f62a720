package simulate_test

import (
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

// watch runs an hour of traffic and shows each request and its outcome.
func watch(t *testing.T, tr simulate.Traffic, see func(*simulate.Request, *simulate.Outcome)) simulate.Report {
	t.Helper()
	p := policy()
	p.Gates = []rollout.Gate{rollout.Errors.AtMost(99).OnFail(rollout.Report)}
	p.Stages = []rollout.Stage{{Percent: 50, Approval: true}, {Percent: 100, Approval: true}}
	p.Rings = []rollout.Ring{{Name: "staff"}}
	p.Metrics = []rollout.Metric{rollout.NewRate("other")}
	tr.Models = append(tr.Models, see)
	return run(t, p, tr, &simulate.Options{Seed: 3, Horizon: time.Hour})
}

// near fails unless a part x of n chances is what p percent can be expected to give, within five standard deviations.
func near(t *testing.T, what string, x, n int, p float64) {
	t.Helper()
	mean, sd := float64(n)*p/100, math.Sqrt(float64(n)*p/100*(1-p/100))
	if math.Abs(float64(x)-mean) > 5*sd+1e-9 {
		t.Errorf("%s: %d of %d; %.0f is expected, with a standard deviation of %.1f", what, x, n, mean, sd)
	}
}

// bad are the observations of an outcome that say that it was bad.
func bad(o *simulate.Outcome, m rollout.Rate) bool {
	for _, obs := range o.Observations {
		if obs == m.Observe(true) {
			return true
		}
	}
	return false
}

func TestLevels(t *testing.T) {
	one, nine := simulate.Always(1), simulate.Always(9)
	twice := simulate.Level(nil).During(0, time.Hour, one).Times(2)
	for _, c := range []struct {
		name  string
		level simulate.Level
		at    time.Duration
		want  float64
	}{
		{"always", one, 5, 1},
		{"nil, outside", simulate.Level(nil).After(10, one), 9, 0},
		{"after", one.After(10, nine), 9, 1},
		{"after", one.After(10, nine), 10, 9},
		{"during", one.During(10, 20, nine), 9, 1},
		{"during", one.During(10, 20, nine), 10, 9},
		{"during", one.During(10, 20, nine), 20, 1},
		{"climb", one.Climb(10, 20, nine), 10, 1},
		{"climb", one.Climb(10, 20, nine), 15, 5},
		{"climb", one.Climb(10, 20, nine), 21, 9},
		{"swing", one.Swing(40, .5), 10, 1.5},
		{"swing", one.Swing(40, .5), 30, .5},
		{"times", twice, 5, 2},
		{"by unit, none", simulate.Always(0).ByUnit(.1), 5, 0},
		{"by unit, all", simulate.Always(100).ByUnit(.1), 5, 100},
	} {
		if got := c.level(&simulate.Request{At: c.at}); math.Abs(got-c.want) > 1e-12 {
			t.Errorf("%s at %v: %v, not %v", c.name, c.at, got, c.want)
		}
	}
}

func TestRateModel(t *testing.T) {
	// Ten points worse from half an hour on, and only for staff.
	worse := simulate.Always(5).In("staff", simulate.Always(5).After(30*time.Minute, simulate.Always(15)))
	type key struct{ enabled, staff, late bool }
	n, x := map[key]int{}, map[key]int{}
	tr := errorsAt(simulate.Always(5), worse)
	tr.Rings = map[string]rollout.Percent{"staff": 30}
	watch(t, tr, func(q *simulate.Request, o *simulate.Outcome) {
		k := key{q.Decision.Enabled(), q.Decision.Ring() == "staff", q.At >= 30*time.Minute}
		n[k]++
		if bad(o, rollout.Errors) {
			x[k]++
		}
	})
	if len(n) != 8 {
		t.Fatal(n)
	}
	for k := range n {
		want := 5.0
		if k == (key{true, true, true}) {
			want = 15
		}
		near(t, "errors", x[k], n[k], want)
	}
}

// Units whose requests fail together: the mean is kept, and the variance between units is what the correlation says.
func TestByUnit(t *testing.T) {
	const icc, mean = .3, 20.0
	n, x := map[string]float64{}, map[string]float64{}
	watch(t, errorsAt(simulate.Always(mean).ByUnit(icc), nil), func(q *simulate.Request, o *simulate.Outcome) {
		n[q.Unit.Key]++
		if bad(o, rollout.Errors) {
			x[q.Unit.Key]++
		}
	})
	sum, squares := 0.0, 0.0
	for u := range n {
		p := x[u] / n[u]
		sum += p
		// Less what 360 requests of one unit vary by themselves.
		squares += (p-mean/100)*(p-mean/100) - p*(1-p)/(n[u]-1)
	}
	units := float64(len(n))
	if got := 100 * sum / units; math.Abs(got-mean) > 4 { // standard deviation 1
		t.Errorf("the mean is %.1f", got)
	}
	if got := squares / units / (mean / 100 * (1 - mean/100)); math.Abs(got-icc) > .08 { // standard deviation .02
		t.Errorf("the correlation is %.3f, not %v", got, icc)
	}
}

func TestTimingModel(t *testing.T) {
	stable := simulate.Durations{Median: 100 * time.Millisecond, Spread: .5, Slow: simulate.Always(4), SlowBy: 100}
	slower := stable
	slower.Factor = simulate.Always(2)
	m := rollout.NewTiming("other")
	var n, over, slow [2]int
	watch(t, simulate.Traffic{PerSecond: 50, Units: 100, Models: []simulate.Model{simulate.Timing(m, stable, slower), simulate.Delay(stable, slower)}},
		func(q *simulate.Request, o *simulate.Outcome) {
			i, factor := 0, time.Duration(1)
			if q.Decision.Enabled() {
				i, factor = 1, 2
			}
			n[i]++
			if o.Delay > factor*100*time.Millisecond {
				over[i]++
			}
			if o.Delay > factor*2*time.Second {
				slow[i]++
			}
			if len(o.Observations) != 1 {
				t.Fatal("no observation")
			}
		})
	for i := range n {
		near(t, "over the median", over[i], n[i], 52)
		near(t, "slow", slow[i], n[i], 4)
	}
}

// values are the observations of each of some models, by whether the request got the candidate.
func values(t *testing.T, models []simulate.Model) [][2][]rollout.Observation {
	got := make([][2][]rollout.Observation, len(models))
	var each []simulate.Model
	for i, m := range models {
		each = append(each, func(q *simulate.Request, o *simulate.Outcome) {
			before := len(o.Observations)
			m(q, o)
			c := 0
			if q.Decision.Enabled() {
				c = 1
			}
			got[i][c] = append(got[i][c], o.Observations[before:]...)
		})
	}
	watch(t, simulate.Traffic{PerSecond: 50, Units: 100, Models: each}, func(*simulate.Request, *simulate.Outcome) {})
	return got
}

func TestScoreModel(t *testing.T) {
	m := rollout.NewScore("other", -1, 3)
	// A Spread of 2 is half the range: two heaps at the ends. One of 0 is the mean each time.
	cases := []struct{ mean, spread float64 }{{2, .5}, {1, .25}, {1, 2}, {2.5, 0}, {-1, .5}, {3, .5}}
	var models []simulate.Model
	for _, c := range cases {
		models = append(models, simulate.Score(m, simulate.Scores{Mean: simulate.Always(1), Spread: .3, Low: -1, High: 3},
			simulate.Scores{Mean: simulate.Always(c.mean), Spread: c.spread, Low: -1, High: 3}))
	}
	got := values(t, models)
	for k, c := range cases {
		for i, want := range []struct{ mean, spread float64 }{{1, .3}, {c.mean, c.spread}} {
			n, sum, squares := float64(len(got[k][i])), 0.0, 0.0
			for _, o := range got[k][i] {
				x := math.Float64frombits(reflect.ValueOf(o).FieldByName("value").Uint())
				if x < -1 || x > 3 {
					t.Fatalf("%v is not of the range", x)
				}
				sum += x
				squares += (x - want.mean) * (x - want.mean)
			}
			if want.mean == -1 || want.mean == 3 {
				want.spread = 0
			}
			if off := math.Abs(sum/n - want.mean); n == 0 || off > 5*want.spread/math.Sqrt(n)+1e-9 {
				t.Errorf("%v: the mean of %v is off by %v", want, n, off)
			}
			if sd := math.Sqrt(squares / n); math.Abs(sd-want.spread) > .03*want.spread+1e-9 {
				t.Errorf("%v: the standard deviation is %v", want, sd)
			}
		}
	}
}

func TestMixModel(t *testing.T) {
	m := rollout.NewMix("other", "a", "b", "c")
	stable := simulate.Parts{"a": simulate.Always(6), "b": simulate.Always(3), "c": simulate.Always(1)}
	cases := []struct {
		candidate simulate.Parts
		want      [3]float64
	}{
		{simulate.Parts{"a": simulate.Always(30), "c": simulate.Always(60), "b": simulate.Always(10)}, [3]float64{30, 10, 60}},
		{nil, [3]float64{60, 30, 10}},
		{simulate.Parts{"a": nil, "b": simulate.Level(nil).After(0, simulate.Always(1))}, [3]float64{0, 100, 0}},
	}
	var models []simulate.Model
	for _, c := range cases {
		models = append(models, simulate.Mix(m, stable, c.candidate))
	}
	got := values(t, append(models, simulate.Mix(m, simulate.Parts{"a": nil}, nil)))
	for k, c := range cases {
		for i, want := range [2][3]float64{{60, 30, 10}, c.want} {
			n := map[rollout.Observation]int{}
			for _, o := range got[k][i] {
				n[o]++
			}
			for j, label := range []string{"a", "b", "c"} {
				near(t, label, n[m.Observe(label)], len(got[k][i]), want[j])
			}
			if len(got[k][i]) == 0 {
				t.Error("nothing was observed")
			}
		}
	}
	if none := got[len(cases)]; len(none[0])+len(none[1]) != 0 {
		t.Error("something was observed of no parts")
	}
}

// Outcomes that come late are late in virtual time, and what is lost never comes.
func TestDelayAndLoss(t *testing.T) {
	tr := errorsAt(simulate.Always(1), nil)
	late := simulate.Durations{Median: 2 * time.Minute}
	tr.Models = append(tr.Models, simulate.Delay(late, late), simulate.Lost(nil, simulate.Always(0).After(10*time.Minute, simulate.Always(100))))
	p := policy()
	p.Stages[0].Approval = true
	rep := run(t, p, tr, &simulate.Options{Horizon: 2*time.Minute - time.Second})
	if g := rep.Gates[0]; g.Candidate.N+g.Control.N != 0 {
		t.Errorf("outcomes came early: %+v", g)
	}
	rep = run(t, p, tr, &simulate.Options{Horizon: 3 * time.Minute})
	if g := rep.Gates[0]; g.Control.N < 2400 || g.Control.N > 3000 { // of a minute, 95 or 90 % of 3,000
		t.Errorf("%+v", g)
	}
	rep = run(t, p, tr, &simulate.Options{Horizon: 20 * time.Minute})
	long := run(t, p, tr, &simulate.Options{Horizon: 40 * time.Minute})
	if a, b := rep.Gates[0], long.Gates[0]; a.Candidate.N != b.Candidate.N || a.Control.N >= b.Control.N {
		t.Errorf("candidate %d and then %d outcomes, control %d and then %d", a.Candidate.N, b.Candidate.N, a.Control.N, b.Control.N)
	}
}

func TestPopulation(t *testing.T) {
	tr := simulate.Traffic{PerSecond: 100, Load: simulate.Always(1).During(20*time.Minute, 40*time.Minute, nil), Units: 1000, Skew: 1.5, Rings: map[string]rollout.Percent{"staff": 20}}
	requests, staff := map[string]int{}, map[string]bool{}
	var early, quiet, late int
	watch(t, tr, func(q *simulate.Request, _ *simulate.Outcome) {
		requests[q.Unit.Key]++
		if q.Decision.Ring() == "staff" {
			staff[q.Unit.Key] = true
		}
		switch {
		case q.At < 20*time.Minute:
			early++
		case q.At < 40*time.Minute:
			quiet++
		default:
			late++
		}
	})
	near(t, "staff", len(staff), 1000, 20)
	if quiet > 1 || early < 118_000 || early > 122_000 || late < 118_000 || late > 122_000 {
		t.Errorf("%d, %d and %d requests in 20 min each", early, quiet, late)
	}
	most, all := 0, 0
	for _, n := range requests {
		most = max(most, n)
		all += n
	}
	if most < all/100 { // of a thousand alike none has 1 %
		t.Errorf("the most active of %d units has %d of %d requests", len(requests), most, all)
	}
}

func TestLoopers(t *testing.T) {
	other := rollout.NewRate("other")
	tr := errorsAt(simulate.Always(0), nil)
	tr.Models = append(tr.Models, simulate.Rate(other, simulate.Always(0), nil))
	tr.Loopers = []simulate.Looper{{Cohort: rollout.Candidate, Percent: 10}, {Cohort: rollout.Control, Percent: 5, Event: other}}
	n, failed, others, keys := map[rollout.Cohort]int{}, map[rollout.Cohort]int{}, map[rollout.Cohort]int{}, map[string]bool{}
	watch(t, tr, func(q *simulate.Request, o *simulate.Outcome) {
		c := q.Decision.Cohort()
		n[c]++
		if bad(o, rollout.Errors) {
			failed[c]++
			keys[q.Unit.Key] = true
		}
		if bad(o, other) {
			others[c]++
			keys[q.Unit.Key] = true
		}
	})
	near(t, "candidate", failed[rollout.Candidate], n[rollout.Candidate], 10)
	near(t, "control", others[rollout.Control], n[rollout.Control], 5)
	if len(keys) != 2 || failed[rollout.Control]+others[rollout.Candidate] != 0 {
		t.Error(keys, failed, others)
	}
}
