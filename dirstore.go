package rollout

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// DirStore returns the store kept in the directory dir, a file for each key. It
// outlives the process, and the processes of one machine may share it, provided
// that they run as one user. An absent directory is made, for this user alone.
//
// A write is atomic and has reached the disk when it is acknowledged. It takes
// an advisory lock on the directory, which no crash leaves behind, and waits
// for other writers until its context ends, so a process that is stopped in the
// middle of a write holds others up no longer than they allow; what the
// operating system makes them wait for, such as a disk that hangs, does. Reads
// take no lock. They may show a write shortly before it is acknowledged.
//
// Watch looks for a change of any key, whatever the prefix, every 100
// milliseconds.
//
// The directory must be on a local disk. Network file systems are not
// supported: their locks and renames do not keep these promises. Nor are
// operating systems without flock, such as Windows, where DirStore returns an
// error that wraps [errors.ErrUnsupported].
//
// It returns an error if dir cannot be made, is not a directory or cannot be
// written to. Later, a file of the store that is damaged, or was written in a
// newer format, is an error of every call that needs its key. It names the file
// and leaves it alone: the key is neither absent nor free until somebody has
// moved the file away. If the whole directory goes away, as when a volume is
// unmounted, all calls fail rather than find no keys.
//
// Other files in the directory are left alone, unless their names begin with
// ".tmp-".
//
// DirStore starts no goroutine, keeps no file open and needs no closing.
func DirStore(dir string) (Store, error) {
	s, err := openDirStore(dir)
	if err != nil {
		return nil, fmt.Errorf("rollout: DirStore %q: %w", dir, err)
	}
	return s, nil
}

const (
	dirLockFile = ".lock"    // locked while writing; made when the store is opened, and never again
	dirMarkFile = ".mark"    // a random text, another one after each change
	dirTmpName  = ".tmp-"    // and 16 hexadecimal digits: not yet, or never, a file of the store
	dirSuffix   = ".rollout" // ends the name of every key's file

	dirPoll    = 100 * time.Millisecond // of the mark
	dirMinWait = time.Millisecond       // for the lock
	dirMaxWait = 10 * time.Millisecond
)

type dirStore struct {
	dir string        // absolute
	ops dirOps        // what can fail in a write
	sem chan struct{} // of capacity 1: held by the goroutine that writes through this handle; guards swept

	swept bool // temporary files of crashed writers have been removed
}

// dirOps are the operations of a write on files, for tests to make them fail.
type dirOps struct {
	write  func(f *os.File, b []byte) error
	sync   func(f *os.File) error // a file, or the directory
	rename func(from, to string) error
	remove func(path string) error
}

func openDirStore(dir string) (*dirStore, error) {
	if !dirLockSupported {
		return nil, fmt.Errorf("no file locks on %s: %w", runtime.GOOS, errors.ErrUnsupported)
	}
	if dir == "" {
		return nil, errors.New("no directory named")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &dirStore{dir: dir, sem: make(chan struct{}, 1)}
	s.ops = dirOps{
		write:  func(f *os.File, b []byte) error { _, err := f.Write(b); return err },
		sync:   (*os.File).Sync,
		rename: os.Rename,
		remove: os.Remove,
	}
	if err := s.makeDir(dir); err != nil {
		return nil, err
	}

	// Find out now whether it can be locked and written to.
	lock, err := os.OpenFile(s.path(dirLockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	locked, err := tryDirLock(lock)
	if err != nil {
		return nil, err
	}
	if locked { // else another process writes; then the first write sweeps
		defer dirUnlock(lock)
		s.sweep()
	}
	probe, err := s.writeTmp([]byte("probe"), false)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(probe); err != nil && !errors.Is(err, fs.ErrNotExist) { // another process may have swept it
		return nil, err
	}
	// What can be read from here on survives a loss of power, even if its
	// writer died before it could see to that.
	return s, s.syncDir(dir)
}

// makeDir makes dir and what is missing above it, durably.
func (s *dirStore) makeDir(dir string) error {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		return &os.PathError{Op: "open", Path: dir, Err: errors.New("not a directory")}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := s.makeDir(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return s.syncDir(parent)
}

func (s *dirStore) path(name string) string { return filepath.Join(s.dir, name) }

func (s *dirStore) Load(ctx context.Context, key string) ([]byte, uint64, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	if err := checkStoreKey(key); err != nil {
		return nil, 0, err
	}
	e, err := s.read(key)
	if err != nil {
		return nil, 0, fmt.Errorf("rollout: DirStore: load key %q: %w", key, err)
	}
	return e.value, e.revision, nil
}

// read returns the entry of key, the zero entry if there is none.
func (s *dirStore) read(key string) (dirEntry, error) {
	e, err := s.readFile(dirKeyName(key))
	if errors.Is(err, fs.ErrNotExist) {
		// No key, or no store?
		if _, err := os.Lstat(s.path(dirLockFile)); err != nil {
			return dirEntry{}, fmt.Errorf("the directory was removed, replaced or unmounted: %w", err)
		}
		return dirEntry{}, nil
	}
	return e, err
}

// readFile reads the file of a key. An error wraps fs.ErrNotExist only if the
// file does not exist.
func (s *dirStore) readFile(name string) (dirEntry, error) {
	b, err := os.ReadFile(s.path(name))
	if err != nil {
		return dirEntry{}, err
	}
	e, err := parseDirFile(b)
	if err == nil && dirKeyName(e.key) != name {
		err = fmt.Errorf("holds key %q, which belongs in %s", e.key, dirKeyName(e.key))
	}
	if err != nil {
		return dirEntry{}, fmt.Errorf("file %s: %w", s.path(name), err)
	}
	return e, nil
}

func (s *dirStore) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	found, err := s.list(ctx, prefix)
	if err != nil && err != ctx.Err() {
		err = fmt.Errorf("rollout: DirStore: list keys %q: %w", prefix, err)
	}
	return found, err
}

func (s *dirStore) list(ctx context.Context, prefix string) (map[string][]byte, error) {
	// Some file systems may miss a file that is replaced while they read the
	// directory. Two readings in a row do not both miss it.
	names := map[string]bool{}
	for range 2 {
		entries, err := os.ReadDir(s.dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			names[e.Name()] = true
		}
	}
	if !names[dirLockFile] {
		return nil, errors.New("the directory was removed, replaced or unmounted")
	}

	found := map[string][]byte{}
	for name := range names {
		if !dirNameMayBegin(name, prefix) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		e, err := s.readFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(e.key, prefix) {
			found[e.key] = e.value
		}
	}
	return found, nil
}

func (s *dirStore) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (uint64, bool, error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	if err := checkStoreKey(key); err != nil {
		return 0, false, err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return 0, false, fmt.Errorf("rollout: DirStore: lock to write key %q: %w", key, err)
	}
	defer unlock()
	revision, swapped, err := s.swapLocked(key, old, value)
	if err != nil {
		return 0, false, fmt.Errorf("rollout: DirStore: write key %q: %w", key, err)
	}
	return revision, swapped, nil
}

// lock waits until ctx ends for the right to write, first among the goroutines
// of this handle, then among all handles and processes.
func (s *dirStore) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case s.sem <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for wait := dirMinWait; ; wait = min(2*wait, dirMaxWait) {
		f, err := s.tryLock()
		if err == nil && f != nil && ctx.Err() != nil {
			dirUnlock(f)
			f.Close()
			f, err = nil, ctx.Err()
		}
		if err != nil {
			<-s.sem
			return nil, err
		}
		if f != nil {
			return func() {
				dirUnlock(f)
				f.Close()
				<-s.sem
			}, nil
		}
		timer := time.NewTimer(wait/2 + rand.N(wait/2))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			<-s.sem
			return nil, fmt.Errorf("somebody else holds %s: %w", s.path(dirLockFile), ctx.Err())
		}
	}
}

// tryLock returns the locked file, or nil if somebody else has locked it.
func (s *dirStore) tryLock() (*os.File, error) {
	// Not made if absent: that would hide that the directory was replaced.
	f, err := os.OpenFile(s.path(dirLockFile), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if locked, err := tryDirLock(f); err != nil || !locked {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *dirStore) swapLocked(key string, old uint64, value []byte) (uint64, bool, error) {
	if !s.swept {
		s.sweep()
	}
	e, err := s.read(key)
	if err != nil {
		return 0, false, err
	}
	if e.revision != old {
		return 0, false, nil
	}
	path := s.path(dirKeyName(key))
	if value == nil {
		if old == 0 {
			return 0, true, nil
		}
		err := s.ops.remove(path)
		return 0, true, errors.Join(err, s.settle())
	}

	revision := newStoreRevision(old)
	tmp, err := s.writeTmp(formatDirFile(dirEntry{key, revision, value}), true)
	if err != nil {
		return 0, false, err
	}
	if err = s.ops.rename(tmp, path); err != nil {
		s.discard(tmp)
	}
	return revision, true, errors.Join(err, s.settle())
}

// settle ends a write: it makes it durable and tells the watchers, in any case,
// as the write may have been done even if there was an error.
func (s *dirStore) settle() error {
	err := s.syncDir(s.dir)
	tmp, markErr := s.writeTmp(fmt.Appendf(nil, "%016x\n", newStoreRevision(0)), false)
	if markErr == nil {
		if markErr = s.ops.rename(tmp, s.path(dirMarkFile)); markErr != nil {
			s.discard(tmp)
		}
	}
	return errors.Join(err, markErr)
}

// writeTmp writes b to a new temporary file and returns its path. With sync, it
// has reached the disk.
func (s *dirStore) writeTmp(b []byte, sync bool) (string, error) {
	path := s.path(fmt.Sprintf("%s%016x", dirTmpName, newStoreRevision(0)))
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	err = s.ops.write(f, b)
	if err == nil && sync {
		err = s.ops.sync(f)
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		s.discard(path)
		return "", err
	}
	return path, nil
}

// discard removes a temporary file, or leaves that to the next write.
func (s *dirStore) discard(tmp string) {
	if err := s.ops.remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.swept = false
	}
}

// sweep removes the temporary files of writers that crashed. The lock must be
// held: nobody else is writing.
func (s *dirStore) sweep() {
	entries, err := os.ReadDir(s.dir)
	s.swept = err == nil
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), dirTmpName) {
			s.discard(s.path(e.Name()))
		}
	}
}

func (s *dirStore) syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return s.ops.sync(d)
}

func (s *dirStore) Watch(ctx context.Context, prefix string, changed func()) error {
	if changed == nil {
		return errStoreWatchNil
	}
	ticker := time.NewTicker(dirPoll)
	defer ticker.Stop()
	for last := ""; ctx.Err() == nil; {
		// A mark that cannot be read counts as a mark of its own, so that
		// there is a hint as soon as it can be read again.
		b, err := os.ReadFile(s.path(dirMarkFile))
		mark := "mark " + string(b)
		if err != nil {
			mark = "error " + err.Error()
		}
		if mark != last { // always so at the start
			last = mark
			changed()
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
	return nil
}
