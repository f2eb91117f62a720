//go:build unix

package servertest

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/adapters/pgstore"
	"github.com/stagedrollout/rollout/internal/chaos"
)

var flags = chaos.NewFlags()

// openAt opens a store as a program would.
func openAt(ctx context.Context, addr, table string) (rollout.Store, error) {
	config, err := pgxpool.ParseConfig(url(addr))
	if err != nil {
		return nil, err
	}
	config.MaxConns = 2 // and one that listens, of few that the server has
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	return pgstore.New(pool, &pgstore.Options{Table: table})
}

// chaosServer is a server for a fleet of processes.
func chaosServer(t testing.TB) chaos.Server {
	s := postgres(t)
	return chaos.Server{Addr: s.addr(), Open: openAt, New: func(t testing.TB) string {
		table := newTable()
		create(t, newPool(t, s.addr(), nil), pgstore.Options{Table: table})
		return table
	}}
}

func TestChaos(t *testing.T) { flags.TestChaos(t, chaosServer(t)) }

func TestLatency(t *testing.T) { flags.TestLatency(t, chaosServer(t), 100*time.Millisecond) }

func TestLatencyDeaf(t *testing.T) { flags.TestLatencyDeaf(t, chaosServer(t)) }
