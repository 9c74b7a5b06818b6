package caclient

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/spiffe"
)

// maxChain bounds the certificates of one X509-SVID.
const maxChain = 16

// issueByCSR asks a SPIRE server. An item whose CSR cannot be made fails alone.
func (c *Client) issueByCSR(ctx context.Context, s *session, items []IssueItem) ([]Issued, error) {
	results := make([]Issued, len(items))
	request := &svidv1.BatchNewX509SVIDRequest{}
	var asked []int // which item each param is
	for i, item := range items {
		if item.CSR == nil {
			results[i].Err = errors.New("the CA wants a certificate request, and there is none")
			continue
		}
		csr, err := item.CSR()
		if err != nil {
			results[i].Err = err
			continue
		}
		asked = append(asked, i)
		request.Params = append(request.Params, &svidv1.NewX509SVIDParams{EntryId: item.EntryID, Csr: csr})
	}
	if len(asked) == 0 {
		return results, nil
	}
	response, err := svidv1.NewSVIDClient(s.conn).BatchNewX509SVID(ctx, request)
	if err != nil {
		return nil, err
	}
	if got := len(response.GetResults()); got != len(asked) {
		return nil, fmt.Errorf("the CA answered %d items with %d results", len(asked), got)
	}
	behind := false // an entry is gone, or an authority new: the next poll will tell
	for n, r := range response.GetResults() {
		i := asked[n]
		if code := r.GetStatus().GetCode(); code != int32(codes.OK) {
			results[i].Err = status.Error(codes.Code(uint32(code)), r.GetStatus().GetMessage())
			behind = behind || code == int32(codes.NotFound)
			continue
		}
		chain := r.GetSvid().GetCertChain()
		if err := c.verifyChain(chain); err != nil {
			results[i].Err = fmt.Errorf("what the CA issued is unusable: %w", err)
			behind = behind || spiffe.RowOf(err) == "SVID-01"
			continue
		}
		results[i] = Issued{Chain: chain} // SPIRE does not say which revision of the entry it is built from
	}
	if behind {
		s.out.sync() // nobody waits for it
	}
	return results, nil
}

// verifyChain says whether others can verify the chain by the bundle that the agent holds and hands out. One that is not valid
// yet may be: the server's clock may be the better one.
func (c *Client) verifyChain(chain [][]byte) error {
	if len(chain) == 0 || len(chain) > maxChain {
		return fmt.Errorf("the X509-SVID has %d certificates, not 1 to %d", len(chain), maxChain)
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("certificate %d: %w", i, err)
		}
		certs[i] = cert
	}
	now := c.config.Now()
	if begin := certs[0].NotBefore; now.Before(begin) {
		now = begin
	}
	_, _, err := spiffe.VerifyX509SVID(certs, c.config.Bundles, spiffe.X509Options{Now: now})
	return err
}
