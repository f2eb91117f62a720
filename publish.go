package rollout

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// publisher puts what this process has counted where whoever evaluates finds it: one document an incarnation, replaced as
// a whole, that nobody else adds to. What it is not sure of it sends again, the same bytes, until it knows: nothing is
// counted twice, and nothing that was acknowledged is lost. It is of the goroutine of Run alone.
type publisher struct {
	gen       uint64
	nonce     string
	inc       string
	birth     uint64
	base      *tally.Doc            // what was counted here as other incarnations'
	earlier   map[uint64]*tally.Doc // the same, by generation
	seq       uint64
	rev       uint64     // of the document, as far as it is known; 0: there is none
	acked     *tally.Doc // the last one that is there for certain
	pending   *tally.Doc // one that may be
	first     *tally.Doc // the first one, until it is confirmed: it may have been folded, and created once more
	repeated  bool       // it may have been sent more than once
	confirmed bool       // some state has counted it
	sent      time.Time
}

// evidenceKeys is what the keys of all evidence begin with.
func (r *Rollout) evidenceKeys() string { return "rollout/" + r.name + "/ev/" }

// evidencePrefix is what the keys of a timeline's documents begin with.
func (r *Rollout) evidencePrefix(gen uint64, nonce string) string {
	return fmt.Sprintf("%s%d.%s/", r.evidenceKeys(), gen, nonce)
}

func (p *publisher) key(r *Rollout) string { return r.evidencePrefix(p.gen, p.nonce) + p.inc }

// another begins another incarnation, to which what a document has does not belong: it was counted as another one's.
func (r *Rollout) another(st *machine.State, counted *tally.Doc) {
	p := &r.pub
	earlier := map[uint64]*tally.Doc{}
	for gen, d := range p.earlier {
		if gen+keepEarlier > st.Gen { // a store may go back, and a generation with it
			earlier[gen] = d
		}
	}
	base := p.base.Plus(counted)
	if known := r.following(); known != nil && known.Gen == p.gen && known.Nonce == p.nonce { // without what is not counted any more
		base.Series = slices.DeleteFunc(base.Series, func(s tally.Series) bool { return s.Epoch < known.Oldest })
	}
	earlier[p.gen] = base
	*p = publisher{gen: st.Gen, nonce: st.Nonce, earlier: earlier, base: earlier[st.Gen], inc: r.replica + "-" + randomText(), birth: st.Round}
	inc := p.inc
	r.counting.Store(&inc)
}

// keepEarlier is of how many generations it is remembered what was published.
const keepEarlier = 4

// unpublished is what this process has counted in its present incarnation.
func (r *Rollout) unpublished(st *machine.State) *tally.Doc { return r.count(st).Less(r.pub.base) }

// publish sends what this process has counted, if it is not what was sent before. alarm: only what must never happen, and
// what is under way. It does nothing where nothing is counted. An error means that it is not known whether it was sent.
func (r *Rollout) publish(ctx context.Context, alarm, last bool) error {
	r.mu.Lock()
	st, standing, forced := r.known, r.standing, r.forced != nil
	r.mu.Unlock()
	if st == nil || forced || standing != machine.Current && standing != machine.Follower {
		return nil
	}
	p := &r.pub
	switch {
	case p.gen != st.Gen:
		r.another(st, nil) // with ledgers of its own
	case p.nonce != st.Nonce:
		r.another(st, r.unpublished(st)) // a clean cut: what came before is lost, of both cohorts
	}
	if p.pending != nil {
		if err := r.send(ctx); err != nil || p.pending != nil || p.gen != st.Gen || p.nonce != st.Nonce {
			return err // where it goes on in another timeline, that one is followed first
		}
	}
	var d *tally.Doc
	if alarm {
		d = r.breaches(st, p.base.Plus(p.acked)).Less(p.base)
	} else {
		d = r.unpublished(st)
	}
	if p.acked != nil { // nothing that was published is taken back, though its ledger may be gone
		for _, s := range p.acked.Series {
			if s.Epoch >= st.Oldest && d.Find(s.Key) == nil {
				d.Series = append(d.Series, s)
			}
		}
		d.Sort()
	}
	if !last {
		d.Open = r.sessions.open(st.Gen)
	}
	d.Inc, d.Birth = p.inc, p.birth
	if st.Phase.Latched() && !r.lingering() {
		d.Ack = st.Ver
	}
	if p.acked == nil {
		if len(d.Series) == 0 && len(d.Open) == 0 {
			return nil
		}
	} else if d.Same(p.acked) && (len(d.Open) == 0 || r.now().Sub(p.sent) < heartbeat(r.o.Interval)) {
		return nil
	}
	if !alarm && !last && r.full(st, d) {
		return r.seal(ctx, st)
	}
	if p.acked == nil { // whatever was forgotten before has nothing of it
		p.birth = max(p.birth, st.Round)
		d.Birth = p.birth
	}
	p.seq++
	d.Seq = p.seq
	if !r.shared {
		p.acked, p.sent, p.confirmed = d, r.now(), true
		return nil
	}
	p.pending = d
	return r.send(ctx)
}

// heartbeat is how often open work gives a sign of life: processes with other intervals take it for dead after three minutes
// at the soonest.
func heartbeat(interval time.Duration) time.Duration { return min(12*interval, time.Minute) }

// lingering reports whether a session goes on that is revoked.
func (r *Rollout) lingering() bool {
	for _, s := range r.sessions.all() {
		if s.leash.over() && !r.sessions.settled(s) {
			return true
		}
	}
	return false
}

// send sends the pending document, and finds out what became of it.
func (r *Rollout) send(ctx context.Context) error {
	p := &r.pub
	value := p.pending.Encode()
	rev, swapped, err := r.put(ctx, p.key(r), p.rev, value)
	if err == nil && swapped {
		if p.landed(rev, r.now()); p.acked.Sealed {
			r.another(r.following(), p.acked)
		}
		return nil
	}
	p.repeated = p.repeated || p.acked == nil
	return r.resolve(ctx)
}

// landed notes that the pending document is there.
func (p *publisher) landed(rev uint64, now time.Time) {
	p.rev, p.acked, p.pending, p.sent = rev, p.pending, nil, now
	if p.first == nil && !p.confirmed {
		p.first = p.acked
	}
}

// resolve finds out whether the pending document is there.
func (r *Rollout) resolve(ctx context.Context) error {
	p := &r.pub
	value, rev, err := r.get(ctx, p.key(r))
	if err != nil {
		return err
	}
	if rev == 0 {
		return r.resolveAbsent(ctx)
	}
	d, err := tally.Decode(value)
	switch {
	case err != nil || d.Inc != p.inc || d.Seq > p.pending.Seq: // somebody else has written there
		r.logger().Error("rollout: the evidence of this process was overwritten; what it had counted is given up", "rollout", r.name, "key", p.key(r), "err", err)
		r.drop(p.pending)
		r.another(r.following(), p.pending)
	case d.Sealed:
		r.sealed(d)
	case d.Seq == p.pending.Seq:
		p.landed(rev, r.now())
	case p.acked != nil && d.Seq == p.acked.Seq:
		p.rev = rev // it is not there: the same bytes again, at the next tick
	default:
		return r.travelled(ctx)
	}
	return nil
}

// resolveAbsent is resolve where there is no document: it was folded, or never there, or the store went back.
func (r *Rollout) resolveAbsent(ctx context.Context) error {
	p := &r.pub
	st, _, err := r.load(ctx)
	switch {
	case err != nil:
		return err
	case st == nil:
		return r.travelled(ctx)
	case st.Gen != p.gen || st.Nonce != p.nonce:
		if known := r.following(); older(st, known) {
			return r.travelled(ctx)
		}
		r.another(st, p.pending) // of another timeline; of another generation it counts no more
		return nil
	}
	if gone, ok := st.Retired[p.inc]; ok {
		r.retired(st, gone.Seq)
		return nil
	}
	_, counted := st.Cursors[p.inc]
	switch {
	case p.acked != nil && !counted && p.birth < st.Floor: // folded so long ago that nobody remembers at which cut
		r.forgotten(st, p.pending)
	case p.acked != nil:
		return r.travelled(ctx)
	case counted, p.birth < st.Floor: // it may have been counted
		r.drop(p.pending)
		r.another(st, p.pending)
	default:
		p.rev = 0 // it was never there: again, at the next tick
	}
	return nil
}

// retired goes on as another incarnation after this one was folded at a cut.
func (r *Rollout) retired(st *machine.State, seq uint64) {
	p := &r.pub
	counted := p.pending
	switch {
	case p.acked != nil && seq == p.acked.Seq:
		counted = p.acked
	case p.first != nil && seq == p.first.Seq: // what came after it was added to a document that nobody reads
		counted = p.first
	case p.pending == nil || seq != p.pending.Seq:
		if counted == nil {
			counted = p.acked
		}
		r.drop(counted)
	}
	if counted != nil && len(counted.Open) > 0 {
		r.sessions.forsake() // they have counted as failed
	}
	r.another(st, counted)
}

// forgotten is retired where it is so long ago that the state does not say it any more. What was acknowledged was counted;
// of the rest it is not known.
func (r *Rollout) forgotten(st *machine.State, sent *tally.Doc) {
	if len(sent.Open) > 0 {
		r.sessions.forsake()
	}
	r.drop(sent.Less(r.pub.acked))
	r.another(st, sent)
}

// sealed is retired where the folding is under way.
func (r *Rollout) sealed(d *tally.Doc) {
	if len(d.Open) > 0 {
		r.sessions.forsake()
	}
	r.another(r.following(), d)
}

// drop counts observations of which it is not known whether they were judged: not the marks of timings, and not what guards
// count of the same.
func (r *Rollout) drop(d *tally.Doc) {
	for i := range d.Series {
		s := &d.Series[i]
		if form, ok := r.formOf(s.Metric); ok && form.Size() == s.Cells && form != silenceForm && form != splitForm {
			for _, cells := range s.Counts {
				for _, n := range cells[:form.Cells*form.Groups] {
					r.unsure.Add(n)
				}
			}
		}
	}
}

// confirm looks whether this process's first document was counted, in a state that is stored. A create may be repeated
// after it has landed, was counted, and folded: only the state tells.
func (r *Rollout) confirm(st *machine.State) {
	p := &r.pub
	if st == nil || p.gen != st.Gen || p.nonce != st.Nonce || p.acked == nil || p.pending != nil {
		return
	}
	if gone, ok := st.Retired[p.inc]; ok {
		r.retired(st, gone.Seq)
		return
	}
	if _, ok := st.Cursors[p.inc]; ok {
		p.confirmed, p.first = true, nil
	} else if p.birth < st.Floor {
		if !p.confirmed {
			r.drop(p.acked) // nobody reads it; but it may have been counted, and forgotten
		}
		r.forgotten(st, p.acked)
	}
}

// travelled joins what is known here with a store that went back.
func (r *Rollout) travelled(ctx context.Context) error {
	_, err := r.update(ctx, func(*machine.State, machine.Standing) ([]machine.Event, error) { return nil, nil })
	if err != nil {
		return err
	}
	if st := r.following(); st.Gen == r.pub.gen && st.Nonce == r.pub.nonce {
		// The state did not go back, only this process's document: nothing tells what was counted of it.
		_, err = r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
			if s.Gen != r.pub.gen || s.Nonce != r.pub.nonce {
				return nil, nil
			}
			next, events := machine.Rejoin(s.Clone(), s.Clone(), r.plan, randomText(), r.now())
			*s = *next
			return events, nil
		})
	}
	return err
}

// documents are those of a timeline, by incarnation, and the keys of what is left of earlier generations.
func (r *Rollout) documents(ctx context.Context, st *machine.State) (all map[string]*document, outdated []string, err error) {
	if !r.shared {
		all := map[string]*document{}
		if p := &r.pub; p.acked != nil && p.gen == st.Gen && p.nonce == st.Nonce {
			all[p.inc] = &document{about: p.acked.About, doc: p.acked}
		}
		return all, nil, nil
	}
	all = map[string]*document{}
	ours := r.evidencePrefix(st.Gen, st.Nonce)
	prefix := r.evidenceKeys()
	listed, err := use(ctx, r, func(ctx context.Context) (map[string][]byte, error) { return r.store.List(ctx, prefix) })
	if err != nil {
		return nil, nil, fmt.Errorf("list %s: %w", prefix, err)
	}
	for key, value := range listed {
		inc, ok := strings.CutPrefix(key, ours)
		if !ok {
			if gen, _, _ := strings.Cut(strings.TrimPrefix(key, prefix), "."); earlier(gen, st.Gen) {
				outdated = append(outdated, key)
			}
			continue
		}
		about, err := tally.Peek(value)
		if err == nil && about.Inc != inc {
			err = fmt.Errorf("it is of %q", about.Inc)
		}
		all[inc] = &document{about: about, value: value, err: err}
	}
	return all, outdated, nil
}

// earlier reports whether a text is the number of a generation before gen.
func earlier(text string, gen uint64) bool {
	n, err := strconv.ParseUint(text, 10, 64)
	return err == nil && n < gen
}

// document is what one incarnation has published.
type document struct {
	about tally.About
	value []byte
	doc   *tally.Doc // instead of value, where there is no Store
	err   error      // it cannot be read
}

func (d *document) addTo(s *tally.Sum) error {
	if d.doc != nil {
		s.Add(d.doc)
		return nil
	}
	return s.AddEncoded(d.value)
}

// together is from how many documents on the halves of them are added up at once.
const together = 64

// summed is the sum of documents. Those that cannot be read have an err afterwards, and are not in it.
func summed(docs []*document) *tally.Sum {
	half := 0
	if len(docs) >= together {
		half = len(docs) / 2
	}
	sum, other := &tally.Sum{}, &tally.Sum{}
	var work sync.WaitGroup
	if half > 0 {
		work.Go(func() { addAll(other, docs[:half]) })
	}
	addAll(sum, docs[half:])
	work.Wait()
	if slices.ContainsFunc(docs, func(d *document) bool { return d.err != nil }) { // a part of it was added
		sum = &tally.Sum{}
		addAll(sum, docs)
		return sum
	}
	sum.Merge(other)
	return sum
}

// addAll adds documents to a sum. One that cannot be read gets an err, and leaves the sum of no use.
func addAll(sum *tally.Sum, docs []*document) {
	for _, d := range docs {
		if d.err == nil {
			d.err = d.addTo(sum)
		}
	}
}

func (d *document) decode() (*tally.Doc, error) {
	if d.doc != nil {
		return d.doc, nil
	}
	return tally.Decode(d.value)
}
