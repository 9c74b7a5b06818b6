package kube

import (
	"context"
	"log/slog"
	"regexp"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// LogTo sends what client-go itself logs to log. client-go has one logger in a process, and no lock for it: the first call
// counts, before any request.
//
// What an operator needs to know the parts of the CA say themselves, so its information is for whoever debugs and its errors
// are warnings, each once a minute. Its verbose lines, which can hold requests and answers, are dropped at any level.
func LogTo(log *slog.Logger) {
	logTo.Do(func() { klog.SetSlogLogger(slog.New(newForeign(log))) })
}

var logTo sync.Once

func newForeign(log *slog.Logger) *foreign {
	return &foreign{next: log.With("component", "client-go").Handler(), seen: &seen{at: map[string]time.Time{}}}
}

const (
	repeatLine    = time.Minute
	maxSeenLines  = 256
	maxForeignLen = 512
)

// foreign is a slog.Handler of lines that others wrote.
type foreign struct {
	next slog.Handler
	seen *seen
}

// Enabled implements slog.Handler. client-go's V(1) and above are below LevelInfo.
func (f *foreign) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelInfo && f.next.Enabled(ctx, level(l))
}

func level(l slog.Level) slog.Level {
	if l >= slog.LevelWarn {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Handle implements slog.Handler.
func (f *foreign) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo || !f.seen.first(r.Message, r.Time) {
		return nil
	}
	out := slog.NewRecord(r.Time, level(r.Level), redact(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		out.AddAttrs(redactAttr(a))
		return true
	})
	return f.next.Handle(ctx, out)
}

// WithAttrs implements slog.Handler.
func (f *foreign) WithAttrs(attrs []slog.Attr) slog.Handler {
	clean := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		clean[i] = redactAttr(a)
	}
	return &foreign{f.next.WithAttrs(clean), f.seen}
}

// WithGroup implements slog.Handler.
func (f *foreign) WithGroup(name string) slog.Handler {
	return &foreign{f.next.WithGroup(name), f.seen}
}

func redactAttr(a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindGroup {
		var in []any
		for _, g := range a.Value.Group() {
			in = append(in, redactAttr(g))
		}
		return slog.Group(a.Key, in...)
	}
	return slog.String(a.Key, redact(a.Value.String()))
}

// credentials look like these: what follows Bearer, and JSON Web Tokens.
var credentials = regexp.MustCompile(`(?i:bearer)\s+\S+|eyJ[\w-]{8,}[\w.-]*`)

func redact(s string) string {
	s = credentials.ReplaceAllLiteralString(s, "[credential]")
	if len(s) > maxForeignLen {
		s = s[:maxForeignLen] + "..."
	}
	return s
}

// seen knows which messages were logged lately.
type seen struct {
	mu sync.Mutex
	at map[string]time.Time
}

func (s *seen) first(message string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last, ok := s.at[message]; ok && now.Sub(last).Abs() < repeatLine {
		return false
	}
	if len(s.at) >= maxSeenLines {
		clear(s.at)
	}
	s.at[message] = now
	return true
}
