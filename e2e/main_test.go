// Package e2e drives the production binary, web and worker as processes of
// their own, against a real etcd, kube-apiserver and valkey-server on loopback.
//
//	cd e2e && go test            # prints one summary line per delivery test
//	E2E_RACE=1 go test           # the same with race-detecting binaries
//
// The control plane is built from the Go module proxy into E2E_CACHE (default:
// kuberollouttrigger-e2e in the user's cache directory), about ten minutes the
// first time. valkey-server and a C compiler must be installed. Once the
// binaries are built and the modules of the Gateway API and the Prometheus Operator
// are there, all traffic stays on loopback.
//
// Every test has namespaces, a Valkey, a web and workers of its own. All share one
// API server, so no two tests may use the same image name (see newImage).
package e2e

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// What the whole run shares. Set by TestMain, read-only afterwards.
var (
	tempRoot      string // removed at the end; all servers keep their data in it
	programPath   string // the production binary
	skewedPath    func() (string, error)
	testCA        *authority
	github        *issuer
	sharedAPI     *apiServer
	sharedEtcd    *etcdServer
	raceDetecting = os.Getenv("E2E_RACE") == "1"
)

func TestMain(m *testing.M) {
	flag.Parse()
	parallelByDefault("4")

	// os.Exit runs no defers, so everything that must be undone is in run.
	os.Exit(run(m))
}

// parallelByDefault lets tests that mostly wait run side by side: go test's own
// default is the number of CPUs, which is two on the machines this must fit.
func parallelByDefault(n string) {
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == "test.parallel" })
	if !set {
		_ = flag.Set("test.parallel", n)
	}
}

func run(m *testing.M) (code int) {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}

	removeStaleTempDirs()
	var err error
	if tempRoot, err = os.MkdirTemp("", fmt.Sprintf("kuberollouttrigger-e2e-%d-", os.Getpid())); err != nil {
		return fail(err)
	}
	var once sync.Once
	cleanUp := func() {
		once.Do(func() {
			killAll()
			os.RemoveAll(tempRoot)
		})
	}
	// Deferred, so that a panic in here cleans up too. A panic in a test and the
	// -timeout end this process at once: then Pdeathsig ends the children, and the
	// next run removes the directory.
	defer cleanUp()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		sig := <-interrupted
		cleanUp()
		fmt.Fprintln(os.Stderr, "e2e: stopped by", sig)
		os.Exit(1)
	}()

	if _, err := exec.LookPath("valkey-server"); err != nil {
		return fail(errors.New("valkey-server is not on PATH; install it (Debian: apt-get install -t bookworm-backports valkey-server) and run again"))
	}
	if programPath, err = buildProgram("kuberollouttrigger"); err != nil {
		return fail(err)
	}
	skewedPath = sync.OnceValues(buildSkewedProgram)
	bin, err := buildControlPlane()
	if err != nil {
		return fail(err)
	}
	if testCA, err = newAuthority(); err != nil {
		return fail(err)
	}
	if github, err = newIssuer(); err != nil {
		return fail(err)
	}
	if sharedEtcd, err = startEtcd(bin); err != nil {
		return fail(err)
	}
	if sharedAPI, err = startAPIServer(bin, sharedEtcd, withoutServiceAccounts); err != nil {
		return fail(err)
	}
	return m.Run()
}

// removeStaleTempDirs removes what runs left behind that could not clean up:
// directories named after a process that has ended.
func removeStaleTempDirs() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), "kuberollouttrigger-e2e-*-*"))
	for _, dir := range dirs {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), "kuberollouttrigger-e2e-%d-", &pid); err != nil {
			continue
		}
		if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			os.RemoveAll(dir)
		}
	}
}

// buildProgram builds the program as the Dockerfile does, or with the race
// detector. extra are further arguments to go build.
func buildProgram(name string, extra ...string) (string, error) {
	path := filepath.Join(tempRoot, name)
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", path}
	cgo := "CGO_ENABLED=0"
	if raceDetecting {
		// Unstripped, so that a race report has line numbers.
		args = []string{"build", "-trimpath", "-race", "-o", path}
		cgo = "CGO_ENABLED=1"
	}
	args = append(append(args, extra...), ".")
	cmd := exec.Command("go", args...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the program: go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return path, nil
}

// buildSkewedProgram builds the program with a clock that is one hour ahead. A
// static Go binary reads the clock without libc, so that only a line in package
// time can shift it.
func buildSkewedProgram() (string, error) {
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOROOT: %w", err)
	}
	original := filepath.Join(strings.TrimSpace(string(goroot)), "src", "time", "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		return "", err
	}
	const now = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	if strings.Count(string(source), now) != 1 {
		return "", fmt.Errorf("%s has changed: time.Now does not begin with %q", original, now)
	}
	changed := filepath.Join(tempRoot, "time.go")
	if err := os.WriteFile(changed, []byte(strings.Replace(string(source), now, now+"\tsec += 3600\n", 1)), 0o644); err != nil {
		return "", err
	}
	overlay := filepath.Join(tempRoot, "overlay.json")
	if err := os.WriteFile(overlay, fmt.Appendf(nil, `{"Replace":{%q:%q}}`, original, changed), 0o644); err != nil {
		return "", err
	}
	return buildProgram("kuberollouttrigger-ahead", "-overlay", overlay)
}
