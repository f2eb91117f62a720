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
	"bytes"
	"context"
	crand "crypto/rand"
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

func testWatchStart(t testing.TB, b Backend) {
	s := b.Open(t)
	for _, prefix := range []string{"", "a", "a/", "a/b", "*", "a.b/>", "ä", "\xff", " ", strings.Repeat("l/", 512)} {
		waitHint(t, watch(t, s, prefix), "at the start")
	}
}

func testWatchChange(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	key := "w/a.b/k *"
	seen := map[string]<-chan uint64{}
	for _, prefix := range []string{"", "w", "w/", "w/a", "w/a.b/k ", key} {
		seen[prefix] = watchLoad(t, s, prefix, key)
	}
	wait := func(rev uint64, which string) {
		t.Helper()
		for prefix, seen := range seen {
			waitSeen(t, seen, rev, fmt.Sprintf("under %q %s", prefix, which))
		}
	}
	wait(0, "at the start")
	var rev uint64
	for i, v := range [][]byte{[]byte("v1"), []byte("v2"), {}, nil, []byte("v1"), random(300 << 10)} {
		rev = swap(t, other, key, rev, v)
		if i == 1 { // what is under no watched prefix may be told of
			swap(t, other, "other", 0, []byte("v"))
		}
		wait(rev, fmt.Sprintf("of change %d", i))
	}
}

// The function is called by the goroutine that called Watch alone, may be slow, and may use the store.
func testWatchTurns(t testing.TB, b Backend) {
	s, other := b.Open(t), b.Open(t)
	ctx, cancel := context.WithCancel(bounded(t))
	defer cancel()
	entered, release, ended := make(chan bool), make(chan bool), make(chan error, 1)
	calls := 0
	go func() {
		ended <- callWatch(ctx, s, func() {
			if !inCallWatch() {
				t.Error("called from another goroutine than the one that called Watch")
				runtime.Goexit()
			}
			if calls++; calls == 1 {
				close(entered)
				<-release
				return
			}
			n, rev, err := loadNumber(ctx, s, "n")
			if err != nil {
				if ctx.Err() == nil {
					t.Error(err)
				}
				return
			}
			if n == 30 {
				if _, ok, err := s.CompareAndSwap(ctx, "n", rev, nil); !ok || err != nil {
					t.Error("deleting in the function:", ok, err)
				}
				cancel()
			}
		})
	}()
	select {
	case <-entered:
	case <-time.After(patience(t)):
		t.Fatal("no hint at the start")
	}
	var rev uint64
	for i := range 30 {
		rev = swap(t, other, "n", rev, strconv.AppendInt(nil, int64(i+1), 10))
	}
	close(release)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Watch = %v, want nil", err)
		}
	case <-time.After(patience(t)):
		t.Fatal("no hint after the changes that came during a call")
	}
	wantLoad(t, other, "n", nil, 0)
	t.Logf("%d calls for 30 changes", calls-1)
}

func callWatch(ctx context.Context, s Store, changed func()) error { return s.Watch(ctx, "", changed) }

// inCallWatch reports whether callWatch is among its callers.
func inCallWatch() bool {
	pcs := make([]uintptr, 100)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(0, pcs)])
	for {
		frame, more := frames.Next()
		if strings.HasSuffix(frame.Function, ".callWatch") {
			return true
		}
		if !more {
			return false
		}
	}
}

func testWatchEnd(t testing.TB, b Backend) {
	s := b.Open(t)
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		hints, ended := make(chan bool, 100), make(chan error, 1)
		go func() {
			ended <- s.Watch(ctx, "w/", func() {
				select {
				case hints <- true:
				default:
				}
			})
		}()
		select {
		case <-hints:
		case err := <-ended:
			cancel()
			t.Fatalf("Watch = %v before its context ended", err)
		case <-time.After(patience(t)):
			cancel()
			t.Fatal("no hint at the start")
		}
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Watch = %v, want nil", err)
			}
		case <-time.After(soon):
			t.Fatalf("Watch has not returned %v after its context ended", soon)
		}
	}
}

// proxied returns a handle that reaches the store through a proxy.
func proxied(t testing.TB, b Backend) (*Proxy, Store) {
	t.Helper()
	if b.Addr == "" || b.OpenAt == nil {
		t.Skip("the backend has no Addr or no OpenAt")
	}
	p := NewProxy(t, b.Addr)
	return p, b.OpenAt(t, p.Addr())
}

// There is a hint once the connection is back, however it was lost, and there are hints of changes from then on.
func testWatchCut(t testing.TB, b Backend) {
	p, s := proxied(t, b)
	direct := b.Open(t)
	rev := swap(t, direct, "w/k", 0, []byte("before"))
	hints, seen := watch(t, s, "w/"), watchLoad(t, s, "w/", "w/k")
	waitHint(t, hints, "at the start")
	waitSeen(t, seen, rev, "at the start")
	for _, refuse := range []bool{false, true, false} {
		drain(hints)
		p.Refuse(refuse)
		p.Cut()
		if refuse {
			rev = swap(t, direct, "w/k", rev, []byte("meanwhile"))
			p.Refuse(false)
		}
		begun := time.Now()
		select {
		case <-hints:
		case <-time.After(patience(t) / 10): // it may not have been connected yet
			p.Cut()
			waitHint(t, hints, "after the connection was lost")
		}
		if refuse {
			waitSeen(t, seen, rev, "of a change while there was no connection")
		}
		t.Logf("a hint %v after the connection could be made again", time.Since(begun).Round(time.Millisecond))
		eventually(t, "the connection is back", func(ctx context.Context) error {
			_, _, err := s.Load(ctx, "w/k")
			return err
		})
		wantLoad(t, s, "w/k", []byte(map[bool]string{false: "before", true: "meanwhile"}[refuse]), rev)
		rev = swap(t, direct, "w/k", rev, []byte("before"))
		waitSeen(t, seen, rev, "of a change after the connection was lost")
	}
}

// A write on the way, which its writer has given up, is done.
func testLandsLate(t testing.TB, b Backend) {
	p, slow := proxied(t, b)
	other := b.Open(t)
	rev := interrupt(t, p, slow, p.HoldRequests)
	wantLoad(t, other, "k", []byte("first"), rev)
	p.Release()
	var late uint64
	landed := func() bool {
		v, r, err := other.Load(bounded(t), "k")
		late = r
		return err == nil && string(v) == lateValue
	}
	for begun := time.Now(); !landed(); {
		if time.Since(begun) > soon {
			t.Skip("the write did not land")
		}
		time.Sleep(time.Millisecond)
	}
	if late == rev {
		t.Fatalf("the late write has the revision of the value it replaced")
	}
	wantRefused(t, other, "k", rev, []byte("stale"))
	findsLate(t, slow, rev, late)
}

// A write on the way, which its writer has given up, is refused if another was first.
func testLandsTooLate(t testing.TB, b Backend) {
	p, slow := proxied(t, b)
	other := b.Open(t)
	rev := interrupt(t, p, slow, p.HoldRequests)
	second := swap(t, other, "k", rev, []byte("second"))
	p.Release()
	eventually(t, "the slow writer's connection is back", func(ctx context.Context) error {
		_, _, err := slow.Load(ctx, "k")
		return err
	})
	for range 20 {
		wantLoad(t, other, "k", []byte("second"), second)
		wantLoad(t, slow, "k", []byte("second"), second)
	}
	swap(t, slow, "k", second, []byte("third"))
}

// A write is done, but its writer does not hear of it.
func testReplyLost(t testing.TB, b Backend) {
	p, slow := proxied(t, b)
	other := b.Open(t)
	rev := interrupt(t, p, slow, p.HoldReplies)
	var late uint64
	eventually(t, "the write is done", func(ctx context.Context) error {
		v, r, err := other.Load(ctx, "k")
		if late = r; err == nil && string(v) != lateValue {
			err = fmt.Errorf("it is %q", v)
		}
		return err
	})
	p.Cut()
	p.Release()
	findsLate(t, slow, rev, late)
}

// findsLate has the writer find the write that it gave up, which has replaced revision rev, and go on from there.
func findsLate(t testing.TB, writer Store, rev, late uint64) {
	t.Helper()
	eventually(t, "the writer finds its write", func(ctx context.Context) error {
		v, r, err := writer.Load(ctx, "k")
		if err == nil && (string(v) != lateValue || r != late) {
			err = fmt.Errorf("it is %q, %d, want %d", v, r, late)
		}
		return err
	})
	wantRefused(t, writer, "k", rev, []byte("again"))
	swap(t, writer, "k", late, []byte("next"))
}

const lateValue = "the-late-value-of-a-writer-who-gave-up"

// interrupt writes lateValue in place of "first" through slow, with hold in effect, and cancels that write once it is held.
// It returns the revision of "first".
func interrupt(t testing.TB, p *Proxy, slow Store, hold func(mark string)) uint64 {
	t.Helper()
	rev := swap(t, slow, "k", swap(t, slow, "k", 0, []byte("zeroth")), []byte("first"))
	hold(lateValue)
	ctx, cancel := context.WithCancel(bounded(t))
	defer cancel()
	type result struct {
		rev uint64
		ok  bool
		err error
	}
	done := make(chan result, 1)
	go func() {
		r, ok, err := slow.CompareAndSwap(ctx, "k", rev, []byte(lateValue))
		done <- result{r, ok, err}
	}()
	for begun := time.Now(); p.Held() == 0; time.Sleep(time.Millisecond) {
		select {
		case r := <-done:
			if r.err == nil && r.ok {
				t.Skip("the value is not in the store's requests as it is, so that none can be held")
			}
			t.Fatalf("CompareAndSwap = %d, %v, %v while its request or reply was held", r.rev, r.ok, r.err)
		default:
		}
		if time.Since(begun) > patience(t) {
			t.Fatal("no request or reply to hold came")
		}
	}
	cancel()
	select {
	case r := <-done:
		if r.ok || r.err == nil {
			t.Fatalf("CompareAndSwap = %d, %v, %v, but nobody can know the outcome: want an error", r.rev, r.ok, r.err)
		}
	case <-time.After(patience(t)):
		t.Fatal("CompareAndSwap has not returned though its context has ended")
	}
	return rev
}

// What was acknowledged outlives the server; handles and watchers find it again.
func testRestart(t testing.TB, b Backend) {
	if b.Restart == nil {
		t.Skip("the backend has no Restart")
	}
	s, other := b.Open(t), b.Open(t)
	seen := map[uint64]bool{}
	rev := swap(t, s, "w/k", 0, []byte("one"))
	gone := swap(t, s, "w/gone", 0, []byte("one"))
	seen[rev], seen[gone] = true, true
	swap(t, s, "w/gone", gone, nil)
	hints, saw := watch(t, s, "w/"), watchLoad(t, s, "w/", "w/k")
	waitHint(t, hints, "at the start")
	waitSeen(t, saw, rev, "at the start")
	for range 2 {
		drain(hints)
		b.Restart(t)
		begun := time.Now()
		waitHint(t, hints, "after the restart")
		t.Logf("a hint %v after the restart", time.Since(begun).Round(time.Millisecond))
		for _, s := range []Store{s, other} {
			eventually(t, "the store is back", func(ctx context.Context) error {
				_, _, err := s.Load(ctx, "w/k")
				return err
			})
			wantLoad(t, s, "w/k", []byte("one"), rev)
			wantLoad(t, s, "w/gone", nil, 0)
			wantList(t, s, "", map[string][]byte{"w/k": []byte("one")})
		}
		swap(t, s, "w/k", rev, nil)
		rev = swap(t, other, "w/k", 0, []byte("one"))
		waitSeen(t, saw, rev, "of a change after the restart") // the hints go on
		again := swap(t, other, "w/gone", 0, []byte("one"))
		if seen[rev] || seen[again] {
			t.Errorf("revision %d or %d came twice", rev, again)
		}
		seen[rev], seen[again] = true, true
		swap(t, s, "w/gone", again, nil)
	}
}

// A store that is set back gives other revisions to what it writes then.
func testRestored(t testing.TB, b Backend) {
	if b.Snapshot == nil {
		t.Skip("the backend has no Snapshot")
	}
	s, other := b.Open(t), b.Open(t)
	r1 := swap(t, s, "k", 0, []byte("one"))
	restore := b.Snapshot(t)
	seen := map[uint64]bool{r1: true}
	rev := r1
	for range 5 {
		rev = swap(t, s, "k", rev, []byte("lost"))
		seen[rev] = true
	}
	created := swap(t, s, "new", 0, []byte("lost"))
	seen[created] = true
	restore(t)
	for _, s := range []Store{s, other} {
		eventually(t, "the store is back as it was", func(ctx context.Context) error {
			v, r, err := s.Load(ctx, "k")
			if err == nil && (string(v) != "one" || r != r1) {
				err = fmt.Errorf("it is %q, %d, want %q, %d", v, r, "one", r1)
			}
			return err
		})
		wantLoad(t, s, "new", nil, 0)
	}
	next := r1
	for i := range 8 { // past every sequence that the lost writes had
		next = swap(t, other, "k", next, fmt.Append(nil, i))
		if seen[next] {
			t.Fatalf("revision %d came twice", next)
		}
		wantRefused(t, s, "k", rev, []byte("stale"))
		wantRefused(t, s, "k", r1, []byte("stale"))
	}
	if r := swap(t, other, "new", 0, []byte("v")); seen[r] {
		t.Errorf("revision %d came twice", r)
	}
	wantRefused(t, s, "new", created, []byte("stale"))
}

// bounded returns a context for a call that should take milliseconds.
func bounded(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience(t))
	t.Cleanup(cancel)
	return ctx
}

func random(n int) []byte {
	b := make([]byte, n)
	crand.Read(b) // never fails, see its documentation
	return b
}

func wantLoad(t testing.TB, s Store, key string, value []byte, revision uint64) {
	t.Helper()
	v, r, err := s.Load(bounded(t), key)
	if err != nil || !bytes.Equal(v, value) || (v == nil) != (value == nil) || r != revision {
		t.Fatalf("Load(%.40q) = %s, %d, %v, want %s, %d", key, show(v), r, err, show(value), revision)
	}
}

func wantList(t testing.TB, s Store, prefix string, want map[string][]byte) {
	t.Helper()
	got, err := s.List(bounded(t), prefix)
	if err != nil {
		t.Fatalf("List(%.40q): %v", prefix, err)
	}
	for k, v := range want {
		if g, ok := got[k]; !ok {
			t.Fatalf("List(%.40q) is without key %.40q", prefix, k)
		} else if g == nil || !bytes.Equal(g, v) {
			t.Fatalf("List(%.40q) has %s for key %.40q, want %s", prefix, show(g), k, show(v))
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Fatalf("List(%.40q) has key %.40q, which should not be there", prefix, k)
		}
	}
}

func swap(t testing.TB, s Store, key string, old uint64, value []byte) uint64 {
	t.Helper()
	r, ok, err := s.CompareAndSwap(bounded(t), key, old, value)
	if err != nil || !ok || (r == 0) != (value == nil) {
		t.Fatalf("CompareAndSwap(%.40q, %d, %s) = %d, %v, %v, want a swap", key, old, show(value), r, ok, err)
	}
	return r
}

func wantRefused(t testing.TB, s Store, key string, old uint64, value []byte) {
	t.Helper()
	if r, ok, err := s.CompareAndSwap(bounded(t), key, old, value); r != 0 || ok || err != nil {
		t.Fatalf("CompareAndSwap(%.40q, %d, %s) = %d, %v, %v, want 0, false, nil", key, old, show(value), r, ok, err)
	}
}

func show(v []byte) string {
	if v == nil {
		return "nil"
	}
	if len(v) > 40 {
		return fmt.Sprintf("%q... of %d bytes", v[:40], len(v))
	}
	return fmt.Sprintf("%q", v)
}

func loadNumber(ctx context.Context, s Store, key string) (n int, rev uint64, err error) {
	v, rev, err := s.Load(ctx, key)
	if err == nil && rev != 0 {
		n, err = strconv.Atoi(string(v))
	}
	if err != nil {
		err = fmt.Errorf("loading: %w", err)
	}
	return n, rev, err
}

// watch watches until the test ends. The channel holds a value while a hint has come that nobody waited for.
func watch(t testing.TB, s Store, prefix string) <-chan bool {
	t.Helper()
	hints := make(chan bool, 1)
	watchFunc(t, s, prefix, func(context.Context) {
		select {
		case hints <- true:
		default:
		}
	})
	return hints
}

// watchLoad loads key at each hint, until there is no error. The channel holds the revision seen last, until it is received.
func watchLoad(t testing.TB, s Store, prefix, key string) <-chan uint64 {
	t.Helper()
	seen := make(chan uint64, 1)
	watchFunc(t, s, prefix, func(ctx context.Context) {
		_, rev, err := s.Load(ctx, key)
		for ; err != nil; _, rev, err = s.Load(ctx, key) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
		select {
		case <-seen:
		default:
		}
		seen <- rev
	})
	return seen
}

func watchFunc(t testing.TB, s Store, prefix string, changed func(ctx context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Watch(ctx, prefix, func() { changed(ctx) }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Watch = %v, want nil", err)
			}
		case <-time.After(soon):
			t.Errorf("Watch has not returned %v after its context ended", soon)
		}
	})
}

func waitHint(t testing.TB, hints <-chan bool, which string) {
	t.Helper()
	select {
	case <-hints:
	case <-time.After(patience(t)):
		t.Fatalf("no hint %s", which)
	}
}

// waitSeen waits until a Load made at a hint saw rev.
func waitSeen(t testing.TB, seen <-chan uint64, rev uint64, which string) {
	t.Helper()
	for end := time.After(patience(t)); ; {
		select {
		case got := <-seen:
			if got == rev {
				return
			}
		case <-end:
			t.Fatalf("no hint %s, or one so early that a Load then does not see it", which)
		}
	}
}

// drain waits until the hints of what was done before have come: none is then taken for one of what comes next.
// A Watch that hints all the time is not waited for.
func drain(hints <-chan bool) {
	for end := time.After(time.Second); ; {
		select {
		case <-hints:
		case <-time.After(100 * time.Millisecond):
			return
		case <-end:
			return
		}
	}
}

// eventually calls f until it returns no error. Each call has a short time, so that one on a dead connection holds up nothing.
func eventually(t testing.TB, what string, f func(ctx context.Context) error) {
	t.Helper()
	begun := time.Now()
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		err := f(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Since(begun) > patience(t) {
			t.Fatalf("not yet after %v: %s: %v", patience(t), what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
