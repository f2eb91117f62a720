package rollouttest_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/rollouttest"
)

var (
	cohorts = []rollout.Cohort{rollout.None, rollout.Control, rollout.Candidate}
	unit    = rollout.Unit{Key: "u", Groups: []string{"staff"}}
)

func newRollout(tb testing.TB, name string) *rollout.Rollout {
	tb.Helper()
	return rollout.Must(name, rollout.Policy{
		Version: "v2",
		Rings:   []rollout.Ring{{Name: "staff"}, {Name: "panics", Match: func(u rollout.Unit) bool { panic(u) }}},
		Stages:  rollout.Percentages(1, 50, 100),
		Gates:   []rollout.Gate{rollout.Errors.AtMost(1), rollout.Errors.Never()},
	}, nil)
}

// silent checks that nothing was counted.
func silent(t *testing.T, r *rollout.Rollout) {
	t.Helper()
	s := r.Status()
	for _, ring := range s.Rings {
		if ring.Candidate != 0 || ring.Control != 0 {
			t.Errorf("decisions were counted: %+v", ring)
		}
	}
	for _, g := range s.Gates {
		if g.Candidate.N != 0 || g.Control.N != 0 {
			t.Errorf("outcomes were counted: %+v", g)
		}
	}
	if s.Late != 0 || s.NoUnit != 0 {
		t.Errorf("Late %d, NoUnit %d", s.Late, s.NoUnit)
	}
}

// decisions are what r answers in every way there is.
func decisions(ctx context.Context, r *rollout.Rollout) map[string]rollout.Decision {
	ds := map[string]rollout.Decision{
		"DecideContext": r.DecideContext(ctx),
		"NewContext":    r.DecideContext(rollout.NewContext(ctx, unit)),
	}
	_ = r.Do(ctx, unit, func(ctx context.Context) error {
		ds["Do, candidate"] = r.DecideContext(ctx)
		return errors.New("boom")
	}, func(ctx context.Context) error {
		ds["Do, stable"] = r.DecideContext(ctx)
		return errors.New("boom")
	})
	serve := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			ds["Middleware, "+name] = r.DecideContext(req.Context())
			w.WriteHeader(500)
		})
	}
	h := rollout.Middleware(func(*http.Request) rollout.Unit { return unit })(r.Handler(serve("candidate"), serve("stable")))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil).WithContext(ctx))
	return ds
}

func check(t *testing.T, ds map[string]rollout.Decision, c rollout.Cohort) {
	t.Helper()
	enabled := c == rollout.Candidate
	for name, d := range ds {
		if d.Cohort() != c || d.Enabled() != enabled || d.Reason() != rollout.ReasonForced || d.Version() != "v2" {
			t.Errorf("%s: %v, %v, %v, version %q", name, d.Cohort(), d.Enabled(), d.Reason(), d.Version())
		}
		if strings.HasSuffix(name, "candidate") != enabled && strings.Contains(name, ", ") {
			t.Errorf("%s: the wrong function ran for %v", name, c)
		}
		d.Record(rollout.Errors.Observe(true), rollout.Latency.Observe(1))
	}
}

func TestForce(t *testing.T) {
	for _, c := range cohorts {
		t.Run(c.String(), func(t *testing.T) {
			r := newRollout(t, "force")
			before := r.Decide(unit)
			t.Run("inside", func(t *testing.T) {
				rollouttest.Force(t, r, c)
				ds := decisions(t.Context(), r)
				ds["Decide"], ds["Peek"] = r.Decide(unit), r.Peek(unit)
				if ring := ds["Decide"].Ring(); ring != "staff" {
					t.Errorf("the ring is %q", ring)
				}
				ds["Decide nobody"], ds["Peek nobody"] = r.Decide(rollout.Unit{}), r.Peek(rollout.Unit{})
				check(t, ds, c)
				silent(t, r)
			})
			if after := r.Decide(unit); after.Reason() != before.Reason() || after.Enabled() {
				t.Errorf("afterwards: %v, before: %v", after.Reason(), before.Reason())
			}
		})
	}
}

// The newest forcing holds; when its test ends, the one before does again.
func TestForceAgain(t *testing.T) {
	r := newRollout(t, "again")
	want := func(c rollout.Cohort) {
		t.Helper()
		if d := r.Decide(unit); d.Cohort() != c || d.Reason() != rollout.ReasonForced {
			t.Errorf("%v, %v; want %v", d.Cohort(), d.Reason(), c)
		}
	}
	rollouttest.Force(t, r, rollout.Candidate)
	t.Run("sub", func(t *testing.T) {
		rollouttest.Force(t, r, rollout.Control)
		want(rollout.Control)
		rollouttest.Force(t, r, rollout.None)
		want(rollout.None)
	})
	want(rollout.Candidate)
}

// What happens to the rollout while it is forced shows when it is no longer, and not before.
func TestForceOutlastsTheState(t *testing.T) {
	r := newRollout(t, "outlasts")
	t.Run("forced", func(t *testing.T) {
		rollouttest.Force(t, r, rollout.Candidate)
		if err := r.Rollback(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		if !r.Decide(unit).Enabled() {
			t.Error("the rollback ended the forcing")
		}
		if s := r.Status().State; s != rollout.RolledBack {
			t.Error("the state is", s)
		}
	})
	if d := r.Decide(unit); d.Enabled() || d.Reason() != rollout.ReasonRolledBack {
		t.Errorf("afterwards: %v, %v", d.Enabled(), d.Reason())
	}
}

// A context that was answered keeps its answer.
func TestForceKeepsAnswers(t *testing.T) {
	r := newRollout(t, "keeps")
	ctx := rollout.NewContext(t.Context(), unit)
	if r.Enabled(ctx) {
		t.Fatal("enabled before anything is loaded")
	}
	rollouttest.Force(t, r, rollout.Candidate)
	if r.Enabled(ctx) {
		t.Error("an answer changed")
	}
}

// A token of a forced decision comes back with its answer, and still is no evidence.
func TestForceToken(t *testing.T) {
	r := newRollout(t, "token")
	rollouttest.Force(t, r, rollout.Candidate)
	text, err := r.Decide(unit).MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.ParseDecision(text)
	if err != nil || !d.Enabled() || d.Reason() != rollout.ReasonForced || d.Ring() != "staff" {
		t.Errorf("%v, %v, %v", d.Enabled(), d.Reason(), err)
	}
	d.Record(rollout.Errors.Observe(true))
	silent(t, r)
}

func TestForceContext(t *testing.T) {
	for _, c := range cohorts {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			r, other := newRollout(t, "context"), newRollout(t, "other")
			ctx := rollouttest.ForceContext(t.Context(), r, c)
			check(t, decisions(ctx, r), c)
			rollout.Record(ctx, rollout.Errors.Observe(true))
			silent(t, r)
			if d := r.Decide(unit); d.Reason() == rollout.ReasonForced {
				t.Error("forced outside of the context")
			}
			if d := other.DecideContext(ctx); d.Reason() == rollout.ReasonForced {
				t.Error("another rollout is forced")
			}
			inner := rollouttest.ForceContext(rollouttest.ForceContext(ctx, other, rollout.Control), r, rollout.Candidate)
			check(t, decisions(inner, r), rollout.Candidate)
			check(t, decisions(inner, other), rollout.Control)
			check(t, decisions(ctx, r), c)
		})
	}
}

// ForceContext changes nothing for other rollouts: their unit, asked once, their answers and what is recorded stay those
// of the context around.
func TestForceContextInsideARequest(t *testing.T) {
	r, other := newRollout(t, "mine"), newRollout(t, "theirs")
	asks := 0
	rollout.Middleware(func(*http.Request) rollout.Unit { asks++; return unit })(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		ctx := rollouttest.ForceContext(req.Context(), r, rollout.Candidate)
		var g sync.WaitGroup
		for range 4 {
			g.Go(func() {
				d := r.DecideContext(ctx)
				if !d.Enabled() || d.Ring() != "staff" {
					t.Errorf("%v in ring %q", d.Enabled(), d.Ring())
				}
				if other.DecideContext(ctx) != other.DecideContext(req.Context()) {
					t.Error("another rollout answers otherwise")
				}
			})
		}
		g.Wait()
		rollout.Record(ctx, rollout.NewRate("odd").Observe(true))
	})).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	if asks != 1 {
		t.Errorf("unitOf was asked %d times", asks)
	}
	silent(t, r)
}

// fake is a test whose end and failures are looked at.
type fake struct {
	testing.TB
	name     string
	failed   string
	cleanups []func()
}

func (f *fake) Helper()           {}
func (f *fake) Name() string      { return f.name }
func (f *fake) Cleanup(fn func()) { f.cleanups = append(f.cleanups, fn) }
func (f *fake) Fatal(args ...any) {
	f.failed = fmt.Sprint(args...)
	panic(f)
}
func (f *fake) Fatalf(format string, args ...any) { f.Fatal(fmt.Sprintf(format, args...)) }

// run calls Force as a test called name.
func run(name string, r *rollout.Rollout, c rollout.Cohort) (f *fake) {
	f = &fake{name: name}
	defer func() {
		if p := recover(); p != nil && p != any(f) {
			panic(p)
		}
	}()
	rollouttest.Force(f, r, c)
	return f
}

func TestForceRefuses(t *testing.T) {
	r := newRollout(t, "refuses")
	if f := run("TestA", nil, rollout.Candidate); !strings.Contains(f.failed, "nil") {
		t.Errorf("a nil Rollout: %q", f.failed)
	}
	if f := run("TestA", r, 3); !strings.Contains(f.failed, "not a Cohort") {
		t.Errorf("a wrong cohort: %q", f.failed)
	}
	first := run("TestA", r, rollout.Candidate)
	for name, ok := range map[string]bool{"TestA": true, "TestA/sub": true, "TestAB": false, "TestB": false} {
		f := run(name, r, rollout.Control)
		if (f.failed == "") != ok {
			t.Errorf("%s beside TestA: %q", name, f.failed)
		}
		for _, end := range f.cleanups {
			end()
		}
		if !r.Decide(unit).Enabled() {
			t.Errorf("%s left something behind", name)
		}
	}
	first.cleanups[0]()
	if f := run("TestB", r, rollout.Control); f.failed != "" {
		t.Error(f.failed)
	} else {
		f.cleanups[0]()
	}
	for name, call := range map[string]func(){
		"nil":    func() { rollouttest.ForceContext(t.Context(), nil, rollout.Candidate) },
		"cohort": func() { rollouttest.ForceContext(t.Context(), r, 3) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: ForceContext did not panic", name)
				}
			}()
			call()
		}()
	}
}
