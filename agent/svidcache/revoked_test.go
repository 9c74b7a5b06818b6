package svidcache

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/workloadapi"
)

func revokedID(name, id string) *policyv1.Revocation {
	return &policyv1.Revocation{Name: name, Revision: 1, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org" + id}}
}

func leafOf(t *testing.T, i workloadapi.Identity) *x509.Certificate {
	t.Helper()
	certs, err := x509.ParseCertificates(i.Chain)
	if err != nil {
		t.Fatal(err)
	}
	return certs[0]
}

func TestSVIDsOfRevokedIDsAreNotServed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		w.change(&nodev1.FollowResponse{Revocations: []*policyv1.Revocation{revokedID("r", "/a")}})
		u := w.next(updates, 0)
		if got := ids(u); got != "/b" || !u.Entitled || u.Pending || u.Revocations.Revision() != w.revision {
			t.Errorf("identities %q, entitled %t, pending %t, revocations of %d", got, u.Entitled, u.Pending, u.Revocations.Revision())
		}
		if _, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.RequireFromPath(td, "/a"), []string{"x"}); !errors.Is(err, workloadapi.ErrNoIdentity) {
			t.Errorf("a JWT-SVID of a revoked ID: %v", err)
		}
		if svids, err := w.cache.FetchJWTSVIDs(w.ctx, caller(1, "unix:uid:1"), spiffeid.ID{}, []string{"x"}); err != nil || len(svids) != 1 || svids[0].ID.Path() != "/b" {
			t.Errorf("JWT-SVIDs beside a revoked ID: %v, %v", svids, err)
		}
		// The last identity gone, the caller has none, and hears of it at once.
		w.change(&nodev1.FollowResponse{Revocations: []*policyv1.Revocation{revokedID("s", "/**")}})
		if u := w.next(updates, 0); len(u.Identities) != 0 || u.Entitled || u.Pending {
			t.Errorf("identities %q, entitled %t, pending %t", ids(u), u.Entitled, u.Pending)
		}
		issued := w.ca.count(issuedOf("1")) + w.ca.count(issuedOf("2"))
		time.Sleep(2 * time.Hour) // nothing is renewed
		if got := w.ca.count(issuedOf("1")) + w.ca.count(issuedOf("2")); got != issued {
			t.Errorf("%d SVIDs of revoked IDs were asked for", got-issued)
		}
		w.change(&nodev1.FollowResponse{RemovedRevocations: []string{"r", "s"}})
		w.next(updates, time.Second)
		synctest.Wait()
		if u := <-updates; ids(u) != "/a /b" {
			t.Errorf("after the revocations are gone: %q", ids(u))
		}
	})
}

// What is revoked by its serial number is replaced at once, by an SVID of another key.
func TestSVIDOfARevokedSerialIsReplaced(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		old := w.next(updates, 0).Identities[0]
		serial := leafOf(t, old).SerialNumber
		w.ca.mu.Lock()
		w.ca.fail = func(string) error { return errors.New("away") }
		w.ca.mu.Unlock()
		w.change(&nodev1.FollowResponse{Revocations: []*policyv1.Revocation{{Name: "r", Revision: 1, Target: &policyv1.Revocation_Serial{Serial: serial.Bytes()}}}})
		synctest.Wait()
		if u := w.next(updates, settleWait); len(u.Identities) != 0 || !u.Entitled || !u.Pending {
			t.Errorf("while the CA is away: identities %q, entitled %t, pending %t", ids(u), u.Entitled, u.Pending)
		}
		w.ca.mu.Lock()
		w.ca.fail = nil
		w.ca.mu.Unlock()
		u := w.next(updates, retryMax)
		if len(u.Identities) != 1 || string(u.Identities[0].Key) == string(old.Key) || leafOf(t, u.Identities[0]).SerialNumber.Cmp(serial) == 0 {
			t.Errorf("identities %q; the same key: %t", ids(u), len(u.Identities) == 1 && string(u.Identities[0].Key) == string(old.Key))
		}
	})
}

func TestARestartRevivesNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, _ := restarted(t, nil, func(k *Kept) {
			k.State.Revocations = []*policyv1.Revocation{revokedID("r", "/a")}
			k.State.UserIssuers = []*policyv1.UserIssuer{{Name: "idp"}}
			k.State.Policies = []*policyv1.Policy{{Name: "b", Services: []string{"spiffe://example.org/b"}}}
		}, anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		u := w.next(updates, 0)
		if got := ids(u); got != "/b" {
			t.Errorf("restored with the CA away: %q", got)
		}
		if _, found := u.Revocations.ID(spiffeid.RequireFromPath(td, "/a")); !found {
			t.Error("the restored revocation is not told")
		}
		if issuers := u.Policies.GetUserIssuers(); len(issuers) != 1 || issuers[0].GetName() != "idp" {
			t.Errorf("user issuers %v", issuers)
		}
		// A snapshot of the CA's without it does.
		w.ca.mu.Lock()
		w.ca.syncErr = nil
		w.ca.mu.Unlock()
		w.start(anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		w.cache.InSync()
		time.Sleep(settleWait)
		synctest.Wait()
		if u := <-updates; ids(u) != "/a /b" || len(u.Revocations.Set().GetRevocations()) != 0 {
			t.Errorf("after a snapshot without the revocation: %q", ids(u))
		}
	})
}

// A revocation that is not understood is handed on to those who deny by it, and stops no SVID: the CA knows which it means.
func TestARevocationOfTheFutureIsHandedOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		w.change(&nodev1.FollowResponse{Revocations: []*policyv1.Revocation{{Name: "later", Revision: 1}}})
		u := w.next(updates, 0)
		if ids(u) != "/a" || u.Revocations.Unknown() != "later" {
			t.Errorf("identities %q, not understood: %q", ids(u), u.Revocations.Unknown())
		}
	})
}

func TestRevokedTokensLeaveTheCache(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		first := w.jwt(1, "x")
		now := time.Now()
		w.change(&nodev1.FollowResponse{Revocations: []*policyv1.Revocation{{
			Name: "r", Revision: 1, TokensOnly: true, IssuedBefore: now.Unix() + 1, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/a"},
		}}})
		if n := w.cache.jwts.len(); n != 0 {
			t.Errorf("%d tokens are kept after all were revoked", n)
		}
		time.Sleep(2 * time.Second)
		if w.jwt(1, "x") == first {
			t.Error("a revoked token was handed out")
		}
	})
	payload := base64.RawURLEncoding.EncodeToString([]byte(`{"jti":"one"}`))
	hash := sha256.Sum256([]byte("one"))
	revoked := (&revocations{}).next(td, &nodev1.FollowResponse{Epoch: "e", Revocations: []*policyv1.Revocation{{Name: "r", Target: &policyv1.Revocation_JtiHash{JtiHash: hash[:]}}}}, &revocations{})
	tok := newToken("", &entry{spiffeID: spiffeid.RequireFromPath(td, "/a")}, JWTAnswer{Token: "e30." + payload + ".x"})
	if !tok.revoked(&state{revoked: revoked}) {
		t.Error("a token whose jti is revoked counts as good")
	}
	for _, bad := range []string{"", "a.b", "a.!.c", "a." + base64.RawURLEncoding.EncodeToString([]byte("[")) + ".c"} {
		if got := jtiOf(bad); got != "" {
			t.Errorf("jtiOf(%q) = %q", bad, got)
		}
	}
}

// crl is a CRL of an authority with n revoked serial numbers.
func crl(t *testing.T, a *authority, n int) []byte {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for i := range n {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(int64(1)<<62 + int64(i)), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestCRLs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if u := w.next(updates, 0); len(u.CRLs) != 0 {
			t.Errorf("%d CRLs of none", len(u.CRLs))
		}
		good := crl(t, w.ca.active, 2)
		w.change(&nodev1.FollowResponse{Crls: []*nodev1.CRL{
			{AuthorityId: "a1", Revision: 1, Crl: good}, {AuthorityId: "other", Revision: 1, Crl: crl(t, newAuthority(t, "other"), 1)},
			{AuthorityId: "broken", Revision: 1, Crl: []byte("no CRL")},
		}})
		if u := w.next(updates, 0); len(u.CRLs[td]) != 1 || !slices.Equal(u.CRLs[td][0], good) {
			t.Errorf("%d CRLs, want the one of the authority", len(u.CRLs[td]))
		}
		// One that would keep clients from their SVIDs is left out.
		w.change(&nodev1.FollowResponse{Crls: []*nodev1.CRL{{AuthorityId: "a1", Revision: 2, Crl: crl(t, w.ca.active, 60_000)}}})
		if u := w.next(updates, 0); len(u.CRLs) != 0 {
			t.Errorf("%d CRLs, want none: it is too large", len(u.CRLs[td]))
		}
		w.change(&nodev1.FollowResponse{Crls: []*nodev1.CRL{{AuthorityId: "a1", Revision: 3, Crl: good}}})
		w.next(updates, 0)
		w.change(&nodev1.FollowResponse{RemovedCrls: []string{"a1"}})
		if u := w.next(updates, 0); len(u.CRLs) != 0 {
			t.Errorf("%d CRLs after the last was removed", len(u.CRLs[td]))
		}
	})
}

// Thousands of revocations come as one change, and nobody who is not revoked notices.
func TestThousandsOfRevocations(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		for from := range 5 { // a slow subscriber finds the last state only
			m := &nodev1.FollowResponse{}
			for i := range 2000 {
				m.Revocations = append(m.Revocations, revokedID(fmt.Sprintf("r-%d-%d", from, i), fmt.Sprintf("/x/%d/%d", from, i)))
			}
			w.change(m)
		}
		synctest.Wait()
		if u := w.next(updates, 0); ids(u) != "/a" || len(u.Revocations.Set().GetRevocations()) != 10_000 {
			t.Errorf("identities %q, %d revocations", ids(u), len(u.Revocations.Set().GetRevocations()))
		}
		w.silent(updates, time.Minute)
	})
}

// The SVID of a revoked ID is kept, in case the revocation is lifted. Nobody gets it, nothing renews it, and whoever waits until
// nobody uses a tainted authority any more does not wait for it.
func TestRevokedSVIDsUseNoAuthority(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.start(anEntry("1", "/a", "unix:uid:1"), anEntry("2", "/b", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		w.next(updates, 0)
		uses := func(when string, want ...*authority) {
			t.Helper()
			synctest.Wait()
			var ids []string
			for _, a := range want {
				ids = append(ids, hex.EncodeToString(a.cert.SubjectKeyId))
			}
			slices.Sort(ids)
			if got := w.ca.lastInUse(); !slices.Equal(got, ids) {
				t.Errorf("%s: %v in use, want %v", when, got, ids)
			}
		}
		first, second := w.ca.active, newAuthority(t, "a2")
		w.change(&nodev1.FollowResponse{Revocations: []*policyv1.Revocation{revokedID("r", "/a")}})
		uses("one ID revoked", first)
		w.ca.mu.Lock()
		w.ca.active = second
		w.ca.mu.Unlock()
		tainted := w.ca.bundle(w.cache.state.Load().revision+1, []string{"k1"}, first, second)
		tainted.X509Authorities[0].State = nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
		w.change(&nodev1.FollowResponse{Bundles: []*nodev1.Bundle{tainted}})
		time.Sleep(time.Minute)
		uses("the other has been issued anew", second)
		w.ca.mu.Lock()
		w.ca.fail = func(string) error { return errors.New("away") }
		w.ca.mu.Unlock()
		w.change(&nodev1.FollowResponse{RemovedRevocations: []string{"r"}})
		uses("the revocation is lifted, and what is kept is served until the CA issues another", first, second)
		w.ca.mu.Lock()
		w.ca.fail = nil
		w.ca.mu.Unlock()
		time.Sleep(2 * retryMax)
		uses("it has been issued anew", second)
		w.change(&nodev1.FollowResponse{Revocations: []*policyv1.Revocation{revokedID("s", "/**")}})
		uses("all revoked")
		w.change(&nodev1.FollowResponse{RemovedEntryIds: []string{"1", "2"}})
		uses("all gone")
		w.change(&nodev1.FollowResponse{RemovedRevocations: []string{"s"}})
		uses("and nothing comes back")
	})
}
