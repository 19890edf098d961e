package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// BenchmarkWebMemory justifies the memory of web in k8s/: the peak of its resident
// set under the worst that unauthenticated callers can do. As many as it accepts
// send headers of the greatest length without the last byte, or complete requests,
// and reconnect when they are cut off. It fails if the peak exceeds the limit.
//
//	go test -run '^$' -bench WebMemory -benchtime 1x
func BenchmarkWebMemory(b *testing.B) {
	const connections = 1024
	container := manifestContainer(b, "../k8s/30-web.yaml", "web")
	web := startWeb(b, startValkey(b).addr, fmt.Sprintf("GOMEMLIMIT=%d", memoryOf(b, container, "requests")))
	idle := memoryKiB(b, web, "VmHWM")
	address := strings.TrimPrefix(web.url, "http://")
	token := github.mint(time.Now().Add(-time.Hour), nil) // expired, but signed
	for b.Loop() {
		until := time.Now().Add(15 * time.Second)
		var clients sync.WaitGroup
		for i := range connections {
			clients.Go(func() {
				for time.Now().Before(until) {
					if conn, err := net.Dial("tcp", address); err == nil {
						_ = conn.SetDeadline(until)
						if i%2 == 0 {
							stallHeader(conn)
						} else {
							repeatRequest(conn, token)
						}
						conn.Close()
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		clients.Wait()
	}
	if status, body, err := web.probe("/readyz"); err != nil || status != http.StatusOK {
		b.Errorf("/readyz: %d %s %v", status, body, err)
	}
	peak := memoryKiB(b, web, "VmHWM")
	b.ReportMetric(float64(idle)/1024, "idle-MiB")
	b.ReportMetric(float64(peak)/1024, "peak-MiB")
	if limit := memoryOf(b, container, "limits"); int64(peak)<<10 > limit {
		b.Errorf("the peak is %d KiB, and k8s/ limits it to %d", peak, limit>>10)
	}
}

// stallHeader sends nearly all of the longest header that web takes, and waits.
func stallHeader(conn net.Conn) {
	fmt.Fprint(conn, "POST /event HTTP/1.1\r\nHost: web\r\n")
	for i := range 18 {
		fmt.Fprintf(conn, "X-%d: %s\r\n", i, strings.Repeat("x", 1000))
	}
	_, _ = conn.Read(make([]byte, 1))
}

// repeatRequest sends requests for as long as web takes them.
func repeatRequest(conn net.Conn, token string) {
	answers := bufio.NewReader(conn)
	for {
		fmt.Fprintf(conn, "POST /event HTTP/1.1\r\nHost: web\r\nAuthorization: Bearer %s\r\nX: %s\r\nContent-Length: 2\r\n\r\n{}", token, strings.Repeat("x", 12_000))
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			return
		}
		resp.Body.Close()
	}
}
