package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/valkey-io/valkey-go"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Workers write what became of the newest request for an image, and web answers GET
// /rollout from it. The hash <channel>:report:<image> has a report of each cluster, and the
// sorted set <channel>:clusters when each was last alive, in microseconds by Valkey.

const (
	reportAge      = time.Hour              // how long a request is followed, and a report kept
	settledAge     = time.Minute            // how long it is followed at least: a watch may lag
	reportInterval = 250 * time.Millisecond // between two reports about an image

	aliveAge = 3 * catchUpInterval // how long a cluster counts as alive
	awayAge  = 24 * time.Hour      // how long one that is not alive counts as away

	readTimeout = 2500 * time.Millisecond // for one read of the reports, and for the turn of a job that waits
	turnTimeout = 250 * time.Millisecond  // for the turn of another: what waits for it takes memory
	maxReading  = 4                       // at once; one about all that may be asked takes 0.5 MB

	maxRecording = 100 // Events being written; the API server or a webhook may hang
)

// rolloutState is one of rolloutStates. The greatest stands for several.
type rolloutState int

const (
	unmatched   rolloutState = iota // no workload runs the image, or none is to be restarted
	complete                        // all pods are newer than the request, and available
	progressing                     // not yet
	pending                         // a live cluster has not reported
	failed                          // a workload made no progress, or could not be restarted
)

var rolloutStates = []string{"unmatched", "complete", "progressing", "pending", "failed"}

func (s rolloutState) MarshalText() ([]byte, error) { return []byte(rolloutStates[s]), nil }

func (s *rolloutState) UnmarshalText(text []byte) error {
	if *s = rolloutState(slices.Index(rolloutStates, string(text))); *s < 0 {
		return errInvalid
	}
	return nil
}

// report is one whole snapshot of one worker's cache. It names no workload,
// because the logs of a job may be public.
type report struct {
	State       rolloutState   `json:"state"`
	RequestedAt string         `json:"requestedAt,omitempty"` // as restartedAt; it may be newer than what was asked for
	Matched     int            `json:"matched"`               // workloads that run the image
	Kinds       map[string]int `json:"kinds,omitempty"`       // of those, by kind
	Restarted   int            `json:"restarted"`             // of those, were restarted or set to the image since
	Complete    int            `json:"complete"`              // of those, all pods are available
	Failed      int            `json:"failed"`                // made no progress, or could not be restarted
	Deferred    map[string]int `json:"deferred,omitempty"`    // by reason: will be restarted later
	Skipped     map[string]int `json:"skipped,omitempty"`     // by reason: will not be restarted
	Warnings    map[string]int `json:"warnings,omitempty"`    // by pull policy that may keep the old image
	ChangedAt   string         `json:"changedAt,omitempty"`   // on the worker's clock
}

// report takes a snapshot of what runs an image that is followed.
func (w *worker) report(f *followed) report {
	request, known := w.requests.get(f.image)
	running := w.cache.running(f.image)
	if !known || len(running) == 0 { // not known: not under ALLOWED_IMAGE_PREFIX
		return report{RequestedAt: formatTime(max(f.at, request.at))}
	}
	r := report{RequestedAt: formatTime(request.at), Kinds: map[string]int{}, Deferred: map[string]int{}, Skipped: map[string]int{}, Warnings: map[string]int{}}
	m, states := w.requests.moment(), map[rolloutState]int{}
	for _, d := range running {
		r.Matched++
		r.Kinds[d.kind.name]++
		image, state := d.image(f.image), progressing
		if image.pullPolicy != "" {
			r.Warnings[image.pullPolicy]++
		}
		switch next := w.rules.decide(d, *image, request, m); {
		case next.verdict == satisfied && w.cfg.DryRun && !later(d.kind.value(request.at), d.newestRestart):
			r.Skipped[dryRunReason]++
			state = unmatched
		case next.verdict == satisfied:
			r.Restarted++
			state = d.rollout
		case next.verdict == expired:
			state = failed
		case next.verdict == due && w.cfg.RestartsPerMinute > 0 && w.backoff.NumRequeues(d.key()) == 0:
			r.Deferred[paceReason]++
		case next.verdict == deferred:
			r.Deferred[next.reason]++
		case next.verdict == skipped:
			r.Skipped[next.reason]++
			state = unmatched
		}
		states[state]++
		r.State = max(r.State, state)
	}
	r.Complete, r.Failed = states[complete], states[failed]
	return r
}

// followed is an image whose newest request is followed until done. Only reportLoop
// changes it.
type followed struct {
	image string
	request
	written, next report
	done          bool
	counted       bool // the metrics have its end
}

// follow begins to follow a request, unless it follows a newer one. It does not block.
func (w *worker) follow(image string, r request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	known := w.followed[image]
	may := len(w.followed) < 2*maxLedger && w.now().Sub(r.made) < reportAge
	if known == nil && may || known != nil && known.at < r.at {
		w.followed[image] = &followed{image: image, request: r}
	}
}

// reportLoop writes what has changed until ctx is done, with pauses that bound the writes
// about an image whatever the fan-out.
func (w *worker) reportLoop(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, reportInterval) {
		if err := w.writeReports(ctx); w.reported.set(err) && err != nil && ctx.Err() == nil {
			w.log.Warn("reports not written, trying again", "err", err)
		}
	}
}

// writeReports writes the reports that have changed, and after a catch-up that the
// cluster is alive.
func (w *worker) writeReports(ctx context.Context) error {
	revision := w.cache.reached() // before the entries are read
	if revision == 0 {
		return nil // nothing would seem to run the images
	}
	pages := slices.Collect(slices.Chunk(w.changedReports(), ledgerPage))
	if w.alive.Swap(false) {
		pages = append(pages, nil)
	}
	for _, images := range pages {
		stored, err := w.source.writeReports(ctx, w.cfg.ClusterName, revision, images)
		if err != nil {
			return err
		}
		for i := range stored {
			if stored[i] == 1 {
				images[i].stored(w.requests.moment().age(images[i].at))
			}
		}
	}
	return nil
}

// changedReports returns the images whose next report differs from the written one. An
// image is done when nothing more is to come.
func (w *worker) changedReports() (images []*followed) {
	now := w.now()
	w.mu.Lock()
	maps.DeleteFunc(w.followed, func(_ string, old *followed) bool { return now.Sub(old.made) > reportAge })
	all := slices.Collect(maps.Values(w.followed))
	w.mu.Unlock()
	for _, followed := range all {
		if followed.done {
			continue
		}
		followed.next = w.report(followed)
		followed.next.ChangedAt = followed.written.ChangedAt
		if reflect.DeepEqual(followed.next, followed.written) {
			followed.done = now.Sub(followed.made) > settledAge && followed.next.State <= complete
			continue
		}
		followed.next.ChangedAt = formatTime(now.UnixMicro())
		images = append(images, followed)
	}
	return images
}

// stored notes that the next report is written, and counts the first end of its rollout.
// An end that the worker finds when it starts is not counted: it may be old.
func (f *followed) stored(age time.Duration) {
	found := f.written.RequestedAt == "" && !f.announced
	if state := f.next.State; state == complete || state == failed {
		if !found && !f.counted {
			rollouts(rolloutStates[state]).Inc()
			rolloutSeconds.Update(age.Seconds())
		}
		f.counted = true
	} else if state == unmatched && f.announced && f.written.RequestedAt == "" {
		rollouts(rolloutStates[unmatched]).Inc()
	}
	f.written = f.next
}

func reportKey(channel, image string) string { return channel + ":report:" + image }
func clustersKey(channel string) string      { return channel + ":clusters" }

// reportScript stores that the cluster ARGV[1] is alive, in the set KEYS[1], and its report
// ARGV[i] in the hash KEYS[i], unless the one there has a newer T, or the same and a later
// revision: a worker whose watch lags must not set it back. It returns which it stored.
var reportScript = valkey.NewLuaScript(fmt.Sprintf(`
local now, stored = redis.call('TIME'), {}
redis.call('ZADD', KEYS[1], now[1] .. string.format('%%06d', now[2]), ARGV[1])
for i = 2, #KEYS do
  local new, text = cjson.decode(ARGV[i]), redis.call('HGET', KEYS[i], ARGV[1])
  local read, ahead = pcall(function()
    local old = cjson.decode(text)
    return old.requestedAt > new.requestedAt or old.requestedAt == new.requestedAt and old.revision > new.revision
  end)
  stored[i - 1] = read and ahead and 0 or 1
  if stored[i - 1] == 1 then
    redis.call('HSET', KEYS[i], ARGV[1], ARGV[i])
    redis.call('EXPIRE', KEYS[i], %d)
  end
end
return stored
`, int(reportAge.Seconds())))

// writeReports stores the next reports about images, which may be none, from a cache
// that had reached a revision. It returns 1 for each that is stored, and 0 for others.
func (s *subscriber) writeReports(ctx context.Context, cluster string, revision uint64, images []*followed) ([]int64, error) {
	keys, args := []string{clustersKey(s.channel)}, []string{cluster}
	for _, f := range images {
		text, _ := json.Marshal(struct { // numbers and strings always can be
			report
			Revision uint64 `json:"revision"`
		}{f.next, revision})
		keys, args = append(keys, reportKey(s.channel, f.image)), append(args, string(text))
	}
	stored, err := reportScript.Exec(ctx, s.reader, keys, args).AsIntSlice()
	return stored, valkeyError("writing reports", err)
}

// rollout is the body of GET /rollout.
type rollout struct {
	State     rolloutState   `json:"state"`   // of all images
	Version   string         `json:"version"` // of what was read, for the parameter seen
	Images    []imageRollout `json:"images"`
	Away      []string       `json:"away,omitempty"` // clusters that were alive within a day, and are not now
	RequestID string         `json:"requestId"`
}

type imageRollout struct {
	Image       string            `json:"image"`
	State       rolloutState      `json:"state"` // of all live clusters
	RequestedAt string            `json:"requestedAt"`
	Clusters    map[string]report `json:"clusters"`
	stored      map[string]string // by cluster
}

// readRollout reads the reports about the newest requests for images. Its error is a 404 if
// one is older than since or reportAge. Its result is nil if it has the version seen, and
// waiting is not done. A job that waits can wait longer for its turn after that.
func (p *publisher) readRollout(waiting context.Context, q rolloutQuery) (*rollout, error) {
	select {
	case p.reading <- struct{}{}:
	case <-waiting.Done():
		select {
		case p.reading <- struct{}{}:
		case <-time.After(max(turnTimeout, min(q.wait, readTimeout))):
			return nil, &denial{http.StatusServiceUnavailable, "too many jobs ask, try again", errors.New("too many reads of the reports")}
		}
	}
	defer func() { <-p.reading }()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(waiting), readTimeout)
	defer cancel()
	b := p.reader.B()
	commands := valkey.Commands{b.Time().Build(), b.Zrange().Key(clustersKey(p.channel)).Min("0").Max("-1").Withscores().Build()}
	for _, image := range q.images {
		commands = append(commands, b.Zscore().Key(ledgerKey(p.channel)).Member(image).Build(), b.Hgetall().Key(reportKey(p.channel, image)).Build())
	}
	replies := p.reader.DoMulti(ctx, commands...)
	for _, reply := range replies {
		if err := reply.Error(); err != nil && !valkey.IsValkeyNil(err) {
			return nil, &denial{http.StatusServiceUnavailable, "the rollout cannot be read, try again", valkeyError("reading reports", err)}
		}
	}
	clock, _ := replies[0].AsIntSlice()
	clusters, _ := replies[1].AsZScores()
	now, result, live := time.Unix(clock[0], 0), &rollout{}, []string{}
	for _, cluster := range clusters {
		if age := now.Sub(time.UnixMicro(int64(cluster.Score))); age <= aliveAge {
			live = append(live, cluster.Member)
		} else if age <= awayAge {
			result.Away = append(result.Away, cluster.Member)
		}
	}
	slices.Sort(live) // Valkey sorts by when they were alive
	version := fnv.New64a()
	fmt.Fprint(version, live, result.Away)
	for i, image := range q.images {
		score, _ := replies[2+2*i].AsFloat64()
		reports, _ := replies[3+2*i].AsStrMap()
		requestedAt := formatTime(int64(score))
		if requestedAt < q.since || now.Sub(time.UnixMicro(int64(score))) > reportAge {
			return nil, tell(http.StatusNotFound, fmt.Errorf("no request for %s since then, or within %s", image, reportAge))
		}
		result.Images = append(result.Images, imageRollout{Image: image, RequestedAt: requestedAt, stored: reports})
		fmt.Fprint(version, requestedAt, reports)
	}
	if result.Version = strconv.FormatUint(version.Sum64(), 36); result.Version == q.seen && waiting.Err() == nil {
		return nil, nil
	}
	for i := range result.Images {
		result.Images[i].decode(live, q.since)
		result.State = max(result.State, result.Images[i].State)
	}
	return result, nil
}

// decode takes the reports about requests since a time. Those of clusters that are
// not live do not count for the state.
func (i *imageRollout) decode(live []string, since string) {
	i.Clusters = map[string]report{}
	for cluster, text := range i.stored {
		var r report
		if json.Unmarshal([]byte(text), &r) == nil && r.RequestedAt >= cmp.Or(since, i.RequestedAt) {
			i.Clusters[cluster] = r
		}
	}
	if len(live) == 0 {
		i.State = pending
	}
	for _, cluster := range live {
		if _, reported := i.Clusters[cluster]; !reported {
			i.Clusters[cluster] = report{State: pending}
		}
		i.State = max(i.State, i.Clusters[cluster].State)
	}
}

// record writes an Event about a restart, unless maxRecording are being written. It runs in
// a goroutine of its own. The name comes from T, so that any number of workers write one.
func (w *worker) record(d *workload, restart decision) {
	defer w.recording.Add(-1)
	ctx, cancel := context.WithTimeout(context.Background(), patchTimeout)
	defer cancel()
	now := w.now().UTC().Format(time.RFC3339)
	event := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Event",
		"metadata": map[string]any{"namespace": d.namespace, "name": fmt.Sprintf("%s.%x", d.uid, restart.request.at)},
		"involvedObject": map[string]any{"apiVersion": d.kind.resource.GroupVersion().String(), "kind": d.kind.name,
			"namespace": d.namespace, "name": d.name, "uid": string(d.uid)},
		"type": "Normal", "reason": "Restarted",
		"message":        fmt.Sprintf("Restarted because %s was requested at %s", restart.image.ref, formatTime(restart.request.at)),
		"source":         map[string]any{"component": fieldManager},
		"firstTimestamp": now, "lastTimestamp": now, "count": int64(1),
	}}
	events := w.client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "events"}) // where kubectl describe looks
	err := fmt.Errorf("%d others are being written", maxRecording)
	if w.recording.Add(1) <= maxRecording {
		_, err = events.Namespace(d.namespace).Create(ctx, event, metav1.CreateOptions{FieldManager: fieldManager})
	}
	if err != nil && !apierrors.IsAlreadyExists(err) && !w.eventless.Swap(true) {
		w.log.Warn("an Event could not be written, and later ones may be missing; allow create on events, check their webhooks, or unset WORKER_EVENTS", "err", err)
	}
}
