package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/policy/httpauthz"
)

const (
	trafficEvery = 10 * time.Millisecond // between two rounds of the live traffic
	callWait     = 10 * time.Second
	maxBody      = 4 << 10
)

// A caller is trusty-service or utility-service: it calls the documents-service over mTLS when the demo tells it to.
type caller struct {
	address string
	x509    *workloadapi.X509Source
	jwt     *workloadapi.JWTSource
	// fresh makes a connection for each call. kept keeps one until there is a new X509-SVID, which the next is made with.
	fresh, kept *http.Client
	started     chan struct{} // closed when the live traffic begins
	once        sync.Once

	mu      sync.Mutex // guards traffic
	traffic traffic
}

// traffic counts the live traffic.
type traffic struct {
	Calls  int `json:"calls"`
	Failed int `json:"failed"`
	// FirstFailure is what went wrong with the first call that failed.
	FirstFailure string `json:"first_failure,omitempty"`
	// Serials are those of the X509-SVIDs that the documents-service showed.
	Serials []string `json:"serials"`
}

// outcome is how one call went.
type outcome struct {
	Status int    `json:"status,omitempty"`
	Body   string `json:"body,omitempty"`
	// DecisionID is what a refusal came with.
	DecisionID string `json:"decision_id,omitempty"`
	// Error is set if there was no answer.
	Error  string `json:"error,omitempty"`
	serial string
}

func (o outcome) String() string {
	switch {
	case o.Error != "":
		return "no answer: " + o.Error
	case o.DecisionID != "":
		return fmt.Sprintf("%d, decision %s", o.Status, o.DecisionID)
	}
	return fmt.Sprintf("%d %s", o.Status, o.Body)
}

func newCaller(address string, svids *workloadapi.X509Source, tokens *workloadapi.JWTSource) (*caller, error) {
	own, err := svids.GetX509SVID()
	if err != nil {
		return nil, err
	}
	// Nobody but the documents-service may answer, whoever listens at the address.
	id, err := spiffeid.FromPath(own.ID.TrustDomain(), "/"+Documents)
	if err != nil {
		return nil, err
	}
	client := func(keep bool) *http.Client {
		return &http.Client{Timeout: callWait, Transport: &http.Transport{
			TLSClientConfig: tlsconfig.MTLSClientConfig(svids, svids, tlsconfig.AuthorizeID(id)), DisableKeepAlives: !keep}}
	}
	return &caller{address: address, x509: svids, jwt: tokens, fresh: client(false), kept: client(true), started: make(chan struct{})}, nil
}

// call makes one call: its method (default GET), path and the audience of the JWT-SVID to bring (default: none) are
// parameters of the URL.
func (k *caller) call(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	method := q.Get("method")
	if method == "" {
		method = http.MethodGet
	}
	answer(w, k.do(r.Context(), k.fresh, method, q.Get("path"), q.Get("audience")))
}

func (k *caller) do(ctx context.Context, client *http.Client, method, path, audience string) outcome {
	request, err := http.NewRequestWithContext(ctx, method, "https://"+k.address+path, nil)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	if audience != "" {
		token, err := k.jwt.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
		if err != nil {
			return outcome{Error: "fetching a JWT-SVID: " + err.Error()}
		}
		request.Header.Set("Authorization", "Bearer "+token.Marshal())
	}
	response, err := client.Do(request)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody))
	if err != nil {
		return outcome{Error: err.Error()}
	}
	o := outcome{Status: response.StatusCode, Body: string(body), DecisionID: response.Header.Get(httpauthz.DecisionHeader)}
	if response.TLS != nil && len(response.TLS.PeerCertificates) > 0 {
		o.serial = serial(response.TLS.PeerCertificates[0])
	}
	return o
}

// begin starts the live traffic, once.
func (k *caller) begin(w http.ResponseWriter, _ *http.Request) {
	k.once.Do(func() { close(k.started) })
	w.WriteHeader(http.StatusNoContent)
}

// count answers how the live traffic goes.
func (k *caller) count(w http.ResponseWriter, _ *http.Request) {
	k.mu.Lock()
	defer k.mu.Unlock()
	answer(w, k.traffic)
}

// run makes the live traffic from begin until ctx ends.
func (k *caller) run(ctx context.Context) error {
	defer k.kept.CloseIdleConnections()
	select {
	case <-ctx.Done():
		return nil
	case <-k.started:
	}
	tick := time.NewTicker(trafficEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.x509.Updated():
			// A connection is as good as the SVID that it was made with.
			k.kept.CloseIdleConnections()
		case <-tick.C:
			k.note(ctx, k.do(ctx, k.fresh, http.MethodGet, "/v1/documents/live", ""))
			k.note(ctx, k.do(ctx, k.kept, http.MethodGet, "/v1/documents/live", ""))
		}
	}
}

func (k *caller) note(ctx context.Context, o outcome) {
	if errors.Is(ctx.Err(), context.Canceled) {
		return // the call was cut off by our own end
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.traffic.Calls++
	if o.serial != "" {
		k.traffic.Serials = remember(k.traffic.Serials, o.serial)
	}
	if o.Status == http.StatusOK {
		return
	}
	k.traffic.Failed++
	if k.traffic.FirstFailure == "" {
		k.traffic.FirstFailure = o.String()
	}
}
