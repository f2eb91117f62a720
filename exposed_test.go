package rollout

import (
	"encoding/json"
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// TestWasExposed: whoever the candidate was really given to at some time was exposed then, in every process's incident and
// in one that was written and read; and nobody whom no share in force around that time includes.
func TestWasExposed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rapid.SyncTest(t, func(t *rapid.T) {
			p := talks(SessionPolicy{})
			p.Rings = []Ring{{Name: "staff"}, {Name: "even", Match: func(u Unit) bool { return len(u.Key)%2 == 0 && u.Key != "" }}}
			p.Holdback = Percent(rapid.SampledFrom([]int{0, 5, 40}).Draw(t, "holdback"))
			p.Sessions.OnRollback = rapid.SampledFrom([]Revocation{FinishTurn, AtOnce}).Draw(t, "revocation")
			p.Sessions.Grace = time.Duration(rapid.IntRange(1, 300).Draw(t, "grace")) * time.Second
			grace := p.Sessions.grace()
			r, err := New("x", p, &Options{Logger: quiet, Interval: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.startForTest(t.Context()); err != nil {
				t.Fatal(err)
			}
			type seen struct {
				u  Unit
				at time.Time
				on bool
			}
			var all []seen
			var changes []time.Time
			units := []Unit{{}, {Groups: []string{"staff"}}}
			for i := range 30 {
				u := Unit{Key: fmt.Sprint("user ", i)}
				if i%3 == 0 {
					u.Groups = []string{"staff"}
				}
				units = append(units, u)
			}
			look := func() {
				for _, u := range units {
					all = append(all, seen{u, time.Now(), r.Peek(u).Enabled()})
				}
			}
			look()
			for range rapid.IntRange(1, 6).Draw(t, "changes") {
				time.Sleep(time.Duration(rapid.IntRange(1, 600).Draw(t, "seconds")) * time.Second)
				look()
				switch rapid.IntRange(0, 3).Draw(t, "what") {
				case 0:
					_ = r.RollbackRing(t.Context(), "staff", "")
				case 1:
					_ = r.Advance(t.Context(), r.Status().Stage.Name, "")
				default:
					ring := rapid.SampledFrom([]string{"staff", "even", Everyone}).Draw(t, "ring")
					_ = r.SetPercent(t.Context(), ring, Percent(rapid.SampledFrom([]float64{0, 1, 30, 50, 99, 100}).Draw(t, "percent")), "")
				}
				changes = append(changes, time.Now())
				look()
			}
			time.Sleep(10 * time.Minute)
			if err := r.Rollback(t.Context(), ""); err != nil {
				t.Fatal(err)
			}
			look()
			changes = append(changes, time.Now())
			in := *r.Status().Incident
			again := Incident{}
			doc, err := json.Marshal(in)
			if err == nil {
				err = json.Unmarshal(doc, &again)
			}
			if err != nil {
				t.Fatal(err)
			}
			again.Exposure.Match = in.Exposure.Match
			slack := in.Exposure.Slack
			if slack != 62*time.Second || in.Exposure.Grace != grace {
				t.Fatalf("the slack is %v, the grace %v", slack, in.Exposure.Grace)
			}
			for _, s := range all {
				was := in.WasExposed(s.u, s.at)
				if s.on && !was {
					t.Fatalf("%+v had the candidate at %v", s.u, s.at)
				}
				if again.WasExposed(s.u, s.at) != was {
					t.Fatalf("%+v at %v: another answer once written and read", s.u, s.at)
				}
				near := false // a change that the answer may be because of
				for _, c := range changes {
					near = near || s.at.Sub(c) >= -slack && s.at.Sub(c) <= slack+grace
				}
				if was && !s.on && !near {
					t.Fatalf("%+v did not have the candidate at %v, and no change is near", s.u, s.at)
				}
			}
			if in.WasExposed(units[5], time.Now().Add(time.Hour)) || in.WasExposed(units[5], all[0].at.Add(-time.Hour)) || (Incident{}).WasExposed(units[5], all[0].at) {
				t.Fatal("exposed before it began, after it was rolled back, or to nothing")
			}
		})
	})
}

// TestWasExposedInSession: whoever has a session on the candidate is exposed for as long as it may go on after a rollback, of
// all or of its ring; where a share was lowered, only the time at which it began tells.
func TestWasExposedInSession(t *testing.T) {
	const grace = 5 * time.Minute
	for name, how := range map[string]Revocation{"rollback": FinishTurn, "of a ring": FinishTurn, "until end": UntilEnd, "at once": AtOnce, "lowered": FinishTurn} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, "x", talks(SessionPolicy{OnRollback: how, Grace: grace}), Options{})
				u := r.of(Candidate, "staff")
				time.Sleep(10 * time.Minute)
				ctx, s := r.Begin(t.Context(), u)
				began := time.Now()
				switch name {
				case "of a ring":
					must(t, r.RollbackRing(t.Context(), "staff", "stop"))
				case "lowered":
					must(t, r.SetPercent(t.Context(), "staff", 0, "less"))
				default:
					must(t, r.Rollback(t.Context(), "stop"))
				}
				var asked []time.Time // while the session was at work
				for range 60 {
					if synctest.Wait(); ctx.Err() == nil {
						asked = append(asked, time.Now())
					}
					time.Sleep(10 * time.Second)
				}
				over := time.Now()
				must(t, r.Rollback(t.Context(), "stop"))
				in := r.Status().Incident
				missed := 0
				for _, at := range append(asked, began) {
					if !in.WasExposed(u, at) {
						missed++
					}
				}
				if wrong := missed > 0; wrong != (name == "lowered") || !in.WasExposed(u, began) {
					t.Errorf("not exposed at %d of %d times in the session", missed, len(asked))
				}
				if got := in.WasExposed(u, over); got != (name == "until end") {
					t.Errorf("exposed long after: %v", got)
				}
				if in.WasExposed(u, began.Add(-time.Hour)) {
					t.Error("exposed before it began")
				}
				s.End(nil)
			})
		})
	}
}

// TestUnits: how many units came is known within 3 %, for each cohort by itself, however many they are.
func TestUnits(t *testing.T) {
	most := 30_000_000
	if raced {
		most /= 10
	}
	for _, seed := range []uint64{1, 2, 3} {
		var u units
		next := 1
		x := seed * 0x9e3779b97f4a7c15
		for n := 1; n <= most; n++ {
			x += 0x9e3779b97f4a7c15
			bucket := bucketOf(seed, x) >> 1 // of a candidate with 50 %: the highest bit is never set
			if !u.known(1, bucket) {
				u.add(1, bucket)
			}
			if n%3 == 0 && !u.known(0, ^bucket) {
				u.add(0, ^bucket)
			}
			if n < next {
				continue
			}
			next += 1 + next/3
			if got := float64(u.count(1)); math.Abs(got-float64(n)) > max(.03*float64(n), .6) {
				t.Errorf("seed %d: %v of %d", seed, got, n)
			}
			if got := float64(u.count(0)); math.Abs(got-float64(n/3)) > max(.03*float64(n/3), .6) {
				t.Errorf("seed %d, the other cohort: %v of %d", seed, got, n/3)
			}
		}
	}
}

// TestUnitsAreTold: Status and the incident have the estimate, of the generation, by ring and cohort; a unit that comes a
// hundred times counts once, and a Peek not at all.
func TestUnitsAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "x", talks(SessionPolicy{}), Options{})
		want := UnitCount{}
		for i := range 2000 {
			u := Unit{Key: fmt.Sprint(i)}
			if r.Peek(u); i%10 == 0 {
				_, s := r.Begin(t.Context(), u)
				s.End(nil)
			}
			for range 1 + 99*(i%2) {
				r.Decide(u)
			}
			if r.Peek(u).Enabled() {
				want.Candidate++
			} else {
				want.Control++
			}
		}
		near := func(got UnitCount) bool {
			return math.Abs(float64(got.Candidate)/float64(want.Candidate)-1) < .03 && math.Abs(float64(got.Control)/float64(want.Control)-1) < .03
		}
		if got := r.Status().Rings; !near(got[1].Units) || got[0].Units != (UnitCount{}) {
			t.Errorf("%+v, not %+v", got, want)
		}
		must(t, r.Rollback(t.Context(), ""))
		if got := r.Status().Incident.Units; len(got) != 1 || !near(got[Everyone]) {
			t.Errorf("%+v, not %+v", got, want)
		}
		must(t, r.Restart(t.Context(), ""))
		minute()
		if got := r.Status().Rings[1].Units; got != (UnitCount{}) {
			t.Errorf("a new generation has %+v", got)
		}
	})
}

// TestFirstUnits: the guard of the split counts a unit when it first comes in either cohort.
func TestFirstUnits(t *testing.T) {
	var u units
	seen := map[uint64]bool{}
	for i := range uint64(5000) {
		bucket := bucketOf(9, i*i)
		part := bucket >> partShift & (unitParts - 1)
		if first := u.add(int(i%2), bucket); first == seen[part] {
			t.Fatalf("unit %d: first %v", i, first)
		}
		seen[part] = true
		if u.add(int(i+1)%2, bucket) {
			t.Fatalf("unit %d counts in both cohorts", i)
		}
	}
}
