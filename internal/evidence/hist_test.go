package evidence

import (
	"math"
	"math/big"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// durations draws them evenly over the octaves, half of them at a bound.
func durations() *rapid.Generator[time.Duration] {
	return rapid.Custom(func(t *rapid.T) time.Duration {
		d := time.Duration(rapid.Uint64().Draw(t, "bits") >> rapid.IntRange(1, 63).Draw(t, "shift"))
		if rapid.Bool().Draw(t, "bound") {
			d = Lower(rapid.IntRange(0, Cells-1).Draw(t, "cell")) + time.Duration(rapid.IntRange(-1, 1).Draw(t, "off"))
		}
		return d
	})
}

func TestBoundsAreExact(t *testing.T) {
	pow := func(b uint64) *big.Int {
		return new(big.Int).Exp(new(big.Int).SetUint64(b), big.NewInt(Steps), nil)
	}
	for s := range Steps {
		want := new(big.Int).Lsh(big.NewInt(1), uint(63*Steps+s)) // b^Steps ≥ 2^(63·Steps+s)
		if pow(bounds[s]).Cmp(want) < 0 || pow(bounds[s]-1).Cmp(want) >= 0 {
			t.Errorf("bounds[%d] = %#x is not 2^(63+%d/%d) rounded up", s, bounds[s], s, Steps)
		}
	}
}

func TestIndexAtEveryBound(t *testing.T) {
	if got := Index(-1); got != 0 {
		t.Errorf("Index(-1) = %d", got)
	}
	if got := Index(math.MinInt64); got != 0 {
		t.Errorf("Index of the smallest = %d", got)
	}
	if got := Index(math.MaxInt64); got != Cells-1 {
		t.Errorf("Index of the largest = %d", got)
	}
	for i := range Cells {
		lo, hi := Lower(i), Lower(i+1)
		if lo >= hi {
			t.Fatalf("Lower(%d) = %d, not below Lower(%d) = %d", i, lo, i+1, hi)
		}
		if a, b := Index(lo), Index(hi-1); a != i || b != i {
			t.Fatalf("cell %d from %d below %d has the indices %d and %d", i, lo, hi, a, b)
		}
	}
}

func TestIndexInsideItsCell(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d, e := durations().Draw(t, "d"), durations().Draw(t, "e")
		i := Index(d)
		if i < 0 || i >= Cells {
			t.Fatalf("Index(%d) = %d", d, i)
		}
		if d >= 0 && (d < Lower(i) || d >= Lower(i+1) && d != math.MaxInt64) {
			t.Fatalf("Index(%d) = %d, from %d below %d", d, i, Lower(i), Lower(i+1))
		}
		if d <= e && Index(e) < i {
			t.Fatalf("Index(%d) = %d but Index(%d) = %d", d, i, e, Index(e))
		}
	})
}

// A factor between durations is a shift of the index between floor and ceil.
func TestFactorIsShift(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := time.Duration(rapid.Int64Range(1<<minExp, 1<<31).Draw(t, "d"))
		factor := rapid.Float64Range(1, 1000).Draw(t, "factor")
		down, up := Shift(factor)
		if up-down > 1 || up < down {
			t.Fatalf("Shift(%g) = %d, %d", factor, down, up)
		}
		if got := Index(time.Duration(float64(d)*factor)) - Index(d); got < down-1 || got > up+1 {
			t.Fatalf("%d × %g shifts by %d, not within a cell of %d…%d", d, factor, got, down, up)
		}
		k := rapid.IntRange(0, 10).Draw(t, "octaves")
		if got := Index(d<<k) - Index(d); got != k*Steps {
			t.Fatalf("%d × 2^%d shifts by %d", d, k, got)
		}
	})
}

func TestShift(t *testing.T) {
	for _, c := range []struct {
		factor   float64
		down, up int
	}{
		{1, 0, 0}, {2, 35, 35}, {4, 70, 70}, {.5, -35, -35},
		{math.Pow(2, 9./35), 9, 9}, {math.Pow(2, 1./35), 1, 1}, {math.Pow(2, -3./35), -3, -3},
		{1.2, 9, 10}, {1.195, 8, 9}, {1.5, 20, 21}, {1 + 1e-6, 0, 1}, {1 - 1e-6, -1, 0},
		{0, 0, 0}, {-1, 0, 0}, {math.NaN(), 0, 0}, {math.Inf(1), Cells, Cells}, {math.SmallestNonzeroFloat64, -Cells, -Cells},
	} {
		if down, up := Shift(c.factor); down != c.down || up != c.up {
			t.Errorf("Shift(%g) = %d, %d, want %d, %d", c.factor, down, up, c.down, c.up)
		}
	}
	for k := -Steps * 20; k <= Steps*20; k++ {
		if down, up := Shift(math.Exp2(float64(k) / Steps)); down != k || up != k {
			t.Fatalf("Shift(2^(%d/%d)) = %d, %d", k, Steps, down, up)
		}
	}
}

func TestIndexAllocatesNothing(t *testing.T) {
	d := time.Duration(0)
	if n := testing.AllocsPerRun(100, func() { d += time.Millisecond; Index(d) }); n != 0 {
		t.Errorf("%g allocations", n)
	}
}

func BenchmarkIndex(b *testing.B) {
	var ds [1024]time.Duration
	for i := range ds {
		ds[i] = time.Duration(1e6 * math.Exp(math.Sin(float64(i)*1e3)))
	}
	sum, i := 0, 0
	for b.Loop() {
		sum += Index(ds[i&1023])
		i++
	}
	if sum == 0 {
		b.Fatal("nothing measured")
	}
}
