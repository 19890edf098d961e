package main

import (
	"fmt"
	"sync"
	"time"
)

// request is the newest request for an image.
type request struct {
	at   int64     // T
	made time.Time // when, as far as the worker knows, on its own clock
	// announced: its message arrived, when it was made. Otherwise it was caught up.
	announced bool
}

// latest is when the request was made by the later of T and the worker's clock, for
// comparisons with what other clocks have written.
func (r request) latest() time.Time { return time.UnixMicro(max(r.at, r.made.UnixMicro())) }

// moment is the time of a decision.
type moment struct {
	now    time.Time // the worker's monotonic clock
	clock  time.Time // the earlier of Valkey's clock and the worker's own
	newest int64     // the newest T known
}

// requests is what the worker remembers of the ledger and of messages.
type requests struct {
	now func() time.Time

	mu      sync.Mutex
	byImage map[string]request
	newest  int64
	valkey  time.Time // Valkey's clock when it was read last
	readAt  time.Time // the worker's clock then; zero: not yet
}

func newRequests(now func() time.Time) *requests {
	return &requests{now: now, byImage: map[string]request{}}
}

// clock is Valkey's clock, or the worker's own until that is known.
func (q *requests) clock() time.Time {
	if q.readAt.IsZero() {
		return q.now().Round(0) // the wall clock
	}
	return q.valkey.Add(q.now().Sub(q.readAt))
}

// earlierClock makes no request look too old, and no restart too new, because one
// of the two clocks is ahead.
func (q *requests) earlierClock() time.Time {
	return time.UnixMicro(min(q.clock().UnixMicro(), q.now().UnixMicro()))
}

// tooFarAhead reports whether Valkey's clock was wrong when it gave T. Remembered,
// it would satisfy every request for more than a day.
func (q *requests) tooFarAhead(at int64) bool {
	return at > q.clock().Add(ledgerAge).UnixMicro()
}

// setClock takes Valkey's clock, returns the earlier of it and the worker's own,
// and forgets the requests that are older than age, or too far ahead.
func (q *requests) setClock(valkey time.Time, age time.Duration) time.Time {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.valkey, q.readAt, q.newest = valkey, q.now(), 0
	for image, r := range q.byImage {
		if q.now().Sub(r.made) > age || q.tooFarAhead(r.at) {
			delete(q.byImage, image)
		} else {
			q.newest = max(q.newest, r.at)
		}
	}
	return q.earlierClock()
}

// add remembers a request if it is the newest for its image, or if its message
// arrives after it was caught up.
func (q *requests) add(image string, r request) (added bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	previous, known := q.byImage[image]
	switch {
	case q.tooFarAhead(r.at):
		return false, fmt.Errorf("requestedAt %d of image %s is more than %s ahead", r.at, image, ledgerAge)
	case r.at < previous.at || r.at == previous.at && (!r.announced || previous.announced):
		return false, nil
	case !known && len(q.byImage) >= 2*maxLedger: // web keeps to maxLedger
		return false, fmt.Errorf("image %s exceeds the %d that are remembered", image, 2*maxLedger)
	}
	q.byImage[image] = r
	q.newest = max(q.newest, r.at)
	return true, nil
}

func (q *requests) get(image string) (r request, known bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	r, known = q.byImage[image]
	return r, known
}

// next returns the T of a message that has none.
func (q *requests) next() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return max(q.clock().UnixMicro(), q.newest+1)
}

// age is how long ago T was on the clock that gave it.
func (q *requests) age(at int64) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	return max(0, q.clock().Sub(time.UnixMicro(at)))
}

func (q *requests) moment() moment {
	q.mu.Lock()
	defer q.mu.Unlock()
	return moment{q.now(), q.earlierClock(), q.newest}
}

// verdict is what a request means for a Deployment.
type verdict int

const (
	satisfied verdict = iota
	expired           // the request is too old
	skipped           // there is nothing to restart
	deferred          // not now
	due               // restart
)

// Reasons against a restart, for logs, reports and metrics.
const (
	pinnedReason   = "pinned by digest"
	expiredReason  = "expired"
	deletedReason  = "being deleted"
	pausedReason   = "paused"
	intervalReason = "restarted less than WORKER_RESTART_INTERVAL ago"
)

// decision is a verdict with the request that leads to it.
type decision struct {
	verdict verdict
	reason  string        // for the log
	wait    time.Duration // if deferred: when to look again
	image   usedImage
	request request
}

// rules are the bounds of the decision.
type rules struct {
	window   time.Duration // how long a request counts
	interval time.Duration // WORKER_RESTART_INTERVAL
}

// decide is the one rule for messages, catch-up and retries alike.
func (b rules) decide(d *deployment, image usedImage, r request, m moment) decision {
	next := decision{verdict: due, image: image, request: r}
	age, interval := m.now.Sub(r.made), m.now.Sub(d.restarted.since)
	switch {
	case m.proves(d.restartedAt, r), m.proves(d.restarted.at, r):
		next.verdict = satisfied
	case !(r.announced && image.cachedAt.Before(r.made)) && image.addedAt.After(r.latest()):
		next.verdict = satisfied // its pods came after the request
	case age >= b.window:
		next.verdict, next.reason = expired, expiredReason
	case d.deleting:
		next.verdict, next.reason = skipped, deletedReason
	case d.paused: // being resumed leads to a look; this one is for the log
		next.verdict, next.reason, next.wait = deferred, pausedReason, b.window-age
	case interval < b.interval: // never if since is unknown
		next.verdict, next.reason, next.wait = deferred, intervalReason, b.interval-interval
	}
	return next
}

// proves reports whether a restartedAt shows a restart for a request or later. One
// from the future proves nothing; in the worker's own form it may be a T that
// another worker knows already. Any other form comes from somebody else's clock.
func (m moment) proves(restartedAt string, r request) bool {
	if own, err := time.Parse(restartedAtLayout, restartedAt); err == nil {
		return own.UnixMicro() >= r.at && own.UnixMicro() <= max(m.clock.Add(restartedAtLead).UnixMicro(), m.newest)
	}
	other, err := time.Parse(time.RFC3339, restartedAt)
	return err == nil && !other.Before(r.latest()) && !other.After(m.clock)
}
