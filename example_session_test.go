package rollout_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"slices"
	"time"

	"github.com/stagedrollout/rollout"
)

// after returns what there is something in once r had an event of the kind.
func after(r *rollout.Rollout, k rollout.EventKind) <-chan struct{} {
	happened := make(chan struct{}, 1)
	r.Subscribe(func(e rollout.Event) {
		if e.Kind == k {
			happened <- struct{}{}
		}
	})
	return happened
}

func ExampleRollout_Begin() {
	r := halves("assistant")
	defer start(r)()
	alice := rollout.Unit{Key: "alice"}
	ctx, conversation := r.Begin(context.Background(), alice)
	fmt.Println("alice begins with the candidate:", r.Enabled(ctx))

	if err := r.Rollback(context.Background(), "eve: it is rude"); err != nil {
		log.Fatal(err)
	}
	fmt.Println("a turn under way keeps it:", r.Enabled(ctx), ctx.Err())

	select { // before each turn
	case <-conversation.Revoked():
		conversation.End(rollout.ErrRolledBack) // which is no failure
		ctx, conversation = r.Begin(context.Background(), alice)
	default:
	}
	fmt.Println("the next turn has it:", r.Enabled(ctx))
	conversation.End(nil)
	// Output:
	// alice begins with the candidate: true
	// a turn under way keeps it: true <nil>
	// the next turn has it: false
}

func ExampleRollout_Adopt() {
	store := rollout.MemStore() // a Store that both processes reach
	process := func() *rollout.Rollout {
		return rollout.Must("assistant", rollout.Policy{
			Salt:   "page",
			Stages: rollout.Percentages(50, 100),
			Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
		}, &rollout.Options{Store: store, Logger: quiet.Logger})
	}
	ctx := context.Background()
	alice := rollout.Unit{Key: "alice"}

	one := process()
	defer start(one)()
	_, conversation := one.Begin(ctx, alice)
	fmt.Println("the first request has the candidate:", conversation.Decision().Enabled())
	cookie := conversation.Release()

	// The next request comes to another process. The unit is not in the pin, so the context brings it.
	two := process()
	_, conversation, err := two.Adopt(rollout.NewContext(ctx, alice), cookie)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("the second as well:", conversation.Decision().Enabled())
	cookie = conversation.Release()

	if err := one.Rollback(ctx, "eve: it is rude"); err != nil {
		log.Fatal(err)
	}
	_, _, err = one.Adopt(rollout.NewContext(ctx, alice), cookie)
	fmt.Println("the third begins anew:", errors.Is(err, rollout.ErrRolledBack))
	// Output:
	// the first request has the candidate: true
	// the second as well: true
	// the third begins anew: true
}

func ExampleRollout_Drain() {
	r := rollout.Must("assistant", rollout.Policy{
		Salt:   "page",
		Stages: rollout.Percentages(50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
		Sessions: rollout.SessionPolicy{OnRevoke: func(_ context.Context, s *rollout.Session) {
			// … switch the live instance to the stable model …
			s.Reconfigured()
		}},
	}, quiet)
	defer start(r)()
	ctx, call := r.Begin(context.Background(), rollout.Unit{Key: "alice"})
	if err := r.Rollback(context.Background(), "eve: it is rude"); err != nil {
		log.Fatal(err)
	}
	cut, err := r.Drain(context.Background()) // returns once nobody is on the candidate any more
	fmt.Println(cut, err, r.Status().Sessions.Candidate)
	fmt.Println("the call goes on:", ctx.Err() == nil, "with the candidate:", call.Decision().Enabled())
	call.End(nil)
	// Output:
	// [] <nil> 0
	// the call goes on: true with the candidate: false
}

// A process that is to end gives its sessions some time; whoever takes over adopts what is left.
func ExampleRollout_Drain_shutdown() {
	r := halves("assistant")
	defer start(r)()
	ctx, conversation := r.Begin(context.Background(), rollout.Unit{Key: "alice"})

	deadline, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	cut, err := r.Drain(deadline)
	fmt.Println(err, context.Cause(ctx))
	fmt.Println("to be adopted elsewhere:", slices.Equal(cut, []string{conversation.Pin()}))
	// Output:
	// context deadline exceeded rollout: the session was drained
	// to be adopted elsewhere: true
}

func ExampleDecision_Journal() {
	void := map[string]bool{} // numbers under which nothing can be ordered
	r := rollout.Must("ordering-v2", rollout.Policy{
		Salt:   "page",
		Stages: rollout.Percentages(50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
		Undo: map[string]func(context.Context, rollout.Effect) error{
			"order": func(_ context.Context, e rollout.Effect) error {
				void[string(e.Payload)] = true // also if it was never made: then it cannot be made any more
				fmt.Println("cancelled", string(e.Payload))
				return nil
			},
		},
	}, quiet)
	defer start(r)()
	undone := after(r, rollout.RollbackDone)
	ctx := context.Background()
	d := r.Decide(rollout.Unit{Key: "alice"})
	order := func(number string) error {
		if err := d.Journal(ctx, "order", []byte(number)); err != nil {
			return err // and order nothing
		}
		if void[number] {
			return rollout.ErrRolledBack
		}
		fmt.Println("ordered", number)
		return nil
	}
	for _, number := range []string{"A1", "A2"} {
		if err := order(number); err != nil {
			log.Fatal(err)
		}
	}
	if err := r.Rollback(ctx, "eve: the prices are wrong"); err != nil {
		log.Fatal(err)
	}
	<-undone
	fmt.Println("no more of it:", errors.Is(order("A3"), rollout.ErrRolledBack))
	// Output:
	// ordered A1
	// ordered A2
	// cancelled A2
	// cancelled A1
	// no more of it: true
}

func ExampleIncident_WasExposed() {
	r := halves("interest-v2")
	defer start(r)()
	// Each customer's account and when interest was last computed for it, as some table has it.
	now := time.Now()
	table := []struct {
		customer string
		computed time.Time
	}{
		{"alice", now},
		{"bob", now},
		{"frank", now},
		{"alice", now.Add(-24 * time.Hour)}, // before the candidate came
	}
	if err := r.Rollback(context.Background(), "eve: interest is rounded up"); err != nil {
		log.Fatal(err)
	}
	in := r.Status().Incident
	for _, row := range table {
		if in.WasExposed(rollout.Unit{Key: row.customer}, row.computed) {
			fmt.Println("compute it again for", row.customer)
		}
	}
	// Output:
	// compute it again for alice
}

// A step is made at least once. What must not be made twice asks for the incident's key, which is the same each time.
func ExampleRollbackStep() {
	paid := map[string]bool{} // kept where the payments are, in the same transaction
	refund := func(_ context.Context, in rollout.Incident) error {
		if paid[in.Key] {
			fmt.Println("paid already:", in.Key)
			return nil
		}
		paid[in.Key] = true
		fmt.Println("paid:", in.Key)
		return errors.New("the bank's answer was lost")
	}
	r := rollout.Must("fees-v2", rollout.Policy{
		Stages:   rollout.Percentages(50, 100),
		Gates:    []rollout.Gate{rollout.Errors.AtMost(5)},
		Rollback: []rollout.RollbackStep{{Name: "refund", Do: refund, Attempts: 1}},
	}, quiet)
	defer start(r)()
	stuck, done := after(r, rollout.RollbackStuck), after(r, rollout.RollbackDone)
	if err := r.Rollback(context.Background(), "eve: the fees are too high"); err != nil {
		log.Fatal(err)
	}
	<-stuck
	fmt.Println(r.Status().State, "at", r.Status().Note)
	if err := r.Rollback(context.Background(), "eve: the bank is back"); err != nil { // tries the steps again
		log.Fatal(err)
	}
	<-done
	fmt.Println(r.Status().State)
	// Output:
	// paid: fees-v2/1/refund
	// stuck at refund: the bank's answer was lost
	// paid already: fees-v2/1/refund
	// rolled back
}

func ExampleRollout_Waive() {
	r := rollout.Must("search-v2", rollout.Policy{
		Stages: rollout.Percentages(50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
		Rollback: []rollout.RollbackStep{
			{Name: "drop the new index", Attempts: 1, Do: func(context.Context, rollout.Incident) error {
				return errors.New("there is no such host")
			}},
			{Name: "warm the old index", Do: func(context.Context, rollout.Incident) error { return nil }},
		},
	}, quiet)
	defer start(r)()
	stuck, done := after(r, rollout.RollbackStuck), after(r, rollout.RollbackDone)
	ctx := context.Background()
	if err := r.Rollback(ctx, "eve: results are missing"); err != nil {
		log.Fatal(err)
	}
	<-stuck
	if err := r.Waive(ctx, "drop the new index", "eve: its host is gone, and the index with it"); err != nil {
		log.Fatal(err)
	}
	<-done
	for _, step := range r.Status().Steps {
		fmt.Printf("%s: done %t, waived %t\n", step.Name, step.Done, step.Waived)
	}
	fmt.Println(r.Status().State)
	// Output:
	// drop the new index: done true, waived true
	// warm the old index: done true, waived false
	// rolled back
}
