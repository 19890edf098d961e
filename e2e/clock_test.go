package e2e

import (
	"net/http"
	"testing"
	"time"
)

// TestClocks: one web has a clock that is an hour ahead, and so have its
// tokens; then the worker has. T is Valkey's, so nothing changes.
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
		at := g.ledger.pushOnce(t, c, g.images[i%5])
		if now := g.valkey.now(t); at <= last || at > now || at < now-5e6 {
			t.Errorf("T is %s after %s, and Valkey's clock says %s", stamp(at), stamp(last), stamp(now))
		}
		last = at
	}
	g.verify(t, 10*time.Second)

	// A worker an hour ahead: everything on record is as old as its window by
	// its own clock, and somebody's laptop, half an hour ahead, is in its past.
	worker.kill()
	for _, image := range g.images {
		g.ledger.pushOnce(t, right, image)
	}
	laptop := g.apps[0]
	laptop.annotate(t, time.Now().Add(30*time.Minute).UTC().Format(time.RFC3339))
	wrongWorker := launchWorker(t, ahead, g.valkey.addr, g.user.kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+g.namespace)
	wrongWorker.waitReady(t, 20*time.Second)
	for _, image := range g.images {
		g.ledger.pushOnce(t, right, image)
	}
	g.verify(t, 10*time.Second)
}
