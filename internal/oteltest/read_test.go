package oteltest

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"go.opentelemetry.io/otel/attribute"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/stagedrollout/rollout"
)

// A reader is a real SDK whose metrics are collected by hand.
type reader struct {
	*sdk.MeterProvider
	manual *sdk.ManualReader
}

func newReader() *reader {
	manual := sdk.NewManualReader()
	return &reader{sdk.NewMeterProvider(sdk.WithReader(manual)), manual}
}

// A reading is one collection: the value of each series, by its name and attributes, as in
// "rollout.share{feature_flag.key=checkout rollout.ring=staff}".
type reading struct {
	series      map[string]float64
	instruments map[string]string // kind and unit of each instrument, by its name
	scopes      []string
}

func (r *reader) read(tb testing.TB) reading {
	tb.Helper()
	var data metricdata.ResourceMetrics
	if err := r.manual.Collect(context.Background(), &data); err != nil {
		tb.Fatal(err)
	}
	got := reading{map[string]float64{}, map[string]string{}, nil}
	for _, scope := range data.ScopeMetrics {
		got.scopes = append(got.scopes, scope.Scope.Name)
		for _, m := range scope.Metrics {
			kind := ""
			switch points := m.Data.(type) {
			case metricdata.Sum[int64]:
				kind = "sum"
				if points.IsMonotonic && points.Temporality == metricdata.CumulativeTemporality {
					kind = "counter"
				}
				add(tb, got.series, m.Name, points.DataPoints)
			case metricdata.Gauge[int64]:
				kind = "gauge"
				add(tb, got.series, m.Name, points.DataPoints)
			case metricdata.Gauge[float64]:
				kind = "gauge"
				add(tb, got.series, m.Name, points.DataPoints)
			default:
				tb.Fatalf("%s is a %T", m.Name, m.Data)
			}
			got.instruments[m.Name] = kind + " " + m.Unit
			if m.Description == "" {
				tb.Errorf("%s has no description", m.Name)
			}
		}
	}
	return got
}

func add[N int64 | float64](tb testing.TB, series map[string]float64, name string, points []metricdata.DataPoint[N]) {
	tb.Helper()
	for _, p := range points {
		key := name + "{" + text(p.Attributes) + "}"
		if _, twice := series[key]; twice {
			tb.Errorf("two points of %s", key)
		}
		series[key] = float64(p.Value)
	}
}

// text is a set of attributes, in the order of its keys.
func text(set attribute.Set) string {
	var parts []string
	for _, kv := range set.ToSlice() {
		parts = append(parts, string(kv.Key)+"="+kv.Value.String())
	}
	return strings.Join(parts, " ")
}

// of are the series of one instrument, without its name.
func (r reading) of(instrument string) map[string]float64 {
	got := map[string]float64{}
	for key, v := range r.series {
		if attrs, ok := strings.CutPrefix(key, instrument+"{"); ok {
			got[strings.TrimSuffix(attrs, "}")] = v
		}
	}
	return got
}

// keys are the attribute keys that the series of one instrument have, each combination once.
func (r reading) keys(instrument string) []string {
	var got []string
	for attrs := range r.of(instrument) {
		var keys []string
		rest := attrs
		for rest != "" {
			key, after, _ := strings.Cut(rest, "=")
			keys = append(keys, key)
			_, rest, _ = cutAtKey(after)
		}
		if s := strings.Join(keys, " "); !slices.Contains(got, s) {
			got = append(got, s)
		}
	}
	slices.Sort(got)
	return got
}

// cutAtKey cuts text before its next " key=": values may hold spaces.
func cutAtKey(text string) (value, rest string, found bool) {
	for _, key := range []string{" feature_flag.", " rollout."} {
		if i := strings.Index(text, key); i >= 0 && (!found || i < len(value)) {
			value, rest, found = text[:i], text[i+1:], true
		}
	}
	if !found {
		return text, "", false
	}
	return value, rest, true
}

var refunds = rollout.NewRate("refunds")

// policy has a ring, three stages and gates of every kind of metric; nothing moves by itself.
func policy() rollout.Policy {
	return rollout.Policy{
		Rings:    []rollout.Ring{{Name: "staff"}},
		Stages:   []rollout.Stage{{Ring: "staff", Percent: 50}, {Percent: 25}, {Percent: 100}},
		Bake:     1000 * 3600e9,
		Deadline: 2000 * 3600e9,
		Holdback: 10,
		Gates: []rollout.Gate{
			rollout.Errors.Within(1), rollout.Errors.AtMost(10), rollout.Latency.Quantile(0.9).WithinFactor(1.5),
			refunds.Never(),
		},
	}
}

// start runs a rollout in the bubble until stop, its first stage entered.
func start(t *testing.T, name string, mp *reader) (r *rollout.Rollout, stop func()) {
	t.Helper()
	o := &rollout.Options{Logger: slog.New(slog.DiscardHandler)}
	if mp != nil {
		o.MeterProvider = mp
	}
	r = rollout.Must(name, policy(), o)
	return r, run(t, r)
}

// run runs r in the bubble until stop.
func run(t *testing.T, r *rollout.Rollout) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	synctest.Wait()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

// traffic is what a test sent: decisions and outcomes by "ring cohort".
type traffic struct{ decided, bad map[string]int }

// send has n units of each ring decided; each 25th fails.
func (sent *traffic) send(r *rollout.Rollout, n int) {
	if sent.decided == nil {
		sent.decided, sent.bad = map[string]int{}, map[string]int{}
	}
	for i := range n {
		for _, groups := range [][]string{nil, {"staff"}} {
			d := r.Decide(rollout.Unit{Key: fmt.Sprint("user-", i), Groups: groups})
			if d.Cohort() == rollout.None {
				continue
			}
			d.Record(rollout.Errors.Observe(i%25 == 0), rollout.Latency.Observe(1e6))
			at := d.Ring() + " " + d.Cohort().String()
			sent.decided[at]++
			if i%25 == 0 {
				sent.bad[at]++
			}
		}
	}
}
