package registry

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

const federationPrefix = "federation/"

// MaxFederations bounds how many trust domains this one federates with by fetching their bundles.
const MaxFederations = 1000

const maxURLBytes = 2048

// ErrExists means that a federation relationship with the trust domain exists.
var ErrExists = errors.New("exists already")

// A Profile is how a bundle endpoint proves who it is. [Federation §5.2]
type Profile string

const (
	// ProfileWeb: by a certificate of the Web PKI for the host in the URL.
	ProfileWeb Profile = "https_web"
	// ProfileSPIFFE: by an X509-SVID with one configured ID.
	ProfileSPIFFE Profile = "https_spiffe"
)

// A Federation is the relationship with a foreign trust domain whose bundle is fetched from a bundle endpoint. URL, profile
// and trust domain are all given; none is guessed from another. It is never changed in place. [FED-15]
type Federation struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	Profile     Profile
	EndpointID  spiffeid.ID // https_spiffe only
	CreatedAt   time.Time
	Revision    store.Revision

	// Document is the Federation that the relationship belongs to, nil if signet federation or a tool of SPIRE's made it.
	Document *Document
	// Initial is the hash of the bundle to begin with that Document gives, in hexadecimal; empty if it gives none.
	Initial string
}

type federationRecord struct {
	V          int       `json:"v"`
	URL        string    `json:"url"`
	Profile    Profile   `json:"profile"`
	EndpointID string    `json:"endpoint_id,omitempty"`
	CreatedAt  int64     `json:"created_at"`
	Document   *document `json:"document,omitempty"`
	Initial    string    `json:"initial,omitempty"`
}

func (f *Federation) encode() ([]byte, error) {
	r := federationRecord{V: recordVersion, URL: f.URL, Profile: f.Profile, CreatedAt: unix(f.CreatedAt), Initial: f.Initial}
	if d := f.Document; d != nil {
		rec := d.document()
		r.Document = &rec
	}
	if !f.EndpointID.IsZero() {
		r.EndpointID = f.EndpointID.String()
	}
	return marshal(r)
}

func (ix *index) applyFederation(own spiffeid.TrustDomain, name string, ev store.Event, ch *changes) error {
	td, err := spiffe.ParseTrustDomain(name)
	if err != nil {
		return fmt.Errorf("record %s: %w", ev.Key, err)
	}
	ch.federations = true
	ix.who++
	if ev.Deleted {
		delete(ix.federations, td)
		return nil
	}
	f, err := decodeFederation(td, ev.Item)
	if err != nil {
		return err
	}
	if err := f.validate(own); err != nil {
		return fmt.Errorf("record %s: %w", ev.Key, err)
	}
	ix.federations[td] = f
	return nil
}

func decodeFederation(td spiffeid.TrustDomain, it store.Item) (*Federation, error) {
	var r federationRecord
	if err := decodeRecord(it, &r, func() int { return r.V }); err != nil {
		return nil, err
	}
	f := &Federation{TrustDomain: td, URL: r.URL, Profile: r.Profile, CreatedAt: fromUnix(r.CreatedAt), Initial: r.Initial, Revision: it.Modified}
	if r.EndpointID != "" {
		var err error
		if f.EndpointID, err = spiffe.ParseWorkloadID(r.EndpointID); err != nil {
			return nil, fmt.Errorf("record %s: %w", it.Key, err)
		}
	}
	if r.Document != nil {
		d := r.Document.domain()
		f.Document = &d
	}
	return f, nil
}

// validate says what is wrong with a relationship by itself. [FED-17, FED-18, FED-57]
func (f *Federation) validate(own spiffeid.TrustDomain) error {
	if f.TrustDomain == own {
		return invalid("trust_domain", own.Name(), "is this trust domain itself [ID-24]")
	}
	if err := CheckEndpointURL(f.URL); err != nil {
		return err
	}
	switch {
	case f.Profile == ProfileWeb && !f.EndpointID.IsZero():
		return invalid("bundle_endpoint_profile", string(f.Profile), "takes no endpoint SPIFFE ID")
	case f.Profile == ProfileSPIFFE && f.EndpointID.Path() == "":
		return invalid("endpoint_spiffe_id", f.EndpointID.String(), "must be the SPIFFE ID of the endpoint, with a path [FED-57]")
	case f.Profile != ProfileWeb && f.Profile != ProfileSPIFFE:
		return invalid("bundle_endpoint_profile", string(f.Profile), "must be %s or %s", ProfileWeb, ProfileSPIFFE)
	}
	return nil
}

// CheckEndpointURL refuses what is no URL of a bundle endpoint.
func CheckEndpointURL(s string) error {
	const field = "bundle_endpoint_url"
	if s == "" {
		return invalid(field, "", "missing")
	}
	if len(s) > maxURLBytes {
		return invalid(field, clip(s), "has %d bytes, at most %d are allowed", len(s), maxURLBytes)
	}
	u, err := url.Parse(s)
	if err != nil {
		return invalid(field, "", "is no URL such as https://partner.example/bundle.json")
	}
	shown := clip(u.Redacted()) // a password that somebody wrote into it stays out of errors and logs
	port, portErr := 443, error(nil)
	if p := u.Port(); p != "" {
		port, portErr = strconv.Atoi(p)
	}
	switch {
	case u.Scheme != "https":
		return invalid(field, shown, "must begin with https:// [FED-17]")
	case u.User != nil:
		return invalid(field, shown, "must not hold a user or password [FED-18]")
	case u.Hostname() == "" || u.Opaque != "":
		return invalid(field, shown, "has no host")
	case portErr != nil || port < 1 || port > 65535 || strings.HasSuffix(u.Host, ":"):
		return invalid(field, shown, "has no port of 1 to 65535")
	case u.Fragment != "" || strings.Contains(s, "#"):
		return invalid(field, shown, "must not have a fragment")
	}
	return nil
}

// checkEndpoint makes sure that an https_spiffe endpoint can be verified at all: by a bundle that is given or stored, or one
// that another relationship brings. A circle of relationships of which none has a bundle could never begin. [FED-50, FED-52]
func (r *Registry) checkEndpoint(f *Federation, given bool) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return federationView{own: r.c.TrustDomain,
		bundle:     func(td spiffeid.TrustDomain) bool { return r.ix.bundles[td] != nil || given && td == f.TrustDomain },
		federation: func(td spiffeid.TrustDomain) *Federation { return r.ix.federations[td] }}.verifiable(f)
}

// A federationView is what is known of trust domains at some moment.
type federationView struct {
	own        spiffeid.TrustDomain
	bundle     func(spiffeid.TrustDomain) bool
	federation func(spiffeid.TrustDomain) *Federation
}

// verifiable is checkEndpoint for a view.
func (v federationView) verifiable(f *Federation) error {
	seen := map[spiffeid.TrustDomain]bool{}
	var way []string
	for at := f; at.Profile == ProfileSPIFFE; {
		td := at.EndpointID.TrustDomain()
		way = append(way, td.Name())
		if td == v.own || v.bundle(td) {
			return nil
		}
		next := v.federation(td)
		if td == f.TrustDomain {
			next = f
		}
		switch {
		case next == nil || next == at:
			return invalid("endpoint_spiffe_id", f.EndpointID.String(), "cannot be verified: the bundle of %q is not known; give it as the trust domain's bundle, or set it first", td.Name())
		case seen[td]:
			return invalid("endpoint_spiffe_id", f.EndpointID.String(), "cannot be verified: %s vouch for each other in a circle, and no bundle of them is known; give one", strings.Join(way, ", "))
		}
		seen[td] = true
		at = next
	}
	return nil
}

// CreateFederation stores a new relationship and, with it or not at all, the bundle to begin with, if there is one.
// ErrExists if there is a relationship with that trust domain.
func (r *Registry) CreateFederation(ctx context.Context, f *Federation, bundle []byte) error {
	if err := f.validate(r.c.TrustDomain); err != nil {
		return err
	}
	if _, err := r.Federation(f.TrustDomain); err == nil {
		return ErrExists
	}
	if err := r.checkEndpoint(f, bundle != nil); err != nil {
		return err
	}
	if n := len(r.Federations()); n >= MaxFederations {
		return invalid("trust_domain", f.TrustDomain.Name(), "is one too many: there are %d relationships, at most %d are allowed", n, MaxFederations)
	}
	f.CreatedAt = r.c.Now().Truncate(time.Second)
	err := r.writeFederation(ctx, f, 0, bundle)
	if errors.Is(err, ErrConflict) {
		return ErrExists
	}
	return err
}

// UpdateFederation changes a relationship by change, which gets a copy, and stores a bundle with it, if one is given. One that
// belongs to a document takes a bundle, as SetBundle does, and no other change.
// ErrNotFound if there is no relationship.
func (r *Registry) UpdateFederation(ctx context.Context, td spiffeid.TrustDomain, change func(*Federation) error, bundle []byte) (*Federation, error) {
	for range maxAttempts {
		old, err := r.Federation(td)
		if err != nil {
			return nil, err
		}
		f := *old
		if err := change(&f); err != nil {
			return nil, err
		}
		if err := f.validate(r.c.TrustDomain); err != nil {
			return nil, err
		}
		if err := r.checkEndpoint(&f, bundle != nil); err != nil {
			return nil, err
		}
		if f == *old && bundle == nil {
			return old, nil
		}
		if err := old.owned(); err != nil && f != *old {
			return nil, err
		}
		err = r.writeFederation(ctx, &f, old.Revision, bundle)
		if !errors.Is(err, ErrConflict) {
			return &f, err
		}
		if _, err := r.Barrier(ctx); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("federation relationship with %q: %w", td.Name(), ErrConflict)
}

func (r *Registry) writeFederation(ctx context.Context, f *Federation, at store.Revision, bundle []byte) error {
	value, err := f.encode()
	if err != nil {
		return err
	}
	key := federationPrefix + f.TrustDomain.Name()
	writes := []store.Write{{Key: key, Value: value}}
	if bundle != nil {
		w, err := r.bundleWrite(f.TrustDomain, bundle)
		if err != nil {
			return err
		}
		writes = append(writes, w)
	}
	rev, err := r.commit(ctx, []store.Check{{Key: key, Modified: at}}, writes)
	if err == nil {
		f.Revision = rev
	}
	return err
}

// DeleteFederation ends a relationship that belongs to no document: the bundle is forgotten with it, so that nobody here
// trusts the trust domain any longer. ErrNotFound if there is none. [FED-29]
func (r *Registry) DeleteFederation(ctx context.Context, td spiffeid.TrustDomain) error {
	for range maxAttempts {
		f, err := r.Federation(td)
		if err != nil {
			return err
		}
		if err := f.owned(); err != nil {
			return err
		}
		key := federationPrefix + td.Name()
		_, err = r.commit(ctx, []store.Check{{Key: key, Modified: f.Revision}}, []store.Write{{Key: key, Delete: true}, {Key: bundlePrefix + td.Name(), Delete: true}})
		if !errors.Is(err, ErrConflict) {
			return err
		}
		if _, err := r.Barrier(ctx); err != nil {
			return err
		}
	}
	return fmt.Errorf("federation relationship with %q: %w", td.Name(), ErrConflict)
}

// StoreFetched stores a bundle that was fetched for f in the place of have, which is nil if there was none. ErrConflict if the
// relationship or the bundle changed while it was fetched: what was fetched from an endpoint that an operator has dropped
// meanwhile is not stored.
func (r *Registry) StoreFetched(ctx context.Context, f *Federation, have *Bundle, content []byte) error {
	w, err := r.bundleWrite(f.TrustDomain, content)
	if err != nil {
		return err
	}
	checks := []store.Check{{Key: federationPrefix + f.TrustDomain.Name(), Modified: f.Revision}, {Key: w.Key}}
	if have != nil {
		checks[1].Modified = have.Revision
	}
	_, err = r.commit(ctx, checks, []store.Write{w})
	return err
}

// Federation returns one relationship. ErrNotFound if there is none.
func (r *Registry) Federation(td spiffeid.TrustDomain) (*Federation, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if f := r.ix.federations[td]; f != nil {
		return f, nil
	}
	return nil, ErrNotFound
}

// Federations returns all relationships in order of trust domain.
func (r *Registry) Federations() []*Federation {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]*Federation, 0, len(r.ix.federations))
	for _, f := range r.ix.federations {
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b *Federation) int { return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name()) })
	return out
}

// FederationsChanged has one slot, which is filled when a relationship came, changed or went: look again. It is for one
// reader.
func (r *Registry) FederationsChanged() <-chan struct{} { return r.federationsChanged }

// noteFederations fills the slot.
func (r *Registry) noteFederations() { notify(r.federationsChanged) }

// notify fills a channel of one slot.
func notify(slot chan struct{}) {
	select {
	case slot <- struct{}{}:
	default:
	}
}
