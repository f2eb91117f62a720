package tally

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

func drawCounts(t *rapid.T, cells int) Counts {
	c := NewCounts(cells)
	count := rapid.OneOf(rapid.Just(uint64(0)), rapid.Uint64Range(0, 9), rapid.Uint64Range(0, 1<<40))
	for i := range c {
		copy(c[i], rapid.SliceOfN(count, cells, cells).Draw(t, "counts"))
	}
	return c
}

func drawDoc(t *rapid.T) *Doc {
	d := &Doc{About: About{
		Inc: rapid.String().Draw(t, "inc"), Birth: rapid.Uint64Range(0, 1<<40).Draw(t, "birth"), Seq: rapid.Uint64Range(0, 1<<40).Draw(t, "seq"),
		Ack: rapid.Uint64Range(0, 1<<40).Draw(t, "ack"), Sealed: rapid.Bool().Draw(t, "sealed"),
	}}
	if rapid.Bool().Draw(t, "open") {
		d.Open = []Open{{Ring: "staff", Gen: 3, Candidate: drawCounts(t, 64)[0]}}
	}
	keys := rapid.SliceOfNDistinct(rapid.Custom(func(t *rapid.T) Key {
		return Key{
			rapid.Uint64Range(1, 3).Draw(t, "epoch"), rapid.SampledFrom([]string{"staff", "everyone"}).Draw(t, "ring"),
			rapid.SampledFrom([]string{"errors", "latency", "(split)"}).Draw(t, "metric"), rapid.IntRange(0, 70).Draw(t, "cells"),
		}
	}), 0, 6, func(k Key) Key { return k }).Draw(t, "keys")
	for _, k := range keys {
		d.Series = append(d.Series, Series{k, drawCounts(t, k.Cells), rapid.Uint64Range(0, 9).Draw(t, "events")})
	}
	d.Sort()
	return d
}

// TestDocument: what is written is read again, and adding the bytes is adding what they say.
func TestDocument(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var sums [2]Sum
		for range rapid.IntRange(1, 3).Draw(t, "documents") {
			d := drawDoc(t)
			b := d.Encode()
			got, err := Decode(b)
			if err != nil || !reflect.DeepEqual(got, d) || !got.Same(d) {
				t.Fatalf("%v: %+v, not %+v", err, got, d)
			}
			if about, err := Peek(b); err != nil || !reflect.DeepEqual(about, d.About) {
				t.Fatalf("%v: %+v, not %+v", err, about, d.About)
			}
			sums[0].Add(d)
			if err := sums[1].AddEncoded(b); err != nil {
				t.Fatal(err)
			}
			i := rapid.IntRange(0, len(b)-1).Draw(t, "damaged")
			b[i] ^= byte(rapid.IntRange(1, 255).Draw(t, "damage"))
			if _, err := Decode(b); err == nil {
				t.Fatalf("byte %d is damaged, and it is read", i)
			}
			if _, err := Decode(b[:i]); err == nil {
				t.Fatalf("cut to %d bytes, and it is read", i)
			}
		}
		if !reflect.DeepEqual(sums[0].Totals, sums[1].Totals) {
			t.Fatalf("%+v, not %+v", sums[1], sums[0])
		}
	})
}

// TestLedger: a ledger survives JSON, also with numbers below zero.
func TestLedger(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := Ledger{}
		for _, s := range drawDoc(t).Series {
			taken := &Taken{Counts: s.Counts, Seen: s.Events, Ahead: 3, Closed: -5}
			l[s.Key] = taken.Less(&Series{Key: s.Key, Counts: drawCounts(t, s.Cells), Events: 4})
		}
		b, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		var got Ledger
		if err := json.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(got, l) {
			t.Fatalf("%v: %+v, not %+v", err, got, l)
		}
	})
}

// TestNewer: a document of a newer format is told from a damaged one.
func TestNewer(t *testing.T) {
	b := (&Doc{}).Encode()
	b[len(magic)] = format + 1
	if _, err := Decode(b); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer format: %v", err)
	}
}

// fleetDoc is what a busy process publishes: rings of rates by group, in one epoch.
func fleetDoc(rings, metrics int, rnd *rand.Rand) *Doc {
	d := &Doc{About: About{Inc: fmt.Sprintf("host-%012x", rnd.Uint64()>>16), Seq: 99}}
	for i := range rings {
		for j := range metrics {
			k := Key{7, fmt.Sprint("ring", i), fmt.Sprint("metric", j), 128}
			c := NewCounts(k.Cells)
			for cohort := range c {
				for g := range 64 {
					c[cohort][2*g], c[cohort][2*g+1] = rnd.Uint64N(100_000), rnd.Uint64N(120)
				}
			}
			d.Series = append(d.Series, Series{Key: k, Counts: c})
		}
	}
	d.Sort()
	return d
}

// TestSize: what a replica publishes of 3 rings and 4 metrics, each cell of which has counted, fits in 8 KiB.
func TestSize(t *testing.T) {
	b := fleetDoc(3, 4, rand.New(rand.NewPCG(1, 2))).Encode()
	t.Logf("%d bytes", len(b))
	if len(b) > 8<<10 {
		t.Errorf("%d bytes", len(b))
	}
}

func BenchmarkMerge(b *testing.B) {
	for _, n := range []int{100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			rnd := rand.New(rand.NewPCG(1, 2))
			docs := make([][]byte, n)
			for i := range docs {
				docs[i] = fleetDoc(3, 5, rnd).Encode()
			}
			b.ReportAllocs()
			for b.Loop() {
				var s Sum
				for _, d := range docs {
					if err := s.AddEncoded(d); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add((&Doc{}).Encode())
	f.Add(fleetDoc(1, 2, rand.New(rand.NewPCG(1, 2))).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Decode(b)
		var s Sum
		if again := s.AddEncoded(b); (err == nil) != (again == nil) {
			t.Fatalf("%v, %v", err, again)
		}
		if err != nil {
			return
		}
		if got := d.Encode(); !bytes.Equal(got, b) {
			if again, err := Decode(got); err != nil || !reflect.DeepEqual(again, d) {
				t.Fatalf("%v: %+v, not %+v", err, again, d)
			}
		}
	})
}

func FuzzLedger(f *testing.F) {
	f.Add([]byte(`"AQA"`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var l Ledger
		if json.Unmarshal(b, &l) != nil {
			return
		}
		out, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		var again Ledger
		if err := json.Unmarshal(out, &again); err != nil || !reflect.DeepEqual(again, l) {
			t.Fatalf("%v: %+v, not %+v", err, again, l)
		}
	})
}
