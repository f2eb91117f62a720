package rollout_test

import (
	"fmt"
	"log"
	"time"

	"github.com/stagedrollout/rollout"
)

// How long a policy takes at 2 requests a second, asked before anybody is exposed: the proof at 5 % will hardly be
// given before the deadline.
func ExamplePolicy_Forecast() {
	policy := rollout.Policy{
		Stages:    rollout.Percentages(5, 50, 100),
		Bake:      10 * time.Minute,
		Deadline:  4 * time.Hour,
		Holdback:  5,
		ProveFrom: 5,
		Gates:     []rollout.Gate{rollout.Errors.Within(1)},
	}
	f, err := policy.Forecast(rollout.Traffic{
		PerSecond: 2,
		Rates:     map[string]rollout.Percent{"errors": 1},             // the stable version
		Worse:     map[string]rollout.Worsening{"errors": {Points: 4}}, // a bad candidate: 5 %
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, s := range f.Stages {
		fmt.Printf("%s: %s\n", s.Name, s.Outlook)
		for _, a := range s.Advice {
			fmt.Println(" ", a)
		}
	}
	// Output:
	// everyone 5 %: stalls
	//   stage everyone 5 %: errors.Within(1) needs about 1,600 candidate samples, 4.46h at this traffic (nine of ten: 7.71h); Within(2) would do in 75.3m; or ProveFrom(50)
	// everyone 50 %: passes
	//   stage everyone 50 %: errors.Within(1) needs about 1,900 candidate samples, 31.3m at this traffic (nine of ten: 60.7m); Within(2) would do in 12.4m
	// everyone 100 %: passes
}
