package sealed

import (
	"testing"

	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// What is revoked stays so over a restart, whatever kind it is of, until the CA takes it back.
func TestKeepsRevocations(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	m := snapshot(5, "a")
	m.Revocations = []*policyv1.Revocation{{Name: "later", Revision: 5}}
	m.Crls = []*nodev1.CRL{{AuthorityId: "a1", Crl: []byte("crl")}}
	m.UserIssuers = []*policyv1.UserIssuer{{Name: "idp", Issuer: "https://idp.example"}}
	s.Applied(m)
	s.InContact(true)
	one := &policyv1.Revocation{Name: "r", Revision: 6, Target: &policyv1.Revocation_Serial{Serial: []byte{1, 2}}, Reason: "lost"}
	s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: "e1", From: 5, To: 6, Revocations: []*policyv1.Revocation{one},
		RemovedCrls: []string{"a1"}, RemovedUserIssuers: []string{"idp"}})
	r.write(s)
	s, c := r.mustRestore()
	if len(c.State.Revocations) != 2 || len(c.State.Crls) != 0 || len(c.State.UserIssuers) != 0 {
		t.Errorf("the state is %v", c.State)
	}
	for _, got := range c.State.Revocations {
		if got.GetName() == "r" && !proto.Equal(got, one) {
			t.Errorf("the revocation is %v, want %v", got, one)
		}
	}
	s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: "e1", From: 6, To: 7, RemovedRevocations: []string{"later"},
		Crls: []*nodev1.CRL{{AuthorityId: "a2", Crl: []byte("crl")}}, UserIssuers: []*policyv1.UserIssuer{{Name: "idp"}}})
	r.write(s)
	s, c = r.mustRestore()
	if len(c.State.Revocations) != 1 || c.State.Revocations[0].GetName() != "r" || len(c.State.Crls) != 1 || len(c.State.UserIssuers) != 1 {
		t.Errorf("the state is %v", c.State)
	}
	s.Applied(snapshot(8, "a")) // which names all there are
	r.write(s)
	if _, c = r.mustRestore(); len(c.State.Revocations)+len(c.State.Crls)+len(c.State.UserIssuers) != 0 {
		t.Errorf("the state is %v", c.State)
	}
}

// A program that does not know a kind of records must not take the rest for the whole.
func TestAnUnknownKindRefusesTheCache(t *testing.T) {
	if err := make(records).take(appendRecord(nil, recordKey{'?', "x"}, []byte("y"))); err == nil {
		t.Error("a record of an unknown kind was taken")
	}
}
