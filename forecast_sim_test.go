package rollout_test

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
)

// TestForecastOfSimulatedPolicy compares the forecast with whole policies in virtual time, of -sim.runs runs each. Times
// are compared within 20 %, what takes six bakes of ten minutes within 3 %. Requests come five times as fast once a stage
// is entered, so of these the planned median must be no further out than 3 and 7 of 10 runs, and two standard errors.
func TestForecastOfSimulatedPolicy(t *testing.T) {
	if raced {
		t.Skip("nothing in it is concurrent, and it would take minutes")
	}
	runs := *simRuns
	for _, c := range []struct {
		rate   float64
		points float64
	}{{5, 3}, {20, 3}, {200, 3}, {20, 6}} {
		f, err := checkout().Forecast(rollout.Traffic{
			PerSecond: c.rate,
			Rings:     map[string]rollout.Percent{"staff": 2},
			Rates:     map[string]rollout.Percent{"errors": 1},
			Timings:   map[string]rollout.Durations{"latency": {50 * time.Millisecond, 160 * time.Millisecond}},
			Worse:     map[string]rollout.Worsening{"errors": {Points: rollout.Percent(c.points)}},
		})
		if err != nil {
			t.Fatal(err)
		}
		var good, bad, requests []float64
		for seed := range runs {
			if end := release(t, c.rate, 1, 1, uint64(seed)); end.State == rollout.Completed {
				good = append(good, end.End.Seconds())
			}
			end := release(t, c.rate, 1, 1+c.points, uint64(seed))
			bad, requests = append(bad, end.End.Seconds()), append(requests, float64(end.Candidate))
		}
		for _, v := range [][]float64{good, bad, requests} {
			slices.Sort(v)
		}
		line := func(what string, planned, got, off float64) {
			t.Logf("%g rps, +%g points: %s %.0f planned, %.0f simulated: %.2f", c.rate, c.points, what, planned, got, planned/got)
			if off += 2 / math.Sqrt(float64(runs)) * off; !(planned < got*(1+off) && planned > got/(1+off)) {
				t.Errorf("%s is off by more than %.2g", what, off)
			}
		}
		off := .03
		if c.rate < 20 {
			off = .2
		}
		line("a good release, seconds,", f.Duration.P50.Seconds(), good[len(good)/2], off)
		line("a bad one, seconds,", f.Catch.Time.P50.Seconds(), bad[runs/2], .2)
		below, _ := slices.BinarySearch(requests, f.Catch.Requests.P50)
		t.Logf("%g rps, +%g points: a bad one, requests, %.0f planned, %.0f simulated; %d of %d had less than planned",
			c.rate, c.points, f.Catch.Requests.P50, requests[runs/2], below, runs)
		if rank := float64(below) / float64(runs); math.Abs(rank-.5) > .2+1/math.Sqrt(float64(runs)) {
			t.Errorf("%.2f of the runs had less requests than half should have had", rank)
		}
	}
}
