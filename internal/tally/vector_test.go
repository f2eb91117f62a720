package tally

import (
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// drawVectors are vectors as they come one after another: of any numbers, some of them with the totals of those before.
func drawVectors(t *rapid.T) [][]uint64 {
	var all [][]uint64
	for range rapid.IntRange(1, 5).Draw(t, "vectors") {
		xs := make([]uint64, rapid.OneOf(rapid.Just(128), rapid.IntRange(0, 300)).Draw(t, "cells"))
		rnd := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		width, zeros := rapid.IntRange(0, 64).Draw(t, "width"), rapid.IntRange(0, 4).Draw(t, "zeros")
		base := rapid.Uint64().Draw(t, "base") >> rapid.IntRange(0, 64).Draw(t, "shift")
		for i := range xs {
			if rnd.IntN(4) >= zeros {
				xs[i] = base + rnd.Uint64()>>(64-width)
			}
		}
		if len(all) > 0 && len(all[len(all)-1]) == 128 && rapid.Bool().Draw(t, "alike") {
			before := all[len(all)-1]
			xs = slices.Clone(before[:2*rapid.SampledFrom([]int{64, 64, 16, 1}).Draw(t, "pairs")])
			for i := 0; i < len(xs); i += 2 {
				if sum := xs[i] + xs[i+1]; sum >= xs[i] && sum < 1<<64-1 {
					xs[i+1] = rnd.Uint64N(sum + 1)
					xs[i] = sum - xs[i+1]
				}
			}
		}
		all = append(all, xs)
	}
	return all
}

// TestVector: whatever numbers a vector has, they are read again, and added; none above a limit is.
func TestVector(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := drawVectors(t)
		p := packer{}
		most := uint64(0)
		for _, xs := range all {
			if len(xs) > 0 {
				most = max(most, slices.Max(xs))
			}
			before := len(p.b)
			if p.vector(1, xs); len(xs) <= frameCells && len(p.b)-before > 1+columnSize(xs) {
				t.Fatalf("%d bytes, %d written plainly: %v", len(p.b)-before, 1+columnSize(xs), xs)
			}
		}
		limits := []uint64{most, 1<<64 - 1}
		if most > 0 {
			limits = append(limits, most-1, most/2)
		}
		for _, limit := range limits {
			r := &reader{b: append(slices.Clone(p.b), make([]byte, rapid.IntRange(0, 20).Draw(t, "behind"))...)}
			behind := len(r.b) - len(p.b)
			for _, xs := range all {
				got := make([]uint64, len(xs))
				for i := range got {
					got[i] = uint64(i)
				}
				if r.vector(1, got, limit); r.err != nil {
					break
				}
				for i := range got {
					if got[i] -= uint64(i); got[i] != xs[i] {
						t.Fatalf("cell %d of %v is %d", i, xs, got[i])
					}
				}
			}
			if (r.err != nil) != (limit < most) {
				t.Fatalf("with a limit of %d, and %d as the most: %v", limit, most, r.err)
			}
			if r.err == nil && len(r.b) != behind {
				t.Fatalf("%d bytes are left, not %d", len(r.b), behind)
			}
			r = &reader{b: p.b[:rapid.IntRange(0, max(len(p.b)-1, 0)).Draw(t, "cut")]}
			for _, xs := range all {
				r.vector(1, make([]uint64, len(xs)), 1<<64-1)
			}
			if r.err == nil && len(p.b) > 0 {
				t.Fatal("what is cut off is read")
			}
		}
	})
}

// TestVectorBits: what metrics count by groups of units takes about as many bits as it varies by; metrics that are recorded
// together say their totals once.
func TestVectorBits(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	totals := make([]uint64, framePairs)
	for i := range totals {
		totals[i] = 90_000 + rnd.Uint64N(1<<11)
	}
	p := packer{}
	for i := range 3 {
		xs := make([]uint64, frameCells)
		for g, n := range totals {
			xs[2*g+1] = 900 + rnd.Uint64N(1<<7)
			xs[2*g] = n - xs[2*g+1]
		}
		before := len(p.b)
		p.vector(1, xs)
		written, least := len(p.b)-before, framePairs*7/8
		if i == 0 {
			least += framePairs * 11 / 8
		}
		if written < least-8 || written > least+16 {
			t.Errorf("the vector %d has %d bytes, its numbers vary by %d", i, written, least)
		}
	}
	for i := range 65 { // a number of each width
		p := packer{}
		xs := []uint64{0, 1<<i - 1}
		p.column(xs)
		if want := 1 + (2*bits.Len64(xs[1])+7)/8; len(p.b) != want {
			t.Errorf("%d bytes for two numbers of %d bits, not %d", len(p.b), i, want)
		}
	}
}
