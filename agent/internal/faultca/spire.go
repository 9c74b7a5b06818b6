package faultca

import (
	"context"
	"crypto/x509"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// StartSPIRE makes a CA that has SPIRE's services only.
func StartSPIRE(t testing.TB, options ...grpc.ServerOption) *CA {
	t.Helper()
	return start(t, "/spire/server", false, options...)
}

// entryServer is SPIRE's Entry service of a CA.
type entryServer struct {
	entryv1.UnimplementedEntryServer
	ca *CA
}

// SyncAuthorizedEntries answers with all entries.
func (s *entryServer) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	s.ca.Lock()
	defer s.ca.Unlock()
	s.ca.Polls++
	if s.ca.Deny != nil {
		if err := s.ca.Deny(serialOf(stream.Context())); err != nil {
			return err
		}
	}
	return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: s.ca.Entries})
}

// BatchNewX509SVID signs for the entries, if no hook does.
func (ca *CA) BatchNewX509SVID(_ context.Context, r *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	ca.Lock()
	defer ca.Unlock()
	if ca.BatchX509 != nil {
		return ca.BatchX509(r)
	}
	response := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range r.Params {
		response.Results = append(response.Results, ca.result(p))
	}
	return response, nil
}

func (ca *CA) result(p *svidv1.NewX509SVIDParams) *svidv1.BatchNewX509SVIDResponse_Result {
	for _, e := range ca.Entries {
		if e.Id != p.EntryId {
			continue
		}
		request, err := x509.ParseCertificateRequest(p.Csr)
		if err == nil {
			err = request.CheckSignature()
		}
		var der []byte
		if err == nil {
			der, err = ca.Sign(e.SpiffeId.Path, request.PublicKey, time.Hour)
		}
		if err != nil {
			return Refusal(codes.InvalidArgument, err.Error())
		}
		return Granted(der)
	}
	return Refusal(codes.NotFound, "entry not found or not authorized")
}

// Granted is the result that carries a chain.
func Granted(chain ...[]byte) *svidv1.BatchNewX509SVIDResponse_Result {
	return &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{}, Svid: &types.X509SVID{CertChain: chain}}
}

// Refusal is the result of an item that was refused.
func Refusal(code codes.Code, text string) *svidv1.BatchNewX509SVIDResponse_Result {
	return &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(code), Message: text}}
}

// NewJWTSVID answers by the hook.
func (ca *CA) NewJWTSVID(_ context.Context, r *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	ca.Lock()
	defer ca.Unlock()
	if ca.SingleJWT == nil {
		return nil, status.Error(codes.Unimplemented, "JWT functionality is disabled")
	}
	return ca.SingleJWT(r)
}
