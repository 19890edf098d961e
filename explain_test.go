package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

var explainEnv = map[string]string{"GITHUB_ALLOWED_ORG": "acme", "ALLOWED_IMAGE_PREFIX": "ghcr.io/acme"}

// askExplain runs explain with some variables changed.
func askExplain(t *testing.T, stdin string, changes map[string]string, args ...string) (string, error) {
	t.Helper()
	vars := maps.Clone(explainEnv)
	maps.Copy(vars, changes)
	var out bytes.Buffer
	err := explain(args, env(vars), strings.NewReader(stdin), &out)
	return out.String(), err
}

const explainPolicy = `
- claims: {event_name: [push, workflow_dispatch], ref: refs/heads/main}
  images: ["ghcr.io/{repository}:dev", "ghcr.io/{repository_owner}/r{repository_id}:*"]
- claims: {environment: production}
  images: ["ghcr.io/{repository}:v*"]
`

// TestExplain: every decision, and of each denial the reason.
func TestExplain(t *testing.T) {
	issuer := newTestIssuer(t)
	now := time.Now().Unix()
	token, good := issuer.with, issuer.with(nil)
	const job = `{"repository": "Acme/API", "repository_owner": "Acme", "repository_owner_id": "9919", "repository_id": "812345678", "event_name": "push", "ref": "refs/heads/main"}`
	policy := map[string]string{"TRUST_POLICY": explainPolicy}
	for _, tt := range []struct {
		name, stdin string
		vars        map[string]string
		args        string
		allowed     bool
		want        []string // lines
	}{
		{"allowed by a rule", job, policy, "--image=ghcr.io/acme/api:dev", true, []string{
			"token         not verified, anybody could have written these claims",
			"job           repository is Acme/API, event_name is push, ref is refs/heads/main",
			"owner         yes", "prefix        yes", "rule 1        yes", "rule 2        no: environment is absent or not a string, expected production",
			"answer        allowed, if the token is valid"}},
		{"allowed by default", job, nil, "-image ghcr.io/acme/api:dev", true, []string{"default rule  yes"}},
		{"another image", job, policy, "--image=ghcr.io/acme/api:v1", false, []string{
			"rule 1        no: the claims match, but ghcr.io/acme/api:v1 is none of ghcr.io/acme/api:dev|ghcr.io/acme/r812345678:*",
			"answer        denied: this job may not restart ghcr.io/acme/api:v1"}},
		{"two images, not together", job, policy, "--image=ghcr.io/acme/api:dev --image=ghcr.io/acme/api:x", false, []string{
			"rule 1        no: the claims match, but ghcr.io/acme/api:x is none of ghcr.io/acme/api:dev|ghcr.io/acme/r812345678:*",
			"answer        denied: this job may not restart ghcr.io/acme/api:x, or not together with ghcr.io/acme/api:dev"}},
		{"a claim that is not a string, in a placeholder", strings.Replace(job, `"812345678"`, "812345678", 1), policy, "--image=ghcr.io/acme/r812345678:x", false, []string{
			"rule 1        no: the claims match, but ghcr.io/acme/r812345678:x is none of ghcr.io/acme/api:dev|ghcr.io/acme/r{repository_id}:*"}},
		{"claims as flags, not a default event", "not read", policy,
			"--image=ghcr.io/acme/api:v1 --claim=repository=acme/api --claim repository_owner=acme --claim=event_name=pull_request --claim=environment=production", false, []string{
				"rule 1        no: event_name is pull_request, expected push|workflow_dispatch",
				"rule 2        no: event_name is pull_request, expected push|workflow_dispatch|repository_dispatch|release|schedule|registry_package|deployment",
				"answer        denied: no rule matches the claims: rule 1: event_name is pull_request; rule 2: event_name is pull_request"}},
		{"another owner", strings.ReplaceAll(job, "Acme", "acme-evil"), nil, "--image=ghcr.io/acme/api:dev", false, []string{
			"owner         no: repository_owner is acme-evil, none of GITHUB_ALLOWED_ORG", "default rule  yes", "answer        denied: repository_owner is acme-evil, none of GITHUB_ALLOWED_ORG"}},
		{"another owner's id", job, nil, "--image=ghcr.io/acme/api:dev --github-allowed-org-id=1,2", false, []string{
			"owner         no: repository_owner_id is 9919, none of GITHUB_ALLOWED_ORG_ID"}},
		{"another prefix", job, nil, "--image=ghcr.io/acme-evil/api:dev", false, []string{
			"prefix        no: ghcr.io/acme-evil/api:dev is under none of ghcr.io/acme", "answer        denied: ghcr.io/acme-evil/api:dev is under none of ghcr.io/acme"}},

		{"a token", good + "\n", nil, "--image=ghcr.io/acme/api:dev", true, []string{"token         not verified, anybody could have written these claims"}},
		{"a token with another signature", good[:len(good)-10] + "AAAAAAAAAA", nil, "--image=ghcr.io/acme/api:dev", true, nil},
		{"a token without audience to compare with", good, map[string]string{"GITHUB_OIDC_AUDIENCE": ""}, "--image=ghcr.io/acme/api:dev", true, nil},
		{"a token that has expired since", token(map[string]any{"exp": now - 3600, "iat": now - 3900, "nbf": now - 4200}), nil, "--image=ghcr.io/acme/api:dev", true, nil},
		{"a token for another audience", token(map[string]any{"aud": "other"}), nil, "--image=ghcr.io/acme/api:dev", false, []string{
			"claims        no: claim aud is other, expected " + testAudience, "job           repository is acme/api, event_name is push, ref is refs/heads/main", "default rule  yes",
			"answer        denied: claim aud is other, expected " + testAudience}},
		{"a token without exp", token(map[string]any{"exp": nil}), nil, "--image=ghcr.io/acme/api:dev", false, []string{"claims        no: claim exp is absent or null, expected an integer from 1 to 99999999999"}},
		{"claims of another issuer", `{"iss":"https://evil.example.com","repository_owner":"acme","event_name":"push"}`, nil, "--image=ghcr.io/acme/api:dev", false, []string{
			"claims        no: claim iss is https://evil.example.com, expected " + issuer.URL}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			vars := map[string]string{"GITHUB_OIDC_ISSUER": issuer.URL, "GITHUB_OIDC_AUDIENCE": testAudience}
			maps.Copy(vars, tt.vars)
			out, err := askExplain(t, tt.stdin, vars, strings.Fields(tt.args)...)
			if tt.allowed && err != nil || !tt.allowed && !errors.Is(err, errDenied) {
				t.Errorf("error %v\n%s", err, out)
			}
			for _, line := range tt.want {
				if !strings.Contains("\n"+out, "\n"+line+"\n") {
					t.Errorf("no line %q in\n%s", line, out)
				}
			}
			noToken(t, tt.stdin, out)
		})
	}
}

// noToken fails if a piece of the token is in text.
func noToken(t *testing.T, token, text string) {
	t.Helper()
	const piece = 16
	for i := 0; strings.HasPrefix(token, "eyJ") && i+piece <= len(token); i++ {
		if strings.Contains(text, token[i:i+piece]) {
			t.Fatalf("a piece of the token is in %q", text)
		}
	}
}

// TestExplainUsage: a wrong question is neither allowed nor denied, and repeats no token.
func TestExplainUsage(t *testing.T) {
	issuer := newTestIssuer(t)
	token := issuer.with(nil)
	const image = "--image=" + apiDev
	parts := strings.Split(token, ".")
	check := func(stdin string, vars map[string]string, args []string, want string) {
		t.Helper()
		out, err := askExplain(t, stdin, vars, args...)
		if usage := (usageError{}); !errors.As(err, &usage) || !isError(err, want) || out != "" {
			t.Fatalf("%.60q: %v, want %s\n%s", stdin, err, want, out)
		}
		noToken(t, token, err.Error())
	}
	check("", map[string]string{"GITHUB_ALLOWED_ORG": "", "ALLOWED_IMAGE_PREFIX": ""}, nil,
		"missing required configuration: ALLOWED_IMAGE_PREFIX (--allowed-image-prefix), GITHUB_ALLOWED_ORG (--github-allowed-org)")
	check(token, map[string]string{"TRUST_POLICY": "x"}, []string{image}, "TRUST_POLICY (--trust-policy): line 1: no rules")
	check(`{"count":1,"value":"`+token+`"}`, nil, []string{image}, "standard input has a token in the member value")
	for args, want := range map[string]string{
		"": "--image is missing", "--image=": "is not a valid reference", "--image=ghcr.io/acme/api": "has no tag", image + ",Acme:dev": "the name in lower case",
		image + " --web-listen-addr=:1": "flag provided but not defined: -web-listen-addr", image + " --verify": "flag provided but not defined: -verify",
		image + " now": "kuberollouttrigger explain -h", image + " --claim=ref": "expected name=value",
	} {
		check(token, nil, strings.Fields(args), want)
	}
	for _, stdin := range []string{"", "claims.json", "Bearer " + token, token + "\n" + token, token[:len(token)/3], parts[0] + "." + parts[1],
		parts[0] + "." + b64([]byte(`["`+parts[1]+`"]`)) + "." + parts[2], `{"value":"` + token + `"`, `{"ref":"a","ref":"b"}`,
		`{"ref":"` + strings.Repeat("a", maxExplainBytes) + `"}`} {
		check(stdin, nil, []string{image}, "standard input has neither a token nor a JSON object of claims: ")
	}
	for _, args := range [][]string{{image, token}, {"--image", token}, {image, "--claim", "token=" + token},
		{image, "Authorization: Bearer " + token}, {"-h", token}} {
		check("", nil, args, "an argument holds a token; give it on standard input")
	}
}

// A terminal is no place for what somebody else may have written.
func TestExplainEscapes(t *testing.T) {
	nasty := "\x1b[2J\r\n\u202eacme\u2028\x00" + strings.Repeat("x", 5000)
	c := claims{"repository": "acme/" + nasty, "repository_owner": "acme", "repository_owner_id": nasty, "event_name": "push", "ref": nasty, "environment": nasty}
	for _, trust := range []string{explainPolicy, "- {claims: {ref: '*'}, images: ['ghcr.io/{repository}:dev']}", ""} {
		for _, owner := range []string{"acme", nasty} {
			c["repository_owner"] = owner
			out, err := askExplain(t, string(jsonBytes(c)), map[string]string{"TRUST_POLICY": trust}, "--image=ghcr.io/acme/api:dev")
			if err != nil && !errors.Is(err, errDenied) {
				t.Fatal(err)
			}
			for line := range strings.Lines(out) {
				if len(line) > 900 || strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return r < ' ' || r > '~' }) {
					t.Errorf("not fit for a terminal: %q", line)
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
		vars := map[string]string{"GITHUB_ALLOWED_ORG": "acme", "GITHUB_OIDC_ISSUER": issuer.URL, "GITHUB_OIDC_AUDIENCE": testAudience, "TRUST_POLICY": trusts[rnd.IntN(len(trusts))],
			"GITHUB_ALLOWED_ORG_ID": pick("", "9919", "1,9919", "1").(string), "ALLOWED_IMAGE_PREFIX": pick("ghcr.io/acme", "ghcr.io/acme/api,docker.io", "ghcr.io").(string)}
		changes := map[string]any{
			"repository": pick("acme/api", "Acme/API", "acme/web", "evil/api", "acme/*"), "repository_owner": pick("acme", "Acme", "evil", "\u212acme"),
			"repository_id": pick("812345678", "1", 812345678, nil), "repository_owner_id": pick("9919", "1", 9919, ""),
			"event_name": pick("push", "pull_request", "pull_request_target", "release", "*", nil), "ref": pick("refs/heads/main", "refs/tags/v1", "refs/pull/1/merge", "", nil),
			"environment": pick("production", "Production", "*", nil, 1), "aud": pick(testAudience, testAudience, testAudience, "other"), "exp": pick(now+300, now+300, now-600),
		}
		if owner, _, _ := strings.Cut(changes["repository"].(string), "/"); owner != "acme" {
			changes["repository_owner"] = owner
		}
		name := pick("ghcr.io/acme/api", "ghcr.io/acme/web", "ghcr.io/acme-evil/api", "docker.io/library/nginx", "ghcr.io/acme/r812345678").(string)
		var tags, images []string
		for range 1 + rnd.IntN(3) {
			tags = append(tags, pick("dev", "v1", "V1", "pr-1").(string))
			images = append(images, name+":"+tags[len(tags)-1])
		}
		claims := issuer.claimsWith(changes)
		token := issuer.Token(claims)
		cfg := &policyConfig{}
		if err := parseConfig("explain", cfg, nil, env(vars)); err != nil {
			t.Fatal(err)
		}
		published := false
		h := &web{log: slog.New(slog.DiscardHandler), verifier: v, policy: cfg,
			publish: func(context.Context, []string, int) (publication, error) {
				published = true
				return publication{requestedAt: 1}, nil
			}}
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPost, "http://web/event", bytes.NewReader(jsonBytes(map[string]any{"image": name, "tags": tags})))
		r.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
		h.ServeHTTP(w, r)
		statuses[w.Code]++

		for _, stdin := range []string{token, string(jsonBytes(claims))} {
			out, err := askExplain(t, stdin, vars, "--image", strings.Join(images, ","))
			about := fmt.Sprintf("%v\nwith %v\nweb answers %d %s\nexplain says %v\n%s", changes, vars, w.Code, w.Body, err, out)
			if (err == nil) != (w.Code == http.StatusAccepted) || (err == nil) != published || strings.Contains(out, "\nclaims ") != (w.Code == http.StatusUnauthorized) {
				t.Fatal(about)
			}
			var told struct{ Error string }
			if json.Unmarshal(w.Body.Bytes(), &told) == nil && strings.HasPrefix(told.Error, "this job may not") && !strings.Contains(out, "denied: "+told.Error+"\n") {
				t.Fatal(about)
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
		{"--image=ghcr.io/acme/api:dev --claim=repository_owner=acme --claim=event_name=push", 0, "\nanswer        allowed, if the token is valid\n", ""},
		{"--image=ghcr.io/acme/api:dev --claim=repository_owner=evil --claim=event_name=push", 1, "\nanswer        denied: repository_owner is evil", ""},
		{"--image=ghcr.io/acme/api:dev", 2, "", "kuberollouttrigger: standard input has neither"},
		{"--claim=repository_owner=acme", 2, "", "kuberollouttrigger: --image is missing"},
		{"-h", 0, "\n--claim ", ""}, {"-h", 0, "\n--image ", ""}, {"-h", 0, "--trust-policy ", ""},
	} {
		stdout, stderr, code := program(t, vars, append([]string{"explain"}, strings.Fields(tt.args)...)...)
		if code != tt.code || !strings.Contains(stdout, tt.stdout) || tt.stdout == "" && stdout != "" || !strings.HasPrefix(stderr, tt.stderr) || tt.stderr == "" && stderr != "" {
			t.Errorf("%s: exit %d\nstdout %s\nstderr %s", tt.args, code, stdout, stderr)
		}
	}
}
