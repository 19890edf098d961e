package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"kuberollouttrigger/internal/fake"
)

// newTestVerifier has the issuer's keys and no background.
func newTestVerifier(t testing.TB, issuer *testIssuer) *verifier {
	t.Helper()
	v := newVerifier(issuer.URL, testAudience, issuer.client(), slog.New(slog.DiscardHandler), issuer.now)
	if err := v.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	return v
}

func b64(data []byte) string { return base64.RawURLEncoding.EncodeToString(data) }

// TestVerifyRefuses: each token differs from a good one in one thing, and each
// reason belongs to the check that is meant to find it.
func TestVerifyRefuses(t *testing.T) {
	issuer := newTestIssuer(t)
	start := time.Now().Truncate(time.Second)
	issuer.now = func() time.Time { return start }
	v := newTestVerifier(t, issuer)
	w := newTestWebWith(t, issuer, v, "", &logBuffer{})
	now := issuer.now().Unix()
	good := issuer.token(t, issuer.claims())
	goodParts := strings.Split(good, ".")
	payload := jsonBytes(t, issuer.claims())
	headerJSON := string(jsonBytes(t, issuer.Header()))

	// What a case changes: the header, a claim, or the token as a whole.
	header := func(name string, value any) string { return issuer.tokenWithHeader(t, name, value) }
	rawHeader := func(members string) string {
		return issuer.signRaw(t, []byte(strings.TrimSuffix(headerJSON, "}")+","+members+"}"), payload)
	}
	claim := func(name string, value any) string {
		return issuer.token(t, issuer.claimsWith(map[string]any{name: value}))
	}
	null := json.RawMessage("null")
	rawPayload := func(p string) string { return issuer.sign(t, issuer.Header(), []byte(p)) }
	rawClaim := func(member string) string {
		return rawPayload(strings.TrimSuffix(string(payload), "}") + "," + member + "}")
	}
	times := func(exp, nbf, iat any) string {
		return issuer.token(t, issuer.claimsWith(map[string]any{"exp": exp, "nbf": nbf, "iat": iat}))
	}
	pubDER, err := x509.MarshalPKIXPublicKey(&issuer.signing.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	pubPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pubDER})
	input := func(alg string) string { // of the signature
		h := issuer.Header()
		h["alg"] = alg
		return b64(jsonBytes(t, h)) + "." + b64(payload)
	}
	signedBy := func(alg string, key crypto.Signer, opts crypto.SignerOpts) string {
		return input(alg) + "." + b64(signDigest(t, key, opts, input(alg)))
	}
	pss := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	hmacInput, mac := input("HS256"), hmac.New(sha256.New, pubPEM)
	mac.Write([]byte(hmacInput))
	// A payload whose base64url has both - and _, for the alphabet's sake.
	odd := issuer.token(t, issuer.claimsWith(map[string]any{"environment": "???>>>???>>>~~~", "x": "??>>", "xx": "?>?>?>~~"}))
	stdAlphabet := strings.NewReplacer("-", "+", "_", "/").Replace(odd)
	if stdAlphabet == odd {
		t.Fatal("the token has neither - nor _")
	}
	if _, err := v.verify(odd); err != nil {
		t.Fatal(err)
	}
	foreign, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	elliptical, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}

	type refused struct{ name, token, reason string }
	tests := []refused{
		{"empty", "", "token: 1 segments"},
		{"not a token", "ghp_0123456789abcdefghijklmnopqrstuvwxyzAB", "token: 1 segments"},
		{"over 8 KiB", issuer.token(t, issuer.claimsWith(map[string]any{"x": strings.Repeat("x", 7000)})), "token: "},
		{"exactly too long", strings.Repeat("a", maxTokenBytes+1), fmt.Sprintf("token: %d bytes", maxTokenBytes+1)},
		{"2 segments", goodParts[0] + "." + goodParts[1], "token: 2 segments"},
		{"4 segments", good + ".e30", "token: 4 segments"},
		{"JWE", good + "." + goodParts[1] + "." + goodParts[2], "token: 5 segments"},
		{"trailing dot", good + ".", "token: 4 segments"},
		{"leading dot", "." + good, "token: 4 segments"},
		{"JSON serialisation", `{"payload":"` + goodParts[1] + `","protected":"` + goodParts[0] + `","signature":"` + goodParts[2] + `"}`, "token: 1 segments"},
		{"JSON serialisation with dots", `{"payload":"` + goodParts[1] + `","x":"..","signature":"` + goodParts[2] + `"}`, "header: not base64url"},
		{"empty header", "." + goodParts[1] + "." + goodParts[2], "header: not a JSON object"},
		{"detached payload", goodParts[0] + ".." + goodParts[2], "signature: not made"},
		{"no signature", goodParts[0] + "." + goodParts[1] + ".", "signature: not made"},
		{"padding", good + "==", "token: not a signed JWT"},
		{"standard alphabet", stdAlphabet, "token: not a signed JWT"},
		{"LF in the header", goodParts[0][:9] + "\n" + goodParts[0][9:] + "." + goodParts[1] + "." + goodParts[2], "token: has a line break"},
		{"CR in the payload", goodParts[0] + "." + goodParts[1][:9] + "\r" + goodParts[1][9:] + "." + goodParts[2], "token: has a line break"},
		{"LF after the signature", good + "\n", "token: has a line break"},
		{"CRLF in the signature", goodParts[0] + "." + goodParts[1] + ".\r\n" + goodParts[2], "token: has a line break"},
		{"blank before", " " + good, "header: not base64url"},
		{"blank after", good + " ", "token: not a signed JWT"},
		{"tab in the payload", goodParts[0] + ".\t" + goodParts[1] + "." + goodParts[2], "token: not a signed JWT"},
		{"NUL", good + "\x00", "token: not a signed JWT"},
		{"a lone character", good + "A.", "token: 4 segments"},
		{"length of 1 modulo 4", goodParts[0] + "." + goodParts[1] + "." + goodParts[2] + "AAA", "token: not a signed JWT"},
		{"percent-encoded", strings.ReplaceAll(good, ".", "%2E"), "token: 1 segments"},
		{"header not UTF-8", issuer.signRaw(t, []byte("{\"alg\":\"RS256\",\"kid\":\"\xff\"}"), payload), "header: not UTF-8"},
		{"payload not UTF-8", rawClaim("\"x\":\"\xff\""), "payload: not UTF-8"},

		{"header is an array", issuer.signRaw(t, []byte(`["RS256"]`), payload), "header: not a JSON object"},
		{"header is null", issuer.signRaw(t, []byte(`null`), payload), "header: not a JSON object"},
		{"header is empty", issuer.signRaw(t, []byte(`{}`), payload), "header: alg is absent"},
		{"two headers", issuer.signRaw(t, []byte(headerJSON+headerJSON), payload), "header: more than one JSON object"},
		{"header cut off", issuer.signRaw(t, []byte(headerJSON[:len(headerJSON)-1]), payload), "header: not a JSON object"},
		{"alg none, unsigned", b64([]byte(`{"alg":"none","kid":"x"}`)) + "." + goodParts[1] + ".", "header: alg is none"},
		{"alg in another case", issuer.signRaw(t, []byte(strings.Replace(headerJSON, `"alg"`, `"Alg"`, 1)), payload), "header: alg is absent"},
		{"HS256 with the public key", hmacInput + "." + b64(mac.Sum(nil)), "header: alg is HS256"},
		{"RS384", signedBy("RS384", issuer.signing, crypto.SHA384), "header: alg is RS384"},
		{"RS512", signedBy("RS512", issuer.signing, crypto.SHA512), "header: alg is RS512"},
		{"RS384 said to be RS256", signedBy("RS256", issuer.signing, crypto.SHA384), "signature: not made with key"},
		{"PS256", signedBy("PS256", issuer.signing, pss), "header: alg is PS256"},
		{"PS256 said to be RS256", signedBy("RS256", issuer.signing, pss), "signature: not made with key"},
		{"ES256", signedBy("ES256", elliptical, crypto.SHA256), "header: alg is ES256"},
		{"ES256 said to be RS256", signedBy("RS256", elliptical, crypto.SHA256), "signature: not made with key"},
		{"signed by someone else", signedBy("RS256", foreign, crypto.SHA256), "signature: not made with key"},
		{"duplicate alg", rawHeader(`"alg":"RS256"`), "header: not a JSON object"},
		{"duplicate kid, escaped", rawHeader(`"k\u0069d":"x"`), "header: not a JSON object"},
		{"kid unknown", header("kid", "../../etc/passwd\n"), `header: kid ../../etc/passwd\n is none of the issuer's 1 keys`},
		{"kid of 256 bytes is looked up", header("kid", strings.Repeat("k", 256)), "is none of the issuer's 1 keys"},

		{"payload of another token", goodParts[0] + "." + b64([]byte(strings.Replace(string(payload), "acme", "evil", 1))) + "." + goodParts[2], "signature: not made with key"},
		{"short signature", goodParts[0] + "." + goodParts[1] + ".AAAA", "signature: not made with key"},
		{"signature with a zero byte before", goodParts[0] + "." + goodParts[1] + "." + b64(append([]byte{0}, unb64(t, goodParts[2])...)), "signature: not made with key"},
		{"signature of zeros", goodParts[0] + "." + goodParts[1] + "." + b64(make([]byte, 256)), "signature: not made with key"},

		{"payload is an array", rawPayload("[" + string(payload) + "]"), "payload: not a JSON object"},
		{"payload is null", rawPayload("null"), "payload: not a JSON object"},
		{"payload is a string", rawPayload(`"x"`), "payload: not a JSON object"},
		{"payload is a number", rawPayload(`1`), "payload: not a JSON object"},
		{"payload is empty", rawPayload(`{}`), "claim iss is absent"},
		{"payload is blank", rawPayload(" "), "payload: not a JSON object"},
		{"two payloads", rawPayload(string(payload) + string(payload)), "payload: more than one JSON object"},
		{"something after the payload", rawPayload(string(payload) + "x"), "payload: more than one JSON object"},
		{"payload with a BOM", rawPayload("\ufeff" + string(payload)), "payload: not a JSON object"},
		{"payload with a comment", rawClaim(`/**/"x":1`), "payload: not a JSON object"},
		{"control character in a string", rawClaim("\"x\":\"a\nb\""), "payload: not a JSON object"},
		{"duplicate claim", rawClaim(`"repository":"acme/api"`), "payload: not a JSON object"},
		{"duplicate claim, escaped", rawClaim(`"rep\u006fsitory":"evil/api"`), "payload: not a JSON object"},

		{"a runner's own credential", issuer.token(t, issuer.claimsWith(map[string]any{"aud": nil, "sub": nil, "exp": now + 6*3600})), "claim aud is "},

		{"exp of 12 digits", times(100000000000, now, 99999999999), "claim exp is "},
		{"everything in 10 years", times(now+315360300, now, now+315360000), "claim iat: "},
		{"expired", times(now-60, now-660, now-360), "claim exp: expired "},
		{"expired long ago", times(now-86400, now-87000, now-86700), "claim exp: expired 24h0m0s ago"},
		{"iat later than exp", times(now+100, now, now+101), "claim exp is -1s after iat"},
		{"iat is exp", times(now+100, now, now+100), "claim exp is 0s after iat"},
		{"iat in the future", times(now+400, now, now+120), "claim iat: "},
		{"nbf in the future", times(now+400, now+120, now), "claim nbf: not valid for another "},
		{"nbf after exp", times(now+50, now+51, now), "claim nbf is 1s after exp"},

		{"owner empty", issuer.token(t, issuer.claimsWith(map[string]any{"repository_owner": "", "repository": "/api"})), "claim repository_owner is empty"},
		{"owner in another member", issuer.token(t, issuer.claimsWith(map[string]any{"repository_owner": nil, "Repository_Owner": "acme"})), "claim repository_owner is absent"},
	}
	for name, values := range map[string][]any{
		"alg": {nil, null, "", "none", "None", "rs256", "RS256 ", []string{"RS256"}},
		"typ": {null, "", "at+jwt", "application/jwt", 1, []string{"JWT"}},
		"kid": {nil, null, "", 7, strings.Repeat("k", 257), strings.Repeat("k", 1024)},
	} {
		for _, value := range values {
			tests = append(tests, refused{fmt.Sprintf("%s %.20v", name, value), header(name, value), "header: " + name + " is "})
		}
	}
	for _, name := range []string{"jwk", "jku", "x5u", "x5c", "crit", "b64", "zip", "enc", "cty"} {
		for _, value := range []any{null, false, "https://evil.example/jwks", []string{}, []string{"MIIB"}, fake.PublicKey("mine", &foreign.PublicKey)} {
			tests = append(tests, refused{fmt.Sprintf("%s %.20v", name, value), header(name, value), "header: member " + name + " is not allowed"})
		}
	}
	number := func(s string) json.RawMessage { return json.RawMessage(s) }
	for name, values := range map[string][]any{
		"iss": {nil, null, "", issuer.URL + "/", strings.Replace(issuer.URL, "https", "http", 1), strings.ToUpper(issuer.URL), issuer.URL + "/acme", strings.Repeat("\u20ac", 700), []string{issuer.URL}},
		"aud": {nil, null, "", "https://github.com/acme", testAudience[:len(testAudience)-1], testAudience + ".evil.example", testAudience + "/", strings.ToUpper(testAudience),
			[]string{}, []string{testAudience, "https://github.com/acme"}, []string{"https://github.com/acme", testAudience}, []string{testAudience, testAudience},
			[]string{"https://github.com/acme"}, []int{1}, [][]string{{testAudience}}, map[string]any{"aud": testAudience}},
		"exp": {nil, null, fmt.Sprint(now + 300), number(fmt.Sprint(now+300, ".5")), number(fmt.Sprintf("%d.0", now+300)), number("17e8"), 0, -1,
			number("99999999999999999999"), []int64{now + 300}, true, now + 10*365*86400, now + 901},
		"iat":                 {nil, null, fmt.Sprint(now), number(fmt.Sprintf("%d.5", now))},
		"nbf":                 {nil, null, "0"},
		"sub":                 {nil, null, ""},
		"repository":          {nil, null, "evil/api", "acme-evil/api", "ACME/api", "acme/", "api", "acme", "acme/api/x"},
		"repository_owner":    {nil, null, 1},
		"repository_id":       {nil, null, "", 812345678},
		"repository_owner_id": {nil, null, "", 9919},
	} {
		for _, value := range values {
			tests = append(tests, refused{fmt.Sprintf("%s %.20v", name, value), claim(name, value), "claim " + name + " is "})
		}
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c, err := v.verify(test.token)
			if err == nil {
				t.Fatalf("accepted with %v", c)
			}
			if c != nil {
				t.Errorf("claims %v beside the error", c)
			}
			if errors.Is(err, errNoKeys) {
				t.Errorf("%v is errNoKeys", err)
			}
			if !strings.Contains(err.Error(), test.reason) {
				t.Errorf("refused by another check: %v; expected %q", err, test.reason)
			}
			if len(err.Error()) > 500 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("%q is not fit for a log", err)
			}
			for segment := range strings.SplitSeq(test.token, ".") {
				if len(segment) >= 12 && strings.Contains(err.Error(), segment[:12]) {
					t.Errorf("%q repeats a part of the token", err)
				}
			}
			// Through the front door. Not over a connection, because no client
			// sends some of these.
			r := httptest.NewRequest(http.MethodPost, "/event", strings.NewReader(`{"image":"ghcr.io/acme/api:dev"}`))
			r.Header["Authorization"] = []string{"Bearer " + test.token}
			r.Header["Content-Type"] = []string{"application/json"}
			answer := httptest.NewRecorder()
			w.handler.ServeHTTP(answer, r)
			w.expect(test.name, answer.Result(), http.StatusUnauthorized, "access denied\n")
		})
	}
	w.expect("a good one", w.send(http.MethodPost, "/event", http.Header{"Authorization": {"Bearer " + good}, "Content-Type": {"application/json"}},
		`{"image":"ghcr.io/acme/api:dev"}`), http.StatusAccepted, "ghcr.io/acme/api:dev")
	if n := issuer.jwksFetches.Load(); n != 1 {
		t.Errorf("verify fetched the keys: %d fetches", n)
	}
}

func TestVerifyAccepts(t *testing.T) {
	issuer := newTestIssuer(t)
	v := newTestVerifier(t, issuer)
	now := issuer.now().Unix()
	payload := jsonBytes(t, issuer.claims())
	header := func(name string, value any) string { return issuer.tokenWithHeader(t, name, value) }
	with := func(changes map[string]any) string { return issuer.token(t, issuer.claimsWith(changes)) }
	plain := []byte(`{"alg":"RS256","kid":"` + issuer.signing.kid + `"}`)
	for len(plain)%3 != 1 { // so that the last character has bits to spare
		plain = append(plain, ' ')
	}
	good := issuer.signRaw(t, plain, payload)
	goodHeader, _, _ := strings.Cut(good, ".")
	long := with(map[string]any{"x": ""})
	long = with(map[string]any{"x": strings.Repeat("x", (maxTokenBytes-len(long))*3/4)})
	if len(long) < maxTokenBytes-2 || len(long) > maxTokenBytes {
		t.Fatalf("%d bytes, meant to be almost %d", len(long), maxTokenBytes)
	}

	for _, test := range []struct {
		name, token string
		want        map[string]string // claims; "-" for none
	}{
		{"GitHub's", issuer.token(t, issuer.claims()), map[string]string{"iss": issuer.URL, "sub": "repo:acme/api:ref:refs/heads/main", "event_name": "push", "repository_id": "812345678", "base_ref": "", "aud": "-", "exp": "-", "nbf": "-", "iat": "-"}},
		{"almost 8 KiB", long, nil},
		{"no typ", header("typ", nil), nil},
		{"typ jwt", header("typ", "jwt"), nil},
		{"no x5t", header("x5t", nil), nil},
		{"x5t#S256", header("x5t#S256", "x"), nil},
		{"unknown members", issuer.signRaw(t, []byte(`{"alg":"RS256","Alg":"none","iss":"x","x5t":1,"new":{"a":[1]},"kid":"`+issuer.signing.kid+`"}`), payload), nil},
		{"trailing bits of the signature", flipLastBit(good), nil}, // the same signature, written in another way
		{"trailing bits of the header", flipLastBit(goodHeader) + strings.TrimPrefix(good, goodHeader), nil},
		{"header with blanks", issuer.signRaw(t, []byte(" {\"kid\" : \""+issuer.signing.kid+"\" ,\n\"alg\":\"RS256\" } "), payload), nil},
		{"header escaped", issuer.signRaw(t, []byte(`{"kid":"`+issuer.signing.kid+`","a\u006cg":"RS\u003256"}`), payload), nil},
		{"payload with blanks", issuer.sign(t, issuer.Header(), []byte(strings.NewReplacer(`":`, "\" : ", `,"`, " ,\n\t\"").Replace(string(payload))+"\n")), map[string]string{"repository": "acme/api"}},
		{"aud in a list", with(map[string]any{"aud": []string{testAudience}}), map[string]string{"aud": "-"}},
		{"Repository_Owner beside the claim", with(map[string]any{"Repository_Owner": "evil"}), map[string]string{"repository_owner": "acme", "Repository_Owner": "evil"}},
		{"claims that are no strings", with(map[string]any{"environment": 1, "event_name": true, "ref": json.RawMessage("null"), "list": []any{"a"}, "object": map[string]any{"ref": "x"}}), map[string]string{"environment": "-", "event_name": "-", "ref": "-", "list": "-", "object": "-"}},
		{"escapes", with(map[string]any{"environment": json.RawMessage(`"pr\u006fd \"\\ \ud83d\ude00"`)}), map[string]string{"environment": "prod \"\\ \U0001f600"}},
		{"brackets in a string", with(map[string]any{"environment": strings.Repeat("[{", 50)}), map[string]string{"environment": strings.Repeat("[{", 50)}},
		{"lists nested deeply", with(map[string]any{"x": json.RawMessage(strings.Repeat("[", 2000) + strings.Repeat("]", 2000))}), map[string]string{"x": "-"}},
		{"objects nested deeply", with(map[string]any{"x": json.RawMessage(strings.Repeat(`{"x":`, 600) + "1" + strings.Repeat("}", 600))}), map[string]string{"x": "-"}},
		{"header nested deeply", header("x", json.RawMessage(strings.Repeat("[", 2000)+strings.Repeat("]", 2000))), nil},
		{"owner of another policy", with(map[string]any{"repository_owner": "Evil", "repository": "Evil/x"}), map[string]string{"repository": "Evil/x"}},
		{"sub with ids", with(map[string]any{"sub": "repo:acme@9919/api@812345678:environment:production"}), nil},
		{"exp 15 minutes after iat", with(map[string]any{"exp": now + 900}), nil},
		{"expired within the leeway", with(map[string]any{"exp": now - 50, "iat": now - 350}), nil},
		{"nbf and iat within the leeway", with(map[string]any{"exp": now + 350, "nbf": now + 50, "iat": now + 50}), nil},
		{"nbf long ago", with(map[string]any{"nbf": 1}), nil},
		{"nbf is exp", with(map[string]any{"exp": now + 30, "nbf": now + 30}), nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := v.verify(test.token)
			if err != nil {
				t.Fatal(err)
			}
			for name, want := range test.want {
				if got, ok := c[name]; ok != (want != "-") || ok && got != want {
					t.Errorf("%s is %q, %t; expected %q", name, got, ok, want)
				}
			}
		})
	}
}

// TestVerifyTimes walks the clock over the bounds of one token.
func TestVerifyTimes(t *testing.T) {
	issuer := newTestIssuer(t)
	v := newTestVerifier(t, issuer)
	start := time.Unix(issuer.now().Unix(), 0)
	token := issuer.token(t, issuer.claimsWith(map[string]any{"iat": start.Unix(), "nbf": start.Unix(), "exp": start.Unix() + 300}))
	for _, test := range []struct {
		after time.Duration
		want  string
	}{
		{-61 * time.Second, "claim nbf: not valid for another 1m1s"},
		{-60 * time.Second, ""},
		{359 * time.Second, ""},
		{360*time.Second - 1, ""},
		{360 * time.Second, "claim exp: expired 1m0s ago"},
	} {
		v.now = func() time.Time { return start.Add(test.after) }
		_, err := v.verify(token)
		if got := fmt.Sprint(err); test.want == "" && err != nil || test.want != "" && got != test.want {
			t.Errorf("after %s: %v, expected %q", test.after, err, test.want)
		}
	}
}

// flipLastBit changes a bit of the last character that encodes nothing.
func flipLastBit(segment string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(segment) - 1
	return segment[:last] + string(alphabet[strings.IndexByte(alphabet, segment[last])^1])
}

// signDigest signs with RSASSA-PKCS1-v1_5, RSASSA-PSS or ECDSA, as key and opts say.
func signDigest(t *testing.T, key crypto.Signer, opts crypto.SignerOpts, input string) []byte {
	h := opts.HashFunc().New()
	h.Write([]byte(input))
	s, err := key.Sign(rand.Reader, h.Sum(nil), opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func unb64(t *testing.T, s string) []byte {
	data, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
