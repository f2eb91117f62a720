package rollout

import (
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// A block closes once each cohort has this many outcomes, or after blockAge with any: a rule that never looks at what the
// outcomes were.
const (
	blockLeast = 4
	blockAge   = time.Minute
)

// ledger is what was consumed of the evidence of one snapshot.
type ledger struct {
	snap  *snapshot
	rings []ringLedger
}

// ringLedger is one ring of a ledger.
type ringLedger struct {
	metrics []metricLedger
	base    [2][slots]*slotCounts // what the cells of each slot held when it began, by cohort
	silent  uint32                // the slot up to which silence was consumed
	first   firstLedger
}

// metricLedger is one metric of one ring: totals consumed by cohort, group and cell, of its marks as well, and when the
// last block closed.
type metricLedger struct {
	consumed [2][]uint64
	marked   [2][]uint64
	seen     uint64 // candidate outcomes at the last step
	ahead    uint64 // of them, events that were acted on before their block closed
	closed   time.Time
}

// firstLedger is the units of one ring that came for the first time: totals consumed by cohort and group.
type firstLedger struct {
	consumed [2][]uint64
	closed   time.Time
}

var nothingYet slotCounts

func newLedger(s *snapshot, now time.Time) *ledger {
	l := &ledger{snap: s, rings: make([]ringLedger, len(s.rings))}
	for i := range s.rings {
		ring, rl := &s.rings[i], &l.rings[i]
		if ring.closed {
			continue
		}
		for j := range s.metrics {
			m := metricLedger{closed: now}
			for c := range m.consumed {
				m.consumed[c] = make([]uint64, s.metrics[j].cells*s.metrics[j].groups)
				if marks := ring.marks[j]; marks != nil {
					m.marked[c] = make([]uint64, marks.tables[c].Width()*marks.tables[c].Groups())
				}
			}
			rl.metrics = append(rl.metrics, m)
		}
		rl.silent, rl.first.closed = s.r.slot.Load()-1, now
		for c := range rl.base {
			for k := range rl.base[c] {
				rl.base[c][k] = &nothingYet
			}
			rl.first.consumed[c] = make([]uint64, slotGroups)
		}
	}
	return l
}

// cut is the evidence of one moment: the blocks that close now, and what to note once they are consumed.
type cut struct {
	at       time.Time
	alarm    bool // only what must never happen: a block must not close because of what its outcomes are
	blocks   []machine.Block
	outcomes []string // rings of the present epoch with new candidate outcomes
	breaches []machine.Breach
	reasons  map[string][]string
	ledgers  []*ledger // that were read
	notes    []cutNote
	slots    []slotNote
	firsts   []firstNote
}

// cutNote is what one metric of one ring has come to.
type cutNote struct {
	m      *metricLedger
	totals [2][]uint64 // nil: no block closed
	marked [2][]uint64
	seen   uint64
	ahead  uint64
}

// firstNote is what the first units of one ring have come to.
type firstNote struct {
	f      *firstLedger
	totals [2][]uint64
}

// cut reads the ledger's cells. Each metric is read once, so that both cohorts come from the same moment. A ledger that
// is not the present one closes whatever came late.
func (l *ledger) cut(c *cut, st *machine.State, last bool) {
	present := l.snap.epoch == st.Epoch && !l.snap.over.Load()
	for i := range l.rings {
		ring := &l.snap.rings[i]
		if ring.closed {
			continue
		}
		fresh := false
		for j := range l.rings[i].metrics {
			m := &l.rings[i].metrics[j]
			view := &l.snap.metrics[j]
			now := m.read(ring, j, view)
			note := cutNote{m: m, seen: sum(now.totals[1])}
			fresh = fresh || note.seen > m.seen
			if view.sourced {
				c.notes = append(c.notes, note)
				continue // it is judged by what its source says
			}
			if !c.alarm && closes(now.sums, ring.all, c.at.Sub(m.closed), present && !last) {
				note.totals, note.marked = now.totals, now.marked
				c.blocks = append(c.blocks, machine.Block{Epoch: l.snap.epoch, Block: judge.Block{
					Metric: nameOf(view.ref), Ring: ring.name, Control: now.cells[0], Candidate: now.cells[1],
					ControlBy: now.by[0], CandidateBy: now.by[1], Known: m.ahead,
				}})
			} else if view.never {
				note.ahead = now.cells[1][1]
				if news := note.ahead - m.ahead; news > 0 {
					c.breaches = append(c.breaches, machine.Breach{Metric: nameOf(view.ref), Ring: ring.name, Events: news})
				}
			}
			c.notes = append(c.notes, note)
		}
		if fresh && present {
			c.outcomes = append(c.outcomes, ring.name)
		}
		if c.alarm {
			continue
		}
		if l.snap.r.guards.silence {
			l.cutSlots(c, st, i)
		}
		if l.snap.r.guards.split && !ring.all {
			l.cutFirst(c, i, present && !last)
		}
	}
}

// reading is what the cells of one metric hold, by cohort.
type reading struct {
	totals, marked [2][]uint64 // all there is, by group and cell
	cells, by      [2][]uint64 // what is new: by cell, and by group as well where it is known
	sums           [2]uint64   // how many that is
}

// read reads one metric. Its cells are the sums of its groups, so that the two always agree; only a timing, whose
// histogram has no groups, is counted in two places.
func (m *metricLedger) read(ring *ringView, j int, view *metricView) reading {
	var now reading
	for c := range now.totals {
		totals := make([]uint64, view.cells*view.groups)
		ring.outcomes[c][j].AddGroupsTo(totals)
		by := less(totals, m.consumed[c])
		cells := by
		if view.groups > 1 {
			cells = make([]uint64, view.cells)
			for g := range view.groups {
				for k, n := range by[g*view.cells : (g+1)*view.cells] {
					cells[k] += n
				}
			}
		}
		now.totals[c], now.cells[c], now.sums[c] = totals, cells, sum(cells)
		if view.groups > 1 {
			now.by[c] = by
		} else if marks := ring.marks[j]; marks != nil {
			now.marked[c] = marks.totals(ring, c, m.marked[c])
			now.by[c] = less(now.marked[c], m.marked[c])
		}
	}
	return now
}

// less is what totals have over what was consumed.
func less(totals, consumed []uint64) []uint64 {
	news := make([]uint64, len(totals))
	for k, n := range totals {
		news[k] = n - consumed[k]
	}
	return news
}

// cutFirst adds a block of the units that came for the first time. Which cohort they are of is what is judged, so the
// rule by which it closes looks at both together.
func (l *ledger) cutFirst(c *cut, i int, present bool) {
	ring, f := &l.snap.rings[i], &l.rings[i].first
	var note firstNote
	var by, cells [2][]uint64
	for cohort := range by {
		totals := make([]uint64, slotGroups)
		ring.first[cohort].AddGroupsTo(totals)
		note.totals[cohort] = totals
		by[cohort] = less(totals, f.consumed[cohort])
		cells[cohort] = []uint64{sum(by[cohort])}
	}
	n := cells[0][0] + cells[1][0]
	if n == 0 || present && n < 2*blockLeast && c.at.Sub(f.closed) < blockAge {
		return
	}
	note.f = f
	c.firsts = append(c.firsts, note)
	c.blocks = append(c.blocks, machine.Block{Epoch: l.snap.epoch, Block: judge.Block{
		Metric: GuardSplit, Ring: ring.name, Control: cells[0], Candidate: cells[1], ControlBy: by[0], CandidateBy: by[1],
		Share: float64(ring.limit) / (1 << 64),
	}})
}

// closes is the rule by which a block closes. alone: the ring has no control.
func closes(sums [2]uint64, alone bool, age time.Duration, present bool) bool {
	control, candidate := sums[0], sums[1]
	switch {
	case control+candidate == 0:
		return false
	case !present, age >= blockAge:
		return true
	}
	return candidate >= blockLeast && (alone || control >= blockLeast)
}

// commit notes that the cut's blocks were consumed.
func (c *cut) commit() {
	for _, n := range c.notes {
		n.m.seen, n.m.ahead = n.seen, n.ahead
		if n.totals[0] != nil {
			n.m.consumed, n.m.closed = n.totals, c.at
			n.m.marked = n.marked
		}
	}
	for _, n := range c.slots {
		n.ring.silent = n.upto
	}
	for _, n := range c.firsts {
		n.f.consumed, n.f.closed = n.totals, c.at
	}
}

func sum(xs []uint64) uint64 {
	var n uint64
	for _, x := range xs {
		n += x
	}
	return n
}

// retire adds what a ledger's cells came to, to the totals that metrics are read from, and closes them.
func (r *Rollout) retireLocked(l *ledger) {
	l.snap.over.Store(true)
	for i := range l.snap.rings {
		ring := &l.snap.rings[i]
		if ring.closed {
			continue
		}
		for c := range ring.outcomes {
			r.pastCounts[i][c] += ring.slots.total(c, decided) + ring.begun[c].Load()
			for j, t := range ring.outcomes[c] {
				t.AddTo(r.past[i][c][j])
			}
		}
	}
}

// decidedLocked counts this process's decisions by ring and cohort.
func (r *Rollout) decidedLocked() [][2]uint64 {
	counts := append([][2]uint64(nil), r.pastCounts...)
	for _, l := range r.ledgers {
		for i := range l.snap.rings {
			if ring := &l.snap.rings[i]; !ring.closed {
				for c := range ring.outcomes {
					counts[i][c] += ring.slots.total(c, decided) + ring.begun[c].Load()
				}
			}
		}
	}
	return counts
}
