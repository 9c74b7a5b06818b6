package registry

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/template"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

// Kinds of documents that operators apply. [DESIGN §8]
const (
	KindIdentity       = "Identity"
	KindCallPolicy     = "CallPolicy"
	KindPolicyDefaults = "PolicyDefaults"
	KindRevocation     = "Revocation"
)

// kinds are those, for messages.
var kinds = strings.Join([]string{KindIdentity, KindCallPolicy, KindPolicyDefaults, KindRevocation, KindUserIssuer, KindFederation}, ", ")

// MaxDocuments bounds one apply: it is one commit.
const MaxDocuments = store.MaxWrites

// identityDocument is the YAML form of an Identity. [DESIGN §8]
type identityDocument struct {
	Kind          string        `yaml:"kind" enum:"Identity" required:"true" desc:"Identity"`
	Name          string        `yaml:"name" required:"true" desc:"Name of the document, unique among Identities."`
	SPIFFEID      string        `yaml:"spiffeID" required:"true" desc:"The SPIFFE ID, or its path, such as /web. With variables of pods, such as /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}, it is a template that stands for the IDs of many pods."`
	Match         []string      `yaml:"match" empty:"ok" desc:"Selectors that a process must have, all of them, such as unix:uid:1000. Needed unless spiffeID is a template."`
	On            []string      `yaml:"on" empty:"ok" desc:"Selectors that a node must have, all of them. Absent: any attested node."`
	X509TTL       time.Duration `yaml:"x509TTL" desc:"Validity of X509-SVIDs, such as 1h. Absent: the CA's default."`
	JWTTTL        time.Duration `yaml:"jwtTTL" desc:"Validity of JWT-SVIDs, such as 5m. Absent: the CA's default."`
	DNSNames      []string      `yaml:"dnsNames" empty:"ok" desc:"DNS names in X509-SVIDs. They may hold variables of pods where spiffeID does."`
	FederatesWith []string      `yaml:"federatesWith" empty:"ok" desc:"Names of the foreign trust domains whose bundles the workload gets."`
	Hint          string        `yaml:"hint" desc:"Tells several identities of one workload apart."`
	Admin         bool          `yaml:"admin" desc:"The holder is an admin of the CA. Never in a template."`
	JWTIncludeJTI bool          `yaml:"jwtIncludeJTI" desc:"JWT-SVIDs have an ID of their own, by which one can be revoked."`
	Canary        bool          `yaml:"canary" desc:"Nobody should ever hold it: who asks for it raises an alarm. Never in a template."`
	ExpiresAt     string        `yaml:"expiresAt" desc:"When the identity ends, such as 2027-01-31T00:00:00Z. Absent: never."`
}

// A resource is one parsed document: what it makes in the store.
type resource struct {
	kind, name string
	doc        Document
	source     *strictyaml.Document // as it was parsed
	entry      *Entry               // Identity
	compiled   *policyv1.Policy     // CallPolicy
	mode       policyv1.DefaultsMode
	revocation *policy.RevocationDocument
	revoked    *Revocation          // what it is compiled into, once it is planned
	issuer     *policyv1.UserIssuer // UserIssuer
	jwksURL    string
	federation *Federation  // Federation
	bundle     *store.Write // of the one that it gives to begin with
}

func (x *resource) key() string {
	switch x.kind {
	case KindIdentity:
		return entryPrefix + identityPrefix + x.name
	case KindCallPolicy:
		return policyPrefix + x.name
	case KindRevocation:
		return revocationPrefix + x.name
	case KindUserIssuer:
		return userIssuerPrefix + x.name
	case KindFederation:
		return federationPrefix + x.federation.TrustDomain.Name()
	}
	return defaultsKey
}

// ParseIdentity reads an Identity document into the registration entry that it stands for. One with a template stands for
// those of many pods, which have in common what the Entry says.
func ParseIdentity(doc strictyaml.Document, td spiffeid.TrustDomain) (*Entry, error) {
	var in identityDocument
	if err := strictyaml.Decode(doc, &in); err != nil {
		return nil, err
	}
	fail := func(field, format string, args ...any) error {
		return fmt.Errorf("%s: %s: %s", where(doc, field), field, fmt.Sprintf(format, args...))
	}
	if err := CheckName(in.Name); err != nil {
		return nil, fail("name", "%v", err)
	}
	e := &Entry{ID: EntryID(identityPrefix + in.Name), OnNodes: true, X509TTL: in.X509TTL, JWTTTL: in.JWTTTL,
		DNSNames: in.DNSNames, Hint: in.Hint, Admin: in.Admin, JWTIncludeJTI: in.JWTIncludeJTI,
		Canary: in.Canary, NoX509Prefetch: in.Canary} // an agent that fetched it ahead would raise the alarm
	full := in.SPIFFEID
	if strings.HasPrefix(full, "/") {
		full = td.IDString() + full
	}
	var err error
	if e.Selectors, err = parseSelectors(in.Match); err != nil {
		return nil, fail("match", "%v", err)
	}
	e.Selectors = sortedSelectors(e.Selectors)
	if template.Is(in.SPIFFEID) || slices.ContainsFunc(in.DNSNames, template.Is) {
		if err := parseTemplate(doc, &in, e, td); err != nil {
			return nil, err
		}
	} else if e.SPIFFEID, err = spiffe.ParseWorkloadID(full); err != nil {
		return nil, fail("spiffeID", "%v", err)
	}
	if e.On, err = parseSelectors(in.On); err != nil {
		return nil, fail("on", "%v", err)
	}
	for _, n := range in.FederatesWith {
		f, err := spiffe.ParseTrustDomain(n)
		if err != nil {
			return nil, fail("federatesWith", "%v", err)
		}
		e.FederatesWith = append(e.FederatesWith, f)
	}
	if in.ExpiresAt != "" {
		if e.ExpiresAt, err = time.Parse(time.RFC3339, in.ExpiresAt); err != nil {
			return nil, fail("expiresAt", "%q is not a time such as 2027-01-31T00:00:00Z", clip(in.ExpiresAt))
		}
	}
	e.Identity = &Document{Name: in.Name, Content: doc.Content, File: doc.File, Line: doc.Line}
	e.normalise()
	if err := e.validate(td); err != nil {
		v, ok := errors.AsType[*ValidationError](err)
		if !ok {
			return nil, err
		}
		field := map[string]string{"spiffe_id": "spiffeID", "selectors": "match", "x509_svid_ttl": "x509TTL", "jwt_svid_ttl": "jwtTTL",
			"dns_names": "dnsNames", "federates_with": "federatesWith"}[v.Field]
		if field == "" {
			field = v.Field
		}
		return nil, fmt.Errorf("%s: %w", where(doc, field), &ValidationError{field, v.Value, v.Problem})
	}
	return e, nil
}

// where returns file:line:column of a field of a document, or of the document.
func where(doc strictyaml.Document, field string) string {
	line, col := doc.Line, 1
	if m := mapping(doc.Node); m != nil {
		for i := 0; i+1 < len(m.Content); i += 2 {
			if m.Content[i].Value == field {
				line, col = m.Content[i].Line, m.Content[i].Column
			}
		}
	}
	return fmt.Sprintf("%s:%d:%d", doc.File, line, col)
}

func mapping(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.DocumentNode && len(n.Content) == 1 {
		n = n.Content[0]
	}
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	return n
}

// KindOf returns the kind that a document names, or an error with its place.
func KindOf(doc strictyaml.Document) (string, error) {
	if m := mapping(doc.Node); m != nil {
		for i := 0; i+1 < len(m.Content); i += 2 {
			if m.Content[i].Value == "kind" {
				return m.Content[i+1].Value, nil
			}
		}
	}
	return "", fmt.Errorf("%s:%d: kind is missing; it is one of %s", doc.File, doc.Line, kinds)
}

const maxNameBytes = 200

// CheckName refuses what is no name of a resource or node group: 1 to 200 characters of A-Z a-z 0-9 . - _
func CheckName(n string) error {
	if n == "" || len(n) > maxNameBytes {
		return fmt.Errorf("must have 1 to %d characters", maxNameBytes)
	}
	for _, c := range []byte(n) {
		if !isNameByte(c) {
			return fmt.Errorf("%q may hold A-Z a-z 0-9 . - _ only", clip(n))
		}
	}
	return nil
}

// parseResource reads any document.
func (r *Registry) parseResource(doc strictyaml.Document) (*resource, error) {
	if err := CheckForm(doc); err != nil {
		return nil, err
	}
	kind, err := KindOf(doc)
	if err != nil {
		return nil, err
	}
	x := &resource{kind: kind, doc: Document{Content: doc.Content, File: doc.File, Line: doc.Line}, source: &doc}
	switch kind {
	case KindIdentity:
		if x.entry, err = ParseIdentity(doc, r.c.TrustDomain); err != nil {
			return nil, err
		}
		if r.c.CheckTTL != nil {
			if err := r.c.CheckTTL(x.entry.X509TTL, x.entry.JWTTTL); err != nil {
				return nil, fmt.Errorf("%s: %w", where(doc, "x509TTL"), err)
			}
		}
		x.name = x.entry.Identity.Name
	case KindCallPolicy:
		if x.compiled, err = policy.ParsePolicy(doc, r.c.TrustDomain); err != nil {
			return nil, err
		}
		x.name = x.compiled.Name
		if err := CheckName(x.name); err != nil {
			return nil, fmt.Errorf("%s: name: %w", where(doc, "name"), err)
		}
	case KindPolicyDefaults:
		if x.mode, x.name, err = policy.ParseDefaults(doc); err != nil {
			return nil, err
		}
	case KindRevocation:
		if x.revocation, err = policy.ParseRevocation(doc, r.c.TrustDomain); err != nil {
			return nil, err
		}
		x.name = x.revocation.Name
		if err := CheckName(x.name); err != nil {
			return nil, fmt.Errorf("%s: name: %w", where(doc, "name"), err)
		}
	case KindUserIssuer:
		if x.issuer, x.jwksURL, err = policy.ParseUserIssuer(doc); err != nil {
			return nil, err
		}
		x.name = x.issuer.Name
		if err := CheckName(x.name); err != nil {
			return nil, fmt.Errorf("%s: name: %w", where(doc, "name"), err)
		}
	case KindFederation:
		var bundle []byte
		if x.federation, bundle, err = ParseFederation(doc, r.c.TrustDomain); err != nil {
			return nil, err
		}
		if bundle != nil {
			w, err := r.bundleWrite(x.federation.TrustDomain, bundle)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", where(doc, "bundle"), err)
			}
			x.bundle = &w
		}
		x.name = x.federation.Document.Name
	default:
		return nil, fmt.Errorf("%s: kind %q is not one of %s", where(doc, "kind"), clip(kind), kinds)
	}
	x.doc.Name = x.name
	return x, nil
}
