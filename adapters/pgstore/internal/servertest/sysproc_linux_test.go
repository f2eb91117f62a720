package servertest

import "syscall"

// sysProcAttr runs a program as cred, and ends it with this process, however that ends.
func sysProcAttr(cred *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: cred, Pdeathsig: syscall.SIGQUIT}
}
