package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
)

var deploymentsResource = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}

// restartedAtAnnotation is what `kubectl rollout restart` sets too.
const restartedAtAnnotation = "kubectl.kubernetes.io/restartedAt"

// watchSilence is how long a watch may bring nothing before it is taken for dead
// and begun anew where it ended. An API server sends a bookmark about every
// minute; a proxy that has lost the stream behind an open connection does not.
const watchSilence = 90 * time.Second

// requestLimit is how long the API server may take to begin a watch or to answer
// one page of a list. A proxy may hold either for ever.
const requestLimit = 30 * time.Second

// watchDelay is how long a watch may take to bring a change that is known to
// have been made.
const watchDelay = 5 * time.Second

// deployment is what worker remembers of a Deployment. Of the embedded metadata
// only namespace, name, uid, resourceVersion, creationTimestamp and
// deletionTimestamp are filled. A record is never changed once it is in the
// cache; a newer one takes its place.
type deployment struct {
	metav1.ObjectMeta
	images      []containerImage
	paused      bool
	restartedAt string // the pod template's annotation as it stands
	// restarted is the newest restartedAt of our own form that was seen on this
	// Deployment. Who takes it away, as a GitOps tool does, is not fought.
	restarted time.Time
	// known is since when (worker's clock) the cache has held this Deployment
	// without a pause. A request heard before that was not offered to it.
	known time.Time
}

// GetObjectKind and DeepCopyObject let the reflector carry records.
func (d *deployment) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

func (d *deployment) DeepCopyObject() runtime.Object {
	record := *d
	return &record
}

func (d *deployment) key() types.NamespacedName {
	return types.NamespacedName{Namespace: d.Namespace, Name: d.Name}
}

// newDeployment takes what worker needs out of a Deployment as the API server
// sends it. It walks the maps, because the Nested helpers copy what they return.
func newDeployment(u *unstructured.Unstructured) *deployment {
	d := &deployment{ObjectMeta: metav1.ObjectMeta{
		Namespace:         u.GetNamespace(),
		Name:              u.GetName(),
		UID:               u.GetUID(),
		ResourceVersion:   u.GetResourceVersion(),
		CreationTimestamp: u.GetCreationTimestamp(),
		DeletionTimestamp: u.GetDeletionTimestamp(),
	}}
	spec := child(u.Object, "spec")
	d.paused, _ = spec["paused"].(bool)
	template := child(spec, "template")
	d.restartedAt, _ = child(child(template, "metadata"), "annotations")[restartedAtAnnotation].(string)
	pod := child(template, "spec")
	add := func(holder map[string]any, field, pullPolicy string) {
		image, _ := holder[field].(string)
		if c, ok := parseContainerImage(image, pullPolicy); ok {
			d.images = append(d.images, c)
		}
	}
	for _, field := range []string{"initContainers", "containers"} {
		for container := range children(pod, field) {
			policy, _ := container["imagePullPolicy"].(string)
			add(container, "image", policy)
		}
	}
	for volume := range children(pod, "volumes") {
		// https://kubernetes.io/docs/concepts/storage/volumes/#image
		source := child(volume, "image")
		policy, _ := source["pullPolicy"].(string)
		add(source, "reference", policy)
	}
	return d
}

func child(m map[string]any, name string) map[string]any {
	c, _ := m[name].(map[string]any)
	return c
}

// children yields the objects of a list of objects.
func children(m map[string]any, name string) func(func(map[string]any) bool) {
	return func(yield func(map[string]any) bool) {
		list, _ := m[name].([]any)
		for _, item := range list {
			if object, ok := item.(map[string]any); ok && !yield(object) {
				return
			}
		}
	}
}

// image returns what the Deployment says of ref: pinned only if every use of it
// is pinned, and the first pull policy, if any, that does not make a node pull.
func (d *deployment) image(ref string) (pinned bool, cachedBy string) {
	pinned = true
	for _, c := range d.images {
		if c.ref != ref || c.pinned {
			continue
		}
		pinned = false
		if c.pullPolicy != "Always" && cachedBy == "" {
			cachedBy = c.pullPolicy
		}
	}
	return pinned, cachedBy
}

// runsMoreThan says whether d has an image that old does not have.
func (d *deployment) runsMoreThan(old *deployment) bool {
	return slices.ContainsFunc(d.images, func(c containerImage) bool {
		return !slices.ContainsFunc(old.images, func(o containerImage) bool { return o.ref == c.ref && o.pinned == c.pinned })
	})
}

// deploymentCache holds the Deployments of all scopes, indexed by image.
type deploymentCache struct {
	log *slog.Logger
	now func() time.Time
	// observed is called for each record that the API server sent, after the
	// cache holds it. appeared: it is new to the cache, or was just resumed.
	observed func(d *deployment, appeared bool)

	mu      sync.RWMutex
	byKey   map[types.NamespacedName]*deployment
	byImage map[string]map[types.NamespacedName]struct{}
	pending int                        // scopes not listed yet
	watches map[string]watch.Interface // by namespace of the scope
}

func newDeploymentCache(log *slog.Logger, now func() time.Time, observed func(d *deployment, appeared bool)) *deploymentCache {
	return &deploymentCache{
		log:      log,
		now:      now,
		observed: observed,
		byKey:    map[types.NamespacedName]*deployment{},
		byImage:  map[string]map[types.NamespacedName]struct{}{},
		watches:  map[string]watch.Interface{},
		pending:  1,
	}
}

// run keeps the cache true until ctx is done: one watch for all namespaces, or
// one for each of those named, so that namespaced Roles suffice. Its error is a
// scope that RBAC forbids from the start.
func (c *deploymentCache) run(ctx context.Context, client dynamic.Interface, namespaces []string, selector string) error {
	if len(namespaces) == 0 {
		namespaces = []string{metav1.NamespaceAll}
	}
	c.mu.Lock()
	c.pending = len(namespaces)
	c.mu.Unlock()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, namespace := range namespaces {
		s := &scope{
			cache:     c,
			namespace: namespace,
			client:    client.Resource(deploymentsResource).Namespace(namespace),
			semantics: client,
			selector:  selector,
			forbidden: cancel,
		}
		r := cache.NewReflectorWithOptions(s.listWatch(), nil, s, cache.ReflectorOptions{
			Name:            "deployments",
			TypeDescription: "deployments.apps",
			// The default waits up to a minute for an API server that is back.
			Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 10, Cap: 5 * time.Second},
		})
		wg.Go(func() { r.RunWithContext(ctx) })
	}
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// expectChange is told that the API server has a newer version of d. If the
// watch has not brought it after watchDelay, the watch is dead, whatever its
// connection says, and is begun anew where it ended; it then brings all that was
// missed. So every restart is a proof that the watch is alive. A watch that was
// begun since has brought it, or will.
func (c *deploymentCache) expectChange(d *deployment) {
	c.mu.RLock()
	w := c.watchOf(d.Namespace)
	c.mu.RUnlock()
	if w == nil {
		return
	}
	time.AfterFunc(watchDelay, func() {
		c.mu.RLock()
		now, same := c.byKey[d.key()], c.watchOf(d.Namespace) == w
		c.mu.RUnlock()
		if same && now != nil && now.UID == d.UID && now.ResourceVersion == d.ResourceVersion {
			c.log.Warn("the watch has missed a change, beginning it anew", "namespace", d.Namespace, "deployment", d.Name)
			w.Stop()
		}
	})
}

// synced says whether every scope has been listed.
func (c *deploymentCache) synced() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.pending == 0
}

// watchOf returns the live watch that covers a namespace, or nil. c.mu is held.
func (c *deploymentCache) watchOf(namespace string) watch.Interface {
	if w := c.watches[namespace]; w != nil {
		return w
	}
	return c.watches[metav1.NamespaceAll]
}

// get returns the record of a Deployment, or nil.
func (c *deploymentCache) get(key types.NamespacedName) *deployment {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.byKey[key]
}

// running returns the Deployments whose pod template names the image.
func (c *deploymentCache) running(image string) []*deployment {
	c.mu.RLock()
	defer c.mu.RUnlock()
	ds := make([]*deployment, 0, len(c.byImage[image]))
	for key := range c.byImage[image] {
		ds = append(ds, c.byKey[key])
	}
	return ds
}

// put stores a record and says whether it is new or has just been resumed. After
// a gap in the watch, as well whether it has come to run another image: that may
// have been asked for since. c.mu is held.
func (c *deploymentCache) put(d *deployment, gap bool) (appeared bool) {
	key := d.key()
	old := c.byKey[key]
	appeared = old == nil || old.UID != d.UID || old.paused && !d.paused || gap && d.runsMoreThan(old)
	if appeared {
		d.known = c.now()
	} else {
		d.known = old.known
	}
	if old != nil && old.UID == d.UID {
		d.restarted = old.restarted
	}
	if own, ok := ownTime(d.restartedAt); ok && own.After(d.restarted) {
		d.restarted = own
	}
	c.remove(key)
	c.byKey[key] = d
	for _, image := range d.images {
		keys := c.byImage[image.ref]
		if keys == nil {
			keys = map[types.NamespacedName]struct{}{}
			c.byImage[image.ref] = keys
		}
		keys[key] = struct{}{}
	}
	return appeared
}

// remove forgets a record. c.mu is held.
func (c *deploymentCache) remove(key types.NamespacedName) {
	old := c.byKey[key]
	if old == nil {
		return
	}
	delete(c.byKey, key)
	for _, image := range old.images {
		delete(c.byImage[image.ref], key)
		if len(c.byImage[image.ref]) == 0 {
			delete(c.byImage, image.ref)
		}
	}
}

// scope is one watch: all namespaces, or one. It is what the reflector reads
// from and stores to.
type scope struct {
	cache     *deploymentCache
	namespace string // "" for all
	client    dynamic.ResourceInterface
	semantics any // the whole client: it may say that it cannot stream lists
	selector  string
	forbidden context.CancelCauseFunc // ends the cache's run
	listed    bool                    // guarded by cache.mu
	reopened  time.Time               // when a watch went on where one had ended; guarded by cache.mu
}

// listWatch reduces Deployments to records as they arrive, a page or an event
// at a time: whole, those of a big cluster would take hundreds of megabytes.
func (s *scope) listWatch() cache.ListerWatcher {
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = s.selector
			if o.ResourceVersion == "0" {
				o.ResourceVersion = "" // API servers ignore the limit for "0"
			}
			ctx, cancel := context.WithTimeout(ctx, requestLimit)
			defer cancel()
			page, err := s.client.List(ctx, o)
			if err != nil {
				return nil, s.refused("list", err)
			}
			records := &deploymentList{ListMeta: metav1.ListMeta{
				ResourceVersion:    page.GetResourceVersion(),
				Continue:           page.GetContinue(),
				RemainingItemCount: page.GetRemainingItemCount(),
			}}
			for i := range page.Items {
				records.Items = append(records.Items, *newDeployment(&page.Items[i]))
			}
			return records, nil
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = s.selector
			s.live(nil)
			ctx, cancel := context.WithCancelCause(ctx)
			overdue := time.AfterFunc(requestLimit, func() { cancel(errors.New("the API server does not begin the watch")) })
			w, err := s.client.Watch(ctx, o)
			overdue.Stop()
			if err != nil {
				if ctx.Err() != nil {
					err = context.Cause(ctx)
				}
				cancel(nil)
				return nil, s.refused("watch", err)
			}
			w = &cancelledWatch{w, cancel}
			// A list that is streamed fills the cache at its end; until then
			// nobody can expect a change of this watch.
			listing := o.SendInitialEvents != nil && *o.SendInitialEvents
			if !listing {
				s.live(w)
				s.cache.mu.Lock()
				s.reopened = s.cache.now()
				s.cache.mu.Unlock()
			}
			silent := time.AfterFunc(watchSilence, w.Stop)
			return watch.Filter(w, func(e watch.Event) (watch.Event, bool) {
				silent.Reset(watchSilence)
				u, ok := e.Object.(*unstructured.Unstructured)
				switch {
				case !ok || e.Type == watch.Error:
				case e.Type != watch.Bookmark:
					e.Object = newDeployment(u)
				case listing && u.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true":
					s.live(w)
				}
				return e, true
			}), nil
		},
	}, s.semantics)
}

// cancelledWatch gives up its context when it is stopped, as the reflector does
// with every watch.
type cancelledWatch struct {
	watch.Interface
	cancel context.CancelCauseFunc
}

func (w *cancelledWatch) Stop() {
	w.Interface.Stop()
	w.cancel(nil)
}

// live says which watch brings the changes of the scope, nil while none does.
func (s *scope) live(w watch.Interface) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	s.cache.watches[s.namespace] = w
}

// refused ends run if RBAC forbids a scope that was never listed: nothing but
// an operator can mend that. Later, a Role that is replaced may be missing for a
// moment, and the reflector tries again.
func (s *scope) refused(verb string, err error) error {
	if !apierrors.IsForbidden(err) {
		return err
	}
	where := "in all namespaces; grant it with a ClusterRole, or narrow WORKER_NAMESPACES"
	if s.namespace != "" {
		where = fmt.Sprintf("in namespace %s; grant it with a Role there, or change WORKER_NAMESPACES", s.namespace)
	}
	err = fmt.Errorf("RBAC forbids to %s deployments.apps %s: %w", verb, where, err)
	s.cache.mu.RLock()
	defer s.cache.mu.RUnlock()
	if !s.listed {
		s.forbidden(err)
	}
	return err
}

// Add, Update, Delete, Replace and Resync are cache.ReflectorStore.

func (s *scope) Add(obj any) error { return s.Update(obj) }

func (s *scope) Update(obj any) error {
	d, ok := obj.(*deployment)
	if !ok {
		return fmt.Errorf("watch of deployments brought a %T", obj)
	}
	s.cache.mu.Lock()
	appeared := s.cache.put(d, s.cache.now().Sub(s.reopened) < watchDelay)
	s.cache.mu.Unlock()
	s.cache.observed(d, appeared)
	return nil
}

func (s *scope) Delete(obj any) error {
	d, ok := obj.(*deployment)
	if !ok {
		return fmt.Errorf("watch of deployments brought a %T", obj)
	}
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	s.cache.remove(d.key())
	return nil
}

// Replace is the outcome of a list: what is not in it is gone.
func (s *scope) Replace(items []any, _ string) error {
	appeared := make([]bool, len(items))
	listed := make(map[types.NamespacedName]struct{}, len(items))
	c := s.cache
	c.mu.Lock()
	for i, item := range items {
		d, ok := item.(*deployment)
		if !ok {
			c.mu.Unlock()
			return fmt.Errorf("list of deployments brought a %T", item)
		}
		listed[d.key()] = struct{}{}
		appeared[i] = c.put(d, true)
	}
	for key := range c.byKey {
		if _, ok := listed[key]; !ok && (s.namespace == "" || s.namespace == key.Namespace) {
			c.remove(key)
		}
	}
	if !s.listed {
		s.listed = true
		c.pending--
	}
	c.mu.Unlock()
	c.log.Info("deployments listed", "namespace", s.namespace, "count", len(items))
	for i, item := range items {
		c.observed(item.(*deployment), appeared[i])
	}
	return nil
}

func (s *scope) Resync() error { return nil }

// deploymentList is a page of records.
type deploymentList struct {
	metav1.ListMeta
	Items []deployment
}

func (l *deploymentList) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

func (l *deploymentList) DeepCopyObject() runtime.Object {
	list := *l
	list.Items = append([]deployment(nil), l.Items...)
	return &list
}
