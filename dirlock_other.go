//go:build !(darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd)

package rollout

import (
	"errors"
	"os"
)

const dirLockSupported = false

func tryDirLock(*os.File) (bool, error) { return false, errors.ErrUnsupported }

func dirUnlock(*os.File) {}
