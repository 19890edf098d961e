// Package fake plays the servers that the two processes talk to: an API server
// and a token issuer. They serve the unit tests, the end-to-end tests and the dev
// subcommand, and are no part of the production binary.
package fake

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// KubernetesAPI is as much of an API server as the worker may use: list, watch
// and merge patch of apps/v1 deployments. Any other call is unexpected. Objects
// are named by their key, namespace/name.
type KubernetesAPI struct {
	URL string

	// The mutex guards everything below. Lock it to change an exported field
	// while requests are under way. No hook is called with it locked but Lag and
	// OnStore, which must not call methods.
	sync.Mutex
	Selector  string // the labelSelector that every list and watch must have
	PagedOnly bool   // a list of the whole collection must have a limit
	NoStreams bool   // refuses to stream lists, as before Kubernetes 1.32
	// Front is asked before anything else, like a proxy before the API server.
	// It says whether it answered; it may pass the request on with ServeHTTP.
	Front func(w http.ResponseWriter, r *http.Request) bool
	// Forbid may refuse the verb (list, watch, patch) in a namespace, "" for all.
	Forbid func(verb, namespace string) bool
	// OnPatch may answer a patch itself. A status of 0 lets it through.
	OnPatch func(PatchCall) (status int, header http.Header)
	// OnStore may alter what a patch is about to store, like a mutating webhook.
	OnStore func(object map[string]any)
	// Lag delays each watch event. The events keep their order.
	Lag func() time.Duration

	unexpected func(format string, args ...any)
	server     *httptest.Server
	version    int // the newest resourceVersion
	compacted  int // a watch from before this version gets 410
	objects    map[string]map[string]any
	history    []event
	watchers   map[*watcher]struct{}
	unseen     bool // watchers are not told what happens
	pages      map[string]page
	expire     bool // the next continue token has expired
	lists      []url.Values
	patches    []PatchCall
	applied    map[string][]string
}

// PatchCall is a patch as it arrived.
type PatchCall struct{ Key, Query, Body string }

// event is what a watch brings. One without a kind ends the watch.
type event struct {
	kind    string
	object  any
	key     string
	version int
	due     time.Time
}

type watcher struct {
	namespace string // "" for all
	queue     []event
	wake      chan struct{}
}

// page is what a continue token stands for: the rest of one consistent snapshot.
type page struct {
	version int
	rest    []map[string]any
}

// NewKubernetesAPI serves on loopback until Close. Unexpected is told, in the
// manner of Printf, what a correct client would not have sent.
func NewKubernetesAPI(unexpected func(format string, args ...any)) *KubernetesAPI {
	k := &KubernetesAPI{
		PagedOnly: true, unexpected: unexpected, version: 100, objects: map[string]map[string]any{},
		watchers: map[*watcher]struct{}{}, pages: map[string]page{}, applied: map[string][]string{},
	}
	k.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.Lock()
		front := k.Front
		k.Unlock()
		if front == nil || !front(w, r) {
			k.ServeHTTP(w, r)
		}
	}))
	k.URL = k.server.URL
	return k
}

// Close ends all connections, watches too, and waits for their handlers.
func (k *KubernetesAPI) Close() {
	k.server.CloseClientConnections()
	k.server.Close()
}

// ServeHTTP answers without asking Front.
func (k *KubernetesAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rest, ok := strings.CutPrefix(r.URL.Path, "/apis/apps/v1/")
	namespace := ""
	if inNamespace, found := strings.CutPrefix(rest, "namespaces/"); found {
		namespace, rest, _ = strings.Cut(inNamespace, "/")
	}
	resource, name, one := strings.Cut(rest, "/")
	query, verb := r.URL.Query(), ""
	switch {
	case !ok || resource != "deployments":
	case r.Method == http.MethodGet && !one && query.Get("watch") == "true":
		verb = "watch"
	case r.Method == http.MethodGet && !one:
		verb = "list"
	case r.Method == http.MethodPatch && one && namespace != "" && r.Header.Get("Content-Type") == "application/merge-patch+json":
		verb = "patch"
	}
	k.Lock()
	selector, forbid := k.Selector, k.Forbid
	if verb == "list" {
		k.lists = append(k.lists, query)
	}
	k.Unlock()
	switch {
	case verb == "":
		k.refuse(w, "%s %s (%s)", r.Method, r.URL, r.Header.Get("Content-Type"))
	case verb != "patch" && query.Get("labelSelector") != selector:
		k.refuse(w, "%s with label selector %q, not %q", verb, query.Get("labelSelector"), selector)
	case forbid != nil && forbid(verb, namespace):
		writeError(w, apierrors.NewForbidden(resourceOf, name, fmt.Errorf("fake: cannot %s in %q", verb, namespace)))
	case verb == "watch":
		k.watch(w, r, namespace)
	case verb == "list":
		k.list(w, query, namespace)
	case verb == "patch":
		if body, err := io.ReadAll(r.Body); err == nil { // otherwise the client is gone
			k.patch(w, PatchCall{namespace + "/" + name, r.URL.RawQuery, string(body)}, query.Get("fieldManager"))
		}
	}
}

var resourceOf = schema.GroupResource{Group: "apps", Resource: "deployments"}

func (k *KubernetesAPI) refuse(w http.ResponseWriter, format string, args ...any) {
	text := fmt.Sprintf("unexpected call of the Kubernetes API: "+format, args...)
	k.unexpected("%s", text)
	writeError(w, apierrors.NewBadRequest(text))
}

func writeError(w http.ResponseWriter, err *apierrors.StatusError) {
	err.ErrStatus.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	writeJSON(w, int(err.ErrStatus.Code), err.ErrStatus)
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v) // a client that is gone cannot be told
}

func (k *KubernetesAPI) list(w http.ResponseWriter, query url.Values, namespace string) {
	name, named := strings.CutPrefix(query.Get("fieldSelector"), "metadata.name=")
	limit, _ := strconv.Atoi(query.Get("limit"))
	token, version := query.Get("continue"), query.Get("resourceVersion")
	if version == "0" {
		limit = 0 // an API server then ignores the limit
	}
	k.Lock()
	defer k.Unlock()
	switch {
	case query.Has("fieldSelector") && !named, token != "" && version != "":
		k.refuse(w, "list with %s", query.Encode())
		return
	case k.PagedOnly && limit == 0 && !named:
		k.unexpected("a list that is not read page by page: %s", query.Encode())
	}
	p, ok := page{k.version, k.selectObjects(namespace, name)}, true
	if token != "" {
		p, ok = k.pages[token]
	}
	if !ok || token != "" && k.expire {
		k.expire = false
		delete(k.pages, token)
		writeError(w, apierrors.NewResourceExpired("fake: the continue token has expired"))
		return
	}
	meta, items := metav1.ListMeta{ResourceVersion: strconv.Itoa(p.version)}, p.rest
	if limit > 0 && limit < len(items) {
		meta.Continue = fmt.Sprintf("page-%d-of-%d", len(k.lists), p.version)
		k.pages[meta.Continue] = page{p.version, items[limit:]}
		items = items[:limit]
	}
	writeJSON(w, http.StatusOK, map[string]any{"kind": "DeploymentList", "apiVersion": "apps/v1", "metadata": meta, "items": items})
}

// selectObjects returns the objects of a namespace, or of all, in the order of
// their keys.
func (k *KubernetesAPI) selectObjects(namespace, name string) []map[string]any {
	items := []map[string]any{}
	for _, key := range slices.Sorted(maps.Keys(k.objects)) {
		if inNamespace(key, namespace) && (name == "" || strings.HasSuffix(key, "/"+name)) {
			items = append(items, k.objects[key])
		}
	}
	return items
}

func inNamespace(key, namespace string) bool {
	return namespace == "" || strings.HasPrefix(key, namespace+"/")
}

func (k *KubernetesAPI) watch(w http.ResponseWriter, r *http.Request, namespace string) {
	query := r.URL.Query()
	from, err := strconv.Atoi(query.Get("resourceVersion"))
	streamed := query.Get("sendInitialEvents") == "true"
	watching := &watcher{namespace: namespace, wake: make(chan struct{}, 1)}
	k.Lock()
	switch {
	case err != nil && !streamed, query.Has("fieldSelector"):
		defer k.Unlock()
		k.refuse(w, "watch with %s", query.Encode())
		return
	case streamed && k.NoStreams:
		defer k.Unlock()
		writeError(w, apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil))
		return
	case streamed:
		for _, object := range k.selectObjects(namespace, "") {
			k.send(watching, event{kind: "ADDED", object: object})
		}
		end := &unstructured.Unstructured{Object: map[string]any{"kind": "Deployment", "apiVersion": "apps/v1"}}
		end.SetResourceVersion(strconv.Itoa(k.version))
		end.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
		k.send(watching, event{kind: "BOOKMARK", object: end.Object})
	case from < k.compacted:
		k.send(watching, expired, event{})
	default:
		k.send(watching, slices.DeleteFunc(slices.Clone(k.history), func(e event) bool {
			return e.version <= from || !inNamespace(e.key, namespace)
		})...)
	}
	k.watchers[watching] = struct{}{}
	k.Unlock()
	defer func() {
		k.Lock()
		defer k.Unlock()
		delete(k.watchers, watching)
	}()
	w.Header().Set("Content-Type", "application/json")
	k.stream(w, r, watching)
}

// stream writes the events of a watch until it ends.
func (k *KubernetesAPI) stream(w http.ResponseWriter, r *http.Request, watching *watcher) {
	for {
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-watching.wake:
		}
		k.Lock()
		events := watching.queue
		watching.queue = nil
		k.Unlock()
		for _, e := range events {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(time.Until(e.due)):
			}
			if e.kind == "" {
				return
			}
			json.NewEncoder(w).Encode(map[string]any{"type": e.kind, "object": e.object})
			w.(http.Flusher).Flush()
		}
	}
}

// send queues events for one watch. The mutex is locked.
func (k *KubernetesAPI) send(to *watcher, events ...event) {
	for _, e := range events {
		if k.Lag != nil {
			e.due = time.Now().Add(k.Lag())
		}
		to.queue = append(to.queue, e)
	}
	select {
	case to.wake <- struct{}{}:
	default:
	}
}

var expired = event{kind: "ERROR", object: metav1.Status{
	TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
	Reason: metav1.StatusReasonExpired, Code: http.StatusGone, Message: "fake: too old resource version"}}

func (k *KubernetesAPI) patch(w http.ResponseWriter, call PatchCall, manager string) {
	k.Lock()
	k.patches = append(k.patches, call)
	onPatch := k.OnPatch
	k.Unlock()
	if onPatch != nil {
		if code, header := onPatch(call); code != 0 {
			maps.Copy(w.Header(), header)
			writeError(w, apierrors.NewGenericServerResponse(code, "patch", resourceOf, call.Key, "fake", 0, true))
			return
		}
	}
	pre, restartedAt, ok := parsePatch(call.Body)
	k.Lock()
	defer k.Unlock()
	object := &unstructured.Unstructured{Object: k.objects[call.Key]}
	switch { // in the API server's order
	case !ok:
		k.refuse(w, "a patch sets what it must not: %s", call.Body)
		return
	case object.Object == nil:
		writeError(w, apierrors.NewNotFound(resourceOf, call.Key))
		return
	case pre.GetResourceVersion() != "" && pre.GetResourceVersion() != object.GetResourceVersion():
		writeError(w, apierrors.NewConflict(resourceOf, call.Key, fmt.Errorf("fake: the object has been modified")))
		return
	case pre.GetUID() != "" && pre.GetUID() != object.GetUID():
		writeError(w, apierrors.NewInvalid(schema.GroupKind{Group: "apps", Kind: "Deployment"}, call.Key,
			field.ErrorList{field.Invalid(field.NewPath("metadata", "uid"), pre.GetUID(), "field is immutable")}))
		return
	}
	changed := clone(object.Object)
	if err := unstructured.SetNestedField(changed, restartedAt, restartedAtPath...); err != nil {
		k.unexpected("patch of %s: %v", call.Key, err)
	}
	if k.OnStore != nil {
		k.OnStore(changed)
	}
	if reflect.DeepEqual(object.Object, changed) { // no new version, no event
		writeJSON(w, http.StatusOK, object.Object)
		return
	}
	if stored := restartedAtOf(changed); stored == restartedAt && stored != restartedAtOf(object.Object) {
		k.applied[call.Key] = append(k.applied[call.Key], restartedAt)
	}
	k.update(call.Key, changed, manager, "", time.Now())
	writeJSON(w, http.StatusOK, changed)
}

// parsePatch accepts what sets restartedAt, with or without preconditions: what
// is rebuilt from these fields must be the whole patch.
func parsePatch(body string) (patch *unstructured.Unstructured, restartedAt string, ok bool) {
	patch = &unstructured.Unstructured{}
	if err := json.Unmarshal([]byte(body), &patch.Object); err != nil {
		return patch, "", false
	}
	restartedAt = restartedAtOf(patch.Object)
	only := &unstructured.Unstructured{Object: map[string]any{}}
	only.SetResourceVersion(patch.GetResourceVersion())
	only.SetUID(patch.GetUID())
	err := unstructured.SetNestedField(only.Object, restartedAt, restartedAtPath...)
	return patch, restartedAt, err == nil && restartedAt != "" && reflect.DeepEqual(patch.Object, only.Object)
}

// update stores a changed object with the bookkeeping of an API server.
func (k *KubernetesAPI) update(key string, object map[string]any, manager, subresource string, at time.Time) {
	u := &unstructured.Unstructured{Object: object}
	if subresource == "" && !reflect.DeepEqual(k.objects[key]["spec"], object["spec"]) {
		u.SetGeneration(u.GetGeneration() + 1)
	}
	podsOf := func(object map[string]any) any {
		pods, _, _ := unstructured.NestedFieldNoCopy(object, "spec", "template", "spec")
		return pods
	}
	manage(u, manager, subresource, at, !reflect.DeepEqual(podsOf(k.objects[key]), podsOf(object)))
	k.store(key, u, "MODIFIED")
}

// store keeps an object under a new version and tells the watchers.
func (k *KubernetesAPI) store(key string, u *unstructured.Unstructured, kind string) {
	k.version++
	u.SetResourceVersion(strconv.Itoa(k.version))
	k.objects[key] = u.Object
	if kind == "DELETED" {
		delete(k.objects, key)
	}
	e := event{kind: kind, object: u.Object, key: key, version: k.version}
	k.history = append(k.history, e)
	for to := range k.watchers {
		if !k.unseen && inNamespace(key, to.namespace) {
			k.send(to, e)
		}
	}
}
