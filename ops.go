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
	// drainTimeout is how long requests in flight are waited for at SIGTERM,
	// after lameDuck; k8s/ grants both, and the preStop before them.
	drainTimeout = 25 * time.Second

	// lameDuck is how long web goes on at SIGTERM before it stops accepting, for
	// those who have not heard yet that it is going.
	lameDuck = time.Second

	// probeTimeout bounds what a readiness check may take, below the second
	// that a kubelet waits by default.
	probeTimeout = 900 * time.Millisecond

	// maxConnections bounds what an open port costs: memory, and requests in
	// flight, since HTTP/1 has one on each connection. Further ones wait in the
	// kernel until one of these is answered or slower than the timeouts of
	// newServer. There are more than may publish at once, so that while Valkey is
	// silent the others are told so at once.
	maxConnections = 4 * maxPublishing
	idleTimeout    = 15 * time.Second
)

// opsHandler serves the probes. ready says, while the process is not stopping,
// why it is not ready.
func opsHandler(stopping *atomic.Bool, ready func(context.Context) error) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
		defer cancel()
		err := errors.New("stopping")
		if !stopping.Load() {
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

// newServer returns a server whose limits an open port needs. The write timeout
// covers a handler's whole work.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // clients' mistakes
		// Else OPTIONS * would be answered without asking the handler.
		DisableGeneralOptionsHandler: true,
	}
}

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
	return &listener{name, newServer(h, log), netutil.LimitListener(ln, maxConnections)}, nil
}

// serve serves until stop is called; its error is a server that broke.
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

// task is a part of the process that runs until its context is done.
type task func(ctx context.Context) error

// serveAll runs the tasks and the servers until ctx is done or one of them
// fails. It then says that it is stopping, drains what the world sends to
// (front, which may be nil), stops the tasks, and the probes last.
func serveAll(ctx context.Context, ops, front *listener, stopping *atomic.Bool, tasks ...task) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	taskCtx, stopTasks := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTasks()
	var running, serving sync.WaitGroup
	start := func(wg *sync.WaitGroup, f func() error) {
		wg.Go(func() {
			if err := f(); err != nil {
				fail(err)
			}
		})
	}
	for _, t := range tasks {
		start(&running, func() error { return t(taskCtx) })
	}
	start(&serving, ops.serve)
	if front != nil {
		// A request a connection: kept, a thousand of strangers would leave none
		// for others, and one that a proxy keeps would be closed at SIGTERM while
		// the next request is on its way.
		front.server.SetKeepAlivesEnabled(false)
		start(&serving, front.serve)
	}
	<-ctx.Done()
	stopping.Store(true)
	err := context.Cause(ctx)
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	if front != nil {
		time.Sleep(lameDuck)
		err = errors.Join(err, front.drain())
	}
	stopTasks()
	running.Wait()
	err = errors.Join(err, ops.drain())
	serving.Wait()
	return err
}
