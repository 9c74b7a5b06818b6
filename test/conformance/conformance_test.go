// Package conformance shows requirements of the SPIFFE standards that no single package can show: with a real CA and a
// real agent, from a workload's side.
package conformance

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/test/signettest"
)

const audience = "conformance"

// workloads starts signet with one identity, /w, for this process.
func workloads(t *testing.T) (context.Context, *signettest.Signet, *workloadapi.X509Source, *workloadapi.JWTSource) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	s := signettest.Start(t, signettest.Config{})
	s.Apply(fmt.Sprintf("kind: Identity\nname: w\nspiffeID: /w\nmatch: [unix:uid:%d]\n", os.Getuid()))
	options := workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI()))
	x, err := workloadapi.NewX509Source(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
	j, err := workloadapi.NewJWTSource(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return ctx, s, x, j
}

// TestSVID_04_IDAndKeyAreSigned changes the ID and the key of issued SVIDs; and looks for an ID that is not signed.
func TestSVID_04_IDAndKeyAreSigned(t *testing.T) {
	ctx, _, xs, js := workloads(t)
	svid, err := xs.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	leaf := svid.Certificates[0]
	if _, _, err := spiffe.VerifyX509SVID(svid.Certificates, xs, spiffe.X509Options{}); err != nil {
		t.Fatalf("the SVID as issued: %v", err)
	}
	key := leaf.PublicKey.(*ecdsa.PublicKey)
	point, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	for what, part := range map[string][]byte{"ID": []byte("spiffe://example.org/w"), "public key": point} {
		at := strings.Index(string(leaf.Raw), string(part))
		if at < 0 {
			t.Fatalf("the certificate does not hold its %s", what)
		}
		if inside := strings.Contains(string(leaf.RawTBSCertificate), string(part)); !inside {
			t.Errorf("the %s is not inside of the signed bytes", what)
		}
		changed := []byte(string(leaf.Raw))
		changed[at+len(part)-1] ^= 2 // /w becomes /u
		other, err := x509.ParseCertificate(changed)
		if err != nil {
			continue // a point that is not on the curve
		}
		if id, _, err := spiffe.VerifyX509SVID([]*x509.Certificate{other}, xs, spiffe.X509Options{}); err == nil {
			t.Errorf("VerifyX509SVID accepts a changed %s as %s", what, id)
		}
	}

	token, err := js.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(token.Marshal(), ".")
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(claims), "example.org/w", "example.org/u", 1)))
	if got, err := spiffe.ValidateJWTSVID(strings.Join(parts, "."), js, []string{audience}, spiffe.JWTOptions{}); err == nil {
		t.Errorf("ValidateJWTSVID accepts a changed subject as %s", got.ID)
	}
}

// TestSVID_05_NoOtherDocuments hands documents of other kinds to the validators.
func TestSVID_05_NoOtherDocuments(t *testing.T) {
	ctx, _, xs, js := workloads(t)
	token, err := js.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		t.Fatal(err)
	}
	enc := base64.RawURLEncoding.EncodeToString
	signature := token.Marshal()[strings.LastIndexByte(token.Marshal(), '.')+1:]
	for what, document := range map[string]string{
		"nested JWT":       enc([]byte(`{"alg":"ES256","cty":"JWT"}`)) + "." + enc([]byte(token.Marshal())) + "." + signature,
		"PASETO":           "v4.public." + enc([]byte(`{"sub":"spiffe://example.org/w"}`)),
		"public key":       enc(mustKey(t)),
		"JWS in JSON":      `{"payload":"` + strings.Split(token.Marshal(), ".")[1] + `"}`,
		"unsigned":         enc([]byte(`{"alg":"none"}`)) + "." + strings.Split(token.Marshal(), ".")[1] + ".",
		"SPIFFE ID itself": "spiffe://example.org/w",
	} {
		if got, err := spiffe.ValidateJWTSVID(document, js, []string{audience}, spiffe.JWTOptions{}); err == nil {
			t.Errorf("ValidateJWTSVID accepts a %s as %s", what, got.ID)
		}
		if _, err := x509.ParseCertificate([]byte(document)); err == nil {
			t.Errorf("a %s is read as a certificate", what)
		}
	}
	if id, _, err := spiffe.VerifyX509SVID(nil, xs, spiffe.X509Options{}); err == nil {
		t.Errorf("VerifyX509SVID accepts nothing as %s", id)
	}
}

func mustKey(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestSVID_07_ClaimsAreNotMatchedWithoutTheirTrustDomain: conditions on claims, which would need the trust domain
// beside them, are refused at load by this version, with or without it.
func TestSVID_07_ClaimsAreNotMatchedWithoutTheirTrustDomain(t *testing.T) {
	for _, when := range []string{`jwt.claims.scope == "admin"`, `jwt.trust_domain == "example.org" && jwt.claims.scope == "admin"`} {
		docs, err := strictyaml.Split([]byte("kind: CallPolicy\nname: p\nservice: /s\nallow:\n  - from: [/w]\n    when: '"+when+"'\n"), "p.yaml", 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := policy.Check(docs, spiffeid.RequireTrustDomainFromString("example.org")); err == nil || !strings.Contains(err.Error(), "when") {
			t.Errorf("policy.Check with when: %s = %v; want a refusal that names when", when, err)
		}
	}
}

func anyone(spiffeid.ID, [][]*x509.Certificate) error { return nil }

// handshake lets a client with the given key meet a server that verifies it as our enforcement points do, and returns
// the errors of both.
func handshake(t *testing.T, server *workloadapi.X509Source, bundles x509bundle.Source, chain [][]byte, key any) (serverErr, clientErr error) {
	t.Helper()
	svid, err := server.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	own := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, c := range svid.Certificates {
		own.Certificate = append(own.Certificate, c.Raw)
	}
	a, b := net.Pipe()
	deadline := time.Now().Add(10 * time.Second)
	for _, c := range []net.Conn{a, b} {
		defer c.Close()
		if err := c.SetDeadline(deadline); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() {
		s := tls.Server(a, &tls.Config{Certificates: []tls.Certificate{own}, ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS13,
			SessionTicketsDisabled: true, VerifyPeerCertificate: spiffe.VerifyPeer(bundles, time.Now, anyone)})
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("in"))
		}
		s.Close()
		done <- err
	}()
	c := tls.Client(b, &tls.Config{Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: key}}, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, VerifyPeerCertificate: spiffe.VerifyPeer(server, time.Now, anyone)}) // by ID, not by host name
	if clientErr = c.Handshake(); clientErr == nil {
		buf := make([]byte, 2)
		_, clientErr = c.Read(buf)
	}
	b.Close()
	return <-done, clientErr
}

// TestSVID_08_X509_54_WAPI_14_Handshakes: a certificate without its key proves nothing, a peer whose trust domain has no bundle is untrusted,
// and who is refused learns that, but nothing of our bundles.
func TestSVID_08_X509_54_WAPI_14_Handshakes(t *testing.T) {
	_, _, xs, _ := workloads(t)
	svid, err := xs.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	chain := [][]byte{svid.Certificates[0].Raw}
	if s, c := handshake(t, xs, xs, chain, svid.PrivateKey); s != nil || c != nil {
		t.Fatalf("with its own key: server %v, client %v", s, c)
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if s, c := handshake(t, xs, xs, chain, stranger); s == nil || c == nil {
		t.Errorf("with another key: server %v, client %v; want that both fail", s, c)
	}
	other := x509bundle.New(spiffeid.RequireTrustDomainFromString("other.example"))
	s, c := handshake(t, xs, other, chain, svid.PrivateKey)
	if s == nil || spiffe.RowOf(s) == "" {
		t.Errorf("without a bundle of its trust domain: server %v; want a refusal with its row", s)
	}
	if c == nil {
		t.Error("the refused client could read: the connection was not closed")
	} else if strings.Contains(c.Error(), "other.example") {
		t.Errorf("the refused client is told %q, which names another bundle", c)
	}
}

// TestWAPI_03_04_TheStandardsMethodsAlone calls the socket as a workload.
func TestWAPI_03_04_TheStandardsMethodsAlone(t *testing.T) {
	ctx, s, _, _ := workloads(t)
	conn, err := grpc.NewClient(s.WorkloadAPI(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	// The standard allows to leave the WIT profile out, and a method that it does not know is not there.
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchWITSVID(ctx, &workload.WITSVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("FetchWITSVID = %v; want Unimplemented", err)
	}
	for _, method := range []string{"FetchPolicies", "FetchX509SVIDs", "fetchx509svid"} {
		var out workload.X509SVIDResponse
		if err := conn.Invoke(ctx, "/SpiffeWorkloadAPI/"+method, &workload.X509SVIDRequest{}, &out); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s = %v; want Unimplemented", method, err)
		}
	}
	if bundles, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509Bundles(ctx, &workload.X509BundlesRequest{}); err != nil {
		t.Error(err)
	} else if _, err := bundles.Recv(); err != nil {
		t.Errorf("FetchX509Bundles = %v", err)
	}
}
