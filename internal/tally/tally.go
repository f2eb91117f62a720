// Package tally is evidence as it travels: what one process has counted, as one document, the sum of many of them, and how
// much of that sum was consumed.
package tally

import (
	"cmp"
	"slices"

	"github.com/stagedrollout/rollout/internal/evidence"
)

// Key names a series of counts. Two processes whose policies count something else under one name differ in Cells at
// least, or in what their policy's digest says.
type Key struct {
	Epoch        uint64
	Ring, Metric string
	Cells        int // of either cohort
}

// Compare orders keys, the oldest epoch first.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Epoch, o.Epoch), cmp.Compare(k.Ring, o.Ring), cmp.Compare(k.Metric, o.Metric), cmp.Compare(k.Cells, o.Cells))
}

// Counts are outcomes in disjoint cells, of the control and of the candidate.
type Counts [2][]uint64

// NewCounts are so many cells without an outcome.
func NewCounts(cells int) Counts {
	all := make([]uint64, 2*cells)
	return Counts{all[:cells:cells], all[cells:]}
}

// Sum is how many outcomes a cohort has.
func (c Counts) Sum(cohort int) uint64 {
	var n uint64
	for _, x := range c[cohort] {
		n += x
	}
	return n
}

// Less is c less other, which has as many cells.
func (c Counts) Less(other Counts) Counts {
	d := NewCounts(len(c[0]))
	for i := range c {
		for k, x := range c[i] {
			d[i][k] = x - other[i][k]
		}
	}
	return d
}

// Plus is the sum of c and other, which has as many cells.
func (c Counts) Plus(other Counts) Counts {
	d := NewCounts(len(c[0]))
	for i := range c {
		for k, x := range c[i] {
			d[i][k] = x + other[i][k]
		}
	}
	return d
}

// Series are the counts of one metric in one ring, of decisions made in one epoch.
type Series struct {
	Key
	Counts Counts // of one cut: both cohorts at one moment
	Events uint64 // of the candidate, that must never happen: up to now, which may be after the cut
}

// Open is work of one ring that was begun and not ended, by cohort and group of units. Its slices never change.
type Open struct {
	Ring      string   `json:"ring"`
	Gen       uint64   `json:"gen"`
	Candidate []uint64 `json:"candidate,omitempty"`
	Control   []uint64 `json:"control,omitempty"`
}

// Count is how much work that is.
func (o Open) Count() (candidate, control uint64) {
	c := Counts{o.Control, o.Candidate}
	return c.Sum(1), c.Sum(0)
}

// MaxOpen is the most work of a group of units that may be open.
const MaxOpen = 1 << 40

// Valid reports whether a writer of this package's users can have written it.
func (o Open) Valid() bool {
	for _, by := range [][]uint64{o.Candidate, o.Control} {
		if len(by) != 0 && len(by) != evidence.Groups || slices.ContainsFunc(by, func(n uint64) bool { return n > MaxOpen }) {
			return false
		}
	}
	return true
}

// About is what a document says of the process that it is of.
type About struct {
	Inc    string // its incarnation
	Birth  uint64 // round of the state that it began in
	Seq    uint64 // of the cut, rising
	Ack    uint64 // version of the state whose rollback this process has followed to the end; 0: none
	Sealed bool   // nothing is added any more
	Open   []Open
}

// Doc is what one incarnation of a process has counted.
type Doc struct {
	About
	Series []Series // by key
}

// Same reports whether two documents say the same but for their Seq.
func (d *Doc) Same(o *Doc) bool {
	if o == nil || d.Inc != o.Inc || d.Ack != o.Ack || d.Sealed != o.Sealed || !SameOpen(d.Open, o.Open) {
		return false
	}
	return slices.EqualFunc(d.Series, o.Series, func(a, b Series) bool {
		return a.Key == b.Key && a.Events == b.Events && slices.Equal(a.Counts[0], b.Counts[0]) && slices.Equal(a.Counts[1], b.Counts[1])
	})
}

// SameOpen reports whether two processes have the same work open.
func SameOpen(a, b []Open) bool {
	return slices.EqualFunc(a, b, func(a, b Open) bool {
		return a.Ring == b.Ring && a.Gen == b.Gen && slices.Equal(a.Candidate, b.Candidate) && slices.Equal(a.Control, b.Control)
	})
}

// Find is the series of a key, or nil.
func (d *Doc) Find(k Key) *Series {
	if d == nil {
		return nil
	}
	i, ok := slices.BinarySearchFunc(d.Series, k, func(s Series, k Key) int { return s.Compare(k) })
	if !ok {
		return nil
	}
	return &d.Series[i]
}

// Add adds a series at the end, if it has counted anything.
func (d *Doc) Add(s Series) {
	if s.Events > 0 || s.Counts.Sum(0) > 0 || s.Counts.Sum(1) > 0 {
		d.Series = append(d.Series, s)
	}
}

// Merged is the document with its series in order, those of one key as one.
func (d *Doc) Merged() *Doc {
	d.Sort()
	var all []Series
	for _, s := range d.Series {
		if n := len(all); n > 0 && all[n-1].Key == s.Key {
			all[n-1].Counts, all[n-1].Events = all[n-1].Counts.Plus(s.Counts), all[n-1].Events+s.Events
			continue
		}
		s.Counts = Counts{slices.Clone(s.Counts[0]), slices.Clone(s.Counts[1])}
		all = append(all, s)
	}
	d.Series = all
	return d
}

// Less is the document without what base has of each series.
func (d *Doc) Less(base *Doc) *Doc {
	rest := &Doc{About: d.About}
	for _, s := range d.Series {
		if b := base.Find(s.Key); b != nil {
			s.Counts, s.Events = s.Counts.Less(b.Counts), s.Events-b.Events
		}
		rest.Add(s)
	}
	return rest
}

// Plus is the series of both documents.
func (d *Doc) Plus(o *Doc) *Doc {
	sum := &Doc{}
	for _, of := range []*Doc{d, o} {
		if of != nil {
			sum.Series = append(sum.Series, of.Series...)
		}
	}
	return sum.Merged()
}

// Sort puts the series in the order that a document has them in.
func (d *Doc) Sort() { slices.SortFunc(d.Series, func(a, b Series) int { return a.Compare(b.Key) }) }

// Total is the sum of one series over documents.
type Total struct {
	Counts Counts
	Events uint64
}

// Sum is the sum of documents. The zero value is that of none.
type Sum struct {
	Totals map[Key]*Total
	known  []keyed // of the first document
}

func (s *Sum) at(k Key) *Total {
	t := s.Totals[k]
	if t == nil {
		if s.Totals == nil {
			s.Totals = map[Key]*Total{}
		}
		t = &Total{Counts: NewCounts(k.Cells)}
		s.Totals[k] = t
	}
	return t
}

// Add adds a document.
func (s *Sum) Add(d *Doc) {
	for i := range d.Series {
		x := &d.Series[i]
		t := s.at(x.Key)
		t.Events += x.Events
		for c := range x.Counts {
			for k, n := range x.Counts[c] {
				t.Counts[c][k] += n
			}
		}
	}
}

// Merge adds what another sum is of.
func (s *Sum) Merge(o *Sum) {
	for k, x := range o.Totals {
		t := s.at(k)
		t.Events += x.Events
		for c := range x.Counts {
			for i, n := range x.Counts[c] {
				t.Counts[c][i] += n
			}
		}
	}
}

// Taken is how much of a series was consumed, less what was folded: of documents that are no more. Its numbers may be
// below zero, in two's complement, where something was folded that was not consumed yet. It never changes.
type Taken struct {
	Counts Counts
	Seen   uint64 // candidate outcomes that counted as news
	Ahead  uint64 // events that were acted on
	Closed int64  // when the last block closed, by the state's own clock
}

// Less is t less a series that is folded.
func (t *Taken) Less(x *Series) *Taken {
	c := *t
	c.Counts = t.Counts.Less(x.Counts)
	c.Seen -= x.Counts.Sum(1)
	c.Ahead -= x.Events
	return &c
}

// Waits reports whether something of the series was folded that was not consumed yet, and all that was consumed is folded:
// it may be that no document has the series any more.
func (t *Taken) Waits() bool {
	waits := int64(t.Ahead) < 0
	for _, cohort := range t.Counts {
		for _, n := range cohort {
			if int64(n) > 0 {
				return false
			}
			waits = waits || n != 0
		}
	}
	return waits
}

// Ledger is how much of every series was consumed. Its values never change.
type Ledger map[Key]*Taken
