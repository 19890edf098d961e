package main

import (
	"fmt"
	"maps"
	"reflect"
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
		{"another", []string{"acme"}, nil, claims{"repository_owner": "evil"}, `repository_owner is evil, none of GITHUB_ALLOWED_ORG`},
		{"longer", []string{"acme"}, nil, claims{"repository_owner": "acme-evil"}, `repository_owner is acme-evil`},
		{"shorter", []string{"acme"}, nil, claims{"repository_owner": "acm"}, `repository_owner is acm`},
		{"with a blank", []string{"acme"}, nil, claims{"repository_owner": "acme "}, `repository_owner is acme `},
		{"U+212A for k", []string{"kelvin"}, nil, claims{"repository_owner": "\u212aelvin"}, `repository_owner is \u212aelvin`},
		{"U+017F for s", []string{"sys"}, nil, claims{"repository_owner": "sy\u017f"}, `repository_owner is sy\u017f`},
		{"absent", []string{"acme"}, nil, claims{"repository_owner": "-"}, "repository_owner is absent"},
		{"empty", []string{"acme"}, nil, claims{"repository_owner": ""}, "repository_owner is empty"},
		{"pinned", []string{"acme"}, []string{"1", "9919"}, nil, ""},
		{"pinned, re-registered by someone else", []string{"acme"}, []string{"9919"}, claims{"repository_owner_id": "123"}, `repository_owner_id is 123, none of GITHUB_ALLOWED_ORG_ID`},
		{"pinned, zero before", []string{"acme"}, []string{"9919"}, claims{"repository_owner_id": "09919"}, "repository_owner_id is"},
		{"pinned, absent", []string{"acme"}, []string{"9919"}, claims{"repository_owner_id": "-"}, "repository_owner_id is absent"},
		{"the id of one, the name of none", []string{"acme"}, []string{"9919"}, claims{"repository_owner": "evil"}, "repository_owner is"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := mustPolicy(t, test.orgs, test.ownerIDs, "").checkClaims(jobClaims(test.claims))
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
		if err := p.checkClaims(c); (err == nil) != admitted {
			t.Errorf("event %q: %v", event, err)
		}
		if err := p.checkImages(c, []string{"ghcr.io/acme/api:dev", "docker.io/library/nginx:latest"}); (err == nil) != admitted {
			t.Errorf("event %q: %v", event, err)
		}
	}
	if err := p.checkImages(jobClaims(nil), nil); err == nil {
		t.Error("allowed a request without images")
	}
	want := []string{`default rule: event_name=push|workflow_dispatch|repository_dispatch|release|schedule|registry_package|deployment may restart *`}
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
		{"dev from a branch", designPolicy, claims{"ref": "refs/heads/x"}, []string{"ghcr.io/acme/api:dev"}, `rule 1: ref is refs/heads/x; rule 2: environment is absent`},
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
		{"pull_request_target looks like main", designPolicy, claims{"event_name": "pull_request_target"}, nil, `rule 1: event_name is pull_request_target; rule 2: event_name is pull_request_target`},
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
		{"all claims but one", "- claims: {ref: refs/heads/main, environment: [a, b]}\n  images: ['*']", claims{"environment": "c"}, nil, `environment is c`},
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
		{"one image", "- {claims: {ref: refs/heads/main}, images: '*'}", nil, []string{"ghcr.io/a/b:c"}, ""},
		{"JSON", `[{"claims":{"ref":"refs/heads/main"},"images":["*"]}]`, nil, []string{"ghcr.io/a/b:c"}, ""},
		{"comments and a document marker", "# who\n---\n" + designPolicy, nil, []string{"ghcr.io/acme/api:dev"}, ""},
		{"on and no are text", "- claims: {environment: [on, no]}\n  images: ['*']", claims{"environment": "no"}, []string{"ghcr.io/a/b:c"}, ""},
		{"anchors everywhere", "- &r\n  &i images: &l [&v 'ghcr.io/a/b:c']\n  claims: {&k ref: refs/heads/x}\n- *r\n- claims: {*k : refs/heads/main}\n  images: [*v]", nil, []string{"ghcr.io/a/b:c"}, ""},
		{"anchors", "- claims: &main {ref: refs/heads/main}\n  images: ['ghcr.io/a/b:c']\n- claims: *main\n  images: ['ghcr.io/a/b:d']", nil, []string{"ghcr.io/a/b:d"}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := mustPolicy(t, []string{"acme"}, nil, test.trust)
			c := jobClaims(test.claims)
			err := p.checkClaims(c)
			if err == nil && test.images != nil {
				err = p.checkImages(c, test.images)
			} else if err != nil && p.checkImages(c, []string{"ghcr.io/acme/api:dev"}) == nil {
				t.Error("allowed and not admitted")
			}
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("%v, expected %q", err, test.err)
			}
		})
	}
	want := []string{
		`rule 1: event_name=push|workflow_dispatch|release ref=refs/heads/main may restart ghcr.io/{repository}:dev`,
		`rule 2: event_name=push|workflow_dispatch|repository_dispatch|release|schedule|registry_package|deployment environment=production may restart ghcr.io/{repository}:v*`,
	}
	if got := mustPolicy(t, []string{"acme"}, nil, designPolicy).describe(); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// TestPolicyRefuses: each error names the line, and says what was expected there.
func TestPolicyRefuses(t *testing.T) {
	const good = "- claims: {environment: dev}\n  images: ['*']\n"
	tests := []struct{ trust, want string }{
		{" \n", "TRUST_POLICY (--trust-policy): line 1: no rules; expected a list, such as [{claims:"},
		{"# none yet", "no rules"},
		{"null", "no rules; expected a list"},
		{"[]", "no rules; expected a list"},
		{"deny", "no rules; expected a list"},
		{"rules:\n- claims: {ref: refs/heads/main}", "no rules; expected a list"},
		{"!disabled\n" + good, "line 1: !disabled"},
		{"- claims: {environment: dev}\n  images: [", "yaml: line 2"},
		{"- claims:\n\tref: x", "yaml: line 2"},
		{"- claims: *x", "unknown anchor"},
		{"- &r {claims: {environment: dev}, images: ['*'], x: *r}", "line 1: field x not found"},
		{designPolicy + "---\n" + designPolicy, "expected one YAML document"},
		{"[{claims: {environment: dev}, images: ['*']}] [x]", "expected one YAML document"},
		{"- claims: {environment: &e [dev, 1]}\n  images: ['*']\n- claims: {environment: *e}\n  images: ['*']", "line 1: !!int 1"},
		{"- claims: {environment: &e dev}\n  images: ['*']\n- claims:\n    ref: *e\n  images: ['*']", "rule 2, line 1: claim ref: dev can match no token"},
		{"# who\n" + good + "- claims:\n    environment: dev\n    # and\n    ref:\n    - refs/heads/main\n    - main\n  images: ['*']", "rule 2, line 8: claim ref: main can match no token"},
	}
	// A second rule, from line 3.
	for rule, want := range map[string]string{
		"- x":  "line 3: cannot unmarshal !!str `x` into main.trustRule",
		"-":    "line 3: !!null",
		"- {}": "rule 2, line 3: no claims or no images",
		"- []": "line 3: cannot unmarshal !!seq into main.trustRule",
		"- claim: {environment: dev}\n  images: ['*']":                              "line 3: field claim not found",
		"- claims: {environment: dev}\n  Images: ['*']":                             "line 4: field Images not found",
		"- claims: {environment: dev}\n  images: ['*']\n  deny: 'x'":                "line 5: field deny not found",
		"- claims: {environment: dev}\n  images: ['*']\n  deny: true":               "line 5: !!bool true",
		"- claims: {environment: dev}\n  images: ['*']\n  1: x":                     "line 5: !!int 1",
		"- claims: {environment: dev}\n  images: ['*']\n  claims: {environment: x}": "line 5: mapping key \"claims\" already defined at line 3",
		"- images: ['*']":                                      "rule 2, line 3: no claims",
		"- claims: {}\n  images: ['*']":                        "rule 2, line 3: no claims",
		"- claims:\n  images: ['*']":                           "line 3: !!null",
		"- claims: [environment]\n  images: ['*']":             "line 3: cannot unmarshal !!seq into map",
		"- claims: environment\n  images: ['*']":               "line 3: cannot unmarshal !!str `environ...` into map",
		"- claims: {environment: dev}":                         "rule 2, line 3: no claims or no images",
		"- claims: {environment: dev}\n  images:":              "line 4: !!null",
		"- claims: {environment: dev}\n  images: {a: b}":       "line 4: cannot unmarshal !!map",
		"- !deny {claims: {environment: dev}, images: ['*']}":  "line 3: !deny",
		"- claims: !not {environment: dev}\n  images: ['*']":   "line 3: !not",
		"- claims: !!null {environment: dev}\n  images: ['*']": "line 3: !!null",
		"- claims: {environment: dev}\n  images: !none ['*']":  "line 4: !none",
		"- claims: {environment: dev}\n  images: !!str ['*']":  "line 4: !!str",
	} {
		tests = append(tests, struct{ trust, want string }{good + rule, want})
	}
	for claim, want := range map[string]string{
		"ref: refs/heads/a, ref: refs/heads/b": `line 3: mapping key "ref" already defined`,
		"environment: []":                      "rule 2, line 3: claim environment: an empty list",
		"environment: ":                        "line 3: !!null",
		"environment: [dev, ~]":                "line 3: !!null ~",
		"event_name: , ref: refs/heads/main":   "line 3: !!null",
		"environment: {a: b}":                  "line 3: cannot unmarshal !!map",
		"environment: [[a]]":                   "line 3: cannot unmarshal !!seq",
		"environment:":                         "line 3: !!null",
		"repository_id: 812345678":             "line 3: !!int 812345678 is not a plain list, map or string; put numbers, true and false in quotes",
		"repository_id: ['1', 2]":              "line 3: !!int 2",
		"environment: 1.0":                     "line 3: !!float 1.0",
		"environment: true":                    "line 3: !!bool true",
		"environment: [2026-11-21]":            "line 3: !!timestamp",
		"environment: !x dev":                  "line 3: !x dev",
		"environment: !except [dev]":           "line 3: !except",
		"environment: !!binary ZGV2":           "line 3: !!binary",
		"<<: {environment: dev}":               "line 3: !!merge",
		"true: push":                           "line 3: !!bool true",
		"1: push":                              "line 3: !!int 1",
		"~: push, environment: dev":            "line 3: !!null",
		"[a]: push":                            "line 3: cannot unmarshal !!seq into string",
		`environment: "\x800"`:                 "line 3: \\u00800 has a control character",
		`environment: "dev\n"`:                 "has a control character",
		`"a\x00": b`:                           "has a control character",
		"'': x":                                "is not a claim name",
		"'*': x":                               "is not a claim name",
		"'ref ': x":                            "is not a claim name",
		"Ref: refs/heads/main":                 "rule 2, line 3: claim Ref: is not a claim name; expected ref",
		"event-name: push":                     "is not a claim name; expected event_name",
		"iss: x":                               "rule 2, line 3: claim iss: cannot be matched",
		"aud: x":                               "claim aud: cannot be matched",
		"exp: '*'":                             "claim exp: cannot be matched",
		"iat: '*'":                             "claim iat: cannot be matched",
		"nbf: '*'":                             "claim nbf: cannot be matched",
		"environment: 'x-{repository}'":        "claim environment: x-{repository} has a placeholder",
		"environment: '{env}'":                 "claim environment: {env} has a placeholder",
		"event_name: [push, Release]":          "rule 2, line 3: claim event_name: Release can match no token",
	} {
		tests = append(tests, struct{ trust, want string }{good + "- claims: {" + claim + "}\n  images: ['*']", want})
	}
	for image, want := range map[string]string{
		"":                     "rule 2, line 3: no claims or no images",
		"1":                    "line 4: !!int 1",
		"~":                    "line 4: !!null",
		"{repository}":         "line 4: ",
		`"ghcr.io/acme/\x07*"`: "line 4: ghcr.io/acme/\\a* has a control character",
		"'*', 'ghcr.io/a/b'":   "rule 2, line 4: images: ghcr.io/a/b can match no image; expected registry/name:tag",
		"'ghcr.io/{repo}:dev'": "rule 2, line 4: images: ghcr.io/{repo}:dev can match no image",
	} {
		tests = append(tests, struct{ trust, want string }{good + "- claims: {environment: dev}\n  images: [" + image + "]", want})
	}
	for _, test := range tests {
		_, err := readPolicy([]string{"acme"}, nil, test.trust)
		if err == nil || !strings.HasPrefix(err.Error(), "TRUST_POLICY (--trust-policy): ") || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v; expected %q", test.trust, err, test.want)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("more than a line: %q", err)
		}
	}
	if _, err := readPolicy(nil, nil, ""); err == nil || !strings.Contains(err.Error(), "GITHUB_ALLOWED_ORG") {
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
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %q", err)
			}
			return
		}
		if text == "" {
			return
		}
		var plain []struct {
			Claims map[string]any
			Images any
		}
		decoder := yaml.NewDecoder(strings.NewReader(text))
		decoder.KnownFields(true)
		if err := decoder.Decode(&plain); err != nil || len(plain) != len(p.rules) {
			t.Fatalf("%d rules, plainly %d: %v", len(p.rules), len(plain), err)
		}
		for i, r := range p.rules {
			if r.unmetCondition(claims{}) == nil {
				t.Errorf("rule %d is for anyone", i+1)
			}
			read := map[string]any{}
			for _, cond := range r.conditions {
				if !cond.isDefault {
					read[cond.claim] = patternTexts(cond.values)
				}
			}
			said := map[string]any{}
			for name, value := range plain[i].Claims {
				said[name] = plainTexts(value)
			}
			if !reflect.DeepEqual(read, said) || !slices.Equal(patternTexts(r.images), plainTexts(plain[i].Images)) {
				t.Errorf("rule %d: read %q %q, plainly %q", i+1, read, r.images, plain[i])
			}
		}
	})
}

func patternTexts(patterns []pattern) (texts []string) {
	for _, p := range patterns {
		texts = append(texts, string(p))
	}
	return texts
}

// plainTexts returns what is in a list, or the one value.
func plainTexts(value any) (texts []string) {
	list, ok := value.([]any)
	if !ok {
		list = []any{value}
	}
	for _, v := range list {
		texts = append(texts, fmt.Sprint(v))
	}
	return texts
}
