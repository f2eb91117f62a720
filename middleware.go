package rollout

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"time"
)

// Middleware puts the unit of each request into its context and records what came of the request: at the end it records
// [Errors] and [Latency] once on every rollout that was decided in it. Errors are a response of 500 or more, none at all
// by the deadline of the request's context, and a panic, which goes on; [http.ErrAbortHandler] is none, nor is a response
// to a client that cancelled the request.
//
// unitOf is asked at most once a request, at the first decision, with the request as Middleware got it. Put Middleware
// inside authentication, so that unitOf can know who it is, and outside the mux. It panics, when called, if unitOf is
// nil. Inside another Middleware it is asked for a unit of its own; what was answered for the same unit stands.
func Middleware(unitOf func(*http.Request) Unit) func(http.Handler) http.Handler {
	if unitOf == nil {
		panic("rollout: Middleware: unitOf is nil")
	}
	return func(next http.Handler) http.Handler {
		if isNil(next) {
			panic("rollout: Middleware: the handler is nil")
		}
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			ctx := req.Context()
			e := &exchange{response: response{ResponseWriter: w}, start: time.Now()}
			e.scope.Context, e.scope.req, e.scope.unitOf, e.scope.records = ctx, req, unitOf, true
			if around := scopeOf(ctx); around != nil && around.records {
				e.scope.within(around)
			} else {
				e.scope.inherit(around)
			}
			defer e.end()
			next.ServeHTTP(&e.response, req.WithContext(&e.scope))
			e.done = true
		})
	}
}

// Handler serves each request with the candidate or the stable version, as the rollout decides for the unit in the
// request's context: the new handler comes first, as everywhere. [Middleware] outside of it records what came of the
// request; with a unit put there by [NewContext], Handler records it. Without a unit it serves stable and counts
// Status.NoUnit. It panics, when called, if a handler is nil.
func (r *Rollout) Handler(candidate, stable http.Handler) http.Handler {
	if isNil(candidate) || isNil(stable) {
		panic("rollout: Handler: a handler is nil")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		ctx := req.Context()
		d := r.DecideContext(ctx)
		h := stable
		if d.Enabled() {
			h = candidate
		}
		if s := scopeOf(ctx); s == nil || s.records {
			h.ServeHTTP(w, req)
			return
		}
		e := &exchange{response: response{ResponseWriter: w}, start: time.Now(), alone: true, decision: d}
		e.scope.Context = ctx
		defer e.end()
		h.ServeHTTP(&e.response, req)
		e.done = true
	})
}

// isNil reports whether there is no handler, by the rule of http.ServeMux.
func isNil(h http.Handler) bool {
	f, ok := h.(http.HandlerFunc)
	return h == nil || ok && f == nil
}

// exchange is one request on its way through: its scope, its response and what came of it, in one allocation.
type exchange struct {
	scope    scope
	response response
	start    time.Time
	alone    bool     // what comes of it is recorded on decision, instead of all in the scope
	decision Decision // a value: a pointer would cost every request an allocation
	done     bool     // the handler returned
}

// end records what came of the request. A panic goes on.
func (e *exchange) end() {
	var p any
	failed := e.done && e.failed()
	if !e.done {
		p = recover() // nil: the goroutine exits
		failed = p != http.ErrAbortHandler
	}
	bad, took := Errors.Observe(failed), Latency.Observe(time.Since(e.start))
	if e.alone {
		e.decision.Record(bad, took)
	} else {
		e.scope.recordOwn(bad, took)
	}
	if p != nil {
		panic(p)
	}
}

// failed reports whether the response is an error.
func (e *exchange) failed() bool {
	switch status := e.response.status; {
	case status >= 500:
		return e.scope.Context.Err() != context.Canceled
	case status == 0: // nobody knows what whoever set the deadline answers now, but it is no success
		return e.scope.Context.Err() == context.DeadlineExceeded
	}
	return false
}

// response notes the status of a response on its way through, and keeps what the writer behind it can do.
type response struct {
	http.ResponseWriter
	status int // 0 until the header is written
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(code int) {
	w.ResponseWriter.WriteHeader(code) // panics at a code that is none
	if code >= 200 || code == http.StatusSwitchingProtocols {
		w.final(code) // others only inform
	}
}

func (w *response) Write(b []byte) (int, error) {
	w.final(http.StatusOK)
	n, err := w.ResponseWriter.Write(b)
	w.timeout(err)
	return n, err
}

// WriteString keeps io.WriteString from copying.
func (w *response) WriteString(s string) (int, error) {
	w.final(http.StatusOK)
	n, err := io.WriteString(w.ResponseWriter, s)
	w.timeout(err)
	return n, err
}

// ReadFrom lets the writer behind use what it has, such as sendfile.
func (w *response) ReadFrom(src io.Reader) (n int64, err error) {
	if rf, ok := w.ResponseWriter.(io.ReaderFrom); ok {
		n, err = rf.ReadFrom(src)
	} else {
		n, err = io.Copy(struct{ io.Writer }{w.ResponseWriter}, src)
	}
	if n > 0 { // otherwise the header is still to come: a source that fails at once may become a 502
		w.final(http.StatusOK)
	}
	w.timeout(err)
	return n, err
}

// Flush does nothing where the writer behind cannot.
func (w *response) Flush() { _ = w.FlushError() }

// FlushError returns http.ErrNotSupported where the writer behind cannot.
func (w *response) FlushError() error {
	err := http.NewResponseController(w.ResponseWriter).Flush()
	if !errors.Is(err, http.ErrNotSupported) {
		w.final(http.StatusOK)
	}
	return err
}

// Hijack returns http.ErrNotSupported where the writer behind cannot.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil {
		w.final(http.StatusSwitchingProtocols) // to whatever it is
	}
	return c, rw, err
}

// Push returns http.ErrNotSupported where the writer behind cannot.
func (w *response) Push(target string, o *http.PushOptions) error {
	if p, ok := w.ResponseWriter.(http.Pusher); ok {
		return p.Push(target, o)
	}
	return http.ErrNotSupported
}

// final notes the status, of which the first one counts.
func (w *response) final(code int) {
	if w.status == 0 {
		w.status = code
	}
}

// timeout notes that an http.TimeoutHandler around answered for this handler, which was too slow.
func (w *response) timeout(err error) {
	if err == http.ErrHandlerTimeout {
		w.status = http.StatusServiceUnavailable
	}
}

// Do runs candidate or stable, as r decides for u, in the caller's goroutine, and records [Errors] and [Latency] of it.
// What is an error is Options.IsFailure's to say; that the caller cancelled ctx is none, that its deadline passed is one,
// and a panic is one and goes on. Inside, ctx is a [NewContext] of u in which r has this answer. If ctx is already one of
// the same unit, what was answered in it stays. It panics if a function is nil; a nil r runs stable.
func Do[T any](ctx context.Context, r *Rollout, u Unit, candidate, stable func(context.Context) (T, error)) (T, error) {
	if candidate == nil || stable == nil {
		panic("rollout: Do: a function is nil")
	}
	if r == nil {
		return stable(ctx)
	}
	call := r.begin(ctx, u)
	f := stable
	if call.decision.Enabled() {
		f = candidate
	}
	defer call.end()
	v, err := f(&call.scope)
	call.done, call.err = true, err
	return v, err
}

// Do is [Do] for functions that return nothing but an error.
func (r *Rollout) Do(ctx context.Context, u Unit, candidate, stable func(context.Context) error) error {
	if candidate == nil || stable == nil {
		panic("rollout: Do: a function is nil")
	}
	_, err := Do(ctx, r, u,
		func(ctx context.Context) (struct{}, error) { return struct{}{}, candidate(ctx) },
		func(ctx context.Context) (struct{}, error) { return struct{}{}, stable(ctx) })
	return err
}

// call is one Do under way.
type call struct {
	scope    scope
	decision Decision
	start    time.Time
	done     bool
	err      error
}

func (r *Rollout) begin(ctx context.Context, u Unit) *call {
	c := &call{start: time.Now()}
	s := &c.scope
	s.Context, s.unit = ctx, u
	s.within(scopeOf(ctx))
	if d, forced := s.decideForced(r); forced {
		c.decision = d
		return c
	}
	who := s.who()
	at, _ := s.present(r)
	at = at.now() // counted also if it was answered before: a call has an outcome of its own
	s.pins[0].Store(at)
	c.decision = at.counted(who, s.hash)
	return c
}

// end records what came of the call. A panic goes on.
func (c *call) end() {
	failed := false
	var p any
	if c.done {
		failed = c.err != nil && c.decision.at.r.isFailure(c.err) && !cancelled(c.scope.Context, c.err)
	} else {
		p = recover()
		failed = p != http.ErrAbortHandler
	}
	c.decision.Record(Errors.Observe(failed), Latency.Observe(time.Since(c.start)))
	if p != nil {
		panic(p)
	}
}

// cancelled reports whether err is the caller's own cancellation of ctx, or its cause, and not a deadline.
func cancelled(ctx context.Context, err error) bool {
	return ctx.Err() == context.Canceled && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx)))
}

// isFailure asks Options.IsFailure. A panic in it is a failure.
func (r *Rollout) isFailure(err error) (failed bool) {
	if r.o.IsFailure == nil {
		return true
	}
	failed = true
	defer func() { _ = recover() }()
	return r.o.IsFailure(err)
}
