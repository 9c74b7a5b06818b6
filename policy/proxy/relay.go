package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

var (
	// errTruncated says that a TLS peer ended its connection without saying so: somebody between may have cut it off.
	errTruncated = errors.New("the connection ended without a close_notify, so what came may not be all")
	errIdle      = errors.New("nothing was passed on for too long")
)

// An end is one of the two ends of a relayed connection.
type end struct {
	*wire
	tls *tls.Conn // over wire; nil: in the clear
}

// A relay passes bytes on between two ends until both directions have ended, or one has failed. It passes on the end of
// each direction by itself: a FIN as a close_notify, and the other way round. What ends by an error ends with resets.
type relay struct {
	a, b end
	// idle is how long neither direction may pass on anything, halfClosed the same once one of them has ended.
	idle, halfClosed time.Duration

	// Bytes that were passed on.
	aToB, bToA atomic.Int64

	start time.Time
	last  atomic.Int64 // when something was passed on last, in nanoseconds since start

	mu    sync.Mutex
	limit time.Duration // idle or halfClosed
	watch *time.Timer   // checks last; nil: it has ended
	cause error         // the first reason to end it
}

// run returns when both directions have ended and both ends are closed: nil if each was closed in order.
func (r *relay) run() error {
	r.start = time.Now()
	r.a.polled, r.b.polled = true, true
	r.mu.Lock()
	r.limit = r.idle
	r.watch = time.AfterFunc(r.limit, r.checkIdle)
	r.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.direction(r.a, r.b, &r.aToB)
	}()
	r.direction(r.b, r.a, &r.bToA)
	<-done
	r.mu.Lock()
	r.watch.Stop()
	r.watch = nil
	err := r.cause
	r.mu.Unlock()
	r.a.release()
	r.b.release()
	_, _ = r.a.Close(), r.b.Close() // both directions have ended: nothing is lost
	return err
}

// abort ends both directions.
func (r *relay) abort(cause error) {
	r.mu.Lock()
	if r.cause == nil {
		r.cause = cause
	}
	r.mu.Unlock()
	r.a.Reset()
	r.b.Reset()
}

// checkIdle ends a connection on which nothing happens, or looks again later.
func (r *relay) checkIdle() {
	r.mu.Lock()
	if r.watch == nil {
		r.mu.Unlock()
		return
	}
	quiet := time.Since(r.start) - time.Duration(r.last.Load())
	if quiet < r.limit {
		r.watch.Reset(r.limit - quiet)
		r.mu.Unlock()
		return
	}
	r.mu.Unlock()
	r.abort(errIdle)
}

// direction passes on what comes from one end until that has said that it sends no more.
func (r *relay) direction(from, to end, count *atomic.Int64) {
	var err error
	if from.tls != nil {
		err = r.decrypt(from, to, count)
	} else {
		err = r.passOn(from, to, count)
	}
	if err == io.EOF {
		err = to.closeWrite()
	}
	if err != nil {
		r.abort(err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watch != nil && r.limit != r.halfClosed {
		r.limit = r.halfClosed
		r.watch.Reset(r.limit)
	}
}

// passOn reads in the clear.
func (r *relay) passOn(from, to end, count *atomic.Int64) error {
	for {
		if err := from.fill(); err != nil {
			return err
		}
		n := len(from.rest)
		if err := r.write(to, from.rest, count); err != nil {
			return err
		}
		from.taken(n)
	}
}

// decrypt reads TLS: as many records as are there at once.
func (r *relay) decrypt(from, to end, count *atomic.Int64) error {
	for {
		if err := r.decryptHeld(from, to, count); err != nil {
			return err
		}
		if err := from.fill(); err == io.EOF {
			return errTruncated
		} else if err != nil {
			return err
		}
	}
}

// decryptHeld passes on whatever was received already.
func (r *relay) decryptHeld(from, to end, count *atomic.Int64) error {
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	for {
		n := 0
		var err error
		for n < len(*b) && err == nil {
			var m int
			m, err = from.tls.Read((*b)[n:])
			n += m
		}
		if n > 0 {
			if err := r.write(to, (*b)[:n], count); err != nil {
				return err
			}
		}
		if err == errWait {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *relay) write(to end, b []byte, count *atomic.Int64) error {
	r.last.Store(int64(time.Since(r.start)))
	if err := to.write(b); err != nil {
		return err
	}
	count.Add(int64(len(b)))
	r.last.Store(int64(time.Since(r.start)))
	return nil
}

func (e end) write(b []byte) error {
	if e.tls == nil {
		_, err := e.wire.Write(b)
		return err
	}
	return e.together(func() error {
		_, err := e.tls.Write(b)
		return err
	})
}

// closeWrite says to the end's peer that no more comes.
func (e end) closeWrite() error {
	if e.tls != nil {
		return e.tls.CloseWrite()
	}
	return e.CloseWrite()
}
