package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Nothing that was accepted is lost, and nothing restarts twice, whichever process
// is killed, stopped or replaced, and however many there are.

// rig is the setting of a delivery test: a Valkey, a namespace with Deployments and
// a recorder of what happens to them.
type rig struct {
	namespace string
	images    []string
	apps      []deployment
	valkey    *valkeyServer
	recorder  *recorder
	user      user
	journal   *journal
}

// newRig makes so many images and runs each in so many Deployments.
func newRig(t testing.TB, images, each int) *rig {
	t.Helper()
	return newRigOn(t, startValkey(t), images, each)
}

func newRigOn(t testing.TB, v *valkeyServer, images, each int) *rig {
	t.Helper()
	g := &rig{namespace: newNamespace(t), images: newImages(images), valkey: v}
	for i, image := range g.images {
		for j := range each {
			g.apps = append(g.apps, deployment{namespace: g.namespace, name: fmt.Sprintf("app-%d-%d", i, j), images: []string{image}})
		}
	}
	createAll(t, g.apps)
	g.recorder = record(t, g.namespace)
	g.user = newWorkerUser(t, g.namespace)
	g.journal = newJournal()
	return g
}

// launchWorker starts a worker for the rig's namespace. The API server and
// Valkey may be proxies; empty is the real one.
func (g *rig) launchWorker(t testing.TB, api, valkey string, settings ...string) *program {
	t.Helper()
	if api == "" {
		api = sharedAPI.url
	}
	if valkey == "" {
		valkey = g.valkey.addr
	}
	return launchWorker(t, programPath, valkey, g.user.kubeconfig(t, api), append([]string{"WORKER_NAMESPACES=" + g.namespace}, settings...)...)
}

func (g *rig) startWorker(t testing.TB, api, valkey string, settings ...string) *program {
	t.Helper()
	worker := g.launchWorker(t, api, valkey, settings...)
	worker.waitReady(t, 20*time.Second)
	return worker
}

func (g *rig) verify(t testing.TB, within time.Duration) {
	t.Helper()
	g.journal.verify(t, g.valkey, g.recorder, g.apps, within)
}

// TestWorkerKilled: the worker gets a SIGKILL 20 times during 500 requests for 50
// images of 200 Deployments.
func TestWorkerKilled(t *testing.T) {
	t.Parallel()
	g := newRig(t, 50, 4)
	c := newClient(startWeb(t, g.valkey.addr).url)
	worker := g.startWorker(t, "", "")
	for i := range 20 {
		wait := g.journal.pushMany(t.Context(), c, g.images, 25)
		time.Sleep(rand.N(250 * time.Millisecond))
		worker.kill()
		time.Sleep(rand.N(200 * time.Millisecond))
		worker = g.launchWorker(t, "", "")
		// Half of them are killed again while they start, half once they are ready.
		if i%2 == 0 {
			worker.waitReady(t, 20*time.Second)
		}
		if err := wait(); err != nil {
			t.Fatal(err)
		}
	}
	g.verify(t, 30*time.Second)
}

// TestValkeyKilled: Valkey gets a SIGKILL 20 times under the same load, and comes
// back with what it had on disk.
func TestValkeyKilled(t *testing.T) {
	t.Parallel()
	g := newRig(t, 50, 4)
	web := startWeb(t, g.valkey.addr)
	worker := g.startWorker(t, "", "")
	c := newClient(web.url)
	for i := range 20 {
		wait := g.journal.pushMany(t.Context(), c, g.images, 25)
		time.Sleep(rand.N(250 * time.Millisecond))
		g.valkey.kill()
		time.Sleep(rand.N(300 * time.Millisecond))
		g.valkey.start(t)
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			// Both reconnect by themselves, the worker without a request.
			web.waitReady(t, 5*time.Second)
			worker.waitReady(t, 5*time.Second)
		}
	}
	g.verify(t, 30*time.Second)
}

// TestAPIServerKilled: the worker's API server is killed three times. It is one of
// two on the same etcd; the recorder watches the other and sees every generation.
func TestAPIServerKilled(t *testing.T) {
	t.Parallel()
	second, err := startAPIServer(sharedAPI.bin, sharedEtcd, withoutServiceAccounts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { second.proc.kill() })
	g := newRig(t, 10, 2)
	c := newClient(startWeb(t, g.valkey.addr).url)
	worker := g.startWorker(t, second.url, "")
	for range 3 {
		wait := g.journal.pushMany(t.Context(), c, g.images, 40)
		time.Sleep(200 * time.Millisecond)
		second.proc.kill()
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		if err := second.start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(time.Second))
	}
	// Retries back off up to 15 s.
	g.verify(t, 75*time.Second)
	worker.waitReady(t, 5*time.Second)
}

// TestThreeWorkers: three workers, one of which is a second late with every patch.
// Each request costs one restart per Deployment, and of two requests a millisecond
// apart the newer stands.
func TestThreeWorkers(t *testing.T) {
	t.Parallel()
	g := newRig(t, 5, 4)
	c := newClient(startWeb(t, g.valkey.addr).url)
	slow := newAPIProxy(t, sharedAPI.url)
	slow.set(delaying(time.Second, everyPatch))
	g.startWorker(t, "", "")
	g.startWorker(t, "", "")
	g.startWorker(t, slow.url, "")

	for round := range 3 {
		var at []int64
		for _, image := range g.images {
			at = append(at, g.journal.pushOnce(t, c, image))
		}
		for i, d := range g.apps {
			g.recorder.waitRestartedAt(t, 10*time.Second, d, stamp(at[i/4]))
		}
		// Long enough for the slow worker's patches.
		time.Sleep(2 * time.Second)
		for _, d := range g.apps {
			if got := g.recorder.restarts(d); got != round+1 {
				t.Errorf("%s was restarted %d times for %d requests: %s", d.key(), got, round+1, describe(g.recorder.of(d)))
			}
		}
	}
	if seen := len(slow.patchesOf(g.apps[0])); seen == 0 {
		t.Error("the slow worker never tried to patch, so nothing was shown")
	}

	for range 20 {
		for _, image := range g.images {
			one := make(chan error, 1)
			go func() { one <- g.journal.push(t.Context(), c, image) }()
			time.Sleep(time.Millisecond)
			if err := g.journal.push(t.Context(), c, image); err != nil {
				t.Error(err)
			}
			if err := <-one; err != nil {
				t.Error(err)
			}
		}
	}
	g.verify(t, 30*time.Second)
}

// TestCrossingImages: requests for two images of one Deployment cross in three
// workers, and the newer stands.
func TestCrossingImages(t *testing.T) {
	t.Parallel()
	g := newRig(t, 0, 0)
	g.images = newImages(2)
	for i := range 5 {
		g.apps = append(g.apps, deployment{namespace: g.namespace, name: fmt.Sprint("app-", i), images: g.images})
	}
	createAll(t, g.apps)
	c := newClient(startWeb(t, g.valkey.addr).url)
	slow := newAPIProxy(t, sharedAPI.url)
	slow.set(delaying(300*time.Millisecond, everyPatch))
	g.startWorker(t, "", "")
	g.startWorker(t, "", "")
	g.startWorker(t, slow.url, "")
	for range 30 {
		done := make(chan error, 2)
		for _, image := range g.images {
			go func() { done <- g.journal.push(t.Context(), c, image) }()
		}
		for range g.images {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		time.Sleep(rand.N(100 * time.Millisecond))
	}
	g.verify(t, 30*time.Second)
}

// TestWebReplaced: web is replaced under load, as in a rolling update: the new one
// is ready, the Service sends to it, the old one gets its SIGTERM.
func TestWebReplaced(t *testing.T) {
	t.Parallel()
	g := newRig(t, 20, 2)
	g.startWorker(t, "", "")
	web := startWeb(t, g.valkey.addr)
	service := newTCPProxy(t, strings.TrimPrefix(web.url, "http://"))
	wait := g.journal.pushMany(t.Context(), newClient("http://"+service.addr), g.images, 400)
	for range 4 {
		next := startWeb(t, g.valkey.addr)
		service.retarget(strings.TrimPrefix(next.url, "http://"))
		time.Sleep(500 * time.Millisecond) // as preStop: connections that were being made arrive
		web.signal(syscall.SIGTERM)
		if code := web.exitCode(t, 15*time.Second); code != 0 {
			t.Errorf("web exited with %d after SIGTERM", code)
		}
		web = next
	}
	if err := wait(); err != nil {
		t.Error(err)
	}
	// wait fails for an answer that the workflow does not retry. Retries are in the
	// summary: on a busy machine, a connection may take longer than the pause above.
	g.verify(t, 15*time.Second)
}

// TestInFlightAtSIGTERM: a request that is waiting for Valkey when web is told
// to stop gets its answer.
func TestInFlightAtSIGTERM(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 1)
	g.startWorker(t, "", "")
	network := newTCPProxy(t, g.valkey.addr)
	web := startWeb(t, network.addr)
	c := newClient(web.url)
	network.set(stall)
	var a answer
	var err error
	var job sync.WaitGroup
	asked := time.Now()
	job.Go(func() { a, err = c.post(t.Context(), github.mint(asked, nil), imageBody(g.images[0])) })
	time.Sleep(300 * time.Millisecond)
	web.signal(syscall.SIGTERM)
	time.Sleep(500 * time.Millisecond)
	network.set(pass)
	job.Wait()
	if err != nil {
		t.Fatalf("the request in flight was not answered: %v", err)
	}
	_, at, err := a.accepted()
	if err != nil {
		t.Fatal(err)
	}
	g.journal.add(g.images[0], at, asked)
	g.journal.repeat(g.images[0], a.tries()-1)
	if code := web.exitCode(t, 10*time.Second); code != 0 {
		t.Errorf("web exited with %d", code)
	}
	g.verify(t, 10*time.Second)
}

// TestHandover: a worker that is stopped finishes the patches in flight, and the
// next worker does the rest.
func TestHandover(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 3)
	c := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)

	api.set(delaying(time.Second, everyPatch))
	worker := g.startWorker(t, api.url, "")
	at := g.journal.pushOnce(t, c, g.images[0])
	eventually(t, 5*time.Second, "all patches are under way", func() error {
		for _, d := range g.apps {
			if len(api.patchesOf(d)) == 0 {
				return fmt.Errorf("none for %s", d.key())
			}
		}
		return nil
	})
	worker.signal(syscall.SIGTERM)
	if code := worker.exitCode(t, 15*time.Second); code != 0 {
		t.Errorf("the worker exited with %d", code)
	}
	for _, d := range g.apps {
		if got := restartedAt(d.get(t)); got != stamp(at) {
			t.Errorf("%s: the patch in flight was cut off: restartedAt is %q, want %s", d.key(), got, stamp(at))
		}
	}

	api.set(answering(500, "", everyPatch))
	worker = g.startWorker(t, api.url, "")
	g.journal.pushOnce(t, c, g.images[0])
	eventually(t, 5*time.Second, "the worker has failed to patch", func() error {
		if n := len(api.patchesOf(g.apps[0])); n < 3 {
			return fmt.Errorf("%d tries", n)
		}
		return nil
	})
	worker.signal(syscall.SIGTERM)
	if code := worker.exitCode(t, 15*time.Second); code != 0 {
		t.Errorf("the worker exited with %d", code)
	}
	g.startWorker(t, "", "")
	g.verify(t, 10*time.Second)
}

// TestTenThousandInLedger: the catch-up of 10,000 images takes less than a second,
// and they do not slow down a request.
//
// Not parallel, because it measures.
func TestTenThousandInLedger(t *testing.T) {
	measure := func(images int) (start, event time.Duration) {
		g := newRig(t, 2, 1)
		now := g.valkey.now(t)
		command := []string{"ZADD", ledgerKey}
		for i := range images {
			command = append(command, fmt.Sprint(now-int64(i)*1000-1), fmt.Sprintf("ghcr.io/acme/e2e/old-%d:dev", i))
		}
		if images > 0 {
			g.valkey.must(t, command...)
		}
		c := newClient(startWeb(t, g.valkey.addr).url)
		at := g.journal.pushOnce(t, c, g.images[0]) // for catch-up to find
		begun := time.Now()
		g.startWorker(t, "", "")
		start = g.recorder.waitRestartedAt(t, 20*time.Second, g.apps[0], stamp(at)).seen.Sub(begun)
		var took []time.Duration
		for range 21 {
			token := github.mint(time.Now(), nil)
			begun := time.Now()
			a, err := c.post(t.Context(), token, imageBody(g.images[1]))
			if err != nil {
				t.Fatal(err)
			}
			_, at, err := a.accepted()
			if err != nil {
				t.Fatal(err)
			}
			g.journal.add(g.images[1], at, begun)
			took = append(took, g.recorder.waitRestartedAt(t, 10*time.Second, g.apps[1], stamp(at)).seen.Sub(begun))
		}
		slices.Sort(took)
		g.verify(t, 10*time.Second)
		return start, took[len(took)/2]
	}
	emptyStart, emptyEvent := measure(0)
	fullStart, fullEvent := measure(10000)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	fmt.Printf("%s: start of the worker to the restart it owed: %.0f ms with 1 image in the ledger, %.0f ms with 10,000; one request: %.1f ms and %.1f ms\n",
		t.Name(), ms(emptyStart), ms(fullStart), ms(emptyEvent), ms(fullEvent))
	bound := time.Second
	if raceDetecting {
		bound = 5 * time.Second // the race detector makes parsing ten times as dear
	}
	if fullStart-emptyStart > bound {
		t.Errorf("10,000 images in the ledger delay the catch-up by %s", fullStart-emptyStart)
	}
	if fullEvent > 4*emptyEvent+20*time.Millisecond {
		t.Errorf("a request takes %s with 10,000 images in the ledger, %s without", fullEvent, emptyEvent)
	}
}
