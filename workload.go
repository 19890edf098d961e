package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// kind is a kind of workload that the worker can restart. Nothing else knows how
// they differ. The pod template is at spec.template in all of them.
type kind struct {
	name        string
	resource    schema.GroupVersionResource
	restartedAt []string // path of the field that a restart sets to T
	unit        int64    // T is rounded up to a multiple of it, in microseconds
	// rollout reads a status, which must be about the present generation.
	rollout func(spec, status map[string]any) (done, failing bool)
}

// restartedAtAnnotation is what `kubectl rollout restart` sets too.
const restartedAtAnnotation = "kubectl.kubernetes.io/restartedAt"

var (
	podAnnotation = []string{"spec", "template", "metadata", "annotations", restartedAtAnnotation}
	apps          = schema.GroupVersion{Group: "apps", Version: "v1"}
	argo          = schema.GroupVersion{Group: "argoproj.io", Version: "v1alpha1"}

	kinds = []*kind{
		{"Deployment", apps.WithResource("deployments"), podAnnotation, 1, deploymentRollout},
		{"StatefulSet", apps.WithResource("statefulsets"), podAnnotation, 1, statefulSetRollout},
		{"DaemonSet", apps.WithResource("daemonsets"), podAnnotation, 1, daemonSetRollout},
		// Argo compares restartAt with when pods were created, which is in whole seconds.
		{"Rollout", argo.WithResource("rollouts"), []string{"spec", "restartAt"}, time.Second.Microseconds(), argoRollout},
	}
)

func kindNames() (names []string) {
	for _, k := range kinds {
		names = append(names, k.name)
	}
	return names
}

// String is the kind's name in WORKER_KINDS.
func (k *kind) String() string { return k.resource.GroupResource().String() }

// attribute is what log lines call the name of a workload.
func (k *kind) attribute() string { return strings.ToLower(k.name) }

func (k *kind) roundUp(at int64) int64 { return (at + k.unit - 1) / k.unit * k.unit }

// value is what a restart for T sets.
func (k *kind) value(at int64) string { return formatTime(k.roundUp(at)) }

// patch returns a JSON merge patch that sets the value, with preconditions.
func (k *kind) patch(value string, preconditions map[string]string) []byte {
	var body any = value
	for _, name := range slices.Backward(k.restartedAt) {
		body = map[string]any{name: body}
	}
	body.(map[string]any)["metadata"] = preconditions
	text, _ := json.Marshal(body) // strings always can be
	return text
}

// The first three follow `kubectl rollout status`. Only Deployments have a deadline.

func deploymentRollout(spec, status map[string]any) (done, failing bool) {
	for _, condition := range children(status, "conditions") {
		failing = failing || condition["type"] == "Progressing" && condition["reason"] == "ProgressDeadlineExceeded"
	}
	updated := number(status, "updatedReplicas")
	done = updated >= number(spec, "replicas") && number(status, "replicas") <= updated &&
		number(status, "availableReplicas") >= updated
	return done, failing
}

func statefulSetRollout(spec, status map[string]any) (done, failing bool) {
	replicas := number(spec, "replicas")
	updating := replicas - number(child(child(spec, "updateStrategy"), "rollingUpdate"), "partition")
	return number(status, "readyReplicas") >= replicas && number(status, "updatedReplicas") >= updating, false
}

func daemonSetRollout(_, status map[string]any) (done, failing bool) {
	desired := number(status, "desiredNumberScheduled")
	return number(status, "updatedNumberScheduled") >= desired && number(status, "numberAvailable") >= desired, false
}

// https://argo-rollouts.readthedocs.io/en/stable/features/restart/
func argoRollout(spec, status map[string]any) (done, failing bool) {
	restarted := !instant(status, "restartedAt").Before(instant(spec, "restartAt"))
	return status["phase"] == "Healthy" && restarted, status["phase"] == "Degraded"
}

// number and instant are zero if there is none.

func number(object map[string]any, name string) int64 {
	n, _ := object[name].(int64)
	return n
}

func instant(object map[string]any, name string) time.Time {
	text, _ := object[name].(string)
	at, _ := time.Parse(time.RFC3339, text)
	return at
}

// workload is an entry of the cache. It never changes; a newer one replaces it.
type workload struct {
	kind            *kind
	namespace, name string
	uid             types.UID
	resourceVersion string
	created         time.Time // on the API server's clock, as is updated
	updated         time.Time // newest change by a manager of the pod template's spec
	deleting        bool
	paused          bool
	onDelete        bool // the update strategy restarts no pod by itself
	images          []usedImage
	rollout         rolloutState // complete, progressing or failed
	restartedAt     string       // the value of the kind's field
	newestRestart   string       // the newest value that was made or seen; GitOps tools reset the field
	restartedSince  time.Time    // when that was, on the worker's clock; zero if unknown, as after a list
}

// usedImage is an image that a pod template names, once however often it does.
type usedImage struct {
	ref        string    // canonical
	pinned     bool      // each use has a digest
	pullPolicy string    // one that lets nodes keep a cached image, if a use has one
	cachedAt   time.Time // when the cache first had it here, on the worker's clock
	// addedAt is when the workload was created with the image or set to it, on the API
	// server's clock and less the tolerance.
	addedAt time.Time
}

// Valkey's clock and the API server's may differ. A workload counts as created, or as
// set to an image, after a request only if it was so by more than these.
const (
	createdTolerance = time.Minute
	updatedTolerance = 10 * time.Second
)

func (d *workload) key() string { return d.kind.name + "/" + d.namespace + "/" + d.name }

// image returns what the workload says about an image, nil if it is not there.
func (d *workload) image(ref string) *usedImage {
	if i := slices.IndexFunc(d.images, func(image usedImage) bool { return image.ref == ref }); i >= 0 {
		return &d.images[i]
	}
	return nil
}

func newWorkload(k *kind, u *unstructured.Unstructured) *workload {
	d := &workload{
		kind:            k,
		namespace:       u.GetNamespace(),
		name:            u.GetName(),
		uid:             u.GetUID(),
		resourceVersion: u.GetResourceVersion(),
		created:         u.GetCreationTimestamp().Time,
		deleting:        u.GetDeletionTimestamp() != nil,
		rollout:         progressing,
	}
	for _, entry := range children(child(u.Object, "metadata"), "managedFields") {
		_, pods, _ := unstructured.NestedFieldNoCopy(entry, "fieldsV1", "f:spec", "f:template", "f:spec")
		if at := instant(entry, "time"); pods && at.After(d.updated) {
			d.updated = at
		}
	}
	spec, status := child(u.Object, "spec"), child(u.Object, "status")
	d.paused, _ = spec["paused"].(bool)
	d.onDelete = child(spec, "updateStrategy")["type"] == "OnDelete"
	d.restartedAt, _, _ = unstructured.NestedString(u.Object, k.restartedAt...)
	// Argo Rollouts writes it as a string.
	observed, _ := strconv.ParseInt(fmt.Sprint(status["observedGeneration"]), 10, 64)
	if observed >= u.GetGeneration() {
		switch done, failing := k.rollout(spec, status); {
		case failing:
			d.rollout = failed
		case done:
			d.rollout = complete
		}
	}
	podImages(child(child(spec, "template"), "spec"), d.use)
	return d
}

func (d *workload) use(field, pullPolicy any) {
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

// inherit completes an entry with what the cache knows from the previous one, which may
// be nil. A restart that is new in it was seen then. look says that a decision is due.
func (d *workload) inherit(previous *workload, now, seen time.Time) (look bool) {
	addedAt := d.updated.Add(-updatedTolerance)
	if previous == nil || previous.uid != d.uid {
		addedAt = d.created.Add(-createdTolerance)
		previous = &workload{restartedAt: d.restartedAt, newestRestart: d.restartedAt}
	}
	look = previous.paused && !d.paused || previous.onDelete && !d.onDelete
	for i := range d.images {
		image := &d.images[i]
		if before := previous.image(image.ref); before != nil && before.pinned == image.pinned {
			image.cachedAt, image.addedAt = before.cachedAt, before.addedAt
			continue
		}
		image.cachedAt, image.addedAt = now, addedAt
		look = true
	}
	d.newestRestart, d.restartedSince = previous.newestRestart, previous.restartedSince
	if d.restartedAt != "" && d.restartedAt != previous.restartedAt {
		switch {
		case later(d.restartedAt, d.newestRestart):
			d.newestRestart, d.restartedSince = d.restartedAt, seen
		case later(d.newestRestart, d.restartedAt): // somebody's clock was ahead, or it was reset
			d.restartedSince = seen
		}
	}
	return look
}

// later compares two values of restartedAt as times: kubectl writes local time, and Argo
// Rollouts rewrites the worker's in whole seconds. Text that is not a time is the earliest.
func later(a, b string) bool {
	x, _ := time.Parse(time.RFC3339, a)
	y, _ := time.Parse(time.RFC3339, b)
	return x.After(y)
}

// verdict is what a request means for a workload.
type verdict int

const (
	satisfied verdict = iota
	expired           // the request is too old
	skipped           // there is nothing to restart
	deferred          // not now
	due               // restart
)

// Reasons against a restart, for logs, reports and metrics.
const (
	pinnedReason   = "pinned by digest"
	expiredReason  = "expired"
	deletedReason  = "being deleted"
	onDeleteReason = "the update strategy is OnDelete"
	dryRunReason   = "would restart"
	pausedReason   = "paused"
	intervalReason = "restarted less than WORKER_RESTART_INTERVAL ago"
	paceReason     = "waiting for WORKER_RESTARTS_PER_MINUTE"
)

// moment is the time of a decision.
type moment struct {
	now    time.Time // the worker's monotonic clock
	valkey time.Time // Valkey's clock, which gives T
	clock  time.Time // the earlier one: no request looks too old, and no restart too new
	newest int64     // the newest T known
}

// next is the T of a message that has none.
func (m moment) next() int64 { return max(m.valkey.UnixMicro(), m.newest+1) }

// age is how long ago T was on the clock that gave it.
func (m moment) age(at int64) time.Duration { return max(0, m.valkey.Sub(time.UnixMicro(at))) }

type decision struct {
	verdict verdict
	reason  string        // for the log
	wait    time.Duration // if deferred: when to look again
	hasTurn bool          // of WORKER_RESTARTS_PER_MINUTE
	image   usedImage
	request request
}

type rules struct {
	window   time.Duration // how long a request counts
	interval time.Duration // WORKER_RESTART_INTERVAL
}

// decide is the one rule for messages, catch-up and retries alike.
func (b rules) decide(d *workload, image usedImage, r request, m moment) decision {
	m.newest = d.kind.roundUp(m.newest) // as the values that it is compared with
	next := decision{verdict: due, image: image, request: r}
	age, interval := m.now.Sub(r.made), m.now.Sub(d.restartedSince)
	switch {
	case image.pinned:
		next.verdict, next.reason = skipped, pinnedReason
	case m.proves(d.restartedAt, r), m.proves(d.newestRestart, r):
		next.verdict = satisfied
	case !(r.announced && image.cachedAt.Before(r.made)) && image.addedAt.After(r.latest()):
		next.verdict = satisfied // its pods came after the request
	case age >= b.window:
		next.verdict, next.reason = expired, expiredReason
	case d.deleting:
		next.verdict, next.reason = skipped, deletedReason
	case d.onDelete:
		next.verdict, next.reason = skipped, onDeleteReason
	case d.paused: // being resumed leads to a look; this one is for the log
		next.verdict, next.reason, next.wait = deferred, pausedReason, b.window-age
	case interval < b.interval: // never if since is unknown
		next.verdict, next.reason, next.wait = deferred, intervalReason, b.interval-interval
	}
	return next
}

// proves reports whether a restartedAt, unless it is from the future, shows a restart for
// a request or later. The worker's own form may be a T that another worker knows already.
func (m moment) proves(restartedAt string, r request) bool {
	if own, err := time.Parse(restartedAtLayout, restartedAt); err == nil {
		return own.UnixMicro() >= r.at && own.UnixMicro() <= max(m.clock.Add(restartedAtLead).UnixMicro(), m.newest)
	}
	other, err := time.Parse(time.RFC3339, restartedAt)
	return err == nil && !other.Before(r.latest()) && !other.After(m.clock)
}
