package main

import (
	"errors"
	"flag"
	"log/slog"
	"maps"
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
	workerEnv = map[string]string{"VALKEY_ADDR": "valkey:6379", "ALLOWED_IMAGE_PREFIX": "ghcr.io/acme"}
)

func TestDefaults(t *testing.T) {
	web, err := parseConfig(webMode, nil, env(webEnv))
	if err != nil {
		t.Fatal(err)
	}
	common := config{LogLevel: slog.LevelInfo, OpsListenAddr: ":8081", ImagePrefixes: imagePrefixes{"ghcr.io/acme"},
		Valkey: valkeyConfig{Addr: "valkey:6379", Channel: "kuberollouttrigger"}}
	want := common
	want.Web = webConfig{ListenAddr: ":8080", Audience: "aud", Issuer: "https://token.actions.githubusercontent.com", Orgs: []string{"acme"}}
	if !reflect.DeepEqual(*web, want) {
		t.Errorf("web\n got %+v\nwant %+v", *web, want)
	}
	worker, err := parseConfig(workerMode, nil, env(workerEnv))
	if err != nil {
		t.Fatal(err)
	}
	want = common
	want.Worker = workerConfig{CatchUp: time.Hour, Concurrency: 16, ClusterName: "default"}
	if !reflect.DeepEqual(*worker, want) {
		t.Errorf("worker\n got %+v\nwant %+v", *worker, want)
	}
}

func TestFlagsOverrideTheEnvironment(t *testing.T) {
	vars := maps.Clone(workerEnv)
	vars["LOG_LEVEL"] = "error"
	vars["WORKER_SELECTOR"] = "a=b"
	c, err := parseConfig(workerMode, []string{"--log-level=debug", "-worker-namespaces", "a, b,a", "--valkey-tls-enabled", "--worker-catch-up=0"}, env(vars))
	if err != nil {
		t.Fatal(err)
	}
	if c.LogLevel != slog.LevelDebug || !reflect.DeepEqual(c.Worker.Namespaces, []string{"a", "b"}) || !c.Valkey.TLS || c.Worker.CatchUp != 0 || c.Worker.Selector != "a=b" {
		t.Errorf("%+v", c)
	}
}

func TestMissingConfigurationIsNamedAtOnce(t *testing.T) {
	for _, tt := range []struct {
		mode mode
		want string
	}{
		{webMode, "missing required configuration: VALKEY_ADDR (--valkey-addr), ALLOWED_IMAGE_PREFIX (--allowed-image-prefix), GITHUB_OIDC_AUDIENCE (--github-oidc-audience), GITHUB_ALLOWED_ORG (--github-allowed-org)"},
		{workerMode, "missing required configuration: VALKEY_ADDR (--valkey-addr), ALLOWED_IMAGE_PREFIX (--allowed-image-prefix)"},
	} {
		_, err := parseConfig(tt.mode, nil, env(nil))
		if usage := (usageError{}); !errors.As(err, &usage) || err.Error() != tt.want {
			t.Errorf("%s: got %v, want %s", tt.mode, err, tt.want)
		}
	}
}

func TestBadValues(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		mode             mode
		name, bad, parts string
	}{
		{webMode, "LOG_LEVEL", "verbose", "debug, info, warn or error"},
		{webMode, "LOG_LEVEL", "INFO+4", "debug, info, warn or error"},
		{webMode, "OPS_LISTEN_ADDR", "8081", "host:port"},
		{webMode, "OPS_LISTEN_ADDR", ":http", "host:port"},
		{webMode, "VALKEY_ADDR", "valkey", "host:port"},
		{webMode, "VALKEY_ADDR", ":6379", "host:port"},
		{webMode, "VALKEY_ADDR", "redis://valkey:6379", "host:port"},
		{webMode, "VALKEY_ADDR", "valkey:0", "host:port"},
		{webMode, "VALKEY_TLS_ENABLED", "yes", "true or false"},
		{webMode, "VALKEY_TLS_CA_FILE", filepath.Join(dir, "none"), "can be read"},
		{webMode, "VALKEY_TLS_CA_FILE", file, "VALKEY_TLS_ENABLED (--valkey-tls-enabled) is not true"},
		{webMode, "VALKEY_CHANNEL", "a b", "letters"},
		{webMode, "ALLOWED_IMAGE_PREFIX", "acme", "registry's host"},
		{webMode, "WEB_LISTEN_ADDR", "localhost", "host:port"},
		{webMode, "GITHUB_OIDC_ISSUER", "http://issuer.example.com", "https URL"},
		{webMode, "GITHUB_OIDC_ISSUER", "https://issuer.example.com/?x=1", "https URL"},
		{webMode, "GITHUB_ALLOWED_ORG", "acme,", "commas"},
		{webMode, "GITHUB_ALLOWED_ORG", "acme*", "commas"},
		{webMode, "GITHUB_ALLOWED_ORG_ID", "acme", "numbers"},
		{workerMode, "WORKER_NAMESPACES", "Shop", "namespaces"},
		{workerMode, "WORKER_NAMESPACES", "*", "namespaces"},
		{workerMode, "WORKER_SELECTOR", "a in b", "label selector"},
		{workerMode, "WORKER_CATCH_UP", "60", "0 or a duration"},
		{workerMode, "WORKER_CATCH_UP", "25h", "0 or a duration"},
		{workerMode, "WORKER_CATCH_UP", "-1h", "0 or a duration"},
		{workerMode, "WORKER_CATCH_UP", "1s", "0 or a duration"},
		{workerMode, "WORKER_CONCURRENCY", "0", "from 1 to 256"},
		{workerMode, "WORKER_CONCURRENCY", "many", "from 1 to 256"},
		{workerMode, "CLUSTER_NAME", "a b", "letters"},
	} {
		vars := maps.Clone(workerEnv)
		if tt.mode == webMode {
			vars = maps.Clone(webEnv)
		}
		vars[tt.name] = tt.bad
		_, err := parseConfig(tt.mode, nil, env(vars))
		if usage := (usageError{}); !errors.As(err, &usage) {
			t.Errorf("%s=%q: got %v, want a usage error", tt.name, tt.bad, err)
			continue
		}
		for _, part := range []string{tt.name, "--" + strings.ReplaceAll(strings.ToLower(tt.name), "_", "-"), tt.parts} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s=%q: %q does not say %q", tt.name, tt.bad, err, part)
			}
		}
	}
}

func TestBadArguments(t *testing.T) {
	for _, args := range [][]string{{"--no-such-flag"}, {"extra"}, {"--github-allowed-org", "x"}} {
		if _, err := parseConfig(workerMode, args, env(workerEnv)); !errors.As(err, &usageError{}) {
			t.Errorf("%v: got %v", args, err)
		}
	}
	if _, err := parseConfig(workerMode, []string{"-h"}, env(nil)); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: %v", err)
	}
}

// Every option is set by its variable and by its flag.
func TestOptionTable(t *testing.T) {
	for _, o := range options {
		if o.usage == "" || o.set == nil || o.required&^o.modes != 0 || o.required != 0 && o.def != "" {
			t.Errorf("%s: incomplete", o.env)
		}
		if o.def != "" {
			if err := o.set(&config{}, o.def); err != nil {
				t.Errorf("%s: default %q: %v", o.env, o.def, err)
			}
		}
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	const password = "hunter2"
	secrets := 0
	for i := range options {
		o := &options[i]
		if !o.secret {
			continue
		}
		secrets++
		defer func(set func(*config, string) error) { o.set = set }(o.set)
		o.set = func(*config, string) error { return errors.New("refused") }
		vars := maps.Clone(webEnv)
		vars[o.env] = password
		if _, err := parseConfig(webMode, nil, env(vars)); err == nil || strings.Contains(err.Error(), password) || !strings.Contains(err.Error(), o.env) {
			t.Errorf("%s: %v", o.env, err)
		}
	}
	if secrets != 1 {
		t.Errorf("%d secrets; VALKEY_PASSWORD is one", secrets)
	}
}
