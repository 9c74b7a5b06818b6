package nested

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

const typeX509 = adminv1.AuthorityType_AUTHORITY_TYPE_X509

// issuer is the id of the authority that signed what a workload has now.
func issuer(t *testing.T, source *workloadapi.X509Source) string {
	t.Helper()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(svid.Certificates[0].AuthorityKeyId)
}

func organisation(t *testing.T, name string) *signettest.Organisation {
	t.Helper()
	o, err := signettest.NewOrganisation(t.TempDir(), name)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func authorities(t *testing.T, s *signettest.Signet) []*adminv1.Authority {
	t.Helper()
	list, err := adminv1.NewAdminClient(s.AdminConn()).ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{Type: typeX509})
	if err != nil {
		t.Fatal(err)
	}
	return list.Authorities
}

// TestUpstreamIsAddedAndRemoved takes a running trust domain below an upstream CA and out again, each by a restart with
// another configuration, while workloads speak with each other all the time. No handshake may fail, and the bundle holds
// what SVIDs still lead to.
func TestUpstreamIsAddedAndRemoved(t *testing.T) {
	o := organisation(t, "Example")
	root := hex.EncodeToString(o.Root.SubjectKeyId)
	var above *ca.UpstreamDisk
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) { c.Upstream.Disk = above }})
	web, db := workload(t, s, "web"), workload(t, s, "db")
	self := issuer(t, web)
	stop := talk(t, s, web, db)

	above = o.Disk()
	if err := s.RestartCA(t.Context()); err != nil {
		t.Fatal(err)
	}
	id := prepared(t, s, true)
	if r := roots(bundleOf(t, s)); len(r) != 2 || !slices.Contains(r, string(o.Root.Raw)) {
		t.Errorf("before the intermediate signs, the bundle holds %d authorities, want the old one and the upstream's root", len(r))
	}
	activate(t, s, id)
	reissued(t, s, web, db, self, id)
	if r := roots(bundleOf(t, s)); len(r) != 2 {
		t.Errorf("while SVIDs of the self-signed authority are valid, the bundle holds %d authorities, want 2", len(r))
	}

	above = nil
	if err := s.RestartCA(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := adminv1.NewAdminClient(s.AdminConn()).PrepareAuthority(t.Context(), &adminv1.PrepareAuthorityRequest{Type: typeX509}); err != nil {
		t.Fatal(err)
	}
	last := prepared(t, s, false)
	activate(t, s, last)
	reissued(t, s, web, db, root, last)
	if r := roots(bundleOf(t, s)); len(r) != 3 || !slices.Contains(r, string(o.Root.Raw)) {
		t.Errorf("while SVIDs below the upstream are valid, the bundle holds %d authorities, want its root and 2 of our own", len(r))
	}
	// Revoked, the root goes at once, also without the upstream; TestFormerUpstreamIsForgotten has it go by itself.
	if _, err := adminv1.NewAdminClient(s.AdminConn()).RevokeAuthority(t.Context(), &adminv1.EndAuthorityRequest{Type: typeX509, Id: root}); err != nil {
		t.Fatal(err)
	}
	until(t, "that the upstream's root leaves the bundle", func() error {
		if r := roots(bundleOf(t, s)); len(r) != 2 || slices.Contains(r, string(o.Root.Raw)) {
			return fmt.Errorf("it holds %d authorities", len(r))
		}
		return nil
	})
	if n := stop(); n < 20 {
		t.Errorf("only %d handshakes", n)
	}
}

// talk has two workloads speak with each other until the returned function is called, which reports each failure.
func talk(t *testing.T, s *signettest.Signet, web, db *workloadapi.X509Source) (stop func() int) {
	ctx, cancel := context.WithCancel(t.Context())
	n, done := 0, make(chan error)
	go func() {
		var failed error
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil && failed == nil {
			n++
			failed = errors.Join(speak(t, web, db, s.ID("/web"), s.ID("/db")), speak(t, db, web, s.ID("/db"), s.ID("/web")))
			<-tick.C
		}
		done <- failed
	}()
	var once bool
	stop = func() int {
		if !once {
			once = true
			cancel()
			if err := <-done; err != nil {
				t.Errorf("handshake %d failed: %v", n, err)
			}
		}
		return n
	}
	t.Cleanup(func() { stop() })
	return stop
}

// prepared returns the authority that waits for its activation, below an upstream CA or not.
func prepared(t *testing.T, s *signettest.Signet, below bool) (id string) {
	t.Helper()
	until(t, "a prepared authority", func() error {
		for _, a := range authorities(t, s) {
			if a.State == "prepared" && (len(a.Above) > 0) == below {
				id = a.Id
				return nil
			}
		}
		return errors.New("there is none")
	})
	return id
}

// activate activates it when the agent has handed it on.
func activate(t *testing.T, s *signettest.Signet, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := adminv1.NewAdminClient(s.AdminConn()).ActivateAuthority(ctx, &adminv1.ActivateAuthorityRequest{Type: typeX509, Id: id, Wait: true})
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

// reissued has all that the old authority signed re-issued, and waits for SVIDs of the new one.
func reissued(t *testing.T, s *signettest.Signet, web, db *workloadapi.X509Source, before, after string) {
	t.Helper()
	if _, err := adminv1.NewAdminClient(s.AdminConn()).TaintAuthority(t.Context(), &adminv1.EndAuthorityRequest{Type: typeX509, Id: before}); err != nil {
		t.Fatal(err)
	}
	until(t, "SVIDs of the new authority", func() error {
		if w, d := issuer(t, web), issuer(t, db); w != after || d != after {
			return fmt.Errorf("web has an SVID of %s, db of %s; want %s", w, d, after)
		}
		return nil
	})
}
