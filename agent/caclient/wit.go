package caclient

import (
	"context"
	"errors"
	"fmt"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A WITItem asks for a WIT-SVID of a registration entry for a public key.
type WITItem struct {
	EntryID string
	// PublicKey is PKIX DER; Algorithm is the one with which it signs proofs of possession.
	PublicKey []byte
	Algorithm string
}

// An IssuedWIT is the answer to one WITItem.
type IssuedWIT struct {
	// Err says why there is no SVID.
	Err error
	// Token is the WIT-SVID in JWS compact serialization.
	Token string
}

// IssueWIT asks for all items, of which there are at most MaxBatch, by SPIRE's own RPC. The results are positional; each
// item fails or succeeds for itself.
func (c *Client) IssueWIT(ctx context.Context, items []WITItem) []IssuedWIT {
	results := make([]IssuedWIT, len(items))
	answers, err := c.issueWIT(ctx, items)
	for i := range results {
		if err != nil {
			results[i].Err = err
			continue
		}
		r := answers[i]
		switch {
		case r.GetStatus().GetCode() != int32(codes.OK):
			results[i].Err = fromStatus(status.Error(codes.Code(uint32(r.GetStatus().GetCode())), r.GetStatus().GetMessage()))
		case r.GetSvid().GetToken() == "":
			results[i].Err = errors.New("the CA answered without an SVID")
		default:
			results[i].Token = r.GetSvid().GetToken()
		}
	}
	return results
}

func (c *Client) issueWIT(ctx context.Context, items []WITItem) ([]*svidv1.BatchNewWITSVIDResponse_Result, error) {
	s, release, err := c.use()
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	request := &svidv1.BatchNewWITSVIDRequest{Params: make([]*svidv1.NewWITSVIDParams, len(items))}
	for i, item := range items {
		request.Params[i] = &svidv1.NewWITSVIDParams{EntryId: item.EntryID, PublicKey: item.PublicKey, SigningAlgorithm: item.Algorithm}
	}
	response, err := svidv1.NewSVIDClient(s.conn).BatchNewWITSVID(ctx, request)
	if err != nil {
		return nil, fromStatus(err)
	}
	if got := len(response.GetResults()); got != len(items) {
		return nil, fmt.Errorf("the CA answered %d items with %d results", len(items), got)
	}
	return response.GetResults(), nil
}
