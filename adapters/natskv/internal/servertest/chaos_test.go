package servertest

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stagedrollout/rollout"
	"github.com/stagedrollout/rollout/adapters/natskv"
	"github.com/stagedrollout/rollout/internal/chaos"
)

var flags = chaos.NewFlags()

func TestMain(m *testing.M) {
	chaos.Main(openAt)
	os.Exit(m.Run())
}

// openAt opens a store as a program would.
func openAt(ctx context.Context, addr, bucket string) (rollout.Store, error) {
	nc, err := nats.Connect(addr, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond), nats.ReconnectBufSize(-1), nats.RetryOnFailedConnect(true),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		return nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	return natskv.New(ctx, js, bucket)
}

// chaosServer is a server for a fleet of processes.
func chaosServer(t testing.TB) chaos.Server {
	n := newNode(t, server.Options{})
	return chaos.Server{Addr: n.addr(), Open: openAt, New: func(t testing.TB) string {
		js := connect(t, n.addr())
		bucket := nats.NewInbox()[len("_INBOX."):]
		create(t, js, natskv.Bucket(bucket, 1))
		return bucket
	}}
}

func TestChaos(t *testing.T) { flags.TestChaos(t, chaosServer(t)) }

func TestLatency(t *testing.T) { flags.TestLatency(t, chaosServer(t), 50*time.Millisecond) }

func TestLatencyDeaf(t *testing.T) { flags.TestLatencyDeaf(t, chaosServer(t)) }
