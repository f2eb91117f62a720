package chaos

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/internal/tally"
	"github.com/stagedrollout/rollout/storetest"
)

// patience is for what takes a second at most, on a machine that has much else to do.
const patience = 20 * time.Second

// A Server is where a fleet has its store.
type Server struct {
	Addr string
	Open Open
	New  func(t testing.TB) (where string) // makes a new, empty place for a store
}

// fleet are processes on one store, each behind a proxy of its own.
type fleet struct {
	t       *testing.T
	c       config
	store   rollout.Store // past the proxies
	proxies []*storetest.Proxy
	procs   []*proc
	lives   int
}

// proc is one life of a process.
type proc struct {
	t        *testing.T
	name     string
	cmd      *exec.Cmd
	in       io.WriteCloser
	lines    chan string
	ended    chan struct{}
	recorded int // outcomes of decisions that are compared, which it has said it has recorded
	sent     int // outcomes that it was told to record
}

func newFleet(t *testing.T, s Server, n int, c config) *fleet {
	t.Helper()
	c.Where = s.New(t)
	store, err := s.Open(t.Context(), s.Addr, c.Where)
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{t: t, c: c, store: store}
	for range n {
		f.proxies, f.procs = append(f.proxies, storetest.NewProxy(t, s.Addr)), append(f.procs, nil)
	}
	for i := range n {
		f.start(i)
	}
	t.Cleanup(func() {
		for _, p := range f.procs {
			p.kill()
		}
	})
	return f
}

// start starts a process and waits until it follows the rollout.
func (f *fleet) start(i int) {
	f.t.Helper()
	f.lives++
	c := f.c
	c.Addr, c.Replica = f.proxies[i].Addr(), fmt.Sprintf("p%d.%d", i, f.lives)
	text, err := json.Marshal(c)
	if err != nil {
		f.t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		f.t.Fatal(err)
	}
	p := &proc{t: f.t, name: c.Replica, cmd: exec.Command(exe), lines: make(chan string, 16), ended: make(chan struct{})}
	p.cmd.Env, p.cmd.Stderr = append(os.Environ(), childEnv+"="+string(text)), os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		f.t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		f.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.procs[i] = p
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			p.lines <- s.Text()
		}
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	if got := p.answer(); got != "up" {
		f.t.Fatalf("%s says %q", p.name, got)
	}
}

func (p *proc) kill() {
	if p != nil {
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// stop ends it in good order.
func (p *proc) stop() {
	p.t.Helper()
	_ = p.in.Close()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatalf("%s does not end", p.name)
	}
	if !p.cmd.ProcessState.Success() {
		p.t.Fatalf("%s: %v", p.name, p.cmd.ProcessState)
	}
}

func (p *proc) tell(line string) {
	p.t.Helper()
	if _, err := io.WriteString(p.in, line+"\n"); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
}

func (p *proc) answer() string {
	p.t.Helper()
	select {
	case s := <-p.lines:
		return s
	case <-p.ended:
		p.t.Fatalf("%s has ended: %v", p.name, p.cmd.ProcessState)
	case <-time.After(patience):
		p.t.Fatalf("%s does not answer", p.name)
	}
	return ""
}

func (p *proc) ask(line string) string {
	p.t.Helper()
	p.tell(line)
	return p.answer()
}

func (p *proc) number(line string) int64 {
	p.t.Helper()
	s := p.ask(line)
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		p.t.Fatalf("%s: %s: %s", p.name, line, s)
	}
	return n
}

func (p *proc) record(n int) {
	p.t.Helper()
	p.sent += n
	p.recorded += int(p.number("record " + strconv.Itoa(n)))
}

// until waits for all processes.
func (f *fleet) until(what string, is func(*proc) bool) {
	f.t.Helper()
	for _, p := range f.procs {
		f.wait(what+" in "+p.name, func() bool { return is(p) })
	}
}

func (f *fleet) wait(what string, is func() bool) {
	f.t.Helper()
	for begun := time.Now(); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > patience {
			f.t.Fatalf("not after %v: %s", patience, what)
		}
	}
}

// status is what the store has.
func (f *fleet) status() rollout.Status {
	f.t.Helper()
	r, err := build(f.store, f.c)
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	defer cancel()
	if err := r.Ready(ctx); err != nil {
		f.t.Fatal(err)
	}
	return r.Status()
}

// judged are the outcomes that the gate has seen.
func (f *fleet) judged() int {
	f.t.Helper()
	g := f.status().Gates[0]
	return int(g.Candidate.N + g.Control.N)
}

// published are the outcomes that lie in the store of each process, by its name.
func (f *fleet) published() map[string]int {
	f.t.Helper()
	all, err := f.store.List(f.t.Context(), "rollout/"+f.c.Name+"/ev/")
	if err != nil {
		f.t.Fatal(err)
	}
	found := map[string]int{}
	for key, value := range all {
		d, err := tally.Decode(value)
		if err != nil {
			f.t.Fatalf("%s: %v", key, err)
		}
		name := d.Inc[:strings.LastIndexByte(d.Inc, '-')]
		for _, s := range d.Series {
			if s.Metric == "errors" {
				found[name] += int(s.Counts.Sum(0) + s.Counts.Sum(1))
			}
		}
	}
	return found
}
