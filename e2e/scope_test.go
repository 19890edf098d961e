package e2e

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestNamespacedScope: WORKER_NAMESPACES with a Role in each is enough, and
// nothing outside them is touched.
func TestNamespacedScope(t *testing.T) {
	v := startValkey(t)
	one, two, outside := newNamespace(t), newNamespace(t), newNamespace(t)
	image := newImage()
	inOne, inTwo := deployment{namespace: one, name: "api", images: []string{image}}, deployment{namespace: two, name: "api", images: []string{image}}
	beyond := deployment{namespace: outside, name: "api", images: []string{image}}
	createAll(t, []deployment{inOne, inTwo, beyond})
	r := record(t, one, two, outside)
	startWorker(t, v.addr, newWorkerUser(t, one, two).kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+one+","+two)
	c := newClient(startWeb(t, v.addr).url)

	at := c.mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, inOne, stamp(at))
	r.waitRestartedAt(t, 10*time.Second, inTwo, stamp(at))
	r.mustNotChange(t, beyond, 500*time.Millisecond)
}

// TestWholeCluster: the default scope, with a ClusterRole.
func TestWholeCluster(t *testing.T) {
	v := startValkey(t)
	one, two := newNamespace(t), newNamespace(t)
	image := newImage()
	inOne, inTwo := deployment{namespace: one, name: "api", images: []string{image}}, deployment{namespace: two, name: "api", images: []string{image}}
	createAll(t, []deployment{inOne, inTwo})
	r := record(t, one, two)
	startWorker(t, v.addr, newWorkerUser(t).kubeconfig(t, sharedAPI.url))
	at := newClient(startWeb(t, v.addr).url).mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, inOne, stamp(at))
	r.waitRestartedAt(t, 10*time.Second, inTwo, stamp(at))
}

// TestSelector: many workloads share one image, and only some should restart.
func TestSelector(t *testing.T) {
	p := startPair(t, "WORKER_SELECTOR=rollout=auto,tier!=db")
	image := newImage()
	chosen, plain, db := p.app("chosen", image), p.app("plain", image), p.app("db", image)
	chosen.labels = map[string]string{"rollout": "auto"}
	db.labels = map[string]string{"rollout": "auto", "tier": "db"}
	createAll(t, []deployment{chosen, plain, db})
	r := record(t, p.namespace)

	at := p.client.mustPush(t, image)
	r.waitRestartedAt(t, 10*time.Second, chosen, stamp(at))
	r.mustNotChange(t, plain, 500*time.Millisecond)
	r.mustNotChange(t, db, 0)
}

// TestForbiddenScope: a scope that RBAC forbids is an error at once, with all that
// is needed to fix the Role.
func TestForbiddenScope(t *testing.T) {
	v := startValkey(t)
	allowed, forbidden := newNamespace(t), newNamespace(t)
	for _, c := range []struct {
		name       string
		user       func(*testing.T) user
		namespaces string
		names      string
	}{
		{"one of two namespaces", func(t *testing.T) user { return newWorkerUser(t, allowed) }, allowed + "," + forbidden, `(list|watch) deployments\.apps in (namespace )?` + forbidden},
		{"the whole cluster", func(t *testing.T) user { return newWorkerUser(t, allowed) }, "", `(list|watch) deployments\.apps in all namespaces`},
		{"no watch", func(t *testing.T) user {
			u := newUser(t)
			u.grant(t, []string{"list", "patch"}, allowed)
			return u
		}, allowed, `watch deployments\.apps in (namespace )?` + allowed},
	} {
		t.Run(c.name, func(t *testing.T) {
			worker := launchWorker(t, programPath, v.addr, c.user(t).kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+c.namespaces)
			if code := worker.exitCode(t, 15*time.Second); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			lines := strings.Split(strings.TrimSpace(worker.stderr.String()), "\n")
			if last := lines[len(lines)-1]; !regexp.MustCompile(c.names + `\b`).MatchString(last) {
				t.Errorf("the last line does not say %s: %s", c.names, last)
			}
		})
	}
}

// TestPatchForbidden: a Role without patch is reported when the worker needs it. The
// worker keeps trying, so that fixing the Role is enough.
func TestPatchForbidden(t *testing.T) {
	t.Parallel()
	v, namespace := startValkey(t), newNamespace(t)
	d := deployment{namespace: namespace, name: "api", images: []string{newImage()}}
	d.create(t)
	r := record(t, namespace)
	u := newUser(t)
	u.grant(t, []string{"list", "watch"}, namespace)
	worker := startWorker(t, v.addr, u.kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+namespace)
	at := newClient(startWeb(t, v.addr).url).mustPush(t, d.images[0])
	eventually(t, 5*time.Second, "the log says that patch is forbidden", func() error {
		for _, line := range worker.logs(t) {
			if line.str("level") != "INFO" && strings.Contains(line.str("err"), "cannot patch") {
				return nil
			}
		}
		return errors.New(worker.stderr.tail(10))
	})
	u.grant(t, []string{"patch"}, namespace)
	r.waitRestartedAt(t, 60*time.Second, d, stamp(at))
}
