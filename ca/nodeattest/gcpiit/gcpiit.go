// Package gcpiit judges instances of Google Compute Engine by the identity token that their metadata server gives them,
// which Google signs. It is SPIRE's attestor gcp_iit, as far as the token goes: it asks Google for nothing but its keys.
// A token says which instance asked for it and nothing of who shows it, so that the first to show one is the node.
package gcpiit

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-id/signet/ca/nodeattest"
)

// Type is the attestor's name.
const Type = "gcp_iit"

// An Attestor judges identity tokens.
type Attestor struct {
	projects       map[string]bool
	audience       string
	allowReattests bool
	path           *nodeattest.PathTemplate // or nil
	keys           keySource
	now            func() time.Time
}

// New returns the attestor of a configuration that Check accepts. Keys that are in a file are read once, so that a mistake is found at the start; keys that are
// fetched are fetched when the first node attests.
func New(c Config) (*Attestor, error) {
	a := &Attestor{projects: map[string]bool{}, audience: c.Audience, allowReattests: c.AllowReattestation, path: c.Path, now: c.Now}
	for _, p := range c.Projects {
		a.projects[p] = true
	}
	if a.audience == "" {
		a.audience = DefaultAudience
	}
	if a.now == nil {
		a.now = time.Now
	}
	if c.KeysFile != "" {
		file := keyFile(c.KeysFile)
		if _, err := file.read(); err != nil {
			return nil, fmt.Errorf("keys_file: %w", err)
		}
		a.keys = file
		return a, nil
	}
	url := c.KeysURL
	if url == "" {
		url = DefaultKeysURL
	}
	keys, err := newKeyURL(url, c.KeysURLCAFile, a.now)
	if err != nil {
		return nil, fmt.Errorf("keys_url_ca_file: %w", err)
	}
	a.keys = keys
	return a, nil
}

// Type is SPIRE's name of this attestor.
func (a *Attestor) Type() string { return Type }

// Attest judges a payload that is an identity token.
func (a *Attestor) Attest(ctx context.Context, attempt nodeattest.Attempt) (*nodeattest.Evidence, error) {
	t, err := parseToken(attempt.Payload)
	if err != nil {
		return nil, err
	}
	key, err := a.keys.key(ctx, t.kid)
	switch {
	case errors.Is(err, errUnknownKey):
		return nil, nodeattest.Refuse(nodeattest.Malformed, "failed to validate the identity token signature: no key with ID %q", clip(t.kid))
	case err != nil:
		return nil, nodeattest.Refuse(nodeattest.Unavailable, "the keys that verify identity tokens cannot be had now; attest again").Because(err)
	}
	c, err := t.verify(key)
	if err != nil {
		return nil, err
	}
	if err := c.check(a.audience, a.now()); err != nil {
		return nil, err
	}
	machine := c.Google.ComputeEngine
	if !a.projects[machine.ProjectID] {
		return nil, nodeattest.Refuse(nodeattest.Denied, "identity token project ID %q is not in the allow list", clip(machine.ProjectID))
	}
	selectors := []string{
		"project-id:" + machine.ProjectID,
		"zone:" + machine.Zone,
		"instance-name:" + machine.InstanceName,
	}
	account := ""
	if c.Email != "" && c.EmailVerified {
		account = c.Email
		selectors = append(selectors, "sa:"+account)
	}
	path := []string{Type, machine.ProjectID, machine.InstanceID}
	if a.path != nil {
		if path, err = a.path.Path(map[string]nodeattest.Variable{
			"PluginName": {Value: Type}, "ProjectID": {Value: machine.ProjectID}, "Zone": {Value: machine.Zone}, "InstanceID": {Value: machine.InstanceID},
			"InstanceName": {Value: machine.InstanceName}, "ServiceAccount": {Value: strings.ReplaceAll(account, "@", "_")},
		}); err != nil {
			return nil, nodeattest.Refuse(nodeattest.Denied, "the agent's SPIFFE ID cannot be made: %v", err)
		}
	}
	return &nodeattest.Evidence{
		Path:        path,
		Selectors:   selectors,
		CanReattest: a.allowReattests,
		Facts:       map[string]any{"project": machine.ProjectID, "zone": machine.Zone, "instance": machine.InstanceName, "instance_id": machine.InstanceID},
	}, nil
}
