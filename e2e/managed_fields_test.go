package e2e

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
)

// managers are the histories of a Deployment, as commands for the Deployment $D,
// that leave different entries in managedFields.
var managers = map[string]string{
	"created by a client":    ``,
	"restarted with kubectl": `kubectl rollout restart deployment/$D`,
	"restarted and changed by the same manager": `patch e '{"spec":{"minReadySeconds":5,"template":{"metadata":{
		"annotations":{"a":"b","kubectl.kubernetes.io/restartedAt":"2026-01-01T00:00:00Z"}}}}}'`,
	"status and scale": `
		patch kube-controller-manager '{"status":{"observedGeneration":1}}' --subresource=status
		kubectl scale deployment/$D --replicas=5`, // the API server writes no time for scale
	"applied without annotations":   `apply flux '{}'`,
	"applied with no annotations":   `apply flux '{"annotations":{}}'`,
	"applied with another":          `apply flux '{"annotations":{"a":"b"}}'`,
	"applied with the annotation":   `apply flux '{"labels":{"team":"a"},"annotations":{"kubectl.kubernetes.io/restartedAt":"2026-01-01T00:00:00Z"}}'`,
	"applied with both":             `apply flux '{"annotations":{"a":"b","kubectl.kubernetes.io/restartedAt":"2026-01-01T00:00:00Z"}}'`,
	"applied with nothing else":     `apply restarter '{"annotations":{"kubectl.kubernetes.io/restartedAt":"2026-01-01T00:00:00Z"}}'`,
	"applied by two":                `apply flux '{"annotations":{"a":"b"}}'; apply argocd-controller '{"annotations":{"a":"b","c":"d"}}'`,
	"applied and updated by one":    `apply flux '{"annotations":{"a":"b"}}'; patch flux '{"metadata":{"labels":{"x":"y"}}}'`,
	"without managedFields":         `patch e '{"metadata":{"managedFields":[{}]}}'`,
	"the worker has more than that": `patch kuberollouttrigger '{"metadata":{"labels":{"a":"b"}}}'`,
	// The API server keeps ten entries of updates. It merges the oldest when the
	// worker's becomes the eleventh.
	"ten managers":                `for i in {1..9}; do patch m$i '{"metadata":{"labels":{"a'$i'":""}}}'; done`,
	"ten managers, merged before": `for i in {1..15}; do patch m$i '{"metadata":{"labels":{"a'$i'":""}}}'; done`,
	"ten managers, then restarted with kubectl": `for i in {1..9}; do patch m$i '{"metadata":{"labels":{"a'$i'":""}}}'; done
		kubectl rollout restart deployment/$D`,
	"ten managers that had the annotation": `for i in {1..9}; do patch m$i '{"metadata":{"labels":{"a'$i'":""}},
		"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"2026-01-0'$i'T00:00:00Z"}}}}}'; done`,
}

// kubectl runs commands for a Deployment as the administrator.
func (c cluster) kubectl(t testing.TB, d deployment, commands string) {
	t.Helper()
	const functions = `
		kubectl() { command kubectl --namespace="$NAMESPACE" "$@"; }
		patch() { kubectl patch deployment "$D" --type=merge --field-manager="$1" --patch="$2" "${@:3}"; }
		apply() {
			kubectl apply --server-side --force-conflicts --field-manager="$1" --filename=- <<<'
				{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"'"$D"'"},"spec":{"template":{"metadata":'"$2"'}}}'
		}
	`
	cmd := exec.Command("bash", "-euc", functions+commands)
	cmd.Env = []string{"PATH=" + c.bin + ":" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "NAMESPACE=" + d.namespace, "D=" + d.name,
		"KUBECONFIG=" + user{name: "admin", token: adminToken}.kubeconfig(t, c.url)}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", commands, err, out)
	}
}

// managedEntries are those of managedFields.
type managedEntries []any

func (c cluster) entries(t testing.TB, d deployment) managedEntries {
	t.Helper()
	list, _, err := unstructured.NestedSlice(c.get(t, d).Object, "metadata", "managedFields")
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func (l managedEntries) of(manager string) map[string]any {
	i := slices.IndexFunc(l, func(e any) bool { return e.(map[string]any)["manager"] == manager })
	if i < 0 {
		panic("no entry of " + manager + " in " + asJSON(l))
	}
	return l[i].(map[string]any)
}

func (l managedEntries) without(managers ...string) managedEntries {
	return slices.DeleteFunc(l, func(e any) bool { return slices.Contains(managers, e.(map[string]any)["manager"].(string)) })
}

// fieldManager is that of the worker.
const fieldManager = "kuberollouttrigger"

// annotationPath is that of the annotation in an entry.
var annotationPath = []string{"f:spec", "f:template", "f:metadata", "f:annotations", "f:" + restartedAtKey}

// others are the entries but the worker's, as they are without the annotation.
func (l managedEntries) others() (out []string) {
	for _, e := range l {
		entry := e.(map[string]any)
		fields, _ := entry["fieldsV1"].(map[string]any)
		if disown(fields, annotationPath...); len(fields) > 0 && entry["manager"] != fieldManager {
			out = append(out, asJSON(entry))
		}
	}
	slices.Sort(out)
	return out
}

// disown takes the annotation, and the members that are empty without it, from
// fieldsV1.
func disown(fields map[string]any, path ...string) {
	child, ok := fields[path[0]].(map[string]any)
	if !ok {
		return
	}
	if len(path) == 2 {
		delete(child, ".") // the map of annotations itself
		delete(child, path[1])
	} else {
		disown(child, path[1:]...)
	}
	if len(child) == 0 {
		delete(fields, path[0])
	}
}

// TestRestartOnlyManagers: whoever manages a Deployment, the worker restarts it, and
// the other entries lose nothing but the annotation.
func TestRestartOnlyManagers(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.install(t)
	account := c.worker(t)
	c.namespace(t, "shop")
	image := newImage()
	var all []deployment
	what := map[string]string{}
	add := func(history string) deployment {
		d := deployment{namespace: "shop", name: fmt.Sprint("api-", len(all)), images: []string{image}}
		c.create(t, d)
		all, what[d.name] = append(all, d), history
		return d
	}
	for _, history := range slices.Sorted(maps.Keys(managers)) {
		add(history)
	}
	// The policy's expressions have a budget, and must not exceed it.
	c.patch(t, add("ten managers and ten that apply, all large"), `{"metadata":{"managedFields":`+asJSON(largeEntries())+`},
		"spec":{"template":{"metadata":{"annotations":{"`+restartedAtKey+`":"2026-01-01T00:00:00Z"}}}}}`)
	c.awaitPolicy(t, c.as(t, account), all[0])

	valkey := startValkey(t)
	job := newClient(startWeb(t, valkey.addr).url)
	startWorker(t, valkey.addr, account.kubeconfig(t, c.url))
	merged := 0
	for round := range 3 {
		before := map[string][]string{}
		for _, d := range all {
			if round != 1 { // the second restart follows the first
				c.kubectl(t, d, managers[what[d.name]])
			}
			before[d.name] = c.entries(t, d).others()
		}
		c.mustRestart(t, job, all[0])
		want := restartedAt(c.get(t, all[0]))
		for _, d := range all {
			eventually(t, 20*time.Second, what[d.name]+" is restarted", func() error {
				if got := restartedAt(c.get(t, d)); got != want {
					return fmt.Errorf("restartedAt is %q, want %s", got, want)
				}
				return nil
			})
			present := c.entries(t, d)
			if len(present) > 0 { // without any, the API server begins none
				present.of(fieldManager)
			}
			after := present.others()
			gone := slices.DeleteFunc(slices.Clone(before[d.name]), func(e string) bool { return slices.Contains(after, e) })
			added := slices.DeleteFunc(after, func(e string) bool { return slices.Contains(before[d.name], e) })
			switch {
			case len(gone)+len(added) == 0:
			case strings.HasPrefix(what[d.name], "ten managers") && len(gone) <= 2 && len(added) == 1 && strings.Contains(added[0], `"ancient-changes"`):
				merged++
			default:
				t.Errorf("%s: gone %s, added %s", what[d.name], gone, added)
			}
		}
	}
	if merged < 5 {
		t.Errorf("the API server merged entries %d times", merged)
	}
	fmt.Printf("%s: %d histories with 3 restarts each; the API server merged entries in %d\n", t.Name(), len(all), merged)
}

// largeEntries are ten managers that apply and ten that update. Each has an entry of
// more than 6 kB, with the annotation.
func largeEntries() (large managedEntries) {
	for i := range 20 {
		entry := newEntry(fmt.Sprint("manager-", i), annotationPath...)
		if i < 10 {
			entry["operation"] = "Apply"
		}
		for j := range 150 {
			claim(entry, "f:spec", "f:template", "f:spec", "f:containers", `k:{"name":"main-0"}`, "f:env", fmt.Sprintf(`k:{"name":"VARIABLE_%d_%d"}`, i, j), "f:value")
		}
		large = append(large, entry)
	}
	return large
}

// newEntry is one of updates, which owns a path.
func newEntry(manager string, path ...string) map[string]any {
	entry := map[string]any{"manager": manager, "operation": "Update", "apiVersion": "apps/v1", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1"}
	claim(entry, path...)
	return entry
}

// claim makes an entry own a path.
func claim(entry map[string]any, path ...string) {
	if err := unstructured.SetNestedMap(entry, map[string]any{}, append([]string{"fieldsV1"}, path...)...); err != nil {
		panic(err)
	}
}

// forgery is a change of managedFields.
type forgery func(managedEntries) managedEntries

func claims(manager string, path ...string) forgery {
	return func(l managedEntries) managedEntries { claim(l.of(manager), path...); return l }
}

func drops(manager string, path ...string) forgery {
	return func(l managedEntries) managedEntries {
		unstructured.RemoveNestedField(l.of(manager), append([]string{"fieldsV1"}, path...)...)
		return l
	}
}

func sets(manager, member string, value any) forgery {
	return func(l managedEntries) managedEntries { l.of(manager)[member] = value; return l }
}

func removes(managers ...string) forgery {
	return func(l managedEntries) managedEntries { return l.without(managers...) }
}

// replaces takes entries away and adds one that has a further member, if any.
func replaces(managers []string, entry map[string]any, member ...string) forgery {
	if len(member) > 0 {
		entry[member[0]] = member[1]
	}
	return func(l managedEntries) managedEntries { return append(l.without(managers...), entry) }
}

func adds(entry map[string]any, member ...string) forgery { return replaces(nil, entry, member...) }

// forgeries come along with a restart of a Deployment with four entries: flux
// applies, security and kubectl-rollout update, the latter only the annotation, and
// kube-controller-manager updates the status.
var forgeries = map[string]forgery{
	"an applier owns another field":      claims("flux", "f:spec", "f:replicas"),
	"an applier owns a deeper field":     claims("flux", "f:spec", "f:template", "f:spec", "f:securityContext", "f:runAsNonRoot"),
	"an applier owns another annotation": claims("flux", "f:spec", "f:template", "f:metadata", "f:annotations", "f:a"),
	"an applier owns its spec":           claims("flux", "f:spec", "."),
	"an applier owns its template":       claims("flux", "f:spec", "f:template", "."),
	"somebody owns the spec":             claims("kube-controller-manager", "f:spec"),
	"an updater owns another field":      claims("security", "f:spec", "f:minReadySeconds"),
	"a field beside the annotation":      claims("kubectl-rollout", "f:spec", "f:replicas"),
	"a field in place of the annotation": replaces([]string{"kubectl-rollout"}, newEntry("kubectl-rollout", "f:spec", "f:replicas")),
	"a field less":                       drops("flux", "f:metadata", "f:labels", "f:team"),
	"no metadata":                        drops("flux", "f:metadata"),
	"no selector":                        drops("flux", "f:spec", "f:selector"),
	"no containers":                      drops("flux", "f:spec", "f:template", "f:spec", "f:containers"),
	"an updater removed":                 removes("security"),
	"an applier removed":                 removes("flux"),
	"all removed but one":                removes("flux", "kubectl-rollout", "kube-controller-manager"),
	"a new applier":                      adds(newEntry("argocd-controller", "f:spec", "f:replicas"), "operation", "Apply"),
	"a new updater":                      adds(newEntry("kubectl", "f:spec", "f:replicas")),
	"an updater made an applier":         sets("security", "operation", "Apply"),
	"an applier made an updater":         sets("flux", "operation", "Update"),
	"an updater renamed to an applier":   sets("security", "manager", "flux"),
	"an updater renamed to the worker":   sets("security", "manager", fieldManager),
	"another subresource":                sets("security", "subresource", "scale"),
	"another version":                    sets("security", "apiVersion", "apps/v1beta1"),
	"an earlier time":                    sets("security", "time", "2020-01-01T00:00:00Z"),
	"a later time":                       sets("security", "time", "2199-01-01T00:00:00Z"),
	"no time":                            sets("security", "time", nil),
	"the worker owns a field":            adds(newEntry(fieldManager, "f:spec", "f:replicas")),
	"the worker owns the spec":           adds(newEntry(fieldManager, "f:spec")),
	"the worker owns another annotation": adds(newEntry(fieldManager, "f:spec", "f:template", "f:metadata", "f:annotations", "f:a")),
	"the worker applies":                 adds(newEntry(fieldManager, "f:spec", "f:replicas"), "operation", "Apply"),
	"the worker in a subresource":        adds(newEntry(fieldManager, "f:spec", "f:replicas"), "subresource", "status"),
	"merged although there are few":      replaces([]string{"security"}, newEntry("ancient-changes", "f:spec", "f:replicas")),
	"two exchanged": func(l managedEntries) managedEntries {
		a, b := l.of("security"), l.of("flux")
		a["fieldsV1"], b["fieldsV1"] = b["fieldsV1"], a["fieldsV1"]
		return l
	},
}

// These change the entries without a restart. Along with one, the API server would
// undo them.
var idleForgeries = map[string]forgery{
	"an applier owns the annotation": claims("flux", annotationPath...), // and then removes it
	"an updater owns the annotation": adds(newEntry("kubectl", annotationPath...)),
	"the worker applies":             adds(newEntry(fieldManager, annotationPath...), "operation", "Apply"),
	"the worker's time": func(l managedEntries) managedEntries { // the API server ignores a change of nothing else
		claim(l.of(fieldManager), "f:spec", "f:template", "f:metadata", "f:annotations", ".")
		return sets(fieldManager, "time", "2199-01-01T00:00:00Z")(l)
	},
}

// When the API server merges the oldest entries of ten managers, the worker chooses
// neither how many nor which, and takes nothing from those who apply.
var mergeForgeries = map[string]forgery{
	"an applier removed":            removes("flux"),
	"an applier owns another field": claims("flux", "f:spec", "f:replicas"),
	"three merged":                  removes("m1", "m2"),
	"the newest merged":             replaces([]string{"m9"}, newEntry("ancient-changes", "f:metadata", "f:labels", "f:a9")),
	"merged at another time":        replaces([]string{"m1", "m2"}, newEntry("ancient-changes", "f:spec", "f:replicas"), "time", "2199-01-01T00:00:00Z"),
}

// TestRestartOnlyForgedManagers: with a restart, the worker can neither give nor take
// ownership of other fields. Otherwise the next server-side apply of their owner would
// remove fields that it does not apply.
func TestRestartOnlyForgedManagers(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.install(t)
	client := c.as(t, c.worker(t))
	c.namespace(t, "shop")
	d := deployment{namespace: "shop", name: "api", images: []string{newImage()}}
	applied := func(annotations string) string {
		return `{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"api","labels":{"team":"a"}},"spec":{"selector":{"matchLabels":{"app":"api"}},
			"template":{"metadata":{"labels":{"app":"api"}` + annotations + `},"spec":{"containers":[{"name":"main","image":"` + d.images[0] + `"}]}}}}`
	}
	apply := "kubectl apply --server-side --field-manager=flux --filename=- <<<'" + applied("") + "'\n"
	c.kubectl(t, d, apply+`
		patch security '{"spec":{"replicas":20,"template":{"metadata":{"annotations":{"a":"b"}},"spec":{"securityContext":{"runAsNonRoot":true}}}}}'
		patch kube-controller-manager '{"status":{"observedGeneration":1}}' --subresource=status
		kubectl rollout restart deployment/$D`)
	ten := deployment{namespace: "shop", name: "ten", images: []string{newImage()}}
	c.create(t, ten)
	c.kubectl(t, ten, `apply flux '{"labels":{"a":"b"}}'; `+managers["ten managers"])
	timed := c.entries(t, ten)
	timed.of("flux")["time"] = "2025-01-01T00:00:00Z"
	for i := 1; i <= 9; i++ {
		timed.of(fmt.Sprint("m", i))["time"] = fmt.Sprintf("2025-01-01T00:00:0%dZ", i)
	}
	c.patch(t, ten, `{"metadata":{"labels":{"timed":""},"managedFields":`+asJSON(timed)+`}}`)
	c.awaitPolicy(t, client, d)

	shop := client.Resource(deploymentsResource).Namespace("shop")
	dryRun := func(manager string) metav1.PatchOptions {
		return metav1.PatchOptions{FieldManager: manager, DryRun: []string{metav1.DryRunAll}}
	}
	restart := func(d deployment, at string, managed managedEntries, options metav1.PatchOptions) error {
		body := map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{"annotations": map[string]any{restartedAtKey: at}}}}}
		if managed != nil {
			body["metadata"] = map[string]any{"managedFields": managed}
		}
		_, err := shop.Patch(t.Context(), d.name, types.MergePatchType, []byte(asJSON(body)), options)
		return err
	}
	refused := 0
	check := func(what string, err error) {
		t.Helper()
		if by, _ := refusedBy(err); by != policyRefused {
			t.Errorf("%s: refused by %s", what, by)
			return
		}
		refused++
	}
	const first, next = "2026-11-21T02:00:00.123456Z", "2026-11-22T02:00:00.123456Z"
	for what, forge := range forgeries {
		check(what, restart(d, first, forge(c.entries(t, d)), dryRun(fieldManager)))
	}
	check("the list emptied", restart(d, first, managedEntries{}, dryRun(fieldManager)))
	check("the list reset", restart(d, first, managedEntries{map[string]any{}}, dryRun(fieldManager)))
	check("a restart by another name", restart(d, first, nil, dryRun("kubectl-edit")))
	check("a restart by the name of an applier", restart(d, first, nil, dryRun("flux")))
	for manager, object := range map[string]string{
		"flux": applied(`,"annotations":{"` + restartedAtKey + `":"` + first + `"}`),
		fieldManager: `{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"api"},
			"spec":{"template":{"metadata":{"annotations":{"` + restartedAtKey + `":"` + first + `"}}}}}`,
	} {
		o := dryRun(manager)
		o.Force = new(true)
		_, err := shop.Patch(t.Context(), d.name, types.ApplyPatchType, []byte(object), o)
		check("a restart by server-side apply as "+manager, err)
	}
	for what, forge := range mergeForgeries {
		check("ten managers, "+what, restart(ten, first, forge(c.entries(t, ten)), dryRun(fieldManager)))
	}

	// The API server ignores the order, and the time of the worker's own entry.
	options := metav1.PatchOptions{FieldManager: fieldManager}
	others := c.entries(t, d).others()
	reversed := c.entries(t, d)
	slices.Reverse(reversed)
	timed = append(c.entries(t, d), newEntry(fieldManager, annotationPath...))
	for at, managed := range map[string]managedEntries{"2026-11-21T01:00:00.123456Z": reversed, first: timed} {
		if err := restart(d, at, managed, options); err != nil {
			t.Errorf("a restart with the managedFields %s: %v", asJSON(managed), err)
		}
		present := c.entries(t, d)
		if after := present.others(); !slices.Equal(after, others) || present.of(fieldManager)["time"] == "2026-01-01T00:00:00Z" {
			t.Errorf("managedFields were %s and are %s, %s", others, after, asJSON(present))
		}
	}
	for what, forge := range idleForgeries {
		check("without a restart, "+what, restart(d, restartedAt(c.get(t, d)), forge(c.entries(t, d)), dryRun(fieldManager)))
	}

	// Not a dry run: an unchanged apply after a forgery removes nothing.
	l := c.entries(t, d)
	claim(l.of("flux"), "f:spec", "f:replicas")
	claim(l.of("flux"), "f:spec", "f:template", "f:spec", "f:securityContext", "f:runAsNonRoot")
	check("all replaced by an applier that owns more", restart(d, next, managedEntries{l.of("flux")}, options))
	if err := restart(ten, next, nil, options); err != nil || !strings.Contains(asJSON(c.entries(t, ten)), `"ancient-changes"`) {
		t.Errorf("ten managers: %v, or the API server merged nothing", err)
	}
	c.kubectl(t, d, apply)
	object := c.get(t, d).Object
	replicas, _, _ := unstructured.NestedInt64(object, "spec", "replicas")
	nonRoot, _, _ := unstructured.NestedBool(object, "spec", "template", "spec", "securityContext", "runAsNonRoot")
	if replicas != 20 || !nonRoot {
		t.Errorf("an unchanged apply left %d replicas, want 20, and runAsNonRoot %t", replicas, nonRoot)
	}
	fmt.Printf("%s: %d forgeries refused by the policy; %d replicas after an unchanged apply\n", t.Name(), refused, replicas)
}
