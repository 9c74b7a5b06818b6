package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// serverSVID is the CA's own X509-SVID, spiffe://TD/spire/server, signed by the trust domain's active authority and
// renewed at half life or when the authority changes. The authority's certificate, below an upstream CA the root, goes along in the handshake, so that
// a node which holds nothing but a pin can find the pinned key, and so do those that lead back to earlier authorities,
// for nodes that were away while the authority changed. [DESIGN §4, §7]
type serverSVID struct {
	id    spiffeid.ID
	set   *authority.Set
	audit *auditlog.Log
	now   func() time.Time

	renewing sync.Mutex // held while a new one is signed, by a key store perhaps, which takes its time

	mu   sync.Mutex // guards what follows, and is never held for long: handshakes wait for it
	cert *tls.Certificate
	pin  string
	half time.Time
	end  time.Time
}

func newServerSVID(td spiffeid.TrustDomain, set *authority.Set, audit *auditlog.Log, now func() time.Time) *serverSVID {
	return &serverSVID{id: registry.ServerID(td), set: set, audit: audit, now: now}
}

// get returns an SVID that is valid now. If a new one cannot be had, the old one serves until its end. While one caller
// waits for a new one, the others get the old one at once, as long as there is one.
func (s *serverSVID) get() (*tls.Certificate, error) {
	cert, valid, fresh := s.held()
	if fresh {
		return cert, nil
	}
	if !valid {
		s.renewing.Lock()
	} else if !s.renewing.TryLock() {
		return cert, nil
	}
	defer s.renewing.Unlock()
	if cert, _, fresh := s.held(); fresh { // another caller has renewed it
		return cert, nil
	}
	if err := s.renew(s.now(), s.set.Pin()); err != nil {
		if cert, valid, _ := s.held(); valid {
			return cert, nil
		}
		return nil, fmt.Errorf("signing the CA's own X509-SVID: %w", err)
	}
	cert, _, _ = s.held()
	return cert, nil
}

// held returns the SVID that there is, whether it is valid, and whether it need not be renewed yet.
func (s *serverSVID) held() (cert *tls.Certificate, valid, fresh bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	valid = s.cert != nil && now.Before(s.end)
	return s.cert, valid, valid && s.set.Pin() == s.pin && now.Before(s.half) && !now.Before(s.cert.Leaf.NotBefore)
}

func (s *serverSVID) renew(now time.Time, pin string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	prepared, err := s.set.CheckX509(authority.X509Request{ID: s.id, PublicKey: key.Public(), Reserved: true})
	if err != nil {
		return err
	}
	const signTimeout = 10 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), signTimeout)
	defer cancel()
	svid, err := s.set.SignX509(ctx, prepared)
	if err != nil {
		return err
	}
	err = s.audit.Append(ctx, auditlog.Essential, auditlog.Record{Time: now, Event: "x509svid.issued", Actor: s.id.String(), ActorKind: "system",
		Subject: s.id.String(), Outcome: auditlog.Done, Details: map[string]any{"serial": svid.SerialNumber, "not_after": svid.NotAfter.Unix(), "authority": svid.AuthorityID}})
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		return err
	}
	chain := append(svid.Chain[:len(svid.Chain):len(svid.Chain)], s.set.Introduction()...)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cert = &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}
	s.pin, s.half, s.end = pin, now.Add(svid.NotAfter.Sub(now)/2), svid.NotAfter
	return nil
}
