package main

import (
	"flag"
	"slices"
	"testing"
)

var ocRuns = flag.Int("oc.runs", 40, "runs of each simulated release")

// TestTables makes every table in a short form, from fixed seeds, and breaks no bound.
func TestTables(t *testing.T) {
	c := &config{runs: *ocRuns, seed: 1, short: true}
	if raced {
		c.runs = 4 // nothing in it is concurrent but the runs
	}
	for _, table := range tables {
		t.Run(table.name, func(t *testing.T) {
			if raced && !slices.Contains([]string{"several", "silence"}, table.name) {
				t.Skip("takes minutes, and does nothing at the same time that others do not")
			}
			got := table.make(c)
			if got.broken > 0 && !raced {
				t.Errorf("%d bounds are broken:\n%s", got.broken, got.String())
			}
			if len(got.rows) == 0 {
				t.Error("no rows")
			}
		})
	}
}
