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

	"github.com/stagedrollout/rollout/internal/chaos"
)

// The tests need initdb, postgres and pgbouncer, in PATH or where Debian puts them. What needs one that is not there is
// skipped, but fails where ROLLOUT_SERVERS is "required", as in .ci/run.

const patience = 20 * time.Second // for what should take a second at most, on a machine that has much else to do

// shared is the one server of all tests, started by the first that needs it.
var shared struct {
	sync.Once
	server *server
	err    error
}

func TestMain(m *testing.M) {
	chaos.Main(openAt)
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
	skipWithout(t, shared.err)
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server
}

func skipWithout(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, exec.ErrNotFound) && os.Getenv("ROLLOUT_SERVERS") != "required" {
		t.Skip("not installed: ", err)
	}
}

// find returns where a program is, in PATH or at the last match of pattern. Its error is exec.ErrNotFound.
func find(name, pattern string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return filepath.EvalSymlinks(path)
	}
	found, err := filepath.Glob(pattern)
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
	}
	return found[len(found)-1], nil
}

// nobody is whom programs run as that refuse to run as root. It is nil if we are not root.
func nobody() *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	return &syscall.Credential{Uid: 65534, Gid: 65534}
}

func chown(path string) error {
	if c := nobody(); c != nil {
		return os.Lchown(path, int(c.Uid), int(c.Gid))
	}
	return nil
}

// A process is a program that runs beside the tests.
type process struct {
	*os.Process
	ended  chan struct{} // closed when it has ended
	output bytes.Buffer  // to be read when it has ended
}

// begin starts a program in dir, and returns when ready returns no error.
func begin(ready func(context.Context) error, dir, path string, args ...string) (*process, error) {
	p := &process{ended: make(chan struct{})}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = &p.output, &p.output
	cmd.SysProcAttr = sysProcAttr(nobody())
	started := make(chan error)
	go func() {
		// The signal that a program gets at the death of its parent is that of this thread.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(p.ended)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	p.Process = cmd.Process
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := ready(ctx)
		cancel()
		if err == nil {
			return p, nil
		}
		select {
		case <-p.ended:
			return nil, fmt.Errorf("%s ended:\n%s", path, p.output.String())
		default:
		}
		if time.Since(begun) > patience {
			p.end(syscall.SIGQUIT)
			return nil, fmt.Errorf("%s is not ready: %w\n%s", path, err, p.output.String())
		}
	}
}

// end ends the program by a signal, and returns when it has ended. It may have ended before.
func (p *process) end(signal os.Signal) {
	p.Signal(signal)
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.Kill()
		<-p.ended
	}
}

// A server is a PostgreSQL with a data directory and a port of its own.
type server struct {
	bin     string // the directory of its programs
	dir     string // holds the data directory, and nothing else
	port    int
	process *process
}

func newServer() (_ *server, err error) {
	initdb, err := find("initdb", "/usr/lib/postgresql/*/bin/initdb")
	if err != nil {
		return nil, err
	}
	s := &server{bin: filepath.Dir(initdb)}
	if s.dir, err = os.MkdirTemp("", "pgstore"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.remove()
		}
	}()
	if err := chown(s.dir); err != nil {
		return nil, err
	}
	cmd := exec.Command(initdb, "-D", s.data(), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
	cmd.Dir = s.dir
	cmd.SysProcAttr = sysProcAttr(nobody())
	if out, err := cmd.CombinedOutput(); err != nil {
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

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func (s *server) data() string { return filepath.Join(s.dir, "data") }

func (s *server) addr() string { return localhost(s.port) }

func localhost(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// start starts the server and returns when it can be used.
func (s *server) start() (err error) {
	s.process, err = begin(func(ctx context.Context) error { return connect(ctx, s.addr()) }, s.dir,
		filepath.Join(s.bin, "postgres"), "-D", s.data(), "-h", "127.0.0.1", "-p", strconv.Itoa(s.port), "-k", "",
		"-c", "fsync=off", // a crash of the server alone loses nothing
		"-c", "shared_buffers=16MB", "-c", "max_connections=60", "-c", "log_min_messages=fatal")
	return err
}

// stop ends the server: SIGQUIT is a crash, SIGINT is not.
func (s *server) stop(signal os.Signal) {
	if s.process != nil {
		s.process.end(signal)
	}
}

// connect makes sure that there is a database at addr.
func connect(ctx context.Context, addr string) error {
	conn, err := pgx.Connect(ctx, url(addr))
	if err != nil {
		return err
	}
	return conn.Close(ctx)
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
	copyData(t, s.data(), saved)
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
		copyData(t, saved, s.data())
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	}
}

func copyData(t testing.TB, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = chown(path)
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

// pgbouncer starts a PgBouncer before s that pools transactions, with fewer connections than it has clients. It returns
// its address.
func pgbouncer(t testing.TB, s *server) string {
	t.Helper()
	path, err := find("pgbouncer", "/usr/sbin/pgbouncer")
	skipWithout(t, err)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pgstore")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "pgbouncer.ini")
	err = os.WriteFile(config, fmt.Appendf(nil, `[databases]
* = host=127.0.0.1 port=%d user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
`, s.port, port), 0o644)
	if err == nil {
		err = errors.Join(chown(dir), chown(config))
	}
	if err != nil {
		t.Fatal(err)
	}
	p, err := begin(func(ctx context.Context) error { return connect(ctx, localhost(port)) }, dir, path, "-q", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.end(syscall.SIGQUIT) })
	return localhost(port)
}
