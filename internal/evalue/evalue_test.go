package evalue

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// binomial returns the probability of each number of events among n.
func binomial(n int, p float64) []float64 {
	w := []float64{1}
	for range n {
		next := make([]float64, len(w)+1)
		for x, v := range w {
			next[x] += v * (1 - p)
			next[x+1] += v * p
		}
		w = next
	}
	return w
}

// means adds up what each bet is worth on average, over every block of n and m
// outcomes with rates p and q.
func means(n, m int, p, q float64, bets int, logs func(l *Logs, x, y float64)) []float64 {
	mean := make([]float64, bets)
	for x, px := range binomial(n, p) {
		for y, py := range binomial(m, q) {
			var l Logs
			logs(&l, float64(x), float64(y))
			for k := range mean {
				mean[k] += px * py * math.Exp(l[k])
			}
		}
	}
	return mean
}

func fair(t *rapid.T, mean []float64) {
	t.Helper()
	for k, v := range mean {
		if !(v <= 1+1e-9) {
			t.Fatalf("bet %d is worth %.12f on average under the null", k, v)
		}
	}
}

func unit() *rapid.Generator[float64] { return rapid.Float64Range(0, 1) }
func size() *rapid.Generator[int]     { return rapid.IntRange(0, 12) }

func TestRatioIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, m := size().Draw(t, "n"), size().Draw(t, "m")
		q, part := unit().Draw(t, "q"), unit().Draw(t, "part")
		psi0 := rapid.Float64Range(.2, 5).Draw(t, "psi0")
		worse := RatioWorse(psi0) // p ≤ psi0·q
		fair(t, means(n, m, min(1, psi0*q)*part, q, len(worse.psi), func(l *Logs, x, y float64) {
			worse.Logs(l, float64(n), float64(m), x, y)
		}))
		within := RatioWithin(max(psi0, 1.01)) // p ≥ psi0·q
		p := max(psi0, 1.01) * q
		if p > 1 {
			q, p = q/p, 1
		}
		fair(t, means(n, m, p+(1-p)*part, q, len(within.psi), func(l *Logs, x, y float64) {
			within.Logs(l, float64(n), float64(m), x, y)
		}))
		below := RatioBelow() // p ≥ q
		fair(t, means(n, m, q+(1-q)*part, q, len(below.psi), func(l *Logs, x, y float64) {
			below.Logs(l, float64(n), float64(m), x, y)
		}))
	})
}

// On its boundary, with Poisson counts, a bet is worth exactly 1.
func TestRatioIsExactForPoisson(t *testing.T) {
	const n, m, mu = 3., 20., .05
	for _, psi0 := range []float64{1, 1.5} {
		r := RatioWorse(psi0)
		mean := make([]float64, len(r.psi))
		poisson := func(k int, mean float64) float64 {
			g, _ := math.Lgamma(float64(k + 1))
			return math.Exp(float64(k)*math.Log(mean) - mean - g)
		}
		for x := range 150 {
			for y := range 150 {
				var l Logs
				r.Logs(&l, n, m, float64(x), float64(y))
				for k := range mean {
					mean[k] += math.Exp(l[k]) * poisson(x, psi0*n*mu) * poisson(y, m*mu)
				}
			}
		}
		for k, v := range mean[:7] { // 1000 needs more terms than these
			if math.Abs(v-1) > 1e-6 {
				t.Errorf("psi0 %g: the bet on %g is worth %.9f on average", psi0, r.psi[k], v)
			}
		}
	}
}

func TestDifferenceIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, m := size().Draw(t, "n"), size().Draw(t, "m")
		c0, part := unit().Draw(t, "c0"), unit().Draw(t, "part")
		delta := rapid.Float64Range(0, .9).Draw(t, "delta")
		q := rapid.Float64Range(0, 1-delta).Draw(t, "q")
		for _, d := range []*Difference{DifferenceBeyond(delta), DifferenceWithin(delta), DifferenceWorse()} {
			p := (q + d.delta) * part // ≤ q + delta
			if d.dir < 0 {
				p = 1 - (1-q-d.delta)*part // ≥ q + delta
			}
			fair(t, means(n, m, p, q, len(d.lambda), func(l *Logs, x, y float64) {
				d.Logs(l, float64(n), float64(m), x, y, c0)
			}))
		}
	})
}

// Scores: every sequence of up to 3 and 3 outcomes of 4 values each.
func TestDifferenceOfScoresIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, m := rapid.IntRange(0, 3).Draw(t, "n"), rapid.IntRange(0, 3).Draw(t, "m")
		c0 := unit().Draw(t, "c0")
		law := func(name string) (w []float64, mean float64) {
			total := 0.
			for range 4 {
				v := rapid.Float64Range(.001, 1).Draw(t, name)
				w, total = append(w, v), total+v
			}
			for b := range w {
				w[b] /= total
				mean += w[b] * float64(b) / 3
			}
			return w, mean
		}
		pc, mc := law("candidate")
		ps, ms := law("control")
		var d *Difference // one for whose null the laws are
		switch {
		case mc <= ms && rapid.Bool().Draw(t, "worse"):
			d = DifferenceWorse()
		case mc >= ms:
			if d = DifferenceBeyond(mc - ms); rapid.Bool().Draw(t, "within") {
				d = DifferenceWithin(mc - ms)
			}
		default:
			return
		}
		mean := make([]float64, len(d.lambda))
		c, s := make([]uint64, 4), make([]uint64, 4)
		var walk func(i int, p float64)
		walk = func(i int, p float64) {
			if i == n+m {
				var l Logs
				d.LogsCells(&l, c, s, c0)
				for k := range mean {
					mean[k] += p * math.Exp(l[k])
				}
				return
			}
			cells, law := c, pc
			if i >= n {
				cells, law = s, ps
			}
			for b := range cells {
				cells[b]++
				walk(i+1, p*law[b])
				cells[b]--
			}
		}
		walk(0, 1)
		fair(t, mean)
	})
}

func TestLevelIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, part := size().Draw(t, "n"), unit().Draw(t, "part")
		p0 := rapid.Float64Range(1e-6, .999).Draw(t, "p0")
		for _, c := range []struct {
			l *Level
			p float64
		}{{LevelWorse(p0), p0 * part}, {LevelWithin(p0), p0 + (1-p0)*part}, {LevelWorse(p0), p0}, {LevelWithin(p0), p0}} {
			fair(t, means(n, 0, c.p, 0, len(c.l.yes), func(l *Logs, x, _ float64) { c.l.Logs(l, float64(n), x) }))
		}
	})
}

func TestLogsCellsOfTwoIsLogs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cell := rapid.Uint64Range(0, 1000)
		c := []uint64{cell.Draw(t, "c0"), cell.Draw(t, "c1")}
		s := []uint64{cell.Draw(t, "s0"), cell.Draw(t, "s1")}
		d, c0 := DifferenceBeyond(.01), unit().Draw(t, "mean")
		var two, three Logs
		d.LogsCells(&two, c, s, c0)
		d.LogsCells(&three, []uint64{c[0], 0, c[1]}, []uint64{s[0], 0, s[1]}, c0)
		for k := range two {
			if math.Abs(two[k]-three[k]) > 1e-9*(1+math.Abs(two[k])) {
				t.Fatalf("bet %d: %g in two cells, %g in three", k, two[k], three[k])
			}
		}
	})
}

// A cohort without outcomes is no evidence, exactly.
func TestEmptyCohort(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := float64(rapid.IntRange(0, 50).Draw(t, "x"))
		n := x + float64(rapid.IntRange(0, 50).Draw(t, "good"))
		for _, r := range []*Ratio{RatioWorse(1), RatioWorse(1.7), RatioWithin(2), RatioBelow()} {
			var a, b Logs
			r.Logs(&a, n, 0, x, 0)
			r.Logs(&b, 0, n, 0, x)
			if a != (Logs{}) || b != (Logs{}) {
				t.Fatalf("a ratio bets on one cohort: %v %v", a, b)
			}
		}
		for _, d := range []*Difference{DifferenceWorse(), DifferenceBeyond(.01), DifferenceWithin(.01)} {
			var a, b Logs
			d.Logs(&a, n, 0, x, 0, .3)
			d.Logs(&b, 0, n, 0, x, .3)
			if a != (Logs{}) || b != (Logs{}) {
				t.Fatalf("a difference bets on one cohort: %v %v", a, b)
			}
		}
	})
}

// anyLogs draws the bets of a block, also absurd ones.
func anyLogs(bets int) *rapid.Generator[Logs] {
	return rapid.Custom(func(t *rapid.T) (l Logs) {
		for k := range bets {
			l[k] = rapid.OneOf(rapid.Float64Range(-3, 3), rapid.Float64Range(-900, 900),
				rapid.SampledFrom([]float64{math.NaN(), math.Inf(1), math.Inf(-1), 1e300, -1e300, 0})).Draw(t, "log")
		}
		return l
	})
}

// The portfolio is the one of the definition: wealth by bet, multiplied by the
// bet and then shared.
func TestBankIsItsDefinition(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prior := NewPrior(rapid.SampledFrom([]float64{0, .2}).Draw(t, "cash"), 1, 2, 3)
		wealth := append([]float64(nil), prior...)
		var p Bank
		for b := range rapid.IntRange(1, 40).Draw(t, "blocks") {
			var l Logs
			sum := 0.
			for k := range wealth {
				if k > 0 {
					l[k-1] = rapid.Float64Range(-2, 2).Draw(t, "log")
					wealth[k] *= math.Exp(l[k-1])
				}
				sum += wealth[k]
			}
			for k := range wealth {
				wealth[k] += (prior[k]*sum - wealth[k]) / float64(720+b)
			}
			p.Update(prior, []Logs{l})
			if math.Abs(p.Log(0)-math.Log(sum)) > float64(b+1)/(1<<16) { // parts are rounded to 16 bits
				t.Fatalf("after %d blocks log E is %g, not %g", b+1, p.Log(0), math.Log(sum))
			}
		}
	})
}

// Whatever is bet, the state stays finite and survives JSON bit by bit.
func TestBankIsStable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prior := RatioWorse(1).Prior
		if rapid.Bool().Draw(t, "promotion") {
			prior = DifferenceWithin(.01).Prior
		}
		var a, b Bank
		for range rapid.IntRange(1, 60).Draw(t, "blocks") {
			l := anyLogs(len(prior)-1).Draw(t, "logs")
			a.Update(prior, []Logs{l})
			b.Update(prior, []Logs{l})
			if rapid.Bool().Draw(t, "restart") {
				text, err := json.Marshal(b)
				if err != nil {
					t.Fatal(err)
				}
				b = Bank{}
				if err := json.Unmarshal(text, &b); err != nil {
					t.Fatal(err)
				}
			}
			sum := 0.
			for k, v := range a.Pi {
				sum += float64(v)
				if !(v >= 0) || v != b.Pi[k] {
					t.Fatalf("part %d is %g, after a restart %g", k, v, b.Pi[k])
				}
			}
			if math.Abs(sum-1) > 1./(1<<16) {
				t.Fatalf("the parts sum to %g", sum)
			}
			if x := a.Log(0); x != b.Log(0) || a.Blocks != b.Blocks || math.IsNaN(x) || math.IsInf(x, 0) {
				t.Fatalf("log E is %g, after a restart %g", x, b.Log(0))
			}
		}
	})
}

func TestBankHealsDamage(t *testing.T) {
	for _, b := range []Bank{{LogE: []float64{1}}, {LogE: []float64{1}, Pi: []float32{1}}, {LogE: []float64{1}, Pi: make([]float32, 30)}, {LogE: []float64{1, 2}, Pi: make([]float32, 18)}} {
		b.Update(RatioWorse(1).Prior, make([]Logs, 1))
		b.Update(RatioWorse(1).Prior, make([]Logs, 1))
		if math.Abs(b.Log(0)) > 1e-6 || len(b.Pi) != 9 || math.Abs(float64(b.Pi[0])-.2) > 1e-5 {
			t.Errorf("%+v", b)
		}
	}
	zero := Bank{LogE: []float64{1}, Pi: make([]float32, 9)} // no wealth anywhere
	zero.Update(RatioWorse(1).Prior, make([]Logs, 1))
	if zero.Log(0) != 1 || math.Abs(float64(zero.Pi[0])-.2) > 1e-5 {
		t.Errorf("%+v", zero)
	}
}

// The rows of a Bank are processes of their own.
func TestBankRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prior := RatioWorse(1).Prior
		var all Bank
		each := make([]Bank, 3)
		for range rapid.IntRange(1, 20).Draw(t, "blocks") {
			rows := make([]Logs, len(each))
			for r := range rows {
				rows[r] = anyLogs(len(prior)-1).Draw(t, "logs")
				each[r].Update(prior, rows[r:r+1])
			}
			all.Update(prior, rows)
		}
		for r := range each {
			if all.Log(r) != each[r].Log(0) {
				t.Fatalf("row %d is %g, alone %g", r, all.Log(r), each[r].Log(0))
			}
		}
		if all.Log(99) != 0 {
			t.Fatal("a row that is not there is something")
		}
	})
}

// FuzzBank: no text makes it panic, and what is taken is what is written.
func FuzzBank(f *testing.F) {
	var b Bank
	b.Update(RatioWorse(1).Prior, make([]Logs, 16))
	text, _ := b.MarshalText()
	f.Add(text)
	f.Add([]byte("AQAA"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var b Bank
		if b.UnmarshalText(text) != nil {
			return
		}
		again, err := b.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var c Bank
		if err := c.UnmarshalText(again); err != nil || len(c.LogE) != len(b.LogE) {
			t.Fatalf("%v: %v", again, err)
		}
		b.Update(RatioWorse(1).Prior, make([]Logs, 1))
	})
}

func TestLogSum(t *testing.T) {
	for _, c := range []struct {
		logs []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{math.Log(3), math.Log(5)}, math.Log(4)}, {[]float64{1e9, -1e9}, 1e9 - math.Ln2}} {
		if got := LogMean(c.logs); math.Abs(got-c.want) > 1e-6 {
			t.Errorf("LogMean(%v) = %g, want %g", c.logs, got, c.want)
		}
	}
	if got := LogSum([]float64{math.Log(2), math.Log(3)}); math.Abs(got-math.Log(5)) > 1e-12 {
		t.Errorf("LogSum is %g", got)
	}
	if !math.IsInf(LogSum(nil), -1) || !math.IsInf(LogSum([]float64{math.Inf(-1)}), -1) {
		t.Error("LogSum of nothing is something")
	}
}

// law draws a distribution over k values from 0 to 1, and its mean.
func law(t *rapid.T, k int, name string) (w []float64, mean float64) {
	total := 0.
	for range k {
		v := rapid.Float64Range(.001, 1).Draw(t, name)
		w, total = append(w, v), total+v
	}
	for b := range w {
		w[b] /= total
		mean += w[b] * float64(b) / float64(k-1)
	}
	return w, mean
}

// each calls f with every way in which n outcomes of the law fall into cells, and
// how likely it is.
func each(n int, law []float64, f func(cells []uint64, p float64)) {
	cells := make([]uint64, len(law))
	var walk func(i int, p float64)
	walk = func(i int, p float64) {
		if i == n {
			f(cells, p)
			return
		}
		for b, w := range law {
			cells[b]++
			walk(i+1, p*w)
			cells[b]--
		}
	}
	walk(0, 1)
}

func TestMeanIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w, mean := law(t, 4, "law")
		slack := unit().Draw(t, "slack")
		for _, e := range []*Mean{MeanWorse(mean + (1-mean)*slack), MeanWithin(mean * slack)} {
			worth := make([]float64, len(e.lambda))
			each(rapid.IntRange(0, 4).Draw(t, "n"), w, func(cells []uint64, p float64) {
				var l Logs
				e.Logs(&l, cells)
				for k := range worth {
					worth[k] += p * math.Exp(l[k])
				}
			})
			fair(t, worth)
		}
	})
}

func TestChangeIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		both, _ := law(t, 3, "law")
		past := rapid.SliceOfN(rapid.Uint64Range(0, 50), 6, 6).Draw(t, "past")
		e := NewChange()
		q, s, pool := make([]float64, 3), make([]float64, 3), make([]float64, 3)
		e.Estimate(q, s, pool, past[:3], past[3:])
		worth := make([]float64, len(e.kappa))
		n, m := rapid.IntRange(0, 3).Draw(t, "n"), rapid.IntRange(0, 3).Draw(t, "m")
		each(n, both, func(c []uint64, p float64) {
			each(m, both, func(d []uint64, p2 float64) {
				var l Logs
				e.Logs(&l, c, d, q, s, pool)
				for k := range worth {
					worth[k] += p * p2 * math.Exp(l[k])
				}
			})
		})
		fair(t, worth)
	})
}

func TestOddsAreFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		share, units := rapid.Float64Range(.001, .999).Draw(t, "share"), size().Draw(t, "units")
		e := NewOdds()
		worth := make([]float64, len(e.odds))
		for n, p := range binomial(units, share) {
			var l Logs
			e.Logs(&l, float64(n), float64(units-n), share)
			for k := range worth {
				worth[k] += p * math.Exp(l[k])
			}
		}
		fair(t, worth)
	})
}

// arm is what a Bernstein bet knows of a cohort whose mean was guessed.
func arm(cells []uint64, guess float64) Arm {
	a := Arm{Mean: guess, Var: .1}
	for b, c := range cells {
		v := float64(b) / float64(len(cells)-1)
		a.N, a.S, a.S2 = a.N+float64(c), a.S+float64(c)*v, a.S2+float64(c)*v*v
	}
	return a
}

func TestBernsteinIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pc, mc := law(t, 4, "candidate")
		ps, ms := law(t, 4, "control")
		gc, gs := unit().Draw(t, "guess"), unit().Draw(t, "guess of the control")
		n, m := rapid.IntRange(0, 3).Draw(t, "n"), rapid.IntRange(0, 3).Draw(t, "m")
		for _, within := range []bool{false, true} {
			e := NewBernstein(mc-ms, within, false)
			alone := NewBernstein(mc, within, true)
			worth, level := make([]float64, len(e.lambda)), make([]float64, len(e.lambda))
			each(n, pc, func(c []uint64, p float64) {
				var l Logs
				alone.Logs(&l, arm(c, gc), Arm{})
				for k := range level {
					level[k] += p * math.Exp(l[k])
				}
				each(m, ps, func(d []uint64, p2 float64) {
					var l Logs
					e.Logs(&l, arm(c, gc), arm(d, gs))
					for k := range worth {
						worth[k] += p * p2 * math.Exp(l[k])
					}
				})
			})
			fair(t, worth)
			fair(t, level)
		}
	})
}

// The interval misses the true difference in at most one run of twenty, however
// often it is looked at, and gets narrow.
func TestBoundsCover(t *testing.T) {
	const runs, blocks = 400, 300
	for _, c := range []struct{ candidate, control float64 }{{.02, .01}, {.5, .5}, {0, 0}, {.3, .35}} {
		missed, width := 0, 0.
		for run := range runs {
			r := rand.New(rand.NewPCG(uint64(run), 7))
			var b Bounds
			var past [2]Arm
			miss := false
			for range blocks {
				var now [2]Arm
				for i, p := range []float64{c.candidate, c.control} {
					h := past[i]
					now[i] = Arm{N: 20 + 30*float64(i), Mean: (h.S + .5) / (h.N + 1)}
					now[i].Var = (.25 + max(h.S2-2*now[i].Mean*h.S+h.N*now[i].Mean*now[i].Mean, 0)) / (h.N + 1)
					for range int(now[i].N) {
						if r.Float64() < p {
							now[i].S++
							now[i].S2++
						}
					}
					past[i].N, past[i].S, past[i].S2 = h.N+now[i].N, h.S+now[i].S, h.S2+now[i].S2
				}
				b.Difference(now[0], now[1])
				lo, hi, ok := b.Interval(1)
				miss = miss || !ok || lo > c.candidate-c.control || hi < c.candidate-c.control
				width = hi - lo
			}
			if miss {
				missed++
			}
		}
		if float64(missed) > runs*.05+2*math.Sqrt(runs*.05*.95) {
			t.Errorf("%+v: %d of %d missed", c, missed, runs)
		}
		if width > .25 {
			t.Errorf("%+v: after 6,000 outcomes it is %g wide", c, width)
		}
	}
}

// Grids fit Logs, and every prior is a distribution.
func TestPriors(t *testing.T) {
	ratio := func(r *Ratio) (Prior, int) { return r.Prior, len(r.psi) }
	diff := func(d *Difference) (Prior, int) { return d.Prior, len(d.lambda) }
	level := func(l *Level) (Prior, int) { return l.Prior, len(l.yes) }
	check := func(name string) func(Prior, int) {
		return func(p Prior, bets int) {
			sum := 0.
			for _, w := range p {
				sum += w
			}
			if bets > MaxBets || len(p) != bets+1 || math.Abs(sum-1) > 1e-12 {
				t.Errorf("%s: %d bets, prior %v", name, bets, p)
			}
		}
	}
	check("ratio worse")(ratio(RatioWorse(1)))
	check("ratio within")(ratio(RatioWithin(2)))
	check("ratio below")(ratio(RatioBelow()))
	check("difference worse")(diff(DifferenceWorse()))
	check("difference beyond")(diff(DifferenceBeyond(.01)))
	check("difference within")(diff(DifferenceWithin(.01)))
	for _, p0 := range []float64{0, 1e-12, 1e-6, .001, .01, .04, .3, .5, .9, .9999, 1} {
		for _, l := range []*Level{LevelWorse(p0), LevelWithin(p0)} {
			check("level")(level(l))
			for k := range l.yes {
				if bad := l.yes[k] + l.no[k]; math.IsNaN(bad) || math.IsInf(bad, 0) {
					t.Errorf("level %g: bet %d is %g and %g", p0, k, l.yes[k], l.no[k])
				}
			}
		}
	}
}

func TestUpdateAllocatesNothing(t *testing.T) {
	r, d := RatioWorse(1), DifferenceBeyond(.005)
	var p, q Bank
	update := func() {
		var l Logs
		r.Logs(&l, 50, 950, 1, 10)
		p.Update(r.Prior, []Logs{l})
		d.Logs(&l, 50, 950, 1, 10, .01)
		q.Update(d.Prior, []Logs{l})
	}
	update()
	if n := testing.AllocsPerRun(100, update); n != 0 {
		t.Errorf("%g allocations", n)
	}
}

func BenchmarkRatio(b *testing.B) {
	r := RatioWorse(1)
	var p Bank
	for b.Loop() {
		var l Logs
		r.Logs(&l, 50, 950, 1, 10)
		p.Update(r.Prior, []Logs{l})
	}
}

func BenchmarkDifference(b *testing.B) {
	d := DifferenceBeyond(.005)
	var p Bank
	for b.Loop() {
		var l Logs
		d.Logs(&l, 50, 950, 1, 10, .01)
		p.Update(d.Prior, []Logs{l})
	}
}

func BenchmarkDifferenceOf33(b *testing.B) {
	d := DifferenceWorse()
	var p Bank
	c, s := make([]uint64, 33), make([]uint64, 33)
	for i := range c {
		c[i], s[i] = uint64(i), uint64(20*i)
	}
	for b.Loop() {
		var l Logs
		d.LogsCells(&l, c, s, .7)
		p.Update(d.Prior, []Logs{l})
	}
}
