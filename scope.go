package rollout

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"

	"github.com/stagedrollout/rollout/internal/evidence"
)

// scope is what one request or job knows of its unit: who it is, asked once, and the answers it was given. It is the
// request's context, so that a request costs one allocation for all of its rollouts.
type scope struct {
	context.Context

	once   sync.Once     // guards the asking of unitOf
	known  atomic.Uint32 // once is done: isKnown, and isPlain where it is
	unitOf func(*http.Request) Unit
	req    *http.Request
	unit   Unit
	hash   uint64

	records bool                        // whoever made the scope records what comes of it
	outer   *scope                      // what it already answered for the same unit stands; may be nil
	base    *scope                      // answers and records whatever is not forced; may be nil
	forced  []*snapshot                 // by a test, the newest first; also in every scope inside; not nil within a session
	session *Session                    // the innermost one that the scope is in; may be nil
	pins    [4]atomic.Pointer[snapshot] // the snapshots the answers were given by, each in its slot, no gaps
	more    struct {
		sync.Mutex
		pins []*snapshot
	}
}

// What a scope knows of its unit. Plain: a key, no groups, and no scope around that may have answered before.
const (
	isKnown = 1 << iota
	isPlain
)

type scopeKey struct{}

// Value implements context.Context.
func (s *scope) Value(key any) any {
	if _, ok := key.(scopeKey); ok {
		return s
	}
	return s.Context.Value(key)
}

func scopeOf(ctx context.Context) *scope {
	if s, ok := ctx.(*scope); ok {
		return s
	}
	s, _ := ctx.Value(scopeKey{}).(*scope)
	return s
}

// NewContext returns a context for one request or job of unit u: every rollout that is asked through it, by
// [Rollout.Enabled] or [Rollout.DecideContext], decides once and keeps to that answer. What lives longer than a request
// should not stay in one context: it would never see a rollback.
func NewContext(ctx context.Context, u Unit) context.Context { return newScope(ctx, u) }

func newScope(ctx context.Context, u Unit) *scope {
	s := &scope{Context: ctx, unit: u}
	s.inherit(scopeOf(ctx))
	return s
}

// inherit takes over what a test forced in the scope around, and the session that it is in.
func (s *scope) inherit(around *scope) {
	if around != nil {
		s.forced, s.session = around.forced, around.session
	}
}

// within makes s a part of the scope around, which may be nil: what was answered there for the same unit stands.
func (s *scope) within(around *scope) {
	s.inherit(around)
	if s.outer = around; around != nil && around.base != nil {
		s.outer = around.base
	}
}

// who is the unit, asked for at the first use.
func (s *scope) who() *Unit {
	s.once.Do(s.ask)
	return &s.unit
}

func (s *scope) ask() {
	if s.unitOf != nil {
		s.unit = s.unitOf(s.req)
	}
	s.hash = xxhash.Sum64String(s.unit.Key)
	known := uint32(isKnown)
	if s.unit.Key != "" && len(s.unit.Groups) == 0 && s.outer == nil {
		known |= isPlain
	}
	s.known.Store(known)
}

// decide is r's answer in this scope, given and counted once.
func (s *scope) decide(r *Rollout) Decision {
	if s.forced != nil {
		if d, ok := s.decideForced(r); ok {
			return d
		}
	}
	for i := range s.pins {
		at := s.pins[i].Load()
		if at == nil {
			now := r.snap.Load()
			if s.known.Load() == isKnown|isPlain && now.plain {
				if s.pins[i].CompareAndSwap(nil, now) {
					bucket := bucketOf(now.salt, s.hash)
					b := now.last.answer(bucket)
					now.last.count(b, bucket, now.slot)
					return Decision{now, b}
				}
			} else {
				u := s.who()
				again := false
				if s.outer != nil {
					now, again = s.present(r)
				}
				if s.pins[i].CompareAndSwap(nil, now) {
					if again {
						return now.decision(u, s.hash)
					}
					return now.counted(u, s.hash)
				}
			}
			at = s.pins[i].Load()
		}
		if at.r == r {
			if at.plain && s.known.Load() == isKnown|isPlain {
				return Decision{at, at.last.answer(bucketOf(at.salt, s.hash))}
			}
			return at.decision(&s.unit, s.hash)
		}
	}
	return s.decideMore(r, s.who())
}

// decideMore is decide for a request that asks more rollouts than most.
func (s *scope) decideMore(r *Rollout, u *Unit) Decision {
	s.more.Lock()
	for _, at := range s.more.pins {
		if at.r == r {
			s.more.Unlock()
			return at.decision(u, s.hash)
		}
	}
	at, again := s.present(r)
	s.more.pins = append(s.more.pins, at)
	s.more.Unlock()
	if again {
		return at.decision(u, s.hash)
	}
	return at.counted(u, s.hash)
}

// present is the snapshot that a first answer is given by, and whether it is that of an outer scope: no first one then,
// and counted before.
func (s *scope) present(r *Rollout) (at *snapshot, again bool) {
	for o := s.outer; o != nil; o = o.outer {
		if at := o.pinned(r); at != nil && o.unit.Key == s.unit.Key {
			return at, true
		}
	}
	return r.snap.Load(), false
}

// pinned is what r's answer was given by, or nil.
func (s *scope) pinned(r *Rollout) *snapshot {
	for i := range s.pins {
		at := s.pins[i].Load()
		if at == nil || at.r == r {
			return at
		}
	}
	s.more.Lock()
	defer s.more.Unlock()
	for _, at := range s.more.pins {
		if at.r == r {
			return at
		}
	}
	return nil
}

// record records obs on every decision given in the scope so far.
func (s *scope) record(obs ...Observation) {
	if s.base != nil {
		s.base.record(obs...)
		return
	}
	for in := s.session; in != nil; in = in.around {
		in.Decision().Record(obs...)
	}
	s.recordPins(obs...)
}

// recordPins records obs on every decision that was pinned in the scope.
func (s *scope) recordPins(obs ...Observation) {
	for i := range s.pins {
		at := s.pins[i].Load()
		if at == nil {
			return
		}
		at.decision(&s.unit, s.hash).Record(obs...)
	}
	s.more.Lock()
	more := s.more.pins
	s.more.Unlock()
	for _, at := range more {
		at.decision(&s.unit, s.hash).Record(obs...)
	}
}

// recordOwn is record but for what an outer scope had answered first, and records itself.
func (s *scope) recordOwn(obs ...Observation) {
	if s.outer == nil {
		if s.base != nil {
			s.base.record(obs...)
		} else {
			s.recordPins(obs...)
		}
		return
	}
	s.more.Lock()
	pins := s.more.pins
	s.more.Unlock()
	for i := range s.pins {
		if at := s.pins[i].Load(); at != nil {
			pins = append(pins[:len(pins):len(pins)], at)
		}
	}
	for _, at := range pins {
		if _, again := s.present(at.r); !again {
			at.decision(&s.unit, s.hash).Record(obs...)
		}
	}
}

// Record records obs on every rollout that was decided in ctx so far. Without a unit in ctx, by [Middleware],
// [NewContext] or a Do, it does nothing.
func Record(ctx context.Context, obs ...Observation) {
	if s := scopeOf(ctx); s != nil {
		s.record(obs...)
	}
}

// Decide answers for a unit, and counts the answer. It takes no lock, reads no clock and allocates nothing. A nil
// *Rollout decides stable.
func (r *Rollout) Decide(u Unit) Decision {
	if r == nil {
		return Decision{}
	}
	s := r.snap.Load()
	if s.plain && len(u.Groups) == 0 && u.Key != "" {
		bucket := bucketOf(s.salt, xxhash.Sum64String(u.Key))
		v := s.last
		b := v.answer(bucket)
		known := v.units.known(b.side(), bucket) // this is count, which is too large to be inlined
		v.slots.add(evidence.Shard(), b.side(), s.slot, decided, bucket)
		if !known {
			v.meet(b, bucket)
		}
		return Decision{s, b}
	}
	return s.ask(u)
}

// ask is the answer for a unit, counted.
func (s *snapshot) ask(u Unit) Decision {
	if s.never {
		return Decision{at: s, bits: s.fixed}
	}
	return s.counted(&u, xxhash.Sum64String(u.Key))
}

// Peek is [Rollout.Decide] without counting: for a look at the answer that nothing comes of.
func (r *Rollout) Peek(u Unit) Decision {
	if r == nil {
		return Decision{}
	}
	return r.snap.Load().uncounted().decision(&u, xxhash.Sum64String(u.Key))
}

// DecideContext is the answer for the unit in ctx: decided and counted at the first use, the same from then on, whatever
// becomes of the rollout meanwhile. Without a unit in ctx it is the answer for the zero [Unit].
func (r *Rollout) DecideContext(ctx context.Context) Decision {
	if r == nil {
		return Decision{}
	}
	if s := scopeOf(ctx); s != nil {
		return s.decide(r)
	}
	return r.Decide(Unit{})
}

// Enabled reports whether the unit in ctx gets the candidate: DecideContext(ctx).Enabled().
func (r *Rollout) Enabled(ctx context.Context) bool {
	if s, ok := ctx.(*scope); ok && r != nil {
		return s.decide(r).Enabled()
	}
	return r.DecideContext(ctx).Enabled()
}
