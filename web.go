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
	"net/url"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	retryAfter     = "2"            // seconds; Valkey and GitHub are usually back by then
	maxNewImages   = maxLedger / 10 // that a repository may add to the ledger in a day
	maxDenialLines = 50             // about callers without a valid token, in denialInterval
	denialInterval = 10 * time.Second

	// Of GET /rollout:
	maxWait         = time.Minute
	maxWaiting      = 256                    // requests; those beyond are answered at once
	rolloutInterval = 300 * time.Millisecond // between two looks for a change
)

// web is the public HTTP API.
type web struct {
	log      *slog.Logger
	verifier *verifier
	policy   *policyConfig
	quota    quota
	denials  atomic.Int64    // of unauthenticated callers, in denialInterval
	waiting  atomic.Int64    // GET /rollout that wait, or may
	stopping context.Context // done when none shall wait any more

	// These are the publisher's.
	publish     func(ctx context.Context, images []string, mayAdd int) (publication, error)
	readRollout func(waiting context.Context, q rolloutQuery) (*rollout, error)
}

// accepted is the body of a 202.
type accepted struct {
	Images      []string `json:"images"`
	RequestedAt string   `json:"requestedAt"` // RFC 3339, UTC, microseconds
	Subscribers int64    `json:"subscribers"` // workers that received it at once
	RequestID   string   `json:"requestId"`   // as in the log
}

// denial is an error with its answer. Foreign text in it is sanitized.
type denial struct {
	status int
	answer string // to the caller; empty: nothing but the status
	reason error  // for the log
}

func (d *denial) Error() string { return d.reason.Error() }

// tell is a denial with a reason, if there is one, that an authenticated caller learns.
func tell(status int, reason error) error {
	if reason == nil {
		return nil
	}
	return &denial{status, reason.Error(), reason}
}

// route is how web answers a job that may ask for something.
type route struct {
	method  string
	read    func(*call) error // what the job asks for
	handle  func(*web, *call) (body any, err error)
	status  int
	level   slog.Level
	message string
	count   counters // by outcome
}

var routes = map[string]route{
	"/event":   {http.MethodPost, (*call).readEvent, (*web).event, http.StatusAccepted, slog.LevelInfo, "accepted", eventRequests},
	"/rollout": {http.MethodGet, (*call).readQuery, (*web).rollout, http.StatusOK, slog.LevelDebug, "rollout", rolloutRequests},
	"/healthz": {method: http.MethodGet},
}

// call is a request of a job, and how it ends.
type call struct {
	route
	w      http.ResponseWriter
	r      *http.Request
	id     string // requestId
	claims claims // nil until the token is verified
	asked  rolloutQuery
	check  string // that runs now: the outcome if it fails
	line   []slog.Attr
}

// loggedClaims are the claims that a log line about a verified job has.
var loggedClaims = []string{"repository", "event_name", "ref", "sha", "actor", "environment", "job_workflow_ref", "run_id", "run_attempt", "check_run_id"}

// ServeHTTP answers the routes, and nothing else.
func (s *web) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	route, known := routes[r.URL.Path]
	switch {
	case !known:
		w.WriteHeader(http.StatusNotFound)
	case r.Method != route.method && (route.handle != nil || r.Method != http.MethodHead):
		h.Set("Allow", route.method)
		w.WriteHeader(http.StatusMethodNotAllowed)
	case route.handle != nil:
		s.serve(&call{route: route, w: w, r: r, id: rand.Text()})
	default:
		io.WriteString(w, "ok\n")
	}
}

// serve answers a request of a job and logs one line about it.
func (s *web) serve(c *call) {
	start := time.Now()
	c.w.Header().Set("X-Request-Id", c.id)
	body, err := s.answer(c)
	if err != nil {
		body = c.deny(err)
	}
	c.count(c.check).Inc()
	if c.claims != nil || s.mayLogDenial() {
		line := []slog.Attr{slog.String("request_id", c.id), slog.String("remote", c.r.RemoteAddr), slog.String("duration", time.Since(start).String())}
		for _, name := range loggedClaims {
			if value := c.claims.get(name); value != "" {
				line = append(line, slog.String(name, sanitize(value)))
			}
		}
		s.log.LogAttrs(c.r.Context(), c.level, c.message, append(append(line, slog.Int("status", c.status)), c.line...)...)
	}
	c.w.Header().Set("Content-Type", "application/json")
	c.w.WriteHeader(c.status)
	enc := json.NewEncoder(c.w)
	enc.SetEscapeHTML(false) // a job's log shows it as plain text
	enc.Encode(body)         // a client that is gone cannot be told
}

// deny makes the call one that ended with an error, and returns its body.
func (c *call) deny(err error) map[string]string {
	d := &denial{status: http.StatusInternalServerError, reason: err}
	errors.As(err, &d)
	c.status, c.level, c.message = d.status, slog.LevelInfo, "denied"
	c.line = []slog.Attr{slog.String("reason", d.reason.Error())}
	answer := "access denied"
	if d.status >= http.StatusInternalServerError {
		c.level, answer = slog.LevelError, http.StatusText(d.status)
	}
	switch d.status {
	case http.StatusUnauthorized:
		c.w.Header().Set("WWW-Authenticate", "Bearer")
	case http.StatusNotFound:
		c.check = "unknown"
	case http.StatusInternalServerError:
		c.check = "bug"
	case http.StatusServiceUnavailable:
		c.w.Header().Set("Retry-After", retryAfter)
	}
	return map[string]string{"error": cmp.Or(d.answer, answer), "requestId": c.id}
}

// answer verifies the token and its claims before anything else is read: only an
// authorized job learns what is wrong with its request. net/http answers no panic.
func (s *web) answer(c *call) (body any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	c.check = "token"
	token, err := bearerToken(c.r)
	start := time.Now()
	if err == nil {
		c.claims, err = s.verifier.verify(token)
	}
	switch {
	case errors.Is(err, errNoKeys):
		c.check = "keys"
		return nil, &denial{status: http.StatusServiceUnavailable, reason: err}
	case err != nil:
		return nil, &denial{status: http.StatusUnauthorized, reason: err}
	}
	verifySeconds.UpdateDuration(start)
	c.check = "claims"
	if err := s.policy.checkClaims(c.claims); err != nil {
		return nil, &denial{status: http.StatusForbidden, reason: err}
	}
	c.check = "request"
	if err := c.read(c); err != nil {
		return nil, err
	}
	c.check = "image"
	for _, image := range c.asked.images {
		if !s.policy.ImagePrefixes.allows(image) {
			err := fmt.Errorf("image %s may not be restarted here: it is under none of the prefixes that are allowed", image)
			return nil, tell(http.StatusForbidden, err)
		}
	}
	if err := s.policy.checkImages(c.claims, c.asked.images); err != nil {
		return nil, tell(http.StatusForbidden, err)
	}
	c.check = "valkey"
	if body, err = c.handle(s, c); err == nil {
		c.check = "ok"
	}
	return body, err
}

// event handles POST /event.
func (s *web) event(c *call) (any, error) {
	images, start := c.asked.images, time.Now()
	reserved := s.quota.take(c.claims.get("repository_id"), len(images))
	// A client that hangs up must not keep the answer away, which says what it used.
	p, err := s.publish(context.WithoutCancel(c.r.Context()), images, reserved)
	publishSeconds.UpdateDuration(start)
	s.quota.take(c.claims.get("repository_id"), p.added-reserved)
	if err != nil {
		return nil, &denial{http.StatusServiceUnavailable, "the request was not accepted, try again", err}
	}
	if p.requestedAt == 0 {
		c.check = "quota"
		err := fmt.Errorf("the repository has requested %d images that were new within a day, and more are refused; reuse tags", maxNewImages)
		return nil, tell(http.StatusTooManyRequests, err)
	}
	at := formatTime(p.requestedAt)
	c.line = []slog.Attr{slog.Any("images", images), slog.String("requested_at", at), slog.Int64("subscribers", p.subscribers)}
	return &accepted{images, at, p.subscribers, c.id}, nil
}

// rolloutQuery is the query of GET /rollout.
type rolloutQuery struct {
	images []string
	since  string        // as requestedAt; empty: the newest request
	seen   string        // the version of the last answer
	wait   time.Duration // for another version
}

const rolloutUsage = "expected 1 to 32 parameters image=registry/name:tag, since=TIME and seen=VERSION of an answer, and wait=0s to 1m"

// parseRolloutQuery is as strict as parseRequest, and its errors are for the job too.
func parseRolloutQuery(raw string) (q rolloutQuery, err error) {
	values, err := url.ParseQuery(raw)
	if n := len(values["image"]); err != nil || n == 0 || n > maxTags {
		return q, errors.New(rolloutUsage)
	}
	parameters := map[string]func(string) error{
		"image": func(s string) error {
			image, err := parseImage(s)
			q.images = append(q.images, image)
			return err
		},
		"since": func(s string) error {
			at, err := time.Parse(time.RFC3339, s)
			q.since = formatTime(at.UnixMicro())
			return err
		},
		"seen": text(&q.seen),
		"wait": into(&q.wait, time.ParseDuration, func(d time.Duration) bool { return 0 <= d && d <= maxWait }),
	}
	for name, given := range values {
		set := parameters[name]
		if set == nil || name != "image" && len(given) > 1 {
			return q, fmt.Errorf("parameter %s is unknown or repeated; %s", sanitize(name), rolloutUsage)
		}
		for _, value := range given {
			if err := set(value); err != nil {
				return q, fmt.Errorf("%s=%s: %s; %s", name, sanitize(value), sanitize(err.Error()), rolloutUsage)
			}
		}
	}
	return q, nil
}

// rollout handles GET /rollout. It answers as soon as the state differs from the one
// that the job has seen, or when the wait is over or web stops.
func (s *web) rollout(c *call) (any, error) {
	q := c.asked
	if s.waiting.Add(1) <= maxWaiting {
		defer s.waiting.Add(-1)
	} else { // what does not wait must keep nobody from it
		s.waiting.Add(-1)
		q.wait = 0
	}
	http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(q.wait + writeTimeout))
	waiting, cancel := context.WithTimeout(c.r.Context(), q.wait)
	defer cancel()
	defer context.AfterFunc(s.stopping, cancel)()
	for client := c.r.Context(); client.Err() == nil; {
		state, err := s.readRollout(waiting, q)
		switch {
		case state != nil:
			state.RequestID = c.id
			c.line = []slog.Attr{slog.Any("images", q.images), slog.Any("state", state.State)}
			return state, nil
		case err != nil && client.Err() == nil:
			return nil, err
		}
		select {
		case <-time.After(rolloutInterval):
		case <-waiting.Done():
		}
	}
	return nil, nil // nobody reads the answer
}

// bearerToken reads the one Authorization header (RFC 6750, section 2.1). The
// scheme may be in any case (RFC 9110, section 11.1).
func bearerToken(r *http.Request) (string, error) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if n := len(r.Header.Values("Authorization")); n != 1 || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", fmt.Errorf("expected one Authorization header with a bearer token; the request has %d", n)
	}
	return token, nil
}

// readEvent reads the body. Its error tells the job what to fix.
func (c *call) readEvent() error {
	media, params, err := mime.ParseMediaType(strings.Join(c.r.Header.Values("Content-Type"), ", ")) // an error for two
	if charset := params["charset"]; err != nil || media != "application/json" || charset != "" && !strings.EqualFold(charset, "utf-8") {
		return tell(http.StatusUnsupportedMediaType, errors.New("expected one header Content-Type: application/json"))
	}
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, maxRequestBytes))
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return tell(http.StatusRequestEntityTooLarge, fmt.Errorf("the body is larger than %d bytes; send fewer tags", tooLarge.Limit))
	}
	if err != nil { // a slow or broken client
		return tell(http.StatusBadRequest, errors.New("the body could not be read"))
	}
	c.asked.images, err = parseRequest(body)
	return tell(http.StatusBadRequest, err)
}

func (c *call) readQuery() (err error) {
	c.asked, err = parseRolloutQuery(c.r.URL.RawQuery)
	return tell(http.StatusBadRequest, err)
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

// mayLogDenial keeps unauthenticated callers from rotating the other log lines away. It
// logs how many of their denials are not logged.
func (s *web) mayLogDenial() bool {
	n := s.denials.Add(1)
	if n == 1 {
		time.AfterFunc(denialInterval, func() {
			if suppressed := s.denials.Swap(0) - maxDenialLines; suppressed > 0 {
				s.log.Warn("denials not logged", "count", suppressed)
			}
		})
	}
	return n <= maxDenialLines
}
