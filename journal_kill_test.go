package rollout

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stagedrollout/rollout/internal/machine"
)

var (
	killEffects = flag.Int("kill.effects", 400, "effects a seed of TestJournalKill")
	killSeeds   = flag.Int("kill.seeds", 2, "seeds of TestJournalKill")
	killDir     = flag.String("kill.dir", "", "where TestJournalKill has its stores; default: the system's temporary directory")
)

const journalChildEnv = "ROLLOUT_TEST_JOURNAL_CHILD"

// childPolicy has one effect kind, whose undoing appends the payload to a file.
func childPolicy(undone *os.File) Policy {
	p := talks(SessionPolicy{})
	p.Gates = []Gate{Errors.AtMost(50)}
	p.Undo = map[string]func(context.Context, Effect) error{"line": func(_ context.Context, e Effect) error {
		_, err := fmt.Fprintf(undone, "%s\n", e.Payload)
		return err
	}}
	return p
}

func childRollout(t *testing.T, dir string) *Rollout {
	t.Helper()
	store, err := DirStore(filepath.Join(dir, "store"))
	must(t, err)
	undone, err := os.OpenFile(filepath.Join(dir, "undone"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	must(t, err)
	t.Cleanup(func() { undone.Close() })
	r, err := New("x", childPolicy(undone), &Options{Store: store, Logger: quiet, Interval: 100 * time.Millisecond})
	must(t, err)
	r.quiet = 300 * time.Millisecond
	return r
}

// TestJournalChild is a process that TestJournalKill starts and kills.
func TestJournalChild(t *testing.T) {
	mode, dir, _ := strings.Cut(os.Getenv(journalChildEnv), "|")
	if mode == "" {
		t.Skip("not a child")
	}
	r := childRollout(t, dir)
	must(t, r.Ready(t.Context()))
	if mode == "journal" {
		tries, err := os.OpenFile(filepath.Join(dir, "tries"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		must(t, err)
		acked, err := os.OpenFile(filepath.Join(dir, "acked"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		must(t, err)
		var d Decision
		for i := 0; !d.Enabled(); i++ {
			d = r.Decide(Unit{Key: fmt.Sprint(i)})
		}
		for i := 0; ; i++ {
			line := fmt.Sprintf("%s %d", r.me(), i)
			fmt.Fprintln(tries, line)
			must(t, d.Journal(t.Context(), "line", []byte(line)))
			fmt.Fprintln(acked, line)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	r.Subscribe(func(e Event) {
		if e.Kind == RollbackDone {
			stop()
		}
	})
	if r.Status().State != RolledBack {
		must(t, r.Run(ctx))
	}
}

func journalChild(t *testing.T, mode, dir string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestJournalChild$")
	cmd.Env = append(os.Environ(), journalChildEnv+"="+mode+"|"+dir)
	cmd.Stderr = os.Stderr
	must(t, cmd.Start())
	return cmd
}

// lines are those of a file; none if it is not there.
func lines(t *testing.T, path string) []string {
	t.Helper()
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	must(t, err)
	defer f.Close()
	var all []string
	for s := bufio.NewScanner(f); s.Scan(); {
		all = append(all, s.Text())
	}
	return all
}

// TestJournalKill: processes are killed while they journal and while they undo. Every effect whose Journal returned is
// undone, the newest first, and none that nobody journalled.
//
//	go test . -run TestJournalKill -kill.effects 100000 -kill.seeds 20 -kill.dir /dev/shm -timeout 2h
func TestJournalKill(t *testing.T) {
	if !dirLockSupported {
		t.Skip("there is no DirStore here")
	}
	for seed := range *killSeeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { journalKill(t, uint64(seed)) })
	}
}

func journalKill(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 4))
	dir, err := os.MkdirTemp(*killDir, "rollout-journal-")
	must(t, err)
	defer os.RemoveAll(dir)
	r := childRollout(t, dir)
	must(t, r.startForTest(t.Context()))

	// grows waits for a file to have a number of lines, and reports false if the child ended first.
	grows := func(child *exec.Cmd, name string, size int64) bool {
		ended := make(chan error, 1)
		go func() { ended <- child.Wait() }()
		for {
			info, err := os.Stat(filepath.Join(dir, name))
			if err == nil && info.Size() >= size {
				must(t, child.Process.Kill())
				<-ended
				return true
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Fatalf("the child: %v", err)
				}
				return false
			case <-time.After(time.Duration(rng.IntN(3e6))): // anywhere in what it does
			}
		}
	}
	size := func(name string) int64 {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return 0
		}
		return info.Size()
	}
	const line = 30 // bytes, about
	children := 0
	for len(lines(t, filepath.Join(dir, "acked"))) < *killEffects {
		more := min(*killEffects-len(lines(t, filepath.Join(dir, "acked"))), 1+rng.IntN(*killEffects/2))
		grows(journalChild(t, "journal", dir), "acked", size("acked")+int64(more*line))
		children++
	}
	must(t, r.Rollback(t.Context(), "stop"))
	kills := 0
	for {
		until := int64(1) << 60
		if kills < 4 {
			until = size("undone") + int64(line*rng.IntN(*killEffects/3))
		}
		if !grows(journalChild(t, "undo", dir), "undone", until) {
			break
		}
		kills++
	}
	if st := inStore(t, r.store); st.Phase != machine.RolledBack {
		t.Fatalf("it is %v, %+v", st.Phase, st.Steps)
	}
	left, err := r.store.List(t.Context(), machine.EffectPrefix("x"))
	if err != nil || len(left) > 0 {
		t.Errorf("%d effects are left, %v", len(left), err)
	}

	tries, acked, undone := lines(t, filepath.Join(dir, "tries")), lines(t, filepath.Join(dir, "acked")), lines(t, filepath.Join(dir, "undone"))
	first := map[string]bool{}
	var order []string
	for _, l := range undone {
		if !first[l] {
			first[l] = true
			order = append(order, l)
		}
	}
	for _, l := range acked {
		if !first[l] {
			t.Errorf("%q was journalled and not undone", l)
		}
	}
	slices.Reverse(order)
	at := 0
	for _, l := range order { // a subsequence of what was tried
		for at < len(tries) && tries[at] != l {
			at++
		}
		if at == len(tries) {
			t.Fatalf("%q was undone out of order, or never journalled", l)
		}
	}
	t.Logf("%d effects of %d processes, %d undone again after %d kills", len(acked), children, len(undone)-len(order), kills)
	if len(undone)-len(order) > kills {
		t.Errorf("%d effects were undone more than once, of %d kills", len(undone)-len(order), kills)
	}
}
