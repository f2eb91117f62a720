// Queue is a worker without HTTP. It reconciles payments from a queue, and a new way to do so goes out merchant by
// merchant. In the middle of that the worker is restarted, and the rollout goes on where it was, because its state is
// kept in a directory.
//
//	go run ./examples/queue
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/stagedrollout/rollout"
)

// payment is one job.
type payment struct {
	merchant string
	cents    int
}

// unmatched is a metric of this program: how often a payment has no booking that it belongs to. Errors and latency are
// recorded anyway.
var unmatched = rollout.NewRate("unmatched")

var policy = rollout.Policy{
	Stages:   []rollout.Stage{rollout.Canary(5), {Percent: 25}, {Percent: 50}, {Percent: 100}},
	Bake:     time.Second, // a real one would take minutes or hours
	Holdback: 10,
	Gates:    []rollout.Gate{rollout.Errors.Within(2), unmatched.Within(2)},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "queue:", err)
		os.Exit(1)
	}
}

// run is two lives of the worker with one directory. It returns an error unless the second goes on where the first ended
// and completes the rollout.
func run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "queue-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	fmt.Println("The worker starts")
	_, left, err := work(ctx, dir, func(e rollout.Event) bool { return e.Stage == "everyone 50 %" })
	if err != nil {
		return err
	}
	fmt.Println("The worker starts again")
	found, end, err := work(ctx, dir, func(e rollout.Event) bool { return e.To == rollout.Completed })
	if err != nil {
		return err
	}
	if found.Stage.Name != left.Stage.Name || found.Generation != left.Generation {
		return fmt.Errorf("it was left in the stage %q and found in %q", left.Stage.Name, found.Stage.Name)
	}
	if end.State != rollout.Completed {
		return fmt.Errorf("it is %v, it should be completed", end.State)
	}
	return nil
}

var errDone = errors.New("done")

// work is one life of the worker: until an event that it is to stop at, or one after which nothing goes on by itself. It
// returns how it found the rollout and how it left it.
func work(ctx context.Context, dir string, last func(rollout.Event) bool) (found, left rollout.Status, err error) {
	store, err := rollout.DirStore(dir)
	if err != nil {
		return found, left, err
	}
	r, err := rollout.New("reconciliation-v2", policy, &rollout.Options{
		Store:    store,
		Interval: 100 * time.Millisecond,        // between two looks at the gates; the default is 5 s
		Logger:   slog.New(slog.DiscardHandler), // or each event would be logged between the lines printed here
	})
	if err != nil {
		return found, left, err
	}
	if err := r.Ready(ctx); err != nil { // so that already the first decision follows the stored state
		return found, left, err
	}
	found = r.Status()
	fmt.Printf("  found %v %s\n", found.State, found.Stage.Name)

	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	r.Subscribe(func(e rollout.Event) {
		fmt.Printf("  %v %s\n", e.Kind, e.Stage)
		if last(e) || e.To == rollout.Held || e.To == rollout.RolledBack {
			stop(errDone)
		}
	})
	queue := make(chan payment, 100)
	var workers sync.WaitGroup
	workers.Go(func() { fill(ctx, queue) })
	for range 8 {
		workers.Go(func() { drain(ctx, r, queue) })
	}
	err = r.Run(ctx) // until ctx ends; then the last evidence is stored
	workers.Wait()
	if err == nil && context.Cause(ctx) != errDone {
		err = context.Cause(ctx)
	}
	left = r.Status()
	fmt.Printf("  left %v %s: %d payments the new way, %d the old way\n",
		left.State, left.Stage.Name, left.Rings[0].Candidate, left.Rings[0].Control)
	return found, left, err
}

// fill puts payments into the queue until ctx ends.
func fill(ctx context.Context, queue chan<- payment) {
	defer close(queue)
	for {
		p := payment{merchant: fmt.Sprint("merchant-", rand.IntN(2000)), cents: 100 + rand.IntN(10_000)}
		select {
		case queue <- p:
		case <-ctx.Done():
			return
		}
	}
}

// drain does what is in the queue, all payments of a merchant the same way.
func drain(ctx context.Context, r *rollout.Rollout, queue <-chan payment) {
	for p := range queue {
		err := r.Do(ctx, rollout.Unit{Key: p.merchant},
			func(ctx context.Context) error { return reconcileByReference(ctx, p) }, // the new way first, everywhere
			func(ctx context.Context) error { return reconcileByAmount(ctx, p) })
		_ = err // it is recorded; a real worker would put the payment back
	}
}

var errBank = errors.New("the bank does not answer")

func reconcileByAmount(ctx context.Context, p payment) error { return reconcile(ctx, p) }

func reconcileByReference(ctx context.Context, p payment) error { return reconcile(ctx, p) }

// reconcile pretends. Both ways are equally good here, so the rollout completes.
func reconcile(ctx context.Context, _ payment) error {
	time.Sleep(2 * time.Millisecond)
	if rand.IntN(100) == 0 {
		return errBank
	}
	rollout.Record(ctx, unmatched.Observe(rand.IntN(50) == 0)) // for the rollout whose Do this is
	return nil
}
