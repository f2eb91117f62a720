package machine

import (
	"slices"
	"time"
)

// Rejoin squares a stored state that is older than the newest one known, because the store was set back, with what is
// known: a rollback of either holds, and so does a Hold that is known; no share is above that of either, counters go on from
// the greater, and whoever runs steps takes them over anew. Evidence consumed in between is lost, both cohorts alike, and none
// counts twice.
func Rejoin(stored, known *State, p *Plan, nonce string, now time.Time) (*State, []Event) {
	if stored == nil {
		stored = known
	}
	s := stored.Clone()
	if stored.Gen < known.Gen || Raises(known, stored) || known.Phase.Latched() {
		s = known.Clone()
		if stored.Gen == known.Gen {
			s.Gates = stored.Gates.Clone() // what is known may be a head alone
		}
	}
	m := move{State: s, p: p, now: now}
	s.Gen, s.Ver = max(stored.Gen, known.Gen), max(stored.Ver, known.Ver)+1
	s.Epoch, s.Round = max(stored.Epoch, known.Epoch), max(stored.Round, known.Round)
	s.Term, s.Runner = max(stored.Term, known.Term)+1, "" // whoever runs steps has to take them over: two may have the same term
	s.Effects, s.Settled = stored.Effects || known.Effects, max(stored.Settled, known.Settled)
	if s.Phase == Pending || s.Phase == Running || s.Phase == Held { // whether effects are to stay is open again
		s.Settled = min(s.Settled, s.Gen-1)
	}
	for _, w := range slices.Concat(stored.Waives, known.Waives) {
		if !slices.Contains(s.Waives, w) && s.waived() < MaxWaives {
			s.Waives = append(s.Waives, w)
		}
	}
	s.Nonce = nonce
	// A clean cut: no document of before is read again, and every process begins to count anew.
	s.Consumed, s.Cursors, s.Retired, s.Lost = nil, nil, nil, nil
	s.Oldest, s.Floor, s.Since, s.Marks = 0, 0, 0, nil
	if stored.Gen == known.Gen {
		for _, ring := range slices.Concat(stored.Rings, known.Rings) {
			if !slices.Contains(s.Rings, ring) {
				s.Rings = append(s.Rings, ring)
				if s.Effects && !s.Phase.Latched() {
					m.undoAlso(ring)
				}
			}
		}
		if stored.Phase.Latched() && !s.Phase.Latched() {
			m.rollback(stored.Incident)
		}
	}
	if s.Phase == Running && known.Phase == Held && known.Gen == s.Gen && known.Hold != nil {
		m.hold(*known.Hold, nil)
	}
	if s.Phase == Running && slices.Contains(s.Rings, s.Stage.Ring) {
		m.hold(HoldCause{Kind: HeldByRings, Note: s.Stage.Ring + " is rolled back"}, nil)
	}
	if s.Phase == Running || s.Phase == Held {
		s.Gates.ResetProof()
		m.reshare()
		s.Entered = s.Epoch
	}
	m.event(Event{Kind: WentBack})
	return s, m.events
}
