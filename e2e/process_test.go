package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a child process whose output is kept.
type process struct {
	name   string
	cmd    *exec.Cmd
	stdout output
	stderr output
	done   chan struct{} // closed once it has ended
}

// output is what a process wrote so far.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// tail is the end of the output.
func (o *output) tail(lines int) string {
	all := strings.Split(strings.TrimRight(o.String(), "\n"), "\n")
	if cut := len(all) - lines; cut > 0 {
		all = append([]string{fmt.Sprintf("(%d lines before)", cut)}, all[cut:]...)
	}
	return strings.Join(all, "\n")
}

var (
	runningMu sync.Mutex
	running   = map[*process]bool{}
	closing   bool
	spawner   = sync.OnceValue(func() chan func() {
		// Pdeathsig is sent when the *thread* that started the child ends, so
		// all children are started by one thread that lives as long as we do.
		work := make(chan func())
		go func() {
			runtime.LockOSThread()
			for f := range work {
				f()
			}
		}()
		return work
	})
)

// startProcess starts path with exactly the environment given, so that nothing of
// this machine's environment matters.
func startProcess(name string, env []string, path string, args ...string) (*process, error) {
	p := &process{name: name, cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Env = env
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

	runningMu.Lock()
	defer runningMu.Unlock()
	if closing {
		return nil, fmt.Errorf("starting %s: the run is being stopped", name)
	}
	started := make(chan error)
	spawner() <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	running[p] = true
	go func() {
		_ = p.cmd.Wait()
		runningMu.Lock()
		delete(running, p)
		runningMu.Unlock()
		close(p.done)
	}()
	return p, nil
}

// killAll ends every process that this run has started, and lets no new one start.
func killAll() {
	runningMu.Lock()
	closing = true
	var all []*process
	for p := range running {
		all = append(all, p)
	}
	runningMu.Unlock()
	for _, p := range all {
		p.kill()
	}
}

// kill is kill -9, and waits for the end.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *process) signal(sig os.Signal) { _ = p.cmd.Process.Signal(sig) }

// exitCode waits for the process to end by itself.
func (p *process) exitCode(t testing.TB, within time.Duration) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(within):
		t.Fatalf("%s (pid %d) has not exited within %s; its last lines:\n%s", p.name, p.cmd.Process.Pid, within, p.stderr.tail(20))
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// ownedBy ends the process with the test, shows its output if the test failed, and
// fails the test if the process crashed or raced.
func (p *process) ownedBy(t testing.TB) {
	t.Cleanup(func() {
		p.kill()
		for _, sign := range []string{"WARNING: DATA RACE", "\npanic: ", "\nfatal error: "} {
			if out := "\n" + p.stderr.String(); strings.Contains(out, sign) {
				t.Errorf("%s crashed or raced: %s", p.name, out[strings.Index(out, sign):min(len(out), strings.Index(out, sign)+6000)])
			}
		}
		if t.Failed() {
			t.Logf("---- %s (pid %d, %s), end of its log:\n%s%s", p.name, p.cmd.Process.Pid, p.cmd.ProcessState, p.stdout.String(), p.stderr.tail(60))
		}
	})
}

// logLine is one line of the program's JSON log.
type logLine map[string]any

func (l logLine) str(key string) string { s, _ := l[key].(string); return s }

// is reports whether every key has the value given, "k", "v", "k", "v".
func (l logLine) is(pairs ...string) bool {
	for i := 0; i+1 < len(pairs); i += 2 {
		if l.str(pairs[i]) != pairs[i+1] {
			return false
		}
	}
	return true
}

// logs are the JSON lines on the process's standard error. A line that is not JSON
// is an error. Tests of a process that cannot start read stderr itself.
func (p *process) logs(t testing.TB) []logLine {
	t.Helper()
	var lines []logLine
	for _, raw := range strings.Split(p.stderr.String(), "\n") {
		var line logLine
		if err := json.Unmarshal([]byte(raw), &line); err == nil {
			lines = append(lines, line)
		} else if raw != "" && strings.HasPrefix(raw, "{") {
			continue // the rest of this line is still being written
		} else if raw != "" {
			t.Errorf("%s: a log line that is not JSON: %s", p.name, raw)
		}
	}
	return lines
}

// logged are the log lines that match pairs.
func (p *process) logged(t testing.TB, pairs ...string) []logLine {
	t.Helper()
	var found []logLine
	for _, line := range p.logs(t) {
		if line.is(pairs...) {
			found = append(found, line)
		}
	}
	return found
}

// waitLogged waits for a log line that matches pairs.
func (p *process) waitLogged(t testing.TB, within time.Duration, pairs ...string) logLine {
	t.Helper()
	var line logLine
	eventually(t, within, fmt.Sprintf("%s logs %q", p.name, pairs), func() error {
		found := p.logged(t, pairs...)
		if len(found) == 0 {
			return fmt.Errorf("not among its lines:\n%s", p.stderr.tail(20))
		}
		line = found[0]
		return nil
	})
	return line
}

// eventually polls check until it returns nil.
func eventually(t testing.TB, within time.Duration, what string, check func() error) {
	t.Helper()
	if err := poll(within, check); err != nil {
		t.Fatalf("waited %s for: %s\nat last: %v", within, what, err)
	}
}

// poll is eventually without a test: the error is check's last one.
func poll(within time.Duration, check func() error) error {
	for deadline := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

var (
	portMu sync.Mutex
	// Below the range from which the kernel takes the ports of outgoing
	// connections: servers here are killed and come back on the same port, and
	// in between a client's socket must not have taken it. The start depends on
	// the pid so that two runs side by side seldom meet.
	nextPort = 10000 + os.Getpid()*97%15000
)

// freePort is a TCP port on loopback that nobody listens on and that this run
// has not handed out before.
func freePort() (int, error) {
	portMu.Lock()
	defer portMu.Unlock()
	for range 5000 {
		nextPort++
		if nextPort >= 32000 {
			nextPort = 10000
		}
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", nextPort))
		if err == nil {
			l.Close()
			return nextPort, nil
		}
	}
	return 0, errors.New("no free port between 10000 and 32000")
}

func mustPort(t testing.TB) int {
	t.Helper()
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	return port
}
