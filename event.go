package rollout

import (
	"context"
	"encoding/json"
	"log/slog"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// EventKind says what happened.
type EventKind uint8

// The kinds of events.
const (
	Started          = EventKind(machine.Started)        // a generation began
	StageEntered     = EventKind(machine.StageEntered)   // the stage's share is in force, or its climb began
	Climbed          = EventKind(machine.Climbed)        // a climbing stage took a step
	HoldBegan        = EventKind(machine.WasHeld)        // Note says why
	Resumed          = EventKind(machine.Resumed)        // after a hold
	Approved         = EventKind(machine.WasApproved)    // the stage
	PercentSet       = EventKind(machine.PercentSet)     // by an operator
	SteppedBack      = EventKind(machine.SteppedBack)    // to Stage
	RingRolledBack   = EventKind(machine.RingRolledBack) // Ring alone
	RollbackBegan    = EventKind(machine.RollbackBegan)  // nobody gets the candidate any more
	StepFailed       = EventKind(machine.StepFailed)     // an attempt of a rollback step
	StepDone         = EventKind(machine.StepDone)       // a rollback step
	RollbackStuck    = EventKind(machine.RollbackStuck)  // a rollback step keeps failing
	RollbackDone     = EventKind(machine.RollbackDone)   // RolledBack
	CompletedRollout = EventKind(machine.WasCompleted)   // everybody gets the candidate
	GateBroken       = EventKind(machine.GateBroken)     // one that reports or holds; Note says why
	PolicyEdited     = EventKind(machine.PolicyEdited)   // the same Version came with another policy
	VersionAdopted   = EventKind(machine.VersionAdopted) // a completed rollout took up a new Version
	StoreWentBack    = EventKind(machine.WentBack)       // the Store held an older state; what was known was joined with it
	StepWaived       = EventKind(machine.StepWaived)     // an operator's word stands for what Note names
	WorkLost         = EventKind(machine.WorkLost)       // a process died with sessions under way, which count as failed
	EvidenceLost     = EventKind(machine.EvidenceLost)   // what a process had counted cannot be read; the rest goes on being judged
	StoreFailed      = EventKind(32)                     // Err says how; told once until StoreBack
	StoreBack        = EventKind(33)                     // the Store can be used again
)

var eventNames = func() []string {
	names := make([]string, StoreBack+1)
	for k, name := range map[EventKind]string{
		0: "unset", Started: "started", StageEntered: "stage entered", Climbed: "climbed", HoldBegan: "held", Resumed: "resumed",
		Approved: "approved", PercentSet: "percent set", SteppedBack: "stepped back", RingRolledBack: "ring rolled back",
		RollbackBegan: "rollback began", StepFailed: "step failed", StepDone: "step done", RollbackStuck: "rollback stuck",
		RollbackDone: "rollback done", CompletedRollout: "completed", GateBroken: "gate broken", PolicyEdited: "policy edited",
		StepWaived: "step waived", WorkLost: "work lost", EvidenceLost: "evidence lost", VersionAdopted: "version adopted", StoreWentBack: "store went back", StoreFailed: "store failed", StoreBack: "store back",
	} {
		names[k] = name
	}
	return names
}()

func (k EventKind) String() string                { return nameIn(eventNames, int(k)) }
func (k EventKind) MarshalText() ([]byte, error)  { return []byte(k.String()), nil }
func (k *EventKind) UnmarshalText(b []byte) error { return parseIn(eventNames, b, (*uint8)(k)) }

// Event is one thing that happened to a rollout.
type Event struct {
	Time       time.Time `json:"time"`
	Kind       EventKind `json:"kind"`
	Name       string    `json:"name"` // of the rollout
	Stage      string    `json:"stage,omitempty"`
	Ring       string    `json:"ring,omitempty"`
	Gate       string    `json:"gate,omitempty"`
	Note       string    `json:"note,omitempty"`
	From       State     `json:"from"`
	To         State     `json:"to"`
	Generation uint64    `json:"generation"`
	Percent    Percent   `json:"percent"` // of Ring after it
	Incident   *Incident `json:"incident,omitempty"`
	Err        error     `json:"-"`
}

// MarshalJSON implements json.Marshaler: Err is its text.
func (e Event) MarshalJSON() ([]byte, error) {
	type plain Event
	text := ""
	if e.Err != nil {
		text = e.Err.Error()
	}
	return json.Marshal(struct {
		plain
		Err string `json:"err,omitempty"`
	}{plain(e), text})
}

func (r *Rollout) event(st *machine.State, e machine.Event) Event {
	return Event{
		Time: r.now(), Kind: EventKind(e.Kind), Name: r.name, Stage: e.Stage, Ring: e.Ring, Gate: e.Gate, Note: e.Note,
		From: State(e.From), To: State(e.To), Generation: st.Gen, Percent: Percent(st.Shares[e.Ring]),
		Incident: r.incidentOf(st, e.Incident),
	}
}

// maxQueue bounds the events that wait for slow subscribers.
const maxQueue = 256

// subscriber is one function that wants events.
type subscriber struct{ f func(Event) }

// Subscribe calls f with each event from now on, also those of other processes on the same Store, one after the other, in
// goroutines of [Rollout.Run] and without any lock: f may call anything. Events that happen while Run does not run wait for
// it. A slow f delays no tick, but the other subscribers; what more than 256 events wait for it is dropped and counted in
// Status.Dropped, and an f that takes more than an Options.Interval is logged with its stack. So is a panic in f, and an end
// of its goroutine; f is called again for the next event. After stop has returned, f is not called for events that happen
// later.
func (r *Rollout) Subscribe(f func(Event)) (stop func()) {
	if f == nil {
		panic("rollout: Subscribe: the function is nil")
	}
	if r == nil {
		return func() {}
	}
	s := &subscriber{f}
	r.mu.Lock()
	r.subscribers = append(r.subscribers[:len(r.subscribers):len(r.subscribers)], s)
	r.mu.Unlock()
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		keep := r.subscribers[:0:0]
		for _, other := range r.subscribers {
			if other != s {
				keep = append(keep, other)
			}
		}
		r.subscribers = keep
	}
}

// queueLocked queues an event for the subscribers.
func (r *Rollout) queueLocked(e Event) {
	if len(r.subscribers) == 0 {
		return
	}
	if len(r.queue) >= maxQueue {
		r.dropped++
		return
	}
	r.queue = append(r.queue, e)
	signal(r.queued)
}

// dispatch hands queued events to the subscribers until done is closed and the queue is empty.
func (r *Rollout) dispatch(done <-chan struct{}) {
	for last := false; ; {
		r.mu.Lock()
		events, subscribers := r.queue, r.subscribers
		r.queue = nil
		r.mu.Unlock()
		for _, e := range events {
			for _, s := range subscribers {
				r.tell(s, e)
			}
		}
		if last {
			return
		}
		select {
		case <-r.queued:
		case <-done:
			last = true
		}
	}
}

// tell calls a subscriber and waits until it has returned.
func (r *Rollout) tell(s *subscriber, e Event) {
	label := randomText()
	slow := time.AfterFunc(r.o.Interval, func() {
		r.logStack("a subscriber", &hung{context.DeadlineExceeded, label}, "event", e.Kind)
	})
	defer slow.Stop()
	r.logStack("a subscriber", labelled(context.Background(), label, 0, func(context.Context) error { s.f(e); return nil }), "event", e.Kind)
}

// logEvent writes the line that an operator acts on.
func (r *Rollout) logEvent(e Event) {
	level := slog.LevelInfo
	switch e.Kind {
	case HoldBegan, SteppedBack, RingRolledBack, RollbackBegan, GateBroken, StepFailed, StepWaived, WorkLost, EvidenceLost, PolicyEdited:
		level = slog.LevelWarn
	case RollbackStuck:
		level = slog.LevelError
	}
	attrs := []slog.Attr{slog.String("rollout", r.name), slog.Uint64("generation", e.Generation), slog.String("stage", e.Stage)}
	text := func(key, v string) {
		if v != "" {
			attrs = append(attrs, slog.String(key, v))
		}
	}
	text("ring", e.Ring)
	if e.Ring != "" {
		attrs = append(attrs, slog.Float64("percent", float64(e.Percent)))
	}
	text("gate", e.Gate)
	text("note", e.Note)
	if e.From != e.To {
		attrs = append(attrs, slog.String("from", e.From.String()), slog.String("to", e.To.String()))
	}
	if in := e.Incident; in != nil {
		attrs = append(attrs, slog.Any("candidate", in.Candidate), slog.Any("control", in.Control))
	}
	r.logger().LogAttrs(context.Background(), level, "rollout: "+e.Kind.String(), attrs...)
}
