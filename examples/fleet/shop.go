package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/adapters/natskv"
)

// release is what a process is deployed with: a version, and the one before, which it has as well.
type release struct {
	Version, Before        string
	Failing, BeforeFailing float64 // percent of the requests
}

// rollout is the name of the rollout of a release.
func (v release) rollout() string { return "prices-" + v.Version }

// config is all that a process is told.
type config struct {
	release
	Name   string
	NATS   string // where the server is
	Prices string // where the rollback step goes
}

const (
	shopEnv = "FLEET_SHOP" // the config, as JSON: this process is a shop
	bucket  = "rollouts"
)

// policy is how a new version of the prices goes out. A real one would bake for hours.
func policy(c config) rollout.Policy {
	return rollout.Policy{
		Stages:   rollout.Percentages(10, 50, 100),
		Bake:     3 * time.Second,
		Holdback: 10,
		Gates: []rollout.Gate{
			rollout.Errors.Within(2),                          // to go on: at most 2 points above the version before
			rollout.Errors.NoWorse().OnFail(rollout.Rollback), // to stay: not above it at all
		},
		Rollback: []rollout.RollbackStep{{Name: "restore the prices", Do: c.restore}},
	}
}

// restore is the rollback step: one of the processes runs it. Should that one die, another one runs it again, so whoever is
// asked is told what tells them apart.
func (c config) restore(ctx context.Context, in rollout.Incident) error {
	form := url.Values{"by": {c.Name}, "key": {in.Key}, "fence": {in.Fence}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.Prices+"?"+form.Encode(), http.NoBody)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the prices are not restored: %s", res.Status)
	}
	return nil
}

// shop is one process of the fleet. It writes where it serves to its output, and ends when its input does: when whoever
// started it says so, or dies.
func shop(text string) error {
	var c config
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop(nil)
	}()

	nc, err := nats.Connect(c.NATS, nats.MaxReconnects(-1), nats.ReconnectBufSize(-1))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	store, err := natskv.New(ctx, js, bucket)
	if err != nil {
		return err
	}
	// A rollout ends when it has completed. The next version of the prices is another one.
	r, err := rollout.New(c.rollout(), policy(c), &rollout.Options{
		Store:    store,
		Replica:  c.Name,
		Interval: 500 * time.Millisecond, // between two looks at the gates; the default is 5 s
		Logger:   slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	})
	if err != nil {
		return err
	}
	if err := r.Ready(ctx); err != nil {
		return err
	}
	var background sync.WaitGroup
	background.Go(func() {
		if err := r.Run(ctx); err != nil {
			stop(err)
		}
	})

	mux := http.NewServeMux()
	mux.Handle("GET /price", rollout.Middleware(unitOf)(r.Handler(c.serve(c.Version, c.Failing), c.serve(c.Before, c.BeforeFailing))))
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(r.Status()) })
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	background.Go(func() {
		if err := server.Serve(listener); err != http.ErrServerClosed {
			stop(err)
		}
	})
	fmt.Println(listener.Addr())

	<-ctx.Done()
	inTime, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = server.Shutdown(inTime)
	background.Wait() // Run stores what was counted last
	if err := context.Cause(ctx); err != context.Canceled {
		return err
	}
	return nil
}

// unitOf says who a request is from; a real shop would ask its session.
func unitOf(r *http.Request) rollout.Unit { return rollout.Unit{Key: r.Header.Get("X-User-ID")} }

// serve is one version of the prices. So many percent of its requests fail.
func (c config) serve(version string, failing float64) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Process", c.Name)
		w.Header().Set("X-Version", version)
		if rand.Float64()*100 < failing {
			http.Error(w, "no price", http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, "9.90\n")
	})
}
