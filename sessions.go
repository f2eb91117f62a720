package rollout

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/machine"
)

// sessions are the sessions of one rollout in this process that have not ended.
type sessions struct {
	origin string        // names this life of this rollout in pins
	never  chan struct{} // what Revoked returns where nothing revokes a session
	look   chan struct{} // asks Run for a look at them now

	mu      sync.Mutex // guards what follows
	first   *Session
	count   int
	next    uint64 // the last id
	begun   uint64 // the newest generation that a candidate's session began in
	asked   bool   // Run was asked for a tick because of one that began, in this interval
	waiting int    // on the candidate, neither cut nor reconfigured: what Drain waits for
	drains  []*drain
	idle    chan struct{} // closed once waiting is 0; nil while nobody wants to know
}

// drain is a Drain under way.
type drain struct {
	cut  []string
	wake chan struct{} // sessions were revoked
}

// add takes a session, and reports whether Run has to see it now: on the candidate, of which none was open, or none in its
// generation. It takes none on a candidate that is rolled
// back: the rollback steps, which look once the leash is over, may have seen all of them end. But a session that goes on
// with the candidate, and holds the steps up, may have others in it.
func (ss *sessions) add(s *Session, l *leash) (news, ok bool) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if s.began.Enabled() && l.over() && !s.around.goesOn(s.r) {
		return false, false
	}
	if s.next = ss.first; s.next != nil {
		s.next.prev = s
	}
	ss.first = s
	ss.count++
	if s.origin == "" {
		ss.next++
		s.id = ss.next
	}
	if s.began.Enabled() {
		gen := s.began.Generation()
		if news = gen > ss.begun || ss.waiting == 0 && !ss.asked; news {
			ss.begun, ss.asked = max(ss.begun, gen), true
		}
		ss.waiting++
	}
	return news, true
}

// calm lets a session that begins ask Run for a tick again: once an interval, or hosts with one short session after another
// would have it write to the Store all the time.
func (ss *sessions) calm() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.asked = false
}

// goesOn reports whether the session, or one around it, goes on with r's candidate. It holds the mu of r's sessions.
func (s *Session) goesOn(r *Rollout) bool {
	for ; s != nil; s = s.around {
		if s.r == r && s.began.Enabled() && !s.cut {
			return true
		}
	}
	return false
}

// remove drops a session that has ended.
func (ss *sessions) remove(s *Session) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		ss.first = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	}
	s.prev, s.next = nil, nil // whoever keeps it keeps no other
	ss.count--
	ss.settleLocked(s)
}

// settle notes that Drain has not to wait for a session any more; pin, if not nil, makes what it was cut by known.
func (ss *sessions) settle(s *Session, pin func() string) (done bool) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if s.cut || !s.began.Enabled() {
		return false
	}
	if pin != nil && len(ss.drains) > 0 {
		text := pin()
		for _, d := range ss.drains {
			d.cut = append(d.cut, text)
		}
	}
	ss.settleLocked(s)
	return true
}

func (ss *sessions) settleLocked(s *Session) {
	if s.cut || !s.began.Enabled() {
		return
	}
	s.cut = true
	if ss.waiting--; ss.waiting == 0 && ss.idle != nil {
		close(ss.idle)
		ss.idle = nil
	}
}

// all are the sessions there are.
func (ss *sessions) all() []*Session {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.first == nil {
		return nil
	}
	all := make([]*Session, 0, ss.count)
	for s := ss.first; s != nil; s = s.next {
		all = append(all, s)
	}
	return all
}

// whenIdle is closed once no session is waited for; nil if that is so now.
func (ss *sessions) whenIdle() <-chan struct{} {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.waiting == 0 {
		return nil
	}
	if ss.idle == nil {
		ss.idle = make(chan struct{})
	}
	return ss.idle
}

// open is the work under way in a generation, as it is stored.
func (ss *sessions) open(gen uint64) []machine.Open {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var open []machine.Open
	for s := ss.first; s != nil; s = s.next {
		d := s.began
		if s.lost.Load() || s.moved.Load() != nil || d.Generation() != gen || d.Cohort() == None || d.Reason() == ReasonForced {
			continue
		}
		i := slices.IndexFunc(open, func(o machine.Open) bool { return o.Ring == d.Ring() })
		if i < 0 {
			i, open = len(open), append(open, machine.Open{Ring: d.Ring(), Gen: gen})
		}
		by := &open[i].Control
		if d.Cohort() == Candidate {
			by = &open[i].Candidate
		}
		if *by == nil {
			*by = make([]uint64, evidence.Groups)
		}
		(*by)[d.bits.group()]++
	}
	slices.SortFunc(open, func(a, b machine.Open) int {
		if a.Ring < b.Ring {
			return -1
		}
		return 1
	})
	return open
}

// status counts the sessions.
func (ss *sessions) status() (n SessionStatus) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for s := ss.first; s != nil; s = s.next {
		switch {
		case !s.Decision().Enabled():
			n.Control++
		default:
			n.Candidate++
			if s.leash.over() {
				n.Revoked++
			}
		}
	}
	return n
}

// forsake marks the sessions there are as counted: this process was taken for dead.
func (ss *sessions) forsake() {
	for _, s := range ss.all() {
		s.lost.Store(true)
	}
}

// leashKey names a candidate in a ring.
type leashKey struct {
	gen  uint64
	ring string
}

// leashLocked is what revokes the sessions on a candidate in a ring.
func (r *Rollout) leashLocked(gen uint64, ring string) *leash {
	key := leashKey{gen, ring}
	l := r.leashes[key]
	if l == nil {
		l = &leash{revoked: make(chan struct{})}
		r.leashes[key] = l
	}
	return l
}

// ringGone reports whether a ring is rolled back alone.
func ringGone(st *machine.State, ring string) bool { return slices.Contains(st.Rings, ring) }

// revokeLocked revokes the sessions whose candidate is not served any more. A rollback is one only once it is stored, or
// cannot be: exposure to zero, then the intent, then this.
func (r *Rollout) revokeLocked() {
	st := r.known
	if st != nil && st.Phase.Latched() {
		r.revoked[st.Gen] = true
	}
	for key, l := range r.leashes {
		gone := r.revoked[key.gen]
		if st != nil {
			gone = gone || key.gen == st.Gen && ringGone(st, key.ring) || key.gen < st.Gen && !r.servesLocked(key.gen)
		}
		if !gone || l.over() {
			if gone && st != nil && key.gen < st.Gen {
				delete(r.leashes, key) // nobody begins one there any more
			}
			continue
		}
		l.at.Store(r.now().UnixNano())
		close(l.revoked)
		signal(r.wake)
		r.sessions.wake()
	}
}

// wake lets Run and every Drain look at the sessions now.
func (ss *sessions) wake() {
	signal(ss.look)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, d := range ss.drains {
		signal(d.wake)
	}
}

// servesLocked reports whether this process serves the candidate of an earlier generation, which was completed.
func (r *Rollout) servesLocked(gen uint64) bool {
	for _, e := range r.known.Versions {
		if e.Version == r.plan.Version && e.Gen == gen {
			return e.Completed
		}
	}
	return false
}

// revokeHere revokes the sessions of a rollback that could not be stored.
func (r *Rollout) revokeHere(gen uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if gen == 0 && r.known != nil {
		gen = r.known.Gen
	}
	r.revoked[gen] = true
	r.revokeLocked()
}

// tend sees to sessions: it ends those whose context has ended, has the host told of those that are revoked, and cuts those
// whose grace is over. It returns when to look again, 0 if nothing is due.
func (r *Rollout) tend(tell func([]*Session)) (next time.Duration) {
	all := r.sessions.all()
	if len(all) == 0 {
		return 0
	}
	now := r.now()
	soonest := time.Duration(math.MaxInt64)
	var news []*Session
	for _, s := range all {
		if ctx := s.scope.Context; ctx.Err() != nil {
			s.End(context.Cause(ctx))
			continue
		}
		if !s.leash.over() || s.moved.Load() != nil {
			continue
		}
		left := s.leash.ends(r.policy.Sessions.grace()).Sub(now)
		if (left > 0 || r.policy.Sessions.OnRollback == AtOnce) && r.policy.Sessions.OnRevoke != nil && r.sessions.tell(s) {
			news = append(news, s)
		}
		if left > 0 {
			soonest = min(soonest, left)
			continue
		}
		s.stop(ErrRolledBack)
	}
	if len(news) > 0 {
		tell(news)
	}
	if soonest == math.MaxInt64 {
		return 0
	}
	return soonest
}

// tendAll tends the sessions until ctx ends: beside the ticks, which may have to wait for the Store.
func (r *Rollout) tendAll(ctx context.Context, work *sync.WaitGroup) {
	ticker := time.NewTicker(r.o.Interval)
	defer ticker.Stop()
	for ctx.Err() == nil {
		var due <-chan time.Time
		if next := r.tend(func(news []*Session) { r.tellHost(ctx, work, news) }); next > 0 {
			due = time.After(next)
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
			r.sessions.calm()
		case <-due:
		case <-r.sessions.look:
		}
	}
}

// grace is how long a session may go on once it is revoked.
func (p SessionPolicy) grace() time.Duration {
	if p.OnRollback == AtOnce {
		return 0
	}
	return p.Grace
}

// stop cuts a session.
func (s *Session) stop(cause error) {
	if s.r.sessions.settle(s, s.Pin) {
		s.cancel(cause)
	}
}

// tell reports whether the host has to be told of a session, once.
func (ss *sessions) tell(s *Session) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	told := s.told
	s.told = true
	return !told && !s.cut
}

// tellHost calls OnRevoke for each session, in goroutines of work: for all at once, so that none waits for another.
func (r *Rollout) tellHost(ctx context.Context, work *sync.WaitGroup, ss []*Session) {
	for _, s := range ss {
		work.Go(func() { r.tellOne(ctx, s) })
	}
}

// tellOne calls OnRevoke for a session that goes on, and waits for it until the grace is over.
func (r *Rollout) tellOne(ctx context.Context, s *Session) {
	left := s.leash.ends(r.policy.Sessions.Grace).Sub(r.now())
	if ctx.Err() != nil || left <= 0 || s.ended.Load() || s.moved.Load() != nil {
		return // meanwhile
	}
	asked, cancel := context.WithTimeout(context.WithoutCancel(&s.scope), left)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	if err := labelled(asked, randomText(), 0, func(ctx context.Context) error {
		r.policy.Sessions.OnRevoke(ctx, s)
		return nil
	}); err != nil {
		r.logger().Error("rollout: OnRevoke failed; the session is cut when its grace is over", "rollout", r.name, "session", s.Pin(), "err", err)
		r.logStack("OnRevoke", err, "session", s.Pin())
	}
}

// awaitSessions waits until no session on a candidate that is rolled back goes on: each has ended, was reconfigured or
// cut. It reports whether ctx lasted.
func (r *Rollout) awaitSessions(ctx context.Context) bool {
	for {
		waiting := false
		for _, s := range r.sessions.all() {
			waiting = waiting || s.leash.over() && !r.sessions.settled(s)
		}
		if !waiting {
			return ctx.Err() == nil
		}
		if !sleep(ctx, min(r.policy.Sessions.Grace/16+time.Millisecond, time.Second)) {
			return false
		}
	}
}

func (ss *sessions) settled(s *Session) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return s.cut
}

// Drain returns when every session on the candidate in this process has ended, was reconfigured or was cut: by the grace
// of a rollback, or at the end of ctx, when it cuts all that are left itself. cut are the pins of those; err is that of
// ctx if it ended first. Sessions that begin meanwhile are waited for as well, so before a process ends see first that no
// more come. It needs no Run, and may be called from anywhere, also from a rollback step. What it had
// SessionPolicy.OnRevoke called for has returned by then, or was left behind.
func (r *Rollout) Drain(ctx context.Context) (cut []string, err error) {
	if r == nil {
		return nil, errNil
	}
	d := &drain{wake: make(chan struct{}, 1)}
	ss := &r.sessions
	ss.mu.Lock()
	ss.drains = append(ss.drains, d)
	ss.mu.Unlock()
	defer func() {
		ss.mu.Lock()
		defer ss.mu.Unlock()
		ss.drains = slices.DeleteFunc(slices.Clone(ss.drains), func(other *drain) bool { return other == d })
		cut = d.cut
	}()
	var telling sync.WaitGroup
	defer telling.Wait()
	for {
		next := r.tend(func(news []*Session) { r.tellHost(ctx, &telling, news) })
		idle := ss.whenIdle()
		if idle == nil {
			return nil, nil
		}
		if ctx.Err() != nil {
			for _, s := range ss.all() {
				if s.leash.over() {
					s.stop(ErrRolledBack)
				} else {
					s.stop(ErrDrained)
				}
			}
			return nil, ctx.Err()
		}
		if next == 0 || next > r.o.Interval {
			next = r.o.Interval // a session may be revoked meanwhile, or its context end
		}
		t := time.NewTimer(next)
		select {
		case <-idle:
		case <-d.wake:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}
