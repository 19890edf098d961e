package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// pipeListener is a listener without a network, so that the time of a synctest
// bubble passes for the servers in it.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func newPipeListener() *pipeListener {
	closed := make(chan struct{})
	return &pipeListener{make(chan net.Conn), closed, sync.OnceFunc(func() { close(closed) })}
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }
func (l *pipeListener) Close() error   { l.close(); return nil }

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// dial waits until the connection is accepted.
func (l *pipeListener) dial() (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	}
}

// do sends a request on a connection of its own.
func (l *pipeListener) do(request string) (resp *http.Response, body string, err error) {
	conn, err := l.dial()
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		return nil, "", err
	}
	if resp, err = http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
		return nil, "", err
	}
	text, err := io.ReadAll(resp.Body)
	return resp, string(text), err
}

// get returns status and body, or 0 and the error.
func (l *pipeListener) get(path string) (status int, body string) {
	resp, body, err := l.do("GET " + path + " HTTP/1.1\r\nHost: test\r\n\r\n")
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, body
}

// testService is a running service in a synctest bubble.
type testService struct {
	public, ops *pipeListener
	taskDone    atomic.Bool
	cancel      context.CancelFunc
	served      chan error
}

// withService tests a service that serves h on the public port, in a bubble.
// The task waits for its context.
func withService(t *testing.T, h http.Handler, ready func(context.Context) error, test func(t *testing.T, s *testService)) {
	synctest.Test(t, func(t *testing.T) {
		s := &testService{public: newPipeListener(), ops: newPipeListener(), served: make(chan error, 1)}
		listeners := map[string]*pipeListener{"ops": s.ops, "web": s.public}
		running := &service{log: slog.New(slog.DiscardHandler), opsAddr: "ops", ready: ready, apiAddr: "web", api: h}
		running.listen = func(_, addr string) (net.Listener, error) { return listeners[addr], nil }
		running.task = func(ctx context.Context) error {
			<-ctx.Done()
			s.taskDone.Store(true)
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		s.cancel = cancel
		var ended sync.WaitGroup
		ended.Go(func() { s.served <- running.run(ctx) })
		defer ended.Wait()
		defer cancel()
		synctest.Wait()
		test(t, s)
	})
}

func alwaysReady(context.Context) error { return nil }

// A service that is told to stop answers what is in flight, and what still
// arrives until everybody knows.
func TestDrain(t *testing.T) {
	var release chan struct{}
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			<-release
		}
		io.WriteString(w, "done")
	})
	withService(t, h, alwaysReady, func(t *testing.T, s *testService) {
		release = make(chan struct{}) // of this bubble
		expect := func(l *pipeListener, path string, status int, body string) {
			t.Helper()
			if got, text := l.get(path); got != status || text != body {
				t.Errorf("%s: %d %q, want %d %q", path, got, text, status, body)
			}
		}
		expect(s.ops, "/readyz", 200, "ok\n")
		answer := make(chan string, 1)
		go func() {
			_, body := s.public.get("/slow")
			answer <- body
		}()
		synctest.Wait()
		s.cancel()
		synctest.Wait()
		expect(s.ops, "/readyz", 503, "stopping\n")
		expect(s.ops, "/healthz", 200, "ok\n")
		time.Sleep(lameDuck / 2)
		expect(s.public, "/", 200, "done")
		time.Sleep(lameDuck)
		expect(s.public, "/", 0, syscall.ECONNREFUSED.Error())
		expect(s.ops, "/healthz", 200, "ok\n")
		if s.taskDone.Load() {
			t.Error("the task was stopped before the requests were answered")
		}
		close(release)
		if body := <-answer; body != "done" {
			t.Errorf("the request in flight got %q", body)
		}
		if err := <-s.served; err != nil || !s.taskDone.Load() {
			t.Errorf("run: %v", err)
		}
		expect(s.ops, "/healthz", 0, syscall.ECONNREFUSED.Error())
	})
}

// A request that never ends holds up the process for a bounded time.
func TestDrainIsBounded(t *testing.T) {
	h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	withService(t, h, alwaysReady, func(t *testing.T, s *testService) {
		conn, err := s.public.dial()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: test\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		s.cancel()
		time.Sleep(lameDuck + drainTimeout)
		synctest.Wait()
		select {
		case err := <-s.served:
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		default:
			t.Error("it still waits")
			conn.Close()
		}
	})
}

// While web is being replaced, no request is dropped: not one that is sent to
// it, nor one on a connection that it closes at the same moment.
func TestDrainUnderLoad(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(2 * time.Millisecond)
		io.WriteString(w, "done")
	})
	withService(t, h, alwaysReady, func(t *testing.T, s *testService) {
		var dropped, kept, answered atomic.Int64
		var clients sync.WaitGroup
		end := time.Now().Add(100*time.Millisecond + lameDuck/2)
		for range 20 {
			clients.Go(func() {
				for time.Now().Before(end) {
					switch resp, _, err := s.public.do("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 2\r\n\r\n{}"); {
					case err != nil:
						dropped.Add(1)
					case !resp.Close:
						kept.Add(1)
					default:
						answered.Add(1)
					}
					time.Sleep(rand.N(4 * time.Millisecond))
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		s.cancel()
		clients.Wait()
		if err := <-s.served; err != nil || dropped.Load() > 0 || kept.Load() > 0 || answered.Load() < 100 {
			t.Errorf("%v: %d requests were dropped, %d connections kept, %d answered", err, dropped.Load(), kept.Load(), answered.Load())
		}
	})
}

// A task or a server that breaks ends the process with its error.
func TestServiceFails(t *testing.T) {
	broken := errors.New("broken")
	synctest.Test(t, func(t *testing.T) {
		listen := func(string, string) (net.Listener, error) { return newPipeListener(), nil }
		s := &service{log: slog.New(slog.DiscardHandler), listen: listen, ready: alwaysReady, task: func(context.Context) error { return broken }}
		if err := s.run(t.Context()); !errors.Is(err, broken) {
			t.Errorf("a broken task: %v", err)
		}
	})
	withService(t, http.NotFoundHandler(), alwaysReady, func(t *testing.T, s *testService) {
		s.public.Close()
		if err := <-s.served; !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), "serving web") || !s.taskDone.Load() {
			t.Errorf("a broken server: %v", err)
		}
	})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s := &service{log: slog.New(slog.DiscardHandler), listen: net.Listen, opsAddr: taken.Addr().String()}
	if err := s.run(t.Context()); err == nil || !strings.Contains(err.Error(), "listening for ops") {
		t.Errorf("a port in use: %v", err)
	}
}

// A readiness check that hangs is answered before the kubelet gives up.
func TestProbeTimeout(t *testing.T) {
	hang := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	withService(t, http.NotFoundHandler(), hang, func(t *testing.T, s *testService) {
		start := time.Now()
		if status, _ := s.ops.get("/readyz"); status != 503 || time.Since(start) >= time.Second {
			t.Errorf("%d after %s", status, time.Since(start))
		}
	})
}

// Connections beyond the bound wait until another one is closed.
func TestConnectionsAreBounded(t *testing.T) {
	withService(t, http.NotFoundHandler(), alwaysReady, func(t *testing.T, s *testService) {
		conns := make([]net.Conn, maxConnections)
		for i := range conns {
			conn, err := s.public.dial()
			if err != nil {
				t.Fatal(err)
			}
			conns[i] = conn
		}
		answered := make(chan int, 1)
		go func() {
			status, _ := s.public.get("/")
			answered <- status
		}()
		synctest.Wait()
		select {
		case status := <-answered:
			t.Errorf("one connection more was served: %d", status)
		default:
		}
		conns[0].Close()
		if status := <-answered; status != 404 {
			t.Errorf("with a free place: %d", status)
		}
		for _, conn := range conns {
			conn.Close()
		}
	})
}

// A header of many lines is refused before it is parsed; what follows the header is
// not counted.
func TestHeaderLines(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprint(w, len(r.Header), len(body), err)
	})
	head := func(lines int) string { // with the request line and an empty one
		text := "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n"
		for i := range lines - 4 {
			text += fmt.Sprintf("x%d:\n", i)
		}
		return text
	}
	body := strings.Repeat("\n", 400)
	withService(t, h, alwaysReady, func(t *testing.T, s *testService) {
		for request, status := range map[string]int{
			head(maxHeaderLines) + "\r\n" + body:                                             200,
			head(maxHeaderLines) + "\n" + body:                                               200,
			head(maxHeaderLines+1) + "\r\n" + body:                                           400,
			head(maxHeaderLines + 2):                                                         400, // held back
			"POST / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("a:\r\n", 1000):                400,
			"\r\n\r\n" + head(maxHeaderLines+1) + "\r\n":                                     400,
			"POST / HTTP/1.1\r\nHost: x\r\n\r\r\n" + strings.Repeat("a:\r\n", 1000) + "\r\n": 400,
		} {
			resp, text, err := s.public.do(request)
			if err != nil || resp.StatusCode != status || status == 200 && text != fmt.Sprint(maxHeaderLines-4+1, 400, nil) {
				t.Errorf("%.60q: %v %q %v, want %d", request, resp, text, err, status)
			}
		}
		for rest, status := range map[string]string{strings.Repeat("x", maxTokenBytes+1900): "200", strings.Repeat("x", maxHeaderBytes): "431",
			strings.Repeat("\r\na:", 1000): "400"} {
			conn, err := s.public.dial()
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nX: x")
			time.Sleep(10 * time.Millisecond)        // the line comes in two pieces
			go fmt.Fprintf(conn, "%s\r\n\r\n", rest) // web does not read all
			if answer, err := io.ReadAll(conn); !strings.HasPrefix(string(answer), "HTTP/1.1 "+status) {
				t.Errorf("%d bytes more: %q %v, want %s", len(rest), answer, err, status)
			}
		}
	})
}

// A body that never comes keeps no place once the request is answered.
func TestUnreadBody(t *testing.T) {
	withService(t, http.NotFoundHandler(), alwaysReady, func(t *testing.T, s *testService) {
		for _, l := range []*pipeListener{s.public, s.ops} {
			for _, framing := range []string{"Content-Length: 100", "Content-Length: 1000000000", "Transfer-Encoding: chunked", "Content-Length: 100\r\nExpect: 100-continue",
				"Content-Length: 100\r\nExpect: x"} { // net/http answers that by itself
				conn, err := l.dial()
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				fmt.Fprintf(conn, "POST /nothing HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", framing)
				answer, err := io.ReadAll(conn)
				if took := time.Since(start); took > 500*time.Millisecond || !strings.HasPrefix(string(answer), "HTTP/1.1 4") {
					t.Errorf("%s: let go after %s, %v: %q", framing, took, err, answer)
				}
			}
		}
	})
}

// A client that was told to go on has as much time for its body as any other.
func TestContinue(t *testing.T) {
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	withService(t, echo, alwaysReady, func(t *testing.T, s *testService) {
		conn, err := s.public.dial()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
		io.CopyN(io.Discard, conn, int64(len("HTTP/1.1 100 Continue\r\n\r\n")))
		time.Sleep(2 * lingerTimeout)
		fmt.Fprint(conn, "body")
		if answer, err := io.ReadAll(conn); !strings.HasSuffix(string(answer), "\r\n\r\nbody") {
			t.Errorf("%q, %v", answer, err)
		}
	})
}

// Idle clients, who come back at once, leave a probe time to be answered.
func TestIdleClientsAndProbes(t *testing.T) {
	withService(t, http.NotFoundHandler(), alwaysReady, func(t *testing.T, s *testService) {
		var idle sync.WaitGroup
		end := time.Now().Add(3 * time.Second)
		for range maxConnections + 76 {
			idle.Go(func() {
				for time.Now().Before(end) {
					if conn, err := s.ops.dial(); err == nil {
						io.ReadAll(conn)
						conn.Close()
					}
				}
			})
		}
		for range 10 {
			time.Sleep(100 * time.Millisecond)
			start := time.Now()
			if status, body := s.ops.get("/healthz"); status != 200 || time.Since(start) > probeTimeout {
				t.Errorf("%d %q after %s", status, body, time.Since(start))
			}
		}
		idle.Wait()
	})
}

// Further scrapes are refused while as many as may be are answered.
func TestTooManyScrapes(t *testing.T) {
	release, answers := make(chan struct{}), make(chan int, maxScrapes+1)
	defer close(release)
	h := (&service{metrics: webMetrics, measure: func() { <-release }}).ops()
	for range maxScrapes + 1 {
		go func() {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
			answers <- w.Code
		}()
	}
	if first := <-answers; first != http.StatusServiceUnavailable {
		t.Errorf("the first answer is %d", first)
	}
}

// A client that reads /metrics slowly does not hold up what is measured.
func TestSlowScrape(t *testing.T) {
	r, w := io.Pipe()
	defer time.AfterFunc(5*time.Second, func() { t.Error("a measurement waits for the client"); r.Close() }).Stop()
	go webMetrics.WritePrometheus(w)
	r.Read(make([]byte, 1))
	verifySeconds.Update(0)
}

// A client that is slow on purpose is cut off, with a valid token as well.
func TestSlowClients(t *testing.T) {
	issuer := newTestIssuer(t)
	for _, tt := range []struct {
		name, head string
		token      bool
		limit      time.Duration
	}{
		{"says nothing", "", false, headerTimeout},
		{"half a header", "POST /event HTTP/1.1\r\nHost: x\r\n", false, headerTimeout},
		{"half a body", "POST /event HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n", true, 5 * time.Second},
	} {
		log := slog.New(slog.DiscardHandler)
		h := &web{log: log, policy: mustPolicy(t, []string{"acme"}, nil, ""),
			publish: func(context.Context, []string, int) (publication, error) {
				t.Error("something was published")
				return publication{}, nil
			}}
		withService(t, h, alwaysReady, func(t *testing.T, s *testService) {
			h.verifier = newVerifier(issuer.URL, testAudience, issuer.Offline(), log, time.Now)
			if err := h.verifier.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			head := tt.head
			if tt.token {
				head += "Authorization: Bearer " + issuer.with(nil) + "\r\n\r\n{"
			}
			conn, err := s.public.dial()
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if _, err := io.WriteString(conn, head); err != nil {
				t.Fatal(err)
			}
			answer, _ := io.ReadAll(conn)
			if took := time.Since(start); took > tt.limit+time.Second || tt.token != strings.Contains(string(answer), "the body could not be read") {
				t.Errorf("%s: cut off after %s with %q", tt.name, took, answer)
			}
		})
	}
}
