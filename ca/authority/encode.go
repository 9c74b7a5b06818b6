package authority

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"time"

	"github.com/signet-id/signet/ca/keys"
)

// This file encodes the certificate of an X509-SVID. crypto/x509 could do it, but its CreateCertificate verifies each
// signature that it has just made, which costs twice as much as the signature and cannot be turned off. What is encoded
// here is, byte for byte, what CreateCertificate would sign; the tests compare the two.

// DER tags.
const (
	tagDNS = 2 // of GeneralName, context-specific
	tagURI = 6

	derBoolean     = 0x01
	derInteger     = 0x02
	derBitString   = 0x03
	derOctetString = 0x04
	derSequence    = 0x30
	derUTCTime     = 0x17
	derGeneralTime = 0x18
	derVersion     = 0xa0
	derExtensions  = 0xa3
	derContext     = 0x80
)

// serialBytes is the length of every serial number, the longest there can be: X509-SVIDs of an agent begin with a prefix of
// their own, and all the rest is random. [RFC 5280 §4.1.2.2, docs/decisions/0026]
const serialBytes = 20

const (
	// MaxSerialPrefix leaves 88 random bits.
	MaxSerialPrefix = 9
	// untaggedSerial begins serial numbers without a prefix; like every first byte it keeps the number positive and its length
	// fixed.
	untaggedSerial = 0x02
)

// DER that is the same in every X509-SVID.
var (
	derECDSAWithSHA256 = []byte{derSequence, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}

	derV3           = []byte{derVersion, 0x03, derInteger, 0x01, 0x02}
	derEmptySubject = []byte{derSequence, 0x00}

	// Key usage: critical, digitalSignature and nothing else. [X509-08, X509-09]
	derKeyUsage = []byte{derSequence, 0x0e, 0x06, 0x03, 0x55, 0x1d, 0x0f, derBoolean, 0x01, 0xff, derOctetString, 0x04, derBitString, 0x02, 0x07, 0x80}

	// Extended key usage: serverAuth and clientAuth, always both. [X509-11, X509-12]
	derExtendedKeyUsage = []byte{derSequence, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x25, derOctetString, 0x16, derSequence, 0x14,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02}

	// Basic constraints: critical, cA false. [X509-05]
	derBasicConstraints = []byte{derSequence, 0x0c, 0x06, 0x03, 0x55, 0x1d, 0x13, derBoolean, 0x01, 0xff, derOctetString, 0x02, derSequence, 0x00}

	derSubjectKeyID    = []byte{derSequence, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x0e, derOctetString, 0x16, derOctetString, 0x14}
	derAuthorityKeyOID = []byte{0x06, 0x03, 0x55, 0x1d, 0x23}

	// The subject alternative name is critical, because the subject is empty. [X509-04]
	derSANHead = []byte{0x06, 0x03, 0x55, 0x1d, 0x11, derBoolean, 0x01, 0xff}
)

// A leafTemplate holds what all X509-SVIDs of one authority have in common, encoded once.
type leafTemplate struct {
	afterSerial     []byte // signature algorithm and issuer
	fixedExtensions []byte // key usage, extended key usage, basic constraints
	authorityKeyID  []byte // the extension
}

// newLeafTemplate returns nil for an authority whose key is not P-256: its SVIDs are encoded by crypto/x509.
func newLeafTemplate(cert *x509.Certificate, key *keys.Key) (*leafTemplate, error) {
	if public, ok := key.Public().(*ecdsa.PublicKey); !ok || public.Curve != elliptic.P256() {
		return nil, nil
	}
	t := &leafTemplate{}
	t.afterSerial = append(t.afterSerial, derECDSAWithSHA256...)
	t.afterSerial = append(t.afterSerial, cert.RawSubject...)
	t.fixedExtensions = append(t.fixedExtensions, derKeyUsage...)
	t.fixedExtensions = append(t.fixedExtensions, derExtendedKeyUsage...)
	t.fixedExtensions = append(t.fixedExtensions, derBasicConstraints...)
	keyID := appendTLV(nil, derContext, cert.SubjectKeyId)
	keyID = appendTLV(nil, derSequence, keyID)
	keyID = appendTLV(nil, derOctetString, keyID)
	t.authorityKeyID = appendTLV(nil, derSequence, append(append([]byte(nil), derAuthorityKeyOID...), keyID...))
	return t, nil
}

// appendTBS appends the to-be-signed part of the certificate of p.
func (t *leafTemplate) appendTBS(b []byte, p *PreparedX509, serial [serialBytes]byte, notBefore, notAfter time.Time) []byte {
	validity := timeSize(notBefore) + timeSize(notAfter)
	extensions := len(t.fixedExtensions) + len(derSubjectKeyID) + len(p.ski) + len(t.authorityKeyID) + len(p.san)
	content := len(derV3) + tlvSize(serialBytes) + len(t.afterSerial) + tlvSize(validity) + len(derEmptySubject) + len(p.spki) +
		tlvSize(tlvSize(extensions))

	b = appendHeader(b, derSequence, content)
	b = append(b, derV3...)
	b = appendTLV(b, derInteger, serial[:])
	b = append(b, t.afterSerial...)
	b = appendHeader(b, derSequence, validity)
	b = appendTime(b, notBefore)
	b = appendTime(b, notAfter)
	b = append(b, derEmptySubject...)
	b = append(b, p.spki...)
	b = appendHeader(b, derExtensions, tlvSize(extensions))
	b = appendHeader(b, derSequence, extensions)
	b = append(b, t.fixedExtensions...)
	b = append(b, derSubjectKeyID...)
	b = append(b, p.ski[:]...)
	b = append(b, t.authorityKeyID...)
	return append(b, p.san...)
}

// appendCertificate appends the certificate made of a to-be-signed part and its signature.
func appendCertificate(b, tbs, signature []byte) []byte {
	b = appendHeader(b, derSequence, len(tbs)+len(derECDSAWithSHA256)+tlvSize(1+len(signature)))
	b = append(b, tbs...)
	b = append(b, derECDSAWithSHA256...)
	b = appendHeader(b, derBitString, 1+len(signature))
	b = append(b, 0) // unused bits
	return append(b, signature...)
}

// encodeSAN returns the subject alternative name extension: the DNS names and then exactly one URI, the ID. [X509-01, X509-02]
func encodeSAN(id string, dnsNames []string) []byte {
	names := tlvSize(len(id))
	for _, name := range dnsNames {
		names += tlvSize(len(name))
	}
	content := len(derSANHead) + tlvSize(tlvSize(names))
	b := appendHeader(make([]byte, 0, tlvSize(content)), derSequence, content)
	b = append(b, derSANHead...)
	b = appendHeader(b, derOctetString, tlvSize(names))
	b = appendHeader(b, derSequence, names)
	for _, name := range dnsNames {
		b = append(appendHeader(b, derContext|tagDNS, len(name)), name...)
	}
	return append(appendHeader(b, derContext|tagURI, len(id)), id...)
}

// newSerial returns a new random serial number.
func newSerial() (serial [serialBytes]byte) { return serialAfter([]byte{untaggedSerial}) }

// serialAfter returns a new serial number that begins with prefix, and is random behind it.
func serialAfter(prefix []byte) (serial [serialBytes]byte) {
	n := copy(serial[:], prefix)
	rand.Read(serial[n:])
	return serial
}

// checkSerialPrefix refuses what would make a serial number negative, shorter, or too easy to guess, or one that could be
// another's without a prefix. Nil is none.
func checkSerialPrefix(prefix []byte) error {
	if prefix == nil {
		return nil
	}
	if n := len(prefix); n == 0 || n > MaxSerialPrefix || prefix[0] == 0 || prefix[0] >= 0x80 || prefix[0] == untaggedSerial {
		return fmt.Errorf("serial prefix %x must have 1 to %d bytes, the first of them positive and not %d", prefix, MaxSerialPrefix, untaggedSerial)
	}
	return nil
}

func serialNumber(serial [serialBytes]byte) *big.Int { return new(big.Int).SetBytes(serial[:]) }

// tlvSize returns the size of a value of n bytes with its tag and length.
func tlvSize(n int) int {
	switch {
	case n < 0x80:
		return 2 + n
	case n < 0x100:
		return 3 + n
	case n < 0x10000:
		return 4 + n
	default:
		return 5 + n // up to 16 MiB, far more than the limits of PreparedX509 let through
	}
}

func appendHeader(b []byte, tag byte, n int) []byte {
	switch {
	case n < 0x80:
		return append(b, tag, byte(n))
	case n < 0x100:
		return append(b, tag, 0x81, byte(n))
	case n < 0x10000:
		return append(b, tag, 0x82, byte(n>>8), byte(n))
	default:
		return append(b, tag, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
}

func appendTLV(b []byte, tag byte, content []byte) []byte {
	return append(appendHeader(b, tag, len(content)), content...)
}

// Times through 2049 are UTCTime, later ones GeneralizedTime. [RFC 5280 §4.1.2.5]
func isUTCTime(t time.Time) bool { return t.UTC().Year() < 2050 }

func timeSize(t time.Time) int {
	if isUTCTime(t) {
		return tlvSize(len("060102150405Z"))
	}
	return tlvSize(len("20060102150405Z"))
}

func appendTime(b []byte, t time.Time) []byte {
	t = t.UTC()
	if isUTCTime(t) {
		return t.AppendFormat(append(b, derUTCTime, 13), "060102150405Z")
	}
	return t.AppendFormat(append(b, derGeneralTime, 15), "20060102150405Z")
}
