package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2/server"
)

// The record is bounded: what does not fit is refused, and what was accepted
// stays.
func TestRecordIsFull(t *testing.T) {
	w := newTestWeb(t, "")
	now := time.Now()
	record := func(i int, at time.Time) {
		if _, err := w.valkey.ZAdd("krt:requested", float64(at.UnixMicro()), fmt.Sprintf("ghcr.io/acme/app-%d:dev", i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range maxRecorded - 1 {
		record(i, now)
	}
	body := func(tags string) string { return `{"image":"ghcr.io/acme/api","tags":[` + tags + `]}` }
	if resp := w.post(nil, body(`"a","b"`)); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("one image more than fits: %d", resp.StatusCode)
	}
	if !w.logs.has(`"level":"ERROR"`, "FULL too many images were asked for within a day") {
		t.Error("the reason is not logged")
	}
	if at, _ := w.valkey.ZScore("krt:requested", "ghcr.io/acme/api:a"); at != 0 {
		t.Error("one of two images is on record")
	}
	for what, tags := range map[string]string{"the last place": `"a"`, "an image that is on record": `"a","a"`} {
		if resp := w.post(nil, body(tags)); resp.StatusCode != 202 {
			t.Errorf("%s: %d", what, resp.StatusCode)
		}
	}
	// What is a day old makes place.
	record(7, now.Add(-keepRecorded-time.Second))
	if resp := w.post(nil, body(`"b"`)); resp.StatusCode != 202 {
		t.Errorf("a place became free: %d", resp.StatusCode)
	}
	if members, err := w.valkey.ZMembers("krt:requested"); err != nil || len(members) != maxRecorded {
		t.Errorf("%d images are on record, %v", len(members), err)
	}
}

// What only an operator can mend says what to mend, and is not tried four times
// a second.
func TestValkeyRefuses(t *testing.T) {
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	for answer, want := range map[string]struct {
		hint  string
		delay time.Duration
	}{
		"NOAUTH Authentication required.":     {"check VALKEY_USERNAME and VALKEY_PASSWORD", configurationDelay},
		"WRONGPASS invalid username-password": {"check VALKEY_USERNAME and VALKEY_PASSWORD", configurationDelay},
		"NOPERM no permissions":               {"check this user's ACL", configurationDelay},
		"ERR ACL failure in script: User web has no permissions to run the 'zadd' command": {"check this user's ACL", configurationDelay},
		"WRONGTYPE Operation against a key holding the wrong kind of value":                {"choose another VALKEY_CHANNEL", configurationDelay},
		"LOADING Valkey is loading the dataset in memory":                                  {"LOADING", transientDelay},
		"READONLY You can't write against a read only replica.":                            {"READONLY", transientDelay},
		"OOM command not allowed when used memory > 'maxmemory'.":                          {"OOM", transientDelay},
	} {
		m.SetError(answer)
		_, _, err := pub.publish(t.Context(), []string{apiDev})
		if err == nil || !strings.Contains(err.Error(), want.hint) || retryDelay(err) != want.delay {
			t.Errorf("%s: %v, try again in %s", answer, err, retryDelay(err))
		}
	}
}

// web is ready only if it could record something.
func TestReadyMeansWritable(t *testing.T) {
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	if err := pub.ready(t.Context()); err != nil {
		t.Error(err)
	}
	if m.Exists("krt:requested") {
		t.Error("the check recorded something")
	}
	if err := m.Set("krt:requested", "another program's"); err != nil {
		t.Fatal(err)
	}
	if err := pub.ready(t.Context()); err == nil || !strings.Contains(err.Error(), "WRONGTYPE") {
		t.Errorf("with a key of another type: %v", err)
	}
}

// A Valkey that never answers must not hold the job.
func TestValkeySilent(t *testing.T) {
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	if pub.timeout != publishTimeout || publishTimeout >= 3*time.Second {
		t.Errorf("a job waits for %s; web promises 3 s", pub.timeout)
	}
	pub.timeout = 50 * time.Millisecond
	silent := make(chan struct{})
	m.Server().SetPreHook(func(*server.Peer, string, ...string) bool {
		<-silent
		return false
	})
	defer close(silent)
	start := time.Now()
	if _, _, err := pub.publish(t.Context(), []string{apiDev}); err == nil || time.Since(start) > time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

// What cannot be taken at once is refused at once.
func TestPublishIsBounded(t *testing.T) {
	_, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	for range maxPublishing {
		pub.publishing <- struct{}{}
	}
	if _, _, err := pub.publish(t.Context(), []string{apiDev}); !errors.Is(err, errBusy) {
		t.Errorf("got %v", err)
	}
	<-pub.publishing
	if _, _, err := pub.publish(t.Context(), []string{apiDev}); err != nil {
		t.Errorf("with a place free: %v", err)
	}
}

// T is Valkey's clock, and for one image it only ever grows, whatever that
// clock does.
func TestRequestedAtGrows(t *testing.T) {
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pub.close)
	const noon = 1_795_262_400_000_000
	publish := func(clock int64, images ...string) int64 {
		t.Helper()
		m.SetTime(time.UnixMicro(clock))
		at, _, err := pub.publish(t.Context(), images)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	for i, step := range []struct {
		clock  int64
		images []string
		want   int64
	}{
		{noon, []string{"ghcr.io/acme/a:dev"}, noon},
		{noon, []string{"ghcr.io/acme/a:dev"}, noon + 1},
		{noon, []string{"ghcr.io/acme/b:dev"}, noon},
		{noon, []string{"ghcr.io/acme/b:dev", "ghcr.io/acme/a:dev"}, noon + 2},
		{noon - 3_600_000_000, []string{"ghcr.io/acme/a:dev"}, noon + 3},
		{noon + 7, []string{"ghcr.io/acme/a:dev"}, noon + 7},
	} {
		if got := publish(step.clock, step.images...); got != step.want {
			t.Errorf("step %d: T is %d, want %d", i, got, step.want)
		}
	}
	// A clock that was years ahead and is right again left a T behind.
	if _, err := m.ZAdd("krt:requested", noon+3*365*24*3600*1_000_000, "ghcr.io/acme/ahead:dev"); err != nil {
		t.Fatal(err)
	}
	if got := publish(noon+8, "ghcr.io/acme/ahead:dev"); got != noon+8 {
		t.Errorf("after a wrong clock: T is %d, want %d", got, noon+8)
	}
	if _, err := m.ZRem("krt:requested", "ghcr.io/acme/ahead:dev"); err != nil {
		t.Fatal(err)
	}
	// A day later the record holds what is new and what is not yet a day old.
	day := keepRecorded.Microseconds()
	publish(noon+day+2, "ghcr.io/acme/c:dev")
	got, err := m.ZMembers("krt:requested")
	if err != nil || fmt.Sprint(got) != "[ghcr.io/acme/b:dev ghcr.io/acme/a:dev ghcr.io/acme/c:dev]" {
		t.Errorf("kept %v, %v", got, err)
	}
	publish(noon+day+8, "ghcr.io/acme/c:dev")
	if got, err = m.ZMembers("krt:requested"); err != nil || fmt.Sprint(got) != "[ghcr.io/acme/c:dev]" {
		t.Errorf("kept %v, %v", got, err)
	}
}
