package rollout

import (
	"encoding"
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

// enumerator is any of the package's enumerations.
type enumerator interface {
	~uint8
	String() string
	encoding.TextMarshaler
}

// testEnum checks all 256 values of an enumeration: the names are these, no two are the same, a name is read as what it
// was written from, and whatever has no name is shown as its number and read by no text.
func testEnum[E enumerator, P interface {
	*E
	encoding.TextUnmarshaler
}](t *testing.T, names map[E]string) {
	t.Helper()
	t.Run(reflect.TypeFor[E]().Name(), func(t *testing.T) {
		read := func(text string) (E, error) {
			e := E(77)
			err := P(&e).UnmarshalText([]byte(text))
			return e, err
		}
		seen := map[string]bool{}
		for i := range 256 {
			e := E(i)
			name, named := names[e]
			if !named {
				name = strconv.Itoa(i)
			}
			if e.String() != name || seen[name] {
				t.Errorf("%d is called %q, not %q", i, e, name)
			}
			seen[name] = true
			if text, err := e.MarshalText(); err != nil || string(text) != name {
				t.Errorf("%d is written as %q, %v, not %q", i, text, err, name)
			}
			got, err := read(name)
			if named && (got != e || err != nil) {
				t.Errorf("%q is read as %v, %v", name, got, err)
			}
			if !named && (got != 77 || err == nil) {
				t.Errorf("%q has no name and is read as %v, %v", name, got, err)
			}
			if named {
				var in, out struct{ E E }
				in.E = e
				doc, err := json.Marshal(in)
				if err != nil || string(doc) != `{"E":"`+name+`"}` {
					t.Errorf("%s, %v", doc, err)
				}
				if err := json.Unmarshal(doc, &out); err != nil || out != in {
					t.Errorf("%s became %v, %v", doc, out, err)
				}
			}
		}
		for _, text := range []string{"", " ", "nonsense", "\x00", strings.ToUpper(names[1]), names[1] + " ", names[1][:2]} {
			if got, err := read(text); got != 77 || err == nil || !strings.Contains(err.Error(), strconv.Quote(text)) {
				t.Errorf("%q is read as %v, %v", text, got, err)
			}
		}
	})
}

func TestEnumerationsAreTexts(t *testing.T) {
	testEnum(t, map[Verdict]string{Inconclusive: "inconclusive", Healthy: "healthy", Unhealthy: "unhealthy"})
	testEnum(t, map[Action]string{
		Default: "default", Rollback: "rollback", RollbackRing: "rollback ring", StepBack: "step back", Hold: "hold", Report: "report",
	})
	testEnum(t, map[State]string{
		Pending: "pending", Running: "running", Held: "held", RollingBack: "rolling back", RolledBack: "rolled back", Stuck: "stuck", Completed: "completed",
	})
	testEnum(t, map[Cohort]string{None: "none", Control: "control", Candidate: "candidate"})
	testEnum(t, map[Reason]string{
		ReasonUnset: "unset", ReasonNotLoaded: "not loaded", ReasonOff: "off", ReasonSplit: "split", ReasonFull: "full", ReasonHoldback: "holdback",
		ReasonNoUnit: "no unit", ReasonRolledBack: "rolled back", ReasonCompleted: "completed", ReasonVersion: "version", ReasonForced: "forced",
	})
	testEnum(t, map[Revocation]string{FinishTurn: "finish turn", UntilEnd: "until end", AtOnce: "at once"})
	testEnum(t, map[EventKind]string{
		0: "unset", Started: "started", StageEntered: "stage entered", Climbed: "climbed", HoldBegan: "held", Resumed: "resumed", Approved: "approved",
		PercentSet: "percent set", SteppedBack: "stepped back", RingRolledBack: "ring rolled back", RollbackBegan: "rollback began", StepFailed: "step failed",
		StepDone: "step done", RollbackStuck: "rollback stuck", RollbackDone: "rollback done", CompletedRollout: "completed", GateBroken: "gate broken",
		PolicyEdited: "policy edited", VersionAdopted: "version adopted", StoreWentBack: "store went back", StepWaived: "step waived", WorkLost: "work lost", EvidenceLost: "evidence lost", StoreFailed: "store failed", StoreBack: "store back",
	})
}

// Zero values fail safe: none of them says that anything is well or on.
func TestZeroValuesAreSafe(t *testing.T) {
	var v Verdict
	var a Action
	var s State
	var c Cohort
	var r Reason
	if v != Inconclusive || a != Default || s != Pending || c != None || r != ReasonUnset {
		t.Errorf("%v, %v, %v, %v, %v", v, a, s, c, r)
	}
	if p := Percent(0); p.threshold() != 0 || p.share() {
		t.Error("zero percent is somebody")
	}
}
