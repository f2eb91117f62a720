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

// full reports whether a document is to be sealed as it was published last, rather than be replaced by d.
func (r *Rollout) full(st *machine.State, d *tally.Doc) bool {
	if !r.shared || r.pub.acked == nil || len(r.pub.acked.Series) == 0 || st.Phase.Latched() || len(d.Encode()) <= r.fullBytes {
		return false
	}
	now := r.now()
	for len(r.seals) > 0 && now.Sub(r.seals[0]) >= sealsTicks*r.o.Interval {
		r.seals = r.seals[1:]
	}
	return len(r.seals) < max(mostSeals*sealsFor/max(st.Live, sealsFor), 1)
}

// seal publishes what was published once more, and for good. Work that is open goes over to the next incarnation, which
// says so at once: who waits for this process, or for its work, goes on waiting. What was counted since comes at the next
// tick. An error means that it is not known whether it is sealed.
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
