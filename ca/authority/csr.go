package authority

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
)

// This file reads the CSRs that SPIRE's agents send, all of which look the same: crypto/x509 takes as long to read one as
// to make half of a signature, and most of that for what is ignored. What does not look exactly so is left to crypto/x509.

// DER that is the same in every usual CSR. [RFC 2986 §4.1]
var (
	derCSRVersion   = []byte{derInteger, 0x01, 0x00}
	derNoAttributes = []byte{derVersion, 0x00}

	// C=US, O=SPIRE
	derSPIRESubject = []byte{derSequence, 0x1d,
		0x31, 0x0b, derSequence, 0x09, 0x06, 0x03, 0x55, 0x04, 0x06, 0x13, 0x02, 'U', 'S',
		0x31, 0x0e, derSequence, 0x0c, 0x06, 0x03, 0x55, 0x04, 0x0a, 0x13, 0x05, 'S', 'P', 'I', 'R', 'E'}

	// extensionRequest. [RFC 2985 §5.4.2]
	derExtensionRequest = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e}
	derSANOID           = []byte{0x06, 0x03, 0x55, 0x1d, 0x11}
)

const (
	derSet     = 0x31
	pointBytes = 65 // of P-256, not compressed
)

// A usualCSR is what counts of a CSR with a P-256 key, whose signature is yet to be verified.
type usualCSR struct {
	key            *ecdsa.PublicKey
	tbs, signature []byte
}

// readUsualCSR reads a CSR with a P-256 key, signed by ECDSA with SHA-256, for no subject or SPIRE's, that asks for
// nothing, or for the URI SAN id alone. It is false for any other: those may be good, too.
func readUsualCSR(der []byte, id string) (r usualCSR, ok bool) {
	body, rest, ok := readTLV(der, derSequence)
	if !ok || len(rest) > 0 {
		return r, false
	}
	info, rest, ok := readTLV(body, derSequence)
	if !ok {
		return r, false
	}
	r.tbs = body[:len(body)-len(rest)]
	if rest, ok = bytes.CutPrefix(rest, derECDSAWithSHA256); !ok {
		return r, false
	}
	bits, rest, ok := readTLV(rest, derBitString)
	if !ok || len(rest) > 0 || len(bits) < 2 || bits[0] != 0 {
		return r, false
	}
	r.signature = bits[1:]

	if info, ok = bytes.CutPrefix(info, derCSRVersion); !ok {
		return r, false
	}
	if info, ok = cutEither(info, derSPIRESubject, derEmptySubject); !ok {
		return r, false
	}
	if info, ok = bytes.CutPrefix(info, spkiP256); !ok || len(info) < pointBytes {
		return r, false
	}
	if attributes := info[pointBytes:]; !bytes.Equal(attributes, derNoAttributes) && !bytes.Equal(attributes, encodeCSRAttributes(id)) {
		return r, false
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), info[:pointBytes])
	if err != nil {
		return r, false
	}
	r.key = key
	return r, true
}

// verifies tells whether the CSR is signed with its own key.
func (r usualCSR) verifies() bool {
	digest := sha256.Sum256(r.tbs)
	return ecdsa.VerifyASN1(r.key, digest[:], r.signature)
}

// encodeCSRAttributes returns the attributes of a CSR that asks for the URI SAN id and nothing else.
func encodeCSRAttributes(id string) []byte {
	b := appendTLV(nil, derContext|tagURI, []byte(id))
	b = appendTLV(nil, derSequence, b)                                              // GeneralNames
	b = appendTLV(nil, derOctetString, b)                                           //
	b = appendTLV(nil, derSequence, append(bytes.Clone(derSANOID), b...))           // Extension
	b = appendTLV(nil, derSequence, b)                                              // Extensions
	b = appendTLV(nil, derSet, b)                                                   // values of the attribute
	b = appendTLV(nil, derSequence, append(bytes.Clone(derExtensionRequest), b...)) // Attribute
	return appendTLV(nil, derVersion, b)
}

func cutEither(b, one, other []byte) ([]byte, bool) {
	if rest, ok := bytes.CutPrefix(b, one); ok {
		return rest, true
	}
	return bytes.CutPrefix(b, other)
}

// readTLV reads one DER value with the tag, of up to 65,535 bytes, and returns its content and what is behind it.
func readTLV(b []byte, tag byte) (content, rest []byte, ok bool) {
	if len(b) < 2 || b[0] != tag {
		return nil, nil, false
	}
	n, head := int(b[1]), 2
	switch {
	case n < 0x80:
	case n == 0x81 && len(b) >= 3 && b[2] >= 0x80: // DER has one length for each size
		n, head = int(b[2]), 3
	case n == 0x82 && len(b) >= 4 && b[2] > 0:
		n, head = int(b[2])<<8|int(b[3]), 4
	default:
		return nil, nil, false
	}
	if len(b)-head < n {
		return nil, nil, false
	}
	return b[head : head+n], b[head+n:], true
}
