package svidfiles

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// A Layout says what the files are called. The zero value is svid.pem, key.pem and bundle.pem, and no combined file.
type Layout struct {
	// SVID is the certificate chain, Key its private key, Bundle the authorities of the own trust domain.
	SVID, Key, Bundle string

	// Combined, if not empty, is chain and key in one file, for programs that want them so.
	Combined string

	// Tokens has a name for the JWT-SVID of each audience.
	Tokens map[string]string
}

func (l *Layout) defaults() {
	for _, f := range []struct {
		name  *string
		usual string
	}{{&l.SVID, "svid.pem"}, {&l.Key, "key.pem"}, {&l.Bundle, "bundle.pem"}} {
		if *f.name == "" {
			*f.name = f.usual
		}
	}
}

// TokenName is a name for the token of an audience, with only letters, digits, dot, dash and underscore of it.
func TokenName(audience string) string {
	const longest = 150
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '_'
	}, audience)
	return strings.TrimLeft(name[:min(len(name), longest)], ".") + ".jwt"
}

// Files are the files of a state. The first X509-SVID has the names of the layout; further ones have their number before
// it. Bundles of foreign trust domains are federated.TRUST-DOMAIN.pem.
func (l Layout) Files(x *workloadapi.X509Context, tokens map[string]*jwtsvid.SVID) ([]File, error) {
	l.defaults()
	var files []File
	if x != nil {
		for i, s := range x.SVIDs {
			bundle, err := x.Bundles.GetX509BundleForTrustDomain(s.ID.TrustDomain())
			if err != nil {
				return nil, fmt.Errorf("the X509-SVID %s: %w", s.ID, err)
			}
			der, err := x509.MarshalPKCS8PrivateKey(s.PrivateKey)
			if err != nil {
				return nil, fmt.Errorf("the key of %s: %w", s.ID, err)
			}
			prefix := ""
			if i > 0 {
				prefix = fmt.Sprintf("%d.", i)
			}
			chain, key := certificates(s.Certificates), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
			files = append(files, File{Name: prefix + l.SVID, Data: chain}, File{Name: prefix + l.Key, Data: key, Secret: true},
				File{Name: prefix + l.Bundle, Data: certificates(bundle.X509Authorities())})
			if l.Combined != "" {
				files = append(files, File{Name: prefix + l.Combined, Data: bytes.Join([][]byte{chain, key}, nil), Secret: true})
			}
		}
		own := x.DefaultSVID().ID.TrustDomain()
		for _, b := range x.Bundles.Bundles() {
			if b.TrustDomain() != own {
				files = append(files, File{Name: foreign(b.TrustDomain()), Data: certificates(b.X509Authorities())})
			}
		}
	}
	for audience, name := range l.Tokens {
		if t := tokens[audience]; t != nil {
			files = append(files, File{Name: name, Data: []byte(t.Marshal() + "\n"), Secret: true})
		}
	}
	return files, nil
}

// Names are the names of the files of the i-th X509-SVID; the first has the foreign bundles.
func (l Layout) Names(x *workloadapi.X509Context, i int) []string {
	l.defaults()
	prefix := ""
	if i > 0 {
		prefix = fmt.Sprintf("%d.", i)
	}
	names := []string{prefix + l.SVID, prefix + l.Bundle, prefix + l.Key}
	if l.Combined != "" {
		names = append(names, prefix+l.Combined)
	}
	for _, b := range x.Bundles.Bundles() {
		if i == 0 && b.TrustDomain() != x.DefaultSVID().ID.TrustDomain() {
			names = append(names, foreign(b.TrustDomain()))
		}
	}
	return names
}

// Check refuses names that cannot be.
func (l Layout) Check() error {
	l.defaults()
	names := []string{l.SVID, l.Key, l.Bundle}
	if l.Combined != "" {
		names = append(names, l.Combined)
	}
	for _, name := range l.Tokens {
		names = append(names, name)
	}
	for i, name := range names {
		if err := CheckName(name); err != nil {
			return err
		}
		if slices.Contains(names[:i], name) {
			return fmt.Errorf("two files would have the name %q", name)
		}
	}
	return nil
}

func foreign(td spiffeid.TrustDomain) string { return "federated." + td.Name() + ".pem" }

func certificates(certs []*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a buffer takes everything
	}
	return out.Bytes()
}
