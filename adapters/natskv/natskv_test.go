package natskv

import (
	"context"
	"fmt"
	"log"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func ExampleNew() {
	nc, err := nats.Connect("nats://127.0.0.1:4222", nats.MaxReconnects(-1))
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	if _, err := js.CreateOrUpdateKeyValue(ctx, Bucket("rollouts", 3)); err != nil {
		log.Fatal(err)
	}
	store, err := New(ctx, js, "rollouts")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(store.Load(ctx, "rollout/checkout-v2/state")) // or as rollout.Options.Store
}

func TestEscape(t *testing.T) {
	for key, want := range map[string]string{
		"a": "a", "A-_9": "A-_9", "a/b": "a.b", "a.b": "a=2eb", "/": "=.=", "a/": "a.=", "//a": "=.=.a", "=": "=3d", "*": "=2a", ">": "=3e",
		"a b": "a=20b", "ä": "=c3=a4", "\xff": "=ff", "": "=",
		"rollout/x/evidence/host-1": "rollout.x.evidence.host-1",
	} {
		if got := escape(key); got != want {
			t.Errorf("escape(%q) = %q, want %q", key, got, want)
		}
	}
	for _, s := range []string{"", ".", "a..b", "a.", "=2", "=2E", "=61", "=zz", "*", "a=", "=+1", "a b"} {
		if got, ok := unescape(s); ok {
			t.Errorf("unescape(%q) = %q, want none", s, got)
		}
	}
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"a", "a/b", "//", "", "=2e", "a.b", "\x00", "ä"} {
		f.Add(s, "a")
	}
	s := &Store{reads: "$KV.b."}
	f.Fuzz(func(t *testing.T, key, rest string) {
		got := escape(key)
		if back, ok := unescape(got); !ok || back != key {
			t.Errorf("unescape(escape(%q)) = %q, %v", key, back, ok)
		}
		if len(got) > 3*len(key)+1 || strings.Trim(got, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=.") != "" ||
			strings.HasPrefix(got, ".") || strings.HasSuffix(got, ".") || strings.Contains(got, "..") {
			t.Errorf("escape(%q) = %q: no subject", key, got)
		}
		if back, ok := unescape(key); ok && escape(back) != key {
			t.Errorf("unescape(%q) = %q", key, back)
		}
		if covers := strings.TrimSuffix(s.filter(key), ">"); !strings.HasPrefix(s.reads+escape(key+rest), covers) {
			t.Errorf("the filter of %q is without %q", key, key+rest)
		}
	})
}
