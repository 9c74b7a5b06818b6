package caclient

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/caclient/spireserver"
	"github.com/signet-id/signet/agent/internal/faultca"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

func spireEntry(id string) *types.Entry {
	return &types.Entry{Id: id, CreatedAt: 1_700_000_000, SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/" + id},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}}
}

func TestServerWithoutFollowIsPolled(t *testing.T) {
	ca := faultca.StartSPIRE(t)
	ca.Entries = []*types.Entry{spireEntry("web")}
	x := run(t, ca)
	m := wait(t, "the snapshot", x.f.news)
	if !m.GetSnapshot() || m.GetEpoch() != spireserver.Epoch || len(m.GetEntries()) != 1 || len(m.GetBundles()) != 1 || m.PolicyDefaults != nil {
		t.Errorf("the snapshot is %v", m)
	}
	wait(t, "sync", x.synced)
	if !x.client.Connected() || x.client.Server() != SPIRE {
		t.Errorf("connected %t to a server of kind %s", x.client.Connected(), x.client.Server())
	}

	// A caller that waits for the newest state has it, and many together cost one poll.
	ca.Lock()
	ca.Entries = append(ca.Entries, spireEntry("new"))
	before := ca.Polls
	ca.Unlock()
	done := make(chan error, 100)
	for range cap(done) {
		go func() { done <- x.client.Sync(t.Context()) }()
	}
	for range cap(done) {
		if err := wait(t, "an answer", done); err != nil {
			t.Error(err)
		}
	}
	if m := wait(t, "the new entry", x.f.news); m.GetSnapshot() || len(m.GetEntries()) != 1 || m.GetEntries()[0].GetId() != "new" {
		t.Errorf("the differences are %v", m)
	}
	ca.Lock()
	if n := ca.Polls - before; n > 4 {
		t.Errorf("100 callers cost %d polls", n)
	}
	ca.Unlock()
	ca.Stop()
	wait(t, "the loss", x.lost)
	if err := x.client.Sync(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Sync without a server: %v", err)
	}
}

// Only what the server itself says about Follow counts.
func TestNoErrorButUnimplementedMakesThePollingBegin(t *testing.T) {
	for _, code := range []codes.Code{codes.Unavailable, codes.Internal, codes.Unknown, codes.PermissionDenied, codes.Unauthenticated, codes.NotFound,
		codes.FailedPrecondition, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted} {
		t.Run(code.String(), func(t *testing.T) {
			t.Parallel() // each waits for a retry
			ca := faultca.Start(t, "/spire/server")
			calls := make(chan struct{}, 100)
			ca.Follow = func(nodev1.Node_FollowServer, string) error {
				calls <- struct{}{}
				return status.Error(code, "no")
			}
			x := run(t, ca)
			wait(t, "Follow", calls)
			wait(t, "Follow again", calls)
			if got := x.client.Server(); got != Unknown {
				t.Errorf("the server is taken for %s", got)
			}
		})
	}
	t.Run("later on the stream", func(t *testing.T) {
		t.Parallel()
		ca := faultca.Start(t, "/spire/server")
		calls := make(chan struct{}, 100)
		ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
			calls <- struct{}{}
			if err := s.Send(&nodev1.FollowResponse{Epoch: "e", To: 1, Snapshot: true, Complete: true}); err != nil {
				return err
			}
			return status.Error(codes.Unimplemented, "not any more")
		}
		x := run(t, ca)
		wait(t, "Follow", calls)
		wait(t, "Follow again", calls)
		if got := x.client.Server(); got != Signet {
			t.Errorf("the server is taken for %s", got)
		}
	})
}

// A server that ends its connections after a while, as SPIRE's do, is no loss, and is asked on each new one what it is.
func TestPollingOverOneConnectionAfterTheOther(t *testing.T) {
	ca := faultca.StartSPIRE(t, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 500 * time.Millisecond, MaxConnectionAgeGrace: time.Second}))
	ca.Entries = []*types.Entry{spireEntry("web")}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	for range 3 {
		wait(t, "sync over the next connection", x.synced)
		if err := x.client.Sync(t.Context()); err != nil && !errors.Is(err, ErrUnreachable) {
			t.Error(err)
		}
	}
	if len(x.lost) != 0 {
		t.Error("the end of a connection counts as a loss")
	}
	if n := len(x.f.news); n != 1 {
		t.Errorf("%d messages were applied, and nothing has changed since the first", n)
	}
}

func TestRefusalWhilePolling(t *testing.T) {
	for _, reason := range []types.PermissionDeniedDetails_Reason{types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, types.PermissionDeniedDetails_AGENT_BANNED,
		types.PermissionDeniedDetails_AGENT_EXPIRED, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE} {
		t.Run(reason.String(), func(t *testing.T) {
			ca := faultca.StartSPIRE(t)
			x := run(t, ca)
			wait(t, "sync", x.synced)
			ca.Lock()
			ca.Deny = func(string) error { return faultca.Denied(reason) }
			ca.Unlock()
			err := x.client.Sync(t.Context()) // what waits hears of it
			if d, ok := errors.AsType[*DeniedError](err); !ok || d.Reason != Reason(reason) {
				t.Errorf("Sync: %v", err)
			}
			err = wait(t, "the end of Run", x.ended)
			if d, ok := errors.AsType[*DeniedError](err); !ok || d.Reason != Reason(reason) {
				t.Errorf("Run: %v, want a refusal because of %s", err, reason)
			}
			x.ended <- nil // for the fixture
		})
	}
}

// csr makes an item with its CSR, and counts how often it is made.
func csrItem(t *testing.T, id string, made *int) IssueItem {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return IssueItem{EntryID: id, PublicKey: public, CSR: func() ([]byte, error) {
		*made++
		return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	}}
}

func TestIssueByCSR(t *testing.T) {
	ca := faultca.StartSPIRE(t)
	ca.Entries = []*types.Entry{spireEntry("a"), spireEntry("b")}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	made := 0
	items := []IssueItem{csrItem(t, "a", &made), csrItem(t, "gone", &made), csrItem(t, "b", &made), {EntryID: "a"}, {EntryID: "a", CSR: func() ([]byte, error) { return nil, errors.New("no key") }}}
	got := x.client.IssueX509(t.Context(), items)
	if len(got) != len(items) || got[0].Err != nil || got[2].Err != nil || status.Code(got[1].Err) != codes.NotFound || got[3].Err == nil || got[4].Err == nil {
		t.Errorf("the answers are %v", got)
	}
	for i, path := range map[int]string{0: "/a", 2: "/b"} {
		if leaf, err := x509.ParseCertificate(got[i].Chain[0]); err != nil || leaf.URIs[0].Path != path {
			t.Errorf("answer %d is for %v, %v", i, leaf.URIs, err)
		}
	}

	// Batches that are too large are halved, and grow again.
	var sizes []int
	ca.Lock()
	ca.BatchX509 = func(r *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
		sizes = append(sizes, len(r.Params))
		if len(r.Params) > 3 {
			return nil, status.Error(codes.ResourceExhausted, "too many")
		}
		response := &svidv1.BatchNewX509SVIDResponse{}
		for range r.Params {
			response.Results = append(response.Results, faultca.Refusal(codes.NotFound, "none"))
		}
		return response, nil
	}
	ca.Unlock()
	items = nil
	for range 8 {
		items = append(items, csrItem(t, "a", &made))
	}
	if got := x.client.IssueX509(t.Context(), items); len(got) != 8 {
		t.Errorf("%d answers", len(got))
	}
	if s := fmt.Sprint(sizes); s != "[8 4 2 4 2 4 2 2]" {
		t.Errorf("the batches are %s", s)
	}
	ca.Lock()
	ca.BatchX509 = func(*svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
		return &svidv1.BatchNewX509SVIDResponse{}, nil
	}
	ca.Unlock()
	if got := x.client.IssueX509(t.Context(), items[:1]); got[0].Err == nil || !strings.Contains(got[0].Err.Error(), "1 items with 0 results") {
		t.Errorf("an answer without results: %v", got)
	}
}

// What the server says of an entry or an authority that the agent did not know makes it ask at once what there is.
func TestAnswersThatShowNewsMakeItAsk(t *testing.T) {
	stranger := faultca.StartSPIRE(t)
	for name, answer := range map[string]func(p *svidv1.NewX509SVIDParams) *svidv1.BatchNewX509SVIDResponse_Result{
		"an entry is gone": func(*svidv1.NewX509SVIDParams) *svidv1.BatchNewX509SVIDResponse_Result {
			return faultca.Refusal(codes.NotFound, "entry not found or not authorized")
		},
		"an authority is new": func(p *svidv1.NewX509SVIDParams) *svidv1.BatchNewX509SVIDResponse_Result {
			stranger.Lock()
			defer stranger.Unlock()
			csr, err := x509.ParseCertificateRequest(p.Csr)
			if err != nil {
				return faultca.Refusal(codes.InvalidArgument, err.Error())
			}
			der, err := stranger.Sign("/a", csr.PublicKey, time.Hour)
			if err != nil {
				return faultca.Refusal(codes.Internal, err.Error())
			}
			return faultca.Granted(der)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ca := faultca.StartSPIRE(t)
			x := runPolling(t, ca, time.Hour)
			wait(t, "sync", x.synced)
			wait(t, "the snapshot", x.f.news)
			ca.Lock()
			ca.Entries = []*types.Entry{spireEntry("new")}
			ca.BatchX509 = func(r *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
				return &svidv1.BatchNewX509SVIDResponse{Results: []*svidv1.BatchNewX509SVIDResponse_Result{answer(r.Params[0])}}, nil
			}
			ca.Unlock()
			made := 0
			if got := x.client.IssueX509(t.Context(), []IssueItem{csrItem(t, "a", &made)}); got[0].Err == nil {
				t.Errorf("the answer is %v", got)
			}
			if m := wait(t, "the news", x.f.news); len(m.GetEntries()) != 1 {
				t.Errorf("the news is %v", m)
			}
		})
	}
}

// A CA of signet is never asked by CSR, so that nobody pays for making one.
func TestNoCSRForASignetCA(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	ca.Issue = func(r *nodev1.IssueX509SVIDsRequest) (*nodev1.IssueX509SVIDsResponse, error) {
		return &nodev1.IssueX509SVIDsResponse{Results: make([]*nodev1.IssueX509SVIDsResponse_Result, len(r.Items))}, nil
	}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	made := 0
	x.client.IssueX509(t.Context(), []IssueItem{csrItem(t, "a", &made)})
	if made != 0 {
		t.Errorf("%d CSRs were made", made)
	}
}

// What a server issues is passed on only if it can be verified by the bundle that workloads have.
func TestChainsThatLeadNowhereAreRefused(t *testing.T) {
	ca := faultca.StartSPIRE(t)
	ca.Entries = []*types.Entry{spireEntry("a")}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	stranger := faultca.StartSPIRE(t) // of the same trust domain's name, and another root
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	self := func(notAfter time.Time) []byte {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/a"}}}, &x509.Certificate{}, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	sign := func(ca *faultca.CA, ttl time.Duration) []byte {
		ca.Lock()
		defer ca.Unlock()
		der, err := ca.Sign("/a", key.Public(), ttl)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	good := sign(ca, time.Hour)
	many := make([][]byte, maxChain+1)
	for i := range many {
		many[i] = good
	}
	for name, chain := range map[string][][]byte{
		"of another root":        {sign(stranger, time.Hour)},
		"of another root, shown": {sign(stranger, time.Hour), stranger.Root.Raw},
		"self-signed":            {self(time.Now().Add(time.Hour))},
		"over":                   {sign(ca, -time.Second)},
		"empty":                  {},
		"not a certificate":      {[]byte("x")},
		"a leaf in between":      {good, good},
		"endless":                many,
	} {
		ca.Lock()
		ca.BatchX509 = func(*svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
			return &svidv1.BatchNewX509SVIDResponse{Results: []*svidv1.BatchNewX509SVIDResponse_Result{faultca.Granted(chain...)}}, nil
		}
		ca.Unlock()
		made := 0
		if got := x.client.IssueX509(t.Context(), []IssueItem{csrItem(t, "a", &made)}); got[0].Err == nil || got[0].Chain != nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestJWTSVIDsSingly(t *testing.T) {
	ca := faultca.StartSPIRE(t)
	x := run(t, ca)
	wait(t, "sync", x.synced)
	if _, err := x.client.NewJWTSVID(t.Context(), "a", []string{"x"}); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "disabled") {
		t.Errorf("a server without JWT: %v", err)
	}
	ca.Lock()
	ca.SingleJWT = func(r *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
		switch r.EntryId {
		case "bad":
			return nil, status.Error(codes.NotFound, "entry not found or not authorized")
		case "backwards":
			return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: "t", IssuedAt: 20, ExpiresAt: 10}}, nil
		}
		return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: r.EntryId + " for " + strings.Join(r.Audience, ","), IssuedAt: 10, ExpiresAt: 20}}, nil
	}
	ca.Unlock()
	asked := map[string]<-chan asked{}
	for i := range 40 {
		asked[fmt.Sprint(i)] = ask(t.Context(), x.client.jwt, fmt.Sprint(i))
	}
	asked["bad"], asked["backwards"] = ask(t.Context(), x.client.jwt, "bad"), ask(t.Context(), x.client.jwt, "backwards")
	for id, c := range asked {
		a := wait(t, "the answer for "+id, c)
		switch {
		case id == "bad" && status.Code(a.err) != codes.NotFound, id == "backwards" && a.err == nil:
			t.Errorf("%s: %q, %v", id, a.token, a.err)
		case id != "bad" && id != "backwards" && (a.err != nil || !strings.HasPrefix(a.token, id+" for ")):
			t.Errorf("%s: %q, %v", id, a.token, a.err)
		}
	}
}
