package rollout

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// A Store holds what the replicas of a rollout agree on: a handful of small
// values by key, each replaced as a whole and only by a writer who knew the
// one before. [MemStore] and [DirStore] are built in; other databases are
// reached through adapters, which need standard-library types only and so no
// import of this package.
//
// A key is a non-empty string of at most 1024 bytes without a NUL byte. A
// value is any sequence of bytes, also an empty one; no value is nil. The
// caller owns every value and map returned, and keeps the values it passes.
//
// All methods may be called from any number of goroutines. A context that has
// ended before the call makes every method but Watch return the context's
// error, with nothing done.
type Store interface {
	// Load returns the value of key and its revision. A key that does not
	// exist is no error: the value is nil and the revision 0. Load sees every
	// write that was acknowledged, by any process, before Load was called.
	Load(ctx context.Context, key string) (value []byte, revision uint64, err error)

	// List returns the value of every key that begins with prefix; the empty
	// prefix means all keys. It sees every write acknowledged before List was
	// called. It need not be one snapshot: of two writes made meanwhile, it
	// may show the later and not the earlier. With no such key the map is
	// empty.
	List(ctx context.Context, prefix string) (map[string][]byte, error)

	// CompareAndSwap replaces the value of key, provided that old is still
	// its revision, and returns the new revision.
	//
	// An old of 0 creates the key, provided that it does not exist. A nil
	// value deletes the key, and the revision returned is then 0, that of a
	// key that does not exist; an empty value that is not nil is stored.
	// Deleting a key that does not exist, with old 0, changes nothing and
	// reports true: the key is as the caller wants it.
	//
	// The result is one of three. (revision, true, nil): the write is done
	// and durable, as far as the store is. (0, false, nil): another writer
	// was first, and nothing was written. An error: the outcome is unknown;
	// the write may have been done, and may even land later. The caller then
	// Loads, and looks for its own write.
	//
	// A revision is never 0, and no revision is ever used twice for one key:
	// not after the key was deleted and made anew, and not after the whole
	// store was set back to an earlier copy of itself. A store that chooses
	// its revisions therefore draws them at random. They have no order.
	CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (revision uint64, swapped bool, err error)

	// Watch calls changed when something under prefix may have changed, and
	// blocks until ctx ends; then it returns nil. It calls from the
	// goroutine that called Watch, one call after the other, with no lock
	// held, so that changed may use the store.
	//
	// A call is a hint to Load again, no more. It comes once at the start,
	// again after each time the connection was lost, and after a change; but
	// one call may stand for many changes, above all if changed is slow, and a
	// call may come with no change at all. An adapter may lose a hint:
	// callers poll besides.
	//
	// An error before ctx ended means that watching is impossible, or not
	// any more. Losing the connection is no such error: Watch reconnects.
	Watch(ctx context.Context, prefix string, changed func()) error
}

// MemStore returns an empty store in the memory of this process. It is meant
// for tests and for programs whose rollouts may be forgotten: it ends with the
// process, and another process does not see it.
//
// The watchers of a prefix are told of every change under it, and of no other.
// MemStore starts no goroutine and needs no closing.
func MemStore() Store {
	return &memStore{entries: map[string]memEntry{}, watchers: map[*memWatcher]bool{}}
}

type memStore struct {
	mu       sync.Mutex // guards the two maps
	entries  map[string]memEntry
	watchers map[*memWatcher]bool
}

type memEntry struct {
	value    []byte // never nil, never written to
	revision uint64
}

type memWatcher struct {
	prefix string
	hint   chan struct{} // of capacity 1: full means that a hint is due
}

func (s *memStore) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	if err := checkStoreKey(key); err != nil {
		return nil, 0, err
	}
	s.mu.Lock()
	e := s.entries[key]
	s.mu.Unlock()
	return bytes.Clone(e.value), e.revision, nil
}

func (s *memStore) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	found := map[string][]byte{}
	for key, e := range s.entries {
		if strings.HasPrefix(key, prefix) {
			found[key] = bytes.Clone(e.value)
		}
	}
	return found, nil
}

func (s *memStore) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	if err := checkStoreKey(key); err != nil {
		return 0, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[key].revision != old {
		return 0, false, nil
	}
	if value == nil {
		if old == 0 {
			return 0, true, nil
		}
		delete(s.entries, key)
		s.hintLocked(key)
		return 0, true, nil
	}
	e := memEntry{bytes.Clone(value), newStoreRevision(old)}
	s.entries[key] = e
	s.hintLocked(key)
	return e.revision, true, nil
}

func (s *memStore) hintLocked(key string) {
	for w := range s.watchers {
		if !strings.HasPrefix(key, w.prefix) {
			continue
		}
		select {
		case w.hint <- struct{}{}:
		default: // one is due already
		}
	}
}

func (s *memStore) Watch(ctx context.Context, prefix string, changed func()) error {
	if changed == nil {
		return errStoreWatchNil
	}
	w := &memWatcher{prefix, make(chan struct{}, 1)}
	w.hint <- struct{}{} // the one at the start
	s.mu.Lock()
	s.watchers[w] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watchers, w)
		s.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.hint:
		}
		if ctx.Err() != nil { // both were ready
			return nil
		}
		changed()
	}
}

var errStoreWatchNil = errors.New("rollout: Store.Watch: changed is nil")

const maxStoreKey = 1024

// checkStoreKey reports what is wrong with key, for every built-in store alike,
// so that a test with MemStore finds what DirStore would refuse.
func checkStoreKey(key string) error {
	switch {
	case key == "":
		return errors.New(`rollout: store key "" is empty`)
	case len(key) > maxStoreKey:
		return fmt.Errorf("rollout: store key %.40q... has %d bytes, more than %d", key, len(key), maxStoreKey)
	case strings.IndexByte(key, 0) >= 0:
		return fmt.Errorf("rollout: store key %q has a NUL byte", key)
	}
	return nil
}

// newStoreRevision draws a revision of 63 random bits that is neither 0 nor old.
// The bits are the operating system's: a generator in this process could
// repeat itself in a virtual machine that was set back or copied.
func newStoreRevision(old uint64) uint64 {
	for {
		var b [8]byte
		rand.Read(b[:]) // never fails, see its documentation
		if r := binary.LittleEndian.Uint64(b[:]) >> 1; r != 0 && r != old {
			return r
		}
	}
}
