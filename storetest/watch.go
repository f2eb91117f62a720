package storetest

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

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
		if wantEnded(t, ended); t.Failed() {
			return
		}
	}
}
