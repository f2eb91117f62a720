package tally

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

// The document is binary: a JSON of its numbers would be three times as large. After the magic and the format come the
// length of the rest but for its checksum, unsigned varints throughout, strings behind their lengths, and at the end a
// CRC-32. In a vector, a zero stands before the length of a run of zeros: most cells never count anything.
const (
	magic  = "\x89rev"
	format = 1

	// MaxBytes is the longest document that is read.
	MaxBytes  = 900 << 10
	maxSeries = 4096
	maxCells  = 1 << 14
	maxAll    = 1 << 20 // cells of a document
	maxOpen   = 256
	maxText   = 1024
	maxCount  = 1 << 53
)

// ErrNewer is returned for a document of a newer format.
var ErrNewer = errors.New("written by a newer version of the library")

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendVector(b []byte, xs []uint64) []byte {
	for i := 0; i < len(xs); {
		if xs[i] != 0 {
			b = binary.AppendUvarint(b, xs[i])
			i++
			continue
		}
		n := 1
		for i+n < len(xs) && xs[i+n] == 0 {
			n++
		}
		b = append(b, 0)
		b = binary.AppendUvarint(b, uint64(n))
		i += n
	}
	return b
}

func appendKey(b []byte, k Key) []byte {
	b = binary.AppendUvarint(b, k.Epoch)
	b = appendText(appendText(b, k.Ring), k.Metric)
	return binary.AppendUvarint(b, uint64(k.Cells))
}

// Encode is the document as stored. Its series must be in order.
func (d *Doc) Encode() []byte {
	b := append([]byte(magic), format)
	b = appendText(b, d.Inc)
	for _, n := range []uint64{d.Birth, d.Seq, d.Ack} {
		b = binary.AppendUvarint(b, n)
	}
	flags := byte(0)
	if d.Sealed {
		flags = 1
	}
	b = append(b, flags)
	b = binary.AppendUvarint(b, uint64(len(d.Open)))
	for _, o := range d.Open {
		b = binary.AppendUvarint(appendText(b, o.Ring), o.Gen)
		for _, by := range [][]uint64{o.Candidate, o.Control} {
			b = binary.AppendUvarint(b, uint64(len(by)))
			b = appendVector(b, by)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(d.Series)))
	for i := range d.Series {
		s := &d.Series[i]
		b = binary.AppendUvarint(appendKey(b, s.Key), s.Events)
		b = appendVector(appendVector(b, s.Counts[0]), s.Counts[1])
	}
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
}

// reader reads what the functions above append; after an error it reads zeros.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err, r.b = fmt.Errorf(format, args...), nil
	}
}

func (r *reader) uint(most uint64, what string) uint64 {
	n, used := binary.Uvarint(r.b)
	if used <= 0 || n > most {
		r.fail("%s cannot be read", what)
		return 0
	}
	r.b = r.b[used:]
	return n
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.fail("it ends too soon")
		return 0
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c
}

func (r *reader) text(what string) string {
	n := r.uint(maxText, "the length of a text")
	if n > uint64(len(r.b)) {
		r.fail("%s ends too soon", what)
		return ""
	}
	s := string(r.b[:n])
	r.b = r.b[n:]
	return s
}

// vector adds a vector to dst.
func (r *reader) vector(dst []uint64, most uint64) {
	b := r.b
	for i := 0; i < len(dst); {
		if len(b) == 0 {
			r.fail("a vector ends too soon")
			return
		}
		n, used := uint64(b[0]), 1
		switch {
		case n < 0x80:
		case len(b) > 1 && b[1] < 0x80: // most others
			n, used = n&0x7f|uint64(b[1])<<7, 2
		default:
			if n, used = binary.Uvarint(b); used <= 0 || n > most {
				r.fail("a count cannot be read")
				return
			}
		}
		b = b[used:]
		if n != 0 {
			dst[i] += n
			i++
			continue
		}
		run, used := binary.Uvarint(b)
		if used <= 0 || run == 0 || run > uint64(len(dst)-i) {
			r.fail("a run of zeros cannot be read")
			return
		}
		b = b[used:]
		i += int(run)
	}
	r.b = b
}

func (r *reader) key() Key {
	k := Key{Epoch: r.uint(1<<63, "an epoch")}
	k.Ring, k.Metric = r.text("a ring"), r.text("a metric")
	k.Cells = int(r.uint(maxCells, "a number of cells"))
	return k
}

// skipText reads a text and makes none of it.
func (r *reader) skipText(what string) {
	n := r.uint(maxText, "the length of a text")
	if n > uint64(len(r.b)) {
		r.fail("%s ends too soon", what)
		return
	}
	r.b = r.b[n:]
}

// keyed is a key and how it is written.
type keyed struct {
	raw []byte
	key Key
}

// keyAt is key of the i-th series of a document. Documents of one rollout mostly have the same keys in the same order: what
// was read before is not read again.
func (r *reader) keyAt(i int, known *[]keyed) Key {
	if known == nil {
		return r.key()
	}
	from := *r
	r.uint(1<<63, "an epoch")
	r.skipText("a ring")
	r.skipText("a metric")
	r.uint(maxCells, "a number of cells")
	if r.err != nil {
		return Key{}
	}
	raw := from.b[:len(from.b)-len(r.b)]
	if i < len(*known) && string((*known)[i].raw) == string(raw) {
		return (*known)[i].key
	}
	k := from.key()
	if i == len(*known) {
		*known = append(*known, keyed{slices.Clone(raw), k})
	}
	return k
}

// document finds what a document holds between its format and its checksum.
func document(b []byte) (*reader, error) {
	switch {
	case len(b) > MaxBytes:
		return nil, fmt.Errorf("it has %d bytes; %d is the most", len(b), MaxBytes)
	case len(b) < len(magic)+1+4 || string(b[:len(magic)]) != magic:
		return nil, errors.New("it is no evidence")
	case b[len(magic)] > format:
		return nil, fmt.Errorf("it has format %d, this library reads up to %d: %w", b[len(magic)], format, ErrNewer)
	case b[len(magic)] == 0:
		return nil, errors.New("it has format 0")
	}
	body := b[:len(b)-4]
	if crc32.ChecksumIEEE(body) != binary.BigEndian.Uint32(b[len(body):]) {
		return nil, errors.New("its checksum is wrong")
	}
	return &reader{b: body[len(magic)+1:]}, nil
}

func (r *reader) about() About {
	a := About{Inc: r.text("an incarnation")}
	a.Birth, a.Seq, a.Ack = r.uint(1<<63, "a round"), r.uint(1<<63, "a number"), r.uint(1<<63, "a version")
	a.Sealed = r.byte()&1 != 0
	for range r.uint(maxOpen, "how many rings have open work") {
		o := Open{Ring: r.text("a ring"), Gen: r.uint(1<<63, "a generation")}
		for _, by := range []*[]uint64{&o.Candidate, &o.Control} {
			if n := r.uint(256, "a number of groups"); n > 0 {
				*by = make([]uint64, n)
				r.vector(*by, maxCount)
			}
		}
		if r.err == nil && !o.Valid() {
			r.fail("the open work of %q cannot be", o.Ring)
		}
		if r.err != nil {
			break
		}
		a.Open = append(a.Open, o)
	}
	return a
}

// series calls each with the key of every series and its events, and adds the counts to what it returns.
func (r *reader) series(known *[]keyed, each func(Key, uint64) Counts) {
	cells := 0
	var last Key
	for i := range r.uint(maxSeries, "a number of series") {
		k := r.keyAt(int(i), known)
		events := r.uint(maxCount, "a number of events")
		if cells += k.Cells; cells > maxAll {
			r.fail("it has too many cells")
		}
		if i > 0 && r.err == nil && last.Compare(k) >= 0 {
			r.fail("its series are not in order")
		}
		if r.err != nil {
			return
		}
		last = k
		into := each(k, events)
		r.vector(into[0], maxCount)
		r.vector(into[1], maxCount)
		if r.err != nil {
			return
		}
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail("something follows the last series")
	}
}

// Decode reads a document.
func Decode(b []byte) (*Doc, error) {
	r, err := document(b)
	if err != nil {
		return nil, err
	}
	d := &Doc{About: r.about()}
	r.series(nil, func(k Key, events uint64) Counts {
		s := Series{Key: k, Counts: NewCounts(k.Cells), Events: events}
		d.Series = append(d.Series, s)
		return s.Counts
	})
	if r.err != nil {
		return nil, r.err
	}
	return d, nil
}

// Peek reads what a document says of its process.
func Peek(b []byte) (About, error) {
	r, err := document(b)
	if err != nil {
		return About{}, err
	}
	a := r.about()
	return a, r.err
}

// AddEncoded is Add of Decode's result, without making it. After an error the sum is of no use.
func (s *Sum) AddEncoded(b []byte) error {
	r, err := document(b)
	if err != nil {
		return err
	}
	r.about()
	r.series(&s.known, func(k Key, events uint64) Counts {
		t := s.at(k)
		t.Events += events
		return t.Counts
	})
	return r.err
}

// zigzag makes a number that may be below zero in two's complement a small one where it is near zero.
func zigzag(x uint64) uint64   { return x<<1 ^ uint64(int64(x)>>63) }
func unzigzag(x uint64) uint64 { return x>>1 ^ -(x & 1) }

func mapped(xs []uint64, f func(uint64) uint64) []uint64 {
	out := make([]uint64, len(xs))
	for i, x := range xs {
		out[i] = f(x)
	}
	return out
}

// MarshalJSON is the ledger as text, in the document's binary form.
func (l Ledger) MarshalJSON() ([]byte, error) {
	keys := make([]Key, 0, len(l))
	for k := range l {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, Key.Compare)
	b := []byte{format}
	b = binary.AppendUvarint(b, uint64(len(keys)))
	for _, k := range keys {
		t := l[k]
		b = appendKey(b, k)
		for _, n := range []uint64{t.Seen, t.Ahead, uint64(t.Closed)} {
			b = binary.AppendUvarint(b, zigzag(n))
		}
		b = appendVector(appendVector(b, mapped(t.Counts[0], zigzag)), mapped(t.Counts[1], zigzag))
	}
	return json.Marshal(base64.RawStdEncoding.EncodeToString(b))
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (l *Ledger) UnmarshalJSON(b []byte) error {
	var text string
	if err := json.Unmarshal(b, &text); err != nil {
		return err
	}
	raw, err := base64.RawStdEncoding.DecodeString(text)
	if err != nil {
		return err
	}
	r := &reader{b: raw}
	if f := r.byte(); r.err == nil && f != format {
		return fmt.Errorf("the ledger has format %d", f)
	}
	all := Ledger{}
	cells := 0
	for range r.uint(maxSeries, "a number of series") {
		k := r.key()
		t := &Taken{Counts: NewCounts(k.Cells)}
		t.Seen, t.Ahead = unzigzag(r.uint(1<<64-1, "a number")), unzigzag(r.uint(1<<64-1, "a number"))
		t.Closed = int64(unzigzag(r.uint(1<<64-1, "a time")))
		if cells += k.Cells; cells > maxAll {
			r.fail("the ledger has too many cells")
		}
		for c := range t.Counts {
			r.vector(t.Counts[c], 1<<64-1)
			t.Counts[c] = mapped(t.Counts[c], unzigzag)
		}
		if r.err != nil {
			break
		}
		all[k] = t
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail("something follows the ledger")
	}
	if r.err != nil {
		return fmt.Errorf("the ledger: %w", r.err)
	}
	*l = all
	return nil
}
