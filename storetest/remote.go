package storetest

import (
	"context"
	"fmt"
	"testing"
	"time"
)

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
