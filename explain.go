package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	josejson "github.com/go-jose/go-jose/v4/json"
)

const maxExplainBytes = 64 << 10 // of a token, or of claims written out at length

// errDenied: explain has printed that web would deny a request, and why.
var errDenied = errors.New("denied")

// tokenRE finds base64url of a JSON object, which is how a token begins.
var tokenRE = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{20,}`)

// question is what explain is asked: would web let a job with this token, or
// with these claims, restart these images?
type question struct {
	cfg      explainConfig
	policy   *policy
	requests [][]string // canonical references; a request has one name and its tags
	claims   claims
	token    string                     // empty: there are only claims
	payload  map[string]json.RawMessage // all that a token says; nil: some claims only
	verify   bool
}

func runExplain(ctx context.Context, args []string, getenv func(string) string, stdout, _ io.Writer) error {
	return explain(ctx, args, getenv, os.Stdin, stdout, http.DefaultClient)
}

// explain is runExplain with standard input and the client that fetches the
// issuer's keys. No output and no error repeats the token.
func explain(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout io.Writer, issuer *http.Client) error {
	// Before anything else, as errors repeat arguments.
	if slices.ContainsFunc(args, tokenRE.MatchString) {
		return usageError{errors.New("an argument holds a token; give it on standard input, where no list of processes shows it")}
	}
	q := question{claims: claims{}}
	var images []string
	fs := flag.NewFlagSet("explain", flag.ContinueOnError)
	fs.Func("image", "image that the job asks for, with its tag; repeated or separated by commas for several", func(v string) error {
		images = append(images, strings.Split(v, ",")...)
		return nil
	})
	fs.Func("claim", "name=value, a claim of the job; repeated for several; standard input is not read then", func(v string) error {
		name, value, ok := strings.Cut(v, "=")
		if !ok {
			return errors.New("expected name=value")
		}
		q.claims[name] = value
		return nil
	})
	fs.BoolVar(&q.verify, "verify", false, "fetch the issuer's keys and verify the token as web does")
	var own strings.Builder
	fs.VisitAll(func(f *flag.Flag) { fmt.Fprintf(&own, "--%-7s %s\n", f.Name, f.Usage) })

	err := parseFlags(fs, &q.cfg, args, getenv)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, "usage: kuberollouttrigger explain --image IMAGE [flags]\n\nReads a token, or a JSON object of claims, from standard input.\n\n%s\nA flag overrides the variable of the same name.\n\n", &own)
		printOptions(stdout, q.cfg.options())
		return nil
	}
	if err == nil {
		q.policy = newPolicy(q.cfg.Orgs, q.cfg.OrgIDs, q.cfg.TrustPolicy)
		err = q.addImages(images)
	}
	if err == nil && len(q.claims) == 0 {
		err = q.readClaims(stdin)
	}
	if err == nil && q.verify && q.token == "" {
		err = errors.New("--verify needs a token; claims alone have no signature")
	} else if err == nil && q.verify && q.cfg.Audience == "" {
		err = errors.New("--verify needs GITHUB_OIDC_AUDIENCE (--github-oidc-audience)")
	}
	if err != nil {
		return usageError{err}
	}
	return q.answer(ctx, stdout, issuer)
}

// addImages makes of images the requests that a job would send.
func (q *question) addImages(images []string) error {
	if len(images) == 0 {
		return errors.New("--image is missing; expected an image with its tag, such as ghcr.io/acme/api:dev")
	}
	for _, s := range images {
		image, err := parseImage(strings.TrimSpace(s))
		if err != nil {
			return fmt.Errorf("--image: %w", err)
		}
		name := image[:strings.LastIndex(image, ":")+1]
		i := slices.IndexFunc(q.requests, func(r []string) bool { return strings.HasPrefix(r[0], name) })
		if i < 0 {
			i, q.requests = len(q.requests), append(q.requests, nil)
		}
		if q.requests[i] = append(q.requests[i], image); len(q.requests[i]) > maxTags {
			return fmt.Errorf("--image: more than %d tags of one name, which web does not take", maxTags)
		}
	}
	return nil
}

// readClaims reads a token or a JSON object of claims.
func (q *question) readClaims(stdin io.Reader) error {
	text, err := io.ReadAll(io.LimitReader(stdin, maxExplainBytes))
	payload := bytes.TrimSpace(text)
	if err == nil && !bytes.HasPrefix(payload, []byte("{")) {
		q.token = string(payload)
		if _, err = parseSegments(q.token); err == nil {
			payload, err = base64.RawURLEncoding.DecodeString(strings.Split(q.token, ".")[1])
		}
	}
	var members map[string]json.RawMessage
	if err == nil {
		err = josejson.Unmarshal(payload, &members)
	}
	if err != nil {
		return fmt.Errorf("standard input has neither a token nor a JSON object of claims: %s", quoted(err.Error()))
	}
	if value, ok := jsonString(members["value"]); ok && tokenRE.MatchString(value) {
		return errors.New("standard input has a token in the member value, as a runner is answered; give the token alone")
	}
	if q.token != "" || members["iss"] != nil {
		q.payload = members
	}
	for name, raw := range members { // as checkClaims does
		if s, ok := jsonString(raw); ok {
			q.claims[name] = s
		}
	}
	return nil
}

// answer prints what web would answer, and all that leads to it. It asks what
// web asks, in web's order: verifier.verify, policy.admit, imagePrefixes.allows,
// policy.allow. web stops at the first denial; the rest is printed all the same.
func (q *question) answer(ctx context.Context, w io.Writer, issuer *http.Client) error {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-13s %s\n", name, fmt.Sprintf(format, args...))
	}
	token, denial, proviso := "not verified: anybody could have written these claims", "", ", if the token is valid"
	if q.verify {
		token, denial = q.verifyToken(ctx, issuer)
		proviso = ""
	} else if err := q.checkPayload(); err != nil {
		token, denial = invalid(err)
	}
	c := q.claims
	line("token", "%s", token)
	line("job", "repository is %s, event_name is %s, ref is %s", c.shown("repository"), c.shown("event_name"), c.shown("ref"))
	owner := fmt.Sprintf("yes: repository_owner is %s, repository_owner_id is %s", c.shown("repository_owner"), c.shown("repository_owner_id"))
	if err := q.policy.checkOwner(c); err != nil {
		owner = "no: " + err.Error()
	}
	ids := cmp.Or(strings.Join(q.cfg.OrgIDs, ", "), "any")
	line("owner", "%s (allowed: %s; ids: %s)", owner, strings.Join(q.cfg.Orgs, ", "), ids)
	if q.policy.admit(c) != nil {
		denial = cmp.Or(denial, "403: no job with these claims may ask")
	}

	var result error
	for _, images := range q.requests {
		fmt.Fprintln(w)
		line("request", "%s", strings.Join(images, " "))
		denial, prefix, by := denial, "yes", ""
		if i := slices.IndexFunc(images, func(image string) bool { return !q.cfg.ImagePrefixes.allows(image) }); i >= 0 {
			prefix = "no: " + images[i]
			denial = cmp.Or(denial, "403: "+images[i]+" is under none of the prefixes")
		}
		line("prefix", "%s (allowed: %s)", prefix, strings.Join(q.cfg.ImagePrefixes, ", "))
		for o := range q.policy.outcomes(c, images) {
			line(o.rule.name, "%s", o.explain(c, images))
			if o.allows(images) {
				by = cmp.Or(by, o.rule.name)
			}
		}
		if err := q.policy.allow(c, images); err != nil {
			denial = cmp.Or(denial, "403: "+err.Error())
		}
		if denial == "" {
			line("answer", "allowed by %s%s", by, proviso)
		} else {
			line("answer", "denied, %s", denial)
			result = errDenied
		}
	}
	return result
}

func invalid(err error) (token, denial string) {
	return "not valid: " + sanitize(err.Error()), "401: the token is not valid"
}

// checkPayload makes the verifier's checks that take no keys, at the time of iat:
// by now the token has usually expired.
func (q *question) checkPayload() error {
	if q.payload == nil {
		return nil
	}
	iat, _ := jsonSeconds(q.payload["iat"])
	own, _ := jsonString(q.payload["aud"])
	v := newVerifier(q.cfg.Issuer, cmp.Or(q.cfg.Audience, own), http.DefaultClient, slog.New(slog.DiscardHandler),
		func() time.Time { return time.Unix(iat, 0) })
	_, err := v.checkClaims(q.payload)
	return err
}

// verifyToken asks the verifier as web does, with the issuer's keys of now.
func (q *question) verifyToken(ctx context.Context, issuer *http.Client) (result, denial string) {
	v := newVerifier(q.cfg.Issuer, q.cfg.Audience, issuer, slog.New(slog.DiscardHandler), time.Now)
	c, err := v.verify(q.token)
	if errors.Is(err, errNoKeys) { // nothing is wrong with it that shows without keys
		if err := v.refresh(ctx); err != nil {
			return "not verified: fetching the issuer's keys: " + sanitize(err.Error()), "503: there are no keys to verify the token with"
		}
		c, err = v.verify(q.token)
	}
	if err != nil {
		return invalid(err)
	}
	q.claims = c
	return fmt.Sprintf("verified: signed by %s for %s, and valid now", quoted(q.cfg.Issuer), quoted(q.cfg.Audience)), ""
}

// explain says what of the rule does not match.
func (o *outcome) explain(c claims, images []string) string {
	if o.allows(images) {
		return "yes: " + o.rule.String()
	}
	if !o.admits {
		expected := joinPatterns(o.unmet.values)
		if &o.unmet.values[0] == &defaultCondition.values[0] { // the rule itself names no event
			expected = "a default event, " + expected
		}
		return fmt.Sprintf("no: %s is %s, expected %s", o.unmet.claim, c.shown(o.unmet.claim), expected)
	}
	var patterns []string
	for _, p := range o.rule.images {
		if expanded, ok := p.expand(c); ok {
			p = expanded // else the placeholder stays, as its claim is absent
		}
		patterns = append(patterns, quoted(p.String()))
	}
	return fmt.Sprintf("no: the claims match, but %s is none of %s", images[o.matched], strings.Join(patterns, "|"))
}
