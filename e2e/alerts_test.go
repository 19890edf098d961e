package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Faults are scripted on real processes, and promtool evaluates the alerts of
// k8s/monitoring/ on what is scraped before and during each.

// observation is what was scraped from one process. The fault lasts from begin to end;
// nil means that there was no answer.
type observation struct{ before, begin, end *scrape }

// site is a web and a worker behind a proxy to the API server.
type site struct {
	*day
	before map[string]*scrape
	begin  map[string]*scrape
}

func startSite(t testing.TB, settings ...string) *site {
	t.Helper()
	s := &site{day: startDay(t)}
	s.launchWeb(t)
	s.web.waitReady(t, 20*time.Second)
	s.kubeconfig = user{name: "admin", token: adminToken}.kubeconfig(t, s.api.url) // for all kinds
	s.worker = startWorker(t, s.valkey.addr, s.kubeconfig, append([]string{"WORKER_NAMESPACES=" + s.namespace}, settings...)...)
	s.before = s.scrapeBoth(t)
	return s
}

func (s *site) scrapeBoth(t testing.TB) map[string]*scrape {
	t.Helper()
	both := map[string]*scrape{}
	for pod, p := range map[string]*program{"web-0": s.web, "worker-0": s.worker} {
		if !p.exited() {
			both[pod] = p.scrape(t)
		}
	}
	return both
}

// observed ends the observation.
func (s *site) observed(t testing.TB) map[string]observation {
	t.Helper()
	end, all := s.scrapeBoth(t), map[string]observation{}
	for pod, before := range s.before {
		all[pod] = observation{before, s.begin[pod], end[pod]}
	}
	return all
}

// advance waits until series are greater than at the beginning: what works goes on
// working, while something else does not.
func (s *site) advance(t testing.TB, p *program, pod string, series ...string) {
	t.Helper()
	for _, one := range series {
		before := s.begin[pod].value(t, one)
		eventually(t, 50*time.Second, one+" advances", func() error {
			if got := p.scrape(t).value(t, one); got <= before {
				return fmt.Errorf("it is %v, as before", got)
			}
			return nil
		})
	}
}

// goOn makes web fetch its keys again, which takes half a minute, and the worker start
// another watch.
func (s *site) goOn(t testing.TB) {
	t.Helper()
	s.refuse(t, http.StatusUnauthorized, s.issuer.unknownKid())
	s.api.endWatches()
	s.advance(t, s.worker, "worker-0", `watches_started_total{kind="Deployment"}`)
	s.advance(t, s.web, "web-0", "keys_fetched_timestamp_seconds")
}

// refuse sends a request that is answered with a status.
func (s *site) refuse(t testing.TB, status int, token string) {
	t.Helper()
	if a, err := s.client.post(t.Context(), token, imageBody(newImage())); err != nil || a.status != status {
		t.Errorf("answered %d %s, %v; want %d", a.status, a.body, err, status)
	}
}

// fault is a scripted fault and the alerts that it must fire.
type fault struct {
	script func(t *testing.T) map[string]observation
	fires  []alert
}

// alert is one without the common prefix, and what it is about: a pod, a process, or
// the whole cluster if that is empty.
type alert struct{ name, about string }

var faults = map[string]fault{
	"none":          {script: noFault},
	"paced":         {script: pacedFault},
	"valkey gone":   {valkeyFault, []alert{{"Unavailable", ""}, {"NotSubscribed", "worker-0"}, {"CatchUpOld", "worker-0"}}},
	"issuer down":   {issuerFault, []alert{{"KeysOld", "web-0"}, {"KeysOld", "web-1"}, {"Unavailable", ""}}},
	"api down":      {apiFault, []alert{{"NoWatch", "worker-0"}}},
	"a kind down":   {kindFault, []alert{{"NoWatch", "worker-0"}}},
	"restarts fail": {restartFault, []alert{{"RestartGaveUp", ""}, {"RestartIneffective", ""}, {"RestartsSlow", "worker-0"}, {"RolloutFailed", ""}}},
	"all dead":      {deadFault, []alert{{"Down", "web"}, {"Down", "worker"}}},
}

// noFault is a normal day: restarts, a rollout, a denial, and a Deployment that was
// paused for so long that its restart is late.
func noFault(t *testing.T) map[string]observation {
	s := startSite(t)
	paused, plain := s.app("paused", newImage()), s.app("plain", newImage())
	paused.paused = true
	createAll(t, []deployment{paused, plain})
	r := record(t, s.namespace)
	s.begin = s.before
	s.advance(t, s.worker, "worker-0", `workloads{kind="Deployment"}`, "watch_event_timestamp_seconds")
	s.begin = s.scrapeBoth(t)
	for _, d := range []deployment{paused, plain} {
		s.push(t, d.images[0])
	}
	s.has(t, `messages_total{result="heard"}`)
	s.count(1, `restarts_total{kind="Deployment"}`)
	s.has(t, `restarts_total{kind="Deployment"}`)
	s.rolledOut(t, plain, false)
	s.count(1, `rollouts_total{state="complete"}`)
	s.has(t, `rollouts_total{state="complete"}`)
	late := time.Now().Add(31 * time.Second)
	s.goOn(t)
	s.advance(t, s.worker, "worker-0", "caught_up_timestamp_seconds")
	time.Sleep(time.Until(late))
	paused.patch(t, `{"spec":{"paused":false}}`)
	s.count(1, `restarts_total{kind="Deployment"}`)
	s.has(t, `restarts_total{kind="Deployment"}`)
	if r.restarts(paused) == 0 {
		t.Error("the paused Deployment was not restarted")
	}
	return s.observed(t)
}

// pacedFault: of two Deployments, one waits for its turn, so that its restart is late.
func pacedFault(t *testing.T) map[string]observation {
	s := startSite(t, "WORKER_RESTARTS_PER_MINUTE=2")
	both := []deployment{s.app("one", newImage()), s.app("other", newImage())}
	createAll(t, both)
	s.begin = s.before
	s.advance(t, s.worker, "worker-0", `workloads{kind="Deployment"}`, "watch_event_timestamp_seconds")
	s.begin = s.scrapeBoth(t)
	for _, d := range both {
		s.push(t, d.images[0])
	}
	s.goOn(t)
	s.advance(t, s.worker, "worker-0", "caught_up_timestamp_seconds")
	s.count(2, `restarts_total{kind="Deployment"}`)
	s.has(t, `restarts_total{kind="Deployment"}`)
	return s.observed(t)
}

func valkeyFault(t *testing.T) map[string]observation {
	s := startSite(t)
	s.valkey.kill()
	s.worker.waitNotReady(t, 10*time.Second)
	s.begin = s.scrapeBoth(t)
	s.refuse(t, http.StatusServiceUnavailable, s.job(nil))
	s.goOn(t)
	return s.observed(t)
}

// issuerFault: the issuer goes away while one web runs, and before another one starts.
func issuerFault(t *testing.T) map[string]observation {
	s := &site{day: startDay(t)}
	s.launchWeb(t)
	s.web.waitReady(t, 20*time.Second)
	before := s.web.scrape(t)
	s.issuer.Down.Store(true)
	web := launchWeb(t, programPath, s.valkey.addr, "GITHUB_OIDC_ISSUER="+s.issuer.URL)
	web.waitNotReady(t, 10*time.Second)
	first, second := observation{before: before, begin: s.web.scrape(t)}, observation{begin: web.scrape(t)}
	s.refuse(t, http.StatusUnauthorized, s.issuer.unknownKid())
	s.client.url = web.url
	s.refuse(t, http.StatusServiceUnavailable, s.job(nil))
	s.begin = map[string]*scrape{"web-0": first.begin}
	s.advance(t, s.web, "web-0", `key_fetches_total{result="error"}`)
	first.end, second.end = s.web.scrape(t), web.scrape(t)
	return map[string]observation{"web-0": first, "web-1": second}
}

// apiFault: the API server answers nothing but errors.
func apiFault(t *testing.T) map[string]observation {
	s := startSite(t)
	s.api.set(answering(500, "", everything))
	s.begin = s.scrapeBoth(t)
	s.api.endWatches()
	s.worker.waitNotReady(t, 20*time.Second)
	s.refuse(t, http.StatusUnauthorized, s.issuer.unknownKid())
	s.advance(t, s.web, "web-0", "keys_fetched_timestamp_seconds")
	s.advance(t, s.worker, "worker-0", "caught_up_timestamp_seconds")
	return s.observed(t)
}

// kindFault: the API server answers nothing but errors about one of two kinds.
func kindFault(t *testing.T) map[string]observation {
	s := startSite(t, "WORKER_KINDS=deployments.apps,statefulsets.apps")
	s.api.set(answering(500, "", func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/statefulsets") }))
	s.begin = s.scrapeBoth(t)
	s.goOn(t)
	s.worker.waitNotReady(t, 20*time.Second)
	s.advance(t, s.worker, "worker-0", "caught_up_timestamp_seconds")
	return s.observed(t)
}

// restartFault: of four Deployments, one's patches are refused until its request
// expires, one's are without effect, one's are refused for a while, and one's pods do
// not become available.
func restartFault(t *testing.T) map[string]observation {
	s := startSite(t, "WORKER_CATCH_UP=1m")
	refused, stripped := s.app("refused", newImage()), s.app("stripped", newImage())
	slow, failing := s.app("slow", newImage()), s.app("failing", newImage())
	createAll(t, []deployment{refused, stripped, slow, failing})
	s.begin = s.scrapeBoth(t)
	always := []intercept{answering(403, "", patchOf(refused)), stripping(t, stripped)}
	s.api.set(anyOf(append(always, answering(500, "", patchOf(slow)))...))
	for _, d := range []deployment{refused, stripped, slow, failing} {
		s.push(t, d.images[0])
	}
	lifted := time.Now().Add(31 * time.Second)
	s.advance(t, s.worker, "worker-0", "ineffective_restarts_total", `restarts_total{kind="Deployment"}`)
	s.rolledOut(t, failing, true)
	s.advance(t, s.worker, "worker-0", `rollouts_total{state="failed"}`)
	time.Sleep(time.Until(lifted))
	s.api.set(anyOf(always...))
	s.goOn(t)
	s.count(2, `restarts_total{kind="Deployment"}`)
	s.has(t, `restarts_total{kind="Deployment"}`)
	s.advance(t, s.worker, "worker-0", "caught_up_timestamp_seconds", "give_ups_total")
	return s.observed(t)
}

func deadFault(t *testing.T) map[string]observation {
	s := startSite(t)
	s.web.kill()
	s.worker.kill()
	return s.observed(t)
}

// timeline is what Prometheus stores about one pod.
type timeline struct {
	cluster, pod string
	phases       []phase
}

// phase is a number of minutes that go on as from begin to end. If begin is nil, the pod
// is away; if end is nil, nothing happens in a process that works.
type phase struct {
	begin, end *scrape
	minutes    int
}

// values are the samples of a series in promtool's notation, a minute apart. promtool's
// clock begins at 0, so that timestamps are moved. One that does not advance between two
// scrapes is taken to stand still, another one to be as old as their distance always.
func (l timeline) values(series string) string {
	var parts []string
	minute, present := 0, false
	for _, p := range l.phases {
		repeat := "x" + strconv.Itoa(p.minutes-1)
		var from sample
		if p.begin != nil {
			from = p.begin.samples[series]
		}
		switch {
		case from.metric == nil && present:
			parts = append(parts, "stale", "_x"+strconv.Itoa(p.minutes-1))
		case from.metric == nil:
			parts = append(parts, "_x"+strconv.Itoa(p.minutes))
		default:
			start, slope := p.move(series, from, 60*minute)
			parts = append(parts, number(start)+"+"+number(slope)+repeat)
		}
		minute, present = minute+p.minutes, from.metric != nil
	}
	return strings.Join(parts, " ")
}

// move returns the first value of a series in a phase that begins at a second of
// promtool's clock, and what is added each minute.
func (p phase) move(series string, from sample, second int) (start, slope float64) {
	to, known := sample{}, false
	if p.end != nil {
		to, known = p.end.samples[series]
	}
	switch {
	case strings.HasSuffix(string(from.metric[model.MetricNameLabel]), "_timestamp_seconds"):
		start = from.value - float64(p.begin.at.Unix()) + float64(second)
		switch {
		case !known:
			slope = 60
		case to.value > from.value:
			start, slope = float64(second)-p.end.at.Sub(p.begin.at).Seconds(), 60
		}
		return start, slope
	case !known:
		return from.value, 0
	case from.kind == dto.MetricType_GAUGE || from.kind == dto.MetricType_UNTYPED:
		return to.value, 0
	}
	elapsed := math.Ceil(p.end.at.Sub(p.begin.at).Minutes())
	return from.value, max(0, to.value-from.value) / elapsed
}

func number(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

// series are all series of the pod, with the labels that a PodMonitor adds.
func (l timeline) series() (all []map[string]string) {
	seen := map[string]bool{}
	for _, p := range l.phases {
		if p.begin == nil {
			continue
		}
		for name, one := range p.begin.samples {
			if seen[name] || !strings.HasPrefix(name, ours) && !strings.HasPrefix(name, "process_") && name != "go_goroutines" {
				continue // of the library's, only what the dashboard shows
			}
			seen[name] = true
			metric := one.metric.Clone()
			container, _, _ := strings.Cut(l.pod, "-")
			for label, value := range map[string]string{"cluster": l.cluster, "namespace": home, "pod": l.pod, "container": container,
				"job": home + "/" + home, "instance": l.cluster + "-" + l.pod + ":8081"} {
				metric[model.LabelName(label)] = model.LabelValue(value)
			}
			all = append(all, map[string]string{"series": metric.String(), "values": l.values(name)})
		}
	}
	return all
}

// promTest is a test of promtool's.
type promTest struct {
	Name     string              `json:"name"`
	Interval string              `json:"interval"`
	Series   []map[string]string `json:"input_series"`
	Exprs    []promExpr          `json:"promql_expr_test"`
}

type promExpr struct {
	Expr    string       `json:"expr"`
	At      string       `json:"eval_time"`
	Samples []promSample `json:"exp_samples"`
}

type promSample struct {
	Labels string  `json:"labels"`
	Value  float64 `json:"value"`
}

// firing expects alerts of a cluster at some minutes, and no others.
func firing(alerts []alert, cluster string, minutes ...int) (all []promExpr) {
	samples := []promSample{}
	for _, a := range alerts {
		labels := model.Metric{"alertname": model.LabelValue("Kuberollouttrigger" + a.name)}
		if cluster != "" {
			labels["cluster"] = model.LabelValue(cluster)
		}
		if strings.Contains(a.about, "-") {
			labels["pod"] = model.LabelValue(a.about)
		} else if a.about != "" {
			labels["process"] = model.LabelValue(a.about)
		}
		samples = append(samples, promSample{labels.String(), 1})
	}
	for _, minute := range minutes {
		all = append(all, promExpr{`group by (alertname, cluster, pod, process) (ALERTS{alertstate="firing"})`, fmt.Sprintf("%dm", minute), samples})
	}
	return all
}

const (
	calm    = 4  // minutes before a fault, too few to miss another watch
	lasting = 90 // minutes that it lasts: the keys are old after an hour
)

// promTests are what Prometheus sees of the faults in a cluster, beside a healthy
// replica of each process, unless all are dead, and another healthy cluster.
func promTests(observed map[string]map[string]observation) (tests []promTest) {
	healthy := observed["none"]
	for name, fault := range faults {
		lines := replicas(healthy, "west", 0)
		if name != "all dead" {
			lines = append(lines, replicas(healthy, "east", 2)...)
		}
		for pod, o := range observed[name] {
			lines = append(lines, timeline{"east", pod, []phase{{o.before, nil, calm}, {o.begin, o.end, lasting}}})
		}
		tests = append(tests, promTestOf(name, lines, append(firing(nil, "", calm-1), firing(fault.fires, "east", calm+lasting-10)...)...))
	}
	return append(tests, promTestOf("nothing is scraped", nil, firing([]alert{{"Down", "web or worker"}}, "", 10)...))
}

// replicas are a healthy web and a healthy worker.
func replicas(healthy map[string]observation, cluster string, n int) (all []timeline) {
	for _, process := range []string{"web", "worker"} {
		o := healthy[process+"-0"]
		all = append(all, timeline{cluster, fmt.Sprintf("%s-%d", process, n), []phase{{o.before, nil, calm}, {o.begin, o.end, lasting}}})
	}
	return all
}

func promTestOf(name string, lines []timeline, exprs ...promExpr) promTest {
	test := promTest{Name: name, Interval: "1m", Series: []map[string]string{}, Exprs: exprs}
	for _, line := range lines {
		test.Series = append(test.Series, line.series()...)
	}
	return test
}

// quietTests are what must fire nothing at any time: processes that start, and are
// replaced by others that begin with 0, one of two replicas that is away, and faults
// that end soon.
func quietTests(observed map[string]map[string]observation) []promTest {
	healthy := observed["none"]
	var minutes []int
	for minute := range calm + lasting {
		minutes = append(minutes, minute)
	}
	var started, away, short []timeline
	for _, process := range []string{"web", "worker"} {
		o := healthy[process+"-0"]
		again := []phase{{o.before, nil, 2}, {o.begin, o.end, 28}, {o.before, nil, 2}, {o.begin, o.end, 68}}
		replaced := []phase{{o.begin, o.end, 40}, {nil, nil, 1}, {o.before, nil, 1}, {o.begin, o.end, 58}}
		started = append(started, timeline{"east", process + "-0", again}, timeline{"east", process + "-1", replaced})
		for name, minutes := range map[string]int{"valkey gone": 2, "issuer down": 40, "api down": 2} {
			if f, ok := observed[name][process+"-0"]; ok {
				ends := []phase{{f.before, nil, 2}, {f.begin, f.end, minutes}, {o.begin, o.end, 60}}
				short = append(short, timeline{name, process + "-0", ends})
			}
		}
		away = append(away, timeline{"east", process + "-1", []phase{{o.begin, o.end, 20}, {nil, nil, 80}}})
	}
	return []promTest{
		promTestOf("processes that start", append(started, replicas(healthy, "west", 0)...), firing(nil, "", minutes...)...),
		promTestOf("one of two replicas is away", append(away, replicas(healthy, "east", 0)...), firing(nil, "", minutes...)...),
		promTestOf("faults that end soon", short, firing(nil, "", minutes[:60]...)...),
	}
}

// rules returns k8s/monitoring/rules.yaml as a rule file.
func rules(t testing.TB) (file string, alerts []map[string]any) {
	t.Helper()
	spec := readManifests(t, "../k8s/monitoring/rules.yaml")[0].Object["spec"]
	file = filepath.Join(t.TempDir(), "rules.json") // JSON is YAML
	if err := os.WriteFile(file, []byte(asJSON(spec)), 0o644); err != nil {
		t.Fatal(err)
	}
	groups, _, _ := unstructured.NestedSlice(map[string]any{"spec": spec}, "spec", "groups")
	for _, group := range groups {
		for _, rule := range group.(map[string]any)["rules"].([]any) {
			alerts = append(alerts, rule.(map[string]any))
		}
	}
	return file, alerts
}

// testRules runs promtool's tests with the rules.
func testRules(t testing.TB, tests []promTest) {
	t.Helper()
	file, _ := rules(t)
	all := filepath.Join(t.TempDir(), "tests.json")
	raw, err := json.Marshal(map[string]any{"rule_files": []string{file}, "evaluation_interval": "1m", "tests": tests})
	if err := errors.Join(err, os.WriteFile(all, raw, 0o644)); err != nil {
		t.Fatal(err)
	}
	if out, err := promtool(t, nil, "test", "rules", all); err != nil {
		t.Errorf("promtool test rules: %v\n%s", err, out)
	}
}

// TestAlerts scripts the faults, and holds the alerts and the dashboard to what is
// scraped from real processes.
func TestAlerts(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	observed := map[string]map[string]observation{}
	t.Run("faults", func(t *testing.T) {
		for name, fault := range faults {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				all := fault.script(t)
				mu.Lock()
				defer mu.Unlock()
				observed[name] = all
			})
		}
	})
	if t.Failed() {
		return
	}
	testRules(t, append(promTests(observed), quietTests(observed)...))
	t.Run("dashboard", func(t *testing.T) { testDashboard(t, observed) })
}

// TestAlertRules: promtool takes the rules, each fires in a scripted fault, tells what
// to do, and names only documented metrics. docs/operations.md lists the same ones.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	file, alerts := rules(t)
	if out, err := promtool(t, nil, "check", "rules", file); err != nil || !strings.Contains(out, fmt.Sprintf("SUCCESS: %d rules", len(alerts))) {
		t.Errorf("promtool check rules: %v\n%s", err, out)
	}
	var names, fired []string
	for _, fault := range faults {
		for _, a := range fault.fires {
			fired = append(fired, "Kuberollouttrigger"+a.name)
		}
	}
	for _, rule := range alerts {
		name, _ := rule["alert"].(string)
		names = append(names, name)
		annotations, _ := rule["annotations"].(map[string]any)
		summary, _ := annotations["summary"].(string)
		description, _ := annotations["description"].(string)
		severity, _ := rule["labels"].(map[string]any)["severity"].(string)
		if summary == "" || len(description) < 40 || severity != "critical" && severity != "warning" {
			t.Errorf("%s has the severity %q and the annotations %v", name, severity, annotations)
		}
		expr, _ := rule["expr"].(string)
		mustNameDocumented(t, name, expr)
	}
	slices.Sort(names)
	slices.Sort(fired)
	_, section, _ := strings.Cut(operations(t), "\n## Alerts\n")
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, m[1])
	}
	slices.Sort(documented)
	if len(names) > 10 || !slices.Equal(names, slices.Compact(fired)) || !slices.Equal(names, documented) {
		t.Errorf("the alerts are %q\nin faults fire %q\ndocumented are %q", names, slices.Compact(fired), documented)
	}
}

// mustNameDocumented checks the metrics that PromQL names.
func mustNameDocumented(t testing.TB, where, expr string) {
	t.Helper()
	documented := map[string]documentedMetric{}
	for _, process := range []string{"web", "worker", "both"} {
		for name, m := range documentedMetrics(t, process) {
			documented[name] = m
		}
	}
	named := regexp.MustCompile(`\b(kuberollouttrigger|go|process)_[a-z0-9_]+`).FindAllString(expr, -1)
	for _, name := range named {
		base, bucket := strings.CutSuffix(name, "_bucket")
		m, ok := documented[base]
		if foreign := !strings.HasPrefix(name, ours); !foreign && (!ok || bucket != (m.kind == "histogram")) {
			t.Errorf("%s names %s, which docs/operations.md does not have: %s", where, name, expr)
		}
	}
	if len(named) == 0 {
		t.Errorf("%s names no metric: %s", where, expr)
	}
}

// dashboard is what the tests read of k8s/monitoring/dashboard.json.
type dashboard struct {
	SchemaVersion int
	Templating    struct {
		List []struct{ Name, Type, Definition, AllValue string }
	}
	Panels []struct {
		ID          int
		Type, Title string
		Datasource  struct{ Type, UID string }
		Targets     []struct{ Expr string }
	}
}

func readDashboard(t testing.TB) (d dashboard) {
	t.Helper()
	raw, err := os.ReadFile("../k8s/monitoring/dashboard.json")
	if err := errors.Join(err, json.Unmarshal(raw, &d)); err != nil {
		t.Fatal(err)
	}
	if list := d.Templating.List; d.SchemaVersion < 42 || len(list) == 0 || list[0].Type != "datasource" || list[0].Name != "datasource" {
		t.Errorf("schemaVersion %d, variables %v", d.SchemaVersion, list)
	}
	return d
}

// testDashboard: each query of the dashboard finds something in what was scraped, and
// each documented metric is in one.
func testDashboard(t *testing.T, observed map[string]map[string]observation) {
	dashboard := readDashboard(t)
	replace := []string{"$__rate_interval", "5m"}
	for _, v := range dashboard.Templating.List {
		if v.Type == "query" {
			replace = append(replace, "$"+v.Name, v.AllValue)
			mustNameDocumented(t, "the variable "+v.Name, v.Definition)
		}
	}
	test := promTestOf("dashboard", replicas(observed["none"], "east", 0))
	used, ids := map[string]bool{}, map[int]bool{}
	for _, panel := range dashboard.Panels {
		if ids[panel.ID] || panel.Type != "row" && (len(panel.Targets) == 0 || panel.Datasource.UID != "${datasource}") {
			t.Errorf("the panel %q has the ID %d, %d queries and the datasource %v", panel.Title, panel.ID, len(panel.Targets), panel.Datasource)
		}
		ids[panel.ID] = true
		for _, target := range panel.Targets {
			mustNameDocumented(t, panel.Title, target.Expr)
			for _, name := range regexp.MustCompile(ours+`[a-z_]+`).FindAllString(target.Expr, -1) {
				used[strings.TrimSuffix(name, "_bucket")] = true
			}
			expr := strings.NewReplacer(replace...).Replace(target.Expr)
			if strings.Contains(expr, "$") {
				t.Errorf("%s uses an unknown variable: %s", panel.Title, target.Expr)
			}
			test.Exprs = append(test.Exprs, promExpr{"count((" + expr + ") >= 0) > bool 0", "30m", []promSample{{"{}", 1}}})
		}
	}
	testRules(t, []promTest{test})
	for _, process := range []string{"web", "worker", "both"} {
		for name := range documentedMetrics(t, process) {
			if !used[name] {
				t.Errorf("no panel shows %s", name)
			}
		}
	}
}
