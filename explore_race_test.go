//go:build race

package rollout

// Nothing in the exploration is concurrent, and the race detector makes it take many times as long. It breaks down itself
// with some thousand goroutines that all hang.
func init() { exploreDepth, hangingCalls, *fleetSeeds, smallFleets = 3, 200, 15, true }
