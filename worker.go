package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/util/workqueue"
)

const (
	// A patch that failed is tried again after minBackoff, doubled each time up
	// to maxBackoff. The first tries are quick because most failures are
	// conflicts with an update that the watch is about to bring.
	minBackoff = 10 * time.Millisecond
	maxBackoff = 15 * time.Second
	// placeDelay is how long a retry waits that found no place.
	placeDelay = 250 * time.Millisecond
	// maxRetryAfter bounds what a Retry-After of the API server is believed.
	maxRetryAfter = 5 * time.Minute

	// retryWindow is how long a request is retried when WORKER_CATCH_UP is 0.
	retryWindow = time.Hour

	// catchUpEvery is the period of catch-up while nothing is wrong.
	catchUpEvery = 30 * time.Second
	catchUpLimit = 10 * time.Second // for one read
)

// request is the newest time that an image was asked for.
type request struct {
	// at is T: microseconds since 1970 on Valkey's clock.
	at int64
	// heard is when worker heard the announcement; zero if it found the request
	// on record.
	heard time.Time
}

// worker restarts what runs an image that was asked for.
//
// Announcements and catch-up both end in note, which remembers the newest T of
// an image and queues the Deployments that run it now. The queue is by
// Deployment, so that one which cannot be patched holds up no other, and two
// images of one Deployment are never patched against each other. What a
// Deployment is owed is worked out when its turn comes, from the cache and the
// newest T's: nothing is carried over from an earlier try.
type worker struct {
	log      *slog.Logger
	client   dynamic.Interface
	source   *subscriber
	cache    *deploymentCache
	queue    workqueue.TypedRateLimitingInterface[types.NamespacedName]
	backoff  workqueue.TypedRateLimiter[types.NamespacedName]
	prefixes imagePrefixes
	cfg      workerConfig
	window   time.Duration // how long a request counts
	now      func() time.Time
	kick     chan struct{} // asks for a catch-up
	retrying chan struct{} // a place for each retry in flight

	ahead    atomic.Int64          // how far Valkey's clock is ahead of ours, in ns
	caughtUp atomic.Pointer[error] // why the last catch-up failed; nil: it did not

	mu       sync.Mutex
	requests map[string]request // by image
	// conflicts are the Deployments whose record was outdated when it was
	// patched. They wait for the watch rather than for the backoff.
	conflicts map[types.NamespacedName]struct{}
	// notBefore is what a Retry-After asked for. The queue alone would come
	// sooner, for a newer request or an older backoff.
	notBefore map[types.NamespacedName]time.Time
}

func newWorker(cfg workerConfig, prefixes imagePrefixes, client dynamic.Interface, source *subscriber, log *slog.Logger, now func() time.Time) *worker {
	w := &worker{
		log:       log.With("cluster", cfg.ClusterName),
		client:    client,
		source:    source,
		prefixes:  prefixes,
		cfg:       cfg,
		window:    cfg.CatchUp,
		now:       now,
		kick:      make(chan struct{}, 1),
		requests:  map[string]request{},
		conflicts: map[types.NamespacedName]struct{}{},
		notBefore: map[types.NamespacedName]time.Time{},
		retrying:  make(chan struct{}, max(1, cfg.Concurrency/2)),
		backoff:   workqueue.NewTypedItemExponentialFailureRateLimiter[types.NamespacedName](minBackoff, maxBackoff),
	}
	w.queue = workqueue.NewTypedRateLimitingQueue(w.backoff)
	if w.window == 0 {
		w.window = retryWindow
	}
	w.cache = newDeploymentCache(w.log, now, w.observed)
	return w
}

// run works until ctx is done, and then finishes the patches in flight; what is
// still queued is on record for the next worker. Its error is a scope that RBAC
// forbids.
func (w *worker) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { w.source.run(ctx, w.announced, w.catchUpSoon) })
	wg.Go(func() { w.catchUpLoop(ctx) })
	var err error
	wg.Go(func() {
		defer cancel()
		err = w.cache.run(ctx, w.client, w.cfg.Namespaces, w.cfg.Selector)
	})
	for range w.cfg.Concurrency {
		wg.Go(func() { w.patchLoop(ctx) })
	}
	<-ctx.Done()
	w.queue.ShutDown()
	wg.Wait()
	return err
}

// ready is nil while the cache is synced and nothing that is asked for can be
// missed.
func (w *worker) ready() error {
	if !w.cache.synced() {
		return errors.New("deployments are not listed yet")
	}
	if err := w.source.ready(); err != nil {
		return err
	}
	if err := w.caughtUp.Load(); err != nil {
		return *err
	}
	return nil
}

// clock is Valkey's clock, as the last catch-up saw it.
func (w *worker) clock() time.Time {
	return w.now().Add(time.Duration(w.ahead.Load()))
}

// announced takes a message of the PubSub channel. It does not block.
func (w *worker) announced(message string) {
	e, err := parseEvent([]byte(message))
	if err == nil && !w.prefixes.allows(e.Image) {
		err = fmt.Errorf("image %s is not under ALLOWED_IMAGE_PREFIX", e.Image)
	}
	if err == nil && w.tooFarAhead(e.RequestedAt) {
		err = fmt.Errorf("requestedAt %d of image %s is more than %s ahead of valkey's clock", e.RequestedAt, e.Image, keepRecorded)
	}
	if err != nil {
		w.log.Warn("message ignored", "err", err)
		return
	}
	if e.RequestedAt == 0 { // typed by hand
		e.RequestedAt = w.clock().UnixMicro()
	}
	w.note(e, w.now())
}

// tooFarAhead says whether T is a day or more in the future. A clock of Valkey's
// that was wrong and is right again can leave one behind. If worker wrote it, it
// would swallow every request until then.
func (w *worker) tooFarAhead(at int64) bool {
	return at > w.clock().Add(keepRecorded).UnixMicro()
}

// note remembers a request and queues the Deployments that run its image. The
// same T does nothing the second time, except that an announcement counts for
// more than a record.
func (w *worker) note(e event, heard time.Time) {
	w.mu.Lock()
	before, known := w.requests[e.Image]
	if !known && len(w.requests) >= 2*maxRecorded { // not web's doing: it keeps to maxRecorded a day
		w.mu.Unlock()
		w.log.Warn("request ignored: too many images to remember", "image", e.Image, "requested_at", formatTime(e.RequestedAt))
		return
	}
	if w.tooFarAhead(before.at) { // heard while Valkey's clock was wrong
		before = request{}
	}
	if e.RequestedAt < before.at || e.RequestedAt == before.at && (heard.IsZero() || !before.heard.IsZero()) {
		w.mu.Unlock()
		return
	}
	w.requests[e.Image] = request{e.RequestedAt, heard}
	w.mu.Unlock()

	running := w.cache.running(e.Image)
	level := slog.LevelInfo
	if heard.IsZero() && len(running) == 0 {
		level = slog.LevelDebug // a record may hold thousands that run elsewhere
	}
	w.log.Log(context.Background(), level, "requested", "image", e.Image, "requested_at", formatTime(e.RequestedAt),
		"announced", !heard.IsZero(), "matched", len(running))
	for _, d := range running {
		if pinned, _ := d.image(e.Image); pinned {
			w.log.Info("not restarted", "reason", "pinned by digest", "namespace", d.Namespace, "deployment", d.Name,
				"image", e.Image, "requested_at", formatTime(e.RequestedAt))
			continue
		}
		w.queue.Add(d.key())
	}
}

// observed queues a Deployment that is new to the cache, or resumed, if any of
// its images was asked for, and one whose outdated record was refused, now that
// there is a newer one.
func (w *worker) observed(d *deployment, appeared bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	key := d.key()
	_, again := w.conflicts[key]
	delete(w.conflicts, key)
	for _, image := range d.images {
		_, asked := w.requests[image.ref]
		again = again || appeared && asked && !image.pinned
	}
	if again {
		w.queue.Add(key)
	}
}

// catchUpSoon asks for a catch-up. It does not block.
func (w *worker) catchUpSoon() {
	select {
	case w.kick <- struct{}{}:
	default: // one is due already
	}
}

// catchUpLoop reads the record after each confirmed subscription and every
// catchUpEvery, until ctx is done. PubSub forgets what nobody heard; the record
// does not.
func (w *worker) catchUpLoop(ctx context.Context) {
	tick := time.NewTicker(catchUpEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.kick:
		case <-tick.C:
		}
		for {
			err := w.catchUp(ctx)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				w.caughtUp.Store(nil)
				break
			}
			if before := w.caughtUp.Swap(&err); before == nil || (*before).Error() != err.Error() {
				w.log.Warn("catch-up failed, trying again", "err", err)
			}
			// Valkey, just restarted, confirms subscriptions while reads still
			// answer LOADING.
			sleep(ctx, retryDelay(err))
		}
	}
}

// catchUp notes what is on record within the window. It does so image by image,
// never by one mark for all, below which a late entry would fall. What no longer
// counts is forgotten, also with WORKER_CATCH_UP=0, which reads nothing.
func (w *worker) catchUp(ctx context.Context) error {
	if w.cfg.CatchUp == 0 {
		w.forget(w.clock())
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpLimit)
	defer cancel()
	events, clock, err := w.source.recorded(ctx, w.window)
	if err != nil {
		return err
	}
	w.ahead.Store(int64(clock.Sub(w.now())))
	w.forget(clock)
	for _, e := range events { // the newest first: who runs several needs no more
		w.found(e)
	}
	w.log.Debug("caught up", "recorded", len(events))
	return nil
}

// found notes one recorded request, trusted no more than a message.
func (w *worker) found(e event) {
	image, err := parseImage(e.Image)
	if err != nil || !w.prefixes.allows(image) || w.tooFarAhead(e.RequestedAt) {
		w.log.Debug("recorded request ignored", "image", cut(e.Image), "requested_at", e.RequestedAt)
		return
	}
	w.note(event{image, e.RequestedAt}, time.Time{})
}

// forget drops requests that no longer count, so that memory is bounded by what
// was asked for within the window.
func (w *worker) forget(clock time.Time) {
	now := w.now()
	w.mu.Lock()
	defer w.mu.Unlock()
	for image, r := range w.requests {
		// One that cannot be delivered is kept a little longer, so that it is
		// given up, and said to be, when its turn comes.
		if r.age(now, clock) > w.window+2*maxRetryAfter {
			delete(w.requests, image)
		}
	}
}

// patchLoop works off the queue until ctx is done.
func (w *worker) patchLoop(ctx context.Context) {
	for ctx.Err() == nil {
		key, shutdown := w.queue.Get()
		if shutdown {
			return
		}
		w.reconcile(ctx, key)
		w.queue.Done(key)
	}
}

// reconcile gives one Deployment the restart that it is owed, if any.
func (w *worker) reconcile(ctx context.Context, key types.NamespacedName) {
	w.mu.Lock()
	delete(w.conflicts, key)
	early := w.notBefore[key].Sub(w.now())
	w.mu.Unlock()
	d := w.cache.get(key)
	if d == nil {
		w.done(key)
		return
	}
	if early > 0 {
		w.queue.AddAfter(key, early)
		return
	}
	if w.queue.NumRequeues(key) > 0 {
		// What fails may take its time to do so. It leaves places for the rest.
		select {
		case w.retrying <- struct{}{}:
			defer func() { <-w.retrying }()
		default:
			w.queue.AddAfter(key, placeDelay)
			return
		}
	}
	image, r, v := w.owed(d)
	log := w.log.With("namespace", d.Namespace, "deployment", d.Name, "image", image, "requested_at", formatTime(r.at))
	switch v {
	case verdictSatisfied:
		w.done(key)
	case verdictExpired:
		if w.queue.NumRequeues(key) > 0 {
			log.Error("gave up: the restart failed until the request was too old", "window", w.window.String())
			w.done(key)
			return
		}
		fallthrough
	case verdictDeleting, verdictPaused:
		log.Info("not restarted", "reason", v.String())
		w.done(key)
	case verdictRestart:
		// A patch that is on its way when worker is stopped is finished.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patchTimeout)
		defer cancel()
		w.settle(key, log, d, image, w.patch(ctx, d, r.at))
	}
}

// settle logs the outcome of a patch and queues the Deployment again if it has
// to be tried again.
func (w *worker) settle(key types.NamespacedName, log *slog.Logger, d *deployment, image string, err error) {
	switch {
	case err == nil:
		if _, cachedBy := d.image(image); cachedBy != "" {
			log.Warn("restarted", "warning", fmt.Sprintf("imagePullPolicy %s: a node that has the image will not pull it again; set it to Always", cachedBy))
		} else {
			log.Info("restarted")
		}
		w.done(key)
	case apierrors.IsConflict(err), apierrors.IsNotFound(err) && w.queue.NumRequeues(key) < 5:
		// Somebody was faster, perhaps another worker, or deleted it. The watch
		// brings what they did.
		log.Debug("changed meanwhile, looking again")
		w.mu.Lock()
		w.conflicts[key] = struct{}{}
		w.mu.Unlock()
		w.queue.AddRateLimited(key) // the newer record may be there already
	default:
		log.Warn("restart failed, trying again", "err", err, "tries", w.queue.NumRequeues(key)+1)
		delay := w.backoff.When(key)
		if later := (*retryAfterError)(nil); errors.As(err, &later) {
			delay = max(delay, min(later.delay, maxRetryAfter))
			w.mu.Lock()
			w.notBefore[key] = w.now().Add(delay)
			w.mu.Unlock()
		}
		w.queue.AddAfter(key, delay)
	}
}

// done forgets what a Deployment that is owed nothing more has been through.
func (w *worker) done(key types.NamespacedName) {
	w.queue.Forget(key)
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.notBefore, key)
}

// owed returns what d is owed: the newest request for one of its images that
// it has not restarted for, and what is to be done about it.
func (w *worker) owed(d *deployment) (image string, r request, v verdict) {
	now, clock := w.now(), w.clock()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range d.images {
		candidate, ok := w.requests[c.ref]
		if !ok || c.pinned || candidate.at <= r.at || w.tooFarAhead(candidate.at) {
			continue
		}
		if verdict := decide(d, candidate, now, clock, w.window); verdict != verdictSatisfied {
			image, r, v = c.ref, candidate, verdict
		}
	}
	return image, r, v
}
