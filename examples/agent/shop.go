package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"github.com/stagedrollout/rollout"
)

// shop is what the agents change: orders of replacements, and their shipments.
type shop struct {
	mu      sync.Mutex // guards what follows
	last    int        // number of an order
	orders  map[int]*order
	void    map[int]bool // numbers under which nothing can be ordered any more
	undone  []rollout.Effect
	refused int // shipments and orders that came too late
}

type order struct {
	version string // of the agent
	shipped bool
}

func newShop() *shop { return &shop{orders: map[int]*order{}, void: map[int]bool{}} }

// replace orders a replacement and ships it: two effects, each journalled before it is made. An error says that the
// second, or both, were not.
func (s *shop) replace(ctx context.Context, d rollout.Decision, version string) error {
	s.mu.Lock()
	s.last++
	n := s.last
	s.mu.Unlock()
	number := []byte(strconv.Itoa(n)) // it is known before the order is made, so that it can be undone by it
	if err := d.Journal(ctx, "order", number); err != nil {
		return err
	}
	if err := s.make(n, func() { s.orders[n] = &order{version: version} }); err != nil {
		return err
	}
	if err := d.Journal(ctx, "shipment", number); err != nil {
		return err
	}
	return s.make(n, func() { s.orders[n].shipped = true })
}

// make makes an effect, unless it was undone already: between Journal and the effect there may have been a rollback.
func (s *shop) make(n int, effect func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.void[n] {
		s.refused++
		return fmt.Errorf("order %d is void: %w", n, rollout.ErrRolledBack)
	}
	effect()
	return nil
}

// undoShipment calls a shipment back. It may be asked twice, and about one that was never made.
func (s *shop) undoShipment(_ context.Context, e rollout.Effect) error {
	return s.undo(e, func(o *order) error {
		o.shipped = false
		return nil
	})
}

// undoOrder cancels an order; one that is shipped cannot be. It may be asked twice, and about one that was never made.
func (s *shop) undoOrder(_ context.Context, e rollout.Effect) error {
	return s.undo(e, func(o *order) error {
		if o.shipped {
			return errors.New("its shipment must be called back first")
		}
		return nil
	})
}

func (s *shop) undo(e rollout.Effect, effect func(*order) error) error {
	n, err := strconv.Atoi(string(e.Payload))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.void[n] = true
	if o := s.orders[n]; o != nil {
		if err := effect(o); err != nil {
			return fmt.Errorf("order %d: %w", n, err)
		}
		if e.Kind == "order" {
			delete(s.orders, n)
		}
	}
	s.undone = append(s.undone, e)
	return nil
}

// by is how many orders of an agent's version there are.
func (s *shop) by(version string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.orders {
		if o.version == version {
			n++
		}
	}
	return n
}

// check reports what of a version was not undone, or not the newest first.
func (s *shop) check(m model) error {
	if n := s.by(m.version); n > 0 {
		return fmt.Errorf("%d orders of %s were not undone", n, m.version)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.undone) < 2:
		return errors.New("nothing was undone")
	case !slices.IsSortedFunc(s.undone, func(a, b rollout.Effect) int { return b.Time.Compare(a.Time) }):
		return errors.New("what was done was not undone the newest first")
	}
	return nil
}
