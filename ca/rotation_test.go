package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/authority"
)

const (
	typeX509 = adminv1.AuthorityType_AUTHORITY_TYPE_X509
	typeJWT  = adminv1.AuthorityType_AUTHORITY_TYPE_JWT
)

// quiet is a configuration in which the schedule does nothing.
func quiet(dir string) Config {
	c := config(dir)
	c.Authorities.Rotate, c.settle = rotateManual, -1 // a clock that a test moves is believed
	return c
}

func (h *harness) prepare(kind adminv1.AuthorityType) string {
	h.t.Helper()
	r, err := adminv1.NewAdminClient(h.admin).PrepareAuthority(h.t.Context(), &adminv1.PrepareAuthorityRequest{Type: kind})
	if err != nil {
		h.t.Fatal(err)
	}
	return r.Authority.Id
}

// activate asks for an activation and returns its outcome.
func (h *harness) activate(ctx context.Context, req *adminv1.ActivateAuthorityRequest) (*adminv1.AuthorityChange, error) {
	h.t.Helper()
	s, err := adminv1.NewAdminClient(h.admin).ActivateAuthority(ctx, req)
	if err != nil {
		return nil, err
	}
	return activated(s)
}

func activated(s adminv1.Admin_ActivateAuthorityClient) (change *adminv1.AuthorityChange, err error) {
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return change, nil
		}
		if err != nil {
			return nil, err
		}
		if c := m.GetChange(); c != nil {
			change = c
		}
	}
}

// activateLater asks for an activation that cannot be at once, and returns when it says what it waits for. The function
// returns its outcome.
func (h *harness) activateLater(kind adminv1.AuthorityType) (*adminv1.Readiness, func() (*adminv1.AuthorityChange, error)) {
	h.t.Helper()
	s, err := adminv1.NewAdminClient(h.admin).ActivateAuthority(h.t.Context(), &adminv1.ActivateAuthorityRequest{Type: kind, Wait: true})
	if err != nil {
		h.t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil || m.GetWaiting() == nil {
		h.t.Fatalf("it did not wait: %v, %v", m, err)
	}
	return m.GetWaiting(), func() (*adminv1.AuthorityChange, error) { return activated(s) }
}

func (h *harness) states(kind adminv1.AuthorityType) string {
	h.t.Helper()
	r, err := adminv1.NewAdminClient(h.admin).ListAuthorities(h.t.Context(), &adminv1.ListAuthoritiesRequest{Type: kind})
	if err != nil {
		h.t.Fatal(err)
	}
	var out []string
	for _, a := range r.Authorities {
		out = append(out, a.State)
	}
	return strings.Join(out, " ")
}

// A following is an agent's open stream.
type following struct {
	t      *testing.T
	stream nodev1.Node_FollowClient
	msgs   chan *nodev1.FollowResponse
	end    chan error
}

func (h *harness) follows(a *testAgent) *following {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := nodev1.NewNodeClient(a.conn).Follow(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := s.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: &nodev1.FollowRequest_Hello{Format: 1, AgentVersion: "signet-test"}}}); err != nil {
		h.t.Fatal(err)
	}
	f := &following{t: h.t, stream: s, msgs: make(chan *nodev1.FollowResponse, 100), end: make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			m, err := s.Recv()
			if err != nil {
				f.end <- err
				return
			}
			f.msgs <- m
		}
	}()
	h.t.Cleanup(func() { cancel(); <-done })
	return f
}

// until waits for a bundle in which the authority is in that state; "" means that it is not in it.
func (f *following) until(id string, state nodev1.AuthorityState) *nodev1.Bundle {
	f.t.Helper()
	for ended := error(nil); ; {
		if ended != nil && len(f.msgs) == 0 {
			f.t.Fatalf("the stream ended before %s was %v: %v", id, state, ended)
		}
		select {
		case m := <-f.msgs:
			for _, b := range m.Bundles {
				found := nodev1.AuthorityState_AUTHORITY_STATE_UNSPECIFIED
				for _, x := range b.X509Authorities {
					if x.AuthorityId == id {
						found = x.State
					}
				}
				for _, j := range slices.Concat(b.JwtAuthorities, b.WitAuthorities) {
					if j.KeyId == id {
						found = j.State
					}
				}
				if found == state {
					return b
				}
			}
		case ended = <-f.end:
			f.end <- ended // for whoever asks next
		case <-f.t.Context().Done():
			f.t.Fatalf("%s never was %v", id, state)
		}
	}
}

func (f *following) ack(handedOn ...string) {
	f.t.Helper()
	if err := f.stream.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Ack_{Ack: &nodev1.FollowRequest_Ack{Revision: 1, AuthoritiesHandedOn: handedOn}}}); err != nil {
		f.t.Fatal(err)
	}
}

// TestActivationWaitsForEveryLiveAgent: JWT-32, FED-03: nothing is signed with an authority that an agent has not handed
// on. The one that lags is named; when it answers, the waiting request goes on.
func TestActivationWaitsForEveryLiveAgent(t *testing.T) {
	for _, kind := range []adminv1.AuthorityType{typeX509, typeJWT} {
		h := start(t, quiet(t.TempDir()))
		a, b := h.agent(), h.agent()
		fa, fb := h.follows(a), h.follows(b)
		id := h.prepare(kind)
		fa.until(id, nodev1.AuthorityState_AUTHORITY_STATE_PREPARED)
		fb.until(id, nodev1.AuthorityState_AUTHORITY_STATE_PREPARED)
		fa.ack(id)
		until(t, "the first agent's acknowledgement", func() bool { return h.ca.reg.Ack(a.id).Has(id) })

		_, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: kind})
		if code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), b.id.String()) || strings.Contains(err.Error(), a.id.String()) {
			t.Fatalf("with a laggard: %v, want FailedPrecondition that names %s", err, b.id)
		}
		if got := h.states(kind); got != "active prepared" {
			t.Fatalf("states after the refusal: %s", got)
		}
		list, err := adminv1.NewAdminClient(h.admin).ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{Type: kind})
		if err != nil {
			t.Fatal(err)
		}
		ready := list.Authorities[1].Readiness
		if ready.LaggardCount != 1 || ready.LiveAgents != 2 || ready.Ready || ready.Laggards[0].AgentId != b.id.String() || ready.Laggards[0].Reason == "" || ready.Laggards[0].Since == nil {
			t.Errorf("readiness: %v", ready)
		}

		waiting, outcome := h.activateLater(kind)
		if waiting.LaggardCount != 1 {
			t.Errorf("what it waits for: %v", waiting)
		}
		if got := h.states(kind); got != "active prepared" {
			t.Fatalf("states while it waits: %s", got)
		}
		fb.ack("something else", id)
		if change, err := outcome(); err != nil || change.Authority.Id != id || !change.Changed {
			t.Fatalf("%v, %v", change, err)
		}
		if got := h.states(kind); got != "old active" {
			t.Errorf("states: %s", got)
		}
		fa.until(id, nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE)
		h.close()
	}
}

// TestAcknowledgementsOutliveTheCA: what an agent has acknowledged it need not say again to the next CA.
func TestAcknowledgementsOutliveTheCA(t *testing.T) {
	dir := t.TempDir()
	h := start(t, quiet(dir))
	a := h.agent()
	f := h.follows(a)
	id := h.prepare(typeX509)
	f.until(id, nodev1.AuthorityState_AUTHORITY_STATE_PREPARED)
	f.ack(id)
	until(t, "the acknowledgement", func() bool { return h.ca.reg.Ack(a.id).Has(id) })
	h.close()
	h = start(t, quiet(dir))
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id}); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// TestSPIREAgentsAcknowledgeByFetching: an agent that does not follow acknowledges by GetBundle with its SVID, made since
// the preparation; without its SVID it counts for nothing.
func TestSPIREAgentsAcknowledgeByFetching(t *testing.T) {
	h := start(t, quiet(t.TempDir()))
	a := h.agent()
	fetch := func(c *grpc.ClientConn, mask *types.BundleMask) {
		t.Helper()
		if _, err := bundlev1.NewBundleClient(c).GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: mask}); err != nil {
			t.Fatal(err)
		}
	}
	fetch(a.conn, nil)
	id := h.prepare(typeX509)
	fetch(h.dial(nil, nil), nil)
	fetch(a.conn, &types.BundleMask{JwtAuthorities: true})
	_, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id})
	if code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "has not fetched the bundle") {
		t.Fatalf("before it has fetched it: %v", err)
	}
	fetch(a.conn, nil)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id, Wait: true}); err != nil {
		t.Error(err)
	}
}

// TestSilentAgentDoesNotBlockRotation: an agent that never acknowledges is overridden by the operator, by the configured
// deadline, or by the end of its own SVID.
func TestSilentAgentDoesNotBlockRotation(t *testing.T) {
	var clock movedClock
	c := quiet(t.TempDir())
	c.Now, c.Authorities.ActivationDeadline = clock.now, 30*time.Minute
	h := start(t, c)
	h.agent() // silent for ever
	id := h.prepare(typeX509)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id}); code(err) != codes.FailedPrecondition {
		t.Fatalf("with a silent agent: %v", err)
	}
	if change, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id, Force: true}); err != nil || !change.Changed {
		t.Fatalf("forced: %v", err)
	}
	if r := h.audit("authority.activate"); len(r) != 1 || r[0]["outcome"] != "ok" || r[0]["details"].(map[string]any)["forced"] != true || r[0]["details"].(map[string]any)["laggards"] != 1.0 {
		t.Errorf("audit of the override: %v", r)
	}
	id = h.prepare(typeX509)
	_, outcome := h.activateLater(typeX509)
	clock.move(31 * time.Minute)
	if change, err := outcome(); err != nil || change.Authority.Id != id {
		t.Errorf("past the deadline: %v, %v", change, err)
	}
	id = h.prepare(typeJWT)
	clock.move(31*time.Minute + time.Hour) // past the end of the agent's SVID, and of the deadline
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeJWT, Id: id}); err != nil {
		t.Errorf("after the silent agent's SVID has ended: %v", err)
	}
}

// TestJumpOfTheClockIsNoTime: a clock that jumps past the deadline and all refresh hints has given nobody time. What it says
// counts once it has run steadily.
func TestJumpOfTheClockIsNoTime(t *testing.T) {
	for name, settle := range map[string]time.Duration{"believed": -1, "not yet believed": time.Hour} {
		var clock movedClock
		c := quiet(t.TempDir())
		c.settle = settle
		c.Now, c.Authorities.RefreshHint, c.Authorities.ActivationDeadline = clock.now, time.Minute, 30*time.Minute
		h := start(t, c)
		activate := func(kind adminv1.AuthorityType) error {
			_, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: kind})
			return err
		}
		h.create(downstreamEntry("/nested"))
		h.prepare(typeJWT)
		if err := activate(typeJWT); code(err) != codes.FailedPrecondition {
			t.Errorf("%s, before the hints: %v", name, err)
		}
		clock.move(6 * time.Minute)
		if err := activate(typeJWT); (err == nil) != (settle < 0) || err != nil && !strings.Contains(err.Error(), "others fetch the bundle") {
			t.Errorf("%s, after the hints: %v", name, err)
		}
		h.agent() // acknowledges nothing
		h.prepare(typeX509)
		clock.move(37 * time.Minute)
		if err := activate(typeX509); (err == nil) != (settle < 0) || err != nil && !strings.Contains(err.Error(), "1 of 1 live agents") {
			t.Errorf("%s, after the deadline: %v", name, err)
		}
	}
}

// TestDownstreamCAsAreGivenFiveHints: what a CA below this one has fetched, it hands on to agents of whom nobody hears here.
func TestDownstreamCAsAreGivenFiveHints(t *testing.T) {
	var clock movedClock
	c := quiet(t.TempDir())
	c.Now, c.Authorities.RefreshHint = clock.now, time.Minute
	h := start(t, c)
	h.create(entry("/web", "unix:uid:8"))
	h.prepare(typeJWT)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeJWT}); err != nil {
		t.Errorf("with nobody to wait for: %v", err)
	}
	h.create(downstreamEntry("/nested"))
	h.prepare(typeX509)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509}); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "others fetch the bundle") {
		t.Errorf("before five hints: %v", err)
	}
	clock.move(5*time.Minute + time.Second)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509}); err != nil {
		t.Errorf("after five hints: %v", err)
	}
	if _, err := entryv1.NewEntryClient(h.admin).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{entryOf(t, h, "/nested")}}); err != nil {
		t.Fatal(err)
	}
	h.prepare(typeX509)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509}); err != nil {
		t.Errorf("with no CA below any more: %v", err)
	}
}

// TestOtherServersFetchTheBundleToo: a server of the same trust domain, from which it moves here or which is below this one, has
// its own agents, and nobody tells when these have a new authority.
func TestOtherServersFetchTheBundleToo(t *testing.T) {
	for _, tt := range []struct {
		name string
		add  func(*harness) error
	}{
		{"appended", func(h *harness) error {
			_, err := bundlev1.NewBundleClient(h.admin).AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: newSPIRERoot(t).cert.Raw}}})
			return err
		}},
		{"downstream", func(h *harness) error {
			_, err := h.ca.set.PublishJWTKey(t.Context(), spiffeid.RequireFromString("spiffe://example.org/ca/lower"),
				authority.ForeignJWTKey{KeyID: "lower-1", PublicKey: spki(t, key(t).Public()), ExpiresAt: time.Now().Add(time.Hour)})
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var clock movedClock
			c := quiet(t.TempDir())
			c.Now, c.Authorities.RefreshHint = clock.now, time.Minute
			h := start(t, c)
			if err := tt.add(h); err != nil {
				t.Fatal(err)
			}
			id := h.prepare(typeJWT)
			clock.move(4*time.Minute + 50*time.Second)
			if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeJWT, Id: id}); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "fetch the bundle") {
				t.Errorf("before five hints: %v", err)
			}
			clock.move(5*time.Minute + time.Second)
			if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeJWT, Id: id}); err != nil {
				t.Errorf("after five hints: %v", err)
			}
		})
	}
}

// TestFederatedBundleIsPublishedForFiveHints: FED-04.
func TestFederatedBundleIsPublishedForFiveHints(t *testing.T) {
	var clock movedClock
	c := quiet(t.TempDir())
	c.Now, c.Authorities.RefreshHint = clock.now, time.Minute
	h := start(t, c)
	root, _ := foreignRoot(t, "partner.example")
	if _, err := bundlev1.NewBundleClient(h.admin).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{
		Bundle: []*types.Bundle{{TrustDomain: "partner.example", X509Authorities: []*types.X509Certificate{{Asn1: root.Raw}}}}}); err != nil {
		t.Fatal(err)
	}
	id := h.prepare(typeX509)
	clock.move(4*time.Minute + 50*time.Second)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id}); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "fetch the bundle") {
		t.Errorf("before five hints: %v", err)
	}
	clock.move(5*time.Minute + time.Second)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id}); err != nil {
		t.Errorf("after five hints: %v", err)
	}
}

// TestRevocationEndsStreamsAndCalls: an agent whose authority is revoked is told the new bundle, then its stream ends; no
// call on its connection is served any more, nor on a new one; and with its key it comes back without a person.
func TestRevocationEndsStreamsAndCalls(t *testing.T) {
	h := start(t, quiet(t.TempDir()))
	a := h.agent()
	f := h.follows(a)
	first := h.ca.set.Bundle().X509[0]
	f.until(first.ID, nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE)
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	spki, _ := x509.MarshalPKIXPublicKey(key(t).Public())
	issue := func(c *grpc.ClientConn) error {
		_, err := nodev1.NewNodeClient(c).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: []*nodev1.IssueX509SVIDsRequest_Item{{EntryId: "identity.web", PublicKey: spki}}})
		return err
	}
	if err := issue(a.conn); err != nil {
		t.Fatal(err)
	}
	r, err := adminv1.NewAdminClient(h.admin).RevokeAuthority(t.Context(), &adminv1.EndAuthorityRequest{Type: typeX509, Id: first.ID, Stolen: true})
	if err != nil || r.Authority.State != "revoked" {
		t.Fatalf("revoking the stolen active authority: %v %v", r, err)
	}
	b := f.until(first.ID, nodev1.AuthorityState_AUTHORITY_STATE_UNSPECIFIED)
	if len(b.X509Authorities) != 1 || b.X509Authorities[0].State != nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE {
		t.Errorf("the last bundle of the stream: %v", b)
	}
	if err := <-f.end; !deniedFor(err, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE) {
		t.Errorf("the stream ended with %v", err)
	}
	if err := issue(a.conn); !deniedFor(err, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE) {
		t.Errorf("a call on the old connection: %v", err)
	}
	again := h.dial(a.chain, a.key)
	if err := issue(again); !deniedFor(err, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE) {
		t.Errorf("a call on a new connection with the old SVID: %v", err)
	}
	k := key(t)
	svid, err := recovery(t.Context(), h.dial(nil, nil), a.id, a.key, csr(t, k))
	if err != nil {
		t.Fatalf("the way back: %v", err)
	}
	if err := issue(h.dial(svid.CertChain, k)); err != nil {
		t.Errorf("with the SVID that was won back: %v", err)
	}
}

// ops connects with an X509-SVID of /ops, whom admin_ids may name.
func (h *harness) ops() (*grpc.ClientConn, *authority.X509SVID) {
	h.t.Helper()
	k := key(h.t)
	p, err := h.ca.set.CheckX509(authority.X509Request{ID: ids(h.t, "/ops"), PublicKey: k.Public()})
	if err != nil {
		h.t.Fatal(err)
	}
	svid, err := h.ca.set.SignX509(h.t.Context(), p)
	if err != nil {
		h.t.Fatal(err)
	}
	return h.dial(svid.Chain, k), svid
}

// TestRevokedAuthorityMakesNoAdmin: neither the SVID of an admin nor a stream that it has open is worth anything when its
// authority is gone.
func TestRevokedAuthorityMakesNoAdmin(t *testing.T) {
	c := quiet(t.TempDir())
	c.AdminIDs = []string{"spiffe://example.org/ops"}
	h := start(t, c)
	conn, svid := h.ops()
	list := func() error {
		_, err := adminv1.NewAdminClient(conn).ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{})
		return err
	}
	if err := list(); err != nil {
		t.Fatal(err)
	}
	if _, err := adminv1.NewAdminClient(conn).RevokeAuthority(t.Context(), &adminv1.EndAuthorityRequest{Type: typeX509, Id: svid.AuthorityID, Stolen: true}); err != nil {
		t.Fatalf("an admin over TCP revokes: %v", err)
	}
	if err := list(); code(err) != codes.PermissionDenied {
		t.Errorf("after the revocation of its own authority: %v", err)
	}
}

// TestActivationAsksAgainWhoMayAsk: an admin who is none any more when the last laggard has answered activates nothing.
func TestActivationAsksAgainWhoMayAsk(t *testing.T) {
	c := quiet(t.TempDir())
	c.AdminIDs = []string{"spiffe://example.org/ops"}
	h := start(t, c)
	conn, _ := h.ops()
	f := h.follows(h.agent())
	id := h.prepare(typeX509)
	f.until(id, nodev1.AuthorityState_AUTHORITY_STATE_PREPARED)
	s, err := adminv1.NewAdminClient(conn).ActivateAuthority(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Wait: true})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s.Recv(); err != nil || m.GetWaiting() == nil {
		t.Fatalf("it did not wait: %v, %v", m, err)
	}
	without := c
	without.AdminIDs = nil
	if _, err := h.ca.Reload(without); err != nil {
		t.Fatal(err)
	}
	f.ack(id)
	if _, err := activated(s); code(err) != codes.PermissionDenied {
		t.Errorf("the activation of somebody who is no admin any more: %v", err)
	}
	if got := h.states(typeX509); got != "active prepared" {
		t.Errorf("states %q, want the new one to stay prepared", got)
	}
}

// deniedFor tells whether err is SPIRE's refusal of an agent for a reason.
func deniedFor(err error, reason types.PermissionDeniedDetails_Reason) bool {
	st := status.Convert(err)
	for _, d := range st.Details() {
		if p, ok := d.(*types.PermissionDeniedDetails); ok {
			return st.Code() == codes.PermissionDenied && p.Reason == reason
		}
	}
	return false
}
