package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/valkey-io/valkey-go"
)

// What is kept in Valkey is one sorted set, <channel>:requested: its members
// are canonical references, their scores the time T at which each was last
// asked for, in microseconds on Valkey's own clock. PubSub only announces.

const (
	// keepRecorded is how long a request stays in the set; the longest
	// WORKER_CATCH_UP.
	keepRecorded = 24 * time.Hour

	// maxRecorded is how many images the set holds: far more than an organisation
	// pushes in a day, and few enough for the memory that k8s/ gives Valkey and
	// each worker. What would exceed it is refused, so that nobody who may name
	// any tag can crowd out what was accepted from others.
	maxRecorded = 20_000

	// publishTimeout bounds how long a job waits for Valkey before it is told
	// to come again. It stays under the 3 s that web promises.
	publishTimeout = 2500 * time.Millisecond

	// maxPublishing is how many scripts web keeps in flight. It stays well
	// below the 1,024 places of valkey-go's ring, because a command that waits
	// for a place in a full ring does not heed its context.
	maxPublishing = 256

	// transientDelay is the pause before Valkey is tried again, short because
	// jobs are waiting; configurationDelay that after a refusal which lasts
	// until somebody mends a password or an ACL.
	transientDelay     = 250 * time.Millisecond
	configurationDelay = 5 * time.Second
)

// publishScript records the images in ARGV[2:] in the set KEYS[1] and announces
// them on the channel ARGV[1], all or none. T is one for all of them, later
// than any T recorded for one of them, and read off Valkey's clock, so that any
// number of web replicas agree. A T more than a day ahead was left by a clock
// that was wrong; worker ignores it, and it is written over. Scores are written
// with %.0f because cjson and tostring print 14 digits; a double holds these 16
// exactly until 2255. The message is put together by hand because cjson escapes
// slashes; a canonical reference has nothing that JSON would escape.
var publishScript = valkey.NewLuaScript(fmt.Sprintf(`
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local day = %d
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%%.0f', now - day))
local t = now
local more = 0
for i = 2, #ARGV do
  local last = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not last then more = more + 1 end
  if last and tonumber(last) >= t and tonumber(last) <= now + day then t = tonumber(last) + 1 end
end
if more > 0 and redis.call('ZCARD', KEYS[1]) + more > %d then
  return redis.error_reply('FULL too many images were asked for within a day')
end
local at = string.format('%%.0f', t)
local subscribers = 0
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[1], at, ARGV[i])
end
for i = 2, #ARGV do
  subscribers = redis.call('PUBLISH', ARGV[1], '{"image":"' .. ARGV[i] .. '","requestedAt":' .. at .. '}')
end
return {at, subscribers}
`, keepRecorded.Microseconds(), maxRecorded))

// errBusy is a publish refused because too many are in flight.
var errBusy = errors.New("too many requests in flight to valkey")

// publisher is web's side of Valkey.
type publisher struct {
	client     valkey.Client
	channel    string
	publishing chan struct{} // a place for each script in flight
	timeout    time.Duration
}

// newPublisher does not need Valkey to be there: the client connects again by
// itself. Its error is a configuration that can never work.
func newPublisher(cfg valkeyConfig, log *slog.Logger) (*publisher, error) {
	client, err := newValkeyClient(cfg, log, func(o *valkey.ClientOption) {
		o.RingScaleEachConn = 10
		o.DisableRetry = true // a script may have run although its answer was lost
	})
	if err != nil {
		return nil, err
	}
	return &publisher{client, cfg.Channel, make(chan struct{}, maxPublishing), publishTimeout}, nil
}

// publish records the images and announces them; all or none. It returns T in
// microseconds and the number of subscribers that heard. After an error the
// images may have been recorded all the same, if only the answer was lost.
func (p *publisher) publish(ctx context.Context, images []string) (requestedAt, subscribers int64, err error) {
	select {
	case p.publishing <- struct{}{}:
		defer func() { <-p.publishing }()
	default:
		return 0, 0, errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	args := append([]string{p.channel}, images...)
	reply, err := publishScript.Exec(ctx, p.client, []string{requestedKey(p.channel)}, args).ToArray()
	if err != nil {
		return 0, 0, valkeyError("recording the request", err)
	}
	if len(reply) != 2 {
		return 0, 0, fmt.Errorf("recording the request: valkey answered %d values instead of 2", len(reply))
	}
	if requestedAt, err = reply[0].AsInt64(); err == nil {
		subscribers, err = reply[1].AsInt64()
	}
	if err != nil {
		return 0, 0, fmt.Errorf("recording the request: reading valkey's answer: %w", err)
	}
	return requestedAt, subscribers, nil
}

// readyScript fails unless publishScript would work: the user may do all that it
// does, and Valkey takes a write. XX changes nothing, as no image is empty, but
// is refused as a change would be (READONLY, OOM, MISCONF, NOREPLICAS, WRONGTYPE).
var readyScript = valkey.NewLuaScript(`
local needed = {
  {'TIME'}, {'ZSCORE', KEYS[1], ''}, {'ZCARD', KEYS[1]}, {'ZADD', KEYS[1], '0', ''},
  {'ZREMRANGEBYSCORE', KEYS[1], '0', '0'}, {'PUBLISH', ARGV[1], ''},
}
for _, command in ipairs(needed) do
  if redis.acl_check_cmd and not redis.acl_check_cmd(unpack(command)) then
    return redis.error_reply('NOPERM this user may not ' .. command[1])
  end
end
return redis.call('ZADD', KEYS[1], 'XX', '0', '')
`)

// ready says whether Valkey answers and would let this user publish.
func (p *publisher) ready(ctx context.Context) error {
	return valkeyError("checking", readyScript.Exec(ctx, p.client, []string{requestedKey(p.channel)}, []string{p.channel}).Error())
}

func (p *publisher) close() { p.client.Close() }

// subscriber is worker's side of Valkey. Messages and reads have a connection
// each: a command on the subscribing one, sent from its callback, can deadlock
// valkey-go.
type subscriber struct {
	messages, reader valkey.Client
	channel          string
	log              *slog.Logger
	lost             atomic.Pointer[error] // why there is no subscription; nil: there is
}

// newSubscriber does not need Valkey to be there, as newPublisher does not.
func newSubscriber(cfg valkeyConfig, log *slog.Logger) (*subscriber, error) {
	small := func(o *valkey.ClientOption) {
		o.RingScaleEachConn = 6
		o.DisableRetry = true // the loops here retry, and log that they do
	}
	messages, err := newValkeyClient(cfg, log, small)
	if err != nil {
		return nil, err
	}
	reader, err := newValkeyClient(cfg, log, small)
	if err != nil {
		messages.Close()
		return nil, err
	}
	s := &subscriber{messages: messages, reader: reader, channel: cfg.Channel, log: log}
	notYet := errors.New("not subscribed yet")
	s.lost.Store(&notYet)
	return s, nil
}

// run subscribes, again and again, until ctx is done. message is called for
// each message, confirmed after each confirmed (re)subscription: what was
// published before that was not heard and has to be read from the set. Neither
// may block.
func (s *subscriber) run(ctx context.Context, message func(payload string), confirmed func()) {
	ctx = valkey.WithOnSubscriptionHook(ctx, func(sub valkey.PubSubSubscription) {
		if sub.Kind != "subscribe" {
			return
		}
		s.lost.Store(nil)
		s.log.Info("subscribed", "channel", s.channel)
		confirmed()
	})
	for ctx.Err() == nil {
		err := s.messages.Receive(ctx, s.messages.B().Subscribe().Channel(s.channel).Build(),
			func(m valkey.PubSubMessage) { message(m.Message) })
		if ctx.Err() != nil {
			return
		}
		if err == nil { // valkey-go's answer to an UNSUBSCRIBE
			err = errors.New("the subscription ended")
		}
		err = valkeyError("subscribing to "+s.channel, err)
		s.setLost(err)
		sleep(ctx, retryDelay(err))
	}
}

// setLost logs a change only: run may come here four times a second.
func (s *subscriber) setLost(err error) {
	before := s.lost.Swap(&err)
	if before == nil || (*before).Error() != err.Error() {
		s.log.Warn("not subscribed", "err", err)
	}
}

// ready is nil while there is a subscription.
func (s *subscriber) ready() error {
	if err := s.lost.Load(); err != nil {
		return *err
	}
	return nil
}

// recorded returns what was asked for within the last window, the newest first,
// and Valkey's clock. Events are returned as they stand: the caller validates
// them.
func (s *subscriber) recorded(ctx context.Context, window time.Duration) (events []event, now time.Time, err error) {
	const doing = "reading recorded requests"
	clock, err := s.reader.Do(ctx, s.reader.B().Time().Build()).AsIntSlice()
	if err != nil {
		return nil, now, valkeyError(doing, err)
	}
	if len(clock) != 2 {
		return nil, now, fmt.Errorf("%s: valkey answered TIME with %d values instead of 2", doing, len(clock))
	}
	now = time.Unix(clock[0], clock[1]*int64(time.Microsecond))
	since := strconv.FormatInt(now.Add(-window).UnixMicro(), 10)
	// web keeps to maxRecorded. The limit is for a set that web did not write.
	entries, err := s.reader.Do(ctx, s.reader.B().Zrevrangebyscore().Key(requestedKey(s.channel)).
		Max("+inf").Min(since).Withscores().Limit(0, maxRecorded).Build()).AsZScores()
	for _, entry := range entries {
		events = append(events, event{entry.Member, int64(entry.Score)})
	}
	return events, now, valkeyError(doing, err)
}

func (s *subscriber) close() {
	s.messages.Close()
	s.reader.Close()
}

func requestedKey(channel string) string { return channel + ":requested" }

// newValkeyClient returns a client of one connection that notices a dead or
// silent peer within 5 s: valkey-go pings an idle connection every KeepAlive
// and waits ConnWriteTimeout for the answer.
func newValkeyClient(cfg valkeyConfig, log *slog.Logger, adjust func(*valkey.ClientOption)) (valkey.Client, error) {
	o := valkey.ClientOption{
		InitAddress:         []string{cfg.Addr},
		Username:            cfg.Username,
		Password:            cfg.Password,
		Dialer:              net.Dialer{Timeout: 2 * time.Second, KeepAlive: time.Second},
		ConnWriteTimeout:    2 * time.Second,
		ReadBufferEachConn:  64 << 10,
		WriteBufferEachConn: 64 << 10,
		PipelineMultiplex:   -1,
		AlwaysPipelining:    true,
		ForceSingleClient:   true,
		// What follows is left off because it would need rights that the ACL of
		// k8s/ does not give.
		DisableCache:  true,
		ClientSetInfo: valkey.DisableClientSetInfo,
	}
	if cfg.TLS {
		o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.TLSRoots}
	}
	adjust(&o)
	client, err := valkey.NewClient(o)
	if client == nil {
		return nil, fmt.Errorf("connecting to valkey at %s: %w", cfg.Addr, err)
	}
	if err != nil { // it connects when it is used
		log.Warn("valkey cannot be reached yet", "addr", cfg.Addr, "err", valkeyError("connecting", err))
	}
	return client, nil
}

// refusedError is Valkey refusing what it will refuse again until somebody
// mends the configuration.
type refusedError struct {
	err  error
	hint string // what to mend
}

func (e *refusedError) Error() string { return e.err.Error() + "; " + e.hint }
func (e *refusedError) Unwrap() error { return e.err }

// valkeyError says what was being done, and, where only an operator can help,
// what to mend. Everything else passes: Valkey restarts, loads, fails over.
func valkeyError(doing string, err error) error {
	if err == nil {
		return nil
	}
	wrapped := fmt.Errorf("valkey: %s: %w", doing, err)
	refused, ok := valkey.IsValkeyErr(err)
	if !ok {
		return wrapped
	}
	code, _, _ := strings.Cut(refused.Error(), " ")
	if strings.Contains(refused.Error(), "ACL failure in script") {
		code = "NOPERM" // as a command in a script is told
	}
	switch code {
	case "NOAUTH", "WRONGPASS":
		return &refusedError{wrapped, "check VALKEY_USERNAME and VALKEY_PASSWORD"}
	case "NOPERM":
		return &refusedError{wrapped, "check this user's ACL in Valkey; docs/deployment.md lists what it needs"}
	case "WRONGTYPE":
		return &refusedError{wrapped, "another program uses the key; choose another VALKEY_CHANNEL"}
	}
	return wrapped
}

// retryDelay is how long to wait after an error of Valkey's.
func retryDelay(err error) time.Duration {
	if refused := (*refusedError)(nil); errors.As(err, &refused) {
		return configurationDelay
	}
	return transientDelay
}

// sleep waits for d or until ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
