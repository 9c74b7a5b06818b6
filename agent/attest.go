package agent

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/internal/durable"
)

// errNoFreshToken says that there is nothing to attest with.
var errNoFreshToken = errors.New("there is no join token that was not used already")

// errNoWayBack says that the server lets no node in by the key of its last SVID, as SPIRE's.
var errNoWayBack = errors.New("this server lets no node back in by its key")

// remedy says what a person can do when attesting does not help.
func (n *node) remedy() string {
	if n.attestor != nil {
		return "see the CA's log for why it does not take the evidence of node_attestation, or evict the agent there if it was replaced"
	}
	maker := "signet token create"
	if n.client.Server() == caclient.SPIRE {
		maker = "spire-server token generate"
	}
	return "put a fresh join token of " + maker + " into join_token_file, or into join_token and reload"
}

// anchorRemedy says what a person can do about a CA that was made anew.
func (n *node) anchorRemedy() string {
	if n.attestor != nil {
		return "put its authorities into the file of trust_bundle_path"
	}
	return n.remedy()
}

// otherAnchor says whether the configuration has something to verify the CA by, and to attest with, that is not what the
// agent holds. Only that can find a CA that was made anew; nobody else passes for it.
func (n *node) otherAnchor(held *nodeRecord) (bool, error) {
	b := n.bootstrap.Load()
	if n.attestor == nil {
		token, err := b.joinToken()
		if err != nil || token.IsZero() || token.Fingerprint() == held.token {
			return false, err
		}
		if token.Pinned() {
			return true, nil
		}
	}
	if b.bundleFile == "" {
		return false, nil
	}
	bundle, err := n.bundleFromFile(b)
	return err == nil && !bundle.Equal(held.bundle), err
}

// attest attests this node: by its evidence, or with the configured join token if it is not the one by which the agent
// came in before, or with the key of its last SVID. If seen is not the present SVID any more, another call has
// succeeded meanwhile, and that is enough.
func (n *node) attest(ctx context.Context, seen *x509svid.SVID) (bool, error) {
	n.attesting.Lock()
	defer n.attesting.Unlock()
	if n.identity() != seen {
		return true, nil
	}
	b := n.bootstrap.Load()
	old := n.record.Load()
	if n.attestor != nil {
		return n.attestByEvidence(ctx, b, old)
	}
	token, err := b.joinToken()
	if old != nil && (err != nil || token.IsZero() || old.token == token.Fingerprint()) {
		return n.recover(ctx, old)
	}
	if err != nil {
		return false, err
	}
	if token.IsZero() {
		return false, errNoFreshToken
	}
	request := caclient.Attestation{Address: n.config.ServerAddress, TrustDomain: n.td, Evidence: token, Now: n.config.Now}
	switch {
	case token.Pinned():
		request.Pin = token.PinMatches
	case b.bundleFile != "":
		if request.Bundle, err = n.bundleFromFile(b); err != nil {
			return false, err
		}
	case old != nil:
		request.Bundle = old.bundle
	default:
		return false, errors.New("the join token carries no authority pin, so that nothing verifies the CA; " +
			"use a token of signet token create, or set trust_bundle_path, for a SPIRE server to a file with the output of spire-server bundle show")
	}
	key, err := n.dir.pendingKey(false) // a token is spent with it
	if err != nil {
		return false, err
	}
	if request.CSR, err = nodeattest.CSR(key); err != nil {
		return false, err
	}
	return n.attestWith(ctx, request, key, token.Fingerprint())
}

// bundleFromFile reads trust_bundle_path.
func (n *node) bundleFromFile(b *bootstrap) (*x509bundle.Bundle, error) {
	data, err := durable.ReadFile(b.bundleFile, maxBundleFileBytes)
	if err != nil {
		return nil, fmt.Errorf("trust_bundle_path: %w", err)
	}
	bundle, err := parseBundleFile(n.td, data)
	if err != nil {
		return nil, fmt.Errorf("trust_bundle_path %s: %w", b.bundleFile, err)
	}
	return bundle, nil
}

// attestByEvidence attests with what node_attestation names. The CA is verified by the bundle that the agent holds. Only
// if that finds no CA, such as after the CA was made anew, does trust_bundle_path count again. [DESIGN §7]
func (n *node) attestByEvidence(ctx context.Context, b *bootstrap, old *nodeRecord) (bool, error) {
	if old != nil && !old.reattestable {
		// Evidence that counts once only does not let this node in again, but its key does, unless it was evicted.
		did, err := n.recover(ctx, old)
		code := status.Code(err)
		if did || code != codes.PermissionDenied && code != codes.Unavailable && !errors.Is(err, errNoWayBack) {
			return did, err
		}
	}
	if old != nil {
		did, err := n.attestOnce(ctx, old.bundle)
		if did || status.Code(err) != codes.Unavailable {
			return did, err
		}
		bundle, fileErr := n.bundleFromFile(b)
		if fileErr != nil || bundle.Equal(old.bundle) {
			return false, err
		}
		if did, fileErr = n.attestOnce(ctx, bundle); did {
			n.log.Warn("the CA was verified by trust_bundle_path, not by the bundle that the agent held: it has other authorities now", "err", err)
			return true, nil
		}
		return false, errors.Join(err, fmt.Errorf("with trust_bundle_path: %w", fileErr))
	}
	bundle, err := n.bundleFromFile(b)
	if err != nil {
		return false, err
	}
	return n.attestOnce(ctx, bundle)
}

// attestOnce attests with fresh evidence to a CA that bundle verifies.
func (n *node) attestOnce(ctx context.Context, bundle *x509bundle.Bundle) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, maxEvidence)
	defer cancel()
	evidence, err := n.attestor.Begin(ctx)
	if err != nil {
		return false, fmt.Errorf("node_attestation.%w", err)
	}
	if c, ok := evidence.(io.Closer); ok {
		defer func() {
			if err := c.Close(); err != nil {
				n.log.Warn("evidence of this node was not put away", "attestor", evidence.Type(), "err", err)
			}
		}()
	}
	key, err := n.dir.pendingKey(true)
	if err != nil {
		return false, err
	}
	request := caclient.Attestation{Address: n.config.ServerAddress, TrustDomain: n.td, Evidence: evidence, Bundle: bundle, Now: n.config.Now}
	if request.CSR, err = nodeattest.CSR(key); err != nil {
		return false, err
	}
	return n.attestWith(ctx, request, key, "")
}

// recover wins the SVID back with the key of the present one, which the CA knows: after an expiry, a clock jump, or a
// restore. What an operator evicted or banned is refused. Whether that works is the CA's to say, so it is always tried.
func (n *node) recover(ctx context.Context, old *nodeRecord) (bool, error) {
	key, err := n.dir.pendingKey(true)
	if err != nil {
		return false, err
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		return false, err
	}
	evidence := nodeattest.NodeKey{ID: old.svid.ID, Key: old.svid.PrivateKey, CSR: csr}
	request := caclient.Attestation{Address: n.config.ServerAddress, TrustDomain: n.td, Evidence: evidence, CSR: csr, Bundle: old.bundle, Now: n.config.Now}
	did, err := n.attestWith(ctx, request, key, old.token)
	if status.Code(err) == codes.FailedPrecondition { // it knows no such attestor
		err = fmt.Errorf("%w: %w", errNoWayBack, err)
	}
	return did, err
}

// attestWith asks for an SVID for key and keeps it, on disk before it is used. token is the fingerprint of the join
// token that is of no more use then.
func (n *node) attestWith(ctx context.Context, request caclient.Attestation, key *ecdsa.PrivateKey, token string) (bool, error) {
	attested, err := caclient.Attest(ctx, request)
	if err != nil {
		return false, err
	}
	svid, err := readAgentSVID(n.td, attested.Chain, key)
	if err != nil {
		return false, fmt.Errorf("what the CA issued is unusable: %w", err)
	}
	err = n.replace(func(*nodeRecord) *nodeRecord {
		return &nodeRecord{
			svid: svid, bundle: x509bundle.FromX509Authorities(n.td, attested.Authorities), token: token, reattestable: attested.Reattestable,
		}
	})
	if err != nil {
		return false, err
	}
	won := time.Now()
	n.wonAt.Store(&won)
	if err := n.dir.dropPendingKey(); err != nil {
		n.log.Warn("the key of the attestation was not removed", "err", err)
	}
	n.log.Info("this node is attested", "node_id", svid.ID.String(), "attestor", request.Evidence.Type(), "not_after", svid.Certificates[0].NotAfter)
	n.client.Reconnect()
	return true, nil
}

func (b *bootstrap) joinToken() (nodeattest.JoinToken, error) {
	secret := b.token
	if b.tokenFile != "" {
		text, err := durable.ReadSecret(b.tokenFile, nodeattest.MaxJoinTokenBytes+2)
		if errors.Is(err, durable.ErrExposed) {
			return nodeattest.JoinToken{}, fmt.Errorf("join_token_file: %w", err)
		}
		if err != nil {
			return nodeattest.JoinToken{}, fmt.Errorf("join_token_file: %w", err)
		}
		secret = nodeattest.Secret(text)
	}
	if secret == "" {
		return nodeattest.JoinToken{}, nil
	}
	return nodeattest.ParseJoinToken(secret)
}
