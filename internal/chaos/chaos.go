package chaos

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
)

// Flags are those of the tests, for the package that has them.
type Flags struct {
	seeds, first, rounds *int
}

// NewFlags registers them.
func NewFlags() Flags {
	return Flags{
		flag.Int("chaos.seeds", 2, "seeds of TestChaos"),
		flag.Int("chaos.first", 1, "the first of them; each fifth kills who runs a step, which takes 15 s longer"),
		flag.Int("latency.rounds", 30, "rollbacks of TestLatency"),
	}
}

// TestChaos: processes share a rollout while some are killed and their connections cut. What was published is judged, once;
// what is rolled back in one of them is in all, and stays so; and the steps of the rollback run in order.
func (fl Flags) TestChaos(t *testing.T, s Server) {
	for seed := *fl.first; seed < *fl.first+*fl.seeds; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(uint64(seed), 0))
			steps := filepath.Join(t.TempDir(), "steps")
			if err := os.WriteFile(steps, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			f := newFleet(t, s, 5, config{Name: fmt.Sprint("chaos-", seed), Interval: 200 * time.Millisecond, Steps: steps})
			f.until("the candidate is served", func(p *proc) bool { return p.number("serving") > 0 })
			f.evidence(rnd)
			f.back(rnd, seed%5 == 0)
		})
	}
}

// trouble makes one process's connections fail, or not.
func (f *fleet) trouble(rnd *rand.Rand) {
	x := f.proxies[rnd.IntN(len(f.proxies))]
	switch rnd.IntN(8) {
	case 0:
		x.Cut()
	case 1:
		x.Refuse(true)
		x.Cut()
	case 2:
		x.Refuse(false)
	}
}

func (f *fleet) calm() {
	for _, x := range f.proxies {
		x.Refuse(false)
	}
}

// evidence is recorded in all processes while they are in trouble, and then judged.
func (f *fleet) evidence(rnd *rand.Rand) {
	t := f.t
	t.Helper()
	least, most, kills := 0, 0, 0 // of those that are dead
	for end := time.Now().Add(2500 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond) {
		f.trouble(rnd)
		i := rnd.IntN(len(f.procs))
		p := f.procs[i]
		if rnd.IntN(25) > 0 {
			p.record(1 + rnd.IntN(40))
			continue
		}
		if rnd.IntN(2) == 0 { // in the middle of it
			p.sent += 500
			p.tell("record 500")
			time.Sleep(time.Duration(rnd.IntN(1500)) * time.Microsecond)
		}
		p.kill()
		kills++
		least, most = least+f.published()[p.name], most+p.sent
		f.proxies[i].Refuse(false)
		f.start(i)
	}
	f.calm()
	f.until("the rollout is known", func(p *proc) bool { return p.number("serving") > 0 })
	judged, alive := 0, 0
	f.wait("all that was published is judged", func() bool {
		f.procs[rnd.IntN(len(f.procs))].record(40) // some of each cohort, for without them no block closes
		f.wait("all is published", func() bool {
			found := f.published()
			return !slices.ContainsFunc(f.procs, func(p *proc) bool { return found[p.name] != p.recorded })
		})
		for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			alive = 0
			for _, p := range f.procs {
				alive += p.recorded
			}
			if judged = f.judged(); judged >= least+alive {
				return true
			}
		}
		return false
	})
	time.Sleep(2 * f.c.Interval) // nothing is judged twice
	judged, least = f.judged(), least+alive
	for _, p := range f.procs {
		most += p.sent
	}
	t.Logf("%d kills: %d outcomes published at least, %d judged, %d recorded at most", kills, least, judged, most)
	if judged < least || judged > most {
		t.Errorf("%d outcomes are judged, of %d that were published and %d that were recorded", judged, least, most)
	}
	if s := f.status(); s.Generation != 1 || s.State != rollout.Running {
		t.Errorf("it is %v in generation %d", s.State, s.Generation)
	}
}

// back is the rollback, in the middle of trouble. With violence, who runs a step is killed.
func (f *fleet) back(rnd *rand.Rand, violence bool) {
	t := f.t
	t.Helper()
	f.until("the candidate is served", func(p *proc) bool { return p.number("serving") > 0 })
	begun := time.Now()
	if s := f.procs[rnd.IntN(len(f.procs))].ask("rollback chaos"); strings.HasPrefix(s, "error") {
		t.Fatal(s)
	}
	f.until("the candidate is served no more", func(p *proc) bool { return p.number("serving") == 0 })
	took := time.Since(begun)
	if took > 5*time.Second {
		t.Errorf("the candidate was served for %v after the rollback", took)
	}
	runner, killed := "", 0
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond) {
		f.trouble(rnd)
		i := rnd.IntN(len(f.procs))
		if lines := f.steps(); len(lines) > 0 {
			runner = lines[len(lines)-1].replica
			if violence && killed == 0 && lines[len(lines)-1].what == "begin" {
				i = slices.IndexFunc(f.procs, func(p *proc) bool { return p.name == runner })
			}
		}
		p := f.procs[i]
		if n := p.number("serving"); n > 0 {
			t.Fatalf("%s serves the candidate again", p.name)
		}
		switch {
		case p.name == runner && (!violence || killed > 0), p.name != runner && (rnd.IntN(25) > 0 || runner == ""):
			continue // nobody runs the steps yet, or they are spared
		case p.name == runner:
			killed++
		}
		p.kill()
		f.proxies[i].Refuse(false)
		f.start(i)
		if n := f.procs[i].number("serving"); n > 0 {
			t.Fatalf("%s, started after the rollback, serves the candidate", f.procs[i].name)
		}
	}
	f.calm()
	defer func() {
		if t.Failed() {
			s := f.status()
			t.Logf("%v; steps %+v; %+v", s.State, s.Steps, f.steps())
		}
	}()
	f.until("it is rolled back", func(p *proc) bool { return p.ask("state") == rollout.RolledBack.String() })
	t.Logf("served no more after %v; rolled back in all after %v; %d runners of steps were killed", took.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond), killed)
	for _, p := range f.procs {
		if n := p.number("serving"); n > 0 {
			t.Errorf("%s serves the candidate again", p.name)
		}
		p.stop()
	}
	s := f.status()
	if s.State != rollout.RolledBack || len(s.Steps) != len(stepNames) {
		t.Errorf("in the end it is %v, with steps %+v", s.State, s.Steps)
	}
	f.checkSteps(killed)
}

// stepLine is one line of the file of the steps.
type stepLine struct{ what, step, replica, key, fence string }

func (f *fleet) steps() (lines []stepLine) {
	f.t.Helper()
	text, err := os.ReadFile(f.c.Steps)
	if err != nil {
		f.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var l stepLine
		if _, err := fmt.Sscan(line, &l.what, &l.step, &l.replica, &l.key, &l.fence); err != nil {
			f.t.Fatalf("%q: %v", line, err)
		}
		lines = append(lines, l)
	}
	return lines
}

// checkSteps holds the steps to their order, one at a time, to one key each, and to fences that grow where another process
// takes over. Each runs once, and once more for a runner that was killed.
func (f *fleet) checkSteps(killed int) {
	t := f.t
	t.Helper()
	lines := f.steps()
	next, fence, runner, begun := 0, "", "", 0
	for _, l := range lines {
		switch {
		case next == len(stepNames) || l.step != stepNames[next]:
			t.Errorf("step %s out of order: %+v", l.step, lines)
			return
		case l.key != fmt.Sprintf("%s/1/%s", f.c.Name, l.step):
			t.Errorf("the key of step %s is %s", l.step, l.key)
		case l.fence < fence, l.replica != runner && l.fence == fence:
			t.Errorf("%s has fence %s after %s had %s", l.replica, l.fence, runner, fence)
		}
		fence, runner = l.fence, l.replica
		if l.what == "begin" {
			begun++
		} else {
			next++
		}
	}
	if next != len(stepNames) || begun < next || begun > next+killed {
		t.Errorf("%d steps of %d are done, in %d attempts, with %d killed: %+v", next, len(stepNames), begun, killed, lines)
	}
}
