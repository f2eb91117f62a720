package main

import (
	"math"
	"math/rand/v2"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
)

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
		l := logChoose(n, x)
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

func logChoose(n, x int) float64 {
	a, _ := math.Lgamma(float64(n + 1))
	b, _ := math.Lgamma(float64(x + 1))
	c, _ := math.Lgamma(float64(n - x + 1))
	return a - b - c
}

// gamma draws from a Gamma distribution of the shape (Marsaglia and Tsang, A Simple Method for Generating Gamma
// Variables, 2000).
func gamma(shape float64, r *rand.Rand) float64 {
	if shape < 1 {
		return gamma(shape+1, r) * math.Pow(1-r.Float64(), 1/shape)
	}
	d := shape - 1./3
	c := 1 / math.Sqrt(9*d)
	for {
		x := r.NormFloat64()
		v := 1 + c*x
		if v <= 0 {
			continue
		}
		v *= v * v
		if math.Log(1-r.Float64()) < .5*x*x+d-d*v+d*math.Log(v) {
			return d * v
		}
	}
}

// beta draws from a Beta distribution.
func beta(a, b float64, r *rand.Rand) float64 {
	x, y := gamma(a, r), gamma(b, r)
	return x / (x + y)
}

// lognormal returns the probability of each cell of a latency with the median and the standard deviation of its logarithm.
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

// betaCells returns the probability of each of the cells 0 … n-1 of a Beta-distributed value in [0,1] with the mean and the
// concentration k, rounded at random to either neighbour, which keeps the mean.
func betaCells(n int, mean, k float64) []float64 {
	a, b := mean*k, (1-mean)*k
	p := make([]float64, n)
	const steps = 64000
	for i := range steps { // the midpoint rule is exact enough: the density is finite inside
		v := (float64(i) + .5) / steps
		w := math.Exp((a-1)*math.Log(v) + (b-1)*math.Log1p(-v))
		u := v * float64(n-1)
		lo := int(u)
		p[lo] += w * (1 - (u - float64(lo)))
		p[min(lo+1, n-1)] += w * (u - float64(lo))
	}
	return p
}
