package ca

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/auditlog"
)

// TestRefusalsDoNotSpendTheReserve needs root: it mounts a small file system for the audit log, and fills it.
func TestRefusalsDoNotSpendTheReserve(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		t.Logf("not tested, as a tmpfs cannot be mounted here: %v", err)
		return
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c := config(t.TempDir())
	c.Audit.Dir = filepath.Join(dir, "audit")
	h := start(t, c)
	a := h.agent()
	h.create(&types.Entry{Id: "web", SpiffeId: pid("/web"), ParentId: pid(a.id.Path()), Selectors: sels("unix:uid:1")})
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer ballast.Close()
	for err = nil; err == nil; {
		_, err = ballast.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	node := nodev1.NewNodeClient(a.conn)
	pub, err := x509.MarshalPKIXPublicKey(key(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	renew := func() {
		t.Helper()
		x, err := node.IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: []*nodev1.IssueX509SVIDsRequest_Item{{EntryId: "web", PublicKey: pub}}})
		if err != nil || x.Results[0].Code != 0 {
			t.Fatalf("X509-SVID of an existing identity: %v %v", x, err)
		}
		j, err := node.IssueJWTSVIDs(t.Context(), &nodev1.IssueJWTSVIDsRequest{Items: []*nodev1.IssueJWTSVIDsRequest_Item{{EntryId: "web", Audience: []string{"db"}}}})
		if err != nil || j.Results[0].Code != 0 {
			t.Fatalf("JWT-SVID of an existing identity: %v %v", j, err)
		}
	}
	x, j := &nodev1.IssueX509SVIDsRequest{}, &nodev1.IssueJWTSVIDsRequest{}
	for i := range 500 {
		id := fmt.Sprintf("somebody-elses-%d", i)
		x.Items = append(x.Items, &nodev1.IssueX509SVIDsRequest_Item{EntryId: id, PublicKey: pub})
		j.Items = append(j.Items, &nodev1.IssueJWTSVIDsRequest_Item{EntryId: id, Audience: []string{"db"}})
	}
	for range 60 { // far more than the free room and the reserve of 1 MiB
		renew()
		if _, err := node.IssueX509SVIDs(t.Context(), x); err != nil {
			t.Fatalf("what is not its own: %v", err)
		}
		if _, err := node.IssueJWTSVIDs(t.Context(), j); err != nil {
			t.Fatalf("what is not its own: %v", err)
		}
	}
	if err := h.ca.audit.Health(); !errors.Is(err, auditlog.ErrDisk) {
		t.Errorf("the log has room left, so this test shows nothing: %v", err)
	}
	if r, err := healthv1.NewHealthClient(h.admin).Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil || r.Status != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("grpc health of a CA that registers nothing new: %v %v", r, err)
	}
	renew()
}
