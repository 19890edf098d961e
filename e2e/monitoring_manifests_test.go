package e2e

import (
	"os"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// monitoringPolicy is the NetworkPolicy at the end of k8s/05-network.yaml, which is a
// comment there.
func monitoringPolicy(t testing.TB) *unstructured.Unstructured {
	t.Helper()
	text, err := os.ReadFile("../k8s/05-network.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, commented, found := strings.Cut(string(text), "\n# ---\n")
	var lines []string
	for line := range strings.Lines(commented) {
		uncommented, ok := strings.CutPrefix(line, "# ")
		if !ok {
			t.Fatalf("in the commented NetworkPolicy is the line %q", line)
		}
		lines = append(lines, uncommented)
	}
	policy := &unstructured.Unstructured{}
	if err := yaml.UnmarshalStrict([]byte(strings.Join(lines, "")), &policy.Object); err != nil || !found {
		t.Fatalf("the commented NetworkPolicy: found %t, %v", found, err)
	}
	return policy
}

// selects reports whether the LabelSelector at a path selects labels.
func selects(t testing.TB, object map[string]any, set map[string]string, path ...string) bool {
	t.Helper()
	raw, found, _ := unstructured.NestedMap(object, path...)
	var selector metav1.LabelSelector
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(raw, &selector); err != nil || !found {
		t.Fatalf("%v: found %t, %v", path, found, err)
	}
	parsed, err := metav1.LabelSelectorAsSelector(&selector)
	if err != nil {
		t.Fatal(err)
	}
	return parsed.Matches(labels.Set(set))
}

// TestMonitoringManifests: the API server takes the files of k8s/monitoring/ and the
// NetworkPolicy that is a comment. They are about the ops port of web and worker, and
// nothing else.
func TestMonitoringManifests(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.install(t)
	for _, kind := range []string{"podmonitors", "prometheusrules"} {
		c.installDefinition(t, prometheusOperator, "example/prometheus-operator-crd/monitoring.coreos.com_"+kind+".yaml",
			schema.GroupVersionResource{Group: "monitoring.coreos.com", Version: "v1", Resource: kind})
	}
	c.namespace(t, "monitoring")
	c.namespace(t, "elsewhere")
	monitoring := readManifests(t, "../k8s/monitoring/*.yaml")
	policy := monitoringPolicy(t)
	c.mustApply(t, "", append(monitoring, policy), true)
	c.mustApply(t, "", append(monitoring, policy), false)
	for _, object := range append(monitoring, policy) {
		if object.GetNamespace() != home {
			t.Errorf("%s is in the namespace %q", object.GetKind(), object.GetNamespace())
		}
	}
	ingress := mustAdmitMonitoring(t, c, policy)
	monitor := manifestNamed(t, monitoring, "PodMonitor", home)
	mustBeAboutOps(t, monitor, policy, ingress)
}

// mustAdmitMonitoring checks that a NetworkPolicy is about ingress alone, from the
// namespace monitoring alone, and returns its rule.
func mustAdmitMonitoring(t testing.TB, c cluster, policy *unstructured.Unstructured) map[string]any {
	t.Helper()
	rule := policy.Object["spec"].(map[string]any)["ingress"].([]any)
	if types, _, _ := unstructured.NestedStringSlice(policy.Object, "spec", "policyTypes"); len(rule) != 1 || len(types) != 1 || types[0] != "Ingress" {
		t.Fatalf("the NetworkPolicy has the types %q and %d rules", types, len(rule))
	}
	ingress := rule[0].(map[string]any)
	peers, _, _ := unstructured.NestedSlice(ingress, "from")
	if len(peers) != 1 || len(peers[0].(map[string]any)) != 1 {
		t.Fatalf("the NetworkPolicy allows %v", peers)
	}
	for name, allowed := range map[string]bool{"monitoring": true, "elsewhere": false} {
		namespace, err := c.admin.Resource(namespacesResource).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if selects(t, peers[0].(map[string]any), namespace.GetLabels(), "namespaceSelector") != allowed {
			t.Errorf("the namespace %s is allowed: %t", name, !allowed)
		}
	}
	return ingress
}

// mustBeAboutOps checks that a PodMonitor and a NetworkPolicy select web and the worker,
// and their ops port.
func mustBeAboutOps(t testing.TB, monitor, policy *unstructured.Unstructured, ingress map[string]any) {
	t.Helper()
	endpoints, _, _ := unstructured.NestedSlice(monitor.Object, "spec", "podMetricsEndpoints")
	endpoint := endpoints[0].(map[string]any)
	if len(endpoints) != 1 || endpoint["path"] != "/metrics" {
		t.Errorf("the PodMonitor has the endpoints %v", endpoints)
	}
	for name, monitored := range map[string]bool{"web": true, "worker": true, "valkey": false} {
		kind := "Deployment"
		if !monitored {
			kind = "StatefulSet"
		}
		workload := manifestNamed(t, readManifests(t, "../k8s/*.yaml"), kind, name)
		template, _, _ := unstructured.NestedStringMap(workload.Object, "spec", "template", "metadata", "labels")
		if selects(t, policy.Object, template, "spec", "podSelector") != monitored || selects(t, monitor.Object, template, "spec", "selector") != monitored {
			t.Errorf("%s is selected by NetworkPolicy and PodMonitor: not both %t", name, monitored)
		}
	}
	for file, name := range map[string]string{"30-web": "web", "50-worker": "worker"} {
		for _, port := range manifestContainer(t, "../k8s/"+file+".yaml", name)["ports"].([]any) {
			port := port.(map[string]any)
			want := asJSON([]any{map[string]any{"port": port["containerPort"], "protocol": "TCP"}})
			isOps, scraped, allowed := port["name"] == "ops", port["name"] == endpoint["port"], asJSON(ingress["ports"]) == want
			if scraped != isOps || allowed != isOps {
				t.Errorf("the port %v of %s is scraped: %t, and allowed: %t", port["name"], name, scraped, allowed)
			}
		}
	}
}
