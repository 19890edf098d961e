// kuberollouttrigger restarts the Kubernetes workloads that run a container image
// as soon as a GitHub Actions job has pushed that image.
//
//	kuberollouttrigger web      accepts POST /event from GitHub Actions
//	kuberollouttrigger worker   restarts the workloads that run the image
//	kuberollouttrigger explain  says which rule lets a job restart an image
//	kuberollouttrigger help     lists these; <subcommand> -h prints the options
//
// web serves POST /event, GET /rollout and GET /healthz on WEB_LISTEN_ADDR (:8080).
// A job posts its OIDC token and {"image":"ghcr.io/acme/api:dev"}; 202 when the
// request is in the ledger in Valkey and published. GET /rollout tells what became
// of it. web and worker serve OPS_LISTEN_ADDR (:8081), which must stay internal: GET
// /healthz says that the process is alive, GET /readyz that it can work, or with a 503
// why not, and GET /metrics is for Prometheus.
//
// Configuration comes from the environment; a flag of the same name overrides a
// variable. Logs are JSON lines on standard error. The exit status is 0 after
// SIGTERM or SIGINT, 2 after a mistake in the configuration, and 1 after any
// other failure. explain exits with 1 if web would deny the request.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	kjson "sigs.k8s.io/json"
)

// version is set by the linker.
var version = ""

type command struct {
	name, summary string
	run           func(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error
}

var commands = []command{
	{"web", "accept POST /event from GitHub Actions", runWeb},
	{"worker", "restart the workloads that run a requested image", runWorker},
	{"explain", "say which rule lets a job restart an image, or why none does", runExplain},
}

func main() {
	// client-go reads these limits, in seconds, from the environment alone. With its
	// own, a dead connection would hold the watch and the patches for 45 s.
	for _, name := range []string{"HTTP2_READ_IDLE_TIMEOUT_SECONDS", "HTTP2_PING_TIMEOUT_SECONDS"} {
		if os.Getenv(name) == "" {
			os.Setenv(name, "5")
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(exitStatus(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr), os.Stderr))
}

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

// run is the program. It returns when ctx is done and everything in flight is finished.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return usageError{errors.New("a subcommand is missing; see kuberollouttrigger help")}
	}
	name, args := args[0], args[1:]
	switch name {
	case "help", "-h", "-help", "--help":
		printHelp(stdout)
		return nil
	case "version", "-version", "--version":
		if len(args) > 0 && args[0] != "-h" && args[0] != "--help" {
			return usageError{fmt.Errorf("unexpected argument %q; version takes none", args[0])}
		}
		fmt.Fprintln(stdout, "kuberollouttrigger", versionString())
		return nil
	}
	for _, c := range commands {
		if c.name == name {
			return c.run(ctx, args, getenv, stdout, stderr)
		}
	}
	if name == "dev" {
		return usageError{errors.New("the subcommand dev is only in a development build: go run -tags dev . dev")}
	}
	return usageError{fmt.Errorf("unknown subcommand %q; see kuberollouttrigger help", name)}
}

func printHelp(w io.Writer) {
	fmt.Fprint(w, "kuberollouttrigger restarts the Kubernetes workloads that run a container image\n",
		"as soon as a GitHub Actions job has pushed it.\n\nusage: kuberollouttrigger <subcommand> [flags]\n\n")
	for _, c := range commands {
		fmt.Fprintf(w, "  %-8s %s\n", c.name, c.summary)
	}
	fmt.Fprintf(w, "  %-8s %s\n", "version", "print the version")
	fmt.Fprintf(w, "  %-8s %s\n", "help", "print this; <subcommand> -h prints the options")
}

// versionString falls back to what the Go tool stamped.
func versionString() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "" {
		return info.Main.Version
	}
	return version
}

func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
}

// start reads the configuration of web or worker, and makes its log, which
// client-go writes to as well. flag.ErrHelp means that it has answered -h.
func start(mode string, cfg configuration, common *commonConfig, args []string, getenv func(string) string, stdout, stderr io.Writer) (*slog.Logger, error) {
	err := parseConfig(mode, cfg, args, getenv)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, "usage: kuberollouttrigger %s [flags]\n\nA flag overrides the variable of the same name.\n\n", mode)
		printOptions(stdout, cfg.options())
	}
	if err != nil {
		return nil, err
	}
	log := newLogger(stderr, common.LogLevel)
	klog.SetSlogLogger(log)
	log.Info("starting", "mode", mode, "version", versionString())
	return log, nil
}

// sanitize makes text from outside fit for a line of a log or an error: at most 200
// bytes of it, printable ASCII as it is, and anything else escaped.
func sanitize(s string) string {
	const limit = 200
	if len(s) > limit {
		return sanitize(s[:limit]) + "..."
	}
	if !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return s
	}
	quoted := strconv.QuoteToASCII(s)
	return strings.NewReplacer(`\\`, `\`, `\"`, `"`).Replace(quoted[1 : len(quoted)-1])
}

func runWeb(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg := &webConfig{}
	log, err := start("web", cfg, &cfg.commonConfig, args, getenv, stdout, stderr)
	if err != nil {
		return err
	}
	// The default would collect web's few MiB a hundred times a second under load.
	debug.SetGCPercent(400)
	if getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(40 << 20)
	}
	return serveWeb(ctx, cfg, http.DefaultClient, log)
}

// serveWeb runs web; issuer is the client that fetches the issuer's keys.
func serveWeb(ctx context.Context, cfg *webConfig, issuer *http.Client, log *slog.Logger) error {
	log.Info("policy", "rules", cfg.describe(), "prefixes", cfg.ImagePrefixes, "orgs", cfg.Orgs, "org_ids", cfg.OrgIDs,
		"issuer", cfg.Issuer, "audience", cfg.Audience)
	if rules := cfg.rulesWithRiskyEvents(); len(rules) > 0 {
		log.Warn("TRUST_POLICY (--trust-policy): event_name allows events that people without write access can cause", "rules", rules)
	}
	verifier := newVerifier(cfg.Issuer, cfg.Audience, issuer, log, time.Now)
	publisher := newPublisher(cfg.Valkey, log)
	defer publisher.close()

	api := &web{log: log, verifier: verifier, policy: &cfg.policyConfig, publish: publisher.publish,
		readRollout: publisher.readRollout, stopping: ctx}
	s := &service{log: log, listen: net.Listen, opsAddr: cfg.OpsListenAddr, apiAddr: cfg.ListenAddr, api: api, metrics: webMetrics}
	s.measure = func() { rolloutWaiting.Set(float64(api.waiting.Load())) }
	s.ready = func(ctx context.Context) error { return cmp.Or(verifier.ready(), publisher.ready(ctx)) }
	s.task = func(ctx context.Context) error { verifier.run(ctx); return nil }
	return s.run(ctx)
}

func runWorker(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg := &workerConfig{InCluster: getenv("KUBERNETES_SERVICE_HOST") != ""}
	log, err := start("worker", cfg, &cfg.commonConfig, args, getenv, stdout, stderr)
	if err != nil {
		return err
	}
	client, err := newKubernetesClient(*cfg)
	if err != nil {
		return err
	}
	return serveWorker(ctx, cfg, client, log)
}

func serveWorker(ctx context.Context, cfg *workerConfig, client dynamic.Interface, log *slog.Logger) error {
	source := newSubscriber(cfg.Valkey, log)
	defer source.close()
	worker := newWorker(*cfg, client, source, log, time.Now)
	s := &service{log: log, listen: net.Listen, opsAddr: cfg.OpsListenAddr, task: worker.run, metrics: workerMetrics}
	s.measure = worker.measure
	s.ready = func(context.Context) error { return worker.ready() }
	return s.run(ctx)
}

func newKubernetesClient(cfg workerConfig) (dynamic.Interface, error) {
	rc, err := kubernetesConfig(cfg.Kubeconfig)
	if err != nil {
		return nil, usageError{fmt.Errorf("KUBECONFIG (--kubeconfig): %q: %w", cfg.Kubeconfig, err)}
	}
	// client-go would send 5 requests a second. WORKER_CONCURRENCY bounds what
	// is in flight, and the API server's own flow control does the rest.
	rc.QPS = -1
	rc.Wrap(func(next http.RoundTripper) http.RoundTripper { return surfaceRetryAfter{next} })
	rc.UserAgent = "kuberollouttrigger/" + strings.ReplaceAll(versionString(), " ", "_")
	// As dynamic.NewForConfig does, but for the decoder.
	rc = dynamic.ConfigFor(rc)
	rc.NegotiatedSerializer = singlePass(rc.NegotiatedSerializer)
	requests, err := rest.UnversionedRESTClientFor(rc)
	return dynamic.New(requests), err
}

// kubernetesConfig reads KUBECONFIG, or without it the pod's ServiceAccount. The usual
// loader takes the latter if it finds no file: it may belong to the wrong cluster.
func kubernetesConfig(files string) (*rest.Config, error) {
	if files == "" {
		return rest.InClusterConfig()
	}
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: filepath.SplitList(files)}
	merged, err := rules.Load()
	if err == nil && len(merged.Clusters) == 0 {
		err = errors.New("expected a file with a cluster")
	}
	if err != nil {
		return nil, err
	}
	return clientcmd.NewNonInteractiveClientConfig(*merged, "", nil, rules).ClientConfig()
}

// surfaceRetryAfter makes an error of a refused patch that says when to try again.
// client-go would wait, and occupy one of the slots of WORKER_CONCURRENCY.
type surfaceRetryAfter struct{ next http.RoundTripper }

func (t surfaceRetryAfter) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(r)
	if err == nil && r.Method == http.MethodPatch && resp.StatusCode >= http.StatusBadRequest {
		if seconds, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 31); err == nil {
			resp.Body.Close()
			return nil, apierrors.NewTooManyRequests(fmt.Sprintf("%s (Retry-After: %ds)", resp.Status, seconds), int(seconds))
		}
	}
	return resp, err
}

// singlePass has the dynamic client parse JSON once. Its decoders look for the kind
// first, at each level, and decode lists twice: a third of the worker's CPU time in a
// fan-out to 1,000 Deployments.
func singlePass(usual runtime.NegotiatedSerializer) runtime.NegotiatedSerializer {
	info := usual.SupportedMediaTypes()[0] // JSON
	stream := *info.StreamSerializer
	stream.Serializer = singlePassDecoder{stream.Serializer}
	info.Serializer, info.StreamSerializer = singlePassDecoder{info.Serializer}, &stream
	return runtime.NewSimpleNegotiatedSerializer(info)
}

type singlePassDecoder struct{ runtime.Serializer }

// Decode leaves errors, and whatever has no kind, to the usual decoder.
func (d singlePassDecoder) Decode(data []byte, defaults *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	if event, ok := into.(*metav1.WatchEvent); ok && kjson.UnmarshalCaseSensitivePreserveInts(data, event) == nil {
		return event, nil, nil
	}
	object := &unstructured.Unstructured{}
	err := kjson.UnmarshalCaseSensitivePreserveInts(data, &object.Object)
	if kind := object.GetKind(); err == nil && kind != "" && kind != "Status" {
		switch into := into.(type) {
		case nil: // an object of a watch
			return object, nil, nil
		case *unstructured.Unstructured:
			*into = *object
			return into, nil, nil
		case *unstructured.UnstructuredList:
			if list, err := object.ToList(); err == nil && object.IsList() {
				*into = *list
				return into, nil, nil
			}
		}
	}
	return d.Serializer.Decode(data, defaults, into)
}
