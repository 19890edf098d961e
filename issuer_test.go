package main

import (
	"crypto/rsa"
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
	now                           func() time.Time // when tokens are minted
	discoveryFetches, jwksFetches *atomic.Int64
	down, hang                    *atomic.Bool
	discovery, jwks               *atomic.Pointer[http.HandlerFunc]
	signing                       struct {
		kid string
		*rsa.PrivateKey
	}
}

func newTestIssuer(t testing.TB) *testIssuer {
	t.Helper()
	i := fake.NewIssuer()
	t.Cleanup(i.Close)
	i.Audience = testAudience
	test := &testIssuer{Issuer: i, now: time.Now, discoveryFetches: &i.DiscoveryFetches, jwksFetches: &i.JWKSFetches,
		down: &i.Down, hang: &i.Hang, discovery: &i.Discovery, jwks: &i.JWKS}
	test.signing.kid, test.signing.PrivateKey = i.Key()
	return test
}

func (i *testIssuer) client() *http.Client  { return i.Client() }
func (i *testIssuer) offline() *http.Client { return i.Offline() }

func (i *testIssuer) rotate() {
	i.Rotate()
	i.signing.kid, i.signing.PrivateKey = i.Key()
}

func (i *testIssuer) claims() map[string]any { return i.Claims(i.now(), nil) }

func (i *testIssuer) claimsWith(changes map[string]any) map[string]any {
	return i.Claims(i.now(), changes)
}

func (i *testIssuer) token(_ testing.TB, claims map[string]any) string { return i.Token(claims) }

func (i *testIssuer) sign(t testing.TB, header map[string]any, payload []byte) string {
	return i.signRaw(t, jsonBytes(t, header), payload)
}

// tokenWithHeader changes a member of the header; nil removes it.
func (i *testIssuer) tokenWithHeader(t testing.TB, name string, value any) string {
	h := i.Header()
	if h[name] = value; value == nil {
		delete(h, name)
	}
	return i.sign(t, h, jsonBytes(t, i.claims()))
}

func (i *testIssuer) signRaw(_ testing.TB, header, payload []byte) string {
	return fake.Sign(i.signing.PrivateKey, header, payload)
}

func jsonBytes(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
