package rollout

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// recorded is what was logged, a JSON object a line.
type recorded struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *recorded) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(b)
}

// errors are the messages of level Error, and the stack that each tells of.
func (l *recorded) errors(t *testing.T) map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := map[string]string{}
	for line := range strings.Lines(l.all.String()) {
		var r struct{ Level, Msg, Stack string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if r.Level == slog.LevelError.String() {
			all[r.Msg] = r.Stack
		}
	}
	return all
}

// TestCallbacksAreReported: where a callback panics, ends its goroutine or hangs whatever its context says is logged as an
// error with its stack, however long the panic's message; steps and undoing that keep doing so are Stuck, which is logged as
// an error too; a subscriber is called again, and the others wait for one that hangs.
func TestCallbacksAreReported(t *testing.T) {
	for how, says := range map[string]string{"panics": "failed", "exits": "failed", "hangs": "does not return"} {
		for _, who := range []string{"a rollback step", "an undo", "OnRevoke", "a subscriber"} {
			t.Run(who+" "+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var log recorded
					release := make(chan struct{})
					fails := func(here string) error {
						switch {
						case here != who:
						case how == "panics":
							panic(strings.Repeat("oh ", 400))
						case how == "exits":
							runtime.Goexit()
						default:
							<-release
							panic("at last")
						}
						return nil
					}
					p := talks(SessionPolicy{Grace: time.Minute, OnRevoke: func(context.Context, *Session) { _ = fails("OnRevoke") }})
					p.Rollback = []RollbackStep{{Name: "one", Timeout: 10 * time.Second, Attempts: 2, Do: func(context.Context, Incident) error { return fails("a rollback step") }}}
					p.Undo = map[string]func(context.Context, Effect) error{"row": func(context.Context, Effect) error { return fails("an undo") }}
					r := start(t, "x", p, Options{Store: MemStore(), Logger: slog.New(slog.NewJSONHandler(&log, nil))})
					told := 0
					r.Subscribe(func(Event) { _ = fails("a subscriber") })
					r.Subscribe(func(Event) { told++ })
					time.Sleep(time.Minute)
					synctest.Wait()
					must(t, r.Decide(r.of(Candidate)).Journal(t.Context(), "row", nil))
					r.Begin(t.Context(), r.of(Candidate)) // and never ends
					must(t, r.Rollback(t.Context(), "stop"))
					want := RolledBack
					if who == "a rollback step" || who == "an undo" {
						want = Stuck
					}
					for began := time.Now(); r.Status().State != want && time.Since(began) < time.Hour; {
						minute()
					}
					r.is(want, "")
					msgs := log.errors(t)
					if stack := msgs["rollout: "+who+" "+says]; !strings.Contains(stack, "guard_test.go") {
						t.Errorf("logged as errors are %q", msgs)
					}
					if _, ok := msgs["rollout: "+RollbackStuck.String()]; ok != (want == Stuck) {
						t.Errorf("it is %v, and logged as errors are %q", want, msgs)
					}
					if who == "a subscriber" && how == "hangs" && told > 0 {
						t.Errorf("the other subscriber was told %d times meanwhile", told)
					}
					close(release)
					synctest.Wait()
					if told < 2 {
						t.Errorf("the other subscriber was told %d times", told)
					}
					if stack := log.errors(t)["rollout: a subscriber failed"]; who == "a subscriber" && !strings.Contains(stack, "guard_test.go") {
						t.Errorf("it has panicked, and logged as errors are %q", log.errors(t))
					}
				})
			})
		}
	}
}
