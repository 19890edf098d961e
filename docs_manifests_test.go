package main

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// manifest is what the tests read of a Kubernetes object.
type manifest struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
	Data     map[string]string
	Spec     struct {
		Ports    []struct{ TargetPort any }
		Template struct {
			Spec struct{ Containers []container }
		}
		PodSelector     struct{ MatchLabels map[string]string }
		PolicyTypes     []string
		Ingress, Egress []networkRule
	}
}

type container struct {
	Args    []string
	EnvFrom []struct{ ConfigMapRef struct{ Name string } }
	Env     []struct {
		Name, Value string
		ValueFrom   struct{ SecretKeyRef struct{ Name, Key string } }
	}
	Ports []struct {
		Name          string
		ContainerPort int
	}
	LivenessProbe, ReadinessProbe struct{ HTTPGet struct{ Path, Port string } }
}

type networkRule struct {
	From, To []any
	Ports    []struct{ Port int }
}

// manifests parses k8s/*.yaml, by kind and name.
func manifests(t *testing.T) map[string]manifest {
	t.Helper()
	all := map[string]manifest{}
	for _, name := range docNames(t, "k8s/*.yaml") {
		for document := range strings.SplitSeq(readDoc(t, name), "\n---\n") {
			var m manifest
			if err := yaml.Unmarshal([]byte(document), &m); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			all[m.Kind+" "+m.Metadata.Name] = m
		}
	}
	return all
}

// container returns the first container of a workload.
func (m manifest) container() container { return m.Spec.Template.Spec.Containers[0] }

// The program starts with the environment of the manifests, once the
// placeholders are replaced: it gets as far as a port that is in use.
func TestManifestsEnvironment(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	replaced := map[string]string{
		"ALLOWED_IMAGE_PREFIX": "ghcr.io/acme", "GITHUB_ALLOWED_ORG": "acme", "GITHUB_OIDC_AUDIENCE": "https://rollout.example.com",
	}
	all := manifests(t)
	for _, name := range []string{"web", "worker"} {
		c, options, vars := all["Deployment "+name].container(), helpOptions(t, name), []string{"KUBECONFIG=testdata/kubeconfig"}
		add := func(variable, value string) {
			if strings.Contains(value, "REPLACE_ME") {
				value = replaced[variable]
			}
			if _, ok := options[variable]; !ok && variable != "GOMEMLIMIT" {
				t.Errorf("k8s gives %s to %s, which has no such option", variable, name)
			} else if value != "" {
				vars = append(vars, variable+"="+value)
			}
		}
		for _, from := range c.EnvFrom {
			for variable, value := range all["ConfigMap "+from.ConfigMapRef.Name].Data {
				add(variable, value)
			}
		}
		for _, e := range c.Env {
			add(e.Name, e.Value)
		}
		if !slices.Equal(c.Args, []string{name}) || !slices.Contains(vars, "VALKEY_USERNAME="+name) {
			t.Errorf("%s has the arguments %q and the environment %q", name, c.Args, vars)
		}
		_, stderr, code := program(t, vars, name, "--ops-listen-addr", taken.Addr().String(), "--valkey-addr=127.0.0.1:1")
		if code != 1 || !strings.Contains(stderr, "address already in use") {
			t.Errorf("%s: exit %d\n%s", name, code, stderr)
		}
	}
}

// The ports, the probes and the Services are those of the program.
func TestManifestsPorts(t *testing.T) {
	all := manifests(t)
	for name, want := range map[string]map[string]string{
		"web":    {"http": "WEB_LISTEN_ADDR", "ops": "OPS_LISTEN_ADDR"},
		"worker": {"ops": "OPS_LISTEN_ADDR"},
	} {
		c, options := all["Deployment "+name].container(), helpOptions(t, name)
		for _, p := range c.Ports {
			if got := fmt.Sprintf(":%d", p.ContainerPort); got != options[want[p.Name]] {
				t.Errorf("%s has the port %s as %q, and listens on %q", name, p.Name, got, options[want[p.Name]])
			}
		}
		live, ready := c.LivenessProbe.HTTPGet, c.ReadinessProbe.HTTPGet
		if len(c.Ports) != len(want) || live.Path != "/healthz" || live.Port != "ops" || ready.Path != "/readyz" || ready.Port != "ops" {
			t.Errorf("%s has the ports %v and the probes %v and %v", name, c.Ports, live, ready)
		}
	}
	for name, workload := range map[string]string{"web": "Deployment web", "valkey": "StatefulSet valkey"} {
		if service := all["Service "+name].Spec.Ports; len(service) != 1 || service[0].TargetPort != all[workload].container().Ports[0].Name {
			t.Errorf("the Service %s has the ports %v", name, service)
		}
	}
}

// NetworkPolicies allow what the pods listen on and connect to, and no more.
func TestManifestsNetwork(t *testing.T) {
	all := manifests(t)
	web, valkey := all["Deployment web"].container().Ports[0].ContainerPort, all["StatefulSet valkey"].container().Ports[0].ContainerPort
	for name, want := range map[string]string{
		"default-deny": "in [] out []",
		"dns":          "in [] out [53 53]",
		"web":          fmt.Sprintf("in [%d] out [%d 443]", web, valkey),
		"worker":       fmt.Sprintf("in [] out [%d 443 6443]", valkey),
		"valkey":       fmt.Sprintf("in [%d] out []", valkey),
	} {
		p, ports := all["NetworkPolicy "+name].Spec, [2][]int{}
		for i, rules := range [][]networkRule{p.Ingress, p.Egress} {
			for _, r := range rules {
				if len(r.Ports) == 0 || len(r.From)+len(r.To) == 0 && name != "dns" && name != "worker" {
					t.Errorf("the NetworkPolicy %s allows every port or address", name)
				}
				for _, port := range r.Ports {
					ports[i] = append(ports[i], port.Port)
				}
			}
		}
		if got := fmt.Sprintf("in %v out %v", ports[0], ports[1]); got != want {
			t.Errorf("the NetworkPolicy %s allows %s, expected %s", name, got, want)
		}
		pods := p.PodSelector.MatchLabels["app.kubernetes.io/name"]
		if pods != name && name != "dns" && name != "default-deny" || len(p.PolicyTypes) != 2 && name != "dns" {
			t.Errorf("the NetworkPolicy %s is for %q, %q", name, pods, p.PolicyTypes)
		}
	}
}

// The admission policy is for the worker's ServiceAccount, and denies.
func TestManifestsRestartOnly(t *testing.T) {
	account := manifests(t)["ServiceAccount worker"].Metadata
	text := readDoc(t, "k8s/45-worker-restart-only.yaml")
	parts := []string{
		"kind: ValidatingAdmissionPolicyBinding\n", "failurePolicy: Fail\n", "validationActions: [Deny]\n", "'" + restartedAtAnnotation + "'",
		"['" + fieldManager + "', 'Update', request.resource.group",
		"request.userInfo.username == 'system:serviceaccount:" + account.Namespace + ":" + account.Name + "'\n",
	}
	for _, k := range kinds {
		parts = append(parts, "apiGroups: ["+k.resource.Group+"]\n", k.resource.Resource+", "+k.resource.Resource+"/*")
	}
	// docs/troubleshooting.md quotes a denial.
	_, denial, _ := strings.Cut(readDoc(t, "docs/troubleshooting.md"), "' denied request: ")
	denial, _, _ = strings.Cut(denial, "\n")
	parts = append(parts, "message: "+denial+"\n")
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("the admission policy has no %q", part)
		}
	}
}
