package main

import (
	"bytes"
	"context"
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
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
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
	headerJSON := string(jsonBytes(t, issuer.header()))

	// What a case changes: the header, a claim, or the token as a whole.
	header := func(name string, value any) string {
		h := issuer.header()
		if h[name] = value; value == nil {
			delete(h, name)
		}
		return issuer.sign(t, h, payload)
	}
	rawHeader := func(members string) string {
		return issuer.signRaw(t, []byte(strings.TrimSuffix(headerJSON, "}")+","+members+"}"), payload)
	}
	claim := func(name string, value any) string {
		return issuer.token(t, issuer.claimsWith(map[string]any{name: value}))
	}
	null := json.RawMessage("null")
	rawPayload := func(p string) string { return issuer.sign(t, issuer.header(), []byte(p)) }
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
	signedBy := func(alg string, sign func(input string) []byte) string {
		h := issuer.header()
		h["alg"] = alg
		input := b64(jsonBytes(t, h)) + "." + b64(payload)
		return input + "." + b64(sign(input))
	}
	flipLast := func(segment string) string {
		// The last character of a 256 byte signature holds 2 bits of nothing.
		const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		last := strings.IndexByte(alphabet, segment[len(segment)-1])
		return segment[:len(segment)-1] + string(alphabet[last^1])
	}
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
	jwk := publicKey("mine", &foreign.PublicKey)

	for _, test := range []struct{ name, token, reason string }{
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
		{"JSON serialisation with dots", `{"payload":"` + goodParts[1] + `","x":"..","signature":"` + goodParts[2] + `"}`, "header: not strict base64url"},
		{"empty header", "." + goodParts[1] + "." + goodParts[2], "header: empty"},
		{"detached payload", goodParts[0] + ".." + goodParts[2], "payload: empty"},
		{"no signature", goodParts[0] + "." + goodParts[1] + ".", "signature: empty"},
		{"padding", good + "==", "signature: not strict base64url"},
		{"standard alphabet", stdAlphabet, "not strict base64url"},
		{"LF in the header", goodParts[0][:9] + "\n" + goodParts[0][9:] + "." + goodParts[1] + "." + goodParts[2], "header: not strict base64url"},
		{"CR in the payload", goodParts[0] + "." + goodParts[1][:9] + "\r" + goodParts[1][9:] + "." + goodParts[2], "payload: not strict base64url"},
		{"LF after the signature", good + "\n", "signature: not strict base64url"},
		{"CRLF in the signature", goodParts[0] + "." + goodParts[1] + ".\r\n" + goodParts[2], "signature: not strict base64url"},
		{"blank before", " " + good, "header: not strict base64url"},
		{"blank after", good + " ", "signature: not strict base64url"},
		{"tab in the payload", goodParts[0] + ".\t" + goodParts[1] + "." + goodParts[2], "payload: not strict base64url"},
		{"NUL", good + "\x00", "signature: not strict base64url"},
		{"trailing bits of the signature", goodParts[0] + "." + goodParts[1] + "." + flipLast(goodParts[2]), "signature: not strict base64url"},
		{"a lone character", good + "A.", "token: 4 segments"},
		{"length of 1 modulo 4", goodParts[0] + "." + goodParts[1] + "." + goodParts[2] + "AAA", "signature: not strict base64url"},
		{"percent-encoded", strings.ReplaceAll(good, ".", "%2E"), "token: 1 segments"},
		{"header not UTF-8", issuer.signRaw(t, []byte("{\"alg\":\"RS256\",\"kid\":\"\xff\"}"), payload), "header: not UTF-8"},
		{"payload not UTF-8", rawClaim("\"x\":\"\xff\""), "payload: not UTF-8"},

		{"header is an array", issuer.signRaw(t, []byte(`["RS256"]`), payload), "header: not one JSON object"},
		{"header is null", issuer.signRaw(t, []byte(`null`), payload), "header: alg or kid is missing"},
		{"header is empty", issuer.signRaw(t, []byte(`{}`), payload), "header: alg or kid is missing"},
		{"two headers", issuer.signRaw(t, []byte(headerJSON+headerJSON), payload), "header: not one JSON object"},
		{"header cut off", issuer.signRaw(t, []byte(headerJSON[:len(headerJSON)-1]), payload), "header: not one JSON object"},
		{"alg none, signed", header("alg", "none"), `header: alg is "none"`},
		{"alg none, unsigned", b64([]byte(`{"alg":"none","kid":"x"}`)) + "." + goodParts[1] + ".", "signature: empty"},
		{"alg None", header("alg", "None"), `header: alg is "None"`},
		{"alg rs256", header("alg", "rs256"), `header: alg is "rs256"`},
		{"alg with a blank", header("alg", "RS256 "), `header: alg is "RS256 "`},
		{"alg empty", header("alg", ""), `header: alg is ""`},
		{"alg missing", header("alg", nil), "header: alg or kid is missing"},
		{"alg null", header("alg", null), `header: "alg" is not a string`},
		{"alg array", header("alg", []string{"RS256"}), `header: "alg" is not a string`},
		{"alg in another case", issuer.signRaw(t, []byte(strings.Replace(headerJSON, `"alg"`, `"Alg"`, 1)), payload), `header: member "Alg" is not allowed`},
		{"HS256 with the public key", signedBy("HS256", func(input string) []byte {
			mac := hmac.New(sha256.New, pubPEM)
			mac.Write([]byte(input))
			return mac.Sum(nil)
		}), `header: alg is "HS256"`},
		{"RS384", signedBy("RS384", func(input string) []byte { return signRSA(t, issuer, crypto.SHA384, input) }), `header: alg is "RS384"`},
		{"RS512", signedBy("RS512", func(input string) []byte { return signRSA(t, issuer, crypto.SHA512, input) }), `header: alg is "RS512"`},
		{"RS384 said to be RS256", signedBy("RS256", func(input string) []byte { return signRSA(t, issuer, crypto.SHA384, input) }), "signature: not made with key"},
		{"PS256", signedBy("PS256", func(input string) []byte { return signPSS(t, issuer, input) }), `header: alg is "PS256"`},
		{"PS256 said to be RS256", signedBy("RS256", func(input string) []byte { return signPSS(t, issuer, input) }), "signature: not made with key"},
		{"ES256", signedBy("ES256", func(input string) []byte {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256([]byte(input))
			r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
			if err != nil {
				t.Fatal(err)
			}
			return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		}), `header: alg is "ES256"`},
		{"jwk", header("jwk", jwk), `header: "jwk" is not a string`},
		{"jwk as a string", header("jwk", "x"), `header: member "jwk" is not allowed`},
		{"jku", header("jku", "https://evil.example/jwks"), `header: member "jku" is not allowed`},
		{"x5u", header("x5u", "https://evil.example/cert"), `header: member "x5u" is not allowed`},
		{"x5c", header("x5c", []string{"MIIB"}), `header: "x5c" is not a string`},
		{"x5t#S256", header("x5t#S256", "x"), `header: member "x5t#S256" is not allowed`},
		{"cty", header("cty", "JWT"), `header: member "cty" is not allowed`},
		{"zip", header("zip", "DEF"), `header: member "zip" is not allowed`},
		{"nonce", header("nonce", "x"), `header: member "nonce" is not allowed`},
		{"iss in the header", header("iss", issuer.URL), `header: member "iss" is not allowed`},
		{"crit unknown", rawHeader(`"crit":["exp"]`), `header: "crit" is not a string`},
		{"crit empty", rawHeader(`"crit":[]`), `header: "crit" is not a string`},
		{"b64 false", rawHeader(`"b64":false`), `header: "b64" is not a string`},
		{"duplicate alg", rawHeader(`"alg":"RS256"`), "header: not one JSON object"},
		{"duplicate kid, escaped", rawHeader(`"k\u0069d":"x"`), "header: not one JSON object"},
		{"typ at+jwt", header("typ", "at+jwt"), `header: typ is "at+jwt"`},
		{"typ application/jwt", header("typ", "application/jwt"), `header: typ is "application/jwt"`},
		{"typ empty", header("typ", ""), `header: typ is ""`},
		{"typ number", header("typ", 1), `header: "typ" is not a string`},
		{"x5t number", header("x5t", 1), `header: "x5t" is not a string`},
		{"kid missing", header("kid", nil), "header: alg or kid is missing"},
		{"kid empty", header("kid", ""), "header: kid of 0 bytes"},
		{"kid number", header("kid", 7), `header: "kid" is not a string`},
		{"kid null", header("kid", null), `header: "kid" is not a string`},
		{"kid of 257 bytes", header("kid", strings.Repeat("k", 257)), "header: kid of 257 bytes"},
		{"kid of 1 kB", header("kid", strings.Repeat("k", 1024)), "header: kid of 1024 bytes"},
		{"kid unknown", header("kid", "../../etc/passwd\n"), `header: kid "../../etc/passwd\n" is none of the issuer's 1 keys`},
		{"kid of 256 bytes is looked up", header("kid", strings.Repeat("k", 256)), "is none of the issuer's 1 keys"},

		{"signed by someone else", func() string {
			input := goodParts[0] + "." + goodParts[1]
			sum := sha256.Sum256([]byte(input))
			s, err := rsa.SignPKCS1v15(nil, foreign, crypto.SHA256, sum[:])
			if err != nil {
				t.Fatal(err)
			}
			return input + "." + b64(s)
		}(), "signature: not made with key"},
		{"payload of another token", goodParts[0] + "." + b64([]byte(strings.Replace(string(payload), "acme", "evil", 1))) + "." + goodParts[2], "signature: not made with key"},
		{"short signature", goodParts[0] + "." + goodParts[1] + ".AAAA", "signature: not made with key"},
		{"signature with a zero byte before", goodParts[0] + "." + goodParts[1] + "." + b64(append([]byte{0}, unb64(t, goodParts[2])...)), "signature: not made with key"},
		{"signature of zeros", goodParts[0] + "." + goodParts[1] + "." + b64(make([]byte, 256)), "signature: not made with key"},

		{"payload is an array", rawPayload("[" + string(payload) + "]"), "payload: not one JSON object"},
		{"payload is null", rawPayload("null"), "payload: not one JSON object: null"},
		{"payload is a string", rawPayload(`"x"`), "payload: not one JSON object"},
		{"payload is a number", rawPayload(`1`), "payload: not one JSON object"},
		{"payload is empty", rawPayload(`{}`), "claim iss: absent"},
		{"payload is blank", rawPayload(" "), "payload: not one JSON object"},
		{"two payloads", rawPayload(string(payload) + string(payload)), "payload: not one JSON object"},
		{"something after the payload", rawPayload(string(payload) + "x"), "payload: not one JSON object"},
		{"payload with a BOM", rawPayload("\ufeff" + string(payload)), "payload: not one JSON object"},
		{"payload with a comment", rawClaim(`/**/"x":1`), "payload: not one JSON object"},
		{"control character in a string", rawClaim("\"x\":\"a\nb\""), "payload: not one JSON object"},
		{"duplicate claim", rawClaim(`"repository":"acme/api"`), "payload: not one JSON object"},
		{"duplicate claim, escaped", rawClaim(`"rep\u006fsitory":"evil/api"`), "payload: not one JSON object"},
		{"nested deeply", rawClaim(`"x":` + strings.Repeat("[", 1000) + strings.Repeat("]", 1000)), `claim "x": too many arrays and objects`},
		{"objects nested deeply", rawClaim(`"x":` + strings.Repeat(`{"x":`, 300) + "1" + strings.Repeat("}", 300)), `claim "x": too many arrays and objects`},

		{"iss missing", claim("iss", nil), "claim iss: absent"},
		{"iss null", claim("iss", null), "claim iss: absent or not a string"},
		{"iss with a slash", claim("iss", issuer.URL+"/"), "claim iss: "},
		{"iss over http", claim("iss", strings.Replace(issuer.URL, "https", "http", 1)), `claim iss: "http:`},
		{"iss in upper case", claim("iss", strings.ToUpper(issuer.URL)), `claim iss: "HTTPS`},
		{"iss of an enterprise", claim("iss", issuer.URL+"/acme"), "claim iss: "},
		{"iss of 2 kB", claim("iss", strings.Repeat("\u20ac", 700)), "claim iss: "},
		{"iss array", claim("iss", []string{issuer.URL}), "claim iss: absent or not a string"},

		{"aud missing", claim("aud", nil), "claim aud: "},
		{"aud null", claim("aud", null), `claim aud: "null"`},
		{"aud empty list", claim("aud", []string{}), `claim aud: "[]"`},
		{"aud empty", claim("aud", ""), `claim aud: "\"\""`},
		{"aud other", claim("aud", "https://github.com/acme"), `claim aud: "\"https://github.com/acme\""`},
		{"aud prefix", claim("aud", testAudience[:len(testAudience)-1]), "claim aud: "},
		{"aud longer", claim("aud", testAudience+".evil.example"), "claim aud: "},
		{"aud with a slash", claim("aud", testAudience+"/"), "claim aud: "},
		{"aud upper case", claim("aud", strings.ToUpper(testAudience)), "claim aud: "},
		{"aud of two", claim("aud", []string{testAudience, "https://github.com/acme"}), "claim aud: "},
		{"aud of two, ours last", claim("aud", []string{"https://github.com/acme", testAudience}), "claim aud: "},
		{"aud twice ours", claim("aud", []string{testAudience, testAudience}), "claim aud: "},
		{"aud other in a list", claim("aud", []string{"https://github.com/acme"}), "claim aud: "},
		{"aud number in a list", claim("aud", []int{1}), `claim aud: "[1]"`},
		{"aud list in a list", claim("aud", [][]string{{testAudience}}), "claim aud: "},
		{"aud object", claim("aud", map[string]any{"aud": testAudience}), "claim aud: "},
		{"a runner's own credential", issuer.token(t, issuer.claimsWith(map[string]any{"aud": nil, "sub": nil, "exp": now + 6*3600})), "claim aud: "},

		{"exp missing", claim("exp", nil), "claim exp: missing"},
		{"exp null", claim("exp", null), "claim exp: missing"},
		{"exp string", claim("exp", fmt.Sprint(now+300)), "claim exp: missing or not an integer"},
		{"exp fraction", claim("exp", json.RawMessage(fmt.Sprint(now+300, ".5"))), "claim exp: missing or not an integer"},
		{"exp with .0", claim("exp", json.RawMessage(fmt.Sprintf("%d.0", now+300))), "claim exp: missing or not an integer"},
		{"exp with exponent", claim("exp", json.RawMessage("17e8")), "claim exp: missing or not an integer"},
		{"exp 0", claim("exp", 0), "claim exp: missing or not an integer"},
		{"exp negative", claim("exp", -1), "claim exp: missing or not an integer"},
		{"exp beyond int64", claim("exp", json.RawMessage("99999999999999999999")), "claim exp: missing or not an integer"},
		{"exp of 12 digits", times(100000000000, now, 99999999999), "claim exp: missing or not an integer"},
		{"exp list", claim("exp", []int64{now + 300}), "claim exp: missing or not an integer"},
		{"exp true", claim("exp", true), "claim exp: missing or not an integer"},
		{"exp in 10 years", claim("exp", now+10*365*86400), "claim exp: 87600h0m0s after iat"},
		{"exp 15 minutes and a second after iat", claim("exp", now+901), "claim exp: 15m1s after iat"},
		{"everything in 10 years", times(now+315360300, now, now+315360000), "claim iat: "},
		{"expired", times(now-60, now-660, now-360), "claim exp: expired "},
		{"expired long ago", times(now-86400, now-87000, now-86700), "claim exp: expired 24h0m0s ago"},
		{"iat missing", claim("iat", nil), "claim iat: missing"},
		{"iat string", claim("iat", fmt.Sprint(now)), "claim iat: missing or not an integer"},
		{"iat fraction", claim("iat", json.RawMessage(fmt.Sprintf("%d.5", now))), "claim iat: missing or not an integer"},
		{"iat later than exp", times(now+100, now, now+101), "claim exp: -1s after iat"},
		{"iat is exp", times(now+100, now, now+100), "claim exp: 0s after iat"},
		{"iat in the future", times(now+400, now, now+120), "claim iat: "},
		{"nbf missing", claim("nbf", nil), "claim nbf: missing"},
		{"nbf string", claim("nbf", "0"), "claim nbf: missing or not an integer"},
		{"nbf in the future", times(now+400, now+120, now), "claim nbf: not valid for another "},
		{"nbf after exp", times(now+50, now+51, now), "claim nbf: 1s after exp"},

		{"sub missing", claim("sub", nil), "claim sub: absent"},
		{"sub empty", claim("sub", ""), `claim sub: ""`},
		{"repository missing", claim("repository", nil), "claim repository: absent"},
		{"repository null", claim("repository", null), "claim repository: absent or not a string"},
		{"repository of another owner", claim("repository", "evil/api"), `claim repository: "evil/api" is not a repository of repository_owner "acme"`},
		{"repository of a similar owner", claim("repository", "acme-evil/api"), "claim repository: "},
		{"repository of the owner in another case", claim("repository", "ACME/api"), "claim repository: "},
		{"repository without name", claim("repository", "acme/"), "claim repository: "},
		{"repository without owner", claim("repository", "api"), "claim repository: "},
		{"repository is the owner", claim("repository", "acme"), "claim repository: "},
		{"repository with 3 segments", claim("repository", "acme/api/x"), "claim repository: "},
		{"owner missing", claim("repository_owner", nil), "claim repository_owner: absent"},
		{"owner number", claim("repository_owner", 1), "claim repository_owner: absent or not a string"},
		{"owner null", claim("repository_owner", null), "claim repository_owner: absent or not a string"},
		{"owner empty", issuer.token(t, issuer.claimsWith(map[string]any{"repository_owner": "", "repository": "/api"})), `claim repository_owner: ""`},
		{"owner in another member", issuer.token(t, issuer.claimsWith(map[string]any{"repository_owner": nil, "Repository_Owner": "acme"})), "claim repository_owner: absent"},
		{"repository_id number", claim("repository_id", 812345678), "claim repository_id: absent or not a string"},
		{"repository_id missing", claim("repository_id", nil), "claim repository_id: absent"},
		{"repository_owner_id number", claim("repository_owner_id", 9919), "claim repository_owner_id: absent or not a string"},
		{"repository_owner_id empty", claim("repository_owner_id", ""), `claim repository_owner_id: ""`},
	} {
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
	header := func(name string, value any) string {
		h := issuer.header()
		if h[name] = value; value == nil {
			delete(h, name)
		}
		return issuer.sign(t, h, payload)
	}
	with := func(changes map[string]any) string { return issuer.token(t, issuer.claimsWith(changes)) }
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
		{"header with blanks", issuer.signRaw(t, []byte(" {\"kid\" : \""+issuer.signing.kid+"\" ,\n\"alg\":\"RS256\" } "), payload), nil},
		{"header escaped", issuer.signRaw(t, []byte(`{"kid":"`+issuer.signing.kid+`","a\u006cg":"RS\u003256"}`), payload), nil},
		{"payload with blanks", issuer.sign(t, issuer.header(), []byte(strings.NewReplacer(`":`, "\" : ", `,"`, " ,\n\t\"").Replace(string(payload))+"\n")), map[string]string{"repository": "acme/api"}},
		{"aud in a list", with(map[string]any{"aud": []string{testAudience}}), map[string]string{"aud": "-"}},
		{"Repository_Owner beside the claim", with(map[string]any{"Repository_Owner": "evil"}), map[string]string{"repository_owner": "acme", "Repository_Owner": "evil"}},
		{"claims that are no strings", with(map[string]any{"environment": 1, "event_name": true, "ref": json.RawMessage("null"), "list": []any{"a"}, "object": map[string]any{"ref": "x"}}), map[string]string{"environment": "-", "event_name": "-", "ref": "-", "list": "-", "object": "-"}},
		{"escapes", with(map[string]any{"environment": json.RawMessage(`"pr\u006fd \"\\ \ud83d\ude00"`)}), map[string]string{"environment": "prod \"\\ \U0001f600"}},
		{"brackets in a string", with(map[string]any{"environment": strings.Repeat("[{", 50)}), map[string]string{"environment": strings.Repeat("[{", 50)}},
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

func signRSA(t *testing.T, issuer *testIssuer, hash crypto.Hash, input string) []byte {
	h := hash.New()
	h.Write([]byte(input))
	s, err := rsa.SignPKCS1v15(nil, issuer.signing.PrivateKey, hash, h.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func signPSS(t *testing.T, issuer *testIssuer, input string) []byte {
	sum := sha256.Sum256([]byte(input))
	s, err := rsa.SignPSS(rand.Reader, issuer.signing.PrivateKey, crypto.SHA256, sum[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
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

// runVerifier starts run in a synctest bubble, whose clock begins in 2000.
func runVerifier(t *testing.T, issuer *testIssuer) (v *verifier, log *bytes.Buffer) {
	t.Helper()
	log = new(bytes.Buffer)
	v = newVerifier(issuer.URL, testAudience, issuer.offline(), slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})), time.Now)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { v.run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	synctest.Wait()
	return v, log
}

func TestKeysAreRefreshed(t *testing.T) {
	issuer := newTestIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		v, log := runVerifier(t, issuer)
		if err := v.ready(); err != nil {
			t.Fatal(err)
		}
		if n := issuer.jwksFetches.Load(); n != 1 {
			t.Fatalf("%d fetches at the start", n)
		}
		time.Sleep(9*time.Minute - 1)
		if n := issuer.jwksFetches.Load(); n != 1 {
			t.Errorf("%d fetches in the first 9 minutes", n)
		}
		time.Sleep(2*time.Minute + 1)
		synctest.Wait()
		if n := issuer.jwksFetches.Load(); n != 2 {
			t.Errorf("%d fetches in the first 11 minutes", n)
		}
		if got := strings.Count(log.String(), "level=INFO"); got != 1 {
			t.Errorf("%d lines for keys that did not change:\n%s", got, log)
		}
	})
}

// TestUnknownKids: a flood of forged kids makes one fetch each 30 s, and valid
// tokens pass throughout.
func TestUnknownKids(t *testing.T) {
	issuer := newTestIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		v, _ := runVerifier(t, issuer)
		start := time.Now()
		issuer.now = time.Now
		h := issuer.header()
		flood := func(from, to time.Duration, want int64) {
			t.Helper()
			time.Sleep(time.Until(start.Add(from)))
			valid := issuer.token(t, issuer.claims())
			for n := 0; time.Since(start) < to; n++ {
				h["kid"] = fmt.Sprint("forged", n)
				token := b64(jsonBytes(t, h)) + ".e30.AAAA"
				for range 100 {
					if _, err := v.verify(token); err == nil || !strings.Contains(err.Error(), "header: kid") {
						t.Fatal(err)
					}
				}
				if _, err := v.verify(valid); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
			}
			synctest.Wait()
			if got := issuer.discoveryFetches.Load(); got != want {
				t.Errorf("%d fetches after %s, expected %d", got, to, want)
			}
		}
		flood(0, 29*time.Second, 1)
		flood(29*time.Second, 59*time.Second, 2)
		flood(59*time.Second, 89*time.Second, 3)
		flood(200*time.Second, 210*time.Second, 4+1) // one is left over from the first flood
		if n := issuer.jwksFetches.Load(); n != 5 {
			t.Errorf("%d fetches of the keys", n)
		}

		// With the issuer down it is tried every 30 s, flood or not.
		issuer.down.Store(true)
		flood(300*time.Second, 330*time.Second, 5+4)
	})
}

func TestBadSignatureFetchesNothing(t *testing.T) {
	issuer := newTestIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		v, _ := runVerifier(t, issuer)
		time.Sleep(time.Minute)
		forged := issuer.sign(t, issuer.header(), []byte("{}"))
		forged = forged[:strings.LastIndexByte(forged, '.')] + ".AAAA"
		for range 100 {
			if _, err := v.verify(forged); err == nil || !strings.Contains(err.Error(), "signature:") {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := issuer.jwksFetches.Load(); n != 1 {
			t.Errorf("%d fetches", n)
		}
	})
}

func TestIssuerDownAtStart(t *testing.T) {
	issuer := newTestIssuer(t)
	issuer.down.Store(true)
	synctest.Test(t, func(t *testing.T) {
		v, log := runVerifier(t, issuer)
		issuer.now = time.Now
		token := issuer.token(t, issuer.claims())
		if _, err := v.verify(token); !errors.Is(err, errNoKeys) {
			t.Errorf("verify: %v", err)
		}
		if err := v.ready(); !errors.Is(err, errNoKeys) {
			t.Errorf("ready: %v", err)
		}
		// What is no token at all stays a denial.
		if _, err := v.verify("x"); err == nil || errors.Is(err, errNoKeys) {
			t.Errorf("verify: %v", err)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := issuer.discoveryFetches.Load(); n < 4 || n > 5 { // after about 0, 1, 3, 7 s
			t.Errorf("%d attempts in 10 s", n)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := issuer.discoveryFetches.Load(); n < 10 || n > 20 {
			t.Errorf("%d attempts in 5 minutes", n)
		}
		if !strings.Contains(log.String(), "status \\\"503 Service Unavailable\\\"") {
			t.Errorf("the log does not say why:\n%s", log)
		}
		issuer.down.Store(false)
		time.Sleep(33 * time.Second)
		synctest.Wait()
		if _, err := v.verify(issuer.token(t, issuer.claims())); err != nil {
			t.Error(err)
		}
	})
}

func TestIssuerDownLater(t *testing.T) {
	issuer := newTestIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		v, _ := runVerifier(t, issuer)
		issuer.now = time.Now
		issuer.down.Store(true)
		time.Sleep(keyGrace)
		if _, err := v.verify(issuer.token(t, issuer.claims())); err != nil {
			t.Errorf("after a day: %v", err)
		}
		if err := v.ready(); err != nil {
			t.Errorf("after a day: %v", err)
		}
		time.Sleep(time.Second)
		if _, err := v.verify(issuer.token(t, issuer.claims())); !errors.Is(err, errNoKeys) {
			t.Errorf("after more than a day: %v", err)
		}
		if err := v.ready(); !errors.Is(err, errNoKeys) {
			t.Errorf("after more than a day: %v", err)
		}
		issuer.down.Store(false)
		time.Sleep(keyFetchGap)
		synctest.Wait()
		if _, err := v.verify(issuer.token(t, issuer.claims())); err != nil {
			t.Error(err)
		}
	})
}

// TestIssuerHangs: a fetch that gets no answer ends, and nobody waits for it.
func TestIssuerHangs(t *testing.T) {
	issuer := newTestIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		v, log := runVerifier(t, issuer)
		issuer.now = time.Now
		issuer.hang.Store(true)
		time.Sleep(11 * time.Minute)
		h := issuer.header()
		h["kid"] = "forged"
		before := time.Now()
		if _, err := v.verify(b64(jsonBytes(t, h)) + ".e30.AAAA"); err == nil {
			t.Error("accepted")
		}
		if _, err := v.verify(issuer.token(t, issuer.claims())); err != nil {
			t.Error(err)
		}
		if took := time.Since(before); took != 0 {
			t.Errorf("verify waited %s", took)
		}
		time.Sleep(keyFetchTimeout)
		synctest.Wait()
		if !strings.Contains(log.String(), "context deadline exceeded") {
			t.Errorf("no timeout:\n%s", log)
		}
	})
}

func TestRotation(t *testing.T) {
	issuer := newTestIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		v, _ := runVerifier(t, issuer)
		issuer.now = time.Now

		// As GitHub does it: published first, used later. Nobody is denied.
		issuer.announce()
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		old := issuer.token(t, issuer.claims())
		issuer.rotate()
		fresh := issuer.token(t, issuer.claims())
		for _, token := range []string{old, fresh} {
			if _, err := v.verify(token); err != nil {
				t.Errorf("announced: %v", err)
			}
		}

		// Used unannounced: denied until the fetch that this causes.
		time.Sleep(keyFetchGap)
		issuer.rotate()
		if _, err := v.verify(issuer.token(t, issuer.claims())); err == nil {
			t.Error("unannounced key accepted before it was fetched")
		}
		time.Sleep(keyFetchGap)
		synctest.Wait()
		fresh = issuer.token(t, issuer.claims())
		if _, err := v.verify(fresh); err != nil {
			t.Errorf("unannounced: %v", err)
		}

		// No longer published: no longer accepted.
		issuer.announce()
		issuer.rotate()
		issuer.revoke()
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		issuer.now = func() time.Time { return time.Now().Add(-time.Minute) }
		if _, err := v.verify(fresh); err == nil || !strings.Contains(err.Error(), "is none of the issuer's 1 keys") {
			t.Errorf("revoked: %v", err)
		}
	})
}

// TestRefresh: what the issuer may answer, and that no bad answer replaces the
// keys.
func TestRefresh(t *testing.T) {
	issuer := newTestIssuer(t)
	body := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) }
	}
	discovery := func(issuer, jwksURI string) http.HandlerFunc {
		return body(string(jsonBytes(t, map[string]any{"issuer": issuer, "jwks_uri": jwksURI})))
	}
	redirect := func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, issuer.URL+"/.well-known/jwks?elsewhere", http.StatusFound)
	}
	jwks := func(keys ...any) http.HandlerFunc {
		return body(string(jsonBytes(t, map[string]any{"keys": keys})))
	}
	public := &testKeys()[0].PublicKey
	key := func(changes map[string]any) any {
		k := publicKey("other", public)
		maps.Copy(k, changes)
		maps.DeleteFunc(k, func(_ string, v any) bool { return v == nil })
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
	keysAt := issuer.URL + "/.well-known/jwks"
	// go-jose's own limit is a variable; ours holds without it.
	defer func(limit int) { jose.MaxRSAModulusBits = limit }(jose.MaxRSAModulusBits)
	jose.MaxRSAModulusBits = 16384

	for _, test := range []struct {
		name            string
		discovery, jwks http.HandlerFunc
		want            []string // kids
		err             string
	}{
		{name: "GitHub's", want: []string{issuer.signing.kid}},
		{name: "other issuer", discovery: discovery("https://evil.example", keysAt), err: `issuer is "https://evil.example"`},
		{name: "issuer with a slash", discovery: discovery(issuer.URL+"/", keysAt), err: "issuer is "},
		{name: "no issuer", discovery: body(`{"jwks_uri":"` + keysAt + `"}`), err: `issuer is ""`},
		{name: "Issuer", discovery: body(`{"Issuer":"` + issuer.URL + `","jwks_uri":"` + keysAt + `"}`), err: `issuer is ""`},
		{name: "jwks_uri over http", discovery: discovery(issuer.URL, "http://"+strings.TrimPrefix(keysAt, "https://")), err: "is not an https URL"},
		{name: "jwks_uri missing", discovery: discovery(issuer.URL, ""), err: "is not an https URL"},
		{name: "jwks_uri without a host", discovery: discovery(issuer.URL, "https:///jwks"), err: "is not an https URL"},
		{name: "jwks_uri of a file", discovery: discovery(issuer.URL, "file:///etc/passwd"), err: "is not an https URL"},
		{name: "jwks_uri unparsable", discovery: discovery(issuer.URL, "https://%zz/"), err: "is not an https URL"},
		{name: "discovery is HTML", discovery: body("<html>"), err: "/.well-known/openid-configuration: "},
		{name: "discovery redirects", discovery: redirect, err: `status "302 Found"`},
		{name: "discovery is huge", discovery: body(`{"issuer":"` + strings.Repeat("x", maxKeyDocument) + `"}`), err: "more than 1048576 bytes"},
		{name: "JWKS redirects", jwks: redirect, err: `status "302 Found"`},
		{name: "JWKS is missing", jwks: http.NotFound, err: `status "404 Not Found"`},
		{name: "JWKS is huge", jwks: body(`{"keys":[],"x":"` + strings.Repeat("x", maxKeyDocument) + `"}`), err: "more than 1048576 bytes"},
		{name: "JWKS is no JSON", jwks: body("{"), err: "/.well-known/jwks: "},
		{name: "JWKS is null", jwks: body("null"), err: "none of 0 keys is usable"},
		{name: "JWKS without keys", jwks: body("{}"), err: "none of 0 keys is usable"},
		{name: "JWKS with Keys", jwks: body(`{"Keys":[` + string(jsonBytes(t, key(nil))) + `]}`), err: "none of 0 keys is usable"},
		{name: "keys is empty", jwks: jwks(), err: "none of 0 keys is usable"},
		{name: "keys is an object", jwks: body(`{"keys":{}}`), err: "/.well-known/jwks: "},
		{name: "garbage around a good key", jwks: jwks(
			nil, 1, "x", []any{}, map[string]any{}, map[string]any{"kty": "XX", "kid": "xx"},
			map[string]any{"kty": "oct", "kid": "symmetric", "k": "c2VjcmV0"},
			map[string]any{"kty": "RSA", "kid": "no modulus", "e": "AQAB"},
			map[string]any{"kty": "EC", "kid": "ec", "crv": "P-256", "x": "x", "y": "y"},
			map[string]any{"kty": "OKP", "kid": "ed", "crv": "Ed25519", "x": b64(make([]byte, 32))},
			key(nil), key(map[string]any{"kid": 7})), want: []string{"other"}},
		{name: "use and alg absent", jwks: jwks(key(map[string]any{"use": nil, "alg": nil})), want: []string{"other"}},
		{name: "4096 bits", jwks: jwks(key(map[string]any{"n": modulus(4096, 1)})), want: []string{"other"}},
		{name: "for encryption", jwks: jwks(key(map[string]any{"use": "enc"})), err: "none of 1 keys is usable"},
		{name: "for RS384", jwks: jwks(key(map[string]any{"alg": "RS384"})), err: "none of 1 keys is usable"},
		{name: "for PS256", jwks: jwks(key(map[string]any{"alg": "PS256"})), err: "none of 1 keys is usable"},
		{name: "kid missing", jwks: jwks(key(map[string]any{"kid": nil})), err: "none of 1 keys is usable"},
		{name: "1024 bits", jwks: jwks(publicKey("small", &small.PublicKey)), err: "none of 1 keys is usable"},
		{name: "2047 bits", jwks: jwks(key(map[string]any{"n": modulus(2047, 1)})), err: "none of 1 keys is usable"},
		{name: "4097 bits", jwks: jwks(key(map[string]any{"n": modulus(4097, 1)})), err: "none of 1 keys is usable"},
		{name: "even modulus", jwks: jwks(key(map[string]any{"n": modulus(2048, 0)})), err: "none of 1 keys is usable"},
		{name: "exponent 1", jwks: jwks(key(map[string]any{"e": "AQ"})), err: "none of 1 keys is usable"},
		{name: "exponent 3", jwks: jwks(key(map[string]any{"e": "Aw"})), err: "none of 1 keys is usable"},
		{name: "exponent even", jwks: jwks(key(map[string]any{"e": "AQAC"})), err: "none of 1 keys is usable"},
		{name: "exponent of 33 bits", jwks: jwks(key(map[string]any{"e": "AQAAAAE"})), err: "none of 1 keys is usable"},
		{name: "a private key", jwks: jwks(key(map[string]any{
			"d": b64(testKeys()[0].D.Bytes()), "p": b64(testKeys()[0].Primes[0].Bytes()), "q": b64(testKeys()[0].Primes[1].Bytes()),
		})), err: "none of 1 keys is usable"},
		{name: "a kid used twice", jwks: jwks(key(nil), key(map[string]any{"n": modulus(4096, 1)})), want: []string{"other"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := newTestVerifier(t, issuer)
			before := v.keys.Load()
			if test.discovery != nil {
				issuer.discovery.Store(&test.discovery)
			}
			if test.jwks != nil {
				issuer.jwks.Store(&test.jwks)
			}
			t.Cleanup(func() { issuer.discovery.Store(nil); issuer.jwks.Store(nil) })
			err := v.refresh(t.Context())
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("%v, expected %q", err, test.err)
				}
				if v.keys.Load() != before {
					t.Error("the keys were replaced")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			set := v.keys.Load()
			if got := slices.Sorted(maps.Keys(set.byID)); !slices.Equal(got, test.want) {
				t.Errorf("kids %q, expected %q", got, test.want)
			}
			if test.name == "a kid used twice" && !set.byID["other"].Equal(public) {
				t.Error("not the first of two keys with one kid")
			}
		})
	}
}

// TestEndlessDocument: no more is read than can be used.
func TestEndlessDocument(t *testing.T) {
	read := 0
	client := &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(readFunc(func(p []byte) (int, error) {
			if read += len(p); read > 4*maxKeyDocument {
				return 0, errors.New("still reading")
			}
			clear(p)
			return len(p), nil
		}))}, nil
	})}
	v := newVerifier("https://issuer.example", testAudience, client, slog.New(slog.DiscardHandler), time.Now)
	if err := v.refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Error(err)
	}
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// TestIssuerWithPath: enterprise slugs and GHES have one, GitHub's slug points
// at the root's JWKS, and a final slash counts in iss but not in the address.
func TestIssuerWithPath(t *testing.T) {
	issuer := newTestIssuer(t)
	for _, path := range []string{"/acme", "/_services/token", "/acme/", "/"} {
		t.Run(path, func(t *testing.T) {
			var asked []string
			client := &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
				asked = append(asked, req.URL.Path)
				if req.URL.Path != "/.well-known/jwks" {
					req.URL.Path = "/.well-known/openid-configuration"
				}
				return offline{issuer}.RoundTrip(req)
			})}
			url := issuer.URL + path
			document := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				json.NewEncoder(w).Encode(map[string]any{"issuer": url, "jwks_uri": issuer.URL + "/.well-known/jwks"})
			})
			issuer.discovery.Store(&document)
			v := newVerifier(url, testAudience, client, slog.New(slog.DiscardHandler), issuer.now)
			if err := v.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			want := []string{strings.TrimSuffix(path, "/") + "/.well-known/openid-configuration", "/.well-known/jwks"}
			if !slices.Equal(asked, want) {
				t.Errorf("asked for %q, expected %q", asked, want)
			}
			if _, err := v.verify(issuer.token(t, issuer.claimsWith(map[string]any{"iss": url}))); err != nil {
				t.Error(err)
			}
			if _, err := v.verify(issuer.token(t, issuer.claims())); err == nil {
				t.Error("accepted another issuer's token")
			}
		})
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// FuzzVerify signs whatever header and payload it is given. What is accepted
// must pass a second, slower reading of the rules, and no change of a single
// byte may be accepted.
func FuzzVerify(f *testing.F) {
	issuer := newTestIssuer(f)
	const now = 1_800_000_000
	issuer.now = func() time.Time { return time.Unix(now, 0) }
	v := newTestVerifier(f, issuer)
	v.issuer = "https://i.example"
	// Short ones: Go's minimiser would spend the whole time on GitHub's own.
	v.audience = "us"
	v.keys.Load().byID["k"] = &issuer.signing.PublicKey
	const header, payload = `{"alg":"RS256","kid":"k"}`, `{"iss":"https://i.example","aud":"us","exp":1800000300,"nbf":1800000000,"iat":1800000000,"sub":"s","repository":"o/r","repository_owner":"o","repository_id":"1","repository_owner_id":"2"}`
	if _, err := v.verify(issuer.signRaw(f, []byte(header), []byte(payload))); err != nil {
		f.Fatal(err)
	}
	for _, header := range []string{header, `{"alg":"none"}`, `{"alg":"RS256","kid":"k","crit":[]}`, `{"alg":"RS256","kid":"k","typ":"JWT","x5t":""}`} {
		f.Add([]byte(header), []byte(payload), uint16(7), byte('A'))
	}
	for _, payload := range []string{"null", "[]", `{"exp":1,"\u0065xp":2}`, `{"aud":["us"]}`, payload + payload} {
		f.Add([]byte(header), []byte(payload), uint16(1000), byte('\n'))
	}
	f.Fuzz(func(t *testing.T, header, payload []byte, at uint16, replacement byte) {
		token := issuer.signRaw(t, header, payload)
		c, err := v.verify(token)
		if err == nil {
			rereadHeader(t, header)
			rereadPayload(t, payload, c, now)
		} else if c != nil {
			t.Errorf("claims beside the error %v", err)
		}
		for _, unsigned := range []string{string(header), string(payload), string(header) + "." + string(payload) + ".AAAA"} {
			if _, err := v.verify(unsigned); err == nil {
				t.Errorf("accepted %q", unsigned)
			}
		}
		if i := int(at) % len(token); token[i] != replacement {
			if _, err := v.verify(token[:i] + string([]byte{replacement}) + token[i+1:]); err == nil {
				t.Errorf("accepted %q in the place of byte %d", replacement, i)
			}
			if _, err := v.verify(token[:i] + string([]byte{replacement}) + token[i:]); err == nil {
				t.Errorf("accepted %q before byte %d", replacement, i)
			}
		}
	})
}

func rereadHeader(t *testing.T, header []byte) {
	members := rereadObject(t, header)
	for name := range members {
		if !slices.Contains([]string{"alg", "kid", "typ", "x5t"}, name) {
			t.Errorf("header with %q", name)
		}
	}
	if members["alg"] != "RS256" || members["kid"] == "" {
		t.Errorf("header %v", members)
	}
}

func rereadPayload(t *testing.T, payload []byte, c claims, now int64) {
	members := rereadObject(t, payload)
	for name, value := range c {
		if members[name] != value {
			t.Errorf("claim %q is %q, and %v in the payload", name, value, members[name])
		}
	}
	number := func(name string) int64 {
		n, err := members[name].(json.Number).Int64()
		if err != nil || fmt.Sprint(n) != members[name].(json.Number).String() {
			t.Errorf("%s is %v", name, members[name])
		}
		return n
	}
	exp, nbf, iat := number("exp"), number("nbf"), number("iat")
	if exp <= iat || exp-iat > 900 || nbf > exp || now >= exp+60 || nbf > now+60 || iat > now+60 {
		t.Errorf("exp %d, nbf %d, iat %d", exp, nbf, iat)
	}
	if list, ok := members["aud"].([]any); ok && len(list) == 1 {
		members["aud"] = list[0]
	}
	owner, name, _ := strings.Cut(c["repository"], "/")
	if members["iss"] != "https://i.example" || members["aud"] != "us" || c["sub"] == "" || c["repository_id"] == "" ||
		c["repository_owner_id"] == "" || owner == "" || owner != c["repository_owner"] || name == "" || strings.Contains(name, "/") {
		t.Errorf("claims %v", c)
	}
}

// rereadObject reads token by token what must be one object without repetitions.
func rereadObject(t *testing.T, data []byte) map[string]any {
	if !utf8.Valid(data) {
		t.Error("not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if start, err := d.Token(); err != nil || start != json.Delim('{') {
		t.Fatalf("%q is no object", data)
	}
	members := map[string]any{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := members[name.(string)]; ok {
			t.Errorf("%q twice", name)
		}
		var value any
		if err := d.Decode(&value); err != nil {
			t.Fatal(err)
		}
		members[name.(string)] = value
	}
	if _, err := d.Token(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Token(); err != io.EOF {
		t.Errorf("something after the object: %v", err)
	}
	return members
}

func BenchmarkVerify(b *testing.B) {
	issuer := newTestIssuer(b)
	v := newTestVerifier(b, issuer)
	b.Run("valid", func(b *testing.B) {
		token := issuer.token(b, issuer.claims())
		b.ReportMetric(float64(len(token)), "bytes")
		for b.Loop() {
			if _, err := v.verify(token); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unknown kid", func(b *testing.B) {
		h := issuer.header()
		h["kid"] = "forged"
		token := issuer.sign(b, h, jsonBytes(b, issuer.claims()))
		for b.Loop() {
			if _, err := v.verify(token); err == nil {
				b.Fatal("accepted")
			}
		}
	})
}
