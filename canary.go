package rollout

// Canary returns a first small [Stage] of [Everyone]: p percent of the units try the candidate before anybody else.
//
// A canary of machines needs nothing else: use the host name as the [Unit]'s key, and act on the [Decision].
func Canary(p Percent) Stage { return Stage{Name: "canary", Percent: p} }
