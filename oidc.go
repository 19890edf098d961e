package main

import (
	"cmp"
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
	"k8s.io/apimachinery/pkg/util/wait"
)

const (
	maxTokenBytes    = 8 << 10 // GitHub's tokens have about 2 kB
	maxTokenLifetime = 15 * time.Minute
	clockLeeway      = time.Minute

	keyRefreshInterval = 10 * time.Minute
	keyGrace           = 24 * time.Hour // how long the last good keys serve
	keyFetchGap        = 30 * time.Second
	keyFetchTimeout    = 10 * time.Second
	maxKeyDocument     = 1 << 20
)

// errNoKeys says nothing about the token: none can be verified.
var errNoKeys = errors.New("no usable keys: they were never fetched, or last more than a day ago")

var signatureAlgorithms = []jose.SignatureAlgorithm{jose.RS256}

// forbiddenHeaders bring keys of their own or change how a token is read. Unknown
// members are ignored (RFC 7515, section 4).
var forbiddenHeaders = []string{"jwk", "jku", "x5u", "x5c", "crit", "b64", "zip", "enc", "cty"}

// claims are the claims of a token. A policy reads those that are strings, as all of
// GitHub's own are: https://docs.github.com/en/actions/reference/security/oidc
type claims map[string]any

// get returns a claim that is a string.
func (c claims) get(name string) string {
	value, _ := c[name].(string)
	return value
}

// show returns a claim for a log line.
func (c claims) show(name string) string {
	if value, ok := c[name].(string); ok {
		return show(value)
	}
	return "absent or not a string"
}

// verifier checks GitHub's OIDC tokens. verify uses only the keys that run has
// fetched, so no token can make a request wait.
type verifier struct {
	issuer, audience string
	client           *http.Client
	log              *slog.Logger
	now              func() time.Time

	keys       atomic.Pointer[keySet]
	signed     atomic.Pointer[header] // of the last token that was
	unknownKid chan struct{}          // one slot; tells run to fetch the keys soon
}

// keySet is the result of one fetch. It is replaced as a whole, never changed.
type keySet struct {
	byID    map[string]*rsa.PublicKey
	fetched time.Time
}

// newVerifier takes what to accept, and the client that fetches the keys.
func newVerifier(issuer, audience string, client *http.Client, log *slog.Logger, now func() time.Time) *verifier {
	// Only the URLs that the issuer itself publishes are trusted with the keys.
	direct := *client
	direct.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &verifier{issuer: issuer, audience: audience, client: &direct, log: log, now: now, unknownKid: make(chan struct{}, 1)}
}

// verify returns the claims of a token that is valid now, after its signature is known
// to be good. Errors are denials, but for errNoKeys, and never repeat the token.
func (v *verifier) verify(token string) (claims, error) {
	switch n := strings.Count(token, ".") + 1; {
	case len(token) > maxTokenBytes:
		return nil, fmt.Errorf("token: %d bytes, expected at most %d", len(token), maxTokenBytes)
	case n != 3:
		return nil, fmt.Errorf("token: %d segments, expected 3", n)
	case strings.ContainsAny(token, "\r\n"): // encoding/base64 skips them
		return nil, errors.New("token: has a line break")
	}
	segment, rest, _ := strings.Cut(token, ".")
	h, err := v.header(segment)
	if err = cmp.Or(err, v.ready()); err != nil {
		return nil, err
	}
	keys := v.keys.Load().byID
	key := keys[h.kid]
	if key == nil {
		select { // a later fetch suffices: GitHub publishes a key long before it uses it
		case v.unknownKid <- struct{}{}:
		default:
		}
		return nil, fmt.Errorf("header: kid %s is none of the issuer's %d keys", sanitize(h.kid), len(keys))
	}
	payload, err := h.open(rest, key)
	if err != nil {
		return nil, err
	}
	v.signed.Store(h)
	c, err := decodeClaims(payload)
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	if err := v.checkClaims(c); err != nil {
		return nil, err
	}
	return c, nil
}

// header is the first segment of a token. Tokens that are signed with one key share it.
type header struct {
	segment, kid string
	parsed       *jose.JSONWebSignature // without payload and signature; open sets it
}

// header checks the header before go-jose sees it, which parses embedded keys and
// certificates as well.
func (v *verifier) header(segment string) (*header, error) {
	if h := v.signed.Load(); h != nil && h.segment == segment {
		return h, nil
	}
	decoded, err := base64.RawURLEncoding.DecodeString(segment)
	if err != nil {
		return nil, errors.New("header: not base64url")
	}
	// go-jose's own decoder is case-sensitive and refuses duplicates. unmarshalStrict
	// takes milliseconds if these are nested deeply.
	var members map[string]any
	if !utf8.Valid(decoded) || josejson.Unmarshal(decoded, &members) != nil || members == nil {
		return nil, errors.New("header: not a JSON object") // the error may quote the token
	}
	for _, name := range forbiddenHeaders {
		if _, ok := members[name]; ok {
			return nil, fmt.Errorf("header: member %s is not allowed", name)
		}
	}
	typ, hasType := members["typ"]
	kid, _ := members["kid"].(string)
	switch {
	case members["alg"] != string(jose.RS256):
		return nil, fmt.Errorf("header: alg is %s, expected RS256", show(members["alg"]))
	case hasType && !strings.EqualFold(fmt.Sprint(typ), "JWT"): // RFC 7515, section 4.1.9
		return nil, fmt.Errorf("header: typ is %s, expected JWT", show(typ))
	case kid == "" || len(kid) > 256:
		return nil, fmt.Errorf("header: kid is %s, expected a string of 1 to 256 bytes", show(members["kid"]))
	}
	return &header{segment: strings.Clone(segment), kid: kid}, nil
}

// open verifies the segments after the header and returns the payload. go-jose would
// decode the header four times for each token, so it stays parsed.
func (h *header) open(segments string, key *rsa.PublicKey) ([]byte, error) {
	first, second, _ := strings.Cut(segments, ".")
	payload, payloadErr := base64.RawURLEncoding.DecodeString(first)
	signature, err := base64.RawURLEncoding.DecodeString(second)
	if err = cmp.Or(err, payloadErr); err == nil && h.parsed == nil {
		h.parsed, err = jose.ParseSignedCompact(h.segment+"..", signatureAlgorithms)
	}
	if err != nil {
		return nil, errors.New("token: not a signed JWT") // err may quote the token
	}
	signed := jose.JSONWebSignature{Signatures: []jose.Signature{h.parsed.Signatures[0]}}
	signed.Signatures[0].Signature = signature
	if signed.DetachedVerify(payload, key) != nil {
		return nil, fmt.Errorf("signature: not made with key %s", sanitize(h.kid))
	}
	return payload, nil
}

// decodeClaims decodes a payload: one JSON object in UTF-8 (RFC 7519, section 7.2)
// without duplicate members (section 4). go-jose's decoder takes twice the time.
func decodeClaims(data []byte) (claims, error) {
	var value any
	err := unmarshalStrict(data, &value)
	members, ok := value.(map[string]any)
	if err != nil || !ok {
		return nil, errors.New("not a JSON object") // err may quote the token
	}
	return members, nil
}

// checkClaims checks what every token must say, whatever the policy.
func (v *verifier) checkClaims(c claims) error {
	if c["iss"] != v.issuer {
		return fmt.Errorf("claim iss is %s, expected %s", c.show("iss"), v.issuer)
	}
	// One audience, as a string or alone in a list (RFC 7519, section 4.1.3). The
	// other audience of a token for two could replay it.
	audience := c["aud"]
	if list, ok := audience.([]any); ok && len(list) == 1 {
		audience = list[0]
	}
	if audience != v.audience {
		return fmt.Errorf("claim aud is %s, expected %s", show(audience), v.audience)
	}
	delete(c, "aud")
	for _, name := range []string{"sub", "repository_owner", "repository_id", "repository_owner_id"} {
		if c.get(name) == "" {
			return fmt.Errorf("claim %s is %s, expected a value", name, c.show(name))
		}
	}
	repository, ok := strings.CutPrefix(c.get("repository"), c.get("repository_owner")+"/")
	if !ok || repository == "" || strings.Contains(repository, "/") {
		return fmt.Errorf("claim repository is %s, expected a repository of repository_owner %s", c.show("repository"), c.show("repository_owner"))
	}
	return v.checkTimes(c)
}

// checkTimes requires all three times. GitHub's tokens live for 300 s and are
// valid from 300 or 600 s before iat, so iat-nbf is not limited.
func (v *verifier) checkTimes(c claims) error {
	exp, expErr := numericDate(c, "exp")
	nbf, nbfErr := numericDate(c, "nbf")
	iat, iatErr := numericDate(c, "iat")
	if err := cmp.Or(expErr, nbfErr, iatErr); err != nil {
		return err
	}
	now, lifetime := v.now(), exp.Sub(iat)
	switch {
	case lifetime <= 0 || lifetime > maxTokenLifetime:
		return fmt.Errorf("claim exp is %s after iat, expected up to %s", lifetime, maxTokenLifetime)
	case nbf.After(exp):
		return fmt.Errorf("claim nbf is %s after exp", nbf.Sub(exp))
	case !now.Before(exp.Add(clockLeeway)):
		return fmt.Errorf("claim exp: expired %s ago", now.Sub(exp).Round(time.Second))
	case now.Add(clockLeeway).Before(nbf):
		return fmt.Errorf("claim nbf: not valid for another %s", nbf.Sub(now).Round(time.Second))
	case now.Add(clockLeeway).Before(iat):
		return fmt.Errorf("claim iat: %s in the future", iat.Sub(now).Round(time.Second))
	}
	return nil
}

// numericDate reads a NumericDate (RFC 7519, section 2) of the one form that
// GitHub writes: an integer. decodeClaims makes a float64 of any other number.
func numericDate(c claims, name string) (time.Time, error) {
	seconds, ok := c[name].(int64)
	if !ok || seconds <= 0 || seconds > 99999999999 {
		return time.Time{}, fmt.Errorf("claim %s is %s, expected an integer from 1 to 99999999999", name, show(c[name]))
	}
	return time.Unix(seconds, 0), nil
}

// show returns a member of a token for a log line.
func show(value any) string {
	if value == nil {
		return "absent or null"
	}
	return cmp.Or(sanitize(fmt.Sprint(value)), "empty")
}

// ready is nil while tokens can be verified. The last good keys serve for keyGrace.
func (v *verifier) ready() error {
	if set := v.keys.Load(); set == nil || v.now().Sub(set.fetched) > keyGrace {
		return errNoKeys
	}
	return nil
}

// run fetches the keys at once and every keyRefreshInterval, or a keyFetchGap after an
// unknown kid or a failure. It retries sooner while there are no keys.
func (v *verifier) run(ctx context.Context) {
	backoff := wait.Backoff{Duration: time.Second, Factor: 2, Jitter: 0.1, Steps: 9, Cap: keyFetchGap}
	for ctx.Err() == nil {
		gap, refreshIn := keyFetchGap, wait.Jitter(keyRefreshInterval, 0.1)-keyFetchGap
		if err := v.refresh(ctx); err != nil && ctx.Err() == nil {
			keyFetches("error").Inc()
			refreshIn = 0
			if v.keys.Load() == nil {
				gap = backoff.Step()
			}
			v.log.Warn("fetching the issuer's keys failed", "err", err, "issuer", v.issuer, "retry_in", gap)
		}
		sleep(ctx, gap)
		select {
		case <-ctx.Done():
		case <-v.unknownKid:
		case <-time.After(refreshIn):
		}
	}
}

// refresh replaces the keys by those that the issuer publishes now: it revokes a
// key by removing it. A set without usable keys is taken for a fault.
func (v *verifier) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, keyFetchTimeout)
	defer cancel()
	var discovery struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	// OpenID Connect Discovery 1.0, sections 4 and 4.3.
	address := strings.TrimSuffix(v.issuer, "/") + "/.well-known/openid-configuration"
	if err := v.get(ctx, address, &discovery); err != nil {
		return err
	}
	if discovery.Issuer != v.issuer {
		return fmt.Errorf("%s: issuer is %s, expected %s", address, sanitize(discovery.Issuer), v.issuer)
	}
	var jwks struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := v.get(ctx, discovery.JWKSURI, &jwks); err != nil {
		return err
	}
	set := &keySet{byID: map[string]*rsa.PublicKey{}, fetched: v.now()}
	for _, raw := range jwks.Keys {
		if kid, key := parseKey(raw); key != nil && set.byID[kid] == nil {
			set.byID[kid] = key
		}
	}
	if len(set.byID) == 0 {
		return fmt.Errorf("%s: none of %d keys is usable", discovery.JWKSURI, len(jwks.Keys))
	}
	keyFetches("ok").Inc()
	keysFetchedAt.Set(float64(set.fetched.Unix()))
	if old := v.keys.Swap(set); old == nil || !reflect.DeepEqual(old.byID, set.byID) {
		v.log.Info("fetched the issuer's keys", "issuer", v.issuer, "kids", slices.Sorted(maps.Keys(set.byID)), "skipped", len(jwks.Keys)-len(set.byID))
	}
	return nil
}

// get decodes the JSON document at an address of the issuer.
func (v *verifier) get(ctx context.Context, address string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil || req.URL.Scheme != "https" || req.URL.Host == "" {
		return fmt.Errorf("the issuer's address is %s, expected an https URL", sanitize(address))
	}
	resp, err := v.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: status %s", address, sanitize(resp.Status))
	}
	if err := josejson.NewDecoder(io.LimitReader(resp.Body, maxKeyDocument)).Decode(into); err != nil {
		return fmt.Errorf("%s: %s", address, sanitize(err.Error()))
	}
	return nil
}

// parseKey returns nil for a key that is not usable. It must not spoil the others
// (RFC 7517, section 5), and go-jose decodes a whole set or nothing.
func parseKey(raw json.RawMessage) (kid string, key *rsa.PublicKey) {
	var jwk jose.JSONWebKey
	err := jwk.UnmarshalJSON(raw)
	if err != nil || jwk.KeyID == "" || cmp.Or(jwk.Use, "sig") != "sig" || cmp.Or(jwk.Algorithm, "RS256") != "RS256" {
		return "", nil
	}
	key, ok := jwk.Key.(*rsa.PublicKey)
	if !ok || key.N.BitLen() < 2048 || key.N.BitLen() > 4096 || key.N.Bit(0) == 0 ||
		key.E < 65537 || key.E > 1<<31-1 || key.E%2 == 0 { // FIPS 186-5, and the limit of crypto/rsa
		return "", nil
	}
	return jwk.KeyID, key
}
