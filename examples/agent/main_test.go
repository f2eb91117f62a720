package main

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout"
)

// TestRun: both versions are rolled back as they should be, and the story is told.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		if err := run(t.Context(), &out); err != nil {
			t.Fatalf("%v\n%s", err, &out)
		}
		for _, want := range []string{
			"by tools.NoChange: the mix has changed",
			`"Where is my parcel?": search the handbook`,
			"by refund-without-permission.Never: ",
			`"I want my money back, now!": pay a refund`,
			"3 chats finished their turn and 3 were handed over to v1; 1 call was moved to v1 by OnRevoke",
			"0 conversations are left with v3 and 0 were cut; there are 0 orders by v3",
		} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%q is missing from:\n%s", want, &out)
			}
		}
	})
}

// TestExpectations: a version without a flaw, or one that another gate catches, makes the program fail.
func TestExpectations(t *testing.T) {
	for name, c := range map[string]struct {
		m    model
		gate string
		want string
	}{
		"no flaw":      {model{version: "v2"}, "tools.NoChange", "waited for a rollback: context deadline exceeded"},
		"another gate": {v3, "tools.NoChange", "rolled back by \"refund-without-permission.Never\""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				var out strings.Builder
				err := deploy(ctx, &out, rollout.MemStore(), c.m, c.gate)
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %q\n%s", err, c.want, &out)
				}
			})
		})
	}
}
