package main

import (
	"fmt"
	"io"
	"time"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/simulate"
)

var serverErrors = rollout.NewRate("5xx")

// counter turns readings of a counter that only ever grows into what was added. The zero value has read nothing.
type counter struct {
	last int
	read bool
}

// add is what was added since the last reading; nothing is known of the time before the first. A counter that is smaller
// than it was began anew at zero, when its server was started again.
func (c *counter) add(reading int) int {
	added := reading - c.last
	switch {
	case !c.read:
		added = 0
	case reading < c.last:
		added = reading
	}
	c.last, c.read = reading, true
	return added
}

// zone is the counters of one zone.
type zone struct {
	requests, errors counter
	outcomes         []simulate.Recorded
	owed             int // errors that were counted before their requests
}

// poll reads the counters: as many outcomes as there were requests since the last time.
func (z *zone) poll(at time.Time, requests, errors int) {
	n := z.requests.add(requests)
	z.owed += z.errors.add(errors)
	for range n {
		bad := z.owed > 0
		if bad {
			z.owed--
		}
		z.outcomes = append(z.outcomes, simulate.Recorded{Time: at, Observations: []rollout.Observation{serverErrors.Observe(bad)}})
	}
}

// readCounters reads counters that a server shows, polled every few seconds. Taken as they stand they would count all
// errors since the server started, again at each poll.
func readCounters(r io.Reader, control, candidate string) ([]comparison, error) {
	t, err := newTable(r, "ts_ms", "zone", "requests", "r5xx")
	if err != nil {
		return nil, err
	}
	zones := map[string]*zone{}
	var names []string
	for {
		err := t.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		n, err := t.counts("ts_ms", "requests", "r5xx")
		if err != nil {
			return nil, err
		}
		name := t.text("zone")
		if zones[name] == nil {
			zones[name] = &zone{}
			names = append(names, name)
		}
		zones[name].poll(time.UnixMilli(int64(n[0])).UTC(), n[1], n[2])
	}
	var cs []comparison
	gates := []rollout.Gate{serverErrors.AtMost(5)}
	if candidate == "" {
		if control != "" {
			return nil, fmt.Errorf("%q is to be compared with a -candidate", control)
		}
		for _, name := range names {
			cs = append(cs, comparison{name, versus(nil, zones[name].outcomes), gates})
		}
		return cs, nil
	}
	if candidate, err = pick(names, candidate); err != nil {
		return nil, err
	}
	if control == "" {
		return []comparison{{candidate, versus(nil, zones[candidate].outcomes), gates}}, nil
	}
	if control, err = pick(names, control); err != nil {
		return nil, err
	}
	gates = append(gates, serverErrors.NoWorse())
	return []comparison{{candidate + " against " + control, versus(zones[control].outcomes, zones[candidate].outcomes), gates}}, nil
}
