package main

import (
	"fmt"
	"testing"
	"time"
)

func TestDecide(t *testing.T) {
	clock := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	at := clock.Add(-10 * time.Minute)
	now := time.Unix(1_000_000, 0) // the worker's own clock is behind
	own := func(d time.Duration) string { return formatTime(at.Add(d).UnixMicro()) }
	other := func(d time.Duration) string { return at.Add(d).Format(time.RFC3339) }
	const later = 10 * time.Minute // from T to now
	received := func(ago time.Duration) request { return request{announced: true, made: now.Add(-ago)} }
	caughtUp := func(ago time.Duration) request { return request{made: now.Add(-ago)} }
	cached := func(ago time.Duration) usedImage {
		return usedImage{cachedAt: now.Add(-ago), addedAt: at.Add(-time.Hour)}
	}
	added := func(ago, afterT time.Duration) usedImage {
		return usedImage{cachedAt: now.Add(-ago), addedAt: at.Add(afterT)}
	}
	for name, tt := range map[string]struct {
		request  request
		image    usedImage
		d        workload
		newest   time.Duration // the newest T known, after T
		interval time.Duration
		want     verdict
	}{
		"never restarted":                                {request: received(later), image: cached(time.Hour), want: due},
		"never restarted, caught up":                     {request: caughtUp(later), image: cached(time.Hour), want: due},
		"restarted before T":                             {d: workload{restartedAt: own(-time.Microsecond)}, request: received(later), image: cached(time.Hour), want: due},
		"restarted at T":                                 {d: workload{restartedAt: own(0)}, request: received(later), image: cached(time.Hour), want: satisfied},
		"restarted after T":                              {d: workload{restartedAt: own(time.Microsecond)}, request: received(later), image: cached(time.Hour), want: satisfied},
		"restarted at T, and the annotation removed":     {d: workload{newestRestart: own(0)}, request: received(later), image: cached(time.Hour), want: satisfied},
		"own form, 5 s ahead":                            {d: workload{restartedAt: own(later + 5*time.Second)}, request: received(later), image: cached(time.Hour), want: satisfied},
		"own form, more than 5 s ahead":                  {d: workload{restartedAt: own(later + 5*time.Second + 1000)}, request: received(later), image: cached(time.Hour), want: due},
		"own form, 2 h ahead, a T that is known":         {d: workload{restartedAt: own(2 * time.Hour)}, newest: 2 * time.Hour, request: received(later), image: cached(time.Hour), want: satisfied},
		"own form, beyond each T that is known":          {d: workload{restartedAt: own(2*time.Hour + 1000)}, newest: 2 * time.Hour, request: received(later), image: cached(time.Hour), want: due},
		"a Rollout's, rounded up from a T that is known": {d: workload{kind: kinds[3], restartedAt: own(2 * time.Hour)}, newest: 2*time.Hour - time.Microsecond, request: received(later), image: cached(time.Hour), want: satisfied},
		"other form before T":                            {d: workload{restartedAt: other(-time.Second)}, request: received(later), image: cached(time.Hour), want: due},
		"other form at T":                                {d: workload{restartedAt: other(0)}, request: received(later), image: cached(time.Hour), want: satisfied},
		"other form now":                                 {d: workload{restartedAt: other(later)}, request: received(later), image: cached(time.Hour), want: satisfied},
		"other form from the future":                     {d: workload{restartedAt: other(later + time.Second)}, newest: time.Hour, request: received(later), image: cached(time.Hour), want: due},
		"other form with an offset":                      {d: workload{restartedAt: at.In(time.FixedZone("", 3600)).Format(time.RFC3339)}, request: received(later), image: cached(time.Hour), want: satisfied},
		"milliseconds are another form":                  {d: workload{restartedAt: at.Add(later + time.Second).Format("2006-01-02T15:04:05.000Z")}, request: received(later), image: cached(time.Hour), want: due},
		"an offset is another form":                      {d: workload{restartedAt: at.Add(later+time.Second).Format("2006-01-02T15:04:05.000000") + "+00:00"}, request: received(later), image: cached(time.Hour), want: due},
		"no time at all":                                 {d: workload{restartedAt: "yesterday"}, request: received(later), image: cached(time.Hour), want: due},

		"cached when the message arrived, added later by another clock": {request: received(later), image: added(time.Hour, time.Hour), want: due},
		"cached after the message, added before T":                      {request: received(later), image: added(time.Minute, -1), want: due},
		"cached after the message, added at T":                          {request: received(later), image: added(time.Minute, 0), want: due},
		"cached after the message, added after T":                       {request: received(later), image: added(time.Minute, 1), want: satisfied},
		"caught up, added before T":                                     {request: caughtUp(later), image: added(time.Hour, -1), want: due},
		"caught up, added after T":                                      {request: caughtUp(later), image: added(time.Hour, 1), want: satisfied},

		"Valkey behind: other form before the message":        {d: workload{restartedAt: other(time.Minute)}, request: request{made: at.Add(2 * time.Minute), announced: true}, image: cached(0), want: due},
		"Valkey behind: other form after the message":         {d: workload{restartedAt: other(3 * time.Minute)}, request: request{made: at.Add(2 * time.Minute), announced: true}, image: cached(0), want: satisfied},
		"Valkey behind: added before the message, seen later": {request: request{made: at.Add(2 * time.Minute), announced: true}, image: usedImage{cachedAt: at.Add(time.Hour), addedAt: at.Add(time.Minute)}, want: due},
		"just before the window's end":                        {request: received(time.Hour - 1), image: cached(2 * time.Hour), want: due},
		"expired":                                             {request: received(time.Hour), image: cached(2 * time.Hour), want: expired},
		"expired while paused":                                {request: caughtUp(time.Hour), image: cached(2 * time.Hour), d: workload{paused: true}, want: expired},
		"made in the future":                                  {request: caughtUp(-time.Hour), image: cached(2 * time.Hour), want: due},
		"being deleted":                                       {request: received(later), image: cached(time.Hour), d: workload{deleting: true}, want: skipped},
		"being deleted while paused":                          {request: received(later), image: cached(time.Hour), d: workload{deleting: true, paused: true}, want: skipped},
		"paused":                                              {request: received(later), image: cached(time.Hour), d: workload{paused: true}, want: deferred},
		"paused, restarted already":                           {request: received(later), image: cached(time.Hour), d: workload{paused: true, restartedAt: own(0)}, want: satisfied},
		"restarted just now":                                  {request: received(later), image: cached(time.Hour), d: workload{newestRestart: own(-1000), restartedSince: now.Add(-time.Second)}, interval: 10 * time.Second, want: deferred},
		"restarted just now, no interval":                     {request: received(later), image: cached(time.Hour), d: workload{newestRestart: own(-1000), restartedSince: now.Add(-time.Second)}, want: due},
		"restarted an interval ago":                           {request: received(later), image: cached(time.Hour), d: workload{newestRestart: own(-1000), restartedSince: now.Add(-10 * time.Second)}, interval: 10 * time.Second, want: due},
		"restarted at an unknown time":                        {request: received(later), image: cached(time.Hour), d: workload{newestRestart: own(-1000)}, interval: 10 * time.Second, want: due},
		"restarted just now, and expired":                     {request: received(time.Hour), image: cached(2 * time.Hour), d: workload{newestRestart: own(-1000), restartedSince: now}, interval: 10 * time.Second, want: expired},
		"restarted just now and satisfied":                    {request: received(later), image: cached(time.Hour), d: workload{newestRestart: own(0), restartedSince: now}, interval: 10 * time.Second, want: satisfied},
	} {
		t.Run(name, func(t *testing.T) {
			tt.request.at = at.UnixMicro()
			if tt.d.kind == nil {
				tt.d.kind = kinds[0]
			}
			m := moment{now: now, clock: clock, newest: at.Add(tt.newest).UnixMicro()}
			got := rules{window: time.Hour, interval: tt.interval}.decide(&tt.d, tt.image, tt.request, m)
			if got.verdict != tt.want {
				t.Errorf("verdict %d, want %d", got.verdict, tt.want)
			}
			if got.verdict == deferred && (got.wait <= 0 || got.wait > time.Hour) {
				t.Errorf("deferred for %s", got.wait)
			}
			if (got.reason == "") != (got.verdict == satisfied || got.verdict == due) {
				t.Errorf("reason %q", got.reason)
			}
		})
	}
}

// Argo Rollouts rewrites the worker's time in whole seconds, which is no other restart. One
// that is older, though greater as text, is another, but not the newest.
func TestRewrittenRestart(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	before := &workload{restartedAt: "2026-11-21T12:00:05.000000Z", newestRestart: "2026-11-21T12:00:05.000000Z", restartedSince: now}
	for value, want := range map[string]string{"2026-11-21T12:00:05Z": before.newestRestart, "2026-11-21T12:00:06Z": "2026-11-21T12:00:06Z",
		"2026-11-21T14:00:00+02:00": before.newestRestart} {
		after := &workload{restartedAt: value}
		after.inherit(before, now, now.Add(time.Second))
		if after.newestRestart != want || after.restartedSince.Equal(now) != (value == "2026-11-21T12:00:05Z") {
			t.Errorf("%s: the newest restart is %s, since %s", value, after.newestRestart, after.restartedSince)
		}
	}
}

// Nothing is older than it is, and no restart newer, because one of the two clocks
// is wrong.
func TestClocks(t *testing.T) {
	own := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for _, ahead := range []time.Duration{-2 * time.Hour, 0, 2 * time.Hour} {
		elapsed := time.Duration(0)
		q := newRequests(func() time.Time { return own.Add(elapsed) })
		q.setClock(own.Add(ahead), time.Hour)
		early := q.moment().clock
		elapsed = time.Minute
		if want := own.Add(min(ahead, 0)); !early.Equal(want) || !q.moment().clock.Equal(want.Add(elapsed)) {
			t.Errorf("Valkey %s ahead: %s, then %s", ahead, early, q.moment().clock)
		}
		if want := own.Add(ahead + elapsed).UnixMicro(); q.moment().next() != want {
			t.Errorf("Valkey %s ahead: a message without T gets %d, want %d", ahead, q.moment().next(), want)
		}
	}
}

func TestRequests(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	q := newRequests(func() time.Time { return now })
	at := now.UnixMicro()
	for i, step := range []struct {
		at              int64
		received, added bool
	}{
		{at, false, true},
		{at, false, false},
		{at, true, true}, // a message counts for more than the ledger
		{at, true, false},
		{at - 1, true, false},
		{at + 1, false, true},
		{at + 1, true, true},
	} {
		r := request{at: step.at, made: now, announced: step.received}
		if added, err := q.add(apiDev, r); added != step.added || err != nil {
			t.Errorf("step %d: %v, %v", i, added, err)
		}
	}
	if _, err := q.add(webDev, request{at: now.Add(ledgerAge).UnixMicro() + 1, made: now}); err == nil {
		t.Error("a T more than a day ahead is remembered")
	}

	// Valkey's clock was 40 days ahead for a while.
	ahead := now.Add(40 * 24 * time.Hour)
	q.setClock(ahead, time.Hour)
	if added, err := q.add(webDev, request{at: ahead.UnixMicro(), made: now}); !added || err != nil {
		t.Fatal(added, err)
	}
	q.setClock(now, time.Hour)
	if _, known := q.get(webDev); known || q.moment().newest != at+1 {
		t.Errorf("known %v, newest %d", known, q.moment().newest)
	}

	now = now.Add(time.Hour)
	q.setClock(now, time.Hour)
	if _, known := q.get(apiDev); !known {
		t.Error("forgotten too early")
	}
	now = now.Add(1)
	q.setClock(now, time.Hour)
	if _, known := q.get(apiDev); known {
		t.Error("never forgotten")
	}
}

// Messages that web did not send cannot make the worker remember without end.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	now := time.Now()
	q := newRequests(time.Now)
	for i := range 2*maxLedger + 1 {
		_, err := q.add(fmt.Sprintf("ghcr.io/acme/app-%d:dev", i), request{at: now.UnixMicro(), made: now})
		if (err != nil) != (i == 2*maxLedger) {
			t.Fatalf("image %d: %v", i, err)
		}
	}
	if added, err := q.add("ghcr.io/acme/app-7:dev", request{at: now.UnixMicro() + 1, made: now}); !added || err != nil {
		t.Errorf("what is remembered is no longer updated: %v", err)
	}
}
