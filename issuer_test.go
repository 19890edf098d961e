package main

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const testAudience = "https://kuberollouttrigger.example"

// testIssuer is GitHub's OIDC issuer on this machine: discovery and JWKS over
// TLS, and tokens with any header and payload a test wants.
type testIssuer struct {
	URL string

	now              func() time.Time // when tokens are minted
	discoveryFetches atomic.Int64
	jwksFetches      atomic.Int64
	down             atomic.Bool // answers 503
	hang             atomic.Bool // never answers

	// discovery and jwks, when set, are answered in place of the true documents.
	discovery, jwks atomic.Pointer[http.HandlerFunc]

	server    *httptest.Server
	mu        sync.Mutex
	keys      []testKey // published ones
	signing   testKey
	rotations int
}

type testKey struct {
	kid string
	*rsa.PrivateKey
}

// testKeys are made once, as that is what costs time.
var testKeys = sync.OnceValue(func() []*rsa.PrivateKey {
	keys := make([]*rsa.PrivateKey, 2)
	for i := range keys {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			panic(err)
		}
		keys[i] = key
	}
	return keys
})

func newTestIssuer(t testing.TB) *testIssuer {
	t.Helper()
	i := &testIssuer{now: time.Now}
	i.rotate()
	i.server = httptest.NewTLSServer(i)
	t.Cleanup(i.server.Close)
	i.URL = i.server.URL
	return i
}

// client trusts the issuer's certificate.
func (i *testIssuer) client() *http.Client { return i.server.Client() }

// offline reaches the issuer without a network, as a synctest bubble needs it.
func (i *testIssuer) offline() *http.Client { return &http.Client{Transport: offline{i}} }

type offline struct{ issuer *testIssuer }

func (o offline) RoundTrip(req *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	o.issuer.ServeHTTP(rec, req)
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	return rec.Result(), nil
}

func (i *testIssuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var override *http.HandlerFunc
	var document any
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		i.discoveryFetches.Add(1)
		override = i.discovery.Load()
		document = map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/.well-known/jwks", "id_token_signing_alg_values_supported": []string{"RS256"}}
	case "/.well-known/jwks":
		i.jwksFetches.Add(1)
		override = i.jwks.Load()
		document = i.publicKeys()
	default:
		http.NotFound(w, r)
		return
	}
	switch {
	case i.hang.Load():
		<-r.Context().Done()
	case i.down.Load():
		http.Error(w, "down", http.StatusServiceUnavailable)
	case override != nil:
		(*override)(w, r)
	default:
		json.NewEncoder(w).Encode(document)
	}
}

func (i *testIssuer) publicKeys() map[string]any {
	i.mu.Lock()
	defer i.mu.Unlock()
	keys := []any{}
	for _, key := range i.keys {
		keys = append(keys, publicKey(key.kid, &key.PublicKey))
	}
	return map[string]any{"keys": keys}
}

func publicKey(kid string, key *rsa.PublicKey) map[string]any {
	return map[string]any{
		"kty": "RSA", "use": "sig", "alg": "RS256", "kid": kid,
		"n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()),
		"e": base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes()),
	}
}

// announce publishes the key that the next rotate signs with.
func (i *testIssuer) announce() testKey {
	i.mu.Lock()
	defer i.mu.Unlock()
	all := testKeys()
	key := testKey{fmt.Sprintf("38826b17-6a30-5f9b-b169-8beb8202f%03d", i.rotations), all[i.rotations%len(all)]}
	if len(i.keys) == 0 || i.keys[len(i.keys)-1].kid != key.kid {
		i.keys = append(i.keys, key)
	}
	return key
}

// rotate signs with a new key from now on. The old ones stay published.
func (i *testIssuer) rotate() {
	key := i.announce()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.signing = key
	i.rotations++
}

// revoke publishes nothing but the key that signs.
func (i *testIssuer) revoke() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = []testKey{i.signing}
}

// claims is what GitHub says of a push to main of acme/api.
func (i *testIssuer) claims() map[string]any {
	now := i.now().Unix()
	return map[string]any{
		"iss": i.URL, "aud": testAudience, "sub": "repo:acme/api:ref:refs/heads/main",
		"exp": now + 300, "iat": now, "nbf": now - 300, "jti": "0f0a3a9e-1f6c-4b8e-9a51-8d6bf0d1c111",
		"actor": "octocat", "actor_id": "583231", "base_ref": "", "check_run_id": "51234567890",
		"event_name": "push", "head_ref": "", "job_workflow_ref": "acme/api/.github/workflows/ci.yml@refs/heads/main",
		"job_workflow_sha": "1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b", "ref": "refs/heads/main", "ref_protected": "true",
		"ref_type": "branch", "repository": "acme/api", "repository_id": "812345678", "repository_owner": "acme",
		"repository_owner_id": "9919", "repository_visibility": "private", "run_attempt": "1", "run_id": "17123456789",
		"run_number": "42", "runner_environment": "github-hosted", "sha": "1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b",
		"workflow": "ci", "workflow_ref": "acme/api/.github/workflows/ci.yml@refs/heads/main",
		"workflow_sha": "1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b",
	}
}

// claimsWith is claims with some set to other values; nil removes one.
func (i *testIssuer) claimsWith(changes map[string]any) map[string]any {
	c := i.claims()
	maps.Copy(c, changes)
	maps.DeleteFunc(c, func(_ string, v any) bool { return v == nil })
	return c
}

// header is GitHub's, for the key that signs now.
func (i *testIssuer) header() map[string]any {
	i.mu.Lock()
	defer i.mu.Unlock()
	return map[string]any{"alg": "RS256", "kid": i.signing.kid, "typ": "JWT", "x5t": "ykNaY4qM_ta4k2TgZOCEYLkcYlA"}
}

// token signs claims as GitHub does.
func (i *testIssuer) token(t testing.TB, claims map[string]any) string {
	t.Helper()
	return i.sign(t, i.header(), jsonBytes(t, claims))
}

// sign makes an RS256 signature, whatever header and payload say.
func (i *testIssuer) sign(t testing.TB, header map[string]any, payload []byte) string {
	t.Helper()
	return i.signRaw(t, jsonBytes(t, header), payload)
}

func (i *testIssuer) signRaw(t testing.TB, header, payload []byte) string {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	input := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	sum := sha256.Sum256([]byte(input))
	signature, err := rsa.SignPKCS1v15(nil, i.signing.PrivateKey, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func jsonBytes(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
