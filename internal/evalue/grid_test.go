package evalue

import (
	"math"
	"testing"

	"pgregory.net/rapid"
)

// Logs is the sum of what the outcomes gain.
func TestGainsAddUpToLogs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const cells = 5
		draw := func(name string) []uint64 {
			return rapid.SliceOfN(rapid.Uint64Range(0, 20), cells, cells).Draw(t, name)
		}
		c, s := draw("candidate"), draw("control")
		n, m := total(c), total(s)
		c0 := unit().Draw(t, "c0")
		same := func(what string, bets int, got, want *Logs) {
			for k := range bets {
				if math.Abs(got[k]-want[k]) > 1e-9*(1+math.Abs(want[k])) {
					t.Fatalf("%s, bet %d: the gains add up to %g, not %g", what, k, got[k], want[k])
				}
			}
		}
		for _, d := range []*Difference{DifferenceBeyond(.01), DifferenceWithin(.02), ScoreBeyond(.05), ScoreWithin(.05)} {
			var want, got, a, b Logs
			d.LogsCells(&want, c, s, c0)
			for v := range cells {
				d.Gains(&a, &b, n, m, float64(v)/(cells-1), c0)
				for k := range d.lambda {
					got[k] += float64(c[v])*a[k] + float64(s[v])*b[k]
				}
			}
			same("difference", len(d.lambda), &got, &want)
		}
		change := NewChange()
		q, p, both := make([]float64, cells), make([]float64, cells), make([]float64, cells)
		change.Estimate(q, p, both, draw("earlier candidate"), draw("earlier control"))
		var want, got, a, b Logs
		change.Logs(&want, c, s, q, p, both)
		for v := range cells {
			change.Gains(&a, &b, n, m, q[v], p[v], both[v])
			for k := range change.kappa {
				got[k] += float64(c[v])*a[k] + float64(s[v])*b[k]
			}
		}
		same("change", len(change.kappa), &got, &want)
	})
}
