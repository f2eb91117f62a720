package storetest_test

import (
	"testing"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/storetest"
)

func ExampleRun() {
	// In a package's tests this is a function of its own: func TestStore(t *testing.T).
	testStore := func(t *testing.T) {
		storetest.Run(t, func(t testing.TB) storetest.Backend {
			s := rollout.MemStore() // a new, empty one
			return storetest.Backend{Open: func(testing.TB) storetest.Store { return s }}
		})
	}
	_ = testStore
}
