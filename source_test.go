package rollout

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// meter is a Source of counters that grow by themselves.
type meter struct {
	mu     sync.Mutex
	n, bad [2]float64 // control, candidate
	say    func(add func(metric, ring string, candidate bool, values []float64)) error
}

func (m *meter) Totals(_ context.Context, add func(string, string, bool, []float64)) error {
	if m.say != nil {
		return m.say(add)
	}
	n, bad := m.totals()
	for c := range n {
		add("errors", "", c == 1, []float64{n[c], bad[c]})
	}
	return nil
}

func (m *meter) totals() (n, bad [2]float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.n, m.bad
}

// set changes the counters.
func (m *meter) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

// measure lets d go by while the counters grow: 100 outcomes a second, a tenth of them the candidate's.
func (m *meter) measure(d time.Duration, control, candidate float64) {
	for range int(d / time.Second) {
		time.Sleep(time.Second)
		m.set(func() {
			m.n[0], m.n[1] = m.n[0]+90, m.n[1]+10
			m.bad[0], m.bad[1] = math.Floor(control*m.n[0]), math.Floor(candidate*m.n[1])
		})
	}
	synctest.Wait()
}

// measured is a policy whose errors are measured elsewhere.
func measured() Policy {
	p := threeStages()
	p.Gates = []Gate{Errors.Within(2), Errors.NoWorse()}
	p.ProveFrom = 10
	return p
}

// TestSource: what a source counts promotes and rolls back like what is recorded; what is recorded besides is not judged.
func TestSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct {
			candidate float64
			want      State
		}{{.01, Completed}, {.08, RolledBack}} {
			m := &meter{}
			r := start(t, "x", measured(), Options{Sources: map[string]Source{"errors": m}})
			for range 3000 {
				m.measure(time.Second, .01, c.candidate)
				r.n++
				r.Decide(Unit{Key: fmt.Sprint(r.n)}).Record(Errors.Observe(true)) // nobody asked
				if s := r.Status().State; s == Completed || s == RolledBack {
					break
				}
			}
			s := r.Status()
			if s.State != c.want {
				t.Errorf("with %v it is %v: %+v", c.candidate, s.State, s.Gates)
			}
			if s.State == RolledBack && (s.Incident.Gate != "errors.Within(2)" || s.Incident.Candidate.Rate < .06) {
				t.Errorf("%+v", s.Incident)
			}
			r.stop()
		}
	})
}

// TestBrokenSource: whatever is wrong with a source, nothing is promoted, nothing broken, and the cause is shown.
func TestBrokenSource(t *testing.T) {
	for _, c := range []struct {
		cause string
		say   func(m *meter, add func(metric, ring string, candidate bool, values []float64)) error
	}{
		{"boom", func(*meter, func(string, string, bool, []float64)) error { return errors.New("boom") }},
		{"panic", func(*meter, func(string, string, bool, []float64)) error { panic("ouch") }},
		{"NaN", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", false, []float64{m.n[0], 0})
			add("errors", "", true, []float64{m.n[1], math.NaN()})
			return nil
		}},
		{"value 0 is -1", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", true, []float64{-1, 0})
			return nil
		}},
		{"no number of outcomes", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", true, []float64{m.n[1] + .5, 0})
			return nil
		}},
		{"no series of the control", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", true, []float64{m.n[1], 0})
			return nil
		}},
		{"no series of the candidate", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", false, []float64{m.n[0], 0})
			return nil
		}},
		{"no series of it", func(*meter, func(string, string, bool, []float64)) error { return nil }},
		{`no ring "staff"`, func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "staff", true, []float64{1, 0})
			return nil
		}},
		{"bad ones among them", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", true, []float64{1, 2})
			return nil
		}},
		{"two series", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", true, []float64{1, 0})
			add("errors", "", true, []float64{1, 0})
			return nil
		}},
		{"were reset", func(m *meter, add func(string, string, bool, []float64)) error { // at each reading
			add("errors", "", false, []float64{1e6 - m.n[0], 0})
			add("errors", "", true, []float64{1e6 - m.n[1], 0})
			return nil
		}},
		{"said the same", func(m *meter, add func(string, string, bool, []float64)) error {
			add("errors", "", false, []float64{1000, 0})
			add("errors", "", true, []float64{1000, 0})
			return nil
		}},
		{"no answer within", func(m *meter, add func(string, string, bool, []float64)) error {
			time.Sleep(20 * time.Second)
			return nil
		}},
	} {
		t.Run(c.cause, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &meter{}
				m.say = func(add func(string, string, bool, []float64)) error {
					n, _ := m.totals()
					return c.say(&meter{n: n}, add)
				}
				p := measured()
				p.Without = []string{GuardNoOutcome}
				r := start(t, "x", p, Options{Sources: map[string]Source{"errors": m}})
				for range 10 {
					m.measure(2*time.Minute, 0, 0)
					r.serve(time.Minute, 0, 0) // the bake passes
				}
				s := r.Status()
				if s.State != Running || s.Stage.Index != 0 || !strings.Contains(s.Gates[0].Cause, c.cause) || s.Gates[0].Verdict != Inconclusive || s.Gates[0].Candidate.N != 0 {
					t.Errorf("%v in stage %d, %+v", s.State, s.Stage.Index, s.Gates[0])
				}
				r.stop()
				time.Sleep(time.Minute) // for what hangs
			})
		})
	}
}

// TestSourceSeries: of any series of totals, with resets and changes of shares, what is consumed is what came in between
// two readings that can be compared, once.
func TestSourceSeries(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.SampledFrom([]metricID{Errors.m.Value(), Latency.m.Value(), NewScore("s", -1, 3).m.Value(), NewMix("m", "a", "b").m.Value()}).Draw(t, "metric")
		grow := func(was []float64) []float64 {
			now := append([]float64(nil), was...)
			n := float64(rapid.IntRange(0, 1000).Draw(t, "n"))
			part := math.Floor(n * rapid.Float64Range(0, 1).Draw(t, "part"))
			switch id.kind {
			case rateKind:
				now[0], now[1] = now[0]+n, now[1]+part
			case timingKind:
				now[1], now[3] = now[1]+part, now[3]+n
			case scoreKind:
				now[0], now[1], now[2] = now[0]+n, now[1]+n-part+3*part, now[2]+n-part+9*part // ones and threes
			case mixKind:
				now[0], now[1] = now[0]+part, now[1]+n-part
			}
			return now
		}
		zero := map[metricKind][]float64{rateKind: {0, 0}, timingKind: {.1, 0, math.MaxFloat64, 0}, scoreKind: {0, 0, 0}, mixKind: {0, 0, 0}}[id.kind]
		was := grow(zero)
		for range 10 {
			now := grow(was)
			if err := id.sane(now); err != nil {
				t.Fatalf("%v: %v", now, err)
			}
			d := id.since(was, now)
			if d == nil {
				t.Fatalf("from %v to %v is a reset", was, now)
			}
			n := id.counted(d)
			if id.kind == scoreKind {
				m, ok := id.moments(d)
				if !ok || m.N != n || m.S < 0 || m.S > m.N || m.S2 > m.S+1e-6*(n+1) {
					t.Fatalf("%v gives %+v, %t", d, m, ok)
				}
			} else if cells := id.outcomes(d); float64(sum(cells)) != n {
				t.Fatalf("%v gives %v", d, cells)
			}
			if n > 0 && id.since(now, was) != nil {
				t.Fatalf("from %v back to %v is no reset", now, was)
			}
			was = now
		}
	})
}

func TestFileSource(t *testing.T) {
	path := filepath.Join(t.TempDir(), "totals.jsonl")
	read := func(text string) (got []string, err error) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		err = FileSource(path).Totals(t.Context(), func(metric, ring string, candidate bool, values []float64) {
			got = append(got, fmt.Sprint(metric, " ", ring, " ", candidate, " ", values))
		})
		return got, err
	}
	good := `{"metric":"errors","cohort":"candidate","values":[3,1]}` + "\n\n" + `{"metric":"quality","ring":"staff","cohort":"control","values":[2,1.5,1.25]}`
	got, err := read(good)
	if want := "[errors  true [3 1] quality staff false [2 1.5 1.25]]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{good + "\n{", `{"metric":"errors","cohort":"both","values":[3,1]}`, `{"values":["x"]}`, strings.Repeat("x", 2<<20)} {
		if got, err := read(bad); err == nil || len(got) > 0 || !strings.Contains(err.Error(), path) {
			t.Errorf("%.60q: %v, %v", bad, got, err)
		}
	}
	if err := FileSource(path+"x").Totals(t.Context(), nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestSourcesRefused(t *testing.T) {
	for _, s := range []map[string]Source{{"errors": nil}, {"other": FileSource("x")}} {
		if _, err := New("x", measured(), &Options{Sources: s}); err == nil || !strings.Contains(err.Error(), "Options.Sources") {
			t.Errorf("%v: %v", s, err)
		}
	}
}

// FuzzSourceSeries: no totals make it panic, and what is taken for sane can be counted.
func FuzzSourceSeries(f *testing.F) {
	f.Add(uint8(0), 10., 1., 0., 0.)
	f.Add(uint8(1), .1, 5., math.Inf(1), 7.)
	f.Add(uint8(2), 10., 8., 7., 0.)
	f.Fuzz(func(t *testing.T, kind uint8, a, b, c, d float64) {
		id := []metricID{Errors.m.Value(), Latency.m.Value(), NewScore("s", 0, 1).m.Value(), NewMix("m", "a", "b").m.Value()}[kind%4]
		values := []float64{a, b, c, d}[:[]int{2, 4, 3, 3}[kind%4]]
		if id.sane(values) != nil {
			return
		}
		if d := id.since(make([]float64, len(values)), values); d != nil {
			if id.kind == scoreKind {
				if m, ok := id.moments(d); ok && !(m.S >= 0 && m.S <= m.N) {
					t.Errorf("%v gives %+v", d, m)
				}
			} else if n := float64(sum(id.outcomes(d))); n > id.counted(d) {
				t.Errorf("%v gives %v outcomes", d, n)
			}
		}
	})
}

// TestSourceOfSeveral: processes that share a Store and read the same counters, each with a lag of its own, consume every
// outcome once, also when the counters are reset.
func TestSourceOfSeveral(t *testing.T) {
	for _, lag := range []time.Duration{0, time.Second, 3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			m := &meter{}
			lagging := SourceFunc(func(ctx context.Context, add func(string, string, bool, []float64)) error {
				n, bad := m.totals()
				time.Sleep(lag)
				for c := range n {
					add("errors", "", c == 1, []float64{n[c], bad[c]})
				}
				return nil
			})
			p := measured()
			p.Gates = []Gate{Errors.Within(2)}
			p.Bake, p.Deadline, p.Without = 10*time.Hour, 100*time.Hour, []string{GuardNoOutcome}
			store := MemStore()
			var all []*process
			for i := range 3 {
				all = append(all, start(t, "x", p, Options{Store: store, Sources: map[string]Source{"errors": lagging}}))
				time.Sleep(time.Duration(i+1) * time.Second)
			}
			time.Sleep(time.Minute)
			before := m.n[1]
			counted := func() float64 {
				c := inStore(t, store).Gates.Gates["errors.Within(2)"]
				if c == nil {
					return 0
				}
				return float64(c.Parts[Everyone].Candidate.N)
			}
			m.measure(20*time.Minute, 0, 0)
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if got, want := counted(), m.n[1]-before; got > want || got < want*.98 {
				t.Errorf("lag %v: %v of %v outcomes were consumed", lag, got, want)
			}
			was := counted()
			m.set(func() { m.n, m.bad = [2]float64{}, [2]float64{} })
			time.Sleep(time.Minute)
			m.measure(10*time.Minute, 0, 0)
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if got, want := counted()-was, m.n[1]; got > want || got < want*.9 {
				t.Errorf("lag %v, after a reset: %v of %v outcomes were consumed", lag, got, want)
			}
			for _, r := range all {
				r.stop()
			}
			time.Sleep(time.Minute)
		})
	}
}

// TestSourceBakes: a bake goes on with the outcomes a source counts, and stops with them.
func TestSourceBakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &meter{}
		p := measured()
		p.Stages[0].GuardOnly, p.Bake, p.Without = true, 45*time.Second, []string{GuardNoOutcome}
		r := start(t, "x", p, Options{Sources: map[string]Source{"errors": m}})
		time.Sleep(30 * time.Second)
		m.set(func() { m.n[1]++ }) // one outcome
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if s := r.Status(); s.Stage.Index != 0 || s.Stage.Baked > 20*time.Second {
			t.Errorf("after one outcome %v of stage %d is baked", s.Stage.Baked, s.Stage.Index)
		}
		m.measure(2*time.Minute, 0, 0)
		if s := r.Status(); s.Stage.Index == 0 {
			t.Errorf("after two minutes of outcomes only %v is baked", s.Stage.Baked)
		}
	})
}
