package judge

// ScoreCells is the number of cells of a Score: values 0, 1/32 … 1 of its
// badness.
const ScoreCells = 33

// MaxMarks is how many marks a Timing may have.
const MaxMarks = 8

// MarkCells is how many cells a group of a Timing with n marks has: one for
// each set of marks exceeded, as a number whose bit i is mark i, and a last one
// for what was recorded while there were no thresholds.
func MarkCells(n int) int { return 1<<n + 1 }

// A Mark is a threshold of a Timing that the groups of its blocks count by. An
// outcome exceeds it if its cell is at least the threshold.
type Mark struct {
	Quantile float64 // the threshold is just above the control's quantile so far; 0: it is fixed
	Shift    int     // and for the candidate so many cells higher
	Cell     int     // of a fixed one, for both
}

// Marks are the marks of a Timing, at most [MaxMarks], in the order of their bits.
func (j *Judge) Marks(metric string) []Mark { return j.marks[metric] }

// Thresholds appends to dst the present thresholds of a Timing in a ring, by
// mark: the control's and the candidate's. It appends nothing while there are none.
func (j *Judge) Thresholds(dst [][2]int, st *State, metric, ring string) [][2]int {
	marks := j.marks[metric]
	mem := st.Memory[metric][ring]
	for _, m := range marks {
		if m.Quantile == 0 {
			dst = append(dst, [2]int{m.Cell, m.Cell})
			continue
		}
		if mem == nil || mem.Seen < warmUp {
			return dst[:0]
		}
		tau, _, ok := mem.Control.quantile(m.Quantile)
		if !ok {
			return dst[:0]
		}
		dst = append(dst, [2]int{tau + 1, tau + 1 + m.Shift})
	}
	return dst
}

// mark returns the bit of a mark of the metric, which it adds if it is new.
func (j *Judge) mark(metric string, m Mark) int {
	for i, other := range j.marks[metric] {
		if other == m {
			return i
		}
	}
	if j.marks == nil {
		j.marks = map[string][]Mark{}
	}
	j.marks[metric] = append(j.marks[metric], m)
	return len(j.marks[metric]) - 1
}
