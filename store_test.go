package rollout

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stagedrollout/rollout/storetest"
	"pgregory.net/rapid"
)

func TestMemStore(t *testing.T) {
	processors(t)
	storetest.Run(t, func(t testing.TB) storetest.Backend {
		s := MemStore()
		return storetest.Backend{Open: func(testing.TB) storetest.Store { return s }}
	})
	testBuiltInStore(t, func(t *testing.T) (a, b Store) {
		s := MemStore()
		return s, s
	})
}

// testBuiltInStore checks what the built-in stores promise besides the contract of Store. open returns two handles on one
// new, empty store, which may be the same.
func testBuiltInStore(t *testing.T, open func(t *testing.T) (a, b Store)) {
	t.Run("Keys", func(t *testing.T) {
		a, _ := open(t)
		for _, k := range []string{"", "a\x00b", strings.Repeat("k", maxStoreKey+1)} {
			_, _, err := a.Load(t.Context(), k)
			_, _, err2 := a.CompareAndSwap(t.Context(), k, 0, []byte("v"))
			named := fmt.Sprintf("%.40q", k)
			for _, err := range []error{err, err2} {
				if err == nil || !strings.Contains(err.Error(), named) {
					t.Errorf("error %v does not name key %s", err, named)
				}
			}
		}
		k := strings.Repeat("\xfe", maxStoreKey)
		storeLoad(t, a, k, []byte("v"), storeSwap(t, a, k, 0, []byte("v")))
	})

	t.Run("WatchSlow", func(t *testing.T) {
		a, b := open(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		entered, release, ended := make(chan bool), make(chan bool), make(chan error)
		calls, last := 0, ""
		go func() {
			ended <- a.Watch(ctx, "", func() {
				calls++
				if calls == 1 {
					close(entered)
					<-release
				}
				v, rev, err := a.Load(ctx, "n") // the store may be used
				if err != nil {
					t.Error(err)
				}
				if last = string(v); calls > 1 && last == "50" {
					if _, _, err := a.CompareAndSwap(ctx, "n", rev, nil); err != nil {
						t.Error(err)
					}
					cancel()
				}
			})
		}()
		<-entered
		if err := storeIncrement(t.Context(), b, "n", 50); err != nil {
			t.Fatal(err)
		}
		close(release)
		if err := <-ended; err != nil {
			t.Errorf("Watch = %v, want nil", err)
		}
		if calls != 2 || last != "50" {
			t.Errorf("%d calls and %q for 50 changes during one call, want 2 and 50", calls, last)
		}
	})

	t.Run("WatchNil", func(t *testing.T) {
		a, _ := open(t)
		if err := a.Watch(t.Context(), "", nil); err == nil {
			t.Error("Watch with no function: no error")
		}
	})
}

func storeLoad(t *testing.T, s Store, key string, value []byte, revision uint64) {
	t.Helper()
	v, r, err := s.Load(t.Context(), key)
	if err != nil || !bytes.Equal(v, value) || (v == nil) != (value == nil) || r != revision {
		t.Fatalf("Load(%.40q) = %.40q, %d, %v, want %.40q, %d", key, v, r, err, value, revision)
	}
}

func storeSwap(t *testing.T, s Store, key string, old uint64, value []byte) uint64 {
	t.Helper()
	r, ok, err := s.CompareAndSwap(t.Context(), key, old, value)
	if err != nil || !ok || (r == 0) != (value == nil) || r>>63 != 0 {
		t.Fatalf("CompareAndSwap(%.40q, %d) = %d, %v, %v, want a swap", key, old, r, ok, err)
	}
	return r
}

func storeLose(t *testing.T, s Store, key string, old uint64, value []byte) {
	t.Helper()
	if r, ok, err := s.CompareAndSwap(t.Context(), key, old, value); r != 0 || ok || err != nil {
		t.Fatalf("CompareAndSwap(%.40q, %d) = %d, %v, %v, want 0, false, nil", key, old, r, ok, err)
	}
}

// storeIncrement adds 1 to the number in key, n times.
func storeIncrement(ctx context.Context, s Store, key string, n int) error {
	for n > 0 {
		v, rev, err := s.Load(ctx, key)
		if err != nil {
			return err
		}
		i := 0
		if rev != 0 {
			if i, err = strconv.Atoi(string(v)); err != nil {
				return err
			}
		}
		_, ok, err := s.CompareAndSwap(ctx, key, rev, strconv.AppendInt(nil, int64(i+1), 10))
		if err != nil {
			return err
		}
		if ok {
			n--
		}
	}
	return nil
}

// storeWatch watches until the test ends and passes every hint on.
func storeWatch(t *testing.T, s Store, prefix string) <-chan bool {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	hints, ended := make(chan bool), make(chan error)
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
			t.Errorf("Watch = %v, want nil", err)
		}
	})
	return hints
}

func storeWait(t *testing.T, hints <-chan bool) {
	t.Helper()
	select {
	case <-hints:
	case <-time.After(30 * time.Second):
		t.Fatal("no hint")
	}
}

func TestMemStoreWatchPrefix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := MemStore().(*memStore)
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		calls := map[string]int{}
		for _, prefix := range []string{"", "a", "a/b", "c"} {
			go func() {
				err := s.Watch(ctx, prefix, func() {
					mu.Lock()
					defer mu.Unlock()
					calls[prefix]++
				})
				if err != nil {
					t.Errorf("Watch = %v, want nil", err)
				}
			}()
			synctest.Wait()
		}
		expect := func(want map[string]int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !maps.Equal(calls, want) {
				t.Errorf("calls %v, want %v", calls, want)
			}
			clear(calls)
		}
		expect(map[string]int{"": 1, "a": 1, "a/b": 1, "c": 1})
		rev := storeSwap(t, s, "a/x", 0, []byte("v"))
		expect(map[string]int{"": 1, "a": 1})
		storeLose(t, s, "a/x", rev+1, []byte("v"))
		storeSwap(t, s, "b", 0, nil)
		expect(map[string]int{})
		storeSwap(t, s, "a/x", rev, nil)
		expect(map[string]int{"": 1, "a": 1})
		cancel()
		synctest.Wait()
		if len(s.watchers) != 0 {
			t.Errorf("%d watchers are left", len(s.watchers))
		}
	})
}

// A panic of the callback is the caller's, and leaves nothing behind.
func TestMemStoreWatchPanic(t *testing.T) {
	s := MemStore().(*memStore)
	func() {
		defer func() { recover() }()
		s.Watch(t.Context(), "", func() { panic("changed") })
	}()
	storeSwap(t, s, "k", 0, []byte("v"))
	if len(s.watchers) != 0 {
		t.Errorf("%d watchers are left", len(s.watchers))
	}
}

// Two handles of a store behave as a map with revisions.
func testStoreModel(t *testing.T, open func() (a, b Store)) {
	rapid.Check(t, func(rt *rapid.T) {
		type entry struct {
			value    string
			revision uint64
		}
		a, b := open()
		ctx := context.Background()
		model, used := map[string]entry{}, map[uint64]bool{0: true}
		handle := rapid.SampledFrom([]Store{a, b})
		keys := rapid.SampledFrom([]string{"a", "A", "a/b", strings.Repeat("long", 60), strings.Repeat("long", 61)})
		revs := []uint64{0}
		rt.Repeat(map[string]func(*rapid.T){
			"swap": func(rt *rapid.T) {
				key := keys.Draw(rt, "key")
				old := rapid.SampledFrom(append(revs, model[key].revision)).Draw(rt, "old")
				value := rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(rt, "value")
				if rapid.IntRange(0, 3).Draw(rt, "delete") == 0 {
					value = nil
				}
				rev, ok, err := handle.Draw(rt, "handle").CompareAndSwap(ctx, key, old, value)
				if want := old == model[key].revision; err != nil || ok != want {
					rt.Fatalf("swapped %v, %v, want %v", ok, err, want)
				}
				switch {
				case !ok || value == nil:
					if rev != 0 {
						rt.Fatalf("revision %d, want 0", rev)
					}
					if ok {
						delete(model, key)
					}
				case used[rev]:
					rt.Fatalf("revision %d came twice", rev)
				default:
					used[rev] = true
					revs = append(revs, rev)
					model[key] = entry{string(value), rev}
				}
			},
			"load": func(rt *rapid.T) {
				key := keys.Draw(rt, "key")
				v, rev, err := handle.Draw(rt, "handle").Load(ctx, key)
				if want, ok := model[key]; err != nil || string(v) != want.value || (v != nil) != ok || rev != want.revision {
					rt.Fatalf("Load = %q, %d, %v, want %v", v, rev, err, want)
				}
			},
			"list": func(rt *rapid.T) {
				prefix := rapid.SampledFrom([]string{"", "a", "A", "a/", "long", "b"}).Draw(rt, "prefix")
				got, err := handle.Draw(rt, "handle").List(ctx, prefix)
				want := map[string][]byte{}
				for k, e := range model {
					if strings.HasPrefix(k, prefix) {
						want[k] = []byte(e.value)
					}
				}
				if d := cmp.Diff(want, got); err != nil || d != "" {
					rt.Fatalf("List: %v (-want +got):\n%s", err, d)
				}
			},
		})
	})
}

func TestMemStoreModel(t *testing.T) {
	testStoreModel(t, func() (a, b Store) {
		s := MemStore()
		return s, s
	})
}

func TestStoreRevision(t *testing.T) {
	var or uint64
	seen := map[uint64]bool{}
	for range 1000 {
		r := newStoreRevision(0)
		if r == 0 || seen[r] {
			t.Fatalf("revision %d is 0 or came twice", r)
		}
		seen[r] = true
		or |= r
	}
	if or != 1<<63-1 {
		t.Errorf("the bits used are %x, want 63", or)
	}
}

// A waiting call ends with its context, with the context's error.
func storeTimeout(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want %v", err, context.DeadlineExceeded)
	}
}
