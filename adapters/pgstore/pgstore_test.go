package pgstore

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// What needs a server is tested in internal/servertest, with the library's own
// conformance kit.

func TestOptions(t *testing.T) {
	pool, err := pgxpool.New(t.Context(), "postgres://nobody@127.0.0.1:1/none?pool_max_conns=1")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	for _, c := range []struct {
		pool *pgxpool.Pool
		o    *Options
		want string // "": no error
	}{
		{pool, nil, ""},
		{pool, &Options{Schema: "s", Table: strings.Repeat("t", 63), Poll: time.Second}, ""},
		{nil, nil, "pool is nil"},
		{pool, &Options{Table: strings.Repeat("t", 64)}, "63 bytes"},
		{pool, &Options{Schema: strings.Repeat("s", 64)}, "63 bytes"},
		{pool, &Options{Table: "a\x00"}, "NUL"},
		{pool, &Options{Poll: -1}, "Poll"},
	} {
		s, err := New(c.pool, c.o)
		if c.want == "" && (err != nil || s == nil) || c.want != "" && (s != nil || err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("New(%v) = %v, %v, want an error with %q", c.o, s, err, c.want)
		}
	}

	s, err := New(pool, &Options{Schema: `a.b`, Table: `c"d`})
	if err != nil {
		t.Fatal(err)
	}
	if want := `"a.b"."c""d"`; !strings.Contains(s.DDL(), want) || !strings.Contains(s.stmt.load, want) {
		t.Errorf("the table is not %s in %s, or in %s", want, s.DDL(), s.stmt.load)
	}
	if s.stmt.listen != `listen "c""d"` || s.channel != `c"d` {
		t.Errorf("%s, but notifies on %s", s.stmt.listen, s.channel)
	}
}

func TestKeyRange(t *testing.T) {
	for prefix, end := range map[string]string{
		"": "NULL", "a": "b", "a/": "a0", "a\xff": "b", "a\xff\xff": "b", "\xfe\xff": "\xff", "\xff": "NULL", "\xff\xff": "NULL",
	} {
		got := keyRange(prefix)
		if string(got[0].value) != prefix || got[0].value == nil {
			t.Errorf("keyRange(%q) begins at %q", prefix, got[0].value)
		}
		if got[1].value == nil != (end == "NULL") || end != "NULL" && string(got[1].value) != end {
			t.Errorf("keyRange(%q) ends at %q, want %q", prefix, got[1].value, end)
		}
	}
}

// No server: an error, and soon, as connecting is not tried again and again.
func TestNoServer(t *testing.T) {
	pool, err := pgxpool.New(t.Context(), "postgres://nobody@127.0.0.1:1/none")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	s, err := New(pool, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err1 := s.Load(t.Context(), "k")
	_, err2 := s.List(t.Context(), "k")
	_, swapped, err3 := s.CompareAndSwap(t.Context(), "k", 0, []byte("v"))
	for _, err := range []error{err1, err2, err3, s.Create(t.Context())} {
		if err == nil || swapped || errors.Is(err, errBroken) || !strings.HasPrefix(err.Error(), "pgstore: ") {
			t.Errorf("got %v, %v", swapped, err)
		}
	}
}
