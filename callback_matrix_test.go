package rollout

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

// No callback runs under a lock: it may call every method.

// ann is a unit that gets the candidate.
var ann = Unit{Key: "ann"}

// methods call each exported method of a Rollout, and then those of what it returns.
var methods = map[string]func(context.Context, *Rollout) error{
	"Adopt": func(ctx context.Context, r *Rollout) error {
		_, s := r.Begin(ctx, ann)
		_, again, err := r.Adopt(ctx, s.Pin())
		if err == nil {
			again.Release()
		}
		s.End(nil)
		return err
	},
	"Advance": func(ctx context.Context, r *Rollout) error { return r.Advance(ctx, r.Status().Stage.Name, "") },
	"Approve": func(ctx context.Context, r *Rollout) error { return r.Approve(ctx, r.Status().Stage.Name, "") },
	"Begin": func(ctx context.Context, r *Rollout) error {
		_, s := r.Begin(ctx, ann)
		s.Reconfigured()
		s.End(nil)
		return nil
	},
	"Decide": func(ctx context.Context, r *Rollout) error {
		d := r.Decide(ann)
		d.Record(Errors.Observe(false))
		return d.Journal(ctx, "order", nil)
	},
	"DecideContext": func(ctx context.Context, r *Rollout) error {
		r.DecideContext(NewContext(ctx, ann))
		return nil
	},
	"Do": func(ctx context.Context, r *Rollout) error { return r.Do(ctx, ann, r.Ready, r.Ready) },
	"Drain": func(ctx context.Context, r *Rollout) error {
		if _, err := r.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		return nil // it waits for a session until then
	},
	"Enabled": func(ctx context.Context, r *Rollout) error { r.Enabled(NewContext(ctx, ann)); return nil },
	"Handler": func(ctx context.Context, r *Rollout) error {
		request(r.Handler(http.NotFoundHandler(), http.NotFoundHandler()).ServeHTTP)
		return nil
	},
	"Hold": func(ctx context.Context, r *Rollout) error { return r.Hold(ctx, "") },
	"Name": func(ctx context.Context, r *Rollout) error { r.Name(); return nil },
	"ParseDecision": func(ctx context.Context, r *Rollout) error {
		text, err := r.Decide(ann).MarshalText()
		if err == nil {
			_, err = r.ParseDecision(text)
		}
		return err
	},
	"Peek":         func(ctx context.Context, r *Rollout) error { r.Peek(ann); return nil },
	"Ready":        func(ctx context.Context, r *Rollout) error { return r.Ready(ctx) },
	"Restart":      func(ctx context.Context, r *Rollout) error { return r.Restart(ctx, "") },
	"Resume":       func(ctx context.Context, r *Rollout) error { return r.Resume(ctx, "") },
	"Rollback":     func(ctx context.Context, r *Rollout) error { return r.Rollback(ctx, "") },
	"RollbackRing": func(ctx context.Context, r *Rollout) error { return r.RollbackRing(ctx, "staff", "") },
	"Run":          func(ctx context.Context, r *Rollout) error { return r.Run(ctx) },
	"SetPercent":   func(ctx context.Context, r *Rollout) error { return r.SetPercent(ctx, Everyone, 20, "") },
	"Status":       func(ctx context.Context, r *Rollout) error { r.Status(); return nil },
	"Subscribe":    func(ctx context.Context, r *Rollout) error { r.Subscribe(func(Event) {})(); return nil },
	"Waive":        func(ctx context.Context, r *Rollout) error { return r.Waive(ctx, "one", "") },
}

// callbacks are what a host has called.
var callbacks = []string{
	"Check", "Do", "Handler", "IsFailure", "Logger", "Match", "MayAdvance", "MeterProvider", "OnRevoke", "OnRevoke by Drain",
	"Source", "Step", "Store", "Subscribe", "Undo", "unitOf",
}

// host calls a method of its rollout from one of its callbacks.
type host struct {
	*Rollout
	t                *testing.T
	callback, method string
	calling          atomic.Bool
	inside           atomic.Bool // what it calls may have the callback called again
	began, returned  atomic.Int32
}

// in is what every callback does. It ends at some time, since a verb may be an event, by which it is called again.
func (h *host) in(callback string) {
	if callback != h.callback || !h.calling.Load() || h.began.Load() >= 10 || !h.inside.CompareAndSwap(false, true) {
		return
	}
	defer h.inside.Store(false)
	h.began.Add(1)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := methods[h.method](ctx, h.Rollout)
	if !slices.ContainsFunc([]error{nil, ErrState, ErrStage, ErrRunning, ErrRolledBack}, func(may error) bool { return errors.Is(err, may) }) {
		h.t.Errorf("%s in %s: %v", h.method, callback, err)
	}
	h.returned.Add(1)
}

// policy has every callback there is in a Policy.
func (h *host) policy() Policy {
	p := talks(SessionPolicy{Grace: 5 * time.Second, OnRevoke: func(_ context.Context, s *Session) {
		h.in("OnRevoke")
		h.in("OnRevoke by Drain")
		s.End(nil)
	}})
	p.Bake = 5 * time.Second
	p.Rings[0].Match = func(u Unit) bool { h.in("Match"); return u.Key == "staff" }
	p.MayAdvance = func(time.Time) bool { h.in("MayAdvance"); return !h.calling.Load() }
	p.Gates = append(p.Gates, NewRate("elsewhere").AtMost(50).OnFail(Report),
		Check("host", func(context.Context) (Verdict, error) { h.in("Check"); return Healthy, nil }))
	p.Rollback = []RollbackStep{{Name: "one", Do: func(context.Context, Incident) error { h.in("Step"); return nil }}}
	p.Undo = map[string]func(context.Context, Effect) error{"order": func(context.Context, Effect) error { h.in("Undo"); return nil }}
	return p
}

// options have every callback there is in Options.
func (h *host) options() Options {
	says := SourceFunc(func(context.Context, func(string, string, bool, []float64)) error { h.in("Source"); return nil })
	return Options{
		Store:         calledStore{MemStore(), h},
		IsFailure:     func(error) bool { h.in("IsFailure"); return true },
		Sources:       map[string]Source{"elsewhere": says},
		Logger:        slog.New(calledLogger{slog.DiscardHandler, h}),
		MeterProvider: calledMeters{h: h},
	}
}

type calledLogger struct {
	slog.Handler
	h *host
}

func (l calledLogger) Enabled(context.Context, slog.Level) bool  { l.h.in("Logger"); return true }
func (l calledLogger) Handle(context.Context, slog.Record) error { l.h.in("Logger"); return nil }

type calledMeters struct {
	noop.MeterProvider
	h *host
}

func (m calledMeters) Meter(string, ...metric.MeterOption) metric.Meter {
	m.h.in("MeterProvider")
	return noop.Meter{}
}

type calledStore struct {
	Store
	h *host
}

func (s calledStore) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	s.h.in("Store")
	return s.Store.Load(ctx, key)
}

func (s calledStore) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	s.h.in("Store")
	return s.Store.List(ctx, prefix)
}

func (s calledStore) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	s.h.in("Store")
	return s.Store.CompareAndSwap(ctx, key, old, value)
}

// request makes one.
func request(f http.HandlerFunc) { f(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)) }

// TestCallbackCallsAnything: every method may be called from every callback: it returns, and a rollback ends all the same.
func TestCallbackCallsAnything(t *testing.T) {
	all := reflect.TypeFor[*Rollout]()
	if all.NumMethod() != len(methods) {
		t.Errorf("there are %d methods, and %d are called", all.NumMethod(), len(methods))
	}
	for i := range all.NumMethod() {
		method := all.Method(i).Name
		if methods[method] == nil {
			t.Errorf("%s is not called", method)
			continue
		}
		for j, callback := range callbacks {
			if raced && (i+j)%4 != 0 {
				continue // by turns
			}
			t.Run(callback+"/"+method, func(t *testing.T) {
				// A bubble does not notice that all wait for a lock.
				late := time.AfterFunc(30*time.Second, func() {
					debug.SetTraceback("all")
					panic(method + " called from " + callback + " hangs")
				})
				defer late.Stop()
				synctest.Test(t, func(t *testing.T) { callsBack(t, callback, method) })
			})
		}
	}
}

// callsBack has a rollout started, serve, be held, resumed and rolled back, while one callback calls one method.
func callsBack(t *testing.T, callback, method string) {
	h := &host{t: t, callback: callback, method: method}
	h.Rollout = lone(t, h.policy(), h.options())
	r := runs(t, h.Rollout)
	r.serve(6*time.Second, 0, 0)
	r.is(Running, "everyone 50 %")
	must(t, r.Decide(ann).Journal(t.Context(), "order", nil))
	_, s := r.Begin(t.Context(), ann)
	r.Subscribe(func(Event) { h.in("Subscribe") })
	r.stop()

	h.calling.Store(true)
	r = runs(t, h.Rollout)
	fails := func(context.Context) error { h.in("Do"); return errors.New("no") }
	_ = r.Do(t.Context(), ann, fails, fails)
	serves := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { h.in("Handler") })
	request(Middleware(func(*http.Request) Unit { h.in("unitOf"); return ann })(r.Handler(serves, serves)).ServeHTTP)
	r.serve(6*time.Second, 0, 0)
	_ = r.Hold(t.Context(), "") // an event, unless it was rolled back
	_ = r.Resume(t.Context(), "")
	if callback == "OnRevoke by Drain" {
		r.stop()
	}
	must(t, r.Rollback(t.Context(), ""))
	if callback == "OnRevoke by Drain" {
		_, err := r.Drain(t.Context())
		must(t, err)
		r = runs(t, h.Rollout)
	}
	if method == "Restart" { // of what was rolled back: only the next rollback stays
		minute()
		h.calling.Store(false)
		must(t, r.Rollback(t.Context(), ""))
	}
	r.until(RolledBack, 0, 0)
	s.End(nil)
	r.stop()
	if n := h.began.Load(); n == 0 || n != h.returned.Load() {
		t.Errorf("%d calls, of which %d have returned", n, h.returned.Load())
	}
}
