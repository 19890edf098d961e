package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

var explainEnv = map[string]string{"GITHUB_ALLOWED_ORG": "acme", "ALLOWED_IMAGE_PREFIX": "ghcr.io/acme"}

// noIssuer fails the test when something is fetched.
func noIssuer(t *testing.T) *http.Client {
	return &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		t.Errorf("%s was fetched", r.URL)
		return nil, errors.New("no network")
	})}
}

// askExplain runs explain; changes of the variables come in pairs.
func askExplain(t *testing.T, issuer *http.Client, stdin string, changes map[string]string, args ...string) (string, error) {
	t.Helper()
	vars := maps.Clone(explainEnv)
	maps.Copy(vars, changes)
	var out bytes.Buffer
	err := explain(t.Context(), args, env(vars), strings.NewReader(stdin), &out, issuer)
	return out.String(), err
}

const explainPolicy = `
- claims: {event_name: [push, workflow_dispatch], ref: refs/heads/main}
  images: ["ghcr.io/{repository}:dev", "ghcr.io/{repository_owner}/r{repository_id}:*"]
- claims: {environment: production}
  images: ["ghcr.io/{repository}:v*"]
`

const (
	explainUnverified = "token         not verified: anybody could have written these claims\n"
	explainEvents     = `"push"|"workflow_dispatch"|"repository_dispatch"|"release"|"schedule"|"registry_package"|"deployment"`
	explainMain       = `{"repository": "Acme/API", "repository_owner": "Acme", "repository_owner_id": "9919", "repository_id": "812345678", "event_name": "push", "ref": "refs/heads/main"}`
	explainJob        = explainUnverified + `job           repository is "Acme/API", event_name is "push", ref is "refs/heads/main"
owner         yes: repository_owner is "Acme", repository_owner_id is "9919" (allowed: acme; ids: any)
`
)

// TestExplain holds every line that explain can print.
func TestExplain(t *testing.T) {
	for _, tt := range []struct {
		name, stdin string
		vars        map[string]string
		args        []string
		want        string
		denied      bool
	}{
		{"allowed", explainMain, map[string]string{"TRUST_POLICY": explainPolicy}, []string{"--image", "ghcr.io/acme/api:dev"}, explainJob + `
request       ghcr.io/acme/api:dev
prefix        yes (allowed: ghcr.io/acme)
rule 1        yes: event_name="push"|"workflow_dispatch" ref="refs/heads/main" may restart "ghcr.io/{repository}:dev"|"ghcr.io/{repository_owner}/r{repository_id}:*"
rule 2        no: environment is absent or not a string, expected "production"
answer        allowed by rule 1, if the token is valid
`, false},
		{"the first of two rules", explainMain, map[string]string{"TRUST_POLICY": "- {claims: {ref: refs/heads/x}, images: ['*']}\n- {claims: {ref: 'refs/*'}, images: ['*:d*']}\n- {claims: {ref: 'refs/*'}, images: ['*:dev']}"},
			[]string{"--image", "ghcr.io/acme/api:dev"}, explainJob + `
request       ghcr.io/acme/api:dev
prefix        yes (allowed: ghcr.io/acme)
rule 1        no: ref is "refs/heads/main", expected "refs/heads/x"
rule 2        yes: event_name=` + explainEvents + ` ref="refs/*" may restart "*:d*"
rule 3        yes: event_name=` + explainEvents + ` ref="refs/*" may restart "*:dev"
answer        allowed by rule 2, if the token is valid
`, false},
		{"by the default rule", explainMain, nil, []string{"-image=ghcr.io/acme/api:dev"}, explainJob + `
request       ghcr.io/acme/api:dev
prefix        yes (allowed: ghcr.io/acme)
default rule  yes: event_name=` + explainEvents + ` may restart "*"
answer        allowed by default rule, if the token is valid
`, false},
		{"another image, patterns expanded", explainMain, map[string]string{"TRUST_POLICY": explainPolicy}, []string{"--image", "ghcr.io/acme/api:v1"}, explainJob + `
request       ghcr.io/acme/api:v1
prefix        yes (allowed: ghcr.io/acme)
rule 1        no: the claims match, but ghcr.io/acme/api:v1 is none of "ghcr.io/acme/api:dev"|"ghcr.io/acme/r812345678:*"
rule 2        no: environment is absent or not a string, expected "production"
answer        denied, 403: this job may not restart ghcr.io/acme/api:v1
`, true},
		{"several images and names", explainMain, map[string]string{"TRUST_POLICY": explainPolicy},
			[]string{"--image", "ghcr.io/acme/api:dev, ghcr.io/acme/r812345678:x", "--image", "ghcr.io/acme/api:next"}, explainJob + `
request       ghcr.io/acme/api:dev ghcr.io/acme/api:next
prefix        yes (allowed: ghcr.io/acme)
rule 1        no: the claims match, but ghcr.io/acme/api:next is none of "ghcr.io/acme/api:dev"|"ghcr.io/acme/r812345678:*"
rule 2        no: environment is absent or not a string, expected "production"
answer        denied, 403: this job may not restart ghcr.io/acme/api:next, or not together with ghcr.io/acme/api:dev

request       ghcr.io/acme/r812345678:x
prefix        yes (allowed: ghcr.io/acme)
rule 1        yes: event_name="push"|"workflow_dispatch" ref="refs/heads/main" may restart "ghcr.io/{repository}:dev"|"ghcr.io/{repository_owner}/r{repository_id}:*"
rule 2        no: environment is absent or not a string, expected "production"
answer        allowed by rule 1, if the token is valid
`, true},
		{"names that begin alike", explainMain, nil, []string{"--image=ghcr.io/acme/api-x:dev,ghcr.io/acme/api:dev"}, explainJob + `
request       ghcr.io/acme/api-x:dev
prefix        yes (allowed: ghcr.io/acme)
default rule  yes: event_name=` + explainEvents + ` may restart "*"
answer        allowed by default rule, if the token is valid

request       ghcr.io/acme/api:dev
prefix        yes (allowed: ghcr.io/acme)
default rule  yes: event_name=` + explainEvents + ` may restart "*"
answer        allowed by default rule, if the token is valid
`, false},
		{"a claim that is no string, and an absent one in a placeholder", `{"repository":"acme/api","repository_owner":"acme","repository_owner_id":9919,"repository_id":812345678,"event_name":"push","ref":"refs/heads/main"}`,
			map[string]string{"TRUST_POLICY": explainPolicy}, []string{"--image", "ghcr.io/acme/r812345678:x"}, explainUnverified + `job           repository is "acme/api", event_name is "push", ref is "refs/heads/main"
owner         yes: repository_owner is "acme", repository_owner_id is absent or not a string (allowed: acme; ids: any)

request       ghcr.io/acme/r812345678:x
prefix        yes (allowed: ghcr.io/acme)
rule 1        no: the claims match, but ghcr.io/acme/r812345678:x is none of "ghcr.io/acme/api:dev"|"ghcr.io/{repository_owner}/r{repository_id}:*"
rule 2        no: environment is absent or not a string, expected "production"
answer        denied, 403: this job may not restart ghcr.io/acme/r812345678:x
`, true},
		{"claims as flags, the event is no default one", "not read", map[string]string{"TRUST_POLICY": explainPolicy},
			[]string{"--image=ghcr.io/acme/api:v1", "--claim=repository=acme/api", "--claim", "repository_owner=acme", "--claim=event_name=pull_request", "--claim=ref=refs/pull/1/merge", "--claim=environment=production"},
			explainUnverified + `job           repository is "acme/api", event_name is "pull_request", ref is "refs/pull/1/merge"
owner         yes: repository_owner is "acme", repository_owner_id is absent or not a string (allowed: acme; ids: any)

request       ghcr.io/acme/api:v1
prefix        yes (allowed: ghcr.io/acme)
rule 1        no: event_name is "pull_request", expected "push"|"workflow_dispatch"
rule 2        no: event_name is "pull_request", expected a default event, ` + explainEvents + `
answer        denied, 403: no job with these claims may ask
`, true},
		{"another owner", `{"repository":"acme-evil/api","repository_owner":"acme-evil","repository_owner_id":"9919","event_name":"push"}`,
			map[string]string{"GITHUB_ALLOWED_ORG": "acme,shop"}, []string{"--image", "ghcr.io/acme/api:dev"}, explainUnverified + `job           repository is "acme-evil/api", event_name is "push", ref is absent or not a string
owner         no: repository_owner is "acme-evil", none of GITHUB_ALLOWED_ORG (allowed: acme, shop; ids: any)

request       ghcr.io/acme/api:dev
prefix        yes (allowed: ghcr.io/acme)
default rule  yes: event_name=` + explainEvents + ` may restart "*"
answer        denied, 403: no job with these claims may ask
`, true},
		{"another owner's id, and another prefix", explainMain, map[string]string{"ALLOWED_IMAGE_PREFIX": "ghcr.io/acme/web,docker.io/acme"},
			[]string{"--image=ghcr.io/acme/api:dev", "--github-allowed-org-id=1,2"}, explainUnverified + `job           repository is "Acme/API", event_name is "push", ref is "refs/heads/main"
owner         no: repository_owner_id is "9919", none of GITHUB_ALLOWED_ORG_ID (allowed: acme; ids: 1, 2)

request       ghcr.io/acme/api:dev
prefix        no: ghcr.io/acme/api:dev (allowed: ghcr.io/acme/web, docker.io/acme)
default rule  yes: event_name=` + explainEvents + ` may restart "*"
answer        denied, 403: no job with these claims may ask
`, true},
		{"another prefix", explainMain, nil, []string{"--image=ghcr.io/acme-evil/api:dev"}, explainJob + `
request       ghcr.io/acme-evil/api:dev
prefix        no: ghcr.io/acme-evil/api:dev (allowed: ghcr.io/acme)
default rule  yes: event_name=` + explainEvents + ` may restart "*"
answer        denied, 403: ghcr.io/acme-evil/api:dev is under none of the prefixes
`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := askExplain(t, noIssuer(t), tt.stdin, tt.vars, tt.args...)
			if out != tt.want || errors.Is(err, errDenied) != tt.denied || err != nil && !tt.denied {
				t.Errorf("error %v\n%s\nwant\n%s", err, out, tt.want)
			}
		})
	}
}

func TestExplainVerify(t *testing.T) {
	issuer := newTestIssuer(t)
	vars := map[string]string{"GITHUB_OIDC_ISSUER": issuer.URL, "GITHUB_OIDC_AUDIENCE": testAudience}
	now := time.Now().Unix()
	with := func(changes map[string]any) string { return issuer.token(t, issuer.claimsWith(changes)) }
	header := func(name string, value any) string {
		h := issuer.header()
		h[name] = value
		return issuer.sign(t, h, jsonBytes(t, issuer.claims()))
	}
	good := with(nil)
	rules := `
request       ghcr.io/acme/api:dev
prefix        yes (allowed: ghcr.io/acme)
default rule  yes: event_name=` + explainEvents + ` may restart "*"
`
	for _, tt := range []struct {
		name, token   string
		changes       map[string]string
		first, answer string
	}{
		{"good", good + "\n", nil, "verified: signed by \"" + issuer.URL + "\" for \"" + testAudience + "\", and valid now", "allowed by default rule"},
		{"signature", good[:len(good)-10] + "AAAAAAAAAA", nil, "not valid: signature: not made with key", "denied, 401: the token is not valid"},
		{"audience", good, map[string]string{"GITHUB_OIDC_AUDIENCE": "https://other.example.com"}, "not valid: claim aud: ", "denied, 401"},
		{"issuer", with(map[string]any{"iss": "https://evil.example.com"}), nil, "not valid: claim iss: ", "denied, 401"},
		{"expired", with(map[string]any{"exp": now - 3600, "iat": now - 3900, "nbf": now - 4200}), nil, "not valid: claim exp: expired 1h0m", "denied, 401"},
		{"incoherent", with(map[string]any{"repository": "evil/api"}), nil, "not valid: claim repository: ", "denied, 401"},
		{"expired, and another owner's", with(map[string]any{"exp": now - 3600, "iat": now - 3900, "nbf": now - 4200, "repository": "evil/api", "repository_owner": "evil"}), nil,
			"not valid: claim exp: expired 1h0m", "denied, 401"},
		{"kid", header("kid", "unknown"), nil, `not valid: header: kid "unknown" is none of the issuer's`, "denied, 401"},
		{"algorithm", header("alg", "RS384"), nil, `not valid: header: alg is "RS384"`, "denied, 401"},
		{"another issuer's keys", good, map[string]string{"GITHUB_OIDC_ISSUER": issuer.URL + "/other"}, "not verified: fetching the issuer's keys: " + issuer.URL, "denied, 503"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			changes := maps.Clone(vars)
			maps.Copy(changes, tt.changes)
			out, err := askExplain(t, issuer.client(), tt.token, changes, "--verify", "--image=ghcr.io/acme/api:dev")
			denied := tt.name != "good"
			if !strings.HasPrefix(out, "token         "+tt.first) || !strings.Contains(out, rules+"answer        "+tt.answer) ||
				denied && !errors.Is(err, errDenied) || !denied && err != nil || strings.Contains(out, "if the token is valid") {
				t.Errorf("error %v\n%s", err, out)
			}
			noToken(t, tt.token, out)
		})
	}

	t.Run("what is wrong without keys is no fault of theirs", func(t *testing.T) {
		out, err := askExplain(t, noIssuer(t), header("alg", "RS384"), vars, "--verify", "--image=ghcr.io/acme/api:dev")
		if !errors.Is(err, errDenied) || !strings.Contains(out, "denied, 401") {
			t.Errorf("error %v\n%s", err, out)
		}
	})
	for _, tt := range []struct {
		name, stdin, audience string
		allowed               bool
		first                 string
	}{
		{"only decoded", good[:len(good)-10] + "AAAAAAAAAA", testAudience, true, explainUnverified},
		{"no audience to compare with", good, "", true, explainUnverified},
		{"expired since", with(map[string]any{"exp": now - 3600, "iat": now - 3900, "nbf": now - 4200}), testAudience, true, explainUnverified},
		{"for another audience", good, "https://other.example.com", false, "token         not valid: claim aud: "},
		{"claims of another issuer", `{"iss":"https://evil.example.com","repository_owner":"acme","event_name":"push"}`, testAudience, false, "token         not valid: claim iss: "},
		{"some claims", `{"repository_owner":"acme","event_name":"push"}`, testAudience, true, explainUnverified},
	} {
		t.Run(tt.name, func(t *testing.T) {
			vars := map[string]string{"GITHUB_OIDC_ISSUER": issuer.URL, "GITHUB_OIDC_AUDIENCE": tt.audience}
			out, err := askExplain(t, noIssuer(t), tt.stdin, vars, "--image=ghcr.io/acme/api:dev")
			answer := map[bool]string{true: "allowed by default rule, if the token is valid\n", false: "denied, 401: the token is not valid\n"}[tt.allowed]
			if (err == nil) != tt.allowed || !strings.HasPrefix(out, tt.first) || !strings.Contains(out, "answer        "+answer) {
				t.Errorf("error %v\n%s", err, out)
			}
			noToken(t, good, out)
		})
	}
}

// noToken fails if a piece of the token is in text.
func noToken(t *testing.T, token, text string) {
	t.Helper()
	const piece = 16
	for i := 0; i+piece <= len(token); i++ {
		if strings.Contains(text, token[i:i+piece]) {
			t.Errorf("a piece of the token is in %q", text)
			return
		}
	}
}

// TestExplainUsage: what is not a question is neither allowed nor denied, and a
// token is not repeated wherever it is put by mistake.
func TestExplainUsage(t *testing.T) {
	issuer := newTestIssuer(t)
	token := issuer.token(t, issuer.claims())
	const image = "--image=ghcr.io/acme/api:dev"
	const neither = "standard input has neither a token nor a JSON object of claims: "
	parts := strings.Split(token, ".")
	for _, tt := range []struct {
		name, stdin string
		vars        map[string]string
		args        []string
		want        string
	}{
		{"nothing", "", map[string]string{"GITHUB_ALLOWED_ORG": "", "ALLOWED_IMAGE_PREFIX": ""}, nil,
			"missing required configuration: ALLOWED_IMAGE_PREFIX (--allowed-image-prefix), GITHUB_ALLOWED_ORG (--github-allowed-org)"},
		{"no image", token, nil, nil, "--image is missing"},
		{"empty image", token, nil, []string{"--image="}, `--image: image "" is not a valid reference`},
		{"image without a tag", token, nil, []string{"--image=ghcr.io/acme/api"}, "--image: image \"ghcr.io/acme/api\" has no tag"},
		{"image with a digest", token, nil, []string{"--image=ghcr.io/acme/api@sha256:" + strings.Repeat("0", 64)}, "has a digest"},
		{"the second image", token, nil, []string{image + ",Acme:dev"}, "must be in lower case"},
		{"too many tags", token, nil, []string{"--image", strings.Repeat("ghcr.io/acme/api:dev,", maxTags) + "ghcr.io/acme/api:x"}, "--image: more than 32 tags of one name"},
		{"a policy that means nothing", token, map[string]string{"TRUST_POLICY": "x"}, []string{image}, "TRUST_POLICY (--trust-policy): line 1: no rules"},
		{"an option of web alone", token, nil, []string{image, "--web-listen-addr=:1"}, "flag provided but not defined: -web-listen-addr"},
		{"the answer of a runner", `{"count":1,"value":"` + token + `"}`, nil, []string{image}, "standard input has a token in the member value"},
		{"a word", token, nil, []string{image, "now"}, "unexpected argument; write --name=value, and see kuberollouttrigger explain -h"},
		{"a claim without value", token, nil, []string{image, "--claim=ref"}, "expected name=value"},
		{"verify without a token", "{}", nil, []string{image, "--verify"}, "--verify needs a token"},
		{"verify with claims as flags", token, nil, []string{image, "--verify", "--claim=ref=x"}, "--verify needs a token"},
		{"verify without audience", token, nil, []string{image, "--verify"}, "--verify needs GITHUB_OIDC_AUDIENCE (--github-oidc-audience)"},

		{"empty", "", nil, []string{image}, neither + `"token: 1 segments, expected 3"`},
		{"a word on standard input", "claims.json", nil, []string{image}, neither + `"token: 2 segments, expected 3"`},
		{"Bearer", "Bearer " + token, nil, []string{image}, neither + `"header: not strict base64url"`},
		{"two tokens", token + "\n" + token, nil, []string{image}, neither + `"token: 5 segments, expected 3"`},
		{"half a token", token[:len(token)/3], nil, []string{image}, neither},
		{"no signature", parts[0] + "." + parts[1], nil, []string{image}, neither + `"token: 2 segments, expected 3"`},
		{"a payload that is no object", parts[0] + "." + b64([]byte(`["`+parts[1]+`"]`)) + "." + parts[2], nil, []string{image}, neither},
		{"a token in JSON that is broken", `{"value":"` + token + `"`, nil, []string{image}, neither},
		{"claims twice", `{"ref":"a","ref":"b"}`, nil, []string{image}, neither},
		{"more than it reads", `{"ref":"` + strings.Repeat("a", maxExplainBytes) + `"}`, nil, []string{image}, neither},

		{"a token as an argument", "", nil, []string{image, token}, "an argument holds a token; give it on standard input"},
		{"a token as the image", "", nil, []string{"--image", token}, "an argument holds a token"},
		{"a token as a claim", "", nil, []string{image, "--claim", "token=" + token}, "an argument holds a token"},
		{"a token to verify", "", nil, []string{image, "--verify=" + token}, "an argument holds a token"},
		{"a header with a token", "", nil, []string{image, "Authorization: Bearer " + token}, "an argument holds a token"},
		{"a token before help", "", nil, []string{"-h", token}, "an argument holds a token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := askExplain(t, noIssuer(t), tt.stdin, tt.vars, tt.args...)
			if usage := (usageError{}); !errors.As(err, &usage) || !strings.Contains(err.Error(), tt.want) || out != "" {
				t.Fatalf("%v, want %s\n%s", err, tt.want, out)
			}
			noToken(t, token, err.Error())
		})
	}
}

// A terminal is no place for what a stranger may have written.
func TestExplainEscapes(t *testing.T) {
	nasty := "\x1b[2J\r\n\u202eacme\u2028\x00" + strings.Repeat("x", 5000)
	c := claims{"repository": "acme/" + nasty, "repository_owner": "acme", "repository_owner_id": nasty, "event_name": "push", "ref": nasty, "environment": nasty}
	for _, trust := range []string{explainPolicy, "- {claims: {ref: '*'}, images: ['ghcr.io/{repository}:dev']}", ""} {
		for _, owner := range []string{"acme", nasty} {
			c["repository_owner"] = owner
			out, err := askExplain(t, noIssuer(t), string(jsonBytes(t, c)), map[string]string{"TRUST_POLICY": trust}, "--image=ghcr.io/acme/api:dev")
			if err != nil && !errors.Is(err, errDenied) {
				t.Fatal(err)
			}
			if strings.ContainsFunc(out, func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) {
				t.Errorf("not printable ASCII: %q", out)
			}
			for line := range strings.Lines(out) {
				if len(line) > 600 {
					t.Errorf("%d bytes in a line: %q", len(line), line)
				}
			}
		}
	}
}

// TestExplainAgreesWithWeb: for jobs, images and policies out of a pool, web
// answers a request as explain says it will, and says the same of the image.
func TestExplainAgreesWithWeb(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	issuer := newTestIssuer(t)
	v := newTestVerifier(t, issuer)
	now := time.Now().Unix()
	// The first of each list is likely, so that what is allowed is not rare.
	pick := func(list ...any) any {
		if rnd.IntN(4) > 0 {
			return list[0]
		}
		return list[rnd.IntN(len(list))]
	}
	trusts := []string{"", designPolicy, explainPolicy,
		"- {claims: {event_name: '*'}, images: ['ghcr.io/{repository}:*']}",
		"- {claims: {event_name: [push, pull_request], ref: 'refs/*'}, images: ['*:dev']}\n- {claims: {repository_id: '812345678'}, images: ['*:v*', '*:dev']}",
		"- {claims: {environment: '*', ref: ['refs/heads/*', '']}, images: ['ghcr.io/{repository_owner}/*:*']}",
	}
	statuses := map[int]int{}
	for range 500 {
		trust, ownerIDs := trusts[rnd.IntN(len(trusts))], pick("", "9919", "1,9919", "1").(string)
		prefixes := pick("ghcr.io/acme", "ghcr.io/acme/api,docker.io", "ghcr.io").(string)
		changes := map[string]any{
			"repository": pick("acme/api", "Acme/API", "acme/web", "evil/api", "acme/*"), "repository_owner": pick("acme", "Acme", "evil", "\u212acme"),
			"repository_id": pick("812345678", "1", 812345678, nil), "repository_owner_id": pick("9919", "1", 9919, ""),
			"event_name": pick("push", "pull_request", "pull_request_target", "release", "*", nil), "ref": pick("refs/heads/main", "refs/tags/v1", "refs/pull/1/merge", "", nil),
			"environment": pick("production", "Production", "*", nil, 1), "aud": pick(testAudience, testAudience, testAudience, "other"), "exp": pick(now+300, now+300, now-600),
		}
		if changes["repository"] == "Acme/API" {
			changes["repository_owner"] = "Acme"
		}
		if changes["repository"] == "evil/api" {
			changes["repository_owner"] = "evil"
		}
		token := issuer.token(t, issuer.claimsWith(changes))
		name := pick("ghcr.io/acme/api", "ghcr.io/acme/web", "ghcr.io/acme-evil/api", "docker.io/library/nginx", "ghcr.io/acme/r812345678").(string)
		var tags, images []string
		for range 1 + rnd.IntN(3) {
			tags = append(tags, pick("dev", "v1", "V1", "pr-1").(string))
			images = append(images, name+":"+tags[len(tags)-1])
		}

		vars := map[string]string{"GITHUB_OIDC_ISSUER": issuer.URL, "GITHUB_OIDC_AUDIENCE": testAudience, "TRUST_POLICY": trust, "GITHUB_ALLOWED_ORG_ID": ownerIDs, "ALLOWED_IMAGE_PREFIX": prefixes}
		out, err := askExplain(t, issuer.offline(), token, vars, "--verify", "--image", strings.Join(images, ","))
		if err != nil && !errors.Is(err, errDenied) {
			t.Fatal(err)
		}
		answer := regexp.MustCompile(`(?m)^answer +(allowed by [a-z0-9 ]+|denied, (\d+): (.*))$`).FindStringSubmatch(out)
		if answer == nil || (err == nil) != strings.HasPrefix(answer[1], "allowed") {
			t.Fatalf("error %v and\n%s", err, out)
		}

		cfg := &explainConfig{}
		if err := parseConfig("explain", cfg, nil, func(name string) string { return cmp.Or(vars[name], explainEnv[name]) }); err != nil {
			t.Fatal(err)
		}
		p := mustPolicy(t, cfg.Orgs, cfg.OrgIDs, trust)
		published := false
		h := &web{log: slog.New(slog.DiscardHandler), verifier: v, policy: p, prefixes: cfg.ImagePrefixes,
			publish: func(context.Context, []string) (int64, int64, error) { published = true; return 1, 1, nil }}
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPost, "http://web/event", bytes.NewReader(jsonBytes(t, map[string]any{"image": name, "tags": tags})))
		r.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
		h.ServeHTTP(w, r)
		statuses[w.Code]++

		about := fmt.Sprintf("%v\nwith %v\nweb answers %d %s\nexplain says\n%s", changes, vars, w.Code, w.Body, out)
		want := "202"
		if answer[2] != "" {
			want = answer[2]
		}
		if fmt.Sprint(w.Code) != want || published != (want == "202") {
			t.Fatal(about)
		}
		var told struct{ Error string }
		if json.Unmarshal(w.Body.Bytes(), &told) == nil && strings.HasPrefix(told.Error, "this job may not") && told.Error != answer[3] {
			t.Fatal(about)
		}

		// Without the issuer, all but the signature decides.
		for _, stdin := range []string{token, string(jsonBytes(t, issuer.claimsWith(changes)))} {
			if out, err := askExplain(t, noIssuer(t), stdin, vars, "--image", strings.Join(images, ",")); (err == nil) != (want == "202") {
				t.Fatalf("%v with %v: %v\n%s", changes, vars, err, out)
			}
		}
	}
	t.Logf("web answered %v", statuses)
	for _, code := range []int{202, 401, 403} {
		if statuses[code] < 25 {
			t.Errorf("the pool is one-sided: %v", statuses)
		}
	}
}

// The program itself: exit codes, streams, and nothing but text for people.
func TestExplainProgram(t *testing.T) {
	vars := []string{"GITHUB_ALLOWED_ORG=acme", "ALLOWED_IMAGE_PREFIX=ghcr.io/acme"}
	for _, tt := range []struct {
		args           string
		code           int
		stdout, stderr string
	}{
		{"--image=ghcr.io/acme/api:dev --claim=repository_owner=acme --claim=event_name=push", 0, "answer        allowed by default rule", ""},
		{"--image=ghcr.io/acme/api:dev --claim=repository_owner=evil --claim=event_name=push", 1, "answer        denied, 403", ""},
		{"--image=ghcr.io/acme/api:dev", 2, "", "kuberollouttrigger: standard input has neither"},
		{"--claim=repository_owner=acme", 2, "", "kuberollouttrigger: --image is missing"},
	} {
		stdout, stderr, code := program(t, vars, append([]string{"explain"}, strings.Fields(tt.args)...)...)
		if code != tt.code || !strings.Contains(stdout, tt.stdout) || tt.stdout == "" && stdout != "" || !strings.HasPrefix(stderr, tt.stderr) || tt.stderr == "" && stderr != "" {
			t.Errorf("%s: exit %d\nstdout %s\nstderr %s", tt.args, code, stdout, stderr)
		}
	}
}

// -h and docs/configuration.md have the same flags; the options are held by
// TestDocsOptionTable.
func TestDocsExplainFlags(t *testing.T) {
	var help bytes.Buffer
	if err := explain(t.Context(), []string{"-h"}, env(nil), strings.NewReader(""), &help, noIssuer(t)); err != nil {
		t.Fatal(err)
	}
	own, shared, ok := strings.Cut(help.String(), "\nA flag overrides")
	if !ok || strings.Contains(shared, "--valkey-addr") {
		t.Errorf("-h prints %s", &help)
	}
	for variable, def := range map[string]string{"GITHUB_ALLOWED_ORG": "required", "ALLOWED_IMAGE_PREFIX": "required", "GITHUB_OIDC_AUDIENCE": "none", "TRUST_POLICY": "none"} {
		if !regexp.MustCompile(`(?m)^--\S+ +` + variable + ` +` + def + ` `).MatchString(shared) {
			t.Errorf("-h does not say that %s is %s:\n%s", variable, def, shared)
		}
	}
	var want [][]string
	for _, m := range regexp.MustCompile(`(?m)^(--\S+) +(.*)$`).FindAllStringSubmatch(own, -1) {
		want = append(want, []string{"`" + m[1] + "`", m[2]})
	}
	var got [][]string
	_, section, _ := strings.Cut(readDoc(t, "docs/configuration.md"), "\n## explain\n")
	for _, m := range regexp.MustCompile("(?m)^\\| (`--\\S+`) \\| (.*) \\|$").FindAllStringSubmatch(section, -1) {
		got = append(got, m[1:])
	}
	if len(want) != 3 || !slices.EqualFunc(got, want, slices.Equal) {
		t.Errorf("docs/configuration.md has %q, and the flags are %q", got, want)
	}
}
