package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// BenchmarkWebMemory justifies the memory of web in k8s/: the peak of its resident
// set under each of the worst that callers can do. As many as it accepts send headers
// of all shapes without the last byte, complete requests, or, with valid tokens, the
// greatest bodies without the last byte, and reconnect when they are cut off. It
// fails if a peak exceeds the limit.
//
//	go test -run '^$' -bench WebMemory -benchtime 1x
func BenchmarkWebMemory(b *testing.B) {
	for _, shape := range headerShapes {
		benchmarkWebMemory(b, shape.name, func(conn net.Conn) {
			_, _ = io.WriteString(conn, shape.header)
			hold(conn)
		})
	}
	expired := github.mint(time.Now().Add(-time.Hour), nil)
	benchmarkWebMemory(b, "whole requests", func(conn net.Conn) { repeatRequest(conn, expired) })
	valid := github.mint(time.Now(), map[string]any{"environment": strings.Repeat("x", 4<<10)})
	body := `{"image":"` + strings.Repeat("x", 16_300)
	trailers := strings.Repeat("abc:\n", 800) // net/http takes up to 4 KiB
	for name, rest := range map[string]string{
		"jobs without the end of the body": "Content-Length: 16384\r\n\r\n" + body,
		"jobs without the last trailer":    "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + trailers,
		"jobs with trailers":               "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + trailers + "\r\n",
	} {
		benchmarkWebMemory(b, name, func(conn net.Conn) {
			_, _ = io.WriteString(conn, post+"Content-Type: application/json\r\nAuthorization: Bearer "+valid+"\r\n"+rest)
			hold(conn)
		})
	}
}

func benchmarkWebMemory(b *testing.B, name string, attack func(conn net.Conn)) {
	b.Run(name, func(b *testing.B) {
		web := startLimitedWeb(b, startValkey(b).addr)
		idle := memoryKiB(b, web, "VmHWM")
		for b.Loop() {
			swarm(hostOf(web.url), maxConnections, time.Now().Add(6*time.Second), 10*time.Millisecond, func(conn net.Conn, _ int) { attack(conn) })
		}
		web.waitReady(b, 5*time.Second)
		peak := memoryKiB(b, web, "VmHWM")
		b.ReportMetric(float64(idle)/1024, "idle-MiB")
		b.ReportMetric(float64(peak)/1024, "peak-MiB")
		if limit := memoryOf(b, manifestContainer(b, "../k8s/30-web.yaml", "web"), "limits"); int64(peak)<<10 > limit {
			b.Errorf("the peak is %d KiB, and k8s/ limits it to %d", peak, limit>>10)
		}
	})
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
