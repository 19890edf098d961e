package main

import (
	"cmp"
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

// The ledger is one sorted set in Valkey, <channel>:requested: canonical references by
// the T of their newest request, a logical clock in microseconds that follows Valkey's.
// PubSub messages are the fast path; the ledger is what a 202 promises.

const (
	// A request stays in the ledger for ledgerAge at least. A T that is further ahead was
	// left by a clock that was wrong.
	ledgerAge = 24 * time.Hour

	maxLedger  = 20_000 // images, for the memory of Valkey and the workers; more are refused
	ledgerPage = 100    // entries that the worker reads at once

	publishTimeout   = 8 * time.Second // clients that never retry give up after 10
	valkeyRetryDelay = 250 * time.Millisecond

	// maxPublishing is well below the 1,024 slots of valkey-go's ring: a command that
	// waits for a slot ignores its context.
	maxPublishing = 256

	// maxElement bounds each text that Valkey sends, and the elements of each list. It
	// exceeds maxMessageBytes.
	maxElement = 16 << 10
)

// publishScript writes the images ARGV[3..] to the ledger KEYS[1] and publishes them on
// the channel ARGV[1], all or none: none, with T 0, if more are new than ARGV[2]. Their T
// grows over all images, whatever becomes of the clock. Entries more than a day ahead are
// dated anew. Old ones are removed only when the bound is near: a clock that is ahead for
// a while must delete nothing.
//
// Lua prints 14 digits of a number, and micros all 16. A double holds them until 2255.
// cjson would escape the slashes of a reference, which has nothing else to escape.
var publishScript = valkey.NewLuaScript(fmt.Sprintf(`
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local day, bound = %d, %d
local micros = function(t) return string.format('%%.0f', t) end
local newest = redis.call('ZRANGE', KEYS[1], micros(now + day), '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')
local at, added = micros(math.max(now, tonumber(newest[2] or 0) + 1)), 0
for i = 3, #ARGV do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not score or tonumber(score) < now - day then added = added + 1 end
end
if added > tonumber(ARGV[2]) then return {0, 0, 0} end
if added > 0 and redis.call('ZCARD', KEYS[1]) + added > bound then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. micros(now - day))
  if redis.call('ZCARD', KEYS[1]) + added > bound then
    return redis.error_reply('FULL too many images were requested within a day')
  end
end
local subscribers = 0
for _, image in ipairs(redis.call('ZRANGE', KEYS[1], '(' .. micros(now + day), '+inf', 'BYSCORE')) do
  redis.call('ZADD', KEYS[1], at, image)
end
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[1], at, ARGV[i])
  subscribers = redis.call('PUBLISH', ARGV[1], '{"image":"' .. ARGV[i] .. '","requestedAt":' .. at .. '}')
end
return {at, subscribers, added}
`, ledgerAge.Microseconds(), maxLedger))

var errBusy = errors.New("too many requests in flight to valkey")

// publisher is web's side of Valkey.
type publisher struct {
	connections
	timeout    time.Duration
	publishing atomic.Int64  // requests in flight
	reading    chan struct{} // a slot for each GET /rollout that reads
}

// publication is what publishScript returns.
type publication struct {
	requestedAt int64 // T
	subscribers int64 // that received the message of the last image
	added       int   // images that nobody had requested within a day
}

func newPublisher(cfg valkeyConfig, log *slog.Logger) *publisher {
	return &publisher{connections: connect(cfg, log), timeout: publishTimeout, reading: make(chan struct{}, maxReading)}
}

// publish runs publishScript, again and again if Valkey is restarting. After an error
// the images may be in the ledger nevertheless, if only the answer was lost.
func (p *publisher) publish(ctx context.Context, images []string, mayAdd int) (publication, error) {
	defer p.publishing.Add(-1)
	if p.publishing.Add(1) > maxPublishing {
		return publication{}, errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	args := append([]string{p.channel, strconv.Itoa(mayAdd)}, images...)
	for last := error(nil); ; sleep(ctx, valkeyRetryDelay) {
		reply, err := publishScript.Exec(ctx, p.client, []string{ledgerKey(p.channel)}, args).AsIntSlice()
		if err == nil && len(reply) == 3 {
			return publication{reply[0], reply[1], int(reply[2])}, nil
		}
		if ctx.Err() == nil || last == nil {
			last = cmp.Or(err, errors.New("not 3 values"))
		}
		if ctx.Err() != nil || valkeyHint(last) != "" {
			return publication{}, valkeyError("writing the ledger", last)
		}
	}
}

// readyScript fails unless the user may run all that publishScript does, and Valkey takes
// a write. ZADD XX changes nothing here, but is refused as a change would be.
var readyScript = valkey.NewLuaScript(`
local needed = {
  {'TIME'}, {'ZRANGE', KEYS[1], '0', '0'}, {'ZSCORE', KEYS[1], ''}, {'ZCARD', KEYS[1]},
  {'ZREMRANGEBYSCORE', KEYS[1], '0', '0'}, {'ZADD', KEYS[1], '0', ''}, {'PUBLISH', ARGV[1], ''},
}
for _, command in ipairs(needed) do
  if redis.acl_check_cmd and not redis.acl_check_cmd(unpack(command)) then
    return redis.error_reply('NOPERM this user may not ' .. command[1])
  end
end
return redis.call('ZADD', KEYS[1], 'XX', '0', '')
`)

// ready reports whether Valkey answers and would let this user publish.
func (p *publisher) ready(ctx context.Context) error {
	return valkeyError("checking", readyScript.Exec(ctx, p.client, []string{ledgerKey(p.channel)}, []string{p.channel}).Error())
}

// subscriber is the worker's side of Valkey.
type subscriber struct {
	connections
	log        *slog.Logger
	subscribed health
}

func newSubscriber(cfg valkeyConfig, log *slog.Logger) *subscriber {
	s := &subscriber{connections: connect(cfg, log), log: log}
	s.subscribed.set(errors.New("not subscribed yet"))
	return s
}

// run stays subscribed until ctx is done. It calls received for each message, and
// confirmed after each (re)subscription: older messages are in the ledger only.
// Neither may block.
func (s *subscriber) run(ctx context.Context, received func(message string), confirmed func()) {
	ctx = valkey.WithOnSubscriptionHook(ctx, func(sub valkey.PubSubSubscription) {
		if sub.Kind != "subscribe" {
			return
		}
		s.subscribed.set(nil)
		subscribed.Set(1)
		s.log.Info("subscribed", "channel", s.channel)
		confirmed()
	})
	for ; ctx.Err() == nil; sleep(ctx, valkeyRetryDelay) {
		err := s.client.Receive(ctx, s.client.B().Subscribe().Channel(s.channel).Build(),
			func(m valkey.PubSubMessage) { received(m.Message) }) // nil after an UNSUBSCRIBE
		err = valkeyError("subscribing to "+s.channel, cmp.Or(err, errors.New("the subscription ended")))
		subscribed.Set(0)
		if s.subscribed.set(err) && ctx.Err() == nil {
			s.log.Warn("not subscribed", "err", err)
		}
	}
}

// time is Valkey's clock.
func (s *subscriber) time(ctx context.Context) (time.Time, error) {
	clock, err := s.reader.Do(ctx, s.reader.B().Time().Build()).AsIntSlice()
	if err != nil || len(clock) != 2 {
		return time.Time{}, valkeyError("reading the time", cmp.Or(err, errors.New("not 2 values")))
	}
	return time.Unix(clock[0], clock[1]*int64(time.Microsecond)), nil
}

// ledger calls use with the entries since a time, the newest first, as they stand: use
// validates them. One that gets a newer T meanwhile moves to the front, so that the pages
// overlap and hide none.
func (s *subscriber) ledger(ctx context.Context, since time.Time, use func(message)) error {
	oldest := strconv.FormatInt(since.UnixMicro(), 10)
	for offset := int64(0); offset < maxLedger; offset += ledgerPage {
		entries, err := s.reader.Do(ctx, s.reader.B().Zrevrangebyscore().Key(ledgerKey(s.channel)).
			Max("+inf").Min(oldest).Withscores().Limit(offset, ledgerPage).Build()).AsZScores()
		if err != nil {
			return valkeyError("reading the ledger", err)
		}
		for _, entry := range entries {
			use(message{entry.Member, int64(entry.Score)})
		}
		if len(entries) < ledgerPage {
			break
		}
	}
	return nil
}

func ledgerKey(channel string) string { return channel + ":requested" }

// health is an error that comes and goes; nil means that all is well.
type health struct{ err atomic.Pointer[error] }

// set reports whether the error is another one than before.
func (h *health) set(err error) (changed bool) {
	previous := h.err.Swap(&err)
	return previous == nil || fmt.Sprint(*previous) != fmt.Sprint(err)
}

// get returns what was set last. Before the first set, it panics.
func (h *health) get() error { return *h.err.Load() }

// connections are the two clients of a process. Reads have their own: web's would keep
// requests waiting, the worker's could deadlock valkey-go on the subscribing connection.
type connections struct {
	client, reader valkey.Client
	channel        string
}

func connect(cfg valkeyConfig, log *slog.Logger) connections {
	return connections{newValkeyClient(cfg, log), newValkeyClient(cfg, log), cfg.Channel}
}

func (c *connections) close() {
	c.client.Close()
	c.reader.Close()
}

// newValkeyClient needs no reachable Valkey. It notices a dead or silent one within 5 s:
// valkey-go pings an idle connection every KeepAlive, and waits ConnWriteTimeout.
func newValkeyClient(cfg valkeyConfig, log *slog.Logger) valkey.Client {
	o := valkey.ClientOption{
		InitAddress:         []string{cfg.Addr},
		DialCtxFn:           dialValkey,
		Username:            cfg.Username,
		Password:            cfg.Password,
		Dialer:              net.Dialer{Timeout: 2 * time.Second, KeepAlive: time.Second},
		ConnWriteTimeout:    2 * time.Second,
		ReadBufferEachConn:  64 << 10,
		WriteBufferEachConn: 64 << 10,
		RingScaleEachConn:   10,
		PipelineMultiplex:   -1,
		AlwaysPipelining:    true,
		ForceSingleClient:   true,
		DisableRetry:        true, // a script may have run although its answer was lost
		// These would need rights that the ACL of k8s/ does not grant.
		DisableCache:  true,
		ClientSetInfo: valkey.DisableClientSetInfo,
	}
	if cfg.TLS {
		o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.TLSRoots}
	}
	client, err := valkey.NewClient(o) // with ForceSingleClient, a client in any case
	if err != nil {
		log.Warn("valkey cannot be reached yet", "addr", cfg.Addr, "err", valkeyError("connecting", err))
	}
	return client
}

// valkeyError says what was being done, and what only an operator can fix.
func valkeyError(doing string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("valkey: %s: %w%s", doing, err, valkeyHint(err))
}

// valkeyHint is empty for what passes by itself: Valkey restarts, loads, fails over.
func valkeyHint(err error) string {
	text := err.Error()
	switch code, _, _ := strings.Cut(text, " "); {
	case code == "NOAUTH" || code == "WRONGPASS":
		return "; check VALKEY_USERNAME and VALKEY_PASSWORD"
	case code == "NOPERM" || strings.Contains(text, "ACL failure in script"):
		return "; check this user's ACL in Valkey; k8s/20-valkey.yaml has what it needs"
	case code == "WRONGTYPE":
		return "; another program uses the key; choose another VALKEY_CHANNEL"
	case code == "FULL":
		return "; wait until a day has passed, or delete the key if it was filled by mistake"
	}
	return ""
}

// sleep waits for d or until ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-ctx.Done()
}

// dialValkey returns a connection whose elements are bounded.
func dialValkey(ctx context.Context, addr string, dialer *net.Dialer, config *tls.Config) (net.Conn, error) {
	dial := dialer.DialContext
	if config != nil {
		dial = (&tls.Dialer{NetDialer: dialer, Config: config}).DialContext
	}
	conn, err := dial(ctx, "tcp", addr)
	return &boundedConn{Conn: conn}, err
}

// boundedConn fails before valkey-go makes room for an element that is too large.
// Whoever can write to Valkey could exhaust the worker's memory otherwise.
type boundedConn struct {
	net.Conn
	line []byte // the beginning of the present line
	blob int    // bytes that are left of the present blob
}

// Read follows the framing of RESP: the line of a blob or a list is its type and
// its length. https://valkey.io/topics/protocol/
func (c *boundedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	for _, char := range b[:n] {
		switch {
		case c.blob > 0:
			c.blob--
		case char != '\n' && len(c.line) < 16:
			c.line = append(c.line, char)
		case char == '\n':
			line := strings.TrimSpace(string(c.line))
			c.line = c.line[:0]
			if line == "" || !strings.Contains("$!=*~>%|", line[:1]) {
				continue
			}
			size, err := strconv.Atoi(line[1:])
			if err != nil || size > maxElement {
				return 0, fmt.Errorf("an element of size %s, expected at most %d", sanitize(line[1:]), maxElement)
			}
			if size >= 0 && strings.Contains("$!=", line[:1]) {
				c.blob = size + len("\r\n")
			}
		}
	}
	return n, err
}
