package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// accessDenied is what an unauthenticated caller sees.
const accessDenied = `{"error":"access denied","requestId":"`

// testWeb is the real handler in a real server, with a real Valkey protocol and
// an issuer that signs real tokens.
type testWeb struct {
	t       *testing.T
	url     string
	stop    func() // ends what waits
	handler *web
	issuer  *testIssuer
	valkey  *miniredis.Miniredis
	pub     *publisher
	heard   chan string // what was published
	logs    *logBuffer
}

func newTestWeb(t *testing.T, trust string) *testWeb {
	t.Helper()
	issuer := newTestIssuer(t)
	logs := &logBuffer{}
	v := newVerifier(issuer.URL, testAudience, issuer.Client(), slog.New(slog.NewJSONHandler(logs, nil)), time.Now)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); v.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	eventually(t, "the keys are there", func() bool { return v.ready() == nil })
	return newTestWebWith(t, issuer, v, trust, logs)
}

// newTestWebWith verifies with v.
func newTestWebWith(t *testing.T, issuer *testIssuer, v *verifier, trust string, logs *logBuffer) *testWeb {
	t.Helper()
	log := slog.New(slog.NewJSONHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	m, cfg := testValkey(t)
	pub := newPublisher(cfg, log)
	t.Cleanup(pub.close)
	p := mustPolicy(t, []string{"acme"}, nil, trust)
	stopping, stop := context.WithCancel(t.Context())
	h := &web{log: log, verifier: v, policy: p, publish: pub.publish,
		readRollout: pub.readRollout, stopping: stopping}
	s := httptest.NewUnstartedServer(nil)
	s.Config = newServer(h, headerTimeout, log)
	s.Start()
	t.Cleanup(s.Close)
	w := &testWeb{t: t, url: s.URL, stop: stop, handler: h, issuer: issuer, valkey: m, pub: pub, heard: make(chan string, 100), logs: logs}
	subscriber := m.NewSubscriber()
	subscriber.Subscribe("krt")
	go func() { // miniredis waits until a message is taken
		for m := range subscriber.Messages() {
			w.heard <- m.Message
		}
	}()
	t.Cleanup(subscriber.Close)
	eventually(t, "valkey is there", func() bool { return pub.ready(t.Context()) == nil })
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("web's log:\n%s", logs)
		}
	})
	return w
}

// send sends a request as it is given.
func (w *testWeb) send(method, path string, header http.Header, body string) *http.Response {
	w.t.Helper()
	req, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header = header
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(text))
	return resp
}

// post sends a body with a valid token of a job whose claims are changed.
func (w *testWeb) post(changes map[string]any, body string) *http.Response {
	w.t.Helper()
	return w.send(http.MethodPost, "/event", http.Header{
		"Authorization": {"Bearer " + w.issuer.with(changes)},
		"Content-Type":  {"application/json"},
	}, body)
}

// expect checks status and body, and that nothing was published or recorded
// unless the status is 202.
func (w *testWeb) expect(name string, resp *http.Response, code int, body string) {
	w.t.Helper()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	if resp.StatusCode != code || !strings.Contains(string(got), body) || body == "" && len(got) > 0 {
		w.t.Errorf("%s: %d %q, want %d %q", name, resp.StatusCode, got, code, body)
	}
	if id := resp.Header.Get("X-Request-Id"); id != "" && (!strings.HasSuffix(string(got), `"requestId":"`+id+"\"}\n") || resp.Header.Get("Content-Type") != "application/json") {
		w.t.Errorf("%s: no JSON with requestId %s: %q", name, id, got)
	}
	if code != http.StatusAccepted {
		w.expectNothing(name)
	}
}

func (w *testWeb) expectNothing(name string) {
	w.t.Helper()
	select {
	case m := <-w.heard:
		w.t.Errorf("%s: published %s", name, m)
	default:
	}
	if w.valkey.Exists("krt:requested") {
		members, _ := w.valkey.ZMembers("krt:requested")
		w.t.Errorf("%s: recorded %v", name, members)
	}
}

func TestAccepted(t *testing.T) {
	for body, images := range map[string][]string{
		`{"image":"ghcr.io/acme/api:dev"}`:                                      {"ghcr.io/acme/api:dev"},
		`{"image":"ghcr.io/acme/api","tags":["v1.2.3","v1.2","v1"]}`:            {"ghcr.io/acme/api:v1.2.3", "ghcr.io/acme/api:v1.2", "ghcr.io/acme/api:v1"},
		`{"image":"ghcr.io/acme/team/deep_er/api-1.x","tags":["A_b.c-1","v1"]}`: {"ghcr.io/acme/team/deep_er/api-1.x:A_b.c-1", "ghcr.io/acme/team/deep_er/api-1.x:v1"},
	} {
		w := newTestWeb(t, "")
		w.valkey.SetTime(time.UnixMicro(1_795_226_400_123_456))
		resp := w.post(nil, body)
		list, err := json.Marshal(images)
		if err != nil {
			t.Fatal(err)
		}
		id := resp.Header.Get("X-Request-Id")
		want := `{"images":` + string(list) + `,"requestedAt":"2026-11-21T02:00:00.123456Z","subscribers":1,"requestId":"` + id + "\"}\n"
		got, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != http.StatusAccepted || string(got) != want || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d\n got %s\nwant %s", body, resp.StatusCode, got, want)
		}
		if !w.logs.has(`"msg":"accepted"`, `"request_id":"`+id+`"`, `"repository":"acme/api"`, "2026-11-21T02:00:00.123456Z", images[0]) || id == "" {
			t.Error("no log line for the request")
		}
		for _, image := range images {
			score, err := w.valkey.ZScore("krt:requested", image)
			if err != nil || int64(score) != 1_795_226_400_123_456 {
				t.Errorf("%s recorded at %.0f, %v", image, score, err)
			}
			want := `{"image":"` + image + `","requestedAt":1795226400123456}`
			select {
			case m := <-w.heard:
				if m != want {
					t.Errorf("published %s, want %s", m, want)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("%s was not published", image)
			}
		}
	}
}

func TestAnswers(t *testing.T) {
	w := newTestWeb(t, "- claims: {event_name: [push, pull_request], ref: refs/heads/main}\n  images: ['ghcr.io/{repository}:dev']\n")
	const good = `{"image":"ghcr.io/acme/api:dev"}`
	token := w.issuer.with(nil)
	header := func(changes map[string][]string) http.Header {
		h := http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
		for name, values := range changes {
			h[name] = values
		}
		return h
	}

	for _, tt := range []struct {
		name, method, path string
		changes            map[string][]string
		body               string
		code               int
		want               string
	}{
		{"other path", "POST", "/events", nil, good, 404, ""},
		{"root", "GET", "/", nil, "", 404, ""},
		{"trailing slash", "POST", "/event/", nil, good, 404, ""},
		{"double slash", "POST", "//event", nil, good, 404, ""},
		{"ops paths are not here", "GET", "/readyz", nil, "", 404, ""},
		{"GET", "GET", "/event", nil, "", 405, ""},
		{"PUT", "PUT", "/event", nil, good, 405, ""},
		{"OPTIONS", "OPTIONS", "/event", nil, "", 405, ""},
		{"health", "GET", "/healthz", nil, "", 200, "ok\n"},
		{"head of health", "HEAD", "/healthz", nil, "", 200, ""},
		{"post to health", "POST", "/healthz", nil, "", 405, ""},

		{"no token", "POST", "/event", map[string][]string{"Authorization": nil}, good, 401, accessDenied},
		{"empty token", "POST", "/event", map[string][]string{"Authorization": {"Bearer "}}, good, 401, accessDenied},
		{"no scheme", "POST", "/event", map[string][]string{"Authorization": {token}}, good, 401, accessDenied},
		{"basic", "POST", "/event", map[string][]string{"Authorization": {"Basic " + token}}, good, 401, accessDenied},
		{"two headers", "POST", "/event", map[string][]string{"Authorization": {"Bearer " + token, "Bearer " + token}}, good, 401, accessDenied},
		{"two tokens", "POST", "/event", map[string][]string{"Authorization": {"Bearer " + token + "," + token}}, good, 401, accessDenied},
		{"in the query", "POST", "/event?access_token=" + token, map[string][]string{"Authorization": nil}, good, 401, accessDenied},
		{"bad signature", "POST", "/event", map[string][]string{"Authorization": {"Bearer " + token[:len(token)-8] + "AAAAAAAA"}}, good, 401, accessDenied},
		{"no word about the body without a token", "POST", "/event", map[string][]string{"Authorization": nil, "Content-Type": nil}, "{", 401, accessDenied},

		{"no content type", "POST", "/event", map[string][]string{"Content-Type": nil}, good, 415, `{"error":"expected one header Content-Type`},
		{"form", "POST", "/event", map[string][]string{"Content-Type": {"application/x-www-form-urlencoded"}}, good, 415, "application/json"},
		{"other charset", "POST", "/event", map[string][]string{"Content-Type": {"application/json; charset=latin1"}}, good, 415, "application/json"},
		{"two content types", "POST", "/event", map[string][]string{"Content-Type": {"application/json", "text/plain"}}, good, 415, "application/json"},
		{"empty", "POST", "/event", nil, "", 400, `{"error":"`},
		{"broken", "POST", "/event", nil, "{", 400, "expected {"},
		{"no tag", "POST", "/event", nil, `{"image":"ghcr.io/acme/api"}`, 400, "has no tag"},
		{"too large", "POST", "/event", nil, `{"image":"` + strings.Repeat("a", maxRequestBytes) + `"}`, 413, "larger than 16384 bytes"},
		{"other prefix", "POST", "/event", nil, `{"image":"ghcr.io/acme-evil/api:dev"}`, 403, `{"error":"image ghcr.io/acme-evil/api:dev may not be restarted here`},
		{"one of several with another prefix", "POST", "/event", nil, `{"image":"docker.io/acme/api","tags":["dev"]}`, 403, "docker.io/acme/api:dev"},
		{"image that the policy does not allow", "POST", "/event", nil, `{"image":"ghcr.io/acme/web:dev"}`, 403, `{"error":`},
		{"one tag that the policy does not allow", "POST", "/event", nil, `{"image":"ghcr.io/acme/api","tags":["dev","main"]}`, 403, "ghcr.io/acme/api:main"},
		{"one bad tag", "POST", "/event", nil, `{"image":"ghcr.io/acme/api","tags":["dev","-"]}`, 400, "is not valid"},
	} {
		resp := w.send(tt.method, tt.path, header(tt.changes), tt.body)
		w.expect(tt.name, resp, tt.code, tt.want)
		if got := resp.Header.Get("WWW-Authenticate"); (got == "Bearer") != (tt.code == 401) {
			t.Errorf("%s: WWW-Authenticate %q with %d", tt.name, got, tt.code)
		}
		if tt.code == 405 && resp.Header.Get("Allow") == "" {
			t.Errorf("%s: 405 without Allow", tt.name)
		}
	}

	for name, changes := range map[string]map[string]any{
		"other organisation": {"repository_owner": "acme-evil", "repository": "acme-evil/api", "sub": "repo:acme-evil/api:ref:refs/heads/main"},
		"other branch":       {"ref": "refs/heads/feature"},
		"other event":        {"event_name": "workflow_run"},
	} {
		// The body is not looked at.
		w.expect(name, w.post(changes, "{"), 403, accessDenied)
	}

	w.expect("scheme in lower case", w.send("POST", "/event", header(map[string][]string{"Authorization": {"bearer " + token}}), good), 202, "ghcr.io/acme/api:dev")
	w.expect("charset", w.send("POST", "/event", header(map[string][]string{"Content-Type": {"application/json; charset=UTF-8"}}), good), 202, "ghcr.io/acme/api:dev")
	if strings.Contains(w.logs.String(), token[len(token)-40:]) || strings.Contains(w.logs.String(), token[:40]) {
		t.Error("the token is in the log")
	}
}

// web denies what the parser refuses, and tells only an authorized job why.
func TestHostileBodies(t *testing.T) {
	w := newTestWeb(t, "")
	tried := 0
	for _, tt := range requestBodies() {
		part, wrong := strings.CutPrefix(tt.want, "!")
		if !wrong {
			continue
		}
		tried++
		text, err := json.Marshal(part)
		if err != nil {
			t.Fatal(err)
		}
		w.expect(fmt.Sprintf("%.100q", tt.body), w.post(nil, tt.body), 400, `{"error":"`)
		w.expect(fmt.Sprintf("%.100q", tt.body), w.post(nil, tt.body), 400, strings.Trim(string(text), `"`))
		w.expect(fmt.Sprintf("%.100q", tt.body), w.post(map[string]any{"event_name": "pull_request"}, tt.body), 403, accessDenied)
	}
	if tried < 50 {
		t.Errorf("%d bodies", tried)
	}
}

// The log has the reason, and no claim as an unauthenticated caller wrote it.
func TestDenialIsLogged(t *testing.T) {
	var trust strings.Builder
	for i := range 12 {
		fmt.Fprintf(&trust, "- {claims: {environment: e%d}, images: ['*']}\n", i)
	}
	w := newTestWeb(t, trust.String())
	ref := "refs/heads/\u202e\x1b[2J" + strings.Repeat("x", 4000)
	w.expect("denied", w.post(map[string]any{"ref": ref}, `{"image":"ghcr.io/acme/api:dev"}`), 403, accessDenied)
	if !w.logs.has(`"msg":"denied"`, `"status":403`, `"repository":"acme/api"`, `"event_name":"push"`, `"run_id":"17123456789"`,
		`"ref":"refs/heads/\\u202e\\x1b[2Jxxx`, "rule 1: environment is absent", "rule 12: environment is absent") {
		t.Errorf("the denial is not logged:\n%s", w.logs)
	}
	if text := w.logs.String(); strings.Contains(text, strings.Repeat("x", 300)) || strings.ContainsAny(text, "\u202e\x1b") {
		t.Errorf("a claim is neither cut nor escaped:\n%s", text)
	}
}

// A client that sends once is served while Valkey restarts.
func TestValkeyRestarts(t *testing.T) {
	w := newTestWeb(t, "")
	w.valkey.Close()
	restarted := make(chan error, 1)
	time.AfterFunc(100*time.Millisecond, func() { restarted <- w.valkey.Restart() })
	w.expect("while it restarts", w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`), 202, "ghcr.io/acme/api:dev")
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
}

func TestValkeyAway(t *testing.T) {
	w := newTestWeb(t, "")
	w.pub.timeout = 50 * time.Millisecond
	w.valkey.Close()
	resp := w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`)
	if resp.Header.Get("Retry-After") == "" || !w.logs.has(`"level":"ERROR"`, `"status":503`, "valkey: writing the ledger") {
		t.Errorf("%v, or the reason is not logged", resp.Header)
	}
	if err := w.valkey.Restart(); err != nil {
		t.Fatal(err)
	}
	w.expect("Valkey is away", resp, 503, `{"error":"the request was not accepted, try again","requestId":"`)
	eventually(t, "web works again", func() bool {
		return w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`).StatusCode == 202
	})
}

// A repository that names ever new images exhausts its own share of the ledger.
func TestQuota(t *testing.T) {
	w := newTestWeb(t, "")
	go func() {
		for range w.heard {
		}
	}()
	body := func(first, n int) string {
		var tags []string
		for i := range n {
			tags = append(tags, fmt.Sprint("t", first+i))
		}
		return string(jsonBytes(map[string]any{"image": "ghcr.io/acme/api", "tags": tags}))
	}
	post := func(changes map[string]any, body string, status int, text string) {
		t.Helper()
		resp := w.post(changes, body)
		if got, _ := io.ReadAll(resp.Body); resp.StatusCode != status || !strings.Contains(string(got), text) {
			t.Errorf("%d %s, want %d %s", resp.StatusCode, got, status, text)
		}
	}
	var jobs sync.WaitGroup
	for i := range maxNewImages / 20 {
		if jobs.Go(func() { post(nil, body(20*i, 20), 202, "") }); i%8 == 0 {
			jobs.Wait()
		}
	}
	jobs.Wait()
	post(nil, body(maxNewImages, 1), 429, `{"error":"the repository has requested 2000 images that were new`)
	post(nil, body(maxNewImages-1, 2), 429, "reuse tags")
	post(nil, body(0, 20), 202, "")
	other := map[string]any{"repository": "acme/web", "repository_id": "7"}
	post(other, body(maxNewImages, 1), 202, "")
	if !w.logs.has(`"msg":"denied"`, `"status":429`, "that were new") {
		t.Error("the denial is not logged")
	}
	members, err := w.valkey.ZMembers("krt:requested")
	if err != nil || len(members) != maxNewImages+1 {
		t.Errorf("%d images in the ledger, %v", len(members), err)
	}
}

// What is in the ledger already costs nothing, and a new day has a new quota.
func TestQuotaCountsNewImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q quota
		for _, step := range []struct {
			repository string
			n, taken   int
		}{
			{"1", maxNewImages - 1, maxNewImages - 1}, {"1", 2, 1}, {"1", 1, 0}, {"2", 1, 1}, {"1", -2, -2}, {"1", 3, 2},
		} {
			if taken := q.take(step.repository, step.n); taken != step.taken {
				t.Errorf("%v: took %d", step, taken)
			}
		}
		time.Sleep(ledgerAge)
		q.take("1", -5) // was taken a day ago
		if q.take("1", maxNewImages+1) != maxNewImages {
			t.Error("a day later")
		}
	})
	w := newTestWeb(t, "")
	for i := range 3 {
		w.expect("again", w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`), 202, "ghcr.io/acme/api:dev")
		if used := w.handler.quota.used["812345678"]; used != 1 {
			t.Errorf("request %d: %d images counted", i, used)
		}
		<-w.heard
	}
	w.valkey.ZAdd("krt:requested", float64(time.Now().Add(-ledgerAge-time.Minute).UnixMicro()), "ghcr.io/acme/api:dev")
	w.expect("a day later", w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`), 202, "ghcr.io/acme/api:dev")
	if used := w.handler.quota.used["812345678"]; used != 2 {
		t.Errorf("a day later: %d images counted", used)
	}
}

// Denials of unauthenticated callers are counted where they are not logged. What
// verified jobs do is always logged.
func TestDenialsAreNotLogged(t *testing.T) {
	issuer := newTestIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		logs := &logBuffer{}
		log := slog.New(slog.NewJSONHandler(logs, nil))
		v := newVerifier(issuer.URL, testAudience, issuer.Offline(), log, time.Now)
		if err := v.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		h := &web{log: log, verifier: v, policy: mustPolicy(t, []string{"acme"}, nil, "")}
		send := func(n int, token string) {
			for range n {
				r := httptest.NewRequest(http.MethodPost, "/event", nil)
				r.Header.Set("Authorization", "Bearer "+token)
				h.ServeHTTP(httptest.NewRecorder(), r)
			}
		}
		send(maxDenialLines+1000, "x")
		send(20, issuer.with(map[string]any{"event_name": "pull_request"}))
		time.Sleep(denialInterval)
		synctest.Wait()
		if n := logs.count(`"status":401`); n != maxDenialLines || !logs.has("denials not logged", `"count":1000`) || logs.count(`"status":403`) != 20 {
			t.Errorf("%d denials without and %d with a valid token logged", n, logs.count(`"status":403`))
		}
		send(3, "x")
		time.Sleep(2 * denialInterval)
		if n := logs.count(`"status":401`); n != maxDenialLines+3 || logs.count("denials not logged") != 1 {
			t.Errorf("later: %d denials logged", n)
		}
	})
}

// A bug is answered, and logged with where it is.
func TestPanic(t *testing.T) {
	w := newTestWeb(t, "")
	w.handler.publish = func(context.Context, []string, int) (publication, error) { panic("at the disco") }
	w.expect("panic", w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`), 500, `{"error":"Internal Server Error","requestId":"`)
	if !w.logs.has(`"level":"ERROR"`, `"status":500`, "panic: at the disco", "web_test.go", `"repository":"acme/api"`) {
		t.Error("the bug is not logged")
	}
}

// Requests that http.Client does not send.
func TestOddRequests(t *testing.T) {
	w := newTestWeb(t, "")
	for request, want := range map[string]string{
		"OPTIONS * HTTP/1.1\r\nHost: web\r\n\r\n":                                             "404",
		"CONNECT web:443 HTTP/1.1\r\nHost: web\r\n\r\n":                                       "404",
		"GET http://elsewhere/healthz HTTP/1.1\r\nHost: web\r\n\r\n":                          "200",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":                                                    "404",
		"POST /event HTTP/1.1\r\nHost: web\r\nExpect: a miracle\r\n\r\n":                      "417",
		"POST /event HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: gzip\r\n\r\n":                "501",
		"POST /event HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n": "400",
		"POST /event HTTP/1.1\r\n\r\n":                                                        "400",
		"nonsense\r\n\r\n":                                                                    "400",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, request)
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		line, err := bufio.NewReader(conn).ReadString('\n')
		if fields := strings.Fields(line); err != nil || len(fields) < 2 || fields[1] != want {
			t.Errorf("%q: %q, %v, want %s", request, line, err, want)
		}
		conn.Close()
		w.expectNothing(request)
	}
}

func TestIssuerNeverReached(t *testing.T) {
	issuer := newTestIssuer(t)
	v := newVerifier(issuer.URL, testAudience, issuer.Client(), slog.New(slog.DiscardHandler), time.Now)
	resp := newTestWebWith(t, issuer, v, "", &logBuffer{}).post(nil, `{"image":"ghcr.io/acme/api:dev"}`)
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
}

// A flood of bad tokens leaves nothing behind.
func TestBadTokensLeaveNothing(t *testing.T) {
	w := newTestWeb(t, "")
	token := w.issuer.with(nil)
	_, rest, _ := strings.Cut(token, ".")
	before := runtime.NumGoroutine()
	for i := range 3000 {
		header := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":"RS256","kid":"%d"}`, i))
		r := httptest.NewRequest(http.MethodPost, "/event", strings.NewReader(`{"image":"ghcr.io/acme/api:dev"}`))
		r.Header.Set("Authorization", "Bearer "+header+"."+rest)
		answer := httptest.NewRecorder()
		w.handler.ServeHTTP(answer, r)
		if answer.Code != http.StatusUnauthorized {
			t.Fatalf("%d", answer.Code)
		}
	}
	if after := runtime.NumGoroutine(); after > before+2 {
		t.Errorf("%d goroutines before, %d after", before, after)
	}
	if n := w.issuer.JWKSFetches.Load(); n != 1 {
		t.Errorf("%d fetches of the keys", n)
	}
	w.expectNothing("bad tokens")

	header := http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}, "X-Large": {strings.Repeat("x", 32<<10)}}
	if resp := w.send(http.MethodPost, "/event", header, `{"image":"ghcr.io/acme/api:dev"}`); resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 32 KiB: %d", resp.StatusCode)
	}
	w.expectNothing("a large header")
}
