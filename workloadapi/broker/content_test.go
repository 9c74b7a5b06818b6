package broker_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/workloadapi/broker"
	"github.com/signet-id/signet/workloadapi/broker/internal/brokertest"
)

// TestBAPI_32_X509SVIDs has the formats of each field, and hints once.
func TestBAPI_32_X509SVIDs(t *testing.T) {
	a, src, e, w := oneWorkload(t, func(c *broker.Config) { c.IssueWait = 200 * time.Millisecond })
	src.Change(func() {
		src.Entries[0].Identity.Hint = "internal"
		for _, path := range []string{"/again", "/plain"} {
			i := a.Identity(t, path)
			if path == "/again" {
				i.Hint = "internal"
			}
			src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(w), Identity: i})
		}
	})
	_, m := subscribe(t, asBroker(t, e, a), pidRef(t, w.PID))
	if ids(m) != "/web /plain" {
		t.Fatalf("%q, want the first of those with the same hint", ids(m))
	}
	for _, s := range m.Svids {
		chain, err := x509.ParseCertificates(s.X509Svid)
		if err != nil || len(chain) != 1 || chain[0].URIs[0].String() != s.SpiffeId {
			t.Fatalf("x509_svid of %s: %v", s.SpiffeId, err)
		}
		key, err := x509.ParsePKCS8PrivateKey(s.X509SvidKey)
		if err != nil || !key.(*ecdsa.PrivateKey).PublicKey.Equal(chain[0].PublicKey) {
			t.Errorf("x509_svid_key of %s: %v", s.SpiffeId, err)
		}
		if !bytes.Equal(s.Bundle, a.Root.Raw) {
			t.Errorf("bundle of %s is not the trust domain's", s.SpiffeId)
		}
	}
	src.Change(func() { src.Bundles = map[spiffeid.TrustDomain]*brokertest.Authority{} })
	stream, err := asBroker(t, e, a).SubscribeToX509SVID(header(t), &brokerpb.SubscribeToX509SVIDRequest{Reference: pidRef(t, w.PID)})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err == nil {
		t.Errorf("half a message was sent: %d SVIDs without a bundle", len(m.Svids))
	}
}

// TestBAPI_33_BAPI_35_Bundles: those of the workload's federation and always our own; keys of JWT-SVIDs alone.
func TestBAPI_33_BAPI_35_Bundles(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	partner, stranger := brokertest.NewAuthority(t, "partner.example"), brokertest.NewAuthority(t, "stranger.example")
	src.Change(func() {
		src.Bundles[partner.TD], src.Bundles[stranger.TD] = partner, stranger
		src.Entries[0].Identity.FederatesWith = []spiffeid.TrustDomain{partner.TD}
	})
	c := asBroker(t, e, a)
	x, err := c.SubscribeToX509Bundles(header(t), &brokerpb.SubscribeToX509BundlesRequest{Reference: pidRef(t, w.PID)})
	if err != nil {
		t.Fatal(err)
	}
	got := recv(t, x).Bundles
	if len(got) != 2 || !bytes.Equal(got["spiffe://example.org"], a.Root.Raw) || !bytes.Equal(got["spiffe://partner.example"], partner.Root.Raw) {
		t.Errorf("X.509 bundles of %d trust domains, want our own and the partner's", len(got))
	}
	j, err := c.SubscribeToJWTBundles(header(t), &brokerpb.SubscribeToJWTBundlesRequest{Reference: pidRef(t, w.PID)})
	if err != nil {
		t.Fatal(err)
	}
	sets := recv(t, j).Bundles
	if len(sets) != 2 {
		t.Errorf("JWT bundles of %d trust domains, want 2", len(sets))
	}
	for td, set := range sets {
		var doc struct{ Keys []map[string]any }
		if err := json.Unmarshal(set, &doc); err != nil || len(doc.Keys) != 1 {
			t.Fatalf("JWT bundle of %s: %d keys, %v", td, len(doc.Keys), err)
		}
		if use, ok := doc.Keys[0]["use"]; ok && use != "jwt-svid" || doc.Keys[0]["x5c"] != nil {
			t.Errorf("JWT bundle of %s has a key for another use: %v", td, doc.Keys[0])
		}
	}
	// The partner's redaction shows in the next messages, and nothing else of them is missing.
	src.Change(func() { src.Entries[0].Identity.FederatesWith = nil })
	if got := recv(t, x).Bundles; len(got) != 1 || got["spiffe://example.org"] == nil {
		t.Errorf("X.509 bundles of %d trust domains after the federation ended, want our own", len(got))
	}
	if got := recv(t, j).Bundles; len(got) != 1 || got["spiffe://example.org"] == nil {
		t.Errorf("JWT bundles of %d trust domains after the federation ended, want our own", len(got))
	}
}

// TestBAPI_34_JWTSVIDs: tokens for exactly the audiences, for each identity or for the one asked for.
func TestBAPI_34_JWTSVIDs(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	src.Change(func() {
		src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(w), Identity: a.Identity(t, "/second")})
	})
	c := asBroker(t, e, a)
	audience := []string{"b", "a"}
	for id, want := range map[string][]string{
		"":                            {"spiffe://example.org/web", "spiffe://example.org/second"},
		"spiffe://example.org/second": {"spiffe://example.org/second"},
	} {
		resp, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: audience, SpiffeId: id})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range resp.Svids {
			token, err := jwtsvid.ParseInsecure(s.Svid, []string{"a"})
			if err != nil {
				t.Fatal(err)
			}
			if token.ID.String() != s.SpiffeId || !slices.Equal(token.Audience, audience) {
				t.Errorf("the token for %s has sub %s and aud %q, want %q", s.SpiffeId, token.ID, token.Audience, audience)
			}
			got = append(got, s.SpiffeId)
		}
		if !slices.Equal(got, want) {
			t.Errorf("spiffe_id %q: tokens for %q, want %q", id, got, want)
		}
	}
	_, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: audience, SpiffeId: "spiffe://example.org/third"})
	wantInfo(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", nil)
}

// TestBAPI_37_WhoGotWhat: what is handed out is the workload's, and the log names the broker and the workload.
func TestBAPI_37_WhoGotWhat(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	// The broker is this test, which has an identity of its own.
	src.Change(func() {
		src.Entries = append(src.Entries, brokertest.Entry{Selector: "test:pid:" + itoa(int32(os.Getpid())), Identity: a.Identity(t, brokertest.BrokerPath)})
	})
	c := asBroker(t, e, a)
	if _, m := subscribe(t, c, pidRef(t, w.PID)); ids(m) != "/web" {
		t.Errorf("the broker got %q", ids(m))
	}
	resp, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	log := e.Log.String()
	for _, what := range []string{"X509-SVIDs handed to a broker", "JWT-SVIDs handed to a broker"} {
		line := ""
		for l := range strings.Lines(log) {
			if strings.Contains(l, what) {
				line = l
			}
		}
		for _, part := range []string{"broker=spiffe://example.org/broker", "spiffe_id=spiffe://example.org/web", "process " + itoa(w.PID)} {
			if !strings.Contains(line, part) {
				t.Errorf("the line of %q is %q; it does not have %q", what, line, part)
			}
		}
	}
	if strings.Contains(log, resp.Svids[0].Svid) {
		t.Error("a token is in the log")
	}
}
