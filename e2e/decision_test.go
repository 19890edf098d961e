package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestPausedAcrossRequest: a Deployment that is paused when its image is requested
// restarts when it is resumed, also by a worker that started in between.
func TestPausedAcrossRequest(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 3)
	c := newClient(startWeb(t, g.valkey.addr).url)
	worker := g.startWorker(t, "", "")
	pause := func(paused bool) {
		for _, d := range g.apps[:2] {
			d.patch(t, fmt.Sprintf(`{"spec":{"paused":%v}}`, paused))
		}
	}
	resumed := func(at int64) {
		t.Helper()
		for _, d := range g.apps[:2] {
			g.recorder.mustNotChange(t, d, 500*time.Millisecond)
		}
		pause(false)
		for _, d := range g.apps {
			g.recorder.waitRestartedAt(t, 5*time.Second, d, stamp(at))
		}
	}

	pause(true)
	at := g.journal.pushOnce(t, c, g.images[0])
	g.recorder.waitRestartedAt(t, 5*time.Second, g.apps[2], stamp(at))
	worker.waitLogged(t, 5*time.Second, "msg", "not restarted", "reason", "paused", "deployment", g.apps[0].name)
	resumed(at)

	pause(true)
	at = g.journal.pushOnce(t, c, g.images[0])
	g.recorder.waitRestartedAt(t, 5*time.Second, g.apps[2], stamp(at))
	worker.kill()
	g.startWorker(t, "", "")
	resumed(at)
	g.verify(t, 5*time.Second)
}

// TestGitOpsIsNotFought: a tool that removes the annotation wins. Neither the
// catch-up, nor another change to the Deployment, nor a new watch puts it back.
func TestGitOpsIsNotFought(t *testing.T) {
	g := newRig(t, 1, 1)
	c := newClient(startWeb(t, g.valkey.addr).url)
	network := newTCPProxy(t, strings.TrimPrefix(sharedAPI.url, "https://"))
	g.startWorker(t, "https://"+network.addr, "")
	d := g.apps[0]
	at := g.journal.pushOnce(t, c, g.images[0])
	g.recorder.waitRestartedAt(t, 5*time.Second, d, stamp(at))
	d.annotate(t, "")
	d.patch(t, `{"metadata":{"labels":{"touched":"yes"}}}`)
	g.recorder.mustNotChange(t, d, 2*time.Second)
	network.set(reset)
	time.Sleep(100 * time.Millisecond)
	network.set(pass)
	waited := time.Now()
	t.Parallel()                                                      // the rest waits
	g.recorder.mustNotChange(t, d, 32*time.Second-time.Since(waited)) // longer than the catch-up's period
	if got := restartedAt(d.get(t)); got != "" {
		t.Errorf("restartedAt is back: %s", got)
	}
	g.journal.pushOnce(t, c, g.images[0]) // and the next request counts
	g.verify(t, 5*time.Second)
}

// TestForeignRestartedAt: a restartedAt from somebody's own clock. One from the
// future satisfies no request, in the worker's own form either; one between T and
// now does.
func TestForeignRestartedAt(t *testing.T) {
	t.Parallel()
	g := newRig(t, 2, 5)
	c := newClient(startWeb(t, g.valkey.addr).url)
	future, byHand := g.images[0], g.images[1]
	worker := g.startWorker(t, "", "")
	laptop := time.Now().Add(5 * time.Minute).In(time.FixedZone("", 7200)).Format(time.RFC3339)
	python := stamp(time.Now().Add(2 * time.Hour).UnixMicro()) // local time, said to be UTC
	g.journal.foreign[python] = true
	for i, value := range []string{"2099-01-01T00:00:00Z", laptop, "soon", "2099-01-01T00:00:00.5Z", python} {
		g.apps[i].annotate(t, value)
	}
	first := g.journal.pushOnce(t, c, future)
	for _, d := range g.apps[:5] {
		g.recorder.waitRestartedAt(t, 5*time.Second, d, stamp(first))
	}
	g.apps[0].annotate(t, "2099-01-01T00:00:00Z") // once more, over ours
	g.journal.pushOnce(t, c, future)

	// kubectl rollout restart while no worker was there.
	eventually(t, 5*time.Second, "the second request was delivered", func() error {
		if got := g.recorder.restarts(g.apps[3]); got != 3 { // annotated, and twice restarted
			return fmt.Errorf("%d generations", got)
		}
		return nil
	})
	worker.kill()
	c.mustPush(t, byHand) // not in the journal: no restart is due
	time.Sleep(1100 * time.Millisecond)
	kubectl := time.Now().UTC().Format(time.RFC3339) // whole seconds, cut off: still after T
	for _, d := range g.apps[5:] {
		d.annotate(t, kubectl)
	}
	g.startWorker(t, "", "")
	g.recorder.mustNotChange(t, g.apps[5], 2*time.Second)
	for _, d := range g.apps[5:] {
		if got := restartedAt(d.get(t)); got != kubectl {
			t.Errorf("%s was restarted at %s although somebody did so after the request, at %s", d.key(), got, kubectl)
		}
	}
	g.verify(t, 10*time.Second)
}
