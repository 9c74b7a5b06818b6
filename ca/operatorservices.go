package ca

import (
	"log/slog"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/adminapi"
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

	noLogger struct {
		loggerv1.UnimplementedLoggerServer
	}
	otherLogger   struct{ noLogger }
	loggerService struct {
		otherLogger
		adminAPI
	}

	noDebug struct {
		debugv1.UnimplementedDebugServer
	}
	otherDebug   struct{ noDebug }
	debugService struct {
		otherDebug
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
	// What is about this process and not about the trust domain is for who can reach the machine.
	add(loggerv1.Logger_ServiceDesc, access.Local)
	add(debugv1.Debug_ServiceDesc, access.Local)
}

func registerForOperators(s *grpc.Server, a adminAPI) {
	trustdomainv1.RegisterTrustDomainServer(s, &trustDomainService{adminAPI: a})
	loggerv1.RegisterLoggerServer(s, &loggerService{adminAPI: a})
	debugv1.RegisterDebugServer(s, &debugService{adminAPI: a})
}

// logLevel lets the Logger service at the level. The configured one is that of the configuration in force.
func (ca *CA) logLevel() adminapi.LogLevel {
	return adminapi.LogLevel{Current: ca.level.Level, Set: ca.level.Set, Configured: func() slog.Level {
		lv, _ := ca.reconfigured.Load().Logging.level() // Check has seen it
		return lv
	}}
}
