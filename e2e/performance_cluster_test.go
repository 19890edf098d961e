package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// grow adds Deployments until the cluster has so many. The first 200 and the first
// 1,000 share an image each, and every one has an image of its own.
func (p *performance) grow(b *testing.B, size int) {
	b.Helper()
	if len(p.deployments) == 0 {
		p.cluster.createTeams(b)
	}
	from := len(p.deployments)
	if from >= size {
		return
	}
	added := largeDeployments(size, "", 0)[from:]
	for i := range added {
		if from+i < 1000 {
			added[i].images = append(added[i].images, p.shared[1000])
		}
		if from+i < 200 {
			added[i].images = append(added[i].images, p.shared[200])
		}
	}
	begun := time.Now()
	p.cluster.createLarge(b, added)
	p.deployments = append(p.deployments, added...)
	b.Logf("%d Deployments were created in %s", len(added), time.Since(begun).Round(time.Second))
}

// startWorker starts a worker with the GOMEMLIMIT of k8s/, and waits until it is ready.
func (p *performance) startWorker(b *testing.B) *program {
	b.Helper()
	kubeconfig := user{name: "admin", token: adminToken}.kubeconfig(b, p.cluster.url)
	worker := launchWorker(b, programPath, p.valkey.addr, kubeconfig, "GOMEMLIMIT="+goMemLimit(b, manifestContainer(b, "../k8s/50-worker.yaml", "worker")))
	worker.waitReady(b, 10*time.Minute)
	return worker
}

// startBare starts the command of ./bare that does the least a web or a worker must do.
func (p *performance) startBare(b *testing.B, mode string, env ...string) *program {
	b.Helper()
	addr := fmt.Sprintf("127.0.0.1:%d", mustPort(b))
	proc, err := startProcess("bare "+mode, append(env, "ADDR="+addr, "API="+p.cluster.url, "TOKEN="+adminToken, "CA="+testCA.file), p.bare, mode)
	if err != nil {
		b.Fatal(err)
	}
	proc.ownedBy(b)
	bare := &program{proc, "http://" + addr, "http://" + addr}
	if mode != "list" {
		eventually(b, 20*time.Second, bare.name+" answers", func() error {
			_, _, err := bare.probe("/healthz")
			return err
		})
	}
	return bare
}

// watcher is a watch of all Deployments of which only the little is decoded that the
// benchmark needs, so that it takes as little as possible from what it measures.
type watcher struct {
	mu      sync.Mutex
	seen    map[string]version
	version string          // the newest of all
	pending map[string]bool // keys of those whose next restart is awaited
	done    chan time.Time  // when none was pending any more
	broken  error
	stop    context.CancelFunc
}

// version is of one Deployment.
type version struct{ uid, resourceVersion, restartedAt string }

func (p *performance) watch(b *testing.B) *watcher {
	b.Helper()
	client, err := rest.HTTPClientFor(p.cluster.config(adminToken))
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(b.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.cluster.url+"/apis/apps/v1/deployments?watch=1", nil)
	if err != nil {
		b.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	w := &watcher{seen: map[string]version{}, stop: stop}
	go w.read(resp.Body)
	eventually(b, time.Minute, "the watch has seen all Deployments", func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.seen) < len(p.deployments) {
			return fmt.Errorf("%d of %d: %w", len(w.seen), len(p.deployments), w.broken)
		}
		return nil
	})
	return w
}

func (w *watcher) read(stream io.Reader) {
	lines := bufio.NewReaderSize(stream, 1<<20)
	for {
		line, err := lines.ReadSlice('\n')
		w.mu.Lock()
		if err != nil {
			w.broken = fmt.Errorf("the watch ended: %w", err)
			w.mu.Unlock()
			return
		}
		w.event(line)
		w.mu.Unlock()
	}
}

// event relies on the order in which the API server writes the metadata.
func (w *watcher) event(line []byte) {
	_, metadata, _ := bytes.Cut(line, []byte(`"metadata":{`))
	member := func(name string) string {
		_, value, _ := bytes.Cut(metadata, []byte(`"`+name+`":"`))
		value, _, _ = bytes.Cut(value, []byte(`"`))
		return string(value)
	}
	key := member("namespace") + "/" + member("name")
	v := version{member("uid"), member("resourceVersion"), member(restartedAtKey)}
	if w.pending[key] && v.restartedAt != w.seen[key].restartedAt {
		if delete(w.pending, key); len(w.pending) == 0 {
			w.done <- time.Now()
		}
	}
	w.seen[key], w.version = v, v.resourceVersion
}

// time is how long it takes from act until the restart of all Deployments is seen.
func (w *watcher) time(b *testing.B, all []deployment, act func()) time.Duration {
	b.Helper()
	w.mu.Lock()
	w.pending, w.done = map[string]bool{}, make(chan time.Time, 1)
	for _, d := range all {
		w.pending[d.key()] = true
	}
	w.mu.Unlock()
	begun := time.Now()
	act()
	select {
	case at := <-w.done:
		return at.Sub(begun)
	case <-time.After(2 * time.Minute):
		w.mu.Lock()
		defer w.mu.Unlock()
		b.Fatalf("%d of %d Deployments are not restarted: %v", len(w.pending), len(all), w.broken)
		return 0
	}
}

// newest is the version from which another watch goes on.
func (w *watcher) newest() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.version
}

// restart is the worker's merge patch.
func (w *watcher) restart(d deployment) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.seen[d.key()]
	return fmt.Sprintf(`{"metadata":{"resourceVersion":%q,"uid":%q},"spec":{"template":{"metadata":{"annotations":{%q:%q}}}}}`,
		v.resourceVersion, v.uid, restartedAtKey, time.Now().UTC().Format(ourStamp))
}

// postMeasurements time a request for an image that one Deployment runs, against one
// POST to a server that does nothing and one PATCH.
func postMeasurements(size int) (all []measurement) {
	for _, tags := range []int{1, 4} {
		name := fmt.Sprintf("post-to-patched/%d/%d", size, tags)
		all = append(all, measurement{name, func(b *testing.B, p *performance) []row {
			ours, bare := p.postToPatched(b, size, tags)
			r := p.compare(name, fmt.Sprintf("POST to patched, %s Deployments, %s", thousands(size), plural(tags, "tag")), ours, bare, 1.5)
			if tags == 1 {
				p.posted[size] = r.ratio
			}
			return []row{r}
		}})
	}
	return all
}

func (p *performance) postToPatched(b *testing.B, size, tags int) (ours, bare times) {
	p.grow(b, size)
	w, d, worker := p.watch(b), p.deployments[size-1], p.startWorker(b)
	defer w.stop()
	defer worker.kill()
	image, tag, _ := strings.Cut(d.images[0], ":")
	var list []string
	for i := range tags - 1 {
		list = append(list, fmt.Sprintf("%s-%d", tag, i)) // which nothing runs
	}
	body := asJSON(map[string]any{"image": image, "tags": append(list, tag)})
	token, client := github.mint(time.Now(), nil), p.cluster.admin.Resource(deploymentsResource).Namespace(d.namespace)
	for range p.rounds(200) {
		ours = append(ours, w.time(b, []deployment{d}, func() { mustPost(b, p.web.url, "/event", token, body) }))
		bare = append(bare, w.time(b, []deployment{d}, func() {
			mustPost(b, p.bareWeb.url, "/nothing", token, body)
			if _, err := client.Patch(b.Context(), d.name, types.MergePatchType, []byte(w.restart(d)), metav1.PatchOptions{}); err != nil {
				b.Fatal(err)
			}
		}))
	}
	return ours, bare
}

// growth compares the ratio in the largest cluster with that in the smallest. The times
// were not measured in turns, and the machine may have become slower meanwhile.
func growth(b *testing.B, p *performance) []row {
	small, large := p.posted[10], p.posted[11_200]
	if small == 0 || large == 0 {
		b.Skip("it needs post-to-patched/10/1 and post-to-patched/11200/1")
	}
	return []row{{name: "post-to-patched/growth", what: "POST to patched, 11,200 Deployments against 10",
		measured: ratioText(large) + " × its limit", limit: ratioText(small) + " × its limit", ratio: large / small, bar: 1.2}}
}

// fanOutMeasurement times a request for an image that many Deployments run, against
// the same PATCHes sent by a process that does nothing else but drain a watch, as the
// worker must. Only one of the two processes runs at a time.
func fanOutMeasurement(matching int) measurement {
	name := fmt.Sprintf("fan-out/%d", matching)
	return measurement{name, func(b *testing.B, p *performance) []row {
		ours, bare := p.fanOut(b, matching)
		return []row{p.compare(name, fmt.Sprintf("Fan-out to %s Deployments", thousands(matching)), ours, bare, 1.15)}
	}}
}

func (p *performance) fanOut(b *testing.B, matching int) (ours, bare times) {
	p.grow(b, 1000)
	w, all := p.watch(b), p.deployments[:matching]
	defer w.stop()
	for range p.rounds(7) {
		worker := p.startWorker(b)
		token := github.mint(time.Now(), nil)
		ours = append(ours, w.time(b, all, func() { mustPost(b, p.web.url, "/event", token, imageBody(p.shared[matching])) }))
		worker.kill()

		patcher := p.startBare(b, "worker", "SINCE="+w.newest())
		var patches []map[string]string
		for _, d := range all {
			patches = append(patches, map[string]string{"Namespace": d.namespace, "Name": d.name, "Body": w.restart(d)})
		}
		bare = append(bare, w.time(b, all, func() { mustPost(b, patcher.url, "/patch", token, asJSON(patches)) }))
		patcher.kill()
	}
	return ours, bare
}

// workerMeasurement times the start of a worker until it is ready, against a process
// that lists and decodes the same. The peak memory includes 200 restarts.
func workerMeasurement(size, rounds int) measurement {
	name := fmt.Sprintf("worker/%d", size)
	bars := map[int]int{11_200: 64, 50_000: 200} // MiB
	return measurement{name, func(b *testing.B, p *performance) []row {
		p.grow(b, size)
		var ours, bare times
		peak := 0
		for range rounds {
			begun := time.Now()
			worker := p.startWorker(b)
			ours = append(ours, time.Since(begun))
			mustPost(b, p.web.url, "/event", github.mint(time.Now(), nil), imageBody(p.shared[200]))
			eventually(b, time.Minute, "the worker restarts 200 Deployments", func() error {
				if n := len(worker.logged(b, "msg", "restarted")); n < 200 {
					return fmt.Errorf("%d restarts", n)
				}
				return nil
			})
			peak = max(peak, memoryKiB(b, worker, "VmHWM"))
			worker.kill()

			begun = time.Now()
			list := p.startBare(b, "list")
			if code := list.exitCode(b, 10*time.Minute); code != 0 || strings.TrimSpace(list.stdout.String()) != fmt.Sprint(size) {
				b.Fatalf("bare list exited with %d: %s%s", code, list.stdout.String(), list.stderr.String())
			}
			bare = append(bare, time.Since(begun))
		}
		ready := p.compare(name+"/ready", fmt.Sprintf("worker, start to ready, %s Deployments", thousands(size)), ours, bare, 1.5)
		return []row{ready, memoryRow(name+"/memory", fmt.Sprintf("worker, peak memory, %s Deployments", thousands(size)), peak, bars[size]<<10)}
	}}
}

// mustPost sends one request, with a connection of its own, and wants a 2xx.
func mustPost(b *testing.B, url, path, token, body string) {
	b.Helper()
	a, err := newClient(url).send(b.Context(), http.MethodPost, path, token, body)
	if err != nil || a.status/100 != 2 {
		b.Fatalf("POST %s: %d %s %v", path, a.status, a.body, err)
	}
}

// thousands is n as prose has it.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
