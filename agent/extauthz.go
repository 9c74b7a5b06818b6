package agent

import (
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/extauthz"
)

// ExtAuthz says how Envoys are answered that ask about each call (ext_authz).
type ExtAuthz struct {
	// Disabled answers them Unimplemented, upon which Envoys deny.
	Disabled bool `yaml:"disabled"`
	// AllowMissingCertificate decides calls whose check comes without the peer's certificate, which an Envoy sends if its
	// filter has include_peer_certificate. That an X509-SVID expired on an open connection, or that its serial number is
	// revoked, is not seen then.
	AllowMissingCertificate bool `yaml:"allow_missing_certificate"`
	// MaxChecksPerSecond bounds the checks that one process begins, and four times as many those of one user, with five
	// seconds' worth of them after a pause; max_calls_per_second does not hold for them. Default 20000; -1: no bound.
	MaxChecksPerSecond int `yaml:"max_checks_per_second"`
}

const defaultChecksPerSecond = 20_000

func (c *ExtAuthz) check(bad func(field, format string, args ...any)) {
	if c.MaxChecksPerSecond < -1 || c.MaxChecksPerSecond > maxCallsPerSecond {
		bad("ext_authz.max_checks_per_second", "%d is not 1 to %d, 0 for the default of %d, or -1 for no bound", c.MaxChecksPerSecond, maxCallsPerSecond, defaultChecksPerSecond)
	}
	if c.MaxChecksPerSecond == 0 {
		c.MaxChecksPerSecond = defaultChecksPerSecond
	}
}

// openExtAuthz makes the service for the socket; nil if there is to be none.
func (a *Agent) openExtAuthz() (err error) {
	c := a.config
	if c.ExtAuthz.Disabled {
		return nil
	}
	var observer policy.Observer // not a nil pointer in it
	if a.observations != nil {
		observer = a.observations
	}
	a.extAuthz, err = extauthz.New(extauthz.Config{
		Source: a.cache, Observer: observer, MaxOffline: c.MaxOffline, MaxRevocationStaleness: c.MaxRevocationStaleness, AllowMissingCertificate: c.ExtAuthz.AllowMissingCertificate, JWTLeeway: c.JWTLeeway,
		AllowUnknownJWTHeaders: c.AllowUnknownJWTHeaders, OnDecision: a.metrics.decided, Log: a.log, Now: c.Now,
	})
	return err
}

func (m *metrics) decided(j policy.Judgement) {
	answer := "denied"
	if j.Decision.Allowed {
		answer = "allowed"
	}
	m.decisions.WithLabelValues(answer, j.Decision.Reason.String()).Inc()
}
