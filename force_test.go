package rollout

import (
	"context"
	"testing"
	"time"
)

// A live rollout that is forced for a while counts nothing of it, loses nothing of before, and goes on where it is.
func TestForcedLiveRollout(t *testing.T) {
	for _, c := range []Cohort{None, Control, Candidate} {
		r := running(t, "live")
		u := keyOf(t, r, Candidate)
		before := r.Decide(u)
		release := r.force(c)
		for _, d := range []Decision{r.Decide(u), r.Decide(Unit{}), r.Peek(u), r.DecideContext(NewContext(t.Context(), u))} {
			if d.Cohort() != c || d.Reason() != ReasonForced {
				t.Errorf("%v, %v", d.Cohort(), d.Reason())
			}
			d.Record(Errors.Observe(true), Latency.Observe(time.Second))
		}
		f := func(context.Context) error { return nil }
		if err := r.Do(t.Context(), u, f, f); err != nil {
			t.Error(err)
		}
		if r.Status().Late != 0 || r.Status().NoUnit != 0 {
			t.Errorf("%+v", r.Status())
		}
		before.Record(Errors.Observe(false), Latency.Observe(time.Second)) // a real one goes on counting
		wantTally(t, r, once(Candidate, 1, 0))
		release()
		if after := r.Peek(u); after.at != before.at.uncounted() || after.bits != before.bits {
			t.Errorf("afterwards %v, %v", after.Cohort(), after.Reason())
		}

		release = r.force(c)
		share(t, r, 0)
		release()
		if d := r.Decide(u); d.Enabled() || d.Reason() != ReasonOff && d.Reason() != ReasonSplit {
			t.Errorf("a share that was set meanwhile is not in force: %v, %v", d.Cohort(), d.Reason())
		}
	}
}
