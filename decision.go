package rollout

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"strconv"
	"time"

	"github.com/stagedrollout/rollout/internal/evidence"
)

// Cohort is how a decision is compared. What a unit gets is [Decision.Enabled].
type Cohort uint8

// The cohorts of a decision.
const (
	None      Cohort = iota // not compared: nothing is recorded for it
	Control                 // a keyed unit of a ring under way that has the stable version
	Candidate               // a keyed unit of a ring under way that has the candidate
)

var cohortNames = []string{"none", "control", "candidate"}

func (c Cohort) String() string                { return nameIn(cohortNames, int(c)) }
func (c Cohort) MarshalText() ([]byte, error)  { return []byte(c.String()), nil }
func (c *Cohort) UnmarshalText(b []byte) error { return parseIn(cohortNames, b, (*uint8)(c)) }

// Reason says why a decision is what it is.
type Reason uint8

// The reasons of a decision.
const (
	ReasonUnset      Reason = iota // of the zero Decision
	ReasonNotLoaded                // the rollout's state was not loaded yet: stable
	ReasonOff                      // the ring has no share: stable
	ReasonSplit                    // the unit's bucket and the ring's percentage
	ReasonFull                     // the whole ring has the candidate
	ReasonHoldback                 // kept on the stable version as the control
	ReasonNoUnit                   // no key, so no percentage can apply: stable
	ReasonRolledBack               // the rollout, or its ring, was rolled back: stable
	ReasonCompleted                // everybody has the candidate
	ReasonVersion                  // the rollout is about another version than this process's
	ReasonForced                   // by a test
)

var reasonNames = []string{"unset", "not loaded", "off", "split", "full", "holdback", "no unit", "rolled back", "completed", "version", "forced"}

func (r Reason) String() string                { return nameIn(reasonNames, int(r)) }
func (r Reason) MarshalText() ([]byte, error)  { return []byte(r.String()), nil }
func (r *Reason) UnmarshalText(b []byte) error { return parseIn(reasonNames, b, (*uint8)(r)) }

// Decision is the answer for one unit at one moment. The zero value is off: the stable version, compared with nothing. It
// is 16 bytes, knows nothing of the unit, and may be copied and used from any goroutine. It keeps its answer for as long
// as it is held, whatever becomes of the rollout.
type Decision struct {
	at   *snapshot
	bits bits
}

// bits are a decision's answer: from the lowest, enabled (1), cohort (2), reason (5), ring (8), group (6).
type bits uint32

const (
	enabledBit  = bits(1)
	cohortShift = 1
	reasonShift = 3
	ringShift   = 8
	groupShift  = 16
	maxRings    = 64 // fewer than the 256 that fit: the state holds a share for each
	maxStages   = 256
)

func pack(enabled bool, c Cohort, r Reason, ring int, group uint64) bits {
	b := bits(c)<<cohortShift | bits(r)<<reasonShift | bits(ring)<<ringShift | bits(group%evidence.Groups)<<groupShift
	if enabled {
		b |= enabledBit
	}
	return b
}

func (b bits) cohort() Cohort { return Cohort(b >> cohortShift & 3) }
func (b bits) side() int      { return int(b >> cohortShift & 2 >> 1) } // of cohorts compared: 0 Control, 1 Candidate
func (b bits) reason() Reason { return Reason(b >> reasonShift & 31) }
func (b bits) ring() int      { return int(b >> ringShift & 255) }
func (b bits) group() uint64  { return uint64(b >> groupShift & 63) }

// Enabled reports whether the unit gets the candidate.
func (d Decision) Enabled() bool { return d.bits&enabledBit != 0 }

// Cohort is how the decision is compared.
func (d Decision) Cohort() Cohort { return d.bits.cohort() }

// Reason says why.
func (d Decision) Reason() Reason { return d.bits.reason() }

// Ring is the ring the unit belongs to; [Everyone] where all rings have the same answer and none was asked for, "" of the
// zero Decision.
func (d Decision) Ring() string {
	if d.at == nil || d.bits.ring() >= len(d.at.rings) {
		return ""
	}
	return d.at.rings[d.bits.ring()].name
}

// Stage is the name of the stage the rollout was in; "" where it was in none, or where the decision was parsed and its
// stage is over.
func (d Decision) Stage() string {
	if d.at == nil {
		return ""
	}
	return d.at.stage
}

// Version is the candidate's version at the time, whether or not the unit got it; "" where it is not known.
func (d Decision) Version() string {
	if d.at == nil {
		return ""
	}
	return d.at.version
}

// Generation counts the rollout's candidates and restarts; 0 where none was loaded.
func (d Decision) Generation() uint64 {
	if d.at == nil {
		return 0
	}
	return d.at.gen
}

// Record adds what came of the decision to the evidence: a few atomic adds, no lock, no allocation. A decision of cohort
// None records nothing. An observation that comes after the rollout moved on by more than one stage, or to another
// generation, is dropped and counted in Status.Late; one of a metric that the rollout does not know is dropped and
// counted in Status.Unknown, and one that is not a number in Status.Invalid.
func (d Decision) Record(obs ...Observation) {
	s, cohort := d.at, d.bits.cohort()
	if s == nil || cohort == None || len(obs) == 0 {
		return
	}
	ring := &s.rings[d.bits.ring()]
	if ring.closed || s.over.Load() {
		if d.bits.reason() != ReasonForced {
			s.r.late.Add(uint64(len(obs)))
		}
		return
	}
	slot := noSlot
	if s.slot != 0 && s.r.slot.Load()-s.slot < slots { // one that is long over counts something else by now
		slot = int(s.slot % slots)
	}
	shard, group, c := evidence.Shard(), d.bits.group(), d.bits.side()
	outcomes := ring.outcomes[c]
	plain := true // no observation of Errors among them
	more := 0     // observations with marks less those of Errors
	for k := range obs {
		o := &obs[k]
		i := s.indexOf(o.m)
		if i < 0 {
			s.r.unknownMetric(o.m)
			continue
		}
		m := &s.metrics[i]
		if o.why != nil && cohort == Candidate {
			s.keep(i, o) // before the count: whoever sees that has its rationale
		}
		switch {
		case i == errorsIndex:
			plain = false
			more--
			outcomes[i].AddAt(shard, (slot*evidence.Groups+int(group))*2+int(o.value))
		case m.kind == timingKind:
			cell := evidence.Index(time.Duration(o.value))
			outcomes[i].AddAt(shard, cell)
			if marks := ring.marks[i]; marks != nil {
				more++
				if set := marks.cell(c, cell); set != exceedsNone {
					marks.tables[c].Add(shard, group, set)
				}
			}
		default:
			cell := o.cell(m, s.r.dither)
			if cell < 0 {
				s.r.invalid.Add(1)
				continue
			}
			outcomes[i].Add(shard, group, cell)
		}
		if m.never && o.value != 0 && cohort == Candidate {
			s.r.sound() // after the count
		}
	}
	if s.marked > 0 && (more != 0 || s.marked > 1) {
		s.settle(ring, c, shard, group, obs)
	}
	if plain && slot != noSlot {
		ring.slots.add(shard, c, uint32(slot), answered, group)
	}
}

// indexOf is the index of a metric, -1 if the rollout does not know it.
func (s *snapshot) indexOf(m metricRef) int {
	for i := range s.metrics {
		if s.metrics[i].ref == m {
			return i
		}
	}
	return -1
}

// keep keeps an observation's rationale, unless it is one that does not count.
func (s *snapshot) keep(i int, o *Observation) {
	if s.metrics[i].kind == scoreKind && math.IsNaN(math.Float64frombits(o.value)) {
		return
	}
	s.life.reasons[i].keep(o.why)
}

// AppendText appends the decision as a token, for an outcome that comes later or elsewhere: see [Rollout.ParseDecision].
// It is short, printable, free of spaces and of personal data. It never fails.
func (d Decision) AppendText(b []byte) ([]byte, error) {
	start := len(b)
	name, ring := "-", "-"
	var gen, epoch uint64
	if d.at != nil {
		name, gen, epoch = d.at.r.name, d.at.gen, d.at.epoch
	}
	if r := d.Ring(); r != "" {
		ring = r
	}
	b = append(b, "d1:"...)
	b = append(b, name...)
	for _, n := range []uint64{gen, epoch} {
		b = strconv.AppendUint(append(b, ':'), n, 36)
	}
	b = append(append(b, ':'), ring...)
	b = strconv.AppendUint(append(b, ':'), uint64(d.bits&^(255<<ringShift)), 36)
	sum := crc32.ChecksumIEEE(b[start:])
	return strconv.AppendUint(append(b, ':'), uint64(sum), 36), nil
}

// MarshalText is [Decision.AppendText] to a new slice.
func (d Decision) MarshalText() ([]byte, error) { return d.AppendText(nil) }

var errToken = errors.New("rollout: not a decision's token")

// ParseDecision reads a token that a process of this rollout made. The decision has the token's answer, cohort, ring and
// generation, and records into the evidence of its own stage while that counts. The token is not signed: take it from
// trusted places only.
func (r *Rollout) ParseDecision(text []byte) (Decision, error) {
	fields := bytes.Split(text, []byte(":"))
	if len(fields) != 7 || string(fields[0]) != "d1" {
		return Decision{}, fmt.Errorf("%w: %.80q", errToken, text)
	}
	var n [4]uint64
	for i, f := range [][]byte{fields[2], fields[3], fields[5], fields[6]} {
		var err error
		if n[i], err = strconv.ParseUint(string(f), 36, 64); err != nil {
			return Decision{}, fmt.Errorf("%w: %.80q: %w", errToken, text, err)
		}
	}
	body := text[:len(text)-len(fields[6])-1]
	if n[3] != uint64(crc32.ChecksumIEEE(body)) {
		return Decision{}, fmt.Errorf("%w: %.80q: its checksum is wrong", errToken, text)
	}
	if n[2] > 1<<32-1 {
		return Decision{}, fmt.Errorf("%w: %.80q", errToken, text)
	}
	b, name, ring := bits(n[2]), string(fields[1]), string(fields[4])
	if name == "-" && b == 0 {
		return Decision{}, nil
	}
	if r == nil || name != r.name {
		return Decision{}, fmt.Errorf("rollout: the token is of the rollout %q", name)
	}
	if b.cohort() > Candidate {
		return Decision{}, fmt.Errorf("%w: %.80q", errToken, text)
	}
	i := 0
	if ring != "-" {
		if i = r.policy.ringIndex(ring); i < 0 {
			return Decision{}, fmt.Errorf("rollout: the token's ring %q is not in the policy", ring)
		}
	}
	at := r.snapshotOf(n[0], n[1])
	return Decision{at: at, bits: b&^(255<<ringShift) | bits(i)<<ringShift}, nil
}
