package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// The worker's watch: late, stalled, stale, ended, expired or refused. Tests that
// mostly wait are set up before t.Parallel, and this file comes early in the order
// of files: so the waiting goes on beside the other tests.

// setImage sets the image of the first container, as a deploy job does.
func (d deployment) setImage(t testing.TB, image string) {
	t.Helper()
	d.patch(t, fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":"main-0","image":%q,"imagePullPolicy":"Always"}]}}}}`, image))
}

// watched is a rig with one Deployment, whose worker watches through a proxy.
type watched struct {
	*rig
	api *apiProxy
	job *client
	app deployment
}

func newWatched(t testing.TB, settings ...string) watched {
	t.Helper()
	g := newRig(t, 1, 1)
	w := watched{g, newAPIProxy(t, sharedAPI.url), newClient(startWeb(t, g.valkey.addr).url), g.apps[0]}
	g.startWorker(t, w.api.url, "", settings...)
	return w
}

// owns makes the journal count the image as one of the Deployment's.
func (w *watched) owns(image string) { w.apps[0].images = []string{image} }

// TestImageSetBeforeRequest: a Deployment is set to an image, and then the image
// is requested, while the watch lags or has stalled for a minute.
func TestImageSetBeforeRequest(t *testing.T) {
	var resume func()
	rigs := map[string]watched{}
	for _, name := range []string{"stalled for a minute", "200ms", "1s"} {
		w := newWatched(t)
		if lag, err := time.ParseDuration(name); err == nil {
			w.api.lagWatches(lag)
		} else {
			resume = w.api.stallWatches()
		}
		image := newImage()
		w.owns(image)
		w.app.setImage(t, image)
		w.journal.pushOnce(t, w.job, image)
		rigs[name] = w
	}
	stalled := time.Now()
	end := time.AfterFunc(time.Minute, resume)
	defer end.Stop()
	t.Parallel() // the rest waits
	for _, name := range []string{"200ms", "1s"} {
		rigs[name].verify(t, 5*time.Second)
	}
	rigs["stalled for a minute"].verify(t, time.Minute+5*time.Second-time.Since(stalled))
}

// TestImageSetAfterRequest: a Deployment is set to an image long after it was
// requested. Its new pods pull the image anyway, so nothing restarts, whatever
// the watch goes through at that moment.
func TestImageSetAfterRequest(t *testing.T) {
	unavailable := answering(503, "", func(r *http.Request) bool { return isWatch(r) || isList(r) })
	type trouble struct {
		begin func(*apiProxy)
		end   func(*apiProxy)
	}
	lift := func(p *apiProxy) { p.set(nil) }
	none := func(*apiProxy) {}
	troubles := map[string]trouble{
		"none":      {none, none},
		"ended":     {(*apiProxy).endWatches, none},
		"restarted": {func(p *apiProxy) { p.set(unavailable); p.endWatches() }, lift},
		"late":      {func(p *apiProxy) { p.lagWatches(2 * time.Second) }, none},
		// The watch cannot go on from its version, and the list shows the image.
		"relisted": {
			func(p *apiProxy) { p.set(unavailable); p.endWatches() },
			func(p *apiProxy) { p.set(expiringOnce()) },
		},
	}
	rigs, images := map[string]watched{}, map[string]string{}
	for name := range troubles {
		rigs[name], images[name] = newWatched(t), newImage()
	}
	for name, w := range rigs {
		w.job.mustPush(t, images[name]) // not in the journal: no restart is due
	}
	requested := time.Now()
	t.Parallel() // the rest waits
	// "Long after" begins after 10 s, and the API server counts whole seconds.
	time.Sleep(12*time.Second - time.Since(requested))
	for name, w := range rigs {
		troubles[name].begin(w.api)
		w.app.setImage(t, images[name])
	}
	time.Sleep(time.Second)
	for name, w := range rigs {
		troubles[name].end(w.api)
	}
	time.Sleep(3 * time.Second)
	for name, w := range rigs {
		if steps := w.recorder.of(w.app); len(steps) != 2 || restartedAt(w.app.get(t)) != "" {
			t.Errorf("watch %s: restarted although the image was set long after the request: %s", name, describe(steps))
		}
		w.owns(images[name])
		w.journal.pushOnce(t, w.job, images[name]) // and the worker knows the image
		w.verify(t, 15*time.Second)
	}
}

// expiringOnce answers the next watch that goes on from a version with 410.
func expiringOnce() intercept {
	var expired atomic.Bool
	return answering(410, "", func(r *http.Request) bool {
		return isWatch(r) && !isStreamedList(r) && expired.CompareAndSwap(false, true)
	})
}

// TestStaleWatch: the watch delivers nothing more on a connection that lives.
// Deployments that the worker knows restart at once all the same; those that it
// has not seen wait until it restarts the watch, after two minutes at most.
func TestStaleWatch(t *testing.T) {
	w := newWatched(t)
	w.journal.pushOnce(t, w.job, w.images[0])
	if lost := w.journal.waitDelivered(t, w.valkey, w.recorder, w.apps, 5*time.Second); len(lost) > 0 {
		t.Fatal(lost)
	}
	w.api.loseWatches()
	begun := time.Now()
	image := newImage()
	late := deployment{namespace: w.namespace, name: "late", images: []string{image}}
	late.create(t)
	w.journal.pushOnce(t, w.job, image)
	for range 3 {
		w.journal.pushOnce(t, w.job, w.images[0])
		if lost := w.journal.waitDelivered(t, w.valkey, w.recorder, w.apps, 3*time.Second); len(lost) > 0 {
			t.Errorf("the watch is stale: %s", lost)
		}
	}
	w.apps = append(w.apps, late)
	t.Parallel() // the rest waits
	const atMost = 2*time.Minute + 5*time.Second
	w.verify(t, atMost-time.Since(begun))
	if after := lastRestart(w.recorder.of(late)).seen.Sub(begun); after > atMost {
		t.Errorf("what came after the watch went stale was restarted %s later", after)
	} else {
		t.Logf("restarted %.0f s after the watch went stale", after.Seconds())
	}
}

// TestLateWatch: every event of the watch is 7 s late, while 40 Deployments get
// 4 requests a second. None falls behind for good.
func TestLateWatch(t *testing.T) {
	g := newRig(t, 40, 1)
	api := newAPIProxy(t, sharedAPI.url)
	job := newClient(startWeb(t, g.valkey.addr).url)
	g.startWorker(t, api.url, "")
	api.lagWatches(7 * time.Second)
	pushed := make(chan error, 1)
	go func() {
		var err error
		for begun := time.Now(); err == nil && time.Since(begun) < 30*time.Second; time.Sleep(250 * time.Millisecond) {
			err = g.journal.push(t.Context(), job, g.images[rand.IntN(len(g.images))])
		}
		pushed <- err
	}()
	t.Parallel() // the rest waits
	if err := <-pushed; err != nil {
		t.Fatal(err)
	}
	g.verify(t, 10*time.Second)
}

// TestNotReadyWithoutWatch: the worker says that it is not ready while it cannot
// watch, and is ready again afterwards.
func TestNotReadyWithoutWatch(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 1)
	job := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	network := newTCPProxy(t, api.host)
	worker := g.startWorker(t, "https://"+network.addr, "")
	for name, trouble := range map[string]struct{ begin, end func() }{
		"the API server is away": {func() { network.set(refuse) }, func() { network.set(pass) }},
		"watches are refused": {
			func() { api.set(answering(503, "", isWatch)); api.endWatches() },
			func() { api.set(nil) },
		},
	} {
		trouble.begin()
		begun := time.Now()
		reason := worker.waitNotReady(t, 8*time.Second)
		t.Logf("%s: not ready after %.1f s: %s", name, time.Since(begun).Seconds(), strings.TrimSpace(reason))
		g.journal.pushOnce(t, job, g.images[0])
		trouble.end()
		worker.waitReady(t, 10*time.Second)
	}
	g.verify(t, 20*time.Second)
}

// TestExpiredPage: an API server that cannot stream lists forgets a list before
// its second page is asked for. No list is asked for whole, since that would take
// hundreds of megabytes, and the cache is complete all the same.
func TestExpiredPage(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 1)
	var filler []deployment
	for i := range 600 {
		filler = append(filler, deployment{namespace: g.namespace, name: fmt.Sprintf("a-%d", i), images: []string{"ghcr.io/acme/sidecar:v1"}})
	}
	createAll(t, filler)
	last := deployment{namespace: g.namespace, name: "zzz", images: g.images}
	last.create(t)
	g.apps = append(g.apps, last)

	api := newAPIProxy(t, sharedAPI.url)
	var pages atomic.Int32
	noStreams := answering(422, "", isStreamedList)
	api.set(anyOf(noStreams, answering(410, "", func(r *http.Request) bool {
		return isList(r) && r.URL.Query().Get("continue") != "" && pages.Add(1) == 1
	})))
	job := newClient(startWeb(t, g.valkey.addr).url)
	worker := g.startWorker(t, api.url, "")
	g.journal.pushOnce(t, job, g.images[0])
	if lost := g.journal.waitDelivered(t, g.valkey, g.recorder, g.apps, 5*time.Second); len(lost) > 0 {
		t.Errorf("after the first list: %s", lost)
	}
	if pages.Load() == 0 {
		t.Error("no second page was asked for, so nothing was shown")
	}

	// Again, in a list that a 410 to the watch makes necessary.
	pages.Store(0)
	before := len(api.listed())
	api.set(anyOf(noStreams, expiringOnce(), answering(410, "", func(r *http.Request) bool {
		return isList(r) && r.URL.Query().Get("continue") != "" && pages.Add(1) == 1
	})))
	added := deployment{namespace: g.namespace, name: "zzzz", images: g.images}
	api.endWatches()
	added.create(t)
	g.apps = append(g.apps, added)
	eventually(t, 10*time.Second, "the worker lists anew", func() error {
		if n := len(api.listed()) - before; n < 3 {
			return fmt.Errorf("%d pages", n)
		}
		return nil
	})
	worker.waitReady(t, 10*time.Second)
	g.journal.pushOnce(t, job, g.images[0])
	g.verify(t, 10*time.Second)
	for _, query := range api.listed() {
		if query.Get("limit") == "" && query.Get("fieldSelector") == "" {
			t.Errorf("a list without a limit: %v", query)
		}
	}
}
