package e2e

import (
	"context"
	"crypto/sha1"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"

	"kuberollouttrigger/internal/fake"
)

// publishScript is web's script. That it is the same is checked in webCost.
func publishScript(b *testing.B) string {
	b.Helper()
	source, err := os.ReadFile("../valkey.go")
	if err != nil {
		b.Fatal(err)
	}
	m := regexp.MustCompile("(?s)publishScript = valkey.NewLuaScript\\(fmt.Sprintf\\(`(.*?)`, ledgerAge.Microseconds\\(\\), maxLedger\\)\\)").FindSubmatch(source)
	if m == nil {
		b.Fatal("publishScript is not where it was")
	}
	return fmt.Sprintf(string(m[1]), (24 * time.Hour).Microseconds(), maxLedger)
}

// performanceImage is what all accepted requests ask for; nothing runs it.
const performanceImage = "ghcr.io/acme/performance:dev"

// startBareWeb starts a server with the settings of web that does nothing with a request
// but to read the body, to verify one signature and to run the script.
func (p *performance) startBareWeb(b *testing.B) {
	b.Helper()
	_, key := github.Key()
	p.bareWeb = p.startBare(b, "web", "VALKEY_ADDR="+p.valkey.addr, "SCRIPT="+publishScript(b), "LEDGER="+ledgerKey, "CHANNEL="+channel,
		"IMAGE="+performanceImage, "KEY="+base64.StdEncoding.EncodeToString(x509.MarshalPKCS1PublicKey(&key.PublicKey)),
		"GOGC=400", "GOMEMLIMIT="+goMemLimit(b, manifestContainer(b, "../k8s/30-web.yaml", "web")))
}

// webRequest is a kind of request, and the path of the bare server that does the least.
type webRequest struct {
	name, what, barePath string
	status               int
	bar                  float64
	token                func() string
}

var webRequests = []webRequest{
	{"accepted", "accepted request", "/event", http.StatusAccepted, 0, func() string { return github.mint(time.Now(), nil) }},
	{"garbage", "garbage token", "/denied", http.StatusUnauthorized, 1.2, func() string { return strings.Repeat("garbage.", 250) }},
	{"unknown-key", "unknown key", "/denied", http.StatusUnauthorized, 0, func() string {
		header := github.Header()
		header["kid"] = "unknown"
		_, key := github.Key()
		return fake.Sign(key, []byte(asJSON(header)), []byte(asJSON(github.Claims(time.Now(), nil))))
	}},
}

func webMeasurements() (all []measurement) {
	for _, kept := range []bool{false, true} {
		for _, request := range webRequests {
			name, what := "web/"+request.name, "a connection each"
			if kept {
				name, what = name+"-kept", "kept connections"
			}
			all = append(all, measurement{name, func(b *testing.B, p *performance) []row {
				r := p.webCost(b, request, kept)
				r.name, r.what, r.bar = name, fmt.Sprintf("web, CPU time per %s, %s", request.what, what), request.bar
				return []row{r}
			}})
		}
	}
	return all
}

// webCost compares the CPU time and the latency of a kind of request.
func (p *performance) webCost(b *testing.B, request webRequest, kept bool) row {
	var ours, bare load
	token := request.token()
	for range p.rounds(7) {
		ours.run(b, p.web, "/event", token, request.status, kept)
		bare.run(b, p.bareWeb, request.barePath, token, request.status, kept)
	}
	script := fmt.Sprintf("%x", sha1.Sum([]byte(publishScript(b))))
	if known, err := p.valkey.must(b, "SCRIPT", "EXISTS", script).AsIntSlice(); request.status == http.StatusAccepted && (err != nil || known[0] != 1) {
		b.Fatalf("web has not run the script that the bare server runs: %v", err)
	}
	r := p.compare("", "", ours.cpu, bare.cpu, 0)
	r.measured += ours.latency()
	r.limit += bare.latency()
	if kept {
		r.remark = fmt.Sprintf("web closes each connection on purpose: %s for %s requests.", thousands(ours.connections), thousands(ours.requests))
	}
	return r
}

// load is what requests cost one server.
type load struct {
	cpu, latencies        times // the CPU time is per request, one of each round
	requests, connections int
}

// run sends requests from four clients at a time.
func (l *load) run(b *testing.B, server *program, path, token string, status int, kept bool) {
	b.Helper()
	const clients, requests = 4, 4000
	var dialed atomic.Int64
	job := newClient(server.url)
	job.http.Transport = &http.Transport{
		DisableKeepAlives:   !kept,
		MaxIdleConnsPerHost: clients,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialed.Add(1)
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
	}
	user, system := cpuTime(b, server)
	var sent atomic.Int64
	var running sync.WaitGroup
	var mu sync.Mutex
	for range clients {
		running.Go(func() {
			var took times
			for sent.Add(1) <= requests && !b.Failed() {
				a, err := job.send(b.Context(), http.MethodPost, path, token, imageBody(performanceImage))
				if err != nil || a.status != status {
					b.Errorf("%s answers %d %s %v", server.name, a.status, a.body, err)
				}
				took = append(took, a.took)
			}
			mu.Lock()
			defer mu.Unlock()
			l.latencies = append(l.latencies, took...)
		})
	}
	running.Wait()
	if b.Failed() {
		b.FailNow()
	}
	userNow, systemNow := cpuTime(b, server)
	l.cpu = append(l.cpu, (userNow+systemNow-user-system)/requests)
	l.requests, l.connections = l.requests+requests, l.connections+int(dialed.Load())
}

func (l *load) latency() string {
	return fmt.Sprintf(" (latency p50 %s, p99 %s)", show(l.latencies.percentile(50)), show(l.latencies.percentile(99)))
}

// webMemory is the greatest peak under the attacks of BenchmarkWebMemory.
func webMemory(b *testing.B, _ *performance) []row {
	peak := 0
	for _, attack := range webAttacks() {
		_, after := webPeak(b, attack.run)
		peak = max(peak, after)
	}
	limit := memoryOf(b, manifestContainer(b, "../k8s/30-web.yaml", "web"), "limits")
	return []row{memoryRow("memory/web", "web, peak memory under attacks", peak, int(limit>>10))}
}

// valkeyMemory is the peak with a full ledger.
func valkeyMemory(b *testing.B, _ *performance) []row {
	v := startManifestValkey(b, valkey.ClientOption{})
	v.fill(b)
	return []row{memoryRow("memory/valkey", fmt.Sprintf("Valkey, peak memory, a full ledger (%s images)", thousands(maxLedger)), v.peak(b), memoryLimit(b))}
}

// memoryRow compares a peak with what it may be, both in KiB; 0 is no limit.
func memoryRow(name, what string, peak, limit int) row {
	r := row{name: name, what: what, measured: fmt.Sprintf("%d MiB", peak>>10)}
	if limit > 0 {
		r.limit, r.ratio, r.bar = fmt.Sprintf("%d MiB", limit>>10), float64(peak)/float64(limit), 1
	}
	return r
}

// goBenchmark is a line of go test -bench -benchmem.
type goBenchmark struct {
	name          string
	ns            float64
	bytes, allocs int
}

func (g goBenchmark) String() string {
	return fmt.Sprintf("%s, %s, %d B", show(time.Duration(g.ns)), plural(g.allocs, "allocation"), g.bytes)
}

// goBenchmarks runs the benchmarks of the program itself.
func goBenchmarks(b *testing.B, args ...string) (all []goBenchmark) {
	b.Helper()
	binary := filepath.Join(tempRoot, "program.test")
	if _, err := os.Stat(binary); err != nil {
		build := exec.Command("go", "test", "-c", "-o", binary, ".")
		build.Dir = ".."
		if out, err := build.CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
	cmd := exec.Command(binary, append([]string{"-test.run", "^$", "-test.benchmem"}, args...)...)
	cmd.Dir = ".."
	out, err := cmd.CombinedOutput()
	if err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	line := regexp.MustCompile(`(?m)^Benchmark(\S+?)(?:-\d+)?\s+\d+\s+(\S+) ns/op.*?\s(\d+) B/op\s+(\d+) allocs/op`)
	for _, m := range line.FindAllStringSubmatch(string(out), -1) {
		g := goBenchmark{name: m[1]}
		if _, err := fmt.Sscan(m[2]+" "+m[3]+" "+m[4], &g.ns, &g.bytes, &g.allocs); err != nil {
			b.Fatalf("%s: %v", m[0], err)
		}
		all = append(all, g)
	}
	return all
}

// verifyToken compares the verification of a token with go-jose's own.
func verifyToken(b *testing.B, p *performance) []row {
	var ours, bare times
	var one, other goBenchmark
	for range p.rounds(15) {
		for _, g := range goBenchmarks(b, "-test.bench", "^BenchmarkVerify$/^(valid|go-jose)$", "-test.benchtime", "100ms") {
			if strings.HasSuffix(g.name, "go-jose") {
				bare, other = append(bare, time.Duration(g.ns)), g
			} else {
				ours, one = append(ours, time.Duration(g.ns)), g
			}
		}
	}
	if len(ours) == 0 || len(ours) != len(bare) {
		b.Fatalf("BenchmarkVerify has %d times of valid and %d of go-jose", len(ours), len(bare))
	}
	if one.allocs > 150 {
		b.Errorf("verifying a token takes %d allocations, expected at most 150", one.allocs)
	}
	r := p.compare("verify", "verify a token, against go-jose alone", ours, bare, 1.1)
	one.ns, other.ns = float64(p.typical(ours)), float64(p.typical(bare))
	r.measured, r.limit = one.String(), other.String()
	return []row{r}
}

// code has a row for each other benchmark of the program.
func code(b *testing.B, _ *performance) (rows []row) {
	for _, g := range goBenchmarks(b, "-test.bench", ".", "-test.skip", "^BenchmarkVerify$/^(valid|go-jose)$") {
		rows = append(rows, row{name: "code/" + g.name, what: "`Benchmark" + g.name + "`", measured: g.String()})
	}
	return rows
}
