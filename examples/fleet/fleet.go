package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/adapters/natskv"
)

// names are those of the processes.
var names = []string{"ann", "bob", "cid", "dot", "eve"}

// fleet is all of the processes, and what they share.
type fleet struct {
	out     io.Writer
	began   time.Time // the chapter
	dir     string
	nats    *server.Server
	prices  *prices
	web     *http.Server // of prices
	at      string       // where
	process map[string]*process
	release map[string]release // that a process was started with last
	balance balancer
}

// process is one life of a process.
type process struct {
	cmd   *exec.Cmd
	input io.Closer
	addr  string
	ended chan struct{}
}

// newFleet starts what the processes share, and none of them.
func newFleet(ctx context.Context, out io.Writer) (f *fleet, err error) {
	f = &fleet{out: out, prices: &prices{}, process: map[string]*process{}, release: map[string]release{}}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	if f.dir, err = os.MkdirTemp("", "fleet"); err != nil {
		return nil, err
	}
	f.nats, err = server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: f.dir, NoSigs: true, NoLog: true})
	if err != nil {
		return nil, err
	}
	f.nats.Start()
	if !f.nats.ReadyForConnections(10 * time.Second) {
		return nil, errors.New("the NATS server does not start")
	}
	nc, err := nats.Connect(f.nats.ClientURL())
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	if _, err := js.CreateKeyValue(ctx, natskv.Bucket(bucket, 1)); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	f.web, f.at = &http.Server{Handler: f.prices, ReadHeaderTimeout: 10 * time.Second}, "http://"+l.Addr().String()
	go func() { _ = f.web.Serve(l) }()
	return f, nil
}

// close ends all of it.
func (f *fleet) close() {
	for name := range f.process {
		f.kill(name)
	}
	if f.web != nil {
		_ = f.web.Close()
	}
	if f.nats != nil {
		f.nats.Shutdown()
		f.nats.WaitForShutdown()
	}
	_ = os.RemoveAll(f.dir)
}

// start starts a process, and returns once requests come to it.
func (f *fleet) start(ctx context.Context, name string, v release) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	text, err := json.Marshal(config{release: v, Name: name, NATS: f.nats.ClientURL(), Prices: f.at})
	if err != nil {
		return err
	}
	p := &process{cmd: exec.Command(program), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), shopEnv+"="+string(text))
	p.cmd.Stderr = os.Stderr
	if p.input, err = p.cmd.StdinPipe(); err != nil { // which ends when this process does, whatever ends it
		return err
	}
	output, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	f.process[name], f.release[name] = p, v
	line := make(chan string, 1)
	go func() {
		s, _ := bufio.NewReader(output).ReadString('\n')
		line <- s
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	select {
	case s := <-line:
		if p.addr = strings.TrimSpace(s); p.addr == "" {
			return fmt.Errorf("%s does not start", name)
		}
	case <-ctx.Done():
		return fmt.Errorf("%s does not start: %w", name, context.Cause(ctx))
	}
	f.balance.add(p.addr)
	return nil
}

// stop ends a process in good order: requests go elsewhere before it does.
func (f *fleet) stop(ctx context.Context, name string) error {
	p := f.process[name]
	f.balance.remove(p.addr)
	_ = p.input.Close()
	select {
	case <-p.ended:
	case <-ctx.Done():
		return fmt.Errorf("%s does not end: %w", name, context.Cause(ctx))
	}
	delete(f.process, name)
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("%s: %v", name, p.cmd.ProcessState)
	}
	return nil
}

// kill ends a process as a crash would. Requests go on coming to it until then.
func (f *fleet) kill(name string) {
	p := f.process[name]
	_ = p.cmd.Process.Kill()
	<-p.ended
	f.balance.remove(p.addr)
	delete(f.process, name)
}

// status is what a process knows of the rollout.
func (f *fleet) status(ctx context.Context, name string) (s rollout.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+f.process[name].addr+"/status", http.NoBody)
	if err != nil {
		return s, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return s, err
	}
	defer res.Body.Close()
	return s, json.NewDecoder(res.Body).Decode(&s)
}

// until waits until every process says that what is asked is so.
func (f *fleet) until(ctx context.Context, what string, is func(rollout.Status) bool) error {
	for {
		var last rollout.Status
		all := true
		for _, name := range names {
			s, err := f.status(ctx, name)
			switch {
			case err != nil && ctx.Err() == nil:
				return fmt.Errorf("%s: %w", name, err)
			case err != nil || !is(s):
				all, last = false, s
			}
			switch s.State {
			case rollout.Pending, rollout.Running, rollout.RollingBack:
				continue
			}
			if !is(s) { // and never will be
				return fmt.Errorf("waited until %s: %s is %v: %s", what, s.Name, s.State, s.Note)
			}
		}
		if all {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("waited until %s: %s is %v at %q: %w", what, last.Name, last.State, last.Stage.Name, err)
		}
	}
}

func (f *fleet) printf(format string, args ...any) { fmt.Fprintf(f.out, format, args...) }

// chapter begins a part of the story.
func (f *fleet) chapter(format string, args ...any) {
	f.printf("\n"+format+"\n", args...)
	f.began = time.Now()
}

// note prints what has happened, and when.
func (f *fleet) note(format string, args ...any) {
	f.printf("  %4.1f s  %s\n", time.Since(f.began).Seconds(), fmt.Sprintf(format, args...))
}

// table prints who has served what.
func (f *fleet) table(seen served) {
	for _, name := range names {
		f.printf("    %s  %4d requests with v1, %4d with v2, %4d with v3\n", name, seen[from{name, "v1"}], seen[from{name, "v2"}], seen[from{name, "v3"}])
	}
}

// prices are what every version reads, and what a new version has changed: a database, say.
type prices struct {
	mu    sync.Mutex
	fence string
	by    []string // who has restored them
}

// ServeHTTP restores the prices, unless who asks has been replaced meanwhile.
func (p *prices) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fence := r.FormValue("fence")
	if fence < p.fence {
		http.Error(w, "another process restores the prices", http.StatusConflict)
		return
	}
	p.fence = fence
	p.by = append(p.by, r.FormValue("by"))
}

func (p *prices) restored() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.by...)
}
