// Package natskv keeps the state of rollouts in a key-value bucket of NATS JetStream.
//
//	js, err := jetstream.New(nc)
//	...
//	if _, err := js.CreateOrUpdateKeyValue(ctx, natskv.Bucket("rollouts", 3)); err != nil { ... }
//	store, err := natskv.New(ctx, js, "rollouts")
//	...
//	r, err := rollout.New("checkout-v2", policy, &rollout.Options{Store: store})
//
// The bucket is for this package alone: anything else that writes to it makes errors. To look on is fine: the values are
// what "nats kv get" prints.
//
// # What is promised
//
// Every read is answered by the leader of the bucket's stream. A read by jetstream.KeyValue may be answered by a replica
// that is behind, as any bucket that package creates allows that; this package asks otherwise, so that the bucket may be
// either. A leader that is cut off from the others, and does not know it yet, may answer a read with what was there before
// for some seconds. It can not acknowledge a write: a writer who read there is refused.
//
// An acknowledged write is on as many servers as the bucket has replicas, less than half of them. Unless the servers are
// configured with sync_interval: always, each has it in its operating system's memory before it is on its disk.
//
// A revision is a random number in a header of the message, and the sequence of the stream is what a write is compared by.
// So a stream that is restored from a backup repeats no revision. Nobody should write while it is being restored: a write
// on the way there and then is compared with the sequences of the restored stream.
//
// While a connection is being made again, the client keeps writes in its buffer and sends them later, perhaps when their
// contexts have ended. They are compared then, too. The option nats.ReconnectBufSize(-1) makes them fail at once.
//
// A value and its headers, some 200 bytes, must fit into one message: 1 MiB unless the server's max_payload says otherwise.
package natskv

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Bucket returns the configuration of a bucket that suits a Store: with file storage, one value for each key, no TTL, and
// replicas copies, which should be 3 in a cluster and is 1 otherwise. The caller may change it before it creates the bucket.
//
// What is left of a deleted key goes after an hour. That needs a server of version 2.11 or later; for an older one, set
// LimitMarkerTTL to 0, and about 200 bytes are left of each key for good.
func Bucket(name string, replicas int) jetstream.KeyValueConfig {
	return jetstream.KeyValueConfig{
		Bucket:         name,
		Description:    "staged rollouts",
		History:        1,
		Storage:        jetstream.FileStorage,
		Replicas:       replicas,
		LimitMarkerTTL: time.Hour,
	}
}

// A Store is a rollout.Store in a bucket. All methods may be called from any number of goroutines.
type Store struct {
	js     jetstream.JetStream
	nc     *nats.Conn
	stream jetstream.Stream

	api       string        // begins the subjects of requests
	reads     string        // begins the subjects of keys
	writes    string        // begins the subjects that writes are sent to
	markerTTL time.Duration // of what is left of a deleted key; 0: for good
}

// New returns the store in an existing bucket. The caller keeps the connection, and closes it when the store is not used any
// more; its options say how it is made again when it is lost, and nats.MaxReconnects(-1) is advisable.
//
// A bucket that forgets or that is filled from elsewhere is refused: one with a TTL, a mirror or one with sources.
func New(ctx context.Context, js jetstream.JetStream, bucket string) (*Store, error) {
	s, err := open(ctx, js, bucket)
	if err != nil {
		return nil, fmt.Errorf("natskv: bucket %q: %w", bucket, err)
	}
	return s, nil
}

func open(ctx context.Context, js jetstream.JetStream, bucket string) (*Store, error) {
	if _, err := js.KeyValue(ctx, bucket); err != nil { // says best what is wrong
		return nil, err
	}
	stream, err := js.Stream(ctx, "KV_"+bucket)
	if err != nil {
		return nil, err
	}
	c := stream.CachedInfo().Config
	switch {
	case c.MaxAge > 0:
		return nil, fmt.Errorf("it has a TTL of %v, after which a rollout would be forgotten", c.MaxAge)
	case c.Mirror != nil || len(c.Sources) > 0:
		return nil, errors.New("it is filled from another one")
	}
	s := &Store{js: js, nc: js.Conn(), stream: stream, reads: "$KV." + bucket + "."}
	s.writes = s.reads
	s.api = jetstream.DefaultAPIPrefix
	if o := js.Options(); o.Domain != "" {
		s.api = "$JS." + o.Domain + ".API."
	} else if o.APIPrefix != "" {
		s.api = strings.TrimSuffix(o.APIPrefix, ".") + "."
	}
	if s.api != jetstream.DefaultAPIPrefix {
		s.writes = s.api + s.reads
	}
	if c.AllowMsgTTL {
		s.markerTTL = c.SubjectDeleteMarkerTTL
	}
	return s, nil
}

const revisionHeader = "Rollout-Revision" // 16 hexadecimal digits

// An entry is the last message of a key.
type entry struct {
	value    []byte // nil if the key does not exist
	revision uint64 // 0 if the key does not exist
	sequence uint64 // 0 if there is no message: not even that of a deletion
}

// get asks the leader, whatever the bucket allows.
func (s *Store) get(ctx context.Context, key string) (entry, error) {
	subject := s.reads + escape(key)
	request, err := json.Marshal(map[string]string{"last_by_subj": subject})
	if err != nil {
		return entry{}, err
	}
	reply, err := again(ctx, func(ctx context.Context) (*nats.Msg, error) {
		return s.nc.RequestWithContext(ctx, s.api+"STREAM.MSG.GET."+s.stream.CachedInfo().Config.Name, request)
	})
	if err != nil {
		return entry{}, err
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Sequence uint64 `json:"seq"`
			Header   []byte `json:"hdrs"`
			Data     []byte `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &answer); err != nil {
		return entry{}, err
	}
	switch {
	case answer.Error != nil && answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return entry{}, nil
	case answer.Error != nil:
		return entry{}, answer.Error
	case answer.Message == nil:
		return entry{}, errors.New("the server's answer has no message")
	}
	m := answer.Message
	header := nats.Header{}
	if len(m.Header) > 0 {
		if header, err = nats.DecodeHeadersMsg(m.Header); err != nil {
			return entry{}, err
		}
	}
	if header.Get("KV-Operation") != "" || header.Get(jetstream.MarkerReasonHeader) != "" {
		return entry{sequence: m.Sequence}, nil
	}
	revision, err := strconv.ParseUint(header.Get(revisionHeader), 16, 63)
	if err != nil || revision == 0 {
		return entry{}, fmt.Errorf("message %d, on subject %s, is none of this package's", m.Sequence, subject)
	}
	if m.Data == nil {
		m.Data = []byte{}
	}
	return entry{m.Data, revision, m.Sequence}, nil
}

// again asks until there is an answer. A question on the way is lost with its connection or its leader, and nobody says so.
func again[T any](ctx context.Context, ask func(ctx context.Context) (T, error)) (T, error) {
	for wait := 500 * time.Millisecond; ; wait *= 2 {
		c, cancel := context.WithTimeout(ctx, wait)
		answer, err := ask(c)
		lost := c.Err() != nil && ctx.Err() == nil
		cancel()
		if err == nil || !lost {
			return answer, err
		}
	}
}

// Load returns the value of key and its revision, see rollout.Store.
func (s *Store) Load(ctx context.Context, key string) (value []byte, revision uint64, err error) {
	ctx, cancel, err := begin(ctx, key)
	if err != nil {
		return nil, 0, err
	}
	defer cancel()
	e, err := s.get(ctx, key)
	if err != nil {
		return nil, 0, fmt.Errorf("natskv: loading %.40q: %w", key, err)
	}
	return e.value, e.revision, nil
}

// List returns the values of the keys that begin with prefix, see rollout.Store. It takes one request, and one for each key.
func (s *Store) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	ctx, cancel, err := begin(ctx, "any")
	if err != nil {
		return nil, err
	}
	defer cancel()
	found := map[string][]byte{}
	if len(prefix) > maxKey {
		return found, nil
	}
	// A consumer would be quicker, but may be on a replica that is behind.
	info, err := again(ctx, func(ctx context.Context) (*jetstream.StreamInfo, error) {
		return s.stream.Info(ctx, jetstream.WithSubjectFilter(s.filter(prefix)))
	})
	if err != nil {
		return nil, fmt.Errorf("natskv: listing %.40q: %w", prefix, err)
	}
	var (
		mu    sync.Mutex // guards found and first
		first error
		wg    sync.WaitGroup
		room  = make(chan bool, 16) // as many requests are under way
	)
	for subject := range info.State.Subjects {
		key, ok := unescape(strings.TrimPrefix(subject, s.reads))
		if !ok || !strings.HasPrefix(key, prefix) {
			continue
		}
		room <- true
		wg.Go(func() {
			defer func() { <-room }()
			e, err := s.get(ctx, key)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				if first == nil {
					first = fmt.Errorf("natskv: listing %.40q: %.40q: %w", prefix, key, err)
					cancel()
				}
			} else if e.revision != 0 {
				found[key] = e.value
			}
		})
	}
	wg.Wait()
	if first != nil {
		return nil, first
	}
	return found, nil
}

// CompareAndSwap replaces the value of key, see rollout.Store. It takes two requests.
func (s *Store) CompareAndSwap(ctx context.Context, key string, old uint64, value []byte) (revision uint64, swapped bool, err error) {
	ctx, cancel, err := begin(ctx, key)
	if err != nil {
		return 0, false, err
	}
	defer cancel()
	for {
		e, err := s.get(ctx, key)
		switch {
		case err != nil:
			return 0, false, fmt.Errorf("natskv: writing %.40q: %w", key, err)
		case e.revision != old:
			return 0, false, nil
		case value == nil && old == 0:
			return 0, true, nil
		}
		m := nats.NewMsg(s.writes + escape(key))
		options := []jetstream.PublishOpt{jetstream.WithExpectLastSequencePerSubject(e.sequence)}
		if value == nil {
			m.Header.Set("KV-Operation", "PURGE")
			m.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject) // or an expired deletion would show the value before it
			if s.markerTTL > 0 {
				options = append(options, jetstream.WithMsgTTL(s.markerTTL))
			}
		} else {
			revision = newRevision(old)
			m.Header.Set(revisionHeader, fmt.Sprintf("%016x", revision))
			m.Data = value
		}
		_, err = s.js.PublishMsg(ctx, m, options...)
		switch {
		case err == nil:
			return revision, true, nil
		case !refused(err):
			return 0, false, fmt.Errorf("natskv: writing %.40q: %w", key, err)
		case old != 0:
			return 0, false, nil
		}
		// Somebody else made the key. Or what was left of a deletion has expired, and it is free all the same: look again.
	}
}

// refused reports whether the server has compared the sequence and written nothing. Only then is the outcome known.
func refused(err error) bool {
	var e *jetstream.APIError
	return errors.As(err, &e) &&
		(e.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || e.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

const (
	heartbeat   = 5 * time.Second  // of a consumer that has nothing else to say
	silence     = 3 * heartbeat    // after which it is taken for lost
	forgotten   = 10 * time.Second // after which the server removes a consumer that nobody listens to
	minWait     = 50 * time.Millisecond
	maxWait     = 10 * time.Second
	createLimit = 2 * time.Second // for the server to make a consumer
)

// Watch hints at changes under prefix until ctx ends, see rollout.Store. It returns an error only if the connection is closed
// for good. It has one consumer at a time, which a server that can not be reached any more removes after 10 seconds.
func (s *Store) Watch(ctx context.Context, prefix string, changed func()) error {
	if changed == nil {
		return errors.New("natskv: Store.Watch: changed is nil")
	}
	// Without being told of connections, a consumer that went with its server would be missed after several heartbeats.
	connected := s.nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer s.nc.RemoveStatusListener(connected)
	if len(prefix) > maxKey {
		prefix = prefix[:maxKey] // no key has it, but hints there must be
	}
	filter := s.filter(prefix)
	for wait := time.Duration(0); ctx.Err() == nil; {
		begun := time.Now()
		s.watch(ctx, filter, connected, changed)
		if ctx.Err() != nil {
			break
		}
		if s.nc.IsClosed() {
			return fmt.Errorf("natskv: watching: %w", nats.ErrConnectionClosed)
		}
		// It was lost. A connection that comes and goes must not leave a consumer behind each time.
		if time.Since(begun) > maxWait {
			wait = 0
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		wait = min(max(2*wait, minWait), maxWait)
	}
	return nil
}

// watch hints until its consumer is lost.
func (s *Store) watch(ctx context.Context, filter string, connected <-chan nats.Status, changed func()) {
	heard := make(chan bool, 1) // full means that something was heard, a hint or a heartbeat
	hint := make(chan bool, 1)  // full means that a hint is due
	set := func(c chan bool) {
		select {
		case c <- true:
		default:
		}
	}
	sub, err := s.nc.Subscribe(s.nc.NewInbox(), func(m *nats.Msg) {
		set(heard)
		if m.Header.Get("Status") == "" { // that of a heartbeat is 100
			set(hint)
		}
	})
	if err != nil {
		return
	}
	defer sub.Unsubscribe()
	drain(connected)
	create, cancel := context.WithTimeout(ctx, createLimit)
	consumer, err := s.js.CreatePushConsumer(create, s.stream.CachedInfo().Config.Name, jetstream.ConsumerConfig{
		DeliverSubject:    sub.Subject,
		DeliverPolicy:     jetstream.DeliverNewPolicy,
		FilterSubject:     filter,
		AckPolicy:         jetstream.AckNonePolicy,
		HeadersOnly:       true,
		IdleHeartbeat:     heartbeat,
		InactiveThreshold: forgotten,
		MemoryStorage:     true,
		Replicas:          1,
	})
	cancel()
	if err != nil {
		return
	}
	// Not waited for: there may be no connection, and the server does it by itself.
	defer s.nc.Publish(s.api+"CONSUMER.DELETE."+consumer.CachedInfo().Stream+"."+consumer.CachedInfo().Name, nil)

	set(hint) // the one at the start, or after the connection was lost
	quiet := time.NewTimer(silence)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-connected:
			return
		case <-quiet.C:
			return
		case <-heard:
			quiet.Reset(silence)
		case <-hint:
			if ctx.Err() != nil {
				return
			}
			changed()
			quiet.Reset(silence) // changed may have been slow
		}
	}
}

func drain(c <-chan nats.Status) {
	for {
		select {
		case <-c:
		default:
			return
		}
	}
}

const (
	maxKey      = 1024
	callTimeout = 10 * time.Second // of a call whose context has no deadline
)

// begin checks what every call checks, and bounds its time.
func begin(ctx context.Context, key string) (context.Context, context.CancelFunc, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	switch {
	case key == "":
		return nil, nil, errors.New(`natskv: key "" is empty`)
	case len(key) > maxKey:
		return nil, nil, fmt.Errorf("natskv: key %.40q... has %d bytes, more than %d", key, len(key), maxKey)
	case strings.IndexByte(key, 0) >= 0:
		return nil, nil, fmt.Errorf("natskv: key %q has a NUL byte", key)
	}
	if _, ok := ctx.Deadline(); !ok {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		return ctx, cancel, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	return ctx, cancel, nil
}

// newRevision draws a revision of 63 random bits that is neither 0 nor old.
func newRevision(old uint64) uint64 {
	for {
		var b [8]byte
		rand.Read(b[:]) // never fails, see its documentation
		if r := binary.LittleEndian.Uint64(b[:]) >> 1; r != 0 && r != old {
			return r
		}
	}
}

// A key is written as the words of a NATS subject, one for each part between its slashes. Every byte but a-z, A-Z, 0-9, '-'
// and '_' is "=" and two lower-case hexadecimal digits, and a part without a byte is "=". So a subject has at most three
// bytes for each of the key, and is one that the nats command takes.
func escape(key string) string {
	const digits = "0123456789abcdef"
	b := make([]byte, 0, len(key)+16)
	for i, part := range strings.Split(key, "/") {
		if i > 0 {
			b = append(b, '.')
		}
		if part == "" {
			b = append(b, '=')
		}
		for i := range len(part) {
			switch c := part[i]; {
			case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
				b = append(b, c)
			default:
				b = append(b, '=', digits[c>>4], digits[c&15])
			}
		}
	}
	return string(b)
}

// unescape reports false if s is not what escape makes of any key.
func unescape(s string) (string, bool) {
	b := make([]byte, 0, len(s))
	for i, word := range strings.Split(s, ".") {
		if i > 0 {
			b = append(b, '/')
		}
		if word == "=" {
			continue
		}
		for len(word) > 0 {
			n := 1
			c := word[0]
			if c == '=' {
				if n = 3; len(word) < n {
					return "", false
				}
				u, err := strconv.ParseUint(word[1:3], 16, 8)
				if err != nil {
					return "", false
				}
				c = byte(u)
			}
			b = append(b, c)
			word = word[n:]
		}
	}
	key := string(b)
	return key, escape(key) == s
}

// filter returns the narrowest subject that covers the keys that begin with prefix: wildcards stand for whole words.
func (s *Store) filter(prefix string) string {
	i := strings.LastIndexByte(prefix, '/')
	if i < 0 {
		return s.reads + ">"
	}
	return s.reads + escape(prefix[:i]) + ".>"
}
