package sealed

import (
	"testing"
	"time"

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

// What is revoked waits neither for other changes nor for the space between two writes: until it is on disk, a restart without
// the CA would revive whom it hits.
func TestRevocationsWaitForNothing(t *testing.T) {
	s, _ := newRig(t, File{}).open()
	wrote := time.Now()
	s.Applied(snapshot(5, "a"))
	if at := s.due(wrote); at.Before(wrote.Add(spacing)) {
		t.Errorf("a change is written %s after the last", at.Sub(wrote))
	}
	for what, m := range map[string]*nodev1.FollowResponse{
		"a revocation": {Format: 1, Epoch: "e1", From: 5, To: 6, Revocations: []*policyv1.Revocation{{Name: "r"}}},
		"its end":      {Format: 1, Epoch: "e1", From: 6, To: 7, RemovedRevocations: []string{"r"}},
	} {
		s.pressing = false
		s.Applied(m)
		if at := s.due(wrote.Add(-pressing)); at.After(s.since) {
			t.Errorf("%s waits for %s", what, at.Sub(s.since))
		}
		if at := s.due(wrote); at.After(wrote.Add(pressing)) && at.After(s.since) {
			t.Errorf("%s is written %s after the last", what, at.Sub(wrote))
		}
	}
	// After a write that failed, what is revoked presses on.
	s.config.Dir = "/proc/nowhere"
	if s.attempt(t.Context()) == nil || !s.pressing {
		t.Error("a write that failed made it wait")
	}
}

// A program that does not know a kind of records must not take the rest for the whole.
func TestAnUnknownKindRefusesTheCache(t *testing.T) {
	if err := make(records).take(appendRecord(nil, recordKey{'?', "x"}, []byte("y"))); err == nil {
		t.Error("a record of an unknown kind was taken")
	}
}
