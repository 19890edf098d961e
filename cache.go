package main

import (
	"cmp"
	"context"
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
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
)

const (
	listPage = 250 // workloads in one page of a list

	// requestTimeout bounds one page of a list, and the start of a watch: a proxy
	// may hold either forever.
	requestTimeout = 30 * time.Second

	// watchAge is when a watch is restarted from where it ended: one that brings
	// nothing cannot be told from one that is stale.
	watchAge = 2 * time.Minute

	watchGrace = 5 * time.Second // without a watch, before the worker is not ready

	imageIndex = "image"
)

// request is the newest request for an image.
type request struct {
	at        int64     // T
	made      time.Time // when, as far as the worker knows, on its own clock
	announced bool      // its message arrived, when it was made; otherwise it was caught up
}

// latest is when the request was made by the later of T and the worker's clock, for
// comparisons with what other clocks have written.
func (r request) latest() time.Time { return time.UnixMicro(max(r.at, r.made.UnixMicro())) }

// requests is what the worker remembers of the ledger and of messages.
type requests struct {
	now func() time.Time

	mu      sync.Mutex
	byImage map[string]request
	newest  int64
	valkey  time.Time // Valkey's clock when it was read last; the worker's own until then
	readAt  time.Time // the worker's clock then
}

func newRequests(now func() time.Time) *requests {
	return &requests{now: now, byImage: map[string]request{}, valkey: now(), readAt: now()}
}

// clock is Valkey's clock, as far as the worker knows.
func (q *requests) clock() time.Time { return q.valkey.Add(q.now().Sub(q.readAt)) }

// tooFarAhead reports whether Valkey's clock was wrong when it gave T. Remembered,
// it would satisfy every request for more than a day.
func (q *requests) tooFarAhead(at int64) bool {
	return at > q.clock().Add(ledgerAge).UnixMicro()
}

// setClock takes Valkey's clock, and forgets the requests that are older than age, or
// too far ahead.
func (q *requests) setClock(valkey time.Time, age time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.valkey, q.readAt, q.newest = valkey, q.now(), 0
	for image, r := range q.byImage {
		if q.now().Sub(r.made) > age || q.tooFarAhead(r.at) {
			delete(q.byImage, image)
		} else {
			q.newest = max(q.newest, r.at)
		}
	}
}

// add remembers a request if it is the newest for its image, or if its message
// arrives after it was caught up.
func (q *requests) add(image string, r request) (added bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	previous, known := q.byImage[image]
	switch {
	case q.tooFarAhead(r.at):
		return false, fmt.Errorf("requestedAt %d of image %s is more than %s ahead", r.at, image, ledgerAge)
	case r.at < previous.at || r.at == previous.at && (!r.announced || previous.announced):
		return false, nil
	case !known && len(q.byImage) >= 2*maxLedger: // web keeps to maxLedger
		return false, fmt.Errorf("image %s exceeds the %d that are remembered", image, 2*maxLedger)
	}
	q.byImage[image] = r
	q.newest = max(q.newest, r.at)
	return true, nil
}

func (q *requests) get(image string) (r request, known bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	r, known = q.byImage[image]
	return r, known
}

func (q *requests) moment() moment {
	q.mu.Lock()
	defer q.mu.Unlock()
	now, valkey := q.now(), q.clock()
	earlier := time.UnixMicro(min(now.UnixMicro(), valkey.UnixMicro()))
	return moment{now: now, valkey: valkey, clock: earlier, newest: q.newest}
}

// workloadCache has the workloads of all scopes, indexed by image.
type workloadCache struct {
	log      *slog.Logger
	selector string // WORKER_SELECTOR
	scopes   []*scope
	watchAge time.Duration
	now      func() time.Time
	end      context.CancelCauseFunc // ends the worker's run, because of a scope that can never be watched
	// look is called with a workload that is new to the cache, was resumed, left OnDelete,
	// or runs another image. It must not block.
	look func(*workload)

	mu    sync.Mutex // held while an entry is replaced and looked at, and for the scopes' state
	store cache.ThreadSafeStore
}

// newWorkloadCache makes a scope for each kind in each of WORKER_NAMESPACES, so that
// namespaced Roles suffice, or in all namespaces.
func newWorkloadCache(cfg workerConfig, client dynamic.Interface, log *slog.Logger, now func() time.Time, look func(*workload)) *workloadCache {
	c := &workloadCache{log: log, selector: cfg.Selector, watchAge: watchAge, now: now, look: look}
	c.store = cache.NewThreadSafeStore(cache.Indexers{imageIndex: func(entry any) (refs []string, err error) {
		for _, image := range entry.(*workload).images {
			refs = append(refs, image.ref)
		}
		return refs, nil
	}}, cache.Indices{})
	namespaces := cfg.Namespaces
	if len(namespaces) == 0 {
		namespaces = []string{metav1.NamespaceAll}
	}
	for _, k := range cfg.Kinds {
		watchesStarted(k.name)
		for _, namespace := range namespaces {
			s := &scope{cache: c, kind: k, namespace: namespace, client: client.Resource(k.resource).Namespace(namespace)}
			s.ListWithContextFunc, s.WatchFuncWithContext = s.list, s.watch
			s.reflector = cache.NewReflectorWithOptions(s, nil, s, cache.ReflectorOptions{
				Name:            "workloads",
				TypeDescription: k.String(),
				// The default waits up to a minute for an API server that is back. This is
				// less than watchGrace.
				Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 10, Cap: 3 * time.Second},
			})
			c.scopes = append(c.scopes, s)
		}
	}
	return c
}

// ready is nil while every scope is listed and watched.
func (c *workloadCache) ready() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.scopes {
		if s.reflector.LastSyncResourceVersion() == "" {
			return fmt.Errorf("%s are not listed yet", s.kind.resource.Resource)
		}
		if !s.watched && c.now().Sub(s.unwatched) > watchGrace {
			return fmt.Errorf("no watch of %s is open", s.kind.resource.Resource)
		}
	}
	return nil
}

func (c *workloadCache) get(key string) *workload {
	entry, _ := c.store.Get(key)
	d, _ := entry.(*workload)
	return d
}

// running returns the workloads whose pod template names the image.
func (c *workloadCache) running(ref string) (ds []*workload) {
	entries, _ := c.store.ByIndex(imageIndex, ref) // fails only without the index
	for _, entry := range entries {
		ds = append(ds, entry.(*workload))
	}
	return ds
}

const fromWatch, fromAnswer = false, true // for put

// put stores a version of a workload from a watch, or from an answer of the API server to
// the worker itself. A watch may be behind an answer, and an answer behind a watch, which
// may even have shown that the workload is gone.
func (c *workloadCache) put(d *workload, isAnswer bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	previous := c.get(d.key())
	if previous == nil && isAnswer || previous != nil && revision(previous.resourceVersion) > revision(d.resourceVersion) {
		return
	}
	c.set(previous, d, c.now())
}

// set makes d the entry. A restart that is new in it was seen at a time, zero if nobody
// knows when, as after a list.
func (c *workloadCache) set(previous, d *workload, seen time.Time) {
	look := d.inherit(previous, c.now(), seen)
	c.store.Update(d.key(), d)
	if look {
		c.look(d)
	}
}

// reached returns the version that the whole cache has reached, 0 before it is listed.
func (c *workloadCache) reached() uint64 {
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

// scope is what one reflector lists, watches and stores: a kind in one namespace, or all.
type scope struct {
	cache.ListWatch
	cache     *workloadCache
	kind      *kind
	namespace string // "" for all
	client    dynamic.ResourceInterface
	reflector *cache.Reflector
	watched   bool      // a watch is open
	unwatched time.Time // when the last one ended, or the present one began; zero: never
}

// IsWatchListSemanticsUnSupported keeps the reflector from streaming lists: those
// would bring whole objects into its memory.
func (s *scope) IsWatchListSemanticsUnSupported() bool { return true }

// list reads all pages into the cache, and returns the version to watch from. It ignores
// the options: the reflector and its pager list without a limit after a 410, or when a
// continue token expires. Here that is an error, and the reflector begins again.
func (s *scope) list(ctx context.Context, _ metav1.ListOptions) (runtime.Object, error) {
	var entries []*workload
	o := metav1.ListOptions{LabelSelector: s.cache.selector, Limit: listPage}
	for {
		pageCtx, cancel := context.WithTimeout(ctx, requestTimeout)
		page, err := s.client.List(pageCtx, o)
		cancel()
		if err != nil {
			return nil, s.checkPossible("list", err)
		}
		for i := range page.Items {
			entries = append(entries, newWorkload(s.kind, &page.Items[i]))
		}
		if o.Continue = page.GetContinue(); o.Continue == "" {
			s.replace(entries)
			page.Items = nil
			return page, nil
		}
	}
}

// replace takes a complete list: what is not in it is gone.
func (s *scope) replace(entries []*workload) {
	c, listed := s.cache, map[string]bool{}
	for _, d := range entries {
		listed[d.key()] = true
		c.mu.Lock() // not for the whole list: probes have a second
		c.set(c.get(d.key()), d, time.Time{})
		c.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, entry := range c.store.List() {
		d := entry.(*workload)
		if d.kind == s.kind && (s.namespace == "" || s.namespace == d.namespace) && !listed[d.key()] {
			c.store.Delete(d.key())
		}
	}
	c.log.Info(s.kind.resource.Resource+" listed", "namespace", s.namespace, "count", len(entries))
}

// watch starts a watch that ends after watchAge. client-go takes a deadline for a
// normal end, and the reflector goes on from the last resourceVersion.
func (s *scope) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	o.LabelSelector = s.cache.selector
	ctx, cancel := context.WithTimeout(ctx, s.cache.watchAge)
	overdue := time.AfterFunc(requestTimeout, cancel)
	stream, err := s.client.Watch(ctx, o)
	overdue.Stop()
	if err != nil {
		cancel()
		return nil, s.checkPossible("watch", err)
	}
	s.setWatched(true)
	watchesStarted(s.kind.name).Inc()
	return endingWatch{stream, func() {
		s.setWatched(false)
		cancel()
	}}, nil
}

// endingWatch tells when the reflector stops it, as it does with every watch.
type endingWatch struct {
	watch.Interface
	ended func()
}

func (w endingWatch) Stop() {
	w.Interface.Stop()
	w.ended()
}

func (s *scope) setWatched(open bool) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	s.watched, s.unwatched = open, s.cache.now()
}

// checkPossible ends the run if a scope that was never watched is forbidden or unknown:
// only an operator can fix that. Later, a Role may be missing while it is replaced.
func (s *scope) checkPossible(verb string, err error) error {
	switch where := cmp.Or(s.namespace, "all namespaces"); {
	case apierrors.IsForbidden(err):
		err = fmt.Errorf("RBAC forbids to %s %s in %s; grant it, or change WORKER_NAMESPACES or WORKER_KINDS: %w", verb, s.kind, where, err)
	case apierrors.IsNotFound(err):
		err = fmt.Errorf("the cluster does not know %s; install its definition, or change WORKER_KINDS: %w", s.kind, err)
	default:
		return err
	}
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if s.unwatched.IsZero() {
		s.cache.end(err)
	}
	return err
}

// Add, Update, Delete, Replace and Resync are cache.ReflectorStore. The dynamic
// client's watches bring nothing but unstructured objects.

func (s *scope) Add(object any) error        { return s.Update(object) }
func (s *scope) Replace([]any, string) error { return nil } // list has done it
func (s *scope) Resync() error               { return nil }

func (s *scope) Update(object any) error {
	watchEventAt.Set(float64(s.cache.now().Unix()))
	s.cache.put(newWorkload(s.kind, object.(*unstructured.Unstructured)), fromWatch)
	return nil
}

func (s *scope) Delete(object any) error {
	watchEventAt.Set(float64(s.cache.now().Unix()))
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	s.cache.store.Delete(newWorkload(s.kind, object.(*unstructured.Unstructured)).key())
	return nil
}
