package main

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
)

const (
	keyRefreshInterval = 10 * time.Minute
	keyGrace           = 24 * time.Hour // how long the last good keys serve
	keyFetchGap        = 30 * time.Second
	keyFetchTimeout    = 10 * time.Second
	maxKeyDocument     = 1 << 20
)

// errNoKeys: there is nothing to verify tokens with, because the issuer's keys
// were never fetched or are older than keyGrace. It says nothing of the token.
var errNoKeys = errors.New("no usable keys of the issuer")

// keySet is what one fetch brought. It is replaced whole, never changed.
type keySet struct {
	byID    map[string]*rsa.PublicKey
	fetched time.Time
}

// current returns the keys, as long as they may be used.
func (v *verifier) current() (*keySet, error) {
	set := v.keys.Load()
	if set == nil {
		return nil, fmt.Errorf("%w: they were never fetched", errNoKeys)
	}
	if age := v.now().Sub(set.fetched); age > keyGrace {
		return nil, fmt.Errorf("%w: they were last fetched %s ago", errNoKeys, age.Round(time.Second))
	}
	return set, nil
}

// ready is nil while tokens can be verified.
func (v *verifier) ready() error {
	_, err := v.current()
	return err
}

// run fetches the keys until ctx is done: at once, then every
// keyRefreshInterval. When an unknown kid was seen it fetches sooner, but never
// within keyFetchGap of the last time, so a flood of forged kids costs the
// issuer one fetch each keyFetchGap. After a failure it retries with backoff
// while it has no keys, and every keyFetchGap once it has.
func (v *verifier) run(ctx context.Context) {
	backoff := 500 * time.Millisecond
	for {
		gap, rest := keyFetchGap, spread(keyRefreshInterval)-keyFetchGap
		if err := v.refresh(ctx); ctx.Err() != nil {
			return
		} else if err != nil {
			rest = 0
			if v.keys.Load() == nil {
				backoff = min(2*backoff, keyFetchGap)
				gap = spread(backoff)
			}
			v.log.Warn("fetching the issuer's keys failed", "err", err, "issuer", v.issuer, "retry_in", gap)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(gap):
		}
		select {
		case <-ctx.Done():
			return
		case <-v.wanted:
		case <-time.After(rest):
		}
	}
}

// spread varies d by a tenth, so that replicas do not fetch in step.
func spread(d time.Duration) time.Duration { return d - d/10 + rand.N(d/5) }

// refresh replaces the keys by those that the issuer publishes now, or leaves
// them as they are. Removing a key is how an issuer revokes it, so a set that
// was fetched counts as it is; one without usable keys is taken for a fault.
func (v *verifier) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, keyFetchTimeout)
	defer cancel()
	fetched := v.now()

	var discovery struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	// OpenID Connect Discovery 1.0, section 4: one slash, wherever it stood.
	address := strings.TrimSuffix(v.issuer, "/") + "/.well-known/openid-configuration"
	if err := v.get(ctx, address, &discovery); err != nil {
		return err
	}
	if discovery.Issuer != v.issuer { // section 4.3
		return fmt.Errorf("%s: issuer is %s, expected %s", address, quoted(discovery.Issuer), quoted(v.issuer))
	}
	if u, err := url.Parse(discovery.JWKSURI); err != nil || u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf("%s: jwks_uri %s is not an https URL", address, quoted(discovery.JWKSURI))
	}
	var jwks struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := v.get(ctx, discovery.JWKSURI, &jwks); err != nil {
		return err
	}
	set := &keySet{byID: map[string]*rsa.PublicKey{}, fetched: fetched}
	for _, raw := range jwks.Keys {
		if kid, key := parseKey(raw); key != nil && set.byID[kid] == nil {
			set.byID[kid] = key
		}
	}
	if len(set.byID) == 0 {
		return fmt.Errorf("%s: none of %d keys is usable", discovery.JWKSURI, len(jwks.Keys))
	}
	level, same := slog.LevelInfo, func(a, b *rsa.PublicKey) bool { return a.Equal(b) }
	if old := v.keys.Swap(set); old != nil && maps.EqualFunc(old.byID, set.byID, same) {
		level = slog.LevelDebug
	}
	v.log.Log(ctx, level, "fetched the issuer's keys", "issuer", v.issuer,
		"kids", slices.Sorted(maps.Keys(set.byID)), "skipped", len(jwks.Keys)-len(set.byID))
	return nil
}

// get decodes the JSON document at an address of the issuer.
func (v *verifier) get(ctx context.Context, address string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	resp, err := v.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: status %s", address, quoted(resp.Status))
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxKeyDocument+1))
	if err == nil && len(body) > maxKeyDocument {
		err = fmt.Errorf("more than %d bytes", maxKeyDocument)
	}
	if err == nil {
		err = josejson.Unmarshal(body, into)
	}
	if err != nil {
		return fmt.Errorf("%s: %s", address, quoted(err.Error()))
	}
	return nil
}

// parseKey reads one key of a JWKS; nil is one that we cannot use. Each is read
// on its own, because an unknown kind must not spoil the others (RFC 7517,
// section 5) and go-jose decodes a whole set or nothing.
func parseKey(raw json.RawMessage) (kid string, key *rsa.PublicKey) {
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(raw); err != nil {
		return "", nil
	}
	key, ok := jwk.Key.(*rsa.PublicKey)
	if !ok || jwk.KeyID == "" || jwk.Use != "" && jwk.Use != "sig" || jwk.Algorithm != "" && jwk.Algorithm != string(jose.RS256) ||
		key.N.BitLen() < 2048 || key.N.BitLen() > 4096 || key.N.Bit(0) == 0 ||
		key.E < 65537 || key.E > 1<<31-1 || key.E%2 == 0 { // FIPS 186-5, and the limit of crypto/rsa
		return "", nil
	}
	return jwk.KeyID, key
}
