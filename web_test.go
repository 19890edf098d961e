package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// testWeb is the real handler behind a real server, with a real Valkey
// protocol and an issuer that signs real tokens.
type testWeb struct {
	t       *testing.T
	url     string
	handler http.Handler
	issuer  *testIssuer
	valkey  *miniredis.Miniredis
	heard   chan string // what was published
	logs    *logBuffer
}

func newTestWeb(t *testing.T, trust string) *testWeb {
	t.Helper()
	issuer := newTestIssuer(t)
	logs := &logBuffer{}
	v := newVerifier(issuer.URL, testAudience, issuer.client(), slog.New(slog.NewJSONHandler(logs, nil)), time.Now)
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
	pub, err := newPublisher(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	p := mustPolicy(t, []string{"acme"}, nil, trust)
	h := &web{log: log, verifier: v, policy: p, prefixes: imagePrefixes{"ghcr.io/acme"}, publish: pub.publish}
	s := httptest.NewUnstartedServer(nil)
	s.Config = newServer(h, log)
	s.Start()
	t.Cleanup(s.Close)
	w := &testWeb{t: t, url: s.URL, handler: h, issuer: issuer, valkey: m, heard: make(chan string, 100), logs: logs}
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
		"Authorization": {"Bearer " + w.issuer.token(w.t, w.issuer.claimsWith(changes))},
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
		want := `{"images":` + string(list) + `,"requestedAt":"2026-11-21T02:00:00.123456Z","subscribers":1}` + "\n"
		got, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != http.StatusAccepted || string(got) != want || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d\n got %s\nwant %s", body, resp.StatusCode, got, want)
		}
		id := resp.Header.Get("X-Request-Id")
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
	token := w.issuer.token(t, w.issuer.claims())
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
		{"post to health", "POST", "/healthz", nil, "", 405, ""},

		{"no token", "POST", "/event", map[string][]string{"Authorization": nil}, good, 401, "access denied\n"},
		{"empty token", "POST", "/event", map[string][]string{"Authorization": {"Bearer "}}, good, 401, "access denied\n"},
		{"no scheme", "POST", "/event", map[string][]string{"Authorization": {token}}, good, 401, "access denied\n"},
		{"basic", "POST", "/event", map[string][]string{"Authorization": {"Basic " + token}}, good, 401, "access denied\n"},
		{"two headers", "POST", "/event", map[string][]string{"Authorization": {"Bearer " + token, "Bearer " + token}}, good, 401, "access denied\n"},
		{"two tokens", "POST", "/event", map[string][]string{"Authorization": {"Bearer " + token + "," + token}}, good, 401, "access denied\n"},
		{"in the query", "POST", "/event?access_token=" + token, map[string][]string{"Authorization": nil}, good, 401, "access denied\n"},
		{"bad signature", "POST", "/event", map[string][]string{"Authorization": {"Bearer " + token[:len(token)-8] + "AAAAAAAA"}}, good, 401, "access denied\n"},
		{"no word about the body without a token", "POST", "/event", map[string][]string{"Authorization": nil, "Content-Type": nil}, "{", 401, "access denied\n"},

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
		w.expect(name, w.post(changes, "{"), 403, "access denied\n")
	}

	w.expect("scheme in lower case", w.send("POST", "/event", header(map[string][]string{"Authorization": {"bearer " + token}}), good), 202, "ghcr.io/acme/api:dev")
	w.expect("charset", w.send("POST", "/event", header(map[string][]string{"Content-Type": {"application/json; charset=UTF-8"}}), good), 202, "ghcr.io/acme/api:dev")
	if strings.Contains(w.logs.String(), token[len(token)-40:]) || strings.Contains(w.logs.String(), token[:40]) {
		t.Error("the token is in the log")
	}
}

// What the parser refuses, web refuses, and says so to an allowed job alone.
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
		w.expect(fmt.Sprintf("%.100q", tt.body), w.post(map[string]any{"event_name": "pull_request"}, tt.body), 403, "access denied\n")
	}
	if tried < 50 {
		t.Errorf("%d bodies", tried)
	}
}

// Letters that Unicode folds to k and s.
func TestLookAlikeOwners(t *testing.T) {
	w := newTestWeb(t, "")
	w.handler.(*web).policy = mustPolicy(t, []string{"kelvin", "sys"}, nil, "")
	for _, owner := range []string{"\u212aelvin", "\u017fys", "sy\u017f"} {
		w.expect(owner, w.post(map[string]any{"repository_owner": owner, "repository": owner + "/api"}, `{"image":"ghcr.io/acme/api:dev"}`), 403, "access denied\n")
	}
	w.expect("the owner itself", w.post(map[string]any{"repository_owner": "Kelvin", "repository": "Kelvin/api"}, `{"image":"ghcr.io/acme/api:dev"}`), 202, "ghcr.io/acme/api:dev")
}

// The log has all that decided, and nothing of the claims as a stranger wrote it.
func TestDenialIsLogged(t *testing.T) {
	var trust strings.Builder
	for i := range 12 {
		fmt.Fprintf(&trust, "- {claims: {environment: e%d}, images: ['*']}\n", i)
	}
	w := newTestWeb(t, trust.String())
	ref := "refs/heads/\u202e\x1b[2J" + strings.Repeat("x", 4000)
	w.expect("denied", w.post(map[string]any{"ref": ref}, `{"image":"ghcr.io/acme/api:dev"}`), 403, "access denied\n")
	for line := range strings.Lines(w.logs.String()) {
		if !strings.Contains(line, `"msg":"denied"`) {
			continue
		}
		for _, part := range []string{`"repository":"acme/api"`, `"event_name":"push"`, `"run_id":"17123456789"`, `"ref":"refs/heads/\\u202e\\x1b[2Jxxx`, `"status":403`,
			"rule 1: environment is absent", "rule 12: environment is absent"} {
			if !strings.Contains(line, part) {
				t.Errorf("the line has no %s:\n%s", part, line)
			}
		}
		if strings.Contains(line, strings.Repeat("x", 300)) || strings.ContainsAny(line, "\u202e\x1b") {
			t.Errorf("a claim is neither cut nor escaped:\n%s", line)
		}
		return
	}
	t.Error("the denial is not logged")
}

func TestValkeyAway(t *testing.T) {
	w := newTestWeb(t, "")
	w.valkey.Close()
	resp := w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`)
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !strings.Contains(string(body), `{"error":`) {
		t.Errorf("%d %q %v", resp.StatusCode, body, resp.Header)
	}
	if !w.logs.has(`"level":"ERROR"`, `"status":503`, "valkey: recording the request") {
		t.Error("the reason is not logged")
	}
	if err := w.valkey.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "web works again", func() bool {
		return w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`).StatusCode == 202
	})
}

// The record is bounded: what does not fit is refused, and what was accepted
// stays.
func TestRecordIsFull(t *testing.T) {
	w := newTestWeb(t, "")
	now := time.Now()
	record := func(i int, at time.Time) {
		if _, err := w.valkey.ZAdd("krt:requested", float64(at.UnixMicro()), fmt.Sprintf("ghcr.io/acme/app-%d:dev", i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range maxRecorded - 1 {
		record(i, now)
	}
	body := func(tags string) string { return `{"image":"ghcr.io/acme/api","tags":[` + tags + `]}` }
	if resp := w.post(nil, body(`"a","b"`)); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("one image more than fits: %d", resp.StatusCode)
	}
	if !w.logs.has(`"level":"ERROR"`, "FULL too many images were asked for within a day") {
		t.Error("the reason is not logged")
	}
	if at, _ := w.valkey.ZScore("krt:requested", "ghcr.io/acme/api:a"); at != 0 {
		t.Error("one of two images is on record")
	}
	for what, tags := range map[string]string{"the last place": `"a"`, "an image that is on record": `"a","a"`} {
		if resp := w.post(nil, body(tags)); resp.StatusCode != 202 {
			t.Errorf("%s: %d", what, resp.StatusCode)
		}
	}
	// What is a day old makes place.
	record(7, now.Add(-keepRecorded-time.Second))
	if resp := w.post(nil, body(`"b"`)); resp.StatusCode != 202 {
		t.Errorf("a place became free: %d", resp.StatusCode)
	}
	if members, err := w.valkey.ZMembers("krt:requested"); err != nil || len(members) != maxRecorded {
		t.Errorf("%d images are on record, %v", len(members), err)
	}
}

// A bug is answered, and logged with where it is.
func TestPanic(t *testing.T) {
	w := newTestWeb(t, "")
	w.handler.(*web).publish = func(context.Context, []string) (int64, int64, error) { panic("at the disco") }
	w.expect("panic", w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`), 500, "Internal Server Error\n")
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

// What only an operator can mend says what to mend, and is not tried four times
// a second.
func TestValkeyRefuses(t *testing.T) {
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	for answer, want := range map[string]struct {
		hint  string
		delay time.Duration
	}{
		"NOAUTH Authentication required.":     {"check VALKEY_USERNAME and VALKEY_PASSWORD", configurationDelay},
		"WRONGPASS invalid username-password": {"check VALKEY_USERNAME and VALKEY_PASSWORD", configurationDelay},
		"NOPERM no permissions":               {"check this user's ACL", configurationDelay},
		"ERR ACL failure in script: User web has no permissions to run the 'zadd' command": {"check this user's ACL", configurationDelay},
		"WRONGTYPE Operation against a key holding the wrong kind of value":                {"choose another VALKEY_CHANNEL", configurationDelay},
		"LOADING Valkey is loading the dataset in memory":                                  {"LOADING", transientDelay},
		"READONLY You can't write against a read only replica.":                            {"READONLY", transientDelay},
		"OOM command not allowed when used memory > 'maxmemory'.":                          {"OOM", transientDelay},
	} {
		m.SetError(answer)
		_, _, err := pub.publish(t.Context(), []string{apiDev})
		if err == nil || !strings.Contains(err.Error(), want.hint) || retryDelay(err) != want.delay {
			t.Errorf("%s: %v, try again in %s", answer, err, retryDelay(err))
		}
	}
}

// web is ready only if it could record something.
func TestReadyMeansWritable(t *testing.T) {
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	if err := pub.ready(t.Context()); err != nil {
		t.Error(err)
	}
	if m.Exists("krt:requested") {
		t.Error("the check recorded something")
	}
	if err := m.Set("krt:requested", "another program's"); err != nil {
		t.Fatal(err)
	}
	if err := pub.ready(t.Context()); err == nil || !strings.Contains(err.Error(), "WRONGTYPE") {
		t.Errorf("with a key of another type: %v", err)
	}
}

// A Valkey that takes the connection and never answers must not hold the job.
func TestValkeySilent(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
		}
	}()
	pub, err := newPublisher(valkeyConfig{Addr: ln.Addr().String(), Channel: "krt"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	start := time.Now()
	if _, _, err := pub.publish(t.Context(), []string{apiDev}); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

func TestIssuerNeverReached(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	issuer := newTestIssuer(t)
	h := &web{log: log, verifier: newVerifier(issuer.URL, testAudience, issuer.client(), log, time.Now)}
	h.policy = mustPolicy(t, []string{"acme"}, nil, "")
	r := httptest.NewRequest(http.MethodPost, "/event", strings.NewReader(`{"image":"ghcr.io/acme/api:dev"}`))
	r.Header.Set("Authorization", "Bearer "+issuer.token(t, issuer.claims()))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("%d %v", w.Code, w.Header())
	}
}

// What cannot be taken at once is refused at once.
func TestPublishIsBounded(t *testing.T) {
	_, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	for range maxPublishing {
		pub.publishing <- struct{}{}
	}
	if _, _, err := pub.publish(t.Context(), []string{apiDev}); !errors.Is(err, errBusy) {
		t.Errorf("got %v", err)
	}
	<-pub.publishing
	if _, _, err := pub.publish(t.Context(), []string{apiDev}); err != nil {
		t.Errorf("with a place free: %v", err)
	}
}

// T is Valkey's clock, and for one image it only ever grows, whatever that
// clock does.
func TestRequestedAtGrows(t *testing.T) {
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	const noon = 1_795_262_400_000_000
	publish := func(clock int64, images ...string) int64 {
		t.Helper()
		m.SetTime(time.UnixMicro(clock))
		at, _, err := pub.publish(t.Context(), images)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	for i, step := range []struct {
		clock  int64
		images []string
		want   int64
	}{
		{noon, []string{"ghcr.io/acme/a:dev"}, noon},
		{noon, []string{"ghcr.io/acme/a:dev"}, noon + 1},
		{noon, []string{"ghcr.io/acme/b:dev"}, noon},
		{noon, []string{"ghcr.io/acme/b:dev", "ghcr.io/acme/a:dev"}, noon + 2},
		{noon - 3_600_000_000, []string{"ghcr.io/acme/a:dev"}, noon + 3},
		{noon + 7, []string{"ghcr.io/acme/a:dev"}, noon + 7},
	} {
		if got := publish(step.clock, step.images...); got != step.want {
			t.Errorf("step %d: T is %d, want %d", i, got, step.want)
		}
	}
	// A clock that was years ahead and is right again left a T behind.
	if _, err := m.ZAdd("krt:requested", noon+3*365*24*3600*1_000_000, "ghcr.io/acme/ahead:dev"); err != nil {
		t.Fatal(err)
	}
	if got := publish(noon+8, "ghcr.io/acme/ahead:dev"); got != noon+8 {
		t.Errorf("after a wrong clock: T is %d, want %d", got, noon+8)
	}
	if _, err := m.ZRem("krt:requested", "ghcr.io/acme/ahead:dev"); err != nil {
		t.Fatal(err)
	}
	// A day later the record holds what is new and what is not yet a day old.
	day := keepRecorded.Microseconds()
	publish(noon+day+2, "ghcr.io/acme/c:dev")
	got, err := m.ZMembers("krt:requested")
	if err != nil || fmt.Sprint(got) != "[ghcr.io/acme/b:dev ghcr.io/acme/a:dev ghcr.io/acme/c:dev]" {
		t.Errorf("kept %v, %v", got, err)
	}
	publish(noon+day+8, "ghcr.io/acme/c:dev")
	if got, err = m.ZMembers("krt:requested"); err != nil || fmt.Sprint(got) != "[ghcr.io/acme/c:dev]" {
		t.Errorf("kept %v, %v", got, err)
	}
}

// serveAll answers what is in flight when it is told to stop.
func TestDrain(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	arrived, release := make(chan struct{}), make(chan struct{})
	front, err := listen("web", "127.0.0.1:0", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-release
		io.WriteString(w, "done")
	}), log)
	if err != nil {
		t.Fatal(err)
	}
	var stopping atomic.Bool
	ops, err := listen("ops", "127.0.0.1:0", opsHandler(&stopping, func(context.Context) error { return nil }), log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	var taskStopped atomic.Bool
	go func() {
		served <- serveAll(ctx, ops, front, &stopping, func(ctx context.Context) error {
			<-ctx.Done()
			taskStopped.Store(true)
			return nil
		})
	}()
	get := func(l *listener, path string) (int, string) {
		resp, err := http.Get("http://" + l.ln.Addr().String() + path)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	if code, body := get(ops, "/readyz"); code != 200 {
		t.Errorf("ready: %d %s", code, body)
	}
	answer := make(chan string, 1)
	go func() {
		_, body := get(front, "/")
		answer <- body
	}()
	<-arrived
	cancel()
	eventually(t, "it says that it is stopping", func() bool {
		code, body := get(ops, "/readyz")
		return code == 503 && body == "stopping\n"
	})
	if code, _ := get(ops, "/healthz"); code != 200 {
		t.Errorf("not alive while it drains: %d", code)
	}
	if taskStopped.Load() {
		t.Error("the tasks were stopped before the requests were answered")
	}
	close(release)
	if body := <-answer; body != "done" {
		t.Errorf("the request in flight got %q", body)
	}
	if err := <-served; err != nil || !taskStopped.Load() {
		t.Errorf("serveAll: %v", err)
	}
}

// Whoever sends while web is being replaced gets an answer, until the word has
// spread, and never a connection that is closed under the next request.
func TestDrainUnderLoad(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	front, err := listen("web", "127.0.0.1:0", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(2 * time.Millisecond)
		io.WriteString(w, "done")
	}), log)
	if err != nil {
		t.Fatal(err)
	}
	var stopping atomic.Bool
	ops, err := listen("ops", "127.0.0.1:0", opsHandler(&stopping, nil), log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		if err := serveAll(ctx, ops, front, &stopping); err != nil {
			t.Error(err)
		}
	})
	var dropped, kept, answered atomic.Int64
	request := func() {
		conn, err := net.Dial("tcp", front.ln.Addr().String())
		if err != nil {
			dropped.Add(1)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 2\r\n\r\n{}")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			dropped.Add(1)
			return
		}
		if !resp.Close {
			kept.Add(1)
		}
		answered.Add(1)
	}
	end := time.Now().Add(100*time.Millisecond + lameDuck/2)
	for range 20 {
		all.Go(func() {
			for time.Now().Before(end) {
				request()
				time.Sleep(rand.N(4 * time.Millisecond))
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	cancel()
	all.Wait()
	if dropped.Load() > 0 || kept.Load() > 0 || answered.Load() < 100 {
		t.Errorf("%d requests were dropped, %d connections kept, %d answered", dropped.Load(), kept.Load(), answered.Load())
	}
}

// A task or a server that breaks ends the process with its error.
func TestServeAllFails(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	var stopping atomic.Bool
	ops, err := listen("ops", "127.0.0.1:0", opsHandler(&stopping, nil), log)
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := serveAll(t.Context(), ops, nil, &stopping, func(context.Context) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if _, err := listen("ops", taken.Addr().String(), nil, log); err == nil || !strings.Contains(err.Error(), "listening for ops") {
		t.Errorf("a port in use: %v", err)
	}
}

// Connections beyond the bound wait; they are served when others are gone.
func TestConnectionsAreBounded(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	l, err := listen("web", "127.0.0.1:0", http.NotFoundHandler(), log)
	if err != nil {
		t.Fatal(err)
	}
	go l.serve()
	t.Cleanup(func() { l.server.Close() })
	conns := make([]net.Conn, maxConnections)
	for i := range conns {
		if conns[i], err = net.Dial("tcp", l.ln.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	ask := func(timeout time.Duration) error {
		client := &http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get("http://" + l.ln.Addr().String() + "/")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	// All of them are accepted, so that none of their places is free.
	if _, err := io.WriteString(conns[maxConnections-1], "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := conns[maxConnections-1].Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := ask(300 * time.Millisecond); err == nil {
		t.Fatal("one connection more was served")
	}
	conns[0].Close()
	if err := ask(5 * time.Second); err != nil {
		t.Errorf("with a place free again: %v", err)
	}
}

// A client that is slow on purpose is cut off, before it has said who it is and
// after.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	w := newTestWeb(t, "")
	head := "POST /event HTTP/1.1\r\nHost: x\r\n"
	auth := "Authorization: Bearer " + w.issuer.token(t, w.issuer.claims()) + "\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
	for name, text := range map[string]string{"says nothing": "", "half a header": head, "half a body": head + auth} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
			conn.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, conn); err != nil {
				t.Errorf("the connection is still open: %v", err)
			}
		})
	}
	t.Cleanup(func() { w.expectNothing("slow clients") })
}

// A flood of bad tokens leaves nothing behind.
func TestBadTokensLeaveNothing(t *testing.T) {
	w := newTestWeb(t, "")
	token := w.issuer.token(t, w.issuer.claims())
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
	if n := w.issuer.jwksFetches.Load(); n != 1 {
		t.Errorf("%d fetches of the keys", n)
	}
	w.expectNothing("bad tokens")

	header := http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}, "X-Large": {strings.Repeat("x", 32<<10)}}
	if resp := w.send(http.MethodPost, "/event", header, `{"image":"ghcr.io/acme/api:dev"}`); resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 32 KiB: %d", resp.StatusCode)
	}
	w.expectNothing("a large header")
}
