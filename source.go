package rollout

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// Source measures a metric elsewhere: a load balancer's counters, a batch job's file, a metrics server. It is named for a
// metric in Options.Sources; what this process records of that metric is then shown but not judged.
//
// Totals calls add once for each series it knows, with values that are cumulative since any point in the past:
//
//   - of a [Rate]: how many outcomes, how many of them bad;
//   - of a [Timing]: pairs of an upper bound in seconds and how many outcomes took at most as long, with rising bounds, the
//     last of which may be infinite;
//   - of a [Score]: how many outcomes, their sum, the sum of their squares;
//   - of a [Mix]: how many outcomes of each label, in the order of NewMix, then of other labels (may be left out).
//
// ring is a ring's name; "" is [Everyone]. candidate says of which cohort the series is. All series of one call are taken
// to be of one moment. Totals must return when ctx ends, after a tick or 10 s, whichever is longer, and must not call add
// afterwards; while a call has not returned no other is made.
//
// Counters that fall were reset: what came in between is unknown and does not count. A value that is negative, not a
// number, infinite or no whole number of outcomes, a series that is missing, an error, a panic or a hang is a cause shown
// in [GateStatus], never a number. What a source counted before a stage's share came into force does not count in it.
type Source interface {
	Totals(ctx context.Context, add func(metric, ring string, candidate bool, values []float64)) error
}

// SourceFunc makes a Source of a function.
type SourceFunc func(ctx context.Context, add func(metric, ring string, candidate bool, values []float64)) error

// Totals calls f.
func (f SourceFunc) Totals(ctx context.Context, add func(metric, ring string, candidate bool, values []float64)) error {
	return f(ctx, add)
}

// FileSource is a Source that reads a file once a tick: a JSON object on each line, for example
//
//	{"metric": "errors", "ring": "everyone", "cohort": "candidate", "values": [1480, 31]}
//	{"metric": "errors", "ring": "everyone", "cohort": "control", "values": [28120, 282]}
//
// Empty lines are skipped, and the ring may be left out. Whoever writes the file should write another one and rename it:
// half a file is an error.
func FileSource(path string) Source { return fileSource(path) }

type fileSource string

func (f fileSource) Totals(_ context.Context, add func(metric, ring string, candidate bool, values []float64)) error {
	text, err := os.ReadFile(string(f))
	if err != nil {
		return err
	}
	type series struct {
		Metric string    `json:"metric"`
		Ring   string    `json:"ring"`
		Cohort string    `json:"cohort"`
		Values []float64 `json:"values"`
	}
	var all []series
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		var s series
		if err := json.Unmarshal(line, &s); err != nil {
			return fmt.Errorf("%s: line %d: %w", string(f), n, err)
		}
		if s.Cohort != Candidate.String() && s.Cohort != Control.String() {
			return fmt.Errorf("%s: line %d: the cohort %q is neither %v nor %v", string(f), n, s.Cohort, Candidate, Control)
		}
		all = append(all, s)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", string(f), err)
	}
	for _, s := range all { // nothing of a file that is broken
		add(s.Metric, s.Ring, s.Cohort == Candidate.String(), s.Values)
	}
	return nil
}

// sourcedMetrics are the names of the metrics with a Source.
func sourcedMetrics(all []metricRef, sources map[string]Source) (map[string]bool, error) {
	sourced := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(sources)) {
		if sources[name] == nil {
			return nil, fmt.Errorf("rollout: Options.Sources: that of %q is nil", name)
		}
		if !slices.ContainsFunc(all, func(m metricRef) bool { return nameOf(m) == name }) {
			return nil, fmt.Errorf("rollout: Options.Sources: no gate is of the metric %q, and Policy.Metrics does not name it", name)
		}
		sourced[name] = true
	}
	return sourced, nil
}

// sourceReading is what a Source said last of its metric.
type sourceReading struct {
	at     time.Time
	rings  map[string][2][]float64 // cumulative, of the control and of the candidate; nil: none
	cause  string                  // why there is nothing new
	resets map[string]int          // how often its counters were seen to fall, by ring
	change time.Time               // when any value was last another one
}

// staleAfter is for how long a Source may say the same before that is a cause.
func (r *Rollout) staleAfter() time.Duration { return max(12*r.o.Interval, time.Minute) }

// watchSource reads one metric's Source once a tick.
func (r *Rollout) watchSource(ctx context.Context, metric string) {
	for {
		r.readSource(ctx, metric)
		if !sleep(ctx, r.o.Interval) {
			return
		}
	}
}

// readSource reads one metric's Source once. What it said before is kept where it says nothing now.
func (r *Rollout) readSource(ctx context.Context, metric string) {
	type series struct {
		ring      string
		candidate bool
		values    []float64
	}
	at := r.now() // what comes in meanwhile may be in it or not
	asked, cancel := context.WithTimeout(ctx, r.checkTimeout())
	defer cancel()
	away := make(chan struct{})
	all, err := guard(asked, 0, func(ctx context.Context) ([]series, error) {
		defer close(away)
		var all []series
		err := r.o.Sources[metric].Totals(ctx, func(name, ring string, candidate bool, values []float64) {
			if name == metric && len(all) < 2*maxRings {
				if ring == "" {
					ring = Everyone
				}
				all = append(all, series{ring, candidate, slices.Clone(values)})
			}
		})
		return all, err
	})
	if asked.Err() != nil {
		err = fmt.Errorf("no answer within %v", r.checkTimeout())
	}
	next := &sourceReading{at: at, rings: map[string][2][]float64{}}
	id := r.metricNamed(metric)
	for _, s := range all {
		if err != nil {
			break
		}
		if slices.Index(r.plan.Rings, s.ring) < 0 {
			err = fmt.Errorf("there is no ring %q", s.ring)
		} else if problem := id.sane(s.values); problem != nil {
			err = fmt.Errorf("%s of %s: %w", cohortNames[1+bit(s.candidate)], s.ring, problem)
		} else if pair := next.rings[s.ring]; pair[bit(s.candidate)] != nil {
			err = fmt.Errorf("two series for %s of %s", cohortNames[1+bit(s.candidate)], s.ring)
		} else {
			if n := len(s.values); id.kind == timingKind && math.IsInf(s.values[n-2], 1) {
				s.values[n-2] = math.MaxFloat64 // which can be stored
			}
			pair[bit(s.candidate)] = s.values
			next.rings[s.ring] = pair
		}
	}
	r.mu.Lock()
	was := r.readings[metric]
	next.change = next.at
	next.resets = map[string]int{}
	if was != nil && err == nil {
		for ring, pair := range next.rings {
			next.resets[ring] = was.resets[ring]
			for c := range pair {
				if old := was.rings[ring][c]; old != nil && pair[c] != nil && id.since(old, pair[c]) == nil {
					next.resets[ring]++
				}
			}
		}
	}
	if was != nil && (err != nil || sameValues(was.rings, next.rings)) {
		next.change = was.change
	}
	switch {
	case err != nil:
		next.cause, next.rings = "the source: "+err.Error(), nil
		if was != nil {
			next.rings, next.at, next.resets = was.rings, was.at, was.resets
		}
	case len(next.rings) == 0:
		next.cause = "the source has no series of it"
	case next.at.Sub(next.change) > r.staleAfter():
		next.cause = fmt.Sprintf("the source has said the same for %v", next.at.Sub(next.change).Round(time.Second))
	}
	r.readings[metric] = next
	r.mu.Unlock()
	if asked.Err() != nil {
		select {
		case <-away:
		case <-ctx.Done():
		}
	}
}

func sameValues(a, b map[string][2][]float64) bool {
	if len(a) != len(b) {
		return false
	}
	for ring, x := range a {
		y := b[ring]
		if !slices.Equal(x[0], y[0]) || !slices.Equal(x[1], y[1]) {
			return false
		}
	}
	return true
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// metricNamed is the metric of that name that the rollout has.
func (r *Rollout) metricNamed(name string) metricID {
	for _, m := range r.metrics {
		if nameOf(m.ref) == name {
			return m.ref.Value()
		}
	}
	return metricID{}
}

// addSources adds the blocks of metrics measured elsewhere, and how far their totals are consumed then, to the input of an
// evaluation of st, and notes why metrics have nothing.
func (r *Rollout) addSources(st *machine.State, in *machine.Input) {
	if len(r.o.Sources) == 0 || st.Phase != machine.Running && st.Phase != machine.Held {
		return
	}
	r.mu.Lock()
	readings := make(map[string]*sourceReading, len(r.readings))
	for name, read := range r.readings {
		readings[name] = read
	}
	r.mu.Unlock()
	if r.sourced.epoch != st.Epoch || r.sourced.gen != st.Gen {
		r.sourced = sourcedClock{gen: st.Gen, epoch: st.Epoch, since: in.Now, closed: map[string]time.Time{}, causes: map[string]string{},
			seen: map[string]uint64{}, resets: map[string]int{}, behind: map[string]lag{}, anew: map[string]anew{}}
	}
	causes := map[string]string{}
	next := map[string]machine.Totals{}
	for key, t := range st.Sources {
		next[key] = t
	}
	for i := range r.metrics {
		name := nameOf(r.metrics[i].ref)
		if !r.metrics[i].sourced {
			continue
		}
		read := readings[name]
		if read == nil {
			causes[name] = "the source was not read yet"
			continue
		}
		causes[name] = read.cause
		if read.at.Before(r.sourced.since) {
			continue // it may hold what came in before the present shares
		}
		for _, ring := range r.plan.Rings {
			if cause := r.addSeries(st, in, next, r.metrics[i].ref.Value(), ring, read); cause != "" && causes[name] == "" {
				causes[name] = cause
			}
		}
	}
	in.Sources = next
	r.mu.Lock()
	r.causes = causes
	r.mu.Unlock()
}

// sameTotals reports whether as much is consumed in both.
func sameTotals(a, b map[string]machine.Totals) bool {
	return maps.EqualFunc(a, b, func(x, y machine.Totals) bool {
		return x.Epoch == y.Epoch && slices.Equal(x.Values[0], y.Values[0]) && slices.Equal(x.Values[1], y.Values[1])
	})
}

// sourcedClock is what Run remembers of the blocks of sources in the present epoch.
type sourcedClock struct {
	gen, epoch uint64
	since      time.Time
	closed     map[string]time.Time
	causes     map[string]string // why a series was last taken up anew, until it gives a block
	seen       map[string]uint64 // candidate outcomes of the open block that the bake knows
	resets     map[string]int    // of the reading that was last compared
	behind     map[string]lag
	anew       map[string]anew
}

// anew is when this process first saw that a series was taken up anew, for the n-th time.
type anew struct {
	n  uint64
	at time.Time
}

// lag is since when a series has been behind what was consumed of it.
type lag struct {
	since time.Time
	was   machine.Totals
}

// addSeries adds the block of one metric in one ring, if one is due.
func (r *Rollout) addSeries(st *machine.State, in *machine.Input, next map[string]machine.Totals, m metricID, ring string, read *sourceReading) (cause string) {
	pair, resets := read.rings[ring], read.resets[ring]
	share := Percent(st.Shares[ring])
	alone := share == 100 && r.policy.Holdback == 0
	if share == 0 || slices.Contains(st.Rings, ring) || pair[0] == nil && pair[1] == nil {
		return ""
	}
	switch {
	case pair[1] == nil:
		return "the source has no series of the candidate in " + ring
	case pair[0] == nil && !alone:
		return "the source has no series of the control in " + ring
	}
	key := m.name + "/" + ring
	was, ok := next[key]
	if !ok || was.Epoch != st.Epoch {
		next[key] = machine.Totals{Epoch: st.Epoch, Values: pair}
		r.sourced.closed[key], r.sourced.resets[key], r.sourced.seen[key] = in.Now, resets, 0
		return ""
	}
	if seen := r.sourced.anew[key]; seen.n != was.Resets || seen.at.IsZero() {
		r.sourced.anew[key] = anew{was.Resets, in.Now}
	}
	if was.Resets > 0 && read.at.Before(r.sourced.anew[key].at) {
		return r.sourced.causes[key] // it may be from before the counters fell
	}
	if r.sourced.closed[key].IsZero() { // another process took it up
		r.sourced.closed[key], r.sourced.resets[key] = in.Now, resets
	}
	var d [2][]float64
	var sums [2]uint64
	for c := range pair {
		if pair[c] == nil {
			continue
		}
		if d[c] = m.since(was.Values[c], pair[c]); d[c] == nil {
			// Another process may have consumed more than this one has read. Only counters that this one has seen to fall, or
			// that nobody has consumed of for long, are taken up anew.
			if behind := r.sourced.behind[key]; behind.since.IsZero() || !sameTotals(map[string]machine.Totals{"": behind.was}, map[string]machine.Totals{"": was}) {
				r.sourced.behind[key] = lag{in.Now, was}
			}
			if resets == r.sourced.resets[key] && in.Now.Sub(r.sourced.behind[key].since) < r.staleAfter() {
				return r.sourced.causes[key]
			}
			delete(r.sourced.behind, key)
			r.sourced.resets[key] = resets
			next[key] = machine.Totals{Epoch: st.Epoch, Values: pair, Resets: was.Resets + 1}
			r.sourced.closed[key], r.sourced.seen[key] = in.Now, 0
			r.sourced.causes[key] = fmt.Sprintf("the source's counters of the %s in %s were reset", cohortNames[1+c], ring)
			return r.sourced.causes[key]
		}
		sums[c] = uint64(m.counted(d[c]))
	}
	delete(r.sourced.behind, key)
	r.sourced.resets[key] = resets
	if sums[1] > r.sourced.seen[key] {
		in.Outcomes = append(in.Outcomes, ring)
	}
	r.sourced.seen[key] = sums[1]
	if !machine.Closes(sums, alone, in.Now.Sub(r.sourced.closed[key]), true) {
		return r.sourced.causes[key]
	}
	delete(r.sourced.causes, key)
	r.sourced.seen[key] = 0
	b := judge.Block{Metric: m.name, Ring: ring}
	for c := range d {
		switch {
		case d[c] == nil:
		case m.kind == scoreKind:
			moments, ok := m.moments(d[c])
			if !ok {
				next[key] = machine.Totals{Epoch: st.Epoch, Values: pair, Resets: was.Resets}
				return fmt.Sprintf("the source's totals of the %s in %s are not of values from %v to %v", cohortNames[1+c], ring, m.lo, m.hi)
			}
			b.Moments[1-c] = moments
		case c == 0:
			b.Control = m.outcomes(d[c])
		default:
			b.Candidate = m.outcomes(d[c])
		}
	}
	next[key] = machine.Totals{Epoch: st.Epoch, Values: pair, Resets: was.Resets}
	r.sourced.closed[key] = in.Now
	in.Blocks = append(in.Blocks, machine.Block{Epoch: st.Epoch, Block: b})
	return ""
}
