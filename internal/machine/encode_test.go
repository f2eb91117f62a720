package machine

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stagedrollout/rollout/internal/judge"
)

// TestEncodeTooLarge: a document that has grown too large still takes a rollback, at the cost of its oldest history and
// of what gates remember; what decides is kept.
func TestEncodeTooLarge(t *testing.T) {
	j, err := judge.New([]judge.Spec{{Name: "most", Metric: "errors", Kind: judge.AtMost, Margin: .2, Action: judge.Rollback}}, judge.Risk{FalseRollback: .01, FalsePromotion: .05})
	if err != nil {
		t.Fatal(err)
	}
	p := &Plan{Version: "v", Judge: j, OnDeadline: judge.Hold, Policy: "p", Assignment: "a", Tick: tick, Keep: 1000, Steps: []string{"undo"}}
	for i := range 64 {
		p.Rings = append(p.Rings, fmt.Sprintf("ring-%02d-%s", i, strings.Repeat("x", 100)))
	}
	last := p.Rings[len(p.Rings)-1]
	p.Stages = []Stage{
		{StageRef: StageRef{Name: "some", Ring: last, Percent: 10}, Deadline: time.Hour, Control: true, Armed: []bool{true}},
		{StageRef: StageRef{Name: "all", Ring: last, Percent: 100}, Deadline: time.Hour, Last: true, Armed: []bool{true}},
	}
	wide := func(s *State) { // shares of 64 rings, 1024 times
		for i := range MaxHistory {
			s.History = append(s.History, Change{Epoch: uint64(i + 1), At: epoch0, Shares: s.Shares})
		}
	}
	deep := func(s *State) { // two hundred metrics in every ring
		s.Gates.Memory = map[string]map[string]*judge.Memory{}
		for i := range 200 {
			rings := map[string]*judge.Memory{}
			for _, ring := range p.Rings {
				rings[ring] = &judge.Memory{Past: judge.Tally{N: uint64(1)}}
			}
			s.Gates.Memory[fmt.Sprint("metric ", i)] = rings
		}
	}
	for name, grow := range map[string][]func(*State){"history": {wide}, "memory": {deep}, "both": {wide, deep}} {
		t.Run(name, func(t *testing.T) {
			s := New("x", p, "n")
			Step(s, p, Input{Now: epoch0, MayAdvance: true})
			s.Cursors = map[string]Cursor{"one": {Seq: 7}}
			for _, f := range grow {
				f(s)
			}
			if _, err := Apply(s, p, Verb{Name: VerbRollback, Note: "stop", Now: epoch0}); err != nil {
				t.Fatal(err)
			}
			changes, remembered := len(s.History), s.Gates.Memory != nil
			b, err := s.Encode()
			if err != nil {
				t.Fatalf("the rollback cannot be stored: %v", err)
			}
			if len(b) > MaxBytes {
				t.Errorf("%d bytes", len(b))
			}
			if len(s.History) != changes || (s.Gates.Memory != nil) != remembered {
				t.Error("Encode changed the state")
			}
			got, err := Decode("x", b)
			if err != nil {
				t.Fatal(err)
			}
			if got.Phase != RollingBack || got.Gen != s.Gen || got.Ver != s.Ver || got.Epoch != s.Epoch || len(got.Steps) != 1 ||
				got.Incident == nil || got.Incident.Note != "stop" || got.Cursors["one"].Seq != 7 || maxShare(got.Shares) != 0 {
				t.Errorf("stored is %+v", got)
			}
			if n := len(got.History); n == 0 || n >= changes && changes > 1 && name != "memory" || got.History[n-1].Epoch != s.History[changes-1].Epoch {
				t.Errorf("%d of %d changes are left, not the newest", n, changes)
			}
		})
	}
	s := New("x", p, "n")
	s.Incident = &Incident{Note: strings.Repeat("x", MaxText)}
	if _, err := s.Encode(); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("what cannot be cut down is stored: %v", err)
	}
}

// zipped is a text in the gzip format.
func zipped(t testing.TB, text []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(text); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestPacked: a large document is stored compressed, a small one as it is; one that is damaged, or is more than it could
// have been, is refused.
func TestPacked(t *testing.T) {
	p := fixedPlan(t)
	s := New("x", p, "n")
	small, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(small, []byte("{")) {
		t.Errorf("%d bytes are not text", len(small))
	}
	for i := range MaxHistory {
		s.History = append(s.History, Change{Epoch: uint64(i + 1), At: epoch0, Shares: s.Shares})
	}
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > len(text)/2 {
		t.Errorf("%d bytes are stored in %d", len(text), len(b))
	}
	got, err := Decode("x", b)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := json.Marshal(got); err != nil || !bytes.Equal(again, text) {
		t.Errorf("stored is\n%s\nnot (%v)\n%s", again, err, text)
	}
	flipped := bytes.Clone(b)
	flipped[len(flipped)/2] ^= 1
	blank := append(bytes.Repeat([]byte(" "), MaxText), small...) // it would be a document
	for what, b := range map[string][]byte{
		"cut short": b[:len(b)-1], "no more than a beginning": b[:3], "one bit off": flipped, "with something behind": append(bytes.Clone(b), 'x'), "too much": zipped(t, blank),
	} {
		if _, err := Decode("x", b); err == nil || !strings.Contains(err.Error(), "compressed") {
			t.Errorf("%s: %v", what, err)
		}
	}
	newer := zipped(t, []byte(`{"format":99}`))
	if _, err := Decode("x", newer); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer format: %v", err)
	}
}
