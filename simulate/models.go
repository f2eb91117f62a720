package simulate

import (
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/stagedrollout/rollout"
)

// Level is a number that may depend on the request: on its time, its ring, its unit. Levels are made by [Always] and
// changed by their methods, each of which returns a new one; any function of a request is one as well. A nil Level is 0,
// but for where something else is said.
type Level func(*Request) float64

func (l Level) at(q *Request) float64 {
	if l == nil {
		return 0
	}
	return l(q)
}

// Always is the same number for each request.
func Always(v float64) Level { return func(*Request) float64 { return v } }

// After is l until that long after the beginning, and then the other: a regression that sets in late.
func (l Level) After(d time.Duration, then Level) Level {
	return func(q *Request) float64 {
		if q.At >= d {
			return then.at(q)
		}
		return l.at(q)
	}
}

// During is the other level in the time between from and to, and l otherwise: an incident. Give it to both versions if
// it hits both.
func (l Level) During(from, to time.Duration, then Level) Level {
	return func(q *Request) float64 {
		if q.At >= from && q.At < to {
			return then.at(q)
		}
		return l.at(q)
	}
}

// In is the other level in one ring, and l in all others.
func (l Level) In(ring string, then Level) Level {
	return func(q *Request) float64 {
		if q.Decision.Ring() == ring {
			return then.at(q)
		}
		return l.at(q)
	}
}

// Climb goes evenly from l to the other level in the time between from and to.
func (l Level) Climb(from, to time.Duration, then Level) Level {
	return func(q *Request) float64 {
		switch {
		case q.At <= from:
			return l.at(q)
		case q.At >= to:
			return then.at(q)
		}
		part := float64(q.At-from) / float64(to-from)
		return (1-part)*l.at(q) + part*then.at(q)
	}
}

// Swing multiplies l by a wave between 1-by and 1+by that begins at 1 and rises: with a period of 24 hours, days.
func (l Level) Swing(period time.Duration, by float64) Level {
	return func(q *Request) float64 {
		return l.at(q) * (1 + by*math.Sin(2*math.Pi*float64(q.At)/float64(period)))
	}
}

// Times multiplies l by a factor.
func (l Level) Times(f float64) Level { return func(q *Request) float64 { return f * l.at(q) } }

// ByUnit makes l, a percentage, the mean over units of which each has a percentage of its own: users whose requests fail
// together. icc is their intra-class correlation, above 0 and below 1: the part of the variance of outcomes that lies
// between units. The percentages have a Beta distribution, and a unit keeps its own as long as l stays as it is. Both
// versions give one unit the same rank, so that who often fails with one does with the other.
func (l Level) ByUnit(icc float64) Level {
	return func(q *Request) float64 {
		mean := l.at(q) / 100
		if !(mean > 0) || !(mean < 1) {
			return 100 * mean
		}
		own := rand.New(rand.NewPCG(q.seed, 0x626574611))
		return 100 * beta(own, mean*(1-icc)/icc, (1-mean)*(1-icc)/icc)
	}
}

// of is the level for the version that the request got; where the candidate has none it is as the stable version.
func of(stable, candidate Level, q *Request) float64 {
	if candidate != nil && q.Decision.Enabled() {
		return candidate.at(q)
	}
	return stable.at(q)
}

// Rate observes whether a bad event happened: with the given percentage of chances under the stable version and under the
// candidate. A nil candidate is as stable.
func Rate(m rollout.Rate, stable, candidate Level) Model {
	return func(q *Request, o *Outcome) {
		bad := q.Rand.Float64()*100 < of(stable, candidate, q)
		o.Observe(m.Observe(bad || q.loops == m))
	}
}

// Durations are lognormal, with a slow mode.
type Durations struct {
	Median time.Duration // of those that are not slow
	Spread float64       // standard deviation of the logarithm; 0.5: the 99th percentile is 3.2 times the median
	Slow   Level         // percentage that is slow; nil: none
	SlowBy float64       // factor on a slow one
	Factor Level         // on all of them; nil: 1
}

func (d *Durations) draw(q *Request) time.Duration {
	x := float64(d.Median)
	if d.Spread != 0 {
		x *= math.Exp(d.Spread * q.Rand.NormFloat64())
	}
	if d.Slow != nil && q.Rand.Float64()*100 < d.Slow(q) {
		x *= d.SlowBy
	}
	if d.Factor != nil {
		x *= d.Factor(q)
	}
	return time.Duration(min(max(x, 0), math.MaxInt64/2))
}

// Timing observes a duration under the stable version and under the candidate.
func Timing(m rollout.Timing, stable, candidate Durations) Model {
	return func(q *Request, o *Outcome) { o.Observe(m.Observe(either(&stable, &candidate, q).draw(q))) }
}

// Scores have a Beta distribution between two ends.
type Scores struct {
	Mean   Level   // nil: 0
	Spread float64 // standard deviation; 0: each is the mean
	// Low and High are the ends, those of the metric. Both zero: 0 and 1.
	Low, High float64
}

func (s *Scores) draw(q *Request) float64 {
	low, high := s.Low, s.High
	if low == 0 && high == 0 {
		high = 1
	}
	width := high - low
	mean := min(max((s.Mean.at(q)-low)/width, 0), 1)
	// Between its ends no distribution of the mean has as great a variance as two heaps at the ends.
	k := mean*(1-mean)/(s.Spread/width*s.Spread/width) - 1
	switch {
	case s.Spread == 0 || mean == 0 || mean == 1:
	case k > 0:
		mean = beta(q.Rand, mean*k, (1-mean)*k)
	case q.Rand.Float64() < mean:
		mean = 1
	default:
		mean = 0
	}
	return low + width*mean
}

// Score observes a score under the stable version and under the candidate.
func Score(m rollout.Score, stable, candidate Scores) Model {
	return func(q *Request, o *Outcome) { o.Observe(m.Observe(either(&stable, &candidate, q).draw(q))) }
}

// Parts are how often each label of a mix comes, as parts of their sum: percentages, or any other weights.
type Parts map[string]Level

// Mix observes which of a few it was under the stable version and under the candidate. A nil candidate is as stable.
// Nothing is observed where all parts are 0.
func Mix(m rollout.Mix, stable, candidate Parts) Model {
	if candidate == nil {
		candidate = stable
	}
	s, c := newLabels(m, stable), newLabels(m, candidate)
	return func(q *Request, o *Outcome) { either(&s, &c, q).observe(q, o) }
}

// labels are Parts in an order that is always the same.
type labels struct {
	each  []rollout.Observation
	parts []Level
}

func newLabels(m rollout.Mix, p Parts) labels {
	var l labels
	for _, label := range slices.Sorted(maps.Keys(p)) {
		l.each, l.parts = append(l.each, m.Observe(label)), append(l.parts, p[label])
	}
	return l
}

func (l *labels) observe(q *Request, o *Outcome) {
	sum := 0.0
	upto := make([]float64, 0, 16) // rehearsals may share a model: room of its own for each call, and none on the heap
	for _, part := range l.parts {
		sum += max(part.at(q), 0)
		upto = append(upto, sum)
	}
	u := q.Rand.Float64() * sum
	for i := range upto {
		if u < upto[i] {
			o.Observe(l.each[i])
			return
		}
	}
}

// Delay has outcomes come that long after the request.
func Delay(stable, candidate Durations) Model {
	return func(q *Request, o *Outcome) { o.Delay += either(&stable, &candidate, q).draw(q) }
}

func either[T any](stable, candidate *T, q *Request) *T {
	if q.Decision.Enabled() {
		return candidate
	}
	return stable
}

// Lost has nothing come of the given percentage of requests under the stable version and under the candidate. A nil
// candidate is as stable.
func Lost(stable, candidate Level) Model {
	return func(q *Request, o *Outcome) {
		if q.Rand.Float64()*100 < of(stable, candidate, q) {
			o.Lost = true
		}
	}
}

// beta draws from a Beta distribution, as a part of two Gamma variates.
func beta(rng *rand.Rand, a, b float64) float64 {
	x, y := logGamma(rng, a), logGamma(rng, b)
	return 1 / (1 + math.Exp(y-x))
}

// logGamma draws the logarithm of a Gamma variate of shape a, by Marsaglia and Tsang's method. The logarithm does not
// underflow for the tiny shapes of rare events.
func logGamma(rng *rand.Rand, a float64) float64 {
	boost := 0.0
	if a < 1 {
		boost = math.Log(1-rng.Float64()) / a // 1-u is never 0
		a++
	}
	d := a - 1.0/3
	c := 1 / math.Sqrt(9*d)
	for {
		x := rng.NormFloat64()
		v := 1 + c*x
		if v <= 0 {
			continue
		}
		v = v * v * v
		if u := 1 - rng.Float64(); math.Log(u) < x*x/2+d-d*v+d*math.Log(v) {
			return math.Log(d*v) + boost
		}
	}
}
