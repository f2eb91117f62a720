package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stagedrollout/rollout/internal/machine"
)

// TestUndoIsValidated: a kind of effects has a name that can be stored and a function; what has not is refused,
// and named, in the same order each time.
func TestUndoIsValidated(t *testing.T) {
	undo := func(context.Context, Effect) error { return nil }
	long := strings.Repeat("x", machine.MaxKind)
	policy := func(all map[string]func(context.Context, Effect) error) Policy {
		p := validPolicy()
		p.Undo = all
		return p
	}
	bad := func(kind string) string {
		return fmt.Sprintf("rollout: Policy.Undo: the kind %.200q must be valid UTF-8, not empty and at most 128 bytes", kind)
	}
	for name, c := range map[string]struct {
		kind string
		f    func(context.Context, Effect) error
		want []string
	}{
		"no function":         {"order", nil, []string{`rollout: Policy.Undo["order"]: nil`}},
		"no name":             {"", undo, []string{bad("")}},
		"a name too long":     {long + "x", undo, []string{bad(long + "x")}},
		"a name of no text":   {"\xff", undo, []string{bad("\xff")}},
		"nothing but the key": {"", nil, []string{`rollout: Policy.Undo[""]: nil`, bad("")}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := refusedBy(t, policy(map[string]func(context.Context, Effect) error{c.kind: c.f, "mail": undo})); !slices.Equal(got, c.want) {
				t.Errorf("refused by %q, not %q", got, c.want)
			}
		})
	}
	several := map[string]func(context.Context, Effect) error{}
	var want []string
	for i := range 9 {
		several[fmt.Sprint("kind ", i)] = nil
		want = append(want, fmt.Sprintf(`rollout: Policy.Undo["kind %d"]: nil`, i))
	}
	if got := refusedBy(t, policy(several)); !slices.Equal(got, want) {
		t.Errorf("refused by %q, not %q", got, want)
	}
	must(t, policy(map[string]func(context.Context, Effect) error{long: undo, "mail": undo, strings.Repeat("ö", 64): undo}).Validate())
}

// TestJournalUnderPolicyWithoutUndo: while another process of the same Version has a policy in force that undoes nothing, an
// effect is refused and not kept: nobody would undo it. Once the policy with Undo is in force it is taken.
func TestJournalUnderPolicyWithoutUndo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &ward{store: &faulty{Store: MemStore()}}
		without := w.policy()
		without.Undo = nil
		old := start(t, "x", without, Options{Store: w.store})
		w.process = &process{Rollout: lone(t, w.policy(), Options{Store: w.store}), t: t} // it serves, and has judged nothing yet
		must(t, w.Ready(t.Context()))
		refused := func() {
			t.Helper()
			d := w.Decide(w.of(Candidate))
			err := d.Journal(t.Context(), "order", []byte("order refused"))
			if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "the policy in force undoes nothing") {
				t.Errorf("the error is %v", err)
			}
			if w.left() != 0 {
				t.Errorf("%d effects are stored", w.left())
			}
		}
		refused()
		if err := old.Decide(old.of(Candidate)).Journal(t.Context(), "order", nil); err == nil || !strings.Contains(err.Error(), `Policy.Undo has no function for the kind "order"`) {
			t.Errorf("without Undo: %v", err)
		}

		w.process = runs(t, w.Rollout)
		minute()
		w.journal(w.Decide(w.of(Candidate)), "order kept")
		must(t, old.Rollback(t.Context(), "stop"))
		minute()
		w.is(RolledBack, "")
		w.wants("order kept")

		must(t, old.Restart(t.Context(), "anew")) // by a policy that undoes nothing
		minute()
		w.is(Running, "")
		refused()
	})
}
