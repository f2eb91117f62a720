package rollout

import (
	"flag"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

var simRuns = flag.Int("sim.runs", 40, "runs of each whole-policy simulation")

// checkout is the policy of the package's first example.
func checkout() Policy {
	return Policy{
		Rings: []Ring{{Name: "staff"}},
		Stages: []Stage{
			{Ring: "staff", Percent: 100},
			{Percent: 1}, {Percent: 5}, {Percent: 25}, {Percent: 50}, {Percent: 100},
		},
		Bake:     10 * time.Minute,
		Holdback: 5,
		Gates: []Gate{
			Errors.Within(1),
			Errors.AtMost(10),
			Latency.Quantile(0.99).WithinFactor(1.2),
		},
	}
}

// traffic is a release under requests that come at random: rate a second, 2 % of them from staff, errors by cohort.
type traffic struct {
	rate    float64
	errors  [2]float64
	slower  float64 // factor on the candidate's latency
	horizon time.Duration
}

// ending is how one virtual rollout ended.
type ending struct {
	phase     machine.Phase
	after     time.Duration
	candidate int // its requests
}

// simulate takes a policy through virtual time: the same plan, judge, machine and block rule as Run, but for the cells.
func simulate(tb testing.TB, p Policy, tr traffic, seed uint64) ending {
	tb.Helper()
	r, err := New("sim", p, nil)
	if err != nil {
		tb.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 0x5eed))
	st := machine.New("sim", r.plan, "n")
	virtual := newVirtual(r)
	interval := r.o.Interval
	end := ending{}
	for now := time.Duration(0); now < tr.horizon; now += interval {
		in := machine.Input{Elapsed: interval, MayAdvance: true}
		virtual.cut(st, now, &in)
		machine.Step(st, r.plan, in)
		if st.Phase == machine.Completed || st.Phase.Latched() {
			end.phase, end.after = st.Phase, now
			return end
		}
		for at := rng.ExpFloat64() / tr.rate; at < interval.Seconds(); at += rng.ExpFloat64() / tr.rate {
			end.candidate += virtual.request(st, rng, tr)
		}
	}
	end.phase, end.after = st.Phase, tr.horizon
	return end
}

// virtual is the evidence of a virtual process: what came in and was not consumed yet, by ring, metric and cohort.
type virtual struct {
	r      *Rollout
	epoch  uint64
	open   [][][2][]uint64
	closed [][]time.Duration
	fresh  []bool
}

func newVirtual(r *Rollout) *virtual {
	v := &virtual{r: r, open: make([][][2][]uint64, len(r.plan.Rings)), closed: make([][]time.Duration, len(r.plan.Rings)), fresh: make([]bool, len(r.plan.Rings))}
	for i := range v.open {
		for _, m := range r.metrics {
			v.open[i] = append(v.open[i], [2][]uint64{make([]uint64, m.cells), make([]uint64, m.cells)})
			v.closed[i] = append(v.closed[i], 0)
		}
	}
	return v
}

// cut closes the blocks that are due. Where the epoch changed, what is left of the one before closes.
func (v *virtual) cut(st *machine.State, now time.Duration, in *machine.Input) {
	present := v.epoch == st.Epoch
	for i, ring := range v.r.plan.Rings {
		if v.fresh[i] && present {
			in.Outcomes = append(in.Outcomes, ring)
		}
		v.fresh[i] = false
		for j, m := range v.r.metrics {
			open := &v.open[i][j]
			alone := st.Shares[ring] == 100 && v.r.policy.Holdback == 0
			if !closes([2]uint64{sum(open[0]), sum(open[1])}, alone, now-v.closed[i][j], present) {
				continue
			}
			in.Blocks = append(in.Blocks, machine.Block{Epoch: v.epoch, Block: judge.Block{
				Metric: nameOf(m.ref), Ring: ring, Control: slices.Clone(open[0]), Candidate: slices.Clone(open[1]),
			}})
			clear(open[0])
			clear(open[1])
			v.closed[i][j] = now
		}
	}
	v.epoch = st.Epoch
}

// request is one request: it returns 1 if the candidate served it.
func (v *virtual) request(st *machine.State, rng *rand.Rand, tr traffic) int {
	i := len(v.r.plan.Rings) - 1
	if len(v.r.plan.Rings) > 1 && rng.Float64() < 0.02 {
		i = 0
	}
	share := st.Shares[v.r.plan.Rings[i]]
	if share == 0 {
		return 0
	}
	v.epoch = st.Epoch
	u := rng.Float64() * 100
	c := 0
	if u < share && u < 100-float64(v.r.policy.Holdback) {
		c = 1
		v.fresh[i] = true
	}
	bad := 0
	if rng.Float64() < tr.errors[c] {
		bad = 1
	}
	v.open[i][0][c][bad]++
	slow := 1.0
	if c == 1 && tr.slower > 0 {
		slow = tr.slower
	}
	took := time.Duration(slow * math.Exp(rng.NormFloat64()/2) * float64(50*time.Millisecond))
	v.open[i][1][c][evidence.Index(took)]++
	return c
}

// TestSimulatedPolicy: the policy of the first example completes a good release in time, and never a bad one.
func TestSimulatedPolicy(t *testing.T) {
	for _, c := range []struct {
		name   string
		rate   float64
		within time.Duration // median of a good release
	}{{"20 rps", 20, 2 * time.Hour}, {"200 rps", 200, 65 * time.Minute}} {
		t.Run(c.name, func(t *testing.T) {
			runs := *simRuns
			if raced {
				runs /= 8 // nothing in it is concurrent
			}
			var took []time.Duration
			for seed := range runs {
				end := simulate(t, checkout(), traffic{rate: c.rate, errors: [2]float64{.01, .01}, horizon: 24 * time.Hour}, uint64(seed))
				if end.phase == machine.Completed {
					took = append(took, end.after)
				} else {
					t.Logf("seed %d: %v after %v", seed, end.phase, end.after)
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
				end := simulate(t, checkout(), traffic{rate: c.rate, errors: [2]float64{.01, .04}, horizon: 24 * time.Hour}, uint64(seed))
				if !end.phase.Latched() {
					t.Errorf("seed %d: +3 points ended %v after %v", seed, end.phase, end.after)
				}
				found, hit = append(found, end.after), append(hit, end.candidate)
			}
			slices.Sort(found)
			slices.Sort(hit)
			t.Logf("+3 points: rolled back in %v in the median, p90 %v, after %d candidate requests, p90 %d",
				found[runs/2], found[runs*9/10], hit[runs/2], hit[runs*9/10])
		})
	}
}
