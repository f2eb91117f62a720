package evalue

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"math"
)

// Bank is e-processes of one prior that bet in step on variants of the same
// blocks: a row each. The zero value has not bet. As text it is a few bytes a
// number, because there are many; it survives that bit by bit.
type Bank struct {
	Blocks uint64    // consumed
	LogE   []float64 // natural logarithm of the wealth, by row
	// Pi are the parts of each row's wealth, as a Prior, row after row. They are
	// rounded to 16 bits of precision, and read as parts of their sum, so that
	// rounding gains nothing.
	Pi []float32
}

// Update consumes one block, of which logs are the bets of each row. A Bank of
// another number of rows or bets starts afresh. After it every part is moved
// towards the prior by ε = 1/(720+b) at the b-th block, the fixed share of
// Herbster and Warmuth (Tracking the Best Expert, 1998): without it the wealth
// of the bets dies while all is well and a late regression is found late; with a
// constant ε it leaks for ever. Only the first Update allocates.
func (b *Bank) Update(prior Prior, logs []Logs) {
	rows, cols := len(logs), len(prior)
	if len(b.LogE) != rows || len(b.Pi) != rows*cols {
		*b = Bank{LogE: make([]float64, rows), Pi: make([]float32, rows*cols)}
		for i := range b.Pi {
			b.Pi[i] = rounded(prior[i%cols])
		}
	}
	eps := 1 / (720 + float64(b.Blocks))
	b.Blocks++
	for r := range logs {
		b.row(r, prior, &logs[r], eps)
	}
}

// rounded is a part of a wealth with 16 bits of precision: three bytes, as text.
func rounded(x float64) float32 {
	return math.Float32frombits((math.Float32bits(float32(x)) + 0x80) &^ 0xff)
}

func (b *Bank) row(r int, prior Prior, logs *Logs, eps float64) {
	cols := len(prior)
	pi := b.Pi[r*cols : (r+1)*cols]
	var f [MaxBets + 1]float64 // f[0] is cash: log 1
	top := math.Inf(-1)
	for k := range pi {
		if k > 0 {
			f[k] = clamp(logs[k-1])
		}
		if pi[k] > 0 {
			top = max(top, f[k])
		}
	}
	had, sum := 0., 0.
	for k, part := range pi {
		had += float64(part)
		if part > 0 {
			f[k] = float64(part) * math.Exp(f[k]-top)
			sum += f[k]
		} else {
			f[k] = 0
		}
	}
	if !(sum > 0) { // no wealth anywhere: only a damaged state
		for k := range pi {
			pi[k] = rounded(prior[k])
		}
		return
	}
	b.LogE[r] = clamp(b.LogE[r] + top + math.Log(sum/had))
	for k, w := range prior {
		pi[k] = rounded((1-eps)*(f[k]/sum) + eps*w)
	}
}

// Merge returns the mean of processes of one prior: a process itself, whose wealth
// is theirs together. Banks of other shapes than the first, and those that have not
// bet, are left out.
func Merge(banks []Bank) Bank {
	var m Bank
	var like []Bank
	for _, b := range banks {
		if len(b.LogE) == 0 || len(like) > 0 && (len(b.LogE) != len(like[0].LogE) || len(b.Pi) != len(like[0].Pi)) {
			continue
		}
		like = append(like, b)
		m.Blocks = max(m.Blocks, b.Blocks)
	}
	if len(like) == 0 {
		return m
	}
	rows := len(like[0].LogE)
	cols := len(like[0].Pi) / rows
	m.LogE, m.Pi = make([]float64, rows), make([]float32, rows*cols)
	logs := make([]float64, len(like))
	for r := range rows {
		for i, b := range like {
			logs[i] = b.LogE[r]
		}
		m.LogE[r] = clamp(LogMean(logs))
		all := LogSum(logs)
		for c := range cols {
			part := 0.
			for i, b := range like {
				part += math.Exp(logs[i]-all) * float64(b.Pi[r*cols+c])
			}
			m.Pi[r*cols+c] = rounded(part)
		}
	}
	return m
}

// Clone is a deep copy.
func (b *Bank) Clone() Bank {
	return Bank{Blocks: b.Blocks, LogE: append([]float64(nil), b.LogE...), Pi: append([]float32(nil), b.Pi...)}
}

// Log returns the logarithm of a row's wealth, 0 before the first block.
func (b *Bank) Log(row int) float64 {
	if row >= len(b.LogE) {
		return 0
	}
	return b.LogE[row]
}

var errBank = errors.New("evalue: not the text of a Bank")

// maxRows bounds what is read: the sets of a mix of ten labels.
const maxRows = 1024

// MarshalText implements encoding.TextMarshaler.
func (b Bank) MarshalText() ([]byte, error) {
	if len(b.LogE) == 0 {
		return []byte{}, nil
	}
	raw := binary.AppendUvarint(nil, b.Blocks)
	raw = binary.AppendUvarint(raw, uint64(len(b.LogE)))
	for shift := 56; shift >= 0; shift -= 8 { // like bytes together: what stores it compresses it
		for _, x := range b.LogE {
			raw = append(raw, byte(math.Float64bits(x)>>shift))
		}
	}
	for shift := 24; shift > 0; shift -= 8 {
		for _, x := range b.Pi {
			raw = append(raw, byte(math.Float32bits(x)>>shift))
		}
	}
	return base64.RawStdEncoding.AppendEncode(nil, raw), nil
}

// UnmarshalText implements encoding.TextUnmarshaler. It accepts only what a Bank
// could have come to.
func (b *Bank) UnmarshalText(text []byte) error {
	*b = Bank{}
	if len(text) == 0 {
		return nil
	}
	raw, err := base64.RawStdEncoding.AppendDecode(nil, text)
	if err != nil {
		return errBank
	}
	blocks, n := binary.Uvarint(raw)
	if n <= 0 {
		return errBank
	}
	raw = raw[n:]
	rows, n := binary.Uvarint(raw)
	if n <= 0 || rows == 0 || rows > maxRows || uint64(len(raw)-n) < 8*rows {
		return errBank
	}
	raw = raw[n:]
	parts := raw[8*rows:]
	if cols := uint64(len(parts)) / (3 * rows); cols > MaxBets+1 || uint64(len(parts)) != 3*rows*cols {
		return errBank
	}
	got := Bank{Blocks: blocks, LogE: make([]float64, rows), Pi: make([]float32, len(parts)/3)}
	for i := range got.LogE {
		var bits uint64
		for b := range 8 {
			bits = bits<<8 | uint64(raw[b*len(got.LogE)+i])
		}
		x := math.Float64frombits(bits)
		if !(math.Abs(x) <= limit) {
			return errBank
		}
		got.LogE[i] = x
	}
	for i := range got.Pi {
		var bits uint32
		for b := range 3 {
			bits = bits<<8 | uint32(parts[b*len(got.Pi)+i])
		}
		x := math.Float32frombits(bits << 8)
		if !(x >= 0 && x <= 2) {
			return errBank
		}
		got.Pi[i] = x
	}
	*b = got
	return nil
}
