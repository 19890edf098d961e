package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"kuberollouttrigger/internal/fake"
)

// bench measures f, which returns whether its result is right.
func bench(b *testing.B, name string, f func() bool) {
	b.Run(name, func(b *testing.B) {
		for b.Loop() {
			if !f() {
				b.Fatal("a wrong result")
			}
		}
	})
}

// BenchmarkVerify is what a token costs; a forged one must cost less. go-jose is the
// limit that a valid one is held to: what it takes by itself, with fewer checks.
func BenchmarkVerify(b *testing.B) {
	issuer := newTestIssuer(b)
	v, token := newTestVerifier(b, issuer), issuer.with(nil)
	_, key := issuer.Key()
	accepts := func(token string) bool { _, err := v.verify(token); return err == nil }
	bench(b, "valid", func() bool { return accepts(token) })
	bench(b, "go-jose", func() bool {
		var c jwt.Claims
		parsed, err := jwt.ParseSigned(token, signatureAlgorithms)
		return err == nil && parsed.Claims(&key.PublicKey, &c) == nil && c.Subject != ""
	})
	deep := strings.Repeat(`{"":`, 900) + "{" + strings.Repeat(`"":1,`, 200) + `"":1}` + strings.Repeat("}", 900)
	for name, forged := range map[string]string{"unknown kid": issuer.withHeader("kid", "forged"), "duplicates nested deeply": issuer.sign(deep, "")} {
		bench(b, name, func() bool { return !accepts(forged) })
	}
}

func BenchmarkParse(b *testing.B) {
	tags := strings.Split("dev"+strings.Repeat(" dev", maxTags-1), " ")
	for i := range tags {
		tags[i] += fmt.Sprint(i)
	}
	one, all := jsonBytes(map[string]any{"image": apiDev}), jsonBytes(map[string]any{"image": "ghcr.io/acme/api", "tags": tags})
	bench(b, "one image", func() bool { images, _ := parseRequest(one); return len(images) == 1 })
	bench(b, "32 tags", func() bool { images, _ := parseRequest(all); return len(images) == maxTags })
}

func BenchmarkPolicy(b *testing.B) {
	p := mustPolicy(b, []string{"acme"}, nil, designPolicy+oneRule("ref", "refs/tags/v*", "ghcr.io/{repository}:dev"))
	c, images := jobClaims(claims{"ref": "refs/tags/v1"}), []string{apiDev} // only the third rule matches
	bench(b, "three rules", func() bool { return p.checkClaims(c) == nil && p.checkImages(c, images) == nil })
}

func BenchmarkLookUp(b *testing.B) {
	c := newWorkloadCache(workerConfig{Kinds: kinds[:1]}, dynamic.NewForConfigOrDie(&rest.Config{}), nil, time.Now, func(*workload) {})
	for i := range 11200 {
		c.put(&workload{kind: kinds[0], name: fmt.Sprint(i), images: []usedImage{{ref: fmt.Sprintf("ghcr.io/acme/api:%d", i/4)}}}, fromWatch)
	}
	bench(b, "11,200 Deployments", func() bool { return len(c.running("ghcr.io/acme/api:2000")) == 4 })
}

func BenchmarkNewWorkload(b *testing.B) {
	kube := fake.NewKubernetesAPI(b.Errorf)
	b.Cleanup(kube.Close)
	kube.Create("a/api", fake.Spec{Image: apiDev, Init: webDev})
	u := &unstructured.Unstructured{Object: kube.Object("a/api")}
	container := children(child(child(child(u.Object, "spec"), "template"), "spec"), "containers")[0]
	for env := []any{}; len(jsonBytes(u.Object)) < 6<<10; container["env"] = env {
		env = append(env, map[string]any{"name": fmt.Sprint("VARIABLE_", len(env)), "value": strings.Repeat("v", 40)})
	}
	bench(b, "6 kB", func() bool { return len(newWorkload(kinds[0], u).images) == 2 })
}
