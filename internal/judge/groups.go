package judge

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
)

const (
	folds  = 16 // groups of units of which each may be left out
	temper = 1.2
)

// Groups are totals by group of units: for each group how many outcomes, then
// what a gate looks at, such as how many of them are events. The zero value is
// empty. As text it is a few bytes a number.
type Groups struct {
	Width int
	Sums  []uint64 // group after group
}

// add adds one to the i-th number of a group; n is what to add.
func (g *Groups) add(groups, width, group, i int, n uint64) {
	if g.Width != width || len(g.Sums) != groups*width {
		*g = Groups{width, make([]uint64, groups*width)}
	}
	g.Sums[group*width+i] = saturate(g.Sums[group*width+i], n)
}

func (g *Groups) clone() Groups {
	return Groups{g.Width, append([]uint64(nil), g.Sums...)}
}

var errGroups = errors.New("judge: not the text of Groups")

// MarshalText implements encoding.TextMarshaler.
func (g Groups) MarshalText() ([]byte, error) {
	if len(g.Sums) == 0 {
		return []byte{}, nil
	}
	raw := binary.AppendUvarint(nil, uint64(g.Width))
	for _, n := range g.Sums {
		raw = binary.AppendUvarint(raw, n)
	}
	return base64.RawStdEncoding.AppendEncode(nil, raw), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (g *Groups) UnmarshalText(text []byte) error {
	*g = Groups{}
	if len(text) == 0 {
		return nil
	}
	raw, err := base64.RawStdEncoding.AppendDecode(nil, text)
	if err != nil {
		return errGroups
	}
	var all []uint64
	for len(raw) > 0 {
		x, n := binary.Uvarint(raw)
		if n <= 0 || len(all) > 1+64*ScoreCells {
			return errGroups
		}
		all, raw = append(all, x), raw[n:]
	}
	if len(all) < 2 || all[0] == 0 || all[0] > ScoreCells || uint64(len(all)-1)%all[0] != 0 {
		return errGroups
	}
	g.Width, g.Sums = int(all[0]), all[1:]
	return nil
}

// A look is what of the totals of a group a bet is about: the sum of what it
// counts and the sum of the squares, by index; or every sum after the first, as
// the labels of a mix.
type look struct {
	sum, square int
	scale       float64 // of the sum; 0 is 1
	all         bool
}

// of returns a group's numbers.
func (v look) of(row []uint64) (n, s, s2 float64) {
	n, s, s2 = float64(row[0]), float64(row[v.sum]), float64(row[v.square])
	if v.scale != 0 {
		s, s2 = s*v.scale, s2*v.scale*v.scale
	}
	return n, s, s2
}

// looks are v, or one look a label.
func (v look) looks(width int) []look {
	if !v.all {
		return []look{v}
	}
	vs := make([]look, 0, 16)
	for i := 1; i < width; i++ {
		vs = append(vs, look{sum: i, square: i})
	}
	return vs
}

// excess adds to dst how much more each fold of the units has than the others
// would have let expect; of labels, how far it is from them.
func (g *Groups) excess(dst *[folds]float64, v look) {
	if len(g.Sums) == 0 || max(v.sum, v.square) >= g.Width {
		return
	}
	for _, w := range v.looks(g.Width) {
		var n, s [folds]float64
		allN, allS := 0., 0.
		for i := 0; i < len(g.Sums)/g.Width; i++ {
			x, y, _ := w.of(g.Sums[i*g.Width : (i+1)*g.Width])
			n[i%folds] += x
			s[i%folds] += y
			allN += x
			allS += y
		}
		for f := range n {
			if rest := allN - n[f]; rest > 0 {
				d := s[f] - (allS-s[f])/rest*n[f]
				if v.all {
					d = max(d, 0)
				}
				dst[f] += d
			}
		}
	}
}

// dispersion returns the two sides of the design effect
//
//	D = Σ (s_g - p·n_g)²·G/(G-1) / Σ n·σ²
//
// over the G groups that are not in the fold left out (none: -1), to be added up
// over cohorts and rings.
func (g *Groups) dispersion(v look, out int) (between, within float64) {
	if len(g.Sums) == 0 || max(v.sum, v.square) >= g.Width {
		return 0, 0
	}
	groups := len(g.Sums) / g.Width
	for _, w := range v.looks(g.Width) {
		n, s, s2, kept := 0., 0., 0., 0.
		for i := range groups {
			if i%folds != out {
				x, y, z := w.of(g.Sums[i*g.Width : (i+1)*g.Width])
				n, s, s2, kept = n+x, s+y, s2+z, kept+1
			}
		}
		if n == 0 || kept < 2 {
			continue
		}
		p, sum := s/n, 0.
		for i := range groups {
			if i%folds != out {
				x, y, _ := w.of(g.Sums[i*g.Width : (i+1)*g.Width])
				sum += (y - p*x) * (y - p*x)
			}
		}
		between += sum * kept / (kept - 1)
		within += s2 - n*p*p
	}
	return between, within
}

// rings are the memories of one metric in the rings of a process.
type rings []*Memory

// worst returns the fold of the units in which the candidate is worst.
func (rs rings) worst(v look) int {
	var excess [folds]float64
	for _, m := range rs {
		m.By[0].excess(&excess, v)
	}
	most := 0
	for f, x := range excess {
		if x > excess[most] {
			most = f
		}
	}
	return most
}

// dispersion returns how much more outcomes vary between groups of units than if
// each outcome were a unit of its own, at least 1. One fold is left out, -1: none.
func (rs rings) dispersion(v look, out int, control bool) float64 {
	between, within := 0., 0.
	for _, m := range rs {
		for c := range m.By {
			if c == 0 || control {
				b, w := m.By[c].dispersion(v, out)
				between, within = between+b, within+w
			}
		}
	}
	if !(within > 0) {
		return 1
	}
	return max(1, between/within)
}

// split returns how much more the first exposures of a ring vary between groups
// of units than a coin for each unit would.
func (rs rings) split() float64 {
	between, within := 0., 0.
	for _, m := range rs {
		c, s := m.By[0].Sums, m.By[1].Sums
		if len(c) == 0 || len(c) != len(s) {
			continue
		}
		n, all := 0., 0.
		for i := range c {
			n += float64(c[i])
			all += float64(c[i]) + float64(s[i])
		}
		p, groups := n/all, float64(len(c))
		for i := range c {
			d := float64(c[i]) - p*(float64(c[i])+float64(s[i]))
			between += d * d * groups / (groups - 1)
		}
		within += all * p * (1 - p)
	}
	if !(within > 0) {
		return 1
	}
	return max(1, between/within)
}
