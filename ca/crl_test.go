package ca

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// lists waits for a CRL over Follow that lists exactly these serial numbers, and returns it.
func (r *revoked) lists(authority string, serials ...*big.Int) *x509.RevocationList {
	r.t.Helper()
	var list *x509.RevocationList
	r.until(fmt.Sprintf("the CRL of %s lists %v", authority, serials), func() bool {
		c := r.crls[authority]
		if c == nil {
			return false
		}
		var err error
		if list, err = x509.ParseRevocationList(c.Crl); err != nil {
			r.t.Fatal(err)
		}
		if list.NextUpdate.Unix() != c.NextUpdate {
			r.t.Errorf("next_update %d, and the list says %v", c.NextUpdate, list.NextUpdate)
		}
		for _, s := range serials {
			if !slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(s) == 0 }) {
				return false
			}
		}
		return len(list.RevokedCertificateEntries) == len(serials)
	})
	return list
}

func pemFile(t *testing.T, name, kind string, ders ...[]byte) string {
	t.Helper()
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
	}
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, out, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// opensslVerify checks an X509-SVID and its CRL as a program without signet does.
func opensslVerify(t *testing.T, authority *x509.Certificate, crl []byte, leaf *x509.Certificate) (string, error) {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed; tools/need.sh installs it")
	}
	root, list := pemFile(t, "root.pem", "CERTIFICATE", authority.Raw), pemFile(t, "crl.pem", "X509 CRL", crl)
	out, err := exec.CommandContext(t.Context(), openssl, "crl", "-in", list, "-noout", "-text", "-CAfile", root, "-verify").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "verify OK") {
		t.Errorf("openssl crl: %v\n%s", err, out)
	}
	out, err = exec.CommandContext(t.Context(), openssl, "verify", "-crl_check", "-CAfile", root, "-CRLfile", list, pemFile(t, "leaf.pem", "CERTIFICATE", leaf.Raw)).CombinedOutput()
	return string(out), err
}

// TestCRL follows the list through a revocation by serial number, by ID and of an agent, and back, and lets openssl judge.
func TestCRL(t *testing.T) {
	c := config(t.TempDir())
	c.CRL.Enabled = true
	h := start(t, c)
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n---\nkind: Identity\nname: shop\nspiffeID: /shop\nmatch: [\"unix:uid:2\"]\n")
	thief, honest := h.agent(), h.agent()
	stolen, _ := x509For(t, thief, "identity.shop")
	web, _ := x509For(t, honest, "identity.web")
	shop, _ := x509For(t, honest, "identity.shop")
	authority := h.ca.set.Bundle().X509[0]
	f := followRevoked(t, honest)
	empty := f.lists(authority.ID)
	if d := empty.NextUpdate.Sub(empty.ThisUpdate); d != 72*time.Hour {
		t.Errorf("it is valid for %v", d)
	}
	if out, err := opensslVerify(t, authority.Certificate, empty.Raw, web); err != nil {
		t.Errorf("before: %v %s", err, out)
	}
	last := empty
	step := func(what string, revokedNow []*x509.Certificate, goodNow ...*x509.Certificate) {
		t.Helper()
		var serials []*big.Int
		for _, leaf := range revokedNow {
			serials = append(serials, leaf.SerialNumber)
		}
		list := f.lists(authority.ID, serials...)
		if list.Number.Cmp(last.Number) <= 0 {
			t.Errorf("%s: number %v after %v", what, list.Number, last.Number)
		}
		last = list
		for _, leaf := range revokedNow {
			if out, err := opensslVerify(t, authority.Certificate, list.Raw, leaf); err == nil || !strings.Contains(out, "certificate revoked") {
				t.Errorf("%s: openssl takes the revoked one: %v %s", what, err, out)
			}
		}
		for _, leaf := range goodNow {
			if out, err := opensslVerify(t, authority.Certificate, list.Raw, leaf); err != nil {
				t.Errorf("%s: openssl refuses a good one: %v %s", what, err, out)
			}
		}
	}
	h.apply(revocation("one", fmt.Sprintf("serial: %q", web.SerialNumber.String())))
	step("by serial number", []*x509.Certificate{web}, shop)
	h.apply(revocation("shops", "id: /shop"))
	step("by ID", []*x509.Certificate{web, stolen, shop})
	h.unrevoke("one")
	step("un-revoked", []*x509.Certificate{stolen, shop}, web)
	h.unrevoke("shops")
	step("all un-revoked", nil, web, shop, stolen)
	h.apply(revocation("node", "agent: "+thief.id.String()))
	own, err := x509.ParseCertificate(thief.chain[0])
	if err != nil {
		t.Fatal(err)
	}
	step("a stolen node", []*x509.Certificate{stolen, own}, web, shop)
	if got := h.audit("revocation.listed"); len(got) < 5 || got[0]["subject"] != authority.ID {
		t.Errorf("the audit log has %v", got)
	}
}

// TestCRLOfAnOldAuthority: an authority that signs no more still has what it signed revoked, with its own key.
func TestCRLOfAnOldAuthority(t *testing.T) {
	c := config(t.TempDir())
	c.CRL.Enabled, c.Authorities.Rotate = true, rotateManual
	h := start(t, c)
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	a := h.agent()
	before, _ := x509For(t, a, "identity.web")
	old := h.ca.set.Bundle().X509[0]
	h.prepare(adminv1.AuthorityType_AUTHORITY_TYPE_X509)
	if _, err := h.activate(t.Context(), &adminv1.ActivateAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_X509, Force: true}); err != nil {
		t.Fatal(err)
	}
	after, _ := x509For(t, a, "identity.web")
	h.apply(revocation("web", "id: /web"))
	f := followRevoked(t, a)
	list := f.lists(old.ID, before.SerialNumber)
	if out, err := opensslVerify(t, old.Certificate, list.Raw, before); err == nil || !strings.Contains(out, "certificate revoked") {
		t.Errorf("openssl takes what the old one signed: %v %s", err, out)
	}
	f.lists(hex.EncodeToString(after.AuthorityKeyId), after.SerialNumber)
}

// TestCRLIsRenewed ahead of its end, goes on after a restart with greater numbers, and keeps what the log lost.
func TestCRLIsRenewed(t *testing.T) {
	var clock movedClock
	c := config(t.TempDir())
	c.Now, c.CRL, c.TTL.Agent = clock.now, CRL{Enabled: true, Validity: 24 * time.Hour}, 23*time.Hour
	c.Authorities.Rotate = rotateManual
	h := start(t, c)
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\nx509TTL: 20h\n")
	a := h.agent()
	web, _ := x509For(t, a, "identity.web")
	h.apply(revocation("web", "id: /web"))
	first := h.ca.set.Bundle().X509[0].ID
	f := followRevoked(t, a)
	before := f.lists(first, web.SerialNumber)
	h.close()
	// The audit log is lost: what was listed stays listed.
	if err := os.RemoveAll(filepath.Join(c.DataDir, "audit")); err != nil {
		t.Fatal(err)
	}
	clock.move(9 * time.Hour)
	h = start(t, c)
	a.conn = h.dial(a.chain, a.key)
	f = followRevoked(t, a)
	var after *x509.RevocationList
	f.until("it is renewed", func() bool {
		c := f.crls[first]
		if c == nil {
			return false
		}
		var err error
		if after, err = x509.ParseRevocationList(c.Crl); err != nil {
			t.Fatal(err)
		}
		return after.ThisUpdate.After(before.ThisUpdate)
	})
	if after.Number.Cmp(before.Number) <= 0 || len(after.RevokedCertificateEntries) != 1 || after.RevokedCertificateEntries[0].SerialNumber.Cmp(web.SerialNumber) != 0 {
		t.Errorf("it is %v, with %v", after.Number, after.RevokedCertificateEntries)
	}
}
