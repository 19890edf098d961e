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

// apiProxy stands before the API server, speaks HTTP/2 as it does, and
// misbehaves as it is told.
type apiProxy struct {
	url  string
	host string

	mu        sync.Mutex
	intercept intercept
	lifted    chan struct{} // closed and replaced whenever intercept changes
	patches   map[string][]patchSeen
	lists     []url.Values // the queries of lists
	watches   map[*watchStream]bool
	lag       time.Duration // how late watches deliver
	stalled   chan struct{} // watches deliver nothing until it is closed; nil: they do
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
	p := &apiProxy{patches: map[string][]patchSeen{}, watches: map[*watchStream]bool{}, lifted: make(chan struct{})}
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
	// Canceled before Close, which waits for handlers, hanging ones too.
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

// patchesOf are the PATCHes of a Deployment so far.
func (p *apiProxy) patchesOf(d deployment) []patchSeen {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]patchSeen(nil), p.patches[d.key()]...)
}

// listed are the queries of all lists of Deployments so far.
func (p *apiProxy) listed() []url.Values {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]url.Values(nil), p.lists...)
}

// listsOf counts the lists of one Deployment, chosen by its name.
func (p *apiProxy) listsOf(d deployment) (n int) {
	for _, query := range p.listed() {
		if query.Get("fieldSelector") == "metadata.name="+d.name {
			n++
		}
	}
	return n
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

// isStreamedList: a watch that begins with all objects there are.
func isStreamedList(r *http.Request) bool {
	return isWatch(r) && r.URL.Query().Get("sendInitialEvents") == "true"
}

func isList(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/deployments") && !isWatch(r)
}

func (p *apiProxy) serve(upstream http.Handler, w http.ResponseWriter, r *http.Request) {
	answer := &answerWriter{ResponseWriter: w}
	p.note(r, answer)
	p.mu.Lock()
	i, lifted := p.intercept, p.lifted
	p.mu.Unlock()
	if i != nil && i(answer, r, lifted) {
		return
	}
	if isWatch(r) {
		p.serveWatch(upstream, answer, r)
		return
	}
	upstream.ServeHTTP(answer, r)
}

// note counts lists and patches. The patch's answer is filled in when it is there.
func (p *apiProxy) note(r *http.Request, answer *answerWriter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if isList(r) {
		p.lists = append(p.lists, r.URL.Query())
	}
	key, ok := patched(r)
	if !ok {
		return
	}
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(strings.NewReader(string(body)))
	at := len(p.patches[key])
	p.patches[key] = append(p.patches[key], patchSeen{at: time.Now(), body: string(body)})
	answer.answered = func(status int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.patches[key][at].status = status
	}
}

// answerWriter reports the status of an answer.
type answerWriter struct {
	http.ResponseWriter
	answered func(status int)
}

func (w *answerWriter) WriteHeader(status int) {
	if w.answered != nil {
		w.answered(status)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *answerWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// What an API server in trouble does, as intercepts.

// answering answers every request that is chosen with a status, as an API
// server does: with a Status object, and Retry-After if it says so.
func answering(status int, retryAfter string, chosen func(*http.Request) bool) intercept {
	reason := map[int]string{403: "Forbidden", 409: "Conflict", 410: "Expired", 422: "Invalid",
		429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}[status]
	return func(w http.ResponseWriter, r *http.Request, _ <-chan struct{}) bool {
		if !chosen(r) {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(status)
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

// anyOf asks one intercept after the other until one handles the request.
func anyOf(all ...intercept) intercept {
	return func(w http.ResponseWriter, r *http.Request, lifted <-chan struct{}) bool {
		for _, i := range all {
			if i(w, r, lifted) {
				return true
			}
		}
		return false
	}
}

func everything(*http.Request) bool { return true }

func everyPatch(r *http.Request) bool { _, ok := patched(r); return ok }

func patchOrList(r *http.Request) bool { return everyPatch(r) || isList(r) }

func patchOf(d deployment) func(*http.Request) bool {
	return func(r *http.Request) bool { key, ok := patched(r); return ok && key == d.key() }
}

// patchOfAny chooses the patches of Deployments whose name begins so.
func patchOfAny(prefix string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		key, ok := patched(r)
		_, name, _ := strings.Cut(key, "/")
		return ok && strings.HasPrefix(name, prefix)
	}
}
