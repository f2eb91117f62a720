// Package simulate rehearses a rollout: it takes a policy through virtual time, with made-up traffic ([Run]) or with
// outcomes that were recorded ([Replay]), and tells how it would have gone.
//
//	report, err := simulate.Run(ctx, "checkout-v2", policy, simulate.Traffic{
//		PerSecond: 200,
//		Units:     10_000,
//		Rings:     map[string]rollout.Percent{"staff": 2},
//		Models: []simulate.Model{
//			simulate.Rate(rollout.Errors, simulate.Always(1), simulate.Always(1).After(20*time.Minute, simulate.Always(4))),
//		},
//	}, nil)
//	fmt.Print(report)
//
// prints a timeline such as
//
//	checkout-v2: rolled back after 20m30s
//	         0s  started
//	         0s  stage entered: staff 100 %
//	      10m5s  stage entered: everyone 5 %
//	     20m10s  stage entered: everyone 25 %
//	     20m30s  rollback began: errors.Within(1): the candidate's rate is 1.45 % (165 of 11408), ...
//	     20m30s  rollback done
//	  incident   candidate 165 of 11408 (1.45 %), control 1155 of 115687 (1.00 %)
//	  exposed    11482 of 246584 requests, 1296 units
//	  gate       errors.Within(1)  unhealthy     candidate 165 of 11408 (1.45 %), control 1155 of 115687 (1.00 %)
//
// What decides is not a model of the library but the library: the same Decide, Record, ticks, gates and state as in
// [rollout.Rollout.Run], in one process, with a Store in memory and a clock that stands still between ticks. An hour takes a
// second or so. The same seed, policy and traffic give the same report, as long as Checks, Sources, MayAdvance and an Operator
// answer the same.
//
// # What a rehearsal leaves out
//
// It must not undo or tell anything real. Rollback steps are never run: a rollback is over when everybody has the stable
// version. MayAdvance is asked only if [Options] say so. There are no subscribers, no log and no OpenTelemetry. A Check is
// asked, once a tick: put one that answers by itself into the policy if the real one looks at production. Metrics that are
// measured elsewhere have no outcomes unless [Options] have Sources.
//
// # How a report is to be read
//
// One run is one draw of chance. How often a policy rolls a good candidate back, or how long it takes in the median, is a
// question to many seeds. Made-up traffic is as good as its models; a replay shows what the gates say of what was
// recorded, but the past does not listen to the policy: a recorded cohort stays what it was, whatever share is in force.
package simulate

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/internal/virtual"
)

// Options are how a rehearsal is made. The zero value of each field is its default.
type Options struct {
	// Seed is what all chances come from: another seed, another draw.
	Seed uint64
	// Interval is the time between two ticks. Default: that of a Rollout, 5 s.
	Interval time.Duration
	// Horizon is the virtual time after which it ends, however the rollout stands. Default: 24 h.
	Horizon time.Duration
	// Start is the time at which it begins. Default: Monday, 1 January 2001 UTC; of a Replay the time of the first outcome.
	Start time.Time
	// MayAdvance has the policy's MayAdvance asked, with virtual times. Otherwise it always may.
	MayAdvance bool
	// Sources measure metrics elsewhere, as those of rollout.Options do. Each is read once a tick, while virtual time stands
	// still: one that a model feeds needs no lock. What the traffic observes of such a metric is not judged.
	Sources map[string]rollout.Source
	// Operator is called after each tick and may use every verb of the rollout, such as Approve: without it nobody
	// approves or resumes anything. What it does takes effect at once. It must not keep r. An error ends the rehearsal.
	Operator func(ctx context.Context, at time.Duration, r *rollout.Rollout) error
}

var defaultStart = time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC)

const defaultHorizon = 24 * time.Hour

// Run rehearses a policy under made-up traffic until it is Completed or rolled back, or until the horizon. A rollout that
// is held goes on being judged. name is the rollout's: it decides which units come first, unless the policy has a Salt. o
// may be nil. The error names every field that is wrong, or is that of ctx, of an Operator, or of a Check or a Source
// that does not return. Runs may be made at the same time if what the policy and the traffic call allows it.
func Run(ctx context.Context, name string, p rollout.Policy, t Traffic, o *Options) (Report, error) {
	e, err := newEngine(name, p, o, t.problems())
	if err != nil {
		return Report{}, err
	}
	salt := p.Salt
	if salt == "" {
		salt = name
	}
	people := newPopulation(&t, salt, rand.New(rand.NewPCG(e.o.Seed, 1)))
	e.begin(e.o.Start)
	if err := e.requests(ctx, &t, people); err != nil {
		return Report{}, err
	}
	return e.finish(ctx)
}

// Recorded is one outcome from a record of the past.
type Recorded struct {
	// Time is when it came, not zero. Each is at or after the one before.
	Time time.Time
	// Unit is who it is of. One with an empty Key is a unit of its own each time.
	Unit rollout.Unit
	// Cohort is what the unit got then: it counts for the candidate or for the control where the policy compares the unit's
	// ring at that time, and is skipped otherwise. None: it was the same for all, and the policy assigns the unit.
	Cohort rollout.Cohort
	// Observations are what was seen. None: a decision of which no outcome is known.
	Observations []rollout.Observation
}

// Replay rehearses a policy with recorded outcomes in the order of their times. It ends like [Run], or a tick after the
// last outcome, with all that came in judged. The errors are those of Run, and one that tells which outcome is earlier
// than the one before.
func Replay(ctx context.Context, name string, p rollout.Policy, outcomes iter.Seq[Recorded], o *Options) (Report, error) {
	var problems []error
	if outcomes == nil {
		problems = append(problems, errors.New("simulate: Replay: the outcomes are nil"))
	}
	e, err := newEngine(name, p, o, problems)
	if err != nil {
		return Report{}, err
	}
	if err := e.replay(ctx, outcomes); err != nil {
		return Report{}, err
	}
	return e.finish(ctx)
}

// problems are what is wrong with the traffic, each naming the field.
func (t *Traffic) problems() []error {
	var ps []error
	bad := func(format string, args ...any) { ps = append(ps, fmt.Errorf("simulate: Traffic."+format, args...)) }
	if !(t.PerSecond > 0) || t.PerSecond > 1e9 {
		bad("PerSecond: %v must be above 0 and at most 1e9", t.PerSecond)
	}
	if t.Units < 0 {
		bad("Units: %d is negative", t.Units)
	}
	if !(t.Skew >= 0 && t.Skew <= 10) {
		bad("Skew: %v must be from 0 to 10", t.Skew)
	} else if t.Skew > 0 && t.Units == 0 {
		bad("Skew: it needs Units")
	}
	sum := 0.0
	for ring, percent := range t.Rings {
		if !(percent >= 0 && percent <= 100) {
			bad("Rings[%q]: %v %% must be from 0 to 100", ring, float64(percent))
		}
		if ring == rollout.Everyone || ring == "" {
			bad("Rings[%q]: everyone is who is in no other ring", ring)
		}
		sum += float64(percent)
	}
	if sum > 100 {
		bad("Rings: together they are %v %%, more than 100", sum)
	}
	for i, l := range t.Loopers {
		if l.Cohort != rollout.Candidate && l.Cohort != rollout.Control {
			bad("Loopers[%d].Cohort: %v must be candidate or control", i, l.Cohort)
		}
		if !(l.Percent > 0 && l.Percent < 100) {
			bad("Loopers[%d].Percent: %v must be above 0 and below 100", i, float64(l.Percent))
		}
	}
	for i, m := range t.Models {
		if m == nil {
			bad("Models[%d]: it is nil", i)
		}
	}
	return ps
}

// engine is one rehearsal.
type engine struct {
	o       Options
	process virtual.Process
	r       *rollout.Rollout
	report  Report
	ended   bool          // completed or rolled back
	clock   time.Duration // the time of the last tick
	next    time.Duration // of the next one
	reached time.Duration // up to here everything has happened
	pending pending
	nth     int
	met     map[string]bool // exposed units by key
	known   []bool          // and by number
}

func newEngine(name string, p rollout.Policy, o *Options, problems []error) (*engine, error) {
	e := &engine{met: map[string]bool{}}
	if o != nil {
		e.o = *o
	}
	if e.o.Interval < 0 {
		problems = append(problems, fmt.Errorf("simulate: Options.Interval: %v is negative", e.o.Interval))
	}
	if e.o.Horizon < 0 {
		problems = append(problems, fmt.Errorf("simulate: Options.Horizon: %v is negative", e.o.Horizon))
	}
	if e.o.Horizon == 0 {
		e.o.Horizon = defaultHorizon
	}
	dither := rand.New(rand.NewPCG(e.o.Seed, 2))
	process, err := virtual.New(name, p, virtual.Setup{
		Interval: max(e.o.Interval, 0), Dither: dither.Uint32, MayAdvance: e.o.MayAdvance, Sources: e.o.Sources,
	})
	if err != nil {
		problems = append(problems, err)
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	e.process, e.r = process, process.Rollout().(*rollout.Rollout)
	e.report = Report{Name: name, Version: p.Version, Seed: e.o.Seed}
	return e, nil
}

// begin is where virtual time begins.
func (e *engine) begin(start time.Time) {
	if start.IsZero() {
		start = defaultStart
	}
	e.report.Start = start
	e.process.Start(start)
}

// upto takes the clock to t: the ticks until then, and the outcomes that come until then.
func (e *engine) upto(ctx context.Context, t time.Duration) error {
	for e.reached = t; !e.ended; {
		due := len(e.pending) > 0 && e.pending[0].at <= min(e.next, t)
		switch {
		case due:
			late := heap.Pop(&e.pending).(waiting)
			if err := e.record(ctx, late.at, late.decision, late.observations); err != nil {
				return err
			}
		case e.next <= t:
			at := e.next
			e.next += e.process.Interval()
			if err := e.tick(ctx, at, false); err != nil {
				return err
			}
		default:
			return nil
		}
	}
	return nil
}

// record gives an outcome to its decision. An event that Run would be woken by is acted on at once.
func (e *engine) record(ctx context.Context, at time.Duration, d rollout.Decision, observations []rollout.Observation) error {
	d.Record(observations...)
	if !e.process.Woken() {
		return nil
	}
	return e.tick(ctx, at, false)
}

// tick is one evaluation, and another one after each thing that an operator did.
func (e *engine) tick(ctx context.Context, at time.Duration, last bool) error {
	e.clock = at
	e.process.At(e.report.Start.Add(at))
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("simulate: at %v: %w", at, err)
		}
		if err := e.process.Tick(ctx, last); err != nil {
			return fmt.Errorf("simulate: at %v: %w", at, err)
		}
		e.note(at)
		if e.o.Operator == nil || e.ended {
			return nil
		}
		if err := e.o.Operator(ctx, at, e.r); err != nil {
			return fmt.Errorf("simulate: Operator, at %v: %w", at, err)
		}
		e.note(at)
		if !e.process.Woken() {
			return nil
		}
	}
}

// note takes up what happened.
func (e *engine) note(at time.Duration) {
	rep := &e.report
	for _, event := range e.process.Events().([]rollout.Event) {
		rep.Events = append(rep.Events, event)
		switch event.Kind {
		case rollout.StageEntered, rollout.SteppedBack:
			rep.leave(at)
			rep.Stages = append(rep.Stages, Stage{Name: event.Stage, Ring: event.Ring, Percent: event.Percent, Entered: at, Left: at})
		}
		e.ended = event.To == rollout.Completed || event.To == rollout.RolledBack
	}
	if e.ended {
		rep.leave(at)
	}
}

// count counts a decision, of unit number i if that is not below 0.
func (e *engine) count(d rollout.Decision, i int, key string, again bool) {
	rep := &e.report
	var stage *Stage
	if n := len(rep.Stages); n > 0 {
		stage = &rep.Stages[n-1]
	} else {
		stage = new(Stage)
	}
	rep.Requests++
	stage.Requests++
	if d.Cohort() == rollout.Control {
		rep.Control++
		stage.Control++
	}
	if !d.Enabled() {
		return
	}
	rep.Candidate++
	stage.Candidate++
	fresh := true
	switch {
	case i >= 0:
		fresh, e.known[i] = !e.known[i], true
	case again:
		fresh, e.met[key] = !e.met[key], true
	}
	if fresh {
		rep.Exposed++
		stage.Exposed++
	}
}

// requests are the requests of made-up traffic.
func (e *engine) requests(ctx context.Context, t *Traffic, people *population) error {
	rng := rand.New(rand.NewPCG(e.o.Seed, 3))
	e.known = make([]bool, len(people.units))
	q, o := &Request{Rand: rng}, &Outcome{}
	for at := e.gap(t, rng, q, 0); ; at = e.gap(t, rng, q, at) {
		if err := e.upto(ctx, min(at, e.o.Horizon)); err != nil || e.ended || at >= e.o.Horizon {
			return err
		}
		q.At, q.loops = at, rollout.Rate{}
		i := people.draw(rng, q)
		again := i >= 0
		if l := e.looping(t, people, rng, q); l >= 0 {
			i, again = -1, true
			q.Unit, q.seed, q.loops = people.loopers[l], uint64(l), t.Loopers[l].Event
			if q.loops == (rollout.Rate{}) {
				q.loops = rollout.Errors
			}
		}
		q.Decision = e.r.Decide(q.Unit)
		e.count(q.Decision, i, q.Unit.Key, again)
		*o = Outcome{Observations: o.Observations[:0]}
		for _, m := range t.Models {
			m(q, o)
		}
		switch {
		case o.Lost || len(o.Observations) == 0:
		case o.Delay > 0:
			e.nth++
			heap.Push(&e.pending, waiting{at + o.Delay, e.nth, q.Decision, append([]rollout.Observation(nil), o.Observations...)})
		default:
			if err := e.record(ctx, at, q.Decision, o.Observations); err != nil {
				return err
			}
		}
	}
}

// gap is the time of the request after the one at the given time. While there is no load it looks again once a tick.
func (e *engine) gap(t *Traffic, rng *rand.Rand, q *Request, at time.Duration) time.Duration {
	for {
		rate := t.PerSecond
		if t.Load != nil {
			*q = Request{At: at, Rand: rng}
			rate *= t.Load(q)
		}
		if rate > 0 {
			if wait := rng.ExpFloat64() / rate * float64(time.Second); t.Load == nil || wait < float64(e.process.Interval()) {
				return at + time.Duration(min(wait, float64(e.o.Horizon)))
			}
		}
		// The process forgets: so far none has come, and the load may be another now.
		if at += e.process.Interval(); at >= e.o.Horizon {
			return at
		}
	}
}

// looping is the looper that makes the request instead of the unit drawn, or -1.
func (e *engine) looping(t *Traffic, people *population, rng *rand.Rand, q *Request) int {
	for i, l := range t.Loopers {
		if rng.Float64()*100 >= float64(l.Percent) {
			continue
		}
		d, own := e.r.Peek(q.Unit), e.r.Peek(people.loopers[i])
		if d.Cohort() == l.Cohort && own.Cohort() == l.Cohort && d.Ring() == own.Ring() {
			return i
		}
	}
	return -1
}

// replay feeds recorded outcomes.
func (e *engine) replay(ctx context.Context, outcomes iter.Seq[Recorded]) error {
	var before time.Time
	n := 0
	for o := range outcomes {
		n++
		if o.Time.IsZero() {
			return fmt.Errorf("simulate: Replay: outcome %d has no time", n)
		}
		if n == 1 {
			start := e.o.Start
			if start.IsZero() {
				start = o.Time
			}
			e.begin(start)
			before = e.report.Start
		}
		if o.Time.Before(before) {
			return fmt.Errorf("simulate: Replay: outcome %d is of %v, before %v, which was reached already", n, o.Time, before)
		}
		if o.Cohort > rollout.Candidate {
			return fmt.Errorf("simulate: Replay: the cohort of outcome %d is %d, which is none", n, uint8(o.Cohort))
		}
		before = o.Time
		at := o.Time.Sub(e.report.Start)
		if err := e.upto(ctx, min(at, e.o.Horizon)); err != nil || e.ended || at >= e.o.Horizon {
			return err
		}
		key := o.Unit.Key
		if key == "" {
			key = "#" + strconv.Itoa(n)
		}
		var d rollout.Decision
		if o.Cohort == rollout.None {
			d = e.r.Decide(rollout.Unit{Key: key, Groups: o.Unit.Groups})
		} else {
			e.process.Force(key, o.Unit.Groups, uint8(o.Cohort), &d)
			if d.Cohort() == rollout.None {
				e.report.Skipped++
				continue
			}
		}
		e.count(d, -1, key, true)
		if err := e.record(ctx, at, d, o.Observations); err != nil {
			return err
		}
	}
	if n == 0 {
		return errors.New("simulate: Replay: there is no outcome")
	}
	return e.upto(ctx, min(e.next, e.o.Horizon))
}

// finish judges what is left, as Run does when it ends, and completes the report.
func (e *engine) finish(ctx context.Context) (Report, error) {
	if !e.ended {
		if err := e.tick(ctx, e.reached, true); err != nil {
			return Report{}, err
		}
	}
	rep, s := &e.report, e.r.Status()
	rep.leave(e.clock)
	rep.State, rep.Stage, rep.Note = s.State, s.Stage.Name, s.Note
	rep.Gates, rep.Incident = s.Gates, s.Incident
	rep.End = e.clock
	rep.Late, rep.Unknown = s.Late, s.Unknown
	return *rep, nil
}

// pending are outcomes that are still to come, the next one first.
type pending []waiting

type waiting struct {
	at           time.Duration
	nth          int // equal times in the order of the requests
	decision     rollout.Decision
	observations []rollout.Observation
}

func (p pending) Len() int { return len(p) }
func (p pending) Less(i, j int) bool {
	return p[i].at < p[j].at || p[i].at == p[j].at && p[i].nth < p[j].nth
}
func (p pending) Swap(i, j int) { p[i], p[j] = p[j], p[i] }
func (p *pending) Push(x any)   { *p = append(*p, x.(waiting)) }
func (p *pending) Pop() any {
	old := *p
	last := old[len(old)-1]
	*p = old[:len(old)-1]
	return last
}
