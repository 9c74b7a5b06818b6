package ca

import (
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/ca/access"
)

// These services of SPIRE's are for operators alone: no agent has a part in them. See services.go for the nesting.
type (
	noTrustDomain struct {
		trustdomainv1.UnimplementedTrustDomainServer
	}
	otherTrustDomain   struct{ noTrustDomain }
	trustDomainService struct {
		otherTrustDomain
		adminAPI
	}
)

// addOperatorMethods says who may call them. [SPIRE-PROTOCOL §10]
func addOperatorMethods(m map[string]access.Kind) {
	add := func(d grpc.ServiceDesc, kind access.Kind) {
		for _, rpc := range d.Methods {
			m["/"+d.ServiceName+"/"+rpc.MethodName] = kind
		}
	}
	add(trustdomainv1.TrustDomain_ServiceDesc, access.Local|access.Admin)
}

func registerForOperators(s *grpc.Server, a adminAPI) {
	trustdomainv1.RegisterTrustDomainServer(s, &trustDomainService{adminAPI: a})
}
