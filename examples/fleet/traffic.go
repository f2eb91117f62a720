package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	allUsers          = 3000
	connections       = 24
	requestsPerSecond = 800 // fewer if the machine is too busy
)

// balancer passes each request on to the next process. Where that one has no answer, the one after it is asked.
type balancer struct {
	mu    sync.Mutex
	addrs []string
	turn  int
}

func (b *balancer) add(addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addrs = append(b.addrs, addr)
}

func (b *balancer) remove(addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addrs = slices.DeleteFunc(b.addrs, func(a string) bool { return a == addr })
}

// next are all processes, beginning with the one whose turn it is.
func (b *balancer) next() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.addrs) == 0 {
		return nil
	}
	b.turn = (b.turn + 1) % len(b.addrs)
	return slices.Concat(b.addrs[b.turn:], b.addrs[:b.turn])
}

// toShops has the connections to the processes.
var toShops = &http.Transport{MaxIdleConnsPerHost: connections}

// RoundTrip makes balancer an http.RoundTripper. Requests have no body, so that they may be made again.
func (b *balancer) RoundTrip(req *http.Request) (*http.Response, error) {
	err := errors.New("there is no process")
	for _, addr := range b.next() {
		again := req.Clone(req.Context())
		again.URL.Host = addr
		var res *http.Response
		if res, err = toShops.RoundTrip(again); err == nil || req.Context().Err() != nil {
			return res, err
		}
	}
	return nil, err
}

// users send requests to the proxy until they are closed.
type users struct {
	url        string
	proxy      *http.Server
	stop       func()
	unanswered atomic.Int64

	mu     sync.Mutex
	counts served
}

// from is a version in a process, and served how many requests each has answered.
type (
	from   struct{ process, version string }
	served map[from]int
)

// open opens the shop.
func (f *fleet) open(ctx context.Context) (*users, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(p *httputil.ProxyRequest) { p.Out.URL.Scheme, p.Out.URL.Host = "http", "shop" },
		Transport: &f.balance,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
	ctx, cancel := context.WithCancel(ctx)
	u := &users{url: "http://" + l.Addr().String() + "/price", counts: served{}}
	u.proxy = &http.Server{Handler: proxy, ReadHeaderTimeout: 10 * time.Second}
	var all sync.WaitGroup
	u.stop = func() { cancel(); all.Wait() }
	all.Go(func() { _ = u.proxy.Serve(l) })
	context.AfterFunc(ctx, func() { _ = u.proxy.Close() })
	transport := &http.Transport{MaxIdleConnsPerHost: connections}
	for range connections {
		all.Go(func() { u.connection(ctx, &http.Client{Transport: transport}) })
	}
	return u, nil
}

func (u *users) close() { u.stop() }

// connection sends one request after the other, each from a random user.
func (u *users) connection(ctx context.Context, client *http.Client) {
	tick := time.NewTicker(connections * time.Second / requestsPerSecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		by, err := u.request(ctx, client, rand.IntN(allUsers))
		switch {
		case ctx.Err() != nil:
		case err != nil || by.process == "":
			u.unanswered.Add(1)
		default:
			u.mu.Lock()
			u.counts[by]++
			u.mu.Unlock()
		}
	}
}

// request asks for a price, and returns who has answered, if only that it failed.
func (u *users) request(ctx context.Context, client *http.Client, user int) (from, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.url, http.NoBody)
	if err != nil {
		return from{}, err
	}
	req.Header.Set("X-User-ID", "user-"+strconv.Itoa(user))
	res, err := client.Do(req)
	if err != nil {
		return from{}, err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body) // read to the end, or the connection cannot be used again
	return from{res.Header.Get("X-Process"), res.Header.Get("X-Version")}, err
}

// seen is what was answered so far.
func (u *users) seen() served {
	u.mu.Lock()
	defer u.mu.Unlock()
	return maps.Clone(u.counts)
}

// watch is what is answered in a time from now on, but for what is under way.
func (u *users) watch(ctx context.Context, d time.Duration) (served, error) {
	if err := sleep(ctx, 250*time.Millisecond); err != nil {
		return nil, err
	}
	before := u.seen()
	if err := sleep(ctx, d); err != nil {
		return nil, err
	}
	return u.seen().less(before), nil
}

func (s served) less(before served) served {
	d := served{}
	for by, n := range s {
		d[by] = n - before[by]
	}
	return d
}

// of is how many requests a version has answered, in all processes.
func (s served) of(version string) (n int) {
	for by, k := range s {
		if by.version == version {
			n += k
		}
	}
	return n
}

// only reports whether every process has served this version, and none another one.
func (s served) only(version string) error {
	for _, name := range names {
		if s[from{name, version}] == 0 {
			return fmt.Errorf("%s does not serve %s", name, version)
		}
	}
	for by, n := range s {
		if n > 0 && by.version != version {
			return fmt.Errorf("%s still serves %s", by.process, by.version)
		}
	}
	return nil
}
