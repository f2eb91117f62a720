package rollout

import (
	"math"
	"time"
)

// Never is the time of what does not happen.
const Never time.Duration = math.MaxInt64

// Outlook is how the forecast of a stage looks. The zero value is OutlookOpen.
type Outlook uint8

// The outlooks of a stage.
const (
	OutlookOpen     Outlook = iota // it waits for what no forecast knows: an approval, or the answer of a Check
	OutlookPasses                  // nine good releases of ten leave it before its deadline
	OutlookMayStall                // half of the good releases leave it before its deadline, but not nine of ten
	OutlookStalls                  // less than half of them do
)

var outlookNames = []string{"open", "passes", "may stall", "stalls"}

func (o Outlook) String() string                { return nameIn(outlookNames, int(o)) }
func (o Outlook) MarshalText() ([]byte, error)  { return []byte(o.String()), nil }
func (o *Outlook) UnmarshalText(b []byte) error { return parseIn(outlookNames, b, (*uint8)(o)) }

// Span is how long something takes: at most P50 in half of all cases, and at most P90 in nine of ten; [Never] if it does
// not happen.
type Span struct {
	P50 time.Duration `json:"p50"`
	P90 time.Duration `json:"p90"`
}

// Amount is how many there are at the times of a [Span]; 0 where the time is [Never].
type Amount struct {
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
}

// Catch is how a regression is found, whatever the gate's action then is.
type Catch struct {
	Gate     string `json:"gate,omitempty"`  // that finds it, most likely; empty: none does
	Stage    string `json:"stage,omitempty"` // in which that is
	Time     Span   `json:"time"`            // from when the regression began
	Requests Amount `json:"requests"`        // of the candidate until then
	// Hurt is how many units have met a bad outcome until then that they would not have met on the stable version. In a
	// regression of a timing or a score everybody is hurt.
	Hurt Amount `json:"hurt"`
}

// GateForecast is what a gate needs in a stage.
type GateForecast struct {
	Name   string `json:"name"`
	Proves bool   `json:"proves"` // the stage waits for its proof
	// Proof is how long that takes, and Requests how many of the candidate; zero unless Proves.
	Proof    Span   `json:"proof"`
	Requests Amount `json:"requests"`
	Catch    Span   `json:"catch"` // how long it takes to find the regression
}

// StageForecast is what is to be expected of one stage.
type StageForecast struct {
	Name      string  `json:"name"`
	Ring      string  `json:"ring"`
	Percent   Percent `json:"percent"`
	Outlook   Outlook `json:"outlook"`
	PerSecond float64 `json:"perSecond"` // requests of the candidate, in every ring
	Units     float64 `json:"units"`     // that have the candidate; 0 where Traffic.Units is 0
	// Bake is how long Over and Bake take, which count only while outcomes arrive.
	Bake time.Duration `json:"bake"`
	// Proof is how long it takes until every gate that can prove has; zero where none is asked for.
	Proof Span `json:"proof"`
	// Stay is how long a good release stays, were there no deadline. What it waits for an approval is not in it.
	Stay     Span           `json:"stay"`
	Deadline time.Duration  `json:"deadline"`
	Approval bool           `json:"approval"` // it waits for one besides
	Gates    []GateForecast `json:"gates"`
	// Catch is of a regression that begins when the stage does, if the stage lasted.
	Catch  Catch    `json:"catch"`
	Advice []string `json:"advice,omitempty"` // what is wrong, or slow, and what would do
}

// Forecast says how long a policy will take and what it will find, before anybody is exposed.
type Forecast struct {
	PerSecond float64         `json:"perSecond"` // requests, as given
	Stages    []StageForecast `json:"stages"`
	// Duration is how long a good release takes from start to completion: the sum of its stages, so that P90 is on the safe
	// side. Never, if a stage stalls. What it waits for approvals is not in it.
	Duration Span `json:"duration"`
	// Catch is of a regression that is there from the first stage on.
	Catch    Catch    `json:"catch"`
	Problems []string `json:"problems,omitempty"` // stages that may stall or stall, and what has no forecast
}

// Forecast computes how long each stage will take under the traffic, how soon a regression is found, and which stage can
// not prove its claims in time. It is computed by formulas, not simulated; docs/statistics.md says how they compare with
// simulations (within 20 % for rates, 30 % for timings and scores). It starts nothing. The error names every problem of
// the policy or else of the traffic.
//
// It assumes that units are independent of each other, that the candidate does what it is expected to do from the first
// request on, and that traffic does not change.
func (p Policy) Forecast(t Traffic) (Forecast, error) { return p.forecast(t, p.rules()) }
