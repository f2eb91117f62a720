package rollout

import (
	"time"
	"unique"

	"github.com/stagedrollout/rollout/internal/evidence"
)

// Errors and Latency are what [Rollout.Handler], [Middleware], [Do] and [Rollout.Do] record: whether a request or a call
// failed, and how long it took.
var (
	Errors  = NewRate("errors")
	Latency = NewTiming("latency")
)

// metricKind says what a metric observes.
type metricKind uint8

const (
	rateKind metricKind = iota + 1
	timingKind
)

func (k metricKind) String() string {
	switch k {
	case rateKind:
		return "rate"
	case timingKind:
		return "timing"
	}
	return "unknown"
}

// metricID is what makes two metrics the same: their name, kind and parameters.
type metricID struct {
	name string
	kind metricKind
}

// metricRef is a comparable reference to a metricID: equal metrics, equal references.
type metricRef = unique.Handle[metricID]

// Metric is something observed of every unit: a [Rate] or a [Timing]. A rollout records [Errors], [Latency] and the
// metrics that its gates and Policy.Metrics name; observations of any other are dropped and counted in [Status].
type Metric interface {
	// Name is the name the metric was made with.
	Name() string
	ref() metricRef
}

// Rate is a yes-or-no metric where yes is the bad answer: an error, a timeout, a violation. The zero value observes
// nothing. Two Rates of the same name are the same metric.
type Rate struct{ m metricRef }

// NewRate returns the rate called name: [a-z0-9][a-z0-9._-]{0,63}, checked where a policy uses it.
func NewRate(name string) Rate { return Rate{unique.Make(metricID{name, rateKind})} }

// Name is the name the rate was made with.
func (r Rate) Name() string   { return nameOf(r.m) }
func (r Rate) ref() metricRef { return r.m }

// Observe is one outcome: bad is true if the event happened.
func (r Rate) Observe(bad bool) Observation {
	o := Observation{m: r.m}
	if bad {
		o.value = 1
	}
	return o
}

// Timing is a metric of durations, such as the latency of a request. The zero value observes nothing. Two Timings of the
// same name are the same metric.
type Timing struct{ m metricRef }

// NewTiming returns the timing called name: [a-z0-9][a-z0-9._-]{0,63}, checked where a policy uses it.
func NewTiming(name string) Timing { return Timing{unique.Make(metricID{name, timingKind})} }

// Name is the name the timing was made with.
func (t Timing) Name() string   { return nameOf(t.m) }
func (t Timing) ref() metricRef { return t.m }

// Observe is one duration. It is kept to within 2 % between 1 µs and 73 minutes; what is beyond counts as the nearest
// end, and a negative duration as zero.
func (t Timing) Observe(d time.Duration) Observation {
	return Observation{m: t.m, value: uint64(max(d, 0))}
}

// Observation is one outcome of one metric, to be given to [Decision.Record] or [Record]. The zero value is dropped.
type Observation struct {
	m     metricRef
	value uint64 // rate: 0 or 1; timing: nanoseconds
}

// cell is the index of the disjoint outcome that o falls into.
func (o Observation) cell(kind metricKind) int {
	if kind == timingKind {
		return evidence.Index(time.Duration(o.value))
	}
	return int(o.value)
}

func nameOf(m metricRef) string {
	if m == (metricRef{}) {
		return ""
	}
	return m.Value().name
}

// cells is how many disjoint outcomes a metric of this kind has.
func (k metricKind) cells() int {
	if k == timingKind {
		return evidence.Cells
	}
	return 2
}
