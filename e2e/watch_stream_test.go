package e2e

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// watchStream is one watch through an apiProxy. Its events are queued, so that
// they can come late, all at once, or never.
type watchStream struct {
	http.ResponseWriter
	proxy *apiProxy
	ctx   context.Context
	end   context.CancelFunc
	queue chan queuedEvent
	done  chan struct{} // closed once the queue is delivered

	mu    sync.Mutex // of the ResponseWriter
	ended bool       // by endWatches
	stale bool       // it delivers nothing more
}

type queuedEvent struct {
	at      time.Time
	content []byte
}

func (p *apiProxy) serveWatch(upstream http.Handler, w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	s := &watchStream{ResponseWriter: w, proxy: p, ctx: ctx, end: cancel, queue: make(chan queuedEvent, 100_000), done: make(chan struct{})}
	p.mu.Lock()
	p.watches[s] = true
	p.mu.Unlock()
	go s.deliver()
	defer func() {
		close(s.queue)
		<-s.done
		p.mu.Lock()
		delete(p.watches, s)
		p.mu.Unlock()
		s.mu.Lock()
		ended := s.ended
		s.mu.Unlock()
		if broken := recover(); broken != nil && !ended {
			panic(broken)
		}
	}()
	upstream.ServeHTTP(s, r.WithContext(ctx))
}

func (s *watchStream) Write(content []byte) (int, error) {
	s.queue <- queuedEvent{time.Now(), append([]byte(nil), content...)}
	return len(content), nil
}

func (s *watchStream) Flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = http.NewResponseController(s.ResponseWriter).Flush()
}

// deliver sends what is queued when it is due.
func (s *watchStream) deliver() {
	defer close(s.done)
	for e := range s.queue {
		s.proxy.mu.Lock()
		lag, stalled := s.proxy.lag, s.proxy.stalled
		s.proxy.mu.Unlock()
		select {
		case <-time.After(time.Until(e.at.Add(lag))):
		case <-s.ctx.Done():
		}
		if stalled != nil {
			select {
			case <-stalled:
			case <-s.ctx.Done():
			}
		}
		if s.ctx.Err() != nil {
			continue
		}
		s.mu.Lock()
		if !s.stale {
			_, _ = s.ResponseWriter.Write(e.content)
		}
		s.mu.Unlock()
		s.Flush()
	}
}

// openWatches is how many there are.
func (p *apiProxy) openWatches() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.watches)
}

// lagWatches makes each event arrive so much later.
func (p *apiProxy) lagWatches(by time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lag = by
}

// stallWatches holds all events until resume, which then delivers them in order.
func (p *apiProxy) stallWatches() (resume func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	stalled := make(chan struct{})
	p.stalled = stalled
	return sync.OnceFunc(func() {
		p.mu.Lock()
		p.stalled = nil
		p.mu.Unlock()
		close(stalled)
	})
}

// loseWatches makes the open watches deliver nothing more, although their
// connection lives. New ones work.
func (p *apiProxy) loseWatches() {
	for _, s := range p.streams() {
		s.mu.Lock()
		s.stale = true
		s.mu.Unlock()
	}
}

// endWatches ends the open watches in order, as an API server does that closes
// them at their time-out.
func (p *apiProxy) endWatches() {
	for _, s := range p.streams() {
		s.mu.Lock()
		s.ended = true
		s.mu.Unlock()
		s.end()
	}
}

func (p *apiProxy) streams() (all []*watchStream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.watches {
		all = append(all, s)
	}
	return all
}
