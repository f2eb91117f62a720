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
}

// metricLedger is one metric of one ring: totals consumed by cohort, and when the last block closed.
type metricLedger struct {
	consumed [2][]uint64
	seen     uint64 // candidate outcomes at the last step
	ahead    uint64 // of them, events that were acted on before their block closed
	closed   time.Time
}

func newLedger(s *snapshot, now time.Time) *ledger {
	l := &ledger{snap: s, rings: make([]ringLedger, len(s.rings))}
	for i := range s.rings {
		if s.rings[i].closed {
			continue
		}
		for _, m := range s.metrics {
			l.rings[i].metrics = append(l.rings[i].metrics, metricLedger{
				consumed: [2][]uint64{make([]uint64, m.kind.cells()), make([]uint64, m.kind.cells())},
				closed:   now,
			})
		}
	}
	return l
}

// cut is the evidence of one moment: the blocks that close now, and what to note once they are consumed.
type cut struct {
	at       time.Time
	blocks   []machine.Block
	outcomes []string // rings of the present epoch with new candidate outcomes
	breaches []machine.Breach
	ledgers  []*ledger // that were read
	notes    []cutNote
}

// cutNote is what one metric of one ring has come to.
type cutNote struct {
	m      *metricLedger
	totals [2][]uint64 // nil: no block closed
	seen   uint64
	ahead  uint64
}

// cut reads the ledger's cells. Each metric is read once, so that both cohorts come from the same moment. A ledger that
// is not the present one closes whatever came late.
func (l *ledger) cut(c *cut, present, last bool) {
	for i := range l.rings {
		ring := &l.snap.rings[i]
		fresh := false
		for j := range l.rings[i].metrics {
			m := &l.rings[i].metrics[j]
			view := l.snap.metrics[j]
			totals, block, sums := m.read(ring, j, view.kind)
			note := cutNote{m: m, seen: sum(totals[1])}
			fresh = fresh || note.seen > m.seen
			if closes(sums, ring.all, c.at.Sub(m.closed), present && !last) {
				note.totals = totals
				c.blocks = append(c.blocks, machine.Block{Epoch: l.snap.epoch, Block: judge.Block{
					Metric: nameOf(view.ref), Ring: ring.name, Control: block[0], Candidate: block[1],
				}})
			} else if view.never {
				note.ahead = block[1][1]
				if news := note.ahead - m.ahead; news > 0 {
					c.breaches = append(c.breaches, machine.Breach{Metric: nameOf(view.ref), Ring: ring.name, Events: news})
				}
			}
			c.notes = append(c.notes, note)
		}
		if fresh && present {
			c.outcomes = append(c.outcomes, ring.name)
		}
	}
}

// read is one metric's totals, what is new in them, and how many that is, by cohort.
func (m *metricLedger) read(ring *ringView, j int, kind metricKind) (totals, block [2][]uint64, sums [2]uint64) {
	for c := range totals {
		totals[c] = make([]uint64, kind.cells())
		ring.outcomes[c][j].AddTo(totals[c])
		block[c] = make([]uint64, kind.cells())
		for k, n := range totals[c] {
			block[c][k] = n - m.consumed[c][k]
			sums[c] += block[c][k]
		}
	}
	return totals, block, sums
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
		}
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
			r.pastCounts[i][c] += ring.counts[c].Total()
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
				for c := range ring.counts {
					counts[i][c] += ring.counts[c].Total()
				}
			}
		}
	}
	return counts
}
