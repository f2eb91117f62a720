package rollout

import (
	"slices"
	"sync/atomic"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// marks count the outcomes of a timing by groups of units: a histogram for each of 64 groups would be too large, and what
// a gate asks is only whether an outcome is over its threshold. A cell is a set of thresholds exceeded, and few outcomes
// exceed any. Those that do not are not counted: mostly a call of Record has one observation of Errors and one of the
// timing, so that Errors, which are counted by groups in any case, tell how many there were. In place of the cell of the
// empty set there is what that leaves out: by how many a call has more observations of the timing than of Errors.
type marks struct {
	tables [2]*evidence.Table // by cohort
	at     atomic.Pointer[thresholds]
	none   int // the cell of what is recorded while there are no thresholds
}

// exceedsNone is the cell of the empty set.
const exceedsNone = 0

// totals are the cells of a cohort, group after group, with that of the empty set made from the others and from Errors.
// The two are not read at one moment: where that makes fewer outcomes than were consumed there are none new, and a later
// reading has the difference. Errors are read first, so that there are fewer rather than more.
func (m *marks) totals(ring *ringView, cohort int, consumed []uint64) []uint64 {
	errors := ring.outcomes[cohort][errorsIndex]
	all := make([]uint64, errors.Width()*errors.Groups())
	errors.AddGroupsTo(all)
	cells := make([]uint64, len(consumed))
	m.tables[cohort].AddGroupsTo(cells)
	width := m.none + 1
	for g := range evidence.Groups {
		row := cells[g*width : (g+1)*width]
		n := sum(all[g*errors.Width():(g+1)*errors.Width()]) + row[exceedsNone] - sum(row[exceedsNone+1:])
		row[exceedsNone] = uint64(max(int64(n), int64(consumed[g*width])))
	}
	return cells
}

// settle adds what a call of Record leaves out, to each timing of which it has not as many observations as of Errors.
func (s *snapshot) settle(ring *ringView, cohort int, shard, group uint64, obs []Observation) {
	for i, m := range ring.marks {
		if m == nil {
			continue
		}
		more := 0
		for k := range obs {
			switch obs[k].m {
			case s.metrics[i].ref:
				more++
			case s.metrics[errorsIndex].ref:
				more--
			}
		}
		if more != 0 {
			m.tables[cohort].AddN(shard, group, exceedsNone, more)
		}
	}
}

// thresholds are cells of the histogram, by cohort and mark.
type thresholds [2][]int

func newMarks(n int) *marks {
	m := &marks{none: judge.MarkCells(n) - 1}
	for c := range m.tables {
		m.tables[c] = evidence.NewTable(judge.MarkCells(n), evidence.Groups)
	}
	return m
}

// cell is the set of thresholds that an outcome exceeds, by its cell in the histogram: a number whose bit i is mark i.
func (m *marks) cell(cohort, outcome int) int {
	at := m.at.Load()
	if at == nil {
		return m.none
	}
	set := 0
	for i, from := range at[cohort] {
		if outcome >= from {
			set |= 1 << i
		}
	}
	return set
}

// markLocked takes over the thresholds that the state's evidence calls for, wherever outcomes of its generation still
// count.
func (r *Rollout) markLocked(st *machine.State) {
	var present [][2]int
	for _, l := range r.ledgers {
		if l.snap.gen != st.Gen || l.snap.over.Load() {
			continue
		}
		for i := range l.snap.rings {
			ring := &l.snap.rings[i]
			for j, m := range ring.marks {
				if m == nil {
					continue
				}
				metric := nameOf(r.metrics[j].ref)
				if present = r.plan.Judge.Thresholds(present[:0], &st.Gates, metric, ring.name); len(present) == 0 {
					present = append(present, st.Marks[metric][ring.name]...) // a head has no gates
				}
				if len(present) != r.metrics[j].marks {
					present = present[:0]
				}
				m.follow(present)
			}
		}
	}
}

// follow makes the thresholds those that count from now on; none are as they were before the first.
func (m *marks) follow(present [][2]int) {
	if len(present) == 0 {
		m.at.Store(nil)
		return
	}
	var at thresholds
	for _, p := range present { // the control's first, as cohorts are counted
		at[0], at[1] = append(at[0], p[0]), append(at[1], p[1])
	}
	if old := m.at.Load(); old == nil || !slices.Equal(old[0], at[0]) || !slices.Equal(old[1], at[1]) {
		m.at.Store(&at)
	}
}
