package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"strconv"
)

// demo replays two records that it makes up. It returns an error unless the first is quiet and the second is caught.
func demo(ctx context.Context, out io.Writer) error {
	for _, d := range []struct {
		name   string
		worse  float64 // points, from the middle on
		caught bool
	}{{"Two versions that do not differ", 0, false}, {"A candidate that goes bad after half an hour", 6, true}} {
		text := record(d.worse)
		comparisons, err := readCSV(bytes.NewReader(text), "", "")
		if err != nil {
			return err
		}
		lines := bytes.SplitAfterN(text, []byte("\n"), 5)
		fmt.Fprintf(out, "A record of %d observations:\n", bytes.Count(text, []byte("\n"))-1)
		for _, line := range lines[:4] {
			fmt.Fprintf(out, "  %s", line)
		}
		fmt.Fprint(out, "  ...\n")
		c := comparisons[0]
		c.name = d.name
		report, err := show(ctx, out, c)
		if err != nil {
			return err
		}
		if caught := report.Incident != nil; caught != d.caught {
			return errors.New("the outcome is not the expected one")
		}
	}
	return nil
}

// record is an hour of requests in the generic format: errors and latencies of two versions that serve half of the users
// each. Both fail in 2 % of the requests, the candidate in so many points more from the middle on.
func record(worse float64) []byte {
	rng := rand.New(rand.NewPCG(2024, 5))
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	_ = w.Write([]string{"time", "unit", "cohort", "metric", "value"}) // a buffer takes all
	for at := 0.0; at < 3600; at += rng.ExpFloat64() / 5 {
		user := rng.IntN(500)
		cohort, percent := "control", 2.0
		if user%2 == 1 {
			cohort = "candidate"
			if at > 1800 {
				percent += worse
			}
		}
		bad := "0"
		if rng.Float64()*100 < percent {
			bad = "1"
		}
		line := []string{strconv.FormatFloat(at, 'f', 3, 64), fmt.Sprint("user-", user), cohort}
		_ = w.Write(append(line, "errors", bad))
		_ = w.Write(append(line, "latency_ms", strconv.FormatFloat(60*math.Exp(rng.NormFloat64()/2), 'f', 1, 64)))
	}
	w.Flush()
	return b.Bytes()
}
