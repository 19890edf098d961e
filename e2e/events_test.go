package e2e

import (
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// describe is what kubectl describe says about a Deployment's events.
func (c cluster) describe(t testing.TB, d deployment) string {
	t.Helper()
	cmd := exec.Command(c.bin+"/kubectl", "--kubeconfig", user{name: "admin", token: adminToken}.kubeconfig(t, c.url),
		"--namespace", d.namespace, "describe", "deployment", d.name)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, events, _ := strings.Cut(string(out), "\nEvents:")
	return events
}

// TestEvents: with WORKER_EVENTS, kubectl describe says why a Deployment restarted.
// Without the right to create Events, the worker says so once and restarts go on.
func TestEvents(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.install(t)
	c.namespace(t, "shop")
	worker := c.worker(t)
	v := startValkey(t)
	kubeconfig := worker.kubeconfig(t, c.url)
	job := newClient(startWeb(t, v.addr).url)
	first := startWorker(t, v.addr, kubeconfig, "WORKER_EVENTS=true", "WORKER_RESTART_INTERVAL=0")
	d := deployment{namespace: "shop", name: strings.Repeat("long-", 12) + "api", images: []string{newImage()}}
	c.create(t, d)
	events := schema.GroupVersionResource{Version: "v1", Resource: "events"}
	count := func() int {
		list, err := c.admin.Resource(events).Namespace(d.namespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Items)
	}
	for range 3 {
		c.mustRestart(t, job, d)
	}
	refused := strings.Count(first.stderr.String(), "an Event could not be written")
	if refused != 1 || count() != 0 || !strings.Contains(first.stderr.String(), `cannot create resource \"events\"`) {
		t.Errorf("without the right: %d events, %d lines:\n%s", count(), refused, first.stderr.tail(10))
	}

	c.mustApply(t, "", readManifests(t, "../k8s/optional/worker-events.yaml"), false)
	startWorker(t, v.addr, kubeconfig, "WORKER_EVENTS=true", "WORKER_RESTART_INTERVAL=0") // both write the same Event
	var want *regexp.Regexp
	eventually(t, 15*time.Second, "RBAC allows it", func() error {
		at := stamp(job.mustPush(t, d.images[0]))
		want = regexp.MustCompile(`Normal +Restarted +\S+( ago)? +kuberollouttrigger +Restarted because ` + regexp.QuoteMeta(d.images[0]+" was requested at "+at))
		time.Sleep(500 * time.Millisecond)
		if said := c.describe(t, d); !want.MatchString(said) {
			return fmt.Errorf("kubectl describe says %s", said)
		}
		return nil
	})
	before := count()
	for range 5 {
		c.mustRestart(t, job, d)
	}
	eventually(t, 5*time.Second, "each restart has its Event", func() error {
		if n := count() - before; n != 5 {
			return fmt.Errorf("%d Events", n)
		}
		return nil
	})
	time.Sleep(300 * time.Millisecond)
	if n := count() - before; n != 5 {
		t.Errorf("two workers wrote %d Events about 5 restarts", n)
	}
}
