package demo

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sync/errgroup"

	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/source"
)

// The three services.
const (
	Documents = "documents-service"
	Trusty    = "trusty-service"
	Utility   = "utility-service"
)

const (
	firstWait  = 20 * time.Second // for the first SVID and the first policies
	maxSerials = 256              // serial numbers that are remembered for each peer
)

// ServiceConfig says which of the three services this process is.
type ServiceConfig struct {
	// Name is Documents, Trusty or Utility.
	Name string
	// Control is the path of the Unix socket on which the demo talks to the service. It must not exist.
	Control string
	// Documents is the address of the documents-service, for the two that call it.
	Documents string
	// Stderr gets the log.
	Stderr io.Writer
}

// state is what a service tells about itself on its control socket.
type state struct {
	ID       string    `json:"id"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"not_after"`
	// Listen is where the documents-service is served.
	Listen string `json:"listen,omitempty"`
}

// RunService is one of the three services: it gets its identity from the Workload API named by SPIFFE_ENDPOINT_SOCKET and
// runs until ctx ends.
func RunService(ctx context.Context, c ServiceConfig) error {
	log := slog.New(slog.NewTextHandler(c.Stderr, nil))
	first, cancel := context.WithTimeout(ctx, firstWait)
	defer cancel()
	x509Source, err := workloadapi.NewX509Source(first)
	if err != nil {
		return fmt.Errorf("fetching the first X509-SVID: %w", err)
	}
	defer x509Source.Close()
	jwtSource, err := workloadapi.NewJWTSource(first)
	if err != nil {
		return fmt.Errorf("fetching the JWT bundles: %w", err)
	}
	defer jwtSource.Close()
	control := http.NewServeMux()
	if c.Name != Documents {
		k, err := newCaller(c.Documents, x509Source, jwtSource)
		if err != nil {
			return err
		}
		control.HandleFunc("GET /state", stateHandler(x509Source, ""))
		control.HandleFunc("GET /call", k.call)
		control.HandleFunc("POST /traffic", k.begin)
		control.HandleFunc("GET /traffic", k.count)
		return serve(ctx, c.Control, control, k.run)
	}
	policies, err := source.New(first, source.Options{Log: log})
	if err != nil {
		return err
	}
	defer policies.Close()
	authorizer, err := httpauthz.New(httpauthz.Config{Policies: policies, Service: policies.ServiceID(), JWTBundles: jwtSource, Log: log})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	l := &library{seen: make(map[string][]string)}
	server := authorizer.Server(l.handler(), x509Source, x509Source)
	server.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelInfo)
	control.HandleFunc("GET /state", stateHandler(x509Source, listener.Addr().String()))
	control.HandleFunc("GET /seen", l.told)
	return serve(ctx, c.Control, control, func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { _ = server.Close() })
		defer stop()
		return closed(server.ServeTLS(listener, "", ""))
	})
}

// serve serves the control socket and runs work until ctx ends or one of the two does.
func serve(ctx context.Context, path string, control http.Handler, work func(context.Context) error) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	server := &http.Server{Handler: control, ReadHeaderTimeout: 10 * time.Second}
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	g.Go(func() error { return closed(server.Serve(listener)) })
	g.Go(func() error { return work(ctx) })
	return g.Wait()
}

// closed takes the end that was asked for as none.
func closed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func stateHandler(svids *workloadapi.X509Source, listen string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		svid, err := svids.GetX509SVID()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		answer(w, state{ID: svid.ID.String(), Serial: serial(svid.Certificates[0]), NotAfter: svid.Certificates[0].NotAfter, Listen: listen})
	}
}

func serial(c *x509.Certificate) string { return c.SerialNumber.Text(16) }

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a demo that is gone needs no answer
}

// A library is the documents-service behind its enforcement point. It is safe for concurrent use.
type library struct {
	mu sync.Mutex
	// seen holds the serial numbers of the X509-SVIDs that callers came with, by SPIFFE ID.
	seen map[string][]string
}

func (l *library) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/documents/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "document %q", r.PathValue("id"))
	})
	mux.HandleFunc("POST /v1/documents/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "document %q written", r.PathValue("id")) // no policy of the demo lets anybody get here
	})
	mux.HandleFunc("GET /v1/archive/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "archived document %q", r.PathValue("id"))
	})
	mux.HandleFunc("GET /v1/health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "fine") })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if peer, known := httpauthz.PeerID(r.Context()); known {
			l.mu.Lock()
			l.seen[peer.Path()] = remember(l.seen[peer.Path()], serial(r.TLS.PeerCertificates[0]))
			l.mu.Unlock()
		}
		mux.ServeHTTP(w, r)
	})
}

// told answers which serial numbers were seen.
func (l *library) told(w http.ResponseWriter, _ *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	answer(w, l.seen)
}

// remember adds a serial number, unless it is known or there are enough.
func remember(serials []string, s string) []string {
	if len(serials) >= maxSerials || slices.Contains(serials, s) {
		return serials
	}
	return append(serials, s)
}
