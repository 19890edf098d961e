package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
)

// channel is the default of VALKEY_CHANNEL. The ledger is the sorted set in
// which web keeps the newest request for each image.
const (
	channel   = "kuberollouttrigger"
	ledgerKey = channel + ":requested"
)

// valkeyServer is one valkey-server with a directory and a port of its own, so
// that it can be killed and come back with what it had on disk.
type valkeyServer struct {
	addr   string
	args   []string
	env    []string // beyond PATH
	proc   *process
	client valkey.Client // the test's own, for looking in
	clock  *os.File      // holds what shift was given; nil without newShiftedValkey
}

func startValkey(t testing.TB, extra ...string) *valkeyServer {
	t.Helper()
	v := newValkey(t, extra...)
	v.start(t)
	return v
}

// newValkey is a Valkey that is not running yet.
func newValkey(t testing.TB, extra ...string) *valkeyServer {
	t.Helper()
	port := mustPort(t)
	return &valkeyServer{
		addr: fmt.Sprintf("127.0.0.1:%d", port),
		args: append([]string{"--bind", "127.0.0.1", "--port", fmt.Sprint(port), "--dir", t.TempDir(),
			// As k8s/ has it: what was answered with 202 must survive a kill.
			"--appendonly", "yes", "--appendfsync", "always", "--save", ""}, extra...),
	}
}

// start starts it, again after a kill, and waits until it answers.
func (v *valkeyServer) start(t testing.TB) {
	t.Helper()
	var err error
	if v.proc, err = startProcess("valkey", append(v.env, "PATH="+os.Getenv("PATH")), "valkey-server", v.args...); err != nil {
		t.Fatal(err)
	}
	proc := v.proc
	t.Cleanup(proc.kill)
	eventually(t, 15*time.Second, "valkey-server answers PING", func() error {
		if proc.exited() {
			return fmt.Errorf("it exited:\n%s", proc.stdout.tail(20))
		}
		if v.client == nil {
			client, err := valkey.NewClient(valkey.ClientOption{InitAddress: []string{v.addr}, ForceSingleClient: true, DisableCache: true})
			if err != nil {
				return err
			}
			t.Cleanup(client.Close)
			v.client = client
		}
		return v.do(t, "PING").Error()
	})
}

// newShiftedValkey is a Valkey that is not running yet and whose clock shift
// moves.
func newShiftedValkey(t testing.TB) *valkeyServer {
	t.Helper()
	library, err := shiftClockLibrary()
	if err != nil {
		t.Fatal(err)
	}
	v := newValkey(t)
	if v.clock, err = os.CreateTemp(t.TempDir(), "clock"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.clock.Close() })
	v.shift(t, 0)
	v.env = []string{"LD_PRELOAD=" + library, "SHIFT_CLOCK_FILE=" + v.clock.Name()}
	return v
}

// shift sets how far Valkey's clock is ahead of this machine's, at once if it is
// running.
func (v *valkeyServer) shift(t testing.TB, ahead time.Duration) {
	t.Helper()
	if _, err := v.clock.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(ahead.Microseconds())), 0); err != nil {
		t.Fatal(err)
	}
}

// shiftClockLibrary builds the library that is preloaded into valkey-server.
var shiftClockLibrary = sync.OnceValues(func() (string, error) {
	library := filepath.Join(tempRoot, "shiftclock.so")
	out, err := exec.Command("cc", "-O2", "-shared", "-fPIC", "-o", library, "testdata/shiftclock.c").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the library that shifts Valkey's clock (it needs a C compiler, Debian: gcc libc6-dev): %w\n%s", err, out)
	}
	return library, nil
})

func (v *valkeyServer) kill() { v.proc.kill() }

// do runs one command as the default user.
func (v *valkeyServer) do(t testing.TB, command ...string) valkey.ValkeyResult {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 5*time.Second)
	defer cancel()
	return v.client.Do(ctx, v.client.B().Arbitrary(command...).Build())
}

// must is do for a command that cannot fail.
func (v *valkeyServer) must(t testing.TB, command ...string) valkey.ValkeyResult {
	t.Helper()
	result := v.do(t, command...)
	if err := result.Error(); err != nil && !valkey.IsValkeyNil(err) {
		t.Fatalf("valkey: %s: %v", strings.Join(command, " "), err)
	}
	return result
}

// requestedAt is an image's T in the ledger, in µs; 0 if there is none.
func (v *valkeyServer) requestedAt(t testing.TB, image string) int64 {
	t.Helper()
	result := v.must(t, "ZSCORE", ledgerKey, image)
	if valkey.IsValkeyNil(result.Error()) {
		return 0
	}
	score, err := result.AsFloat64()
	if err != nil {
		t.Fatalf("valkey: ZSCORE %s %s: %v", ledgerKey, image, err)
	}
	return int64(score) // µs until 2255 are exact in a double
}

// now is the clock of Valkey, in µs.
func (v *valkeyServer) now(t testing.TB) int64 {
	t.Helper()
	parts, err := v.must(t, "TIME").AsStrSlice()
	if err != nil || len(parts) != 2 {
		t.Fatalf("valkey: TIME: %v, %v", parts, err)
	}
	var sec, usec int64
	if _, err := fmt.Sscan(parts[0]+" "+parts[1], &sec, &usec); err != nil {
		t.Fatal(err)
	}
	return sec*1e6 + usec
}
