// Package k8spsat is the evidence of an agent in a pod of Kubernetes: the projected service account token of its pod. It
// is the agent's side of SPIRE's k8s_psat.
package k8spsat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/internal/durable"
)

const (
	// Type is SPIRE's name of this node attestor.
	Type = "k8s_psat"
	// DefaultTokenPath is where the manifests of SPIRE's agents mount the token.
	DefaultTokenPath = "/var/run/secrets/tokens/spire-agent"

	maxTokenBytes   = 16 << 10
	maxClusterBytes = 255
)

// Config says how the evidence is had.
type Config struct {
	// Cluster is the name by which the CA knows this cluster.
	Cluster string
	// TokenPath is the file of the projected token. Default /var/run/secrets/tokens/spire-agent.
	TokenPath string
}

// Check tells each mistake by its field.
func (c Config) Check(bad func(field, format string, args ...any)) {
	if c.Cluster == "" {
		bad("cluster", "missing; give the name by which the CA knows this cluster")
	} else if spiffeid.ValidatePathSegment(c.Cluster) != nil || len(c.Cluster) > maxClusterBytes {
		bad("cluster", "%q cannot be a cluster's name; it is part of SPIFFE IDs: letters, digits, '.', '-' and '_', at most %d bytes", c.Cluster, maxClusterBytes)
	}
	if c.TokenPath != "" && !filepath.IsAbs(c.TokenPath) {
		bad("token_path", "%q must be absolute", c.TokenPath)
	}
}

// An Attestor shows the token of this pod. It reads it whenever the agent attests, since the kubelet replaces it all the
// time.
type Attestor struct{ config Config }

// New returns the attestor of a configuration that Check accepts.
func New(c Config) Attestor {
	if c.TokenPath == "" {
		c.TokenPath = DefaultTokenPath
	}
	return Attestor{c}
}

// Type is SPIRE's name of this node attestor.
func (Attestor) Type() string { return Type }

// Begin reads the token. It is a secret: no error repeats any of it.
func (a Attestor) Begin(context.Context) (nodeattest.Evidence, error) {
	data, err := durable.ReadFile(a.config.TokenPath, maxTokenBytes)
	if err != nil {
		return nil, fmt.Errorf("k8s_psat.token_path: %w (does the pod mount a projected volume there?)", err)
	}
	token, err := readToken(data)
	if err != nil {
		return nil, fmt.Errorf("k8s_psat.token_path: %s: %w", a.config.TokenPath, err)
	}
	payload, err := json.Marshal(struct {
		Cluster string `json:"cluster"`
		Token   string `json:"token"`
	}{a.config.Cluster, token})
	return nodeattest.Shown{Attestor: Type, Bytes: payload}, err
}

// readToken looks whether a file holds a JWT, so that nothing else is shown to the CA.
func readToken(data []byte) (string, error) {
	token := strings.TrimSpace(string(data))
	switch {
	case token == "":
		return "", errors.New("the file is empty")
	case !nodeattest.IsJWT(token):
		return "", errors.New("the file holds no service account token")
	}
	return token, nil
}
