package rollout

import (
	"context"
	"flag"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

var (
	exploreFlag  = flag.Int("explore.depth", 0, "actions of an explored schedule; 0: fewer than in CI, where it is 8")
	exploreAll   = flag.Bool("explore.all", false, "the ends of all explored schedules are judged, not only of some of the longest")
	exploreDepth = 5
)

const versions = 2

// explored is the policy that is explored: stages that bake for two ticks with outcomes, an inner ring, an approval, and
// steps of which one may fail once and the other never.
func explored(d *driver, version int) Policy {
	names := []string{"one", "two"}
	return Policy{
		Version: versionName(version), Rings: []Ring{{Name: "staff"}},
		Stages: []Stage{{Ring: "staff", Percent: 50}, {Percent: 25}, {Percent: 100, Approval: true}},
		Bake:   time.Minute, Holdback: 25, Independent: true, Without: []string{GuardNoOutcome, GuardSplit},
		Gates:    []Gate{ownMetrics[0].AtMost(50)},
		Rollback: []RollbackStep{d.step(names, 0, 2), d.step(names, 1, 1)},
	}
}

// action is one of an explored schedule.
type action struct {
	name string
	do   func(*driver, *proc)
	can  func(*driver, *machine.State) bool // it may do something in the stored state; nil: always
}

// fails is an action that has the next write fail.
func fails(name string, f fault) action {
	return action{name, func(d *driver, _ *proc) { d.store.next = f }, heard}
}

// heard: no failure waits for the next write. What uses no store may as well come before it.
func heard(d *driver, _ *machine.State) bool { return d.store.next == 0 }

func rolling(d *driver, st *machine.State) bool { return st != nil && st.Phase == machine.RollingBack }

var actions = []action{
	{name: "good outcomes", do: func(_ *driver, p *proc) { p.serve(24, 0); p.evaluate(time.Minute) }},
	{name: "silence", do: func(_ *driver, p *proc) { p.evaluate(time.Minute) }},
	{name: "advance", do: func(_ *driver, p *proc) { _ = p.lift() }},
	{name: "rollback", do: func(_ *driver, p *proc) { p.mustRollBack() }},
	{name: "rollback of staff", do: func(_ *driver, p *proc) { _ = p.RollbackRing(context.Background(), "staff", "stop") }},
	{name: "hold", do: func(_ *driver, p *proc) { _ = p.Hold(context.Background(), "wait") }},
	{name: "resume", do: func(_ *driver, p *proc) { _ = p.Resume(context.Background(), "on") }},
	{name: "restart", do: func(_ *driver, p *proc) { _ = p.startAnew() }},
	{name: "step", do: func(_ *driver, p *proc) { p.steps(true) }, can: rolling},
	{
		name: "step, whose end fails",
		do:   func(d *driver, p *proc) { d.store.skip = 1; p.steps(true); d.store.skip = 0 },
		can:  func(d *driver, st *machine.State) bool { return rolling(d, st) && d.store.next != 0 },
	},
	{
		name: "next step fails",
		do:   func(d *driver, _ *proc) { d.failing = 1 },
		can:  func(d *driver, st *machine.State) bool { return rolling(d, st) && d.failing == 0 && heard(d, st) },
	},
	fails("next write is lost", dropped),
	fails("next answer is lost", landed),
	fails("another holds first", outheld),
	fails("another rolls back first", outrolled),
	{name: "crash", do: func(d *driver, p *proc) { d.begin(0, p.version) }, can: heard},
	{
		name: "new version",
		do:   func(d *driver, p *proc) { d.begin(0, p.version+1) },
		can:  func(d *driver, st *machine.State) bool { return d.procs[0].version+1 < versions && heard(d, st) },
	},
}

func (d *driver) act(a int) {
	actions[a].do(d, d.procs[0])
	d.store.blind = 0
	d.procs[0].note()
}

// place is a state that was reached, and how.
type place struct {
	acts     []int
	canon    string
	document string
}

func (p place) String() string {
	var names []string
	for _, a := range p.acts {
		names = append(names, actions[a].name)
	}
	return strings.Join(names, ", ")
}

// inBubbles calls f for 0 to n-1, in several bubbles.
func inBubbles(t *testing.T, n int, f func(t *testing.T, i int)) {
	var next atomic.Int64
	t.Run("", func(t *testing.T) {
		for range runtime.GOMAXPROCS(0) {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					for i := int(next.Add(1)) - 1; i < n && !t.Failed(); i = int(next.Add(1)) - 1 {
						f(t, i)
					}
				})
			})
		}
	})
	if t.Failed() {
		t.FailNow()
	}
}

// reach goes to a place again.
func (at place) reach() *driver {
	d := newDriver(1, explored)
	for _, a := range at.acts {
		d.act(a)
	}
	d.judging, d.stored = true, d.load()
	return d
}

// again is reach, and judges whether it is the same to the bit.
func (at place) again(t *testing.T) *driver {
	d := at.reach()
	at.judge(t, d)
	if c, doc := d.canon(d.load()), d.document(); c != at.canon || doc != at.document {
		t.Fatalf("%v: another state than the first time:\n%s\n%s\n\n%s\n%s", at, at.canon, at.document, c, doc)
	}
	return d
}

func (at place) judge(t *testing.T, d *driver) {
	if len(d.wrong) > 0 {
		t.Fatalf("%v:\n%s", at, strings.Join(d.wrong, "\n"))
	}
}

// TestExplored goes to every state that so many actions can lead to, and judges in each the laws of what must never be. The
// laws of what must come to be (replay, accounts, the end of a rollback and of a rollout) are judged in each as well, but for
// the last two actions only in some.
func TestExplored(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // all of it is garbage soon
	depth := exploreDepth
	if *exploreFlag > 0 {
		depth = *exploreFlag
	}
	var first place
	inBubbles(t, 1, func(t *testing.T, _ int) {
		d := newDriver(1, explored)
		first.canon, first.document = d.canon(d.load()), d.document()
	})
	seen := map[string]bool{first.canon: true}
	level := []place{first}
	began := time.Now()
	for n := 0; ; n++ {
		judged := level
		if every := map[int]int{depth: 8, depth - 1: 2}[n]; every > 0 && !*exploreAll { // each has been come by in states that are judged
			judged = nil
			for i := 0; i < len(level); i += every {
				judged = append(judged, level[i])
			}
		}
		inBubbles(t, len(judged), func(t *testing.T, i int) {
			at := judged[i]
			d := at.again(t)
			d.accounts()
			at.judge(t, d)
			d.reachesRolledBack()
			at.judge(t, d)
			d = at.again(t)
			d.reachesCompleted(d.procs[0])
			at.judge(t, d)
		})
		t.Logf("after %d actions: %d states, of %d in all, %v", n, len(level), len(seen), time.Since(began).Round(time.Second/10))
		if least := map[int]int{4: 800, 6: 5000, 8: 20_000}[n]; len(seen) < least {
			t.Errorf("%d actions lead to %d states; that was %d at least", n, len(seen), least)
		}
		if n == depth {
			break
		}
		found := make([][]place, len(level))
		inBubbles(t, len(level), func(t *testing.T, i int) {
			var d *driver
			var now time.Time
			var lives int
			for a := range actions {
				if d == nil {
					d = level[i].reach()
					now, lives = d.now, d.lives
				}
				if can := actions[a].can; can != nil && !can(d, d.stored) {
					continue
				}
				d.act(a)
				d.check()
				to := place{append(slices.Clone(level[i].acts), a), d.canon(d.load()), ""}
				to.judge(t, d)
				if to.canon == level[i].canon && d.now.Equal(now) && d.lives == lives && d.document() == level[i].document {
					continue // nothing has happened
				}
				if to.canon != level[i].canon && !seen[to.canon] {
					to.document = d.document()
					found[i] = append(found[i], to)
				}
				d = nil
			}
		})
		level = nil
		for _, places := range found {
			for _, p := range places {
				if !seen[p.canon] {
					seen[p.canon] = true
					level = append(level, p)
				}
			}
		}
	}
}
