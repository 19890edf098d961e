package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"
)

// TestRestartInterval: the first request restarts at once. All requests within
// the interval after it cost one restart more, for the newest, when it ends.
func TestRestartInterval(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		setting  string
		interval time.Duration
		workers  int
	}{
		"default": {"", 10 * time.Second, 1},
		"4s":      {"4s", 4 * time.Second, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newRig(t, 1, 1)
			job := newClient(startWeb(t, g.valkey.addr).url)
			for range c.workers {
				g.startWorker(t, "", "", "WORKER_RESTART_INTERVAL="+c.setting)
			}
			d := g.apps[0]
			at := g.journal.pushOnce(t, job, g.images[0])
			first := g.recorder.waitRestartedAt(t, 2*time.Second, d, stamp(at))
			for range 20 {
				at = g.journal.pushOnce(t, job, g.images[0])
				time.Sleep(100 * time.Millisecond)
			}
			second := g.recorder.waitRestartedAt(t, c.interval+time.Second, d, stamp(at))
			after := second.seen.Sub(first.seen)
			t.Logf("deferred to %.2f s after the first restart", after.Seconds())
			if after < c.interval-200*time.Millisecond || after > c.interval+time.Second {
				t.Errorf("the second restart came %s after the first, the interval is %s", after, c.interval)
			}
			g.verify(t, time.Second)
			if n := g.recorder.restarts(d); n != 2 {
				t.Errorf("21 requests cost %d restarts: %s", n, describe(g.recorder.of(d)))
			}
		})
	}
	t.Run("off", func(t *testing.T) {
		t.Parallel()
		g := newRig(t, 1, 1)
		job := newClient(startWeb(t, g.valkey.addr).url)
		g.startWorker(t, "", "", "WORKER_RESTART_INTERVAL=0")
		for range 5 {
			at := g.journal.pushOnce(t, job, g.images[0])
			g.recorder.waitRestartedAt(t, 2*time.Second, g.apps[0], stamp(at))
		}
		g.verify(t, time.Second)
	})
}

// TestRestartIntervalAfterList: nobody knows when a restart was made that a list or a new
// Deployment brings. It defers nothing.
func TestRestartIntervalAfterList(t *testing.T) {
	t.Parallel()
	w := newWatched(t, "WORKER_RESTART_INTERVAL=30s")
	w.api.set(answering(503, "", func(r *http.Request) bool { return isWatch(r) || isList(r) }))
	w.api.endWatches()
	w.app.annotate(t, "2024-01-01T00:00:00Z")
	before := len(w.api.listed())
	w.api.set(expiringOnce())
	eventually(t, 15*time.Second, "the worker lists and watches again", func() error {
		if lists, watches := len(w.api.listed())-before, w.api.openWatches(); lists == 0 || watches == 0 {
			return fmt.Errorf("%d lists, %d watches", lists, watches)
		}
		return nil
	})
	at := w.journal.pushOnce(t, w.job, w.images[0])
	w.recorder.waitRestartedAt(t, 2*time.Second, w.app, stamp(at))
	created := deployment{namespace: w.namespace, name: "new", images: []string{newImage()}, restartedAt: "2024-01-01T00:00:00Z"}
	created.create(t)
	w.recorder.waitRestartedAt(t, 2*time.Second, created, stamp(w.job.mustPush(t, created.images[0])))
	w.verify(t, time.Second)
}
