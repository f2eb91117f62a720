package simulate

import (
	"fmt"
	"strings"
	"time"

	"github.com/stagedrollout/rollout"
)

// Report is how a rehearsal went. It marshals to JSON with names for enumerations and nanoseconds for durations; times of
// events are virtual. The same rehearsal gives the same report.
type Report struct {
	Name    string    `json:"name"` // of the rollout
	Version string    `json:"version,omitempty"`
	Seed    uint64    `json:"seed"`
	Start   time.Time `json:"start"` // virtual

	State rollout.State `json:"state"`          // in which it ended: Running or Held at the horizon, or at the end of a record
	Stage string        `json:"stage"`          // the last one; "" if none was entered
	End   time.Duration `json:"end"`            // when it ended, since Start
	Note  string        `json:"note,omitempty"` // why it is held

	// Requests are all decisions until End; Candidate those that got the candidate, Control those it is compared with, and
	// Exposed the distinct units that got the candidate at least once.
	Requests  int `json:"requests"`
	Candidate int `json:"candidate"`
	Control   int `json:"control"`
	Exposed   int `json:"exposed"`
	// Skipped are recorded outcomes that did not count, because the policy had nobody of their cohort in their ring then.
	// They are in none of the other numbers.
	Skipped int `json:"skipped,omitempty"`

	Stages   []Stage              `json:"stages"`
	Events   []rollout.Event      `json:"events"`
	Gates    []rollout.GateStatus `json:"gates"` // as they stood at End
	Incident *rollout.Incident    `json:"incident,omitempty"`

	Late    uint64 `json:"late,omitempty"`    // observations that came too late to count
	Unknown uint64 `json:"unknown,omitempty"` // observations of metrics that the policy does not name
}

// Stage is the time from entering a stage, or stepping back to it, until it was left or all ended.
type Stage struct {
	Name    string          `json:"name"`
	Ring    string          `json:"ring"`
	Percent rollout.Percent `json:"percent"` // when it was entered: a stage that climbs begins lower
	Entered time.Duration   `json:"entered"` // since Start
	Left    time.Duration   `json:"left"`

	Requests  int `json:"requests"`
	Candidate int `json:"candidate"`
	Control   int `json:"control"`
	Exposed   int `json:"exposed"` // units that got the candidate for the first time
}

// leave ends the present stage.
func (rep *Report) leave(at time.Duration) {
	if n := len(rep.Stages); n > 0 {
		rep.Stages[n-1].Left = at
	}
}

// String is the report as a timeline, for people: some lines, each with its newline.
func (rep Report) String() string {
	var b strings.Builder
	title := rep.Name
	if rep.Version != "" {
		title += " " + rep.Version
	}
	how := rep.State.String()
	switch rep.State {
	case rollout.Completed, rollout.RolledBack:
		how += " after " + length(rep.End)
	default:
		how = fmt.Sprintf("still %s after %s", how, length(rep.End))
		if rep.Stage != "" {
			how += fmt.Sprintf(" in %q", rep.Stage)
		}
	}
	if rep.Note != "" {
		how += ": " + rep.Note
	}
	fmt.Fprintf(&b, "%s: %s\n", title, how)
	for _, e := range rep.Events {
		fmt.Fprintf(&b, "  %9s  %s\n", length(e.Time.Sub(rep.Start)), eventText(e))
	}
	if in := rep.Incident; in != nil && in.Gate != "" {
		fmt.Fprintf(&b, "  incident   candidate %s, control %s\n", estimate(in.Candidate), estimate(in.Control))
	}
	fmt.Fprintf(&b, "  exposed    %d of %d requests, %d units\n", rep.Candidate, rep.Requests, rep.Exposed)
	if rep.Skipped > 0 {
		fmt.Fprintf(&b, "  skipped    %d outcomes whose cohort the policy did not have then\n", rep.Skipped)
	}
	if rep.Late+rep.Unknown > 0 {
		fmt.Fprintf(&b, "  dropped    %d observations too late, %d of unknown metrics\n", rep.Late, rep.Unknown)
	}
	wide := 0
	for _, g := range rep.Gates {
		wide = max(wide, len(g.Name))
	}
	for _, g := range rep.Gates {
		fmt.Fprintf(&b, "  gate       %-*s  %-12s", wide, g.Name, g.Verdict)
		if g.Metric != "" {
			fmt.Fprintf(&b, "  candidate %s, control %s", estimate(g.Candidate), estimate(g.Control))
		}
		if told := rep.Incident != nil && rep.Incident.Note == g.Cause; g.Cause != "" && !told {
			fmt.Fprintf(&b, "; %s", g.Cause)
		} else if g.Missing != "" && g.Cause == "" {
			fmt.Fprintf(&b, "; %s", g.Missing)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// length is a duration to the second, or as it is if it is shorter than a minute.
func length(d time.Duration) string {
	if d < time.Minute {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func eventText(e rollout.Event) string {
	text := e.Kind.String()
	switch e.Kind {
	case rollout.StageEntered, rollout.SteppedBack:
		text += ": " + e.Stage
	case rollout.Climbed, rollout.PercentSet:
		text += fmt.Sprintf(": %s %v %%", e.Ring, float64(e.Percent))
	case rollout.RingRolledBack:
		text += ": " + e.Ring
	}
	if e.Gate != "" {
		text += ": " + e.Gate
	}
	if e.Note != "" && e.Kind != rollout.Started {
		text += ": " + e.Note
	}
	return text
}

func estimate(e rollout.Estimate) string {
	if e.N == 0 {
		return "none"
	}
	text := fmt.Sprintf("%d of %d (%.2f %%)", e.Events, e.N, 100*e.Rate)
	if e.Quantile > 0 {
		text = fmt.Sprintf("%v of %d", e.Quantile.Round(time.Microsecond), e.N)
	}
	return text
}
