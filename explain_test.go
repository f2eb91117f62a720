package rollout

import (
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestExplained: a gate says how the cohorts compare, what is missing and for how long, and, once broken, why.
func TestExplained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := threeStages()
		p.ProveFrom, p.Bake, p.Independent = 10, time.Second, true
		p.Gates = []Gate{Errors.Within(1), Latency.Quantile(.9).WithinFactor(1.5)}
		r := start(t, "x", p, Options{})
		r.serve(5*time.Minute, .01, .01)
		s := r.Status()
		g := s.Gates[0]
		if s.State != Running || !g.Difference.Known || g.Difference.Low > 0 || g.Difference.High < 0 || g.Difference.High > .1 {
			t.Fatalf("%v: %+v", s.State, g)
		}
		if want := regexp.MustCompile(`^errors: [\d.]+ % against [\d.]+ %, between -[\d.]+ and [\d.]+ points worse at all looks, after \d+ outcomes$`); !want.MatchString(g.Summary) {
			t.Errorf("the summary is %q", g.Summary)
		}
		if g.NeedN == 0 || !strings.Contains(g.Missing, "to be proven") || !strings.Contains(g.Missing, "at the present traffic") {
			t.Errorf("missing is %q, %d, %v", g.Missing, g.NeedN, g.NeedTime)
		}
		// A tenth of ten requests a second: one a second.
		if per := g.NeedTime.Seconds() / float64(g.NeedN); per < .7 || per > 1.4 {
			t.Errorf("%d more in %v", g.NeedN, g.NeedTime)
		}
		if got := s.Gates[1]; !strings.Contains(got.Missing, "no c") { // no latency is recorded
			t.Errorf("latency misses %q", got.Missing)
		}
		r.until(RolledBack, .01, .3)
		in := r.Status().Incident
		if want := regexp.MustCompile(`^errors: [\d.]+ % against [\d.]+ %, .*worse.*, after [\d,]+ outcomes$`); in == nil || !want.MatchString(in.Note) {
			t.Errorf("the incident says %+v", in)
		}
		t.Log(g.Summary)
		t.Log(g.Missing)
		t.Log(in.Note)
	})
}

// BenchmarkStatus is one Status of a rollout with evidence.
func BenchmarkStatus(b *testing.B) {
	r := startedWith(b, checkout())
	for range 1000 {
		d := r.Decide(Unit{Key: "x", Groups: []string{"staff"}})
		d.Record(Errors.Observe(false), Latency.Observe(time.Millisecond))
	}
	for b.Loop() {
		r.Status()
	}
}
