package main

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"kuberollouttrigger/internal/fake"
)

const testAudience = "https://kuberollouttrigger.example"

// testIssuer is a fake issuer with a clock.
type testIssuer struct {
	*fake.Issuer
	now func() time.Time // when tokens are minted
}

func newTestIssuer(t testing.TB) *testIssuer {
	t.Helper()
	i := fake.NewIssuer()
	t.Cleanup(i.Close)
	i.Audience = testAudience
	return &testIssuer{i, time.Now}
}

func (i *testIssuer) claimsWith(changes map[string]any) map[string]any {
	return i.Claims(i.now(), changes)
}

// with is a token with changed claims; nil removes one.
func (i *testIssuer) with(changes map[string]any) string { return i.Token(i.claimsWith(changes)) }

// withHeader is a token with a changed member of the header; nil removes it.
func (i *testIssuer) withHeader(name string, value any) string {
	h := i.Header()
	if h[name] = value; value == nil {
		delete(h, name)
	}
	return i.sign(string(jsonBytes(h)), string(jsonBytes(i.claimsWith(nil))))
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
