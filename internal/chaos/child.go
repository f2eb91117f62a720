// Package chaos holds a Store against processes that are killed and connections that are cut: it is what the tests of the
// adapters have in common, each of which has a server of its own.
package chaos

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/stagedrollout/rollout"
)

// Open opens the store that is reached at an address, in what holds it there: a bucket, or a table.
type Open func(ctx context.Context, addr, where string) (rollout.Store, error)

// childEnv is what a child is told, as JSON.
const childEnv = "ROLLOUT_CHAOS_CHILD"

// config is that.
type config struct {
	Addr, Where string // of the store
	Name        string // of the rollout
	Replica     string
	Interval    time.Duration
	Steps       string // the file that the steps of a rollback write to; "": there are none
	Deaf        bool   // no hint arrives
}

// Main runs a child, and does not return, in a process that is one. It is for TestMain.
func Main(open Open) {
	text := os.Getenv(childEnv)
	if text == "" {
		return
	}
	var c config
	err := json.Unmarshal([]byte(text), &c)
	if err == nil {
		err = child(c, open)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", c.Replica, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// deaf is a store whose hints are all lost.
type deaf struct{ rollout.Store }

func (deaf) Watch(ctx context.Context, _ string, _ func()) error {
	<-ctx.Done()
	return nil
}

// stepNames are the steps of a rollback, in order.
var stepNames = []string{"one", "two", "three"}

// stepTime is how long each takes.
const stepTime = 100 * time.Millisecond

// build is the rollout of a configuration. Its only way is back.
func build(store rollout.Store, c config) (*rollout.Rollout, error) {
	p := rollout.Policy{
		Stages:   []rollout.Stage{{Percent: 50}, {Percent: 100}},
		Bake:     12 * time.Hour,
		Holdback: 10,
		Gates:    []rollout.Gate{rollout.Errors.Within(20)},
		Without:  []string{rollout.GuardNoOutcome, rollout.GuardSplit}, // a child is killed between a decision and its outcome
	}
	if c.Steps != "" {
		for _, name := range stepNames {
			p.Rollback = append(p.Rollback, rollout.RollbackStep{Name: name, Do: func(ctx context.Context, in rollout.Incident) error {
				if err := note(c.Steps, "begin", name, c.Replica, in); err != nil {
					return err
				}
				select {
				case <-time.After(stepTime):
				case <-ctx.Done():
					return ctx.Err()
				}
				return note(c.Steps, "end", name, c.Replica, in)
			}})
		}
	}
	if c.Deaf {
		store = deaf{store}
	}
	return rollout.New(c.Name, p, &rollout.Options{
		Store: store, Replica: c.Replica, Interval: c.Interval, Logger: slog.New(slog.DiscardHandler),
	})
}

// note appends a line to the file of the steps, all at once: the lines of all processes are in the order of what happened.
func note(path, what, step, replica string, in rollout.Incident) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%s %s %s %s %s\n", what, step, replica, in.Key, in.Fence)
	return errors.Join(err, f.Close())
}

// child is a process that runs a rollout and does what the lines of its input say, until there is no more: it ends with
// whoever started it. To each it answers with a line.
func child(c config, open Open) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	store, err := open(ctx, c.Addr, c.Where)
	if err != nil {
		return err
	}
	r, err := build(store, c)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	a := &actor{r: r}
	fmt.Println("up")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		verb, arg, _ := strings.Cut(lines.Text(), " ")
		answer, err := a.act(ctx, verb, arg)
		if err != nil {
			answer = "error " + strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		fmt.Println(answer)
	}
	stop()
	return <-ended
}

// actor does what a child is told.
type actor struct {
	r     *rollout.Rollout
	units int
	off   atomic.Int64 // when the unit that is watched was found to have the stable version, in nanoseconds
}

func unit(i int) rollout.Unit { return rollout.Unit{Key: strconv.Itoa(i)} }

// serving are how many of some units have the candidate.
func (a *actor) serving() (n int) {
	for i := range 40 {
		if a.r.Peek(unit(i)).Enabled() {
			n++
		}
	}
	return n
}

func (a *actor) act(ctx context.Context, verb, arg string) (string, error) {
	switch verb {
	case "record": // so many outcomes, of units that come once
		n, err := strconv.Atoi(arg)
		if err != nil {
			return "", err
		}
		compared := 0
		for range n {
			a.units++
			d := a.r.Decide(unit(a.units))
			if d.Cohort() != rollout.None {
				compared++
			}
			d.Record(rollout.Errors.Observe(false))
		}
		return strconv.Itoa(compared), nil
	case "serving":
		return strconv.Itoa(a.serving()), nil
	case "state":
		return a.r.Status().State.String(), nil
	case "rollback": // answers when that was
		at := time.Now().UnixNano()
		return strconv.FormatInt(at, 10), a.r.Rollback(ctx, arg)
	case "restart":
		return "ok", a.r.Restart(ctx, arg)
	case "watch": // a unit that has the candidate, until it has not
		for i := 0; ; i++ {
			if i == 1000 {
				return "", errors.New("no unit has the candidate")
			}
			if u := unit(i); a.r.Peek(u).Enabled() {
				a.off.Store(0)
				go func() {
					for a.r.Peek(u).Enabled() {
						time.Sleep(200 * time.Microsecond)
					}
					a.off.Store(time.Now().UnixNano())
				}()
				return "ok", nil
			}
		}
	case "off":
		return strconv.FormatInt(a.off.Load(), 10), nil
	}
	return "", fmt.Errorf("what is %q?", verb)
}
