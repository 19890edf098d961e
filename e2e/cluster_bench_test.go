package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// BenchmarkWorkerMemory is what the memory of worker in k8s/ rests on: the peak
// of its resident set in a cluster of 11,200 Deployments of 6 kB each, 200 of
// which one event restarts, and then all of which change. It fails if that is
// more than the request, above which Go collects harder and harder.
//
//	go test -run '^$' -bench WorkerMemory -benchtime 1x
func BenchmarkWorkerMemory(b *testing.B) {
	const deployments, matching = 11_200, 200
	container := manifestContainer(b, "../k8s/50-worker.yaml", "worker")
	request := memoryOf(b, container, "requests")

	c := startCluster(b)
	image := newImage()
	var large []deployment
	for i := range deployments {
		d := deployment{namespace: fmt.Sprintf("team-%d", i%40), name: fmt.Sprintf("application-%d", i), images: []string{newImage(), "ghcr.io/acme/sidecar:v1"}}
		if i < matching {
			d.images[0] = image
		}
		large = append(large, d)
	}
	for i := range 40 {
		c.namespace(b, fmt.Sprintf("team-%d", i))
	}
	each(large, func(d deployment) {
		object := &unstructured.Unstructured{Object: d.object()}
		containers, _, _ := unstructured.NestedSlice(object.Object, "spec", "template", "spec", "containers")
		var env []any
		for i := range 30 {
			env = append(env, map[string]any{"name": fmt.Sprintf("A_SETTING_OF_THE_APPLICATION_%d", i), "value": strings.Repeat("x", 60)})
		}
		containers[0].(map[string]any)["env"] = env
		if err := unstructured.SetNestedSlice(object.Object, containers, "spec", "template", "spec", "containers"); err != nil {
			b.Error(err)
			return
		}
		if _, err := c.admin.Resource(deploymentsResource).Namespace(d.namespace).Create(b.Context(), object, metav1.CreateOptions{}); err != nil {
			b.Error(err)
		}
	})
	if b.Failed() {
		return
	}
	valkey := startValkey(b)
	job := newClient(startWeb(b, valkey.addr).url)
	kubeconfig := user{name: "admin", token: adminToken}.kubeconfig(b, c.url)

	var peak int
	var ready time.Duration
	for b.Loop() {
		begun := time.Now()
		worker := launchWorker(b, programPath, valkey.addr, kubeconfig, fmt.Sprintf("GOMEMLIMIT=%d", request))
		worker.waitReady(b, 2*time.Minute)
		ready += time.Since(begun)
		listed := memoryKiB(b, worker, "VmHWM")
		want := stamp(job.mustPush(b, image))
		for _, d := range large[:matching] {
			eventually(b, 30*time.Second, d.key()+" is restarted", func() error {
				if at := restartedAt(c.get(b, d)); at != want {
					return fmt.Errorf("restartedAt is %q, want %s", at, want)
				}
				return nil
			})
		}
		restarted := memoryKiB(b, worker, "VmHWM")
		// A rollout of everything.
		each(large, func(d deployment) {
			c.patch(b, d, fmt.Sprintf(`{"metadata":{"annotations":{"changed":%q}}}`, time.Now()))
		})
		changed := memoryKiB(b, worker, "VmHWM")
		b.Logf("peak after the list %d KiB, after the restarts %d KiB, after all have changed %d KiB", listed, restarted, changed)
		peak = max(peak, changed)
		worker.kill()
	}
	b.ReportMetric(float64(peak)/1024, "peak-MiB")
	b.ReportMetric(ready.Seconds()/float64(b.N), "ready-s")
	if int64(peak)<<10 > request {
		b.Errorf("the peak is %d KiB, and k8s/ requests %d", peak, request>>10)
	}
}

// each does something with all Deployments, sixteen at a time.
func each(all []deployment, do func(deployment)) {
	work := make(chan deployment)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for d := range work {
				do(d)
			}
		})
	}
	for _, d := range all {
		work <- d
	}
	close(work)
	wg.Wait()
}
