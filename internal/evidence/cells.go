package evidence

import (
	"sync/atomic"
	"unsafe"
)

const (
	// Shards is how many copies of every cell there are, so that cores which record at the same time seldom share a
	// cache line.
	Shards = 8
	// Groups is how many groups of units a sharded cell is split into, by the lowest six bits of the unit's bucket.
	// Exposure uses the highest bits, so every group holds both cohorts.
	Groups = 64

	line = 128 / 8 // words in two cache lines: adjacent lines are prefetched in pairs
)

// Shard returns a number below [Shards] that is cheap to get and mostly the same for one goroutine: it is made from the
// address of the goroutine's stack. Two calls may differ; nothing may depend on it but speed.
func Shard() uint64 {
	var here byte
	// Fibonacci hashing sends neighbouring stacks to distant shards.
	return uint64(uintptr(unsafe.Pointer(&here))) >> 11 * 0x9e3779b97f4a7c15 >> 61
}

// Table counts the disjoint outcomes of one metric in one ring and cohort: which of width cells an observation fell
// into. Every observation is one atomic add to one cell, so the number of observations is the sum of the cells and a
// reader never sees more events than observations. It may be used from any number of goroutines.
type Table struct {
	width  int // cells
	groups int // 1 or Groups
	stride int // words a shard, padded
	words  []atomic.Uint64
}

// NewTable returns a table of width cells, split by shard and, if grouped, by group of units as well.
func NewTable(width int, grouped bool) *Table {
	t := &Table{width: width, groups: 1}
	if grouped {
		t.groups = Groups
	}
	t.stride = (width*t.groups+line-1)/line*line + line
	t.words = make([]atomic.Uint64, Shards*t.stride)
	return t
}

// Add counts one observation in cell, of a unit of the given group. The group is ignored by a table that is not grouped.
func (t *Table) Add(shard, group uint64, cell int) {
	i := int(shard)*t.stride + cell
	if t.groups > 1 {
		i += int(group%Groups) * t.width
	}
	t.words[i].Add(1)
}

// Width is the number of cells.
func (t *Table) Width() int { return t.width }

// AddTo adds the present totals, summed over shards and groups, to dst, which must have length [Table.Width].
func (t *Table) AddTo(dst []uint64) {
	for s := range Shards {
		for g := range t.groups {
			row := t.words[s*t.stride+g*t.width:]
			for c := range t.width {
				dst[c] += row[c].Load()
			}
		}
	}
}

// Counter is one count, split by shard. The zero value is ready. It may be used from any number of goroutines.
type Counter struct {
	shards [Shards]struct {
		n atomic.Uint64
		_ [line - 1]uint64
	}
}

// Inc counts one more.
func (c *Counter) Inc(shard uint64) { c.shards[shard%Shards].n.Add(1) }

// Total is the present count.
func (c *Counter) Total() uint64 {
	var n uint64
	for i := range c.shards {
		n += c.shards[i].n.Load()
	}
	return n
}
