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
// web listens on WEB_LISTEN_ADDR (:8080):
//
//	POST /event    a job's OIDC token and {"image":"ghcr.io/acme/api:dev"}; 202
//	               once the request is recorded in Valkey and announced
//	GET  /healthz
//
// Both listen on OPS_LISTEN_ADDR (:8081), which is not for the internet:
//
//	GET /healthz   the process is alive
//	GET /readyz    it can do its work; 503 says why not
//
// Configuration comes from the environment; a flag of the same name overrides
// it. Logs are JSON lines on standard error. The exit status is 0 after
// SIGTERM or SIGINT, 2 after a mistake in the configuration, 1 after any other
// failure. That of explain is 0 if the request would be accepted, 1 if not.
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
	"sync/atomic"
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

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	// A second signal finds no handler and ends the process at once.
	context.AfterFunc(ctx, stop)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	if usage := (usageError{}); errors.As(err, &usage) {
		fmt.Fprintf(os.Stderr, "kuberollouttrigger: %v\n", err)
		os.Exit(2)
	}
	if errors.Is(err, errDenied) { // explain has said why
		os.Exit(1)
	}
	newLogger(os.Stderr, slog.LevelError).Error("exiting", "err", err)
	os.Exit(1)
}

// run is the program. It returns when ctx is done and all that was in flight is
// finished, or when it cannot go on.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return usageError{errors.New("a subcommand is missing; see kuberollouttrigger help")}
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		printHelp(stdout)
		return nil
	}
	for _, c := range commands {
		if c.name == args[0] {
			return c.run(ctx, args[1:], getenv, stdout, stderr)
		}
	}
	return usageError{fmt.Errorf("unknown subcommand %q; see kuberollouttrigger help", args[0])}
}

func printHelp(w io.Writer) {
	fmt.Fprint(w, "kuberollouttrigger restarts the Deployments that run a container image\nas soon as a GitHub Actions job has pushed it.\n\nusage: kuberollouttrigger <subcommand> [flags]\n\n")
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

// configure reads the options of m and makes the logger. help is true if -h was
// given and answered.
func configure(m mode, args []string, getenv func(string) string, stdout, stderr io.Writer) (cfg *config, log *slog.Logger, help bool, err error) {
	cfg, err = parseConfig(m, args, getenv)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, "usage: kuberollouttrigger %s [flags]\n\nA flag overrides the variable of the same name.\n\n", m)
		printOptions(stdout, m)
		return nil, nil, true, nil
	}
	if err != nil {
		return nil, nil, false, err
	}
	log = newLogger(stderr, cfg.LogLevel)
	klog.SetSlogLogger(log) // client-go's own messages
	log.Info("starting", "mode", m.String(), "version", versionString())
	return cfg, log, false, nil
}

func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
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
	cfg, log, help, err := configure(webMode, args, getenv, stdout, stderr)
	if err != nil || help {
		return err
	}
	// Keys are fetched from the issuer alone: a redirect is not followed.
	return serveWeb(ctx, cfg, http.DefaultClient, log)
}

// serveWeb is web with its one dependency on the outside besides Valkey: the
// client that fetches the issuer's keys.
func serveWeb(ctx context.Context, cfg *config, issuer *http.Client, log *slog.Logger) error {
	policy := newPolicy(cfg.Web.Orgs, cfg.Web.OrgIDs, cfg.Web.TrustPolicy)
	log.Info("policy", "rules", policy.describe(), "prefixes", cfg.ImagePrefixes, "orgs", cfg.Web.Orgs, "org_ids", cfg.Web.OrgIDs,
		"issuer", cfg.Web.Issuer, "audience", cfg.Web.Audience)
	if rules := policy.strangers(); len(rules) > 0 {
		log.Warn("event_name has a star that takes in pull_request_target or workflow_run: name the events, for these may run a stranger's code", "rules", rules)
	}
	verifier := newVerifier(cfg.Web.Issuer, cfg.Web.Audience, issuer, log, time.Now)
	publisher, err := newPublisher(cfg.Valkey, log)
	if err != nil {
		return err
	}
	defer publisher.close()

	var stopping atomic.Bool
	ops, err := listen("ops", cfg.OpsListenAddr, opsHandler(&stopping, func(ctx context.Context) error {
		if err := verifier.ready(); err != nil {
			return err
		}
		return publisher.ready(ctx)
	}), log)
	if err != nil {
		return err
	}
	front, err := listen("web", cfg.Web.ListenAddr,
		&web{log: log, verifier: verifier, policy: policy, prefixes: cfg.ImagePrefixes, publish: publisher.publish}, log)
	if err != nil {
		return err
	}
	return serveAll(ctx, ops, front, &stopping, func(ctx context.Context) error {
		verifier.run(ctx)
		return nil
	})
}

func runWorker(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg, log, help, err := configure(workerMode, args, getenv, stdout, stderr)
	if err != nil || help {
		return err
	}
	client, err := newKubernetesClient(cfg.Worker)
	if err != nil {
		return err
	}
	return serveWorker(ctx, cfg, client, log)
}

// serveWorker is worker with the client of the cluster that it restarts.
func serveWorker(ctx context.Context, cfg *config, client dynamic.Interface, log *slog.Logger) error {
	source, err := newSubscriber(cfg.Valkey, log)
	if err != nil {
		return err
	}
	defer source.close()
	worker := newWorker(cfg.Worker, cfg.ImagePrefixes, client, source, log, time.Now)

	var stopping atomic.Bool
	ops, err := listen("ops", cfg.OpsListenAddr, opsHandler(&stopping, func(context.Context) error {
		return worker.ready()
	}), log)
	if err != nil {
		return err
	}
	return serveAll(ctx, ops, nil, &stopping, worker.run)
}

// http2TimeoutSeconds is how long a connection to the API server may be idle
// before it is pinged, and how long the answer may take.
const http2TimeoutSeconds = 5

// newKubernetesClient uses KUBECONFIG, which may list several files, or the
// ServiceAccount of the pod.
func newKubernetesClient(cfg workerConfig) (dynamic.Interface, error) {
	var rc *rest.Config
	var err error
	if cfg.Kubeconfig == "" {
		rc, err = rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, usageError{errors.New("KUBECONFIG (--kubeconfig) is not set, and this is not a pod in a cluster")}
		}
		if err != nil {
			err = fmt.Errorf("reading the pod's Kubernetes configuration: %w", err)
		}
	} else {
		rc, err = readKubeconfig(cfg.Kubeconfig)
		if err != nil {
			err = usageError{fmt.Errorf("KUBECONFIG (--kubeconfig): %q: %w", cfg.Kubeconfig, err)}
		}
	}
	if err != nil {
		return nil, err
	}
	// client-go would send 5 requests a second. WORKER_CONCURRENCY bounds what
	// is in flight, and the server's own flow control does the rest.
	rc.QPS = -1
	rc.Wrap(surfaceRetryAfter)
	// A connection that is silently dead would hold watch and patches for 45 s.
	// client-go reads these limits from the environment alone.
	for _, name := range []string{"HTTP2_READ_IDLE_TIMEOUT_SECONDS", "HTTP2_PING_TIMEOUT_SECONDS"} {
		if os.Getenv(name) == "" {
			os.Setenv(name, strconv.Itoa(http2TimeoutSeconds))
		}
	}
	rc.UserAgent = "kuberollouttrigger/" + strings.ReplaceAll(versionString(), " ", "_")
	client, err := dynamic.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("making the Kubernetes client: %w", err)
	}
	return client, nil
}

// readKubeconfig reads one file, or a list of them. clientcmd's usual loader
// would fall back to the cluster that the pod is in if it found none of them,
// and restart what runs there.
func readKubeconfig(list string) (*rest.Config, error) {
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: filepath.SplitList(list)}
	merged, err := rules.Load()
	if err != nil {
		return nil, err
	}
	if len(merged.Clusters) == 0 {
		return nil, errors.New("expected a kubeconfig with a cluster")
	}
	return clientcmd.NewNonInteractiveClientConfig(*merged, "", nil, rules).ClientConfig()
}
