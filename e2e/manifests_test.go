package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// readManifests parses the files that match a pattern, in kubectl's order.
func readManifests(t testing.TB, pattern string) (objects []*unstructured.Unstructured) {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %d files, %v", pattern, len(names), err)
	}
	for _, name := range names {
		file, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		decoder := yaml.NewYAMLOrJSONDecoder(file, 4096)
		for {
			object := &unstructured.Unstructured{}
			err := decoder.Decode(&object.Object)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			objects = append(objects, object)
		}
	}
	return objects
}

func manifestNamed(t testing.TB, objects []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	for _, object := range objects {
		if object.GetKind() == kind && object.GetName() == name {
			return object
		}
	}
	t.Fatalf("k8s has no %s %s", kind, name)
	return nil
}

// resourceOf is the resource of a kind: its plural.
func resourceOf(object *unstructured.Unstructured) schema.GroupVersionResource {
	kind := object.GroupVersionKind()
	plural := strings.ToLower(kind.Kind)
	switch {
	case strings.HasSuffix(plural, "y"):
		plural = strings.TrimSuffix(plural, "y") + "ies"
	case strings.HasSuffix(plural, "s"):
		plural += "es"
	default:
		plural += "s"
	}
	return kind.GroupVersion().WithResource(plural)
}

// Modules with CustomResourceDefinitions, in the last version that this Go can load.
const (
	gatewayAPI         = "sigs.k8s.io/gateway-api@v1.6.3"
	prometheusOperator = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
)

// installHTTPRoute adds the kind HTTPRoute of the Gateway API's standard channel.
func (c cluster) installHTTPRoute(t testing.TB) {
	t.Helper()
	c.installDefinition(t, gatewayAPI, "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",
		schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "httproutes"})
}

// installDefinition adds a kind that a file of a module defines.
func (c cluster) installDefinition(t testing.TB, from, file string, kind schema.GroupVersionResource) {
	t.Helper()
	out, err := exec.Command("go", "mod", "download", "-json", from).Output()
	var module struct{ Dir string }
	if err := errors.Join(err, json.Unmarshal(out, &module)); err != nil {
		t.Fatalf("downloading %s: %v\n%s", from, err, out)
	}
	definitions := readManifests(t, filepath.Join(module.Dir, file))
	c.mustApply(t, "", definitions, false)
	eventually(t, 30*time.Second, kind.Resource+" are established and served", func() error {
		definition, err := c.admin.Resource(resourceOf(definitions[0])).Get(t.Context(), definitions[0].GetName(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		conditions, _, _ := unstructured.NestedSlice(definition.Object, "status", "conditions")
		established := func(condition any) bool {
			is := condition.(map[string]any)
			return is["type"] == "Established" && is["status"] == "True"
		}
		if !slices.ContainsFunc(conditions, established) {
			return fmt.Errorf("its conditions are %v", conditions)
		}
		_, err = c.admin.Resource(kind).List(t.Context(), metav1.ListOptions{})
		return err
	})
}

// TestManifestsApply: every manifest is accepted, first as a dry run and then for
// real. Applied again, it changes nothing.
func TestManifestsApply(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	objects := append(readManifests(t, "../k8s/*.yaml"), readManifests(t, "../k8s/optional/*.yaml")...)
	// A dry run makes no namespace, so that the first one has to be there.
	c.mustApply(t, "", objects[:1], false)
	c.mustApply(t, "", objects, true)
	first := c.mustApply(t, "", objects, false)
	if second := c.mustApply(t, "", objects, false); !slices.Equal(first, second) {
		t.Errorf("the second time something changed:\n%s\n%s", strings.Join(first, "\n"), strings.Join(second, "\n"))
	}
	c.namespace(t, "shop")
	c.installHTTPRoute(t)
	for _, pattern := range []string{"../k8s/namespaced/*.yaml", "../k8s/examples/*.yaml"} {
		namespaced := readManifests(t, pattern)
		c.mustApply(t, "shop", namespaced, true)
		first := c.mustApply(t, "shop", namespaced, false)
		if second := c.mustApply(t, "shop", namespaced, false); !slices.Equal(first, second) {
			t.Errorf("%s: the second time something changed:\n%q\n%q", pattern, first, second)
		}
		objects = append(objects, namespaced...)
	}
	fmt.Printf("%s: %d objects applied twice, the second time without a change\n", t.Name(), len(objects))
}

// TestKubectlApply runs the commands of the README with the files of a release, and
// those of docs/install.md with a clone, on an empty cluster each. They make
// everything, and the next time kubectl says that nothing changed.
func TestKubectlApply(t *testing.T) {
	t.Parallel()
	_, assets := releaseAssets(t, "acme/kuberollouttrigger", "v1.0.0")
	server := httptest.NewServer(http.FileServer(http.Dir(assets)))
	t.Cleanup(server.Close)
	edited := t.TempDir()
	config := strings.ReplaceAll(readText(t, assets+"/config.yaml"), "REPLACE_ME", "acme")
	if err := os.WriteFile(edited+"/config.yaml", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	const latest = "https://github.com/OWNER/kuberollouttrigger/releases/latest/download/"
	_, apply, _ := strings.Cut(readText(t, "../docs/install.md"), "\n## Apply\n")
	apply, _, _ = strings.Cut(apply, "\n```\n")
	for name, from := range map[string]struct {
		text, dir string
		objects   []*unstructured.Unstructured
		want      []string // where the commands to apply begin
	}{
		"release": {strings.ReplaceAll(readText(t, "../README.md"), latest, server.URL+"/"), edited, readManifests(t, assets+"/*.yaml"),
			[]string{"apply -f " + server.URL + "/kuberollouttrigger.yaml", "apply -f config.yaml", "apply -f k8s/"}},
		"clone": {apply, "..", readManifests(t, "../k8s/*.yaml"), []string{"apply -f k8s/00-namespace.yaml", "apply -f k8s/"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var applies []string
			secret := ""
			for _, m := range regexp.MustCompile(`(?m)^ *kubectl (.*)$`).FindAllStringSubmatch(from.text, -1) {
				switch {
				case strings.HasPrefix(m[1], "apply "):
					applies = append(applies, m[1])
				case strings.Contains(m[1], " create secret "):
					secret = m[1]
				}
			}
			if !slices.Equal(applies, from.want) || secret == "" {
				t.Fatalf("the commands are %q and %q", applies, secret)
			}
			startCluster(t).mustApplyTwice(t, from.dir, slices.DeleteFunc(applies, func(apply string) bool {
				return name == "release" && apply == "apply -f k8s/"
			}), secret, from.objects)
		})
	}
}

// TestStorageClass: the command of docs/install.md names the class of Valkey's volume in a
// cluster without a default one, and what is applied later does not undo it.
func TestStorageClass(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	command := regexp.MustCompile(`(?m)^kubectl .* patch pvc .*$`).FindString(readText(t, "../docs/install.md"))
	apply := "kubectl apply -f k8s/00-namespace.yaml -f k8s/20-valkey.yaml"
	cmd := exec.Command("bash", "-euc", strings.Join([]string{apply, strings.ReplaceAll(command, "NAME", "fast"), apply}, "\n"))
	cmd.Dir, cmd.Env = "..", []string{"PATH=" + c.bin + ":" + os.Getenv("PATH"), "HOME=" + t.TempDir(),
		"KUBECONFIG=" + user{name: "admin", token: adminToken}.kubeconfig(t, c.url)}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	claims := schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}
	claim, err := c.admin.Resource(claims).Namespace(home).Get(t.Context(), "valkey", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if class, _, _ := unstructured.NestedString(claim.Object, "spec", "storageClassName"); command == "" || class != "fast" {
		t.Errorf("after %q the class is %q", command, class)
	}
}

// mustApplyTwice runs the arguments of kubectl in a folder: the first one, the one that
// makes the Secret, the others, and then all that apply once more.
func (c cluster) mustApplyTwice(t testing.TB, dir string, applies []string, secret string, objects []*unstructured.Unstructured) {
	t.Helper()
	env := []string{"PATH=" + c.bin + ":" + os.Getenv("PATH"), "HOME=" + t.TempDir(),
		"KUBECONFIG=" + user{name: "admin", token: adminToken}.kubeconfig(t, c.url)}
	run := func(arguments string) (lines []string) {
		t.Helper()
		cmd := exec.Command("bash", "-euc", "kubectl "+arguments)
		cmd.Dir, cmd.Env = dir, env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl %s: %v\n%s", arguments, err, out)
		}
		return strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	versions := map[string][]string{}
	for _, want := range []string{" created", " unchanged"} {
		lines := run(applies[0])
		if want == " created" {
			run(secret)
		}
		for _, apply := range applies[1:] {
			lines = append(lines, run(apply)...)
		}
		seen := map[string]bool{}
		for _, line := range lines {
			name, verdict, _ := strings.Cut(line, " ")
			switch {
			case " "+verdict == want:
			case line == "namespace/"+home+" unchanged": // an earlier command made it
			case strings.HasPrefix(name, "poddisruptionbudget.policy/") && verdict == "configured":
				// kubectl always sends its selector, whose merge strategy is to be
				// replaced, and calls that configured.
			default:
				t.Errorf("kubectl says %q, want%s", line, want)
			}
			seen[name] = true
		}
		if len(seen) != len(objects) {
			t.Errorf("%d of %d objects:\n%s", len(seen), len(objects), strings.Join(lines, "\n"))
		}
		for _, object := range objects {
			got, err := c.admin.Resource(resourceOf(object)).Namespace(object.GetNamespace()).Get(t.Context(), object.GetName(), metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			versions[want] = append(versions[want], object.GetKind()+" "+object.GetName()+" "+got.GetResourceVersion())
		}
	}
	if !slices.Equal(versions[" created"], versions[" unchanged"]) {
		t.Errorf("the second time something changed:\n%q\n%q", versions[" created"], versions[" unchanged"])
	}
}

// TestManifestsRestricted: the pods of the Deployments and the StatefulSet pass the
// Pod Security level restricted, which the namespace enforces, and only the worker
// has a token.
func TestManifestsRestricted(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	objects := c.install(t)
	pods := schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	dryRun := func(name string, template map[string]any) (*unstructured.Unstructured, error) {
		pod := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}}
		pod.SetName(name)
		return c.admin.Resource(pods).Namespace(home).Create(t.Context(), pod,
			metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict})
	}
	seen := 0
	for _, object := range objects {
		template, ok, _ := unstructured.NestedMap(object.Object, "spec", "template")
		if !ok {
			continue
		}
		seen++
		name := object.GetName()
		var pod *unstructured.Unstructured
		eventually(t, 10*time.Second, "the pod of "+name+" is admitted", func() (err error) {
			pod, err = dryRun(name, template) // the ServiceAccount is new to admission's cache
			return err
		})
		if mounted := strings.Contains(asJSON(pod.Object), "serviceAccountToken"); mounted != (name == "worker") {
			t.Errorf("%s: a token is mounted: %t", name, mounted)
		}
		if account, _, _ := unstructured.NestedString(pod.Object, "spec", "serviceAccountName"); account != name {
			t.Errorf("%s runs as the ServiceAccount %q", name, account)
		}

		// The namespace does enforce it.
		if err := unstructured.SetNestedField(template, true, "spec", "hostNetwork"); err != nil {
			t.Fatal(err)
		}
		if _, err := dryRun(name, template); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "violates PodSecurity") {
			t.Errorf("%s with hostNetwork: %v", name, err)
		}
	}
	if seen != 3 {
		t.Errorf("%d pod templates", seen)
	}
}

// manifestContainer is the one container of a Deployment in k8s/.
func manifestContainer(t testing.TB, file, name string) map[string]any {
	t.Helper()
	set := manifestNamed(t, readManifests(t, file), "Deployment", name)
	containers, _, _ := unstructured.NestedSlice(set.Object, "spec", "template", "spec", "containers")
	if len(containers) != 1 {
		t.Fatalf("%s has %d containers", name, len(containers))
	}
	return containers[0].(map[string]any)
}

// memoryOf is a container's memory in bytes, of its requests or its limits.
func memoryOf(t testing.TB, container map[string]any, kind string) int64 {
	t.Helper()
	value, _, _ := unstructured.NestedString(container, "resources", kind, "memory")
	quantity, err := resource.ParseQuantity(value)
	if err != nil {
		t.Fatalf("memory %q: %v", value, err)
	}
	return quantity.Value()
}
