package rollout

import (
	"context"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

// A document has all that its incarnation has counted of two epochs, so that it grows by the digits of its counts, and by
// epochs. One that becomes too long is sealed by its own process, which goes on as another incarnation: what was published
// is folded into the state, as that of the dead is.

// fullBytes is how long a document may become: with the next one, which says but what is open, 8 KiB in a tick.
const fullBytes = 8<<10 - 512

// How often a process seals its document within some ticks. Each time is a line in the state, of who is retired, for about
// as long. Where there are more than sealsFor processes they do it as much less often.
const (
	mostSeals  = 8
	sealsFor   = 1000
	sealsTicks = 720
)

// full reports whether a document is to be sealed as it was published last, rather than be replaced by d. Not one that may
// have been folded and made once more, nor where what is published is awaited: that of a fork, or of an event that was acted
// on before its outcome is published.
func (r *Rollout) full(st *machine.State, d *tally.Doc) bool {
	p := &r.pub
	if !r.shared || p.acked == nil || len(p.acked.Series) == 0 || st.Phase.Latched() || p.repeated && !p.confirmed || len(d.Encode()) <= r.fullBytes {
		return false
	}
	for i := range p.acked.Series {
		s := &p.acked.Series[i]
		if f, ok := r.formOf(s.Metric); ok && f.Never && f.Size() == s.Cells && s.Events > events(s.Counts, f) {
			return false
		}
	}
	r.mu.Lock()
	forked := r.fork.open
	r.mu.Unlock()
	if forked {
		return false
	}
	now := r.now()
	for len(r.seals) > 0 && now.Sub(r.seals[0]) >= sealsTicks*r.o.Interval {
		r.seals = r.seals[1:]
	}
	return len(r.seals) < max(mostSeals*sealsFor/max(st.Live, sealsFor), 1)
}

// seal publishes what was published once more, and for good. Work that is open goes over to the next incarnation, which
// says so at once: who waits for this process, or for its work, goes on waiting. Between the two writes nobody does: of a
// process that dies there, open work is not lost but forgotten. What was counted since comes at the next tick. An error means
// that it is not known whether both are stored.
func (r *Rollout) seal(ctx context.Context, st *machine.State) error {
	p := &r.pub
	d := *p.acked
	d.Open, d.Sealed = nil, true
	p.seq++
	d.Seq = p.seq
	p.pending = &d
	r.seals = append(r.seals, r.now())
	inc := p.inc
	if err := r.send(ctx); err != nil || p.inc == inc || p.gen != st.Gen || p.nonce != st.Nonce {
		return err
	}
	p.seq++
	p.pending = &tally.Doc{About: tally.About{Inc: p.inc, Birth: p.birth, Seq: p.seq, Open: r.sessions.open(st.Gen)}}
	return r.send(ctx)
}
