// Command oc simulates what the gates do to many releases and prints the tables of docs/statistics.md as Markdown: how
// often a good release is rolled back, how soon a bad one is, how soon a good one is proven. It ends with 1 if a bound is
// broken.
//
//	go run ./internal/oc                       every table, 2,000 runs where a rate is to be bounded: hours on two cores
//	go run ./internal/oc -runs 400             fewer runs
//	go run ./internal/oc -only "detection"     only these tables, by name
//	go run ./internal/oc -only "policies"      whole policies, in virtual time; a tenth of the runs
//	go run ./internal/oc -seed 7               other releases
package main

import (
	"flag"
	"fmt"
	"math"
	"os"
	"regexp"
	"strings"
	"time"
)

// config is what the tables are made with.
type config struct {
	runs  int
	seed  uint64
	short bool // for a test: fewer cases and ticks
	cells *regexp.Regexp
}

// slack is by how much the median of so many runs may miss the true one: two standard errors of what is about
// exponentially distributed. A full table has none to give.
func (c *config) slack() float64 {
	if !c.short {
		return 1
	}
	return 1 + 2/math.Sqrt(float64(c.runs))
}

// few is how many runs a median takes.
func (c *config) few() int {
	if c.short {
		return c.runs
	}
	return max(c.runs/5, 40)
}

// ticks is how long a release is watched.
func (c *config) ticks(n int) int {
	if c.short {
		return min(n, 240)
	}
	return n
}

// skip leaves cases out: those not asked for by -cells, and of a short form all at some shares.
func (c *config) skip(name string, share float64) bool {
	if c.short && share != .05 {
		return true
	}
	return c.cells != nil && !c.cells.MatchString(name)
}

// A table is what is printed.
type table struct {
	title  string
	head   []string
	rows   [][]string
	broken int
}

func (t *table) add(ok bool, cells ...string) {
	if !ok {
		t.broken++
		cells[len(cells)-1] += " **broken**"
	}
	t.rows = append(t.rows, cells)
}

func (t *table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "### %s\n\n| %s |\n|%s\n", t.title, strings.Join(t.head, " | "), strings.Repeat("---|", len(t.head)))
	for _, row := range t.rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
	}
	return b.String()
}

// tables are all there are, by name.
var tables = []struct {
	name string
	make func(*config) table
}{
	{"detection", detection},
	{"late", late},
	{"several", several},
	{"promotion", promotion},
	{"clustered", clustered},
	{"drift", drift},
	{"falsePromotion", falsePromotion},
	{"falseRollback", falseRollback},
	{"policies", policies},
	{"silence", silence},
	{"rings", rings},
	{"absence", absence},
}

func main() {
	c := &config{}
	flag.IntVar(&c.runs, "runs", 2000, "runs of each release whose rate is to be bounded; medians take a fifth")
	flag.Uint64Var(&c.seed, "seed", 1, "of the first run")
	only := flag.String("only", "", "regular expression of the tables to make")
	cells := flag.String("cells", "", "regular expression of the gates to make them for")
	flag.Parse()
	wanted, err := regexp.Compile(*only)
	if err == nil && *cells != "" {
		c.cells, err = regexp.Compile(*cells)
	}
	if err != nil || c.runs < 1 || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "oc: -only and -cells must be regular expressions, -runs at least 1, and there are no arguments", err)
		os.Exit(2)
	}
	broken, made := 0, 0
	for _, t := range tables {
		if !wanted.MatchString(t.name) {
			continue
		}
		start := time.Now()
		made++
		got := t.make(c)
		broken += got.broken
		fmt.Println(got.String())
		fmt.Fprintf(os.Stderr, "%s: %v\n", t.name, time.Since(start).Round(time.Second))
	}
	if made == 0 {
		fmt.Fprintf(os.Stderr, "oc: no table matches %q\n", *only)
		os.Exit(2)
	}
	if broken > 0 {
		fmt.Printf("%d bounds are broken.\n", broken)
		os.Exit(1)
	}
}
