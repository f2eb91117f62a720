package rollout

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"time"
)

// stepGrace is how long a callback may take to return after its context ended.
const stepGrace = time.Second

// backoff is the pause after the n-th failure, from 0: it doubles from 1 s to 1 min, half of it by chance.
func backoff(n int) time.Duration {
	d := min(time.Second<<min(n, 10), time.Minute)
	return d/2 + rand.N(d/2+1)
}

// sleep waits for d and reports whether ctx lasted.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// errExited is what came of a callback that neither returned nor panicked.
var errExited = errors.New("it ended its goroutine")

// broken is what came of a callback that panicked or ended its goroutine, and where.
type broken struct {
	error
	stack []byte
}

func (b *broken) Unwrap() error { return b.error }
func (b *broken) Error() string { return fmt.Sprintf("%v\n%s", b.error, b.stack) }

// hung is what came of a callback that has not returned.
type hung struct {
	cause error
	label string // of its goroutine, if it has one
}

func (h *hung) Unwrap() error { return h.cause }
func (h *hung) Error() string { return "it has not returned: " + h.cause.Error() }

// guard calls f in a goroutine of its own and waits for it until ctx ended and grace passed: what does not return then is
// left behind. A panic becomes an error with its stack, and so does an end of the goroutine: runtime.Goexit, by which
// t.FailNow ends a test.
func guard[T any](ctx context.Context, grace time.Duration, f func(context.Context) (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		var res result
		returned := false
		defer func() {
			if !returned {
				res.err = errExited
				if p := recover(); p != nil {
					res.err = fmt.Errorf("panic: %v", p)
				}
				res.err = &broken{res.err, debug.Stack()}
			}
			done <- res
		}()
		res.v, res.err = f(ctx)
		returned = true
	}()
	select {
	case res := <-done:
		return res.v, res.err
	case <-ctx.Done():
	}
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case res := <-done:
		return res.v, res.err
	case <-t.C:
		var zero T
		return zero, &hung{cause: context.Cause(ctx)}
	}
}

// goroutineLabel is the label of goroutines that run what the host wants to know of if it hangs.
const goroutineLabel = "rollout-callback"

// labelled is guard for a callback of which logStack tells where it hangs. Its goroutine has a label, and so have those
// that it starts.
func labelled(ctx context.Context, label string, grace time.Duration, f func(context.Context) error) error {
	_, err := guard(ctx, grace, func(ctx context.Context) (struct{}, error) {
		ctx = pprof.WithLabels(ctx, pprof.Labels(goroutineLabel, label))
		pprof.SetGoroutineLabels(ctx)
		return struct{}{}, f(ctx)
	})
	if h, ok := err.(*hung); ok { // this guard's, not one that f returned
		h.label = label
	}
	return err
}

// logStack logs where a callback of the host has panicked, ended its goroutine or hangs: a note has no room for it. Where
// many hang, one of them a tick: to look for it is as much work as there are goroutines.
func (r *Rollout) logStack(what string, err error, attrs ...any) {
	switch e := err.(type) { // what is wrapped came of something that the callback called
	case *broken:
		r.logger().Error("rollout: "+what+" failed", append(attrs, "rollout", r.name, "err", e.error, "stack", string(e.stack))...)
	case *hung:
		if r.looksFor(e) {
			r.logger().Error("rollout: "+what+" does not return", append(attrs, "rollout", r.name, "err", e, "stack", stacksOf(e.label))...)
		}
	}
}

// looksFor reports whether it is time to look where a callback hangs.
func (r *Rollout) looksFor(h *hung) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	if h.label == "" || !r.looked.IsZero() && now.Sub(r.looked) < r.o.Interval {
		return false
	}
	r.looked = now
	return true
}

// stacksOf is where the goroutines with a label are.
func stacksOf(label string) string {
	var all strings.Builder
	if err := pprof.Lookup("goroutine").WriteTo(&all, 1); err != nil {
		return ""
	}
	var with []string
	for _, block := range strings.Split(all.String(), "\n\n") {
		if strings.Contains(block, fmt.Sprintf("%q:%q", goroutineLabel, label)) {
			with = append(with, block)
		}
	}
	return strings.Join(with, "\n\n")
}
