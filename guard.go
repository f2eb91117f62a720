package rollout

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
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
		res := result{err: errExited}
		defer func() {
			if p := recover(); p != nil {
				res.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			}
			done <- res
		}()
		res.v, res.err = f(ctx)
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
		return zero, fmt.Errorf("it has not returned: %w", context.Cause(ctx))
	}
}
