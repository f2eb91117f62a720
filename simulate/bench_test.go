package simulate_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

// BenchmarkRun is a rehearsal of an hour, with three rings and five gates, at several requests a second.
func BenchmarkRun(b *testing.B) {
	latency := simulate.Durations{Median: 50 * time.Millisecond, Spread: .5}
	scores := simulate.Scores{Mean: simulate.Always(.8), Spread: .15}
	p := rollout.Policy{
		Rings: []rollout.Ring{{Name: "staff"}, {Name: "beta"}},
		Stages: []rollout.Stage{
			{Ring: "staff", Percent: 100}, {Ring: "beta", Percent: 50}, {Percent: 1}, {Percent: 10}, {Percent: 50}, {Percent: 100},
		},
		Bake: 10 * time.Minute, Holdback: 5,
		Gates: []rollout.Gate{
			rollout.Errors.Within(1), rollout.Errors.AtMost(10), rollout.Latency.Quantile(.99).WithinFactor(1.2),
			grade.Within(.1), route.NoChange().OnFail(rollout.Report),
		},
	}
	for _, perSecond := range []float64{20, 200, 2000} {
		b.Run(fmt.Sprint(perSecond), func(b *testing.B) {
			requests, ticks := 0, 0
			for seed := range b.N {
				report, err := simulate.Run(b.Context(), "bench", p, simulate.Traffic{
					PerSecond: perSecond, Units: 100_000, Skew: 1, Rings: map[string]rollout.Percent{"staff": 1, "beta": 9},
					Models: []simulate.Model{
						simulate.Rate(rollout.Errors, simulate.Always(1), nil),
						simulate.Timing(rollout.Latency, latency, latency),
						simulate.Score(grade, scores, scores),
						simulate.Mix(route, simulate.Parts{"near": simulate.Always(3), "far": simulate.Always(1)}, nil),
					},
				}, &simulate.Options{Seed: uint64(seed), Horizon: time.Hour})
				if err != nil {
					b.Fatal(err)
				}
				requests += report.Requests
				ticks += int(report.End / (5 * time.Second))
			}
			b.ReportMetric(float64(requests)/b.Elapsed().Seconds(), "requests/s")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(ticks), "µs/tick")
		})
	}
}
