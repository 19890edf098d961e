package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/util/workqueue"
)

const (
	// Flux strips what a field manager whose name begins with kubectl has set.
	fieldManager = "kuberollouttrigger"

	// patchTimeout bounds all that is sent for one workload in one look. An API
	// server waits as long for an admission webhook by default.
	patchTimeout = 10 * time.Second

	// A restart that failed is tried again after minBackoff, doubled each time up
	// to maxBackoff, or when a Retry-After of at most maxRetryAfter says.
	minBackoff    = time.Second
	maxBackoff    = 15 * time.Second
	maxRetryAfter = 5 * time.Minute

	// restartedAtLead is how far a restartedAt in the worker's own form may be
	// ahead: another worker may know a newer T for some milliseconds.
	restartedAtLead = 5 * time.Second

	defaultWindow   = time.Hour        // how long a request counts when WORKER_CATCH_UP is 0
	catchUpInterval = 30 * time.Second // between two reads of the ledger
	catchUpTimeout  = 10 * time.Second // for one
)

// worker restarts what runs an image that was requested. Messages and catch-up both
// end in remember, which queues workloads: one that cannot be patched holds up no
// other. Each is decided about in its turn, from the cache and the newest requests.
type worker struct {
	log      *slog.Logger
	client   dynamic.Interface
	source   *subscriber
	requests *requests
	cache    *workloadCache
	queue    workqueue.TypedDelayingInterface[string]
	backoff  workqueue.TypedRateLimiter[string]
	pace     *rate.Limiter // of WORKER_RESTARTS_PER_MINUTE, unless that is 0
	turns    sync.Mutex
	cfg      workerConfig
	rules    rules
	now      func() time.Time

	catchUpDue *time.Timer
	caughtUp   health
	eventless  atomic.Bool // an Event could not be written, and the log says so
	recording  atomic.Int64
	notBefore  sync.Map // when a workload that failed or is paced is due again, a time.Time by key

	alive    atomic.Bool // the worker has caught up since it last reported to be alive
	reported health
	mu       sync.Mutex // guards followed
	followed map[string]*followed
}

func newWorker(cfg workerConfig, client dynamic.Interface, source *subscriber, log *slog.Logger, now func() time.Time) *worker {
	w := &worker{
		log:        log.With("cluster", cfg.ClusterName),
		client:     client,
		source:     source,
		cfg:        cfg,
		rules:      rules{window: cmp.Or(cfg.CatchUp, defaultWindow), interval: cfg.RestartInterval},
		now:        now,
		queue:      workqueue.NewTypedDelayingQueue[string](),
		backoff:    workqueue.NewTypedItemExponentialFailureRateLimiter[string](minBackoff, maxBackoff),
		catchUpDue: time.NewTimer(catchUpInterval),
		requests:   newRequests(now),
		pace:       rate.NewLimiter(rate.Limit(cfg.RestartsPerMinute)/60, 1),
		followed:   map[string]*followed{},
	}
	w.caughtUp.set(errors.New("not caught up yet"))
	w.cache = newWorkloadCache(cfg, client, w.log, now, w.look)
	return w
}

// run works until ctx is done, and then finishes the patches in flight. The ledger
// has the rest for the next worker. Its error is a scope that can never be watched.
func (w *worker) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() { w.source.run(ctx, w.handleMessage, w.requestCatchUp) })
	wg.Go(func() { w.catchUpLoop(ctx) })
	wg.Go(func() { w.reportLoop(ctx) })
	w.cache.end = cancel
	for _, s := range w.cache.scopes {
		wg.Go(func() { s.reflector.RunWithContext(ctx) })
	}
	for range w.cfg.Concurrency {
		wg.Go(func() { w.reconcileLoop(ctx) })
	}
	<-ctx.Done()
	w.queue.ShutDown()
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// ready is nil while the worker misses no request and no workload.
func (w *worker) ready() error {
	return cmp.Or(w.cache.ready(), w.source.subscribed.get(), w.caughtUp.get())
}

// measure sets the gauges that are read when asked for.
func (w *worker) measure() {
	cached := map[string]int{}
	for _, d := range w.cache.store.List() {
		cached[d.(*workload).kind.name]++
	}
	for _, k := range kinds {
		workerMetrics.GetOrCreateGauge(fmt.Sprintf(metricPrefix+"workloads{kind=%q}", k.name), nil).Set(float64(cached[k.name]))
	}
	queueLength.Set(float64(w.queue.Len()))
}

// handleMessage takes a message of the PubSub channel. It does not block.
func (w *worker) handleMessage(text string) {
	m, err := parseMessage([]byte(text))
	if err == nil {
		at := cmp.Or(m.RequestedAt, w.requests.moment().next()) // 0: typed by hand
		err = w.remember(m.Image, request{at: at, made: w.now(), announced: true})
	}
	if err != nil {
		messages("ignored").Inc()
		w.log.Warn("message ignored", "err", err)
		return
	}
	messages("heard").Inc()
}

// remember keeps the newest request for an image and queues the workloads that
// run it. Its error is a request that web would not have made.
func (w *worker) remember(image string, r request) error {
	if !w.cfg.ImagePrefixes.allows(image) {
		w.follow(image, r)
		return fmt.Errorf("image %s is not under ALLOWED_IMAGE_PREFIX", image)
	}
	if added, err := w.requests.add(image, r); err != nil || !added {
		return err
	}
	if !r.announced {
		caughtUpRequests.Inc()
	}
	running := w.cache.running(image)
	level := slog.LevelInfo
	if !r.announced && len(running) == 0 {
		level = slog.LevelDebug // the ledger may hold thousands that run elsewhere
	}
	log := w.log.With("image", image, "requested_at", formatTime(r.at))
	log.Log(context.Background(), level, "requested", "announced", r.announced, "matched", len(running))
	for _, d := range running {
		if d.image(image).pinned {
			skips(pinnedReason).Inc()
			log.Info("not restarted", "reason", pinnedReason, "namespace", d.namespace, d.kind.attribute(), d.name)
			continue
		}
		w.queue.Add(d.key())
	}
	w.follow(image, r)
	return nil
}

// look queues what the cache calls it with, if it needs a restart.
func (w *worker) look(d *workload) {
	if w.decide(d).verdict != satisfied {
		w.queue.Add(d.key())
	}
}

// requestCatchUp asks for a catch-up at once. It does not block.
func (w *worker) requestCatchUp() { w.catchUpDue.Reset(0) }

// catchUpLoop reads the ledger after each confirmed subscription and catchUpInterval.
// A Valkey that has just started confirms subscriptions, and refuses reads for a while.
func (w *worker) catchUpLoop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.catchUpDue.C:
		}
		w.catchUpDue.Reset(catchUpInterval) // before it: a request meanwhile counts
		err := w.catchUp(ctx)
		if changed := w.caughtUp.set(err); changed && err != nil && ctx.Err() == nil {
			w.log.Warn("catch-up failed, trying again", "err", err)
		}
		if err != nil {
			w.catchUpDue.Reset(valkeyRetryDelay)
			continue
		}
		caughtUpAt.Set(float64(w.now().Unix()))
	}
}

// catchUp remembers what the ledger has within the window. It never works by one
// mark for all images, which a late entry would fall below.
func (w *worker) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	asked := w.now()
	valkeyNow, err := w.source.time(ctx)
	if err != nil {
		return err
	}
	valkeyNow = valkeyNow.Add(w.now().Sub(asked) / 2) // as if both ways took as long
	// Late enough that expiry is logged, and reported.
	w.requests.setClock(valkeyNow, max(w.rules.window, reportAge)+2*maxRetryAfter)
	w.alive.Store(true)
	if w.cfg.CatchUp == 0 {
		return nil // PubSub only
	}
	m, entries := w.requests.moment(), 0
	err = w.source.ledger(ctx, m.clock.Add(-w.rules.window), func(entry message) {
		entries++
		image, err := parseImage(entry.Image)
		if err == nil {
			age := m.clock.Sub(time.UnixMicro(entry.RequestedAt))
			err = w.remember(image, request{at: entry.RequestedAt, made: m.now.Add(-age)})
		}
		if err != nil {
			w.log.Debug("ledger entry ignored", "err", err)
		}
	})
	if err == nil {
		w.log.Debug("caught up", "entries", entries)
	}
	return err
}

func (w *worker) reconcileLoop(ctx context.Context) {
	for key, shutdown := w.queue.Get(); !shutdown; key, shutdown = w.queue.Get() {
		if ctx.Err() == nil {
			w.reconcile(ctx, key)
		}
		w.queue.Done(key)
	}
}

// reconcile gives one workload the restart that it needs, if any. The resourceVersion
// keeps crossing requests of several workers apart. After a conflict, a patch has it only
// if another worker was faster: in a rollout it changes several times a second.
func (w *worker) reconcile(ctx context.Context, key string) {
	d := w.cache.get(key)
	wait, paced := w.waiting(key)
	if wait > 0 && d != nil {
		w.queue.AddAfter(key, wait)
		return
	}
	// A patch on its way when the worker is stopped is finished.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patchTimeout)
	defer cancel()
	versioned := w.backoff.NumRequeues(key) == 0
	pacing := w.cfg.RestartsPerMinute > 0 && versioned && !paced // which has had to wait for its turn
	for fetched := false; d != nil; fetched = true {
		next := w.decide(d)
		if next.verdict == due && pacing && !fetched {
			next = w.takeTurn(next)
		}
		var err error
		if next.verdict == due {
			err = w.patch(ctx, d, next, versioned)
		}
		if !outdated(err) || fetched && !versioned {
			w.settle(d, next, err)
			return
		}
		present, err := w.fetch(ctx, d)
		if err != nil {
			w.settle(d, next, err)
			return
		}
		versioned = versioned && present != nil && present.restartedAt != d.restartedAt
		d = present
	}
	w.done(key) // it is gone
}

// takeTurn defers a restart to the next turn of WORKER_RESTARTS_PER_MINUTE. A request that
// would expire before its turn takes none, so that no other waits behind it.
func (w *worker) takeTurn(next decision) decision {
	w.turns.Lock() // a turn is given back only if nobody has taken a later one
	defer w.turns.Unlock()
	turn, left := w.pace.Reserve(), w.rules.window-w.now().Sub(next.request.made)
	next.wait, next.hasTurn = turn.Delay(), true
	if next.wait >= left {
		turn.Cancel()
		next.wait, next.hasTurn = left, false
	}
	if next.wait > 0 {
		next.verdict, next.reason = deferred, paceReason
	}
	return next
}

// fetch returns the present version of a workload, nil if there is none. It
// lists, because the worker has no right to get.
func (w *worker) fetch(ctx context.Context, d *workload) (*workload, error) {
	list, err := w.client.Resource(d.kind.resource).Namespace(d.namespace).
		List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + d.name, LabelSelector: w.cfg.Selector})
	if err != nil {
		return nil, fmt.Errorf("reading the present version after a conflict: %w", err)
	}
	if len(list.Items) == 0 {
		return nil, nil
	}
	w.cache.put(newWorkload(d.kind, &list.Items[0]), fromAnswer)
	return w.cache.get(d.key()), nil
}

// decide returns the decision on the newest request that d does not satisfy.
func (w *worker) decide(d *workload) (next decision) {
	m := w.requests.moment()
	for _, image := range d.images {
		r, requested := w.requests.get(image.ref)
		if !requested || image.pinned || r.at <= next.request.at {
			continue
		}
		if candidate := w.rules.decide(d, image, r, m); candidate.verdict != satisfied {
			next = candidate
		}
	}
	return next
}

// settle ends a look with a decision against a restart, or with the outcome of a patch.
// Nothing cuts the pause after a failure short.
func (w *worker) settle(d *workload, next decision, err error) {
	key := d.key()
	log := w.log.With("namespace", d.namespace, d.kind.attribute(), d.name,
		"image", next.image.ref, "requested_at", formatTime(next.request.at))
	switch {
	case next.verdict == satisfied:
	case next.verdict == expired && w.backoff.NumRequeues(key) > 0:
		giveUps.Inc()
		log.Error("gave up: the restart failed until the request expired")
	case next.verdict != due:
		if next.verdict == deferred {
			deferrals(next.reason).Inc()
		} else {
			skips(next.reason).Inc()
		}
		log.Info("not restarted", "reason", next.reason)
	case errors.Is(err, errNoEffect):
		ineffectiveRestarts.Inc()
		log.Error("restart had no effect", "err", err)
	case err == nil && w.cfg.DryRun:
		log.Info("would restart")
	case err == nil && next.image.pullPolicy != "":
		log.Warn("restarted", "warning", "imagePullPolicy is "+next.image.pullPolicy+
			": nodes that have the image cached do not pull it again; set it to Always")
	case err == nil:
		log.Info("restarted")
	default:
		retries.Inc()
		delay := w.backoff.When(key)
		if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
			delay = max(delay, min(time.Duration(seconds)*time.Second, maxRetryAfter))
		}
		log.Warn("restart failed, trying again", "err", err, "tries", w.backoff.NumRequeues(key), "retry_in", delay.String())
		w.notBefore.Store(key, w.now().Add(delay))
		w.queue.AddAfter(key, delay)
		return
	}
	w.done(key)
	if next.reason == paceReason && next.hasTurn {
		w.notBefore.Store(key, w.now().Add(next.wait))
	}
	if next.verdict == deferred {
		w.queue.AddAfter(key, next.wait)
	}
}

// waiting returns how long a workload that failed or is paced has to wait, and whether
// it is paced.
func (w *worker) waiting(key string) (wait time.Duration, paced bool) {
	due, waits := w.notBefore.Load(key)
	at, _ := due.(time.Time)
	return at.Sub(w.now()), waits && w.backoff.NumRequeues(key) == 0
}

// done forgets the failures of a workload, and that it is paced.
func (w *worker) done(key string) {
	w.backoff.Forget(key)
	w.notBefore.Delete(key)
}

// errNoEffect is a patch that the API server accepted without its effect.
var errNoEffect = errors.New("the API server's answer lacks what the patch sets; a webhook may remove it")

// patch restarts d as `kubectl rollout restart` does. Because of T, any number of workers
// send the same. The uid keeps it from a new workload of the same name.
func (w *worker) patch(ctx context.Context, d *workload, next decision, versioned bool) error {
	value, preconditions := d.kind.value(next.request.at), map[string]string{"uid": string(d.uid)}
	if versioned {
		preconditions["resourceVersion"] = d.resourceVersion
	}
	options := metav1.PatchOptions{FieldManager: fieldManager}
	if w.cfg.DryRun {
		options.DryRun = []string{metav1.DryRunAll}
	}
	answer, err := w.client.Resource(d.kind.resource).Namespace(d.namespace).
		Patch(ctx, d.name, types.MergePatchType, d.kind.patch(value, preconditions), options)
	if apierrors.IsConflict(err) {
		conflicts.Inc()
	}
	if err != nil {
		return err
	}
	patched := newWorkload(d.kind, answer)
	w.cache.put(patched, fromAnswer) // of a dry run too: later entries inherit the restart
	if patched.restartedAt != value {
		return errNoEffect
	}
	if w.cfg.DryRun {
		return nil
	}
	restarts(d.kind.name).Inc()
	restartSeconds.Update(w.requests.moment().age(next.request.at).Seconds())
	if w.cfg.Events {
		go w.record(d, next)
	}
	return nil
}

// outdated reports whether a patch was refused because the workload has changed, is gone,
// or has another uid, which the API server calls a change of an immutable field.
func outdated(err error) bool {
	return apierrors.IsConflict(err) || apierrors.IsNotFound(err) ||
		apierrors.IsInvalid(err) && strings.Contains(err.Error(), "metadata.uid")
}
