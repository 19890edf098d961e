package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// mode is what a tcpProxy does with connections, old and new ones alike.
type mode int

const (
	pass   mode = iota
	stall       // a silent network: connections stay, or are accepted, and nothing arrives
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

// set changes the mode; returning to pass, stalled connections deliver what
// they held, as TCP does when a network comes back.
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

// abandon makes the connections there are silent for good, as a NAT gateway does
// that has forgotten them; new ones pass.
func (p *tcpProxy) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.epoch++
}

// retarget sends new connections elsewhere, as a Service does when a pod is
// replaced; old ones stay where they are.
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

// apiProxy stands before the API server, speaks HTTP/2 as it does, and
// misbehaves as it is told.
type apiProxy struct {
	url  string
	host string

	mu        sync.Mutex
	intercept intercept
	deaf      bool // watches get nothing any more
	patches   map[string][]patchSeen
	lifted    chan struct{} // closed and replaced whenever intercept changes
}

// patchSeen is one PATCH of a Deployment and how it was answered.
type patchSeen struct {
	at     time.Time
	status int // 0: no answer
	body   string
}

// intercept handles a request itself and returns true, or leaves it to the API
// server. lifted is closed when it is replaced.
type intercept func(w http.ResponseWriter, r *http.Request, lifted <-chan struct{}) bool

func newAPIProxy(t testing.TB, target string) *apiProxy {
	t.Helper()
	p := &apiProxy{patches: map[string][]patchSeen{}, lifted: make(chan struct{})}
	to, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	upstream := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) },
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: testCA.pool()},
			ForceAttemptHTTP2: true,
		},
		FlushInterval: -1, // watches
		ErrorLog:      log.New(io.Discard, "", 0),
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) {
			// The API server is away: the worker must see a broken connection,
			// as it would without us, not a well-formed 502.
			panic(http.ErrAbortHandler)
		},
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.serve(upstream, w, r)
	}))
	cert, _, _, err := testCA.serverCert()
	if err != nil {
		t.Fatal(err)
	}
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	// Cancelled before Close, which waits for handlers, hanging ones too.
	ctx, cancel := context.WithCancel(context.Background())
	server.Config.BaseContext = func(net.Listener) context.Context { return ctx }
	server.StartTLS()
	t.Cleanup(func() {
		p.set(nil)
		cancel()
		server.CloseClientConnections()
		server.Close()
	})
	p.url, p.host = server.URL, strings.TrimPrefix(server.URL, "https://")
	return p
}

// set replaces what happens to requests; nil lets all pass.
func (p *apiProxy) set(i intercept) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.intercept = i
	close(p.lifted)
	p.lifted = make(chan struct{})
}

// deafen stops forwarding what the API server sends to watches, old and new,
// without a word; lifted, new watches work, and old ones stay dead: what they
// missed is gone.
func (p *apiProxy) deafen(deaf bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deaf = deaf
}

func (p *apiProxy) isDeaf() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.deaf
}

// patchesOf are the PATCHes of a Deployment so far.
func (p *apiProxy) patchesOf(d deployment) []patchSeen {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]patchSeen(nil), p.patches[d.key()]...)
}

// patched is the key of the Deployment a PATCH is for.
func patched(r *http.Request) (key string, ok bool) {
	parts := strings.Split(r.URL.Path, "/") // "", apis, apps, v1, namespaces, NS, deployments, NAME
	if r.Method != http.MethodPatch || len(parts) != 8 || parts[6] != "deployments" {
		return "", false
	}
	return parts[5] + "/" + parts[7], true
}

func isWatch(r *http.Request) bool {
	watch := r.URL.Query().Get("watch")
	return r.Method == http.MethodGet && (watch == "true" || watch == "1")
}

func (p *apiProxy) serve(upstream http.Handler, w http.ResponseWriter, r *http.Request) {
	answer := &answerWriter{ResponseWriter: w}
	if isWatch(r) {
		answer.swallow = p.isDeaf
	}
	if key, ok := patched(r); ok {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		p.mu.Lock()
		at := len(p.patches[key])
		p.patches[key] = append(p.patches[key], patchSeen{at: time.Now(), body: string(body)})
		p.mu.Unlock()
		defer func() {
			p.mu.Lock()
			p.patches[key][at].status = answer.status
			p.mu.Unlock()
		}()
	}
	p.mu.Lock()
	i, lifted := p.intercept, p.lifted
	p.mu.Unlock()
	if i != nil && i(answer, r, lifted) {
		return
	}
	upstream.ServeHTTP(answer, r)
}

// answerWriter keeps the status, and can swallow a body that is being streamed.
type answerWriter struct {
	http.ResponseWriter
	status   int
	swallow  func() bool
	swallown bool // once something is missing from a stream nothing may follow
}

func (w *answerWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *answerWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	if w.swallow != nil && (w.swallown || w.swallow()) {
		w.swallown = true
		return len(p), nil
	}
	return w.ResponseWriter.Write(p)
}

func (w *answerWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// What an API server in trouble does, as intercepts.

// answering answers every request that is chosen with a status, as an API
// server does: with a Status object, and Retry-After if it says so.
func answering(status int, retryAfter string, chosen func(*http.Request) bool) intercept {
	return func(w http.ResponseWriter, r *http.Request, _ <-chan struct{}) bool {
		if !chosen(r) {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(status)
		reason := map[int]string{500: "InternalError", 429: "TooManyRequests", 503: "ServiceUnavailable"}[status]
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"told to by the test","reason":%q,"code":%d}`, reason, status)
		return true
	}
}

// resetting breaks the chosen requests off without an answer.
func resetting(chosen func(*http.Request) bool) intercept {
	return func(_ http.ResponseWriter, r *http.Request, _ <-chan struct{}) bool {
		if chosen(r) {
			panic(http.ErrAbortHandler)
		}
		return false
	}
}

// hanging keeps the chosen requests without an answer until it is lifted, then
// breaks them off: an API server that hung has usually died.
func hanging(chosen func(*http.Request) bool) intercept {
	return func(_ http.ResponseWriter, r *http.Request, lifted <-chan struct{}) bool {
		if !chosen(r) {
			return false
		}
		select {
		case <-lifted:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler)
	}
}

// delaying lets the chosen requests pass after a while.
func delaying(by time.Duration, chosen func(*http.Request) bool) intercept {
	return func(_ http.ResponseWriter, r *http.Request, _ <-chan struct{}) bool {
		if chosen(r) {
			time.Sleep(by)
		}
		return false
	}
}

func everything(*http.Request) bool { return true }

func everyPatch(r *http.Request) bool { _, ok := patched(r); return ok }

func patchOf(d deployment) func(*http.Request) bool {
	return func(r *http.Request) bool { key, ok := patched(r); return ok && key == d.key() }
}
