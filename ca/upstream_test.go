package ca

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/authority"
)

// writeRoot makes a new root the upstream CA on disk in dir, beside the roots before.
func writeRoot(t *testing.T, dir string, before ...*x509.Certificate) *x509.Certificate {
	t.Helper()
	root := newSPIRERoot(t, func(c *x509.Certificate) { c.URIs, c.SubjectKeyId = nil, []byte{byte(len(before)), 7} })
	der, err := x509.MarshalPKCS8PrivateKey(root.key)
	if err != nil {
		t.Fatal(err)
	}
	bundle := []byte{}
	for _, c := range append([]*x509.Certificate{root.cert}, before...) {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	for name, content := range map[string][]byte{"bundle.pem": bundle, "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw})} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root.cert
}

// undisturbed repeats a step for which the CA, who follows its upstream at the same moment, says to look again.
func undisturbed[T any](t *testing.T, step func() (T, error)) (T, error) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		out, err := step()
		if code(err) != codes.Aborted || time.Now().After(deadline) {
			return out, err
		}
	}
}

// TestIntermediateIsNotRevoked: verifiers believe in an intermediate because of its root, so that to say it is revoked would
// be untrue. What can be revoked is the root, by signet's API as by SPIRE's, when the upstream has another.
func TestIntermediateIsNotRevoked(t *testing.T) {
	files := t.TempDir()
	old := writeRoot(t, files)
	c := quiet(t.TempDir())
	c.Upstream.Disk = &UpstreamDisk{CertificateFile: files + "/cert.pem", KeyFile: files + "/key.pem", BundleFile: files + "/bundle.pem"}
	h := start(t, c)
	admin := adminv1.NewAdminClient(h.admin)
	end := func(verb, id string, stolen bool) (*adminv1.AuthorityChange, error) {
		req := &adminv1.EndAuthorityRequest{Type: typeX509, Id: id, Stolen: stolen}
		return undisturbed(t, func() (*adminv1.AuthorityChange, error) {
			if verb == "taint" {
				return admin.TaintAuthority(t.Context(), req)
			}
			return admin.RevokeAuthority(t.Context(), req)
		})
	}
	rotate := func() (id string) {
		made, err := undisturbed(t, func() (*adminv1.AuthorityChange, error) {
			return admin.PrepareAuthority(t.Context(), &adminv1.PrepareAuthorityRequest{Type: typeX509})
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := undisturbed(t, func() (*adminv1.AuthorityChange, error) {
			change, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: made.Authority.Id, Force: true})
			return change, err
		}); err != nil {
			t.Fatal(err)
		}
		return made.Authority.Id
	}

	first := h.ca.set.Authorities(authority.KindX509)[0].ID
	second := rotate()
	oldID := hex.EncodeToString(old.SubjectKeyId)
	for _, id := range []string{first, second} {
		for _, verb := range []string{"taint", "revoke"} {
			for _, stolen := range []bool{false, true} {
				if _, err := end(verb, id, stolen); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), oldID) {
					t.Errorf("%s %s, stolen %v: %v, want FailedPrecondition with the root's id", verb, id, stolen, err)
				}
			}
		}
	}
	if got := h.states(typeX509); !strings.Contains(got, "old") || !strings.Contains(got, "active") || strings.Contains(got, "revoked") {
		t.Errorf("afterwards the authorities are %s", got)
	}

	// The root that signs now is not given up; the one before is.
	if _, err := end("taint", oldID, true); code(err) != codes.FailedPrecondition {
		t.Errorf("tainting the root in use: %v, want FailedPrecondition", err)
	}
	writeRoot(t, files, old)
	rotate()
	if _, err := end("revoke", oldID, false); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "taint it first") {
		t.Errorf("revoking a root that is not tainted: %v", err)
	}
	if r, err := end("taint", oldID, false); err != nil || r.Authority.GetId() != oldID || r.Authority.GetState() != "tainted" {
		t.Errorf("taint the old root: %v, %v", r, err)
	}
	if r, err := end("revoke", oldID, false); err != nil || r.Authority.GetState() != "revoked" {
		t.Errorf("revoke the old root: %v, %v", r, err)
	}
	if b := h.ca.set.Bundle().X509; len(b) != 1 || b[0].Certificate.Equal(old) {
		t.Errorf("the bundle holds %d roots, want the new one alone", len(b))
	}
}

// TestUpstreamThatFailsIsNamedToTheOperator: what an operator asked for says what is wrong, and may be asked again.
func TestUpstreamThatFailsIsNamedToTheOperator(t *testing.T) {
	files := t.TempDir()
	writeRoot(t, files)
	c := quiet(t.TempDir())
	c.Upstream.Disk = &UpstreamDisk{CertificateFile: files + "/cert.pem", KeyFile: files + "/key.pem"}
	h := start(t, c)
	if err := os.Remove(files + "/key.pem"); err != nil {
		t.Fatal(err)
	}
	_, err := undisturbed(t, func() (*adminv1.AuthorityChange, error) {
		return adminv1.NewAdminClient(h.admin).PrepareAuthority(t.Context(), &adminv1.PrepareAuthorityRequest{Type: typeX509})
	})
	if code(err) != codes.Unavailable || !strings.Contains(err.Error(), "upstream disk "+files) || !strings.Contains(err.Error(), "key_file") {
		t.Errorf("prepare without the upstream's key: %v, want Unavailable that names it", err)
	}
}
