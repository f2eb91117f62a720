package rollout

import (
	"context"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// usual is traffic of so many requests a second, as simulate has it.
func usual(perSecond float64) Traffic {
	return Traffic{
		PerSecond: perSecond,
		Rings:     map[string]Percent{"staff": 2},
		Rates:     map[string]Percent{"errors": 1},
		Timings:   map[string]Durations{"latency": {50 * time.Millisecond, 160 * time.Millisecond}},
	}
}

func forecast(t *testing.T, p Policy, tr Traffic) Forecast {
	t.Helper()
	f, err := p.Forecast(tr)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// More traffic never takes longer, a wider margin neither, and nine of ten never less than half.
func TestForecastIsMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		margin := rapid.Float64Range(.3, 5).Draw(t, "margin")
		rate := rapid.Float64Range(.5, 5000).Draw(t, "rate")
		base := rapid.Float64Range(0, 5).Draw(t, "base")
		policy := func(margin float64) Policy {
			return Policy{Stages: Percentages(1, 10, 50, 100), Holdback: 10, Bake: time.Minute, Gates: []Gate{Errors.Within(Percent(margin)), Errors.AtMost(40)}}
		}
		get := func(margin, rate float64) Forecast {
			f, err := policy(margin).Forecast(Traffic{PerSecond: rate, Rates: map[string]Percent{"errors": Percent(base)}, Worse: map[string]Worsening{"errors": {Points: 10}}})
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
		f, more, wider := get(margin, rate), get(margin, 2*rate), get(1.5*margin, rate)
		slack := 15 * time.Second // ticks
		for i, s := range f.Stages {
			if more.Stages[i].Stay.P50 > s.Stay.P50+slack || wider.Stages[i].Stay.P50 > s.Stay.P50+s.Stay.P50/20+slack {
				t.Fatalf("%s: %v, at twice the traffic %v, with a wider margin %v", s.Name, s.Stay, more.Stages[i].Stay, wider.Stages[i].Stay)
			}
			for _, span := range []Span{s.Stay, s.Proof, s.Catch.Time} {
				if span.P90 < span.P50 || span.P50 < 0 {
					t.Fatalf("%s: a span of %v", s.Name, span)
				}
			}
			if s.Catch.Time.P50 < Never && (!(s.Catch.Requests.P50 > 0) || !(s.Catch.Hurt.P50 <= s.Catch.Requests.P50)) {
				t.Fatalf("%s: %+v", s.Name, s.Catch)
			}
		}
		if text, err := json.Marshal(f); err != nil || !json.Valid(text) {
			t.Fatal(err)
		}
	})
}

// A stage is forecast to prove exactly where the machine asks it to.
func TestForecastAsksAsTheMachine(t *testing.T) {
	gates := []Gate{Errors.Within(1)}
	for _, c := range []struct {
		name   string
		p      Policy
		proves []bool
	}{
		{"from 50 %", Policy{Stages: Percentages(5, 50, 100), Holdback: 5}, []bool{false, true, false}},
		{"ProveFrom", Policy{Stages: Percentages(5, 50, 100), Holdback: 5, ProveFrom: 5}, []bool{true, true, false}},
		{"the last alone", Policy{Stages: Percentages(5, 20, 100), Holdback: 5}, []bool{false, false, true}},
		{"GuardOnly", Policy{Stages: []Stage{{Percent: 50, GuardOnly: true}, {Percent: 100}}, Holdback: 5}, []bool{false, true}},
		{"nested", Policy{Rings: []Ring{{Name: "staff"}}, Stages: []Stage{{Ring: "staff", Percent: 60}, {Percent: 60}, {Percent: 100}}, Holdback: 5}, []bool{false, true, false}},
		{"no control at last", Policy{Stages: []Stage{{Percent: 60}, {Percent: 100, Gates: []Gate{Errors.AtMost(20)}}}}, []bool{true, false}},
	} {
		c.p.Gates, c.p.Bake = gates, time.Minute
		f := forecast(t, c.p, usualRings(c.p, 100))
		for i, s := range f.Stages {
			if got := s.Proof != (Span{}); got != c.proves[i] {
				t.Errorf("%s: %s proves: %v", c.name, s.Name, got)
			}
		}
		if f.Duration.P50 == Never || f.Catch.Time.P50 == Never {
			t.Errorf("%s: %v", c.name, f)
		}
	}
}

func usualRings(p Policy, rate float64) Traffic {
	tr := usual(rate)
	if len(p.Rings) == 0 {
		tr.Rings = nil
	}
	return tr
}

func TestForecastAdvice(t *testing.T) {
	has := func(t *testing.T, f Forecast, texts ...string) {
		t.Helper()
		for _, s := range texts {
			if !strings.Contains(f.String(), s) {
				t.Errorf("%q is not in\n%s", s, f)
			}
		}
	}
	t.Run("too little traffic", func(t *testing.T) {
		p := Policy{Stages: Percentages(25, 50, 100), Holdback: 25, ProveFrom: 25, Bake: time.Minute, Deadline: 4 * time.Hour, Gates: []Gate{Errors.Within(.5)}}
		f := forecast(t, p, Traffic{PerSecond: 1.2})
		has(t, f, "stage everyone 25 % stalls", "errors.Within(0.5) needs about", "; Within(")
		if f.Stages[0].Outlook != OutlookStalls || f.Duration != (Span{Never, Never}) {
			t.Errorf("%v, %v", f.Stages[0].Outlook, f.Duration)
		}
		p.Gates = []Gate{Errors.Within(1.5)}
		if f := forecast(t, p, Traffic{PerSecond: 1.2}); f.Stages[0].Stay.P50 > 4*time.Hour {
			t.Errorf("a wider margin does not do: %v", f)
		}
	})
	t.Run("a share too small to prove", func(t *testing.T) {
		p := Policy{Stages: Percentages(1, 50, 100), Holdback: 5, ProveFrom: 1, Bake: time.Minute, Gates: []Gate{Errors.Within(1)}}
		has(t, forecast(t, p, Traffic{PerSecond: 1.5}), "ProveFrom(50)", "stage everyone 1 % stalls")
		p.ProveFrom = 50
		if f := forecast(t, p, Traffic{PerSecond: 1.5}); f.Stages[0].Outlook != OutlookPasses || f.Stages[1].Outlook != OutlookPasses {
			t.Errorf("the advice does not do: %v", f)
		}
	})
	t.Run("what can not be", func(t *testing.T) {
		p := Policy{Stages: Percentages(50, 100), Holdback: 5, Bake: time.Minute, Gates: []Gate{Errors.AtMost(1)}}
		has(t, forecast(t, p, Traffic{PerSecond: 1000, Rates: map[string]Percent{"errors": 2}}), "errors.AtMost(1) can not be proven", "AtMost(3) would do")
	})
	t.Run("Never", func(t *testing.T) {
		p := Policy{Stages: Percentages(50, 100), Holdback: 5, Bake: time.Minute, Gates: []Gate{Errors.Never().OnFail(Rollback), Latency.Quantile(.5).WithinFactor(2)}}
		f := forecast(t, p, Traffic{PerSecond: 10})
		has(t, f, "errors.Never is broken by the first event")
		if f.Catch.Gate != "errors.Never" {
			t.Errorf("found by %q", f.Catch.Gate)
		}
	})
	t.Run("a bake that waits for outcomes", func(t *testing.T) {
		p := Policy{Stages: Percentages(.1, 50, 100), Holdback: 5, Bake: 10 * time.Hour, Gates: []Gate{Errors.Within(5)}}
		f := forecast(t, p, Traffic{PerSecond: 1})
		has(t, f, "its bake takes")
		if f.Stages[0].Outlook != OutlookStalls {
			t.Errorf("%v", f)
		}
	})
	t.Run("an approval and a check", func(t *testing.T) {
		ok := Check("ok", func(context.Context) (Verdict, error) { return Healthy, nil })
		p := Policy{Stages: []Stage{{Percent: 5, Approval: true}, {Percent: 50}, {Percent: 100}}, Holdback: 5, Bake: time.Minute, Gates: []Gate{Errors.Within(5), ok}}
		f := forecast(t, p, Traffic{PerSecond: 100})
		has(t, f, "waits for an approval", "waits for a Check")
		if f.Stages[0].Outlook != OutlookOpen || f.Stages[1].Outlook != OutlookOpen || f.Stages[2].Outlook != OutlookPasses || f.Duration.P50 == Never {
			t.Errorf("%v", f)
		}
	})
	t.Run("nothing worse", func(t *testing.T) {
		p := Policy{Stages: Percentages(50, 100), Holdback: 5, Bake: time.Minute, Gates: []Gate{Latency.Quantile(.5).WithinFactor(2)}}
		has(t, forecast(t, p, Traffic{PerSecond: 100}), "the regression is not found")
	})
}

// A climbing stage takes its time, and its proof begins at small shares.
func TestForecastOfAClimb(t *testing.T) {
	p := Policy{Stages: []Stage{Ramp(30*time.Minute, 50), {Percent: 100}}, Holdback: 5, Bake: time.Minute, Gates: []Gate{Errors.Within(1)}}
	f := forecast(t, p, Traffic{PerSecond: 50})
	if bake := f.Stages[0].Bake; bake < 31*time.Minute || bake > 33*time.Minute {
		t.Errorf("the climb takes %v", bake)
	}
	at := Policy{Stages: Percentages(50, 100), Holdback: 5, Bake: time.Minute, Gates: p.Gates}
	slow, fast := f.Stages[0].Catch, forecast(t, at, Traffic{PerSecond: 50}).Stages[0].Catch
	if slow.Time.P50 < fast.Time.P50 || slow.Hurt.P50 > fast.Hurt.P50*1.5 {
		t.Errorf("climbing %+v, at once %+v", slow, fast)
	}
}

// Units that come again are hurt once.
func TestForecastCountsUnits(t *testing.T) {
	tr := usual(200)
	many := forecast(t, checkout(), tr)
	tr.Units = 500
	few := forecast(t, checkout(), tr)
	a, b := many.Stages[3].Catch.Hurt, few.Stages[3].Catch.Hurt
	if !(b.P90 < a.P90) || b.P90 > 500 || a.P90 < 10 {
		t.Errorf("hurt: %v of units that come once, %v of 500", a, b)
	}
	if got := few.Stages[3].Units; math.Abs(got-(.25*.98+.95*.02)*500) > 1e-6 {
		t.Errorf("%g units at 25 %%", got)
	}
}

func TestTrafficIsValidated(t *testing.T) {
	for _, c := range []struct {
		name string
		tr   Traffic
		want string
	}{
		{"none", Traffic{}, "Traffic.PerSecond: 0 must be above 0"},
		{"NaN", Traffic{PerSecond: math.NaN()}, "Traffic.PerSecond: NaN"},
		{"infinite", Traffic{PerSecond: math.Inf(1)}, "Traffic.PerSecond: +Inf"},
		{"units", Traffic{PerSecond: 1, Units: -1}, "Traffic.Units: -1 is negative"},
		{"interval", Traffic{PerSecond: 1, Interval: -1}, "Traffic.Interval: -1ns is negative"},
		{"ring", Traffic{PerSecond: 1, Rings: map[string]Percent{"beta": 1}}, `Traffic.Rings["beta"]: the policy names no such ring`},
		{"everyone", Traffic{PerSecond: 1, Rings: map[string]Percent{"everyone": 1}}, `Traffic.Rings["everyone"]`},
		{"part", Traffic{PerSecond: 1, Rings: map[string]Percent{"staff": 101}}, `Traffic.Rings["staff"]: 101`},
		{"rate", Traffic{PerSecond: 1, Rates: map[string]Percent{"errors": 100}}, `Traffic.Rates["errors"]: 100`},
		{"kind", Traffic{PerSecond: 1, Rates: map[string]Percent{"latency": 1}}, `Traffic.Rates["latency"]: the metric is of another kind`},
		{"timing", Traffic{PerSecond: 1, Timings: map[string]Durations{"latency": {2, 1}}}, `Traffic.Timings["latency"]`},
		{"score", Traffic{PerSecond: 1, Scores: map[string]Values{"x": {math.NaN(), 1}}}, `Traffic.Scores["x"]`},
		{"mix", Traffic{PerSecond: 1, Mixes: map[string][]float64{"x": {.5, .6}}}, `Traffic.Mixes["x"]`},
		{"worse", Traffic{PerSecond: 1, Worse: map[string]Worsening{"x": {Points: 1}}}, `Traffic.Worse["x"]: no gate`},
		{"worse of a kind", Traffic{PerSecond: 1, Worse: map[string]Worsening{"latency": {Points: 1}}}, `Traffic.Worse["latency"]`},
		{"better", Traffic{PerSecond: 1, Worse: map[string]Worsening{"errors": {Points: -1}}}, `Traffic.Worse["errors"]`},
	} {
		_, err := checkout().Forecast(c.tr)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if _, err := (Policy{}).Forecast(Traffic{PerSecond: 1}); err == nil || !strings.Contains(err.Error(), "Policy.Stages") {
		t.Errorf("an empty policy: %v", err)
	}
	if _, err := checkout().Forecast(Traffic{PerSecond: -1, Units: -1}); err == nil || strings.Count(err.Error(), "Traffic.") != 2 {
		t.Errorf("two problems at once: %v", err)
	}
}

func TestForecastAsJSON(t *testing.T) {
	f := forecast(t, checkout(), usual(20))
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), `"outlook":"passes"`) {
		t.Errorf("no outlook in %s", text)
	}
	var back Forecast
	if err := json.Unmarshal(text, &back); err != nil || back.String() != f.String() {
		t.Errorf("%v: %v came back from %v", err, back, f)
	}
	for _, d := range []struct {
		d    time.Duration
		want string
	}{{Never, "never"}, {0, "0s"}, {30 * time.Second, "30s"}, {10 * time.Minute, "10m"}, {9 * time.Hour, "9h"}, {80 * time.Hour, "3.33d"}, {9000 * time.Hour * 24, "24.7y"}} {
		if got := short(d.d); got != d.want {
			t.Errorf("%v is written %q, not %q", int64(d.d), got, d.want)
		}
	}
	for x, want := range map[float64]string{0: "-", 3.14: "3.1", 87: "87", 11234: "11,000", 1234567: "1,200,000"} {
		if got := roughly(x); got != want {
			t.Errorf("%v is written %q, not %q", x, got, want)
		}
	}
}
