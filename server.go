package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/net/netutil"
)

const (
	// After SIGTERM, web accepts requests for lameDuck, for proxies that have not noticed,
	// and then finishes those in flight. The grace period in k8s/ covers both.
	lameDuck     = time.Second
	drainTimeout = 25 * time.Second

	// maxConnections bounds the memory of a port. It is well above maxPublishing: callers
	// get a 503 at once while Valkey is silent.
	maxConnections = 1024

	maxScrapes     = 8        // at once, for their memory
	maxHeaderBytes = 10 << 10 // a token has up to 8 KiB
	maxHeaderLines = 100      // net/http allocates far more than the bytes of tiny lines

	probeTimeout     = 900 * time.Millisecond // a kubelet waits a second by default
	opsHeaderTimeout = 500 * time.Millisecond // a probe has its turn in time when idle clients have every place
	headerTimeout    = time.Second
	writeTimeout     = 15 * time.Second       // for a handler's whole work; GET /rollout extends it
	lingerTimeout    = 100 * time.Millisecond // at 0, a client that still sends its body might miss the answer
)

// newServer sets the limits that an open port needs.
func newServer(h http.Handler, headerTimeout time.Duration, log *slog.Logger) *http.Server {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      writeTimeout,
		MaxHeaderBytes:    maxHeaderBytes - 4<<10,                            // net/http adds 4 KiB
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // clients' mistakes
		// net/http would answer OPTIONS * without asking the handler.
		DisableGeneralOptionsHandler: true,
	}
	// One request per connection, so that kept connections cannot exhaust the
	// limit, and no proxy reuses a connection that is about to be closed.
	s.SetKeepAlivesEnabled(false)
	return s
}

// service is a running web or worker.
type service struct {
	log     *slog.Logger
	listen  func(network, addr string) (net.Listener, error)
	opsAddr string                      // host:port of probes and metrics
	ready   func(context.Context) error // says why the process cannot work
	task    func(context.Context) error // runs until its context is done
	metrics *metrics.Set
	measure func()       // sets the gauges that nothing else does
	apiAddr string       // host:port of api
	api     http.Handler // nil in worker

	stopping atomic.Bool
}

// run serves until ctx is done or a part fails. It then fails readiness, drains
// the API, stops the task, and closes the probes last.
func (s *service) run(ctx context.Context) error {
	ops, api := newServer(s.ops(), opsHeaderTimeout, s.log), newServer(s.api, headerTimeout, s.log)
	failed := make(chan error, 3) // one from each part
	if err := s.start("ops", s.opsAddr, ops, failed); err != nil {
		return err
	}
	defer ops.Close()
	if s.api != nil {
		if err := s.start("web", s.apiAddr, api, failed); err != nil {
			return err
		}
	}
	taskCtx, stopTask := context.WithCancel(context.WithoutCancel(ctx))
	var task sync.WaitGroup
	task.Go(func() { failed <- s.task(taskCtx) })

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	s.stopping.Store(true)
	if s.api != nil {
		time.Sleep(lameDuck)
		draining, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		if late := api.Shutdown(draining); late != nil {
			api.Close()
			err = errors.Join(err, fmt.Errorf("draining web: %w", late))
		}
	}
	stopTask()
	task.Wait()
	return err
}

// start takes the port at once, so that a port in use is an error at start.
func (s *service) start(name, addr string, server *http.Server, failed chan<- error) error {
	ln, err := s.listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listening for %s: %w", name, err)
	}
	s.log.Info("listening", "server", name, "addr", ln.Addr().String())
	ln = headerListener{netutil.LimitListener(ln, maxConnections)}
	go func() { failed <- fmt.Errorf("serving %s: %w", name, server.Serve(ln)) }()
	return nil
}

// ops answers probes and scrapes.
func (s *service) ops() http.Handler {
	ok := func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") }
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", ok)
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
		defer cancel()
		if s.stopping.Load() {
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		} else if err := s.ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		} else {
			ok(w, r)
		}
	})
	metrics.ExposeMetadata(true)
	var scraping atomic.Int64
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		defer scraping.Add(-1)
		if scraping.Add(1) > maxScrapes {
			http.Error(w, "too many scrapes at once", http.StatusServiceUnavailable)
			return
		}
		s.measure()
		s.metrics.WritePrometheus(w)
		metrics.WriteGaugeUint64(w, fmt.Sprintf("%sbuild_info{version=%q,goversion=%q}", metricPrefix, versionString(), runtime.Version()), 1)
		metrics.WriteProcessMetrics(w)
		metrics.WriteFDMetrics(w)
	})
	return mux
}

// headerListener bounds the header lines of each connection.
type headerListener struct{ net.Listener }

func (l headerListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return &headerConn{Conn: conn}, err
}

// headerConn is a connection for one request.
type headerConn struct {
	net.Conn
	lines    int  // of the header so far
	empty    bool // nothing but CR since the last LF
	complete bool // the header
}

// Read counts as net/http does: LF ends a line, and an empty line the header. Its
// error is answered with 400.
func (c *headerConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	for line := range bytes.Lines(b[:n]) {
		if c.complete || c.lines > maxHeaderLines {
			break
		}
		c.empty = c.empty && len(bytes.Trim(line, "\r\n")) == 0
		if bytes.HasSuffix(line, []byte("\n")) {
			c.lines++
			c.complete, c.empty = c.empty, true
		}
	}
	if c.lines > maxHeaderLines {
		return 0, fmt.Errorf("more than %d header lines", maxHeaderLines)
	}
	return n, err
}

// Write sends an answer. net/http, which gives some by itself, would wait until
// ReadTimeout for a body that was not read.
func (c *headerConn) Write(b []byte) (int, error) {
	if !bytes.HasPrefix(b, []byte("HTTP/1.1 100 ")) { // Continue: the body is wanted
		c.SetReadDeadline(time.Now().Add(lingerTimeout))
	}
	return c.Conn.Write(b)
}

const metricPrefix = "kuberollouttrigger_"

// docs/operations.md explains the metrics. All exist from the start: their rates begin with 0.
var (
	webMetrics, workerMetrics = metrics.NewSet(), metrics.NewSet()

	outcomes        = []string{"ok", "token", "keys", "claims", "request", "image", "quota", "unknown", "valkey", "bug"}
	eventRequests   = newCounters(webMetrics, `requests_total{path="/event",outcome=%q}`, outcomes...)
	rolloutRequests = newCounters(webMetrics, `requests_total{path="/rollout",outcome=%q}`, outcomes...)
	keyFetches      = newCounters(webMetrics, `key_fetches_total{result=%q}`, "ok", "error")
	keysFetchedAt   = webMetrics.NewGauge(metricPrefix+"keys_fetched_timestamp_seconds", nil)
	rolloutWaiting  = webMetrics.NewGauge(metricPrefix+"rollout_waiting", nil)
	verifySeconds   = webMetrics.NewPrometheusHistogramExt(metricPrefix+"verify_seconds", bucketBounds)
	publishSeconds  = webMetrics.NewPrometheusHistogramExt(metricPrefix+"publish_seconds", bucketBounds)

	messages            = newCounters(workerMetrics, `messages_total{result=%q}`, "heard", "ignored")
	caughtUpRequests    = workerMetrics.NewCounter(metricPrefix + "caught_up_requests_total")
	caughtUpAt          = workerMetrics.NewGauge(metricPrefix+"caught_up_timestamp_seconds", nil)
	subscribed          = workerMetrics.NewGauge(metricPrefix+"subscribed", nil)
	restarts            = newCounters(workerMetrics, `restarts_total{kind=%q}`, kindNames()...)
	skips               = newCounters(workerMetrics, `skips_total{reason=%q}`, pinnedReason, expiredReason, deletedReason, onDeleteReason)
	deferrals           = newCounters(workerMetrics, `deferrals_total{reason=%q}`, pausedReason, intervalReason, paceReason)
	retries             = workerMetrics.NewCounter(metricPrefix + "retries_total")
	conflicts           = workerMetrics.NewCounter(metricPrefix + "conflicts_total")
	giveUps             = workerMetrics.NewCounter(metricPrefix + "give_ups_total")
	ineffectiveRestarts = workerMetrics.NewCounter(metricPrefix + "ineffective_restarts_total")
	restartSeconds      = workerMetrics.NewPrometheusHistogramExt(metricPrefix+"restart_seconds", bucketBounds)
	rollouts            = newCounters(workerMetrics, `rollouts_total{state=%q}`, rolloutStates[complete], rolloutStates[failed], rolloutStates[unmatched])
	rolloutSeconds      = workerMetrics.NewPrometheusHistogramExt(metricPrefix+"rollout_seconds", bucketBounds)
	watchEventAt        = workerMetrics.NewGauge(metricPrefix+"watch_event_timestamp_seconds", nil)
	watchesStarted      = newCounters(workerMetrics, `watches_started_total{kind=%q}`) // of WORKER_KINDS
	queueLength         = workerMetrics.NewGauge(metricPrefix+"queue_length", nil)
)

// counters is one metric with one label. Its values are constants, never a caller's text.
type counters func(value string) *metrics.Counter

func newCounters(set *metrics.Set, name string, values ...string) counters {
	c := func(value string) *metrics.Counter {
		return set.GetOrCreateCounter(fmt.Sprintf(metricPrefix+name, value))
	}
	for _, value := range values {
		c(value)
	}
	return c
}

// bucketBounds are upper bounds: PromQL computes no quantiles from the library's own buckets.
var bucketBounds = []float64{1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 3600}
