package rollout

import (
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestPercentString(t *testing.T) {
	for p, want := range map[Percent]string{
		0: "0 %", 5: "5 %", 0.5: "0.5 %", 100: "100 %", 0.001: "0.001 %", 99.999: "99.999 %", 100. / 3: "33.333333333333336 %", -1: "-1 %", 1e-9: "1e-09 %",
		Percent(math.Inf(1)): "+Inf %",
	} {
		if got := p.String(); got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		p := Percent(rapid.Float64().Draw(t, "percent"))
		text, ok := strings.CutSuffix(p.String(), " %")
		if got, err := strconv.ParseFloat(text, 64); !ok || err != nil || Percent(got) != p {
			t.Fatalf("%q is not %g", p, float64(p))
		}
	})
}

// A threshold grows with its percentage, never reaches 2^64 below 100 %, and is as near to the share as a double allows.
func TestThresholdGrows(t *testing.T) {
	percents := rapid.Map(rapid.OneOf(rapid.Float64Range(0, 100), rapid.SampledFrom([]float64{0, 5e-324, 1e-18, 50, math.Nextafter(100, 0)})), func(p float64) Percent {
		return Percent(min(p, math.Nextafter(100, 0)))
	})
	rapid.Check(t, func(t *rapid.T) {
		p, q := percents.Draw(t, "p"), percents.Draw(t, "q")
		if p > q {
			p, q = q, p
		}
		a, b := p.threshold(), q.threshold()
		if a > b {
			t.Fatalf("%v gives %d, more than the %d of %v", p, a, b, q)
		}
		if share := float64(b) / (1 << 64) * 100; math.Abs(share-float64(q)) > 1e-13*float64(q)+1e-17 {
			t.Fatalf("%v gives a share of %v", q, share)
		}
	})
	if got := Percent(math.Nextafter(100, 0)).threshold(); got < 1<<63 {
		t.Errorf("nearly everybody is %d", got)
	}
}

func TestStageHelpers(t *testing.T) {
	alike := cmp.Comparer(func(a, b Gate) bool { return a.Name() == b.Name() })
	for _, c := range []struct{ got, want any }{
		{Percentages(), []Stage{}},
		{Percentages(1, 0.5, 100), []Stage{{Percent: 1}, {Percent: 0.5}, {Percent: 100}}},
		{Canary(2), Stage{Name: "canary", Percent: 2}},
		{Ramp(time.Hour, 50), Stage{Percent: 50, Over: time.Hour}},
	} {
		if diff := cmp.Diff(c.want, c.got, alike); diff != "" {
			t.Error(diff)
		}
	}
}

// A ramp climbs to its percentage from whatever the ring has by then, and never above it.
func TestRampBeginsAboveWhatIsThere(t *testing.T) {
	r := startedWith(t, Policy{
		Rings: []Ring{{Name: "staff"}}, Bake: time.Minute, Gates: []Gate{Errors.AtMost(10)},
		Stages: []Stage{Canary(4), {Ring: "staff", Percent: 36, Over: time.Hour}, Ramp(time.Hour, 100)},
	})
	for _, want := range []struct{ staff, everyone Percent }{{4, 4}, {4 + 32./16, 4}, {36, 4 + 96./16}} {
		st := r.Status()
		if st.Rings[0].Percent != want.staff || st.Rings[1].Percent != want.everyone {
			t.Errorf("%s: staff %v, everyone %v, not %v, %v", st.Stage.Name, st.Rings[0].Percent, st.Rings[1].Percent, want.staff, want.everyone)
		}
		if err := r.Advance(t.Context(), st.Stage.Name, ""); err != nil {
			t.Fatal(err)
		}
	}
}
