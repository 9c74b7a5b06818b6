package sds

import (
	"context"
	"log/slog"
	"strconv"
	"sync"
	"unicode/utf8"

	"golang.org/x/time/rate"

	"github.com/signet-id/signet/workloadapi/peer"
)

// maxMessageBytes bounds what is kept of a text that an Envoy sends.
const maxMessageBytes = 512

// rejections writes down what Envoys refuse, as much as an operator can read: what they say is theirs, and hostile ones
// must not fill a disk.
type rejections struct {
	log   *slog.Logger
	count func()
	limit *rate.Limiter

	mu      sync.Mutex
	skipped int
}

func newRejections(log *slog.Logger, count func()) *rejections {
	return &rejections{log: log, count: count, limit: rate.NewLimiter(1, 20)}
}

func (r *rejections) note(ctx context.Context, method string, refused refusal) {
	if r.count != nil {
		r.count()
	}
	r.mu.Lock()
	if !r.limit.Allow() {
		r.skipped++
		r.mu.Unlock()
		return
	}
	skipped := r.skipped
	r.skipped = 0
	r.mu.Unlock()

	attrs := []slog.Attr{slog.String("method", method), slog.String("said", printable(refused.message)), slog.String("nonce", refused.nonce)}
	if p, err := peer.FromContext(ctx); err == nil {
		attrs = append(attrs, slog.Int("pid", int(p.PID)), slog.Uint64("uid", uint64(p.UID)))
	}
	if skipped > 0 {
		attrs = append(attrs, slog.Int("not_logged", skipped))
	}
	r.log.LogAttrs(ctx, slog.LevelWarn, "Envoy refuses what SDS sent, and keeps what it had", attrs...)
}

// printable bounds a foreign text and makes it harmless on a terminal.
func printable(s string) string {
	cut := ""
	if len(s) > maxMessageBytes {
		n := maxMessageBytes
		for n > 0 && !utf8.RuneStart(s[n]) {
			n--
		}
		s, cut = s[:n], "..."
	}
	quoted := strconv.QuoteToASCII(s)
	return quoted[1:len(quoted)-1] + cut
}
