package rollout

import (
	"slices"

	"github.com/stagedrollout/rollout/internal/machine"
)

func (r *Rollout) standingNow() machine.Standing {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.standing
}

// latchedLocked reports whether this process must not expose the candidate of the state, as it stands to it.
func (r *Rollout) latchedLocked(st *machine.State) bool {
	gen := st.Gen
	if r.standing == machine.Done {
		gen = r.ownGenLocked(st)
	}
	return r.latch[gen] || r.latchAny || r.fork.holds(st)
}

// ownGenLocked is the generation of this process's version, where it serves an earlier one's.
func (r *Rollout) ownGenLocked(st *machine.State) uint64 {
	for _, e := range st.Versions {
		if e.Version == r.plan.Version {
			return e.Gen
		}
	}
	return st.Gen
}

// publishLocked swaps what decisions see, if it is no longer what the state asks for.
func (r *Rollout) publishLocked() {
	if r.forced != nil {
		return
	}
	everyone := len(r.plan.Rings) - 1
	st := r.known
	view := snapKey{}
	if st != nil {
		view = snapKey{gen: st.Gen, epoch: st.Epoch, version: st.Version}
	}
	switch {
	case r.latchAny, st != nil && r.latchedLocked(st):
		view.answer = pack(false, None, ReasonRolledBack, everyone, 0)
	case st == nil:
		view.answer = pack(false, None, ReasonNotLoaded, everyone, 0)
	case r.standing == machine.Done:
		view.answer = pack(true, None, ReasonCompleted, everyone, 0)
	case r.standing == machine.Passive:
		view.answer = pack(false, None, ReasonVersion, everyone, 0)
	case r.stale && st.Phase != machine.Completed:
		view.answer = pack(false, None, ReasonNotLoaded, everyone, 0)
	}
	if r.view == view && st != nil {
		return
	}
	r.view = view
	if view.answer != 0 {
		s := r.fixedSnapshot(st, view.answer)
		if r.standing == machine.Done && view.answer&enabledBit != 0 {
			s.gen, s.version = r.ownGenLocked(st), r.plan.Version
		}
		r.openLocked(s.leashLocked())
	} else {
		s := r.snapshotLocked(st.Gen, st.Epoch, st.Version)
		if s == nil {
			s = r.newSnapshot(st).leashLocked()
		}
		r.openLocked(s)
	}
}

// snapshotLocked is the snapshot that was made of an epoch before something else was answered meanwhile; nil if there is
// none. An epoch has one set of cells, whatever comes in between.
func (r *Rollout) snapshotLocked(gen, epoch uint64, version string) *snapshot {
	for _, l := range r.ledgers {
		if l.snap.gen == gen && l.snap.epoch == epoch && l.snap.version == version {
			return l.snap
		}
	}
	return nil
}

// snapKey names what a snapshot was made of.
type snapKey struct {
	gen, epoch uint64
	version    string
	answer     bits // for everybody, whatever the state says; 0: as the state says
}

// maxLedgers bounds the epochs whose evidence waits to be consumed.
const maxLedgers = 32

// openLocked makes s what decisions see. The evidence of the epoch before still comes in; what is older, or of a candidate
// that is rolled back or completed, is what it is: what was once published must not become less. That of another generation
// counts no more.
func (r *Rollout) openLocked(s *snapshot) {
	counts := r.known != nil && (r.known.Phase == machine.Running || r.known.Phase == machine.Held) && !r.latchedLocked(r.known)
	var keep []*ledger
	var again *ledger
	r.ledgers = slices.DeleteFunc(slices.Clone(r.ledgers), func(l *ledger) bool {
		if l.snap == s {
			again = l
		}
		return l.snap == s
	})
	for i, l := range r.ledgers {
		if r.known == nil || l.snap.gen != r.known.Gen || len(r.ledgers)-i >= maxLedgers {
			r.retireLocked(l)
			continue
		}
		if !counts || i < len(r.ledgers)-1 {
			l.snap.over.Store(true)
		}
		keep = append(keep, l)
	}
	switch {
	case again != nil:
		s.over.Store(false)
		keep = append(keep, again)
	case !s.never:
		keep = append(keep, newLedger(s))
	}
	r.ledgers = keep
	r.showLocked(s)
}

// sweepLocked drops the ledgers whose evidence counts no more.
func (r *Rollout) sweepLocked(st *machine.State) {
	if !slices.ContainsFunc(r.ledgers, func(l *ledger) bool { return l.snap.gen == st.Gen && l.snap.epoch < st.Oldest }) {
		return
	}
	r.ledgers = slices.DeleteFunc(slices.Clone(r.ledgers), func(l *ledger) bool {
		if l.snap.gen != st.Gen || l.snap.epoch >= st.Oldest {
			return false
		}
		r.retireLocked(l)
		return true
	})
}

// snapshotOf is the snapshot of an epoch, for a parsed decision.
func (r *Rollout) snapshotOf(gen, epoch uint64) *snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.ledgers {
		if l.snap.gen == gen && l.snap.epoch == epoch {
			return l.snap
		}
	}
	s := r.fixedSnapshot(nil, 0)
	s.gen, s.epoch = gen, epoch
	if r.known != nil && r.known.Gen == gen {
		s.version = r.known.Version
	}
	return s
}
