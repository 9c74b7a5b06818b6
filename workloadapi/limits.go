package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
)

// A CallLimit bounds open calls, all of them and those of one caller.
type CallLimit[K comparable] struct {
	total, each int

	mu   sync.Mutex
	all  int
	open map[K]int
}

// NewCallLimit returns a limit of total calls, and each for one caller.
func NewCallLimit[K comparable](total, each int) *CallLimit[K] {
	return &CallLimit[K]{total: total, each: each, open: map[K]int{}}
}

// Take counts one more call of a caller, for which Put is called when it has ended. The error is ErrBusy.
func (l *CallLimit[K]) Take(caller K) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= l.total {
		return fmt.Errorf("%d calls are open in all: %w", l.all, ErrBusy)
	}
	if l.open[caller] >= l.each {
		return fmt.Errorf("%v has %d calls open: %w", caller, l.open[caller], ErrBusy)
	}
	l.all++
	l.open[caller]++
	return nil
}

// Put gives up what Take counted.
func (l *CallLimit[K]) Put(caller K) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.open[caller]--; l.open[caller] == 0 {
		delete(l.open, caller)
	}
}

// A CallRate bounds how many calls a second a caller begins.
type CallRate[K comparable] struct {
	each  rate.Limit
	burst int

	mu    sync.Mutex
	known map[K]*rate.Limiter
}

const (
	// burstSeconds is how many seconds' worth of calls may come at once, after a pause: programs start with many.
	burstSeconds = 5

	// maxRated bounds the callers that are remembered.
	maxRated = 16384
)

// NewCallRate returns a bound of so many calls a second for one caller; 0 is none.
func NewCallRate[K comparable](perSecond int) *CallRate[K] {
	return &CallRate[K]{each: rate.Limit(perSecond), burst: burstSeconds * perSecond, known: map[K]*rate.Limiter{}}
}

// Take counts a call. The error is ErrTooFast.
func (r *CallRate[K]) Take(caller K) error {
	if !r.TakeMany(caller, 1) {
		return fmt.Errorf("%v begins more than %v calls a second: %w", caller, r.each, ErrTooFast)
	}
	return nil
}

// TakeMany counts n of whatever is bounded, and returns false if that is too many.
func (r *CallRate[K]) TakeMany(caller K, n int) bool {
	if r.each <= 0 {
		return true
	}
	r.mu.Lock()
	l := r.known[caller]
	if l == nil {
		r.forget()
		l = rate.NewLimiter(r.each, r.burst)
		r.known[caller] = l
	}
	r.mu.Unlock()
	return l.AllowN(time.Now(), n)
}

// forget makes room for one more: those who have paused lose nothing by it. If none has, everybody begins afresh. It is
// called with mu held.
func (r *CallRate[K]) forget() {
	if len(r.known) < maxRated {
		return
	}
	for caller, l := range r.known {
		if l.Tokens() >= float64(r.burst) {
			delete(r.known, caller)
		}
	}
	if len(r.known) >= maxRated {
		clear(r.known)
	}
}

// A RefusalLog writes down calls that were not answered, as many as an operator can read: callers repeat themselves, and
// hostile ones must not fill a disk.
type RefusalLog struct {
	log   *slog.Logger
	limit *rate.Limiter

	mu      sync.Mutex
	skipped int
}

// NewRefusalLog returns a RefusalLog that writes to log.
func NewRefusalLog(log *slog.Logger) *RefusalLog {
	return &RefusalLog{log: log, limit: rate.NewLimiter(5, 50)}
}

// Note writes down a call that ended with code because of err, unless it was the client's own end. More says who called.
func (r *RefusalLog) Note(ctx context.Context, method string, code codes.Code, err error, more ...slog.Attr) {
	var level slog.Level
	switch code {
	case codes.OK, codes.Canceled, codes.DeadlineExceeded, codes.Unimplemented:
		return
	case codes.Internal, codes.Unknown:
		level = slog.LevelError
	default:
		level = slog.LevelInfo
	}
	if errors.Is(context.Cause(ctx), ErrStopping) {
		return
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

	attrs := append([]slog.Attr{slog.String("method", method), slog.String("code", code.String()), slog.Any("err", err)}, more...)
	if skipped > 0 {
		attrs = append(attrs, slog.Int("not_logged", skipped))
	}
	r.log.LogAttrs(ctx, level, "call refused", attrs...)
}
