package main

import (
	"cmp"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"k8s.io/apimachinery/pkg/labels"
)

// commonConfig is what web and worker share.
type commonConfig struct {
	LogLevel      slog.Level
	OpsListenAddr string // host:port of probes and metrics
	Valkey        valkeyConfig
}

// valkeyConfig says how to reach Valkey and which names to use there.
type valkeyConfig struct {
	Addr               string // host:port
	Username, Password string // empty: no AUTH
	TLS                bool
	TLSRoots           *x509.CertPool // nil: the system's
	Channel            string         // PubSub channel, and prefix of the keys
}

type webConfig struct {
	commonConfig
	policyConfig
	ListenAddr string // host:port of the public API
}

// policyConfig is the part of web's configuration that policy.go decides by.
type policyConfig struct {
	ImagePrefixes imagePrefixes // the only images that may be restarted
	Audience      string        // the one accepted value of aud
	Issuer        string        // exact URL of the OIDC issuer
	Orgs          []string
	OrgIDs        []string // empty: not checked
	TrustPolicy   []rule   // empty: the default policy
}

type workerConfig struct {
	commonConfig
	ImagePrefixes     imagePrefixes // the only images that may be restarted
	InCluster         bool          // the caller sets it: KUBECONFIG may be missing
	Kubeconfig        string        // path; empty: the pod's ServiceAccount
	Kinds             []*kind
	Namespaces        []string      // empty: all
	Selector          string        // label selector; empty: all
	CatchUp           time.Duration // age of the oldest request that counts; 0: PubSub only
	RestartInterval   time.Duration // at least this long between two restarts of a workload; 0: off
	RestartsPerMinute int           // at most, of all workloads; 0: any
	Concurrency       int           // patches in flight
	DryRun            bool          // patches change nothing
	Events            bool          // write an Event about each restart
	ClusterName       string        // tells clusters apart in logs and reports
}

// option is an environment variable and the flag of the same name. The tables below are
// the only source of parsing, of -h, and of the test of docs/configuration.md.
type option struct {
	env, def, usage string
	unset           string // shown in help when there is no default
	expected        string // shown in errors if set gives no reason; empty: usage is
	required        bool
	secret          bool // the value is never printed, errors included
	multiline       bool // errors name the line instead of the value
	boolean         bool // the flag may stand without a value
	set             func(value string) error
}

func (o option) flagName() string { return strings.ReplaceAll(strings.ToLower(o.env), "_", "-") }
func (o option) String() string   { return o.env + " (--" + o.flagName() + ")" }

// Options are set in the order of their table, so that one can depend on another.
func (c *commonConfig) options() []option {
	return []option{
		{env: "LOG_LEVEL", def: "info", usage: "debug, info, warn or error", set: into(&c.LogLevel, parseLogLevel)},
		{env: "OPS_LISTEN_ADDR", def: ":8081", usage: "host:port of /healthz, /readyz and /metrics", set: text(&c.OpsListenAddr, isListenAddr)},
		{env: "VALKEY_ADDR", required: true, usage: "host:port of Valkey", set: text(&c.Valkey.Addr, isDialAddr)},
		{env: "VALKEY_USERNAME", usage: "user name for Valkey's AUTH", set: text(&c.Valkey.Username)},
		{env: "VALKEY_PASSWORD", secret: true, usage: "password for Valkey's AUTH", set: text(&c.Valkey.Password)},
		boolOption("VALKEY_TLS_ENABLED", "speak TLS to Valkey", &c.Valkey.TLS),
		{env: "VALKEY_TLS_CA_FILE", unset: "system roots", usage: "PEM file with the CA of Valkey's certificate", set: into(&c.Valkey.TLSRoots, c.readRoots)},
		{env: "VALKEY_CHANNEL", def: "kuberollouttrigger", usage: "PubSub channel; keys begin with it and a colon",
			expected: "1 to 128 letters, digits, dots, dashes, underscores or colons", set: text(&c.Valkey.Channel, channelRE.MatchString)},
	}
}

func boolOption(env, usage string, field *bool) option {
	return option{env: env, def: "false", boolean: true, usage: usage, expected: "true or false", set: into(field, strconv.ParseBool)}
}

func prefixOption(p *imagePrefixes) option {
	return option{env: "ALLOWED_IMAGE_PREFIX", required: true, usage: "comma-separated image prefixes that may be restarted, such as ghcr.io/acme",
		set: into(p, parseImagePrefixes)}
}

func (c *webConfig) options() []option {
	public := option{env: "WEB_LISTEN_ADDR", def: ":8080", usage: "host:port of the public API", set: text(&c.ListenAddr, isListenAddr)}
	return slices.Concat(c.commonConfig.options(), []option{public}, c.policyOptions(true))
}

// options are those of explain, which can do without an audience.
func (c *policyConfig) options() []option { return c.policyOptions(false) }

func (c *policyConfig) policyOptions(audienceRequired bool) []option {
	return []option{
		prefixOption(&c.ImagePrefixes),
		{env: "GITHUB_OIDC_AUDIENCE", required: audienceRequired, usage: "audience that a token must be made for, such as https://rollout.example.com",
			set: text(&c.Audience)},
		{env: "GITHUB_OIDC_ISSUER", def: "https://token.actions.githubusercontent.com", usage: "issuer of the tokens",
			expected: "an https URL without query, such as https://token.actions.githubusercontent.com", set: text(&c.Issuer, isIssuer)},
		{env: "GITHUB_ALLOWED_ORG", required: true, usage: "comma-separated owners whose repositories are allowed", set: into(&c.Orgs, listOf(ownerRE))},
		{env: "GITHUB_ALLOWED_ORG_ID", usage: "comma-separated numeric ids that repository_owner_id must be one of", set: into(&c.OrgIDs, listOf(digitsRE))},
		{env: "TRUST_POLICY", multiline: true, usage: "YAML rules that say which jobs may restart which images", set: into(&c.TrustPolicy, parseRules)},
	}
}

func (c *workerConfig) options() []option {
	return append(c.commonConfig.options(), []option{
		prefixOption(&c.ImagePrefixes),
		{env: "KUBECONFIG", required: !c.InCluster, unset: "in-cluster", usage: "path of a kubeconfig", set: text(&c.Kubeconfig)},
		{env: "WORKER_KINDS", def: kinds[0].String(), usage: "comma-separated kinds of workloads to watch", set: into(&c.Kinds, parseKinds)},
		{env: "WORKER_NAMESPACES", unset: "all", usage: "comma-separated namespaces to watch", set: into(&c.Namespaces, listOf(namespaceRE))},
		{env: "WORKER_SELECTOR", unset: "all", usage: "label selector of the workloads to watch", set: text(&c.Selector, isSelector)},
		{env: "WORKER_CATCH_UP", def: "1h", usage: "maximum age of a missed request; 0 for PubSub only, at most 24h",
			expected: "0 or a duration from 1m to 24h, such as 1h", set: into(&c.CatchUp, time.ParseDuration, isCatchUp)},
		{env: "WORKER_RESTART_INTERVAL", def: "10s", usage: "shortest time between two restarts of a workload; 0 for none",
			set: into(&c.RestartInterval, c.parseRestartInterval)},
		{env: "WORKER_RESTARTS_PER_MINUTE", def: "0", usage: "restarts per minute at most; 0 for no limit",
			expected: "a number from 0 to 6000", set: into(&c.RestartsPerMinute, strconv.Atoi, isRestartsPerMinute)},
		{env: "WORKER_CONCURRENCY", def: "16", usage: "patches in flight at once, 1 to 256",
			expected: "a number from 1 to 256", set: into(&c.Concurrency, strconv.Atoi, isConcurrency)},
		boolOption("WORKER_DRY_RUN", "send patches that change nothing, and log what would restart", &c.DryRun),
		boolOption("WORKER_EVENTS", "write an Event about each restart, for kubectl describe", &c.Events),
		{env: "CLUSTER_NAME", def: "default", usage: "name of the cluster in logs and reports, another in each cluster",
			expected: "1 to 63 letters, digits, dots, dashes or underscores", set: text(&c.ClusterName, clusterRE.MatchString)},
	}...)
}

// configuration is what a subcommand reads from its flags and the environment.
type configuration interface{ options() []option }

// usageError is a mistake in the configuration. The process exits with 2.
type usageError struct{ error }

// parseConfig sets the options of cfg: a flag overrides the environment, and an
// empty variable counts as not set. The error, a usageError, names everything
// that is missing or wrong at once. flag.ErrHelp means that -h was given.
func parseConfig(subcommand string, cfg configuration, args []string, getenv func(string) string) error {
	return parseFlags(flag.NewFlagSet(subcommand, flag.ContinueOnError), cfg, args, getenv)
}

// parseFlags is parseConfig for a subcommand whose other flags are in fs.
func parseFlags(fs *flag.FlagSet, cfg configuration, args []string, getenv func(string) string) error {
	fs.SetOutput(io.Discard) // the caller prints errors and help
	options, values := cfg.options(), map[string]string{}
	for _, o := range options {
		values[o.env] = getenv(o.env)
		define := fs.Func
		if o.boolean {
			define = fs.BoolFunc
		}
		define(o.flagName(), o.usage, func(v string) error { values[o.env] = v; return nil })
	}
	err := fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if err == nil && fs.NArg() > 0 { // which may be a password after a stray blank
		err = errors.New("unexpected argument; write --name=value")
	}
	if err != nil {
		return usageError{fmt.Errorf("%w; see kuberollouttrigger %s -h", err, fs.Name())}
	}
	var missing []string
	var wrong error
	for _, o := range options {
		if value := cmp.Or(values[o.env], o.def); value != "" {
			wrong = errors.Join(wrong, o.apply(value))
		} else if o.required {
			missing = append(missing, o.String())
		}
	}
	if len(missing) > 0 {
		wrong = errors.Join(fmt.Errorf("missing required configuration: %s", strings.Join(missing, ", ")), wrong)
	}
	if wrong != nil {
		return usageError{wrong}
	}
	return nil
}

// apply sets the option. Its error names it, and the value unless that is a secret.
func (o option) apply(value string) error {
	if strings.Contains(value, "REPLACE_ME") {
		return fmt.Errorf("%s still has the placeholder REPLACE_ME, as in k8s/10-config.yaml; set your own value", o)
	}
	err := o.set(value)
	if err == nil {
		return nil
	}
	if o.expected != "" || err == errInvalid {
		err = errors.New("expected " + cmp.Or(o.expected, o.usage))
	}
	if o.secret || o.multiline {
		return fmt.Errorf("%s: %w", o, err)
	}
	return fmt.Errorf("%s: %q: %w", o, value, err)
}

// printOptions is for -h. It prints defaults, never the values in the environment.
func printOptions(w io.Writer, options []option) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "flag\tvariable\tdefault\tmeaning")
	for _, o := range options {
		def := cmp.Or(o.def, o.unset, "none")
		if o.required && o.unset == "" {
			def = "required"
		}
		fmt.Fprintf(tw, "--%s\t%s\t%s\t%s\n", o.flagName(), o.env, def, o.usage)
	}
	tw.Flush()
}

var (
	channelRE   = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,128}$`)
	clusterRE   = regexp.MustCompile(`^[A-Za-z0-9._-]{1,63}$`)
	digitsRE    = regexp.MustCompile(`^[0-9]{1,20}$`)
	ownerRE     = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`) // underscores: Enterprise Managed Users
	namespaceRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

var errInvalid = errors.New("not valid")

// into sets field to what parse makes of a value that passes the checks.
func into[T any](field *T, parse func(string) (T, error), checks ...func(T) bool) func(string) error {
	return func(s string) error {
		v, err := parse(s)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(checks, func(ok func(T) bool) bool { return !ok(v) }) {
			return errInvalid
		}
		*field = v
		return nil
	}
}

func text(field *string, checks ...func(string) bool) func(string) error {
	return into(field, func(s string) (string, error) { return s, nil }, checks...)
}

func listOf(item *regexp.Regexp) func(string) ([]string, error) {
	return func(s string) (list []string, err error) {
		for part := range strings.SplitSeq(s, ",") {
			part = strings.TrimSpace(part)
			if !item.MatchString(part) {
				return nil, errInvalid
			}
			if !slices.Contains(list, part) {
				list = append(list, part)
			}
		}
		return list, nil
	}
}

func parseKinds(s string) (list []*kind, err error) {
	for name := range strings.SplitSeq(s, ",") {
		i := slices.IndexFunc(kinds, func(k *kind) bool { return k.String() == strings.TrimSpace(name) })
		if i < 0 {
			return nil, fmt.Errorf("expected one or several of %v, separated by commas", kinds)
		}
		if !slices.Contains(list, kinds[i]) {
			list = append(list, kinds[i])
		}
	}
	return list, nil
}

// parseRestartInterval bounds it by the catch-up window: a deferred request must not expire.
func (c *workerConfig) parseRestartInterval(s string) (time.Duration, error) {
	limit := cmp.Or(c.CatchUp, defaultWindow) / 2
	d, err := time.ParseDuration(s)
	if err != nil || d != 0 && (d < time.Second || d > limit) {
		err = fmt.Errorf("expected 0 or a duration of at least 1s and at most %s, half of WORKER_CATCH_UP (1h if that is 0)", limit)
	}
	return d, err
}

func parseLogLevel(s string) (level slog.Level, err error) {
	if strings.ContainsAny(s, "+-") || level.UnmarshalText([]byte(s)) != nil {
		err = errInvalid // slog would take INFO+4
	}
	return level, err
}

// isListenAddr takes an empty host (every address) and port 0 (a free one).
func isListenAddr(s string) bool {
	_, port, err := net.SplitHostPort(s)
	_, portErr := strconv.ParseUint(port, 10, 16)
	return err == nil && portErr == nil
}

func isDialAddr(s string) bool {
	host, port, _ := net.SplitHostPort(s)
	return isListenAddr(s) && host != "" && !strings.ContainsAny(host, "/@ ") && strings.Trim(port, "0") != ""
}

// isIssuer takes https only, or the keys could be changed on their way.
func isIssuer(s string) bool {
	u, err := url.Parse(s)
	return err == nil && u.Scheme == "https" && u.Host != "" && u.User == nil && u.RawQuery == "" && u.Fragment == ""
}

func isConcurrency(n int) bool       { return 1 <= n && n <= 256 }
func isRestartsPerMinute(n int) bool { return 0 <= n && n <= 6000 }
func isCatchUp(d time.Duration) bool { return d == 0 || time.Minute <= d && d <= 24*time.Hour }

func isSelector(s string) bool {
	_, err := labels.Parse(s)
	return err == nil
}

func (c *commonConfig) readRoots(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	roots := x509.NewCertPool()
	switch {
	case err != nil:
	case !roots.AppendCertsFromPEM(pem):
		err = errors.New("expected a file with a PEM certificate")
	case !c.Valkey.TLS:
		err = errors.New("VALKEY_TLS_ENABLED (--valkey-tls-enabled) is not true")
	}
	return roots, err
}
