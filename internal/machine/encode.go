package machine

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/stagedrollout/rollout/internal/judge"
)

// packed is the length of JSON from which it is stored compressed: what gates know of many rings is read by whoever
// evaluates, in every tick.
const packed = 8 << 10

// pack is the text of a state as stored: itself, or in the gzip format.
func pack(text []byte) ([]byte, error) {
	if len(text) < packed {
		return text, nil
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(text); err != nil {
		return nil, err
	}
	err := z.Close()
	return b.Bytes(), err
}

// unpack is the inverse of pack.
func unpack(b []byte) ([]byte, error) {
	if !bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
		return b, nil
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(z, MaxText+1))
	if err == nil && len(text) > MaxText {
		err = fmt.Errorf("it has more than %d bytes", MaxText)
	}
	return text, err
}

// Encode is the document as stored. Where it would be too large the oldest shares of the history are left out, then what
// gates remember of the past of metrics, then notes and the oldest versions, because a rollback must always be stored.
func (s *State) Encode() ([]byte, error) {
	for c := s; ; {
		text, err := json.Marshal(c)
		if err != nil {
			return nil, err
		}
		if b, err := pack(text); err != nil || len(text) <= MaxText && len(b) <= MaxBytes {
			return b, err
		}
		if c == s {
			c = s.Clone()
		}
		switch {
		case len(c.History) > 1:
			c.History = forget(c.History, len(c.History)/2)
		case len(c.Notes) > 0:
			c.Notes = nil
		case c.Gates.Gates != nil || c.Gates.Memory != nil || c.Sources != nil: // all that was learnt: a part of it would not be what it says
			c.Gates, c.Sources, c.Pace = judge.State{Starts: c.Gates.Starts}, nil, nil
		case len(c.Versions) > 2:
			half := slices.Clone(c.Versions[:len(c.Versions)/2])
			c.Versions = slices.DeleteFunc(c.Versions, func(e VersionEntry) bool {
				return slices.Contains(half, e) && e.Version != c.Version
			})
		default:
			return nil, fmt.Errorf("the state document would be %d bytes; %d is the most, and %d compressed", len(text), MaxText, MaxBytes)
		}
	}
}

// ErrNewer is returned by [Decode] for a document of a newer format.
var ErrNewer = errors.New("written by a newer version of the library")

// Decode reads a stored document of the rollout called name. It accepts nothing that the other functions of this package
// could trip over.
func Decode(name string, b []byte) (*State, error) {
	if len(b) > MaxBytes+1024 {
		return nil, fmt.Errorf("the state document has %d bytes; %d is the most", len(b), MaxBytes)
	}
	b, err := unpack(b)
	if err != nil {
		return nil, fmt.Errorf("the state document is not as it was compressed: %w", err)
	}
	var head struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("the state document is no JSON object with a format: %w", err)
	}
	if head.Format > Format {
		return nil, fmt.Errorf("the state document has format %d, this library reads up to %d: %w", head.Format, Format, ErrNewer)
	}
	var s State
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("the state document: %w", err)
	}
	if err := s.check(name); err != nil {
		return nil, fmt.Errorf("the state document: %w", err)
	}
	for _, m := range []*map[string]float64{&s.Shares, &s.Reach} {
		if *m == nil {
			*m = map[string]float64{}
		}
	}
	return &s, nil
}

// check finds what no writer of this package would have written.
func (s *State) check(name string) error {
	switch {
	case s.Format != Format:
		return fmt.Errorf("format is %d", s.Format)
	case s.Name != name:
		return fmt.Errorf("it is of the rollout %q", s.Name)
	case s.Gen == 0 || s.Epoch == 0 || s.Ver == 0:
		return errors.New("gen, ver or epoch is zero")
	case len(s.Versions) == 0:
		return errors.New("it has had no version")
	case s.Elapsed < 0 || s.Baked < 0 || s.Quiet < 0 || s.Clock < 0 || s.Live < 0:
		return errors.New("a duration is negative")
	case !(s.Holdback >= 0 && s.Holdback < 100):
		return fmt.Errorf("holdback is %v", s.Holdback)
	case s.Climb < 0 || s.Climb > MaxClimb:
		return fmt.Errorf("climb is %d", s.Climb)
	case s.Phase == Held && s.Hold == nil:
		return errors.New("it is held for no cause")
	case s.Phase.Latched() && len(s.Shares) > 0 && maxShare(s.Shares) > 0:
		return errors.New("it is rolled back and has a share above zero")
	}
	for _, m := range []map[string]float64{s.Shares, s.Set, s.Reach} {
		for ring, p := range m {
			if !(p >= 0 && p <= 100) {
				return fmt.Errorf("the share of %q is %v", ring, p)
			}
		}
	}
	for _, st := range s.Steps {
		if st.Attempts < 0 || st.Effects < 0 {
			return fmt.Errorf("the journal of the step %q cannot be", st.Name)
		}
	}
	if n := s.waived(); n > MaxWaives {
		return fmt.Errorf("%d effects are waived", n)
	}
	if err := checkOpen(s.Lost); err != nil {
		return err
	}
	return s.Gates.Check()
}
