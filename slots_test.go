package rollout

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/machine"
)

func TestDecisionSize(t *testing.T) {
	if size := unsafe.Sizeof(Decision{}); size != 16 {
		t.Errorf("a Decision is %d bytes", size)
	}
}

// consumed adds up the blocks that are consumed, by metric and cohort: cells, and groups summed.
type consumed struct {
	t      *testing.T
	blocks []machine.Block
}

// tick makes one tick of r and takes the blocks that it consumed.
func (c *consumed) tick(r *Rollout) {
	c.t.Helper()
	r.judged = c.take
	r.tick(c.t.Context(), &r.clock, false)
}

// take adds blocks, whose groups must sum up to their cells.
func (c *consumed) take(blocks []machine.Block) {
	c.t.Helper()
	for _, b := range blocks {
		for _, cells := range [][2][]uint64{{b.Control, b.ControlBy}, {b.Candidate, b.CandidateBy}} {
			if len(cells[0]) == evidence.Cells { // a timing, whose groups are of its marks
				if len(cells[1]) > 0 && sum(cells[0]) != sum(cells[1]) {
					c.t.Errorf("%s: %d outcomes, %d by groups", b.Metric, sum(cells[0]), sum(cells[1]))
				}
				continue
			}
			sums := make([]uint64, len(cells[0]))
			for i, n := range cells[1] {
				sums[i%len(sums)] += n
			}
			if !slices.Equal(sums, cells[0]) {
				c.t.Errorf("%s: %v, by groups %v", b.Metric, cells[0], sums)
			}
		}
	}
	c.blocks = append(c.blocks, blocks...)
}

// of is what was consumed of one metric: how many blocks, and the cells of either cohort.
func (c *consumed) of(metric string) (n int, cells [2][]uint64) {
	for _, b := range c.blocks {
		if b.Metric != metric {
			continue
		}
		n++
		for i, more := range [][]uint64{b.Control, b.Candidate} {
			if cells[i] == nil {
				cells[i] = make([]uint64, len(more))
			}
			for k, x := range more {
				cells[i][k] += x
			}
		}
	}
	return n, cells
}

// slotPolicy has a control in its only ring, whatever becomes of the gates.
func slotPolicy() Policy {
	p := everyKind()
	p.Stages = Percentages(50, 100)
	p.Bake, p.Deadline = 10*time.Hour, 20*time.Hour
	return p
}

// A candidate that hangs leaves nothing behind but decisions. An answer that comes while its slot waits counts.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := lone(t, slotPolicy(), Options{})
		c := consumed{t: t}
		c.tick(r)
		candidate, control := keyOf(t, r, Candidate), keyOf(t, r, Control)
		var slow []Decision
		for range 20 {
			r.Decide(candidate)
			slow = append(slow, r.Decide(control))
		}
		r.Peek(candidate)
		time.Sleep(5 * time.Second) // the slot ends
		c.tick(r)
		for _, d := range slow[:15] {
			d.Record(Errors.Observe(false))
		}
		time.Sleep(4 * time.Second)
		c.tick(r)
		if n, _ := c.of(GuardNoOutcome); n != 0 {
			t.Fatal("a block before outcomes had their time")
		}
		time.Sleep(time.Second)
		c.tick(r)
		n, cells := c.of(GuardNoOutcome)
		if n != 1 || cells[1][0] != 0 || cells[1][1] != 20 || cells[0][0] != 15 || cells[0][1] != 5 {
			t.Fatalf("%d blocks, %v", n, cells)
		}
		for range 3 {
			time.Sleep(5 * time.Second)
			c.tick(r)
		}
		if n, _ := c.of(GuardNoOutcome); n != 1 {
			t.Errorf("it was handed over %d times", n)
		}
		if s := r.Status().Rings[0]; s.Candidate != 20 || s.Control != 20 {
			t.Errorf("%+v", s)
		}
	})
}

// Where nothing is ever recorded nothing is said; where the control records no Errors, anything is an answer.
func TestSilenceVoices(t *testing.T) {
	for _, v := range []struct {
		name      string
		answer    func(d Decision)
		blocks    int
		good, bad uint64 // of the control
	}{
		{"nobody records", func(Decision) {}, 0, 0, 0},
		{"an empty Record", func(d Decision) { d.Record() }, 0, 0, 0},
		{"through a token", func(d Decision) {
			token, _ := d.MarshalText()
			d, _ = d.at.r.ParseDecision(token)
			d.Record(Errors.Observe(false))
		}, 0, 0, 0},
		{"something else", func(d Decision) { d.Record(route.Observe("answer")) }, 1, 10, 0},
		{"errors", func(d Decision) { d.Record(Latency.Observe(1), Errors.Observe(true)) }, 1, 10, 0},
		{"several times", func(d Decision) { d.Record(Errors.Observe(true)); d.Record(Errors.Observe(true)) }, 1, 10, 0},
		{"errors of some, something else of all", func(d Decision) {
			if d.Record(quality.Observe(1)); d.bits.group()%2 == 0 {
				d.Record(Errors.Observe(false))
			}
		}, 1, 4, 6},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := lone(t, slotPolicy(), Options{})
			c := consumed{t: t}
			c.tick(r)
			even, odd := 0, 0
			for i := 0; even < 4 || odd < 6; i++ {
				u := Unit{Key: fmt.Sprint(i)}
				d := r.Peek(u)
				if n := &even; d.Cohort() == Control {
					if d.bits.group()%2 == 1 {
						n = &odd
					}
					if *n++; *n <= 4 || n == &odd && *n <= 6 {
						v.answer(r.Decide(u))
					}
				}
			}
			time.Sleep(5 * time.Second)
			c.tick(r)
			time.Sleep(5 * time.Second)
			c.tick(r)
			n, cells := c.of(GuardNoOutcome)
			if n != v.blocks || n > 0 && (cells[0][0] != v.good || cells[0][1] != v.bad || sum(cells[1]) != 0) {
				t.Errorf("%s: %d blocks, %v", v.name, n, cells)
			}
		})
	}
}

// An answer of a slot whose cells another one has taken is nobody's.
func TestLateAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := lone(t, slotPolicy(), Options{})
		c := consumed{t: t}
		c.tick(r)
		candidate, control := keyOf(t, r, Candidate), keyOf(t, r, Control)
		late := []Decision{r.Decide(candidate), r.Decide(candidate), r.Decide(candidate), r.Decide(control)}
		late[3].Record(Errors.Observe(false))
		for range slots {
			time.Sleep(5 * time.Second)
			c.tick(r)
		}
		if got, want := r.slot.Load()%slots, late[0].at.slot%slots; got != want || r.slot.Load() == late[0].at.slot {
			t.Fatalf("slot %d after %d: the test shows nothing", r.slot.Load(), late[0].at.slot)
		}
		r.Decide(candidate)
		for _, d := range late {
			d.Record(Errors.Observe(false))
		}
		before := len(c.blocks)
		for range 3 {
			time.Sleep(5 * time.Second)
			c.tick(r)
		}
		c.blocks = c.blocks[before:]
		if n, cells := c.of(GuardNoOutcome); n != 1 || cells[1][0] != 0 || cells[1][1] != 1 {
			t.Errorf("%d blocks, %v", n, cells)
		}
		if n := sum(r.outcomes(0, 1, errorsIndex)); n != 3 || r.Status().Late != 0 {
			t.Errorf("%d of 3 late outcomes count", n)
		}
	})
}

// A request's answers are counted in the slot they were given in, and so is what comes of them, however many slots later;
// a Do in it is a decision of its own, and a Peek none.
func TestSlotsOfARequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := lone(t, slotPolicy(), Options{})
		c := consumed{t: t}
		c.tick(r)
		u := keyOf(t, r, Candidate)
		counts := func(slot uint32) (decided, errors uint64) {
			n := r.ledgers[len(r.ledgers)-1].snap.last.counts(1, int(slot%slots))
			return sum(n.decided[:]), sum(n.errors[:])
		}
		check := func(what string, slot uint32, decided, errors uint64) {
			t.Helper()
			if d, e := counts(slot); d != decided || e != errors {
				t.Errorf("%s: slot %d has %d decisions and %d errors, not %d and %d", what, slot, d, e, decided, errors)
			}
		}
		ctx := NewContext(t.Context(), u)
		first := r.slot.Load()
		d := r.DecideContext(ctx)
		peeked := r.Peek(u)
		time.Sleep(5 * time.Second)
		c.tick(r)
		next := r.slot.Load()
		if next != first+1 || r.DecideContext(ctx) != d || r.Decide(u).at.slot != next {
			t.Fatalf("slot %d after %d", next, first)
		}
		check("asked", first, 1, 0)
		Record(ctx, Errors.Observe(true))
		check("recorded", first, 1, 1)
		peeked.Record(Errors.Observe(true))
		check("of a Peek", first, 1, 1)
		check("of a Peek", next, 1, 0)
		f := func(ctx context.Context) error {
			if got := r.DecideContext(ctx); got.at.slot != next || got.bits != d.bits {
				t.Errorf("in a Do: slot %d", got.at.slot)
			}
			return nil
		}
		must(t, r.Do(ctx, u, f, f))
		check("a Do", first, 1, 1)
		check("a Do", next, 2, 1)

		must(t, r.SetPercent(t.Context(), Everyone, 60, "wider")) // the request's epoch is over, the Do's answer is still its
		g := func(ctx context.Context) error {
			if got := r.DecideContext(ctx); got.at.slot != next || got.at.epoch != d.at.epoch {
				t.Errorf("in a Do: slot %d, epoch %d", got.at.slot, got.at.epoch)
			}
			return nil
		}
		must(t, r.Do(ctx, u, g, g))

		release := r.force(Control)
		time.Sleep(5 * time.Second)
		c.tick(r)
		release()
		if got := r.Decide(u); got.at.slot != next+1 || got.at.slot != r.slot.Load() {
			t.Errorf("after a forced time: slot %d", got.at.slot)
		}
	})
}

// Slots wait as long as the control's slowest outcomes take, between 5 s and a minute.
func TestOutcomeDelay(t *testing.T) {
	for _, v := range []struct{ took, want time.Duration }{
		{0, 5 * time.Second}, {time.Second, 5 * time.Second}, {20 * time.Second, 20 * time.Second}, {time.Hour, time.Minute},
	} {
		st := &machine.State{}
		if v.took > 0 {
			st.Gates.Memory = map[string]map[string]*judge.Memory{"latency": {Everyone: {
				Control: judge.Histogram{From: evidence.Index(v.took), Cells: []float32{1}},
			}}}
		}
		if d := outcomeDelay(st, Everyone); d < v.want || float64(d) > 1.021*float64(v.want) {
			t.Errorf("%v: %v, not %v", v.took, d, v.want)
		}
	}
}

// A rule that holds whatever happens in between: every counted decision is in a block of some slot once, and every
// outcome in a block of its metric, also where writes fail and shares change.
func TestEverythingIsConsumedOnce(t *testing.T) {
	rapid.Check(t, func(t1 *rapid.T) {
		ops := rapid.SliceOfN(rapid.IntRange(0, 9), 10, 60).Draw(t1, "ops")
		synctest.Test(t, func(t *testing.T) {
			f := &faulty{Store: MemStore()}
			r := lone(t, slotPolicy(), Options{Store: f})
			c := consumed{t: t}
			c.tick(r)
			n, decided, away := 0, [2]uint64{}, 0
			tick := func() { c.tick(r) }
			for _, op := range ops {
				if away > 8 { // what is away for longer than slots last loses some of them
					away = 0
					f.set(nil, nil, nil)
					tick()
				}
				switch op {
				case 0:
					f.set(down, nil, nil)
				case 1:
					f.set(nil, down, nil)
				case 2:
					f.set(nil, nil, func() error { return errDown })
				case 3:
					f.set(nil, nil, nil)
					away = 0
					tick()
				case 4, 5:
					time.Sleep(5 * time.Second)
					away++
					tick()
				case 6:
					tick()
				default:
					for range 5 {
						n++
						d := r.Decide(Unit{Key: fmt.Sprint("unit ", n)})
						decided[d.Cohort()-Control]++
						d.Record(Errors.Observe(false), Latency.Observe(time.Duration(n)*time.Millisecond), quality.Observe(1.1), route.Observe("answer"))
					}
				}
			}
			f.set(nil, nil, nil)
			for range 14 {
				time.Sleep(5 * time.Second)
				tick()
			}
			for _, m := range []string{"errors", "latency", "quality", "route", GuardNoOutcome, GuardSplit} {
				_, cells := c.of(m)
				for cohort := range cells {
					if got := sum(cells[cohort]); m == GuardSplit && got > decided[cohort] || m != GuardSplit && got != decided[cohort] {
						t1.Fatalf("%s: of %v %d were decided and %d consumed", m, Control+Cohort(cohort), decided[cohort], got)
					}
				}
			}
		})
	})
}

// A unit counts when it first comes, in whichever epoch; and anew in a new generation.
func TestSplitCountsUnitsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := slotPolicy()
		p.Holdback = 20
		r := lone(t, p, Options{})
		c := consumed{t: t}
		c.tick(r)
		first := map[uint64]bool{}
		var want [2]uint64
		serve := func() {
			for i := range 3000 {
				u := Unit{Key: fmt.Sprint("unit ", i)}
				d := r.Decide(u)
				r.Peek(u)
				ctx := NewContext(context.Background(), u)
				r.Enabled(ctx)
				r.Enabled(ctx)
				if part := Bucket(r.policy.Salt, u.Key) >> 20 & 0xffff; !first[part] {
					first[part] = true
					want[d.Cohort()-Control]++
				}
			}
		}
		check := func(share float64) {
			t.Helper()
			c.tick(r)
			_, cells := c.of(GuardSplit)
			if sum(cells[0]) != want[0] || sum(cells[1]) != want[1] {
				t.Errorf("%v, not %v", cells, want)
			}
			if last := c.blocks[len(c.blocks)-1]; last.Metric != GuardSplit || last.Share != share || len(last.CandidateBy) != slotGroups {
				t.Errorf("%s with a share of %v, not %v", last.Metric, last.Share, share)
			}
		}
		serve()
		check(.5)
		serve()
		check(.5)
		first[Bucket(r.policy.Salt, "unit 0")>>20&0xffff] = true
		must(t, r.SetPercent(t.Context(), Everyone, 100, "wide")) // 80 with the Holdback
		for i := range 50 {
			u := Unit{Key: fmt.Sprint("another ", i)}
			d := r.Decide(u)
			if part := Bucket(r.policy.Salt, u.Key) >> 20 & 0xffff; !first[part] {
				first[part] = true
				want[d.Cohort()-Control]++
			}
		}
		check(float64(-Percent(20).threshold()) / (1 << 64))
		must(t, r.Restart(t.Context(), "anew"))
		c.blocks = nil
		c.tick(r)
		clear(first)
		want = [2]uint64{}
		serve()
		check(.5)
	})
}

// Without a control there is nothing to compare with, and guards that are off see nothing.
func TestGuardsSeeNothing(t *testing.T) {
	for _, edit := range []func(*Policy){
		func(p *Policy) { p.Without = []string{GuardSplit, GuardNoOutcome} },
		func(p *Policy) { p.Stages, p.Holdback = Percentages(100), 0 },
	} {
		synctest.Test(t, func(t *testing.T) {
			p := slotPolicy()
			edit(&p)
			r := lone(t, p, Options{})
			c := consumed{t: t}
			c.tick(r)
			for range 5 {
				for i := range 30 {
					r.Decide(Unit{Key: fmt.Sprint(i)}).Record(Errors.Observe(false))
				}
				time.Sleep(5 * time.Second)
				c.tick(r)
			}
			if n, _ := c.of("errors"); n == 0 {
				t.Error("no blocks at all: the test shows nothing")
			}
			for _, guard := range []string{GuardNoOutcome, GuardSplit} {
				if n, cells := c.of(guard); n > 0 {
					t.Errorf("%s: %v", guard, cells)
				}
			}
		})
	}
}

// A timing is counted by the thresholds that are in force when it is recorded, those of its cohort.
func TestMarks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, judge.MaxMarks).Draw(t, "marks")
		m := newMarks(n)
		if got := m.cell(0, 500); got != judge.MarkCells(n)-1 {
			t.Fatalf("without thresholds it is cell %d", got)
		}
		var at [][2]int
		for range n {
			at = append(at, [2]int{rapid.IntRange(0, evidence.Cells).Draw(t, "control"), rapid.IntRange(0, evidence.Cells).Draw(t, "candidate")})
		}
		m.follow(at)
		same := m.at.Load()
		m.follow(at)
		if m.at.Load() != same {
			t.Fatal("the same thresholds are new ones")
		}
		c, outcome := rapid.IntRange(0, 1).Draw(t, "cohort"), rapid.IntRange(0, evidence.Cells-1).Draw(t, "outcome")
		set := m.cell(c, outcome)
		for i := range at {
			if over := outcome >= at[i][c]; over != (set>>i&1 == 1) {
				t.Fatalf("cell %d, thresholds %v: %b", outcome, at, set)
			}
		}
		if set >= judge.MarkCells(n)-1 {
			t.Fatalf("the set %b has no cell", set)
		}
		m.follow(nil)
		if got := m.cell(c, outcome); got != judge.MarkCells(n)-1 {
			t.Fatalf("without thresholds again it is cell %d", got)
		}
	})
}

// Whatever is observed together, and whatever the thresholds are meanwhile: the groups' cells of a timing are what they
// would be if each outcome were counted in its own, and together as many as its histogram has.
func TestMarksOfEveryCall(t *testing.T) {
	queue := NewTiming("queue")
	for _, timings := range [][]Timing{{Latency}, {Latency, queue}} {
		p := slotPolicy()
		if len(timings) > 1 {
			p.Gates = append(p.Gates, queue.NoWorse())
		}
		r := startedWith(t, p)
		rapid.Check(t, func(t *rapid.T) {
			setPercent(t, r, Everyone, 50)
			setPercent(t, r, Everyone, 60) // cells of its own
			ring := r.snap.Load().last
			r.mu.Lock()
			for _, m := range ring.marks {
				if m != nil {
					m.follow(nil)
				}
			}
			r.mu.Unlock()
			want, consumed, totals := map[string][]uint64{}, map[string][]uint64{}, map[string][2]uint64{}
			index := func(m Timing) int { return r.snap.Load().indexOf(m.m) }
			for _, m := range timings {
				n := len(newLedger(r.snap.Load()).rings[0].metrics[index(m)].marked[0])
				for c := range 2 {
					want[fmt.Sprint(nameOf(m.m), c)], consumed[fmt.Sprint(nameOf(m.m), c)] = make([]uint64, n), make([]uint64, n)
				}
			}
			calls := rapid.IntRange(1, 40).Draw(t, "calls")
			for i := range calls {
				if rapid.IntRange(0, 9).Draw(t, "thresholds") == 0 {
					for _, m := range timings {
						var at [][2]int
						if rapid.Bool().Draw(t, "known") {
							for range r.metrics[index(m)].marks {
								at = append(at, [2]int{rapid.IntRange(0, 500).Draw(t, "control"), rapid.IntRange(0, 500).Draw(t, "candidate")})
							}
						}
						ring.marks[index(m)].follow(at)
					}
				}
				d := r.Decide(Unit{Key: fmt.Sprint("unit ", i%7)})
				c := d.bits.side()
				var obs []Observation
				for range rapid.IntRange(1, 4).Draw(t, "observations") {
					switch k := rapid.IntRange(0, 2+len(timings)).Draw(t, "metric"); k {
					case 0, 1:
						obs = append(obs, Errors.Observe(k == 0))
					case 2:
						obs = append(obs, route.Observe("answer"))
					default:
						m := timings[k-3]
						took := time.Duration(rapid.IntRange(0, 1<<24).Draw(t, "took"))
						obs = append(obs, m.Observe(took))
						name, marks := fmt.Sprint(nameOf(m.m), c), ring.marks[index(m)]
						want[name][int(d.bits.group())*(marks.none+1)+marks.cell(c, evidence.Index(took))]++
						n := totals[nameOf(m.m)]
						n[c]++
						totals[nameOf(m.m)] = n
					}
				}
				d.Record(obs...)
				if i < calls-1 && rapid.IntRange(0, 9).Draw(t, "read") > 0 {
					continue
				}
				for _, m := range timings { // each reading has what the one before had
					for c := range 2 {
						name := fmt.Sprint(nameOf(m.m), c)
						consumed[name] = ring.marks[index(m)].totals(ring, c, consumed[name])
						if !slices.Equal(consumed[name], want[name]) {
							t.Fatalf("%s: %v, not %v", name, consumed[name], want[name])
						}
						cells := make([]uint64, evidence.Cells)
						ring.outcomes[c][index(m)].AddTo(cells)
						if n := totals[nameOf(m.m)][c]; sum(cells) != n || sum(consumed[name]) != n {
							t.Fatalf("%s: %d by groups, %d in the histogram, not %d", name, sum(consumed[name]), sum(cells), n)
						}
					}
				}
			}
		})
	}
}

// processors gives a test that has no bubble all processors, which the race detector is not let have with bubbles
// (explore_race_test.go).
func processors(t *testing.T) {
	n := runtime.GOMAXPROCS(runtime.NumCPU())
	t.Cleanup(func() { runtime.GOMAXPROCS(n) })
}

// Readings made while outcomes are recorded only grow, and the last one has everything once.
func TestMarksAreReadMeanwhile(t *testing.T) {
	processors(t)
	r := startedWith(t, slotPolicy())
	s := r.snap.Load()
	m := s.last.marks[1]
	m.follow([][2]int{{200, 200}, {500, 500}})
	const calls, writers = 2000, 4
	var work sync.WaitGroup
	for w := range writers {
		work.Go(func() {
			for i := range calls {
				d := r.Decide(Unit{Key: fmt.Sprint(i % 50)})
				errors, took := Errors.Observe(false), Latency.Observe(time.Duration(i%3)*time.Second)
				switch w {
				case 0:
					d.Record(errors, took)
				case 1:
					d.Record(took, errors)
				case 2:
					d.Record(took)
				default:
					d.Record(errors)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { work.Wait(); close(done) }()
	var seen [2][]uint64
	for c := range seen {
		seen[c] = make([]uint64, evidence.Groups*(m.none+1))
	}
	for last := false; ; {
		for c := range seen {
			next := m.totals(s.last, c, seen[c])
			for k, n := range next {
				if n < seen[c][k] {
					t.Fatalf("cell %d had %d and has %d", k, seen[c][k], n)
				}
			}
			seen[c] = next
		}
		if last {
			break
		}
		select {
		case <-done:
			last = true
		default:
		}
	}
	over := uint64(0)
	for c := range seen {
		for k, n := range seen[c] {
			if k%(m.none+1) != exceedsNone {
				over += n
			}
		}
	}
	want := uint64(3 * (calls - (calls+2)/3))
	if over != want {
		t.Errorf("%d outcomes exceed something, not %d", over, want)
	}
	if n := sum(seen[0]) + sum(seen[1]); n < 3*calls { // what was read ahead of its Errors may be there twice for now
		t.Errorf("%d outcomes of %d", n, 3*calls)
	}
}

// Thresholds come from what the judge has seen of the control, also for the epoch before while it counts.
func TestThresholdsFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := lone(t, slotPolicy(), Options{})
		c := consumed{t: t}
		c.tick(r)
		before := r.snap.Load()
		present := func(s *snapshot) *thresholds { return s.last.marks[1].at.Load() }
		if before.last.marks[0] != nil || present(before) != nil {
			t.Fatal("there are thresholds before there are outcomes")
		}
		candidate, control := r.Decide(keyOf(t, r, Candidate)), r.Decide(keyOf(t, r, Control))
		must(t, r.SetPercent(t.Context(), Everyone, 60, "wider"))
		for range 300 {
			control.Record(Latency.Observe(100*time.Millisecond), Errors.Observe(false))
			candidate.Record(Latency.Observe(100*time.Millisecond), Errors.Observe(false))
		}
		c.tick(r)
		want := evidence.Index(100*time.Millisecond) + 1
		_, up := evidence.Shift(1.2)
		for _, s := range []*snapshot{before, r.snap.Load()} {
			at := present(s)
			if at == nil || at[0][0] != want || at[1][0] != want+up || at[0][1] != evidence.Index(time.Second)+1 || at[1][1] != at[0][1] {
				t.Errorf("epoch %d: %v", s.epoch, at)
			}
		}
		c.blocks = nil
		candidate.Record(Latency.Observe(110 * time.Millisecond)) // within the factor
		candidate.Record(Latency.Observe(300 * time.Millisecond))
		candidate.Record(Latency.Observe(3 * time.Second))
		control.Record(Latency.Observe(110 * time.Millisecond))
		c.tick(r)
		cells := [2][5]uint64{}
		for _, b := range c.blocks {
			if b.Metric == "latency" {
				for i, by := range [][]uint64{b.ControlBy, b.CandidateBy} {
					for k, n := range by {
						cells[i][k%5] += n
					}
				}
			}
		}
		if cells != [2][5]uint64{{0, 1}, {1, 1, 0, 1}} {
			t.Errorf("%v", cells)
		}
	})
}
