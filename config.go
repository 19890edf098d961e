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

// mode is a set of the subcommands that take an option.
type mode uint8

const (
	webMode mode = 1 << iota
	workerMode
	explainMode
	bothModes = webMode | workerMode
)

func (m mode) String() string {
	switch m {
	case webMode:
		return "web"
	case workerMode:
		return "worker"
	case explainMode:
		return "explain"
	case webMode | explainMode:
		return "web, explain"
	case bothModes | explainMode:
		return "both, explain"
	default:
		return "both"
	}
}

// config is everything that the environment and the flags say.
type config struct {
	LogLevel      slog.Level
	OpsListenAddr string // host:port of the probes
	Valkey        valkeyConfig
	ImagePrefixes imagePrefixes // the only images that may be restarted

	Web    webConfig
	Worker workerConfig
}

// valkeyConfig says how to reach Valkey and under which names the two
// processes meet there.
type valkeyConfig struct {
	Addr               string // host:port
	Username, Password string // empty: no AUTH
	TLS                bool
	TLSRoots           *x509.CertPool // nil: the system's
	Channel            string         // PubSub channel, and prefix of the keys
}

// webConfig is what only web reads.
type webConfig struct {
	ListenAddr  string // host:port of the public API
	Audience    string // the one value of aud that is accepted
	Issuer      string // exact URL of the OIDC issuer
	Orgs        []string
	OrgIDs      []string // empty: not pinned
	TrustPolicy []rule   // empty: the default policy
}

// workerConfig is what only worker reads.
type workerConfig struct {
	Kubeconfig  string        // path; empty: in-cluster
	Namespaces  []string      // empty: all
	Selector    string        // label selector; empty: all
	CatchUp     time.Duration // how far back recorded requests count; 0: PubSub only
	Concurrency int           // patches in flight
	ClusterName string        // tells clusters apart in logs
}

// option is one setting: an environment variable and the flag of the same
// name. The table below is the only source of parsing, of -h and of the tests
// that hold the documentation to it.
type option struct {
	env      string
	modes    mode
	required mode // those of modes that cannot do without it
	def      string
	unset    string // what it means that there is no value; "" if there is nothing to say
	secret   bool   // its value is never printed, errors included
	long     bool   // its value has lines, and errors name the line
	boolean  bool   // the flag may stand without a value
	usage    string
	set      func(c *config, value string) error
}

// flagName is the variable's name in lower case with dashes.
func (o *option) flagName() string {
	return strings.ReplaceAll(strings.ToLower(o.env), "_", "-")
}

var options = []option{
	{env: "LOG_LEVEL", modes: bothModes, def: "info", usage: "debug, info, warn or error",
		set: func(c *config, v string) error { return setLogLevel(&c.LogLevel, v) }},
	{env: "OPS_LISTEN_ADDR", modes: bothModes, def: ":8081", usage: "host:port of /healthz and /readyz",
		set: func(c *config, v string) error { return setListenAddr(&c.OpsListenAddr, v) }},
	{env: "VALKEY_ADDR", modes: bothModes, required: bothModes, usage: "host:port of Valkey",
		set: func(c *config, v string) error { return setDialAddr(&c.Valkey.Addr, v) }},
	{env: "VALKEY_USERNAME", modes: bothModes, usage: "user name for Valkey's AUTH",
		set: func(c *config, v string) error { c.Valkey.Username = v; return nil }},
	{env: "VALKEY_PASSWORD", modes: bothModes, secret: true, usage: "password for Valkey's AUTH",
		set: func(c *config, v string) error { c.Valkey.Password = v; return nil }},
	{env: "VALKEY_TLS_ENABLED", modes: bothModes, def: "false", boolean: true, usage: "speak TLS to Valkey",
		set: func(c *config, v string) error { return setBool(&c.Valkey.TLS, v) }},
	{env: "VALKEY_TLS_CA_FILE", modes: bothModes, unset: "system roots", usage: "PEM file with the CA of Valkey's certificate",
		set: func(c *config, v string) error { return setRoots(&c.Valkey.TLSRoots, v) }},
	{env: "VALKEY_CHANNEL", modes: bothModes, def: "kuberollouttrigger", usage: "PubSub channel; keys begin with it and a colon",
		set: func(c *config, v string) error {
			return setMatch(&c.Valkey.Channel, v, channelRE, "1 to 128 letters, digits, dots, dashes, underscores or colons")
		}},
	{env: "ALLOWED_IMAGE_PREFIX", modes: bothModes | explainMode, required: bothModes | explainMode, usage: "comma-separated image prefixes that may be restarted, such as ghcr.io/acme",
		set: func(c *config, v string) (err error) { c.ImagePrefixes, err = parseImagePrefixes(v); return err }},
	{env: "WEB_LISTEN_ADDR", modes: webMode, def: ":8080", usage: "host:port of the public API",
		set: func(c *config, v string) error { return setListenAddr(&c.Web.ListenAddr, v) }},
	{env: "GITHUB_OIDC_AUDIENCE", modes: webMode | explainMode, required: webMode, usage: "audience that a token must be made for, such as https://rollout.example.com",
		set: func(c *config, v string) error { c.Web.Audience = v; return nil }},
	{env: "GITHUB_OIDC_ISSUER", modes: webMode | explainMode, def: "https://token.actions.githubusercontent.com", usage: "issuer of the tokens",
		set: func(c *config, v string) error { return setIssuer(&c.Web.Issuer, v) }},
	{env: "GITHUB_ALLOWED_ORG", modes: webMode | explainMode, required: webMode | explainMode, usage: "comma-separated owners whose repositories may ask",
		set: func(c *config, v string) error {
			return setList(&c.Web.Orgs, v, ownerRE, "owner names separated by commas")
		}},
	{env: "GITHUB_ALLOWED_ORG_ID", modes: webMode | explainMode, usage: "comma-separated numeric ids that repository_owner_id must be one of",
		set: func(c *config, v string) error {
			return setList(&c.Web.OrgIDs, v, digitsRE, "numbers separated by commas")
		}},
	{env: "TRUST_POLICY", modes: webMode | explainMode, long: true, usage: "YAML rules that say which jobs may restart which images",
		set: func(c *config, v string) (err error) { c.Web.TrustPolicy, err = parseRules(v); return err }},
	{env: "KUBECONFIG", modes: workerMode, unset: "in-cluster", usage: "path of a kubeconfig",
		set: func(c *config, v string) error { c.Worker.Kubeconfig = v; return nil }},
	{env: "WORKER_NAMESPACES", modes: workerMode, unset: "all", usage: "comma-separated namespaces to watch",
		set: func(c *config, v string) error {
			return setList(&c.Worker.Namespaces, v, namespaceRE, "namespaces separated by commas")
		}},
	{env: "WORKER_SELECTOR", modes: workerMode, unset: "all", usage: "label selector of the Deployments to watch",
		set: func(c *config, v string) error { return setSelector(&c.Worker.Selector, v) }},
	{env: "WORKER_CATCH_UP", modes: workerMode, def: "1h", usage: "how far back missed requests are made up for; 0 for PubSub only, at most 24h",
		set: func(c *config, v string) error { return setCatchUp(&c.Worker.CatchUp, v) }},
	{env: "WORKER_CONCURRENCY", modes: workerMode, def: "16", usage: "patches in flight at once, 1 to 256",
		set: func(c *config, v string) error { return setInt(&c.Worker.Concurrency, v, 1, 256) }},
	{env: "CLUSTER_NAME", modes: workerMode, def: "default", usage: "name of the cluster in logs",
		set: func(c *config, v string) error {
			return setMatch(&c.Worker.ClusterName, v, clusterRE, "1 to 63 letters, digits, dots, dashes or underscores")
		}},
}

// usageError is a mistake in the command line or the environment; the process
// exits with 2.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// parseConfig reads the options of m: a flag overrides the environment, and an
// empty variable counts as not set. The error, a usageError, names everything
// that is missing or wrong at once. flag.ErrHelp means that -h was given.
func parseConfig(m mode, args []string, getenv func(string) string) (*config, error) {
	return parseFlags(flag.NewFlagSet(m.String(), flag.ContinueOnError), m, args, getenv)
}

// parseFlags is parseConfig for a subcommand whose other flags are in fs.
func parseFlags(fs *flag.FlagSet, m mode, args []string, getenv func(string) string) (*config, error) {
	fs.SetOutput(io.Discard) // the caller prints errors and help
	given := map[string]string{}
	for _, o := range options {
		if o.modes&m == 0 {
			continue
		}
		fs.Var(flagValue{given, o.env, o.boolean}, o.flagName(), o.usage)
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, usageError{fmt.Errorf("%w; see kuberollouttrigger %s -h", err, m)}
	}
	if fs.NArg() > 0 {
		// Not repeated: it may be a password, after a blank too many.
		return nil, usageError{fmt.Errorf("an argument that is no flag; write --name=value, and see kuberollouttrigger %s -h", m)}
	}

	c := &config{}
	var missing []string
	var wrong []error
	for _, o := range options {
		if o.modes&m == 0 {
			continue
		}
		value, ok := given[o.env]
		if !ok {
			value = getenv(o.env)
		}
		if value == "" {
			value = o.def
		}
		switch {
		case value == "" && o.required&m != 0:
			missing = append(missing, fmt.Sprintf("%s (--%s)", o.env, o.flagName()))
		case value == "":
		default:
			if err := o.set(c, value); err != nil {
				shown := strconv.Quote(value) + ": "
				if o.secret || o.long {
					shown = ""
				}
				wrong = append(wrong, fmt.Errorf("%s (--%s): %s%w", o.env, o.flagName(), shown, err))
			}
		}
	}
	if len(missing) > 0 {
		wrong = slices.Insert(wrong, 0, fmt.Errorf("missing required configuration: %s", strings.Join(missing, ", ")))
	}
	if c.Valkey.TLSRoots != nil && !c.Valkey.TLS {
		wrong = append(wrong, errors.New("VALKEY_TLS_CA_FILE (--valkey-tls-ca-file) is set, but VALKEY_TLS_ENABLED (--valkey-tls-enabled) is not true"))
	}
	if len(wrong) > 0 {
		return nil, usageError{errors.Join(wrong...)}
	}
	return c, nil
}

// flagValue collects a flag's value under its variable's name.
type flagValue struct {
	given   map[string]string
	env     string
	boolean bool
}

func (f flagValue) String() string     { return "" }
func (f flagValue) Set(v string) error { f.given[f.env] = v; return nil }
func (f flagValue) IsBoolFlag() bool   { return f.boolean }

// printOptions writes what -h says about the options of m. It prints defaults,
// never what the environment holds.
func printOptions(w io.Writer, m mode) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "flag\tvariable\tdefault\tmeaning")
	for _, o := range options {
		if o.modes&m == 0 {
			continue
		}
		def := cmp.Or(o.def, o.unset, "none")
		if o.required&m != 0 {
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

func setLogLevel(p *slog.Level, v string) error {
	switch strings.ToLower(v) {
	case "debug", "info", "warn", "error":
		return p.UnmarshalText([]byte(v))
	}
	return errors.New("expected debug, info, warn or error")
}

func setBool(p *bool, v string) error {
	switch v {
	case "true", "1":
		*p = true
	case "false", "0":
		*p = false
	default:
		return errors.New("expected true or false")
	}
	return nil
}

func setInt(p *int, v string, low, high int) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < low || n > high {
		return fmt.Errorf("expected a whole number from %d to %d", low, high)
	}
	*p = n
	return nil
}

func setMatch(p *string, v string, re *regexp.Regexp, expected string) error {
	if !re.MatchString(v) {
		return errors.New("expected " + expected)
	}
	*p = v
	return nil
}

func setList(p *[]string, v string, re *regexp.Regexp, expected string) error {
	for item := range strings.SplitSeq(v, ",") {
		item = strings.TrimSpace(item)
		if !re.MatchString(item) {
			return errors.New("expected " + expected)
		}
		if !slices.Contains(*p, item) {
			*p = append(*p, item)
		}
	}
	return nil
}

// setListenAddr takes an empty host (every address) and port 0 (a free one).
func setListenAddr(p *string, v string) error {
	_, port, err := net.SplitHostPort(v)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return errors.New("expected host:port, such as :8080")
	}
	*p = v
	return nil
}

func setDialAddr(p *string, v string) error {
	host, port, err := net.SplitHostPort(v)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || n == 0 || host == "" || strings.ContainsAny(host, "/@ ") {
		return errors.New("expected host:port, such as valkey:6379")
	}
	*p = v
	return nil
}

func setRoots(p **x509.CertPool, file string) error {
	pem, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("expected a file that can be read: %w", err)
	}
	*p = x509.NewCertPool()
	if !(*p).AppendCertsFromPEM(pem) {
		return errors.New("expected a file with a PEM certificate")
	}
	return nil
}

// setIssuer takes https only: whoever can change the issuer's keys on the way
// can mint tokens. The value is kept as it is, because the discovery document
// must repeat it exactly (OpenID Connect Discovery 1.0, section 4.3).
func setIssuer(p *string, v string) error {
	u, err := url.Parse(v)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("expected an https URL without query, such as https://token.actions.githubusercontent.com")
	}
	*p = v
	return nil
}

func setSelector(p *string, v string) error {
	if _, err := labels.Parse(v); err != nil {
		return fmt.Errorf("expected a label selector, such as team=payments: %w", err)
	}
	*p = v
	return nil
}

func setCatchUp(p *time.Duration, v string) error {
	d, err := time.ParseDuration(v)
	if err != nil || d != 0 && (d < time.Minute || d > 24*time.Hour) {
		return errors.New("expected 0 or a duration from 1m to 24h, such as 1h")
	}
	*p = d
	return nil
}
