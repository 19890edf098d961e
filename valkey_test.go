package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
)

func newTestPublisher(t testing.TB) (*publisher, *miniredis.Miniredis) {
	t.Helper()
	m, cfg := testValkey(t)
	p := newPublisher(cfg, slog.New(slog.DiscardHandler))
	t.Cleanup(p.close)
	return p, m
}

// T grows over all images, whatever becomes of Valkey's clock.
func TestRequestedAtGrows(t *testing.T) {
	t.Parallel()
	p, m := newTestPublisher(t)
	const noon, hour = 1_795_348_800_000_000, 3_600_000_000
	publish := func(clock int64, images ...string) int64 {
		t.Helper()
		m.SetTime(time.UnixMicro(clock))
		published, err := p.publish(t.Context(), images, maxLedger)
		if err != nil {
			t.Fatal(err)
		}
		at := published.requestedAt
		for _, image := range images {
			if score, err := m.ZScore("krt:requested", image); err != nil || int64(score) != at {
				t.Fatalf("%s is in the ledger with %.0f, %v; T is %d", image, score, err, at)
			}
		}
		return at
	}
	for i, step := range []struct {
		clock  int64
		images []string
		want   int64
	}{
		{noon, []string{apiDev}, noon},
		{noon, []string{apiDev}, noon + 1},
		{noon, []string{webDev}, noon + 2}, // after another image
		{noon, []string{webDev, initDev}, noon + 3},
		{noon - hour, []string{"ghcr.io/acme/new:dev"}, noon + 4},
		{noon + 7, []string{apiDev}, noon + 7},
		{noon + hour, []string{webDev}, noon + hour},
		{noon + 8, []string{apiDev}, noon + hour + 1}, // the clock is put right
	} {
		if got := publish(step.clock, step.images...); got != step.want {
			t.Errorf("step %d: T is %d, want %d", i, got, step.want)
		}
	}

	// A clock that was years ahead left a T behind. It is dated anew.
	m.ZAdd("krt:requested", noon+3*365*24*hour, "ghcr.io/acme/ahead:dev")
	got := publish(noon+2*hour, apiDev)
	if got != noon+2*hour {
		t.Errorf("after a T from years ahead: T is %d, want %d", got, noon+2*hour)
	}
	if score, err := m.ZScore("krt:requested", "ghcr.io/acme/ahead:dev"); err != nil || int64(score) != got {
		t.Errorf("the T from years ahead is %.0f now, want %d", score, got)
	}
	// One within a day is kept.
	m.ZAdd("krt:requested", noon+25*hour, "ghcr.io/acme/ahead:dev")
	if got := publish(noon+2*hour, apiDev); got != noon+25*hour+1 {
		t.Errorf("after a T from within a day: T is %d, want %d", got, noon+25*hour+1)
	}
}

// The ledger is bounded. Nothing that was accepted is removed for what is new, and
// what is older than a day only if there is no room.
func TestLedgerIsBounded(t *testing.T) {
	t.Parallel()
	p, m := newTestPublisher(t)
	now := time.Now()
	add := func(i int, at time.Time) {
		m.ZAdd("krt:requested", float64(at.UnixMicro()), fmt.Sprintf("ghcr.io/acme/app-%d:dev", i))
	}
	size := func() int {
		members, err := m.ZMembers("krt:requested")
		if err != nil {
			t.Fatal(err)
		}
		return len(members)
	}
	publish := func(images ...string) error {
		_, err := p.publish(t.Context(), images, maxLedger)
		return err
	}
	add(0, now.Add(-ledgerAge-time.Minute))
	for i := 1; i < maxLedger-1; i++ {
		add(i, now.Add(-ledgerAge+time.Minute))
	}
	if err := publish(apiDev); err != nil || size() != maxLedger {
		t.Fatalf("the last free place: %d images, %v", size(), err)
	}
	if err := publish(apiDev); err != nil || size() != maxLedger {
		t.Errorf("an image that is there already: %d images, %v", size(), err)
	}
	if err := publish(webDev, initDev); err == nil || !strings.Contains(err.Error(), "FULL") {
		t.Errorf("one image more than fits, old ones removed: %v", err)
	}
	if score, _ := m.ZScore("krt:requested", webDev); score != 0 {
		t.Error("one of two images is in the ledger")
	}
	if err := publish(webDev); err != nil || size() != maxLedger {
		t.Errorf("the place of what was too old: %d images, %v", size(), err)
	}
	if err := publish(initDev); err == nil {
		t.Error("accepted without room")
	}
}

// The ledger is read newest first and in pages, and no more of it than web writes.
func TestLedgerPages(t *testing.T) {
	t.Parallel()
	m, cfg := testValkey(t)
	s := newSubscriber(cfg, slog.New(slog.DiscardHandler))
	t.Cleanup(s.close)
	now := time.Now().UnixMicro()
	for i := range maxLedger + ledgerPage + 1 {
		m.ZAdd("krt:requested", float64(now-int64(i)), fmt.Sprintf("ghcr.io/acme/app-%d:dev", i))
	}
	read := func(since time.Time) (entries []message) {
		if err := s.ledger(t.Context(), since, func(entry message) { entries = append(entries, entry) }); err != nil {
			t.Fatal(err)
		}
		return entries
	}
	for _, want := range []int{1, ledgerPage, ledgerPage + 1} {
		if entries := read(time.UnixMicro(now - int64(want) + 1)); len(entries) != want || entries[want-1].RequestedAt != now-int64(want)+1 {
			t.Errorf("%d entries, want %d", len(entries), want)
		}
	}
	entries := read(time.UnixMicro(0))
	if len(entries) != maxLedger {
		t.Fatalf("%d entries, want %d", len(entries), maxLedger)
	}
	for i, entry := range entries {
		if entry.RequestedAt != now-int64(i) {
			t.Fatalf("entry %d: %+v", i, entry)
		}
	}
	m.SetError("LOADING for a test")
	err := s.ledger(t.Context(), time.UnixMicro(0), func(message) { t.Error("an entry") })
	if err == nil || !strings.Contains(err.Error(), "LOADING") {
		t.Errorf("an error of Valkey: %v", err)
	}
}

// An error that only an operator can fix says what to fix.
func TestValkeyRefuses(t *testing.T) {
	pub, m := newTestPublisher(t)
	pub.timeout = 2 * valkeyRetryDelay
	if err := pub.ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	for answer, hint := range map[string]string{
		"NOAUTH Authentication required.":     "check VALKEY_USERNAME and VALKEY_PASSWORD",
		"WRONGPASS invalid username-password": "check VALKEY_USERNAME and VALKEY_PASSWORD",
		"NOPERM no permissions":               "check this user's ACL",
		"ERR ACL failure in script: User web has no permissions to run the 'zadd' command": "check this user's ACL",
		"WRONGTYPE Operation against a key holding the wrong kind of value":                "choose another VALKEY_CHANNEL",
		"LOADING Valkey is loading the dataset in memory":                                  "LOADING",
	} {
		m.SetError(answer)
		start := time.Now()
		if _, err := pub.publish(t.Context(), []string{apiDev}, maxLedger); err == nil || !strings.Contains(err.Error(), hint) {
			t.Errorf("%s: %v", answer, err)
		}
		if retried := time.Since(start) >= pub.timeout; retried != (hint == "LOADING") {
			t.Errorf("%s: answered after %s", answer, time.Since(start))
		}
	}
}

// web is ready only if it could write the ledger.
func TestReadyMeansWritable(t *testing.T) {
	pub, m := newTestPublisher(t)
	if err := pub.ready(t.Context()); err != nil {
		t.Error(err)
	}
	if m.Exists("krt:requested") {
		t.Error("the check wrote something")
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
	pub, m := newTestPublisher(t)
	if pub.timeout != publishTimeout || publishTimeout >= 10*time.Second {
		t.Errorf("a job waits for %s; a client gives up after 10 s", pub.timeout)
	}
	pub.timeout = 50 * time.Millisecond
	silent := make(chan struct{})
	m.Server().SetPreHook(func(*server.Peer, string, ...string) bool {
		<-silent
		return false
	})
	defer close(silent)
	start := time.Now()
	if _, err := pub.publish(t.Context(), []string{apiDev}, maxLedger); err == nil || time.Since(start) > time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

// What exceeds the bound is refused at once.
func TestPublishIsBounded(t *testing.T) {
	pub, _ := newTestPublisher(t)
	pub.publishing.Add(maxPublishing)
	if _, err := pub.publish(t.Context(), []string{apiDev}, maxLedger); !errors.Is(err, errBusy) {
		t.Errorf("got %v", err)
	}
	pub.publishing.Add(-1)
	if _, err := pub.publish(t.Context(), []string{apiDev}, maxLedger); err != nil {
		t.Errorf("with a slot free: %v", err)
	}
}

// What is larger than any entry or message ends the connection before there is room
// for it, however it is split into packets.
func TestBoundedElements(t *testing.T) {
	blob := func(size int) string { return fmt.Sprintf("$%d\r\n%s\r\n", size, strings.Repeat("*", size)) }
	for _, tt := range []struct {
		text string
		ok   bool
	}{
		{"+OK\r\n" + blob(maxElement) + blob(0) + "$-1\r\n*2\r\n" + blob(3) + "%1\r\n:1\r\n_\r\n", true},
		{blob(maxElement) + blob(maxElement+1), false},
		{"$1\r\n\n\r\n$20000\r\n", false},
		{"-$20000\r\n", true},
		{"!20000\r\n", false},
		{"=20000\r\n", false},
		{"*20000\r\n", false},
		{"~20000\r\n", false},
		{">20000\r\n", false},
		{"%20000\r\n", false},
		{"|20000\r\n", false},
		{"$?\r\n", false}, // a stream, which Valkey never sends
	} {
		for _, packet := range []int{1, 7, 4096} {
			ours, theirs := net.Pipe()
			go func() {
				for text := tt.text; text != ""; {
					n, err := io.WriteString(theirs, text[:min(packet, len(text))])
					if err != nil {
						return
					}
					text = text[n:]
				}
				theirs.Close()
			}()
			got, err := io.ReadAll(&boundedConn{Conn: ours})
			if (err == nil) != tt.ok || tt.ok && string(got) != tt.text {
				t.Errorf("%.40q in packets of %d: %d bytes, %v", tt.text, packet, len(got), err)
			}
			ours.Close()
		}
	}
}

// What goes on failing in the same way is reported once.
func TestHealth(t *testing.T) {
	var h health
	for i, step := range []struct {
		err     error
		changed bool
	}{{errBusy, true}, {fmt.Errorf("%w", errBusy), false}, {io.EOF, true}, {nil, true}, {nil, false}} {
		if changed := h.set(step.err); changed != step.changed || h.get() != step.err {
			t.Errorf("step %d: changed is %v", i, changed)
		}
	}
}
