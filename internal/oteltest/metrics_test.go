package oteltest

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel"

	"github.com/stagedrollout/rollout"
)

// The instruments, their kinds, units and attributes are what dashboards are built on.
func TestInstruments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mp := newReader()
		if got := mp.read(t); len(got.series) > 0 {
			t.Errorf("before Run there is %v", got.series)
		}
		r, stop := start(t, "checkout", mp)
		(&traffic{}).send(r, 10)
		got := mp.read(t)
		if len(got.scopes) != 1 || got.scopes[0] != "github.com/stagedrollout/rollout" {
			t.Errorf("scopes are %q", got.scopes)
		}
		for name, want := range map[string]struct {
			kind string
			keys string // of each combination of attributes, besides feature_flag.key
			n    int
		}{
			"rollout.decisions": {"counter {decision}", "feature_flag.key feature_flag.result.variant rollout.ring", 2 * 2},
			"rollout.outcomes": {"counter {outcome}", "feature_flag.key feature_flag.result.variant rollout.metric rollout.outcome rollout.ring, " +
				"feature_flag.key feature_flag.result.variant rollout.metric rollout.ring", 2 * 2 * (2 + 1 + 2)},
			"rollout.dropped":       {"counter {item}", "feature_flag.key rollout.reason", 6},
			"rollout.share":         {"gauge %", "feature_flag.key rollout.ring", 2},
			"rollout.stage":         {"gauge {stage}", "feature_flag.key", 1},
			"rollout.state":         {"gauge {state}", "feature_flag.key rollout.state", 7},
			"rollout.sessions":      {"gauge {session}", "feature_flag.key feature_flag.result.variant", 2},
			"rollout.gate.evidence": {"gauge 1", "feature_flag.key rollout.gate", 5},
		} {
			if got.instruments[name] != want.kind {
				t.Errorf("%s is a %q, want %q", name, got.instruments[name], want.kind)
			}
			if keys := strings.Join(got.keys(name), ", "); keys != want.keys {
				t.Errorf("%s has the attributes %q, want %q", name, keys, want.keys)
			}
			if n := len(got.of(name)); n != want.n {
				t.Errorf("%s has %d series, want %d: %v", name, n, want.n, got.of(name))
			}
			delete(got.instruments, name)
		}
		if len(got.instruments) > 0 {
			t.Errorf("there are also %v", got.instruments)
		}
		stop()
		if got := mp.read(t); len(got.series) > 0 {
			t.Errorf("after Run there is %v", got.series)
		}
	})
}

// What was decided and recorded is what is read, and counters never fall: not by stages, a rollback, a restart of the
// rollout, or one of Run.
func TestValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mp := newReader()
		r, stop := start(t, "checkout", mp)
		var sent traffic
		var last reading
		check := func(when string, state rollout.State, stage, staff, everyone float64) {
			t.Helper()
			now := mp.read(t)
			for key, v := range now.series {
				if strings.HasPrefix(key, "rollout.decisions") || strings.HasPrefix(key, "rollout.outcomes") || strings.HasPrefix(key, "rollout.dropped") {
					if v < last.series[key] {
						t.Errorf("%s: %s fell from %v to %v", when, key, last.series[key], v)
					}
				}
			}
			for key := range last.series {
				if _, still := now.series[key]; !still && !strings.HasPrefix(key, "rollout.stage") {
					t.Errorf("%s: %s has gone", when, key)
				}
			}
			last = now
			want := map[string]float64{}
			for _, ring := range []string{"staff", "everyone"} {
				for _, cohort := range []string{"control", "candidate"} {
					n, bad := float64(sent.decided[ring+" "+cohort]), float64(sent.bad[ring+" "+cohort])
					at := "{feature_flag.key=checkout feature_flag.result.variant=" + cohort
					want["rollout.decisions"+at+" rollout.ring="+ring+"}"] = n
					want["rollout.outcomes"+at+" rollout.metric=errors rollout.outcome=good rollout.ring="+ring+"}"] = n - bad
					want["rollout.outcomes"+at+" rollout.metric=errors rollout.outcome=bad rollout.ring="+ring+"}"] = bad
					want["rollout.outcomes"+at+" rollout.metric=latency rollout.ring="+ring+"}"] = n
				}
			}
			want["rollout.share{feature_flag.key=checkout rollout.ring=staff}"] = staff
			want["rollout.share{feature_flag.key=checkout rollout.ring=everyone}"] = everyone
			for s := rollout.Pending; s <= rollout.Completed; s++ {
				key := "rollout.state{feature_flag.key=checkout rollout.state=" + s.String() + "}"
				if want[key] = 0; s == state {
					want[key] = 1
				}
			}
			if stage >= 0 {
				want["rollout.stage{feature_flag.key=checkout}"] = stage
			}
			for key, v := range want {
				if got, ok := now.series[key]; !ok || got != v {
					t.Errorf("%s: %s is %v (there: %t), want %v", when, key, got, ok, v)
				}
			}
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		ctx := t.Context()

		check("at first", rollout.Running, 0, 50, 0)
		sent.send(r, 1000)
		check("in the first stage", rollout.Running, 0, 50, 0)
		must(r.Advance(ctx, "staff 50 %", "test"))
		check("on entering the second stage", rollout.Running, 1, 50, 25)
		sent.send(r, 1000)
		check("in the second stage", rollout.Running, 1, 50, 25)
		must(r.Hold(ctx, "test"))
		check("held", rollout.Held, 1, 50, 25)
		must(r.Resume(ctx, "test"))
		must(r.SetPercent(ctx, rollout.Everyone, 3, "test"))
		sent.send(r, 1000)
		check("at a share set by hand", rollout.Held, 1, 50, 3)
		must(r.RollbackRing(ctx, "staff", "test"))
		sent.send(r, 1000)
		check("with a ring rolled back", rollout.Held, 1, 0, 3)
		must(r.Rollback(ctx, "test"))
		sent.send(r, 1000)
		check("rolled back", rollout.RolledBack, 1, 0, 0)
		must(r.Restart(ctx, "test"))
		check("restarted", rollout.Running, 0, 50, 0)
		sent.send(r, 1000)
		check("restarted, with traffic", rollout.Running, 0, 50, 0)
		stop()
		if got := mp.read(t); len(got.series) > 0 {
			t.Errorf("after Run there is %v", got.series)
		}
		stop = run(t, r)
		sent.send(r, 1000)
		check("run again", rollout.Running, 0, 50, 0)
		must(r.Advance(ctx, "staff 50 %", "test"))
		must(r.Advance(ctx, "everyone 25 %", "test"))
		sent.send(r, 1000)
		check("in the last stage", rollout.Running, 2, 100, 100)
		must(r.Advance(ctx, "everyone 100 %", "test"))
		sent.send(r, 1000)
		check("completed", rollout.Completed, 2, 100, 100)
		stop()
	})
}

// What does not count is counted, by reason.
func TestDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mp := newReader()
		r, stop := start(t, "checkout", mp)
		defer stop()
		if err := r.Advance(t.Context(), "staff 50 %", "test"); err != nil {
			t.Fatal(err)
		}
		r.Decide(rollout.Unit{})
		d := r.Decide(rollout.Unit{Key: "user"})
		d.Record(rollout.NewRate("unheard-of").Observe(true), rollout.NewRate("unheard-of").Observe(false))
		if err := r.Rollback(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		d.Record(rollout.Errors.Observe(true), rollout.Latency.Observe(1), refunds.Observe(false))
		got := mp.read(t).of("rollout.dropped")
		for reason, want := range map[string]float64{"no unit": 1, "unknown metric": 2, "late": 3, "invalid": 0, "unsure": 0, "slow subscriber": 0} {
			if n := got["feature_flag.key=checkout rollout.reason="+reason]; n != want {
				t.Errorf("%s is %v, want %v: %v", reason, n, want, got)
			}
		}
	})
}

// Of a mix the label is told, of a score how many there were; what is not a number is dropped.
func TestScoresAndMixes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mp := newReader()
		quality, route := rollout.NewScore("quality", 0, 1), rollout.NewMix("route", "search", "answer")
		r := rollout.Must("kinds", rollout.Policy{
			Stages: rollout.Percentages(50, 100), Bake: time.Minute, Gates: []rollout.Gate{rollout.Errors.AtMost(10)},
			Metrics: []rollout.Metric{quality, route},
		}, &rollout.Options{MeterProvider: mp, Logger: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		synctest.Wait()
		for i := range 50 {
			r.Decide(rollout.Unit{Key: fmt.Sprint(i)}).Record(quality.Observe(.3), quality.Observe(math.NaN()), route.Observe("answer"), route.Observe("a new one"))
		}
		got := mp.read(t)
		for what, want := range map[string]float64{
			"rollout.metric=quality":                      50,
			"rollout.metric=route rollout.outcome=search": 0,
			"rollout.metric=route rollout.outcome=answer": 50,
			"rollout.metric=route rollout.outcome=other":  50,
			"rollout.metric=errors rollout.outcome=good":  0,
		} {
			n, series := 0.0, 0
			for key, v := range got.of("rollout.outcomes") {
				if strings.Contains(key, what+" rollout.ring=") {
					n, series = n+v, series+1
				}
			}
			if n != want || series != 2 {
				t.Errorf("%s: %v in %d series, want %v in 2: %v", what, n, series, want, got.of("rollout.outcomes"))
			}
		}
		if n := got.of("rollout.dropped")["feature_flag.key=kinds rollout.reason=invalid"]; n != 50 {
			t.Errorf("%v are invalid", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Evidence is a part of the way to a broken gate: 0 without any, growing with bad outcomes, 1 or more once broken.
func TestEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mp := newReader()
		r, stop := start(t, "checkout", mp)
		defer stop()
		const within = "feature_flag.key=checkout rollout.gate=errors.Within(1)"
		evidence := func() float64 {
			t.Helper()
			got := mp.read(t).of("rollout.gate.evidence")
			for gate, v := range got {
				if !(v >= 0) {
					t.Errorf("%s is %v", gate, v)
				}
			}
			return got[within]
		}
		if v := evidence(); v != 0 {
			t.Errorf("without outcomes it is %v", v)
		}
		before := 0.0
		for tick := range 1000 {
			for i := range 50 {
				d := r.Decide(rollout.Unit{Key: fmt.Sprint(tick, i), Groups: []string{"staff"}})
				d.Record(rollout.Errors.Observe(i%7 == 0 && d.Enabled()))
			}
			time.Sleep(5 * time.Second) // a tick
			synctest.Wait()
			v := evidence()
			if r.Status().State != rollout.Running {
				if before <= 0 || before >= 1 {
					t.Errorf("just before the rollback it was %v", before)
				}
				return
			}
			before = v
		}
		t.Error("the candidate was not rolled back")
	})
}

// Two rollouts report through one provider without mixing, and one may end before the other.
func TestTwoRollouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mp := newReader()
		a, stopA := start(t, "a", mp)
		b, stopB := start(t, "b", mp)
		(&traffic{}).send(a, 1000)
		if err := b.Rollback(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		sums := func(got reading) (a, b float64) {
			for attrs, v := range got.of("rollout.decisions") {
				switch {
				case strings.HasPrefix(attrs, "feature_flag.key=a "):
					a += v
				case strings.HasPrefix(attrs, "feature_flag.key=b "):
					b += v
				default:
					t.Errorf("whose is %s?", attrs)
				}
			}
			return a, b
		}
		got := mp.read(t)
		if a, b := sums(got); a != 1000 || b != 0 {
			t.Errorf("decisions are %v and %v, want 1000 and 0", a, b)
		}
		state := got.of("rollout.state")
		if state["feature_flag.key=a rollout.state=running"] != 1 || state["feature_flag.key=b rollout.state=rolled back"] != 1 {
			t.Errorf("states are %v", state)
		}
		stopA()
		got = mp.read(t)
		for key := range got.series {
			if !strings.Contains(key, "feature_flag.key=b") {
				t.Errorf("after a's Run there is %s", key)
			}
		}
		if n := len(got.of("rollout.state")); n != 7 {
			t.Errorf("b has %d states", n)
		}
		stopB()
		if got := mp.read(t); len(got.series) > 0 {
			t.Errorf("after both there is %v", got.series)
		}
	})
}

// global is of the process, because OpenTelemetry hands over to the first global provider only.
var global = newReader()

// Without a MeterProvider the global one is used, also if it is set after Run began.
func TestGlobal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, stop := start(t, "global", nil)
		otel.SetMeterProvider(global)
		if n := len(global.read(t).of("rollout.state")); n != 7 {
			t.Errorf("set after Run began, it has %d states", n)
		}
		_, stopSecond := start(t, "global-second", nil)
		if n := len(global.read(t).of("rollout.state")); n != 14 {
			t.Errorf("set before Run began, it has %d states", n)
		}
		stop()
		stopSecond()
		if got := global.read(t); len(got.series) > 0 {
			t.Errorf("after Run there is %v", got.series)
		}
	})
}

// With a real SDK a decision and its record still allocate nothing.
func TestAllocWithSDK(t *testing.T) {
	mp := newReader()
	r := rollout.Must("alloc", policy(), &rollout.Options{
		Interval: time.Hour, Logger: slog.New(slog.DiscardHandler), MeterProvider: mp,
	})
	entered := make(chan struct{}, 1)
	r.Subscribe(func(e rollout.Event) {
		if e.Kind == rollout.StageEntered {
			entered <- struct{}{}
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	<-entered
	u := rollout.Unit{Key: "00000000-0000-4000-8000-000000000001", Groups: []string{"staff"}}
	if d := r.Decide(u); d.Cohort() == rollout.None {
		t.Fatalf("the unit is not compared: %v", d.Reason())
	}
	mp.read(t) // the instruments are in use
	allocs := testing.AllocsPerRun(10000, func() {
		d := r.Decide(u)
		d.Record(rollout.Errors.Observe(false), rollout.Latency.Observe(time.Millisecond))
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
