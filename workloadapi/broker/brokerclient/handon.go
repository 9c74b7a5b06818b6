package brokerclient

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// A handOn passes states to a Keeper: the first at once, one that takes something away at once, others after a moment of
// chance, the newest alone. [Broker API §4.4]
type handOn[T any] struct {
	keep    Keeper[T]
	jitter  time.Duration
	without func(now, before T) bool
	log     *slog.Logger

	mu      sync.Mutex // held over calls of keep, so that these come one after the other
	has     bool
	state   T // what keep has, if has
	timer   *time.Timer
	waiting bool
	next    T // what the timer will hand on, if waiting
	closed  bool
}

func newHandOn[T any](keep Keeper[T], jitter time.Duration, without func(now, before T) bool, log *slog.Logger) *handOn[T] {
	return &handOn[T]{keep: keep, jitter: jitter, without: without, log: log}
}

func (h *handOn[T]) take(state T) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.has || h.jitter <= 0 || h.without(state, h.state) {
		h.stop()
		h.pass(state)
		return
	}
	h.next = state
	if !h.waiting {
		h.waiting = true
		h.timer = time.AfterFunc(rand.N(h.jitter), h.late) // a moment, not a secret
	}
}

// late hands on what has waited.
func (h *handOn[T]) late() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.waiting || h.closed {
		return
	}
	h.waiting = false
	h.pass(h.next)
}

// pass is called with mu held.
func (h *handOn[T]) pass(state T) {
	h.has, h.state = true, state
	if err := h.keep.Take(state); err != nil {
		h.log.LogAttrs(context.Background(), slog.LevelError, "a workload's new state was not kept", slog.Any("err", err))
	}
}

// stop is called with mu held.
func (h *handOn[T]) stop() {
	if h.waiting {
		h.waiting = false
		h.timer.Stop()
	}
	var none T
	h.next = none
}

// drop removes what keep has.
func (h *handOn[T]) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stop()
	var none T
	h.has, h.state = false, none
	h.keep.Drop()
}

// close drops everything for good.
func (h *handOn[T]) close() {
	h.drop()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
}
