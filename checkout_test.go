package rollout

import "time"

// checkout is the policy of the package's first example.
func checkout() Policy {
	return Policy{
		Rings: []Ring{{Name: "staff"}},
		Stages: []Stage{
			{Ring: "staff", Percent: 100},
			{Percent: 1}, {Percent: 5}, {Percent: 25}, {Percent: 50}, {Percent: 100},
		},
		Bake:     10 * time.Minute,
		Holdback: 5,
		Gates: []Gate{
			Errors.Within(1),
			Errors.AtMost(10),
			Latency.Quantile(0.99).WithinFactor(1.2),
		},
	}
}

// Checkout is the same for the tests of package rollout_test.
var Checkout = checkout
