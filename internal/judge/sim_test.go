package judge

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
)

// The operating characteristics: what the gates do to many simulated releases.
// The short form has few runs from fixed seeds; the full one is
//
//	go test ./internal/judge -run OC -oc.runs 2000 -v -timeout 1h
var ocRuns = flag.Int("oc.runs", 0, "runs of each simulated release; 0: a short form")

// runs returns how many runs of a release to simulate.
func runs(short int) int {
	if *ocRuns > 0 {
		return *ocRuns
	}
	return short
}

// A sampler draws from 0 … len(q)-1 (Walker's alias method).
type sampler struct {
	q     []float64
	alias []int
}

func newSampler(p []float64) *sampler {
	n := len(p)
	s := &sampler{q: make([]float64, n), alias: make([]int, n)}
	var small, large []int
	total := 0.
	for _, w := range p {
		total += w
	}
	for i, w := range p {
		s.q[i] = w / total * float64(n)
		if s.q[i] < 1 {
			small = append(small, i)
		} else {
			large = append(large, i)
		}
	}
	for len(small) > 0 && len(large) > 0 {
		a, b := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		s.alias[a] = b
		if s.q[b] -= 1 - s.q[a]; s.q[b] < 1 {
			large, small = large[:len(large)-1], append(small, b)
		}
	}
	for _, i := range append(small, large...) {
		s.q[i], s.alias[i] = 1, i
	}
	return s
}

func (s *sampler) draw(r *rand.Rand) int {
	u := r.Float64() * float64(len(s.q))
	i := int(u)
	if u-float64(i) < s.q[i] {
		return i
	}
	return s.alias[i]
}

// newBinomial draws the number of events among n outcomes of rate p.
func newBinomial(n int, p float64) *sampler {
	w := make([]float64, n+1)
	for x := range w {
		a, _ := math.Lgamma(float64(n + 1))
		b, _ := math.Lgamma(float64(x + 1))
		c, _ := math.Lgamma(float64(n - x + 1))
		l := a - b - c
		if x > 0 {
			l += float64(x) * math.Log(p)
		}
		if x < n {
			l += float64(n-x) * math.Log1p(-p)
		}
		w[x] = math.Exp(l)
	}
	return newSampler(w)
}

// A release is what is simulated: a block a tick. Each worker makes its own
// source of blocks.
type release struct {
	ticks int
	onset int // tick before which candidate samples do not count towards a delay
	make  func() source
}

// A source fills both cohorts with a tick's outcomes.
type source func(tick int, r *rand.Rand, b *Block)

// sizes of the cohorts of a tick.
func sizes(share float64, perTick int) (n, m int) {
	n = int(math.Round(share * float64(perTick)))
	return n, perTick - n
}

// rates is a Rate of which a share of a tick's outcomes goes to the candidate.
func rates(candidate, control, share float64, perTick int) func() source {
	n, m := sizes(share, perTick)
	c, s := newBinomial(n, candidate), newBinomial(m, control)
	return func() source {
		return func(_ int, r *rand.Rand, b *Block) {
			x, y := c.draw(r), s.draw(r)
			b.Candidate = append(b.Candidate[:0], uint64(n-x), uint64(x))
			b.Control = append(b.Control[:0], uint64(m-y), uint64(y))
		}
	}
}

// phases plays one source after another, each for so many ticks.
func phases(ticks int, sources ...func() source) func() source {
	return func() source {
		var each []source
		for _, s := range sources {
			each = append(each, s())
		}
		return func(tick int, r *rand.Rand, b *Block) {
			each[min(tick/ticks, len(each)-1)](tick, r, b)
		}
	}
}

// lognormal returns the probability of each cell of a latency with the median
// and the standard deviation of its logarithm.
func lognormal(median time.Duration, sd float64) []float64 {
	cdf := func(d time.Duration) float64 {
		if d <= 0 {
			return 0
		}
		return .5 * math.Erfc(-math.Log(float64(d)/float64(median))/sd/math.Sqrt2)
	}
	p := make([]float64, evidence.Cells)
	for i := range p {
		p[i] = cdf(evidence.Lower(i+1)) - cdf(evidence.Lower(i))
	}
	return p
}

// latencies is a Timing whose control has a median of 20 ms and whose candidate
// is slower by the factor.
func latencies(factor, share float64, perTick int) func() source {
	const median = 20 * time.Millisecond
	n, m := sizes(share, perTick)
	s := newSampler(lognormal(median, .5))
	c := newSampler(lognormal(time.Duration(float64(median)*factor), .5))
	fill := func(cells []uint64, s *sampler, n int, r *rand.Rand) []uint64 {
		if cells == nil {
			cells = make([]uint64, evidence.Cells)
		}
		clear(cells)
		for range n {
			cells[s.draw(r)]++
		}
		return cells
	}
	return func() source {
		return func(_ int, r *rand.Rand, b *Block) {
			b.Candidate, b.Control = fill(b.Candidate, c, n, r), fill(b.Control, s, m, r)
		}
	}
}

// An ending is how a run of one gate ended: the candidate samples it took, +Inf
// where it never happened.
type ending struct{ rollback, proof float64 }

// simulate runs the release, with a look after every tick, until the gate is
// broken, or proven where proof is asked for. The runs differ by seed alone.
func simulate(t testing.TB, spec Spec, risk Risk, rel release, n int, proof bool) []ending {
	if spec.Action == Default {
		spec.Action = Rollback
	}
	spec.Name, spec.Metric = "gate", "metric"
	j, err := New([]Spec{spec}, risk)
	if err != nil {
		t.Fatal(err)
	}
	ends := make([]ending, n)
	var wg sync.WaitGroup
	const workers = 2
	for w := range workers {
		wg.Go(func() {
			fill := rel.make()
			b := Block{Metric: "metric", Ring: "everyone"}
			for i := w; i < n; i += workers {
				r := rand.New(rand.NewPCG(uint64(i), 20220814))
				var st State
				ends[i] = ending{math.Inf(1), math.Inf(1)}
				samples := 0.
				for tick := range rel.ticks {
					fill(tick, r, &b)
					feed(j, &st, b, nil, proof)
					if tick >= rel.onset {
						samples += float64(sum(b.Candidate))
					}
					g := st.Gates["gate"]
					if g.Broken {
						ends[i].rollback = samples
						break
					}
					if proof && j.proven(&st, &j.gates[0], g) {
						ends[i].proof = samples
						break
					}
				}
			}
		})
	}
	wg.Wait()
	return ends
}

// summary of one side of the endings.
type summary struct {
	rate, se    float64 // how often it happened at all
	median, p90 float64 // candidate samples
}

func summarize(ends []ending, side func(ending) float64) summary {
	var v []float64
	hit := 0.
	for _, e := range ends {
		x := side(e)
		v = append(v, x)
		if !math.IsInf(x, 1) {
			hit++
		}
	}
	slices.Sort(v)
	n := float64(len(v))
	s := summary{rate: hit / n, median: v[len(v)/2], p90: v[len(v)*9/10]}
	s.se = math.Sqrt(s.rate * (1 - s.rate) / n)
	return s
}

func (s summary) String() string {
	return fmt.Sprintf("%.4f ± %.4f, %5.0f / %5.0f", s.rate, s.se, s.median, s.p90)
}

func rollbacks(ends []ending) summary {
	return summarize(ends, func(e ending) float64 { return e.rollback })
}
func proofs(ends []ending) summary { return summarize(ends, func(e ending) float64 { return e.proof }) }

// atMost fails if a rate that must not exceed the limit does, beyond chance:
// two standard errors of a rate at the limit.
func atMost(t *testing.T, got summary, limit float64, n int) {
	t.Helper()
	if se := math.Sqrt(limit * (1 - limit) / float64(n)); got.rate > limit+2*se {
		t.Errorf("happens in %.4f of %d runs, above %g + 2 × %.4f", got.rate, n, limit, se)
	}
}

// kl is the Kullback-Leibler divergence of two yes/no outcomes.
func kl(p, q float64) float64 {
	d := 0.
	if p > 0 {
		d += p * math.Log(p/q)
	}
	if p < 1 {
		d += (1 - p) * math.Log((1-p)/(1-q))
	}
	return d
}

// bound is the number of candidate samples the best test that knew both rates
// needs on average, at error alpha, against candidate ≤ control + delta (or ≥,
// where the rates satisfy the former): ln(1/α) over the least divergence from
// a pair on the boundary, r control samples to each candidate sample.
func bound(alpha, candidate, control, delta, share float64) float64 {
	r := (1 - share) / share
	div := func(q float64) float64 { return kl(candidate, q+delta) + r*kl(control, q) }
	lo, hi := 1e-12, 1-delta-1e-12 // div is convex: golden section
	for range 200 {
		a, b := lo+.382*(hi-lo), lo+.618*(hi-lo)
		if div(a) < div(b) {
			hi = b
		} else {
			lo = a
		}
	}
	return math.Log(1/alpha) / div((lo+hi)/2)
}

var risk = Risk{FalseRollback: .01, FalsePromotion: .05, Independent: true}

// An oc is a gate and a release.
type oc struct {
	name  string
	spec  Spec
	make  func() source
	short int // ticks of the short form; 0: as many as the full one
}

var (
	within  = func(points float64) Spec { return Spec{Kind: Within, Margin: points / 100} }
	slower  = func(q, f float64) Spec { return Spec{Kind: QuantileWithinFactor, Quantile: q, Factor: f} }
	noWorse = Spec{Kind: NoWorse}
	timing  = Spec{Kind: TimingNoWorse}
	nine    = math.Exp2(9. / evidence.Steps) // a factor of exactly nine cells, 1.195
)

// No gate rolls back a candidate on its boundary more often than α, although it
// is looked at 1440 times.
func TestOCFalseRollback(t *testing.T) {
	n, busy := runs(200), 200 // latencies a tick
	if *ocRuns > 0 {
		busy = 1000
	}
	for _, share := range []float64{.01, .05, .5} {
		for _, c := range []oc{
			{"NoWorse, .1 % both", noWorse, rates(.001, .001, share, 1000), 360},
			{"NoWorse, 1 % both", noWorse, rates(.01, .01, share, 1000), 360},
			{"Within .5, 1 % both", within(.5), rates(.01, .01, share, 1000), 360},
			{"Within .5, .1→.6 %", within(.5), rates(.006, .001, share, 1000), 360},
			{"Within .5, 1→1.5 %", within(.5), rates(.015, .01, share, 1000), 360},
			{"WithinFactor 1.5, 1→1.5 %", Spec{Kind: WithinFactor, Factor: 1.5}, rates(.015, .01, share, 1000), 360},
			{"AtMost 1, at 1 %", Spec{Kind: AtMost, Margin: .01}, rates(.01, .01, share, 1000), 360},
			{"p50+p99 NoWorse, equal", timing, latencies(1, share, busy), 90},
			{"p99 WithinFactor 1, equal", slower(.99, 1), latencies(1, share, 200), 90},
			{"p99 WithinFactor 1.2, equal", slower(.99, 1.2), latencies(1, share, busy), 90},
			{"p99 WithinFactor 1.195, ×1.195", slower(.99, nine), latencies(nine, share, 200), 90},
			{"p50 WithinFactor 1.195, ×1.195", slower(.5, nine), latencies(nine, share, 200), 90},
			{"p99 AtMost, at it", Spec{Kind: QuantileAtMost, Quantile: .99, Limit: p99}, latencies(1, share, 200), 90},
		} {
			rel := release{ticks: 1440, make: c.make}
			if *ocRuns == 0 {
				rel.ticks = c.short
			}
			got := rollbacks(simulate(t, c.spec, risk, rel, n, false))
			t.Logf("%-31s share %2.0f %%: %.4f", c.name, 100*share, got.rate)
			atMost(t, got, risk.FalseRollback, n)
		}
	}
}

// p99 is a bound of cells just below the 99th percentile of the control of
// latencies: 1 % and a little are beyond.
var p99 = func() time.Duration {
	above, cells := 0., lognormal(20*time.Millisecond, .5)
	for i := len(cells) - 1; ; i-- {
		if above += cells[i]; above > .01 {
			return evidence.Lower(i + 1)
		}
	}
}()

// A base rate that drifts while the share climbs: adding up counts over the
// stages would see a worse candidate where there is none (Simpson's paradox).
func TestOCRamp(t *testing.T) {
	n := runs(200)
	ramp := func(factor float64, base ...float64) func() source {
		var each []func() source
		for i, share := range []float64{.01, .05, .25, .5} {
			each = append(each, rates(base[i]*factor, base[i], share, 1000))
		}
		return phases(180, each...)
	}
	for _, c := range []oc{
		{"NoWorse, base .5→2 %", noWorse, ramp(1, .005, .01, .015, .02), 0},
		{"NoWorse, base 2→.5 %", noWorse, ramp(1, .02, .015, .01, .005), 0},
		{"Within .5, base 2→.5 %", within(.5), ramp(1, .02, .015, .01, .005), 0},
	} {
		got := rollbacks(simulate(t, c.spec, risk, release{ticks: 720, make: c.make}, n, false))
		t.Logf("%-31s ramp: %.4f", c.name, got.rate)
		atMost(t, got, risk.FalseRollback, n)
	}
	got := rollbacks(simulate(t, noWorse, risk, release{ticks: 720, make: ramp(1.5, .02, .015, .01, .005)}, n, false))
	t.Logf("%-31s ramp: %s", "NoWorse ×1.5, base 2→.5 %", got)
	if got.rate < .99 {
		t.Errorf("a candidate half as bad again is rolled back in %.4f of the runs", got.rate)
	}
}

// How soon a worse candidate is rolled back.
func TestOCDetection(t *testing.T) {
	n := runs(200)
	for _, c := range []struct {
		name               string
		spec               Spec
		candidate, control float64
		share, most        float64 // most: of the median over the bound
	}{
		{"NoWorse 1→2 %", noWorse, .02, .01, .01, 1.5},
		{"NoWorse 1→2 %", noWorse, .02, .01, .05, 1.5},
		{"NoWorse 1→2 %", noWorse, .02, .01, .5, 1.6},
		{"NoWorse 1→1.5 %", noWorse, .015, .01, .05, 1.5},
		{"NoWorse .1→1 %", noWorse, .01, .001, .05, 1.75},
		{"NoWorse 0→.5 %", noWorse, .005, 0, .05, 2},
		{"NoWorse 30→36 %", noWorse, .36, .3, .05, 1.6},
		{"Within .5, 1→2 %", within(.5), .02, .01, .05, 1.5},
		{"Within .5, 1→3 %", within(.5), .03, .01, .01, 1.5},
		{"Within .5, 1→3 %", within(.5), .03, .01, .05, 1.5},
		{"Within .5, .1→1 %", within(.5), .01, .001, .05, 1.5},
		{"Within .1, 0→.5 %", within(.1), .005, 0, .05, 1.5},
		{"Within 1, 10→14 %", within(1), .14, .1, .05, 1.5},
	} {
		rel := release{ticks: 1440, make: rates(c.candidate, c.control, c.share, 1000)}
		got := rollbacks(simulate(t, c.spec, risk, rel, n, false))
		b := bound(risk.FalseRollback, c.candidate, c.control, c.spec.Margin, c.share)
		t.Logf("%-18s share %2.0f %%: %s, bound %5.0f, ratio %.2f", c.name, 100*c.share, got, b, got.median/b)
		if got.median > c.most*b {
			t.Errorf("the median %.0f is above %.2f × the bound %.0f", got.median, c.most, b)
		}
	}
}

// How soon a candidate that turns worse after an hour is rolled back.
func TestOCLateOnset(t *testing.T) {
	n := runs(100)
	const share = .05
	rel := release{ticks: 2160, onset: 720, make: phases(720, rates(.01, .01, share, 1000), rates(.02, .01, share, 1000))}
	got := rollbacks(simulate(t, noWorse, risk, rel, n, false))
	b := bound(risk.FalseRollback, .02, .01, 0, share)
	t.Logf("NoWorse 1→2 %% after 720 ticks, share 5 %%: %s, bound %.0f, ratio %.2f", got, b, got.median/b)
	if got.median > 3.2*b {
		t.Errorf("the median %.0f is above 3.2 × the bound %.0f", got.median, b)
	}
}

func TestOCLatency(t *testing.T) {
	n := runs(200)
	for _, c := range []struct {
		name          string
		spec          Spec
		factor, share float64
		median, p90   float64 // at most
	}{
		{"p50+p99 NoWorse ×1.2", timing, 1.2, .05, 230, 350},
		{"p50+p99 NoWorse ×1.2", timing, 1.2, .5, 800, 1100},
		{"p99 WithinFactor 1.2 ×1.5", slower(.99, 1.2), 1.5, .05, 1000, 2000},
		{"p99 WithinFactor 1 ×1.2", slower(.99, 1), 1.2, .05, 1000, 2100},
	} {
		rel := release{ticks: 1440, make: latencies(c.factor, c.share, 200)}
		got := rollbacks(simulate(t, c.spec, risk, rel, n, false))
		t.Logf("%-26s share %2.0f %%: %s", c.name, 100*c.share, got)
		if got.median > c.median || got.p90 > c.p90 {
			t.Errorf("median %.0f and p90 %.0f, above %.0f and %.0f", got.median, got.p90, c.median, c.p90)
		}
	}
}

// How soon a good candidate is proven.
func TestOCPromotion(t *testing.T) {
	n := runs(100)
	for _, c := range []struct {
		oc
		share  float64
		median float64 // at most
	}{
		{oc{"Within .1, 0 both", within(.1), rates(0, 0, .01, 1000), 0}, .01, 5000},
		{oc{"Within .1, 0 both", within(.1), rates(0, 0, .05, 1000), 0}, .05, 5000},
		{oc{"Within .5, 0 both", within(.5), rates(0, 0, .01, 200), 0}, .01, 1000},
		{oc{"Within .5, 0 both", within(.5), rates(0, 0, .05, 200), 0}, .05, 1000},
		{oc{"Within 2, 0 both", within(2), rates(0, 0, .01, 200), 0}, .01, 250},
		{oc{"Within .5, 1 % both", within(.5), rates(.01, .01, .05, 1000), 0}, .05, 4700},
		{oc{"Within .5, 1 % both", within(.5), rates(.01, .01, .5, 1000), 0}, .5, 9000},
		{oc{"Within 1, 1 % both", within(1), rates(.01, .01, .5, 1000), 0}, .5, 4000},
		{oc{"WithinFactor 2, 1 % both", Spec{Kind: WithinFactor, Factor: 2}, rates(.01, .01, .05, 1000), 0}, .05, 1200},
		{oc{"AtMost .1, 0", Spec{Kind: AtMost, Margin: .001}, rates(0, 0, .05, 1000), 0}, .05, 4000},
		{oc{"p99 WithinFactor 1.195, equal", slower(.99, nine), latencies(1, .01, 1000), 0}, .01, 1500},
		{oc{"p99 WithinFactor 1.195, equal", slower(.99, nine), latencies(1, .05, 200), 0}, .05, 1500},
		{oc{"p99 WithinFactor 1.195, equal", slower(.99, nine), latencies(1, .5, 200), 0}, .5, 3000},
		{oc{"p50 WithinFactor 1.2, equal", slower(.5, 1.2), latencies(1, .05, 200), 0}, .05, 300},
	} {
		got := proofs(simulate(t, c.spec, risk, release{ticks: 2880, make: c.make}, n, true))
		t.Logf("%-31s share %2.0f %%: %s", c.name, 100*c.share, got)
		if got.median > c.median {
			t.Errorf("%s: the median %.0f is above %.0f", c.name, got.median, c.median)
		}
	}
}

// A candidate on the boundary is proven within it with at most α_p.
func TestOCFalsePromotion(t *testing.T) {
	n := runs(200)
	for _, share := range []float64{.05, .5} {
		for _, c := range []oc{
			{"Within .5, 1→1.5 %", within(.5), rates(.015, .01, share, 1000), 180},
			{"Within .1, 0→.1 %", within(.1), rates(.001, 0, share, 1000), 180},
			{"WithinFactor 2, 1→2 %", Spec{Kind: WithinFactor, Factor: 2}, rates(.02, .01, share, 1000), 180},
			{"AtMost 1, at 1 %", Spec{Kind: AtMost, Margin: .01}, rates(.01, .01, share, 1000), 180},
			{"p99 WithinFactor 1.195, ×1.195", slower(.99, nine), latencies(nine, share, 200), 90},
			{"p50 WithinFactor 1.195, ×1.195", slower(.5, nine), latencies(nine, share, 200), 90},
		} {
			rel := release{ticks: 1440, make: c.make}
			if *ocRuns == 0 {
				rel.ticks = c.short
			}
			got := proofs(simulate(t, c.spec, risk, rel, n, true))
			t.Logf("%-31s share %2.0f %%: %.4f", c.name, 100*share, got.rate)
			atMost(t, got, risk.FalsePromotion, n)
		}
	}
}
