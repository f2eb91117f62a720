package rollout

import (
	mathbits "math/bits"
	"slices"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/machine"
)

// snapshot is everything a decision needs, immutable but for the evidence behind it. A rollout swaps it whole: for a new
// epoch, and for a new slot of time, where only the slot differs. What decides and records comes first, so that it is in
// one cache line.
type snapshot struct {
	r     *Rollout
	salt  uint64    // hash of the salt
	last  *ringView // of everyone
	slot  uint32    // of time, in which answers are counted; 0: they are not
	plain bool      // a unit with a key and no groups is answered by the last ring and its bucket
	asks  bool      // some ring has a Match
	never bool      // fixed: no unit is looked at
	rings []ringView
	over  *atomic.Bool // its evidence counts no more

	metrics []metricView
	marked  int  // metrics with marks
	fixed   bits // the answer for everybody, if not zero
	gen     uint64
	epoch   uint64
	version string
	stage   string
	life    *generation
	bare    *snapshot // the same without a slot; nil: this is it
}

// in is the same snapshot in another slot.
func (s *snapshot) in(slot uint32) *snapshot {
	if s.slot == slot {
		return s
	}
	c := *s
	c.slot, c.bare = slot, s.uncounted()
	return &c
}

// now is the same snapshot in the present slot.
func (s *snapshot) now() *snapshot {
	if p := s.r.snap.Load(); p.uncounted() == s.uncounted() {
		return p
	}
	return s.in(s.r.slot.Load())
}

// uncounted is the same snapshot without a slot: what comes of its decisions answers none that was counted.
func (s *snapshot) uncounted() *snapshot {
	if s.bare != nil {
		return s.bare
	}
	return s
}

// showLocked makes s what decisions see, in the present slot.
func (r *Rollout) showLocked(s *snapshot) { r.snap.Store(s.in(r.slot.Load())) }

// ringView is one ring as decisions see it, in one epoch.
type ringView struct {
	limit  uint64 // bucket below which a unit is in
	kept   uint64 // bucket from which on a unit is held back
	all    bool   // every unit is in, keyed or not
	closed bool   // the answer is fixed, for every unit
	index  uint8
	fixed  bits       // the answer while closed
	open   [4]bits    // otherwise, but for the unit's group; see answer
	slots  *slotTable // what was decided and answered, by slot of time
	units  *units     // that came in this generation

	begun *[2]atomic.Uint64 // sessions, by cohort
	leash *leash            // revokes those on the candidate

	name     string
	match    func(Unit) bool
	outcomes [2][]*evidence.Table // by cohort and metric
	marks    []*marks             // by metric; nil where it has none
	first    [2]*evidence.Table   // by cohort: units that came for the first time
}

// metricView is one metric as records see it.
type metricView struct {
	ref    metricRef
	kind   metricKind
	never  bool // an event of the candidate is acted on at once
	marks  int  // thresholds that its outcomes are counted by in groups
	lo, hi float64
	cells  int
	groups int
	// sourced: its evidence comes from a Source
	sourced bool
}

// errorsIndex is the index of Errors among a rollout's metrics.
const errorsIndex = 0

func (r *Rollout) metricView(m metricRef) metricView {
	id := m.Value()
	return metricView{
		ref: m, kind: id.kind, never: r.policy.never(m, r.gates), marks: len(r.plan.Judge.Marks(id.name)),
		lo: id.lo, hi: id.hi, cells: id.cells(), groups: id.groups(),
		sourced: r.o.Sources[id.name] != nil,
	}
}

// decide is the answer for a unit; key is the hash of its key.
func (s *snapshot) decide(u *Unit, key uint64) (v *ringView, b bits, bucket uint64) {
	v = s.last
	if s.asks || len(u.Groups) > 0 {
		v = s.ringOf(u)
	}
	if v.closed || u.Key == "" {
		return v, v.special(), 0
	}
	bucket = bucketOf(s.salt, key)
	return v, v.answer(bucket), bucket
}

// The answers of a ring that is open.
const (
	isHeld = 0
	isOut  = 1 // below kept
	isIn   = 2 // below limit; 3: below both
)

// answer is the answer for a bucket. It is written without a branch, because a processor cannot foresee a bucket: a
// borrow is 1 where the bucket is below.
func (v *ringView) answer(bucket uint64) bits {
	_, out := mathbits.Sub64(bucket, v.kept, 0)
	_, in := mathbits.Sub64(bucket, v.limit, 0)
	return v.open[(in*isIn+out)%4] | bits(bucket%evidence.Groups)<<groupShift
}

// decision is decide without counting.
func (s *snapshot) decision(u *Unit, key uint64) Decision {
	_, b, _ := s.decide(u, key)
	return Decision{s, b}
}

// counted is decide with counting.
func (s *snapshot) counted(u *Unit, key uint64) Decision {
	v, b, bucket := s.decide(u, key)
	if b.cohort() != None && !v.closed {
		v.count(b, bucket, s.slot)
	} else if b.reason() == ReasonNoUnit {
		s.r.noUnit.Add(1)
	}
	return Decision{s, b}
}

// special is the answer where no bucket is asked for: a ring that is closed, or a unit without a key.
func (v *ringView) special() bits {
	switch {
	case v.closed:
		return v.fixed
	case v.all:
		return pack(true, None, ReasonFull, int(v.index), 0)
	}
	return pack(false, None, ReasonNoUnit, int(v.index), 0)
}

// count counts an answer of cohort Control or Candidate, and the unit if it comes for the first time.
func (v *ringView) count(b bits, bucket uint64, slot uint32) {
	known := v.units.known(b.side(), bucket) // looked up before the add, which a processor waits for
	v.slots.add(evidence.Shard(), b.side(), slot, decided, bucket)
	if !known {
		v.meet(b, bucket)
	}
}

// meet counts a unit that may have come for the first time.
func (v *ringView) meet(b bits, bucket uint64) {
	if v.units.add(b.side(), bucket) {
		v.first[b.side()].Add(evidence.Shard(), b.group(), 0)
	}
}

// ringOf is the first ring that takes u; the last takes everybody.
func (s *snapshot) ringOf(u *Unit) *ringView {
	last := len(s.rings) - 1
	for i := range s.rings[:last] {
		v := &s.rings[i]
		if v.match == nil {
			if u.contains(v.name) {
				return v
			}
		} else if s.r.matches(v.match, u) {
			return v
		}
	}
	return s.last
}

// matches asks a ring's Match; a panic is no match.
func (r *Rollout) matches(match func(Unit) bool, u *Unit) (ok bool) {
	defer func() {
		if p := recover(); p != nil {
			r.matchPanics.Add(1)
			ok = false
		}
	}()
	return match(*u)
}

// fixedSnapshot answers the same for everybody.
func (r *Rollout) fixedSnapshot(st *machine.State, answer bits) *snapshot {
	s := &snapshot{r: r, fixed: answer, never: true, over: &atomic.Bool{}}
	s.over.Store(true)
	if st != nil {
		s.gen, s.epoch, s.version, s.stage = st.Gen, st.Epoch, st.Version, st.Stage.Name
	}
	for i, name := range r.plan.Rings {
		s.rings = append(s.rings, ringView{name: name, index: uint8(i), closed: true, fixed: answer})
	}
	s.last = &s.rings[len(s.rings)-1]
	return s
}

// leashLocked gives each ring of a snapshot that the candidate is served by what revokes it.
func (s *snapshot) leashLocked() *snapshot {
	for i := range s.rings {
		if v := &s.rings[i]; !v.closed || v.fixed&enabledBit != 0 {
			v.leash = s.r.leashLocked(s.gen, v.name)
		}
	}
	return s
}

// newSnapshot is the state as decisions see it, with cells of its own. It holds r.mu.
func (r *Rollout) newSnapshot(st *machine.State) *snapshot {
	everyone := len(r.plan.Rings) - 1
	switch {
	case st.Phase.Latched():
		return r.fixedSnapshot(st, pack(false, None, ReasonRolledBack, everyone, 0))
	case st.Phase == machine.Pending:
		return r.fixedSnapshot(st, pack(false, None, ReasonOff, everyone, 0))
	case st.Phase == machine.Completed && len(st.Rings) == 0:
		return r.fixedSnapshot(st, pack(true, None, ReasonCompleted, everyone, 0))
	}
	s := &snapshot{
		r: r, gen: st.Gen, epoch: st.Epoch, version: st.Version, stage: st.Stage.Name,
		salt: xxhash.Sum64String(r.policy.Salt), over: &atomic.Bool{}, metrics: r.metrics, life: r.lifeLocked(st.Gen),
	}
	for _, m := range r.metrics {
		if m.marks > 0 {
			s.marked++
		}
	}
	for i, name := range r.plan.Rings {
		v := ringView{name: name, index: uint8(i)}
		if i < everyone {
			v.match = r.policy.Rings[i].Match
			s.asks = s.asks || v.match != nil
		}
		switch share := Percent(st.Shares[name]); {
		case slices.Contains(st.Rings, name):
			v.closed, v.fixed = true, pack(false, None, ReasonRolledBack, i, 0)
		case st.Phase == machine.Completed:
			v.closed, v.fixed = true, pack(true, None, ReasonCompleted, i, 0)
		case share == 0:
			v.closed, v.fixed = true, pack(false, None, ReasonOff, i, 0)
		default:
			r.open(&v, share, s.life)
		}
		s.rings = append(s.rings, v)
	}
	s.last = &s.rings[everyone]
	s.plain = !s.asks && !s.last.closed
	return s
}

// limits are a ring's thresholds at a share.
func (r *Rollout) limits(v *ringView, share Percent) {
	held := r.policy.Holdback.threshold()
	v.kept = -held
	switch {
	case share < 100:
		v.limit = share.threshold()
		if held > 0 {
			v.limit = min(v.limit, v.kept)
		}
	case held > 0:
		v.limit = v.kept
	default:
		v.all = true
	}
}

// open gives a ring with a share its thresholds and its cells.
func (r *Rollout) open(v *ringView, share Percent, life *generation) {
	i := int(v.index)
	r.limits(v, share)
	in := pack(true, Candidate, ReasonSplit, i, 0)
	out := pack(false, Control, ReasonSplit, i, 0)
	back := out
	if r.policy.Holdback.threshold() > 0 {
		back = pack(false, Control, ReasonHoldback, i, 0)
	}
	if share >= 100 {
		in = pack(true, Candidate, ReasonFull, i, 0)
	}
	if v.all {
		out, back = in, in
	}
	v.begun = &[2]atomic.Uint64{}
	v.open = [4]bits{isHeld: back, isOut: out, isIn: in, isIn + isOut: in}
	v.slots = &slotTable{}
	v.units = &life.units[i]
	v.marks = make([]*marks, len(r.metrics))
	for c := range v.outcomes {
		for j, m := range r.metrics {
			layers := 1
			if j == errorsIndex {
				layers = slots + 1
			}
			v.outcomes[c] = append(v.outcomes[c], evidence.NewLayers(layers, m.cells, m.groups))
		}
		v.first[c] = evidence.NewTable(1, slotGroups)
	}
	for j, m := range r.metrics {
		if m.marks > 0 {
			v.marks[j] = newMarks(m.marks)
		}
	}
}
