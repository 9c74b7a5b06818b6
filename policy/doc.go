// Package policy is the call policy language: who may call a service. It reads CallPolicy documents, compiles them,
// decides calls, explains decisions and runs tables of expected ones. The CA compiles with it, agents pass its wire form
// (signet.policy.v1) on, and every enforcement point decides with it, so that all of them agree. It holds no sockets,
// no clocks and no goroutines.
//
// A deny is read wide and an allow narrow: where a request or a pattern could be understood in two ways, a deny covers
// both and an allow neither. Deny wins over allow, and without an allow a call is denied. What is not understood, be it
// a rule that needs a newer reader, an enum value or a malformed path, never grants anything.
//
// In patterns for SPIFFE IDs and for HTTP paths, "*" is exactly one segment and "**", which can only be last, is one
// non-empty segment and the rest. A deny for /a/** covers /a as well.
package policy

// Format is the version of the compiled form that this package writes, and the newest that it reads.
const Format = 1

// The features that a rule may require of its reader.
const (
	featureHTTP          = "http"
	featureGRPC          = "grpc"
	featureJWT           = "jwt"
	featureJWTSubjectAny = "jwt.subject.any"
	featureWhen          = "when"
	featureWhenHint      = "when.hint"
	featureWhenUser      = "when.user"
)

// Features returns what this reader understands in the requires field of a rule.
func Features() []string {
	return []string{featureHTTP, featureGRPC, featureJWT, featureJWTSubjectAny, featureWhen, featureWhenHint, featureWhenUser}
}

func knownFeature(name string) bool {
	switch name {
	case featureHTTP, featureGRPC, featureJWT, featureJWTSubjectAny, featureWhen, featureWhenHint, featureWhenUser:
		return true
	}
	return false
}
