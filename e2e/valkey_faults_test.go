package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestSilentNetworkBeforeWorker: the network between the worker and Valkey goes
// silent without a FIN. The worker notices within 5 s, and catches up when the
// network is back. The same holds for connections that are cut or refused.
func TestSilentNetworkBeforeWorker(t *testing.T) {
	t.Parallel()
	g := newRig(t, 10, 2)
	c := newClient(startWeb(t, g.valkey.addr).url)
	network := newTCPProxy(t, g.valkey.addr)
	worker := g.startWorker(t, "", network.addr)
	for _, m := range []mode{stall, reset, refuse, stall} {
		network.set(m)
		silent := time.Now()
		wait := g.journal.pushMany(t.Context(), c, g.images, 20)
		reason := worker.waitNotReady(t, 7*time.Second)
		noticed := time.Since(silent)
		t.Logf("mode %d: not ready after %.1f s: %s", m, noticed.Seconds(), strings.TrimSpace(reason))
		if noticed > 5500*time.Millisecond {
			t.Errorf("mode %d: noticed after %s, the promise is 5 s", m, noticed)
		}
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		network.set(pass)
		back := time.Now()
		worker.waitReady(t, 10*time.Second)
		t.Logf("mode %d: ready again after %.1f s", m, time.Since(back).Seconds())
	}
	g.verify(t, 10*time.Second)
}

// TestSilentNetworkBeforeWeb: the same between web and Valkey. No job waits longer
// than 3 s for the 503 with Retry-After, however many ask.
func TestSilentNetworkBeforeWeb(t *testing.T) {
	t.Parallel()
	g := newRig(t, 10, 2)
	network := newTCPProxy(t, g.valkey.addr)
	web := startWeb(t, network.addr)
	g.startWorker(t, "", "")
	c := newClient(web.url)
	g.journal.pushOnce(t, c, g.images[0])
	for _, m := range []mode{stall, reset, refuse} {
		network.set(m)
		silent := time.Now()
		// A few without retries, to see the single answer …
		var singles sync.WaitGroup
		for _, image := range g.images {
			singles.Go(func() {
				a, err := c.post(t.Context(), github.mint(time.Now(), nil), imageBody(image))
				if err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
					t.Errorf("mode %d: answered %d %s with Retry-After %q, %v; want a 503 with one", m, a.status, a.body, a.header.Get("Retry-After"), err)
				}
				if a.took > 9*time.Second {
					t.Errorf("mode %d: the answer took %s, the promise is 8 s", m, a.took)
				}
				g.journal.repeat(image, a.tries()) // recorded if the bytes still arrive
			})
		}
		reason := web.waitNotReady(t, 7*time.Second)
		noticed := time.Since(silent)
		t.Logf("mode %d: not ready after %.1f s: %s", m, noticed.Seconds(), strings.TrimSpace(reason))
		if noticed > 5500*time.Millisecond {
			t.Errorf("mode %d: noticed after %s, the promise is 5 s", m, noticed)
		}
		singles.Wait()
		// … and some that follow the workflow across it.
		wait := g.journal.pushMany(t.Context(), c, g.images, 20)
		time.Sleep(time.Second)
		network.set(pass)
		back := time.Now()
		web.waitReady(t, 10*time.Second)
		t.Logf("mode %d: ready again after %.1f s", m, time.Since(back).Seconds())
		if err := wait(); err != nil {
			t.Fatal(err)
		}
	}
	g.verify(t, 10*time.Second)
}

// TestFlood: while Valkey is silent, more requests come at once than web can keep
// in flight. All are answered soon, and web works as before afterwards.
func TestFlood(t *testing.T) {
	t.Parallel()
	const many = 1500
	g := newRig(t, 1, 1)
	network := newTCPProxy(t, g.valkey.addr)
	web := startWeb(t, network.addr)
	g.startWorker(t, "", "")
	c := newClient(web.url)
	token := github.mint(time.Now(), nil)
	network.set(stall)
	var mu sync.Mutex
	var slowest time.Duration
	statuses := map[int]int{}
	var all sync.WaitGroup
	for range many {
		all.Go(func() {
			a, err := c.post(t.Context(), token, imageBody(g.images[0]))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				a.status = -1
				t.Logf("flood: %v", err)
			}
			statuses[a.status]++
			slowest = max(slowest, a.took)
		})
	}
	all.Wait()
	t.Logf("answers %v, the slowest after %.1f s", statuses, slowest.Seconds())
	if statuses[http.StatusServiceUnavailable] != many {
		t.Errorf("answers by status: %v, want %d times 503", statuses, many)
	}
	// The promise is 8 s; here the two cores also run 1,500 clients, and the race
	// detector makes each verification several times slower.
	limit := 12 * time.Second
	if raceDetecting {
		limit = 30 * time.Second
	}
	if slowest > limit {
		t.Errorf("the slowest answer took %s", slowest)
	}
	g.journal.uncertain[g.images[0]] += many
	network.set(pass)
	web.waitReady(t, 10*time.Second)
	// What stayed in the socket may reach the ledger now. The newest T comes last.
	time.Sleep(500 * time.Millisecond)
	g.journal.pushOnce(t, c, g.images[0])
	g.verify(t, 15*time.Second)
}

// TestValkeyDownAtStart: web and the worker start without Valkey, say so, and work
// once it is there.
func TestValkeyDownAtStart(t *testing.T) {
	t.Parallel()
	namespace, v := newNamespace(t), newValkey(t)
	d := deployment{namespace: namespace, name: "api", images: []string{newImage()}}
	d.create(t)
	r, l := record(t, namespace), newJournal()
	web := launchWeb(t, programPath, v.addr)
	worker := launchWorker(t, programPath, v.addr, newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url), "WORKER_NAMESPACES="+namespace)
	c := newClient(web.url)
	for _, p := range []*program{web, worker} {
		t.Logf("%s is not ready: %s", p.name, strings.TrimSpace(p.waitNotReady(t, 10*time.Second)))
	}
	eventually(t, 20*time.Second, "web answers 503 within 9 s", func() error {
		a, err := c.post(t.Context(), github.mint(time.Now(), nil), imageBody(d.images[0]))
		if err != nil {
			return err
		}
		if a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" || a.took > 9*time.Second {
			return fmt.Errorf("answered %d %s after %s", a.status, a.body, a.took)
		}
		return nil
	})
	time.Sleep(2 * time.Second)
	v.start(t)
	web.waitReady(t, 10*time.Second)
	worker.waitReady(t, 10*time.Second)
	l.pushOnce(t, c, d.images[0])
	l.verify(t, v, r, []deployment{d}, 10*time.Second)

	// They also stop in order while it is away again.
	v.kill()
	for _, p := range []*program{web, worker} {
		p.signal(syscall.SIGTERM)
		if code := p.exitCode(t, 15*time.Second); code != 0 {
			t.Errorf("%s: exit code %d after SIGTERM without Valkey, want 0", p.name, code)
		}
	}
}

// Least privilege in Valkey, as k8s/ and the docs give it.
var (
	webRights    = []string{"+ping", "+eval", "+evalsha", "+zadd", "+zcard", "+zscore", "+zrange", "+zremrangebyscore", "+hgetall", "+time", "+publish"}
	workerRights = []string{"+ping", "+subscribe", "+zrevrangebyscore", "+time", "+eval", "+evalsha", "+hget", "+hset", "+expire", "+zadd"}
)

// setUser makes a user of Valkey, or replaces it.
func (v *valkeyServer) setUser(t testing.TB, name, password string, rights ...string) {
	t.Helper()
	v.must(t, append([]string{"ACL", "SETUSER", name, "reset", "on", ">" + password, "&" + channel, "~" + channel + ":*"}, rights...)...)
}

func without(rights []string, right string) []string {
	var rest []string
	for _, r := range rights {
		if r != right {
			rest = append(rest, r)
		}
	}
	return rest
}

// TestValkeyACL: users with the least rights suffice, and nothing is logged about it.
func TestValkeyACL(t *testing.T) {
	t.Parallel()
	g := newRig(t, 2, 2)
	g.valkey.setUser(t, "web", "web-horse", webRights...)
	g.valkey.setUser(t, "worker", "worker-horse", workerRights...)
	web := startWeb(t, g.valkey.addr, "VALKEY_USERNAME=web", "VALKEY_PASSWORD=web-horse")
	worker := g.startWorker(t, "", "", "VALKEY_USERNAME=worker", "VALKEY_PASSWORD=worker-horse")
	c := newClient(web.url)
	if err := g.journal.pushMany(t.Context(), c, g.images, 20)(); err != nil {
		t.Fatal(err)
	}
	g.verify(t, 10*time.Second)
	for _, p := range []*program{web, worker} {
		p.signal(syscall.SIGTERM)
		if code := p.exitCode(t, 15*time.Second); code != 0 {
			t.Errorf("%s: exit code %d", p.name, code)
		}
		for _, line := range p.logs(t) {
			if line.str("level") == "WARN" || line.str("level") == "ERROR" {
				t.Errorf("%s complains although nothing is wrong: %v", p.name, line)
			}
		}
	}
	if log, err := g.valkey.must(t, "ACL", "LOG").ToArray(); err != nil || len(log) != 0 {
		t.Errorf("Valkey refused something: %d entries, %v: %v", len(log), err, log)
	}
}

// TestValkeyRefuses: the log and /readyz report a wrong password or a missing right,
// and fixing it in Valkey is enough.
func TestValkeyRefuses(t *testing.T) {
	t.Parallel()
	type broken struct {
		name   string
		rights []string
		secret string
		says   string
	}
	check := func(t *testing.T, mode string, b broken, all []string) {
		t.Parallel()
		g := newRig(t, 1, 1)
		g.valkey.setUser(t, mode, "right-horse", b.rights...)
		settings := []string{"VALKEY_USERNAME=" + mode, "VALKEY_PASSWORD=" + b.secret}
		var p *program
		if mode == "web" {
			p = launchWeb(t, programPath, g.valkey.addr, settings...)
			// Some rights are needed only for a request.
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
				defer cancel()
				for c := newClient(p.url); ctx.Err() == nil; time.Sleep(500 * time.Millisecond) {
					_, _ = c.post(ctx, github.mint(time.Now(), nil), imageBody(g.images[0]))
				}
			}()
		} else {
			p = g.launchWorker(t, "", "", settings...)
		}
		// Not ready for good: two looks, a second apart.
		eventually(t, 10*time.Second, mode+" is not ready, twice", func() error {
			for range 2 {
				status, body, err := p.probe("/readyz")
				if err != nil {
					return err
				}
				if status != http.StatusServiceUnavailable {
					return fmt.Errorf("/readyz answers %d %s", status, body)
				}
				time.Sleep(time.Second)
			}
			return nil
		})
		if p.exited() {
			t.Fatalf("%s exited", mode)
		}
		told := false
		for _, line := range p.logs(t) {
			told = told || (line.str("level") == "WARN" || line.str("level") == "ERROR") && strings.Contains(fmt.Sprint(line), b.says)
		}
		if !told {
			t.Errorf("no warning or error in the log has %s in it:\n%s", b.says, p.stderr.tail(20))
		}
		if lines := len(p.logs(t)); lines > 100 {
			t.Errorf("%d log lines in a few seconds", lines)
		}
		if strings.Contains(p.stderr.String(), "horse") {
			t.Error("the password is in the log")
		}
		// The operator fixes it in Valkey.
		g.valkey.setUser(t, mode, b.secret, all...)
		p.waitReady(t, 40*time.Second)
	}
	for _, b := range []broken{
		{"wrong password", webRights, "wrong-horse", "WRONGPASS"},
		{"no time", without(webRights, "+time"), "right-horse", "no permissions"},
		{"no zadd", without(webRights, "+zadd"), "right-horse", "no permissions"},
		{"no zrange", without(webRights, "+zrange"), "right-horse", "no permissions"},
		{"no publish", without(webRights, "+publish"), "right-horse", "no permissions"},
	} {
		t.Run("web/"+b.name, func(t *testing.T) { check(t, "web", b, webRights) })
	}
	for _, b := range []broken{
		{"wrong password", workerRights, "wrong-horse", "WRONGPASS"},
		{"no subscribe", without(workerRights, "+subscribe"), "right-horse", "no permissions"},
		{"no zrevrangebyscore", without(workerRights, "+zrevrangebyscore"), "right-horse", "no permissions"},
		{"no time", without(workerRights, "+time"), "right-horse", "no permissions"},
	} {
		t.Run("worker/"+b.name, func(t *testing.T) { check(t, "worker", b, workerRights) })
	}
}
