package rollout

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// Validate reports every problem of the policy at once, each naming the stage, gate or field and the value, joined as by
// [errors.Join]; nil if there is none. [New] calls it.
func (p Policy) Validate() error {
	v := validator{p: p.withDefaults("")}
	v.scalars(p)
	v.rings()
	v.gates()
	v.metrics()
	v.guards()
	v.stages(p)
	v.proofs()
	v.steps()
	v.size()
	return errors.Join(v.problems...)
}

// validator collects the problems of one policy.
type validator struct {
	p        Policy // with its defaults
	problems []error
	unsound  bool // the stages are too broken for the rules that look at the whole ladder
}

func (v *validator) bad(format string, args ...any) {
	v.problems = append(v.problems, fmt.Errorf("rollout: "+format, args...))
}

func (v *validator) scalars(given Policy) {
	duration := func(field string, d time.Duration) {
		if d < 0 {
			v.bad("Policy.%s: %v is negative", field, d)
		}
	}
	duration("Bake", given.Bake)
	duration("Deadline", given.Deadline)
	if p := given.ProveFrom; p != 0 && !p.share() {
		v.bad("Policy.ProveFrom: %v must be above 0 and at most 100", float64(p))
	}
	if h := given.Holdback; !(h >= 0 && h < 100) {
		v.bad("Policy.Holdback: %v must be at least 0 and below 100", float64(h))
	}
	risk := func(field string, x float64) {
		if math.IsNaN(x) || x < 0 || x >= 0.5 {
			v.bad("Policy.%s: %v must be above 0 and below 0.5", field, x)
		}
	}
	risk("FalseRollback", given.FalseRollback)
	risk("FalsePromotion", given.FalsePromotion)
	if a := v.p.OnDeadline; a != Hold && a != Rollback {
		v.bad("Policy.OnDeadline: %v must be Hold or Rollback; a deadline never promotes", a)
	}
}

func (v *validator) rings() {
	seen := map[string]bool{}
	for i, r := range v.p.Rings {
		switch {
		case r.Name == Everyone:
			v.bad("Policy.Rings[%d].Name: %q is always there and need not be named", i, r.Name)
		case !ringName.MatchString(r.Name):
			v.bad("Policy.Rings[%d].Name: %q must match %s", i, r.Name, ringName)
		case seen[r.Name]:
			v.bad("Policy.Rings[%d].Name: %q is named twice", i, r.Name)
		}
		seen[r.Name] = true
	}
	if !utf8.ValidString(v.p.Version) || len(v.p.Version) > 256 {
		v.bad("Policy.Version: %.300q must be valid UTF-8 and at most 256 bytes", v.p.Version)
	}
	if len(v.p.Rings) > maxRings {
		v.bad("Policy.Rings: %d are more than %d", len(v.p.Rings), maxRings)
	}
}

func (v *validator) gates() {
	check := func(where string, gates []Gate, seen map[string]bool) {
		for i, g := range gates {
			at := fmt.Sprintf("%s[%d]", where, i)
			if g.name != "" {
				at += " " + g.name
			}
			for _, problem := range g.problems() {
				v.bad("%s: %s", at, problem)
			}
			if g.name != "" && seen[g.name] {
				v.bad("%s: the same gate stands there twice", at)
			}
			seen[g.name] = true
		}
	}
	all := map[string]bool{}
	check("Policy.Gates", v.p.Gates, all)
	byName := map[string]Gate{}
	for i, s := range v.p.Stages {
		seen := map[string]bool{}
		for name := range all {
			seen[name] = true
		}
		check(fmt.Sprintf("Policy.Stages[%d].Gates", i), s.Gates, seen)
		for _, g := range s.Gates {
			if other, ok := byName[g.name]; ok && other.action != g.action {
				v.bad("Policy.Stages[%d].Gates %s: its action %v differs from %v in another stage", i, g.name, g.action, other.action)
			} else if ok && g.kind == judge.Check {
				v.bad("Policy.Stages[%d].Gates %s: a Check of this name stands in another stage; put it into Policy.Gates or name it otherwise", i, g.name)
			}
			byName[g.name] = g
		}
	}
}

// metrics finds different metrics of one name: their evidence could not be told apart.
func (v *validator) metrics() {
	known := map[string]metricID{"errors": Errors.m.Value(), "latency": Latency.m.Value()}
	see := func(where string, m metricRef) {
		if m == (metricRef{}) {
			return
		}
		id := m.Value()
		if other, ok := known[id.name]; ok && other != id && len(id.problems()) == 0 {
			v.bad("%s: the metric %q is a %v here and a %v elsewhere", where, id.name, id, other)
		}
		known[id.name] = id
	}
	for _, g := range v.p.Gates {
		see("gate "+g.name, g.metric)
	}
	for _, s := range v.p.Stages {
		for _, g := range s.Gates {
			see("gate "+g.name, g.metric)
		}
	}
	for i, m := range v.p.Metrics {
		where := fmt.Sprintf("Policy.Metrics[%d]", i)
		if m == nil || reflect.ValueOf(m).Kind() == reflect.Pointer || m.ref() == (metricRef{}) {
			v.bad("%s: nil, a pointer or the zero value; make metrics with NewRate, NewTiming, NewScore or NewMix", where)
			continue
		}
		id := m.ref().Value()
		for _, problem := range append(id.misnamed(), id.problems()...) {
			v.bad("%s %s: %s", where, id.name, problem)
		}
		see(where, m.ref())
	}
	v.marks()
}

// marks finds timings with more thresholds than the groups of their outcomes can be counted by.
func (v *validator) marks() {
	marks := map[metricRef]map[mark]bool{}
	for _, g := range v.p.allGates() {
		for _, m := range g.marks() {
			if marks[g.metric] == nil {
				marks[g.metric] = map[mark]bool{}
			}
			marks[g.metric][m] = true
		}
	}
	told := map[metricRef]bool{}
	for _, g := range v.p.allGates() {
		if n := len(marks[g.metric]); n > judge.MaxMarks && !told[g.metric] {
			told[g.metric] = true
			v.bad("the gates of %q compare it at %d points; %d are the most (NoWorse takes 2, others of a quantile 1 each, equal ones together 1)", nameOf(g.metric), n, judge.MaxMarks)
		}
	}
}

// guards finds names in Without that are no guard's.
func (v *validator) guards() {
	seen := map[string]bool{}
	for i, name := range v.p.Without {
		switch {
		case name != GuardNoOutcome && name != GuardSplit:
			v.bad("Policy.Without[%d]: %.100q is no guard; %q and %q are", i, name, GuardNoOutcome, GuardSplit)
		case seen[name]:
			v.bad("Policy.Without[%d]: %q is named twice", i, name)
		}
		seen[name] = true
	}
}

func (v *validator) stages(given Policy) {
	if len(v.p.Stages) == 0 {
		v.bad("Policy.Stages: there are none; the last must be 100 %% of %s", Everyone)
		v.unsound = true
		return
	}
	if len(v.p.Stages) > maxStages {
		v.bad("Policy.Stages: %d are more than %d", len(v.p.Stages), maxStages)
	}
	names := map[string]int{}
	reached := map[string]Percent{}
	for i := range v.p.Stages {
		s, at := &v.p.Stages[i], fmt.Sprintf("Policy.Stages[%d]", i)
		if given.Stages[i].Name != "" {
			at += fmt.Sprintf(" %q", s.Name)
		}
		if len(s.Name) > 128 || !utf8.ValidString(s.Name) {
			v.bad("%s.Name: %.200q must be valid UTF-8 and at most 128 bytes", at, s.Name)
		}
		if first, ok := names[s.Name]; ok {
			v.bad("%s: %q is already the name of Policy.Stages[%d]", at, s.Name, first)
		} else {
			names[s.Name] = i
		}
		if v.p.ringIndex(s.Ring) < 0 {
			v.bad("%s.Ring: there is no ring %q", at, s.Ring)
			v.unsound = true
		}
		if !s.Percent.share() {
			v.bad("%s.Percent: %v must be above 0 and at most 100", at, float64(s.Percent))
			v.unsound = true
		} else if before := reached[s.Ring]; s.Percent <= before {
			v.bad("%s.Percent: %v is not more than the %v that an earlier stage of %q reached; shares only grow", at, s.Percent, before, s.Ring)
		} else {
			v.outgrown(at, i, reached)
			reached[s.Ring] = s.Percent
		}
		for _, d := range []struct {
			field string
			d     time.Duration
		}{{"Over", s.Over}, {"Bake", given.Stages[i].Bake}, {"Deadline", given.Stages[i].Deadline}} {
			if d.d < 0 {
				v.bad("%s.%s: %v is negative", at, d.field, d.d)
			}
		}
		if over, bake := max(s.Over, 0), max(s.Bake, 0); s.Deadline > 0 && over+bake != 0 && s.Deadline-bake <= over {
			v.bad("%s.Deadline: %v leaves no time after Over, %v, and Bake, %v", at, s.Deadline, s.Over, s.Bake)
		}
	}
	if last := v.p.Stages[len(v.p.Stages)-1]; last.Ring != Everyone || last.Percent != 100 {
		v.bad("Policy.Stages: the last is %v of %q; it must be 100 %% of %s", last.Percent, last.Ring, Everyone)
	}
}

// outgrown reports a stage of an inner ring after an outer ring's stage already gave it as much.
func (v *validator) outgrown(at string, i int, reached map[string]Percent) {
	s := v.p.Stages[i]
	for _, earlier := range v.p.Stages[:i] {
		outer := v.p.ringIndex(earlier.Ring) > v.p.ringIndex(s.Ring)
		if outer && earlier.Percent >= s.Percent && v.p.ringIndex(s.Ring) >= 0 {
			v.bad("%s.Percent: %v of %q is no more than the %v of %q around it, reached before", at, s.Percent, s.Ring, earlier.Percent, earlier.Ring)
			return
		}
	}
}

// proofs finds stages that are blind, and stages that nothing could ever promote safely.
func (v *validator) proofs() {
	if v.unsound {
		return
	}
	byName := map[string]judge.Spec{}
	for _, spec := range specs(v.p.allGates()) {
		byName[spec.Name] = spec
	}
	for i := range v.p.Stages {
		s := &v.p.Stages[i]
		control := v.p.hasControl(s)
		absolute, proves := false, false
		for _, g := range v.p.armed(s) {
			spec := byName[g.name]
			absolute = absolute || spec.Absolute() && spec.Action != judge.Report
			proves = proves || spec.CanProve() && !g.isGuard() && (control || spec.Absolute())
		}
		if !control && !absolute {
			v.bad("Policy.Stages[%d] %q: 100 %% of %q without a Holdback leaves no control, and no gate without need of one (AtMost, Never, Check) is armed: it would be blind", i, s.Name, s.Ring)
		}
		switch {
		case proves:
		case s.Bake <= 0:
			v.bad("Policy.Stages[%d] %q: nothing could prove it healthy and its Bake is zero; add a gate that can prove, or a Bake", i, s.Name)
		case !s.GuardOnly && !s.Approval && v.p.asksProof(i):
			v.bad("Policy.Stages[%d] %q: nothing could prove it healthy; add a gate that can prove, or make it GuardOnly or ask for Approval", i, s.Name)
		}
	}
}

// size refuses what would not fit into the stored state: a rollback must always.
func (v *validator) size() {
	if len(v.problems) > 0 {
		return
	}
	specs := specs(v.p.allGates())
	j, err := judge.New(append(specs, v.p.guards()...), judge.Risk{FalseRollback: v.p.FalseRollback, FalsePromotion: v.p.FalsePromotion, Independent: v.p.Independent}, v.p.ringNames()...)
	if err != nil {
		v.bad("%w", err)
		return
	}
	if n := j.Size(); n > machine.MaxBytes*3/4 {
		v.bad("Policy: %d gates of %d rings would keep up to %d KB of evidence, more than the %d KB that are stored; use fewer of either, or Independent if units seldom come twice",
			len(specs), len(v.p.Rings)+1, n>>10, machine.MaxBytes*3/4>>10)
	}
}

func (v *validator) steps() {
	seen := map[string]bool{}
	for _, kind := range slices.Sorted(maps.Keys(v.p.Undo)) { // in the same order each time
		f := v.p.Undo[kind]
		if f == nil {
			v.bad("Policy.Undo[%q]: nil", kind)
		}
		if kind == "" || len(kind) > machine.MaxKind || !utf8.ValidString(kind) {
			v.bad("Policy.Undo: the kind %.200q must be valid UTF-8, not empty and at most %d bytes", kind, machine.MaxKind)
		}
	}
	if s := v.p.Sessions; s.Grace < 0 {
		v.bad("Policy.Sessions.Grace: %v is negative", s.Grace)
	} else if s.OnRollback > AtOnce {
		v.bad("Policy.Sessions.OnRollback: %v is none of FinishTurn, UntilEnd and AtOnce", s.OnRollback)
	}
	for i, s := range v.p.Rollback {
		at := fmt.Sprintf("Policy.Rollback[%d]", i)
		switch {
		case s.Name == "":
			v.bad("%s.Name: empty", at)
		case len(s.Name) > 128 || !utf8.ValidString(s.Name):
			v.bad("%s.Name: %.200q must be valid UTF-8 and at most 128 bytes", at, s.Name)
		case seen[s.Name]:
			v.bad("%s.Name: %q is named twice", at, s.Name)
		case machine.Reserved(s.Name):
			v.bad("%s.Name: %q is what the undoing of effects is called", at, s.Name)
		}
		seen[s.Name] = true
		if s.Do == nil {
			v.bad("%s.Do: nil", at)
		}
		if s.Timeout < 0 {
			v.bad("%s.Timeout: %v is negative", at, s.Timeout)
		}
		if s.Attempts < 0 {
			v.bad("%s.Attempts: %d is negative", at, s.Attempts)
		}
	}
}
