//go:build race

package rollout

// Nothing in the exploration is concurrent, and the race detector makes it take many times as long. It breaks down itself
// with some ten thousand goroutines.
func init() { exploreDepth, hangingCalls, *fleetSeeds, smallFleets = 3, 2000, 15, true }
