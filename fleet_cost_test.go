package rollout

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
	"github.com/stagedrollout/rollout/internal/tally"
)

var (
	fleetTable = flag.String("fleet.table", "", "sizes of fleets whose cost is printed, as 10,100,1000")
	fleetAA    = flag.Int("fleet.aa", 40, "fleets whose candidate is no other than what is stable")
)

// raced: the race detector is on, and everything takes several times as long.
var raced bool

// metered is a store that counts what is read and written, by kind of key, and takes its time.
type metered struct {
	Store
	delay time.Duration

	mu sync.Mutex
	usage
}

// usage is what a store was used for.
type usage struct {
	read, wrote       map[string]uses
	refused           int
	evidence          int // bytes of the last List of it
	written           map[string]int
	greatest, present map[string]int // sizes
}

// uses are calls, and the bytes of all of them.
type uses struct{ n, bytes int }

func newMetered(delay time.Duration) *metered {
	s := &metered{Store: MemStore(), delay: delay}
	s.reset()
	return s
}

// reset forgets what was counted, and returns it.
func (s *metered) reset() usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.usage
	s.usage = usage{read: map[string]uses{}, wrote: map[string]uses{}, written: map[string]int{}, greatest: map[string]int{}, present: map[string]int{}}
	return was
}

func kindOf(key string) string { return strings.SplitN(key, "/", 4)[2] }

func (s *metered) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	time.Sleep(s.delay)
	value, rev, err := s.Store.Load(ctx, key)
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.read[kindOf(key)]
	s.read[kindOf(key)] = uses{u.n + 1, u.bytes + len(value)}
	return value, rev, err
}

func (s *metered) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	time.Sleep(s.delay)
	all, err := s.Store.List(ctx, prefix)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.evidence = 0
	for _, value := range all {
		s.evidence += len(value)
	}
	u := s.read["list"]
	s.read["list"] = uses{u.n + 1, u.bytes + s.evidence}
	return all, err
}

func (s *metered) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	time.Sleep(s.delay)
	rev, swapped, err := s.Store.CompareAndSwap(ctx, key, old, value)
	s.mu.Lock()
	defer s.mu.Unlock()
	kind := kindOf(key)
	u := s.wrote[kind]
	s.wrote[kind] = uses{u.n + 1, u.bytes + len(value)}
	s.written[key]++
	s.greatest[kind], s.present[kind] = max(s.greatest[kind], len(value)), len(value)
	if !swapped {
		s.refused++
	}
	return rev, swapped, err
}

// bytesRead are all of them.
func (m *usage) bytesRead() (n int) {
	for _, u := range m.read {
		n += u.bytes
	}
	return n
}

var costRates = []Rate{NewRate("stale"), NewRate("retried"), NewRate("empty")}

// costPolicy has three rings, all of them under way in its first stage, and so many metrics: Errors, Latency and rates.
func costPolicy(metrics int) Policy {
	p := Policy{
		Version: "1", Rings: []Ring{{Name: "staff"}, {Name: "eu"}}, Stages: []Stage{{Percent: 50}, {Percent: 60}, {Percent: 70}, {Percent: 80}, {Percent: 90}, {Percent: 100}},
		Bake: 12 * time.Hour, Holdback: 10,
		Gates: []Gate{Errors.Within(1), Latency.Quantile(.99).WithinFactor(1.2)},
	}
	for _, m := range costRates[:metrics-2] {
		p.Gates = append(p.Gates, m.Within(1))
	}
	return p
}

// costTraffic are n units that come to a process, of all rings and groups, and what comes of each.
func costTraffic(r *Rollout, rnd *rand.Rand, n, metrics int) {
	for range n {
		u := Unit{Key: fmt.Sprint(rnd.Uint64())}
		switch rnd.IntN(3) {
		case 0:
			u.Groups = []string{"staff"}
		case 1:
			u.Groups = []string{"eu"}
		}
		all := []Observation{Errors.Observe(rnd.IntN(50) == 0), Latency.Observe(time.Duration(math.Exp(rnd.NormFloat64()/2) * float64(50*time.Millisecond)))}
		for _, m := range costRates[:metrics-2] {
			all = append(all, m.Observe(rnd.IntN(20) == 0))
		}
		r.Decide(u).Record(all...)
	}
}

// fleetRun is a fleet whose Runs go on in the fake time of a bubble.
type fleetRun struct {
	t     *testing.T
	store *metered
	all   []*Rollout
	rnd   *rand.Rand
	stop  func()

	mirrors []mirror
}

// mirror is a replica that has the documents of another one under a name of its own, and does nothing else.
type mirror struct {
	inc      string
	seq, rev uint64
}

// reflect has every so many-th mirror publish.
func (f *fleetRun) reflect(part, parts int) {
	synctest.Wait()
	for i := part; i < len(f.mirrors); i += parts {
		r, m := f.all[i%len(f.all)], &f.mirrors[i]
		value, _, err := f.store.Store.Load(f.t.Context(), r.pub.key(r))
		must(f.t, err)
		d, err := tally.Decode(value)
		must(f.t, err)
		if d.Seq == m.seq {
			continue
		}
		m.seq, d.Inc = d.Seq, m.inc
		rev, ok, err := f.store.Store.CompareAndSwap(f.t.Context(), r.evidencePrefix(r.pub.gen, r.pub.nonce)+d.Inc, m.rev, d.Encode())
		if m.rev = rev; !ok || err != nil {
			f.t.Fatal("a mirror cannot publish: ", err)
		}
	}
}

// newRunning starts a fleet.
func newRunning(t *testing.T, n, metrics int) *fleetRun {
	f := &fleetRun{t: t, store: newMetered(2 * time.Millisecond), rnd: rand.New(rand.NewPCG(1, uint64(n)))}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	draw := fairDraw(f.rnd.Uint64(), n)
	for i := range n {
		r, err := New("x", costPolicy(metrics), &Options{Store: f.store, Logger: quiet, Replica: fmt.Sprintf("replica-%04d", i)})
		must(t, err)
		r.coin = draw
		all.Go(func() { _ = r.Run(ctx) })
		f.all = append(f.all, r)
		time.Sleep(10 * time.Second / time.Duration(n))
	}
	f.stop = func() { cancel(); all.Wait() }
	return f
}

// fairDraw is the coin of n processes together, with two heads in each n draws: chance evens out sooner.
func fairDraw(seed uint64, n int) func(int) bool {
	var mu sync.Mutex
	rnd, i, heads := rand.New(rand.NewPCG(seed, 2)), 0, []int(nil)
	return func(int) bool {
		mu.Lock()
		defer mu.Unlock()
		if i%n == 0 {
			heads = rnd.Perm(n)[:2]
		}
		i++
		return slices.Contains(heads, (i-1)%n)
	}
}

// serve is so many ticks, with so many units a tick for each process.
func (f *fleetRun) serve(ticks, units, metrics int) {
	const parts = 5 // of a tick
	for i := range ticks * parts {
		for _, r := range f.all {
			costTraffic(r, f.rnd, units/parts, metrics)
		}
		f.reflect(i%parts, parts)
		time.Sleep(defaultInterval / parts)
	}
	synctest.Wait()
}

// TestFleetReads: whatever the size of a fleet, fewer than two Lists are made in a tick, and all of it together reads at most
// the documents and the state twice, and the head once a replica. That is at most three Lists where the documents outweigh the
// state: from 10 replicas on, and from some 20 on while the first share is served and documents are half as large.
func TestFleetReads(t *testing.T) {
	unraced(t)
	for _, n := range []int{2, 5, 10, 100} {
		for _, first := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				f := newRunning(t, n, 4)
				defer f.stop()
				if f.serve(6, 200, 4); !first {
					f.serve(3, 4000, 4)
					must(t, f.all[0].Advance(t.Context(), f.all[0].Status().Stage.Name, "on"))
					f.serve(2, 4000, 4)
				}
				f.store.reset()
				ticks := min(2000/n, 200)
				per := 1 / float64(ticks)
				var evidence, state, head, sum float64 // bytes, in the mean of a tick
				all := map[string]uses{}
				for range ticks {
					f.serve(1, 50, 4)
					m := f.store.reset()
					evidence += float64(f.evidence()) * per
					state, head = max(state, float64(m.present["state"])), max(head, float64(m.present["head"]))
					sum += float64(m.bytesRead()) * per
					for kind, u := range m.read {
						all[kind] = uses{all[kind].n + u.n, all[kind].bytes + u.bytes}
					}
				}
				lists := float64(all["list"].n) * per
				t.Logf("%d replicas, first share %v: %.2f Lists a tick, of %.0f bytes; the state has %.0f; all read %.0f bytes a tick, %.2f Lists: %v", n, first, lists, evidence, state, sum, sum/evidence, all)
				if lists > 2 || sum > 2*(evidence+state)+float64(n)*head || sum > 3*evidence && (n >= 100 || n >= 10 && !first) {
					t.Errorf("%d replicas make %.2f Lists a tick and read %.0f bytes, %.2f of them", n, lists, sum, sum/evidence)
				}
			})
		}
	}
}

// TestCoin: two in n evaluate, in the mean.
func TestCoin(t *testing.T) {
	r, err := New("x", costPolicy(2), &Options{Logger: quiet})
	must(t, err)
	for _, n := range []int{3, 100, 1000} {
		const draws = 1_000_000
		heads := 0
		for range draws {
			if r.coin(n) {
				heads++
			}
		}
		p := 2 / float64(n)
		if got := float64(heads) / draws; math.Abs(got-p) > 6*math.Sqrt(p*(1-p)/draws) {
			t.Errorf("%v of %d evaluate, not %v", got, n, p)
		}
	}
}

// evidence is how many bytes of it there are.
func (f *fleetRun) evidence() (n int) {
	all, err := f.store.Store.List(context.Background(), "rollout/x/ev/")
	if err != nil {
		f.t.Error(err)
	}
	for _, value := range all {
		n += len(value)
	}
	return n
}

// TestFleetWrites: what a replica publishes of 3 rings and 4 metrics has at most 8 KiB, it does so at most once a tick, and
// one with nothing new writes nothing.
func TestFleetWrites(t *testing.T) {
	unraced(t)
	synctest.Test(t, func(t *testing.T) {
		const n, ticks = 8, 12
		f := newRunning(t, n, 4)
		defer f.stop()
		f.serve(4, 4000, 4)
		f.store.reset()
		for range ticks {
			f.serve(1, 4000, 4)
		}
		m := f.store.reset()
		t.Logf("busy: %d documents in %d ticks of %d replicas, the greatest of %d bytes, of the state %d, of the head %d", m.wrote["ev"].n, ticks, n, m.greatest["ev"], m.greatest["state"], m.greatest["head"])
		if m.greatest["ev"] > 8<<10 {
			t.Errorf("%d bytes of evidence", m.greatest["ev"])
		}
		if m.wrote["ev"].n > n*(ticks*11/9+1) { // a tick is jittered by a tenth
			t.Errorf("%d documents in %d ticks of %d replicas", m.wrote["ev"].n, ticks, n)
		}

		// From the next epoch on, a document has two.
		must(t, f.all[0].Advance(t.Context(), f.all[0].Status().Stage.Name, "on"))
		f.serve(16, 4000, 4)
		m = f.store.reset()
		t.Logf("two epochs: the greatest of %d bytes", m.greatest["ev"])
		if m.greatest["ev"] > 8<<10 {
			t.Errorf("%d bytes of evidence of two epochs", m.greatest["ev"])
		}

		// However much traffic there is, also when shares change again.
		seals := 0
		for i := range 3 {
			must(t, f.all[0].Advance(t.Context(), f.all[0].Status().Stage.Name, "on"))
			f.serve(8, 40_000, 4)
			m = f.store.reset()
			for _, r := range f.all {
				seals = max(seals, len(r.seals))
			}
			t.Logf("heavy traffic, shares %d: the greatest of %d bytes, of the state %d; %d documents of %d bytes; sealed up to %d times", i, m.greatest["ev"], m.greatest["state"], m.wrote["ev"].n, m.wrote["ev"].bytes, seals)
			if m.greatest["ev"] > 8<<10 || m.wrote["ev"].bytes > n*8*8<<10 {
				t.Errorf("%d bytes of evidence at most, %d in all", m.greatest["ev"], m.wrote["ev"].bytes)
			}
		}
		if seals == 0 || seals == mostSeals {
			t.Errorf("documents were sealed up to %d times", seals)
		}

		time.Sleep(time.Minute) // the last blocks close
		synctest.Wait()
		f.store.reset()
		busy := f.all[3]
		for range ticks {
			costTraffic(busy, f.rnd, 50, 4)
			time.Sleep(defaultInterval)
		}
		synctest.Wait()
		m = f.store.reset()
		for key, times := range m.written {
			if kindOf(key) == "ev" && (!strings.Contains(key, busy.replica+"-") || times > ticks*11/9+1) {
				t.Errorf("%s is written %d times in %d ticks in which only %s had traffic", key, times, ticks, busy.replica)
			}
		}

		time.Sleep(15 * time.Minute) // what is quiet for long is folded, by another one
		synctest.Wait()
		f.store.reset()
		time.Sleep(24 * defaultInterval)
		synctest.Wait()
		m = f.store.reset()
		t.Logf("quiet: %v in 24 ticks of %d replicas", m.wrote, n)
		if m.wrote["ev"].n > 0 || m.wrote["state"].n > 6 || m.wrote["head"].n > 6 { // checkpoints, which two may write at once
			t.Errorf("without traffic %v are written in 24 ticks", m.wrote)
		}
	})
}

// one round of processes in step: all publish, one evaluates, all follow. It is what their ticks do, in this order.
func round(t *testing.T, all []*Rollout, evaluator int) {
	ctx := context.Background()
	for _, r := range all {
		r.turnSlot(r.now())
		must(t, r.publish(ctx, false, false))
	}
	must(t, all[evaluator].evaluate(ctx, &all[evaluator].clock, false, false))
	for i, r := range all {
		if i != evaluator {
			must(t, r.refresh(ctx))
		}
	}
}

// decisive is what a state decides by, as text.
func decisive(t *testing.T, s Store) (string, *machine.State) {
	t.Helper()
	value, _, err := s.Load(context.Background(), stateKey)
	must(t, err)
	st, err := machine.Decode("x", value)
	must(t, err)
	b, err := json.Marshal([]any{
		st.Gen, st.Epoch, st.Phase, st.Hold, st.Stage, st.Shares, st.Rings, st.Clock, st.Elapsed, st.Baked, st.Quiet, st.Seen,
		st.Proved, st.Exposed, st.Oldest, st.Gates, st.Consumed, st.Incident != nil,
	})
	must(t, err)
	return string(b), st
}

func onePolicy() Policy {
	return Policy{
		Version: "1", Rings: []Ring{{Name: "staff"}}, Stages: []Stage{{Ring: "staff", Percent: 50}, {Percent: 10}, {Percent: 50}, {Percent: 100}},
		Bake: 3 * time.Minute, Holdback: 20, ProveFrom: 100, Without: []string{GuardSplit}, // units that a process sees for the first time
		Gates: []Gate{Errors.Within(2), Latency.Quantile(.9).AtMost(200 * time.Millisecond), costRates[0].NoWorse()},
	}
}

// TestFleetIsOne: a fleet judges the same outcomes exactly as one process does: the same blocks, the same wealth of each
// gate bit for bit, the same stages at the same time.
func TestFleetIsOne(t *testing.T) {
	unraced(t)
	for _, c := range []struct {
		name string
		bad  int // errors of the candidate, percent
		end  State
	}{{"good", 3, Completed}, {"bad", 12, RolledBack}} {
		t.Run(c.name, func(t *testing.T) {
			now := driverStart
			stores := []Store{MemStore(), MemStore()}
			var one, fleet []*Rollout
			blocks := [2][]string{}
			member := func(i int, name string) *Rollout {
				r := manual(t, stores[i], name, onePolicy(), &now)
				r.judged = func(all []machine.Block) {
					b, err := json.Marshal(all)
					must(t, err)
					blocks[i] = append(blocks[i], string(b))
				}
				return r
			}
			one = append(one, member(0, "one"))
			for i := range 5 {
				fleet = append(fleet, member(1, fmt.Sprint("r", i)))
			}
			rnd := rand.New(rand.NewPCG(3, uint64(c.bad)))
			phases, judged := 0, 0
			var last string
			for i := range 400 {
				round(t, one, 0)
				round(t, fleet, rnd.IntN(5))
				a, st := decisive(t, stores[0])
				b, _ := decisive(t, stores[1])
				if a != b {
					t.Fatalf("round %d: one process decides by\n%s\nand a fleet by\n%s", i, a, b)
				}
				if !slices.Equal(blocks[0], blocks[1]) {
					t.Fatalf("round %d: %d blocks of one process, %d of a fleet, or others", i, len(blocks[0]), len(blocks[1]))
				}
				for _, all := range blocks[0] {
					judged += strings.Count(all, `"Epoch"`)
				}
				blocks = [2][]string{}
				if at := fmt.Sprint(st.Phase, st.Stage); at != last {
					last = at
					phases++
				}
				if st.Phase == machine.Completed || st.Phase == machine.RolledBack {
					if got := one[0].Status().State; got != c.end {
						t.Errorf("it ends %v, not %v", got, c.end)
					}
					t.Logf("%v after %d rounds, %d blocks and %d stages", one[0].Status().State, i, judged, phases)
					return
				}
				for range rnd.IntN(120) {
					k := rnd.IntN(40_000)
					u := Unit{Key: fmt.Sprint(k)}
					if k%4 == 0 {
						u.Groups = staffOnly
					}
					hurt, slow, stale := rnd.IntN(100), rnd.NormFloat64(), rnd.IntN(10) == 0
					for _, r := range []*Rollout{one[0], fleet[k%5]} {
						d := r.Decide(u)
						rate := 3
						if d.Enabled() {
							rate = c.bad
						}
						d.Record(Errors.Observe(hurt < rate), Latency.Observe(time.Duration(math.Exp(slow/3)*float64(80*time.Millisecond))), costRates[0].Observe(stale))
					}
				}
				now = now.Add(5 * time.Second)
			}
			t.Errorf("it has not ended: %s", last)
		})
	}
}

// TestFleetAA: a fleet rolls back a candidate that is no other than what is stable as seldom as Policy.FalseRollback says,
// whoever evaluates, in whatever order. 2 standard errors above it are allowed; -fleet.aa for more runs.
func TestFleetAA(t *testing.T) {
	unraced(t)
	runs := *fleetAA
	if raced {
		runs = min(runs, 20)
	}
	const alpha = 5.
	policy := Policy{
		Version: "1", Stages: []Stage{{Percent: 50, GuardOnly: true}, {Percent: 100, GuardOnly: true}}, Bake: 12 * time.Hour, Holdback: 20, Independent: true, FalseRollback: alpha / 100,
		Gates: []Gate{Errors.NoWorse()}, Without: []string{GuardSplit, GuardNoOutcome},
	}
	wrong, outcomes := 0, uint64(0)
	for seed := range runs {
		now := driverStart
		rnd := rand.New(rand.NewPCG(uint64(seed), 11))
		store := MemStore()
		var all []*Rollout
		for i := range 5 {
			r := manual(t, store, fmt.Sprint("r", i), policy, &now)
			r.coin = func(n int) bool { return rnd.IntN(n) < 2 }
			all = append(all, r)
		}
		units := 0
		for range 40 {
			for _, i := range rnd.Perm(len(all)) {
				for range 30 {
					units++
					all[i].Decide(Unit{Key: fmt.Sprint(seed, units)}).Record(Errors.Observe(rnd.IntN(10) == 0))
				}
				turn(all[i])
				now = now.Add(time.Second)
			}
		}
		_, st := decisive(t, store)
		if st.Phase.Latched() {
			wrong++
		} else if g := st.Gates.Gates[Errors.NoWorse().Name()]; g != nil {
			outcomes += g.Parts[Everyone].Candidate.N + g.Parts[Everyone].Control.N
		}
	}
	most := alpha/100 + 2*math.Sqrt(alpha/100*(1-alpha/100)/float64(runs))
	t.Logf("%d of %d rolled back, %.1f %%; at most %.1f %%; %d outcomes judged a run", wrong, runs, 100*float64(wrong)/float64(runs), 100*most, outcomes/uint64(max(runs-wrong, 1)))
	if float64(wrong) > most*float64(runs) {
		t.Errorf("%d of %d candidates that are no worse are rolled back", wrong, runs)
	}
	if outcomes == 0 {
		t.Error("it shows nothing")
	}
}

// heap is a store that lists the same documents each time.
type heap struct {
	Store
	all map[string][]byte
}

func (h *heap) List(context.Context, string) (map[string][]byte, error) { return h.all, nil }

// merging is a process that has the evidence of n others to gather, of 3 rings and 5 metrics, and the state it gathers to.
func merging(tb testing.TB, n int, later bool) (*Rollout, *machine.State, int) {
	tb.Helper()
	now := driverStart
	h := &heap{Store: MemStore()}
	r, err := New("x", costPolicy(5), &Options{Store: h, Logger: quiet, Replica: "merging"})
	if err != nil {
		tb.Fatal(err)
	}
	r.now = func() time.Time { return now }
	r.running.Store(true)
	r.startClock()
	turn(r)
	turn(r)
	rnd := rand.New(rand.NewPCG(5, 6))
	if later {
		costTraffic(r, rnd, 10_000, 5)
		must(tb, r.Advance(context.Background(), r.Status().Stage.Name, "on"))
		turn(r)
	}
	st := r.known
	h.all = map[string][]byte{}
	size := 0
	var docs [16]*tally.Doc
	for i := range docs { // that differ
		costTraffic(r, rnd, 10_000, 5)
		docs[i] = r.count(st)
	}
	for i := range n {
		d := *docs[i%len(docs)]
		d.Inc, d.Seq, d.Birth = fmt.Sprintf("replica-%05d-0123456789ab", i), 7, st.Round
		value := d.Encode()
		size += len(value)
		h.all[r.evidencePrefix(st.Gen, st.Nonce)+d.Inc] = value
	}
	return r, st, size
}

func merge(tb testing.TB, r *Rollout, st *machine.State) machine.Input {
	next := st.Clone()
	in := r.input(r.now())
	if _, err := r.gather(context.Background(), next, &in, false, false); err != nil {
		tb.Fatal(err)
	}
	return in
}

// BenchmarkFleetMerge is what an evaluation makes of the documents of many: from what List has returned to blocks. The
// store's own part, and what the gates make of the blocks, is not in it.
func BenchmarkFleetMerge(b *testing.B) {
	for _, c := range []struct {
		n     int
		later bool
	}{{100, false}, {1000, false}, {1000, true}, {10_000, false}} {
		b.Run(fmt.Sprintf("%d/later=%v", c.n, c.later), func(b *testing.B) {
			r, st, size := merging(b, c.n, c.later)
			b.ReportAllocs()
			best := time.Hour
			for b.Loop() {
				began := time.Now()
				merge(b, r, st)
				best = min(best, time.Since(began))
			}
			b.ReportMetric(float64(best.Microseconds())/1000, "best-ms")
			b.ReportMetric(float64(size)/(1<<20), "MiB-listed")
		})
	}
}

// TestFleetMerge: gathering the evidence of 1,000 processes takes at most 64 MiB, and grows no faster than they are more: if
// it were quadratic, 1,000 would take a hundred times as long as 100.
// How long it takes is BenchmarkFleetMerge's to say.
func TestFleetMerge(t *testing.T) {
	unraced(t)
	cost := func(n int) (took time.Duration, allocated uint64) {
		r, st, _ := merging(t, n, false)
		took, allocated = time.Hour, math.MaxUint64
		for range 15 {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			began := time.Now()
			in := merge(t, r, st)
			took = min(took, time.Since(began))
			runtime.ReadMemStats(&after)
			allocated = min(allocated, after.TotalAlloc-before.TotalAlloc)
			if len(in.Blocks) < 15 {
				t.Fatalf("%d blocks", len(in.Blocks))
			}
		}
		return took, allocated
	}
	t100, m100 := cost(100)
	t1000, m1000 := cost(1000)
	t.Logf("100: %v, %.1f MiB; 1,000: %v, %.1f MiB", t100, float64(m100)/(1<<20), t1000, float64(m1000)/(1<<20))
	if m1000 > 64<<20 {
		t.Errorf("1,000 documents take %d bytes", m1000)
	}
	if m1000 > 12*m100 || !raced && t1000 > 50*t100 {
		t.Errorf("100 documents take %v and %d bytes, 1,000 take %v and %d", t100, m100, t1000, m1000)
	}
}

// TestFleetTable prints what fleets of some sizes cost; see docs/scale.md.
func TestFleetTable(t *testing.T) {
	if *fleetTable == "" {
		t.Skip("only where -fleet.table says of which sizes")
	}
	for _, text := range strings.Split(*fleetTable, ",") {
		var n int
		if _, err := fmt.Sscan(text, &n); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) {
			full := min(n, 1000) // the others are mirrors
			f := newRunning(t, full, 4)
			defer f.stop()
			f.serve(4, 2000, 4)
			must(t, f.all[0].Advance(t.Context(), f.all[0].Status().Stage.Name, "on"))
			f.serve(2, 2000, 4) // a document has two epochs, as from the second share on
			for i := range n - full {
				f.mirrors = append(f.mirrors, mirror{inc: fmt.Sprintf("mirror-%04d-%s", i, randomText())})
			}
			f.serve(1, 100, 4)
			f.store.reset()
			ticks := max(24, 4800/n)
			f.serve(ticks, 100, 4)
			m, per := f.store.reset(), 1/float64(ticks)
			one := func(x int) float64 { return float64(x) * per / float64(full) } // of what every replica does
			each := func(x int) float64 { return float64(x) * per / float64(n) }   // of what two do
			evidence := float64(m.read["list"].bytes) / float64(m.read["list"].n)
			read := one(m.read["head"].bytes) + each(m.read["list"].bytes+m.read["state"].bytes)
			t.Logf("%d replicas, %d ticks: documents %.2f a replica and tick, of %d bytes in the mean, %d at most; state written %.2f times a tick, %.2f refused, of %d bytes; head %.3f times, of %d bytes; Lists %.2f a tick of %.0f bytes; read a replica and tick %.0f bytes: lists %.0f, heads %.0f, states %.0f; all together %.2f Lists a tick",
				n, ticks, one(m.wrote["ev"].n), m.wrote["ev"].bytes/max(m.wrote["ev"].n, 1), m.greatest["ev"],
				float64(m.wrote["state"].n)*per, float64(m.refused)*per, m.present["state"], float64(m.wrote["head"].n)*per, m.present["head"],
				float64(m.read["list"].n)*per, evidence,
				read, each(m.read["list"].bytes), one(m.read["head"].bytes), each(m.read["state"].bytes), read*float64(n)/evidence)
		})
	}
}

// unraced leaves a test to the run without the race detector, which makes it take a minute; the same code is under it in
// TestFleet.
func unraced(t *testing.T) {
	t.Helper()
	if raced {
		t.Skip("measured without the race detector")
	}
}
