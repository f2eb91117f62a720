package rollout

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/stagedrollout/rollout/internal/machine"
)

// Revocation is what becomes of the sessions under way on the candidate when it is rolled back.
type Revocation uint8

// The ways to revoke sessions.
const (
	FinishTurn Revocation = iota // Revoked closes at once; after SessionPolicy.Grace the session's context is cancelled
	UntilEnd                     // they go on until they end: Revoked never closes
	AtOnce                       // Revoked closes and the session's context is cancelled, at once
)

var revocationNames = []string{"finish turn", "until end", "at once"}

func (v Revocation) String() string                { return nameIn(revocationNames, int(v)) }
func (v Revocation) MarshalText() ([]byte, error)  { return []byte(v.String()), nil }
func (v *Revocation) UnmarshalText(b []byte) error { return parseIn(revocationNames, b, (*uint8)(v)) }

// SessionPolicy is what becomes of running sessions when their candidate is rolled back, alone in their ring or
// altogether, or replaced: by another Version that began before it was completed, or by a Restart. No promotion touches a
// session, nor does a share that is lowered.
type SessionPolicy struct {
	// OnRollback says how they are revoked. Default: FinishTurn.
	OnRollback Revocation
	// Grace is how long a session may go on after Revoked has closed, before its context is cancelled with the cause
	// [ErrRolledBack]. Rollback steps wait for that. Default: 1 minute.
	Grace time.Duration
	// OnRevoke is called once for each session that is revoked and goes on, from goroutines of Run or of Drain, for all
	// sessions at once and no lock held: it may call anything. It can move a live instance to the stable configuration and
	// say so by [Session.Reconfigured], or end the session, or do nothing. Its context has the session's values and ends
	// once the Grace is over that began when the session was revoked, with AtOnce too; a panic is logged, and what does not
	// return by then is left behind. Default: none.
	OnRevoke func(context.Context, *Session)
}

// defaultGrace is SessionPolicy.Grace.
const defaultGrace = time.Minute

// Errors of sessions, and of effects that come too late.
var (
	// ErrRolledBack: the candidate is not served any more: it was rolled back, or another generation has begun. It is the
	// cause of the context of a session that was cut, and of what is refused for the same reason.
	ErrRolledBack = errors.New("rollout: the candidate was rolled back")
	// ErrDrained: a session was cut by [Rollout.Drain] at its deadline, and not because of a rollback.
	ErrDrained = errors.New("rollout: the session was drained")
	errPin     = errors.New("rollout: not a session's pin")
)

// Session is a unit's stay on one version for as long as a conversation, a job or an agent's run takes, whatever becomes of
// the rollout meanwhile; on a rollback it is told, see [SessionPolicy]. It counts one outcome, at its end. All methods may
// be called from any goroutine.
type Session struct {
	scope    scope // its context
	r        *Rollout
	began    Decision
	cancel   context.CancelCauseFunc
	leash    *leash // what revokes it; nil: nothing does
	id       uint64
	origin   string // of a pin that was adopted; "": of this rollout
	version  uint64 // of such a pin
	ended    atomic.Bool
	lost     atomic.Bool              // it was counted as failed: its process was taken for dead
	moved    atomic.Pointer[Decision] // Reconfigured
	adoptive bool                     // its unit is not known
	around   *Session                 // in whose context it began; may be nil

	// Guarded by the mu of the rollout's sessions.
	prev, next *Session
	told, cut  bool
}

// leash revokes the sessions on one candidate in one ring.
type leash struct {
	revoked chan struct{}
	at      atomic.Int64 // when, in nanoseconds of the Unix time; 0: it is not
}

// ends is when a grace is over that began when the sessions were revoked.
func (l *leash) ends(grace time.Duration) time.Time { return time.Unix(0, l.at.Load()).Add(grace) }

// over reports whether the sessions are revoked.
func (l *leash) over() bool { return l != nil && l.at.Load() != 0 }

// noForced makes a scope look whether its answers are a session's.
var noForced = []*snapshot{}

// Begin begins a session of unit u: the rollout decides for it, and keeps to that answer until the session ends. In the
// context returned, the rollout answers so, and whatever else is asked answers for u. Where ctx has an answer for the same
// unit, the session has that too, unless its candidate was rolled back since and no session around it goes on with that.
// End the session with [Session.End]; one that is never ended ends with its context, as soon as Run looks. A nil *Rollout
// begins a session on the stable version that counts nowhere.
//
// A session whose process dies counts as failed in the cohort it began in, if Run had seen it open at a tick and stored
// that, and once other processes on the same Store, or the next life of this one, have seen no sign of it for 36 ticks, and 3
// minutes at least. One that began since the last tick counts as nothing; so that a candidate which kills its process at
// once is seen nevertheless, one that begins while none is open on the candidate has Run make a tick now, at most once an
// Options.Interval. One that is open when Run ends counts as nothing.
func (r *Rollout) Begin(ctx context.Context, u Unit) (context.Context, *Session) {
	s := &Session{r: r}
	ctx, s.cancel = context.WithCancelCause(ctx)
	s.scope.Context, s.scope.unit = ctx, u
	s.scope.within(scopeOf(ctx))
	if r == nil {
		return &s.scope, s
	}
	if d, given := s.scope.decideForced(r); given && s.open(d, d.leash()) {
		return &s.scope, s
	}
	s.scope.who()
	for at, _ := s.scope.present(r); !at.begin(s); {
		at = r.snap.Load() // that candidate is not served any more
	}
	return &s.scope, s
}

// open puts the session into its context and among those of its rollout, unless its candidate is rolled back.
func (s *Session) open(d Decision, l *leash) (ok bool) {
	if s.began, s.leash = d, nil; d.Enabled() && s.r.policy.Sessions.OnRollback != UntilEnd {
		s.leash = l
	}
	around := s.scope.session
	s.around, s.scope.session = around, s
	if s.scope.forced == nil {
		s.scope.forced = noForced
	}
	news, ok := s.r.sessions.add(s, l)
	if !ok {
		s.around, s.scope.session = nil, around
		return false
	}
	if news {
		s.r.wakeUp() // that a session on the candidate kills its process must be seen
	}
	if s.leash.over() { // meanwhile
		s.r.sessions.wake()
	}
	return true
}

// begin opens a session with the snapshot's answer, if it can be. That is counted, but not among the decisions that an
// outcome is soon to come of.
func (s *snapshot) begin(in *Session) (ok bool) {
	v, b, bucket := s.decide(&in.scope.unit, in.scope.hash)
	d := Decision{s.uncounted(), b}
	if !in.open(d, d.leash()) {
		return false
	}
	switch {
	case b.cohort() != None && !v.closed:
		v.begun[b.side()].Add(1)
		if !v.units.known(b.side(), bucket) {
			v.meet(b, bucket)
		}
	case b.reason() == ReasonNoUnit:
		s.r.noUnit.Add(1)
	}
	return true
}

// leash is what revokes a session of the decision.
func (d Decision) leash() *leash {
	if d.at == nil || d.bits.ring() >= len(d.at.rings) {
		return nil
	}
	return d.at.rings[d.bits.ring()].leash
}

// Decision is the session's answer. It stays the same but for [Session.Reconfigured]. Record on it what is observed on the
// way, and keep its token for a score that comes later.
func (s *Session) Decision() Decision {
	if d := s.moved.Load(); d != nil {
		return *d
	}
	return s.began
}

// Revoked closes when the session's candidate is rolled back: finish the turn, then hand over or stop. It never closes for
// a session on the stable version, nor with [UntilEnd]. Look at it before each turn.
func (s *Session) Revoked() <-chan struct{} {
	if s.leash == nil {
		if s.r == nil {
			return nil
		}
		return s.r.sessions.never
	}
	return s.leash.revoked
}

// Pin is a text by which [Rollout.Adopt] takes the session up again, here or in another process. It is printable, has no
// spaces and no personal data, and is unlike that of any other session. It is the same for as long as the session lives,
// but for [Session.Reconfigured]: that makes it another one, which is of the stable version. It is not signed: take it
// from trusted places only.
func (s *Session) Pin() string {
	if s.r == nil {
		return ""
	}
	b := append([]byte("s2:"), s.origin...)
	if s.origin == "" {
		b = append(b, s.r.sessions.origin...)
	}
	version := s.version
	if s.origin == "" {
		version = versionHash(s.began.Version())
	}
	for _, n := range []uint64{s.id, version} {
		b = strconv.AppendUint(append(b, '.'), n, 36)
	}
	b, _ = s.Decision().AppendText(append(b, ':'))
	return string(b)
}

// versionHash names a version in pins.
func versionHash(version string) uint64 { return xxhash.Sum64String(version) }

// End ends the session and cancels its context. Its outcome is one observation of [Errors], and obs. Options.IsFailure says
// which errors are failures, as for a Do; neither [ErrRolledBack] is one, nor [context.Canceled] once Revoked has closed
// or where the caller cancelled. Ending a session again does nothing.
func (s *Session) End(err error, obs ...Observation) {
	if !s.ended.CompareAndSwap(false, true) {
		return
	}
	ctx := s.scope.Context
	if s.r != nil {
		failed := err != nil && !errors.Is(err, ErrRolledBack) && !errors.Is(err, ErrDrained) &&
			!(s.leash.over() && errors.Is(err, context.Canceled)) && !cancelled(ctx, err) && s.r.isFailure(err)
		s.r.sessions.remove(s)
		if !s.lost.Load() {
			d := s.Decision()
			d.Record(Errors.Observe(failed))
			d.Record(obs...)
		}
	}
	s.cancel(nil)
}

// Release ends the session here without an outcome and returns its pin: whoever adopts it goes on with it. It cancels the
// session's context.
func (s *Session) Release() (pin string) {
	pin = s.Pin()
	if s.ended.CompareAndSwap(false, true) {
		if s.r != nil {
			s.r.sessions.remove(s)
		}
		s.cancel(nil)
	}
	return pin
}

// Reconfigured says that the session goes on with the stable version from now on: the live instance was moved there, most
// likely by SessionPolicy.OnRevoke. Its Decision is off from then on, nothing revokes or cuts it, [Rollout.Drain] does not
// wait for it, and its outcome counts in neither cohort.
//
// Call it between two turns: a rollback does not wait for the one under way any more. A turn keeps the Decision it began
// with, for what it records and journals: that of the session journals nothing from then on.
func (s *Session) Reconfigured() {
	if s.r == nil || !s.began.Enabled() || s.ended.Load() {
		return
	}
	off := Decision{s.r.fixedSnapshot(nil, 0), pack(false, None, ReasonRolledBack, s.began.bits.ring(), 0)}
	off.at.gen, off.at.version, off.at.stage = s.began.Generation(), s.began.Version(), s.began.Stage()
	if s.moved.CompareAndSwap(nil, &off) {
		s.r.sessions.settle(s, nil)
	}
}

// Adopt takes up a session that another process, or an earlier life of this one, has begun and given a [Session.Pin] of.
// It goes on with the version it has. The unit is not in the pin: whatever else is asked in the context returned answers
// for the unit of ctx.
//
// A pin never outlives its version: Adopt returns [ErrRolledBack] for a session on a candidate that was rolled back, and
// [ErrVersion] where the rollout is about another version by now, another generation has begun, or this process has another
// version. Then Begin a new one. A session that was [Session.Reconfigured] stays on the stable version, if the pin was
// taken after that. A process should adopt what was released, or what died: a session that two processes have ends twice.
func (r *Rollout) Adopt(ctx context.Context, pin string) (context.Context, *Session, error) {
	if r == nil {
		return ctx, nil, errNil
	}
	p, err := parsePin(pin)
	if err != nil {
		return ctx, nil, err
	}
	d, err := r.ParseDecision(p.token)
	if err != nil {
		return ctx, nil, fmt.Errorf("%w: %w", errPin, err)
	}
	l, err := r.pinned(d, p.version)
	if err != nil {
		if ready := r.Ready(ctx); ready != nil {
			return ctx, nil, ready
		}
		if l, err = r.pinned(d, p.version); err != nil {
			return ctx, nil, err
		}
		d, _ = r.ParseDecision(p.token) // as part of what is loaded now
	}
	s := &Session{r: r, id: p.id, origin: p.origin, version: p.version, adoptive: true}
	around := scopeOf(ctx)
	s.scope.Context, s.cancel = context.WithCancelCause(ctx)
	s.scope.within(around)
	if around != nil {
		s.scope.unit = *around.who()
	}
	if !s.open(d, l) {
		s.cancel(nil)
		return ctx, nil, ErrRolledBack
	}
	return &s.scope, s, nil
}

// pinParts are what a pin says: who named the session, by which number, and on which version it was with which decision.
type pinParts struct {
	origin      string
	id, version uint64
	token       []byte
}

func parsePin(text string) (p pinParts, err error) {
	head, token, ok := strings.Cut(text, ":d1:")
	name, isPin := strings.CutPrefix(head, "s2:")
	fields := strings.Split(name, ".")
	if !ok || !isPin || len(fields) != 3 || fields[0] == "" || len(fields[0]) > 64 {
		return p, fmt.Errorf("%w: %.120q", errPin, text)
	}
	p.origin, p.token = fields[0], []byte("d1:"+token)
	for i, n := range []*uint64{&p.id, &p.version} {
		if *n, err = strconv.ParseUint(fields[i+1], 36, 64); err != nil {
			return p, fmt.Errorf("%w: %.120q: %w", errPin, text, err)
		}
	}
	return p, nil
}

// pinned is what revokes a session of a pin's decision, or why it cannot be taken up.
func (r *Rollout) pinned(d Decision, version uint64) (*leash, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	st, gen := r.known, d.Generation()
	switch {
	case gen == 0:
		return nil, nil // it began before anything was known, on the stable version
	case d.Enabled() && (r.latch[gen] || r.latchAny):
		return nil, ErrRolledBack
	case st == nil || st.Gen != gen:
		return nil, fmt.Errorf("%w: the pin is of generation %d", ErrVersion, gen)
	case version != versionHash(st.Version): // of the same generation: it was completed
		return nil, fmt.Errorf("%w: the pin is not of %q", ErrVersion, st.Version)
	case !d.Enabled():
		return nil, nil
	case st.Version != r.plan.Version || r.standing == machine.Passive:
		return nil, fmt.Errorf("%w: the pin is of %q", ErrVersion, st.Version)
	}
	l := r.leashLocked(gen, d.Ring())
	if l.over() || ringGone(st, d.Ring()) {
		return nil, ErrRolledBack
	}
	return l, nil
}

// answerIn is the answer of the session, or of one around it, for r in a scope inside, if it is for the scope's unit.
func (s *Session) answerIn(in *scope, r *Rollout) (d Decision, ok bool) {
	for ; s != nil; s = s.around {
		if s.r == r && (in == &s.scope || s.adoptive || in.who().Key == s.scope.unit.Key) {
			return s.Decision(), true
		}
	}
	return Decision{}, false
}
