package rollout

import (
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"unicode/utf8"
)

// generation is what this process keeps through all epochs of one generation.
type generation struct {
	gen     uint64
	units   []units   // that came, by ring
	reasons []reasons // of the candidate's observations, by metric
	voices  []voice   // by ring; of the goroutine of Run alone
}

// lifeLocked is what is kept through generation gen: nothing yet, if it is a new one.
func (r *Rollout) lifeLocked(gen uint64) *generation {
	if r.life == nil || r.life.gen != gen {
		rings := len(r.plan.Rings)
		r.life = &generation{
			gen: gen, units: make([]units, rings), reasons: make([]reasons, len(r.metrics)), voices: make([]voice, rings),
		}
	}
	return r.life
}

// Limits of the rationales of one metric.
const (
	firstReasons = 8       // are kept in any case
	someReasons  = 32      // of those that follow
	maxReason    = 1 << 10 // bytes of one
)

// reasons are rationales of one metric: the first ones, and a uniform sample of those that follow. They take no lock.
type reasons struct {
	seen  atomic.Uint64
	first [firstReasons]atomic.Pointer[string]
	some  [someReasons]atomic.Pointer[string]
}

// keep keeps a rationale, or not. What is sampled out costs nothing but a random number.
func (rs *reasons) keep(why *string) {
	n := rs.seen.Add(1) - 1
	if n < firstReasons {
		rs.first[n].Store(bounded(why))
		return
	}
	n -= firstReasons
	i := n
	if n >= someReasons {
		if i = rand.Uint64N(n + 1); i >= someReasons {
			return
		}
	}
	rs.some[i].Store(bounded(why))
}

// bounded is a rationale of at most maxReason bytes, cut between two runes, that is valid UTF-8. A longer one is copied,
// so that what was cut off can be freed.
func bounded(why *string) *string {
	s := *why
	if len(s) <= maxReason && utf8.ValidString(s) {
		return why
	}
	if len(s) > maxReason {
		end := maxReason
		for end > maxReason-utf8.UTFMax && !utf8.RuneStart(s[end]) {
			end--
		}
		s = strings.Clone(s[:end])
	}
	s = strings.ToValidUTF8(s, "")
	return &s
}

// kept are the rationales, those of the first observations first.
func (rs *reasons) kept() []string {
	var all []string
	for i := range rs.first {
		if s := rs.first[i].Load(); s != nil {
			all = append(all, *s)
		}
	}
	for i := range rs.some {
		if s := rs.some[i].Load(); s != nil {
			all = append(all, *s)
		}
	}
	return all
}

// rationales are those of the present generation by the metric's name; nil where there are none.
func (r *Rollout) rationales() map[string][]string {
	r.mu.Lock()
	life := r.life
	r.mu.Unlock()
	if life == nil {
		return nil
	}
	var all map[string][]string
	for i := range life.reasons {
		if kept := life.reasons[i].kept(); kept != nil {
			if all == nil {
				all = map[string][]string{}
			}
			all[nameOf(r.metrics[i].ref)] = kept
		}
	}
	return all
}
