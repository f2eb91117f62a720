package main

import (
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stagedrollout/rollout"
)

// checkout is one version of the shop's checkout. It knows nothing of rollouts; it only remembers whom it served, for the
// report at the end.
type checkout struct {
	failing float64 // percent of the requests

	mu             sync.Mutex // guards what follows
	random         *rand.Rand
	requests       int
	users          map[string]bool
	firstBad, last time.Time
}

func newCheckout(version, seed uint64, failing float64) *checkout {
	return &checkout{failing: failing, random: rand.New(rand.NewPCG(^seed, version)), users: map[string]bool{}}
}

func (c *checkout) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c.fails(r.Header.Get("X-User-ID")) {
		http.Error(w, "the payment did not go through", http.StatusInternalServerError)
		return
	}
	_, _ = io.WriteString(w, "thank you for your order\n")
}

// fails decides by chance whether a user's request fails, and remembers it.
func (c *checkout) fails(user string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	bad := c.random.Float64()*100 < c.failing
	c.requests++
	c.users[user] = true
	c.last = time.Now()
	if bad && c.firstBad.IsZero() {
		c.firstBad = c.last
	}
	return bad
}

// exposure is what a version has done so far.
type exposure struct {
	requests, users int
	firstBad, last  time.Time // requests
}

func (c *checkout) seen() exposure {
	c.mu.Lock()
	defer c.mu.Unlock()
	return exposure{c.requests, len(c.users), c.firstBad, c.last}
}

// priceTable stands for whatever a new version needs to be changed, and changed back when it is rolled back.
type priceTable struct{ restored atomic.Bool }

// restore is a rollback step. A step that was interrupted is made again, so it must bear to run twice.
func (p *priceTable) restore(context.Context, rollout.Incident) error {
	p.restored.Store(true)
	return nil
}

// statusPage shows what is known of the rollouts, as JSON.
func statusPage(rollouts ...*rollout.Rollout) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		var all []rollout.Status
		for _, r := range rollouts {
			all = append(all, r.Status())
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(all)
	})
}

// serve serves h until ctx ends.
func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return server.Serve(l)
}
