package authority

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

func TestSVID_06_X509_63_UpstreamRootIsPublishedAndIntermediatesTravel(t *testing.T) {
	f, org, _ := openBelow(t, nil)
	bundle := f.set.Bundle()
	if len(bundle.X509) != 1 || !bundle.X509[0].Certificate.Equal(org.root.cert) || bundle.X509[0].State != StateActive || !bundle.X509[0].Upstream {
		t.Fatalf("the bundle holds %+v, want the root of the organisation alone", bundle.X509)
	}
	svid := f.issue("/web")
	if len(svid.Chain) != 3 || !slices.Equal(svid.Chain[2], org.issuing.cert.Raw) || !svid.Root.Equal(org.root.cert) {
		t.Errorf("the chain has %d certificates, want the leaf, our intermediate and the issuing CA", len(svid.Chain))
	}
	ours, err := x509.ParseCertificate(svid.Chain[1])
	f.must(err)
	if id, err := spiffe.IDFromCertificate(ours); err != nil || id != testTD.ID() {
		t.Errorf("our intermediate has the ID %q (%v), want %q", id, err, testTD.IDString())
	}
	if err := f.verify(svid); err != nil {
		t.Error(err)
	}
	if f.set.Pin() != pin(org.root.cert) || !slices.Contains(f.set.Pins(), f.set.Pin()) {
		t.Error("the pin is not that of the root, which outlives the intermediates")
	}
	if again, err := Open(t.Context(), f.set.config); err != nil || again.current.Load().activeX509.id != svid.AuthorityID {
		t.Errorf("opening the same store again: %v, or another authority", err)
	}
	if org.minted != 1 {
		t.Errorf("the upstream signed %d times, want once", org.minted)
	}
}

// What an upstream answers is not used unless every peer will accept what is signed below it.
func TestX509_18_21_22_53_NonsenseOfTheUpstreamIsRefused(t *testing.T) {
	other := newOrganisation(t, func() time.Time { return testNow })
	for _, tt := range []struct {
		name  string
		spoil func(*organisation)
		want  string
	}{
		{"it refuses", func(o *organisation) { o.err = errors.New("403 permission denied") }, "403 permission denied"},
		{"no certificate", func(o *organisation) {
			o.answer = func(_, r []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) { return nil, r }
		}, "without a certificate"},
		{"no root", func(o *organisation) {
			o.answer = func(c, _ []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) { return c, nil }
		}, "without a root"},
		{"a nil root", func(o *organisation) {
			o.answer = func(c, _ []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) {
				return c, []*x509.Certificate{nil}
			}
		}, "without a root"},
		{"too many certificates", func(o *organisation) {
			o.answer = func(c, r []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) {
				return append(c, slices.Repeat(c[1:], MaxUpstreamIntermediates)...), r
			}
		}, "10 certificates, more than 8"},
		{"too many roots", func(o *organisation) {
			o.answer = func(c, r []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) {
				return c, slices.Repeat(r, MaxUpstreamRoots+1)
			}
		}, "21 roots"},
		{"the certificate of another key", func(o *organisation) {
			o.answer = func(c, r []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) { return c[1:], r }
		}, "another key"},
		{"another root", func(o *organisation) {
			o.answer = func(c, _ []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) {
				return c, []*x509.Certificate{other.root.cert}
			}
		}, "does not verify"},
		{"a missing intermediate", func(o *organisation) {
			o.answer = func(c, r []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) { return c[:1], r }
		}, "does not verify"},
		{"an intermediate as root", func(o *organisation) {
			o.answer = func(c, _ []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) { return c[:1], c[1:] }
		}, "not self-signed"},
		{"no CA", func(o *organisation) {
			o.change = func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }
		}, "cA is false"},
		{"digitalSignature too", func(o *organisation) {
			o.change = func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }
		}, "key usage"},
		{"no key usage", func(o *organisation) { o.change = func(c *x509.Certificate) { c.KeyUsage = 0 } }, "key usage"},
		{"no ID", func(o *organisation) { o.change = func(c *x509.Certificate) { c.URIs = nil } }, "URI"},
		{"X509-18: a slash", func(o *organisation) { o.change = func(c *x509.Certificate) { c.URIs[0].Path = "/" } }, "spiffe://example.org/"},
		{"X509-18: a path", func(o *organisation) { o.change = func(c *x509.Certificate) { c.URIs[0].Path = "/ca" } }, "spiffe://example.org/ca"},
		{"another trust domain", func(o *organisation) { o.change = func(c *x509.Certificate) { c.URIs[0].Host = "example.com" } }, "spiffe://example.com"},
		{"two IDs", func(o *organisation) {
			o.change = func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "example.org"}) }
		}, "URI"},
		{"expired", func(o *organisation) { o.ttl = -time.Minute }, "compare the clocks"},
		{"ends in a moment", func(o *organisation) { o.ttl = 20 * time.Second }, "must last 1m0s"},
		{"not valid yet", func(o *organisation) { o.change = func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Minute) } }, "compare the clocks"},
		{"for decades", func(o *organisation) {
			o.issuing = newSigner(t, o.root, caTemplate("long", testNow, 100*365*24*time.Hour))
			o.ttl = 30 * 365 * 24 * time.Hour
		}, "limit the TTL"},
		{"EKU without clientAuth", func(o *organisation) {
			o.change = func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
		}, "extended key usage"},
		{"EKU of its issuer", func(o *organisation) {
			ca := caTemplate("mail", testNow, time.Hour)
			ca.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection}
			o.issuing = newSigner(t, o.root, ca)
			o.ttl = 10 * time.Minute
		}, "extended key usage"},
		{"X509-21: path length of its issuer", func(o *organisation) {
			ca := caTemplate("short", testNow, 365*24*time.Hour)
			ca.MaxPathLenZero = true
			o.issuing = newSigner(t, o.root, ca)
		}, "pathLenConstraint 0"},
		{"X509-22: name constraints", func(o *organisation) {
			ca := caTemplate("narrow", testNow, 365*24*time.Hour)
			ca.PermittedURIDomains, ca.PermittedDNSDomainsCritical = []string{"example.com"}, true
			o.issuing = newSigner(t, o.root, ca)
		}, "not permitted"},
		{"X509-22: name constraints on itself", func(o *organisation) {
			o.change = func(c *x509.Certificate) {
				c.ExcludedURIDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
			}
		}, "would not verify"},
		{"unknown critical extension", func(o *organisation) {
			o.change = func(c *x509.Certificate) {
				c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
			}
		}, "unhandled critical extension"},
		{"X509-53: its issuer lacks keyCertSign", func(o *organisation) {
			ca := caTemplate("no sign", testNow, 365*24*time.Hour)
			ca.KeyUsage = x509.KeyUsageCRLSign
			o.issuing = newSigner(t, o.root, ca)
		}, "cannot sign this kind"},
		{"too large", func(o *organisation) {
			o.change = func(c *x509.Certificate) {
				c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: make([]byte, MaxUpstreamCertificateBytes)}}
			}
		}, "bytes, more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, org, at := openBelow(t, nil)
			before := f.set.current.Load()
			at.set(testNow.Add(time.Second))
			tt.spoil(org)
			_, err := f.set.RenewIntermediate(t.Context())
			var upstream *UpstreamError
			if !errors.As(err, &upstream) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "the organisation") {
				t.Fatalf("RenewIntermediate = %v, want an UpstreamError with %q", err, tt.want)
			}
			items, err := f.set.list(t.Context())
			f.must(err)
			f.must(f.set.Load(items))
			if f.set.current.Load().revision != before.revision {
				t.Error("the store was changed")
			}
			if err := f.verify(f.issue("/web")); err != nil {
				t.Errorf("the authority that is there does not go on: %v", err)
			}
			// Nor does a new trust domain begin on such an answer.
			c := testConfig(t)
			c.Upstream = org
			if _, err := Open(t.Context(), c); !errors.As(err, &upstream) {
				t.Errorf("Open of an empty store = %v, want an UpstreamError", err)
			}
		})
	}
}

func TestIntermediateIsReplacedAtOnceBelowTheSameRoot(t *testing.T) {
	f, _, at := openBelow(t, nil)
	old := f.issue("/web")
	due, ok := f.set.IntermediateDue()
	if want := testNow.Add((DefaultUpstreamTTL - time.Hour) / 2).Truncate(time.Second); !ok || due.Sub(want).Abs() > time.Second {
		t.Errorf("due at %v (%t), want half of its life, %v", due, ok, want)
	}
	at.set(due)
	r, err := f.set.RenewIntermediate(t.Context())
	f.must(err)
	if svid := f.issue("/web"); !r.Active || svid.AuthorityID != r.ID || r.ID == old.AuthorityID {
		t.Errorf("signed by %s, want the new authority %s", svid.AuthorityID, r.ID)
	} else if err := f.verify(svid); err != nil {
		t.Error(err)
	}
	if len(f.set.Bundle().X509) != 1 {
		t.Errorf("two intermediates below one root: the bundle has %d authorities", len(f.set.Bundle().X509))
	}
	at.set(testNow.Add(time.Minute))
	if err := f.verify(old); err != nil {
		t.Errorf("what the old intermediate signed: %v", err)
	}
	// It goes like any other old authority: when nothing that it signed can be valid.
	if _, err := f.set.Retire(t.Context(), KindX509, old.AuthorityID); err == nil {
		t.Error("the old intermediate was retired while what it signed is valid")
	}
	at.set(due.Add(DefaultMaxX509TTL + time.Hour))
	_, err = f.set.Retire(t.Context(), KindX509, old.AuthorityID)
	f.must(err)
	if err := f.set.Health(); err != nil {
		t.Error(err)
	}
}

// A root is in the bundle before anything is signed below it, and leaves it when nothing needs it.
func TestNewRootIsPublishedBeforeUseAndTheOldOneLeaves(t *testing.T) {
	f, org, at := openBelow(t, func(c *Config) { c.UpstreamTTL = 26 * time.Hour })
	old := org.root
	next := newOrganisation(t, at.now)
	changed, err := f.set.FollowUpstream(t.Context(), []*x509.Certificate{old.cert, next.root.cert}, nil)
	if f.must(err); !changed {
		t.Fatal("nothing was published")
	}
	if b := f.set.Bundle(); len(b.X509) != 2 || b.X509[1].State != StatePrepared || b.X509[1].ID != rootID(next.root.cert) {
		t.Fatalf("the bundle has %+v, want the new root as prepared", b.X509)
	}
	if changed, err := f.set.FollowUpstream(t.Context(), []*x509.Certificate{old.cert, next.root.cert}, nil); changed || err != nil {
		t.Errorf("the same again: changed %t, %v", changed, err)
	}
	if due, ok := f.set.IntermediateDue(); !ok || !due.After(testNow) {
		t.Errorf("while the upstream has both roots: due at %v (%t)", due, ok)
	}
	_, err = f.set.FollowUpstream(t.Context(), []*x509.Certificate{next.root.cert}, nil)
	f.must(err)
	if due, ok := f.set.IntermediateDue(); !ok || due.After(testNow) || len(f.set.Bundle().X509) != 2 {
		t.Errorf("after the upstream has let go of the root in use: due at %v (%t), %d roots", due, ok, len(f.set.Bundle().X509))
	}
	org.root, org.issuing = next.root, next.issuing
	r, err := f.set.RenewIntermediate(t.Context())
	f.must(err)
	if r.Active || f.issue("/web").AuthorityID == r.ID {
		t.Error("an authority below a new root signs before agents have the root")
	}
	if _, ok := f.set.IntermediateDue(); ok {
		t.Error("another intermediate is due while one waits for its activation")
	}
	was := f.issue("/web")
	_, err = f.set.Activate(t.Context(), KindX509, r.ID)
	f.must(err)
	if svid := f.issue("/web"); svid.AuthorityID != r.ID || !svid.Root.Equal(next.root.cert) {
		t.Error("the new authority does not sign after its activation")
	}
	// The upstream lets go of its old root, which stays as long as SVIDs below it may be about.
	_, err = f.set.FollowUpstream(t.Context(), []*x509.Certificate{next.root.cert}, nil)
	f.must(err)
	if err := f.verify(was); err != nil || len(f.set.Bundle().X509) != 2 {
		t.Errorf("the old root left while an SVID below it is valid: %v", err)
	}
	at.set(testNow.Add(25 * time.Hour))
	_, err = f.set.Retire(t.Context(), KindX509, was.AuthorityID)
	f.must(err)
	if b := f.set.Bundle(); len(b.X509) != 1 || b.X509[0].ID != rootID(next.root.cert) {
		t.Errorf("the old root is still published: %+v", b.X509)
	}
}

func TestUpstreamRootIsTaintedAndRevoked(t *testing.T) {
	f, org, at := openBelow(t, nil)
	old, next := org.root, newOrganisation(t, at.now)
	oldID := rootID(old.cert)
	if err := f.set.TaintUpstreamRoot(t.Context(), oldID); !errors.Is(err, ErrRootState) {
		t.Errorf("tainting the root in use = %v, want ErrRootState", err)
	}
	if err := f.set.TaintUpstreamRoot(t.Context(), "00"); !errors.Is(err, ErrUnknownRoot) {
		t.Errorf("tainting an unknown root = %v, want ErrUnknownRoot", err)
	}
	was := f.issue("/web")
	org.root, org.issuing = next.root, next.issuing
	r, err := f.set.RenewIntermediate(t.Context())
	f.must(err)
	_, err = f.set.Activate(t.Context(), KindX509, r.ID)
	f.must(err)
	if err := f.set.RevokeUpstreamRoot(t.Context(), oldID); !errors.Is(err, ErrRootState) {
		t.Errorf("revoking a root that is not tainted = %v, want ErrRootState", err)
	}
	f.must(f.set.TaintUpstreamRoot(t.Context(), oldID))
	if b := f.set.Bundle(); b.X509[0].ID != oldID || b.X509[0].State != StateTainted {
		t.Errorf("the bundle has %+v, want the old root tainted", b.X509)
	}
	// The upstream's bundle without it does not undo that.
	_, err = f.set.FollowUpstream(t.Context(), []*x509.Certificate{next.root.cert}, nil)
	f.must(err)
	if b := f.set.Bundle(); b.X509[0].State != StateTainted {
		t.Errorf("the root is %s after the upstream's bundle changed, want tainted", b.X509[0].State)
	}
	f.must(f.set.RevokeUpstreamRoot(t.Context(), oldID))
	if b := f.set.Bundle(); len(b.X509) != 1 || f.verify(was) == nil {
		t.Errorf("the revoked root is still good: %+v", b.X509)
	}
	// Nor does the upstream bring it back.
	if _, err = f.set.FollowUpstream(t.Context(), []*x509.Certificate{old.cert, next.root.cert}, nil); err != nil {
		t.Error(err)
	}
	items, err := f.set.list(t.Context())
	f.must(err)
	f.must(f.set.Load(items))
	if b := f.set.Bundle(); len(b.X509) != 1 {
		t.Errorf("the revoked root is back: %+v", b.X509)
	}
	back := newOrganisation(t, at.now)
	back.root, back.issuing = old, newSigner(t, old, caTemplate("again", testNow, time.Hour*1000))
	org.root, org.issuing = back.root, back.issuing
	if _, err := f.set.RenewIntermediate(t.Context()); err == nil || !strings.Contains(err.Error(), "revoked here") {
		t.Errorf("an intermediate below a revoked root = %v", err)
	}
}

// Of two replicas that renew at once, one wins, and nothing is left of the other's.
func TestTwoReplicasRenewAtOnce(t *testing.T) {
	f, org, _ := openBelow(t, nil)
	other, err := Open(t.Context(), f.set.config)
	f.must(err)
	feed(t, other)
	org.answer = func(chain, roots []*x509.Certificate) ([]*x509.Certificate, []*x509.Certificate) {
		org.answer = nil
		if _, err := other.RenewIntermediate(t.Context()); err != nil { // while the first waits for the upstream
			t.Error(err)
		}
		return chain, roots
	}
	if _, err := f.set.RenewIntermediate(t.Context()); !errors.Is(err, ErrConflict) {
		t.Fatalf("the slower replica's renewal = %v, want a conflict", err)
	}
	f.must(f.set.WaitFor(t.Context(), other.current.Load().revision))
	if n := len(f.set.current.Load().x509); n != 2 {
		t.Errorf("%d x509 authorities, want the first and the winner's", n)
	}
}

func TestX509_24_LeafInsideEveryCAUpToTheRoot(t *testing.T) {
	f, org, _ := openBelow(t, nil)
	short := caTemplate("nearly over", testNow, 40*time.Minute)
	org.issuing = newSigner(t, org.root, short)
	_, err := f.set.RenewIntermediate(t.Context()) // its own certificate says 3 days
	f.must(err)
	if svid := f.issue("/web"); svid.NotAfter.After(org.issuing.cert.NotAfter) {
		t.Errorf("the SVID ends at %v, after the issuing CA, at %v", svid.NotAfter, org.issuing.cert.NotAfter)
	}
	if err := f.set.CheckTTL(time.Hour); err == nil {
		t.Error("a TTL that the chain cuts is taken")
	}
}

func TestX509_22_DNSNamesOutsideTheChainsConstraintsRefused(t *testing.T) {
	f, org, _ := openBelow(t, nil)
	ca := caTemplate("internal only", testNow, 1000*time.Hour)
	ca.PermittedDNSDomains, ca.ExcludedDNSDomains, ca.PermittedDNSDomainsCritical = []string{"internal"}, []string{"secret.internal"}, true
	org.issuing = newSigner(t, org.root, ca)
	_, err := f.set.RenewIntermediate(t.Context())
	f.must(err)
	for name, ok := range map[string]bool{"db.internal": true, "internal": true, "db.example.com": false, "a.secret.internal": false, "notinternal": false} {
		p, err := f.set.CheckX509(X509Request{ID: spiffeid.RequireFromPath(testTD, "/db"), PublicKey: newKey(t).Public(), DNSNames: []string{name}})
		f.must(err)
		svid, err := f.set.SignX509(t.Context(), p)
		if (err == nil) != ok || err != nil && !errors.Is(err, ErrRefused) {
			t.Errorf("DNS name %s: %v, want it taken: %t", name, err, ok)
		}
		if err == nil {
			if err := f.verify(svid); err != nil {
				t.Errorf("DNS name %s: %v", name, err)
			}
		}
	}
}

func TestFollowUpstreamRefusals(t *testing.T) {
	f, org, _ := openBelow(t, nil)
	noSKI := *org.root.cert
	noSKI.SubjectKeyId = nil
	good := []*x509.Certificate{org.root.cert}
	key, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
	f.must(err)
	later := testNow.Add(time.Hour)
	for _, tt := range []struct {
		name  string
		roots []*x509.Certificate
		keys  []ForeignJWTKey
		want  string
	}{
		{"no roots", nil, nil, "no root"},
		{"too many", slices.Repeat(good, MaxUpstreamRoots+1), nil, "21 roots"},
		{"an intermediate", []*x509.Certificate{org.issuing.cert}, nil, "not self-signed"},
		{"no key id", []*x509.Certificate{&noSKI}, nil, "subject key identifier"},
		{"a key without an id", good, []ForeignJWTKey{{PublicKey: key, ExpiresAt: later}}, "no key id"},
		{"a key with a long id", good, []ForeignJWTKey{{KeyID: strings.Repeat("k", 256), PublicKey: key, ExpiresAt: later}}, "256 bytes"},
		{"a key for ever", good, []ForeignJWTKey{{KeyID: "k", PublicKey: key}}, "no expiry"},
		{"no key", good, []ForeignJWTKey{{KeyID: "k", PublicKey: []byte{1}, ExpiresAt: later}}, "SubjectPublicKeyInfo"},
		{"too many keys", good, make([]ForeignJWTKey, MaxUpstreamJWTKeys+1), "65 jwt keys"},
	} {
		if changed, err := f.set.FollowUpstream(t.Context(), tt.roots, tt.keys); changed || err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: changed %t, %v; want an error with %q", tt.name, changed, err, tt.want)
		}
	}
	// One that shows our own key id with another key does not displace ours.
	own := f.set.Bundle().JWT[0]
	changed, err := f.set.FollowUpstream(t.Context(), good, []ForeignJWTKey{{KeyID: own.KeyID, PublicKey: key, ExpiresAt: later}, {KeyID: "theirs", PublicKey: key, ExpiresAt: later}})
	if f.must(err); !changed {
		t.Fatal("nothing was published")
	}
	jwt := f.set.Bundle().JWT
	if len(jwt) != 2 || jwt[0].PublicKey != own.PublicKey || jwt[1].KeyID != "theirs" || jwt[1].Origin != OriginUpstream {
		t.Errorf("the bundle has the JWT keys %+v, want ours and theirs", jwt)
	}
}

// FuzzUpstreamAnswer holds that whatever bytes an upstream answers with, what is taken verifies.
func FuzzUpstreamAnswer(f *testing.F) {
	at := newClock(testNow)
	org := newOrganisation(f, at.now)
	key := newKey(f)
	template := caTemplate("", testNow, time.Hour)
	template.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}}
	template.SerialNumber = big.NewInt(7)
	leaf := org.issuing.sign(f, template, key.Public())
	f.Add(leaf.Raw, org.issuing.cert.Raw, org.root.cert.Raw)
	f.Add(leaf.Raw, leaf.Raw, leaf.Raw)
	f.Add(org.root.cert.Raw, org.root.cert.Raw, org.root.cert.Raw)
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		var certs []*x509.Certificate
		for _, der := range [][]byte{a, b, c} {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return
			}
			certs = append(certs, cert)
		}
		cert, above, err := checkUpstreamAnswer(certs[:2], certs[2:], key.Public(), testTD, testNow, time.Hour)
		if err != nil {
			return
		}
		if !slices.Equal(cert.Raw, leaf.Raw) || len(above) != 2 || !above[1].Equal(org.root.cert) {
			t.Errorf("took %x below %d certificates", cert.Raw, len(above))
		}
	})
}

// TestFormerUpstreamIsForgotten opens the authorities without the upstream below which they were made. All that it published
// stays while SVIDs lead there, and goes with the last intermediate; its JWT keys go with their end.
func TestFormerUpstreamIsForgotten(t *testing.T) {
	f, org, at := openBelow(t, nil)
	other := newOrganisation(t, at.now)
	roots := []*x509.Certificate{org.root.cert, other.root.cert}
	_, spki, err := newKeyPair(t)
	f.must(err)
	_, err = f.set.FollowUpstream(t.Context(), roots, []ForeignJWTKey{{KeyID: "above", PublicKey: spki, ExpiresAt: at.now().Add(100 * time.Hour)}})
	f.must(err)
	if dropped, err := f.set.DropUpstream(t.Context()); dropped || err != nil {
		t.Errorf("with the upstream configured: dropped %t, %v", dropped, err)
	}
	below := f.set.Authorities(KindX509)[0].ID
	was := f.issue("/web")

	c := f.set.config
	c.Upstream = nil
	f.set, err = Open(t.Context(), c)
	f.must(err)
	feed(t, f.set)
	if dropped, err := f.set.DropUpstream(t.Context()); dropped || err != nil || len(f.set.Bundle().X509) != 2 || len(f.set.Bundle().JWT) != 2 {
		t.Errorf("while the intermediate signs: dropped %t, %v, the bundle holds %d and %d authorities", dropped, err, len(f.set.Bundle().X509), len(f.set.Bundle().JWT))
	}
	_, err = f.set.Prepare(t.Context(), KindX509)
	f.must(err)
	step, err := f.set.Activate(t.Context(), KindX509, "")
	f.must(err)
	if len(step.Above) != 0 || f.issue("/web").AuthorityID != step.ID {
		t.Error("the next authority does not sign itself")
	}
	if dropped, err := f.set.DropUpstream(t.Context()); dropped || err != nil || len(f.set.Bundle().X509) != 3 {
		t.Errorf("while SVIDs of the intermediate are valid: dropped %t, %v, %d authorities", dropped, err, len(f.set.Bundle().X509))
	}
	f.must(f.verify(was))
	at.set(at.now().Add(73 * time.Hour))
	_, err = f.set.Retire(t.Context(), KindX509, below)
	f.must(err)
	if dropped, err := f.set.DropUpstream(t.Context()); !dropped || err != nil {
		t.Errorf("after the last intermediate: dropped %t, %v", dropped, err)
	}
	if b := f.set.Bundle(); len(b.X509) != 1 || b.X509[0].ID != step.ID || len(b.JWT) != 2 {
		t.Errorf("the bundle holds %d and %d authorities, want ours, and the JWT key above that is still good", len(b.X509), len(b.JWT))
	}
	at.set(at.now().Add(27*time.Hour + signedSlack + time.Second))
	if dropped, err := f.set.DropUpstream(t.Context()); !dropped || err != nil || len(f.set.Bundle().JWT) != 1 {
		t.Errorf("after the end of its JWT key: dropped %t, %v, %d left", dropped, err, len(f.set.Bundle().JWT))
	}
	if dropped, err := f.set.DropUpstream(t.Context()); dropped || err != nil {
		t.Errorf("again: dropped %t, %v", dropped, err)
	}
}

func newKeyPair(t *testing.T) (*ecdsa.PrivateKey, []byte, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	return key, spki, err
}
