package main

import (
	"encoding/pem"
	"errors"
	"log/slog"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func env(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

var (
	webEnv    = map[string]string{"VALKEY_ADDR": "valkey:6379", "ALLOWED_IMAGE_PREFIX": "ghcr.io/acme", "GITHUB_OIDC_AUDIENCE": "aud", "GITHUB_ALLOWED_ORG": "acme"}
	workerEnv = map[string]string{"VALKEY_ADDR": "valkey:6379", "ALLOWED_IMAGE_PREFIX": "ghcr.io/acme", "KUBECONFIG": "/kubeconfig"}
)

// configurations are the subcommands with options, in the order in which
// docs/configuration.md names them.
func configurations() map[string]configuration {
	return map[string]configuration{"web": &webConfig{}, "worker": &workerConfig{}, "explain": &policyConfig{}}
}

// documentedOption is an option and the subcommands that have it.
type documentedOption struct {
	option
	modes    []string
	required []string // those of modes that need it
}

// documentedOptions are all options, once each, in the order of
// docs/configuration.md.
func documentedOptions() (all []documentedOption) {
	index := map[string]int{}
	for _, mode := range []string{"web", "worker", "explain"} {
		for _, o := range configurations()[mode].options() {
			i, ok := index[o.env]
			if !ok {
				i, all = len(all), append(all, documentedOption{option: o})
				index[o.env] = i
			}
			all[i].modes = append(all[i].modes, mode)
			if o.required && o.unset == "" {
				all[i].required = append(all[i].required, mode)
			}
		}
	}
	return all
}

// readConfig parses the configuration of a subcommand.
func readConfig(mode string, args []string, vars map[string]string) (configuration, error) {
	cfg := configurations()[mode]
	return cfg, parseConfig(mode, cfg, args, env(vars))
}

func TestDefaults(t *testing.T) {
	common := commonConfig{LogLevel: slog.LevelInfo, OpsListenAddr: ":8081", Valkey: valkeyConfig{Addr: "valkey:6379", Channel: "kuberollouttrigger"}}
	prefixes := imagePrefixes{"ghcr.io/acme"}
	policy := policyConfig{ImagePrefixes: prefixes, Audience: "aud", Issuer: "https://token.actions.githubusercontent.com", Orgs: []string{"acme"}}
	for mode, want := range map[string]configuration{
		"web":     &webConfig{commonConfig: common, policyConfig: policy, ListenAddr: ":8080"},
		"explain": &policy,
		"worker": &workerConfig{commonConfig: common, ImagePrefixes: prefixes, Kubeconfig: "/kubeconfig", Kinds: kinds[:1],
			CatchUp: time.Hour, RestartInterval: 10 * time.Second, Concurrency: 16, ClusterName: "default"},
	} {
		vars := maps.Clone(webEnv)
		maps.Copy(vars, workerEnv)
		got, err := readConfig(mode, nil, vars)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n got %+v\nwant %+v", mode, err, got, want)
		}
	}
}

func TestFlagsOverrideTheEnvironment(t *testing.T) {
	vars := maps.Clone(workerEnv)
	maps.Copy(vars, map[string]string{"LOG_LEVEL": "error", "WORKER_SELECTOR": "a=b", "CLUSTER_NAME": "east"})
	args := []string{"--log-level=debug", "-worker-namespaces", "a, b,a", "--valkey-tls-enabled", "--worker-catch-up=0", "--cluster-name=",
		"--worker-kinds=daemonsets.apps, deployments.apps,daemonsets.apps", "--worker-dry-run", "--worker-restarts-per-minute=10"}
	got, err := readConfig("worker", args, vars)
	if err != nil {
		t.Fatal(err)
	}
	c := got.(*workerConfig)
	if c.LogLevel != slog.LevelDebug || !reflect.DeepEqual(c.Namespaces, []string{"a", "b"}) || !c.Valkey.TLS || c.CatchUp != 0 || c.Selector != "a=b" || c.ClusterName != "default" ||
		!reflect.DeepEqual(c.Kinds, []*kind{kinds[2], kinds[0]}) || !c.DryRun || c.RestartsPerMinute != 10 {
		t.Errorf("%+v", c)
	}
}

func TestMissingConfigurationIsNamedAtOnce(t *testing.T) {
	const common = "missing required configuration: VALKEY_ADDR (--valkey-addr), ALLOWED_IMAGE_PREFIX (--allowed-image-prefix)"
	for mode, want := range map[string]string{
		"web":    common + ", GITHUB_OIDC_AUDIENCE (--github-oidc-audience), GITHUB_ALLOWED_ORG (--github-allowed-org)",
		"worker": common + ", KUBECONFIG (--kubeconfig)",
		"explain": "missing required configuration: ALLOWED_IMAGE_PREFIX (--allowed-image-prefix), " +
			"GITHUB_ALLOWED_ORG (--github-allowed-org)",
	} {
		_, err := readConfig(mode, nil, nil)
		if !errors.As(err, new(usageError)) || err.Error() != want {
			t.Errorf("%s: got %v, want %s", mode, err, want)
		}
	}
	_, err := readConfig("web", []string{"--log-level=loud", "--valkey-addr=x", "--trust-policy=x"}, nil)
	for _, part := range []string{"missing required configuration: ALLOWED_IMAGE_PREFIX", "LOG_LEVEL", "VALKEY_ADDR", "TRUST_POLICY (--trust-policy): line 1"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not have %q: %v", part, err)
		}
	}
}

// A pod can do without KUBECONFIG, but not without a ServiceAccount as well.
func TestInCluster(t *testing.T) {
	pod := env(map[string]string{"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
	err := run(t.Context(), []string{"worker"}, pod, t.Output(), t.Output())
	if err == nil || !strings.Contains(err.Error(), "VALKEY_ADDR") || strings.Contains(err.Error(), "KUBECONFIG") {
		t.Errorf("in a pod: %v", err)
	}
	err = run(t.Context(), []string{"worker", "--valkey-addr=localhost:1", "--allowed-image-prefix=ghcr.io/acme"}, pod, t.Output(), t.Output())
	if !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), "KUBECONFIG (--kubeconfig)") {
		t.Errorf("in a pod without a ServiceAccount: %v", err)
	}
}

func TestBadValues(t *testing.T) {
	for _, tt := range []struct {
		mode, name, part string
		bad              []string
	}{
		{"web", "LOG_LEVEL", "debug, info, warn or error", []string{"verbose", "INFO+4"}},
		{"web", "OPS_LISTEN_ADDR", "host:port", []string{"8081", ":http"}},
		{"web", "VALKEY_ADDR", "host:port", []string{"valkey", ":6379", "redis://valkey:6379", "valkey:0", "valkey:65536", "user@valkey:6379"}},
		{"web", "VALKEY_TLS_ENABLED", "true or false", []string{"yes"}},
		{"web", "VALKEY_TLS_CA_FILE", "no such file", []string{"none"}},
		{"web", "VALKEY_TLS_CA_FILE", "PEM certificate", []string{"go.mod"}},
		{"web", "VALKEY_TLS_CA_FILE", "VALKEY_TLS_ENABLED (--valkey-tls-enabled) is not true", []string{caFile(t)}},
		{"web", "VALKEY_CHANNEL", "letters", []string{"a b"}},
		{"web", "ALLOWED_IMAGE_PREFIX", "registry's host", []string{"acme"}},
		{"web", "WEB_LISTEN_ADDR", "host:port", []string{"localhost"}},
		{"web", "GITHUB_OIDC_ISSUER", "https URL", []string{"http://issuer.example.com", "https://issuer.example.com/?x=1"}},
		{"web", "GITHUB_ALLOWED_ORG", "comma", []string{"acme,", "acme*"}},
		{"web", "GITHUB_ALLOWED_ORG_ID", "numeric", []string{"acme"}},
		{"worker", "WORKER_NAMESPACES", "namespaces", []string{"Shop", "*"}},
		{"worker", "WORKER_SELECTOR", "label selector", []string{"a in b"}},
		{"worker", "WORKER_CATCH_UP", "0 or a duration", []string{"60", "25h", "-1h", "1s"}},
		{"worker", "WORKER_RESTART_INTERVAL", "0 or a duration", []string{"10", "999ms", "-10s"}},
		{"worker", "WORKER_RESTART_INTERVAL", "at most 30m0s, half of WORKER_CATCH_UP", []string{"31m"}},
		{"worker", "WORKER_CONCURRENCY", "from 1 to 256", []string{"0", "257", "many"}},
		{"worker", "WORKER_RESTARTS_PER_MINUTE", "from 0 to 6000", []string{"-1", "6001", "1.5"}},
		{"worker", "WORKER_KINDS", "one or several of [deployments.apps ", []string{"pods", "deployments", "Deployment", "deployments.apps,", "cronjobs.batch"}},
		{"worker", "CLUSTER_NAME", "letters", []string{"a b"}},
	} {
		for _, bad := range tt.bad {
			vars := maps.Clone(map[string]map[string]string{"web": webEnv, "worker": workerEnv}[tt.mode])
			vars[tt.name] = bad
			_, err := readConfig(tt.mode, nil, vars)
			want := tt.name + " (--" + option{env: tt.name}.flagName() + ")"
			if !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), tt.part) {
				t.Errorf("%s=%q: got %v, want a usage error that names %s and says %q", tt.name, bad, err, want, tt.part)
			}
		}
	}
}

// caFile has the certificate of a test server.
func caFile(t *testing.T) string {
	t.Helper()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// The restart interval is at most half of the catch-up window.
func TestRestartIntervalOption(t *testing.T) {
	for _, tt := range []struct {
		interval, catchUp string
		want              time.Duration // -1: an error
	}{
		{"0", "1m", 0}, {"1s", "1m", time.Second}, {"30s", "1m", 30 * time.Second}, {"31s", "1m", -1},
		{"30m", "0", 30 * time.Minute}, {"31m", "0", -1}, {"12h", "24h", 12 * time.Hour}, {"13h", "24h", -1},
	} {
		vars := maps.Clone(workerEnv)
		vars["WORKER_RESTART_INTERVAL"], vars["WORKER_CATCH_UP"] = tt.interval, tt.catchUp
		c, err := readConfig("worker", nil, vars)
		if (err != nil) != (tt.want < 0) || err == nil && c.(*workerConfig).RestartInterval != tt.want {
			t.Errorf("%+v: %+v, %v", tt, c, err)
		}
	}
}

// Every option refuses a placeholder of k8s/.
func TestPlaceholders(t *testing.T) {
	for mode, cfg := range configurations() {
		for _, o := range cfg.options() {
			if o.usage == "" || o.required && o.def != "" {
				t.Errorf("%s: %s has no usage, or needs no value", mode, o.env)
			}
			vars := maps.Clone(webEnv)
			vars[o.env] = "ghcr.io/REPLACE_ME,x"
			_, err := readConfig(mode, nil, vars)
			want := o.env + " (--" + o.flagName() + ") still has the placeholder REPLACE_ME, as in k8s/10-config.yaml"
			if !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want %s", mode, err, want)
			}
		}
	}
}

// badSecret is a configuration whose one option refuses its value.
type badSecret struct{ option }

func (c badSecret) options() []option { return []option{c.option} }

func TestSecretsAreNotPrinted(t *testing.T) {
	secrets := 0
	for _, o := range documentedOptions() {
		if !o.secret {
			continue
		}
		secrets++
		o.set = func(string) error { return errors.New("refused") }
		for _, password := range []string{"hunter2", "hunter2-REPLACE_ME"} {
			err := parseConfig("web", badSecret{o.option}, nil, env(map[string]string{o.env: password}))
			if err == nil || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), o.env) {
				t.Errorf("%s: %v", o.env, err)
			}
		}
	}
	if secrets != 1 {
		t.Errorf("%d secrets; VALKEY_PASSWORD is one", secrets)
	}
}
