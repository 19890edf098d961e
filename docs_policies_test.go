package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	deployedBy = "job_workflow_ref=acme/.github/.github/workflows/deploy.yml@refs/heads/"
	testedBy   = "job_workflow_ref=acme/.github/.github/workflows/qa.yml@refs/heads/"
)

// policyCases has for each heading of docs/policies.md with a policy the
// requests that must pass and those that must not. A request is an image under
// ghcr.io/acme and what differs from the claims of a push to main of acme/api.
// "pull_request" stands for the claims of such a job, an empty value for a
// missing claim.
var policyCases = map[string]struct{ pass, deny []string }{
	"Dev from main only": {
		pass: []string{"api:dev", "api:dev event_name=workflow_dispatch", "web:dev repository=acme/web"},
		deny: []string{"api:v1", "api:dev2", "web:dev", "api:dev ref=refs/heads/fix", "api:dev ref=refs/tags/main", "api:dev event_name=schedule",
			"api:dev event_name=pull_request_target", "api:dev event_name=workflow_run", "api:dev pull_request",
			"api:dev repository=evil/api repository_owner=evil"},
	},
	"Production after a review": {
		pass: []string{"api:v1.2 environment=production", "api:v1.2 environment=production ref=refs/tags/v1.2 event_name=release",
			"web:v2 environment=production ref=refs/tags/v2 repository=acme/web"},
		deny: []string{"api:v1.2", "api:v1.2 environment=Production", "api:v1.2 environment=production-eu", "api:dev environment=production",
			"web:v1.2 environment=production", "api:v1.2 environment=production ref=refs/heads/fix", "api:v1.2 environment=production ref=refs/tags/x",
			"api:v1.2 environment=production event_name=pull_request_target", "api:v1.2 pull_request environment=production"},
	},
	"Preview and QA images from pull requests": {
		pass: []string{"api:pr-123 pull_request environment=preview", "api:pr-7 pull_request environment=preview",
			"api:qa-123 pull_request " + testedBy + "main"},
		deny: []string{"api:pr-123 pull_request", "api:qa-123 pull_request", "api:pr-123 pull_request environment=qa",
			"api:qa-123 pull_request environment=preview", "api:dev pull_request environment=preview", "web:pr-123 pull_request environment=preview",
			"api:pr-123 pull_request environment=preview base_ref=release/1", "api:pr-123 base_ref=main environment=preview",
			"api:pr-123 pull_request " + testedBy + "main", "api:v1 pull_request " + testedBy + "main", "api:qa-123 pull_request " + testedBy + "fix",
			"api:qa-123 pull_request base_ref=release/1 " + testedBy + "main",
			"api:qa-123 pull_request job_workflow_ref=acme/api/.github/workflows/qa.yml@refs/pull/123/merge",
			// pull_request_target names main in every other claim.
			"api:pr-123 event_name=pull_request_target base_ref=main environment=preview",
			"api:qa-123 event_name=pull_request_target base_ref=main " + testedBy + "main",
			"api:pr-123 pull_request environment=preview repository=evil/api repository_owner=evil"},
	},
	"Hotfix branches": {
		pass: []string{"api:hotfix-1 ref=refs/heads/release/1.4", "api:hotfix-1 ref=refs/heads/release/1.4/login"},
		deny: []string{"api:hotfix-1", "api:hotfix-1 ref=refs/heads/release", "api:hotfix-1 ref=refs/heads/release-1.4",
			"api:hotfix-1 ref=refs/tags/release/1.4", "api:hotfix-1 ref=refs/heads/fix/refs/heads/release/1.4",
			"api:hotfix-1 ref=refs/heads/release/1.4 ref_protected=false", "api:hotfix-1 ref=refs/heads/release/1.4 ref_protected=",
			"api:hotfix-1 ref=refs/heads/release/1.4 event_name=workflow_dispatch",
			"api:dev ref=refs/heads/release/1.4", "web:hotfix-1 ref=refs/heads/release/1.4"},
	},
	"One reusable workflow for the whole organization": {
		pass: []string{"api:dev " + deployedBy + "main", "web:dev repository=acme/web " + deployedBy + "main"},
		deny: []string{"api:dev", "api:dev job_workflow_ref=", "api:dev " + deployedBy + "fix", "api:dev " + deployedBy + "main2",
			"api:dev workflow_ref=acme/.github/.github/workflows/deploy.yml@refs/heads/main", "api:dev ref=refs/heads/fix " + deployedBy + "main",
			"api:dev job_workflow_ref=evil/.github/.github/workflows/deploy.yml@refs/heads/main",
			"api:dev event_name=pull_request_target " + deployedBy + "main", "web:dev " + deployedBy + "main", "api:v1 " + deployedBy + "main"},
	},
	"Names pinned by ids": {
		pass: []string{"api:dev", "api:dev repository=acme/renamed"},
		deny: []string{"api:dev repository_id=5", "api:dev repository_owner_id=5", "api:dev ref=refs/heads/fix",
			"api:dev event_name=pull_request_target", "api:v1", "web:dev", "renamed:dev repository=acme/renamed"},
	},
	"One repository at a time": {
		pass: []string{"api:v1", "api-migrations:dev", "web:dev repository=acme/web", "shared/cart:dev repository=acme/shop"},
		deny: []string{"api-evil:dev", "web:dev", "shared/cart:dev", "api:v1 ref=refs/heads/fix", "api:v1 event_name=pull_request_target",
			"api:v1 repository=acme/Api", "api:v1 repository=acme/api2", "shop:dev repository=acme/web", "web:v1 repository=acme/web",
			"shared/cart:v1 repository=acme/web", "web:dev repository=acme/web ref=refs/heads/fix", "other:dev repository=acme/other",
			"web:dev repository=acme/web event_name=workflow_run", "shared/cart:dev repository=acme/other"},
	},
}

// postCase sends a request of policyCases to web and returns the status.
func postCase(w *testWeb, request string) int {
	image, differences, _ := strings.Cut(request, " ")
	claims := map[string]any{}
	for difference := range strings.FieldsSeq(differences) {
		name, value, changed := strings.Cut(difference, "=")
		claims[name] = value
		switch {
		case !changed:
			const workflow = "acme/api/.github/workflows/preview.yml@refs/pull/123/merge"
			claims = map[string]any{"event_name": "pull_request", "ref": "refs/pull/123/merge", "base_ref": "main", "ref_protected": "false",
				"sub": "repo:acme/api:pull_request", "workflow_ref": workflow, "job_workflow_ref": workflow}
		case value == "":
			claims[name] = nil
		}
	}
	return w.post(claims, `{"image":"ghcr.io/acme/`+image+`"}`).StatusCode
}

// The real web decides by the policies of docs/policies.md as the page says.
func TestDocsPolicies(t *testing.T) {
	found := 0
	for _, section := range strings.Split(readDoc(t, "docs/policies.md"), "\n## ") {
		heading, text, _ := strings.Cut(section, "\n")
		for _, b := range docBlocks(text) {
			if b.language != "yaml" || !strings.HasPrefix(b.text, "- claims:") {
				continue
			}
			found++
			w := newTestWeb(t, b.text)
			for want, requests := range map[int][]string{http.StatusAccepted: policyCases[heading].pass, http.StatusForbidden: policyCases[heading].deny} {
				for _, request := range requests {
					if got := postCase(w, request); got != want {
						t.Errorf("%s: %s: status %d, expected %d", heading, request, got, want)
					}
				}
			}
		}
	}
	if found != len(policyCases) {
		t.Errorf("docs/policies.md has %d policies, expected %d", found, len(policyCases))
	}
}

// Without a policy, jobs are allowed for the events that the page lists.
func TestDocsDefaultEvents(t *testing.T) {
	_, list, _ := strings.Cut(readDoc(t, "docs/policies.md"), "one of these events: ")
	list, _, _ = strings.Cut(list, ".")
	w := newTestWeb(t, "")
	// https://docs.github.com/en/actions/reference/workflows-and-actions/events-that-trigger-workflows
	for event := range strings.FieldsSeq(`branch_protection_rule check_run check_suite create delete deployment deployment_status discussion
		discussion_comment fork gollum image_version issue_comment issues label merge_group milestone page_build public pull_request
		pull_request_review pull_request_review_comment pull_request_target push registry_package release repository_dispatch schedule
		status watch workflow_call workflow_dispatch workflow_run`) {
		got, listed := postCase(w, "api:dev event_name="+event), strings.Contains(list, "`"+event+"`")
		if listed != (got == http.StatusAccepted) {
			t.Errorf("web answers %d to a job for %s; docs/policies.md lists it: %t", got, event, listed)
		}
	}
}

// shell runs a command of the documentation with this binary as kuberollouttrigger.
func shell(t *testing.T, command, stdin string) (output string, code int) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err := errors.Join(err, os.Symlink(exe, filepath.Join(dir, "kuberollouttrigger"))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", command)
	cmd.Env, cmd.Stdin = []string{"KUBEROLLOUTTRIGGER_TEST_MAIN=1", "GOCOVERDIR=" + dir}, strings.NewReader(stdin)
	return runCommand(t, cmd, dir)
}

// explain prints for the example what the page shows.
func TestDocsExplainExample(t *testing.T) {
	_, section, _ := strings.Cut(readDoc(t, "docs/policies.md"), "\n## explain\n")
	example, output := docBlocks(section)[0].text, docBlocks(section)[1].text
	if out, code := shell(t, example, ""); code != 1 || out != output {
		t.Errorf("exit %d\n%s\ndocs/policies.md has\n%s", code, out, output)
	}
}

// The documented command prints the claims of a token.
func TestDocsClaimsCommand(t *testing.T) {
	needTools(t, "jq")
	command := regexp.MustCompile(`(?m)^printf %s "\$token" \| jq .*$`).FindString(readDoc(t, "docs/policies.md"))
	issuer := newTestIssuer(t)
	for _, ref := range []string{"refs/heads/main", "refs/heads/~~~???>>>", "refs/heads/m"} { // - and _ and all lengths
		want := issuer.claimsWith(map[string]any{"ref": ref})
		out, code := shell(t, "token=$(cat)\n"+command, issuer.Token(want))
		var got map[string]any
		if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 || got["ref"] != ref || len(got) != len(want) {
			t.Errorf("exit %d, %v: %s", code, err, out)
		}
	}
}
