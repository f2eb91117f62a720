package rollout_test

import (
	"flag"
	"slices"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

var simRuns = flag.Int("sim.runs", 8, "runs of each whole-policy simulation")

func checkout() rollout.Policy { return rollout.Checkout() }

// release takes the policy through virtual time, with requests at random, 2 % of them from staff, and errors of so many
// percent of the stable version and of the candidate.
func release(tb testing.TB, perSecond, stable, candidate float64, seed uint64) simulate.Report {
	tb.Helper()
	latency := simulate.Durations{Median: 50 * time.Millisecond, Spread: .5}
	report, err := simulate.Run(tb.Context(), "sim", checkout(), simulate.Traffic{
		PerSecond: perSecond,
		Rings:     map[string]rollout.Percent{"staff": 2},
		Models: []simulate.Model{
			simulate.Rate(rollout.Errors, simulate.Always(stable), simulate.Always(candidate)),
			simulate.Timing(rollout.Latency, latency, latency),
		},
	}, &simulate.Options{Seed: seed})
	if err != nil {
		tb.Fatal(err)
	}
	return report
}

// TestSimulatedPolicy: the policy of the first example completes a good release in time, and never a bad one.
func TestSimulatedPolicy(t *testing.T) {
	for _, c := range []struct {
		name   string
		rate   float64
		within time.Duration // median of a good release
	}{{"20 rps", 20, 2 * time.Hour}, {"200 rps", 200, 65 * time.Minute}} {
		t.Run(c.name, func(t *testing.T) {
			if raced {
				t.Skip("nothing in it is concurrent, and it would take minutes")
			}
			runs := *simRuns
			var took []time.Duration
			for seed := range runs {
				end := release(t, c.rate, 1, 1, uint64(seed))
				if end.State == rollout.Completed {
					took = append(took, end.End)
				} else {
					t.Logf("seed %d: %v after %v", seed, end.State, end.End)
				}
			}
			slices.Sort(took)
			if len(took) == 0 {
				t.Fatal("no good release completed")
			}
			median := took[len(took)/2]
			t.Logf("good: %d of %d complete, median %v, p90 %v", len(took), runs, median, took[len(took)*9/10])
			if least := int(.99 * float64(runs)); len(took) < least {
				t.Errorf("%d of %d good releases completed; %d is the least", len(took), runs, least)
			}
			if median > c.within {
				t.Errorf("a good release takes %v in the median; %v is the most", median, c.within)
			}
			var found []time.Duration
			var hit []int
			for seed := range runs {
				end := release(t, c.rate, 1, 4, uint64(seed))
				if end.State != rollout.RolledBack {
					t.Errorf("seed %d: +3 points ended %v after %v", seed, end.State, end.End)
				}
				found, hit = append(found, end.End), append(hit, end.Candidate)
			}
			slices.Sort(found)
			slices.Sort(hit)
			t.Logf("+3 points: rolled back in %v in the median, p90 %v, after %d candidate requests, p90 %d",
				found[runs/2], found[runs*9/10], hit[runs/2], hit[runs*9/10])
		})
	}
}
