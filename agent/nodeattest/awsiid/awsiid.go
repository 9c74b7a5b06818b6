// Package awsiid is the evidence of an instance of AWS EC2: its instance identity document with AWS's signatures, from
// the instance metadata service version 2. It is the agent's side of SPIRE's aws_iid.
package awsiid

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/agent/nodeattest/metadata"
)

const (
	// Type is SPIRE's name of this node attestor.
	Type = "aws_iid"
	// DefaultEndpoint is where instances find their metadata service.
	DefaultEndpoint = "http://169.254.169.254"

	tokenSeconds  = "60" // long enough for the three requests of one attestation
	maxTokenBytes = 1024
)

// Config says how the evidence is had.
type Config struct {
	// MetadataEndpoint is the metadata service's address. Default http://169.254.169.254.
	MetadataEndpoint string
}

// Check tells each mistake by its field.
func (c Config) Check(bad func(field, format string, args ...any)) {
	if c.MetadataEndpoint != "" {
		if err := metadata.CheckEndpoint(c.MetadataEndpoint); err != nil {
			bad("metadata_endpoint", "%v", err)
		}
	}
}

// An Attestor shows the document of this instance, fetched whenever the agent attests.
type Attestor struct{ config Config }

// New returns the attestor of a configuration that Check accepts.
func New(c Config) Attestor {
	if c.MetadataEndpoint == "" {
		c.MetadataEndpoint = DefaultEndpoint
	}
	return Attestor{c}
}

// Type is SPIRE's name of this node attestor.
func (Attestor) Type() string { return Type }

// A payload is what SPIRE's servers expect. The signature by a key of 1024 bits is for old ones; ours does not believe it.
type payload struct {
	Document  string `json:"document"`
	Signature string `json:"signature"`
	RSA2048   string `json:"rsa2048"`
}

// Begin fetches the document and its signatures.
func (a Attestor) Begin(ctx context.Context) (nodeattest.Evidence, error) {
	service := metadata.Open(a.config.MetadataEndpoint)
	defer service.Close()
	p, err := fetch(ctx, service)
	if err != nil {
		return nil, fmt.Errorf("aws_iid: fetching the instance identity document from %s: %w", a.config.MetadataEndpoint, err)
	}
	shown, err := p.encode()
	if err != nil {
		return nil, fmt.Errorf("aws_iid: %w", err)
	}
	return nodeattest.Shown{Attestor: Type, Bytes: shown}, nil
}

// fetch asks with a session token always: version 1 of the service, which asks for none, answers whoever can make a
// program on the instance send a GET.
func fetch(ctx context.Context, service *metadata.Service) (*payload, error) {
	_, token, err := service.Ask(ctx, metadata.Request{
		Method: http.MethodPut, Path: "/latest/api/token",
		Header: map[string]string{"X-aws-ec2-metadata-token-ttl-seconds": tokenSeconds},
	})
	if err != nil {
		return nil, fmt.Errorf("%w (in a container, the instance's metadata hop limit must be 2 or more)", err)
	}
	if !isHeaderText(string(token)) {
		return nil, errors.New("the metadata service's session token is empty, longer than expected or has characters that cannot be sent")
	}
	get := func(name string) (string, error) {
		_, body, err := service.Ask(ctx, metadata.Request{
			Method: http.MethodGet, Path: "/latest/dynamic/instance-identity/" + name,
			Header: map[string]string{"X-aws-ec2-metadata-token": string(token)},
		})
		return string(body), err
	}
	var p payload
	for _, part := range []struct {
		name string
		into *string
	}{{"document", &p.Document}, {"signature", &p.Signature}, {"rsa2048", &p.RSA2048}} {
		if *part.into, err = get(part.name); err != nil {
			return nil, err
		}
	}
	return &p, nil
}

func isHeaderText(s string) bool {
	return s != "" && len(s) <= maxTokenBytes && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// encode writes the payload so that the document arrives byte for byte: AWS has signed its bytes.
func (p *payload) encode() ([]byte, error) {
	switch {
	case p.Document == "" || p.RSA2048 == "":
		return nil, errors.New("the metadata service's document or its rsa2048 signature is empty")
	case !utf8.ValidString(p.Document) || !utf8.ValidString(p.RSA2048) || !utf8.ValidString(p.Signature):
		return nil, errors.New("the metadata service's document or signature is not UTF-8")
	}
	return json.Marshal(p)
}
