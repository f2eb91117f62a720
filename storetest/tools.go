package storetest

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"fmt"
	"strconv"
	"testing"
	"time"
)

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
		wantEnded(t, ended)
	})
}

// wantEnded checks that a Watch whose context has ended returns soon, without an error.
func wantEnded(t testing.TB, ended <-chan error) {
	t.Helper()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Watch = %v, want nil", err)
		}
	case <-time.After(soon):
		t.Errorf("Watch has not returned %v after its context ended", soon)
	}
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
