package fake

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Issuer plays GitHub's OIDC issuer: discovery and JWKS over TLS, tokens with any
// header and payload, and the token endpoint of a runner.
// https://docs.github.com/actions/concepts/security/openid-connect
type Issuer struct {
	URL        string // the claim iss
	Audience   string // of Claims
	Repository string // of Claims, acme/api

	DiscoveryFetches, JWKSFetches atomic.Int64
	Down, Hang                    atomic.Bool // answers 503; never answers
	// Discovery and JWKS, when set, answer in place of the true documents.
	Discovery, JWKS atomic.Pointer[http.HandlerFunc]

	server, runner *httptest.Server
	mu             sync.Mutex
	published      []signingKey
	signing        signingKey
	rotations      int
}

type signingKey struct {
	id string
	*rsa.PrivateKey
}

// RSAKey returns one of two keys, which issuers use in turn. They are made once,
// as that is what costs time.
func RSAKey(n int) *rsa.PrivateKey { return rsaKeys[n%len(rsaKeys)]() }

var rsaKeys = [2]func() *rsa.PrivateKey{sync.OnceValue(newRSAKey), sync.OnceValue(newRSAKey)}

func newRSAKey() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
}

// NewIssuer serves on loopback until Close, with the certificate if one is given.
func NewIssuer(certificate ...tls.Certificate) *Issuer {
	i := &Issuer{Repository: "acme/api"}
	i.Rotate()
	i.server = httptest.NewUnstartedServer(i)
	i.server.TLS = &tls.Config{Certificates: certificate}
	i.server.Config.ErrorLog = log.New(io.Discard, "", 0) // some clients do not trust the certificate
	i.server.StartTLS()
	i.URL = i.server.URL
	return i
}

// Close stops serving.
func (i *Issuer) Close() {
	if i.runner != nil {
		i.runner.Close()
	}
	i.server.Close()
}

// Client trusts the issuer's certificate and no other.
func (i *Issuer) Client() *http.Client { return i.server.Client() }

// Offline reaches the issuer without a network, as a synctest bubble needs it.
func (i *Issuer) Offline() *http.Client { return &http.Client{Transport: offline{i}} }

type offline struct{ issuer *Issuer }

func (o offline) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	o.issuer.ServeHTTP(rec, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return rec.Result(), nil
}

func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var override *http.HandlerFunc
	var document any
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		i.DiscoveryFetches.Add(1)
		override = i.Discovery.Load()
		document = map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/.well-known/jwks", "id_token_signing_alg_values_supported": []string{"RS256"}}
	case "/.well-known/jwks":
		i.JWKSFetches.Add(1)
		override = i.JWKS.Load()
		document = i.publicKeys()
	default:
		http.NotFound(w, r)
		return
	}
	switch {
	case i.Hang.Load():
		<-r.Context().Done()
	case i.Down.Load():
		http.Error(w, "down", http.StatusServiceUnavailable)
	case override != nil:
		(*override)(w, r)
	default:
		writeJSON(w, http.StatusOK, document)
	}
}

func (i *Issuer) publicKeys() map[string]any {
	i.mu.Lock()
	defer i.mu.Unlock()
	keys := []any{}
	for _, key := range i.published {
		keys = append(keys, PublicKey(key.id, &key.PublicKey))
	}
	return map[string]any{"keys": keys}
}

// PublicKey returns a key as a JWKS has it.
func PublicKey(id string, key *rsa.PublicKey) map[string]any {
	return map[string]any{
		"kty": "RSA", "use": "sig", "alg": "RS256", "kid": id,
		"n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()),
		"e": base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes()),
	}
}

// Announce publishes the key that the next Rotate signs with, and returns its id.
func (i *Issuer) Announce() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.announce().id
}

func (i *Issuer) announce() signingKey {
	key := signingKey{fmt.Sprintf("38826b17-6a30-5f9b-b169-8beb8202f%03d", i.rotations), RSAKey(i.rotations)}
	if len(i.published) == 0 || i.published[len(i.published)-1].id != key.id {
		i.published = append(i.published, key)
	}
	return key
}

// Rotate signs with a new key from now on. The old ones stay published.
func (i *Issuer) Rotate() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.signing = i.announce()
	i.rotations++
}

// Revoke publishes nothing but the key that signs.
func (i *Issuer) Revoke() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.published = []signingKey{i.signing}
}

// Key returns the key that signs now, and its id.
func (i *Issuer) Key() (id string, key *rsa.PrivateKey) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.signing.id, i.signing.PrivateKey
}

// Claims is what GitHub says at that time of a push to main of Repository. Changes
// set claims to other values; nil removes one.
func (i *Issuer) Claims(at time.Time, changes map[string]any) map[string]any {
	const sha = "1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b1f3c9a7b"
	owner, _, _ := strings.Cut(i.Repository, "/")
	workflow := i.Repository + "/.github/workflows/ci.yml@refs/heads/main"
	claims := map[string]any{
		"iss": i.URL, "aud": i.Audience, "sub": "repo:" + i.Repository + ":ref:refs/heads/main",
		"exp": at.Unix() + 300, "iat": at.Unix(), "nbf": at.Unix() - 300, "jti": rand.Text(),
		"actor": "octocat", "actor_id": "583231", "base_ref": "", "check_run_id": "51234567890",
		"event_name": "push", "head_ref": "", "job_workflow_ref": workflow, "job_workflow_sha": sha,
		"ref": "refs/heads/main", "ref_protected": "true", "ref_type": "branch",
		"repository": i.Repository, "repository_id": "812345678", "repository_owner": owner,
		"repository_owner_id": "9919", "repository_visibility": "private", "run_attempt": "1", "run_id": "17123456789",
		"run_number": "42", "runner_environment": "github-hosted", "sha": sha,
		"workflow": "ci", "workflow_ref": workflow, "workflow_sha": sha,
	}
	maps.Copy(claims, changes)
	maps.DeleteFunc(claims, func(_ string, v any) bool { return v == nil })
	return claims
}

// Header is GitHub's, for the key that signs now.
func (i *Issuer) Header() map[string]any {
	id, _ := i.Key()
	return map[string]any{"alg": "RS256", "kid": id, "typ": "JWT", "x5t": "ykNaY4qM_ta4k2TgZOCEYLkcYlA"}
}

// Token signs claims as GitHub does.
func (i *Issuer) Token(claims map[string]any) string {
	_, key := i.Key()
	return Sign(key, mustJSON(i.Header()), mustJSON(claims))
}

// Sign makes an RS256 signature, whatever header and payload say.
func Sign(key *rsa.PrivateKey, header, payload []byte) string {
	input := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	sum := sha256.Sum256([]byte(input))
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
	if err != nil {
		panic(err)
	}
	return input + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func mustJSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

// ServeRunner serves a runner's token endpoint over plain HTTP. It returns what a
// job finds in ACTIONS_ID_TOKEN_REQUEST_URL and ACTIONS_ID_TOKEN_REQUEST_TOKEN.
func (i *Issuer) ServeRunner() (requestURL, requestToken string) {
	requestToken = rand.Text()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /token", func(w http.ResponseWriter, r *http.Request) {
		if !strings.EqualFold(r.Header.Get("Authorization"), "bearer "+requestToken) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		owner, _, _ := strings.Cut(i.Repository, "/")
		audience := r.URL.Query().Get("audience")
		if audience == "" {
			audience = "https://github.com/" + owner
		}
		token := i.Token(i.Claims(time.Now(), map[string]any{"aud": audience}))
		writeJSON(w, http.StatusOK, map[string]any{"count": len(token), "value": token})
	})
	i.runner = httptest.NewServer(mux)
	return i.runner.URL + "/token?api-version=2.0", requestToken
}
