package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkPerformance compares the program with the least that any program must do,
// on real servers. Both are measured in the same run, in turns. What it prints are
// ratios of medians, which mean the same on every machine.
//
//	PERFORMANCE=../docs go test -run '^$' -bench Performance -benchtime 1x -timeout 90m
//
// writes performance.md and performance.svg to that directory. Without PERFORMANCE it
// prints the table; one row by its name, such as -bench 'Performance/fan-out/1000'.
//
//	RATIOS=../.ci/ratios go test -run '^$' -bench Performance -benchtime 1x
//
// measures the rows that the file names, in fewer rounds, and fails if a ratio is worse
// than the file says. To record other ratios, copy those of the table that it prints.
func BenchmarkPerformance(b *testing.B) {
	p := &performance{posted: map[int]float64{}, shared: map[int]string{200: newImage(), 1000: newImage()}}
	b.Cleanup(func() { // last, because the servers show their logs in a failure
		for _, line := range p.worse {
			b.Error(line)
		}
	})
	p.start(b)
	complete := true
	for _, m := range measurements {
		if p.recorded != nil && len(p.recordedFor(m)) == 0 {
			continue
		}
		ran := false
		b.Run(m.name, func(b *testing.B) { ran = true; p.run(b, m) })
		complete = complete && ran
	}
	fmt.Print(p.table())
	if dir := os.Getenv("PERFORMANCE"); dir != "" && !b.Failed() {
		if !complete {
			b.Fatal("PERFORMANCE is for a run of everything")
		}
		p.write(b, dir)
	}
}

// measurement makes one row of the table, or some that are measured at once.
type measurement struct {
	name    string
	measure func(*testing.B, *performance) []row
}

// measurements are in an order in which the cluster only grows.
var measurements = slices.Concat(
	[]measurement{{"verify", verifyToken}, {"code", code}},
	webMeasurements(),
	[]measurement{{"memory/web", webMemory}, {"memory/valkey", valkeyMemory}},
	postMeasurements(10),
	postMeasurements(1000),
	[]measurement{fanOutMeasurement(200), fanOutMeasurement(1000), workerMeasurement(1000, 5)},
	postMeasurements(11_200),
	[]measurement{{"post-to-patched/growth", growth}, workerMeasurement(11_200, 3), workerMeasurement(50_000, 3)},
)

// row is one of the table.
type row struct {
	name, what      string
	measured, limit string
	ratio           float64 // of the two; 0 if there is no limit
	bar             float64 // which the ratio should not exceed; 0 if there is none
	remark          string
}

func (r row) missed() bool { return r.bar > 0 && r.ratio > r.bar }

// times are those of the rounds of one side.
type times []time.Duration

func (t times) percentile(p int) time.Duration {
	sorted := slices.Sorted(slices.Values(t))
	return sorted[min(len(sorted)*p/100, len(sorted)-1)]
}

// typical is the median. CI takes a fast round, which other load on the machine spoils
// less; a slower program has no fast rounds.
func (p *performance) typical(t times) time.Duration {
	if p.recorded != nil {
		return t.percentile(10)
	}
	return t.percentile(50)
}

// compare makes a row of both sides.
func (p *performance) compare(name, what string, ours, bare times, bar float64) row {
	a, b := p.typical(ours), p.typical(bare)
	return row{name: name, what: what, measured: show(a), limit: show(b), ratio: float64(a) / float64(b), bar: bar}
}

// show rounds to three digits.
func show(d time.Duration) string {
	switch {
	case d < 10*time.Microsecond:
		return fmt.Sprintf("%d ns", d.Nanoseconds())
	case d < time.Millisecond:
		return fmt.Sprintf("%.0f µs", d.Seconds()*1e6)
	case d < time.Second:
		return fmt.Sprintf("%.3g ms", d.Seconds()*1e3)
	}
	return fmt.Sprintf("%.3g s", d.Seconds())
}

// performance is what all measurements share.
type performance struct {
	cluster     cluster
	deployments []deployment   // in the cluster
	shared      map[int]string // the image that so many of them run
	valkey      *valkeyServer
	web         *program
	bare        string          // the binary of ./bare
	bareWeb     *program        // the least that a web must do
	posted      map[int]float64 // the ratio of POST to patched with one tag, by size
	rows        []row
	recorded    map[string]float64 // RATIOS
	worse       []string           // than recorded in each try
}

// start starts what needs no Deployments.
func (p *performance) start(b *testing.B) {
	b.Helper()
	if file := os.Getenv("RATIOS"); file != "" {
		p.readRatios(b, file)
	}
	p.bare = filepath.Join(tempRoot, "bare")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", p.bare, "./bare")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	p.cluster, p.valkey = startCluster(b), startValkey(b)
	p.web = startLimitedWeb(b, p.valkey.addr)
	p.startBareWeb(b)
}

// rounds are fewer in CI.
func (p *performance) rounds(n int) int {
	if p.recorded != nil {
		return max(3, n/2)
	}
	return n
}

// tolerance is what a ratio may be worse than the recorded one, in the best of tries.
const tolerance, tries = 1.3, 3

// run adds the rows of a measurement. It measures again while one is worse than
// recorded: a busy machine is not a slow program.
func (p *performance) run(b *testing.B, m measurement) {
	rows := m.measure(b, p)
	worse := p.worseThanRecorded(b, m, rows)
	for try := 1; len(worse) > 0 && try < tries; try++ {
		b.Logf("try %d: %s", try, strings.Join(worse, "; "))
		rows = m.measure(b, p)
		worse = p.worseThanRecorded(b, m, rows)
	}
	p.worse = append(p.worse, worse...)
	if len(rows) == 1 {
		b.ReportMetric(rows[0].ratio, "ratio")
	}
	b.ReportMetric(0, "ns/op") // of all rounds of both sides, which means nothing
	p.rows = append(p.rows, rows...)
}

// worseThanRecorded are the rows whose ratio is.
func (p *performance) worseThanRecorded(b *testing.B, m measurement, rows []row) (lines []string) {
	b.Helper()
	for _, name := range p.recordedFor(m) {
		i := slices.IndexFunc(rows, func(r row) bool { return r.name == name && r.ratio > 0 })
		if i < 0 {
			b.Fatalf("there is no ratio %s to compare with the one recorded", name)
		}
		if limit := p.recorded[name] * tolerance; rows[i].ratio > limit {
			lines = append(lines, fmt.Sprintf("%s: the ratio is %.2f; recorded is %.2f, and at most %.2f passes", name, rows[i].ratio, p.recorded[name], limit))
		}
	}
	return lines
}

// recordedFor are the names of the recorded ratios that a measurement has.
func (p *performance) recordedFor(m measurement) (names []string) {
	for name := range p.recorded {
		if name == m.name || strings.HasPrefix(name, m.name+"/") {
			names = append(names, name)
		}
	}
	return names
}

// readRatios reads lines of a row's name and its ratio.
func (p *performance) readRatios(b *testing.B, path string) {
	b.Helper()
	file, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	p.recorded = map[string]float64{}
	known := 0
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var name string
		var ratio float64
		if _, err := fmt.Sscanf(lines.Text(), "%s %f", &name, &ratio); err != nil || ratio <= 0 {
			b.Fatalf("%s: expected a name and a ratio: %q", path, lines.Text())
		}
		p.recorded[name] = ratio
	}
	for _, m := range measurements {
		known += len(p.recordedFor(m))
	}
	if known != len(p.recorded) || known == 0 {
		b.Fatalf("%s has %d names, of which %d are measured", path, len(p.recorded), known)
	}
}
