package workloadapi_test

import (
	"crypto/sha256"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/policy"
)

func revocations(a *authority, revision int64, all ...*policyv1.Revocation) *policy.Revocations {
	return policy.CompileRevocations(&policyv1.RevocationSet{Revision: revision, Revocations: all}, a.td)
}

func TestPoliciesWatchPartial(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	for name, partial := range map[string]bool{"a caller that asks for it": true, "an older caller": false} {
		t.Run(name, func(t *testing.T) {
			src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
			src.policies = &policyv1.PolicySet{Format: 1, Revision: 7}
			client := policyapi.NewPoliciesClient(serve(t, src).dial(t))
			stream, err := client.Watch(spiffeCtx(t), &policyapi.WatchRequest{Format: 1, Partial: partial})
			if err != nil {
				t.Fatal(err)
			}
			if got := recv(t, stream); got.Partial || got.Policies.GetRevision() != 7 || got.Revocations == nil || len(got.Revocations.Revocations) != 0 {
				t.Errorf("the first message is %v", got)
			}
			// A renewed SVID is no news; a revocation is, and comes without the policies where that is understood.
			renewed := a.identity(t, "/web")
			src.change(func() { src.entries[0].identity = renewed })
			src.change(func() {
				src.revocations = revocations(a, 8, &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/x"}})
			})
			if got := recv(t, stream); got.Partial != partial || (got.Policies != nil) == partial || (len(got.ServiceIds) > 0) == partial || len(got.Revocations.GetRevocations()) != 1 {
				t.Errorf("a revocation comes as %v", got)
			}
			src.change(func() { src.policies = &policyv1.PolicySet{Format: 1, Revision: 9} })
			if got := recv(t, stream); got.Partial || got.Policies.GetRevision() != 9 || got.Revocations != nil {
				t.Errorf("other policies come as %v", got)
			}
			lost := time.Unix(1700000000, 0)
			src.change(func() { src.offline = lost })
			if got := recv(t, stream); got.Partial != partial || got.GetOfflineSince() != lost.Unix() || got.Revocations != nil {
				t.Errorf("the loss of the CA comes as %v", got)
			}
			// A stream that begins later has all of it.
			again, err := client.Watch(spiffeCtx(t), &policyapi.WatchRequest{Format: 1, Partial: partial})
			if err != nil {
				t.Fatal(err)
			}
			if got := recv(t, again); got.Partial || got.Policies.GetRevision() != 9 || got.Revocations.GetRevision() != 8 {
				t.Errorf("a new stream begins with %v", got)
			}
		})
	}
}

func TestValidateJWTSVIDRefusesTheRevoked(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	client := serve(t, src).client(t)
	token, err := a.token(map[string]any{"sub": "spiffe://example.org/app", "aud": []string{"me"}, "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(), "jti": "one"})
	if err != nil {
		t.Fatal(err)
	}
	validate := func() error {
		_, err := client.ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Audience: "me", Svid: token})
		return err
	}
	if err := validate(); err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256([]byte("one"))
	for name, r := range map[string]*policyv1.Revocation{
		"its jti":     {Name: "r", Target: &policyv1.Revocation_JtiHash{JtiHash: hash[:]}},
		"its subject": {Name: "r", TokensOnly: true, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/app"}},
		"before now":  {Name: "r", IssuedBefore: time.Now().Unix() + 60, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/**"}},
		"the unknown": {Name: "r"},
	} {
		src.change(func() { src.revocations = revocations(a, 2, r) })
		t.Run(name, func(t *testing.T) { wantCode(t, validate(), codes.InvalidArgument, "revoked", `"r"`) })
	}
	other := sha256.Sum256([]byte("two"))
	src.change(func() {
		src.revocations = revocations(a, 3, &policyv1.Revocation{Name: "r", Target: &policyv1.Revocation_JtiHash{JtiHash: other[:]}})
	})
	if err := validate(); err != nil {
		t.Errorf("another jti is revoked: %v", err)
	}
}

func TestX509ResponsesHaveCRLs(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	foreign := spiffeid.RequireTrustDomainFromString("partner.example")
	src.crls = map[spiffeid.TrustDomain][][]byte{a.td: {[]byte("one"), []byte("two")}, foreign: {[]byte("three")}}
	client := serve(t, src).client(t)
	want := func(crls [][]byte) {
		t.Helper()
		if !slices.EqualFunc(crls, src.crls[a.td], slices.Equal) {
			t.Errorf("CRLs %q, want those of the own trust domain", crls)
		}
	}
	svids, err := client.FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want(recv(t, svids).Crl)
	bundles, err := client.FetchX509Bundles(spiffeCtx(t), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want(recv(t, bundles).Crl)
	src.change(func() { src.crls = map[spiffeid.TrustDomain][][]byte{a.td: {[]byte("four")}} })
	want(recv(t, svids).Crl)
	want(recv(t, bundles).Crl)
}
