//go:build dev

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/alicebob/miniredis/v2"
	"k8s.io/client-go/tools/clientcmd"

	"kuberollouttrigger/internal/fake"
)

// The dev subcommand runs the real web and the real worker, with every check on,
// against fakes of GitHub, Valkey and Kubernetes on loopback. It exists only in a
// build with the tag dev.
func init() {
	commands = append(commands, command{"dev", "try it here, without GitHub and without a cluster", runDev})
}

const (
	devTimeout = 20 * time.Second
	devStep    = 500 * time.Millisecond // of a rollout in the fake cluster
)

// frozen is the Deployment of the fake cluster that is paused.
const frozen = "shop/api-frozen"

type devOptions struct {
	once                   bool
	image, repository      string
	kubeconfig, valkeyAddr string // of the user's own; "" for fakes
}

func runDev(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	o, err := parseDevOptions(args, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return usageError{err}
	}
	if o.kubeconfig != "" {
		where, err := describeContext(o.kubeconfig)
		if err != nil {
			return usageError{fmt.Errorf("--kubeconfig: %w", err)}
		}
		fmt.Fprintf(stdout, "This restarts real workloads that run %s, in %s.\n\n", o.image, where)
	}
	n := newNarrator(getenv, stdout, stderr)
	pair, err := startDevPair(ctx, o, getenv, n, stderr)
	if err != nil {
		return err
	}
	defer pair.stop()
	pair.introduce(stdout)
	restarted, requestedAt, err := pair.story(ctx, stdout)
	if err != nil {
		return err
	}
	if o.once && !restarted {
		return errors.New("nothing was restarted")
	}
	if o.once {
		return nil
	}
	if err := pair.follow(ctx, stdout, requestedAt); err != nil {
		return err
	}
	pair.invite(stdout)
	n.flush(true)
	select {
	case <-ctx.Done():
		return nil
	case err := <-pair.failed:
		return err
	}
}

func parseDevOptions(args []string, stdout io.Writer) (o devOptions, err error) {
	fs := flag.NewFlagSet("dev", flag.ContinueOnError)
	fs.SetOutput(stdout)
	fs.BoolVar(&o.once, "once", false, "exit after the first restart: 0 if it happened")
	fs.StringVar(&o.image, "image", "ghcr.io/acme/api:dev", "image that the sample job pushes")
	fs.StringVar(&o.repository, "repository", "acme/api", "repository of the sample job")
	fs.StringVar(&o.kubeconfig, "kubeconfig", "", "cluster to use instead of the fake one; its Deployments are really restarted")
	fs.StringVar(&o.valkeyAddr, "valkey-addr", "", "Valkey to use instead of the embedded one")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q; see kuberollouttrigger dev -h", fs.Arg(0))
	}
	if o.image, err = parseImage(o.image); err != nil {
		return o, fmt.Errorf("--image: %w", err)
	}
	owner, name, _ := strings.Cut(o.repository, "/")
	if !ownerRE.MatchString(owner) || name == "" || strings.Contains(name, "/") {
		return o, fmt.Errorf("--repository: %q is not a repository; expected owner/name, such as acme/api", o.repository)
	}
	return o, nil
}

// describeContext names the cluster that a kubeconfig leads to.
func describeContext(path string) (string, error) {
	config, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return "", err
	}
	c := config.Contexts[config.CurrentContext]
	if c == nil || config.Clusters[c.Cluster] == nil {
		return "", fmt.Errorf("%s has no current context with a cluster; set one with kubectl config use-context", path)
	}
	return fmt.Sprintf("context %s, server %s", config.CurrentContext, config.Clusters[c.Cluster].Server), nil
}

// devPair is a running web and a running worker, and what they talk to.
type devPair struct {
	devOptions
	issuer                    *fake.Issuer
	requestURL, requestToken  string              // of the runner's token endpoint
	kube                      *fake.KubernetesAPI // nil with --kubeconfig
	rollouts                  atomic.Int64        // that have begun there
	audience, valkey          string
	webURL, webOps, workerOps string

	narrator *narrator
	failed   chan error
	closers  []func()
}

// startDevPair starts both through the configuration that they have in
// production, and waits until both are ready.
func startDevPair(ctx context.Context, o devOptions, getenv func(string) string, n *narrator, stderr io.Writer) (p *devPair, err error) {
	p = &devPair{devOptions: o, issuer: fake.NewIssuer(), narrator: n, failed: make(chan error, 2)}
	p.issuer.Repository = o.repository
	p.requestURL, p.requestToken = p.issuer.ServeRunner()
	p.closers = append(p.closers, p.issuer.Close)
	defer func() {
		if err != nil {
			p.stop()
		}
	}()
	kubeconfig := o.kubeconfig
	if kubeconfig == "" {
		if kubeconfig, err = p.startCluster(stderr); err != nil {
			return nil, err
		}
	}
	p.valkey = o.valkeyAddr
	if p.valkey == "" {
		embedded := miniredis.NewMiniRedis()
		if err := embedded.StartAddr("127.0.0.1:0"); err != nil {
			return nil, fmt.Errorf("starting the embedded Valkey: %w", err)
		}
		p.closers = append(p.closers, embedded.Close)
		p.valkey = embedded.Addr()
	}
	addrs, err := freeAddrs(3)
	if err != nil {
		return nil, err
	}
	p.webURL, p.webOps, p.workerOps = "http://"+addrs[0], "http://"+addrs[1], "http://"+addrs[2]
	env := p.environment(getenv, addrs[0])
	cfg := &webConfig{}
	if err := parseConfig("web", cfg, []string{"--ops-listen-addr", addrs[1]}, env); err != nil {
		return nil, err
	}
	p.audience = cfg.Audience
	ctx, cancel := context.WithCancel(ctx)
	worker := make(chan struct{})
	p.closers = append(p.closers, n.mute, func() { <-worker }, cancel)
	go func() {
		defer close(worker)
		p.failed <- runWorker(ctx, []string{"--ops-listen-addr", addrs[2], "--kubeconfig", kubeconfig}, env, io.Discard, n.log("worker"))
	}()
	go func() { // nobody waits until it stops: it first gives load balancers a second
		p.failed <- serveWeb(ctx, cfg, p.issuer.Client(), newLogger(n.log("web"), cfg.LogLevel))
	}()
	return p, errors.Join(p.awaitReady(ctx, p.webOps), p.awaitReady(ctx, p.workerOps))
}

// stop ends everything, in the reverse order of its start.
func (p *devPair) stop() {
	for _, f := range slices.Backward(p.closers) {
		f()
	}
}

// startCluster makes a fake cluster with a few Deployments, of which some run the
// image.
func (p *devPair) startCluster(stderr io.Writer) (kubeconfig string, err error) {
	p.kube = fake.NewKubernetesAPI(func(format string, args ...any) { fmt.Fprintf(stderr, format+"\n", args...) })
	p.closers = append(p.closers, p.kube.Close)
	p.kube.OnStore = p.rollOut
	p.kube.Create("shop/api", fake.Spec{Image: p.image})
	p.kube.Create("shop/api-migrated-first", fake.Spec{Image: "docker.io/library/nginx:1.29", Init: p.image})
	p.kube.Create(frozen, fake.Spec{Image: p.image, Paused: true})
	p.kube.Create("shop/storefront", fake.Spec{Image: "ghcr.io/acme/storefront:dev"})
	dir, err := os.MkdirTemp("", "kuberollouttrigger-dev-")
	if err != nil {
		return "", fmt.Errorf("making a directory for the kubeconfig: %w", err)
	}
	p.closers = append(p.closers, func() { os.RemoveAll(dir) })
	return p.kube.Kubeconfig(dir), nil
}

// rollOut plays the Deployment controller, which replaces two pods after a patch.
func (p *devPair) rollOut(object map[string]any) {
	metadata := child(object, "metadata")
	key := fmt.Sprintf("%v/%v", metadata["namespace"], metadata["name"])
	pace := devStep * time.Duration(2+p.rollouts.Add(1)%2) / 2 // not all in step
	go func() {
		at := p.kube.RestartedAt(key)
		for _, pods := range []struct{ updated, all int }{{0, 3}, {1, 3}, {2, 2}} {
			time.Sleep(pace)
			if p.kube.RestartedAt(key) != at {
				return // another rollout has begun
			}
			p.kube.ChangeStatus(key, func(object map[string]any) {
				object["status"] = map[string]any{"observedGeneration": child(object, "metadata")["generation"],
					"updatedReplicas": pods.updated, "availableReplicas": 2, "replicas": pods.all}
			})
		}
	}()
}

// environment is the user's, with a default for what is required, and without
// what concerns another cluster, another Valkey or another issuer.
func (p *devPair) environment(getenv func(string) string, webAddr string) func(string) string {
	owner, _, _ := strings.Cut(p.repository, "/")
	defaults := map[string]string{
		"GITHUB_OIDC_AUDIENCE": "kuberollouttrigger-dev",
		"GITHUB_ALLOWED_ORG":   owner,
		"ALLOWED_IMAGE_PREFIX": p.image[:strings.LastIndex(p.image, "/")],
	}
	fixed := map[string]string{
		"LOG_LEVEL": strings.ToLower(min(p.narrator.level, slog.LevelInfo).String()), "KUBECONFIG": "", "VALKEY_ADDR": p.valkey,
		"GITHUB_OIDC_ISSUER": p.issuer.URL, "WEB_LISTEN_ADDR": webAddr,
	}
	if p.kube != nil {
		for _, name := range []string{"WORKER_NAMESPACES", "WORKER_SELECTOR", "WORKER_KINDS", "WORKER_DRY_RUN"} {
			fixed[name] = ""
		}
	}
	return func(name string) string {
		if value, ok := fixed[name]; ok {
			return value
		}
		if strings.HasPrefix(name, "VALKEY_") && p.valkeyAddr == "" { // such as VALKEY_PASSWORD
			return ""
		}
		if value := getenv(name); value != "" {
			return value
		}
		return defaults[name]
	}
}

func (p *devPair) awaitReady(ctx context.Context, ops string) error {
	ctx, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	why := "no answer"
	for {
		if resp, err := http.Get(ops + "/readyz"); err == nil {
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if why = strings.TrimSpace(string(body)); resp.StatusCode == http.StatusOK {
				return nil
			}
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

func (p *devPair) introduce(stdout io.Writer) {
	kubernetes, valkey := "the cluster of "+p.kubeconfig, "as --valkey-addr says"
	if p.kube != nil {
		kubernetes = p.kube.URL + ", fake, with four Deployments"
	}
	if p.valkeyAddr == "" {
		valkey = "embedded"
	}
	fmt.Fprint(stdout, "This is the real web and the real worker, with every check on.\nA local issuer of tokens plays GitHub; everything listens on loopback only.\n\n")
	tw := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "  issuer\t%s\n  valkey\t%s, %s\n  kubernetes\t%s\n  web\t%s\n  probes, metrics\t%s (web), %s (worker)\n\n",
		p.issuer.URL, p.valkey, valkey, kubernetes, p.webURL, p.webOps, p.workerOps)
	tw.Flush()
}

// send sends a request with a new token.
func (p *devPair) send(ctx context.Context, method, path, body string) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, p.webURL+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	token := p.issuer.Token(p.issuer.Claims(time.Now(), map[string]any{"aud": p.audience}))
	req.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// story sends one event through and tells what happened.
func (p *devPair) story(ctx context.Context, stdout io.Writer) (restarted bool, requestedAt string, err error) {
	fmt.Fprintf(stdout, "1. A job of %s has pushed %s. It gets a token from GitHub, signed RS256 and valid for five minutes.\n", p.repository, p.image)
	start, post := time.Now(), fmt.Sprintf(`{"image":%q}`, p.image)
	status, body, err := p.send(ctx, http.MethodPost, "/event", post)
	if err != nil {
		return false, "", err
	}
	fmt.Fprintf(stdout, "2. It posts %s to web.\n   web answers %d %s", post, status, body)
	var a accepted
	if err := json.Unmarshal(body, &a); err != nil || status != http.StatusAccepted {
		p.narrator.flush(false) // the reason
		return false, "", fmt.Errorf("web answered %d instead of 202", status)
	}
	outcome := "restarted nothing"
	restarted, complete := p.narrator.await(ctx, a.RequestedAt)
	if restarted {
		outcome = "restarted what runs it"
	}
	fmt.Fprintf(stdout, "3. The worker %s, within %s of the POST:\n", outcome, time.Since(start).Round(time.Millisecond))
	p.narrator.flush(false)
	if !complete {
		fmt.Fprintln(stdout, "   It is not done yet.")
	}
	return restarted, a.RequestedAt, nil
}

// follow asks web what becomes of a request, until it is complete or has failed. It
// resumes the paused Deployment when nothing else is left.
func (p *devPair) follow(ctx context.Context, stdout io.Writer, requestedAt string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*devTimeout)
	defer cancel()
	query := url.Values{"image": {p.image}, "since": {requestedAt}, "wait": {"5s"}}
	fmt.Fprintf(stdout, "4. The job asks what became of it: GET /rollout?%s\n", query.Encode())
	for now := (rollout{}); ; {
		query.Set("seen", now.Version)
		status, body, err := p.send(ctx, http.MethodGet, "/rollout?"+query.Encode(), "")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("web answered %d %s", status, body)
		}
		seen := now.Version
		now = rollout{}
		if err = cmp.Or(err, json.Unmarshal(body, &now)); err != nil {
			return err
		}
		p.narrator.flush(false)
		if now.Version != seen {
			for _, r := range now.Images[0].Clusters {
				deferred := ""
				for reason, n := range r.Deferred {
					deferred += fmt.Sprintf(", %d deferred (%s)", n, reason)
				}
				fmt.Fprintf(stdout, "   %s: %d run it, %d restarted, %d complete, %d failed%s\n",
					rolloutStates[r.State], r.Matched, r.Restarted, r.Complete, r.Failed, deferred)
				if p.kube != nil && r.Complete > 0 && r.Complete == r.Restarted && r.Deferred["paused"] > 0 {
					fmt.Fprintf(stdout, "5. Somebody resumes %s.\n", frozen)
					p.kube.Change(frozen, func(object map[string]any) { child(object, "spec")["paused"] = false })
				}
			}
		}
		if now.State != progressing && now.State != pending || ctx.Err() != nil {
			fmt.Fprintln(stdout)
			return nil
		}
	}
}

func (p *devPair) invite(stdout io.Writer) {
	fmt.Fprintf(stdout, `Now you. In another terminal:

  export ACTIONS_ID_TOKEN_REQUEST_URL='%s'
  export ACTIONS_ID_TOKEN_REQUEST_TOKEN='%s'
  export AUDIENCE='%s'
  export ROLLOUT_URL='%s'

  TOKEN=$(curl -sS -H "Authorization: bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" \
    "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=$AUDIENCE" | sed 's/.*"value":"\([^"]*\)".*/\1/')
  curl -i -H "Authorization: Bearer $TOKEN" -H 'Content-Type: application/json' \
    -d '{"image":"%s"}' "${ROLLOUT_URL%%/}/event"

The action does both, and waits for the end:

  IMAGE='%s' bash action/rollout.sh

Whatever web and the worker do about it appears here. Stop with Ctrl-C.
LOG_LEVEL=info shows the logs of both.

`, p.requestURL, p.requestToken, p.audience, p.webURL, p.image, p.image)
}

// narrator reads the logs of both. It makes a line for people of what happens to
// requests, and passes on what else has the user's LOG_LEVEL.
type narrator struct {
	level          slog.Level
	color          bool
	stdout, stderr io.Writer

	mu   sync.Mutex
	live bool
	held []devRecord // from before it is live
}

func newNarrator(getenv func(string) string, stdout, stderr io.Writer) *narrator {
	n := &narrator{level: slog.LevelWarn, stdout: stdout, stderr: stderr}
	n.level.UnmarshalText([]byte(getenv("LOG_LEVEL"))) // what is not a level leaves warn
	if file, ok := stdout.(*os.File); ok && getenv("NO_COLOR") == "" {
		info, err := file.Stat()
		n.color = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return n
}

// log takes the log of one process, a JSON line at a time.
func (n *narrator) log(process string) io.Writer { return processLog{n, process} }

type processLog struct {
	*narrator
	process string
}

// devRecord is what the narration needs of a log line.
type devRecord struct {
	Level                                       slog.Level
	Msg, Reason, Err, Warning                   string
	Repository, Ref, Image, Namespace           string
	Deployment, StatefulSet, DaemonSet, Rollout string // one of them names the workload
	EventName                                   string `json:"event_name"`
	RequestedAt                                 string `json:"requested_at"`
	Images                                      []string
	Status, Subscribers, Matched                int

	process, text string // the line for people
}

func (l processLog) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var r devRecord
	if err := json.Unmarshal(line, &r); err != nil {
		return l.stderr.Write(line)
	}
	color, text := r.narrate()
	if r.Level >= l.level && (text == "" || l.level <= slog.LevelInfo) {
		l.stderr.Write(line)
	}
	if text == "" {
		return len(line), nil
	}
	r.process, r.text = l.process, fmt.Sprintf("   %-8s%s", l.process, strings.Map(printable, text))
	if l.color && color != 0 {
		r.text = fmt.Sprintf("\x1b[%dm%s\x1b[0m", color, r.text)
	}
	if l.live {
		fmt.Fprintln(l.stdout, r.text)
	} else {
		l.held = append(l.held, r)
	}
	return len(line), nil
}

func printable(r rune) rune {
	if unicode.IsPrint(r) {
		return r
	}
	return ' '
}

// narrate returns "" for a line that says nothing about a request.
func (r devRecord) narrate() (color int, text string) {
	const red, green, yellow = 31, 32, 33
	who := "an unauthenticated caller"
	if r.Repository != "" {
		who = fmt.Sprintf("%s (%s, %s)", r.Repository, r.EventName, r.Ref)
	}
	switch {
	case r.Msg == "accepted":
		return green, fmt.Sprintf("accepted %s from %s; workers that heard it: %d", strings.Join(r.Images, ", "), who, r.Subscribers)
	case r.Msg == "denied":
		return red, fmt.Sprintf("denied %s with %d: %s", who, r.Status, r.Reason)
	case r.Msg == "requested":
		return 0, fmt.Sprintf("%s was requested; workloads that run it: %d", r.Image, r.Matched)
	}
	name := cmp.Or(r.Deployment, r.StatefulSet, r.DaemonSet, r.Rollout)
	if name == "" {
		return 0, ""
	}
	text = fmt.Sprintf("%s/%s %s", r.Namespace, name, r.Msg)
	for _, detail := range []string{r.Reason, r.Err, r.Warning} {
		if detail != "" {
			text += ": " + detail
		}
	}
	if strings.Contains(r.Reason, "WORKER_RESTART_INTERVAL") {
		text += "; the restart follows"
	}
	switch r.Msg {
	case "restarted":
		return green, text + ", restartedAt is now " + r.RequestedAt
	case "not restarted", "would restart":
		return yellow, text
	}
	return red, text
}

func (n *narrator) mute() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stdout, n.stderr = io.Discard, io.Discard
}

// await waits until the worker has dealt with every workload that runs the
// image of a request.
func (n *narrator) await(ctx context.Context, requestedAt string) (restarted, complete bool) {
	ctx, cancel := context.WithTimeout(ctx, devTimeout)
	defer cancel()
	for {
		matched, outcomes := -1, map[string]bool{}
		n.mu.Lock()
		for _, r := range n.held {
			switch {
			case r.RequestedAt != requestedAt:
			case r.Msg == "requested":
				matched = r.Matched
			case r.Msg == "restarted", r.Msg == "not restarted", r.Msg == "would restart":
				outcomes[strings.Join([]string{r.Namespace, r.Deployment, r.StatefulSet, r.DaemonSet, r.Rollout}, "/")] = true
				restarted = restarted || r.Msg == "restarted"
			}
		}
		n.mu.Unlock()
		if complete = matched >= 0 && len(outcomes) >= matched; complete {
			return restarted, true
		}
		select {
		case <-ctx.Done():
			return restarted, false
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// flush writes the lines that were held, web's first. When live, it holds no more.
func (n *narrator) flush(live bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	slices.SortStableFunc(n.held, func(a, b devRecord) int { return strings.Compare(a.process, b.process) })
	for _, r := range n.held {
		fmt.Fprintln(n.stdout, r.text)
	}
	n.held, n.live = nil, live
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
