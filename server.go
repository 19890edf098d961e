package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"
)

const (
	// lameDuck is how long web still accepts requests after SIGTERM, for proxies
	// that have not yet noticed.
	lameDuck = time.Second

	// drainTimeout is how long web then waits for requests in flight. The grace
	// period in k8s/ covers the preStop, lameDuck and this.
	drainTimeout = 25 * time.Second

	// probeTimeout is below the second that a kubelet waits by default.
	probeTimeout = 900 * time.Millisecond

	// maxConnections bounds the memory and the requests in flight of a port.
	// Further connections wait in the kernel. It is well above maxPublishing, so
	// that callers get a 503 at once while Valkey is silent.
	maxConnections = 1024
)

// listener is a server and where it listens.
type listener struct {
	name   string
	server *http.Server
	ln     net.Listener
}

// listen takes the port at once, so that a port in use is an error at start.
func listen(name, addr string, h http.Handler, log *slog.Logger) (*listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening for %s: %w", name, err)
	}
	log.Info("listening", "server", name, "addr", ln.Addr().String())
	return newListener(name, ln, h, log), nil
}

func newListener(name string, ln net.Listener, h http.Handler, log *slog.Logger) *listener {
	return &listener{name, newServer(h, log), netutil.LimitListener(ln, maxConnections)}
}

// newServer sets the limits that an open port needs. The write timeout covers a
// handler's whole work.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       15 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // clients' mistakes
		// net/http would answer OPTIONS * without asking the handler.
		DisableGeneralOptionsHandler: true,
	}
}

// serve serves until drain; its error is a server that broke.
func (l *listener) serve() error {
	if err := l.server.Serve(l.ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving %s: %w", l.name, err)
	}
	return nil
}

// drain stops accepting and waits for the requests in flight.
func (l *listener) drain() error {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := l.server.Shutdown(ctx); err != nil {
		l.server.Close()
		return fmt.Errorf("draining %s: %w", l.name, err)
	}
	return nil
}

// service is a running web or worker.
type service struct {
	task        func(context.Context) error // runs until its context is done
	ops, public *listener                   // worker has no public one
	stopping    atomic.Bool
}

// probes serves /healthz and /readyz. ready says why the process cannot work.
func (s *service) probes(ready func(context.Context) error) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
		defer cancel()
		err := errors.New("stopping")
		if !s.stopping.Load() {
			err = ready(ctx)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ok\n")
	})
	return mux
}

// run serves until ctx is done or a part fails. It then fails readiness, drains
// the public port, stops the task, and closes the probes last.
func (s *service) run(ctx context.Context) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	taskCtx, stopTask := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTask()
	var working, serving sync.WaitGroup
	start := func(wg *sync.WaitGroup, part func() error) {
		wg.Go(func() {
			if err := part(); err != nil {
				fail(err)
			}
		})
	}
	start(&working, func() error { return s.task(taskCtx) })
	start(&serving, s.ops.serve)
	if s.public != nil {
		// One request per connection, so that idle clients cannot exhaust the
		// limit, and no proxy reuses a connection that is about to be closed.
		s.public.server.SetKeepAlivesEnabled(false)
		start(&serving, s.public.serve)
	}

	<-ctx.Done()
	s.stopping.Store(true)
	err := context.Cause(ctx)
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	if s.public != nil {
		time.Sleep(lameDuck)
		err = errors.Join(err, s.public.drain())
	}
	stopTask()
	working.Wait()
	err = errors.Join(err, s.ops.drain())
	serving.Wait()
	return err
}
