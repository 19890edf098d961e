package e2e

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestDenied is a smoke test of what web denies. The unit tests have the whole list,
// on the same handler.
func TestDenied(t *testing.T) {
	v := startValkey(t)
	web := startWeb(t, v.addr)
	c := newClient(web.url)
	image := newImage()
	foreign, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	with := func(replace map[string]any) string { return github.mint(now, replace) }
	for _, d := range []struct {
		name, token, image string
		status             int
	}{
		{"no token", "", image, 401},
		{"no JWT", "eyJhbGciOiJub25lIn0.e30.", image, 401},
		{"another's key", github.forge(foreign, now), image, 401},
		{"another audience", with(map[string]any{"aud": "https://github.com/acme"}), image, 401},
		{"another issuer", with(map[string]any{"iss": github.URL + "/"}), image, 401},
		{"expired", github.mint(now.Add(-10*time.Minute), nil), image, 401},
		{"not yet valid", github.mint(now.Add(20*time.Minute), nil), image, 401},
		{"another organization", with(map[string]any{"repository_owner": "acme-evil", "repository": "acme-evil/api", "sub": "repo:acme-evil/api:ref:refs/heads/main"}), image, 403},
		{"a pull request", with(map[string]any{"event_name": "pull_request_target"}), image, 403},
		{"an image beside the prefix", with(nil), "ghcr.io/acme-evil/api:dev", 403},
	} {
		a, err := c.post(t.Context(), d.token, imageBody(d.image))
		if err != nil {
			t.Errorf("%s: %v", d.name, err)
			continue
		}
		if a.status != d.status {
			t.Errorf("%s: answered %d %s, want %d", d.name, a.status, a.body, d.status)
		}
		if a.status == 401 && a.header.Get("WWW-Authenticate") != "Bearer" {
			t.Errorf("%s: WWW-Authenticate is %q, want Bearer", d.name, a.header.Get("WWW-Authenticate"))
		}
		if saysNoMore := strings.HasPrefix(a.body, `{"error":"access denied","requestId":"`); saysNoMore != (d.image == image) {
			t.Errorf("%s: the answer is %q", d.name, a.body)
		}
	}
	if set := ledgerOf(t, v); len(set) != 0 {
		t.Errorf("denied requests are in the ledger: %v", set)
	}
	if strings.Contains(web.stderr.String(), "eyJ") {
		t.Error("a token is in the log")
	}
	c.mustPush(t, image) // and the same web accepts what is right
}

// TestUntrustedIssuer: web takes no keys from an issuer whose certificate no CA
// vouches for, and accepts nothing without keys.
func TestUntrustedIssuer(t *testing.T) {
	v := startValkey(t)
	web := launchWeb(t, programPath, v.addr, "SSL_CERT_FILE=/dev/null", "SSL_CERT_DIR=/nonexistent")
	t.Log("not ready:", web.waitNotReady(t, 10*time.Second))
	a, err := newClient(web.url).post(t.Context(), github.mint(time.Now(), nil), imageBody(newImage()))
	if err != nil {
		t.Fatal(err)
	}
	if a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("answered %d %s with Retry-After %q, want 503 with one", a.status, a.body, a.header.Get("Retry-After"))
	}
	if web.exited() {
		t.Error("web exited; it should wait for the keys")
	}
}

// memoryKiB is a field of /proc/PID/status, such as VmRSS.
func memoryKiB(t testing.TB, p *program, field string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int
		if n, _ := fmt.Sscanf(line, field+": %d kB", &kib); n == 1 {
			return kib
		}
	}
	t.Fatalf("/proc has no %s", field)
	return 0
}

// startWebWithIssuer starts a web that trusts an issuer of its own.
func startWebWithIssuer(t testing.TB) (*issuer, *program) {
	t.Helper()
	own, err := newIssuer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(own.Close)
	return own, startWeb(t, startValkey(t).addr, "GITHUB_OIDC_ISSUER="+own.URL)
}

// TestFloodOfUnknownKids: ten seconds of forged tokens at full speed, each with its
// own kid. Web asks the issuer once, accepts valid tokens all the while, and does
// not grow.
//
// Not parallel, because it measures.
func TestFloodOfUnknownKids(t *testing.T) {
	own, web := startWebWithIssuer(t)
	c := newClient(web.url)
	image := newImage()
	valid := func() (answer, error) { return c.post(t.Context(), own.mint(time.Now(), nil), imageBody(image)) }
	for range 50 { // what web allocates once
		if a, err := valid(); err != nil || a.status != http.StatusAccepted {
			t.Fatalf("before the flood: %d, %v", a.status, err)
		}
	}
	before, fetched := memoryKiB(t, web, "VmRSS"), own.JWKSFetches.Load()

	_, rest, _ := strings.Cut(own.mint(time.Now(), nil), ".")
	flood := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	var stop atomic.Bool
	var forged, wrong atomic.Int64
	var attackers sync.WaitGroup
	for range 16 {
		attackers.Go(func() {
			for !stop.Load() {
				header := fmt.Sprintf(`{"alg":"RS256","typ":"JWT","kid":%q}`, rand.Text())
				req, err := http.NewRequest(http.MethodPost, web.url+"/event", strings.NewReader(imageBody(image)))
				if err != nil {
					panic(err)
				}
				req.Header.Set("Authorization", "Bearer "+base64.RawURLEncoding.EncodeToString([]byte(header))+"."+rest)
				resp, err := flood.Do(req)
				if err != nil {
					wrong.Add(1)
					continue
				}
				resp.Body.Close()
				forged.Add(1)
				if resp.StatusCode != http.StatusUnauthorized {
					wrong.Add(1)
				}
			}
		})
	}
	var took []time.Duration
	for begun := time.Now(); time.Since(begun) < 10*time.Second; time.Sleep(20 * time.Millisecond) {
		a, err := valid()
		if err != nil || a.status != http.StatusAccepted {
			t.Errorf("a valid token during the flood: %d %s, %v", a.status, a.body, err)
		}
		took = append(took, a.took)
	}
	stop.Store(true)
	attackers.Wait()
	slices.Sort(took)
	after, peak := memoryKiB(t, web, "VmRSS"), memoryKiB(t, web, "VmHWM")
	fmt.Printf("%s: %d forged tokens in 10 s, %d not answered 401; %d fetches of the keys; %d valid ones accepted, median %.1f ms; resident %d KiB before, %d after, %d at most\n",
		t.Name(), forged.Load(), wrong.Load(), own.JWKSFetches.Load()-fetched, len(took), float64(took[len(took)/2].Microseconds())/1000, before, after, peak)
	if wrong.Load() > 0 {
		t.Errorf("%d of %d forged tokens were not answered 401", wrong.Load(), forged.Load())
	}
	if n := own.JWKSFetches.Load() - fetched; n > 1 {
		t.Errorf("the flood caused %d fetches of the keys", n)
	}
	if request := memoryOf(t, manifestContainer(t, "../k8s/30-web.yaml", "web"), "requests"); !raceDetecting && int64(peak)<<10 > request {
		t.Errorf("web took %d KiB, and k8s/ requests %d", peak, request>>10)
	}
}

// TestIssuerGone: the issuer is down for good after the start, and web still
// verifies tokens.
func TestIssuerGone(t *testing.T) {
	t.Parallel()
	own, web := startWebWithIssuer(t)
	own.Close()
	c := newClient(web.url)
	image := newImage()
	// An unknown kid makes web try to fetch, and fail.
	header := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","typ":"JWT","kid":"unknown"}`))
	_, rest, _ := strings.Cut(own.mint(time.Now(), nil), ".")
	for range 40 {
		if a, err := c.post(t.Context(), header+"."+rest, imageBody(image)); err != nil || a.status != http.StatusUnauthorized {
			t.Errorf("an unknown kid: %d, %v", a.status, err)
		}
		if a, err := c.post(t.Context(), own.mint(time.Now(), nil), imageBody(image)); err != nil || a.status != http.StatusAccepted {
			t.Errorf("a valid token: %d %s, %v", a.status, a.body, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if status, body, err := web.probe("/readyz"); err != nil || status != http.StatusOK {
		t.Errorf("/readyz: %d %s %v", status, body, err)
	}
}

// TestRotation: the issuer publishes a key, web fetches it (here because of an
// unknown kid, else within ten minutes), and the issuer signs with it. Under load,
// web denies no valid token.
func TestRotation(t *testing.T) {
	own, web := startWebWithIssuer(t) // it fetches no more keys for 30 s
	t.Parallel()
	c := newClient(web.url)
	image := newImage()

	var stop atomic.Bool
	var failed, accepted atomic.Int64
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for !stop.Load() {
				if a, err := c.post(t.Context(), own.mint(time.Now(), nil), imageBody(image)); err != nil || a.status != http.StatusAccepted {
					failed.Add(1)
				} else {
					accepted.Add(1)
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	fetched := own.JWKSFetches.Load()
	next := own.Announce()
	unknown := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","typ":"JWT","kid":"unknown"}`))
	_, rest, _ := strings.Cut(own.mint(time.Now(), nil), ".")
	if a, err := c.post(t.Context(), unknown+"."+rest, imageBody(image)); err != nil || a.status != http.StatusUnauthorized {
		t.Errorf("an unknown kid: %d, %v", a.status, err)
	}
	eventually(t, 40*time.Second, "web has fetched the keys again", func() error {
		if own.JWKSFetches.Load() == fetched || !strings.Contains(web.stderr.String(), next) {
			return fmt.Errorf("%d fetches", own.JWKSFetches.Load()-fetched)
		}
		return nil
	})
	own.Rotate()
	time.Sleep(2 * time.Second)
	stop.Store(true)
	load.Wait()
	fmt.Printf("%s: accepted=%d failed=%d across the rotation\n", t.Name(), accepted.Load(), failed.Load())
	if failed.Load() > 0 || accepted.Load() < 100 {
		t.Errorf("%d of %d valid tokens were refused", failed.Load(), failed.Load()+accepted.Load())
	}
}
