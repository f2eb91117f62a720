// Rings is a shop whose new invoices go out ring by ring: to the staff first, then to everyone. They are wrong for
// customers in Europe, who are a ring of their own. That ring alone is rolled back, what was done in it is undone, and the
// rollout goes on to completion for all others. It takes a few seconds:
//
//	go run ./examples/rings
//
// The policy is in this file, the invoices are in invoices.go. It exits with 1 unless all of that happened.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"github.com/stagedrollout/rollout"
)

// europe is the ring that something goes wrong in.
const europe = "region-eu"

// policy is how the new invoices go out. A real one would bake for hours. A customer belongs to the first ring that takes
// it, and to everyone's otherwise.
func policy(b *book) rollout.Policy {
	return rollout.Policy{
		Rings: []rollout.Ring{
			{Name: "staff"}, // units whose Groups contain "staff"
			{Name: europe, Match: func(u rollout.Unit) bool { return strings.HasPrefix(u.Key, "eu-") }},
		},
		Stages: []rollout.Stage{
			{Ring: "staff", Percent: 100, GuardOnly: true},
			{Percent: 10}, {Percent: 50}, {Percent: 100}, // of everyone, and so of each ring
		},
		Bake:     700 * time.Millisecond,
		Holdback: 10, // percent of each ring, kept on the old way until the end to compare with
		Gates: []rollout.Gate{
			// If one ring alone is at fault, only that one goes back; if it is not one alone, all do.
			rollout.Errors.Within(5).OnFail(rollout.RollbackRing),
		},
		Undo: map[string]func(context.Context, rollout.Effect) error{"invoice": b.undo},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, europe); err != nil {
		fmt.Fprintln(os.Stderr, "rings:", err)
		os.Exit(1)
	}
}

var errCompleted = errors.New("completed")

// run is the whole program. The new invoices are wrong in the ring wrongFor; it returns an error unless that is Europe's,
// and all happens to it that should.
func run(ctx context.Context, out io.Writer, wrongFor string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second) // it takes four
	defer cancel()
	b := newBook(wrongFor)
	r, err := rollout.New("invoices-v2", policy(b), &rollout.Options{
		Interval: 100 * time.Millisecond,        // between two looks at the gates; the default is 5 s
		Logger:   slog.New(slog.DiscardHandler), // or each event would be logged between the lines printed here
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "New invoices go out; they are wrong for customers in Europe")
	var incidents []rollout.Incident
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	r.Subscribe(func(e rollout.Event) { // one event after the other, until Run has returned
		switch e.Kind {
		case rollout.StageEntered:
			fmt.Fprintf(out, "  %s\n", e.Stage)
		case rollout.RingRolledBack:
			incidents = append(incidents, *e.Incident)
			fmt.Fprintf(out, "    %s is rolled back alone by %s\n", e.Ring, e.Gate)
			fmt.Fprintf(out, "    %s\n", e.Note)
		case rollout.StepDone:
			fmt.Fprintf(out, "    %s\n", b.summary())
		case rollout.CompletedRollout:
			fmt.Fprintln(out, "  completed")
			stop(errCompleted)
		case rollout.HoldBegan, rollout.RollbackBegan, rollout.StepFailed:
			stop(fmt.Errorf("in the stage %q: %v: %s", e.Stage, e.Kind, e.Note))
		}
	})
	var customers sync.WaitGroup
	for i := range 8 {
		customers.Go(func() { buy(ctx, r, b, uint64(i)) })
	}
	err = r.Run(ctx) // until ctx ends
	customers.Wait()
	if err == nil && context.Cause(ctx) != errCompleted {
		err = context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	table(out, r, b)
	return check(r, b, incidents)
}

// table shows what has become of each ring.
func table(out io.Writer, r *rollout.Rollout, b *book) {
	line := func(cells ...any) { fmt.Fprintf(out, "  %-10v %-5v %9v %9v %13v %6v\n", cells...) }
	fmt.Fprintln(out)
	line("ring", "has", "met new", "met old", "new invoices", "void")
	for _, ring := range r.Status().Rings {
		has := "new"
		if ring.RolledBack {
			has = "old"
		}
		made, void := b.of(ring.Name)
		line(ring.Name, has, ring.Units.Candidate, ring.Units.Control, made, void)
	}
}

// check reports what did not happen as it should.
func check(r *rollout.Rollout, b *book, incidents []rollout.Incident) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(incidents) != 1 || incidents[0].Ring != europe || incidents[0].Gate != "errors.Within(5)" {
		bad("one ring, %s, should be rolled back: %+v", europe, incidents)
	}
	for _, c := range []struct {
		u    rollout.Unit
		want bool
	}{
		{rollout.Unit{Key: "eu-1"}, false},
		{rollout.Unit{Key: "us-1"}, true},
		{rollout.Unit{Key: "us-2", Groups: []string{"staff"}}, true},
	} {
		if d := r.Decide(c.u); d.Enabled() != c.want {
			bad("%s gets the new invoices: %t, because of %v", c.u.Key, d.Enabled(), d.Reason())
		}
	}
	for _, ring := range r.Status().Rings {
		made, void := b.of(ring.Name)
		switch {
		case ring.RolledBack != (ring.Name == europe):
			bad("the ring %s is rolled back: %t", ring.Name, ring.RolledBack)
		case ring.RolledBack && (made > 0 || void == 0):
			bad("in %s %d new invoices stand and %d are void; all of them should be", ring.Name, made, void)
		case !ring.RolledBack && (made == 0 || void > 0):
			bad("in %s %d new invoices stand and %d are void; all of them should stand", ring.Name, made, void)
		}
	}
	if !b.newestFirst() {
		bad("the invoices were not made void the newest first")
	}
	return errors.Join(errs...)
}
