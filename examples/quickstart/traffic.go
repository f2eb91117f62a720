package main

import (
	"context"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	allUsers          = 3000
	staff             = 150 // the first of the users
	connections       = 32
	requestsPerSecond = 2500 // fewer if the machine is too busy
)

// shoppers are the shop's users. They share a few connections, as if behind a proxy.
type shoppers struct {
	url  string
	seed uint64
	sent atomic.Int64 // requests
}

// shop has users send requests until ctx ends.
func (s *shoppers) shop(ctx context.Context) {
	transport := &http.Transport{MaxIdleConnsPerHost: connections}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	var all sync.WaitGroup
	for i := range connections {
		all.Go(func() { s.connection(ctx, client, rand.New(rand.NewPCG(s.seed, uint64(i)))) })
	}
	all.Wait()
}

// connection sends one request after the other, each from a random user. A tick that comes while a request is still
// under way is left out, so that a slow machine gets fewer requests and not a queue of them.
func (s *shoppers) connection(ctx context.Context, client *http.Client, random *rand.Rand) {
	tick := time.NewTicker(connections * time.Second / requestsPerSecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if s.request(ctx, client, random.IntN(allUsers)) == nil {
			s.sent.Add(1)
		}
	}
}

// request buys something for a user. A failed checkout is no error here: the shop has seen it.
func (s *shoppers) request(ctx context.Context, client *http.Client, user int) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, http.NoBody)
	if err != nil {
		return err
	}
	req.Header.Set("X-User-ID", "user-"+strconv.Itoa(user))
	if user < staff {
		req.Header.Set("X-Staff", "yes")
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body) // read to the end, or the connection cannot be used again
	return err
}
