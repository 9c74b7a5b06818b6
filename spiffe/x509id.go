package spiffe

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// tagURI is the tag of uniformResourceIdentifier in a GeneralName. [RFC 5280 §4.2.1.6]
const tagURI = 6

// IDFromCertificate returns the SPIFFE ID of a certificate: its one URI SAN. The path may be absent, as it is for an
// authority; [CheckX509SVIDLeaf] asks for it.
//
// The ID is judged on the bytes of the SAN extension. A url.URL, as in cert.URIs, has lost an empty query or fragment and
// the case of the scheme, so that two verifiers could see two IDs in one certificate. The error is a [RowError].
// [X509-SVID §2]
func IDFromCertificate(cert *x509.Certificate) (spiffeid.ID, error) {
	if cert == nil {
		return spiffeid.ID{}, broken("X509-43", "certificate is nil")
	}
	uris, err := uriSANs(cert)
	if err != nil {
		return spiffeid.ID{}, &RowError{Row: "X509-40", Err: err}
	}
	switch len(uris) {
	case 1:
	case 0:
		return spiffeid.ID{}, broken("X509-43", "certificate has no URI SAN, so it is no X509-SVID")
	default:
		return spiffeid.ID{}, broken("X509-42", "certificate has %d URI SANs, %q and %q among them, an X509-SVID has exactly one", len(uris), excerpt(uris[0]), excerpt(uris[1]))
	}
	id, err := ParseID(uris[0])
	switch {
	case err == nil:
		return id, nil
	case RowOf(err) == "ID-01":
		return spiffeid.ID{}, &RowError{Row: "X509-46", Err: err}
	default:
		return spiffeid.ID{}, &RowError{Row: "X509-49", Err: err}
	}
}

// uriSANs returns the URIs of all SAN extensions of a certificate, as bytes.
func uriSANs(cert *x509.Certificate) ([]string, error) {
	var uris []string
	for _, extension := range cert.Extensions {
		if !extension.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names asn1.RawValue
		rest, err := asn1.Unmarshal(extension.Value, &names)
		if err != nil || len(rest) > 0 || names.Class != asn1.ClassUniversal || names.Tag != asn1.TagSequence || !names.IsCompound {
			return nil, errors.New("certificate has a SAN extension that is no sequence of names")
		}
		for rest = names.Bytes; len(rest) > 0; {
			var name asn1.RawValue
			if rest, err = asn1.Unmarshal(rest, &name); err != nil || name.Class == asn1.ClassContextSpecific && name.Tag == tagURI && name.IsCompound {
				return nil, errors.New("certificate has a malformed name in its SAN extension")
			}
			if name.Class == asn1.ClassContextSpecific && name.Tag == tagURI {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	return uris, nil
}
