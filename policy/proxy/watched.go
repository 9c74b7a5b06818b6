package proxy

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// A watchedResponse ends a request of which neither body nor answer moves for too long, WebSockets included.
type watchedResponse struct {
	http.ResponseWriter
	request *http.Request
	status  int

	limit  time.Duration
	start  time.Time
	last   atomic.Int64 // when something moved last, in nanoseconds since start
	cancel context.CancelFunc

	mu       sync.Mutex
	timer    *time.Timer // nil: the request has ended
	hijacked net.Conn
}

// watch returns the response, with a request in place of r; stop must be called when it has ended.
func watch(w http.ResponseWriter, r *http.Request, limit time.Duration) *watchedResponse {
	ctx, cancel := context.WithCancel(r.Context())
	v := &watchedResponse{ResponseWriter: w, status: http.StatusOK, limit: limit, start: time.Now(), cancel: cancel}
	v.request = r.WithContext(ctx)
	if r.Body != nil && r.Body != http.NoBody {
		v.request.Body = &watchedBody{r.Body, v}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.timer = time.AfterFunc(limit, v.check)
	return v
}

func (v *watchedResponse) stop() {
	v.mu.Lock()
	v.timer.Stop()
	v.timer = nil
	v.mu.Unlock()
	v.cancel()
}

func (v *watchedResponse) moved() { v.last.Store(int64(time.Since(v.start))) }

func (v *watchedResponse) check() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.timer == nil {
		return
	}
	if quiet := time.Since(v.start) - time.Duration(v.last.Load()); quiet < v.limit {
		v.timer.Reset(v.limit - quiet)
		return
	}
	v.cancel()
	if v.hijacked != nil {
		_ = v.hijacked.Close() // it is to end, whatever it says
		return
	}
	// Whoever reads the body or writes the answer is to return. Not all of net/http's responses know deadlines; their contexts
	// have ended all the same.
	rc := http.NewResponseController(v.ResponseWriter)
	_, _ = rc.SetReadDeadline(noTime), rc.SetWriteDeadline(noTime)
}

// Unwrap is for http.ResponseController.
func (v *watchedResponse) Unwrap() http.ResponseWriter { return v.ResponseWriter }

// WriteHeader is http.ResponseWriter's.
func (v *watchedResponse) WriteHeader(status int) {
	if status >= 200 {
		v.status = status
	}
	v.ResponseWriter.WriteHeader(status)
}

// Write is http.ResponseWriter's.
func (v *watchedResponse) Write(b []byte) (int, error) {
	v.moved()
	n, err := v.ResponseWriter.Write(b)
	v.moved()
	return n, err
}

// Hijack is http.Hijacker's.
func (v *watchedResponse) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(v.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	v.mu.Lock()
	v.hijacked, v.status = c, http.StatusSwitchingProtocols
	v.mu.Unlock()
	v.moved()
	return &watchedConn{c, v}, rw, nil
}

type watchedBody struct {
	io.ReadCloser
	v *watchedResponse
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.v.moved()
	}
	return n, err
}

type watchedConn struct {
	net.Conn
	v *watchedResponse
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.v.moved()
	}
	return n, err
}

func (c *watchedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if n > 0 {
		c.v.moved()
	}
	return n, err
}

// CloseWrite passes on the end of one direction.
func (c *watchedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
