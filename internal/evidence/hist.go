package evidence

import (
	"math"
	"math/bits"
	"time"
)

// Cells of a latency histogram. Their bounds are 2^(k/Steps) nanoseconds, so a
// cell is 2 % wide and a factor between durations is a shift of the index.
const (
	Steps = 35 // cells an octave

	minExp, maxExp = 10, 42 // octaves with cells: from 2^10 ns = 1.024 µs below 2^42 ns = 73 min

	// Cells is their number: one for all below 2^minExp ns, Steps an octave,
	// one for all from 2^maxExp ns on.
	Cells = (maxExp-minExp)*Steps + 2
)

// bounds[s] is 2^(63+s/Steps) rounded up, the lower bound of the s-th cell of
// an octave where the octave is scaled to the top of a uint64. A duration has
// no more bits than that, so comparing with it is exact.
var bounds = [Steps + 1]uint64{
	0x8000000000000000, 0x828f69a92a6bd402, 0x852bef4e0b5e38bc, 0x87d5d40ea72ef913, 0x8a8d5c62b775133f,
	0x8d52ce208af3eb23, 0x9026708408bc0932, 0x93088c35d733a4b6, 0x95f96b52a7bed348, 0x98f95972a7c2e49f,
	0x9c08a3b117c43215, 0x9f2798b409617cbd, 0xa25688b444f3dbd0, 0xa595c585579e3855, 0xa8e5a29dca9b622c,
	0xac46751f849deee5, 0xafb893e056194c24, 0xb33c5772b14fbe47, 0xb6d21a2e8f056939, 0xba7a383a80bcfcbc,
	0xbe350f94f1673025, 0xc203001d9572e35d, 0xc5e46b9f0b307cd0, 0xc9d9b5d8ac7ff620, 0xcde3448892c5fc7e,
	0xd2017f75ce2995d4, 0xd634d07ad120e231, 0xda7da3901158d184, 0xdedc66d6df09010b, 0xe3518aa473ca6ae3,
	0xe7dd818d3a0d24f8, 0xec80c0704e4f1c07, 0xf13bbe833b3b83db, 0xf60ef55df1e0a045, 0xfafae106ff2f92bd,
	math.MaxUint64,
}

// first[i] is the step that holds the lowest value whose top seven bits are
// 64+i. A 64th of an octave meets at most one bound, so the step of any value
// with these bits is first[i] or the next.
var first = [64]uint8{
	0, 0, 1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 8, 9, 9, 10,
	11, 11, 12, 13, 13, 14, 14, 15, 16, 16, 17, 17, 18, 18, 19, 19,
	20, 20, 21, 22, 22, 23, 23, 24, 24, 24, 25, 25, 26, 26, 27, 27,
	28, 28, 29, 29, 30, 30, 30, 31, 31, 32, 32, 32, 33, 33, 34, 34,
}

// Index returns the cell of d: 0 for less than 1.024 µs, also negative,
// Cells-1 for 2^42 ns and more.
func Index(d time.Duration) int {
	if d < 1<<minExp {
		return 0
	}
	if d >= 1<<maxExp {
		return Cells - 1
	}
	z := bits.LeadingZeros64(uint64(d))
	m := uint64(d) << (z & 63)
	i := (63-minExp-z)*Steps + 1
	s := int(first[m>>57&63])
	if m >= bounds[s+1] {
		s++
	}
	return i + s
}

// Lower returns the smallest duration of cell i, 0 for the first cell and the
// largest duration for Cells, so that Lower(i) ≤ d < Lower(i+1) in cell i.
func Lower(i int) time.Duration {
	switch {
	case i <= 0:
		return 0
	case i >= Cells:
		return math.MaxInt64
	case i == Cells-1:
		return 1 << maxExp
	}
	octave, step := (i-1)/Steps, (i-1)%Steps
	return time.Duration((bounds[step]-1)>>(63-minExp-octave) + 1)
}

// Shift returns by how many cells the factor moves a duration, rounded down
// and up; the two are equal where the factor is a power of 2^(1/Steps) up to
// one part in 10^10. A factor that is not above 0 moves nothing.
func Shift(factor float64) (down, up int) {
	if !(factor > 0) {
		return 0, 0
	}
	x := min(max(Steps*math.Log2(factor), -Cells), Cells)
	if r := math.Round(x); math.Abs(x-r) < 5e-9 {
		return int(r), int(r)
	}
	return int(math.Floor(x)), int(math.Ceil(x))
}
