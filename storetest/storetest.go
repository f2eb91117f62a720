// Package storetest checks that a Store of package rollout keeps its contract. It is for the tests of adapters to
// databases, and needs nothing but the standard library.
//
//	func TestStore(t *testing.T) {
//		storetest.Run(t, func(t testing.TB) storetest.Backend {
//			db := newDatabase(t) // a new, empty one
//			return storetest.Backend{Open: func(t testing.TB) storetest.Store { return mystore.New(db) }}
//		})
//	}
//
// A store behind a server should say more in its [Backend], so that it is also tested with connections that break, writes
// that land late, a server that starts again and a database that is set back.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A Store is what is tested. The contract is that of rollout.Store, which has the same methods.
type Store interface {
	Load(ctx context.Context, key string) (value []byte, revision uint64, err error)
	List(ctx context.Context, prefix string) (map[string][]byte, error)
	CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (revision uint64, swapped bool, err error)
	Watch(ctx context.Context, prefix string, changed func()) error
}

// A Backend is one new, empty store, and how to reach it. Only Open is required; what needs a field that is not there is
// skipped. The functions are called from the goroutine of the test, and end it by t.Fatal if they can not do as asked.
type Backend struct {
	// Open returns a handle on the store, as another process would have it. It is called several times, and whatever it
	// opens is closed by t.Cleanup.
	Open func(t testing.TB) Store

	// Addr is the TCP address of the store's server. OpenAt is Open, with a handle that connects to addr instead, and
	// there without TLS. That will be a [Proxy] that forwards to Addr.
	Addr   string
	OpenAt func(t testing.TB, addr string) Store

	// Restart stops the store's server and starts it again, with what it had stored and at the same address. The handles
	// stay in use: their calls may fail for a while.
	Restart func(t testing.TB)

	// Snapshot makes a copy of the store. The function it returns sets the store back to it, as an operator restores a
	// backup. The handles stay in use, as with Restart.
	Snapshot func(t testing.TB) (restore func(t testing.TB))
}

// Run tests the store that open makes. It calls open once for each of its subtests.
func Run(t *testing.T, open func(t testing.TB) Backend) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(t, open(t)) })
	}
}

var cases = []struct {
	name string
	run  func(t testing.TB, b Backend)
}{
	{"Absent", testAbsent},
	{"Create", testCreate},
	{"Replace", testReplace},
	{"Delete", testDelete},
	{"Revisions", testRevisions},
	{"Values", testValues},
	{"Copies", testCopies},
	{"Keys", testKeys},
	{"List", testList},
	{"Fresh", testFresh},
	{"Contention", testContention},
	{"Interrupted", testInterrupted},
	{"Ended", testEnded},
	{"WatchStart", testWatchStart},
	{"WatchChange", testWatchChange},
	{"WatchTurns", testWatchTurns},
	{"WatchEnd", testWatchEnd},
	{"WatchCut", testWatchCut},
	{"LandsLate", testLandsLate},
	{"LandsTooLate", testLandsTooLate},
	{"ReplyLost", testReplyLost},
	{"Restart", testRestart},
	{"Restored", testRestored},
}

// patience is for what should take milliseconds, on a machine that has much else to do.
func patience(t testing.TB) time.Duration {
	if t, ok := t.(interface{ patience() time.Duration }); ok { // in this package's own tests
		return t.patience()
	}
	return 20 * time.Second
}

const soon = 3 * time.Second // for Watch to return once its context has ended

func testAbsent(t testing.TB, b Backend) {
	s := b.Open(t)
	wantLoad(t, s, "k", nil, 0)
	if got, err := s.List(bounded(t), ""); err != nil || len(got) != 0 {
		t.Errorf("List of an empty store = %q, %v", got, err)
	}
	wantRefused(t, s, "k", 7, []byte("v"))
	wantRefused(t, s, "k", 7, nil)
	swap(t, s, "k", 0, nil) // as the caller wants it
	wantLoad(t, s, "k", nil, 0)
	if got, err := s.List(bounded(t), ""); err != nil || len(got) != 0 {
		t.Errorf("List = %q, %v, but nothing was written", got, err)
	}
}

func testCreate(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	rev := swap(t, s, "k", 0, []byte("one"))
	wantLoad(t, s, "k", []byte("one"), rev)
	wantLoad(t, other, "k", []byte("one"), rev)
	for _, s := range []Store{s, other} {
		wantRefused(t, s, "k", 0, []byte("two"))
		wantRefused(t, s, "k", 0, nil)
		wantRefused(t, s, "k", rev+1, []byte("two"))
	}
	wantLoad(t, other, "k", []byte("one"), rev)
}

func testReplace(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	r1 := swap(t, s, "k", 0, []byte("one"))
	unrelated := swap(t, s, "k2", 0, []byte("one"))
	r2 := swap(t, other, "k", r1, []byte("two"))
	wantLoad(t, s, "k", []byte("two"), r2)
	for _, s := range []Store{s, other} {
		wantRefused(t, s, "k", r1, []byte("late"))
		wantRefused(t, s, "k", r1, nil)
		wantRefused(t, s, "k", 0, []byte("late"))
	}
	wantLoad(t, s, "k", []byte("two"), r2)
	wantLoad(t, s, "k2", []byte("one"), unrelated)
}

func testDelete(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	r1 := swap(t, s, "k", 0, []byte("one"))
	r2 := swap(t, s, "k", r1, []byte("two"))
	wantRefused(t, other, "k", r1, nil)
	wantLoad(t, other, "k", []byte("two"), r2)
	swap(t, other, "k", r2, nil)
	for _, s := range []Store{s, other} {
		wantLoad(t, s, "k", nil, 0)
		if got, err := s.List(bounded(t), ""); err != nil || len(got) != 0 {
			t.Errorf("List = %q, %v, but the only key was deleted", got, err)
		}
		wantRefused(t, s, "k", r2, []byte("late"))
		wantRefused(t, s, "k", r2, nil)
		swap(t, s, "k", 0, nil)
	}
	r3 := swap(t, s, "k", 0, []byte("two"))
	wantLoad(t, other, "k", []byte("two"), r3)
	for _, rev := range []uint64{r1, r2} {
		wantRefused(t, other, "k", rev, []byte("late")) // the same value, but not the same revision
	}
	wantLoad(t, other, "k", []byte("two"), r3)
}

func testRevisions(t testing.TB, b Backend) {
	seen := map[uint64]bool{0: true}
	fresh := func(rev uint64) uint64 {
		t.Helper()
		if seen[rev] {
			t.Fatalf("revision %d came twice", rev)
		}
		seen[rev] = true
		return rev
	}
	s := b.Open(t)
	var rev uint64
	for range 10 {
		rev = fresh(swap(t, s, "k", rev, []byte("same")))
	}
	for i := range 5 {
		if rev != 0 {
			swap(t, s, "k", rev, nil)
		}
		if i > 2 { // whatever a handle remembers
			s = b.Open(t)
		}
		rev = fresh(swap(t, s, "k", 0, []byte("same")))
		rev = fresh(swap(t, s, "k", rev, []byte("same")))
	}
}

func testValues(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	values := map[string][]byte{
		"empty": {}, "nul": {0}, "bytes": all, "text": []byte("{\"a\": \"b\\c\"}\r\n"), "not UTF-8": {0xff, 0xfe, 0x80},
		"blank": []byte(" \t\n "), "100k": random(100 << 10), "900k": random(900 << 10), "900k more": random(900 << 10),
	}
	revs := map[string]uint64{}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		revs[name] = swap(t, s, name, 0, values[name])
		wantLoad(t, other, name, values[name], revs[name])
	}
	wantList(t, other, "", values)
	// An empty value takes the place of another, and the other way round, and is not absent.
	rev := swap(t, s, "text", revs["text"], []byte{})
	wantLoad(t, other, "text", []byte{}, rev)
	wantRefused(t, other, "text", 0, []byte("v"))
	rev = swap(t, s, "empty", revs["empty"], values["900k"])
	wantLoad(t, other, "empty", values["900k"], rev)
	rev = swap(t, other, "900k", revs["900k"], []byte{1})
	wantLoad(t, s, "900k", []byte{1}, rev)
}

func testCopies(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	v := []byte("value")
	rev := swap(t, s, "k", 0, v)
	clear(v)
	for _, s := range []Store{s, other} {
		wantLoad(t, s, "k", []byte("value"), rev)
		got, _, err1 := s.Load(bounded(t), "k")
		all, err2 := s.List(bounded(t), "")
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		clear(got)
		clear(all["k"])
		clear(all)
		wantLoad(t, s, "k", []byte("value"), rev)
		wantList(t, s, "", map[string][]byte{"k": []byte("value")})
	}
}

var oddKeys = []string{
	"a", "A", "a/b", "a/b/c", "a/B", "a//b", "a/", "/", "//", "/a", "a.b", "a..b", "a.", ".", "..", ".a", "../a", "./a",
	"*", "a*", "a/*", ">", "a/>", "a.>", "%", "%41", "%2f", "=", "=41", "==", "_", "-", "~", "a b", " a", "a ", "a\tb", "a\nb", "a\\b",
	"'", `"`, "a'b", "$1", "?", "#", ":", "{a}", "ä", "日本", "a\u0308", "\u2028", "\x01", "\x7f", "\xff", "a\xff", "\xff\xff", "\xc3",
	"null", "NULL", "rollout/x/state", "rollout/x/evidence/host-1",
}

func testKeys(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	keys := slices.Clone(oddKeys)
	for _, c := range []string{"l", "L", "/", ".", "\xfe", "ä", "*", " "} {
		keys = append(keys, strings.Repeat(c, 1024/len(c)))
	}
	long := strings.Repeat("long/", 204)
	keys = append(keys, long, long+"1", long+"2", long+"1234", long[:1000])
	for _, k := range keys {
		wantLoad(t, other, k, nil, 0)
		rev := swap(t, s, k, 0, []byte("value of "+k))
		wantLoad(t, other, k, []byte("value of "+k), rev)
	}
	want := map[string][]byte{}
	for _, k := range keys {
		want[k] = []byte("value of " + k)
	}
	wantList(t, other, "", want)
	for _, k := range keys[:len(keys)/2] {
		_, rev, err := other.Load(bounded(t), k)
		if err != nil {
			t.Fatal(err)
		}
		swap(t, other, k, rev, nil)
		delete(want, k)
	}
	wantList(t, s, "", want)
}

func testList(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	long := strings.Repeat("long/", 204)
	keys := append(slices.Clone(oddKeys), long, long+"1", long+"2", long[:1000])
	for _, k := range keys {
		swap(t, s, k, 0, []byte("value of "+k))
	}
	prefixes := append(slices.Clone(keys), "", "b", "a/b/", "rollout", "rollout/", "rollout/x", "rollout/x/", "rollout/x/ev", "rollout/x/evidence/",
		"rollout/x/evidence/host-10", "%4", "=4", "\xe6", "\xe6\x97", long[:700], long+"12", strings.Repeat("z", 2000), "a\x00")
	for _, prefix := range prefixes {
		want := map[string][]byte{}
		for _, k := range keys {
			if strings.HasPrefix(k, prefix) {
				want[k] = []byte("value of " + k)
			}
		}
		wantList(t, other, prefix, want)
	}
}

// A write is seen by every call that begins after it was acknowledged.
func testFresh(t testing.TB, b Backend) {
	handles := []Store{b.Open(t), b.Open(t), b.Open(t)}
	var rev uint64
	for i := range 60 {
		var v []byte
		if i%5 != 4 {
			v = strconv.AppendInt(nil, int64(i), 10)
		}
		rev = swap(t, handles[i%3], "f/k", rev, v)
		want := map[string][]byte{}
		if v != nil {
			want["f/k"] = v
		}
		wantList(t, handles[(i+1)%3], "f/", want)
		wantLoad(t, handles[(i+2)%3], "f/k", v, rev)
		wantList(t, handles[i%3], "", want)
	}
}

func testContention(t testing.TB, b Backend) {
	handles := []Store{b.Open(t), b.Open(t)}
	ctx := bounded(t)
	var refused atomic.Int64
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s := handles[i%2]
			for range 25 {
				for {
					n, rev, err := loadNumber(ctx, s, "n")
					if err != nil {
						t.Error(err)
						return
					}
					runtime.Gosched()
					_, ok, err := s.CompareAndSwap(ctx, "n", rev, strconv.AppendInt(nil, int64(n+1), 10))
					if err != nil {
						t.Errorf("CompareAndSwap: %v", err)
						return
					}
					if ok {
						break
					}
					refused.Add(1)
				}
			}
		})
	}
	wg.Wait()
	for _, s := range handles {
		if n, _, err := loadNumber(ctx, s, "n"); err != nil || n != 200 {
			t.Errorf("8 times 25 increments made %d, %v", n, err)
		}
	}
	t.Logf("%d writes refused", refused.Load())
}

// Writers whose contexts end at any time, and who then look for their own write, lose none and do none twice.
func testInterrupted(t testing.TB, b Backend) {
	handles := []Store{b.Open(t), b.Open(t)}
	ctx := bounded(t)
	var unknown atomic.Int64
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			s := handles[i%2]
			wait := 20 * time.Microsecond
			for j := range 20 {
				short := func() (context.Context, context.CancelFunc) { // so short that some end in flight, whatever the store
					wait = min(wait*5/4, 200*time.Millisecond)
					return context.WithTimeout(ctx, rand.N(wait))
				}
				err := appendOnce(ctx, s, "log", fmt.Sprintf("%d-%d", i, j), short, &unknown)
				wait = max(wait/4, 20*time.Microsecond)
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	v, _, err := handles[0].Load(ctx, "log")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, id := range strings.Fields(string(v)) {
		seen[id]++
	}
	for i := range 4 {
		for j := range 20 {
			if id := fmt.Sprintf("%d-%d", i, j); seen[id] != 1 {
				t.Errorf("write %s was done %d times", id, seen[id])
			}
		}
	}
	t.Logf("%d writes interrupted", unknown.Load())
}

// appendOnce adds id to the words in key, by writes within contexts that short makes.
func appendOnce(ctx context.Context, s Store, key, id string, short func() (context.Context, context.CancelFunc), unknown *atomic.Int64) error {
	for inDoubt := false; ; {
		v, rev, err := s.Load(ctx, key)
		if err != nil {
			return fmt.Errorf("loading: %w", err)
		}
		if inDoubt && slices.Contains(strings.Fields(string(v)), id) {
			return nil
		}
		c, cancel := short()
		_, ok, err := s.CompareAndSwap(c, key, rev, fmt.Appendf(nil, "%s %s", v, id))
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			inDoubt = true
			unknown.Add(1)
		case ok:
			return nil
		}
	}
}

func testEnded(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	rev := swap(t, s, "k", 0, []byte("v"))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	expired, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	for _, ctx := range []context.Context{cancelled, expired} {
		if _, _, err := s.Load(ctx, "k"); !errors.Is(err, ctx.Err()) {
			t.Errorf("Load: %v, want %v", err, ctx.Err())
		}
		if _, err := s.List(ctx, ""); !errors.Is(err, ctx.Err()) {
			t.Errorf("List: %v, want %v", err, ctx.Err())
		}
		for key, old := range map[string]uint64{"k": rev, "new": 0} {
			for _, v := range [][]byte{[]byte("v2"), nil} {
				if _, ok, err := s.CompareAndSwap(ctx, key, old, v); ok || !errors.Is(err, ctx.Err()) {
					t.Errorf("CompareAndSwap: %v, %v, want %v", ok, err, ctx.Err())
				}
			}
		}
		begun := time.Now()
		if err := s.Watch(ctx, "", func() {}); err != nil || time.Since(begun) > soon {
			t.Errorf("Watch: %v after %v, want nil at once", err, time.Since(begun))
		}
	}
	for range 3 { // not a little later, either
		wantLoad(t, other, "k", []byte("v"), rev)
		wantLoad(t, other, "new", nil, 0)
	}
}
