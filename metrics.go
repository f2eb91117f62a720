package rollout

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
	"unique"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
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
	scoreKind
	mixKind
)

func (k metricKind) String() string {
	switch k {
	case rateKind:
		return "rate"
	case timingKind:
		return "timing"
	case scoreKind:
		return "score"
	case mixKind:
		return "mix"
	}
	return "unknown"
}

// metricID is what makes two metrics the same: their name, kind and parameters.
type metricID struct {
	name   string
	kind   metricKind
	lo, hi float64 // of a score
	labels string  // of a mix: each after its length, see joinLabels
}

// metricRef is a comparable reference to a metricID: equal metrics, equal references.
type metricRef = unique.Handle[metricID]

// String is the kind with its parameters, for people.
func (id metricID) String() string {
	switch id.kind {
	case scoreKind:
		return "score from " + number(id.lo) + " to " + number(id.hi)
	case mixKind:
		return fmt.Sprintf("mix of %q", splitLabels(id.labels))
	}
	return id.kind.String()
}

// cells is how many disjoint outcomes the metric has.
func (id metricID) cells() int {
	switch id.kind {
	case timingKind:
		return evidence.Cells
	case scoreKind:
		return judge.ScoreCells
	case mixKind:
		return len(splitLabels(id.labels))
	}
	return 2
}

// groups is how many groups of units its outcomes are counted by. A timing is counted by groups in its marks.
func (id metricID) groups() int {
	switch id.kind {
	case timingKind:
		return 1
	case scoreKind, mixKind:
		return 16
	}
	return evidence.Groups
}

// misnamed is what is wrong with the metric's name.
func (id metricID) misnamed() []string {
	switch {
	case !ringName.MatchString(id.name):
		return []string{fmt.Sprintf("the metric's name %q must match %s", id.name, ringName)}
	case id.name == GuardSplit:
		return []string{fmt.Sprintf("the metric's name %q is that of a guard that is always there", id.name)}
	}
	return nil
}

// problems are what is wrong with the metric's parameters, each without its name.
func (id metricID) problems() []string {
	var ps []string
	bad := func(format string, args ...any) { ps = append(ps, fmt.Sprintf(format, args...)) }
	switch id.kind {
	case scoreKind:
		switch {
		case math.IsNaN(id.lo) || math.IsNaN(id.hi) || math.IsInf(id.lo, 0) || math.IsInf(id.hi, 0):
			bad("the score's range from %v to %v is not finite", id.lo, id.hi)
		case id.lo >= id.hi:
			bad("the score's range from %v to %v is empty; the lower end comes first", id.lo, id.hi)
		case math.IsInf(id.hi-id.lo, 0):
			bad("the score's range from %v to %v is too wide", id.lo, id.hi)
		}
	case mixKind:
		labels, seen, declared := splitLabels(id.labels), map[string]bool{}, 0
		for i, l := range labels {
			switch {
			case l == "":
				bad("label %d of the mix is empty", i)
			case !utf8.ValidString(l) || len(l) > maxLabel:
				bad("label %d of the mix, %.80q, must be valid UTF-8 and at most %d bytes", i, l, maxLabel)
			case seen[l]:
				bad("label %d of the mix, %q, stands there twice", i, l)
			}
			if seen[l] = true; l != otherLabel {
				declared++
			}
		}
		if declared < 2 {
			bad("the mix has fewer than 2 labels besides %q", otherLabel)
		}
		if declared > maxLabels {
			bad("the mix has %d labels besides %q; %d are the most", declared, otherLabel, maxLabels)
		}
	}
	return ps
}

// Metric is something observed of every unit: a [Rate], a [Timing], a [Score] or a [Mix]. A rollout records [Errors],
// [Latency] and the metrics that its gates and Policy.Metrics name; observations of any other are dropped and counted in
// [Status]. Two metrics are the same if their name, kind and parameters are; a policy has one of each name.
type Metric interface {
	// Name is the name the metric was made with.
	Name() string
	ref() metricRef
}

// Rate is a yes-or-no metric where yes is the bad answer: an error, a timeout, a violation. The zero value observes
// nothing. Two Rates of the same name are the same metric.
type Rate struct{ m metricRef }

// NewRate returns the rate called name: [a-z0-9][a-z0-9._-]{0,63}, checked where a policy uses it.
func NewRate(name string) Rate { return Rate{unique.Make(metricID{name: name, kind: rateKind})} }

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
func NewTiming(name string) Timing {
	return Timing{unique.Make(metricID{name: name, kind: timingKind})}
}

// Name is the name the timing was made with.
func (t Timing) Name() string   { return nameOf(t.m) }
func (t Timing) ref() metricRef { return t.m }

// Observe is one duration. It is kept to within 2 % between 1 µs and 73 minutes; what is beyond counts as the nearest
// end, and a negative duration as zero.
func (t Timing) Observe(d time.Duration) Observation {
	return Observation{m: t.m, value: uint64(max(d, 0))}
}

// Score is a metric of numbers between two ends where higher is better: the quality of an answer, a relevance, a grade.
// Its mean is what gates compare. The zero value observes nothing. Two Scores of the same name and range are the same
// metric.
type Score struct{ m metricRef }

// NewScore returns the score called name, [a-z0-9][a-z0-9._-]{0,63}, whose worst value is lo and whose best is hi. Both
// are finite and lo is below hi, which is checked where a policy uses it. Choose the narrowest range that holds every
// value: gates need the more evidence, the wider it is.
func NewScore(name string, lo, hi float64) Score {
	return Score{unique.Make(metricID{name: name, kind: scoreKind, lo: lo, hi: hi})}
}

// Name is the name the score was made with.
func (s Score) Name() string   { return nameOf(s.m) }
func (s Score) ref() metricRef { return s.m }

// Observe is one value, in the unit of the score's range; what is beyond the range counts as its nearest end. A value
// that is not a number is dropped and counted in Status.Invalid. It is kept as one of 33 values of the range: the nearest
// one below or above by chance, in such proportion that the mean stays what it is.
func (s Score) Observe(x float64) Observation {
	return Observation{m: s.m, value: math.Float64bits(x)}
}

// Mix is a metric of which of a few: the tool that was chosen, the route that was taken, the language of an answer. None
// of its labels is good or bad; gates compare how often each of them comes. The zero value observes nothing. Two Mixes of
// the same name and labels, in the same order, are the same metric.
type Mix struct{ m metricRef }

// otherLabel counts what was not declared.
const otherLabel = "other"

// Limits of a mix's labels.
const (
	maxLabels = 9  // besides other
	maxLabel  = 64 // bytes
)

// NewMix returns the mix called name, [a-z0-9][a-z0-9._-]{0,63}, of 2 to 9 labels and "other", which is the last one
// unless it is declared elsewhere. Labels are different from each other, not empty, valid UTF-8 and at most 64 bytes; all
// of that is checked where a policy uses the mix.
func NewMix(name string, labels ...string) Mix {
	return Mix{unique.Make(metricID{name: name, kind: mixKind, labels: joinLabels(labels)})}
}

// Name is the name the mix was made with.
func (x Mix) Name() string   { return nameOf(x.m) }
func (x Mix) ref() metricRef { return x.m }

// Observe is one outcome: which label it has. A label that was not declared counts as "other".
func (x Mix) Observe(label string) Observation {
	if x.m == (metricRef{}) {
		return Observation{}
	}
	other := uint64(0)
	i := uint64(0)
	for l := range labelsIn(x.m.Value().labels) {
		if l == label {
			return Observation{m: x.m, value: i}
		}
		if l == otherLabel {
			other = i
		}
		i++
	}
	return Observation{m: x.m, value: other}
}

// joinLabels writes each label after its length, so that no two lists of labels look alike, and adds other if it is not
// there.
func joinLabels(labels []string) string {
	var b strings.Builder
	other := false
	for _, l := range labels {
		other = other || l == otherLabel
		b.WriteString(strconv.Itoa(len(l)))
		b.WriteByte(':')
		b.WriteString(l)
	}
	if !other {
		fmt.Fprintf(&b, "%d:%s", len(otherLabel), otherLabel)
	}
	return b.String()
}

// labelsIn are the labels that joinLabels wrote, in order.
func labelsIn(joined string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for joined != "" {
			n, i := 0, 0
			for ; joined[i] != ':'; i++ {
				n = n*10 + int(joined[i]-'0')
			}
			l := joined[i+1 : i+1+n]
			joined = joined[i+1+n:]
			if !yield(l) {
				return
			}
		}
	}
}

func splitLabels(joined string) []string {
	var labels []string
	for l := range labelsIn(joined) {
		labels = append(labels, l)
	}
	return labels
}

// Observation is one outcome of one metric, to be given to [Decision.Record] or [Record]. The zero value is dropped.
type Observation struct {
	m     metricRef
	value uint64 // rate: 0 or 1; timing: nanoseconds; score: the number's bits; mix: index of the label
	why   *string
}

// Because returns the observation with a rationale: what made it so, for the people who read of it in an [Incident]. Of
// the candidate's observations of a metric the first 8 rationales of a generation are kept, and 32 of the others, each
// with the same chance; of each at most 1 KiB. When a gate of that metric is broken, the incident holds them. It costs
// one allocation.
func (o Observation) Because(rationale string) Observation {
	o.why = &rationale
	return o
}

// cell is the index of the disjoint outcome that o falls into, -1 if it is none. dither is a source of even chances.
func (o *Observation) cell(m *metricView, dither func() uint32) int {
	switch m.kind {
	case timingKind:
		return evidence.Index(time.Duration(o.value))
	case scoreKind:
		return scoreCell(math.Float64frombits(o.value), m.lo, m.hi, dither)
	}
	return int(o.value)
}

// scoreCell is the cell of a score: how bad it is, from 0 to the last cell, rounded up or down by chance, so that the
// mean of the cells is that of the values. It is -1 for what is not a number.
func scoreCell(x, lo, hi float64, dither func() uint32) int {
	if math.IsNaN(x) {
		return -1
	}
	v := (hi - min(max(x, lo), hi)) / (hi - lo) * (judge.ScoreCells - 1)
	k := int(v)
	if frac := v - float64(k); frac > 0 {
		chance := uint32(0)
		if dither != nil {
			chance = dither()
		} else {
			chance = rand.Uint32()
		}
		if frac*(1<<32) > float64(chance) {
			k++
		}
	}
	return min(k, judge.ScoreCells-1)
}

func nameOf(m metricRef) string {
	if m == (metricRef{}) {
		return ""
	}
	return m.Value().name
}
