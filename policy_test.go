package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// jobClaims are the claims of a push to main of acme/api, with changes; "-"
// removes one.
func jobClaims(changes claims) claims {
	c := claims{
		"repository": "acme/api", "repository_owner": "acme", "repository_id": "812345678", "repository_owner_id": "9919",
		"event_name": "push", "ref": "refs/heads/main", "workflow_ref": "acme/api/.github/workflows/ci.yml@refs/heads/main",
		"job_workflow_ref": "acme/.github/.github/workflows/deploy.yml@refs/tags/v2", "base_ref": "",
	}
	maps.Copy(c, changes)
	maps.DeleteFunc(c, func(_, v string) bool { return v == "-" })
	return c
}

func mustPolicy(t testing.TB, orgs, ownerIDs []string, trust string) *policy {
	t.Helper()
	p, err := readPolicy(orgs, ownerIDs, trust)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// readPolicy reads a policy as web does, out of the environment.
func readPolicy(orgs, ownerIDs []string, trust string) (*policy, error) {
	vars := maps.Clone(webEnv)
	vars["GITHUB_ALLOWED_ORG"] = strings.Join(orgs, ",")
	vars["GITHUB_ALLOWED_ORG_ID"] = strings.Join(ownerIDs, ",")
	vars["TRUST_POLICY"] = trust
	cfg := &webConfig{}
	if err := parseConfig("web", cfg, nil, env(vars)); err != nil {
		return nil, err
	}
	return newPolicy(cfg.Orgs, cfg.OrgIDs, cfg.TrustPolicy), nil
}

func TestPolicyOwners(t *testing.T) {
	for _, test := range []struct {
		name           string
		orgs, ownerIDs []string
		claims         claims
		err            string
	}{
		{"the one", []string{"acme"}, nil, nil, ""},
		{"one of two", []string{"other", "acme"}, nil, nil, ""},
		{"configured in another case", []string{"ACME"}, nil, nil, ""},
		{"GitHub's in another case", []string{"acme"}, nil, claims{"repository_owner": "AcMe"}, ""},
		{"another", []string{"acme"}, nil, claims{"repository_owner": "evil"}, `repository_owner is "evil", none of GITHUB_ALLOWED_ORG`},
		{"longer", []string{"acme"}, nil, claims{"repository_owner": "acme-evil"}, `repository_owner is "acme-evil"`},
		{"shorter", []string{"acme"}, nil, claims{"repository_owner": "acm"}, `repository_owner is "acm"`},
		{"with a blank", []string{"acme"}, nil, claims{"repository_owner": "acme "}, `repository_owner is "acme "`},
		{"U+212A for k", []string{"kelvin"}, nil, claims{"repository_owner": "\u212aelvin"}, `repository_owner is "\u212aelvin"`},
		{"U+017F for s", []string{"sys"}, nil, claims{"repository_owner": "sy\u017f"}, `repository_owner is "sy\u017f"`},
		{"absent", []string{"acme"}, nil, claims{"repository_owner": "-"}, "repository_owner is absent"},
		{"empty", []string{"acme"}, nil, claims{"repository_owner": ""}, `repository_owner is ""`},
		{"pinned", []string{"acme"}, []string{"1", "9919"}, nil, ""},
		{"pinned, re-registered by someone else", []string{"acme"}, []string{"9919"}, claims{"repository_owner_id": "123"}, `repository_owner_id is "123", none of GITHUB_ALLOWED_ORG_ID`},
		{"pinned, zero before", []string{"acme"}, []string{"9919"}, claims{"repository_owner_id": "09919"}, "repository_owner_id is"},
		{"pinned, absent", []string{"acme"}, []string{"9919"}, claims{"repository_owner_id": "-"}, "repository_owner_id is absent"},
		{"the id of one, the name of none", []string{"acme"}, []string{"9919"}, claims{"repository_owner": "evil"}, "repository_owner is"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := mustPolicy(t, test.orgs, test.ownerIDs, "").admit(jobClaims(test.claims))
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("%v, expected %q", err, test.err)
			}
		})
	}
}

func TestDefaultPolicy(t *testing.T) {
	p := mustPolicy(t, []string{"acme"}, nil, "")
	for event, admitted := range map[string]bool{
		"push": true, "workflow_dispatch": true, "repository_dispatch": true, "release": true, "schedule": true,
		"registry_package": true, "deployment": true,
		"pull_request": false, "pull_request_target": false, "workflow_run": false, "issue_comment": false, "issues": false,
		"merge_group": false, "deployment_status": false, "Push": false, "push ": false, "": false, "-": false, "*": false,
	} {
		c := jobClaims(claims{"event_name": event})
		if err := p.admit(c); (err == nil) != admitted {
			t.Errorf("event %q: %v", event, err)
		}
		if err := p.allow(c, []string{"ghcr.io/acme/api:dev", "docker.io/library/nginx:latest"}); (err == nil) != admitted {
			t.Errorf("event %q: %v", event, err)
		}
	}
	if err := p.allow(jobClaims(nil), nil); err == nil {
		t.Error("allowed a request without images")
	}
	want := []string{`default rule: event_name="push"|"workflow_dispatch"|"repository_dispatch"|"release"|"schedule"|"registry_package"|"deployment" may restart "*"`}
	if got := p.describe(); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

const designPolicy = `
- claims: {event_name: [push, workflow_dispatch, release], ref: refs/heads/main}
  images: ["ghcr.io/{repository}:dev"]
- claims: {environment: production}
  images: ["ghcr.io/{repository}:v*"]
`

func TestTrustPolicy(t *testing.T) {
	one := func(claim, value, image string) string {
		return fmt.Sprintf("- claims: {%s: %q}\n  images: [%q]\n", claim, value, image)
	}
	anyImage := "*"
	const (
		notAdmitted = "no rule matches the claims"
		notAllowed  = "this job may not restart "
	)
	for _, test := range []struct {
		name, trust string
		claims      claims
		images      []string
		err         string
	}{
		{"dev from main", designPolicy, nil, []string{"ghcr.io/acme/api:dev"}, ""},
		{"dev from a branch", designPolicy, claims{"ref": "refs/heads/x"}, []string{"ghcr.io/acme/api:dev"}, `rule 1: ref is "refs/heads/x"; rule 2: environment is absent`},
		{"another tag from main", designPolicy, nil, []string{"ghcr.io/acme/api:v1"}, notAllowed + "ghcr.io/acme/api:v1"},
		{"another repository's image", designPolicy, nil, []string{"ghcr.io/acme/web:dev"}, notAllowed + "ghcr.io/acme/web:dev"},
		{"a longer name", designPolicy, nil, []string{"ghcr.io/acme/api-evil:dev"}, notAllowed},
		{"a longer tag", designPolicy, nil, []string{"ghcr.io/acme/api:dev2"}, notAllowed},
		{"another registry", designPolicy, nil, []string{"evil.io/ghcr.io/acme/api:dev"}, notAllowed},
		{"the second image", designPolicy, nil, []string{"ghcr.io/acme/api:dev", "ghcr.io/acme/web:dev"}, notAllowed + "ghcr.io/acme/web:dev"},
		{"the first image", designPolicy, nil, []string{"ghcr.io/acme/web:dev", "ghcr.io/acme/api:dev"}, notAllowed + "ghcr.io/acme/web:dev"},
		{"production", designPolicy, claims{"environment": "production", "ref": "refs/tags/v1", "event_name": "release"}, []string{"ghcr.io/acme/api:v1", "ghcr.io/acme/api:v1.2.3"}, ""},
		{"production, dev image", designPolicy, claims{"environment": "production", "ref": "refs/tags/v1"}, []string{"ghcr.io/acme/api:dev"}, notAllowed},
		{"one rule for all images", designPolicy, claims{"environment": "production"}, []string{"ghcr.io/acme/api:dev", "ghcr.io/acme/api:v1"}, notAllowed + "ghcr.io/acme/api:v1, or not together with ghcr.io/acme/api:dev"},
		{"environment in another case", designPolicy, claims{"environment": "Production", "ref": "x"}, nil, notAdmitted},
		{"pull_request_target looks like main", designPolicy, claims{"event_name": "pull_request_target"}, nil, `rule 1: event_name is "pull_request_target"; rule 2: event_name is "pull_request_target"`},
		{"event_name that is no string", designPolicy, claims{"event_name": "-"}, nil, "rule 1: event_name is absent"},

		// Events: the default list holds for each rule that names none.
		{"rule without event, default event", one("ref", "refs/heads/main", anyImage), claims{"event_name": "schedule"}, []string{"ghcr.io/a/b:c"}, ""},
		{"rule without event, other event", one("ref", "refs/heads/main", anyImage), claims{"event_name": "workflow_run"}, nil, notAdmitted},
		{"rule that names an event", one("event_name", "pull_request", anyImage), claims{"event_name": "pull_request"}, []string{"ghcr.io/a/b:c"}, ""},
		{"rule that names an event, default event", one("event_name", "pull_request", anyImage), nil, nil, notAdmitted},
		{"rule for any event", one("event_name", "*", anyImage), claims{"event_name": "workflow_run"}, []string{"ghcr.io/a/b:c"}, ""},
		{"rule for any event, none said", one("event_name", "*", anyImage), claims{"event_name": "-"}, nil, notAdmitted},
		{"an event named by another rule", one("event_name", "pull_request", "ghcr.io/{repository}:pr-*") + one("ref", "refs/*", "ghcr.io/{repository}:dev"), claims{"event_name": "pull_request"}, []string{"ghcr.io/acme/api:dev"}, notAllowed},
		{"an event named by another rule, its image", one("event_name", "pull_request", "ghcr.io/{repository}:pr-*") + one("ref", "refs/*", "ghcr.io/{repository}:dev"), claims{"event_name": "pull_request"}, []string{"ghcr.io/acme/api:pr-1"}, ""},

		// Claims: exact, whole, and absent never matches.
		{"exact, longer", one("ref", "refs/heads/main", anyImage), claims{"ref": "refs/heads/main2"}, nil, notAdmitted},
		{"exact, before", one("environment", "prod", anyImage), claims{"environment": "non-prod"}, nil, notAdmitted},
		{"exact, newline after", one("environment", "prod", anyImage), claims{"environment": "prod\n"}, nil, notAdmitted},
		{"exact, fold", one("environment", "k", anyImage), claims{"environment": "\u212a"}, nil, notAdmitted},
		{"a|b is one text", one("environment", "a|b", anyImage), claims{"environment": "a"}, nil, notAdmitted},
		{"a dot is a dot", one("environment", "a.b", anyImage), claims{"environment": "axb"}, nil, notAdmitted},
		{"? is no wildcard", one("environment", "a?", anyImage), claims{"environment": "ab"}, nil, notAdmitted},
		{"star over slashes", one("ref", "refs/heads/release/*", anyImage), claims{"ref": "refs/heads/release/1/2"}, []string{"ghcr.io/a/b:c"}, ""},
		{"star of nothing", one("ref", "refs/heads/release/*", anyImage), claims{"ref": "refs/heads/release/"}, []string{"ghcr.io/a/b:c"}, ""},
		{"star in the middle", one("job_workflow_ref", "acme/.github/.github/workflows/deploy.yml@refs/tags/v*", anyImage), nil, []string{"ghcr.io/a/b:c"}, ""},
		{"absent", one("environment", "*", anyImage), nil, nil, "environment is absent"},
		{"empty and star", one("environment", "*", anyImage), claims{"environment": ""}, []string{"ghcr.io/a/b:c"}, ""},
		{"empty", one("base_ref", "", anyImage), nil, []string{"ghcr.io/a/b:c"}, ""},
		{"empty and absent", one("base_ref", "", anyImage), claims{"base_ref": "-"}, nil, "base_ref is absent"},
		{"a star in the claim is a star", one("environment", "ab", anyImage), claims{"environment": "*"}, nil, notAdmitted},
		{"all claims of a rule", "- claims: {ref: refs/heads/main, environment: [a, b]}\n  images: ['*']", claims{"environment": "b"}, []string{"ghcr.io/a/b:c"}, ""},
		{"all claims but one", "- claims: {ref: refs/heads/main, environment: [a, b]}\n  images: ['*']", claims{"environment": "c"}, nil, `environment is "c"`},
		{"ids", one("repository_id", "812345678", anyImage), nil, []string{"ghcr.io/a/b:c"}, ""},

		// Placeholders.
		{"lower-cased", one("ref", "refs/*", "ghcr.io/{repository}:dev"), claims{"repository": "Acme/API", "repository_owner": "Acme"}, []string{"ghcr.io/acme/api:dev"}, ""},
		{"not folded beyond ASCII", one("ref", "refs/*", "ghcr.io/{repository}:dev"), claims{"repository": "acme/\u212aey"}, []string{"ghcr.io/acme/key:dev"}, notAllowed},
		{"never expanded", one("ref", "refs/*", "ghcr.io/{repository}:dev"), claims{"repository": "acme/*"}, []string{"ghcr.io/acme/web:dev"}, notAllowed},
		{"never replaced twice", one("ref", "refs/*", "ghcr.io/{repository}:dev"), claims{"repository": "acme/{repository_id}"}, []string{"ghcr.io/acme/812345678:dev"}, notAllowed},
		{"absent claim", one("ref", "refs/*", "ghcr.io/acme{repository}/x:dev"), claims{"repository": "-"}, []string{"ghcr.io/acme/x:dev"}, notAllowed},
		{"owner and id", one("ref", "refs/*", "ghcr.io/{repository_owner}/r{repository_id}-*:*"), nil, []string{"ghcr.io/acme/r812345678-x:y"}, ""},
		{"another id", one("ref", "refs/*", "ghcr.io/{repository_owner}/r{repository_id}-*:*"), nil, []string{"ghcr.io/acme/r81234567-x:y"}, notAllowed},
		{"any image", one("ref", "refs/*", "*"), nil, []string{"ghcr.io/evil/x:y"}, ""},
		{"upper case in a tag", one("ref", "refs/*", "ghcr.io/{repository}:RC*"), nil, []string{"ghcr.io/acme/api:RC1"}, ""},

		// Other ways to write it.
		{"JSON", `[{"claims":{"ref":"refs/heads/main"},"images":["*"]}]`, nil, []string{"ghcr.io/a/b:c"}, ""},
		{"comments and a document marker", "# who\n---\n" + designPolicy, nil, []string{"ghcr.io/acme/api:dev"}, ""},
		{"on and no are text", "- claims: {environment: [on, no]}\n  images: ['*']", claims{"environment": "no"}, []string{"ghcr.io/a/b:c"}, ""},
		{"anchors everywhere", "- &r\n  &i images: &l [&v 'ghcr.io/a/b:c']\n  claims: {&k ref: refs/heads/x}\n- *r\n- claims: {*k : refs/heads/main}\n  images: [*v]", nil, []string{"ghcr.io/a/b:c"}, ""},
		{"anchors", "- claims: &main {ref: refs/heads/main}\n  images: ['ghcr.io/a/b:c']\n- claims: *main\n  images: ['ghcr.io/a/b:d']", nil, []string{"ghcr.io/a/b:d"}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := mustPolicy(t, []string{"acme"}, nil, test.trust)
			c := jobClaims(test.claims)
			err := p.admit(c)
			if err == nil && test.images != nil {
				err = p.allow(c, test.images)
			} else if err != nil && p.allow(c, []string{"ghcr.io/acme/api:dev"}) == nil {
				t.Error("allowed and not admitted")
			}
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("%v, expected %q", err, test.err)
			}
		})
	}
	want := []string{
		`rule 1: event_name="push"|"workflow_dispatch"|"release" ref="refs/heads/main" may restart "ghcr.io/{repository}:dev"`,
		`rule 2: event_name="push"|"workflow_dispatch"|"repository_dispatch"|"release"|"schedule"|"registry_package"|"deployment" environment="production" may restart "ghcr.io/{repository}:v*"`,
	}
	if got := mustPolicy(t, []string{"acme"}, nil, designPolicy).describe(); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestNewPolicyRefuses(t *testing.T) {
	acme := []string{"acme"}
	rules := func(rule string) string { return "- claims: {environment: dev}\n  images: ['*']\n" + rule }
	claim := func(s string) string { return rules("- claims: {" + s + "}\n  images: ['*']") }
	image := func(s string) string { return rules("- claims: {environment: dev}\n  images: [" + s + "]") }
	for _, test := range []struct {
		name        string
		orgs, ids   []string
		trust, want string
	}{
		{"no org", nil, nil, "", "GITHUB_ALLOWED_ORG"},
		{"empty org", []string{"acme", ""}, nil, "", "GITHUB_ALLOWED_ORG"},
		{"empty id", acme, []string{"1", ""}, "", "GITHUB_ALLOWED_ORG_ID"},

		{"blank", acme, nil, " \n", "TRUST_POLICY (--trust-policy): no rules"},
		{"only a comment", acme, nil, "# none yet", "TRUST_POLICY (--trust-policy): no rules"},
		{"null", acme, nil, "null", "TRUST_POLICY (--trust-policy): line 1: no rules"},
		{"empty list", acme, nil, "[]", "TRUST_POLICY (--trust-policy): line 1: no rules"},
		{"a string", acme, nil, "deny", "TRUST_POLICY (--trust-policy): line 1: no rules"},
		{"a map", acme, nil, "rules:\n- claims: {ref: refs/heads/main}", "TRUST_POLICY (--trust-policy): line 1: no rules"},
		{"no YAML", acme, nil, "- claims: {environment: dev}\n  images: [", "TRUST_POLICY (--trust-policy): yaml: near line 2"},
		{"a tab", acme, nil, "- claims:\n\tref: x", "TRUST_POLICY (--trust-policy): yaml: near line 2"},
		{"an unquoted placeholder", acme, nil, "- claims: {environment: dev}\n  images: [{repository}]", "rule 1, line 2: images: a list or map; expected a string"},
		{"a control character in a value", acme, nil, claim(`environment: "\x800"`), "rule 2, line 3: claim environment: \"\\u00800\" has a control character"},
		{"a line end in a value", acme, nil, claim(`environment: "dev\n"`), "has a control character"},
		{"a control character in a name", acme, nil, claim(`"a\x00": b`), "has a control character"},
		{"a control character in an image", acme, nil, image(`"ghcr.io/acme/api:\x07*"`), "has a control character"},
		{"a noncharacter", acme, nil, claim(`environment: "\uFFFE"`), "has a control character"},
		{"an unknown anchor", acme, nil, "- claims: *x", "TRUST_POLICY (--trust-policy): yaml: unknown anchor"},
		{"two documents", acme, nil, designPolicy + "---\n" + designPolicy, "line 6: another YAML document"},
		{"something after the document", acme, nil, "[{claims: {environment: dev}, images: ['*']}] [x]", "after the list of rules: yaml: "},
		{"duplicate claims", acme, nil, "- claims: {environment: dev}\n  images: ['*']\n  claims: {environment: x}", `rule 1, line 3: "claims" is there twice`},
		{"duplicate claim", acme, nil, claim("ref: refs/heads/a, ref: refs/heads/b"), `rule 2, line 3: "ref" is there twice`},

		{"a rule that is a string", acme, nil, rules("- x"), "rule 2, line 3: no claims"},
		{"a rule that is null", acme, nil, rules("-"), "rule 2, line 3: no claims"},
		{"an empty rule", acme, nil, rules("- {}"), "rule 2, line 3: no claims"},
		{"claim for claims", acme, nil, rules("- claim: {environment: dev}\n  images: ['*']"), `rule 2, line 3: unknown member "claim"; expected claims and images`},
		{"Images", acme, nil, rules("- claims: {environment: dev}\n  Images: ['*']"), `rule 2, line 4: unknown member "Images"`},
		{"a member beside", acme, nil, rules("- claims: {environment: dev}\n  images: ['*']\n  deny: true"), `rule 2, line 5: unknown member "deny"`},
		{"a member that is a number", acme, nil, rules("- claims: {environment: dev}\n  images: ['*']\n  1: x"), `rule 2, line 5: a name: "1" is not a string`},
		{"no claims", acme, nil, rules("- images: ['*']"), "rule 2, line 3: no claims"},
		{"empty claims", acme, nil, rules("- claims: {}\n  images: ['*']"), "rule 2, line 3: no claims"},
		{"null claims", acme, nil, rules("- claims:\n  images: ['*']"), "rule 2, line 3: no claims"},
		{"a list of claims", acme, nil, rules("- claims: [environment]\n  images: ['*']"), "rule 2, line 3: no claims"},
		{"no images", acme, nil, rules("- claims: {environment: dev}"), "rule 2, line 3: no images"},
		{"null images", acme, nil, rules("- claims: {environment: dev}\n  images:"), "rule 2, line 4: no images"},
		{"images is a string", acme, nil, rules("- claims: {environment: dev}\n  images: '*'"), "rule 2, line 4: no images; expected a list"},
		{"empty images", acme, nil, image(""), "rule 2, line 4: images: an empty list"},
		{"empty list of values", acme, nil, claim("environment: []"), "rule 2, line 3: claim environment: an empty list"},

		{"id as a number", acme, nil, claim("repository_id: 812345678"), `rule 2, line 3: claim repository_id: "812345678" is not a string to YAML; put it in quotes`},
		{"id as a number in a list", acme, nil, claim("repository_id: ['1', 2]"), `rule 2, line 3: claim repository_id: "2" is not a string`},
		{"float", acme, nil, claim("environment: 1.0"), `rule 2, line 3: claim environment: "1.0" is not a string`},
		{"true", acme, nil, claim("environment: true"), `rule 2, line 3: claim environment: "true" is not a string`},
		{"a date", acme, nil, claim("environment: [2026-11-21]"), `rule 2, line 3: claim environment: "2026-11-21" is not a string`},
		{"a tag of its own", acme, nil, claim("environment: !x dev"), `rule 2, line 3: claim environment: "dev" is not a string`},
		{"a merge key", acme, nil, claim("<<: {environment: dev}"), `rule 2, line 3: a name: "<<" is not a string`},
		{"null value", acme, nil, claim("environment: "), "rule 2, line 3: claim environment: no value"},
		{"no blank after the colon", acme, nil, claim("environment:"), `rule 2, line 3: "environment:" is no name of a claim`},
		{"tilde", acme, nil, claim("environment: [~]"), "rule 2, line 3: claim environment: no value"},
		{"null event_name", acme, nil, claim("event_name: , ref: refs/heads/main"), "rule 2, line 3: claim event_name: no value"},
		{"map as value", acme, nil, claim("environment: {a: b}"), "rule 2, line 3: claim environment: a list or map"},
		{"list in a list", acme, nil, claim("environment: [[a]]"), "rule 2, line 3: claim environment: a list or map"},
		{"claim named true", acme, nil, claim("true: push"), `rule 2, line 3: a name: "true" is not a string`},
		{"claim named 1", acme, nil, claim("1: push"), `rule 2, line 3: a name: "1" is not a string`},
		{"a list as name", acme, nil, claim("[a]: push"), `rule 2, line 3: a name: a list or map`},
		{"number as image", acme, nil, image("1"), `rule 2, line 4: images: "1" is not a string`},
		{"null as image", acme, nil, image("~"), "rule 2, line 4: images: no value"},

		{"short ref", acme, nil, claim("ref: main"), `rule 2, line 3: claim ref: "main" can match no token; expected refs/heads/name`},
		{"short ref with a star", acme, nil, claim("ref: 'release/*'"), "rule 2, line 3: claim ref: "},
		{"event in upper case", acme, nil, claim("event_name: [push, Release]"), `rule 2, line 3: claim event_name: "Release" can match no token`},
		{"empty event", acme, nil, claim("event_name: ''"), "rule 2, line 3: claim event_name: "},
		{"repository without owner", acme, nil, claim("repository: api"), `rule 2, line 3: claim repository: "api" can match no token; expected owner/name`},
		{"repository as URL", acme, nil, claim("repository: https://github.com/acme/api"), "rule 2, line 3: claim repository: "},
		{"id with letters", acme, nil, claim("repository_owner_id: acme"), "rule 2, line 3: claim repository_owner_id: "},
		{"id with letters and a star", acme, nil, claim("repository_id: 'x*'"), "rule 2, line 3: claim repository_id: "},
		{"workflow without ref", acme, nil, claim("job_workflow_ref: acme/x/.github/workflows/deploy.yml"), "rule 2, line 3: claim job_workflow_ref: "},
		{"placeholder in a claim", acme, nil, claim("environment: 'x-{repository}'"), "rule 2, line 3: claim environment: \"x-{repository}\" has a placeholder"},
		{"aud", acme, nil, claim("aud: x"), "rule 2, line 3: claim aud: cannot be matched"},
		{"exp", acme, nil, claim("exp: '*'"), "rule 2, line 3: claim exp: cannot be matched"},
		{"iat", acme, nil, claim("iat: '*'"), "rule 2, line 3: claim iat: cannot be matched"},
		{"nbf", acme, nil, claim("nbf: '*'"), "rule 2, line 3: claim nbf: cannot be matched"},

		{"unknown placeholder", acme, nil, image("'ghcr.io/{repo}:dev'"), `rule 2, line 4: images: "ghcr.io/{repo}:dev" has an unknown placeholder; expected {repository},`},
		{"placeholder in upper case", acme, nil, image("'ghcr.io/{Repository}:dev'"), "has an unknown placeholder"},
		{"placeholder of a claim that is none", acme, nil, image("'ghcr.io/x:{sha}'"), "has an unknown placeholder"},
		{"placeholder not closed", acme, nil, image("'ghcr.io/{repository:dev'"), "has an unknown placeholder"},
		{"placeholder in itself", acme, nil, image("'ghcr.io/{{repository}}:dev'"), "has an unknown placeholder"},
		{"star in a placeholder", acme, nil, image("'ghcr.io/{repo*}:dev'"), "has an unknown placeholder"},
		{"the second of a list", acme, nil, image("'*', 'ghcr.io/a/b'"), `rule 2, line 4: images: "ghcr.io/a/b" can match no image`},
		{"a tag on a rule", acme, nil, rules("- !deny {claims: {environment: dev}, images: ['*']}"), "rule 2, line 3: no claims"},
		{"a tag on the list", acme, nil, "!disabled\n- claims: {environment: dev}\n  images: ['*']", "line 1: no rules"},
		{"a tag on the claims", acme, nil, rules("- claims: !not {environment: dev}\n  images: ['*']"), "rule 2, line 3: no claims"},
		{"a tag on values", acme, nil, claim("environment: !except [dev]"), "rule 2, line 3: claim environment: a list or map"},
		{"a tag on images", acme, nil, rules("- claims: {environment: dev}\n  images: !none ['*']"), "rule 2, line 4: no images"},
		{"null as the tag of a map", acme, nil, rules("- claims: !!null {environment: dev}\n  images: ['*']"), "rule 2, line 3: no claims"},
		{"a binary", acme, nil, claim("environment: !!binary ZGV2"), `rule 2, line 3: claim environment: "ZGV2" is not a string`},
		{"a second noncharacter", acme, nil, claim(`environment: "\uFFFF"`), "has a control character"},
		{"no name", acme, nil, claim("'': x"), `rule 2, line 3: "" is no name of a claim`},
		{"a star as name", acme, nil, claim("'*': x"), `rule 2, line 3: "*" is no name of a claim`},
		{"a blank in a name", acme, nil, claim("'ref ': x"), `rule 2, line 3: "ref " is no name of a claim`},
		{"a claim in upper case", acme, nil, claim("Ref: refs/heads/main"), `rule 2, line 3: "Ref" is no name of a claim; expected ref`},
		{"a claim with a dash", acme, nil, claim("event-name: push"), `"event-name" is no name of a claim; expected event_name`},
		{"iss", acme, nil, claim("iss: x"), "rule 2, line 3: claim iss: cannot be matched"},
		{"another placeholder in a claim", acme, nil, claim("environment: '{env}'"), "rule 2, line 3: claim environment: \"{env}\" has a placeholder"},
		{"ref_protected", acme, nil, claim("ref_protected: yes"), `rule 2, line 3: claim ref_protected: "yes" can match no token; expected "true" or "false"`},
		{"ref_type", acme, nil, claim("ref_type: branches"), "rule 2, line 3: claim ref_type: "},
		{"workflow_ref", acme, nil, claim("workflow_ref: deploy.yml"), "rule 2, line 3: claim workflow_ref: "},
		{"repository_owner", acme, nil, claim("repository_owner: acme/api"), "rule 2, line 3: claim repository_owner: "},
		{"repository with a blank", acme, nil, claim("repository: 'acme/a b'"), "rule 2, line 3: claim repository: "},
		{"runner_environment", acme, nil, claim("runner_environment: hosted"), "rule 2, line 3: claim runner_environment: "},
		{"repository_visibility", acme, nil, claim("repository_visibility: hidden"), "rule 2, line 3: claim repository_visibility: "},
		{"ref without a name", acme, nil, claim("ref: refs/heads/"), "rule 2, line 3: claim ref: "},
		{"ref of no kind", acme, nil, claim("ref: refs/main"), "rule 2, line 3: claim ref: "},
		{"ref with a question mark", acme, nil, claim("ref: 'refs/heads/release/?'"), "rule 2, line 3: claim ref: "},
		{"ref with a blank", acme, nil, claim("ref: 'refs/heads/main '"), "rule 2, line 3: claim ref: "},
		{"the old host of Docker Hub", acme, nil, image("'index.docker.io/acme/api:dev'"), "rule 2, line 4: images: \"index.docker.io/acme/api:dev\" can match no image"},
		{"an alias of a bad value", acme, nil, "- claims: {environment: &e dev}\n  images: ['*']\n- claims:\n    ref: *e\n  images: ['*']", `rule 2, line 4: claim ref: "dev" can match no token`},
		{"far down", acme, nil, "# who\n" + rules("- claims:\n    environment: dev\n    # and\n    ref:\n    - refs/heads/main\n    - main\n  images: ['*']"), `rule 2, line 9: claim ref: "main" can match no token`},
		{"an alias", acme, nil, "- claims: {environment: &e [dev, 1]}\n  images: ['*']\n- claims: {environment: *e}\n  images: ['*']", `rule 1, line 1: claim environment: "1" is not`},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := readPolicy(test.orgs, test.ids, test.trust)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, %v; expected %q", p, err, test.want)
			} else if strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("more than a line: %q", err)
			}
		})
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
		"https://ghcr.io/acme/api:dev": false, "ghcr.io//acme:dev": false, "/acme/api:dev": false, "ghcr.io/acme/-api:dev": false, "ghcr.io/a..b:dev": false,
		"ghcr.io/acme/api:.dev": false, "ghcr.io/acme/api:-*": false, "ghcr.io/acme/api:dev/x": false, "ghcr.io/a:b:c": false, "ghcr.io/x:{repository}": false,
		"ghcr.io/acme/api@sha256:0123456789abcdef": false, "ghcr.io/acme/api:dev@*": false, "*@*": false, "ghcr.io/acme/../evil:dev": false,
		"ghcr.io/acmé/api:dev": false, "ghcr.io/acme/api:dev\n": false, "ghcr.io/acme/api:d?v": false,
		"docker.io/nginx:dev": false, "docker.io/nginx:*": false, "index.docker.io/nginx:dev": false, "docker.io/{repository_owner}:dev": false,
	} {
		if err := checkImage(s); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestForms(t *testing.T) {
	for _, form := range formsForTest() {
		if _, err := regexp.Compile(form); err != nil {
			t.Error(err)
		}
		if !possible(pattern{"", ""}, form) {
			t.Errorf("%s: not even * is possible", form)
		}
	}
}

func formsForTest() []string {
	forms := []string{imageForm}
	for _, name := range slices.Sorted(maps.Keys(claimForms)) {
		forms = append(forms, claimForms[name].form)
	}
	return forms
}

// TestMatchIsLinear has the input that takes a backtracking matcher for ever.
func TestMatchIsLinear(t *testing.T) {
	p := newPattern(strings.Repeat("a*", 2000) + "b")
	if p.matches(strings.Repeat("a", 100_000)) {
		t.Error("matched")
	}
}

// matchesSimply is the definition: a star is nothing, or a byte and the star.
func matchesSimply(p, s string) bool {
	row := make([]bool, len(s)+1) // row[i]: p up to here matches s[:i]
	row[0] = true
	for _, c := range []byte(p) {
		next := make([]bool, len(s)+1)
		for i := range next {
			if c == '*' {
				next[i] = row[i] || i > 0 && next[i-1]
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
	} {
		f.Add(seed[0], seed[1])
	}
	forms := formsForTest()
	anchored := make([]*regexp.Regexp, len(forms))
	for i, form := range forms {
		anchored[i] = regexp.MustCompile(`\A(?:` + form + `)\z`)
	}
	f.Fuzz(func(t *testing.T, p, s string) {
		if len(p) > 200 || len(s) > 1000 {
			t.Skip("slow")
		}
		want := matchesSimply(p, s)
		if got := newPattern(p).matches(s); got != want {
			t.Errorf("%q matches %q: %t", p, s, got)
		}
		for i, re := range anchored {
			can := possible(newPattern(p), forms[i])
			if want && re.MatchString(s) && !can {
				t.Errorf("%q is refused and matches %q", p, s)
			}
			if !strings.Contains(p, "*") && can != re.MatchString(p) {
				t.Errorf("%q possible: %t", p, can)
			}
		}
	})
}

// FuzzPolicy: what is accepted means the same when it is written out and read
// again, restricts something, and names nothing that could be forgotten.
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
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %q", err)
			}
			return
		}
		if text == "" {
			return
		}
		// A plain reading of the same text says no more and no less.
		var plain []struct {
			Claims map[string]any
			Images []string
		}
		decoder := yaml.NewDecoder(strings.NewReader(text))
		decoder.KnownFields(true)
		if err := decoder.Decode(&plain); err != nil || len(plain) != len(p.rules) {
			t.Fatalf("%d rules, plainly %d: %v", len(p.rules), len(plain), err)
		}
		for i, r := range p.rules {
			read := map[string][]string{}
			for _, cond := range r.conditions {
				for _, value := range cond.values {
					read[cond.claim] = append(read[cond.claim], value.String())
				}
			}
			if _, named := plain[i].Claims["event_name"]; !named {
				delete(read, "event_name")
			}
			said := map[string][]string{}
			for name, value := range plain[i].Claims {
				values, ok := value.([]any)
				if !ok {
					values = []any{value}
				}
				for _, v := range values {
					said[name] = append(said[name], fmt.Sprint(v))
				}
			}
			var images []string
			for _, image := range r.images {
				images = append(images, image.String())
			}
			if !reflect.DeepEqual(read, said) || !slices.Equal(images, plain[i].Images) {
				t.Errorf("rule %d: read %q %q, plainly %q %q", i+1, read, images, said, plain[i].Images)
			}
		}
		type written struct {
			Claims map[string][]string `json:"claims"`
			Images []string            `json:"images"`
		}
		var list []written
		for _, r := range p.rules {
			w := written{map[string][]string{}, nil}
			named := false
			for _, cond := range r.conditions {
				for _, value := range cond.values {
					w.Claims[cond.claim] = append(w.Claims[cond.claim], value.String())
				}
				named = named || cond.claim == "event_name"
			}
			for _, image := range r.images {
				w.Images = append(w.Images, image.String())
				if err := checkImage(image.String()); err != nil {
					t.Error(err)
				}
			}
			if !named || len(w.Images) == 0 || len(w.Claims) != len(r.conditions) {
				t.Errorf("rule %v", r)
			}
			list = append(list, w)
			if _, ok := r.mismatch(claims{}); ok {
				t.Error("a rule for anyone")
			}
		}
		if len(list) == 0 {
			t.Fatal("no rules")
		}
		again, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		q, err := readPolicy([]string{"acme"}, nil, string(again))
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		for i := range q.rules {
			// The event's place depends on whether it was named.
			byClaim := func(a, b condition) int { return strings.Compare(a.claim, b.claim) }
			slices.SortFunc(p.rules[i].conditions, byClaim)
			slices.SortFunc(q.rules[i].conditions, byClaim)
		}
		if !reflect.DeepEqual(p.rules, q.rules) {
			t.Errorf("%s reads as %v, meant %v", again, q.describe(), p.describe())
		}
	})
}
