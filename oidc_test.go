package main

import (
	"bytes"
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
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"kuberollouttrigger/internal/fake"
)

// newTestVerifier has the issuer's keys and no background.
func newTestVerifier(t testing.TB, issuer *testIssuer) *verifier {
	t.Helper()
	v := newVerifier(issuer.URL, testAudience, issuer.Client(), slog.New(slog.DiscardHandler), issuer.now)
	if err := v.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	return v
}

func b64(data []byte) string { return base64.RawURLEncoding.EncodeToString(data) }

func unb64(t *testing.T, s string) []byte {
	data, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestVerifyRefuses: each reason belongs to the check that is meant to find what is wrong.
func TestVerifyRefuses(t *testing.T) {
	issuer := newTestIssuer(t)
	start := time.Now().Truncate(time.Second)
	issuer.now = func() time.Time { return start }
	v := newTestVerifier(t, issuer)
	w := newTestWebWith(t, issuer, v, "", &logBuffer{})
	now, null := start.Unix(), json.RawMessage("null")
	good := issuer.with(nil)
	parts := strings.Split(good, ".")
	h, p, s := parts[0], parts[1], parts[2]
	header, payload := string(unb64(t, h)), string(unb64(t, p))

	rawHeader := func(header string) string { return issuer.sign(header, payload) }
	rawPayload := func(payload string) string { return issuer.sign(header, payload) }
	rawClaim := func(member string) string { return rawPayload(strings.TrimSuffix(payload, "}") + "," + member + "}") }
	times := func(exp, nbf, iat int64) string {
		return issuer.with(map[string]any{"exp": exp, "nbf": nbf, "iat": iat})
	}
	input := func(alg string) string { return b64([]byte(strings.Replace(header, "RS256", alg, 1))) + "." + p }
	signedBy := func(alg string, key crypto.Signer, opts crypto.SignerOpts) string {
		hash := opts.HashFunc().New()
		hash.Write([]byte(input(alg)))
		signature, err := key.Sign(rand.Reader, hash.Sum(nil), opts)
		if err != nil {
			t.Fatal(err)
		}
		return input(alg) + "." + b64(signature)
	}
	pss := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	_, key := issuer.Key()
	foreign, err1 := rsa.GenerateKey(rand.Reader, 2048)
	elliptical, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	public, err3 := x509.MarshalPKIXPublicKey(&key.PublicKey)
	mac := hmac.New(sha256.New, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
	mac.Write([]byte(input("HS256")))
	// A good payload whose base64url has both - and _, for the alphabet's sake.
	odd := issuer.with(map[string]any{"environment": "???>>>???>>>~~~", "x": "??>>", "xx": "?>?>?>~~"})
	stdAlphabet := strings.NewReplacer("-", "+", "_", "/").Replace(odd)
	if _, err := v.verify(odd); err != nil || stdAlphabet == odd {
		t.Fatalf("%v with %s", err, odd)
	}
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}

	refused := map[string][]string{
		"token: 1 segments": {"", "ghp_0123456789abcdefghijklmnopqrstuvwxyzAB", strings.ReplaceAll(good, ".", "%2E"),
			`{"payload":"` + p + `","protected":"` + h + `","signature":"` + s + `"}`}, // JSON serialization
		"token: 2 segments":       {h + "." + p},
		"token: 4 segments":       {good + ".e30", good + ".", "." + good, good + "A."},
		"token: 5 segments":       {good + "." + p + "." + s}, // as a JWE has
		"expected at most 8192":   {issuer.with(map[string]any{"x": strings.Repeat("x", 7000)}), strings.Repeat("a", maxTokenBytes+1)},
		"token: has a line break": {h[:9] + "\n" + h[9:] + "." + p + "." + s, h + "." + p[:9] + "\r" + p[9:] + "." + s, good + "\n", h + "." + p + ".\r\n" + s},
		"token: not a signed JWT": {good + "==", stdAlphabet, good + " ", h + ".\t" + p + "." + s, good + "\x00", good + "AAA"}, // AAA: a length of 1 modulo 4

		"header: not base64url": {" " + good, `{"payload":"` + p + `","x":"..","signature":"` + s + `"}`},
		"header: not a JSON object": {"." + p + "." + s, rawHeader(`["RS256"]`), rawHeader(`null`), rawHeader(header[:len(header)-1]),
			rawHeader(header[:len(header)-1] + `,"alg":"RS256"}`), rawHeader(header[:len(header)-1] + `,"k\u0069d":"x"}`), // members twice
			rawHeader("{\"alg\":\"RS256\",\"kid\":\"\xff\"}"), rawHeader(header + header)},
		"header: alg is absent": {rawHeader(`{}`), rawHeader(strings.Replace(header, `"alg"`, `"Alg"`, 1))},
		"header: alg is ": {b64([]byte(`{"alg":"none","kid":"x"}`)) + "." + p + ".", input("HS256") + "." + b64(mac.Sum(nil)), // with the public key
			signedBy("RS384", key, crypto.SHA384), signedBy("RS512", key, crypto.SHA512), signedBy("PS256", key, pss), signedBy("ES256", elliptical, crypto.SHA256)},
		`header: kid ../../etc/passwd\n is none of the issuer's 1 keys`: {issuer.withHeader("kid", "../../etc/passwd\n")},
		"kk... is none of the issuer's 1 keys":                          {issuer.withHeader("kid", strings.Repeat("k", 256))}, // looked up

		"signature: not made with key": {h + ".." + s, h + "." + p + ".", h + "." + p + ".AAAA", h + "." + p + "." + b64(make([]byte, 256)),
			h + "." + p + "." + b64(append([]byte{0}, unb64(t, s)...)), h + "." + b64([]byte(strings.Replace(payload, "acme", "evil", 1))) + "." + s,
			signedBy("RS256", key, crypto.SHA384), signedBy("RS256", key, pss), signedBy("RS256", elliptical, crypto.SHA256), signedBy("RS256", foreign, crypto.SHA256)},
		"payload: not a JSON object": {rawPayload("[" + payload + "]"), rawPayload("null"), rawPayload(`"x"`), rawPayload("1"), rawPayload(" "),
			rawPayload("\ufeff" + payload), rawClaim(`/**/"x":1`), rawClaim("\"x\":\"a\nb\""), rawClaim(`"repository":"acme/api"`),
			rawClaim(`"rep\u006fsitory":"evil/api"`), rawClaim(`"x":[{"a":1,"\u0061":2}]`),
			rawClaim("\"x\":\"\xff\""), rawPayload(payload + payload), rawPayload(payload + "x")},

		"claim iss is absent":                   {rawPayload(`{}`)},
		"claim aud is absent":                   {issuer.with(map[string]any{"aud": nil, "sub": nil, "exp": now + 6*3600})}, // a runner's own credential
		"claim exp is ":                         {times(100000000000, now, 99999999999)},
		"claim iat: ":                           {times(now+315360300, now, now+315360000), times(now+400, now, now+61)},
		"claim exp: expired 1m0s ago":           {times(now-60, now-660, now-360)},
		"claim exp: expired 24h0m0s ago":        {times(now-86400, now-87000, now-86700)},
		"claim exp is -1s after iat":            {times(now+100, now, now+101)},
		"claim exp is 0s after iat":             {times(now+100, now, now+100)},
		"claim nbf: not valid for another 1m1s": {times(now+400, now+61, now)},
		"claim nbf is 1s after exp":             {times(now+50, now+51, now)},
		"claim repository_owner is empty":       {issuer.with(map[string]any{"repository_owner": "", "repository": "/api"})},
		"claim repository_owner is absent":      {issuer.with(map[string]any{"repository_owner": nil, "Repository_Owner": "acme"})},
	}
	add := func(reason, token string) { refused[reason] = append(refused[reason], token) }
	for name, values := range map[string][]any{
		"alg": {nil, null, "", "none", "None", "rs256", "RS256 ", []string{"RS256"}},
		"typ": {null, "", "at+jwt", "application/jwt", 1, []string{"JWT"}},
		"kid": {nil, null, "", 7, strings.Repeat("k", 257), strings.Repeat("k", 1024)},
	} {
		for _, value := range values {
			add("header: "+name+" is ", issuer.withHeader(name, value))
		}
	}
	for _, name := range []string{"jwk", "jku", "x5u", "x5c", "crit", "b64", "zip", "enc", "cty"} {
		for _, value := range []any{null, false, "https://evil.example/jwks", []string{}, []string{"MIIB"}, fake.PublicKey("mine", &foreign.PublicKey)} {
			add("header: member "+name+" is not allowed", issuer.withHeader(name, value))
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
		"nbf":                 {nil, null, "0", 0, -1},
		"sub":                 {nil, null, ""},
		"repository":          {nil, null, "evil/api", "acme-evil/api", "ACME/api", "acme/", "api", "acme", "acme/api/x"},
		"repository_owner":    {nil, null, 1},
		"repository_id":       {nil, null, "", 812345678},
		"repository_owner_id": {nil, null, "", 9919},
	} {
		for _, value := range values {
			add("claim "+name+" is ", issuer.with(map[string]any{name: value}))
		}
	}
	for reason, tokens := range refused {
		for _, token := range tokens {
			t.Run(reason, func(t *testing.T) {
				c, err := v.verify(token)
				if err == nil || c != nil || errors.Is(err, errNoKeys) || !strings.Contains(err.Error(), reason) {
					t.Fatalf("claims %v, error %v, expected %q for %q", c, err, reason, token)
				}
				if len(err.Error()) > 500 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
					t.Errorf("%q is not fit for a log", err)
				}
				for segment := range strings.SplitSeq(token, ".") {
					if len(segment) >= 12 && strings.Contains(err.Error(), segment[:12]) {
						t.Errorf("%q repeats a part of the token", err)
					}
				}
				// Through the front door, but not over a connection: no client sends some of these.
				r := httptest.NewRequest(http.MethodPost, "/event", strings.NewReader(`{"image":"ghcr.io/acme/api:dev"}`))
				r.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
				answer := httptest.NewRecorder()
				w.handler.ServeHTTP(answer, r)
				w.expect(reason, answer.Result(), http.StatusUnauthorized, accessDenied)
			})
		}
	}
	w.expect("a good one", w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`), http.StatusAccepted, "ghcr.io/acme/api:dev")
	if n := issuer.JWKSFetches.Load(); n != 1 {
		t.Errorf("verify fetched the keys: %d fetches", n)
	}
}

func TestVerifyAccepts(t *testing.T) {
	issuer := newTestIssuer(t)
	start := time.Now().Truncate(time.Second)
	issuer.now = func() time.Time { return start }
	v := newTestVerifier(t, issuer)
	now := start.Unix()
	payload, with := string(jsonBytes(issuer.claimsWith(nil))), issuer.with
	kid, _ := issuer.Key()
	plain := `{"alg":"RS256","kid":"` + kid + `"}`
	plain += strings.Repeat(" ", (4-len(plain)%3)%3) // so that the last character has bits to spare
	good := issuer.sign(plain, payload)
	goodHeader, _, _ := strings.Cut(good, ".")
	long := with(map[string]any{"x": strings.Repeat("x", (maxTokenBytes-len(with(map[string]any{"x": ""})))*3/4)})
	if len(long) < maxTokenBytes-2 || len(long) > maxTokenBytes {
		t.Fatalf("%d bytes, meant to be almost %d", len(long), maxTokenBytes)
	}

	for _, test := range []struct {
		name, token string
		want        map[string]string // claims; "-" for none
	}{
		{"GitHub's", with(nil), map[string]string{"iss": issuer.URL, "sub": "repo:acme/api:ref:refs/heads/main", "event_name": "push", "repository_id": "812345678", "base_ref": "", "aud": "-", "exp": "-", "nbf": "-", "iat": "-"}},
		{"almost 8 KiB", long, nil},
		{"no typ", issuer.withHeader("typ", nil), nil}, {"typ jwt", issuer.withHeader("typ", "jwt"), nil},
		{"no x5t", issuer.withHeader("x5t", nil), nil}, {"x5t#S256", issuer.withHeader("x5t#S256", "x"), nil},
		{"unknown members", issuer.sign(`{"alg":"RS256","Alg":"none","iss":"x","x5t":1,"new":{"a":[1]},"kid":"`+kid+`"}`, payload), nil},
		{"trailing bits of the signature", flipLastBit(good), nil}, // the same signature, written in another way
		{"trailing bits of the header", flipLastBit(goodHeader) + strings.TrimPrefix(good, goodHeader), nil},
		{"header with blanks", issuer.sign(" {\"kid\" : \""+kid+"\" ,\n\"alg\":\"RS256\" } ", payload), nil},
		{"header escaped", issuer.sign(`{"kid":"`+kid+`","a\u006cg":"RS\u003256"}`, payload), nil},
		{"payload with blanks", issuer.sign(plain, strings.NewReplacer(`":`, "\" : ", `,"`, " ,\n\t\"").Replace(payload)+"\n"), map[string]string{"repository": "acme/api"}},
		{"aud in a list", with(map[string]any{"aud": []string{testAudience}}), map[string]string{"aud": "-"}},
		{"Repository_Owner beside the claim", with(map[string]any{"Repository_Owner": "evil"}), map[string]string{"repository_owner": "acme", "Repository_Owner": "evil"}},
		{"claims that are no strings", with(map[string]any{"environment": 1, "event_name": true, "ref": json.RawMessage("null"), "list": []any{"a"}, "object": map[string]any{"ref": "x"}}), map[string]string{"environment": "-", "event_name": "-", "ref": "-", "list": "-", "object": "-"}},
		{"escapes", with(map[string]any{"environment": json.RawMessage(`"pr\u006fd \"\\ \ud83d\ude00"`)}), map[string]string{"environment": "prod \"\\ \U0001f600"}},
		{"brackets in a string", with(map[string]any{"environment": strings.Repeat("[{", 50)}), map[string]string{"environment": strings.Repeat("[{", 50)}},
		{"lists nested deeply", with(map[string]any{"x": json.RawMessage(strings.Repeat("[", 2000) + strings.Repeat("]", 2000))}), map[string]string{"x": "-"}},
		{"objects nested deeply", with(map[string]any{"x": json.RawMessage(strings.Repeat(`{"x":`, 600) + "1" + strings.Repeat("}", 600))}), map[string]string{"x": "-"}},
		{"header nested deeply", issuer.withHeader("x", json.RawMessage(strings.Repeat("[", 2000)+strings.Repeat("]", 2000))), nil},
		{"owner of another policy", with(map[string]any{"repository_owner": "Evil", "repository": "Evil/x"}), map[string]string{"repository": "Evil/x"}},
		{"sub with ids", with(map[string]any{"sub": "repo:acme@9919/api@812345678:environment:production"}), nil},
		{"exp 15 minutes after iat", with(map[string]any{"exp": now + 900}), nil},
		{"expired within the leeway", with(map[string]any{"exp": now - 59, "iat": now - 359}), nil},
		{"nbf and iat within the leeway", with(map[string]any{"exp": now + 360, "nbf": now + 60, "iat": now + 60}), nil},
		{"nbf long ago", with(map[string]any{"nbf": 1}), nil}, {"nbf is exp", with(map[string]any{"exp": now + 30, "nbf": now + 30}), nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel() // requests share the header of the last token
			for range 30 {
				v.verify(good)
			}
			c, err := v.verify(test.token)
			if err != nil {
				t.Fatal(err)
			}
			for name, want := range test.want {
				if got, ok := c[name].(string); ok != (want != "-") || ok && got != want {
					t.Errorf("%s is %q, %t; expected %q", name, got, ok, want)
				}
			}
		})
	}
}

// flipLastBit changes a bit of the last character that encodes nothing.
func flipLastBit(segment string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(segment) - 1
	return segment[:last] + string(alphabet[strings.IndexByte(alphabet, segment[last])^1])
}

// FuzzVerify signs whatever header and payload it is given. What is accepted must
// pass a second, plainer reading of the rules, and a token with one byte changed
// may only be accepted if it decodes to the same bytes.
func FuzzVerify(f *testing.F) {
	issuer := newTestIssuer(f)
	const now = 1_800_000_000
	issuer.now = func() time.Time { return time.Unix(now, 0) }
	v := newTestVerifier(f, issuer)
	v.issuer, v.audience = "https://i.example", "us" // short, or Go's minimizer would spend its time on them
	_, key := issuer.Key()
	v.keys.Load().byID["k"] = &key.PublicKey
	const header, payload = `{"alg":"RS256","kid":"k"}`, `{"iss":"https://i.example","aud":"us","exp":1800000300,"nbf":1800000000,"iat":1800000000,"sub":"s","repository":"o/r","repository_owner":"o","repository_id":"1","repository_owner_id":"2"}`
	if _, err := v.verify(issuer.sign(header, payload)); err != nil {
		f.Fatal(err)
	}
	for _, header := range []string{header, `{"alg":"none"}`, `{"alg":"RS256","kid":"k","crit":[]}`, `{"alg":"RS256","kid":"k","typ":"JWT","x5t":"","new":1}`} {
		f.Add([]byte(header), []byte(payload), uint16(7), byte('A'))
	}
	for _, payload := range []string{"null", "[]", `{"exp":1,"\u0065xp":2}`, `{"aud":["us"]}`, payload + payload} {
		f.Add([]byte(header), []byte(payload), uint16(1000), byte('\n'))
	}
	f.Fuzz(func(t *testing.T, header, payload []byte, at uint16, replacement byte) {
		token := issuer.sign(string(header), string(payload))
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
		i := int(at) % len(token)
		for _, rest := range []string{token[i+1:], token[i:]} {
			changed := token[:i] + string([]byte{replacement}) + rest
			if _, err := v.verify(changed); err == nil && decoded(t, changed) != decoded(t, token) {
				t.Errorf("accepted %q at byte %d", replacement, i)
			}
		}
	})
}

func decoded(t *testing.T, token string) (segments [3]string) {
	for i, segment := range strings.Split(token, ".") {
		segments[i] = string(unb64(t, segment))
	}
	return segments
}

func rereadHeader(t *testing.T, header []byte) {
	members := rereadObject(t, header)
	for _, name := range []string{"jwk", "jku", "x5u", "x5c", "crit", "b64", "zip", "enc", "cty"} {
		if _, ok := members[name]; ok {
			t.Errorf("header with %q", name)
		}
	}
	if typ, ok := members["typ"]; members["alg"] != "RS256" || members["kid"] != "k" || ok && !strings.EqualFold(fmt.Sprint(typ), "jwt") {
		t.Errorf("header %v", members)
	}
}

func rereadPayload(t *testing.T, payload []byte, c claims, now int64) {
	members := rereadObject(t, payload)
	for name, value := range c {
		if text, ok := value.(string); ok && members[name] != text {
			t.Errorf("claim %q is %q, and %v in the payload", name, text, members[name])
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
	owner, name, _ := strings.Cut(c.get("repository"), "/")
	if members["iss"] != "https://i.example" || members["aud"] != "us" || c["sub"] == "" || c["repository_id"] == "" ||
		c["repository_owner_id"] == "" || owner == "" || owner != c["repository_owner"] || name == "" || strings.Contains(name, "/") {
		t.Errorf("claims %v", c)
	}
}

// rereadObject reads token by token what must be one object without repetitions.
func rereadObject(t *testing.T, data []byte) map[string]any {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if start, err := d.Token(); err != nil || start != json.Delim('{') || !utf8.Valid(data) {
		t.Fatalf("%q is not an object", data)
	}
	members := map[string]any{}
	for d.More() {
		var value any
		name, err := d.Token()
		if err := errors.Join(err, d.Decode(&value)); err != nil {
			t.Fatal(err)
		}
		if _, ok := members[name.(string)]; ok {
			t.Errorf("%q twice", name)
		}
		members[name.(string)] = value
	}
	_, end := d.Token()
	if _, err := d.Token(); end != nil || err != io.EOF {
		t.Errorf("no end, or something after it: %v, %v", end, err)
	}
	return members
}
