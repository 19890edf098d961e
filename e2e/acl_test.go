package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// The valkey-server of these tests starts as in the StatefulSet of k8s/: with its
// valkey.conf and the users.acl that its init container writes.

// documented is the first match in the pages of docs/, with its groups.
func documented(t testing.TB, what string, pattern *regexp.Regexp) []string {
	t.Helper()
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		content, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if match := pattern.FindStringSubmatch(string(content)); match != nil {
			return match
		}
	}
	t.Fatalf("no page in docs/ has %s", what)
	return nil
}

// documentedSecret runs the documented command with a kubectl that prints its
// arguments, and returns the Secret's data.
func documentedSecret(t testing.TB) map[string]string {
	t.Helper()
	command := documented(t, "the command that creates the Secret",
		regexp.MustCompile(`(?m)^ *(kubectl -n kuberollouttrigger create secret generic valkey --from-literal.*)$`))[1]
	cmd := exec.Command("bash", "-euc", `kubectl() { printf '%s\n' "$@"; }; `+command)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	data := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if pair, ok := strings.CutPrefix(strings.TrimSpace(line), "--from-literal="); ok {
			key, value, _ := strings.Cut(pair, "=")
			data[key] = value
		}
	}
	return data
}

// manifestValkey is a Valkey as in k8s/, with one more user, whom the test uses.
type manifestValkey struct {
	*valkeyServer
	secret map[string]string
	dir    string
}

// startManifestValkey takes the options of the test's own client and further
// arguments of valkey-server.
func startManifestValkey(t testing.TB, options valkey.ClientOption, extra ...string) *manifestValkey {
	t.Helper()
	objects := readManifests(t, "../k8s/20-valkey.yaml")
	set := manifestNamed(t, objects, "StatefulSet", "valkey")
	data, _, _ := unstructured.NestedStringMap(manifestNamed(t, objects, "ConfigMap", "valkey").Object, "data")
	dir := t.TempDir()
	in := func(path string) string { return filepath.Join(dir, path) }
	// The paths of the pod, below a directory of the test.
	here := strings.NewReplacer("/etc/valkey/", in("etc")+"/", "/run/valkey/", in("run")+"/", "dir /data", "dir "+in("data"))
	for _, sub := range []string{"etc", "run", "data"} {
		if err := os.Mkdir(in(sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range data {
		if err := os.WriteFile(in("etc/"+name), []byte(here.Replace(content)), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	secret := documentedSecret(t)
	inits, _, _ := unstructured.NestedSlice(set.Object, "spec", "template", "spec", "initContainers")
	if len(inits) != 1 {
		t.Fatalf("%d init containers", len(inits))
	}
	init := inits[0].(map[string]any)
	command, _, _ := unstructured.NestedStringSlice(init, "command")
	for i := range command {
		command[i] = here.Replace(command[i])
	}
	env := []string{"PATH=" + os.Getenv("PATH")}
	variables, _, _ := unstructured.NestedSlice(init, "env")
	for _, variable := range variables {
		v := variable.(map[string]any)
		key, _, _ := unstructured.NestedString(v, "valueFrom", "secretKeyRef", "key")
		if len(secret[key]) < 64 || strings.Trim(secret[key], "0123456789abcdef") != "" {
			t.Fatalf("the Secret's %q is %q: not 64 hex digits", key, secret[key])
		}
		env = append(env, v["name"].(string)+"="+secret[key])
	}
	// A missing password must not become an empty one.
	for i := 1; i < len(env); i++ {
		again := exec.Command(command[0], command[1:]...)
		again.Env = slices.Concat(env[:i], env[i+1:])
		if err := again.Run(); err == nil {
			t.Errorf("without %s the init container succeeds", strings.SplitN(env[i], "=", 2)[0])
		}
	}
	render := exec.Command(command[0], command[1:]...)
	render.Env = env
	if out, err := render.CombinedOutput(); err != nil {
		t.Fatalf("the init container: %v\n%s", err, out)
	}
	acl := in("run/users.acl")
	if info, err := os.Stat(acl); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("users.acl: %v, %v", info, err)
	}
	file, err := os.OpenFile(acl, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(file, "user looker on >looker ~* &* +@all")
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}

	port := mustPort(t)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	options.InitAddress, options.Username, options.Password = []string{addr}, "looker", "looker"
	options.ForceSingleClient, options.DisableCache = true, true
	main, _, _ := unstructured.NestedSlice(set.Object, "spec", "template", "spec", "containers")
	args, _, _ := unstructured.NestedStringSlice(main[0].(map[string]any), "args")
	for i := range args {
		args[i] = here.Replace(args[i])
	}
	portFlag := "--port"
	if options.TLSConfig != nil {
		portFlag = "--tls-port"
	}
	v := &valkeyServer{addr: addr, args: append(append(args, "--bind", "127.0.0.1", portFlag, fmt.Sprint(port)), extra...)}
	if v.proc, err = startProcess("valkey", []string{"PATH=" + os.Getenv("PATH")}, "valkey-server", v.args...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.proc.kill)
	eventually(t, 15*time.Second, "valkey-server answers", func() error {
		if v.proc.exited() {
			t.Fatalf("valkey-server exited:\n%s", v.proc.stdout.tail(20))
		}
		if v.client == nil {
			client, err := valkey.NewClient(options)
			if err != nil {
				return err
			}
			t.Cleanup(client.Close)
			v.client = client
		}
		return v.do(t, "PING").Error()
	})
	return &manifestValkey{v, secret, dir}
}

// settings are those that the Deployments give web and worker.
func (m *manifestValkey) settings(user string) []string {
	return []string{"VALKEY_USERNAME=" + user, "VALKEY_PASSWORD=" + m.secret[user]}
}

// refusals are the entries of ACL LOG.
func (m *manifestValkey) refusals(t testing.TB) int {
	t.Helper()
	entries, err := m.must(t, "ACL", "LOG").ToArray()
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestManifestValkey: web and the worker work with the users of k8s/, the probes
// work, and Valkey denies nothing.
func TestManifestValkey(t *testing.T) {
	t.Parallel()
	v := startManifestValkey(t, valkey.ClientOption{})
	for setting, want := range map[string]string{"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"} {
		if got, err := v.must(t, "CONFIG", "GET", setting).AsStrMap(); err != nil || got[setting] != want {
			t.Errorf("%s is %q, want %q", setting, got[setting], want)
		}
	}
	namespace := newNamespace(t)
	kubeconfig := newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url)
	web := startWeb(t, v.addr, v.settings("web")...)
	worker := startWorker(t, v.addr, kubeconfig, append(v.settings("worker"), "WORKER_NAMESPACES="+namespace)...)
	job := newClient(web.url)
	d := deployment{namespace: namespace, name: "api", images: []string{newImage()}}
	d.create(t)
	r := record(t, namespace)
	r.waitRestartedAt(t, 10*time.Second, d, stamp(job.mustPush(t, d.images[0])))
	eventually(t, 5*time.Second, "the worker reports the restart", func() error {
		a, err := job.get(t.Context(), "image="+d.images[0])
		if err == nil && !strings.Contains(a.body, `"matched":1,"kinds":{"Deployment":1},"restarted":1`) {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
		return err
	})

	// A worker that was away catches up.
	worker.kill()
	missed := stamp(job.mustPush(t, d.images[0]))
	startWorker(t, v.addr, kubeconfig, append(v.settings("worker"), "WORKER_NAMESPACES="+namespace)...)
	r.waitRestartedAt(t, 10*time.Second, d, missed)

	// Long enough for the clients to send PING on idle connections.
	time.Sleep(2500 * time.Millisecond)
	for _, probe := range []string{"livenessProbe", "readinessProbe"} {
		if err := v.runProbe(t, probe); err != nil {
			t.Errorf("the %s: %v", probe, err)
		}
	}
	r.waitRestartedAt(t, 10*time.Second, d, stamp(job.mustPush(t, d.images[0])))
	if n := v.refusals(t); n != 0 {
		t.Errorf("ACL LOG has %d entries", n)
	}

	// A compromised web can keep Valkey busy with a script that nobody may stop.
	// The probes must notice, so that the kubelet restarts Valkey.
	evil, err := valkey.NewClient(valkey.ClientOption{InitAddress: []string{v.addr}, Username: "web", Password: v.secret["web"],
		ForceSingleClient: true, DisableCache: true, ClientSetInfo: valkey.DisableClientSetInfo, DisableRetry: true})
	if err != nil {
		t.Fatal(err)
	}
	defer evil.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	evil.Do(ctx, evil.B().Eval().Script("while true do end").Numkeys(0).Build())
	for _, probe := range []string{"livenessProbe", "readinessProbe"} {
		eventually(t, 20*time.Second, "the "+probe+" sees a busy Valkey", func() error {
			if v.runProbe(t, probe) == nil {
				return errors.New("it passes")
			}
			return nil
		})
	}
	v.kill()
	if err := v.runProbe(t, "livenessProbe"); err == nil {
		t.Error("the livenessProbe passes without a Valkey")
	}
}

// runProbe runs the command of a probe of the StatefulSet, as a kubelet does.
func (m *manifestValkey) runProbe(t testing.TB, name string) error {
	t.Helper()
	set := manifestNamed(t, readManifests(t, "../k8s/20-valkey.yaml"), "StatefulSet", "valkey")
	containers, _, _ := unstructured.NestedSlice(set.Object, "spec", "template", "spec", "containers")
	command, _, _ := unstructured.NestedStringSlice(containers[0].(map[string]any), name, "exec", "command")
	if len(command) != 3 {
		t.Fatalf("the %s is %q", name, command)
	}
	host, port, _ := net.SplitHostPort(m.addr)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // the manifest's timeoutSeconds
	defer cancel()
	here := strings.Replace(command[2], "valkey-cli ", "valkey-cli -h "+host+" -p "+port+" ", 1)
	out, err := exec.CommandContext(ctx, command[0], command[1], here).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// TestManifestValkeyLeastPrivilege: Valkey denies every command that the user does
// not need, and every other key and channel.
func TestManifestValkeyLeastPrivilege(t *testing.T) {
	t.Parallel()
	v := startManifestValkey(t, valkey.ClientOption{})
	may := map[string][]string{
		"web":    {"ping", "eval", "evalsha", "zadd", "zcard", "zscore", "zrange", "zremrangebyscore", "hgetall", "time", "publish"},
		"worker": {"ping", "subscribe", "zrevrangebyscore", "time", "eval", "evalsha", "hget", "hset", "expire", "zadd"},
		"probe":  {"ping"},
	}
	// Valkey allows these to everybody.
	everybody := []string{"auth", "hello", "quit", "reset"}
	all, err := v.must(t, "COMMAND", "LIST").AsStrSlice()
	if err != nil || len(all) < 200 {
		t.Fatalf("COMMAND LIST: %d, %v", len(all), err)
	}
	dryRun := func(user string, command ...string) string {
		answer, err := v.do(t, append([]string{"ACL", "DRYRUN", user}, command...)...).ToString()
		if err != nil {
			answer = err.Error()
		}
		return answer
	}
	for user, needed := range may {
		var allowed []string
		refused := 0
		for _, command := range all {
			group := slices.ContainsFunc(all, func(c string) bool { return strings.HasPrefix(c, command+"|") })
			if group || slices.Contains(everybody, command) {
				continue // of a group, each subcommand is tried
			}
			answer := dryRun(user, arguments(t, v, command)...)
			switch {
			case strings.Contains(answer, "has no permissions to run the '"):
				refused++
			default:
				allowed = append(allowed, command)
			}
		}
		slices.Sort(allowed)
		slices.Sort(needed)
		if !slices.Equal(allowed, needed) {
			t.Errorf("%s may run %q, and needs %q", user, allowed, needed)
		}
		fmt.Printf("%s: %s may run %d commands, %d are refused\n", t.Name(), user, len(allowed), refused)
	}

	// As themselves, not as a dry run.
	for _, try := range []struct {
		user, command string
		allowed       bool
	}{
		{"web", "PUBLISH kuberollouttrigger x", true},
		{"web", "PUBLISH other x", false},
		{"web", "ZADD kuberollouttrigger:requested 1 x", true},
		{"web", "ZADD other 1 x", false},
		{"web", "ZADD kuberollouttrigger:other 1 x", false},
		{"web", "HGETALL kuberollouttrigger:report:x", true},
		{"web", "HGETALL kuberollouttrigger:other", false},
		{"web", "HSET kuberollouttrigger:report:x a b", false},
		{"web", "EVAL return(redis.call('HSET','kuberollouttrigger:report:x','a','b')) 0", false},
		{"web", "ZRANGE kuberollouttrigger:clusters 0 -1", true},
		{"web", "ZADD kuberollouttrigger:clusters 1 x", false},
		{"web", "SUBSCRIBE kuberollouttrigger", false},
		{"web", "ZREVRANGEBYSCORE kuberollouttrigger:requested +inf 0", false},
		{"web", "EVAL return(redis.call('DEL','kuberollouttrigger:requested')) 0", false},
		{"web", "EVAL return(redis.call('ZADD','other',1,'x')) 0", false},
		{"web", "DEL kuberollouttrigger:requested", false},
		{"web", "FLUSHALL", false},
		{"web", "CONFIG GET requirepass", false},
		{"web", "ACL SETUSER web ~*", false},
		{"web", "FUNCTION LIST", false},
		{"web", "SCRIPT FLUSH", false},
		{"web", "SHUTDOWN", false},
		{"worker", "ZREVRANGEBYSCORE kuberollouttrigger:requested +inf 0", true},
		{"worker", "ZREVRANGEBYSCORE other +inf 0", false},
		{"worker", "PUBLISH kuberollouttrigger x", false},
		{"worker", "ZADD kuberollouttrigger:requested 1 x", false},
		{"worker", "SUBSCRIBE other", false},
		{"worker", "PSUBSCRIBE *", false},
		{"worker", "EVAL return(redis.call('ZADD','kuberollouttrigger:requested',1,'x')) 0", false},
		{"worker", "EVAL return(redis.call('PUBLISH','kuberollouttrigger','x')) 0", false},
		{"worker", "HSET kuberollouttrigger:report:x a b", true},
		{"worker", "HSET kuberollouttrigger:requested a b", false},
		{"worker", "HSET other a b", false},
		{"worker", "EXPIRE kuberollouttrigger:requested 1", false},
		{"worker", "ZADD kuberollouttrigger:clusters 1 x", true},
		{"worker", "DEL kuberollouttrigger:report:x", false},
		{"worker", "KEYS *", false},
		{"worker", "CLIENT LIST", false},
		{"worker", "REPLICAOF 127.0.0.1 1", false},
		{"worker", "MONITOR", false},
		{"default", "PING", false},
	} {
		options := valkey.ClientOption{InitAddress: []string{v.addr}, Username: try.user, Password: v.secret[try.user],
			ForceSingleClient: true, DisableCache: true, ClientSetInfo: valkey.DisableClientSetInfo, DisableRetry: true}
		client, err := valkey.NewClient(options)
		if err == nil {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			switch words := strings.Fields(try.command); words[0] {
			case "SUBSCRIBE":
				err = client.Receive(ctx, client.B().Subscribe().Channel(words[1]).Build(), func(valkey.PubSubMessage) {})
			case "PSUBSCRIBE":
				err = client.Receive(ctx, client.B().Psubscribe().Pattern(words[1]).Build(), func(valkey.PubSubMessage) {})
			default:
				err = client.Do(ctx, client.B().Arbitrary(words...).Build()).Error()
			}
			cancel()
			client.Close()
		}
		if try.allowed && err != nil || !try.allowed && (err == nil || !noPermission(err)) {
			t.Errorf("%s: %s: %v", try.user, try.command, err)
		}
	}
	if v.refusals(t) == 0 {
		t.Error("ACL LOG is empty after refusals, so that an empty one says nothing")
	}
}

func noPermission(err error) bool {
	text := err.Error()
	return strings.HasPrefix(text, "NOPERM") || strings.HasPrefix(text, "NOAUTH") || strings.HasPrefix(text, "WRONGPASS") ||
		strings.Contains(text, "ACL failure in script")
}

// arguments is a command with as many arguments as it requires. Their values do
// not matter where the command itself is denied.
func arguments(t testing.TB, v *manifestValkey, command string) []string {
	t.Helper()
	words := strings.Split(command, "|")
	info, err := v.must(t, "COMMAND", "INFO", command).ToArray()
	if err != nil || len(info) != 1 {
		t.Fatalf("COMMAND INFO %s: %v", command, err)
	}
	fields, err := info[0].ToArray()
	if err != nil || len(fields) < 2 {
		t.Fatalf("COMMAND INFO %s: %v", command, err)
	}
	arity, err := fields[1].AsInt64()
	if err != nil {
		t.Fatal(err)
	}
	for len(words) < int(max(arity, -arity)) {
		words = append(words, "1")
	}
	return words
}

// TestManifestValkeyTLS: with the documented settings both processes speak TLS to
// Valkey, and to nobody whose certificate another CA signed.
func TestManifestValkeyTLS(t *testing.T) {
	t.Parallel()
	_, certPEM, keyPEM, err := testCA.serverCert()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range map[string][]byte{"tls.crt": certPEM, "tls.key": keyPEM} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The lines that the page adds to valkey.conf, as arguments.
	block := documented(t, "the settings for TLS", regexp.MustCompile("(?ms)^ *```text\n *port 0\n(.*?)^ *```"))
	extra := []string{"--port", "0"}
	for line := range strings.Lines(block[1]) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == "tls-port" {
			continue // a free one is taken here
		}
		extra = append(extra, "--"+name, strings.ReplaceAll(value, "/etc/valkey-tls", dir))
	}
	v := startManifestValkey(t, valkey.ClientOption{TLSConfig: &tls.Config{RootCAs: testCA.pool()}}, extra...)

	namespace := newNamespace(t)
	kubeconfig := newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url)
	speakTLS := []string{"VALKEY_TLS_ENABLED=true", "VALKEY_TLS_CA_FILE=" + testCA.file}
	web := startWeb(t, v.addr, append(v.settings("web"), speakTLS...)...)
	startWorker(t, v.addr, kubeconfig, slices.Concat(v.settings("worker"), speakTLS, []string{"WORKER_NAMESPACES=" + namespace})...)
	d := deployment{namespace: namespace, name: "api", images: []string{newImage()}}
	d.create(t)
	r := record(t, namespace)
	r.waitRestartedAt(t, 10*time.Second, d, stamp(newClient(web.url).mustPush(t, d.images[0])))

	other := filepath.Join(t.TempDir(), "other.pem")
	if err := os.WriteFile(other, otherCA(t), 0o644); err != nil {
		t.Fatal(err)
	}
	for what, settings := range map[string][]string{
		"another CA": {"VALKEY_TLS_ENABLED=true", "VALKEY_TLS_CA_FILE=" + other},
		"no TLS":     {"VALKEY_TLS_ENABLED=false"},
	} {
		refused := launchWeb(t, programPath, v.addr, append(v.settings("web"), settings...)...)
		if reason := refused.waitNotReady(t, 10*time.Second); reason == "" {
			t.Errorf("with %s web is ready", what)
		}
		if what == "another CA" {
			eventually(t, 10*time.Second, "web says what is wrong", func() error {
				if !strings.Contains(refused.stderr.String(), "certificate signed by unknown authority") {
					return fmt.Errorf("its log:\n%s", refused.stderr.tail(10))
				}
				return nil
			})
		}
	}
}

// otherCA is the certificate of a CA that no server here uses.
func otherCA(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// TestCatchUpForbidden: a worker that may not read the clock says so, and catches up as
// soon as it may.
func TestCatchUpForbidden(t *testing.T) {
	t.Parallel()
	v := startManifestValkey(t, valkey.ClientOption{})
	namespace := newNamespace(t)
	kubeconfig := newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url)
	worker := startWorker(t, v.addr, kubeconfig, append(v.settings("worker"), "WORKER_NAMESPACES="+namespace)...)
	v.must(t, "ACL", "SETUSER", "worker", "-time")
	v.must(t, "CLIENT", "KILL", "TYPE", "pubsub")
	time.Sleep(2 * time.Second) // for several tries
	if n := len(worker.logged(t, "msg", "catch-up failed, trying again")); n != 1 {
		t.Errorf("the log says it %d times", n)
	}
	if reason := worker.waitNotReady(t, time.Second); !strings.Contains(reason, "check this user's ACL in Valkey") {
		t.Errorf("not ready: %s", reason)
	}
	v.must(t, "ACL", "SETUSER", "worker", "+time")
	worker.waitReady(t, 5*time.Second)
}
