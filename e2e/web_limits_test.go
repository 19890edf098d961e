package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What one caller can cost the others: lines of the log, places in the ledger, and
// web's patience while Valkey is away. Not parallel where they measure.

// TestLogFlood: three seconds of requests without a valid token, at full speed, leave
// few lines in the log, which say how many there were, and every line about a job.
func TestLogFlood(t *testing.T) {
	web := startWeb(t, startValkey(t).addr)
	c := newClient(web.url)
	stop := startJobs(c, 50*time.Millisecond)
	tokens := []string{"", "x.y.z", github.mint(time.Now().Add(-time.Hour), nil), strings.Repeat("x", 9000)}
	var sent atomic.Int64
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for begun := time.Now(); time.Since(begun) < 3*time.Second; {
				a, err := c.post(t.Context(), tokens[i%len(tokens)], "{}")
				if err != nil || a.status != http.StatusUnauthorized {
					t.Errorf("flood: %d %s, %v", a.status, a.body, err)
					return
				}
				sent.Add(1)
			}
		})
	}
	all.Wait()
	load := stop()
	load.mustBeServed(t)
	var logged, suppressed, summaries int
	count := func() {
		logged, suppressed, summaries = len(web.logged(t, "msg", "denied")), 0, 0
		for _, line := range web.logged(t, "msg", "denials not logged") {
			n, _ := line["count"].(float64)
			suppressed, summaries = suppressed+int(n), summaries+1
		}
	}
	err := poll(15*time.Second, func() error {
		if count(); int64(logged+suppressed) != sent.Load() {
			return fmt.Errorf("%d denials were sent, %d logged and %d counted", sent.Load(), logged, suppressed)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	accepted := len(web.logged(t, "msg", "accepted"))
	fmt.Printf("%s: %d denials sent, %d logged, %d in %d lines that count them; %d of %d jobs logged; %d bytes of log\n",
		t.Name(), sent.Load(), logged, suppressed, summaries, accepted, len(load.took), len(web.stderr.String()))
	if logged+summaries > 200 || accepted != len(load.took) {
		t.Errorf("%d lines about %d denials, %d about %d jobs", logged+summaries, sent.Load(), accepted, len(load.took))
	}
}

// TestLongestLogLines: a line about a verified job is bounded, whatever its claims and
// its body are, and however many rules of the policy it does not match.
func TestLongestLogLines(t *testing.T) {
	t.Parallel()
	policy := strings.Repeat("- {claims: {environment: none}, images: ['*']}\n- {claims: {ref: refs/heads/none, environment: '*'}, images: ['*']}\n", 50)
	v := startValkey(t)
	var longest, accepted int
	for _, settings := range [][]string{{"ALLOWED_IMAGE_PREFIX=ghcr.io"}, {"TRUST_POLICY=" + policy}} {
		web := startWeb(t, v.addr, settings...)
		c := newClient(web.url)
		for _, filler := range []string{"x", "\x01", "é", "\u2028", `\`, `"`, "<", "\x7f", "𝄞"} {
			// All that a line may show, as long as the token of 8 KiB allows.
			claims := map[string]any{"repository": "acme/" + strings.Repeat("x", 100)}
			for _, name := range []string{"ref", "run_id", "run_attempt", "actor", "sha", "environment", "job_workflow_ref", "check_run_id"} {
				claims[name] = strings.Repeat(filler, 480/len(asJSON(filler)))
			}
			token := github.mint(time.Now(), claims)
			tags := make([]string, 32)
			for i := range tags {
				tags[i] = fmt.Sprintf("%0128d", i)
			}
			name := "ghcr.io/acme/" + strings.Repeat("x", 255-len("ghcr.io/acme/"))
			long := fmt.Sprintf(`{"image":%q,"tags":["%s"]}`, name, strings.Join(tags, `","`))
			for _, body := range []string{long, imageBody(strings.Repeat(filler, 2000)), "{" + asJSON(strings.Repeat(filler, 2000)) + ":1}"} {
				if a, err := c.post(t.Context(), token, body); err != nil || a.status == http.StatusUnauthorized {
					t.Errorf("%q: %d %s, %v", filler, a.status, a.body, err)
				}
			}
		}
		accepted += len(web.logged(t, "msg", "accepted"))
		for line := range strings.Lines(web.stderr.String()) {
			if strings.Contains(line, `"request_id"`) {
				longest = max(longest, len(line))
			}
		}
	}
	fmt.Printf("%s: the longest line has %d bytes\n", t.Name(), longest)
	if longest > 32<<10 || accepted == 0 {
		t.Errorf("the longest line has %d bytes; %d lines are about accepted jobs", longest, accepted)
	}
}

// jobOf is a token of a repository.
func jobOf(repository string, id int) string {
	return github.mint(time.Now(), map[string]any{"repository": "acme/" + repository, "repository_id": fmt.Sprint(id), "sub": "repo:acme/" + repository + ":ref:refs/heads/main"})
}

// TestQuota: a job that names thousands of tags is told to stop after 2,000, also if
// it hangs up before the answer. Nobody else is, and what the ledger has costs
// nothing.
func TestQuota(t *testing.T) {
	t.Parallel()
	const quota, tags, requests = 2000, 32, 625
	v := startValkey(t)
	web := startWeb(t, v.addr)
	c := newClient(web.url)
	greedy, repository := jobOf("greedy", 1), newRepository()
	var mu sync.Mutex
	statuses := map[int]int{}
	work := make(chan int)
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for i := range work {
				var list []string
				for tag := range tags {
					list = append(list, fmt.Sprintf(`"t%d"`, i*tags+tag))
				}
				body := fmt.Sprintf(`{"image":%q,"tags":[%s]}`, repository, strings.Join(list, ","))
				if i%2 == 0 {
					hangUp(hostOf(web.url), greedy, body, time.Duration(i)*5*time.Microsecond)
					continue
				}
				a, err := c.post(t.Context(), greedy, body)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				statuses[a.status]++
				mu.Unlock()
			}
		})
	}
	for i := range requests {
		work <- i
	}
	close(work)
	all.Wait()
	time.Sleep(time.Second) // for those that hung up
	recorded := ledgerOf(t, v)
	fmt.Printf("%s: %d tags of one job, of which half hung up: answers %v, %d images in the ledger\n", t.Name(), requests*tags, statuses, len(recorded))
	if len(recorded) > quota || len(recorded) <= quota-tags || statuses[http.StatusTooManyRequests] == 0 ||
		statuses[http.StatusAccepted]+statuses[http.StatusTooManyRequests] != requests/2 {
		t.Errorf("%d images of one repository are in the ledger, want %d; answers %v", len(recorded), quota, statuses)
	}
	expect := func(what, token, body string, status int) (a answer) {
		t.Helper()
		a, err := c.post(t.Context(), token, body)
		if err != nil || a.status != status {
			t.Errorf("%s: %d %s, %v; want %d", what, a.status, a.body, err, status)
		}
		return a
	}
	for range quota - len(recorded) {
		expect("what is left of the quota", greedy, imageBody(newImage()), http.StatusAccepted)
	}
	refused := expect("one more", greedy, imageBody(newImage()), http.StatusTooManyRequests)
	var said struct{ Error, RequestID string }
	if err := json.Unmarshal([]byte(refused.body), &said); err != nil || said.Error == "" || said.RequestID == "" {
		t.Errorf("the refusal is %q", refused.body)
	}
	for image := range recorded {
		expect("an image that is in the ledger", greedy, imageBody(image), http.StatusAccepted)
		break
	}
	expect("another repository's new image", jobOf("other", 2), imageBody(newImage()), http.StatusAccepted)
	web.signal(syscall.SIGTERM)
	web.exitCode(t, 15*time.Second)
	c = newClient(startWeb(t, v.addr).url)
	expect("a new image after a restart of web", greedy, imageBody(newImage()), http.StatusAccepted)
}

// hangUp sends a request and closes the connection soon after.
func hangUp(address, token, body string, after time.Duration) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer conn.Close()
	fmt.Fprintf(conn, "%sContent-Type: application/json\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s", post, token, len(body), body)
	time.Sleep(after)
}

// TestQuotaOutlivesValkey: what was not recorded because Valkey was away costs the
// repository nothing.
func TestQuotaOutlivesValkey(t *testing.T) {
	v := startValkey(t)
	web := startWeb(t, v.addr)
	c := newClient(web.url)
	token, images := jobOf("patient", 3), newImages(40)
	v.kill()
	var all sync.WaitGroup
	statuses := make(chan int, 40*100)
	for i := range 40 * 100 { // twice the quota, if each try counted
		all.Go(func() {
			a, _ := c.post(context.Background(), token, imageBody(images[i%len(images)]))
			statuses <- a.status
		})
		if i%64 == 63 {
			time.Sleep(100 * time.Millisecond)
		}
	}
	all.Wait()
	close(statuses)
	counts := map[int]int{}
	for status := range statuses {
		counts[status]++
	}
	v.start(t)
	web.waitReady(t, 10*time.Second)
	a, err := c.post(t.Context(), token, imageBody(newImage()))
	fmt.Printf("%s: %v while Valkey was away, then %d\n", t.Name(), counts, a.status)
	if err != nil || a.status != http.StatusAccepted || counts[http.StatusTooManyRequests] > 0 {
		t.Errorf("afterwards: %d %s, %v", a.status, a.body, err)
	}
}

// awayFor makes Valkey go away, and brings it back after some time.
var awayFor = map[string]func(t *testing.T, v *valkeyServer, away time.Duration){
	"killed": func(t *testing.T, v *valkeyServer, away time.Duration) {
		v.kill()
		time.Sleep(away)
		v.start(t)
	},
	"stopped": func(_ *testing.T, v *valkeyServer, away time.Duration) {
		v.proc.signal(syscall.SIGSTOP)
		time.Sleep(away)
		v.proc.signal(syscall.SIGCONT)
	},
}

// TestValkeyRestarts: Valkey is away for three seconds. Every job that sends its
// request once, without a retry, is answered 202.
func TestValkeyRestarts(t *testing.T) {
	for how, away := range awayFor {
		t.Run(how, func(t *testing.T) {
			v := startValkey(t)
			c := newClient(startWeb(t, v.addr).url)
			stop := startJobs(c, 50*time.Millisecond)
			time.Sleep(time.Second)
			away(t, v, 3*time.Second)
			time.Sleep(2 * time.Second)
			load := stop()
			slowest := load.percentile(100)
			fmt.Printf("%s: %s, %s at most\n", t.Name(), load, slowest)
			if len(load.failed) > 0 || len(load.took) < 100 {
				t.Errorf("%d jobs were accepted, %d not: %q", len(load.took), len(load.failed), first(load.failed, 3))
			}
			if slowest < 2*time.Second {
				t.Errorf("no job waited longer than %s, so Valkey was not away", slowest)
			}
		})
	}
}

// TestValkeyGone: while Valkey is away for good, 256 requests wait for 8 s and get a
// 503 before the action gives up after 10 s. The others get one at once.
func TestValkeyGone(t *testing.T) {
	for how, away := range awayFor {
		t.Run(how, func(t *testing.T) {
			const many, waiting = 400, 256
			v := startValkey(t)
			web := startWeb(t, v.addr)
			c := newClient(web.url)
			var back sync.WaitGroup
			back.Go(func() { away(t, v, 10500*time.Millisecond) })
			time.Sleep(300 * time.Millisecond)
			token, body := github.mint(time.Now(), nil), imageBody(newImage())
			var mu sync.Mutex
			var early, late []time.Duration
			var all sync.WaitGroup
			for range many {
				all.Go(func() {
					a, err := c.post(t.Context(), token, body)
					mu.Lock()
					defer mu.Unlock()
					switch {
					case err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "":
						t.Errorf("after %s: %d %s with Retry-After %q, %v", a.took, a.status, a.body, a.header.Get("Retry-After"), err)
					case a.took < 5*time.Second:
						early = append(early, a.took)
					default:
						late = append(late, a.took)
					}
				})
			}
			all.Wait()
			back.Wait()
			slices.Sort(early)
			slices.Sort(late)
			if len(early) == 0 || len(late) == 0 {
				t.Fatalf("%d were answered early and %d late", len(early), len(late))
			}
			fmt.Printf("%s: %d answered 503 within %s, %d between %s and %s\n", t.Name(), len(early), early[len(early)-1], len(late), late[0], late[len(late)-1])
			if len(late) > waiting || len(late) < waiting-10 || late[0] < 7*time.Second || late[len(late)-1] > 10*time.Second ||
				early[len(early)-1] > time.Second && !raceDetecting {
				t.Error("want 256 after 8 s, and the others within 1 s")
			}
			web.waitReady(t, 10*time.Second)
			c.mustPush(t, newImage())
		})
	}
}
