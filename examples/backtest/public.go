package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

// These records have no times, so their outcomes are put one minute after the other, as if each run took so long.
var (
	began = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	step  = time.Minute
)

var (
	failed     = rollout.NewRate("failed")
	toolErrors = rollout.NewRate("tool-errors")
	handoffs   = rollout.NewRate("handoffs")
	malformed  = rollout.NewRate("malformed")
	violations = rollout.NewRate("violations")
)

// repeat is n observations of a rate of which k are bad.
func repeat(m rollout.Rate, k, n int) []rollout.Observation {
	var all []rollout.Observation
	for i := range n {
		all = append(all, m.Observe(i < k))
	}
	return all
}

// readTauBench compares trials of one agent on the same tasks.
func readTauBench(r io.Reader, control, candidate string) ([]comparison, error) {
	t, err := newTable(r, "task_id", "trial", "reward", "tool_calls", "tool_errors", "handoffs")
	if err != nil {
		return nil, err
	}
	runs := map[string][]simulate.Recorded{}
	var trials []string
	for {
		err := t.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		n, err := t.counts("task_id", "reward", "tool_calls", "tool_errors", "handoffs")
		if err != nil {
			return nil, err
		}
		trial := t.text("trial")
		if !slices.Contains(trials, trial) {
			trials = append(trials, trial)
		}
		o := simulate.Recorded{Time: began.Add(time.Duration(n[0]) * step), Unit: rollout.Unit{Key: "task-" + t.text("task_id")}}
		o.Observations = append(repeat(toolErrors, n[3], n[2]), failed.Observe(n[1] == 0), handoffs.Observe(n[4] > 0))
		runs[trial] = append(runs[trial], o)
	}
	gates := []rollout.Gate{failed.NoWorse(), toolErrors.NoWorse(), handoffs.NoWorse()}
	var cs []comparison
	for _, a := range trials {
		for _, b := range trials {
			if a == b || control != "" && a != control || candidate != "" && b != candidate {
				continue
			}
			cs = append(cs, comparison{"trial " + b + " against trial " + a, versus(runs[a], runs[b]), gates})
		}
	}
	if len(cs) == 0 {
		return nil, fmt.Errorf("there are no two such trials among %q", trials)
	}
	return cs, nil
}

// versus is two records as one.
func versus(control, candidate []simulate.Recorded) []simulate.Recorded {
	var both []simulate.Recorded
	for c, outcomes := range [][]simulate.Recorded{control, candidate} {
		for _, o := range outcomes {
			o.Cohort = rollout.Control + rollout.Cohort(c)
			both = append(both, o)
		}
	}
	slices.SortStableFunc(both, func(a, b simulate.Recorded) int { return a.Time.Compare(b.Time) })
	return both
}

// pick is the only one of the names that contains part.
func pick(names []string, part string) (string, error) {
	var found []string
	for _, name := range names {
		if name == part {
			return name, nil
		}
		if part != "" && strings.Contains(name, part) {
			found = append(found, name)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%q names %d of %d: %q", part, len(found), len(names), found)
	}
	return found[0], nil
}

// readAider compares two runs of a benchmark of which only sums are known: which of the cases failed, and when, is made
// up.
func readAider(r io.Reader, control, candidate string) ([]comparison, error) {
	control = cmp.Or(control, "ollama-qwen2.5-coder:32b-instruct-fp16")
	candidate = cmp.Or(candidate, "ollama-qwen2.5-coder:32b-instruct-fp16-2kctx")
	t, err := newTable(r, "dirname", "test_cases", "pass_n_2", "num_with_malformed_responses")
	if err != nil {
		return nil, err
	}
	runs := map[string][]simulate.Recorded{}
	var names []string
	for {
		err := t.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		n, err := t.counts("test_cases", "pass_n_2", "num_with_malformed_responses")
		if err != nil {
			return nil, err
		}
		if n[1] > n[0] || n[2] > n[0] {
			return nil, fmt.Errorf("line %d: more than %d cases", t.number, n[0])
		}
		_, name, dated := strings.Cut(t.text("dirname"), "--")
		if !dated {
			name = t.text("dirname")
		}
		if runs[name] == nil {
			names = append(names, name)
		}
		runs[name] = cases(n[0], n[0]-n[1], n[2], uint64(len(runs)))
	}
	if control, err = pick(names, control); err != nil {
		return nil, err
	}
	if candidate, err = pick(names, candidate); err != nil {
		return nil, err
	}
	gates := []rollout.Gate{failed.NoWorse(), malformed.NoWorse()}
	return []comparison{{candidate + " against " + control, versus(runs[control], runs[candidate]), gates}}, nil
}

// cases are n cases in a random order.
func cases(n, fails, malforms int, seed uint64) []simulate.Recorded {
	rng := rand.New(rand.NewPCG(1, seed))
	fail, malform := rng.Perm(n), rng.Perm(n)
	all := make([]simulate.Recorded, n)
	for i := range all {
		all[i] = simulate.Recorded{
			Time: began.Add(time.Duration(i) * step), Unit: rollout.Unit{Key: fmt.Sprint("case-", i)},
			Observations: []rollout.Observation{failed.Observe(fail[i] < fails), malformed.Observe(malform[i] < malforms)},
		}
	}
	return all
}

// readJailbreak compares how often two models did what they should refuse.
func readJailbreak(r io.Reader, control, candidate string) ([]comparison, error) {
	control, candidate = cmp.Or(control, "gpt-4"), cmp.Or(candidate, "gpt-3.5")
	t, err := newTable(r, "model", "behavior_index", "violation")
	if err != nil {
		return nil, err
	}
	answers := map[string][]simulate.Recorded{}
	var models []string
	for {
		err := t.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		n, err := t.counts("behavior_index", "violation")
		if err != nil {
			return nil, err
		}
		model := t.text("model")
		if answers[model] == nil {
			models = append(models, model)
		}
		answers[model] = append(answers[model], simulate.Recorded{
			Time: began.Add(time.Duration(n[0]) * step), Unit: rollout.Unit{Key: fmt.Sprint("behavior-", n[0])},
			Observations: []rollout.Observation{violations.Observe(n[1] == 1)},
		})
	}
	if control, err = pick(models, control); err != nil {
		return nil, err
	}
	if candidate, err = pick(models, candidate); err != nil {
		return nil, err
	}
	if control == candidate {
		return nil, errors.New("control and candidate are the same")
	}
	gates := []rollout.Gate{violations.NoWorse()}
	return []comparison{{candidate + " against " + control, versus(answers[control], answers[candidate]), gates}}, nil
}
