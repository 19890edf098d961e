package e2e

import (
	"bytes"
	"cmp"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"text/template"
)

// groups are the beginnings of the rows' names, in the order of the page.
var groups = []string{"post-to-patched", "fan-out", "worker", "web", "verify", "code", "memory"}

// sorted are the rows in the order of the page.
func (p *performance) sorted() []row {
	group := func(r row) int {
		name, _, _ := strings.Cut(r.name, "/")
		return slices.Index(groups, name)
	}
	return slices.SortedStableFunc(slices.Values(p.rows), func(a, b row) int { return group(a) - group(b) })
}

// table is the table of docs/performance.md.
func (p *performance) table() string {
	var out strings.Builder
	fmt.Fprintln(&out, "| row | what | measured | limit | ratio | bar | remark |\n|---|---|---|---|---|---|---|")
	for _, r := range p.sorted() {
		fmt.Fprintf(&out, "| `%s` | %s | %s | %s | %s | %s | %s |\n", r.name, r.what, r.measured, cmp.Or(r.limit, "–"), ratioText(r.ratio), ratioText(r.bar), r.verdict())
	}
	return out.String()
}

func ratioText(ratio float64) string {
	if ratio == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", ratio)
}

// reasons are the remarks on rows whose bar is missed, by the beginning of their names.
var reasons = map[string]string{
	"fan-out/":           "The worker also decodes each event of its watch, decides, logs and reports.",
	"web/garbage":        "It also answers with a request ID, headers and JSON.",
	"worker/50000/ready": "The heap reaches the GOMEMLIMIT of `k8s/`, so Go collects garbage all the time. Raise it for a cluster of this size.",
}

// verdict is the remark, after how far the bar is missed, and why.
func (r row) verdict() string {
	parts := []string{r.remark}
	if r.missed() {
		parts = append(parts, fmt.Sprintf("**Missed** by %.1f %%.", 100*(r.ratio/r.bar-1)))
		for name, reason := range reasons {
			if strings.HasPrefix(r.name, name) {
				parts = append(parts, reason)
			}
		}
	}
	return strings.TrimSpace(strings.Join(parts, " "))
}

//go:embed testdata/performance.md.tmpl
var pageText string

var page = template.Must(template.New("page").Parse(pageText))

// write writes performance.md and performance.svg.
func (p *performance) write(b *testing.B, dir string) {
	b.Helper()
	var text bytes.Buffer
	if err := page.Execute(&text, map[string]any{"Table": p.table(), "Machine": machine(b)}); err != nil {
		b.Fatal(err)
	}
	for name, content := range map[string][]byte{"performance.md": text.Bytes(), "performance.svg": p.chart()} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			b.Fatal(err)
		}
	}
}

// machine is what the figures were measured with.
func machine(b *testing.B) [][2]string {
	b.Helper()
	output := func(dir, name string, args ...string) string {
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		out, err := cmd.Output()
		if err != nil {
			b.Fatalf("%s: %v", name, err)
		}
		return strings.TrimSpace(string(out))
	}
	find := func(pattern, text string) string {
		m := regexp.MustCompile(pattern).FindStringSubmatch(text)
		if m == nil {
			b.Fatalf("%s is not in %.200s", pattern, text)
		}
		return m[1]
	}
	module := func(dir, path string) string { return output(dir, "go", "list", "-m", "-f", "{{.Version}}", path) }
	memory := find(`MemTotal:\s+(\d+) kB`, output("", "cat", "/proc/meminfo"))
	return [][2]string{
		{"CPU", find(`model name\s+: (.+)`, output("", "cat", "/proc/cpuinfo"))},
		{"cores", fmt.Sprint(runtime.NumCPU())},
		{"memory", memory[:len(memory)-6] + " GB"},
		{"kernel", find(`^([0-9.]+)`, output("", "uname", "-r"))},
		{"Go", strings.TrimPrefix(runtime.Version(), "go")},
		{"kube-apiserver", module("controlplane", "k8s.io/kubernetes")},
		{"etcd", module("controlplane", "go.etcd.io/etcd/server/v3") + ", without fsync"},
		{"Valkey", find(`v=(\S+)`, output("", "valkey-server", "--version")) + ", appendfsync always"},
		{"client-go", module("", "k8s.io/client-go")},
	}
}

// chart draws the ratios of the rows that have a bar.
func (p *performance) chart() []byte {
	const left, right, unit, line = 400, 60, 220, 26 // unit is the length of ratio 1
	var rows []row
	longest := 1.5
	for _, r := range p.sorted() {
		if r.bar > 0 {
			rows, longest = append(rows, r), max(longest, r.bar, r.ratio)
		}
	}
	var out bytes.Buffer
	width, height := left+int(longest*unit)+right, line*(len(rows)+2)
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="system-ui, sans-serif" font-size="13">
<title>Ratios to the limit, and their bars</title>
<style>
.page { fill: #ffffff } text { fill: #1f2328 } .bar { stroke: #1f2328; stroke-width: 2 } .limit { stroke: #8c959f; stroke-dasharray: 3 }
.kept { fill: #2da44e } .missed { fill: #cf222e }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117 } text { fill: #e6edf3 } .bar { stroke: #e6edf3 } .kept { fill: #3fb950 } .missed { fill: #f85149 }
}
</style>
<rect class="page" width="100%%" height="100%%"/>
<text x="%d" y="17" text-anchor="middle">the limit</text>
<line class="limit" x1="%[3]d" x2="%[3]d" y1="%d" y2="%d"/>
`, width, height, left+unit, line, line*(len(rows)+1))
	for i, r := range rows {
		y, class := line*(i+1), "kept"
		if r.missed() {
			class = "missed"
		}
		fmt.Fprintf(&out, `<text x="%d" y="%d" text-anchor="end">%s</text>`, left-10, y+17, r.what)
		fmt.Fprintf(&out, `<rect class="%s" x="%d" y="%d" width="%.0f" height="%d"/>`, class, left, y+5, r.ratio*unit, line-10)
		at := left + r.bar*unit
		fmt.Fprintf(&out, `<line class="bar" x1="%.0f" x2="%.0[1]f" y1="%d" y2="%d"/>`, at, y+2, y+line-2)
		fmt.Fprintf(&out, `<text x="%.0f" y="%d">%.2f</text>`+"\n", max(at, left+r.ratio*unit)+8, y+17, r.ratio)
	}
	fmt.Fprintf(&out, `<text x="%d" y="%d">A bar should end before its vertical mark.</text>`+"\n</svg>\n", left, line*(len(rows)+1)+17)
	return out.Bytes()
}
