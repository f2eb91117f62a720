package machine

import (
	"fmt"
	"slices"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/tally"
)

// A block closes once each cohort has BlockLeast outcomes, or after BlockAge with any: a rule that never looks at what the
// outcomes were.
const (
	BlockLeast = 4
	BlockAge   = time.Minute
)

// Form is what the cells of a metric's series are.
type Form struct {
	Cells   int  // of one group, or of all units together
	Groups  int  // of units; 1: not by groups
	Marks   int  // cells of marks by group, that follow a Timing's
	Never   bool // an event, in the second cell, is acted on at once
	AtOnce  bool // a block closes with whatever there is
	Both    bool // which cohort it is is what is judged: a block's size is that of both together
	Outside bool // judged by what is measured elsewhere: only that outcomes came counts
}

// Size is how many cells of either cohort a series has.
func (f Form) Size() int { return f.Cells*f.Groups + f.Marks }

// Gathered is evidence that was gathered at one moment.
type Gathered struct {
	Sum   *tally.Sum
	Form  func(metric string) (Form, bool)
	Share func(epoch uint64, ring string) (float64, bool) // the candidate's part of the units
	Alarm bool                                            // no block closes: the moment was not chosen by the clock
	Last  bool                                            // every block closes
}

// ours is the form of a series; false unless it is of a ring of the policy and of a metric that has a form, with as many cells.
func ours(p *Plan, form func(metric string) (Form, bool), k tally.Key) (Form, bool) {
	f, ok := form(k.Metric)
	return f, ok && f.Size() == k.Cells && p.ring(k.Ring) >= 0
}

// Keeps reports whether a series has a place in the state: it is judged, or something of it was consumed, and counts for a
// policy that judges it. What is stored must not grow by whatever somebody has written.
func (s *State) Keeps(p *Plan, form func(metric string) (Form, bool), k tally.Key) bool {
	_, ok := ours(p, form, k)
	return ok || s.Consumed[k] != nil
}

// Take consumes what was gathered beyond what was consumed before: the blocks that close now, and what is news. It
// changes only what is noted as consumed. An error means that less was gathered than was consumed.
func Take(s *State, p *Plan, g Gathered, in *Input) error {
	clock := s.Clock + p.passed(in.Elapsed)
	keys := make([]tally.Key, 0, len(g.Sum.Totals))
	for k := range g.Sum.Totals {
		if k.Epoch >= s.Oldest && k.Epoch <= s.Epoch {
			keys = append(keys, k)
		}
	}
	next := make(tally.Ledger, len(s.Consumed))
	for k, t := range s.Consumed {
		if k.Epoch < s.Oldest {
			continue
		}
		if next[k] = t; g.Sum.Totals[k] == nil && k.Epoch <= s.Epoch && t.Waits() {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, tally.Key.Compare)
	for _, k := range keys {
		form, ok := ours(p, g.Form, k)
		if !ok {
			continue // of another policy
		}
		total, was := g.Sum.Totals[k], next[k]
		if total == nil {
			total = &tally.Total{Counts: tally.NewCounts(k.Cells)}
		}
		if was == nil {
			was = &tally.Taken{Counts: tally.NewCounts(k.Cells), Closed: int64(clock)}
		}
		now := *was
		present := k.Epoch == s.Epoch
		if seen := total.Counts.Sum(1); seen != was.Seen {
			if seen-was.Seen > mostNews {
				return fmt.Errorf("%s of %s has fewer outcomes than were seen", k.Metric, k.Ring)
			}
			now.Seen = seen
			if present && form.news() && !slices.Contains(in.Outcomes, k.Ring) {
				in.Outcomes = append(in.Outcomes, k.Ring)
			}
		}
		news := total.Counts.Less(was.Counts)
		for _, cohort := range news {
			if slices.ContainsFunc(cohort, func(n uint64) bool { return n > mostNews }) {
				return fmt.Errorf("%s of %s has fewer outcomes than were consumed", k.Metric, k.Ring)
			}
		}
		sums := [2]uint64{news.Sum(0), news.Sum(1)}
		closes := !g.Alarm && !form.Outside && form.closes(sums, s.alone(k), clock-time.Duration(was.Closed), present && !g.Last)
		if closes {
			now.Counts, now.Closed = total.Counts, int64(clock)
			b := form.block(k, news)
			if form.Never {
				b.Known = uint64(min(max(int64(was.Ahead-form.events(was.Counts)), 0), int64(form.events(news))))
				now.Ahead += uint64(max(int64(form.events(total.Counts)-was.Ahead), 0))
			}
			ok := true
			if form.Both {
				b.Share, ok = g.Share(k.Epoch, k.Ring)
			}
			if ok {
				in.Blocks = append(in.Blocks, Block{Epoch: k.Epoch, Block: b})
			}
		}
		if fresh := int64(total.Events - now.Ahead); form.Never && fresh > 0 {
			now.Ahead = total.Events
			in.Breaches = append(in.Breaches, Breach{Metric: k.Metric, Ring: k.Ring, Events: uint64(fresh)})
		}
		next[k] = &now
	}
	if !g.Alarm {
		s.Oldest = max(s.Oldest, s.Epoch-1)
	}
	s.Consumed = next
	return nil
}

// passed is the time that counts: what is more than a checkpoint's was an outage of the store, a suspended machine or a
// clock that jumped.
func (p *Plan) passed(elapsed time.Duration) time.Duration { return min(max(elapsed, 0), 13*p.Tick) }

// mostNews is more than can come between two evaluations: beyond, a number is below zero.
const mostNews = 1 << 53

// news reports whether an outcome of this form says that the candidate is in use.
func (f Form) news() bool { return !f.AtOnce && !f.Both }

// events are the candidate's outcomes that must never happen.
func (f Form) events(c tally.Counts) uint64 {
	var n uint64
	for g := range f.Groups {
		n += c[1][g*f.Cells+1]
	}
	return n
}

// alone reports whether no unit of a series has the stable version.
func (s *State) alone(k tally.Key) bool {
	return k.Epoch == s.Epoch && s.Shares[k.Ring] >= 100 && s.Holdback == 0
}

// closes is the rule by which a block of this form closes. alone: the ring has no control.
func (f Form) closes(sums [2]uint64, alone bool, age time.Duration, present bool) bool {
	n := sums[0] + sums[1]
	switch {
	case n == 0:
		return false
	case f.AtOnce:
		return true
	case f.Both:
		return !present || age >= BlockAge || n >= 2*BlockLeast
	}
	return Closes(sums, alone, age, present)
}

// Closes is the rule for outcomes of the control and of the candidate.
func Closes(sums [2]uint64, alone bool, age time.Duration, present bool) bool {
	control, candidate := sums[0], sums[1]
	switch {
	case control+candidate == 0:
		return false
	case !present, age >= BlockAge:
		return true
	}
	return candidate >= BlockLeast && (alone || control >= BlockLeast)
}

// block is what is new of a series.
func (f Form) block(k tally.Key, news tally.Counts) judge.Block {
	var cells, by [2][]uint64
	for c, n := range news {
		switch {
		case f.Groups > 1:
			by[c], cells[c] = n, make([]uint64, f.Cells)
			for i, x := range n {
				cells[c][i%f.Cells] += x
			}
		case f.Marks > 0:
			cells[c], by[c] = n[:f.Cells:f.Cells], n[f.Cells:]
		default:
			cells[c] = n
		}
	}
	return judge.Block{Metric: k.Metric, Ring: k.Ring, Control: cells[0], Candidate: cells[1], ControlBy: by[0], CandidateBy: by[1]}
}

// Rebase gives up what cannot be read any more: what there is counts as consumed, and is not bet. Input.Lost says whose
// it was.
func Rebase(s *State, p *Plan, sum *tally.Sum, form func(metric string) (Form, bool)) {
	next := tally.Ledger{}
	for k, t := range sum.Totals {
		if s.Keeps(p, form, k) && k.Epoch >= s.Oldest && k.Epoch <= s.Epoch {
			next[k] = &tally.Taken{Counts: t.Counts, Seen: t.Counts.Sum(1), Ahead: t.Events, Closed: int64(s.Clock)}
		}
	}
	s.Consumed = next
}

// Account is the time that is not accounted for yet, by a process that has followed this Ver for a time by its own
// clock: the time in a stage is a lower bound, and nobody's clock is set against another's. A negative Since is what a
// writer had yet to account for when it wrote this Ver.
func (s *State) Account(followed time.Duration) time.Duration { return max(followed-s.Since, 0) }

// Head is the part of the state that everybody follows: without evidence, and of the history what is needed to say who was
// exposed.
func (s *State) Head(p *Plan) *State {
	c := *s
	c.Gates, c.Consumed, c.Cursors, c.Retired, c.Sources, c.Lost = judge.State{}, nil, nil, nil, nil, nil
	c.Pace, c.Reported, c.Acted, c.Last = nil, nil, nil, time.Time{}
	if extra := len(c.History) - headHistory; extra > 0 {
		c.History = forget(c.History, extra)
	}
	if extra := len(c.Notes) - headNotes; extra > 0 {
		c.Notes = c.Notes[extra:]
	}
	c.Marks, c.Slow = map[string]map[string][][2]int{}, nil
	for metric, rings := range s.Gates.Memory {
		for ring := range rings {
			if at := p.Judge.Thresholds(nil, &s.Gates, metric, ring); len(at) > 0 {
				if c.Marks[metric] == nil {
					c.Marks[metric] = map[string][][2]int{}
				}
				c.Marks[metric][ring] = at
			}
		}
	}
	if len(c.Marks) == 0 {
		c.Marks = nil
	}
	for _, ring := range p.Rings {
		if d := s.Slowest(ring); d > 0 {
			if c.Slow == nil {
				c.Slow = map[string]time.Duration{}
			}
			c.Slow[ring] = d
		}
	}
	return &c
}

// Slowest is how long the control's slowest outcomes take in a ring; 0 while it is not known.
func (s *State) Slowest(ring string) time.Duration {
	if d, ok := s.Gates.ControlQuantile(slowMetric, ring, 0.999); ok {
		return d
	}
	return s.Slow[ring]
}

// slowMetric is the metric that says how long outcomes take.
const slowMetric = "latency"

// What a head has of the history and of the notes.
const (
	headHistory = 32
	headNotes   = 4
)
