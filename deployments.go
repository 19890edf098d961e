package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strconv"
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

const (
	listPage = 250 // Deployments in one page of a list

	// requestTimeout bounds one page of a list, and the start of a watch: a proxy
	// may hold either forever.
	requestTimeout = 30 * time.Second

	// watchAge is when a watch is restarted from where it ended: one that brings
	// nothing cannot be told from one that is stale.
	watchAge = 2 * time.Minute

	watchGrace = 5 * time.Second // without a watch, before the worker is not ready

	// Valkey's clock and the API server's may differ. A Deployment counts as
	// created, or as set to an image, after a request only if it was so by more
	// than these.
	createdTolerance = time.Minute
	updatedTolerance = 10 * time.Second
)

// deployment is an entry of the cache. It never changes; a newer one replaces it.
type deployment struct {
	namespace, name string
	uid             types.UID
	resourceVersion string
	created         time.Time // on the API server's clock, as is updated
	updated         time.Time // newest change by a manager of the pod template's spec
	deleting        bool
	paused          bool
	restartedAt     string // the pod template's annotation
	images          []usedImage
	rollout         rolloutState // complete, progressing or failed
	restarted       restart      // the newest that was made or seen; GitOps tools reset the annotation
}

// restart is a value of restartedAt.
type restart struct {
	at    string
	since time.Time // on the worker's clock; zero if unknown, as after a list
}

// usedImage is an image that a pod template names, once however often it does.
type usedImage struct {
	ref        string // canonical
	pinned     bool   // each use has a digest
	pullPolicy string // one that lets nodes keep a cached image, if a use has one
	// cachedAt is when the cache first had the image here, on the worker's clock.
	cachedAt time.Time
	// addedAt is when the Deployment was created with the image or set to it, on
	// the API server's clock and less the tolerance.
	addedAt time.Time
}

// GetObjectKind and DeepCopyObject let a list for the reflector carry entries.
func (d *deployment) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

func (d *deployment) DeepCopyObject() runtime.Object { return d } // it never changes

func (d *deployment) key() string { return d.namespace + "/" + d.name }

// image returns what the Deployment says about an image, nil if it is not there.
func (d *deployment) image(ref string) *usedImage {
	for i := range d.images {
		if d.images[i].ref == ref {
			return &d.images[i]
		}
	}
	return nil
}

// newDeployment takes from a Deployment what the worker needs.
func newDeployment(u *unstructured.Unstructured) *deployment {
	d := &deployment{
		namespace:       u.GetNamespace(),
		name:            u.GetName(),
		uid:             u.GetUID(),
		resourceVersion: u.GetResourceVersion(),
		created:         u.GetCreationTimestamp().Time,
		deleting:        u.GetDeletionTimestamp() != nil,
	}
	for _, entry := range children(child(u.Object, "metadata"), "managedFields") {
		pods := child(child(child(child(entry, "fieldsV1"), "f:spec"), "f:template"), "f:spec")
		text, _ := entry["time"].(string)
		if at, err := time.Parse(time.RFC3339, text); err == nil && pods != nil && at.After(d.updated) {
			d.updated = at
		}
	}
	spec := child(u.Object, "spec")
	d.paused, _ = spec["paused"].(bool)
	template := child(spec, "template")
	d.restartedAt, _ = child(child(template, "metadata"), "annotations")[restartedAtAnnotation].(string)
	d.restarted.at = d.restartedAt
	d.rollout = stateOf(u.Object)
	podImages(child(template, "spec"), d.use)
	return d
}

// use adds an image field of the pod template.
func (d *deployment) use(field, pullPolicy any) {
	text, _ := field.(string)
	ref, pinned, ok := parseContainerImage(text)
	if !ok {
		return
	}
	image := d.image(ref)
	if image == nil {
		d.images = append(d.images, usedImage{ref: ref, pinned: true})
		image = &d.images[len(d.images)-1]
	}
	image.pinned = image.pinned && pinned
	if !pinned && pullPolicy != "Always" {
		image.pullPolicy, _ = pullPolicy.(string)
	}
}

// inherit completes an entry with what the cache knows from the one it replaces,
// nil if there is none. seen is when a restart that is new in it was seen. It
// reports whether the worker has to look at the Deployment.
func (d *deployment) inherit(previous *deployment, now, seen time.Time) (look bool) {
	if previous == nil || previous.uid != d.uid {
		for i := range d.images {
			d.images[i].cachedAt, d.images[i].addedAt = now, d.created.Add(-createdTolerance)
		}
		return true
	}
	look = previous.paused && !d.paused
	for i := range d.images {
		image := &d.images[i]
		if before := previous.image(image.ref); before != nil && before.pinned == image.pinned {
			image.cachedAt, image.addedAt = before.cachedAt, before.addedAt
			continue
		}
		image.cachedAt, image.addedAt = now, d.updated.Add(-updatedTolerance)
		look = true
	}
	d.restarted = previous.restarted
	if d.restartedAt != "" && d.restartedAt != previous.restartedAt && d.restartedAt != d.restarted.at {
		d.restarted = restart{max(d.restartedAt, d.restarted.at), seen}
	}
	return look
}

// deploymentCache has the Deployments of all scopes, indexed by image.
type deploymentCache struct {
	log      *slog.Logger
	selector string // WORKER_SELECTOR
	scopes   []*scope
	watchAge time.Duration
	now      func() time.Time
	// look is called with the key of a Deployment that is new to the cache, was
	// resumed, or runs another image. It must not block.
	look func(key string)

	mu    sync.Mutex // held while an entry is replaced, and for the scopes' state
	store cache.ThreadSafeStore
}

const imageIndex = "image"

// newDeploymentCache makes a scope for each namespace of WORKER_NAMESPACES, so that
// namespaced Roles suffice, or one for all.
func newDeploymentCache(cfg workerConfig, client dynamic.Interface, log *slog.Logger, now func() time.Time, look func(key string)) *deploymentCache {
	c := &deploymentCache{log: log, selector: cfg.Selector, watchAge: watchAge, now: now, look: look}
	c.store = cache.NewThreadSafeStore(cache.Indexers{imageIndex: func(entry any) (refs []string, err error) {
		for _, image := range entry.(*deployment).images {
			refs = append(refs, image.ref)
		}
		return refs, nil
	}}, cache.Indices{})
	namespaces := cfg.Namespaces
	if len(namespaces) == 0 {
		namespaces = []string{metav1.NamespaceAll}
	}
	for _, namespace := range namespaces {
		s := &scope{cache: c, namespace: namespace, client: client.Resource(deploymentsResource).Namespace(namespace)}
		s.ListWithContextFunc, s.WatchFuncWithContext = s.list, s.watch
		s.reflector = cache.NewReflectorWithOptions(s, nil, s, cache.ReflectorOptions{
			Name:            "deployments",
			TypeDescription: "deployments.apps",
			// The default waits up to a minute for an API server that is back. This is
			// less than watchGrace.
			Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 10, Cap: 3 * time.Second},
		})
		c.scopes = append(c.scopes, s)
	}
	return c
}

// run keeps the cache up to date until ctx is done. Its error is a scope that RBAC
// forbids from the start.
func (c *deploymentCache) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, s := range c.scopes {
		s.forbidden = cancel
		wg.Go(func() { s.reflector.RunWithContext(ctx) })
	}
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// ready is nil while every scope is listed and watched.
func (c *deploymentCache) ready() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.scopes {
		if s.reflector.LastSyncResourceVersion() == "" {
			return errors.New("deployments are not listed yet")
		}
		if !s.watched && c.now().Sub(s.unwatched) > watchGrace {
			return errors.New("no watch of deployments is open")
		}
	}
	return nil
}

// get returns the entry of a Deployment, nil if there is none.
func (c *deploymentCache) get(key string) *deployment {
	entry, _ := c.store.Get(key)
	d, _ := entry.(*deployment)
	return d
}

// running returns the Deployments whose pod template names the image.
func (c *deploymentCache) running(ref string) (ds []*deployment) {
	entries, _ := c.store.ByIndex(imageIndex, ref) // fails only without the index
	for _, entry := range entries {
		ds = append(ds, entry.(*deployment))
	}
	return ds
}

// source is where the cache has a version of a Deployment from.
type source int

const (
	fromList   source = iota
	fromWatch         // older than an answer, perhaps
	fromAnswer        // of the API server to the worker itself
)

// put stores a version of a Deployment. A watch may be behind an answer, and an
// answer behind a watch, which may even have shown that the Deployment is gone.
func (c *deploymentCache) put(d *deployment, from source) {
	c.mu.Lock()
	previous, seen := c.get(d.key()), c.now()
	if from == fromAnswer && previous == nil || from != fromList && previous != nil && revision(previous.resourceVersion) > revision(d.resourceVersion) {
		c.mu.Unlock()
		return
	}
	if from == fromList {
		seen = time.Time{} // nobody knows since when
	}
	look := d.inherit(previous, c.now(), seen)
	c.store.Update(d.key(), d)
	c.mu.Unlock()
	if look {
		c.look(d.key())
	}
}

// reached returns the version that the whole cache has reached, 0 before it is listed.
func (c *deploymentCache) reached() uint64 {
	oldest := uint64(math.MaxUint64)
	for _, s := range c.scopes {
		oldest = min(oldest, revision(s.reflector.LastSyncResourceVersion()))
	}
	return oldest
}

// revision is a resourceVersion as a number, 0 for one that is none.
// https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions
func revision(resourceVersion string) uint64 {
	n, _ := strconv.ParseUint(resourceVersion, 10, 64)
	return n
}

// scope is what one reflector lists, watches and stores: all namespaces, or one.
type scope struct {
	cache.ListWatch
	cache     *deploymentCache
	namespace string // "" for all
	client    dynamic.ResourceInterface
	reflector *cache.Reflector
	forbidden context.CancelCauseFunc // ends the cache's run
	watched   bool                    // a watch is open
	unwatched time.Time               // when the last one ended, or the present one began; zero: never
}

// IsWatchListSemanticsUnSupported keeps the reflector from streaming lists: those
// would bring whole Deployments into its memory.
func (s *scope) IsWatchListSemanticsUnSupported() bool { return true }

// list reads all pages and returns one complete list of entries. It ignores the
// options: the reflector would list without a limit after a 410, and its pager
// would take the rest in one piece when a continue token expires. Here an expired
// token is an error, and the reflector begins again.
func (s *scope) list(ctx context.Context, _ metav1.ListOptions) (runtime.Object, error) {
	entries := &metav1.List{}
	o := metav1.ListOptions{LabelSelector: s.cache.selector, Limit: listPage}
	for {
		pageCtx, cancel := context.WithTimeout(ctx, requestTimeout)
		page, err := s.client.List(pageCtx, o)
		cancel()
		if err != nil {
			return nil, s.checkForbidden("list", err)
		}
		for i := range page.Items {
			entries.Items = append(entries.Items, runtime.RawExtension{Object: newDeployment(&page.Items[i])})
		}
		entries.ResourceVersion = page.GetResourceVersion()
		if o.Continue = page.GetContinue(); o.Continue == "" {
			return entries, nil
		}
	}
}

// watch starts a watch that ends after watchAge. Stopped without an error, the
// reflector goes on from the last resourceVersion.
func (s *scope) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	o.LabelSelector = s.cache.selector
	ctx, cancel := context.WithCancel(ctx)
	overdue := time.AfterFunc(requestTimeout, cancel)
	stream, err := s.client.Watch(ctx, o)
	overdue.Stop()
	if err != nil {
		cancel()
		return nil, s.checkForbidden("watch", err)
	}
	s.setWatched(true)
	watchesStarted.Inc()
	age := time.AfterFunc(s.cache.watchAge, stream.Stop)
	return agedWatch{stream, func() {
		age.Stop()
		s.setWatched(false)
		cancel()
	}}, nil
}

// agedWatch releases what a watch holds when the reflector stops it, as it does
// with every watch.
type agedWatch struct {
	watch.Interface
	release func()
}

func (w agedWatch) Stop() {
	w.Interface.Stop()
	w.release()
}

func (s *scope) setWatched(open bool) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	s.watched, s.unwatched = open, s.cache.now()
}

// checkForbidden ends run if RBAC forbids a scope that was never watched: only an
// operator can fix that. Later a Role that is being replaced may be missing for a
// moment, and the reflector tries again.
func (s *scope) checkForbidden(verb string, err error) error {
	if !apierrors.IsForbidden(err) {
		return err
	}
	where := cmp.Or(s.namespace, "all namespaces")
	err = fmt.Errorf("RBAC forbids to %s deployments.apps in %s; grant it, or change WORKER_NAMESPACES: %w", verb, where, err)
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if s.unwatched.IsZero() {
		s.forbidden(err)
	}
	return err
}

// Add, Update, Delete, Replace and Resync are cache.ReflectorStore. The dynamic
// client's watches bring nothing but unstructured objects.

func (s *scope) Add(object any) error { return s.Update(object) }

func (s *scope) Update(object any) error {
	watchEventAt.Set(float64(s.cache.now().Unix()))
	s.cache.put(newDeployment(object.(*unstructured.Unstructured)), fromWatch)
	return nil
}

func (s *scope) Delete(object any) error {
	watchEventAt.Set(float64(s.cache.now().Unix()))
	key, err := cache.MetaNamespaceKeyFunc(object)
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	s.cache.store.Delete(key)
	return err
}

// Replace takes a complete list: what is not in it is gone.
func (s *scope) Replace(items []any, _ string) error {
	c := s.cache
	listed := make(map[string]bool, len(items))
	for _, item := range items {
		d := item.(*deployment) // made by list
		listed[d.key()] = true
		c.put(d, fromList)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range c.store.ListKeys() {
		if namespace, _, _ := cache.SplitMetaNamespaceKey(key); !listed[key] && (s.namespace == "" || s.namespace == namespace) {
			c.store.Delete(key)
		}
	}
	c.log.Info("deployments listed", "namespace", s.namespace, "count", len(items))
	return nil
}

func (s *scope) Resync() error { return nil }
