package rollout

import (
	"context"
	"errors"
	"math"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// scopeName is the instrumentation scope of the instruments.
const scopeName = "github.com/stagedrollout/rollout"

// The attributes of the instruments. OpenTelemetry's own of feature flags where it has one. None of them has to do with a
// unit, so the number of series follows from the policy alone.
const (
	keyName    = "feature_flag.key"            // the rollout's name, on every series
	keyCohort  = "feature_flag.result.variant" // candidate or control
	keyRing    = "rollout.ring"
	keyMetric  = "rollout.metric"
	keyOutcome = "rollout.outcome" // of a rate good or bad, of a mix the label
	keyReason  = "rollout.reason"
	keyState   = "rollout.state"
	keyGate    = "rollout.gate"
)

// instruments are what a rollout reports to OpenTelemetry while Run runs, each of them by feature_flag.key:
//
//	rollout.decisions      counter, {decision}  keyed decisions of this process, by ring and cohort
//	rollout.outcomes       counter, {outcome}   outcomes of them, by ring, cohort and metric; of a rate also good
//	                                            or bad, of a mix also the label
//	rollout.dropped        counter, {item}      what did not count, by reason
//	rollout.share          gauge, %             share of each ring that gets the candidate, Holdback aside
//	rollout.stage          gauge, {stage}       index of the present stage, from 0; absent before the first
//	rollout.state          gauge, {state}       1 for the present state and 0 for each of the others
//	rollout.sessions       gauge, {session}     sessions of this process under way, by cohort; all of the stable version's
//	                                            are the control's
//	rollout.gate.evidence  gauge, 1             from 0, nothing against the candidate, to 1, enough for this gate alone
//
// All are asynchronous and read from the cells that decisions and records count in anyway, so they cost nothing where it
// matters. Counters never fall while the process lives: not by a stage, a rollback, a restart of the rollout or of Run.
// Decisions and outcomes are counted where cohorts are compared: neither before the first share nor once Completed.
//
// rollout.state has a series for every state, as Prometheus does for enumerations: `rollout_state == 1` is the present
// one, and an alert on one state has a value to look at before that state ever came. Curly braces in a unit are an
// annotation: no suffix of a Prometheus name comes of them, as one does of the unit 1.
//
// Evidence multiplies as it comes in, so rollout.gate.evidence is a part of the way on a logarithmic scale: ln E / ln
// NeedE of [GateStatus], cut off below 0. Together gates may break a rollout before any of them alone has 1. A gate that
// breaks at once (a [Check], Rate.Never) has no such series.
type instruments struct {
	decisions metric.Int64ObservableCounter
	outcomes  metric.Int64ObservableCounter
	dropped   metric.Int64ObservableCounter
	share     metric.Float64ObservableGauge
	stage     metric.Int64ObservableGauge
	state     metric.Int64ObservableGauge
	sessions  metric.Int64ObservableGauge
	evidence  metric.Float64ObservableGauge
}

// register makes the instruments and has them read; unregister ends that and is never nil.
func (r *Rollout) register() (unregister func(), err error) {
	mp := r.o.MeterProvider
	if mp == nil {
		mp = otel.GetMeterProvider()
	}
	m := mp.Meter(scopeName)
	var in instruments
	var errs [8]error
	in.decisions, errs[0] = m.Int64ObservableCounter("rollout.decisions", metric.WithUnit("{decision}"),
		metric.WithDescription("Decisions of this process, by ring and cohort."))
	in.outcomes, errs[1] = m.Int64ObservableCounter("rollout.outcomes", metric.WithUnit("{outcome}"),
		metric.WithDescription("Outcomes of this process's decisions, by ring, cohort and metric; of a rate also by whether they were bad, of a mix by label."))
	in.dropped, errs[2] = m.Int64ObservableCounter("rollout.dropped", metric.WithUnit("{item}"),
		metric.WithDescription("What did not count: decisions without a unit, late, unknown and invalid observations, outcomes that may have been judged, events for slow subscribers."))
	in.share, errs[3] = m.Float64ObservableGauge("rollout.share", metric.WithUnit("%"),
		metric.WithDescription("Share of a ring that gets the candidate."))
	in.stage, errs[4] = m.Int64ObservableGauge("rollout.stage", metric.WithUnit("{stage}"),
		metric.WithDescription("Index of the present stage, from 0."))
	in.state, errs[5] = m.Int64ObservableGauge("rollout.state", metric.WithUnit("{state}"),
		metric.WithDescription("1 for the present state, 0 for the others."))
	in.evidence, errs[6] = m.Float64ObservableGauge("rollout.gate.evidence", metric.WithUnit("1"),
		metric.WithDescription("Evidence against the candidate by gate: 0 is none, 1 is enough for the gate alone; logarithmic."))
	in.sessions, errs[7] = m.Int64ObservableGauge("rollout.sessions", metric.WithUnit("{session}"),
		metric.WithDescription("Sessions under way in this process, by cohort."))
	if err := errors.Join(errs[:]...); err != nil {
		return func() {}, err
	}
	reg, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		r.observe(o, &in)
		return nil
	}, in.decisions, in.outcomes, in.dropped, in.share, in.stage, in.state, in.evidence, in.sessions)
	if err != nil {
		return func() {}, err
	}
	return func() { _ = reg.Unregister() }, nil
}

// attributes are those of one series.
func (r *Rollout) attributes(more ...attribute.KeyValue) metric.MeasurementOption {
	return metric.WithAttributes(append(more, attribute.String(keyName, r.name))...)
}

func (r *Rollout) observe(o metric.Observer, in *instruments) {
	st := r.Status()
	for _, ring := range st.Rings {
		name := attribute.String(keyRing, ring.Name)
		o.ObserveFloat64(in.share, float64(ring.Percent), r.attributes(name))
		o.ObserveInt64(in.decisions, int64(ring.Control), r.attributes(name, cohort(Control)))
		o.ObserveInt64(in.decisions, int64(ring.Candidate), r.attributes(name, cohort(Candidate)))
	}
	o.ObserveInt64(in.sessions, int64(st.Sessions.Control), r.attributes(cohort(Control)))
	o.ObserveInt64(in.sessions, int64(st.Sessions.Candidate), r.attributes(cohort(Candidate)))
	r.observeOutcomes(o, in)
	for reason, n := range map[string]uint64{"no unit": st.NoUnit, "late": st.Late, "unknown metric": st.Unknown, "invalid": st.Invalid, "unsure": st.Unsure, "slow subscriber": st.Dropped} {
		o.ObserveInt64(in.dropped, int64(n), r.attributes(attribute.String(keyReason, reason)))
	}
	for i, name := range stateNames {
		present := int64(0)
		if State(i) == st.State {
			present = 1
		}
		o.ObserveInt64(in.state, present, r.attributes(attribute.String(keyState, name)))
	}
	if st.Stage.Name != "" {
		o.ObserveInt64(in.stage, int64(st.Stage.Index), r.attributes())
	}
	for _, g := range st.Gates {
		if g.NeedE > 1 {
			way := max(math.Log(g.E)/math.Log(g.NeedE), 0)
			o.ObserveFloat64(in.evidence, way, r.attributes(attribute.String(keyGate, g.Name)))
		}
	}
}

func cohort(c Cohort) attribute.KeyValue { return attribute.String(keyCohort, c.String()) }

func (r *Rollout) observeOutcomes(o metric.Observer, in *instruments) {
	for i, ring := range r.plan.Rings {
		for c := range 2 {
			for j, m := range r.metrics {
				cells := r.outcomes(i, c, j)
				observe := func(n uint64, more ...attribute.KeyValue) {
					o.ObserveInt64(in.outcomes, int64(n), r.attributes(append(more,
						attribute.String(keyRing, ring), cohort(Control+Cohort(c)), attribute.String(keyMetric, nameOf(m.ref)))...))
				}
				switch m.kind {
				case rateKind:
					observe(cells[0], attribute.String(keyOutcome, "good"))
					observe(cells[1], attribute.String(keyOutcome, "bad"))
				case mixKind:
					for k, label := range splitLabels(m.ref.Value().labels) {
						observe(cells[k], attribute.String(keyOutcome, label))
					}
				default:
					observe(sum(cells))
				}
			}
		}
	}
}

// outcomes are this process's outcomes of one ring, cohort and metric since it started: they only grow.
func (r *Rollout) outcomes(ring, cohort, metric int) []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	cells := append([]uint64(nil), r.past[ring][cohort][metric]...)
	for _, l := range r.ledgers {
		if v := &l.snap.rings[ring]; !v.closed {
			v.outcomes[cohort][metric].AddTo(cells)
		}
	}
	return cells
}
