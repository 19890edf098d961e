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

// policyCases has for each heading of docs/policies.md with a policy the
// requests that must pass and those that must not. A request is an image under
// ghcr.io/acme and what differs from the claims of a push to main of acme/api.
var policyCases = map[string]struct{ pass, deny []string }{
	"Names pinned by ids": {
		pass: []string{"api:dev", "api:dev repository=acme/renamed"},
		deny: []string{"api:dev repository_id=5", "api:dev repository_owner_id=5", "api:dev ref=refs/heads/fix",
			"api:dev event_name=pull_request_target", "api:v1", "web:dev", "renamed:dev repository=acme/renamed"},
	},
}

// postCase sends a request of policyCases to web and returns the status.
func postCase(w *testWeb, request string) int {
	image, differences, _ := strings.Cut(request, " ")
	claims := map[string]any{}
	for difference := range strings.FieldsSeq(differences) {
		name, value, _ := strings.Cut(difference, "=")
		claims[name] = value
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
