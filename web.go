package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// retryAfter is in seconds. Valkey and GitHub are usually back by then.
	retryAfter = "2"

	maxNewImages   = maxLedger / 10 // that a repository may add to the ledger in a day
	maxDenialLines = 50             // about callers without a valid token, in denialInterval
	denialInterval = 10 * time.Second
)

// web is the public HTTP API.
type web struct {
	log      *slog.Logger
	verifier *verifier
	policy   *policy
	prefixes imagePrefixes
	// publish writes the images to the ledger and publishes them, all or none: none,
	// with T 0, if more of them are new than mayAdd.
	publish func(ctx context.Context, images []string, mayAdd int) (publication, error)
	quota   quota
	denials logLimit
}

// accepted is the body of a 202.
type accepted struct {
	Images      []string `json:"images"`
	RequestedAt string   `json:"requestedAt"` // RFC 3339, UTC, microseconds
	Subscribers int64    `json:"subscribers"` // workers that received it at once
	RequestID   string   `json:"requestId"`   // as in the log
}

// denial is an answer other than 202. The caller sees answer; reason is for the
// log. Foreign text in either is sanitized.
type denial struct {
	status int
	answer string // empty: nothing but the status
	reason error
}

// loggedClaims are the claims that a log line about a verified job has.
var loggedClaims = []string{"repository", "event_name", "ref", "sha", "actor", "environment", "job_workflow_ref", "run_id", "run_attempt", "check_run_id"}

func (d *denial) Error() string { return d.reason.Error() }

// tell tells the caller the reason, which only an authenticated one may learn.
func tell(status int, reason error) error { return &denial{status, reason.Error(), reason} }

// ServeHTTP answers POST /event and GET /healthz, and nothing else.
func (s *web) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	method := map[string]string{"/event": http.MethodPost, "/healthz": http.MethodGet}[r.URL.Path]
	switch {
	case method == "":
		w.WriteHeader(http.StatusNotFound)
	case r.Method != method && (method != http.MethodGet || r.Method != http.MethodHead):
		h.Set("Allow", method)
		w.WriteHeader(http.StatusMethodNotAllowed)
	case method == http.MethodPost:
		s.serveEvent(w, r)
	default:
		io.WriteString(w, "ok\n")
	}
}

// serveEvent answers one POST /event and logs one line about it.
func (s *web) serveEvent(w http.ResponseWriter, r *http.Request) {
	start, id := time.Now(), rand.Text()
	w.Header().Set("X-Request-Id", id)

	c, a, err := s.event(w, r)
	line := []slog.Attr{slog.String("request_id", id), slog.String("remote", r.RemoteAddr), slog.String("duration", time.Since(start).String())}
	for _, name := range loggedClaims {
		if value := c[name]; value != "" {
			line = append(line, slog.String(name, sanitize(value)))
		}
	}
	if err == nil {
		a.RequestID = id
		s.log.LogAttrs(r.Context(), slog.LevelInfo, "accepted", append(line, slog.Int("status", http.StatusAccepted),
			slog.Any("images", a.Images), slog.String("requested_at", a.RequestedAt), slog.Int64("subscribers", a.Subscribers))...)
		writeJSON(w, http.StatusAccepted, a)
		return
	}
	d := &denial{status: http.StatusInternalServerError, reason: err}
	errors.As(err, &d)
	if c != nil || s.denials.allow(s.log) { // c: the token is verified
		level := slog.LevelInfo
		if d.status >= http.StatusInternalServerError {
			level = slog.LevelError
		}
		s.log.LogAttrs(r.Context(), level, "denied", append(line, slog.Int("status", d.status), slog.String("reason", d.reason.Error()))...)
	}
	d.write(w, id)
}

func (d *denial) write(w http.ResponseWriter, id string) {
	switch d.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", retryAfter)
	}
	text := cmp.Or(d.answer, "access denied")
	if d.answer == "" && d.status >= http.StatusInternalServerError {
		text = http.StatusText(d.status)
	}
	writeJSON(w, d.status, map[string]string{"error": text, "requestId": id})
}

// event handles POST /event: first the token, then the claims, then the body, so
// that only an authorized job learns what is wrong with its body. The claims are
// returned as soon as they are verified. A panic becomes an error, because
// net/http would close the connection without an answer.
func (s *web) event(w http.ResponseWriter, r *http.Request) (c claims, a *accepted, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	token, err := bearerToken(r)
	if err == nil {
		c, err = s.verifier.verify(token)
	}
	if errors.Is(err, errNoKeys) {
		return nil, nil, &denial{status: http.StatusServiceUnavailable, reason: err}
	}
	if err != nil {
		return nil, nil, &denial{status: http.StatusUnauthorized, reason: err}
	}
	if err := s.policy.checkClaims(c); err != nil {
		return c, nil, &denial{status: http.StatusForbidden, reason: err}
	}
	images, err := readImages(w, r)
	if err != nil {
		return c, nil, err
	}
	for _, image := range images {
		if !s.prefixes.allows(image) {
			err := fmt.Errorf("image %s may not be restarted here: it is under none of the prefixes that are allowed", image)
			return c, nil, tell(http.StatusForbidden, err)
		}
	}
	if err := s.policy.checkImages(c, images); err != nil {
		return c, nil, tell(http.StatusForbidden, err)
	}
	reserved := s.quota.take(c["repository_id"], len(images))
	// A client that hangs up must not keep the answer away, which says what it used.
	p, err := s.publish(context.WithoutCancel(r.Context()), images, reserved)
	s.quota.take(c["repository_id"], p.added-reserved)
	if err != nil {
		return c, nil, &denial{http.StatusServiceUnavailable, "the request was not accepted, try again", err}
	}
	if p.requestedAt == 0 {
		err := fmt.Errorf("the repository has requested %d images that were new within a day, and more are refused; reuse tags", maxNewImages)
		return c, nil, tell(http.StatusTooManyRequests, err)
	}
	return c, &accepted{Images: images, RequestedAt: formatTime(p.requestedAt), Subscribers: p.subscribers}, nil
}

// bearerToken reads the one Authorization header (RFC 6750, section 2.1). The
// scheme may be in any case (RFC 9110, section 11.1).
func bearerToken(r *http.Request) (string, error) {
	headers := r.Header.Values("Authorization")
	if len(headers) != 1 {
		return "", fmt.Errorf("%d Authorization headers instead of one", len(headers))
	}
	scheme, token, ok := strings.Cut(headers[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", errors.New("the Authorization header is not a bearer token")
	}
	return token, nil
}

// readImages reads the body. Its error tells the job what to fix.
func readImages(w http.ResponseWriter, r *http.Request) ([]string, error) {
	media, params, err := mime.ParseMediaType(strings.Join(r.Header.Values("Content-Type"), ", ")) // an error for two
	if charset := params["charset"]; err != nil || media != "application/json" || charset != "" && !strings.EqualFold(charset, "utf-8") {
		return nil, tell(http.StatusUnsupportedMediaType, errors.New("expected one header Content-Type: application/json"))
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequestBytes))
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return nil, tell(http.StatusRequestEntityTooLarge, fmt.Errorf("the body is larger than %d bytes; send fewer tags", tooLarge.Limit))
	}
	if err != nil { // a slow or broken client
		return nil, tell(http.StatusBadRequest, errors.New("the body could not be read"))
	}
	images, err := parseRequest(body)
	if err != nil {
		return nil, tell(http.StatusBadRequest, err)
	}
	return images, nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false) // a job's log shows it as plain text
	enc.Encode(v)            // a client that is gone cannot be told
}

// quota counts what each repository has added to the ledger on a day of this process.
type quota struct {
	mu   sync.Mutex
	day  time.Time      // its beginning
	used map[string]int // by repository_id
}

// take reserves up to n new images, and returns how many. A negative n gives back.
func (q *quota) take(repository string, n int) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used == nil || time.Since(q.day) >= ledgerAge {
		q.day, q.used = time.Now(), map[string]int{}
	}
	n = min(n, maxNewImages-q.used[repository])
	q.used[repository] = max(0, q.used[repository]+n)
	return n
}

// logLimit keeps unauthenticated callers from rotating the other log lines away.
type logLimit struct{ lines atomic.Int64 }

// allow reports whether there may be one more line. It logs how many there were not.
func (l *logLimit) allow(log *slog.Logger) bool {
	n := l.lines.Add(1)
	if n == 1 {
		time.AfterFunc(denialInterval, func() {
			if suppressed := l.lines.Swap(0) - maxDenialLines; suppressed > 0 {
				log.Warn("denials not logged", "count", suppressed)
			}
		})
	}
	return n <= maxDenialLines
}
