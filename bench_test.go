package rollout

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/machine"
)

var (
	longIDs  = ids("%08x-0000-4000-8000-%012x")
	shortIDs = ids("%04x%04x")
	sink     uint64
)

// ids are many enough not to sit in the caches.
func ids(format string) []string {
	s := make([]string, 1<<16)
	for i := range s {
		s[i] = fmt.Sprintf(format, uint32(i)*2654435761, i)
	}
	return s
}

// running is a rollout with three rings in the middle of its ladder, without a Run.
func running(tb testing.TB, name string) *Rollout {
	tb.Helper()
	r := Must(name, Policy{
		Rings:    []Ring{{Name: "staff"}, {Name: "beta"}},
		Stages:   []Stage{{Ring: "staff", Percent: 50}, {Ring: "beta", Percent: 50}, {Percent: 25}, {Percent: 100}},
		Bake:     time.Minute,
		Holdback: 5,
		Gates:    []Gate{Errors.Within(1), Errors.AtMost(10), Latency.Quantile(0.99).WithinFactor(1.2)},
	}, &Options{Logger: slog.New(slog.DiscardHandler)})
	ctx := context.Background()
	for _, stage := range []string{"staff 50 %", "beta 50 %"} {
		if err := r.startForTest(ctx); err != nil {
			tb.Fatal(err)
		}
		if err := r.Advance(ctx, stage, "test"); err != nil {
			tb.Fatal(err)
		}
	}
	return r
}

// startForTest does what the first tick of Run does.
func (r *Rollout) startForTest(ctx context.Context) error {
	_, err := r.update(ctx, func(s *machine.State, _ machine.Standing) ([]machine.Event, error) {
		if s.Phase != machine.Pending {
			return nil, nil
		}
		return machine.Step(s, r.plan, machine.Input{Now: time.Now(), MayAdvance: true}), nil
	})
	return err
}

func BenchmarkFloorXXH64(b *testing.B)      { floor(b, longIDs) }
func BenchmarkFloorXXH64Short(b *testing.B) { floor(b, shortIDs) }
func BenchmarkDecide(b *testing.B)          { decide(b, longIDs) }
func BenchmarkDecideShort(b *testing.B)     { decide(b, shortIDs) }

func floor(b *testing.B, ids []string) {
	var h uint64
	for i := 0; b.Loop(); i++ {
		h += xxhash.Sum64String(ids[i%len(ids)])
	}
	sink = h
}

// decide adds the answers up without a branch. One that depends on a hash cannot be foreseen, whoever makes the answer:
// that costs some nanoseconds, and is the caller's. See BenchmarkDecideAndBranch.
func decide(b *testing.B, ids []string) {
	r := running(b, "bench")
	b.ReportAllocs()
	on := uint64(0)
	for i := 0; b.Loop(); i++ {
		on += uint64(r.Decide(Unit{Key: ids[i%len(ids)]}).bits & enabledBit)
	}
	sink = on
}

func BenchmarkDecideAndBranch(b *testing.B) {
	r := running(b, "bench")
	on := uint64(0)
	for i := 0; b.Loop(); i++ {
		if r.Decide(Unit{Key: longIDs[i%len(longIDs)]}).Enabled() {
			on++
		}
	}
	sink = on
}

// BenchmarkDecideSecond asks a second rollout for the unit of a request that asked another one before: what is decided,
// counted and kept for the request, each time anew.
func BenchmarkDecideSecond(b *testing.B) {
	first, second := running(b, "first"), running(b, "second")
	request := &scope{Context: context.Background(), unit: Unit{Key: longIDs[1]}}
	ctx := context.Context(request)
	first.Enabled(ctx)
	on := uint64(0)
	b.ReportAllocs()
	for b.Loop() {
		request.pins[1] = atomic.Pointer[snapshot]{}
		if second.Enabled(ctx) {
			on++
		}
	}
	sink = on
}

// BenchmarkDecideAgain asks a rollout that has answered in the request.
func BenchmarkDecideAgain(b *testing.B) {
	first, second := running(b, "first"), running(b, "second")
	ctx := NewContext(b.Context(), Unit{Key: longIDs[1]})
	first.Enabled(ctx)
	on := uint64(0)
	for b.Loop() {
		if second.Enabled(ctx) {
			on++
		}
	}
	sink = on
}

// warm is a running rollout that has seen enough latencies of its control to know its threshold: 99 of 100 are below.
func warm(tb testing.TB) *Rollout {
	r := running(tb, "bench")
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.ledgers[len(r.ledgers)-1].snap.last.marks {
		if m != nil {
			at := evidence.Index(0xffff * time.Microsecond * 99 / 100)
			m.follow([][2]int{{at, at}})
		}
	}
	return r
}

func BenchmarkRecord(b *testing.B)     { record(b, warm(b)) }
func BenchmarkRecordCold(b *testing.B) { record(b, running(b, "bench")) } // in the first moments of a ring

func record(b *testing.B, r *Rollout) {
	d := r.Decide(Unit{Key: longIDs[0]})
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		d.Record(Errors.Observe(i&127 == 0), Latency.Observe(time.Duration(i&0xffff)*time.Microsecond))
	}
}

func BenchmarkDecideParallel(b *testing.B) {
	r := running(b, "bench")
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			r.Decide(Unit{Key: longIDs[i%len(longIDs)]})
		}
	})
}

func BenchmarkRecordParallel(b *testing.B) {
	r := warm(b)
	d := r.Decide(Unit{Key: longIDs[0]})
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			d.Record(Errors.Observe(i&127 == 0), Latency.Observe(time.Duration(i&0xffff)*time.Microsecond))
		}
	})
}

// nothing is a response writer that keeps nothing.
type nothing struct{ h http.Header }

func (n nothing) Header() http.Header         { return n.h }
func (n nothing) Write(b []byte) (int, error) { return len(b), nil }
func (n nothing) WriteHeader(int)             {}

func BenchmarkHandlerFloor(b *testing.B) {
	bare := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	req, w := httptest.NewRequest("GET", "/", nil), nothing{http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		bare.ServeHTTP(w, req)
	}
}

func BenchmarkHandler(b *testing.B) {
	bare := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	var h http.Handler = bare
	for i := range 4 {
		h = running(b, fmt.Sprint("bench", i)).Handler(h, h)
	}
	h = Middleware(func(*http.Request) Unit { return Unit{Key: longIDs[0]} })(h)
	req, w := httptest.NewRequest("GET", "/", nil), nothing{http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		h.ServeHTTP(w, req)
	}
}

// BenchmarkJournal is one journalled effect: a write and a fresh read of the state. BenchmarkJournalFloor is the write alone.
func BenchmarkJournal(b *testing.B) {
	for _, c := range journalStores(b) {
		b.Run(c.name, func(b *testing.B) {
			p := Policy{
				Stages: []Stage{{Percent: 50, GuardOnly: true}, {Percent: 100, GuardOnly: true}}, Bake: time.Hour, Holdback: 5,
				Gates: []Gate{Errors.AtMost(50)},
				Undo:  map[string]func(context.Context, Effect) error{"order": func(context.Context, Effect) error { return nil }},
			}
			r := Must("bench", p, &Options{Store: c.store, Logger: quiet})
			if err := r.startForTest(b.Context()); err != nil {
				b.Fatal(err)
			}
			var d Decision
			for i := 0; !d.Enabled(); i++ {
				d = r.Decide(Unit{Key: longIDs[i]})
			}
			payload := make([]byte, 100)
			b.ReportAllocs()
			for b.Loop() {
				if err := d.Journal(b.Context(), "order", payload); err != nil {
					if !errors.Is(err, ErrJournalFull) {
						b.Fatal(err)
					}
					r.journal.settle(&machine.State{Settled: 1}) // the limit is not what is measured
				}
			}
		})
	}
}

func BenchmarkJournalFloor(b *testing.B) {
	for _, c := range journalStores(b) {
		b.Run(c.name, func(b *testing.B) {
			doc := make([]byte, 250)
			for i := 0; b.Loop(); i++ {
				if _, ok, err := c.store.CompareAndSwap(b.Context(), fmt.Sprint("rollout/bench/undo/1/inc/", i), 0, doc); !ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
	}
}

type namedStore struct {
	name  string
	store Store
}

func journalStores(b *testing.B) []namedStore {
	dir, err := DirStore(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	return []namedStore{{"MemStore", MemStore()}, {"DirStore", dir}}
}
