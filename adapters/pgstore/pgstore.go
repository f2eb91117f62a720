// Package pgstore keeps the state of rollouts in a table of PostgreSQL.
//
//	store, err := pgstore.New(pool, nil)
//	...
//	r, err := rollout.New("checkout", policy, &rollout.Options{Store: store})
//
// A [Store] has the methods of rollout.Store. It was tried with PostgreSQL 15,
// and uses nothing that is newer than PostgreSQL 9.5.
//
// # The table
//
// The table is made by [Store.Create], or by your own migrations from what
// [Store.DDL] returns. With the default name that is
//
//	create table if not exists "rollout_store" (
//		key      bytea  primary key,
//		value    bytea  not null,
//		revision bigint not null check (revision > 0)
//	)
//
// A process then needs the rights to select, insert, update and delete. To look
// at the values:
//
//	select convert_from(key, 'UTF8'), convert_from(value, 'UTF8') from rollout_store
//
// Do not write to the table by hand while processes run: a writer must draw
// revision at random, as they do.
//
// # The database
//
// The pool must reach the primary. With several hosts in the connection string
// say target_session_attrs=read-write: reads from a standby may be stale, and
// writes to one fail.
//
// A failover to a standby that is replicated asynchronously, or a crash with
// synchronous_commit=off, loses the writes acknowledged last, and so may a
// restore from a backup. Revisions are random, so nobody mistakes a
// newer value for the one it knew; and a process of the library that finds a
// state older than its own joins the two, in such a way that a rollback of
// either one holds. A process started after the failover cannot know what was
// lost, so a rollback is certain to hold only where standbys are synchronous.
//
// After the server was away, reads find a connection that works by themselves.
// A write on one that is broken fails, and may have been done; the library then
// looks.
//
// Transactions are those of single statements, at whatever isolation is the
// database's default. Every write notifies, and PostgreSQL commits transactions
// that notify one after the other; but a rollout writes little, a few times a
// tick and once for each effect that is journalled.
//
// # PgBouncer
//
// Statements are sent unprepared, whatever the pool's settings, and each is a
// transaction of its own, so PgBouncer may pool transactions. Only listening
// for changes needs a session. Either set [Options.Poll], or have the listening
// connection go past PgBouncer by [Options.Listen]. With neither, PgBouncer
// accepts the wish to listen and forgets it: hints do not come, and changes
// made elsewhere are seen at the next tick.
package pgstore

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Options say how a Store uses the database. The zero value is a good one.
type Options struct {
	// Schema of the table, which must exist. The default is the first one in
	// the search_path of the connection.
	Schema string

	// Table is the name of the table, of at most 63 bytes, and of the channel
	// on which changes are told. The default is "rollout_store".
	Table string

	// Poll, if it is positive, makes every Watch look for changes this often
	// instead of listening for them. A look is one statement that adds up
	// numbers under the prefix, so its cost grows with the keys there are.
	Poll time.Duration

	// Listen is how the connection that listens is made, if not like those of
	// the pool. It comes from [pgx.ParseConfig] and must lead to the same
	// database. It is not used if Poll is set.
	Listen *pgx.ConnConfig
}

// A Store holds small values by key in one table. Its methods keep the contract
// of rollout.Store and may be called from any number of goroutines.
//
// A Store needs no closing. It runs a goroutine only while somebody watches.
type Store struct {
	pool     *pgxpool.Pool
	maxConns int
	listen   *pgx.ConnConfig // nil: as the pool does
	poll     time.Duration   // 0: listen
	losses   atomic.Uint64   // connections of the pool that broke or could not be made

	channel string
	ddl     string
	stmt    statements

	watchers struct {
		sync.Mutex
		all      map[*watcher]bool
		listener *listener // not nil while there are watchers, unless it failed
	}
}

type statements struct{ check, load, list, create, replace, delete, exists, sum, listen string }

const defaultTable = "rollout_store"

// New returns the store in a table that is reached through pool. It does no I/O
// and does not make the table, see [Store.Create]. A nil o is the same as
// &Options{}. The error is about o, or a pool that is nil.
//
// The pool remains the caller's, who closes it once nobody uses the store. One
// connection of it is enough. No call keeps one for longer than its statement.
func New(pool *pgxpool.Pool, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	table := o.Table
	if table == "" {
		table = defaultTable
	}
	switch {
	case pool == nil:
		return nil, errors.New("pgstore: the pool is nil")
	case len(table) > 63 || len(o.Schema) > 63:
		return nil, fmt.Errorf("pgstore: table %q of schema %q: a name has more than 63 bytes", table, o.Schema)
	case strings.Contains(table+o.Schema, "\x00"):
		return nil, fmt.Errorf("pgstore: table %q of schema %q: a name has a NUL byte", table, o.Schema)
	case o.Poll < 0:
		return nil, fmt.Errorf("pgstore: Poll is %v, less than 0", o.Poll)
	}
	s := &Store{pool: pool, maxConns: int(pool.Config().MaxConns), poll: o.Poll, channel: table}
	if o.Listen != nil {
		s.listen = o.Listen.Copy()
	}
	s.watchers.all = map[*watcher]bool{}

	name := pgx.Identifier{table}.Sanitize()
	if o.Schema != "" {
		name = pgx.Identifier{o.Schema, table}.Sanitize()
	}
	s.ddl = `create table if not exists ` + name + ` (
	key      bytea  primary key,
	value    bytea  not null,
	revision bigint not null check (revision > 0)
)`
	// The range of the keys with a prefix; no end is NULL.
	const under = ` where key >= $1 and ($2::bytea is null or key < $2)`
	// A write tells of itself, in the same statement. Keys need not be text.
	const written = `) select pg_notify($1, encode(key, 'hex')) from written`
	s.stmt = statements{
		check: `select key, value, revision from ` + name + ` limit 0`,
		load:  `select value, revision from ` + name + ` where key = $1`,
		list:  `select key, value from ` + name + under,
		create: `with written as (insert into ` + name + ` (key, value, revision) values ($2, $3, $4)
			on conflict (key) do nothing returning key` + written,
		replace: `with written as (update ` + name + ` set value = $3, revision = $4 where key = $2 and revision = $5
			returning key` + written,
		delete: `with written as (delete from ` + name + ` where key = $2 and revision = $3 returning key` + written,
		exists: `select 1 from ` + name + ` where key = $1`,
		sum:    `select coalesce(sum(revision), 0)::text from ` + name + under,
		listen: `listen ` + pgx.Identifier{table}.Sanitize(),
	}
	return s, nil
}

// DDL returns the statement that makes the table, for your own migrations.
func (s *Store) DDL() string { return s.ddl }

// createLock is what processes that make a table at the same time wait for:
// "if not exists" alone lets all but one of them fail.
const createLock = 0x726f6c6c6f7574 // "rollout"

// Create makes the table, unless it exists: then it needs no more rights than
// to select. Any number of processes may call it at the same time.
func (s *Store) Create(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := s.read(ctx, s.stmt.check)
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == "42P01" { // undefined_table
		// Both in one transaction, as they are sent together.
		err = s.with(ctx, func(c *pgconn.PgConn) error {
			_, err := c.Exec(ctx, fmt.Sprintf("select pg_advisory_xact_lock(%d);\n%s", int64(createLock), s.ddl)).ReadAll()
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("pgstore: create the table: %w", err)
	}
	return nil
}

// Load returns the value of key and its revision, or nil and 0 if it does not
// exist. It sees every write that was acknowledged before.
func (s *Store) Load(ctx context.Context, key string) (value []byte, revision uint64, err error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	if err := checkKey(key); err != nil {
		return nil, 0, err
	}
	rows, err := s.read(ctx, s.stmt.load, bytea(key))
	if err != nil {
		return nil, 0, fmt.Errorf("pgstore: load key %q: %w", key, err)
	}
	if len(rows) == 0 {
		return nil, 0, nil
	}
	return rows[0][0], binary.BigEndian.Uint64(rows[0][1]), nil
}

// List returns the value of every key that begins with prefix, in one snapshot.
func (s *Store) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rows, err := s.read(ctx, s.stmt.list, keyRange(prefix)...)
	if err != nil {
		return nil, fmt.Errorf("pgstore: list keys %q: %w", prefix, err)
	}
	found := make(map[string][]byte, len(rows))
	for _, row := range rows {
		found[string(row[0])] = row[1]
	}
	return found, nil
}

// CompareAndSwap replaces the value of key, provided that old is still its
// revision, and returns the new revision. An old of 0 creates the key, a nil
// value deletes it. It takes one round trip. After an error the outcome is
// unknown; nothing is tried twice.
func (s *Store) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (revision uint64, swapped bool, err error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	if err := checkKey(key); err != nil {
		return 0, false, err
	}
	if old > math.MaxInt64 {
		return 0, false, nil // no revision of ours
	}
	if value == nil && old == 0 {
		rows, err := s.read(ctx, s.stmt.exists, bytea(key))
		if err != nil {
			return 0, false, fmt.Errorf("pgstore: look for key %q: %w", key, err)
		}
		return 0, len(rows) == 0, nil
	}
	var rows [][][]byte
	channel := param{oidText, []byte(s.channel)}
	switch {
	case value == nil:
		rows, err = s.query(ctx, s.stmt.delete, channel, bytea(key), bigint(old))
	case old == 0:
		revision = newRevision(old)
		rows, err = s.query(ctx, s.stmt.create, channel, bytea(key), param{oidBytea, value}, bigint(revision))
	default:
		revision = newRevision(old)
		rows, err = s.query(ctx, s.stmt.replace, channel, bytea(key), param{oidBytea, value}, bigint(revision), bigint(old))
	}
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == "40001" {
		// At an isolation stricter than read committed, somebody else was first.
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("pgstore: write key %q: %w", key, err)
	}
	if len(rows) == 0 {
		return 0, false, nil
	}
	return revision, true, nil
}

// A param is a parameter of a statement, in PostgreSQL's binary format. A nil
// value is NULL.
type param struct {
	oid   uint32
	value []byte
}

const (
	oidBytea  = 17
	oidBigint = 20
	oidText   = 25
)

func bytea(s string) param { return param{oidBytea, []byte(s)} }

func bigint(n uint64) param { return param{oidBigint, binary.BigEndian.AppendUint64(nil, n)} }

// keyRange returns the first key that may begin with prefix, and the first
// after it that does not: NULL if there is none.
func keyRange(prefix string) []param {
	end := []byte(prefix)
	for len(end) > 0 && end[len(end)-1] == 0xff {
		end = end[:len(end)-1]
	}
	if len(end) == 0 {
		return []param{bytea(prefix), {oidBytea, nil}}
	}
	end[len(end)-1]++
	return []param{bytea(prefix), {oidBytea, end}}
}

var errBroken = errors.New("the connection is broken")

// with calls f with a connection of the pool. An error of f wraps errBroken if
// it has cost the connection.
func (s *Store) with(ctx context.Context, f func(*pgconn.PgConn) error) error {
	c, err := s.pool.Acquire(ctx)
	if err != nil {
		s.losses.Add(1)
		return err
	}
	defer c.Release()
	conn := c.Conn().PgConn()
	if err = f(conn); err != nil && conn.IsClosed() {
		s.losses.Add(1)
		err = fmt.Errorf("%w: %w", errBroken, err)
	}
	return err
}

// query runs one statement and returns the rows. It goes below pgx's own Query,
// which needs a prepared statement to ask for the binary format, and the text of
// a bytea depends on the settings of the database.
func (s *Store) query(ctx context.Context, sql string, params ...param) (rows [][][]byte, err error) {
	values := make([][]byte, len(params))
	oids := make([]uint32, len(params))
	for i, p := range params {
		values[i], oids[i] = p.value, p.oid
	}
	binary := []int16{pgx.BinaryFormatCode} // all of them
	err = s.with(ctx, func(c *pgconn.PgConn) error {
		r := c.ExecParams(ctx, sql, values, oids, binary, binary).Read()
		rows = r.Rows
		return r.Err
	})
	return rows, err
}

// read is query for a statement that changes nothing. It is repeated if its
// connection turns out to be broken: after the server was away, as many times in
// a row as the pool has connections.
func (s *Store) read(ctx context.Context, sql string, params ...param) (rows [][][]byte, err error) {
	for range s.maxConns + 1 {
		rows, err = s.query(ctx, sql, params...)
		if !errors.Is(err, errBroken) || ctx.Err() != nil {
			break
		}
	}
	return rows, err
}

const maxKey = 1024

func checkKey(key string) error {
	switch {
	case key == "":
		return errors.New(`pgstore: key "" is empty`)
	case len(key) > maxKey:
		return fmt.Errorf("pgstore: key %.40q... has %d bytes, more than %d", key, len(key), maxKey)
	case strings.IndexByte(key, 0) >= 0:
		return fmt.Errorf("pgstore: key %q has a NUL byte", key)
	}
	return nil
}

// newRevision draws 63 random bits that are neither 0 nor old. They come from
// the operating system: a database that was set back does not repeat them, nor
// does a virtual machine that was copied.
func newRevision(old uint64) uint64 {
	for {
		var b [8]byte
		rand.Read(b[:]) // never fails, see its documentation
		if r := binary.BigEndian.Uint64(b[:]) >> 1; r != 0 && r != old {
			return r
		}
	}
}
