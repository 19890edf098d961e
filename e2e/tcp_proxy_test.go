package e2e

import (
	"fmt"
	"net"
	"sync"
	"testing"
)

// mode is what a tcpProxy does with connections, old and new ones alike.
type mode int

const (
	pass   mode = iota
	stall       // a silent network: connections stay and are accepted, but nothing arrives
	reset       // every connection is cut with a RST
	refuse      // nobody listens
)

// tcpProxy stands between two processes.
type tcpProxy struct {
	addr   string
	target string

	mu       sync.Mutex
	mode     mode
	changed  chan struct{} // closed and replaced when mode changes
	conns    map[net.Conn]bool
	listener net.Listener
	epoch    int // connections of an earlier one are silent for good
}

func newTCPProxy(t testing.TB, target string) *tcpProxy {
	t.Helper()
	p := &tcpProxy{addr: fmt.Sprintf("127.0.0.1:%d", mustPort(t)), target: target, changed: make(chan struct{}), conns: map[net.Conn]bool{}}
	if err := p.listen(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.set(refuse) })
	return p
}

func (p *tcpProxy) listen() error {
	listener, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.listener = listener
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(conn)
		}
	}()
	return nil
}

// set changes the mode. Back in pass, stalled connections deliver what they held,
// as TCP does when a network comes back.
func (p *tcpProxy) set(m mode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == refuse && m != refuse {
		if err := p.listen(); err != nil {
			panic(err) // the port is ours and below the ephemeral range
		}
	}
	p.mode = m
	close(p.changed)
	p.changed = make(chan struct{})
	if m == refuse {
		p.listener.Close()
	}
	if m == reset || m == refuse {
		for conn := range p.conns {
			cut(conn)
		}
	}
}

// abandon makes the open connections silent for good, as a NAT gateway does that
// has forgotten them. New ones pass.
func (p *tcpProxy) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.epoch++
}

// retarget sends new connections elsewhere, as a Service does when a pod is
// replaced. Old ones stay.
func (p *tcpProxy) retarget(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

func cut(conn net.Conn) {
	_ = conn.(*net.TCPConn).SetLinger(0) // RST instead of FIN
	conn.Close()
}

// track remembers a connection so that it can be cut, or cuts it at once.
func (p *tcpProxy) track(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == reset || p.mode == refuse {
		cut(conn)
		return false
	}
	p.conns[conn] = true
	return true
}

func (p *tcpProxy) drop(conn net.Conn) {
	p.mu.Lock()
	delete(p.conns, conn)
	p.mu.Unlock()
	conn.Close()
}

// whilePassing blocks as long as the network is silent for connections of the
// epoch.
func (p *tcpProxy) whilePassing(epoch int) {
	for {
		p.mu.Lock()
		m, changed, abandoned := p.mode, p.changed, epoch < p.epoch
		p.mu.Unlock()
		if m != stall && !(m == pass && abandoned) {
			return
		}
		<-changed
	}
}

func (p *tcpProxy) serve(client net.Conn) {
	if !p.track(client) {
		return
	}
	defer p.drop(client)
	p.mu.Lock()
	target, epoch := p.target, p.epoch
	p.mu.Unlock()
	p.whilePassing(epoch)
	server, err := net.Dial("tcp", target)
	if err != nil {
		cut(client)
		return
	}
	if !p.track(server) {
		return
	}
	defer p.drop(server)
	var both sync.WaitGroup
	forward := func(to, from net.Conn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			// What was read while the network went silent waits with it.
			p.whilePassing(epoch)
			if n > 0 {
				if _, werr := to.Write(buf[:n]); werr != nil {
					err = werr
				}
			}
			if err != nil {
				// Half-closed at best: the other direction may have more to say.
				_ = to.(*net.TCPConn).CloseWrite()
				return
			}
		}
	}
	both.Go(func() { forward(server, client) })
	both.Go(func() { forward(client, server) })
	both.Wait()
}
