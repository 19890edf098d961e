package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// FuzzVerify signs whatever header and payload it is given. What is accepted must
// pass a second, plainer reading of the rules, and a token with one byte changed
// may only be accepted if it decodes to the same bytes.
func FuzzVerify(f *testing.F) {
	issuer := newTestIssuer(f)
	const now = 1_800_000_000
	issuer.now = func() time.Time { return time.Unix(now, 0) }
	v := newTestVerifier(f, issuer)
	v.issuer, v.audience = "https://i.example", "us" // short, or Go's minimizer would spend its time on them
	v.keys.Load().byID["k"] = &issuer.signing.PublicKey
	const header, payload = `{"alg":"RS256","kid":"k"}`, `{"iss":"https://i.example","aud":"us","exp":1800000300,"nbf":1800000000,"iat":1800000000,"sub":"s","repository":"o/r","repository_owner":"o","repository_id":"1","repository_owner_id":"2"}`
	if _, err := v.verify(issuer.signRaw(f, []byte(header), []byte(payload))); err != nil {
		f.Fatal(err)
	}
	for _, header := range []string{header, `{"alg":"none"}`, `{"alg":"RS256","kid":"k","crit":[]}`, `{"alg":"RS256","kid":"k","typ":"JWT","x5t":"","new":1}`} {
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
	for name := range members {
		if slices.Contains([]string{"jwk", "jku", "x5u", "x5c", "crit", "b64", "zip", "enc", "cty"}, name) {
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
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if start, err := d.Token(); err != nil || start != json.Delim('{') || !utf8.Valid(data) {
		t.Fatalf("%q is not an object", data)
	}
	members := map[string]any{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			t.Fatal(err)
		}
		var value any
		if err := d.Decode(&value); err != nil {
			t.Fatal(err)
		}
		if _, ok := members[name.(string)]; ok {
			t.Errorf("%q twice", name)
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
	forged := issuer.Header()
	forged["kid"] = "forged"
	for _, test := range []struct {
		name, token string
		valid       bool
	}{
		{"valid", issuer.token(b, issuer.claims()), true},
		{"unknown kid", issuer.sign(b, forged, jsonBytes(b, issuer.claims())), false},
	} {
		b.Run(test.name, func(b *testing.B) {
			for b.Loop() {
				if _, err := v.verify(test.token); (err == nil) != test.valid {
					b.Fatal(err)
				}
			}
		})
	}
}
