//go:build dev

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
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
	kube := newKubeAPI(t)
	kube.create("a/web", spec{image: "ghcr.io/acme/web:main"})
	kube.client() // writes the kubeconfig
	m, cfg := testValkey(t)
	vars := env(map[string]string{"KUBECONFIG": kube.kubeconfig, "VALKEY_ADDR": cfg.Addr, "VALKEY_CHANNEL": cfg.Channel})
	var out, logs bytes.Buffer
	err := run(t.Context(), []string{"dev", "--once"}, vars, &out, &logs)
	if err == nil || !strings.Contains(err.Error(), "nothing was restarted") || len(kube.patchesOf("")) > 0 {
		t.Errorf("no Deployment runs the image: %v\n%s", err, &out)
	}
	if _, err := m.ZScore("krt:requested", apiDev); err != nil {
		t.Errorf("nothing is on record: %v", err)
	}
	out.Reset()
	err = run(t.Context(), []string{"dev", "--once", "--image", "ghcr.io/acme/web:main", "--repository", "acme/web"}, vars, &out, &logs)
	if err != nil || kube.restartedAt("a/web") == "" {
		t.Errorf("%v\n%s%s", err, &out, &logs)
	}
}
