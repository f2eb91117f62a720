package rollout

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
)

// outcomesTally is what a rollout counted, by cohort: control, candidate.
type outcomesTally struct{ decided, good, bad, timed [2]uint64 }

func tallyOf(r *Rollout) outcomesTally {
	var c outcomesTally
	for i, ring := range r.Status().Rings {
		c.decided[0] += ring.Control
		c.decided[1] += ring.Candidate
		for cohort := range 2 {
			e := r.outcomes(i, cohort, 0)
			c.good[cohort] += e[0]
			c.bad[cohort] += e[1]
			c.timed[cohort] += sum(r.outcomes(i, cohort, 1))
		}
	}
	return c
}

func wantTally(t *testing.T, r *Rollout, want outcomesTally) {
	t.Helper()
	if got := tallyOf(r); got != want {
		t.Errorf("%s counted %+v, want %+v", r.Name(), got, want)
	}
}

// once is the outcomesTally of n decisions and as many outcomes of one cohort.
func once(c Cohort, good, bad uint64) outcomesTally {
	var want outcomesTally
	i := c - Control
	want.decided[i], want.good[i], want.bad[i], want.timed[i] = good+bad, good, bad, good+bad
	return want
}

// keyOf is a key of the cohort.
func keyOf(tb testing.TB, r *Rollout, c Cohort) Unit {
	tb.Helper()
	for i := range 10_000 {
		if u := (Unit{Key: fmt.Sprint("unit ", i)}); r.Peek(u).Cohort() == c {
			return u
		}
	}
	tb.Fatalf("no unit is %v", c)
	return Unit{}
}

// share sets the share of everyone.
func share(tb testing.TB, r *Rollout, p Percent) {
	tb.Helper()
	if err := r.SetPercent(context.Background(), Everyone, p, "test"); err != nil {
		tb.Fatal(err)
	}
}

func fixed(u Unit) func(*http.Request) Unit { return func(*http.Request) Unit { return u } }

// serve sends a request through h, behind a Middleware for u.
func serve(u Unit, h http.HandlerFunc) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	Middleware(fixed(u))(h).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	return w
}

// caught is what f panics with.
func caught(f func()) (p any) {
	defer func() { p = recover() }()
	f()
	return nil
}

func TestMiddlewareAsksUnitOfOnce(t *testing.T) {
	r1, r2 := running(t, "one"), running(t, "two")
	for _, tc := range []struct {
		name   string
		handle func(context.Context)
		asks   int32
	}{
		{"nothing decides", func(ctx context.Context) { Record(ctx, Errors.Observe(true)) }, 0},
		{"one decides", func(ctx context.Context) { r1.Enabled(ctx) }, 1},
		{"again and another", func(ctx context.Context) { r1.Enabled(ctx); r1.DecideContext(ctx); r2.Enabled(ctx) }, 1},
		{"8 goroutines", func(ctx context.Context) {
			var g sync.WaitGroup
			for i := range 8 {
				g.Go(func() {
					for range 100 {
						r1.Enabled(ctx)
						if i%2 == 0 {
							r2.Enabled(ctx)
						}
					}
				})
			}
			g.Wait()
		}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var asks atomic.Int32
			req := httptest.NewRequest("GET", "/", nil)
			m := Middleware(func(got *http.Request) Unit {
				asks.Add(1)
				if got != req {
					t.Error("unitOf was asked with another request than Middleware got")
				}
				return Unit{Key: "u"}
			})
			m(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
				if asks.Load() != 0 {
					t.Error("unitOf was asked before the first decision")
				}
				tc.handle(req.Context())
			})).ServeHTTP(httptest.NewRecorder(), req)
			if asks.Load() != tc.asks {
				t.Errorf("unitOf was asked %d times, want %d", asks.Load(), tc.asks)
			}
		})
	}
}

func TestMiddlewareRecordsWhatWasDecided(t *testing.T) {
	decided, handled, undecided := running(t, "decided"), running(t, "handled"), running(t, "undecided")
	u := Unit{Key: "u"}
	h := handled.Handler(http.NotFoundHandler(), http.NotFoundHandler())
	for range 3 {
		serve(u, func(w http.ResponseWriter, req *http.Request) {
			decided.Enabled(req.Context())
			decided.Enabled(req.Context())
			h.ServeHTTP(w, req)
			h.ServeHTTP(w, req)
		})
	}
	wantTally(t, decided, once(decided.Peek(u).Cohort(), 3, 0))
	wantTally(t, handled, once(handled.Peek(u).Cohort(), 3, 0))
	wantTally(t, undecided, outcomesTally{})
}

func TestMiddlewareWhatIsAnError(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	boom := errors.New("boom")
	for _, tc := range []struct {
		name   string
		ctx    context.Context
		handle http.HandlerFunc
		bad    bool
		panics any
	}{
		{name: "nothing written", handle: func(http.ResponseWriter, *http.Request) {}},
		{name: "200", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200) }},
		{name: "implicit 200", handle: func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }},
		{name: "404", handle: http.NotFound},
		{name: "499", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(499) }},
		{name: "500", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, bad: true},
		{name: "503", handle: func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "busy", http.StatusServiceUnavailable) }, bad: true},
		{name: "the first status counts, 200", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200); w.WriteHeader(500) }},
		{name: "the first status counts, 500", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); w.Write(nil) }, bad: true},
		{name: "500 after the body began", handle: func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("a")); w.WriteHeader(500) }},
		{name: "500 after an empty write", handle: func(w http.ResponseWriter, _ *http.Request) { w.Write(nil); w.WriteHeader(500) }},
		{name: "500 after a flush", handle: func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush(); w.WriteHeader(500) }},
		{name: "500 after a copy", handle: func(w http.ResponseWriter, _ *http.Request) {
			io.Copy(w, onlyReader{strings.NewReader("a")})
			w.WriteHeader(500)
		}},
		{name: "502 after a copy whose source failed at once", handle: func(w http.ResponseWriter, _ *http.Request) {
			if _, err := io.Copy(w, iotest.ErrReader(boom)); err == boom {
				w.WriteHeader(502)
			}
		}, bad: true},
		{name: "101", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(101); w.WriteHeader(500) }},
		{name: "103 and 200", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(103); w.WriteHeader(200) }},
		{name: "103 and 500", handle: func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(100)
			w.WriteHeader(103)
			w.WriteHeader(500)
		}, bad: true},

		{name: "cancelled and 500", ctx: cancelled, handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }},
		{name: "cancelled and nothing", ctx: cancelled, handle: func(http.ResponseWriter, *http.Request) {}},
		{name: "cancelled and a panic", ctx: cancelled, handle: func(http.ResponseWriter, *http.Request) { panic(boom) }, bad: true, panics: boom},
		{name: "deadline and 504", ctx: late, handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(504) }, bad: true},
		{name: "deadline and nothing", ctx: late, handle: func(http.ResponseWriter, *http.Request) {}, bad: true},
		{name: "deadline and 204", ctx: late, handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }},

		{name: "panic", handle: func(http.ResponseWriter, *http.Request) { panic(boom) }, bad: true, panics: boom},
		{name: "panic after 200", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200); panic(42) }, bad: true, panics: 42},
		{name: "abort", handle: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, panics: http.ErrAbortHandler},
		{name: "abort after 500", handle: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); panic(http.ErrAbortHandler) }, panics: http.ErrAbortHandler},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, outcome := range []struct {
				name string
				wrap func(*Rollout, Unit) http.Handler
			}{
				{"Middleware", func(r *Rollout, u Unit) http.Handler {
					return Middleware(fixed(u))(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
						r.Enabled(req.Context())
						tc.handle(w, req)
					}))
				}},
				{"Handler", func(r *Rollout, u Unit) http.Handler {
					h := r.Handler(tc.handle, tc.handle)
					return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
						h.ServeHTTP(w, req.WithContext(NewContext(req.Context(), u)))
					})
				}},
			} {
				r := running(t, "errors")
				u := keyOf(t, r, Candidate)
				req := httptest.NewRequest("GET", "/", nil)
				if tc.ctx != nil {
					req = req.WithContext(tc.ctx)
				}
				if p := caught(func() { outcome.wrap(r, u).ServeHTTP(httptest.NewRecorder(), req) }); p != tc.panics {
					t.Errorf("%s: panicked with %v, want %v", outcome.name, p, tc.panics)
				}
				want := once(Candidate, 1, 0)
				if tc.bad {
					want = once(Candidate, 0, 1)
				}
				wantTally(t, r, want)
			}
		})
	}
}

// onlyReader hides what else a reader can do.
type onlyReader struct{ io.Reader }

// A handler that is too slow for an http.TimeoutHandler around it answers nobody: the client got a 503.
func TestMiddlewareInsideTimeoutHandler(t *testing.T) {
	for name, write := range map[string]func(http.ResponseWriter){
		"silent":      func(http.ResponseWriter) {},
		"Write":       func(w http.ResponseWriter) { w.Write([]byte("late")) },
		"WriteString": func(w http.ResponseWriter) { io.WriteString(w, "late") },
		"ReadFrom":    func(w http.ResponseWriter) { io.Copy(w, onlyReader{strings.NewReader("late")}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := running(t, "slow")
				u := keyOf(t, r, Control)
				answered := make(chan struct{})
				h := Middleware(fixed(u))(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
					r.Enabled(req.Context())
					<-answered
					write(w)
				}))
				w := httptest.NewRecorder()
				http.TimeoutHandler(h, time.Second, "").ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
				close(answered)
				synctest.Wait()
				if w.Code != 503 {
					t.Fatalf("the client got %d", w.Code)
				}
				wantTally(t, r, once(Control, 0, 1))
			})
		})
	}
}

func TestMiddlewareGoexit(t *testing.T) {
	r := running(t, "exit")
	u := keyOf(t, r, Candidate)
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(u, func(_ http.ResponseWriter, req *http.Request) { r.Enabled(req.Context()); runtime.Goexit() })
		t.Error("the goroutine went on")
	}()
	<-done
	wantTally(t, r, once(Candidate, 0, 1))
}

// writer is a response writer that can do what it says and nothing else.
type writer struct {
	http.ResponseWriter
	calls []string
}

func (w *writer) SetWriteDeadline(time.Time) error {
	w.calls = append(w.calls, "SetWriteDeadline")
	return nil
}
func (w *writer) EnableFullDuplex() error { w.calls = append(w.calls, "EnableFullDuplex"); return nil }
func (w *writer) FlushError() error       { w.calls = append(w.calls, "Flush"); return io.ErrClosedPipe }
func (w *writer) ReadFrom(src io.Reader) (int64, error) {
	w.calls = append(w.calls, "ReadFrom")
	return io.Copy(io.Discard, src)
}
func (w *writer) WriteString(s string) (int, error) {
	w.calls = append(w.calls, "WriteString")
	return len(s), nil
}
func (w *writer) Push(string, *http.PushOptions) error {
	w.calls = append(w.calls, "Push")
	return io.ErrNoProgress
}

func TestResponseKeepsWhatTheWriterCan(t *testing.T) {
	behind := &writer{ResponseWriter: httptest.NewRecorder()}
	Middleware(fixed(Unit{}))(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		rc := http.NewResponseController(w)
		if err := errors.Join(rc.SetWriteDeadline(time.Time{}), rc.EnableFullDuplex()); err != nil {
			t.Error(err)
		}
		if err := rc.Flush(); err != io.ErrClosedPipe {
			t.Errorf("Flush through http.ResponseController: %v", err)
		}
		w.(http.Flusher).Flush()
		if n, err := io.Copy(w, onlyReader{strings.NewReader("abc")}); n != 3 || err != nil {
			t.Errorf("io.Copy: %d, %v", n, err)
		}
		io.WriteString(w, "abc")
		if err := w.(http.Pusher).Push("/", nil); err != io.ErrNoProgress {
			t.Errorf("Push: %v", err)
		}
	})).ServeHTTP(behind, httptest.NewRequest("GET", "/", nil))
	if got, want := fmt.Sprint(behind.calls), "[SetWriteDeadline EnableFullDuplex Flush Flush ReadFrom WriteString Push]"; got != want {
		t.Errorf("the writer behind was asked for %s, want %s", got, want)
	}
}

func TestResponseOfAWriterThatCannot(t *testing.T) {
	r := running(t, "plain")
	u := keyOf(t, r, Candidate)
	var body strings.Builder
	behind := &bare{Writer: &body}
	Middleware(fixed(u))(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.Enabled(req.Context())
		rc := http.NewResponseController(w)
		_, _, hijack := rc.Hijack()
		for what, err := range map[string]error{
			"Flush": rc.Flush(), "Hijack": hijack, "Push": w.(http.Pusher).Push("/", nil),
			"SetReadDeadline": rc.SetReadDeadline(time.Time{}), "EnableFullDuplex": rc.EnableFullDuplex(),
		} {
			if !errors.Is(err, http.ErrNotSupported) {
				t.Errorf("%s: %v", what, err)
			}
		}
		w.(http.Flusher).Flush()
		w.WriteHeader(500) // none of it wrote the header
		io.WriteString(w, "a")
		if n, err := io.Copy(w, onlyReader{strings.NewReader("bc")}); n != 2 || err != nil {
			t.Errorf("io.Copy: %d, %v", n, err)
		}
	})).ServeHTTP(behind, httptest.NewRequest("GET", "/", nil))
	if body.String() != "abc" {
		t.Errorf("body %q", body.String())
	}
	wantTally(t, r, once(Candidate, 0, 1))
}

// bare is the least a response writer can be.
type bare struct{ io.Writer }

func (*bare) Header() http.Header { return http.Header{} }
func (*bare) WriteHeader(int)     {}

// server is a real server behind a Middleware; what it served is counted once get returned.
func server(t *testing.T, u Unit, h http.HandlerFunc) (url string, get func(path string) (*http.Response, string)) {
	t.Helper()
	s := httptest.NewServer(Middleware(fixed(u))(h))
	t.Cleanup(s.Close)
	return s.URL, func(path string) (*http.Response, string) {
		t.Helper()
		res, err := s.Client().Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, string(body)
	}
}

func TestServerInformationalAndSendfile(t *testing.T) {
	r := running(t, "server")
	u := keyOf(t, r, Candidate)
	_, get := server(t, u, func(w http.ResponseWriter, req *http.Request) {
		r.Enabled(req.Context())
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
		if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Error(err)
		}
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		if err := w.(http.Pusher).Push("/style.css", nil); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("Push over HTTP/1.1: %v", err)
		}
		w.WriteHeader(http.StatusBadGateway)
		io.Copy(w, onlyReader{strings.NewReader(strings.Repeat("x", 100_000))})
	})
	res, body := get("/")
	if res.StatusCode != http.StatusBadGateway || len(body) != 100_000 {
		t.Errorf("got %s and %d bytes", res.Status, len(body))
	}
	waitTally(t, r, once(Candidate, 0, 1))
}

// waitTally is wantTally for a server whose client may be ahead of it: when Middleware records, the response is out
// already. A test that never gets there fails by its timeout.
func waitTally(t *testing.T, r *Rollout, want outcomesTally) {
	t.Helper()
	for tallyOf(r) == (outcomesTally{decided: want.decided}) {
		runtime.Gosched()
	}
	wantTally(t, r, want)
}

func TestServerHijack(t *testing.T) {
	r := running(t, "hijack")
	u := keyOf(t, r, Candidate)
	url, _ := server(t, u, func(w http.ResponseWriter, req *http.Request) {
		r.Enabled(req.Context())
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		rw.Flush()
		line, _ := rw.ReadString('\n')
		rw.WriteString("echo " + line)
		rw.Flush()
	})
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(res, err)
	}
	fmt.Fprintf(c, "hello\n")
	if line, err := in.ReadString('\n'); line != "echo hello\n" {
		t.Errorf("got %q, %v", line, err)
	}
	waitTally(t, r, once(Candidate, 1, 0))
}

func TestServerSentEvents(t *testing.T) {
	r := running(t, "sse")
	u := keyOf(t, r, Candidate)
	next := make(chan string)
	h := func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for e := range next {
			fmt.Fprintf(w, "data: %s\n\n", e)
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
		}
	}
	s := httptest.NewServer(Middleware(fixed(u))(r.Handler(http.HandlerFunc(h), http.NotFoundHandler())))
	defer s.Close()
	go func() { next <- "first" }()
	res, err := s.Client().Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	in := bufio.NewReader(res.Body)
	for _, e := range []string{"first", "second", "third"} {
		if e != "first" {
			next <- e // only once the one before has arrived: nothing is held back
		}
		if line, err := in.ReadString('\n'); line != "data: "+e+"\n" {
			t.Fatalf("got %q, %v", line, err)
		}
		in.ReadString('\n')
	}
	close(next)
	if rest, err := io.ReadAll(in); len(rest) != 0 || err != nil {
		t.Errorf("then came %q, %v", rest, err)
	}
	waitTally(t, r, once(Candidate, 1, 0))
}

// TestOneRequestOneAnswer changes the stage, sets shares and rolls back in the middle of a request: the request keeps its
// answer, the next one has the new one.
func TestOneRequestOneAnswer(t *testing.T) {
	ctx := context.Background()
	for _, tc := range []struct {
		name   string
		cohort Cohort // before
		change func(t *testing.T, r *Rollout)
		late   bool // the outcome comes too late to count
	}{
		{"share to zero", Candidate, func(t *testing.T, r *Rollout) { share(t, r, 0) }, false},
		{"share up", Control, func(t *testing.T, r *Rollout) { share(t, r, 94.9) }, false},
		{"rollback", Candidate, func(t *testing.T, r *Rollout) {
			if err := r.Rollback(ctx, "test"); err != nil {
				t.Error(err)
			}
		}, true},
		{"next stage", Control, func(t *testing.T, r *Rollout) {
			if err := r.Advance(ctx, "everyone 25 %", "test"); err != nil {
				t.Error(err)
			}
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := running(t, "law")
			u := Unit{}
			for i := 0; u.Key == "" || r.Peek(u).Cohort() != tc.cohort || r.Peek(u).Reason() == ReasonHoldback; i++ {
				u.Key = fmt.Sprint("unit ", i)
			}
			was := tc.cohort == Candidate
			answers := func(ctx context.Context, want bool) {
				t.Helper()
				for range 2 {
					if r.Enabled(ctx) != want {
						t.Errorf("Enabled is %v, want %v", !want, want)
					}
				}
				var done bool
				f := func(got bool) func(context.Context) error {
					return func(ctx context.Context) error {
						if done = true; got != want || r.Enabled(ctx) != want {
							t.Errorf("Do ran with %v, want %v", got, want)
						}
						return nil
					}
				}
				if err := r.Do(ctx, u, f(true), f(false)); err != nil || !done {
					t.Error(err, done)
				}
			}
			served := ""
			h := r.Handler(
				http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { served += "candidate "; answers(req.Context(), true) }),
				http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { served += "stable "; answers(req.Context(), false) }),
			)
			want := map[bool]string{true: "candidate candidate ", false: "stable stable "}
			serve(u, func(w http.ResponseWriter, req *http.Request) {
				h.ServeHTTP(w, req)
				tc.change(t, r)
				h.ServeHTTP(w, req)
				answers(req.Context(), was)
			})
			if served != want[was] {
				t.Errorf("the request was served by %s", served)
			}
			counted := tallyOf(r)
			if n, late := counted.timed[0]+counted.timed[1], r.Status().Late; tc.late != (late > 0) || !tc.late && n != 4 {
				t.Errorf("%d outcomes counted and %d late", n, late)
			}

			served = ""
			serve(u, func(w http.ResponseWriter, req *http.Request) { h.ServeHTTP(w, req); h.ServeHTTP(w, req) })
			if served != want[!was] {
				t.Errorf("the next request was served by %s", served)
			}
		})
	}
}

// TestManyRolloutsInOneRequest asks more rollouts than a scope has room for, from many goroutines, while shares change.
func TestManyRolloutsInOneRequest(t *testing.T) {
	const n, goroutines = 9, 8
	var rs []*Rollout
	for i := range n {
		rs = append(rs, running(t, fmt.Sprint("many", i)))
	}
	u := Unit{Key: "u"}
	serve(u, func(w http.ResponseWriter, req *http.Request) {
		var answers [goroutines][n]Decision
		var g sync.WaitGroup
		for i := range goroutines {
			g.Go(func() {
				for j := range n {
					k := (i + j) % n
					answers[i][k] = rs[k].DecideContext(req.Context())
					if i == j {
						share(t, rs[k], 90)
					}
				}
			})
		}
		g.Wait()
		for i := range goroutines {
			if answers[i] != answers[0] {
				t.Errorf("goroutine %d saw other answers than goroutine 0", i)
			}
		}
		Record(req.Context(), Errors.Observe(true))
	})
	for _, r := range rs {
		got := tallyOf(r)
		if d, good, bad, timed := got.decided[0]+got.decided[1], got.good[0]+got.good[1], got.bad[0]+got.bad[1], got.timed[0]+got.timed[1]; d != 1 || good != 1 || bad != 1 || timed != 1 {
			t.Errorf("%s: %+v", r.Name(), got)
		}
	}
}

func TestHandlerWithoutUnit(t *testing.T) {
	r := running(t, "nobody")
	served := ""
	h := r.Handler(
		http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served += "candidate " }),
		http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served += "stable " }))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	Middleware(fixed(Unit{}))(h).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil).WithContext(NewContext(t.Context(), Unit{})))
	if served != "stable stable stable " {
		t.Error("served by", served)
	}
	if n := r.Status().NoUnit; n != 3 {
		t.Errorf("NoUnit is %d, want 3", n)
	}
	wantTally(t, r, outcomesTally{})

	served = ""
	var none *Rollout
	h = none.Handler(http.HandlerFunc(nothingServed(t)), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served = "stable" }))
	Middleware(fixed(Unit{Key: "u"}))(h).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	if served != "stable" {
		t.Error("a nil Rollout did not serve stable")
	}
}

func nothingServed(t *testing.T) http.HandlerFunc {
	return func(http.ResponseWriter, *http.Request) { t.Error("the wrong handler served") }
}

// With NewContext and no Middleware, Handler records on its own rollout, once, and on no other.
func TestHandlerWithNewContext(t *testing.T) {
	r, other := running(t, "handler"), running(t, "other")
	u := keyOf(t, r, Candidate)
	h := r.Handler(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		other.Enabled(req.Context())
		r.Enabled(req.Context())
		w.WriteHeader(500)
	}), nothingServed(t))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil).WithContext(NewContext(t.Context(), u)))
	wantTally(t, r, once(Candidate, 0, 1))
	if got := tallyOf(other); got.timed != [2]uint64{} {
		t.Errorf("the other rollout recorded %+v", got)
	}
}

func TestNilAtRegistration(t *testing.T) {
	r := running(t, "nil")
	ok := http.NotFoundHandler()
	f := func(context.Context) error { return nil }
	for name, call := range map[string]func(){
		"Middleware(nil)":              func() { Middleware(nil) },
		"Middleware()(nil)":            func() { Middleware(fixed(Unit{}))(nil) },
		"Middleware()(nil func)":       func() { Middleware(fixed(Unit{}))(http.HandlerFunc(nil)) },
		"Handler(nil, h)":              func() { r.Handler(nil, ok) },
		"Handler(h, nil)":              func() { r.Handler(ok, nil) },
		"Handler(nil func, h)":         func() { r.Handler(http.HandlerFunc(nil), ok) },
		"Handler(h, nil func)":         func() { r.Handler(ok, http.HandlerFunc(nil)) },
		"Rollout.Do(nil, f)":           func() { r.Do(t.Context(), Unit{}, nil, f) },
		"Rollout.Do(f, nil)":           func() { r.Do(t.Context(), Unit{}, f, nil) },
		"Do(nil, f)":                   func() { Do(t.Context(), r, Unit{}, nil, func(context.Context) (int, error) { return 0, nil }) },
		"Do(f, nil)":                   func() { Do(t.Context(), r, Unit{}, func(context.Context) (int, error) { return 0, nil }, nil) },
		"Rollout.Do(f, nil), nil r":    func() { (*Rollout)(nil).Do(t.Context(), Unit{}, f, nil) },
		"Handler(nil, nil) of a nil r": func() { (*Rollout)(nil).Handler(nil, nil) },
	} {
		if p := caught(call); p == nil || !strings.HasPrefix(fmt.Sprint(p), "rollout: ") {
			t.Errorf("%s: panicked with %v", name, p)
		}
	}
}

// Of two Middlewares the inner one has a unit of its own. What the outer one's decisions were stands for the same unit, and
// each decision is counted and recorded once.
func TestNestedMiddlewares(t *testing.T) {
	for _, same := range []bool{true, false} {
		t.Run(fmt.Sprintf("same unit %v", same), func(t *testing.T) {
			outer, both, inner := running(t, "outer"), running(t, "both"), running(t, "inner")
			u := keyOf(t, both, Candidate)
			v := u
			if !same {
				v = keyOf(t, both, Control)
			}
			serve(u, func(w http.ResponseWriter, req *http.Request) {
				outer.Enabled(req.Context())
				if !both.Enabled(req.Context()) {
					t.Error("the outer unit got the stable version")
				}
				if same {
					share(t, both, 0)
				}
				Middleware(fixed(v))(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
					inner.Enabled(req.Context())
					for range 2 {
						if both.Enabled(req.Context()) != same {
							t.Error("the inner unit got the wrong answer")
						}
					}
				})).ServeHTTP(w, req)
			})
			wantTally(t, outer, once(outer.Peek(u).Cohort(), 1, 0))
			wantTally(t, inner, once(inner.Peek(v).Cohort(), 1, 0))
			want := once(Candidate, 1, 0)
			if !same {
				want = outcomesTally{decided: [2]uint64{1, 1}, good: [2]uint64{1, 1}, timed: [2]uint64{1, 1}}
			}
			wantTally(t, both, want)
		})
	}
}

func TestRecordInContext(t *testing.T) {
	odd := NewRate("odd")
	rs := []*Rollout{running(t, "first"), running(t, "second"), running(t, "third")}
	u := Unit{Key: "u"}
	ctx := NewContext(t.Context(), u)
	Record(ctx, Errors.Observe(true)) // of nothing
	rs[0].Enabled(ctx)
	rs[1].Enabled(ctx)
	Record(ctx, Errors.Observe(true), Latency.Observe(time.Second))
	rs[2].Enabled(ctx)
	Record(ctx, odd.Observe(true))
	for i, r := range rs {
		want := once(r.Peek(u).Cohort(), 0, 1)
		if i == 2 {
			want.bad, want.timed = [2]uint64{}, [2]uint64{}
		}
		wantTally(t, r, want)
		if n := r.Status().Unknown; n != 1 {
			t.Errorf("%s: Unknown is %d, want 1", r.Name(), n)
		}
	}
	Record(t.Context(), Errors.Observe(true)) // without a scope: nothing, and no panic
}

func TestWithoutScope(t *testing.T) {
	r := running(t, "nowhere")
	d := r.DecideContext(t.Context())
	if d.Enabled() || d.Reason() != ReasonNoUnit || d.Cohort() != None || r.Enabled(t.Context()) {
		t.Errorf("got %v, %v", d.Enabled(), d.Reason())
	}
	if n := r.Status().NoUnit; n != 2 {
		t.Errorf("NoUnit is %d, want 2", n)
	}
	var none *Rollout
	if none.Enabled(t.Context()) || none.Enabled(NewContext(t.Context(), Unit{Key: "u"})) {
		t.Error("a nil Rollout is enabled")
	}
}

// do runs one Do of a unit of each cohort with f as both functions, and returns the outcomesTally.
func do(t *testing.T, ctx context.Context, o *Options, f func(context.Context) error) (errs [2]error, panics [2]any, got outcomesTally) {
	t.Helper()
	r := running(t, "do")
	if o != nil {
		r.o.IsFailure = o.IsFailure
	}
	for i, c := range []Cohort{Control, Candidate} {
		right := func(ctx context.Context) error {
			if d := r.DecideContext(ctx); d.Cohort() != c {
				t.Errorf("inside, the cohort is %v, want %v", d.Cohort(), c)
			}
			return f(ctx)
		}
		wrong := func(context.Context) error { t.Error("the wrong function ran"); return nil }
		panics[i] = caught(func() {
			if c == Candidate {
				errs[i] = r.Do(ctx, keyOf(t, r, c), right, wrong)
			} else {
				errs[i] = r.Do(ctx, keyOf(t, r, c), wrong, right)
			}
		})
	}
	return errs, panics, tallyOf(r)
}

func TestDoWhatIsAFailure(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	why := errors.New("why")
	caused, cancelCause := context.WithCancelCause(t.Context())
	cancelCause(why)
	late, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	boom, harmless := errors.New("boom"), errors.New("harmless")
	isFailure := &Options{IsFailure: func(err error) bool {
		if err == nil {
			t.Error("IsFailure was asked about nil")
		}
		return err != harmless
	}}
	returns := func(err error) func(context.Context) error {
		return func(context.Context) error { return err }
	}
	for _, tc := range []struct {
		name   string
		ctx    context.Context
		o      *Options
		f      func(context.Context) error
		bad    bool
		err    error
		panics any
	}{
		{name: "no error", f: returns(nil)},
		{name: "an error", f: returns(boom), bad: true, err: boom},
		{name: "IsFailure, no error", o: isFailure, f: returns(nil)},
		{name: "IsFailure, a failure", o: isFailure, f: returns(boom), bad: true, err: boom},
		{name: "IsFailure, none", o: isFailure, f: returns(harmless), err: harmless},
		{name: "IsFailure panics", o: &Options{IsFailure: func(error) bool { panic("no") }}, f: returns(boom), bad: true, err: boom},
		{name: "the caller's cancellation", ctx: cancelled, f: func(ctx context.Context) error { return ctx.Err() }, err: context.Canceled},
		{name: "the caller's cancellation by its cause", ctx: caused, f: func(ctx context.Context) error { return context.Cause(ctx) }, err: why},
		{name: "another error after the caller's cancellation", ctx: cancelled, f: returns(boom), bad: true, err: boom},
		{name: "the caller's deadline", ctx: late, f: func(ctx context.Context) error { return ctx.Err() }, bad: true, err: context.DeadlineExceeded},
		{name: "a cancellation inside", f: func(ctx context.Context) error {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx.Err()
		}, bad: true, err: context.Canceled},
		{name: "a panic", f: func(context.Context) error { panic(boom) }, bad: true, panics: boom},
		{name: "a panic of a cancelled caller", ctx: cancelled, f: func(context.Context) error { panic(boom) }, bad: true, panics: boom},
		{name: "an abort", f: func(context.Context) error { panic(http.ErrAbortHandler) }, panics: http.ErrAbortHandler},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.ctx == nil {
				tc.ctx = t.Context()
			}
			errs, panics, got := do(t, tc.ctx, tc.o, tc.f)
			if errs[0] != tc.err || errs[1] != tc.err {
				t.Errorf("returned %v, want %v", errs, tc.err)
			}
			if panics[0] != tc.panics || panics[1] != tc.panics {
				t.Errorf("panicked with %v, want %v", panics, tc.panics)
			}
			want := outcomesTally{decided: [2]uint64{1, 1}, timed: [2]uint64{1, 1}}
			if want.good = [2]uint64{1, 1}; tc.bad {
				want.good, want.bad = want.bad, want.good
			}
			if got != want {
				t.Errorf("counted %+v, want %+v", got, want)
			}
		})
	}
}

func TestDoGoexit(t *testing.T) {
	r := running(t, "exit")
	u := keyOf(t, r, Candidate)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f := func(context.Context) error { runtime.Goexit(); return nil }
		_ = r.Do(context.Background(), u, f, f)
		t.Error("the goroutine went on")
	}()
	<-done
	wantTally(t, r, once(Candidate, 0, 1))
}

func TestDoTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := running(t, "times")
		f := func(context.Context) (string, error) { time.Sleep(3 * time.Second); return "done", nil }
		if v, err := Do(t.Context(), r, keyOf(t, r, Candidate), f, f); v != "done" || err != nil {
			t.Error(v, err)
		}
		got := r.outcomes(len(r.plan.Rings)-1, 1, 1)
		if cell := evidence.Index(3 * time.Second); got[cell] != 1 {
			t.Error("no outcome of 3 s was recorded")
		}
	})
}

func TestDoOfANilRolloutRunsStable(t *testing.T) {
	var r *Rollout
	ran := 0
	wrong := func(context.Context) error { t.Error("the candidate ran"); return nil }
	if err := r.Do(t.Context(), Unit{Key: "u"}, wrong, func(context.Context) error { ran++; return io.EOF }); err != io.EOF {
		t.Error(err)
	}
	if v, err := Do(t.Context(), nil, Unit{Key: "u"}, func(context.Context) (int, error) { t.Error("the candidate ran"); return 1, nil },
		func(context.Context) (int, error) { ran++; return 7, io.EOF }); v != 7 || err != io.EOF {
		t.Error(v, err)
	}
	if ran != 2 {
		t.Errorf("stable ran %d times, want 2", ran)
	}
}

// A Do in a request of the same unit keeps to the request's answers, also those of other rollouts, and counts an outcome
// of its own. One for another unit does not.
func TestDoInsideARequest(t *testing.T) {
	r, other := running(t, "inside"), running(t, "beside")
	u := keyOf(t, r, Candidate)
	for i := 0; !r.Peek(u).Enabled() || !other.Peek(u).Enabled(); i++ {
		u.Key = fmt.Sprint("both ", i)
	}
	stranger := u
	for i := 0; stranger.Key == u.Key || !r.Peek(stranger).Enabled(); i++ {
		stranger.Key = fmt.Sprint("stranger ", i)
	}
	ran := ""
	f := func(name string) func(context.Context) error {
		return func(ctx context.Context) error {
			ran += name + " "
			if got := other.Enabled(ctx); got != (name == "candidate") {
				t.Errorf("%s: the other rollout is %v", name, got)
			}
			return nil
		}
	}
	serve(u, func(_ http.ResponseWriter, req *http.Request) {
		if !r.Enabled(req.Context()) || !other.Enabled(req.Context()) {
			t.Fatal("not the candidate")
		}
		share(t, r, 0)
		share(t, other, 0)
		if err := r.Do(req.Context(), u, f("candidate"), f("stable")); err != nil {
			t.Error(err)
		}
		if err := r.Do(req.Context(), stranger, f("candidate"), f("stable")); err != nil {
			t.Error(err)
		}
	})
	if ran != "candidate stable " {
		t.Error("ran", ran)
	}
	wantTally(t, r, once(Candidate, 2, 0))
	wantTally(t, other, once(Candidate, 1, 0))
}

func TestDoDoesNotAskUnitOfWithoutNeed(t *testing.T) {
	r := running(t, "unasked")
	f := func(context.Context) error { return nil }
	Middleware(func(*http.Request) Unit { t.Error("unitOf was asked"); return Unit{} })(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		_ = r.Do(req.Context(), Unit{Key: "u"}, f, f)
	})).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
}

// A rollback while a Do or a request is under way: its outcome is late, which is counted, and the next one is stable.
func TestRollbackMeanwhile(t *testing.T) {
	r := running(t, "meanwhile")
	u := keyOf(t, r, Candidate)
	f := func(context.Context) error { return r.Rollback(context.Background(), "test") }
	g := func(context.Context) error { t.Error("the wrong function ran"); return nil }
	if err := r.Do(t.Context(), u, f, g); err != nil {
		t.Fatal(err)
	}
	wantTally(t, r, outcomesTally{decided: [2]uint64{0, 1}})
	if n := r.Status().Late; n != 2 {
		t.Errorf("Late is %d, want 2", n)
	}
	ran := false
	if err := r.Do(t.Context(), u, g, func(context.Context) error { ran = true; return nil }); err != nil || !ran {
		t.Error(err, ran)
	}
}

// TestHandlerAllocs holds a request to two allocations over the bare handler, however many rollouts it asks: the scope
// with the response, and the request that carries it.
func TestHandlerAllocs(t *testing.T) {
	bare := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	req, w := httptest.NewRequest("GET", "/", nil), nothing{http.Header{}}
	allocs := func(h http.Handler) float64 {
		return testing.AllocsPerRun(200, func() { h.ServeHTTP(w, req) })
	}
	floor := allocs(bare)
	for _, n := range []int{0, 1, 4} {
		var h http.Handler = bare
		for i := range n {
			h = running(t, fmt.Sprint("alloc", i)).Handler(h, h)
		}
		if got := allocs(Middleware(fixed(Unit{Key: "u"}))(h)) - floor; got > 2 {
			t.Errorf("%d rollouts: %v allocations a request, want at most 2", n, got)
		}
	}
}
