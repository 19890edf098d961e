package e2e

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMissingConfig: one message names all that is missing, with exit code 2.
func TestMissingConfig(t *testing.T) {
	for mode, names := range map[string][]string{
		"web":    {"VALKEY_ADDR", "--valkey-addr", "ALLOWED_IMAGE_PREFIX", "--allowed-image-prefix", "GITHUB_OIDC_AUDIENCE", "GITHUB_ALLOWED_ORG"},
		"worker": {"VALKEY_ADDR", "--valkey-addr", "ALLOWED_IMAGE_PREFIX", "--allowed-image-prefix"},
	} {
		t.Run(mode, func(t *testing.T) {
			p := launch(t, programPath, mode)
			if code := p.exitCode(t, 10*time.Second); code != 2 {
				t.Errorf("exit code %d, want 2", code)
			}
			for _, name := range names {
				if !strings.Contains(p.stderr.String(), name) {
					t.Errorf("the message does not name %s:\n%s", name, p.stderr.String())
				}
			}
		})
	}
}

// TestSIGTERM: both processes end soon and with success.
func TestSIGTERM(t *testing.T) {
	p := startPair(t)
	for _, one := range []*program{p.web, p.worker} {
		one.signal(syscall.SIGTERM)
		if code := one.exitCode(t, 15*time.Second); code != 0 {
			t.Errorf("%s: exit code %d after SIGTERM, want 0", one.name, code)
		}
	}
}

// TestSecondSignal: the first signal drains, the second ends the process at once.
func TestSecondSignal(t *testing.T) {
	web := startWeb(t, startValkey(t).addr)
	conn, err := net.Dial("tcp", strings.TrimPrefix(web.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "POST /event HTTP/1.1\r\n") // holds up the drain for seconds
	web.signal(syscall.SIGTERM)
	web.waitNotReady(t, 5*time.Second)
	if web.exited() {
		t.Fatal("one signal ended it at once")
	}
	// Repeated, because the first may come before the process has let go of signals.
	eventually(t, time.Second, "a further signal ends it at once", func() error {
		web.signal(syscall.SIGTERM)
		if !web.exited() {
			return errors.New("it drains")
		}
		return nil
	})
	if code := web.exitCode(t, time.Second); code != -1 {
		t.Errorf("exit code %d, want the end by a signal", code)
	}
}
