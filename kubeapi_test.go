package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/dynamic"
)

// kubeAPI is as much of an API server as worker may use: list, watch (streaming
// lists included) and merge patch of apps/v1 deployments. Any other call fails
// the test.
type kubeAPI struct {
	t          *testing.T
	url        string
	kubeconfig string // path

	mu       sync.Mutex
	rv       int
	objects  map[string]map[string]any // by namespace/name
	watchers map[chan watchEvent]string
	patches  []patchCall
	applied  map[string][]string // the restartedAt values that patches changed it to
	lists    int

	// onPatch may answer a patch itself; nil, or a status of 0, lets it through.
	onPatch  func(patchCall) (status int, header http.Header)
	selector string // that every list and watch must have
	history  []pastEvent
	// noStreams is an API server that cannot stream lists, as before 1.32.
	noStreams bool
	// forbid may refuse a verb in a namespace.
	forbid func(verb, namespace string) bool
}

type patchCall struct {
	key   string // namespace/name
	query string
	body  string
}

// pastEvent is an event that a watch from an older version is told.
type pastEvent struct {
	rv        int
	namespace string
	event     watchEvent
}

type watchEvent struct {
	kind   string
	object map[string]any
}

func newKubeAPI(t *testing.T) *kubeAPI {
	k := &kubeAPI{t: t, rv: 100, objects: map[string]map[string]any{}, watchers: map[chan watchEvent]string{}, applied: map[string][]string{}}
	s := httptest.NewServer(k)
	k.url = s.URL
	t.Cleanup(func() {
		s.CloseClientConnections() // watches never end by themselves
		s.Close()
	})
	return k
}

// client is made the way worker makes it, from a kubeconfig.
func (k *kubeAPI) client() dynamic.Interface {
	k.t.Helper()
	path := filepath.Join(k.t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {token: t}}]\n", k.url)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		k.t.Fatal(err)
	}
	k.kubeconfig = path
	client, err := newKubernetesClient(workerConfig{Kubeconfig: path})
	if err != nil {
		k.t.Fatal(err)
	}
	return client
}

func (k *kubeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rest, ok := strings.CutPrefix(r.URL.Path, "/apis/apps/v1/")
	parts := strings.Split(rest, "/")
	namespace := ""
	if ok && len(parts) >= 3 && parts[0] == "namespaces" {
		namespace, parts = parts[1], parts[2:]
	}
	ok = ok && parts[0] == "deployments"
	q := r.URL.Query()
	if r.Method == http.MethodGet && q.Get("labelSelector") != k.selector {
		k.t.Errorf("label selector %q, want %q", q.Get("labelSelector"), k.selector)
	}
	switch {
	case ok && r.Method == http.MethodGet && len(parts) == 1 && q.Get("watch") == "true":
		k.watch(w, r, namespace)
	case ok && r.Method == http.MethodGet && len(parts) == 1:
		// From resourceVersion 0 an API server ignores the limit and sends all at once.
		if k.noStreams && (q.Get("resourceVersion") == "0" || q.Get("limit") == "") {
			k.t.Errorf("a list that is not read page by page: %s", r.URL.RawQuery)
		}
		k.list(w, namespace)
	case ok && r.Method == http.MethodPatch && len(parts) == 2 && namespace != "" &&
		r.Header.Get("Content-Type") == "application/merge-patch+json":
		body, err := io.ReadAll(r.Body)
		if err != nil {
			k.t.Errorf("reading a patch: %v", err)
		}
		k.patch(w, patchCall{namespace + "/" + parts[1], r.URL.RawQuery, string(body)})
	default:
		k.t.Errorf("unexpected call of the Kubernetes API: %s %s (%s)", r.Method, r.URL, r.Header.Get("Content-Type"))
		status(w, http.StatusForbidden, "Forbidden")
	}
}

// front puts a server before the API, as a proxy would be; answer says whether it
// has dealt with a request itself.
func (k *kubeAPI) front(t *testing.T, answer func(w http.ResponseWriter, r *http.Request) bool) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !answer(w, r) {
			k.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	k.url = server.URL
}

func status(w http.ResponseWriter, code int, reason string) {
	writeJSON(w, code, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": "test: " + reason})
}

func (k *kubeAPI) list(w http.ResponseWriter, namespace string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.forbid != nil && k.forbid("list", namespace) {
		status(w, http.StatusForbidden, "Forbidden")
		return
	}
	k.lists++
	var items []any
	for _, key := range slices.Sorted(maps.Keys(k.objects)) {
		if namespace == "" || strings.HasPrefix(key, namespace+"/") {
			items = append(items, k.objects[key])
		}
	}
	writeJSON(w, http.StatusOK, map[string]any{"kind": "DeploymentList", "apiVersion": "apps/v1",
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(k.rv)}, "items": items})
}

func (k *kubeAPI) watch(w http.ResponseWriter, r *http.Request, namespace string) {
	k.mu.Lock()
	if k.forbid != nil && k.forbid("watch", namespace) {
		k.mu.Unlock()
		status(w, http.StatusForbidden, "Forbidden")
		return
	}
	if k.noStreams && r.URL.Query().Has("sendInitialEvents") {
		k.mu.Unlock()
		status(w, http.StatusUnprocessableEntity, "Invalid")
		return
	}
	events := make(chan watchEvent, 1000)
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		for _, key := range slices.Sorted(maps.Keys(k.objects)) {
			if namespace == "" || strings.HasPrefix(key, namespace+"/") {
				events <- watchEvent{"ADDED", k.objects[key]}
			}
		}
		events <- watchEvent{"BOOKMARK", map[string]any{"kind": "Deployment", "apiVersion": "apps/v1", "metadata": map[string]any{
			"resourceVersion": strconv.Itoa(k.rv), "annotations": map[string]any{"k8s.io/initial-events-end": "true"}}}}
	}
	if from, err := strconv.Atoi(r.URL.Query().Get("resourceVersion")); err == nil {
		for _, c := range k.history { // what has happened since
			if c.rv > from && (namespace == "" || namespace == c.namespace) {
				events <- c.event
			}
		}
	}
	k.watchers[events] = namespace
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		delete(k.watchers, events)
		k.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/json")
	for {
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case e := <-events:
			if e.kind == "" {
				return
			}
			json.NewEncoder(w).Encode(map[string]any{"type": e.kind, "object": e.object})
		}
	}
}

// breakWatches ends all watches as a restarted API server does, and lets change
// alter the objects unseen: the next watch from an old version answers 410.
func (k *kubeAPI) breakWatches() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for events := range k.watchers {
		events <- watchEvent{"ERROR", map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410, "message": "too old resource version"}}
		events <- watchEvent{}
	}
}

func (k *kubeAPI) patch(w http.ResponseWriter, call patchCall) {
	k.mu.Lock()
	k.patches = append(k.patches, call)
	onPatch := k.onPatch
	k.mu.Unlock()
	if onPatch != nil {
		if code, header := onPatch(call); code != 0 {
			maps.Copy(w.Header(), header)
			status(w, code, http.StatusText(code))
			return
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	object := k.objects[call.key]
	if object == nil {
		status(w, http.StatusNotFound, "NotFound")
		return
	}
	var p struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
		Spec struct {
			Template struct {
				Metadata struct {
					Annotations map[string]any `json:"annotations"`
				} `json:"metadata"`
			} `json:"template"`
		} `json:"spec"`
	}
	if err := unmarshalStrict([]byte(call.body), &p); err != nil {
		k.t.Errorf("a patch sets what it must not: %s: %v", call.body, err)
		status(w, http.StatusBadRequest, "BadRequest")
		return
	}
	if want := child(object, "metadata")["resourceVersion"]; p.Metadata.ResourceVersion != "" && p.Metadata.ResourceVersion != want {
		status(w, http.StatusConflict, "Conflict")
		return
	}
	changed := clone(object)
	template := child(child(changed, "spec"), "template")
	meta := child(template, "metadata")
	if meta == nil {
		meta = map[string]any{}
		template["metadata"] = meta
	}
	annotations := child(meta, "annotations")
	if annotations == nil {
		annotations = map[string]any{}
		meta["annotations"] = annotations
	}
	before, after := annotations[restartedAtAnnotation], p.Spec.Template.Metadata.Annotations[restartedAtAnnotation]
	if before == after { // as the API server does with a patch that changes nothing
		writeJSON(w, http.StatusOK, object)
		return
	}
	maps.Copy(annotations, p.Spec.Template.Metadata.Annotations)
	k.applied[call.key] = append(k.applied[call.key], fmt.Sprint(after))
	k.store(call.key, changed, "MODIFIED")
	writeJSON(w, http.StatusOK, changed)
}

// store keeps an object under a new version and tells the watchers. k.mu is
// held.
func (k *kubeAPI) store(key string, object map[string]any, kind string) {
	k.rv++
	child(object, "metadata")["resourceVersion"] = strconv.Itoa(k.rv)
	if kind == "DELETED" {
		delete(k.objects, key)
	} else {
		k.objects[key] = object
	}
	namespace, _, _ := strings.Cut(key, "/")
	k.history = append(k.history, pastEvent{k.rv, namespace, watchEvent{kind, object}})
	for events, scope := range k.watchers {
		if scope == "" || scope == namespace {
			events <- watchEvent{kind, object}
		}
	}
}

func clone(object map[string]any) map[string]any {
	text, err := json.Marshal(object)
	if err != nil {
		panic(err)
	}
	var copied map[string]any
	if err := json.Unmarshal(text, &copied); err != nil {
		panic(err)
	}
	return copied
}

// spec describes a Deployment of a test.
type spec struct {
	image       string // of the one container; the other fields add to it
	init        string
	volume      string
	policy      string // imagePullPolicy, Always if empty
	paused      bool
	deleting    bool
	restartedAt string
	created     time.Time // long ago if zero
}

func (s spec) object(key, uid string) map[string]any {
	if s.created.IsZero() {
		s.created = time.Now().Add(-240 * time.Hour)
	}
	if s.policy == "" {
		s.policy = "Always"
	}
	namespace, name, _ := strings.Cut(key, "/")
	meta := map[string]any{"namespace": namespace, "name": name, "uid": uid, "creationTimestamp": s.created.UTC().Format(time.RFC3339)}
	if s.deleting {
		meta["deletionTimestamp"] = time.Now().UTC().Format(time.RFC3339)
	}
	pod := map[string]any{"containers": []any{map[string]any{"name": "main", "image": s.image, "imagePullPolicy": s.policy}}}
	if s.init != "" {
		pod["initContainers"] = []any{map[string]any{"name": "init", "image": s.init, "imagePullPolicy": s.policy}}
	}
	if s.volume != "" {
		pod["volumes"] = []any{map[string]any{"name": "data", "image": map[string]any{"reference": s.volume, "pullPolicy": s.policy}}}
	}
	template := map[string]any{"spec": pod}
	if s.restartedAt != "" {
		template["metadata"] = map[string]any{"annotations": map[string]any{restartedAtAnnotation: s.restartedAt}}
	}
	return map[string]any{"kind": "Deployment", "apiVersion": "apps/v1", "metadata": meta,
		"spec": map[string]any{"paused": s.paused, "template": template}}
}

// create makes a Deployment, or makes it anew with another uid.
func (k *kubeAPI) create(key string, s spec) {
	k.mu.Lock()
	defer k.mu.Unlock()
	kind := "ADDED"
	if k.objects[key] != nil {
		kind = "MODIFIED"
	}
	k.store(key, s.object(key, fmt.Sprint("uid-", k.rv)), kind)
}

// change alters a Deployment as somebody else would.
func (k *kubeAPI) change(key string, f func(object map[string]any)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	object := clone(k.objects[key])
	f(object)
	k.store(key, object, "MODIFIED")
}

// changeUnseen alters the objects without telling the watchers.
func (k *kubeAPI) changeUnseen(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	watchers := k.watchers
	k.watchers = nil
	f()
	k.watchers = watchers
}

func (k *kubeAPI) restartedAt(key string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	at, _ := child(child(child(child(k.objects[key], "spec"), "template"), "metadata"), "annotations")[restartedAtAnnotation].(string)
	return at
}

func (k *kubeAPI) patchesOf(key string) []patchCall {
	k.mu.Lock()
	defer k.mu.Unlock()
	var calls []patchCall
	for _, call := range k.patches {
		if key == "" || call.key == key {
			calls = append(calls, call)
		}
	}
	return calls
}

// eventually waits for what has to become true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within 10 s: %s", what)
}
