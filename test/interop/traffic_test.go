package interop

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// A workload is a process on a node: this one, as go-spiffe's library keeps it up to date from that node's agent. It
// outlives the agent, as real ones do.
type workload struct {
	name string
	id   spiffeid.ID
	x509 *workloadapi.X509Source
	jwt  *workloadapi.JWTSource

	mu    sync.Mutex
	token *jwtsvid.SVID // the newest; guarded by mu
}

// newWorkload subscribes to the agent at the socket. id is the ID it goes by, of those that the agent gives.
func newWorkload(t *testing.T, ctx context.Context, a *agent, id string) *workload {
	t.Helper()
	w := &workload{name: a.name, id: spiffeid.RequireFromString(full(id))}
	api := workloadapi.WithClientOptions(workloadapi.WithAddr(a.endpoint()))
	var err error
	if w.x509, err = workloadapi.NewX509Source(ctx, api, workloadapi.WithDefaultX509SVIDPicker(func(svids []x509SVID) x509SVID {
		for _, s := range svids {
			if s.ID == w.id {
				return s
			}
		}
		return svids[0]
	})); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.x509.Close() })
	if w.jwt, err = workloadapi.NewJWTSource(ctx, api); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.jwt.Close() })
	return w
}

const audience = "traffic"

// bearer returns a JWT-SVID to call with: a new one if the agent is there, the last one while it is not and the token is
// good.
func (w *workload) bearer(ctx context.Context) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fetch, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	svid, err := w.jwt.FetchJWTSVID(fetch, jwtsvid.Params{Audience: audience, Subject: w.id})
	if err == nil {
		w.token = svid
	} else if w.token == nil || time.Until(w.token.Expiry) < time.Second {
		return "", fmt.Errorf("no JWT-SVID: %w", err)
	}
	return w.token.Marshal(), nil
}

// call does one mTLS handshake over TCP from w to the server, both sides verifying the other's exact ID, and sends a
// JWT-SVID, which the server verifies with its own bundles.
func (w *workload) call(ctx context.Context, server *workload) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	token, err := w.bearer(ctx)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() {
		served <- func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			s := tls.Server(c, tlsconfig.MTLSServerConfig(server.x509, server.x509, tlsconfig.AuthorizeID(w.id)))
			buf := make([]byte, 16<<10)
			n, err := s.Read(buf)
			if err != nil {
				return fmt.Errorf("%s takes no handshake of %s: %w", server.id, w.id, err)
			}
			if _, err := jwtsvid.ParseAndValidate(string(buf[:n]), server.jwt, []string{audience}); err != nil {
				return fmt.Errorf("%s takes no JWT-SVID of %s: %w", server.id, w.id, err)
			}
			_, err = s.Write([]byte("ok"))
			return err
		}()
	}()
	d := tls.Dialer{Config: tlsconfig.MTLSClientConfig(w.x509, w.x509, tlsconfig.AuthorizeID(server.id))}
	c, err := d.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		l.Close()
		return errors.Join(fmt.Errorf("%s gets no handshake of %s: %w", w.id, server.id, err), <-served)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte(token)); err != nil {
		return errors.Join(err, <-served)
	}
	buf := make([]byte, 2)
	_, err = c.Read(buf)
	return errors.Join(err, <-served)
}

// traffic are calls between all pairs of workloads, both ways, without a break until it is stopped.
type traffic struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	calls  int
	failed []error
}

func startTraffic(ctx context.Context, all ...*workload) *traffic {
	ctx, cancel := context.WithCancel(ctx)
	tr := &traffic{cancel: cancel}
	for _, from := range all {
		for _, to := range all {
			if from == to {
				continue
			}
			tr.wg.Go(func() {
				// Ten calls a second of each pair: the machine has other work to do.
				pace := time.NewTicker(100 * time.Millisecond)
				defer pace.Stop()
				for {
					select {
					case <-ctx.Done():
						return
					case <-pace.C:
					}
					err := from.call(ctx, to)
					if ctx.Err() != nil {
						return
					}
					tr.mu.Lock()
					if tr.calls++; err != nil {
						tr.failed = append(tr.failed, err)
					}
					tr.mu.Unlock()
				}
			})
		}
	}
	return tr
}

// more waits until n more calls have been made.
func (tr *traffic) more(t *testing.T, ctx context.Context, n int) {
	t.Helper()
	tr.mu.Lock()
	goal := tr.calls + n
	tr.mu.Unlock()
	if err := eventually(ctx, func() error {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if tr.calls < goal {
			return fmt.Errorf("%d calls, want %d", tr.calls, goal)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// stop ends the traffic; no call may have failed.
func (tr *traffic) stop(t *testing.T) {
	t.Helper()
	tr.cancel()
	tr.wg.Wait()
	t.Logf("%d calls, %d failed", tr.calls, len(tr.failed))
	if tr.calls == 0 {
		t.Error("there was no traffic")
	}
	for i, err := range tr.failed {
		if i == 10 {
			t.Errorf("... and %d more", len(tr.failed)-i)
			break
		}
		t.Errorf("failed call: %v", err)
	}
}

var errNotRenewed = errors.New("an SVID was not renewed")

func serialOf(t *testing.T, w *workload) string {
	t.Helper()
	return must[x509SVID](t)(w.x509.GetX509SVID()).Certificates[0].SerialNumber.String()
}

// keyID is the key that signed the newest JWT-SVID.
func (w *workload) keyID() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	header, _, _ := strings.Cut(w.token.Marshal(), ".")
	data, _ := base64.RawURLEncoding.DecodeString(header)
	var h struct{ Kid string }
	_ = json.Unmarshal(data, &h)
	return h.Kid
}
