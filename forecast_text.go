package rollout

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/planner"
)

// advice is what is wrong with stage i, or slow in it, and what would do.
func (f *forecaster) advice(i int, st *StageForecast, bake float64, path []planner.Phase) []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	stage := fmt.Sprintf("stage %s", st.Name)
	if st.Bake > st.Deadline || st.PerSecond == 0 {
		say("%s: its bake takes %s at this traffic, longer than its deadline of %s", stage, short(st.Bake), short(st.Deadline))
	}
	for _, gf := range st.Gates {
		g := slices.IndexFunc(f.gates, func(p gatePlan) bool { return p.spec.Name == gf.Name })
		gate := &f.gates[g]
		if k := gate.spec.Kind; k == judge.Never && gate.law.Control[1] > 0 && gate.spec.Action != judge.Report {
			say("%s: %s is broken by the first event, and the stable version alone has %.3g %% of them", stage, gf.Name, 100*gate.law.Control[1])
		}
		if !gf.Proves || gate.spec.Kind == judge.Check {
			continue
		}
		// What must be for nine of ten.
		goal := st.Deadline.Seconds()
		if gf.Proof.P90 <= st.Deadline {
			if goal = max(bake, gf.Proof.P90.Seconds()/3); gf.Proof.P90.Seconds() <= atLeastSlow*bake || gf.Proof.P90 < time.Minute {
				continue
			}
		}
		if gf.Proof.P50 == Never {
			say("%s: %s can not be proven: what is expected of a good candidate does not keep it, or nothing can be compared%s",
				stage, gf.Name, f.instead(i, g, path, goal))
			continue
		}
		say("%s: %s needs about %s candidate samples, %s at this traffic (nine of ten: %s)%s",
			stage, gf.Name, roughly(gf.Requests.P50), short(gf.Proof.P50), short(gf.Proof.P90), f.instead(i, g, path, goal))
	}
	return out
}

// instead is what would prove a gate of stage i within goal seconds in nine of ten releases: another margin, or to ask for
// proof only from a greater share on.
func (f *forecaster) instead(i, g int, path []planner.Phase, goal float64) string {
	var ways []string
	if claim, at, ok := f.wider(g, path, goal); ok {
		ways = append(ways, fmt.Sprintf("%s would do in %s", claim, short(at)))
	}
	if from, ok := f.proveFrom(i, goal); ok {
		ways = append(ways, fmt.Sprintf("ProveFrom(%s)", number(float64(from))))
	}
	if len(ways) == 0 {
		return ""
	}
	return "; " + strings.Join(ways, "; or ")
}

// wider finds the least wider margin, in round numbers, by which the gate would be proven in time, and how long that
// takes in half of the cases.
func (f *forecaster) wider(g int, path []planner.Phase, goal float64) (claim string, at time.Duration, ok bool) {
	gate := &f.gates[g]
	for _, by := range []float64{1.2, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100} {
		s := gate.spec
		switch s.Kind {
		case judge.Within, judge.MixWithin:
			s.Margin = twoDigits(100*s.Margin*by) / 100
			claim = "Within(" + number(twoDigits(100*s.Margin)) + ")"
		case judge.AtMost:
			s.Margin = twoDigits(100*s.Margin*by) / 100
			claim = "AtMost(" + number(twoDigits(100*s.Margin)) + ")"
		case judge.ScoreWithin:
			drop := twoDigits(s.Margin * (s.Hi - s.Lo) * by)
			s.Margin = drop / (s.Hi - s.Lo)
			claim = "Within(" + number(drop) + ")"
		case judge.WithinFactor, judge.QuantileWithinFactor:
			s.Factor = 1 + twoDigits((s.Factor-1)*by)
			claim = "WithinFactor(" + number(s.Factor) + ")"
		case judge.QuantileAtMost:
			s.Limit = time.Duration(twoDigits(float64(s.Limit) * by))
			claim = "AtMost(" + s.Limit.String() + ")"
		default:
			return "", 0, false
		}
		if s.Margin >= .5 || s.Factor > 20 {
			return "", 0, false
		}
		test, err := planner.Proof(s, planner.Law{Candidate: gate.law.Control, Control: gate.law.Control})
		if err != nil {
			return "", 0, false
		}
		if run := test.Run(path, f.proofBar()); run.Time(.9) <= goal {
			return claim, lasts(run.Time(.5)), true
		}
	}
	return "", 0, false
}

// proveFrom is the least greater ProveFrom by which stage i would be left without proof and every stage that is then
// asked for it gives it within goal seconds, in nine of ten releases.
func (f *forecaster) proveFrom(i int, goal float64) (Percent, bool) {
	for j := i + 1; j < len(f.p.Stages); j++ {
		s := &f.p.Stages[j]
		if s.Ring != Everyone || s.Percent <= f.p.ProveFrom || !f.p.hasControl(s) {
			continue
		}
		p := f.p
		p.ProveFrom = s.Percent
		if p.asksProof(i) {
			continue
		}
		fits := true
		for k := range p.Stages {
			if p.asksProof(k) && k != len(p.Stages)-1 || k == j {
				ps, _ := f.phases(k)
				was := newPast(len(p.Rings) + 1)
				for l := range was.seen { // by then every ring has been seen
					was.open[l], was.seen[l] = true, warmControls
				}
				fits = fits && f.proof(k, f.good, was.path(ps, true)).Time(.9) <= min(goal, p.Stages[k].Deadline.Seconds())
			}
		}
		if fits {
			return s.Percent, true
		}
	}
	return 0, false
}

// problems are what a reader must not miss.
func (f *forecaster) problems(out *Forecast) []string {
	var ps []string
	say := func(format string, args ...any) { ps = append(ps, fmt.Sprintf(format, args...)) }
	for _, st := range out.Stages {
		switch st.Outlook {
		case OutlookStalls:
			say("stage %s stalls: a good release is there for %s in half of the cases, and its deadline is %s", st.Name, short(st.Stay.P50), short(st.Deadline))
		case OutlookMayStall:
			say("stage %s may stall: one good release in ten is there for %s or more, and its deadline is %s", st.Name, short(st.Stay.P90), short(st.Deadline))
		case OutlookOpen:
			if st.Approval {
				say("stage %s waits for an approval besides, which is not counted", st.Name)
			} else {
				say("stage %s waits for a Check, which is taken for healthy at once", st.Name)
			}
		}
	}
	if out.Catch.Time.P50 == Never {
		say("the regression is not found")
	}
	return ps
}

// String is the forecast as a table, a line a stage, with what is to be said below.
func (fc Forecast) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%.6g requests a second\n", fc.PerSecond)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "stage\tcandidate/s\tbake\tproof\tgood: leaves\tbad: found\tby\trequests\thurt\toutlook")
	line := func(name, rate, bake, proof, stay string, c Catch, outlook string) {
		fmt.Fprintln(w, strings.Join([]string{name, rate, bake, proof, stay, c.Time.String(), orDash(c.Gate), c.Requests.String(), c.Hurt.String(), outlook}, "\t"))
	}
	for _, s := range fc.Stages {
		proof := "-"
		if s.Proof != (Span{}) {
			proof = s.Proof.String()
		}
		line(s.Name, number(digits(s.PerSecond, 3)), short(s.Bake), proof, s.Stay.String(), s.Catch, s.Outlook.String())
	}
	line("all", "", "", "", fc.Duration.String(), fc.Catch, "")
	_ = w.Flush() // a strings.Builder does not fail
	lines := strings.SplitAfter(b.String(), "\n")
	b.Reset()
	for _, l := range lines {
		if l != "" {
			b.WriteString(strings.TrimRight(l, " \n") + "\n")
		}
	}
	for _, s := range fc.Problems {
		b.WriteString("! " + s + "\n")
	}
	for _, st := range fc.Stages {
		for _, s := range st.Advice {
			b.WriteString("* " + s + "\n")
		}
	}
	return b.String()
}

// String is both times, as in "9.2h / 15h", or one if they are the same.
func (s Span) String() string {
	if a, b := short(s.P50), short(s.P90); a != b {
		return a + " / " + b
	}
	return short(s.P50)
}

// String is both numbers, rounded.
func (a Amount) String() string {
	if x, y := roughly(a.P50), roughly(a.P90); x != y {
		return x + " / " + y
	}
	return roughly(a.P50)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// short is a duration in the largest unit that fits, to two or three digits.
func short(d time.Duration) string {
	const day = 24 * time.Hour
	unit := func(u time.Duration, name string) string {
		return number(digits(float64(d)/float64(u), 3)) + name
	}
	switch {
	case d == Never:
		return "never"
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < 2*time.Minute:
		return unit(time.Second, "s")
	case d < 2*time.Hour:
		return unit(time.Minute, "m")
	case d < 2*day:
		return unit(time.Hour, "h")
	case d < 2*365*day:
		return unit(day, "d")
	}
	return unit(365*day, "y")
}

// roughly is a number to two digits, with commas.
func roughly(x float64) string {
	if x <= 0 {
		return "-"
	}
	s := fmt.Sprintf("%.0f", digits(x, 2))
	if x < 10 {
		return number(digits(x, 2))
	}
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// twoDigits is x to two digits.
func twoDigits(x float64) float64 { return digits(x, 2) }

// digits is x to so many digits.
func digits(x float64, n int) float64 {
	if !(x > 0) || math.IsInf(x, 1) {
		return x
	}
	scale := math.Pow(10, float64(n-1)-math.Floor(math.Log10(x)))
	if scale >= 1 { // exact for what is written with a few decimals
		return math.Round(x*scale) / scale
	}
	return math.Round(x*scale) * math.Round(1/scale)
}
