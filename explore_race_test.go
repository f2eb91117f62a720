//go:build race

package rollout

// Nothing in the exploration is concurrent, and the race detector makes it take many times as long.
func init() { exploreDepth = 4 }
