package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/internal/faultca"
)

// newSPIRERig is a rig whose CA is a SPIRE server, to which the agent comes with a plain token and a bundle file.
func newSPIRERig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.ca = faultca.StartSPIRE(t)
	r.ca.Entries = []*types.Entry{{Id: "web", SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/web"}, CreatedAt: 1_700_000_000,
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}}}}
	r.ca.Judge = func(kind string, _ []byte, _ func([]byte) ([]byte, error)) error {
		return status.Errorf(codes.FailedPrecondition, "error getting node attestor: could not find node attestor type %q", kind)
	}
	bundle := filepath.Join(t.TempDir(), "bundle.pem")
	if err := os.WriteFile(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.ca.Root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	r.config.ServerAddress, r.config.TrustBundlePath, r.config.PollInterval = r.ca.Addr, bundle, time.Second
	r.config.JoinToken = "7e2bd5f5-8f8a-4d1c-9a59-1c1a2f0c7a11"
	return r
}

// Whatever a SPIRE server answers that is not the workload's own valid SVID, nobody gets it; and when the server is in its right
// mind again, the workload has its SVID.
func TestHostileSPIREServer(t *testing.T) {
	stranger := faultca.StartSPIRE(t) // of the same name, with another root
	signed := func(ca *faultca.CA, path string, key any, ttl time.Duration) []byte {
		der, err := ca.Sign(path, key, ttl)
		if err != nil {
			t.Error(err)
		}
		return der
	}
	otherKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, answer := range map[string]func(ca *faultca.CA, key any) *svidv1.BatchNewX509SVIDResponse_Result{
		"another trust domain's": func(ca *faultca.CA, key any) *svidv1.BatchNewX509SVIDResponse_Result {
			der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(9), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
				KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "other.example", Path: "/web"}}}, &x509.Certificate{}, key, otherKey)
			if err != nil {
				t.Error(err)
			}
			return faultca.Granted(der)
		},
		"another workload's": func(ca *faultca.CA, key any) *svidv1.BatchNewX509SVIDResponse_Result {
			return faultca.Granted(signed(ca, "/db", key, time.Hour))
		},
		"for another key": func(ca *faultca.CA, _ any) *svidv1.BatchNewX509SVIDResponse_Result {
			return faultca.Granted(signed(ca, "/web", otherKey.Public(), time.Hour))
		},
		"over": func(ca *faultca.CA, key any) *svidv1.BatchNewX509SVIDResponse_Result {
			return faultca.Granted(signed(ca, "/web", key, -time.Second))
		},
		"of a root that is not in the bundle": func(_ *faultca.CA, key any) *svidv1.BatchNewX509SVIDResponse_Result {
			stranger.Lock()
			defer stranger.Unlock()
			return faultca.Granted(signed(stranger, "/web", key, time.Hour))
		},
		"of a chain that is broken": func(_ *faultca.CA, key any) *svidv1.BatchNewX509SVIDResponse_Result {
			stranger.Lock()
			defer stranger.Unlock()
			return faultca.Granted(signed(stranger, "/web", key, time.Hour), stranger.Root.Raw)
		},
		"garbage": func(*faultca.CA, any) *svidv1.BatchNewX509SVIDResponse_Result {
			return faultca.Granted([]byte("garbage"))
		},
		"nothing": func(*faultca.CA, any) *svidv1.BatchNewX509SVIDResponse_Result { return faultca.Granted() },
		"a nil result": func(*faultca.CA, any) *svidv1.BatchNewX509SVIDResponse_Result {
			return &svidv1.BatchNewX509SVIDResponse_Result{}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newSPIRERig(t)
			asked := make(chan struct{}, 1000)
			r.ca.BatchX509 = func(request *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
				response := &svidv1.BatchNewX509SVIDResponse{}
				for _, p := range request.Params {
					csr, err := x509.ParseCertificateRequest(p.Csr)
					if err != nil {
						return nil, err
					}
					response.Results = append(response.Results, answer(r.ca, csr.PublicKey))
				}
				asked <- struct{}{}
				return response, nil
			}
			a, _ := r.run()
			r.ready(a)
			client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(a.Addr()))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			got := make(chan error, 1)
			go func() {
				svid, err := client.FetchX509SVID(t.Context())
				if err == nil {
					err = fmt.Errorf("the workload got %s", svid.ID)
				}
				got <- err
			}()
			for range 2 { // it is asked for again
				select {
				case <-asked:
				case err := <-got:
					if status.Code(err) != codes.Unavailable {
						t.Fatal(err)
					}
					got = nil
				case <-time.After(20 * time.Second):
					t.Fatal("the agent asks for no SVID")
				}
			}
			r.log.await(t, "X509-SVIDs were not issued")
			r.ca.Lock()
			r.ca.BatchX509 = nil
			r.ca.Unlock()
			src, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(a.Addr())))
			if err != nil {
				t.Fatal(err)
			}
			defer src.Close()
			if svid, err := src.GetX509SVID(); err != nil || svid.ID.Path() != "/web" || svid.Certificates[0].NotAfter.Before(time.Now()) {
				t.Errorf("from a server in its right mind: %v, %v", svid, err)
			}
		})
	}
}

func TestHostileSPIREServerJWT(t *testing.T) {
	r := newSPIRERig(t)
	claims := ""
	r.ca.SingleJWT = func(*svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
		b64 := base64.RawURLEncoding.EncodeToString
		exp := time.Now().Add(time.Minute)
		token := b64([]byte(`{"alg":"ES256","kid":"k"}`)) + "." + b64(fmt.Appendf(nil, `{%s,"exp":%d}`, claims, exp.Unix())) + "." + b64(make([]byte, 64))
		return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: token, IssuedAt: time.Now().Unix(), ExpiresAt: exp.Unix()}}, nil
	}
	a, _ := r.run()
	r.ready(a)
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(a.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, tt := range []struct {
		claims string
		good   bool
	}{
		{`"sub":"spiffe://example.org/web","aud":["db"]`, true},
		{`"sub":"spiffe://example.org/admin","aud":["mail"]`, false},
		{`"sub":"spiffe://example.org/web","aud":["everybody"]`, false},
	} {
		r.ca.Lock()
		claims = tt.claims
		r.ca.Unlock()
		audience := "db"
		if !tt.good {
			audience = "mail"
		}
		svid, err := client.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: audience})
		if (err == nil) != tt.good {
			t.Errorf("a token with %s: %v, %v", tt.claims, svid, err)
		}
	}
}

// SPIRE's tokens are good once, and its servers let nobody in by the key of the last SVID: the agent says what it needs, goes on
// serving, and comes back with a fresh token.
func TestEvictedBySPIREServer(t *testing.T) {
	r := newSPIRERig(t)
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(string(r.config.JoinToken)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.config.JoinToken, r.config.JoinTokenFile = "", file
	a, _ := r.run()
	r.ready(a)
	src, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(a.Addr())))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	serial := a.node.identity().Certificates[0].SerialNumber.String()
	r.ca.Lock()
	r.ca.Deny = func(s string) error {
		if s == serial {
			return faultca.Denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
		}
		return nil
	}
	r.ca.Unlock()
	line := r.log.await(t, "cannot attest again by itself")
	for _, want := range []string{"spire-server token generate", "no node back in by its key"} {
		if !strings.Contains(line, want) {
			t.Errorf("the log does not say %q: %s", want, line)
		}
	}
	if s := a.Status(); s.State != Refused || s.Server != "spire" {
		t.Errorf("Status = %+v", s)
	}
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(a.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if svid, err := client.FetchX509SVID(t.Context()); err != nil || svid.ID.Path() != "/web" {
		t.Errorf("meanwhile a workload gets %v, %v", svid, err)
	}
	if err := os.WriteFile(file, []byte("0c0ffee0-8f8a-4d1c-9a59-1c1a2f0c7a11\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	look, end := time.NewTicker(20*time.Millisecond), time.After(30*time.Second)
	defer look.Stop()
	for a.Status().State != InSync {
		select {
		case <-look.C:
		case <-end:
			t.Fatalf("with a fresh token: %+v", a.Status())
		}
	}
}

// Without a bundle file nothing verifies a SPIRE server, and that is no way in.
func TestSPIRETokenNeedsABundle(t *testing.T) {
	r := newSPIRERig(t)
	r.config.TrustBundlePath = ""
	if _, err := New(r.config); err == nil || !strings.Contains(err.Error(), "spire-server bundle show") || strings.Contains(err.Error(), "7e2bd5f5") {
		t.Errorf("New: %v", err)
	}
	r.config.JoinTokenFile, r.config.JoinToken = filepath.Join(t.TempDir(), "token"), ""
	if err := os.WriteFile(r.config.JoinTokenFile, []byte("7e2bd5f5-8f8a-4d1c-9a59-1c1a2f0c7a11"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, stop := r.run()
	if line := r.log.await(t, "not attested yet"); !strings.Contains(line, "spire-server bundle show") {
		t.Errorf("the log says %s", line)
	}
	stop()

	// A server that is not the trust domain's is shown no token.
	r = newSPIRERig(t)
	r.ca.Attest = func(string, *ecdsa.PublicKey) error {
		t.Error("the token was sent")
		return errors.New("no")
	}
	stranger := faultca.StartSPIRE(t)
	if err := os.WriteFile(r.config.TrustBundlePath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: stranger.Root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	r.run()
	r.log.await(t, "not attested yet")
}

// A renewal that brings nothing good leaves the agent with the SVID that it has, so that it can ask again.
func TestRenewalThatBringsNothingGood(t *testing.T) {
	for name, start := range map[string]func(*testing.T) *rig{"signet": newRig, "SPIRE": newSPIRERig} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t)
			r.ca.AgentTTL = 6 * time.Second
			a, _ := r.run()
			r.ready(a)
			before := a.node.identity()
			r.ca.Lock()
			r.ca.AgentTTL = -time.Second
			r.ca.Unlock()
			if line := r.log.await(t, "what the CA issued is unusable"); !strings.Contains(line, "was not renewed") {
				t.Errorf("the log says %s", line)
			}
			if a.node.identity() != before {
				t.Error("an SVID that is over has taken the place of a good one")
			}
			r.ca.Lock()
			r.ca.AgentTTL = time.Hour
			r.ca.Unlock()
			r.log.await(t, "the agent's SVID is renewed")
		})
	}
}
