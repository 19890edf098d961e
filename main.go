// kuberollouttrigger restarts the Kubernetes Deployments that run a container
// image as soon as a GitHub Actions job has pushed that image.
//
//	kuberollouttrigger web      accepts POST /event from GitHub Actions
//	kuberollouttrigger worker   restarts Deployments
//	kuberollouttrigger explain  says which rule lets a job restart an image, or
//	                            why none does
//	kuberollouttrigger version  prints the version
//	kuberollouttrigger help     lists these; <subcommand> -h prints the options
//
// web serves the public API on WEB_LISTEN_ADDR (:8080):
//
//	POST /event    a job's OIDC token and {"image":"ghcr.io/acme/api:dev"}; 202
//	               when the request is in the ledger in Valkey and published
//	GET  /healthz
//
// Both serve probes on OPS_LISTEN_ADDR (:8081), which must stay internal:
//
//	GET /healthz   the process is alive
//	GET /readyz    the process can work; a 503 says why not
//
// Configuration comes from the environment; a flag of the same name overrides a
// variable. Logs are JSON lines on standard error. The exit status is 0 after
// SIGTERM or SIGINT, 2 after a mistake in the configuration, and 1 after any
// other failure. explain exits with 0 if web would accept the request, else 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// version is set by the linker.
var version = ""

// command is a subcommand.
type command struct {
	name, summary string
	run           func(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error
}

var commands = []command{
	{"web", "accept POST /event from GitHub Actions", runWeb},
	{"worker", "restart Deployments", runWorker},
	{"explain", "say which rule lets a job restart an image, or why none does", runExplain},
	{"version", "print the version", runVersion},
}

// http2TimeoutSeconds is how long a connection to the API server may be idle
// before it is pinged, and how long the answer may take.
const http2TimeoutSeconds = 5

const usage = `kuberollouttrigger restarts the Deployments that run a container image
as soon as a GitHub Actions job has pushed it.

usage: kuberollouttrigger <subcommand> [flags]

`

func main() {
	// client-go reads these limits from the environment alone. With its own, a
	// dead connection would hold the watch and patches for 45 s.
	for _, name := range []string{"HTTP2_READ_IDLE_TIMEOUT_SECONDS", "HTTP2_PING_TIMEOUT_SECONDS"} {
		if os.Getenv(name) == "" {
			os.Setenv(name, strconv.Itoa(http2TimeoutSeconds))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	os.Exit(exitStatus(err, os.Stderr))
}

// exitStatus reports the error of run.
func exitStatus(err error, stderr io.Writer) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp): // -h was answered
		return 0
	case errors.As(err, new(usageError)):
		fmt.Fprintf(stderr, "kuberollouttrigger: %v\n", err)
		return 2
	case errors.Is(err, errDenied): // explain has printed why
		return 1
	default:
		newLogger(stderr, slog.LevelError).Error("exiting", "err", err)
		return 1
	}
}

// run is the program. It returns when ctx is done and everything in flight is
// finished, or when it cannot go on.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return usageError{errors.New("a subcommand is missing; see kuberollouttrigger help")}
	}
	name := args[0]
	switch name {
	case "help", "-h", "-help", "--help":
		printHelp(stdout)
		return nil
	case "-version", "--version":
		name = "version"
	}
	for _, c := range commands {
		if c.name == name {
			return c.run(ctx, args[1:], getenv, stdout, stderr)
		}
	}
	if name == "dev" {
		return usageError{errors.New("the subcommand dev is only in a development build: go run -tags dev . dev")}
	}
	return usageError{fmt.Errorf("unknown subcommand %q; see kuberollouttrigger help", name)}
}

func printHelp(w io.Writer) {
	fmt.Fprint(w, usage)
	for _, c := range commands {
		fmt.Fprintf(w, "  %-8s %s\n", c.name, c.summary)
	}
	fmt.Fprintf(w, "  %-8s %s\n", "help", "print this; <subcommand> -h prints the options")
}

func runVersion(_ context.Context, args []string, _ func(string) string, stdout, _ io.Writer) error {
	if len(args) > 0 && args[0] != "-h" && args[0] != "--help" {
		return usageError{fmt.Errorf("unexpected argument %q; version takes none", args[0])}
	}
	fmt.Fprintln(stdout, "kuberollouttrigger", versionString())
	return nil
}

// versionString falls back to what the Go tool stamped.
func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// configure reads the options of a subcommand. It answers -h, and then returns
// flag.ErrHelp.
func configure(subcommand string, cfg configuration, args []string, getenv func(string) string, stdout io.Writer) error {
	err := parseConfig(subcommand, cfg, args, getenv)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, "usage: kuberollouttrigger %s [flags]\n\nA flag overrides the variable of the same name.\n\n", subcommand)
		printOptions(stdout, cfg.options())
	}
	return err
}

func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
}

// startLog makes the log of a process, which client-go writes to as well.
func startLog(w io.Writer, level slog.Level, mode string) *slog.Logger {
	log := newLogger(w, level)
	klog.SetSlogLogger(log)
	log.Info("starting", "mode", mode, "version", versionString())
	return log
}

// sanitize makes text from outside fit for a line of a log or an error:
// printable ASCII as it is, anything else escaped, and at most 200 bytes of it.
func sanitize(s string) string {
	const limit = 200
	text, rest := s, ""
	if len(s) > limit {
		text, rest = s[:limit], "..."
	}
	var b strings.Builder
	for _, r := range text {
		if ' ' <= r && r <= '~' {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		}
	}
	return b.String() + rest
}

func runWeb(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg := &webConfig{}
	if err := configure("web", cfg, args, getenv, stdout); err != nil {
		return err
	}
	return serveWeb(ctx, cfg, http.DefaultClient, startLog(stderr, cfg.LogLevel, "web"))
}

// serveWeb runs web; issuer is the client that fetches the issuer's keys.
func serveWeb(ctx context.Context, cfg *webConfig, issuer *http.Client, log *slog.Logger) error {
	policy := newPolicy(cfg.Orgs, cfg.OrgIDs, cfg.TrustPolicy)
	log.Info("policy", "rules", policy.describe(), "prefixes", cfg.ImagePrefixes, "orgs", cfg.Orgs, "org_ids", cfg.OrgIDs,
		"issuer", cfg.Issuer, "audience", cfg.Audience)
	if rules := policy.rulesWithRiskyEvents(); len(rules) > 0 {
		log.Warn("a wildcard in event_name matches pull_request_target or workflow_run, which may run untrusted code: name the events", "rules", rules)
	}
	verifier := newVerifier(cfg.Issuer, cfg.Audience, issuer, log, time.Now)
	publisher, err := newPublisher(cfg.Valkey, log)
	if err != nil {
		return err
	}
	defer publisher.close()

	s := &service{task: func(ctx context.Context) error {
		verifier.run(ctx)
		return nil
	}}
	ready := func(ctx context.Context) error {
		if err := verifier.ready(); err != nil {
			return err
		}
		return publisher.ready(ctx)
	}
	if s.ops, err = listen("ops", cfg.OpsListenAddr, s.probes(ready), log); err != nil {
		return err
	}
	api := &web{log: log, verifier: verifier, policy: policy, prefixes: cfg.ImagePrefixes, publish: publisher.publish}
	if s.public, err = listen("web", cfg.ListenAddr, api, log); err != nil {
		return err
	}
	return s.run(ctx)
}

func runWorker(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg := &workerConfig{InCluster: inCluster(getenv)}
	if err := configure("worker", cfg, args, getenv, stdout); err != nil {
		return err
	}
	log := startLog(stderr, cfg.LogLevel, "worker")
	client, err := newKubernetesClient(*cfg)
	if err != nil {
		return err
	}
	return serveWorker(ctx, cfg, client, log)
}

// serveWorker runs worker with the client of its cluster.
func serveWorker(ctx context.Context, cfg *workerConfig, client dynamic.Interface, log *slog.Logger) error {
	source, err := newSubscriber(cfg.Valkey, log)
	if err != nil {
		return err
	}
	defer source.close()
	worker := newWorker(*cfg, client, source, log, time.Now)

	s := &service{task: worker.run}
	s.ops, err = listen("ops", cfg.OpsListenAddr, s.probes(func(context.Context) error { return worker.ready() }), log)
	if err != nil {
		return err
	}
	return s.run(ctx)
}

// serviceAccountToken is where a pod finds its ServiceAccount's token. Tests
// change it.
var serviceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"

// inCluster says whether this is a pod with a ServiceAccount.
func inCluster(getenv func(string) string) bool {
	_, err := os.Stat(serviceAccountToken)
	return err == nil && getenv("KUBERNETES_SERVICE_HOST") != ""
}

// newKubernetesClient uses KUBECONFIG, which may list several files, or the
// pod's ServiceAccount.
func newKubernetesClient(cfg workerConfig) (dynamic.Interface, error) {
	rc, err := readKubeconfig(cfg.Kubeconfig)
	if err != nil {
		return nil, err
	}
	// client-go would send 5 requests a second. WORKER_CONCURRENCY bounds what
	// is in flight, and the API server's own flow control does the rest.
	rc.QPS = -1
	rc.Wrap(surfaceRetryAfter)
	rc.UserAgent = "kuberollouttrigger/" + strings.ReplaceAll(versionString(), " ", "_")
	client, err := dynamic.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("making the Kubernetes client: %w", err)
	}
	return client, nil
}

// readKubeconfig reads the files of KUBECONFIG. The usual loader of clientcmd
// falls back to the cluster of this pod if it finds none of them, and the worker
// would restart Deployments in the wrong cluster.
func readKubeconfig(files string) (*rest.Config, error) {
	if files == "" {
		rc, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("reading the pod's Kubernetes configuration: %w", err)
		}
		return rc, nil
	}
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: filepath.SplitList(files)}
	merged, err := rules.Load()
	if err == nil && len(merged.Clusters) == 0 {
		err = errors.New("expected a kubeconfig with a cluster")
	}
	var rc *rest.Config
	if err == nil {
		rc, err = clientcmd.NewNonInteractiveClientConfig(*merged, "", nil, rules).ClientConfig()
	}
	if err != nil {
		return nil, usageError{fmt.Errorf("KUBECONFIG (--kubeconfig): %q: %w", files, err)}
	}
	return rc, nil
}

// retryAfterError is an answer to a patch that says when to try again.
type retryAfterError struct {
	status string
	delay  time.Duration
}

func (e *retryAfterError) Error() string {
	return fmt.Sprintf("%s (Retry-After: %s)", e.status, e.delay)
}

// surfaceRetryAfter makes such an error of an answer with a Retry-After. client-go
// would wait and send the patch again by itself while it occupies one of the slots
// of WORKER_CONCURRENCY.
func surfaceRetryAfter(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(r)
		if err != nil || r.Method != http.MethodPatch || resp.StatusCode < http.StatusBadRequest {
			return resp, err
		}
		seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if err != nil || seconds < 0 {
			return resp, nil
		}
		resp.Body.Close()
		return nil, &retryAfterError{resp.Status, time.Duration(seconds) * time.Second}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
