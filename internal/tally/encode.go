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
// length of the rest but for its checksum, unsigned varints throughout, strings behind their lengths, vectors as vector.go
// says, and at the end a CRC-32.
const (
	magic  = "\x89rev"
	format = 2 // 1 had its vectors as varints, before there was a release

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

func appendKey(b []byte, k Key) []byte {
	b = binary.AppendUvarint(b, k.Epoch)
	b = appendText(appendText(b, k.Ring), k.Metric)
	return binary.AppendUvarint(b, uint64(k.Cells))
}

// Encode is the document as stored. Its series must be in order.
func (d *Doc) Encode() []byte {
	p := packer{b: append([]byte(magic), format)}
	p.b = appendText(p.b, d.Inc)
	for _, n := range []uint64{d.Birth, d.Seq, d.Ack} {
		p.b = binary.AppendUvarint(p.b, n)
	}
	flags := byte(0)
	if d.Sealed {
		flags = 1
	}
	p.b = append(p.b, flags)
	p.b = binary.AppendUvarint(p.b, uint64(len(d.Open)))
	for _, o := range d.Open {
		p.b = binary.AppendUvarint(appendText(p.b, o.Ring), o.Gen)
		for cohort, by := range [][]uint64{o.Control, o.Candidate} {
			p.b = binary.AppendUvarint(p.b, uint64(len(by)))
			p.vector(cohort, by)
		}
	}
	p.b = binary.AppendUvarint(p.b, uint64(len(d.Series)))
	for i := range d.Series {
		s := &d.Series[i]
		p.b = binary.AppendUvarint(appendKey(p.b, s.Key), s.Events)
		p.counts(s.Counts)
	}
	return binary.BigEndian.AppendUint32(p.b, crc32.ChecksumIEEE(p.b))
}

func (p *packer) counts(c Counts) {
	for cohort := range c {
		p.vector(cohort, c[cohort])
	}
}

// reader reads what the functions above append; after an error it reads zeros.
type reader struct {
	b   []byte
	err error

	likes likes
	pairs pairs              // of a frame, while it is read
	cells [frameCells]uint64 // the same, written plainly
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
	from := r.b
	r.uint(1<<63, "an epoch")
	r.skipText("a ring")
	r.skipText("a metric")
	r.uint(maxCells, "a number of cells")
	if r.err != nil {
		return Key{}
	}
	raw := from[:len(from)-len(r.b)]
	if i < len(*known) && string((*known)[i].raw) == string(raw) {
		return (*known)[i].key
	}
	r.b = from
	k := r.key()
	if i == len(*known) {
		*known = append(*known, keyed{slices.Clone(raw), k})
	}
	return k
}

// document finds what a document holds between its format and its checksum.
func document(b []byte) (reader, error) {
	switch {
	case len(b) > MaxBytes:
		return reader{}, fmt.Errorf("it has %d bytes; %d is the most", len(b), MaxBytes)
	case len(b) < len(magic)+1+4 || string(b[:len(magic)]) != magic:
		return reader{}, errors.New("it is no evidence")
	case b[len(magic)] > format:
		return reader{}, fmt.Errorf("it has format %d, this library reads up to %d: %w", b[len(magic)], format, ErrNewer)
	case b[len(magic)] < format:
		return reader{}, fmt.Errorf("it has format %d, which was never released", b[len(magic)])
	}
	body := b[:len(b)-4]
	if crc32.ChecksumIEEE(body) != binary.BigEndian.Uint32(b[len(body):]) {
		return reader{}, errors.New("its checksum is wrong")
	}
	return reader{b: body[len(magic)+1:]}, nil
}

func (r *reader) about() About {
	a := About{Inc: r.text("an incarnation")}
	a.Birth, a.Seq, a.Ack = r.uint(1<<63, "a round"), r.uint(1<<63, "a number"), r.uint(1<<63, "a version")
	a.Sealed = r.byte()&1 != 0
	for range r.uint(maxOpen, "how many rings have open work") {
		o := Open{Ring: r.text("a ring"), Gen: r.uint(1<<63, "a generation")}
		for cohort, by := range []*[]uint64{&o.Control, &o.Candidate} {
			if n := r.uint(256, "a number of groups"); n > 0 {
				*by = make([]uint64, n)
				r.vector(cohort, *by, maxCount)
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
		r.counts(into, maxCount)
		if r.err != nil {
			return
		}
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail("something follows the last series")
	}
}

// counts adds counts to c.
func (r *reader) counts(c Counts, most uint64) {
	for cohort := range c {
		r.vector(cohort, c[cohort], most)
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

// below reports whether some count is below zero in two's complement.
func (c Counts) below() bool {
	negative := func(x uint64) bool { return int64(x) < 0 }
	return slices.ContainsFunc(c[0], negative) || slices.ContainsFunc(c[1], negative)
}

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
	p := packer{b: []byte{format}}
	p.b = binary.AppendUvarint(p.b, uint64(len(keys)))
	for _, k := range keys {
		t := l[k]
		p.b = appendKey(p.b, k)
		for _, n := range []uint64{t.Seen, t.Ahead, uint64(t.Closed)} {
			p.b = binary.AppendUvarint(p.b, zigzag(n))
		}
		c, below := t.Counts, byte(0)
		if c.below() {
			c, below = Counts{mapped(c[0], zigzag), mapped(c[1], zigzag)}, 1
		}
		p.b = append(p.b, below)
		p.counts(c)
	}
	return json.Marshal(base64.RawStdEncoding.EncodeToString(p.b))
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
		below := r.byte()&1 != 0
		r.counts(t.Counts, 1<<64-1)
		if below {
			t.Counts = Counts{mapped(t.Counts[0], unzigzag), mapped(t.Counts[1], unzigzag)}
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
