package simulate_test

import (
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

// BenchmarkRun is a rehearsal of an hour at 2,000 requests a second, with three rings and five gates.
func BenchmarkRun(b *testing.B) {
	latency := simulate.Durations{Median: 50 * time.Millisecond, Spread: .5}
	timeouts := rollout.NewRate("timeouts")
	p := rollout.Policy{
		Rings: []rollout.Ring{{Name: "staff"}, {Name: "beta"}},
		Stages: []rollout.Stage{
			{Ring: "staff", Percent: 100}, {Ring: "beta", Percent: 50}, {Percent: 1}, {Percent: 10}, {Percent: 50}, {Percent: 100},
		},
		Bake: 10 * time.Minute, Holdback: 5,
		Gates: []rollout.Gate{
			rollout.Errors.Within(1), rollout.Errors.AtMost(10), rollout.Latency.Quantile(.99).WithinFactor(1.2),
			rollout.Latency.Quantile(.5).WithinFactor(1.1), timeouts.Within(1),
		},
	}
	requests := 0
	for seed := range b.N {
		report, err := simulate.Run(b.Context(), "bench", p, simulate.Traffic{
			PerSecond: 2000, Units: 100_000, Skew: 1, Rings: map[string]rollout.Percent{"staff": 1, "beta": 9},
			Models: []simulate.Model{
				simulate.Rate(rollout.Errors, simulate.Always(1), nil),
				simulate.Timing(rollout.Latency, latency, latency),
				simulate.Rate(timeouts, simulate.Always(.5), nil),
			},
		}, &simulate.Options{Seed: uint64(seed), Horizon: 65 * time.Minute})
		if err != nil {
			b.Fatal(err)
		}
		requests += report.Requests
	}
	b.ReportMetric(float64(requests)/b.Elapsed().Seconds(), "requests/s")
}
