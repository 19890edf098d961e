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

// journal keeps what web accepted, to compare it with what was restarted.
type journal struct {
	mu        sync.Mutex
	begun     time.Time
	accepted  map[string][]acceptance // by image
	uncertain map[string]int          // by image: tries that may have reached the ledger although no 202 came back
	retries   int
	// foreign are values of restartedAt in the worker's form that the test wrote.
	foreign map[string]bool
	// mayDouble is set where the design allows for a restart too many.
	mayDouble bool
}

// acceptance is one 202.
type acceptance struct {
	at    int64     // T in µs
	asked time.Time // just before the POST
}

func newJournal() *journal {
	return &journal{begun: time.Now(), accepted: map[string][]acceptance{}, uncertain: map[string]int{}, foreign: map[string]bool{}}
}

func (j *journal) add(image string, at int64, asked time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.accepted[image] = append(j.accepted[image], acceptance{at, asked})
}

// pushOnce is mustPush that also goes into the journal.
func (j *journal) pushOnce(t testing.TB, c *client, image string) int64 {
	t.Helper()
	asked := time.Now()
	at := c.mustPush(t, image)
	j.add(image, at, asked)
	return at
}

// push is the loop of the documented workflow: a new token for every try. It
// tries again without a connection, without an answer and after a 5xx. Any other
// answer than 202 is an error.
func (j *journal) push(ctx context.Context, c *client, image string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for last := error(nil); ; {
		asked := time.Now()
		a, err := c.post(ctx, github.mint(c.now(), nil), imageBody(image))
		switch {
		case err == nil && a.status == http.StatusAccepted:
			_, at, err := a.accepted()
			j.add(image, at, asked)
			j.repeat(image, a.tries()-1)
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
		j.repeat(image, a.tries())
		select {
		// Much shorter than the workflow's, to press harder.
		case <-time.After(200*time.Millisecond + rand.N(100*time.Millisecond)):
		case <-ctx.Done():
			return fmt.Errorf("pushing %s: not accepted within a minute, at last: %w", image, last)
		}
	}
}

// repeat counts tries of which nobody knows whether they reached the ledger.
func (j *journal) repeat(image string, tries int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.uncertain[image] += tries
	j.retries += tries
}

// pushMany pushes n requests for images chosen at random, from eight clients and
// some 10 ms apart. It returns at once; wait waits for the end.
func (j *journal) pushMany(ctx context.Context, c *client, images []string, n int) (wait func() error) {
	work := make(chan string)
	errs := make(chan error, n)
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for image := range work {
				if err := j.push(ctx, c, image); err != nil {
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

// total is how many requests were accepted.
func (j *journal) total() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for _, requests := range j.accepted {
		n += len(requests)
	}
	return n
}

// newest is the newest T and the latest time of asking by image. Where a try had
// no certain outcome, the ledger says whether a newer T exists; that one counts.
func (j *journal) newest(t testing.TB, v *valkeyServer) map[string]acceptance {
	t.Helper()
	j.mu.Lock()
	newest, uncertain := map[string]acceptance{}, maps.Clone(j.uncertain)
	for image, requests := range j.accepted {
		var a acceptance
		for _, r := range requests {
			a.at = max(a.at, r.at)
			if r.asked.After(a.asked) {
				a.asked = r.asked
			}
		}
		newest[image] = a
	}
	j.mu.Unlock()
	for image, want := range newest {
		at := v.requestedAt(t, image)
		switch {
		case at == want.at:
		case at > want.at && uncertain[image] > 0:
			newest[image] = acceptance{at, want.asked}
		default:
			t.Errorf("%s: the ledger has %s, and the newest accepted was %s", image, stamp(at), stamp(want.at))
		}
	}
	return newest
}

func (d deployment) allImages() []string {
	return slices.Concat(d.images, d.initImages, d.volumeImages)
}

// lost are the Deployments whose restartedAt is not the newest T of their images,
// or that have not been restarted since the last request was made: on a clock
// that went back, an older T must not pass for the newest.
func (j *journal) lost(newest map[string]acceptance, r *recorder, deployments []deployment) (lost []string) {
	for _, d := range deployments {
		var want acceptance
		for _, image := range d.allImages() {
			a := newest[image]
			want.at = max(want.at, a.at)
			if a.asked.After(want.asked) {
				want.asked = a.asked
			}
		}
		if want.at == 0 {
			continue
		}
		steps := r.of(d)
		if last := lastRestart(steps); last.restartedAt != stamp(want.at) || last.seen.Before(want.asked) {
			lost = append(lost, fmt.Sprintf("%s: the newest T is %s, asked for at %s; its steps: %s",
				d.key(), stamp(want.at), want.asked.UTC().Format(ourStamp), describe(steps)))
		}
	}
	return lost
}

// lastRestart is the step that brought the restartedAt as it stands.
func lastRestart(steps []step) (last step) {
	for i, s := range steps {
		if i == 0 || s.restartedAt != last.restartedAt {
			last = s
		}
	}
	return last
}

// waitDelivered waits until nothing is lost and returns what still is.
func (j *journal) waitDelivered(t testing.TB, v *valkeyServer, r *recorder, deployments []deployment, within time.Duration) (lost []string) {
	t.Helper()
	newest := j.newest(t, v)
	_ = poll(within, func() error {
		if lost = j.lost(newest, r, deployments); len(lost) > 0 {
			return fmt.Errorf("%d lost", len(lost))
		}
		return nil
	})
	return lost
}

// excess counts the restarts of a Deployment, and those that no request explains:
// a restartedAt that does not grow, one that nobody was given, or more of them
// than requests. Coalesced requests are neither: the newest T stands for all.
func (j *journal) excess(d deployment, steps []step) (restarts, requests, excess int) {
	j.mu.Lock()
	unsure, given, foreign := 0, map[string]bool{}, maps.Clone(j.foreign)
	for _, image := range d.allImages() {
		for _, a := range j.accepted[image] {
			given[stamp(a.at)] = true
		}
		requests += len(j.accepted[image]) + j.uncertain[image]
		unsure += j.uncertain[image]
	}
	j.mu.Unlock()
	for i := 1; i < len(steps); i++ {
		at, before := steps[i].restartedAt, steps[i-1].restartedAt
		excess += int(steps[i].generation - steps[i-1].generation - 1) // not seen, not explained
		if at == before || !ourForm.MatchString(at) || foreign[at] {
			continue // a change of the test's own: the same T twice makes no generation
		}
		restarts++
		// Values in the worker's form compare as strings; others have no place in the order.
		if grows := !ourForm.MatchString(before) || foreign[before] || at > before; !grows || (unsure == 0 && !given[at]) {
			excess++
		}
	}
	return restarts, requests, excess + max(0, restarts-requests)
}

// verify compares the journal with what the recorder saw, prints the summary line,
// and fails the test unless nothing was lost and nothing doubled.
func (j *journal) verify(t testing.TB, v *valkeyServer, r *recorder, deployments []deployment, within time.Duration) {
	t.Helper()
	lost := j.waitDelivered(t, v, r, deployments, within)
	time.Sleep(1500 * time.Millisecond) // a restart too many would come now
	restarted, doubled, doubles := 0, 0, []string(nil)
	for _, d := range deployments {
		steps := r.of(d)
		restarts, requests, excess := j.excess(d, steps)
		restarted += restarts
		if doubled += excess; excess > 0 {
			doubles = append(doubles, fmt.Sprintf("%s: %d requests, steps %s", d.key(), requests, describe(steps)))
		}
	}
	j.mu.Lock()
	retries := j.retries
	j.mu.Unlock()
	fmt.Printf("%s: accepted=%d restarted=%d lost=%d doubled=%d (%d tries repeated, %.1fs)\n",
		t.Name(), j.total(), restarted, len(lost), doubled, retries, time.Since(j.begun).Seconds())

	if err := r.err(); err != nil {
		t.Error(err)
	}
	for _, one := range first(lost, 5) {
		t.Errorf("lost: %s", one)
	}
	for _, one := range first(doubles, 5) {
		if !j.mayDouble {
			t.Errorf("doubled: %s", one)
		}
	}
	if j.total() == 0 {
		t.Error("nothing was accepted, so nothing was shown")
	}
}

func first(list []string, n int) []string { return list[:min(n, len(list))] }
