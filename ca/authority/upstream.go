package authority

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// An Upstream is the CA that signs the X.509 authorities of this trust domain. Nothing it answers is used before it was
// checked; an answer that is refused leaves everything as it was.
type Upstream interface {
	// Name says which CA it is and how it is reached, for errors and logs.
	Name() string

	// Mint has the key of a DER certificate request certified as an X.509 authority of the trust domain in the request's one
	// URI SAN. ttl is what is wanted; it may give less. chain begins with the new certificate and goes up as far as verifiers
	// need it, each issued by the next; it may hold the root or not. roots are all that the upstream has now.
	Mint(ctx context.Context, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error)
}

// mint has the upstream certify a new authority's key, and returns the certificate and what is above it.
func (s *Set) mint(ctx context.Context, key *keys.Key) (*x509.Certificate, x509Path, error) {
	fail := func(err error) (*x509.Certificate, x509Path, error) {
		return nil, nil, &UpstreamError{Upstream: s.config.Upstream.Name(), Err: err}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{"signet"}, CommonName: commonName(s.config.TrustDomain)},
		URIs:    []*url.URL{{Scheme: "spiffe", Host: s.config.TrustDomain.Name()}}, // no path: X509-18
	}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("making the certificate request of the new x509 authority: %w", err)
	}
	chain, roots, err := s.config.Upstream.Mint(ctx, csr, s.config.UpstreamTTL)
	if err != nil {
		return fail(err)
	}
	now := s.config.Now()
	cert, above, err := checkUpstreamAnswer(chain, roots, key.Public(), s.config.TrustDomain, now, s.config.UpstreamTTL)
	if err != nil {
		return fail(fmt.Errorf("its answer is refused: %w", err))
	}
	if slices.Contains(s.revokedRoots(), fingerprint(above[len(above)-1])) {
		return fail(fmt.Errorf("its answer is refused: it leads to root %s, which was revoked here", rootID(above[len(above)-1])))
	}
	if err := probe(cert, above, key, s.config.TrustDomain, now); err != nil {
		return fail(fmt.Errorf("its answer is refused: an SVID below it would not verify: %w", err))
	}
	return cert, above, nil
}

func (s *Set) revokedRoots() []string {
	if n := s.current.Load(); n != nil {
		return n.upstream.record.Gone
	}
	return nil
}

// probe signs the certificate of an SVID that nobody will ever see, and verifies it as a peer would who holds the root:
// path lengths, name constraints and unknown critical extensions of every CA on the way are judged by it.
func probe(cert *x509.Certificate, above x509Path, key *keys.Key, td spiffeid.TrustDomain, now time.Time) error {
	leafKey, err := keys.Generate(context.Background())
	if err != nil {
		return err
	}
	_, ski, err := encodePublicKey(leafKey.Public())
	if err != nil {
		return err
	}
	a := &x509Authority{certificate: cert, above: above, key: key}
	notBefore, notAfter := validity(now, minUpstreamTTL, a)
	id, err := spiffeid.FromPath(td, "/spire/server")
	if err != nil {
		return err
	}
	der, err := a.signStandard(&PreparedX509{id: id, public: leafKey.Public(), ski: ski}, newSerial(), notBefore, notAfter)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(a.root())
	for _, c := range a.intermediates() {
		intermediates.AddCert(c)
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	return err
}

// IntermediateDue returns when the active X.509 authority should be replaced by a new one of the upstream CA: at half of
// its life, like an SVID, so that the upstream can be gone for the other half. It is now or earlier if there is no active
// authority, or a self-signed one. ok is false without an upstream, and while a new one waits for its activation.
func (s *Set) IntermediateDue() (at time.Time, ok bool) {
	if s.config.Upstream == nil {
		return time.Time{}, false
	}
	a := s.current.Load().activeX509
	if a == nil || len(a.above) == 0 {
		return time.Time{}, !s.awaitsActivation()
	}
	if followed := s.current.Load().upstream.roots; len(followed) > 0 && !slices.ContainsFunc(followed, a.root().Equal) {
		return time.Time{}, !s.awaitsActivation() // the upstream has let go of its root: others will soon refuse what is below it
	}
	notBefore, notAfter := a.validity()
	return notBefore.Add(notAfter.Sub(notBefore) / 2), !s.awaitsActivation()
}

// awaitsActivation tells whether an authority below the upstream is prepared, and good for long enough to be activated.
func (s *Set) awaitsActivation() bool {
	for _, a := range s.current.Load().x509 {
		if a.state == StatePrepared && len(a.above) > 0 {
			notBefore, notAfter := a.validity()
			if s.config.Now().Before(notBefore.Add(notAfter.Sub(notBefore) / 2)) {
				return true
			}
		}
	}
	return false
}

// A Renewal tells what RenewIntermediate has done.
type Renewal struct {
	// ID is the new X.509 authority, Root its root in the bundle.
	ID, Root string
	// Active tells that it signs now. If it does not, its root is new, and it is prepared: agents must hold the root first.
	Active bool
	// NotAfter is its end.
	NotAfter time.Time
}

// RenewIntermediate has the upstream CA certify a new key. If the new authority leads to the same root as the active one,
// it becomes active in the same commit: whoever verifies an SVID gets the intermediate with it, and holds the root
// already, so nobody has to be waited for. Otherwise it is prepared, which publishes its root.
//
// A crash before the commit leaves nothing: the key was in memory only, and what the upstream signed is of no use to
// anyone. Of two replicas that renew at once, one wins, and the other's error is ErrConflict.
func (s *Set) RenewIntermediate(ctx context.Context) (Renewal, error) {
	if s.config.Upstream == nil {
		return Renewal{}, errors.New("no upstream is configured")
	}
	var out Renewal
	step, err := s.change(ctx, KindX509, func(e *edit) (string, error) {
		active := e.in(StateActive)
		id, err := e.create(ctx, StatePrepared)
		if err != nil {
			return "", err
		}
		if active == nil || bytes.Equal(active.root, e.records[id].root) {
			return id, e.activate(e.records[id])
		}
		return id, nil
	})
	if err != nil {
		return Renewal{}, err
	}
	out.ID, out.Root, out.Active, out.NotAfter = step.ID, step.PublishedID(), step.State == StateActive, step.NotAfter
	return out, nil
}

// ErrUnknownRoot is returned for a root that the bundle does not hold.
var ErrUnknownRoot = errors.New("no upstream root has this id")

// ErrRootState is returned when a root is not in the state for what is asked: the active one can be neither tainted nor
// revoked, and only a tainted one can be revoked.
var ErrRootState = errors.New("the upstream root is in use, or not in the state for this")

// FollowUpstream publishes what the upstream CA publishes now: its roots, so that everybody holds a new one before
// anything is signed below it, and the JWT keys of the trust domain's CAs above this one. What is refused of it is named
// in the error, and the rest of the bundle stays as it was. changed tells whether anything was written.
func (s *Set) FollowUpstream(ctx context.Context, roots []*x509.Certificate, jwtKeys []ForeignJWTKey) (changed bool, err error) {
	fail := func(format string, args ...any) (bool, error) {
		name := "(none)"
		if s.config.Upstream != nil {
			name = s.config.Upstream.Name()
		}
		return false, &UpstreamError{Upstream: name, Err: fmt.Errorf("its bundle is refused: "+format, args...)}
	}
	switch {
	case len(roots) == 0:
		return fail("it has no root")
	case len(roots) > MaxUpstreamRoots:
		return fail("it has %d roots, more than %d", len(roots), MaxUpstreamRoots)
	case len(jwtKeys) > MaxUpstreamJWTKeys:
		return fail("it has %d jwt keys, more than %d", len(jwtKeys), MaxUpstreamJWTKeys)
	}
	for _, root := range roots {
		if err := checkRoot(root); err != nil {
			return fail("%w", err)
		}
	}
	for _, k := range jwtKeys {
		if _, err := k.check(); err != nil {
			return fail("%w", err)
		}
	}
	step, err := s.change(ctx, KindX509, func(e *edit) (string, error) {
		return "", e.setUpstream(e.follow(roots, jwtKeys))
	})
	return step.Changed, err
}

// follow returns the record of what the upstream publishes now.
func (e *edit) follow(roots []*x509.Certificate, jwtKeys []ForeignJWTKey) upstreamRecord {
	next := upstreamRecord{Version: recordVersion, Gone: e.upstream.Gone}
	has := func(list []rootRecord, der []byte) int {
		return slices.IndexFunc(list, func(r rootRecord) bool { return bytes.Equal(r.Certificate, der) })
	}
	for _, root := range roots {
		if slices.Contains(e.upstream.Gone, fingerprint(root)) || !e.now.Before(root.NotAfter) || has(next.Roots, root.Raw) >= 0 {
			continue
		}
		r := rootRecord{Certificate: root.Raw}
		if i := has(e.upstream.Roots, root.Raw); i >= 0 {
			r.Tainted = e.upstream.Roots[i].Tainted
		}
		next.Roots = append(next.Roots, r)
	}
	// A tainted root stays known as long as authorities lead to it, also when the upstream no longer has it.
	for _, was := range e.upstream.Roots {
		if was.Tainted && e.leadsTo(was.Certificate) && len(next.Roots) < MaxUpstreamRoots && has(next.Roots, was.Certificate) < 0 {
			next.Roots = append(next.Roots, was)
		}
	}
	for _, k := range jwtKeys {
		// What came from here would be published twice. Another key under an id that a CA below has taken is not from here.
		_, own := e.set.current.Load().jwt[k.KeyID]
		d, downstream := e.foreign[foreignRecordKey(k.KeyID)]
		if e.now.Before(k.ExpiresAt) && !own && !(downstream && bytes.Equal(d.record.PublicKey, k.PublicKey)) {
			next.Keys = append(next.Keys, keyRecord{KeyID: k.KeyID, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt.UTC(), Tainted: k.Tainted})
		}
	}
	slices.SortFunc(next.Keys, func(a, b keyRecord) int { return strings.Compare(a.KeyID, b.KeyID) })
	return next
}

// setUpstream writes the record of what the upstream publishes, if it changes.
func (e *edit) setUpstream(next upstreamRecord) error {
	before, err := json.Marshal(e.upstream)
	if err != nil {
		return err
	}
	value, err := json.Marshal(next)
	if err != nil {
		return err
	}
	if bytes.Equal(before, value) {
		return nil
	}
	if len(value) > maxRecordBytes {
		return fmt.Errorf("what the upstream publishes has %d bytes, more than %d", len(value), maxRecordBytes)
	}
	e.checks = append(e.checks, store.Check{Key: keyUpstream, Modified: e.upstreamAt})
	e.writes = append(e.writes, store.Write{Key: keyUpstream, Value: value})
	return nil
}

func (e *edit) leadsTo(root []byte) bool {
	for _, r := range e.records {
		if r.state.published() && bytes.Equal(r.root, root) {
			return true
		}
	}
	return false
}

// TaintUpstreamRoot marks a root of the upstream as bad: every SVID below it is re-issued, in an orderly wave, by the
// authority that is active now. The root that the active authority leads to is refused: have the upstream rotate first.
func (s *Set) TaintUpstreamRoot(ctx context.Context, id string) error {
	return s.changeRoot(ctx, id, func(r *rootRecord) error {
		if r.Tainted {
			return fmt.Errorf("root %s is tainted already: %w", id, ErrRootState)
		}
		r.Tainted = true
		return nil
	}, false)
}

// RevokeUpstreamRoot takes a tainted root out of the bundle, and the authorities below it with it. It is not taken over
// from the upstream again.
func (s *Set) RevokeUpstreamRoot(ctx context.Context, id string) error {
	return s.changeRoot(ctx, id, func(r *rootRecord) error {
		if !r.Tainted {
			return fmt.Errorf("root %s is not tainted; taint it first, so that SVIDs below it are re-issued before verifiers refuse them: %w", id, ErrRootState)
		}
		return nil
	}, true)
}

func (s *Set) changeRoot(ctx context.Context, id string, change func(*rootRecord) error, revoke bool) error {
	now := s.current.Load()
	i := slices.IndexFunc(now.bundle.X509, func(a X509Authority) bool { return a.Upstream && a.ID == id })
	if i < 0 {
		return fmt.Errorf("%q: %w", id, ErrUnknownRoot)
	}
	root := now.bundle.X509[i].Certificate
	_, err := s.change(ctx, KindX509, func(e *edit) (string, error) {
		if a := e.in(StateActive); a != nil && bytes.Equal(a.root, root.Raw) {
			return "", fmt.Errorf("root %s is the one that the active x509 authority leads to; let the upstream rotate to another first: %w", id, ErrRootState)
		}
		next := e.upstream
		next.Version, next.Roots = recordVersion, slices.Clone(e.upstream.Roots)
		at := slices.IndexFunc(next.Roots, func(r rootRecord) bool { return bytes.Equal(r.Certificate, root.Raw) })
		if at < 0 { // the upstream has let go of it, and an old authority still leads to it
			if len(next.Roots) == MaxUpstreamRoots {
				return "", fmt.Errorf("the upstream has %d roots already; revoke one of the tainted ones", MaxUpstreamRoots)
			}
			next.Roots = append(next.Roots, rootRecord{Certificate: root.Raw})
			at = len(next.Roots) - 1
		}
		if err := change(&next.Roots[at]); err != nil {
			return "", err
		}
		if revoke {
			next.Roots = slices.Delete(next.Roots, at, at+1)
			next.Gone = append(slices.Clone(e.upstream.Gone), fingerprint(root))
			next.Gone = next.Gone[max(0, len(next.Gone)-MaxUpstreamRoots):]
			for _, r := range e.records {
				if r.state.published() && bytes.Equal(r.root, root.Raw) {
					e.move(r, StateRevoked)
				}
			}
		}
		return "", e.setUpstream(next)
	})
	return err
}

// AuthorityLeft returns how long the active X.509 authority, and all above it, is valid from now, and how long it is in
// all. Both are zero if none is active.
func (s *Set) AuthorityLeft() (left, whole time.Duration) {
	a := s.current.Load().activeX509
	if a == nil {
		return 0, 0
	}
	notBefore, notAfter := a.validity()
	return max(0, notAfter.Sub(s.config.Now())), notAfter.Sub(notBefore)
}

// HasUpstream tells whether new X.509 authorities are signed by an upstream CA.
func (s *Set) HasUpstream() bool { return s.config.Upstream != nil }

// DropUpstream forgets what an upstream CA published that is no longer configured, and tells whether there was anything: its
// roots when no authority in the bundle leads to one of them any more, its JWT keys when they have ended. Until then SVIDs
// of its other CAs go on, and nothing new is learned of it. That roots were revoked is not forgotten.
func (s *Set) DropUpstream(ctx context.Context) (bool, error) {
	if s.config.Upstream != nil {
		return false, nil
	}
	if u := s.current.Load().upstream.record; len(u.Roots) == 0 && len(u.Keys) == 0 {
		return false, nil
	}
	step, err := s.change(ctx, KindX509, func(e *edit) (string, error) {
		next := upstreamRecord{Version: recordVersion, Gone: e.upstream.Gone}
		for _, r := range e.records {
			if r.state.published() && r.root != nil {
				next.Roots = e.upstream.Roots
			}
		}
		for _, k := range e.upstream.Keys {
			if e.now.Before(k.ExpiresAt.Add(signedSlack)) {
				next.Keys = append(next.Keys, k)
			}
		}
		return "", e.setUpstream(next)
	})
	return step.Changed, err
}

// DropEnded removes JWT keys of downstream CAs that are past their end, and tells how many. Intermediates go as other
// authorities do, and the upstream's roots with the last one that leads to them.
func (s *Set) DropEnded(ctx context.Context) (int, error) {
	ended := func(k *foreignKey) bool { return s.config.Now().After(k.record.ExpiresAt.Add(signedSlack)) }
	if !slices.ContainsFunc(slices.Collect(maps.Values(s.current.Load().foreign)), ended) {
		return 0, nil
	}
	n := 0
	_, err := s.change(ctx, KindJWT, func(e *edit) (string, error) {
		const most = 90 // of the 100 writes of a commit
		for key, k := range e.foreign {
			if ended(k.foreignKey) && n < most {
				n++
				e.checks = append(e.checks, store.Check{Key: key, Modified: k.modified})
				e.writes = append(e.writes, store.Write{Key: key, Delete: true})
			}
		}
		return "", nil
	})
	return n, err
}
