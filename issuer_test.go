package main

import (
	"encoding/json"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"kuberollouttrigger/internal/fake"
)

const testAudience = "https://kuberollouttrigger.example"

// testIssuer is a fake issuer with a clock.
type testIssuer struct {
	*fake.Issuer
	now         func() time.Time // when tokens are minted
	jwksFetches *atomic.Int64
	down        *atomic.Bool
}

func newTestIssuer(t testing.TB) *testIssuer {
	t.Helper()
	i := fake.NewIssuer()
	t.Cleanup(i.Close)
	i.Audience = testAudience
	return &testIssuer{i, time.Now, &i.JWKSFetches, &i.Down}
}

func (i *testIssuer) client() *http.Client  { return i.Client() }
func (i *testIssuer) offline() *http.Client { return i.Offline() }

func (i *testIssuer) claims() map[string]any { return i.claimsWith(nil) }

func (i *testIssuer) claimsWith(changes map[string]any) map[string]any {
	return i.Claims(i.now(), changes)
}

func (i *testIssuer) token(_ testing.TB, claims map[string]any) string { return i.Token(claims) }

// with is a token with changed claims; nil removes one.
func (i *testIssuer) with(changes map[string]any) string { return i.Token(i.claimsWith(changes)) }

// withHeader is a token with a changed member of the header; nil removes it.
func (i *testIssuer) withHeader(name string, value any) string {
	h := i.Header()
	if h[name] = value; value == nil {
		delete(h, name)
	}
	return i.sign(string(jsonBytes(h)), string(jsonBytes(i.claims())))
}

func (i *testIssuer) sign(header, payload string) string {
	_, key := i.Key()
	return fake.Sign(key, []byte(header), []byte(payload))
}

func jsonBytes(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
