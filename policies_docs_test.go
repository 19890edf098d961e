package main

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// policyCase is a job that asks for an image of ghcr.io/acme; claims are changes
// to those of a push to main of acme/api, and nil takes one away.
type policyCase struct {
	claims map[string]any
	image  string
}

const (
	deployWorkflow = "acme/.github/.github/workflows/deploy.yml"
	qaWorkflow     = "acme/.github/.github/workflows/qa.yml"
)

// pullRequest is what the token of a pull_request job says, with changes.
func pullRequest(changes map[string]any) map[string]any {
	const workflow = "acme/api/.github/workflows/preview.yml@refs/pull/123/merge"
	c := map[string]any{
		"event_name": "pull_request", "ref": "refs/pull/123/merge", "head_ref": "fix-login", "base_ref": "main", "ref_protected": "false",
		"sub": "repo:acme/api:pull_request", "workflow_ref": workflow, "job_workflow_ref": workflow,
	}
	maps.Copy(c, changes)
	return c
}

// repository is the claims of another repository of acme.
func repository(name, id string, changes map[string]any) map[string]any {
	c := map[string]any{"repository": name, "repository_id": id, "sub": "repo:" + name + ":ref:refs/heads/main"}
	maps.Copy(c, changes)
	return c
}

type change = map[string]any

// policyCases has for each heading of docs/policies.md with a policy the jobs
// that must pass and those that must not.
var policyCases = map[string]struct{ pass, deny []policyCase }{
	"Dev from main only": {
		pass: []policyCase{
			{nil, "ghcr.io/acme/api:dev"},
			{change{"event_name": "workflow_dispatch"}, "ghcr.io/acme/api:dev"},
			{repository("acme/web", "5", nil), "ghcr.io/acme/web:dev"},
		},
		deny: []policyCase{
			{nil, "ghcr.io/acme/api:v1"},
			{nil, "ghcr.io/acme/api:dev2"},
			{nil, "ghcr.io/acme/web:dev"},
			{change{"ref": "refs/heads/fix"}, "ghcr.io/acme/api:dev"},
			{change{"ref": "refs/tags/main"}, "ghcr.io/acme/api:dev"},
			{change{"event_name": "schedule"}, "ghcr.io/acme/api:dev"},
			{change{"event_name": "pull_request_target"}, "ghcr.io/acme/api:dev"},
			{change{"event_name": "workflow_run"}, "ghcr.io/acme/api:dev"},
			{pullRequest(nil), "ghcr.io/acme/api:dev"},
			{repository("evil/api", "6", change{"repository_owner": "evil"}), "ghcr.io/evil/api:dev"},
		},
	},
	"Production after a review": {
		pass: []policyCase{
			{change{"environment": "production"}, "ghcr.io/acme/api:v1.2"},
			{change{"environment": "production", "ref": "refs/tags/v1.2", "event_name": "release"}, "ghcr.io/acme/api:v1.2"},
			{repository("acme/web", "5", change{"environment": "production", "ref": "refs/tags/v2"}), "ghcr.io/acme/web:v2"},
		},
		deny: []policyCase{
			{nil, "ghcr.io/acme/api:v1.2"},
			{change{"environment": "Production"}, "ghcr.io/acme/api:v1.2"},
			{change{"environment": "production-eu"}, "ghcr.io/acme/api:v1.2"},
			{change{"environment": "production", "ref": "refs/heads/fix"}, "ghcr.io/acme/api:v1.2"},
			{change{"environment": "production", "ref": "refs/tags/x"}, "ghcr.io/acme/api:v1.2"},
			{change{"environment": "production", "event_name": "pull_request_target"}, "ghcr.io/acme/api:v1.2"},
			{pullRequest(change{"environment": "production"}), "ghcr.io/acme/api:v1.2"},
			{change{"environment": "production"}, "ghcr.io/acme/api:dev"},
			{change{"environment": "production"}, "ghcr.io/acme/web:v1.2"},
		},
	},
	"Preview and QA images from pull requests": {
		pass: []policyCase{
			{pullRequest(change{"environment": "preview"}), "ghcr.io/acme/api:pr-123"},
			{pullRequest(change{"environment": "preview"}), "ghcr.io/acme/api:pr-7"}, // as the page says
			{pullRequest(change{"job_workflow_ref": qaWorkflow + "@refs/heads/main"}), "ghcr.io/acme/api:qa-123"},
		},
		deny: []policyCase{
			{pullRequest(nil), "ghcr.io/acme/api:pr-123"},
			{pullRequest(nil), "ghcr.io/acme/api:qa-123"},
			{pullRequest(change{"environment": "qa"}), "ghcr.io/acme/api:pr-123"},
			{pullRequest(change{"environment": "preview"}), "ghcr.io/acme/api:qa-123"},
			{pullRequest(change{"environment": "preview"}), "ghcr.io/acme/api:dev"},
			{pullRequest(change{"environment": "preview"}), "ghcr.io/acme/web:pr-123"},
			{pullRequest(change{"environment": "preview", "base_ref": "release/1"}), "ghcr.io/acme/api:pr-123"},
			{pullRequest(change{"job_workflow_ref": qaWorkflow + "@refs/heads/main"}), "ghcr.io/acme/api:pr-123"},
			{pullRequest(change{"job_workflow_ref": qaWorkflow + "@refs/heads/main"}), "ghcr.io/acme/api:v1"},
			{pullRequest(change{"job_workflow_ref": qaWorkflow + "@refs/heads/main", "base_ref": "release/1"}), "ghcr.io/acme/api:qa-123"},
			{pullRequest(change{"job_workflow_ref": qaWorkflow + "@refs/heads/fix"}), "ghcr.io/acme/api:qa-123"},
			{pullRequest(change{"job_workflow_ref": "acme/api/.github/workflows/qa.yml@refs/pull/123/merge"}), "ghcr.io/acme/api:qa-123"},
			// pull_request_target names main wherever a name is asked for.
			{change{"event_name": "pull_request_target", "base_ref": "main", "environment": "preview"}, "ghcr.io/acme/api:pr-123"},
			{change{"event_name": "pull_request_target", "base_ref": "main", "job_workflow_ref": qaWorkflow + "@refs/heads/main"}, "ghcr.io/acme/api:qa-123"},
			{change{"base_ref": "main", "environment": "preview"}, "ghcr.io/acme/api:pr-123"},
			// A fork's own run, under the fork's owner.
			{pullRequest(repository("evil/api", "6", change{"repository_owner": "evil", "environment": "preview"})), "ghcr.io/acme/api:pr-123"},
		},
	},
	"Hotfix branches": {
		pass: []policyCase{
			{change{"ref": "refs/heads/release/1.4"}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/release/1.4/login"}, "ghcr.io/acme/api:hotfix-1.4.1"},
		},
		deny: []policyCase{
			{nil, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/release"}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/release-1.4"}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/fix/refs/heads/release/1.4"}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/tags/release/1.4"}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/release/1.4", "ref_protected": "false"}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/release/1.4", "ref_protected": true}, "ghcr.io/acme/api:hotfix-1.4.1"}, // never GitHub's form
			{change{"ref": "refs/heads/release/1.4", "ref_protected": nil}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/release/1.4", "event_name": "workflow_dispatch"}, "ghcr.io/acme/api:hotfix-1.4.1"},
			{change{"ref": "refs/heads/release/1.4"}, "ghcr.io/acme/api:dev"},
			{change{"ref": "refs/heads/release/1.4"}, "ghcr.io/acme/web:hotfix-1.4.1"},
		},
	},
	"One reusable workflow for the whole organisation": {
		pass: []policyCase{
			{change{"job_workflow_ref": deployWorkflow + "@refs/heads/main"}, "ghcr.io/acme/api:dev"},
			{repository("acme/web", "5", change{"job_workflow_ref": deployWorkflow + "@refs/heads/main"}), "ghcr.io/acme/web:dev"},
		},
		deny: []policyCase{
			{nil, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": nil}, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": deployWorkflow + "@refs/heads/fix"}, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": deployWorkflow + "@refs/heads/main2"}, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": "evil/.github/.github/workflows/deploy.yml@refs/heads/main"}, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": "acme/api/.github/workflows/deploy.yml@refs/heads/main"}, "ghcr.io/acme/api:dev"},
			{change{"workflow_ref": deployWorkflow + "@refs/heads/main"}, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": deployWorkflow + "@refs/heads/main", "ref": "refs/heads/fix"}, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": deployWorkflow + "@refs/heads/main", "event_name": "pull_request_target"}, "ghcr.io/acme/api:dev"},
			{change{"job_workflow_ref": deployWorkflow + "@refs/heads/main"}, "ghcr.io/acme/web:dev"},
			{change{"job_workflow_ref": deployWorkflow + "@refs/heads/main"}, "ghcr.io/acme/api:v1"},
		},
	},
	"Names pinned by ids": {
		pass: []policyCase{
			{nil, "ghcr.io/acme/api:dev"},
			{repository("acme/renamed", "812345678", nil), "ghcr.io/acme/api:dev"},
		},
		deny: []policyCase{
			{repository("acme/api", "5", nil), "ghcr.io/acme/api:dev"},
			{change{"repository_owner_id": "5"}, "ghcr.io/acme/api:dev"},
			{repository("acme/api", "5", change{"repository_owner_id": "5"}), "ghcr.io/acme/api:dev"},
			{change{"ref": "refs/heads/fix"}, "ghcr.io/acme/api:dev"},
			{change{"event_name": "pull_request_target"}, "ghcr.io/acme/api:dev"},
			{nil, "ghcr.io/acme/api:v1"},
			{nil, "ghcr.io/acme/web:dev"},
			{repository("acme/renamed", "812345678", nil), "ghcr.io/acme/renamed:dev"},
		},
	},
	"One repository at a time": {
		pass: []policyCase{
			{nil, "ghcr.io/acme/api:v1"},
			{nil, "ghcr.io/acme/api-migrations:dev"},
			{repository("acme/web", "5", nil), "ghcr.io/acme/web:dev"},
			{repository("acme/shop", "7", nil), "ghcr.io/acme/shared/cart:dev"},
		},
		deny: []policyCase{
			{nil, "ghcr.io/acme/api-evil:dev"},
			{nil, "ghcr.io/acme/web:dev"},
			{nil, "ghcr.io/acme/shared/cart:dev"},
			{change{"ref": "refs/heads/fix"}, "ghcr.io/acme/api:v1"},
			{change{"event_name": "pull_request_target"}, "ghcr.io/acme/api:v1"},
			{repository("acme/Api", "8", nil), "ghcr.io/acme/api:v1"},
			{repository("acme/api2", "8", nil), "ghcr.io/acme/api:v1"},
			{repository("acme/web", "5", nil), "ghcr.io/acme/shop:dev"},
			{repository("acme/web", "5", nil), "ghcr.io/acme/web:v1"},
			{repository("acme/web", "5", nil), "ghcr.io/acme/shared/cart:v1"},
			{repository("acme/web", "5", change{"ref": "refs/heads/fix"}), "ghcr.io/acme/web:dev"},
			{repository("acme/web", "5", change{"event_name": "workflow_run"}), "ghcr.io/acme/web:dev"},
			{repository("acme/other", "9", nil), "ghcr.io/acme/other:dev"},
			{repository("acme/other", "9", nil), "ghcr.io/acme/shared/cart:dev"},
		},
	},
}

// TestDocsPolicies tries each policy of docs/policies.md with tokens, through
// explain, which answers as web does (TestExplainAgreesWithWeb). It also
// sees to it that the cases hold each claim and each image of the rules.
func TestDocsPolicies(t *testing.T) {
	issuer := newTestIssuer(t)
	seen := map[string]bool{}
	sections := regexp.MustCompile(`(?m)^## (.+)\n`).Split(readDoc(t, "docs/policies.md"), -1)
	headings := regexp.MustCompile(`(?m)^## (.+)\n`).FindAllStringSubmatch(readDoc(t, "docs/policies.md"), -1)
	for i, m := range headings {
		for _, b := range docBlocks(sections[i+1]) {
			if b.language != "yaml" || !strings.HasPrefix(b.text, "- claims:") {
				continue
			}
			heading, cases := m[1], policyCases[m[1]]
			t.Run(heading, func(t *testing.T) {
				if seen[heading] || len(cases.pass) < 2 || len(cases.deny) < 4 {
					t.Fatalf("the policy is one of two under its heading, or has %d and %d cases", len(cases.pass), len(cases.deny))
				}
				seen[heading] = true
				try := func(c policyCase) (string, error) {
					vars := map[string]string{"TRUST_POLICY": b.text, "GITHUB_OIDC_ISSUER": issuer.URL, "GITHUB_OIDC_AUDIENCE": testAudience}
					return askExplain(t, issuer.token(t, issuer.claimsWith(c.claims)), vars, "--image", c.image)
				}
				for _, c := range cases.pass {
					if out, err := try(c); err != nil {
						t.Errorf("%v may not restart %s: %v\n%s", c.claims, c.image, err, out)
					}
				}
				for _, c := range cases.deny {
					if out, err := try(c); !errors.Is(err, errDenied) || strings.Contains(out, "\nclaims ") {
						t.Errorf("%v may restart %s: %v\n%s", c.claims, c.image, err, out)
					}
				}
				everyPartCounts(t, b.text, cases.pass, cases.deny, issuer)
			})
		}
	}
	for heading := range policyCases {
		if !seen[heading] {
			t.Errorf("docs/policies.md has no policy under %q", heading)
		}
	}
}

// everyPartCounts changes one thing of the policy at a time. A condition that is
// dropped, or an image that becomes any, must let a case in that has to be
// denied; a value or an image that is dropped must keep one out that has to pass.
func everyPartCounts(t *testing.T, trust string, pass, deny []policyCase, issuer *testIssuer) {
	t.Helper()
	check := func(what string, cases []policyCase, want bool, edit func(r *rule), n int) {
		t.Helper()
		p := mustPolicy(t, []string{"acme"}, nil, trust)
		edit(&p.rules[n])
		if !slices.ContainsFunc(cases, func(tt policyCase) bool {
			c := claims{}
			for name, value := range issuer.claimsWith(tt.claims) {
				if s, ok := value.(string); ok {
					c[name] = s
				}
			}
			allowed := p.checkClaims(c) == nil && p.checkImages(c, []string{tt.image}) == nil
			return allowed == want
		}) {
			t.Errorf("rule %d: no case is for %s", n+1, what)
		}
	}
	for n, r := range mustPolicy(t, []string{"acme"}, nil, trust).rules {
		for i, cond := range r.conditions {
			check("the condition on "+cond.claim, deny, true, func(r *rule) { r.conditions = slices.Delete(slices.Clone(r.conditions), i, i+1) }, n)
			if cond.isDefault {
				continue // TestDefaultPolicy has them all
			}
			for j, value := range cond.values {
				check("the value "+value.String(), pass, false, func(r *rule) {
					r.conditions = slices.Clone(r.conditions)
					r.conditions[i].values = slices.Delete(slices.Clone(cond.values), j, j+1)
				}, n)
			}
		}
		for i, image := range r.images {
			check("the image "+image.String(), pass, false, func(r *rule) { r.images = slices.Delete(slices.Clone(r.images), i, i+1) }, n)
			check("more than the image "+image.String(), deny, true, func(r *rule) {
				r.images = slices.Clone(r.images)
				r.images[i] = newPattern("*")
			}, n)
		}
	}
}

// shell runs a command of the documentation; kuberollouttrigger in it is this
// binary.
func shell(t *testing.T, command, stdin string) (output string, code int) {
	t.Helper()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("sh is not installed")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(exe, filepath.Join(dir, "kuberollouttrigger")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), sh, "-euc", command)
	cmd.Env = []string{"PATH=" + dir + string(os.PathListSeparator) + os.Getenv("PATH"), "KUBEROLLOUTTRIGGER_TEST_MAIN=1", "GOCOVERDIR=" + dir}
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// The example of explain prints what the page says, to the letter.
func TestDocsExplainExample(t *testing.T) {
	_, section, _ := strings.Cut(readDoc(t, "docs/policies.md"), "\n## Why is it denied?\n")
	blocks := docBlocks(section)
	if len(blocks) < 2 || blocks[0].language != "sh" || blocks[1].language != "text" {
		t.Fatalf("%q", blocks)
	}
	if out, code := shell(t, blocks[0].text, ""); code != 1 || out != blocks[1].text {
		t.Errorf("exit %d\n%s\nwant\n%s", code, out, blocks[1].text)
	}
	// Its policy is the one of the examples above.
	_, trust, _ := strings.Cut(blocks[0].text, "TRUST_POLICY='\n")
	trust, _, _ = strings.Cut(trust, "'\n")
	var above string
	for _, b := range docBlocks(readDoc(t, "docs/policies.md")) {
		if strings.HasPrefix(b.text, "- claims:") {
			above += b.text
		}
	}
	if !strings.HasPrefix(above, trust) || strings.Count(trust, "- claims:") != 2 {
		t.Errorf("the policy of the example is\n%sand the first ones of the page are\n%s", trust, above)
	}
}

// The command that prints the claims of a token prints what explain reads.
func TestDocsClaimsCommand(t *testing.T) {
	for _, tool := range []string{"sh", "jq"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("in CI, %s must be there: %v", tool, err)
			}
			t.Skipf("%s is not installed", tool)
		}
	}
	command := regexp.MustCompile(`(?m)^printf %s "\$token" \| jq .*$`).FindString(readDoc(t, "docs/policies.md"))
	if command == "" {
		t.Fatal("docs/policies.md has no such command")
	}
	issuer := newTestIssuer(t)
	vars := map[string]string{"GITHUB_OIDC_ISSUER": issuer.URL}
	for _, ref := range []string{"refs/heads/main", "refs/heads/ma\u00efn", "refs/heads/~~~???>>>", "refs/heads/m"} { // - and _ and all lengths
		want, err := askExplain(t, string(jsonBytes(t, issuer.claimsWith(map[string]any{"ref": ref}))), vars, "--image=ghcr.io/acme/api:dev")
		if err != nil {
			t.Fatal(err)
		}
		token := issuer.token(t, issuer.claimsWith(map[string]any{"ref": ref}))
		out, code := shell(t, "token=$(cat)\n"+command, token)
		if code != 0 {
			t.Fatalf("exit %d: %s", code, out)
		}
		if got, err := askExplain(t, out, vars, "--image=ghcr.io/acme/api:dev"); err != nil || got != want {
			t.Errorf("%v\n%s\nwant\n%s", err, got, want)
		}
	}
}
