package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// fieldManager is recorded in managedFields. Flux strips what a manager
	// whose name begins with kubectl has set.
	fieldManager = "kuberollouttrigger"

	// patchTimeout is as long as the API server waits for an admission webhook
	// by default.
	patchTimeout = 10 * time.Second

	// clockTolerance is how far Valkey's clock and the API server's may differ
	// before a Deployment counts as created after a request.
	clockTolerance = time.Minute
)

// verdict is what a request means for a Deployment.
type verdict int

const (
	verdictSatisfied verdict = iota
	verdictRestart
	verdictPaused
	verdictDeleting
	verdictExpired
)

func (v verdict) String() string {
	return [...]string{"satisfied", "restart", "paused", "being deleted", "the request is too old"}[v]
}

// decide is the one rule for announcements, catch-up and retries alike. now is
// worker's clock, clock Valkey's.
func decide(d *deployment, r request, now, clock time.Time, window time.Duration) verdict {
	at := time.UnixMicro(r.at)
	switch {
	case restartedSince(d.restartedAt, at, clock):
		return verdictSatisfied
	case !d.restarted.Before(at) && !d.restarted.After(clock.Add(clockTolerance)):
		return verdictSatisfied // and taken away since
	case r.age(now, clock) > window:
		return verdictExpired
	// A Deployment that was there when the request was announced is restarted
	// whatever the clocks say. One that came later, or a request that was found
	// on record, is judged by when the Deployment was created.
	case (r.heard.IsZero() || d.known.After(r.heard)) && d.CreationTimestamp.After(at.Add(clockTolerance)):
		return verdictSatisfied
	case d.DeletionTimestamp != nil:
		return verdictDeleting
	case d.paused:
		return verdictPaused
	}
	return verdictRestart
}

// age is how long ago the request was made. An announced one is timed from when
// it was heard: by then it had just been made, and whatever becomes of anybody's
// clock, it has its window.
func (r request) age(now, clock time.Time) time.Duration {
	if r.heard.IsZero() {
		return clock.Sub(time.UnixMicro(r.at))
	}
	return now.Sub(r.heard)
}

// restartedSince says whether a restartedAt annotation proves a restart at or
// after at. In exactly our form it was written by a worker, on Valkey's clock,
// unless it is so far ahead that no worker writes it (tooFarAhead). Anything
// else came from somebody's own clock; one that is ahead proves nothing.
func restartedSince(restartedAt string, at, clock time.Time) bool {
	if own, ok := ownTime(restartedAt); ok {
		return !own.Before(at) && !own.After(clock.Add(keepRecorded))
	}
	foreign, err := time.Parse(time.RFC3339, restartedAt)
	return err == nil && !foreign.Before(at) && !foreign.After(clock)
}

// ownTime reads a restartedAt of our own form.
func ownTime(restartedAt string) (own time.Time, ok bool) {
	own, err := time.Parse(restartedAtLayout, restartedAt)
	return own, err == nil
}

// patch restarts d as `kubectl rollout restart` does, and changes nothing else.
// Since restartedAt is T, any number of workers send the same patch. The
// resourceVersion makes the API server refuse one that was worked out from an
// outdated record, so that a slow worker never puts an older T over a newer one.
func (w *worker) patch(ctx context.Context, d *deployment, at int64) error {
	type m = map[string]any
	body, err := json.Marshal(m{
		"metadata": m{"resourceVersion": d.ResourceVersion},
		"spec":     m{"template": m{"metadata": m{"annotations": m{restartedAtAnnotation: formatTime(at)}}}},
	})
	if err != nil {
		return fmt.Errorf("encoding the patch: %w", err)
	}
	_, err = w.client.Resource(deploymentsResource).Namespace(d.Namespace).
		Patch(ctx, d.Name, types.MergePatchType, body, metav1.PatchOptions{FieldManager: fieldManager})
	if err == nil || apierrors.IsConflict(err) {
		// Either way the API server has another version than we have.
		w.cache.expectChange(d)
	}
	return err
}

// retryAfterError is an answer that says when to come again.
type retryAfterError struct {
	answer string // what else it says
	delay  time.Duration
}

func (e *retryAfterError) Error() string {
	return fmt.Sprintf("%s (Retry-After: %s)", e.answer, e.delay)
}

// surfaceRetryAfter makes an error of each answer to a patch that has a
// Retry-After. client-go would wait and send the patch again by itself, up to
// ten times, while it occupies one of WORKER_CONCURRENCY's places and its record
// grows old; the queue waits better.
func surfaceRetryAfter(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(r)
		if err != nil || r.Method != http.MethodPatch {
			return resp, err
		}
		seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if err != nil || seconds < 0 || resp.StatusCode < http.StatusBadRequest {
			return resp, nil
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		if err != nil {
			return nil, err
		}
		answer := resp.Status + ": " + strings.TrimSpace(string(body))
		return nil, &retryAfterError{cut(answer), time.Duration(seconds) * time.Second}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
