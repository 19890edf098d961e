package e2e

import (
	"bufio"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// BenchmarkWebCPU reports web's CPU time for an accepted request, with a connection
// each from 16 clients at a time. Verifying the RSA signature is the part of it that
// no code can save, so rsa-µs is the yardstick on a machine of another speed.
//
//	go test -run '^$' -bench WebCPU -benchtime 5x
func BenchmarkWebCPU(b *testing.B) {
	const clients, requests = 16, 4000
	container := manifestContainer(b, "../k8s/30-web.yaml", "web")
	web := startWeb(b, startValkey(b).addr, "GOMEMLIMIT="+goMemLimit(b, container))
	jobs := newClient(web.url)
	user, system := cpuTime(b, web)
	for b.Loop() {
		token, body := github.mint(time.Now(), nil), imageBody(newImage())
		var sent atomic.Int64
		var running sync.WaitGroup
		for range clients {
			running.Go(func() {
				for sent.Add(1) <= requests && !b.Failed() {
					if a, err := jobs.post(b.Context(), token, body); err != nil || a.status != http.StatusAccepted {
						b.Errorf("%d %s %v", a.status, a.body, err)
					}
				}
			})
		}
		running.Wait()
	}
	userNow, systemNow := cpuTime(b, web)
	perRequest := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(b.N*requests) }
	b.ReportMetric(perRequest(userNow-user), "user-µs/request")
	b.ReportMetric(perRequest(systemNow-system), "sys-µs/request")
	b.ReportMetric(verifyTime(b), "rsa-µs")
}

// cpuTime is the CPU time that a process has taken so far. Linux counts it in
// hundredths of a second.
func cpuTime(t testing.TB, p *program) (user, system time.Duration) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:])) // from field 3, see proc(5)
	var ticks [2]time.Duration
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &ticks[0], &ticks[1]); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return ticks[0] * 10 * time.Millisecond, ticks[1] * 10 * time.Millisecond
}

// verifyTime is the CPU time in µs that one RSA signature takes.
func verifyTime(t testing.TB) float64 {
	t.Helper()
	const signatures = 10_000
	_, key := github.Key()
	sum := sha256.Sum256([]byte("token"))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after syscall.Rusage
	err = errors.Join(err, syscall.Getrusage(syscall.RUSAGE_THREAD, &before))
	for range signatures {
		err = errors.Join(err, rsa.VerifyPKCS1v15(&key.PublicKey, crypto.SHA256, sum[:], signature))
	}
	if err = errors.Join(err, syscall.Getrusage(syscall.RUSAGE_THREAD, &after)); err != nil {
		t.Fatal(err)
	}
	return float64(after.Utime.Nano()-before.Utime.Nano()) / signatures / 1000
}

// BenchmarkWebMemory justifies the memory of web in k8s/: the peak of its resident
// set under each of the worst that callers can do. As many as it accepts send headers
// of all shapes without the last byte, complete requests, or, with valid tokens, the
// greatest bodies without the last byte, and reconnect when they are cut off. It
// fails if a peak exceeds the limit.
//
//	go test -run '^$' -bench WebMemory -benchtime 1x
func BenchmarkWebMemory(b *testing.B) {
	limit := memoryOf(b, manifestContainer(b, "../k8s/30-web.yaml", "web"), "limits")
	for _, attack := range webAttacks() {
		b.Run(attack.name, func(b *testing.B) {
			idle, peak := webPeak(b, attack.run)
			b.ReportMetric(float64(idle)/1024, "idle-MiB")
			b.ReportMetric(float64(peak)/1024, "peak-MiB")
			if int64(peak)<<10 > limit {
				b.Errorf("the peak is %d KiB, and k8s/ limits it to %d", peak, limit>>10)
			}
		})
	}
}

// webAttack is what one connection does.
type webAttack struct {
	name string
	run  func(net.Conn)
}

func webAttacks() (all []webAttack) {
	for _, shape := range headerShapes {
		all = append(all, webAttack{shape.name, func(conn net.Conn) {
			_, _ = io.WriteString(conn, shape.header)
			hold(conn)
		}})
	}
	expired := github.mint(time.Now().Add(-time.Hour), nil)
	all = append(all, webAttack{"whole requests", func(conn net.Conn) { repeatRequest(conn, expired) }})
	valid := github.mint(time.Now(), map[string]any{"environment": strings.Repeat("x", 4<<10)})
	body := `{"image":"` + strings.Repeat("x", 16_300)
	trailers := strings.Repeat("abc:\n", 800) // net/http takes up to 4 KiB
	for name, rest := range map[string]string{
		"jobs without the end of the body": "Content-Length: 16384\r\n\r\n" + body,
		"jobs without the last trailer":    "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + trailers,
		"jobs with trailers":               "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + trailers + "\r\n",
	} {
		all = append(all, webAttack{name, func(conn net.Conn) {
			_, _ = io.WriteString(conn, post+"Content-Type: application/json\r\nAuthorization: Bearer "+valid+"\r\n"+rest)
			hold(conn)
		}})
	}
	return all
}

// webPeak is the memory of a web before and at the peak of an attack, in KiB.
func webPeak(b *testing.B, attack func(conn net.Conn)) (idle, peak int) {
	b.Helper()
	web := startLimitedWeb(b, startValkey(b).addr)
	idle = memoryKiB(b, web, "VmHWM")
	swarm(hostOf(web.url), maxConnections, time.Now().Add(6*time.Second), 10*time.Millisecond, func(conn net.Conn, _ int) { attack(conn) })
	web.waitReady(b, 5*time.Second)
	peak = memoryKiB(b, web, "VmHWM")
	web.kill()
	return idle, peak
}

// repeatRequest sends requests for as long as web takes them.
func repeatRequest(conn net.Conn, token string) {
	answers := bufio.NewReader(conn)
	for {
		fmt.Fprintf(conn, "POST /event HTTP/1.1\r\nHost: web\r\nAuthorization: Bearer %s\r\nX: %s\r\nContent-Length: 2\r\n\r\n{}", token, strings.Repeat("x", 7_000))
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			return
		}
		resp.Body.Close()
	}
}
