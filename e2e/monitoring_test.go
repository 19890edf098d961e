package e2e

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kuberollouttrigger/internal/fake"
)

// docs/operations.md lists the metrics of both processes. These tests scrape them
// after a scripted day.

const ours = "kuberollouttrigger_"

// scrape is what a process answered to GET /metrics.
type scrape struct {
	at      time.Time
	text    string
	kinds   map[string]dto.MetricType // by name, those of histograms without a suffix
	samples map[string]sample         // by series, as PromQL writes it
}

type sample struct {
	metric model.Metric
	kind   dto.MetricType
	value  float64
}

func (p *program) scrape(t testing.TB) *scrape {
	t.Helper()
	var text string
	eventually(t, 10*time.Second, p.name+" answers GET /metrics", func() error { // a busy machine may need a second try
		status, body, err := p.probe("/metrics")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%d %s", status, body)
		}
		text = body
		return err
	})
	s := &scrape{at: time.Now(), text: text, kinds: map[string]dto.MetricType{}, samples: map[string]sample{}}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%s: %v\n%s", p.name, err, text)
	}
	for name, family := range families {
		s.kinds[name] = family.GetType()
		vector, err := expfmt.ExtractSamples(&expfmt.DecodeOptions{}, family)
		if err != nil {
			t.Fatalf("%s: %s: %v", p.name, name, err)
		}
		for _, one := range vector {
			s.samples[one.Metric.String()] = sample{one.Metric, family.GetType(), float64(one.Value)}
		}
	}
	return s
}

// value is that of a series of ours, which must exist.
func (s *scrape) value(t testing.TB, series string) float64 {
	t.Helper()
	one, ok := s.samples[ours+series]
	if !ok {
		t.Fatalf("the scrape has no %s%s:\n%s", ours, series, s.text)
	}
	return one.value
}

// labels are the label names of a metric, and under each its values.
func (s *scrape) labels(name string) map[string][]string {
	labels := map[string][]string{}
	for _, one := range s.samples {
		if baseName(one, s.kinds) != name {
			continue
		}
		for label, value := range one.metric {
			if label != model.MetricNameLabel && label != model.BucketLabel && !slices.Contains(labels[string(label)], string(value)) {
				labels[string(label)] = append(labels[string(label)], string(value))
			}
		}
	}
	for _, values := range labels {
		slices.Sort(values)
	}
	return labels
}

// baseName is the name of a sample's metric, for a histogram without its suffix.
func baseName(s sample, kinds map[string]dto.MetricType) string {
	name := string(s.metric[model.MetricNameLabel])
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if base, ok := strings.CutSuffix(name, suffix); ok && kinds[base] == dto.MetricType_HISTOGRAM {
			return base
		}
	}
	return name
}

// documentedMetric is a row of a table in docs/operations.md.
type documentedMetric struct {
	name, kind string
	labels     []string
}

var codeRE = regexp.MustCompile("`([^`]+)`")

// codes are what a cell has in backquotes, sorted.
func codes(cell string) (all []string) {
	for _, m := range codeRE.FindAllStringSubmatch(cell, -1) {
		all = append(all, m[1])
	}
	slices.Sort(all)
	return all
}

func operations(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// documentedMetrics are the metrics of a process: web, worker or both.
func documentedMetrics(t testing.TB, process string) map[string]documentedMetric {
	t.Helper()
	_, section, _ := strings.Cut(operations(t), "\n### "+process+"\n")
	section, _, _ = strings.Cut(section, "\n##")
	metrics := map[string]documentedMetric{}
	for _, m := range regexp.MustCompile("(?m)^\\| `("+ours+"[a-z_]+)` \\|(.*?)\\|(.*?)\\|").FindAllStringSubmatch(section, -1) {
		metrics[m[1]] = documentedMetric{m[1], strings.TrimSpace(m[3]), codes(m[2])}
	}
	if len(metrics) == 0 {
		t.Fatalf("docs/operations.md has no metrics of %s", process)
	}
	return metrics
}

// documentedValues are the values of a label of a metric: what the table of outcomes
// or the table of other labels has.
func documentedValues(t testing.TB, metric, label string) []string {
	t.Helper()
	text := operations(t)
	if label == "outcome" {
		_, table, _ := strings.Cut(text, "\n| outcome |")
		table, _, _ = strings.Cut(table, "\n\n")
		var values []string
		for _, m := range regexp.MustCompile("(?m)^\\| `([a-z]+)` \\|").FindAllStringSubmatch(table, -1) {
			values = append(values, m[1])
		}
		slices.Sort(values)
		return values
	}
	of := map[string]string{
		"key_fetches_total": " of key fetches", "messages_total": " of messages", "skips_total": " of skips", "deferrals_total": " of deferrals",
	}[strings.TrimPrefix(metric, ours)]
	m := regexp.MustCompile("(?m)^\\| `" + label + "`" + of + " \\| (.*) \\|$").FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("docs/operations.md has no values of the label %s of %s", label, metric)
	}
	return codes(m[1])
}

// mustBeDocumented compares a scrape with the tables: each documented metric is there,
// and no other; its type, labels and their values are as documented.
func (s *scrape) mustBeDocumented(t testing.TB, process string) {
	t.Helper()
	want := documentedMetrics(t, process)
	maps.Copy(want, documentedMetrics(t, "both"))
	for name, kind := range s.kinds {
		_, ok := want[name]
		if foreign := strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_"); !ok && !foreign {
			t.Errorf("%s has %s, which docs/operations.md does not list there", process, name)
		} else if ok && strings.ToLower(kind.String()) != want[name].kind {
			t.Errorf("%s: %s is a %s, and documented as a %s", process, name, kind, want[name].kind)
		}
	}
	for name, m := range want {
		labels := s.labels(name)
		if _, ok := s.kinds[name]; !ok {
			t.Errorf("%s has no %s, which docs/operations.md lists there", process, name)
		} else if got := slices.Sorted(maps.Keys(labels)); !slices.Equal(got, m.labels) {
			t.Errorf("%s: %s has the labels %q, and %q are documented", process, name, got, m.labels)
		}
		for label, values := range labels {
			if name == ours+"build_info" {
				continue
			}
			documented := documentedValues(t, name, label)
			if name == ours+"watches_started_total" {
				documented = []string{"Deployment"} // the default of WORKER_KINDS
			}
			if !slices.Equal(values, documented) {
				t.Errorf("%s: the label %s of %s has the values %q, and %q are documented", process, label, name, values, documented)
			}
		}
	}
}

// mustBeWellFormed checks the histograms: buckets are cumulative, the last one is
// +Inf and equals the count.
func (s *scrape) mustBeWellFormed(t testing.TB) {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, _ := parser.TextToMetricFamilies(strings.NewReader(s.text)) // parsed before
	for name, family := range families {
		if family.GetType() != dto.MetricType_HISTOGRAM || !strings.HasPrefix(name, ours) {
			continue
		}
		for _, m := range family.GetMetric() {
			h := m.GetHistogram()
			buckets := h.GetBucket()
			if len(buckets) < 10 {
				t.Errorf("%s has %d buckets", name, len(buckets))
				continue
			}
			last := buckets[len(buckets)-1]
			sorted := slices.IsSortedFunc(buckets, func(a, b *dto.Bucket) int {
				if a.GetUpperBound() < b.GetUpperBound() && a.GetCumulativeCount() <= b.GetCumulativeCount() {
					return -1
				}
				return 1
			})
			if !sorted || !math.IsInf(last.GetUpperBound(), 1) || last.GetCumulativeCount() != h.GetSampleCount() ||
				(h.GetSampleCount() > 0) != (h.GetSampleSum() > 0) {
				t.Errorf("%s is not well-formed: %v", name, h)
			}
		}
	}
}

// promtool runs Prometheus' own tool.
func promtool(t testing.TB, stdin io.Reader, args ...string) (output string, err error) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil && os.Getenv("CI") != "" {
		t.Fatalf("promtool is required in CI (Debian: apt-get install prometheus): %v", err)
	} else if err != nil {
		t.Skip("promtool is not installed")
	}
	cmd := exec.Command("promtool", args...)
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// mustPassLint runs promtool's checks of names and types. There is no help text,
// because docs/operations.md has it; the library's metrics are its own.
func (s *scrape) mustPassLint(t testing.TB) {
	t.Helper()
	out, err := promtool(t, strings.NewReader(s.text), "check", "metrics")
	complaints := 0
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, ours) && !strings.HasSuffix(line, " no help text\n") {
			t.Errorf("promtool check metrics: %s", line)
		}
		complaints++
	}
	if err != nil && complaints == 0 {
		t.Errorf("promtool check metrics: %v", err)
	}
}

// day is a web and a worker that are followed through a day.
type day struct {
	*pair
	issuer *issuer
	api    *apiProxy
	admin  cluster
	want   map[string]float64 // the counters
}

// count expects n more of a series.
func (d *day) count(n float64, series ...string) {
	for _, s := range series {
		d.want[s] += n
	}
}

// send expects an outcome. A token of its own is minted if none is given.
func (d *day) send(t testing.TB, path, outcome string, status int, token, body string) answer {
	t.Helper()
	method, known := http.MethodPost, path
	if strings.HasPrefix(path, "/rollout?") {
		method, known = http.MethodGet, "/rollout"
	}
	a, err := d.client.send(t.Context(), method, path, token, body)
	if err != nil || a.status != status {
		t.Errorf("%s: %d %s, %v; want %d", outcome, a.status, a.body, err, status)
	}
	d.count(1, fmt.Sprintf(`requests_total{outcome=%q, path=%q}`, outcome, known))
	if outcome != "token" && outcome != "keys" {
		d.count(1, "verify_seconds_count")
	}
	return a
}

func (d *day) job(claims map[string]any) string { return d.issuer.mint(time.Now(), claims) }

// push requests an image and returns T.
func (d *day) push(t testing.TB, image string) int64 {
	t.Helper()
	_, at, err := d.send(t, "/event", "ok", http.StatusAccepted, d.job(nil), imageBody(image)).accepted()
	if err != nil {
		t.Fatal(err)
	}
	d.count(1, "publish_seconds_count", `messages_total{result="heard"}`)
	return at
}

// has waits until a counter of the worker is as expected.
func (d *day) has(t testing.TB, series string) {
	t.Helper()
	eventually(t, 15*time.Second, fmt.Sprintf("%s is %v", series, d.want[series]), func() error {
		if got := d.worker.scrape(t).value(t, series); got != d.want[series] {
			return fmt.Errorf("it is %v", got)
		}
		return nil
	})
}

// rolledOut writes the status of a Deployment as its controller would.
func (d *day) rolledOut(t testing.TB, app deployment, failed bool) {
	t.Helper()
	conditions := ""
	if failed {
		conditions = `{"type":"Progressing","status":"False","reason":"ProgressDeadlineExceeded"}`
	}
	d.admin.patch(t, app, fmt.Sprintf(`{"status":{"observedGeneration":%d,"replicas":2,"updatedReplicas":2,"readyReplicas":2,
		"availableReplicas":2,"conditions":[%s]}}`, app.get(t).GetGeneration(), conditions), "status")
}

// rollOut requests the image of a Deployment, and waits until its rollout has ended.
func (d *day) rollOut(t testing.TB, app deployment, state string) {
	t.Helper()
	d.push(t, app.images[0])
	d.count(1, `restarts_total{kind="Deployment"}`, "restart_seconds_count")
	d.has(t, `restarts_total{kind="Deployment"}`)
	d.rolledOut(t, app, state == "failed")
	ended := fmt.Sprintf("rollouts_total{state=%q}", state)
	d.count(1, ended, "rollout_seconds_count")
	d.has(t, ended)
}

func startDay(t testing.TB) *day {
	t.Helper()
	own, err := newIssuer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(own.Close)
	d := &day{
		pair:   &pair{namespace: newNamespace(t), valkey: startValkey(t)},
		issuer: own, api: newAPIProxy(t, sharedAPI.url), admin: cluster{sharedAPI}, want: map[string]float64{},
	}
	d.kubeconfig = newWorkerUser(t, d.namespace).kubeconfig(t, d.api.url)
	return d
}

func (d *day) launchWeb(t testing.TB) {
	t.Helper()
	d.web = launchWeb(t, programPath, d.valkey.addr, "GITHUB_OIDC_ISSUER="+d.issuer.URL)
	d.client = newClient(d.web.url)
}

// TestMetrics scripts a day and compares the metrics of both processes with it and
// with docs/operations.md.
func TestMetrics(t *testing.T) {
	t.Parallel()
	d := startDay(t)
	d.webWithoutKeys(t)
	d.worker = startWorker(t, d.valkey.addr, d.kubeconfig, "WORKER_NAMESPACES="+d.namespace, "WORKER_RESTART_INTERVAL=5s")
	for name, p := range map[string]*program{"web": d.web, "worker": d.worker} {
		first := p.scrape(t)
		first.mustBeDocumented(t, name)
		first.mustBeWellFormed(t)
	}
	deployments := d.restarts(t)
	late := d.startLateWorker(t)
	d.denials(t)
	d.quota(t)
	d.wait(t)
	d.valkeyGone(t)

	d.want[`key_fetches_total{result="ok"}`] = float64(d.issuer.JWKSFetches.Load())
	web, worker := d.web.scrape(t), d.worker.scrape(t)
	for name, s := range map[string]*scrape{"web": web, "worker": worker} {
		s.mustBeDocumented(t, name)
		s.mustBeWellFormed(t)
		s.mustPassLint(t)
	}
	d.check(t, web, worker)
	gauges := map[string]float64{"subscribed": 1, "queue_length": 0, `workloads{kind="Deployment"}`: deployments}
	for series, want := range gauges {
		if got := worker.value(t, series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}
	for series, s := range map[string]*scrape{
		"keys_fetched_timestamp_seconds": web, "caught_up_timestamp_seconds": worker, "watch_event_timestamp_seconds": worker,
	} {
		if age := float64(s.at.Unix()) - s.value(t, series); age < 0 || age > 120 {
			t.Errorf("%s is %v seconds old", series, age)
		}
	}
	late.check(t)
}

// check compares all counters.
func (d *day) check(t testing.TB, web, worker *scrape) {
	t.Helper()
	for _, s := range []*scrape{web, worker} {
		for series, one := range s.samples {
			series, isOurs := strings.CutPrefix(series, ours)
			name := string(one.metric[model.MetricNameLabel])
			if !isOurs || one.kind == dto.MetricType_GAUGE || strings.HasSuffix(name, "_bucket") || strings.HasSuffix(name, "_sum") {
				continue
			}
			want := d.want[series]
			switch series {
			case `watches_started_total{kind="Deployment"}`, "caught_up_requests_total": // by time, and by a race with a message
				if one.value < 1 && name == ours+"watches_started_total" || one.value > 5 {
					t.Errorf("%s is %v", series, one.value)
				}
			default:
				if one.value != want {
					t.Errorf("%s is %v, want %v", series, one.value, want)
				}
			}
			delete(d.want, series)
		}
	}
	if len(d.want) > 0 {
		t.Errorf("missing: %v", d.want)
	}
}

// webWithoutKeys: the issuer is down when web starts.
func (d *day) webWithoutKeys(t testing.TB) {
	t.Helper()
	d.issuer.Down.Store(true)
	d.launchWeb(t)
	eventually(t, 10*time.Second, "web has tried to fetch keys", func() error {
		if d.web.scrape(t).value(t, `key_fetches_total{result="error"}`) == 0 {
			return errors.New("it has not")
		}
		return nil
	})
	d.send(t, "/event", "keys", http.StatusServiceUnavailable, d.job(nil), imageBody(newImage()))
	d.send(t, "/rollout?image=ghcr.io/acme/a:b", "keys", http.StatusServiceUnavailable, d.job(nil), "")
	d.issuer.Down.Store(false)
	d.web.waitReady(t, 20*time.Second)
	d.want[`key_fetches_total{result="error"}`] = float64(d.issuer.DiscoveryFetches.Load() - d.issuer.JWKSFetches.Load())
}

// deployments makes Deployments of all kinds, of which one is being deleted.
func (d *day) deployments(t testing.TB) map[string]deployment {
	t.Helper()
	apps := map[string]deployment{}
	for _, name := range []string{"plain", "failed", "paused", "pinned", "deleted", "conflict", "retry", "stripped"} {
		app := d.app(name, newImage())
		app.paused = name == "paused"
		if name == "pinned" {
			app.images[0] += "@sha256:" + strings.Repeat("a", 64)
		}
		apps[name] = app
		app.create(t)
	}
	deleted := apps["deleted"]
	deleted.patch(t, `{"metadata":{"finalizers":["e2e.test/hold"]}}`)
	if err := d.admin.admin.Resource(deploymentsResource).Namespace(d.namespace).Delete(t.Context(), deleted.name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the worker knows all", func() error {
		if got := d.worker.scrape(t).value(t, `workloads{kind="Deployment"}`); got != float64(len(apps)) {
			return fmt.Errorf("%v Deployments", got)
		}
		return nil
	})
	return apps
}

// restarts requests the images of all kinds of Deployments, and returns how many are
// left.
func (d *day) restarts(t testing.TB) float64 {
	t.Helper()
	apps := d.deployments(t)
	d.rollOut(t, apps["plain"], "complete")
	for range 2 { // a pod that comes back is no other rollout
		time.Sleep(time.Second)
		d.admin.patch(t, apps["plain"], `{"status":{"availableReplicas":1}}`, "status")
		time.Sleep(time.Second)
		d.rolledOut(t, apps["plain"], false)
	}
	d.push(t, apps["plain"].images[0]) // within the interval
	d.count(1, `deferrals_total{reason="restarted less than WORKER_RESTART_INTERVAL ago"}`, `restarts_total{kind="Deployment"}`, "restart_seconds_count")
	d.has(t, `restarts_total{kind="Deployment"}`)

	d.rollOut(t, apps["failed"], "failed")
	d.push(t, apps["paused"].images[0])
	d.count(1, `deferrals_total{reason="paused"}`)
	pinned, _, _ := strings.Cut(apps["pinned"].images[0], "@")
	d.push(t, pinned)
	d.push(t, apps["deleted"].images[0])
	d.push(t, newImage()) // nothing runs it
	d.count(1, `skips_total{reason="pinned by digest"}`, `skips_total{reason="being deleted"}`)
	d.count(3, `rollouts_total{state="unmatched"}`)
	d.has(t, `rollouts_total{state="unmatched"}`)
	apps["deleted"].patch(t, `{"metadata":{"finalizers":null}}`) // it is gone
	d.failures(t, apps)

	d.valkey.must(t, "PUBLISH", channel, `{"image":"ghcr.io/acme/no tag"}`) // typed by hand
	d.count(1, `messages_total{result="ignored"}`)
	d.has(t, `messages_total{result="ignored"}`)
	return float64(len(apps) - 1)
}

// failures are patches that do not succeed at once.
func (d *day) failures(t testing.TB, apps map[string]deployment) {
	t.Helper()
	d.api.set(once(answering(409, "", patchOf(apps["conflict"]))))
	d.push(t, apps["conflict"].images[0])
	d.count(1, "conflicts_total", `restarts_total{kind="Deployment"}`, "restart_seconds_count")
	d.has(t, `restarts_total{kind="Deployment"}`)
	d.api.set(once(answering(500, "", patchOf(apps["retry"]))))
	d.push(t, apps["retry"].images[0])
	d.count(1, "retries_total", `restarts_total{kind="Deployment"}`, "restart_seconds_count")
	d.has(t, `restarts_total{kind="Deployment"}`)
	d.api.set(stripping(t, apps["stripped"]))
	d.push(t, apps["stripped"].images[0])
	d.count(1, "ineffective_restarts_total")
	d.has(t, "ineffective_restarts_total")
	d.api.set(nil)
}

// once intercepts one request.
func once(i intercept) intercept {
	done := make(chan struct{}, 1)
	return func(w http.ResponseWriter, r *http.Request, lifted <-chan struct{}) bool {
		select {
		case done <- struct{}{}:
			if i(w, r, lifted) {
				return true
			}
			<-done
		default:
		}
		return false
	}
}

// stripping answers the patches of a Deployment as if a webhook had removed the
// annotation.
func stripping(t testing.TB, d deployment) intercept {
	return func(w http.ResponseWriter, r *http.Request, _ <-chan struct{}) bool {
		if !patchOf(d)(r) {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, asJSON(d.get(t).Object))
		return true
	}
}

// denials asks for what each check denies.
func (d *day) denials(t testing.TB) {
	t.Helper()
	image := imageBody(newImage())
	for _, denied := range []struct {
		path, outcome string
		status        int
		token, body   string
	}{
		{"/event", "token", 401, "", image},
		{"/event", "token", 401, "no.token.atall", image},
		{"/event", "token", 401, d.issuer.unknownKid(), image},
		{"/event", "claims", 403, d.job(map[string]any{"event_name": "pull_request"}), image},
		{"/event", "request", 400, d.job(nil), `{"image":"ghcr.io/acme/no tag"}`},
		{"/event", "request", 413, d.job(nil), `{"image":"` + strings.Repeat("a", 20<<10) + `"}`},
		{"/event", "image", 403, d.job(nil), imageBody("ghcr.io/other/api:dev")},
		{"/rollout?image=ghcr.io/acme/api:dev", "token", 401, "", ""},
		{"/rollout?image=ghcr.io/acme/api:dev", "claims", 403, d.job(map[string]any{"event_name": "pull_request"}), ""},
		{"/rollout?tag=dev", "request", 400, d.job(nil), ""},
		{"/rollout?image=ghcr.io/other/api:dev", "image", 403, d.job(nil), ""},
		{"/rollout?image=ghcr.io/acme/never:dev", "unknown", 404, d.job(nil), ""},
	} {
		d.send(t, denied.path, denied.outcome, denied.status, denied.token, denied.body)
	}
}

// unknownKid is a token under a kid that the issuer does not publish.
func (iss *issuer) unknownKid() string {
	header := iss.Header()
	header["kid"] = "unknown"
	_, key := iss.Key()
	return fake.Sign(key, []byte(asJSON(header)), []byte(asJSON(iss.Claims(time.Now(), nil))))
}

// quota asks for more new images than a repository may.
func (d *day) quota(t testing.TB) {
	t.Helper()
	const quota, tags = 2000, 32
	repository := newRepository()
	greedy := func(from, n int) string {
		var list []string
		for i := range n {
			list = append(list, fmt.Sprintf(`"t%d"`, from+i))
		}
		return fmt.Sprintf(`{"image":%q,"tags":[%s]}`, repository, strings.Join(list, ","))
	}
	claims := map[string]any{"repository": "acme/greedy", "repository_id": "77"}
	for from := 0; from < quota; from += tags {
		n := min(tags, quota-from)
		d.send(t, "/event", "ok", http.StatusAccepted, d.job(claims), greedy(from, n))
		d.count(1, "publish_seconds_count")
		d.count(float64(n), `messages_total{result="heard"}`, `rollouts_total{state="unmatched"}`)
	}
	d.send(t, "/event", "quota", http.StatusTooManyRequests, d.job(claims), greedy(quota, 1))
	d.count(1, "publish_seconds_count")
	d.has(t, `rollouts_total{state="unmatched"}`)
}

// wait: a job waits for a rollout.
func (d *day) wait(t testing.TB) {
	t.Helper()
	image := newImage()
	d.push(t, image)
	d.count(1, `rollouts_total{state="unmatched"}`)
	d.has(t, `rollouts_total{state="unmatched"}`)
	path := "/rollout?image=" + image
	first := d.send(t, path, "ok", http.StatusOK, d.job(nil), "")
	for !strings.HasPrefix(first.body, `{"state":"unmatched"`) { // the late worker's report is not there yet
		time.Sleep(100 * time.Millisecond)
		first = d.send(t, path, "ok", http.StatusOK, d.job(nil), "")
	}
	version := regexp.MustCompile(`"version":"([^"]+)"`).FindStringSubmatch(first.body)
	if version == nil {
		t.Fatalf("no version in %s", first.body)
	}
	answered := make(chan error, 1)
	go func() {
		a, err := d.client.send(t.Context(), http.MethodGet, path+"&wait=4s&seen="+version[1], d.job(nil), "")
		if err == nil && a.status != http.StatusOK {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
		answered <- err
	}()
	for _, want := range []float64{1, 0} {
		eventually(t, 10*time.Second, fmt.Sprintf("%v jobs wait", want), func() error {
			if got := d.web.scrape(t).value(t, "rollout_waiting"); got != want {
				return fmt.Errorf("%v", got)
			}
			return nil
		})
	}
	if err := <-answered; err != nil {
		t.Error(err)
	}
	d.count(1, `requests_total{outcome="ok", path="/rollout"}`, "verify_seconds_count")
}

// valkeyGone kills Valkey for some seconds.
func (d *day) valkeyGone(t testing.TB) {
	t.Helper()
	d.valkey.kill()
	d.worker.waitNotReady(t, 10*time.Second)
	eventually(t, 5*time.Second, "subscribed is 0", func() error {
		if got := d.worker.scrape(t).value(t, "subscribed"); got != 0 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	d.send(t, "/event", "valkey", http.StatusServiceUnavailable, d.job(nil), imageBody(newImage()))
	d.send(t, "/rollout?image="+newImage(), "valkey", http.StatusServiceUnavailable, d.job(nil), "")
	d.count(1, "publish_seconds_count")
	d.valkey.start(t)
	d.web.waitReady(t, 10*time.Second)
	d.worker.waitReady(t, 10*time.Second)
}

// lateWorker starts after the requests for what runs in its namespace.
type lateWorker struct{ *program }

func (d *day) startLateWorker(t testing.TB) lateWorker {
	t.Helper()
	namespace := newNamespace(t)
	missed := deployment{namespace: namespace, name: "missed", images: []string{newImage()}}
	paused := deployment{namespace: namespace, name: "paused", images: []string{newImage()}, paused: true}
	createAll(t, []deployment{missed, paused})
	for _, app := range []deployment{missed, paused} {
		d.push(t, app.images[0])
		d.count(1, `rollouts_total{state="unmatched"}`) // in the first worker's cluster
	}
	worker := startWorker(t, d.valkey.addr, newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url),
		"WORKER_NAMESPACES="+namespace, "CLUSTER_NAME=late", "WORKER_CATCH_UP=1m")
	if got, want := worker.scrape(t).value(t, "caught_up_requests_total"), len(ledgerOf(t, d.valkey)); got != float64(want) {
		t.Errorf("caught_up_requests_total is %v, want %d", got, want)
	}
	return lateWorker{worker}
}

// check: the one Deployment is restarted, the other one stays paused until its request
// expires.
func (l lateWorker) check(t testing.TB) {
	t.Helper()
	eventually(t, 75*time.Second, "the request for the paused Deployment expires", func() error {
		if got := l.scrape(t).value(t, `skips_total{reason="expired"}`); got != 1 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	s := l.scrape(t)
	s.mustBeDocumented(t, "worker")
	for series, want := range map[string]float64{
		`restarts_total{kind="Deployment"}`: 1, "restart_seconds_count": 1, `deferrals_total{reason="paused"}`: 1, "give_ups_total": 0, `workloads{kind="Deployment"}`: 2,
	} {
		if got := s.value(t, series); got != want {
			t.Errorf("the late worker's %s is %v, want %v", series, got, want)
		}
	}
}

// TestRestartSeconds: the time that a message takes to the worker counts, although the
// worker reads Valkey's clock over the same network.
func TestRestartSeconds(t *testing.T) {
	t.Parallel()
	const away = 200 * time.Millisecond
	valkey, app := startValkey(t), deployment{namespace: newNamespace(t), name: "api", images: []string{newImage()}}
	createAll(t, []deployment{app})
	kubeconfig := newWorkerUser(t, app.namespace).kubeconfig(t, sharedAPI.url)
	worker := startWorker(t, farAway(t, valkey.addr, away), kubeconfig, "WORKER_NAMESPACES="+app.namespace)
	newClient(startWeb(t, valkey.addr).url).mustPush(t, app.images[0])
	eventually(t, 10*time.Second, "it is restarted", func() error {
		if got := worker.scrape(t).value(t, `restarts_total{kind="Deployment"}`); got != 1 {
			return fmt.Errorf("restarts_total is %v", got)
		}
		return nil
	})
	if took := worker.scrape(t).value(t, "restart_seconds_sum"); took < 0.75*away.Seconds() {
		t.Errorf("restart_seconds_sum is %v with a network that takes %s", took, away)
	}
}

// farAway is an address from which everything takes so long, both ways.
func farAway(t testing.TB, target string, away time.Duration) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	pass := func(to, from net.Conn) {
		defer to.Close()
		for buffer := make([]byte, 64<<10); ; {
			n, err := from.Read(buffer)
			if err != nil {
				return
			}
			time.Sleep(away)
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
	}
	go func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			go pass(far, near)
			go pass(near, far)
		}
	}()
	return ln.Addr().String()
}
