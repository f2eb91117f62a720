package machine

import (
	"slices"
	"time"
)

// generation begins a new one with the plan's version.
func (m *move) generation(nonce, note string) {
	from := m.Phase
	p := m.p
	versions := slices.Clone(m.Versions)
	for i := range versions {
		if versions[i].Version == m.Version {
			versions[i].Starts = m.Gates.Starts
		}
	}
	at := slices.IndexFunc(versions, func(e VersionEntry) bool { return e.Version == p.Version })
	seen := at >= 0
	if !seen {
		versions = append(versions, VersionEntry{Version: p.Version})
		if extra := len(versions) - MaxVersions; extra > 0 {
			versions = slices.Delete(versions, 0, extra)
		}
		at = len(versions) - 1
	}
	versions[at] = VersionEntry{Version: p.Version, Gen: m.Gen + 1, Starts: versions[at].Starts}
	*m.State = State{
		Format: Format, Name: m.Name,
		Gen: m.Gen + 1, Nonce: nonce, Ver: m.Ver + 1, Epoch: m.Epoch, Round: m.Round, Term: m.Term,
		Version: p.Version, Versions: versions,
		Policy: p.Policy, Assignment: p.Assignment, Undoes: p.Steps, Salt: p.Salt, Holdback: p.Holdback,
		Notes: m.Notes, Recent: m.Recent, Live: m.Live,
		Effects: p.Undoes || m.Effects && m.Settled < m.Gen, Settled: m.Settled, Steps: m.undoing(), Waives: m.unsettled(),
	}
	if seen { // a candidate that was judged before is judged again: its bound pays for both
		m.Gates.Starts = versions[at].Starts
		m.Gates.Anew()
	}
	m.reshare()
	m.event(Event{Kind: Started, Note: note, From: from, To: Pending})
}

// Standing says how a process with its own plan stands to the state.
type Standing uint8

// How a process may stand to the state.
const (
	Current  Standing = iota // it runs the candidate that the state is about
	Passive                  // it runs an earlier candidate, or one that has to wait: stable, and no verdicts
	Done                     // it runs an earlier candidate that was completed: everybody has it
	Follower                 // it runs the candidate with an older policy: the shares are served, and no verdicts
)

// Stands says how a process with plan p stands to the state as it is.
func Stands(s *State, p *Plan) Standing {
	if s.Version == p.Version {
		if s.Assignment != p.Assignment && (s.Phase == Running || s.Phase == Held) {
			return Passive // until a generation with the new assignment begins
		}
		return Current
	}
	for _, e := range s.Versions {
		if e.Version == p.Version && !e.Completed {
			return Passive
		}
		if e.Version == p.Version {
			return Done
		}
	}
	if s.Phase == Completed {
		return Done // it will be adopted
	}
	return Passive
}

// Yields is how a process stands to a state that another one, of the same version, has given another policy.
func Yields(s *State, p *Plan) Standing {
	if s.Assignment != p.Assignment && s.Phase != Completed && !s.Phase.Latched() {
		return Passive
	}
	return Follower
}

// Adopt squares the state with a process's plan: a new version starts a generation, an edited policy finds its stage. It
// raises no share. nonce names the generation it may start.
func Adopt(s *State, p *Plan, nonce string, now time.Time) (Standing, []Event) {
	m := move{State: s, p: p, now: now}
	if s.Version != p.Version {
		if slices.ContainsFunc(s.Versions, func(e VersionEntry) bool { return e.Version == p.Version }) {
			return Stands(s, p), nil
		}
		switch s.Phase {
		case RollingBack, Stuck:
			return Passive, nil
		case Completed:
			m.Version, m.Policy, m.Assignment, m.Undoes = p.Version, p.Policy, p.Assignment, p.Steps
			m.Versions = append(slices.Clone(m.Versions), VersionEntry{Version: p.Version, Gen: m.Gen, Completed: true})
			m.Ver++
			m.event(Event{Kind: VersionAdopted, Note: p.Version})
			return Current, m.events
		}
		m.generation(nonce, "version "+p.Version)
		return Current, m.events
	}
	if s.Policy == p.Policy && s.Assignment == p.Assignment {
		return Current, nil
	}
	m.edited(nonce)
	return Current, m.events
}

// edited squares the state with another policy of the same version.
func (m *move) edited(nonce string) {
	assignment := m.Assignment != m.p.Assignment
	m.Policy, m.Assignment = m.p.Policy, m.p.Assignment
	if !m.Phase.Latched() {
		m.Undoes, m.Effects = m.p.Steps, m.Effects || m.p.Undoes && m.Phase != Completed
	}
	switch {
	case m.Phase == Completed || m.Phase.Latched() || m.Stage == (StageRef{}):
		m.Shares = m.p.shares(m.State)
		m.event(Event{Kind: PolicyEdited})
		return
	case assignment:
		m.generation(nonce, "other rings, salt or holdback")
		return
	}
	i := m.restage()
	m.Stage = m.p.Stages[i].StageRef
	m.Climb, m.From = 0, 0
	if steps := m.p.Stages[i].climb(); steps > 0 { // it climbs on from where it is
		m.Climb, m.From = 1, m.within(m.Stage.Ring)
		if m.From >= m.Stage.Percent {
			m.Climb = steps
		}
	}
	m.Proved = false
	m.p.Judge.Prune(&m.Gates)
	m.fresh()
	m.reshare()
	m.event(Event{Kind: PolicyEdited, Ring: m.Stage.Ring})
	if m.Phase == Running && slices.Contains(m.Rings, m.Stage.Ring) {
		m.hold(HoldCause{Kind: HeldByRings, Note: m.Stage.Ring + " is rolled back"}, nil)
	}
}

// restage is the first stage of the present one's ring that is not below the ring's present share; where there is none,
// the last of that ring, or else the first one of a ring around it.
func (m *move) restage() int {
	last := -1
	for i, st := range m.p.Stages {
		if st.Ring != m.Stage.Ring {
			continue
		}
		if last = i; st.Percent >= m.Reach[st.Ring] {
			return i
		}
	}
	if last >= 0 {
		return last
	}
	for i, st := range m.p.Stages {
		if m.p.ring(st.Ring) > m.p.ring(m.Stage.Ring) {
			return i
		}
	}
	return len(m.p.Stages) - 1
}
