package registry

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// KindFederation is the kind of documents that say with which trust domains this one federates. A document and `signet
// federation`, which speaks SPIRE's API, are two doors to one record: a relationship belongs to its document, if there is one,
// and the API shows it but does not change it.
const KindFederation = "Federation"

type text = strictyaml.Located[string]

// federationDocument is the YAML form of a Federation.
type federationDocument struct {
	Kind              text `yaml:"kind" enum:"Federation" required:"true" desc:"Federation"`
	Name              text `yaml:"name" required:"true" desc:"Name of the document, unique among Federations."`
	TrustDomain       text `yaml:"trustDomain" required:"true" desc:"The foreign trust domain, such as partner.example. It cannot be changed: delete the Federation and apply another one."`
	BundleEndpointURL text `yaml:"bundleEndpointURL" required:"true" desc:"URL of its bundle endpoint, https://..."`
	Profile           text `yaml:"profile" enum:"https_web,https_spiffe" required:"true" desc:"How the endpoint proves who it is: https_web (a certificate of the Web PKI for the host in the URL) or https_spiffe (an X509-SVID with endpointSPIFFEID)."`
	EndpointSPIFFEID  text `yaml:"endpointSPIFFEID" desc:"The full SPIFFE ID of the endpoint. With https_spiffe only, and needed there."`
	Bundle            text `yaml:"bundle" desc:"The trust domain's bundle to begin with, as a SPIFFE bundle document (JSON) or its X.509 authorities in PEM. What is fetched replaces it. With https_spiffe it is needed, unless the bundle of the endpoint's trust domain is known."`
}

// Schema returns the JSON Schema of a kind of document that this package reads.
func Schema(kind string) ([]byte, error) {
	switch kind {
	case KindFederation:
		return strictyaml.Schema(reflect.TypeFor[federationDocument](), kind)
	case KindIdentity:
		return strictyaml.Schema(reflect.TypeFor[identityDocument](), kind)
	}
	return nil, fmt.Errorf("kind %q has no schema here", kind)
}

// ParseFederation reads a Federation document into the relationship that it stands for, and the bundle to begin with, nil if
// it has none. The error is of type strictyaml.Errors.
func ParseFederation(doc strictyaml.Document, own spiffeid.TrustDomain) (f *Federation, bundle []byte, err error) {
	var d federationDocument
	var errs strictyaml.Errors
	if err := strictyaml.Decode(doc, &d); err != nil && !errors.As(err, &errs) {
		return nil, nil, err
	}
	unread := len(errs)
	fail := func(t text, format string, args ...any) {
		for _, e := range errs[:unread] {
			if e.Line == t.Line && e.Column == t.Column {
				return
			}
		}
		errs = append(errs, &strictyaml.Error{File: doc.File, Line: max(t.Line, 1), Column: max(t.Column, 1), Message: fmt.Sprintf(format, args...)})
	}
	start := text{Line: doc.Line, Column: 1}
	missing := func(t text, field, want string) bool {
		if t.Line == 0 {
			fail(start, "%s is missing; write %s", field, want)
		}
		return t.Line == 0
	}
	f = &Federation{}
	if !missing(d.Name, "name", "one such as partner") {
		if err := CheckName(d.Name.Value); err != nil {
			fail(d.Name, "name: %v", err)
		}
	}
	known := false
	if !missing(d.TrustDomain, "trustDomain", "the name of the foreign trust domain, such as partner.example") {
		if f.TrustDomain, err = spiffe.ParseTrustDomain(d.TrustDomain.Value); err != nil {
			fail(d.TrustDomain, "trustDomain: %v", err)
		} else if known = f.TrustDomain != own; !known {
			fail(d.TrustDomain, "trustDomain %q is this trust domain itself [ID-24]", own.Name())
		}
	}
	if f.URL = d.BundleEndpointURL.Value; !missing(d.BundleEndpointURL, "bundleEndpointURL", "one such as https://partner.example/bundle.json") {
		if err := CheckEndpointURL(f.URL); err != nil {
			v, _ := errors.AsType[*ValidationError](err)
			fail(d.BundleEndpointURL, "bundleEndpointURL %q %s", v.Value, v.Problem)
		}
	}
	f.Profile = Profile(d.Profile.Value)
	switch {
	case missing(d.Profile, "profile", "https_web or https_spiffe; the operators of the trust domain know which"):
	case f.Profile == ProfileWeb:
		if d.EndpointSPIFFEID.Line != 0 {
			fail(d.EndpointSPIFFEID, "endpointSPIFFEID is for the profile https_spiffe; leave it out")
		}
	case f.Profile == ProfileSPIFFE:
		if missing(d.EndpointSPIFFEID, "endpointSPIFFEID", "the SPIFFE ID of the endpoint, such as spiffe://partner.example/bundle-endpoint") {
			break
		}
		if f.EndpointID, err = spiffe.ParseWorkloadID(d.EndpointSPIFFEID.Value); err != nil {
			fail(d.EndpointSPIFFEID, "endpointSPIFFEID: %v", err)
		}
	default:
		fail(d.Profile, "profile is %q; it must be https_web or https_spiffe", clip(d.Profile.Value))
	}
	if d.Bundle.Line != 0 && known {
		if bundle, err = readBundle(f.TrustDomain, d.Bundle.Value); err != nil {
			fail(d.Bundle, "bundle: %v", err)
		}
	}
	if len(errs) > 0 {
		return nil, nil, strictyaml.Sorted(errs)
	}
	f.Document = &Document{Name: d.Name.Value, Content: doc.Content, File: doc.File, Line: doc.Line}
	if bundle != nil {
		sum := sha256.Sum256(bundle)
		f.Initial = hex.EncodeToString(sum[:])
	}
	return f, bundle, nil
}

// readBundle reads a bundle in SPIFFE's format or PEM and returns it in SPIFFE's format.
func readBundle(td spiffeid.TrustDomain, s string) ([]byte, error) {
	if !strings.Contains(s, "-----BEGIN ") {
		b, _, err := spiffe.ParseBundle(td, []byte(s))
		if err != nil {
			return nil, err
		}
		if b.Empty() {
			return nil, errors.New("no key in it can be used")
		}
		return []byte(s), nil
	}
	if len(s) > spiffe.MaxBundleBytes {
		return nil, fmt.Errorf("it has %d bytes, at most %d are allowed", len(s), spiffe.MaxBundleBytes)
	}
	var roots []*x509.Certificate
	for rest := []byte(s); len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("it holds something else than certificates in PEM")
		}
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(roots)+1, err)
		}
		roots = append(roots, root)
	}
	content, err := spiffe.MarshalBundle(spiffebundle.FromX509Authorities(td, roots))
	if err != nil {
		return nil, err
	}
	if _, skipped, err := spiffe.ParseBundle(td, content); err != nil || len(skipped) > 0 {
		return nil, errors.Join(append(skipped, err)...)
	}
	return content, nil
}

// federationNamed returns the relationship that belongs to the Federation of that name, nil if there is none. mu is held.
func (ix *index) federationNamed(name string) *Federation {
	var found *Federation
	for _, f := range ix.federations { // at most MaxFederations
		if f.Document != nil && f.Document.Name == name && (found == nil || f.TrustDomain.Name() < found.TrustDomain.Name()) {
			found = f
		}
	}
	return found
}

// planFederation adds what one Federation changes. mu is held.
func (r *Registry) planFederation(p *Plan, x *resource, o Options, goes func(key string) bool) error {
	f := *x.federation
	fail := func(field, format string, args ...any) error {
		return fmt.Errorf("%s: Federation %q: %s", where(*x.source, field), x.name, fmt.Sprintf(format, args...))
	}
	old := r.ix.federations[f.TrustDomain]
	if named := r.ix.federationNamed(x.name); named != nil && named != old && !goes(federationPrefix+named.TrustDomain.Name()) {
		return fail("trustDomain", "is with the trust domain %q, which cannot be changed; delete the Federation first, or give this one another name", named.TrustDomain.Name())
	}
	if old != nil && old.Document != nil && old.Document.Name != x.name && !goes(x.key()) && !o.Prune {
		return fail("trustDomain", "the relationship with %q belongs to Federation %q; delete that one, or apply with prune", f.TrustDomain.Name(), old.Document.Name)
	}
	ch := PlannedChange{Kind: KindFederation, Name: x.name, Action: Create, Federation: &f}
	check := store.Check{Key: x.key()}
	if old == nil {
		f.CreatedAt = r.c.Now().Truncate(time.Second)
	} else {
		check.Modified, f.CreatedAt = old.Revision, old.CreatedAt
		if o.PlannedAt != 0 && old.Revision > o.PlannedAt {
			return fmt.Errorf("Federation %q: %w", x.name, ErrConflict)
		}
		ch.Action, ch.Differences = old.compare(&f)
	}
	p.Changes = append(p.Changes, ch)
	if ch.Action == Unchanged {
		return nil
	}
	value, err := f.encode()
	if err != nil {
		return err
	}
	p.checks = append(p.checks, check)
	p.writes = append(p.writes, store.Write{Key: x.key(), Value: value})
	if p.federations == nil {
		p.federations = map[spiffeid.TrustDomain]*resource{}
	}
	p.federations[f.TrustDomain] = x
	if x.bundle != nil && r.takesInitial(old, &f) {
		p.writes = append(p.writes, *x.bundle)
	}
	return nil
}

// takesInitial tells whether the bundle to begin with is stored: when the relationship is made, when the operator wrote another one,
// and when none is there. It never replaces one that was fetched since. mu is held.
func (r *Registry) takesInitial(old, f *Federation) bool {
	switch {
	case old == nil, r.ix.bundles[f.TrustDomain] == nil:
		return true
	case old.Document == nil: // signet federation made it, and its bundle is the newer one
		return false
	}
	return old.Initial != f.Initial
}

// compare tells whether a document differs from the stored relationship, and how.
func (f *Federation) compare(n *Federation) (Action, []string) {
	var out []string
	diff := func(field, a, b string) {
		if a != b {
			out = append(out, fmt.Sprintf("%s: %s -> %s", field, a, b))
		}
	}
	if f.Document == nil {
		out = append(out, "takes the relationship over that 'signet federation' or a tool of SPIRE's made")
	} else {
		diff("name", f.Document.Name, n.Document.Name)
	}
	diff("bundleEndpointURL", f.URL, n.URL)
	diff("profile", string(f.Profile), string(n.Profile))
	id := func(id spiffeid.ID) string {
		if id.IsZero() {
			return "none"
		}
		return id.String()
	}
	diff("endpointSPIFFEID", id(f.EndpointID), id(n.EndpointID))
	if f.Document != nil && f.Initial != n.Initial {
		out = append(out, map[[2]bool]string{{false, true}: "bundle: one to begin with is given", {true, false}: "bundle: none to begin with any more", {true, true}: "bundle: another one to begin with"}[[2]bool{f.Initial != "", n.Initial != ""}])
	}
	if len(out) == 0 && f.Document.same(n.Document) {
		return Unchanged, nil
	}
	if len(out) == 0 {
		out = []string{"only its text or place changed"}
	}
	return Change, out
}

// checkFederations looks at the Federations of a plan as a whole. mu is held.
func (r *Registry) checkFederations(p *Plan, all []*resource) error {
	names := map[string]bool{}
	for _, x := range all {
		if x.federation == nil {
			continue
		}
		if names[x.name] {
			return fmt.Errorf("%s: there are two Federations %q", where(*x.source, "name"), x.name)
		}
		names[x.name] = true
	}
	if len(p.federations) == 0 {
		return nil
	}
	gone := map[string]bool{}
	for _, w := range p.writes {
		if w.Delete {
			gone[w.Key] = true
		}
	}
	after := federationView{own: r.c.TrustDomain,
		bundle: func(td spiffeid.TrustDomain) bool {
			x := p.federations[td]
			return x != nil && x.bundle != nil || r.ix.bundles[td] != nil && !gone[bundlePrefix+td.Name()]
		},
		federation: func(td spiffeid.TrustDomain) *Federation {
			if x := p.federations[td]; x != nil {
				return x.federation
			}
			if gone[federationPrefix+td.Name()] {
				return nil
			}
			return r.ix.federations[td]
		}}
	n := 0
	for td := range r.ix.federations {
		if p.federations[td] == nil && !gone[federationPrefix+td.Name()] {
			n++
		}
	}
	if n += len(p.federations); n > MaxFederations {
		return invalid("documents", "", "there would be %d federation relationships, at most %d are allowed", n, MaxFederations)
	}
	for _, x := range all {
		if x.federation == nil || p.federations[x.federation.TrustDomain] == nil {
			continue
		}
		if err := after.verifiable(x.federation); err != nil {
			v, _ := errors.AsType[*ValidationError](err)
			return fmt.Errorf("%s: Federation %q: endpointSPIFFEID %q %s", where(*x.source, "endpointSPIFFEID"), x.name, v.Value, v.Problem)
		}
	}
	return nil
}

// deleteFederation adds the writes that end a relationship, and with it the trust in the bundle. [FED-29]
func (p *Plan) deleteFederation(f *Federation) {
	p.checks = append(p.checks, store.Check{Key: federationPrefix + f.TrustDomain.Name(), Modified: f.Revision})
	p.writes = append(p.writes, store.Write{Key: federationPrefix + f.TrustDomain.Name(), Delete: true}, store.Write{Key: bundlePrefix + f.TrustDomain.Name(), Delete: true})
}

// owned refuses a change of a relationship that belongs to a document.
func (f *Federation) owned() error {
	if f.Document == nil {
		return nil
	}
	return invalid("trust_domain", f.TrustDomain.Name(), "belongs to Federation %q; change that document and apply it, or `signet delete federation %s`", f.Document.Name, f.Document.Name)
}
