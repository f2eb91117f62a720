// Package force lets package rollouttest force decisions, without a way for others to do so.
package force

import "context"

// Package rollout sets these when it is initialised. r is always a *rollout.Rollout, and cohort one of its Cohorts; they
// are loose here because this package cannot import that one.
var (
	// Rollout forces every new decision of r until release is called. What was forced last, and not released, holds.
	Rollout func(r any, cohort uint8) (release func())
	// Context returns a context in which every decision of r is forced.
	Context func(ctx context.Context, r any, cohort uint8) context.Context
)
