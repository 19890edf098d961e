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

// BenchmarkWorkerMemory justifies the memory of the worker in k8s/: the peak of
// its resident set in a cluster of 11,200 Deployments of 6 kB each. One request
// restarts 200 of them, then the worker has to list all of them anew from an API
// server that refuses to stream the list, and then all of them change. It fails
// if the peak exceeds the memory request, above which Go collects harder and harder.
//
//	go test -run '^$' -bench WorkerMemory -benchtime 1x
func BenchmarkWorkerMemory(b *testing.B) {
	const deployments, matching = 11_200, 200
	container := manifestContainer(b, "../k8s/50-worker.yaml", "worker")
	request := memoryOf(b, container, "requests")

	c := startCluster(b)
	image := newImage()
	large := largeDeployments(deployments, image, matching)
	c.createTeams(b)
	c.createLarge(b, large)
	valkey := startValkey(b)
	job := newClient(startWeb(b, valkey.addr).url)

	var peak int
	var ready time.Duration
	for b.Loop() {
		api := newAPIProxy(b, c.url)
		kubeconfig := user{name: "admin", token: adminToken}.kubeconfig(b, api.url)
		begun := time.Now()
		worker := launchWorker(b, programPath, valkey.addr, kubeconfig, "GOMEMLIMIT="+goMemLimit(b, container))
		worker.waitReady(b, 2*time.Minute)
		ready += time.Since(begun)
		listed := memoryKiB(b, worker, "VmHWM")
		c.restartAll(b, job, image, large[:matching])
		restarted := memoryKiB(b, worker, "VmHWM")

		pages := len(api.listed())
		api.set(anyOf(answering(422, "", isStreamedList), expiringOnce()))
		api.endWatches()
		eventually(b, 2*time.Minute, "the worker lists anew", func() error {
			if n := len(api.listed()) - pages; n == 0 || api.openWatches() == 0 {
				return fmt.Errorf("%d pages, %d watches", n, api.openWatches())
			}
			return nil
		})
		c.restartAll(b, job, image, large[:matching])
		relisted := memoryKiB(b, worker, "VmHWM")
		b.Logf("relisted with %d requests", len(api.listed())-pages)

		each(large, func(d deployment) { // a rollout of everything
			c.patch(b, d, fmt.Sprintf(`{"metadata":{"annotations":{"changed":%q}}}`, time.Now()))
		})
		changed := memoryKiB(b, worker, "VmHWM")
		b.Logf("peak after the list %d KiB, after the restarts %d KiB, after the relist %d KiB, after all have changed %d KiB",
			listed, restarted, relisted, changed)
		peak = max(peak, changed)
		worker.kill()
	}
	b.ReportMetric(float64(peak)/1024, "peak-MiB")
	b.ReportMetric(ready.Seconds()/float64(b.N), "ready-s")
	if int64(peak)<<10 > request {
		b.Errorf("the peak is %d KiB, and k8s/ requests %d", peak, request>>10)
	}
}

// goMemLimit is the value of GOMEMLIMIT in a container's environment, which may be
// its memory request.
func goMemLimit(b testing.TB, container map[string]any) string {
	b.Helper()
	env, _, _ := unstructured.NestedSlice(container, "env")
	for _, variable := range env {
		if v := variable.(map[string]any); v["name"] == "GOMEMLIMIT" {
			if value, ok := v["value"].(string); ok {
				return value
			}
			return fmt.Sprint(memoryOf(b, container, "requests"))
		}
	}
	b.Fatal("the container has no GOMEMLIMIT")
	return ""
}

// largeDeployments are so many Deployments for createLarge. Those below matching run the image.
func largeDeployments(deployments int, image string, matching int) (all []deployment) {
	for i := range deployments {
		d := deployment{namespace: fmt.Sprintf("team-%d", i%teams), name: fmt.Sprintf("application-%d", i), images: []string{newImage(), "ghcr.io/acme/sidecar:v1"}}
		if i < matching {
			d.images[0] = image
		}
		all = append(all, d)
	}
	return all
}

const teams = 40 // namespaces that large Deployments are in

// createTeams creates the namespaces of large Deployments.
func (c cluster) createTeams(b *testing.B) {
	b.Helper()
	for i := range teams {
		c.namespace(b, fmt.Sprintf("team-%d", i))
	}
}

// createLarge creates Deployments of 6 kB.
func (c cluster) createLarge(b *testing.B, all []deployment) {
	b.Helper()
	var env []any
	for i := range 30 {
		env = append(env, map[string]any{"name": fmt.Sprintf("A_SETTING_OF_THE_APPLICATION_%d", i), "value": strings.Repeat("x", 60)})
	}
	each(all, func(d deployment) {
		object := &unstructured.Unstructured{Object: d.object()}
		containers, _, _ := unstructured.NestedSlice(object.Object, "spec", "template", "spec", "containers")
		containers[0].(map[string]any)["env"] = env
		err := unstructured.SetNestedSlice(object.Object, containers, "spec", "template", "spec", "containers")
		if err == nil {
			_, err = c.admin.Resource(deploymentsResource).Namespace(d.namespace).Create(b.Context(), object, metav1.CreateOptions{})
		}
		if err != nil {
			b.Error(err)
		}
	})
	if b.Failed() {
		b.FailNow()
	}
}

// restartAll pushes the image and waits until all have been restarted.
func (c cluster) restartAll(b *testing.B, job *client, image string, all []deployment) {
	b.Helper()
	want := stamp(job.mustPush(b, image))
	for _, d := range all {
		eventually(b, 30*time.Second, d.key()+" is restarted", func() error {
			if at := restartedAt(c.get(b, d)); at != want {
				return fmt.Errorf("restartedAt is %q, want %s", at, want)
			}
			return nil
		})
	}
}

// each calls do for all Deployments, sixteen at a time.
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
