package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
)

// webUser is a client with web's password: a compromised web.
func (m *manifestValkey) webUser(t testing.TB) func(command ...string) error {
	t.Helper()
	evil, err := valkey.NewClient(valkey.ClientOption{InitAddress: []string{m.addr}, Username: "web", Password: m.secret["web"], ForceSingleClient: true,
		DisableCache: true, ClientSetInfo: valkey.DisableClientSetInfo, DisableRetry: true, ConnWriteTimeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(evil.Close)
	return func(command ...string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		return evil.Do(ctx, evil.B().Arbitrary(command...).Build()).Error()
	}
}

// ledgerAttacks is what a compromised web can do to the worker with its rights in
// Valkey. It is all in scripts, whose arguments are small: limits on what a client
// may send do not help.
var ledgerAttacks = []struct {
	name   string
	times  int
	script string
}{
	{"100 members of 1 MiB", 1, `for i = 1, 100 do redis.call('ZADD', KEYS[1], now + i, string.rep('x', 1048576) .. i) end`},
	{"a member of 120 MiB", 1, `redis.call('ZADD', KEYS[1], now, string.rep('x', 125829120))`},
	{"4,000 members of 16 kB", 1, `for i = 1, 4000 do redis.call('ZADD', KEYS[1], now + i, string.rep('x', 16000) .. i) end`},
	{"40,000 references of 380 bytes", 1, `for i = 1, 40000 do
		redis.call('ZADD', KEYS[1], now + i, 'ghcr.io/acme/' .. string.rep('x', 236) .. i .. ':' .. string.rep('t', 120)) end`},
	// Valkey itself ends a subscription that is 32 MiB behind.
	{"messages of 31 MiB", 2, `redis.call('PUBLISH', ARGV[1], string.rep('x', 32505856))`},
	{"messages of 1 MiB", 20, `redis.call('PUBLISH', ARGV[1], string.rep('x', 1048576))`},
	{"messages of 16 kB", 40, `for i = 1, 500 do redis.call('PUBLISH', ARGV[1], string.rep('x', 16000)) end`},
	{"50,000 messages about images", 1, `for i = 1, 50000 do
		redis.call('PUBLISH', ARGV[1], '{"image":"ghcr.io/acme/' .. string.rep('y', 236) .. i .. ':' .. string.rep('t', 120) .. '"}') end`},
}

// TestFilledLedger: whatever a compromised web writes and publishes, the worker stays
// below its memory limit, does not exit, and works again once the ledger is deleted.
//
// Not parallel, because it measures.
func TestFilledLedger(t *testing.T) {
	container := manifestContainer(t, "../k8s/50-worker.yaml", "worker")
	limit := memoryOf(t, container, "limits")
	v := startManifestValkey(t, valkey.ClientOption{}, "--maxmemory", "0", "--appendonly", "no")
	evil, namespace := v.webUser(t), newNamespace(t)
	d := deployment{namespace: namespace, name: "api", images: []string{newImage()}}
	d.create(t)
	r := record(t, namespace)
	web := startWeb(t, v.addr, v.settings("web")...)
	worker := startWorker(t, v.addr, newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url),
		append(v.settings("worker"), "WORKER_NAMESPACES="+namespace, "GOMEMLIMIT="+goMemLimit(t, container))...)
	for _, attack := range ledgerAttacks {
		resetPeak(t, worker)
		begun := time.Now()
		for range attack.times {
			if err := evil("EVAL", `local now = redis.call('TIME')[1] * 1000000 `+attack.script+` return 1`, "1", ledgerKey, channel); err != nil {
				t.Fatalf("%s: %v", attack.name, err)
			}
		}
		// Subscribed anew, the worker reads the ledger.
		eventually(t, 20*time.Second, "Valkey ends the subscription", func() error { return v.do(t, "CLIENT", "KILL", "TYPE", "pubsub").Error() })
		for until := time.Now().Add(time.Second); time.Now().Before(until) && !worker.exited(); time.Sleep(50 * time.Millisecond) {
		}
		if worker.exited() {
			t.Fatalf("%s: the worker exited", attack.name)
		}
		peak := memoryKiB(t, worker, "VmHWM")
		v.must(t, "DEL", ledgerKey)
		at := newClient(web.url).mustPush(t, d.images[0])
		r.waitRestartedAt(t, 40*time.Second, d, stamp(at))
		fmt.Printf("%s: %s: resident %d KiB at most, works again after %.1f s\n", t.Name(), attack.name, peak, time.Since(begun).Seconds())
		if int64(peak)<<10 > limit && !raceDetecting {
			t.Errorf("%s: the worker had %d KiB, and k8s/ limits it to %d", attack.name, peak, limit>>10)
		}
	}
	eventually(t, 10*time.Second, "the worker is ready", func() error {
		if status, body, err := worker.probe("/readyz"); err != nil || status != 200 {
			return errors.Join(err, errors.New(strings.TrimSpace(body)))
		}
		return nil
	})
}

// resetPeak makes VmHWM begin anew.
func resetPeak(t testing.TB, p *program) {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
}
