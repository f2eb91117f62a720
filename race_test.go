//go:build race

package rollout

// raced: the race detector is on and everything takes several times as long.
const raced = true
