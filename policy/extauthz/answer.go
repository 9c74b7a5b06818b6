package extauthz

import (
	"encoding/base64"
	"encoding/json"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-id/signet/policy"
)

const (
	// decisionHeader is the header of a refusal that holds the decision id, as httpauthz has it.
	decisionHeader = "signet-decision-id"

	// domain is that of the ErrorInfo of a refused RPC, as grpcauthz has it.
	domain = "signet"
)

// allow answers most checks. It is never changed.
var allow = &authv3.CheckResponse{
	Status:       &rpcstatus.Status{Code: int32(codes.OK)},
	HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}},
}

// allowStripped takes a header away that only an enforcement point writes.
var allowStripped = &authv3.CheckResponse{
	Status:       &rpcstatus.Status{Code: int32(codes.OK)},
	HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{HeadersToRemove: []string{decisionHeader}}},
}

func allowed(r *policy.Request) *authv3.CheckResponse {
	if r.Headers != nil && len(r.Headers.Values(decisionHeader)) > 0 {
		return allowStripped
	}
	return allow
}

// denied is a refusal. What the caller is told is the same as from the other enforcement points: status 403 with a JSON
// body, or for a gRPC call, as Envoy makes one of it, PERMISSION_DENIED with a detail, and the decision id in both.
func denied(r *policy.Request, j policy.Judgement) *authv3.CheckResponse {
	resp := &authv3.CheckResponse{Status: &rpcstatus.Status{Code: int32(codes.PermissionDenied), Message: "call denied, decision " + j.ID}}
	if r.Protocol != policy.ProtocolHTTP {
		return resp // a connection, which Envoy closes
	}
	refusal := &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode_Forbidden}}
	refusal.Headers = append(refusal.Headers, header(decisionHeader, j.ID))
	if speaksGRPC(r.ContentTypes) {
		refusal.Body = resp.Status.Message // Envoy makes it the grpc-message
		if detail, err := details(j, resp.Status); err == nil {
			refusal.Headers = append(refusal.Headers, header("grpc-status-details-bin", detail))
		}
	} else {
		body, err := json.Marshal(struct {
			DecisionID string `json:"decision_id"`
			Reason     string `json:"reason"`
		}{j.ID, j.Decision.Reason.Public()})
		if err == nil { // two strings always have a JSON form
			refusal.Body = string(body) + "\n"
		}
		refusal.Headers = append(refusal.Headers, header("content-type", "application/json"), header("x-content-type-options", "nosniff"))
	}
	resp.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: refusal}
	return resp
}

func header(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}, AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD}
}

// speaksGRPC reports whether Envoy takes the call for gRPC. It then answers in gRPC's way, for which a content type of ours
// would be wrong.
func speaksGRPC(contentTypes []string) bool {
	return len(contentTypes) == 1 && (contentTypes[0] == "application/grpc" || strings.HasPrefix(contentTypes[0], "application/grpc+"))
}

// details is what gRPC clients read a status with its details from.
func details(j policy.Judgement, status *rpcstatus.Status) (string, error) {
	info, err := anypb.New(&errdetails.ErrorInfo{
		Reason: strings.ToUpper(j.Decision.Reason.Public()), Domain: domain, Metadata: map[string]string{"decision_id": j.ID},
	})
	if err != nil {
		return "", err
	}
	raw, err := proto.Marshal(&rpcstatus.Status{Code: status.Code, Message: status.Message, Details: []*anypb.Any{info}})
	return base64.RawStdEncoding.EncodeToString(raw), err
}
