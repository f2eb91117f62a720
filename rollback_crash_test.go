package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

// mortal is one life of a process: it dies at its n-th point, or at that of a name, and does nothing from then on. Points
// are before and after each write to the Store, step and undo.
type mortal struct {
	Store
	mu     sync.Mutex
	at     int    // dies there; 0: at no number
	where  string // dies there; "": at no name
	points []string
	dead   bool
	kill   func()
}

var errDead = errors.New("the process is dead")

// pass is one point. It reports whether the process lives on.
func (m *mortal) pass(what string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return false
	}
	times := 1
	for _, p := range m.points {
		if before, _, _ := strings.Cut(p, " #"); before == what {
			times++
		}
	}
	m.points = append(m.points, fmt.Sprintf("%s #%d", what, times))
	if len(m.points) == m.at || m.points[len(m.points)-1] == m.where {
		m.dead = true
		m.kill()
		return false
	}
	return true
}

// begins forgets the points that were passed.
func (m *mortal) begins(where string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.points, m.where = nil, where
}

func (m *mortal) alive() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.dead
}

func (m *mortal) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	if !m.alive() {
		return nil, 0, errDead
	}
	return m.Store.Load(ctx, key)
}

func (m *mortal) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	if !m.alive() {
		return nil, errDead
	}
	return m.Store.List(ctx, prefix)
}

func (m *mortal) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	what := "the write of " + kindOfKey(key)
	if value == nil {
		what = "the delete of " + kindOfKey(key)
	}
	if !m.pass("before " + what) {
		return 0, false, errDead
	}
	rev, ok, err := m.Store.CompareAndSwap(ctx, key, old, value)
	if !m.pass("after " + what) {
		return 0, false, errDead
	}
	return rev, ok, err
}

// kindOfKey is a key without what differs from run to run.
func kindOfKey(key string) string {
	parts := strings.Split(strings.TrimPrefix(key, "rollout/x/"), "/")
	if parts[0] == "undo" {
		return "effect " + parts[len(parts)-1]
	}
	return parts[0]
}

// saga is what a full rollback did, over all lives of its process.
type saga struct {
	t       *testing.T
	store   Store
	mu      sync.Mutex
	log     []string // begins of steps and undos, in order
	ended   map[string]int
	lives   map[*Rollout]*mortal
	fails   map[string]int // attempts of a step that fail
	alarmed bool
	fences  []string
	byCheck bool
}

// act is a step or an undo in one life.
func (s *saga) act(m *mortal, name, key, fence string) error {
	if !m.pass("before " + name) {
		return errDead
	}
	s.mu.Lock()
	st := inStore(s.t, s.store)
	i := slices.IndexFunc(st.Steps, func(x machine.StepState) bool { return x.Name == name || x.Undo && strings.HasPrefix(name, "effect") })
	if !st.Phase.Latched() || i < 0 || st.Steps[i].Attempts == 0 {
		s.t.Errorf("%s began, and stored are %v and %+v", name, st.Phase, st.Steps)
	}
	for r, m := range s.lives {
		if m.alive() && served(r) {
			s.t.Errorf("exposed while %s runs", name)
		}
	}
	s.log = append(s.log, name)
	s.fences = append(s.fences, fence)
	if key == "" {
		s.t.Errorf("%s has no key", name)
	}
	failing := s.fails[name] > 0
	if failing {
		s.fails[name]--
	}
	s.mu.Unlock()
	if failing {
		return errors.New("not yet")
	}
	s.mu.Lock()
	s.ended[key]++
	s.mu.Unlock()
	if !m.pass("after " + name) {
		return errDead
	}
	return nil
}

// life starts a process that dies at a point.
func (s *saga) life(at int) (*process, *mortal) {
	m := &mortal{Store: s.store, at: at}
	ctx, cancel := context.WithCancel(context.Background())
	m.kill = cancel
	p := talks(SessionPolicy{Grace: time.Second})
	for _, name := range []string{"one", "two", "three"} {
		p.Rollback = append(p.Rollback, RollbackStep{Name: name, Do: func(_ context.Context, in Incident) error {
			return s.act(m, name, in.Key, in.Fence)
		}})
	}
	p.Undo = map[string]func(context.Context, Effect) error{}
	for _, kind := range []string{"order", "mail"} {
		p.Undo[kind] = func(_ context.Context, e Effect) error { return s.act(m, string(e.Payload), e.Key, e.Fence) }
	}
	if s.byCheck {
		p.Gates = append(p.Gates, Check("alarm", func(context.Context) (Verdict, error) {
			if s.ringing() {
				return Unhealthy, nil
			}
			return Inconclusive, nil
		}))
	}
	r, err := New("x", p, &Options{Store: m, Logger: quiet})
	must(s.t, err)
	s.mu.Lock()
	s.lives[r] = m
	s.mu.Unlock()
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	proc := &process{Rollout: r, t: s.t}
	proc.stop = sync.OnceFunc(func() { cancel(); <-done })
	return proc, m
}

// ringing reports whether the Check says that the candidate is bad.
func (s *saga) ringing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alarmed
}

// waits waits until a life has ended, or the rollback. Nobody is exposed once it is stored.
func (s *saga) waits(r *process, m *mortal, seconds int) {
	for range seconds {
		if !m.alive() || r.Status().State == RolledBack {
			return
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if st := inStore(s.t, s.store); st.Phase.Latched() && served(r.Rollout) {
			s.t.Errorf("exposed, and stored is %v", st.Phase)
		}
	}
}

// crashes takes a full rollback through a crash at a point, "" for none, and reports by which points it came before that,
// and whether it died there. Then other lives follow, of which the next one dies at its point again.
func crashes(t *testing.T, where string, again int, byCheck bool) (points []string, died bool) {
	s := &saga{t: t, store: MemStore(), lives: map[*Rollout]*mortal{}, ended: map[string]int{}, fails: map[string]int{"two": 1, "effect 2": 1}, byCheck: byCheck}
	r, m := s.life(0)
	time.Sleep(6 * time.Second)
	synctest.Wait()
	r.is(Running, "everyone 50 %")
	d := r.Decide(r.of(Candidate))
	kinds := []string{"order", "mail", "order", "order"}
	for i, kind := range kinds {
		must(t, d.Journal(t.Context(), kind, fmt.Appendf(nil, "effect %d", i+1)))
	}
	r.Begin(t.Context(), r.of(Candidate)) // and never ends
	m.begins(where)
	if byCheck {
		s.mu.Lock()
		s.alarmed = true
		s.mu.Unlock()
	} else if err := r.Rollback(t.Context(), "stop"); err != nil && m.alive() {
		t.Fatal(err)
	}
	s.waits(r, m, 600)
	r.stop()
	points, died = m.points, !m.alive()
	for at := again; r.Status().State != RolledBack; at = 0 {
		r, m = s.life(at)
		s.waits(r, m, 20)
		if m.alive() && r.Status().State == Running { // the operator's call never returned: they call again
			if err := r.Rollback(t.Context(), "stop"); err != nil && m.alive() {
				t.Fatal(err)
			}
		}
		s.waits(r, m, 1200)
		if m.alive() && r.Status().State != RolledBack {
			t.Fatalf("crash at %q: it is %v, %+v", where, r.Status().State, r.Status().Steps)
		}
		r.stop()
	}
	s.check(fmt.Sprintf("crash at %q, then at %d", where, again))
	return points, died
}

// check is what must hold of the whole saga.
func (s *saga) check(when string) {
	want := []string{"one", "two", "three", "effect 4", "effect 3", "effect 2", "effect 1"}
	var firsts []string
	for _, name := range s.log {
		if !slices.Contains(firsts, name) {
			firsts = append(firsts, name)
		}
	}
	if !slices.Equal(firsts, want) {
		s.t.Errorf("%s: begun in the order %q", when, s.log)
	}
	if !slices.IsSorted(s.fences) {
		s.t.Errorf("%s: the fence fell: %q", when, s.fences)
	}
	if len(s.ended) != len(want) {
		s.t.Errorf("%s: %d keys ended, of %d", when, len(s.ended), len(want))
	}
	for key, n := range s.ended {
		if n > 3 {
			s.t.Errorf("%s: %s ended %d times", when, key, n)
		}
	}
	left, err := s.store.List(s.t.Context(), machine.EffectPrefix("x"))
	if err != nil || len(left) > 0 {
		s.t.Errorf("%s: %d effects are left, %v", when, len(left), err)
	}
	st := inStore(s.t, s.store)
	if st.Phase != machine.RolledBack || maxOf(st.Shares) != 0 {
		s.t.Errorf("%s: stored is %v with %v", when, st.Phase, st.Shares)
	}
}

func maxOf(shares map[string]float64) (most float64) {
	for _, p := range shares {
		most = max(most, p)
	}
	return most
}

// TestCrashAtEveryPoint: a rollback whose process dies at any write to the Store, or at the begin or end of any step or
// undo, ends RolledBack in the next life, with each step and each undo made in order. All points that a run has come by are
// tried, until one died there, and each with a second crash soon after as well.
func TestCrashAtEveryPoint(t *testing.T) {
	for name, byCheck := range map[string]bool{"by an operator": false, "by a gate": true} {
		t.Run(name, func(t *testing.T) {
			var known []string
			crash := func(where string, again int) (died bool) {
				synctest.Test(t, func(t *testing.T) {
					var points []string
					points, died = crashes(t, where, again, byCheck)
					for _, p := range points {
						if !slices.Contains(known, p) {
							known = append(known, p)
						}
					}
				})
				return died
			}
			crash("", 0)
			for i := 0; i < len(known) && !t.Failed(); i++ {
				for _, again := range []int{0, 1 + i%11} {
					if raced && again > 0 && i%4 > 0 {
						continue
					}
					tries, most := 0, 20
					if raced {
						most = 5
					}
					for ; tries < most && !crash(known[i], again); tries++ {
					}
					if tries < most {
						continue
					}
					if t.Logf("%s did not come again", known[i]); !strings.Contains(known[i], "the write of") { // how many are, who is first decides: the verb or Run
						t.Errorf("none died %s", known[i])
					}
				}
			}
			t.Logf("%d points", len(known))
			for _, done := range []string{"one", "two", "three", "effect 1", "effect 2", "effect 3", "effect 4", "the write of state", "the write of head", "the delete of effect 1"} {
				for _, side := range []string{"before", "after"} {
					if p := side + " " + done + " #1"; !slices.Contains(known, p) {
						t.Errorf("no run came by %q, but %q", p, known)
					}
				}
			}
		})
	}
}
