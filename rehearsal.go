package rollout

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/virtual"
)

// Package simulate runs rollouts in virtual time through this.
func init() {
	virtual.New = func(name string, policy any, s virtual.Setup) (virtual.Process, error) {
		return newRehearsal(name, policy.(Policy), s)
	}
}

// rehearsal is Run in virtual time: the same tick, cells, gates and state, but no goroutine, and nothing that
// reaches anybody outside. It must not undo what is real, so the policy's rollback steps are left out.
type rehearsal struct {
	r   *Rollout
	now time.Time
}

func newRehearsal(name string, p Policy, s virtual.Setup) (*rehearsal, error) {
	o := &Options{Replica: "rehearsal", Interval: s.Interval, Logger: slog.New(slog.DiscardHandler)}
	o.Sources, _ = s.Sources.(map[string]Source)
	if _, err := New(name, p, o); err != nil { // also for what is left out below
		return nil, err
	}
	p.Rollback, p.Undo = nil, nil
	if !s.MayAdvance {
		p.MayAdvance = nil
	}
	r, err := New(name, p, o)
	if err != nil {
		return nil, err
	}
	v := &rehearsal{r: r}
	r.now = func() time.Time { return v.now }
	r.dither, r.virtual = s.Dither, true
	r.running.Store(true)             // nobody else's
	r.subscribers = []*subscriber{{}} // so that events are queued
	return v, nil
}

func (v *rehearsal) Rollout() any            { return v.r }
func (v *rehearsal) Interval() time.Duration { return v.r.o.Interval }
func (v *rehearsal) Start(now time.Time) {
	v.now = now
	v.r.startClock()
}

func (v *rehearsal) At(now time.Time) { v.now = now }

func (v *rehearsal) Tick(ctx context.Context, last bool) error {
	for _, g := range v.r.gates {
		if g.kind == judge.Check {
			if err := v.ask(ctx, g); err != nil {
				return err
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(v.r.o.Sources)) {
		if err := v.read(ctx, name); err != nil {
			return err
		}
	}
	alarm := v.r.clock.alarm
	v.Woken() // this is the tick
	v.r.clock.alarm = alarm
	defer func() { v.r.clock.alarm = false }()
	if last {
		v.r.finish(ctx)
	} else {
		v.r.tick(ctx, &v.r.clock, false)
	}
	v.r.mu.Lock()
	defer v.r.mu.Unlock()
	return v.r.storeErr
}

// ask asks a Check. One that hangs ends the rehearsal: how often it would be asked again depends on real time.
func (v *rehearsal) ask(ctx context.Context, g Gate) error {
	asked, cancel := context.WithTimeout(ctx, v.r.checkTimeout()+stepGrace)
	defer cancel()
	res := v.r.askCheck(asked, g)
	if asked.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("the Check %q gave %s", g.name, res.Cause)
	}
	res.Cause, _, _ = strings.Cut(res.Cause, "\n") // a panic's stack is not the same each time
	v.r.setCheck(g.name, res)
	return nil
}

// read reads a Source. One that hangs ends the rehearsal, too.
func (v *rehearsal) read(ctx context.Context, metric string) error {
	asked, cancel := context.WithTimeout(ctx, v.r.checkTimeout()+stepGrace)
	defer cancel()
	v.r.readSource(asked, metric)
	if asked.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("the Source of %q gave no answer within %v", metric, v.r.checkTimeout())
	}
	return nil
}

func (v *rehearsal) Woken() bool {
	select {
	case <-v.r.wake:
		v.r.clock.alarm = v.r.alarm.Swap(false)
		return true
	default:
		return false
	}
}

func (v *rehearsal) Events() any {
	v.r.mu.Lock()
	defer v.r.mu.Unlock()
	events := v.r.queue
	v.r.queue = nil
	return events
}

func (v *rehearsal) Force(key string, groups []string, cohort uint8, decision any) {
	s := v.r.snap.Load()
	u, c, ring := Unit{Key: key, Groups: groups}, Cohort(cohort), s.last
	if s.asks || len(groups) > 0 {
		ring = s.ringOf(&u)
	}
	enabled := c == Candidate
	if ring.closed || ring.all && c == Control {
		c = None
	}
	b := pack(enabled, c, ReasonForced, int(ring.index), bucketOf(s.salt, xxhash.Sum64String(key)))
	if c != None { // whoever chose the cohort, it was not the share: the unit is not counted as one that came
		ring.slots.add(0, b.side(), s.slot, decided, b.group())
	}
	*decision.(*Decision) = Decision{s, b}
}
