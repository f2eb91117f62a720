package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/stagedrollout/rollout"
)

// screen prints a line for each stage. On a terminal the line of the present stage moves.
type screen struct {
	out      io.Writer
	terminal bool
	shoppers *shoppers
}

func newScreen(out io.Writer, s *shoppers) *screen {
	f, ok := out.(*os.File)
	if ok {
		info, err := f.Stat()
		ok = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return &screen{out: out, terminal: ok, shoppers: s}
}

func (s *screen) printf(format string, args ...any) { fmt.Fprintf(s.out, format, args...) }

// follow shows a rollout until it has ended, and returns an error unless it ends as it should.
func (s *screen) follow(ctx context.Context, r *rollout.Rollout, want rollout.State) error {
	began := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var line stageLine
	for {
		status := r.Status()
		switch status.State {
		case rollout.Pending, rollout.RollingBack: // on its way
		case rollout.Running:
			if line.stage != status.Stage.Name {
				s.keep(line)
				line = stageLine{stage: status.Stage.Name, entered: time.Now(), sent: s.shoppers.sent.Load()}
			}
			line.text = s.describe(line, status)
			s.draw(line)
		default:
			s.keep(line)
			s.printf("  %v after %.1f s\n", status.State, time.Since(began).Seconds())
			if status.State != want {
				return fmt.Errorf("%s is %v, it should be %v", r.Name(), status.State, want)
			}
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.keep(line)
			return fmt.Errorf("%s is still %v: %w", r.Name(), status.State, context.Cause(ctx))
		}
	}
}

// stageLine is what is shown of one stage.
type stageLine struct {
	stage   string // "": none yet
	entered time.Time
	sent    int64 // requests before it
	text    string
}

// describe is the text for the present stage.
func (s *screen) describe(line stageLine, status rollout.Status) string {
	everyone := status.Rings[len(status.Rings)-1].Percent
	took := time.Since(line.entered).Seconds()
	perSecond := float64(s.shoppers.sent.Load()-line.sent) / max(took, 0.001)
	errorRate := status.Gates[0] // of the whole rollout so far
	return fmt.Sprintf("  %s %-14s %4.1f s %5.0f req/s  failed: new %.1f %%, old %.1f %%",
		bar(float64(everyone)), line.stage, took, perSecond, 100*errorRate.Candidate.Rate, 100*errorRate.Control.Rate)
}

// bar is a share of all users.
func bar(percent float64) string {
	const width = 10
	full := int(percent / 100 * width)
	return strings.Repeat("█", full) + strings.Repeat("░", width-full)
}

// draw shows a line that will change, where that is possible.
func (s *screen) draw(line stageLine) {
	if s.terminal {
		s.printf("\r\x1b[K%s", line.text)
	}
}

// keep leaves a line as it is.
func (s *screen) keep(line stageLine) {
	switch {
	case line.stage == "":
	case s.terminal:
		s.printf("\n")
	default:
		s.printf("%s\n", line.text)
	}
}

// incident reports a rollback: why it happened, and whom the bad version reached.
func (s *screen) incident(in rollout.Incident, bad exposure, restored bool) {
	s.printf("\nIncident in the stage %q\n", in.Stage)
	s.printf("  broken gate    %s\n", in.Gate)
	s.printf("  new version    %.1f %% failed, %d of %d\n", 100*in.Candidate.Rate, in.Candidate.Events, in.Candidate.N)
	s.printf("  old version    %.1f %% failed, %d of %d\n", 100*in.Control.Rate, in.Control.Events, in.Control.N)
	s.printf("  exposed        %d requests of %d users, of %d\n", bad.requests, bad.users, allUsers)
	s.printf("  zero exposure  %.2f s after the first bad response\n", bad.last.Sub(bad.firstBad).Seconds())
	s.printf("  rollback step  prices restored: %t\n", restored)
}
