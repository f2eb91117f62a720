package rollout

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Every outcome is consumed exactly once, whatever becomes of writes, processes and epochs.

// accounts lets the last block close, and compares what was decided with what the first gate has consumed.
func (p *process) accounts(at string) {
	p.t.Helper()
	minute()
	minute()
	var recorded uint64
	s := p.Status()
	for _, ring := range s.Rings {
		recorded += ring.Candidate + ring.Control
	}
	if consumed := s.Gates[0].Candidate.N + s.Gates[0].Control.N; recorded == 0 || consumed != recorded {
		p.t.Errorf("%s: %d outcomes were recorded, %d consumed", at, recorded, consumed)
	}
}

// late is a Store that gives no answer to some writes, and makes them later: before a Load or before the next write.
type late struct {
	Store
	lands string // "before a look", "before a write" or "never"

	mu     sync.Mutex
	writes int
	looks  int
	held   func() bool
	landed int
	lost   int
}

func (s *late) landLocked() {
	if held := s.held; held != nil {
		s.held = nil
		if held() {
			s.landed++
		} else {
			s.lost++
		}
	}
}

func (s *late) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	s.mu.Lock()
	if s.looks++; s.looks > 1 && s.lands == "before a look" { // the first is the one that asks whether it has landed
		s.landLocked()
	}
	s.mu.Unlock()
	return s.Store.Load(ctx, key)
}

func (s *late) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lands == "never" && s.held != nil {
		s.held = nil
		s.lost++
	}
	s.landLocked()
	if s.writes++; s.writes%3 == 2 {
		s.looks = 0
		s.held = func() bool {
			_, ok, err := s.Store.CompareAndSwap(context.WithoutCancel(ctx), key, old, value)
			return ok && err == nil
		}
		return 0, false, errDown
	}
	return s.Store.CompareAndSwap(ctx, key, old, value)
}

// TestLateWrites: a write without an answer is consumed once, whether it lands at last or not.
func TestLateWrites(t *testing.T) {
	for _, lands := range []string{"before a look", "before a write", "never"} {
		synctest.Test(t, func(t *testing.T) {
			store := &late{Store: MemStore(), lands: lands}
			r := start(t, "x", threeStages(), Options{Store: store})
			r.serve(3*time.Minute, .01, .01)
			r.accounts(lands)
			store.mu.Lock()
			if lands == "never" && store.lost < 5 || lands != "never" && store.landed < 5 {
				t.Errorf("%s: %d landed late, %d never: the test shows nothing", lands, store.landed, store.lost)
			}
			store.mu.Unlock()
			r.until(RolledBack, .01, .5)
		})
	}
}

// TestNextRun: a Rollout whose Run ended with a write in doubt and runs again neither loses evidence nor doubles it.
func TestNextRun(t *testing.T) {
	for _, between := range []string{"nothing", "it lands", "it is lost", "another writer"} {
		synctest.Test(t, func(t *testing.T) {
			store := MemStore()
			f := &faulty{Store: store}
			r := lone(t, threeStages(), Options{Store: f})
			p := runs(t, r)
			for range 4 {
				p.serve(11*time.Second, .01, .01)
				switch between {
				case "it lands":
					f.set(nil, nil, func() error { f.set(down, down, nil); return errDown })
				case "it is lost", "another writer":
					f.set(nil, down, nil)
				}
				p.serve(7*time.Second, .01, .01)
				p.stop()
				p.serve(time.Second, .01, .01) // decisions are given without a Run as well
				if doubt := r.clock.doubt != nil || r.pub.pending != nil; doubt != (between != "nothing") {
					t.Fatalf("%s: in doubt is %v: the test shows nothing", between, doubt)
				}
				if between == "another writer" {
					other := lone(t, threeStages(), Options{Store: store})
					must(t, other.Hold(t.Context(), "wait"))
					must(t, other.Resume(t.Context(), "on"))
				}
				f.set(nil, nil, nil)
				if between == "nothing" { // the first write of the next Run is lost
					f.set(nil, down, nil)
				}
				p = runs(t, r)
				p.serve(7*time.Second, .01, .01)
				f.set(nil, nil, nil)
			}
			p.accounts(between)
			p.until(RolledBack, .01, .5)
		})
	}
}

// TestEpochsBetweenTicks: evidence of an epoch that ended while nothing was evaluated counts, Never included.
func TestEpochsBetweenTicks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := NewRate("bad")
		p := threeStages()
		p.Gates = append(p.Gates, bad.Never().OnFail(Report))
		r := lone(t, p, Options{Store: MemStore()})
		proc := runs(t, r)
		proc.serve(12*time.Second, 0, 0)
		proc.stop()
		proc.serve(10*time.Second, 0, 0)
		for i := 0; ; i++ {
			if d := r.Decide(Unit{Key: string(rune('a' + i))}); d.Enabled() {
				d.Record(Errors.Observe(false), bad.Observe(true))
				break
			} else {
				d.Record(Errors.Observe(false))
			}
		}
		for _, percent := range []Percent{11, 12, 13} {
			must(t, r.SetPercent(t.Context(), Everyone, percent, "up"))
		}
		again := runs(t, r)
		again.accounts("three epochs later")
		never := r.Status().Gates[2]
		if never.Verdict != Unhealthy || never.Candidate.Events != 1 || r.Status().Late != 0 {
			t.Errorf("Never is %+v, late are %d", never, r.Status().Late)
		}
	})
}

// TestLeaseKeepsEvidence: what was recorded before a lease ended is consumed when the Store is back.
func TestLeaseKeepsEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &faulty{Store: MemStore()}
		r := start(t, "x", threeStages(), Options{Store: f, Lease: time.Minute})
		for range 3 {
			r.serve(12*time.Second, .01, .01)
			f.set(down, down, nil)
			r.serve(20*time.Second, .01, .01)
			minute()
			if served(r.Rollout) {
				t.Fatal("exposed after the lease is over")
			}
			f.set(nil, nil, nil)
			minute()
			if !served(r.Rollout) {
				t.Fatal("the Store is back, the candidate is not")
			}
		}
		r.accounts("three leases later")
		if late := r.Status().Late; late != 0 {
			t.Errorf("%d came late", late)
		}
	})
}

// TestLastBlocks: the last tick of a Run stores what there is, however little.
func TestLastBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := MemStore()
		r := start(t, "x", threeStages(), Options{Store: store})
		r.serve(300*time.Millisecond, 0, 0)
		r.stop()
		gate := inStore(t, store).Gates.Gates["errors.Within(2)"]
		if gate == nil || gate.Parts[Everyone] == nil || gate.Parts[Everyone].Candidate.N+gate.Parts[Everyone].Control.N != 3 {
			t.Errorf("of 3 outcomes stored are %+v", gate)
		}
	})
}
