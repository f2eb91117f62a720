package rollout

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// Effect is something that the candidate did to the world, as [Decision.Journal] recorded it, for Policy.Undo to undo.
type Effect struct {
	// Key is the same each time this effect is undone, and no other effect of any rollout has it: use it to undo once what
	// must not be undone twice. It is also what [Rollout.Waive] calls the effect by.
	Key string
	// Fence grows whenever another process takes the undoing over: refuse what comes with a smaller one.
	Fence string

	Name       string // of the rollout
	Version    string // of the candidate whose effect it is
	Generation uint64
	Ring       string
	Kind       string
	Payload    []byte
	Time       time.Time // when it was journalled, by the clock of the process that did
}

// Limits of the journal. What exceeds one is refused by [Decision.Journal].
const (
	MaxEffects = 1 << 17 // of one process that are neither undone nor settled
	MaxPayload = 1 << 16 // bytes of one effect

	maxJournal = 256 << 20 // bytes of one process's effects together
)

// ErrJournalFull: this process has journalled as many effects as it may until they are undone, or the rollout has
// completed. The effect is not journalled and must not be made.
var ErrJournalFull = errors.New("rollout: the journal is full")

// One effect has a minute to be undone, and as many attempts as a rollback step.
const (
	undoTimeout  = time.Minute
	undoAttempts = 5
	listTimeout  = time.Minute // for all that is journalled at once
)

// effectLog is what this process has journalled.
type effectLog struct {
	mu    sync.Mutex      // guards what follows
	n     uint64          // of the last effect; never used twice
	lives map[string]bool // incarnations that have journalled
	taken map[shelf]room
	doubt map[string]doubtful // by key
}

// shelf is where effects are undone, or settled, together.
type shelf struct {
	gen  uint64
	ring string
}

// room is what effects take of the journal.
type room struct{ count, bytes int }

// doubtful is an effect that was refused and may be stored all the same.
type doubtful struct {
	shelf
	size int
}

// effect is an effect as it is stored.
type effect struct {
	Format  int       `json:"format"`
	Kind    string    `json:"kind"`
	Ring    string    `json:"ring"`
	Version string    `json:"version"`
	At      time.Time `json:"at"`
	Payload []byte    `json:"payload"`
}

const effectFormat = 1

// Journal records an effect of the candidate before it is made, so that a rollback can undo it: call it first, and make
// the effect only if it returned nil. kind is one of Policy.Undo, whose function gets the payload back. It takes one write
// to the Store and one read.
//
// Where there would be nothing to undo it records nothing and returns nil: for a decision that is not Enabled, once the
// rollout has completed, and for one that a test forces. An effect that cannot be recorded is refused: with
// [ErrRolledBack] once the candidate is rolled back, alone in its ring or altogether, or another generation has begun;
// with [ErrJournalFull] at the limit; with [ErrNotStored] if the Store does not answer. After an error the effect must not
// be made; Policy.Undo may still be asked to undo it, as it may after a crash between Journal and the effect.
//
// The process that undoes waits for its own sessions until they end, for as long as their grace, and for nothing else. In a
// request without a session, in another process, or after [Session.Reconfigured], an effect may be undone between Journal
// and the making of it. So let Undo void the name under which the payload knows the effect, and make none under a void one.
func (d Decision) Journal(ctx context.Context, kind string, payload []byte) error {
	if d.at == nil || !d.Enabled() || d.Reason() == ReasonForced || d.Reason() == ReasonCompleted {
		return nil
	}
	return d.at.r.journalEffect(ctx, d, kind, payload)
}

func (r *Rollout) journalEffect(ctx context.Context, d Decision, kind string, payload []byte) error {
	if r.policy.Undo[kind] == nil {
		return fmt.Errorf("rollout: Journal: Policy.Undo has no function for the kind %.200q", kind)
	}
	if len(payload) > MaxPayload {
		return fmt.Errorf("rollout: Journal: the payload has %d bytes; %d is the most", len(payload), MaxPayload)
	}
	if r.goneHere(d) {
		return r.refuseEffect(d)
	}
	doc, err := json.Marshal(effect{effectFormat, kind, d.Ring(), d.Version(), r.now(), payload})
	if err != nil {
		return fmt.Errorf("rollout: Journal: %w", err)
	}
	at := shelf{d.Generation(), d.Ring()}
	n, err := r.makeRoom(ctx, at, len(doc))
	if err != nil {
		return err
	}
	key := machine.EffectKey(r.name, d.Generation(), r.me(), n)
	rev, err := r.create(ctx, key, doc)
	if err != nil {
		if errors.As(err, new(untried)) {
			r.journal.free(at, len(doc))
		} else { // it may land later
			r.journal.doubts(key, doubtful{at, len(doc)})
		}
		return fmt.Errorf("%w: %w", ErrNotStored, err)
	}
	drop := func() {
		if _, err := use(ctx, r, func(ctx context.Context) (bool, error) {
			_, done, err := r.effects.CompareAndSwap(ctx, key, rev, nil)
			return done, err
		}); err == nil {
			r.journal.free(at, len(doc))
		} else {
			r.journal.doubts(key, doubtful{at, len(doc)})
		}
	}
	// Either this read sees a rollback, or whoever undoes that rollback sees the effect.
	st, _, err := r.load(ctx)
	switch {
	case err != nil:
		drop()
		return fmt.Errorf("%w: %w", ErrNotStored, err)
	case st == nil || st.Gen != d.Generation() || st.Phase.Latched() || slices.Contains(st.Rings, d.Ring()) || r.goneHere(d):
		drop()
		return r.refuseEffect(d)
	case st.Phase == machine.Completed:
		drop()
	case !st.Effects:
		drop()
		return fmt.Errorf("%w: the policy in force undoes nothing yet", ErrVersion)
	}
	return nil
}

func (r *Rollout) refuseEffect(d Decision) error {
	return fmt.Errorf("%w: an effect of generation %d in the ring %q", ErrRolledBack, d.Generation(), d.Ring())
}

// goneHere reports whether this process knows that a decision's candidate is served no more.
func (r *Rollout) goneHere(d Decision) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.latchAny || r.latch[d.Generation()] || r.known != nil && (r.known.Gen > d.Generation() || r.known.Gen == d.Generation() && slices.Contains(r.known.Rings, d.Ring()))
}

// reserve takes room in the journal.
func (j *effectLog) reserve(at shelf, life string, size int) (n uint64, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var all room
	for _, t := range j.taken {
		all.count, all.bytes = all.count+t.count, all.bytes+t.bytes
	}
	if all.count >= MaxEffects || all.bytes+size > maxJournal {
		return 0, fmt.Errorf("%w: %d effects, %d bytes", ErrJournalFull, all.count, all.bytes)
	}
	if j.taken == nil {
		j.lives, j.taken, j.doubt = map[string]bool{}, map[shelf]room{}, map[string]doubtful{}
	}
	j.n++
	j.lives[life] = true
	t := j.taken[at]
	j.taken[at] = room{t.count + 1, t.bytes + size}
	return j.n, nil
}

// free gives room back.
func (j *effectLog) free(at shelf, size int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if t := j.taken[at]; t.count > 0 {
		j.taken[at] = room{t.count - 1, max(t.bytes-size, 0)}
	}
}

// undone gives back the room of an effect that is removed, if this process has journalled it.
func (j *effectLog) undone(e *entry) {
	j.mu.Lock()
	delete(j.doubt, e.key)
	own := j.lives[e.inc]
	j.mu.Unlock()
	if own {
		j.free(shelf{e.gen, e.Ring}, e.size)
	}
}

// settle forgets what a state says is undone, or here to stay.
func (j *effectLog) settle(st *machine.State) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for at := range j.taken {
		if st.Over(at.gen, at.ring) {
			delete(j.taken, at)
		}
	}
	for key, d := range j.doubt {
		if st.Over(d.gen, d.ring) {
			delete(j.doubt, key)
		}
	}
}

// doubts notes that it is not known whether an effect is stored.
func (j *effectLog) doubts(key string, d doubtful) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.taken[d.shelf].count > 0 {
		j.doubt[key] = d
	}
}

// doubted takes out one of the effects in doubt.
func (j *effectLog) doubted() (key string, d doubtful, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for key, d = range j.doubt {
		delete(j.doubt, key)
		return key, d, true
	}
	return "", doubtful{}, false
}

// makeRoom takes room in the journal. Where it is full it finds out about effects in doubt, and removes those that are
// there; one that lands later is undone as any other, and only not counted.
func (r *Rollout) makeRoom(ctx context.Context, at shelf, size int) (n uint64, err error) {
	for {
		n, err = r.journal.reserve(at, r.me(), size)
		if err == nil {
			return n, nil
		}
		key, d, ok := r.journal.doubted()
		if !ok {
			return 0, err
		}
		_, rev, again := r.loadKey(ctx, key)
		if again == nil && rev != 0 {
			again = r.remove(ctx, key, rev)
		}
		if again != nil {
			r.journal.doubts(key, d)
			return 0, err
		}
		r.journal.free(d.shelf, d.size)
	}
}

// create makes a key. An outcome that is unknown is looked up once.
func (r *Rollout) create(ctx context.Context, key string, doc []byte) (rev uint64, err error) {
	type written struct {
		rev     uint64
		swapped bool
	}
	w, err := use(ctx, r, func(ctx context.Context) (written, error) {
		rev, swapped, err := r.effects.CompareAndSwap(ctx, key, 0, doc)
		return written{rev, swapped}, err
	})
	if err == nil && w.swapped {
		return w.rev, nil
	}
	if err == nil {
		err = errors.New("the key is there already")
	}
	if errors.As(err, new(untried)) {
		return 0, err
	}
	v, rev, again := r.loadKey(ctx, key)
	if again == nil && rev != 0 && bytes.Equal(v, doc) {
		return rev, nil
	}
	return 0, fmt.Errorf("write %s: %w", key, err)
}

// loadKey loads a value of the journal.
func (r *Rollout) loadKey(ctx context.Context, key string) (value []byte, rev uint64, err error) {
	type loaded struct {
		value []byte
		rev   uint64
	}
	got, err := use(ctx, r, func(ctx context.Context) (loaded, error) {
		v, rev, err := r.effects.Load(ctx, key)
		return loaded{v, rev}, err
	})
	return got.value, got.rev, err
}

// entry is an effect with where it is stored.
type entry struct {
	effect
	key  string
	gen  uint64
	inc  string
	n    uint64
	size int
	fail error // it cannot be read
}

// entries are what is journalled that a step covers, the newest first: those of one process in the order they were
// journalled in, those of several by their clocks.
func (r *Rollout) entries(ctx context.Context, covers func(gen uint64, ring string, unread bool) bool) ([]entry, error) {
	all, err := useFor(ctx, r, max(r.storeTimeout(), listTimeout), func(ctx context.Context) (map[string][]byte, error) {
		return r.effects.List(ctx, machine.EffectPrefix(r.name))
	})
	if err != nil {
		return nil, err
	}
	var es []entry
	for key, doc := range all {
		e := entry{key: key, size: len(doc)}
		var ok bool
		if e.gen, e.inc, e.n, ok = machine.ParseEffectKey(r.name, key); !ok {
			continue
		}
		if err := json.Unmarshal(doc, &e.effect); err != nil {
			e.fail = err
		} else if e.Format != effectFormat {
			e.fail = fmt.Errorf("it has format %d, this library reads %d", e.Format, effectFormat)
		}
		if covers(e.gen, e.Ring, e.fail != nil) {
			es = append(es, e)
		}
	}
	slices.SortFunc(es, func(a, b entry) int { return a.order(b) })
	last := map[string]time.Time{}
	for i := range es { // no clock of one process goes back
		if at := last[es[i].inc]; es[i].At.Before(at) {
			es[i].At = at
		}
		last[es[i].inc] = es[i].At
	}
	slices.SortStableFunc(es, func(a, b entry) int { return b.At.Compare(a.At) })
	// Equal times: what one process journalled last comes first.
	for i := 0; i < len(es); {
		j := i + 1
		for j < len(es) && es[j].At.Equal(es[i].At) {
			j++
		}
		slices.Reverse(es[i:j])
		i = j
	}
	return es, nil
}

// order is that in which one process journalled.
func (e entry) order(o entry) int {
	switch {
	case e.inc != o.inc:
		if e.inc < o.inc {
			return -1
		}
		return 1
	case e.n != o.n:
		if e.n < o.n {
			return -1
		}
		return 1
	}
	return 0
}

// undo undoes what is journalled and returns why it stopped, and how many effects it has undone. Each is removed once it
// is undone, so that what is left is to be undone yet.
func (r *Rollout) undo(ctx context.Context, st *machine.State, step machine.StepState, fence string) (cause string, done int) {
	for {
		es, err := r.entries(ctx, step.Covers)
		if err != nil {
			return "list the journal: " + err.Error(), done
		}
		if len(es) == 0 {
			return "", done
		}
		for i := range es {
			if ctx.Err() != nil {
				return context.Cause(ctx).Error(), done
			}
			if err := r.undoOne(ctx, &es[i], st, fence); err != nil {
				return fmt.Sprintf("%s: %s", es[i].key, err), done
			}
			done++
		}
	}
}

// undoOne undoes one effect and removes it, unless another process has done so.
func (r *Rollout) undoOne(ctx context.Context, e *entry, st *machine.State, fence string) error {
	_, rev, err := r.loadKey(ctx, e.key)
	if err != nil || rev == 0 {
		return err
	}
	if !st.Excuses(e.key, e.Kind, e.Ring, e.gen) {
		if e.fail != nil {
			return e.fail
		}
		f := r.policy.Undo[e.Kind]
		if f == nil {
			return fmt.Errorf("Policy.Undo has no function for the kind %q", e.Kind)
		}
		asked, cancel := context.WithTimeout(ctx, undoTimeout)
		defer cancel()
		err := labelled(asked, randomText(), stepGrace, func(ctx context.Context) error {
			return f(ctx, Effect{
				Key: e.key, Fence: fence, Name: r.name, Version: e.Version, Generation: e.gen, Ring: e.Ring,
				Kind: e.Kind, Payload: e.Payload, Time: e.At,
			})
		})
		if err != nil {
			r.logStack("an undo", err, "key", e.key)
			return err
		}
	}
	err = r.remove(context.WithoutCancel(ctx), e.key, rev) // or it would be undone again
	if err == nil {
		r.journal.undone(e)
	}
	return err
}

// remove deletes a key, whoever is first.
func (r *Rollout) remove(ctx context.Context, key string, rev uint64) error {
	_, err := use(ctx, r, func(ctx context.Context) (bool, error) {
		_, done, err := r.effects.CompareAndSwap(ctx, key, rev, nil)
		return done, err
	})
	if err != nil {
		if _, now, again := r.loadKey(ctx, key); again == nil && now == 0 {
			return nil
		}
		return fmt.Errorf("remove it from the journal: %w", err)
	}
	return nil
}

// clear removes what is journalled and settled, as it is stored now: what was settled is not any more where the store went
// back.
func (r *Rollout) clear(ctx context.Context) error {
	st, _, err := r.load(ctx)
	if err != nil {
		return err
	}
	if st == nil || st.Settled == 0 || older(st, r.following()) {
		return nil
	}
	es, err := r.entries(ctx, func(gen uint64, ring string, unread bool) bool {
		return gen <= st.Settled && !st.Kept(gen, ring, unread)
	})
	if err != nil {
		return err
	}
	for _, e := range es {
		_, rev, err := r.loadKey(ctx, e.key)
		if err == nil && rev != 0 {
			err = r.remove(ctx, e.key, rev)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
