//go:build race

package rollout

import (
	"flag"
	"runtime"
)

// The race detector makes everything take several times as long, and nothing in the exploration is concurrent. It breaks
// down itself ("ThreadSanitizer: CHECK failed") where two threads come upon timers of one bubble that are due
// (go.dev/issue/78156), so that there is one processor here: it sees what is not ordered all the same.
func init() {
	exploreDepth, *fleetSeeds, *killSeeds, raced = 3, 15, 1, true
	if err := flag.Set("rapid.checks", "50"); err != nil {
		panic(err)
	}
	runtime.GOMAXPROCS(1)
}
