package tally

import (
	"encoding/binary"
	"math/bits"
	"slices"
)

// A vector is written in frames of 128 cells, of which the first is shorter where they are not a multiple. A frame is a
// byte that says how, and columns. The cells of a metric that is counted by 64 groups of units are one frame: for each
// group those that are good and those that are bad. Metrics that are recorded together have the same totals.
//
// A column is written in parts of 32 numbers: a byte with their width in bits, with its highest bit set before the least of
// them, which is then taken from each; and their bits, the lowest first. It is a frame of reference: see Goldstein,
// Ramakrishnan and Shaft, Compressing relations and indexes, ICDE 1998.
const (
	frameCells = 128
	framePairs = frameCells / 2
	partCells  = 32

	frameZero  = 0 // nothing follows
	framePlain = 1 // the cells
	framePair  = 2 // the second of each two cells, and the sums of the two
	frameLike  = 3 // the second of each two cells, and the sums of the two less those of the same cohort's vector before
)

// likes are the sums of two cells in the last frame of the vector before, of each cohort.
type likes [2][framePairs]uint64

// packer appends vectors.
type packer struct {
	b     []byte
	likes likes
}

// partWidth is how many bits each number of a part has, and what is taken from each.
func partWidth(xs []uint64) (width int, least uint64) {
	least, most := xs[0], xs[0]
	for _, x := range xs[1:] {
		least, most = min(least, x), max(most, x)
	}
	if width = bits.Len64(most - least); width == bits.Len64(most) {
		least = 0
	}
	return width, least
}

func columnSize(xs []uint64) int {
	size := 0
	for len(xs) > 0 {
		part := xs[:min(partCells, len(xs))]
		width, least := partWidth(part)
		if size += 1 + (width*len(part)+7)/8; least > 0 {
			size += (bits.Len64(least) + 6) / 7
		}
		xs = xs[len(part):]
	}
	return size
}

func (p *packer) column(xs []uint64) {
	for len(xs) > 0 {
		part := xs[:min(partCells, len(xs))]
		width, least := partWidth(part)
		if least > 0 {
			p.b = binary.AppendUvarint(append(p.b, byte(width)|0x80), least)
		} else {
			p.b = append(p.b, byte(width))
		}
		var out [partCells * 8]byte
		for i, x := range part {
			for x, at := x-least, i*width; x > 0; {
				out[at>>3] |= byte(x << (at & 7))
				took := 8 - at&7
				x >>= took
				at += took
			}
		}
		p.b = append(p.b, out[:(width*len(part)+7)/8]...)
		xs = xs[len(part):]
	}
}

// vector appends a cohort's vector.
func (p *packer) vector(cohort int, xs []uint64) {
	for len(xs) > 0 {
		n := (len(xs)-1)%frameCells + 1
		p.frame(xs[:n], &p.likes[cohort], len(xs) == frameCells)
		xs = xs[n:]
	}
}

// frame appends a frame in the shortest way. last: it is a whole one, and the last of its vector.
func (p *packer) frame(xs []uint64, like *[framePairs]uint64, last bool) {
	if !slices.ContainsFunc(xs, func(x uint64) bool { return x > 0 }) {
		p.b = append(p.b, frameZero)
		return
	}
	var seconds, sums, rests [framePairs]uint64
	n := len(xs) / 2
	paired := len(xs)%2 == 0
	for i := range n {
		a, b := xs[2*i], xs[2*i+1]
		seconds[i], sums[i] = b, a+b
		paired = paired && a+b >= b // or else there are more than a number holds
		rests[i] = zigzag(sums[i] - like[i])
	}
	second := columnSize(seconds[:n])
	sum, rest := columnSize(sums[:n]), columnSize(rests[:n])
	switch {
	case !paired || columnSize(xs) < second+min(sum, rest):
		p.b = append(p.b, framePlain)
		p.column(xs)
		return
	case sum <= rest:
		p.b = append(p.b, framePair)
		p.column(seconds[:n])
		p.column(sums[:n])
	default:
		p.b = append(p.b, frameLike)
		p.column(seconds[:n])
		p.column(rests[:n])
	}
	if last {
		*like = sums
	}
}

// column reads a column, of which no number is above most.
func (r *reader) column(to []uint64, most uint64) {
	b := r.b
	for len(to) > 0 {
		part := to[:min(partCells, len(to))]
		to = to[len(part):]
		if len(b) == 0 {
			r.fail("counts end too soon")
			return
		}
		width, least := int(b[0]&0x7f), uint64(0)
		if b[0] < 0x80 {
			b = b[1:]
		} else {
			n, used := binary.Uvarint(b[1:])
			if used <= 0 || n > most {
				r.fail("the least count of some cannot be read")
				return
			}
			least, b = n, b[1+used:]
		}
		size := (width*len(part) + 7) / 8
		if width > 64 || size > len(b) {
			r.fail("counts end too soon")
			return
		}
		from := b
		b = b[size:]
		if len(b) < 16 { // what is read below goes beyond the end
			var all [partCells*8 + 16]byte
			copy(all[:], from[:size])
			from = all[:]
		}
		mask := uint64(1)<<width - 1
		if least+mask < mask || least+mask > most {
			for i := range part {
				n := cell(from, i, width) + least
				if n < least || n > most {
					r.fail("a count is too large")
					return
				}
				part[i] = n
			}
			continue
		}
		w := uint(width)
		switch {
		case len(part) == partCells && width <= 8: // eight at once
			for i := 0; i < partCells; i += 8 {
				x, to := binary.LittleEndian.Uint64(from[i/8*width:]), (*[8]uint64)(part[i:])
				to[0] = x&mask + least
				x >>= w & 63
				to[1] = x&mask + least
				x >>= w & 63
				to[2] = x&mask + least
				x >>= w & 63
				to[3] = x&mask + least
				x >>= w & 63
				to[4] = x&mask + least
				x >>= w & 63
				to[5] = x&mask + least
				x >>= w & 63
				to[6] = x&mask + least
				x >>= w & 63
				to[7] = x&mask + least
			}
		case len(part) == partCells && width <= 14: // four
			for i := 0; i < partCells; i += 4 {
				x, to := binary.LittleEndian.Uint64(from[i*width>>3:])>>(i*width&7), (*[4]uint64)(part[i:])
				to[0] = x&mask + least
				x >>= w & 63
				to[1] = x&mask + least
				x >>= w & 63
				to[2] = x&mask + least
				x >>= w & 63
				to[3] = x&mask + least
			}
		default:
			for i := range part {
				part[i] = cell(from, i, width) + least
			}
		}
	}
	r.b = b
}

// cell is the i-th of the numbers that begin at b. Up to 16 bytes behind them are read.
func cell(b []byte, i, width int) uint64 {
	at := i * width
	x := binary.LittleEndian.Uint64(b[at>>3:])
	x >>= at & 7
	if width > 57 {
		x |= uint64(b[at>>3+8]) << (64 - at&7)
	}
	return x & (1<<width - 1)
}

// vector adds a cohort's vector to dst.
func (r *reader) vector(cohort int, dst []uint64, most uint64) {
	for len(dst) > 0 && r.err == nil {
		n := (len(dst)-1)%frameCells + 1
		r.frame(dst[:n], &r.likes[cohort], len(dst) == frameCells, most)
		dst = dst[n:]
	}
}

func (r *reader) frame(dst []uint64, like *[framePairs]uint64, last bool, most uint64) {
	how := r.byte()
	if how == frameZero {
		return
	}
	if how == framePlain {
		cells := r.cells[:len(dst)]
		if r.column(cells, most); r.err == nil {
			for i, x := range cells {
				dst[i] += x
			}
		}
		return
	}
	if how > frameLike || len(dst)%2 != 0 {
		r.fail("counts are in a way that is not known")
		return
	}
	n := len(dst) / 2
	r.column(r.pairs.seconds[:n], most)
	r.column(r.pairs.sums[:n], 1<<64-1)
	if r.err != nil {
		return
	}
	if n < framePairs {
		clear(r.pairs.seconds[n:])
		clear(r.pairs.sums[n:])
	}
	if how == frameLike {
		for i, x := range r.pairs.sums[:n] {
			r.pairs.sums[i] = unzigzag(x) + like[i]
		}
	}
	var wrong uint64
	if n == framePairs { // nearly always, and without looking at bounds
		wrong = r.pairs.addTo((*[frameCells]uint64)(dst), most)
	} else {
		var all [frameCells]uint64
		wrong = r.pairs.addTo(&all, most)
		for i := range dst {
			dst[i] += all[i]
		}
	}
	if wrong != 0 {
		r.fail("a count is too large")
		return
	}
	if last {
		*like = r.pairs.sums
	}
}

// pairs are the cells of a frame, as the second of each two and the sums of the two.
type pairs struct{ seconds, sums [framePairs]uint64 }

// addTo adds the cells to dst. It returns 0 if none of the first of each two is below zero, or above most.
func (p *pairs) addTo(dst *[frameCells]uint64, most uint64) (wrong uint64) {
	for i, second := range &p.seconds {
		first, below := bits.Sub64(p.sums[i], second, 0)
		_, above := bits.Sub64(most, first, 0)
		wrong |= below | above
		dst[2*i] += first
		dst[2*i+1] += second
	}
	return wrong
}
