package rollout

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stagedrollout/rollout/storetest"
)

func openDir(t testing.TB, dir string) *dirStore {
	t.Helper()
	if !dirLockSupported {
		t.Skip("no file locks")
	}
	s, err := DirStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s.(*dirStore)
}

func TestDirStore(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Backend {
		dir := t.TempDir()
		return storetest.Backend{
			Open: func(t testing.TB) storetest.Store { return openDir(t, dir) },
			Snapshot: func(t testing.TB) func(testing.TB) {
				saved := t.TempDir()
				if err := os.CopyFS(saved, os.DirFS(dir)); err != nil {
					t.Fatal(err)
				}
				return func(t testing.TB) {
					if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(saved))); err != nil {
						t.Fatal(err)
					}
				}
			},
		}
	})
	testBuiltInStore(t, func(t *testing.T) (a, b Store) {
		dir := t.TempDir()
		return openDir(t, dir), openDir(t, dir)
	})
}

func TestDirStoreModel(t *testing.T) {
	testStoreModel(t, func() (a, b Store) {
		dir := t.TempDir()
		x, y := openDir(t, dir), openDir(t, dir)
		x.ops.sync = func(*os.File) error { return nil } // this test is about neither
		y.ops.sync = x.ops.sync
		return x, y
	})
}

func TestDirStoreUnsupported(t *testing.T) {
	if dirLockSupported {
		t.Skip("there are file locks")
	}
	if s, err := DirStore(t.TempDir()); s != nil || !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("DirStore = %v, %v, want %v", s, err, errors.ErrUnsupported)
	}
}

func TestDirStoreOpen(t *testing.T) {
	openDir(t, t.TempDir()) // or skip
	t.Run("Made", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "a", "b")
		openDir(t, dir)
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%v, %v", info, err)
		}
		if got := dirFileNames(t, dir); !slices.Equal(got, []string{dirLockFile}) {
			t.Errorf("files %q", got)
		}
	})
	t.Run("Relative", func(t *testing.T) {
		t.Chdir(t.TempDir())
		s := openDir(t, "store")
		rev := storeSwap(t, s, "k", 0, []byte("v"))
		t.Chdir(t.TempDir())
		storeLoad(t, s, "k", []byte("v"), rev)
	})
	refused := func(t *testing.T, dir, want string) {
		t.Helper()
		s, err := DirStore(dir)
		if s != nil || err == nil || !strings.Contains(err.Error(), strconv.Quote(dir)) || !strings.Contains(err.Error(), want) {
			t.Errorf("DirStore = %v, %v, want an error with %q and %q", s, err, dir, want)
		}
	}
	t.Run("NoName", func(t *testing.T) { refused(t, "", "no directory named") })
	t.Run("File", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, file, "not a directory")
		refused(t, filepath.Join(file, "below"), "not a directory")
	})
	t.Run("ReadOnly", func(t *testing.T) {
		if os.Geteuid() == 0 {
			t.Skip("root may write everywhere")
		}
		dir := t.TempDir()
		openDir(t, dir)
		if err := os.Chmod(dir, 0o500); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Chmod(dir, 0o700) })
		refused(t, dir, "permission denied")
		refused(t, filepath.Join(dir, "below"), "permission denied")
	})
}

func TestDirStoreReopen(t *testing.T) {
	dir := t.TempDir()
	used := map[uint64]bool{}
	for i := range 5 {
		for j := range 5 {
			s := openDir(t, dir)
			_, rev, err := s.Load(t.Context(), "k")
			if err != nil || (rev == 0) != (j == 0) {
				t.Fatal(rev, err)
			}
			v := fmt.Append(nil, i, j)
			rev = storeSwap(t, s, "k", rev, v)
			if used[rev] {
				t.Fatalf("revision %d came twice", rev)
			}
			used[rev] = true
			storeLoad(t, openDir(t, dir), "k", v, rev)
		}
		s := openDir(t, dir)
		_, rev, _ := s.Load(t.Context(), "k")
		storeSwap(t, s, "k", rev, nil)
	}
}

// A store that is set back gives other revisions to what it writes then.
func TestDirStoreRestored(t *testing.T) {
	dir, saved := t.TempDir(), filepath.Join(t.TempDir(), "saved")
	s := openDir(t, dir)
	r1 := storeSwap(t, s, "k", 0, []byte("v1"))
	if err := os.CopyFS(saved, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	hints := storeWatch(t, s, "")
	storeWait(t, hints)
	r2 := storeSwap(t, s, "k", r1, []byte("v2"))
	storeWait(t, hints)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	storeWait(t, hints) // the mark is gone
	if err := os.CopyFS(dir, os.DirFS(saved)); err != nil {
		t.Fatal(err)
	}
	storeWait(t, hints)
	storeLoad(t, s, "k", []byte("v1"), r1)
	storeLose(t, s, "k", r2, []byte("v3"))
	if r := storeSwap(t, s, "k", r1, []byte("v2")); r == r2 {
		t.Error("the same revision again")
	}
}

// A directory that went away is not an empty store.
func TestDirStoreGone(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{
		"directory": os.RemoveAll,
		"emptied":   func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "store")
			s := openDir(t, dir)
			rev := storeSwap(t, s, "k", 0, []byte("v"))
			if err := remove(dir); err != nil {
				t.Fatal(err)
			}
			_, _, err1 := s.Load(t.Context(), "k")
			_, err2 := s.List(t.Context(), "")
			_, _, err3 := s.CompareAndSwap(t.Context(), "k", rev, []byte("v"))
			_, _, err4 := s.CompareAndSwap(t.Context(), "k", 0, []byte("v"))
			for i, err := range []error{err1, err2, err3, err4} {
				if err == nil {
					t.Errorf("call %d: no error", i)
				}
			}
			if names, _ := filepath.Glob(filepath.Join(dir, ".*")); len(names) != 0 {
				t.Errorf("made again: %q", names)
			}
		})
	}
}

func TestDirStoreDamaged(t *testing.T) {
	good := formatDirFile(dirEntry{"a/k", 12345, []byte("value")})
	for name, test := range map[string]struct {
		file []byte
		want string
	}{
		"empty":        {nil, "damaged"},
		"garbage":      {[]byte("garbage"), "damaged"},
		"header":       {good[:30], "damaged: bad header"},
		"truncated":    {good[:len(good)-1], "a value of 4 bytes, not 5"},
		"appended":     {append(bytes.Clone(good), '\n'), "a value of 6 bytes, not 5"},
		"value":        {bytes.Replace(good, []byte("value"), []byte("valve"), 1), "wrong checksum"},
		"revision":     {bytes.Replace(good, []byte("3039"), []byte("3038"), 1), "wrong checksum"},
		"key":          {bytes.Replace(good, []byte("a/k"), []byte("b/k"), 1), "wrong checksum"},
		"newer":        {bytes.Replace(good, []byte(" 1 "), []byte(" 2 7 "), 1), "format 2"},
		"other's file": {formatDirFile(dirEntry{"b/k", 12345, []byte("value")}), `holds key "b/k"`},
	} {
		t.Run(name, func(t *testing.T) {
			s := openDir(t, t.TempDir())
			storeSwap(t, s, "b", 0, []byte("v"))
			path := s.path(dirKeyName("a/k"))
			if err := os.WriteFile(path, test.file, 0o600); err != nil {
				t.Fatal(err)
			}
			_, _, err1 := s.Load(t.Context(), "a/k")
			_, err2 := s.List(t.Context(), "a")
			_, err3 := s.List(t.Context(), "")
			errs := []error{err1, err2, err3}
			for _, old := range []uint64{0, 12345} {
				for _, v := range [][]byte{nil, []byte("new")} {
					_, _, err := s.CompareAndSwap(t.Context(), "a/k", old, v)
					errs = append(errs, err)
				}
			}
			for i, err := range errs {
				if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), test.want) {
					t.Errorf("call %d: error %v, want one with %q and %q", i, err, path, test.want)
				}
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, test.file) {
				t.Errorf("the file now holds %q, %v", got, err)
			}
			// The other keys are well.
			if got, err := s.List(t.Context(), "b"); err != nil || len(got) != 1 {
				t.Errorf("List = %q, %v", got, err)
			}
			// Moved away, the key is free.
			if err := os.Rename(path, path+".damaged"); err != nil {
				t.Fatal(err)
			}
			storeSwap(t, s, "a/k", 0, []byte("new"))
		})
	}
}

// Other files in the directory are no keys and are left alone.
func TestDirStoreForeign(t *testing.T) {
	dir := t.TempDir()
	others := []string{"README", ".hidden", "k.rollout~", "K.rollout", "k copy.rollout", ".rollout", "%zz.rollout", "%61.rollout", "k~1.rollout", "%00.rollout"}
	for _, name := range others {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("other"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := openDir(t, dir)
	storeSwap(t, s, "key", 0, []byte("v"))
	if got, err := s.List(t.Context(), ""); err != nil || len(got) != 1 {
		t.Errorf("List = %q, %v", got, err)
	}
	want := append(others, dirLockFile, dirMarkFile, "key.rollout")
	slices.Sort(want)
	if got := dirFileNames(t, dir); !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
}

func TestDirStoreLeftovers(t *testing.T) {
	dir := t.TempDir()
	s := openDir(t, dir)
	rev := storeSwap(t, s, "k", 0, []byte("v"))
	tmp := filepath.Join(dir, dirTmpName+"0123456789abcdef")
	leave := func() {
		t.Helper()
		if err := os.WriteFile(tmp, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	left := func() bool {
		_, err := os.Stat(tmp)
		return err == nil
	}
	leave()
	openDir(t, dir)
	if left() {
		t.Error("left after opening")
	}

	// Somebody is writing: his file stays until he is done.
	unlock, err := s.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	leave()
	s2 := openDir(t, dir)
	if !left() {
		t.Error("removed without the lock")
	}
	unlock()
	storeLoad(t, s2, "k", []byte("v"), rev)
	storeSwap(t, s2, "k", rev, []byte("v2"))
	if left() {
		t.Error("left after the first write")
	}
}

// Who cannot have the lock waits as long as its context says, and reads
// nevertheless.
func TestDirStoreLocked(t *testing.T) {
	dir := t.TempDir()
	a, b := openDir(t, dir), openDir(t, dir)
	rev := storeSwap(t, a, "k", 0, []byte("v"))
	unlock, err := a.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []Store{a, b} { // by this handle, by another
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, ok, err := s.CompareAndSwap(ctx, "k", rev, []byte("v2"))
		cancel()
		if ok {
			t.Error("swapped")
		}
		storeTimeout(t, err)
		storeLoad(t, s, "k", []byte("v"), rev)
		if got, err := s.List(t.Context(), ""); err != nil || len(got) != 1 {
			t.Errorf("List = %q, %v", got, err)
		}
	}
	done := make(chan error)
	for _, s := range []Store{a, b} {
		go func() { done <- storeIncrement(t.Context(), s, "n", 1) }()
	}
	unlock()
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// A lock file that was removed is made anew by opening the store, and only so;
// whoever still holds the old one holds up nobody.
func TestDirStoreLockReplaced(t *testing.T) {
	s := openDir(t, t.TempDir())
	f, err := os.OpenFile(s.path(dirLockFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if ok, err := tryDirLock(f); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := os.Remove(s.path(dirLockFile)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.CompareAndSwap(t.Context(), "k", 0, []byte("v")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a lock file: %v", err)
	}
	storeSwap(t, openDir(t, s.dir), "k", 0, []byte("v"))
	storeSwap(t, s, "k2", 0, []byte("v"))
}

// List finds every key that is there all the time, however often it is replaced.
func TestDirStoreListWhileWriting(t *testing.T) {
	processors(t)
	dir := t.TempDir()
	a, b := openDir(t, dir), openDir(t, dir)
	a.ops.sync = func(*os.File) error { return nil }
	const n = 50
	revs := make([]uint64, n)
	for i := range n {
		revs[i] = storeSwap(t, a, fmt.Sprint("k", i), 0, []byte("v"))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i = (i + 1) % n {
			rev, ok, err := a.CompareAndSwap(t.Context(), fmt.Sprint("k", i), revs[i], []byte("v"))
			if revs[i] = rev; !ok || err != nil {
				t.Error(ok, err)
				return
			}
			if _, _, err := a.CompareAndSwap(t.Context(), "gone", 0, []byte("v")); err != nil {
				t.Error(err)
			}
			if _, rev, err := a.Load(t.Context(), "gone"); err != nil {
				t.Error(err)
			} else if _, _, err := a.CompareAndSwap(t.Context(), "gone", rev, nil); err != nil {
				t.Error(err)
			}
		}
	})
	for range 100 {
		got, err := b.List(t.Context(), "k")
		if err != nil || len(got) != n {
			t.Errorf("%d keys, %v, want %d", len(got), err, n)
		}
		if _, err := b.List(t.Context(), ""); err != nil {
			t.Error(err)
		}
	}
	cancel()
	wg.Wait()
}

// dirSteps calls step before and after each operation of a write on files, and
// in the middle of each write, and lets it end the operation with an error.
func dirSteps(s *dirStore, step func(name string) error) {
	real := s.ops
	s.ops.write = func(f *os.File, b []byte) error {
		if err := step("before write"); err != nil {
			return err
		}
		if err := real.write(f, b[:len(b)/2]); err != nil {
			return err
		}
		if err := step("in write"); err != nil {
			return err
		}
		if err := real.write(f, b[len(b)/2:]); err != nil {
			return err
		}
		return step("after write")
	}
	around := func(name string, op func() error) error {
		if err := step("before " + name); err != nil {
			return err
		}
		if err := op(); err != nil {
			return err
		}
		return step("after " + name)
	}
	s.ops.sync = func(f *os.File) error { return around("sync", func() error { return real.sync(f) }) }
	s.ops.rename = func(from, to string) error { return around("rename", func() error { return real.rename(from, to) }) }
	s.ops.remove = func(path string) error { return around("remove", func() error { return real.remove(path) }) }
}

// The value is on the disk before it takes its name, the name before the write
// is acknowledged, and the watchers are told when there is something to read.
func TestDirStoreOrder(t *testing.T) {
	s := openDir(t, t.TempDir())
	real := s.ops
	var got []string
	name := func(path string) string {
		if strings.HasPrefix(filepath.Base(path), dirTmpName) {
			return "tmp"
		}
		return filepath.Base(path)
	}
	s.ops = dirOps{
		write: func(f *os.File, b []byte) error { got = append(got, "write "+name(f.Name())); return real.write(f, b) },
		sync:  func(f *os.File) error { got = append(got, "sync "+name(f.Name())); return real.sync(f) },
		rename: func(from, to string) error {
			got = append(got, "rename "+name(from)+" "+name(to))
			return real.rename(from, to)
		},
		remove: func(path string) error { got = append(got, "remove "+name(path)); return real.remove(path) },
	}
	settled := []string{"sync " + name(s.dir), "write tmp", "rename tmp " + dirMarkFile}
	rev := storeSwap(t, s, "k", 0, []byte("v"))
	if want := append([]string{"write tmp", "sync tmp", "rename tmp k.rollout"}, settled...); !slices.Equal(got, want) {
		t.Errorf("steps %q, want %q", got, want)
	}
	got = nil
	storeLose(t, s, "k", 0, []byte("v"))
	if got != nil {
		t.Errorf("steps %q when refused", got)
	}
	storeSwap(t, s, "k", rev, nil)
	if want := append([]string{"remove k.rollout"}, settled...); !slices.Equal(got, want) {
		t.Errorf("steps %q, want %q", got, want)
	}
}

// Whatever operation fails, the error is returned, the value is the old or the
// new one, and the store goes on.
func TestDirStoreFaults(t *testing.T) {
	errFault := errors.New("fault")
	for name, values := range map[string][2][]byte{
		"create":  {nil, []byte("new value")},
		"replace": {[]byte("old value"), []byte("new value")},
		"delete":  {[]byte("old value"), nil},
	} {
		for _, lasting := range []bool{false, true} { // the first operation only, or all from there on
			t.Run(fmt.Sprintf("%s/%v", name, lasting), func(t *testing.T) {
				var before, after bool
				for n := 1; ; n++ {
					s := openDir(t, t.TempDir())
					var rev uint64
					if values[0] != nil {
						rev = storeSwap(t, s, "k", 0, values[0])
					}
					mark, _ := os.ReadFile(s.path(dirMarkFile))
					real, i, at := s.ops, 0, ""
					dirSteps(s, func(name string) error {
						if i++; i == n || lasting && i > n {
							at = cmp.Or(at, name)
							return errFault
						}
						return nil
					})
					newRev, ok, err := s.CompareAndSwap(t.Context(), "k", rev, values[1])
					s.ops = real
					if at == "" {
						if err != nil || !ok {
							t.Errorf("no fault: %v, %v", ok, err)
						}
						t.Logf("%d faults", n-1)
						break
					}
					if newRev != 0 || ok || !errors.Is(err, errFault) || !strings.Contains(err.Error(), `"k"`) {
						t.Errorf("%s: %d, %v, %v", at, newRev, ok, err)
					}
					got, gotRev, err := s.Load(t.Context(), "k")
					switch {
					case err != nil:
						t.Errorf("%s: %v", at, err)
					case bytes.Equal(got, values[0]) && gotRev == rev:
						before = true
						if after {
							t.Errorf("%s: step %d: the old value, but an earlier fault had left the new one", at, n)
						}
					case bytes.Equal(got, values[1]) && gotRev != rev:
						after = true
						if m, _ := os.ReadFile(s.path(dirMarkFile)); !lasting && at != "before rename" && !strings.HasSuffix(at, "write") && bytes.Equal(m, mark) {
							t.Errorf("%s: changed without a hint", at)
						}
					default:
						t.Errorf("%s: value %q, revision %d", at, got, gotRev)
					}
					gotRev = storeSwap(t, s, "k", gotRev, []byte("next"))
					storeLoad(t, s, "k", []byte("next"), gotRev)
					dirNoTmp(t, s.dir)
				}
				if !before || !after {
					t.Errorf("before %v, after %v: the faults were not all in the write", before, after)
				}
			})
		}
	}
}

func dirFileNames(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func dirNoTmp(t *testing.T, dir string) {
	t.Helper()
	for _, name := range dirFileNames(t, dir) {
		if strings.HasPrefix(name, dirTmpName) {
			t.Errorf("left over: %s", name)
		}
	}
}

// The tests with several processes start this test binary again, to run this
// test alone.
const dirChildEnv = "ROLLOUT_TEST_DIRSTORE_CHILD"

func TestDirStoreChild(t *testing.T) {
	args := strings.Split(os.Getenv(dirChildEnv), "|")
	if len(args) != 3 {
		t.Skip("not a child")
	}
	s := openDir(t, args[1])
	n, err := strconv.Atoi(args[2])
	if err != nil {
		t.Fatal(err)
	}
	switch args[0] {
	case "increment": // n times
		if err := storeIncrement(t.Context(), s, "n", n); err != nil {
			t.Fatal(err)
		}
	case "replace", "delete": // and die at the step n
		_, rev, err := s.Load(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		i := 0
		dirSteps(s, func(string) error {
			if i++; i == n {
				self, _ := os.FindProcess(os.Getpid())
				_ = self.Kill()
				select {}
			}
			return nil
		})
		v := dirChildValue(2)
		if args[0] == "delete" {
			v = nil
		}
		storeSwap(t, s, "k", rev, v)
	case "write": // until killed, n goroutines
		for i := range n {
			go func() {
				for {
					key := fmt.Sprint("k", rand.N(3))
					_, rev, err := s.Load(t.Context(), key)
					if err != nil {
						t.Error(err)
					}
					var v []byte
					if j := rand.N(100); j > 10 {
						v = dirChildValue(j)
					}
					if _, _, err := s.CompareAndSwap(t.Context(), key, rev, v); err != nil {
						t.Error(err)
					}
					fmt.Println("written", i)
				}
			}()
		}
		select {}
	}
}

// dirChildValue returns a value that shows whether it is whole.
func dirChildValue(n int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%d,", n), n*n)
}

func wholeDirChildValue(v []byte) bool {
	first, _, _ := bytes.Cut(v, []byte{','})
	n, err := strconv.Atoi(string(first))
	return err == nil && bytes.Equal(v, dirChildValue(n))
}

func dirChild(t *testing.T, mode, dir string, n int) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestDirStoreChild$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%s|%d", dirChildEnv, mode, dir, n))
	cmd.Stderr = os.Stderr
	return cmd
}

func TestDirStoreProcesses(t *testing.T) {
	dir := t.TempDir()
	s := openDir(t, dir)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if out, err := dirChild(t, "increment", dir, 100).Output(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	wg.Go(func() {
		if err := storeIncrement(t.Context(), s, "n", 50); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	if v, _, err := s.Load(t.Context(), "n"); err != nil || string(v) != "250" {
		t.Errorf("Load = %q, %v, want 250", v, err)
	}
	dirNoTmp(t, dir)
}

// A process that dies at any step of a write leaves the old or the new value,
// no lock, and nothing that the next write does not clean up.
func TestDirStoreDeathAtEachStep(t *testing.T) {
	openDir(t, t.TempDir()) // or skip
	for _, mode := range []string{"replace", "delete"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			outcomes := map[string]int{}
			for n := 1; ; n++ {
				dir := t.TempDir()
				s := openDir(t, dir)
				rev := storeSwap(t, s, "k", 0, dirChildValue(1))
				out, err := dirChild(t, mode, dir, n).Output()
				if err != nil && !strings.Contains(err.Error(), "killed") {
					t.Fatalf("step %d: %v\n%s", n, err, out)
				}
				v, gotRev, loadErr := s.Load(t.Context(), "k")
				switch {
				case loadErr != nil:
					t.Errorf("step %d: %v", n, loadErr)
				case gotRev == rev && bytes.Equal(v, dirChildValue(1)):
					outcomes["old"]++
				case mode == "replace" && gotRev != 0 && gotRev != rev && bytes.Equal(v, dirChildValue(2)),
					mode == "delete" && gotRev == 0 && v == nil:
					outcomes["new"]++
				default:
					t.Errorf("step %d: %.40q, revision %d", n, v, gotRev)
				}
				s = openDir(t, dir) // as the process that is started again
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				if _, ok, err := s.CompareAndSwap(ctx, "k", gotRev, []byte("next")); !ok || err != nil {
					t.Errorf("step %d: then: %v, %v", n, ok, err)
				}
				cancel()
				dirNoTmp(t, dir)
				if err == nil {
					break // it ended before step n
				}
			}
			if outcomes["old"] == 0 || outcomes["new"] < 2 {
				t.Errorf("outcomes %v", outcomes)
			}
			t.Log(outcomes)
		})
	}
}

// Processes killed at any time leave whole values and no lock.
func TestDirStoreKill(t *testing.T) {
	dir := t.TempDir()
	s := openDir(t, dir)
	kills := 40
	if testing.Short() {
		kills = 5
	} else if raced {
		kills = 16 // a child takes long to start
	}
	var wg sync.WaitGroup
	wg.Go(func() { // who is never killed, and waits for those who are
		for range 4 * kills {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			if err := storeIncrement(ctx, s, "n", 1); err != nil {
				t.Error(err)
			}
			cancel()
		}
	})
	for range 2 {
		wg.Go(func() {
			for range kills / 2 {
				killDirChild(t, dir)
				all, err := s.List(t.Context(), "k")
				if err != nil {
					t.Error(err)
				}
				for k, v := range all {
					if !wholeDirChildValue(v) {
						t.Errorf("%s: torn value %.40q of %d bytes", k, v, len(v))
					}
				}
			}
		})
	}
	wg.Wait()
	if v, _, err := s.Load(t.Context(), "n"); err != nil || string(v) != strconv.Itoa(4*kills) {
		t.Errorf("Load = %q, %v, want %d", v, err, 4*kills)
	}
	s = openDir(t, dir)
	all, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for k := range maps.Keys(all) {
		_, rev, _ := s.Load(t.Context(), k)
		storeSwap(t, s, k, rev, nil)
	}
	if got := dirFileNames(t, dir); !slices.Equal(got, []string{dirLockFile, dirMarkFile}) {
		t.Errorf("files %q", got)
	}
}

// killDirChild starts a child that writes, and kills it after some writes.
func killDirChild(t *testing.T, dir string) {
	cmd := dirChild(t, "write", dir, 2)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Error(err)
		return
	}
	lines := bufio.NewScanner(out)
	for range 1 + rand.N(10) {
		if !lines.Scan() || !strings.HasPrefix(lines.Text(), "written") {
			t.Errorf("the child says %q", lines.Text())
		}
	}
	<-time.After(rand.N(5 * time.Millisecond)) // anywhere in a write
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
}

func BenchmarkDirStore(b *testing.B) {
	b.Run("CompareAndSwap", func(b *testing.B) {
		s := openDir(b, b.TempDir())
		v := bytes.Repeat([]byte("v"), 2048)
		var rev uint64
		for b.Loop() {
			var err error
			if rev, _, err = s.CompareAndSwap(b.Context(), "k", rev, v); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Load", func(b *testing.B) {
		s := openDir(b, b.TempDir())
		if _, _, err := s.CompareAndSwap(b.Context(), "k", 0, bytes.Repeat([]byte("v"), 2048)); err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if _, _, err := s.Load(b.Context(), "k"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
