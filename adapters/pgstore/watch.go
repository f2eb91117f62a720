package pgstore

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	connectTimeout = 10 * time.Second // to connect and to begin to listen; of one poll
	quiet          = 30 * time.Second // without a notification: is the server still there?
	closeTimeout   = time.Second
	minRetry       = 100 * time.Millisecond // between two connections
	maxRetry       = 5 * time.Second
)

// Watch calls changed when something under prefix may have changed, and blocks
// until ctx ends; then it returns nil. It calls once at the start, and again
// after each time the connection was lost.
//
// All watchers of a Store share one connection, which listens and is not one of
// the pool's. Where it is lost, it is made again, with pauses of up to 5
// seconds. Watch returns an error if the server says that it cannot listen.
//
// With [Options.Poll] there is no such connection. A call then also comes after
// any call of this Store found that its connection was lost.
func (s *Store) Watch(ctx context.Context, prefix string, changed func()) error {
	if changed == nil {
		return errors.New("pgstore: Watch: changed is nil")
	}
	if ctx.Err() != nil {
		return nil
	}
	if s.poll > 0 {
		return s.watchPolling(ctx, prefix, changed)
	}
	w := &watcher{prefix: prefix, hint: make(chan struct{}, 1), failed: make(chan error, 1)}
	s.join(w)
	defer s.leave(w)
	for ctx.Err() == nil {
		changed()
		select {
		case <-ctx.Done():
		case err := <-w.failed:
			return fmt.Errorf("pgstore: watch keys %q: %w", prefix, err)
		case <-w.hint:
		}
	}
	return nil
}

// watchPolling compares the sum of the revisions, which are random: no change
// leaves it as it was.
func (s *Store) watchPolling(ctx context.Context, prefix string, changed func()) error {
	changed()
	sum, losses := "", s.losses.Load() // no sum is empty
	ticker := time.NewTicker(s.poll)
	defer ticker.Stop()
	for ctx.Err() == nil {
		l := s.losses.Load()
		if now, err := s.sum(ctx, prefix); err == nil && (now != sum || l != losses) {
			sum, losses = now, l
			changed()
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
	return nil
}

func (s *Store) sum(ctx context.Context, prefix string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	rows, err := s.query(ctx, s.stmt.sum, keyRange(prefix)...)
	if err != nil {
		return "", err
	}
	return string(rows[0][0]), nil
}

type watcher struct {
	prefix string
	hint   chan struct{} // of capacity 1: full means that a hint is due
	failed chan error    // of capacity 1
}

func (w *watcher) tell() {
	select {
	case w.hint <- struct{}{}:
	default: // one is due already
	}
}

// A listener is the goroutine that listens for all watchers.
type listener struct {
	stop context.CancelFunc
	done chan struct{} // closed when the goroutine and its connection have gone
}

// join adds w. The first watcher starts a listener.
func (s *Store) join(w *watcher) {
	s.watchers.Lock()
	defer s.watchers.Unlock()
	s.watchers.all[w] = true
	if s.watchers.listener != nil {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &listener{stop, make(chan struct{})}
	s.watchers.listener = l
	go func() {
		defer close(l.done)
		defer stop()
		if err := s.listenUntil(ctx); err != nil {
			s.fail(l, err)
		}
	}()
}

// leave removes w. The last watcher stops the listener, and waits for it.
func (s *Store) leave(w *watcher) {
	s.watchers.Lock()
	delete(s.watchers.all, w)
	var l *listener
	if len(s.watchers.all) == 0 {
		l, s.watchers.listener = s.watchers.listener, nil
	}
	s.watchers.Unlock()
	if l != nil {
		l.stop()
		<-l.done
	}
}

// tell gives a hint to the watchers that f selects.
func (s *Store) tell(f func(*watcher) bool) {
	s.watchers.Lock()
	defer s.watchers.Unlock()
	for w := range s.watchers.all {
		if f(w) {
			w.tell()
		}
	}
}

// fail ends every Watch with err. The next one tries with a new listener.
func (s *Store) fail(l *listener, err error) {
	s.watchers.Lock()
	defer s.watchers.Unlock()
	if s.watchers.listener != l {
		return // its watchers have left
	}
	s.watchers.listener = nil
	for w := range s.watchers.all {
		select {
		case w.failed <- err:
		default:
		}
	}
}

// listenUntil listens, on one connection after the other, until ctx ends. It
// returns an error if that is impossible.
func (s *Store) listenUntil(ctx context.Context) error {
	retry := minRetry
	for {
		start := time.Now()
		err := s.listenOnce(ctx)
		if ctx.Err() != nil {
			return nil
		}
		// Not implemented, or refused: both hold for the next connection too.
		if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && errors.Is(err, errListen) &&
			(strings.HasPrefix(pg.Code, "0A") || strings.HasPrefix(pg.Code, "42")) {
			return err
		}
		if time.Since(start) > time.Second {
			retry = minRetry // that connection was a good one
		}
		timer := time.NewTimer(retry/2 + rand.N(retry/2))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		retry = min(2*retry, maxRetry)
	}
}

var errListen = errors.New("cannot listen")

// listenOnce listens on a new connection until that is lost.
func (s *Store) listenOnce(ctx context.Context) error {
	conn, err := s.startListening(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	// What was written before is not told.
	s.tell(func(*watcher) bool { return true })
	for {
		wait, cancel := context.WithTimeout(ctx, quiet)
		err := conn.WaitForNotification(wait)
		cancel()
		if err != nil && pgconn.Timeout(err) && ctx.Err() == nil {
			// The peer may have gone without a word.
			ping, cancel := context.WithTimeout(ctx, connectTimeout)
			err = conn.Ping(ping)
			cancel()
		}
		if err != nil {
			return err
		}
	}
}

func (s *Store) startListening(ctx context.Context) (*pgconn.PgConn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var config *pgx.ConnConfig
	if s.listen != nil {
		config = s.listen.Copy()
	} else {
		pool := s.pool.Config() // a copy
		config = pool.ConnConfig
		if pool.BeforeConnect != nil {
			if err := pool.BeforeConnect(ctx, config); err != nil {
				return nil, err
			}
		}
	}
	config.OnNotification = func(_ *pgconn.PgConn, n *pgconn.Notification) { s.notified(n.Payload) }
	conn, err := pgconn.ConnectConfig(ctx, &config.Config)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, s.stmt.listen).ReadAll(); err != nil {
		closeConn(conn)
		return nil, fmt.Errorf("%w: %w", errListen, err)
	}
	return conn, nil
}

// notified gives a hint to those who watch the key in payload, or to everybody
// if it is something else.
func (s *Store) notified(payload string) {
	key, err := hex.DecodeString(payload)
	s.tell(func(w *watcher) bool { return err != nil || strings.HasPrefix(string(key), w.prefix) })
}

func closeConn(conn *pgconn.PgConn) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	conn.Close(ctx)
}
