package e2e

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// ledger keeps what was accepted, to be held against what was restarted.
type ledger struct {
	mu        sync.Mutex
	begun     time.Time
	accepted  map[string][]int64 // per image, T in µs
	uncertain map[string]int     // per image, tries without an answer, or answered 503: perhaps recorded
	retries   int
}

func newLedger() *ledger {
	return &ledger{begun: time.Now(), accepted: map[string][]int64{}, uncertain: map[string]int{}}
}

// pushOnce is mustPush that also goes into the ledger.
func (l *ledger) pushOnce(t testing.TB, c *client, image string) int64 {
	t.Helper()
	at := c.mustPush(t, image)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepted[image] = append(l.accepted[image], at)
	return at
}

// push is the loop of the documented workflow: a new token for every try; no
// connection, no answer or a 5xx is tried again; anything else is final, and an
// error unless it is 202.
func (l *ledger) push(ctx context.Context, c *client, image string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for last := error(nil); ; {
		a, err := c.post(ctx, github.mint(c.now(), nil), imageBody(image))
		switch {
		case err == nil && a.status == http.StatusAccepted:
			_, at, err := a.accepted()
			l.mu.Lock()
			l.accepted[image] = append(l.accepted[image], at)
			l.mu.Unlock()
			return err
		case err == nil && a.status < 500:
			return fmt.Errorf("pushing %s: answered %d %s, which the workflow does not try again", image, a.status, a.body)
		case err == nil && a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == "":
			return fmt.Errorf("pushing %s: a 503 without Retry-After: %s", image, a.body)
		case err == nil:
			last = fmt.Errorf("answered %d %s", a.status, a.body)
		default:
			last = err
		}
		l.mu.Lock()
		l.uncertain[image]++
		l.retries++
		l.mu.Unlock()
		select {
		// Much shorter than the workflow's, to press harder.
		case <-time.After(200*time.Millisecond + rand.N(100*time.Millisecond)):
		case <-ctx.Done():
			return fmt.Errorf("pushing %s: not accepted within a minute, at last: %w", image, last)
		}
	}
}

// pushMany pushes n events, each for an image chosen at random, from eight
// clients, some 10 ms apart. It returns at once; wait waits for the end.
func (l *ledger) pushMany(ctx context.Context, c *client, images []string, n int) (wait func() error) {
	work := make(chan string)
	errs := make(chan error, n)
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for image := range work {
				if err := l.push(ctx, c, image); err != nil {
					errs <- err
				}
			}
		})
	}
	clients.Go(func() {
		defer close(work)
		for range n {
			work <- images[rand.IntN(len(images))]
			time.Sleep(10 * time.Millisecond)
		}
	})
	return func() error {
		clients.Wait()
		select {
		case err := <-errs:
			return err
		default:
			return nil
		}
	}
}

// events is how many were accepted.
func (l *ledger) events() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, at := range l.accepted {
		n += len(at)
	}
	return n
}

// verify holds the ledger against what the recorder saw, prints the summary
// line, and fails the test unless nothing was lost and nothing doubled:
//
//   - lost: Deployments whose restartedAt is not the newest T accepted for their
//     images. Where a try had no certain outcome, Valkey's record says whether a
//     newer T exists; that one then counts.
//   - doubled: restarts that events do not explain: a restartedAt that does not
//     grow, one that nobody was given, or more of them than events.
//
// Coalesced events are neither: the newest T stands for those before it.
func (l *ledger) verify(t testing.TB, v *valkeyServer, r *recorder, deployments []deployment, within time.Duration) {
	t.Helper()
	l.mu.Lock()
	newest, given, uncertain := map[string]int64{}, map[string]map[int64]bool{}, maps.Clone(l.uncertain)
	for image, at := range l.accepted {
		newest[image] = slices.Max(at)
		given[image] = map[int64]bool{}
		for _, one := range at {
			given[image][one] = true
		}
	}
	l.mu.Unlock()

	for image, want := range newest {
		record := v.requestedAt(t, image)
		switch {
		case record == want:
		case record > want && uncertain[image] > 0:
			newest[image] = record
		default:
			t.Errorf("%s: Valkey has %s on record, and %s was accepted as the newest", image, stamp(record), stamp(want))
		}
	}
	want := func(d deployment) (at string) {
		var us int64
		for _, image := range slices.Concat(d.images, d.initImages, d.volumeImages) {
			us = max(us, newest[image])
		}
		if us == 0 {
			return ""
		}
		return stamp(us)
	}

	var lost []string
	_ = poll(within, func() error {
		lost = nil
		for _, d := range deployments {
			steps := r.of(d)
			if w := want(d); w != "" && (len(steps) == 0 || steps[len(steps)-1].restartedAt != w) {
				lost = append(lost, fmt.Sprintf("%s should have restartedAt %s, and has steps %s", d.key(), w, describe(steps)))
			}
		}
		if len(lost) > 0 {
			return fmt.Errorf("%d lost", len(lost))
		}
		return nil
	})
	// One restart too many would come about now.
	time.Sleep(1500 * time.Millisecond)

	restarted, doubled, excess := 0, 0, []string(nil)
	for _, d := range deployments {
		steps := r.of(d)
		if len(steps) == 0 {
			continue
		}
		events, unsure, known := 0, 0, map[string]bool{}
		for _, image := range slices.Concat(d.images, d.initImages, d.volumeImages) {
			for at := range given[image] {
				known[stamp(at)] = true
			}
			events += len(given[image]) + uncertain[image]
			unsure += uncertain[image]
		}
		restarts, extra := 0, 0
		for i := 1; i < len(steps); i++ {
			at, before := steps[i].restartedAt, steps[i-1].restartedAt
			extra += int(steps[i].generation - steps[i-1].generation - 1) // not seen, not explained
			if at == before || !ourForm.MatchString(at) {
				continue // somebody else's change, a test's own: the same T twice makes no generation
			}
			restarts++
			// Ours compare as strings; a value in another form has no place in the order.
			if grows := !ourForm.MatchString(before) || at > before; !grows || (unsure == 0 && !known[at]) {
				extra++
			}
		}
		restarted += restarts
		extra += max(0, restarts-events)
		if extra > 0 {
			doubled += extra
			excess = append(excess, fmt.Sprintf("%s: %d events, steps %s", d.key(), events, describe(steps)))
		}
	}
	l.mu.Lock()
	retries := l.retries
	l.mu.Unlock()
	fmt.Printf("%s: accepted=%d restarted=%d lost=%d doubled=%d (%d tries repeated, %.1fs)\n",
		t.Name(), l.events(), restarted, len(lost), doubled, retries, time.Since(l.begun).Seconds())

	if err := r.err(); err != nil {
		t.Error(err)
	}
	for _, one := range first(lost, 5) {
		t.Errorf("lost: %s", one)
	}
	for _, one := range first(excess, 5) {
		t.Errorf("doubled: %s", one)
	}
	if l.events() == 0 {
		t.Error("nothing was accepted, so nothing was shown")
	}
}

func first(list []string, n int) []string { return list[:min(n, len(list))] }
