package storetest

import (
	"context"
	"errors"
	"net"
	"net/rpc"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
)

// A server offers a store over TCP, as a database does.
type server struct {
	t    testing.TB
	addr string
	conf conf

	mu       sync.Mutex
	store    rollout.Store
	version  int // of the store, counting up
	changed  chan bool
	listener net.Listener
	conns    map[net.Conn]bool
}

// A conf is how a server and its clients are broken.
type conf struct {
	forget   bool // everything, when the server stops
	retry    bool // an interrupted write, on top of what was there meanwhile
	refusal  bool // an interrupted write counts as refused
	deaf     bool // no hint after the connection was lost
	dead     bool // the connection, once it was lost
	unsafe   bool // the server does not look at the revision of a write
	sequence bool // revisions are counted
}

func newServer(t testing.TB, c conf) *server {
	s := &server{t: t, conf: c, store: rollout.MemStore(), addr: "127.0.0.1:0", changed: make(chan bool), conns: map[net.Conn]bool{}}
	s.start(t)
	t.Cleanup(s.stop)
	return s
}

func (s *server) start(t testing.TB) {
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	r := rpc.NewServer()
	if err := r.RegisterName("Store", &service{s}); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.addr, s.listener = l.Addr().String(), l
	s.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns[c] = true
			s.mu.Unlock()
			go r.ServeConn(c)
		}
	}()
}

func (s *server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener.Close()
	for c := range s.conns {
		c.Close()
	}
	clear(s.conns)
	if s.conf.forget {
		s.store = rollout.MemStore()
	}
}

func (s *server) restart(t testing.TB) {
	s.stop()
	s.start(t)
}

// snapshot keeps values, and their revisions where the store can.
func (s *server) snapshot(t testing.TB) func(testing.TB) {
	counted, ok := s.current().(*countedStore)
	if !ok {
		t.Fatal("no snapshots")
	}
	saved := counted.clone()
	return func(t testing.TB) {
		s.stop()
		s.mu.Lock()
		s.store = saved
		s.mu.Unlock()
		s.start(t)
	}
}

func (s *server) current() rollout.Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.store
}

type service struct{ s *server }

type Args struct {
	Key   string
	Old   uint64
	Value []byte
	Nil   bool
}

type Reply struct {
	Value    []byte
	Revision uint64
	OK       bool
	All      map[string][]byte
	Version  int
}

func (v *service) Load(a Args, r *Reply) (err error) {
	r.Value, r.Revision, err = v.s.current().Load(context.Background(), a.Key)
	return err
}

func (v *service) List(a Args, r *Reply) (err error) {
	r.All, err = v.s.current().List(context.Background(), a.Key)
	return err
}

func (v *service) Swap(a Args, r *Reply) (err error) {
	if a.Nil {
		a.Value = nil
	} else if a.Value == nil { // gob knows no empty slices
		a.Value = []byte{}
	}
	if v.s.conf.unsafe {
		_, a.Old, _ = v.s.current().Load(context.Background(), a.Key)
	}
	r.Revision, r.OK, err = v.s.current().CompareAndSwap(context.Background(), a.Key, a.Old, a.Value)
	if r.OK {
		v.s.mu.Lock()
		v.s.version++
		close(v.s.changed)
		v.s.changed = make(chan bool)
		v.s.mu.Unlock()
	}
	return err
}

// Wait returns once the store has a version after a.Old.
func (v *service) Wait(a Args, r *Reply) error {
	for {
		v.s.mu.Lock()
		changed := v.s.changed
		r.Version = v.s.version
		v.s.mu.Unlock()
		if r.Version > int(a.Old) {
			return nil
		}
		<-changed
	}
}

// A remote is a handle on a server's store.
type remote struct {
	addr string
	conf conf

	mu     sync.Mutex
	client *rpc.Client
	lost   bool
}

func (s *server) openAt(t testing.TB, addr string) Store {
	r := &remote{addr: addr, conf: s.conf}
	t.Cleanup(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.client != nil {
			r.client.Close()
		}
	})
	return r
}

func (s *server) open(t testing.TB) Store { return s.openAt(t, s.addr) }

func (r *remote) call(ctx context.Context, method string, a Args) (*Reply, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	r.mu.Lock()
	if r.conf.dead && r.lost {
		r.mu.Unlock()
		return nil, errors.New("the connection was lost")
	}
	if r.client == nil {
		c, err := net.DialTimeout("tcp", r.addr, time.Second)
		if err != nil {
			r.mu.Unlock()
			return nil, err
		}
		r.client = rpc.NewClient(c)
	}
	client := r.client
	r.mu.Unlock()
	call := client.Go("Store."+method, a, new(Reply), make(chan *rpc.Call, 1))
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-call.Done:
	}
	var answer rpc.ServerError
	if call.Error != nil && !errors.As(call.Error, &answer) {
		r.mu.Lock()
		if r.lost = true; r.client == client {
			r.client = nil
		}
		r.mu.Unlock()
		client.Close()
	}
	return call.Reply.(*Reply), call.Error
}

func (r *remote) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	a, err := r.call(ctx, "Load", Args{Key: key})
	if err != nil {
		return nil, 0, err
	}
	if a.Revision != 0 && a.Value == nil {
		a.Value = []byte{}
	}
	return a.Value, a.Revision, nil
}

func (r *remote) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	a, err := r.call(ctx, "List", Args{Key: prefix})
	if err != nil {
		return nil, err
	}
	for k, v := range a.All {
		if v == nil {
			a.All[k] = []byte{}
		}
	}
	return a.All, nil
}

func (r *remote) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	a, err := r.call(ctx, "Swap", Args{key, old, value, value == nil})
	switch {
	case err == nil:
		return a.Revision, a.OK, nil
	case r.conf.retry:
		again := context.WithoutCancel(ctx)
		_, rev, err := r.Load(again, key)
		if err != nil {
			return 0, false, err
		}
		return r.CompareAndSwap(again, key, rev, value)
	case r.conf.refusal:
		return 0, false, nil
	}
	return 0, false, err
}

func (r *remote) Watch(ctx context.Context, prefix string, changed func()) error {
	version, again := 0, false
	for ctx.Err() == nil {
		if !r.conf.deaf || !again {
			changed()
			again = true
		}
		for {
			a, err := r.call(ctx, "Wait", Args{Old: uint64(version)})
			if err != nil {
				break
			}
			version = a.Version
			changed()
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// A countedStore has revisions that count, which repeat if it is set back. Its values cannot be watched.
type countedStore struct {
	rollout.Store // not used
	random        bool

	mu      sync.Mutex
	n       uint64
	entries map[string]countedEntry
}

type countedEntry struct {
	v []byte
	r uint64
}

func (s *countedStore) clone() *countedStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &countedStore{random: s.random, n: s.n, entries: map[string]countedEntry{}}
	for k, e := range s.entries {
		c.entries[k] = e
	}
	if s.random {
		c.n += 1 << 20 // as good as random here
	}
	return c
}

func (s *countedStore) Load(_ context.Context, key string) ([]byte, uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[key]
	return e.v, e.r, nil
}

func (s *countedStore) List(_ context.Context, prefix string) (map[string][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string][]byte{}
	for k, e := range s.entries {
		if strings.HasPrefix(k, prefix) {
			all[k] = e.v
		}
	}
	return all, nil
}

func (s *countedStore) CompareAndSwap(_ context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[key].r != old {
		return 0, false, nil
	}
	if value == nil {
		delete(s.entries, key)
		return 0, true, nil
	}
	s.n++
	s.entries[key] = countedEntry{value, s.n}
	return s.n, true, nil
}

func remoteBackend(c conf, counted bool) func(t testing.TB) Backend {
	return func(t testing.TB) Backend {
		s := newServer(t, c)
		b := Backend{Open: s.open, Addr: s.addr, OpenAt: s.openAt, Restart: s.restart}
		if counted {
			s.store = &countedStore{random: !c.sequence, entries: map[string]countedEntry{}}
			b.Snapshot = s.snapshot
		}
		return b
	}
}

// A store behind a server that keeps the contract passes, with nothing skipped.
func TestRemote(t *testing.T) {
	Run(t, remoteBackend(conf{}, false))
	for _, c := range cases {
		if _, skipped := record(t, c.name, remoteBackend(conf{}, true)); skipped {
			t.Errorf("%s was skipped", c.name)
		}
	}
}

func TestBrokenRemote(t *testing.T) {
	for _, test := range []struct {
		name    string
		cases   string // that find it
		conf    conf
		counted bool
	}{
		{"a server that forgets", "Restart", conf{forget: true}, false},
		{"interrupted writes are done again", "LandsLate LandsTooLate", conf{retry: true}, false},
		{"interrupted writes count as refused", "Interrupted LandsLate LandsTooLate ReplyLost", conf{refusal: true}, false},
		{"no hint after the connection was lost", "WatchCut", conf{deaf: true}, false},
		{"no second connection", "WatchCut Restart ReplyLost", conf{dead: true}, false},
		{"late writes are not compared", "LandsTooLate", conf{unsafe: true}, false},
		{"revisions repeat once the store was set back", "Restored", conf{sequence: true}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			for name := range strings.FieldsSeq(test.cases) {
				if failures, _ := record(t, name, remoteBackend(test.conf, test.counted)); len(failures) == 0 {
					t.Errorf("%s did not find it", name)
				} else {
					t.Logf("%s: %s", name, failures[0])
				}
			}
		})
	}
}
