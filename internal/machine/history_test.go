package machine

import (
	"testing"
	"time"
)

// TestHistoryGoesOn: the times of the recorded shares never go back, even if the clock does, as it may from one process to the
// next: what changed by a clock that is behind changed no earlier than what came before it. A new generation records anew.
func TestHistoryGoesOn(t *testing.T) {
	s, p := undoing(t)
	at := func(minutes int) time.Time { return epoch0.Add(time.Duration(minutes) * time.Minute) }
	verb := func(v Verb) func(time.Time) {
		return func(now time.Time) {
			v.Now = now
			if _, err := Apply(s, p, v); err != nil {
				t.Fatal(err)
			}
		}
	}
	set := func(percent float64) func(time.Time) {
		return verb(Verb{Name: VerbSetPercent, Ring: "everyone", Percent: percent})
	}
	for i, c := range []struct {
		change  func(time.Time)
		by, at  int // minutes, of the clock and as recorded
		changes int
	}{
		{set(5), 10, 10, 2},
		{set(6), 4, 10, 3},
		{set(7), -60, 10, 4},
		{set(8), 10, 10, 5},
		{set(9), 11, 11, 6},
		{verb(ringBack("staff")), 2, 11, 7},
		{verb(rollBack), 3, 11, 8},
		{verb(waiving("one")), 3, 11, 8},
		{verb(waiving(UndoStep)), 3, 11, 8},
		{verb(startAgain), 5, 5, 1},
		{func(now time.Time) { Step(s, p, Input{MayAdvance: true, Now: now}) }, 1, 5, 2},
	} {
		c.change(at(c.by))
		last := s.History[len(s.History)-1]
		if len(s.History) != c.changes || !last.At.Equal(at(c.at)) || last.Epoch != s.Epoch {
			t.Errorf("%d: %d changes, the last at %v, not %d at %v", i, len(s.History), last.At, c.changes, at(c.at))
		}
		for j := 1; j < len(s.History); j++ {
			if s.History[j].At.Before(s.History[j-1].At) {
				t.Errorf("%d: the history goes back from %v to %v", i, s.History[j-1].At, s.History[j].At)
			}
		}
	}
}
