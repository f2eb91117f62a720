package rollout

import (
	"context"
	"fmt"
	"slices"
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

// tick makes one tick of r and takes the blocks that it consumed. lost: no state can be loaded.
func (c *consumed) tick(r *Rollout, lost bool) {
	c.t.Helper()
	ctx := c.t.Context()
	r.turnSlot(time.Now())
	if d := r.clock.doubt; d != nil && !lost {
		l, err := r.latest(ctx)
		if err != nil {
			c.t.Fatal(err)
		}
		if r.settle(ctx, &r.clock, l); r.clock.doubt != nil {
			return
		}
		c.take(d.cut.blocks) // nobody else writes here
	}
	r.mu.Lock()
	st := r.known
	r.mu.Unlock()
	var k *cut
	if st != nil {
		k = r.cutFor(st, false)
	}
	r.tick(ctx, &r.clock, false)
	if !lost && k != nil && r.clock.doubt == nil {
		c.take(k.blocks)
	}
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
		c.tick(r, false)
		candidate, control := keyOf(t, r, Candidate), keyOf(t, r, Control)
		var slow []Decision
		for range 20 {
			r.Decide(candidate)
			slow = append(slow, r.Decide(control))
		}
		r.Peek(candidate)
		time.Sleep(5 * time.Second) // the slot ends
		c.tick(r, false)
		for _, d := range slow[:15] {
			d.Record(Errors.Observe(false))
		}
		time.Sleep(4 * time.Second)
		c.tick(r, false)
		if n, _ := c.of(GuardNoOutcome); n != 0 {
			t.Fatal("a block before outcomes had their time")
		}
		time.Sleep(time.Second)
		c.tick(r, false)
		n, cells := c.of(GuardNoOutcome)
		if n != 1 || cells[1][0] != 0 || cells[1][1] != 20 || cells[0][0] != 15 || cells[0][1] != 5 {
			t.Fatalf("%d blocks, %v", n, cells)
		}
		for range 3 {
			time.Sleep(5 * time.Second)
			c.tick(r, false)
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
			c.tick(r, false)
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
			c.tick(r, false)
			time.Sleep(5 * time.Second)
			c.tick(r, false)
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
		c.tick(r, false)
		candidate, control := keyOf(t, r, Candidate), keyOf(t, r, Control)
		late := []Decision{r.Decide(candidate), r.Decide(candidate), r.Decide(candidate), r.Decide(control)}
		late[3].Record(Errors.Observe(false))
		for range slots {
			time.Sleep(5 * time.Second)
			c.tick(r, false)
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
			c.tick(r, false)
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
			c.tick(r, false)
			n, lost, decided, away := 0, false, [2]uint64{}, 0
			tick := func() { c.tick(r, lost) }
			for _, op := range ops {
				if away > 8 { // what is away for longer than slots last loses some of them
					away, lost = 0, false
					f.set(nil, nil, nil)
					tick()
				}
				switch op {
				case 0:
					f.set(down, nil, nil)
					lost = true
				case 1:
					f.set(nil, down, nil)
					lost = false
				case 2:
					f.set(nil, nil, func() error { return errDown })
					lost = false
				case 3:
					f.set(nil, nil, nil)
					lost, away = false, 0
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
			lost = false
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
		c.tick(r, false)
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
			c.tick(r, false)
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
		c.tick(r, false)
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
			c.tick(r, false)
			for range 5 {
				for i := range 30 {
					r.Decide(Unit{Key: fmt.Sprint(i)}).Record(Errors.Observe(false))
				}
				time.Sleep(5 * time.Second)
				c.tick(r, false)
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

// Thresholds come from what the judge has seen of the control, also for the epoch before while it counts.
func TestThresholdsFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := lone(t, slotPolicy(), Options{})
		c := consumed{t: t}
		c.tick(r, false)
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
		c.tick(r, false)
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
		c.tick(r, false)
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
