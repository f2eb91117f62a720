package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
)

// A recorder is a testing.TB for a case that should fail.
type recorder struct {
	testing.TB
	ctx context.Context

	mu       sync.Mutex
	failures []string
	skipped  bool
	cleanups []func()
}

func (r *recorder) patience() time.Duration  { return time.Second }
func (r *recorder) Helper()                  {}
func (r *recorder) Context() context.Context { return r.ctx }
func (r *recorder) Log(...any)               {}
func (r *recorder) Logf(string, ...any)      {}

func (r *recorder) Error(args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprint(args...))
}
func (r *recorder) Errorf(format string, args ...any) { r.Error(fmt.Sprintf(format, args...)) }
func (r *recorder) Fatal(args ...any)                 { r.Error(args...); runtime.Goexit() }
func (r *recorder) Fatalf(format string, args ...any) { r.Fatal(fmt.Sprintf(format, args...)) }
func (r *recorder) Skip(...any)                       { r.skipped = true; runtime.Goexit() }

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

// record runs one case by itself.
func record(t *testing.T, name string, open func(t testing.TB) Backend) (failures []string, skipped bool) {
	ctx, cancel := context.WithCancel(t.Context())
	r := &recorder{TB: t, ctx: ctx}
	done := make(chan bool)
	go func() {
		defer close(done)
		for _, c := range cases {
			if c.name == name {
				c.run(r, open(r))
				return
			}
		}
		r.Errorf("no case %s", name)
	}()
	<-done
	cancel()
	for _, f := range slices.Backward(r.cleanups) {
		f()
	}
	return r.failures, r.skipped
}

// A defect is a Store that does something in its own way.
type defect struct {
	Store
	load  func(ctx context.Context, key string) ([]byte, uint64, error)
	list  func(ctx context.Context, prefix string) (map[string][]byte, error)
	swap  func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error)
	watch func(ctx context.Context, prefix string, changed func()) error
}

func (d *defect) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	if d.load != nil {
		return d.load(ctx, key)
	}
	return d.Store.Load(ctx, key)
}

func (d *defect) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	if d.list != nil {
		return d.list(ctx, prefix)
	}
	return d.Store.List(ctx, prefix)
}

func (d *defect) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	if d.swap != nil {
		return d.swap(ctx, key, old, value)
	}
	return d.Store.CompareAndSwap(ctx, key, old, value)
}

func (d *defect) Watch(ctx context.Context, prefix string, changed func()) error {
	if d.watch != nil {
		return d.watch(ctx, prefix, changed)
	}
	return d.Store.Watch(ctx, prefix, changed)
}

// force makes value that of key, whatever was there.
func force(ctx context.Context, s Store, key string, value []byte) (uint64, bool, error) {
	for {
		_, rev, err := s.Load(ctx, key)
		if err != nil {
			return 0, false, err
		}
		if r, ok, err := s.CompareAndSwap(ctx, key, rev, value); ok || err != nil {
			return r, ok, err
		}
	}
}

// Each case finds the stores that break what it is about.
func TestBroken(t *testing.T) {
	for _, test := range []struct {
		name   string
		cases  string // that find it
		damage func(d *defect)
	}{
		{"an absent key is an error", "Absent", func(d *defect) {
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				v, r, err := d.Store.Load(ctx, key)
				if err == nil && r == 0 {
					err = errors.New("not found")
				}
				return v, r, err
			}
		}},
		{"deleting an absent key is refused", "Absent Delete", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				if value == nil && old == 0 && ctx.Err() == nil {
					return 0, false, nil
				}
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"creating replaces", "Create Replace", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				if old == 0 {
					return force(ctx, d.Store, key, value)
				}
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"replacing ignores the revision", "Absent Create Replace Contention", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				if old != 0 && value != nil {
					return force(ctx, d.Store, key, value)
				}
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"deleting ignores the revision", "Absent Create Replace Delete", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				if value == nil {
					return force(ctx, d.Store, key, nil)
				}
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"a deleted key keeps a revision", "Delete", func(d *defect) {
			deleted := map[string]uint64{}
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				r, ok, err := d.Store.CompareAndSwap(ctx, key, old, value)
				if ok && value == nil && old != 0 {
					deleted[key] = old
				} else if ok {
					delete(deleted, key)
				}
				return r, ok, err
			}
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				v, r, err := d.Store.Load(ctx, key)
				return v, max(r, deleted[key]), err
			}
		}},
		{"a refusal is an error", "Create Replace", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				r, ok, err := d.Store.CompareAndSwap(ctx, key, old, value)
				if !ok && err == nil {
					err = errors.New("conflict")
				}
				return r, ok, err
			}
		}},
		{"revisions count from 1 for each life of a key", "Delete Revisions", func(d *defect) {
			// Stored with the value, which is the usual mistake.
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				v, r, err := d.Store.Load(ctx, key)
				if err != nil || r == 0 {
					return v, r, err
				}
				return v[1:], uint64(v[0]), nil
			}
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				v, r, err := d.Store.Load(ctx, key)
				if err != nil {
					return 0, false, err
				}
				n := uint64(0)
				if r != 0 {
					n = uint64(v[0])
				}
				if n != old {
					return 0, false, nil
				}
				if value == nil {
					return d.Store.CompareAndSwap(ctx, key, r, nil)
				}
				_, ok, err := d.Store.CompareAndSwap(ctx, key, r, append([]byte{byte(n + 1)}, value...))
				return n + 1, ok, err
			}
		}},
		{"empty and nil are one", "Values", func(d *defect) {
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				v, r, err := d.Store.Load(ctx, key)
				if len(v) == 0 {
					v = nil
				}
				return v, r, err
			}
		}},
		{"an empty value deletes", "Values", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				if len(value) == 0 {
					value = nil
				}
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"List shows nil for empty", "Values", func(d *defect) {
			d.list = func(ctx context.Context, prefix string) (map[string][]byte, error) {
				all, err := d.Store.List(ctx, prefix)
				for k, v := range all {
					if len(v) == 0 {
						all[k] = nil
					}
				}
				return all, err
			}
		}},
		{"values are text", "Values", func(d *defect) {
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				v, r, err := d.Store.Load(ctx, key)
				return bytes.ToValidUTF8(v, []byte("?")), r, err
			}
		}},
		{"values are small", "Values", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				if len(value) > 512<<10 {
					return 0, false, errors.New("too large")
				}
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"Load gives away its own memory", "Copies", func(d *defect) {
			own := map[string][]byte{}
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				v, r, err := d.Store.Load(ctx, key)
				if own[key] == nil {
					own[key] = v
				}
				return own[key], r, err
			}
		}},
		{"List gives away its own memory", "Copies", func(d *defect) {
			var own map[string][]byte
			d.list = func(ctx context.Context, prefix string) (map[string][]byte, error) {
				var err error
				if own == nil {
					own, err = d.Store.List(ctx, prefix)
				}
				return own, err
			}
		}},
		{"writes keep the caller's memory", "Copies", func(d *defect) {
			kept := map[string][]byte{}
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				kept[key] = value
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				_, r, err := d.Store.Load(ctx, key)
				return kept[key], r, err
			}
		}},
		{"keys are folded", "Keys List", renamed(strings.ToLower)},
		{"keys are cleaned", "Keys", renamed(func(k string) string {
			return strings.TrimRight(k, "/") + strings.Repeat("/", min(1, strings.Count(k, "/")))
		})},
		{"keys lose blanks", "Keys", renamed(strings.TrimSpace)},
		{"keys are text", "Keys List", renamed(func(k string) string { return strings.ToValidUTF8(k, "?") })},
		{"keys are cut", "Keys", renamed(func(k string) string { return k[:min(len(k), 255)] })},
		{"prefixes are directories", "List", func(d *defect) {
			d.list = func(ctx context.Context, prefix string) (map[string][]byte, error) {
				all, err := d.Store.List(ctx, prefix)
				for k := range all {
					if prefix != "" && !strings.HasSuffix(prefix, "/") && !strings.HasPrefix(k, prefix+"/") && k != prefix {
						delete(all, k)
					}
				}
				return all, err
			}
		}},
		{"prefixes are patterns", "List", func(d *defect) {
			d.list = func(ctx context.Context, prefix string) (map[string][]byte, error) {
				return d.Store.List(ctx, strings.TrimRight(prefix, "*>"))
			}
		}},
		{"List is without what it was asked for by name", "List", func(d *defect) {
			d.list = func(ctx context.Context, prefix string) (map[string][]byte, error) {
				all, err := d.Store.List(ctx, prefix)
				delete(all, prefix)
				return all, err
			}
		}},
		{"List is stale", "Fresh", func(d *defect) {
			var cached map[string][]byte
			var at time.Time
			d.list = func(ctx context.Context, prefix string) (map[string][]byte, error) {
				if time.Since(at) < 5*time.Millisecond {
					return maps.Clone(cached), nil
				}
				var err error
				cached, err = d.Store.List(ctx, prefix)
				at = time.Now()
				return maps.Clone(cached), err
			}
		}},
		{"Load is stale", "Fresh", func(d *defect) {
			type entry struct {
				v []byte
				r uint64
			}
			last := map[string]entry{} // one write behind
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				v, r, err := d.Store.Load(ctx, key)
				e, ok := last[key]
				last[key] = entry{v, r}
				if ok {
					v, r = e.v, e.r
				}
				return v, r, err
			}
		}},
		{"two writers at once both succeed", "Contention Interrupted", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				_, r, err := d.Store.Load(ctx, key)
				if err != nil || r != old {
					return 0, false, err
				}
				runtime.Gosched()
				return force(ctx, d.Store, key, value)
			}
		}},
		{"a write is done though it is refused", "Interrupted", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				r, ok, err := d.Store.CompareAndSwap(ctx, key, old, value)
				if ok && rand.N(4) == 0 {
					return 0, false, nil
				}
				return r, ok, err
			}
		}},
		{"a write is acknowledged and not done", "Contention Interrupted", func(d *defect) {
			var n atomic.Int64
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				if n.Add(1)%20 == 0 && ctx.Err() == nil {
					return 12345, true, nil
				}
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"a write whose context has ended is acknowledged", "Ended", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				r, ok, err := d.Store.CompareAndSwap(ctx, key, old, value)
				if err != nil && ctx.Err() != nil {
					return 12345, true, nil
				}
				return r, ok, err
			}
		}},
		{"contexts are ignored", "Ended", func(d *defect) {
			d.load = func(ctx context.Context, key string) ([]byte, uint64, error) {
				return d.Store.Load(context.WithoutCancel(ctx), key)
			}
		}},
		{"List ignores its context", "Ended", func(d *defect) {
			d.list = func(ctx context.Context, prefix string) (map[string][]byte, error) {
				return d.Store.List(context.WithoutCancel(ctx), prefix)
			}
		}},
		{"writes are done though the context has ended", "Ended", func(d *defect) {
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				r, ok, err := d.Store.CompareAndSwap(context.WithoutCancel(ctx), key, old, value)
				if ctx.Err() != nil {
					return 0, false, ctx.Err()
				}
				return r, ok, err
			}
		}},
		{"Watch has no hint at the start", "WatchStart", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				first := true
				return d.Store.Watch(ctx, prefix, func() {
					if !first {
						changed()
					}
					first = false
				})
			}
		}},
		{"Watch has no hint but at the start", "WatchChange WatchTurns", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				return d.Store.Watch(ctx, prefix, sync.OnceFunc(changed))
			}
		}},
		{"Watch knows whole words only", "WatchChange", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				if prefix != "" && !strings.HasSuffix(prefix, "/") {
					prefix += "/"
				}
				return d.Store.Watch(ctx, prefix, changed)
			}
		}},
		{"Watch is silent about deletions", "WatchChange", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				first := true
				return d.Store.Watch(ctx, prefix, func() {
					if all, err := d.Store.List(ctx, prefix); first || err == nil && len(all) > 0 {
						changed()
					}
					first = false
				})
			}
		}},
		{"Watch hints before the change", "WatchChange", func(d *defect) {
			var mu sync.Mutex
			watchers := map[*func()]bool{}
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				mu.Lock()
				watchers[&changed] = true
				mu.Unlock()
				changed()
				<-ctx.Done()
				mu.Lock()
				delete(watchers, &changed)
				mu.Unlock()
				return nil
			}
			d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
				mu.Lock()
				for changed := range watchers {
					(*changed)()
				}
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
				return d.Store.CompareAndSwap(ctx, key, old, value)
			}
		}},
		{"Watch calls from many goroutines", "WatchTurns", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				return d.Store.Watch(ctx, prefix, func() { go changed() })
			}
		}},
		{"Watch drops what comes during a call", "WatchTurns", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				hints, begun := make(chan bool), time.Now()
				go d.Store.Watch(ctx, prefix, func() {
					if time.Since(begun) < 200*time.Millisecond {
						return
					}
					select {
					case hints <- true:
					default:
					}
				})
				changed()
				for {
					select {
					case <-hints:
						changed()
					case <-ctx.Done():
						return nil
					}
				}
			}
		}},
		{"Watch returns the context's error", "WatchEnd Ended", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				d.Store.Watch(ctx, prefix, changed)
				return ctx.Err()
			}
		}},
		{"Watch never returns", "WatchEnd", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error {
				d.Store.Watch(ctx, prefix, changed)
				time.Sleep(2 * soon)
				return nil
			}
		}},
		{"Watch returns at once", "WatchEnd", func(d *defect) {
			d.watch = func(ctx context.Context, prefix string, changed func()) error { return nil }
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel() // some wait for what never comes
			for name := range strings.FieldsSeq(test.cases) {
				begun := time.Now()
				failures, _ := record(t, name, func(t testing.TB) Backend {
					d := &defect{Store: rollout.MemStore()}
					test.damage(d)
					return Backend{Open: func(testing.TB) Store { return d }}
				})
				if len(failures) == 0 {
					t.Errorf("%s did not find it", name)
				} else {
					t.Logf("%s: %s (%v)", name, failures[0], time.Since(begun))
				}
			}
		})
	}
}

// renamed is the defect of a store that keeps other names than it was given.
func renamed(name func(string) string) func(d *defect) {
	return func(d *defect) {
		d.load = func(ctx context.Context, key string) ([]byte, uint64, error) { return d.Store.Load(ctx, name(key)) }
		d.swap = func(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
			return d.Store.CompareAndSwap(ctx, name(key), old, value)
		}
	}
}
