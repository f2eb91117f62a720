package rollout

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

func (r *Rollout) key() string { return "rollout/" + r.name + "/state" }

// headKey is the key that everybody polls and watches.
func (r *Rollout) headKey() string { return "rollout/" + r.name + "/head" }

// storeTimeout is for one use of the Store.
func (r *Rollout) storeTimeout() time.Duration { return max(r.o.Interval, 2*time.Second) }

// maxStray bounds the calls that a Store which ignores its context may leave behind.
const maxStray = 16

// use makes one use of the Store, and gives up on it when ctx ends or it takes too long, even if the Store does not.
func use[T any](ctx context.Context, r *Rollout, f func(context.Context) (T, error)) (T, error) {
	return useFor(ctx, r, r.storeTimeout(), f)
}

// untried is why the Store was not asked at all.
type untried struct{ error }

func (u untried) Unwrap() error { return u.error }

func useFor[T any](ctx context.Context, r *Rollout, limit time.Duration, f func(context.Context) (T, error)) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, untried{err}
	}
	if r.stray.Load() >= maxStray {
		return zero, untried{errors.New("the Store has not come back from earlier calls")}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r.stray.Add(1)
	return guard(ctx, 0, func(ctx context.Context) (T, error) {
		defer r.stray.Add(-1)
		return f(ctx)
	})
}

// put is a CompareAndSwap.
func (r *Rollout) put(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	type result struct {
		rev     uint64
		swapped bool
	}
	got, err := use(ctx, r, func(ctx context.Context) (result, error) {
		rev, swapped, err := r.store.CompareAndSwap(ctx, key, old, value)
		return result{rev, swapped}, err
	})
	if err != nil {
		return 0, false, fmt.Errorf("write %s: %w", key, err)
	}
	return got.rev, got.swapped, nil
}

// get is a Load.
func (r *Rollout) get(ctx context.Context, key string) ([]byte, uint64, error) {
	type result struct {
		value []byte
		rev   uint64
	}
	got, err := use(ctx, r, func(ctx context.Context) (result, error) {
		v, rev, err := r.store.Load(ctx, key)
		return result{v, rev}, err
	})
	if err != nil {
		return nil, 0, fmt.Errorf("load %s: %w", key, err)
	}
	return got.value, got.rev, nil
}

// decoded is the state of one revision, which is never used for another.
type decoded struct {
	st  *machine.State
	rev uint64
}

// load reads the stored state, which the caller must not change; nil if there is none. Without a Store it is the state
// that was written, and never becomes a document: nobody else would read it.
func (r *Rollout) load(ctx context.Context) (*machine.State, uint64, error) {
	if !r.shared {
		d := r.decoded.Load()
		if d == nil || ctx.Err() != nil {
			return nil, 0, ctx.Err()
		}
		return d.st, d.rev, nil
	}
	value, rev, err := r.get(ctx, r.key())
	if err != nil || rev == 0 {
		return nil, 0, err
	}
	if d := r.decoded.Load(); d != nil && d.rev == rev {
		return d.st, rev, nil
	}
	st, err := machine.Decode(r.name, value)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", r.key(), err)
	}
	r.decoded.Store(&decoded{st, rev})
	return st, rev, nil
}

// swap writes the state over revision old. An outcome that is unknown is looked up once: landed says whether this very
// write is there. The caller must not change st any more.
func (r *Rollout) swap(ctx context.Context, st *machine.State, old uint64) (landed bool, err error) {
	st.Writer, st.Op = r.me(), strconv.FormatUint(r.op.Add(1), 36)
	if !r.shared {
		was := r.decoded.Load()
		switch {
		case ctx.Err() != nil:
			return false, ctx.Err()
		case was == nil && old != 0, was != nil && was.rev != old:
			return false, nil
		}
		return r.decoded.CompareAndSwap(was, &decoded{st, old + 1}), nil
	}
	doc, err := st.Encode()
	if err != nil {
		return false, err
	}
	if _, landed, err = r.put(ctx, r.key(), old, doc); err == nil {
		return landed, nil
	}
	now, _, again := r.load(ctx)
	if again != nil {
		return false, err
	}
	if now != nil && now.Writer == st.Writer && now.Op == st.Op {
		return true, nil
	}
	return false, err
}

// following is the state that this process follows, which must not be changed; nil if none was loaded yet.
func (r *Rollout) following() *machine.State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known
}

// look is the stored state and what this process would make of it.
type look struct {
	stored   *machine.State // nil if there is none
	rev      uint64
	st       *machine.State // the caller's own
	events   []machine.Event
	standing machine.Standing
	dirty    bool // st is not what is stored, and must be stored before it is followed
}

// latest loads the state and squares it with this process: where there is none, the newest one known, or a new one; one
// that is older than what was known before is joined with that; and a rollback in force here is one there, before
// anything else.
func (r *Rollout) latest(ctx context.Context) (look, error) {
	r.mu.Lock()
	known, intent, units := r.known, r.intent, r.unitsLocked()
	r.mu.Unlock()
	stored, rev, err := r.load(ctx)
	if ctx.Err() == nil || err == nil {
		r.noteStore(err)
	}
	if err != nil {
		return look{}, err
	}
	l := look{stored: stored, rev: rev}
	switch {
	case stored == nil && known == nil:
		l.st, l.dirty = machine.New(r.name, r.plan, randomText()), true
	case stored == nil, known != nil && wentBack(stored, known):
		r.logger().Error("rollout: the Store went back to an older state; what was known is joined with it", "rollout", r.name)
		l.st, l.events = machine.Rejoin(stored, known, r.plan, randomText(), r.now())
		l.dirty = true
	default:
		l.st = stored.Clone()
	}
	if intent != nil && (intent.gen == 0 || intent.gen == l.st.Gen) {
		more, err := machine.Apply(l.st, r.plan, machine.Verb{Name: machine.VerbRollback, Note: intent.note, Incident: intent.incident, Units: units, Now: r.now()})
		if err == nil && len(more) > 0 {
			l.events = append(l.events, more...)
			l.standing, l.dirty = machine.Stands(l.st, r.plan), true
			return l, nil // nothing new begins before it is stored
		}
	}
	if r.yields(l.st) {
		l.standing = machine.Yields(l.st, r.plan)
		return l, nil
	}
	ver := l.st.Ver
	standing, more := machine.Adopt(l.st, r.plan, randomText(), r.now())
	l.standing, l.events = standing, append(l.events, more...)
	l.dirty = l.dirty || l.st.Ver != ver
	return l, nil
}

// patience is for how long a process sees no evaluation by another one, of the same version, that gave the rollout another
// policy than its own, before it takes over: three checkpoints of an idle rollout, whose interval may be the longer one.
func (r *Rollout) patience() time.Duration { return max(36*r.o.Interval, 3*time.Minute) }

// yields reports whether the state has another policy than this process, which had its own in force before: whoever came
// last is right, for as long as it evaluates.
func (r *Rollout) yields(st *machine.State) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	own := st.Version != r.plan.Version || st.Policy == r.plan.Policy && st.Assignment == r.plan.Assignment
	return !own && r.ruled && (st.Round != r.round || r.now().Sub(r.moved) < r.patience())
}

// older reports whether state a was left behind by b.
func older(a, b *machine.State) bool { return a.Gen < b.Gen || a.Gen == b.Gen && a.Ver < b.Ver }

// wentBack reports whether a stored state is without something that is known to have been stored: also where that is no more
// than who runs the steps of a rollback.
func wentBack(stored, known *machine.State) bool {
	if older(stored, known) || older(known, stored) {
		return older(stored, known)
	}
	return stored.Term < known.Term || stored.Term == known.Term && stored.Runner != "" && known.Runner != "" && stored.Runner != known.Runner
}

// noteStore remembers how the last use of the Store went, and logs a change.
func (r *Rollout) noteStore(err error) {
	r.mu.Lock()
	was := r.storeErr
	r.storeErr = err
	switch {
	case err != nil && was == nil:
		r.queueLocked(Event{Time: r.now(), Kind: StoreFailed, Name: r.name, Err: err})
	case err == nil && was != nil:
		r.queueLocked(Event{Time: r.now(), Kind: StoreBack, Name: r.name})
	}
	r.mu.Unlock()
	switch {
	case err != nil && was == nil:
		r.logger().Error("rollout: the Store cannot be used; the present shares stay and nothing advances", "rollout", r.name, "err", err)
	case err == nil && was != nil:
		r.logger().Info("rollout: the Store is back", "rollout", r.name)
	}
}

// update changes the stored state by f, until no other writer comes between, and follows the result. f may be called
// several times, each time with a state of its own.
func (r *Rollout) update(ctx context.Context, f func(*machine.State, machine.Standing) ([]machine.Event, error)) (*machine.State, error) {
	return r.updateOf(ctx, 0, f)
}

// anyGeneration is whichever there is, also where one begins meanwhile.
const anyGeneration = math.MaxUint64

// updateOf is update of a generation; 0 is the one that is loaded first.
func (r *Rollout) updateOf(ctx context.Context, of uint64, f func(*machine.State, machine.Standing) ([]machine.Event, error)) (*machine.State, error) {
	var gen uint64
	for {
		l, err := r.latest(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotStored, err)
		}
		if of != anyGeneration && (gen != 0 && l.st.Gen != gen || of != 0 && l.stored != nil && l.stored.Gen > of) {
			return nil, fmt.Errorf("%w: overtaken: generation %d began meanwhile", ErrState, l.st.Gen)
		}
		gen = l.st.Gen
		more, err := f(l.st, l.standing)
		if err != nil {
			return nil, err
		}
		if !l.dirty && len(more) == 0 && same(l.stored, l.st) {
			r.follow(l.stored, l.standing, nil)
			return l.st, nil
		}
		at := r.now()
		r.carry(&l, at)
		landed, err := r.swap(ctx, l.st, l.rev)
		if err != nil {
			if ctx.Err() == nil {
				r.noteStore(err)
			}
			return nil, fmt.Errorf("%w: %w", ErrNotStored, err)
		}
		if landed {
			r.followAt(l.st, l.standing, append(l.events, more...), at)
			if err := r.project(ctx, l.st); err != nil && ctx.Err() == nil {
				r.noteStore(err) // whoever evaluates next does it
			}
			return l.st, nil
		}
	}
}

// carry keeps the time that a stage was followed and that is not accounted for, where the stage goes on.
func (r *Rollout) carry(l *look, at time.Time) {
	switch {
	case l.stored == nil || l.st.Gen != l.stored.Gen:
		l.st.Since = 0
	case l.st.Ver != l.stored.Ver:
		if l.st.Since = 0; l.stored.Phase == machine.Running && l.st.Phase == machine.Running {
			l.st.Since = -l.stored.Account(r.followed(l.stored, at))
		}
	}
}

// same reports whether two states are the same document.
func same(a, b *machine.State) bool {
	x, errX := a.Encode()
	y, errY := b.Encode()
	return errX == nil && errY == nil && string(x) == string(y)
}

// follow makes a state that is stored the one that decisions follow, unless a newer one is followed already, and tells of
// the events that led to it.
func (r *Rollout) follow(st *machine.State, standing machine.Standing, events []machine.Event) {
	r.followAt(st, standing, events, r.now())
}

// followAt is follow of a state that was written, or read, at a time.
func (r *Rollout) followAt(st *machine.State, standing machine.Standing, events []machine.Event, at time.Time) {
	var own []Event
	r.mu.Lock()
	told := toldSince(r.known, st)
	if others := len(told) - len(events); others >= 0 {
		told = told[:others] // what this process has done itself it tells with all there is
	} else {
		told = nil
	}
	r.retellLocked(st, told)
	heard := r.known != nil && !older(r.known, st) // it was read, and told, before whoever wrote it came to that
	for _, e := range events {
		if own = append(own, r.event(st, e)); !heard {
			r.queueLocked(own[len(own)-1])
		}
	}
	if r.known == nil || !wentBack(st, r.known) {
		if r.round != st.Round || r.known == nil || r.known.Gen != st.Gen {
			r.moved, r.round = r.now(), st.Round
		}
		r.followLocked(st, standing, at)
	}
	r.mu.Unlock()
	for _, e := range own {
		r.logEvent(e)
	}
}

// toldSince are the events by which a state came about that is newer than the one known.
func toldSince(known, st *machine.State) []machine.Told {
	if known == nil || !older(known, st) {
		return nil
	}
	i := slices.IndexFunc(st.Recent, func(t machine.Told) bool { return t.Ver > known.Ver })
	if i < 0 {
		return nil
	}
	return st.Recent[i:]
}

// retellLocked hands events of other processes to this one's subscribers. Whose they are has logged them.
func (r *Rollout) retellLocked(st *machine.State, told []machine.Told) {
	for _, t := range told {
		r.queueLocked(r.event(st, t.Event(st.Incident)))
	}
}

// followHead makes a head the one that decisions follow, if it is newer.
func (r *Rollout) followHead(st *machine.State) {
	r.mu.Lock()
	if r.known != nil && !older(r.known, st) {
		r.mu.Unlock()
		return
	}
	told := toldSince(r.known, st)
	if st.Phase.Latched() && (r.known == nil || !r.known.Phase.Latched()) {
		r.wakeUp() // to confirm it
	}
	if old := r.known; old != nil && old.Gen == st.Gen && old.Nonce == st.Nonce { // the last that is known of what a head is without
		st = st.Clone()
		st.Gates, st.Sources, st.Pace = old.Gates, old.Sources, old.Pace
	}
	standing := machine.Stands(st, r.plan)
	if st.Version == r.plan.Version && (st.Policy != r.plan.Policy || st.Assignment != r.plan.Assignment) && r.ruled {
		standing = machine.Yields(st, r.plan)
	}
	r.retellLocked(st, told)
	r.followLocked(st, standing, r.now())
	r.mu.Unlock()
}

func (r *Rollout) followLocked(st *machine.State, standing machine.Standing, at time.Time) {
	if r.known == nil || r.known.Gen != st.Gen || r.known.Ver != st.Ver {
		r.since = at
	}
	r.ruled = r.ruled || standing == machine.Current && st.Policy == r.plan.Policy
	r.known, r.standing, r.stale = st, standing, false
	r.calm.Store(st.Phase != machine.Running && st.Phase != machine.Held || !r.plan.Judge.Watchful(&st.Gates))
	if r.latchAny {
		r.latch[st.Gen], r.latchAny = true, false
	}
	if r.intent != nil {
		if r.intent.gen == 0 {
			r.intent.gen = st.Gen
		}
		if st.Gen > r.intent.gen || st.Gen == r.intent.gen && st.Phase.Latched() {
			r.intent = nil
		}
	}
	if st.Phase.Latched() {
		r.latch[st.Gen] = true
	}
	r.publishLocked()
	r.sweepLocked(st)
	r.markLocked(st)
	r.revokeLocked()
	r.journal.settle(st)
	signal(r.turned)
}

// project brings the head up to a state that is stored.
func (r *Rollout) project(ctx context.Context, st *machine.State) error {
	if !r.shared || st == nil {
		return nil
	}
	r.mu.Lock()
	seen, rev := r.head, r.headRev
	r.mu.Unlock()
	for range 4 {
		if seen != nil && !older(seen, st) {
			return nil
		}
		head := st.Head(r.plan)
		value, err := head.Encode()
		if err != nil {
			return err
		}
		now, swapped, err := r.put(ctx, r.headKey(), rev, value)
		if err == nil && swapped {
			r.mu.Lock()
			r.head, r.headRev = head, now
			r.mu.Unlock()
			return nil
		}
		if seen, rev, err = r.loadHead(ctx); err != nil {
			return err
		}
	}
	return nil
}

// loadHead reads the head; nil if there is none.
func (r *Rollout) loadHead(ctx context.Context) (*machine.State, uint64, error) {
	value, rev, err := r.get(ctx, r.headKey())
	if err != nil {
		return nil, 0, err
	}
	r.mu.Lock()
	head, was := r.head, r.headRev
	r.mu.Unlock()
	if rev == 0 || rev == was {
		if rev == 0 {
			head = nil
		}
		return head, rev, nil
	}
	if head, err = machine.Decode(r.name, value); err != nil {
		return nil, 0, fmt.Errorf("%s: %w", r.headKey(), err)
	}
	r.mu.Lock()
	r.head, r.headRev = head, rev
	r.mu.Unlock()
	return head, rev, nil
}

// refresh follows what others, or a verb, have stored. The head is enough, but where steps are to be run, where this
// process's first document is not counted for certain, and where the head is behind.
func (r *Rollout) refresh(ctx context.Context) error {
	known := r.following()
	var head *machine.State
	if r.shared {
		var err error
		if head, _, err = r.loadHead(ctx); err != nil {
			return err
		}
		if head != nil && known != nil { // who knows nothing looks at what decides
			r.followHead(head)
		}
	}
	now := r.following()
	_, steps := machine.NextStep(now)
	p := &r.pub
	unconfirmed := p.acked != nil && !p.confirmed
	behind := head == nil || known == nil || older(head, known)
	r.mu.Lock()
	unconfirmed = unconfirmed || r.fork.open
	r.mu.Unlock()
	if !steps && !unconfirmed && !behind && r.standingNow() != machine.Follower {
		return nil
	}
	st, _, err := r.load(ctx)
	switch {
	case err != nil:
		return err
	case known != nil && (st == nil || wentBack(st, known)):
		return r.travelled(ctx)
	case st == nil:
		return nil
	}
	r.confirm(st)
	r.joins(st)
	standing := machine.Stands(st, r.plan)
	if r.yields(st) {
		standing = machine.Yields(st, r.plan)
	}
	if now == nil || older(now, st) || !older(st, now) && (st.Round != now.Round || st.Term != now.Term || st.Beat != now.Beat) {
		r.follow(st, standing, nil)
	}
	return r.project(ctx, st)
}

func (r *Rollout) standingNow() machine.Standing {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.standing
}

// latchedLocked reports whether this process must not expose the candidate of the state, as it stands to it.
func (r *Rollout) latchedLocked(st *machine.State) bool {
	gen := st.Gen
	if r.standing == machine.Done {
		gen = r.ownGenLocked(st)
	}
	return r.latch[gen] || r.latchAny || r.fork.holds(st)
}

// ownGenLocked is the generation of this process's version, where it serves an earlier one's.
func (r *Rollout) ownGenLocked(st *machine.State) uint64 {
	for _, e := range st.Versions {
		if e.Version == r.plan.Version {
			return e.Gen
		}
	}
	return st.Gen
}

// publishLocked swaps what decisions see, if it is no longer what the state asks for.
func (r *Rollout) publishLocked() {
	if r.forced != nil {
		return
	}
	everyone := len(r.plan.Rings) - 1
	st := r.known
	view := snapKey{}
	if st != nil {
		view = snapKey{gen: st.Gen, epoch: st.Epoch, version: st.Version}
	}
	switch {
	case r.latchAny, st != nil && r.latchedLocked(st):
		view.answer = pack(false, None, ReasonRolledBack, everyone, 0)
	case st == nil:
		view.answer = pack(false, None, ReasonNotLoaded, everyone, 0)
	case r.standing == machine.Done:
		view.answer = pack(true, None, ReasonCompleted, everyone, 0)
	case r.standing == machine.Passive:
		view.answer = pack(false, None, ReasonVersion, everyone, 0)
	case r.stale && st.Phase != machine.Completed:
		view.answer = pack(false, None, ReasonNotLoaded, everyone, 0)
	}
	if r.view == view && st != nil {
		return
	}
	r.view = view
	if view.answer != 0 {
		s := r.fixedSnapshot(st, view.answer)
		if r.standing == machine.Done && view.answer&enabledBit != 0 {
			s.gen, s.version = r.ownGenLocked(st), r.plan.Version
		}
		r.openLocked(s.leashLocked())
	} else {
		s := r.snapshotLocked(st.Gen, st.Epoch, st.Version)
		if s == nil {
			s = r.newSnapshot(st).leashLocked()
		}
		r.openLocked(s)
	}
}

// snapshotLocked is the snapshot that was made of an epoch before something else was answered meanwhile; nil if there is
// none. An epoch has one set of cells, whatever comes in between.
func (r *Rollout) snapshotLocked(gen, epoch uint64, version string) *snapshot {
	for _, l := range r.ledgers {
		if l.snap.gen == gen && l.snap.epoch == epoch && l.snap.version == version {
			return l.snap
		}
	}
	return nil
}

// snapKey names what a snapshot was made of.
type snapKey struct {
	gen, epoch uint64
	version    string
	answer     bits // for everybody, whatever the state says; 0: as the state says
}

// maxLedgers bounds the epochs whose evidence waits to be consumed.
const maxLedgers = 32

// openLocked makes s what decisions see. The evidence of the epoch before still comes in; what is older, or of a candidate
// that is rolled back or completed, is what it is: what was once published must not become less. That of another generation
// counts no more.
func (r *Rollout) openLocked(s *snapshot) {
	counts := r.known != nil && (r.known.Phase == machine.Running || r.known.Phase == machine.Held) && !r.latchedLocked(r.known)
	var keep []*ledger
	var again *ledger
	r.ledgers = slices.DeleteFunc(slices.Clone(r.ledgers), func(l *ledger) bool {
		if l.snap == s {
			again = l
		}
		return l.snap == s
	})
	for i, l := range r.ledgers {
		if r.known == nil || l.snap.gen != r.known.Gen || len(r.ledgers)-i >= maxLedgers {
			r.retireLocked(l)
			continue
		}
		if !counts || i < len(r.ledgers)-1 {
			l.snap.over.Store(true)
		}
		keep = append(keep, l)
	}
	switch {
	case again != nil:
		s.over.Store(false)
		keep = append(keep, again)
	case !s.never:
		keep = append(keep, newLedger(s))
	}
	r.ledgers = keep
	r.showLocked(s)
}

// sweepLocked drops the ledgers whose evidence counts no more.
func (r *Rollout) sweepLocked(st *machine.State) {
	if !slices.ContainsFunc(r.ledgers, func(l *ledger) bool { return l.snap.gen == st.Gen && l.snap.epoch < st.Oldest }) {
		return
	}
	r.ledgers = slices.DeleteFunc(slices.Clone(r.ledgers), func(l *ledger) bool {
		if l.snap.gen != st.Gen || l.snap.epoch >= st.Oldest {
			return false
		}
		r.retireLocked(l)
		return true
	})
}

// snapshotOf is the snapshot of an epoch, for a parsed decision.
func (r *Rollout) snapshotOf(gen, epoch uint64) *snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.ledgers {
		if l.snap.gen == gen && l.snap.epoch == epoch {
			return l.snap
		}
	}
	s := r.fixedSnapshot(nil, 0)
	s.gen, s.epoch = gen, epoch
	if r.known != nil && r.known.Gen == gen {
		s.version = r.known.Version
	}
	return s
}
