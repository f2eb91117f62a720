package rollout

import (
	"context"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// alone is what this process has judged by itself since it could not use the Store: a fork of what it knows of the whole.
// The zero value is nothing yet. It is of the goroutine of Run alone.
type alone struct {
	from *machine.State // what it knew when it began
	sent *tally.Doc     // and what of its own evidence it had published
	st   *machine.State // what has come of it
	at   time.Time      // when it last judged
}

// fork is that this process has judged the candidate by itself, and taken it out of use: until the others, who know its
// evidence by then, have decided anew. The zero value is that it has not. Rollout.mu guards it.
type fork struct {
	gen   uint64
	open  bool   // its evidence is not judged with that of all yet
	inc   string // the incarnation that has published it
	seq   uint64 // at this cut or before
	epoch uint64 // the last one known that may have been decided without it
}

// holds reports whether the candidate is out of use in a state. What is completed is what everybody has.
func (f fork) holds(st *machine.State) bool {
	return f.gen == st.Gen && f.gen != 0 && st.Phase != machine.Completed && (f.open || st.Epoch <= f.epoch)
}

// joins looks whether the evidence by which this process has taken the candidate out of use is judged in a stored state.
func (r *Rollout) joins(st *machine.State) {
	p := &r.pub
	r.mu.Lock()
	defer r.mu.Unlock()
	f := &r.fork
	if st == nil || !f.open || f.gen != st.Gen || p.gen != st.Gen || p.nonce != st.Nonce || p.pending != nil {
		return
	}
	if f.inc != p.inc && p.acked != nil { // all of it, or what is left of it where it was folded meanwhile
		f.inc, f.seq = p.inc, p.acked.Seq
	}
	f.epoch = st.Epoch
	if p.acked != nil {
		cursor := st.Cursors[f.inc]
		if cursor.Seq < f.seq {
			return
		}
		if st.Decided > cursor.Round { // not just before, but with it or after
			f.epoch--
		}
	}
	f.open = false
	r.publishLocked()
}

// cutOff is a tick without the Store: shares stay or fall, never rise. What was counted since the last document goes on
// being judged, and a rollback it calls for is in force here at once.
func (r *Rollout) cutOff(ctx context.Context, c *clock) {
	r.mu.Lock()
	st, standing := r.known, r.standing
	if r.o.Lease > 0 && r.now().Sub(c.loaded) > r.o.Lease && !r.stale {
		r.stale = true
		r.publishLocked()
	}
	followed := r.now().Sub(r.since)
	latched := st != nil && r.latchedLocked(st)
	r.mu.Unlock()
	if st == nil || standing != machine.Current || st.Phase.Latched() || latched || ctx.Err() != nil {
		return
	}
	at, p := r.now(), &r.pub
	in := r.input(at)
	in.Elapsed, in.MayAdvance = at.Sub(c.alone.at), false
	if c.alone.from != st || c.alone.sent != p.acked {
		in.Elapsed = st.Account(followed)
		c.alone = alone{from: st, sent: p.acked, st: st.Clone()}
		c.alone.st.Consumed = tally.Ledger{}
		if p.acked != nil {
			closed := int64(st.Clock + in.Elapsed - at.Sub(p.sent))
			for _, s := range p.acked.Series {
				c.alone.st.Consumed[s.Key] = &tally.Taken{Counts: s.Counts, Seen: s.Counts.Sum(1), Ahead: s.Events, Closed: closed}
			}
		}
	}
	next := c.alone.st.Clone()
	ours := p.gen == st.Gen && p.nonce == st.Nonce // what is published, and what is counted since
	others := st.Live
	if ours && p.confirmed {
		others = max(others-1, 0) // this process is one of them
	}
	plan := *r.plan
	plan.Judge = r.plan.Judge.Among(others + 1) // each of so many may be cut off, and judge
	if ours {
		sum := &tally.Sum{}
		sum.Add(r.unpublished(st))
		if machine.Take(next, &plan, machine.Gathered{Sum: sum, Form: r.formOf, Share: r.shareOf(next), Alarm: c.alarm}, &in) != nil {
			return
		}
	}
	r.addSources(next, &in)
	in.Rationales = r.rationales() // after the counts: each is kept before it is counted
	events := machine.Step(next, &plan, in)
	next.Elapsed, next.Baked, next.Quiet = st.Elapsed, st.Baked, st.Quiet // the time without the Store is not the stage's
	c.alone.st, c.alone.at = next, at
	switch {
	case next.Phase.Latched() && others == 0: // there is nobody else
		found := next.Incident
		r.logger().Error("rollout: rolled back here; the Store cannot be told yet", "rollout", r.name, "gate", found.Gate, "cause", found.Note)
		r.latchHere(&intent{gen: st.Gen, note: found.Note, incident: found})
		r.revokeHere(st.Gen)
	case next.Phase.Latched(), next.Epoch != st.Epoch: // whatever takes share away takes all of it: the others know of no other share
		gate, note := "", ""
		for _, e := range events {
			if e.Gate != "" {
				gate, note = e.Gate, e.Note
			}
		}
		r.logger().Error("rollout: the candidate is out of use here, until the evidence of this process is judged with that of all", "rollout", r.name, "gate", gate, "cause", note)
		r.mu.Lock()
		r.fork = fork{gen: st.Gen, open: true, epoch: st.Epoch}
		r.publishLocked()
		r.mu.Unlock()
	}
}
