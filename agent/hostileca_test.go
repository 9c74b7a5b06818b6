package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/agent/internal/faultca"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// TestHostileCA: whatever the agent's CA answers that is not the workload's own valid SVID, the workload never gets; and when the CA
// is in its right mind again, the workload has its SVID.
func TestHostileCA(t *testing.T) {
	otherKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(ca *faultca.CA, path string, key any, ttl time.Duration) []byte {
		ca.Lock()
		defer ca.Unlock()
		der, err := ca.Sign(path, key, ttl)
		if err != nil {
			t.Error(err)
		}
		return der
	}
	for name, answer := range map[string]func(ca *faultca.CA, key any) [][]byte{
		"another trust domain's": func(_ *faultca.CA, key any) [][]byte {
			der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(9), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
				KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "other.example", Path: "/web"}}}, &x509.Certificate{}, key, otherKey)
			if err != nil {
				t.Error(err)
			}
			return [][]byte{der}
		},
		"of a root that nobody knows": func(_ *faultca.CA, key any) [][]byte {
			der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(9), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
				KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/web"}}}, &x509.Certificate{}, key, otherKey)
			if err != nil {
				t.Error(err)
			}
			return [][]byte{der}
		},
		"another workload's": func(ca *faultca.CA, key any) [][]byte { return [][]byte{sign(ca, "/db", key, time.Hour)} },
		"for another key":    func(ca *faultca.CA, _ any) [][]byte { return [][]byte{sign(ca, "/web", otherKey.Public(), time.Hour)} },
		"over":               func(ca *faultca.CA, key any) [][]byte { return [][]byte{sign(ca, "/web", key, -time.Second)} },
		"garbage":            func(*faultca.CA, any) [][]byte { return [][]byte{[]byte("garbage")} },
		"nothing":            func(*faultca.CA, any) [][]byte { return nil },
	} {
		for _, revision := range []int64{1, 99} { // 99: of an entry that the agent does not know yet
			t.Run(fmt.Sprintf("%s, revision %d", name, revision), func(t *testing.T) {
				t.Parallel()
				r := newRig(t)
				r.config.RegistrationWait = 100 * time.Millisecond
				r.ca.Held = []*nodev1.Entry{{Id: "web", Revision: 1, CreatedAt: 1_700_000_000, SpiffeId: "spiffe://example.org/web", Selectors: []string{fmt.Sprintf("unix:uid:%d", os.Getuid())}}}
				asked := make(chan struct{}, 1000)
				issue := func(answer func(ca *faultca.CA, key any) [][]byte) func(*nodev1.IssueX509SVIDsRequest) (*nodev1.IssueX509SVIDsResponse, error) {
					return func(request *nodev1.IssueX509SVIDsRequest) (*nodev1.IssueX509SVIDsResponse, error) {
						response := &nodev1.IssueX509SVIDsResponse{}
						for _, item := range request.GetItems() {
							key, err := x509.ParsePKIXPublicKey(item.GetPublicKey())
							if err != nil {
								return nil, err
							}
							response.Results = append(response.Results, &nodev1.IssueX509SVIDsResponse_Result{CertChain: answer(r.ca, key), EntryRevision: revision,
								NotBefore: time.Now().Add(-time.Minute).Unix(), NotAfter: time.Now().Add(time.Hour).Unix()})
						}
						select {
						case asked <- struct{}{}:
						default:
						}
						return response, nil
					}
				}
				r.ca.Issue = issue(answer)
				a, _ := r.run()
				got := make(chan error, 1)
				ctx := t.Context()
				go func() {
					src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(a.Addr()))) // tries until it has one
					if err != nil {
						got <- err
						return
					}
					defer src.Close()
					svid, err := src.GetX509SVID()
					if err == nil && (svid.ID.Path() != "/web" || svid.Certificates[0].NotAfter.Before(time.Now()) || svid.Certificates[0].CheckSignatureFrom(r.ca.Root) != nil) {
						err = fmt.Errorf("the workload got %s, valid until %s", svid.ID, svid.Certificates[0].NotAfter)
					}
					got <- err
				}()
				for range 3 { // it is asked for again and again
					select {
					case <-asked:
					case err := <-got:
						t.Fatalf("the workload's source ended early: %v", err)
					case <-time.After(20 * time.Second):
						t.Fatalf("the agent asks for no SVID: %s", r.log.text.String())
					}
				}
				r.ca.Lock()
				r.ca.Issue = issue(func(ca *faultca.CA, key any) [][]byte { return [][]byte{sign(ca, "/web", key, time.Hour)} })
				r.ca.Unlock()
				select {
				case err := <-got:
					if err != nil {
						t.Error(err)
					}
				case <-time.After(40 * time.Second):
					t.Error("the workload has no SVID from a CA in its right mind")
				}
			})
		}
	}
}
