package machine

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/stagedrollout/rollout/internal/evidence"
	"github.com/stagedrollout/rollout/internal/judge"
	"github.com/stagedrollout/rollout/internal/tally"
)

// TestForget: a history that was cut never says less than the whole one: at any time what is left has no smaller share.
func TestForget(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var whole []Change
		at := epoch0
		for i := range rapid.IntRange(1, 12).Draw(t, "changes") {
			at = at.Add(time.Duration(rapid.IntRange(0, 3).Draw(t, "hours")) * time.Hour)
			whole = append(whole, Change{Epoch: uint64(i), At: at, All: rapid.Bool().Draw(t, "all"), Shares: map[string]float64{
				"a": float64(rapid.IntRange(0, 3).Draw(t, "a")), "b": float64(rapid.IntRange(0, 3).Draw(t, "b")),
			}})
		}
		n := rapid.IntRange(0, len(whole)-1).Draw(t, "n")
		cut := forget(whole, n)
		if len(cut) != len(whole)-n || cut[len(cut)-1].Epoch != whole[len(whole)-1].Epoch {
			t.Fatalf("%d are left of %d less %d", len(cut), len(whole), n)
		}
		in := func(h []Change, at time.Time) (c Change) {
			for _, next := range h {
				if !next.At.After(at) {
					c = next
				}
			}
			return c
		}
		for h := range 40 {
			at := epoch0.Add(time.Duration(h) * time.Hour)
			a, b := in(whole, at), in(cut, at)
			if b.Shares["a"] < a.Shares["a"] || b.Shares["b"] < a.Shares["b"] || a.All && !b.All {
				t.Fatalf("at %d h: %+v became %+v", h, a, b)
			}
		}
	})
}

// TestMourn: what died with a process is a failure of its cohort in the next block of its ring, by group, once.
func TestMourn(t *testing.T) {
	p := fixedPlan(t)
	s := New("x", p, "n")
	Step(s, p, Input{Now: epoch0, MayAdvance: true})
	lost := func(group int, n uint64) []uint64 {
		by := make([]uint64, evidence.Groups)
		by[group] = n
		return by
	}
	doc := func(inc string, seq uint64, open ...Open) *tally.Doc {
		return &tally.Doc{About: tally.About{Inc: inc, Seq: seq, Birth: 1, Sealed: true, Open: open}}
	}
	a := doc("a", 3, Open{Ring: "staff", Gen: s.Gen, Candidate: lost(5, 4), Control: lost(6, 1)}, Open{Ring: "everyone", Gen: s.Gen, Candidate: lost(7, 2)})
	b := doc("b", 9, Open{Ring: "staff", Gen: s.Gen, Candidate: lost(5, 3)}, Open{Ring: "staff", Gen: s.Gen + 1, Candidate: lost(5, 100)})
	s.Cursors = map[string]Cursor{"a": {Seq: 3}, "b": {Seq: 9}, "c": {Seq: 1}}
	events := Step(s, p, Input{Now: epoch0, Dead: []*tally.Doc{a, b}})
	if len(events) != 2 || events[0].Kind != WorkLost {
		t.Fatalf("%+v", events)
	}
	if len(s.Cursors) != 1 || s.Retired["a"].Seq != 3 || s.Retired["b"].Seq != 9 || len(s.Retired) != 2 {
		t.Errorf("%+v, %+v", s.Cursors, s.Retired)
	}
	again := s.Clone()
	Step(again, p, Input{Now: epoch0, Dead: []*tally.Doc{a, b}})
	if candidate, control := again.Lost[0].Count(); candidate != 7 || control != 1 {
		t.Errorf("dead twice: %d, %d", candidate, control)
	}
	total := func() judge.Estimate {
		return p.Judge.Assess(&s.Gates, nil)[0].Candidate
	}
	Step(s, p, Input{Now: epoch0, Blocks: []Block{block(s, "staff", 50, 1, 50, 1)}})
	if got := total(); got.N != 57 || got.Events != 8 {
		t.Errorf("staff's block: %+v", got)
	}
	Step(s, p, Input{Now: epoch0, Blocks: []Block{block(s, "staff", 50, 1, 50, 1)}})
	if got := total(); got.N != 107 || got.Events != 9 {
		t.Errorf("the next one: %+v", got)
	}
	if len(s.Lost) != 1 || s.Lost[0].Ring != "everyone" {
		t.Errorf("left: %+v", s.Lost)
	}
	if _, err := Apply(s, p, Verb{Name: VerbRollback, Now: epoch0}); err != nil || len(s.Lost) != 0 {
		t.Errorf("%+v, %v", s.Lost, err)
	}
}

// TestFoldedIsConsumed: whenever processes count, die and are folded, everything that they have published is judged once,
// even if no document has it any more when its block closes.
func TestFoldedIsConsumed(t *testing.T) {
	p := fixedPlan(t)
	form := func(string) (Form, bool) { return Form{Cells: 2, Groups: 1}, true }
	rapid.Check(t, func(t *rapid.T) {
		s := New("x", p, "n")
		Step(s, p, Input{Now: epoch0, MayAdvance: true})
		key := tally.Key{Epoch: s.Epoch, Ring: "staff", Metric: "errors", Cells: 2}
		live := map[string]*tally.Doc{}
		published, judged := uint64(0), uint64(0)
		evaluate := func(elapsed time.Duration, dead ...string) {
			sum, in := &tally.Sum{}, Input{Now: epoch0, Elapsed: elapsed}
			for _, d := range live {
				sum.Add(d)
			}
			for _, inc := range dead { // sealed, and read once more
				in.Dead = append(in.Dead, live[inc])
				delete(live, inc)
			}
			if err := Take(s, p, Gathered{Sum: sum, Form: form}, &in); err != nil {
				t.Fatal(err)
			}
			for _, b := range in.Blocks {
				judged += judge.Count(b.Control) + judge.Count(b.Candidate)
			}
			in.Blocks = nil // whatever they say
			Step(s, p, in)
			if judged > published {
				t.Fatalf("%d of %d are judged", judged, published)
			}
		}
		lives := map[string]int{}
		for i := range rapid.IntRange(1, 30).Draw(t, "turns") {
			who := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "who")
			inc := fmt.Sprint(who, lives[who])
			d := live[inc]
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0, 1:
				next := &tally.Doc{About: tally.About{Inc: inc, Seq: uint64(i + 1)}, Series: []tally.Series{{Key: key, Counts: tally.NewCounts(2)}}}
				if d != nil {
					next.Series[0].Counts = next.Series[0].Counts.Plus(d.Series[0].Counts)
				}
				for c := range 2 {
					n := uint64(rapid.IntRange(0, 5).Draw(t, "outcomes"))
					next.Series[0].Counts[c][0] += n
					published += n
				}
				live[inc] = next
			case 2:
				evaluate(time.Second)
			case 3:
				if d != nil {
					evaluate(time.Second, inc)
					lives[who]++
				}
			}
		}
		for inc := range live {
			evaluate(time.Second, inc)
		}
		evaluate(BlockAge)
		evaluate(BlockAge)
		if judged != published {
			t.Fatalf("%d of %d are judged in the end", judged, published)
		}
	})
}

// TestForeignSeries: what a sealed document has that no process of this rollout could have counted leaves a state that can be read.
func TestForeignSeries(t *testing.T) {
	p := fixedPlan(t)
	s := New("x", p, "n")
	Step(s, p, Input{Now: epoch0, MayAdvance: true})
	junk := func(inc string) *tally.Doc {
		d := &tally.Doc{About: tally.About{Inc: inc, Seq: 1, Birth: 1, Sealed: true}}
		for i := range 3000 {
			c := tally.NewCounts(1)
			c[0][0] = 1
			d.Series = append(d.Series, tally.Series{Key: tally.Key{Epoch: 1 << 40, Ring: inc, Metric: fmt.Sprintf("%04d", i), Cells: 1}, Counts: c})
		}
		b := d.Encode()
		if d, err := tally.Decode(b); err != nil {
			t.Fatal(err)
		} else {
			return d
		}
		return nil
	}
	Step(s, p, Input{Now: epoch0, Dead: []*tally.Doc{junk("a")}})
	Step(s, p, Input{Now: epoch0, Dead: []*tally.Doc{junk("b")}})
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decode("x", b); err != nil {
		t.Errorf("%d bytes are written, and: %v", len(b), err)
	}
}

// TestLostOpen: so does more open work than there can be.
func TestLostOpen(t *testing.T) {
	p := fixedPlan(t)
	s := New("x", p, "n")
	Step(s, p, Input{Now: epoch0, MayAdvance: true})
	by := make([]uint64, 64)
	by[0] = 1 << 40
	o := Open{Ring: "staff", Gen: s.Gen, Candidate: by}
	d := &tally.Doc{About: tally.About{Inc: "a", Seq: 1, Birth: 1, Sealed: true, Open: []Open{o, o}}}
	d, err := tally.Decode(d.Encode())
	if err != nil {
		t.Fatal(err)
	}
	Step(s, p, Input{Now: epoch0, Dead: []*tally.Doc{d}})
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decode("x", b); err != nil {
		t.Errorf("it is written, and: %v", err)
	}
}
