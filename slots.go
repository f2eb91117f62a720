package rollout

import (
	"sync/atomic"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/machine"
)

// Decisions and what came of them are counted by slots of time, so that it is seen which decisions nothing came of. A
// clock for each of them would cost more than the decision: a slot is a number that Run moves on, and sixteen of them
// outlast the longest wait for an outcome.
const (
	slots     = 16
	slotLeast = 5 * time.Second // the least length of a slot, and the least wait after it
	waitMost  = time.Minute     // the longest wait for outcomes

	slotGroups = 16 // groups of units

	// The cells of a slot, by group of units each: decisions counted, and calls of Record without an observation of
	// Errors. Those with one are in the table of Errors, which has a layer for each slot: one add instead of two.
	decided   = 0
	answered  = slotGroups
	slotCells = 2 * slotGroups

	noSlot = slots // the layer for what belongs to no slot
)

// slotTable counts what was decided and answered in one ring, by cohort and slot. It is an evidence.Table of a fixed
// size, because every decision adds to it.
type slotTable [evidence.Shards][2][slots][slotCells]atomic.Uint64

// add counts one more in a cell of a slot, for a unit of the given group, or bucket.
func (t *slotTable) add(shard uint64, cohort int, slot uint32, what int, group uint64) {
	t[shard%evidence.Shards][cohort&1][slot%slots][(uint64(what)+group%slotGroups)%slotCells].Add(1)
}

// total is what the cells of a cohort hold, of all slots and groups together.
func (t *slotTable) total(cohort, what int) uint64 {
	var n uint64
	for s := range t {
		for position := range t[s][cohort] {
			for k := range slotGroups {
				n += t[s][cohort][position][what+k].Load()
			}
		}
	}
	return n
}

// slotCounts are what one slot holds, by group of units.
type slotCounts struct{ decided, answered, errors [slotGroups]uint64 }

// counts are what a slot's cells hold, of all slots that they were used for.
func (v *ringView) counts(cohort, position int) *slotCounts {
	n := &slotCounts{}
	for s := range v.slots {
		row := &v.slots[s][cohort][position]
		for g := range slotGroups {
			n.decided[g] += row[decided+g].Load()
			n.answered[g] += row[answered+g].Load()
		}
	}
	t := v.outcomes[cohort][errorsIndex]
	cells := make([]uint64, t.Width()*t.Groups())
	t.AddLayerTo(cells, position)
	for k, x := range cells {
		n.errors[k/t.Width()%slotGroups] += x
	}
	return n
}

// slotClock is when slots began and ended, of the goroutine of Run alone.
type slotClock struct {
	began time.Time
	ends  [slots]time.Time // by position
}

// turnSlot goes on to the next slot if the present one was long enough. Its cells hold counts of sixteen slots ago.
func (r *Rollout) turnSlot(now time.Time) {
	if r.slotClock.began.IsZero() {
		r.slotClock.began = now
	}
	if now.Sub(r.slotClock.began) < max(r.o.Interval, slotLeast) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	present := r.slot.Load()
	next := present + 1
	for _, l := range r.ledgers {
		l.base(int(next % slots))
	}
	r.slotClock.began, r.slotClock.ends[present%slots] = now, now
	r.slot.Store(next) // first, or what comes of a decision would be ahead of it
	r.showLocked(r.snap.Load())
}

// base notes what the cells of a slot hold when it begins.
func (l *ledger) base(position int) {
	for i := range l.rings {
		rl, ring := &l.rings[i], &l.snap.rings[i]
		if ring.closed {
			continue
		}
		for c := range rl.slots {
			rl.slots[c][position] = ring.counts(c, position)
		}
	}
}

// voice is whether a ring has ever recorded anything of a decision, in one generation.
type voice struct {
	some   bool // either cohort anything
	errors bool // the control Errors
}

// listen notes what a ring has recorded.
func (v *voice) listen(ring *ringView) {
	if v.some && v.errors {
		return
	}
	for c := range ring.outcomes {
		errors := uint64(0)
		for position := range slots { // what belongs to no slot was decided elsewhere
			n := ring.counts(c, position)
			errors += sum(n.errors[:])
			v.some = v.some || errors > 0 || sum(n.answered[:]) > 0
		}
		v.errors = v.errors || c == 0 && errors > 0
	}
}

// outcomeDelay is how long after a slot an outcome may still come: as long as the control's slowest take.
func outcomeDelay(st *machine.State, ring string) time.Duration {
	return min(max(st.Slowest(ring), slotLeast), waitMost)
}

// countSlots counts each slot that is over for so long that nothing more is to come of it. What is not counted before its
// cells are needed again is lost, of both cohorts alike.
func (l *ledger) countSlots(st *machine.State, i int) {
	r, ring, rl := l.snap.r, &l.snap.rings[i], &l.rings[i]
	v := &l.snap.life.voices[i]
	v.listen(ring)
	if ring.all || l.snap.over.Load() { // without a control nothing can be said; without Records all are silent
		return
	}
	now, delay := r.now(), outcomeDelay(st, ring.name)
	present := r.slot.Load()
	for slot := rl.silent + 1; slot < present; slot++ {
		if present-slot < slots {
			if now.Sub(r.slotClock.ends[slot%slots]) < delay {
				break
			}
			if v.some {
				rl.addSilence(ring, int(slot%slots), v.errors)
			}
		}
		rl.silent = slot
	}
}

// addSilence counts the decisions of one slot: those that something came of, and those that nothing came of.
func (rl *ringLedger) addSilence(ring *ringView, position int, errors bool) {
	for c := range rl.silence {
		now, base := ring.counts(c, position), rl.slots[c][position]
		for g := range slotGroups {
			answers := now.errors[g] - base.errors[g]
			if !errors { // anything is an answer
				answers += now.answered[g] - base.answered[g]
			}
			n := now.decided[g] - base.decided[g]
			good := min(n, answers) // one decision may have several
			rl.silence[c][2*g] += good
			rl.silence[c][2*g+1] += n - good
		}
	}
}
