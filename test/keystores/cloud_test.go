//go:build cgo

package keystores_test

import (
	"bufio"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	_ "go.step.sm/crypto/kms/awskms"
	_ "go.step.sm/crypto/kms/azurekms"
	_ "go.step.sm/crypto/kms/cloudkms"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-id/signet/ca/keys"
	_ "github.com/signet-id/signet/ca/keys/lookup"
)

// The clouds' endpoints cannot be configured for every driver, so the drivers are left to call the real names, through a
// proxy that leads to stand-ins on this machine, over TLS that they verify: HTTPS_PROXY and SSL_CERT_FILE are all that they
// are told. Whatever the SDKs send is real; what the stand-ins answer follows the clouds' documentation, and they really make
// keys and sign.

// A vault is the keys of one stand-in.
type vault struct {
	mu   sync.Mutex
	keys []*vaultKey
	// fault, if set, is asked before each call and may refuse it.
	fault func(call string) error
}

type vaultKey struct {
	id, name string
	aliases  []string
	signer   crypto.Signer
}

func (v *vault) refuse(call string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fault != nil {
		return v.fault(call)
	}
	return nil
}

func (v *vault) setFault(f func(call string) error) {
	v.mu.Lock()
	v.fault = f
	v.mu.Unlock()
}

// count returns how many keys there are. Versions of one key count as one: an SDK that repeats a request whose answer was
// lost makes another version.
func (v *vault) count() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	names := map[string]bool{}
	for _, k := range v.keys {
		names[k.name] = true
	}
	return len(names)
}

func (v *vault) add(k *vaultKey) {
	v.mu.Lock()
	v.keys = append(v.keys, k)
	v.mu.Unlock()
}

// find returns the newest key of which is holds.
func (v *vault) find(is func(*vaultKey) bool) *vaultKey {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i := len(v.keys) - 1; i >= 0; i-- {
		if is(v.keys[i]) {
			return v.keys[i]
		}
	}
	return nil
}

func makeSigner(kind string) (crypto.Signer, error) {
	switch kind {
	case "P256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "P384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "RSA2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("no stand-in for keys of kind %q", kind)
}

// clouds are the stand-ins of this process.
var clouds struct {
	aws, gcp, azure *vault
	credentials     string // a file, for GCP
}

// startClouds starts the stand-ins and the proxy, and points this process and its children to them. It is called before
// anything else, since Go reads both variables once.
func startClouds() (stop func(), err error) {
	dir, err := os.MkdirTemp("", "clouds")
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "the clouds"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		DNSNames: []string{"*.amazonaws.com", "*.eu-central-1.amazonaws.com", "*.googleapis.com", "*.vault.azure.net", "login.microsoftonline.com"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	pemFile := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(pemFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return nil, err
	}
	certificate := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	clouds.aws, clouds.gcp, clouds.azure = &vault{}, &vault{}, &vault{}
	if clouds.credentials, err = gcpCredentials(dir); err != nil {
		return nil, err
	}

	plain, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		return nil, err
	}
	web := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch host := r.Host; {
		case strings.HasSuffix(host, ".amazonaws.com"):
			serveAWS(clouds.aws, w, r)
		case strings.HasSuffix(host, ".vault.azure.net"):
			serveAzure(clouds.azure, w, r)
		case host == "login.microsoftonline.com":
			serveAzureLogin(w, r)
		case host == "oauth2.googleapis.com":
			answer(w, http.StatusOK, map[string]any{"access_token": "gcp-token", "token_type": "Bearer", "expires_in": 3600})
		default:
			http.Error(w, "no stand-in for "+host, http.StatusBadGateway)
		}
	})}
	go web.Serve(plain)

	rpc, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	google := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&certificate)))
	registerGCP(google, clouds.gcp)
	go google.Serve(rpc)

	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go serveProxy(proxy, plain.Addr().String(), rpc.Addr().String())
	for name, value := range map[string]string{
		"HTTPS_PROXY": "http://" + proxy.Addr().String(), "https_proxy": "", "NO_PROXY": "", "no_proxy": "", "SSL_CERT_FILE": pemFile, "SSL_CERT_DIR": dir,
		"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "aws-secret", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", "AWS_CA_BUNDLE": pemFile,
		"AZURE_TENANT_ID": "11111111-2222-3333-4444-555555555555", "AZURE_CLIENT_ID": "signet", "AZURE_CLIENT_SECRET": "azure-secret",
	} {
		if err := os.Setenv(name, value); err != nil {
			return nil, err
		}
	}
	return func() { proxy.Close(); web.Close(); google.Stop(); os.RemoveAll(dir) }, nil
}

// serveProxy answers CONNECT by leading to a stand-in, whatever the name.
func serveProxy(l net.Listener, web, google string) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return // closed
		}
		go func() {
			defer conn.Close()
			from := bufio.NewReader(conn)
			r, err := http.ReadRequest(from)
			if err != nil || r.Method != http.MethodConnect {
				return
			}
			target := web
			if strings.HasPrefix(r.Host, "cloudkms.") {
				target = google
			}
			to, err := net.Dial("tcp", target)
			if err != nil {
				return
			}
			defer to.Close()
			if _, err := io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
				return
			}
			go func() { _, _ = io.Copy(to, from); to.Close() }()
			_, _ = io.Copy(conn, to)
		}()
	}
}

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client may have gone
}

// cloudURIs are key stores that lead to the stand-ins.
func cloudURIs() map[string]struct {
	uri   string
	vault *vault
} {
	type cloud = struct {
		uri   string
		vault *vault
	}
	return map[string]cloud{
		"aws":   {"awskms:region=eu-central-1", clouds.aws},
		"gcp":   {"cloudkms:projects/p/locations/global/keyRings/signet?credentials-file=" + clouds.credentials, clouds.gcp},
		"azure": {"azurekms:vault=signet", clouds.azure},
	}
}

func TestAuthoritiesInClouds(t *testing.T) {
	for name, cloud := range cloudURIs() {
		for _, algorithm := range []keys.Algorithm{keys.ECP256, keys.ECP384, keys.RSA2048} {
			t.Run(name+" "+string(algorithm), func(t *testing.T) {
				before := cloud.vault.count()
				liveThrough(t, cloud.uri, algorithm)
				if n := cloud.vault.count() - before; n != 4 {
					t.Errorf("%d keys in the cloud, want 4", n)
				}
			})
		}
	}
}

// TestCloudKeyIsFoundAgain makes a key whose maker never hears of it, as if it had crashed.
func TestCloudKeyIsFoundAgain(t *testing.T) {
	for name, cloud := range cloudURIs() {
		t.Run(name, func(t *testing.T) {
			place, err := keys.ParsePlace(cloud.uri)
			if err != nil {
				t.Fatal(err)
			}
			ring := keys.NewRing(keys.RingConfig{TrustDomain: td, X509: keys.Choice{Place: place, Algorithm: keys.ECP256}})
			defer ring.Close()
			intent := ring.Intend(keys.UseX509, 7)
			if _, err := ring.Find(t.Context(), intent); !errors.Is(err, keys.ErrNoKey) {
				t.Fatalf("Find before Create = %v, want ErrNoKey", err)
			}
			before, had := cloud.vault.count(), len(cloud.vault.keys)
			// The first call after the key is there fails.
			cloud.vault.setFault(func(string) error {
				if len(cloud.vault.keys) > had {
					return errors.New("the connection was lost")
				}
				return nil
			})
			if _, err := ring.Create(t.Context(), intent); !errors.Is(err, keys.ErrUnavailable) {
				t.Fatalf("Create = %v, want ErrUnavailable", err)
			}
			cloud.vault.setFault(nil)
			if n := cloud.vault.count() - before; n != 1 {
				t.Fatalf("%d keys were made, want 1", n)
			}
			if _, err := ring.Find(t.Context(), intent); err != nil {
				t.Errorf("Find = %v, want the key that was made", err)
			}
			if n := cloud.vault.count() - before; n != 1 {
				t.Errorf("%d keys, want 1", n)
			}
		})
	}
}

// TestSealKeyWrappedInCloud wraps with the RSA key of one trust domain, and refuses to unwrap for another.
func TestSealKeyWrappedInCloud(t *testing.T) {
	signer, err := makeSigner("RSA2048")
	if err != nil {
		t.Fatal(err)
	}
	clouds.aws.add(&vaultKey{id: "00000000-0000-4000-8000-000000000001", name: "seal", signer: signer})
	key, err := keys.ParseKeyURI("awskms:key-id=00000000-0000-4000-8000-000000000001;region=eu-central-1")
	if err != nil {
		t.Fatal(err)
	}
	ring := keys.NewRing(keys.RingConfig{TrustDomain: td})
	defer ring.Close()
	seal, wrapped, err := ring.WrapSealKey(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	again, err := ring.UnwrapSealKey(t.Context(), key, wrapped)
	if err != nil || again.ID() != seal.ID() {
		t.Errorf("UnwrapSealKey = %v, %v; want seal key %s", again, err, seal.ID())
	}
	other := keys.NewRing(keys.RingConfig{TrustDomain: spiffeid.RequireTrustDomainFromString("example.com")})
	defer other.Close()
	if _, err := other.UnwrapSealKey(t.Context(), key, wrapped); err == nil || !strings.Contains(err.Error(), `no seal key of trust domain "example.com"`) {
		t.Errorf("UnwrapSealKey for another trust domain = %v", err)
	}
	for _, uri := range []string{"tpmkms:name=a;storage-directory=/var/lib/x", "azurekms:name=a;vault=b"} {
		key, err := keys.ParseKeyURI(uri)
		if err != nil {
			t.Fatal(err)
		}
		if err := key.CanWrap(); err == nil || !strings.Contains(err.Error(), "cannot decrypt") {
			t.Errorf("CanWrap of %s = %v", uri, err)
		}
	}
}
