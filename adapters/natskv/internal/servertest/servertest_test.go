package servertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/adapters/natskv"
	"github.com/stagedrollout/rollout/storetest"
)

var _ rollout.Store = (*natskv.Store)(nil)

// A node is a NATS server that may be stopped and started again.
type node struct {
	options server.Options
	server  *server.Server
}

func newNode(t testing.TB, options server.Options) *node {
	t.Helper()
	if options.StoreDir == "" {
		options.StoreDir = t.TempDir()
	}
	options.Host, options.Port = "127.0.0.1", -1
	options.JetStream, options.NoSigs, options.NoLog = true, true, true
	n := &node{options: options}
	n.start(t)
	n.options.Port = n.server.Addr().(*net.TCPAddr).Port
	t.Cleanup(n.stop)
	return n
}

func (n *node) start(t testing.TB) {
	t.Helper()
	o := n.options
	s, err := server.NewServer(&o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	n.server = s
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("the server does not start")
	}
}

func (n *node) stop() {
	n.server.Shutdown()
	n.server.WaitForShutdown()
}

func (n *node) addr() string { return fmt.Sprintf("127.0.0.1:%d", n.options.Port) }

func connect(t testing.TB, addrs ...string) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect(strings.Join(addrs, ","), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func create(t testing.TB, js jetstream.JetStream, c jetstream.KeyValueConfig) {
	t.Helper()
	if _, err := js.CreateKeyValue(t.Context(), c); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, js jetstream.JetStream) *natskv.Store {
	t.Helper()
	s, err := natskv.New(t.Context(), js, "rollouts")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestStore is the whole contract, with the server, its connections and its files failing.
func TestStore(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Backend {
		n := newNode(t, server.Options{})
		create(t, connect(t, n.addr()), natskv.Bucket("rollouts", 1))
		openAt := func(t testing.TB, addr string) storetest.Store { return open(t, connect(t, addr)) }
		return storetest.Backend{
			Open:   func(t testing.TB) storetest.Store { return openAt(t, n.addr()) },
			Addr:   n.addr(),
			OpenAt: openAt,
			Restart: func(t testing.TB) {
				n.stop()
				n.start(t)
			},
			Snapshot: func(t testing.TB) func(testing.TB) {
				saved := t.TempDir()
				n.stop()
				if err := os.CopyFS(saved, os.DirFS(n.options.StoreDir)); err != nil {
					t.Fatal(err)
				}
				n.start(t)
				return func(t testing.TB) {
					n.stop()
					if err := errors.Join(os.RemoveAll(n.options.StoreDir), os.CopyFS(n.options.StoreDir, os.DirFS(saved))); err != nil {
						t.Fatal(err)
					}
					n.start(t)
				}
			},
		}
	})
}

// A bucket as others make it: in memory, with a history, and what is left of deleted keys stays.
func TestOtherBucket(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Backend {
		n := newNode(t, server.Options{})
		create(t, connect(t, n.addr()), jetstream.KeyValueConfig{Bucket: "rollouts", History: 5, Storage: jetstream.MemoryStorage})
		return storetest.Backend{Open: func(t testing.TB) storetest.Store { return open(t, connect(t, n.addr())) }}
	})
}

func TestRefused(t *testing.T) {
	n := newNode(t, server.Options{})
	js := connect(t, n.addr())
	create(t, js, jetstream.KeyValueConfig{Bucket: "source"})
	create(t, js, jetstream.KeyValueConfig{Bucket: "ttl", TTL: time.Hour})
	create(t, js, jetstream.KeyValueConfig{Bucket: "mirror", Mirror: &jetstream.StreamSource{Name: "source"}})
	create(t, js, jetstream.KeyValueConfig{Bucket: "sourced", Sources: []*jetstream.StreamSource{{Name: "source"}}})
	for bucket, want := range map[string]string{"absent": "bucket not found", "ttl": "TTL of 1h", "mirror": "another", "sourced": "another", "a.b": "invalid"} {
		s, err := natskv.New(t.Context(), js, bucket)
		if s != nil || err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), bucket) {
			t.Errorf("New(%q) = %v, %v, want an error with %q", bucket, s, err, want)
		}
	}
}

// What others wrote is an error, neither absent nor free.
func TestForeign(t *testing.T) {
	n := newNode(t, server.Options{})
	js := connect(t, n.addr())
	create(t, js, natskv.Bucket("rollouts", 1))
	s := open(t, js)
	kv, err := js.KeyValue(t.Context(), "rollouts")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kv.PutString(t.Context(), "k", "by hand"); err != nil {
		t.Fatal(err)
	}
	_, _, err1 := s.Load(t.Context(), "k")
	_, err2 := s.List(t.Context(), "")
	_, _, err3 := s.CompareAndSwap(t.Context(), "k", 0, []byte("v"))
	for i, err := range []error{err1, err2, err3} {
		if err == nil || !strings.Contains(err.Error(), "$KV.rollouts.k") {
			t.Errorf("call %d: %v", i, err)
		}
	}
	// Deleted by hand, the key is free.
	if err := kv.Delete(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := s.CompareAndSwap(t.Context(), "k", 0, []byte("v")); !ok || err != nil {
		t.Error(ok, err)
	}
	if e, err := kv.Get(t.Context(), "k"); err != nil || string(e.Value()) != "v" {
		t.Error("others see", e, err)
	}
}

// What is left of a deleted key goes in time, and the key is free before and after.
func TestMarkersExpire(t *testing.T) {
	n := newNode(t, server.Options{})
	js := connect(t, n.addr())
	c := natskv.Bucket("rollouts", 1)
	c.LimitMarkerTTL = time.Second
	create(t, js, c)
	s := open(t, js)
	for _, key := range []string{"a", "b"} {
		rev, _, err := s.CompareAndSwap(t.Context(), key, 0, []byte("v"))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok, err := s.CompareAndSwap(t.Context(), key, rev, nil); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	stream, err := js.Stream(t.Context(), "KV_rollouts")
	if err != nil {
		t.Fatal(err)
	}
	poll(t, func() error {
		info, err := stream.Info(t.Context())
		if err == nil && info.State.Msgs != 0 {
			err = fmt.Errorf("%d messages are left", info.State.Msgs)
		}
		return err
	})
	if _, ok, err := s.CompareAndSwap(t.Context(), "a", 0, []byte("v")); !ok || err != nil {
		t.Error(ok, err)
	}
}

// However often a connection is lost, there are few consumers, and soon none when nobody watches.
func TestConsumers(t *testing.T) {
	n := newNode(t, server.Options{})
	js := connect(t, n.addr())
	create(t, js, natskv.Bucket("rollouts", 1))
	p := storetest.NewProxy(t, n.addr())
	s := open(t, connect(t, p.Addr()))
	ctx, cancel := context.WithCancel(t.Context())
	hints, ended := make(chan bool, 1000), make(chan error)
	go func() { ended <- s.Watch(ctx, "", func() { hints <- true }) }()
	for range 6 {
		select {
		case <-hints:
		case <-time.After(20 * time.Second):
			t.Fatal("no hint")
		}
		p.Cut()
	}
	stream, err := js.Stream(t.Context(), "KV_rollouts")
	if err != nil {
		t.Fatal(err)
	}
	count := func() int {
		info, err := stream.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return info.State.Consumers
	}
	if got := count(); got > 7 {
		t.Errorf("%d consumers after 6 connections", got)
	}
	<-hints
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	poll(t, func() error { // those whose deletion was lost with a connection, after their ten seconds
		if got := count(); got != 0 {
			return fmt.Errorf("%d consumers are left", got)
		}
		return nil
	})
}

// A connection that is closed for good ends Watch with an error.
func TestClosed(t *testing.T) {
	n := newNode(t, server.Options{})
	js := connect(t, n.addr())
	create(t, js, natskv.Bucket("rollouts", 1))
	s := open(t, js)
	hints, ended := make(chan bool, 10), make(chan error)
	go func() { ended <- s.Watch(t.Context(), "", func() { hints <- true }) }()
	<-hints
	js.Conn().Close()
	select {
	case err := <-ended:
		if !errors.Is(err, nats.ErrConnectionClosed) {
			t.Errorf("Watch = %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Watch goes on")
	}
	if _, _, err := s.Load(t.Context(), "k"); !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("Load: %v", err)
	}
}

// Three servers and three replicas: handles on each see every acknowledged write at once, also while the leader changes.
func TestCluster(t *testing.T) {
	var nodes []*node
	var addrs, routes []string
	for range 3 { // ports for the routes
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		routes = append(routes, "nats://"+l.Addr().String())
		l.Close()
	}
	for i := range 3 {
		port := 0
		fmt.Sscanf(routes[i][strings.LastIndexByte(routes[i], ':'):], ":%d", &port)
		n := newNode(t, server.Options{
			ServerName: fmt.Sprint("n", i),
			Cluster:    server.ClusterOpts{Name: "c", Host: "127.0.0.1", Port: port, PoolSize: -1},
			Routes:     server.RoutesFromStr(strings.Join(routes, ",")),
		})
		nodes, addrs = append(nodes, n), append(addrs, n.addr())
	}
	js := connect(t, addrs[0])
	poll(t, func() error {
		_, err := js.CreateKeyValue(t.Context(), natskv.Bucket("rollouts", 3))
		return err
	})
	var stores []*natskv.Store
	for _, a := range addrs {
		stores = append(stores, open(t, connect(t, a)))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var rev uint64
	large := make([]byte, 900<<10)
	write := func(i int, v []byte) {
		t.Helper()
		var ok bool
		var err error
		old := rev
		if rev, ok, err = stores[i%3].CompareAndSwap(ctx, "r/k", old, v); !ok || err != nil {
			t.Fatal(ok, err)
		}
		for j := range 3 {
			if got, r, err := stores[j].Load(ctx, "r/k"); err != nil || r != rev || len(got) != len(v) {
				t.Fatalf("write %d: Load at %d = %d bytes, %d, %v, want %d, %d", i, j, len(got), r, err, len(v), rev)
			}
			if all, err := stores[j].List(ctx, "r/"); err != nil || len(all["r/k"]) != len(v) {
				t.Fatalf("write %d: List at %d = %v", i, j, err)
			}
			if _, ok, err := stores[j].CompareAndSwap(ctx, "r/k", old, []byte("stale")); ok || err != nil {
				t.Fatalf("write %d: stale write at %d: %v, %v", i, j, ok, err)
			}
		}
	}
	for i := range 30 {
		write(i, fmt.Append(nil, i))
	}
	write(0, large)

	hints := make(chan bool, 1)
	ended := make(chan error)
	watching, stop := context.WithCancel(ctx)
	go func() {
		ended <- stores[0].Watch(watching, "r/", func() {
			select {
			case hints <- true:
			default:
			}
		})
	}()
	<-hints
	write(1, []byte("watched"))
	<-hints
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}

	// The leader goes. Another takes over, with everything that was acknowledged.
	stream, err := js.Stream(ctx, "KV_rollouts")
	if err != nil {
		t.Fatal(err)
	}
	leader := slices.IndexFunc(nodes, func(n *node) bool { return n.options.ServerName == stream.CachedInfo().Cluster.Leader })
	nodes[leader].stop()
	s := stores[(leader+1)%3]
	begun := time.Now()
	poll(t, func() error {
		c, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		v, r, err := s.Load(c, "r/k")
		if err == nil && (string(v) != "watched" || r != rev) {
			t.Fatalf("Load = %q, %d, want the last write, %d", v, r, rev)
		}
		return err
	})
	t.Logf("%v without a leader", time.Since(begun).Round(time.Millisecond))
	poll(t, func() error {
		c, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		v, r, err := s.Load(c, "r/k")
		if err != nil || string(v) == "after" {
			return err
		}
		if _, ok, err := s.CompareAndSwap(c, "r/k", r, []byte("after")); err != nil || ok {
			return err
		}
		return errors.New("refused")
	})
}

func poll(t *testing.T, f func() error) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func BenchmarkStore(b *testing.B) {
	n := newNode(b, server.Options{})
	create(b, connect(b, n.addr()), natskv.Bucket("rollouts", 1))
	s, other := open(b, connect(b, n.addr())), open(b, connect(b, n.addr()))
	v := make([]byte, 2048)
	b.Run("CompareAndSwap", func(b *testing.B) {
		_, rev, err := s.Load(b.Context(), "cas")
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if rev, _, err = s.CompareAndSwap(b.Context(), "cas", rev, v); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Load", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := s.Load(b.Context(), "cas"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("List20", func(b *testing.B) {
		for i := range 20 {
			if _, _, err := s.CompareAndSwap(b.Context(), fmt.Sprint("l/", i), 0, v); err != nil {
				b.Fatal(err)
			}
		}
		for b.Loop() {
			if _, err := s.List(b.Context(), "l/"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("WriteToLoad", func(b *testing.B) { // until the other handle's Watch has loaded it
		ctx, cancel := context.WithCancel(b.Context())
		defer cancel()
		seen, ended := make(chan uint64, 100), make(chan error, 1)
		go func() {
			ended <- other.Watch(ctx, "w/", func() {
				if _, rev, err := other.Load(ctx, "w/k"); err == nil {
					seen <- rev
				}
			})
		}()
		<-seen
		_, rev, err := s.Load(b.Context(), "w/k")
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if rev, _, err = s.CompareAndSwap(b.Context(), "w/k", rev, v); err != nil {
				b.Fatal(err)
			}
			for <-seen != rev {
			}
		}
	})
}
