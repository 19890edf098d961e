package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// These tests are about the harness: if a fault were not really there, every test
// of that fault would pass.

func TestHarnessValkeyPersists(t *testing.T) {
	t.Parallel()
	v := startValkey(t)
	v.must(t, "ZADD", ledgerKey, "1790000000123456", "ghcr.io/acme/api:dev")
	v.kill()
	if err := v.do(t, "PING").Error(); err == nil {
		t.Fatal("a killed Valkey answers")
	}
	v.start(t)
	if at := v.requestedAt(t, "ghcr.io/acme/api:dev"); at != 1790000000123456 {
		t.Errorf("after a kill the ledger says %d", at)
	}
}

func TestHarnessRecorderSeesEveryGeneration(t *testing.T) {
	t.Parallel()
	d := deployment{namespace: newNamespace(t), name: "api", images: []string{newImage()}, volumeImages: []string{newImage()}, paused: true}
	r := record(t, d.namespace)
	d.create(t)
	for range 20 {
		d.annotate(t, stamp(time.Now().UnixMicro()))
	}
	d.annotate(t, "")
	d.patch(t, `{"metadata":{"labels":{"a":"b"}}}`) // no new generation
	r.waitRestartedAt(t, 5*time.Second, d, "")
	if got := len(r.of(d)); got != 22 || r.restarts(d) != 21 {
		t.Errorf("%d steps and %d restarts, want 22 and 21: %s", got, r.restarts(d), describe(r.of(d)))
	}
}

func TestHarnessTCPProxy(t *testing.T) {
	t.Parallel()
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { echo.Close() })
	go func() {
		for {
			conn, err := echo.Accept()
			if err != nil {
				return
			}
			go io.Copy(conn, conn)
		}
	}()
	p := newTCPProxy(t, echo.Addr().String())
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	say := func(conn net.Conn, what string) { _, _ = io.WriteString(conn, what) }
	hear := func(conn net.Conn, within time.Duration) (string, error) {
		_ = conn.SetReadDeadline(time.Now().Add(within))
		buf := make([]byte, 100)
		n, err := conn.Read(buf)
		return string(buf[:n]), err
	}

	old := dial()
	say(old, "one")
	if got, err := hear(old, time.Second); got != "one" {
		t.Fatalf("pass: %q, %v", got, err)
	}
	p.set(stall)
	fresh := dial()
	say(old, "two")
	say(fresh, "new")
	for name, conn := range map[string]net.Conn{"old": old, "new": fresh} {
		if got, err := hear(conn, 200*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("stall: the %s connection got %q, %v", name, got, err)
		}
	}
	p.set(pass)
	for want, conn := range map[string]net.Conn{"two": old, "new": fresh} {
		if got, err := hear(conn, time.Second); got != want {
			t.Errorf("after the stall: %q, %v, want %q", got, err, want)
		}
	}
	p.abandon()
	other := dial()
	say(old, "lost")
	say(other, "other")
	if got, err := hear(old, 200*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("abandoned: %q, %v", got, err)
	}
	if got, err := hear(other, time.Second); got != "other" {
		t.Errorf("beside an abandoned connection: %q, %v", got, err)
	}
	p.set(reset)
	if _, err := hear(old, time.Second); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reset: %v", err)
	}
	p.set(refuse)
	if _, err := net.Dial("tcp", p.addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("refuse: %v", err)
	}
	p.set(pass)
	again := dial()
	say(again, "three")
	if got, err := hear(again, time.Second); got != "three" {
		t.Errorf("pass again: %q, %v", got, err)
	}
}

func TestHarnessAPIProxy(t *testing.T) {
	t.Parallel()
	d := deployment{namespace: newNamespace(t), name: "api", images: []string{newImage()}}
	d.create(t)
	u := newWorkerUser(t, d.namespace)
	p := newAPIProxy(t, sharedAPI.url)
	config := sharedAPI.config(u.token)
	config.Host = p.url
	kube, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	apps := kube.Resource(deploymentsResource).Namespace(d.namespace)
	patch := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := apps.Patch(ctx, d.name, types.MergePatchType, []byte(`{"spec":{"template":{"metadata":{"annotations":{"at":"`+time.Now().String()+`"}}}}}`), metav1.PatchOptions{})
		return err
	}
	w, err := apps.Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	event := func(within time.Duration) bool {
		select {
		case e, ok := <-w.ResultChan():
			return ok && e.Object != nil
		case <-time.After(within):
			return false
		}
	}
	if !event(2 * time.Second) { // ADDED
		t.Fatal("pass: the watch is silent")
	}
	if err := patch(5 * time.Second); err != nil || !event(2*time.Second) {
		t.Fatalf("pass: %v, or no event", err)
	}
	p.set(answering(500, "", everyPatch))
	if err := patch(5 * time.Second); err == nil || !strings.Contains(err.Error(), "told to by the test") {
		t.Errorf("500: %v", err)
	}
	p.set(resetting(patchOf(d)))
	if err := patch(5 * time.Second); err == nil {
		t.Error("reset: no error")
	}
	p.set(hanging(everything))
	if err := patch(300 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}
	p.set(nil)
	var statuses []int
	for _, seen := range p.patchesOf(d) {
		statuses = append(statuses, seen.status)
	}
	if len(statuses) != 4 || statuses[0] != http.StatusOK || statuses[1] != 500 || statuses[2] != 0 || statuses[3] != 0 {
		t.Errorf("the proxy counted %v", statuses)
	}
	p.lagWatches(700 * time.Millisecond)
	if err := patch(5 * time.Second); err != nil || event(400*time.Millisecond) || !event(2*time.Second) {
		t.Errorf("lagging: %v, or the event came early or never", err)
	}
	p.lagWatches(0)
	resume := p.stallWatches()
	for range 2 {
		if err := patch(5 * time.Second); err != nil || event(300*time.Millisecond) {
			t.Errorf("stalled: %v, or the watch delivered", err)
		}
	}
	resume()
	for range 2 {
		if !event(2 * time.Second) {
			t.Error("resumed: an event is missing")
		}
	}
	p.endWatches()
	if event(2*time.Second) || p.openWatches() != 0 {
		t.Error("ended: the watch went on")
	}
	if w, err = apps.Watch(t.Context(), metav1.ListOptions{}); err != nil || !event(2*time.Second) {
		t.Fatalf("a new watch: %v, or it is silent", err)
	}
	p.loseWatches()
	if err := patch(5 * time.Second); err != nil || event(500*time.Millisecond) || p.openWatches() != 1 {
		t.Errorf("lost: %v, or the watch delivered or ended", err)
	}
	w.Stop()
}
