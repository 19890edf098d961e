package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"testing"
	"time"
)

// ourStamp is the form in which the product writes restartedAt and requestedAt.
const ourStamp = "2006-01-02T15:04:05.000000Z"

func stamp(us int64) string { return time.UnixMicro(us).UTC().Format(ourStamp) }

var ourForm = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`)

// answer is what web said.
type answer struct {
	status int
	header http.Header
	body   string
	took   time.Duration
}

// tries is how often web may have tried to write the ledger: it tries again every
// 250 ms within a request.
func (a answer) tries() int { return 1 + int(a.took/(250*time.Millisecond)) }

// accepted is the body of a 202.
type accepted struct {
	Images      []string `json:"images"`
	RequestedAt string   `json:"requestedAt"`
	Subscribers *int     `json:"subscribers"`
	RequestID   string   `json:"requestId"`
}

// accepted checks the form of a 202 and returns it with T in µs.
func (a answer) accepted() (accepted, int64, error) {
	var body accepted
	if a.status != http.StatusAccepted {
		return body, 0, fmt.Errorf("answered %d %s", a.status, a.body)
	}
	decoder := json.NewDecoder(bytes.NewBufferString(a.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&body); err != nil {
		return body, 0, fmt.Errorf("the body of a 202, %s: %w", a.body, err)
	}
	at, err := time.Parse(ourStamp, body.RequestedAt)
	if err != nil || !ourForm.MatchString(body.RequestedAt) || len(body.Images) == 0 || body.Subscribers == nil || body.RequestID == "" {
		return body, 0, fmt.Errorf("the body of a 202 lacks images, subscribers, requestId or a requestedAt with microseconds: %s", a.body)
	}
	return body, at.UnixMicro(), nil
}

// client is a GitHub Actions job that talks to one web.
type client struct {
	url  string
	now  func() time.Time // the clock its tokens are minted by
	http *http.Client
}

func newClient(url string) *client {
	return &client{url: url, now: time.Now, http: &http.Client{
		Timeout: 20 * time.Second, // curl --max-time
		// A connection each, as each curl has one.
		Transport: &http.Transport{DisableKeepAlives: true},
	}}
}

// post sends one body with one token; an empty token sends none.
func (c *client) post(ctx context.Context, token, body string) (answer, error) {
	return c.send(ctx, http.MethodPost, "/event", token, body)
}

func (c *client) send(ctx context.Context, method, path, token, body string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, bytes.NewBufferString(body))
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	begun := time.Now()
	resp, err := c.http.Do(req)
	if err != nil {
		return answer{took: time.Since(begun)}, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	return answer{status: resp.StatusCode, header: resp.Header, body: string(raw), took: time.Since(begun)}, err
}

func imageBody(image string) string { return fmt.Sprintf(`{"image":%q}`, image) }

// mustPush is one POST that must be accepted at once; it returns T.
func (c *client) mustPush(t testing.TB, image string) int64 {
	t.Helper()
	a, err := c.post(t.Context(), github.mint(c.now(), nil), imageBody(image))
	if err != nil {
		t.Fatalf("POST %s: %v", image, err)
	}
	body, at, err := a.accepted()
	if err != nil {
		t.Fatalf("POST %s: %v", image, err)
	}
	if !slices.Equal(body.Images, []string{image}) {
		t.Fatalf("POST %s: accepted %q", image, body.Images)
	}
	return at
}
