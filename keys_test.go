package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"kuberollouttrigger/internal/fake"
)

// inBubble runs the verifier in a synctest bubble, with an issuer that is down or not.
// accepts says whether it accepts a token that is made now.
func inBubble(t *testing.T, down bool, test func(t *testing.T, issuer *testIssuer, v *verifier, accepts func() error, log *bytes.Buffer)) {
	issuer := newTestIssuer(t)
	issuer.Down.Store(down)
	synctest.Test(t, func(t *testing.T) {
		issuer.now = time.Now
		log := new(bytes.Buffer)
		v := newVerifier(issuer.URL, testAudience, issuer.Offline(), slog.New(slog.NewTextHandler(log, nil)), time.Now)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { v.run(ctx); close(done) }()
		t.Cleanup(func() { cancel(); <-done })
		synctest.Wait()
		test(t, issuer, v, func() error {
			_, err := v.verify(issuer.with(nil))
			return err
		}, log)
	})
}

// pass lets time go by in a bubble.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// forgedToken has a kid that the issuer never published.
func forgedToken(t *testing.T, issuer *testIssuer, kid string) string {
	h := issuer.Header()
	h["kid"] = kid
	return b64(jsonBytes(h)) + ".e30.AAAA"
}

func TestKeysAreRefreshed(t *testing.T) {
	inBubble(t, false, func(t *testing.T, issuer *testIssuer, v *verifier, accepts func() error, log *bytes.Buffer) {
		if err := v.ready(); err != nil {
			t.Fatal(err)
		}
		// A bad signature under a known kid fetches nothing.
		good := issuer.with(nil)
		if _, err := v.verify(good[:strings.LastIndexByte(good, '.')] + ".AAAA"); err == nil || !strings.Contains(err.Error(), "signature:") {
			t.Fatal(err)
		}
		pass(9*time.Minute - 1)
		early := issuer.JWKSFetches.Load()
		pass(2 * time.Minute)
		if late := issuer.JWKSFetches.Load(); early != 1 || late != 2 {
			t.Errorf("%d fetches after 9 minutes, %d after 11", early, late)
		}
		if got := strings.Count(log.String(), "level=INFO"); got != 1 {
			t.Errorf("%d lines for keys that did not change:\n%s", got, log)
		}
	})
}

// TestUnknownKids: a flood of forged kids makes one fetch each 30 s, and valid tokens pass.
func TestUnknownKids(t *testing.T) {
	inBubble(t, false, func(t *testing.T, issuer *testIssuer, v *verifier, accepts func() error, _ *bytes.Buffer) {
		start := time.Now()
		flood := func(from, to time.Duration, want int64) {
			t.Helper()
			for time.Sleep(time.Until(start.Add(from))); time.Since(start) < to; time.Sleep(time.Second) {
				token := forgedToken(t, issuer, "forged"+time.Since(start).String())
				for range 100 {
					if _, err := v.verify(token); err == nil || !strings.Contains(err.Error(), "header: kid") {
						t.Fatal(err)
					}
				}
				if err := accepts(); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			if got := issuer.DiscoveryFetches.Load(); got != want {
				t.Errorf("%d fetches after %s, expected %d", got, to, want)
			}
		}
		flood(0, 29*time.Second, 1)
		flood(29*time.Second, 59*time.Second, 2)
		flood(59*time.Second, 89*time.Second, 3)
		flood(200*time.Second, 210*time.Second, 4+1) // one is left over from the first flood
		// With the issuer down it is tried every 30 s, flood or not.
		issuer.Down.Store(true)
		flood(300*time.Second, 330*time.Second, 5+4)
	})
}

func TestIssuerDownAtStart(t *testing.T) {
	inBubble(t, true, func(t *testing.T, issuer *testIssuer, v *verifier, accepts func() error, log *bytes.Buffer) {
		if err := accepts(); !errors.Is(err, errNoKeys) || !errors.Is(v.ready(), errNoKeys) {
			t.Errorf("verify: %v; ready: %v", err, v.ready())
		}
		if _, err := v.verify("x"); err == nil || errors.Is(err, errNoKeys) { // stays a denial
			t.Errorf("verify: %v", err)
		}
		pass(10 * time.Second)
		if n := issuer.DiscoveryFetches.Load(); n < 4 || n > 5 { // after about 0, 1, 3, 7 s
			t.Errorf("%d attempts in 10 s", n)
		}
		pass(5 * time.Minute)
		if n := issuer.DiscoveryFetches.Load(); n < 10 || n > 20 {
			t.Errorf("%d attempts in 5 minutes", n)
		}
		if !strings.Contains(log.String(), "status 503 Service Unavailable") {
			t.Errorf("the log does not say why:\n%s", log)
		}
		issuer.Down.Store(false)
		pass(33 * time.Second)
		if err := accepts(); err != nil {
			t.Error(err)
		}
	})
}

func TestIssuerDownLater(t *testing.T) {
	inBubble(t, false, func(t *testing.T, issuer *testIssuer, v *verifier, accepts func() error, _ *bytes.Buffer) {
		issuer.Down.Store(true)
		time.Sleep(keyGrace)
		if err := errors.Join(accepts(), v.ready()); err != nil {
			t.Errorf("after a day: %v", err)
		}
		time.Sleep(time.Second)
		if err := accepts(); !errors.Is(err, errNoKeys) || !errors.Is(v.ready(), errNoKeys) {
			t.Errorf("after more than a day: %v; ready: %v", err, v.ready())
		}
		issuer.Down.Store(false)
		pass(keyFetchGap)
		if err := accepts(); err != nil {
			t.Error(err)
		}
	})
}

// TestIssuerHangs: a fetch that gets no answer ends, and nobody waits for it.
func TestIssuerHangs(t *testing.T) {
	inBubble(t, false, func(t *testing.T, issuer *testIssuer, v *verifier, accepts func() error, log *bytes.Buffer) {
		issuer.Hang.Store(true)
		time.Sleep(11 * time.Minute)
		before := time.Now()
		if _, err := v.verify(forgedToken(t, issuer, "forged")); err == nil {
			t.Error("accepted")
		}
		if err := accepts(); err != nil {
			t.Error(err)
		}
		if took := time.Since(before); took != 0 {
			t.Errorf("verify waited %s", took)
		}
		pass(keyFetchTimeout)
		if !strings.Contains(log.String(), "context deadline exceeded") {
			t.Errorf("no timeout:\n%s", log)
		}
	})
}

func TestRotation(t *testing.T) {
	inBubble(t, false, func(t *testing.T, issuer *testIssuer, v *verifier, accepts func() error, _ *bytes.Buffer) {
		// As GitHub does it: published first, used later. Nobody is denied.
		issuer.Announce()
		pass(11 * time.Minute)
		_, old := v.verify(issuer.with(nil))
		issuer.Rotate()
		if err := errors.Join(old, accepts()); err != nil {
			t.Errorf("announced: %v", err)
		}
		// Used unannounced: denied until the fetch that this causes.
		time.Sleep(keyFetchGap)
		issuer.Rotate()
		if accepts() == nil {
			t.Error("unannounced key accepted before it was fetched")
		}
		pass(keyFetchGap)
		fresh := issuer.with(nil)
		if _, err := v.verify(fresh); err != nil {
			t.Errorf("unannounced: %v", err)
		}
		// No longer published: no longer accepted.
		issuer.Announce()
		issuer.Rotate()
		issuer.Revoke()
		pass(11 * time.Minute)
		if _, err := v.verify(fresh); err == nil || !strings.Contains(err.Error(), "is none of the issuer's 1 keys") {
			t.Errorf("revoked: %v", err)
		}
	})
}

// TestRefresh: what the issuer may answer, and that no bad answer replaces the keys.
func TestRefresh(t *testing.T) {
	issuer := newTestIssuer(t)
	type answer struct{ discovery, jwks http.HandlerFunc }
	body := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) }
	}
	discovery := func(s string) answer { return answer{discovery: body(s)} }
	names := func(issuer, jwksURI string) answer {
		return discovery(string(jsonBytes(map[string]any{"issuer": issuer, "jwks_uri": jwksURI})))
	}
	jwks := func(s string) answer { return answer{jwks: body(s)} }
	keys := func(keys ...any) answer { return jwks(string(jsonBytes(map[string]any{"keys": keys}))) }
	redirect := func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, issuer.URL+"/.well-known/jwks?elsewhere", http.StatusFound)
	}
	public := &fake.RSAKey(0).PublicKey
	good := fake.PublicKey("other", public)
	key := func(member string, value any) map[string]any { // nil removes the member
		k := maps.Clone(good)
		if k[member] = value; value == nil {
			delete(k, member)
		}
		return k
	}
	modulus := func(bits uint, low int64) string {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return b64(n.Add(n, big.NewInt(low)).Bytes())
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	private := key("d", b64(fake.RSAKey(0).D.Bytes()))
	private["p"], private["q"] = b64(fake.RSAKey(0).Primes[0].Bytes()), b64(fake.RSAKey(0).Primes[1].Bytes())
	bare := key("use", nil)
	delete(bare, "alg")
	huge := strings.Repeat("x", maxKeyDocument)
	keysAt := issuer.URL + "/.well-known/jwks"
	// go-jose's own limit is a variable; ours holds without it.
	defer func(limit int) { jose.MaxRSAModulusBits = limit }(jose.MaxRSAModulusBits)
	jose.MaxRSAModulusBits = 16384

	refresh := func(a answer) (v *verifier, before *keySet, err error) {
		v = newTestVerifier(t, issuer)
		before = v.keys.Load()
		if a.discovery != nil {
			issuer.Discovery.Store(&a.discovery)
		}
		if a.jwks != nil {
			issuer.JWKS.Store(&a.jwks)
		}
		defer func() { issuer.Discovery.Store(nil); issuer.JWKS.Store(nil) }()
		return v, before, v.refresh(t.Context())
	}
	for want, answers := range map[string][]answer{
		"issuer is https://evil.example, expected ": {names("https://evil.example", keysAt)},
		"issuer is " + issuer.URL + "/, expected ":  {names(issuer.URL+"/", keysAt)},
		"issuer is , expected ": {names("", keysAt), discovery(`{"jwks_uri":"` + keysAt + `"}`),
			discovery(`{"Issuer":"` + issuer.URL + `","jwks_uri":"` + keysAt + `"}`)},
		"expected an https URL": {names(issuer.URL, "http://"+strings.TrimPrefix(keysAt, "https://")), names(issuer.URL, ""),
			names(issuer.URL, "https:///jwks"), names(issuer.URL, "file:///etc/passwd"), names(issuer.URL, "https://%zz/")},
		"/.well-known/openid-configuration: ": {discovery("<html>")},
		"/.well-known/jwks: ":                 {jwks("{"), jwks(`{"keys":{}}`)},
		"status 302 Found":                    {{discovery: redirect}, {jwks: redirect}},
		"status 404 Not Found":                {{jwks: http.NotFound}},
		"unexpected EOF":                      {discovery(`{"issuer":"` + huge + `"}`), jwks(`{"keys":[],"x":"` + huge + `"}`)},
		"none of 0 keys is usable":            {jwks("null"), jwks("{}"), jwks(`{"Keys":[` + string(jsonBytes(good)) + `]}`), jwks(`{"keys":[]}`)},
		"none of 1 keys is usable": {keys(key("use", "enc")), keys(key("alg", "RS384")), keys(key("alg", "PS256")), keys(key("kid", nil)), keys(private),
			keys(fake.PublicKey("small", &small.PublicKey)), keys(key("n", modulus(2047, 1))), keys(key("n", modulus(4097, 1))), keys(key("n", modulus(2048, 0))),
			keys(key("e", "AQ")), keys(key("e", "Aw")), keys(key("e", "AQAC")), keys(key("e", "AQAAAAE"))}, // 1, 3, even, 33 bits
	} {
		for i, a := range answers {
			v, before, err := refresh(a)
			if err == nil || !strings.Contains(err.Error(), want) || v.keys.Load() != before {
				t.Errorf("answer %d: %v, expected %q and the keys of before", i, err, want)
			}
		}
	}
	for name, a := range map[string]answer{
		"garbage around a good key": keys(nil, 1, "x", []any{}, map[string]any{}, map[string]any{"kty": "XX", "kid": "xx"},
			map[string]any{"kty": "oct", "kid": "symmetric", "k": "c2VjcmV0"},
			map[string]any{"kty": "RSA", "kid": "no modulus", "e": "AQAB"},
			map[string]any{"kty": "EC", "kid": "ec", "crv": "P-256", "x": "x", "y": "y"},
			map[string]any{"kty": "OKP", "kid": "ed", "crv": "Ed25519", "x": b64(make([]byte, 32))}, good, key("kid", 7)),
		"use and alg absent": keys(bare),
		"4096 bits":          keys(key("n", modulus(4096, 1))),
		"a kid used twice":   keys(good, key("n", modulus(4096, 1))),
	} {
		v, _, err := refresh(a)
		set := v.keys.Load().byID
		if err != nil || len(set) != 1 || set["other"].Equal(public) == (name == "4096 bits") {
			t.Errorf("%s: %v, keys %v", name, err, set)
		}
	}
}

// TestIssuerWithPath: enterprise slugs and GHES have one, GitHub's slug points
// at the root's JWKS, and a final slash counts in iss but not in the address.
func TestIssuerWithPath(t *testing.T) {
	issuer := newTestIssuer(t)
	for _, path := range []string{"/acme", "/_services/token", "/acme/", "/"} {
		t.Run(path, func(t *testing.T) {
			var asked []string
			client := &http.Client{Transport: roundTripper(func(req *http.Request) (*http.Response, error) {
				asked = append(asked, req.URL.Path)
				if req.URL.Path != "/.well-known/jwks" {
					req.URL.Path = "/.well-known/openid-configuration"
				}
				return issuer.Offline().Transport.RoundTrip(req)
			})}
			url := issuer.URL + path
			document := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Write(jsonBytes(map[string]any{"issuer": url, "jwks_uri": issuer.URL + "/.well-known/jwks"}))
			})
			issuer.Discovery.Store(&document)
			v := newVerifier(url, testAudience, client, slog.New(slog.DiscardHandler), issuer.now)
			if err := v.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			want := []string{strings.TrimSuffix(path, "/") + "/.well-known/openid-configuration", "/.well-known/jwks"}
			if !slices.Equal(asked, want) {
				t.Errorf("asked for %q, expected %q", asked, want)
			}
			if _, err := v.verify(issuer.with(map[string]any{"iss": url})); err != nil {
				t.Error(err)
			}
			if _, err := v.verify(issuer.with(nil)); err == nil {
				t.Error("accepted another issuer's token")
			}
		})
	}
}
