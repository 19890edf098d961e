//go:build dev

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"kuberollouttrigger/internal/fake"
)

// runDevOnce runs dev --once with more arguments.
func runDevOnce(t *testing.T, vars map[string]string, args ...string) (out, logs string, err error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	err = run(t.Context(), append([]string{"dev", "--once"}, args...), env(vars), &stdout, &stderr)
	return stdout.String(), stderr.String(), err
}

// The cluster and the Valkey that the environment names are left alone.
func TestDevOnce(t *testing.T) {
	kube := newKubernetes(t, "a/api")
	m, cfg := testValkey(t)
	out, logs, err := runDevOnce(t, map[string]string{"KUBECONFIG": kube.Kubeconfig(t.TempDir()), "VALKEY_ADDR": cfg.Addr,
		"VALKEY_TLS_ENABLED": "true", "WORKER_NAMESPACES": "a", "WORKER_SELECTOR": "a=b"})
	if err != nil || logs != "" {
		t.Fatalf("%v\n%s%s", err, out, logs)
	}
	for _, want := range []string{
		`web answers 202 .*"subscribers":1`, `The worker restarted what runs it, within \S+ of the POST:\n   web `,
		`web +accepted ghcr.io/acme/api:dev from acme/api \(push, refs/heads/main\); workers that heard it: 1`,
		`worker +ghcr.io/acme/api:dev was requested; workloads that run it: 3`,
		`shop/api restarted, restartedAt is now 2`, `shop/api-migrated-first restarted`, `shop/api-frozen not restarted: paused`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("the story does not match %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "storefront") || strings.Contains(out, "\x1b") {
		t.Errorf("the story has what it must not have:\n%s", out)
	}
	if len(kube.Patches("")) > 0 || kube.Watchers() > 0 || len(m.Keys()) > 0 {
		t.Error("the cluster or the Valkey of the environment is used")
	}
}

func TestDevOnAClusterOfOnesOwn(t *testing.T) {
	kube := newKubernetes(t)
	kube.Create("a/web", fake.Spec{Image: "ghcr.io/acme/web:main"})
	kube.Create("c/web", fake.Spec{Image: "ghcr.io/acme/web:main", Policy: "IfNotPresent"})
	kube.Forbid = func(_, namespace string) bool { return namespace != "a" && namespace != "c" } // RBAC
	kube.Selector = "team=payments"
	vars := map[string]string{"WORKER_NAMESPACES": "a,c", "WORKER_SELECTOR": kube.Selector, "VALKEY_CHANNEL": "krt"}
	m, cfg := testValkey(t)
	flags := []string{"--valkey-addr", cfg.Addr, "--kubeconfig", kube.Kubeconfig(t.TempDir())}

	out, _, err := runDevOnce(t, vars, flags...)
	if err == nil || err.Error() != "nothing was restarted" || len(kube.Patches("")) > 0 ||
		!strings.Contains(out, "The worker restarted nothing") || !strings.Contains(out, "workloads that run it: 0") {
		t.Errorf("no Deployment runs the image: %v\n%s", err, out)
	}
	want := "This restarts real workloads that run ghcr.io/acme/api:dev, in context fake, server " + kube.URL + ".\n"
	if !strings.HasPrefix(out, want) || !strings.Contains(out, "  "+cfg.Addr+", as --valkey-addr says\n") {
		t.Errorf("it does not say where it works:\n%s", out)
	}
	if _, err := m.ZScore("krt:requested", apiDev); err != nil {
		t.Errorf("nothing is in the ledger: %v", err)
	}
	out, logs, err := runDevOnce(t, vars, append(flags, "--image", "ghcr.io/acme/web:main", "--repository", "acme/web")...)
	if err != nil || logs != "" || kube.RestartedAt("a/web") == "" || kube.RestartedAt("c/web") == "" ||
		!strings.Contains(out, "from acme/web (push") || !strings.Contains(out, "c/web restarted: imagePullPolicy") {
		t.Errorf("%v\n%s%s", err, out, logs)
	}
}

// When the restart fails, it says so and tells the reason.
func TestDevOutOfTime(t *testing.T) {
	kube := newKubernetes(t, "a/api")
	ctx, cancel := context.WithCancel(t.Context())
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		if len(kube.Patches("")) > 1 {
			cancel()
		}
		return http.StatusInternalServerError, nil
	}
	var out, logs bytes.Buffer
	err := run(ctx, []string{"dev", "--once", "--kubeconfig", kube.Kubeconfig(t.TempDir())}, env(nil), &out, &logs)
	if err == nil || err.Error() != "nothing was restarted" || !strings.Contains(out.String(), "a/api restart failed") ||
		!strings.Contains(out.String(), "It is not done yet.") || logs.Len() > 0 {
		t.Errorf("%v\n%s%s", err, &out, &logs)
	}
}

// After the story it narrates what happens to the requests of others.
func TestDevLive(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var out, logs logBuffer
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"dev"}, env(nil), &out, &logs) }()
	eventually(t, "it invites", func() bool { return strings.Contains(out.String(), "Stop with Ctrl-C") })
	told := `4. The job asks what became of it: GET /rollout\?image=\S+&since=\S+&wait=5s
(   progressing: 3 run it, 2 restarted, [01] complete, 0 failed, 1 deferred \(paused\)
)+   progressing: 3 run it, 2 restarted, 2 complete, 0 failed, 1 deferred \(paused\)
5. Somebody resumes shop/api-frozen.
(   worker .*
)?(   progressing: 3 run it, 3 restarted, 2 complete, 0 failed
)+   complete: 3 run it, 3 restarted, 3 complete, 0 failed
`
	if !regexp.MustCompile(told).MatchString(out.String()) {
		t.Errorf("the story does not match %s\n%s", told, &out)
	}
	exported := func(name string) string {
		m := regexp.MustCompile(`export ` + name + `='(.*)'`).FindStringSubmatch(out.String())
		if m == nil {
			t.Fatalf("no %s in\n%s", name, &out)
		}
		return m[1]
	}
	request := func(method, url, authorization, body string) string {
		req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Authorization": {authorization}, "Content-Type": {"application/json"}}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, _ := io.ReadAll(resp.Body)
		return string(answer)
	}
	answer := request("GET", exported("ACTIONS_ID_TOKEN_REQUEST_URL")+"&audience="+exported("AUDIENCE"), "bearer "+exported("ACTIONS_ID_TOKEN_REQUEST_TOKEN"), "")
	if answer := request("GET", exported("ACTIONS_ID_TOKEN_REQUEST_URL"), "bearer wrong", ""); answer != "" {
		t.Errorf("a token for the wrong request token: %s", answer)
	}
	token := regexp.MustCompile(`.*"value":"([^"]*)".*`).ReplaceAllString(strings.TrimSpace(answer), "$1")
	for _, tt := range []struct{ authorization, body, want string }{
		{"Bearer nonsense", "", "web     denied an unauthenticated caller with 401: "},
		{"Bearer " + token, `{"image":"docker.io/evil/api:dev"}`, "web     denied acme/api (push, refs/heads/main) with 403: image docker.io/evil/api:dev may not"},
		{"Bearer " + token, `{"image":"ghcr.io/acme/storefront:dev"}`, "worker  shop/storefront restarted"},
	} {
		request("POST", exported("ROLLOUT_URL")+"/event", tt.authorization, tt.body)
		eventually(t, tt.want, func() bool { return strings.Contains(out.String(), tt.want) })
	}
	pasted := exec.CommandContext(ctx, "bash", "-euc", regexp.MustCompile(`IMAGE=.* bash action/rollout.sh`).FindString(out.String()))
	for _, name := range []string{"ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "AUDIENCE", "ROLLOUT_URL"} {
		pasted.Env = append(pasted.Env, name+"="+exported(name))
	}
	pasted.Env = append(pasted.Env, "PATH="+os.Getenv("PATH"))
	followed, err := pasted.CombinedOutput()
	if err != nil || !strings.Contains(string(followed), "s complete: 3 matched, 3 restarted, 3 complete, 0 failed\n") {
		t.Errorf("%s: %v\n%s", pasted, err, followed)
	}
	if cancel(); <-done != nil || logs.String() != "" || !strings.Contains(out.String(), `"${ROLLOUT_URL%/}/event"`) {
		t.Errorf("%s%s", &out, &logs)
	}
}

// Color and LOG_LEVEL, and nothing of a log line that a terminal would obey.
func TestDevNarrator(t *testing.T) {
	const denied = `{"level":"INFO","msg":"denied","status":401,"reason":"bad \u001b[2J"}` + "\n"
	const other = `{"level":"WARN","msg":"other"}` + "\n"
	for _, tt := range []struct{ level, out, logs string }{
		{"", "   web     denied an unauthenticated caller with 401: bad  [2J\n", other},
		{"info", "   web     denied an unauthenticated caller with 401: bad  [2J\n", denied + other},
	} {
		var out, logs bytes.Buffer
		n := newNarrator(env(map[string]string{"LOG_LEVEL": tt.level}), &out, &logs)
		n.flush(true)
		io.WriteString(n.log("web"), denied)
		io.WriteString(n.log("web"), other)
		if out.String() != tt.out || logs.String() != tt.logs {
			t.Errorf("%q: %q and %q", tt.level, &out, &logs)
		}
	}
	var told bytes.Buffer
	kinds := newNarrator(env(nil), &told, io.Discard)
	for _, line := range []string{`"msg":"requested","matched":2`, `"msg":"restarted","statefulset":"db"`, `"msg":"would restart","deployment":"db"`} {
		io.WriteString(kinds.log("worker"), `{"requested_at":"T","namespace":"a",`+line+"}\n")
	}
	restarted, complete := kinds.await(t.Context(), "T")
	if kinds.flush(true); !restarted || !complete || !strings.Contains(told.String(), "a/db restarted, restartedAt is now T") {
		t.Errorf("of two kinds: %t, %t\n%s", restarted, complete, &told)
	}
	var out bytes.Buffer
	n := newNarrator(env(nil), &out, io.Discard)
	n.color = true
	n.flush(true)
	if io.WriteString(n.log("web"), denied); !strings.HasPrefix(out.String(), "\x1b[31m   web") || !strings.HasSuffix(out.String(), "\x1b[0m\n") {
		t.Errorf("%q", &out)
	}
	if file, err := os.Create(filepath.Join(t.TempDir(), "out")); err != nil || newNarrator(env(nil), file, io.Discard).color {
		t.Errorf("a file is taken for a terminal (%v)", err)
	}
}

func TestDevUsage(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // what is taken for right does not stay up
	empty := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(empty, []byte("apiVersion: v1\nkind: Config\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ args, want string }{
		{"once", `unexpected argument "once"; see kuberollouttrigger dev -h`},
		{"--once now", `unexpected argument "now"`},
		{"--repository acme", `--repository: "acme" is not a repository; expected owner/name, such as acme/api`},
		{"--repository acme/", "expected owner/name"},
		{"--repository /api", "expected owner/name"},
		{"--repository acme/api/x", "expected owner/name"},
		{"--repository a,b/api", "expected owner/name"},
		{"--image ghcr.io/acme/api", "--image: "},
		{"--kubeconfig " + empty + ".none", "--kubeconfig: "},
		{"--kubeconfig " + empty, "has no current context"},
	} {
		var out, logs bytes.Buffer
		err := run(ctx, append([]string{"dev"}, strings.Fields(tt.args)...), env(nil), &out, &logs)
		if usage := (usageError{}); !errors.As(err, &usage) || !strings.Contains(err.Error(), tt.want) || out.Len() > 0 {
			t.Errorf("dev %s: %v, want %q\n%s", tt.args, err, tt.want, &out)
		}
	}
}
