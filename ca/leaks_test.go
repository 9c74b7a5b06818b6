package ca

import (
	"context"
	"crypto/ecdsa"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// at dials from an address of its own, so that the caller seems to be on another machine.
func at(address string) grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) {
		return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).DialContext(ctx, "tcp", to)
	})
}

// renewAt renews an agent's SVID over a connection, for a key, and returns the new chain.
func renewAt(t *testing.T, conn *grpc.ClientConn, k *ecdsa.PrivateKey) [][]byte {
	t.Helper()
	r, err := agentv1.NewAgentClient(conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, k)}})
	if err != nil {
		t.Fatal(err)
	}
	return r.Svid.CertChain
}

// use makes any call that needs the SVID.
func use(t *testing.T, conn *grpc.ClientConn) codes.Code {
	t.Helper()
	_, err := nodev1.NewNodeClient(conn).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: []*nodev1.IssueX509SVIDsRequest_Item{{EntryId: "none", PublicKey: spkiOf(t)}}})
	return code(err)
}

// alarms are the events of leaks in the audit log, with their subjects.
func (h *harness) alarms() string {
	h.t.Helper()
	var out []string
	for _, r := range h.audit("leak.") {
		out = append(out, fmt.Sprint(r["event"], " ", r["subject"]))
	}
	return strings.Join(out, "\n")
}

func leaky(t *testing.T, revoke bool) *harness {
	c := config(t.TempDir())
	c.Leaks.Revoke = revoke
	c.Metrics.Listen = "127.0.0.1:0"
	return start(t, c)
}

// TestAnAgentInTwoPlaces: its key and SVID are copied, and the copy renews first, or the original does. Whoever comes second
// gives both away.
func TestAnAgentInTwoPlaces(t *testing.T) {
	for _, revoke := range []bool{false, true} {
		for _, first := range []string{"thief", "agent"} {
			t.Run(fmt.Sprintf("%s first, revoke %t", first, revoke), func(t *testing.T) {
				h := leaky(t, revoke)
				a := h.agent()
				if c := use(t, a.conn); c != codes.OK {
					t.Fatal(c)
				}
				thief := h.dial(a.chain, a.key, at("127.0.0.9"))
				winner, loser, place := a.conn, thief, ""
				if first == "thief" {
					winner, loser, place = thief, a.conn, "127.0.0.9"
				}
				if c := use(t, loser); c != codes.OK {
					t.Fatalf("before anybody renewed: %v", c)
				}
				k := key(t)
				chain := renewAt(t, winner, k)
				if c := use(t, loser); c != codes.OK {
					t.Errorf("before the new one is used: %v", c) // the reply may have been lost
				}
				if got := h.alarms(); got != "" {
					t.Errorf("there are alarms already: %s", got)
				}
				renewed := h.dial(chain, k)
				if place != "" {
					renewed = h.dial(chain, k, at(place))
				}
				if c := use(t, renewed); c != codes.OK {
					t.Fatalf("with the new one: %v", c)
				}
				for range 3 {
					if c := use(t, loser); c != codes.PermissionDenied {
						t.Errorf("with the replaced one: %v", c)
					}
				}
				want := "leak.superseded_svid " + a.id.String()
				if revoke {
					want += "\nleak.revoked " + a.id.String()
				}
				if got := h.alarms(); got != want {
					t.Errorf("the alarms are\n%s\nwant\n%s", got, want)
				}
				count := 3
				if revoke {
					count = 1 // then it is banned
				}
				if _, page := h.page("/metrics"); !strings.Contains(page, fmt.Sprintf("signet_ca_leaks_total{kind=%q} %d", "superseded_svid", count)) {
					t.Error("the metric does not count them")
				}
				now := codes.OK
				if revoke {
					now = codes.PermissionDenied
				}
				if c := use(t, renewed); c != now {
					t.Errorf("the one who renewed, afterwards: %v, want %v", c, now)
				}
				if n := len(h.resources("Revocation")); (n == 1) != revoke {
					t.Errorf("%d revocations", n)
				}
			})
		}
	}
}

// TestWhatIsNoLeak: replies that are lost, restarts, recovery by the last key, connections from before a renewal, and an
// agent that moves to another address raise no alarm.
func TestWhatIsNoLeak(t *testing.T) {
	h := leaky(t, true)
	a := h.agent()
	use(t, a.conn)
	// A renewal whose reply is lost, and one more.
	renewAt(t, a.conn, key(t))
	k2 := key(t)
	chain := renewAt(t, a.conn, k2)
	second := h.dial(chain, k2)
	if c := use(t, second); c != codes.OK {
		t.Fatal(c)
	}
	// The connection from before still has a call under way, which ends.
	if c := use(t, a.conn); c != codes.PermissionDenied {
		t.Errorf("over the old connection: %v", c)
	}
	// It restarts without its SVID, on the same machine, twice, since the first reply is lost; and with an old copy of its key.
	if _, err := recovery(t.Context(), h.dial(nil, nil), a.id, k2, csr(t, key(t))); err != nil {
		t.Fatal(err)
	}
	k3 := key(t)
	won, err := recovery(t.Context(), h.dial(nil, nil), a.id, k2, csr(t, k3))
	if err != nil {
		t.Fatal(err)
	}
	third := h.dial(won.CertChain, k3)
	if c := use(t, third); c != codes.OK {
		t.Fatal(c)
	}
	if _, err := recovery(t.Context(), h.dial(nil, nil), a.id, k2, csr(t, k3)); code(err) != codes.PermissionDenied {
		t.Errorf("with the key from before: %v", err)
	}
	// It moves: renews over the old address, and uses the new SVID from the new one; then the other way round.
	k4 := key(t)
	moved := h.dial(renewAt(t, third, k4), k4, at("127.0.0.7"))
	if c := use(t, moved); c != codes.OK {
		t.Fatal(c)
	}
	if c := use(t, third); c != codes.PermissionDenied {
		t.Errorf("over the connection from before: %v", c)
	}
	// A join token whose reply is lost, with the same key.
	token, k := h.token(), key(t)
	for range 2 {
		if _, err := attest(t.Context(), h.dial(nil, nil), token, csr(t, k)); err != nil {
			t.Fatal(err)
		}
	}
	if got := h.alarms(); got != "" {
		t.Errorf("false alarms: %s", got)
	}
	if n := h.resources("Revocation"); len(n) > 0 {
		t.Errorf("revoked by mistake: %v", n)
	}
}

// TestOldKeysAndTokensFromElsewhere: a copy of a node's disk, and a join token that is used once more.
func TestOldKeysAndTokensFromElsewhere(t *testing.T) {
	h := leaky(t, true)
	token, k := h.token(), key(t)
	svid, err := attest(t.Context(), h.dial(nil, nil), token, csr(t, k))
	if err != nil {
		t.Fatal(err)
	}
	id := ids(t, svid.Id.Path)
	conn := h.dial(svid.CertChain, k)
	if _, err := attest(t.Context(), h.dial(nil, nil, at("127.0.0.5")), token, csr(t, key(t))); code(err) != codes.InvalidArgument {
		t.Errorf("the token, by another key: %v", err)
	}
	if got := h.alarms(); got != "leak.token_reused "+id.String() {
		t.Errorf("the alarms are %s", got)
	}
	for _, r := range h.audit("leak.token_reused") {
		if strings.Contains(fmt.Sprint(r), strings.Split(token, ".")[1]) {
			t.Error("the audit log holds the token's secret")
		}
	}
	if c := use(t, conn); c != codes.OK {
		t.Errorf("who finds an old token shuts the node out: %v", c)
	}
	k2 := key(t)
	if c := use(t, h.dial(renewAt(t, conn, k2), k2)); c != codes.OK {
		t.Fatal(c)
	}
	if _, err := recovery(t.Context(), h.dial(nil, nil, at("127.0.0.5")), id, k, csr(t, k)); code(err) != codes.PermissionDenied {
		t.Errorf("the key from before: %v", err)
	}
	if got := h.alarms(); !strings.HasSuffix(got, "leak.old_key "+id.String()+"\nleak.revoked "+id.String()) {
		t.Errorf("the alarms are %s", got)
	}
}

// TestCanary: an SVID for it is issued, so that who asked notices nothing, over every RPC; and the alarm is raised.
func TestCanary(t *testing.T) {
	h := leaky(t, false)
	h.apply("kind: Identity\nname: trap\nspiffeID: /backup-admin\nmatch: [\"unix:uid:1\"]\ncanary: true\n---\nkind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:2\"]\n")
	a := h.agent()
	trap := "spiffe://example.org/backup-admin"
	s := hello(t, a, "", 0)
	for prefetch := true; prefetch; {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range m.Entries {
			if e.Id == "identity.trap" {
				if prefetch = false; !e.DisableX509Prefetch {
					t.Error("agents fetch it ahead, and raise the alarm themselves")
				}
			}
		}
	}
	ways := map[string]func() error{
		"x509": func() error { _, c := x509For(t, a, "identity.trap"); return grpcError(c) },
		"jwt":  func() error { _, c := tokenFor(t, a, "identity.trap"); return grpcError(c) },
		"mint": func() error {
			_, err := svidv1.NewSVIDClient(h.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/backup-admin"}, Audience: []string{"x"}})
			return err
		},
		"observed": func() error {
			_, err := nodev1.NewNodeClient(a.conn).ReportObservations(t.Context(), &nodev1.ReportObservationsRequest{Observations: []*policyv1.Observation{
				{Service: "spiffe://example.org/web", Peer: trap, Count: 1, First: time.Now().UnixNano(), Last: time.Now().UnixNano(), Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Method: "GET", Path: "/", Reason: "no policy", Point: "http"},
				{Service: "spiffe://example.org/elsewhere", Peer: trap, Count: 1, First: time.Now().UnixNano(), Last: time.Now().UnixNano(), Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Reason: "no policy", Point: "http"}}})
			return err
		},
	}
	for name, way := range ways {
		if err := way(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		h.ca.leaks.mu.Lock()
		clear(h.ca.leaks.raised) // the next is an alarm of its own
		h.ca.leaks.mu.Unlock()
	}
	issued, used := h.audit("leak.canary_issued"), h.audit("leak.canary_used")
	if len(issued) != 3 || len(used) != 1 || issued[0]["subject"] != trap || used[0]["subject"] != trap {
		t.Errorf("alarms: %v, %v", issued, used)
	}
	if d, _ := used[0]["details"].(map[string]any); d["service"] != "spiffe://example.org/web" || d["reported_by"] != a.id.String() {
		t.Errorf("what was observed: %v", used[0])
	}
	if _, c := x509For(t, a, "identity.web"); c != codes.OK || len(h.audit("leak.canary_issued")) != 3 {
		t.Errorf("another identity: %v, and an alarm", c)
	}
}

func grpcError(c codes.Code) error {
	if c == codes.OK {
		return nil
	}
	return fmt.Errorf("code %v", c)
}

// TestAlarmsAreNotAFlood: the same alarm is one record in ten minutes, and different ones are bounded.
func TestAlarmsAreNotAFlood(t *testing.T) {
	var clock movedClock
	c := config(t.TempDir())
	c.Now = clock.now
	h := start(t, c)
	id := ids(t, "/spire/agent/x/y")
	for range 100 {
		h.ca.leaks.OldKey(t.Context(), id, "192.0.2.1:99")
		h.ca.leaks.OldKey(t.Context(), id, "[2001:db8::1]:99")
	}
	if n := len(h.audit("leak.")); n != 2 {
		t.Errorf("%d records of two alarms", n)
	}
	clock.move(11 * time.Minute)
	h.ca.leaks.OldKey(t.Context(), id, "192.0.2.1:100")
	if n := len(h.audit("leak.")); n != 3 {
		t.Errorf("%d records after ten minutes", n)
	}
	for i := range maxRaised {
		h.ca.leaks.first(fmt.Sprint(i))
	}
	if n := len(h.ca.leaks.raised); n > maxRaised {
		t.Errorf("%d alarms are remembered", n)
	}
}
