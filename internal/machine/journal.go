package machine

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// EffectPrefix begins the keys of the effects that a rollout's processes have journalled.
func EffectPrefix(rollout string) string { return "rollout/" + rollout + "/undo/" }

// EffectKey is the key of the n-th effect that an incarnation journalled in a generation.
func EffectKey(rollout string, gen uint64, incarnation string, n uint64) string {
	return fmt.Sprintf("%s%d/%s/%d", EffectPrefix(rollout), gen, incarnation, n)
}

// ParseEffectKey is the inverse of [EffectKey].
func ParseEffectKey(rollout, key string) (gen uint64, incarnation string, n uint64, ok bool) {
	rest, ok := strings.CutPrefix(key, EffectPrefix(rollout))
	if !ok {
		return 0, "", 0, false
	}
	first, last := strings.IndexByte(rest, '/'), strings.LastIndexByte(rest, '/')
	if first < 0 || last <= first {
		return 0, "", 0, false
	}
	gen, errGen := strconv.ParseUint(rest[:first], 10, 64)
	n, errN := strconv.ParseUint(rest[last+1:], 10, 64)
	incarnation = rest[first+1 : last]
	return gen, incarnation, n, errGen == nil && errN == nil && EffectKey(rollout, gen, incarnation, n) == key
}

// EffectName reports whether an operator may call effects so: one by its key, all of a kind as "undo:KIND".
func EffectName(rollout, name string) bool {
	if kind, ok := strings.CutPrefix(name, undoKind); ok {
		return kind != "" && len(kind) <= MaxKind
	}
	_, _, _, ok := ParseEffectKey(rollout, name)
	return ok
}

// MaxKind is how many bytes the name of a kind of effects may have.
const MaxKind = 128

// Excuses reports whether an operator has waived an effect.
func (s *State) Excuses(key, kind, ring string, gen uint64) bool {
	return slices.ContainsFunc(s.Waives, func(w Waive) bool {
		if gen > w.Gen || w.Ring != "" && w.Ring != ring {
			return false
		}
		return w.Name == key || w.Name == undoKind+kind || w.Name == ringStep(w.Ring)
	})
}
