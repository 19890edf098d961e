package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const maxExplainBytes = 64 << 10 // of a token, or of claims with comfortable blanks

// errDenied means that explain has printed why web would deny a request.
var errDenied = errors.New("denied")

// tokenRE finds base64url of a JSON object, which is how a token begins.
var tokenRE = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{20,}`)

func runExplain(_ context.Context, args []string, getenv func(string) string, stdout, _ io.Writer) error {
	return explain(args, getenv, os.Stdin, stdout)
}

// explain prints what web would decide on a job with these claims that asks for
// these images. No output and no error repeats a token.
func explain(args []string, getenv func(string) string, stdin io.Reader, stdout io.Writer) error {
	if slices.ContainsFunc(args, tokenRE.MatchString) { // before errors repeat it
		return usageError{errors.New("an argument holds a token; give it on standard input, where no list of processes shows it")}
	}
	var images []string
	c := claims{}
	cfg := &policyConfig{}
	flags := flag.NewFlagSet("explain", flag.ContinueOnError)
	flags.Func("claim", "name=value, a claim of the job; repeated for several; standard input is not read then", func(v string) error {
		name, value, ok := strings.Cut(v, "=")
		if c[name] = value; !ok {
			return errors.New("expected name=value")
		}
		return nil
	})
	flags.Func("image", "image that the job asks for, with its tag; repeated or separated by commas for several", func(v string) (err error) {
		for s := range strings.SplitSeq(v, ",") {
			image, wrong := parseImage(strings.TrimSpace(s))
			images, err = append(images, image), cmp.Or(err, wrong)
		}
		return err
	})
	var help strings.Builder
	flags.VisitAll(func(f *flag.Flag) { fmt.Fprintf(&help, "--%-7s %s\n", f.Name, f.Usage) })
	err := parseFlags(flags, cfg, args, getenv)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, "usage: kuberollouttrigger explain --image IMAGE [flags]\n\nReads a token, or a JSON object of claims, from standard input.\n\n"+
			"%s\nA flag overrides the variable of the same name.\n\n", &help)
		printOptions(stdout, cfg.options())
		return nil
	}
	if err == nil && len(images) == 0 {
		err = errors.New("--image is missing; expected an image with its tag, such as ghcr.io/acme/api:dev")
	}
	if err == nil && len(c) == 0 {
		c, err = readClaims(stdin)
	}
	if err != nil {
		return usageError{err}
	}
	return printDecision(cfg, c, images, stdout)
}

// readClaims reads a token, which it only decodes, or a JSON object of claims.
func readClaims(stdin io.Reader) (claims, error) {
	text, err := io.ReadAll(io.LimitReader(stdin, maxExplainBytes))
	payload := bytes.TrimSpace(text)
	if signed, err := jose.ParseSignedCompact(string(payload), signatureAlgorithms); err == nil {
		payload = signed.UnsafePayloadWithoutVerification()
	}
	c, wrong := decodeClaims(payload)
	if err = cmp.Or(err, wrong); err != nil {
		return nil, fmt.Errorf("standard input has neither a token nor a JSON object of claims: %w", err)
	}
	if tokenRE.MatchString(c.get("value")) {
		return nil, errors.New("standard input has a token in the member value, as GitHub answers a job; give the token alone")
	}
	return c, nil
}

// printDecision asks what web.answer asks, in the same order. web stops at the
// first denial; explain prints the rest as well.
func printDecision(cfg *policyConfig, c claims, images []string, w io.Writer) error {
	line := func(name, text string) { fmt.Fprintf(w, "%-13s %s\n", name, text) }
	verdict := func(name string, reason error) {
		text := "yes"
		if reason != nil {
			text = "no: " + reason.Error()
		}
		line(name, text)
	}
	var claimsDenial, prefixDenial error
	line("token", "not verified, anybody could have written these claims")
	if c["iss"] != nil { // as of iat, because by now a token has usually expired
		iat, _ := numericDate(c, "iat")
		audience := cmp.Or(cfg.Audience, c.get("aud"))
		v := &verifier{issuer: cfg.Issuer, audience: audience, now: func() time.Time { return iat }}
		if claimsDenial = v.checkClaims(c); claimsDenial != nil {
			verdict("claims", claimsDenial)
		}
	}
	line("job", fmt.Sprintf("repository is %s, event_name is %s, ref is %s", c.show("repository"), c.show("event_name"), c.show("ref")))
	verdict("owner", cfg.checkOwner(c))
	if i := slices.IndexFunc(images, func(image string) bool { return !cfg.ImagePrefixes.allows(image) }); i >= 0 {
		prefixDenial = fmt.Errorf("%s is under none of %s", images[i], strings.Join(cfg.ImagePrefixes, ", "))
	}
	verdict("prefix", prefixDenial)
	for _, r := range cfg.rules() {
		verdict(r.name, r.explain(c, images))
	}
	if denial := cmp.Or(claimsDenial, cfg.checkClaims(c), prefixDenial, cfg.checkImages(c, images)); denial != nil {
		line("answer", "denied: "+denial.Error())
		return errDenied
	}
	line("answer", "allowed, if the token is valid")
	return nil
}

// explain says what of the rule does not match.
func (r *rule) explain(c claims, images []string) error {
	if unmet := r.unmetCondition(c); unmet != nil {
		return fmt.Errorf("%s is %s, expected %s", unmet.claim, c.show(unmet.claim), unmet.values.join())
	}
	if n := r.countAllowed(c, images); n < len(images) {
		return fmt.Errorf("the claims match, but %s is none of %s", images[n], r.images.expand(c).join())
	}
	return nil
}
