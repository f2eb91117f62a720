package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/stagedrollout/rollout"
	rehearse "github.com/stagedrollout/rollout/simulate"
)

var (
	grade = rollout.NewScore("grade", 0, 1)
	route = rollout.NewMix("route", "search", "answer", "buy")
)

// shop is a policy as somebody would write it who has errors and latency of each request, a grade of some, and a route.
func shop() rollout.Policy {
	return rollout.Policy{
		Rings: []rollout.Ring{{Name: "staff"}, {Name: "beta"}},
		Stages: []rollout.Stage{
			{Ring: "staff", Percent: 50}, {Ring: "beta", Percent: 50}, // half of them, to compare with the other half
			{Percent: 5}, {Percent: 50}, {Percent: 100},
		},
		Bake: 10 * time.Minute, Holdback: 5,
		Gates: []rollout.Gate{
			rollout.Errors.Within(1), rollout.Errors.AtMost(10), rollout.Latency.Quantile(.99).WithinFactor(1.2),
			grade.Within(.1), route.Within(.1),
		},
	}
}

// candidate is what a version does otherwise than the one before.
type candidate struct {
	name    string
	stable  rehearse.Level // percentage of errors of the stable version
	errors  rehearse.Level // and of this one; nil: the same
	factor  float64        // on durations; 0: 1
	silent  rehearse.Level // percentage without an outcome
	silence rehearse.Level // the same of the stable version
}

// traffic is a shop's: 20,000 users, some busier than others, 2 % of them staff and 8 % beta.
func (k candidate) traffic(perSecond float64) rehearse.Traffic {
	stable := rehearse.Durations{Median: 50 * time.Millisecond, Spread: .5}
	slower := stable
	if k.factor > 0 {
		slower.Factor = rehearse.Always(k.factor)
	}
	grades := rehearse.Score(grade, rehearse.Scores{Mean: rehearse.Always(.8), Spread: .15}, rehearse.Scores{Mean: rehearse.Always(.8), Spread: .15})
	return rehearse.Traffic{
		PerSecond: perSecond, Units: 20_000, Skew: 1,
		Rings: map[string]rollout.Percent{"staff": 2, "beta": 8},
		Models: []rehearse.Model{
			rehearse.Rate(rollout.Errors, k.stable, k.errors),
			rehearse.Timing(rollout.Latency, stable, slower),
			func(q *rehearse.Request, o *rehearse.Outcome) {
				if q.Rand.IntN(5) == 0 { // a grade costs something
					grades(q, o)
				}
			},
			rehearse.Mix(route, rehearse.Parts{"search": rehearse.Always(60), "answer": rehearse.Always(30), "buy": rehearse.Always(8), "else": rehearse.Always(2)}, nil),
			rehearse.Lost(k.silence, k.silent),
		},
	}
}

// whole is how many runs of a whole policy are made.
func (c *config) whole() int {
	if c.short {
		return max(c.runs/25, 2) // one for each worker
	}
	return max(c.runs/10, 20)
}

// rehearsed are the reports of so many runs, made two at a time. make gives each run its own policy and options, because
// what they call remembers things.
func (c *config) rehearsed(runs int, t rehearse.Traffic, make func() (rollout.Policy, *rehearse.Options)) []rehearse.Report {
	reports := newReports(runs)
	var wg sync.WaitGroup
	const workers = 2
	for w := range workers {
		wg.Go(func() {
			for i := w; i < runs; i += workers {
				p, o := make()
				o.Seed = c.seed + uint64(i)
				r, err := rehearse.Run(context.Background(), fmt.Sprint("shop-", o.Seed), p, t, o) // each with other units first
				if err != nil {
					panic(err) // a mistake in the tables
				}
				reports[i] = r
			}
		})
	}
	wg.Wait()
	return reports
}

func newReports(n int) []rehearse.Report { return make([]rehearse.Report, n) }

// part is the part of the reports that are so.
func part(reports []rehearse.Report, so func(*rehearse.Report) bool) float64 {
	n := 0.
	for i := range reports {
		if so(&reports[i]) {
			n++
		}
	}
	return n / float64(len(reports))
}

func completed(r *rehearse.Report) bool  { return r.State == rollout.Completed }
func rolledBack(r *rehearse.Report) bool { return r.State == rollout.RolledBack }
func held(r *rehearse.Report) bool       { return r.State == rollout.Held }

// middle is the median of a number of each report that is so; +Inf of each other.
func middle(reports []rehearse.Report, so func(*rehearse.Report) bool, of func(*rehearse.Report) float64) float64 {
	var v []float64
	for i := range reports {
		x := math.Inf(1)
		if so(&reports[i]) {
			x = of(&reports[i])
		}
		v = append(v, x)
	}
	slices.Sort(v)
	return v[len(v)/2]
}

func took(r *rehearse.Report) float64     { return r.End.Seconds() }
func requests(r *rehearse.Report) float64 { return float64(r.Requests) }
func exposed(r *rehearse.Report) float64  { return float64(r.Candidate) }

// seconds is a time for people.
func seconds(s float64) string {
	if math.IsInf(s, 1) {
		return "never"
	}
	return time.Duration(s * float64(time.Second)).Round(time.Second).String()
}

func number(x float64) string {
	if math.IsInf(x, 1) {
		return "never"
	}
	return fmt.Sprintf("%.0f", x)
}

// policies: what becomes of good and bad releases under a whole policy.
func policies(c *config) table {
	runs := c.whole()
	t := table{
		title: fmt.Sprintf("Whole policies: three rings, five gates, five stages of 10 min, 24 h, %d runs each", runs),
		head:  []string{"requests/s", "release", "completed", "rolled back", "held", "time, median", "candidate requests until then", "must be"},
	}
	good := func(base float64) candidate {
		return candidate{name: fmt.Sprintf("good, %g %% errors", base), stable: rehearse.Always(base)}
	}
	one := rehearse.Always(1)
	struck := func(at time.Duration) bool { return at%time.Hour >= 5*time.Minute && at%time.Hour < 10*time.Minute }
	incident := func(q *rehearse.Request) float64 { // of both versions
		if struck(q.At) {
			return 20
		}
		return 1
	}
	// Above 10 % AtMost holds, since both cohorts are: somebody resumes when it is over.
	resume := func(ctx context.Context, at time.Duration, r *rollout.Rollout) error {
		if struck(at) || r.Status().State != rollout.Held {
			return nil
		}
		return r.Resume(ctx, "the incident is over")
	}
	after := func(k candidate, at time.Duration) func(*rehearse.Report) float64 {
		return func(r *rehearse.Report) float64 { return took(r) - at.Seconds() }
	}
	limits := map[float64]time.Duration{2: 10 * time.Hour, 20: 2 * time.Hour, 200: 65 * time.Minute, 2000: 65 * time.Minute}
	for _, perSecond := range []float64{2, 20, 200, 2000} {
		for _, k := range []struct {
			candidate
			bad   bool
			onset time.Duration
			goal  bool // of the time it takes
			watch bool // somebody resumes
		}{
			{candidate: good(.1)},
			{candidate: good(1), goal: true},
			{candidate: good(5)},
			{candidate: candidate{name: "good, 1 % errors, both × 20 for 5 min each hour", stable: incident}, watch: true},
			{candidate: candidate{name: "errors 1 → 4 %", stable: one, errors: rehearse.Always(4)}, bad: true},
			{candidate: candidate{name: "errors 1 → 5 %", stable: one, errors: rehearse.Always(5)}, bad: true},
			{candidate: candidate{name: "1 % errors, everything × 1.5 slower", stable: one, factor: 1.5}, bad: true},
			{candidate: candidate{name: "1 % errors, hangs from 15 min on", stable: one, silent: rehearse.Level(nil).After(15*time.Minute, rehearse.Always(100))}, bad: true, onset: 15 * time.Minute},
		} {
			name := fmt.Sprintf("%g/s %s", perSecond, k.name)
			if c.short && (perSecond != 20 || !k.goal && !k.bad) || c.cells != nil && !c.cells.MatchString(name) {
				continue
			}
			rs := c.rehearsed(runs, k.traffic(perSecond), func() (rollout.Policy, *rehearse.Options) {
				o := &rehearse.Options{}
				if k.watch {
					o.Operator = resume
				}
				return shop(), o
			})
			done, back, wait := part(rs, completed), part(rs, rolledBack), part(rs, held)
			ends := completed
			ok, must := back <= most(alpha, runs), "rolled back ≤ 0.01"
			if k.bad {
				ends, ok, must = rolledBack, done == 0, "none completed"
			}
			time := middle(rs, ends, after(k.candidate, k.onset))
			until := "" // of what completes it says nothing
			if k.bad {
				until = number(middle(rs, ends, exposed))
			}
			if k.goal {
				limit := limits[perSecond]
				ok = ok && time <= limit.Seconds()
				must += ", " + limit.String()
			}
			t.add(ok, fmt.Sprint(perSecond), k.name, rate3(done), rate3(back), rate3(wait), seconds(time), until, must)
		}
	}
	return t
}

func rate3(x float64) string { return fmt.Sprintf("%.3f", x) }

// silence: how soon a candidate that gives no outcomes is found.
func silence(c *config) table {
	runs := c.whole()
	t := table{
		title: fmt.Sprintf("A candidate that goes silent at 2 requests/s, %d runs each", runs),
		head:  []string{"gates", "candidate", "share", "rolled back", "time, median / 9 of 10", "decisions in all, median", "candidate's", "must be"},
	}
	for _, gates := range []int{5, 1} {
		for _, k := range []struct {
			name      string
			lost      float64
			share     rollout.Percent
			within    time.Duration
			decisions float64
			own       float64 // decisions of the candidate
		}{
			// At 1 % the candidate gets a request in 50 s, and it takes units of three groups at least, since one may be a unit
			// in trouble: two minutes are too few.
			{"hangs", 100, 1, 0, 0, 8},
			{"hangs", 100, 5, 2 * time.Minute, 0, 0},
			{"hangs", 100, 50, 2 * time.Minute, 0, 0},
			{"half of its outcomes are missing", 50, 5, 0, 400, 0},
		} {
			if c.skip(k.name, float64(k.share)/100) {
				continue
			}
			b := candidate{stable: rehearse.Always(1), silence: rehearse.Always(.1), silent: rehearse.Always(k.lost)}
			traffic := b.traffic(2)
			traffic.Rings = nil
			rs := c.rehearsed(runs, traffic, func() (rollout.Policy, *rehearse.Options) {
				p := shop()
				p.Rings, p.Gates = nil, p.Gates[:gates]
				p.Stages = []rollout.Stage{{Percent: k.share, Approval: true}, {Percent: 100}}
				return p, &rehearse.Options{Horizon: 2 * time.Hour}
			})
			time := middle(rs, rolledBack, took)
			all := middle(rs, rolledBack, requests)
			own := middle(rs, rolledBack, exposed)
			ok, must := k.within == 0 || time <= k.within.Seconds(), fmt.Sprintf("≤ %v", k.within)
			if k.decisions > 0 {
				ok, must = all <= k.decisions*c.slack(), fmt.Sprintf("≤ %g decisions", k.decisions)
			}
			if k.own > 0 {
				ok, must = own <= k.own, fmt.Sprintf("≤ %g of the candidate's", k.own)
			}
			if gates != 5 {
				ok, must = true, ""
			}
			t.add(ok, fmt.Sprint(gates), k.name, percent(float64(k.share)/100), rate3(part(rs, rolledBack)),
				seconds(time)+" / "+seconds(late90(rs)), number(all), number(own), must)
		}
	}
	return t
}

// late90 is the time until nine of ten are rolled back.
func late90(rs []rehearse.Report) float64 {
	var v []float64
	for i := range rs {
		x := math.Inf(1)
		if rolledBack(&rs[i]) {
			x = took(&rs[i])
		}
		v = append(v, x)
	}
	slices.Sort(v)
	return v[len(v)*9/10]
}

// rings: what is wrong in one ring alone is rolled back there alone.
func rings(c *config) table {
	runs := c.whole()
	t := table{
		title: fmt.Sprintf("Errors 1 → 6 %% in the ring beta alone, RollbackRing, 200 requests/s, %d runs each", runs),
		head:  []string{"since", "beta alone is rolled back, others untouched", "another ring, or everything", "nothing", "time, median", "candidate requests in all, median", "must be"},
	}
	one, six := rehearse.Always(1), rehearse.Always(6)
	for _, k := range []struct {
		name string
		at   time.Duration
	}{{"the beginning", 0}, {"35 min, at 50 % of everyone", 35 * time.Minute}} {
		if c.short && k.at > 0 || c.cells != nil && !c.cells.MatchString(k.name) {
			continue
		}
		b := candidate{stable: one, errors: one.After(k.at, one.In("beta", six))}
		alone, wrong := map[*rehearse.Report]bool{}, map[*rehearse.Report]bool{}
		const horizon = time.Hour
		rs := c.rehearsed(runs, b.traffic(200), func() (rollout.Policy, *rehearse.Options) {
			p := shop()
			for i := range p.Gates {
				p.Gates[i] = p.Gates[i].OnFail(rollout.RollbackRing)
			}
			return p, &rehearse.Options{Horizon: horizon}
		})
		for i := range rs {
			back, others, before := false, false, rollout.Percent(0)
			for _, e := range rs[i].Events {
				switch e.Kind {
				case rollout.StageEntered:
					others = others || e.Percent < before && e.Ring == rollout.Everyone
					if e.Ring == rollout.Everyone {
						before = e.Percent
					}
				case rollout.RingRolledBack:
					back, others = back || e.Ring == "beta", others || e.Ring != "beta"
				case rollout.RollbackBegan, rollout.SteppedBack:
					others = true
				}
			}
			alone[&rs[i]], wrong[&rs[i]] = back && !others, others
		}
		good := func(r *rehearse.Report) bool { return alone[r] }
		p := part(rs, good)
		found := middle(rs, good, func(r *rehearse.Report) float64 { return ringTime(r) - k.at.Seconds() })
		t.add(p >= .95 || c.short && p > 0, k.name, rate3(p), rate3(part(rs, func(r *rehearse.Report) bool { return wrong[r] })),
			rate3(part(rs, func(r *rehearse.Report) bool { return !alone[r] && !wrong[r] })), seconds(found), number(middle(rs, good, exposed)), "≥ 0.95")
	}
	return t
}

// ringTime is when a ring was rolled back.
func ringTime(r *rehearse.Report) float64 {
	for _, e := range r.Events {
		if e.Kind == rollout.RingRolledBack {
			return e.Time.Sub(r.Start).Seconds()
		}
	}
	return math.Inf(1)
}

// absence: where nothing is known nothing is promoted.
func absence(c *config) table {
	runs := c.whole()
	if c.short {
		runs = max(runs/4, 1) // what cannot happen shows in one
	}
	t := table{
		title: fmt.Sprintf("Evidence that never comes, 20 requests/s for 3 h, without the guard of outcomes, %d runs each", runs),
		head:  []string{"what is missing", "proof asked at each stage: left the first", "the whole policy: passed the first stage with proof", "must be"},
	}
	says := func(err error, values ...float64) func(...string) map[string]rollout.Source {
		return func(rings ...string) map[string]rollout.Source {
			return map[string]rollout.Source{"errors": rollout.SourceFunc(func(_ context.Context, add func(string, string, bool, []float64)) error {
				for _, ring := range rings {
					if values != nil {
						add("errors", ring, false, values)
						add("errors", ring, true, values)
					}
				}
				return err
			})}
		}
	}
	none := func(...string) map[string]rollout.Source { return nil }
	one, all := rehearse.Always(1), rehearse.Always(100)
	for _, k := range []struct {
		candidate
		sources func(rings ...string) map[string]rollout.Source
	}{
		{candidate{name: "every outcome", stable: one, silent: all, silence: all}, none},
		{candidate{name: "the candidate's outcomes", stable: one, silent: all}, none},
		{candidate{name: "the control's outcomes", stable: one, silent: rehearse.Always(0), silence: all}, none},
		{candidate{name: "errors: the source fails", stable: one}, says(fmt.Errorf("down"))},
		{candidate{name: "errors: the source says NaN", stable: one}, says(nil, math.NaN(), math.NaN())},
		{candidate{name: "errors: the source says nothing", stable: one}, says(nil)},
		{candidate{name: "errors: the source always says the same", stable: one}, says(nil, 1e6, 0)},
	} {
		if c.cells != nil && !c.cells.MatchString(k.name) {
			continue
		}
		horizon := 3 * time.Hour
		if c.short {
			horizon = 90 * time.Minute
		}
		make := func(strict bool) func() (rollout.Policy, *rehearse.Options) {
			return func() (rollout.Policy, *rehearse.Options) {
				p := shop()
				p.Without = []string{rollout.GuardNoOutcome}
				names := []string{"staff", "beta", rollout.Everyone}
				if strict {
					names = names[2:]
					p.Rings, p.Stages, p.ProveFrom = nil, rollout.Percentages(5, 25, 50, 100), 5
				}
				return p, &rehearse.Options{Horizon: horizon, Sources: k.sources(names...)}
			}
		}
		traffic := k.traffic(20)
		strict := part(c.rehearsed(runs, traffic, make(true)), func(r *rehearse.Report) bool { return len(r.Stages) > 1 || completed(r) })
		whole := part(c.rehearsed(runs, traffic, make(false)), func(r *rehearse.Report) bool { return len(r.Stages) > 4 || completed(r) })
		t.add(strict+whole == 0, k.name, rate3(strict), rate3(whole), "0")
	}
	return t
}
