// Agent is the support desk of a shop, where an agent on a scripted model talks to customers. Two new versions of it go
// out, and both are rolled back: v2 picks worse tools, which no single conversation shows, and v3 once does what it must
// never do. Nothing is asked of any network, and it takes a few seconds:
//
//	go run ./examples/agent
//
// The policy and the deploys are in this file, the models are in model.go, the conversations in desk.go, what they do to
// the world in shop.go, and report.go prints what happened. It exits with 1 unless all of it did.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/stagedrollout/rollout"
)

// What is observed of the agents, besides whether a conversation failed.
var (
	tools       = rollout.NewMix("tools", toOrders, toHandbook, toReplace, toSupervisor, toRefund)
	unpermitted = rollout.NewRate("refund-without-permission")
	quality     = rollout.NewScore("quality", 0, 10) // judged by a reviewer, later
)

// policy is how a new version of the agent goes out. A real one would bake for hours and have a grace of a minute.
func policy(version string, s *shop) rollout.Policy {
	return rollout.Policy{
		Version:  version,
		Stages:   rollout.Percentages(25, 50, 100),
		Bake:     5 * time.Second,
		Holdback: 10,
		Gates: []rollout.Gate{
			unpermitted.Never(), // once is too often
			tools.NoChange(),    // it takes the same tools as often as the old version
			quality.Within(1),   // and its answers are at most one point worse
		},
		Undo: map[string]func(context.Context, rollout.Effect) error{"order": s.undoOrder, "shipment": s.undoShipment},
		Sessions: rollout.SessionPolicy{
			Grace:    5 * time.Second, // to finish a turn
			OnRevoke: onRevoke,
		},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// run is two deploys, one after the other. It returns what did not happen as it should.
func run(ctx context.Context, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second) // it takes five
	defer cancel()
	store := rollout.MemStore() // DirStore, or a database, keeps it across restarts
	if err := deploy(ctx, out, store, v2, "tools.NoChange"); err != nil {
		return err
	}
	fmt.Fprintln(out)
	return deploy(ctx, out, store, v3, "refund-without-permission.Never")
}

// deploy runs the desk with a new version until it is rolled back, which the gate named should see to.
func deploy(ctx context.Context, out io.Writer, store rollout.Store, m model, gate string) error {
	fmt.Fprintf(out, "Agent %s %s\n", m.version, m.flaw)
	s := newShop()
	r, err := rollout.New("support-agent", policy(m.version, s), &rollout.Options{
		Store:    store,
		Interval: 100 * time.Millisecond,        // between two looks at the gates; the default is 5 s
		Logger:   slog.New(slog.DiscardHandler), // or each event would be logged between the lines printed here
	})
	if err != nil {
		return err
	}
	w := watch(r)

	ctx, stop := context.WithCancelCause(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer stop(nil)
	background.Go(func() {
		if err := r.Run(ctx); err != nil {
			stop(err)
		}
	})
	if err := w.await(ctx, w.entered, "the first stage"); err != nil {
		return err
	}

	// Some customers of the new version talk for long: they are there when it is rolled back. Each has a replacement sent
	// before the others come.
	d := newDesk(r, s, m)
	defer d.close()
	some := d.ofCandidate(5)
	d.live.Go(func() { d.chat(ctx, some[0], patient) })
	d.live.Go(func() { d.chat(ctx, some[1], patient) })
	d.live.Go(func() { d.phone(ctx, some[2]) })
	d.live.Go(func() { d.web(ctx, some[3], 0) })
	if err := w.await(ctx, d.served, "replacements for those who talk for long"); err != nil {
		return err
	}
	d.live.Go(func() { d.chat(ctx, some[4], angry) })
	for i := range visitors {
		d.others.Go(func() { d.visitors(ctx, i) })
	}
	background.Go(func() { d.review(ctx) })

	if err := w.await(ctx, w.began, "a rollback"); err != nil {
		return err
	}
	cut, err := r.Drain(ctx) // from here on nobody is with the new version
	if err != nil {
		return fmt.Errorf("drain: %w", err)
	}
	if err := w.await(ctx, w.done, "the end of the rollback"); err != nil {
		return err
	}
	left := after{r.Status().Sessions.Candidate, len(cut)}
	d.live.Wait() // the old version has answered them
	d.close()
	report(out, w.incident, d, s, left)
	return errors.Join(w.check(m, gate), d.check(), s.check(m), left.check())
}

// watcher waits for what happens to the rollout.
type watcher struct {
	entered, began, done, over chan struct{}
	incident                   rollout.Incident // once began is closed
	ended                      rollout.Event    // once over is closed: it went wrong
}

func watch(r *rollout.Rollout) *watcher {
	open := func() chan struct{} { return make(chan struct{}) }
	w := &watcher{entered: open(), began: open(), done: open(), over: open()}
	var entered, over sync.Once
	r.Subscribe(func(e rollout.Event) { // one event after the other
		switch e.Kind {
		case rollout.StageEntered:
			entered.Do(func() { close(w.entered) })
		case rollout.RollbackBegan:
			w.incident = *e.Incident
			close(w.began)
		case rollout.RollbackDone:
			close(w.done)
		case rollout.HoldBegan, rollout.RollbackStuck, rollout.CompletedRollout:
			over.Do(func() { w.ended = e; close(w.over) })
		}
	})
	return w
}

// await waits until c is closed, or for a reason why it never will be.
func (w *watcher) await(ctx context.Context, c <-chan struct{}, what string) error {
	select {
	case <-c:
		return nil
	case <-w.over:
		return fmt.Errorf("waited for %s: %v: %s", what, w.ended.Kind, w.ended.Note)
	case <-ctx.Done():
		return fmt.Errorf("waited for %s: %w", what, context.Cause(ctx))
	}
}
