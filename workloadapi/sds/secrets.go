package sds

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-id/signet/workloadapi"
)

const (
	// secretType is the type URL of the only resources here.
	secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

	// spiffeValidator is the name by which Envoy knows its validator that holds trust domains apart.
	spiffeValidator = "envoy.tls.cert_validator.spiffe"
)

// A node is what an Envoy said about itself, as far as it matters.
type node struct {
	// spiffe says that it has the SPIFFE certificate validator and wants it.
	spiffe bool
}

// nodeOf judges by the version, as SPIRE does: Envoy has the validator since 1.18. A client that does not say its version
// gets what every client understands.
func nodeOf(n *corev3.Node) node {
	v := n.GetUserAgentBuildVersion().GetVersion()
	has := v.GetMajorNumber() > 1 || v.GetMajorNumber() == 1 && v.GetMinorNumber() >= 18
	off := n.GetMetadata().GetFields()["disable_spiffe_cert_validation"]
	return node{spiffe: has && !off.GetBoolValue() && !strings.EqualFold(off.GetStringValue(), "true")}
}

// A version tells one content of a resource from another one. It is made of public parts alone, never of a key.
type version = string

// A resource is one that the caller may have.
type resource struct {
	name    string
	version version
	secret  func() (*tlsv3.Secret, error)
}

func (r *resource) pack() (*anypb.Any, error) {
	secret, err := r.secret()
	if err != nil {
		return nil, fmt.Errorf("resource %q: %w", r.name, err)
	}
	secret.Name = r.name
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(secret)
	if err != nil {
		return nil, fmt.Errorf("resource %q: %w", r.name, err)
	}
	return &anypb.Any{TypeUrl: secretType, Value: value}, nil
}

// An offer is what one caller may have at one moment, by name.
type offer struct {
	update     *workloadapi.Update
	identities map[string]*workloadapi.Identity
	domains    map[string]spiffeid.TrustDomain
	cfg        *Config
	spiffe     bool
}

func (s *service) offer(u workloadapi.Update, n node) *offer {
	o := &offer{update: &u, cfg: &s.cfg, spiffe: n.spiffe && !s.cfg.DisableSPIFFECertValidation,
		identities: map[string]*workloadapi.Identity{}, domains: map[string]spiffeid.TrustDomain{}}
	for i := range u.Identities {
		if id := u.Identities[i].ID.String(); o.identities[id] == nil { // of two entries for one ID the first counts
			o.identities[id] = &u.Identities[i]
		}
	}
	for td := range u.TrustDomains() {
		if len(u.X509Bundles[td]) > 0 {
			o.domains[td.IDString()] = td
		}
	}
	return o
}

// names returns every resource by its own name, and none by a second one such as "default".
func (o *offer) names() []string {
	var names []string
	for id := range o.identities {
		names = append(names, id)
	}
	for td := range o.domains {
		names = append(names, td)
	}
	slices.Sort(names)
	return names
}

// find returns the resource of that name, and whether the caller has it.
func (o *offer) find(name string) (resource, bool) {
	switch name {
	case o.cfg.DefaultSVIDName:
		if len(o.update.Identities) == 0 {
			return resource{}, false
		}
		return certificate(name, &o.update.Identities[0]), true
	case o.cfg.DefaultBundleName:
		name := o.update.TrustDomain.IDString()
		return o.context(o.cfg.DefaultBundleName, o.domains[name])
	case o.cfg.DefaultAllBundlesName:
		if !o.spiffe {
			return resource{}, false // all authorities in one heap could speak for each other's trust domains
		}
		var all []spiffeid.TrustDomain
		for _, td := range o.domains {
			all = append(all, td)
		}
		return o.context(name, all...)
	}
	if i := o.identities[name]; i != nil {
		return certificate(name, i), true
	}
	if td, ok := o.domains[name]; ok {
		return o.context(name, td)
	}
	return resource{}, false
}

// certificate is an X509-SVID as Envoy's tls_certificate.
func certificate(name string, i *workloadapi.Identity) resource {
	return resource{name, digest("tls_certificate", i.Chain), func() (*tlsv3.Secret, error) {
		chain, err := certificates(i.Chain)
		if err != nil {
			return nil, fmt.Errorf("the X509-SVID of %q: %w", i.ID, err)
		}
		if len(chain) == 0 || len(i.Key) == 0 {
			return nil, fmt.Errorf("the X509-SVID or the key of %q is missing", i.ID)
		}
		key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: i.Key})
		return &tlsv3.Secret{Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(chain), PrivateKey: inline(key),
		}}}, nil
	}}
}

// context is the authorities of the trust domains as Envoy's validation_context.
func (o *offer) context(name string, tds ...spiffeid.TrustDomain) (resource, bool) {
	tds = slices.DeleteFunc(tds, func(td spiffeid.TrustDomain) bool { return len(o.update.X509Bundles[td]) == 0 })
	if len(tds) == 0 {
		return resource{}, false
	}
	slices.SortFunc(tds, spiffeid.TrustDomain.Compare)
	// Envoy's SPIFFE certificate validator reads no CRL. Our own authorities are those that speak for our trust domain
	// anyway, so that their CRLs are worth more; of others, being held apart is.
	if o.spiffe && !(len(tds) == 1 && tds[0] == o.update.TrustDomain && len(o.update.CRLs[tds[0]]) > 0) {
		return o.held(name, tds), true
	}
	return o.plain(name, tds[0]), true
}

// held lets each trust domain's authorities speak for that trust domain alone.
func (o *offer) held(name string, tds []spiffeid.TrustDomain) resource {
	parts := [][]byte{}
	for _, td := range tds {
		parts = append(parts, []byte(td.Name()), o.update.X509Bundles[td])
	}
	return resource{name, digest(spiffeValidator, parts...), func() (*tlsv3.Secret, error) {
		config := &tlsv3.SPIFFECertValidatorConfig{}
		for _, td := range tds {
			bundle, err := certificates(o.update.X509Bundles[td])
			if err != nil {
				return nil, fmt.Errorf("the X.509 bundle of %q: %w", td.Name(), err)
			}
			config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{Name: td.Name(), TrustBundle: inline(bundle)})
		}
		typed, err := anypb.New(config)
		if err != nil {
			return nil, err
		}
		return validation(&tlsv3.CertificateValidationContext{
			CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: typed},
		}), nil
	}}
}

// plain is what every Envoy understands: authorities, without a word on whom they may speak for.
func (o *offer) plain(name string, td spiffeid.TrustDomain) resource {
	crls := o.update.CRLs[td]
	return resource{name, digest("validation_context", append([][]byte{o.update.X509Bundles[td]}, crls...)...), func() (*tlsv3.Secret, error) {
		bundle, err := certificates(o.update.X509Bundles[td])
		if err != nil {
			return nil, fmt.Errorf("the X.509 bundle of %q: %w", td.Name(), err)
		}
		v := &tlsv3.CertificateValidationContext{TrustedCa: inline(bundle)}
		if len(crls) > 0 {
			var lists bytes.Buffer
			for _, crl := range crls {
				_ = pem.Encode(&lists, &pem.Block{Type: "X509 CRL", Bytes: crl}) // a buffer takes everything
			}
			v.Crl = inline(lists.Bytes())
			v.OnlyVerifyLeafCertCrl = true // an authority without a CRL must not fail every handshake
		}
		return validation(v), nil
	}}
}

func validation(v *tlsv3.CertificateValidationContext) *tlsv3.Secret {
	return &tlsv3.Secret{Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}}
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// certificates turns concatenated DER into PEM.
func certificates(der []byte) ([]byte, error) {
	certs, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a buffer takes everything
	}
	return out.Bytes(), nil
}

// digest makes the version of a resource.
func digest(kind string, parts ...[]byte) version {
	h := sha256.New()
	write := func(b []byte) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(b)))
		h.Write(n[:])
		h.Write(b)
	}
	write([]byte(kind))
	for _, p := range parts {
		write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
