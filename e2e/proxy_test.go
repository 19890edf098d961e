package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// nginx is a running nginx with k8s/examples/nginx.conf.
type nginx struct {
	*process
	addr     string
	upstream *tcpProxy // between nginx and web
}

// startNginx starts it as one process, which ends even if the test is killed.
func startNginx(t *testing.T, upstream string) *nginx {
	t.Helper()
	if _, err := exec.LookPath("nginx"); err != nil && os.Getenv("CI") != "" {
		t.Fatalf("nginx is required in CI (Debian: apt-get install nginx): %v", err)
	} else if err != nil {
		t.Skip("nginx is not installed")
	}
	n := &nginx{addr: fmt.Sprintf("127.0.0.1:%d", mustPort(t)), upstream: newTCPProxy(t, upstream)}
	_, certificate, key, err := testCA.serverCert()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{"nginx.conf": n.config(t, dir), "tls.crt": certificate, "tls.key": key} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.process, err = startProcess("nginx", []string{"PATH=" + os.Getenv("PATH")}, "nginx", "-e", "stderr", "-p", dir, "-c", filepath.Join(dir, "nginx.conf"),
		"-g", "daemon off; master_process off; pid "+filepath.Join(dir, "pid")+";")
	if err != nil {
		t.Fatal(err)
	}
	n.ownedBy(t)
	t.Cleanup(func() {
		if strings.Contains(n.stderr.String(), "limiting") {
			t.Error("nginx's error log has a line for each refused request")
		}
	})
	eventually(t, 10*time.Second, "nginx accepts connections", func() error {
		conn, err := net.Dial("tcp", n.addr)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return n
}

// config is the example with other addresses and paths.
func (n *nginx) config(t *testing.T, dir string) []byte {
	t.Helper()
	text, err := os.ReadFile("../k8s/examples/nginx.conf")
	if err != nil {
		t.Fatal(err)
	}
	http := "\nhttp {"
	for _, name := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		http += fmt.Sprintf("\n    %s_temp_path %s;", name, filepath.Join(dir, name))
	}
	for _, change := range [][2]string{
		{"\nhttp {", http},
		{" 443 ssl;", " " + n.addr + " ssl;"},
		{"//web.kuberollouttrigger.svc.cluster.local;", "//" + n.upstream.addr + ";"},
		{" /etc/nginx/tls.crt;", " " + filepath.Join(dir, "tls.crt") + ";"},
		{" /etc/nginx/tls.key;", " " + filepath.Join(dir, "tls.key") + ";"},
		{" /var/log/nginx/access.log;", " " + filepath.Join(dir, "access.log") + ";"},
	} {
		if !bytes.Contains(text, []byte(change[0])) {
			t.Fatalf("nginx.conf has no %q", change[0])
		}
		text = bytes.ReplaceAll(text, []byte(change[0]), []byte(change[1]))
	}
	return text
}

// connectionsToWeb is how many are open.
func (n *nginx) connectionsToWeb() int {
	n.upstream.mu.Lock()
	defer n.upstream.mu.Unlock()
	return len(n.upstream.conns) / 2 // each has two ends
}

// dial connects from an address of 127.0.0.0/8.
func (n *nginx) dial(ctx context.Context, from string) (*tls.Conn, error) {
	local := &net.TCPAddr{IP: net.ParseIP(from)}
	conn, err := (&net.Dialer{LocalAddr: local, Timeout: 10 * time.Second}).DialContext(ctx, "tcp", n.addr)
	if err != nil {
		return nil, err
	}
	secure := tls.Client(conn, &tls.Config{RootCAs: testCA.pool(), ServerName: "127.0.0.1"})
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return secure, secure.HandshakeContext(ctx)
}

func (n *nginx) client(from string) *client {
	c := newClient("https://" + n.addr)
	c.http.Timeout = 20 * time.Second // as in docs/github-actions.md
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return n.dial(ctx, from) }
	c.http.Transport = &http.Transport{DisableKeepAlives: true, DialTLSContext: dial}
	return c
}

// send writes a request as it stands and returns the answer's status and whether
// web gave it. It fails if nginx closes the connection without an answer.
func (n *nginx) send(t *testing.T, from, request string) (status int, fromWeb bool) {
	t.Helper()
	conn, err := n.dial(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, request) // nginx may answer before the end
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("no answer to %.100q of %d bytes: %v", request, len(request), err)
	}
	resp.Body.Close()
	if !resp.Close {
		t.Errorf("%.100q: nginx keeps the connection open", request)
	}
	return resp.StatusCode, resp.Header.Get("X-Content-Type-Options") != ""
}

// hold opens connections that send the beginning of a request and nothing more.
// refused is how many nginx has answered with 429 so far; closed waits until all
// connections are closed.
func (n *nginx) hold(t *testing.T, from string, connections int, request string) (refused *atomic.Int64, closed func()) {
	t.Helper()
	var opened, ended sync.WaitGroup
	refused = &atomic.Int64{}
	opened.Add(connections)
	for range connections {
		ended.Go(func() {
			conn, err := n.dial(t.Context(), from)
			if err == nil {
				defer conn.Close()
				_, err = io.WriteString(conn, request)
			}
			opened.Done()
			if err != nil {
				t.Error(err)
				return
			}
			status := make([]byte, len("HTTP/1.1 429"))
			if _, err := io.ReadFull(conn, status); err == nil && string(status) == "HTTP/1.1 429" {
				refused.Add(1)
			}
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("nginx keeps a connection on which nothing comes any more")
			}
		})
	}
	opened.Wait()
	return refused, ended.Wait
}

// push is a job that must be accepted.
func (n *nginx) push(t *testing.T, from string) {
	t.Helper()
	n.client(from).mustPush(t, newImage())
}

func startWebBehindNginx(t *testing.T) (*valkeyServer, *nginx) {
	t.Helper()
	v := startValkey(t)
	return v, startNginx(t, strings.TrimPrefix(startWeb(t, v.addr).url, "http://"))
}

// The tests hold k8s/examples/nginx.conf to what docs/install.md asks of a proxy.
// Each address of 127.0.0.0/8 is another client.

func TestNginx(t *testing.T) {
	t.Parallel()
	_, n := startWebBehindNginx(t)
	n.push(t, "127.0.0.1")
	token := github.mint(time.Now(), nil)
	padding := 8192 - len(github.mint(time.Now(), map[string]any{"x": ""}))
	long := github.mint(time.Now(), map[string]any{"x": strings.Repeat("x", padding*3/4)})
	if len(long) < 8189 || len(long) > 8192 {
		t.Fatalf("a token of %d bytes", len(long))
	}
	for _, tt := range []struct {
		name, request string
		status        int
		fromWeb       bool
	}{
		{"a token of 8 KiB", postOf(long, imageBody(newImage())), 202, true},
		{"a body of 16 KiB", postOf(token, strings.Repeat(" ", 16<<10)), 400, true},
		{"a larger body", postOf(token, strings.Repeat(" ", 16<<10+1)), 413, false},
		{"many lines in the header", "POST /event HTTP/1.1\r\nHost: web\r\n" + strings.Repeat("abc: "+strings.Repeat("x", 17)+"\r\n", 800) + "\r\n", 400, false},
		{"a long line in the header", "POST /event HTTP/1.1\r\nHost: web\r\nX: " + strings.Repeat("x", 12<<10) + "\r\n\r\n", 400, false},
		{"another path", "GET /healthz HTTP/1.1\r\nHost: web\r\n\r\n", 404, false},
		{"a path below", "POST /event/x HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n", 404, false},
		{"no token", "POST /event HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n", 401, true},
	} {
		if status, fromWeb := n.send(t, "127.0.0.1", tt.request); status != tt.status || fromWeb != tt.fromWeb {
			t.Errorf("%s: %d, from web: %t", tt.name, status, fromWeb)
		}
	}
}

// TestNginxHalfRequests: headers and bodies that do not come occupy no connection
// to web, which would read these bodies, and keep no other client's job waiting.
func TestNginxHalfRequests(t *testing.T) {
	t.Parallel()
	_, n := startWebBehindNginx(t)
	begun := time.Now()
	_, headersClosed := n.hold(t, "127.0.0.1", 300, "POST /event HTTP/1.1\r\nHost: web\r\nX: ")
	refused, bodiesClosed := n.hold(t, "127.0.0.2", 40, strings.TrimSuffix(postOf(github.mint(begun, nil), "{}"), "}"))
	n.push(t, "127.0.0.3")
	eventually(t, 3*time.Second, "20 of 40 connections are refused, and none to web is open", func() error {
		if got, open := refused.Load(), n.connectionsToWeb(); got != 20 || open > 0 {
			return fmt.Errorf("%d refused, %d to web", got, open)
		}
		return nil
	})
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("nginx may have closed some of the requests already, after %s", took)
	}
	headersClosed()
	bodiesClosed()
	fmt.Printf("%s: 300 headers and 20 bodies that stop halfway held no connection to web; all closed after %.1f s\n", t.Name(), time.Since(begun).Seconds())
}

// TestNginxTooManyRequests: one client beyond its limit does not keep out another.
func TestNginxTooManyRequests(t *testing.T) {
	t.Parallel()
	_, n := startWebBehindNginx(t)
	greedy := n.client("127.0.0.1")
	var denied, limited, other atomic.Int64
	var clients sync.WaitGroup
	for range 10 {
		clients.Go(func() {
			for range 30 {
				a, err := greedy.post(t.Context(), "", "{}")
				switch {
				case err == nil && a.status == http.StatusUnauthorized:
					denied.Add(1)
				case err == nil && a.status == http.StatusTooManyRequests:
					limited.Add(1)
				default:
					other.Add(1)
				}
			}
		})
	}
	clients.Wait()
	n.push(t, "127.0.0.2")
	if denied.Load() < 51 || limited.Load() < 20 || other.Load() > 0 {
		t.Errorf("%d requests reached web, %d got 429, %d something else", denied.Load(), limited.Load(), other.Load())
	}
	fmt.Printf("%s: of 300 requests of one client %d reached web; another client's job was accepted\n", t.Name(), denied.Load())
}

// TestNginxSlowAnswer: nginx waits for web's own answer while Valkey hangs.
func TestNginxSlowAnswer(t *testing.T) {
	t.Parallel()
	v, n := startWebBehindNginx(t)
	v.proc.signal(syscall.SIGSTOP)
	a, err := n.client("127.0.0.1").post(t.Context(), github.mint(time.Now(), nil), imageBody(newImage()))
	if err != nil || a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, `"requestId"`) || a.took < time.Second {
		t.Errorf("%d %s after %s, %v", a.status, a.body, a.took, err)
	}
}

// TestNginxRollout: jobs that wait keep nobody from posting, and wait as long as web
// lets them, which is longer than a POST takes. One client has 50 of them.
func TestNginxRollout(t *testing.T) {
	t.Parallel()
	_, n := startWebBehindNginx(t)
	image := newImage()
	n.client("127.0.0.1").mustPush(t, image)
	var present struct{ Version string }
	a, err := n.client("127.0.0.1").get(t.Context(), "image="+image)
	if err != nil || json.Unmarshal([]byte(a.body), &present) != nil || present.Version == "" {
		t.Fatalf("GET /rollout: %d %s, %v", a.status, a.body, err)
	}
	wait := func(from string, jobs int, seconds int) (waited, refused int) {
		client := n.client(from)
		client.http.Timeout = 30 * time.Second
		answers := make(chan answer, jobs)
		for range jobs {
			go func() {
				a, err := client.get(t.Context(), fmt.Sprintf("image=%s&wait=%ds&seen=%s", image, seconds, present.Version))
				if err != nil {
					t.Error(err)
				}
				answers <- a
			}()
		}
		if jobs < 50 {
			time.Sleep(time.Second)
			n.push(t, from)
		}
		for range jobs {
			switch a := <-answers; {
			case a.status == http.StatusTooManyRequests:
				refused++
			case a.status == http.StatusOK && a.took >= time.Duration(seconds)*time.Second:
				waited++
			default:
				t.Errorf("%d %s after %s", a.status, a.body, a.took)
			}
		}
		return waited, refused
	}
	if waited, refused := wait("127.0.0.2", 51, 2); waited != 50 || refused != 1 {
		t.Errorf("of 51 jobs %d waited and %d were refused", waited, refused)
	}
	if waited, _ := wait("127.0.0.3", 30, 20); waited != 30 {
		t.Errorf("%d of 30 jobs waited for 20 s", waited)
	}
}

// TestNginxHeaders: web gets no header that it does not read.
func TestNginxHeaders(t *testing.T) {
	t.Parallel()
	received := make(chan *http.Request, 1)
	upstream := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { received <- r }))
	defer upstream.Close()
	n := startNginx(t, upstream.Listener.Addr().String())
	request := strings.Replace(postOf("t", "{}"), "\r\n", "\r\nX-Forwarded-For: 192.0.2.1\r\nCookie: a\r\n"+strings.Repeat("a:\r\n", 500), 1)
	if status, _ := n.send(t, "127.0.0.1", request); status != http.StatusOK {
		t.Fatalf("answered %d", status)
	}
	r := <-received
	names := strings.Join(slices.Sorted(maps.Keys(r.Header)), " ")
	if names != "Authorization Connection Content-Length Content-Type" || r.Header.Get("Authorization") != "Bearer t" || r.Proto != "HTTP/1.1" {
		t.Errorf("web gets %s with %q", r.Proto, r.Header)
	}
}

// postOf is the request of a job.
func postOf(token, body string) string {
	return fmt.Sprintf("POST /event HTTP/1.1\r\nHost: web\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", token, len(body), body)
}
