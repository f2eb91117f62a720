package machine

import (
	"fmt"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
)

// pass lets the stage's time go by. A bake counts from the first outcome, and only up to an outcome: a gap is credited
// when it ends, with no more than a tenth of the bake and no more than twelve ticks.
func (m *move) pass(i int, in Input) {
	st := &m.p.Stages[i]
	passed := m.p.passed(in.Elapsed)
	m.Elapsed += passed
	m.Quiet += passed
	if !slices.ContainsFunc(in.Outcomes, func(ring string) bool { return m.reached(ring, st) }) {
		return
	}
	if m.Seen {
		m.Baked += min(m.Quiet, max((st.Over+st.Bake)/10, m.p.Tick), 12*m.p.Tick)
	}
	m.Seen, m.Quiet = true, 0
}

// climb raises the share of a climbing stage to where its time has come, and reports whether it did.
func (m *move) climb(i int) bool {
	st := &m.p.Stages[i]
	steps := st.climb()
	if m.Climb == 0 || m.Climb >= steps {
		return false
	}
	due := min(steps, 1+int(m.Baked/(st.Over/time.Duration(steps)+1)))
	if due <= m.Climb {
		return false
	}
	m.Climb = due
	m.Reach[st.Ring] = m.From + (st.Percent-m.From)*float64(due)/float64(steps)
	if due == steps {
		m.Reach[st.Ring] = st.Percent
	}
	m.reshare()
	m.event(Event{Kind: Climbed, Ring: st.Ring})
	return true
}

// ready reports whether stage i may be left: baked, its gates silent, its proof given, its approval there.
func (m *move) ready(i int, results []judge.Result) bool {
	st := &m.p.Stages[i]
	if !m.Seen || m.Baked < st.Over+st.Bake || st.climb() > m.Climb || st.Approval && !m.Approved {
		return false
	}
	for g, r := range results {
		if st.Armed[g] && r.Verdict == judge.Unhealthy && r.Action != judge.Report {
			return false
		}
	}
	return !m.asks(i) || m.proven(i, results)
}

// asks reports whether stage i wants proof.
func (m *move) asks(i int) bool {
	st := &m.p.Stages[i]
	return st.Proof && !(st.Last && m.Proved)
}

// proven reports whether every gate that can prove in stage i has done so, and there is one.
func (m *move) proven(i int, results []judge.Result) bool {
	st := &m.p.Stages[i]
	some := false
	for g, r := range results {
		if !st.Armed[g] || !r.Spec.CanProve() || !st.Control && !r.Spec.Absolute() {
			continue
		}
		if !r.Proved {
			return false
		}
		some = true
	}
	// A stage that only an approval can prove is left to the approval.
	return some || st.Approval
}

// promote leaves stage i for the next one whose ring is not rolled back.
func (m *move) promote(i int, note string) {
	st := &m.p.Stages[i]
	if m.Climb == 0 && m.Reach[st.Ring] < st.Percent && !slices.Contains(m.Rings, st.Ring) {
		m.enter(i, StageEntered, note) // an edited policy left it below its own share
		return
	}
	if note == "" && m.asks(i) {
		m.Proved = true
	}
	m.enterFrom(i+1, note)
}

// enterFrom enters the first stage from i on whose ring is not rolled back; behind the last it completes.
func (m *move) enterFrom(i int, note string) {
	for ; i < len(m.p.Stages); i++ {
		if !slices.Contains(m.Rings, m.p.Stages[i].Ring) {
			m.enter(i, StageEntered, note)
			return
		}
	}
	if slices.Contains(m.Rings, m.p.Rings[len(m.p.Rings)-1]) {
		m.hold(HoldCause{Kind: HeldByRings, Note: "every ring that is left is rolled back"}, nil)
		return
	}
	m.complete(note)
}

func (m *move) complete(note string) {
	from := m.Phase
	last := m.p.Stages[len(m.p.Stages)-1]
	m.Reach[last.Ring] = last.Percent
	m.phase(Completed)
	m.reshare()
	for i := range m.Versions {
		if m.Versions[i].Version == m.Version {
			m.Versions[i].Completed = true
		}
	}
	m.settle()
	m.event(Event{Kind: WasCompleted, Note: note, From: from, To: Completed})
}

func (m *move) deadline(i int) {
	note := fmt.Sprintf("no verdict in %v", m.p.Stages[i].Deadline)
	if m.p.OnDeadline == judge.Rollback && !m.p.Stages[i].Irreversible {
		m.rollback(m.incident(nil, note))
		return
	}
	m.hold(HoldCause{Kind: HeldByDeadline, Note: note}, nil)
}
