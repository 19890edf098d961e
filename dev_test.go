//go:build dev

package main

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"kuberollouttrigger/internal/fake"
)

func TestDevOnce(t *testing.T) {
	var out, logs bytes.Buffer
	start := time.Now()
	if err := run(t.Context(), []string{"dev", "--once"}, env(nil), &out, &logs); err != nil {
		t.Fatalf("%v\n%s%s", err, &out, &logs)
	}
	for _, part := range []string{"web answers 202", "1 worker heard it", "shop/api ", "restartedAt is now", "shop/api-frozen", "paused", "shop/storefront", "left alone"} {
		if !strings.Contains(out.String(), part) {
			t.Errorf("the story does not say %q:\n%s", part, &out)
		}
	}
	if logs.Len() > 0 {
		t.Errorf("something is wrong, or too much is said:\n%s", &logs)
	}
	if took := time.Since(start); took > devTimeout {
		t.Errorf("took %s", took)
	}
}

// With KUBECONFIG and VALKEY_ADDR it uses what is there.
func TestDevOnAClusterOfOnesOwn(t *testing.T) {
	kube := newKubernetes(t)
	kube.Create("a/web", fake.Spec{Image: "ghcr.io/acme/web:main"})
	kube.PagedOnly = false // dev looks at the outcome
	m, cfg := testValkey(t)
	vars := env(map[string]string{"KUBECONFIG": kube.Kubeconfig(t.TempDir()), "VALKEY_ADDR": cfg.Addr, "VALKEY_CHANNEL": cfg.Channel})
	var out, logs bytes.Buffer
	err := run(t.Context(), []string{"dev", "--once"}, vars, &out, &logs)
	if err == nil || !strings.Contains(err.Error(), "nothing was restarted") || len(kube.Patches("")) > 0 {
		t.Errorf("no Deployment runs the image: %v\n%s", err, &out)
	}
	if want := "  " + cfg.Addr + ", as VALKEY_ADDR says\n"; !strings.Contains(out.String(), want) {
		t.Errorf("the banner does not say %q:\n%s", want, &out)
	}
	if want := "no Deployment that worker looks at runs " + apiDev; !strings.Contains(out.String(), want) {
		t.Errorf("the story does not say %q:\n%s", want, &out)
	}
	if _, err := m.ZScore("krt:requested", apiDev); err != nil {
		t.Errorf("nothing is on record: %v", err)
	}
	out.Reset()
	err = run(t.Context(), []string{"dev", "--once", "--image", "ghcr.io/acme/web:main", "--repository", "acme/web"}, vars, &out, &logs)
	if err != nil || kube.RestartedAt("a/web") == "" {
		t.Errorf("%v\n%s%s", err, &out, &logs)
	}
}

// ownCluster is the environment of dev with KUBECONFIG, and vars.
func ownCluster(t *testing.T, kube *fake.KubernetesAPI, vars map[string]string) func(string) string {
	kube.PagedOnly = false // dev looks at the outcome
	vars["KUBECONFIG"] = kube.Kubeconfig(t.TempDir())
	return env(vars)
}

// It looks where worker looks: a Role may allow no more.
func TestDevScope(t *testing.T) {
	kube := newKubernetes(t)
	for _, namespace := range []string{"a", "b", "c"} {
		kube.Create(namespace+"/api", fake.Spec{Image: apiDev})
	}
	kube.Forbid = func(_, namespace string) bool { return namespace != "a" && namespace != "c" }
	kube.Selector = "team=payments"
	vars := ownCluster(t, kube, map[string]string{"WORKER_NAMESPACES": "a,c", "WORKER_SELECTOR": kube.Selector})
	var out, logs bytes.Buffer
	err := run(t.Context(), []string{"dev", "--once"}, vars, &out, &logs)
	if err != nil || !strings.Contains(out.String(), " a/api ") || !strings.Contains(out.String(), " c/api ") || strings.Contains(out.String(), "b/api") {
		t.Errorf("%v\n%s%s", err, &out, &logs)
	}
}

// Of a big cluster, only what runs the image is of interest.
func TestDevOtherImages(t *testing.T) {
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	kube.Create("a/nginx", fake.Spec{Image: "nginx"})
	kube.Create("b/redis", fake.Spec{Image: "redis"})
	var out, logs bytes.Buffer
	err := run(t.Context(), []string{"dev", "--once"}, ownCluster(t, kube, map[string]string{}), &out, &logs)
	if err != nil || !strings.Contains(out.String(), " a/api ") || !strings.Contains(out.String(), " 2 with other images ") ||
		strings.Contains(out.String(), "nginx") || strings.Contains(out.String(), "redis") {
		t.Errorf("%v\n%s%s", err, &out, &logs)
	}
}

// When time is up it says how far things are, and until then it does not press
// the API server.
func TestDevOutOfTime(t *testing.T) {
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) { return http.StatusInternalServerError, nil }
	ctx, cancel := context.WithCancel(t.Context())
	var first time.Time
	kube.Forbid = func(verb, _ string) bool { // worker itself does not list
		if verb == "list" && first.IsZero() {
			first = time.Now()
		} else if verb == "list" {
			cancel()
			if pause := time.Since(first); pause < 150*time.Millisecond {
				t.Errorf("it looks again after %s", pause)
			}
		}
		return false
	}
	var out, logs bytes.Buffer
	err := run(ctx, []string{"dev", "--once"}, ownCluster(t, kube, map[string]string{}), &out, &logs)
	if err == nil || err.Error() != "nothing was restarted" || !strings.Contains(out.String(), "not restarted yet") {
		t.Errorf("%v\n%s%s", err, &out, &logs)
	}
}

func TestDevUsage(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // what is taken for right does not stay up
	for _, tt := range []struct{ args, want string }{
		{"once", `unexpected argument "once"; see kuberollouttrigger dev -h`},
		{"--once now", `unexpected argument "now"`},
		{"--repository acme", `--repository: "acme" is not a repository; expected owner/name, such as acme/api`},
		{"--repository acme/", "expected owner/name"},
		{"--repository /api", "expected owner/name"},
		{"--repository acme/api/x", "expected owner/name"},
		{"--repository a,b/api", "expected owner/name"},
		{"--image ghcr.io/acme/api", "--image: "},
	} {
		var out, logs bytes.Buffer
		err := run(ctx, append([]string{"dev"}, strings.Fields(tt.args)...), env(nil), &out, &logs)
		if usage := (usageError{}); !errors.As(err, &usage) || !strings.Contains(err.Error(), tt.want) || out.Len() > 0 {
			t.Errorf("dev %s: %v, want %q\n%s", tt.args, err, tt.want, &out)
		}
	}
}
