package rollout

import (
	"fmt"
	"math"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
)

// maxCount is the greatest number of outcomes that a float64 tells from the next.
const maxCount = 1 << 53

// sane finds what is wrong with a series of the metric by itself.
func (m metricID) sane(values []float64) error {
	if len(values) == 0 || len(values) > 256 {
		return fmt.Errorf("%d values; there must be some, and at most 256", len(values))
	}
	for i, v := range values {
		bound := m.kind == timingKind && i%2 == 0
		switch {
		case math.IsNaN(v), v < 0 && !(m.kind == scoreKind && i == 1), math.IsInf(v, 0) && !(bound && i == len(values)-2):
			return fmt.Errorf("value %d is %v", i, v)
		case bound, m.kind == scoreKind && i > 0:
		case v != math.Trunc(v) || v > maxCount:
			return fmt.Errorf("value %d is %v, no number of outcomes", i, v)
		}
	}
	switch m.kind {
	case rateKind:
		if len(values) != 2 || values[1] > values[0] {
			return fmt.Errorf("%v are not a number of outcomes and of bad ones among them", values)
		}
	case timingKind:
		for i := range values {
			if len(values)%2 != 0 || i >= 2 && values[i] < values[i-2] || i >= 2 && i%2 == 0 && values[i] == values[i-2] {
				return fmt.Errorf("%v are not pairs of a rising bound and a count of outcomes within it", values)
			}
		}
	case scoreKind:
		if len(values) != 3 {
			return fmt.Errorf("%v are not a number of outcomes, their sum and the sum of their squares", values)
		}
	case mixKind:
		if n := m.cells(); len(values) != n && len(values) != n-1 {
			return fmt.Errorf("there are %d values and %d labels", len(values), n)
		}
	}
	return nil
}

// since returns what came in between two totals of a series, nil where the counters were reset.
func (m metricID) since(was, now []float64) []float64 {
	if len(was) != len(now) {
		return nil
	}
	d := make([]float64, len(now))
	for i := range now {
		if m.kind == timingKind && i%2 == 0 {
			if d[i] = now[i]; was[i] != now[i] {
				return nil // other bounds
			}
			continue
		}
		if d[i] = now[i] - was[i]; d[i] < 0 && !(m.kind == scoreKind && i == 1) {
			return nil
		}
	}
	if m.kind == rateKind && d[1] > d[0] || m.kind == timingKind && !rising(d) {
		return nil
	}
	return d
}

// rising reports whether the counts of pairs never fall.
func rising(d []float64) bool {
	for i := 3; i < len(d); i += 2 {
		if d[i] < d[i-2] {
			return false
		}
	}
	return true
}

// counted is how many outcomes a difference of totals has.
func (m metricID) counted(d []float64) float64 {
	switch m.kind {
	case timingKind:
		return d[len(d)-1]
	case mixKind:
		n := 0.
		for _, x := range d {
			n += x
		}
		return n
	}
	return d[0]
}

// outcomes are a difference of totals in the metric's cells.
func (m metricID) outcomes(d []float64) []uint64 {
	cells := make([]uint64, m.cells())
	switch m.kind {
	case rateKind:
		cells[0], cells[1] = uint64(d[0]-d[1]), uint64(d[1])
	case mixKind:
		for i, x := range d {
			cells[i] = uint64(x)
		}
	case timingKind:
		below := 0.
		for i := 1; i < len(d); i += 2 {
			cell := evidence.Cells - 1
			if b := d[i-1] * float64(time.Second); b < math.MaxInt64/2 {
				cell = evidence.Index(time.Duration(b))
			}
			cells[cell] += uint64(d[i] - below)
			below = d[i]
		}
	}
	return cells
}

// moments are a difference of totals of a score, as badness; ok is false where they cannot be of its range.
func (m metricID) moments(d []float64) (judge.Moments, bool) {
	n, sum, squares, width := d[0], d[1], d[2], m.hi-m.lo
	s := (n*m.hi - sum) / width
	s2 := (n*m.hi*m.hi - 2*m.hi*sum + squares) / (width * width)
	const slack = 1e-6
	if s < -slack*(n+1) || s > n*(1+slack)+slack || s2 > s*(1+slack)+slack*(n+1) || s2*n < s*s*(1-slack)-slack*(n+1) {
		return judge.Moments{}, false
	}
	return judge.Moments{N: n, S: min(max(s, 0), n), S2: min(max(s2, 0), n)}, true
}
