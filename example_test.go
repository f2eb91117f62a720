package rollout_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"time"

	"github.com/stagedrollout/rollout"
)

// quiet keeps the examples' logs out of the test's.
var quiet = &rollout.Options{Logger: slog.New(slog.DiscardHandler)}

// start runs r until stop is called, and returns once its first stage is in force.
func start(r *rollout.Rollout) (stop func()) {
	entered := make(chan struct{})
	unsubscribe := r.Subscribe(func(e rollout.Event) {
		if e.Kind == rollout.StageEntered && e.From == rollout.Running {
			close(entered)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	<-entered
	unsubscribe()
	return func() {
		cancel()
		if err := <-done; err != nil {
			log.Fatal(err)
		}
	}
}

// halves is a rollout whose first stage gives half of the units the candidate.
func halves(name string) *rollout.Rollout {
	return rollout.Must(name, rollout.Policy{
		Salt:   "page", // the same units in every example: alice is in, bob is not
		Stages: rollout.Percentages(50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
	}, quiet)
}

// A server with an old and a new checkout: five stages, three gates, and a step that undoes what the new one needed.
func Example_http() {
	restorePrices := func(ctx context.Context, in rollout.Incident) error { return nil }
	checkout := rollout.Must("checkout-v2", rollout.Policy{
		Rings: []rollout.Ring{{Name: "staff"}}, // units whose Groups contain "staff"
		Stages: []rollout.Stage{
			{Ring: "staff", Percent: 100},
			{Percent: 1}, {Percent: 5}, {Percent: 25}, {Percent: 50}, {Percent: 100}, // of everyone
		},
		Bake:     10 * time.Minute,
		Holdback: 5, // kept on the stable version until the end: the control
		Gates: []rollout.Gate{
			rollout.Errors.Within(1),  // at most 1 percentage point above control
			rollout.Errors.AtMost(10), // and never above 10 %
			rollout.Latency.Quantile(0.99).WithinFactor(1.2),
		},
		Rollback: []rollout.RollbackStep{{Name: "restore the price table", Do: restorePrices}},
	}, quiet)

	// New started nothing: the caller owns the goroutine that Run blocks, and ends it. This helper waits for the first
	// stage besides, for the sake of the output; a server need not.
	defer start(checkout)()

	newCheckout := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "new checkout") })
	oldCheckout := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "old checkout") })
	mux := http.NewServeMux()
	mux.Handle("POST /checkout", checkout.Handler(newCheckout, oldCheckout)) // new first, everywhere
	mux.HandleFunc("GET /cart", func(w http.ResponseWriter, r *http.Request) {
		if checkout.Enabled(r.Context()) { // the same answer all through this request
			fmt.Fprint(w, "new cart")
			return
		}
		fmt.Fprint(w, "old cart")
	})
	unitOf := func(r *http.Request) rollout.Unit {
		return rollout.Unit{Key: r.Header.Get("X-User-ID"), Groups: r.Header["X-Group"]}
	}
	server := httptest.NewServer(rollout.Middleware(unitOf)(mux))
	defer server.Close()

	ask := func(method, path, user, group string) {
		req, err := http.NewRequest(method, server.URL+path, nil)
		if err != nil {
			log.Fatal(err)
		}
		req.Header.Set("X-User-ID", user)
		req.Header.Set("X-Group", group)
		res, err := server.Client().Do(req)
		if err != nil {
			log.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s (%s): %s\n", user, group, body)
	}
	ask("POST", "/checkout", "alice", "staff")
	ask("GET", "/cart", "alice", "staff")
	ask("POST", "/checkout", "bob", "customer")
	ask("GET", "/cart", "bob", "customer")
	fmt.Println(checkout.Status().Stage.Name)
	// Output:
	// alice (staff): new checkout
	// alice (staff): new cart
	// bob (customer): old checkout
	// bob (customer): old cart
	// staff 100 %
}

func ExampleNew() {
	_, err := rollout.New("search-v2", rollout.Policy{
		Stages: []rollout.Stage{rollout.Canary(1), {Percent: 20}, {Percent: 100}},
		Bake:   10 * time.Minute,
		Gates:  []rollout.Gate{rollout.Errors.AtMost(2)},
	}, nil)
	fmt.Println(err)

	_, err = rollout.New("Search", rollout.Policy{Stages: rollout.Percentages(0, 100)}, nil)
	fmt.Println(err)
	// Output:
	// <nil>
	// rollout: the name "Search" must match ^[a-z0-9][a-z0-9._-]{0,63}$
	// rollout: Policy.Stages[0].Percent: 0 must be above 0 and at most 100
}

func ExampleMust() {
	// Mostly a package-level variable: a policy is a part of the program, and a wrong one should not start.
	search := rollout.Must("search-v2", rollout.Policy{
		Stages: rollout.Percentages(1, 10, 50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(2)},
	}, nil)
	fmt.Println(search.Name(), search.Status().State)
	// Output:
	// search-v2 pending
}

func ExampleRollout_Decide() {
	r := halves("decide")
	fmt.Println("before anything is loaded:", r.Decide(rollout.Unit{Key: "alice"}).Reason())
	defer start(r)()
	for _, key := range []string{"alice", "bob", "carol", ""} {
		d := r.Decide(rollout.Unit{Key: key})
		fmt.Printf("%q: %v, %v, %v\n", key, d.Enabled(), d.Cohort(), d.Reason())
	}
	// Output:
	// before anything is loaded: not loaded
	// "alice": true, candidate, split
	// "bob": false, control, split
	// "carol": false, control, split
	// "": false, none, no unit
}

func ExampleRollout_Do() {
	r := halves("do")
	defer start(r)()
	work := func(name string, err error) func(context.Context) error {
		return func(context.Context) error {
			fmt.Println(name)
			return err
		}
	}
	for _, key := range []string{"alice", "bob"} {
		// Runs one of the two, and records whether it failed and how long it took.
		err := r.Do(context.Background(), rollout.Unit{Key: key}, work("new work", errors.New("too new")), work("old work", nil))
		fmt.Println(key, err)
	}
	// Output:
	// new work
	// alice too new
	// old work
	// bob <nil>
}

func ExampleDo() {
	r := halves("prices")
	defer start(r)()
	newPrice := func(context.Context) (int, error) { return 41, nil }
	oldPrice := func(context.Context) (int, error) { return 42, nil }
	for _, key := range []string{"alice", "bob"} {
		price, err := rollout.Do(context.Background(), r, rollout.Unit{Key: key}, newPrice, oldPrice)
		fmt.Println(key, price, err)
	}
	// Output:
	// alice 41 <nil>
	// bob 42 <nil>
}

func ExampleMiddleware() {
	r := halves("page")
	defer start(r)()
	page := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if r.Enabled(req.Context()) {
			http.Error(w, "new page, and it fails", http.StatusInternalServerError) // recorded as an error
			return
		}
		fmt.Fprintln(w, "old page")
	})
	unitOf := func(req *http.Request) rollout.Unit { return rollout.Unit{Key: req.URL.Query().Get("user")} }
	h := rollout.Middleware(unitOf)(page)
	for _, user := range []string{"alice", "bob"} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/?user="+user, nil))
		fmt.Print(user, ": ", w.Code, " ", w.Body)
	}
	// Output:
	// alice: 500 new page, and it fails
	// bob: 200 old page
}

func ExampleRollout_Handler() {
	r := halves("handler")
	defer start(r)()
	says := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, text) })
	}
	h := rollout.Middleware(func(req *http.Request) rollout.Unit {
		return rollout.Unit{Key: req.Header.Get("X-User-ID")}
	})(r.Handler(says("new"), says("old")))
	for _, user := range []string{"alice", "bob", ""} {
		req := httptest.NewRequest("GET", "/", nil)
		req.Header.Set("X-User-ID", user)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		fmt.Printf("%q: %s", user, w.Body)
	}
	fmt.Println("without a unit:", r.Status().NoUnit)
	// Output:
	// "alice": new
	// "bob": old
	// "": old
	// without a unit: 1
}

func ExampleDecision_Record() {
	refunds := rollout.NewRate("refunds")
	r := rollout.Must("pricing", rollout.Policy{
		Stages: rollout.Percentages(50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5), refunds.Within(2)},
	}, quiet)
	defer start(r)()
	d := r.Decide(rollout.Unit{Key: "alice"})
	// … the order is made, and the customer has until tomorrow to think about it …
	d.Record(refunds.Observe(false), rollout.Errors.Observe(false))

	d.Record(rollout.NewRate("unheard-of").Observe(true)) // no gate and not Policy.Metrics names it
	fmt.Println(r.Status().Unknown, "observation dropped")
	// Output:
	// 1 observation dropped
}

func ExampleRollout_ParseDecision() {
	r := halves("orders")
	defer start(r)()
	token, err := r.Decide(rollout.Unit{Key: "alice"}).MarshalText()
	if err != nil {
		log.Fatal(err)
	}
	// … the token travels with the job, and comes back with its outcome …
	d, err := r.ParseDecision(token)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(d.Enabled(), d.Cohort(), d.Stage())
	d.Record(rollout.Errors.Observe(false)) // into the evidence of the stage in which it was decided

	_, err = r.ParseDecision([]byte("d1:orders"))
	fmt.Println(err)
	// Output:
	// true candidate everyone 50 %
	// rollout: not a decision's token: "d1:orders"
}

func ExampleRollout_Run() {
	r := rollout.Must("export", rollout.Policy{
		Stages: rollout.Percentages(10, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
	}, quiet)
	entered := make(chan struct{})
	r.Subscribe(func(e rollout.Event) { // one event after the other, from a goroutine of Run
		fmt.Printf("%v: %v to %v\n", e.Kind, e.From, e.To)
		if e.Kind == rollout.StageEntered {
			close(entered)
		}
	})

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }() // judges, promotes and rolls back until ctx ends
	<-entered
	cancel()
	fmt.Println(<-done) // the last evidence is stored
	// Output:
	// started: pending to running
	// stage entered: running to running
	// <nil>
}

func ExampleRollout_Rollback() {
	undone := ""
	r := rollout.Must("index-v2", rollout.Policy{
		Salt:   "page",
		Stages: rollout.Percentages(50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
		Rollback: []rollout.RollbackStep{
			{Name: "stop the new index", Do: func(_ context.Context, in rollout.Incident) error {
				undone = in.Key // the same at every attempt
				return nil
			}},
		},
	}, quiet)
	defer start(r)()
	finished := make(chan struct{})
	r.Subscribe(func(e rollout.Event) {
		if e.Kind == rollout.RollbackDone {
			close(finished)
		}
	})
	alice := rollout.Unit{Key: "alice"}
	fmt.Println(r.Decide(alice).Enabled())
	if err := r.Rollback(context.Background(), "eve: results are missing"); err != nil {
		log.Fatal(err)
	}
	fmt.Println(r.Decide(alice).Enabled(), r.Decide(alice).Reason()) // at once, before the steps
	<-finished
	fmt.Println(r.Status().State, "because", r.Status().Incident.Note)
	fmt.Println("undone:", undone)
	// Output:
	// true
	// false rolled back
	// rolled back because eve: results are missing
	// undone: index-v2/1/stop the new index
}

func ExamplePolicy_Validate() {
	p := rollout.Policy{
		Stages: []rollout.Stage{
			{Percent: 25},
			{Ring: "beta", Percent: 5},
			{Percent: 10},
		},
		Holdback: 100,
		Gates:    []rollout.Gate{rollout.Errors.Within(0), rollout.Latency.Quantile(99).WithinFactor(1.2)},
	}
	fmt.Println(p.Validate())
	// Output:
	// rollout: Policy.Holdback: 100 must be at least 0 and below 100
	// rollout: Policy.Gates[0] errors.Within(0): a margin of 0 points must be above 0 and below 100 (NoWorse allows no margin)
	// rollout: Policy.Gates[1] latency.Quantile(99).WithinFactor(1.2): a quantile of 99 must be above 0 and below 1
	// rollout: Policy.Stages[1].Ring: there is no ring "beta"
	// rollout: Policy.Stages[2].Percent: 10 % is not more than the 25 % that an earlier stage of "everyone" reached; shares only grow
	// rollout: Policy.Stages: the last is 10 % of "everyone"; it must be 100 % of everyone
}

func ExamplePercentages() {
	for _, s := range rollout.Percentages(0.1, 5, 100) {
		fmt.Println(s.Percent)
	}
	// Output:
	// 0.1 %
	// 5 %
	// 100 %
}

func ExampleRamp() {
	p := rollout.Policy{
		Stages: []rollout.Stage{
			rollout.Canary(1),
			rollout.Ramp(2*time.Hour, 50), // from 1 % to 50 % in 16 steps
			{Percent: 100},
		},
		Bake:  10 * time.Minute,
		Gates: []rollout.Gate{rollout.Errors.AtMost(2)},
	}
	fmt.Println(p.Validate())
	fmt.Println(p.Stages[1].Percent, "over", p.Stages[1].Over)
	// Output:
	// <nil>
	// 50 % over 2h0m0s
}

func ExampleCanary() {
	s := rollout.Canary(0.5)
	fmt.Println(s.Name, s.Percent)
	// Output:
	// canary 0.5 %
}

func ExampleBucket() {
	b := rollout.Bucket("checkout-v2", "alice")
	fmt.Println(b)
	fmt.Printf("%.2f %% of all units come before alice\n", float64(b)/(1<<64)*100)
	// Output:
	// 7581302621574993810
	// 41.10 % of all units come before alice
}

func ExampleRate() {
	errs := rollout.NewRate("checkout-errors")
	for _, g := range []rollout.Gate{
		errs.Within(0.5),       // at most half a percentage point above the control
		errs.WithinFactor(1.5), // at most one and a half times the control
		errs.AtMost(2),         // at most 2 %, whatever the control is
		errs.NoWorse(),         // a guard: rolls back on any proven worsening
		errs.Never(),           // a guard: once is too often
	} {
		fmt.Println(g.Name())
	}
	// Output:
	// checkout-errors.Within(0.5)
	// checkout-errors.WithinFactor(1.5)
	// checkout-errors.AtMost(2)
	// checkout-errors.NoWorse
	// checkout-errors.Never
}

func ExampleTiming() {
	render := rollout.NewTiming("render")
	fmt.Println(render.Quantile(0.5).WithinFactor(1.1).Name())
	fmt.Println(render.Quantile(0.99).AtMost(300 * time.Millisecond).Name())
	fmt.Println(render.NoWorse().OnFail(rollout.Hold).Name())
	// Output:
	// render.Quantile(0.5).WithinFactor(1.1)
	// render.Quantile(0.99).AtMost(300ms)
	// render.NoWorse
}

func ExampleNewScore() {
	quality := rollout.NewScore("answer-quality", 0, 10) // 10 is best
	for _, g := range []rollout.Gate{
		quality.Within(0.5), // the mean is at most half a point below the control's
		quality.AtLeast(7),  // the mean is at least 7, whatever the control's is
		quality.NoWorse(),   // a guard: rolls back on any proven worsening
	} {
		fmt.Println(g.Name())
	}
	// Output:
	// answer-quality.Within(0.5)
	// answer-quality.AtLeast(7)
	// answer-quality.NoWorse
}

func ExampleNewMix() {
	tools := rollout.NewMix("tools", "search", "calculator", "none") // anything else counts as "other"
	for _, g := range []rollout.Gate{
		tools.Within(0.05), // at most five points of all calls moved from one tool to another
		tools.NoChange(),   // a guard: rolls back on any proven change
	} {
		fmt.Println(g.Name())
	}
	r := rollout.Must("assistant", rollout.Policy{
		Stages:  rollout.Percentages(50, 100),
		Gates:   []rollout.Gate{rollout.Errors.AtMost(5)},
		Metrics: []rollout.Metric{tools}, // watched without a gate
	}, quiet)
	defer start(r)()
	r.Decide(rollout.Unit{Key: "alice"}).Record(tools.Observe("calculator"), rollout.Errors.Observe(false))
	// Output:
	// tools.Within(0.05)
	// tools.NoChange
}

func ExampleObservation_Because() {
	leaks := rollout.NewRate("leaks")
	r := rollout.Must("assistant", rollout.Policy{
		Stages: rollout.Percentages(50, 100),
		Gates:  []rollout.Gate{rollout.Errors.AtMost(5), leaks.Never()},
	}, quiet)
	defer start(r)()
	told := make(chan rollout.Incident, 1)
	r.Subscribe(func(e rollout.Event) {
		if e.Kind == rollout.RollbackBegan {
			told <- *e.Incident
		}
	})
	for _, user := range []string{"alice", "bob", "carol", "dave"} {
		if d := r.Decide(rollout.Unit{Key: user}); d.Enabled() {
			d.Record(leaks.Observe(true).Because("the answer names another customer"))
			break
		}
	}
	in := <-told
	fmt.Println(in.Gate, in.Rationales)
	// Output:
	// leaks.Never [the answer names another customer]
}

func ExampleCheck() {
	provider := rollout.Check("payment-provider", func(ctx context.Context) (rollout.Verdict, error) {
		return rollout.Unhealthy, errors.New("it refuses half of our payments")
	})
	r := rollout.Must("payments-v2", rollout.Policy{
		Stages: rollout.Percentages(5, 100),
		Bake:   time.Minute,
		Gates:  []rollout.Gate{provider},
	}, quiet)
	finished := make(chan struct{})
	r.Subscribe(func(e rollout.Event) {
		if e.Kind == rollout.RollbackDone {
			fmt.Printf("%s: %s: %s\n", e.To, e.Incident.Gate, e.Incident.Note)
			close(finished)
		}
	})
	defer start(r)()
	<-finished
	// Output:
	// rolled back: payment-provider: it refuses half of our payments
}

func ExampleDirStore() {
	dir, err := os.MkdirTemp("", "rollout")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	// process stands for a process of this machine, one after the other or several at a time.
	process := func() *rollout.Rollout {
		store, err := rollout.DirStore(dir)
		if err != nil {
			log.Fatal(err)
		}
		return rollout.Must("mail-v2", rollout.Policy{
			Stages: rollout.Percentages(50, 100),
			Gates:  []rollout.Gate{rollout.Errors.AtMost(5)},
		}, &rollout.Options{Store: store, Logger: quiet.Logger})
	}
	ctx := context.Background()
	if err := process().Rollback(ctx, "eve: mail arrives twice"); err != nil {
		log.Fatal(err)
	}
	restarted := process()
	if err := restarted.Ready(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(restarted.Status().State, "because", restarted.Status().Incident.Note)
	// Output:
	// rolled back because eve: mail arrives twice
}

func ExampleNewContext() {
	r := halves("job")
	defer start(r)()
	ctx := rollout.NewContext(context.Background(), rollout.Unit{Key: "alice"})
	fmt.Println(r.Enabled(ctx))
	if err := r.Rollback(ctx, "eve"); err != nil {
		log.Fatal(err)
	}
	fmt.Println(r.Enabled(ctx)) // a job keeps its answer from start to end
	fmt.Println(r.Enabled(rollout.NewContext(context.Background(), rollout.Unit{Key: "alice"})))
	// Output:
	// true
	// true
	// false
}

// A load balancer's counters are judged instead of what this process records.
func ExampleSourceFunc() {
	balancer := rollout.SourceFunc(func(ctx context.Context, add func(metric, ring string, candidate bool, values []float64)) error {
		// Ask the balancer here, with ctx. Values are cumulative: requests, and failed ones among them.
		add("errors", "", false, []float64{28120, 282})
		add("errors", "", true, []float64{1480, 31})
		return nil
	})
	r, err := rollout.New("checkout-v2", rollout.Policy{
		Stages: rollout.Percentages(5, 50, 100), Holdback: 5, Bake: time.Minute,
		Gates: []rollout.Gate{rollout.Errors.Within(1), rollout.Errors.AtMost(10)},
	}, &rollout.Options{Sources: map[string]rollout.Source{"errors": balancer}})
	fmt.Println(r.Name(), err)
	// Output: checkout-v2 <nil>
}

// A batch job writes its counters into a file.
func ExampleFileSource() {
	totals := rollout.FileSource("totals.jsonl") // {"metric": "errors", "cohort": "candidate", "values": [1480, 31]}
	_, err := rollout.New("nightly", rollout.Policy{
		Stages: rollout.Percentages(50, 100), Holdback: 10, Bake: time.Hour,
		Gates: []rollout.Gate{rollout.Errors.Within(1), rollout.Errors.AtMost(10)},
	}, &rollout.Options{Sources: map[string]rollout.Source{"latency": totals, "errors": totals}})
	fmt.Println(err)
	// Output: <nil>
}
