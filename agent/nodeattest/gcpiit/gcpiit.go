// Package gcpiit is the evidence of an instance of Google Compute Engine: an identity token from its metadata server. It
// is the agent's side of SPIRE's gcp_iit.
package gcpiit

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/agent/nodeattest/metadata"
)

const (
	// Type is SPIRE's name of this node attestor.
	Type = "gcp_iit"
	// DefaultEndpoint is where instances find their metadata server.
	DefaultEndpoint = "http://metadata.google.internal"
	// DefaultAudience is the audience that SPIRE's servers expect.
	DefaultAudience = "spire-gcp-node-attestor"
	// DefaultServiceAccount is the one that the instance runs as.
	DefaultServiceAccount = "default"

	maxTokenBytes = 16 << 10
	maxFieldBytes = 512
)

// Config says how the evidence is had.
type Config struct {
	// MetadataEndpoint is the metadata server's address. Default http://metadata.google.internal.
	MetadataEndpoint string
	// ServiceAccount is the instance's service account that the token is for. Default: the instance's default one.
	ServiceAccount string
	// Audience is the audience that the CA expects. Default spire-gcp-node-attestor.
	Audience string
}

// Check tells each mistake by its field.
func (c Config) Check(bad func(field, format string, args ...any)) {
	if c.MetadataEndpoint != "" {
		if err := metadata.CheckEndpoint(c.MetadataEndpoint); err != nil {
			bad("metadata_endpoint", "%v", err)
		}
	}
	if len(c.ServiceAccount) > maxFieldBytes || strings.ContainsAny(c.ServiceAccount, "/?#% ") {
		bad("service_account", "%q is neither default nor the e-mail address of a service account", c.ServiceAccount)
	}
	if len(c.Audience) > maxFieldBytes {
		bad("audience", "has %d bytes, at most %d are allowed", len(c.Audience), maxFieldBytes)
	}
}

// An Attestor shows an identity token of this instance, asked for whenever the agent attests.
type Attestor struct{ config Config }

// New returns the attestor of a configuration that Check accepts.
func New(c Config) Attestor {
	if c.MetadataEndpoint == "" {
		c.MetadataEndpoint = DefaultEndpoint
	}
	if c.ServiceAccount == "" {
		c.ServiceAccount = DefaultServiceAccount
	}
	if c.Audience == "" {
		c.Audience = DefaultAudience
	}
	return Attestor{c}
}

// Type is SPIRE's name of this node attestor.
func (Attestor) Type() string { return Type }

// Begin asks for a token. It is a secret: no error repeats any of it.
func (a Attestor) Begin(ctx context.Context) (nodeattest.Evidence, error) {
	service := metadata.Open(a.config.MetadataEndpoint)
	defer service.Close()
	query := url.Values{"audience": {a.config.Audience}, "format": {"full"}}
	header, body, err := service.Ask(ctx, metadata.Request{
		Method: http.MethodGet,
		Path:   "/computeMetadata/v1/instance/service-accounts/" + a.config.ServiceAccount + "/identity?" + query.Encode(),
		Header: map[string]string{"Metadata-Flavor": "Google"},
	})
	if err != nil {
		return nil, fmt.Errorf("gcp_iit: fetching an identity token from %s: %w", a.config.MetadataEndpoint, err)
	}
	if header.Get("Metadata-Flavor") != "Google" {
		return nil, fmt.Errorf("gcp_iit: what answers at %s is not Google's metadata server: the answer has no header Metadata-Flavor: Google", a.config.MetadataEndpoint)
	}
	token, err := readToken(body)
	if err != nil {
		return nil, fmt.Errorf("gcp_iit: %w", err)
	}
	return nodeattest.Shown{Attestor: Type, Bytes: token}, nil
}

// readToken looks whether an answer is a JWT, so that nothing else is shown to the CA.
func readToken(body []byte) ([]byte, error) {
	token := strings.TrimSpace(string(body))
	if len(token) > maxTokenBytes || !nodeattest.IsJWT(token) {
		return nil, errors.New("the metadata server's answer is not an identity token")
	}
	return []byte(token), nil
}
