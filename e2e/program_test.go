package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"
	"time"
)

// program is a running web or worker.
type program struct {
	*process
	url string // of web's public port
	ops string // URL of the ops port
}

// launch starts the program. The settings are NAME=value and replace earlier ones
// of the same name. NAME= alone unsets the variable.
func launch(t testing.TB, binary, mode string, settings ...string) *process {
	t.Helper()
	values, order := map[string]string{}, []string{}
	for _, setting := range append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}, settings...) {
		for i := range len(setting) {
			if setting[i] == '=' {
				if _, ok := values[setting[:i]]; !ok {
					order = append(order, setting[:i])
				}
				values[setting[:i]] = setting[i+1:]
				break
			}
		}
	}
	var env []string
	for _, name := range order {
		if values[name] != "" {
			env = append(env, name+"="+values[name])
		}
	}
	p, err := startProcess(mode, env, binary, mode)
	if err != nil {
		t.Fatal(err)
	}
	p.ownedBy(t)
	return p
}

// launchWeb starts a web that need not become ready.
func launchWeb(t testing.TB, binary, valkeyAddr string, settings ...string) *program {
	t.Helper()
	public, ops := mustPort(t), mustPort(t)
	web := &program{url: fmt.Sprintf("http://127.0.0.1:%d", public), ops: fmt.Sprintf("http://127.0.0.1:%d", ops)}
	web.process = launch(t, binary, "web", append([]string{
		fmt.Sprintf("WEB_LISTEN_ADDR=127.0.0.1:%d", public),
		fmt.Sprintf("OPS_LISTEN_ADDR=127.0.0.1:%d", ops),
		"VALKEY_ADDR=" + valkeyAddr,
		"ALLOWED_IMAGE_PREFIX=ghcr.io/acme",
		"GITHUB_OIDC_AUDIENCE=" + audience,
		"GITHUB_OIDC_ISSUER=" + github.URL,
		"GITHUB_ALLOWED_ORG=acme",
		"SSL_CERT_FILE=" + testCA.file,
	}, settings...)...)
	return web
}

func startWeb(t testing.TB, valkeyAddr string, settings ...string) *program {
	t.Helper()
	web := launchWeb(t, programPath, valkeyAddr, settings...)
	web.waitReady(t, 20*time.Second)
	return web
}

// launchWorker starts a worker that need not become ready. It defers nothing
// unless the settings say otherwise; WORKER_RESTART_INTERVAL= is the default.
func launchWorker(t testing.TB, binary, valkeyAddr, kubeconfig string, settings ...string) *program {
	t.Helper()
	ops := mustPort(t)
	worker := &program{ops: fmt.Sprintf("http://127.0.0.1:%d", ops)}
	worker.process = launch(t, binary, "worker", append([]string{
		fmt.Sprintf("OPS_LISTEN_ADDR=127.0.0.1:%d", ops),
		"VALKEY_ADDR=" + valkeyAddr,
		"ALLOWED_IMAGE_PREFIX=ghcr.io/acme",
		"KUBECONFIG=" + kubeconfig,
		// Most tests repeat requests and want a restart for each.
		"WORKER_RESTART_INTERVAL=0",
	}, settings...)...)
	return worker
}

func startWorker(t testing.TB, valkeyAddr, kubeconfig string, settings ...string) *program {
	t.Helper()
	worker := launchWorker(t, programPath, valkeyAddr, kubeconfig, settings...)
	worker.waitReady(t, 20*time.Second)
	return worker
}

var opsClient = &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// probe is a GET on the ops port.
func (p *program) probe(path string) (status int, body string, err error) {
	resp, err := opsClient.Get(p.ops + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(raw), err
}

func (p *program) waitReady(t testing.TB, within time.Duration) {
	t.Helper()
	eventually(t, within, p.name+" is ready", func() error {
		if p.exited() {
			t.Fatalf("%s exited instead of becoming ready: %s\n%s", p.name, p.cmd.ProcessState, p.stderr.tail(30))
		}
		status, body, err := p.probe("/readyz")
		if err != nil {
			return err
		}
		if status != http.StatusOK {
			return fmt.Errorf("/readyz answers %d %s", status, body)
		}
		return nil
	})
}

// waitNotReady waits for a 503 of /readyz and returns the reason it gives.
func (p *program) waitNotReady(t testing.TB, within time.Duration) string {
	t.Helper()
	var reason string
	eventually(t, within, p.name+" says that it is not ready", func() error {
		if p.exited() {
			t.Fatalf("%s exited instead of being not ready: %s\n%s", p.name, p.cmd.ProcessState, p.stderr.tail(30))
		}
		status, body, err := p.probe("/readyz")
		if err != nil {
			return err
		}
		if status != http.StatusServiceUnavailable {
			return fmt.Errorf("/readyz answers %d %s", status, body)
		}
		reason = body
		return nil
	})
	if reason == "" {
		t.Errorf("%s: /readyz answers 503 without a reason", p.name)
	}
	return reason
}
