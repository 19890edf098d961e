package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// What callers without a valid token can do to web, and to the probes. Jobs with one
// go on being answered. None of these tests is parallel, because they measure.

// maxConnections is what web and the ops ports accept at once.
const maxConnections = 1024

// jobLoad is what jobs experienced that came at a fixed rate.
type jobLoad struct {
	mu     sync.Mutex
	took   []time.Duration // of those that were accepted
	failed []string
}

// startJobs sends a valid request for one image at each tick, on a connection of its
// own, whatever became of the ones before.
func startJobs(c *client, every time.Duration) (stop func() *jobLoad) {
	load, done := &jobLoad{}, make(chan struct{})
	body, token := imageBody(newImage()), github.mint(time.Now(), nil)
	var all sync.WaitGroup
	all.Go(func() {
		ticks := time.NewTicker(every)
		defer ticks.Stop()
		for {
			select {
			case <-done:
				return
			case <-ticks.C:
				all.Go(func() { load.add(c.once(token, body)) })
			}
		}
	})
	return func() *jobLoad {
		close(done)
		all.Wait()
		slices.Sort(load.took)
		return load
	}
}

// once is post with an error for every answer but 202.
func (c *client) once(token, body string) (time.Duration, error) {
	begun := time.Now()
	a, err := c.post(context.Background(), token, body)
	if err == nil && a.status != http.StatusAccepted {
		err = fmt.Errorf("%d %s", a.status, a.body)
	}
	return time.Since(begun), err
}

func (l *jobLoad) add(took time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.failed = append(l.failed, fmt.Sprintf("after %s: %v", took, err))
		return
	}
	l.took = append(l.took, took)
}

// percentile is of the accepted ones, once they are sorted.
func (l *jobLoad) percentile(p int) time.Duration {
	if len(l.took) == 0 {
		return 0
	}
	return l.took[min(len(l.took)-1, len(l.took)*p/100)]
}

func (l *jobLoad) String() string {
	return fmt.Sprintf("%d jobs accepted, %d not, p50 %s, p99 %s", len(l.took), len(l.failed),
		l.percentile(50).Round(100*time.Microsecond), l.percentile(99).Round(100*time.Microsecond))
}

// mustBeServed fails the test if a job was not accepted, or waited 2 s.
func (l *jobLoad) mustBeServed(t testing.TB) {
	t.Helper()
	if len(l.failed) > 0 || len(l.took) < 20 {
		t.Errorf("%d jobs were accepted and %d not: %q", len(l.took), len(l.failed), first(l.failed, 3))
	}
	if p99 := l.percentile(99); p99 > 2*time.Second && !raceDetecting {
		t.Errorf("p99 of the jobs is %s", p99)
	}
}

// swarm keeps n connections to an address open until a time. Each is handed to
// attack, and replaced after a pause when attack returns.
func swarm(address string, n int, until time.Time, pause time.Duration, attack func(conn net.Conn, i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			for time.Now().Before(until) {
				if conn, err := net.DialTimeout("tcp", address, time.Second); err == nil {
					_ = conn.(*net.TCPConn).SetLinger(0) // leaves no port in TIME_WAIT
					_ = conn.SetDeadline(until)
					attack(conn, i)
					conn.Close()
				}
				time.Sleep(pause)
			}
		})
	}
	all.Wait()
}

// hold waits until the other side closes the connection, or its deadline.
func hold(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

func hostOf(url string) string { return strings.TrimPrefix(url, "http://") }

// mustStayBelow fails the test if the process ever had more memory.
func (p *program) mustStayBelow(t testing.TB, mib int) (peak int) {
	t.Helper()
	peak = memoryKiB(t, p, "VmHWM")
	if peak > mib<<10 && !raceDetecting {
		t.Errorf("%s had %d KiB, want at most %d MiB", p.name, peak, mib)
	}
	return peak
}

// startLimitedWeb is a web with the GOMEMLIMIT of k8s/.
func startLimitedWeb(t testing.TB, valkeyAddr string) *program {
	t.Helper()
	return startWeb(t, valkeyAddr, "GOMEMLIMIT="+goMemLimit(t, manifestContainer(t, "../k8s/30-web.yaml", "web")))
}

// headerShapes are headers of nearly what web reads of one, without the last byte.
var headerShapes = []struct{ name, header string }{
	{"tiny lines", atMost(post + strings.Repeat("abc:\n", maxHeaderBytes))},
	{"distinct keys", atMost(post + numbered(maxHeaderBytes, "%x:\n"))},
	{"folded lines", atMost(post + "X: a\r\n" + strings.Repeat(" b\n", maxHeaderBytes))},
	{"folded lines of one byte", atMost(post + "X: a\r\n" + strings.Repeat(" \n", maxHeaderBytes))},
	{"95 lines", atMost(post + numbered(95, "X-%d: "+strings.Repeat("x", maxHeaderBytes/95-10)+"\r\n"))},
	{"18 long lines", atMost(post + numbered(18, "X-%d: "+strings.Repeat("x", maxHeaderBytes/18-10)+"\r\n"))},
	{"one long line", atMost(post + "X: " + strings.Repeat("x", maxHeaderBytes))},
	{"a long path", atMost("POST /" + strings.Repeat("x", maxHeaderBytes))},
	{"nothing", ""},
}

// maxHeaderBytes is what web reads of a header, request line included.
const maxHeaderBytes = 10 << 10

func atMost(header string) string { return header[:min(len(header), maxHeaderBytes-20)] }

const post = "POST /event HTTP/1.1\r\nHost: web\r\n"

func numbered(n int, format string) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintf(&s, format, i)
	}
	return s.String()
}

// TestHeaderFlood: as many connections as web accepts send headers of all shapes
// without the last byte, and come again when they are closed. Without GOMEMLIMIT, web
// limits its memory by itself.
func TestHeaderFlood(t *testing.T) {
	web := startWeb(t, startValkey(t).addr)
	stop := startJobs(newClient(web.url), 50*time.Millisecond)
	var opened atomic.Int64
	swarm(hostOf(web.url), maxConnections, time.Now().Add(8*time.Second), 10*time.Millisecond, func(conn net.Conn, i int) {
		opened.Add(1)
		_, _ = io.WriteString(conn, headerShapes[i%len(headerShapes)].header)
		hold(conn)
	})
	load := stop()
	fmt.Printf("%s: %d connections, %s; resident %d KiB at most\n", t.Name(), opened.Load(), load, web.mustStayBelow(t, 64))
	load.mustBeServed(t)
}

// unanswerable are requests that web answers without a look at the body, which does
// not come.
var unanswerable = []string{
	post + "Content-Length: 100\r\n\r\n",
	post + "Authorization: Bearer x.y.z\r\nContent-Length: 100\r\n\r\n",
	post + "Expect: 100-continue\r\nContent-Length: 100\r\n\r\n",
	post + "Expect: nonsense\r\nContent-Length: 100\r\n\r\n", // net/http answers it
	post + "Transfer-Encoding: chunked\r\n\r\n",
	post + "Transfer-Encoding: chunked\r\nTrailer: X\r\n\r\n5;x=y\r\n",
	"GET /healthz HTTP/1.1\r\nHost: web\r\nContent-Length: 100\r\n\r\n",
	"GET /healthz HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n",
	"POST /nothing HTTP/1.1\r\nHost: web\r\nContent-Length: 100\r\n\r\n",
	"PUT /event HTTP/1.1\r\nHost: web\r\nContent-Length: 100000000\r\n\r\n",
}

// TestWithheldBodies: requests whose bodies never come are answered at once, let go
// of their connections within a second, and keep no job waiting.
func TestWithheldBodies(t *testing.T) {
	for _, rate := range []int{250, 1000} {
		t.Run(fmt.Sprintf("%d a second", rate), func(t *testing.T) {
			web := startLimitedWeb(t, startValkey(t).addr)
			stop := startJobs(newClient(web.url), 50*time.Millisecond)
			var mu sync.Mutex
			var answered, closed []time.Duration
			unanswered, slots := 0, make(chan struct{}, 6000)
			var all sync.WaitGroup
			ticks := time.NewTicker(time.Second / time.Duration(rate))
			defer ticks.Stop()
			for i := range rate * 15 {
				<-ticks.C
				slots <- struct{}{}
				all.Go(func() {
					defer func() { <-slots }()
					whole, gone, err := withhold(hostOf(web.url), unanswerable[i%len(unanswerable)])
					mu.Lock()
					defer mu.Unlock()
					if err != nil {
						unanswered++
						return
					}
					answered, closed = append(answered, whole), append(closed, gone)
				})
			}
			load := stop()
			all.Wait()
			slices.Sort(answered)
			slices.Sort(closed)
			if len(answered) == 0 {
				t.Fatal("no request was answered")
			}
			p99 := func(d []time.Duration) time.Duration { return d[len(d)*99/100].Round(100 * time.Microsecond) }
			fmt.Printf("%s: %d requests without bodies, %d unanswered, answered after %s (p99), closed %s later (p99), %s at most; %s; resident %d KiB at most\n",
				t.Name(), rate*15, unanswered, p99(answered), p99(closed), closed[len(closed)-1].Round(time.Millisecond), load, web.mustStayBelow(t, 64))
			load.mustBeServed(t)
			if p99(closed) > time.Second || p99(answered) > time.Second || unanswered > rate*15/100 {
				t.Errorf("%d unanswered, the others answered after %s and closed %s later", unanswered, p99(answered), p99(closed))
			}
		})
	}
}

// withhold sends a request without its body. It returns when the answer was there
// whole, and how long after that the connection was closed.
func withhold(address, request string) (whole, gone time.Duration, err error) {
	begun := time.Now()
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(begun.Add(14 * time.Second))
	_ = conn.(*net.TCPConn).SetLinger(0)
	_, _ = io.WriteString(conn, request)
	answers := bufio.NewReader(conn)
	if _, err := readAnswer(answers); err != nil {
		return 0, 0, err
	}
	whole = time.Since(begun)
	_, _ = io.Copy(io.Discard, answers)
	return whole, time.Since(begun) - whole, nil
}

func readAnswer(answers *bufio.Reader) (answer, error) {
	resp, err := http.ReadResponse(answers, nil)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{status: resp.StatusCode, header: resp.Header, body: string(body)}, err
}

// TestLateBodies: an honest client whose body comes 50 ms after the header, in two
// parts, gets the whole answer, whatever it is.
func TestLateBodies(t *testing.T) {
	web := startWeb(t, startValkey(t).addr)
	foreign := github.mint(time.Now(), map[string]any{"repository_owner": "evil", "repository": "evil/api"})
	image := imageBody(newImage())
	long := image + strings.Repeat(" ", 12<<10)
	type late struct {
		method, path, token, body string
		status                    int
	}
	var all sync.WaitGroup
	var lost atomic.Int64
	requests := []late{
		{"POST", "/event", "", image, 401}, {"POST", "/event", "x.y.z", long, 401}, {"POST", "/event", foreign, long, 403},
		{"POST", "/event", github.mint(time.Now(), nil), long, 202}, {"POST", "/event", github.mint(time.Now(), nil), image, 202},
		{"GET", "/healthz", "", image, 200}, {"POST", "/nothing", "", long, 404}, {"PUT", "/event", "", long, 405},
	}
	for i := range 40 * len(requests) {
		all.Go(func() {
			r, chunked := requests[i%len(requests)], i/len(requests)%2 == 1
			header := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: web\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\n", r.method, r.path, r.token)
			parts := []string{fmt.Sprintf("%sContent-Length: %d\r\n\r\n", header, len(r.body)), r.body[:20], r.body[20:]}
			if chunked {
				parts = []string{header + "Transfer-Encoding: chunked\r\n\r\n", "14\r\n" + r.body[:20], fmt.Sprintf("\r\n%x\r\n%s\r\n0\r\n\r\n", len(r.body)-20, r.body[20:])}
			}
			a, err := sendParts(hostOf(web.url), parts)
			if err != nil || a.status != r.status || a.body == "" && a.status != 404 && a.status != 405 {
				lost.Add(1)
				t.Errorf("%s %s, chunked: %t: %d %q, %v; want %d", r.method, r.path, chunked, a.status, a.body, err, r.status)
			}
		})
	}
	all.Wait()
	fmt.Printf("%s: %d answers, %d lost\n", t.Name(), 40*len(requests), lost.Load())
}

// sendParts sends a request in parts, 50 ms apart, and then reads the answer.
func sendParts(address string, parts []string) (answer, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return answer{}, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	for i, part := range parts {
		if i > 0 {
			time.Sleep(50 * time.Millisecond)
		}
		if _, err := io.WriteString(conn, part); err != nil {
			return answer{}, err
		}
	}
	return readAnswer(bufio.NewReader(conn))
}

// idle keeps a place: it is silent or slow, or sends all of a header and no body.
func idle(conn net.Conn, i int) {
	switch i % 4 {
	case 0:
		hold(conn)
	case 1:
		_, _ = io.WriteString(conn, "POST /healthz HTTP/1.1\r\nHost: web\r\nContent-Length: 100\r\n\r\n")
		hold(conn)
	case 2:
		_, _ = io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: web\r\n\r\n")
		hold(conn)
	case 3:
		for {
			if _, err := io.WriteString(conn, "G"); err != nil {
				return
			}
			time.Sleep(300 * time.Millisecond)
		}
	}
}

// TestIdleConnections: more connections than a port accepts stay open and come
// again. The kubelet's probes and the jobs are answered nevertheless.
func TestIdleConnections(t *testing.T) {
	v, namespace := startValkey(t), newNamespace(t)
	web := startLimitedWeb(t, v.addr)
	worker := startWorker(t, v.addr, newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+namespace)
	for _, n := range []int{1100, 2000} {
		for _, p := range []*program{web, worker} {
			t.Run(fmt.Sprintf("%d to the ops port of %s", n, p.name), func(t *testing.T) {
				until := time.Now().Add(4 * time.Second)
				var all sync.WaitGroup
				all.Go(func() { swarm(hostOf(p.ops), n, until, 100*time.Millisecond, idle) })
				probes, slowest := p.probeUntil(t, until)
				all.Wait()
				fmt.Printf("%s: %d probes, the slowest took %s\n", t.Name(), probes, slowest)
			})
		}
		t.Run(fmt.Sprintf("%d to the public port", n), func(t *testing.T) {
			stop := startJobs(newClient(web.url), 50*time.Millisecond)
			swarm(hostOf(web.url), n, time.Now().Add(4*time.Second), 100*time.Millisecond, idle)
			load := stop()
			fmt.Printf("%s: %s; resident %d KiB at most\n", t.Name(), load, web.mustStayBelow(t, 64))
			load.mustBeServed(t)
		})
	}
}

// probeUntil probes as a kubelet does, on a connection each, but oftener.
func (p *program) probeUntil(t testing.TB, until time.Time) (probes int, slowest time.Duration) {
	t.Helper()
	for ; time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		for _, path := range []string{"/healthz", "/readyz"} {
			begun := time.Now()
			status, body, err := p.probe(path)
			took := time.Since(begun)
			probes, slowest = probes+1, max(slowest, took)
			if err != nil || status != http.StatusOK || took > 900*time.Millisecond && !raceDetecting {
				t.Errorf("%s: %d %q after %s, %v", path, status, body, took, err)
			}
		}
	}
	return probes, slowest
}
