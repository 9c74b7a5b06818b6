package ca

import (
	"slices"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"
)

// TestLocalAuthorityIsSPIREs walks through SPIRE's LocalAuthority service as its command line does, with every wrong step.
// [SPIRE-PROTOCOL §14]
func TestLocalAuthorityIsSPIREs(t *testing.T) {
	h := start(t, quiet(t.TempDir()))
	api := localauthorityv1.NewLocalAuthorityClient(h.admin)
	ctx := t.Context()
	want := func(what string, err error, c codes.Code) {
		t.Helper()
		if code(err) != c {
			t.Errorf("%s: %v, want %v", what, err, c)
		}
	}
	x := func() (a, p, o string) {
		t.Helper()
		r, err := api.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Active.ExpiresAt < time.Now().Unix() {
			t.Errorf("active: %v", r.Active)
		}
		return r.Active.GetAuthorityId(), r.Prepared.GetAuthorityId(), r.Old.GetAuthorityId()
	}
	j := func() (a, p, o string) {
		t.Helper()
		r, err := api.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Active.GetAuthorityId(), r.Prepared.GetAuthorityId(), r.Old.GetAuthorityId()
	}
	for _, kind := range []struct {
		name    string
		state   func() (a, p, o string)
		prepare func() (string, error)
		act     map[string]func(id string) (string, error)
	}{
		{"x509", x, func() (string, error) {
			r, err := api.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
			return r.GetPreparedAuthority().GetAuthorityId(), err
		}, map[string]func(string) (string, error){
			"activate": func(id string) (string, error) {
				r, err := api.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
				return r.GetActivatedAuthority().GetAuthorityId(), err
			},
			"taint": func(id string) (string, error) {
				r, err := api.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
				return r.GetTaintedAuthority().GetAuthorityId(), err
			},
			"revoke": func(id string) (string, error) {
				r, err := api.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id})
				return r.GetRevokedAuthority().GetAuthorityId(), err
			},
		}},
		{"jwt", j, func() (string, error) {
			r, err := api.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
			return r.GetPreparedAuthority().GetAuthorityId(), err
		}, map[string]func(string) (string, error){
			"activate": func(id string) (string, error) {
				r, err := api.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: id})
				return r.GetActivatedAuthority().GetAuthorityId(), err
			},
			"taint": func(id string) (string, error) {
				r, err := api.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id})
				return r.GetTaintedAuthority().GetAuthorityId(), err
			},
			"revoke": func(id string) (string, error) {
				r, err := api.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: id})
				return r.GetRevokedAuthority().GetAuthorityId(), err
			},
		}},
	} {
		first, prepared, old := kind.state()
		if first == "" || prepared != "" || old != "" {
			t.Errorf("%s at first: active %q, prepared %q, old %q", kind.name, first, prepared, old)
		}
		for step, do := range kind.act {
			for _, id := range []string{"", "nobody", first} {
				_, err := do(id)
				want(kind.name+": "+step+" "+id+" at first", err, codes.InvalidArgument)
			}
		}
		second, err := kind.prepare()
		if err != nil {
			t.Fatal(err)
		}
		for step, id := range map[string]string{"taint": second, "revoke": second} {
			_, err := kind.act[step](id)
			want(kind.name+": "+step+" the prepared one", err, codes.InvalidArgument)
		}
		if got, err := kind.act["activate"](second); err != nil || got != second {
			t.Fatalf("%s: activate: %s %v", kind.name, got, err)
		}
		if a, p, o := kind.state(); a != second || p != "" || o != first {
			t.Errorf("%s activated: active %q, prepared %q, old %q", kind.name, a, p, o)
		}
		_, err = kind.act["activate"](second)
		want(kind.name+": activate the active one", err, codes.InvalidArgument)
		_, err = kind.act["revoke"](first)
		want(kind.name+": revoke an old one that is not tainted", err, codes.InvalidArgument)
		if got, err := kind.act["taint"](first); err != nil || got != first {
			t.Fatalf("%s: taint: %s %v", kind.name, got, err)
		}
		b, err := bundlev1.NewBundleClient(h.admin).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if kind.name == "x509" && (!b.X509Authorities[0].Tainted || b.X509Authorities[1].Tainted) || kind.name == "jwt" && (!b.JwtAuthorities[0].Tainted || b.JwtAuthorities[1].Tainted) {
			t.Errorf("%s: SPIRE's agents do not see which one is tainted: %v", kind.name, b)
		}
		_, err = kind.act["taint"](first)
		want(kind.name+": taint the tainted one", err, codes.InvalidArgument)
		if got, err := kind.act["revoke"](first); err != nil || got != first {
			t.Fatalf("%s: revoke: %s %v", kind.name, got, err)
		}
		if _, _, o := kind.state(); o != "" {
			t.Errorf("%s: %q is still shown as old", kind.name, o)
		}
		_, err = kind.act["revoke"](first)
		want(kind.name+": revoke the revoked one", err, codes.InvalidArgument)
	}
	_, err := api.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "ab"})
	want("taint an upstream authority without one", err, codes.FailedPrecondition)
	_, err = api.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "ab"})
	want("revoke an upstream authority without one", err, codes.FailedPrecondition)
	_, err = api.GetWITAuthorityState(ctx, &localauthorityv1.GetWITAuthorityStateRequest{})
	want("WIT", err, codes.Unimplemented)
	_, err = localauthorityv1.NewLocalAuthorityClient(h.agent().conn).PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	want("an agent", err, codes.PermissionDenied)
	var events []string
	for _, r := range h.audit("authority.prepare", "authority.activate", "authority.taint", "authority.revoke") {
		if r["outcome"] == "ok" && r["details"].(map[string]any)["changed"] == true {
			events = append(events, r["event"].(string))
		}
	}
	one := []string{"authority.prepare", "authority.activate", "authority.taint", "authority.revoke"}
	if !slices.Equal(events, append(slices.Clone(one), one...)) {
		t.Errorf("audit log: %v", events)
	}
}
