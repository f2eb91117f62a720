package rollout

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestUndoAndTheEffect: whether an effect that is being made when the candidate is rolled back is made before it is undone.
// A session that goes on is waited for; a decision by itself is not, nor is a session that was reconfigured.
func TestUndoAndTheEffect(t *testing.T) {
	for name, c := range map[string]struct {
		session, reconfigure bool
		undone               []string // by the time it is made
	}{
		"in a session":            {session: true},
		"in one that was moved":   {session: true, reconfigure: true, undone: []string{"one"}},
		"of a decision by itself": {undone: []string{"one"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := warded(t, nil)
				u := w.of(Candidate)
				d, end := w.Decide(u), func() {}
				var s *Session
				if c.session {
					_, s = w.Begin(t.Context(), u)
					d, end = s.Decision(), func() { s.End(nil) }
				}
				w.journal(d, "one")
				must(t, w.Rollback(t.Context(), "stop"))
				if c.reconfigure {
					s.Reconfigured()
				}
				time.Sleep(20 * time.Second) // the effect is made
				synctest.Wait()
				if got := w.undone(); !slices.Equal(got, c.undone) {
					t.Errorf("undone by then: %q, not %q", got, c.undone)
				}
				end()
				minute()
				w.is(RolledBack, "")
				w.wants("one")
			})
		})
	}
}

// TestJournalOfMoved: once a session was reconfigured its decision is off and journals nothing. The one that the turn
// began with is refused.
func TestJournalOfMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warded(t, nil)
		_, s := w.Begin(t.Context(), w.of(Candidate))
		turn := s.Decision()
		must(t, w.Rollback(t.Context(), "stop"))
		s.Reconfigured()
		if err := turn.Journal(t.Context(), "order", nil); !errors.Is(err, ErrRolledBack) {
			t.Errorf("of the turn's decision: %v", err)
		}
		if err := s.Decision().Journal(t.Context(), "order", nil); err != nil || w.left() != 0 {
			t.Errorf("of the session's decision: %v, %d in the journal", err, w.left())
		}
		s.End(nil)
	})
}
