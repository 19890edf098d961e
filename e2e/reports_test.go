package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
)

// TestReportsForbidden: with the ACL of the version before, requests are accepted and
// lead to restarts. Both processes are ready, and say what is missing.
func TestReportsForbidden(t *testing.T) {
	t.Parallel()
	v := startManifestValkey(t, valkey.ClientOption{})
	v.must(t, "ACL", "SETUSER", "web", "-hgetall")
	v.must(t, "ACL", "SETUSER", "worker", "-eval", "-evalsha", "-hget", "-hset", "-expire", "-zadd")
	namespace := newNamespace(t)
	web := startWeb(t, v.addr, v.settings("web")...)
	worker := startWorker(t, v.addr, newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url), append(v.settings("worker"), "WORKER_NAMESPACES="+namespace)...)
	d := deployment{namespace: namespace, name: "api", images: []string{newImage()}}
	d.create(t)
	r, job := record(t, namespace), newClient(web.url)
	r.waitRestartedAt(t, 10*time.Second, d, stamp(job.mustPush(t, d.images[0])))
	const hint = "check this user's ACL in Valkey; k8s/20-valkey.yaml has what it needs"
	eventually(t, 5*time.Second, "the worker says it once", func() error {
		if n := len(worker.logged(t, "msg", "reports not written, trying again")); n != 1 || !strings.Contains(worker.stderr.String(), hint) {
			return fmt.Errorf("%d lines: %s", n, worker.stderr.tail(5))
		}
		return nil
	})
	if a, err := job.get(t.Context(), "image="+d.images[0]); err != nil || a.status != http.StatusServiceUnavailable {
		t.Errorf("GET /rollout: %d %s, %v", a.status, a.body, err)
	}
	eventually(t, 5*time.Second, "web says it", func() error {
		if !strings.Contains(web.stderr.String(), hint) {
			return fmt.Errorf("its log: %s", web.stderr.tail(5))
		}
		return nil
	})
	// With the new ACL it works without a restart.
	v.must(t, "ACL", "SETUSER", "web", "+hgetall")
	v.must(t, "ACL", "SETUSER", "worker", "+eval", "+evalsha", "+hget", "+hset", "+expire", "+zadd")
	eventually(t, 5*time.Second, "the report is there", func() error {
		a, err := job.get(t.Context(), "image="+d.images[0])
		if err == nil && !strings.Contains(a.body, `"matched":1,"kinds":{"Deployment":1},"restarted":1`) {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
		return err
	})
}

// get asks GET /rollout with a token of its own.
func (c *client) get(ctx context.Context, query string) (answer, error) {
	return c.send(ctx, http.MethodGet, "/rollout?"+query, github.mint(c.now(), nil), "")
}

// TestThousandWaiters: 256 of a thousand jobs wait, the others are answered at once
// and ask again after a second, as the action does. Those who post do not notice. If
// each asks for all that can be asked, web may refuse some, and stays within bounds.
//
// Not parallel, because it measures.
func TestThousandWaiters(t *testing.T) {
	for _, tt := range []struct{ images, clusters int }{{1, 2}, {32, 5}} {
		t.Run(fmt.Sprintf("%d images in %d clusters", tt.images, tt.clusters), func(t *testing.T) {
			if raceDetecting && tt.images > 1 {
				t.Skip("the race detector makes decoding this several times slower")
			}
			v := startValkey(t)
			web := startWeb(t, v.addr)
			job, query := newClient(web.url), ""
			for range tt.images {
				image := newImage()
				job.mustPush(t, image)
				query += "image=" + image + "&"
				for cluster := range tt.clusters {
					v.must(t, "HSET", channel+":report:"+image, fmt.Sprint("cluster-", cluster), `{"state":"progressing","requestedAt":"2099-01-01T00:00:00.000000Z",`+
						`"matched":10,"restarted":9,"complete":8,"failed":0,"deferred":{"paused":1},"warnings":{"IfNotPresent":3},"changedAt":"2099-01-01T00:00:00.000000Z","revision":1}`)
				}
			}
			load := func() *jobLoad {
				stop := startJobs(job, 20*time.Millisecond)
				time.Sleep(4 * time.Second)
				return stop()
			}
			alone := load()
			w := startWaiters(t, job, query)
			time.Sleep(2 * time.Second)
			beside := load()
			w.goAway()
			fmt.Printf("%s: alone %s; beside a thousand waiters %s; %d waits, %d answers at once, %d refused; resident %d KiB at most\n",
				t.Name(), alone, beside, w.waited.Load(), w.atOnce.Load(), w.refused.Load(), web.mustStayBelow(t, 64))
			if w.failed.Load() > 0 || tt.images == 1 && (w.refused.Load() > 0 || w.waited.Load() < 100 || w.atOnce.Load() < 100) {
				t.Errorf("the waiters are not served as they should be: %d failed", w.failed.Load())
			}
			beside.mustBeServed(t)
		})
	}
}

// waiters are a thousand jobs that ask again and again.
type waiters struct {
	waited, atOnce, refused, failed atomic.Int64
	goAway                          func()
}

func startWaiters(t *testing.T, job *client, query string) *waiters {
	w, token := &waiters{}, github.mint(time.Now(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	w.goAway = func() { cancel(); all.Wait() }
	t.Cleanup(w.goAway)
	for i := range 1000 {
		all.Go(func() {
			time.Sleep(time.Duration(i) * time.Millisecond)
			seen := ""
			for ctx.Err() == nil {
				a, err := job.send(ctx, http.MethodGet, "/rollout?"+query+"wait=2s&seen="+seen, token, "")
				var got struct{ Version string }
				switch {
				case ctx.Err() != nil:
				case err == nil && a.status == http.StatusServiceUnavailable:
					w.refused.Add(1)
				case err != nil || a.status != http.StatusOK || json.Unmarshal([]byte(a.body), &got) != nil:
					w.failed.Add(1)
				case seen == "":
				case a.took >= 2*time.Second:
					w.waited.Add(1)
				default:
					w.atOnce.Add(1)
				}
				seen = got.Version
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		})
	}
	return w
}
