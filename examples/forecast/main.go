// Forecast says how long the rollout of the README's checkout would take at 2, 20, 200 and 2,000 requests a second, and
// how soon it would find a candidate that is three points worse. Nothing is started and nobody is exposed.
//
//	go run ./examples/forecast
package main

import (
	"fmt"
	"log"
	"time"

	"github.com/stagedrollout/rollout"
)

var policy = rollout.Policy{
	Rings: []rollout.Ring{{Name: "staff"}},
	Stages: []rollout.Stage{
		{Ring: "staff", Percent: 100},
		{Percent: 1}, {Percent: 5}, {Percent: 25}, {Percent: 50}, {Percent: 100},
	},
	Bake:     10 * time.Minute,
	Holdback: 5,
	Gates: []rollout.Gate{
		rollout.Errors.Within(1),
		rollout.Errors.AtMost(10),
		rollout.Latency.Quantile(0.99).WithinFactor(1.2),
	},
}

func main() {
	for _, rate := range []float64{2, 20, 200, 2000} {
		f, err := policy.Forecast(rollout.Traffic{
			PerSecond: rate,
			Units:     int(1000 * rate),
			Rings:     map[string]rollout.Percent{"staff": 2},
			Rates:     map[string]rollout.Percent{"errors": 1},
			Timings:   map[string]rollout.Durations{"latency": {Median: 50 * time.Millisecond, P99: 160 * time.Millisecond}},
			Worse:     map[string]rollout.Worsening{"errors": {Points: 3}},
		})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(f)
	}
}
