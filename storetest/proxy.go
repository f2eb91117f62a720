package storetest

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
)

// A Proxy stands between a client and its server and makes the network between them fail, on demand. It listens on a
// loopback address, and forwards whatever it is sent over TCP. All methods may be called from any goroutine.
type Proxy struct {
	listener net.Listener
	target   string

	mu       sync.Mutex // guards what follows
	changed  *sync.Cond
	closed   bool
	refuse   bool
	requests holding
	replies  holding
	links    map[*link]bool
}

// A holding says what is held in one direction.
type holding struct {
	on   bool
	mark []byte
}

// A link is one connection of a client, and the one made for it.
type link struct {
	client, server net.Conn
	toServer       lane
	toClient       lane
}

// A lane is one direction of a link. It is guarded by the proxy's mutex.
type lane struct {
	buf  []byte // read, and not written yet
	eof  bool   // no more will be read
	held bool
	busy bool // a write is under way
	dead bool // nothing more will be written
}

// NewProxy starts a proxy that forwards to the TCP address target. It ends with the test.
func NewProxy(t testing.TB, target string) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{listener: l, target: target, links: map[*link]bool{}}
	p.changed = sync.NewCond(&p.mu)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		p.closed = true
		p.mu.Unlock()
		p.Cut()
		wg.Wait()
	})
	return p
}

// Addr is the address to connect to instead of the server's.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Cut ends every connection, at both ends. What is on the way, or held, is lost. New connections are accepted.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.toServer.dead, l.toClient.dead = true, true
		l.client.Close()
		l.server.Close()
	}
	p.changed.Broadcast()
}

// Refuse, with on, ends every new connection as soon as it is made. Those that are there stay: see [Proxy.Cut].
func (p *Proxy) Refuse(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = on
}

// HoldRequests keeps back what clients send on a connection, from the first piece on that has mark in it. An empty mark
// holds every connection at once. It stays so until [Proxy.Release]; then the server gets what was held, even if the client
// has closed its connection meanwhile.
//
// A mark is found in what has arrived at once, as a small request does.
func (p *Proxy) HoldRequests(mark string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests = holding{true, []byte(mark)}
	if mark == "" {
		for l := range p.links {
			l.toServer.held = true
		}
	}
}

// HoldReplies keeps back what the server sends on a connection once the client has sent mark on it, as HoldRequests does.
func (p *Proxy) HoldReplies(mark string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.replies = holding{true, []byte(mark)}
	if mark == "" {
		for l := range p.links {
			l.toClient.held = true
		}
	}
}

// Held returns the number of bytes held.
func (p *Proxy) Held() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for l := range p.links {
		for _, lane := range []*lane{&l.toServer, &l.toClient} {
			if lane.held && !lane.dead {
				n += len(lane.buf)
			}
		}
	}
	return n
}

// Release ends all holding. It returns when what was held has been passed on.
func (p *Proxy) Release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests, p.replies = holding{}, holding{}
	var waits []*lane
	for l := range p.links {
		for _, lane := range []*lane{&l.toServer, &l.toClient} {
			if lane.held {
				lane.held = false
				waits = append(waits, lane)
			}
		}
	}
	p.changed.Broadcast()
	for _, lane := range waits {
		for !lane.dead && (len(lane.buf) > 0 || lane.busy) {
			p.changed.Wait()
		}
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer client.Close()
	p.mu.Lock()
	refuse := p.refuse
	p.mu.Unlock()
	if refuse {
		return
	}
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer server.Close()
	l := &link{client: client, server: server}
	p.mu.Lock()
	if p.closed || p.refuse {
		p.mu.Unlock()
		return
	}
	l.toServer.held = p.requests.on && len(p.requests.mark) == 0
	l.toClient.held = p.replies.on && len(p.replies.mark) == 0
	p.links[l] = true
	p.mu.Unlock()

	var wg sync.WaitGroup
	wg.Go(func() { p.read(l, &l.toServer, client) })
	wg.Go(func() { p.read(l, &l.toClient, server) })
	wg.Go(func() { p.write(&l.toServer, server) })
	p.write(&l.toClient, client)
	wg.Wait()

	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

// read takes whatever comes, so that a client may close its connection while its request is held.
func (p *Proxy) read(l *link, to *lane, from net.Conn) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		p.mu.Lock()
		to.buf = append(to.buf, b[:n]...)
		if to == &l.toServer {
			if p.requests.on && bytes.Contains(to.buf, p.requests.mark) {
				to.held = true
			}
			if p.replies.on && bytes.Contains(to.buf, p.replies.mark) {
				l.toClient.held = true
			}
		}
		to.eof = err != nil
		p.changed.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *Proxy) write(from *lane, to net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for !from.dead && (from.held || len(from.buf) == 0 && !from.eof) {
			p.changed.Wait()
		}
		if from.dead {
			return
		}
		if len(from.buf) == 0 {
			from.dead = true
			p.changed.Broadcast()
			closeWrite(to)
			return
		}
		b := from.buf
		from.buf, from.busy = nil, true
		p.mu.Unlock()
		_, err := to.Write(b)
		p.mu.Lock()
		from.busy = false
		if err != nil {
			from.dead = true
		}
		p.changed.Broadcast()
	}
}

// closeWrite tells the other end that nothing more will come. It may still send.
func closeWrite(c io.Closer) {
	if t, ok := c.(*net.TCPConn); ok {
		t.CloseWrite()
	}
}
