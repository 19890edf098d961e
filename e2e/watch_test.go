package e2e

import (
	"fmt"
	"testing"
	"time"
)

// TestSilentWatch: the worker's watch dies without a word while patches and
// lists still work. Deployments it never heard of get the restart they are owed
// once it has found out, and those it knows do not starve on stale versions.
func TestSilentWatch(t *testing.T) {
	t.Parallel()
	g := newRig(t, 2, 2)
	c := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	g.startWorker(t, api.url, "")
	g.ledger.pushOnce(t, c, g.images[0])
	g.recorder.waitRestartedAt(t, 5*time.Second, g.apps[0], stamp(g.ledger.accepted[g.images[0]][0]))

	api.deafen(true)
	begun := time.Now()
	late := newImage()
	for i := range 3 {
		d := deployment{namespace: g.namespace, name: fmt.Sprint("late-", i), images: []string{late}}
		d.create(t)
		g.apps = append(g.apps, d)
	}
	g.ledger.pushOnce(t, c, late)
	// Twice: the worker does not hear of its own first patch, and the second
	// is worked out from a record that is out of date.
	for range 2 {
		g.ledger.pushOnce(t, c, g.images[0])
		g.ledger.pushOnce(t, c, g.images[1])
		time.Sleep(2 * time.Second)
	}
	api.deafen(false) // new watches work again; the old one stays dead
	// Silence is normal for a minute, between two bookmarks.
	g.verify(t, 120*time.Second)
	t.Logf("all there %.0f s after the watch went silent", time.Since(begun).Seconds())
}
