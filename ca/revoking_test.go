package ca

import (
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

func csrFor(t *testing.T, id string) []byte {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{uri}}, key(t))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func spkiOf(t *testing.T) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// x509For lets an agent get an X509-SVID by public key.
func x509For(t *testing.T, a *testAgent, entry string) (*x509.Certificate, codes.Code) {
	t.Helper()
	r, err := nodev1.NewNodeClient(a.conn).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: []*nodev1.IssueX509SVIDsRequest_Item{{EntryId: entry, PublicKey: spkiOf(t)}}})
	if err != nil {
		return nil, code(err)
	}
	if r.Results[0].Code != 0 {
		return nil, codes.Code(r.Results[0].Code)
	}
	leaf, err := x509.ParseCertificate(r.Results[0].CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf, codes.OK
}

// tokenFor lets an agent get a JWT-SVID, and returns when it says that it was issued.
func tokenFor(t *testing.T, a *testAgent, entry string) (time.Time, codes.Code) {
	t.Helper()
	r, err := nodev1.NewNodeClient(a.conn).IssueJWTSVIDs(t.Context(), &nodev1.IssueJWTSVIDsRequest{Items: []*nodev1.IssueJWTSVIDsRequest_Item{{EntryId: entry, Audience: []string{"x"}}}})
	if err != nil {
		return time.Time{}, code(err)
	}
	if r.Results[0].Code != 0 {
		return time.Time{}, codes.Code(r.Results[0].Code)
	}
	parsed, err := jwt.ParseSigned(r.Results[0].Token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	var c jwt.Claims
	if err := parsed.UnsafeClaimsWithoutVerification(&c); err != nil {
		t.Fatal(err)
	}
	if c.IssuedAt.Time().Unix() != r.Results[0].IssuedAt || c.NotBefore.Time() != c.IssuedAt.Time() {
		t.Errorf("iat %v, nbf %v, and the answer says %d", c.IssuedAt, c.NotBefore, r.Results[0].IssuedAt)
	}
	return c.IssuedAt.Time(), codes.OK
}

// TestNothingIsIssuedForARevokedID, of no kind, to nobody, over none of the RPCs; and again once it is un-revoked.
func TestNothingIsIssuedForARevokedID(t *testing.T) {
	c := config(t.TempDir())
	c.WIT = WIT{Enabled: true}
	h := start(t, c)
	a := h.agent()
	h.apply("kind: Identity\nname: web\nspiffeID: /ns/web\nmatch: [\"unix:uid:1\"]\n---\nkind: Identity\nname: other\nspiffeID: /other\nmatch: [\"unix:uid:2\"]\n")
	svids, mint := svidv1.NewSVIDClient(a.conn), svidv1.NewSVIDClient(h.admin)
	web := &types.SPIFFEID{TrustDomain: "example.org", Path: "/ns/web"}
	ways := map[string]func() codes.Code{
		"X509 by public key": func() codes.Code { _, c := x509For(t, a, "identity.web"); return c },
		"X509 by CSR": func() codes.Code {
			r, err := svids.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: "identity.web", Csr: csr(t, key(t))}}})
			if err != nil {
				return code(err)
			}
			return codes.Code(r.Results[0].Status.Code)
		},
		"JWT in a batch": func() codes.Code { _, c := tokenFor(t, a, "identity.web"); return c },
		"JWT": func() codes.Code {
			_, err := svids.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "identity.web", Audience: []string{"x"}})
			return code(err)
		},
		"WIT": func() codes.Code {
			r, err := svids.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: []*svidv1.NewWITSVIDParams{{EntryId: "identity.web", PublicKey: spkiOf(t), SigningAlgorithm: "ES256"}}})
			if err != nil {
				return code(err)
			}
			return codes.Code(r.Results[0].Status.Code)
		},
		"minted X509": func() codes.Code {
			_, err := mint.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csrFor(t, "spiffe://example.org/ns/web")})
			return code(err)
		},
		"minted JWT": func() codes.Code {
			_, err := mint.MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: web, Audience: []string{"x"}})
			return code(err)
		},
		"minted WIT": func() codes.Code {
			_, err := mint.MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{Id: web, PublicKey: spkiOf(t), SigningAlgorithm: "ES256"})
			return code(err)
		},
	}
	all := func(when string, agents, admins codes.Code) {
		t.Helper()
		for name, way := range ways {
			want := agents
			if strings.HasPrefix(name, "minted") {
				want = admins
			}
			if got := way(); got != want {
				t.Errorf("%s, %s: %v; want %v", when, name, got, want)
			}
		}
	}
	all("before", codes.OK, codes.OK)
	for _, target := range []string{"/ns/web", "/ns/*", "/ns/**", "/*/web", "/ns/web/**"} {
		if err := h.applyErr(revocation("r", "id: "+target), true); err != nil {
			t.Fatal(err)
		}
		all("while "+target+" is revoked", codes.PermissionDenied, codes.FailedPrecondition)
		if _, c := x509For(t, a, "identity.other"); c != codes.OK {
			t.Errorf("while %s is revoked, for /other: %v", target, c)
		}
	}
	h.unrevoke("r")
	all("after", codes.OK, codes.OK)
	if got := h.audit("x509svid.refused"); !slices.ContainsFunc(got, func(r map[string]any) bool {
		return strings.Contains(fmt.Sprint(r), "is revoked (Revocation")
	}) {
		t.Errorf("the audit log of refusals says %v", got)
	}
}

// TestAFreshStart: what was issued before a moment is dead, what is issued now is good at once.
func TestAFreshStart(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.agent()
	h.apply("kind: Identity\nname: web\nspiffeID: /ns/web\nmatch: [\"unix:uid:1\"]\n")
	oldSVID, _ := x509For(t, a, "identity.web")
	oldToken, _ := tokenFor(t, a, "identity.web")
	f := followRevoked(t, a)
	for _, target := range []string{"/ns/web", "/ns/**"} {
		h.apply(revocation("leak", fmt.Sprintf("id: %s\nissuedBefore: %q", target, time.Now().UTC().Format(time.RFC3339))))
		f.until("it is there", func() bool { return f.items["leak"].GetSpiffeId() == "spiffe://example.org"+target })
		newSVID, c1 := x509For(t, a, "identity.web")
		newToken, c2 := tokenFor(t, a, "identity.web")
		if c1 != codes.OK || c2 != codes.OK {
			t.Fatalf("%s: %v, %v", target, c1, c2)
		}
		r := policy.CompileRevocations(&policyv1.RevocationSet{Revocations: slices.Collect(maps.Values(f.items))}, td)
		id := ids(t, "/ns/web")
		for what, tt := range map[string]struct{ found, want bool }{
			"the old X509-SVID": {second(r.X509SVID(oldSVID)), true}, "the old token": {second(r.JWTSVID(id, "", oldToken)), true},
			"the new X509-SVID": {second(r.X509SVID(newSVID)), false}, "the new token": {second(r.JWTSVID(id, "", newToken)), false},
		} {
			if tt.found != tt.want {
				t.Errorf("%s: %s is revoked: %t", target, what, tt.found)
			}
		}
		if newSVID.NotBefore.After(time.Now()) {
			t.Errorf("the new one begins at %v", newSVID.NotBefore)
		}
	}
	if err := h.applyErr(revocation("future", fmt.Sprintf("id: /x\nissuedBefore: %q", time.Now().Add(time.Hour).UTC().Format(time.RFC3339))), false); code(err) != codes.InvalidArgument {
		t.Errorf("a moment to come: %v", err)
	}
}

func second(_ string, found bool) bool { return found }

// TestAStolenNode: all that it obtained is dead everywhere, whatever of it is new, and nothing of anybody else; it obtains no
// more; and when it is let in again, what it obtains then is good.
func TestAStolenNode(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.apply("kind: Identity\nname: web\nspiffeID: /ns/web\nmatch: [\"unix:uid:1\"]\n---\nkind: Identity\nname: left\nspiffeID: /left\nmatch: [\"unix:uid:2\"]\non: [\"node:group:left\"]\n")
	thief, honest := h.agent("left"), h.agent()
	f := followRevoked(t, honest)
	own := followRevoked(t, thief)
	own.until("it follows", func() bool { return own.shots == 1 })
	stolen, _ := x509For(t, thief, "identity.web")
	alsoStolen, _ := x509For(t, thief, "identity.left")
	good, _ := x509For(t, honest, "identity.web")
	token, _ := tokenFor(t, honest, "identity.web") // nobody can tell by whom a token was obtained
	agentLeaf, err := x509.ParseCertificate(thief.chain[0])
	if err != nil {
		t.Fatal(err)
	}
	honestLeaf, err := x509.ParseCertificate(honest.chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if p := h.ca.reg.SerialPrefix(thief.id); len(stolen.SerialNumber.Bytes()) != 20 || string(stolen.SerialNumber.Bytes()[:9]) != string(p) || string(agentLeaf.SerialNumber.Bytes()[:9]) != string(p) {
		t.Fatalf("serial numbers %x, %x do not begin with %x", stolen.SerialNumber, agentLeaf.SerialNumber, p)
	}
	doc := revocation("stolen", "agent: "+thief.id.String()+"\nreason: rack 4 was broken into")
	h.apply(doc)
	f.until("it is there", func() bool { return f.items["stolen"] != nil })
	r := func() *policy.Revocations {
		return policy.CompileRevocations(&policyv1.RevocationSet{Revocations: slices.Collect(maps.Values(f.items))}, td)
	}
	for what, tt := range map[string]struct{ found, want bool }{
		"a workload's":          {second(r().X509SVID(stolen)), true},
		"another workload's":    {second(r().X509SVID(alsoStolen)), true},
		"its own":               {second(r().X509SVID(agentLeaf)), true},
		"the honest workload's": {second(r().X509SVID(good)), false},
		"the honest agent's":    {second(r().X509SVID(honestLeaf)), false},
		"tokens of its IDs":     {second(r().JWTSVID(ids(t, "/ns/web"), "", token)), true},
		"tokens of other IDs":   {second(r().JWTSVID(ids(t, "/elsewhere"), "", token)), false},
	} {
		if tt.found != tt.want {
			t.Errorf("%s is revoked: %t; want %t", what, tt.found, tt.want)
		}
	}
	if fresh, c := tokenFor(t, honest, "identity.web"); c != codes.OK || second(r().JWTSVID(ids(t, "/ns/web"), "", fresh)) {
		t.Errorf("the honest node's next token: %v, revoked", c)
	}
	if err := own.next(); code(err) != codes.PermissionDenied {
		t.Errorf("the thief's stream: %v", err)
	}
	if _, c := x509For(t, thief, "identity.web"); c != codes.PermissionDenied {
		t.Errorf("the thief still gets SVIDs: %v", c)
	}
	if _, err := recovery(t.Context(), h.dial(nil, nil), thief.id, thief.key, csr(t, thief.key)); code(err) != codes.PermissionDenied {
		t.Errorf("it wins an SVID back: %v", err)
	}
	if got := h.audit("agent.ban"); len(got) != 1 || got[0]["subject"] != thief.id.String() {
		t.Errorf("bans in the audit log: %v", got)
	}
	// The same document again changes nothing: what is revoked is what was obtained until then.
	was := f.items["stolen"].IssuedBefore
	if p := h.apply(doc); p.Changes[0].Action != adminv1.Action_ACTION_UNCHANGED {
		t.Errorf("the same again: %v", p.Changes)
	}
	// Let in again, while the revocation stands.
	if _, err := adminv1.NewAdminClient(h.admin).UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{AgentId: thief.id.String()}); err != nil {
		t.Fatal(err)
	}
	svid, err := recovery(t.Context(), h.dial(nil, nil), thief.id, thief.key, csr(t, thief.key))
	if err != nil {
		t.Fatalf("after the ban was lifted: %v", err)
	}
	thief.chain, thief.conn = svid.CertChain, h.dial(svid.CertChain, thief.key)
	again, c := x509For(t, thief, "identity.web")
	if c != codes.OK {
		t.Fatalf("after the ban was lifted: %v", c)
	}
	if second(r().X509SVID(again)) || !second(r().X509SVID(stolen)) || f.items["stolen"].IssuedBefore != was {
		t.Error("after the ban was lifted, what is new is revoked, or what was stolen is not")
	}
	// Stolen again: another document of it takes what is new, too, even within the same second.
	h.apply(revocation("again", "agent: "+thief.id.String()))
	f.until("it is there", func() bool { return f.items["again"] != nil })
	if !second(r().X509SVID(again)) {
		t.Errorf("what it obtained since is not revoked: it began at %v, and what is before %v is", again.NotBefore, time.Unix(f.items["again"].IssuedBefore, 0))
	}
}

// TestAnAgentThatIsGone can be revoked all the same; nobody knows which IDs it served, so all tokens are issued anew.
func TestAnAgentThatIsGone(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	gone, other := h.agent(), h.agent()
	leaf, _ := x509For(t, gone, "identity.web")
	if _, err := agentv1.NewAgentClient(h.admin).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid(gone.id.Path())}); err != nil {
		t.Fatal(err)
	}
	f := followRevoked(t, other)
	h.apply(revocation("gone", "agent: "+gone.id.String()))
	f.until("it is there", func() bool { return f.items["gone"] != nil })
	r := policy.CompileRevocations(&policyv1.RevocationSet{Revocations: slices.Collect(maps.Values(f.items))}, td)
	if !second(r.X509SVID(leaf)) || !second(r.JWTSVID(ids(t, "/web"), "", time.Now().Add(-10*time.Second))) {
		t.Errorf("revoked is only %v", f.items)
	}
	if at, c := tokenFor(t, other, "identity.web"); c != codes.OK || second(r.JWTSVID(ids(t, "/web"), "", at)) {
		t.Errorf("the next token: %v, revoked", c)
	}
}

// TestARevokedCallerHasNoRightsHere: an admin and an agent by serial number, also on a connection that is open already; and
// everybody's revocation leaves the agents theirs, for they must hear of it.
func TestARevokedCallerHasNoRightsHere(t *testing.T) {
	c := config(t.TempDir())
	c.AdminIDs = []string{"spiffe://example.org/operator"}
	h := start(t, c)
	list := func(admin entryv1.EntryClient) error {
		_, err := admin.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
		return err
	}
	conn, _ := h.mint("spiffe://example.org/operator")
	operator := entryv1.NewEntryClient(conn)
	if err := list(operator); err != nil {
		t.Fatal(err)
	}
	serial := ""
	for _, r := range h.audit("x509svid.mint") {
		serial = fmt.Sprint(r["details"].(map[string]any)["serial"])
	}
	n, _ := new(big.Int).SetString(serial, 10)
	h.apply(revocation("laptop", fmt.Sprintf("serial: \"0x%x\"", n)))
	if err := list(operator); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "laptop") {
		t.Errorf("the admin's open connection: %v", err)
	}
	a := h.agent()
	f := followRevoked(t, a)
	if err := h.applyErr(revocation("all", "id: /**"), true); err != nil {
		t.Fatal(err)
	}
	f.until("even everybody's revocation is there", func() bool { return f.items["all"] != nil })
	h.unrevoke("all")
	f.until("and its end", func() bool { return f.items["all"] == nil })
	leaf, err := x509.ParseCertificate(a.chain[0])
	if err != nil {
		t.Fatal(err)
	}
	h.apply(revocation("node", fmt.Sprintf("serial: %q", leaf.SerialNumber.String())))
	if err := f.next(); code(err) != codes.PermissionDenied {
		t.Errorf("the stream of an agent whose X509-SVID is revoked: %v", err)
	}
	if _, err := recovery(t.Context(), h.dial(nil, nil), a.id, a.key, csr(t, a.key)); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("its key wins another one: %v", err)
	}
}
