package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/stagedrollout/rollout/internal/judge"
)

// A release is gates and what is simulated of their metrics: a block a tick each.
type release struct {
	specs []judge.Spec // of metrics "0", "1" … by index of make, unless named
	make  []maker
	ticks int
	onset int  // tick before which candidate samples do not count towards a delay
	proof bool // until it is proven, not until it is broken
	risk  judge.Risk
	// clustered: the sources give the groups of units; otherwise each outcome is a unit of its own, with a group where
	// gates correct for clusters.
	clustered bool
}

// An ending is how a run ended: the candidate samples it took, of one metric, and the ticks; +Inf where it never happened.
type ending struct{ samples, ticks float64 }

// simulate runs the release, with a look after every tick, until a gate is broken, or all are proven where that is asked.
func simulate(rel release, runs int, seed uint64) []ending {
	specs := slices.Clone(rel.specs)
	for i := range specs {
		specs[i].Name = fmt.Sprint("gate ", i)
		if specs[i].Metric == "" {
			specs[i].Metric = fmt.Sprint(min(i, len(rel.make)-1))
		}
		if specs[i].Action == judge.Default {
			specs[i].Action = judge.Rollback
		}
	}
	if rel.risk == (judge.Risk{}) {
		rel.risk = judge.Risk{FalseRollback: .01, FalsePromotion: .05}
	}
	j, err := judge.New(specs, rel.risk)
	if err != nil {
		panic(err) // a mistake in the tables
	}
	kinds := map[string]judge.Kind{}
	for _, s := range specs {
		kinds[s.Metric] = s.Kind
	}
	ends := make([]ending, runs)
	var wg sync.WaitGroup
	const workers = 2
	for w := range workers {
		wg.Go(func() {
			for i := w; i < runs; i += workers {
				ends[i] = one(j, rel, kinds, rand.New(rand.NewPCG(seed+uint64(i), 20220814)))
			}
		})
	}
	wg.Wait()
	return ends
}

func one(j *judge.Judge, rel release, kinds map[string]judge.Kind, r *rand.Rand) ending {
	var st judge.State
	sources := make([]source, len(rel.make))
	blocks := make([]judge.Block, len(rel.make))
	for i, m := range rel.make {
		sources[i] = m(r)
		blocks[i] = judge.Block{Metric: fmt.Sprint(i), Ring: "everyone"}
	}
	samples := 0.
	var thresholds [][2]int
	for tick := range rel.ticks {
		for i := range sources {
			b := &blocks[i]
			sources[i](tick, r, b)
			if !rel.clustered && !rel.risk.Independent {
				thresholds = j.Thresholds(thresholds[:0], &st, b.Metric, b.Ring)
				group(b, kinds[b.Metric], thresholds, len(j.Marks(b.Metric)), r)
			}
			j.Consume(&st, *b, nil, rel.proof)
		}
		j.Look(&st)
		if tick >= rel.onset {
			for _, n := range blocks[0].Candidate {
				samples += float64(n)
			}
		}
		broken, proven := false, true
		for _, g := range st.Gates {
			broken = broken || g.Broken
		}
		if rel.proof {
			if broken {
				return ending{math.Inf(1), math.Inf(1)}
			}
			for _, res := range j.Assess(&st, nil) {
				proven = proven && res.Proved
			}
		}
		if rel.proof && proven || !rel.proof && broken {
			return ending{samples, float64(tick + 1 - rel.onset)}
		}
	}
	return ending{math.Inf(1), math.Inf(1)}
}

// summary of the endings.
type summary struct {
	rate, se    float64 // how often it happened
	median, p90 float64 // candidate samples
	ticks       float64 // median
	runs        int
}

func summarize(ends []ending) summary {
	var v, ticks []float64
	hit := 0.
	for _, e := range ends {
		v, ticks = append(v, e.samples), append(ticks, e.ticks)
		if !math.IsInf(e.samples, 1) {
			hit++
		}
	}
	slices.Sort(v)
	slices.Sort(ticks)
	n := float64(len(v))
	s := summary{rate: hit / n, median: v[len(v)/2], p90: v[len(v)*9/10], ticks: ticks[len(v)/2], runs: len(v)}
	s.se = math.Sqrt(s.rate * (1 - s.rate) / n)
	return s
}

// most is the greatest rate that chance lets one expect of runs whose true rate is p: two standard errors more, and
// never less than one run of them.
func most(p float64, runs int) float64 {
	return max(p+2*math.Sqrt(p*(1-p)/float64(runs)), 1/float64(runs))
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

// bound is the number of candidate samples the best test that knew both rates needs on average, at error alpha, against
// candidate ≤ control + delta (or ≥, where the rates satisfy the former): ln(1/α) over the least divergence from a pair on
// the boundary, r control samples to each candidate sample.
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

// scoreBound is the same for two scores, as if their means were normal.
func scoreBound(alpha, candidate, control, share float64) float64 {
	d := candidate - control
	return 2 * math.Log(1/alpha) * (scoreVar(candidate) + scoreVar(control)*share/(1-share)) / (d * d)
}

// mixBound is the same for two mixes.
func mixBound(alpha float64, candidate, control []float64, share float64) float64 {
	r, d := (1-share)/share, 0.
	for i, c := range candidate {
		s := control[i]
		mean := share*c + (1-share)*s
		if c > 0 {
			d += c * math.Log(c/mean)
		}
		if s > 0 {
			d += r * s * math.Log(s/mean)
		}
	}
	return math.Log(1/alpha) / d
}
