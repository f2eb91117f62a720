//go:build unix

package servertest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/adapters/pgstore"
	"github.com/stagedrollout/rollout/storetest"
)

var _ rollout.Store = (*pgstore.Store)(nil)

func TestListening(t *testing.T) {
	testStore(t, nil, pgstore.Options{})
}

// Two processes with one table are one rollout: what is rolled back in one is in the other, long before its next tick, and
// is still when both start again.
func TestRollout(t *testing.T) {
	server := postgres(t)
	table := newTable()
	begin := func() (r *rollout.Rollout, stop func()) {
		store := create(t, newPool(t, server.addr(), nil), pgstore.Options{Table: table})
		policy := rollout.Policy{
			Stages:   rollout.Percentages(50, 100),
			Bake:     time.Hour,
			Gates:    []rollout.Gate{rollout.Errors.Within(1)},
			Holdback: 5,
		}
		r, err := rollout.New("checkout", policy, &rollout.Options{Store: store, Interval: time.Hour, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- r.Run(ctx) }()
		until(t, "the state is loaded", func() bool { return r.Status().Loaded })
		return r, func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}
	served := func(r *rollout.Rollout) bool { // to any of many units
		for i := range 100 {
			if r.Peek(rollout.Unit{Key: strconv.Itoa(i)}).Enabled() {
				return true
			}
		}
		return false
	}
	one, stop1 := begin()
	two, stop2 := begin()
	for _, r := range []*rollout.Rollout{one, two} {
		until(t, "the candidate is served", func() bool { return served(r) })
	}
	if err := one.Rollback(t.Context(), "eve"); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	until(t, "the other process has rolled back", func() bool { return !served(two) })
	t.Logf("%v after the first", time.Since(begun).Round(time.Millisecond))
	stop1()
	stop2()
	three, stop3 := begin()
	if s := three.Status(); served(three) || s.State != rollout.RolledBack && s.State != rollout.RollingBack {
		t.Errorf("started again it is %v", s.State)
	}
	stop3()
}

// With the least pool, and the settings of a database and a pool that are most unlike the usual ones.
func TestPolling(t *testing.T) {
	testStore(t, func(c *pgxpool.Config) {
		c.MaxConns = 1
		c.ConnConfig.RuntimeParams["default_transaction_isolation"] = "serializable"
		c.ConnConfig.RuntimeParams["bytea_output"] = "escape"
		c.ConnConfig.RuntimeParams["standard_conforming_strings"] = "off"
		c.ConnConfig.RuntimeParams["client_encoding"] = "LATIN1"
	}, pgstore.Options{Poll: 20 * time.Millisecond})
}

func testStore(t *testing.T, change func(*pgxpool.Config), o pgstore.Options) {
	storetest.Run(t, func(t testing.TB) storetest.Backend {
		s := postgres(t)
		o := o
		o.Table = newTable()
		create(t, newPool(t, s.addr(), nil), o)
		var pools []*pgxpool.Pool
		openAt := func(t testing.TB, addr string) storetest.Store {
			pool := newPool(t, addr, change)
			pools = append(pools, pool)
			return newStore(t, pool, o)
		}
		return storetest.Backend{
			Open:    func(t testing.TB) storetest.Store { return openAt(t, s.addr()) },
			OpenAt:  openAt,
			Addr:    s.addr(),
			Restart: s.crashAndRestart,
			Snapshot: func(t testing.TB) func(testing.TB) {
				restore := s.snapshot(t)
				for _, pool := range pools { // taking it was no part of the test, but broke the connections
					pool.Reset()
				}
				return restore
			},
		}
	})
}

// Through a PgBouncer that lends two connections, for a statement each: polling, or listening past it.
func TestPgBouncer(t *testing.T) {
	server := postgres(t)
	bouncer := pgbouncer(t, server)
	direct, err := pgx.ParseConfig(url(server.addr()))
	if err != nil {
		t.Fatal(err)
	}
	table := newTable()
	stores := []*pgstore.Store{
		create(t, newPool(t, bouncer, nil), pgstore.Options{Table: table, Poll: 20 * time.Millisecond}),
		create(t, newPool(t, bouncer, nil), pgstore.Options{Table: table, Listen: direct}),
	}
	var watchers, writers sync.WaitGroup
	const each, n = 10, 10 * 8
	for i, s := range stores {
		hints := watch(t, s, "n")
		watchers.Go(func() {
			for v := ""; v != fmt.Sprint(n); { // hints come until it has
				select {
				case <-hints:
				case <-time.After(patience):
					t.Errorf("store %d: no hint after it was %q", i, v)
					return
				}
				b, _, err := s.Load(t.Context(), "n")
				if err != nil {
					t.Error(err)
					return
				}
				v = string(b)
			}
		})
	}
	for i := range n / each {
		s := stores[i%2]
		writers.Go(func() {
			for range each {
				if err := increment(t.Context(), s, "n"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	watchers.Wait()
	for _, s := range stores {
		all, err := s.List(t.Context(), "")
		if err != nil || len(all) != 1 || string(all["n"]) != fmt.Sprint(n) {
			t.Errorf("List = %q, %v, want %d", all, err, n)
		}
	}
}

// increment adds 1 to the number in key.
func increment(ctx context.Context, s *pgstore.Store, key string) error {
	for {
		v, rev, err := s.Load(ctx, key)
		if err != nil {
			return err
		}
		n, _ := strconv.Atoi(string(v))
		if _, ok, err := s.CompareAndSwap(ctx, key, rev, strconv.AppendInt(nil, int64(n+1), 10)); ok || err != nil {
			return err
		}
	}
}

var tables atomic.Int64

func newTable() string { return fmt.Sprintf("store_%d", tables.Add(1)) }

func newPool(t testing.TB, addr string, change func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(url(addr))
	if err != nil {
		t.Fatal(err)
	}
	config.MaxConns = 4
	if change != nil {
		change(config)
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func newStore(t testing.TB, pool *pgxpool.Pool, o pgstore.Options) *pgstore.Store {
	t.Helper()
	s, err := pgstore.New(pool, &o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// create returns a store whose table was made.
func create(t testing.TB, pool *pgxpool.Pool, o pgstore.Options) *pgstore.Store {
	t.Helper()
	s := newStore(t, pool, o)
	if err := s.Create(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

func execute(t testing.TB, pool *pgxpool.Pool, sql string) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

func TestCreate(t *testing.T) {
	pool := newPool(t, postgres(t).addr(), func(c *pgxpool.Config) { c.MaxConns = 8 })
	execute(t, pool, `drop schema if exists "My Schema", empty cascade; create schema "My Schema"; create schema empty;
		drop table if exists other; create table other (key text); drop role if exists app; create role app login`)
	o := pgstore.Options{Schema: "My Schema", Table: `My "Table"`}
	if _, _, err := newStore(t, pool, o).Load(t.Context(), "k"); err == nil {
		t.Error("Load without a table: no error")
	}

	// By many at the same time, and again.
	for range 2 {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if err := newStore(t, pool, o).Create(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	s := newStore(t, pool, o)
	rev, ok, err := s.CompareAndSwap(t.Context(), "k", 0, []byte("v"))
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	// What DDL returns makes the same table, or nothing.
	execute(t, pool, s.DDL())
	if v, r, err := s.Load(t.Context(), "k"); string(v) != "v" || r != rev || err != nil {
		t.Errorf("Load = %q, %d, %v", v, r, err)
	}

	// By one who may not make tables.
	execute(t, pool, `grant usage on schema "My Schema", empty to app;
		grant select, insert, update, delete on "My Schema"."My ""Table""" to app`)
	app := newPool(t, postgres(t).addr(), func(c *pgxpool.Config) { c.ConnConfig.User = "app" })
	s = create(t, app, o)
	if _, ok, err := s.CompareAndSwap(t.Context(), "k", rev, nil); !ok || err != nil {
		t.Error(ok, err)
	}
	err = newStore(t, app, pgstore.Options{Schema: "empty"}).Create(t.Context())
	if pg := (*pgconn.PgError)(nil); !errors.As(err, &pg) || pg.Code != "42501" {
		t.Errorf("Create without the right to: %v", err)
	}

	// Another table of this name.
	if err := newStore(t, pool, pgstore.Options{Table: "other"}).Create(t.Context()); err == nil {
		t.Error("Create with a table of other columns: no error")
	}
}

// After a crash every connection of a pool is broken. Reads do not show it.
func TestReadAfterCrash(t *testing.T) {
	server := postgres(t)
	pool := newPool(t, server.addr(), nil)
	s := create(t, pool, pgstore.Options{Table: newTable()})
	rev, ok, err := s.CompareAndSwap(t.Context(), "k", 0, []byte("v"))
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	for name, read := range map[string]func() (string, error){
		"Load": func() (string, error) {
			v, r, err := s.Load(t.Context(), "k")
			if r != rev {
				err = errors.Join(err, fmt.Errorf("revision %d, want %d", r, rev))
			}
			return string(v), err
		},
		"List": func() (string, error) {
			m, err := s.List(t.Context(), "k")
			return string(m["k"]), err
		},
	} {
		fill(t, pool)
		server.crashAndRestart(t)
		if n := pool.Stat().IdleConns(); n != pool.Config().MaxConns {
			t.Fatalf("%d connections are idle", n)
		}
		if v, err := read(); v != "v" || err != nil {
			t.Errorf("%s = %q, %v", name, v, err)
		}
	}
	until(t, "all connections are given back", func() bool { return pool.Stat().AcquiredConns() == 0 })
}

// fill makes as many connections as pool may have.
func fill(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	for range pool.Config().MaxConns {
		c, err := pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Release()
	}
}

// All watchers of a store listen on one connection, which is none of the pool's and ends with the last of them.
func TestOneConnectionListens(t *testing.T) {
	server := postgres(t)
	admin := newPool(t, server.addr(), nil)
	table := newTable()
	pool := newPool(t, server.addr(), func(c *pgxpool.Config) {
		c.MaxConns = 1
		c.ConnConfig.RuntimeParams["application_name"] = table
	})
	s := create(t, pool, pgstore.Options{Table: table})
	c, err := pool.Acquire(t.Context()) // it is not there for them
	if err != nil {
		t.Fatal(err)
	}
	defer c.Release()

	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				if err := s.Watch(ctx, fmt.Sprint(i), func() {}); err != nil {
					t.Error(err)
				}
			})
		}
		until(t, "one connection listens", func() bool { return sessions(t, admin, table) == 2 })
		for range 20 {
			if n := sessions(t, admin, table); n != 2 {
				t.Fatalf("%d connections, want one that listens and the pool's", n)
			}
		}
		cancel()
		wg.Wait()
		until(t, "none listens", func() bool { return sessions(t, admin, table) == 1 })
	}
}

// sessions counts the connections of an application.
func sessions(t testing.TB, pool *pgxpool.Pool, application string) (n int) {
	t.Helper()
	err := pool.QueryRow(t.Context(), "select count(*) from pg_stat_activity where application_name = $1", application).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for begun := time.Now(); !f(); time.Sleep(time.Millisecond) {
		if time.Since(begun) > patience {
			t.Fatalf("not after %v: %s", patience, what)
		}
	}
}

// A network that swallows everything holds up no call longer than its context, and no Watch: one that listens, one that
// connects, and one that polls.
func TestSwallowed(t *testing.T) {
	server := postgres(t)
	p := storetest.NewProxy(t, server.addr())
	o := pgstore.Options{Table: newTable()}
	s := create(t, newPool(t, p.Addr(), nil), o)
	connecting := newStore(t, newPool(t, p.Addr(), nil), o)
	o.Poll = time.Millisecond
	polling := newStore(t, newPool(t, p.Addr(), nil), o)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 3)
	listens := make(chan bool, 2)
	go func() { ended <- s.Watch(ctx, "", func() { listens <- true }) }()
	for range 2 {
		waitHint(t, listens)
	}
	p.HoldRequests("")
	p.HoldReplies("")
	defer p.Release() // or the pools wait to say goodbye
	go func() { ended <- connecting.Watch(ctx, "", func() {}) }()
	go func() { ended <- polling.Watch(ctx, "", func() {}) }()

	short, cancel2 := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel2()
	begun := time.Now()
	_, _, err1 := s.Load(short, "k")
	_, swapped, err2 := s.CompareAndSwap(short, "k", 0, []byte("v"))
	if !errors.Is(err1, context.DeadlineExceeded) || swapped || !errors.Is(err2, context.DeadlineExceeded) {
		t.Errorf("Load: %v; CompareAndSwap: %v, %v", err1, swapped, err2)
	}
	cancel()
	for range 3 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if d := time.Since(begun); d > 3*time.Second {
		t.Errorf("it took %v", d)
	}
}

// A password that changes is asked for before each connection, also the one that listens; and a handler of notifications
// that the pool's connections have is not in the way.
func TestPoolHooks(t *testing.T) {
	var connected atomic.Int64
	pool := newPool(t, postgres(t).addr(), func(c *pgxpool.Config) {
		user := c.ConnConfig.User
		c.ConnConfig.User = "nobody_yet"
		c.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
			connected.Add(1)
			c.User = user
			return nil
		}
		c.ConnConfig.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) { t.Error("not ours") }
	})
	s := create(t, pool, pgstore.Options{Table: newTable()})
	hints := watch(t, s, "k")
	for range 2 { // at the start, and when it listens
		waitHint(t, hints)
	}
	if n := connected.Load(); n != 2 {
		t.Errorf("BeforeConnect was called %d times, want 2", n)
	}
	if _, ok, err := s.CompareAndSwap(t.Context(), "k", 0, []byte("v")); !ok || err != nil {
		t.Fatal(ok, err)
	}
	waitHint(t, hints)
}

// A listener may go another way than the pool.
func TestListenElsewhere(t *testing.T) {
	server := postgres(t)
	direct, err := pgx.ParseConfig(url(server.addr()))
	if err != nil {
		t.Fatal(err)
	}
	table := newTable()
	direct.RuntimeParams["application_name"] = table
	pool := newPool(t, server.addr(), nil)
	s := create(t, pool, pgstore.Options{Table: table, Listen: direct})
	hints := watch(t, s, "k")
	for range 2 {
		waitHint(t, hints)
	}
	if n := sessions(t, pool, table); n != 1 {
		t.Errorf("%d connections are made as Listen says", n)
	}
	if _, ok, err := s.CompareAndSwap(t.Context(), "k", 0, []byte("v")); !ok || err != nil {
		t.Fatal(ok, err)
	}
	waitHint(t, hints)
}

// watch watches until the test ends.
func watch(t testing.TB, s *pgstore.Store, prefix string) <-chan bool {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	hints, ended := make(chan bool, 1), make(chan error, 1)
	go func() {
		ended <- s.Watch(ctx, prefix, func() {
			select {
			case hints <- true:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return hints
}

func waitHint(t testing.TB, hints <-chan bool) {
	t.Helper()
	select {
	case <-hints:
	case <-time.After(patience):
		t.Fatal("no hint")
	}
}

func BenchmarkCompareAndSwap(b *testing.B) {
	s := create(b, newPool(b, postgres(b).addr(), nil), pgstore.Options{Table: newTable()})
	value := []byte(strings.Repeat("v", 2<<10))
	var rev uint64
	for b.Loop() {
		next, ok, err := s.CompareAndSwap(b.Context(), "k", rev, value)
		if !ok || err != nil {
			b.Fatal(ok, err)
		}
		rev = next
	}
}

// BenchmarkHint is the time from a write, which it includes, to another process knowing of it.
func BenchmarkHint(b *testing.B) {
	o := pgstore.Options{Table: newTable()}
	writer := create(b, newPool(b, postgres(b).addr(), nil), o)
	reader := newStore(b, newPool(b, postgres(b).addr(), nil), o)
	hints := watch(b, reader, "k")
	for range 2 {
		waitHint(b, hints)
	}
	var rev uint64
	for b.Loop() {
		next, ok, err := writer.CompareAndSwap(b.Context(), "k", rev, []byte("v"))
		if !ok || err != nil {
			b.Fatal(ok, err)
		}
		rev = next
		waitHint(b, hints)
	}
}
