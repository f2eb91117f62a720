//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package rollout

import (
	"os"
	"syscall"
)

const dirLockSupported = true

// tryDirLock takes the exclusive lock on f, unless another open file has it:
// then it reports false. The lock belongs to this opening of the file, so it
// also keeps out the other goroutines of this process, which each open the file
// themselves, and the kernel releases it when the process dies.
func tryDirLock(f *os.File) (bool, error) {
	for {
		switch err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err {
		case nil:
			return true, nil
		case syscall.EWOULDBLOCK:
			return false, nil
		case syscall.EINTR:
		default:
			return false, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
	}
}

// dirUnlock releases the lock at once, also if a child that is being started
// still has a copy of the file open. Failing that, closing f does it.
func dirUnlock(f *os.File) {
	_ = syscall.Flock(int(f.Fd()), syscall.LOCK_UN)
}
