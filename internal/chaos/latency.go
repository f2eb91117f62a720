package chaos

import (
	"slices"
	"testing"
	"time"
)

// TestLatency: what is rolled back in one process is in the four others within the limit. That is how long they go on giving
// the candidate after Rollback was called. The limit is meant for the 99th percentile on a machine that has nothing else to
// do; what is held to here is ten times that by half, so that the test may run beside others, and none takes as long as a poll.
func (fl Flags) TestLatency(t *testing.T, s Server, limit time.Duration) {
	took := latency(t, s, *fl.rounds, config{Name: "latency", Interval: 5 * time.Second})
	if half, last := took[len(took)/2], took[len(took)-1]; half > 10*limit || last > 4*time.Second { // a tick is 5 s: hints work
		t.Errorf("half of the rollbacks take more than %v, and one takes %v: hints do not work", half, last)
	}
}

// TestLatencyDeaf: without any hint it takes a poll.
func (fl Flags) TestLatencyDeaf(t *testing.T, s Server) {
	const interval = 200 * time.Millisecond
	took := latency(t, s, *fl.rounds/3, config{Name: "deaf", Interval: interval, Deaf: true})
	if half, last := took[len(took)/2], took[len(took)-1]; half > 2*interval || last > 30*interval { // a busy machine may stall
		t.Errorf("half of the rollbacks take more than %v, and one takes %v", half, last)
	}
}

// latency rolls back, and restarts, in five processes in turn, and returns how long that took, in order of length.
func latency(t *testing.T, s Server, rounds int, c config) (took []time.Duration) {
	t.Helper()
	f := newFleet(t, s, 5, c)
	for i := range rounds {
		f.until("the candidate is served", func(p *proc) bool { return p.number("serving") > 0 })
		for _, p := range f.procs {
			if s := p.ask("watch"); s != "ok" {
				t.Fatal(s)
			}
		}
		first := f.procs[i%len(f.procs)]
		at := first.number("rollback latency")
		last := int64(0)
		f.until("the candidate is served no more", func(p *proc) bool {
			off := p.number("off")
			last = max(last, off)
			return off > 0
		})
		took = append(took, time.Duration(last-at))
		f.wait("a restart", func() bool { return first.ask("restart again") == "ok" })
	}
	slices.Sort(took)
	at := func(q int) time.Duration {
		return took[min(len(took)*q/100, len(took)-1)].Round(100 * time.Microsecond)
	}
	t.Logf("%d rollbacks in %d processes: p50 %v, p90 %v, p99 %v, longest %v", rounds, len(f.procs), at(50), at(90), at(99), took[len(took)-1].Round(100*time.Microsecond))
	return took
}
