package rollout

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

var (
	fleetSeeds = flag.Int("fleet.seeds", 60, "seeds of the fleet's simulation")
	fleetFirst = flag.Int("fleet.first", 1, "the first of them")
)

// sim is a fleet of replicas on one store that fails in every way that the contract of a Store leaves open, in a time of
// its own. Each call of the store is an interleaving point: another replica may have a turn before it, or after. What is
// applied to the store is judged at once, by what only the simulation can see.
type sim struct {
	rnd    *rand.Rand
	t      *testing.T
	now    time.Time
	store  *simStore
	procs  []*replica
	lives  int
	unsure uint64 // outcomes that the dead had given up
	units  int
	depth  int
	calm   bool
	long   bool // lives and outages are, and the store does not go back: what takes long is met
	wrong  []string

	stats struct{ travels, deaths, folded, judged, dropped, rebased, pruned, seals int }
}

// replica is one life of a process.
type replica struct {
	*Rollout
	id      int
	version int
	busy    bool // a turn of it is under way
	paused  int  // turns that it sleeps through
	cut     bool // the store cannot be reached
	latched map[string]uint64
	dead    bool
	stop    func() // ends the steps that it runs, which would pause where the store fails: no time goes by within a turn
}

// down is how the store fails.
func (p *replica) down() error {
	if p.stop != nil {
		p.stop()
	}
	return errDown
}

// kept is a value of the store.
type kept struct {
	value []byte
	rev   uint64
}

// simStore is the store as it is, and what was ever applied to it.
type simStore struct {
	s       *sim
	all     map[string]kept
	rev     uint64
	late    []func() // writes that land later
	shadow  []map[string]kept
	landed  map[string]*tally.Doc // evidence, by key: the last that was ever there
	torn    map[string]bool       // timelines in which the store went back
	prev    *machine.State        // the last state applied
	folded  map[string]map[string]*tally.Doc
	consume map[string]map[tally.Key]tally.Counts // by timeline
	began   map[uint64]time.Time                  // generations
	counted map[countedKey]uint64                 // outcomes that processes have counted
	read    map[string]bool                       // incarnations that a state has a cursor of, or had
}

// countedKey is where an outcome counts.
type countedKey struct {
	gen  uint64
	ring string
}

// view is the store as one replica sees it.
type view struct {
	*simStore
	p *replica
}

func (s *sim) fail(format string, args ...any) {
	if len(s.wrong) < 8 {
		s.wrong = append(s.wrong, fmt.Sprintf(format, args...))
	}
}

func (s *sim) chance(percent int) bool { return !s.calm && s.rnd.IntN(100) < percent }

// between lets others have a turn.
func (s *sim) between() {
	if s.calm || s.depth >= 3 || s.rnd.IntN(100) >= 12 {
		return
	}
	s.depth++
	defer func() { s.depth-- }()
	s.turn(s.procs[s.rnd.IntN(len(s.procs))])
}

func (v *view) call() error {
	s := v.s
	s.between()
	if v.p.dead || v.p.cut && !s.calm || s.chance(2) {
		return v.p.down()
	}
	return nil
}

func (v *view) Load(_ context.Context, key string) ([]byte, uint64, error) {
	if err := v.call(); err != nil {
		return nil, 0, err
	}
	e := v.all[key]
	v.s.between()
	return bytes.Clone(e.value), e.rev, nil
}

func (v *view) List(_ context.Context, prefix string) (map[string][]byte, error) {
	if err := v.call(); err != nil {
		return nil, err
	}
	got := map[string][]byte{}
	for _, key := range slices.Sorted(maps.Keys(v.all)) {
		if strings.HasPrefix(key, prefix) {
			got[key] = bytes.Clone(v.all[key].value)
			if v.s.chance(3) {
				v.s.between() // not one snapshot: what is read later may be newer
			}
		}
	}
	return got, nil
}

func (v *view) CompareAndSwap(_ context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	s := v.s
	if err := v.call(); err != nil {
		return 0, false, err
	}
	value = bytes.Clone(value)
	write := func() (uint64, bool) { return v.apply(key, old, value) }
	switch {
	case s.chance(3): // it lands much later, or never
		v.late = append(v.late, func() { write() })
		return 0, false, v.p.down()
	case s.chance(5): // its acknowledgement is lost
		write()
		s.between()
		return 0, false, v.p.down()
	}
	rev, ok := write()
	s.between()
	return rev, ok, nil
}

func (v *view) Watch(ctx context.Context, _ string, _ func()) error { <-ctx.Done(); return nil }

// apply is a write as the store makes it.
func (st *simStore) apply(key string, old uint64, value []byte) (uint64, bool) {
	if st.all[key].rev != old {
		return 0, false
	}
	if value == nil {
		delete(st.all, key)
		return 0, true
	}
	st.rev = st.s.rnd.Uint64()>>1 | 1
	st.all[key] = kept{value, st.rev}
	if strings.Contains(key, "/ev/") {
		st.wroteEvidence(key, old, value)
	}
	if key == stateKey {
		st.wroteState(value)
	}
	return st.rev, true
}

func (st *simStore) wroteEvidence(key string, old uint64, value []byte) {
	d, err := tally.Decode(value)
	if err != nil {
		st.s.fail("evidence that cannot be read: %v", err)
		return
	}
	if len(value) > 8<<10 {
		st.s.fail("%d bytes of evidence", len(value))
	}
	if was := st.landed[key]; was != nil && d.Seq < was.Seq {
		if old != 0 && !st.s.anyTorn(key) { // one that is made again was folded, or is of another generation
			st.s.fail("%s goes back from cut %d to %d", key, was.Seq, d.Seq)
		}
		return
	}
	st.landed[key] = d
}

// anyTorn reports whether a document is of a timeline in which the store went back.
func (s *sim) anyTorn(key string) bool {
	for tl := range s.store.torn {
		if strings.Contains(key, "/ev/"+tl+"/") {
			return true
		}
	}
	return false
}

func timeline(s *machine.State) string { return fmt.Sprintf("%d.%s", s.Gen, s.Nonce) }

// consumed is what a state has consumed, of documents that are folded as well.
func (st *simStore) consumed(s *machine.State) map[tally.Key]tally.Counts {
	all := map[tally.Key]tally.Counts{}
	for k, t := range s.Consumed {
		all[k] = t.Counts
	}
	for _, d := range st.folded[timeline(s)] {
		for _, x := range d.Series {
			if c, ok := all[x.Key]; ok {
				all[x.Key] = c.Plus(x.Counts)
			}
		}
	}
	return all
}

// counts is what counts of the last document that an incarnation published: what it added to one that was created once more
// after it was folded, nobody reads.
func (st *simStore) counts(tl string, d *tally.Doc) *tally.Doc {
	if folded := st.folded[tl][d.Inc]; folded != nil && folded.Seq < d.Seq {
		return folded
	}
	return d
}

// published is all that was ever acknowledged, or could be, of a timeline. A first document is acknowledged when a state
// has its cursor: one that landed after all who were born with it were forgotten never is.
func (st *simStore) published(tl string, floor uint64) map[tally.Key]tally.Counts {
	all := map[tally.Key]tally.Counts{}
	for key, d := range st.landed {
		if !strings.Contains(key, "/ev/"+tl+"/") || d.Birth < floor && !st.read[d.Inc] {
			continue
		}
		d = st.counts(tl, d)
		for _, x := range d.Series {
			c, ok := all[x.Key]
			if !ok {
				c = tally.NewCounts(x.Cells)
			}
			all[x.Key] = c.Plus(x.Counts)
		}
	}
	return all
}

func countsAbove(a, b tally.Counts) bool {
	for c := range a {
		for i := range a[c] {
			if len(b[c]) <= i && a[c][i] > 0 || len(b[c]) > i && a[c][i] > b[c][i] {
				return true
			}
		}
	}
	return false
}

func total2(c tally.Counts) uint64 {
	if c[0] == nil {
		return 0
	}
	return c.Sum(0) + c.Sum(1)
}

// wroteState judges a write of the state.
func (st *simStore) wroteState(value []byte) {
	s := st.s
	next, err := machine.Decode("x", value)
	if err != nil {
		s.fail("a state that cannot be read: %v", err)
		return
	}
	prev := st.prev
	st.prev = next
	tl := timeline(next)
	st.wroteAnyState(next)
	if prev != nil && s.stats.travels == 0 && next.Gen == prev.Gen && next.Nonce != prev.Nonce {
		s.fail("generation %d is cut in round %d, and the store has never gone back", next.Gen, next.Round)
	}
	if st.torn[tl] {
		st.prev = nil
		return
	}
	if st.folded[tl] == nil {
		st.folded[tl] = map[string]*tally.Doc{}
	}
	for inc := range next.Retired {
		if st.folded[tl][inc] == nil {
			d := st.landed["rollout/x/ev/"+tl+"/"+inc]
			if d == nil {
				s.fail("%s is retired and had published nothing", inc)
				continue
			}
			if !d.Sealed || d.Seq != next.Retired[inc].Seq {
				s.fail("%s is retired at cut %d, and its document is at %d, sealed: %v", inc, next.Retired[inc].Seq, d.Seq, d.Sealed)
			}
			left := *d // what is over is not subtracted any more
			left.Series = slices.DeleteFunc(slices.Clone(d.Series), func(x tally.Series) bool { return x.Epoch < next.Oldest })
			st.folded[tl][inc] = &left
			s.stats.folded++
		}
	}
	now, all := st.consumed(next), st.published(tl, 0)
	was := st.consume[tl]
	for k, c := range now {
		if k.Epoch < next.Oldest {
			continue // it counts no more, and is not published any more
		}
		if countsAbove(c, all[k]) {
			s.fail("%v of %s: %d are consumed of %d that were published", k, tl, total2(c), total2(all[k]))
		}
		if w, ok := was[k]; ok && countsAbove(w, c) {
			s.fail("%v of %s: what was consumed falls from %d to %d", k, tl, total2(w), total2(c))
		}
	}
	if prev != nil && timeline(prev) == tl {
		for inc := range prev.Retired {
			if _, ok := next.Retired[inc]; !ok {
				s.stats.pruned++
			}
		}
		st.judgeStep(prev, next, was, now)
	}
	st.consume[tl] = now
}

// wroteAnyState judges a write by what holds also where the store went back.
func (st *simStore) wroteAnyState(next *machine.State) {
	s := st.s
	if _, ok := st.began[next.Gen]; !ok {
		st.began[next.Gen] = s.now
	}
	if most := s.now.Sub(st.began[next.Gen]); next.Clock > most && s.stats.travels == 0 {
		s.fail("generation %d accounts for %v after %v", next.Gen, next.Clock, most)
	}
	for inc := range next.Cursors {
		st.read[inc] = true
	}
	for inc := range next.Retired {
		st.read[inc] = true
	}
	for _, ring := range []string{"staff", Everyone} {
		if n, most := judgedOf(next, ring), st.counted[countedKey{next.Gen, ring}]; n > most {
			s.fail("%s of generation %d: %d outcomes are judged of %d that there were", ring, next.Gen, n, most)
		}
	}
}

// judgeStep judges a write within a timeline.
func (st *simStore) judgeStep(prev, next *machine.State, was, now map[tally.Key]tally.Counts) {
	s := st.s
	if older(next, prev) || next.Round < prev.Round {
		s.fail("(%d, %d) in round %d follows (%d, %d) in %d", next.Gen, next.Ver, next.Round, prev.Gen, prev.Ver, prev.Round)
	}
	if prev.Phase.Latched() && !next.Phase.Latched() {
		s.fail("%v becomes %v", prev.Phase, next.Phase)
	}
	for ring, share := range next.Shares {
		if share > prev.Shares[ring] && next.Epoch == prev.Epoch {
			s.fail("a share rises within an epoch")
		}
	}
	if next.Gates.Starts != prev.Gates.Starts || next.Policy != prev.Policy || next.Phase.Latched() {
		return
	}
	for _, ring := range []string{"staff", Everyone} {
		more := uint64(0)
		for k, c := range now {
			if k.Metric == Errors.Name() && k.Ring == ring {
				more += total2(c) - total2(was[k])
			}
		}
		if slices.Contains(next.Rings, ring) || slices.Contains(prev.Rings, ring) {
			continue
		}
		if n := judgedOf(next, ring) - judgedOf(prev, ring); n != more {
			s.fail("%s in round %d: %d outcomes are consumed and %d judged", ring, next.Round, more, n)
		}
		s.stats.judged += int(more)
	}
}

func judgedOf(st *machine.State, ring string) uint64 {
	if g := st.Gates.Gates[Errors.AtMost(60).Name()]; g != nil && g.Parts[ring] != nil {
		return g.Parts[ring].Candidate.N + g.Parts[ring].Control.N
	}
	return 0
}

func simPolicy(version int) Policy {
	return Policy{
		Version: versionName(version), Rings: []Ring{{Name: "staff"}},
		Stages: []Stage{{Ring: "staff", Percent: 50}, {Percent: 25}, {Percent: 50}, {Percent: 100}},
		Bake:   2 * time.Minute, Holdback: 20, Independent: true,
		Gates:    []Gate{Errors.AtMost(60)},
		Rollback: []RollbackStep{{Name: "step", Do: func(context.Context, Incident) error { return nil }}},
	}
}

func (s *sim) begin(id, version int) {
	s.lives++
	p := &replica{id: id, version: version, latched: map[string]uint64{}}
	r, err := New("x", simPolicy(version), &Options{
		Store: &view{s.store, p}, Logger: quiet, Interval: 5 * time.Second, Replica: fmt.Sprintf("r%d.%d", id, s.lives),
	})
	if err != nil {
		panic(err)
	}
	r.now, r.barrier = func() time.Time { return s.now }, 0
	r.coin = func(n int) bool { return s.calm || s.rnd.IntN(n) < 2 }
	r.silent, r.plan.Keep = 6, 4 // small windows, that they are met
	if s.lives%2 == 0 {
		r.fullBytes = 50 + s.rnd.IntN(200) // a document has some series
	}
	r.running.Store(true)
	p.Rollout = r
	r.startClock()
	if old := s.procs[id]; old != nil {
		old.dead = true
		s.unsure += old.unsure.Load()
		s.stats.deaths++
		s.stats.seals += len(old.seals)
	}
	s.procs[id] = p
}

// turn is what one replica does between two calls of others: some traffic, and a tick.
func (s *sim) turn(p *replica) {
	if p.busy || p.dead || s.procs[p.id] != p {
		return
	}
	if p.paused > 0 && !s.calm {
		p.paused--
		return
	}
	p.busy = true
	defer func() { p.busy = false }()
	if s.rnd.IntN(3) > 0 && !s.calm {
		bad := 0
		if p.version == 1 {
			bad = 90
		}
		for range s.rnd.IntN(16) {
			s.units++
			u := Unit{Key: fmt.Sprint(s.units)}
			if s.units%3 == 0 {
				u.Groups = staffOnly
			}
			d := p.Decide(u)
			if d.Cohort() != None {
				s.store.counted[countedKey{d.Generation(), d.Ring()}]++
			}
			d.Record(Errors.Observe(d.Enabled() && s.rnd.IntN(100) < bad))
		}
	}
	ctx := context.Background()
	k := s.rnd.IntN(200)
	if s.long && s.rnd.IntN(4) > 0 {
		k = 12 // fewer verbs
	}
	switch {
	case s.calm || k >= 12:
		p.tick(ctx, &p.clock, false)
		p.clock.alarm = false
	case k < 6:
		_ = p.refresh(ctx)
	case k == 6:
		_ = p.Hold(ctx, "wait")
	case k < 9:
		_ = p.Resume(ctx, "on")
	case k == 9:
		_ = p.rollback(s)
	case k < 12:
		_ = p.Restart(ctx, "again")
	}
	if run, idle := p.stepsToRun(); run {
		var steps context.Context
		steps, p.stop = context.WithCancel(ctx)
		p.runSteps(steps, idle)
		p.stop()
		p.stop = nil
	}
	s.exposed(p)
	s.knows(p)
}

func (p *replica) rollback(s *sim) error {
	err := p.Rollback(context.Background(), "stop")
	if p.served() && p.standing != machine.Done {
		s.fail("r%d serves the candidate after Rollback has returned %v", p.id, err)
	}
	return err
}

// served reports whether a replica serves the candidate to anybody.
func (p *replica) served() bool {
	for i := range 50 {
		if p.Peek(Unit{Key: fmt.Sprint(i), Groups: staffOnly}).Enabled() {
			return true
		}
	}
	return served(p.Rollout)
}

// exposed judges what a replica serves.
func (s *sim) exposed(p *replica) {
	p.mu.Lock()
	known, standing := p.known, p.standing
	p.mu.Unlock()
	if known == nil {
		return
	}
	if known.Phase.Latched() {
		p.latched[known.Version] = max(p.latched[known.Version], known.Gen)
	}
	if gen, ok := p.latched[known.Version]; ok && known.Gen <= gen && standing != machine.Done && p.served() {
		s.fail("r%d serves %s of generation %d, which it knew to be rolled back in %d", p.id, known.Version, known.Gen, gen)
	}
}

// knows judges that what a replica takes for published is what was published under this cut.
func (s *sim) knows(p *replica) {
	d := p.pub.acked
	if d == nil {
		return
	}
	at := p.pub.key(p.Rollout)
	landed := s.store.landed[at]
	if landed == nil || landed.Seq != d.Seq || s.anyTorn(at) {
		return
	}
	was := *landed
	if was.Sealed = d.Sealed; !d.Same(&was) {
		s.fail("r%d takes for published what is not, under cut %d", p.id, d.Seq)
	}
}

// chaos is one thing that happens to the fleet.
func (s *sim) chaos() {
	p := s.procs[s.rnd.IntN(len(s.procs))]
	switch k := s.rnd.IntN(100); {
	case k < 30:
		s.now = s.now.Add(time.Duration(s.rnd.IntN(8)) * time.Second)
	case k < 36 && !p.busy && (!s.long || s.rnd.IntN(8) == 0):
		version := p.version
		if s.rnd.IntN(4) == 0 && !s.long {
			version = s.rnd.IntN(3)
		}
		s.begin(p.id, version)
	case k < 42:
		switch {
		case !s.long:
			p.paused = s.rnd.IntN(40)
		case s.rnd.IntN(6) == 0:
			p.paused = s.rnd.IntN(160)
		}
	case k < 46:
		p.cut = true
	case k < 60 && (!s.long || s.rnd.IntN(4) == 0):
		p.cut = false
	case k < 70 && len(s.store.late) > 0 && (!s.long || s.rnd.IntN(10) == 0):
		i := s.rnd.IntN(len(s.store.late))
		late := s.store.late[i]
		s.store.late = slices.Delete(s.store.late, i, i+1)
		late()
	case k < 73:
		s.store.shadow = append(s.store.shadow, maps.Clone(s.store.all))
	case k < 75 && len(s.store.shadow) > 0 && s.stats.travels < 3 && !s.long:
		s.travel()
	default:
		s.turn(p)
	}
}

// travel sets the store back to an earlier copy of itself.
func (s *sim) travel() {
	s.stats.travels++
	s.store.all = maps.Clone(s.store.shadow[s.rnd.IntN(len(s.store.shadow))])
	s.store.late = nil // they were sent to the store as it was
	s.store.prev = nil
	for key := range s.store.landed { // what was consumed since is not there, and what was published since
		tl, _, _ := strings.Cut(strings.TrimPrefix(key, "rollout/x/ev/"), "/")
		s.store.torn[tl] = true
	}
	if st := s.state(); st != nil {
		s.store.torn[timeline(st)] = true
	}
}

func (s *sim) state() *machine.State {
	e, ok := s.store.all[stateKey]
	if !ok {
		return nil
	}
	st, err := machine.Decode("x", e.value)
	if err != nil {
		s.fail("the state cannot be read: %v", err)
	}
	return st
}

// settle ends whatever is wrong, and judges where that leads to.
func (s *sim) settle() {
	s.calm = true
	s.store.late = nil
	for _, p := range s.procs {
		p.cut, p.paused = false, 0
	}
	for _, wait := range []time.Duration{5, 5, 5, 66, 61, 61, 61, 0, 0} { // the last has written what the first must hear of
		for _, p := range s.procs {
			s.turn(p)
			s.now = s.now.Add(2 * time.Second) // nobody leaves it to the one before
		}
		s.now = s.now.Add(wait * time.Second)
	}
	st := s.state()
	if st == nil || st.Phase != machine.Running && st.Phase != machine.Held {
		return
	}
	for _, p := range s.procs {
		s.once(p, st)
	}
	if s.store.torn[timeline(st)] {
		return
	}
	all, now := s.store.published(timeline(st), st.Floor), s.store.consumed(st)
	judging := slices.ContainsFunc(s.procs, func(p *replica) bool { return p.standing == machine.Current })
	given := s.unsure // up, because nobody knows any more whether it was counted
	for _, p := range s.procs {
		given += p.unsure.Load()
	}
	for k, c := range all {
		if judging && k.Epoch >= st.Oldest && k.Metric == Errors.Name() && countsAbove(c, now[k]) && total2(c) > total2(now[k])+given {
			s.fail("%v: %d of %d that were published are consumed at the end", k, total2(now[k]), total2(c))
		}
	}
	for _, p := range s.procs {
		if p.known == nil || older(p.known, st) {
			s.fail("r%d does not follow (%d, %d): %v", p.id, st.Gen, st.Ver, p.storeErr)
			continue
		}
		if p.standing != machine.Current || p.pub.gen != st.Gen {
			continue
		}
		if p.pub.pending != nil {
			s.fail("r%d does not know what became of its evidence", p.id)
		}
		// What it has counted and nobody has given up is published, as it stands.
		left := p.unpublished(st)
		for _, x := range left.Series {
			if x.Metric != Errors.Name() || x.Epoch < st.Oldest {
				continue
			}
			if got := s.store.landed["rollout/x/ev/"+timeline(st)+"/"+p.pub.inc].Find(x.Key); got == nil || countsAbove(x.Counts, got.Counts) {
				s.fail("r%d has counted %d of %v that are not published", p.id, total2(x.Counts), x.Key)
			}
		}
		s.stats.dropped += int(p.unsure.Load())
	}
}

// once judges that what a process has published, in all of its incarnations and timelines, is no more than what it counted.
func (s *sim) once(p *replica, st *machine.State) {
	counted := p.count(st)
	sums := map[tally.Key]tally.Counts{}
	for key, d := range s.store.landed {
		if !strings.Contains(key, "/"+p.replica+"-") || !strings.Contains(key, fmt.Sprintf("/ev/%d.", st.Gen)) {
			continue
		}
		for _, x := range s.store.counts(timeline(st), d).Series {
			c, ok := sums[x.Key]
			if !ok {
				c = tally.NewCounts(x.Cells)
			}
			sums[x.Key] = c.Plus(x.Counts)
		}
	}
	for _, x := range counted.Series {
		if x.Epoch < st.Oldest || x.Metric != Errors.Name() || s.stats.travels > 0 || p.standing != machine.Current {
			continue
		}
		published := uint64(0)
		if c, ok := sums[x.Key]; ok {
			published = total2(c)
		}
		if n := total2(x.Counts); n > published+p.unsure.Load() {
			s.fail("r%d has counted %d of %v and published %d", p.id, n, x.Key, published)
		}
	}
	for k, c := range sums {
		if k.Epoch < st.Oldest || k.Metric != Errors.Name() {
			continue
		}
		if got := counted.Find(k); got == nil || countsAbove(c, got.Counts) {
			s.fail("r%d has published %d of %v and counted less", p.id, total2(c), k)
		}
	}
}

func runSim(t *testing.T, seed uint64) *sim {
	s := &sim{rnd: rand.New(rand.NewPCG(seed, 7)), t: t, now: driverStart, long: seed%2 == 1}
	s.store = &simStore{
		s: s, all: map[string]kept{}, landed: map[string]*tally.Doc{}, torn: map[string]bool{}, folded: map[string]map[string]*tally.Doc{}, consume: map[string]map[tally.Key]tally.Counts{},
		began: map[uint64]time.Time{}, counted: map[countedKey]uint64{}, read: map[string]bool{},
	}
	n := 3
	if seed%5 == 0 {
		n = 7
	}
	s.procs = make([]*replica, n)
	for i := range n {
		s.begin(i, 0)
	}
	steps := 400
	if s.long {
		steps = 1600
	}
	for range steps {
		s.chaos()
		if len(s.wrong) > 0 {
			return s
		}
	}
	s.settle()
	return s
}

// TestFleet runs fleets in every kind of trouble, and judges at each write that was applied whether every outcome that was
// published is consumed once, and what is served.
func TestFleet(t *testing.T) {
	var sum sim
	for seed := *fleetFirst; seed < *fleetFirst+*fleetSeeds; seed++ {
		var wrong []string
		synctest.Test(t, func(t *testing.T) {
			s := runSim(t, uint64(seed))
			wrong = s.wrong
			sum.stats.travels += s.stats.travels
			sum.stats.deaths += s.stats.deaths
			sum.stats.folded += s.stats.folded
			sum.stats.judged += s.stats.judged
			sum.stats.dropped += s.stats.dropped
			sum.stats.pruned += s.stats.pruned
			sum.stats.seals += s.stats.seals
		})
		if len(wrong) > 0 {
			t.Errorf("seed %d:\n%s", seed, strings.Join(wrong, "\n"))
		}
	}
	t.Logf("%+v", sum.stats)
	if *fleetSeeds >= 15 && (sum.stats.folded == 0 || sum.stats.travels == 0 || sum.stats.judged == 0 || sum.stats.seals == 0) {
		t.Error("it shows nothing")
	}
}
