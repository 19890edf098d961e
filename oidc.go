package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
)

const (
	maxTokenBytes    = 8 << 10 // GitHub's tokens have about 2 kB
	maxTokenLifetime = 15 * time.Minute
	clockLeeway      = time.Minute
)

// claims are the claims of a verified token that are JSON strings, by name.
// GitHub writes every claim of its own as a string, ids and booleans included:
// https://docs.github.com/en/actions/reference/security/oidc
type claims map[string]string

// verifier checks GitHub's OIDC tokens. verify only ever looks at the keys that
// run has fetched; nothing that a token says makes a request wait, or makes run
// fetch more often than once in keyFetchGap.
type verifier struct {
	issuer   string
	audience string
	client   *http.Client
	log      *slog.Logger
	now      func() time.Time

	keys   atomic.Pointer[keySet]
	wanted chan struct{} // one slot: an unknown kid was seen
}

// newVerifier takes the issuer's exact URL, the one audience that is accepted,
// and the client that fetches the issuer's keys.
func newVerifier(issuer, audience string, client *http.Client, log *slog.Logger, now func() time.Time) *verifier {
	// Only the URLs that the issuer itself publishes are trusted with the keys.
	direct := *client
	direct.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &verifier{issuer: issuer, audience: audience, client: &direct, log: log, now: now, wanted: make(chan struct{}, 1)}
}

// verify returns the claims of a token that is valid now. errNoKeys apart,
// every error is a denial. Its text is for the log: it names the failed check
// and never holds the token or a part of it that could be replayed.
//
// The checks run cheapest first; nothing in the payload is read before the
// signature is known to be good.
func (v *verifier) verify(token string) (claims, error) {
	header, err := parseSegments(token)
	if err != nil {
		return nil, err
	}
	kid, err := checkHeader(header)
	if err != nil {
		return nil, err
	}
	set, err := v.current()
	if err != nil {
		return nil, err
	}
	key := set.byID[kid]
	if key == nil {
		// A kid that is new to us is denied and looked up in the background.
		// GitHub publishes a key long before it signs with it, so in practice
		// keyRefreshInterval has brought it by then.
		select {
		case v.wanted <- struct{}{}:
		default:
		}
		return nil, fmt.Errorf("header: kid %s is none of the issuer's %d keys", quoted(kid), len(set.byID))
	}
	signed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return nil, errors.New("token: not a signed JWT") // the cause may quote the header
	}
	// go-jose's decoder refuses duplicate members, escaped or not (RFC 7519,
	// section 4), and is case-sensitive.
	var members map[string]json.RawMessage
	if err := signed.Claims(key, &members); errors.Is(err, jose.ErrCryptoFailure) {
		return nil, fmt.Errorf("signature: not made with key %s", quoted(kid))
	} else if err != nil {
		return nil, fmt.Errorf("payload: not one JSON object: %s", quoted(err.Error()))
	} else if members == nil {
		return nil, errors.New("payload: not one JSON object: null")
	}
	return v.checkClaims(members)
}

// parseSegments checks the compact serialisation (RFC 7515, section 7.1) and
// returns the decoded header. encoding/base64 skips CR and LF and go-jose lets
// trailing bits pass: one signature could then be written in many ways.
func parseSegments(token string) (header []byte, err error) {
	if len(token) > maxTokenBytes {
		return nil, fmt.Errorf("token: %d bytes, more than %d", len(token), maxTokenBytes)
	}
	segments := strings.Split(token, ".")
	if len(segments) != 3 {
		return nil, fmt.Errorf("token: %d segments, expected 3", len(segments))
	}
	decoded := make([][]byte, 3)
	for i, segment := range segments {
		name := [...]string{"header", "payload", "signature"}[i]
		if segment == "" {
			return nil, fmt.Errorf("%s: empty", name)
		}
		decoded[i], err = base64.RawURLEncoding.Strict().DecodeString(segment)
		if err != nil || strings.ContainsAny(segment, "\r\n") {
			return nil, fmt.Errorf("%s: not strict base64url", name)
		}
		if i < 2 && !utf8.Valid(decoded[i]) { // RFC 7519, section 7.2
			return nil, fmt.Errorf("%s: not UTF-8", name)
		}
	}
	return decoded[0], nil
}

// checkHeader returns the kid. It knows the four members that GitHub writes and
// refuses every other, before any library acts on jwk, x5c or crit.
func checkHeader(header []byte) (kid string, err error) {
	var members map[string]json.RawMessage
	if err := josejson.Unmarshal(header, &members); err != nil {
		return "", fmt.Errorf("header: not one JSON object: %s", quoted(err.Error()))
	}
	for name, raw := range members {
		value, ok := jsonString(raw)
		if !ok {
			return "", fmt.Errorf("header: %s is not a string", quoted(name))
		}
		switch name {
		case "alg":
			if value != string(jose.RS256) {
				return "", fmt.Errorf("header: alg is %s, expected RS256", quoted(value))
			}
		case "typ":
			// A media type, so in any case (RFC 7515, section 4.1.9).
			if lowerASCII(value) != "jwt" {
				return "", fmt.Errorf("header: typ is %s, expected JWT", quoted(value))
			}
		case "kid":
			if value == "" || len(value) > 256 {
				return "", fmt.Errorf("header: kid of %d bytes, expected 1 to 256", len(value))
			}
			kid = value
		case "x5t":
		default:
			return "", fmt.Errorf("header: member %s is not allowed", quoted(name))
		}
	}
	if members["alg"] == nil || kid == "" {
		return "", errors.New("header: alg or kid is missing")
	}
	return kid, nil
}

// checkClaims checks what any token for this service must say, whatever the
// policy. Everything is required: an absent claim is never a permission.
func (v *verifier) checkClaims(members map[string]json.RawMessage) (claims, error) {
	c := make(claims, len(members))
	for name, raw := range members {
		if s, ok := jsonString(raw); ok {
			c[name] = s
		} else if bytes.Count(raw, []byte("["))+bytes.Count(raw, []byte("{")) > 16 {
			return nil, fmt.Errorf("claim %s: too many arrays and objects", quoted(name))
		}
	}
	if c["iss"] != v.issuer {
		return nil, fmt.Errorf("claim iss: %s, expected %s", c.shown("iss"), quoted(v.issuer))
	}
	if err := v.checkAudience(members["aud"]); err != nil {
		return nil, err
	}
	delete(c, "aud")
	if err := v.checkTimes(members); err != nil {
		return nil, err
	}
	for _, name := range []string{"sub", "repository_owner", "repository_id", "repository_owner_id"} {
		if c[name] == "" {
			return nil, fmt.Errorf("claim %s: %s, expected a string", name, c.shown(name))
		}
	}
	repo, ok := strings.CutPrefix(c["repository"], c["repository_owner"]+"/")
	if !ok || repo == "" || strings.Contains(repo, "/") {
		return nil, fmt.Errorf("claim repository: %s is not a repository of repository_owner %s", c.shown("repository"), c.shown("repository_owner"))
	}
	return c, nil
}

// checkAudience takes one audience, as a string or alone in an array (RFC 7519,
// section 4.1.3). A token for us and someone else could be replayed by them.
func (v *verifier) checkAudience(raw json.RawMessage) error {
	audience, ok := jsonString(raw)
	if !ok {
		var list []json.RawMessage
		if err := josejson.Unmarshal(raw, &list); err == nil && len(list) == 1 {
			audience, ok = jsonString(list[0])
		}
	}
	if !ok || audience != v.audience {
		return fmt.Errorf("claim aud: %s, expected %s alone", quoted(string(raw)), quoted(v.audience))
	}
	return nil
}

// checkTimes wants all three times. GitHub's tokens live for 300 s and are valid
// from 300 or 600 s before iat, so nothing is said of iat-nbf.
func (v *verifier) checkTimes(members map[string]json.RawMessage) error {
	times := map[string]time.Time{}
	for _, name := range []string{"exp", "nbf", "iat"} {
		seconds, ok := jsonSeconds(members[name])
		if !ok {
			return fmt.Errorf("claim %s: missing or not an integer from 1 to 99999999999", name)
		}
		times[name] = time.Unix(seconds, 0)
	}
	now, exp, nbf, iat := v.now(), times["exp"], times["nbf"], times["iat"]
	switch lifetime := exp.Sub(iat); {
	case lifetime <= 0 || lifetime > maxTokenLifetime:
		return fmt.Errorf("claim exp: %s after iat, expected up to %s", lifetime, maxTokenLifetime)
	case nbf.After(exp):
		return fmt.Errorf("claim nbf: %s after exp", nbf.Sub(exp))
	case !now.Before(exp.Add(clockLeeway)):
		return fmt.Errorf("claim exp: expired %s ago", now.Sub(exp).Round(time.Second))
	case now.Add(clockLeeway).Before(nbf):
		return fmt.Errorf("claim nbf: not valid for another %s", nbf.Sub(now).Round(time.Second))
	case now.Add(clockLeeway).Before(iat):
		return fmt.Errorf("claim iat: %s in the future", iat.Sub(now).Round(time.Second))
	}
	return nil
}

// jsonString decodes a JSON string, and nothing else: null is not one.
func jsonString(raw json.RawMessage) (string, bool) {
	if len(raw) < 2 || raw[0] != '"' {
		return "", false
	}
	if inner := raw[1 : len(raw)-1]; bytes.IndexByte(inner, '\\') < 0 {
		return string(inner), true
	}
	var s string
	err := josejson.Unmarshal(raw, &s)
	return s, err == nil
}

// jsonSeconds reads a NumericDate (RFC 7519, section 2) of the one form that
// GitHub writes: an integer literal, with no sign, fraction or exponent.
func jsonSeconds(raw json.RawMessage) (int64, bool) {
	n, err := strconv.ParseUint(string(raw), 10, 64)
	return int64(n), err == nil && n > 0 && n <= 99999999999
}

// shown is a claim for a log line.
func (c claims) shown(name string) string {
	if value, ok := c[name]; ok {
		return quoted(value)
	}
	return "absent or not a string"
}

// quoted makes a stranger's text fit for a log line: escaped and cut.
func quoted(s string) string {
	const most = 100
	if len(s) > most {
		return strconv.QuoteToASCII(s[:most]) + "..."
	}
	return strconv.QuoteToASCII(s)
}
