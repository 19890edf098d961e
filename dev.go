//go:build dev

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/klog/v2"
)

// The dev subcommand runs the real web and the real worker, with every check
// on, against stand-ins for GitHub, Valkey and Kubernetes on loopback. It exists
// only in a build with the tag dev.
func init() {
	commands = append(commands, command{"dev", "try it here, without GitHub and without a cluster", runDev})
}

const devTimeout = 20 * time.Second

func runDev(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("dev", flag.ContinueOnError)
	fs.SetOutput(stdout)
	once := fs.Bool("once", false, "exit after the first restart: 0 if it happened")
	image := fs.String("image", "ghcr.io/acme/api:dev", "image that the sample job pushes")
	repository := fs.String("repository", "acme/api", "repository of the sample job")
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return usageError{err}
	} else if fs.NArg() > 0 {
		return usageError{fmt.Errorf("unexpected argument %q; see kuberollouttrigger dev -h", fs.Arg(0))}
	}
	ref, err := parseImage(*image)
	if err != nil {
		return usageError{fmt.Errorf("--image: %w", err)}
	}
	owner, name, _ := strings.Cut(*repository, "/")
	if !ownerRE.MatchString(owner) || name == "" || strings.Contains(name, "/") {
		return usageError{fmt.Errorf("--repository: %q is not a repository; expected owner/name, such as acme/api", *repository)}
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	issuer, err := newDevIssuer(*repository)
	if err != nil {
		return err
	}
	defer issuer.close()

	env := map[string]string{
		"LOG_LEVEL":            "warn",
		"VALKEY_ADDR":          "", // the embedded one
		"GITHUB_OIDC_AUDIENCE": "kuberollouttrigger-dev",
		"GITHUB_ALLOWED_ORG":   owner,
		"ALLOWED_IMAGE_PREFIX": ref[:strings.LastIndex(ref, "/")],
	}
	for name := range env {
		if v := getenv(name); v != "" {
			env[name] = v
		}
	}
	valkeyIs := "as VALKEY_ADDR says"
	if env["VALKEY_ADDR"] == "" {
		embedded := miniredis.NewMiniRedis()
		if err := embedded.StartAddr("127.0.0.1:0"); err != nil {
			return fmt.Errorf("starting the embedded Valkey: %w", err)
		}
		defer embedded.Close()
		env["VALKEY_ADDR"], valkeyIs = embedded.Addr(), "embedded"
	}
	client, kubernetesIs := devDeployments(ref), "simulated, with a few sample Deployments"
	if path := getenv("KUBECONFIG"); path != "" {
		kubernetesIs = "the cluster of " + path
		if client, err = newKubernetesClient(workerConfig{Kubeconfig: path}); err != nil {
			return err
		}
	}
	pair, err := startDevPair(ctx, env, getenv, issuer, client, stderr)
	if err != nil {
		return err
	}
	defer func() {
		cancel()
		pair.wait()
	}()

	fmt.Fprint(stdout, "This is the real web and the real worker, with every check on.\nGitHub is played by a local issuer of tokens; everything listens on loopback only.\n\n")
	tw := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "  issuer\t%s\n  valkey\t%s, %s\n  kubernetes\t%s\n  web\t%s\n  probes\t%s (web), %s (worker)\n\n",
		issuer.url, env["VALKEY_ADDR"], valkeyIs, kubernetesIs, pair.webURL, pair.webOps, pair.workerOps)
	tw.Flush()

	restarted, err := pair.story(ctx, stdout, issuer, client, ref, *repository)
	if err != nil {
		return err
	}
	if *once {
		if !restarted {
			return errors.New("nothing was restarted")
		}
		return nil
	}
	fmt.Fprintf(stdout, `Now you. In another terminal:

  export ACTIONS_ID_TOKEN_REQUEST_URL='%s'
  export ACTIONS_ID_TOKEN_REQUEST_TOKEN='%s'
  export AUDIENCE='%s'
  export ROLLOUT_URL='%s'

  TOKEN=$(curl -sS -H "Authorization: bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" \
    "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=$AUDIENCE" | sed 's/.*"value":"\([^"]*\)".*/\1/')
  curl -i -H "Authorization: Bearer $TOKEN" -H 'Content-Type: application/json' \
    -d '{"image":"%s"}' "$ROLLOUT_URL/event"

Stop with Ctrl-C. LOG_LEVEL=info shows the logs of both.
`, issuer.requestURL, issuer.requestToken, env["GITHUB_OIDC_AUDIENCE"], pair.webURL, ref)
	select {
	case <-ctx.Done():
		return nil
	case err := <-pair.failed:
		return err
	}
}

// devPair is a running web and a running worker.
type devPair struct {
	webURL, webOps, workerOps string
	audience                  string
	worker                    workerConfig // without Kubeconfig: on the simulated cluster
	failed                    chan error
	running                   chan struct{} // closed when both have returned
}

// startDevPair starts both through the configuration that they have in
// production, env before getenv, and waits until both are ready.
func startDevPair(ctx context.Context, env map[string]string, getenv func(string) string, issuer *devIssuer, client dynamic.Interface, stderr io.Writer) (*devPair, error) {
	addrs, err := freeAddrs(3)
	if err != nil {
		return nil, err
	}
	env = maps.Clone(env)
	env["GITHUB_OIDC_ISSUER"], env["WEB_LISTEN_ADDR"] = issuer.url, addrs[0]
	vars := func(name string) string {
		if v, ok := env[name]; ok {
			return v
		}
		return getenv(name)
	}
	webCfg, workerCfg := &webConfig{}, &workerConfig{InCluster: true} // the worker is given its client
	if err := parseConfig("web", webCfg, []string{"--ops-listen-addr", addrs[1]}, vars); err != nil {
		return nil, err
	}
	if err := parseConfig("worker", workerCfg, []string{"--ops-listen-addr", addrs[2]}, vars); err != nil {
		return nil, err
	}
	log := newLogger(stderr, webCfg.LogLevel)
	klog.SetSlogLogger(log)

	p := &devPair{
		webURL: "http://" + addrs[0], webOps: "http://" + addrs[1], workerOps: "http://" + addrs[2],
		audience: webCfg.Audience, worker: *workerCfg, failed: make(chan error, 2), running: make(chan struct{}),
	}
	workerDone := make(chan struct{})
	go func() {
		defer close(workerDone)
		if err := serveWorker(ctx, workerCfg, client, log.With("mode", "worker")); err != nil {
			p.failed <- err
		}
	}()
	go func() {
		defer close(p.running)
		if err := serveWeb(ctx, webCfg, issuer.client(), log.With("mode", "web")); err != nil {
			p.failed <- err
		}
		<-workerDone
	}()
	for _, ops := range []string{p.webOps, p.workerOps} {
		if err := p.awaitReady(ctx, ops); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// wait returns when both have stopped.
func (p *devPair) wait() { <-p.running }

func (p *devPair) awaitReady(ctx context.Context, ops string) error {
	ctx, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	why := "no answer"
	for {
		if status, body, err := httpDo(ctx, http.MethodGet, ops+"/readyz", nil, nil); err == nil && status == http.StatusOK {
			return nil
		} else if err == nil {
			why = strings.TrimSpace(string(body))
		}
		select {
		case err := <-p.failed:
			return err
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %s", ops, why)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// story sends one event through and tells what happened.
func (p *devPair) story(ctx context.Context, stdout io.Writer, issuer *devIssuer, client dynamic.Interface, image, repository string) (restarted bool, err error) {
	fmt.Fprintf(stdout, "1. A job of %s has pushed %s and asks GitHub for a token.\n", repository, image)
	status, body, err := httpDo(ctx, http.MethodGet, issuer.requestURL+"&audience="+p.audience,
		http.Header{"Authorization": {"bearer " + issuer.requestToken}}, nil)
	var token struct{ Value string }
	if err == nil {
		err = json.Unmarshal(body, &token)
	}
	if err != nil || status != http.StatusOK {
		return false, fmt.Errorf("asking the local issuer for a token: status %d: %w", status, err)
	}
	fmt.Fprintf(stdout, "   It gets one: %d bytes, signed RS256, valid for five minutes.\n", len(token.Value))

	start := time.Now()
	post := fmt.Appendf(nil, `{"image":%q}`, image)
	status, body, err = httpDo(ctx, http.MethodPost, p.webURL+"/event", http.Header{
		"Authorization": {"Bearer " + token.Value}, "Content-Type": {"application/json"},
	}, post)
	if err != nil {
		return false, err
	}
	fmt.Fprintf(stdout, "2. It posts %s to web.\n   web answers %d %s", post, status, body)
	var a accepted
	if err := json.Unmarshal(body, &a); err != nil || status != http.StatusAccepted {
		return false, fmt.Errorf("web answered %d instead of 202", status)
	}
	fmt.Fprintf(stdout, "   So the request is on record in Valkey, and %d worker heard it at once.\n", a.Subscribers)

	rows, restarted, err := p.outcome(ctx, client, image, a.RequestedAt)
	if err != nil {
		return false, err
	}
	if restarted {
		fmt.Fprintf(stdout, "3. worker restarted what runs it, within %s of the POST:\n", time.Since(start).Round(time.Millisecond))
	} else {
		fmt.Fprint(stdout, "3. worker restarted nothing:\n")
	}
	tw := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintf(tw, "     %s\n", row)
	}
	tw.Flush()
	fmt.Fprintln(stdout)
	return restarted, nil
}

// outcome waits until every Deployment that should restart carries the time of
// the request, and describes them all; when time is up, as it last saw them. It
// looks where worker looks, as RBAC may forbid the rest.
func (p *devPair) outcome(ctx context.Context, client dynamic.Interface, image, requestedAt string) (rows []string, restarted bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	namespaces := p.worker.Namespaces
	if len(namespaces) == 0 {
		namespaces = []string{metav1.NamespaceAll}
	}
	simulated, pause := p.worker.Kubeconfig == "", 2*time.Millisecond
	if !simulated {
		pause = 200 * time.Millisecond // others use that API server too
	}
	for {
		var items []unstructured.Unstructured
		for _, namespace := range namespaces {
			list, err := client.Resource(deploymentsResource).Namespace(namespace).List(ctx, metav1.ListOptions{LabelSelector: p.worker.Selector})
			if ctx.Err() != nil && rows != nil {
				return rows, restarted, nil
			} else if err != nil {
				return nil, false, fmt.Errorf("looking at the Deployments: %w", err)
			}
			items = append(items, list.Items...)
		}
		rows, restarted = nil, false
		waiting, others := false, 0
		for i := range items {
			d := newDeployment(&items[i])
			used := d.image(image)
			runs := used != nil
			what := ""
			switch {
			case !runs && simulated:
				what = "left alone\truns " + d.images[0].ref
			case !runs: // a cluster may have thousands
				others++
				continue
			case d.restartedAt == requestedAt:
				what = "restarted\trestartedAt is now " + d.restartedAt
				restarted = true
			case d.paused:
				what = "left alone\tpaused; it is restarted when it is resumed"
			case used.pinned:
				what = "left alone\tpinned by digest"
			default:
				what = "not restarted yet\tLOG_LEVEL=info shows why"
				waiting = true
			}
			rows = append(rows, fmt.Sprintf("%s/%s\t%s", d.namespace, d.name, what))
		}
		if rows == nil {
			rows = []string{"no Deployment that worker looks at runs " + image}
		}
		if others > 0 {
			rows = append(rows, fmt.Sprintf("%d with other images\tleft alone", others))
		}
		if !waiting {
			return rows, restarted, nil
		}
		sleep(ctx, pause)
	}
}

// devDeployments simulates a cluster whose Deployments run image, or do not.
func devDeployments(image string) dynamic.Interface {
	sample := func(name string, spec, pod map[string]any) runtime.Object {
		spec["template"] = map[string]any{"spec": pod}
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "apps/v1", "kind": "Deployment", "spec": spec,
			"metadata": map[string]any{"namespace": "shop", "name": name, "uid": name, "resourceVersion": "1",
				"creationTimestamp": "2026-01-01T00:00:00Z"},
		}}
	}
	container := func(image string) []any {
		return []any{map[string]any{"name": "main", "image": image, "imagePullPolicy": "Always"}}
	}
	return dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(),
		map[schema.GroupVersionResource]string{deploymentsResource: "DeploymentList"},
		sample("api", map[string]any{}, map[string]any{"containers": container(image)}),
		sample("api-migrated-first", map[string]any{}, map[string]any{
			"initContainers": container(image), "containers": container("docker.io/library/nginx:1.29")}),
		sample("api-frozen", map[string]any{"paused": true}, map[string]any{"containers": container(image)}),
		sample("storefront", map[string]any{}, map[string]any{"containers": container("ghcr.io/acme/storefront:dev")}),
	)
}

// devIssuer plays the two sides of GitHub that a job and web see: it hands out
// tokens as a runner's ACTIONS_ID_TOKEN_REQUEST_URL does, and publishes the
// keys that they are signed with, over TLS, as the issuer does.
// https://docs.github.com/actions/concepts/security/openid-connect
type devIssuer struct {
	url                      string // the issuer
	requestURL, requestToken string
	repository               string
	signer                   jose.Signer
	certificate              *x509.Certificate
	servers                  []*http.Server
}

func newDevIssuer(repository string) (*devIssuer, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	i := &devIssuer{repository: repository, requestToken: rand.Text()}
	const kid = "dev"
	i.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: kid}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, err
	}
	cert, err := i.selfSigned()
	if err != nil {
		return nil, err
	}
	secure, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return nil, err
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		secure.Close()
		return nil, err
	}
	i.url = "https://" + secure.Addr().String()
	i.requestURL = "http://" + plain.Addr().String() + "/token?api-version=2.0"

	keys := http.NewServeMux()
	keys.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]any{"issuer": i.url, "jwks_uri": i.url + "/.well-known/jwks"})
	})
	keys.HandleFunc("GET /.well-known/jwks", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: kid, Algorithm: "RS256", Use: "sig"}}})
	})
	tokens := http.NewServeMux()
	tokens.HandleFunc("GET /token", i.serveToken)
	for ln, h := range map[net.Listener]http.Handler{secure: keys, plain: tokens} {
		s := newServer(h, slog.New(slog.DiscardHandler))
		i.servers = append(i.servers, s)
		go s.Serve(ln)
	}
	return i, nil
}

// serveToken answers like the URL that a runner gives to a job.
func (i *devIssuer) serveToken(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "bearer "+i.requestToken {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	owner, _, _ := strings.Cut(i.repository, "/")
	audience := r.URL.Query().Get("audience")
	if audience == "" {
		audience = "https://github.com/" + owner
	}
	now := time.Now().Unix()
	token, err := jwt.Signed(i.signer).Claims(map[string]any{
		"iss": i.url, "aud": audience, "iat": now, "nbf": now - 300, "exp": now + 300, "jti": rand.Text(),
		"sub":        "repo:" + i.repository + ":ref:refs/heads/main",
		"repository": i.repository, "repository_id": "1", "repository_owner": owner, "repository_owner_id": "1",
		"repository_visibility": "private", "event_name": "push", "ref": "refs/heads/main", "ref_type": "branch",
		"workflow": "dev", "actor": owner, "run_id": "1", "run_number": "1", "run_attempt": "1",
	}).Serialize()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"count": len(token), "value": token})
}

// client trusts the issuer's certificate and no other.
func (i *devIssuer) client() *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(i.certificate)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
}

func (i *devIssuer) close() {
	for _, s := range i.servers {
		s.Close()
	}
}

func (i *devIssuer) selfSigned() (tls.Certificate, error) {
	var cert tls.Certificate
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, err
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(365 * 24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err != nil {
		return cert, err
	}
	i.certificate, err = x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// httpDo sends one request and reads the answer.
func httpDo(ctx context.Context, method, url string, h http.Header, body []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	maps.Copy(req.Header, h)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// freeAddrs returns loopback addresses that nobody listens on.
func freeAddrs(n int) ([]string, error) {
	var addrs []string
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer ln.Close()
		addrs = append(addrs, ln.Addr().String())
	}
	return addrs, nil
}
