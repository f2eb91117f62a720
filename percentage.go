package rollout

import (
	"strconv"
	"time"
)

// Percent is a share of units, or a rate of events, in percent: 5 is one in twenty. As a share it may be of any
// fineness; 0.001 is one unit in 100,000. The zero value is nobody, never everybody.
type Percent float64

// String formats p with as many digits as it needs, as in "0.5 %".
func (p Percent) String() string { return strconv.FormatFloat(float64(p), 'g', -1, 64) + " %" }

// threshold is the bucket below which units are in a share of p. It is the documented formula, truncation included;
// 100 % does not fit in it and is handled apart.
func (p Percent) threshold() uint64 { return uint64(float64(p) / 100 * (1 << 64)) }

// share reports whether p can be the share of a stage: above 0 and at most 100.
func (p Percent) share() bool { return p > 0 && p <= 100 }

// Percentages returns one [Stage] of [Everyone] for each percentage.
func Percentages(ps ...Percent) []Stage {
	stages := make([]Stage, len(ps))
	for i, p := range ps {
		stages[i] = Stage{Percent: p}
	}
	return stages
}

// Ramp returns a [Stage] of [Everyone] that climbs to p in at most 16 even steps over the given time, instead of at
// once. Like a bake, the climb counts only time in which outcomes of the candidate arrive.
func Ramp(over time.Duration, p Percent) Stage { return Stage{Percent: p, Over: over} }
