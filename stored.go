package rollout

import (
	"context"
	"errors"
	"fmt"
	"math"
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
