package pgstore

import (
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Only those are told who watch the key that was written, and everybody if somebody else notifies.
func TestNotified(t *testing.T) {
	for _, c := range []struct{ payload, told string }{
		{hex.EncodeToString([]byte("a/b")), " a a/ a/b"},
		{hex.EncodeToString([]byte("a")), " a"},
		{hex.EncodeToString([]byte("\xffb")), " \xff"},
		{hex.EncodeToString([]byte("c")), ""},
		{"hello", " a a/ a/b a/b/c \xff"},
	} {
		s := &Store{}
		s.watchers.all = map[*watcher]bool{}
		var all []*watcher
		for _, prefix := range []string{"", "a", "a/", "a/b", "a/b/c", "\xff"} {
			w := &watcher{prefix: prefix, hint: make(chan struct{}, 1)}
			all = append(all, w)
			s.watchers.all[w] = true
		}
		for range 2 { // one hint may be due
			s.notified(c.payload)
		}
		told := ""
		for _, w := range all[1:] {
			if len(w.hint) == 1 {
				told += " " + w.prefix
			}
		}
		if told != c.told || len(all[0].hint) != 1 {
			t.Errorf("%q: told%q, want%q", c.payload, told, c.told)
		}
	}
}

// A server that cannot listen ends every Watch, also one that comes later. One that cannot listen now does not.
func TestCannotListen(t *testing.T) {
	codes := make(chan string, 100)
	s := newFake(t, codes)
	for range 2 {
		codes <- "25006" // a standby, that may be promoted
		codes <- "0A000"
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				called := false
				err := s.Watch(t.Context(), "", func() { called = true })
				if pg := (*pgconn.PgError)(nil); !errors.As(err, &pg) || pg.Code != "0A000" || !strings.HasPrefix(err.Error(), "pgstore: watch") {
					t.Errorf("Watch = %v", err)
				}
				if !called {
					t.Error("Watch ended without the hint at the start")
				}
			})
		}
		wg.Wait()
		if len(codes) > 0 {
			t.Errorf("the server was not asked %d times", len(codes))
		}
	}
}

// newFake returns a store whose server refuses each statement, with the next of codes or as not implemented.
func newFake(t *testing.T, codes <-chan string) *Store {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := pgproto3.NewBackend(c, c)
			if _, err = b.ReceiveStartupMessage(); err == nil {
				b.Send(&pgproto3.AuthenticationOk{})
				b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
				err = b.Flush()
			}
			if err == nil {
				_, err = b.Receive()
			}
			if err == nil {
				code := "0A000"
				select {
				case code = <-codes:
				default:
				}
				b.Send(&pgproto3.ErrorResponse{Severity: "ERROR", Code: code})
				b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
				b.Flush()
			}
			c.Close()
		}
	}()
	pool, err := pgxpool.New(t.Context(), "postgres://u@127.0.0.1:1/db")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	listen, err := pgx.ParseConfig("postgres://u@" + l.Addr().String() + "/db?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(pool, &Options{Listen: listen})
	if err != nil {
		t.Fatal(err)
	}
	return s
}
