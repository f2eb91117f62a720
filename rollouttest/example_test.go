package rollouttest_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/rollouttest"
)

var checkout = rollout.Must("checkout-v2", rollout.Policy{
	Stages: rollout.Percentages(1, 10, 50, 100),
	Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
}, nil)

func total(ctx context.Context) string {
	if checkout.Enabled(ctx) {
		return "42.00 by the new rules"
	}
	return "42.00 by the old rules"
}

func ExampleForce() {
	// In a package's tests this is a function of its own: func TestNewRules(t *testing.T).
	testNewRules := func(t *testing.T) {
		rollouttest.Force(t, checkout, rollout.Candidate)
		if got, want := total(t.Context()), "42.00 by the new rules"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	_ = testNewRules
}

func ExampleForceContext() {
	ctx := context.Background()
	fmt.Println(total(rollouttest.ForceContext(ctx, checkout, rollout.Candidate)))
	fmt.Println(total(rollouttest.ForceContext(ctx, checkout, rollout.Control)))
	// Output:
	// 42.00 by the new rules
	// 42.00 by the old rules
}
