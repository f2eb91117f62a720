package rollout

import (
	"bytes"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stagedrollout/rollout/internal/tally"
)

// garbage are documents that nobody of this version has written.
var garbage = map[string][]byte{
	"empty": {}, "garbage": []byte("\x00\x01"), "truncated": (&tally.Doc{About: tally.About{Inc: "other"}}).Encode()[:9],
	"another's": (&tally.Doc{About: tally.About{Inc: "somebody"}}).Encode(), "huge": bytes.Repeat([]byte{'x'}, 1<<20),
	"newer": append([]byte("\x89rev\x63"), make([]byte, 20)...),
}

// TestGarbageEvidence: evidence that cannot be read stops judging and promoting for some tries, is told, and is then given
// up; what is of a newer format is waited for. The shares stay, and nothing of it is overwritten.
func TestGarbageEvidence(t *testing.T) {
	for name, doc := range garbage {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := MemStore()
				r := start(t, "x", threeStages(), Options{Store: store})
				var kinds []EventKind
				r.Subscribe(func(e Event) { kinds = append(kinds, e.Kind) })
				r.serve(30*time.Second, 0, 0)
				st := inStore(t, store)
				key := r.evidencePrefix(st.Gen, st.Nonce) + "other"
				if _, ok, err := store.CompareAndSwap(t.Context(), key, 0, doc); !ok || err != nil {
					t.Fatal(ok, err)
				}
				round := inStore(t, store).Round
				r.serve(20*time.Second, 0, 0)
				if !served(r.Rollout) {
					t.Error("the share is not kept")
				}
				r.serve(20*time.Minute, 0, 0)
				synctest.Wait()
				now := inStore(t, store)
				if name == "newer" {
					if now.Round > round+1 || !slices.Contains(kinds, StoreFailed) {
						t.Errorf("round %d became %d; told was %v", round, now.Round, kinds)
					}
				} else if r.Status().Stage.Name == "everyone 10 %" || !slices.Contains(kinds, EvidenceLost) {
					t.Errorf("it does not go on: %+v; told was %v", r.Status().Stage, kinds)
				}
				if !served(r.Rollout) {
					t.Error("the share is not kept")
				}
				if kept, _, _ := store.Load(t.Context(), key); !bytes.Equal(kept, doc) {
					t.Error("the document was overwritten")
				}
			})
		})
	}
}

// TestGarbageHead: a head that cannot be read is an error that says so; the last good share is kept, and it is not
// overwritten. Where it is put right, all goes on.
func TestGarbageHead(t *testing.T) {
	for name, doc := range map[string]string{"empty": "", "garbage": "\x00", "newer": `{"format":99}`, "another's": `{"format":1,"name":"y","gen":1,"ver":1,"epoch":1,"versions":[{"version":"","gen":1}]}`} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := MemStore()
				r := start(t, "x", threeStages(), Options{Store: store})
				failed := false
				r.Subscribe(func(e Event) { failed = failed || e.Kind == StoreFailed && e.Err != nil })
				r.serve(30*time.Second, 0, 0)
				good, rev, _ := store.Load(t.Context(), r.headKey())
				if _, ok, err := store.CompareAndSwap(t.Context(), r.headKey(), rev, []byte(doc)); !ok || err != nil {
					t.Fatal(ok, err)
				}
				r.serve(3*time.Minute, 0, 0)
				synctest.Wait()
				if !served(r.Rollout) || !failed {
					t.Errorf("served: %v, told: %v", served(r.Rollout), failed)
				}
				now, rev, _ := store.Load(t.Context(), r.headKey())
				if string(now) != doc {
					t.Error("it was overwritten")
				}
				if _, ok, _ := store.CompareAndSwap(t.Context(), r.headKey(), rev, good); !ok {
					t.Fatal("conflict")
				}
				minute()
				if r.Status().Err != "" {
					t.Errorf("%v", r.Status().Err)
				}
			})
		})
	}
}
