// Backtest replays what was recorded of two versions and prints what the gates would have said, as a timeline:
//
//	go run ./examples/backtest [-format FORMAT] [-control NAME] [-candidate NAME] FILE
//
// Without a FILE it makes two small records up, one of versions that do not differ and one in which the candidate goes
// bad, and replays these. A FILE that ends in .gz is unpacked. -h describes the formats.
//
// This file is the program, csv.go reads the generic format, public.go records of public benchmarks, counters.go counters
// that a server shows, and demo.go makes records up.
package main

import (
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

const usage = `usage: backtest [-format FORMAT] [-control NAME] [-candidate NAME] FILE

Formats:

csv        A line for each observation, with a header that names the columns in any order:
             time    RFC 3339, or seconds since any moment
             unit    who it is of; empty: of nobody in particular
             cohort  control or candidate; empty: the policy assigns the unit
             metric  a name; one that ends in _ms is a duration, any other is a yes-or-no question
             value   of a duration the milliseconds; else 0 or 1, and 1 is bad
             ring    may be left out
           Lines of the same time, unit and cohort are one outcome. They need not be in order.
taubench   Runs of an agent: task_id,trial,reward,tool_calls,tool_errors and others. -control and -candidate are trials;
           without them each trial is compared with each other.
aider      Runs of a benchmark: dirname,test_cases,pass_n_2,num_with_malformed_responses and others. -control and
           -candidate are parts of the dirname.
jailbreak  Outcomes of attacks: model,violation and others. -control and -candidate are parts of the model's name.
nginx      Counters of zones: ts_ms,zone,requests,r5xx and others, each since the server started. -candidate and -control
           are zones; without a candidate each zone is looked at by itself.

Flags:
`

// comparison is one record to be replayed, with what is asked of it.
type comparison struct {
	name     string
	outcomes []simulate.Recorded // in the order of their times
	gates    []rollout.Gate
}

// reader makes comparisons of a file. control and candidate choose, if they are not empty.
type reader func(r io.Reader, control, candidate string) ([]comparison, error)

var readers = map[string]reader{"csv": readCSV, "taubench": readTauBench, "aider": readAider, "jailbreak": readJailbreak, "nginx": readCounters}

func main() {
	format := flag.String("format", "csv", "of the file: "+strings.Join(slices.Sorted(maps.Keys(readers)), ", "))
	control := flag.String("control", "", "which `name` in the file is the control")
	candidate := flag.String("candidate", "", "which `name` in the file is the candidate")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), usage)
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, *format, *control, *candidate, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "backtest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer, format, control, candidate string, files []string) error {
	read, ok := readers[format]
	if !ok {
		return fmt.Errorf("there is no format %q", format)
	}
	if len(files) == 0 {
		return demo(ctx, out)
	}
	for _, name := range files {
		comparisons, err := readFile(name, read, control, candidate)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, c := range comparisons {
			if _, err := show(ctx, out, c); err != nil {
				return fmt.Errorf("%s: %s: %w", name, c.name, err)
			}
		}
	}
	return nil
}

func readFile(name string, read reader, control, candidate string) ([]comparison, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if !strings.HasSuffix(name, ".gz") {
		return read(file, control, candidate)
	}
	unpacked, err := gzip.NewReader(file)
	if err != nil {
		return nil, err
	}
	return read(unpacked, control, candidate)
}

// replay is what would have become of it. The policy stays where both versions can be compared, so that the whole record
// is judged: nobody approves the next stage.
func replay(ctx context.Context, c comparison) (simulate.Report, error) {
	if len(c.outcomes) == 0 {
		return simulate.Report{}, errors.New("nothing is recorded")
	}
	long := c.outcomes[len(c.outcomes)-1].Time.Sub(c.outcomes[0].Time) + time.Hour
	policy := rollout.Policy{
		Stages:   []rollout.Stage{{Name: "half", Percent: 50, Approval: true}, {Name: "all", Percent: 100, Approval: true}},
		Holdback: 1,
		Gates:    c.gates,
		Bake:     time.Minute,
		Deadline: long,
	}
	return simulate.Replay(ctx, "backtest", policy, slices.Values(c.outcomes), &simulate.Options{
		Horizon:  long,
		Interval: max(5*time.Second, long/5000), // a year needs no look every five seconds
	})
}

// show replays a comparison and prints its timeline.
func show(ctx context.Context, out io.Writer, c comparison) (simulate.Report, error) {
	report, err := replay(ctx, c)
	if err != nil {
		return report, err
	}
	title := "nothing to act on"
	if in := report.Incident; in != nil {
		title = fmt.Sprintf("rolled back by %s after %d requests of the candidate", in.Gate, report.Candidate)
	}
	_, err = fmt.Fprintf(out, "%s: %s\n%v\n", c.name, title, report)
	return report, err
}
