package simulate

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/stagedrollout/rollout"
)

// Traffic is what comes in: how many requests, from which units, and what becomes of them. Only PerSecond is needed; the
// requests of a Traffic without Models are decided and come to nothing.
type Traffic struct {
	// PerSecond is how many requests a second there are, at random times (a Poisson process). Above 0.
	PerSecond float64
	// Load is a factor on PerSecond, for ramps and days: it is asked of a request that has its time and nothing else. A
	// value that is not above 0 means that nothing comes in. Nil: 1.
	Load Level
	// Units is how many units there are. Zero: each request is of a unit of its own, which never comes back.
	Units int
	// Skew is how unequal the activity of units is: the standard deviation of the logarithm of a lognormal distribution. 0:
	// each unit is as active as any other; with 1.5 the most active tenth makes six requests of ten. It needs Units.
	Skew float64
	// Rings is the percentage of the units in each ring but [rollout.Everyone], which has the rest. A unit's Groups hold the
	// name of its ring; a Ring with a Match must look at them to find it.
	Rings map[string]rollout.Percent
	// Loopers are single units which make up part of a cohort's requests.
	Loopers []Looper
	// Models say what comes of each request, one after the other.
	Models []Model
}

// Looper is one unit that goes round in a loop: a share of a cohort's requests in the ring of everyone is its own, and
// each time the same event happens, whatever the models say.
type Looper struct {
	Cohort  rollout.Cohort  // Candidate or Control
	Percent rollout.Percent // of the cohort's requests, above 0 and below 100
	Event   rollout.Rate    // the zero value: rollout.Errors
}

// Request is one request, as a [Model] sees it.
type Request struct {
	At       time.Duration // since the beginning
	Unit     rollout.Unit
	Decision rollout.Decision
	Rand     *rand.Rand // to draw from: the same seed, the same draws

	seed  uint64 // of the unit
	loops rollout.Rate
}

// Outcome is what comes of a request.
type Outcome struct {
	Observations []rollout.Observation
	Delay        time.Duration // after the request; below zero counts as zero
	Lost         bool          // nothing ever comes: the request hangs, or its outcome gets lost
}

// Observe adds an observation.
func (o *Outcome) Observe(obs rollout.Observation) { o.Observations = append(o.Observations, obs) }

// Model says what comes of a request: it adds to the outcome what it knows. [Rate], [Timing], [Score], [Mix], [Delay] and [Lost]
// make the usual ones, and any function may stand beside them; Observations must not be kept after it returns. A model is
// called from one goroutine, in the order of time, and must draw all chances from the request's Rand.
type Model func(*Request, *Outcome)

// population draws units. It is made of the seed alone.
type population struct {
	units   []person
	rings   []string
	upto    []float64 // percent, cumulative
	groups  [][]string
	drawn   uint64
	loopers []rollout.Unit
}

// person is one unit with all that its draw takes, side by side: among many units each look is one into slow memory.
type person struct {
	unit  rollout.Unit
	seed  uint64
	alias int // Walker's method: a draw in constant time, whatever the activities
	cut   float64
}

func newPopulation(t *Traffic, salt string, rng *rand.Rand) *population {
	p := &population{rings: slices.Sorted(maps.Keys(t.Rings))}
	sum := 0.0
	for _, ring := range p.rings {
		sum += float64(t.Rings[ring])
		p.upto = append(p.upto, sum)
		p.groups = append(p.groups, []string{ring})
	}
	weights := make([]float64, t.Units)
	p.units = make([]person, t.Units)
	for i := range p.units {
		p.units[i].unit = rollout.Unit{Key: "u" + strconv.Itoa(i), Groups: p.group(rng)}
		p.units[i].seed = rng.Uint64()
		weights[i] = math.Exp(t.Skew * rng.NormFloat64())
	}
	p.weigh(weights)
	for i, l := range t.Loopers {
		p.loopers = append(p.loopers, looper(salt, i, l.Cohort))
	}
	return p
}

func (p *population) group(rng *rand.Rand) []string {
	if len(p.rings) == 0 {
		return nil
	}
	u := rng.Float64() * 100
	for i, upto := range p.upto {
		if u < upto {
			return p.groups[i]
		}
	}
	return nil
}

// weigh makes Walker's tables.
func (p *population) weigh(weights []float64) {
	n, sum := len(weights), 0.0
	for _, w := range weights {
		sum += w
	}
	var small, large []int
	for i, w := range weights {
		p.units[i].alias, p.units[i].cut = i, w/sum*float64(n)
		if p.units[i].cut < 1 {
			small = append(small, i)
		} else {
			large = append(large, i)
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		p.units[s].alias = l
		if p.units[l].cut -= 1 - p.units[s].cut; p.units[l].cut < 1 {
			large, small = large[:len(large)-1], append(small, l)
		}
	}
}

// draw is the unit of the next request: its number from 0, or -1 for one that never comes back.
func (p *population) draw(rng *rand.Rand, q *Request) int {
	if len(p.units) == 0 {
		p.drawn++
		q.Unit = rollout.Unit{Key: "u" + strconv.FormatUint(p.drawn, 10), Groups: p.group(rng)}
		q.seed = rng.Uint64()
		return -1
	}
	i := rng.IntN(len(p.units))
	if rng.Float64() >= p.units[i].cut {
		i = p.units[i].alias
	}
	q.Unit, q.seed = p.units[i].unit, p.units[i].seed
	return i
}

// looper is a unit that is among the first to get the candidate, or among the last.
func looper(salt string, i int, c rollout.Cohort) rollout.Unit {
	var best uint64
	var key string
	for n := range 1 << 16 {
		k := fmt.Sprintf("looper-%d-%d", i, n)
		b := rollout.Bucket(salt, k)
		if c == rollout.Candidate {
			b = ^b
		}
		if key == "" || b > best {
			best, key = b, k
		}
	}
	return rollout.Unit{Key: key}
}
