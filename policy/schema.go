package policy

import (
	"fmt"
	"reflect"

	"github.com/signet-id/signet/internal/strictyaml"
)

// Schema returns the JSON Schema of a kind of document, for editors and other checkers. It is made from the types that
// ParsePolicy, ParseDefaults, ParseUserIssuer and ParseTests decode into; those check more than a schema can say.
func Schema(kind string) ([]byte, error) {
	var t reflect.Type
	switch kind {
	case KindCallPolicy:
		t = reflect.TypeFor[callPolicyDoc]()
	case KindPolicyDefaults:
		t = reflect.TypeFor[defaultsDoc]()
	case KindUserIssuer:
		t = reflect.TypeFor[userIssuerDoc]()
	case KindPolicyTest:
		t = reflect.TypeFor[testsDoc]()
	case KindRevocation:
		t = reflect.TypeFor[revocationDoc]()
	default:
		return nil, fmt.Errorf("kind %q has no schema here; it must be %s, %s, %s, %s or %s", kind, KindCallPolicy, KindPolicyDefaults, KindUserIssuer, KindPolicyTest, KindRevocation)
	}
	return strictyaml.Schema(t, kind)
}
