package main

import (
	"strings"
	"testing"
	"testing/synctest"
)

// TestRun: one ring is rolled back, and the story is told.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		if err := run(t.Context(), &out, europe); err != nil {
			t.Fatalf("%v\n%s", err, &out)
		}
		for _, want := range []string{
			"region-eu is rolled back alone by errors.Within(5)",
			"invoices are void, the newest first",
			"everyone 100 %\n  completed",
		} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%q is missing from:\n%s", want, &out)
			}
		}
	})
}

// TestExpectations: where no ring is at fault, or everyone's is, the program fails.
func TestExpectations(t *testing.T) {
	for wrongFor, want := range map[string]string{
		"no ring":  "one ring, region-eu, should be rolled back",
		"everyone": "rollback began: errors in everyone: ",
	} {
		t.Run(wrongFor, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out strings.Builder
				if err := run(t.Context(), &out, wrongFor); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v, want %q\n%s", err, want, &out)
				}
			})
		})
	}
}
