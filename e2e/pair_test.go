package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// pair is a Valkey, a web and a worker with a namespace of their own.
type pair struct {
	namespace  string
	valkey     *valkeyServer
	web        *program
	worker     *program
	client     *client
	kubeconfig string
}

// startPair starts all of it. The worker sees its namespace alone, with the
// Role it needs there, unless settings say otherwise.
func startPair(t testing.TB, settings ...string) *pair {
	t.Helper()
	p := &pair{namespace: newNamespace(t), valkey: startValkey(t)}
	p.kubeconfig = newWorkerUser(t, p.namespace).kubeconfig(t, sharedAPI.url)
	p.web = startWeb(t, p.valkey.addr)
	p.worker = startWorker(t, p.valkey.addr, p.kubeconfig, append([]string{"WORKER_NAMESPACES=" + p.namespace}, settings...)...)
	p.client = newClient(p.web.url)
	return p
}

// app is a Deployment named after its place in a test.
func (p *pair) app(name string, images ...string) deployment {
	return deployment{namespace: p.namespace, name: name, images: images}
}

// TestOneEvent is the product in one test, with all that the patch does to the
// Deployment.
func TestOneEvent(t *testing.T) {
	p := startPair(t)
	image := newImage()
	d := p.app("api", image)
	d.labels = map[string]string{"team": "a"}
	d.restartedAt = "2020-01-01T00:00:00Z" // as kubectl rollout restart leaves it
	other := p.app("other", newImage())
	before, otherBefore := d.create(t), other.create(t)
	r := record(t, p.namespace)

	a, err := p.client.post(t.Context(), github.mint(time.Now(), nil), imageBody(image))
	if err != nil {
		t.Fatal(err)
	}
	body, at, err := a.accepted()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(body.Images, []string{image}) || *body.Subscribers != 1 {
		t.Errorf("the answer is %s, want the image and one subscriber", a.body)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("the answer's Content-Type is %q", got)
	}
	if now := p.valkey.now(t); at > now || at < now-10e6 {
		t.Errorf("T is %s, and Valkey's clock says %s", stamp(at), stamp(now))
	}
	if got := p.valkey.requestedAt(t, image); got != at {
		t.Errorf("the ledger has %s, want T = %s", stamp(got), stamp(at))
	}
	r.waitRestartedAt(t, 10*time.Second, d, stamp(at))

	line := p.worker.waitLogged(t, 5*time.Second, "msg", "restarted", "deployment", d.name)
	if !line.is("level", "INFO", "cluster", "default", "namespace", d.namespace, "image", image, "requested_at", stamp(at)) {
		t.Errorf("the log line of the restart is %v", line)
	}

	// Nothing changes but the annotation and what the API server itself counts.
	after := d.get(t)
	if got, want := after.GetGeneration(), before.GetGeneration()+1; got != want {
		t.Errorf("generation is %d, want %d", got, want)
	}
	var managers []string
	for _, entry := range after.GetManagedFields() {
		if entry.Manager == "e2e" {
			continue
		}
		managers = append(managers, entry.Manager)
		const fields = `{"f:spec":{"f:template":{"f:metadata":{"f:annotations":{"f:kubectl.kubernetes.io/restartedAt":{}}}}}}`
		if got := entry.FieldsV1.GetRawString(); got != fields || entry.Operation != "Update" {
			t.Errorf("manager %s made an %s of %s, want an Update of %s", entry.Manager, entry.Operation, got, fields)
		}
	}
	if !slices.Equal(managers, []string{"kuberollouttrigger"}) {
		t.Errorf("the managers besides the creator are %q, want kuberollouttrigger", managers)
	}
	for _, object := range []*unstructured.Unstructured{before, after} {
		for _, counted := range []string{"resourceVersion", "generation", "managedFields"} {
			unstructured.RemoveNestedField(object.Object, "metadata", counted)
		}
	}
	if err := unstructured.SetNestedField(before.Object, stamp(at), "spec", "template", "metadata", "annotations", restartedAtKey); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(before.Object, after.Object) {
		t.Errorf("the patch changed more than restartedAt:\nbefore %s\nafter  %s", asJSON(before.Object), asJSON(after.Object))
	}
	if now := other.get(t); now.GetResourceVersion() != otherBefore.GetResourceVersion() {
		t.Error("a Deployment with another image was touched")
	}
}

func asJSON(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

// TestSeveralTags: the tags of one push share one T and restart each Deployment
// once. A bad one among them refuses all.
func TestSeveralTags(t *testing.T) {
	p := startPair(t)
	repository := newRepository()
	first, second, both := p.app("first", repository+":v1.2.3"), p.app("second", repository+":v1"), p.app("both", repository+":v1.2.3")
	both.initImages = []string{repository + ":v1"}
	untouched := p.app("untouched", repository+":v2")
	createAll(t, []deployment{first, second, both, untouched})
	r := record(t, p.namespace)

	a, err := p.client.post(t.Context(), github.mint(time.Now(), nil), fmt.Sprintf(`{"image":%q,"tags":["v1.2.3","v1.2","v1"]}`, repository))
	if err != nil {
		t.Fatal(err)
	}
	body, at, err := a.accepted()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{repository + ":v1.2.3", repository + ":v1.2", repository + ":v1"}
	if !slices.Equal(body.Images, want) {
		t.Errorf("accepted %q, want %q", body.Images, want)
	}
	for _, image := range want {
		if got := p.valkey.requestedAt(t, image); got != at {
			t.Errorf("the ledger has %s at %s, want the one T, %s", image, stamp(got), stamp(at))
		}
	}
	for _, d := range []deployment{first, second, both} {
		r.waitRestartedAt(t, 10*time.Second, d, stamp(at))
	}
	time.Sleep(500 * time.Millisecond)
	for d, want := range map[string]int{"first": 1, "second": 1, "both": 1, "untouched": 0} {
		if got := r.restarts(p.app(d)); got != want {
			t.Errorf("%s was restarted %d times, want %d", d, got, want)
		}
	}

	// A bad tag among good ones: refused, and nothing enters the ledger.
	before := asJSON(ledgerOf(t, p.valkey))
	for name, bad := range map[string]string{
		"a bad tag":     fmt.Sprintf(`{"image":%q,"tags":["v1.2.3","v1","not a tag"]}`, repository),
		"an empty tag":  fmt.Sprintf(`{"image":%q,"tags":["v1.2.3",""]}`, repository),
		"a digest":      fmt.Sprintf(`{"image":%q}`, repository+"@sha256:"+strings.Repeat("0", 64)),
		"no tag":        fmt.Sprintf(`{"image":%q}`, repository),
		"no tags":       fmt.Sprintf(`{"image":%q,"tags":[]}`, repository),
		"a doubled key": fmt.Sprintf(`{"image":%q,"image":%q}`, want[0], want[1]),
		"another case":  fmt.Sprintf(`{"IMAGE":%q}`, want[0]),
		"more data":     imageBody(want[0]) + imageBody(want[1]),
		"path segments": imageBody("ghcr.io/acme/../../evil:dev"),
	} {
		a, err := p.client.post(t.Context(), github.mint(time.Now(), nil), bad)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var said struct{ Error string }
		if err := json.Unmarshal([]byte(a.body), &said); a.status != http.StatusBadRequest || err != nil || said.Error == "" {
			t.Errorf(`%s: answered %d %s, want 400 {"error":…}`, name, a.status, a.body)
		}
	}
	if after := asJSON(ledgerOf(t, p.valkey)); after != before {
		t.Errorf("refused requests changed the ledger:\nbefore %s\nafter  %s", before, after)
	}
	time.Sleep(300 * time.Millisecond)
	if got := r.restarts(first) + r.restarts(second) + r.restarts(both); got != 3 {
		t.Errorf("%d restarts in all, want the 3 of the good request", got)
	}
}

// ledgerOf is the whole ledger.
func ledgerOf(t testing.TB, v *valkeyServer) map[string]float64 {
	t.Helper()
	scores, err := v.must(t, "ZRANGE", ledgerKey, "0", "-1", "WITHSCORES").AsZScores()
	if err != nil {
		t.Fatal(err)
	}
	set := map[string]float64{}
	for _, one := range scores {
		set[one.Member] = one.Score
	}
	return set
}

// TestWhereImagesAre: every field of a pod template that names an image counts, and
// every way to write the same image.
func TestWhereImagesAre(t *testing.T) {
	p := startPair(t, "ALLOWED_IMAGE_PREFIX=ghcr.io/acme,docker.io/library")
	web := startWeb(t, p.valkey.addr, "ALLOWED_IMAGE_PREFIX=ghcr.io/acme,docker.io/library")
	c := newClient(web.url)
	image, sidecar := newImage(), newImage()
	short := "nginx-" + p.namespace // docker.io/library/…:latest

	inContainer, inSecond := p.app("container", image), p.app("second", sidecar, image)
	inInit, inVolume := p.app("init", sidecar), p.app("volume", sidecar)
	inInit.initImages, inVolume.volumeImages = []string{image}, []string{image}
	shortName := p.app("short", short)
	pinned := p.app("pinned", image+"@sha256:"+strings.Repeat("a", 64))
	createAll(t, []deployment{inContainer, inSecond, inInit, inVolume, pinned, shortName})
	r := record(t, p.namespace)

	// Once the last of them has restarted, the worker knows all.
	full := "docker.io/library/" + short + ":latest"
	at := c.mustPush(t, full)
	r.waitRestartedAt(t, 10*time.Second, shortName, stamp(at))

	at = c.mustPush(t, image)
	for _, d := range []deployment{inContainer, inSecond, inInit, inVolume} {
		r.waitRestartedAt(t, 10*time.Second, d, stamp(at))
	}
	p.worker.waitLogged(t, 5*time.Second, "msg", "not restarted", "deployment", pinned.name, "reason", "pinned by digest")

	for _, d := range []deployment{inContainer, inSecond, inInit, inVolume, shortName} {
		if got := r.restarts(d); got != 1 {
			t.Errorf("%s was restarted %d times, want once", d.key(), got)
		}
	}
	if r.restarts(pinned) != 0 {
		t.Error("a Deployment pinned by digest was restarted")
	}
}

// TestPausedIsNotRestarted: see TestPausedAcrossRequest for what happens when it is
// resumed.
func TestPausedIsNotRestarted(t *testing.T) {
	p := startPair(t)
	image := newImage()
	paused, running := p.app("paused", image), p.app("running", image)
	paused.paused = true
	createAll(t, []deployment{paused, running})
	r := record(t, p.namespace)

	at := p.client.mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, running, stamp(at))
	p.worker.waitLogged(t, 5*time.Second, "msg", "not restarted", "namespace", p.namespace, "deployment", paused.name, "reason", "paused")
	r.mustNotChange(t, paused, 500*time.Millisecond)
}

// TestPullPolicyWarning: a Deployment whose nodes may not pull the image restarts
// with a warning.
func TestPullPolicyWarning(t *testing.T) {
	p := startPair(t)
	image := newImage()
	cached, always := p.app("cached", image), p.app("always", image)
	cached.pullPolicy = "IfNotPresent"
	createAll(t, []deployment{cached, always})
	r := record(t, p.namespace)

	at := p.client.mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, cached, stamp(at))
	r.waitRestartedAt(t, 10*time.Second, always, stamp(at))
	line := p.worker.waitLogged(t, 5*time.Second, "msg", "restarted", "deployment", cached.name)
	if line.str("level") != "WARN" || !strings.Contains(line.str("warning"), "imagePullPolicy") {
		t.Errorf("the line about a pull policy of IfNotPresent is %v, want level WARN and a warning that names imagePullPolicy", line)
	}
	if line := p.worker.waitLogged(t, 5*time.Second, "msg", "restarted", "deployment", always.name); line.str("level") != "INFO" || line.str("warning") != "" {
		t.Errorf("the line about a pull policy of Always is %v, want level INFO and no warning", line)
	}
}

// TestLatency measures from the first byte of the POST until a watch shows the
// patched Deployment, with fsync at every write. The bar is a median of 10 ms on a
// quiet machine. The bound here catches a poll or a rate limit, and holds on a busy
// machine.
func TestLatency(t *testing.T) {
	p := startPair(t)
	image := newImage()
	d := p.app("api", image)
	d.create(t)
	createAll(t, []deployment{p.app("b", newImage()), p.app("c", newImage())})
	r := record(t, p.namespace)
	p.client.http.Transport = &http.Transport{} // the connection is not what is measured

	var took, posted []time.Duration
	for range 45 {
		token := github.mint(time.Now(), nil)
		begun := time.Now()
		a, err := p.client.post(t.Context(), token, imageBody(image))
		if err != nil {
			t.Fatal(err)
		}
		_, at, err := a.accepted()
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, r.waitRestartedAt(t, 5*time.Second, d, stamp(at)).seen.Sub(begun))
		posted = append(posted, a.took)
		time.Sleep(20 * time.Millisecond)
	}
	took, posted = took[5:], posted[5:] // the first ones open connections
	slices.Sort(took)
	slices.Sort(posted)
	median := took[len(took)/2]
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	fmt.Printf("%s: POST to patched Deployment: median %.1f ms, 90%% %.1f ms, worst %.1f ms; POST alone: median %.1f ms (n=%d)\n",
		t.Name(), ms(median), ms(took[len(took)*9/10]), ms(took[len(took)-1]), ms(posted[len(posted)/2]), len(took))
	if median > 100*time.Millisecond {
		t.Errorf("the median is %s", median)
	}
}
