package jwtauth_test

import (
	"errors"
	"io"
	"log/slog"
	"testing"
	"time"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/jwtauth"
)

// TestJWTAuthoritiesRotate: tokens of the old authority stay good until it is revoked, and then a refusal brings one of the new.
func TestJWTAuthoritiesRotate(t *testing.T) {
	w := newWorld(t)
	_, j := w.sources(t)
	c := w.cache(t, nil)
	verifier, err := jwtauth.NewVerifier(jwtauth.VerifierConfig{Audience: []string{"documents"}, JWTBundles: j, AllowAnySubject: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	old := token(t, c, "documents")
	before, err := verifier.Verify([]string{"Bearer " + old.AccessToken}, nil)
	if err != nil {
		t.Fatal(err)
	}
	admin := adminv1.NewAdminClient(w.AdminConn())
	if _, err := admin.PrepareAuthority(t.Context(), &adminv1.PrepareAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT}); err != nil {
		t.Fatal(err)
	}
	stream, err := admin.ActivateAuthority(t.Context(), &adminv1.ActivateAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT, Force: true})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if _, err := verifier.Verify([]string{"Bearer " + old.AccessToken}, nil); err != nil {
		t.Errorf("a token of the authority before: %v", err)
	}
	if _, err := admin.RevokeAuthority(t.Context(), &adminv1.EndAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_JWT, Id: before.KeyID, Stolen: true}); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err = verifier.Verify([]string{"Bearer " + old.AccessToken}, nil); err != nil {
			break
		}
		select {
		case <-j.Updated():
		case <-time.After(30 * time.Second):
			t.Fatal("a token of a revoked authority is taken")
		}
	}
	c.Refused("documents", old)
	now := eventually(t, c, "documents", old)
	after, err := verifier.Verify([]string{"Bearer " + now.AccessToken}, nil)
	if err != nil || after.KeyID == before.KeyID {
		t.Errorf("the new token: %v", err)
	}
}
