package proxy

import (
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/grpcauthz"
	"github.com/signet-id/signet/policy/httpauthz"
)

// refuse tells a caller that its request was denied: the decision id, and nothing about the rules.
func refuse(w http.ResponseWriter, r *http.Request, j policy.Judgement) {
	w.Header().Set(httpauthz.DecisionHeader, j.ID)
	writeError(w, r, http.StatusForbidden, j.Decision.Reason.Public(), j.ID)
}

// isGRPC says whether a caller expects its errors as gRPC does. It decides nothing else.
func isGRPC(r *http.Request) bool {
	return r.ProtoMajor == 2 && r.Method == http.MethodPost && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
}

// writeGRPCError answers with the headers of a gRPC response that ends at once.
func writeGRPCError(w http.ResponseWriter, httpStatus int, reason, id string) {
	code, text := codes.Unavailable, reason
	switch httpStatus {
	case http.StatusForbidden:
		code, text = codes.PermissionDenied, "call denied, decision "+id
	case http.StatusBadRequest:
		code = codes.Internal
	case http.StatusGatewayTimeout:
		code = codes.DeadlineExceeded
	}
	h := w.Header()
	h.Set("Content-Type", "application/grpc")
	h.Set("Grpc-Status", strconv.Itoa(int(code)))
	h.Set("Grpc-Message", text)
	if id != "" {
		detailed, err := status.New(code, text).WithDetails(&errdetails.ErrorInfo{Reason: strings.ToUpper(reason), Domain: grpcauthz.Domain,
			Metadata: map[string]string{"decision_id": id}})
		if err == nil {
			if b, err := proto.Marshal(detailed.Proto()); err == nil {
				h.Set("Grpc-Status-Details-Bin", base64.RawStdEncoding.EncodeToString(b))
			}
		}
	}
	w.WriteHeader(http.StatusOK)
}
