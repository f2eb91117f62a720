package rollout

import (
	"math"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/planner"
)

// judging is by which rules the gates are judged.
type judging struct {
	temper bool // outcomes of one unit may go together, so evidence is tempered
	guards int  // built-in gates that share the error bound with those whose action is to roll back
	rings  bool // one half of the evidence is on all rings together, the other half on each alone
}

func (p *Policy) rules() judging {
	guards := 1
	if slices.Contains(p.Without, GuardNoOutcome) {
		guards = 0
	}
	return judging{temper: !p.Independent, guards: guards, rings: len(p.Rings) > 0}
}

const (
	temperBy     = 1.2  // by which the judge divides
	dispersion   = 1.05 // the mean of max(1, D) over groups of independent units
	warmControls = 200  // control outcomes before the first latency threshold
	atLeastSlow  = 4    // times the bake is a slow proof
)

// forecaster is a forecast under way.
type forecaster struct {
	p     Policy // with its defaults
	t     Traffic
	r     judging
	tick  float64
	gates []gatePlan
}

// gatePlan is a gate with its tests.
type gatePlan struct {
	spec    judge.Spec
	law     planner.Law
	good    planner.Test // proof for a good candidate
	lucky   planner.Test // proof for a bad one
	catches planner.Test
	weight  float64
	hurt    float64
}

func (p Policy) forecast(t Traffic, r judging) (Forecast, error) {
	if err := p.Validate(); err != nil {
		return Forecast{}, err
	}
	f := forecaster{p: p.withDefaults(""), t: t, r: r}
	all := specs(f.p.allGates())
	if err := t.problems(&f.p, all); err != nil {
		return Forecast{}, err
	}
	f.tick = t.Interval.Seconds()
	if t.Interval == 0 {
		f.tick = defaultInterval.Seconds()
	}
	size := map[bool]int{false: r.guards}
	for _, s := range all {
		if s.Kind != judge.Never && s.Kind != judge.Check && s.Action != judge.Report {
			size[s.Action == judge.Hold]++
		}
	}
	for _, s := range all {
		g := gatePlan{spec: s, weight: 1 / float64(max(size[s.Action == judge.Hold], 1))}
		if s.Kind != judge.Check {
			var err error
			g.law, g.hurt = t.law(s)
			if g.catches, err = planner.Rollback(s, g.law); err != nil {
				return Forecast{}, err
			}
			if g.lucky, err = planner.Proof(s, g.law); err != nil {
				return Forecast{}, err
			}
			if g.good, err = planner.Proof(s, planner.Law{Candidate: g.law.Control, Control: g.law.Control}); err != nil {
				return Forecast{}, err
			}
		}
		f.gates = append(f.gates, g)
	}
	return f.run(), nil
}

// ringFlow is one ring's traffic in a phase, requests a second.
type ringFlow struct {
	candidate, control float64
	own                bool // the stage's proof is taken from it
}

// flowPhase is a time in which the shares do not change.
type flowPhase struct {
	seconds float64
	rings   []ringFlow // by ring
	look    float64
}

// seenBefore is what was seen of each ring before.
type seenBefore struct {
	open []bool    // there was a block
	seen []float64 // control outcomes
}

func newPast(rings int) seenBefore { return seenBefore{make([]bool, rings), make([]float64, rings)} }

func (b *seenBefore) clone() seenBefore {
	return seenBefore{slices.Clone(b.open), slices.Clone(b.seen)}
}

// after adds phases to what was seen.
func (b *seenBefore) after(phases []flowPhase) {
	for _, ph := range phases {
		for i, r := range ph.rings {
			b.open[i] = b.open[i] || r.candidate > 0
			b.seen[i] += r.control * ph.seconds
		}
	}
}

// path is the phases as the planner sees them. own: only what proves the stage.
func (b seenBefore) path(phases []flowPhase, own bool) []planner.Phase {
	var path []planner.Phase
	b = b.clone()
	at := 0.
	learnt, warm := make([]float64, len(b.open)), make([]float64, len(b.open))
	for i := range warm {
		warm[i] = math.Inf(1)
		if b.seen[i] >= warmControls {
			warm[i] = 0
		}
	}
	for n, ph := range phases {
		out := planner.Phase{Seconds: ph.seconds, Look: ph.look}
		for i, r := range ph.rings {
			if r.candidate == 0 {
				continue
			}
			if !b.open[i] {
				b.open[i], learnt[i] = true, at+ph.look
			}
			if need := warmControls - b.seen[i]; math.IsInf(warm[i], 1) && r.control > 0 && (need <= r.control*ph.seconds || n == len(phases)-1) {
				warm[i] = at + need/r.control
			}
			b.seen[i] += r.control * ph.seconds
			if r.own || !own {
				out.Streams = append(out.Streams, planner.Stream{Candidate: r.candidate, Control: r.control, Learnt: learnt[i], Warm: warm[i]})
			}
		}
		at += ph.seconds
		path = append(path, out)
	}
	// A ring may warm up in a later phase than the one a stream is of.
	for n := range path {
		k := 0
		for i, r := range phases[n].rings {
			if r.candidate > 0 && (r.own || !own) {
				path[n].Streams[k].Warm = warm[i]
				k++
			}
		}
	}
	return path
}

// phases are those of stage i, after what the stages before have reached; the last one lasts as long as the stage does. It
// also returns how long its bake takes.
func (f *forecaster) phases(i int) (ps []flowPhase, bake float64) {
	s := &f.p.Stages[i]
	rings := len(f.p.Rings) + 1
	reach := make([]float64, rings)
	for _, b := range f.p.Stages[:i] {
		k := f.p.ringIndex(b.Ring)
		reach[k] = max(reach[k], float64(b.Percent))
	}
	own := f.p.ringIndex(s.Ring)
	from := 0.
	for _, r := range reach[own:] {
		from = max(from, r)
	}
	steps := 1
	if s.Over > 0 {
		steps = machine.MaxClimb
	}
	limit := max((s.Over+s.Bake).Seconds()/10, f.tick) // of what a gap between outcomes counts
	limit = min(limit, 12*f.tick)
	for n := 1; n <= steps; n++ {
		shares := slices.Clone(reach)
		shares[own] = max(shares[own], from+(float64(s.Percent)-from)*float64(n)/float64(steps))
		ph := flowPhase{rings: make([]ringFlow, rings)}
		outer := 0.
		for k := rings - 1; k >= 0; k-- {
			outer = max(outer, shares[k])
			all := f.t.PerSecond * f.part(k)
			c := all * min(outer, 100-float64(f.p.Holdback)) / 100
			if outer > 0 {
				ph.rings[k] = ringFlow{candidate: c, control: all - c, own: k == own || k < own && reach[k] < shares[own]}
				if ph.rings[k].control < 1e-12*all {
					ph.rings[k].control = 0
				}
			}
		}
		rate := 0.
		for _, r := range ph.rings {
			if r.own {
				rate += r.candidate
			}
		}
		ph.look = f.look(ph.rings[own])
		baked := s.Over.Seconds() / float64(steps)
		if n == steps {
			baked += s.Bake.Seconds()
		}
		if rate > 0 {
			// Outcomes come at random; of a gap counts the limit at most.
			ph.seconds = baked / -math.Expm1(-rate*limit)
			if n == 1 {
				ph.seconds += 1 / rate
			}
		} else {
			ph.seconds = math.Inf(1)
		}
		bake += ph.seconds
		ps = append(ps, ph)
	}
	return ps, math.Ceil(bake/f.tick) * f.tick
}

// part is how much of the traffic is a ring's.
func (f *forecaster) part(ring int) float64 {
	if ring == len(f.p.Rings) {
		return max(0, 1-f.t.inRings(&f.p)/100)
	}
	return f.t.ringPart(f.p.Rings[ring].Name) / 100
}

// look is the time between two blocks: a tick, or what it takes for the least outcomes of both cohorts.
func (f *forecaster) look(r ringFlow) float64 {
	least := r.candidate
	if r.control > 0 {
		least = min(least, r.control)
	}
	look := f.tick
	if least > 0 {
		look = max(look, machine.BlockLeast/least)
	}
	return min(look, max(machine.BlockAge.Seconds(), f.tick))
}

// run forecasts stage by stage.
func (f *forecaster) run() Forecast {
	out := Forecast{PerSecond: f.t.PerSecond}
	rings := len(f.p.Rings) + 1
	was := newPast(rings)  // before the stage, of a good release
	var ladder []flowPhase // of a bad one
	var starts []float64   // of the stages in it
	at, ends := 0., false
	proved := false
	for i := range f.p.Stages {
		s := &f.p.Stages[i]
		ps, bake := f.phases(i)
		asks := f.p.asksProof(i) && !(i == len(f.p.Stages)-1 && proved)
		st := f.stage(i, ps, bake, asks, was)
		out.Stages = append(out.Stages, st)
		add := func(sum *time.Duration, stay time.Duration) {
			if *sum == Never || stay == Never || stay > s.Deadline {
				*sum = Never
			} else {
				*sum += stay
			}
		}
		add(&out.Duration.P50, st.Stay.P50)
		add(&out.Duration.P90, st.Stay.P90)
		if !ends {
			stay := bake
			if asks {
				stay = max(stay, f.proof(i, f.lucky, was.path(ps, true)).Time(.5))
			}
			starts = append(starts, at)
			ps := lasting(ps, bake, stay)
			ladder = append(ladder, ps...)
			at += stay
			ends = math.IsInf(stay, 1) || s.Approval
		}
		was.after(lasting(ps, bake, st.Stay.P50.Seconds()))
		proved = proved || asks
	}
	if !ends { // it would complete; nobody looks any more
		ladder = append(ladder, flowPhase{rings: make([]ringFlow, rings), look: f.tick})
	}
	all := make([]int, len(f.gates))
	for g := range all {
		all[g] = g
	}
	out.Catch = f.catch(all, ladder, newPast(rings))
	for i, start := range starts {
		if out.Catch.Time.P50 != Never && out.Catch.Time.P50.Seconds() >= start {
			out.Catch.Stage = f.p.Stages[i].Name
		}
	}
	out.Problems = f.problems(&out)
	return out
}

// lasting returns the phases of a stage that lasts for so long.
func lasting(ps []flowPhase, bake, stay float64) []flowPhase {
	ps = slices.Clone(ps)
	ps[len(ps)-1].seconds += max(stay-bake, 0)
	return ps
}

// armed are the indices of the gates of stage i.
func (f *forecaster) armed(i int) []int {
	var gs []int
	for _, g := range f.p.armed(&f.p.Stages[i]) {
		gs = append(gs, slices.IndexFunc(f.gates, func(p gatePlan) bool { return p.spec.Name == g.name }))
	}
	return gs
}

// provers are those of them that must prove.
func (f *forecaster) provers(i int) []int {
	return slices.DeleteFunc(f.armed(i), func(g int) bool {
		s := f.gates[g].spec
		return !s.CanProve() || f.isGuard(g) || !s.Absolute() && s.Kind != judge.ScoreAtLeast && !f.p.hasControl(&f.p.Stages[i])
	})
}

// isGuard reports whether a gate has a law but no proof.
func (f *forecaster) isGuard(g int) bool {
	return f.gates[g].spec.Kind != judge.Check && f.gates[g].good.Empty()
}

func (f *forecaster) good(g int) planner.Test  { return f.gates[g].good }
func (f *forecaster) lucky(g int) planner.Test { return f.gates[g].lucky }

// joint are chances that must all come true.
type joint struct {
	runs []*planner.Run
	path []planner.Phase
}

// Time is how many seconds it takes until all have come true with probability power, as if they were independent; 0 if
// there are none.
func (j joint) Time(power float64) float64 {
	if len(j.runs) == 0 {
		return 0
	}
	return planner.Look(j.path, planner.Solve(func(t float64) float64 {
		p := 1.
		for _, r := range j.runs {
			p *= r.By(t)
		}
		return p
	}, power))
}

// proof is what stage i must prove. A Check is taken for proven.
func (f *forecaster) proof(i int, test func(g int) planner.Test, path []planner.Phase) joint {
	j := joint{path: path}
	for _, g := range f.provers(i) {
		if f.gates[g].spec.Kind != judge.Check {
			j.runs = append(j.runs, test(g).Run(path, f.proofBar()))
		}
	}
	return j
}

func (f *forecaster) proofBar() planner.Bar {
	bar := planner.Bar{Alpha: f.p.FalsePromotion, Weight: 1, Temper: 1}
	if f.r.temper {
		bar.Temper = dispersion
	}
	return bar
}

// catchBar is what the evidence of gate g must reach. alone: it comes from one ring only.
func (f *forecaster) catchBar(g int, alone bool) planner.Bar {
	bar := planner.Bar{Alpha: f.p.FalseRollback, Weight: f.gates[g].weight, Temper: 1}
	if rings := len(f.p.Rings) + 1; f.r.rings && rings > 1 {
		part := .5
		if alone {
			part += .5 / float64(rings)
		}
		bar.Weight *= part
	}
	if f.r.temper {
		bar.Temper, bar.Out = temperBy*dispersion, true
	}
	return bar
}

// stage forecasts stage i. was is what a good release has seen before.
func (f *forecaster) stage(i int, ps []flowPhase, bake float64, asks bool, was seenBefore) StageForecast {
	s := &f.p.Stages[i]
	st := StageForecast{
		Name: s.Name, Ring: s.Ring, Percent: s.Percent, Approval: s.Approval, Deadline: s.Deadline, Bake: lasts(bake),
		Outlook: OutlookPasses,
	}
	for k, r := range ps[len(ps)-1].rings {
		st.PerSecond += r.candidate
		if all := f.t.PerSecond * f.part(k); all > 0 {
			st.Units += float64(f.t.Units) * f.part(k) * r.candidate / all
		}
	}
	st.Catch = f.catch(f.armed(i), ps, was)
	if st.Catch.Gate != "" {
		st.Catch.Stage = s.Name
	}
	path := was.path(ps, true)
	st.Stay = Span{lasts(bake), lasts(bake)}
	provers := f.provers(i)
	if asks {
		j := f.proof(i, f.good, path)
		p50, p90 := j.Time(.5), j.Time(.9)
		st.Proof = Span{lasts(p50), lasts(p90)}
		st.Stay = Span{lasts(max(bake, p50)), lasts(max(bake, p90))}
	}
	open := s.Approval
	for _, g := range f.armed(i) {
		gate := &f.gates[g]
		gf := GateForecast{Name: gate.spec.Name, Proves: asks && slices.Contains(provers, g)}
		if gate.spec.Kind == judge.Check {
			open = open || gf.Proves
			gf.Catch = Span{Never, Never}
			st.Gates = append(st.Gates, gf)
			continue
		}
		if gf.Proves {
			run := gate.good.Run(path, f.proofBar())
			p50, p90 := run.Time(.5), run.Time(.9)
			gf.Proof = Span{lasts(p50), lasts(p90)}
			gf.Requests = Amount{samplesBy(path, p50), samplesBy(path, p90)}
		}
		gf.Catch = f.catch([]int{g}, ps, was).Time
		st.Gates = append(st.Gates, gf)
	}
	switch {
	case st.Stay.P50 > s.Deadline:
		st.Outlook = OutlookStalls
	case st.Stay.P90 > s.Deadline:
		st.Outlook = OutlookMayStall
	case open:
		st.Outlook = OutlookOpen
	}
	st.Advice = f.advice(i, &st, bake, path)
	return st
}

// catch is how soon one of the gates finds the regression.
func (f *forecaster) catch(gates []int, ps []flowPhase, was seenBefore) Catch {
	path := was.path(ps, false)
	alone := !slices.ContainsFunc(path, func(p planner.Phase) bool { return len(p.Streams) > 1 })
	c := Catch{Time: Span{Never, Never}}
	type finder struct {
		name string
		by   func(t float64) float64
	}
	var finders []finder
	hurt := 0.
	for _, g := range gates {
		gate := &f.gates[g]
		hurt = max(hurt, gate.hurt)
		switch {
		case gate.spec.Action == judge.Report || gate.spec.Kind == judge.Check || gate.hurt == 0:
		case gate.spec.Kind == judge.Never: // the first event
			event := gate.law.Candidate[1]
			finders = append(finders, finder{gate.spec.Name, func(t float64) float64 { return -math.Expm1(-event * planner.Samples(path, t)) }})
		default:
			finders = append(finders, finder{gate.spec.Name, gate.catches.Run(path, f.catchBar(g, alone)).By})
		}
	}
	best := func(t float64) (p float64, name string) {
		for _, f := range finders {
			if q := f.by(t); q > p {
				p, name = q, f.name
			}
		}
		return p, name
	}
	by := func(t float64) float64 { p, _ := best(t); return p }
	p50, p90 := planner.Solve(by, .5), planner.Solve(by, .9)
	if !math.IsInf(p50, 1) {
		_, c.Gate = best(p50)
	}
	p50, p90 = planner.Look(path, p50), planner.Look(path, p90)
	c.Time = Span{lasts(p50), lasts(p90)}
	c.Requests = Amount{samplesBy(path, p50), samplesBy(path, p90)}
	c.Hurt = Amount{f.hurt(ps, p50, hurt), f.hurt(ps, p90, hurt)}
	return c
}

// hurt is how many units have met a bad outcome by then; part is the part of the candidate's outcomes that are.
func (f *forecaster) hurt(ps []flowPhase, by, part float64) float64 {
	if math.IsInf(by, 1) {
		return 0
	}
	sum := 0.
	for k := range len(f.p.Rings) + 1 {
		met, units := 0., 0.
		left := by
		for n, ph := range ps {
			d := left
			if n < len(ps)-1 {
				d = min(d, ph.seconds)
			}
			if d <= 0 {
				break
			}
			met += d * ph.rings[k].candidate * part
			if all := f.t.PerSecond * f.part(k); all > 0 {
				units = max(units, float64(f.t.Units)*f.part(k)*ph.rings[k].candidate/all)
			}
			left -= d
		}
		switch {
		case f.t.Units == 0:
			sum += met
		case units > 0:
			sum += units * -math.Expm1(-met/units) // of units that come again and again, at random
		}
	}
	return sum
}

func samplesBy(path []planner.Phase, seconds float64) float64 {
	if math.IsInf(seconds, 1) {
		return 0
	}
	return planner.Samples(path, seconds)
}

// lasts is seconds as a duration, Never where it is too long for one.
func lasts(seconds float64) time.Duration {
	if d := seconds * float64(time.Second); d < float64(Never) {
		return time.Duration(d)
	}
	return Never
}
