package ca

import (
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
)

const (
	minKeyTimeout     = 100 * time.Millisecond
	maxKeyTimeout     = time.Minute
	maxKeyConcurrency = 1024
)

// choices returns where new keys are made.
func (k Keys) choices(bad func(field, format string, args ...any)) (x509, jwt keys.Choice) {
	parse := func(field, text string) keys.Choice {
		place, err := keys.ParsePlace(text)
		if err == nil {
			err = place.Linked()
		}
		if err != nil {
			bad("keys."+field, "%v", err)
		}
		return keys.Choice{Place: place}
	}
	both := parse("uri", k.URI)
	x509, jwt = both, both
	if k.X509 != "" {
		x509 = parse("x509", k.X509)
	}
	if k.JWT != "" {
		jwt = parse("jwt", k.JWT)
	}
	var err error
	if x509.Algorithm, err = keys.ParseAlgorithm(k.X509Algorithm); err != nil {
		bad("keys.x509_algorithm", "%v", err)
	}
	if jwt.Algorithm, err = keys.ParseAlgorithm(k.JWTAlgorithm); err != nil {
		bad("keys.jwt_algorithm", "%v", err)
	}
	return x509, jwt
}

func (k Keys) check(bad func(field, format string, args ...any)) {
	k.choices(bad)
	if k.Timeout != 0 && (k.Timeout < minKeyTimeout || k.Timeout > maxKeyTimeout) {
		bad("keys.timeout", "%v is not between %v and %v", k.Timeout, minKeyTimeout, maxKeyTimeout)
	}
	if k.Concurrency < 0 || k.Concurrency > maxKeyConcurrency {
		bad("keys.concurrency", "%d is not between 1 and %d; 0 means %d", k.Concurrency, maxKeyConcurrency, keys.DefaultConcurrency)
	}
}

// ring returns the key stores. Check has seen the configuration.
func (k Keys) ring(td spiffeid.TrustDomain, log *slog.Logger) *keys.Ring {
	x509, jwt := k.choices(func(string, string, ...any) {})
	return keys.NewRing(keys.RingConfig{TrustDomain: td, X509: x509, JWT: jwt,
		Limits: keys.Limits{Timeout: k.Timeout, Concurrency: k.Concurrency}, Log: log})
}
