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
type units [unitLevels]bitmap

const (
	unitLevels = 3
	unitParts  = 1 << 16
	unitBits   = 5 // a level has one unit of 1<<unitBits of the level before
	partShift  = 20
	levelShift = partShift + 16
)

// bitmap holds two bits for each part of the units: whether one of the control has come, and one of the candidate.
type bitmap [unitParts / 32]atomic.Uint64

// known reports whether there is nothing to note of a unit. Where its bits are does not depend on its cohort, so that they
// can be on their way while that is found out.
func (m *units) known(side int, bucket uint64) bool {
	at := bucket>>partShift*2 | uint64(side)
	return m[0][at/64%(unitParts/32)].Load()&(1<<(at%64)) != 0 && bucket>>levelShift%(1<<unitBits) != 0
}

// add notes a unit, and reports whether it is the first of its part in either cohort.
func (m *units) add(side int, bucket uint64) (first bool) {
	at := bucket >> partShift * 2
	word, bit := at/64%(unitParts/32), uint64(1)<<(at%64+uint64(side))
	first = m[0][word].Or(bit)>>(at%64)&3 == 0
	for level, rest := 1, bucket>>levelShift; level < unitLevels && rest%(1<<unitBits) == 0; level, rest = level+1, rest>>unitBits {
		m[level][word].Or(bit)
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
		for i := range m[level] {
			set += mathbits.OnesCount64(m[level][i].Load() >> (side & 1) & 0x5555555555555555)
		}
		fill := float64(min(set, unitParts-1)) / unitParts
		n = -unitParts * math.Log1p(-fill) * float64(uint64(1)<<(unitBits*level))
		if fill <= fullest {
			break
		}
	}
	return uint64(math.Round(n))
}
