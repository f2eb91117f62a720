package machine

import (
	"fmt"
	"slices"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/tally"
)

// What a process had begun and not ended when it died is a failure of the cohort it was begun in: a crash leaves nothing
// else behind.

// checkOpen finds what no writer of this package would have written.
func checkOpen(all []Open) error {
	for _, o := range all {
		if !o.Valid() {
			return fmt.Errorf("the open work of %q cannot be", o.Ring)
		}
	}
	return nil
}

// bury folds the documents of incarnations that are sealed: what was consumed of them is not expected any more, and the
// work that they had open is lost. None is buried twice: a retired one has no cursor, and its document is not read any more.
func (m *move) bury(dead []*tally.Doc) {
	for _, d := range dead {
		if _, twice := m.Retired[d.Inc]; twice {
			continue
		}
		m.retire(d.Inc, Cursor{Seq: d.Seq, Round: m.Round, Birth: d.Birth})
		for i := range d.Series {
			s := &d.Series[i]
			if s.Epoch < m.Oldest || s.Epoch > m.Epoch {
				continue
			}
			t := m.Consumed[s.Key]
			if t == nil {
				t = &tally.Taken{Counts: tally.NewCounts(s.Cells), Closed: int64(m.Clock)}
			}
			if m.Consumed == nil {
				m.Consumed = tally.Ledger{}
			}
			m.Consumed[s.Key] = t.Less(s)
		}
		candidate, control := uint64(0), uint64(0)
		for _, o := range d.Open {
			if o.Gen != m.Gen || slices.Contains(m.Rings, o.Ring) || m.p.ring(o.Ring) < 0 {
				continue
			}
			n, k := o.Count()
			candidate, control = candidate+n, control+k
			m.lose(o)
		}
		if candidate+control > 0 {
			m.event(Event{Kind: WorkLost, Note: fmt.Sprintf("%s died with %d sessions of the candidate and %d of the control", d.Inc, candidate, control)})
		}
	}
	for inc, c := range m.Retired {
		if m.Round > c.Round+m.p.Keep {
			delete(m.Retired, inc)
			m.Floor = max(m.Floor, c.Birth+1)
		}
	}
}

// retire notes that the document of an incarnation is never read again.
func (m *move) retire(inc string, c Cursor) {
	delete(m.Cursors, inc)
	if m.Retired == nil {
		m.Retired = map[string]Cursor{}
	}
	m.Retired[inc] = c
}

// lose adds to what is lost.
func (m *move) lose(o Open) {
	for i := range m.Lost {
		if m.Lost[i].Ring == o.Ring {
			m.Lost[i].Candidate = plus(m.Lost[i].Candidate, o.Candidate)
			m.Lost[i].Control = plus(m.Lost[i].Control, o.Control)
			return
		}
	}
	m.Lost = append(m.Lost, o)
}

// plus is the sum, in a slice of its own, of what Open.Valid allows.
func plus(a, b []uint64) []uint64 {
	if len(a) == 0 {
		return b
	}
	sum := slices.Clone(a)
	for i, n := range b {
		sum[i] = min(sum[i]+n, tally.MaxOpen)
	}
	return sum
}

// lostMetric is the metric whose outcomes say that something failed.
const lostMetric = "errors"

// mourn adds what was lost in a block's ring to it, as failures, of both cohorts at once. A block closes by its own sizes
// and the clock, so what is lost never decides when it is counted.
func (m *move) mourn(b judge.Block) judge.Block {
	i := slices.IndexFunc(m.Lost, func(o Open) bool { return o.Ring == b.Ring })
	if i < 0 || b.Metric != lostMetric || len(b.Candidate) != 2 || len(b.Control) != 2 {
		return b
	}
	o := m.Lost[i]
	m.Lost = slices.Delete(slices.Clone(m.Lost), i, i+1)
	candidate, control := o.Count()
	b.Candidate = []uint64{b.Candidate[0], b.Candidate[1] + candidate}
	b.Control = []uint64{b.Control[0], b.Control[1] + control}
	b.CandidateBy, b.ControlBy = failures(b.CandidateBy, o.Candidate), failures(b.ControlBy, o.Control)
	return b
}

// failures adds failures to good and bad outcomes by group.
func failures(by, lost []uint64) []uint64 {
	if len(by) != 2*evidence.Groups || len(lost) == 0 {
		return by
	}
	by = slices.Clone(by)
	for g, n := range lost {
		by[2*g+1] += n
	}
	return by
}

// forget drops the n oldest changes but for what they exposed, which the oldest that is left then claims for all of their
// time: who asks whether a unit was exposed must not hear no because of it.
func forget(history []Change, n int) []Change {
	kept := slices.Clone(history[n:])
	if len(kept) == 0 || n == 0 {
		return kept
	}
	shares := map[string]float64{}
	for _, c := range history[:n+1] {
		for ring, p := range c.Shares {
			shares[ring] = max(shares[ring], p)
		}
		kept[0].All = kept[0].All || c.All
	}
	kept[0].At, kept[0].Shares = history[0].At, shares
	return kept
}
