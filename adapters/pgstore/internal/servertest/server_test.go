//go:build unix

package servertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// The tests need initdb and postgres, in PATH or where Debian puts them. Without them they are skipped, but not where
// ROLLOUT_POSTGRES is "required", as in .ci/run.

const patience = 20 * time.Second // for what should take a second at most, on a machine that has much else to do

// shared is the one server of all tests, started by the first that needs it.
var shared struct {
	sync.Once
	server *server
	err    error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.server != nil {
		shared.server.remove()
	}
	os.Exit(code)
}

// postgres returns the server, which other tests have used and will use.
func postgres(t testing.TB) *server {
	t.Helper()
	shared.Do(func() { shared.server, shared.err = newServer() })
	if errors.Is(shared.err, exec.ErrNotFound) && os.Getenv("ROLLOUT_POSTGRES") != "required" {
		t.Skip("no PostgreSQL is installed: ", shared.err)
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server
}

// A server is a PostgreSQL with a data directory and a port of its own.
type server struct {
	bin  string // the directory of its programs
	dir  string // holds data, and nothing else
	port int
	cred *syscall.Credential // nil: run as we do

	process *os.Process
	ended   chan struct{} // closed when process has ended
	output  bytes.Buffer  // of process; to be read when that has ended
}

func newServer() (_ *server, err error) {
	s := &server{}
	if s.bin, err = findPrograms(); err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp("", "pgstore"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.remove()
		}
	}()
	if os.Geteuid() == 0 { // PostgreSQL refuses to run as root
		const nobody = 65534
		s.cred = &syscall.Credential{Uid: nobody, Gid: nobody}
		if err := os.Chown(s.dir, nobody, nobody); err != nil {
			return nil, err
		}
	}
	initdb := exec.Command(filepath.Join(s.bin, "initdb"), "-D", s.data(), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
	initdb.Dir = s.dir
	initdb.SysProcAttr = sysProcAttr(s.cred)
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	for range 5 { // another process may take the port before the server does
		if s.port, err = freePort(); err != nil {
			return nil, err
		}
		if err = s.start(); err == nil {
			return s, nil
		}
	}
	return nil, err
}

// findPrograms returns an error that is exec.ErrNotFound if there are none.
func findPrograms() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return "", err
		}
		return filepath.Dir(path), nil
	}
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("initdb: %w", exec.ErrNotFound)
	}
	return filepath.Dir(found[len(found)-1]), nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func (s *server) data() string { return filepath.Join(s.dir, "data") }

func (s *server) addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// start starts the server and returns when it can be used.
func (s *server) start() error {
	s.output.Reset()
	cmd := exec.Command(filepath.Join(s.bin, "postgres"), "-D", s.data(), "-h", "127.0.0.1", "-p", strconv.Itoa(s.port), "-k", "",
		"-c", "fsync=off", // a crash of the server alone loses nothing
		"-c", "shared_buffers=16MB", "-c", "max_connections=60", "-c", "log_min_messages=fatal")
	cmd.Dir = s.dir
	cmd.Stdout, cmd.Stderr = &s.output, &s.output
	cmd.SysProcAttr = sysProcAttr(s.cred)
	started := make(chan error)
	ended := make(chan struct{})
	go func() {
		// The signal that the server gets at the death of its parent is that of this thread.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	s.process, s.ended = cmd.Process, ended
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		conn, err := pgx.Connect(ctx, url(s.addr()))
		if err == nil {
			conn.Close(ctx)
		}
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("postgres ended:\n%s", s.output.String())
		default:
		}
		if time.Since(begun) > patience {
			s.stop(syscall.SIGQUIT)
			return fmt.Errorf("postgres is not ready: %w\n%s", err, s.output.String())
		}
	}
}

// stop ends the server: SIGQUIT is a crash, SIGINT is not. It may have ended already.
func (s *server) stop(signal os.Signal) {
	if s.process == nil {
		return
	}
	s.process.Signal(signal)
	select {
	case <-s.ended:
	case <-time.After(patience):
		s.process.Kill()
		<-s.ended
	}
}

func (s *server) crashAndRestart(t testing.TB) {
	t.Helper()
	s.stop(syscall.SIGQUIT)
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
}

// snapshot copies the data directory, and returns a function that puts the copy back. The server is stopped and started by
// both.
func (s *server) snapshot(t testing.TB) (restore func(t testing.TB)) {
	t.Helper()
	s.stop(syscall.SIGINT)
	saved := filepath.Join(s.dir, "saved")
	s.copy(t, s.data(), saved)
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(saved) })
	return func(t testing.TB) {
		t.Helper()
		s.stop(syscall.SIGQUIT)
		if err := os.RemoveAll(s.data()); err != nil {
			t.Fatal(err)
		}
		s.copy(t, saved, s.data())
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *server) copy(t testing.TB, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		if err == nil && s.cred != nil {
			err = os.Lchown(path, int(s.cred.Uid), int(s.cred.Gid))
		}
		if err == nil && d.IsDir() {
			err = os.Chmod(path, 0o700)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (s *server) remove() {
	s.stop(syscall.SIGQUIT)
	os.RemoveAll(s.dir)
}

// url is where the server is found at addr, which may be that of a proxy.
func url(addr string) string { return "postgres://postgres@" + addr + "/postgres?sslmode=disable" }
