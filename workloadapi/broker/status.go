package broker

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Reasons of google.rpc.ErrorInfo, and its domain. [Broker API §4.8]
const (
	ReasonInvalid     = "WORKLOAD_REFERENCE_INVALID"
	ReasonNotFound    = "WORKLOAD_NOT_FOUND"
	ReasonNotEntitled = "WORKLOAD_NOT_ENTITLED"
	ErrorDomain       = "spiffe.io"
)

// Conditions of the endpoint.
var (
	errUnidentified = errors.New("the X509-SVID that this connection was opened with is not valid now: fetch a new one and connect anew")
	errNotListed    = errors.New("not a broker: the agent's configuration does not list this SPIFFE ID under broker.brokers")
	errNoKubelet    = errors.New("the kubelet could not be asked")
)

// A notAllowedError says that a broker may not ask for something that others may. Its text goes to the broker.
type notAllowedError struct{ text string }

func (e *notAllowedError) Error() string { return e.text }

func notAllowed(format string, args ...any) error {
	return &notAllowedError{fmt.Sprintf(format, args...)}
}

// A workloadError is an error about one workload. It adds which one to the answer.
type workloadError struct {
	error
	ref reference
}

func (e *workloadError) Unwrap() error { return e.error }

// toStatus is the one place where errors become gRPC codes. An error that is not known here leaves without its text; the
// interceptor has logged it.
func toStatus(ctx context.Context, err error) error {
	if err == nil || errors.Is(context.Cause(ctx), workloadapi.ErrStopping) {
		return workloadapi.Status(ctx, err)
	}
	metadata := map[string]string{}
	what := "the workload"
	if w, ok := errors.AsType[*workloadError](err); ok {
		what = w.ref.describe(metadata)
	}
	if bad, ok := errors.AsType[*referenceError](err); ok {
		metadata["field"] = bad.field
		return withInfo(codes.InvalidArgument, "workload reference: "+bad.Error(), ReasonInvalid, metadata)
	}
	if refused, ok := errors.AsType[*notAllowedError](err); ok {
		return status.Error(codes.PermissionDenied, refused.text)
	}
	switch {
	case errors.Is(err, errUnidentified):
		return status.Error(codes.Unauthenticated, errUnidentified.Error())
	case errors.Is(err, errNotListed):
		return status.Error(codes.PermissionDenied, errNotListed.Error())
	case errors.Is(err, peer.ErrGone), errors.Is(err, ErrNoPod):
		return withInfo(codes.NotFound, what+" does not exist, or does not any more", ReasonNotFound, metadata)
	case errors.Is(err, workloadapi.ErrNoIdentity):
		return withInfo(codes.PermissionDenied, what+" is not entitled to what was asked for: no registration entry for this node matches it, "+
			"or this broker may not get its SPIFFE IDs", ReasonNotEntitled, metadata)
	case errors.Is(err, errNoKubelet) && ctx.Err() == nil:
		return status.Error(codes.Unavailable, errNoKubelet.Error())
	}
	return workloadapi.Status(ctx, err)
}

// withInfo makes a status with google.rpc.ErrorInfo.
func withInfo(code codes.Code, text, reason string, metadata map[string]string) error {
	bare := status.New(code, text)
	st, err := bare.WithDetails(protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: reason, Domain: ErrorDomain, Metadata: metadata}))
	if err != nil { // only for the code OK
		return bare.Err()
	}
	return st.Err()
}

// describe says in words and in metadata which workload is meant.
func (r reference) describe(metadata map[string]string) string {
	if r.pod == nil {
		metadata["pid"] = fmt.Sprint(r.pid)
		return "process " + metadata["pid"]
	}
	for key, value := range map[string]string{"namespace": r.pod.Namespace, "name": r.pod.Name, "uid": r.pod.UID} {
		if value != "" {
			metadata[key] = value
		}
	}
	return r.pod.String()
}
