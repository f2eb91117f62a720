package rollout

import "regexp"

// Everyone is the name of the outermost [Ring], which is always there and takes every unit that no other ring matches.
const Everyone = "everyone"

// Ring is a named audience. Rings are nested, innermost first: a unit belongs to the first ring that matches it, and a
// ring's share is the greatest that its own or any outer ring's stages have reached, so that 100 % of [Everyone] is 100 %
// of every ring.
type Ring struct {
	// Name is how stages, events and metrics call the ring: [a-z0-9][a-z0-9._-]{0,63}, and not "everyone".
	Name string
	// Match tells whether a unit belongs to the ring. Nil takes the units whose Groups contain Name. It runs inside
	// every decision, from any goroutine: it must be pure, fast and without I/O. A panic is no match, counted in
	// [Status]; there is no defence against one that never returns.
	Match func(Unit) bool
}

// ringName is what rings and rollouts may be called.
var ringName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// contains reports whether u is a member of the group called name.
func (u *Unit) contains(name string) bool {
	for _, g := range u.Groups {
		if g == name {
			return true
		}
	}
	return false
}
