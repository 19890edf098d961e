package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// These tests hold what README.md, docs/, k8s/ and Dockerfile say to the code.

func readDoc(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func docNames(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("docs/*.md")
	if err != nil || len(names) < 5 {
		t.Fatalf("docs has %d pages, error %v", len(names), err)
	}
	return append(names, "README.md")
}

// docBlock is a fenced block, without the indentation of its fence.
type docBlock struct{ language, text string }

var fenceRE = regexp.MustCompile("(?ms)^( *)```([a-z]+)\n(.*?)^ *```$")

func docBlocks(text string) (blocks []docBlock) {
	for _, m := range fenceRE.FindAllStringSubmatch(text, -1) {
		var b strings.Builder
		for line := range strings.Lines(m[3]) {
			b.WriteString(strings.TrimPrefix(line, m[1]))
		}
		blocks = append(blocks, docBlock{m[2], b.String()})
	}
	return blocks
}

// docTable returns the cells of the table whose header row is as given.
func docTable(t *testing.T, name, header string) (rows [][]string) {
	t.Helper()
	_, rest, ok := strings.Cut(readDoc(t, name), "\n"+header+"\n")
	if !ok {
		t.Fatalf("%s has no table %s", name, header)
	}
	columns := strings.Count(header, "|") - 1
	for line := range strings.Lines(rest) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if !strings.HasPrefix(line, "|") {
			break
		}
		if strings.HasPrefix(line, "|--") {
			continue
		}
		if len(cells) != columns {
			t.Fatalf("%s: %d cells instead of %d: %s", name, len(cells), columns, line)
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rows = append(rows, cells)
	}
	if len(rows) == 0 {
		t.Fatalf("%s: the table %s is empty", name, header)
	}
	return rows
}

// backquoted returns what stands in backquotes in s.
func backquoted(s string) (words []string) {
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(s, -1) {
		words = append(words, m[1])
	}
	return words
}

// productionFiles are the parsed sources of the production build.
func productionFiles(t *testing.T) map[string]*ast.File {
	t.Helper()
	bare := build.Default
	bare.BuildTags = nil
	pkg, err := bare.ImportDir(".", 0)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]*ast.File{}
	for _, name := range pkg.GoFiles {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = file
	}
	return files
}

// calls yields the method and function calls below a node: what is called, and
// on what.
func calls(n ast.Node, yield func(name string, on ast.Expr, call *ast.CallExpr)) {
	ast.Inspect(n, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			if f, ok := call.Fun.(*ast.SelectorExpr); ok {
				yield(f.Sel.Name, f.X, call)
			}
		}
		return true
	})
}

// texts returns the string literals below a node.
func texts(n ast.Node) map[string]bool {
	found := map[string]bool{}
	ast.Inspect(n, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil {
				found[s] = true
			}
		}
		return true
	})
	return found
}

func sorted(set map[string]bool) []string { return slices.Sorted(maps.Keys(set)) }

func TestDocsOptionTable(t *testing.T) {
	var want [][]string
	for _, o := range documentedOptions() {
		def := cmp.Or(o.unset, "none")
		if len(o.required) == len(o.modes) {
			def = "required"
		} else if len(o.required) > 0 {
			def = "required (" + strings.Join(o.required, ", ") + ")"
		} else if o.def != "" {
			def = "`" + o.def + "`"
		}
		modes := strings.Replace(strings.Join(o.modes, ", "), "web, worker", "both", 1)
		want = append(want, []string{"`" + o.env + "`", "`--" + o.flagName() + "`", modes, def, o.usage})
	}
	got := docTable(t, "docs/configuration.md", "| variable | flag | modes | default | meaning |")
	for i := range max(len(got), len(want)) {
		var g, w []string
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if !slices.Equal(g, w) {
			t.Errorf("docs/configuration.md, option %d is\n\t%q, and in the code\n\t%q", i+1, g, w)
		}
	}
}

// A name that begins like one of our variables is one of our variables.
func TestDocsVariables(t *testing.T) {
	known, first := map[string]bool{}, map[string]bool{}
	for _, o := range documentedOptions() {
		known[o.env] = true
		word, _, _ := strings.Cut(o.env, "_")
		first[word] = true
	}
	// What a runner sets, https://docs.github.com/en/actions/reference/workflows-and-actions/variables
	for _, name := range []string{"GITHUB_REPOSITORY", "GITHUB_REF_NAME"} {
		known[name] = true
	}
	names := docNames(t)
	for _, pattern := range []string{"k8s/*.yaml", "k8s/*/*.yaml", "Dockerfile"} {
		more, err := filepath.Glob(pattern)
		if err != nil || len(more) == 0 {
			t.Fatalf("%s: %d files, error %v", pattern, len(more), err)
		}
		names = append(names, more...)
	}
	nameRE := regexp.MustCompile(`\b[A-Z][A-Z0-9]*(_[A-Z0-9]+)+\b`)
	for _, name := range names {
		for _, variable := range nameRE.FindAllString(readDoc(t, name), -1) {
			if word, _, _ := strings.Cut(variable, "_"); first[word] && !known[variable] {
				t.Errorf("%s: %s is not an option", name, variable)
			}
		}
	}
}

// The answers in the documentation are those that web.go can give.
func TestDocsAnswers(t *testing.T) {
	codes := map[string]int{}
	for code := 100; code < 600; code++ {
		codes["Status"+strings.NewReplacer(" ", "", "-", "", "'", "").Replace(http.StatusText(code))] = code
	}
	want := map[string]bool{}
	ast.Inspect(productionFiles(t)["web.go"], func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok && strings.HasPrefix(s.Sel.Name, "Status") && s.Sel.Name != "StatusText" {
			if code := codes[s.Sel.Name]; code != 0 {
				want[strconv.Itoa(code)] = true
			} else {
				t.Errorf("http.%s is no status", s.Sel.Name)
			}
		}
		return true
	})
	got := map[string]bool{}
	for _, row := range docTable(t, "docs/configuration.md", "| answer | body | when |") {
		got[row[0]] = true
	}
	if !maps.Equal(got, want) {
		t.Errorf("docs/configuration.md has the answers %q, and web.go %q", sorted(got), sorted(want))
	}
	if !strings.Contains(readDoc(t, "docs/configuration.md"), "`Retry-After: "+retryAfter+"`") {
		t.Errorf("docs/configuration.md does not say Retry-After: %s", retryAfter)
	}
}

func TestDocsLinks(t *testing.T) {
	linkRE := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	headingRE := regexp.MustCompile(`(?m)^#+ (.+)$`)
	anchors := func(name string) map[string]bool {
		found := map[string]bool{}
		for _, m := range headingRE.FindAllStringSubmatch(fenceRE.ReplaceAllString(readDoc(t, name), ""), -1) {
			anchor := regexp.MustCompile(`[^\pL\pN _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
			found[strings.ReplaceAll(anchor, " ", "-")] = true
		}
		return found
	}
	for _, name := range docNames(t) {
		for _, m := range linkRE.FindAllStringSubmatch(readDoc(t, name), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			path, anchor, _ := strings.Cut(m[1], "#")
			target := name
			if path != "" {
				target = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: link to %s: %v", name, m[1], err)
			} else if anchor != "" && !anchors(target)[anchor] {
				t.Errorf("%s: %s has no heading #%s", name, target, anchor)
			}
		}
	}
}

// Every body, message and policy that is shown is one that the code takes.
func TestDocsExamples(t *testing.T) {
	bodyRE := regexp.MustCompile(`\{"[^{}]*\}`)
	bodies, policies := 0, 0
	for _, name := range docNames(t) {
		text := readDoc(t, name)
		for _, body := range bodyRE.FindAllString(text, -1) {
			if strings.HasPrefix(body, `{"error":`) || strings.HasPrefix(body, `{"images":`) {
				continue // answers
			}
			bodies++
			_, err := parseRequest([]byte(body))
			if strings.Contains(body, "requestedAt") {
				_, err = parseMessage([]byte(body))
			}
			if err != nil {
				t.Errorf("%s: %s: %v", name, body, err)
			}
		}
		for _, b := range docBlocks(text) {
			if b.language != "yaml" {
				continue
			}
			if err := yaml.UnmarshalStrict([]byte(b.text), new(any)); err != nil {
				t.Errorf("%s: %v\n%s", name, err, b.text)
			}
			if strings.HasPrefix(b.text, "- claims:") {
				policies++
				if _, err := parseRules(b.text); err != nil {
					t.Errorf("%s: %v\n%s", name, err, b.text)
				}
			}
		}
	}
	if bodies < 5 || policies == 0 {
		t.Errorf("%d bodies and %d policies found", bodies, policies)
	}
	// The events that pass without a rule, as the page lists them.
	page := readDoc(t, "docs/configuration.md")
	_, list, _ := strings.Cut(page, "if it runs for one of these events: ")
	list, _, _ = strings.Cut(list, ".")
	var events []string
	for _, value := range defaultCondition.values {
		events = append(events, value.String())
	}
	if got := backquoted(list); !slices.Equal(got, events) {
		t.Errorf("docs/configuration.md lists the events %q, and the code %q", got, events)
	}
}

// The two commands that a newcomer needs; CI runs them as they stand.
func TestReadmeCommands(t *testing.T) {
	var lines []string
	for _, b := range docBlocks(readDoc(t, "README.md")) {
		if b.language == "sh" {
			lines = append(lines, strings.Split(b.text, "\n")...)
		}
	}
	for _, command := range []string{"go run -tags dev . dev", "go test ./...", "kubectl apply -f k8s/"} {
		if !slices.Contains(lines, command) {
			t.Errorf("README.md has no line %q in a fenced block", command)
		}
	}
}

// manifest is what the tests look at of a Kubernetes object.
type manifest struct {
	file     string
	Kind     string
	Metadata struct {
		Name, Namespace string
		Labels          map[string]string
	}
	Data  map[string]string
	Rules []struct {
		APIGroups, Resources, Verbs, ResourceNames, NonResourceURLs []string
	}
	RoleRef  struct{ Kind, Name string }
	Subjects []struct{ Kind, Name, Namespace string }
	Spec     struct {
		Selector any // of a Service its labels, of others more
		Ports    []struct {
			Port       int
			TargetPort any
		}
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     podSpec
		}
	}
}

type podSpec struct {
	ServiceAccountName            string
	AutomountServiceAccountToken  *bool
	TerminationGracePeriodSeconds float64
	SecurityContext               struct {
		RunAsNonRoot   bool
		SeccompProfile struct{ Type string }
	}
	Volumes []struct {
		PersistentVolumeClaim struct{ ClaimName string }
		ConfigMap             struct{ Name string }
	}
	InitContainers, Containers []container
}

type container struct {
	Name, Image   string
	Command, Args []string
	EnvFrom       []struct{ ConfigMapRef struct{ Name string } }
	Env           []struct {
		Name, Value string
		ValueFrom   struct {
			SecretKeyRef     struct{ Name, Key string }
			ResourceFieldRef struct{ Resource string }
		}
	}
	Ports []struct {
		Name          string
		ContainerPort int
	}
	LivenessProbe, ReadinessProbe struct {
		HTTPGet struct{ Path, Port string }
		Exec    struct{ Command []string }
	}
	Lifecycle struct {
		PreStop struct{ Sleep struct{ Seconds float64 } }
	}
	SecurityContext struct {
		AllowPrivilegeEscalation *bool
		ReadOnlyRootFilesystem   bool
		Capabilities             struct{ Drop []string }
	}
	Resources struct{ Requests, Limits map[string]string }
}

// manifests parses the files that match a pattern, in the order in which
// kubectl apply -f takes them.
func manifests(t *testing.T, pattern string) (all []manifest) {
	t.Helper()
	names, err := filepath.Glob(pattern) // sorted
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %d files, error %v", pattern, len(names), err)
	}
	for _, name := range names {
		for document := range strings.SplitSeq(readDoc(t, name), "\n---\n") {
			if err := yaml.UnmarshalStrict([]byte(document), new(map[string]any)); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			m := manifest{file: name}
			if err := yaml.Unmarshal([]byte(document), &m); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			all = append(all, m)
		}
	}
	return all
}

func findManifest(t *testing.T, all []manifest, kind, name string) *manifest {
	t.Helper()
	for i := range all {
		if all[i].Kind == kind && all[i].Metadata.Name == name {
			return &all[i]
		}
	}
	t.Fatalf("k8s has no %s %s", kind, name)
	return nil
}

// One kubectl apply has to do: what an object needs comes before it, except for
// the Secret, which is in no file.
func TestManifestOrder(t *testing.T) {
	all := manifests(t, "k8s/*.yaml")
	namespace := all[0].Metadata.Name
	if all[0].Kind != "Namespace" || all[0].Metadata.Labels["pod-security.kubernetes.io/enforce"] != "restricted" {
		t.Errorf("the first object is a %s with the labels %v, not a restricted Namespace", all[0].Kind, all[0].Metadata.Labels)
	}
	seen := map[string]bool{}
	for _, m := range all {
		needs := map[string]bool{}
		pod := m.Spec.Template.Spec
		if pod.ServiceAccountName != "" {
			needs["ServiceAccount "+pod.ServiceAccountName] = true
		}
		for _, v := range pod.Volumes {
			for kind, name := range map[string]string{"PersistentVolumeClaim": v.PersistentVolumeClaim.ClaimName, "ConfigMap": v.ConfigMap.Name} {
				if name != "" {
					needs[kind+" "+name] = true
				}
			}
		}
		for _, c := range pod.Containers {
			for _, from := range c.EnvFrom {
				needs["ConfigMap "+from.ConfigMapRef.Name] = true
			}
		}
		if m.RoleRef.Name != "" {
			needs[m.RoleRef.Kind+" "+m.RoleRef.Name] = true
		}
		for _, need := range sorted(needs) {
			if !seen[need] {
				t.Errorf("%s: %s %s needs the %s before it", m.file, m.Kind, m.Metadata.Name, need)
			}
		}
		clusterWide := m.Kind == "Namespace" || strings.HasPrefix(m.Kind, "Cluster") || strings.HasPrefix(m.Kind, "ValidatingAdmissionPolicy")
		if !clusterWide && m.Metadata.Namespace != namespace {
			t.Errorf("%s: %s %s is in the namespace %q, not %s", m.file, m.Kind, m.Metadata.Name, m.Metadata.Namespace, namespace)
		}
		if m.Kind == "Secret" {
			t.Errorf("%s has a Secret", m.file)
		}
		seen[m.Kind+" "+m.Metadata.Name] = true
	}
}

// The manifests configure both processes as parseConfig wants it, and their
// ports and probes are those of the code.
func TestManifestsConfigure(t *testing.T) {
	all := manifests(t, "k8s/*.yaml")
	secrets := map[string]bool{}
	for _, m := range []string{"web", "worker"} {
		pod := findManifest(t, all, "Deployment", m).Spec.Template.Spec
		if len(pod.Containers) != 1 {
			t.Fatalf("%s has %d containers", m, len(pod.Containers))
		}
		c := pod.Containers[0]
		if !slices.Equal(c.Args, []string{m}) || c.Command != nil {
			t.Errorf("%s runs %q %q", m, c.Command, c.Args)
		}
		vars := map[string]string{}
		for _, from := range c.EnvFrom {
			maps.Copy(vars, findManifest(t, all, "ConfigMap", from.ConfigMapRef.Name).Data)
		}
		for _, e := range c.Env {
			vars[e.Name] = e.Value
			if ref := e.ValueFrom.SecretKeyRef; ref.Name != "" {
				vars[e.Name] = "from a secret"
				secrets[fmt.Sprintf("create secret generic %s ", ref.Name)] = true
				secrets[fmt.Sprintf(" --from-literal=%s=\"$(openssl rand -hex 32)\"", ref.Key)] = true
				// Each is the user of Valkey that has its name.
				if vars["VALKEY_USERNAME"] != m || ref.Key != m {
					t.Errorf("%s is Valkey's user %q with the password of %q", m, vars["VALKEY_USERNAME"], ref.Key)
				}
			}
			// Bytes, as Go wants them, and less than the limit.
			if e.Name == "GOMEMLIMIT" && (e.ValueFrom.ResourceFieldRef.Resource != "requests.memory" || !lessMi(c.Resources.Requests["memory"], c.Resources.Limits["memory"])) {
				t.Errorf("%s has %+v as GOMEMLIMIT, with %+v", m, e.ValueFrom, c.Resources)
			}
		}
		for name := range vars {
			ours := slices.ContainsFunc(documentedOptions(), func(o documentedOption) bool { return o.env == name && slices.Contains(o.modes, m) })
			if !ours && name != "GOMEMLIMIT" {
				t.Errorf("k8s gives %s to %s, which has no such option", name, m)
			}
		}
		for _, o := range documentedOptions() {
			if o.secret && vars[o.env] != "from a secret" {
				t.Errorf("%s: %s is %q, not from a Secret", m, o.env, vars[o.env])
			}
		}
		getenv := func(name string) string { return strings.ReplaceAll(vars[name], placeholder, "acme") }
		web, worker := &webConfig{}, &workerConfig{InCluster: true}
		cfg, common := configuration(web), &web.commonConfig
		if m == "worker" {
			cfg, common = worker, &worker.commonConfig
		}
		if err := parseConfig(m, cfg, nil, env(vars)); err == nil {
			t.Errorf("%s starts with the placeholders of k8s", m)
		}
		if err := parseConfig(m, cfg, nil, getenv); err != nil {
			t.Fatalf("%s cannot start with what k8s says: %v", m, err)
		}

		ports := map[string]string{}
		for _, p := range c.Ports {
			ports[p.Name] = fmt.Sprintf(":%d", p.ContainerPort)
		}
		want := map[string]string{"ops": common.OpsListenAddr}
		if m == "web" {
			want["http"] = web.ListenAddr
		}
		if !maps.Equal(ports, want) {
			t.Errorf("%s has the ports %v, and listens on %v", m, ports, want)
		}
		valkey := findManifest(t, all, "Service", "valkey")
		if addr := fmt.Sprintf("%s:%d", valkey.Metadata.Name, valkey.Spec.Ports[0].Port); common.Valkey.Addr != addr {
			t.Errorf("%s looks for Valkey at %s; the Service is %s", m, common.Valkey.Addr, addr)
		}

		// Alive is also what is not ready; what is stopping is not ready.
		for _, probe := range []struct {
			name                                 string
			path, port                           string
			running, notReady, whileItIsStopping int
		}{
			{"liveness", c.LivenessProbe.HTTPGet.Path, c.LivenessProbe.HTTPGet.Port, 200, 200, 200},
			{"readiness", c.ReadinessProbe.HTTPGet.Path, c.ReadinessProbe.HTTPGet.Port, 200, 503, 503},
		} {
			var s service
			var unready error
			h := s.probes(func(context.Context) error { return unready })
			status := func() int {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "http://pod"+probe.path, nil))
				return w.Code
			}
			got := []int{status()}
			unready = errors.New("not ready")
			got = append(got, status())
			s.stopping.Store(true)
			got = append(got, status())
			if want := []int{probe.running, probe.notReady, probe.whileItIsStopping}; !slices.Equal(got, want) || probe.port != "ops" {
				t.Errorf("%s: the %s probe asks %s on port %s, which answers %v, not %v", m, probe.name, probe.path, probe.port, got, want)
			}
		}

		leaves := c.Lifecycle.PreStop.Sleep.Seconds + drainTimeout.Seconds()
		if m == "worker" {
			leaves = patchTimeout.Seconds()
		} else if c.Lifecycle.PreStop.Sleep.Seconds == 0 {
			t.Error("web has no preStop sleep")
		}
		if pod.TerminationGracePeriodSeconds <= leaves {
			t.Errorf("%s may take %v s to leave, and has %v", m, leaves, pod.TerminationGracePeriodSeconds)
		}
		if mounted := pod.AutomountServiceAccountToken; mounted == nil || *mounted != (m == "worker") {
			t.Errorf("%s: automountServiceAccountToken is not %t", m, m == "worker")
		}
	}
	// The password that the documented command creates is the one that is read.
	for _, name := range []string{"README.md", "docs/deployment.md"} {
		for _, command := range sorted(secrets) {
			if !strings.Contains(readDoc(t, name), command) {
				t.Errorf("%s has no command with %q", name, command)
			}
		}
	}
}

func TestManifestsPods(t *testing.T) {
	all := manifests(t, "k8s/*.yaml")
	pods := 0
	for _, m := range all {
		pod := m.Spec.Template.Spec
		if len(pod.Containers) == 0 {
			continue
		}
		pods++
		if !pod.SecurityContext.RunAsNonRoot || pod.SecurityContext.SeccompProfile.Type != "RuntimeDefault" {
			t.Errorf("%s: the pod is not restricted: %+v", m.file, pod.SecurityContext)
		}
		if mounted := pod.AutomountServiceAccountToken; mounted == nil || *mounted && pod.ServiceAccountName == "" {
			t.Errorf("%s: the token of the default ServiceAccount is mounted", m.file)
		}
		if m.Metadata.Name != pod.ServiceAccountName {
			t.Errorf("%s: runs as the ServiceAccount %q, not as its own", m.file, pod.ServiceAccountName)
		}
		for _, c := range append(pod.InitContainers, pod.Containers...) {
			sc := c.SecurityContext
			if sc.AllowPrivilegeEscalation == nil || *sc.AllowPrivilegeEscalation || !sc.ReadOnlyRootFilesystem || !slices.Equal(sc.Capabilities.Drop, []string{"ALL"}) {
				t.Errorf("%s: container %s is not restricted: %+v", m.file, c.Name, sc)
			}
			if c.Resources.Limits["memory"] == "" {
				t.Errorf("%s: container %s has no memory limit", m.file, c.Name)
			}
		}
	}
	if pods != 3 {
		t.Errorf("%d pods found", pods)
	}

	for _, m := range all {
		if m.Kind != "Service" {
			continue
		}
		leads := false
		for _, other := range all {
			labels := map[string]any{}
			for k, v := range other.Spec.Template.Metadata.Labels {
				labels[k] = v
			}
			selector, _ := m.Spec.Selector.(map[string]any)
			if len(labels) == 0 || !maps.Equal(selector, labels) {
				continue
			}
			for _, p := range other.Spec.Template.Spec.Containers[0].Ports {
				leads = leads || p.Name == m.Spec.Ports[0].TargetPort
			}
		}
		if !leads {
			t.Errorf("%s: the Service %s leads to no port of a pod", m.file, m.Metadata.Name)
		}
	}

	settings := findManifest(t, all, "ConfigMap", "valkey").Data["valkey.conf"]
	for _, setting := range []string{"appendonly yes", "appendfsync always", "aclfile /run/valkey/users.acl", "maxmemory-policy noeviction"} {
		if !strings.Contains(settings, setting+"\n") {
			t.Errorf("valkey is started without %s", setting)
		}
	}
}

// lessMi compares amounts of memory such as 48Mi.
func lessMi(a, b string) bool {
	x, errA := strconv.Atoi(strings.TrimSuffix(a, "Mi"))
	y, errB := strconv.Atoi(strings.TrimSuffix(b, "Mi"))
	return errA == nil && errB == nil && x < y
}

// networkPolicy is what the tests look at of one.
type networkPolicy struct {
	Kind     string
	Metadata struct{ Name string }
	Spec     struct {
		PodSelector struct{ MatchLabels map[string]string }
		PolicyTypes []string
		Ingress     []networkRule
		Egress      []networkRule
	}
}

type networkRule struct {
	From, To []struct {
		PodSelector struct {
			MatchLabels      map[string]string
			MatchExpressions []struct {
				Key, Operator string
				Values        []string
			}
		}
	}
	Ports []struct {
		Port     int
		Protocol string
	}
}

// What the pods listen on and connect to is let through, and what listens for
// the kubelet alone is not.
func TestManifestsNetwork(t *testing.T) {
	all := manifests(t, "k8s/*.yaml")
	policies := map[string]networkPolicy{}
	for _, name := range []string{"k8s/05-network.yaml", "k8s/20-valkey.yaml", "k8s/30-web.yaml", "k8s/50-worker.yaml"} {
		for document := range strings.SplitSeq(readDoc(t, name), "\n---\n") {
			var p networkPolicy
			if err := yaml.Unmarshal([]byte(document), &p); err == nil && p.Kind == "NetworkPolicy" {
				policies[p.Metadata.Name] = p
			}
		}
	}
	ports := func(rules []networkRule) (found []int) {
		for _, r := range rules {
			for _, p := range r.Ports {
				found = append(found, p.Port)
			}
		}
		return found
	}
	valkey := findManifest(t, all, "StatefulSet", "valkey").Spec.Template.Spec.Containers[0].Ports[0].ContainerPort
	web := findManifest(t, all, "Deployment", "web").Spec.Template.Spec.Containers[0].Ports[0].ContainerPort
	for name, want := range map[string]struct{ in, out []int }{
		"default-deny": {},
		"dns":          {nil, []int{53, 53}},
		"web":          {[]int{web}, []int{valkey, 443}},
		"worker":       {nil, []int{valkey, 443, 6443}},
		"valkey":       {[]int{valkey}, nil},
	} {
		p := policies[name]
		if in, out := ports(p.Spec.Ingress), ports(p.Spec.Egress); !slices.Equal(in, want.in) || !slices.Equal(out, want.out) {
			t.Errorf("the NetworkPolicy %s lets in %v and out %v, expected %v and %v", name, in, out, want.in, want.out)
		}
		if name != "dns" && !slices.Equal(p.Spec.PolicyTypes, []string{"Ingress", "Egress"}) {
			t.Errorf("the NetworkPolicy %s is for %q only", name, p.Spec.PolicyTypes)
		}
		if selected := p.Spec.PodSelector.MatchLabels["app.kubernetes.io/name"]; name != "dns" && name != "default-deny" && selected != name {
			t.Errorf("the NetworkPolicy %s is for %q", name, selected)
		}
		for _, r := range p.Spec.Ingress {
			if len(r.From) == 0 || len(r.Ports) == 0 {
				t.Errorf("the NetworkPolicy %s lets everybody in, or to every port", name)
			}
		}
		for _, r := range p.Spec.Egress {
			if len(r.Ports) == 0 || name == "web" && len(r.To) == 0 {
				t.Errorf("the NetworkPolicy %s lets out to every port or address", name)
			}
		}
	}
	if from := policies["valkey"].Spec.Ingress[0].From; len(from) != 1 || len(from[0].PodSelector.MatchExpressions) != 1 ||
		!slices.Equal(from[0].PodSelector.MatchExpressions[0].Values, []string{"web", "worker"}) {
		t.Errorf("Valkey lets in %+v", from)
	}
}

// The policy is about the ServiceAccount that worker has, and about the
// annotation that the code sets, in the form that the code writes.
func TestManifestsRestartOnly(t *testing.T) {
	account := findManifest(t, manifests(t, "k8s/*.yaml"), "ServiceAccount", "worker")
	text := readDoc(t, "k8s/45-worker-restart-only.yaml")
	for _, part := range []string{
		"failurePolicy: Fail\n",
		"expression: request.userInfo.username == 'system:serviceaccount:" + account.Metadata.Namespace + ":" + account.Metadata.Name + "'\n",
		`expression: "'` + restartedAtAnnotation + `'"`,
		"validationActions: [Deny]\n",
	} {
		if !strings.Contains(text, part) {
			t.Errorf("the policy has no %q", part)
		}
	}
	form := regexp.MustCompile(`\.matches\(\s*'([^']+)'\)`).FindStringSubmatch(text)
	if form == nil {
		t.Fatal("the policy has no form for restartedAt")
	}
	for _, us := range []int64{0, 1, 999999, 1795312800123456} {
		if at := time.UnixMicro(us).UTC().Format(restartedAtLayout); !regexp.MustCompile(form[1]).MatchString(at) {
			t.Errorf("the policy would refuse %s", at)
		}
	}
}

func optionDefault(t *testing.T, env string) string {
	t.Helper()
	for _, o := range documentedOptions() {
		if o.env == env {
			return o.def
		}
	}
	t.Fatalf("no option %s", env)
	return ""
}
