package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// jobClaims are the claims of a push to main of acme/api, with changes; "-" removes one.
func jobClaims(changes claims) claims {
	c := claims{
		"repository": "acme/api", "repository_owner": "acme", "repository_id": "812345678", "repository_owner_id": "9919",
		"event_name": "push", "ref": "refs/heads/main", "workflow_ref": "acme/api/.github/workflows/ci.yml@refs/heads/main",
		"job_workflow_ref": "acme/.github/.github/workflows/deploy.yml@refs/tags/v2", "base_ref": "",
	}
	maps.Copy(c, changes)
	maps.DeleteFunc(c, func(_ string, v any) bool { return v == "-" })
	return c
}

func mustPolicy(t testing.TB, orgs, ownerIDs []string, trust string) *policyConfig {
	t.Helper()
	p, err := readPolicy(orgs, ownerIDs, trust)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// readPolicy reads a policy as web does, out of the environment.
func readPolicy(orgs, ownerIDs []string, trust string) (*policyConfig, error) {
	vars := maps.Clone(webEnv)
	vars["GITHUB_ALLOWED_ORG"] = strings.Join(orgs, ",")
	vars["GITHUB_ALLOWED_ORG_ID"] = strings.Join(ownerIDs, ",")
	vars["TRUST_POLICY"] = trust
	cfg := &webConfig{}
	if err := parseConfig("web", cfg, nil, env(vars)); err != nil {
		return nil, err
	}
	return &cfg.policyConfig, nil
}

// isError is true if err says what is wanted; nothing is wanted of no error.
func isError(err error, want string) bool {
	return err == nil && want == "" || err != nil && want != "" && strings.Contains(err.Error(), want)
}

func TestPolicyOwners(t *testing.T) {
	names := mustPolicy(t, []string{"other", "ACME", "kelvin", "sys"}, nil, "")
	ids := mustPolicy(t, []string{"acme"}, []string{"1", "9919"}, "")
	for _, test := range []struct {
		p              *policyConfig
		owner, id, err string
	}{
		{names, "acme", "-", ""}, {names, "AcMe", "1", ""}, {names, "other", "1", ""}, {ids, "acme", "9919", ""}, {ids, "ACME", "1", ""},
		{names, "evil", "9919", "repository_owner is evil, none of GITHUB_ALLOWED_ORG"},
		{names, "acme-evil", "9919", "repository_owner is acme-evil"}, {names, "acm", "9919", "repository_owner is acm"},
		{names, "acme ", "9919", "repository_owner is acme "},
		{names, "\u212aelvin", "9919", `repository_owner is \u212aelvin`}, // a K
		{names, "sy\u017f", "9919", `repository_owner is sy\u017f`},       // an s
		{names, "-", "9919", "repository_owner is absent"}, {names, "", "9919", "repository_owner is empty"},
		{ids, "evil", "9919", "repository_owner is evil"},
		{ids, "acme", "123", "repository_owner_id is 123, none of GITHUB_ALLOWED_ORG_ID"}, // the name was registered again
		{ids, "acme", "09919", "repository_owner_id is 09919"},
		{ids, "acme", "-", "repository_owner_id is absent"},
	} {
		if err := test.p.checkClaims(jobClaims(claims{"repository_owner": test.owner, "repository_owner_id": test.id})); !isError(err, test.err) {
			t.Errorf("%q %q: %v, expected %q", test.owner, test.id, err, test.err)
		}
	}
}

func TestDefaultPolicy(t *testing.T) {
	p := mustPolicy(t, []string{"acme"}, nil, "")
	check := func(admitted bool, events ...string) {
		for _, event := range events {
			c := jobClaims(claims{"event_name": event})
			images := p.checkImages(c, []string{"ghcr.io/acme/api:dev", "docker.io/library/nginx:latest"})
			if err := p.checkClaims(c); (err == nil) != admitted || (images == nil) != admitted {
				t.Errorf("event %q: %v, %v", event, err, images)
			}
		}
	}
	check(true, "push", "workflow_dispatch", "repository_dispatch", "release", "schedule", "registry_package", "deployment")
	check(false, "pull_request", "pull_request_target", "workflow_run", "issue_comment", "issues", "merge_group", "deployment_status",
		"Push", "push ", "", "-", "*")
	if p.checkImages(jobClaims(nil), nil) == nil {
		t.Error("allowed a request without images")
	}
	const defaultEvents = "event_name=push|workflow_dispatch|repository_dispatch|release|schedule|registry_package|deployment"
	got := append(p.describe(), mustPolicy(t, []string{"acme"}, nil, designPolicy).describe()...)
	if want := []string{"default rule: " + defaultEvents + " may restart *",
		"rule 1: event_name=push|workflow_dispatch|release ref=refs/heads/main may restart ghcr.io/{repository}:dev",
		"rule 2: " + defaultEvents + " environment=production may restart ghcr.io/{repository}:v*"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

const designPolicy = `
- claims: {event_name: [push, workflow_dispatch, release], ref: refs/heads/main}
  images: ["ghcr.io/{repository}:dev"]
- claims: {environment: production}
  images: ["ghcr.io/{repository}:v*"]
`

func oneRule(claim, value, image string) string {
	return fmt.Sprintf("- claims: {%s: %q}\n  images: [%q]\n", claim, value, image)
}

func TestTrustPolicy(t *testing.T) {
	const (
		apiV1   = "ghcr.io/acme/api:v1"
		denied  = "this job may not restart "
		noMatch = "no rule matches the claims"
	)
	production := claims{"environment": "production", "ref": "refs/tags/v1", "event_name": "release"}
	preview := oneRule("event_name", "pull_request", "ghcr.io/{repository}:pr-*") + oneRule("ref", "refs/*", "ghcr.io/{repository}:dev")
	for _, test := range []struct {
		trust  string
		claims claims
		images []string
		err    string
	}{
		{designPolicy, nil, []string{apiDev}, ""},
		{designPolicy, claims{"ref": "refs/heads/x"}, []string{apiDev}, "rule 1: ref is refs/heads/x; rule 2: environment is absent"},
		{strings.Repeat(designPolicy, 50), claims{"ref": "x"}, []string{apiDev}, "rule 16: environment is absent or not a string; and 84 more"},
		{designPolicy, nil, []string{apiV1}, denied + apiV1}, {designPolicy, nil, []string{webDev}, denied + webDev},
		{designPolicy, nil, []string{"ghcr.io/acme/api-evil:dev"}, denied}, {designPolicy, nil, []string{"ghcr.io/acme/api:dev2"}, denied},
		{designPolicy, nil, []string{"evil.io/ghcr.io/acme/api:dev"}, denied},
		{designPolicy, nil, []string{apiDev, webDev}, denied + webDev}, {designPolicy, nil, []string{webDev, apiDev}, denied + webDev},
		{designPolicy, production, []string{apiV1, "ghcr.io/acme/api:v1.2.3"}, ""},
		{designPolicy, production, []string{apiDev}, denied},
		// One rule must allow all the images.
		{designPolicy, claims{"environment": "production"}, []string{apiDev, apiV1}, denied + apiV1 + ", or not together with " + apiDev},
		{oneRule("ref", "*", "*:dev") + oneRule("ref", "refs/*", "*:dev"), nil, []string{apiDev, apiV1}, denied + apiV1},
		{designPolicy, claims{"environment": "Production", "ref": "x"}, []string{apiDev}, noMatch},
		// pull_request_target looks like main in every other claim.
		{designPolicy, claims{"event_name": "pull_request_target"}, []string{apiDev},
			"rule 1: event_name is pull_request_target; rule 2: event_name is pull_request_target"},
		{designPolicy, claims{"event_name": "-"}, []string{apiDev}, "rule 1: event_name is absent"},
		// The default events hold for each rule that names none.
		{oneRule("ref", "refs/heads/main", "*"), claims{"event_name": "schedule"}, []string{apiDev}, ""},
		{oneRule("ref", "refs/heads/main", "*"), claims{"event_name": "workflow_run"}, []string{apiDev}, noMatch},
		{preview, claims{"event_name": "pull_request"}, []string{apiDev}, denied},
		{preview, claims{"event_name": "pull_request"}, []string{"ghcr.io/acme/api:pr-1"}, ""},
		// A job meets all the claims of a rule.
		{"- claims: {ref: refs/heads/main, environment: [a, b]}\n  images: ['*']", claims{"environment": "b"}, []string{apiDev}, ""},
		{"- claims: {ref: refs/heads/main, environment: [a, b]}\n  images: ['*']", claims{"environment": "c"}, []string{apiDev}, "environment is c"},
		{oneRule("environment", "*", "*"), nil, []string{apiDev}, "environment is absent"}, {oneRule("run_id", "7", "*"), claims{"run_id": int64(7)}, []string{apiDev}, "run_id is absent or not a string"},
		{oneRule("base_ref", "", "*"), claims{"base_ref": "-"}, []string{apiDev}, "base_ref is absent"},
		// Other ways to write it.
		{"- {claims: {ref: refs/heads/main}, images: '*'}", nil, []string{apiDev}, ""},
		{`[{"claims":{"ref":"refs/heads/main"},"images":["*"]}]`, nil, []string{apiDev}, ""},
		{"# who\n---\n" + designPolicy, nil, []string{apiDev}, ""},
		{"- claims: {environment: [on, no]}\n  images: ['*']", claims{"environment": "no"}, []string{apiDev}, ""},
		{"- claims: &main {ref: refs/heads/main}\n  images: ['ghcr.io/a/b:c']\n- claims: *main\n  images: ['ghcr.io/a/b:d']", nil, []string{"ghcr.io/a/b:d"}, ""},
		{"- &r\n  &i images: &l [&v 'ghcr.io/a/b:c']\n  claims: {&k ref: refs/heads/x}\n- *r\n- claims: {*k : refs/heads/main}\n  images: [*v]",
			nil, []string{"ghcr.io/a/b:c"}, ""},
	} {
		p, c := mustPolicy(t, []string{"acme"}, nil, test.trust), jobClaims(test.claims)
		err, images := p.checkClaims(c), p.checkImages(c, test.images)
		if err != nil && images == nil {
			t.Errorf("%s with %v: allowed and not admitted", test.trust, test.claims)
		}
		if err == nil {
			err = images
		}
		if !isError(err, test.err) {
			t.Errorf("%s with %v: %v, expected %q", test.trust, test.claims, err, test.err)
		}
	}
}

// TestConditions: a claim is matched exactly and whole, and an absent one ("-") never.
func TestConditions(t *testing.T) {
	for test, want := range map[[3]string]bool{ // claim, pattern, value
		{"event_name", "pull_request", "pull_request"}: true, {"event_name", "pull_request", "push"}: false,
		{"event_name", "*", "workflow_run"}: true, {"event_name", "*", "-"}: false,
		{"ref", "refs/heads/main", "refs/heads/main2"}: false, {"repository_id", "812345678", "812345678"}: true,
		{"environment", "prod", "non-prod"}: false, {"environment", "prod", "prod\n"}: false, {"environment", "k", "\u212a"}: false,
		{"environment", "a|b", "a"}: false, {"environment", "a.b", "axb"}: false, {"environment", "a?", "ab"}: false, {"environment", "ab", "*"}: false,
		{"ref", "refs/heads/release/*", "refs/heads/release/1/2"}: true, {"ref", "refs/heads/release/*", "refs/heads/release/"}: true,
		{"job_workflow_ref", "acme/.github/*.yml@refs/tags/v*", "acme/.github/.github/workflows/deploy.yml@refs/tags/v2"}: true,
		// A branch or a file may have an @ in its name. It is not the one of the pattern.
		{"job_workflow_ref", "acme/x/*@refs/heads/main", "acme/x/mine.yml@refs/heads/evil@refs/heads/main"}: false,
		{"workflow_ref", "*@refs/heads/main", "acme/x/mine.yml@refs/heads/evil@refs/heads/main"}:            false,
		{"job_workflow_ref", "acme/x/*@refs/*", "acme/x/mine.yml@refs/heads/evil@refs/heads/main"}:          false,
		{"job_workflow_ref", "acme/x/d.yml@*", "acme/x/d.yml@2.yml@refs/heads/main"}:                        false,
		{"job_workflow_ref", "acme/x/*@*@2", "acme/x/d.yml@refs/heads/release@2"}:                           true,
		{"job_workflow_ref", "acme/x/*", "acme/x/mine.yml@refs/heads/evil@refs/heads/main"}:                 true,
		{"ref", "refs/heads/*/2", "refs/heads/release@1/2"}:                                                 true,
		{"environment", "*", "-"}: false, {"environment", "*", ""}: true, {"base_ref", "", ""}: true, {"base_ref", "", "-"}: false,
	} {
		p, c := mustPolicy(t, []string{"acme"}, nil, oneRule(test[0], test[1], "*")), jobClaims(claims{test[0]: test[2]})
		if err, images := p.checkClaims(c), p.checkImages(c, []string{apiDev}); (err == nil) != want || (images == nil) != want {
			t.Errorf("%q: %v, %v", test, err, images)
		}
	}
}

func TestRiskyEvents(t *testing.T) {
	trust := designPolicy
	for _, events := range []string{"pull_request_target", "[push, pull_request, issue*]", "pull_request", "[fork, watch, gollum]",
		"'*run'", "push, environment: '*'", "'*'"} {
		trust += "- {claims: {event_name: " + events + "}, images: ['*']}\n"
	}
	if got, want := mustPolicy(t, []string{"acme"}, nil, trust).rulesWithRiskyEvents(), []string{"rule 3: pull_request_target", "rule 4: issue_comment, issues",
		"rule 6: fork, gollum, watch", "rule 7: check_run, workflow_run", "rule 9: check_run, check_suite, discussion, discussion_comment, fork, gollum, " +
			"issue_comment, issues, pull_request_review, pull_request_review_comment, pull_request_target, status, watch, workflow_run"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := mustPolicy(t, []string{"acme"}, nil, "").rulesWithRiskyEvents(); got != nil {
		t.Errorf("the default events: %q", got)
	}
}

func TestImagePlaceholders(t *testing.T) {
	const byRepository, byID = "ghcr.io/{repository}:dev", "ghcr.io/{repository_owner}/r{repository_id}-*:*"
	for test, want := range map[[3]string]bool{ // pattern, repository, image
		{byRepository, "Acme/API", "ghcr.io/acme/api:dev"}:                   true,
		{byRepository, "acme/\u212aey", "ghcr.io/acme/key:dev"}:              false,
		{byRepository, "acme/*", "ghcr.io/acme/web:dev"}:                     false,
		{byRepository, "acme/{repository_id}", "ghcr.io/acme/812345678:dev"}: false, // replaced once
		{"ghcr.io/acme{repository}/x:dev", "-", "ghcr.io/acme/x:dev"}:        false,
		{byID, "acme/api", "ghcr.io/acme/r812345678-x:y"}:                    true,
		{byID, "acme/api", "ghcr.io/acme/r81234567-x:y"}:                     false,
		{"*", "acme/api", "ghcr.io/evil/x:y"}:                                true,
		{"ghcr.io/{repository}:RC*", "acme/api", "ghcr.io/acme/api:RC1"}:     true,
	} {
		c := jobClaims(claims{"repository": test[1], "repository_owner": "Acme"})
		if err := mustPolicy(t, []string{"acme"}, nil, oneRule("ref", "refs/*", test[0])).checkImages(c, []string{test[2]}); (err == nil) != want {
			t.Errorf("%q: %v", test, err)
		}
	}
}

// TestPolicyRefuses: each error is one line that says where, and what was expected there.
func TestPolicyRefuses(t *testing.T) {
	const (
		good  = "- claims: {environment: dev}\n  images: ['*']\n"
		text  = "%s"
		rule  = good + "%s" // the second, from line 3
		claim = good + "- claims: {%s}\n  images: ['*']"
		image = good + "- claims: {environment: dev}\n  images: [%s]"
	)
	refuse := func(want, format string, texts ...string) {
		for _, s := range texts {
			trust := strings.Replace(format, "%s", s, 1)
			_, err := readPolicy([]string{"acme"}, nil, trust)
			if err == nil || !strings.HasPrefix(err.Error(), "TRUST_POLICY (--trust-policy): ") || !isError(err, want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: %v; expected %q", trust, err, want)
			}
		}
	}
	refuse("no rules; expected a list, such as [{claims:", text, " \n", "# none yet", "null", "[]", "deny", "rules:\n- claims: {ref: refs/heads/main}")
	refuse("yaml: line 2", text, "- claims: {environment: dev}\n  images: [", "- claims:\n\tref: x")
	refuse("unknown anchor", text, "- claims: *x")
	refuse("anchor 'r' value contains itself", text, "- &r {claims: {environment: dev}, images: ['*'], x: *r}")
	refuse("expected one YAML document", text, designPolicy+"---\n"+designPolicy, "[{claims: {environment: dev}, images: ['*']}] [x]")
	refuse("line 1: !", text, "!disabled\n"+good, "- claims: {environment: &e [dev, 1]}\n  images: ['*']\n- claims: {environment: *e}\n  images: ['*']")
	refuse("rule 2: claim ref: dev can match no token", text, "- claims: {environment: &e dev}\n  images: ['*']\n- claims: {ref: *e}\n  images: ['*']")

	refuse("line 3: cannot unmarshal !!", rule, "- x", "- []", "- claims: [environment]\n  images: ['*']", "- claims: environment\n  images: ['*']")
	refuse("line 3: !!null", rule, "-", "- claims:\n  images: ['*']", "- claims: !!null {environment: dev}\n  images: ['*']")
	refuse("rule 2: no claims or no images", rule, "- {}", "- images: ['*']", "- claims: {}\n  images: ['*']", "- claims: {environment: dev}",
		"- claims: {environment: dev}\n  images: []")
	refuse(" not found; expected claims and images", rule, "- claim: {environment: dev}\n  images: ['*']", "- claims: {environment: dev}\n  Images: ['*']",
		good+"  deny: 'x'")
	refuse("line 5: !!", rule, good+"  deny: true", good+"  1: x")
	refuse(`line 5: mapping key "claims" already defined at line 3`, rule, good+"  claims: {environment: x}")
	refuse("line 4: cannot unmarshal !!map", rule, "- claims: {environment: dev}\n  images: {a: b}")
	refuse("line 3: !", rule, "- !deny {claims: {environment: dev}, images: ['*']}", "- claims: !not {environment: dev}\n  images: ['*']")
	refuse("line 4: !", rule, "- claims: {environment: dev}\n  images:", "- claims: {environment: dev}\n  images: !none ['*']",
		"- claims: {environment: dev}\n  images: !!str ['*']")

	refuse(`line 3: mapping key "ref" already defined`, claim, "ref: refs/heads/a, ref: refs/heads/b")
	refuse("rule 2: claim environment: an empty list", claim, "environment: []")
	refuse("line 3: !!null", claim, "environment: ", "environment:", "environment: [dev, ~]", "event_name: , ref: refs/heads/main", "~: push, environment: dev")
	refuse("line 3: cannot unmarshal !!", claim, "environment: {a: b}", "environment: [[a]]", "[a]: push")
	refuse("line 3: !!int 812345678 is not a plain list, map or string; put numbers, true and false in quotes", claim, "repository_id: 812345678")
	refuse("line 3: !", claim, "repository_id: ['1', 2]", "1: push", "environment: 1.0", "environment: true", "true: push", "environment: [2026-11-21]",
		"environment: !x dev", "environment: !except [dev]", "environment: !!binary ZGV2", "<<: {environment: dev}")
	refuse(`line 3: \u00800 has a control character`, claim, `environment: "\x800"`)
	refuse("has a control character", claim, `environment: "dev\n"`, `"a\x00": b`)
	refuse("is not a claim name", claim, "'': x", "'*': x", "'ref ': x")
	refuse("rule 2: claim Ref: is not a claim name; expected ref", claim, "Ref: refs/heads/main")
	refuse("is not a claim name; expected event_name", claim, "event-name: push")
	refuse("cannot be matched", claim, "iss: x", "aud: x", "exp: '*'", "iat: '*'", "nbf: '*'")
	refuse("} has a placeholder", claim, "environment: 'x-{repository}'", "environment: '{env}'")
	refuse("rule 2: claim event_name: Release can match no token", claim, "event_name: [push, Release]")

	refuse("rule 2: no claims or no images", image, "")
	refuse("line 4: !!", image, "1", "~", "{repository}")
	refuse(`line 4: ghcr.io/acme/\a* has a control character`, image, `"ghcr.io/acme/\x07*"`)
	refuse("rule 2: images: ghcr.io/a/b can match no image; expected registry/name:tag", image, "'*', 'ghcr.io/a/b'")
	refuse("rule 2: images: ghcr.io/{repo}:dev can match no image", image, "'ghcr.io/{repo}:dev'")
	if _, err := readPolicy(nil, nil, ""); !isError(err, "GITHUB_ALLOWED_ORG") {
		t.Errorf("a policy without owners: %v", err)
	}
}

// FuzzPolicy: what is accepted restricts something, and a plain reading of the same
// text says no more and no less.
func FuzzPolicy(f *testing.F) {
	for _, seed := range []string{
		designPolicy, "", "[]", "- x", "- claims: {ref: refs/heads/main}\n  images: ['*']", "- claims: {event_name: '*'}\n  images: ['ghcr.io/{repository}:*']",
		`[{"claims":{"environment":["a","b*"]},"images":["*:dev"]}]`, "- claims: &a {environment: on}\n  images: *a", "- claims: {x: [~]}\n  images: [1]",
		"- claims: {<<: {x: y}}\n  images: ['*']", "---\n- claims: {x: y}\n  images: ['*']\n---\n", "- claims: {x: !!binary eA==}\n  images: ['*']",
		"- claims: {x: \"\\u2028*\"}\n  images: ['*']\n...\n", "[{claims: {x: y}, images: ['*']}] [",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := readPolicy([]string{"acme"}, nil, text)
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("more than a line: %q", err)
		}
		if err != nil || text == "" {
			return
		}
		var plain []struct {
			Claims map[string]any
			Images any
		}
		decoder := yaml.NewDecoder(strings.NewReader(text))
		decoder.KnownFields(true)
		if err := decoder.Decode(&plain); err != nil || len(plain) != len(p.rules()) {
			t.Fatalf("%d rules, plainly %d: %v", len(p.rules()), len(plain), err)
		}
		for i, r := range p.rules() {
			if r.unmetCondition(claims{}) == nil {
				t.Errorf("rule %d is for anyone", i+1)
			}
			read, said := map[string]string{}, map[string]string{}
			for _, cond := range r.conditions {
				read[cond.claim] = fmt.Sprintf("%q", cond.values)
			}
			for name, value := range plain[i].Claims {
				said[name] = quotedList(value)
			}
			if said["event_name"] == "" {
				delete(read, "event_name")
			}
			if !maps.Equal(read, said) || fmt.Sprintf("%q", r.images) != quotedList(plain[i].Images) {
				t.Errorf("rule %d: read %q %q, plainly %q", i+1, read, r.images, plain[i])
			}
		}
	})
}

// quotedList is a list, or a list of the one value.
func quotedList(value any) string {
	if _, ok := value.([]any); !ok {
		value = []any{value}
	}
	return fmt.Sprintf("%q", value)
}

// TestClaimForms: what a claim can be, and the mistakes that the table catches.
func TestClaimForms(t *testing.T) {
	for claim, values := range map[string]struct{ possible, impossible []string }{
		"ref": {[]string{"", "*", "r*", "refs/*", "refs/heads/*", "refs/h*", "refs/pull/*/merge", "refs/tags/v*", "*/main", "refs/heads/caf\u00e9"},
			[]string{"main", "release/*", "refs/main", "refs/heads/", "refs/heads", "refs/heads/release/?", "refs/heads/main ", "heads/*", "refs/x/*", "Refs/*"}},
		"ref_type":              {[]string{"branch", "t*", "*"}, []string{"branches", "x*", ""}},
		"ref_protected":         {[]string{"true", "false", "*e"}, []string{"yes", "True"}},
		"event_name":            {[]string{"push", "pull_*", "*"}, []string{"Push", "", "pull-request", "push "}},
		"repository":            {[]string{"acme/api", "acme/*", "*", "*/api", "a*", "acme/.github"}, []string{"api", "https://github.com/acme/api", "acme/a b", "acme/api/x", ""}},
		"repository_owner":      {[]string{"acme", "a*"}, []string{"acme/api", "", "acme "}},
		"repository_id":         {[]string{"1", "8*"}, []string{"x*", "acme", ""}},
		"repository_owner_id":   {[]string{"9919"}, []string{"acme", "9 9"}},
		"repository_visibility": {[]string{"private", "*"}, []string{"hidden"}},
		"runner_environment":    {[]string{"*-hosted"}, []string{"hosted"}},
		"job_workflow_ref":      {[]string{"acme/x/.github/workflows/d.yml@refs/heads/main", "acme/*", "*@refs/tags/v*"}, []string{"acme/x/.github/workflows/d.yml", "*d.yml"}},
		"workflow_ref":          {[]string{"*"}, []string{"d.yml"}},
		"environment":           {[]string{"", "Production", "a b", "\u00e9"}, nil},
		"repo_property_team":    {[]string{"x"}, nil},
	} {
		for i, value := range slices.Concat(values.possible, values.impossible) {
			if err := checkClaim(claim, []pattern{pattern(value)}); (err == nil) != (i < len(values.possible)) {
				t.Errorf("%s: %q: %v", claim, value, err)
			}
		}
	}
}

func TestImagePatterns(t *testing.T) {
	for s, ok := range map[string]bool{
		"*": true, "*:*": true, "*/*": true, "*:dev": true, "*.io/*": true, "ghcr.io/*": true, "ghcr.io/acme/*": true, "gh*": true,
		"ghcr.io/acme/api*": true, "ghcr.io/acme/api:*": true, "ghcr.io/*/api:v1*": true, "ghcr.io/{repository}:v*": true,
		"ghcr.io/{repository}/*:dev": true, "ghcr.io/x/{repository_owner}-{repository_id}:{repository_id}": true,
		"docker.io/library/nginx:latest": true, "docker.io/{repository}:dev": true, "docker.io/*:dev": true, "docker.io/*": true,
		"localhost/x:dev": true, "localhost:5000/x:dev": true, "registry:5000/a/b:c": true, "127.0.0.1:5000/a:b": true,
		"[::1]:5000/a/b:c": true, "registry.example.com/a__b/c---d/e.f:V1_2-x": true, "ghcr.io/a/b:" + strings.Repeat("x", 128): true,
		"ghcr.io/acme/*DEV": true, "ghcr.io/acme:*": true,

		"": false, "nginx": false, "nginx:dev": false, "acme/api:dev": false, "{repository}:dev": false, "{repository_owner}/x:dev": false,
		"ghcr.io": false, "ghcr.io:dev": false, "ghcr.io/acme/api": false, "ghcr.io/{repository}": false, "ghcr.io/*/api": false, "ghcr.io/acme/": false,
		"ghcr.io/acme/api:": false, "ghcr.io/Acme/api:dev": false, "GHCR.io/acme/api:dev": false, "ghcr.io/ACME/*": false, "ghcr.io/acme/api: dev": false,
		"https://ghcr.io/acme/api:dev": false, "ghcr.io//acme:dev": false, "/acme/api:dev": false,
		"ghcr.io/acme/api:.dev": false, "ghcr.io/acme/api:-*": false, "ghcr.io/acme/api:dev/x": false, "ghcr.io/a:b:c": false, "ghcr.io/x:{repository}": false,
		"ghcr.io/acme/api@sha256:0123456789abcdef": false, "ghcr.io/acme/api:dev@*": false, "*@*": false,
		"ghcr.io/acmé/api:dev": false, "ghcr.io/acme/api:dev\n": false, "ghcr.io/acme/api:d?v": false,
		"docker.io/nginx:dev": false, "docker.io/nginx:*": false, "index.docker.io/nginx:dev": false, "docker.io/{repository_owner}:dev": false,
	} {
		if err := checkImagePatterns([]pattern{pattern(s)}); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestMatchIsLinear has the input that takes a backtracking matcher for ever.
func TestMatchIsLinear(t *testing.T) {
	if pattern(strings.Repeat("a*", 2000) + "b").matches(strings.Repeat("a", 100_000)) {
		t.Error("matched")
	}
}

// matchesSimply is the definition: a star is nothing, or a byte and the star. In a
// pattern with an @, that byte is not an @.
func matchesSimply(p, s string) bool {
	row := make([]bool, len(s)+1) // row[i]: p up to here matches s[:i]
	row[0] = true
	for _, c := range []byte(p) {
		next := make([]bool, len(s)+1)
		for i := range next {
			if c == '*' {
				next[i] = row[i] || i > 0 && next[i-1] && (s[i-1] != '@' || !strings.Contains(p, "@"))
			} else {
				next[i] = i > 0 && row[i-1] && s[i-1] == c
			}
		}
		row = next
	}
	return row[len(s)]
}

func FuzzMatch(f *testing.F) {
	for _, seed := range [][2]string{
		{"", ""}, {"*", ""}, {"*", "x"}, {"a*a", "a"}, {"a*a", "aa"}, {"**", "x"}, {"a**b", "ab"}, {"*ab*ab*", "abab"}, {"*ab*ba*", "aba"},
		{"refs/heads/*", "refs/heads/main"}, {"ghcr.io/acme/api:v*", "ghcr.io/acme/api:v1.2"}, {"*:d*v", "localhost:5000/x:dev"}, {"a.b", "axb"},
		{"a*", "b"}, {"*a", "b"}, {"a*b*c", "abcbc"}, {"é*", "é\xff"}, {"1*", "12"}, {"acme/*", "acme/api"},
		{"a/*@main", "a/b@evil@main"}, {"*@*", "a@b"}, {"*@*", "a@b@c"}, {"@", "@"}, {"*", "@"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, p, s string) {
		if len(p) > 200 || len(s) > 1000 {
			t.Skip("slow")
		}
		want := matchesSimply(p, s)
		if got := pattern(p).matches(s); got != want {
			t.Errorf("%q matches %q: %t", p, s, got)
		}
		if !want {
			return
		}
		// The tables refuse nothing that could match, but what lets a star choose the ref
		// of a workflow.
		choosesRef := !strings.Contains(p, "@") && !strings.HasSuffix(p, "*")
		for claim, form := range realClaims {
			if form.MatchString(s) && utf8.ValidString(p) && !(claim == "job_workflow_ref" && choosesRef) && checkClaim(claim, []pattern{pattern(p)}) != nil {
				t.Errorf("%s: %q is refused and matches %q", claim, p, s)
			}
		}
		if ref, err := parseImage(s); err == nil && ref == s && s == strings.ToLower(s) && checkImagePatterns([]pattern{pattern(p)}) != nil {
			t.Errorf("%q is refused and matches %q", p, s)
		}
	})
}

// realClaims are the values that GitHub can write.
var realClaims = map[string]*regexp.Regexp{
	"ref":                   regexp.MustCompile(`\A(refs/(heads|tags|pull)/[^ ?*\[\\^:~{}]+)?\z`),
	"ref_type":              regexp.MustCompile(`\A(branch|tag)\z`),
	"ref_protected":         regexp.MustCompile(`\A(true|false)\z`),
	"event_name":            regexp.MustCompile(`\A[a-z_]+\z`),
	"repository":            regexp.MustCompile(`\A[\w-]+/[\w.-]+\z`),
	"repository_owner":      regexp.MustCompile(`\A[\w-]+\z`),
	"repository_id":         regexp.MustCompile(`\A\d+\z`),
	"repository_owner_id":   regexp.MustCompile(`\A\d+\z`),
	"repository_visibility": regexp.MustCompile(`\A(public|private|internal)\z`),
	"runner_environment":    regexp.MustCompile(`\A(github|self)-hosted\z`),
	"job_workflow_ref":      regexp.MustCompile(`\A[\w-]+/[\w.-]+/[^{}]+@[^{}]+\z`),
}
