package e2e

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A Deployment in the middle of a rollout: its status, and so its
// resourceVersion, changes several times a second.

// heatStatus writes the status so often until the test ends.
func (d deployment) heatStatus(t testing.TB, every time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	var writing sync.WaitGroup
	t.Cleanup(func() { cancel(); writing.Wait() })
	writing.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for i := 1; ctx.Err() == nil; i++ {
			body := fmt.Appendf(nil, `{"status":{"observedGeneration":%d}}`, i)
			_, err := sharedAPI.admin.Resource(deploymentsResource).Namespace(d.namespace).Patch(ctx, d.name, types.MergePatchType, body, metav1.PatchOptions{}, "status")
			if err != nil && ctx.Err() == nil {
				t.Errorf("writing the status of %s: %v", d.key(), err)
				return
			}
			<-tick.C
		}
	})
}

// TestHotStatus: one worker restarts such a Deployment with two patches and one
// list at most, however far away the API server is.
func TestHotStatus(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ every, delay time.Duration }{
		{50 * time.Millisecond, 50 * time.Millisecond},
		{50 * time.Millisecond, 250 * time.Millisecond},
		{200 * time.Millisecond, 250 * time.Millisecond},
		{100 * time.Millisecond, 0},
	} {
		t.Run(fmt.Sprintf("status every %s, API server %s away", c.every, c.delay), func(t *testing.T) {
			t.Parallel()
			w := newWatched(t)
			w.api.set(delaying(c.delay, patchOrList))
			w.app.heatStatus(t, c.every)
			for round := range 3 {
				patches, lists := len(w.api.patchesOf(w.app)), w.api.listsOf(w.app)
				w.journal.pushOnce(t, w.job, w.images[0])
				if lost := w.journal.waitDelivered(t, w.valkey, w.recorder, w.apps, 4*time.Second); len(lost) > 0 {
					t.Errorf("request %d: %s", round+1, lost)
				}
				time.Sleep(500 * time.Millisecond)
				patches, lists = len(w.api.patchesOf(w.app))-patches, w.api.listsOf(w.app)-lists
				if patches > 2 || lists > 1 {
					t.Errorf("request %d: %d patches and %d lists, want at most 2 and 1", round+1, patches, lists)
				}
			}
			w.verify(t, time.Second)
		})
	}
}

// TestHotStatusCrossing: requests for two images of such a Deployment cross in
// three workers, one of which is slow and hears of changes late. The newest T
// stands once all have heard both requests.
func TestHotStatusCrossing(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		setting string // of WORKER_RESTART_INTERVAL
		within  time.Duration
		rounds  int
	}{
		{"0", 4 * time.Second, 12},
		{"", 11 * time.Second, 2}, // the interval and a second
	} {
		t.Run("interval "+c.setting, func(t *testing.T) {
			t.Parallel()
			g := newRig(t, 0, 0)
			g.images = newImages(2)
			d := deployment{namespace: g.namespace, name: "app", images: g.images}
			d.create(t)
			g.apps = []deployment{d}
			g.journal.mayDouble = true // a second patch may cross another worker's
			for _, delay := range []time.Duration{0, 50 * time.Millisecond, 250 * time.Millisecond} {
				api := newAPIProxy(t, sharedAPI.url)
				g.startWorker(t, api.url, "", "WORKER_RESTART_INTERVAL="+c.setting)
				api.set(delaying(delay, patchOrList))
				api.lagWatches(delay)
			}
			job := newClient(startWeb(t, g.valkey.addr).url)
			d.heatStatus(t, 50*time.Millisecond)
			for round := range c.rounds {
				done := make(chan error, 2)
				for i, image := range g.images {
					go func() {
						time.Sleep(time.Duration(round*i) * 30 * time.Millisecond)
						done <- g.journal.push(t.Context(), job, image)
					}()
				}
				for range g.images {
					if err := <-done; err != nil {
						t.Fatal(err)
					}
				}
				lost := g.journal.waitDelivered(t, g.valkey, g.recorder, g.apps, c.within)
				time.Sleep(time.Second) // whoever comes late with an older T comes now
				lost = append(lost, g.journal.waitDelivered(t, g.valkey, g.recorder, g.apps, 0)...)
				if len(lost) > 0 {
					t.Errorf("round %d: %s", round+1, lost)
				}
			}
			g.verify(t, c.within)
		})
	}
}
