// Fleet is a shop of five processes that share one rollout through NATS. A good version of its prices goes out; in the
// middle of it one process is killed and started again, and the rollout goes on and completes in all of them. Then a bad
// version is deployed, one process after the other, and rolled back in all of them at once. It takes about half a minute:
//
//	go run ./examples/fleet
//
// The story is in this file, the processes are in shop.go, what starts, kills and asks them in fleet.go, and the proxy
// before them and their users in traffic.go. The NATS server is part of the program, which exits with 1 unless all of it
// happened.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/stagedrollout/rollout"
)

func main() {
	failing := flag.Float64("failing", 6, "`percent` of the requests that fail with the bad version; 1 is as good as the others, and this program fails")
	flag.Parse()
	if text := os.Getenv(shopEnv); text != "" {
		if err := shop(text); err != nil {
			fmt.Fprintln(os.Stderr, "fleet: a shop:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, *failing); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// run is the whole program. It returns what did not happen as it should.
func run(ctx context.Context, out io.Writer, failing float64) error {
	ctx, cancel := context.WithTimeout(ctx, 80*time.Second)
	defer cancel()
	f, err := newFleet(ctx, out)
	if err != nil {
		return err
	}
	defer f.close()

	v2 := release{Version: "v2", Failing: 1, Before: "v1", BeforeFailing: 1}
	v3 := release{Version: "v3", Failing: failing, Before: "v2", BeforeFailing: 1}
	for _, name := range names {
		if err := f.start(ctx, name, v2); err != nil {
			return err
		}
	}
	users, err := f.open(ctx)
	if err != nil {
		return err
	}
	defer users.close()
	f.printf("A shop of %d processes on one NATS server, with %d users and %d requests/s, at %s\n", len(names), allUsers, requestsPerSecond, users.url)

	f.chapter("v2 fails as seldom as v1: 1 %% of the requests")
	if err := good(ctx, f, users); err != nil {
		return fmt.Errorf("v2: %w", err)
	}
	f.chapter("v3 fails more often: %g %%. It is deployed, one process after the other", failing)
	if err := bad(ctx, f, users, v3); err != nil {
		return fmt.Errorf("v3: %w", err)
	}
	if n := users.unanswered.Load(); n > 0 {
		return fmt.Errorf("%d requests had no answer from any process", n)
	}
	return nil
}

// good is a rollout that completes, though a process dies in the middle of it.
func good(ctx context.Context, f *fleet, users *users) error {
	victim := names[2]
	for _, percent := range []rollout.Percent{10, 50} {
		if err := f.until(ctx, "every process is at the next stage", func(s rollout.Status) bool { return s.Stage.Percent >= percent }); err != nil {
			return err
		}
		f.note("%v %% of the users have v2 in every process", float64(percent))
	}
	if err := sleep(ctx, time.Second); err != nil {
		return err
	}
	f.kill(victim)
	f.note("%s is killed", victim)
	if err := sleep(ctx, time.Second); err != nil {
		return err
	}
	if s, err := f.status(ctx, names[0]); err != nil || s.State != rollout.Running && s.State != rollout.Completed {
		return fmt.Errorf("while %s is dead, the rollout is %v (%v)", victim, s.State, err)
	}
	if err := f.start(ctx, victim, f.release[victim]); err != nil {
		return err
	}
	f.note("%s is started again", victim)
	if err := f.until(ctx, "every process has completed", func(s rollout.Status) bool { return s.State == rollout.Completed }); err != nil {
		return err
	}
	f.note("completed in every process")
	seen, err := users.watch(ctx, time.Second)
	if err != nil {
		return err
	}
	f.table(seen)
	return seen.only("v2")
}

// bad is a deploy that is rolled back.
func bad(ctx context.Context, f *fleet, users *users, v3 release) error {
	before := users.seen()
	for _, name := range names {
		if err := f.stop(ctx, name); err != nil {
			return err
		}
		if err := f.start(ctx, name, v3); err != nil {
			return err
		}
		f.note("%s is restarted with v3", name)
		if err := sleep(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
	rolledBack := func(s rollout.Status) bool { return s.Name == v3.rollout() && s.State == rollout.RolledBack }
	if err := f.until(ctx, "every process has rolled back", rolledBack); err != nil {
		return err
	}
	s, err := f.status(ctx, names[0])
	if err != nil {
		return err
	}
	in := s.Incident
	if in == nil {
		return errors.New("the rollback has no incident")
	}
	f.note("rolled back in every process")
	f.printf("\nIncident at %s, in the stage %q\n", in.Time.Local().Format(time.TimeOnly), in.Stage)
	f.printf("  broken gate    %s\n", in.Gate)
	f.printf("  v3             %.1f %% failed, %d of %d\n", 100*in.Candidate.Rate, in.Candidate.Events, in.Candidate.N)
	f.printf("  v2             %.1f %% failed, %d of %d\n", 100*in.Control.Rate, in.Control.Events, in.Control.N)
	f.printf("  exposed        %d requests\n", users.seen().less(before).of("v3"))
	restored := f.prices.restored()
	f.printf("  rollback step  prices restored %dx, by %s\n", len(restored), strings.Join(restored, ", "))
	seen, err := users.watch(ctx, 2*time.Second)
	if err != nil {
		return err
	}
	f.printf("  since then\n")
	f.table(seen)
	if in.Gate == "" || in.Name != v3.rollout() || in.Candidate.N == 0 {
		return fmt.Errorf("it is not rolled back by a gate: %+v", in)
	}
	if len(restored) != 1 {
		return fmt.Errorf("the prices were restored %d times", len(restored))
	}
	return seen.only("v2")
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
