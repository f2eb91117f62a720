package rollout

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// scheduled is the policy of random schedules: bad candidates are rolled back by a gate, effects are undone and sessions
// cut.
func scheduled(d *driver, version int) Policy {
	names := []string{"one", "two"}
	return Policy{
		Version: versionName(version), Rings: []Ring{{Name: "staff"}},
		Stages: []Stage{{Ring: "staff", Percent: 50}, {Percent: 25}, {Percent: 100, Approval: true}},
		Bake:   time.Minute, Holdback: 25, Independent: true, Without: []string{GuardNoOutcome, GuardSplit},
		Gates:    []Gate{ownMetrics[0].AtMost(50), ownMetrics[1].AtMost(50), Errors.AtMost(30)},
		Rollback: []RollbackStep{d.step(names, 0, 2), d.step(names, 1, 2)},
		Undo:     map[string]func(context.Context, Effect) error{"row": d.undo},
	}
}

// verbs are what may also come in the middle of another action, of either process.
var verbs = map[string]func(*proc){
	"advance":           func(p *proc) { _ = p.lift() },
	"rollback":          func(p *proc) { _ = p.rollBack() },
	"rollback of staff": func(p *proc) { _ = p.RollbackRing(context.Background(), "staff", "stop") },
	"hold":              func(p *proc) { _ = p.Hold(context.Background(), "wait") },
	"resume":            func(p *proc) { _ = p.Resume(context.Background(), "on") },
	"restart":           func(p *proc) { _ = p.startAnew() },
	"approval":          func(p *proc) { _ = p.Approve(context.Background(), "everyone 100 %", "yes") },
	"begin":             func(p *proc) { p.session(false) },
	"end":               func(p *proc) { p.session(true) },
	"effect":            func(p *proc) { p.serve(6, 0); p.effect() },
	"late effect":       func(p *proc) { p.effect() },
}

// effect has the oldest request under way come to its effect.
func (p *proc) effect() {
	if len(p.waiting) > 0 {
		dec := p.waiting[0]
		p.waiting = p.waiting[1:]
		p.journal(dec)
	}
}

// often has the names of verbs, those that matter most several times.
var often = []string{
	"advance", "advance", "rollback", "rollback", "rollback of staff", "hold", "resume", "resume", "restart", "restart", "approval",
	"begin", "end", "effect", "effect", "effect", "late effect", "late effect",
}

// TestSchedules draws long schedules of two processes on a store that loses answers, makes writes late or never, and lets
// others in between, and judges the laws after each action.
func TestSchedules(t *testing.T) {
	if seed := flag.Lookup("rapid.seed"); seed.Value.String() == "0" { // the same schedules each time, unless others are asked for
		must(t, seed.Value.Set("1"))
		defer func() { must(t, seed.Value.Set("0")) }()
	}
	rapid.Check(t, func(t *rapid.T) {
		rapid.SyncTest(t, func(t *rapid.T) {
			d := newDriver(2, scheduled)
			d.judging = true
			var done []string
			judge := func() {
				if len(d.wrong) > 0 {
					t.Fatalf("%s:\n%s", strings.Join(done, ", "), strings.Join(d.wrong, "\n"))
				}
			}
			for range 100 {
				done = append(done, d.draw(t))
				for _, p := range d.procs {
					p.note()
				}
				d.check()
				judge()
			}
			done = append(done, "the end")
			d.accounts()
			judge()
			d.reachesRolledBack()
			d.check()
			judge()
		})
	})
}

// draw makes an action that chance chooses, and returns what it was.
func (d *driver) draw(t *rapid.T) (what string) {
	kind := rapid.SampledFrom([]string{
		"good", "good", "good", "bad", "silence", "verb", "verb", "verb", "verb", "verb", "steps", "steps", "steps", "failing",
		"fault", "fault", "evidence", "between", "between", "lands", "crash", "version", "hint", "hint",
	}).Draw(t, "action")
	p := d.procs[rapid.IntRange(0, 1).Draw(t, "process")]
	say := func(format string, args ...any) { what = fmt.Sprintf("p%d: ", p.id) + fmt.Sprintf(format, args...) }
	switch kind {
	case "good":
		say("good outcomes")
		p.serve(24, 0)
		p.evaluate(time.Minute)
	case "bad":
		say("bad outcomes")
		p.serve(24, 90)
		p.evaluate(time.Minute)
	case "silence":
		passed := rapid.SampledFrom([]time.Duration{time.Second, time.Minute, 10 * time.Minute}).Draw(t, "time")
		say("silence for %v", passed)
		p.evaluate(passed)
	case "verb":
		verb := rapid.SampledFrom(often).Draw(t, "verb")
		say("%s", verb)
		verbs[verb](p)
	case "steps":
		one := rapid.Bool().Draw(t, "one")
		say("steps, one: %v", one)
		p.steps(one)
	case "failing":
		d.failing = rapid.IntRange(1, 3).Draw(t, "attempts")
		say("%d attempts will fail", d.failing)
	case "fault":
		d.store.next = rapid.SampledFrom([]fault{dropped, landed, unheard, delayed, delayed, outheld, outrolled}).Draw(t, "fault")
		d.store.skip = rapid.IntRange(0, 3).Draw(t, "writes before")
		say("fault %d after %d writes", d.store.next, d.store.skip)
	case "evidence":
		d.store.other = rapid.SampledFrom([]fault{dropped, landed, unheard, delayed}).Draw(t, "fault")
		say("evidence fault %d", d.store.other)
	case "between":
		verb := rapid.SampledFrom(often).Draw(t, "verb")
		calls := rapid.IntRange(0, 4).Draw(t, "calls before")
		say("%s comes after %d calls", verb, calls)
		d.store.between(calls, func() {
			if d.procs[p.id] == p {
				verbs[verb](p)
			}
		})
	case "lands":
		land := rapid.Bool().Draw(t, "lands")
		say("late writes land: %v", land)
		d.store.settle(land)
	case "crash", "version":
		land := rapid.Bool().Draw(t, "lands")
		d.store.settle(land)
		version := p.version
		if kind == "version" {
			version = rapid.IntRange(0, 2).Draw(t, "version")
		}
		say("it crashes and goes on as version %d; late writes land: %v", version, land)
		d.begin(p.id, version)
	case "hint":
		say("hint")
		p.refresh(context.Background())
	}
	return what
}
