//go:build cgo

package keystores_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
	"github.com/signet-id/signet/test/keystores"
)

// start runs a CA and an agent in dir and registers this process as /web.
func start(t *testing.T, dir string, change func(*ca.Config)) *dev.Instance {
	t.Helper()
	i, err := dev.Start(t.Context(), dev.Config{Dir: dir, CA: func(c *ca.Config) { c.Audit.Reserve = 1 << 20; change(c) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Close() })
	conn, err := i.Admin()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	doc := fmt.Sprintf("kind: Identity\nname: web\nspiffeID: /web\nmatch: [unix:uid:%d]\n", os.Getuid())
	if _, err := adminv1.NewAdminClient(conn).Apply(t.Context(), &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(doc), File: "web.yaml"}}}); err != nil {
		t.Fatal(err)
	}
	return i
}

func client(t *testing.T, i *dev.Instance) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr(i.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// fetch gets both kinds of SVIDs from the Workload API and verifies them with what that says is the bundle.
func fetch(t *testing.T, c *workloadapi.Client, audience string) *x509.Certificate {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	x, err := c.FetchX509Context(ctx)
	if err != nil {
		t.Fatal(err)
	}
	svid := x.DefaultSVID()
	bundle, ok := x.Bundles.Get(svid.ID.TrustDomain())
	if !ok {
		t.Fatal("no bundle")
	}
	roots := x509.NewCertPool()
	for _, a := range bundle.X509Authorities() {
		roots.AddCert(a)
	}
	intermediates := x509.NewCertPool()
	for _, c := range svid.Certificates[1:] {
		intermediates.AddCert(c)
	}
	if _, err := svid.Certificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	token, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	for status.Code(err) == codes.Unavailable && ctx.Err() == nil { // the agent has not found the restarted CA yet
		<-time.After(20 * time.Millisecond)
		token, err = c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ValidateJWTSVID(ctx, token.Marshal(), audience); err != nil {
		t.Error(err)
	}
	return svid.Certificates[0]
}

func TestCAInSoftHSM(t *testing.T) {
	token, dir := keystores.SoftHSM(t), short(t)
	wrapping := token.WrappingKey(t, "seal")
	before := token.Objects(t)
	change := func(c *ca.Config) {
		c.Keys = ca.Keys{URI: token.URI}
		c.Seal = ca.Seal{KMS: wrapping}
	}
	i := start(t, dir, change)
	fetch(t, client(t, i), "a")
	if n := token.Objects(t) - before; n != 4 {
		t.Errorf("the CA made %d objects in the token, want the 4 of 2 key pairs", n)
	}
	if err := i.RestartCA(t.Context()); err != nil {
		t.Fatal(err)
	}
	fetch(t, client(t, i), "b")
	if n := token.Objects(t) - before; n != 4 {
		t.Errorf("after a restart there are %d objects, want the same 4", n)
	}
	if err := i.CA().Health(); err != nil {
		t.Error(err)
	}
}

// TestCAWithoutItsTPM takes the TPM away from a running CA and gives it back. What agents hold goes on, new signatures fail
// with an error that names the key, and nobody has to restart anything.
func TestCAWithoutItsTPM(t *testing.T) {
	tpm, dir := keystores.SWTPM(t), short(t)
	i := start(t, dir, func(c *ca.Config) { c.Keys = ca.Keys{URI: tpm.URI, Timeout: 2 * time.Second} })
	c := client(t, i)
	held := fetch(t, c, "a")

	tpm.Stop(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "b"}); err == nil {
		t.Error("a JWT-SVID was signed without the TPM")
	}
	conn, err := i.Admin()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = svidv1.NewSVIDClient(conn).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: &types.SPIFFEID{TrustDomain: held.URIs[0].Host, Path: "/x"}, Audience: []string{"b"}})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "key tpmkms:name=signet-example-org-") {
		t.Errorf("an operator is told %v, want Unavailable and the key", err)
	}
	if _, err = adminv1.NewAdminClient(conn).PrepareAuthority(ctx, &adminv1.PrepareAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), tpm.URI) {
		t.Errorf("an operator who prepares is told %v, want Unavailable and the key store", err)
	}
	svid, err := c.FetchX509SVID(ctx)
	if err != nil || !svid.Certificates[0].Equal(held) {
		t.Errorf("the X509-SVID that was there is gone: %v", err)
	}
	if _, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a"}); err != nil {
		t.Errorf("the JWT-SVID that was there is gone: %v", err)
	}
	err = i.CA().Health()
	if err == nil || !strings.Contains(err.Error(), "key tpmkms:name=signet-example-org-") || !strings.Contains(err.Error(), tpm.URI) {
		t.Errorf("Health = %v, want the key and its key store named", err)
	}

	tpm.Start(t)
	for deadline := time.Now().Add(time.Minute); i.CA().Health() != nil; {
		if time.Now().After(deadline) {
			t.Fatalf("not healthy a minute after the TPM came back: %v", i.CA().Health())
		}
		<-time.After(50 * time.Millisecond)
	}
	fetch(t, c, "c")
}

func TestSealKeyIsChanged(t *testing.T) {
	token, dir := keystores.SoftHSM(t), short(t)
	first, second := token.WrappingKey(t, "seal-one"), token.WrappingKey(t, "seal-two")
	file := dir + "/seal.key"
	sources := []ca.Seal{
		{KeyFile: file, Create: true},
		{KMS: first, Previous: ca.SealSource{KeyFile: file}},
		{KMS: second, Previous: ca.SealSource{KMS: first}},
		{KMS: second},
	}
	for n, seal := range sources {
		i := start(t, dir, func(c *ca.Config) { c.Seal = seal })
		fetch(t, client(t, i), fmt.Sprint("a", n))
		if err := i.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// Neither of the earlier seal keys opens anything any more.
	for _, seal := range []ca.Seal{{KeyFile: file}, {KMS: first}} {
		if _, err := dev.Start(t.Context(), dev.Config{Dir: dir, CA: func(c *ca.Config) { c.Seal = seal }}); err == nil || !strings.Contains(err.Error(), "wrong seal key") {
			t.Errorf("start with an earlier seal key: %v, want that it is the wrong one", err)
		}
	}
	if content, err := os.ReadFile(dir + "/ca/store/signet.db"); err == nil && strings.Contains(string(content), token.PIN) {
		t.Error("the PIN is in the store")
	}
}

func TestSealKeyStoreIsAwayAtStart(t *testing.T) {
	token, dir := keystores.SoftHSM(t), short(t)
	wrapping := token.WrappingKey(t, "seal")
	change := func(c *ca.Config) { c.Seal = ca.Seal{KMS: wrapping} }
	i := start(t, dir, change)
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	token.Unplug(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := dev.Start(ctx, dev.Config{Dir: dir, CA: change}); err == nil || !strings.Contains(err.Error(), "seal.kms: unwrapping the seal key with key pkcs11:object=seal") {
		t.Errorf("start without the token = %v, want that it names the key", err)
	}
	// It comes back while the CA is starting.
	back := time.AfterFunc(time.Second, func() { token.Plug(t) })
	defer back.Stop()
	i = start(t, dir, change)
	fetch(t, client(t, i), "a")
}

// short returns a directory whose sockets have short paths.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestCAStartsWithoutItsKeyStore starts a CA whose token refuses the PIN: it says so at once, and serves again when the PIN
// is put right.
func TestCAStartsWithoutItsKeyStore(t *testing.T) {
	token, dir := keystores.SoftHSM(t), short(t)
	var wit atomic.Bool
	change := func(c *ca.Config) { c.Keys, c.WIT.Enabled = ca.Keys{URI: token.URI}, wit.Load() }
	i := start(t, dir, change)
	fetch(t, client(t, i), "a")
	if err := i.StopCA(); err != nil {
		t.Fatal(err)
	}
	restore := token.Hide(t)
	// That WIT-SVIDs are switched on, for which there is no key yet, is no reason to be gone either.
	wit.Store(true)
	if err := i.RestartCA(t.Context()); err != nil {
		t.Fatalf("start without a PIN = %v, want a CA that is not ready", err)
	}
	for deadline := time.Now().Add(time.Minute); i.CA().Health() == nil; {
		if time.Now().After(deadline) {
			t.Fatal("a CA whose key store does not answer says that it is well")
		}
		<-time.After(10 * time.Millisecond)
	}
	if err := i.CA().Health(); !strings.Contains(err.Error(), "pin-source") || !strings.Contains(err.Error(), "signet-example-org-") {
		t.Errorf("Health = %v, want the key and the file named", err)
	}
	restore()
	fetch(t, client(t, i), "b")
}
