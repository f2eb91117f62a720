package rollout

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// fataler is a *testing.T or a *rapid.T.
type fataler interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

// quietly are options on a Store of its own, without a log.
func quietly() *Options {
	return &Options{Store: MemStore(), Replica: "test", Logger: slog.New(slog.DiscardHandler)}
}

// startedWith is a rollout in its first stage, without a Run.
func startedWith(t fataler, p Policy) *Rollout {
	t.Helper()
	r, err := New("assign", p, quietly())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.startForTest(context.Background()); err != nil {
		t.Fatal(err)
	}
	return r
}

// simplePolicy is a policy of which any share may be set.
func simplePolicy(holdback Percent, rings ...Ring) Policy {
	return Policy{Rings: rings, Stages: Percentages(50, 100), Bake: time.Minute, Holdback: holdback, Gates: []Gate{Errors.AtMost(10)}}
}

func setPercent(t fataler, r *Rollout, ring string, p Percent) {
	t.Helper()
	if err := r.SetPercent(context.Background(), ring, p, "test"); err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Status().Rings {
		if s.Name == ring && s.Percent != p {
			t.Fatalf("%s has %v after SetPercent(%v)", ring, s.Percent, p)
		}
	}
}

// drawShares draws the share of a stage, often one that ends near bucket b.
func drawShares(b uint64) *rapid.Generator[Percent] {
	near := float64(b) / (1 << 64) * 100
	return rapid.Map(rapid.OneOf(
		rapid.SampledFrom([]float64{0.001, 1, 5, 50, 99.999, 100, 5e-324, 1e-18, math.Nextafter(100, 0), math.Nextafter(100, 0)}),
		rapid.SampledFrom([]float64{near, math.Nextafter(near, 0), math.Nextafter(near, 100)}),
		rapid.Float64Range(0, 100),
	), func(p float64) Percent { return Percent(min(max(p, 5e-324), 100)) })
}

func drawHoldbacks(b uint64) *rapid.Generator[Percent] {
	return rapid.OneOf(rapid.Just(Percent(0)), rapid.Map(drawShares(-b), func(p Percent) Percent { return min(p, 99) }))
}

// inShare is the documented formula.
func inShare(bucket uint64, share, holdback Percent) bool {
	t := func(p Percent) uint64 { return uint64(math.Ldexp(float64(p)/100, 64)) }
	return share > 0 && (share == 100 || bucket < t(share)) && (t(holdback) == 0 || bucket < -t(holdback))
}

// heldBack reports whether a bucket is of the Holdback.
func heldBack(bucket uint64, holdback Percent) bool { return !inShare(bucket, 100, holdback) }

// wantedAnswer is the answer for a keyed unit.
func wantedAnswer(bucket uint64, share, holdback Percent) (enabled bool, c Cohort, why Reason) {
	switch {
	case share == 0:
		return false, None, ReasonOff
	case heldBack(bucket, holdback):
		return false, Control, ReasonHoldback
	case share == 100:
		return true, Candidate, ReasonFull
	case inShare(bucket, share, holdback):
		return true, Candidate, ReasonSplit
	}
	return false, Control, ReasonSplit
}

func checkDecision(t fataler, what string, d Decision, enabled bool, c Cohort, why Reason) {
	t.Helper()
	if d.Enabled() != enabled || d.Cohort() != c || d.Reason() != why {
		t.Fatalf("%s: %v, %v, %v, not %v, %v, %v", what, d.Enabled(), d.Cohort(), d.Reason(), enabled, c, why)
	}
}

// Every bucket, share and Holdback, the ones at the very bounds above all, gives the answer of the documented formula.
func TestAssignmentFollowsTheFormula(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.OneOf(rapid.Uint64(), rapid.SampledFrom([]uint64{0, 1, 1 << 63, math.MaxUint64})).Draw(t, "bucket")
		h := drawHoldbacks(b).Draw(t, "holdback")
		p := simplePolicy(h)
		p.Salt = rapid.String().Draw(t, "salt")
		r := startedWith(t, p)
		for range 3 {
			share := drawShares(b).Draw(t, "share")
			if rapid.IntRange(0, 9).Draw(t, "off") == 0 {
				share = 0
			}
			setPercent(t, r, Everyone, share)
			s := r.snap.Load()
			for _, b := range []uint64{b - 1, b, b + 1, 0, math.MaxUint64, share.threshold() - 1, share.threshold(), -h.threshold() - 1, -h.threshold()} {
				enabled, c, why := wantedAnswer(b, share, h)
				d := s.decision(&Unit{Key: "k"}, unmix(b)^s.salt)
				checkDecision(t, fmt.Sprintf("bucket %d, share %v, holdback %v", b, share, h), d, enabled, c, why)
				if c != None && d.bits.group() != b&63 {
					t.Fatalf("bucket %d is of group %d", b, d.bits.group())
				}
			}
			salt := p.Salt
			if salt == "" {
				salt = r.Name()
			}
			for _, key := range []string{"k", rapid.StringN(1, -1, 60).Draw(t, "key")} {
				enabled, c, why := wantedAnswer(Bucket(salt, key), share, h)
				checkDecision(t, fmt.Sprintf("key %q, share %v, holdback %v", key, share, h), r.Decide(Unit{Key: key}), enabled, c, why)
			}
			full := share == 100 && h.threshold() == 0
			why := ReasonNoUnit
			switch {
			case full:
				why = ReasonFull
			case share == 0:
				why = ReasonOff
			}
			before := r.Status().NoUnit
			checkDecision(t, fmt.Sprintf("no key, share %v, holdback %v", share, h), r.Decide(Unit{}), full, None, why)
			counted := r.Status().NoUnit - before
			if (why == ReasonNoUnit) != (counted == 1) || counted > 1 {
				t.Fatalf("a decision without a key, %v, was counted %d times", why, counted)
			}
		}
	})
}

// exposedOf is which of the units get the candidate.
func exposedOf(r *Rollout, units []Unit) []bool {
	in := make([]bool, len(units))
	for i, u := range units {
		in[i] = r.Peek(u).Enabled()
	}
	return in
}

// firstOut reports the first unit that is in a and not in b; -1: there is none.
func firstOut(a, b []bool) int {
	for i := range a {
		if a[i] && !b[i] {
			return i
		}
	}
	return -1
}

func unitsOf(n int, groups ...string) []Unit {
	us := make([]Unit, n)
	for i := range us {
		us[i] = Unit{Key: fmt.Sprint("unit-", i), Groups: groups}
	}
	return us
}

// Raising a share never takes a unit out, and lowering and raising it returns the same units, however often an operator
// changes his mind.
func TestSharesAreMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ring := rapid.SampledFrom([]string{"staff", Everyone}).Draw(t, "ring")
		p := simplePolicy(drawHoldbacks(1<<63).Draw(t, "holdback"), Ring{Name: "staff"})
		p.Salt = rapid.String().Draw(t, "salt")
		r := startedWith(t, p)
		units := unitsOf(300, ring)
		type step struct {
			share Percent
			in    []bool
		}
		var steps []step
		for _, share := range append(rapid.SliceOfN(drawShares(1<<62), 2, 6).Draw(t, "shares"), 0, 100) {
			setPercent(t, r, ring, share)
			if inner := r.Status().Rings[0].Percent; inner != share {
				t.Fatalf("staff has %v while %s has %v", inner, ring, share)
			}
			now := step{share, exposedOf(r, units)}
			for _, s := range steps {
				a, b := s, now
				if a.share > b.share {
					a, b = b, a
				}
				if i := firstOut(a.in, b.in); i >= 0 {
					t.Fatalf("%s is in %v of %s and not in %v", units[i].Key, a.share, ring, b.share)
				}
				if a.share == b.share && !slices.Equal(a.in, b.in) {
					t.Fatalf("%v of %s returned other units", a.share, ring)
				}
			}
			steps = append(steps, now)
		}
	})
}

// drawLadder draws valid stages over the rings, outermost last.
func drawLadder(t *rapid.T, rings []string) []Stage {
	reached := make([]Percent, len(rings))
	var stages []Stage
	everyone := len(rings) - 1
	for range rapid.IntRange(0, 8).Draw(t, "stages") {
		i := rapid.IntRange(0, everyone).Draw(t, "ring")
		least := slices.Max(reached[i:])
		if least >= 99 {
			continue
		}
		p := least + Percent(rapid.Float64Range(0.01, float64(100-least)).Draw(t, "percent"))
		if rapid.IntRange(0, 4).Draw(t, "all") == 0 {
			p = 100
		}
		if i == everyone && p == 100 {
			continue
		}
		reached[i] = p
		stages = append(stages, Stage{Ring: rings[i], Percent: p, Over: time.Duration(rapid.IntRange(0, 1).Draw(t, "over")) * time.Hour})
	}
	return append(stages, Stage{Percent: 100})
}

// Along the stages every ring has the greatest share that its own or any outer ring's stages have reached, no ring less
// than one around it, and no unit is ever taken out again; in the end everybody is in.
func TestRingsAreNested(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rings := []string{"staff", "beta", "region", Everyone}[rapid.IntRange(0, 3).Draw(t, "fewer"):]
		p := Policy{Stages: drawLadder(t, rings), Bake: time.Minute, Holdback: drawHoldbacks(1<<63).Draw(t, "holdback"), Gates: []Gate{Errors.AtMost(10)}}
		var units []Unit
		for _, name := range rings[:len(rings)-1] {
			p.Rings = append(p.Rings, Ring{Name: name})
			units = append(units, unitsOf(40, name)...)
		}
		units = append(append(units, unitsOf(60)...), Unit{}, Unit{Groups: rings})
		r := startedWith(t, p)
		var last []bool
		reached := map[string]Percent{}
		for i, stage := range p.Stages {
			st := r.Status()
			if st.Stage.Index != i || st.State != Running {
				t.Fatalf("stage %d, %v, not stage %d", st.Stage.Index, st.State, i)
			}
			ring := stage.Ring
			if ring == "" {
				ring = Everyone
			}
			within := Percent(0)
			for _, outer := range rings[slices.Index(rings, ring):] {
				within = max(within, reached[outer])
			}
			now := reached[ring]
			if stage.Over > 0 {
				now = within + (stage.Percent-within)/16
			} else {
				now = stage.Percent
			}
			outer := Percent(0)
			for j, name := range slices.Backward(rings) {
				share := reached[name]
				if name == ring {
					share = now
				}
				outer = max(outer, share)
				if got := st.Rings[j].Percent; got != outer {
					t.Fatalf("stage %d: %s has %v, not %v", i, name, got, outer)
				}
			}
			in := exposedOf(r, units)
			if j := firstOut(last, in); j >= 0 {
				t.Fatalf("stage %d took out %+v", i, units[j])
			}
			last = in
			reached[ring] = stage.Percent
			if err := r.Advance(t.Context(), st.Stage.Name, "test"); err != nil {
				t.Fatal(err)
			}
		}
		for _, u := range units {
			checkDecision(t, fmt.Sprintf("%+v, completed", u), r.Decide(u), true, None, ReasonCompleted)
		}
	})
}

// A unit belongs to the first ring that matches it: one without Match by its Groups. A Match that panics is no match and
// is counted.
func TestFirstRingWins(t *testing.T) {
	names := []string{"r0", "r1", "r2", "r3"}
	rapid.Check(t, func(t *rapid.T) {
		var rings []Ring
		var kinds []string
		for i := range rapid.IntRange(0, len(names)).Draw(t, "rings") {
			kind := rapid.SampledFrom([]string{"group", "all", "none", "long key", "panic", "bounds panic"}).Draw(t, "kind")
			ring := Ring{Name: names[i]}
			switch kind {
			case "all":
				ring.Match = func(Unit) bool { return true }
			case "none":
				ring.Match = func(Unit) bool { return false }
			case "long key":
				ring.Match = func(u Unit) bool { return len(u.Key) > 3 }
			case "panic":
				ring.Match = func(Unit) bool { panic("no idea") }
			case "bounds panic":
				ring.Match = func(u Unit) bool { return u.Groups[len(u.Groups)] == "" }
			}
			rings, kinds = append(rings, ring), append(kinds, kind)
		}
		r := startedWith(t, simplePolicy(0, rings...))
		panics := uint64(0)
		for range 5 {
			u := Unit{Key: rapid.SampledFrom([]string{"", "abc", "abcd", "r0"}).Draw(t, "key")}
			u.Groups = rapid.SliceOfN(rapid.SampledFrom(append(names, "other", "")), 0, 4).Draw(t, "groups")
			ring := Everyone
		first:
			for i, kind := range kinds {
				switch kind {
				case "panic", "bounds panic":
					panics++
				case "group":
					if slices.Contains(u.Groups, names[i]) {
						ring = names[i]
						break first
					}
				case "all", "long key":
					if kind == "all" || len(u.Key) > 3 {
						ring = names[i]
						break first
					}
				}
			}
			if got := r.Decide(u).Ring(); got != ring {
				t.Fatalf("%+v is of ring %q, not %q", u, got, ring)
			}
		}
		if got := r.Status().Panics; got != panics {
			t.Fatalf("%d panics were counted, not %d", got, panics)
		}
	})
}

// evidenceOf is all that was recorded and counted.
func evidenceOf(r *Rollout) (records, decisions uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.decidedLocked() {
		decisions += n[0] + n[1]
	}
	for _, l := range r.ledgers {
		for i := range l.snap.rings {
			for _, tables := range l.snap.rings[i].outcomes {
				for _, table := range tables {
					cells := make([]uint64, table.Width())
					table.AddTo(cells)
					records += sum(cells)
				}
			}
		}
	}
	return records, decisions
}

// Nothing is recorded for a decision of cohort None and nothing counted, and every other one counts once.
func TestNoneRecordsNothing(t *testing.T) {
	ctx := context.Background()
	policy := simplePolicy(0, Ring{Name: "staff"}, Ring{Name: "beta"})
	begin := func(then func(r *Rollout) error) *Rollout {
		r := startedWith(t, policy)
		if err := then(r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	notStarted := Must("assign", policy, quietly())
	held := Must("assign", policy, quietly())
	if err := held.Hold(ctx, "before it began"); err != nil {
		t.Fatal(err)
	}
	keyed, staff := Unit{Key: "k"}, Unit{Key: "k", Groups: []string{"staff"}}
	for _, c := range []struct {
		name string
		r    *Rollout
		u    Unit
		why  Reason
	}{
		{"not loaded", notStarted, keyed, ReasonNotLoaded},
		{"held before it began", held, keyed, ReasonOff},
		{"no share", begin(func(r *Rollout) error { return r.SetPercent(ctx, Everyone, 0, "") }), keyed, ReasonOff},
		{"no key", begin(func(*Rollout) error { return nil }), Unit{}, ReasonNoUnit},
		{"no key, full", begin(func(r *Rollout) error { return r.Advance(ctx, "everyone 50 %", "") }), Unit{}, ReasonFull},
		{"ring rolled back", begin(func(r *Rollout) error { return r.RollbackRing(ctx, "staff", "") }), staff, ReasonRolledBack},
		{"rolled back", begin(func(r *Rollout) error { return r.Rollback(ctx, "") }), keyed, ReasonRolledBack},
		{"completed", begin(func(r *Rollout) error {
			if err := r.Advance(ctx, "everyone 50 %", ""); err != nil {
				return err
			}
			return r.Advance(ctx, "everyone 100 %", "")
		}), keyed, ReasonCompleted},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := c.r.Status()
			d := c.r.Decide(c.u)
			if d.Cohort() != None || d.Reason() != c.why || d.Enabled() != (c.why == ReasonCompleted || c.why == ReasonFull) {
				t.Errorf("%v, %v, %v", d.Enabled(), d.Cohort(), d.Reason())
			}
			d.Record(Errors.Observe(true), Latency.Observe(time.Second), NewRate("unheard-of").Observe(true))
			if records, decisions := evidenceOf(c.r); records != 0 || decisions != 0 {
				t.Errorf("%d records, %d decisions", records, decisions)
			}
			after := c.r.Status()
			after.NoUnit = before.NoUnit
			if diff := cmp.Diff(before, after); diff != "" {
				t.Error(diff)
			}
		})
	}

	r := begin(func(*Rollout) error { return nil })
	for i, u := range unitsOf(100) {
		d := r.Decide(u)
		d.Record(Errors.Observe(false), Latency.Observe(time.Second))
		if records, decisions := evidenceOf(r); records != uint64(2*i+2) || decisions != uint64(i+1) {
			t.Fatalf("%d records and %d decisions after %d", records, decisions, i+1)
		}
	}
	st := r.Status().Rings[2]
	if want := uint64(countTrue(exposedOf(r, unitsOf(100)))); st.Candidate != want || st.Control != 100-want {
		t.Errorf("%d and %d decisions, not %d and %d", st.Candidate, st.Control, want, 100-want)
	}
}

func countTrue(in []bool) (n int) {
	for _, b := range in {
		if b {
			n++
		}
	}
	return n
}

// Peek is Decide, but not counted.
func TestPeekCountsNothing(t *testing.T) {
	r := running(t, "peek")
	units := append(unitsOf(200), Unit{}, Unit{Groups: []string{"staff"}}, Unit{Key: "k", Groups: []string{"beta"}})
	before := r.Status()
	var peeked []Decision
	for _, u := range units {
		peeked = append(peeked, r.Peek(u))
	}
	if diff := cmp.Diff(before, r.Status()); diff != "" {
		t.Error(diff)
	}
	if records, decisions := evidenceOf(r); records != 0 || decisions != 0 {
		t.Errorf("%d records, %d decisions", records, decisions)
	}
	for i, u := range units {
		if d, p := r.Decide(u), peeked[i]; d.at.epoch != p.at.epoch || d.Generation() != p.Generation() || d.Stage() != p.Stage() || d.bits != p.bits {
			t.Errorf("%+v: Decide says %v and Peek %v", u, d, peeked[i])
		}
	}
	if _, decisions := evidenceOf(r); decisions != 201 {
		t.Errorf("%d decisions of 201 keyed units", decisions)
	}
}

func TestNilRolloutIsStable(t *testing.T) {
	var r *Rollout
	ctx := NewContext(t.Context(), Unit{Key: "k"})
	for _, d := range []Decision{r.Decide(Unit{Key: "k"}), r.Peek(Unit{}), r.DecideContext(ctx)} {
		if d != (Decision{}) {
			t.Errorf("%+v", d)
		}
	}
	if r.Enabled(ctx) || r.Name() != "" {
		t.Errorf("%v %q", r.Enabled(ctx), r.Name())
	}
	if diff := cmp.Diff(Status{}, r.Status()); diff != "" {
		t.Error(diff)
	}
	w := httptest.NewRecorder()
	say := func(code int) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
	}
	r.Handler(say(201), say(202)).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if w.Code != 202 {
		t.Errorf("the handler saidOf %d", w.Code)
	}
	got, err := Do(ctx, r, Unit{Key: "k"},
		func(context.Context) (string, error) { return "candidate", nil },
		func(context.Context) (string, error) { return "stable", nil })
	if got != "stable" || err != nil {
		t.Errorf("Do: %s, %v", got, err)
	}
	for name, err := range map[string]error{
		"Ready": r.Ready(ctx), "Run": r.Run(ctx), "Hold": r.Hold(ctx, ""), "Resume": r.Resume(ctx, ""), "Rollback": r.Rollback(ctx, ""),
		"Restart": r.Restart(ctx, ""), "SetPercent": r.SetPercent(ctx, Everyone, 1, ""), "Approve": r.Approve(ctx, "", ""),
		"Advance": r.Advance(ctx, "", ""), "RollbackRing": r.RollbackRing(ctx, Everyone, ""),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestZeroDecisionIsOff(t *testing.T) {
	var d Decision
	d.Record(Errors.Observe(true), Latency.Observe(1), Observation{})
	if d.Enabled() || d.Cohort() != None || d.Reason() != ReasonUnset || d.Ring()+d.Stage()+d.Version() != "" || d.Generation() != 0 {
		t.Errorf("%v %v %v %q %q %q %d", d.Enabled(), d.Cohort(), d.Reason(), d.Ring(), d.Stage(), d.Version(), d.Generation())
	}
}

func TestDecisionIsSmall(t *testing.T) {
	if size := unsafe.Sizeof(Decision{}); size > 16 {
		t.Errorf("%d bytes", size)
	}
}

// Before anything is loaded everybody has the stable version, and a Ready with nothing stored changes nothing.
func TestStableBeforeAnythingIsLoaded(t *testing.T) {
	o := quietly()
	r := Must("assign", simplePolicy(0), o)
	notLoaded := func() {
		t.Helper()
		for _, u := range append(unitsOf(20), Unit{}) {
			for _, d := range []Decision{r.Decide(u), r.Peek(u), r.DecideContext(NewContext(t.Context(), u))} {
				checkDecision(t, fmt.Sprintf("%+v", u), d, false, None, ReasonNotLoaded)
				if d.Generation() != 0 || d.Stage() != "" || d.Version() != "" {
					t.Errorf("generation %d, stage %q, version %q", d.Generation(), d.Stage(), d.Version())
				}
			}
		}
		if st := r.Status(); st.Loaded || st.NoUnit != 0 {
			t.Errorf("loaded: %v, %d without a key", st.Loaded, st.NoUnit)
		}
	}
	notLoaded()
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	notLoaded()

	other := Must("assign", simplePolicy(0), o)
	if err := other.startForTest(t.Context()); err != nil {
		t.Fatal(err)
	}
	notLoaded()
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, u := range unitsOf(100) {
		a, b := r.Decide(u), other.Decide(u)
		if a.bits != b.bits || a.Cohort() == None {
			t.Errorf("%s: %v and %v after Ready", u.Key, a.Reason(), b.Reason())
		}
	}
}

// One request, one answer, whatever becomes of the rollout meanwhile, and counted once.
func TestContextKeepsItsAnswer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var rs []*Rollout
		for range rapid.IntRange(1, 7).Draw(t, "rollouts") { // some more than a scope has pins for
			rs = append(rs, startedWith(t, simplePolicy(0)))
		}
		u := Unit{Key: rapid.StringN(0, 8, -1).Draw(t, "key")}
		ctx := NewContext(t.Context(), u)
		first := map[*Rollout]Decision{}
		for range 10 {
			r := rapid.SampledFrom(rs).Draw(t, "rollout")
			d, asked := first[r]
			if !asked {
				d = r.Peek(u)
				first[r] = d
			}
			if got := r.DecideContext(ctx); got.at.uncounted() != d.at || got.bits != d.bits || r.Enabled(ctx) != d.Enabled() {
				t.Fatalf("%v became %v", d, got)
			}
			switch rapid.IntRange(0, 3).Draw(t, "meanwhile") {
			case 0:
				setPercent(t, r, Everyone, rapid.SampledFrom([]Percent{0, 1, 50, 100}).Draw(t, "share"))
			case 1:
				if err := r.Resume(t.Context(), ""); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, r := range rs {
			want := uint64(0)
			if d, asked := first[r]; asked && d.Cohort() != None {
				want = 1
			}
			if _, decisions := evidenceOf(r); decisions != want {
				t.Fatalf("%d decisions, not %d", decisions, want)
			}
		}
	})
}

// The decision path allocates nothing.
func TestDecisionPathDoesNotAlloc(t *testing.T) {
	grouped := running(t, "groups")
	matched := startedWith(t, simplePolicy(5, Ring{Name: "staff", Match: func(u Unit) bool { return len(u.Key) == 1 }}))
	off := Must("off", simplePolicy(0), quietly())
	full := startedWith(t, simplePolicy(0))
	setPercent(t, full, Everyone, 100)
	watched := NewRate("unheard-of")
	full.Decide(Unit{Key: "k"}).Record(watched.Observe(true)) // the first one is remembered to be logged
	for _, r := range []*Rollout{grouped, matched, off, full, nil} {
		for _, u := range []Unit{{Key: "k"}, {Key: "018f3c5e-0000-7000-8000-000000000001"}, {}, {Key: "key", Groups: []string{"x", "beta"}}} {
			d := r.Peek(u)
			ctx := NewContext(t.Context(), u)
			asked := NewContext(t.Context(), u)
			r.Enabled(asked)
			fresh := scopeOf(ctx)
			token := make([]byte, 0, 128)
			for what, f := range map[string]func(){
				"Decide": func() { r.Decide(u) },
				"Peek":   func() { r.Peek(u) },
				"Record": func() { d.Record(Errors.Observe(true), Latency.Observe(time.Millisecond)) },
				"Record of an unknown metric": func() {
					if r == full {
						d.Record(watched.Observe(true))
					}
				},
				"Record in a context":  func() { Record(asked, Errors.Observe(true), Latency.Observe(time.Millisecond)) },
				"Enabled":              func() { r.Enabled(asked) },
				"first DecideContext":  func() { fresh.pins[0].Store(nil); r.DecideContext(ctx) },
				"DecideContext, again": func() { r.DecideContext(asked) },
				"without a context":    func() { r.Enabled(context.Background()) },
				"AppendText":           func() { token, _ = d.AppendText(token[:0]) },
			} {
				if n := testing.AllocsPerRun(50, f); n != 0 {
					t.Errorf("%s for %+v by %q: %v allocations", what, u, r.Name(), n)
				}
			}
		}
	}
}
