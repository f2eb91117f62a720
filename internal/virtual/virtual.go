// Package virtual lets package simulate run a rollout in virtual time, without a way for others to do so.
package virtual

import (
	"context"
	"time"
)

// New is set by package rollout when it is initialised. policy is a rollout.Policy; it is loose here, as the types below
// are, because this package cannot import that one.
var New func(name string, policy any, s Setup) (Process, error)

// Setup is what a Process runs on.
type Setup struct {
	Interval   time.Duration // between two ticks; 0: the default
	Dither     func() uint32 // even chances, for what is rounded by chance
	MayAdvance bool          // Policy.MayAdvance is asked
	Sources    any           // of metrics measured elsewhere, a map[string]rollout.Source; nil: none
}

// Process is the Run of one rollout, one tick at a time and in the caller's goroutine. Time stands still but for At.
// Logs, rollback steps and OpenTelemetry are off. It is not safe for concurrent use.
type Process interface {
	// Rollout is the *rollout.Rollout. Its Run returns ErrRunning.
	Rollout() any
	// Interval is the time between two ticks.
	Interval() time.Duration
	// Start is where its time begins. It comes before all that follows.
	Start(now time.Time)
	// At sets the clock.
	At(now time.Time)
	// Tick is one evaluation at the present time, with the Checks asked and the Sources read before. In the last one every block closes.
	Tick(ctx context.Context, last bool) error
	// Woken reports whether Run would make a tick now instead of at its time: an event of a Never gate, or a verb.
	Woken() bool
	// Events returns what happened since the last call, as a []rollout.Event.
	Events() any
	// Force counts a decision of the given cohort that was made elsewhere as if it had been made here, and writes it to
	// decision, a *rollout.Decision. It is of cohort None where the unit's ring has nobody of that cohort at present.
	Force(key string, groups []string, cohort uint8, decision any)
}
