package rollout

import (
	"context"
	"fmt"
	"hash/crc32"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func tokenOf(t fataler, d Decision) string {
	t.Helper()
	text, err := d.AppendText([]byte("before "))
	if err != nil {
		t.Fatal(err)
	}
	token, ok := strings.CutPrefix(string(text), "before ")
	if !ok {
		t.Fatalf("AppendText gave %q", text)
	}
	if again, err := d.MarshalText(); string(again) != token || err != nil {
		t.Fatalf("MarshalText gave %q, %v, not %q", again, err, token)
	}
	return token
}

func parseToken(t fataler, r *Rollout, token string) Decision {
	t.Helper()
	d, err := r.ParseDecision([]byte(token))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// saying is what a token keeps.
type saying struct {
	Enabled    bool
	Cohort     Cohort
	Ring       string
	Generation uint64
	Reason     Reason
	Group      uint64
}

func sayingOf(d Decision) saying {
	return saying{d.Enabled(), d.Cohort(), d.Ring(), d.Generation(), d.Reason(), d.bits.group()}
}

// replicasOf are n rollouts of one policy on one Store, the first of which is started.
func replicasOf(t fataler, n int, p Policy) []*Rollout {
	t.Helper()
	o := quietly()
	var rs []*Rollout
	for i := range n {
		o.Replica = fmt.Sprint("replica-", i)
		r, err := New("assign", p, o)
		if err != nil {
			t.Fatal(err)
		}
		rs = append(rs, r)
	}
	if err := rs[0].startForTest(context.Background()); err != nil {
		t.Fatal(err)
	}
	return rs
}

func readyAll(t fataler, rs ...*Rollout) {
	t.Helper()
	for _, r := range rs {
		if err := r.Ready(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

var tokenPolicy = func() Policy {
	p := simplePolicy(5, Ring{Name: "staff"}, Ring{Name: "a.ring_with-3"})
	p.Metrics = []Metric{NewRate("timeouts")}
	return p
}()

// drawMoves are what happens to a rollout, drawn.
func drawMoves(t *rapid.T, r *Rollout) {
	ctx := context.Background()
	for range rapid.IntRange(0, 3).Draw(t, "moves") {
		var err error
		switch rapid.IntRange(0, 5).Draw(t, "move") {
		case 0:
			err = r.SetPercent(ctx, Everyone, rapid.SampledFrom([]Percent{0, 10, 100}).Draw(t, "percent"), "")
		case 1:
			err = r.SetPercent(ctx, "staff", rapid.SampledFrom([]Percent{0, 10, 100}).Draw(t, "percent"), "")
		case 2:
			err = r.Advance(ctx, r.Status().Stage.Name, "")
		case 3:
			err = r.Rollback(ctx, "")
		case 4:
			err = r.RollbackRing(ctx, "staff", "")
		case 5:
			if err = r.Restart(ctx, ""); err == nil {
				err = r.startForTest(ctx)
			}
		}
		_ = err // a verb that makes no sense changes nothing
	}
}

// A token keeps a decision's answer, cohort, ring, generation and reason, in the process that made it, in another one, and
// in one that has loaded nothing; it holds nothing of the unit.
func TestTokenKeepsTheDecision(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rs := replicasOf(t, 3, tokenPolicy)
		drawMoves(t, rs[0])
		readyAll(t, rs[1])
		u := Unit{Key: rapid.SampledFrom([]string{"", "a-key-of-somebody", "someone-else", "k3", "k4"}).Draw(t, "key")}
		u.Groups = rapid.SampledFrom([][]string{nil, {"staff"}, {"a.ring_with-3"}}).Draw(t, "groups")
		d := rs[0].Decide(u)
		token := tokenOf(t, d)
		if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) || len(token) > 160 {
			t.Fatalf("%q is not short and printable", token)
		}
		if u.Key != "" && strings.Contains(token, u.Key) {
			t.Fatalf("%q tells of %q", token, u.Key)
		}
		for i, r := range rs {
			got := parseToken(t, r, token)
			if diff := cmp.Diff(sayingOf(d), sayingOf(got)); diff != "" {
				t.Fatalf("process %d: %s", i, diff)
			}
			if i < 2 && d.Cohort() != None && (got.Stage() != d.Stage() || got.Version() != d.Version()) {
				t.Fatalf("process %d: stage %q, version %q, not %q, %q", i, got.Stage(), got.Version(), d.Stage(), d.Version())
			}
			if again := tokenOf(t, got); again != token {
				t.Fatalf("process %d: %q became %q", i, token, again)
			}
		}
	})
}

// cellsOf is what was recorded, by ring, cohort, metric and cell.
func cellsOf(r *Rollout) map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	cells := map[string]uint64{}
	for _, l := range r.ledgers {
		for i := range l.snap.rings {
			for c, tables := range l.snap.rings[i].outcomes {
				for m, table := range tables {
					counts := make([]uint64, table.Width())
					table.AddTo(counts)
					for k, n := range counts {
						if n > 0 {
							cells[fmt.Sprintf("epoch %d, %s, %v, %s %d", l.snap.epoch, l.snap.rings[i].name, Cohort(c+1), nameOf(l.snap.metrics[m].ref), k)] += n
						}
					}
				}
			}
		}
	}
	return cells
}

// What is recorded through a token counts as what is recorded through the decision itself, in whichever process.
func TestTokenRecordsLikeTheDecision(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rs := replicasOf(t, 3, tokenPolicy)
		readyAll(t, rs[1:]...)
		observations := rapid.SliceOfN(rapid.SampledFrom([]Observation{
			Errors.Observe(true), Errors.Observe(false), Latency.Observe(time.Millisecond), Latency.Observe(time.Hour), Latency.Observe(-1),
			NewRate("timeouts").Observe(true), NewRate("unheard-of").Observe(true), {},
		}), 0, 5)
		for i := range rapid.IntRange(1, 5).Draw(t, "units") {
			u := Unit{Key: fmt.Sprint("k", i), Groups: rapid.SampledFrom([][]string{nil, {"staff"}}).Draw(t, "groups")}
			obs := observations.Draw(t, "observations")
			d := rs[0].Decide(u)
			d.Record(obs...)
			for _, r := range rs[1:] {
				parseToken(t, r, tokenOf(t, d)).Record(obs...)
			}
		}
		for _, r := range rs[1:] {
			if diff := cmp.Diff(cellsOf(rs[0]), cellsOf(r)); diff != "" {
				t.Fatal(diff)
			}
			a, b := rs[0].Status(), r.Status()
			if a.Unknown != b.Unknown || a.Late != b.Late {
				t.Fatalf("%d unknown and %d late, not %d and %d", b.Unknown, b.Late, a.Unknown, a.Late)
			}
		}
	})
}

// A token counts for its own stage while that is the present one or the one before. Then, and in another generation, it is
// late; so is the decision itself.
func TestTokenOfThePastIsLate(t *testing.T) {
	ctx := t.Context()
	keys := unitsOf(200)
	for name, c := range map[string]struct {
		then  func(r *Rollout) error
		moves int
		late  bool
	}{
		"the same stage":            {func(*Rollout) error { return nil }, 0, false},
		"the stage before":          {func(r *Rollout) error { return r.SetPercent(ctx, Everyone, 60, "") }, 1, false},
		"two stages before":         {func(r *Rollout) error { return r.SetPercent(ctx, Everyone, 60+r.Status().Rings[2].Percent/10, "") }, 2, true},
		"rolled back":               {func(r *Rollout) error { return r.Rollback(ctx, "") }, 1, true},
		"another generation":        {func(r *Rollout) error { return restartForTest(r) }, 1, true},
		"two generations before":    {func(r *Rollout) error { return restartForTest(r) }, 2, true},
		"completed":                 {func(r *Rollout) error { return r.Advance(ctx, r.Status().Stage.Name, "") }, 2, true},
		"a hold and a resume":       {holdAndResume, 1, false},
		"a hold and a resume, more": {holdAndResume, 5, false},
	} {
		t.Run(name, func(t *testing.T) {
			rs := replicasOf(t, 2, tokenPolicy)
			r, other := rs[0], rs[1]
			readyAll(t, other)
			d := r.Decide(keys[0])
			token := tokenOf(t, d)
			for range c.moves {
				if err := c.then(r); err != nil {
					t.Fatal(err)
				}
				readyAll(t, other)
			}
			for i, r := range rs {
				said := []Decision{parseToken(t, r, token)}
				if i == 0 {
					said = append(said, d)
				}
				for _, d := range said {
					before, _ := evidenceOf(r)
					late := r.Status().Late
					d.Record(Errors.Observe(true), Latency.Observe(1), Errors.Observe(false))
					after, _ := evidenceOf(r)
					late = r.Status().Late - late
					if c.late && (after != before || late != 3) || !c.late && (after != before+3 || late != 0) {
						t.Errorf("process %d: %d recorded and %d late", i, after-before, late)
					}
				}
			}
			if diff := cmp.Diff(saying{d.Enabled(), d.Cohort(), Everyone, 1, ReasonSplit, d.bits.group()}, sayingOf(parseToken(t, other, token))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func holdAndResume(r *Rollout) error {
	if err := r.Hold(context.Background(), ""); err != nil {
		return err
	}
	return r.Resume(context.Background(), "")
}

func restartForTest(r *Rollout) error {
	if err := r.Restart(context.Background(), ""); err != nil {
		return err
	}
	return r.startForTest(context.Background())
}

// A token that was cut, or altered in any one byte, is refused or says what it said before.
func TestTokenIsWholeOrRefused(t *testing.T) {
	r := running(t, "whole")
	for _, u := range []Unit{{Key: "a"}, {}, {Key: "b", Groups: []string{"staff"}}} {
		d := r.Peek(u)
		token := []byte(tokenOf(t, d))
		try := func(altered []byte) {
			got, err := r.ParseDecision(altered)
			switch {
			case err == nil && got != d:
				t.Errorf("%q is %+v, not %+v", altered, sayingOf(got), sayingOf(d))
			case err != nil && (got != Decision{} || !strings.HasPrefix(err.Error(), "rollout: ")):
				t.Errorf("%+v with the error %q", sayingOf(got), err)
			}
		}
		for i := range token {
			try(token[:i])
			try(token[i+1:])
			try(slices.Delete(slices.Clone(token), i, i+1))
			for b := range 256 {
				altered := slices.Clone(token)
				altered[i] = byte(b)
				try(altered)
				try(slices.Insert(slices.Clone(token), i, byte(b)))
			}
		}
	}
}

func TestTokenErrorsAreClear(t *testing.T) {
	r := running(t, "clear")
	token := tokenOf(t, r.Peek(Unit{Key: "k"}))
	var none *Rollout
	for name, c := range map[string]struct {
		r    *Rollout
		text string
		want []string
	}{
		"empty":                {r, "", []string{"not a decision's token", `""`}},
		"garbage":              {r, "hello\x00world", []string{"not a decision's token", `"hello\x00world"`}},
		"long garbage":         {r, strings.Repeat("x", 1<<20), []string{"not a decision's token"}},
		"colons":               {r, strings.Repeat(":", 1<<20), []string{"not a decision's token"}},
		"of a later format":    {r, "d2" + token[2:], []string{"not a decision's token"}},
		"wrong checksum":       {r, token[:len(token)-1] + "~", []string{"not a decision's token"}},
		"of another rollout":   {running(t, "other"), token, []string{`the rollout "clear"`}},
		"of no rollout":        {none, token, []string{`the rollout "clear"`}},
		"of an unknown ring":   {r, signAgain("d1:clear:1:5:nobody:g:x"), []string{`ring "nobody"`, "not in the policy"}},
		"of an unknown cohort": {r, signAgain("d1:clear:1:5:staff:7:x"), []string{"not a decision's token"}},
		"of too many bits":     {r, signAgain("d1:clear:1:5:staff:" + strconv.FormatUint(1<<32|uint64(pack(true, Candidate, ReasonSplit, 0, 0)), 36) + ":x"), []string{"not a decision's token"}},
		"of too many digits":   {r, signAgain("d1:clear:" + strings.Repeat("z", 40) + ":5:staff:g:x"), []string{"not a decision's token", "out of range"}},
		"of a negative epoch":  {r, signAgain("d1:clear:1:-5:staff:g:x"), []string{"not a decision's token"}},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := c.r.ParseDecision([]byte(c.text))
			if err == nil || d != (Decision{}) {
				t.Fatalf("%+v, %v", sayingOf(d), err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			if len(err.Error()) > 600 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
	for _, r := range []*Rollout{r, none} {
		if d := parseToken(t, r, tokenOf(t, Decision{})); d != (Decision{}) {
			t.Errorf("the zero decision became %+v", sayingOf(d))
		}
	}
}

// signAgain gives a forged token the checksum that belongs to it.
func signAgain(text string) string {
	i := strings.LastIndexByte(text, ':')
	if i < 0 {
		return text
	}
	return text[:i+1] + strconv.FormatUint(uint64(crc32.ChecksumIEEE([]byte(text[:i]))), 36)
}

// Whatever the text, with a right checksum or a wrong one, there is an error or a decision that can be used.
func FuzzParseDecision(f *testing.F) {
	r := running(f, "fuzz")
	old := tokenOf(f, r.Peek(Unit{Key: "k"}))
	for _, percent := range []Percent{1, 100, 0} {
		setPercent(f, r, "beta", percent)
		f.Add([]byte(tokenOf(f, r.Peek(Unit{Key: "k", Groups: []string{"beta"}}))))
		f.Add([]byte(tokenOf(f, r.Peek(Unit{Groups: []string{"staff"}}))))
	}
	for _, text := range []string{old, "", "d1:-:0:0:-:0:0", "d1:fuzz:0:0:-:zik0zj:0", "d1:fuzz:1:9:staff:7:0", "::::::", tokenOf(f, Decision{})} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, text := range []string{string(text), signAgain(string(text))} {
			d, err := r.ParseDecision([]byte(text))
			if err != nil {
				if d != (Decision{}) {
					t.Fatalf("%+v with the error %v", sayingOf(d), err)
				}
				continue
			}
			d.Record(Errors.Observe(true), Latency.Observe(time.Second))
			_, _ = d.Stage(), d.Version()
			again := parseToken(t, r, tokenOf(t, d))
			if diff := cmp.Diff(sayingOf(d), sayingOf(again)); diff != "" || again.bits != d.bits {
				t.Fatalf("%q: %s", text, diff)
			}
			if d.Ring() == "" && d != (Decision{}) {
				t.Fatalf("%q is of no ring", text)
			}
		}
	})
}
