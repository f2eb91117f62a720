package rollout

import (
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/stagedrollout/rollout/internal/machine"
)

// UnitCount is about how many different units came in a generation, by cohort: in one process, since it started. The
// standard error is about 1 %. A unit whose cohort changed counts in both.
type UnitCount struct {
	Candidate uint64 `json:"candidate"`
	Control   uint64 `json:"control"`
}

func unitCounts(units map[string][2]uint64) map[string]UnitCount {
	if units == nil {
		return nil
	}
	public := make(map[string]UnitCount, len(units))
	for ring, n := range units {
		public[ring] = UnitCount{Control: n[0], Candidate: n[1]}
	}
	return public
}

// unitsLocked are how many units came in the present generation, by ring, of the control and of the candidate; nil if none
// did.
func (r *Rollout) unitsLocked() map[string][2]uint64 {
	if r.life == nil || r.known == nil || r.life.gen != r.known.Gen {
		return nil
	}
	var all map[string][2]uint64
	for i, ring := range r.plan.Rings {
		n := [2]uint64{r.life.units[i].count(0), r.life.units[i].count(1)}
		if n == [2]uint64{} {
			continue
		}
		if all == nil {
			all = map[string][2]uint64{}
		}
		all[ring] = n
	}
	return all
}

// Exposure is whom a generation's candidate was given to: what decides who is in, and the history of shares. It survives
// JSON but for Match: there what a unit's Groups contain decides.
type Exposure struct {
	Salt     string        `json:"salt"`
	Holdback Percent       `json:"holdback"`
	Rings    []string      `json:"rings"`   // innermost first; the last is Everyone
	Changes  []ShareChange `json:"changes"` // the oldest first
	// Slack is how far the clocks and the news of a change may be apart: by so much a time in question may be off. It is two
	// ticks and a minute.
	Slack time.Duration `json:"slack"`
	// Grace is for how long a session might go on with the candidate once that was taken away: SessionPolicy.Grace, 0 with
	// AtOnce. Negative: until it ends, as with [UntilEnd].
	Grace time.Duration `json:"grace"`

	// Match are those of rings that have one.
	Match map[string]func(Unit) bool `json:"-"`
}

// ShareChange is what was in force from its Time on.
type ShareChange struct {
	Time   time.Time          `json:"time"`
	Shares map[string]Percent `json:"shares"`        // of each ring
	All    bool               `json:"all,omitempty"` // also units that are held back: Completed
}

// exposure is whom the state's candidate was given to.
func (r *Rollout) exposure(st *machine.State) *Exposure {
	e := &Exposure{
		Salt: st.Salt, Holdback: Percent(st.Holdback), Rings: slices.Clone(r.plan.Rings),
		Slack: 2*r.o.Interval + time.Minute, Grace: r.policy.Sessions.grace(),
	}
	if r.policy.Sessions.OnRollback == UntilEnd {
		e.Grace = -1
	}
	if e.Salt == "" { // written before it was kept
		e.Salt, e.Holdback = r.policy.Salt, r.policy.Holdback
	}
	for _, ring := range r.policy.Rings {
		if ring.Match == nil {
			continue
		}
		if e.Match == nil {
			e.Match = map[string]func(Unit) bool{}
		}
		e.Match[ring.Name] = ring.Match
	}
	for _, c := range st.History {
		shares := make(map[string]Percent, len(c.Shares))
		for ring, p := range c.Shares {
			shares[ring] = Percent(p)
		}
		e.Changes = append(e.Changes, ShareChange{Time: c.At, Shares: shares, All: c.All})
	}
	return e
}

// WasExposed reports whether the unit was given the candidate, or may have been, at any time around at that the clocks of
// the processes and the news of a change leave open: see [Exposure]. It is computed from the unit's bucket and the history
// of shares; nothing was logged, and whether the unit really came nobody knows. So walk your own table of users with the
// times of what they did, and repair what this says true for. Without an Exposure it is false.
//
// It is false before the candidate's generation began, and once the rollback and the grace of sessions are over. It is wrong
// for a process that was cut off from the Store for longer than the slack, and for a ring that the unit was in then and is
// not now.
//
// A session that began earlier keeps the candidate when its unit's share is lowered to nothing, and goes on with it until
// it ends, or until a rollback and its grace: of that this knows nothing, because who has sessions is nowhere kept. For what
// was done in a session, ask with the time at which the session began. With [UntilEnd] that is not needed: whoever was once
// exposed is so from then on.
func (in Incident) WasExposed(u Unit, at time.Time) bool {
	e := in.Exposure
	if e == nil {
		return false
	}
	from, to := at.Add(-e.Slack).Add(-e.Grace), at.Add(e.Slack)
	for i, c := range e.Changes {
		if c.Time.After(to) {
			break
		}
		if e.Grace >= 0 && i+1 < len(e.Changes) && e.Changes[i+1].Time.Before(from) {
			continue // over by then
		}
		if e.has(u, c) {
			return true
		}
	}
	return false
}

// has reports whether a unit has the candidate by shares.
func (e *Exposure) has(u Unit, c ShareChange) bool {
	share := c.Shares[e.ringOf(u)]
	switch {
	case share <= 0:
		return false
	case c.All, share == 100 && e.Holdback == 0:
		return true
	case u.Key == "":
		return false
	}
	bucket := bucketOf(xxhash.Sum64String(e.Salt), xxhash.Sum64String(u.Key))
	in := share == 100 || bucket < share.threshold()
	return in && (e.Holdback == 0 || bucket < -e.Holdback.threshold())
}

func (e *Exposure) ringOf(u Unit) string {
	for i, ring := range e.Rings {
		if i == len(e.Rings)-1 {
			break
		}
		if match := e.Match[ring]; match == nil && u.contains(ring) || match != nil && matchSafely(match, u) {
			return ring
		}
	}
	return Everyone
}

// matchSafely is a Match of which a panic is no match.
func matchSafely(match func(Unit) bool, u Unit) (ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	return match(u)
}
