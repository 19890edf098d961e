package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// maxLedger is how many images web lets into the ledger.
const maxLedger = 20_000

// resp is a command as clients send it.
func resp(words ...string) []byte {
	out := fmt.Appendf(nil, "*%d\r\n", len(words))
	for _, word := range words {
		out = fmt.Appendf(out, "$%d\r\n%s\r\n", len(word), word)
	}
	return out
}

// connect is a connection of a user, or one without a password.
func (m *manifestValkey) connect(user string) (net.Conn, error) {
	conn, err := net.Dial("tcp", m.addr)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(time.Minute)) // nothing here takes longer
	if user == "" {
		return conn, nil
	}
	password := m.secret[user]
	if user == "probe" {
		password = "none"
	}
	answer := make([]byte, len("+OK\r\n"))
	_, sent := conn.Write(resp("AUTH", user, password))
	if _, err := io.ReadFull(conn, answer); errors.Join(sent, err) != nil || string(answer) != "+OK\r\n" {
		conn.Close()
		return nil, fmt.Errorf("AUTH as %s: %q, %w", user, answer, errors.Join(sent, err))
	}
	return conn, nil
}

// mustConnect connects a user until the end of the test.
func (m *manifestValkey) mustConnect(t *testing.T, user string) net.Conn {
	t.Helper()
	conn, err := m.connect(user)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// peak is the most memory that Valkey had, in KiB.
func (m *manifestValkey) peak(t testing.TB) int {
	t.Helper()
	return memoryKiB(t, &program{process: m.proc}, "VmHWM")
}

// memoryLimit is that of the StatefulSet, in KiB.
func memoryLimit(t testing.TB) int {
	t.Helper()
	set := manifestNamed(t, readManifests(t, "../k8s/20-valkey.yaml"), "StatefulSet", "valkey")
	containers, _, _ := unstructured.NestedSlice(set.Object, "spec", "template", "spec", "containers")
	return int(memoryOf(t, containers[0].(map[string]any), "limits") >> 10)
}

// images are those in the ledger.
func (m *manifestValkey) images(t testing.TB) []string {
	t.Helper()
	images, err := m.must(t, "ZRANGE", ledgerKey, "0", "-1").AsStrSlice()
	if err != nil {
		t.Fatal(err)
	}
	return images
}

// fill makes the ledger full.
func (m *manifestValkey) fill(t testing.TB) {
	t.Helper()
	for i := 0; i < maxLedger; {
		command := []string{"ZADD", ledgerKey}
		for range 100 {
			image := fmt.Sprintf("ghcr.io/acme/%s-%d:%s", strings.Repeat("name", 20), i, strings.Repeat("tag", 20))
			command = append(command, fmt.Sprint(1_790_000_000_000_000+i), image)
			i++
		}
		m.must(t, command...)
	}
}

// valkeyAttack is what some connections of a user send at the same time. They stay
// open and read nothing.
type valkeyAttack struct {
	user        string
	connections int
	send        func(io.Writer)
}

var valkeyAttacks = map[string]valkeyAttack{
	"one huge argument": {"probe", 1, func(w io.Writer) {
		fmt.Fprintf(w, "*2\r\n$4\r\nPING\r\n$%d\r\n", 200<<20)
		repeat(w, make([]byte, 1<<16), 200<<4)
	}},
	"large arguments": {"probe", 500, func(w io.Writer) {
		fmt.Fprintf(w, "*2\r\n$4\r\nPING\r\n$%d\r\n", 1<<20-100)
		repeat(w, make([]byte, 1<<16), 15)
	}},
	"many arguments": {"probe", 6, func(w io.Writer) {
		fmt.Fprintf(w, "*1000\r\n$4\r\nPING\r\n")
		repeat(w, []byte(fmt.Sprintf("$%d\r\n%s\r\n", 1<<16, make([]byte, 1<<16))), 900)
	}},
	"many short arguments": {"probe", 20, func(w io.Writer) {
		fmt.Fprintf(w, "*1000000\r\n$4\r\nPING\r\n")
		repeat(w, bytes.Repeat([]byte("$0\r\n\r\n"), 10_000), 99)
	}},
	"answers not read": {"probe", 20, func(w io.Writer) {
		repeat(w, resp("PING", strings.Repeat("x", 1<<19)), 40)
	}},
	"no password": {"", 1500, func(w io.Writer) {
		argument := fmt.Sprintf("$%d\r\n%s\r\n", 1<<14, make([]byte, 1<<14))
		fmt.Fprint(w, "*10\r\n", strings.Repeat(argument, 9), argument[:1<<14])
	}},
	"no password and no command": {"", 1500, func(w io.Writer) {
		_, _ = w.Write(make([]byte, 60_000))
	}},
	"idle": {"", 1000, func(io.Writer) {}},
	"the ledger not read": {"worker", 2, func(w io.Writer) {
		_, _ = w.Write(bytes.Repeat(resp("ZREVRANGEBYSCORE", ledgerKey, "+inf", "0", "WITHSCORES"), 150)) // Valkey reads them at once
	}},
	"messages not read": {"worker", 30, func(w io.Writer) {
		_, _ = w.Write(resp("SUBSCRIBE", channel))
	}},
}

func repeat(w io.Writer, piece []byte, times int) {
	for range times {
		if _, err := w.Write(piece); err != nil {
			return
		}
	}
}

// run returns how many connections the attack got, and a function that closes them.
func (a valkeyAttack) run(m *manifestValkey) (got int, end func()) {
	var mu sync.Mutex
	var open []net.Conn
	var attackers sync.WaitGroup
	for range a.connections {
		attackers.Go(func() {
			conn, err := m.connect(a.user)
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			a.send(conn)
		})
	}
	attackers.Wait()
	return len(open), func() {
		for _, conn := range open {
			conn.Close()
		}
	}
}

// TestValkeyLimits: whatever clients send and do not read, Valkey with a full ledger
// stays below its memory limit and passes its liveness probe. web and the worker keep
// their connections.
func TestValkeyLimits(t *testing.T) {
	t.Parallel()
	limit := memoryLimit(t)
	for name, attack := range valkeyAttacks {
		t.Run(name, func(t *testing.T) {
			v := startManifestValkey(t, valkey.ClientOption{})
			v.fill(t)
			web, worker := v.mustConnect(t, "web"), v.mustConnect(t, "worker")
			answers, messages := bufio.NewReader(web), make(chan error, 1)
			if _, err := worker.Write(resp("SUBSCRIBE", channel)); err != nil {
				t.Fatal(err)
			}
			go func() {
				lines := bufio.NewReader(worker)
				for {
					line, err := lines.ReadString('\n')
					if err != nil || line == "last\r\n" {
						messages <- err
						return
					}
				}
			}()
			idle := v.peak(t)

			got, end := attack.run(v)
			defer end()
			publish := func(message string, times int) error {
				const script = "for i=1,ARGV[2] do redis.call('PUBLISH',ARGV[3],ARGV[1]) end redis.call('ZADD',KEYS[1],'XX',0,'') return 1"
				_, sent := web.Write(resp("EVAL", script, "1", ledgerKey, message, fmt.Sprint(times), channel))
				answer, err := answers.ReadString('\n')
				if err = errors.Join(sent, err); err == nil && answer != ":1\r\n" {
					err = errors.New(strings.TrimSpace(answer))
				}
				return err
			}
			if err := v.runProbe(t, "livenessProbe"); err != nil {
				t.Errorf("the livenessProbe: %v", err)
			}
			var err error
			if attack.user == "worker" { // 10 MB of messages
				for range 500 {
					err = errors.Join(err, publish(strings.Repeat("x", 200), 100))
				}
			}
			if err = errors.Join(err, publish("last", 1)); err != nil {
				t.Errorf("web's scripts: %.200v", err)
			} else if err := <-messages; err != nil {
				t.Errorf("the worker lost its connection: %v", err)
			}
			peak := v.peak(t)
			fmt.Printf("%s: %d connections, peak %d MiB (before %d, limit %d)\n", t.Name(), got, peak>>10, idle>>10, limit>>10)
			if peak > limit {
				t.Errorf("the peak is %d KiB, and k8s/ limits it to %d", peak, limit)
			}
		})
	}
}

// TestValkeyLimitsBusy: Valkey disconnects no client for its memory while a script of
// a compromised web runs, but still bounds what one client sends.
func TestValkeyLimitsBusy(t *testing.T) {
	t.Parallel()
	v := startManifestValkey(t, valkey.ClientOption{})
	web, probe := v.mustConnect(t, "web"), v.mustConnect(t, "probe")
	if _, err := web.Write(resp("EVAL", "while true do end", "0")); err != nil {
		t.Fatal(err)
	}
	// It serves nobody until a script has run for 5 s.
	answers := bufio.NewReader(probe)
	eventually(t, 10*time.Second, "Valkey is busy", func() error {
		if _, err := probe.Write(resp("PING")); err != nil {
			t.Fatal(err)
		}
		if answer, err := answers.ReadString('\n'); err != nil || !strings.HasPrefix(answer, "-BUSY") {
			return fmt.Errorf("PING: %q, %w", answer, err)
		}
		return nil
	})
	valkeyAttacks["one huge argument"].send(probe)
	if peak, limit := v.peak(t), memoryLimit(t); peak > limit {
		t.Errorf("the peak is %d KiB, and k8s/ limits it to %d", peak, limit)
	}
}

// TestValkeyLimitsLedger: the limits do not disturb a full ledger, its messages to
// two workers, a third that catches up, and the reports of all three.
func TestValkeyLimitsLedger(t *testing.T) {
	t.Parallel()
	v := startManifestValkey(t, valkey.ClientOption{})
	namespace := newNamespace(t)
	kubeconfig := newWorkerUser(t, namespace).kubeconfig(t, sharedAPI.url)
	web := startWeb(t, v.addr, v.settings("web")...)
	start := func(cluster string) *program {
		return startWorker(t, v.addr, kubeconfig, append(v.settings("worker"), "WORKER_NAMESPACES="+namespace, "LOG_LEVEL=debug", "CLUSTER_NAME="+cluster)...)
	}
	workers := []*program{start("first"), start("second")}

	const tags, repositories = 32, 20
	job := newClient(web.url)
	jobs := make(chan int)
	var posting sync.WaitGroup
	for range 8 {
		posting.Go(func() {
			for i := range jobs {
				repository := fmt.Sprintf("acme/ledger-%d", i%repositories)
				var list []string
				for j := range tags {
					list = append(list, fmt.Sprintf("%q", fmt.Sprintf("tag-%d-%d", i, j)))
				}
				token := github.mint(time.Now(), map[string]any{"repository": repository, "repository_id": fmt.Sprint(1000 + i%repositories),
					"sub": "repo:" + repository + ":ref:refs/heads/main"})
				a, err := job.post(t.Context(), token, fmt.Sprintf(`{"image":"ghcr.io/%s","tags":[%s]}`, repository, strings.Join(list, ",")))
				if err != nil || a.status != http.StatusAccepted {
					t.Errorf("POST %d: %d %s, %v", i, a.status, a.body, err)
					return
				}
			}
		})
	}
	for i := range maxLedger / tags {
		jobs <- i
	}
	close(jobs)
	posting.Wait()

	workers = append(workers, start("third"))
	caughtUp := func(w *program) error {
		for _, line := range w.logged(t, "msg", "caught up") {
			if line["entries"] == float64(maxLedger) {
				return nil
			}
		}
		return errors.New("it has not caught up with all")
	}
	eventually(t, 10*time.Second, "the third worker catches up", func() error { return caughtUp(workers[2]) })
	if raceDetecting { // a worker may be too slow to stay connected; it catches up then
		for _, w := range workers {
			eventually(t, 40*time.Second, "each worker catches up", func() error { return caughtUp(w) })
		}
		return
	}
	for i, w := range workers {
		if n := len(w.logged(t, "msg", "subscribed")); n != 1 {
			t.Errorf("worker %d subscribed %d times", i, n)
		}
		if i == 2 {
			continue
		}
		eventually(t, 10*time.Second, "all messages arrive", func() error {
			n := 0
			for _, line := range w.logged(t, "msg", "requested") {
				if line["announced"] == true {
					n++
				}
			}
			if n != maxLedger {
				return fmt.Errorf("%d of %d", n, maxLedger)
			}
			return nil
		})
	}
	eventually(t, 60*time.Second, "each worker has reported on each image", func() error {
		missing := maxLedger
		for page := range slices.Chunk(v.images(t), 1000) {
			script := "local n = 0 for _, image in ipairs(ARGV) do if redis.call('HLEN', '" + channel + ":report:' .. image) == 3 then n = n + 1 end end return n"
			n, err := v.must(t, append([]string{"EVAL", script, "0"}, page...)...).AsInt64()
			if err != nil {
				return err
			}
			missing -= int(n)
		}
		if missing > 0 {
			return fmt.Errorf("%d images lack reports", missing)
		}
		return nil
	})
	job.mustPush(t, "ghcr.io/acme/ledger-0:tag-0-0")
	stats, err := v.must(t, "INFO", "stats").ToString()
	if err != nil {
		t.Fatal(err)
	}
	limits := []string{"rejected_connections", "evicted_clients", "client_query_buffer_limit_disconnections", "client_output_buffer_limit_disconnections"}
	for _, none := range limits {
		if !strings.Contains(stats, none+":0\r\n") {
			t.Errorf("INFO has no %s:0:\n%s", none, stats)
		}
	}
	memory, _ := v.must(t, "INFO", "memory").ToString()
	_, used, _ := strings.Cut(memory, "used_memory_human:")
	fmt.Printf("%s: %d images, %d workers, peak %d MiB, used_memory %.6s\n", t.Name(), maxLedger, len(workers), v.peak(t)>>10, used)
}
