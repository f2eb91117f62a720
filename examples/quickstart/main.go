// Quickstart is a small shop that takes two new versions of its checkout out to its users, one after the other: a good
// one, which completes, and a bad one, which is rolled back. The requests are real, and it takes about ten seconds:
//
//	go run ./examples/quickstart
//
// The policy and the two rollouts are in this file, the shop is in shop.go, its users are in traffic.go, and show.go
// prints what happens.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/stagedrollout/rollout"
)

// policy is how a new checkout goes out. A real one would bake for minutes or hours, not for a second.
func policy(prices *priceTable) rollout.Policy {
	return rollout.Policy{
		Rings: []rollout.Ring{{Name: "staff"}}, // users whose Groups contain "staff"
		Stages: []rollout.Stage{
			{Ring: "staff", Percent: 100, GuardOnly: true},
			{Percent: 10}, {Percent: 25}, {Percent: 50}, {Percent: 100}, // of everyone
		},
		Bake:     time.Second,
		Holdback: 10, // percent of each ring, kept on the old version until the end to compare with
		Gates: []rollout.Gate{
			rollout.Errors.Within(2),                          // to go on: at most 2 points above the old version
			rollout.Errors.NoWorse().OnFail(rollout.Rollback), // to stay: not above the old version at all
			rollout.Errors.AtMost(10),                         // and never above 10 %
		},
		Rollback: []rollout.RollbackStep{{Name: "restore the price table", Do: prices.restore}},
	}
}

// unitOf says who a request is from; a real shop would ask its session.
func unitOf(r *http.Request) rollout.Unit {
	u := rollout.Unit{Key: r.Header.Get("X-User-ID")}
	if r.Header.Get("X-Staff") == "yes" {
		u.Groups = []string{"staff"}
	}
	return u
}

func main() {
	addr := flag.String("addr", "", "serve on this `address`, and go on when both releases have ended")
	seed := flag.Uint64("seed", 7, "of who asks when, and which requests fail")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, *addr, *seed); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// run is the whole program. It returns an error unless the good release completes and the bad one is rolled back.
func run(ctx context.Context, out io.Writer, addr string, seed uint64) error {
	// Three versions of the checkout, with the percentage of requests that fail: the second is as good as the first, the
	// third is worse.
	v1, v2, v3 := newCheckout(1, seed, 1), newCheckout(2, seed, 1), newCheckout(3, seed, 4)
	prices := &priceTable{}

	options := &rollout.Options{
		Interval: 100 * time.Millisecond,        // between two looks at the gates; the default is 5 s
		Logger:   slog.New(slog.DiscardHandler), // or each event would be logged between the lines printed here
	}
	good := rollout.Must("checkout-v2", policy(prices), options)
	bad := rollout.Must("checkout-v3", policy(prices), options)

	mux := http.NewServeMux()
	mux.Handle("POST /checkout", bad.Handler(v3, good.Handler(v2, v1))) // the new handler first, everywhere
	mux.Handle("GET /rollouts", statusPage(good, bad))

	// In the background: the server, its users, and the Run of each rollout, which judges, promotes and rolls back. If one
	// of them fails, all end.
	ctx, stop := context.WithCancelCause(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer stop(nil)
	listener, err := net.Listen("tcp", cmp.Or(addr, "127.0.0.1:0")) // 0: a free port
	if err != nil {
		return err
	}
	background.Go(func() { stop(serve(ctx, listener, rollout.Middleware(unitOf)(mux))) })
	url := "http://" + listener.Addr().String()
	shoppers := &shoppers{url: url + "/checkout", seed: seed}
	usersCtx, sendHome := context.WithCancel(ctx)
	defer sendHome()
	background.Go(func() { shoppers.shop(usersCtx) })
	screen := newScreen(out, shoppers)
	screen.printf("A shop at %s, %d users, %d requests/s\n", url, allUsers, requestsPerSecond)

	inTime, cancel := context.WithTimeout(ctx, 55*time.Second)
	defer cancel()
	screen.printf("\n%s fails as seldom as what it replaces: 1 %%\n", good.Name())
	background.Go(func() { stop(good.Run(ctx)) })
	if err := screen.follow(inTime, good, rollout.Completed); err != nil {
		return err
	}
	screen.printf("\n%s fails more often: 4 %%\n", bad.Name())
	background.Go(func() { stop(bad.Run(ctx)) })
	if err := screen.follow(inTime, bad, rollout.RolledBack); err != nil {
		return err
	}

	time.Sleep(250 * time.Millisecond) // for requests that were under way
	seen, sent := v3.seen(), shoppers.sent.Load()
	screen.incident(*bad.Status().Incident, seen, prices.restored.Load())
	time.Sleep(500 * time.Millisecond)
	since := v3.seen().requests - seen.requests
	screen.printf("  since then     %d of %d requests\n", since, shoppers.sent.Load()-sent)
	if since > 0 {
		return errors.New("the bad version is still in use")
	}
	if !prices.restored.Load() {
		return errors.New("the prices were not restored")
	}

	if addr != "" {
		sendHome()
		screen.printf("\nServing POST %s/checkout and GET %s/rollouts until interrupted\n", url, url)
		<-ctx.Done()
	}
	return nil
}
