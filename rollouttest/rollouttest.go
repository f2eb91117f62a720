// Package rollouttest helps to test code that asks a rollout: it forces the answer, so that a test covers the candidate
// and the stable version without searching for units that get them.
//
//	func TestNewCheckout(t *testing.T) {
//		rollouttest.Force(t, checkout, rollout.Candidate)
//		// … every request gets the new checkout until the test ends
//	}
//
// A forced decision has the reason [rollout.ReasonForced] and needs no unit, no Run and no loaded state. It is never
// evidence: neither the decision nor what is recorded on it is counted, whatever the cohort, and Status.Late does not
// count it either. Only an observation of a metric that the policy does not name still counts in Status.Unknown, so that
// a test can find it.
package rollouttest

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/internal/force"
)

// active are the names of the tests that force a rollout, the newest last.
var active = struct {
	sync.Mutex
	tests map[*rollout.Rollout][]string
}{tests: map[*rollout.Rollout][]string{}}

// Force makes every decision of r from now on be of cohort c, until t ends: Candidate is enabled, Control and None are
// stable. It holds for [rollout.Rollout.Decide], [rollout.Rollout.Peek], every context and every Do, and whatever becomes
// of the rollout meanwhile, also after a rollback. A context in which r was asked before keeps that answer, as it always
// does.
//
// A test and its subtests may force r again; the newest holds until its test ends. Tests that run at the same time may
// not, since each would change the other's answers: Force then fails t. They can use [ForceContext], or a Rollout each.
// It also fails t if r is nil or c is no cohort.
func Force(t testing.TB, r *rollout.Rollout, c rollout.Cohort) {
	t.Helper()
	if err := check(r, c); err != nil {
		t.Fatal(err)
	}
	active.Lock()
	defer active.Unlock()
	tests := active.tests[r]
	if n := len(tests); n > 0 && t.Name() != tests[n-1] && !strings.HasPrefix(t.Name(), tests[n-1]+"/") {
		t.Fatalf("rollouttest: Force: %s is forced by %s, which runs at the same time; use ForceContext, or a Rollout for each test", r.Name(), tests[n-1])
	}
	active.tests[r] = append(tests, t.Name())
	release := force.Rollout(r, uint8(c))
	t.Cleanup(func() {
		active.Lock()
		defer active.Unlock()
		release()
		tests := active.tests[r]
		if tests = tests[:len(tests)-1]; len(tests) == 0 {
			delete(active.tests, r)
		} else {
			active.tests[r] = tests
		}
	})
}

// ForceContext returns a context in which every decision of r is of cohort c: Candidate is enabled, Control and None are
// stable. It holds also in what is made of the context: by [rollout.NewContext], a Do, or a [rollout.Middleware] that
// serves a request with it. Other rollouts answer as in ctx, and r elsewhere as it would. It takes precedence over
// [Force], and the innermost ForceContext over those around it.
//
// It panics if r is nil or c is no cohort.
func ForceContext(ctx context.Context, r *rollout.Rollout, c rollout.Cohort) context.Context {
	if err := check(r, c); err != nil {
		panic(err)
	}
	return force.Context(ctx, r, uint8(c))
}

func check(r *rollout.Rollout, c rollout.Cohort) error {
	if r == nil {
		return fmt.Errorf("rollouttest: the Rollout is nil: it always decides stable")
	}
	if c > rollout.Candidate {
		return fmt.Errorf("rollouttest: %d is not a Cohort", c)
	}
	return nil
}
