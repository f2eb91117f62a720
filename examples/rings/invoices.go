package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stagedrollout/rollout"
)

// book holds the new invoices.
type book struct {
	wrongFor string // ring

	mu     sync.Mutex // guards what follows
	last   int        // number
	made   map[int]string
	void   map[int]string // rings of both, by number
	undone []rollout.Effect
}

func newBook(wrongFor string) *book {
	return &book{wrongFor: wrongFor, made: map[int]string{}, void: map[int]string{}}
}

// buy has random customers buy something until ctx ends.
func buy(ctx context.Context, r *rollout.Rollout, b *book, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 7))
	for ctx.Err() == nil {
		u := rollout.Unit{Key: fmt.Sprint("us-", random.IntN(4000))}
		switch random.IntN(10) {
		case 0:
			u = rollout.Unit{Key: fmt.Sprint("us-", random.IntN(100)), Groups: []string{"staff"}}
		case 1, 2, 3:
			u.Key = fmt.Sprint("eu-", random.IntN(2000))
		}
		d, began := r.Decide(u), time.Now()
		err := sell(ctx, b, d, random.IntN(100))
		if ctx.Err() != nil || errors.Is(err, rollout.ErrRolledBack) {
			continue // the new way may not be taken any more: that says nothing about it
		}
		d.Record(rollout.Errors.Observe(err != nil), rollout.Latency.Observe(time.Since(began)))
	}
}

// sell pretends to sell something. Both ways fail once in a hundred times, but for the ring that the new one is wrong for.
func sell(ctx context.Context, b *book, d rollout.Decision, chance int) error {
	failing := 1
	if d.Enabled() {
		if d.Ring() == b.wrongFor {
			failing = 40
		}
		if err := b.invoice(ctx, d); err != nil {
			return err
		}
	}
	time.Sleep(4 * time.Millisecond)
	if chance < failing {
		return errors.New("the tax authority refuses it")
	}
	return nil
}

// invoice journals an invoice and makes it. Its number is known before, so that it can be undone by it.
func (b *book) invoice(ctx context.Context, d rollout.Decision) error {
	b.mu.Lock()
	b.last++
	n := b.last
	b.mu.Unlock()
	if err := d.Journal(ctx, "invoice", []byte(strconv.Itoa(n))); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, void := b.void[n]; void { // between Journal and here there was a rollback
		return fmt.Errorf("invoice %d: %w", n, rollout.ErrRolledBack)
	}
	b.made[n] = d.Ring()
	return nil
}

// undo makes an invoice void. It may be asked twice, and about one that is not made yet: none can have its number then.
func (b *book) undo(_ context.Context, e rollout.Effect) error {
	n, err := strconv.Atoi(string(e.Payload))
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.made, n)
	b.void[n] = e.Ring
	b.undone = append(b.undone, e)
	return nil
}

// of is how many invoices of a ring stand, and how many are void.
func (b *book) of(ring string) (made, void int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	count := func(rings map[int]string) (n int) {
		for _, r := range rings {
			if r == ring {
				n++
			}
		}
		return n
	}
	return count(b.made), count(b.void)
}

// summary says what was made void.
func (b *book) summary() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var first []string
	for _, e := range b.undone[:min(len(b.undone), 4)] {
		first = append(first, string(e.Payload))
	}
	return fmt.Sprintf("%d invoices are void, the newest first: %s …", len(b.undone), strings.Join(first, ", "))
}

// newestFirst reports whether what was journalled last was undone first.
func (b *book) newestFirst() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.IsSortedFunc(b.undone, func(x, y rollout.Effect) int { return y.Time.Compare(x.Time) })
}
