package rollout

import (
	"slices"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// ledger is the evidence of one snapshot as it leaves this process.
type ledger struct {
	snap  *snapshot
	rings []ringLedger
}

// ringLedger is one ring of a ledger.
type ringLedger struct {
	metrics []metricLedger
	slots   [2][slots]*slotCounts // what the cells of each slot held when it began, by cohort
	silent  uint32                // the slot up to which silence is counted
	silence tally.Counts          // decisions that something came of, and those that nothing came of, by group
}

// metricLedger is one metric of one ring.
type metricLedger struct {
	marked [2][]uint64 // the last that was read of its marks
}

var nothingYet slotCounts

func newLedger(s *snapshot) *ledger {
	l := &ledger{snap: s, rings: make([]ringLedger, len(s.rings))}
	for i := range s.rings {
		ring, rl := &s.rings[i], &l.rings[i]
		if ring.closed {
			continue
		}
		for j := range s.metrics {
			var m metricLedger
			if marks := ring.marks[j]; marks != nil {
				for c := range m.marked {
					m.marked[c] = make([]uint64, marks.tables[c].Width()*marks.tables[c].Groups())
				}
			}
			rl.metrics = append(rl.metrics, m)
		}
		rl.silent = s.r.slot.Load() - 1
		rl.silence = tally.NewCounts(silenceForm.Size())
		for c := range rl.slots {
			for k := range rl.slots[c] {
				rl.slots[c][k] = &nothingYet
			}
		}
	}
	return l
}

// The forms of what is counted besides metrics.
var (
	silenceForm = machine.Form{Cells: 2, Groups: slotGroups, AtOnce: true}
	splitForm   = machine.Form{Cells: 1, Groups: slotGroups, Both: true}
)

// form is what the cells of the j-th metric are.
func (r *Rollout) form(j int) machine.Form {
	m := &r.metrics[j]
	f := machine.Form{Cells: m.cells, Groups: m.groups, Never: m.never, Outside: m.sourced}
	if m.sourced {
		return machine.Form{Cells: 1, Groups: 1, Outside: true}
	}
	if m.marks > 0 {
		f.Marks = judge.MarkCells(m.marks) * evidence.Groups
	}
	return f
}

// formOf is form by what the metric is called.
func (r *Rollout) formOf(metric string) (machine.Form, bool) {
	switch metric {
	case GuardNoOutcome:
		return silenceForm, r.guards.silence
	case GuardSplit:
		return splitForm, r.guards.split
	}
	for j := range r.metrics {
		if nameOf(r.metrics[j].ref) == metric {
			return r.form(j), true
		}
	}
	return machine.Form{}, false
}

// count is what this process has counted of a generation, from the oldest epoch on that still counts. Each metric is read
// once, so that both cohorts come from the same moment.
func (r *Rollout) count(st *machine.State) *tally.Doc {
	d := &tally.Doc{}
	for _, l := range r.ledgersOf(st) {
		l.count(d, st)
	}
	return d.Merged()
}

// breaches is before, which was counted earlier, with what must never happen as it is now: what outcomes are must not
// choose the moment of a cut.
func (r *Rollout) breaches(st *machine.State, before *tally.Doc) *tally.Doc {
	d, ledgers := &tally.Doc{}, r.ledgersOf(st)
	for _, s := range before.Series {
		if s.Epoch >= st.Oldest {
			if slices.ContainsFunc(ledgers, func(l *ledger) bool { return l.snap.epoch == s.Epoch }) {
				s.Events = 0 // counted below
			}
			d.Series = append(d.Series, s)
		}
	}
	for _, l := range ledgers {
		for i := range l.rings {
			ring := &l.snap.rings[i]
			for j := range l.rings[i].metrics {
				if form := r.form(j); form.Never && !ring.closed {
					s := l.series(ring, nameOf(l.snap.metrics[j].ref), form)
					s.Events = events(l.rings[i].metrics[j].read(ring, j, &l.snap.metrics[j], form), form)
					s.Counts = tally.NewCounts(s.Cells)
					d.Add(s)
				}
			}
		}
	}
	return d.Merged()
}

func (r *Rollout) ledgersOf(st *machine.State) []*ledger {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*ledger
	for _, l := range r.ledgers {
		if l.snap.gen == st.Gen && l.snap.epoch >= st.Oldest {
			all = append(all, l)
		}
	}
	return all
}

func (l *ledger) series(ring *ringView, metric string, form machine.Form) tally.Series {
	return tally.Series{Key: tally.Key{Epoch: l.snap.epoch, Ring: ring.name, Metric: metric, Cells: form.Size()}}
}

// count adds what the ledger has counted to a document.
func (l *ledger) count(d *tally.Doc, st *machine.State) {
	r := l.snap.r
	for i := range l.rings {
		ring, rl := &l.snap.rings[i], &l.rings[i]
		if ring.closed {
			continue
		}
		for j := range rl.metrics {
			form := r.form(j)
			s := l.series(ring, nameOf(l.snap.metrics[j].ref), form)
			s.Counts = rl.metrics[j].read(ring, j, &l.snap.metrics[j], form)
			if form.Never {
				s.Events = events(s.Counts, form)
			}
			d.Add(s)
		}
		if r.guards.silence {
			s := l.series(ring, GuardNoOutcome, silenceForm)
			l.countSlots(st, i)
			s.Counts = rl.silence
			d.Add(s)
		}
		if r.guards.split && !ring.all {
			s := l.series(ring, GuardSplit, splitForm)
			s.Counts = firsts(ring)
			d.Add(s)
		}
	}
}

// read is all that one metric has counted. Its cells are those of its groups, so that the two always agree; only a
// timing, whose histogram has no groups, is counted in two places.
func (m *metricLedger) read(ring *ringView, j int, view *metricView, form machine.Form) tally.Counts {
	now := tally.NewCounts(form.Size())
	for c := range now {
		switch {
		case form.Outside:
			all := make([]uint64, view.cells)
			ring.outcomes[c][j].AddTo(all)
			now[c][0] = sum(all)
			continue
		case ring.marks[j] != nil:
			m.marked[c] = ring.marks[j].totals(ring, c, m.marked[c])
			copy(now[c][form.Cells*form.Groups:], m.marked[c])
		}
		ring.outcomes[c][j].AddGroupsTo(now[c])
	}
	return now
}

// events are the candidate's events of a metric.
func events(c tally.Counts, form machine.Form) uint64 {
	var n uint64
	for g := range form.Groups {
		n += c[1][g*form.Cells+1]
	}
	return n
}

// firsts are the units that came for the first time, by group.
func firsts(ring *ringView) tally.Counts {
	now := tally.NewCounts(splitForm.Size())
	for c := range now {
		ring.first[c].AddGroupsTo(now[c])
	}
	return now
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
