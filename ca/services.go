package ca

import (
	"context"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/nodeapi"
)

// SPIRE puts what agents call and what admins call into the same services; each of these joins the two doors. An RPC
// that neither has answers Unimplemented: what does that is embedded one level deeper than the doors, so that Go
// prefers them.
type (
	noAgent struct {
		agentv1.UnimplementedAgentServer
	}
	noBundle struct {
		bundlev1.UnimplementedBundleServer
	}
	noSVID  struct{ svidv1.UnimplementedSVIDServer }
	noEntry struct {
		entryv1.UnimplementedEntryServer
	}
	noLocalAuthority struct {
		localauthorityv1.UnimplementedLocalAuthorityServer
	}

	otherAgent  struct{ noAgent }
	otherBundle struct{ noBundle }
	otherSVID   struct{ noSVID }
	otherEntry  struct{ noEntry }

	nodeAPI  struct{ *nodeapi.API }
	adminAPI struct{ *adminapi.API }

	agentService struct {
		otherAgent
		nodeAPI
		adminAPI
	}
	bundleService struct {
		otherBundle
		nodeAPI
		adminAPI
	}
	svidService struct {
		otherSVID
		nodeAPI
		adminAPI
	}
	entryService struct {
		otherEntry
		nodeAPI
		adminAPI
	}
	otherLocalAuthority   struct{ noLocalAuthority }
	localAuthorityService struct {
		otherLocalAuthority
		adminAPI
	}
)

// methods says who may call what. [SPIRE-PROTOCOL §10] What is not here is refused.
func methods() map[string]access.Kind {
	const operators = access.Local | access.Admin
	m := map[string]access.Kind{
		agentv1.Agent_AttestAgent_FullMethodName:                         access.Anyone,
		agentv1.Agent_RenewAgent_FullMethodName:                          access.Agent,
		agentv1.Agent_PostStatus_FullMethodName:                          access.Agent,
		bundlev1.Bundle_GetBundle_FullMethodName:                         access.Anyone,
		entryv1.Entry_GetAuthorizedEntries_FullMethodName:                access.Agent,
		entryv1.Entry_SyncAuthorizedEntries_FullMethodName:               access.Agent,
		svidv1.SVID_BatchNewX509SVID_FullMethodName:                      access.Agent,
		svidv1.SVID_BatchNewWITSVID_FullMethodName:                       access.Agent,
		bundlev1.Bundle_GetFederatedBundle_FullMethodName:                operators | access.Agent,
		svidv1.SVID_NewJWTSVID_FullMethodName:                            access.Agent,
		svidv1.SVID_NewDownstreamX509CA_FullMethodName:                   access.Downstream,
		bundlev1.Bundle_PublishJWTAuthority_FullMethodName:               access.Downstream,
		bundlev1.Bundle_PublishWITAuthority_FullMethodName:               access.Downstream,
		nodev1.Node_IssueX509SVIDs_FullMethodName:                        access.Agent,
		nodev1.Node_IssueJWTSVIDs_FullMethodName:                         access.Agent,
		nodev1.Node_Follow_FullMethodName:                                access.Agent,
		nodev1.Node_ReportObservations_FullMethodName:                    access.Agent,
		adminv1.Observations_GetDecision_FullMethodName:                  operators,
		adminv1.Observations_ListObservations_FullMethodName:             operators,
		healthv1.Health_Check_FullMethodName:                             access.Local,
		healthv1.Health_List_FullMethodName:                              access.Local,
		healthv1.Health_Watch_FullMethodName:                             access.Local,
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      operators,
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": operators,
	}
	for _, name := range []string{
		agentv1.Agent_CountAgents_FullMethodName, agentv1.Agent_ListAgents_FullMethodName, agentv1.Agent_GetAgent_FullMethodName,
		agentv1.Agent_DeleteAgent_FullMethodName, agentv1.Agent_BanAgent_FullMethodName, agentv1.Agent_CreateJoinToken_FullMethodName,
		entryv1.Entry_CountEntries_FullMethodName, entryv1.Entry_ListEntries_FullMethodName, entryv1.Entry_GetEntry_FullMethodName,
		entryv1.Entry_BatchCreateEntry_FullMethodName, entryv1.Entry_BatchUpdateEntry_FullMethodName, entryv1.Entry_BatchDeleteEntry_FullMethodName,
		bundlev1.Bundle_CountBundles_FullMethodName, bundlev1.Bundle_ListFederatedBundles_FullMethodName, bundlev1.Bundle_AppendBundle_FullMethodName,
		bundlev1.Bundle_BatchUpdateFederatedBundle_FullMethodName, bundlev1.Bundle_BatchSetFederatedBundle_FullMethodName, bundlev1.Bundle_BatchCreateFederatedBundle_FullMethodName, bundlev1.Bundle_BatchDeleteFederatedBundle_FullMethodName,
		svidv1.SVID_MintX509SVID_FullMethodName, svidv1.SVID_MintJWTSVID_FullMethodName, svidv1.SVID_MintWITSVID_FullMethodName,
	} {
		m[name] = operators
	}
	for _, rpc := range localauthorityv1.LocalAuthority_ServiceDesc.Methods {
		m["/"+localauthorityv1.LocalAuthority_ServiceDesc.ServiceName+"/"+rpc.MethodName] = operators
	}
	for _, rpc := range adminv1.Admin_ServiceDesc.Methods {
		m["/"+adminv1.Admin_ServiceDesc.ServiceName+"/"+rpc.MethodName] = operators
	}
	for _, rpc := range adminv1.Admin_ServiceDesc.Streams {
		m["/"+adminv1.Admin_ServiceDesc.ServiceName+"/"+rpc.StreamName] = operators
	}
	for _, d := range []grpc.ServiceDesc{adminv1.Rollouts_ServiceDesc, adminv1.Revocations_ServiceDesc, adminv1.Entries_ServiceDesc, adminv1.Pods_ServiceDesc} {
		for _, rpc := range d.Methods {
			m["/"+d.ServiceName+"/"+rpc.MethodName] = operators
		}
		for _, rpc := range d.Streams {
			m["/"+d.ServiceName+"/"+rpc.StreamName] = operators
		}
	}
	addOperatorMethods(m)
	return m
}

// slowMethods take time of a caller who shows no certificate.
func slowMethods() map[string]bool {
	return map[string]bool{agentv1.Agent_AttestAgent_FullMethodName: true}
}

// endlessMethods last for as long as their caller likes: the stream interceptor has judged the caller before it reads
// anything, and each message is judged again.
func endlessMethods() map[string]bool {
	m := map[string]bool{nodev1.Node_Follow_FullMethodName: true, healthv1.Health_Watch_FullMethodName: true}
	for _, d := range []grpc.ServiceDesc{adminv1.Admin_ServiceDesc, reflectionv1.ServerReflection_ServiceDesc, reflectionv1alpha.ServerReflection_ServiceDesc} {
		for _, rpc := range d.Streams {
			m["/"+d.ServiceName+"/"+rpc.StreamName] = true
		}
	}
	return m
}

// liveHealth answers a check by what the CA finds out then, not by what it last noted for those who watch.
type liveHealth struct {
	*health.Server
	ca *CA
}

// Check implements grpc.health.v1.
func (l liveHealth) Check(ctx context.Context, req *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	l.ca.noteHealth()
	return l.Server.Check(ctx, req)
}

// noteHealth shows the CA's health to those who watch it.
func (ca *CA) noteHealth() {
	st := healthv1.HealthCheckResponse_SERVING
	if ca.Health() != nil {
		st = healthv1.HealthCheckResponse_NOT_SERVING
	}
	ca.health.SetServingStatus("", st) // without effect once it has been shut down
	for _, k := range ca.clusters {
		st := healthv1.HealthCheckResponse_SERVING
		if len(k.problems()) > 0 {
			st = healthv1.HealthCheckResponse_NOT_SERVING
		}
		ca.health.SetServingStatus("kubernetes/"+k.client.Cluster, st)
	}
}

// register puts the same services on the port and on the admin socket.
func register(s *grpc.Server, node *nodeapi.API, admin *adminapi.API, h healthv1.HealthServer) {
	n, a := nodeAPI{node}, adminAPI{admin}
	registerForOperators(s, a)
	agentv1.RegisterAgentServer(s, &agentService{nodeAPI: n, adminAPI: a})
	bundlev1.RegisterBundleServer(s, &bundleService{nodeAPI: n, adminAPI: a})
	svidv1.RegisterSVIDServer(s, &svidService{nodeAPI: n, adminAPI: a})
	entryv1.RegisterEntryServer(s, &entryService{nodeAPI: n, adminAPI: a})
	localauthorityv1.RegisterLocalAuthorityServer(s, &localAuthorityService{adminAPI: a})
	adminv1.RegisterAdminServer(s, &adminapi.AdminServer{API: admin})
	adminv1.RegisterRevocationsServer(s, adminapi.RevocationsServer{API: admin})
	adminv1.RegisterPodsServer(s, adminapi.PodsServer{API: admin})
	adminv1.RegisterObservationsServer(s, &adminapi.ObservationsServer{API: admin})
	adminv1.RegisterEntriesServer(s, adminapi.EntriesServer{API: admin})
	adminv1.RegisterRolloutsServer(s, &adminapi.RolloutsServer{API: admin})
	healthv1.RegisterHealthServer(s, h)
	reflection.Register(s)
}
