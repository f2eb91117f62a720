package simulate_test

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

// A candidate goes bad a quarter of an hour after the release began. How many users would have met it?
func ExampleRun() {
	policy := rollout.Policy{
		Stages:   rollout.Percentages(5, 25, 50, 100),
		Bake:     10 * time.Minute,
		Holdback: 5,
		Gates:    []rollout.Gate{rollout.Errors.Within(1)},
	}
	worse := simulate.Always(1).After(15*time.Minute, simulate.Always(8))
	report, err := simulate.Run(context.Background(), "checkout-v2", policy, simulate.Traffic{
		PerSecond: 100,
		Units:     10_000,
		Models:    []simulate.Model{simulate.Rate(rollout.Errors, simulate.Always(1), worse)},
	}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(report.State, "by", report.Incident.Gate)
	fmt.Println("in the stage", report.Stage)
	fmt.Println("exposed fewer than 5,000 users:", report.Exposed < 5000)
	// Output:
	// rolled back by errors.Within(1)
	// in the stage everyone 25 %
	// exposed fewer than 5,000 users: true
}

// Two versions answered the same questions, and somebody wrote down which answers were wrong.
func ExampleReplay() {
	wrong := rollout.NewRate("wrong")
	began := time.Date(2024, 5, 1, 9, 0, 0, 0, time.UTC)
	var outcomes []simulate.Recorded
	for i := range 400 {
		at := began.Add(time.Duration(i) * 10 * time.Second)
		outcomes = append(outcomes,
			simulate.Recorded{Time: at, Cohort: rollout.Control, Observations: []rollout.Observation{wrong.Observe(i%10 == 0)}},
			simulate.Recorded{Time: at, Cohort: rollout.Candidate, Observations: []rollout.Observation{wrong.Observe(i%3 == 0)}})
	}
	policy := rollout.Policy{
		Stages: []rollout.Stage{{Percent: 50}, {Percent: 100, Approval: true}},
		Bake:   time.Hour, Holdback: 5,
		Gates: []rollout.Gate{wrong.Within(5)},
	}
	report, err := simulate.Replay(context.Background(), "model-b", policy, slices.Values(outcomes), nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(report.State, "by", report.Incident.Gate)
	// Output: rolled back by wrong.Within(5)
}

// Any function of a request is a model: this one has cold caches, so the first request of each unit is slow.
func ExampleModel() {
	seen := map[string]bool{}
	cold := func(q *simulate.Request, o *simulate.Outcome) {
		took := 20 * time.Millisecond
		if q.Decision.Enabled() && !seen[q.Unit.Key] {
			seen[q.Unit.Key] = true
			took = 800 * time.Millisecond
		}
		o.Observe(rollout.Latency.Observe(took))
	}
	policy := rollout.Policy{
		Stages: rollout.Percentages(10, 50, 100), Bake: 10 * time.Minute, Holdback: 10,
		Gates: []rollout.Gate{rollout.Latency.Quantile(.99).WithinFactor(1.5)},
	}
	report, err := simulate.Run(context.Background(), "search-v2", policy,
		simulate.Traffic{PerSecond: 200, Units: 2000, Models: []simulate.Model{cold}}, &simulate.Options{Seed: 1})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(report.State, "by", report.Incident.Gate)
	// Output: rolled back by latency.Quantile(0.99).WithinFactor(1.5)
}
