package adminapi

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"

	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/ca/registry"
)

// A page token is a fingerprint of the list and filter that it continues, and the last name of the page before, so that it
// stays good however the set changes meanwhile, at any replica and after a restart. It gives nobody anything: whoever makes
// one up gets a page of what he may list anyway.
const (
	pageVersion      = 2
	fingerprintBytes = 8
	maxPageToken     = 4096
)

// A cursor is the list that tokens are for. Filter may be nil.
type cursor struct {
	list   string
	filter proto.Message
}

func (c cursor) fingerprint() []byte {
	h := sha256.New()
	h.Write([]byte(c.list + "\x00"))
	if c.filter != nil && c.filter.ProtoReflect().IsValid() {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c.filter)
		if err == nil {
			h.Write(b)
		}
	}
	return h.Sum(nil)[:fingerprintBytes]
}

// write returns the token for what comes after last.
func (c cursor) write(last string) string {
	b := append([]byte{pageVersion}, c.fingerprint()...)
	return base64.RawURLEncoding.EncodeToString(append(b, last...))
}

// read returns what the token's page comes after: nothing for the first page.
func (c cursor) read(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	bad := func(problem string) (string, error) {
		return "", &registry.ValidationError{Field: "page_token", Problem: problem}
	}
	if len(token) > maxPageToken {
		return bad("is not one that this CA handed out")
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) <= 1+fingerprintBytes || b[0] != pageVersion {
		return bad("is not one that this CA handed out")
	}
	if !bytes.Equal(b[1:1+fingerprintBytes], c.fingerprint()) {
		return bad("belongs to another list or filter; begin anew without it")
	}
	return string(b[1+fingerprintBytes:]), nil
}
