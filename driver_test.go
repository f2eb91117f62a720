package rollout

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// driver takes rollouts on one store through a schedule, without their Runs: one action after the other, in a time of its
// own, with a store that fails as it is told to. It remembers what must be known to judge the laws, and what was broken.
// Pauses after failures are those of a synctest bubble.
type driver struct {
	policy func(*driver, int) Policy
	now    time.Time
	store  *unsure
	procs  []*proc
	wrong  []string // laws that were broken

	judging bool           // writes are judged; what came before has been
	stored  *machine.State // the last one written
	read    decoded        // what is stored now
	lifting int            // verbs under way that may raise a share
	landing bool           // a write is made that has lost its answer before
	idle    bool           // a tick that no outcome came before
	anew    int            // Restarts under way
	serves  []serving      // in which the candidate had outcomes
	units   int
	lives   int // in the order of which their names are
	failing int // attempts at a step, or at undoing an effect, that will fail
	tried   beat

	effects map[string]*made
	undone  map[string]*made // the last one, by step
	latched uint64           // the generation that was last stored as rolled back; 0: none since it was forgotten
}

// beat is when the last attempt at a step was made.
type beat struct {
	gen, beat uint64
}

// serving is some requests at once, of which the candidate's had outcomes.
type serving struct{ gen, epoch uint64 }

// ringTally is of which outcomes there are how many.
type ringTally struct {
	gen  uint64
	ring string
}

// proc is one life of a process.
type proc struct {
	*Rollout
	d       *driver
	id      int
	version int

	gone     uint64               // generations up to this one were rolled back by this process
	goneNext bool                 // so will be the one that is loaded first
	had      map[ringTally]uint64 // outcomes consumed before its life
	recorded map[ringTally]uint64 // in its life
	waiting  []Decision           // of requests that have not come to their effects yet
	sessions []*Session
	fresh    bool // outcomes came since it has last stored a tick
}

const stateKey = "rollout/x/state"

var driverStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newDriver(procs int, policy func(*driver, int) Policy) *driver {
	d := &driver{policy: policy, now: driverStart, effects: map[string]*made{}, undone: map[string]*made{}}
	d.store = &unsure{Store: MemStore(), d: d, left: -1}
	for id := range procs {
		d.procs = append(d.procs, nil)
		d.begin(id, 0)
	}
	return d
}

// broken notes that a law was broken. It may be called from callbacks.
func (d *driver) broken(format string, args ...any) {
	d.wrong = append(d.wrong, fmt.Sprintf(format, args...))
}

// begin gives a process another life. What it knew is gone.
func (d *driver) begin(id, version int) {
	p := &proc{d: d, id: id, version: version, had: map[ringTally]uint64{}, recorded: map[ringTally]uint64{}}
	d.lives++
	p.Rollout = d.lone(fmt.Sprintf("p%d.%d", id, d.lives), version, d.store)
	p.running.Store(true) // by the driver
	p.startClock()
	if st := d.load(); st != nil {
		for _, ring := range p.plan.Rings {
			p.had[ringTally{st.Gen, ring}] = tallied(st, p.metric(), ring) + d.coming(st, p.metric(), ring)
		}
	}
	if old := d.procs[id]; old != nil {
		for _, s := range old.sessions {
			s.cancel(nil)
		}
	}
	d.procs[id] = p
}

func (d *driver) lone(replica string, version int, s Store) *Rollout {
	r, err := New("x", d.policy(d, version), &Options{Store: s, Logger: quiet, Interval: time.Minute, Replica: replica})
	if err != nil {
		panic(err)
	}
	r.now, r.coin = func() time.Time { return d.now }, func(int) bool { return true }
	r.barrier = 0
	return r
}

// load is the state as it is stored, which must not be changed.
func (d *driver) load() *machine.State {
	doc, rev, _ := d.store.Store.Load(context.Background(), stateKey)
	if rev == d.read.rev {
		return d.read.st
	}
	for _, p := range d.procs {
		if p != nil && p.decoded.Load() != nil && p.decoded.Load().rev == rev {
			d.read = *p.decoded.Load()
			return d.read.st
		}
	}
	st, err := machine.Decode("x", doc)
	if err != nil {
		d.broken("what is stored cannot be read: %v", err)
	}
	d.read = decoded{st, rev}
	return st
}

// phase is the stored one.
func (d *driver) phase() machine.Phase {
	if st := d.load(); st != nil {
		return st.Phase
	}
	return machine.Pending
}

// versionName is that of the n-th version.
func versionName(n int) string { return fmt.Sprint("v", n) }

// metric is one that this process alone records, so that its evidence can be told from that of others.
func (p *proc) metric() Rate { return ownMetrics[p.id] }

var ownMetrics = []Rate{NewRate("m0"), NewRate("m1")}

// tallied is how many outcomes of a metric the state's gates have consumed.
func tallied(st *machine.State, m Rate, ring string) uint64 {
	if g := st.Gates.Gates[m.AtMost(50).Name()]; g != nil && g.Parts[ring] != nil {
		return g.Parts[ring].Candidate.N + g.Parts[ring].Control.N
	}
	return 0
}

// coming is how many outcomes of a metric are published and not consumed yet.
func (d *driver) coming(st *machine.State, m Rate, ring string) (n uint64) {
	all, _ := d.store.Store.List(context.Background(), fmt.Sprintf("rollout/x/ev/%d.%s/", st.Gen, st.Nonce))
	sum := &tally.Sum{}
	for key, value := range all {
		if about, err := tally.Peek(value); err != nil {
			d.broken("the evidence %s cannot be read: %v", key, err)
		} else if _, gone := st.Retired[about.Inc]; gone {
			continue
		}
		_ = sum.AddEncoded(value)
	}
	for k, t := range sum.Totals {
		if k.Metric != m.Name() || k.Ring != ring || k.Epoch < st.Oldest {
			continue
		}
		n += t.Counts.Sum(0) + t.Counts.Sum(1)
		if was := st.Consumed[k]; was != nil {
			n -= was.Counts.Sum(0) + was.Counts.Sum(1)
		}
	}
	return n
}

// serve has n requests decided and answered, of which so many in a hundred of the candidate's are errors.
func (p *proc) serve(n, bad int) {
	seen := serving{}
	for range n {
		p.d.units++
		u := Unit{Key: fmt.Sprint(p.d.units)}
		if p.d.units%4 == 0 {
			u.Groups = []string{"staff"}
		}
		dec := p.Decide(u)
		if dec.Cohort() != None {
			p.recorded[ringTally{dec.Generation(), dec.Ring()}]++
		}
		dec.Record(Errors.Observe(dec.Enabled() && p.d.units*37%100 < bad), p.metric().Observe(false))
		if dec.Cohort() == Candidate {
			seen = serving{dec.Generation(), dec.at.epoch}
			if p.waiting = append(p.waiting, dec); len(p.waiting) > 2 {
				p.waiting = p.waiting[1:]
			}
		}
	}
	if seen.gen != 0 {
		p.d.serves, p.fresh, p.d.idle = append(p.d.serves, seen), true, false
	}
}

// evaluate lets time go by, and makes a tick.
func (p *proc) evaluate(passed time.Duration) {
	p.d.now = p.d.now.Add(passed)
	was := p.d.idle
	p.d.idle = len(p.d.store.held) == 0 && !slices.ContainsFunc(p.d.procs, func(p *proc) bool { return p.fresh || p.clock.doubt != nil || p.pub.pending != nil })
	p.tick(context.Background(), &p.clock, false)
	p.clock.alarm, p.d.idle = false, was
	if p.pub.pending == nil && p.clock.doubt == nil && p.clock.loaded.Equal(p.d.now) {
		p.fresh = false
	}
	p.tend(func([]*Session) {})
	p.mu.Lock()
	st := p.known
	p.mu.Unlock()
	if st == nil || st.Settled == 0 {
		return
	}
	if now := (clearing{st.Settled, st.KeptRings()}); now != p.cleared && p.clear(context.Background()) == nil {
		p.cleared = now
	}
}

// steps has the rollback's steps run where this process is the one to run them: all of them, or one attempt.
func (p *proc) steps(one bool) {
	run, idle := p.stepsToRun()
	if !run && one {
		p.d.now = p.d.now.Add(p.stepsPatience(false))
		run, idle = p.stepsToRun()
	}
	if !run {
		return
	}
	if len(p.sessions) > 0 {
		p.d.now = p.d.now.Add(p.policy.Sessions.Grace)
		p.tend(func([]*Session) {})
	}
	limit := 20 * time.Second // no beat comes
	if one {
		limit = 100 * time.Millisecond // shorter than any pause
		p.d.store.left = 2             // that it begins, and how it ended
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	p.runSteps(ctx, idle)
	cancel()
	synctest.Wait() // calls that were given up end
	p.d.store.left = -1
}

// rollBack is an operator's Rollback in this process.
func (p *proc) rollBack() error {
	p.mu.Lock()
	known := p.known
	p.mu.Unlock()
	if known == nil {
		known = p.d.load() // which it will load first
	}
	if known != nil {
		p.gone = max(p.gone, known.Gen)
	} else {
		p.goneNext = true
	}
	p.d.latched = 0
	err := p.Rollback(context.Background(), "stop")
	if p.goneNext && err == nil && p.d.latched > 0 { // that was loaded first; a Restart may have come since
		p.gone, p.goneNext = max(p.gone, p.d.latched), false
	}
	if d := p.enabled(); d != nil && p.standing != machine.Done {
		p.d.broken("a decision is %v, of generation %d, after Rollback has returned %v", d.Cohort(), d.Generation(), err)
	}
	return err
}

// mustRollBack is rollBack by a process that nothing comes in between of.
func (p *proc) mustRollBack() {
	if err := p.rollBack(); err == nil && !p.d.phase().Latched() {
		p.d.broken("Rollback has returned nil and stored is %v", p.d.phase())
	}
}

// lift is a verb that may raise a share.
func (p *proc) lift() error {
	p.d.lifting++
	defer func() { p.d.lifting-- }()
	stage := ""
	if st := p.d.load(); st != nil {
		stage = st.Stage.Name
	}
	return p.Advance(context.Background(), stage, "on")
}

// startAnew is a Restart.
func (p *proc) startAnew() error {
	p.d.anew++
	defer func() { p.d.anew-- }()
	return p.Restart(context.Background(), "again")
}

// enabled is a decision for the candidate, if any of some units gets one.
func (p *proc) enabled() *Decision {
	for i := range 24 {
		u := Unit{Key: peeked[i]}
		if i%2 == 0 {
			u.Groups = staffOnly
		}
		if d := p.Peek(u); d.Enabled() {
			return &d
		}
	}
	return nil
}

var (
	staffOnly = []string{"staff"}
	peeked    = func() (keys []string) {
		for i := range 24 {
			keys = append(keys, fmt.Sprint("peek ", i))
		}
		return keys
	}()
)

// note keeps what the next action must not forget.
func (p *proc) note() {
	if p.goneNext && p.known != nil {
		p.gone, p.goneNext = max(p.gone, p.known.Gen), false
	}
	select {
	case <-p.wake: // Run would be woken
	default:
	}
}

// check judges the laws that hold between two actions.
func (d *driver) check() {
	for _, p := range d.procs {
		p.check()
	}
	if d.store.calls < 0 {
		return
	}
	doc, rev, _ := d.store.Store.Load(context.Background(), stateKey)
	calls, before := d.store.calls, d.canon(d.load())
	for _, p := range d.procs {
		_ = p.Status()
		_ = p.enabled()
	}
	again, now, _ := d.store.Store.Load(context.Background(), stateKey)
	if rev != now || string(doc) != string(again) || calls != d.store.calls || before != d.canon(d.load()) {
		d.broken("reading has changed something")
	}
}

func (p *proc) check() {
	p.mu.Lock()
	known, standing := p.known, p.standing
	p.mu.Unlock()
	d := p.enabled()
	if d != nil && standing != machine.Done {
		switch {
		case known == nil:
			p.d.broken("p%d gives the candidate and knows of no state", p.id)
		case d.Generation() <= p.gone:
			p.d.broken("p%d gives the candidate of generation %d, which it has rolled back", p.id, d.Generation())
		case known.Gen == d.Generation() && known.Phase.Latched():
			p.d.broken("p%d gives the candidate of generation %d, which is %v", p.id, d.Generation(), known.Phase)
		case known.Version != p.plan.Version:
			p.d.broken("p%d has version %s and gives the candidate of %s", p.id, p.plan.Version, known.Version)
		}
	}
	if known != nil {
		for t, n := range p.recorded {
			if t.gen == known.Gen && tallied(known, p.metric(), t.ring) > p.had[t]+n {
				p.d.broken("p%d: of %d outcomes %d are consumed", p.id, p.had[t]+n, tallied(known, p.metric(), t.ring))
			}
		}
	}
	p.checkSessions(known)
}

// calm ends whatever is wrong with the store, and with steps.
func (d *driver) calm() {
	d.store.next, d.store.other, d.store.skip, d.store.blind, d.store.before, d.failing = 0, 0, 0, 0, nil, 0
	d.store.settle(true)
}

// accounts lets the last blocks close, and judges whether each outcome was consumed once; of several processes, one that
// did not hear of the next two epochs in time has outcomes that come too late.
func (d *driver) accounts() {
	d.calm()
	for range 3 {
		for _, p := range d.procs {
			p.evaluate(time.Minute)
		}
	}
	st := d.load()
	if st == nil || st.Phase != machine.Running && st.Phase != machine.Held {
		return
	}
	for _, p := range d.procs {
		if p.standing != machine.Current || p.latchedLocked(p.known) || p.known.Gen != st.Gen {
			continue
		}
		for _, ring := range p.plan.Rings {
			t := ringTally{st.Gen, ring}
			if want, got := p.had[t]+p.recorded[t], tallied(st, p.metric(), ring); want != got && !slices.Contains(st.Rings, ring) && (len(d.procs) == 1 || got > want) {
				d.broken("p%d: of %d outcomes of %s, %d before its life, %d are consumed", p.id, want, ring, p.had[t], got)
			}
		}
	}
}

// reachesRolledBack judges whether a rollback ends.
func (d *driver) reachesRolledBack() {
	d.calm()
	for range 12 {
		for _, p := range d.procs {
			if d.phase() != machine.RolledBack && (d.phase() != machine.RollingBack || p.intent != nil) {
				p.mustRollBack()
			}
			if d.phase() == machine.RolledBack {
				return
			}
			p.steps(true)
			if d.phase() == machine.RolledBack {
				return
			}
			p.evaluate(time.Minute)
		}
	}
	d.broken("it does not reach RolledBack: it is %v", d.phase())
}

// reachesCompleted judges whether it can be completed, given approvals, time and outcomes; and a Restart where it is rolled
// back.
func (d *driver) reachesCompleted(p *proc) {
	d.calm()
	for range 60 {
		st := d.load()
		switch {
		case st == nil:
		case st.Phase == machine.Completed:
			return
		case st.Phase == machine.RollingBack, st.Phase == machine.Stuck:
			p.mustRollBack()
			p.steps(true)
		case st.Phase == machine.RolledBack, st.Version != p.plan.Version:
			_ = p.startAnew()
		case st.Phase == machine.Held:
			if p.Resume(context.Background(), "on") != nil {
				_ = p.lift() // past a ring that is rolled back
			}
		case st.Phase == machine.Running && !st.Approved:
			_ = p.Approve(context.Background(), st.Stage.Name, "yes")
		}
		for _, other := range d.procs {
			other.serve(100, 0)
		}
		p.evaluate(time.Minute)
	}
	d.broken("it does not reach Completed: it is %v in %q", d.phase(), d.load().Stage.Name)
}

// wrote judges a write of the state.
func (d *driver) wrote() {
	if !d.judging {
		return
	}
	prev, next := d.stored, d.load()
	if d.stored = next; next == nil {
		return
	}
	if next.Phase.Latched() {
		d.latched = next.Gen
	}
	if prev == nil {
		if next.Phase != machine.Pending && next.Phase != machine.Running && next.Phase != machine.Held && !next.Phase.Latched() {
			d.broken("it begins as %v", next.Phase)
		}
		return
	}
	if older(next, prev) {
		d.broken("generation %d, version %d is stored over %d, %d", next.Gen, next.Ver, prev.Gen, prev.Ver)
	}
	for inc, c := range prev.Cursors {
		if now, ok := next.Cursors[inc]; ok && now.Seq < c.Seq {
			d.broken("the cursor of %s falls from %d to %d", inc, c.Seq, now.Seq)
		}
	}
	if next.Gen == prev.Gen {
		d.stays(prev, next)
	} else {
		d.begins(prev, next)
	}
	d.wroteSteps(prev, next)
	if begins(prev, next) {
		d.store.came = false
	}
}

// stays judges a write within a generation.
func (d *driver) stays(prev, next *machine.State) {
	if prev.Phase.Latched() && !next.Phase.Latched() || prev.Phase == machine.RolledBack && next.Phase != prev.Phase {
		d.broken("%v becomes %v", prev.Phase, next.Phase)
	}
	for _, ring := range prev.Rings {
		if !slices.Contains(next.Rings, ring) {
			d.broken("the ring %s is not rolled back any more", ring)
		}
	}
	if !machine.Raises(prev, next) || d.lifting > 0 || d.landing || prev.Phase == machine.Pending {
		return
	}
	if d.idle && len(d.procs) == 1 && prev.Baked < time.Minute { // one that had baked may have waited for an approval
		d.broken("a share rises in a tick that no outcome came before")
	}
	if prev.Phase != machine.Running {
		d.broken("a share rises while it is %v", prev.Phase)
	}
	earned := 0
	for _, s := range d.serves {
		if s.gen == prev.Gen && s.epoch >= prev.Entered {
			earned++
		}
	}
	if earned < 2 { // the first outcomes begin the bake, the second end it
		d.broken("%q is left after outcomes came %d times", prev.Stage.Name, earned)
	}
	if next.Phase == machine.Completed && !prev.Approved {
		d.broken("completed without approval")
	}
}

// begins judges a write that begins a generation.
func (d *driver) begins(prev, next *machine.State) {
	if prev.Phase == machine.RollingBack || prev.Phase == machine.Stuck {
		d.broken("a generation begins while it is %v", prev.Phase)
	}
	if first := next.Stage.Name == "staff 50 %"; next.Phase == machine.Completed || next.Shares[Everyone] > 0 || next.Shares["staff"] > 0 && !first {
		d.broken("a generation begins as %v in %q", next.Phase, next.Stage.Name)
	}
	seen := slices.ContainsFunc(prev.Versions, func(e machine.VersionEntry) bool { return e.Version == next.Version })
	if seen && d.anew == 0 && !d.landing {
		d.broken("%s, which it has had, begins again without a Restart", next.Version)
	}
}

// step is one of the policy's rollback steps, the i-th of all.
func (d *driver) step(names []string, i, attempts int) RollbackStep {
	return RollbackStep{Name: names[i], Attempts: attempts, Do: func(_ context.Context, in Incident) error {
		st := d.load()
		d.attempted(st, in.Fence)
		if next, ok := machine.NextStep(st); (!ok || next.Name != names[i] || next.Attempts == 0 || st.Gen != in.Generation) && !d.store.came {
			d.broken("the step %s of generation %d is attempted, and stored is %+v of %d", names[i], in.Generation, next, st.Gen)
		}
		return d.mayFail()
	}}
}

// attempted judges that an attempt, or the one that an effect is undone in, was stored before it is made.
func (d *driver) attempted(st *machine.State, fence string) {
	next, ok := machine.NextStep(st)
	if !ok || next.Attempts == 0 && !d.store.came { // that of a ring may be of an earlier generation
		d.broken("a step is attempted, and what is stored needs none: %+v", st)
		return
	}
	if fence != fmt.Sprintf("%020d", st.Term) {
		d.broken("a step is attempted with the fence %s in the term %d", fence, st.Term)
	}
	d.tried = beat{st.Gen, st.Beat}
	for _, p := range d.procs {
		for _, s := range p.sessions {
			if p.me() == st.Runner && s.leash.over() && !p.Rollout.sessions.settled(s) {
				d.broken("a step is attempted while a session goes on")
			}
		}
	}
}

func (d *driver) mayFail() error {
	if d.failing > 0 {
		d.failing--
		return errors.New("no")
	}
	return nil
}

// fault is what becomes of a write.
type fault uint8

const (
	dropped   fault = iota + 1 // it is not made, and no answer comes
	landed                     // it is made; neither its answer comes, nor one to the look whether it is there
	unheard                    // it is made, its answer is lost
	delayed                    // no answer comes; it is made later, or never
	outheld                    // another process holds first
	outrolled                  // another process rolls back first
)

// unsure is a Store whose writes and answers may be lost, or come late, or second.
type unsure struct {
	Store
	d      *driver
	next   fault    // of the next write of the state
	other  fault    // of the next write of anything else
	skip   int      // but for so many before it
	blind  int      // so many looks fail
	left   int      // so many writes are answered, then none; below 0: all
	held   []func() // writes that are made later
	before func()   // comes before the call after so many
	came   bool     // it has, since the last attempt at a step began
	early  int
	calls  int
}

// between has something come after so many more calls, before the next.
func (u *unsure) between(calls int, f func()) { u.early, u.before = calls, f }

func (u *unsure) meanwhile() {
	u.calls++
	if f := u.before; f != nil {
		if u.early--; u.early < 0 {
			left := u.left
			u.before, u.came, u.left = nil, true, -1
			f()
			u.left = left
		}
	}
}

func (u *unsure) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	u.meanwhile()
	if u.blind > 0 {
		u.blind--
		return nil, 0, errDown
	}
	return u.Store.Load(ctx, key)
}

func (u *unsure) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	u.meanwhile()
	if u.blind > 0 {
		u.blind--
		return nil, errDown
	}
	return u.Store.List(ctx, prefix)
}

func (u *unsure) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	u.meanwhile()
	f := u.other
	if key != stateKey {
		u.other = 0
	} else {
		if u.left == 0 {
			<-ctx.Done()
			return 0, false, ctx.Err()
		}
		u.left--
		f = u.next
		if u.skip > 0 {
			u.skip--
			f = 0
		} else {
			u.next = 0
		}
	}
	write := func() (uint64, bool, error) {
		rev, ok, err := u.Store.CompareAndSwap(context.WithoutCancel(ctx), key, old, value)
		if ok && err == nil && key == stateKey {
			u.d.wrote()
		}
		return rev, ok, err
	}
	switch f {
	case dropped:
		return 0, false, errDown
	case landed:
		u.blind = 1
		_, _, _ = write()
		return 0, false, errDown
	case unheard:
		_, _, _ = write()
		return 0, false, errDown
	case delayed:
		u.held = append(u.held, func() { _, _, _ = write() })
		return 0, false, errDown
	case outheld, outrolled:
		u.came = true
		u.another(f == outrolled)
	}
	return write()
}

// settle makes the writes that are held, or drops them.
func (u *unsure) settle(land bool) {
	held := u.held
	u.held = nil
	u.d.landing = true
	for _, f := range held {
		if land {
			f()
		}
	}
	u.d.landing = false
}

// another has another process write the state.
func (u *unsure) another(rollsBack bool) {
	ctx := context.Background()
	version := 0
	if st := u.d.load(); st != nil {
		_, _ = fmt.Sscanf(st.Version, "v%d", &version)
	}
	doc, rev, _ := u.Store.Load(ctx, stateKey)
	r := u.d.lone("q", version, &direct{u})
	if rollsBack {
		if err := r.Rollback(ctx, "stop"); err != nil || !u.d.phase().Latched() {
			u.d.broken("another process's Rollback has returned %v, stored is %v", err, u.d.phase())
		}
	} else {
		_ = r.Hold(ctx, "wait")
	}
	if _, now, _ := u.Store.Load(ctx, stateKey); now == rev {
		_, _, _ = u.Store.CompareAndSwap(ctx, stateKey, rev, doc)
	}
}

// direct is the store as another process sees it, which nothing goes wrong for.
type direct struct{ *unsure }

func (s *direct) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	return s.Store.Load(ctx, key)
}

func (s *direct) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	rev, ok, err := s.Store.CompareAndSwap(ctx, key, old, value)
	if ok && err == nil {
		s.d.wrote()
	}
	return rev, ok, err
}

// canon is where the driver is, but for times, counts and names by chance.
func (d *driver) canon(st *machine.State) string {
	var b strings.Builder
	d.describe(&b, st)
	for _, p := range d.procs {
		p.mu.Lock()
		fmt.Fprintf(&b, "\n%s %v %v", p.plan.Version, p.standing, p.stale)
		switch {
		case p.known == nil:
			b.WriteString(" knows nothing")
		case st != nil && p.known.Gen == st.Gen && p.known.Ver == st.Ver && p.known.Round == st.Round:
			b.WriteString(" follows")
		default:
			b.WriteString(" knows ")
			d.describe(&b, p.known)
		}
		if st != nil {
			fmt.Fprintf(&b, " %v", p.latch[st.Gen])
		}
		if p.known != nil {
			fmt.Fprintf(&b, " %v", p.latch[p.known.Gen])
		}
		fmt.Fprintf(&b, " %v", p.latchAny)
		if p.intent != nil {
			fmt.Fprintf(&b, " intent %v", p.intent.gen == 0 || st != nil && p.intent.gen == st.Gen)
		}
		if c := p.clock.doubt; c != nil {
			fmt.Fprintf(&b, " doubt %v %v", st != nil && st.Writer == c.st.Writer && st.Op == c.st.Op, c.st.Phase)
		}
		p.mu.Unlock()
		fmt.Fprintf(&b, " published %v %v %v", p.pub.acked != nil, p.pub.pending != nil, p.pub.confirmed)
	}
	fmt.Fprintf(&b, "\n%d %d %d %d %d %d", d.store.other, d.store.next, d.store.skip, d.store.blind, len(d.store.held), d.failing)
	return b.String()
}

func (d *driver) describe(b *strings.Builder, st *machine.State) {
	if st == nil {
		b.WriteString("nothing")
		return
	}
	fmt.Fprintf(b, "%v %s %v %v %v", st.Phase, st.Stage.Name, st.Shares, st.Rings, st.Version)
	if st.Hold != nil {
		fmt.Fprintf(b, " %s", st.Hold.Kind)
	}
	for _, e := range st.Versions {
		fmt.Fprintf(b, " %s:%v", e.Version, e.Completed)
	}
	fmt.Fprintf(b, " %v %v %v %v %v", st.Seen, st.Baked >= time.Minute, st.Approved, st.Exposed, st.Effects)
	for _, s := range st.Steps {
		fmt.Fprintf(b, " %s:%d:%v", s.Name, s.Attempts, s.Done)
	}
	runner := st.Runner
	for _, p := range d.procs {
		if runner == p.me() {
			runner = "me"
		}
	}
	if runner != "" && runner != "me" {
		runner = "another"
	}
	fmt.Fprintf(b, " %s", runner)
}

var byChance = regexp.MustCompile(`-[0-9a-f]{12}"|"nonce":"[0-9a-f]{12}"`)

// document is what is stored, to the bit but for what is drawn by chance.
func (d *driver) document() string {
	doc, _, _ := d.store.Store.Load(context.Background(), stateKey)
	return byChance.ReplaceAllString(string(doc), `"`)
}
