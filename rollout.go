package rollout

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.opentelemetry.io/otel/metric"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

// Errors that callers tell apart with [errors.Is].
var (
	// ErrRunning: Run runs already, of this Rollout or of another one of the same name that shares no Store with it.
	ErrRunning = errors.New("rollout: already running")
	// ErrStage: the stage named is not the present one.
	ErrStage = machine.ErrStage
	// ErrState: what was asked for makes no sense in the present state. It is also the answer where a new generation began
	// that this process, in its Run, had not heard of: only Hold, Rollback and RollbackRing are for whichever is there.
	ErrState = machine.ErrState
	// ErrVersion: this process has another version than the rollout is about, or an older policy of it.
	ErrVersion = errors.New("rollout: this process has another version than the rollout is about")
	// ErrNotStored: the Store did not acknowledge the change. A rollback is nevertheless in force in this process, and Run
	// keeps writing it.
	ErrNotStored = errors.New("rollout: not stored")
)

// Options are what a rollout runs on. The zero value of each field is its default.
type Options struct {
	// Store keeps the state across restarts and shares it between processes. Nil keeps it in memory: a restart then
	// forgets everything, also a rollback. Run says so once.
	Store Store
	// Replica names this process in what it writes, for people; two lives or processes of one name are told apart all the
	// same, by a random suffix. Default: the host's name.
	Replica string
	// Interval is the time between two ticks, at each of which the gates are judged. Default: 5 s.
	Interval time.Duration
	// Lease is how long the present shares are served while the Store is out of reach; then everybody gets the stable
	// version until it is back, unless the rollout is Completed. Zero: for ever.
	Lease time.Duration
	// IsFailure says which errors of a Do are failures; it is never asked about nil. Default: all.
	IsFailure func(error) bool
	// Sources measure metrics elsewhere, by the name of a metric that the policy's gates or Metrics name. What this process
	// records of such a metric is not judged. Every process of a rollout should have the same.
	Sources map[string]Source
	// Logger gets a line for each event. Default: slog.Default.
	Logger *slog.Logger
	// MeterProvider gets the instruments rollout.*. Default: the OpenTelemetry global.
	MeterProvider metric.MeterProvider
}

// Rollout is one change on its way out to everybody. All of its methods may be called from any goroutine and from any
// callback. Without [Rollout.Run] it answers, but nothing is judged and nothing moves.
type Rollout struct {
	name      string
	policy    Policy // with its defaults
	plan      *machine.Plan
	gates     []Gate
	metrics   []metricView
	o         Options
	replica   string
	store     Store // nil: none, its state is kept as it is
	shared    bool
	now       func() time.Time      // the control path's clock; a rehearsal has one of its own
	virtual   bool                  // a rehearsal: time stands still while a callback runs
	quiet     time.Duration         // the least time that a runner of steps may give no sign of life
	silent    uint64                // rounds after which an incarnation that is not heard of is dead in any case
	fullBytes int                   // how long a document may become
	barrier   time.Duration         // how long a rollback waits for other processes to confirm it, beside the grace
	coin      func(n int) bool      // two chances in n
	judged    func([]machine.Block) // is told of blocks once it is stored that they were judged
	dither    func() uint32         // even chances for scores; nil: of the process

	effects  Store     // of the journal: store, or one of its own
	journal  effectLog // what this process has put there
	sessions sessions

	counting    atomic.Pointer[string]   // the incarnation that its evidence is of
	incarnation atomic.Pointer[string]   // of this Rollout: one life of one process
	snap        atomic.Pointer[snapshot] // what decisions see
	slot        atomic.Uint32            // the present slot of time, from 1
	guards      struct{ silence, split bool }
	running     atomic.Bool
	alarm       atomic.Bool   // wake is because of what must never happen
	calm        atomic.Bool   // which is known, whatever more comes of it
	wake        chan struct{} // asks Run for a tick now
	hint        chan struct{} // asks Run for a look at the Store
	turned      chan struct{} // another state is followed: ends pauses between steps

	noUnit, late, unknown, invalid, unsure, matchPanics atomic.Uint64

	firstUnknown atomic.Pointer[string] // metric to be logged
	op           atomic.Uint64
	decoded      atomic.Pointer[decoded] // the last state loaded; without a Store, the state
	stray        atomic.Int64            // store calls that have not come back
	asking       atomic.Bool             // MayAdvance has not come back

	mu          sync.Mutex
	known       *machine.State // the newest stored state seen; never changed
	standing    machine.Standing
	latch       map[uint64]bool // generations that are rolled back here, whatever is stored
	revoked     map[uint64]bool // of them, those whose rollback is stored, or could not be
	leashes     map[leashKey]*leash
	fork        fork           // the candidate is out of use here, by this process's own evidence
	latchAny    bool           // so is the first one that will be loaded
	intent      *intent        // a rollback that is not stored yet
	stale       bool           // the lease is over
	since       time.Time      // when this process began to follow the present version of the state
	ruled       bool           // this process's own policy was in force
	moved       time.Time      // when an evaluation was last seen
	round       uint64         // of that
	head        *machine.State // the last one loaded, or written
	headRev     uint64
	storeErr    error // of the last use of the Store
	checks      map[string]judge.CheckResult
	readings    map[string]*sourceReading // by metric measured elsewhere
	causes      map[string]string         // why such metrics have nothing
	ledgers     []*ledger                 // of the epochs that still count, the present one last
	past        [][2][][]uint64           // outcomes of epochs that no longer count: by ring, cohort and metric
	pastCounts  [][2]uint64
	life        *generation // the present one, or that of the last snapshot that counts
	view        snapKey     // of the present snapshot
	forced      *snapshot   // by a test
	subscribers []*subscriber
	queue       []Event
	dropped     uint64
	looked      time.Time // when it was last looked for where a callback hangs
	queued      chan struct{}

	// Of the goroutine of Run alone.
	clock         clock
	pub           publisher
	seals         []time.Time // when this process sealed documents of its own lately
	missing       int         // how often evidence could not be read
	sourced       sourcedClock
	slotClock     slotClock
	unknownLogged bool
	rival         rival
	lives         map[string]sign // of other processes with work under way
	cleared       clearing        // what the journal was cleared of
}

// New returns a rollout of the policy, or every problem of it. It starts nothing and does no I/O. o may be nil.
func New(name string, p Policy, o *Options) (*Rollout, error) {
	var problems []error
	if !ringName.MatchString(name) {
		problems = append(problems, fmt.Errorf("rollout: the name %q must match %s", name, ringName))
	}
	if err := p.Validate(); err != nil {
		problems = append(problems, err)
	}
	var opts Options
	if o != nil {
		opts = *o
	}
	if opts.Interval < 0 {
		problems = append(problems, fmt.Errorf("rollout: Options.Interval: %v is negative", opts.Interval))
	}
	if opts.Lease < 0 {
		problems = append(problems, fmt.Errorf("rollout: Options.Lease: %v is negative", opts.Lease))
	}
	if len(opts.Replica) > 256 || !utf8.ValidString(opts.Replica) {
		problems = append(problems, fmt.Errorf("rollout: Options.Replica: %.300q must be valid UTF-8 and at most 256 bytes", opts.Replica))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	r := &Rollout{
		name: name, policy: p.withDefaults(name), o: opts,
		store: opts.Store, shared: opts.Store != nil, now: time.Now,
		quiet: 15 * time.Second, silent: silentFor, fullBytes: fullBytes, judged: func([]machine.Block) {}, coin: func(n int) bool { return mathrand.IntN(n) < 2 },
		wake: make(chan struct{}, 1), hint: make(chan struct{}, 1), turned: make(chan struct{}, 1), queued: make(chan struct{}, 1),
		checks: map[string]judge.CheckResult{}, latch: map[uint64]bool{}, revoked: map[uint64]bool{}, leashes: map[leashKey]*leash{},
	}
	r.sessions.origin, r.sessions.never, r.sessions.look = randomText(), make(chan struct{}), make(chan struct{}, 1)
	if r.effects = opts.Store; r.effects == nil {
		r.effects = MemStore()
	}
	if r.o.Interval == 0 {
		r.o.Interval = defaultInterval
	}
	r.barrier = 3 * r.o.Interval
	replica := opts.Replica
	if replica == "" {
		replica, _ = os.Hostname()
	}
	r.replica = strings.ToValidUTF8(replica, "")
	r.reincarnate()
	r.gates = r.policy.allGates()
	all := r.policy.allMetrics(r.gates)
	sourced, err := sourcedMetrics(all, opts.Sources)
	if err != nil {
		return nil, err
	}
	plan, err := r.policy.plan(r.gates, r.o.Interval, sourced)
	if err != nil {
		return nil, fmt.Errorf("rollout: %w", err)
	}
	r.plan, r.readings = plan, map[string]*sourceReading{}
	for _, m := range all {
		r.metrics = append(r.metrics, r.metricView(m))
	}
	r.guards.silence = !slices.Contains(p.Without, GuardNoOutcome)
	r.guards.split = !slices.Contains(p.Without, GuardSplit)
	r.slot.Store(1)
	r.past = make([][2][][]uint64, len(plan.Rings))
	r.pastCounts = make([][2]uint64, len(plan.Rings))
	for i := range r.past {
		for c := range r.past[i] {
			for _, m := range r.metrics {
				r.past[i][c] = append(r.past[i][c], make([]uint64, m.cells))
			}
		}
	}
	r.showLocked(r.fixedSnapshot(nil, pack(false, None, ReasonNotLoaded, len(plan.Rings)-1, 0)))
	return r, nil
}

// me is this process's life in what it writes.
func (r *Rollout) me() string { return *r.incarnation.Load() }

// reincarnate begins another life: what it writes from now on is nobody's who was taken for dead.
func (r *Rollout) reincarnate() {
	name := r.replica + "-" + randomText()
	r.incarnation.Store(&name)
}

// Must is [New] for package-level variables: it panics where New returns an error.
func Must(name string, p Policy, o *Options) *Rollout {
	r, err := New(name, p, o)
	if err != nil {
		panic(err)
	}
	return r
}

// Name is the rollout's name.
func (r *Rollout) Name() string {
	if r == nil {
		return ""
	}
	return r.name
}

// logger is asked for at each use, so that slog.SetDefault may come after a package-level Must.
func (r *Rollout) logger() *slog.Logger {
	if r.o.Logger != nil {
		return r.o.Logger
	}
	return slog.Default()
}

func randomText() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// allMetrics are what the rollout records, each once: Errors, Latency, and what gates and Metrics name.
func (p *Policy) allMetrics(gates []Gate) []metricRef {
	ms := []metricRef{Errors.m, Latency.m}
	add := func(m metricRef) {
		for _, other := range ms {
			if m == other {
				return
			}
		}
		ms = append(ms, m)
	}
	for _, g := range gates {
		if g.kind != judge.Check {
			add(g.metric)
		}
	}
	for _, m := range p.Metrics {
		add(m.ref())
	}
	return ms
}

// never reports whether one event of the metric is acted on at once.
func (p *Policy) never(m metricRef, gates []Gate) bool {
	for _, g := range gates {
		if g.kind == judge.Never && g.metric == m {
			return true
		}
	}
	return false
}

// specs are the gates as the judge sees them.
func specs(gates []Gate) []judge.Spec {
	margined := map[metricRef]bool{}
	for _, g := range gates {
		if g.isMargin() {
			margined[g.metric] = true
		}
	}
	var out []judge.Spec
	for _, g := range gates {
		out = append(out, g.spec(g.kind != judge.Check && margined[g.metric]))
	}
	return out
}

// asksProof reports whether stage i wants proof: from ProveFrom of everyone on, or where no such stage has a control, the
// widest that has one; and the last, if there was none before.
func (p *Policy) asksProof(i int) bool {
	s := &p.Stages[i]
	if s.GuardOnly {
		return false
	}
	last := len(p.Stages) - 1
	wide, widest := false, -1
	for j := range p.Stages {
		t := &p.Stages[j]
		if !p.hasControl(t) {
			continue
		}
		wide = wide || t.Ring == Everyone && t.Percent >= p.ProveFrom
		if widest < 0 || p.wider(t, &p.Stages[widest]) {
			widest = j
		}
	}
	if i == last {
		return true
	}
	if wide {
		return s.Ring == Everyone && s.Percent >= p.ProveFrom && p.hasControl(s)
	}
	return i == widest
}

// wider reports whether stage s reaches more units than t.
func (p *Policy) wider(s, t *Stage) bool {
	a, b := p.ringIndex(s.Ring), p.ringIndex(t.Ring)
	return a > b || a == b && s.Percent > t.Percent
}

// plan is the policy as the machine sees it.
func (p *Policy) plan(gates []Gate, interval time.Duration, sourced map[string]bool) (*machine.Plan, error) {
	all := specs(gates)
	for i := range all {
		all[i].Moments = all[i].Kind.IsScore() && sourced[all[i].Metric]
	}
	all = append(all, p.guards()...)
	plan := &machine.Plan{Keep: keepRetired, Version: p.Version, OnDeadline: judge.Action(p.OnDeadline), Tick: interval}
	plan.Rings = p.ringNames()
	var err error
	plan.Judge, err = judge.New(all, judge.Risk{FalseRollback: p.FalseRollback, FalsePromotion: p.FalsePromotion, Independent: p.Independent}, plan.Rings...)
	if err != nil {
		return nil, err
	}
	for i := range p.Stages {
		s := &p.Stages[i]
		armed := map[string]bool{}
		for _, g := range p.armed(s) {
			armed[g.name] = true
		}
		st := machine.Stage{
			StageRef: machine.StageRef{Name: s.Name, Ring: s.Ring, Percent: float64(s.Percent)},
			Over:     s.Over, Bake: s.Bake, Deadline: s.Deadline,
			Proof: p.asksProof(i), Last: i == len(p.Stages)-1, Control: p.hasControl(s),
			Approval: s.Approval, Irreversible: s.Irreversible,
		}
		for _, g := range gates { // the judge's gates begin with the policy's
			st.Armed = append(st.Armed, armed[g.name])
		}
		for range all[len(gates):] {
			st.Armed = append(st.Armed, true) // guards always are
		}
		plan.Stages = append(plan.Stages, st)
	}
	for _, s := range p.Rollback {
		plan.Steps = append(plan.Steps, s.Name)
	}
	plan.Salt, plan.Holdback = p.Salt, float64(p.Holdback)
	plan.Assignment = digest(p.Salt, plan.Rings, p.Holdback)
	data := []any{plan.Assignment, plan.Stages, all, plan.OnDeadline, p.ProveFrom, p.FalseRollback, p.FalsePromotion, p.Independent, plan.Steps}
	if plan.Undoes = len(p.Undo) > 0; plan.Undoes {
		data = append(data, "undo")
	}
	plan.Policy = digest(data...)
	return plan, nil
}

// ringNames are the names of all rings, innermost first.
func (p *Policy) ringNames() []string {
	var names []string
	for _, r := range p.Rings {
		names = append(names, r.Name)
	}
	return append(names, Everyone)
}

// digest names data: equal data, equal digest.
func digest(data ...any) string {
	b, err := json.Marshal(data)
	if err != nil {
		panic(err) // only numbers, strings and structs of them come here, and Validate refused NaN
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// wakeUp asks Run for a tick now. It never waits.
func (r *Rollout) wakeUp() { signal(r.wake) }

// sound asks Run to look at what must never happen, now, unless that is known already.
func (r *Rollout) sound() {
	if !r.calm.Load() {
		r.alarm.Store(true)
		r.wakeUp()
	}
}

// signal leaves one word in a channel that holds one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// unknownMetric counts an observation of a metric the policy does not name; the first is logged.
func (r *Rollout) unknownMetric(m metricRef) {
	r.unknown.Add(1)
	if r.firstUnknown.Load() == nil {
		name := nameOf(m)
		r.firstUnknown.CompareAndSwap(nil, &name)
	}
}
