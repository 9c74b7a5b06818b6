package awsiid

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4/json"
	"github.com/smallstep/pkcs7"

	"github.com/signet-id/signet/ca/nodeattest"
)

const (
	// maxDocumentBytes bounds the document, which has about 500 bytes, and maxSignatureBytes its signature in base64,
	// which has about 1800 and holds the document once more.
	maxDocumentBytes  = 4 << 10
	maxSignatureBytes = 12 << 10
	maxInstanceBytes  = 64
	maxValueBytes     = 256
)

// A payload is what SPIRE's agents send. Signature is one by an RSA key of 1024 bits, too short to be believed.
type payload struct {
	Document  string `json:"document"`
	Signature string `json:"signature"`
	RSA2048   string `json:"rsa2048"`
}

func malformed(format string, args ...any) error {
	return nodeattest.Refuse(nodeattest.Malformed, format, args...)
}

// parsePayload reads what the agent sends. Names are compared exactly and none may occur twice.
func parsePayload(data []byte) (*payload, error) {
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, malformed(`the payload is not a JSON object with the members "document" and "rsa2048", each once`)
	}
	switch {
	case p.Document == "":
		return nil, malformed("missing document in attestation data")
	case len(p.Document) > maxDocumentBytes:
		return nil, malformed("the document has %d bytes, at most %d are allowed", len(p.Document), maxDocumentBytes)
	case p.RSA2048 == "":
		return nil, malformed("instance identity cryptographic signature is required: rsa2048 is missing, and the signature by an RSA key of 1024 bits is not accepted")
	case len(p.RSA2048) > maxSignatureBytes:
		return nil, malformed("the signature has %d bytes, at most %d are allowed", len(p.RSA2048), maxSignatureBytes)
	}
	return &p, nil
}

// A document is an instance identity document, as far as it is used.
type document struct {
	AccountID        string    `json:"accountId"`
	Region           string    `json:"region"`
	AvailabilityZone string    `json:"availabilityZone"`
	InstanceID       string    `json:"instanceId"`
	ImageID          string    `json:"imageId"`
	PendingTime      time.Time `json:"pendingTime"`
}

// parseDocument reads a document. What it says may be believed after verify.
func parseDocument(data []byte) (*document, error) {
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, malformed("the document is not an instance identity document: a JSON object in which no member occurs twice")
	}
	switch {
	case len(d.AccountID) != accountDigits || !all(d.AccountID, isDigit):
		return nil, malformed("the document's accountId is not of %d digits", accountDigits)
	case !isName(d.Region, maxRegionBytes):
		return nil, malformed("the document's region is missing or malformed")
	case !isName(d.InstanceID, maxInstanceBytes):
		return nil, malformed("the document's instanceId is missing or malformed")
	case !isName(d.AvailabilityZone, maxValueBytes):
		return nil, malformed("the document's availabilityZone is missing or malformed")
	case !isName(d.ImageID, maxValueBytes):
		return nil, malformed("the document's imageId is missing or malformed")
	case d.PendingTime.IsZero():
		return nil, malformed("the document's pendingTime is missing")
	}
	return &d, nil
}

func (d *document) selectors() []string {
	return []string{
		"account_id:" + d.AccountID,
		"az:" + d.AvailabilityZone,
		"image:id:" + d.ImageID,
		"instance:id:" + d.InstanceID,
		"region:" + d.Region,
	}
}

// verify says whether signature, a PKCS #7 message in base64 that holds the document, was made by one of the
// certificates. Certificates in the message are of no interest: anybody could have put them there.
func verify(document []byte, signature string, certificates []*x509.Certificate, now time.Time) (err error) {
	defer func() {
		// These bytes are a stranger's and the parser is not ours: a fault in it, which the fuzz target looks for, must not
		// end the CA.
		if recover() != nil {
			err = errParser
		}
	}()
	der, err := base64.StdEncoding.DecodeString(strings.NewReplacer("\n", "", "\r", "").Replace(signature))
	if err != nil {
		return errors.New("the signature is not base64")
	}
	p7, err := pkcs7.Parse(der)
	if err != nil {
		return fmt.Errorf("the signature is not PKCS #7: %w", err)
	}
	// The content that is verified must be the document that is read: a signature of another instance goes with its own.
	if !bytes.Equal(p7.Content, document) {
		return errors.New("the document is not the one that the signature is for")
	}
	if n := len(p7.Signers); n != 1 {
		return fmt.Errorf("the signature has %d signers, not one", n)
	}
	signer := p7.Signers[0]
	if d := signer.DigestAlgorithm.Algorithm; !d.Equal(pkcs7.OIDDigestAlgorithmSHA256) && !d.Equal(pkcs7.OIDDigestAlgorithmSHA384) && !d.Equal(pkcs7.OIDDigestAlgorithmSHA512) {
		return fmt.Errorf("the digest algorithm %v is none of SHA-256, SHA-384 and SHA-512", d)
	}
	serial, issuer := signer.IssuerAndSerialNumber.SerialNumber, signer.IssuerAndSerialNumber.IssuerName.FullBytes
	for _, c := range certificates {
		if serial == nil || c.SerialNumber.Cmp(serial) != 0 || !bytes.Equal(c.RawIssuer, issuer) {
			continue
		}
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return fmt.Errorf("the certificate with serial number %v is valid from %v to %v only", c.SerialNumber, c.NotBefore, c.NotAfter)
		}
		if _, ok := c.PublicKey.(*rsa.PublicKey); !ok {
			return errors.New("the certificate has no RSA key")
		}
		p7.Certificates = []*x509.Certificate{c}
		return p7.Verify()
	}
	return fmt.Errorf("it is signed by the certificate with serial number %s, which is none of the region's", clipSerial(serial))
}

// errParser says that the library could not cope with what it was given.
var errParser = errors.New("the signature makes the PKCS #7 parser fail")

func clipSerial(n *big.Int) string {
	if n == nil || n.BitLen() > 160 {
		return "(too long)"
	}
	return n.String()
}
