package evidence

import (
	"sync/atomic"
	"unsafe"
)

const (
	// Shards is how many copies of every cell there are, so that cores which record at the same time seldom share a
	// cache line.
	Shards = 8
	// Groups is the most groups of units a cell is split into, by the lowest six bits of the unit's bucket. Exposure uses
	// the highest bits, so every group holds both cohorts.
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
	width  int    // cells
	groups int    // a power of two
	mask   uint64 // groups - 1
	layer  int    // words a layer
	words  [Shards][]atomic.Uint64
}

// NewTable returns a table of width cells, split by shard and into groups of units: 1, or another power of two up to
// [Groups].
func NewTable(width, groups int) *Table { return NewLayers(1, width, groups) }

// NewLayers returns a table that is split into layers as well.
func NewLayers(layers, width, groups int) *Table {
	t := &Table{width: width, groups: groups, mask: uint64(groups - 1), layer: width * groups}
	n := layers * t.layer
	stride := (n+line-1)/line*line + line
	all := make([]atomic.Uint64, Shards*stride)
	for s := range t.words {
		t.words[s] = all[s*stride:][:n:n]
	}
	return t
}

// Add counts one observation in cell, of a unit of the given group, whose lowest bits count.
func (t *Table) Add(shard, group uint64, cell int) {
	t.AddN(shard, group, cell, 1)
}

// AddN adds n observations, which may be negative in a cell that is a balance: sums of it are right, each word is not.
func (t *Table) AddN(shard, group uint64, cell, n int) {
	t.words[shard%Shards][int(group&t.mask)*t.width+cell].Add(uint64(n))
}

// AddAt is Add for a caller who knows the table's form and counts for himself: in layer l, (l·groups + group)·width +
// cell.
func (t *Table) AddAt(shard uint64, at int) { t.words[shard%Shards][at].Add(1) }

// Width is the number of cells.
func (t *Table) Width() int { return t.width }

// Groups is the number of groups.
func (t *Table) Groups() int { return t.groups }

// AddTo adds the present totals, summed over shards, layers and groups, to dst, which must have length [Table.Width].
func (t *Table) AddTo(dst []uint64) { t.add(dst[:t.width], 0, len(t.words[0])) }

// AddGroupsTo adds the present totals, summed over shards and layers, to dst, group after group. It must have room for
// the cells of every group.
func (t *Table) AddGroupsTo(dst []uint64) { t.add(dst[:t.layer], 0, len(t.words[0])) }

// AddLayerTo is AddGroupsTo of one layer.
func (t *Table) AddLayerTo(dst []uint64, layer int) {
	t.add(dst[:t.layer], layer*t.layer, (layer+1)*t.layer)
}

// add adds the words from one index to another of every shard to dst, over and over. A table has many more words than
// ever count anything, so it goes through them as fast as they come.
func (t *Table) add(dst []uint64, from, to int) {
	for s := range t.words {
		words := t.words[s][from:to]
		for len(words) > 0 {
			row := words[:min(len(dst), len(words))]
			for k := range row {
				if n := row[k].Load(); n != 0 {
					dst[k] += n
				}
			}
			words = words[len(row):]
		}
	}
}
