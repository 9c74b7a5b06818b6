package proxy

import (
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// lines is a log that is read while it is written.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

// TestWhatIsMissingIsLogged: a proxy that never gets ready, such as one for a service whose SPIFFE ID its pod does not have, says why in its
// log: nobody else can, since a kubelet shows of /ready no more than a status.
func TestWhatIsMissingIsLogged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, allowCaller)
	w.give(w.ca.SVID(t, "/another", time.Hour))
	var log lines
	c := inboundConfig("tcp", "127.0.0.1:1")
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	w.start(t, c)
	eventually(t, "the log says why", func() bool {
		return log.count(`level=WARN msg="not ready" missing="listener in: the agent gives this process no X509-SVID of spiffe://example.org/service, but of spiffe://example.org/another`) == 1
	})
	w.give(w.ca.SVID(t, "/service", time.Hour))
	eventually(t, "the log says that nothing is missing", func() bool { return log.count("nothing is missing any more") == 1 })
	if n := log.count("not ready"); n != 1 {
		t.Errorf("it was said %d times", n)
	}
}
