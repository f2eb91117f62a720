package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

// table is a CSV file with a header, a line at a time.
type table struct {
	r       *csv.Reader
	columns map[string]int
	line    []string
	number  int // of the line, the header being 1
}

// newTable reads the header, which must have the columns.
func newTable(r io.Reader, columns ...string) (*table, error) {
	t := &table{r: csv.NewReader(r), columns: map[string]int{}, number: 1}
	header, err := t.r.Read()
	if err != nil {
		return nil, fmt.Errorf("the header: %w", err)
	}
	for i, name := range header {
		t.columns[name] = i
	}
	for _, name := range columns {
		if _, ok := t.columns[name]; !ok {
			return nil, fmt.Errorf("there is no column %q in the header %q", name, header)
		}
	}
	return t, nil
}

// next goes to the next line, and returns io.EOF behind the last.
func (t *table) next() (err error) {
	t.number++
	t.line, err = t.r.Read()
	return err
}

// text is a field; "" if there is no such column.
func (t *table) text(column string) string {
	i, ok := t.columns[column]
	if !ok {
		return ""
	}
	return t.line[i]
}

// count is a field that counts something; an empty one counts nothing.
func (t *table) count(column string) (int, error) {
	text := t.text(column)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("line %d: %s: %q does not count anything", t.number, column, text)
	}
	return n, nil
}

// counts are several of them.
func (t *table) counts(columns ...string) ([]int, error) {
	ns := make([]int, len(columns))
	for i, c := range columns {
		n, err := t.count(c)
		if err != nil {
			return nil, err
		}
		ns[i] = n
	}
	return ns, nil
}

// readCSV reads the generic format. Every rate and every timing in it must not be worse.
func readCSV(r io.Reader, control, candidate string) ([]comparison, error) {
	if control+candidate != "" {
		return nil, errors.New("the format csv has a column that says who is control and who candidate")
	}
	t, err := newTable(r, "time", "unit", "cohort", "metric", "value")
	if err != nil {
		return nil, err
	}
	c := comparison{name: "record"}
	seen := map[string]bool{}
	for {
		err := t.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		o, gate, err := t.observation()
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", t.number, err)
		}
		if !seen[gate.Name()] {
			seen[gate.Name()] = true
			c.gates = append(c.gates, gate)
		}
		c.outcomes = append(c.outcomes, o)
	}
	c.outcomes = join(c.outcomes)
	return []comparison{c}, nil
}

// observation is one line.
func (t *table) observation() (o simulate.Recorded, gate rollout.Gate, err error) {
	if o.Time, err = moment(t.text("time")); err != nil {
		return o, gate, err
	}
	o.Unit.Key = t.text("unit")
	if ring := t.text("ring"); ring != "" {
		o.Unit.Groups = []string{ring}
	}
	if cohort := t.text("cohort"); cohort != "" {
		if err := o.Cohort.UnmarshalText([]byte(cohort)); err != nil {
			return o, gate, err
		}
	}
	name, value := t.text("metric"), t.text("value")
	x, err := strconv.ParseFloat(value, 64)
	if strings.HasSuffix(name, "_ms") {
		if err != nil || !(x >= 0 && x < 1e12) {
			return o, gate, fmt.Errorf("%s: %q are no milliseconds", name, value)
		}
		m := rollout.NewTiming(name)
		o.Observations = append(o.Observations, m.Observe(time.Duration(x*float64(time.Millisecond))))
		return o, m.NoWorse(), nil
	}
	if err != nil || x != 0 && x != 1 {
		return o, gate, fmt.Errorf("%s: %q is not 0 or 1", name, value)
	}
	m := rollout.NewRate(name)
	o.Observations = append(o.Observations, m.Observe(x == 1))
	return o, m.NoWorse(), nil
}

// moment reads RFC 3339 or seconds, which count from 1970 as well as from anywhere else.
func moment(text string) (time.Time, error) {
	if s, err := strconv.ParseFloat(text, 64); err == nil && math.Abs(s) < 1e11 {
		whole, part := math.Modf(s)
		return time.Unix(int64(whole), int64(part*1e9)).UTC(), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, fmt.Errorf("the time %q is neither RFC 3339 nor seconds", text)
	}
	return at, nil
}

// join orders observations by time and makes one outcome of those that belong together.
func join(observations []simulate.Recorded) []simulate.Recorded {
	slices.SortStableFunc(observations, func(a, b simulate.Recorded) int { return a.Time.Compare(b.Time) })
	var outcomes []simulate.Recorded
	for _, o := range observations {
		if n := len(outcomes); n > 0 && o.Unit.Key != "" {
			if last := &outcomes[n-1]; last.Time.Equal(o.Time) && last.Unit.Key == o.Unit.Key && last.Cohort == o.Cohort {
				last.Observations = append(last.Observations, o.Observations...)
				continue
			}
		}
		outcomes = append(outcomes, o)
	}
	return outcomes
}
