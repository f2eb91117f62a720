package rollout

import (
	"math"
	mathbits "math/bits"
	"sync/atomic"
)

// units are the units of one ring that came in one generation, by cohort, as bits: which of 65,536 parts of the units, by
// bits of the bucket that neither exposure nor groups use, have come. From how many have, it follows about how many units
// did. Where nearly all have there is a second map of the same size for one unit of 32, and a third for one of 1,024: a
// multiresolution bitmap (Estan, Varghese and Fisk, Bitmap algorithms for counting active flows on high speed links,
// 2003), with a standard error of about 1 % from one unit to 300 million. Its first map costs a decision no more than the
// guard [GuardSplit] would by itself.
type units [2][unitLevels]bitmap

const (
	unitLevels = 3
	unitParts  = 1 << 16
	unitBits   = 5 // a level has one unit of 1<<unitBits of the level before
	partShift  = 20
	levelShift = partShift + 16
)

// bitmap holds one bit for each part of the units.
type bitmap [unitParts / 64]atomic.Uint64

func bitOf(bucket uint64) (word int, bit uint64) {
	return int(bucket >> (partShift + 6) & (unitParts/64 - 1)), 1 << (bucket >> partShift & 63)
}

// known reports whether there is nothing to note of a unit.
func (m *units) known(side int, bucket uint64) bool {
	word, bit := bitOf(bucket)
	return m[side&1][0][word].Load()&bit != 0 && bucket>>levelShift&(1<<unitBits-1) != 0
}

// add notes a unit, and reports whether it is the first of its part in either cohort.
func (m *units) add(side int, bucket uint64) (first bool) {
	word, bit := bitOf(bucket)
	mine := &m[side&1]
	first = mine[0][word].Or(bit)&bit == 0 && m[1-side&1][0][word].Load()&bit == 0
	for level, rest := 1, bucket>>levelShift; level < unitLevels && rest&(1<<unitBits-1) == 0; level, rest = level+1, rest>>unitBits {
		mine[level][word].Or(bit)
	}
	return first
}

// fullest is the part of a level's bits up to which they are counted by: beyond it the next level is more exact.
const fullest = 0.996

// count estimates how many units of a cohort came.
func (m *units) count(side int) uint64 {
	n := 0.0
	for level := range unitLevels {
		set := 0
		for i := range m[side&1][level] {
			set += mathbits.OnesCount64(m[side&1][level][i].Load())
		}
		fill := float64(min(set, unitParts-1)) / unitParts
		n = -unitParts * math.Log1p(-fill) * float64(uint64(1)<<(unitBits*level))
		if fill <= fullest {
			break
		}
	}
	return uint64(math.Round(n))
}
