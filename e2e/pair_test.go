package e2e

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// pair is a Valkey, a web and a worker with one namespace of its own.
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

// TestOneEvent is the product in one test, and what the patch does to the
// Deployment, to the last member.
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
	if record := p.valkey.requestedAt(t, image); record != at {
		t.Errorf("%s is recorded in Valkey, want T = %s", stamp(record), stamp(at))
	}
	r.waitRestartedAt(t, 10*time.Second, d, stamp(at))

	line := p.worker.waitLogged(t, 5*time.Second, "msg", "restarted", "deployment", d.name)
	if !line.is("level", "INFO", "cluster", "default", "namespace", d.namespace, "image", image, "requested_at", stamp(at)) {
		t.Errorf("the log line of the restart is %v", line)
	}

	// Nothing but the annotation, and what the API server itself keeps count of.
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

// TestSeveralTags: the tags of one push are one request: one T for all, each
// Deployment once, and all or nothing.
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
			t.Errorf("%s is recorded at %s, want the one T, %s", image, stamp(got), stamp(at))
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

	// A bad one among good ones: refused, and none of it is on record.
	before := asJSON(recordOf(t, p.valkey))
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
	if after := asJSON(recordOf(t, p.valkey)); after != before {
		t.Errorf("refused requests left something on record:\nbefore %s\nafter  %s", before, after)
	}
	time.Sleep(300 * time.Millisecond)
	if got := r.restarts(first) + r.restarts(second) + r.restarts(both); got != 3 {
		t.Errorf("%d restarts in all, want the 3 of the good request", got)
	}
}

// recordOf is the whole sorted set.
func recordOf(t testing.TB, v *valkeyServer) map[string]float64 {
	t.Helper()
	scores, err := v.must(t, "ZRANGE", recorded, "0", "-1", "WITHSCORES").AsZScores()
	if err != nil {
		t.Fatal(err)
	}
	set := map[string]float64{}
	for _, one := range scores {
		set[one.Member] = one.Score
	}
	return set
}

// TestWhereImagesAre: every field of a pod template that names an image, and
// every way to write the same one.
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

	// Once the last of them is restarted, worker knows them all.
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

// TestNamespacedScope: WORKER_NAMESPACES with a Role in each is enough, and
// nothing outside them is touched.
func TestNamespacedScope(t *testing.T) {
	v := startValkey(t)
	one, two, outside := newNamespace(t), newNamespace(t), newNamespace(t)
	image := newImage()
	inOne, inTwo := deployment{namespace: one, name: "api", images: []string{image}}, deployment{namespace: two, name: "api", images: []string{image}}
	beyond := deployment{namespace: outside, name: "api", images: []string{image}}
	createAll(t, []deployment{inOne, inTwo, beyond})
	r := record(t, one, two, outside)
	startWorker(t, v.addr, newWorkerUser(t, one, two).kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+one+","+two)
	c := newClient(startWeb(t, v.addr).url)

	at := c.mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, inOne, stamp(at))
	r.waitRestartedAt(t, 10*time.Second, inTwo, stamp(at))
	r.mustNotChange(t, beyond, 500*time.Millisecond)
}

// TestWholeCluster: the default scope, with a ClusterRole.
func TestWholeCluster(t *testing.T) {
	v := startValkey(t)
	one, two := newNamespace(t), newNamespace(t)
	image := newImage()
	inOne, inTwo := deployment{namespace: one, name: "api", images: []string{image}}, deployment{namespace: two, name: "api", images: []string{image}}
	createAll(t, []deployment{inOne, inTwo})
	r := record(t, one, two)
	startWorker(t, v.addr, newWorkerUser(t).kubeconfig(t, sharedAPI.url))
	at := newClient(startWeb(t, v.addr).url).mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, inOne, stamp(at))
	r.waitRestartedAt(t, 10*time.Second, inTwo, stamp(at))
}

// TestSelector: many workloads share one image, and only some should restart.
func TestSelector(t *testing.T) {
	p := startPair(t, "WORKER_SELECTOR=rollout=auto,tier!=db")
	image := newImage()
	chosen, plain, db := p.app("chosen", image), p.app("plain", image), p.app("db", image)
	chosen.labels = map[string]string{"rollout": "auto"}
	db.labels = map[string]string{"rollout": "auto", "tier": "db"}
	createAll(t, []deployment{chosen, plain, db})
	r := record(t, p.namespace)

	at := p.client.mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, chosen, stamp(at))
	r.mustNotChange(t, plain, 500*time.Millisecond)
	r.mustNotChange(t, db, 0)
}

// TestPausedIsNotRestarted; what happens when it is resumed is in
// TestPausedAcrossEvent.
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

// TestPullPolicyWarning: restarted, with a warning that the node may not pull.
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

// TestForbiddenScope: what the worker may not see is an error at once, with all
// that is needed to mend the Role.
func TestForbiddenScope(t *testing.T) {
	v := startValkey(t)
	allowed, forbidden := newNamespace(t), newNamespace(t)
	for _, c := range []struct {
		name       string
		user       func(*testing.T) user
		namespaces string
		names      string
	}{
		{"one of two namespaces", func(t *testing.T) user { return newWorkerUser(t, allowed) }, allowed + "," + forbidden, `(list|watch) deployments\.apps in namespace ` + forbidden},
		{"the whole cluster", func(t *testing.T) user { return newWorkerUser(t, allowed) }, "", `(list|watch) deployments\.apps in all namespaces`},
		{"no watch", func(t *testing.T) user {
			u := newUser(t)
			u.grant(t, []string{"list", "patch"}, allowed)
			return u
		}, allowed, `watch deployments\.apps in namespace ` + allowed},
	} {
		t.Run(c.name, func(t *testing.T) {
			worker := launchWorker(t, programPath, v.addr, c.user(t).kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+c.namespaces)
			if code := worker.exitCode(t, 15*time.Second); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			lines := strings.Split(strings.TrimSpace(worker.stderr.String()), "\n")
			if last := lines[len(lines)-1]; !regexp.MustCompile(c.names + `\b`).MatchString(last) {
				t.Errorf("the last line does not say %s: %s", c.names, last)
			}
		})
	}
}

// TestPatchForbidden: a Role without patch is noticed when it is needed; the
// request is not given up, and mending the Role is enough.
func TestPatchForbidden(t *testing.T) {
	t.Parallel()
	v, namespace := startValkey(t), newNamespace(t)
	d := deployment{namespace: namespace, name: "api", images: []string{newImage()}}
	d.create(t)
	r := record(t, namespace)
	u := newUser(t)
	u.grant(t, []string{"list", "watch"}, namespace)
	worker := startWorker(t, v.addr, u.kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+namespace)
	at := newClient(startWeb(t, v.addr).url).mustPush(t, d.images[0])
	eventually(t, 5*time.Second, "the log says that patch is forbidden", func() error {
		for _, line := range worker.logs(t) {
			if line.str("level") != "INFO" && strings.Contains(line.str("err"), "cannot patch") {
				return nil
			}
		}
		return errors.New(worker.stderr.tail(10))
	})
	u.grant(t, []string{"patch"}, namespace)
	r.waitRestartedAt(t, 60*time.Second, d, stamp(at))
}

// TestMissingConfig: one message that names all that is missing, exit code 2.
func TestMissingConfig(t *testing.T) {
	for mode, names := range map[string][]string{
		"web":    {"VALKEY_ADDR", "--valkey-addr", "ALLOWED_IMAGE_PREFIX", "--allowed-image-prefix", "GITHUB_OIDC_AUDIENCE", "GITHUB_ALLOWED_ORG"},
		"worker": {"VALKEY_ADDR", "--valkey-addr", "ALLOWED_IMAGE_PREFIX", "--allowed-image-prefix"},
	} {
		t.Run(mode, func(t *testing.T) {
			p := launch(t, programPath, mode)
			if code := p.exitCode(t, 10*time.Second); code != 2 {
				t.Errorf("exit code %d, want 2", code)
			}
			for _, name := range names {
				if !strings.Contains(p.stderr.String(), name) {
					t.Errorf("the message does not name %s:\n%s", name, p.stderr.String())
				}
			}
		})
	}
}

// TestSIGTERM: both stop being ready, end soon, and with success.
func TestSIGTERM(t *testing.T) {
	p := startPair(t)
	for _, one := range []*program{p.web, p.worker} {
		one.signal(syscall.SIGTERM)
		if code := one.exitCode(t, 15*time.Second); code != 0 {
			t.Errorf("%s: exit code %d after SIGTERM, want 0", one.name, code)
		}
	}
}

// TestSecondSignal: the first one drains, the second one ends the process at once.
func TestSecondSignal(t *testing.T) {
	web := startWeb(t, startValkey(t).addr)
	conn, err := net.Dial("tcp", strings.TrimPrefix(web.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "POST /event HTTP/1.1\r\n") // holds up the drain for seconds
	web.signal(syscall.SIGTERM)
	web.waitNotReady(t, 5*time.Second)
	if web.exited() {
		t.Fatal("one signal ended it at once")
	}
	begun := time.Now()
	web.signal(syscall.SIGTERM)
	if code := web.exitCode(t, 10*time.Second); code != -1 || time.Since(begun) > 500*time.Millisecond {
		t.Errorf("exit code %d after %s", code, time.Since(begun))
	}
}

// TestDenied is the smoke of what web refuses; the whole list is tested in the
// program's own module, on the same handler.
func TestDenied(t *testing.T) {
	v := startValkey(t)
	web := startWeb(t, v.addr)
	c := newClient(web.url)
	image := newImage()
	foreign, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	with := func(replace map[string]any) string { return github.mint(now, replace) }
	for _, d := range []struct {
		name, token, image string
		status             int
	}{
		{"no token", "", image, 401},
		{"no JWT", "eyJhbGciOiJub25lIn0.e30.", image, 401},
		{"another's key", github.forge(foreign, now), image, 401},
		{"another audience", with(map[string]any{"aud": "https://github.com/acme"}), image, 401},
		{"another issuer", with(map[string]any{"iss": github.URL + "/"}), image, 401},
		{"expired", github.mint(now.Add(-10*time.Minute), nil), image, 401},
		{"not yet valid", github.mint(now.Add(20*time.Minute), nil), image, 401},
		{"another organisation", with(map[string]any{"repository_owner": "acme-evil", "repository": "acme-evil/api", "sub": "repo:acme-evil/api:ref:refs/heads/main"}), image, 403},
		{"a pull request", with(map[string]any{"event_name": "pull_request_target"}), image, 403},
		{"an image beside the prefix", with(nil), "ghcr.io/acme-evil/api:dev", 403},
	} {
		a, err := c.post(t.Context(), d.token, imageBody(d.image))
		if err != nil {
			t.Errorf("%s: %v", d.name, err)
			continue
		}
		if a.status != d.status {
			t.Errorf("%s: answered %d %s, want %d", d.name, a.status, a.body, d.status)
		}
		if a.status == 401 && a.header.Get("WWW-Authenticate") != "Bearer" {
			t.Errorf("%s: WWW-Authenticate is %q, want Bearer", d.name, a.header.Get("WWW-Authenticate"))
		}
		if saysNoMore := strings.TrimSpace(a.body) == "access denied"; saysNoMore != (d.image == image) {
			t.Errorf("%s: the answer is %q", d.name, a.body)
		}
	}
	if set := recordOf(t, v); len(set) != 0 {
		t.Errorf("refused requests are on record: %v", set)
	}
	if strings.Contains(web.stderr.String(), "eyJ") {
		t.Error("a token is in the log")
	}
	c.mustPush(t, image) // and the same web accepts what is right
}

// TestUntrustedIssuer: an issuer whose certificate nobody vouches for gives no
// keys, and without keys nothing is accepted.
func TestUntrustedIssuer(t *testing.T) {
	v := startValkey(t)
	web := launchWeb(t, programPath, v.addr, "SSL_CERT_FILE=/dev/null", "SSL_CERT_DIR=/nonexistent")
	t.Log("not ready:", web.waitNotReady(t, 10*time.Second))
	a, err := newClient(web.url).post(t.Context(), github.mint(time.Now(), nil), imageBody(newImage()))
	if err != nil {
		t.Fatal(err)
	}
	if a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("answered %d %s with Retry-After %q, want 503 with one", a.status, a.body, a.header.Get("Retry-After"))
	}
	if web.exited() {
		t.Error("web exited; it should wait for the keys")
	}
}

// TestLatency: from the first byte of the POST until a watch shows the patched
// Deployment, on the real API server and with fsync at every write. The bar is
// 10 ms at the median on a quiet machine; the bound here only catches what is
// wrong by kind (a poll, a rate limit), so that a busy machine does not fail it.
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
