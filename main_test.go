package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"kuberollouttrigger/internal/fake"
)

// TestMain lets the test binary stand in for the program, so that its exit
// status is tested without building it again.
func TestMain(m *testing.M) {
	if os.Getenv("KUBEROLLOUTTRIGGER_TEST_MAIN") == "1" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// program runs the program with no environment but vars.
func program(t *testing.T, vars []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // a process that should not have started
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, args...)
	cmd.Env = append([]string{"KUBEROLLOUTTRIGGER_TEST_MAIN=1", "GOCOVERDIR=" + t.TempDir()}, vars...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestCommandLine(t *testing.T) {
	const (
		password   = "hunter2-do-not-print"
		workerArgs = "worker --valkey-addr=localhost:1 --allowed-image-prefix=ghcr.io/acme "
		webArgs    = "web --valkey-addr=localhost:1 --allowed-image-prefix=ghcr.io/acme --github-oidc-audience=a --github-allowed-org="
		noPort     = " --web-listen-addr=256.0.0.1:0 --ops-listen-addr=127.0.0.1:0"
	)
	secret := []string{"VALKEY_PASSWORD=" + password}
	for _, tt := range []struct {
		args           string
		vars           []string
		code           int
		stdout, stderr string // parts
	}{
		{args: "help", stdout: "usage: kuberollouttrigger <subcommand>"},
		{args: "--help", stdout: "web"},
		{args: "version", stdout: "kuberollouttrigger "},
		{args: "--version", stdout: "kuberollouttrigger "},
		{args: "-version", stdout: "kuberollouttrigger "},
		{args: "worker --no-such-flag", code: 2, stderr: "flag provided but not defined: -no-such-flag; see kuberollouttrigger worker -h"},
		{args: "worker --github-allowed-org x", code: 2, stderr: "flag provided but not defined: -github-allowed-org"},
		{args: "version x", code: 2, stderr: "unexpected argument"},
		{args: "", code: 2, stderr: "a subcommand is missing"},
		{args: "serve", code: 2, stderr: `unknown subcommand "serve"`},
		{args: "web -h", vars: secret, stdout: "--github-oidc-audience"},
		{args: "worker --help", vars: secret, stdout: "--worker-namespaces"},
		{args: "web", vars: secret, code: 2, stderr: "missing required configuration: VALKEY_ADDR (--valkey-addr), ALLOWED_IMAGE_PREFIX (--allowed-image-prefix), GITHUB_OIDC_AUDIENCE (--github-oidc-audience), GITHUB_ALLOWED_ORG (--github-allowed-org)"},
		{args: "worker", code: 2, stderr: "missing required configuration: VALKEY_ADDR (--valkey-addr), ALLOWED_IMAGE_PREFIX (--allowed-image-prefix), KUBECONFIG (--kubeconfig)"},
		{args: workerArgs + "--kubeconfig=/none", code: 2, stderr: `KUBECONFIG (--kubeconfig): "/none": expected a file with a cluster`},
		{args: workerArgs + "--kubeconfig=go.mod", code: 2, stderr: `KUBECONFIG (--kubeconfig): "go.mod": `},
		{args: webArgs + "acme " + noPort, vars: secret, code: 1, stderr: "listening for web"},
		{args: webArgs + "acme --trust-policy=x", code: 2, stderr: "TRUST_POLICY (--trust-policy): line 1: no rules"},
		// web says at start what holds.
		{args: webArgs + "acme,b --github-allowed-org-id=7 " + noPort, code: 1,
			stderr: `"msg":"policy","rules":["default rule: event_name=push|workflow_dispatch|repository_dispatch|release|schedule|registry_package|deployment may restart *"],"prefixes":["ghcr.io/acme"],"orgs":["acme","b"],"org_ids":["7"],"issuer":"https://token.actions.githubusercontent.com","audience":"a"}`},
		{args: webArgs + "acme " + noPort,
			vars: []string{"TRUST_POLICY=- {claims: {event_name: [push, pull_request_target]}, images: ['*']}\n- {claims: {event_name: push}, images: ['*']}"}, code: 1,
			stderr: `event_name allows events that people without write access can cause","rules":["rule 1: pull_request_target"]}`},
		{args: "web --valkey-password= " + password, code: 2, stderr: "unexpected argument; write --name=value"},
		{args: "version -h", stdout: "kuberollouttrigger "},
		{args: workerArgs + "--kubeconfig=testdata/kubeconfig --valkey-tls-enabled --valkey-tls-ca-file=go.mod", code: 2, stderr: `VALKEY_TLS_CA_FILE (--valkey-tls-ca-file): "go.mod": expected a file with a PEM certificate`},
		{args: "dev", code: 2, stderr: "the subcommand dev is only in a development build: go run -tags dev . dev"},
	} {
		if slices.ContainsFunc(commands, func(c command) bool { return c.name == tt.args && c.name == "dev" }) {
			continue // a development build
		}
		stdout, stderr, code := program(t, tt.vars, strings.Fields(tt.args)...)
		if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.stderr) {
			t.Errorf("%q: exit %d, want %d\nstdout %s\nstderr %s", tt.args, code, tt.code, stdout, stderr)
		}
		if strings.Contains(stdout+stderr, password) {
			t.Errorf("%q prints the password", tt.args)
		}
	}
}

// Each process is ready only if all that it depends on is.
func TestReadiness(t *testing.T) {
	issuer, downIssuer := newTestIssuer(t), newTestIssuer(t)
	downIssuer.Down.Store(true)
	_, valkey := testValkey(t)
	m, downValkey := testValkey(t)
	m.Close()
	kube := clientOf(t, newKubernetes(t))

	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for _, tt := range []struct {
		mode, valkey string
		issuer       *testIssuer
		want         string
	}{
		{"web", valkey.Addr, issuer, "200 OK ok"},
		{"web", valkey.Addr, downIssuer, "503 Service Unavailable " + errNoKeys.Error()},
		{"web", downValkey.Addr, issuer, "503 Service Unavailable valkey"},
		{"worker", valkey.Addr, issuer, "200 OK ok"},
		{"worker", downValkey.Addr, issuer, "503 Service Unavailable"},
	} {
		cfg, worker := &webConfig{}, &workerConfig{}
		args := []string{"--ops-listen-addr=127.0.0.1:0", "--valkey-addr=" + tt.valkey}
		err := parseConfig("web", cfg, append(args, "--web-listen-addr=127.0.0.1:0", "--github-oidc-issuer="+tt.issuer.URL), env(webEnv))
		if err = errors.Join(err, parseConfig("worker", worker, args, env(workerEnv))); err != nil {
			t.Fatal(err)
		}
		logs := &logBuffer{}
		log := newLogger(logs, slog.LevelInfo)
		running.Go(func() {
			serve := func() error { return serveWeb(ctx, cfg, tt.issuer.Client(), log) }
			if tt.mode == "worker" {
				serve = func() error { return serveWorker(ctx, worker, kube, log) }
			}
			if err := serve(); err != nil {
				t.Errorf("%s: %v", tt.mode, err)
			}
		})
		var addr []string
		eventually(t, tt.mode+" listens", func() bool {
			addr = regexp.MustCompile(`"server":"ops","addr":"([^"]+)"`).FindStringSubmatch(logs.String())
			return addr != nil
		})
		eventually(t, tt.mode+" answers "+tt.want, func() bool {
			resp, err := http.Get("http://" + addr[1] + "/readyz")
			if err != nil {
				return false
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			return strings.HasPrefix(resp.Status+" "+string(body), tt.want)
		})
	}
}

// TestSinglePass: the worker's client answers what the usual dynamic client answers,
// errors too. An empty answer must not look like an empty cluster.
func TestSinglePass(t *testing.T) {
	const object = `{"kind":"Deployment","apiVersion":"apps/v1","metadata":{"name":"api","generation":7},"spec":{"paused":true,"x":[1,2.5,"a",null]}}`
	status := func(reason string, code int) string {
		return fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"no","reason":%q,"code":%d}`, reason, code)
	}
	for body, code := range map[string]int{
		object: 200,
		`{"kind":"DeploymentList","apiVersion":"apps/v1","metadata":{"resourceVersion":"9","continue":"x"},"items":[` + object + `,` + object + `]}`:  200,
		`{"type":"ADDED","object":` + object + `}{"type":"BOOKMARK","object":` + object + `}{"type":"ERROR","object":` + status("Expired", 410) + `}`: 200,
		`{}`: 200, `null`: 200, `[]`: 200, `<html>`: 200, status("Conflict", 200): 200, status("Conflict", 409): 409, status("Invalid", 422): 422, `{"a":1}`: 502,
		`{"kind":"List","items":5}`: 200, `{"kind":"List","items":[5,` + object + `]}`: 200,
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			io.WriteString(w, body)
		}))
		usual, ours := dynamic.NewForConfigOrDie(&rest.Config{Host: server.URL}), clientOf(t, &fake.KubernetesAPI{URL: server.URL})
		if got, want := allAnswers(t, ours), allAnswers(t, usual); got != want {
			t.Errorf("%d %s\n got %s\nwant %s", code, body, got, want)
		}
		server.Close()
	}
}

// allAnswers is what a client makes of the answers to a list, a patch and a watch.
func allAnswers(t *testing.T, client dynamic.Interface) (text string) {
	show := func(answer any, err error) { text += fmt.Sprintf("%s %v %T\n", jsonBytes(answer), err, err) }
	api := client.Resource(kinds[0].resource).Namespace("team")
	list, err := api.List(t.Context(), metav1.ListOptions{})
	show(list, err)
	show(api.Patch(t.Context(), "api", types.MergePatchType, []byte(`{}`), metav1.PatchOptions{}))
	stream, err := api.Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		return text + err.Error()
	}
	for event := range stream.ResultChan() {
		if event.Type == watch.Error { // an invalid one has another text
			event.Object.(*metav1.Status).Message, event.Object.(*metav1.Status).Details = "", nil
		}
		show(event, nil)
	}
	return text
}

// The production build holds nothing of what is for development and tests, and
// none of the packages that would double its size.
func TestProductionBuild(t *testing.T) {
	for _, target := range []string{"linux/amd64", "linux/arm64"} {
		goos, goarch, _ := strings.Cut(target, "/")
		cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{.ImportPath}} {{.GoFiles}}", ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+goos, "GOARCH="+goarch)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		lines := strings.Split(string(out), "\n")
		if len(lines) < 100 {
			t.Fatalf("go list found %d packages", len(lines))
		}
		for _, line := range lines {
			path, files, _ := strings.Cut(line, " ")
			for _, forbidden := range []string{
				"k8s.io/client-go/kubernetes", "k8s.io/client-go/informers", "k8s.io/client-go/dynamic/dynamicinformer",
				"k8s.io/client-go/dynamic/fake", "k8s.io/client-go/testing", "k8s.io/api", "github.com/alicebob/miniredis",
				"testing", "net/http/httptest", "github.com/rogpeppe/go-internal", "kuberollouttrigger/internal",
			} {
				if path == forbidden || strings.HasPrefix(path, forbidden+"/") {
					t.Errorf("%s: %s is in the production build", target, path)
				}
			}
			if path == "kuberollouttrigger" && strings.Contains(files, "dev") {
				t.Errorf("%s: development code is in the production build: %s", target, files)
			}
		}
	}
}
