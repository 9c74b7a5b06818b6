// Package inject puts `signet proxy` into pods that ask for it by a label, as a native sidecar: it is the server of a mutating
// admission webhook, and keeps the certificate of that server and the authorities by which API servers verify it. It answers
// whoever asks, since a webhook cannot tell an API server from a stranger, and so it does nothing but answer: what it says depends on the
// question and on its configuration alone, and holds no secret. [docs/decisions/0041]
package inject

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/netutil"
	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/authority"
)

// Path is where admission reviews are posted.
const Path = "/inject"

const (
	// maxReviewBytes bounds a review. An API server takes objects of at most 3 MiB.
	maxReviewBytes = 4 << 20
	// maxConnections bounds connections, and maxReviews the reviews that are read and answered at once, and with them memory.
	maxConnections = 1024
	maxReviews     = 16
	readTimeout    = 10 * time.Second
	bodyTimeout    = 2 * time.Second // of a review, once it is its turn
	writeTimeout   = 10 * time.Second
	idleTimeout    = time.Minute
	maxHeaderBytes = 16 << 10
	shutdownTime   = 5 * time.Second
)

// DefaultSocketName is what the agent's socket is called.
const DefaultSocketName = "agent.sock"

// Options say what is put into pods.
type Options struct {
	// TrustDomain is that of SPIFFE IDs that are written relative.
	TrustDomain spiffeid.TrustDomain
	// Image is the proxy's image.
	Image string
	// Volume is hostPath or csi: how the pod reaches the agent's socket, unless it says otherwise.
	Volume string
	// HostPath is the directory of the agent's socket on nodes, and SocketName the socket's name in it.
	HostPath, SocketName string
}

// Configurations are the MutatingWebhookConfigurations of an API server.
type Configurations interface {
	List(ctx context.Context, o metav1.ListOptions) (*admissionregistrationv1.MutatingWebhookConfigurationList, error)
	Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
	Patch(ctx context.Context, name string, kind types.PatchType, patch []byte, o metav1.PatchOptions, subresources ...string) (*admissionregistrationv1.MutatingWebhookConfiguration, error)
}

// Config is what a Server works with.
type Config struct {
	Options
	// Cluster is the cluster's name in the CA's configuration, and Configurations those of its API server.
	Cluster        string
	Configurations Configurations
	// Namespace is the CA's own, whose pods are left alone, and Webhook the name of the MutatingWebhookConfiguration whose
	// caBundle is kept.
	Namespace, Webhook string
	// Listen is where API servers reach the webhook.
	Listen string

	// Sign signs the webhook's own X509-SVID for a key, and logs it.
	Sign func(context.Context, crypto.PublicKey) (*authority.X509SVID, error)
	// Active names the active X.509 authority; Roots are the authorities of the bundle.
	Active func() string
	Roots  func() []*x509.Certificate

	Now func() time.Time
	Log *slog.Logger

	counts *counts // nil: nothing is counted
}

// A Server is the webhook of one cluster.
type Server struct {
	c        Config
	listener net.Listener
	held     *held
	web      *http.Server
	bundle   *bundleKeeper
	reviews  *turns
}

// New listens. It makes no request.
func New(c Config) (*Server, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	c.counts = &counts{}
	s := &Server{c: c, listener: l, reviews: newTurns()}
	s.bundle = newBundleKeeper(&s.c)
	s.held = &held{c: &s.c, trusted: s.bundle.trusts}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+Path, s.serve)
	s.web = &http.Server{Handler: mux, TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, Time: c.Now, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.held.get() }},
		ReadTimeout: readTimeout, ReadHeaderTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)} // strangers must not fill the log
	return s, nil
}

// Addr is where the webhook listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Close stops listening, if Run was not called.
func (s *Server) Close() error { return s.listener.Close() }

// Run serves until ctx ends or the listener fails, and keeps the webhook's certificate fresh.
func (s *Server) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	failed := make(chan error, 1)
	go func() {
		failed <- s.web.ServeTLS(netutil.LimitListener(newFairListener(s.listener), maxConnections), "", "")
		stop()
	}()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.bundle.watch(ctx)
	}()
	s.held.run(ctx)
	<-watched
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
	defer cancel()
	if err := s.web.Shutdown(sctx); err != nil {
		s.web.Close()
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("the admission webhook: %w", err)
	}
	return nil
}

// Lead keeps the caBundle of the webhook's configuration until ctx ends. One replica does it at a time.
func (s *Server) Lead(ctx context.Context) error { return s.bundle.lead(ctx) }

// serve answers one admission review.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		http.Error(w, "Content-Type is not application/json", http.StatusUnsupportedMediaType)
		return
	}
	done, ok := s.reviews.take(r.Context(), r.RemoteAddr)
	if !ok {
		return
	}
	defer done()
	// API servers send what they ask at once. What is slow is a stranger's, who holds a slot.
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil {
		http.Error(w, "the review cannot be read", http.StatusInternalServerError)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReviewBytes))
	if err != nil {
		http.Error(w, "the review cannot be read, or is too large", http.StatusRequestEntityTooLarge)
		return
	}
	answer, err := s.c.review(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(answer) // who hangs up has no answer
}

// review answers the bytes of an AdmissionReview by the bytes of another one. An error says that it is none.
func (c *Config) review(body []byte) ([]byte, error) {
	var in question
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, errors.New("the body is not an AdmissionReview in JSON")
	}
	req := in.Request
	if in.APIVersion != "admission.k8s.io/v1" || in.Kind != "AdmissionReview" || req == nil || req.UID == "" || len(req.UID) > 128 {
		return nil, errors.New("the body is not an AdmissionReview of admission.k8s.io/v1 with a request and its uid")
	}
	resp := &admissionv1.AdmissionResponse{UID: req.UID, Allowed: true}
	if p, err := c.judge(&in); err != nil {
		c.counts.add(func(n *counts) *atomic.Uint64 { return &n.refused })
		resp.Allowed = false
		resp.Result = &metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonInvalid, Code: http.StatusUnprocessableEntity, Message: "signet: " + err.Error()}
	} else if p != nil {
		c.counts.add(func(n *counts) *atomic.Uint64 { return &n.injected })
		kind := admissionv1.PatchTypeJSONPatch
		resp.Patch, resp.PatchType = p, &kind
	}
	out := admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"}, Response: resp}
	return json.Marshal(out)
}

// excluded are namespaces that no configuration of the webhook can open to it.
var excluded = []string{"kube-system", "kube-public", "kube-node-lease"}

// judge returns the patch for what is asked; nil: it stays as it is.
func (c *Config) judge(q *question) ([]byte, error) {
	req := q.Request
	if req.Operation != admissionv1.Create || req.Resource.Group != "" || req.Resource.Resource != "pods" || req.SubResource != "" ||
		slices.Contains(excluded, req.Namespace) || req.Namespace == c.Namespace {
		return nil, nil
	}
	var p pod
	if err := json.Unmarshal(req.Object, &p); err != nil {
		if errors.Is(err, errTooMany) {
			return nil, fmt.Errorf("the pod is not taken: %w", errTooMany)
		}
		return nil, errors.New("the pod cannot be read")
	}
	return patch(&p, req.Namespace, c.Options)
}
