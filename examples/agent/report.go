package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/stagedrollout/rollout"
)

// report prints what happened to a version.
func report(out io.Writer, in rollout.Incident, d *desk, s *shop, left after) {
	line := func(title, format string, args ...any) {
		fmt.Fprintf(out, "  %-12s%s\n", title, fmt.Sprintf(format, args...))
	}
	line("rolled back", "by %s: %s", in.Gate, strings.TrimPrefix(in.Note, in.Metric+": "))
	if in.Candidate.Mix != nil {
		line("", "%s: %s", in.Version, shares(in.Candidate))
		line("", "v1: %s", shares(in.Control))
	}
	for _, why := range in.Rationales[:min(len(in.Rationales), 2)] {
		line("because", "%s", why)
	}
	line("live", "%d chats finished their turn and %d were handed over to v1; %d call was moved to v1 by OnRevoke",
		d.finished.Load(), d.handed.Load(), d.moved.Load())
	line("web", "%d conversations found their pin rolled back and began anew with v1", d.anew.Load())
	var undone []string
	for _, e := range s.undone[:min(len(s.undone), 4)] {
		undone = append(undone, fmt.Sprintf("%s %s", e.Kind, e.Payload))
	}
	line("undone", "%s … %d in all, the newest first", strings.Join(undone, ", "), len(s.undone))
	line("drained", "%d conversations are left with %s and %d were cut; there are %d orders by %s and %d by v1",
		left.sessions, in.Version, left.cut, s.by(in.Version), in.Version, s.by(v1.version))
}

// shares are how often each tool was taken.
func shares(e rollout.Estimate) string {
	var parts []string
	for _, tool := range []string{toOrders, toHandbook, toReplace, toSupervisor} {
		parts = append(parts, fmt.Sprintf("%s %.0f %%", tool, 100*float64(e.Mix[tool])/float64(max(e.N, 1))))
	}
	return strings.Join(parts, ", ")
}

// check reports what is wrong with why the version was rolled back.
func (w *watcher) check(m model, gate string) error {
	in := w.incident
	switch {
	case in.Version != m.version:
		return fmt.Errorf("%q was rolled back, it should be %q", in.Version, m.version)
	case in.Gate != gate:
		return fmt.Errorf("%s was rolled back by %q, it should be by %q: %s", m.version, in.Gate, gate, in.Note)
	case !slices.ContainsFunc(in.Rationales, func(why string) bool { return strings.HasPrefix(why, "customer ") }):
		return fmt.Errorf("%s was rolled back without a rationale: %q", m.version, in.Rationales)
	}
	return nil
}

// check reports what is wrong with what became of the conversations.
func (d *desk) check() error {
	var errs []error
	expect := func(what string, got, least, most int64) {
		if got < least || got > most {
			errs = append(errs, fmt.Errorf("%s: %d", what, got))
		}
	}
	const many = 1 << 30
	expect("of 3 chats finished the turn that was under way", d.finished.Load(), 3, 3)
	expect("of 3 chats were handed over", d.handed.Load(), 3, 3)
	expect("of 1 call was moved by OnRevoke", d.moved.Load(), 1, 1)
	expect("web conversations began anew, it should be one at least", d.anew.Load(), 1, many)
	expect("conversations were cut, it should be none", d.cut.Load(), 0, 0)
	expect("conversations were given the new version after it was rolled back", d.wrong.Load(), 0, 0)
	return errors.Join(errs...)
}

// after is who was on the new version after Drain, and whom that has cut.
type after struct {
	sessions uint64
	cut      int
}

// check reports them.
func (a after) check() error {
	if a != (after{}) {
		return fmt.Errorf("after Drain %d conversations are left on the new version, and %d were cut", a.sessions, a.cut)
	}
	return nil
}
