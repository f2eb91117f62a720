package main

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stagedrollout/rollout"
)

// The records of public benchmarks are not part of the repository: ROLLOUT_DATA or -data says where they are.
var data = flag.String("data", os.Getenv("ROLLOUT_DATA"), "`folder` of the public records")

// public reads a file of the data folder.
func public(t *testing.T, name, format, control, candidate string) []comparison {
	t.Helper()
	if *data == "" {
		t.Skip("there is no -data and no ROLLOUT_DATA")
	}
	cs, err := readFile(filepath.Join(*data, name), readers[format], control, candidate)
	if err != nil {
		t.Fatal(err)
	}
	return cs
}

// judge replays and returns the name of the gate that was broken, and the estimates of each gate.
func judge(t *testing.T, c comparison) (broken string, seen map[string][2]rollout.Estimate) {
	t.Helper()
	rep, err := replay(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if rep.Incident != nil {
		broken = rep.Incident.Gate
	}
	seen = map[string][2]rollout.Estimate{}
	for _, g := range rep.Gates {
		seen[g.Name] = [2]rollout.Estimate{g.Control, g.Candidate}
	}
	if broken == "" && rep.Candidate+rep.Control != len(c.outcomes) {
		t.Errorf("%s: %d and %d of %d outcomes counted", c.name, rep.Control, rep.Candidate, len(c.outcomes))
	}
	return broken, seen
}

// Four trials of one agent on the same tasks: no two of them are told apart.
func TestTauBench(t *testing.T) {
	cs := public(t, "taubench_gpt4o_airline_runs.csv", "taubench", "", "")
	if len(cs) != 12 {
		t.Errorf("%d pairs of four trials", len(cs))
	}
	for _, c := range cs {
		broken, seen := judge(t, c)
		if broken != "" {
			t.Errorf("%s: %s", c.name, broken)
		}
		if f := seen["failed.NoWorse"]; f[0].N != 50 || f[1].N != 50 {
			t.Errorf("%s: %+v", c.name, f)
		}
	}
	_, seen := judge(t, public(t, "taubench_gpt4o_airline_runs.csv", "taubench", "0", "3")[0])
	if e := seen["tool-errors.NoWorse"]; e[0].Events != 17 || e[0].N != 282 || e[1].Events != 19 || e[1].N != 302 {
		t.Errorf("tool errors of trials 0 and 3: %+v", e)
	}
}

// A run whose context was too small for its prompts is caught, on the answers that it garbled.
func TestAider(t *testing.T) {
	c := public(t, "aider_benchmark_runs.csv", "aider", "", "")[0]
	if broken, _ := judge(t, c); broken != "malformed.NoWorse" {
		t.Errorf("%s: %q", c.name, broken)
	}
	// The same model, served by others.
	c = public(t, "aider_benchmark_runs.csv", "aider", "ollama-qwen2.5-coder:32b-instruct-fp16", "hyperbolic-qwen25coder32binstruct")[0]
	if broken, _ := judge(t, c); broken != "" {
		t.Errorf("%s: %q", c.name, broken)
	}
}

// The model that gives in more often is caught, and the other one is not.
func TestJailbreak(t *testing.T) {
	c := public(t, "jailbreakbench_gcg_outcomes.csv", "jailbreak", "", "")[0]
	if broken, _ := judge(t, c); broken != "violations.NoWorse" {
		t.Errorf("%s: %q", c.name, broken)
	}
	c = public(t, "jailbreakbench_gcg_outcomes.csv", "jailbreak", "gpt-3.5", "gpt-4")[0]
	broken, seen := judge(t, c)
	if e := seen["violations.NoWorse"]; broken != "" || e[0].Events != 47 || e[1].Events != 4 {
		t.Errorf("%s: %q, %+v", c.name, broken, e)
	}
}

// Counters are read as counters: one zone had 3 errors in 363 requests meanwhile, whatever it had had before.
func TestCounters(t *testing.T) {
	want := map[string][2]uint64{"hg.nginx.org": {3, 363}, "trac.nginx.org": {0, 757}, "lxr.nginx.org": {0, 93}}
	cs := public(t, "nginxplus_zone_counters.csv.gz", "nginx", "", "")
	if len(cs) != len(want) {
		t.Errorf("%d zones", len(cs))
	}
	for _, c := range cs {
		broken, seen := judge(t, c)
		if e := seen["5xx.AtMost(5)"][1]; broken != "" || [2]uint64{e.Events, e.N} != want[c.name] {
			t.Errorf("%s: %q, %+v; want %v", c.name, broken, e, want[c.name])
		}
	}
	c := public(t, "nginxplus_zone_counters.csv.gz", "nginx", "trac", "hg")[0]
	if broken, seen := judge(t, c); broken != "" || seen["5xx.NoWorse"][0].N != 757 {
		t.Errorf("%s: %q, %+v", c.name, broken, seen)
	}
}

func TestCounterResets(t *testing.T) {
	var c counter
	var added []int
	for _, reading := range []int{1000, 1000, 1007, 4, 4, 5, 0, 2} {
		added = append(added, c.add(reading))
	}
	if want := []int{0, 0, 7, 4, 0, 1, 0, 2}; !slices.Equal(added, want) {
		t.Errorf("%v, not %v", added, want)
	}
	// Errors that are counted before their requests are not lost.
	cs, err := readCounters(strings.NewReader("ts_ms,zone,requests,r5xx\n1000,a,50,9\n2000,a,50,10\n3000,a,52,11\n4000,a,1,0\n"), "", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, seen := judge(t, cs[0]); seen["5xx.AtMost(5)"][1].N != 3 || seen["5xx.AtMost(5)"][1].Events != 2 {
		t.Errorf("%+v", seen)
	}
}

// Small files of the other formats, so that the readers are tested without the data.
func TestReaders(t *testing.T) {
	for _, c := range []struct {
		format, control, candidate, text string
		outcomes                         int
		want                             map[string][2]uint64 // events and outcomes of the candidate, by gate
		err                              string
	}{
		{format: "csv", text: "time,unit,cohort,metric,value\n5,a,control,errors,0\n2024-05-01T00:00:00Z,a,candidate,errors,1\n6,b,candidate,errors,0\n6,b,candidate,t_ms,2.5\n6,,candidate,errors,1\n6,,candidate,errors,1\n",
			outcomes: 5, want: map[string][2]uint64{"errors.NoWorse": {3, 4}}},
		{format: "csv", text: "time,unit,cohort,metric\n", err: `no column "value"`},
		{format: "csv", text: "time,unit,cohort,metric,value\nnoon,a,,e,1\n", err: `line 2: the time "noon"`},
		{format: "csv", text: "time,unit,cohort,metric,value\n1,a,blue,e,1\n", err: "line 2: "},
		{format: "csv", text: "time,unit,cohort,metric,value\n1,a,,e,1\n1,a,,e,2\n", err: `line 3: e: "2" is not 0 or 1`},
		{format: "csv", text: "time,unit,cohort,metric,value\n1,a,,e_ms,-1\n", err: "milliseconds"},
		{format: "csv", text: "time,unit,cohort,metric,value\n1,a,,Bad Name,1\n", err: "Bad Name"},
		{format: "csv", text: "time,unit,cohort,metric,value\n", err: "nothing is recorded"},
		{format: "csv", text: "", err: "the header"},
		{format: "csv", control: "a", err: "a column that says"},
		{format: "taubench", text: "task_id,trial,reward,tool_calls,tool_errors,handoffs\n0,0,1,4,0,0\n0,1,0,3,2,1\n", control: "0",
			outcomes: 2, want: map[string][2]uint64{"tool-errors.NoWorse": {2, 3}, "failed.NoWorse": {1, 1}, "handoffs.NoWorse": {1, 1}}},
		{format: "taubench", text: "task_id,trial,reward,tool_calls,tool_errors,handoffs\n0,0,1,4,0,0\n", err: "no two such trials"},
		{format: "aider", text: "dirname,test_cases,pass_n_2,num_with_malformed_responses\nd--old,9,8,1\nd--new,8,6,3\n", control: "old", candidate: "new",
			outcomes: 17, want: map[string][2]uint64{"failed.NoWorse": {2, 8}, "malformed.NoWorse": {3, 8}}},
		{format: "aider", text: "dirname,test_cases,pass_n_2,num_with_malformed_responses\nd--old,9,10,1\n", err: "line 2: more than 9"},
		{format: "aider", text: "dirname,test_cases,pass_n_2,num_with_malformed_responses\nd--old,9,9,1\n", err: "names 0 of 1"},
		{format: "jailbreak", text: "model,behavior_index,violation\ngpt-4-x,0,0\ngpt-3.5-x,0,1\n",
			outcomes: 2, want: map[string][2]uint64{"violations.NoWorse": {1, 1}}},
		{format: "jailbreak", text: "model,behavior_index,violation\ngpt-4-x,zero,0\n", err: `behavior_index: "zero"`},
		{format: "jailbreak", text: "model,behavior_index,violation\na,0,0\n", control: "a", candidate: "a", err: "are the same"},
		{format: "nginx", text: "ts_ms,zone,requests,r5xx\n0,a,5,0\n", control: "a", err: "with a -candidate"},
	} {
		cs, err := readers[c.format](strings.NewReader(c.text), c.control, c.candidate)
		if err == nil && c.err != "" {
			_, err = replay(t.Context(), cs[0])
		}
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s %q: %v, not %s", c.format, c.text, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s %q: %v", c.format, c.text, err)
			continue
		}
		if len(cs[0].outcomes) != c.outcomes {
			t.Errorf("%s %q: %d outcomes", c.format, c.text, len(cs[0].outcomes))
		}
		rep, err := replay(t.Context(), cs[0])
		if err != nil {
			t.Error(err)
		}
		for _, g := range rep.Gates {
			if want, ok := c.want[g.Name]; ok && want != [2]uint64{g.Candidate.Events, g.Candidate.N} {
				t.Errorf("%s %q: %s: %+v, not %v", c.format, c.text, g.Name, g.Candidate, want)
			}
		}
	}
}

func TestDemo(t *testing.T) {
	var out, again bytes.Buffer
	for _, b := range []*bytes.Buffer{&out, &again} {
		if err := run(t.Context(), b, "csv", "", "", nil); err != nil {
			t.Fatal(err)
		}
	}
	if out.String() != again.String() {
		t.Error("it is not the same each time")
	}
	for _, want := range []string{"do not differ: nothing to act on", "half an hour: rolled back by errors.NoWorse", "rollback began"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}

func TestRun(t *testing.T) {
	name := filepath.Join(t.TempDir(), "record.csv")
	if err := os.WriteFile(name, record(6), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), &out, "csv", "", "", []string{name}); err != nil || !strings.Contains(out.String(), "record: rolled back by errors.NoWorse") {
		t.Errorf("%v\n%s", err, out.String())
	}
	ended, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	for want, err := range map[string]error{
		"no format":         run(t.Context(), &out, "xml", "", "", nil),
		"no such file":      run(t.Context(), &out, "csv", "", "", []string{name + "x"}),
		"deadline exceeded": run(ended, &out, "csv", "", "", []string{name}),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
