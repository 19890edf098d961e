package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"testing"
	"time"
)

// TestClocks: the clock of one web and of its tokens is an hour ahead, and then the
// worker's is. T comes from Valkey's clock, so nothing changes.
func TestClocks(t *testing.T) {
	// Before Parallel: a build beside them would slow down all other tests.
	ahead, err := skewedPath()
	if err != nil {
		t.Fatal(err)
	}
	t.Parallel()
	g := newRig(t, 6, 2)
	worker := g.startWorker(t, "", "")
	right := newClient(startWeb(t, g.valkey.addr).url)
	wrongWeb := launchWeb(t, ahead, g.valkey.addr)
	wrongWeb.waitReady(t, 20*time.Second)
	wrong := newClient(wrongWeb.url)
	wrong.now = func() time.Time { return time.Now().Add(time.Hour) }
	if a, err := wrong.post(t.Context(), github.mint(time.Now(), nil), imageBody(newImage())); err != nil || a.status != http.StatusUnauthorized {
		t.Fatalf("the web that is an hour ahead answers a token of now with %d, %v: its clock is not ahead", a.status, err)
	}

	var last int64
	for i := range 60 {
		c := right
		if i%2 == 0 {
			c = wrong
		}
		at := g.journal.pushOnce(t, c, g.images[i%5])
		if now := g.valkey.now(t); at <= last || at > now || at < now-5e6 {
			t.Errorf("T is %s after %s, and Valkey's clock says %s", stamp(at), stamp(last), stamp(now))
		}
		last = at
	}
	g.verify(t, 10*time.Second)

	// By the clock of a worker that is an hour ahead, the whole ledger is as old as
	// its window, and a laptop's clock half an hour ahead is in the past.
	worker.kill()
	for _, image := range g.images {
		g.journal.pushOnce(t, right, image)
	}
	laptop := g.apps[0]
	laptop.annotate(t, time.Now().Add(30*time.Minute).UTC().Format(time.RFC3339))
	wrongWorker := launchWorker(t, ahead, g.valkey.addr, g.user.kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+g.namespace)
	wrongWorker.waitReady(t, 20*time.Second)
	for _, image := range g.images {
		g.journal.pushOnce(t, right, image)
	}
	g.verify(t, 10*time.Second)
}

// startShiftedRig is a rig without Deployments on a Valkey whose clock can be
// shifted.
func startShiftedRig(t testing.TB) *rig {
	t.Helper()
	v := newShiftedValkey(t)
	v.start(t)
	return newRigOn(t, v, 0, 0)
}

// TestValkeyClockPutRight: Valkey's clock is ahead, a request comes, the clock is
// put right, and another image of the same Deployment is requested. T grows over
// all images, so both are restarted for, also after a retag. Nothing is deferred
// for longer than the interval.
func TestValkeyClockPutRight(t *testing.T) {
	t.Parallel()
	const interval = 2 * time.Second
	for _, ahead := range []time.Duration{10 * time.Second, 2 * time.Hour} {
		g := startShiftedRig(t)
		a, b, v1, v2 := newImage(), newImage(), newImage(), newImage()
		g.apps = []deployment{
			{namespace: g.namespace, name: "both", images: []string{a, b}},
			{namespace: g.namespace, name: "retagged", images: []string{v1}},
		}
		createAll(t, g.apps)
		g.startWorker(t, "", "", "WORKER_RESTART_INTERVAL="+interval.String())
		c := newClient(startWeb(t, g.valkey.addr).url)
		push := func(image string) {
			t.Helper()
			at := g.journal.pushOnce(t, c, image)
			for _, d := range g.apps {
				if slices.Contains(d.images, image) {
					g.recorder.waitRestartedAt(t, interval+time.Second, d, stamp(at))
				}
			}
		}
		g.valkey.shift(t, ahead)
		push(a)
		push(v1)
		g.valkey.shift(t, 0)
		g.apps[1].setImage(t, v2)
		g.apps[1].images = []string{v1, v2}
		push(b)
		push(v2)
		push(b)
		g.verify(t, interval+time.Second)
	}
}

// TestValkeyClockJumps: Valkey restarts under load, each time with another clock.
func TestValkeyClockJumps(t *testing.T) {
	t.Parallel()
	g := startShiftedRig(t)
	g.images = newImages(12)
	for i := range 36 {
		g.apps = append(g.apps, deployment{namespace: g.namespace, name: fmt.Sprint("app-", i),
			images: []string{g.images[i%12], g.images[(i+1+i/12)%12]}})
	}
	createAll(t, g.apps)
	g.startWorker(t, "", "")
	c := newClient(startWeb(t, g.valkey.addr).url)
	lost := 0
	jumps := []time.Duration{2 * time.Hour, 0, 10 * time.Second, -10 * time.Second, -time.Hour, 0, 2 * time.Hour, -10 * time.Second, 10 * time.Second, -time.Hour, 0}
	for _, ahead := range jumps {
		for _, restart := range []bool{true, false} {
			wait := g.journal.pushMany(t.Context(), c, g.images, 60)
			if restart {
				time.Sleep(rand.N(500 * time.Millisecond))
				g.valkey.kill()
				g.valkey.shift(t, ahead)
				time.Sleep(rand.N(300 * time.Millisecond))
				g.valkey.start(t)
			}
			if err := wait(); err != nil {
				t.Fatal(err)
			}
		}
		missing := g.journal.waitDelivered(t, g.valkey, g.recorder, g.apps, 3*time.Second)
		if lost += len(missing); len(missing) > 0 {
			t.Errorf("Valkey's clock is %s ahead now, and %d of %d Deployments are lost, such as %s", ahead, len(missing), len(g.apps), missing[0])
		}
	}
	t.Logf("%d jumps: lost %d", len(jumps), lost)
	g.verify(t, 10*time.Second)
}

// TestValkeyClockJumpsUnheard: no worker is connected when the request is made
// and Valkey's clock jumps, so that only the ledger knows of it.
func TestValkeyClockJumpsUnheard(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{2 * time.Hour, -2 * time.Hour} {
		g := startShiftedRig(t)
		g.images = newImages(2)
		g.apps = []deployment{{namespace: g.namespace, name: "app", images: g.images}}
		createAll(t, g.apps)
		network := newTCPProxy(t, g.valkey.addr)
		worker := g.startWorker(t, "", network.addr)
		c := newClient(startWeb(t, g.valkey.addr).url)
		network.set(refuse)
		worker.waitNotReady(t, 10*time.Second)
		g.journal.pushOnce(t, c, g.images[0])
		g.valkey.shift(t, ahead)
		network.set(pass)
		worker.waitReady(t, 10*time.Second)
		g.verify(t, 5*time.Second)
	}
}
