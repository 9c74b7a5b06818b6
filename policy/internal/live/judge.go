package live

import (
	"crypto/x509"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/policy"
)

// A Judge decides by the policies of the moment whether a link may go on.
type Judge func(*policy.Policies) policy.Decision

// Connection judges a connection of which nothing but the peer is known, as tlsauthz does.
func Connection(service, peer spiffeid.ID, leaf *x509.Certificate) Judge {
	return Request(&policy.Request{Service: service, Peer: peer, Certificate: leaf})
}

// Prefiltered judges a connection whose requests are decided one by one: it may go on while some request might be allowed.
func Prefiltered(service, peer spiffeid.ID, leaf *x509.Certificate) Judge {
	return func(p *policy.Policies) policy.Decision {
		d := p.MightAllow(service, peer)
		if !d.Allowed {
			return d
		}
		if name, found := p.Revocations().X509SVID(leaf); found {
			d.Outcome, d.Revocation = policy.Outcome{Reason: policy.ReasonRevoked}, name
		}
		return d
	}
}

// Request judges a request that is being answered. Nobody changes what r points to.
func Request(r *policy.Request) Judge {
	return func(p *policy.Policies) policy.Decision { return p.Decide(r) }
}

// Callee judges a connection to a server, of which policies say nothing.
func Callee(leaf *x509.Certificate) Judge {
	return func(p *policy.Policies) policy.Decision { return p.DecideCallee(leaf) }
}
