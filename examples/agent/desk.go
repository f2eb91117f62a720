package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stagedrollout/rollout"
)

const (
	visitors  = 12                     // at a time
	unhurried = 150 * time.Millisecond // for a turn with a customer who talks for long
	hurried   = 10 * time.Millisecond  // for one with a visitor
)

// desk is where customers talk to the agents. A conversation is a session of the rollout.
type desk struct {
	r         *rollout.Rollout
	shop      *shop
	candidate model
	reviews   chan []byte // tokens of conversations to be judged

	closing      chan struct{} // nobody asks any more
	once         sync.Once
	live, others sync.WaitGroup
	waiting      atomic.Int64 // for a replacement, of those who talk for long
	served       chan struct{}

	finished, handed, moved, anew atomic.Int64 // see check
	cut, wrong                    atomic.Int64
}

func newDesk(r *rollout.Rollout, s *shop, m model) *desk {
	d := &desk{
		r: r, shop: s, candidate: m,
		reviews: make(chan []byte, 100), closing: make(chan struct{}), served: make(chan struct{}),
	}
	d.waiting.Store(4)
	return d
}

// close sends everybody home and waits until they are gone.
func (d *desk) close() {
	d.once.Do(func() { close(d.closing) })
	d.live.Wait()
	d.others.Wait()
}

// ofCandidate finds customers that the rollout gives the new version.
func (d *desk) ofCandidate(n int) (customers []string) {
	for i := 1; len(customers) < n; i++ {
		if c := fmt.Sprint("customer ", i); d.r.Peek(rollout.Unit{Key: c}).Enabled() {
			customers = append(customers, c)
		}
	}
	return customers
}

// patient and angry are what somebody who talks for long says in a turn.
func patient(turn int) string {
	switch turn {
	case 0:
		return parcel
	case 1:
		return broken
	}
	return chat
}

func angry(turn int) string {
	if turn%2 == 0 {
		return money
	}
	return chat
}

// chat is a conversation with a customer who waits at the other end. Before each turn it looks whether its version is
// still wanted. If not, the old version takes over in a new session; two turns later the customer is content.
func (d *desk) chat(ctx context.Context, customer string, says func(turn int) string) {
	sctx, s := d.r.Begin(ctx, rollout.Unit{Key: customer})
	left := -1 // turns, once it was handed over
	for turn := 0; left != 0 && d.open(sctx); turn++ {
		err := d.turn(sctx, s, customer, says(turn), unhurried)
		if turn == 1 {
			d.hasReplacement()
		}
		if revoked(s) {
			if err == nil && sctx.Err() == nil {
				d.finished.Add(1)
			}
			s.End(rollout.ErrRolledBack)
			sctx, s = d.r.Begin(ctx, rollout.Unit{Key: customer})
			d.handed.Add(1)
			d.stable(s)
			left = 2
			if err != nil {
				turn-- // the old version answers it
			}
		} else {
			left = max(left-1, -1)
		}
	}
	s.End(nil)
}

// phone is a conversation that cannot be handed over: the caller would notice. onRevoke moves it to the old version.
func (d *desk) phone(ctx context.Context, customer string) {
	c := &call{line: make(chan struct{}, 1), moved: make(chan struct{})}
	sctx, s := d.r.Begin(context.WithValue(ctx, callKey{}, c), rollout.Unit{Key: customer})
	left := -1
	for turn := 0; left != 0 && d.open(sctx); turn++ {
		if left < 0 && revoked(s) { // no turn begins on the new version
			select {
			case <-c.moved:
				d.moved.Add(1)
				d.stable(s)
				left = 2
			case <-sctx.Done():
				d.cut.Add(1)
				continue
			}
		}
		c.line <- struct{}{}
		_ = d.turn(sctx, s, customer, patient(turn), unhurried)
		<-c.line
		if turn == 1 {
			d.hasReplacement()
		}
		left = max(left-1, -1)
	}
	s.End(nil)
}

// call is what onRevoke needs of a phone call.
type call struct {
	line  chan struct{} // whoever holds it speaks
	moved chan struct{} // closed by onRevoke
}

type callKey struct{}

// onRevoke is told of each session whose version was rolled back. Chats look after that themselves; a phone call goes on
// with the old version as soon as the turn under way is over.
func onRevoke(ctx context.Context, s *rollout.Session) {
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok {
		return
	}
	select {
	case c.line <- struct{}{}:
		s.Reconfigured()
		close(c.moved)
		<-c.line
	case <-ctx.Done():
	}
}

// web is a conversation over a web page: each turn is a request of its own, and what connects them is the session's pin
// in a cookie. It takes so many turns; zero: until the old version has answered two, after a rollback.
func (d *desk) web(ctx context.Context, customer string, turns int) {
	think, says, left := hurried, visitor(customer), turns
	if turns == 0 {
		think, says, left = unhurried, patient, -1
	}
	cookie := ""
	for turn := 0; left != 0 && d.open(ctx); turn++ {
		sctx, s, again := d.resume(ctx, customer, cookie)
		if again {
			d.anew.Add(1)
			d.stable(s)
			if turns == 0 {
				left = 2
			}
		}
		err := d.turn(sctx, s, customer, says(turn), think)
		if turns == 0 && turn == 1 {
			d.hasReplacement()
		}
		if errors.Is(err, rollout.ErrRolledBack) {
			turn-- // it is asked again, and the old version answers it
		} else {
			left = max(left-1, -1)
		}
		if left != 0 {
			cookie = s.Release() // the conversation goes on with the next request, here or in another process
		} else {
			if token, err := s.Decision().MarshalText(); err == nil {
				d.judge(token)
			}
			s.End(nil)
		}
		d.sleep(ctx, think/2) // the customer reads
	}
}

// resume takes a conversation up where the request before has left it, or begins one. again: it had to begin anew,
// because its version was rolled back.
func (d *desk) resume(ctx context.Context, customer, cookie string) (_ context.Context, s *rollout.Session, again bool) {
	u := rollout.Unit{Key: customer}
	if cookie != "" {
		sctx, s, err := d.r.Adopt(rollout.NewContext(ctx, u), cookie)
		if err == nil {
			return sctx, s, false
		}
		again = errors.Is(err, rollout.ErrRolledBack)
	}
	ctx, s = d.r.Begin(ctx, u)
	return ctx, s, again
}

// turn answers a customer. What is observed of it counts for the version that the session had when the turn began, and
// so do its effects, also if the session is moved meanwhile.
func (d *desk) turn(ctx context.Context, s *rollout.Session, customer, question string, think time.Duration) error {
	decision, m := s.Decision(), v1
	if decision.Enabled() {
		m = d.candidate
	}
	tool := m.choose(question)
	if tool != "" {
		why := fmt.Sprintf("%s: %q: %s", customer, question, tool)
		violation := unpermitted.Observe(tool == toRefund) // none is paid: that it tried is bad enough
		if tool == toRefund {
			violation = violation.Because(why + ", and no supervisor was asked")
		}
		decision.Record(tools.Observe(tool).Because(why), violation)
	}
	if !d.sleep(ctx, think) {
		return context.Cause(ctx)
	}
	if tool == toReplace {
		return d.shop.replace(ctx, decision, m.version)
	}
	return nil
}

// visitors come one after the other, each for three questions.
func (d *desk) visitors(ctx context.Context, first int) {
	for n := first; d.open(ctx); n += visitors {
		d.web(ctx, fmt.Sprint("visitor ", n), 3)
	}
}

// visitor is what a visitor says: it follows from the name.
func visitor(name string) func(turn int) string {
	return func(turn int) string {
		switch dice := rollout.Bucket("questions", fmt.Sprint(name, turn)) % 10; {
		case dice < 5:
			return parcel
		case dice < 7:
			return broken
		}
		return giving
	}
}

// judge queues a conversation for the reviewer, who does not see all of them.
func (d *desk) judge(token []byte) {
	select {
	case d.reviews <- token:
	default:
	}
}

// review judges conversations that are over. All that the reviewer has of one is the token of its decision; the answers
// of all versions read equally well.
func (d *desk) review(ctx context.Context) {
	for n := 0; ; n++ {
		select {
		case token := <-d.reviews:
			if decision, err := d.r.ParseDecision(token); err == nil {
				decision.Record(quality.Observe(float64(7 + n%3)))
			}
		case <-d.closing:
			return
		}
		d.sleep(ctx, hurried)
	}
}

// open reports whether the desk is.
func (d *desk) open(ctx context.Context) bool {
	select {
	case <-d.closing:
		return false
	case <-ctx.Done():
		return false
	default:
		return true
	}
}

// sleep waits and reports whether ctx lasted.
func (d *desk) sleep(ctx context.Context, t time.Duration) bool {
	select {
	case <-time.After(t):
		return true
	case <-ctx.Done():
		return false
	}
}

// revoked reports whether a session's version was rolled back.
func revoked(s *rollout.Session) bool {
	select {
	case <-s.Revoked():
		return true
	default:
		return false
	}
}

// hasReplacement notes that a customer who talks for long was sent a replacement.
func (d *desk) hasReplacement() {
	if d.waiting.Add(-1) == 0 {
		close(d.served)
	}
}

// stable notes a session that should be on the old version by now and is not.
func (d *desk) stable(s *rollout.Session) {
	if s.Decision().Enabled() {
		d.wrong.Add(1)
	}
}
