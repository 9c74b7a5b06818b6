package policy

import (
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

// Check reads all CallPolicies, UserIssuers and the PolicyDefaults among docs, documents of other kinds are left alone, and returns
// them compiled for the trust domain td. The epoch and the revision are zero: nobody has applied the set.
//
// The error is of type strictyaml.Errors and holds the mistakes of all documents: those of each, and two documents of
// one kind and name.
func Check(docs []strictyaml.Document, td spiffeid.TrustDomain) (*policyv1.PolicySet, error) {
	set := &policyv1.PolicySet{Format: Format, TrustDomain: td.Name(), Defaults: policyv1.DefaultsMode_DEFAULTS_MODE_DENY}
	var mistakes strictyaml.Errors
	gather := func(err error) {
		var list strictyaml.Errors
		errors.As(err, &list)
		mistakes = append(mistakes, list...)
	}
	first := make(map[[2]string]strictyaml.Document)
	for _, doc := range docs {
		kind, line, column, _ := doc.Field("kind")
		name := DefaultsName
		switch kind {
		case KindCallPolicy:
			pol, err := ParsePolicy(doc, td)
			if err != nil {
				gather(err)
			} else {
				set.Policies = append(set.Policies, pol)
			}
			name, line, column, _ = doc.Field("name")
		case KindPolicyDefaults:
			mode, _, err := ParseDefaults(doc)
			if err != nil {
				gather(err)
			}
			set.Defaults = mode
		case KindUserIssuer:
			issuer, _, err := ParseUserIssuer(doc)
			if err != nil {
				gather(err)
			} else {
				set.UserIssuers = append(set.UserIssuers, issuer)
			}
			name, line, column, _ = doc.Field("name")
		default:
			continue
		}
		if other, found := first[[2]string{kind, name}]; found && name != "" {
			p := &parser{file: doc.File}
			p.at(line, column, "a second %s named %q; the first is at %s:%d", kind, shorten(name), other.File, other.Line)
			gather(p.err())
			continue
		}
		first[[2]string{kind, name}] = doc
	}
	if len(mistakes) > 0 {
		return nil, mistakes
	}
	return set, nil
}
