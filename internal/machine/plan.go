package machine

import (
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
)

// MaxClimb is the most steps a climbing stage takes.
const MaxClimb = 16

// Plan is a policy as the machine sees it: data, with every default filled in. It is never changed.
type Plan struct {
	Version    string
	Rings      []string // innermost first; the last is everyone
	Stages     []Stage
	OnDeadline judge.Action // Hold or Rollback
	Policy     string       // digest of the policy's data
	Assignment string       // digest of what decides who is in
	Salt       string       // of that
	Holdback   float64      // percent
	Steps      []string     // of the rollback, in order
	Undoes     bool         // effects of the candidate may be journalled, and are undone
	Judge      *judge.Judge
	Tick       time.Duration // between two evaluations
	Keep       uint64        // rounds in which it is remembered that an incarnation is retired; all that were born before, and have no cursor, are then
}

// Stage is one rung of the ladder.
type Stage struct {
	StageRef
	Over, Bake, Deadline time.Duration
	Proof                bool // the gates that can prove must, before the stage is left
	Last                 bool // proof only if none was given before
	Control              bool // some of the ring stays on the stable version
	Approval             bool
	Irreversible         bool
	Armed                []bool // by index of the Judge's gates
}

// find is the index of the stage that ref names, or -1.
func (p *Plan) find(ref StageRef) int {
	return slices.IndexFunc(p.Stages, func(s Stage) bool { return s.StageRef == ref })
}

// ring is the index of a ring, or -1.
func (p *Plan) ring(name string) int { return slices.Index(p.Rings, name) }

// shares are the percentages in force: what the ring's own stages have reached or, if greater, those of the rings around
// it; what an operator set instead; and nothing for a ring that is rolled back.
func (p *Plan) shares(s *State) map[string]float64 {
	shares := make(map[string]float64, len(p.Rings))
	outer := 0.0
	for i := len(p.Rings) - 1; i >= 0; i-- {
		ring := p.Rings[i]
		share := max(s.Reach[ring], outer)
		if set, ok := s.Set[ring]; ok {
			share = set
		}
		outer = max(outer, share)
		if s.Phase.Latched() || s.Phase == Pending || slices.Contains(s.Rings, ring) {
			share = 0
		}
		shares[ring] = share
	}
	return shares
}

// climb is the number of steps of a stage that climbs over a time.
func (s *Stage) climb() int {
	if s.Over <= 0 {
		return 0
	}
	return MaxClimb
}
