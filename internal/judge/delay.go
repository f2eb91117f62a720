package judge

import (
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
)

// ControlQuantile returns the upper end of the cell that the q-quantile of a Timing fell into lately, of the control in a
// ring; ok is false while nothing is remembered of it.
func (st *State) ControlQuantile(metric, ring string, q float64) (d time.Duration, ok bool) {
	mem := st.Memory[metric][ring]
	if mem == nil {
		return 0, false
	}
	cell, _, ok := mem.Control.quantile(q)
	if !ok {
		return 0, false
	}
	return evidence.Lower(cell + 1), true
}
