package rollout

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// intent is a rollback that is in force here and not stored yet.
type intent struct {
	gen      uint64 // 0: of whatever is loaded first
	note     string
	incident *machine.Incident // found by this process's own evidence
}

// tick is one turn of Run: what was counted is published, and where it falls to this process the whole is judged; else
// what others have decided is followed. In the last one of a Run every block closes.
func (r *Rollout) tick(ctx context.Context, c *clock, last bool) {
	r.turnSlot(r.now())
	began := r.now()
	err := r.publish(ctx, c.alarm, last)
	if err == nil {
		if yes, drawn := r.evaluates(c); yes {
			err = r.evaluate(ctx, c, last, drawn)
		} else {
			err = r.refresh(ctx)
		}
	}
	if ctx.Err() == nil || err == nil {
		r.noteStore(err)
	}
	if err != nil {
		r.cutOff(ctx, c)
		return
	}
	c.loaded, c.alone = began, alone{}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stale {
		r.stale = false
		r.publishLocked()
	}
}

// evaluates reports whether this process judges the whole in this tick: by chance, so that about two do, however many
// there are. There is no leader to wait for. drawn: only chance says so, in a tick that the clock began.
func (r *Rollout) evaluates(c *clock) (yes, drawn bool) {
	r.mu.Lock()
	st, intent := r.known, r.intent
	r.mu.Unlock()
	if st == nil || st.Live <= 1 || c.alarm || intent != nil || c.doubt != nil {
		return true, false
	}
	yes = r.coin(st.Live)
	return yes, yes && !c.woken
}

// mostLeft is how often in a row one that is drawn may leave it to others: it may know what they do not.
const mostLeft = 3

// leaves reports whether another process has evaluated so lately that there is hardly anything new to read, and no time to
// account for. By clocks that differ it is another moment, or never, but as long.
func (r *Rollout) leaves(st *machine.State, c *clock) bool {
	if st == nil || st.Writer == r.me() || c.left >= mostLeft {
		return false
	}
	now := r.now()
	ago := now.Sub(st.Last)
	if ago < 0 || ago >= r.o.Interval/4 || st.Account(r.followed(st, now)) >= r.o.Interval {
		return false
	}
	c.left++
	return true
}

// clock is what the loop remembers of its own time and writes.
type clock struct {
	loaded time.Time // when the last tick began that has used the Store
	alarm  bool      // the tick is only for what must never happen
	woken  bool      // something else than the time began the tick
	fresh  bool      // nothing was evaluated in this Run yet
	left   int       // how often in a row an evaluation was left to others
	doubt  *doubt
	alone  alone // the zero value while the Store can be used
}

// doubt is an evaluation of which it is not known whether its write has landed.
type doubt struct {
	st       *machine.State
	standing machine.Standing
	events   []machine.Event
	blocks   []machine.Block
}

// evaluate is one evaluation: load, square, gather, judge, store, follow. Nothing of it is remembered here: where its write
// does not land for certain, the next one starts from what is stored. drawn: it may be left to who has just made one.
func (r *Rollout) evaluate(ctx context.Context, c *clock, last, drawn bool) error {
	for range 4 {
		l, err := r.latest(ctx)
		if err != nil {
			return err
		}
		if d := c.doubt; d != nil {
			if c.doubt = nil; l.stored != nil && l.stored.Writer == d.st.Writer && l.stored.Op == d.st.Op {
				r.follow(l.stored, d.standing, d.events)
				r.judged(d.blocks)
			}
		}
		r.confirm(l.stored)
		r.joins(l.stored)
		if !l.dirty && (l.standing != machine.Current || drawn && !last && r.leaves(l.stored, c)) {
			r.follow(l.stored, l.standing, nil)
			return r.project(ctx, l.stored)
		}
		if known := r.following(); known != nil && l.stored != nil && !l.dirty && known.Gen == l.stored.Gen && older(known, l.stored) {
			r.follow(l.stored, l.standing, nil) // whether or not anything can be written
		}
		c.left = 0
		at := r.now()
		next, ver := l.st, l.st.Ver
		var blocks []machine.Block
		if l.standing == machine.Current {
			followed := r.followed(l.stored, at)
			if l.stored != nil && l.st.Gen != l.stored.Gen {
				followed = 0 // that was the one before
			}
			in := r.input(at)
			in.Elapsed = l.st.Account(followed)
			since := l.st.Since
			var tasks []func(context.Context) error
			if l.st.Phase == machine.Running || l.st.Phase == machine.Held {
				if tasks, err = r.gather(ctx, l.st, &in, c.alarm, last); err != nil {
					return err
				}
			}
			in.Rationales = r.rationales() // after what was counted: each is kept before it is counted
			r.addSources(l.st, &in)
			var more []machine.Event
			sources, acted, live := l.st.Sources, slices.Clone(l.st.Acted), l.st.Live
			next, more = r.stepAsking(ctx, l.st, in)
			l.events = append(l.events, more...)
			blocks = in.Blocks
			news := len(l.events) + len(in.Blocks) + len(in.Outcomes) + len(in.Breaches) + len(in.Dead) + len(in.Lost)
			if in.Sources != nil && !sameTotals(in.Sources, sources) {
				news++
			}
			if l.stored != nil && l.stored.Live != live {
				news++
			}
			for _, task := range tasks { // whatever is left of it is found again
				if task(ctx) != nil || r.now().Sub(at) > r.o.Interval/8 {
					break
				}
			}
			// Whoever begins to follow the time of a rollout that nobody else follows begins it anew: else what is accounted for
			// would be waited for again, by each of many short lives. Where many begin, one of them a tick is enough.
			goes := next.Phase == machine.Running || next.Phase == machine.Held
			due := goes && (followed >= r.checkpoint() || c.fresh && since > 0 && (live <= 2 || since >= r.o.Interval))
			c.fresh = false
			if !l.dirty && slices.Equal(next.Acted, acted) && news == 0 && !due && followed-since < r.checkpoint() && !(last && goes) {
				r.follow(l.stored, l.standing, nil)
				return r.project(ctx, l.stored)
			}
			if next.Since = max(since, followed); next.Ver == ver && due {
				next.Ver++ // everybody's time begins from here
			}
		}
		if l.stored == nil || next.Ver != l.stored.Ver || next.Gen != l.stored.Gen {
			next.Since = 0
		}
		d := &doubt{next, l.standing, l.events, blocks}
		landed, err := r.swap(ctx, next, l.rev)
		if err != nil {
			c.doubt = d
			return err
		}
		if landed {
			r.followAt(next, d.standing, d.events, at)
			r.judged(blocks)
			return r.project(ctx, next)
		}
	}
	return nil
}

// checkpoint is how long nothing may be written while time goes by.
func (r *Rollout) checkpoint() time.Duration { return 12 * r.o.Interval }

// followed is for how long this process has followed the present version of the state.
func (r *Rollout) followed(st *machine.State, at time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if st == nil || r.known == nil || r.known.Gen != st.Gen || r.known.Ver != st.Ver {
		return 0 // from now on
	}
	return at.Sub(r.since)
}

// silentFor is how many rounds an incarnation may not be heard of before it is dead in any case: ten times as many as
// come in between two signs of life.
const silentFor = 240

// keepRetired is how many rounds it is remembered that an incarnation is retired.
const keepRetired = 1000

// How many tries there are to read what is missing, and how many documents are folded, and cleared away, in one evaluation.
const (
	missingTries = 6
	clearings    = 32
)

// gather lists what everybody has published, and takes what is new of it. The state was loaded before: what it has
// consumed is there. It returns what is to be cleared away besides: documents to be sealed, and those never read again.
func (r *Rollout) gather(ctx context.Context, st *machine.State, in *machine.Input, alarm, last bool) (tasks []func(context.Context) error, err error) {
	docs, outdated, err := r.documents(ctx, st)
	if err != nil {
		return nil, err
	}
	var gone []string // whose documents cannot be read
	var counts []*document
	incs := slices.Sorted(maps.Keys(docs))
	for _, inc := range incs {
		d := docs[inc]
		old, retired := st.Retired[inc]
		cursor, counted := st.Cursors[inc]
		switch {
		case retired || d.err == nil && !counted && d.about.Birth < st.Floor:
			if d.err == nil && len(tasks) < clearings {
				tasks = append(tasks, r.clearTask(r.evidencePrefix(st.Gen, st.Nonce)+inc))
			}
			if d.err != nil { // it stays where it is, and given up for as long
				old.Round = st.Round
				st.Retired[inc] = old
			}
			delete(docs, inc)
			continue
		case d.err == nil && counted && d.about.Seq < cursor.Seq:
			d.err = errors.New("it went back")
		case errors.Is(d.err, tally.ErrNewer):
			return nil, fmt.Errorf("the evidence of %s: %w", inc, d.err) // nothing is overwritten
		case d.err == nil:
			counts = append(counts, d)
		}
	}
	sum := summed(counts)
	live := 0
	lives := map[string]sign{}
	for _, inc := range incs {
		d := docs[inc]
		if d == nil {
			continue
		}
		if d.err != nil {
			gone = append(gone, inc)
			continue
		}
		if d.about.Sealed {
			if len(in.Dead) == clearings {
				continue // the others are read until they are folded
			}
			if doc, err := d.decode(); err == nil {
				in.Dead = append(in.Dead, r.ours(st, doc))
			}
			continue
		}
		live++
		if inc == r.pub.inc {
			continue
		}
		s := r.lives[inc]
		if s.seq != d.about.Seq || s.since.IsZero() {
			s = sign{d.about.Seq, r.now()}
		}
		lives[inc] = s
		cursor, counted := st.Cursors[inc]
		if r.now().Sub(s.since) >= r.patience() || counted && d.about.Seq == cursor.Seq && st.Round > cursor.Round+r.silent {
			if len(tasks) < clearings {
				tasks = append(tasks, r.sealTask(st, inc, d.about.Seq))
			}
		}
	}
	r.lives = lives
	for _, key := range outdated {
		if len(tasks) < clearings {
			tasks = append(tasks, r.clearTask(key))
		}
	}
	for inc := range st.Cursors {
		if docs[inc] == nil {
			gone = append(gone, inc)
		}
	}
	slices.Sort(gone)
	if len(gone) == 0 {
		r.missing = 0
		err = machine.Take(st, r.plan, machine.Gathered{Sum: sum, Form: r.formOf, Share: r.shareOf(st), Alarm: alarm, Last: last}, in)
	} else {
		err = fmt.Errorf("the evidence of %s is missing", gone[0])
	}
	if err != nil {
		return tasks, r.without(ctx, st, in, sum, gone, err)
	}
	for inc, d := range docs {
		if old, ok := st.Cursors[inc]; !ok || old.Seq != d.about.Seq {
			if st.Cursors == nil {
				st.Cursors = map[string]machine.Cursor{}
			}
			st.Cursors[inc] = machine.Cursor{Seq: d.about.Seq, Round: st.Round, Birth: d.about.Birth}
		}
	}
	if far(live, st.Live) {
		st.Live = live
		st.Ver++ // everybody's chances
	}
	return tasks, nil
}

// ours is a document without the series that the state does not keep.
func (r *Rollout) ours(st *machine.State, doc *tally.Doc) *tally.Doc {
	d := *doc
	d.Series = slices.DeleteFunc(slices.Clone(doc.Series), func(s tally.Series) bool {
		return !st.Keeps(r.plan, r.formOf, s.Key)
	})
	return &d
}

// far reports whether a number of processes is so far from another that it matters.
func far(a, b int) bool { return a != b && (min(a, b) < 32 || 8*a > 9*b || 9*a < 8*b) }

// without is an evaluation that cannot read all the evidence: nothing is judged, and nothing advances. After some tries
// what is missing is given up.
func (r *Rollout) without(ctx context.Context, st *machine.State, in *machine.Input, sum *tally.Sum, gone []string, cause error) error {
	in.Dead, in.Blocks, in.Outcomes, in.Breaches, in.MayAdvance = nil, nil, nil, nil, false
	r.missing++
	r.logger().Warn("rollout: not all evidence can be read; nothing is judged", "rollout", r.name, "err", cause)
	if r.missing < missingTries {
		return nil
	}
	for _, inc := range gone {
		value, rev, err := r.get(ctx, r.evidencePrefix(st.Gen, st.Nonce)+inc)
		if err != nil {
			return err
		}
		if d, err := tally.Decode(value); rev != 0 && err == nil && d.Inc == inc && d.Seq >= st.Cursors[inc].Seq {
			return nil // it is there after all
		}
	}
	r.logger().Error("rollout: what could not be read is given up; what it had counted and was not judged never is", "rollout", r.name, "err", cause)
	r.missing = 0
	in.Lost = gone
	machine.Rebase(st, r.plan, sum, r.formOf)
	return nil
}

// shareOf is the candidate's part of the units of a ring in an epoch.
func (r *Rollout) shareOf(st *machine.State) func(uint64, string) (float64, bool) {
	return func(epoch uint64, ring string) (float64, bool) {
		for _, c := range st.History {
			if c.Epoch == epoch {
				v := ringView{}
				r.limits(&v, Percent(c.Shares[ring]))
				return float64(v.limit) / (1 << 64), !v.all && v.limit > 0
			}
		}
		return 0, false
	}
}

// clearTask deletes a document that is never read again.
func (r *Rollout) clearTask(key string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, rev, err := r.get(ctx, key)
		if err == nil && rev != 0 {
			_, _, err = r.put(ctx, key, rev, nil)
		}
		return err
	}
}

// sealTask seals the document of an incarnation that is taken for dead: what it has is all it will ever have.
func (r *Rollout) sealTask(st *machine.State, inc string, seq uint64) func(context.Context) error {
	key := r.evidencePrefix(st.Gen, st.Nonce) + inc
	return func(ctx context.Context) error {
		value, rev, err := r.get(ctx, key)
		if err != nil || rev == 0 {
			return err
		}
		d, err := tally.Decode(value)
		if err != nil || d.Seq != seq || d.Sealed {
			return nil
		}
		d.Sealed = true
		_, _, err = r.put(ctx, key, rev, d.Encode())
		return err
	}
}

func (r *Rollout) input(at time.Time) machine.Input {
	r.mu.Lock()
	defer r.mu.Unlock()
	return machine.Input{Now: at, Checks: r.checks, MayAdvance: true, Units: r.unitsLocked()}
}

// stepAsking is one step from st, which is the caller's no more. MayAdvance is asked only where a share would rise.
func (r *Rollout) stepAsking(ctx context.Context, st *machine.State, in machine.Input) (*machine.State, []machine.Event) {
	if r.policy.MayAdvance == nil {
		return st, machine.Step(st, r.plan, in)
	}
	next := st.Clone()
	events := machine.Step(next, r.plan, in)
	if !machine.Raises(st, next) || r.mayAdvance(ctx, in.Now) {
		return next, events
	}
	in.MayAdvance = false
	return st, machine.Step(st, r.plan, in)
}

// mayAdvance asks the host. A panic, or no answer within a tick, is no.
func (r *Rollout) mayAdvance(ctx context.Context, now time.Time) bool {
	if !r.asking.CompareAndSwap(false, true) {
		return false // it has not come back from the last time
	}
	wait := r.o.Interval
	if r.virtual {
		wait = time.Minute // of real time, in which no tick passes
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	ok, err := guard(ctx, 0, func(context.Context) (bool, error) {
		defer r.asking.Store(false)
		return r.policy.MayAdvance(now), nil
	})
	if err != nil {
		r.logger().Error("rollout: MayAdvance gave no answer; nothing advances", "rollout", r.name, "err", err)
	}
	return ok && err == nil
}

// sign is when another process last gave a sign of life.
type sign struct {
	seq   uint64
	since time.Time
}

// latchHere takes every share to zero in this process, whatever is stored.
func (r *Rollout) latchHere(in *intent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if in.gen == 0 {
		r.latchAny = true
	}
	if in.gen != 0 {
		r.latch[in.gen] = true
	}
	r.intent = in
	r.publishLocked()
}
